"""The pictures of a run: each function turns arrays into one PNG in the run's folder."""

from pathlib import Path

import matplotlib

matplotlib.rcdefaults()
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
BASELINE, METHOD = "tab:gray", "tab:green"
CLASSES = ("tab:blue", "tab:orange", "tab:purple", "tab:cyan", "tab:red", "tab:olive")
CLASSES += ("tab:pink", "tab:brown", "gold", "navy")
METHODS = {  # by name, without the number of clusters
    "ours": ("ours", METHOD, "-", "o"),
    "chosen": ("ours, clusters and alpha chosen", METHOD, "--", "s"),
    "seeded": ("started from the labels only", "tab:olive", "-", "D"),
    "kmeans": ("k-means, no labels", BASELINE, "-", "o"),
    "mixture": ("Gaussian mixture from the labels", "tab:brown", "-.", "v"),
    "spreading": ("label spreading", "tab:cyan", "-.", "<"),
    "logistic": ("labelled only: logistic regression", "black", ":", "^"),
}
SHOWN = 3000  # points drawn at most


def plot_clusters(part, models: dict, classes: tuple[str, ...], title: str, path: Path) -> None:
    """Training rows of one split by the class that each of `models` (by name) predicts, in a plane.

    The plane is that of the last model's centres; where three or fewer centres span it, its
    background shows the class of the cluster whose centre is nearest.
    """
    *_, last = models.values()
    z, flat = project(last, part.x)
    colors = [CLASSES[number % len(CLASSES)] for number in range(len(classes))]
    some = np.zeros(len(flat), dtype=bool)
    some[np.random.default_rng(0).permutation(len(flat))[:SHOWN]] = True
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.6 * len(models) + 1, 5), layout="constrained", squeeze=False,
        sharex=True, sharey=True,
    )  # fmt: skip
    for axes, (name, model) in zip(panels[0], models.items(), strict=True):
        predicted = model.predict(part.x).cpu()
        share = paint_rows(axes, flat, part, predicted, some, colors)
        axes.set_title(f"{name}: {share:.1%} of the unlabelled rows right" if share >= 0 else name)
        axes.set_xlabel("first direction between the centres")
    panels[0, 0].set_ylabel("second direction")
    if len(last.centres_) <= 3:
        paint_regions(panels[0, -1], z, last, colors)
    add_legend(figure, classes, colors)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def project(model, x: torch.Tensor) -> tuple[tuple, np.ndarray]:
    """The plane (origin (D,), directions (2, D)) of the centres in the clusters' coordinates, and
    the rows x (N, D) in it, (N, 2).
    """
    points = x.cpu().double() - model.shift_
    points = points if model.whiten_ is None else points @ model.whiten_
    origin = model.centres_.mean(0)
    _, strength, between = torch.linalg.svd(model.centres_ - origin, full_matrices=False)
    between = between[: int((strength > 1e-9 * strength.max().clamp(min=1e-9)).sum())][:2]
    rest = points - points.mean(0)
    rest = rest - rest @ between.T @ between
    _, _, along = torch.linalg.svd(rest, full_matrices=False)
    directions = torch.cat((between, along, torch.zeros(2, x.shape[1]).double()))[:2]
    return (origin, directions), ((points - origin) @ directions.T).numpy()


def paint_rows(axes, flat, part, predicted, some, colors: list[str]) -> float:
    """Rows in the colour of their predicted class; returns the share of unlabelled ones right."""
    known = (part.y >= 0).numpy()
    hidden, given = (part.given < 0).numpy(), (part.given >= 0).numpy()
    wrong, paint = hidden & known & (predicted != part.y).numpy(), np.array(colors)
    dots = hidden & some
    axes.scatter(*flat[dots].T, s=14, c=paint[predicted[dots]], alpha=0.5, linewidths=0)
    rings, ringed = paint[part.y[wrong & some]], flat[wrong & some]
    axes.scatter(*ringed.T, s=52, facecolors="none", edgecolors=rings, linewidths=1.6)
    inks = paint[part.y[given]]
    axes.scatter(*flat[given].T, s=60, c=inks, edgecolors="black", linewidths=1.2, zorder=3)
    count = int((hidden & known).sum())
    return 1 - int(wrong.sum()) / count if count else -1.0


def paint_regions(axes, plane: tuple, model, colors: list[str]) -> None:
    """Colour the plane by class and mark the centres; limits stay as they are."""
    origin, directions = plane
    limits = axes.get_xlim(), axes.get_ylim()
    sides = [np.linspace(*limit, 300) for limit in limits]
    grid = torch.from_numpy(np.stack([side.ravel() for side in np.meshgrid(*sides)], 1))
    near = torch.cdist(grid @ directions + origin, model.centres_).argmin(1).numpy()
    label = model.classes_[model.cluster_probs_.argmax(1)][near].reshape(300, 300)
    options = {"vmin": -0.5, "vmax": len(colors) - 0.5, "cmap": ListedColormap(colors)}
    axes.pcolormesh(*sides, label, alpha=0.13, shading="nearest", rasterized=True, **options)
    centres = ((model.centres_ - origin) @ directions.T).numpy()
    axes.scatter(*centres.T, s=150, marker="X", c="white", edgecolors="black", zorder=4)
    axes.set(xlim=limits[0], ylim=limits[1])


