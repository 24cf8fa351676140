"""Tweets from a csv, without duplicates, in three splits; and general English to pretrain on.

csv      one's own csv of tweets, read by Hugging Face `datasets`
sample   sample_tweets.csv beside this file, written for this project
"""

import ast
import re
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import torch

SAMPLE = Path(__file__).resolve().parent / "sample_tweets.csv"
SHARES = (0.65, 0.15, 0.2)  # train, validation, test
LINK = re.compile(r"https?://\S+|\bwww\.\S+")
NAME = re.compile(r"(?<!\w)@\w+")


class DataError(Exception):
    """Why the data or the model cannot be used, in one line for the person who started the run."""


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
    cache_dir: Path,
    seed: int,
) -> Tweets:
    """The splits of `dataset`; `auto` is csv_file if it is there, else the sample.

    Duplicates leave before the split; of more than `most_tweets` tweets as many are drawn at
    random. Raises DataError, which names the file.
    """
    note, name = "", csv_file.stem
    if dataset == "sample" or (dataset == "auto" and not csv_file.is_file()):
        if dataset == "auto":
            note = f"{csv_file} is not there: the tweets written for this project stand in; "
        csv_file, text_column, name = SAMPLE, "content", "sample tweets"
    texts, empty = read_csv(csv_file, text_column, language, cache_dir)
    found = len(texts)
    texts = [normalise(text, links, names) for text in without_duplicates(texts)]
    texts = [text for text in texts if text]
    if len(texts) < 10:
        raise DataError(f"{csv_file}: expected at least 10 different tweets, found {len(texts)}")
    note += f"data: {name}, {len(texts)} different tweets of {found} ({empty} rows without text)"
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [texts[place] for place in order[:most_tweets]]  # shuffled: the file may be sorted
    first, second = (round(share * len(texts)) for share in (SHARES[0], sum(SHARES[:2])))
    return Tweets(name, texts[:first], texts[first:second], texts[second:], note)


def read_csv(path: Path, text_column: str, language: str, cache_dir: Path) -> tuple[list, int]:
    """The texts whose column `language` says so (`any`: all), and the number of empty rows."""
    import datasets  # imported where it is used: it is slow

    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        table = datasets.Dataset.from_csv(str(path), cache_dir=str(cache_dir / "csv"))
    except Exception as error:  # datasets wraps what pandas, pyarrow and the codec raise
        reason = error.__cause__ or error
        raise DataError(f"{path}: not a csv in UTF-8: {' '.join(str(reason).split())}") from error
    needed = [text_column] if language == "any" else [text_column, "language"]
    for column in needed:
        if column not in table.column_names:
            there = ", ".join(table.column_names)
            hint = "" if column == text_column else " (--language any takes all rows)"
            raise DataError(f"{path}: there is no column '{column}' among {there}{hint}")
    table = table.select_columns(needed).to_dict()
    texts = table[text_column]
    if language != "any":
        texts = [
            text for text, own in zip(texts, table["language"], strict=True) if own == language
        ]
    full = [str(text) for text in texts if text is not None and str(text).strip()]
    return full, len(texts) - len(full)


def without_duplicates(texts: list[str]) -> list[str]:
    """The first of all texts that differ only in links, names, case, blanks or a leading RT."""
    first = {}
    for text in texts:
        key = re.sub(r"^\W*rt\b", "", NAME.sub(" ", LINK.sub(" ", text)).casefold().strip())
        first.setdefault(" ".join(re.findall(r"[#\w]+", key)), text)
    return [text for key, text in first.items() if key]


def normalise(text: str, links: str, names: str) -> str:
    """Links and @names kept, removed, or each made the same word; blanks and line breaks single."""
    for pattern, choice, word in ((LINK, links, "http"), (NAME, names, "@user")):
        if choice != "keep":
            text = pattern.sub(word if choice == "word" else "", text)
    return " ".join(text.split())


def whole_words(text: str, spans: list[tuple[int, int]]) -> list[int]:
    """Places of the pieces that are a whole word of four letters or more."""
    found = []
    for place, (begin, end) in enumerate(spans):
        word = text[begin:end].strip()
        around = text[max(begin - 1, 0) : begin] + text[end : end + 1]
        if len(word) > 3 and word.isalpha() and not re.search(r"[\w#@]", around):
            found.append(place)
    return found


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


# --- batches ----------------------------------------------------------------------------------


def bucketed(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Batches of numbers of texts, of about the same length each, in random order.

    Sorted within random pools of 32 batches, so that the batches differ from epoch to epoch.
    """
    batches = []
    for pool in torch.randperm(len(lengths)).split(32 * batch_size):
        pool = sorted(pool.tolist(), key=lengths.__getitem__)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[place] for place in torch.randperm(len(batches)).tolist()]
