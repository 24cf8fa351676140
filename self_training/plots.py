"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
BASELINE, METHOD = "tab:gray", "tab:green"
LABELS = {
    "plain": "plain",
    "balanced": "balanced",
    "revise": "revise",
    "balanced_revise": "balanced\n+ revise",
}


def plot_accuracy(metrics: dict, own: str, title: str, path: Path) -> None:
    """Test accuracy over the pseudo-labels given, and of each method's kept round by seed."""
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(9, 4.2), width_ratios=(3, 2), layout="constrained"
    )
    methods = metrics["methods"]
    for name in dict.fromkeys(("plain", own)):
        if name in methods:
            color = METHOD if name == own else BASELINE
            draw_rounds(left, methods[name], "test_accuracy", color, LABELS[name])
    for place, name in enumerate(methods):
        scores = methods[name]["test_accuracy"]["of_seeds"]
        color = METHOD if name == own else BASELINE
        right.plot([place] * len(scores), scores, "o", color=color, alpha=0.5, markersize=4)
        right.plot(place, mean(scores), "_", color=color, markersize=26, markeredgewidth=2.5)
    best = max(kind["self_training"]["mean"] for kind in metrics["sklearn"].values())
    lines = {
        "all labels (oracle)": (metrics["oracle"]["mean"], "black", ":"),
        "scikit-learn's self-training": (best, "tab:purple", "-."),
        "the few labels only": (metrics["supervised"]["mean"], BASELINE, "--"),
    }
    for text, (value, color, style) in lines.items():
        for axes in (left, right):
            axes.axhline(value, color=color, linestyle=style, linewidth=1.3, label=text)
    left.set_ylim(top=max(left.get_ylim()[1], metrics["oracle"]["mean"] + 0.01))
    seeds = len(metrics["oracle"]["of_seeds"])
    left.set(xlabel="pseudo-labels in the training set", ylabel="test accuracy")
    left.set_title(f"mean ± sd while all {seeds} seeds go on; dots: round kept")
    handles, texts = left.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=5, fontsize=8)
    right.set_xticks(range(len(methods)), [LABELS[name] for name in methods], fontsize=8)
    right.set_xlim(-0.6, len(methods) - 0.4)
    right.set_title("round kept, by seed; bar: mean")
    before, after = metrics["supervised"]["mean"], methods[own]["test_accuracy"]["mean"]
    figure.suptitle(f"Self-training on {title}: {before:.3f} before, {after:.3f} after")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_rounds(axes: plt.Axes, method: dict, key: str, color: str, label: str) -> None:
    """`key` over the number of pseudo-labels: a line per seed, and mean and standard deviation
    over the rounds that all seeds have reached.
    """
    runs = [[row for row in run if row[key] is not None] for run in method["rounds"]]
    for run, best in zip(runs, method["best_round"], strict=True):
        counts = [row["pseudo_labels"] for row in run]
        axes.plot(counts, [row[key] for row in run], color=color, linewidth=0.6, alpha=0.5)
        kept = [row for row in run if row["round"] == best]
        for row in kept:
            axes.plot(row["pseudo_labels"], row[key], "o", color=color, markersize=4, alpha=0.7)
    common = min(map(len, runs))
    counts = [mean(run[step]["pseudo_labels"] for run in runs) for step in range(common)]
    values = np.array([[run[step][key] for step in range(common)] for run in runs])
    middle, spread = values.mean(0), values.std(0, ddof=1 if len(runs) > 1 else 0)
    axes.plot(counts, middle, color=color, linewidth=2, label=label.replace("\n", " "))
    axes.fill_between(counts, middle - spread, middle + spread, color=color, alpha=0.2, linewidth=0)


def plot_quality(methods: dict, own: str, classes: tuple[str, ...], title: str, path: Path) -> None:
    """How many pseudo-labels are right, and which class they name, over the rounds."""
    names = [name for name in dict.fromkeys(("plain", own)) if name in methods]
    figure, panels = plt.subplots(
        1, 1 + len(names), figsize=(3.1 * (1 + len(names)), 3.8), layout="constrained"
    )
    for name in names:
        color = METHOD if name == own else BASELINE
        draw_rounds(panels[0], methods[name], "accuracy", color, LABELS[name])
    panels[0].set(xlabel="pseudo-labels", ylabel="share that is right")
    panels[0].set_title("correctness, all seeds")
    panels[0].legend(loc="lower left")
    colors = plt.get_cmap("tab10" if len(classes) <= 10 else "tab20").colors
    for axes, name in zip(panels[1:], names, strict=True):
        rows = [row for row in methods[name]["rounds"][0] if row["pseudo_labels"]]
        shares = np.array([row["share_per_class"] for row in rows]).reshape(len(rows), len(classes))
        bottom = np.zeros(len(rows))
        for number, label in enumerate(classes):
            steps, color = [row["round"] for row in rows], colors[number % len(colors)]
            axes.bar(steps, shares[:, number], 0.9, bottom, color=color, label=label)
            bottom += shares[:, number]
        axes.set(xlabel="round", ylabel="share of the pseudo-labels", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{LABELS[name]}, first seed".replace("\n", " "))
    if len(classes) <= 20:
        handles, texts = panels[-1].get_legend_handles_labels()
        columns = 10 if max(map(len, classes)) < 3 else 5
        figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(f"Pseudo-labels on {title}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_examples(
    first: dict, mistakes: dict, number: int, classes: tuple[str, ...], title: str, path: Path
) -> None:
    """Two rows of eight pictures each: the surest of round 1, the surest wrong ones of a round.

    Both hold uint8 x (N, C, H, W), label (N,), truth (N,) and confidence (N,).
    """
    figure = plt.figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(f"Pseudo-labels on {title}: label given, its confidence")
    blocks = figure.subfigures(2)
    texts = (
        "the surest of round 1 (red: wrong)",
        f"the surest that are wrong in round {number} (true class in brackets)",
    )
    for block, items, text in zip(blocks, (first, mistakes), texts, strict=True):
        block.suptitle(text if len(items["x"]) else f"{text}: none", fontsize=10)
        for place, axes in enumerate(block.subplots(2, 8).flat):
            axes.axis("off")
            if place < len(items["x"]):
                draw_picture(axes, {key: part[place] for key, part in items.items()}, classes)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_picture(axes: plt.Axes, item: dict, classes: tuple[str, ...]) -> None:
    picture = item["x"].transpose(1, 2, 0)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255)  # no colour map where there are 3 channels
    label, truth = classes[item["label"]][:10], classes[item["truth"]][:10]
    wrong = label != truth
    confidence = np.floor(1000 * item["confidence"]) / 10  # never rounded up to 100%
    text = f"{label}  {confidence:.1f}%" + (f"\n({truth})" if wrong else "")
    axes.set_title(text, fontsize=8, color="tab:red" if wrong else "black")
