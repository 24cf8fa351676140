"""The pictures of a run: each function turns arrays into one PNG in the run's folder."""

from pathlib import Path

import matplotlib

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
METHODS = {
    "ours": ("ours, one cluster per class", METHOD, "-", "o"),
    "chosen": ("ours, number of clusters chosen", METHOD, "--", "s"),
    "kmeans": ("k-means, majority class", BASELINE, "-", "o"),
    "logistic": ("labelled only: logistic regression", "black", ":", "^"),
    "nearest_mean": ("labelled only: nearest class mean", "black", "-.", "v"),
}
SHOWN = 3000  # points drawn at most


def plot_clusters(part, model, classes: tuple[str, ...], title: str, run: Path) -> None:
    """Training rows in the plane of their first two principal components.

    Background: the class of the cluster whose centre is nearest, for the points of that plane.
    """
    x = part.x.cpu().double()
    mean = x.mean(0)
    _, strength, axes3 = torch.linalg.svd(x - mean, full_matrices=False)
    plane = axes3[:2] if len(axes3) > 1 else torch.cat((axes3, torch.zeros_like(axes3)))
    spread = strength.square() / strength.square().sum().clamp(min=1e-12)
    flat = ((x - mean) @ plane.T).numpy()
    predicted, known = model.predict(part.x).cpu(), part.y >= 0
    colors = [CLASSES[number % len(CLASSES)] for number in range(len(classes))]

    figure, axes = plt.subplots(figsize=(8, 5.6), layout="constrained")
    draw_regions(axes, flat, plane, mean, model, colors)
    some = np.zeros(len(flat), dtype=bool)
    some[np.random.default_rng(0).permutation(len(flat))[:SHOWN]] = True
    hidden, given = (part.given < 0).numpy() & some, (part.given >= 0).numpy()
    wrong = hidden & (known & (predicted != part.y)).numpy()
    paint = np.array(colors)
    axes.scatter(*flat[hidden].T, s=14, c=paint[predicted[hidden]], alpha=0.45, linewidths=0)
    rings = paint[part.y[wrong]]
    axes.scatter(*flat[wrong].T, s=52, facecolors="none", edgecolors=rings, linewidths=1.6)
    inks = paint[part.y[given]]
    axes.scatter(*flat[given].T, s=60, c=inks, edgecolors="black", linewidths=1.2, zorder=3)
    centres = ((model.cluster_centers_.cpu().double() - mean) @ plane.T).numpy()
    axes.scatter(*centres.T, s=150, marker="X", c="white", edgecolors="black", zorder=4)
    add_legend(axes, classes, colors)
    figure.suptitle(title)
    names = ("first", "second")
    labels = [f"{n} principal component ({s:.0%})" for n, s in zip(names, spread, strict=False)]
    axes.set(**dict(zip(("xlabel", "ylabel"), labels, strict=False)))
    figure.savefig(run / "clusters.png", dpi=150)
    plt.close(figure)


def draw_regions(axes, flat, plane, mean, model, colors: list[str]) -> None:
    """Colour the plane by class and draw the borders between clusters."""
    low, high = flat.min(0), flat.max(0)
    margin = 0.06 * (high - low) + 1e-9
    sides = [np.linspace(a, b, 400) for a, b in zip(low - margin, high + margin, strict=True)]
    grid = np.stack([side.ravel() for side in np.meshgrid(*sides)], 1)
    points = torch.from_numpy(grid) @ plane + mean
    cluster = model.cluster(points).cpu().numpy().reshape(400, 400)
    label = model.predict(points).cpu().numpy().reshape(400, 400)
    options = {"vmin": -0.5, "vmax": len(colors) - 0.5, "cmap": ListedColormap(colors)}
    axes.pcolormesh(*sides, label, alpha=0.13, shading="nearest", rasterized=True, **options)
    for number in range(model.clusters):
        if 0 < (cluster == number).mean() < 1:
            axes.contour(*sides, cluster == number, levels=[0.5], colors="gray", linewidths=0.7)


def add_legend(axes, classes: tuple[str, ...], colors: list[str]) -> None:
    def dot(label: str, **look) -> Line2D:
        return Line2D([], [], linestyle="", marker=look.pop("marker", "o"), label=label, **look)

    handles = [dot(name, color=color) for name, color in zip(classes, colors, strict=True)]
    handles += [
        dot("labelled", color="white", markeredgecolor="black", markersize=8),
        dot("unlabelled, in its cluster's class", color="gray", alpha=0.5, markersize=4),
        dot("wrong, ring: true class", color="none", markeredgecolor="black", markersize=7),
        dot("centre", marker="X", color="white", markeredgecolor="black", markersize=9),
    ]
    columns = 1 + len(handles) // 2 if len(handles) < 9 else 5
    axes.figure.legend(handles=handles, ncols=columns, loc="outside lower center")


def plot_objective(history: list[dict], title: str, run: Path) -> None:
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
    figure.savefig(run / "objective.png", dpi=150)
    plt.close(figure)


def plot_label_counts(by_labels: dict, title: str, run: Path) -> None:
    """Accuracy on unlabelled rows by number of labels, standard deviation as a band."""
    counts = [int(count) for count in by_labels]
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for method, (label, color, style, marker) in METHODS.items():
        points = [scores[method]["accuracy"] for scores in by_labels.values()]
        means, sds = (np.array([point[key] for point in points]) for key in ("mean", "sd"))
        axes.plot(counts, means, style, marker=marker, color=color, label=label)
        axes.fill_between(
            counts, means - sds, np.minimum(means + sds, 1), color=color, alpha=0.1, linewidth=0
        )
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    low = min(s[m]["accuracy"]["mean"] for s in by_labels.values() for m in METHODS)
    axes.set_ylim(max(0, low - 0.08), 1.005)
    axes.set(xlabel="labelled rows", ylabel="accuracy on unlabelled training rows")
    figure.suptitle(f"{title} (band: standard deviation)")
    axes.legend(loc="lower right")
    figure.savefig(run / "labels.png", dpi=150)
    plt.close(figure)


def plot_alpha(sweeps: dict, alpha: float, title: str, run: Path) -> None:
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
    figure.savefig(run / "alpha.png", dpi=150)
    plt.close(figure)
