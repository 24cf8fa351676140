"""Monte Carlo dropout against ordinary dropout, in paired runs of a small CNN with few labels.

Each run trains one network. Standard dropout switches its dropout off at inference; MC dropout
leaves it on and averages the probabilities of 1..T passes of the same weights.

Run it with `python mc_dropout/train.py`, or `python mc_dropout/train.py --train_images 400`.
"""

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, NamedTuple

from run import (
    Batch,
    Count,
    Decay,
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

from data import Data, DataError, Images, as_float, choose_images, load, rotate, training_batches
from model import (
    acquire,
    auroc,
    average_logits,
    average_probs,
    best_temperature,
    entropy,
    log_mean,
    make_cnn,
    mc_logits,
    mean_and_sd,
    mutual_information,
    paired_difference,
    risks,
    scores,
    standard_logits,
    temper,
)
from plots import (
    plain_text,
    plot_active,
    plot_certainty,
    plot_passes,
    plot_reliability,
    plot_rotation,
    plot_study,
    plot_worth,
)

METHODS = ("random", "entropy", "margin", "coreset", "mc_entropy", "bald")
SHOWN = 5000  # training images, at most, in the curves over the passes
VAL_PASSES = 20  # behind a row's val_mc_loss


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["digits", "mnist", "folder"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    image_size: Annotated[int, ">= 8", "<= 128"]
    train_images: Count
    runs: Annotated[int, ">= 2", "<= 1000"]
    epochs: Epochs
    epoch_steps: Count
    batch_size: Batch
    lr: Rate
    weight_decay: Decay
    widths: tuple[Width, ...]
    hidden: Width
    dropout: Share
    passes: Annotated[int, ">= 1", "<= 10000"]
    report_passes: Annotated[int, ">= 1", "<= 10000"]
    compare: bool
    study: bool
    study_images: tuple[Count, ...]
    active: bool
    active_start: Count
    active_step: Count
    active_rounds: Annotated[int, ">= 1", "<= 1000"]
    active_pool: Count
    active_seeds: Annotated[int, ">= 2", "<= 100"]

    def __post_init__(self) -> None:
        if self.report_passes > self.passes:
            limit = f"at most passes ({self.passes})"
            raise ValueError(f"report_passes: expected {limit}, found {self.report_passes}")
        for name in ("study", "active"):
            if getattr(self, name) and not self.compare:
                raise ValueError(f"{name}: expected false where compare is false")
        needed = self.active_start + self.active_step * self.active_rounds
        if self.active and needed > self.active_pool:
            raise ValueError(f"active_pool: expected at least the {needed} labels asked for")


class Answers(NamedTuple):
    """The predictions of a network for some images."""

    log_probs: dict[str, Tensor]  # [method] (N, C); of MC dropout after report_passes
    uncertainty: dict[str, Tensor]  # [measure] (N,) in nats
    curves: dict[str, dict[str, Tensor]]  # [method][score] (T,), where classes are known


class Outcome(NamedTuple):
    """Scores of one run's network; logits are not kept."""

    scores: dict[str, dict[str, dict[str, Tensor]]]  # [split][method][score]: () or (T,)
    risks: dict[str, Tensor]  # [uncertainty] (N,) by coverage, on test images
    auroc: dict[str, dict[str, float]]  # [strange images][uncertainty]
    log_probs: dict[str, dict[str, Tensor]]  # [method][val, test, strange images] (N, C)


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    data = load_data(config, device)
    open_run(run, config, data.name, data.train, data.val, data.test, data.strange)
    labelled = choose_images(data.train, config.train_images, config.seed)
    count = config.runs if config.compare else 1
    networks = [fit(f"run{n}", labelled, data, config, run, n) for n in range(count)]
    numbers = tqdm(range(count), "evaluating", leave=False, disable=None)
    outcomes = [assess(networks[n], labelled, data, config, n) for n in numbers]
    metrics = summarise(outcomes, config)
    if config.compare:
        metrics["ensemble"] = assess_ensemble(outcomes, data)
    if config.study:
        metrics["study"] = study(data, config, run)
    if config.active:
        metrics["active"] = active_learning(data, config, run)
    metrics["timing"] = time_passes(networks[0], data.test.x)
    plot_results(metrics, outcomes, networks[0], data, config, run)
    save_model(networks[0], data, config, run)
    finish_run(
        run,
        config,
        dataset=data.name,
        headline=headline(metrics, config),
        metrics=metrics,
        use=f"python mc_dropout/predict.py {shlex.quote(str(run))} PICTURE...",
    )


def load_data(config: Config, device: torch.device) -> Data:
    """The data on the device. Raises DataError if there are fewer images than asked for."""
    data = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        seed=config.seed,
    )
    wanted = {"train_images": config.train_images}
    if config.study:
        wanted["study_images"] = max(config.study_images)
    if config.active:
        wanted["active_pool"] = config.active_pool
    for key, count in wanted.items():
        if count > len(data.train.x):
            most = f"at most {len(data.train.x)}, the training images of {data.name}"
            raise DataError(f"{key}: expected {most}, found {count}")
    print(data.note)
    return data.to(device)


# --- training ---------------------------------------------------------------------------------


def fit(
    stage: str, labelled: Images, data: Data, config: Config, run: Path, number: int
) -> nn.Sequential:
    """The network of run `number` with its last weights: no side's validation loss chooses them."""
    network = new_network(data, config, number)
    optimizer, schedule = one_cycle_optimizer(network, config)
    parts = {"model": network, "optimizer": optimizer, "schedule": schedule}
    for row in epochs(run, stage, parts, config.epochs, config.seed):
        label = f"{stage} epoch {row['epoch']}"
        row["train_loss"] = train_one_epoch(network, labelled, optimizer, schedule, config, label)
        row |= evaluate(network, data.val, config)
    return network


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


def one_cycle_optimizer(
    network: nn.Module, config: Config
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    total = config.epochs * config.epoch_steps
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=total)


def train_one_epoch(
    network: nn.Module,
    labelled: Images,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: Config,
    label: str,
) -> float:
    """Mean loss per image. Raises FloatingPointError if a loss was not finite."""
    network.train()
    losses, images = [], 0
    steps = config.epoch_steps
    batches = training_batches(labelled, config.batch_size, steps)
    for x, y in tqdm(batches, label, steps, leave=False, disable=None):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach() * len(x))
        images += len(x)
    return float(sum_losses(losses, label)) / images


