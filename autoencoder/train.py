"""A convolutional autoencoder on image sets X and Y, compared with PCA with as many components.

Four questions: how well does it reconstruct, does one trained on X reconstruct Y, is its encoder
worth anything to a classifier, and are decoded new codes new images of a class?

Run it with `python autoencoder/train.py`, or `python autoencoder/train.py --code_size 64`.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
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
    choose_labelled,
    load,
    mean_image,
    scaled,
    shuffled_batches,
)
from model import (
    Autoencoder,
    Classifier,
    CodeNeighbours,
    Encoder,
    Muon,
    Pca,
    decode_bytes,
    fit_pca,
    hide,
    image_errors,
    nearest_image,
    one_cycle,
    path_between,
    psnr,
)
from plots import (
    plot_classifier,
    plot_cross,
    plot_curves,
    plot_lines,
    plot_new,
    plot_noise,
    plot_probes,
    plot_reconstructions,
)

STARTS = ("random", "plain", "masked")  # of a classifier's encoder
KEPT_CODES = 5000  # of training images, in model.pt, to make new images from
CHUNK = 500  # images at a time where nothing is trained
LEAST_IMAGES = 1000  # in an epoch of a classifier: fewer labelled ones come several times


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
        metrics["classifier"] = study(pair.x, models, config, run)
        metrics["probes"] = probe_all(pair.x, models, methods["pca_of_x"]["x"], config)
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
        use=f"python autoencoder/predict.py {run} PICTURE...",
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
        there = f"{images.name} has {len(images.train.x)} images to train on"
        if len(images.train.x) < config.code_size:
            raise DataError(f"code_size: PCA needs as many images, {there}")
        if images is pair.x and config.compare and len(images.train.x) < config.label_counts[-1]:
            raise DataError(f"label_counts: expected at most all images, {there}")
        if images is pair.x and config.compare and len(images.train.x) < max(config.added_labels):
            raise DataError(f"added_labels: expected at most all images, {there}")
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
        pairs = images_to_copy(images, hidden, model.encoder.mean, config)
        row["train_loss"] = train_one_epoch(model, pairs, F.mse_loss, optimizers, label, config)
        row["train_seconds"] = time.perf_counter() - began
        row["val_loss"] = float(errors_of(model, images.val).mean())
    return model.eval()


def new_autoencoder(images: Set, config: Config) -> Autoencoder:
    """An untrained one that knows the mean of the training images; always the same weights."""
    seed_everything(config.seed, "autoencoder")
    model = Autoencoder(config.widths, config.code_size, mean_image(images.train))
    return model.to(images.train.x.device, memory_format=torch.channels_last)


def images_to_copy(
    images: Set, hidden: float, mean: Tensor, config: Config
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training images, of which patches may be hidden, and the whole images."""
    shift = config.shift if images.mirror else 0
    for x, _ in shuffled_batches(
        images.train, config.batch_size, mirror=images.mirror, shift=shift
    ):
        yield (hide(x, mean, hidden) if hidden else x), x


def new_optimizers(model: nn.Module, steps: int, config: Config) -> dict:
    """Muon for matrices and kernels, Adam for biases, and the cycle of both rates."""
    dtype = torch.bfloat16 if in_bfloat16(config) else torch.float32
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    biases = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizers = {
        "muon": Muon(matrices, config.lr, dtype),
        "adam": torch.optim.Adam(biases, config.bias_lr),
    }
    schedules = {
        f"{name}_schedule": new_schedule(optimizer, steps, config)
        for name, optimizer in optimizers.items()
    }
    return optimizers | schedules


