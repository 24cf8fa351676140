"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path

import matplotlib

matplotlib.rcdefaults()  # not the user's own, which may ask for LaTeX
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
BASELINE, METHOD = "tab:gray", "tab:green"
BINS = 15
NAMES = {"standard": "standard dropout (off)", "mc": "MC dropout"}
COLORS = {"standard": BASELINE, "mc": METHOD}
MEASURES = {
    "standard_entropy": ("entropy, standard dropout", BASELINE, "-"),
    "mc_entropy": ("entropy, MC dropout", METHOD, "--"),
    "mutual_information": ("mutual information, MC dropout", METHOD, "-"),
}


def plot_worth(metrics: dict, risks: dict[str, Tensor], title: str, path: Path) -> None:
    """NLL without and with a temperature, risk against coverage, AUROC of strange images.

    `risks` holds the error rate (R, N) among the most certain images, by measure and run.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    draw_nll(left, metrics)
    for number, (kind, values) in enumerate(risks.items()):
        label, color, style = MEASURES[kind]
        coverage = 100 * np.arange(1, values.shape[1] + 1) / values.shape[1]
        middle.plot(coverage, 100 * values.mean(0).numpy(), style, color=color, label=label)
        found = [kinds[kind] for kinds in metrics["auroc"].values()]
        mean, sd = ([one[key] for one in found] for key in ("mean", "sd"))
        look = {"color": color, "alpha": 0.8, "hatch": "///" if style == "--" else None}
        at = np.arange(len(found)) + 0.27 * (number - (len(risks) - 1) / 2)
        right.bar(at, mean, 0.25, yerr=sd, label=label, **look)
    middle.set(xlabel="images answered, the most certain first (%)", ylabel="error rate (%)")
    middle.set_ylim(bottom=0)
    right.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    right.set_xticks(range(len(metrics["auroc"])), list(metrics["auroc"]))
    right.set(ylabel="AUROC of strange images", ylim=(0.4, 1))
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"{title}: {of_runs(metrics['runs'])}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def of_runs(count: int) -> str:
    return f"mean and sd of {count} runs" if count > 1 else "one run"


def draw_nll(axes: plt.Axes, metrics: dict) -> None:
    """Test NLL of each side after report_passes, as it is and with a temperature."""
    test, at = metrics["test"], metrics["report_passes"] - 1
    sides = [name for name in NAMES if name in test]
    for number, side in enumerate(sides):
        own, tempered = test[side]["nll"], test[f"{side}_tempered"]["nll"]
        heights, errors = (
            (np.ravel(own[key])[: at + 1][-1], tempered[key]) for key in ("mean", "sd")
        )
        places = np.arange(2) + 0.4 * (number - (len(sides) - 1) / 2)
        look = {"color": COLORS[side], "capsize": 3, "label": NAMES[side]}
        axes.bar_label(axes.bar(places, heights, 0.36, yerr=errors, **look), fmt="%.3f", fontsize=8)
    if "ensemble" in metrics:
        label = f"ensemble of the {metrics['ensemble']['networks']} networks"
        for place, key in enumerate(("plain", "tempered")):
            value = metrics["ensemble"][key]["nll"]
            axes.plot(place + np.array([-0.4, 0.4]), [value] * 2, "k:", label=label)
            label = None  # one entry in the legend
    axes.set_xticks([0, 1], ["as they are", "with a temperature"])
    axes.set_ylabel("test NLL (nats)")
    axes.margins(y=0.45)  # room for the legend
    axes.legend(loc="upper right", fontsize=8)


def plot_passes(metrics: dict, title: str, path: Path) -> None:
    """NLL and error rate against the number of passes, on test and training images."""
    figure, grid = plt.subplots(2, 2, sharex=True, figsize=(9, 6), layout="constrained")
    panels = [(split, score) for split in ("test", "train") for score in ("nll", "accuracy")]
    for axes, (split, score) in zip(grid.T.flat, panels, strict=True):
        numbers = metrics[split]
        passes = np.arange(1, len(numbers["mc"]["nll"]["mean"]) + 1)
        mean, _ = as_drawn(numbers["logit_averaging"], score)
        axes.plot(passes, mean, ":", color="black", linewidth=1.2, label="logits averaged instead")
        for method in (name for name in NAMES if name in numbers):
            mean, sd = (
                np.broadcast_to(part, passes.shape) for part in as_drawn(numbers[method], score)
            )
            color = COLORS[method]
            axes.plot(passes, mean, color=color, linewidth=2, label=NAMES[method])
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
    figure.suptitle(f"{title}: {of_runs(metrics['runs'])}")
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
    title: str,
    path: Path,
) -> None:
    """One image, turned by each of `angles` (A images), and its probabilities of four classes.

    A dot for each pass of probs["mc"] (T, A, C), a line for probs["standard"] (A, C) if it is
    there.
    """
    mc = probs["mc"].numpy()
    shown = np.sort(np.argsort(-mc.mean(0).sum(0))[:4])
    pairs = [shown[:2], shown[2:]] if len(shown) > 2 else [shown]
    figure = plt.figure(figsize=(9, 1.4 + 2.1 * len(pairs)), layout="constrained")
    rows = figure.subfigures(1 + len(pairs), 1, height_ratios=(1, *[3.0] * len(pairs)))
    for panel, image in zip(rows[0].subplots(1, len(angles)), x, strict=True):
        panel.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
        panel.axis("off")
    for row, pair in zip(rows[1:], pairs, strict=True):
        panels = row.subplots(1, 2, sharey=True)
        for axes, label in zip(panels, pair, strict=False):
            draw_turning(axes, angles, probs, label)
            axes.set_ylabel(f"p(class {plain_text(classes[label])})")
            if label == shown[0]:
                axes.legend()
        for axes in panels[len(pair) :]:
            axes.axis("off")
    figure.supxlabel("rotation (degrees)", fontsize=10)
    figure.suptitle(f"{title}: a test image turned; a dot for each of {len(mc)} passes")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_turning(axes: plt.Axes, angles: list[int], probs: dict[str, Tensor], label: int) -> None:
    """The probabilities of one class by angle; dots are moved sideways at random."""
    mc = probs["mc"][..., label].numpy()
    jitter = np.random.default_rng(0).uniform(-4, 4, mc.shape)
    place = (np.asarray(angles) + jitter).ravel()
    axes.scatter(place, mc.ravel(), s=5, color=METHOD, alpha=0.35, linewidth=0)
    axes.plot(angles, mc.mean(0), color=METHOD, label="MC dropout, mean")
    if "standard" in probs:
        line = probs["standard"][:, label].numpy()
        axes.plot(angles, line, "--", color=BASELINE, label=NAMES["standard"])
    axes.set(ylim=(-0.03, 1.03), xticks=angles[::2])


def plain_text(name: str) -> str:
    """For a title: a `$` would begin a formula."""
    return name.replace("$", r"\$")


def plot_reliability(
    log_probs: dict[str, Tensor], y: Tensor, ece: dict[str, float], title: str, path: Path
) -> None:
    """Accuracy against confidence in 15 bins, test images (R, N, C) of all runs pooled.

    `ece` is the mean over the runs, by method.
    """
    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(6.5, 6), height_ratios=(3, 1), layout="constrained"
    )
    top.plot([0, 1], [0, 1], ":", color="black", linewidth=1, label="calibrated")
    edges = np.linspace(0, 1, BINS + 1)
    for method in (name for name in NAMES if name in log_probs):
        color = COLORS[method]
        confidence, predicted = (part.numpy() for part in log_probs[method].exp().max(-1))
        hit = predicted == y.numpy()
        number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        count = np.bincount(number.ravel(), minlength=BINS)
        full = count >= 10  # fewer are only noise
        mean = [
            np.bincount(number.ravel(), part.ravel(), BINS)[full] / count[full]
            for part in (confidence, hit)
        ]
        top.plot(*mean, "o-", color=color, label=f"{NAMES[method]}, ECE {ece[method]:.4f}")
        bottom.stairs(count, edges, color=color, linewidth=1.5)
    bottom.set_yscale("log")
    bottom.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    top.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1.01))
    pooled = f", {len(log_probs['mc'])} runs pooled" if len(log_probs["mc"]) > 1 else ""
    figure.suptitle(f"{title}: reliability on test images{pooled}")
    top.legend(loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_certainty(
    x: Tensor, y: Tensor, probs: Tensor, classes: tuple[str, ...], title: str, path: Path
) -> None:
    """The ten most and the twenty least certain images by the entropy of `probs` (N, C)."""
    uncertainty = -(probs * probs.clamp(min=1e-300).log()).sum(-1)
    order = uncertainty.argsort()
    chosen = [*order[:10], *order.flip(0)[:20]]
    figure, panels = plt.subplots(3, 10, figsize=(9, 4.2), layout="constrained")
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    for panel, number in zip(panels.flat, chosen, strict=False):
        predicted = int(probs[number].argmax())
        panel.imshow(x[number].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
        color = "black" if predicted == y[number] else "red"
        label, truth = (classes[place][:8] for place in (predicted, y[number]))
        text = f"{label} ({probs[number].max():.0%})\ntrue {truth}"
        panel.set_title(plain_text(text), fontsize=8, color=color)
    for row, name in enumerate(("most certain", "least certain", "least certain")):
        panels[row, 0].set_ylabel(name, fontsize=9)
    figure.suptitle(f"{title}: test images by entropy of MC dropout (red: wrong)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_study(study: dict, dataset: str, path: Path) -> None:
    """NLL as it is and with a temperature, and AUROC, against the number of training images."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    counts = [int(count) for count in study]
    texts = {"": "test NLL (nats)", "_tempered": "test NLL with a temperature (nats)"}
    for axes, (suffix, text) in zip(panels, texts.items(), strict=False):
        for side in NAMES:
            found = [one[f"{side}{suffix}"]["nll"] for one in study.values()]
            draw_band(axes, counts, found, label=NAMES[side], color=COLORS[side])
        axes.set(ylabel=text, ylim=(0, None))
    for kind, (label, color, style) in MEASURES.items():
        found = [one["auroc"]["photographs"][kind] for one in study.values()]
        draw_band(panels[2], counts, found, label=label, color=color, linestyle=style)
    panels[2].set_ylabel("AUROC of photographs")
    for axes in panels:
        axes.set(xlabel="training images", xscale="log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    panels[0].legend()
    panels[2].legend(fontsize=8)
    figure.suptitle(f"{dataset}: with how many labels leaving dropout on pays (mean and sd)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_band(axes: plt.Axes, x: list, found: list[dict], *, color: str, **style: str) -> None:
    """A line of means in a band of standard deviations."""
    mean, sd = (np.array([one[key] for one in found]) for key in ("mean", "sd"))
    axes.plot(x, mean, marker="o", markersize=4, color=color, **style)
    axes.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)


def plot_active(active: dict, dataset: str, path: Path) -> None:
    """Test accuracy against labels for each acquisition method, and its gain over random."""
    styles = {
        "random": ("random", "black", ":"),
        "entropy": ("entropy, dropout off", BASELINE, "-"),
        "margin": ("margin, dropout off", BASELINE, "--"),
        "coreset": ("coreset (k-means)", "tab:brown", "-"),
        "mc_entropy": ("entropy, MC dropout", METHOD, "--"),
        "bald": ("BALD", METHOD, "-"),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for method, (label, color, style) in styles.items():
        mean = 100 * np.array(active[method]["mean"])
        left.plot(active["labels"], mean, style, color=color, label=label)
        more = {key: 100 * np.array(x) for key, x in active[method]["minus_random"].items()}
        right.plot(active["labels"], more["mean"], style, color=color)
        if method in ("entropy", "bald"):
            low, high = (more["mean"] + sign * more["standard_error"] for sign in (-1, 1))
            right.fill_between(active["labels"], low, high, color=color, alpha=0.2, linewidth=0)
    left.set(xlabel="labels", ylabel="test accuracy (%)")
    right.set(xlabel="labels", ylabel="points over random (band: ± 1 standard error)")
    left.legend()
    figure.suptitle(f"{dataset}: active learning, dropout off when tested")
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
