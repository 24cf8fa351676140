"""Cluster, then label: few labels, many points, and an objective of dispersion plus impurity.

Compared, at equal numbers of clusters, starts and labels, with what its parts do alone: k-means
whose clusters take their majority class, k-means started from the labelled means, constrained
k-means; and with label spreading, a Gaussian mixture and classifiers of the labelled points.

Run it with `python semi_supervised_clustering/train.py`, or with `--label_count 30 --clusters 6`.
"""

import csv
import re
import resource
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Literal, NamedTuple

from run import (
    Count,
    Seed,
    Share,
    finish_run,
    load_checkpoint,
    open_run,
    read_rows,
    run_main,
    save,
    save_checkpoint,
    seed_everything,
    start_run,
    try_plot,
)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import DataError, Split, Table, load, split
from model import ClusterThenLabel
from plots import plot_alpha, plot_clusters, plot_label_counts, plot_objective

SCORES = ("accuracy", "test_accuracy", "ari", "nmi")
CONSTRAINED = 1e6  # an alpha that mixes no classes
Few = Annotated[int, ">= 1", "<= 1000"]
Weight = Annotated[float, ">= 0", "<= 1000000"]


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["penguins", "csv", "iris", "wine", "breast_cancer", "digits", "blobs"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    csv_file: Path
    label_column: str
    feature_columns: tuple[str, ...]
    missing: Literal["drop", "mean"]
    scale: bool
    blob_sizes: tuple[Count, Few, Few]
    test_share: Share
    label_count: Annotated[int, ">= 0", "<= 10000000"]
    label_counts: tuple[Annotated[int, ">= 2", "<= 10000000"], ...]
    splits: Few
    clusters: Annotated[int, ">= 0", "<= 10000"]
    clusters_per_class: tuple[Few, ...]
    metric: Literal["pooled", "euclidean"]
    distance: Literal["squared", "plain"]
    alpha: Weight
    alphas: tuple[Weight, ...]
    folds: Annotated[int, ">= 2", "<= 100"]
    n_init: Few
    max_iter: Annotated[int, ">= 1", "<= 100000"]
    tol: Annotated[float, ">= 0", "< 1"]
    compare: bool
    scale_study: bool
    scale_sizes: tuple[str, ...]
    scale_labelled: Share

    def __post_init__(self) -> None:
        if self.compare and self.label_count not in self.label_counts:
            raise ValueError(f"label_counts: expected {self.label_count} (label_count) among them")
        if self.metric == "pooled" and self.distance == "plain":
            raise ValueError("distance: expected squared where metric is pooled")
        for sizes in self.scale_sizes:
            if not re.fullmatch(r"[1-9]\d{0,7}x[1-9]\d{0,3}x[1-9]\d{0,3}", sizes):
                raise ValueError(f"scale_sizes: expected as 1000000x16x10, found '{sizes[:99]}'")
            points, _, clusters = map(int, sizes.split("x"))
            if clusters > points:
                raise ValueError(f"scale_sizes: expected more points than clusters in '{sizes}'")


class Clustered(NamedTuple):
    """A split, and what was fitted to it."""

    part: Split
    model: ClusterThenLabel
    seconds: float  # of a fit: the median of five
    iterations: int  # of all starts


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    table = load_table(config)
    open_run(run, config, table.name, table.x, table.y, table.classes, table.features)
    shown = cluster(table, config, run, device)
    metrics = {"data": describe(table), "cluster": describe_fit(shown)}
    metrics["timing"] = {
        "fit_seconds": shown.seconds,
        "points_per_second": shown.iterations * len(shown.part.x) / shown.seconds,
    }
    if config.compare:
        metrics |= summarise(compare(table, config, run, device))
        metrics["by_alpha"] = by_alpha(table, config, run, device)
    if config.scale_study:
        metrics["timing"]["scale"] = compare_speed(config, device)
    write_predictions(run / "predictions.csv", table, shown)
    plot_results(metrics, table, shown, config, run)
    save_model(shown, table, config, run)
    finish_run(
        run,
        config,
        dataset=table.name,
        headline=headline(metrics, config),
        metrics=metrics,
        use=f"python semi_supervised_clustering/predict.py {shlex.quote(str(run))} TABLE.csv",
    )


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
    for count in (config.label_count, *(config.label_counts if config.compare else ())):
        rows = len(sample_split(table, config, count, 0).x)
        if (clusters := config.clusters or len(table.classes)) > rows:
            most = f"at most {rows}, the training rows of {table.name}"
            raise DataError(f"clusters: expected {most}, found {clusters}")
    print(table.note)
    return table


def sample_split(
    table: Table, config: Config, label_count: int, number: int, device: torch.device | str = "cpu"
) -> Split:
    """Split `number`: the same rows are trained on whatever the number of labels."""
    seed = int(np.random.SeedSequence((config.seed, number)).generate_state(1)[0])
    options = {"test_share": config.test_share, "scale": config.scale, "seed": seed}
    part = split(table, label_count=label_count, **options)
    return part._replace(x=part.x.to(device), x_test=part.x_test.to(device))


def make_model(config: Config, table: Table, *, number: int, **changes) -> ClusterThenLabel:
    """The model of split `number` under the run's settings, but for `changes`."""
    settings = {
        "n_clusters": config.clusters or len(table.classes),
        "alpha": config.alpha,
        "metric": config.metric,
        "distance": config.distance,
        "n_init": config.n_init,
        "max_iter": config.max_iter,
        "tol": config.tol,
        "random_state": number,
    }
    return ClusterThenLabel(**(settings | changes))


# --- one clustering ---------------------------------------------------------------------------


def cluster(table: Table, config: Config, run: Path, device: torch.device) -> Clustered:
    """The clustering of split 0 with `label_count` labels; its iterations are in history.csv."""
    part = sample_split(table, config, config.label_count, 0, device)
    model, seconds = make_model(config, table, number=0), []
    for _ in range(5):
        began = time.perf_counter()
        model.fit(part.x, part.given)
        seconds.append(time.perf_counter() - began)
    history = load_checkpoint(run, "cluster", {})
    if not history:
        rows = enumerate(model.history_, 1)
        history = [{"stage": "cluster", "epoch": epoch} | numbers for epoch, numbers in rows]
        save_checkpoint(run, "cluster", {}, history)
    return Clustered(part, model, median(seconds), model.n_iter_total_)


def describe_fit(shown: Clustered) -> dict:
    part, model = shown.part, shown.model
    numbers = {
        "labels": int((part.given >= 0).sum()),
        "clusters": model.clusters_,
        "iterations": model.n_iter_,
        "objective": model.objective_,
        "impurity": model.impurity_,
    }
    print("  ".join(f"{name} {value:.5g}" for name, value in numbers.items()))
    return numbers | score(part, model.predict(part.x), model.predict(part.x_test), model.labels_)


def score(part: Split, predicted: Tensor, predicted_test: Tensor, clusters: Tensor) -> dict:
    """Accuracy on unlabelled training rows and test rows; ARI and NMI of `clusters` on the former.

    Rows of unknown class are left out; nan where none is left.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    seen = (part.given < 0) & (part.y >= 0)
    truth, clusters = part.y[seen], clusters.cpu()[seen]
    there = len(truth) > 0
    return {
        "accuracy": float((predicted.cpu()[seen] == truth).double().mean()),
        "test_accuracy": float((predicted_test.cpu() == part.y_test).double().mean()),
        "ari": float(adjusted_rand_score(truth, clusters)) if there else float("nan"),
        "nmi": float(normalized_mutual_info_score(truth, clusters)) if there else float("nan"),
    }


# --- every arm, over splits -------------------------------------------------------------------


def rounds(run: Path, stage: str, count: int, seed: int) -> Iterator[dict]:
    """A row of history.csv for each round that is left to do; the caller fills it.

    As run.py's epochs, but nothing is trained from round to round: no weights are kept.
    """
    history = load_checkpoint(run, stage, {})
    done = sum(row["stage"] == stage for row in history)
    for epoch in tqdm(range(done + 1, count + 1), stage, leave=False, disable=None):
        seed_everything(seed, stage, epoch)
        began = time.perf_counter()
        row = {"stage": stage, "epoch": epoch, "seconds": 0.0}
        yield row
        row["seconds"] = time.perf_counter() - began
        history.append(row)
        save_checkpoint(run, stage, {}, history)


def compare(table: Table, config: Config, run: Path, device: torch.device) -> dict[int, list[dict]]:
    """For each number of labels a row per split with the scores of all methods."""
    for row in rounds(run, "splits", config.splits, config.seed):
        number = row["epoch"] - 1
        free = unlabelled_arms(table, config, device, number)
        for count in config.label_counts:
            part = sample_split(table, config, count, number, device)
            for name, value in try_methods(part, free, config, table, number).items():
                row[f"{count}_{name}"] = value
    rows = read_rows(run, "splits")
    results = {}
    for count in config.label_counts:
        start = f"{count}_"
        results[count] = [
            {name.removeprefix(start): x for name, x in row.items() if name.startswith(start)}
            for row in rows
        ]
        ours = mean(row[f"{ours_of(config, table)}_accuracy"] for row in results[count])
        print(f"labels {count}  splits {config.splits}  accuracy {ours:.4f}")
    return results


def ours_of(config: Config, table: Table) -> str:
    return f"ours{config.clusters or len(table.classes)}"


def cluster_counts(table: Table, config: Config, points: int) -> list[int]:
    """Numbers of clusters at which all arms are compared, and of which one is chosen."""
    counts = {factor * len(table.classes) for factor in config.clusters_per_class}
    counts = {count for count in counts if count <= points}
    return sorted(counts | {config.clusters or len(table.classes)})


def unlabelled_arms(
    table: Table, config: Config, device: torch.device, number: int
) -> dict[str, ClusterThenLabel]:
    """k-means without labels, for each number of clusters: the same whatever the labels."""
    part = sample_split(table, config, config.label_counts[0], number, device)
    models = {}
    for clusters in cluster_counts(table, config, len(part.x)):
        options = {"n_clusters": clusters, "alpha": 0.0, "init": "k-means++"}
        for name, metric in (("kmeans", "euclidean"), ("kmeans_pooled", "pooled")):
            if metric == "pooled" and config.metric != "pooled":
                continue
            model = make_model(config, table, number=number, metric=metric, **options)
            models[f"{name}{clusters}"] = model.fit(part.x)
    return models


def try_methods(
    part: Split, free: dict[str, ClusterThenLabel], config: Config, table: Table, number: int
) -> dict:
    """The scores of each arm at each number of clusters, and of the other methods, on a split."""
    scores = {name: score_fit(part, model.relabel(part.given)) for name, model in free.items()}
    fit = partial(fit_and_score, part, config, table, number)
    counts = cluster_counts(table, config, len(part.x))
    for clusters in counts:
        scores[f"ours{clusters}"] = fit(n_clusters=clusters)
        scores[f"seeded{clusters}"] = fit(n_clusters=clusters, alpha=0.0)
        scores[f"constrained{clusters}"] = fit(n_clusters=clusters, alpha=CONSTRAINED)
        if config.metric == "pooled":
            scores[f"ours_euclidean{clusters}"] = fit(n_clusters=clusters, metric="euclidean")
    clusters, alpha = choose(part, config, table, number, counts)
    scores["chosen"] = fit(n_clusters=clusters, alpha=alpha)
    scores |= score_baselines(part)
    row = {f"{name}_{key}": value for name, each in scores.items() for key, value in each.items()}
    return row | {"chosen_clusters": clusters, "chosen_alpha": alpha}


def fit_and_score(part: Split, config: Config, table: Table, number: int, **changes) -> dict:
    model = make_model(config, table, number=number, **changes)
    return score_fit(part, model.fit(part.x, part.given))


def score_fit(part: Split, model: ClusterThenLabel) -> dict:
    scores = score(part, model.predict(part.x), model.predict(part.x_test), model.labels_)
    return scores | {"impurity": model.impurity_}


def choose(
    part: Split, config: Config, table: Table, number: int, counts: list[int]
) -> tuple[int, float]:
    """Number of clusters and alpha that predict hidden labels best; of equals the first.

    Cross-validation over the labelled points: what is hidden for a fold is an unlabelled point.
    """
    labelled = (part.given >= 0).nonzero()[:, 0]
    order = labelled[torch.randperm(len(labelled))]
    order = order[part.given[order].argsort(stable=True)]  # folds as alike as can be
    hits = {}
    for clusters in counts:
        for alpha in config.alphas:
            # one start: a fold's chance of a poor one is the same for every candidate
            options = {"n_clusters": clusters, "alpha": alpha, "n_init": 1}
            model, hits[clusters, alpha] = make_model(config, table, number=number, **options), 0
            for fold in range(min(config.folds, len(order))):
                hidden = order[fold :: config.folds]
                given = part.given.clone()
                given[hidden] = -1
                predicted = model.fit(part.x, given).predict(part.x[hidden]).cpu()
                hits[clusters, alpha] += int((predicted == part.given[hidden]).sum())
    return max(hits, key=hits.get)


def score_baselines(part: Split) -> dict[str, dict]:
    """Methods that do not cluster first; ARI and NMI are of the predicted classes."""
    x, x_test = part.x.cpu().double().numpy(), part.x_test.cpu().double().numpy()
    scores = {}
    with warnings.catch_warnings():  # constant features, a disconnected graph, few labels
        warnings.simplefilter("ignore")
        models, classes = fit_baselines(x, part.given.numpy())
        for name, model in models.items():
            answers = [model.predict(each) for each in (x, x_test)]
            if name == "mixture":
                answers = [classes[each] for each in answers]
            predicted, on_test = map(torch.from_numpy, answers)
            scores[name] = score(part, predicted, on_test, predicted)
    return scores


def fit_baselines(x: np.ndarray, given: np.ndarray) -> tuple[dict, np.ndarray]:
    """Classifiers fitted to x (N, D) and classes (N,), -1 where hidden, and the classes seen.

    Label spreading and the Gaussian mixture (one tied covariance, a component per class, started at
    the labelled means) see all points, logistic regression and the nearest mean the labelled ones.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import NearestCentroid
    from sklearn.semi_supervised import LabelSpreading

    labelled = given >= 0
    classes = np.unique(given[labelled])
    means = np.stack([x[given == label].mean(0) for label in classes])
    options = {"covariance_type": "tied", "means_init": means, "reg_covar": 1e-3}
    mixture = GaussianMixture(len(classes), random_state=0, **options)
    spreading = LabelSpreading("knn", n_neighbors=min(7, len(x) - 1))
    few = x[labelled], given[labelled]
    models = {
        "mixture": mixture.fit(x),
        "spreading": spreading.fit(x, given),
        "logistic": LogisticRegression(max_iter=1000).fit(*few),
        "nearest_mean": NearestCentroid().fit(*few),
    }
    return models, classes


def summarise(results: dict[int, list[dict]]) -> dict:
    """Over the splits, by number of labels and method: mean and standard deviation of each score;
    and of the differences in accuracy between our arm and the others at equal numbers of clusters.
    """
    by_labels, paired = {}, {}
    for count, rows in results.items():
        names = [key.removesuffix("_nmi") for key in rows[0] if key.endswith("_nmi")]
        by_labels[str(count)] = {
            name: {key: spread([row[f"{name}_{key}"] for row in rows]) for key in SCORES}
            for name in names
        }
        chosen = [
            f"{row['chosen_clusters']} clusters, alpha {row['chosen_alpha']:g}" for row in rows
        ]
        times = {choice: chosen.count(choice) for choice in sorted(set(chosen))}
        by_labels[str(count)]["chosen"]["times_chosen"] = times
        paired[str(count)] = {
            name: spread([row[f"{ours}_accuracy"] - row[f"{name}_accuracy"] for row in rows])
            for name in names
            if (ours := re.sub(r"^\D*", "ours", name)) in names and name != ours
        }
    return {"by_labels": by_labels, "ours_minus": paired}


def spread(values: list[float]) -> dict:
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def by_alpha(table: Table, config: Config, run: Path, device: torch.device) -> dict:
    """Accuracy and impurity by number of labels and alpha, over the splits."""
    counts = sorted({config.label_count, max(config.label_counts)})
    pairs = [(count, alpha) for count in counts for alpha in config.alphas]
    for row in rounds(run, "alpha", len(pairs), config.seed):
        row["labels"], row["alpha"] = pairs[row["epoch"] - 1]
        scores = []
        for number in range(config.splits):
            part = sample_split(table, config, row["labels"], number, device)
            scores.append(fit_and_score(part, config, table, number, alpha=row["alpha"]))
        for name in ("accuracy", "impurity"):
            numbers = spread([each[name] for each in scores])
            row |= {f"{name}_{key}": value for key, value in numbers.items()}
    sweeps = {str(count): {} for count in counts}
    for row in read_rows(run, "alpha"):
        sweeps[str(row["labels"])][f"{row['alpha']:g}"] = {
            name: {"mean": row[f"{name}_mean"], "sd": row[f"{name}_sd"]}
            for name in ("accuracy", "impurity")
        }
    return sweeps


# --- scale ------------------------------------------------------------------------------------


def compare_speed(config: Config, device: torch.device) -> dict:
    """Seconds of whole fits until nothing changes, ours and scikit-learn's KMeans alternately.

    By size "points x features x clusters": from the same random points, and from k-means++; ours
    with and without labels. `dispersion` are sums of squared distances by points.
    """
    results = {}
    for sizes in config.scale_sizes:
        results[sizes] = time_one_size(sizes, config, device)
        print(sizes, {k: round(v["seconds"], 3) for k, v in results[sizes]["fits"].items()})
    return results


def time_one_size(sizes: str, config: Config, device: torch.device) -> dict:
    from sklearn.cluster import KMeans
    from sklearn.datasets import make_blobs

    points, features, clusters = map(int, sizes.split("x"))
    options = {"centers": clusters, "cluster_std": 10.0, "random_state": config.seed}
    x, y = make_blobs(points, features, **options)
    x, order = x.astype(np.float32), np.random.default_rng(config.seed).permutation(points)
    y[order[round(config.scale_labelled * points) :]] = -1
    start, on_device = x[order[:clusters]], torch.from_numpy(x).to(device)
    variance = float(((x - x.mean(0)) ** 2).sum(1, dtype=np.float64).mean())

    def ours(alpha: float, **options) -> tuple[int, float]:
        model = ClusterThenLabel(clusters, alpha, n_init=1, random_state=config.seed, **options)
        model.fit(on_device, y if alpha else None)
        return model.n_iter_total_, model.history_[-1]["dispersion"] * variance

    def theirs(**options) -> tuple[int, float]:
        model = KMeans(clusters, n_init=1, random_state=config.seed, tol=0, **options).fit(x)
        return model.n_iter_, model.inertia_ / points

    fits = {
        "sklearn_same_start": partial(theirs, init=start),
        "ours_alpha_0_same_start": partial(ours, 0.0, init=start),
        "ours_same_start": partial(ours, config.alpha, init=start),
        "sklearn_kmeans++": theirs,
        "ours_alpha_0_kmeans++": partial(ours, 0.0, init="k-means++"),
        "ours_labelled": partial(ours, config.alpha),
    }
    numbers = time_fits(fits)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"fits": numbers, "threads": torch.get_num_threads(), "peak_gigabytes": peak}


