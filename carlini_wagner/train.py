"""Carlini & Wagner's attack: as small a change of a picture as makes a network see what is asked.

Three ways side by side, all towards a given class: the project owner's criterion on probabilities,
the paper's on logits with a search over the constant c, and a fast one that decouples direction and
norm. What comes out are 8-bit PNGs, judged after they are read back from disk.

Run it with `python carlini_wagner/train.py`, or with `--kappa 5 --criteria logits,fast`.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    DataError,
    Examples,
    choose_digits,
    choose_target,
    load_digits,
    load_photographs,
    load_weights,
    through_disk,
)
from model import (
    SCORES,
    Found,
    SmallResNet,
    carlini_wagner,
    decoupled,
    distance,
    distances,
    frozen,
    join,
    look,
    margin,
    repair,
    torchvision_network,
)
from plots import plot_example, plot_matrix, plot_queries, plot_search
from run import finish_run, load_checkpoint, save, save_checkpoint, seed_everything, start_run


@dataclass(frozen=True)
class Config:
    """Names and types; values and their comments stand in config.yaml."""

    dataset: Literal["auto", "images", "digits"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: int
    images: tuple[str, ...]
    target: str
    image_size: int
    network: str
    weights: Path
    second_network: str
    second_weights: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digit_target: Literal["pairs", "next"]
    picture_count: int
    criteria: tuple[Literal["probability", "logits", "fast"], ...]
    kappa: float
    c: float
    rounds: int
    steps: int
    lr: float
    fast_steps: int
    repair_steps: int
    attack_batch: int
    scenes: int
    width: int
    epochs: int
    batch_size: int
    train_lr: float

    def __post_init__(self) -> None:
        for name, kind in self.__annotations__.items():
            if (
                kind in (int, float)
                and name not in ("seed", "kappa")
                and not getattr(self, name) > 0
            ):
                raise ValueError(f"{name}: expected more than 0, found {getattr(self, name)}")
        for name in ("seed", "kappa"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        if self.kappa > 1 and "probability" in self.criteria:
            raise ValueError(
                "kappa: expected at most 1 with the criterion probability, as no margin of "
                f"probabilities is larger, found {self.kappa}"
            )
        if not (self.target == "next" or self.target.isdigit()):
            raise ValueError(f"target: expected a class number or next, found '{self.target}'")
        if len(set(self.criteria)) < len(self.criteria):
            raise ValueError(f"criteria: expected each once, found {','.join(self.criteria)}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name}: expected three numbers, found {getattr(self, name)}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected more than 0, found {self.std}")


class Task(NamedTuple):
    """What is attacked: pictures (N, 3, H, W) of pixels k / 255, and two frozen networks."""

    name: str
    x: Tensor
    before: Tensor  # (N,), the class that the network sees
    target: Tensor  # (N,), the class that it has to see
    names: list[str]  # of the pictures
    classes: list[str]
    network: nn.Module
    second: nn.Module  # is shown the results, never asked during a search
    numbers: dict  # for metrics.json


class Outcome(NamedTuple):
    """What a criterion found, of all pictures, and what is left of it in the PNGs."""

    found: Found
    png: Tensor  # (N, 3, H, W), read back from disk
    queries: Tensor  # (N,), those of the repair included
    seconds: float


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    task = load_task(config, run, device)
    outcomes = {name: attack(name, task, config, run) for name in config.criteria}
    metrics = task.numbers | {
        name: measure(name, outcome, task, config.kappa) for name, outcome in outcomes.items()
    }
    draw(task, outcomes, metrics, run)
    numbers = headline(metrics, config)
    finish_run(run, config, dataset=task.name, headline=numbers, metrics=metrics)


# --- pictures and networks --------------------------------------------------------------------


def load_task(config: Config, run: Path, device: torch.device) -> Task:
    """`auto` is images, or digits where the pictures or the weights cannot be had."""
    if config.dataset == "digits":
        return digits_task(config, run, device)
    try:
        return images_task(config, device)
    except DataError as error:
        if config.dataset == "images":
            raise
        print(f"{error}; scenes of scikit-learn's digits stand in for it")
        return digits_task(config, run, device)


def images_task(config: Config, device: torch.device) -> Task:
    photographs = load_photographs(config.images, data_dir=config.data_dir, size=config.image_size)
    networks, classes = [], []
    for name, path in (
        (config.network, config.weights),
        (config.second_network, config.second_weights),
    ):
        weights = load_weights(path, name, config.data_dir)
        try:
            network = torchvision_network(name, weights.state, config.mean, config.std)
        except ValueError as error:
            raise DataError(f"weights: {path} are not those of {name}: {error}") from error
        networks.append(frozen(network).to(device))
        classes = classes or weights.classes
        if len(weights.classes) != len(classes):
            raise DataError(f"weights: {path} knows {len(weights.classes)} classes")
    x = photographs.x[: config.picture_count].to(device).float() / 255
    before = look(networks[0], x)[0].argmax(1)
    target = choose_target(before, config.target, len(classes))
    kept = (before != target).nonzero()[:, 0]
    if not len(kept):
        raise DataError(f"target: the network sees {classes[int(target[0])]} everywhere already")
    bad = photographs.bad
    numbers = {"pictures": len(kept), "unreadable": len(bad), "already_target": len(x) - len(kept)}
    print(f"data: images, {numbers}{', first: ' + bad[0] if bad else ''}")
    names = [photographs.names[number] for number in kept.tolist()]
    return Task("images", x[kept], before[kept], target[kept], names, classes, *networks, numbers)


def digits_task(config: Config, run: Path, device: torch.device) -> Task:
    """Test scenes that the network sees rightly, with their targets; two networks trained here."""
    digits = load_digits(train_count=config.scenes, seed=config.seed)
    print("data: scenes of scikit-learn's digits")
    networks = []
    for stage in ("train", "train-second"):
        seed_everything(config.seed, stage)
        network = SmallResNet(width=config.width, classes=10).to(device)
        fit(network, stage, digits.train.to(device), digits.val.to(device), config, run)
        networks.append(frozen(network))
    test = digits.test.to(device)
    names = ("test_accuracy", "second_test_accuracy")
    numbers = {n: evaluate(network, test)[1] for n, network in zip(names, networks, strict=True)}
    right = look(networks[0], test.x.float() / 255)[0].argmax(1) == test.y
    pairs = config.digit_target == "pairs"
    chosen, target = choose_digits(
        test.y.cpu(), right.cpu(), pairs=pairs, count=config.picture_count
    )
    x, before = test.x[chosen].float() / 255, test.y[chosen]
    names = [f"test scene {number}" for number in chosen.tolist()]
    classes = [str(digit) for digit in range(10)]
    numbers["pictures"] = len(x)
    target = target.to(device)
    return Task("digits", x, before, target, names, classes, *networks, numbers)


def fit(
    model: nn.Module, stage: str, train: Examples, val: Examples, config: Config, run: Path
) -> None:
    """Leaves the weights of the best validation accuracy in `model`; kept in `data_dir`, too."""
    names = ("seed", "scenes", "width", "epochs", "batch_size", "train_lr")
    key = (stage, *(getattr(config, name) for name in names))
    code = hashlib.sha256(repr((*key, train.x.device.type, torch.__version__)).encode()).hexdigest()
    cache, best = config.data_dir / f"{stage}-{code[:12]}.pt", run / f"{stage}.pt"
    history = load_checkpoint(run, stage, {})
    others = [row for row in history if row["stage"] != stage]
    if len(history) - len(others) < config.epochs and cache.exists():
        kept = torch.load(cache, map_location="cpu", weights_only=True)
        save(best, kept["model"])
        save_checkpoint(run, stage, {}, others + kept["history"])
        print(f"{stage}: weights from {cache}")
    elif len(history) - len(others) < config.epochs:
        rows = fit_anew(model, stage, train, val, config, run)
        with suppress(OSError):  # a folder that may only be read
            cache.parent.mkdir(parents=True, exist_ok=True)
            save(cache, {"model": torch.load(best, weights_only=True), "history": rows})
    model.load_state_dict(torch.load(best, map_location="cpu", weights_only=True))


def fit_anew(
    model: nn.Module, stage: str, train: Examples, val: Examples, config: Config, run: Path
) -> list[dict]:
    """Saves the weights of the best validation accuracy in the run; returns a row per epoch."""
    steps = math.ceil(len(train.x) / config.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.train_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.train_lr, total_steps=config.epochs * steps
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = load_checkpoint(run, stage, parts)
    rows = [row for row in history if row["stage"] == stage]

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    for epoch in range(len(rows) + 1, config.epochs + 1):
        seed_everything(config.seed, stage, epoch)
        train_loss = train_one_epoch(model, train, step, config.batch_size, f"{stage} {epoch}")
        val_loss, val_accuracy = evaluate(model, val)
        row = {"stage": stage, "epoch": epoch, "train_loss": train_loss}
        rows.append(row | {"val_loss": val_loss, "val_accuracy": val_accuracy})
        history.append(rows[-1])
        if val_accuracy == max(earlier["val_accuracy"] for earlier in rows):
            save(run / f"{stage}.pt", model.state_dict())
        save_checkpoint(run, stage, parts, history)
        report(rows[-1])
    return rows


def report(row: dict) -> None:
    texts = [f"{n} {v:.4g}" for n, v in row.items() if n != "stage" and v is not None]
    print("  ".join([row["stage"], *texts]), flush=True)


def train_one_epoch(
    model: nn.Module, train: Examples, step: Callable, batch_size: int, label: str
) -> float:
    """Mean loss per scene. Raises FloatingPointError if a loss was not finite."""
    model.train()
    order = torch.randperm(len(train.x)).to(train.x.device).split(batch_size)
    losses = []
    for chosen in tqdm(order, label, leave=False, disable=None):
        loss = F.cross_entropy(model(train.x[chosen].float() / 255), train.y[chosen])
        step(loss)
        losses.append(loss.detach() * len(chosen))
    losses = torch.stack(losses)  # read once per epoch: the loop never waits for the device
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).nonzero()[0]) + 1
        raise FloatingPointError(f"{label}: the loss is not finite at step {first}")
    return float(losses.sum()) / len(train.x)


def evaluate(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Cross-entropy in nats and accuracy, each a sum over all scenes divided by their number."""
    logits, _ = look(model.eval(), examples.x.float() / 255)
    loss = F.cross_entropy(logits.double(), examples.y)
    return float(loss), float((logits.argmax(1) == examples.y).sum()) / len(logits)


