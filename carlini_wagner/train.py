"""Carlini & Wagner's attack: the smallest change of a picture that makes a network see a target.

Three ways side by side: the project owner's rule on probabilities, the paper's objective on logits
with a search over the constant c, and a fast one that decouples direction and norm. What comes out
are 8-bit PNGs, measured after they are read back from disk.

Run it with `python carlini_wagner/train.py`, or with `--kappa 5 --criteria logits,fast`.
"""

import math
import shlex
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Literal, NamedTuple

from run import (
    Batch,
    Count,
    Epochs,
    Pixels,
    Rate,
    Seed,
    Width,
    epochs,
    finish_run,
    open_run,
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
    Examples,
    Splits,
    choose_digits,
    class_names,
    class_number,
    describe_network,
    left_out,
    load_digits,
    load_mnist,
    load_photographs,
    through_disk,
)
from model import (
    SCORES,
    Found,
    Goal,
    SmallResNet,
    alternating,
    build_network,
    carlini_wagner,
    decoupled,
    distance,
    distances,
    join,
    look,
    round_off,
)
from plots import plot_bound, plot_example, plot_matrix, plot_queries, plot_search

DIGITS = [str(digit) for digit in range(10)]
Number = Annotated[float, ">= -10", "<= 10"]
Deviation = Annotated[float, ">= 0.001", "<= 10"]


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["digits", "mnist", "images"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    picture_count: Count
    target: str
    images: tuple[str, ...]
    image_size: Pixels
    network: str
    weights: str
    second_network: str
    second_weights: str
    mean: tuple[Number, Number, Number]
    std: tuple[Deviation, Deviation, Deviation]
    class_names: str
    compare: bool
    criteria: tuple[Literal["probability", "logits", "fast"], ...]
    kappa: Annotated[float, ">= 0", "<= 1000000"]
    rounds: Annotated[int, "<= 1000"]
    steps: Count
    lr: Rate
    probability_steps: Count
    probability_rounding: Count
    fast_steps: Count
    rounding_steps: Count
    attack_batch: Batch
    train_count: Annotated[int, "<= 1000000"]
    width: Width
    epochs: Epochs
    batch_size: Batch
    train_lr: Rate

    def __post_init__(self) -> None:
        if self.kappa >= 1 and "probability" in self.criteria:
            raise ValueError(
                "kappa: expected less than 1 with the criterion probability, as no margin of "
                f"probabilities is larger, found {self.kappa}"
            )
        if len(set(self.criteria)) < len(self.criteria):
            raise ValueError(f"criteria: expected each once, found {','.join(self.criteria)}")
        if self.target == "pairs" and self.dataset == "images":
            raise ValueError("target: expected a class, next or any for images, found 'pairs'")


class Task(NamedTuple):
    """What is attacked: pictures (N, 3, H, W) of pixels k / 255, and how the networks are made."""

    x: Tensor
    before: Tensor  # (N,), the class that the network sees
    target: Tensor  # (N,), the class that it has to see, or has to leave
    names: list[str]  # of the pictures
    classes: list[str]
    networks: list[dict]  # for model.build_network: the one attacked and, to compare, a second


class Outcome(NamedTuple):
    """What a criterion found, of all pictures, and what is left of it in the PNGs."""

    found: Found  # before rounding
    rounded: Found
    png: Tensor  # (N, 3, H, W), read back from disk
    seconds: float

    @property
    def queries(self) -> Tensor:
        return self.found.queries + self.rounded.queries


class Results:
    """What the batches found so far, as a part of a checkpoint."""

    def __init__(self):
        self.batches: list[dict] = []

    def state_dict(self) -> dict:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict) -> None:
        self.batches = state["batches"]


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    make = photographs_task if config.dataset == "images" else digits_task
    task, networks, numbers = make(config, run, device)
    through_disk(task.x, file_names(task), run / "originals")
    outcomes = {name: attack(name, task, networks[0], config, run) for name in config.criteria}
    metrics = numbers | {
        name: measure(outcome, goal(name, task, config), task, networks)
        for name, outcome in outcomes.items()
    }
    plot_results(task, networks[0], outcomes, metrics, config, run)
    save_model(task, config, run)
    pngs, originals = run / "adversarial" / config.criteria[-1], run / "originals"
    places = shlex.join(map(str, (run, pngs, "--original", originals)))
    finish_run(
        run,
        config,
        dataset=config.dataset,
        headline=headline(metrics, config),
        metrics=metrics,
        use=f"python carlini_wagner/predict.py {places}",
    )


# --- pictures and networks --------------------------------------------------------------------


