"""A convolutional autoencoder on two image sets X and Y, beside PCA with as many components.

Four questions: how well does it reconstruct, does one trained on X reconstruct Y, does its encoder
help a classifier, and are decoded noisy codes new images that keep the class?

Run it with `python autoencoder/train.py`, or `python autoencoder/train.py --code_size 64`.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import DataError, Images, Pair, Set, as_float, batches, choose, load, mean_image, shuffled
from model import (
    Autoencoder,
    Classifier,
    Encoder,
    Muon,
    Pca,
    catch_up,
    compare_starts,
    gain_of,
    image_errors,
    one_cycle,
    summarise,
)
from plots import (
    best_median_worst,
    plot_classifier,
    plot_cross,
    plot_curves,
    plot_generated,
    plot_pictures,
    plot_reconstructions,
)
from run import finish_run, load_checkpoint, save, save_checkpoint, seed_everything, start_run

STARTS = ("random", "frozen", "fine_tuned")
CHUNK = 500  # images at a time where nothing is trained


@dataclass(frozen=True)
class Config:
    """Names and types; values and their comments stand in config.yaml."""

    dataset: Literal["auto", "mnist_cifar100", "mnist_folder", "digits_photographs"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: int
    folder_dir: Path
    bundled_images: int
    precision: Literal["auto", "float32", "bfloat16"]
    widths: tuple[int, ...]
    code_size: int
    epochs_x: int
    epochs_y: int
    batch_size: int
    lr: float
    bias_lr: float
    warm_up: float
    fractions: tuple[float, ...]
    classifier_epochs: tuple[int, ...]
    classifier_batch_size: int
    random_lr: float
    frozen_lr: float
    fine_tuned_lr: float
    seeds: tuple[int, ...]
    noise_levels: tuple[float, ...]
    added_noise: float
    added_copies: int
    added_epochs: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(numbers[0], (str, Path)):
                continue
            zero_too = name in ("seed", "seeds", "warm_up", "noise_levels", "added_noise")
            if zero_too and min(numbers) < 0:
                raise ValueError(f"{name}: expected at least 0, found {min(numbers)}")
            if not zero_too and not min(numbers) > 0:
                raise ValueError(f"{name}: expected more than 0, found {min(numbers)}")
        if len(self.widths) > 5:
            raise ValueError(f"widths: expected at most 5, found {len(self.widths)}")
        if self.warm_up >= 1:
            raise ValueError(f"warm_up: expected less than 1, found {self.warm_up}")
        if max(self.fractions) > 1:
            raise ValueError(f"fractions: expected at most 1, found {max(self.fractions)}")
        if list(self.fractions) != sorted(set(self.fractions)):
            raise ValueError(f"fractions: expected rising numbers, found {self.fractions}")
        if len(self.classifier_epochs) != len(self.fractions):
            wanted = f"as many as fractions ({len(self.fractions)})"
            found = len(self.classifier_epochs)
            raise ValueError(f"classifier_epochs: expected {wanted}, found {found}")


class Stage(NamedTuple):
    """What `fit` needs to know: the same loop trains autoencoders and classifiers."""

    name: str
    order: str  # seeds the order of the images: stages to be compared share it
    epochs: int
    steps: int  # per epoch
    optimizers: dict[str, torch.optim.Optimizer]
    rate: Callable[[int], float]  # factor of the rates at a step of the stage
    draw: Callable[[], Iterator[tuple[Tensor, Tensor]]]  # the training batches of one epoch
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]  # of the output, x and y
    evaluate: Callable[[nn.Module], dict]
    keep: bool  # whether the weights are kept in a file


Reconstruct = Callable[[Tensor], Tensor]


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    pair = load_pair(config, device)
    sets = {"x": pair.x, "y": pair.y}
    models, history = {}, {}
    for name, images in sets.items():
        models[name], history[name] = train_autoencoder(images, name, config, run)

    rows = methods(sets, models, config)
    errors = {
        row: {name: errors_of(rows[row][name], sets[name].test).cpu() for name in sets}
        for row in rows
    }
    metrics = {"reconstruction": summarise(errors)}
    metrics["classifier"], judge, seconds = study(pair.x, models["x"], config, run)
    generated, metrics["generation"] = generate(pair.x, models["x"], judge, config)
    metrics["added"] = add_generated(pair.x, models["x"], config, run)
    metrics["parameters"] = sum(part.numel() for part in models["x"].parameters())
    metrics["timing"] = {
        "classifier": seconds,
        "autoencoder_seconds": {name: sum(r["seconds"] for r in history[name]) for name in sets},
        "data_share": data_share(pair.y, history["y"], config),
    }
    draw(sets, models, rows, errors, history, metrics, generated, config, run)
    dataset = f"{pair.x.name} and {pair.y.name}"
    finish_run(run, config, dataset=dataset, headline=headline(metrics, config), metrics=metrics)


def load_pair(config: Config, device: torch.device) -> Pair:
    """The data on the device. Raises DataError if there are too few images for PCA."""
    pair = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        folder_dir=config.folder_dir,
        bundled_images=config.bundled_images,
        seed=config.seed,
    )
    for images in (pair.x, pair.y):
        if len(images.train.x) < config.code_size:
            count = f"{len(images.train.x)} images of {images.name} to train on"
            raise DataError(f"code_size: PCA needs as many images, there are {count}")
    print(pair.note)
    return pair.to(device)


# --- training ---------------------------------------------------------------------------------


def fit(model: nn.Module, stage: Stage, config: Config, run: Path, seed: int) -> list[dict]:
    """A row per epoch; of a stage to keep, `model` gets the weights of the least validation loss.

    What a killed run has done of the stage is not done again.
    """
    parts = {"model": model} | stage.optimizers
    schedules = {
        f"{name}_schedule": torch.optim.lr_scheduler.LambdaLR(optimizer, stage.rate)
        for name, optimizer in stage.optimizers.items()
    }
    parts |= schedules
    history = load_checkpoint(run, stage.name, parts)
    rows = [row for row in history if row["stage"] == stage.name]

    def step(loss: Tensor) -> None:
        for optimizer in stage.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        for part in (*stage.optimizers.values(), *schedules.values()):
            part.step()

    for epoch in range(len(rows) + 1, stage.epochs + 1):
        seed_everything(seed, stage.order, epoch)
        began = time.perf_counter()
        train_loss = train_one_epoch(model, stage, step, f"{stage.name} epoch {epoch}", config)
        row = {"stage": stage.name, "epoch": epoch, "seconds": time.perf_counter() - began}
        rows.append(row | {"train_loss": train_loss} | stage.evaluate(model))
        if stage.keep and rows[-1]["val_loss"] == min(earlier["val_loss"] for earlier in rows):
            save(run / f"{stage.name}.pt", model.state_dict())
        history.append(rows[-1])
        save_checkpoint(run, stage.name, parts, history)
        print("  ".join([stage.name, *(f"{n} {x:.4g}" for n, x in list(rows[-1].items())[1:])]))
    if stage.keep:
        best = torch.load(run / f"{stage.name}.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(best)
    return rows


def train_one_epoch(
    model: nn.Module, stage: Stage, step: Callable, label: str, config: Config
) -> float:
    """Mean loss per image. Raises FloatingPointError if a loss was not finite."""
    model.train()
    half, losses, images = use_bfloat16(config), [], 0
    for x, y in tqdm(stage.draw(), label, stage.steps, leave=False, disable=None):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            output = model(x)
        loss = stage.loss(output.float(), x, y)
        step(loss)
        losses.append(loss.detach() * len(x))
        images += len(x)
    losses = torch.stack(losses)  # read once per epoch: the loop never waits for the device
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).nonzero()[0]) + 1
        raise FloatingPointError(f"{label}: the loss is not finite at step {first}")
    return float(losses.sum()) / images


def use_bfloat16(config: Config) -> bool:
    """With `auto`, where the device multiplies in bfloat16 faster than in float32."""
    if config.precision == "auto":
        return config.device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return config.precision == "bfloat16"


def train_autoencoder(
    images: Set, name: str, config: Config, run: Path
) -> tuple[Autoencoder, list[dict]]:
    """An autoencoder of `images` and its rows of history.csv."""
    model = new_autoencoder(images, config)
    dtype = torch.bfloat16 if use_bfloat16(config) else torch.float32
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    biases = [weight for weight in model.parameters() if weight.ndim == 1]
    epochs = {"x": config.epochs_x, "y": config.epochs_y}[name]
    steps = math.ceil(len(images.train.x) / config.batch_size)
    stage = Stage(
        name=f"autoencoder-{name}",
        order=f"autoencoder-{name}",
        epochs=epochs,
        steps=steps,
        optimizers={
            "muon": Muon(matrices, config.lr, dtype),
            "adam": torch.optim.Adam(biases, config.bias_lr),
        },
        rate=partial(one_cycle, total=epochs * steps, warm_up=config.warm_up),
        draw=lambda: shuffled(images.train, config.batch_size, images.mirror),
        loss=lambda output, x, y: F.mse_loss(output, x),
        evaluate=lambda model: {"val_loss": float(errors_of(model, images.val).mean())},
        keep=True,
    )
    return model, fit(model, stage, config, run, config.seed)


def new_autoencoder(images: Set, config: Config) -> Autoencoder:
    """An untrained one that knows the mean of the training images; always the same weights."""
    seed_everything(config.seed, "autoencoder")
    model = Autoencoder(config.widths, config.code_size, mean_image(images.train))
    return model.to(images.train.x.device, memory_format=torch.channels_last)


# --- reconstruction ---------------------------------------------------------------------------


def methods(
    sets: dict[str, Set], models: dict[str, Autoencoder], config: Config
) -> dict[str, dict[str, Reconstruct]]:
    """What maps images to reconstructions, by method and by the set it is asked for."""
    untrained = {name: new_autoencoder(images, config) for name, images in sets.items()}
    rows = {"untrained": untrained}
    rows |= {f"trained_on_{name}": dict.fromkeys(sets, model) for name, model in models.items()}
    for name, images in sets.items():
        rows[f"pca_of_{name}"] = dict.fromkeys(
            sets, Pca(as_float(images.train.x), config.code_size)
        )
    return rows


@torch.no_grad()
def errors_of(reconstruct: Reconstruct, images: Images) -> Tensor:
    """Each image's mean squared error (N,)."""
    return torch.cat([image_errors(reconstruct(x), x) for x, _ in batches(images, CHUNK)])