def evaluate(network: nn.Module, val: Images, config: Config) -> dict[str, float]:
    """Validation NLL in nats and accuracy of MC dropout and, to compare, with dropout off."""
    x = as_float(val.x)
    logits = mc_logits(network, x, passes=VAL_PASSES, seed=config.seed).double()
    answers = {"val_mc": average_probs(logits)[-1]}
    if config.compare:
        answers["val"] = standard_logits(network, x).double().log_softmax(-1)
    found = {name: scores(log_probs, val.y) for name, log_probs in answers.items()}
    renamed = {"loss": "nll", "accuracy": "accuracy"}
    return {f"{name}_{to}": float(found[name][of]) for name in found for to, of in renamed.items()}


# --- evaluation -------------------------------------------------------------------------------


def answer(
    network: nn.Sequential, x: Tensor, y: Tensor | None, config: Config, number: int
) -> Answers:
    """The predictions of run `number` for uint8 images, with dropout on and off."""
    x, seed, at = as_float(x), 1000 * config.seed + number, config.report_passes
    logits = mc_logits(network, x, passes=config.passes, seed=seed).double()
    probs = average_probs(logits)
    log_probs = {"mc": probs[at - 1].clone()}
    uncertainty = {
        "mc_entropy": entropy(log_probs["mc"]),
        "mutual_information": mutual_information(logits[:at].log_softmax(-1)),
    }
    if config.compare:
        log_probs["standard"] = standard_logits(network, x).double().log_softmax(-1)
        uncertainty["standard_entropy"] = entropy(log_probs["standard"])
    curves = {}
    if y is not None:
        curves = {"mc": scores(probs, y), "logit_averaging": scores(average_logits(logits), y)}
    return Answers(log_probs, uncertainty, curves)


