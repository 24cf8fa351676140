"""The pictures of a run: each function turns arrays into one PNG."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
TRAIN, VALIDATION, BASELINE, METHOD = "tab:blue", "tab:orange", "tab:gray", "tab:green"
TRUTH, FOUND, WRONG = "#ffd21f", "#39ff5a", "#ff3b3b"  # on brown, green and grey ground alike
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
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_precision_recall(
    curves: dict[str, list[float]], point: dict[str, float], title: str, path: Path
) -> None:
    """Precision at recall 0, 0.01, ..., 1 and IoU 0.5; `point` is the working confidence's."""
    figure, axes = plt.subplots(figsize=(6.5, 4.9), layout="constrained")
    for (name, precision), color in zip(curves.items(), (BASELINE, METHOD), strict=True):
        axes.plot(np.linspace(0, 1, 101), precision, color=color, linewidth=2, label=name)
    label = f"working confidence {point['confidence']:.2f}, chosen on validation"
    axes.plot(point["recall"], point["precision"], "o", color="black", label=label)
    axes.set(xlabel="recall", ylabel="precision (IoU at least 0.5)", xlim=(0, 1), ylim=(0, 1.03))
    figure.suptitle(title)
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_examples(
    x: list[Tensor], y: list[dict], before: list[dict], after: list[dict], title: str, path: Path
) -> None:
    """Pictures (3, H, W) with, as rows, annotation, the five surest boxes before, those after.

    Shown are the first three pictures with two or more pieces, and the first without litter.
    """
    pieces = [len(one["boxes"]) for one in y]
    chosen = [i for i, number in enumerate(pieces) if number > 1][:3]
    chosen += [i for i, number in enumerate(pieces) if number == 0][:1]
    size = (2.2 * len(chosen) + 0.4, 6.9)
    figure, panels = plt.subplots(3, len(chosen), figsize=size, layout="constrained", squeeze=False)
    for column, number in zip(panels.T, chosen, strict=True):
        first = {name: part[:5] for name, part in before[number].items()}
        rows = ((y[number], TRUTH), (first, WRONG), (after[number], FOUND))
        for axes, (boxes, color) in zip(column, rows, strict=True):
            show(axes, x[number])
            draw_boxes(axes, boxes, color)
    names = ("annotation", "before: five surest", "after")
    for axes, name in zip(panels[:, 0], names, strict=True):
        axes.set_ylabel(name)
    figure.suptitle(f"Test pictures, {title}")
    save_photos(figure, path)


def plot_mistakes(
    x: list[Tensor], alarms: list[tuple], misses: list[tuple], title: str, path: Path
) -> None:
    """Top: false alarms (confidence, picture, box), surest first; below: missed pieces (best IoU
    of a prediction with them, picture, box), largest first. Each is a crop around its box.
    """
    figure, panels = plt.subplots(2, 6, figsize=(9, 3.9), layout="constrained")
    for row, mistakes, color in ((0, alarms, WRONG), (1, misses, TRUTH)):
        for axes, mistake in zip(panels[row], mistakes[:6], strict=False):
            value, number, box = mistake
            show(axes, x[number])
            draw_boxes(axes, {"boxes": box[None]}, color)
            crop(axes, x[number], box)
            axes.set_title(f"{'confidence' if row == 0 else 'best IoU'} {value:.2f}", fontsize=9)
        for axes in panels[row, len(mistakes) :]:
            axes.axis("off")
    panels[0, 0].set_ylabel("false alarms")
    panels[1, 0].set_ylabel("missed")
    figure.suptitle(f"Worst mistakes on test pictures, {title}")
    save_photos(figure, path)


def plot_photo(x: Tensor, found: dict, classes: list[str], title: str, path: Path) -> None:
    """A photograph (3, H, W) with the boxes found in it, their class and confidence."""
    height, width = x.shape[1:]
    figure, axes = plt.subplots(figsize=(8, 8 * height / width + 0.4), layout="constrained")
    show(axes, x)
    draw_boxes(axes, found, FOUND)
    boxes, labels, scores = (found[name].tolist() for name in ("boxes", "labels", "scores"))
    for box, label, score in zip(boxes, labels, scores, strict=True):
        text = f"{classes[label - 1]} {score:.2f}"
        background = {"facecolor": "black", "alpha": 0.6, "pad": 1, "edgecolor": "none"}
        axes.text(box[0], box[1], text, color=FOUND, fontsize=9, va="bottom", bbox=background)
    figure.suptitle(f"{title}: {len(boxes)} found")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_photos(figure: Figure, path: Path) -> None:
    """In 256 colours: noise of photographs makes large PNGs."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    plt.close(figure)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)


def show(axes: Axes, x: Tensor) -> None:
    axes.imshow(x.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_boxes(axes: Axes, found: dict, color: str) -> None:
    for x1, y1, x2, y2 in found["boxes"].tolist():
        place = (x1 - 0.5, y1 - 0.5)  # imshow's pixels begin half a pixel before their number
        axes.add_patch(Rectangle(place, x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.6))


def crop(axes: Axes, x: Tensor, box: Tensor) -> None:
    """Shows a square around the box, half of the picture's shorter side wide or more."""
    height, width = x.shape[1:]
    x1, y1, x2, y2 = box.tolist()
    side = min(max(1.4 * (x2 - x1), 1.4 * (y2 - y1), min(height, width) / 2), height, width)
    left = min(max((x1 + x2 - side) / 2, 0), width - side)
    top = min(max((y1 + y2 - side) / 2, 0), height - side)
    axes.set(xlim=(left - 0.5, left + side - 0.5), ylim=(top + side - 0.5, top - 0.5))
