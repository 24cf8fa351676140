"""Cluster, then label: few labels, many points, and an objective of dispersion plus impurity.

Beside it k-means with the majority class of each cluster, logistic regression and the nearest class
mean, which learn from the labelled points only: accuracy by number of labels, over random splits.

Run it with `python semi_supervised_clustering/train.py`, or with `--label_count 30 --clusters 6`.
"""

import csv
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import DataError, Split, Table, load, split
from model import ClusterThenLabel
from plots import plot_alpha, plot_clusters, plot_label_counts, plot_objective
from run import finish_run, load_checkpoint, save_checkpoint, seed_everything, start_run

METHODS = ("ours", "chosen", "kmeans", "logistic", "nearest_mean")
SCORES = ("accuracy", "test_accuracy", "ari", "nmi")


@dataclass(frozen=True)
class Config:
    """Names and types; values and their comments stand in config.yaml."""

    dataset: Literal["auto", "penguins", "csv", "iris", "wine", "breast_cancer", "digits", "blobs"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: int
    csv_file: Path
    label_column: str
    feature_columns: tuple[str, ...]
    missing: Literal["drop", "mean"]
    scale: bool
    blob_sizes: tuple[int, ...]
    test_share: float
    label_count: int
    label_counts: tuple[int, ...]
    shown_labels: int
    splits: int
    clusters: int
    clusters_per_class: tuple[int, ...]
    folds: int
    alpha: float
    alphas: tuple[float, ...]
    distance: Literal["squared", "plain"]
    n_init: int
    max_iter: int
    tol: float
    scale_study: bool
    scale_sizes: tuple[int, ...]
    scale_labelled: float

    def __post_init__(self) -> None:
        least = dict.fromkeys(("label_count", "label_counts", "shown_labels", "folds"), 2)
        least |= dict.fromkeys(("seed", "clusters", "alpha", "alphas", "tol"), 0)
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(numbers[0], (bool, str, Path)):
                continue
            if name in least and min(numbers) < least[name]:
                raise ValueError(f"{name}: expected at least {least[name]}, found {min(numbers)}")
            if name not in least and not min(numbers) > 0:
                raise ValueError(f"{name}: expected more than 0, found {min(numbers)}")
        for name in ("blob_sizes", "scale_sizes"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name}: expected three numbers, found {getattr(self, name)}")
        for name in ("test_share", "scale_labelled"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected less than 1, found {getattr(self, name)}")
        if self.label_count not in self.label_counts:
            raise ValueError(f"label_counts: expected {self.label_count} (label_count) among them")
        if self.scale_sizes[2] > self.scale_sizes[0]:
            raise ValueError(f"scale_sizes: expected more points, found {self.scale_sizes}")


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    table = load_table(config)
    metrics = {"data": describe(table)}
    metrics["cluster"], metrics["timing"] = show(table, config, run, device)
    rows = compare(table, config, run, device)
    metrics["by_labels"] = summarise_labels(rows)
    counts = sorted({config.label_count, max(config.label_counts)})
    metrics["by_alpha"] = {
        str(count): sweep_alpha(table, config, run, device, count) for count in counts
    }
    if config.scale_study:
        metrics["timing"]["scale"] = time_beside_sklearn(config, device)
    draw(metrics, table, config, run)
    numbers = headline(metrics, config)
    finish_run(run, config, dataset=table.name, headline=numbers, metrics=metrics)


def load_table(config: Config) -> Table:
    """Raises DataError where the rows do not suffice for the labels or clusters asked for."""
    table = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        csv_file=config.csv_file,
        label_column=config.label_column,
        feature_columns=config.feature_columns,
        missing=config.missing,
        blob_sizes=config.blob_sizes,
        seed=config.seed,
    )
    for count in (config.shown_labels, *config.label_counts):
        rows = len(draw_split(table, config, count, 0).x)
        if config.clusters > rows:
            raise DataError(f"clusters: {table.name} has only {rows} rows to train on")
    print(table.note, flush=True)
    return table


def draw_split(
    table: Table, config: Config, label_count: int, number: int, device: torch.device | str = "cpu"
) -> Split:
    """Split `number`: the same rows are trained on whatever the number of labels."""
    seed = int(np.random.SeedSequence((config.seed, number)).generate_state(1)[0])
    options = {"test_share": config.test_share, "scale": config.scale, "seed": seed}
    part = split(table, label_count=label_count, **options)
    return part._replace(x=part.x.to(device), x_test=part.x_test.to(device))


# --- one clustering, step by step -------------------------------------------------------------


def make_model(config: Config, table: Table, *, number: int, **changes) -> ClusterThenLabel:
    """The model of split `number` under the run's settings, but for `changes`."""
    settings = {
        "clusters": config.clusters or len(table.classes),
        "alpha": config.alpha,
        "distance": config.distance,
        "n_init": config.n_init,
        "max_iter": config.max_iter,
        "tol": config.tol,
        "random_state": number,
    }
    return ClusterThenLabel(**(settings | changes))


def show(table: Table, config: Config, run: Path, device: torch.device) -> tuple[dict, dict]:
    """The clustering of split 0 with `shown_labels` labels: history, pictures, predictions."""
    seed_everything(config.seed, "cluster")
    part = draw_split(table, config, config.shown_labels, 0, device)
    x, x_test = part.x, part.x_test
    counts = [config.clusters] if config.clusters else cluster_counts(table, config, len(x))
    clusters = choose_clusters(part, config, table, 0, counts)
    model, seconds = make_model(config, table, number=0, clusters=clusters), []
    for _ in range(5):
        began = time.perf_counter()
        model.fit(x, part.given)
        seconds.append(time.perf_counter() - began)
    history = load_checkpoint(run, "cluster", {})
    if not history:
        rows = enumerate(model.history_, 1)
        history = [{"stage": "cluster", "epoch": epoch} | numbers for epoch, numbers in rows]
        save_checkpoint(run, "cluster", {}, history)

    scores = score(part, model.predict(x), model.predict(x_test), model.labels_)
    write_predictions(run / "predictions.csv", table, part, model, x, x_test)
    title = f"{table.name}, {len(x)} training rows, {config.shown_labels} of them labelled"
    title += f": {scores['accuracy']:.1%} of the others right"
    plot_clusters(part, model, table.classes, title, run)
    plot_objective(model.history_, title, run)
    numbers = {"labels": config.shown_labels, "clusters": clusters, "iterations": model.n_iter_}
    numbers |= {"objective": model.objective_, "impurity": model.impurity_}
    print("  ".join(f"{name} {value:.5g}" for name, value in numbers.items()), flush=True)
    steps = model.n_iter_total_ * len(x)
    timing = {"fit_seconds": median(seconds), "points_per_second": steps / median(seconds)}
    return numbers | scores, timing


def score(part: Split, predicted: Tensor, predicted_test: Tensor, clusters: Tensor) -> dict:
    """Accuracy on unlabelled training rows and test rows; ARI and NMI of `clusters` on the former.

    Rows whose class nobody knows are left out.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    seen = (part.given < 0) & (part.y >= 0)
    truth, clusters = part.y[seen], clusters.cpu()[seen]
    return {
        "accuracy": float((predicted.cpu()[seen] == truth).double().mean()),
        "test_accuracy": float((predicted_test.cpu() == part.y_test).double().mean()),
        "ari": float(adjusted_rand_score(truth, clusters)),
        "nmi": float(normalized_mutual_info_score(truth, clusters)),
    }


def write_predictions(
    path: Path, table: Table, part: Split, model: ClusterThenLabel, x: Tensor, x_test: Tensor
) -> None:
    """A line per row of the table: cluster and predicted class; `row` counts from 0."""
    lines = []
    for name, inputs, rows in (("train", x, part.rows), ("test", x_test, part.rows_test)):
        probs, clusters = model.predict_proba(inputs).cpu(), model.cluster(inputs).cpu()
        best, label = probs.max(1)
        given = part.given if name == "train" else torch.full((len(rows),), -1)
        numbers = (rows, clusters, model.classes_.cpu()[label], best, given)
        for row, cluster, label, prob, seen in zip(*(n.tolist() for n in numbers), strict=True):
            known = table.classes[seen] if seen >= 0 else ""
            lines.append((row, name, known, cluster, table.classes[label], round(prob, 4)))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "split", "label_given", "cluster", "predicted", "share_in_cluster"))
        writer.writerows(sorted(lines))


# --- over splits ------------------------------------------------------------------------------


def record(run: Path, stage: str, seed: int, jobs: list[Callable[[], dict]]) -> list[dict]:
    """A row of history.csv per job; what a killed run has done is not done again."""
    history = load_checkpoint(run, stage, {})
    rows = [row for row in history if row["stage"] == stage]
    bar = tqdm(jobs, stage, initial=len(rows), leave=False, disable=None)
    for epoch, job in enumerate(jobs[len(rows) :], len(rows) + 1):
        seed_everything(seed, stage, epoch)
        began = time.perf_counter()
        numbers = job()
        seconds = time.perf_counter() - began
        rows.append({"stage": stage, "epoch": epoch, "seconds": seconds} | numbers)
        history.append(rows[-1])
        save_checkpoint(run, stage, {}, history)
        bar.update()
    bar.close()
    return rows


def compare(table: Table, config: Config, run: Path, device: torch.device) -> dict[int, list[dict]]:
    """For each number of labels a row per split with the scores of all methods."""
    results = {}
    for count in config.label_counts:
        tries = partial(try_methods, table, config, device, count)
        jobs = [partial(tries, number) for number in range(config.splits)]
        results[count] = record(run, f"labels-{count}", config.seed, jobs)
        ours = mean(row["ours_accuracy"] for row in results[count])
        print(f"{count} labels: accuracy {ours:.4f} over {config.splits} splits", flush=True)
    return results


def try_methods(
    table: Table, config: Config, device: torch.device, label_count: int, number: int
) -> dict:
    """The scores of METHODS, and of each number of clusters, on split `number`."""
    part = draw_split(table, config, label_count, number, device)
    fitted = partial(fit_and_score, part, config, table, number)
    scores = {"ours": fitted()}
    scores["kmeans"] = fitted(alpha=0.0, init="k-means++")
    counts = cluster_counts(table, config, len(part.x))
    for clusters in counts:
        scores[f"clusters{clusters}"] = fitted(clusters=clusters)
    chosen = choose_clusters(part, config, table, number, counts)
    scores["chosen"] = scores[f"clusters{chosen}"]
    scores |= supervised(part)
    row = {f"{name}_{key}": value for name, each in scores.items() for key, value in each.items()}
    return row | {"chosen_clusters": chosen}


def cluster_counts(table: Table, config: Config, points: int) -> list[int]:
    counts = {factor * len(table.classes) for factor in config.clusters_per_class}
    return sorted(count for count in counts if count <= points) or [points]


def fit_and_score(part: Split, config: Config, table: Table, number: int, **changes) -> dict:
    model = make_model(config, table, number=number, **changes).fit(part.x, part.given)
    scores = score(part, model.predict(part.x), model.predict(part.x_test), model.labels_)
    return scores | {"impurity": model.impurity_}


def choose_clusters(
    part: Split, config: Config, table: Table, number: int, counts: list[int]
) -> int:
    """The number of clusters that predicts hidden labels best; of equally good ones the least.

    Cross-validation over the labelled points: what is hidden for a fold is an unlabelled point.
    """
    labelled = (part.given >= 0).nonzero()[:, 0]
    order = labelled[torch.randperm(len(labelled))]
    order = order[part.given[order].argsort(stable=True)]  # folds as alike as can be
    hits = []
    for clusters in counts:
        hits.append(0)
        # one start: a fold's chance of a poor one is the same for every number of clusters
        model = make_model(config, table, number=number, clusters=clusters, n_init=1)
        for fold in range(min(config.folds, len(order))):
            hidden = order[fold :: config.folds]
            given = part.given.clone()
            given[hidden] = -1
            predicted = model.fit(part.x, given).predict(part.x[hidden]).cpu()
            hits[-1] += int((predicted == part.given[hidden]).sum())
    return counts[hits.index(max(hits))]


def supervised(part: Split) -> dict[str, dict]:
    """What the labelled points alone teach; here ARI and NMI are of the predicted classes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid

    x, x_test = part.x.cpu().numpy(), part.x_test.cpu().numpy()
    labelled = (part.given >= 0).numpy()
    scores = {}
    models = {"logistic": LogisticRegression(max_iter=1000), "nearest_mean": NearestCentroid()}
    for name, model in models.items():
        model.fit(x[labelled], part.given.numpy()[labelled])
        predicted, on_test = (torch.from_numpy(model.predict(each)) for each in (x, x_test))
        scores[name] = score(part, predicted, on_test, predicted)
    return scores


def summarise_labels(results: dict[int, list[dict]]) -> dict:
    """Mean and standard deviation over the splits, by number of labels, method and score."""
    summary = {}
    for count, rows in results.items():
        names = [key.removesuffix("_nmi") for key in rows[0] if key.endswith("_nmi")]
        summary[str(count)] = {
            name: {key: spread([row[f"{name}_{key}"] for row in rows]) for key in SCORES}
            for name in names
        }
        chosen = [row["chosen_clusters"] for row in rows]
        times = {str(number): chosen.count(number) for number in sorted(set(chosen))}
        summary[str(count)]["chosen"]["times_chosen"] = times
    return summary


def spread(values: list[float]) -> dict:
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def sweep_alpha(
    table: Table, config: Config, run: Path, device: torch.device, label_count: int
) -> dict:
    """Accuracy and impurity by alpha, over the splits."""

    def job(alpha: float) -> dict:
        scores = []
        for number in range(config.splits):
            part = draw_split(table, config, label_count, number, device)
            scores.append(fit_and_score(part, config, table, number, alpha=alpha))
        return {"alpha": alpha} | {
            f"{name}_{key}": value
            for name in ("accuracy", "impurity")
            for key, value in spread([each[name] for each in scores]).items()
        }

    jobs = [partial(job, alpha) for alpha in config.alphas]
    return {
        f"{row['alpha']:g}": {
            name: {"mean": row[f"{name}_mean"], "sd": row[f"{name}_sd"]}
            for name in ("accuracy", "impurity")
        }
        for row in record(run, f"alpha-{label_count}", config.seed, jobs)
    }


# --- scale ------------------------------------------------------------------------------------


def time_beside_sklearn(config: Config, device: torch.device) -> dict:
    """Milliseconds per iteration, ours and scikit-learn's KMeans in turn, from the same start.

    A run of one iteration is taken off a run of up to 101: what is left are 100 iterations.
    """
    from sklearn.cluster import KMeans
    from sklearn.datasets import make_blobs
    from sklearn.exceptions import ConvergenceWarning

    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    points, features, clusters = config.scale_sizes
    x, y = make_blobs(
        points, features, centers=clusters, cluster_std=10.0, random_state=config.seed
    )
    x, order = x.astype(np.float32), np.random.default_rng(config.seed).permutation(points)
    y[order[round(config.scale_labelled * points) :]] = -1
    start = x[order[:clusters]]
    on_device = torch.from_numpy(x).to(device)

    def ours(iterations: int, alpha: float) -> int:
        options = {"init": torch.from_numpy(start), "max_iter": iterations}
        return ClusterThenLabel(clusters, alpha, **options).fit(on_device, y).n_iter_

    def theirs(iterations: int) -> int:
        options = {"n_init": 1, "init": start, "max_iter": iterations, "tol": 0}
        return KMeans(clusters, **options).fit(x).n_iter_

    runs = {
        "ours": partial(ours, alpha=config.alpha),
        "ours_alpha_0": partial(ours, alpha=0.0),
        "sklearn": theirs,
    }
    times = {name: [] for name in runs}
    fits = {name: [] for name in runs}
    for _ in range(3):
        for name, fit in runs.items():
            began = time.perf_counter()
            fit(1)
            halfway = time.perf_counter()
            iterations = fit(101) - 1
            ended = time.perf_counter()
            fits[name].append(ended - halfway)
            times[name].append((ended - 2 * halfway + began) / max(1, iterations) * 1000)
    numbers = {f"{name}_milliseconds_per_iteration": median(t) for name, t in times.items()}
    numbers |= {f"{name}_fit_seconds": median(t) for name, t in fits.items()}
    ratio = median(times["ours"]) / median(times["sklearn"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return numbers | {"ours_by_sklearn": ratio, "peak_gigabytes": peak}


# --- report -----------------------------------------------------------------------------------


def describe(table: Table) -> dict:
    numbers = {"rows": len(table.x), "features": table.x.shape[1], "classes": list(table.classes)}
    unknown = int((table.y < 0).sum())
    return numbers | {"rows_dropped": table.dropped, "rows_without_class": unknown}


def headline(metrics: dict, config: Config) -> dict[str, float]:
    scores = metrics["by_labels"][str(config.label_count)]
    return {
        "accuracy": scores["ours"]["accuracy"]["mean"],
        "kmeans_accuracy": scores["kmeans"]["accuracy"]["mean"],
        "supervised_accuracy": scores["logistic"]["accuracy"]["mean"],
        "ari": scores["ours"]["ari"]["mean"],
        "points_per_second": metrics["timing"]["points_per_second"],
    }


def draw(metrics: dict, table: Table, config: Config, run: Path) -> None:
    """The pictures of all splits; `show` has drawn those of one clustering."""
    title = f"{table.name}, {len(table.x)} rows, {config.splits} splits"
    plot_label_counts(metrics["by_labels"], title, run)
    plot_alpha(metrics["by_alpha"], config.alpha, title, run)


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
