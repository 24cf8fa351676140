"""U-Net with a down part pretrained by classification, then fine-tuned in two stages.

The down part learns to classify images, of which there are many; for segmentation, with few masks,
it is frozen while the up part learns (stage 1), then both learn (stage 2). The baseline is a U-Net
from scratch with the same total compute.

Run it with `python unet_transfer/train.py`, or `python unet_transfer/train.py --mask_count 50`.
"""

import copy
import math
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Literal, NamedTuple

from run import (
    OWN,
    Batch,
    Count,
    Decay,
    Epochs,
    Pixels,
    Rate,
    Seed,
    Width,
    average_buffers,
    epochs,
    finish_run,
    mean_of_all,
    one_first,
    open_run,
    parallel,
    read_rows,
    run_main,
    save,
    seed_everything,
    start_run,
    sum_losses,
    total,
    try_plot,
)

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

METHODS = ("stage1", "transfer", "scratch")
SHOWN = 6  # test images in examples.png


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["digits", "pets", "folder"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    image_size: tuple[Pixels, Pixels]
    pretrain_size: tuple[Pixels, Pixels]
    digit_classes: Annotated[int, ">= 2", "<= 10"]
    crop_count: Count
    ignore_index: Annotated[int, ">= 0", "<= 255"]
    widths: tuple[Width, ...]
    pretrain_epochs: Epochs
    pretrain_batch_size: Batch
    pretrain_lr: Rate
    mask_count: Count
    batch_size: Batch
    epoch_steps: Count
    stage1_epochs: Epochs
    stage2_epochs: Epochs
    lr: Rate
    down_lr: Rate
    scratch_lr: Rate
    weight_decay: Decay
    compare: bool
    study: bool
    mask_counts: tuple[Count, ...]
    seeds: tuple[Seed, ...]

    def __post_init__(self) -> None:
        if self.study and not self.compare:
            raise ValueError("study: expected false where compare is false")


class Stage(NamedTuple):
    """What `fit` needs to know: the same loop trains classifiers and U-Nets."""

    name: str
    epochs: int
    steps: int  # per epoch
    groups: list[dict]  # of the optimizer, each with its peak rate as "lr"
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]  # the training batches of one epoch
    loss: Callable[[Tensor, Tensor], Tensor]  # from logits and target
    evaluate: Callable[[nn.Module], dict]
    score: str  # which of evaluate's numbers chooses the weights


class Compared(NamedTuple):
    """The three ways to a U-Net, for one number of masks and one seed."""

    metrics: dict
    models: dict[str, UNet]
    history: dict[str, list[dict]]  # rows of history.csv by stage


def main() -> None:
    config, run, device = start_run(Config, __doc__, several=True)
    with one_first():
        task = load_task(config, device)
    open_run(run, config, task.name, task.classification, task.segmentation)
    compared = compare(task, config, run, mask_count=config.mask_count, seed=config.seed)
    metrics = compared.metrics
    if config.study:
        metrics["label_efficiency"] = study(task, config, run)
    plot_results(metrics, compared, task, config, run)
    save_model(compared.models["transfer"], task, config, run)
    finish_run(
        run,
        config,
        dataset=task.name,
        headline=headline(metrics),
        metrics=metrics,
        use=f"python unet_transfer/predict.py {shlex.quote(str(run))} PICTURE...",
    )


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
    if (count := wanted if config.study else config.mask_count) > there:
        most = f"at most {there}, the training masks of {task.name}"
        raise DataError(f"mask_count: expected {most}, found {count}")
    print(task.note)
    return task._replace(
        classification=task.classification.to(device), segmentation=task.segmentation.to(device)
    )


# --- training ---------------------------------------------------------------------------------