def new_schedule(
    optimizer: torch.optim.Optimizer, steps: int, config: Config
) -> torch.optim.lr_scheduler.LambdaLR:
    rate = partial(one_cycle, total=steps, warm_up=config.warm_up)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def train_one_epoch(
    model: nn.Module,
    pairs: Iterator[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizers: dict,
    label: str,
    config: Config,
) -> float:
    """Mean loss per image. Raises FloatingPointError if a loss was not finite."""
    model.train()
    half, losses, images = in_bfloat16(config), [], 0
    for x, target in tqdm(pairs, label, leave=False, disable=None):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            output = model(x)
        loss = loss_of(output.float(), target)
        model.zero_grad()
        loss.backward()
        for part in optimizers.values():  # both optimizers, then their schedules
            part.step()
        losses.append(loss.detach() * len(x))
        images += len(x)
    model.eval()
    return float(sum_losses(losses, label)) / images


def in_bfloat16(config: Config) -> bool:
    """With `auto`, where the device multiplies in bfloat16 faster than in float32."""
    if config.precision == "auto":
        return config.device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return config.precision == "bfloat16"


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


@torch.no_grad()
def errors_of(reconstruct: Reconstruct, images: Images) -> Tensor:
    """Each image's mean squared error (N,)."""
    return torch.cat([image_errors(reconstruct(x), x) for x, _ in batches(images, CHUNK)])


def summarise(errors: dict[str, dict[str, Tensor]]) -> dict:
    """MSE over all images, pixels and channels and its PSNR, from each image's error (N,)."""
    numbers = {}
    for row, columns in errors.items():
        mse = {name: float(values.mean()) for name, values in columns.items()}
        numbers[row] = {name: {"mse": x, "psnr": psnr(x)} for name, x in mse.items()}
    return numbers


@torch.no_grad()
def outputs_of(part: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    return torch.cat([part(x) for x, _ in batches(images, CHUNK)])


# --- classification ---------------------------------------------------------------------------


def study(images: Set, models: dict[str, Autoencoder], config: Config, run: Path) -> dict:
    """Validation curves and test accuracy over the seeds, by number of labels and start."""
    rates = {"random": config.random_lr, "plain": config.plain_lr, "masked": config.masked_lr}
    numbers = {}
    for count, passes in zip(config.label_counts, config.classifier_epochs, strict=True):
        rows, tests = {start: [] for start in STARTS}, {start: [] for start in STARTS}
        for seed in config.seeds:
            labelled = choose_labelled(images.train, count, seed)
            for start in STARTS:
                model = new_classifier(images, models, start, config, seed)
                options = {"name": f"{start}-{count}labels-seed{seed}", "order": f"{count}labels"}
                options |= {"count": passes, "lr": rates[start], "seed": seed}
                own = train_classifier(model, labelled, images.val, config, run, **options)
                rows[start].append(own)
                tests[start].append(evaluate_classifier(model, images.test)["accuracy"])
        numbers[str(count)] = {start: over_seeds(rows[start], tests[start]) for start in STARTS}
    return numbers


def new_classifier(
    images: Set, models: dict[str, Autoencoder], start: str, config: Config, seed: int
) -> Classifier:
    """With the encoder of an autoencoder of X unless `start` is random; the head is the same."""
    seed_everything(seed, "classifier")
    encoder = Encoder(config.widths, config.code_size, models["x"].encoder.mean.cpu())
    classifier = Classifier(encoder, len(images.classes))
    if start != "random":
        source = {"plain": "x", "masked": "masked"}[start]
        encoder.load_state_dict(models[source].encoder.state_dict())
    return classifier.to(images.train.x.device, memory_format=torch.channels_last)


def train_classifier(
    model: Classifier,
    labelled: Images,
    val: Images,
    config: Config,
    run: Path,
    *,
    name: str,
    order: str,
    count: int,
    lr: float,
    seed: int,
    shift: int = 0,
) -> list[dict]:
    """Rows of history.csv. Stages to be compared share `order`, which seeds the order of images."""
    labelled = repeated(labelled, max(1, LEAST_IMAGES // len(labelled.x)))
    size = config.classifier_batch_size
    steps = count * math.ceil(len(labelled.x) / size)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    optimizers = {"adam": optimizer, "schedule": new_schedule(optimizer, steps, config)}
    for row in epochs(run, name, {"model": model} | optimizers, count, seed):
        seed_everything(seed, order, row["epoch"])
        pairs, label = shuffled_batches(labelled, size, shift=shift), f"{name} epoch {row['epoch']}"
        loss = train_one_epoch(model, pairs, F.cross_entropy, optimizers, label, config)
        row["train_loss"] = loss
        row |= {f"val_{key}": value for key, value in evaluate_classifier(model, val).items()}
    return read_rows(run, name)


def evaluate_classifier(model: nn.Module, images: Images) -> dict[str, float]:
    """Cross-entropy in nats and accuracy, means over all images."""
    logits = outputs_of(model, images).double()
    accuracy = (logits.argmax(1) == images.y).double().mean()
    return {"loss": float(F.cross_entropy(logits, images.y)), "accuracy": float(accuracy)}


def over_seeds(rows: list[list[dict]], tests: list[float]) -> dict:
    """Mean and standard deviation at each epoch of validation, and of the test accuracy."""
    numbers = {}
    for name in ("train_loss", "val_loss", "val_accuracy"):
        by_epoch = [[row[name] for row in epoch] for epoch in zip(*rows, strict=True)]
        numbers[name] = {
            "mean": [mean(values) for values in by_epoch],
            "sd": [deviation(values) for values in by_epoch],
        }
    return numbers | {"test_accuracy": with_mean(tests)}


def with_mean(values: list[float]) -> dict:
    return {"mean": mean(values), "sd": deviation(values), "of_seeds": values}


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def probe_all(images: Set, models: dict[str, Autoencoder], pca: Pca, config: Config) -> dict:
    """Test accuracy of a linear and of a nearest-neighbour classifier on codes that stay as they
    are, by encoder, number of labels and kind, over the seeds.
    """
    encoders = {
        "pixels": lambda x: x.mean(1).flatten(1),
        "pca": pca.encode,
        "untrained": new_autoencoder(images, config).encoder,
        "plain": models["x"].encoder,
        "masked": models["masked"].encoder,
        "of_y": models["y"].encoder,
    }
    numbers = {}
    for name, encoder in encoders.items():
        train = Images(outputs_of(encoder, images.train).cpu(), images.train.y.cpu())
        test = Images(outputs_of(encoder, images.test).cpu(), images.test.y.cpu())
        numbers[name] = {}
        for count in config.label_counts:
            every = config.seeds if count < len(train.x) else config.seeds[:1]
            scores = [probe(choose_labelled(train, count, seed), test) for seed in every]
            numbers[name][str(count)] = {
                kind: with_mean([score[kind] for score in scores]) for kind in scores[0]
            }
    return numbers


def probe(labelled: Images, test: Images) -> dict[str, float]:
    """Accuracy of logistic regression on standardised codes, and of up to five neighbours."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    each = len(labelled.x) // len(labelled.y.unique())
    kinds = {
        "linear": make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, tol=1e-3, max_iter=300)
        ),
        "neighbours": KNeighborsClassifier(max(1, min(5, each))),
    }
    x, y = labelled.x.numpy(), labelled.y.numpy()
    return {
        kind: float(model.fit(x, y).score(test.x.numpy(), test.y.numpy()))
        for kind, model in kinds.items()
    }


def train_judge(images: Set, config: Config, run: Path) -> Classifier:
    """A classifier with all labels of X that never saw an autoencoder."""
    seed_everything(config.seed, "judge")
    encoder = Encoder(config.widths, config.code_size, mean_image(images.train))
    judge = Classifier(encoder, len(images.classes))
    judge.to(images.train.x.device, memory_format=torch.channels_last)
    options = {"name": "judge", "order": "judge", "count": config.judge_epochs}
    options |= {"lr": config.judge_lr, "seed": config.seed, "shift": config.judge_shift}
    train_classifier(judge, images.train, images.val, config, run, **options)
    return judge


# --- new images -------------------------------------------------------------------------------


def codes_of(autoencoder: Autoencoder, images: Images) -> Tensor:
    return outputs_of(autoencoder.encoder, images)


def generate(
    images: Set, autoencoder: Autoencoder, judge: Classifier | None, config: Config
) -> tuple[dict, dict[str, dict[float, Images]]]:
    """Numbers on new images, by kind of noise and its level, and the images themselves.

    They are made of the codes of test images. `local` noise has the full covariance of the nearest
    codes of the class; `independent` noise, for comparison, each number's standard deviation alone.
    """
    y, codes = images.test.y, codes_of(autoencoder, images.test)
    known = CodeNeighbours(codes_of(autoencoder, images.train), images.train.y)
    sd = known.codes.std(0)
    numbers: dict = {"test_images": describe(images.test, images, judge, config)}
    generated: dict = {"local": {}, "independent": {}}
    for level in sorted({*config.noise_levels, 1.0}):
        seed_everything(config.seed, "noise")
        new = {"local": known.vary(codes, y, level)}
        seed_everything(config.seed, "noise")
        new["independent"] = codes + level * sd * torch.randn(codes.shape).to(codes)
        for kind, varied in new.items():
            generated[kind][level] = Images(decode_bytes(autoencoder, varied), y)
    for kind, levels in generated.items():
        numbers[kind] = {f"{n:g}": describe(x, images, judge, config) for n, x in levels.items()}
    return numbers, generated


def describe(new: Images, images: Set, judge: Classifier | None, config: Config) -> dict:
    """Error to the test images, distance to the nearest training image, and the judge's accuracy.

    The distance is a median over the first 200 images, of root mean squares over pixels.
    """
    far, _ = nearest_image(new.x[:200], images.train.x)
    errors = image_errors(scaled(new.x), scaled(images.test.x))
    numbers = {"mse_to_clean": float(errors.mean()), "to_nearest": float(far.median())}
    if judge is not None:
        numbers["judge_accuracy"] = evaluate_classifier(judge, new)["accuracy"]
    return numbers


def add_generated(images: Set, autoencoder: Autoencoder, config: Config, run: Path) -> dict:
    """Test accuracy of a classifier with few labels, without and with generated images.

    Both start at random and take as many steps. The neighbours are of any class: their
    labels are not known here.
    """
    train = codes_of(autoencoder, images.train)
    known = CodeNeighbours(train, torch.zeros_like(images.train.y))
    numbers = {}
    for count in config.added_labels:
        accuracy: dict = {"without": [], "with": []}
        for seed in config.seeds:
            labelled = choose_labelled(images.train, count, seed)
            pools = {"without": repeated(labelled, config.added_copies + 1)}
            pools["with"] = vary_copies(labelled, autoencoder, known, config, seed)
            for kind, scores in accuracy.items():
                model = new_classifier(images, {"x": autoencoder}, "random", config, seed)
                options = {"name": f"{kind}-generated-{count}labels-seed{seed}", "seed": seed}
                options |= {"order": f"added-{count}labels", "lr": config.random_lr}
                options |= {"count": config.added_epochs}
                train_classifier(model, pools[kind], images.val, config, run, **options)
                scores.append(evaluate_classifier(model, images.test)["accuracy"])
        gains = [more - less for less, more in zip(*accuracy.values(), strict=True)]
        error = deviation(gains) / math.sqrt(len(gains))
        numbers[str(count)] = {kind: with_mean(scores) for kind, scores in accuracy.items()}
        numbers[str(count)]["gain"] = {"mean": mean(gains), "standard_error": error}
    return numbers


def repeated(images: Images, times: int) -> Images:
    return Images(images.x.repeat(times, 1, 1, 1), images.y.repeat(times))


def vary_copies(
    labelled: Images, autoencoder: Autoencoder, known: CodeNeighbours, config: Config, seed: int
) -> Images:
    """The images, and `added_copies` new ones of each."""
    codes, copies = codes_of(autoencoder, labelled), [labelled.x]
    seed_everything(seed, "copies")
    for _ in range(config.added_copies):
        varied = known.vary(codes, torch.zeros_like(labelled.y), config.added_noise)
        copies.append(decode_bytes(autoencoder, varied))
    return Images(torch.cat(copies), labelled.y.repeat(len(copies)))


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
        "codes": codes_of(autoencoder, some),
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
    names = {name: images.name for name, images in sets.items()}
    numbers, x = metrics["reconstruction"], sets["x"]
    history = {name: read_rows(run, f"autoencoder-{name}") for name in sets}
    pca = {
        name: float(errors_of(methods[f"pca_of_{name}"][name], images.val).mean())
        for name, images in sets.items()
    }
    try_plot(plot_curves, history, pca, numbers, names, run / "curves.png")
    shown = {name: shown_examples(name, sets, methods, errors) for name in sets}
    try_plot(plot_reconstructions, shown, numbers, names, run / "reconstructions.png")
    judged = metrics["generation"]
    lines = {
        kind: {n: scaled(new.x[:12]).cpu() for n, new in levels.items()}
        for kind, levels in generated.items()
    }
    some = scaled(x.test.x[:12]).cpu()
    try_plot(plot_noise, some, lines, judged, x.name, run / "noise.png")
    new = one_of_each_class(generated["local"][1.0], len(x.classes))
    _, which = nearest_image(new, x.train.x)
    copies = scaled(x.train.x[which]).cpu()
    try_plot(plot_new, scaled(new).cpu(), copies, judged, x.name, run / "new.png")
    title = f"{x.name}: from one test image to another through their codes"
    try_plot(plot_lines, paths(x, models["x"]), title, run / "interpolation.png")
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
    """Test images of a set and what each method makes of them."""
    chosen = best_median_worst(errors[f"trained_on_{name}"][name], sets[name].test.x)
    x = scaled(sets[name].test.x[chosen.to(sets[name].test.x.device)])
    rows = [row for row in methods if row.startswith("trained_on") or row == f"pca_of_{name}"]
    outputs = {row: methods[row][name](x).clamp(0, 1).cpu() for row in rows}
    return {"original": x.cpu()} | outputs


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


def one_of_each_class(images: Images, classes: int, columns: int = 12) -> Tensor:
    """Up to `columns` images, of as many classes as there are."""
    order = [int(n) for turn in range(columns) for n in nth_of_each(images.y, classes, turn)]
    return images.x[torch.tensor(order[:columns])]


def nth_of_each(y: Tensor, classes: int, turn: int) -> list[Tensor]:
    members = [(y == label).nonzero()[:, 0] for label in range(classes)]
    return [own[turn] for own in members if len(own) > turn]


def paths(images: Set, autoencoder: Autoencoder, count: int = 12) -> dict[str, Tensor]:
    """Images between two pairs of test images, on a straight line and where codes are dense."""
    codes, lines = codes_of(autoencoder, images.train)[:KEPT_CODES], {}
    for pair in range(min(2, len(images.test.x) // 2)):
        ends = codes_of(
            autoencoder, Images(*(part[2 * pair : 2 * pair + 2] for part in images.test))
        )
        share = torch.linspace(0, 1, count).to(ends)[:, None]
        ways = {"straight line": torch.lerp(ends[0], ends[1], share)}
        ways["where codes are dense"] = path_between(codes, ends, count)
        for way, between in ways.items():
            lines[f"{way}, {pair + 1}"] = scaled(decode_bytes(autoencoder, between)).cpu()
    return lines


if __name__ == "__main__":
    run_main(main, DataError)
