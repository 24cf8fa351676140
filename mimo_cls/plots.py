"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path

import matplotlib

matplotlib.rcdefaults()  # not the user's own, which may ask for LaTeX
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
BASELINE, METHOD = "tab:gray", "tab:green"
BINS = 15
ARMS = {
    "twin": ("deterministic twin", BASELINE, "-"),
    "small": ("M small networks, together as large", "tab:brown", "-"),
    "mimo": ("MIMO, ensemble", METHOD, "-"),
    "member": ("MIMO, one member", METHOD, ":"),
    "deep": ("ensemble of M twins, M times the cost", "black", ":"),
}


def plot_curves(rows: dict[str, list[dict]], title: str, path: Path) -> None:
    """Validation NLL, accuracy and the members' disagreement over epochs, by arm, of run 0."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
    mimo = rows["mimo"]
    members = sum(name.endswith("_nll") and "member" in name for name in mimo[0])
    epochs = [row["epoch"] for row in mimo]
    for axes, key, scale in ((left, "nll", 1), (middle, "accuracy", 100)):
        for m in range(1, members + 1):
            values = [scale * row[f"val_member{m}_{key}"] for row in mimo]
            label = "MIMO, each member" if m == 1 else None
            axes.plot(epochs, values, color=METHOD, linewidth=0.9, alpha=0.6, label=label)
        for arm, of_arm in rows.items():
            name, color, _ = ARMS[arm]
            values = [scale * row[f"val_{key}"] for row in of_arm]
            axes.plot(epochs, values, color=color, linewidth=2.2, label=name)
    left.set(ylabel="validation NLL (nats)", xlabel="epoch")
    middle.set(ylabel="validation accuracy (%)", xlabel="epoch")
    late = [row["val_nll"] for of_arm in rows.values() for row in of_arm[len(of_arm) // 4 :]]
    left.set_ylim(0, 1.3 * max(late))
    right.plot(epochs, [100 * row["val_disagreement"] for row in mimo], color=METHOD, linewidth=2.2)
    right.set(ylabel="two members predict different\nclasses (% of images)", xlabel="epoch")
    right.set_ylim(bottom=0)
    for axes in (left, middle, right):
        mark_epochs(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def mark_epochs(axes: Axes) -> None:
    """Whole epochs on the x axis, and a dot for a curve of one epoch, which has no line."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for line in axes.lines:
        if len(line.get_xdata()) == 1:
            line.set_marker("o")


