"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path

import matplotlib

matplotlib.rcdefaults()  # not the user's own, which may ask for LaTeX
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
TRAIN, VALIDATION, BASELINE = "tab:blue", "tab:orange", "tab:gray"
STAGES = {"pretrain": "pretraining", "stage1": "stage 1", "transfer": "stage 2"}


def plot_curves(history: dict[str, list[dict]], compute: dict, title: str, path: Path) -> None:
    """Loss and mIoU over the compute spent, the stages one after another, and of the baseline.

    `history` holds the rows of each stage, `compute` its cost, in epochs of stage 2.
    """
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
    start = 0.0
    for stage, name in STAGES.items():
        rows, cost = history[stage], compute[stage]
        spent = [start + cost * row["epoch"] / len(rows) for row in rows]
        look = {"color": TRAIN, "marker": "." if len(rows) == 1 else None}
        top.plot(spent, column(rows, "train_loss"), label="pretrained, train", **look)
        for axes, key in ((top, "val_loss"), (bottom, "val_miou")):
            if key in rows[0]:
                look = {"color": VALIDATION, "marker": ".", "label": "pretrained, validation"}
                axes.plot(spent, column(rows, key), **look)
            axes.axvline(start + cost, color="black", linewidth=0.8, linestyle="--")
        place, where = (start + cost / 2, 1.0), ("data", "axes fraction")
        bottom.annotate(name, place, ha="center", va="bottom", xycoords=where)
        start += cost
    if rows := history.get("scratch"):
        spent = [compute["scratch"] * row["epoch"] / len(rows) for row in rows]
        for axes, key in ((top, "val_loss"), (bottom, "val_miou")):
            label = "from scratch, equal compute, validation"
            axes.plot(spent, column(rows, key), color=BASELINE, label=label)
    figure.suptitle(title)
    top.set_xlim(left=min(0, top.get_xlim()[0]))  # room for the first stage's name
    top.set_ylabel("loss: cross-entropy (nats),\nfrom stage 1 on plus Dice")
    bottom.set(ylabel="validation mIoU", xlabel="training compute (epochs of stage 2)")
    bottom.set_ylim(0, 1)
    handles, labels = top.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # one entry for all stages
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def column(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows]


def plot_examples(
    x: Tensor,
    y: Tensor,
    masks: dict[str, Tensor],
    segments: tuple[str, ...],
    title: str,
    path: Path,
) -> None:
    """Images (N, 3, H, W), their masks (N, H, W), and the masks (N, H, W) of each method.

    From the top the worst to the best of the last column.
    """
    names = {"scratch": "scratch", "stage1": "after stage 1", "transfer": "after stage 2"}
    colors = segment_colors(len(segments))
    palette = np.ones((256, 3))  # white: does not count
    palette[: len(colors)] = colors
    columns = {"image": x.permute(0, 2, 3, 1).cpu().numpy(), "truth": palette[y.cpu().numpy()]}
    columns |= {names[method]: palette[mask.cpu().numpy()] for method, mask in masks.items()}
    size = (8, 1.4 * len(x) + 1 + 0.2 * len(segments) / 6)
    figure, panels = plt.subplots(
        len(x), len(columns), figsize=size, layout="constrained", squeeze=False
    )
    figure.suptitle(f"{title}\ntest images from the worst to the best by mIoU after stage 2")
    for column_panels, (name, pictures) in zip(panels.T, columns.items(), strict=True):
        column_panels[0].set_title(name)
        for panel, picture in zip(column_panels, pictures, strict=True):
            panel.imshow(picture, interpolation="nearest")
            panel.axis("off")
    labels = [name.replace("$", r"\$") for name in segments]
    handles = [Patch(color=color, label=text) for color, text in zip(colors, labels, strict=True)]
    if (y >= len(segments)).any():
        handles.append(Patch(facecolor="white", edgecolor="tab:gray", label="does not count"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=7
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def segment_colors(count: int) -> list[tuple[float, float, float]]:
    """RGB in [0, 1]: dark for the first segment, then hues that differ between neighbours."""
    hues = [plt.get_cmap("tab20").colors, plt.get_cmap("tab20b").colors]
    more = [plt.get_cmap("hsv")(place * 0.618 % 1)[:3] for place in range(count)]
    return [(0.13, 0.13, 0.13), *hues[0], *hues[1], *more][:count]


def plot_label_efficiency(efficiency: dict, dataset: str, path: Path) -> None:
    """Test mIoU against the number of masks: mean of the seeds, standard deviation as a band."""
    styles = {
        "transfer": ("pretrained, both stages", "tab:green", "-"),
        "scratch": ("from scratch, equal compute", BASELINE, "-"),
    }
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, (label, color, style) in styles.items():
        counts = [int(count) for count in efficiency[method]]
        means = [point["mean"] for point in efficiency[method].values()]
        spreads = [point["sd"] for point in efficiency[method].values()]
        axes.plot(counts, means, style, color=color, marker="o", label=label)
        low = [value - spread for value, spread in zip(means, spreads, strict=True)]
        high = [value + spread for value, spread in zip(means, spreads, strict=True)]
        axes.fill_between(counts, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="masks to train on", ylabel="test mIoU", ylim=(0, 1))
    figure.suptitle(f"Gain from a pretrained down part: {dataset}")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