def photographs_task(
    config: Config, run: Path, device: torch.device
) -> tuple[Task, list[nn.Module], dict]:
    """Your own pictures, with what the network sees in them; numbers for metrics.json."""
    photographs = load_photographs(
        config.images, data_dir=config.data_dir, size=config.image_size, count=config.picture_count
    )
    x = photographs.x.to(device).float() / 255
    plan = [(config.network, config.weights)]
    if config.compare:
        plan.append((config.second_network, config.second_weights))
    descriptions, networks, seen = zip(
        *(attacked_network(config, *one, x) for one in plan), strict=True
    )
    if seen[0].shape[1] != seen[-1].shape[1]:
        raise DataError(f"second_network: {seen[-1].shape[1]} classes, not {seen[0].shape[1]}")
    before = seen[0].argmax(1)
    classes = class_names(config.class_names, seen[0].shape[1], config.data_dir)
    if config.target in ("next", "any"):
        target = before.clone() if config.target == "any" else (before + 1) % len(classes)
    else:
        target = torch.full_like(before, class_number(config.target, classes))
    kept = ((before != target) | (config.target == "any")).nonzero()[:, 0]
    if not len(kept):
        raise DataError(f"target: the network sees {classes[int(target[0])]} everywhere already")
    open_run(run, config, "images", photographs.x, *descriptions)
    numbers = {"pictures": len(kept), "unreadable": len(photographs.bad)}
    numbers["already_target"] = len(x) - len(kept)
    print(f"images: {len(kept)} to attack{left_out(photographs.bad)}")
    names = [photographs.names[place] for place in kept.tolist()]
    task = Task(x[kept], before[kept], target[kept], names, classes, list(descriptions))
    return task, list(networks), numbers


def attacked_network(
    config: Config, network: str, weights: str, x: Tensor
) -> tuple[dict, nn.Module, Tensor]:
    """As model.build_network takes it, itself, and its logits of `x`. Raises DataError."""
    description = describe_network(network, weights, config.data_dir)
    description |= {"mean": list(config.mean), "std": list(config.std)}
    try:
        built = build_network(description).to(x.device)
        look(built, x[:1])  # a .pt2 file may be for another size, or for one size of batches
        return description, built, look(built, x)[0]
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        kind = "" if network.endswith(".pt2") else f" with weights {weights}"
        size = f"on pictures of {config.image_size} px"
        raise DataError(f"network: {network}{kind} fails {size}: {reason}") from error


def digits_task(
    config: Config, run: Path, device: torch.device
) -> tuple[Task, list[nn.Module], dict]:
    """Test pictures that the network classifies correctly; the networks are trained here."""
    if config.target not in ("pairs", "next", "any"):
        class_number(config.target, DIGITS)  # a mistake ends the run before networks are trained
    splits = load_splits(config)
    open_run(run, config, config.dataset, *splits)
    train, val, test = (part.to(device) for part in splits)
    descriptions, accuracies = [], {}
    for stage in ("train", "train-second")[: 2 if config.compare else 1]:
        seed_everything(config.seed, stage)
        network = SmallResNet(width=config.width, classes=10).to(device)
        fit(network, stage, train, val, config, run)
        name = stage.replace("train", "").replace("-second", "second_") + "test_accuracy"
        accuracies[name] = evaluate(network, test)["accuracy"]
        description = {"kind": "small", "width": config.width, "classes": 10}
        descriptions.append(description | {"state": network.cpu().state_dict()})
    networks = [build_network(description).to(device) for description in descriptions]
    seen = look(networks[0], test.x.float() / 255)[0].argmax(1)
    chosen, target = choose_digits(
        test.y.cpu(), (seen == test.y).cpu(), target=config.target, count=config.picture_count
    )
    x, before = test.x[chosen].float() / 255, test.y[chosen]
    names = [f"test picture {place}" for place in chosen.tolist()]
    task = Task(x, before, target.to(device), names, DIGITS, descriptions)
    return task, networks, accuracies | {"pictures": len(x)}


def load_splits(config: Config) -> Splits:
    if config.dataset == "mnist":
        count = {"train_count": config.train_count, "seed": config.seed}
        return load_mnist(**count, data_dir=config.data_dir)
    print("digits: scikit-learn's over photographs; real sets: --config carlini_wagner/mnist.yaml")
    return load_digits(train_count=config.train_count, seed=config.seed)


