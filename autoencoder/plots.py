"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
TRAIN, VALIDATION, BASELINE, METHOD = "tab:blue", "tab:orange", "tab:gray", "tab:green"


def plot_curves(
    history: dict[str, list[dict]], numbers: dict, names: dict[str, str], path: Path
) -> None:
    """Training and validation MSE of both autoencoders over their epochs, beside PCA."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, (name, rows) in zip(panels, history.items(), strict=True):
        epochs = [row["epoch"] for row in rows]
        for key, color, label in (
            ("train_loss", TRAIN, "train"),
            ("val_loss", VALIDATION, "validation"),
        ):
            axes.plot(epochs, [row[key] for row in rows], ".-", color=color, label=label)
        own, pca = (numbers[f"{row}_{name}"][name]["mse"] for row in ("trained_on", "pca_of"))
        axes.axhline(pca, color=BASELINE, linestyle="--", label="PCA, test")
        axes.set(yscale="log", xlabel="epoch", ylabel="MSE, pixels in [0, 1]")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{names[name]}: test MSE {own:.5f}, PCA {pca:.5f}")
        axes.legend()
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True})
    plt.close(figure)


def row_names(names: dict[str, str], code_size: int) -> dict[str, str]:
    trained = {f"trained_on_{name}": f"autoencoder of {text}" for name, text in names.items()}
    pca = {f"pca_of_{name}": f"PCA-{code_size} of {text}" for name, text in names.items()}
    return {"untrained": "untrained, mean image"} | trained | pca


def plot_cross(numbers: dict, names: dict[str, str], code_size: int, path: Path) -> None:
    """Test MSE of every method (row) on every set (column)."""
    rows = row_names(names, code_size)
    mse = np.array([[numbers[row][name]["mse"] for name in names] for row in rows])
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    image = axes.imshow(mse, cmap="viridis_r", norm=LogNorm(), aspect="auto")
    for place, row in enumerate(rows):
        for column, name in enumerate(names):
            own = numbers[row][name]
            dark = image.norm(own["mse"]) > 0.5
            text = f"{own['mse']:.5f}\n{own['psnr']:.1f} dB"
            color = "white" if dark else "black"
            axes.text(column, place, text, ha="center", va="center", color=color, fontsize=11)
    axes.set_yticks(range(len(rows)), rows.values())
    axes.set_xticks(range(len(names)), [f"on {text}" for text in names.values()])
    x, y = names
    across, back = (numbers[f"trained_on_{one}"][to]["mse"] for one, to in ((x, y), (y, x)))
    result = f"{names[y]} to {names[x]} {back:.4f}, {names[x]} to {names[y]} {across:.4f}"
    figure.suptitle(f"Test MSE: {result}")
    figure.colorbar(image, label="test MSE, pixels in [0, 1]")
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True})
    plt.close(figure)


def plot_reconstructions(
    shown: dict[str, dict[str, Tensor]], numbers: dict, names: dict[str, str], path: Path
) -> None:
    """By set: originals (12, 3, 32, 32), the best, median and worst four, and reconstructions."""
    figure = plt.figure(figsize=(7, 5.6), layout="constrained")
    both = " and ".join(names.values())
    figure.suptitle(f"{both}: test images by error of the set's own autoencoder")
    for part, (name, rows) in zip(figure.subfigures(2, 1), shown.items(), strict=True):
        panels = part.subplots(len(rows), 1)
        for axes, (row, x) in zip(panels, rows.items(), strict=True):
            label = "original"
            if row != "original":
                kind, _, of = row.rpartition("_of_" if "_of_" in row else "_on_")
                kind = "PCA" if kind == "pca" else "autoencoder"
                label = f"{kind} of {names[of]}\nMSE {numbers[row][name]['mse']:.5f}"
            show_line(axes, x, label, gaps=(4, 8))
        for place, text in enumerate(("best", "median", "worst")):
            title = f"{names[name]}: {text}"
            panels[0].text(
                (2 * place + 1) / 6,
                1.12,
                title,
                ha="center",
                fontsize=10,
                transform=panels[0].transAxes,
            )
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True})
    plt.close(figure)


def best_median_worst(errors: Tensor) -> Tensor:
    """Numbers (12,) of the images with the four least, middle and largest errors (N,)."""
    ranked, middle = errors.argsort(), len(errors) // 2
    return torch.cat((ranked[:4], ranked[middle - 2 : middle + 2], ranked[-4:]))


def plot_generated(
    clean: Tensor, generated: dict[float, Tensor], numbers: dict, dataset: str, path: Path
) -> None:
    """Test images (N, 3, H, W) and below them those generated from each, by noise level."""
    accuracy = numbers["judge_accuracy_on_clean_images"]
    lines = {f"test images\naccuracy {accuracy:.1%}": clean}
    for level, x in generated.items():
        own = numbers["by_noise_level"][f"{level:g}"]
        label = f"noise {level:g} sd\nMSE {own['mse_to_clean']:.4f}"
        lines[f"{label}\naccuracy {own['judge_accuracy']:.1%}"] = x
    title = f"{dataset}: test images' codes with noise, decoded; accuracy of an outside classifier"
    plot_pictures(lines, title, path)


def show_line(axes: plt.Axes, x: Tensor, label: str, gaps: tuple[int, ...] = ()) -> None:
    """Images (N, 3, H, W) side by side; a wider white space before those at `gaps`."""
    tiles = []
    for place, image in enumerate(x):
        width = 12 if place in gaps else 2
        if place:
            tiles.append(np.ones((image.shape[1], width, 3)))
        tiles.append(image.permute(1, 2, 0).numpy())
    axes.imshow(np.concatenate(tiles, 1), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")


def plot_pictures(lines: dict[str, Tensor], title: str, path: Path) -> None:
    """A labelled line of images (N, 3, H, W) for each entry."""
    figure, panels = plt.subplots(
        len(lines), 1, figsize=(7, 0.55 * len(lines) + 0.5), layout="constrained"
    )
    for axes, (label, x) in zip(panels, lines.items(), strict=True):
        show_line(axes, x, label)
    figure.suptitle(title)
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True})
    plt.close(figure)


def plot_classifier(numbers: dict, dataset: str, path: Path) -> None:
    """Validation loss and accuracy per epoch by fraction of labels and start, sd as a band."""
    styles = {
        "random": ("random encoder", BASELINE, "-"),
        "frozen": ("pretrained, frozen", METHOD, "--"),
        "fine_tuned": ("pretrained, fine-tuned", METHOD, "-"),
    }
    figure, grid = plt.subplots(
        2, len(numbers), sharex="col", squeeze=False, figsize=(8, 5), layout="constrained"
    )
    for column, (fraction, own) in enumerate(numbers.items()):
        for start, (label, color, line) in styles.items():
            for axes, key, factor in (
                (grid[0, column], "val_loss", 1),
                (grid[1, column], "val_accuracy", 100),
            ):
                average, sd = (factor * np.array(own[start][key][part]) for part in ("mean", "sd"))
                epochs = np.arange(1, len(average) + 1)
                axes.plot(epochs, average, line, color=color, marker=".", label=label)
                axes.fill_between(
                    epochs, average - sd, average + sd, color=color, alpha=0.2, linewidth=0
                )
        grid[0, column].set_title(f"{float(fraction):.0%}: {own['labels']:,} labels")
        grid[1, column].set_xlabel("epoch")
        grid[1, column].xaxis.get_major_locator().set_params(integer=True)
    grid[0, 0].set_ylabel("validation loss (nats)")
    grid[1, 0].set_ylabel("validation accuracy (%)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    last = list(numbers.values())[-1]
    first = [100 * last[s]["val_accuracy"]["mean"][0] for s in ("fine_tuned", "random")]
    title = (
        "{}, mean and sd over seeds: {:.1f}% pretrained, {:.1f}% random after one epoch, all labels"
    )
    figure.suptitle(title.format(dataset, *first))
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True})
    plt.close(figure)
