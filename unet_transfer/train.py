"""U-Net with a down part pretrained by classification, then fine-tuned in two stages.

The down part learns to classify images, of which there are many; for segmentation, with few masks,
it is frozen while the up part learns (stage 1), then both learn (stage 2). Beside it a U-Net from
scratch, with the same number of segmentation steps and with the same total compute.

Run it with `python unet_transfer/train.py`, or `python unet_transfer/train.py --mask_count 50`.
"""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import IGNORE, DataError, Examples, Sizes, Task, batches, load, training_batches
from model import (
    Classifier,
    LossSums,
    UNet,
    confusion_matrix,
    loss_sums,
    segmentation_loss,
    segmentation_metrics,
)
from plots import plot_curves, plot_examples, plot_label_efficiency
from run import finish_run, load_checkpoint, save, save_checkpoint, seed_everything, start_run

METHODS = ("stage1", "transfer", "scratch", "scratch_equal_steps")


@dataclass(frozen=True)
class Config:
    """Names and types; values and their comments stand in config.yaml."""

    dataset: Literal["auto", "pets", "folder", "digits"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: int
    image_size: tuple[int, ...]
    pretrain_size: tuple[int, ...]
    digit_classes: int
    crop_count: int
    ignore_index: int
    widths: tuple[int, ...]
    pretrain_epochs: int
    pretrain_batch_size: int
    pretrain_lr: float
    mask_count: int
    batch_size: int
    epoch_steps: int
    stage1_epochs: int
    stage2_epochs: int
    lr: float
    down_lr: float
    scratch_lr: float
    weight_decay: float
    study: bool
    mask_counts: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("image_size", "pretrain_size"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name}: expected height and width, found {getattr(self, name)}")
        for name, value in vars(self).items():
            least = {"seed": 0, "seeds": 0, "weight_decay": 0, "digit_classes": 2}.get(name)
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(numbers[0], (bool, str, Path)):
                continue
            if least is None and not min(numbers) > 0:
                raise ValueError(f"{name}: expected more than 0, found {min(numbers)}")
            if least is not None and min(numbers) < least:
                raise ValueError(f"{name}: expected at least {least}, found {min(numbers)}")
        for name, most in (("digit_classes", 10), ("ignore_index", 255)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}: expected at most {most}, found {getattr(self, name)}")


class Stage(NamedTuple):
    """What `fit` needs to know: the same loop trains classifiers and U-Nets."""

    name: str
    epochs: int
    steps: int  # per epoch
    groups: list[dict]  # of the optimizer, each with its peak rate as "lr"
    draw: Callable[[], Iterator[tuple[Tensor, Tensor]]]  # the training batches of one epoch
    loss: Callable[[Tensor, Tensor], Tensor]  # from logits and target
    evaluate: Callable[[nn.Module], dict]
    score: str  # which of evaluate's numbers chooses the weights


class Compared(NamedTuple):
    """The four ways to a U-Net, for one number of masks and one seed."""

    metrics: dict
    models: dict[str, UNet]
    history: dict[str, list[dict]]  # rows of history.csv by stage


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    task = load_task(config, device)
    compared = compare(task, config, run, mask_count=config.mask_count, seed=config.seed)
    metrics = compared.metrics
    if config.study:
        metrics["label_efficiency"] = study(task, config, run)
    draw(metrics, compared, task, config, run)
    finish_run(run, config, dataset=task.name, headline=headline(metrics), metrics=metrics)


def load_task(config: Config, device: torch.device) -> Task:
    """The data on the device. Raises DataError if it has fewer masks than are asked for."""
    wanted = max(config.mask_count, *config.mask_counts)
    task = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        sizes=Sizes(config.image_size, config.pretrain_size),
        digit_classes=config.digit_classes,
        crop_count=config.crop_count,
        ignore_index=config.ignore_index,
        mask_count=wanted,
        seed=config.seed,
    )
    there = len(task.segmentation.train.x)
    if (wanted if config.study else config.mask_count) > there:
        raise DataError(f"mask_count: {task.name} has only {there} masks to train on")
    print(task.note)
    return task._replace(
        classification=task.classification.to(device), segmentation=task.segmentation.to(device)
    )


# --- training ---------------------------------------------------------------------------------


