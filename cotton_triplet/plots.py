"""The pictures of a run: each function turns arrays into one PNG."""

import math
from pathlib import Path

import matplotlib

matplotlib.rcdefaults()  # not the user's own, which may ask for LaTeX
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
TRAIN, VALIDATION, BASELINE = "tab:blue", "tab:orange", "tab:gray"


def plot_curves(
    rows: list[dict], colour: float | None, mining: str, title: str, path: Path
) -> None:
    """Both losses, what validation says, and the watch for collapse, over the epochs.

    `colour` is the accuracy of the baseline that sees only colours, None without it.
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
    if colour is not None:
        scores.axhline(colour, color=BASELINE, label="colours alone, accuracy (test)")
    scores.set(ylabel="share of images", ylim=(0, 1.02))
    label = f"train, {mining}"
    triplets.plot(epochs, column(rows, "train_triplet_loss"), color=TRAIN, label=label)
    triplets.set(ylabel="triplet loss", xlabel="epoch", ylim=(0, None))
    share = column(rows, "hard_share")
    triplets.plot(epochs, share, "--", color=TRAIN, label="share of batch hard in it")
    watch.plot(epochs, column(rows, "active_triplets"), color=TRAIN, label="active triplets")
    ratio = column(rows, "within_to_between")
    watch.plot(epochs, ratio, ":", color=TRAIN, label="distances within / between classes")
    watch.set(ylabel="share, ratio", xlabel="epoch", ylim=(0, 1.05))
    apart = watch.twinx()
    apart.plot(epochs, column(rows, "mean_distance"), "--", color=TRAIN)
    apart.set(ylabel="distance (embedding units)", ylim=(0, None))
    mark_epochs(apart)
    watch.plot([], [], "--", color=TRAIN, label="mean distance (right)")
    for axes in grid.flat:
        mark_epochs(axes)
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2, "frameon": False}
        axes.legend(**above if axes is watch else {})
    draw_title(figure, title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def mark_epochs(axes: Axes) -> None:
    """Whole epochs on the x axis, and a dot for a curve of one epoch, which has no line."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for line in axes.lines:
        if len(line.get_xdata()) == 1:
            line.set_marker("o")


def draw_title(figure: Figure, title: str) -> None:
    """As it is: a $ in a folder's name begins no formula."""
    figure.suptitle(title, parse_math=False)


def tidy(name: str, most: int = 24) -> str:
    """A class's name for a legend or an axis."""
    name = name.replace("_", " ").replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most - 1]}…"


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
    draw_title(figure, title)
    marks = class_marks(classes)
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
    axes.scatter(*train.T, c=palette[train_y], linewidth=0, **dots(len(train), 2 * scale, 0.25))
    marks = {"edgecolor": "white", "linewidth": 0.4}
    axes.scatter(*test[right].T, c=palette[test_y[right]], s=9 * scale, **marks)
    marks = {"edgecolor": "black", "linewidth": 0.7}
    axes.scatter(*test[wrong].T, c=palette[test_y[wrong]], s=32 * scale, marker="X", **marks)


