"""The pictures of a run: each function turns numbers into one PNG."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.rcdefaults()
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
TRAIN, VALIDATION, BASELINE, METHOD = "tab:blue", "tab:orange", "tab:gray", "tab:green"
BEFORE = "tab:olive"  # pretrained, not yet fine-tuned


def plot_curves(
    history: dict[str, list[dict]], pretraining: dict | None, unigram: float, title: str, path: Path
) -> None:
    """Loss over the epochs of fine-tuning and from scratch, and of pretraining where there is one.

    `unigram` is the validation loss of always saying the most frequent pieces.
    """
    figure, panels = plt.subplots(
        1, 2 if pretraining else 1, figsize=(9, 4), layout="constrained", squeeze=False, sharey=True
    )
    axes = panels[0, -1]
    if "scratch" in history:
        draw(axes, history["scratch"], "val_loss", "from scratch, validation", BASELINE)
        draw(axes, history["scratch"], "train_loss", "from scratch, train", BASELINE, ":")
    draw(axes, history["after"], "train_loss", "pretrained, train", TRAIN)
    draw(axes, history["after"], "val_loss", "pretrained, validation", VALIDATION)
    axes.axhline(unigram, color="black", linestyle="--", linewidth=1, label="unigram, validation")
    axes.set(xlabel="epoch over the tweets", title="then: tweets" if pretraining else None)
    if pretraining:
        draw(panels[0, 0], pretraining["epochs"], "train_loss", "train", TRAIN)
        draw(panels[0, 0], pretraining["epochs"], "val_loss", "validation", VALIDATION)
        panels[0, 0].set(
            xlabel="epoch over the paragraphs", title="first: English in Python's docs"
        )
        panels[0, 0].legend()
    panels[0, 0].set_ylabel("loss per masked piece (nats)")
    axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(axes, rows: list[dict], key: str, label: str, color: str, style: str = "-") -> None:
    """One curve; row 0, before any step, has no training loss."""
    points = [(row["epoch"], row[key]) for row in rows if key in row]
    axes.plot(*zip(*points, strict=True), style, color=color, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_accuracy(scores: dict[str, dict], title: str, path: Path) -> None:
    """Top-1 and top-5 accuracy on test, over all masked pieces, and top-1 by kind of word."""
    styles = {
        "unigram": ("most frequent pieces", "black"),
        "scratch": ("from scratch", BASELINE),
        "before": ("pretrained, before", BEFORE),
        "after": ("fine-tuned", METHOD),
    }
    styles = {name: style for name, style in styles.items() if name in scores}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 4), width_ratios=(2, 5), layout="constrained"
    )
    by_kind = scores["after"]["by_kind"]
    groups = {
        left: {"top-1": "top1", "top-5": "top5"},
        right: {
            f"{kind.replace(' ', chr(10), 1)}\n({by_kind[kind]['pieces']})": kind
            for kind in by_kind
        },
    }
    for axes, group in groups.items():
        for number, (name, (label, color)) in enumerate(styles.items()):
            own = scores[name]
            values = [own[k] if axes is left else own["by_kind"][k]["top1"] for k in group.values()]
            places = np.arange(len(group)) + 0.2 * (number - 1.5)
            axes.bar(places, values, 0.2, label=label, color=color)
        axes.set_xticks(range(len(group)), list(group))
        axes.set_ylim(bottom=0)
    left.set(ylabel="accuracy on masked test pieces", title="all pieces")
    right.set(ylabel="top-1 accuracy", title="by kind of word (number of pieces)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_gaps(gaps: list[dict], title: str, path: Path) -> None:
    """Test tweets with a gap, and the five most probable fillings before and after."""
    figure = plt.figure(figsize=(9, 1.5 * max(len(gaps), 1) + 0.7), layout="constrained")
    figure.suptitle(f"{title}: five best fillings of a gap in test tweets")
    rows = figure.subfigures(max(len(gaps), 1), 1, squeeze=False)[:, 0]
    for row, gap in zip(rows, gaps, strict=False):
        shown = f"{gap['text'][0]} _____ {gap['text'][1]}".replace("$", r"\$")
        shown = textwrap.fill(" ".join(shown.split()), 105)
        row.suptitle(f"{shown}   ({gap['word']})", fontsize=9, x=0.01, ha="left")
        panels = row.subplots(1, 2, sharex=True)
        for axes, when, color in zip(panels, ("before", "after"), (BEFORE, METHOD), strict=True):
            words, probs = zip(*reversed(gap[when]), strict=True)
            places = range(len(words))
            axes.barh(places, probs, color=color, height=0.75)
            axes.set_yticks(places, words, fontsize=8)
            axes.set_xlim(0, 1)
            axes.tick_params(axis="x", labelsize=8, labelbottom=row is rows[-1])
            for place, word, prob in zip(places, words, probs, strict=True):
                hit = "  right" if word.lower() == gap["word"].lower() else ""
                axes.text(prob + 0.01, place, f"{prob:.0%}{hit}", va="center", fontsize=8)
            label = "before" if when == "before" else "after fine-tuning"
            axes.set_xlabel(f"probability, {label}" if row is rows[-1] else None, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