def fit(
    model: nn.Module, stage: str, train: Examples, val: Examples, config: Config, run: Path
) -> None:
    """Leaves the weights of the best validation accuracy in `model`."""
    steps = math.ceil(len(train.x) / config.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.train_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.train_lr, total_steps=config.epochs * steps
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    best = ("val_accuracy", max)
    for row in epochs(run, stage, parts, config.epochs, config.seed, best=best):
        label = f"{stage} epoch {row['epoch']}"
        row["train_loss"] = train_one_epoch(
            model, train, optimizer, schedule, config.batch_size, label
        )
        row |= {f"val_{name}": value for name, value in evaluate(model, val).items()}


def train_one_epoch(
    model: nn.Module,
    train: Examples,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batch_size: int,
    label: str,
) -> float:
    """Mean loss per picture. Raises FloatingPointError if a loss was not finite."""
    model.train()
    order = torch.randperm(len(train.x)).to(train.x.device).split(batch_size)
    losses = []
    for chosen in tqdm(order, label, leave=False, disable=None):
        loss = F.cross_entropy(model(train.x[chosen].float() / 255), train.y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach() * len(chosen))
    return float(sum_losses(losses, label)) / len(train.x)


def evaluate(model: nn.Module, examples: Examples) -> dict:
    """Cross-entropy in nats and accuracy, each a sum over all pictures divided by their number."""
    logits, _ = look(model.eval(), examples.x.float() / 255)
    loss = F.cross_entropy(logits.double(), examples.y)
    right = (logits.argmax(1) == examples.y).sum()
    return {"loss": float(loss), "accuracy": float(right) / len(logits)}


# --- attacks ----------------------------------------------------------------------------------


def goal(criterion: str, task: Task, config: Config) -> Goal:
    return Goal(task.target, config.kappa, config.target != "any", SCORES[criterion])


def attack(criterion: str, task: Task, network: nn.Module, config: Config, run: Path) -> Outcome:
    """All pictures, `attack_batch` at once; batches that a killed run has finished are kept."""
    aim, results = goal(criterion, task, config), Results()
    own = criterion == "probability"
    rounding = config.probability_rounding if own else config.rounding_steps
    batches = torch.arange(len(task.x), device=task.x.device).split(config.attack_batch)
    parts = {"results": results}
    for row in epochs(run, criterion, parts, len(batches), config.seed, keep="results"):
        rows, began = batches[row["epoch"] - 1], time.perf_counter()
        x, part = task.x[rows], aim.of(rows)
        found = search(criterion, network, x, part, config)
        rounded = round_off(network, x, part, found.x, steps=rounding)
        seconds = time.perf_counter() - began
        kept = {"found": found._asdict(), "rounded": rounded._asdict(), "seconds": seconds}
        results.batches.append(kept)
        row["success"] = float(found.success.float().mean())
        row["png_success"] = float(rounded.success.float().mean())
        row["forwards"] = float((found.queries + rounded.queries).float().mean())
    found, rounded = (
        join([Found(**part[name]).to(task.x.device) for part in results.batches])
        for name in ("found", "rounded")
    )
    png = through_disk(rounded.x, file_names(task), run / "adversarial" / criterion)
    return Outcome(found, rounded, png, sum(part["seconds"] for part in results.batches))


def search(criterion: str, network: nn.Module, x: Tensor, aim: Goal, config: Config) -> Found:
    """Without rounding."""
    if criterion == "fast":
        return decoupled(network, x, aim, steps=config.fast_steps)
    if criterion == "probability":
        return alternating(network, x, aim, steps=config.probability_steps)
    plan = {"rounds": config.rounds, "steps": config.steps, "lr": config.lr}
    return carlini_wagner(network, x, aim, **plan)


def file_names(task: Task) -> list[str]:
    """NNN-SEEN-to-TARGET, in class numbers; where no class is asked for, NNN-SEEN."""
    pairs = zip(task.before.tolist(), task.target.tolist(), strict=True)
    return [
        f"{number:03d}-{one}" + (f"-to-{other}" if one != other else "")
        for number, (one, other) in enumerate(pairs)
    ]


def target_names(task: Task) -> list[str]:
    pairs = zip(task.before.tolist(), task.target.tolist(), strict=True)
    return ["any other" if one == other else task.classes[other] for one, other in pairs]


# --- report -----------------------------------------------------------------------------------


def measure(outcome: Outcome, aim: Goal, task: Task, networks: list[nn.Module]) -> dict:
    """metrics.json's numbers of one criterion. Distances are of successes only."""
    logits, probs = look(networks[0], outcome.png)
    margins = aim.margin(logits)
    png_success = margins >= aim.kappa
    found_margins = aim.margin(look(networks[0], outcome.found.x)[0])
    success = found_margins >= aim.kappa
    both = success & png_success
    png_distances = distances(outcome.png[png_success], task.x[png_success])
    forwards = float(outcome.queries.float().mean())
    cost = distance(outcome.png, task.x)[both].sum() / distance(outcome.found.x, task.x)[both].sum()
    return {
        "success": float(success.float().mean()),
        "png_success": float(png_success.float().mean()),
        **distances(outcome.found.x[success], task.x[success]),
        **{f"png_{name}": value for name, value in png_distances.items()},
        "rounding_cost": float(cost) - 1 if both.any() else None,
        "least_margin": float(found_margins[success].min()) if success.any() else None,
        "png_least_margin": float(margins[png_success].min()) if png_success.any() else None,
        "mean_forwards": forwards,
        "mean_backwards": forwards,  # each query is one of both
        "seconds": outcome.seconds,
        **(transfer(outcome.png, png_success, aim, task, networks[1]) if networks[1:] else {}),
        "pictures": describe(outcome, task, networks[0], probs, margins, png_success),
    }


def transfer(
    png: Tensor, success: Tensor, aim: Goal, task: Task, second: nn.Module
) -> dict[str, float | None]:
    """Shares of the successful PNGs that reach the goal in a second network, too, and that change
    what it sees.
    """
    logits = look(second, png)[0]
    reached = (aim._replace(kappa=0.0).margin(logits) >= 0)[success].tolist()
    changed = (logits.argmax(1) != look(second, task.x)[0].argmax(1))[success].tolist()
    return {
        "transfer": mean(reached) if reached else None,
        "transfer_any_change": mean(changed) if changed else None,
    }


def describe(
    outcome: Outcome,
    task: Task,
    network: nn.Module,
    probs: Tensor,
    margins: Tensor,
    success: Tensor,
) -> list[dict]:
    """A row per picture: classes, probabilities (N, classes) and margin of the PNG, c, L2."""
    source, after = task.before, probs.argmax(1)

    def names(numbers: Tensor) -> list[str]:
        return [task.classes[number] for number in numbers.tolist()]

    def rounded(values: Tensor) -> list[float]:
        return [round(value, 6) for value in values.flatten().tolist()]

    columns = {
        "picture": task.names,
        "file": file_names(task),
        "class_before": names(source),
        "probability_before": rounded(look(network, task.x)[1].gather(1, source[:, None])),
        "target": target_names(task),
        "class_after": names(after),
        "probability_after": rounded(probs.gather(1, after[:, None])),
        "margin": rounded(margins),
        "c": [c or None for c in rounded(outcome.found.c)],  # the other attacks have none
        "l2_before_rounding": rounded(distance(outcome.found.x, task.x)),
        "l2": rounded(distance(outcome.png, task.x)),
        "success": outcome.found.success.tolist(),
        "png_success": success.tolist(),
        "forwards": outcome.queries.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def save_model(task: Task, config: Config, run: Path) -> None:
    """model.pt: all that predict.py needs."""
    side = task.x.shape[-1]
    description = {"project": "carlini_wagner", "networks": task.networks}
    save(run / "model.pt", description | {"classes": task.classes, "image_size": side})


def headline(metrics: dict, config: Config) -> dict[str, float]:
    keys = ("success", "png_success", "mean_l2", "png_mean_l2", "mean_forwards")
    return {
        f"{name}_{key}": metrics[name][key]
        for name in config.criteria
        for key in keys
        if metrics[name][key] is not None  # no success, no mean distance
    }


def plot_results(
    task: Task, network: nn.Module, outcomes: dict, metrics: dict, config: Config, run: Path
) -> None:
    """The run's pictures; the example is a 3 that becomes an 8, or the first picture."""
    pairs = list(zip(task.before.tolist(), task.target.tolist(), strict=True))
    place = pairs.index((3, 8)) if task.classes == DIGITS and (3, 8) in pairs else 0
    notes = {name: metrics[name]["pictures"][place] for name in outcomes}
    row = notes[config.criteria[0]]
    title = f"{config.dataset}, {row['class_before']} to {row['target']}"
    shown = {"original": task.x[place]}
    shown |= {name: outcome.png[place] for name, outcome in outcomes.items()}
    probs = {name: look(network, x[None])[1][0] for name, x in shown.items()}
    try_plot(plot_example, shown, probs, notes, task.classes, title, run / "example.png")
    traces = {name: outcome.found.trace for name, outcome in outcomes.items()}
    lines = {name: trace[..., place] for name, trace in traces.items()}
    try_plot(plot_search, lines, title, run / "search.png")
    count = f"{config.dataset}, {len(task.x)} picture{'s' if len(task.x) > 1 else ''}"
    try_plot(plot_queries, traces, count, run / "queries.png")
    l2 = {
        name: [row["l2"] if row["png_success"] else math.inf for row in metrics[name]["pictures"]]
        for name in outcomes
    }
    try_plot(plot_bound, l2, count, run / "bound.png")
    if task.classes == DIGITS and config.target != "any":
        last = config.criteria[-1]
        title = f"{config.dataset}: source and target, attack {last}"
        matrix = partial(plot_matrix, task.x, outcomes[last].png, pairs, l2[last], DIGITS)
        try_plot(matrix, title, run / "matrix.png")


if __name__ == "__main__":
    run_main(main, DataError)