def time_fits(fits: dict[str, Callable[[], tuple[int, float]]]) -> dict[str, dict]:
    """Iterations and dispersion of each fit, and its seconds, medians of three alternate runs."""
    times, numbers = {name: [] for name in fits}, {}
    for name, fit in 3 * list(fits.items()):
        began, worked = time.perf_counter(), time.process_time()
        iterations, dispersion = fit()
        times[name].append((time.perf_counter() - began, time.process_time() - worked))
        numbers[name] = {"iterations": iterations, "dispersion": dispersion}
    for name, pairs in times.items():
        seconds, processor_seconds = map(median, zip(*pairs, strict=True))
        numbers[name] |= {"seconds": seconds, "processor_seconds": processor_seconds}
    return numbers


# --- report -----------------------------------------------------------------------------------


def describe(table: Table) -> dict:
    numbers = {"rows": len(table.x), "features": table.x.shape[1], "classes": list(table.classes)}
    unknown = int((table.y < 0).sum())
    return numbers | {"rows_dropped": table.dropped, "rows_without_class": unknown}


def write_predictions(path: Path, table: Table, shown: Clustered) -> None:
    """A line per row of the table: cluster and predicted class; `row` counts from 0."""
    part, model, lines = shown.part, shown.model, []
    for name, inputs, rows in (
        ("train", part.x, part.rows),
        ("test", part.x_test, part.rows_test),
    ):
        probs, clusters = model.predict_proba(inputs).cpu(), model.cluster(inputs).cpu()
        best, label = probs.max(1)
        given = part.given if name == "train" else torch.full((len(rows),), -1)
        predicted = torch.from_numpy(model.classes_)[label]
        numbers = (rows, clusters, predicted, best, given)
        for row, number, label, prob, seen in zip(*(n.tolist() for n in numbers), strict=True):
            known = table.classes[seen] if seen >= 0 else ""
            lines.append((row, name, known, number, table.classes[label], round(prob, 4)))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "split", "label_given", "cluster", "predicted", "share_in_cluster"))
        writer.writerows(sorted(lines))


