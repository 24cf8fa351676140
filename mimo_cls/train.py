"""A MIMO ensemble (Havasi et al. 2021) beside its deterministic twin, a Wide ResNet of one member.

The ensemble's network takes M images and gives M predictions. It learns from M independent images;
in testing it is given one image M times, and its predictions are averaged: an ensemble for one
forward pass. The twin sees as many images, and costs as much compute.

Run it with `python mimo_cls/train.py`, or `python mimo_cls/train.py --members 3`.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data import Data, DataError, add_noise, blur, load, testing_batches, training_batches
from model import (
    MimoWideResNet,
    diversity,
    ensemble_log_probs,
    entropy,
    mimo_loss,
    mutual_information,
    overhead,
    scores,
)
from plots import (
    plot_corruption,
    plot_curves,
    plot_disagreement,
    plot_reliability,
    plot_study,
)
from run import finish_run, load_checkpoint, save, save_checkpoint, seed_everything, start_run

CORRUPTIONS = {"noise": (0.05, 0.1, 0.15, 0.2, 0.3), "blur": (0.5, 1.0, 1.5, 2.0, 3.0)}
CORRUPT = {"noise": add_noise, "blur": blur}
LEAST = {"seed": 0, "input_repetition": 0, "study_repetitions": 0, "warmup_epochs": 0}
LEAST |= {"weight_decay": 0, "image_size": 8, "train_images": 10, "test_images": 10}
MOST = {"input_repetition": 1, "study_repetitions": 1, "drops": 1, "drop_factor": 1}
MOST |= {"image_size": 128}


@dataclass(frozen=True)
class Config:
    """Names and types; values and their comments stand in config.yaml."""

    dataset: Literal["auto", "cifar10", "folder", "digits"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: int
    ood_dir: Path
    image_size: int
    train_images: int
    test_images: int
    flip: bool
    members: int
    input_repetition: float
    batch_repetition: int
    depth: int
    width: int
    epochs: int
    batch_size: int
    lr: float
    warmup_epochs: int
    schedule: Literal["cosine", "steps"]
    drops: tuple[float, ...]
    drop_factor: float
    weight_decay: float
    precision: Literal["auto", "float32", "bfloat16"]
    test_batch_size: int
    timed_images: int
    study: bool
    study_members: tuple[int, ...]
    study_repetitions: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(numbers[0], (bool, str, Path)):
                continue
            if name in LEAST and min(numbers) < LEAST[name]:
                raise ValueError(f"{name}: expected at least {LEAST[name]}, found {min(numbers)}")
            if name not in LEAST and not min(numbers) > 0:
                raise ValueError(f"{name}: expected more than 0, found {min(numbers)}")
            if name in MOST and max(numbers) > MOST[name]:
                raise ValueError(f"{name}: expected at most {MOST[name]}, found {max(numbers)}")
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth: expected 10, 16, 22, 28, ..., found {self.depth}")
        if self.warmup_epochs >= self.epochs:
            limit = f"fewer than epochs ({self.epochs})"
            raise ValueError(f"warmup_epochs: expected {limit}, found {self.warmup_epochs}")


class Plan(NamedTuple):
    """A network and how it is trained. In an epoch each member sees each image passes *
    batch_repetition times, whatever the plan, so equal epochs are equal compute.
    """

    name: str
    members: int
    input_repetition: float
    batch_repetition: int
    passes: int  # through the training images in an epoch


class Trained(NamedTuple):
    """A network with its weights of the lowest validation NLL, and its rows of history.csv."""

    model: MimoWideResNet
    rows: list[dict]


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    data = load_data(config).to(device)
    metrics = {"overhead": count(data, config)}

    single = fit(twin_plan(config), data, config, run)
    mimo = fit(mimo_plan(config.members, config.input_repetition, config), data, config, run)
    metrics |= test(single.model, mimo.model, data, config)
    if config.study:
        metrics["study"] = study(data, config, run)
    metrics["timing"] = {
        "single_train_seconds": sum(row["seconds"] for row in single.rows),
        "mimo_train_seconds": sum(row["seconds"] for row in mimo.rows),
    } | time_forward(single.model, mimo.model, data.test.x, config)
    draw(metrics, single, mimo, data, config, run)
    finish_run(run, config, dataset=data.name, headline=headline(metrics), metrics=metrics)


def load_data(config: Config) -> Data:
    data = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        ood_dir=config.ood_dir,
        image_size=config.image_size,
        train_images=config.train_images,
        test_images=config.test_images,
        flip=config.flip,
        seed=config.seed,
    )
    print(data.note)
    return data


def count(data: Data, config: Config) -> dict[str, float]:
    """Parameters and multiply-adds, and what MIMO has more than its twin."""
    numbers = overhead(
        config.depth,
        config.width,
        members=config.members,
        classes=len(data.classes),
        image_size=data.train.x.shape[-1],
    )
    print(
        f"WRN-{config.depth}-{config.width}, M = {config.members}: {numbers['parameters']:,} "
        f"parameters (+{numbers['parameters_percent']:.3g}%), {numbers['multiply_adds']:,} "
        f"multiply-adds per image (+{numbers['multiply_adds_percent']:.3g}%)"
    )
    return numbers


# --- training ---------------------------------------------------------------------------------


def twin_plan(config: Config) -> Plan:
    """One member has nothing to gain from repetition within a batch: it takes more steps."""
    return Plan("single", 1, 0.0, 1, config.batch_repetition)


def mimo_plan(members: int, input_repetition: float, config: Config) -> Plan:
    name = f"M{members}-rho{input_repetition:g}"
    return Plan(name, members, input_repetition, config.batch_repetition, 1)


def fit(plan: Plan, data: Data, config: Config, run: Path) -> Trained:
    """Train by `plan`. What a killed run has done of it is not done again."""
    seed_everything(config.seed, "initialisation")
    model = MimoWideResNet(
        config.depth, config.width, members=plan.members, classes=len(data.classes)
    ).to(data.train.x.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    parts = {"model": model, "optimizer": optimizer}
    history = load_checkpoint(run, plan.name, parts)
    rows = [row for row in history if row["stage"] == plan.name]
    for epoch in range(len(rows) + 1, config.epochs + 1):
        seed_everything(config.seed, plan.name, epoch)
        began = time.perf_counter()
        loss = train_one_epoch(model, optimizer, plan, data, config, epoch)
        seconds = time.perf_counter() - began
        row = {"stage": plan.name, "epoch": epoch, "seconds": seconds, "train_loss": loss}
        rows.append(row | validate(predict(model, data.val.x, config), data.val.y))
        if rows[-1]["val_nll"] == min(row["val_nll"] for row in rows):
            save(run / f"{plan.name}.pt", model.state_dict())
        history.append(rows[-1])
        save_checkpoint(run, plan.name, parts, history)
        print("  ".join([plan.name, *(f"{n} {x:.4g}" for n, x in list(rows[-1].items())[1:])]))
    best = torch.load(run / f"{plan.name}.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(best)
    return Trained(model, rows)


def train_one_epoch(
    model: MimoWideResNet,
    optimizer: torch.optim.SGD,
    plan: Plan,
    data: Data,
    config: Config,
    epoch: int,
) -> float:
    """Mean loss per member and input. Raises FloatingPointError if a loss was not finite."""
    model.train()
    steps = plan.passes * max(1, len(data.train.x) // config.batch_size)
    label, device = f"{plan.name} epoch {epoch}", data.train.x.device.type
    half, losses = use_bfloat16(config), []
    batches = tqdm(draw_batches(plan, data, config), label, steps, leave=False, disable=None)
    for step, (x, y) in enumerate(batches):
        rate = learning_rate(config, epoch - 1 + (step + 1) / steps, len(data.train.x))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = model(x)
        loss = mimo_loss(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() / plan.members)
    losses = torch.stack(losses)  # read once per epoch: the loop never waits for the device
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).nonzero()[0]) + 1
        raise FloatingPointError(f"{label}: the loss is not finite at step {first}")
    return float(losses.mean())


def draw_batches(plan: Plan, data: Data, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(plan.passes):
        yield from training_batches(
            data.train,
            config.batch_size,
            members=plan.members,
            input_repetition=plan.input_repetition,
            batch_repetition=plan.batch_repetition,
            flip=data.flip,
        )


def learning_rate(config: Config, epochs: float, images: int) -> float:
    """The rate after `epochs`, for as many different images as a step has: not counting copies."""
    peak = config.lr * min(config.batch_size, images) / 128
    if epochs <= config.warmup_epochs:
        return peak * epochs / config.warmup_epochs
    if config.schedule == "steps":
        return peak * config.drop_factor ** sum(epochs > at * config.epochs for at in config.drops)
    done = (epochs - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return peak * (1 + math.cos(math.pi * done)) / 2


def use_bfloat16(config: Config) -> bool:
    """With `auto`, where the device multiplies in bfloat16 faster than in float32."""
    if config.precision == "auto":
        return config.device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return config.precision == "bfloat16"


# --- evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: MimoWideResNet, x: Tensor, config: Config) -> Tensor:
    """log p_m (N, M, C) in double precision of uint8 images (N, 3, H, W), all of them in order."""
    model.eval()
    batches = testing_batches(x, config.test_batch_size, model.members)
    return torch.cat([model(part) for part in batches]).double().log_softmax(-1)


def validate(log_probs: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy and NLL of the ensemble and of each member, and how much members differ."""
    answers = {"": ensemble_log_probs(log_probs)}
    if log_probs.shape[1] > 1:
        answers |= {f"member{m}_": part for m, part in enumerate(log_probs.unbind(1), 1)}
    numbers = {name: scores(answer, y) for name, answer in answers.items()}
    row = {f"val_{n}{key}": numbers[n][key] for n in numbers for key in ("accuracy", "nll")}
    return row | {f"val_{name}": value for name, value in diversity(log_probs).items()}