def assess(
    network: nn.Sequential, labelled: Images, data: Data, config: Config, number: int
) -> Outcome:
    """MC and standard dropout of run `number`: the same weights, the same images."""
    some = Images(*(part[:SHOWN] for part in labelled))
    known = {"train": some, "val": data.val, "test": data.test}
    strange = {name: (x, None) for name, x in data.strange.items()}
    answers = {part: answer(network, *of, config, number) for part, of in (known | strange).items()}
    numbers = {
        part: {name: scores(one, known[part].y) for name, one in answers[part].log_probs.items()}
        | answers[part].curves
        for part in ("train", "test")
    }
    methods = list(answers["test"].log_probs)
    kept = {
        name: {part: one.log_probs[name].cpu() for part, one in answers.items()} for name in methods
    }
    for name in methods:
        numbers["test"][f"{name}_tempered"] = tempered(kept[name], data)
    inside, found = answers["test"].uncertainty, {}
    for kind, value in inside.items():
        predicted = kept["standard" if kind == "standard_entropy" else "mc"]["test"].argmax(-1)
        found[kind] = risks(value.cpu(), predicted == data.test.y.cpu())
    detected = {
        name: {kind: auroc(inside[kind], answers[name].uncertainty[kind]) for kind in inside}
        for name in strange
    }
    return Outcome(numbers, found, detected, kept)


def tempered(log_probs: dict[str, Tensor], data: Data) -> dict[str, Tensor]:
    """Test scores after one temperature, fitted on the validation images, and the temperature."""
    temperature = best_temperature(log_probs["val"], data.val.y.cpu())
    found = scores(temper(log_probs["test"], temperature), data.test.y.cpu())
    return found | {"temperature": torch.tensor(temperature, dtype=torch.float64)}


def assess_ensemble(outcomes: list[Outcome], data: Data) -> dict:
    """A deep ensemble of all runs' networks with dropout off: what MC dropout approximates."""
    members = [one.log_probs["standard"] for one in outcomes]
    mean = {part: log_mean(torch.stack([one[part] for one in members])) for part in members[0]}
    y = data.test.y.cpu()
    inside = entropy(mean["test"])
    return {
        "networks": len(members),
        "plain": plain(scores(mean["test"], y)),
        "tempered": plain(tempered(mean, data)),
        "risk": float(risks(inside, mean["test"].argmax(-1) == y).mean()),
        "auroc": {name: auroc(inside, entropy(mean[name])) for name in data.strange},
    }


def summarise(outcomes: list[Outcome], config: Config) -> dict:
    """metrics.json's numbers: mean and standard deviation over the runs, and paired differences.

    Lists run over the numbers of passes 1..T.
    """
    metrics = {"runs": len(outcomes), "report_passes": config.report_passes}
    for split, methods in outcomes[0].scores.items():
        values = {
            method: {
                name: torch.stack([one.scores[split][method][name] for one in outcomes]).cpu()
                for name in found
            }
            for method, found in methods.items()
        }
        metrics[split] = {
            method: {name: plain(mean_and_sd(value)) for name, value in found.items()}
            for method, found in values.items()
        }
        for suffix in ("", "_tempered"):
            mc, standard = (values.get(f"{side}{suffix}") for side in ("mc", "standard"))
            if mc and standard:
                metrics[split][f"mc_minus_standard{suffix}"] = {
                    name: plain(paired_difference(value, standard[name]))
                    for name, value in mc.items()
                }
    return metrics | uncertainty_numbers(outcomes)


def uncertainty_numbers(outcomes: list[Outcome]) -> dict:
    """By measure; risk: error rate over all coverages, auroc: of strange images."""
    risk = [{kind: risks.mean() for kind, risks in one.risks.items()} for one in outcomes]
    strange = {name: [one.auroc[name] for one in outcomes] for name in outcomes[0].auroc}
    auroc = {name: compare_measures(of_runs) for name, of_runs in strange.items()}
    return {"risk": {"test": compare_measures(risk)}, "auroc": auroc}


def compare_measures(of_runs: list[dict]) -> dict:
    """Mean and standard deviation of each measure over the runs, and its paired
    difference from the entropy of standard dropout.
    """
    values = {
        kind: torch.tensor([float(one[kind]) for one in of_runs]).double() for kind in of_runs[0]
    }
    found = {kind: plain(mean_and_sd(value)) for kind, value in values.items()}
    if "standard_entropy" in values:
        for kind, value in values.items():
            more = paired_difference(value, values["standard_entropy"])
            found[kind]["minus_standard"] = plain(more)
    return found


def plain(numbers: dict[str, Tensor]) -> dict[str, float | list[float]]:
    return {name: value.cpu().numpy().round(7).tolist() for name, value in numbers.items()}


# --- studies, off by default ------------------------------------------------------------------


