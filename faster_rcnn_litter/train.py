"""Faster R-CNN finds litter on the forest floor, and leaves puddles, blossoms and berries alone.

With COCO weights a detector of torchvision's is fine-tuned; without them, and without a GPU, a
small one learns from nothing in minutes.

Run it with `python faster_rcnn_litter/train.py`, or `python faster_rcnn_litter/train.py
--predict PHOTOGRAPHS --weights results/RUN/detector.pt` to find litter on one's own photographs.
"""

import copy
import csv
import math
import pickle
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data import (
    Data,
    DataError,
    Pictures,
    batches,
    find_coco_weights,
    list_photos,
    load,
    read_photo,
    training_batches,
)
from model import (
    LOSSES,
    Counts,
    Sampling,
    above,
    alarms_on,
    anchor_overlap,
    as_one_class,
    at_confidence,
    coco_metrics,
    count,
    detect,
    fit_anchors,
    freeze_batchnorm,
    frozen_eps,
    losses,
    make_detector,
    mistakes,
    mix_precision,
    replace_head,
    working_confidence,
)
from plots import plot_curves, plot_examples, plot_mistakes, plot_photo, plot_precision_recall
from run import finish_run, load_checkpoint, save, save_checkpoint, seed_everything, start_run
from scenes import CONFOUNDERS, draw_split

WORDS = ("auto", "coco", "none")  # what weights may be other than a file
ARCHITECTURES = Literal[
    "small",
    "mobilenet_v3_large_320_fpn",
    "mobilenet_v3_large_fpn",
    "resnet50_fpn",
    "resnet50_fpn_v2",
]


