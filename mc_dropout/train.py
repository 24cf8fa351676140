"""Monte Carlo dropout against ordinary dropout, in paired runs of a small CNN on digits.

Each run trains one network. Standard dropout switches its dropout off at inference; MC dropout
leaves it on and averages the probabilities of 1..T passes of the same weights.

Run it with `python mc_dropout/train.py`, or `python mc_dropout/train.py --dropout 0.5`.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Data, DataError, Images, as_float, batches, load, rotate
from model import (
    average_logits,
    average_probs,
    entropy,
    make_cnn,
    mc_logits,
    mutual_information,
    paired_difference,
    scores,
    spread,
    standard_logits,
    together,
)
from plots import plot_certainty, plot_passes, plot_reliability, plot_rotation
from run import finish_run, load_checkpoint, save, save_checkpoint, seed_everything, start_run


@dataclass(frozen=True)
class Config:
    """Names and types; values and their comments stand in config.yaml."""

    dataset: Literal["auto", "mnist", "folder", "digits"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: int
    image_size: int
    runs: int
    at_once: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    widths: tuple[int, ...]
    hidden: int
    dropout: float
    passes: int
    report_passes: int
    chunk_images: int
    chunk_passes: int
    train_images: int
    ood_angle: float

    def __post_init__(self) -> None:
        least = {"seed": 0, "weight_decay": 0, "image_size": 8, "runs": 2, "ood_angle": -360}
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(numbers[0], (str, Path)):
                continue
            if name in least and min(numbers) < least[name]:
                raise ValueError(f"{name}: expected at least {least[name]}, found {min(numbers)}")
            if name not in least and not min(numbers) > 0:
                raise ValueError(f"{name}: expected more than 0, found {min(numbers)}")
        if not self.dropout < 1:
            raise ValueError(f"dropout: expected less than 1, found {self.dropout}")
        for name, most in (("report_passes", "passes"), ("at_once", "runs")):
            if getattr(self, name) > getattr(self, most):
                limit = f"at most {most} ({getattr(self, most)})"
                raise ValueError(f"{name}: expected {limit}, found {getattr(self, name)}")


class Outcome(NamedTuple):
    """What one run's network says; logits become scores here, so little is kept."""

    scores: dict[str, dict[str, dict[str, Tensor]]]  # [split][method][score]: () or (T,)
    auroc: dict[str, dict[str, Tensor]]  # [out of distribution][uncertainty]
    log_probs: dict[str, Tensor]  # [method] (N, C) of the test images


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    data = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        seed=config.seed,
    )
    print(data.note)
    data = data.to(device)
    networks, seconds = train(data, config, run)

    numbers = tqdm(range(config.runs), "evaluating", leave=False, disable=None)
    outcomes = [judge(networks[number], data, config, number) for number in numbers]
    metrics = summarise(outcomes, config)
    metrics["timing"] = {"train_seconds": seconds} | time_passes(networks[0], data.test.x, config)
    draw(metrics, outcomes, networks[0], data, config, run)
    finish_run(run, config, dataset=data.name, headline=headline(metrics, config), metrics=metrics)


# --- training ---------------------------------------------------------------------------------


def train(data: Data, config: Config, run: Path) -> tuple[list[nn.Sequential], float]:
    """The trained networks of all runs, `at_once` of them at a time, and the seconds it took."""
    networks = [new_network(data, config, number) for number in range(config.runs)]
    seconds = 0.0
    for first in range(0, config.runs, config.at_once):
        group = dict(enumerate(networks[first : first + config.at_once], first))
        rows = fit(group, data.train, data.val, config, run)
        seconds += sum(row["seconds"] for row in rows)
    return networks, seconds


def new_network(data: Data, config: Config, number: int) -> nn.Sequential:
    seed_everything(config.seed, "initialisation", number)
    network = make_cnn(
        channels=data.train.x.shape[1],
        classes=len(data.classes),
        widths=config.widths,
        hidden=config.hidden,
        dropout=config.dropout,
    )
    return network.to(data.train.x.device, memory_format=torch.channels_last)