def compare(task: Task, config: Config, run: Path, *, mask_count: int, seed: int) -> Compared:
    """Pretraining, stage 1 and stage 2 and, as a baseline, a U-Net from scratch.

    All U-Nets begin with the same up part. Pretraining does not depend on the number of masks:
    after an earlier call with the same seed its weights are there already.
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

    if config.compare:
        compute = sum(flops.values()) / flops["transfer"] * config.stage2_epochs
        scratch = models["scratch"] = new_model(UNet, task, config, seed)
        train("scratch", scratch, plan("scratch", round(compute), {scratch: config.scratch_lr}))

    metrics = test(task, classifier, models, config.batch_size)
    parts = task.segmentation._replace(train=masks)._asdict()
    metrics["masks"] = {name: len(part.x) for name, part in parts.items()}
    metrics["compute"] = {
        name: cost / flops["transfer"] * config.stage2_epochs for name, cost in flops.items()
    }
    seconds = median(row["train_seconds"] for row in history["transfer"])
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
        batches=lambda: training_batches(train, batch_size, steps, mirror=mirror, part=OWN),
        loss=lambda logits, y: mean_of_all(F.cross_entropy(logits, y), len(y)),
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
        batches=lambda: training_batches(masks, batch_size, steps, mirror=task.mirror, part=OWN),
        loss=lambda logits, y: segmentation_loss(sums_of_all(loss_sums(logits, y, IGNORE))),
        evaluate=partial(evaluate_masks, examples=task.segmentation.val, batch_size=batch_size),
        score="miou",
    )


def sums_of_all(sums: LossSums) -> LossSums:
    """Over the parts of a batch, or of a data set, that the processes have."""
    return LossSums(*map(total, sums))


def step_flops(model: nn.Module, stage: Stage) -> int:
    """Floating-point operations of one training step, forward and backward, on a copy."""
    trial = copy.deepcopy(model).train()
    x, y = next(stage.batches())
    with FlopCounterMode(display=False) as counter:
        stage.loss(trial(x), y).backward()
    return int(total(torch.tensor(counter.get_total_flops(), device=x.device)))


def fit(model: nn.Module, stage: Stage, config: Config, run: Path, seed: int) -> list[dict]:
    """Leaves the weights of the best validation score in `model`; returns a row per epoch."""
    optimizer = torch.optim.AdamW(stage.groups, weight_decay=config.weight_decay)
    peaks, steps = [group["lr"] for group in stage.groups], stage.epochs * stage.steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    best, trained = (f"val_{stage.score}", max), parallel(model)
    for row in epochs(run, stage.name, parts, stage.epochs, seed, best=best):
        began, label = time.perf_counter(), f"{stage.name} epoch {row['epoch']}"
        row["train_loss"] = train_one_epoch(trained, stage, optimizer, schedule, label)
        average_buffers(model)
        row["train_seconds"] = time.perf_counter() - began
        numbers = stage.evaluate(model)
        row |= {f"val_{name}": x for name, x in numbers.items() if isinstance(x, float)}
    return read_rows(run, stage.name)


def train_one_epoch(
    model: nn.Module,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    label: str,
) -> float:
    """Mean loss per image. Raises FloatingPointError if a loss was not finite."""
    model.train()
    losses, images = [], 0
    for x, y in tqdm(stage.batches(), label, stage.steps, leave=False, disable=None):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            logits = model(x)
        loss = stage.loss(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach() * len(x))
        images += len(x)
    return float(sum_losses(losses, label)) / images


# --- evaluation -------------------------------------------------------------------------------


def own_examples(examples: Examples) -> Examples:
    """Those of this process."""
    return Examples(*(part[OWN] for part in examples))


@torch.no_grad()
def evaluate_classes(model: nn.Module, examples: Examples, batch_size: int) -> dict:
    """Cross-entropy in nats and accuracy, each a sum over all images divided by their number."""
    model.eval()
    loss, correct = 0.0, 0
    for x, y in batches(own_examples(examples), batch_size):
        logits = model(x)
        loss = loss + F.cross_entropy(logits, y, reduction="sum").double()
        correct = correct + (logits.argmax(1) == y).sum()
    loss, correct = total(loss), total(correct)
    return {"loss": float(loss) / len(examples.x), "accuracy": float(correct) / len(examples.x)}


@torch.no_grad()
def evaluate_masks(model: nn.Module, examples: Examples, batch_size: int) -> dict:
    """Loss and segmentation_metrics, from sums over the pixels of all images."""
    model.eval()
    sums, confusion = None, 0
    for x, y in batches(own_examples(examples), batch_size):
        logits = model(x)
        new = loss_sums(logits.double(), y, IGNORE)
        sums = new if sums is None else LossSums(*map(torch.add, sums, new))
        confusion = confusion + confusion_matrix(logits.argmax(1), y, logits.shape[1], IGNORE)
    loss = float(segmentation_loss(sums_of_all(sums)))
    return {"loss": loss} | segmentation_metrics(total(confusion))


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The most probable segment of each pixel (N, H, W)."""
    model.eval()
    return model(x).argmax(1)


