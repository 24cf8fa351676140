"""The pictures of a run: each function turns arrays into one PNG."""

from pathlib import Path

import matplotlib

matplotlib.rcdefaults()  # not the user's own, which may ask for LaTeX
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from PIL import Image
from torch import Tensor

plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})
TRAIN, VALIDATION, BASELINE, METHOD = "tab:blue", "tab:orange", "tab:gray", "tab:green"


def save_figure(figure: plt.Figure, path: Path) -> None:
    """A PNG of at most 256 colours, which takes half the space."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def plot_curves(
    history: dict[str, list[dict]],
    pca: dict[str, float],
    numbers: dict,
    names: dict[str, str],
    path: Path,
) -> None:
    """MSE of each set's autoencoder over its epochs, and PCA's on the validation images."""
    size = (1 + 4 * len(history), 3.6)
    figure, panels = plt.subplots(
        1, len(history), figsize=size, layout="constrained", squeeze=False
    )
    for axes, (name, rows) in zip(panels[0], history.items(), strict=True):
        epochs = [row["epoch"] for row in rows]
        for key, color, label in (
            ("train_loss", TRAIN, "train"),
            ("val_loss", VALIDATION, "validation"),
        ):
            axes.plot(epochs, [row[key] for row in rows], ".-", color=color, label=label)
        axes.axhline(pca[name], color=BASELINE, linestyle="--", label="PCA, validation")
        axes.set(yscale="log", xlabel="epoch", ylabel="MSE, pixels in [0, 1]")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        own, other = (numbers[f"{row}_{name}"][name]["mse"] for row in ("trained_on", "pca_of"))
        axes.set_title(f"{names[name]}: test MSE {own:.5f}, PCA {other:.5f}")
        axes.legend()
    save_figure(figure, path)


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
    save_figure(figure, path)


def plot_reconstructions(
    shown: dict[str, dict[str, Tensor]], numbers: dict, names: dict[str, str], path: Path
) -> None:
    """By set: originals (N, 3, 32, 32), of twelve the best, median and worst four, and what each
    method makes of them.
    """
    figure = plt.figure(figsize=(7, 0.6 + 2.5 * len(shown)), layout="constrained")
    both = " and ".join(names.values())
    figure.suptitle(f"{both}: test images by error of the set's own autoencoder")
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, (name, rows) in zip(parts, shown.items(), strict=True):
        panels = part.subplots(len(rows), 1, squeeze=False)[:, 0]
        for axes, (row, x) in zip(panels, rows.items(), strict=True):
            gaps = (4, 8) if len(x) == 12 else ()
            show_line(axes, x, method_label(row, name, numbers, names), gaps)
        if len(rows["original"]) == 12:
            options = {"ha": "center", "fontsize": 10, "transform": panels[0].transAxes}
            for place, text in enumerate(("best", "median", "worst")):
                panels[0].text((2 * place + 1) / 6, 1.12, f"{names[name]}: {text}", **options)
    save_figure(figure, path)


def method_label(row: str, name: str, numbers: dict, names: dict[str, str]) -> str:
    if row == "original":
        return row
    kind, _, of = row.rpartition("_of_" if "_of_" in row else "_on_")
    kind = "PCA" if kind == "pca" else "autoencoder"
    return f"{kind} of {names[of]}\nMSE {numbers[row][name]['mse']:.5f}"


def plot_noise(
    clean: Tensor,
    generated: dict[str, dict[float, Tensor]],
    numbers: dict,
    dataset: str,
    path: Path,
) -> None:
    """Test images (N, 3, H, W) and those decoded from their codes with noise, by kind and level."""
    lines = {new_label("test images", numbers["test_images"]): clean}
    for kind, levels in generated.items():
        for level, x in levels.items():
            if level > 0:
                label = f"{kind} noise, {level:g} sd"
                lines[new_label(label, numbers[kind][f"{level:g}"])] = x
    title = f"{dataset}: test images' codes with noise, decoded"
    if "judge_accuracy" in numbers["test_images"]:
        title += "; accuracy of an outside classifier"
    plot_lines(lines, title, path)


def new_label(text: str, numbers: dict) -> str:
    accuracy = numbers.get("judge_accuracy")
    return text if accuracy is None else f"{text}\naccuracy {accuracy:.1%}"


def plot_new(new: Tensor, copies: Tensor, numbers: dict, dataset: str, path: Path) -> None:
    """New images (N, 3, H, W) and the training image that is nearest to each."""
    own, test = numbers["local"]["1"], numbers["test_images"]
    lines = {new_label("new images", own): new, "nearest\ntraining image": copies}
    title = f"{dataset}: 1 sd of local noise on test images' codes; root mean square to the\n"
    far = (
        f"nearest training image {own['to_nearest']:.3f} (of test images {test['to_nearest']:.3f})"
    )
    plot_lines(lines, f"{title}{far}, pixels in [0, 1]", path)


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


def plot_lines(lines: dict[str, Tensor], title: str, path: Path) -> None:
    """A labelled line of images (N, 3, H, W) for each entry."""
    size = (7, 0.6 * len(lines) + 0.5 + 0.2 * title.count("\n"))
    figure, panels = plt.subplots(len(lines), 1, figsize=size, layout="constrained", squeeze=False)
    for axes, (label, x) in zip(panels[:, 0], lines.items(), strict=True):
        show_line(axes, x, label)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_classifier(numbers: dict, dataset: str, path: Path) -> None:
    """Validation accuracy per epoch by number of labels and start of the encoder, sd as a band."""
    styles = {
        "random": ("random encoder", BASELINE, "-"),
        "plain": ("encoder of the autoencoder", METHOD, "-"),
        "masked": ("encoder of one that fills in patches", METHOD, "--"),
    }
    size = (max(8, 1 + 2.3 * len(numbers)), 3.4)
    figure, panels = plt.subplots(
        1, len(numbers), squeeze=False, figsize=size, layout="constrained"
    )
    for axes, (count, own) in zip(panels[0], numbers.items(), strict=True):
        for start, (label, color, line) in styles.items():
            curve = own[start]["val_accuracy"]
            average, sd = (100 * np.array(curve[part]) for part in ("mean", "sd"))
            epochs = np.arange(1, len(average) + 1)
            axes.plot(epochs, average, line, color=color, marker=".", label=label)
            axes.fill_between(
                epochs, average - sd, average + sd, color=color, alpha=0.2, linewidth=0
            )
        axes.set_title(f"{int(count):,} labels")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panels[0, 0].set_ylabel("validation accuracy (%)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"{dataset}: classifiers by start, all weights learn; mean and sd over seeds")
    save_figure(figure, path)


def plot_probes(numbers: dict, dataset: str, path: Path) -> None:
    """Test accuracy of two simple classifiers on codes, by encoder and number of labels."""
    names = {
        "pixels": ("pixels", BASELINE, "-"),
        "pca": ("PCA", BASELINE, "--"),
        "untrained": ("untrained encoder", BASELINE, ":"),
        "plain": ("autoencoder", METHOD, "-"),
        "masked": ("autoencoder, hidden patches", METHOD, "--"),
        "of_y": ("autoencoder of the other set", METHOD, ":"),
    }
    kinds = {"linear": "logistic regression", "neighbours": "nearest neighbours"}
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(8, 3.8), layout="constrained")
    for axes, (kind, title) in zip(panels, kinds.items(), strict=True):
        for name, (label, color, line) in names.items():
            counts = [int(count) for count in numbers[name]]
            scores = [100 * own[kind]["mean"] for own in numbers[name].values()]
            axes.plot(counts, scores, line, color=color, marker=".", label=label)
        axes.set(xscale="log", xlabel="labels", title=title)
    panels[0].set_ylabel("test accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"{dataset}: classifiers on codes that stay as they are, mean over seeds")
    save_figure(figure, path)


def best_median_worst(errors: Tensor, x: Tensor) -> Tensor:
    """Numbers of up to twelve images: the four with the least, middle and largest errors (N,).

    Of the quarter with most differences between neighbouring pixels alone: flat images have least
    error, and show nothing.
    """
    texture = x.float().diff(dim=3).abs().mean((1, 2, 3)).cpu()
    rich = (texture >= texture.quantile(0.75)).nonzero()[:, 0]
    ranked, middle = rich[errors[rich].argsort()], len(rich) // 2
    if len(ranked) < 12:
        return ranked
    return torch.cat((ranked[:4], ranked[middle - 2 : middle + 2], ranked[-4:]))


def one_of_each_class(x: Tensor, y: Tensor, classes: int, columns: int = 12) -> Tensor:
    """Up to `columns` images of x (N, 3, H, W), of as many classes y (N,) as there are."""
    members = [(y == label).nonzero()[:, 0] for label in range(classes)]
    order = [int(own[turn]) for turn in range(columns) for own in members if len(own) > turn]
    return x[torch.tensor(order[:columns])]
