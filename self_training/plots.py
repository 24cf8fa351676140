"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path

import matplotlib

matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
UNKNOWN = -1  # the true class of a picture that nobody has labelled
COLORS = {"plain": "tab:gray", "rounds": "tab:green", "every_step": "tab:blue"}
LABELS = {
    "supervised": "few labels only",
    "plain": "plain rounds",
    "rounds": "rounds",
    "every_step": "every step",
    "supervised_val": "few labels only",
    "method_val": "method",
    "oracle": "all labels (oracle)",
}


def plot_arms(metrics: dict, own: str, title: str, path: Path) -> None:
    """Test accuracy over the rounds, and of each arm's kept round by seed."""
    arms = metrics["arms"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 4.2), width_ratios=(5, 4), layout="constrained"
    )
    for name in [name for name in COLORS if name in arms]:
        plot_rounds(left, arms[name], "test_accuracy", COLORS[name], LABELS[name])
    for name, style in (("oracle", ":"), ("supervised", "--")):
        if name in arms:
            value = arms[name]["test_accuracy"]["mean"]
            left.axhline(value, color="black", linestyle=style, linewidth=1.2, label=LABELS[name])
    if "sklearn" in metrics:
        value = max(score["mean"] for score in metrics["sklearn"].values())
        left.axhline(value, color="tab:purple", linestyle="-.", label="best of scikit-learn")
    left.set(xlabel="round", ylabel="test accuracy")
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set_title("over the rounds: mean ± sd; dots: round kept")
    left.legend(loc="best", fontsize=8)
    plot_scores(right, metrics, own)
    after = arms[own]["test_accuracy"]["mean"]
    before = ""
    if "supervised" in arms:
        before = f"{arms['supervised']['test_accuracy']['mean']:.3f} without the pool, "
    figure.suptitle(f"Self-training on {title}: {before}{after:.3f} with it".replace("$", r"\$"))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_scores(axes: plt.Axes, metrics: dict, own: str) -> None:
    """A row of dots, one per seed, for each arm and the best of scikit-learn's classifiers."""
    sizes, rows = metrics["sizes"], []
    every = sizes["labelled"] + sizes["validation"]
    for name, arm in metrics["arms"].items():
        count = every if name.endswith("_val") else sizes["labelled"]
        label = LABELS[own] if name == "method_val" else LABELS[name]
        label = label if name == "oracle" else f"{label}, {count} labels"
        rows.append((label, arm["test_accuracy"], COLORS.get(name, "black")))
    for key, count in (("sklearn", sizes["labelled"]), ("sklearn_val", every)):
        if key in metrics:
            best = max(metrics[key].values(), key=lambda score: score["mean"])
            rows.append((f"scikit-learn, {count} labels", best, "tab:purple"))
    rows.sort(key=lambda row: row[1]["mean"])
    for place, (_, scores, color) in enumerate(rows):
        values = scores["of_seeds"]
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.5, markersize=4)
        axes.plot(scores["mean"], place, "|", color=color, markersize=18, markeredgewidth=2.5)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set(xlabel="test accuracy", title="by seed; bar: mean")


def plot_rounds(axes: plt.Axes, arm: dict, key: str, color: str, label: str) -> None:
    """`key` over the rounds: a line per seed, and mean and standard deviation over the rounds that
    all seeds have reached.
    """
    runs = [[row for row in run if row.get(key) is not None] for run in arm["rounds"]]
    for run, best in zip(runs, arm["best_round"], strict=True):
        steps = [row["round"] for row in run]
        axes.plot(steps, [row[key] for row in run], color=color, linewidth=0.6, alpha=0.5)
        for row in run:
            if row["round"] == best:
                axes.plot(best, row[key], "o", color=color, markersize=4, alpha=0.7)
    common = min(map(len, runs))
    values = np.array([[run[step][key] for step in range(common)] for run in runs])
    steps = [runs[0][step]["round"] for step in range(common)]
    middle, spread = values.mean(0), values.std(0, ddof=1 if len(runs) > 1 else 0)
    axes.plot(steps, middle, color=color, linewidth=2, label=label)
    axes.fill_between(steps, middle - spread, middle + spread, color=color, alpha=0.2, linewidth=0)


