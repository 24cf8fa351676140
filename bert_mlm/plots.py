"""The pictures of a run: each function turns numbers into one PNG."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.rcdefaults()
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
TRAIN, VALIDATION, BASELINE, METHOD = "tab:blue", "tab:orange", "tab:gray", "tab:green"
BEFORE = "tab:olive"  # pretrained, not yet fine-tuned
STYLES = {
    "unigram": ("most frequent tokens", "black"),
    "scratch": ("from scratch", BASELINE),
    "before": ("pretrained, before", BEFORE),
    "after": ("fine-tuned", METHOD),
}


def plot_curves(
    history: dict[str, list[dict]], pretraining: dict | None, unigram: float, title: str, path: Path
) -> None:
    """Loss over the epochs of fine-tuning and from scratch, and of pretraining where there is one.

    `unigram` is the validation loss of always predicting the most frequent tokens.
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
    panels[0, 0].set_ylabel("loss per masked token (nats)")
    axes.legend()
    figure.suptitle(title, parse_math=False)  # a file's name may have a $
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(axes: Axes, rows: list[dict], key: str, label: str, color: str, style: str = "-") -> None:
    """One curve; row 0, before any step, has no training loss."""
    points = [(row["epoch"], row[key]) for row in rows if key in row]
    axes.plot(*zip(*points, strict=True), style, color=color, label=label)
    mark_epochs(axes)


def mark_epochs(axes: Axes) -> None:
    """Whole epochs on the x axis, and a dot for a curve of one epoch, which has no line."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for line in axes.lines:
        if len(line.get_xdata()) == 1:
            line.set_marker("o")


def plot_accuracy(scores: dict[str, dict], title: str, path: Path) -> None:
    """Top-1 and top-5 accuracy on test, over all masked tokens, and top-1 by kind of word.

    The bars of top-1 have 95% intervals over the tweets.
    """
    styles = {name: style for name, style in STYLES.items() if name in scores}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 4), width_ratios=(2, 5), layout="constrained"
    )
    by_kind = scores["after"]["by_kind"]
    groups = {
        left: {"top-1": "top1", "top-5": "top5"},
        right: {
            f"{kind.replace(' ', chr(10), 1)}\n({by_kind[kind]['tokens']})": kind
            for kind in by_kind
        },
    }
    for axes, group in groups.items():
        for number, (name, (label, color)) in enumerate(styles.items()):
            own = scores[name]
            values = [own[k] if axes is left else own["by_kind"][k]["top1"] for k in group.values()]
            places = np.arange(len(group)) + 0.2 * (number - 1.5)
            axes.bar(places, values, 0.2, label=label, color=color)
            if axes is left:
                spread = np.abs(np.subtract(own["top1_interval"], own["top1"]))[:, None]
                axes.errorbar(places[0], own["top1"], spread, color="black", capsize=3)
        axes.set_xticks(range(len(group)), list(group))
        axes.set_ylim(bottom=0)
    left.set(ylabel="accuracy on masked test tokens", title="all tokens")
    right.set(ylabel="top-1 accuracy", title="by kind of word (number of tokens)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_gaps(sections: dict[str, list[dict]], title: str, path: Path) -> None:
    """Sentences with a gap, by section, and the five best fillings before and after; the word that
    was there is framed.
    """
    lines = sum(1 + 2 * len(rows) for rows in sections.values())
    figure, axes = plt.subplots(figsize=(9, 0.3 * lines + 0.9), layout="constrained")
    axes.set(xlim=(0, 10.2), ylim=(lines, -0.6))
    axes.axis("off")
    for x, label in ((0, "before fine-tuning"), (5.2, "after fine-tuning")):
        axes.text(x, -0.3, label, weight="bold", fontsize=9, va="center")
    y = 0.5
    for section, rows in sections.items():
        axes.text(0, y, f"{section}:", fontsize=9, style="italic", va="center")
        y += 1
        for row in rows:
            axes.text(0, y, sentence(row), fontsize=9, va="center")
            for x, name, color in ((0, "before", BEFORE), (5.2, "after", METHOD)):
                draw_fillings(axes, row["best"][name], row["word"], (x, y + 0.95), color)
            y += 2
    figure.suptitle(f"{title}: the five best fillings of a gap", parse_math=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def sentence(row: dict, most: int = 100) -> str:
    """On one line, the gap with the word that was there, shortened on both sides."""
    gap = f"____({row['word'][:40]})" if row["word"] else "____"
    before, after = (" ".join(part.split()) for part in row["text"])
    side = (most - len(gap)) // 2
    before = before if len(before) <= side else f"...{before[-side:]}"
    return f"{before} {gap} {textwrap.shorten(after, side + 9, placeholder=' ...')}".replace(
        "$", r"\$"
    )


def draw_fillings(
    axes: Axes,
    best: list[tuple[str, float]],
    right: str | None,
    corner: tuple[float, float],
    color: str,
) -> None:
    """A cell for each, the darker the more probable; the word `right` is framed."""
    x, y = corner
    for place, (word, prob) in enumerate(best):
        framed = bool(right) and word.lower() == right.lower()
        edge = {"edgecolor": "black", "linewidth": 2} if framed else {"edgecolor": "none"}
        shade = (color, 0.1 + 0.7 * prob)
        axes.add_patch(plt.Rectangle((x + place, y - 0.4), 0.94, 0.8, facecolor=shade, **edge))
        text = f"{word[:9]} {prob:.0%}".replace("$", r"\$")
        axes.text(x + place + 0.47, y, text, fontsize=8, ha="center", va="center")


def plot_fillings(rows: list[dict], path: Path) -> None:
    """Texts with [MASK], and the five best fillings of each gap."""
    lines = sum(1 + len(row["best"]) for row in rows)
    figure, axes = plt.subplots(figsize=(9, 0.3 * lines + 0.7), layout="constrained")
    axes.set(xlim=(0, 8), ylim=(lines, -0.6))
    axes.axis("off")
    y = 0
    for row in rows:
        text = textwrap.shorten(row["text"], 110, placeholder=" ...").replace("$", r"\$")
        axes.text(0, y, text, fontsize=9, va="center")
        for number, best in enumerate(row["best"], start=1):
            axes.text(0, y + number, f"gap {number}", fontsize=8, va="center")
            draw_fillings(axes, best, None, (1, y + number), METHOD)
        y += 1 + len(row["best"])
    figure.suptitle("The five best fillings of each gap")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_surprise(rows: list[dict], path: Path) -> None:
    """The most and the least surprising texts, with the most surprising token of each."""
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(rows) + 1.2), layout="constrained")
    values = [-float(row["per_token"]) for row in rows]
    texts = [textwrap.shorten(row["text"], 70, placeholder=" ...") for row in rows]
    axes.barh(range(len(rows)), values, color=METHOD, height=0.7)
    axes.set_yticks(range(len(rows)), [text.replace("$", r"\$") for text in texts], fontsize=8)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        word = row["most_surprising"].replace("$", r"\$")
        axes.text(value, place, f" {word}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="surprise: minus pseudo-log-likelihood per token (nats)")
    figure.suptitle("The most and the least surprising texts, and the token least expected")
    figure.savefig(path, dpi=150)
    plt.close(figure)
