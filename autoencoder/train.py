"""A convolutional autoencoder on image sets X and Y, compared with PCA with as many components.

Four questions: how well does it reconstruct, does one trained on X reconstruct Y, does its
encoder help a classifier, and are decoded new codes new images of a class?

Run it with `python autoencoder/train.py`, or `python autoencoder/train.py --code_size 64`.
"""

import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from run import (
    Batch,
    Count,
    Epochs,
    Rate,
    Seed,
    Share,
    Width,
    epochs,
    finish_run,
    open_run,
    read_rows,
    run_main,
    save,
    seed_everything,
    start_run,
    sum_losses,
    try_plot,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    DataError,
    Images,
    Pair,
    Set,
    batches,
    load,
    mean_image,
    outputs_of,
    scaled,
    shuffled_batches,
)
from model import (
    Autoencoder,
    Muon,
    Pca,
    decode_bytes,
    fit_pca,
    hide,
    image_errors,
    in_bfloat16,
    nearest_image,
    new_schedule,
    path_between,
    psnr,
)
from plots import (
    best_median_worst,
    one_of_each_class,
    plot_classifier,
    plot_cross,
    plot_curves,
    plot_lines,
    plot_new,
    plot_noise,
    plot_probes,
    plot_reconstructions,
)
from studies import STARTS, add_generated, compare_starts, generate, probe_all, train_judge

KEPT_CODES = 5000  # of training images, in model.pt, to make new images from


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["digits_photographs", "mnist_cifar100", "mnist_folder", "folder"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    bundled_images: Annotated[int, ">= 100", "<= 1000000"]
    precision: Literal["auto", "float32", "bfloat16"]
    widths: tuple[Width, ...]
    code_size: Annotated[int, ">= 1", "<= 3072"]
    epochs_x: Epochs
    epochs_y: Epochs
    batch_size: Batch
    lr: Rate
    bias_lr: Rate
    warm_up: Annotated[float, ">= 0", "< 1"]
    shift: Annotated[int, ">= 0", "<= 8"]
    compare: bool
    masked_epochs: Epochs
    hidden_share: Share
    label_counts: tuple[Count, ...]
    classifier_epochs: tuple[Epochs, ...]
    classifier_batch_size: Batch
    random_lr: Rate
    plain_lr: Rate
    masked_lr: Rate
    seeds: tuple[Seed, ...]
    judge_epochs: Epochs
    judge_lr: Rate
    judge_shift: Annotated[int, ">= 0", "<= 8"]
    noise_levels: tuple[Annotated[float, ">= 0", "<= 1"], ...]
    added_noise: Annotated[float, ">= 0", "<= 1"]
    added_labels: tuple[Count, ...]
    added_copies: Annotated[int, ">= 1", "<= 1000"]
    added_epochs: Epochs

    def __post_init__(self) -> None:
        if len(self.widths) > 5:
            raise ValueError(f"widths: expected at most 5, found {len(self.widths)}")
        if list(self.label_counts) != sorted(set(self.label_counts)):
            raise ValueError(f"label_counts: expected rising numbers, found {self.label_counts}")
        if len(self.classifier_epochs) != len(self.label_counts):
            wanted = f"as many as label_counts ({len(self.label_counts)})"
            found = len(self.classifier_epochs)
            raise ValueError(f"classifier_epochs: expected {wanted}, found {found}")


Reconstruct = Callable[[Tensor], Tensor]


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    pair = load_pair(config, device)
    dataset = f"{pair.x.name} and {pair.y.name}" if config.compare else pair.x.name
    sets = {"x": pair.x, "y": pair.y} if config.compare else {"x": pair.x}
    open_run(run, config, dataset, *sets.values())
    models = train_autoencoders(sets, config, run)

    methods = reconstructions(sets, models, config)
    errors = {
        row: {name: errors_of(columns[name], sets[name].test).cpu() for name in columns}
        for row, columns in methods.items()
    }
    metrics = {"reconstruction": summarise(errors)}
    judge = None
    if config.compare:
        metrics["classifier"] = compare_starts(pair.x, models, config, run)
        metrics["probes"] = probe_all(pair.x, encoders(models, methods), config)
        judge = train_judge(pair.x, config, run)
        metrics["added"] = add_generated(pair.x, models["x"], config, run)
    metrics["generation"], generated = generate(pair.x, models["x"], judge, config)
    metrics["parameters"] = sum(part.numel() for part in models["x"].parameters())
    plot_results(sets, models, methods, errors, metrics, generated, config, run)
    save_model(models["x"], methods["pca_of_x"]["x"], pair.x, config, run)
    finish_run(
        run,
        config,
        dataset=dataset,
        headline=headline(metrics, config),
        metrics=metrics,
        use=f"python autoencoder/predict.py {shlex.quote(str(run))} PICTURE...",
    )


def load_pair(config: Config, device: torch.device) -> Pair:
    """The data on the device. Raises DataError if there are fewer images than the settings ask."""
    pair = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        bundled_images=config.bundled_images,
        seed=config.seed,
    )
    for images in (pair.x, pair.y) if config.compare else (pair.x,):
        wanted = {"code_size": config.code_size}  # as many components of PCA
        if images is pair.x and config.compare:
            wanted["label_counts"] = config.label_counts[-1]
            wanted["added_labels"] = max(config.added_labels)
        there = len(images.train.x)
        for key, count in wanted.items():
            if count > there:
                most = f"at most {there}, the training images of {images.name}"
                raise DataError(f"{key}: expected {most}, found {count}")
    print(pair.note)
    return pair.to(device)