# --- attacks ----------------------------------------------------------------------------------


def attack(criterion: str, task: Task, config: Config, run: Path) -> Outcome:
    """All pictures, `attack_batch` at once; batches that a killed run has finished are read."""
    history = load_checkpoint(run, criterion, {})
    done = sum(row["stage"] == criterion for row in history)
    results = []
    for number, rows in enumerate(torch.arange(len(task.x)).split(config.attack_batch)):
        path = run / f"{criterion}-{number}.pt"
        if number >= done:
            began = time.perf_counter()
            found, repaired, queries = search(criterion, task, rows, config)
            result = {"found": found._asdict(), "queries": queries}
            result["seconds"] = time.perf_counter() - began
            save(path, result | {"repaired": repaired})
            row = {"stage": criterion, "epoch": number + 1, "seconds": result["seconds"]}
            row["success"] = float(found.success.float().mean())
            history.append(row | {"forwards": float(queries.float().mean())})
            save_checkpoint(run, criterion, {}, history)
            report(history[-1])
        results.append(torch.load(path, map_location=task.x.device, weights_only=True))
    x = torch.cat([part["repaired"] for part in results])
    return Outcome(
        join([Found(**part["found"]) for part in results]),
        through_disk(x, task.before, task.target, run / "adversarial" / criterion),
        torch.cat([part["queries"] for part in results]),
        sum(part["seconds"] for part in results),
    )