def study(data: Data, config: Config, run: Path) -> dict:
    """Test numbers by training images; each run draws its own, a larger number holds a smaller."""
    found = {}
    for count in config.study_images:
        outcomes = []
        for number in range(config.runs):
            labelled = choose_images(data.train, count, config.seed + number)
            network = fit(f"{count}images-run{number}", labelled, data, config, run, number)
            outcomes.append(assess(network, labelled, data, config, number))
        metrics = summarise(outcomes, config)
        found[str(count)] = at_report(metrics["test"], config) | {
            name: metrics[name] for name in ("risk", "auroc")
        }
    return found


def at_report(test: dict, config: Config) -> dict:
    """The test numbers with, of each list over passes, the entry of report_passes."""
    at = config.report_passes - 1
    return {
        method: {
            name: {k: v[at] if isinstance(v, list) else v for k, v in number.items()}
            for name, number in found.items()
        }
        for method, found in test.items()
    }


class Labels(nn.Module):
    """Which images of the pool have a label: a part of a checkpoint."""

    def __init__(self, order: Tensor, start: int):
        super().__init__()
        self.register_buffer("known", torch.zeros(len(order), dtype=torch.bool))
        self.known[order[:start]] = True


def active_learning(data: Data, config: Config, run: Path) -> dict:
    """Test accuracy by method and number of labels: mean and standard deviation over the seeds."""
    rows = {
        method: [ask(method, data, config, run, seed) for seed in range(config.active_seeds)]
        for method in METHODS
    }
    random = accuracies(rows["random"])
    found = {"labels": [row["labels"] for row in rows["random"][0]]}
    for method, of_seeds in rows.items():
        values = accuracies(of_seeds)
        found[method] = plain(mean_and_sd(values))
        found[method]["minus_random"] = plain(paired_difference(values, random))
        over_rounds = paired_difference(values.mean(1), accuracies(rows["entropy"]).mean(1))
        found[method]["minus_entropy_over_rounds"] = plain(over_rounds)
    return found


def accuracies(of_seeds: list[list[dict]]) -> Tensor:
    """(seeds, rounds)"""
    return torch.tensor([[row["test_accuracy"] for row in rows] for rows in of_seeds]).double()


def ask(method: str, data: Data, config: Config, run: Path, seed: int) -> list[dict]:
    """A row per round: a new network learns from the labels so far, then asks for the next ones.

    All methods begin, for a seed, with the same pool, labels and weights.
    """
    pool = choose_images(data.train, config.active_pool, config.seed + seed)
    generator = torch.Generator().manual_seed(config.seed + seed)
    labels = Labels(torch.randperm(len(pool.x), generator=generator), config.active_start)
    stage, parts = f"active-{method}-seed{seed}", {"labels": labels}
    for row in epochs(run, stage, parts, config.active_rounds + 1, config.seed, keep="labels"):
        seed_everything(config.seed, "active", seed, row["epoch"])  # the same for all methods
        known = labels.known.to(pool.x.device)
        network = new_network(data, config, seed)
        optimizer, schedule = one_cycle_optimizer(network, config)
        some = Images(pool.x[known], pool.y[known])
        for epoch in range(config.epochs):
            label = f"{stage} round {row['epoch']} epoch {epoch + 1}"
            loss = train_one_epoch(network, some, optimizer, schedule, config, label)
        logits = standard_logits(network, as_float(data.test.x))
        accuracy = float((logits.argmax(1) == data.test.y).double().mean())
        row |= {"labels": len(some.x), "train_loss": loss, "test_accuracy": accuracy}
        rest = (~known).nonzero()[:, 0]
        places = acquire(method, network, as_float(pool.x[rest]), config.active_step, row["epoch"])
        labels.known[rest[places].cpu()] = True
    return read_rows(run, stage)


def time_passes(network: nn.Sequential, x: Tensor) -> dict[str, float]:
    """Seconds per 10,000 images: medians of three timings of 2,000 test images, some repeated."""
    x = as_float(x[torch.arange(2000, device=x.device) % len(x)])
    calls = {"standard": lambda: standard_logits(network, x)}
    for passes in (1, 10, 100):
        calls[f"passes_{passes}"] = lambda t=passes: mc_logits(network, x, passes=t, seed=0)
    timing = {}
    for name, call in calls.items():
        call()  # warm-up
        timing[f"{name}_seconds_per_10000"] = 5 * median(stopwatch(call) for _ in range(3))
    return timing


