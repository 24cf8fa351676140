"""The pictures of a run: each function turns arrays into one PNG."""

import io
from pathlib import Path

import matplotlib

matplotlib.rcdefaults()  # not the user's own, which may ask for LaTeX
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
TRAIN, VALIDATION, BASELINE, METHOD = "tab:blue", "tab:orange", "tab:gray", "tab:green"
MISSED, HIT, WRONG = "#ffd21f", "#39ff5a", "#ff3b3b"  # on brown, green and grey ground alike
PARTS = {
    "objectness": "objectness (stage 1)",
    "rpn_box_reg": "box (stage 1)",
    "classifier": "class (stage 2)",
    "box_reg": "box (stage 2)",
}


def plot_curves(history: list[dict], title: str, path: Path) -> None:
    """The four parts of the training loss, and the validation AP, over the epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], color=TRAIN, linewidth=2, label="sum")
    for (key, name), style in zip(PARTS.items(), ("-", "--", "-.", ":"), strict=True):
        values = [row[key] for row in history]
        left.plot(epochs, values, style, color=TRAIN, linewidth=1.2, alpha=0.8, label=name)
    left.set(xlabel="epoch", ylabel="training loss (nats + smooth L1)", yscale="log")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    for key, name, style in (("val_ap50", "AP50", "-"), ("val_ap", "AP", "--")):
        values = [row[key] for row in history]
        right.plot(epochs, values, style, color=VALIDATION, marker=".", label=f"{name}, validation")
    right.set(xlabel="epoch", ylabel="average precision", ylim=(0, 1))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for axes in (left, right):
        mark_epochs(axes)
    figure.suptitle(title, parse_math=False)  # a folder's name may have a $
    figure.savefig(path, dpi=150)
    plt.close(figure)


def mark_epochs(axes: Axes) -> None:
    """Whole epochs on the x axis, and a dot for a curve of one epoch, which has no line."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for line in axes.lines:
        if len(line.get_xdata()) == 1:
            line.set_marker("o")


def plot_precision_recall(
    curves: dict[str, list[float]], point: dict[str, float], title: str, path: Path
) -> None:
    """Precision at recall 0, 0.01, ..., 1 and IoU 0.5; `point` is the working confidence's."""
    figure, axes = plt.subplots(figsize=(6.5, 4.9), layout="constrained")
    colors = (BASELINE, METHOD)[-len(curves) :]
    for (name, precision), color in zip(curves.items(), colors, strict=True):
        axes.plot(np.linspace(0, 1, 101), precision, color=color, linewidth=2, label=name)
    label = f"working confidence {point['confidence']:.2f}, chosen on validation"
    axes.plot(point["recall"], point["precision"], "o", color="black", label=label)
    axes.set(xlabel="recall", ylabel="precision (IoU at least 0.5)", xlim=(0, 1), ylim=(0, 1.03))
    figure.suptitle(title, parse_math=False)
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_f1(curves: dict[str, tuple], metrics: dict, title: str, path: Path) -> None:
    """F1 of validation and test, each with the confidences from which predictions count, and both
    confidences that were chosen on validation.
    """
    figure, axes = plt.subplots(figsize=(6.5, 4.3), layout="constrained")
    for (split, points), color in zip(curves.items(), (VALIDATION, METHOD), strict=True):
        name = {"val": "validation", "test": "test"}[split]
        axes.plot(*points, color=color, label=name)
    limited, best = metrics["threshold"], metrics["best_f1_threshold"]
    axes.axvline(limited, color="black", linestyle="--", label=f"working confidence {limited:.2f}")
    axes.axvline(best, color="black", linestyle=":", label=f"best F1 of validation, at {best:.2f}")
    axes.set(xlabel="confidence", ylabel="F1 (IoU at least 0.5)", xlim=(0, 1), ylim=(0, 1))
    figure.suptitle(title, parse_math=False)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_detections(x: list[Tensor], outcomes: list[tuple], title: str, path: Path) -> None:
    """Pictures (3, H, W) with boxes (K, 4): found, wrongly found, missed.

    The first six with litter, then two clean ones, as far as there are so many.
    """
    counts = [len(hits) + len(missed) for hits, _, missed in outcomes]
    chosen = [i for i, number in enumerate(counts) if number > 0][:6]
    chosen += [i for i, number in enumerate(counts) if number == 0][:2]
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (2.2 * columns + 0.4, 2.3 * rows + 1)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in panels.flat[len(chosen) :]:
        axes.axis("off")
    for axes, number in zip(panels.flat, chosen, strict=False):
        show_picture(axes, x[number])
        for part, color in zip(outcomes[number], (HIT, WRONG, MISSED), strict=True):
            draw_boxes(axes, part, color)
    names = {"found": HIT, "false positive": WRONG, "missed": MISSED}
    handles = [Patch(facecolor="none", edgecolor=c, label=n) for n, c in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(f"Test pictures, {title}", parse_math=False)
    save_photos(figure, path)


def plot_mistakes(
    x: list[Tensor], wrong: list[tuple], misses: list[tuple], title: str, path: Path
) -> None:
    """Top: false positives (confidence, picture, box), surest first; below: missed boxes (best IoU
    of a prediction with them, picture, box), largest first. Each is a crop around its box.
    """
    figure, panels = plt.subplots(2, 6, figsize=(9, 3.9), layout="constrained")
    for row, mistakes, color in ((0, wrong, WRONG), (1, misses, MISSED)):
        for axes, mistake in zip(panels[row], mistakes[:6], strict=False):
            value, number, box = mistake
            show_picture(axes, x[number])
            draw_boxes(axes, box[None], color)
            show_crop(axes, x[number], box)
            axes.set_title(f"{'confidence' if row == 0 else 'best IoU'} {value:.2f}", fontsize=9)
        for axes in panels[row, len(mistakes) :]:
            axes.axis("off")
    panels[0, 0].set_ylabel("false positives")
    panels[1, 0].set_ylabel("missed")
    figure.suptitle(f"Worst mistakes on test pictures, {title}", parse_math=False)
    save_photos(figure, path)


def save_photos(figure: Figure, path: Path) -> None:
    """In 256 colours: noise of photographs makes large PNGs."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    plt.close(figure)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)


def show_picture(axes: Axes, x: Tensor) -> None:
    axes.imshow(x.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_boxes(axes: Axes, boxes: Tensor, color: str) -> None:
    for x1, y1, x2, y2 in boxes.tolist():
        place = (x1 - 0.5, y1 - 0.5)  # imshow's pixels begin half a pixel before their number
        axes.add_patch(Rectangle(place, x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.6))


def show_crop(axes: Axes, x: Tensor, box: Tensor) -> None:
    """Shows a square around the box, half of the picture's shorter side wide or more."""
    height, width = x.shape[1:]
    x1, y1, x2, y2 = box.tolist()
    side = min(max(1.4 * (x2 - x1), 1.4 * (y2 - y1), min(height, width) / 2), height, width)
    left = min(max((x1 + x2 - side) / 2, 0), width - side)
    top = min(max((y1 + y2 - side) / 2, 0), height - side)
    axes.set(xlim=(left - 0.5, left + side - 0.5), ylim=(top + side - 0.5, top - 0.5))
