"""Cluster and class of each row of a table, by a clustering that train.py left.

`python semi_supervised_clustering/predict.py RUN TABLE.csv` writes predictions.csv into a new
folder: per row its file, its number (from 0), cluster, class, probability (the class's share among
the cluster's labelled points) and distance to the cluster's centre. Tables of any length are read
in batches; rows that lack a feature are counted and get no answer.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from run import run_main, start_predict

import torch
from tqdm import tqdm

from data import DataError, Scaling, find_tables, read_numbers
from model import ClusterThenLabel

BATCH = 10_000  # rows
COLUMNS = ("file", "row", "cluster", "class", "probability", "distance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    given, saved, folder, device = start_predict(parser)
    if not given.inputs:
        raise DataError("INPUT: expected csv files, or folders of them")
    model = ClusterThenLabel.from_state(saved["estimator"], saved["classes"])
    scaling = Scaling(saved["mean"], saved["deviation"])
    needs_all = saved["missing"] == "drop"
    tables, bad, classes, incomplete = find_tables(given.inputs), [], Counter(), 0
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for table in tables:
            try:
                batches = read_batches(table, saved["features"])
                for lines in predict_batches(batches, table, model, scaling, needs_all, device):
                    writer.writerows(lines)
                    incomplete += sum(line[2] == "" for line in lines)
                    classes.update(line[3] for line in lines if line[2] != "")
            except DataError as error:
                bad.append(str(error))
    report(classes, incomplete, bad)
    print(folder)


def read_batches(path: Path, features: list[str]) -> Iterator[torch.Tensor]:
    """Rows (n, D), nan where missing. Raises DataError that names a column that is missing."""
    rows = read_numbers(path, features)
    with tqdm(unit=" rows", desc=path.name, leave=False, disable=None) as bar:
        while batch := [numbers for numbers, _ in islice(rows, BATCH)]:
            yield torch.tensor(batch, dtype=torch.float64)
            bar.update(len(batch))


def predict_batches(
    batches: Iterator[torch.Tensor],
    path: Path,
    model: ClusterThenLabel,
    scaling: Scaling,
    needs_all: bool,
    device: torch.device,
) -> Iterator[list[tuple]]:
    """Lines of predictions.csv; where a row lacks a feature that it needs, without an answer."""
    done = 0
    for x in batches:
        lines = [(path, done + number, "", "", "", "") for number in range(len(x))]
        usable = ~(x.isnan().any(1) & needs_all)
        places = usable.nonzero()[:, 0].tolist()
        if places:
            found = answers(model, scaling(x[usable]).to(device))
            for place, answer in zip(places, found, strict=True):
                lines[place] = (path, done + place, *answer)
        yield lines
        done += len(x)


def answers(model: ClusterThenLabel, x: torch.Tensor) -> Iterator[tuple]:
    """Cluster, class, probability and distance of each of the scaled rows (N, D)."""
    clusters, distances = model.nearest(x)
    best, label = model.cluster_probs_.max(1), model.classes_[model.cluster_probs_.argmax(1)]
    for cluster, distance in zip(clusters.tolist(), distances.tolist(), strict=True):
        yield cluster, label[cluster], f"{best[cluster]:.4f}", f"{distance:.5g}"


def report(classes: Counter, incomplete: int, bad: list[str]) -> None:
    """Raises DataError if no row has an answer."""
    if not classes:
        raise DataError(f"none of the tables could be used: {bad[0] if bad else 'no whole row'}")
    print("rows by class:")
    for name, count in classes.most_common(20):
        print(f"{name:>32}  {count}")
    if incomplete:
        print(f"rows that lack a feature, without an answer: {incomplete}")
    for error in bad:
        print(f"not read: {error}")


if __name__ == "__main__":
    run_main(main, DataError)