def stopwatch(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    call().sum().item()  # waits for the device
    return time.perf_counter() - began


# --- report -----------------------------------------------------------------------------------


def save_model(network: nn.Sequential, data: Data, config: Config, run: Path) -> None:
    """model.pt: all that predict.py needs, the network of run 0."""
    description = {
        "project": "mc_dropout",
        "channels": data.train.x.shape[1],
        "classes": list(data.classes),
        "image_size": data.train.x.shape[-1],
        "widths": list(config.widths),
        "hidden": config.hidden,
        "dropout": config.dropout,
        "passes": config.report_passes,
        "seed": 1000 * config.seed,
        "weights": network.state_dict(),
    }
    save(run / "model.pt", description)


def headline(metrics: dict, config: Config) -> dict[str, float]:
    """Means over the runs; test NLL, ECE, error over all coverages, AUROC of photographs."""
    test = at_report(metrics["test"], config)
    sides = {"standard": "standard_entropy", "mc": "mutual_information"}
    numbers = {}
    for side in sides if config.compare else ["mc"]:
        numbers[f"{side}_accuracy"] = test[side]["accuracy"]["mean"]
        for name in ("nll", "ece"):
            numbers[f"{side}_{name}"] = test[side][name]["mean"]
            numbers[f"{side}_{name}_tempered"] = test[f"{side}_tempered"][name]["mean"]
        numbers[f"{side}_risk"] = metrics["risk"]["test"][f"{side}_entropy"]["mean"]
        numbers[f"{side}_auroc"] = metrics["auroc"]["photographs"][sides[side]]["mean"]
    if config.compare:
        numbers["ensemble_nll"] = metrics["ensemble"]["plain"]["nll"]
    if config.active:
        for method in ("random", "entropy", "bald"):
            mean = metrics["active"][method]["mean"]
            numbers[f"active_{method}_accuracy"] = sum(mean) / len(mean)
    ratio = [metrics["timing"][f"passes_{t}_seconds_per_10000"] for t in (100, 1)]
    return numbers | {"cost_ratio_100_passes": ratio[0] / ratio[1]}


def plot_results(
    metrics: dict,
    outcomes: list[Outcome],
    network: nn.Sequential,
    data: Data,
    config: Config,
    run: Path,
) -> None:
    """The pictures of a run; those of single images are of run 0."""
    name = plain_text(data.name)
    title = f"{name}, {config.train_images} training images"
    risk = {kind: torch.stack([one.risks[kind] for one in outcomes]) for kind in outcomes[0].risks}
    try_plot(plot_worth, metrics, risk, title, run / "worth.png")
    try_plot(plot_passes, metrics, title, run / "passes.png")
    log_probs = {
        side: torch.stack([one.log_probs[side]["test"] for one in outcomes])
        for side in outcomes[0].log_probs
    }
    y, test = data.test.y.cpu(), at_report(metrics["test"], config)
    ece = {side: test[side]["ece"]["mean"] for side in log_probs}
    try_plot(plot_reliability, log_probs, y, ece, title, run / "reliability.png")
    images, probs = data.test.x.cpu(), log_probs["mc"][0].exp()
    try_plot(plot_certainty, images, y, probs, data.classes, title, run / "certainty.png")
    try_plot(plot_turning, network, data, config, title, run / "rotation.png")
    if config.study:
        try_plot(plot_study, metrics["study"], name, run / "study.png")
    if config.active:
        try_plot(plot_active, metrics["active"], name, run / "active.png")


def plot_turning(
    network: nn.Sequential, data: Data, config: Config, title: str, path: Path
) -> None:
    """A test image of the second class (a "1", as in the paper), turned further and further."""
    first = int((data.test.y == 1).nonzero()[0])
    angles = list(range(0, 181, 15))
    x = torch.cat([rotate(as_float(data.test.x[first : first + 1]), angle) for angle in angles])
    logits = mc_logits(network, x, passes=config.passes, seed=1000 * config.seed)
    probs = {"mc": logits.softmax(-1).cpu()}
    if config.compare:
        probs["standard"] = standard_logits(network, x).softmax(-1).cpu()
    plot_rotation(x.cpu(), angles, probs, data.classes, title, path)


if __name__ == "__main__":
    run_main(main, DataError)
