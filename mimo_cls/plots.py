"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
BASELINE, METHOD = "tab:gray", "tab:green"
BINS = 15


def plot_curves(
    single: list[dict], mimo: list[dict], metrics: dict, title: str, path: Path
) -> None:
    """Validation NLL, accuracy and the members' disagreement over epochs."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
    epochs = [row["epoch"] for row in mimo]
    members = sum(name.endswith("_nll") and "member" in name for name in mimo[0])
    for axes, key, scale in ((left, "nll", 1), (middle, "accuracy", 100)):
        for m in range(1, members + 1):
            values = [scale * row[f"val_member{m}_{key}"] for row in mimo]
            label = "MIMO, each member" if m == 1 else None
            axes.plot(epochs, values, color=METHOD, linewidth=0.9, alpha=0.6, label=label)
        values = [scale * row[f"val_{key}"] for row in mimo]
        axes.plot(epochs, values, color=METHOD, linewidth=2.2, label="MIMO, ensemble")
        values = [scale * row[f"val_{key}"] for row in single]
        axes.plot(epochs, values, color=BASELINE, linewidth=2.2, label="deterministic twin")
    left.set(ylabel="validation NLL (nats)", xlabel="epoch")
    middle.set(ylabel="validation accuracy (%)", xlabel="epoch")
    worst = max(row["val_nll"] for row in (*single, *mimo)[:: max(1, len(single) // 2)])
    left.set_ylim(0, 1.1 * worst)
    values = [100 * row["val_disagreement"] for row in mimo]
    right.plot(epochs, values, color=METHOD, linewidth=2.2)
    right.set(ylabel="two members predict different\nclasses (% of images)", xlabel="epoch")
    right.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    result = ", ".join(
        f"{name} {metrics[who]['accuracy']:.1%} (NLL {metrics[who]['nll']:.3f})"
        for who, name in (("ensemble", "ensemble"), ("single", "twin"))
    )
    figure.suptitle(f"{title}. Test: {result}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_reliability(
    log_probs: dict[str, Tensor], y: Tensor, metrics: dict, title: str, path: Path
) -> None:
    """Accuracy against confidence in 15 bins, from log-probabilities (N, C) by who gave them."""
    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(6.5, 6), height_ratios=(3, 1), layout="constrained"
    )
    top.plot([0, 1], [0, 1], ":", color="black", linewidth=1, label="calibrated")
    edges = np.linspace(0, 1, BINS + 1)
    for who, answer in log_probs.items():
        color = BASELINE if who == "single" else METHOD
        label = f"{name_of(who)}, ECE {metrics[who]['ece']:.4f}"
        confidence, predicted = (part.numpy() for part in answer.exp().max(1))
        hit = predicted == y.numpy()
        number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        images = np.bincount(number, minlength=BINS)
        full = images >= 10  # fewer say nothing
        mean = [
            np.bincount(number, part, BINS)[full] / images[full]
            for part in (confidence, hit.astype(float))
        ]
        if who in ("single", "ensemble"):
            top.plot(*mean, "o-", color=color, linewidth=2, label=label)
            bottom.stairs(images, edges, color=color, linewidth=1.8)
        else:
            top.plot(*mean, color=color, linewidth=0.9, alpha=0.6, label=label)
    bottom.set_yscale("log")
    bottom.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    top.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1.01))
    top.legend(loc="upper left")
    figure.suptitle(f"{title}: {len(y):,} test images")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def name_of(who: str) -> str:
    names = {"single": "deterministic twin", "ensemble": "MIMO, ensemble"}
    return names.get(who, f"MIMO, {who.replace('member', 'member ')}")


def plot_corruption(
    metrics: dict, severities: dict[str, tuple[float, ...]], title: str, path: Path
) -> None:
    """Test accuracy under noise and blur of growing severity."""
    labels = {"noise": "noise: standard deviation (image values in [0, 1])"}
    labels["blur"] = "blur: standard deviation (pixels)"
    figure, grid = plt.subplots(1, 2, sharey=True, figsize=(9, 4.2), layout="constrained")
    answers = [who for who, numbers in metrics.items() if "noise" in numbers]
    for axes, (kind, values) in zip(grid, severities.items(), strict=True):
        for who in reversed(answers):
            numbers = metrics[who]
            errors = (1 - numbers["accuracy"], *numbers[kind]["error"])
            single, member = who == "single", who.startswith("member")
            label = name_of(who)
            if member:
                label = "MIMO, each member" if who == "member1" else None
            axes.plot(
                (0, *values),
                [100 * (1 - error) for error in errors],
                color=BASELINE if single else METHOD,
                linewidth=0.9 if member else 2.2,
                alpha=0.6 if member else 1,
                marker=None if member else "o",
                label=label,
            )
        axes.set_xlabel(labels[kind])
        axes.set_xticks((0, *values))
    grid[0].set_ylabel("test accuracy (%)")
    grid[0].legend()
    means = {
        who: np.mean([1 - np.mean(metrics[who][kind]["error"]) for kind in severities])
        for who in ("ensemble", "single")
    }
    result = f"ensemble {means['ensemble']:.1%}, twin {means['single']:.1%}"
    figure.suptitle(f"{title}. Mean accuracy on corrupted images: {result}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_disagreement(
    x: Tensor, y: Tensor, probs: Tensor, classes: tuple[str, ...], title: str, path: Path
) -> None:
    """Eight images (8, 3, H, W), their classes (8,) and each member's probabilities (8, M, C)."""
    columns = 4
    figure = plt.figure(figsize=(9.5, 7.4), layout="constrained")
    shades = plt.get_cmap("Greens")(np.linspace(0.85, 0.4, probs.shape[1]))
    names = [name if len(name) < 11 else name[:9] + "." for name in classes]
    for number, panel in enumerate(figure.subfigures(2, columns).flat):
        if number >= len(x):
            break
        top, bottom = panel.subplots(2, 1, height_ratios=(1, 1.5))
        top.imshow(x[number].permute(1, 2, 0).numpy())
        top.axis("off")
        top.set_title(f"true: {classes[y[number]]}")
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
    figure.suptitle(f"{title}: test images on which members disagree most")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_study(study: list[dict], title: str, path: Path) -> None:
    """NLL, accuracy and disagreement against M, a line for each rho; the twin as a line across."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained")
    texts = {"nll": "test NLL (nats)", "accuracy": "test accuracy (%)"}
    texts["disagreement"] = "two members predict different\nclasses (% of test images)"
    rhos = sorted({row["input_repetition"] for row in study if row["members"] > 1})
    for axes, (key, text) in zip(panels, texts.items(), strict=True):
        scale = 1 if key == "nll" else 100
        for row in study:
            if row["members"] == 1 and key != "disagreement":
                label = "deterministic twin"
                axes.axhline(scale * row[key], color=BASELINE, linewidth=2, label=label)
        for rho, style in zip(rhos, ("-o", "--s", ":^", "-.d") * len(rhos), strict=False):
            rows = [r for r in study if r["members"] > 1 and r["input_repetition"] == rho]
            at, values = [r["members"] for r in rows], [scale * r[key] for r in rows]
            axes.plot(at, values, style, color=METHOD, label=rf"MIMO, $\rho$ = {rho:g}")
        axes.set(xlabel="members M", ylabel=text)
        axes.set_xticks(sorted({row["members"] for row in study if row["members"] > 1}))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(f"{title.rsplit(', M', 1)[0]}: members and input repetition")
    figure.savefig(path, dpi=150)
    plt.close(figure)