def both_answers(single: MimoWideResNet, mimo: MimoWideResNet, x: Tensor, config: Config) -> dict:
    """log p (N, C) of the twin, of the ensemble and of each of its members."""
    log_probs = predict(mimo, x, config)
    answers = {"single": predict(single, x, config)[:, 0]}
    answers["ensemble"] = ensemble_log_probs(log_probs)
    return answers | {f"member{m}": part for m, part in enumerate(log_probs.unbind(1), 1)}


def test(single: MimoWideResNet, mimo: MimoWideResNet, data: Data, config: Config) -> dict:
    """metrics.json's numbers; the test images are used here and in the study."""
    x, y = data.test
    known = both_answers(single, mimo, x, config)
    metrics = {name: scores(answer, y) for name, answer in known.items()}
    for kind, severities in CORRUPTIONS.items():
        for severity in severities:
            answers = both_answers(single, mimo, CORRUPT[kind](x, severity), config)
            for name, answer in answers.items():
                numbers = scores(answer, y)
                numbers["error"] = 1 - numbers["accuracy"]
                kept = metrics[name].setdefault(kind, {"error": [], "nll": [], "ece": []})
                for score, values in kept.items():
                    values.append(numbers[score])
    for strange, images in data.strange.items():
        answers = both_answers(single, mimo, images, config)
        for name, answer in answers.items():
            kept = metrics[name].setdefault("ood_auroc", {})
            kept[strange] = detection(entropy(known[name]), entropy(answer))
    metrics["diversity"] = diversity(predict(mimo, x, config))
    return metrics