def test(task: Task, classifier: Classifier, models: dict, batch_size: int) -> dict:
    """metrics.json's numbers; the test images are used here and nowhere else."""
    numbers = evaluate_classes(classifier, task.classification.test, batch_size)
    metrics = {"classification": {f"test_{name}": value for name, value in numbers.items()}}
    for method in models:
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


def save_model(model: UNet, task: Task, config: Config, run: Path) -> None:
    """model.pt: all that predict.py needs."""
    description = {
        "project": "unet_transfer",
        "widths": list(config.widths),
        "image_size": list(config.image_size),
        "segments": list(task.segments),
        "weights": model.state_dict(),
    }
    save(run / "model.pt", description)


def headline(metrics: dict) -> dict[str, float]:
    methods = [method for method in METHODS if method in metrics]
    numbers = {"classification_accuracy": metrics["classification"]["test_accuracy"]}
    return numbers | {f"{method}_miou": metrics[method]["test_miou"] for method in methods}


def spread_out(examples: Examples, model: UNet, batch_size: int) -> tuple[Tensor, Tensor]:
    """Test images and masks from the worst to the best by the model's mIoU on each, in even steps
    of their rank.
    """
    scores = []
    for x, y in batches(examples, batch_size):
        for guess, own in zip(predict(model, x), y, strict=True):
            confusion = confusion_matrix(guess, own, model.up.head.out_channels, IGNORE)
            scores.append(segmentation_metrics(confusion)["miou"])
    ranked = torch.tensor(scores).nan_to_num(-1).argsort(stable=True)
    places = torch.linspace(0, len(ranked) - 1, min(SHOWN, len(ranked))).round().long()
    chosen = ranked[places].to(examples.x.device)
    return next(batches(Examples(examples.x[chosen], examples.y[chosen]), SHOWN))


def plot_results(metrics: dict, compared: Compared, task: Task, config: Config, run: Path) -> None:
    names = {"transfer": "pretrained", "scratch": "from scratch"}
    dataset = task.name.replace("$", r"\$")  # two would enclose a formula
    title = f"{dataset}, {config.mask_count} masks: test mIoU " + ", ".join(
        f"{metrics[method]['test_miou']:.2f} {name}"
        for method, name in names.items()
        if method in metrics
    )
    try_plot(plot_curves, compared.history, metrics["compute"], title, run / "curves.png")
    x, y = spread_out(task.segmentation.test, compared.models["transfer"], config.batch_size)
    shown = [name for name in ("scratch", "stage1", "transfer") if name in compared.models]
    masks = {name: predict(compared.models[name], x) for name in shown}
    try_plot(plot_examples, x, y, masks, task.segments, title, run / "examples.png")
    if config.study:
        path = run / "label_efficiency.png"
        try_plot(plot_label_efficiency, metrics["label_efficiency"], dataset, path)


if __name__ == "__main__":
    run_main(main, DataError)