def fit(
    group: dict[int, nn.Sequential], train: Images, val: Images, config: Config, run: Path
) -> list[dict]:
    """Leaves in each network its weights of the best validation loss; a row per epoch and run.

    `group` holds, by the number of their run, the networks that are trained together.
    """
    stage = f"runs {min(group)}-{max(group)}"
    steps = math.ceil(len(train.x) / config.batch_size)
    parameters, forward = together(list(group.values()))
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    total = config.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=total)
    parts = {f"network{number}": network for number, network in group.items()}
    parts |= {"optimizer": optimizer, "schedule": schedule}
    history = load_checkpoint(run, stage, parts)
    rows = [row for row in history if row["stage"] == stage]

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    for epoch in range(len(rows) // len(group) + 1, config.epochs + 1):
        label, began = f"{stage} epoch {epoch}", time.perf_counter()
        drawn = draw_batches(train, list(group), config, epoch)
        losses = train_one_epoch(
            forward, tqdm(drawn, label, steps, False, disable=None), step, label
        )
        seconds = (time.perf_counter() - began) / len(group)
        for (number, network), loss in zip(group.items(), losses, strict=True):
            row = {"stage": stage, "run": number, "epoch": epoch, "seconds": seconds}
            row |= {"train_loss": loss} | validate(network, val, config.chunk_images)
            rows.append(row)
            if row["val_loss"] == min(old["val_loss"] for old in rows if old["run"] == number):
                weights = {name: value.clone() for name, value in network.state_dict().items()}
                save(run / f"network{number}.pt", weights)
            print("  ".join(f"{n} {x:.4g}" for n, x in row.items() if n != "stage"))
        history += rows[-len(group) :]
        save_checkpoint(run, stage, parts, history)
    for number, network in group.items():
        best = torch.load(run / f"network{number}.pt", map_location="cpu", weights_only=True)
        network.load_state_dict(best)
    return rows


def draw_batches(
    train: Images, numbers: list[int], config: Config, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch; a run's order does not hang on how many are trained at once."""
    orders = []
    for number in numbers:
        seed_everything(config.seed, "order", number, epoch)
        orders.append(torch.randperm(len(train.x)))
    seed_everything(config.seed, "masks", min(numbers), epoch)
    return batches(train, config.batch_size, torch.stack(orders))


def train_one_epoch(forward: Callable, drawn: Iterable, step: Callable, label: str) -> list[float]:
    """Each network's mean loss per image. Raises FloatingPointError if a loss was not finite."""
    losses, images = [], 0
    for x, y in drawn:
        logits = forward(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        loss = loss.view(y.shape).sum(1)
        step(loss.sum() / y.shape[1])  # a sum over networks: their gradients do not mix
        losses.append(loss.detach())
        images += y.shape[1]
    losses = torch.stack(losses)  # read once per epoch: the loop never waits for the device
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).any(1).nonzero()[0]) + 1
        raise FloatingPointError(f"{label}: the loss is not finite at step {first}")
    return (losses.sum(0) / images).tolist()


def validate(network: nn.Sequential, val: Images, chunk_images: int) -> dict[str, float]:
    """Loss in nats and accuracy, dropout off."""
    logits = standard_logits(network, as_float(val.x), chunk_images).double()
    accuracy = (logits.argmax(1) == val.y).double().mean()
    return {"val_loss": float(F.cross_entropy(logits, val.y)), "val_accuracy": float(accuracy)}


# --- evaluation -------------------------------------------------------------------------------


def judge(network: nn.Sequential, data: Data, config: Config, number: int) -> Outcome:
    """Standard and MC dropout of run `number`: the same weights, the same images."""
    known, some = data.test, Images(*(part[: config.train_images] for part in data.train))
    numbers, kept = {}, {}
    for split, (x, y) in {"test": known, "train": some}.items():
        standard, logits = both_logits(network, as_float(x), config, number)
        mc = average_probs(logits)
        numbers[split] = {"standard": scores(standard.log_softmax(-1), y), "mc": scores(mc, y)}
        if split == "test":
            numbers[split]["logit_averaging"] = scores(average_logits(logits), y)
            kept["standard"] = standard.log_softmax(-1).cpu()
            kept["mc"] = mc[config.report_passes - 1].clone().cpu()
            inside = uncertainties(standard, logits[: config.report_passes])
    unknown = {"rotated": rotate(as_float(known.x), config.ood_angle)}
    if data.fashion is not None:
        unknown["fashion"] = as_float(data.fashion)
    auroc = {}
    for name, x in unknown.items():
        outside = uncertainties(*both_logits(network, x, config, number, config.report_passes))
        auroc[name] = {kind: detection(inside[kind], outside[kind]) for kind in inside}
    return Outcome(numbers, auroc, kept)


def both_logits(
    network: nn.Sequential, x: Tensor, config: Config, number: int, passes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) with dropout off and (passes, N, C) with dropout on, in double precision."""
    standard = standard_logits(network, x, config.chunk_images)
    stochastic = mc_logits(
        network,
        x,
        passes=passes or config.passes,
        seed=1000 * config.seed + number,
        chunk_images=config.chunk_images,
        chunk_passes=config.chunk_passes,
    )
    return standard.double(), stochastic.double()


def uncertainties(standard: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Each measure (N,) in nats, from logits (N, C) and (T, N, C)."""
    return {
        "standard_entropy": entropy(standard.log_softmax(-1)),
        "mc_entropy": entropy(average_probs(logits)[-1]),
        "mutual_information": mutual_information(logits),
    }


def detection(inside: Tensor, outside: Tensor) -> Tensor:
    """AUROC (): how often an image from outside is the less certain one of a pair."""
    from sklearn.metrics import roc_auc_score  # imported where it is used: it is slow

    truth = [0] * len(inside) + [1] * len(outside)
    return torch.tensor(roc_auc_score(truth, torch.cat([inside, outside]).cpu())).double()


def summarise(outcomes: list[Outcome], config: Config) -> dict:
    """metrics.json's numbers: mean and standard deviation over the runs, and paired differences.

    Lists run over the numbers of passes 1..T.
    """
    metrics = {"report_passes": config.report_passes}
    for split, methods in outcomes[0].scores.items():
        values = {
            method: {
                name: torch.stack([run.scores[split][method][name] for run in outcomes]).cpu()
                for name in found
            }
            for method, found in methods.items()
        }
        metrics[split] = {
            method: {name: plain(spread(value)) for name, value in found.items()}
            for method, found in values.items()
        }
        metrics[split]["mc_minus_standard"] = {
            name: plain(paired_difference(mc, values["standard"][name]))
            for name, mc in values["mc"].items()
        }
    metrics["ood_auroc"] = {
        unknown: {
            kind: plain(spread(torch.stack([run.auroc[unknown][kind] for run in outcomes])))
            for kind in kinds
        }
        for unknown, kinds in outcomes[0].auroc.items()
    }
    return metrics


def plain(numbers: dict[str, Tensor]) -> dict[str, float | list[float]]:
    return {name: value.numpy().round(7).tolist() for name, value in numbers.items()}


def time_passes(network: nn.Sequential, x: Tensor, config: Config) -> dict[str, float]:
    """Seconds per 10,000 images: medians of three goes at 2,000 test images, repeated if fewer."""
    x = as_float(x[torch.arange(2000, device=x.device) % len(x)])
    sizes = {"chunk_images": config.chunk_images, "chunk_passes": config.chunk_passes}
    calls = {"standard": lambda: standard_logits(network, x, config.chunk_images)}
    for passes in (1, 10, 100):
        calls[f"passes_{passes}"] = lambda t=passes: mc_logits(
            network, x, passes=t, seed=0, **sizes
        )
    timing = {}
    for name, call in calls.items():
        call()  # warm-up
        timing[f"{name}_seconds_per_10000"] = 5 * median(stopwatch(call) for _ in range(3))
    return timing


def stopwatch(call: Callable) -> float:
    began = time.perf_counter()
    call().sum().item()  # waits for the device
    return time.perf_counter() - began


# --- report -----------------------------------------------------------------------------------


def headline(metrics: dict, config: Config) -> dict[str, float]:
    at, test, timing = config.report_passes - 1, metrics["test"], metrics["timing"]
    numbers = {}
    for name in ("accuracy", "nll", "ece"):
        numbers[f"standard_{name}"] = test["standard"][name]["mean"]
        numbers[f"mc_{name}"] = test["mc"][name]["mean"][at]
    ratio = timing["passes_100_seconds_per_10000"] / timing["passes_1_seconds_per_10000"]
    return numbers | {"cost_ratio_100_passes": ratio}


def draw(
    metrics: dict,
    outcomes: list[Outcome],
    network: nn.Sequential,
    data: Data,
    config: Config,
    run: Path,
) -> None:
    """The pictures of a run; those of single images are of run 0."""
    plot_passes(metrics, data.name, config.runs, run / "passes.png")
    log_probs = {
        method: torch.stack([one.log_probs[method] for one in outcomes])
        for method in ("standard", "mc")
    }
    y, numbers = data.test.y.cpu(), headline(metrics, config)
    ece = {method: numbers[f"{method}_ece"] for method in log_probs}
    plot_reliability(log_probs, y, ece, data.name, run / "reliability.png")
    images, probs = data.test.x.cpu(), log_probs["mc"][0].exp()
    plot_certainty(images, y, probs, data.classes, data.name, run / "certainty.png")

    one = as_float(data.test.x[(data.test.y == 1).nonzero()[0]])  # a "1", as in the paper
    angles = list(range(0, 181, 15))
    turned = torch.cat([rotate(one, angle) for angle in angles])
    standard, logits = both_logits(network, turned, config, number=0)
    probs = {"standard": standard.softmax(-1).cpu(), "mc": logits.softmax(-1).cpu()}
    plot_rotation(turned.cpu(), angles, probs, data.classes, data.name, run / "rotation.png")


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
