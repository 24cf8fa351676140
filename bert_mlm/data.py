"""Tweets from a csv, without duplicates, in three splits; general English; pretrained models.

sample   sample_tweets.csv in this folder, written for this project
csv      your own csv of tweets
"""

import ast
import csv
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

SAMPLE = Path(__file__).resolve().parent / "sample_tweets.csv"
SHARES = (0.65, 0.15, 0.2)  # train, validation, test
ALIKE = 6  # words in a row that make two tweets near-duplicates
LINK = re.compile(r"https?://\S+|\bwww\.\S+")
NAME = re.compile(r"(?<!\w)@\w+")

# --- reading files: the same in every project that has it --------------------------------------


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


# --- end of reading files ---------------------------------------------------------------------


class Tweets(NamedTuple):
    name: str
    train: list[str]
    val: list[str]
    test: list[str]
    note: str  # what the person who started the run should know


def load(
    *,
    dataset: str,
    csv_file: Path,
    text_column: str,
    language: str,
    links: str,
    names: str,
    most_tweets: int,
    data_dir: Path,
    seed: int,
) -> Tweets:
    """The splits of `dataset`; `csv` is csv_file or, if that is not there, the one in data_dir.

    Duplicates are removed before the split, near-duplicates stay in one part of it; of more than
    `most_tweets` tweets as many are drawn at random. Raises DataError, which names the file.
    """
    path, column, bad = SAMPLE, "content", []
    if dataset == "csv":
        path, column = find_csv(csv_file, data_dir), text_column
    rows = read_columns(path, [column] + ["language"] * (language != "any"), bad)
    rows = [row[0].strip() for row in rows if language in ("any", row[-1])]
    texts = without_duplicates([row for row in rows if row])
    texts = [text for text in (normalise(text, links, names) for text in texts) if text]
    if len(texts) < 10:
        raise DataError(f"{path}: expected at least 10 different tweets, found {len(texts)}")
    parts = split(near_duplicates(texts), most_tweets, seed)
    if not all(parts):
        raise DataError(f"{path}: its tweets are too much alike to be split into three parts")
    name = path.stem if dataset == "csv" else "sample tweets"
    hint = "" if dataset == "csv" else " (for real ones see tweets.yaml)"
    note = f"data: {name}{hint}, {len(texts)} different tweets of {len(rows)} rows"
    note += f", {rows.count('')} of them empty" if "" in rows else ""
    note += f"; rows left out: {len(bad)}, the first: {bad[0]}" if bad else ""
    return Tweets(name, *parts, note)


def find_csv(path: Path, data_dir: Path) -> Path:
    for place in (path, data_dir / path.name):
        if place.is_file():
            return place
    raise DataError(f"{path}: there is no such file, nor {data_dir / path.name}")


def read_columns(path: Path, columns: list[str], bad: list[str]) -> Iterator[list[str]]:
    """The cells of these columns as text, row by row; a row with more cells than the header, whose
    commas are no separators, is left out and named in `bad`.

    Raises DataError that names the file.
    """
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            table = csv.reader(file, delimiter=separator, strict=True)
            header = [name.strip() for name in next(table, [])]
            places = find_columns(path, header, columns)
            for row in table:
                line, cells = table.line_num, len(row)
                if any(row[len(header) :]):
                    bad.append(f"{path}: line {line} has {cells} cells, the header {len(header)}")
                elif row:
                    row += [""] * (len(header) - cells)
                    yield [row[place] for place in places]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a csv in UTF-8, after line {line}: {error}") from error


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text. Raises DataError that names the file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.rstrip("\n") for line in file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a text in UTF-8: {error}") from error


def find_columns(path: Path, header: list[str], columns: list[str]) -> list[int]:
    """Their places. Raises DataError for one that is missing or occurs twice."""
    for column in columns:
        if header.count(column) != 1:
            there = ", ".join(header)[:200] or "none"
            hint = "--language any takes all rows" if column == "language" else "see --text_column"
            count = "are two columns" if column in header else "is no column"
            raise DataError(f"{path}: there {count} '{column}' among: {there} ({hint})")
    return [header.index(column) for column in columns]


def words(text: str) -> tuple[str, ...]:
    """Without links, names, case or a leading RT."""
    key = re.sub(r"^\W*rt\b", "", NAME.sub(" ", LINK.sub(" ", text)).casefold().strip())
    return tuple(re.findall(r"[#\w]+", key))


def without_duplicates(texts: list[str]) -> list[str]:
    """The first of all texts of the same words."""
    first = {}
    for text in texts:
        first.setdefault(words(text), text)
    return [text for key, text in first.items() if key]


def near_duplicates(texts: list[str]) -> list[list[str]]:
    """Groups of texts that share ALIKE words in a row, directly or through others of the group."""
    from scipy.sparse import coo_matrix  # imported where it is used: it is slow
    from scipy.sparse.csgraph import connected_components

    seen, pairs = {}, []
    for place, text in enumerate(texts):
        own = words(text)
        runs = (own[begin : begin + ALIKE] for begin in range(len(own) - ALIKE + 1))
        pairs += [(place, seen.setdefault(run, place)) for run in runs]
    edges = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(pairs)), edges), shape=(len(texts), len(texts)))
    _, numbers = connected_components(graph, directed=False)
    groups = {}
    for number, text in zip(numbers, texts, strict=True):
        groups.setdefault(number, []).append(text)
    return list(groups.values())