def plot_quality(arms: dict, own: str, classes: tuple[str, ...], title: str, path: Path) -> None:
    """How many pseudo-labels are right, how many changed, and which class they name."""
    figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.8), layout="constrained")
    for name in [name for name in COLORS if name in arms]:
        plot_rounds(panels[0], arms[name], "accuracy", COLORS[name], LABELS[name])
        later = [[row for row in run if row["round"]] for run in arms[name]["rounds"]]
        arm = {"rounds": later, "best_round": arms[name]["best_round"]}
        plot_rounds(panels[1], arm, "changed", COLORS[name], LABELS[name])
    panels[0].set(xlabel="round", ylabel="share that is right", title="correctness, all seeds")
    panels[0].legend(loc="best")
    panels[1].set(xlabel="round", ylabel="share of the labels that changed", ylim=(0, None))
    panels[1].set_title("agreement with the round before")
    rows = [row for row in arms[own]["rounds"][0] if row["pseudo_labels"]]
    shares = np.array([row["share_per_class"] for row in rows]).reshape(len(rows), len(classes))
    bottom, colors = np.zeros(len(rows)), plt.get_cmap("tab20").colors
    for number, label in enumerate(classes):
        steps, color = [row["round"] for row in rows], colors[number % len(colors)]
        panels[2].bar(steps, shares[:, number], 0.9, bottom, color=color, label=label)
        bottom += shares[:, number]
    panels[2].set(xlabel="round", ylabel="share of the pseudo-labels", ylim=(0, 1))
    panels[2].set_title(f"classes of {LABELS[own]}, first seed")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(classes) <= 20:
        handles, texts = panels[2].get_legend_handles_labels()
        columns = 10 if max(map(len, classes)) < 3 else 5
        texts = [text.replace("$", r"\$") for text in texts]
        figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(f"Pseudo-labels on {title}".replace("$", r"\$"))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_examples(
    first: dict, mistakes: dict, number: int, classes: tuple[str, ...], title: str, path: Path
) -> None:
    """Two rows of eight pictures each: the surest of round 0, the surest wrong ones of a round.

    Both hold uint8 x (N, C, H, W), label (N,), truth (N,) and confidence (N,).
    """
    figure = plt.figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(f"Pseudo-labels on {title}: label given, its confidence".replace("$", r"\$"))
    blocks = figure.subfigures(2)
    texts = (
        "the surest of round 0 (red: wrong)",
        f"the surest that are wrong in round {number} (true class in brackets)",
    )
    for block, items, text in zip(blocks, (first, mistakes), texts, strict=True):
        block.suptitle(text if len(items["x"]) else f"{text}: none", fontsize=10)
        for place, axes in enumerate(block.subplots(2, 8).flat):
            axes.axis("off")
            if place < len(items["x"]):
                plot_picture(axes, {key: part[place] for key, part in items.items()}, classes)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_picture(axes: plt.Axes, item: dict, classes: tuple[str, ...]) -> None:
    picture = item["x"].transpose(1, 2, 0)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255)  # no colour map where there are 3 channels
    wrong = item["truth"] not in (UNKNOWN, item["label"])
    label, truth = (classes[item[key]][:8].replace("$", r"\$") for key in ("label", "truth"))
    confidence = np.floor(1000 * item["confidence"]) / 10  # never rounded up to 100%
    text = f"{label}  {confidence:.1f}%" + (f"\n({truth})" if wrong else "")
    axes.set_title(text, fontsize=8, color="tab:red" if wrong else "black")


def plot_predictions(shown: list[tuple[tuple, Tensor]], path: Path) -> None:
    """Pictures (C, H, W) with (file, class, probability), the surest first, at most 8 in a row."""
    rows = -(-len(shown) // 8)
    figure, panels = plt.subplots(
        rows, 8, figsize=(8, 0.6 + 1.5 * rows), layout="constrained", squeeze=False
    )
    for axes in panels.flat:
        axes.axis("off")
    for axes, ((_, label, probability), picture) in zip(panels.flat, shown, strict=False):
        axes.imshow(picture.permute(1, 2, 0), interpolation="nearest")
        confidence = np.floor(1000 * probability) / 10  # never rounded up to 100%
        axes.set_title(f"{label[:8]}  {confidence:.1f}%".replace("$", r"\$"), fontsize=8)
    figure.suptitle("class and probability: the surest first, the least sure last")
    figure.savefig(path, dpi=150)
    plt.close(figure)