# --- training ---------------------------------------------------------------------------------


def train_autoencoders(sets: dict[str, Set], config: Config, run: Path) -> dict[str, Autoencoder]:
    """An autoencoder of each set and, to compare encoders, one of X from which patches were hidden
    in training.
    """
    counts = {"x": config.epochs_x, "y": config.epochs_y}
    models = {
        name: train_autoencoder(images, name, counts[name], 0.0, config, run)
        for name, images in sets.items()
    }
    if config.compare:
        count, share = config.masked_epochs, config.hidden_share
        models["masked"] = train_autoencoder(sets["x"], "masked", count, share, config, run)
    return models


def train_autoencoder(
    images: Set, name: str, count: int, hidden: float, config: Config, run: Path
) -> Autoencoder:
    """With the weights of the least validation error, or the last if patches are `hidden`."""
    model = new_autoencoder(images, config)
    steps = count * math.ceil(len(images.train.x) / config.batch_size)
    optimizers = new_optimizers(model, steps, config)
    best = ("val_loss", min) if hidden == 0 else None
    parts, stage = {"model": model} | optimizers, f"autoencoder-{name}"
    for row in epochs(run, stage, parts, count, config.seed, best=best):
        began, label = time.perf_counter(), f"{stage} epoch {row['epoch']}"
        row["train_loss"] = train_one_epoch(model, images, hidden, optimizers, label, config)
        row["train_seconds"] = time.perf_counter() - began
        row["val_loss"] = float(errors_of(model, images.val).mean())
    return model.eval()


def new_autoencoder(images: Set, config: Config) -> Autoencoder:
    """An untrained one with the mean of the training images; always the same weights."""
    seed_everything(config.seed, "autoencoder")
    model = Autoencoder(config.widths, config.code_size, mean_image(images.train))
    return model.to(images.train.x.device, memory_format=torch.channels_last)


def new_optimizers(model: nn.Module, steps: int, config: Config) -> dict:
    """Muon for matrices and kernels, Adam for biases, and the cycle of both rates."""
    half = in_bfloat16(config.precision, config.device)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    biases = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizers = {
        "muon": Muon(matrices, config.lr, torch.bfloat16 if half else torch.float32),
        "adam": torch.optim.Adam(biases, config.bias_lr),
    }
    schedules = {
        f"{name}_schedule": new_schedule(optimizer, steps, config.warm_up)
        for name, optimizer in optimizers.items()
    }
    return optimizers | schedules