def split(groups: list[list[str]], most: int, seed: int) -> list[list[str]]:
    """At most `most` texts in three parts of about SHARES, each group in one part, drawn by `seed`:
    the file may be sorted.
    """
    most = min(most, sum(map(len, groups)))
    ends = [round(sum(SHARES[: number + 1]) * most) for number in range(3)]
    parts, done = [[], [], []], 0
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randperm(len(groups), generator=generator).tolist():
        if done < most:
            part = next(number for number in range(3) if done < ends[number])
            parts[part] += groups[place]
            done += len(groups[place])
    return parts


def normalise(text: str, links: str, names: str) -> str:
    """Links and @names kept, removed, or each made the same word; blanks and line breaks single."""
    for pattern, choice, word in ((LINK, links, "http"), (NAME, names, "@user")):
        if choice != "keep":
            text = pattern.sub(word if choice == "word" else "", text)
    return " ".join(text.split())


def whole_words(text: str, spans: list[tuple[int, int]]) -> list[int]:
    """Places of the tokens that are a whole word of four letters or more."""
    found = []
    for place, (begin, end) in enumerate(spans):
        word = text[begin:end].strip()
        around = text[max(begin - 1, 0) : begin] + text[end : end + 1]
        if len(word) > 3 and word.isalpha() and not re.search(r"[\w#@]", around):
            found.append(place)
    return found


# --- general English --------------------------------------------------------------------------


def general_english(most_characters: int) -> list[str]:
    """Different paragraphs of prose that come with Python and scikit-learn, in a fixed order."""
    found, characters = {}, 0
    for text in chain(python_topics(), data_set_descriptions(), docstrings()):
        for paragraph in map(prose, re.split(r"\n\s*\n", text)):
            if characters >= most_characters:
                return list(found)
            if paragraph and paragraph not in found:
                found[paragraph] = None
                characters += len(paragraph)
    return list(found)


def python_topics() -> Iterator[str]:
    """What `help("topic")` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def data_set_descriptions() -> Iterator[str]:
    import sklearn.datasets

    for path in sorted((Path(sklearn.datasets.__file__).parent / "descr").glob("*.rst")):
        yield path.read_text(encoding="utf-8")


def docstrings() -> Iterator[str]:
    """Of all modules, classes and functions of the standard library; nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if foreign & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):  # templates and tests of other encodings
            continue
        for node in ast.walk(tree):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield text


def prose(paragraph: str) -> str:
    """The paragraph on one line without markup; "" if it looks like code, a table or a heading."""
    text = re.sub(r":\w+:(?=`)|[`*]+|\s+", " ", paragraph)
    text = " ".join(text.split())
    letters = sum(letter.isalpha() or letter == " " for letter in text)
    if ">>>" in text or len(text.split()) < 6 or letters < 0.8 * len(text):
        return ""
    return text


# --- pretrained models ------------------------------------------------------------------------


def quiet() -> None:
    """transformers reports neither missing weights nor loading, which the run says in a line; the
    bar of a download stays.
    """
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


def find_model(
    name: str, data_dir: Path, dropout: float | None = None
) -> tuple[nn.Module, object, list[str]]:
    """Model, tokenizer, and what of its head the checkpoint lacked.

    `name` is a folder, one in data_dir/checkpoints, or a name on the hub, whose own variables (as
    HF_ENDPOINT) count. `dropout` takes the place of a BERT's own. Raises DataError.
    """
    from huggingface_hub import constants

    for folder in (Path(os.path.expanduser(name)), data_dir / "checkpoints" / name):
        if folder.is_dir():
            return load_pretrained(str(folder), local=True, dropout=dropout)
    try:
        return load_pretrained(name, local=True, dropout=dropout)
    except DataError:  # not in the hub's cache
        about = f"{name} from {constants.ENDPOINT} to {constants.HF_HUB_CACHE}"
        tqdm.write(f"downloading {about}", file=sys.stderr)
    try:
        return load_pretrained(name, local=False, dropout=dropout)
    except DataError as error:
        hand = f"by hand: {data_dir / 'checkpoints' / name}"
        raise DataError(f"could not download {about}: {error}; {hand}") from error


def load_pretrained(
    name: str, *, local: bool, dropout: float | None = None
) -> tuple[nn.Module, object, list[str]]:
    """As find_model. Code that comes with a model is not run. Raises DataError."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if tokenizer.mask_token is None or not tokenizer.is_fast:
            raise ValueError("its tokenizer has no mask token, or is not a fast one")
        if dropout is not None:
            options |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        model, report = AutoModelForMaskedLM.from_pretrained(
            name, **options, dtype=torch.float32, output_loading_info=True
        )
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError("its tokenizer has more tokens than the model")
    except Exception as error:  # of damaged files, each reader has its own
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{name}: no masked language model: {reason}") from error
    return model, tokenizer, sorted(report["missing_keys"])


# --- batches ----------------------------------------------------------------------------------


def bucketed(
    lengths: list[int], batch_size: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Batches of numbers of texts, of about the same length each, in random order.

    Sorted within random pools of 32 batches, so that the batches differ from epoch to epoch.
    """
    batches = []
    for pool in torch.randperm(len(lengths), generator=generator).split(32 * batch_size):
        pool = sorted(pool.tolist(), key=lengths.__getitem__)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