def dots(count: int, size: float, alpha: float = 1.0) -> dict[str, float]:
    """For scatter: few points are larger and darker, so that they can be seen."""
    return {"s": size, "alpha": alpha} if count > 500 else {"s": 2 * size, "alpha": max(alpha, 0.6)}


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
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    options = {"sharex": True, "sharey": True, "layout": "constrained", "squeeze": False}
    figure, panels = plt.subplots(lines, columns, figsize=(9, 0.8 + 2.3 * lines), **options)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    for axes, epoch in zip(panels.flat, shown, strict=False):
        axes.scatter(*frames[epoch].T, c=colours(classes)[y], linewidth=0, **dots(len(y), 5))
        axes.set_title(f"epoch {epoch}")
    for axes in panels[:, 0]:
        axes.set_ylabel(f"embedding, {axis} 2")
    for axes in panels[-1]:
        axes.set_xlabel(f"embedding, {axis} 1")
    draw_title(figure, f"{name}: the embedding of the validation images as it forms")
    draw_legend(figure, classes)
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
    names = [tidy(name) for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    draw_title(figure, title)
    figure.colorbar(shading, label="share of the true class", shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_triplets(triplets: list[dict], classes: tuple[str, ...], title: str, path: Path) -> None:
    """Anchors, positives and negatives, one column each: "images" (3, H, W, 3), "labels" (3,) and
    "distances" (2,) of positive and negative from the anchor.
    """
    triplets = triplets[:12]
    count = len(triplets)
    size = (1.5 * count + 0.6, 5.6)
    figure, panels = plt.subplots(3, count, figsize=size, layout="constrained", squeeze=False)
    for line, triplet in zip(panels.T, triplets, strict=True):
        notes = ["", *(f"d = {distance:.3g}" for distance in triplet["distances"])]
        for axes, image, label, note in zip(
            line, triplet["images"], triplet["labels"], notes, strict=True
        ):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            axes.set_title(tidy(classes[label], 14), fontsize=9)
            axes.set_xlabel(note, fontsize=9)
    for axes, role in zip(
        panels[:, 0], ("anchor", "farthest positive", "nearest negative"), strict=False
    ):
        axes.set_ylabel(role)
    draw_title(figure, f"{title}\nhardest test triplet of each class")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_thumbnails(
    points: np.ndarray,
    images: np.ndarray,
    y: np.ndarray,
    classes: tuple[str, ...],
    axis: str,
    title: str,
    path: Path,
) -> None:
    """The map (N, 2) with the images (N, h, w, 3) themselves, framed in the colour of the class;
    where several would overlap, one of them.
    """
    figure, axes = plt.subplots(figsize=(8, 7), layout="constrained")
    low, high = points.min(0), points.max(0)
    cells = np.floor((points - low) / np.maximum(high - low, 1e-9) * 17.99).astype(int)
    _, shown = np.unique(cells, axis=0, return_index=True)
    axes.scatter(*points.T, c=colours(classes)[y], s=4, linewidth=0)
    for place in shown:
        draw_picture(axes, points[place], images[place], colours(classes)[y[place]])
    axes.margins(0.06)
    axes.set(xlabel=f"embedding, {axis} 1", ylabel=f"embedding, {axis} 2")
    draw_legend(figure, classes)
    draw_title(figure, title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_picture(axes: Axes, point: np.ndarray, image: np.ndarray, color: object) -> None:
    """A framed image of about 0.35 inches at a point."""
    box = OffsetImage(image, zoom=24 / max(image.shape[:2]))
    frame = {"edgecolor": color, "linewidth": 1.5}
    axes.add_artist(AnnotationBbox(box, point, pad=0.1, bboxprops=frame))


def draw_legend(figure: Figure, classes: tuple[str, ...]) -> None:
    """Below the figure, in as many columns as fit into about 8 inches."""
    marks = class_marks(classes)
    wide = 0.5 + 0.065 * sum(len(mark.get_label()) for mark in marks) / len(marks)
    ncols = min(len(classes), 6, int(7.5 / wide))
    figure.legend(handles=marks, loc="outside lower center", ncols=ncols)


def class_marks(classes: tuple[str, ...]) -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", marker="o", color=color, label=tidy(name))
        for name, color in zip(classes, colours(classes), strict=True)
    ]


def plot_retrieval(
    queries: list[dict], classes: tuple[str, ...], title: str, path: Path, note: str = ""
) -> None:
    """A row each: "query" (H, W, 3) and its "label" (None: not known), its nearest training
    "images" (K, h, w, 3) with "labels" and "distances", framed green if of its class, else red.
    """
    count, columns = len(queries), 1 + max(len(row["images"]) for row in queries)
    size = (1.25 * columns + 0.6, 1.45 * count + 0.9)
    options = {"figsize": size, "layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(count, columns, **options)
    for panels, row in zip(grid, queries, strict=True):
        known = None if row["label"] is None else tidy(classes[row["label"]], 14)
        draw_framed(panels[0], row["query"], row.get("name", known), "black")
        found = zip(panels[1:], row["images"], row["labels"], row["distances"], strict=False)
        for axes, image, label, distance in found:
            right = "tab:green" if label == row["label"] else "tab:red"
            color = BASELINE if row["label"] is None else right
            draw_framed(axes, image, f"{tidy(classes[label], 14)}\n{distance:.3g}", color)
        for axes in panels[1 + len(row["images"]) :]:
            axes.axis("off")
    what = "picture, and the nearest training pictures with their distances"
    draw_title(figure, f"{title}\n{note or what}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_framed(axes: Axes, image: np.ndarray, text: str, color: str) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    axes.set_title(text, fontsize=8)
    for side in axes.spines.values():
        side.set(edgecolor=color, linewidth=3)


def plot_new_points(
    train: np.ndarray,
    y: np.ndarray,
    new: np.ndarray,
    predicted: np.ndarray,
    pictures: list[tuple[np.ndarray, np.ndarray]],
    classes: tuple[str, ...],
    axis: str,
    path: Path,
) -> None:
    """The map of the training pictures (N, 2) with new points (M, 2) as stars in the colour of the
    predicted class, and a few of the new pictures next to their points.
    """
    figure, axes = plt.subplots(figsize=(8, 6.5), layout="constrained")
    palette = colours(classes)
    axes.scatter(*train.T, c=palette[y], linewidth=0, **dots(len(train), 4, 0.35))
    for point, image in pictures:
        draw_picture(axes, point, image, "black")
    size = 90 if len(new) <= 200 else 20
    marks = {"edgecolor": "black", "linewidth": 0.6, "zorder": 5}
    axes.scatter(*new.T, c=palette[predicted], s=size, marker="*", **marks)
    axes.set(xlabel=f"embedding, {axis} 1", ylabel=f"embedding, {axis} 2")
    draw_legend(figure, classes)
    draw_title(figure, "training pictures (points), your pictures (stars, predicted class)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
