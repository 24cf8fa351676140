"""Tables of numbers with a class for each row, or for some, split into training and test rows.

penguins  Palmer penguins (Horst, Hill & Gorman 2020, CC0; penguins.csv in this folder): species
          from four measurements
csv       your own table
iris, wine, breast_cancer, digits  real tables that come with scikit-learn
blobs     Gaussian clouds of any number of points
"""

import csv
import math
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PENGUINS = Path(__file__).resolve().parent / "penguins.csv"
MEASUREMENTS = ("bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g")
BUNDLED = ("iris", "wine", "breast_cancer", "digits")
MISSING = ("", "na", "n/a", "#n/a", "nan", "null", "none", "?", "-")  # among numbers
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
csv.field_size_limit(10_000_000)  # characters; Python's limit is 131,072


# --- reading files: the same in every project that has it --------------------------------------


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


# --- end of reading files ---------------------------------------------------------------------


class Table(NamedTuple):
    name: str
    x: Tensor  # (N, D), nan where missing
    y: Tensor  # (N,), -1 where the class is not known
    classes: tuple[str, ...]
    features: tuple[str, ...]
    rows: Tensor  # (N,) number of each row in the file, from 0
    dropped: int  # rows left out as they lack a feature
    note: str = ""  # what the person who started the run should know