# --- classification ---------------------------------------------------------------------------


def study(
    images: Set, autoencoder: Autoencoder, config: Config, run: Path
) -> tuple[dict, Classifier, dict]:
    """Validation curves by fraction of labels and start; a judge; seconds to catch up.

    The judge is the random start of the first seed with most labels: it never saw the autoencoder.
    """
    numbers, seconds, judge = {}, {}, None
    for fraction, epochs in zip(config.fractions, config.classifier_epochs, strict=True):
        rows = {start: [] for start in STARTS}
        for seed in config.seeds:
            labelled = choose(images.train, fraction, seed)
            for start in STARTS:
                name = f"{start}-{fraction:g}-seed{seed}"
                keep = (start, fraction, seed) == ("random", config.fractions[-1], config.seeds[0])
                classifier = new_classifier(images, autoencoder, start, labelled, config, seed)
                options = {"order": f"classifier-{fraction:g}", "epochs": epochs, "keep": keep}
                options |= {"name": name, "start": start}
                rows[start].append(
                    train_classifier(classifier, images, labelled, config, run, seed, **options)
                )
                judge = classifier if keep else judge
        numbers[f"{fraction:g}"] = {"labels": len(labelled.x)} | compare_starts(rows)
        seconds[f"{fraction:g}"] = catch_up(rows, "seconds")
    return numbers, judge, seconds


