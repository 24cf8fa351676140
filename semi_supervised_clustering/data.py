"""Tables of numbers with a class for each row, or for some, split into training and test rows.

penguins  Palmer penguins (Horst, Hill & Gorman 2020, CC0): species from four measurements
csv       one's own table
iris, wine, breast_cancer, digits  real tables that come with scikit-learn
blobs     Gaussian clouds of any number of points
"""

import csv
import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import torch
from torch import Tensor

PENGUINS = (
    "https://raw.githubusercontent.com/allisonhorst/palmerpenguins/"
    "8957207b78d6ccd1b4654a9dd9c9041b657478ab/inst/extdata/penguins.csv"
)
PENGUINS_SHA256 = "f204db2c753b0937caac3cb35258562c14f073e4bbc76be24b4c51ce22767a93"
MEASUREMENTS = ("bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g")
BUNDLED = ("iris", "wine", "breast_cancer", "digits")
STAND_IN = "breast_cancer"
MISSING = ("", "na", "nan", "null", "none", "?")


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


class Table(NamedTuple):
    name: str
    x: Tensor  # (N, D), nan where missing
    y: Tensor  # (N,), -1 where the class is not known
    classes: tuple[str, ...]
    rows: Tensor  # (N,) number of each row in the file, from 0
    dropped: int  # rows left out as they lack a feature
    note: str = ""  # what the person who started the run should know


class Split(NamedTuple):
    """Rows of a table, scaled; classes `y` to evaluate with, `given` (-1: hidden) to learn from."""

    x: Tensor
    y: Tensor
    given: Tensor
    rows: Tensor  # which rows of the table
    x_test: Tensor
    y_test: Tensor
    rows_test: Tensor


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
    """The table `dataset`; `auto` is penguins, or a bundled one where they cannot be had.

    Raises DataError if a data set that was asked for by name cannot be had.
    """
    if dataset == "blobs":
        return load_blobs(blob_sizes, seed)
    if dataset in BUNDLED:
        return load_bundled(dataset)
    if dataset == "csv":
        table = read_csv(csv_file, label_column, feature_columns)
    else:
        try:
            table = load_penguins(data_dir)
        except DataError as error:
            if dataset == "penguins":
                raise
            note = f"{error}; scikit-learn's {STAND_IN} stands in for it"
            return load_bundled(STAND_IN)._replace(note=note)
    return drop_incomplete(table) if missing == "drop" else noted(table, "filled with the mean")


def load_bundled(name: str) -> Table:
    from sklearn import datasets  # imported where it is used: it is slow

    bunch = getattr(datasets, f"load_{name}")()
    x, y = torch.from_numpy(bunch.data).double(), torch.from_numpy(bunch.target).long()
    classes = tuple(map(str, bunch.target_names))
    return Table(name, x, y, classes, torch.arange(len(x)), 0, f"data: {name}")


def load_blobs(sizes: tuple[int, int, int], seed: int) -> Table:
    """Overlapping Gaussian clouds, one per class; sizes are points, features and classes."""
    from sklearn.datasets import make_blobs

    points, features, classes = sizes
    x, y = make_blobs(points, features, centers=classes, cluster_std=10.0, random_state=seed)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    names = tuple(map(str, range(classes)))
    return Table("blobs", x, y, names, torch.arange(points), 0, "data: blobs (synthetic)")


def load_penguins(data_dir: Path) -> Table:
    path = data_dir / "penguins.csv"
    if not path.exists():
        download(PENGUINS, PENGUINS_SHA256, path)
    return read_csv(path, "species", MEASUREMENTS)._replace(name="penguins")


def download(url: str, sha256: str, path: Path) -> None:
    """Fetch a small file and check it. Raises DataError if that fails."""
    reason = f"{path} is not there and could not be downloaded"
    host = "/".join(url.split("/")[:3])
    if not reachable(url):
        raise DataError(f"{reason}: {host} does not answer")
    try:
        with urlopen(url, timeout=30) as answer:
            content = answer.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{reason}: what {host} sent is not the known file")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise DataError(f"{reason}: {error}") from error


def reachable(url: str, seconds: float = 8.0) -> bool:
    """Whether the host answers in time. In a thread, as looking up a name has no time limit."""
    answers = []

    def ask() -> None:
        with suppress(OSError), urlopen(Request(url, method="HEAD"), timeout=seconds):
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


# --- csv --------------------------------------------------------------------------------------


