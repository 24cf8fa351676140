"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path

import matplotlib

matplotlib.rcdefaults()  # not the user's own, which may ask for LaTeX
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
COLORS = {"probability": "tab:gray", "logits": "tab:purple", "fast": "tab:green"}
NAMES = {"probability": "probability", "logits": "logits (search over c)", "fast": "fast"}


def plot_example(
    shown: dict[str, Tensor],
    probs: dict[str, Tensor],
    notes: dict[str, dict],
    classes: list[str],
    title: str,
    path: Path,
) -> None:
    """A picture (3, H, W), what each attack made of it, top-5 probabilities, and differences.

    `shown` and `probs` (classes,) hold "original" and each attack, `notes` the attacks' rows of
    metrics.json.
    """
    figure, panels = plt.subplots(
        3,
        len(shown),
        figsize=(2.6 * len(shown), 6.6),
        height_ratios=(4, 2.2, 4),
        layout="constrained",
        squeeze=False,
    )
    x = shown["original"]
    large = max(np.quantile((other - x).abs().cpu(), 0.999) for other in shown.values())
    scale = max(1, int(0.5 / max(large, 1 / 255)))  # a few pixels may be cut off
    widest = min(1.0, 1.1 * max(float(part.max()) for part in probs.values()))
    for column, (name, picture) in zip(panels.T, shown.items(), strict=True):
        color = COLORS.get(name, "black")
        column[0].imshow(picture.permute(1, 2, 0).cpu())
        column[0].set_title(name, color=color)
        plot_bars(column[1], probs[name].cpu(), classes, color, widest)
        if name == "original":
            text = f"difference x {scale},\n0 is grey" if scale > 1 else "difference,\n0 is grey"
            column[2].text(0.5, 0.5, text, ha="center", va="center")
        else:
            draw_difference(column[2], scale * (picture - x), notes[name])
        column[0].axis("off")
        column[2].axis("off")
    figure.suptitle(f"What the network sees in the saved PNG\n{literal(title)}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_difference(axes: plt.Axes, difference: Tensor, note: dict) -> None:
    """The magnified difference (3, H, W) around grey, under the numbers of its attack."""
    axes.imshow((0.5 + difference).clamp(0, 1).permute(1, 2, 0).cpu())
    how = "" if note["png_success"] else "failed, closest try\n"
    axes.set_title(f"{how}L2 {note['l2']:.3f}, margin {note['margin']:.3f}", fontsize=9)


def literal(text: str) -> str:
    """For a title: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def plot_bars(axes: plt.Axes, probs: Tensor, classes: list[str], color: str, widest: float) -> None:
    """The five largest probabilities, on an axis from 0 to `widest`."""
    values, places = probs.topk(min(5, len(probs)))
    axes.barh(range(len(values)), values, color=color, alpha=0.35)
    for height, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        text = f"{literal(classes[place])}   {value:.3f}"
        axes.text(0.03 * widest, height, text, va="center", fontsize=8)
    axes.set(xlim=(0, widest), yticks=[], ylim=(len(values) - 0.4, -0.6))
    axes.set_xlabel("probability", fontsize=8)
    axes.tick_params(labelsize=7)


def plot_search(traces: dict[str, Tensor], title: str, path: Path) -> None:
    """Criterion, margin and L2 of one picture by query, from traces (queries, 4)."""
    figure, panels = plt.subplots(3, sharex=True, figsize=(8, 6.5), layout="constrained")
    for name, trace in traces.items():
        lines = trace.cpu()[~trace[:, 0].isnan().cpu()].T
        queries = np.arange(1, lines.shape[1] + 1)
        unit = "probabilities" if name == "probability" else "logits"
        for panel, values in zip(panels, lines[:3], strict=True):
            panel.plot(queries, values, color=COLORS[name], linewidth=0.9, alpha=0.6)
        panels[0].plot([], [], color=COLORS[name], label=f"{NAMES[name]}, of {unit}")
        panels[2].plot(queries, lines[3], color=COLORS[name], linewidth=2.5, label=f"best, {name}")
    figure.suptitle(
        f"Criterion, margin and distance of one picture, before rounding: {literal(title)}"
    )
    panels[0].set_ylabel("criterion f")
    panels[0].legend()
    panels[1].set(ylabel="margin of the target")
    panels[1].axhline(0, color="black", linewidth=0.8)
    panels[2].set(ylabel="L2 distance\n(pixels in [0, 1])", xscale="log")
    panels[2].set(xlabel="query (one forward and one backward pass)", ylim=(0, None))
    panels[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_queries(traces: dict[str, Tensor], title: str, path: Path) -> None:
    """Success rate and median best L2 by query, from traces (queries, 4, N).

    A failure counts as infinitely far, so there is no median before half of the pictures succeeded.
    """
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
    for name, trace in traces.items():
        best = torch.where(trace[:, 3].isnan(), torch.inf, trace[:, 3]).cummin(0).values.cpu()
        queries = np.arange(1, len(best) + 1)
        options = {"color": COLORS[name], "label": NAMES[name], "linewidth": 2}
        top.plot(queries, best.isfinite().float().mean(1), **options)
        middle = best.median(1).values
        bottom.plot(queries, torch.where(middle.isinf(), torch.nan, middle), **options)
    top.set(ylabel="share of pictures with success", ylim=(-0.03, 1.03))
    figure.suptitle(f"Success and distance by query, before rounding: {title}")
    bottom.set(ylabel="median L2, failures infinite\n(pixels in [0, 1])", xscale="log")
    bottom.set_xlabel("queries per picture (each one forward and one backward pass)")
    top.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_bound(l2: dict[str, list[float]], title: str, path: Path) -> None:
    """Share of pictures whose PNG succeeds within an L2 bound; a failure has an infinite L2."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    reached = [value for values in l2.values() for value in values if np.isfinite(value)]
    limit = 1.05 * max(reached, default=1.0)
    for name, values in l2.items():
        bounds = [0.0, *sorted(value for value in values if np.isfinite(value)), limit]
        shares = np.minimum(np.arange(len(bounds)), len(bounds) - 2) / len(values)
        axes.step(bounds, shares, where="post", color=COLORS[name], label=NAMES[name], linewidth=2)
    axes.set(xlabel="L2 bound (pixels in [0, 1])", ylabel="share of PNGs that succeed within it")
    axes.set(xlim=(0, limit), ylim=(-0.03, 1.03), title=f"Success against distance: {title}")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_seen(rows: list[dict], pictures: list[Tensor], path: Path) -> None:
    """Pictures (3, H, W) and what the networks see in them, from predict.py's rows."""
    count = len(pictures)
    figure, panels = plt.subplots(
        1, count, figsize=(2.4 * count, 3.2), layout="constrained", squeeze=False
    )
    for axes, row, picture in zip(panels[0], rows, pictures, strict=True):
        axes.imshow(picture.permute(1, 2, 0).cpu())
        text = f"{literal(row['class'])} {row['probability']:.3f}\nmargin {row['margin']:.3f}"
        axes.set_title(text, fontsize=9)
        axes.axis("off")
    figure.suptitle("What the network sees")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_matrix(
    x: Tensor,
    png: Tensor,
    pairs: list[tuple[int, int]],
    l2: list[float],
    classes: list[str],
    title: str,
    path: Path,
) -> None:
    """Adversarial pictures (N, 3, H, W) and their mean L2 by source (row) and target (column).

    On the diagonal of the pictures stands an original; a failure has an infinite L2.
    """
    count = len(classes)
    mosaic, means = arrange(x.cpu(), png.cpu(), pairs, l2, count)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.2), layout="constrained")
    left.imshow(mosaic, extent=(-0.5, count - 0.5, count - 0.5, -0.5), interpolation="nearest")
    left.set_title("the PNGs, originals on the diagonal")
    image = right.imshow(means, cmap="viridis")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2 if np.isfinite(means).any() else 0
    for row, column in zip(*np.nonzero(np.isfinite(means)), strict=True):
        color = "white" if means[row, column] < middle else "black"
        text = f"{means[row, column]:.2f}"
        right.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    known = [value for value in l2 if np.isfinite(value)]
    note = f"mean {np.mean(known):.3f}" if known else "no success"
    right.set_title(f"L2 distance, {note}")
    figure.colorbar(image, ax=right, shrink=0.8, label="L2 (pixels in [0, 1])")
    for axes in (left, right):
        axes.set_xticks(range(count), classes)
        axes.set_yticks(range(count), classes)
        axes.set(xlabel="target class", ylabel="source class")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def arrange(
    x: Tensor, png: Tensor, pairs: list[tuple[int, int]], l2: list[float], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The mosaic of pictures (count * H, count * W, 3), and the mean L2 (count, count) of the
    successes, nan where there are none; rows are sources, columns targets.
    """
    side = x.shape[-1]
    mosaic = np.ones((count * side, count * side, 3))
    cells = [[[] for _ in range(count)] for _ in range(count)]
    for picture, other, (source, target), value in zip(x, png, pairs, l2, strict=True):
        for column, shown in ((source, picture), (target, other)):
            rows = slice(source * side, (source + 1) * side)
            mosaic[rows, column * side : (column + 1) * side] = shown.permute(1, 2, 0)
        cells[source][target] += [value] if np.isfinite(value) else []
    means = np.array([[np.mean(cell) if cell else np.nan for cell in row] for row in cells])
    return mosaic, means