def search(
    criterion: str, task: Task, rows: Tensor, config: Config
) -> tuple[Found, Tensor, Tensor]:
    """What was found of the pictures `rows`, the same as 8-bit pictures, and all queries made."""
    x, target = task.x[rows], task.target[rows]
    common = {"scores": SCORES[criterion], "kappa": config.kappa}
    if criterion == "fast":
        found = decoupled(task.network, x, target, steps=config.fast_steps, **common)
        return found, found.x, found.queries
    if criterion == "logits":
        plan = {"c": config.c, "rounds": config.rounds, "steps": config.steps}
    else:  # as its owner wrote it: without c, so no search over c
        plan = {"c": 1.0, "rounds": 1, "steps": config.rounds * config.steps}
    found = carlini_wagner(task.network, x, target, lr=config.lr, **plan, **common)
    return found, *repair(task.network, x, target, found, steps=config.repair_steps, **common)


# --- report -----------------------------------------------------------------------------------


def measure(criterion: str, outcome: Outcome, task: Task, kappa: float) -> dict:
    """metrics.json's numbers of one criterion. Distances are of successes only."""
    logits, probs = look(task.network, outcome.png)
    margins = margin(SCORES[criterion](logits), task.target)
    png_success = margins >= kappa
    found_margins = margin(SCORES[criterion](look(task.network, outcome.found.x)[0]), task.target)
    success = found_margins >= kappa
    seen = look(task.second, outcome.png)[0].argmax(1)
    seen_before = look(task.second, task.x)[0].argmax(1)
    transfer = (seen == task.target)[png_success].tolist()
    changed = (seen != seen_before)[png_success].tolist()
    forwards = float(outcome.queries.float().mean())
    png_distances = distances(outcome.png[png_success], task.x[png_success])
    return {
        "success": float(success.float().mean()),
        "png_success": float(png_success.float().mean()),
        **distances(outcome.found.x[success], task.x[success]),
        **{f"png_{name}": value for name, value in png_distances.items()},
        "least_margin": float(found_margins[success].min()) if success.any() else None,
        "png_least_margin": float(margins[png_success].min()) if png_success.any() else None,
        "mean_forwards": forwards,
        "mean_backwards": forwards,  # each query is one of both
        "seconds": outcome.seconds,
        "transfer": mean(transfer) if transfer else None,
        "transfer_any_change": mean(changed) if changed else None,
        "pictures": describe(outcome, task, probs, margins, kappa),
    }