@dataclass(frozen=True)
class Config:
    """Names and types; values and their comments stand in config.yaml."""

    dataset: Literal["auto", "folder", "scenes"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: int
    classes: tuple[str, ...]
    image_size: int
    scene_counts: tuple[int, ...]
    scene_pattern: str
    architecture: ARCHITECTURES
    weights: Path
    precision: Literal["auto", "float32", "bfloat16"]
    sampled_anchors: int
    sampled_regions: int
    proposals: int
    test_proposals: int
    epochs: int
    batch_size: int
    optimizer: Literal["adamw", "sgd"]
    lr: float
    weight_decay: float
    schedule: Literal["cosine", "step"]
    warmup: float
    ema: float
    jitter: float
    patience: int
    max_false_alarms: float
    predict: Path

    def __post_init__(self) -> None:
        least = dict.fromkeys(("seed", "weight_decay", "warmup", "ema", "max_false_alarms"), 0)
        least |= {"jitter": 1, "image_size": 32, "scene_counts": 2}
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(numbers[0], (str, Path)):
                continue
            if name in least and min(numbers) < least[name]:
                raise ValueError(f"{name}: expected at least {least[name]}, found {min(numbers)}")
            if name not in least and not min(numbers) > 0:
                raise ValueError(f"{name}: expected more than 0, found {min(numbers)}")
        for name in ("warmup", "ema"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected less than 1, found {getattr(self, name)}")
        if len(self.scene_counts) != 3:
            raise ValueError(f"scene_counts: expected three numbers, found {self.scene_counts}")
        try:
            re.compile(self.scene_pattern)
        except re.error as error:
            raise ValueError(f"scene_pattern: expected a regular expression: {error}") from None
        if len(set(self.classes)) < len(self.classes) or not all(self.classes):
            raise ValueError(f"classes: expected different names, found {self.classes}")
        if self.predict.name != "none" and self.weights.name in WORDS:
            raise ValueError("predict: expected --weights with the detector.pt of a run beside it")


class Judged(NamedTuple):
    """Predictions on a split, and what was counted."""

    predictions: list[dict]
    metrics: dict
    precision: list[float]  # at recall 0, 0.01, ..., 1
    counts: Counts
    seconds: float  # for the predictions


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    if config.predict.name != "none":
        find_litter(config, run, device)
        return
    data = load_data(config)
    model, before, start = new_model(config, data, device)
    metrics = describe(data, model, start)
    first = judge(before, data.test, config, any_class=before is not model)
    history = fit(model, data, config, run)

    judged = {"val": judge(model, data.val, config), "test": judge(model, data.test, config)}
    threshold = working_confidence(judged["val"].counts, config.max_false_alarms)
    save_detector(model, config, threshold, run)
    metrics |= {"before": first.metrics} | report(judged, data, threshold)
    metrics["timing"] = timing(history, data, judged["test"].seconds)
    draw(first, judged["test"], history, data, metrics, run)
    finish_run(run, config, dataset=data.name, headline=headline(metrics), metrics=metrics)


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
    print(data.note)
    return data


# --- the network ------------------------------------------------------------------------------


def new_model(config: Config, data: Data, device: torch.device) -> tuple[nn.Module, nn.Module, str]:
    """The detector to train, the one that is "before", and in words what they begin with."""
    seed_everything(config.seed, "initialisation")
    sides = fit_anchors(torch.cat([one["boxes"] for one in data.train.y]))
    start = "random weights"
    if config.weights.name not in WORDS:
        saved = read_detector(config.weights)
        if (saved["architecture"], saved["classes"]) != (config.architecture, list(data.classes)):
            raise DataError(f"weights: {config.weights} are of another architecture or classes")
        model = restore(saved, config).to(device)
        return model, model, f"weights of {config.weights.parent.name}/{config.weights.name}"
    if config.weights.name == "coco" or (
        config.weights.name == "auto" and config.architecture != "small"
    ):
        try:
            find_coco_weights(config.architecture, config.data_dir)
            before = build(config, len(data.classes), sides, coco=True)
            model = copy.deepcopy(before)
            replace_head(model, 1 + len(data.classes))
            return model.to(device), before.to(device), "COCO weights"
        except DataError as error:
            if config.weights.name == "coco":
                raise
            start = f"random weights, as {error}"
    model = build(config, len(data.classes), sides, coco=False).to(device)
    return model, model, start


def build(config: Config, classes: int, sides: list[float], *, coco: bool) -> nn.Module:
    """With `classes` and the background, or with COCO's. Raises DataError on broken weights."""
    sampling = Sampling(
        config.sampled_anchors, config.sampled_regions, config.proposals, config.test_proposals
    )
    options = {"classes": 1 + classes, "sampling": sampling, "sides": sides, "coco": coco}
    try:
        model = make_detector(config.architecture, **options)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise DataError(f"COCO weights: {str(error).splitlines()[0]}") from error
    return mix_precision(model, use_bfloat16(config))


def use_bfloat16(config: Config) -> bool:
    """With `auto`, where the device multiplies in bfloat16 faster than in float32."""
    if config.precision == "auto":
        return config.device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return config.precision == "bfloat16"


def save_detector(model: nn.Module, config: Config, threshold: float, run: Path) -> None:
    """All that --predict needs, in one file."""
    saved = {"architecture": config.architecture, "classes": list(config.classes)}
    saved |= {"image_size": config.image_size, "threshold": threshold, "eps": frozen_eps(model)}
    saved["sides"] = [float(part[0]) for part in model.rpn.anchor_generator.sizes]
    save(run / "detector.pt", saved | {"model": model.state_dict()})


def read_detector(path: Path) -> dict:
    """What save_detector wrote. Raises DataError if `path` is no such file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        saved = None
    if not isinstance(saved, dict) or not {"architecture", "threshold", "model"} <= saved.keys():
        raise DataError(f"weights: expected the detector.pt of a run, found {path}")
    return saved


def restore(saved: dict, config: Config) -> nn.Module:
    """The network of a detector.pt, with batch normalisation frozen if it was."""
    config = replace(config, architecture=saved["architecture"])
    model = build(config, len(saved["classes"]), saved["sides"], coco=False)
    if saved["eps"] is not None:
        freeze_batchnorm(model, saved["eps"])
    model.load_state_dict(saved["model"])
    return model


# --- training ---------------------------------------------------------------------------------


def fit(model: nn.Module, data: Data, config: Config, run: Path) -> list[dict]:
    """Leaves the averaged weights of the best validation AP in `model`; returns a row per epoch."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    steps = math.ceil(len(data.train.x) / config.batch_size)
    optimizer, schedule = make_optimizer(model, config, config.epochs * steps)
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    history = load_checkpoint(run, "train", parts)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)

    while len(history) < config.epochs and not stalled(history, config.patience):
        epoch = len(history) + 1
        seed_everything(config.seed, "train", epoch)
        began = time.perf_counter()
        row = {"stage": "train", "epoch": epoch}
        row |= train_one_epoch(model, data.train, step, config, f"epoch {epoch}")
        row["seconds"] = time.perf_counter() - began
        validated = judge(average.module, data.val, config).metrics
        row |= {f"val_{name}": validated[name] for name in ("ap", "ap50", "ar100")}
        history.append(row)
        if row["val_ap"] == max(earlier["val_ap"] for earlier in history):
            save(run / "best.pt", average.module.state_dict())
        save_checkpoint(run, "train", parts, history)
        print("  ".join(f"{name} {x:.4g}" for name, x in row.items() if name != "stage"))
    best = torch.load(run / "best.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(best)
    return history


def stalled(history: list[dict], patience: int) -> bool:
    """Whether the last `patience` epochs brought no better validation AP."""
    scores = [row["val_ap"] for row in history]
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


def make_optimizer(model: nn.Module, config: Config, steps: int) -> tuple:
    """Warm-up to the peak rate, then the schedule."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(weights, config.lr, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            weights, config.lr, momentum=0.9, weight_decay=config.weight_decay
        )
    rising = config.warmup * steps

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / (steps - rising)
        if config.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 0.1 ** sum(step >= share * steps for share in (2 / 3, 8 / 9))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_one_epoch(
    model: nn.Module, pictures: Pictures, step: Callable, config: Config, label: str
) -> dict[str, float]:
    """Mean loss per picture and its parts. Raises FloatingPointError if it was not finite."""
    model.train()
    device = next(model.parameters()).device
    sums, steps = dict.fromkeys(LOSSES, 0.0), math.ceil(len(pictures.x) / config.batch_size)
    drawn = training_batches(pictures, config.batch_size, config.jitter, device)
    for number, (x, y) in enumerate(tqdm(drawn, label, steps, leave=False, disable=None), start=1):
        parts = losses(model, x, y)
        loss = sum(parts.values())
        # read at every step: from NaN the first stage's boxes would end in an index error
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"{label}: the loss is not finite at step {number}")
        step(loss)
        for name, part in parts.items():
            sums[name] += part.item() * len(x)
    means = {name: total / len(pictures.x) for name, total in sums.items()}
    return {"train_loss": sum(means.values())} | means


# --- evaluation -------------------------------------------------------------------------------


def judge(
    model: nn.Module, pictures: Pictures, config: Config, *, any_class: bool = False
) -> Judged:
    """With `any_class` whatever the network finds counts as litter."""
    model.eval()
    device = next(model.parameters()).device
    began, predictions = time.perf_counter(), []
    for x in batches(pictures.x, config.batch_size, device):
        predictions += detect(model, x)
    seconds = time.perf_counter() - began
    y = pictures.y
    if any_class:
        predictions = as_one_class(predictions)
        y = [one | {"labels": torch.ones_like(one["labels"])} for one in y]
    metrics, precision = coco_metrics(predictions, y)
    return Judged(predictions, metrics, precision, count(predictions, y), seconds)


# --- one's own photographs --------------------------------------------------------------------


def find_litter(config: Config, run: Path, device: torch.device) -> None:
    """Each photograph with its boxes as PNG, and boxes.csv in the photographs' own pixels."""
    saved = read_detector(config.weights)
    model = restore(saved, config).to(device).eval()
    rows, photos, unreadable = [], list_photos(config.predict), 0
    for path in tqdm(photos, "finding litter", leave=False, disable=None):
        try:
            picture, size = read_photo(path, saved["image_size"])
        except (OSError, SyntaxError) as error:  # Pillow's broken PNG is a SyntaxError
            unreadable += 1
            print(f"left out: {path} ({error})")
            continue
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        found = above(detect(model, [x.to(device).float() / 255])[0], saved["threshold"])
        plot_photo(x, found, saved["classes"], path.name, run / f"{path.stem}-litter.png")
        factor = torch.tensor([size[0] / x.shape[2], size[1] / x.shape[1]] * 2)
        corners = (found["boxes"] * factor).round(decimals=1).tolist()
        for box, label, score in zip(corners, found["labels"], found["scores"], strict=True):
            rows.append((path.name, saved["classes"][label - 1], f"{score:.4f}", *box))
    with (run / "boxes.csv").open("w", newline="", encoding="utf-8") as file:
        header = ("file", "class", "confidence", "x1", "y1", "x2", "y2")
        csv.writer(file).writerows([header, *rows])
    numbers = {
        "photographs": len(photos) - unreadable,
        "boxes": len(rows),
        "threshold": saved["threshold"],
    }
    finish_run(run, config, dataset=config.predict.name, headline=numbers, metrics={})


# --- report -----------------------------------------------------------------------------------


def describe(data: Data, model: nn.Module, start: str) -> dict:
    """metrics.json's numbers on the data and the network."""
    numbers = {"note": data.note, "start": start}
    for name in ("train", "val", "test"):
        pieces = [len(one["boxes"]) for one in getattr(data, name).y]
        numbers[name] = {"pictures": len(pieces), "clean": pieces.count(0), "boxes": sum(pieces)}
        if name != "train" and pieces.count(0) < 50:
            print(f"{name}: {pieces.count(0)} clean pictures are few to count false alarms on")
    boxes = torch.cat([one["boxes"] for one in data.train.y])
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    numbers["box_sides"] = sides.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    anchors = sorted({float(side) for level in model.rpn.anchor_generator.sizes for side in level})
    fit = float((anchor_overlap(boxes, anchors) >= 0.5).double().mean())
    numbers |= {"anchor_sides": anchors, "boxes_with_anchor_of_iou_50": fit}
    numbers["parameters"] = sum(part.numel() for part in model.parameters())
    print(f"start: {start}; {fit:.0%} of the boxes have an anchor of IoU 0.5")
    return {"data": numbers}


def report(judged: dict[str, Judged], data: Data, threshold: float) -> dict:
    """metrics.json's numbers of the trained network."""
    metrics = {"threshold": threshold}
    for split, one in judged.items():
        metrics[split] = one.metrics | at_confidence(one.counts, threshold)
    test, kept = data.test, [above(one, threshold) for one in judged["test"].predictions]
    if test.confounders:
        counts = alarms_on(test.confounders, kept, test.y, len(CONFOUNDERS))
        shares = [alarmed / max(there, 1) for there, alarmed in zip(*counts, strict=True)]
        metrics["confounders_with_false_alarm"] = dict(zip(CONFOUNDERS, shares, strict=True))
    return metrics


def timing(history: list[dict], data: Data, seconds: float) -> dict[str, float]:
    return {
        "train_images_per_second": len(data.train.x) / median(row["seconds"] for row in history),
        "predict_images_per_second": len(data.test.x) / seconds,
    }


def headline(metrics: dict) -> dict[str, float]:
    numbers = {name: metrics["test"][name] for name in ("ap", "ap50", "ar100")}
    alarms = metrics["test"]["false_alarms_per_clean_image"]
    if alarms is not None:
        numbers["false_alarms_per_clean_image"] = alarms
    return numbers | {"threshold": metrics["threshold"]}


def draw(
    before: Judged, after: Judged, history: list[dict], data: Data, metrics: dict, run: Path
) -> None:
    test, threshold = data.test, metrics["threshold"]
    result = f"AP50 {after.metrics['ap50']:.2f}, AP {after.metrics['ap']:.2f}"
    title = f"{data.name}: test {result}"
    plot_curves(history, title, run / "curves.png")
    point = {"confidence": threshold} | metrics["test"]
    start = metrics["data"]["start"].split(",")[0]
    curves = {f"before training: {start}": before.precision, "after training": after.precision}
    plot_precision_recall(curves, point, title, run / "precision_recall.png")
    kept = [above(one, threshold) for one in after.predictions]
    plot_examples(test.x, test.y, before.predictions, kept, title, run / "examples.png")
    alarms, misses = mistakes(kept, test.y)
    plot_mistakes(test.x, alarms, misses, title, run / "mistakes.png")


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
