"""Faster R-CNN finds litter on the forest floor, and leaves puddles, blossoms and berries alone.

With COCO weights a detector of torchvision's is fine-tuned; without them, and without a GPU, a
small one learns from random weights in minutes.

Run it with `python faster_rcnn_litter/train.py`, or `python faster_rcnn_litter/train.py
--dataset folder --data_dir MINE`.
"""

import copy
import itertools
import math
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, NamedTuple

from run import (
    OWN,
    PROJECT,
    RANK,
    WORLD,
    Batch,
    Decay,
    Epochs,
    Rate,
    Seed,
    average_buffers,
    epochs,
    finish_run,
    gather,
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
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data import (
    Data,
    DataError,
    Pictures,
    batches,
    load,
    pretrained_weights,
    read_weights,
    training_batches,
)
from model import (
    LOSSES,
    Counts,
    above,
    anchor_overlap,
    as_one_class,
    as_whole_batch,
    at_confidence,
    coco_metrics,
    count,
    detect,
    f1_scores,
    false_positives_on,
    fit_anchors,
    frozen_eps,
    losses,
    make_detector,
    mistakes,
    mix_precision,
    outcome,
    outside,
    plain_state,
    replace_head,
    restore_detector,
    working_confidence,
)
from plots import plot_curves, plot_detections, plot_f1, plot_mistakes, plot_precision_recall
from scenes import CONFOUNDERS, draw_split

ARCHITECTURES = Literal[
    "small",
    "mobilenet_v3_large_320_fpn",
    "mobilenet_v3_large_fpn",
    "resnet50_fpn",
    "resnet50_fpn_v2",
]
SceneCount = Annotated[int, ">= 2", "<= 1000000"]


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["scenes", "folder"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    classes: tuple[str, ...]
    image_size: Annotated[int, ">= 32", "<= 4096"]
    scene_counts: tuple[SceneCount, SceneCount, SceneCount]
    scene_pattern: str
    architecture: ARCHITECTURES
    weights: Path  # or coco, or none
    precision: Literal["auto", "float32", "bfloat16"]
    epochs: Epochs
    batch_size: Batch
    lr: Rate
    weight_decay: Decay
    pretrained_lr: Rate
    pretrained_weight_decay: Decay
    warmup: Annotated[float, ">= 0", "< 1"]
    ema: Annotated[float, ">= 0", "< 1"]
    jitter: Annotated[float, ">= 1", "<= 4"]
    patience: Epochs
    max_false_positives: Annotated[float, ">= 0", "<= 1000"]
    compare: bool

    def __post_init__(self) -> None:
        try:
            re.compile(self.scene_pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"scene_pattern: expected a regular expression: {error}") from None
        if len(set(self.classes)) < len(self.classes) or not all(self.classes):
            raise ValueError(f"classes: expected different names, found {self.classes}")
        if self.weights.name == "coco" and self.architecture == "small":
            raise ValueError("weights: there are no COCO weights for the architecture small")


class Evaluation(NamedTuple):
    """Predictions on a split, and what was counted."""

    predictions: list[dict]
    metrics: dict
    precision: list[float]  # at recall 0, 0.01, ..., 1
    counts: Counts
    seconds: float  # for the predictions


class Start(NamedTuple):
    """The network to train, and what it begins with."""

    model: nn.Module
    before: nn.Module  # the network that is tested before training
    about: str
    pretrained: bool


def main() -> None:
    config, run, device = start_run(Config, __doc__, several=True)
    with one_first():
        data = load_data(config)
        start = new_model(config, data, device)
    open_run(run, config, data.name, data.train, data.val, data.test, plain_state(start.model))
    metrics, first = describe(data, start), None
    if config.compare:
        any_class = start.before is not start.model
        first = evaluate(start.before, data.test, config, any_class=any_class)
        metrics["before"] = first.metrics
    model = start.model
    history = fit(model, data, start.pretrained, config, run)

    splits = {"val": data.val, "test": data.test}
    evaluated = {name: evaluate(model, part, config) for name, part in splits.items()}
    metrics |= summarise(evaluated, data, config)
    metrics["timing"] = timing(history, data, evaluated["test"].seconds)
    plot_results(first, evaluated, history, data, metrics, run)
    save_model(model, config, metrics, run)
    finish_run(
        run,
        config,
        dataset=data.name,
        headline=headline(metrics),
        metrics=metrics,
        use=f"python faster_rcnn_litter/predict.py {shlex.quote(str(run))} PHOTOGRAPH...",
    )


def load_data(config: Config) -> Data:
    data = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        classes=config.classes,
        scene_pattern=config.scene_pattern,
        scene_counts=config.scene_counts,
        draw=draw_split,
        seed=config.seed,
    )
    sizes = ", ".join(f"{part} {len(getattr(data, part).x)}" for part in ("train", "val", "test"))
    print(f"{data.note}; {sizes}")
    return data


# --- the network ------------------------------------------------------------------------------


def new_model(config: Config, data: Data, device: torch.device) -> Start:
    seed_everything(config.seed, "initialisation")
    name, amp = config.weights.name, use_bfloat16(config)
    options = {"sides": fit_anchors(torch.cat([one["boxes"] for one in data.train.y]))}
    options |= {"classes": 1 + len(data.classes), "image_size": config.image_size}
    if name == "none":
        model = mix_precision(make_detector(config.architecture, **options), amp).to(device)
        return Start(model, model, "random weights", False)
    if name == "coco":
        before = mix_precision(coco_detector(config, options), amp).to(device)
        model = copy.deepcopy(before)
        replace_head(model, 1 + len(data.classes))
        return Start(model.to(device), before, "COCO weights", True)
    saved = read_weights(config.weights)
    wanted = {"project": PROJECT.name, "architecture": config.architecture}
    wanted |= {"classes": list(data.classes)}
    for key, value in wanted.items():
        if saved.get(key) != value:
            found = saved.get(key)
            raise DataError(f"weights: {config.weights}: {key} {found} instead of {value}")
    model = restore_detector(saved, amp).to(device)
    return Start(model, model, f"weights of {config.weights.parent.name}", True)


def coco_detector(config: Config, options: dict) -> nn.Module:
    """With COCO's own 91 classes. Raises DataError if the weights cannot be had."""
    from torchvision.models import get_model_weights  # imported where it is used: it is slow

    url = get_model_weights(f"fasterrcnn_{config.architecture}").DEFAULT.url
    pretrained_weights(url, config.data_dir)  # from here torchvision finds the file, verified
    hub = torch.hub.get_dir()
    try:
        torch.hub.set_dir(config.data_dir)
        return make_detector(config.architecture, **options, coco=True)
    finally:
        torch.hub.set_dir(hub)


def use_bfloat16(config: Config) -> bool:
    """With `auto`, where the device multiplies in bfloat16 faster than in float32."""
    if config.precision == "auto":
        return config.device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return config.precision == "bfloat16"


# --- training ---------------------------------------------------------------------------------


def fit(model: nn.Module, data: Data, pretrained: bool, config: Config, run: Path) -> list[dict]:
    """Leaves the averaged weights of the best validation AP in `model`; returns a row per epoch."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    steps = math.ceil(len(data.train.x) / config.batch_size)
    optimizer, schedule = make_optimizer(model, pretrained, config, config.epochs * steps)
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    options = {"best": ("val_ap", max), "keep": "average", "patience": config.patience}
    trained = parallel(model)
    if WORLD > 1:
        as_whole_batch(model, RANK, WORLD)
    for row in epochs(run, "train", parts, config.epochs, config.seed, **options):
        began, label = time.perf_counter(), f"epoch {row['epoch']}"
        row |= train_one_epoch(trained, average, data.train, optimizer, schedule, config, label)
        row["train_seconds"] = time.perf_counter() - began
        average_buffers(average.module)
        average_buffers(model)
        metrics = evaluate(average.module, data.val, config).metrics
        row |= {f"val_{name}": metrics[name] for name in ("ap", "ap50", "ar100")}
    model.load_state_dict(average.module.state_dict())
    return read_rows(run, "train")


def make_optimizer(model: nn.Module, pretrained: bool, config: Config, steps: int) -> tuple:
    """AdamW from random weights, SGD from pretrained ones; warm-up, then half a cosine to 0."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if pretrained:
        decay = config.pretrained_weight_decay
        optimizer = torch.optim.SGD(weights, config.pretrained_lr, 0.9, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(weights, config.lr, weight_decay=config.weight_decay)
    rising = config.warmup * steps

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_one_epoch(
    model: nn.Module,
    average: AveragedModel,
    pictures: Pictures,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: Config,
    label: str,
) -> dict[str, float]:
    """Mean loss per picture and its parts. Raises FloatingPointError if it was not finite."""
    model.train()
    device = next(model.parameters()).device
    sums, steps = [], math.ceil(len(pictures.x) / config.batch_size)
    drawn = training_batches(pictures, config.batch_size, config.jitter, device, OWN)
    bar = tqdm(drawn, label, steps, leave=False, disable=None)
    for number, (x, y, shown) in enumerate(bar, start=1):
        parts = {name: total(part) for name, part in losses(model, x, y).items()}
        loss = sum(parts.values())
        # read at every step: from NaN the first stage's boxes would end in an index error
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"{label}: the loss is not finite at step {number}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        sums.append(torch.stack([part.detach() for part in parts.values()]) * shown)
    means = (sum_losses(sums, label) / len(pictures.x)).tolist()
    return {"train_loss": sum(means)} | dict(zip(LOSSES, means, strict=True))


# --- evaluation -------------------------------------------------------------------------------


def evaluate(
    model: nn.Module, pictures: Pictures, config: Config, *, any_class: bool = False
) -> Evaluation:
    """With `any_class` whatever the network finds counts as litter."""
    model.eval()
    device = next(model.parameters()).device
    began, drawn = time.perf_counter(), batches(pictures.x, config.batch_size, device)
    found = [detect(model, x) for x in itertools.islice(drawn, OWN.start, None, OWN.step)]
    predictions = list(itertools.chain(*gather(found)))
    seconds = time.perf_counter() - began
    y = pictures.y
    if any_class:
        predictions = as_one_class(predictions)
        y = [one | {"labels": torch.ones_like(one["labels"])} for one in y]
    metrics, precision = coco_metrics(predictions, y, pictures.ignored)
    counted = list(map(outside, predictions, pictures.ignored))
    return Evaluation(counted, metrics, precision, count(counted, y), seconds)


# --- report -----------------------------------------------------------------------------------


def describe(data: Data, start: Start) -> dict:
    """metrics.json's numbers on the data and the network."""
    numbers = {"note": data.note, "start": start.about}
    for name in ("train", "val", "test"):
        counts = [len(one["boxes"]) for one in getattr(data, name).y]
        numbers[name] = {"pictures": len(counts), "clean": counts.count(0), "boxes": sum(counts)}
        if name != "train" and counts.count(0) < 50:
            print(f"{name}: few clean pictures to count false positives on: {counts.count(0)}")
    boxes = torch.cat([one["boxes"] for one in data.train.y])
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    numbers["box_sides"] = sides.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    levels = start.model.rpn.anchor_generator.sizes
    anchors = sorted({float(side) for level in levels for side in level})
    fit = float((anchor_overlap(boxes, anchors) >= 0.5).double().mean())
    numbers |= {"anchor_sides": anchors, "boxes_with_anchor_of_iou_50": fit}
    numbers["parameters"] = sum(part.numel() for part in start.model.parameters())
    print(f"start: {start.about}; {fit:.0%} of the boxes have an anchor of IoU 0.5")
    return {"data": numbers}


def summarise(evaluated: dict[str, Evaluation], data: Data, config: Config) -> dict:
    """metrics.json's numbers of the trained network; both confidences are chosen on validation."""
    counts = evaluated["val"].counts
    threshold = working_confidence(counts, config.max_false_positives)
    best = working_confidence(counts)
    metrics = {"threshold": threshold, "best_f1_threshold": best}
    for split, one in evaluated.items():
        metrics[split] = one.metrics | at_confidence(one.counts, threshold)
        metrics[split] |= {f"best_f1_{k}": v for k, v in at_confidence(one.counts, best).items()}
        by_label = metrics[split].pop("ap_per_label")
        if len(data.classes) > 1:
            names = dict(enumerate(data.classes, start=1))
            metrics[split]["ap_per_class"] = {names[int(k)]: v for k, v in by_label.items()}
    test, kept = data.test, [above(one, threshold) for one in evaluated["test"].predictions]
    if test.confounders:
        numbers = false_positives_on(test.confounders, kept, test.y, len(CONFOUNDERS))
        shares = [taken / max(there, 1) for there, taken in zip(*numbers, strict=True)]
        metrics["confounders_with_false_positive"] = dict(zip(CONFOUNDERS, shares, strict=True))
    return metrics


def timing(history: list[dict], data: Data, seconds: float) -> dict[str, float]:
    return {
        "train_images_per_second": len(data.train.x)
        / median(row["train_seconds"] for row in history),
        "predict_images_per_second": len(data.test.x) / seconds,
    }


def save_model(model: nn.Module, config: Config, metrics: dict, run: Path) -> None:
    """model.pt: all that predict.py needs; its weights load into torchvision's own detector."""
    description = {
        "project": "faster_rcnn_litter",
        "architecture": config.architecture,
        "classes": list(config.classes),
        "image_size": config.image_size,
        "threshold": metrics["threshold"],
        "best_f1_threshold": metrics["best_f1_threshold"],
        "eps": frozen_eps(model),
        "sides": [float(part[0]) for part in model.rpn.anchor_generator.sizes],
        "weights": plain_state(model),
    }
    save(run / "model.pt", description)


def headline(metrics: dict) -> dict[str, float]:
    names = ("ap50", "ap", "precision", "recall", "false_positives_per_clean_image")
    numbers = {name: metrics["test"][name] for name in names}
    return {name: value for name, value in numbers.items() if value is not None}


def plot_results(
    before: Evaluation | None,
    evaluated: dict[str, Evaluation],
    history: list[dict],
    data: Data,
    metrics: dict,
    run: Path,
) -> None:
    test, threshold, after = data.test, metrics["threshold"], evaluated["test"]
    title = f"{data.name}: test AP50 {after.metrics['ap50']:.2f}, AP {after.metrics['ap']:.2f}"
    try_plot(plot_curves, history, title, run / "curves.png")
    point = {"confidence": threshold} | metrics["test"]
    curves = {"after training": after.precision}
    if before:
        curves = {f"before training: {metrics['data']['start']}": before.precision} | curves
    try_plot(plot_precision_recall, curves, point, title, run / "precision_recall.png")
    counts = {name: one.counts for name, one in evaluated.items()}
    scores = {name: (one.confidence, f1_scores(one)) for name, one in counts.items()}
    try_plot(plot_f1, scores, metrics, title, run / "f1.png")
    kept = [above(one, threshold) for one in after.predictions]
    outcomes = list(map(outcome, kept, test.y))
    try_plot(plot_detections, test.x, outcomes, title, run / "examples.png")
    wrong, misses = mistakes(kept, test.y)
    try_plot(plot_mistakes, test.x, wrong, misses, title, run / "mistakes.png")


if __name__ == "__main__":
    run_main(main, DataError)
