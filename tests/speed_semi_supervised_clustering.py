"""Whole fits and iterations of semi_supervised_clustering and of scikit-learn's KMeans, in turn.

Run it with `python tests/speed_semi_supervised_clustering.py`, with nothing else running: up to
six minutes. `--points 20000 --repeats 1` is a trial. Both libraries start from the same centres,
and from one k-means++ start each, with alpha 0; tol is 0, and 300 iterations are the most. An
iteration is a tenth of the difference of fits of 2 and of 12, without the sample. Seconds are
medians.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parent.parent))
from semi_supervised_clustering.model import ClusterThenLabel


def blobs(points: int, features: int, clusters: int) -> np.ndarray:
    """float32 (points, features) around random centres, made without a second copy."""
    generator = np.random.default_rng(0)
    centres = generator.normal(scale=3, size=(clusters, features)).astype(np.float32)
    x = np.empty((points, features), np.float32)
    for rows in np.array_split(x, 100):  # views
        generator.standard_normal(out=rows, dtype=np.float32)
        rows *= 3
        rows += centres[generator.integers(0, clusters, len(rows))]
    return x


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def print_memory(metric: str, points: int) -> None:
    """By how much a fit raises the process' peak, after one of few rows has imported modules."""
    x, y = blobs(20_000, 16, 10), np.full(points, -1, np.int8)
    y[::100] = np.arange(len(y[::100])) % 10
    model = ClusterThenLabel(10, metric=metric, n_init=1, max_iter=20, random_state=0)
    model.fit(x, y[: len(x)])
    x = blobs(points, 16, 10)
    before = peak()
    model.fit(x, y)
    print(f"memory, {metric}: {peak() - before:.0f} MB more for {x.nbytes / 2**20:.0f} MB of data")


def theirs(x: np.ndarray, clusters: int, init, most: int) -> tuple[int, float]:
    """Iterations and mean squared distance from the centre."""
    options = {"n_init": 1, "tol": 0, "max_iter": most, "random_state": 0}
    model = KMeans(clusters, init=init, **options).fit(x)
    return model.n_iter_, model.inertia_ / len(x)


def ours(x: np.ndarray, clusters: int, init, most: int, sample: int | None = 10_000):
    options = {"n_init": 1, "tol": 0.0, "max_iter": most, "random_state": 0, "sample": sample}
    model = ClusterThenLabel(clusters, 0.0, init=init, **options).fit(x)
    return model.n_iter_total_, model.history_[-1]["dispersion"] * model.unit_


def in_turn(fits: dict[str, Callable], repeats: int) -> dict[str, tuple]:
    """Median seconds, and what each fit returns; one of each in every round."""
    seconds, answers = {name: [] for name in fits}, {}
    for _ in range(repeats):
        for name, fit in fits.items():
            began = time.perf_counter()
            answers[name] = fit()
            seconds[name].append(time.perf_counter() - began)
    return {name: (median(seconds[name]), *answers[name]) for name in fits}


def compare(x: np.ndarray, clusters: int, repeats: int) -> list[str]:
    """Cells: an iteration's ms of both, then seconds, iterations and dispersion of four fits."""
    start = x[np.random.default_rng(1).choice(len(x), clusters, replace=False)]
    short = {
        f"{fit.__name__}{most}": partial(fit, x, clusters, start, most, **more)
        for fit, more in ((theirs, {}), (ours, {"sample": None}))
        for most in (2, 12)
    }
    whole = {
        f"{fit.__name__} {name}": partial(fit, x, clusters, init, 300)
        for name, init in (("same", start), ("++", "k-means++"))
        for fit in (theirs, ours)
    }
    times = in_turn(short, repeats)
    cells = []
    for name in ("theirs", "ours"):
        least, most = times[f"{name}2"], times[f"{name}12"]
        cells.append(f"{1000 * (most[0] - least[0]) / max(1, most[1] - least[1]):.1f}")
    answers = in_turn(whole, repeats).values()
    return cells + [f"{time:.2f} ({count}; {far:.1f})" for time, count, far in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1_000_000, help="at D 16; numbers, not rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=280, help="no new row after this long")
    parser.add_argument("--memory", help="a metric: print only what a fit with it needs")
    given, began = parser.parse_args(), time.perf_counter()
    if given.memory:
        return print_memory(given.memory, given.points)
    for metric in ("euclidean", "pooled"):  # a peak is a process'
        command = [sys.executable, __file__, "--memory", metric, "--points", str(given.points)]
        subprocess.run(command, check=True)
    columns = (
        "KMeans ms an iteration | ours | KMeans, same start: s (iterations; dispersion) | ours"
    )
    print(f"| threads | points x D x K | {columns} | KMeans, k-means++ | ours |\n|" + "---|" * 8)
    sizes = [(10, 16, 1), (10, 2, 4), (10, 128, 4), (100, 16, 10), (100, 2, 10), (100, 128, 20)]
    for clusters, features, less in sizes:
        x = blobs(given.points * 16 // max(features, 16) // less, features, clusters)
        for threads in (1, 2):
            if time.perf_counter() - began > given.seconds:
                print(f"left out for want of time: K {clusters}, D {features}, {threads} threads")
                continue
            torch.set_num_threads(threads)
            with threadpool_limits(threads):
                cells = compare(x, clusters, given.repeats)
            size = f"{len(x)} x {features} x {clusters}"
            print(f"| {threads} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