def plot_corruption(
    arms: dict[str, dict], severities: dict[str, tuple[float, ...]], title: str, path: Path
) -> None:
    """Test NLL and accuracy under corruptions of growing severity; 0 is the clean image."""
    kinds = list(severities)
    figure, grid = plt.subplots(
        2, len(kinds), sharex="col", sharey="row", figsize=(10, 6), layout="constrained"
    )
    for row, (score, scale) in zip(grid, (("nll", 1), ("accuracy", 100)), strict=True):
        for number, (axes, kind) in enumerate(zip(row, kinds, strict=True)):
            count = len(severities[kind])
            first = sum(len(severities[other]) for other in kinds[:number])
            for arm, (label, color, style) in ARMS.items():
                if arm not in arms:
                    continue
                clean, found = arms[arm][score], arms[arm][f"by_severity_{score}"]
                mean, sd = (
                    scale * np.array([clean[key], *found[key][first : first + count]])
                    for key in ("mean", "sd")
                )
                at = range(count + 1)
                axes.plot(at, mean, style, color=color, marker="o", markersize=3, label=label)
                if arm in ("mimo", "twin"):
                    axes.fill_between(at, mean - sd, mean + sd, color=color, alpha=0.2, linewidth=0)
            axes.set_xticks(range(count + 1), ["0", *map(str, severities[kind])])
    for axes, kind in zip(grid[1], kinds, strict=True):
        axes.set_xlabel(f"{kind} (severity)")
    grid[0, 0].set(ylabel="test NLL (nats)", ylim=(0, None))
    grid[1, 0].set_ylabel("test accuracy (%)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    result = ", ".join(
        f"{ARMS[arm][0]} {arms[arm]['corrupted_nll']['mean']:.2f}"
        for arm in ("mimo", "twin")
        if arm in arms
    )
    figure.suptitle(f"{title}. Mean NLL of corrupted images: {result}", parse_math=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_calibration(
    log_probs: dict[str, Tensor], y: Tensor, ece: dict[str, float], title: str, path: Path
) -> None:
    """Accuracy against confidence in 15 bins, test images (R, N, C) of all runs pooled, by arm.

    `ece` is the mean over the runs.
    """
    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(6.5, 6), height_ratios=(3, 1), layout="constrained"
    )
    top.plot([0, 1], [0, 1], ":", color="black", linewidth=1, label="calibrated")
    edges = np.linspace(0, 1, BINS + 1)
    for arm, answer in log_probs.items():
        name, color, _ = ARMS[arm]
        confidence, predicted = (part.numpy() for part in answer.exp().max(-1))
        hit = (predicted == y.numpy()).ravel()
        number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1).ravel()
        images = np.bincount(number, minlength=BINS)
        full = images >= 10  # of fewer, the mean is noise
        mean = [
            np.bincount(number, part.ravel().astype(float), BINS)[full] / images[full]
            for part in (confidence, hit)
        ]
        top.plot(*mean, "o-", color=color, linewidth=2, label=f"{name}, ECE {ece[arm]:.4f}")
        bottom.stairs(images, edges, color=color, linewidth=1.8)
    bottom.set_yscale("log")
    bottom.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    top.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1.01))
    top.legend(loc="upper left")
    figure.suptitle(f"{title}: {len(y):,} test images, all runs pooled", parse_math=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_independence(variances: Tensor, title: str, path: Path) -> None:
    """For each last feature the share of its variance that each member's image causes, sorted.

    From variances (features, M).
    """
    total = variances.sum(1, keepdim=True)
    shares = (variances / total)[total[:, 0] > 0].numpy()
    shares = 100 * shares[np.argsort(shares[:, 0])]
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    shades = plt.get_cmap("Greens")(np.linspace(0.85, 0.35, shares.shape[1]))
    bottom = np.zeros(len(shares))
    for m, shade in enumerate(shades):
        axes.bar(
            np.arange(len(shares)), shares[:, m], 1, bottom, color=shade, label=f"image {m + 1}"
        )
        bottom += shares[:, m]
    axes.set(xlabel="feature before the last layer, sorted", xlim=(-0.5, len(shares) - 0.5))
    axes.set(ylabel="share of its variance (%)", ylim=(0, 100))
    axes.legend(title="when only this changes:", loc="upper left", framealpha=0.9)
    figure.suptitle(f"{title}: which member's image moves a feature", parse_math=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_disagreement(
    x: Tensor, y: Tensor, probs: Tensor, classes: tuple[str, ...], title: str, path: Path
) -> None:
    """Eight images (8, 3, H, W), their classes (8,) and each member's probabilities (8, M, C)."""
    columns = 4
    figure = plt.figure(figsize=(9.5, 7.4), layout="constrained")
    shades = plt.get_cmap("Greens")(np.linspace(0.85, 0.4, probs.shape[1]))
    names = [plain_text(name if len(name) < 11 else name[:9] + ".") for name in classes]
    for number, panel in enumerate(figure.subfigures(2, columns).flat):
        if number >= len(x):
            break
        top, bottom = panel.subplots(2, 1, height_ratios=(1, 1.5))
        top.imshow(x[number].permute(1, 2, 0).numpy())
        top.axis("off")
        top.set_title(f"true: {names[y[number]]}")
        shown = probs[number].mean(0).argsort(descending=True)[:4].tolist()
        width = 0.8 / probs.shape[1]
        for m, shade in enumerate(shades):
            at = np.arange(len(shown)) + (m - (len(shades) - 1) / 2) * width
            label = f"member {m + 1}" if number == 0 else None
            bottom.bar(at, probs[number, m, shown].numpy(), width, color=shade, label=label)
        ticks = bottom.set_xticks(range(len(shown)), [names[c] for c in shown], fontsize=9)
        for tick, c in zip(ticks, shown, strict=True):
            tick.label1.set_fontweight("bold" if c == y[number] else "normal")
        if max(map(len, names)) > 3:
            bottom.tick_params("x", rotation=35)
        bottom.set_ylim(0, 1)
        bottom.set_ylabel("probability" if number % columns == 0 else "", fontsize=9)
        bottom.tick_params("y", labelleft=number % columns == 0, labelsize=8)
    figure.legend(loc="outside lower center", ncols=8)
    figure.suptitle(f"{title}: test images on which members disagree most", parse_math=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plain_text(name: str) -> str:
    """For a title: a `$` would begin a formula."""
    return name.replace("$", r"\$")


def plot_room(study: list[dict], title: str, path: Path) -> None:
    """What MIMO has over its twin against the width, a line for each M and rho: accuracy, NLL
    clean and corrupted, disagreement; the error bars are standard errors over the runs.
    """
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.9), layout="constrained")
    keys = {
        "accuracy": ("clean accuracy: points over the twin", 100),
        "nll": ("clean NLL over the twin (nats)", 1),
        "corrupted_nll": ("corrupted NLL over the twin (nats)", 1),
    }
    pairs = sorted({(row["members"], row["input_repetition"]) for row in study})
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(pairs)))
    for (members, rho), shade in zip(pairs, shades, strict=True):
        rows = [r for r in study if (r["members"], r["input_repetition"]) == (members, rho)]
        widths = [row["width"] for row in rows]
        style = {"color": shade, "marker": "o", "label": rf"M = {members}, $\rho$ = {rho:g}"}
        for axes, (key, (_, scale)) in zip(panels, keys.items(), strict=False):
            found = [row["mimo_minus_twin"][key] for row in rows]
            mean, error = (
                [scale * one[name] for one in found] for name in ("mean", "standard_error")
            )
            axes.errorbar(widths, mean, error, capsize=3, **style)
        values = [100 * row["mimo"]["disagreement"]["mean"] for row in rows]
        panels[3].plot(widths, values, **style)
    for axes, (text, _) in zip(panels, keys.values(), strict=False):
        axes.axhline(0, color=BASELINE, linewidth=2)
        axes.set_ylabel(text)
    panels[3].set(
        ylabel="two members predict different\nclasses (% of test images)", ylim=(0, None)
    )
    for axes in panels:
        axes.set(xlabel="width of the Wide ResNet", xscale="log")
        widths = sorted({row["width"] for row in study})
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    figure.suptitle(f"{title}: where MIMO crosses its twin (the gray line)", parse_math=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_extremes(pictures: dict[str, list[tuple[str, Tensor]]], path: Path) -> None:
    """Rows of at most eight pictures, uint8 (C, H, W), each with what is said of it, by row."""
    rows = len(pictures)
    figure, panels = plt.subplots(
        rows, 8, squeeze=False, figsize=(10, 1.9 * rows + 0.4), layout="constrained"
    )
    for row, (name, shown) in zip(panels, pictures.items(), strict=True):
        for panel in row:
            panel.set_xticks([])
            panel.set_yticks([])
        for panel, (text, picture) in zip(row, shown, strict=False):
            panel.imshow(picture.permute(1, 2, 0).squeeze(-1), cmap="gray")
            panel.set_title(plain_text(text), fontsize=8)
        for panel in row[len(shown) :]:
            panel.axis("off")
        row[0].set_ylabel(name, fontsize=9)
    figure.suptitle("your pictures, by the entropy of what is predicted")
    figure.savefig(path, dpi=150)
    plt.close(figure)
