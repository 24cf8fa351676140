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


def plot_passes(metrics: dict, dataset: str, runs: int, path: Path) -> None:
    """NLL and error rate against the number of passes, on test and training images."""
    figure, grid = plt.subplots(2, 2, sharex=True, figsize=(9, 6), layout="constrained")
    for axes, (split, score) in zip(
        grid.T.flat, [(s, n) for s in ("test", "train") for n in ("nll", "accuracy")], strict=True
    ):
        numbers = metrics[split]
        passes = np.arange(1, len(numbers["mc"]["nll"]["mean"]) + 1)
        if "logit_averaging" in numbers:
            label = "logits averaged instead"
            mean, _ = as_drawn(numbers["logit_averaging"], score)
            axes.plot(passes, mean, ":", color="black", linewidth=1.2, label=label)
        for method, color in (("standard", BASELINE), ("mc", METHOD)):
            mean, sd = (
                np.broadcast_to(part, passes.shape) for part in as_drawn(numbers[method], score)
            )
            label = "MC dropout" if method == "mc" else "standard dropout (off)"
            axes.plot(passes, mean, color=color, linewidth=2, label=label)
            axes.fill_between(passes, mean - sd, mean + sd, color=color, alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        ticks = [count for count in (1, 2, 5, 10, 20, 50, 100, 1000) if count <= len(passes)]
        axes.set_xticks(ticks, [str(count) for count in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_ylabel("error rate (%)" if score == "accuracy" else "NLL (nats)")
        if score == "nll":
            axes.set_title(f"{split} images")
        else:
            axes.set_xlabel("forward passes T averaged")
    grid[0, 0].legend()
    test, at = metrics["test"], metrics["report_passes"]
    standard, mc = test["standard"]["accuracy"]["mean"], test["mc"]["accuracy"]["mean"][at - 1]
    result = f"test error {1 - standard:.2%} with standard dropout, {1 - mc:.2%} with {at} passes"
    figure.suptitle(f"{dataset}, mean and sd of {runs} runs: {result}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def as_drawn(numbers: dict, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation; of the accuracy, as an error rate in per cent."""
    mean, sd = (np.asarray(numbers[score][key]) for key in ("mean", "sd"))
    return (100 * (1 - mean), 100 * sd) if score == "accuracy" else (mean, sd)


def plot_rotation(
    x: Tensor,
    angles: list[int],
    probs: dict[str, Tensor],
    classes: tuple[str, ...],
    dataset: str,
    path: Path,
) -> None:
    """One image, turned by each of `angles` (A images), and its probabilities of four classes.

    A dot for each pass of probs["mc"] (T, A, C), a line for probs["standard"] (A, C).
    """
    mc, standard = probs["mc"].numpy(), probs["standard"].numpy()
    shown = np.sort(np.argsort(-(mc.mean(0) + standard).sum(0))[:4])
    figure = plt.figure(figsize=(9, 5.6), layout="constrained")
    rows = figure.subfigures(3, 1, height_ratios=(1, 3.0, 3.0))
    for panel, image in zip(rows[0].subplots(1, len(angles)), x, strict=True):
        panel.imshow(image.permute(1, 2, 0).squeeze(-1), cmap="gray")
        panel.axis("off")
    jitter = np.random.default_rng(0).uniform(-4, 4, mc.shape[:2])
    for row, pair in zip(rows[1:], (shown[:2], shown[2:]), strict=True):
        for axes, label in zip(row.subplots(1, 2, sharey=True), pair, strict=False):
            place = (np.asarray(angles) + jitter).ravel()
            axes.scatter(place, mc[..., label].ravel(), s=5, color=METHOD, alpha=0.35, linewidth=0)
            axes.plot(angles, mc[..., label].mean(0), color=METHOD, label="MC dropout, mean")
            axes.plot(angles, standard[:, label], "--", color=BASELINE, label="standard dropout")
            axes.set(ylim=(-0.03, 1.03), xticks=angles[::2], ylabel=f"p(class {classes[label]})")
            if label == shown[0]:
                axes.legend()
    figure.supxlabel("rotation (degrees)", fontsize=10)
    title = f"{dataset}: a test image turned; each dot is one of {len(mc)} passes with dropout on"
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_reliability(
    log_probs: dict[str, Tensor], y: Tensor, ece: dict[str, float], dataset: str, path: Path
) -> None:
    """Accuracy against confidence in 15 bins, test images (R, N, C) of all runs pooled.

    `ece` is the mean over the runs, by method.
    """
    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(6.5, 6), height_ratios=(3, 1), layout="constrained"
    )
    top.plot([0, 1], [0, 1], ":", color="black", linewidth=1, label="calibrated")
    edges = np.linspace(0, 1, BINS + 1)
    styles = {"standard": ("standard dropout", BASELINE), "mc": ("MC dropout", METHOD)}
    for method, (name, color) in styles.items():
        label = f"{name}, ECE {ece[method]:.4f}"
        confidence, predicted = (part.numpy() for part in log_probs[method].exp().max(-1))
        hit = predicted == y.numpy()
        number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        count = np.bincount(number.ravel(), minlength=BINS)
        full = count >= 10  # fewer images say nothing
        mean = [
            np.bincount(number.ravel(), part.ravel(), BINS)[full] / count[full]
            for part in (confidence, hit)
        ]
        top.plot(*mean, "o-", color=color, label=label)
        bottom.stairs(count, edges, color=color, linewidth=1.5)
    bottom.set_yscale("log")
    bottom.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    top.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1.01))
    figure.suptitle(f"{dataset}: reliability on test images, {len(log_probs['mc'])} runs pooled")
    top.legend(loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_certainty(
    x: Tensor, y: Tensor, probs: Tensor, classes: tuple[str, ...], dataset: str, path: Path
) -> None:
    """The ten most and the twenty least certain images by the entropy of `probs` (N, C)."""
    uncertainty = -(probs * probs.clamp(min=1e-300).log()).sum(-1)
    order = uncertainty.argsort()
    chosen = [*order[:10], *order.flip(0)[:20]]
    figure, panels = plt.subplots(3, 10, figsize=(9, 4.2), layout="constrained")
    for panel, number in zip(panels.flat, chosen, strict=False):
        predicted = int(probs[number].argmax())
        panel.imshow(x[number].permute(1, 2, 0).squeeze(-1), cmap="gray")
        panel.set_xticks([])
        panel.set_yticks([])
        color = "black" if predicted == y[number] else "red"
        text = f"{classes[predicted]} ({probs[number].max():.0%})\ntrue {classes[y[number]]}"
        panel.set_title(text, fontsize=8, color=color)
    for row, name in enumerate(("most certain", "least certain", "least certain")):
        panels[row, 0].set_ylabel(name, fontsize=9)
    figure.suptitle(f"{dataset}: test images by entropy of MC dropout (red: wrong)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