def train_one_epoch(
    model: Autoencoder, images: Set, hidden: float, optimizers: dict, label: str, config: Config
) -> float:
    """Mean squared error over the images, the share `hidden` of whose patches the model does not
    see. Raises FloatingPointError if a loss was not finite.
    """
    model.train()
    half, losses = in_bfloat16(config.precision, config.device), []
    moves = {"mirror": images.mirror, "shift": config.shift if images.mirror else 0}
    drawn = shuffled_batches(images.train, config.batch_size, **moves)
    for x, _ in tqdm(drawn, label, leave=False, disable=None):
        seen = hide(x, model.encoder.mean, hidden) if hidden else x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            output = model(seen)
        loss = F.mse_loss(output.float(), x)
        model.zero_grad()
        loss.backward()
        for part in optimizers.values():  # both optimizers, then their schedules
            part.step()
        losses.append(loss.detach() * len(x))
    model.eval()
    return float(sum_losses(losses, label)) / len(images.train.x)


# --- reconstruction ---------------------------------------------------------------------------


def reconstructions(
    sets: dict[str, Set], models: dict[str, Autoencoder], config: Config
) -> dict[str, dict[str, Reconstruct]]:
    """What maps images to reconstructions, by method and by the set whose images it is given."""
    rows = {"untrained": {name: new_autoencoder(sets[name], config) for name in sets}}
    rows |= {f"trained_on_{name}": dict.fromkeys(sets, models[name]) for name in sets}
    for name, images in sets.items():
        pca = fit_pca(scaled(images.train.x), config.code_size)
        rows[f"pca_of_{name}"] = dict.fromkeys(sets, pca)
    return rows


def encoders(models: dict[str, Autoencoder], methods: dict) -> dict[str, Callable]:
    """What maps images of X to codes, or to the numbers that stand for codes."""
    return {
        "pixels": lambda x: x.mean(1).flatten(1),
        "pca": methods["pca_of_x"]["x"].encode,
        "untrained": methods["untrained"]["x"].encoder,
        "plain": models["x"].encoder,
        "masked": models["masked"].encoder,
        "of_y": models["y"].encoder,
    }


@torch.no_grad()
def errors_of(reconstruct: Reconstruct, images: Images) -> Tensor:
    """Each image's mean squared error (N,)."""
    return torch.cat([image_errors(reconstruct(x), x) for x, _ in batches(images)])


def summarise(errors: dict[str, dict[str, Tensor]]) -> dict:
    """MSE over all images, pixels and channels and its PSNR, from each image's error (N,)."""
    numbers = {}
    for row, columns in errors.items():
        mse = {name: float(values.mean()) for name, values in columns.items()}
        numbers[row] = {name: {"mse": x, "psnr": psnr(x)} for name, x in mse.items()}
    return numbers


# --- report -----------------------------------------------------------------------------------


def save_model(autoencoder: Autoencoder, pca: Pca, images: Set, config: Config, run: Path) -> None:
    """model.pt: all that predict.py needs."""
    some = Images(*(part[:KEPT_CODES] for part in images.train))
    description = {
        "project": "autoencoder",
        "widths": list(config.widths),
        "code_size": config.code_size,
        "classes": list(images.classes),
        "weights": autoencoder.state_dict(),
        "pca_mean": pca.mean,
        "pca_components": pca.components,
        "codes": outputs_of(autoencoder.encoder, some),
        "code_classes": some.y,
    }
    save(run / "model.pt", description)


def headline(metrics: dict, config: Config) -> dict[str, float]:
    """Accuracies are of test images; few labels are the second of label_counts."""
    mse = metrics["reconstruction"]
    numbers = {"mse_x": mse["trained_on_x"]["x"]["mse"], "pca_mse_x": mse["pca_of_x"]["x"]["mse"]}
    if not config.compare:
        return numbers
    numbers |= {"mse_y": mse["trained_on_y"]["y"]["mse"], "pca_mse_y": mse["pca_of_y"]["y"]["mse"]}
    numbers["cross_mse_x_to_y"] = mse["trained_on_x"]["y"]["mse"]
    numbers["cross_mse_y_to_x"] = mse["trained_on_y"]["x"]["mse"]
    few = metrics["classifier"][str(config.label_counts[:2][-1])]
    for start in STARTS:
        numbers[f"{start}_accuracy"] = few[start]["test_accuracy"]["mean"]
    judged = metrics["generation"]
    numbers["judge_accuracy"] = judged["test_images"]["judge_accuracy"]
    return numbers | {"new_image_accuracy": judged["local"]["1"]["judge_accuracy"]}