def add_legend(figure, classes: tuple[str, ...], colors: list[str]) -> None:
    def dot(label: str, **look) -> Line2D:
        return Line2D([], [], linestyle="", marker=look.pop("marker", "o"), label=label, **look)

    names = [name if len(name) <= 24 else f"{name[:23]}..." for name in classes]
    names = [name.replace("$", r"\$") for name in names]
    handles = [dot(name, color=color) for name, color in zip(names, colors, strict=True)][:10]
    handles += [
        dot("labelled", color="lightgray", markeredgecolor="black", markersize=8),
        dot("wrong (ring: true class)", color="none", markeredgecolor="tab:gray", markersize=7),
    ]
    figure.legend(handles=handles, ncols=min(6, len(handles)), loc="outside lower center")


def plot_objective(history: list[dict], title: str, path: Path) -> None:
    """The objective over the iterations; below, what each step took off it."""
    steps = {
        "step 2: unlabelled to the nearest centre": ("before", "after_assign", "tab:gray"),
        "step 3: labelled by the whole objective": ("after_assign", "after_move", METHOD),
        "step 4: centres to the mean": ("after_move", "after_centres", "tab:brown"),
    }
    count = np.arange(1, len(history) + 1)
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 5.6), layout="constrained")
    places = np.concatenate([[row + offset for offset in (-0.5, -0.17, 0.17)] for row in count])
    keys = ("before", "after_assign", "after_move")
    values = [row[key] for row in history for key in keys] + [history[-1]["after_centres"]]
    top.plot([*places, count[-1] + 0.5], values, color="black", linewidth=1)
    for shift, key, label, color in (
        (-0.17, "after_assign", "before step 3 (supervised)", "tab:gray"),
        (0.17, "after_move", "after step 3", METHOD),
    ):
        top.plot(count + shift, [row[key] for row in history], "o", color=color, label=label)
    again = [n for n in count[1:] if history[n - 1]["before"] < history[n - 2]["after_centres"]]
    for number, n in enumerate(again):  # with the pooled metric, between two descents
        label = "covariance estimated again" if number == 0 else None
        top.axvline(n - 0.5, color="tab:blue", linestyle=":", linewidth=1, label=label)
    top.set(ylabel="objective J")
    figure.suptitle(title)
    top.legend()
    for shift, (label, (before, after, color)) in zip((-0.27, 0, 0.27), steps.items(), strict=True):
        fall = [max(row[before] - row[after], 1e-16) for row in history]
        bottom.bar(count + shift, fall, 0.25, color=color, label=label)
    falls = [row["before"] - row["after_centres"] for row in history]
    bottom.set_yscale("log")
    bottom.set_ylim(max(1e-8, min([f for f in falls if f > 0], default=1e-8) / 30), None)
    bottom.set(xlabel="iteration of steps 2, 3, 4", ylabel="fall of J in the step")
    bottom.set_xticks(count if len(count) <= 20 else count[:: len(count) // 10])
    bottom.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_label_counts(by_labels: dict, clusters: int, title: str, path: Path) -> None:
    """Accuracy on unlabelled rows by number of labels, at equal numbers of clusters."""
    counts = [int(count) for count in by_labels]
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    lows = []
    for name, (label, color, style, marker) in METHODS.items():
        arm = f"{name}{clusters}" if name in ("ours", "seeded", "kmeans") else name
        points = [scores[arm]["accuracy"] for scores in by_labels.values()]
        means, sds = (np.array([point[key] for point in points]) for key in ("mean", "sd"))
        axes.plot(counts, means, style, marker=marker, color=color, label=label)
        lows.append(means.min())
        if name in ("ours", "kmeans"):
            edges = means - sds, np.minimum(means + sds, 1)
            axes.fill_between(counts, *edges, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(max(0, min(lows) - 0.04), 1.005)
    axes.set(xlabel="labelled rows", ylabel="accuracy on unlabelled training rows")
    figure.suptitle(f"{title}, {clusters} clusters (band: standard deviation)")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_alpha(sweeps: dict, alpha: float, title: str, path: Path) -> None:
    """Accuracy and impurity by alpha for each number of labels; the run's alpha is marked."""
    names = list(next(iter(sweeps.values())))
    figure, panels = plt.subplots(2, sharex=True, figsize=(8, 5), layout="constrained")
    looks = zip(sweeps.items(), ("-", "--"), ("o", "s"), strict=False)
    for (label_count, by_alpha), style, marker in looks:
        for axes, key in zip(panels, ("accuracy", "impurity"), strict=True):
            points = [point[key] for point in by_alpha.values()]
            means, sds = (np.array([point[part] for point in points]) for part in ("mean", "sd"))
            label = f"{label_count} labels"
            axes.plot(means, style, marker=marker, color=METHOD, label=label)
            low, high = np.maximum(means - sds, 0), np.minimum(means + sds, 1)
            axes.fill_between(range(len(means)), low, high, color=METHOD, alpha=0.15, linewidth=0)
    for axes in panels:
        if f"{alpha:g}" in names:
            axes.axvline(names.index(f"{alpha:g}"), color="black", linestyle=":", linewidth=1)
    panels[0].set_ylabel("accuracy on\nunlabelled training rows")
    panels[1].set_ylabel("impurity of labelled rows\n(mean Gini)")
    figure.suptitle(f"{title} (band: standard deviation)")
    panels[0].legend()
    panels[1].set_xticks(range(len(names)), names)
    panels[1].set_xlabel("alpha, weight of impurity (0: k-means from the labelled means)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