def describe(
    outcome: Outcome, task: Task, probs: Tensor, margins: Tensor, kappa: float
) -> list[dict]:
    """A row per picture: classes, probabilities (N, classes) and margin of the PNG, c, L2."""
    source, target, after = task.before, task.target, probs.argmax(1)

    def names(numbers: Tensor) -> list[str]:
        return [task.classes[number] for number in numbers.tolist()]

    def rounded(values: Tensor) -> list[float]:
        return [round(value, 6) for value in values.flatten().tolist()]

    columns = {
        "picture": task.names,
        "class_before": names(source),
        "probability_before": rounded(look(task.network, task.x)[1].gather(1, source[:, None])),
        "target": names(target),
        "class_after": names(after),
        "probability_after": rounded(probs.gather(1, after[:, None])),
        "margin": rounded(margins),
        "c": [c or None for c in rounded(outcome.found.c)],  # the fast attack has none
        "l2": rounded(distance(outcome.png, task.x)),
        "png_success": (margins >= kappa).tolist(),
        "forwards": outcome.queries.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def headline(metrics: dict, config: Config) -> dict[str, float]:
    return {
        f"{name}_{key}": metrics[name][key]
        for name in config.criteria
        for key in ("success", "png_success", "mean_l2", "mean_forwards")
        if metrics[name][key] is not None  # no success, no mean distance
    }


def draw(task: Task, outcomes: dict[str, Outcome], metrics: dict, run: Path) -> None:
    """The run's pictures; the example is a 3 that becomes an 8, or the first picture."""
    pairs = list(zip(task.before.tolist(), task.target.tolist(), strict=True))
    example = pairs.index((3, 8)) if (3, 8) in pairs else 0
    source, target = (task.classes[number] for number in pairs[example])
    title = f"{task.name}, {source} to {target}"
    adversarial = {name: outcome.png[example] for name, outcome in outcomes.items()}
    probs = {name: look(task.network, x[None])[1][0] for name, x in adversarial.items()}
    notes = {name: metrics[name]["pictures"][example] for name in outcomes}
    x = task.x[example]
    probs["original"] = look(task.network, x[None])[1][0]
    plot_example(x, adversarial, probs, notes, task.classes, title, run / "example.png")
    traces = {name: outcome.found.trace for name, outcome in outcomes.items()}
    plot_search({n: trace[..., example] for n, trace in traces.items()}, title, run / "search.png")
    plot_queries(traces, f"{task.name}, {len(task.x)} pictures", run / "queries.png")
    last = list(outcomes)[-1]
    title = f"{task.name}: source and target, attack {last}"
    l2 = [row["l2"] if row["png_success"] else None for row in metrics[last]["pictures"]]
    if len(task.classes) <= 20 and len(task.x) > 1:
        plot_matrix(task.x, outcomes[last].png, pairs, l2, task.classes, title, run / "matrix.png")


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