class Scaling(NamedTuple):
    """Of training rows: what is subtracted from each feature (D,), and what that is divided by."""

    mean: Tensor
    deviation: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (N, D), scaled; where a feature is missing it becomes the mean."""
        return ((x - self.mean) / self.deviation).nan_to_num(0)


class Split(NamedTuple):
    """Rows of a table, scaled; classes `y` to evaluate with, `given` (-1: hidden) to learn from."""

    x: Tensor
    y: Tensor
    given: Tensor
    rows: Tensor  # which rows of the table
    x_test: Tensor
    y_test: Tensor
    rows_test: Tensor
    scaling: Scaling


def load(
    *,
    dataset: str,
    data_dir: Path,
    csv_file: Path,
    label_column: str,
    feature_columns: tuple[str, ...],
    missing: str,
    blob_sizes: tuple[int, ...],
    seed: int,
) -> Table:
    """The table `dataset`. Raises DataError if your own cannot be used."""
    if dataset == "blobs":
        return load_blobs(blob_sizes, seed)
    if dataset in BUNDLED:
        return load_bundled(dataset)
    if dataset == "penguins":
        table = read_csv(PENGUINS, "species", MEASUREMENTS)
        more = "others: --config semi_supervised_clustering/breast_cancer.yaml, digits.yaml"
        table = table._replace(note=f"data: 344 penguins ({more})")
    else:
        path = csv_file if csv_file.is_file() else data_dir / csv_file.name
        table = read_csv(path if path.is_file() else csv_file, label_column, feature_columns)
    return drop_incomplete(table) if missing == "drop" else noted(table, "filled with the mean")


def load_bundled(name: str) -> Table:
    from sklearn import datasets  # imported where it is used: it is slow

    bunch = getattr(datasets, f"load_{name}")()
    x, y = torch.from_numpy(bunch.data).double(), torch.from_numpy(bunch.target).long()
    classes, features = (
        tuple(map(str, names)) for names in (bunch.target_names, bunch.feature_names)
    )
    return Table(name, x, y, classes, features, torch.arange(len(x)), 0, f"data: {name}")


def load_blobs(sizes: tuple[int, ...], seed: int) -> Table:
    """Overlapping Gaussian clouds, one per class; sizes are points, features and classes."""
    from sklearn.datasets import make_blobs

    points, features, classes = sizes
    x, y = make_blobs(points, features, centers=classes, cluster_std=10.0, random_state=seed)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    names = (tuple(map(str, range(count))) for count in (classes, features))
    return Table("blobs", x, y, *names, torch.arange(points), 0, "data: blobs (synthetic)")


# --- csv --------------------------------------------------------------------------------------


def read_csv(path: Path, label_column: str, feature_columns: tuple[str, ...]) -> Table:
    """A table with a header. Raises DataError that names file and line."""
    header, label_column = read_header(path), nfc(label_column)
    if len(list(islice(read_lines_of_csv(path), 2))) < 2:
        raise DataError(f"{path}: expected a header and rows below it")
    if label_column not in header:
        raise DataError(f"{path}: there is no column '{label_column}'; there are {show(header)}")
    feature_columns, reasons = choose_features(path, header, label_column, feature_columns)
    values, labels = array("d"), []
    for numbers, row in read_numbers(path, feature_columns, also=label_column):
        values.extend(numbers)
        labels.append(row.strip())
    classes = tuple(sorted({label for label in labels if label}))
    if len(classes) < 2:
        wanted = f"expected at least 2 classes in '{label_column}'"
        raise DataError(f"{path}: {wanted}, found {len(classes)}")
    codes = {label: number for number, label in enumerate(classes)} | {"": -1}
    x = torch.from_numpy(np.frombuffer(values).reshape(len(labels), -1).copy())
    y = torch.tensor([codes[label] for label in labels])
    note = f"data: {path.name}, class {label_column}, features {show(feature_columns)}"
    note += "".join(f"; {name or 'nameless'}: {why}" for name, why in reasons.items())
    return Table(path.stem, x, y, classes, tuple(feature_columns), torch.arange(len(x)), 0, note)


def choose_features(
    path: Path, header: list[str], label_column: str, wanted: tuple[str, ...]
) -> tuple[list[str], dict[str, str]]:
    """The columns to cluster by, and why others are left out. Raises DataError without any."""
    if tuple(wanted) != ("all",):
        if label_column in (names := [nfc(name) for name in wanted]):
            raise DataError(f"{path}: '{label_column}' cannot be both feature and class")
        return names, {}
    others = [name for name in header if name != label_column]
    reasons = why_not_numbers(path, others)
    names = [name for name in others if name not in reasons]
    if not names:
        first = "".join(f"; {name or 'nameless'}: {why}" for name, why in reasons.items())[:200]
        raise DataError(f"{path}: no column but '{label_column}' holds numbers{first}")
    return names, reasons


def find_tables(inputs: list[str]) -> list[Path]:
    """Files, and the csv files in folders and below. Raises DataError if there is none."""
    tables = []
    for path in (Path(os.path.expanduser(text)) for text in inputs):
        if not path.is_dir():
            tables.append(path)
        for folder, _, names in sorted(os.walk(path, followlinks=True)):
            shown = (name for name in sorted(names) if not name.startswith("."))
            tables += [Path(folder) / name for name in shown if name.lower().endswith(".csv")]
    if not tables:
        raise DataError(f"{inputs[0]}: there are no csv files in it")
    return tables


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def read_lines_of_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of its line and the texts of each row, as they are read; the header first.

    Columns are separated as those of the header, by commas, semicolons or tabs. Raises DataError.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            separator = max(",;\t", key=first.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator)
            count = None
            for row in reader:
                count = len(row) if count is None else count
                if row and len(row) != count:
                    place = f"{path}, line {reader.line_num}"
                    raise DataError(f"{place}: expected {count} values, found {len(row)}")
                if row:
                    yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a text in UTF-8 ({error})") from None
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}") from None


def read_header(path: Path) -> list[str]:
    """The columns' names. Raises DataError if one occurs twice."""
    _, row = next(read_lines_of_csv(path), (0, []))
    header = [nfc(name) for name in row]
    if not any(header):
        raise DataError(f"{path}: expected a header and rows below it")
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the column '{twice[0]}' occurs twice")
    return header


def read_numbers(
    path: Path, columns: list[str], also: str | None = None
) -> Iterator[tuple[list[float], str]]:
    """For each row the numbers of `columns`, nan where missing, and the text of the column `also`.

    Raises DataError that names file and line.
    """
    header = read_header(path)
    if absent := [name for name in columns if name not in header]:
        raise DataError(f"{path}: there is no column '{absent[0]}'; there are {show(header)}")
    places = [header.index(name) for name in columns]
    extra = header.index(also) if also is not None else None
    rows = read_lines_of_csv(path)
    next(rows)
    for line, row in rows:
        try:
            numbers = [number(row[place]) for place in places]
        except ValueError as error:
            raise DataError(f"{path}, line {line}: expected a number, found {error}") from None
        yield numbers, "" if extra is None else row[extra]