def new_classifier(
    images: Set, autoencoder: Autoencoder, start: str, labelled: Images, config: Config, seed: int
) -> Classifier:
    """With a copy of the autoencoder's encoder unless `start` is random; the head is the same."""
    seed_everything(seed, "classifier")
    encoder = Encoder(config.widths, config.code_size, autoencoder.encoder.mean.cpu())
    classifier = Classifier(encoder, len(images.classes))
    if start != "random":
        classifier.encoder.load_state_dict(autoencoder.encoder.state_dict())
    classifier.to(images.train.x.device, memory_format=torch.channels_last)
    classifier.standardise(apply(classifier.encoder, labelled))
    return classifier


@torch.no_grad()
def apply(part: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    return torch.cat([part(x) for x, _ in batches(images, CHUNK)])


def train_classifier(
    classifier: Classifier,
    images: Set,
    labelled: Images,
    config: Config,
    run: Path,
    seed: int,
    *,
    name: str,
    order: str,
    epochs: int,
    start: str = "random",
    keep: bool = False,
) -> list[dict]:
    """Rows of history.csv; a frozen encoder's features are computed once, for the head alone."""
    train, val, trained = labelled, images.val, classifier
    if start == "frozen":
        train, val = (Images(apply(classifier.features, part), part.y) for part in (train, val))
        trained = classifier.head
    size, lr = config.classifier_batch_size, getattr(config, f"{start}_lr")
    stage = Stage(
        name=name,
        order=order,
        epochs=epochs,
        steps=math.ceil(len(train.x) / size),
        optimizers={"adam": torch.optim.AdamW(trained.parameters(), lr)},
        rate=lambda step: 1.0,
        draw=lambda: shuffled(train, size, mirror=False),
        loss=lambda logits, x, y: F.cross_entropy(logits, y),
        evaluate=partial(evaluate_classes, images=val),
        keep=keep,
    )
    return fit(trained, stage, config, run, seed)


def evaluate_classes(model: nn.Module, images: Images) -> dict:
    """Cross-entropy in nats and accuracy, means over all images."""
    logits = apply(model, images).double()
    accuracy = (logits.argmax(1) == images.y).double().mean()
    loss = F.cross_entropy(logits, images.y)
    return {"val_loss": float(loss), "val_accuracy": float(accuracy)}


# --- generation -------------------------------------------------------------------------------


def code_deviations(autoencoder: Autoencoder, images: Images) -> Tensor:
    """Each code dimension's standard deviation (code_size,) over the images."""
    return apply(autoencoder.encoder, images).std(0)


def draw_new(autoencoder: Autoencoder, images: Images, deviation: Tensor) -> Tensor:
    """Generated images, uint8, one from each image, with noise of `deviation` (code_size,)."""
    decoded = apply(partial(autoencoder.vary, deviation=deviation), images)
    return (decoded.clamp(0, 1) * 255).round().byte()


def generate(
    images: Set, autoencoder: Autoencoder, judge: Classifier, config: Config
) -> tuple[dict[float, Tensor], dict]:
    """Generated test images by noise level; their MSE to the clean image, the judge's accuracy."""
    sd = code_deviations(autoencoder, images.train)
    clean = evaluate_classes(judge, images.test)["val_accuracy"]
    generated, numbers = {}, {"judge_accuracy_on_clean_images": clean, "by_noise_level": {}}
    for level in config.noise_levels:
        seed_everything(config.seed, "noise")
        x = draw_new(autoencoder, images.test, level * sd)
        generated[level] = x.cpu()
        numbers["by_noise_level"][f"{level:g}"] = {
            "mse_to_clean": float(image_errors(as_float(x), as_float(images.test.x)).mean()),
            "judge_accuracy": evaluate_classes(judge, Images(x, images.test.y))["val_accuracy"],
        }
    return generated, numbers


def add_generated(images: Set, autoencoder: Autoencoder, config: Config, run: Path) -> dict:
    """Test accuracy of a classifier of few labels, without and with generated images.

    Both start at random, and take as many steps: one sees the labelled images `added_copies` + 1
    times in an epoch, the other once, and `added_copies` generated from each.
    """
    sd = code_deviations(autoencoder, images.train)
    accuracy = {"without": [], "with": []}
    for seed in config.seeds:
        labelled = choose(images.train, config.fractions[0], seed)
        copies = [labelled.x]
        for copy in range(config.added_copies):
            seed_everything(seed, "copy", copy)
            copies.append(draw_new(autoencoder, labelled, config.added_noise * sd))
        y = labelled.y.repeat(len(copies))
        pools = {"without": labelled.x.repeat(len(copies), 1, 1, 1), "with": torch.cat(copies)}
        for kind, scores in accuracy.items():
            classifier = new_classifier(images, autoencoder, "random", labelled, config, seed)
            options = {"name": f"{kind}-generated-seed{seed}", "order": "added", "keep": True}
            pool, options["epochs"] = Images(pools[kind], y), config.added_epochs
            train_classifier(classifier, images, pool, config, run, seed, **options)
            scores.append(evaluate_classes(classifier, images.test)["val_accuracy"])
    gains = [more - less for more, less in zip(accuracy["with"], accuracy["without"], strict=True)]
    return {"test_accuracy": accuracy, "gain": gain_of(gains)}


# --- report -----------------------------------------------------------------------------------


def data_share(images: Set, rows: list[dict], config: Config) -> float:
    """Part of an epoch's seconds that goes into shuffling, mirroring and converting images."""
    began = time.perf_counter()
    for x, _ in shuffled(images.train, config.batch_size, images.mirror):
        x[0, 0, 0, 0].item()  # waits for the device
    return (time.perf_counter() - began) / median(row["seconds"] for row in rows)


def headline(metrics: dict, config: Config) -> dict[str, float]:
    """The pretrained start is the fine-tuned one; both first epochs are with all labels."""
    mse, classifier = metrics["reconstruction"], metrics["classifier"]
    most = classifier[f"{config.fractions[-1]:g}"]
    return {
        "mse_x": mse["trained_on_x"]["x"]["mse"],
        "mse_y": mse["trained_on_y"]["y"]["mse"],
        "pca_mse_x": mse["pca_of_x"]["x"]["mse"],
        "pca_mse_y": mse["pca_of_y"]["y"]["mse"],
        "cross_mse_x_to_y": mse["trained_on_x"]["y"]["mse"],
        "cross_mse_y_to_x": mse["trained_on_y"]["x"]["mse"],
        "pretrained_first_epoch_accuracy": most["fine_tuned"]["val_accuracy"]["mean"][0],
        "random_first_epoch_accuracy": most["random"]["val_accuracy"]["mean"][0],
    }


@torch.no_grad()
def draw(
    sets: dict[str, Set],
    models: dict[str, Autoencoder],
    rows: dict[str, dict[str, Reconstruct]],
    errors: dict[str, dict[str, Tensor]],
    history: dict[str, list[dict]],
    metrics: dict,
    generated: dict[float, Tensor],
    config: Config,
    run: Path,
) -> None:
    names = {name: images.name for name, images in sets.items()}
    numbers = metrics["reconstruction"]
    plot_curves(history, numbers, names, run / "curves.png")
    plot_cross(numbers, names, config.code_size, run / "cross.png")
    plot_classifier(metrics["classifier"], names["x"], run / "classifier.png")
    some = as_float(sets["x"].test.x[:12]).cpu()
    new = {level: as_float(x[:12]) for level, x in generated.items()}
    plot_generated(some, new, metrics["generation"], names["x"], run / "generated.png")

    shown, lines = {}, {}
    for name, images in sets.items():
        some = best_median_worst(errors[f"trained_on_{name}"][name])
        x = as_float(images.test.x[some.to(images.test.x.device)])
        methods_shown = ("trained_on_x", "trained_on_y", f"pca_of_{name}")
        outputs = {row: rows[row][name](x).clamp(0, 1).cpu() for row in methods_shown}
        shown[name] = {"original": x.cpu()} | outputs
        for number in range(2):
            ends = as_float(images.test.x[2 * number : 2 * number + 2])
            between = models[name].interpolate(ends, 10).clamp(0, 1)
            line = torch.cat((ends[:1], between, ends[1:])).cpu()
            lines[f"{images.name} {number + 1}"] = line
    plot_reconstructions(shown, numbers, names, run / "reconstructions.png")
    title = "from one test image to another through their codes"
    title = f"{' and '.join(names.values())}: {title}"
    plot_pictures(lines, title, run / "interpolation.png")


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