def detection(inside: Tensor, outside: Tensor) -> float:
    """AUROC: how often a strange image has more entropy (N,) than a test image."""
    from sklearn.metrics import roc_auc_score  # imported where it is used: it is slow

    truth = [0] * len(inside) + [1] * len(outside)
    return float(roc_auc_score(truth, torch.cat([inside, outside]).cpu()))


def study(data: Data, config: Config, run: Path) -> list[dict]:
    """Test scores for every M and rho, all at the same compute; for M = 1 there is no rho."""
    pairs = [(m, rho) for m in config.study_members for rho in config.study_repetitions if m > 1]
    plans = [mimo_plan(m, rho, config) for m, rho in pairs]
    if 1 in config.study_members:
        plans.insert(0, twin_plan(config))
    found = []
    for plan in plans:
        log_probs = predict(fit(plan, data, config, run).model, data.test.x, config)
        row = {"members": plan.members, "input_repetition": plan.input_repetition}
        row |= scores(ensemble_log_probs(log_probs), data.test.y)
        alone = [scores(part, data.test.y)["accuracy"] for part in log_probs.unbind(1)]
        found.append(row | {"member_accuracy": mean(alone)} | diversity(log_probs))
    return found


@torch.no_grad()
def time_forward(
    single: MimoWideResNet, mimo: MimoWideResNet, x: Tensor, config: Config
) -> dict[str, float]:
    """Seconds of a forward pass, one network after the other 25 times, and the median of ratios."""
    x = x[torch.arange(config.timed_images, device=x.device) % len(x)]
    inputs = [next(testing_batches(x, len(x), model.members)) for model in (single, mimo)]
    calls = [lambda m=m, x=x: m(x) for m, x in zip((single, mimo), inputs, strict=True)]
    pairs = [[stopwatch(call) for call in calls] for _ in range(27)][2:]  # warm-up
    return {
        "single_forward_seconds": median(pair[0] for pair in pairs),
        "mimo_forward_seconds": median(pair[1] for pair in pairs),
        "forward_percent": 100 * (median(pair[1] / pair[0] for pair in pairs) - 1),
    }


def stopwatch(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    call().sum().item()  # waits for the device
    return time.perf_counter() - began


# --- report -----------------------------------------------------------------------------------


def headline(metrics: dict) -> dict[str, float]:
    names = ("accuracy", "nll", "ece")
    numbers = {f"{who}_{n}": metrics[who][n] for who in ("ensemble", "single") for n in names}
    numbers["disagreement"] = metrics["diversity"]["disagreement"]
    return numbers | {"parameter_overhead_percent": metrics["overhead"]["parameters_percent"]}


def draw(
    metrics: dict, single: Trained, mimo: Trained, data: Data, config: Config, run: Path
) -> None:
    """The pictures of a run."""
    title = f"{data.name}, WRN-{config.depth}-{config.width}, M = {config.members}"
    plot_curves(single.rows, mimo.rows, metrics, title, run / "curves.png")
    plot_corruption(metrics, CORRUPTIONS, title, run / "corruption.png")
    x, y = data.test
    known = both_answers(single.model, mimo.model, x, config)
    known = {name: answer.cpu() for name, answer in known.items()}
    plot_reliability(known, y.cpu(), metrics, title, run / "reliability.png")
    log_probs = predict(mimo.model, x, config)
    most = mutual_information(log_probs).argsort(descending=True, stable=True)[:8]
    images = (part[most].cpu() for part in (x, y, log_probs.exp()))
    plot_disagreement(*images, data.classes, title, run / "disagreement.png")
    if config.study:
        plot_study(metrics["study"], title, run / "study.png")


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