def why_not_numbers(path: Path, names: list[str]) -> dict[str, str]:
    """Why columns cannot be features: nameless (as the index that pandas writes), text, empty."""
    header, reasons, found = read_header(path), {}, Counter()
    for name in names:
        if not name or re.fullmatch(r"Unnamed: \d+", name):
            reasons[name] = "left out, as it has no name"
    rows = read_lines_of_csv(path)
    next(rows)
    for line, row in rows:
        for name in [name for name in names if name not in reasons]:
            try:
                found[name] += not math.isnan(number(row[header.index(name)]))
            except ValueError as error:
                reasons[name] = f"left out, as line {line} holds {error}"
    empty = [name for name in names if name not in reasons and not found[name]]
    return reasons | dict.fromkeys(empty, "left out, as it holds nothing")


def number(text: str) -> float:
    """nan where missing. Raises ValueError that shows the text if it is not a finite number."""
    text = text.strip()
    if text.lower() in MISSING:
        return float("nan")
    with suppress(ValueError):
        value = float(text.replace(",", "") if THOUSANDS.fullmatch(text) else text)
        if abs(value) < float("inf"):
            return value
    raise ValueError(f"'{text[:50]}'")


def show(names) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def drop_incomplete(table: Table) -> Table:
    whole = ~table.x.isnan().any(1)
    if not whole.any():
        raise DataError(f"{table.name}: every row lacks a feature; try missing: mean")
    table = noted(table, "left out")
    x, y, rows = table.x[whole], table.y[whole], table.rows[whole]
    return table._replace(x=x, y=y, rows=rows, dropped=int((~whole).sum()))


def noted(table: Table, done: str) -> Table:
    lacking = int(table.x.isnan().any(1).sum())
    text = f"; rows that lack a feature: {lacking}, {done}" if lacking else ""
    return table._replace(note=table.note + text)


# --- splits -----------------------------------------------------------------------------------


def split(table: Table, *, test_share: float, label_count: int, scale: bool, seed: int) -> Split:
    """Random training and test rows, and the labels that are given: each class has one first.

    A larger label_count holds the labels of a smaller one; 0: all are given. Raises DataError if
    it is too large.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(table.x), generator=generator)
    known, unknown = order[table.y[order] >= 0], order[table.y[order] < 0]
    test_count = max(1, round(test_share * len(known)))
    test, pool = known[:test_count], known[test_count:]
    if not len(pool):
        rows = f"found {len(known)}, with every feature"
        raise DataError(f"{table.name}: expected at least 2 rows with a class, {rows}")
    if label_count >= len(pool):
        raise DataError(
            f"label_counts: {table.name} has {len(pool)} training rows with a class, of which "
            f"{label_count} cannot be labelled: some have to be left to evaluate on; give smaller "
            "label_counts and label_count"
        )
    labelled = choose_labels(table.y[pool], label_count) if label_count else torch.arange(len(pool))
    train = torch.cat((pool, unknown))
    given = torch.full((len(train),), -1)
    given[labelled] = table.y[pool[labelled]]
    scaling = scaling_of(table.x[train], scale)
    x, x_test = scaling(table.x[train]), scaling(table.x[test])
    rows, rows_test = table.rows[train], table.rows[test]
    return Split(x, table.y[train], given, rows, x_test, table.y[test], rows_test, scaling)


def choose_labels(y: Tensor, count: int) -> Tensor:
    """The first row of each class, then the first ones whatever their class: `count` of y (N,)."""
    firsts = torch.stack([(y == label).nonzero()[0, 0] for label in y.unique()])
    others = torch.ones(len(y), dtype=torch.bool)
    others[firsts] = False
    return torch.cat((firsts, others.nonzero()[:, 0]))[:count]


def scaling_of(x: Tensor, scale: bool) -> Scaling:
    """Mean and standard deviation of x (N, D); a constant column is only shifted."""
    mean = x.nanmean(0).nan_to_num(0)
    deviation = (x - mean).square().nanmean(0).nan_to_num(0).sqrt()
    return Scaling(mean, torch.where((deviation > 0) & scale, deviation, 1))
