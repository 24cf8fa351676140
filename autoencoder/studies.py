"""Two uses of an autoencoder's codes: features for classifiers, and new images of a class.

train.py calls these studies; each returns its part of metrics.json.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from run import epochs, read_rows, seed_everything, sum_losses

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import Images, Set, choose_labelled, mean_image, outputs_of, scaled, shuffled_batches
from model import (
    Autoencoder,
    Classifier,
    CodeNeighbours,
    Encoder,
    decode_bytes,
    image_errors,
    in_bfloat16,
    nearest_image,
    new_schedule,
)

if TYPE_CHECKING:
    from train import Config

STARTS = ("random", "plain", "masked")  # of a classifier's encoder
LEAST_IMAGES = 1000  # in an epoch of a classifier: fewer labelled ones come several times


# --- classifiers ------------------------------------------------------------------------------


def compare_starts(
    images: Set, models: dict[str, Autoencoder], config: "Config", run: Path
) -> dict:
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
    images: Set, models: dict[str, Autoencoder], start: str, config: "Config", seed: int
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
    config: "Config",
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
    steps = count * math.ceil(len(labelled.x) / config.classifier_batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    optimizers = {"adam": optimizer, "schedule": new_schedule(optimizer, steps, config.warm_up)}
    for row in epochs(run, name, {"model": model} | optimizers, count, seed):
        seed_everything(seed, order, row["epoch"])
        label = f"{name} epoch {row['epoch']}"
        row["train_loss"] = classify_one_epoch(model, labelled, shift, optimizers, label, config)
        row |= {f"val_{key}": value for key, value in evaluate_classifier(model, val).items()}
    return read_rows(run, name)


def classify_one_epoch(
    model: Classifier, labelled: Images, shift: int, optimizers: dict, label: str, config: "Config"
) -> float:
    """Mean cross-entropy in nats. Raises FloatingPointError if a loss was not finite."""
    model.train()
    half, losses = in_bfloat16(config.precision, config.device), []
    pairs = shuffled_batches(labelled, config.classifier_batch_size, shift=shift)
    for x, y in tqdm(pairs, label, leave=False, disable=None):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        model.zero_grad()
        loss.backward()
        for part in optimizers.values():
            part.step()
        losses.append(loss.detach() * len(x))
    model.eval()
    return float(sum_losses(losses, label)) / len(labelled.x)


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


def probe_all(images: Set, encoders: dict[str, Callable], config: "Config") -> dict:
    """Test accuracy of a linear and of a nearest-neighbour classifier on codes that stay as they
    are, by encoder, number of labels and kind, over the seeds.
    """
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


def train_judge(images: Set, config: "Config", run: Path) -> Classifier:
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


def generate(
    images: Set, autoencoder: Autoencoder, judge: Classifier | None, config: "Config"
) -> tuple[dict, dict[str, dict[float, Images]]]:
    """Numbers on new images, by kind of noise and its level, and the images themselves.

    They are made of the codes of test images. `local` noise has the full covariance of the nearest
    codes of the class; `independent` noise, for comparison, each number's standard deviation alone.
    """
    y, codes = images.test.y, outputs_of(autoencoder.encoder, images.test)
    known = CodeNeighbours(outputs_of(autoencoder.encoder, images.train), images.train.y)
    sd = known.codes.std(0)
    numbers: dict = {"test_images": describe(images.test, images, judge)}
    generated: dict = {"local": {}, "independent": {}}
    for level in sorted({*config.noise_levels, 1.0}):
        seed_everything(config.seed, "noise")
        new = {"local": known.vary(codes, y, level)}
        seed_everything(config.seed, "noise")
        new["independent"] = codes + level * sd * torch.randn(codes.shape).to(codes)
        for kind, varied in new.items():
            generated[kind][level] = Images(decode_bytes(autoencoder, varied), y)
    for kind, levels in generated.items():
        numbers[kind] = {f"{n:g}": describe(x, images, judge) for n, x in levels.items()}
    return numbers, generated


def describe(new: Images, images: Set, judge: Classifier | None) -> dict:
    """Error to the test images, distance to the nearest training image, and the judge's accuracy.

    The distance is a median over the first 200 images, of root mean squares over pixels.
    """
    far, _ = nearest_image(new.x[:200], images.train.x)
    errors = image_errors(scaled(new.x), scaled(images.test.x))
    numbers = {"mse_to_clean": float(errors.mean()), "to_nearest": float(far.median())}
    if judge is not None:
        numbers["judge_accuracy"] = evaluate_classifier(judge, new)["accuracy"]
    return numbers


def add_generated(images: Set, autoencoder: Autoencoder, config: "Config", run: Path) -> dict:
    """Test accuracy of a classifier with few labels, without and with generated images.

    Both start at random and take as many steps. The neighbours are of any class: their
    labels are not known here.
    """
    train = outputs_of(autoencoder.encoder, images.train)
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
    labelled: Images, autoencoder: Autoencoder, known: CodeNeighbours, config: "Config", seed: int
) -> Images:
    """The images, and `added_copies` new ones of each."""
    codes, copies = outputs_of(autoencoder.encoder, labelled), [labelled.x]
    seed_everything(seed, "copies")
    for _ in range(config.added_copies):
        varied = known.vary(codes, torch.zeros_like(labelled.y), config.added_noise)
        copies.append(decode_bytes(autoencoder, varied))
    return Images(torch.cat(copies), labelled.y.repeat(len(copies)))