def compare(task: Task, config: Config, run: Path, *, mask_count: int, seed: int) -> Compared:
    """Pretraining, stage 1 and stage 2 beside two U-Nets from scratch.

    All U-Nets begin with the same up part. Pretraining does not hang on the number of masks: after
    an earlier call with the same seed its weights are there already.
    """
    history, flops, models = {}, {}, {}

    def train(name: str, model: nn.Module, stage: Stage) -> None:
        flops[name] = stage.epochs * stage.steps * step_flops(model, stage)
        history[name] = fit(model, stage, config, run, seed)

    classifier = new_model(Classifier, task, config, seed)
    train("pretrain", classifier, pretraining(task, classifier, config, seed))

    masks = choose_masks(task.segmentation.train, mask_count, seed)
    plan = partial(segmentation, task, masks, config, f"{mask_count}masks-seed{seed}")
    unet = new_model(UNet, task, config, seed)
    unet.down.load_state_dict(classifier.down.state_dict())
    unet.freeze_down(True)
    train("stage1", unet, plan("stage1", config.stage1_epochs, {unet.up: config.lr}))
    models["stage1"] = copy.deepcopy(unet)
    unet.freeze_down(False)
    rates = {unet.up: config.lr, unet.down: config.down_lr}
    train("transfer", unet, plan("transfer", config.stage2_epochs, rates))
    models["transfer"] = unet

    compute = sum(flops.values()) / flops["transfer"] * config.stage2_epochs
    equal_steps = config.stage1_epochs + config.stage2_epochs
    for name, epochs in (("scratch", round(compute)), ("scratch_equal_steps", equal_steps)):
        models[name] = new_model(UNet, task, config, seed)
        train(name, models[name], plan(name, epochs, {models[name]: config.scratch_lr}))

    metrics = test(task, classifier, models, config.batch_size)
    metrics["compute"] = {
        name: cost / flops["transfer"] * config.stage2_epochs for name, cost in flops.items()
    }
    seconds = median(row["seconds"] for row in history["transfer"])
    metrics["train_images_per_second"] = config.epoch_steps * config.batch_size / seconds
    return Compared(metrics, models, history)


def new_model(kind: type[nn.Module], task: Task, config: Config, seed: int) -> nn.Module:
    """A Classifier or a UNet; the same seed gives the same weights."""
    seed_everything(seed, kind.__name__)
    outputs = task.segments if kind is UNet else task.classes
    model = kind(config.widths, len(outputs))
    return model.to(task.segmentation.test.x.device, memory_format=torch.channels_last)


def choose_masks(examples: Examples, count: int, seed: int) -> Examples:
    """`count` examples drawn by `seed`; a larger count holds those of a smaller one."""
    order = torch.randperm(len(examples.x), generator=torch.Generator().manual_seed(seed))
    return Examples(*(part[order[:count].to(part.device)] for part in examples))


def pretraining(task: Task, classifier: Classifier, config: Config, seed: int) -> Stage:
    train, val, _ = task.classification
    batch_size, mirror = config.pretrain_batch_size, task.mirror
    steps = math.ceil(len(train.x) / batch_size)
    return Stage(
        name=f"pretrain-seed{seed}",
        epochs=config.pretrain_epochs,
        steps=steps,
        groups=[{"params": classifier.parameters(), "lr": config.pretrain_lr}],
        draw=lambda: training_batches(train, batch_size, steps, mirror=mirror),
        loss=F.cross_entropy,
        evaluate=partial(evaluate_classes, examples=val, batch_size=batch_size),
        score="accuracy",
    )


def segmentation(
    task: Task,
    masks: Examples,
    config: Config,
    suffix: str,
    name: str,
    epochs: int,
    rates: dict[nn.Module, float],
) -> Stage:
    """A stage on `masks` in which each module learns at its own rate."""
    steps, batch_size = config.epoch_steps, config.batch_size
    return Stage(
        name=f"{name}-{suffix}",
        epochs=epochs,
        steps=steps,
        groups=[{"params": module.parameters(), "lr": lr} for module, lr in rates.items()],
        draw=lambda: training_batches(masks, batch_size, steps, mirror=task.mirror),
        loss=lambda logits, y: segmentation_loss(loss_sums(logits, y, IGNORE)),
        evaluate=partial(evaluate_masks, examples=task.segmentation.val, batch_size=batch_size),
        score="miou",
    )


def step_flops(model: nn.Module, stage: Stage) -> int:
    """Floating-point operations of one training step, forward and backward, on a copy."""
    trial = copy.deepcopy(model).train()
    x, y = next(stage.draw())
    with FlopCounterMode(display=False) as counter:
        stage.loss(trial(x), y).backward()
    return counter.get_total_flops()


