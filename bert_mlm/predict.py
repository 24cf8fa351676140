"""The BERT of a run on your own texts: words for a gap, and how surprising a text is.

    python bert_mlm/predict.py RUN "We need [MASK] and blankets."
    python bert_mlm/predict.py RUN texts.txt more.csv --text_column text
    echo "the whole building is [MASK]" | python bert_mlm/predict.py RUN -

Of a text with [MASK] the five best fillings of each gap go to fillings.csv, of a text without one
the pseudo-log-likelihood (Salazar et al. 2020) goes to surprise.csv, the most surprising first.
"""

import argparse
import csv
import os
import sys
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

from run import run_main, shorten, start_predict, try_plot

import numpy as np
from torch import nn
from tqdm import tqdm

from data import DataError, normalise, quiet, read_columns, read_lines
from model import best_words, fill, log_likelihoods
from plots import plot_fillings, plot_surprise

SHOWN = 8  # texts on the terminal and in each picture
COLUMNS = ("text", "gap", *(f"{name}_{n}" for n in range(1, 6) for name in ("word", "probability")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text_column", default="content", help="of a csv (content)")
    given, saved, folder, device = start_predict(parser)
    quiet()
    model, tokenizer = load_model(saved)
    model.to(device)
    bad = []
    texts = read_inputs(given.inputs, given.text_column, bad)
    gaps, surprise = predict(model, tokenizer, texts, saved, folder, bad)
    if not gaps and not surprise:
        raise DataError(f"there is no text to work on{f'; {bad[0]}' if bad else ''}")
    report(gaps, surprise, bad, folder)


def load_model(saved: dict) -> tuple[nn.Module, object]:
    """The model and the tokenizer that model.pt holds."""
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in saved["files"].items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForMaskedLM.from_config(config)
    model.load_state_dict(saved["weights"])
    return model.eval(), tokenizer


def read_inputs(inputs: list[str], text_column: str, bad: list[str]) -> Iterator[str]:
    """Texts one by one: an input is a csv, another file with a text per line, `-` (stdin), or a
    text itself. Raises DataError that names a file that cannot be read, or a folder.
    """
    for given in inputs or ["-"]:
        path = Path(os.path.expanduser(given))
        if given == "-":
            yield from (line.rstrip("\n") for line in sys.stdin)
        elif os.path.isdir(path):
            raise DataError(f"{given}: expected a csv, a file of texts or a text, found a folder")
        elif path.suffix.lower() == ".csv":
            yield from (row[0] for row in read_columns(path, [text_column], bad))
        elif path.suffix.lower() == ".txt" or os.path.isfile(path):  # no error of a long text
            yield from read_lines(path)
        else:
            yield given


def predict(
    model: nn.Module, tokenizer, texts: Iterator[str], saved: dict, folder: Path, bad: list[str]
) -> tuple[list[dict], list[dict]]:
    """Write the two tables; the rows to show, of gaps the first, of whole texts the most and the
    least surprising.
    """
    gaps, surprise = [], SortedTable(folder / "surprise.csv")
    with (folder / "fillings.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for text in tqdm(texts, "texts", leave=False, disable=None):
            tokens = to_tokens(tokenizer, text, saved, bad)
            if tokenizer.mask_token_id in tokens:
                best = best_words(tokenizer, fill(model, tokenizer, [tokens]))
                for gap, words in enumerate(best, start=1):
                    table.writerow([text, gap, *(item for pair in words for item in pair)])
                if len(gaps) < SHOWN:
                    gaps.append({"text": text, "best": best})
            elif tokens:
                surprise.add(whole_text(model, tokenizer, text, tokens))
    return gaps, surprise.finish()


def to_tokens(tokenizer, text: str, saved: dict, bad: list[str]) -> list[int]:
    """As in training; none, named in `bad`, if nothing is left or a gap would be cut off."""
    gaps = text.count("[MASK]")
    clean = normalise(text, saved["links"], saved["names"])
    clean = clean.replace("[MASK]", tokenizer.mask_token)
    tokens = tokenizer(clean, truncation=True, max_length=saved["max_length"])["input_ids"]
    if not {*tokens} - {*tokenizer.all_special_ids} and not gaps:
        bad.append(f"'{shorten(text)}' (no word in it)")
        return []
    if tokens.count(tokenizer.mask_token_id) < gaps:
        bad.append(f"'{shorten(text)}' (a gap comes after {saved['max_length']} tokens)")
        return []
    return tokens


def whole_text(model: nn.Module, tokenizer, text: str, tokens: list[int]) -> dict:
    """A row of surprise.csv."""
    terms = log_likelihoods(model, tokenizer, tokens)
    known = [token for token in tokens if token not in tokenizer.all_special_ids]
    least = min(range(len(terms)), key=terms.__getitem__)
    return {
        "text": text,
        "tokens": len(terms),
        "log_likelihood": sum(terms),
        "per_token": sum(terms) / len(terms),
        "most_surprising": tokenizer.decode([known[least]]).strip(),
    }


class SortedTable:
    """A csv that is sorted by `per_token` when it is whole; of each row only score and place are
    kept in memory.
    """

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_suffix(".unsorted")
        self.file = self.temporary.open("w+", newline="", encoding="utf-8")
        self.scores, self.places = array("d"), array("q")

    def add(self, row: dict) -> None:
        if not self.scores:
            self.header = list(row)
        self.scores.append(row["per_token"])
        self.places.append(self.file.tell())
        csv.writer(self.file).writerow(row.values())

    def finish(self) -> list[dict]:
        """Write it; the first rows and the last."""
        order = np.argsort(np.frombuffer(self.scores), kind="stable") if self.scores else []
        shown = {*range(len(order))} - {*range(SHOWN // 2, len(order) - SHOWN // 2)}
        rows = []
        with self.path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(self.header if self.scores else ["text"])
            for rank, number in enumerate(order):
                self.file.seek(self.places[number])
                row = next(csv.reader(iter(self.file.readline, "")))
                table.writerow(row)
                if rank in shown:
                    rows.append(dict(zip(self.header, row, strict=True)))
        self.file.close()
        self.temporary.unlink()
        return rows


def in_one_line(text: str) -> str:
    return shorten(" ".join(text.split()))


def report(gaps: list[dict], surprise: list[dict], bad: list[str], folder: Path) -> None:
    for row in gaps:
        for words in row["best"]:
            best = ", ".join(f"{word} {prob:.0%}" for word, prob in words)
            print(f"{in_one_line(row['text'])}: {best}")
    for row in surprise:
        print(f"{float(row['per_token']):8.3f} per token  {in_one_line(row['text'])}")
    if bad:
        print(f"texts left out: {len(bad)}, the first: {bad[0]}")
    if gaps:
        try_plot(plot_fillings, gaps, folder / "fillings.png")
    if surprise:
        try_plot(plot_surprise, surprise, folder / "surprise.png")
    print(folder)


if __name__ == "__main__":
    run_main(main, DataError)