def save_model(shown: Clustered, table: Table, config: Config, run: Path) -> None:
    """model.pt: all that predict.py needs."""
    scaling = shown.part.scaling
    description = {
        "project": "semi_supervised_clustering",
        "features": list(table.features),
        "missing": config.missing,
        "classes": [table.classes[code] for code in shown.model.classes_],
        "mean": scaling.mean,
        "deviation": scaling.deviation,
        "estimator": shown.model.state(),
    }
    save(run / "model.pt", description)


def headline(metrics: dict, config: Config) -> dict[str, float]:
    """Accuracy on unlabelled rows with `label_count` labels; the arms have as many clusters."""
    if not config.compare:
        return {name: metrics["cluster"][name] for name in ("accuracy", "test_accuracy")}
    scores, clusters = metrics["by_labels"][str(config.label_count)], metrics["cluster"]["clusters"]
    arms = {
        "accuracy": f"ours{clusters}",
        "seeded_accuracy": f"seeded{clusters}",
        "kmeans_accuracy": f"kmeans{clusters}",
        "supervised_accuracy": "logistic",
    }
    return {name: scores[arm]["accuracy"]["mean"] for name, arm in arms.items()}


def plot_results(metrics: dict, table: Table, shown: Clustered, config: Config, run: Path) -> None:
    models = {"ours": shown.model}
    if config.compare:
        options = {"alpha": 0.0, "init": "k-means++", "metric": "euclidean"}
        kmeans = make_model(config, table, number=0, **options).fit(shown.part.x)
        models = {"k-means": kmeans.relabel(shown.part.given)} | models
    labels, clusters = metrics["cluster"]["labels"], metrics["cluster"]["clusters"]
    name = table.name.replace("$", r"\$")  # two would enclose a formula
    title = f"{name}, {len(shown.part.x)} training rows, {labels} of them labelled"
    title += f", {clusters} clusters"
    try_plot(plot_clusters, shown.part, models, table.classes, title, run / "clusters.png")
    try_plot(plot_objective, shown.model.history_, title, run / "objective.png")
    if config.compare:
        title = f"{name}, {len(table.x)} rows, {config.splits} split{'s' * (config.splits > 1)}"
        by_labels = metrics["by_labels"]
        try_plot(plot_label_counts, by_labels, clusters, title, run / "labels.png")
        try_plot(plot_alpha, metrics["by_alpha"], config.alpha, title, run / "alpha.png")


if __name__ == "__main__":
    run_main(main, DataError)