def fit(model: nn.Module, stage: Stage, config: Config, run: Path, seed: int) -> list[dict]:
    """Leaves the weights of the best validation score in `model`; returns a row per epoch.

    What a killed run has done of the stage is not done again.
    """
    total = stage.epochs * stage.steps
    optimizer = torch.optim.AdamW(stage.groups, weight_decay=config.weight_decay)
    peaks = [group["lr"] for group in stage.groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=total)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = load_checkpoint(run, stage.name, parts)
    rows = [row for row in history if row["stage"] == stage.name]

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    for epoch in range(len(rows) + 1, stage.epochs + 1):
        seed_everything(seed, stage.name, epoch)
        began = time.perf_counter()
        train_loss = train_one_epoch(model, stage, step, f"{stage.name} epoch {epoch}")
        seconds = time.perf_counter() - began
        numbers = {f"val_{name}": value for name, value in stage.evaluate(model).items()}
        row = {"stage": stage.name, "epoch": epoch, "seconds": seconds, "train_loss": train_loss}
        rows.append(row | {name: x for name, x in numbers.items() if isinstance(x, float)})
        best = max(earlier[f"val_{stage.score}"] for earlier in rows)
        if rows[-1][f"val_{stage.score}"] == best:
            save(run / f"{stage.name}.pt", model.state_dict())
        history.append(rows[-1])
        save_checkpoint(run, stage.name, parts, history)
        print("  ".join([stage.name, *(f"{n} {x:.4g}" for n, x in list(rows[-1].items())[1:])]))
    best = torch.load(run / f"{stage.name}.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(best)
    return rows


def train_one_epoch(model: nn.Module, stage: Stage, step: Callable, label: str) -> float:
    """Mean loss per image. Raises FloatingPointError if a loss was not finite."""
    model.train()
    losses, images = [], 0
    for x, y in tqdm(stage.draw(), label, stage.steps, leave=False, disable=None):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            logits = model(x)
        loss = stage.loss(logits.float(), y)
        step(loss)
        losses.append(loss.detach() * len(x))
        images += len(x)
    losses = torch.stack(losses)  # read once per epoch: the loop never waits for the device
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).nonzero()[0]) + 1
        raise FloatingPointError(f"{label}: the loss is not finite at step {first}")
    return float(losses.sum()) / images


# --- evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_classes(model: nn.Module, examples: Examples, batch_size: int) -> dict:
    """Cross-entropy in nats and accuracy, each a sum over all images divided by their number."""
    model.eval()
    loss, correct = 0.0, 0
    for x, y in batches(examples, batch_size):
        logits = model(x)
        loss = loss + F.cross_entropy(logits, y, reduction="sum").double()
        correct = correct + (logits.argmax(1) == y).sum()
    return {"loss": float(loss) / len(examples.x), "accuracy": float(correct) / len(examples.x)}


@torch.no_grad()
def evaluate_masks(model: nn.Module, examples: Examples, batch_size: int) -> dict:
    """Loss and segmentation_metrics, from sums over the pixels of all images."""
    model.eval()
    sums, confusion = None, 0
    for x, y in batches(examples, batch_size):
        logits = model(x)
        new = loss_sums(logits.double(), y, IGNORE)
        sums = new if sums is None else LossSums(*map(torch.add, sums, new))
        confusion = confusion + confusion_matrix(logits.argmax(1), y, logits.shape[1], IGNORE)
    return {"loss": float(segmentation_loss(sums))} | segmentation_metrics(confusion)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The most probable segment of each pixel (N, H, W)."""
    model.eval()
    return model(x).argmax(1)


def test(task: Task, classifier: Classifier, models: dict, batch_size: int) -> dict:
    """metrics.json's numbers; the test images are used here and nowhere else."""
    numbers = evaluate_classes(classifier, task.classification.test, batch_size)
    metrics = {"classification": {f"test_{name}": value for name, value in numbers.items()}}
    for method in METHODS:
        numbers = evaluate_masks(models[method], task.segmentation.test, batch_size)
        per_class = dict(zip(task.segments, numbers.pop("iou_per_class"), strict=True))
        metrics[method] = {f"test_{name}": value for name, value in numbers.items()}
        metrics[method]["test_iou_per_class"] = per_class
    metrics["parameters"] = sum(part.numel() for part in models["transfer"].parameters())
    return metrics


def study(task: Task, config: Config, run: Path) -> dict:
    """Test mIoU by method and number of masks: mean and standard deviation over the seeds."""
    efficiency = {method: {} for method in METHODS}
    for count in config.mask_counts:
        trials = [
            compare(task, config, run, mask_count=count, seed=n).metrics for n in config.seeds
        ]
        for method in METHODS:
            scores = [trial[method]["test_miou"] for trial in trials]
            spread = stdev(scores) if len(scores) > 1 else 0.0
            summary = {"mean": mean(scores), "sd": spread, "of_seeds": scores}
            efficiency[method][str(count)] = summary
    return efficiency


# --- report -----------------------------------------------------------------------------------


def headline(metrics: dict) -> dict[str, float]:
    methods = ("stage1", "transfer", "scratch")
    numbers = {"classification_accuracy": metrics["classification"]["test_accuracy"]}
    return numbers | {f"{method}_miou": metrics[method]["test_miou"] for method in methods}


def draw(metrics: dict, compared: Compared, task: Task, config: Config, run: Path) -> None:
    title = f"{task.name}, {config.mask_count} masks: test mIoU " + ", ".join(
        f"{metrics[method]['test_miou']:.2f} {name}"
        for method, name in (("transfer", "pretrained"), ("scratch", "from scratch"))
    )
    plot_curves(compared.history, metrics["compute"], title, run / "curves.png")
    x, y = next(batches(task.segmentation.test, 4))
    masks = {name: predict(compared.models[name], x) for name in ("scratch", "stage1", "transfer")}
    plot_examples(x, y, masks, task.segments, title, run / "examples.png")
    if config.study:
        plot_label_efficiency(metrics["label_efficiency"], task.name, run / "label_efficiency.png")


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