@torch.no_grad()
def plot_results(
    sets: dict[str, Set],
    models: dict[str, Autoencoder],
    methods: dict[str, dict[str, Reconstruct]],
    errors: dict[str, dict[str, Tensor]],
    metrics: dict,
    generated: dict[str, dict[float, Images]],
    config: Config,
    run: Path,
) -> None:
    names = {name: images.name.replace("$", r"\$") for name, images in sets.items()}
    sets = {name: images._replace(name=names[name]) for name, images in sets.items()}
    numbers, x = metrics["reconstruction"], sets["x"]
    history = {name: read_rows(run, f"autoencoder-{name}") for name in sets}
    pca = {
        name: float(errors_of(methods[f"pca_of_{name}"][name], images.val).mean())
        for name, images in sets.items()
    }
    try_plot(plot_curves, history, pca, numbers, names, run / "curves.png")
    shown = {name: shown_examples(name, sets, methods, errors) for name in sets}
    try_plot(plot_reconstructions, shown, numbers, names, run / "reconstructions.png")
    plot_generated(x, models["x"], generated, metrics["generation"], run)
    if config.compare:
        try_plot(plot_cross, numbers, names, config.code_size, run / "cross.png")
        try_plot(plot_classifier, metrics["classifier"], x.name, run / "classifier.png")
        try_plot(plot_probes, metrics["probes"], x.name, run / "probes.png")


def shown_examples(
    name: str,
    sets: dict[str, Set],
    methods: dict[str, dict[str, Reconstruct]],
    errors: dict[str, dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Test images of a set and each method's reconstructions."""
    chosen = best_median_worst(errors[f"trained_on_{name}"][name], sets[name].test.x)
    x = scaled(sets[name].test.x[chosen.to(sets[name].test.x.device)])
    rows = [row for row in methods if row.startswith("trained_on") or row == f"pca_of_{name}"]
    outputs = {row: methods[row][name](x).clamp(0, 1).cpu() for row in rows}
    return {"original": x.cpu()} | outputs


def plot_generated(
    images: Set,
    autoencoder: Autoencoder,
    generated: dict[str, dict[float, Images]],
    numbers: dict,
    run: Path,
) -> None:
    lines = {
        kind: {n: scaled(new.x[:12]).cpu() for n, new in levels.items()}
        for kind, levels in generated.items()
    }
    some = scaled(images.test.x[:12]).cpu()
    try_plot(plot_noise, some, lines, numbers, images.name, run / "noise.png")
    new = one_of_each_class(*generated["local"][1.0], len(images.classes))
    _, which = nearest_image(new, images.train.x)
    copies = scaled(images.train.x[which]).cpu()
    try_plot(plot_new, scaled(new).cpu(), copies, numbers, images.name, run / "new.png")
    title = f"{images.name}: from one test image to another through their codes"
    try_plot(plot_lines, paths(images, autoencoder), title, run / "interpolation.png")


def paths(images: Set, autoencoder: Autoencoder, count: int = 12) -> dict[str, Tensor]:
    """Images between two pairs of test images, on a straight line and where codes are dense."""
    codes, lines = outputs_of(autoencoder.encoder, images.train)[:KEPT_CODES], {}
    for pair in range(min(2, len(images.test.x) // 2)):
        two = Images(*(part[2 * pair : 2 * pair + 2] for part in images.test))
        ends = outputs_of(autoencoder.encoder, two)
        share = torch.linspace(0, 1, count).to(ends)[:, None]
        ways = {"straight line": torch.lerp(ends[0], ends[1], share)}
        ways["where codes are dense"] = path_between(codes, ends, count)
        for way, between in ways.items():
            lines[f"{way}, {pair + 1}"] = scaled(decode_bytes(autoencoder, between)).cpu()
    return lines


if __name__ == "__main__":
    run_main(main, DataError)
