"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path

import matplotlib

matplotlib.rcdefaults()  # not the user's own, which may ask for LaTeX
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
TRAIN, VALIDATION = "tab:blue", "tab:orange"


def plot_curves(rows: list[dict], margin: float, title: str, path: Path) -> None:
    """Both losses, what validation says, and the watch for collapse, over the epochs.

    `margin` is the triplet loss of an embedding that has collapsed to a point.
    """
    figure, grid = plt.subplots(2, 2, sharex=True, figsize=(9, 6), layout="constrained")
    epochs = column(rows, "epoch")
    losses, scores, triplets, watch = grid.flat
    losses.plot(epochs, column(rows, "train_cls_loss"), color=TRAIN, label="train")
    losses.plot(epochs, column(rows, "val_cls_loss"), color=VALIDATION, label="validation")
    losses.set(ylabel="cross-entropy (nats)")
    scores.plot(epochs, column(rows, "val_accuracy"), color=VALIDATION, label="accuracy")
    precision = column(rows, "val_precision_at_1")
    scores.plot(epochs, precision, "--", color=VALIDATION, label="precision@1 of the embedding")
    scores.set(ylabel="share of validation images", ylim=(0, 1.02))
    triplets.plot(epochs, column(rows, "train_triplet_loss"), color=TRAIN, label="train")
    triplets.axhline(margin, color="black", linestyle=":", label="of a single point")
    triplets.set(ylabel="triplet loss (embedding units)", xlabel="epoch", ylim=(0, None))
    watch.plot(epochs, column(rows, "active_triplets"), color=TRAIN, label="active triplets")
    watch.set(ylabel="share of mined triplets", xlabel="epoch", ylim=(0, 1.02))
    apart = watch.twinx()
    apart.plot(epochs, column(rows, "mean_distance"), "--", color=TRAIN)
    apart.set(ylabel="distance (embedding units)", ylim=(0, None))
    watch.plot([], [], "--", color=TRAIN, label="mean distance (right)")
    for axes in grid.flat:
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2, "frameon": False}
        axes.legend(**above if axes is watch else {})
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def column(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows]


def colours(classes: tuple[str, ...]) -> np.ndarray:
    """A colour (3,) per class."""
    palette = [*plt.get_cmap("Dark2").colors, *plt.get_cmap("tab20").colors]
    return np.array([palette[number % len(palette)] for number in range(len(classes))])


def plot_maps(
    maps: dict[str, dict], classes: tuple[str, ...], axis: str, title: str, path: Path
) -> None:
    """Embeddings side by side, by name: points (N, 2) and classes (N,) of "train" and "test"
    images, and "wrong" (N,), which test images the classification head got wrong.
    """
    count = len(maps)
    size = (8, 6.5) if count == 1 else (4 * count, 5)
    figure, panels = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    for axes, (name, points) in zip(panels[0], maps.items(), strict=True):
        draw_map(axes, points, colours(classes), 1 if count > 1 else 2)
        axes.set_title(name if count > 1 else "")
        axes.set(xlabel=f"embedding, {axis} 1", ylabel=f"embedding, {axis} 2")
    figure.suptitle(title)
    marks = [
        Line2D([], [], linestyle="", marker="o", color=color, label=name.replace("_", " "))
        for name, color in zip(classes, colours(classes), strict=True)
    ]
    grey = {"linestyle": "", "color": "dimgray"}
    marks.append(Line2D([], [], marker=".", markersize=3, alpha=0.6, label="train", **grey))
    marks.append(Line2D([], [], marker="o", markersize=5, label="test", **grey))
    marks.append(Line2D([], [], marker="X", markersize=8, label="test, class head wrong", **grey))
    figure.legend(handles=marks, loc="outside lower center", ncols=3 if count == 1 else 5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_map(axes: Axes, points: dict, palette: np.ndarray, scale: float) -> None:
    (train, train_y), (test, test_y) = points["train"], points["test"]
    right, wrong = ~points["wrong"], points["wrong"]
    axes.scatter(*train.T, c=palette[train_y], s=2 * scale, alpha=0.25, linewidth=0)
    marks = {"edgecolor": "white", "linewidth": 0.4}
    axes.scatter(*test[right].T, c=palette[test_y[right]], s=9 * scale, **marks)
    marks = {"edgecolor": "black", "linewidth": 0.7}
    axes.scatter(*test[wrong].T, c=palette[test_y[wrong]], s=32 * scale, marker="X", **marks)


def plot_film(
    frames: dict[int, np.ndarray],
    y: np.ndarray,
    classes: tuple[str, ...],
    axis: str,
    name: str,
    path: Path,
) -> None:
    """Points (N, 2) of the validation images after some of the epochs, all to one scale."""
    epochs = sorted(frames)
    places = np.unique(np.linspace(0, len(epochs) - 1, 8).round().astype(int))
    shown = [epochs[place] for place in places]
    columns = (len(shown) + 1) // 2
    options = {"sharex": True, "sharey": True, "layout": "constrained", "squeeze": False}
    figure, panels = plt.subplots(2, columns, figsize=(9, 5.4), **options)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    for axes, epoch in zip(panels.flat, shown, strict=False):
        axes.scatter(*frames[epoch].T, c=colours(classes)[y], s=5, linewidth=0)
        axes.set_title(f"epoch {epoch}")
    for axes in panels[:, 0]:
        axes.set_ylabel(f"embedding, {axis} 2")
    for axes in panels[-1]:
        axes.set_xlabel(f"embedding, {axis} 1")
    figure.suptitle(f"{name}: the embedding of the validation images as it forms")
    marks = [
        Line2D([], [], linestyle="", marker="o", color=color, label=label.replace("_", " "))
        for label, color in zip(classes, colours(classes), strict=True)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(len(classes), 6))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_confusion(
    confusion: list[list[int]], classes: tuple[str, ...], title: str, path: Path
) -> None:
    """Rows are true classes, columns predicted ones; shaded by share of the row."""
    counts = np.array(confusion)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = 3 + 0.7 * len(classes)
    figure, axes = plt.subplots(figsize=(side + 1.2, side), layout="constrained")
    shading = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, place), count in np.ndenumerate(counts):
        color = "white" if shares[row, place] > 0.5 else "black"
        axes.text(place, row, str(count), ha="center", va="center", color=color)
    names = [name.replace("_", " ") for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle(title)
    figure.colorbar(shading, label="share of the true class", shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_triplets(triplets: list[dict], classes: tuple[str, ...], title: str, path: Path) -> None:
    """Anchors, positives and negatives, one column each: "images" (3, H, W, 3), "labels" (3,) and
    "distances" (2,) of positive and negative from the anchor.
    """
    count = len(triplets)
    size = (1.5 * count + 0.6, 5.6)
    figure, panels = plt.subplots(3, count, figsize=size, layout="constrained", squeeze=False)
    for line, triplet in zip(panels.T, triplets, strict=True):
        notes = ["", *(f"d = {distance:.2f}" for distance in triplet["distances"])]
        for axes, image, label, note in zip(
            line, triplet["images"], triplet["labels"], notes, strict=True
        ):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            axes.set_title(classes[label].replace("_", " "), fontsize=9)
            axes.set_xlabel(note, fontsize=9)
    for axes, role in zip(
        panels[:, 0], ("anchor", "farthest positive", "nearest negative"), strict=False
    ):
        axes.set_ylabel(role)
    figure.suptitle(f"{title}\nhardest test triplet of each class")
    figure.savefig(path, dpi=150)
    plt.close(figure)