def read_csv(path: Path, label_column: str, feature_columns: tuple[str, ...]) -> Table:
    """A table with a header. Raises DataError that names file and line."""
    header, lines = read_lines(path)
    if label_column not in header:
        raise DataError(f"{path}: there is no column '{label_column}'; there are {show(header)}")
    if feature_columns == ("all",):
        others = [name for name in header if name != label_column]
        feature_columns = [name for name in others if is_numeric(lines, header.index(name))]
        if not feature_columns:
            raise DataError(f"{path}: no column but '{label_column}' holds numbers")
    for name in feature_columns:
        if name not in header:
            raise DataError(f"{path}: there is no column '{name}'; there are {show(header)}")
        if name == label_column:
            raise DataError(f"{path}: '{name}' cannot be both feature and class")
    columns = [header.index(name) for name in feature_columns]
    x = [[number(path, line, row[column]) for column in columns] for line, row in lines]
    labels = [row[header.index(label_column)].strip() for _, row in lines]
    labels = [None if label.lower() in MISSING else label for label in labels]
    classes = tuple(sorted({label for label in labels if label is not None}))
    if len(classes) < 2:
        raise DataError(
            f"{path}: '{label_column}' holds {len(classes)} classes, expected 2 or more"
        )
    y = [-1 if label is None else classes.index(label) for label in labels]
    note = f"data: {path.name}, class {label_column}, features {show(feature_columns)}"
    x = torch.tensor(x, dtype=torch.float64)
    return Table(path.stem, x, torch.tensor(y), classes, torch.arange(len(x)), 0, note)


def read_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row with the number of its line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(lines) < 2:
        raise DataError(f"{path}: expected a header and rows below it")
    header = [name.strip() for name in lines[0][1]]
    for line, row in lines[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: expected {len(header)} values, found {len(row)}")
    return header, lines[1:]


def show(names) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def is_numeric(lines: list[tuple[int, list[str]]], column: int) -> bool:
    """Whether a column holds numbers, where it holds anything, and holds one at least."""
    texts = [row[column].strip() for _, row in lines]
    texts = [text for text in texts if text.lower() not in MISSING]
    try:
        return bool([float(text) for text in texts])
    except ValueError:
        return False


def number(path: Path, line: int, text: str) -> float:
    """nan where missing."""
    if text.strip().lower() in MISSING:
        return float("nan")
    with suppress(ValueError):
        value = float(text)
        if abs(value) < float("inf"):
            return value
    raise DataError(f"{path}, line {line}: expected a number, found '{text}'")


def drop_incomplete(table: Table) -> Table:
    whole = ~table.x.isnan().any(1)
    if not whole.any():
        raise DataError(f"{table.name}: every row lacks a feature; try missing: mean")
    table = noted(table, "left out")
    x, y, rows = table.x[whole], table.y[whole], table.rows[whole]
    return table._replace(x=x, y=y, rows=rows, dropped=int((~whole).sum()))


def noted(table: Table, done: str) -> Table:
    lacking = int(table.x.isnan().any(1).sum())
    text = f"; {lacking} rows lack a feature: {done}" if lacking else ""
    return table._replace(note=table.note + text)


# --- splits -----------------------------------------------------------------------------------


def split(table: Table, *, test_share: float, label_count: int, scale: bool, seed: int) -> Split:
    """Random training and test rows, and the labels that are given: each class has one first.

    A larger label_count holds the labels of a smaller one. Raises DataError if it is too large.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(table.x), generator=generator)
    known, unknown = order[table.y[order] >= 0], order[table.y[order] < 0]
    test_count = max(1, round(test_share * len(known)))
    test, pool = known[:test_count], known[test_count:]
    labelled = draw_labels(table.y[pool], label_count)
    if label_count >= len(pool):
        raise DataError(
            f"{table.name}: of {len(pool)} training rows with a class {label_count} cannot be "
            "labelled, so that some are left to evaluate on"
        )
    train = torch.cat((pool, unknown))
    given = torch.full((len(train),), -1)
    given[labelled] = table.y[pool[labelled]]
    x, x_test = standardise(table.x[train], table.x[test], scale)
    return Split(
        x, table.y[train], given, table.rows[train], x_test, table.y[test], table.rows[test]
    )


def draw_labels(y: Tensor, count: int) -> Tensor:
    """The first row of each class, then the first ones whatever their class: `count` of y (N,)."""
    firsts = torch.stack([(y == label).nonzero()[0, 0] for label in y.unique()])
    others = torch.ones(len(y), dtype=torch.bool)
    others[firsts] = False
    return torch.cat((firsts, others.nonzero()[:, 0]))[:count]


def standardise(x: Tensor, x_test: Tensor, scale: bool) -> tuple[Tensor, Tensor]:
    """Both scaled by mean and standard deviation of x (N, D); missing values become the mean.

    A constant column is only shifted.
    """
    mean = x.nanmean(0).nan_to_num(0)
    deviation = (x - mean).square().nanmean(0).nan_to_num(0).sqrt()
    deviation = torch.where((deviation > 0) & scale, deviation, 1)
    return tuple(((part - mean) / deviation).nan_to_num(0) for part in (x, x_test))
