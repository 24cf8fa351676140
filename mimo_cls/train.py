"""A MIMO ensemble (Havasi et al. 2021) against its deterministic twin, a Wide ResNet of one member.

The ensemble's network takes M images and gives M predictions. It learns from M independent images;
in testing it is given one image M times, and its predictions are averaged: an ensemble for one
forward pass. The twin sees as many images, and costs as much compute.

Run it with `python mimo_cls/train.py`, or `python mimo_cls/train.py --members 3`.
"""

import math
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Literal, NamedTuple

from run import (
    OWN,
    Batch,
    Decay,
    Epochs,
    Rate,
    Seed,
    all_rows,
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
    try_plot,
)

import torch
from torch import Tensor
from tqdm import tqdm

from data import (
    SEVERITIES,
    Data,
    DataError,
    corrupt,
    load,
    testing_batches,
    to_input,
    training_batches,
)
from model import (
    MimoWideResNet,
    auroc,
    best_temperature,
    diversity,
    ensemble_log_probs,
    entropy,
    error_over_sources,
    independence,
    mean_and_sd,
    mimo_loss,
    mutual_information,
    overhead,
    scores,
    temper,
    variance_shares,
)
from plots import (
    plot_calibration,
    plot_corruption,
    plot_curves,
    plot_disagreement,
    plot_independence,
    plot_room,
)

CORRUPTED = [f"{kind} {level}" for kind, levels in SEVERITIES.items() for level in levels]
CONTEXTS, VARIED = 8, 128  # images behind the proof of independence
SCORES = ("accuracy", "nll", "ece", "brier")
Repetition = Annotated[float, ">= 0", "<= 1"]
Members = Annotated[int, ">= 2", "<= 16"]


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["digits", "cifar10", "folder"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    image_size: Annotated[int, ">= 8", "<= 128"]
    train_images: Annotated[int, ">= 10", "<= 1000000"]
    test_images: Annotated[int, ">= 20", "<= 100000"]
    members: Members
    input_repetition: Repetition
    batch_repetition: Annotated[int, ">= 1", "<= 64"]
    depth: Annotated[int, ">= 10", "<= 1000"]
    width: Annotated[int, ">= 1", "<= 64"]
    epochs: Epochs
    batch_size: Batch
    lr: Rate
    warmup_epochs: Annotated[int, ">= 0", "<= 100000"]
    weight_decay: Decay
    runs: Annotated[int, ">= 1", "<= 100"]
    compare: bool
    study: bool
    study_widths: tuple[Annotated[int, ">= 1", "<= 64"], ...]
    study_members: tuple[Members, ...]
    study_repetitions: tuple[Repetition, ...]

    def __post_init__(self) -> None:
        if self.depth % 6 != 4:
            raise ValueError(f"depth: expected 10, 16, 22, 28, ..., found {self.depth}")
        if self.warmup_epochs >= self.epochs:
            limit = f"fewer than epochs ({self.epochs})"
            raise ValueError(f"warmup_epochs: expected {limit}, found {self.warmup_epochs}")
        if self.study and not self.compare:
            raise ValueError("study: expected false where compare is false")


class Plan(NamedTuple):
    """A network and how it is trained. In an epoch each member sees each image batch_repetition
    times, whatever the plan, so equal epochs of equal networks are equal compute.
    """

    width: float
    members: int
    input_repetition: float
    number: int  # of the run: decides initialisation and order

    @property
    def name(self) -> str:
        about = f"w{self.width:.4g}-M{self.members}-rho{self.input_repetition:g}"
        return f"{about}-run{self.number}"


def main() -> None:
    config, run, device = start_run(Config, __doc__, several=True)
    with one_first():
        data = load_data(config).to(device)
    open_run(run, config, data.name, data.train, data.val, data.test, data.strange)
    metrics = {"overhead": count_cost(data, config)}
    runs = [plans(config, number) for number in range(config.runs if config.compare else 1)]
    needed = dict.fromkeys(plan for arms in runs for arm in arms.values() for plan in arm)
    networks = {plan: fit(plan, data, config, run) for plan in needed}
    predicted = predict_arms(runs, networks, images_by_part(data))
    metrics |= summarise(predicted, data, config)
    mimo = networks[runs[0]["mimo"][0]]
    variances = variance_shares(mimo, to_input(data.test.x[:VARIED]), CONTEXTS)
    metrics["independence"] = independence(variances)
    if config.study:
        metrics["study"] = study(data, config, run)
    metrics["timing"] = timing(networks, data, config, run)
    plot_results(metrics, predicted, variances, data, config, run)
    save_model(mimo, data, config, run)
    finish_run(
        run,
        config,
        dataset=data.name,
        headline=headline(metrics),
        metrics=metrics,
        use=f"python mimo_cls/predict.py {shlex.quote(str(run))} PICTURE...",
    )


def load_data(config: Config) -> Data:
    data = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        train_images=config.train_images,
        test_images=config.test_images,
        seed=config.seed,
    )
    sizes = ", ".join(f"{part} {len(getattr(data, part).x)}" for part in ("train", "val", "test"))
    print(f"{data.note}; {sizes}")
    return data


def count_cost(data: Data, config: Config) -> dict[str, float]:
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


def plans(config: Config, number: int) -> dict[str, list[Plan]]:
    """The networks of each arm in run `number`; the predictions of an arm's networks are averaged.

    deep: M twins, those of this run and the next: the bound, at M times the cost. small: in the
    study, M networks of as many parameters together, which go with the width squared.
    """
    members = config.members
    found = {"mimo": [Plan(config.width, members, config.input_repetition, number)]}
    if config.compare:
        found["twin"] = [Plan(config.width, 1, 0.0, number)]
        if config.runs >= members:
            numbers = [(number + place) % config.runs for place in range(members)]
            found["deep"] = [Plan(config.width, 1, 0.0, one) for one in numbers]
    if config.study:
        width, first = config.width / math.sqrt(members), number * members
        found["small"] = [Plan(width, 1, 0.0, first + place) for place in range(members)]
    return found


def fit(plan: Plan, data: Data, config: Config, run: Path) -> MimoWideResNet:
    """The network with its weights of the lowest validation NLL."""
    seed_everything(config.seed, "initialisation", plan.number)
    model = MimoWideResNet(
        config.depth, plan.width, members=plan.members, classes=len(data.classes)
    ).to(data.train.x.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    parts, trained = {"model": model, "optimizer": optimizer}, parallel(model)
    for row in epochs(run, plan.name, parts, config.epochs, config.seed, best=("val_nll", min)):
        began = time.perf_counter()
        row["train_loss"] = train_one_epoch(trained, optimizer, plan, data, config, row["epoch"])
        average_buffers(model)
        row["train_seconds"] = time.perf_counter() - began
        row |= evaluate(predict(model, data.val.x), data.val.y)
    return model


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
    steps = passes(plan, config) * max(1, len(data.train.x) // config.batch_size)
    label, device = f"{plan.name} epoch {epoch}", data.train.x.device.type
    losses = []
    batches = tqdm(epoch_batches(plan, data, config), label, steps, leave=False, disable=None)
    for step, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch - 1 + (step + 1) / steps)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(x)
        loss = mean_of_all(mimo_loss(logits.float(), y), len(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() / plan.members)
    return float(sum_losses(losses, label)) / len(losses)


def passes(plan: Plan, config: Config) -> int:
    """Through the training images in an epoch. One member gains nothing from repetition within a
    batch: it takes more steps.
    """
    return config.batch_repetition if plan.members == 1 else 1


def epoch_batches(plan: Plan, data: Data, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(passes(plan, config)):
        yield from training_batches(
            data.train,
            config.batch_size,
            members=plan.members,
            input_repetition=plan.input_repetition,
            batch_repetition=config.batch_repetition if plan.members > 1 else 1,
            mirror=data.mirror,
            part=OWN,
        )


def learning_rate(config: Config, epochs: float) -> float:
    """The rate after `epochs`: a linear warm-up, then a cosine down to 0."""
    if epochs <= config.warmup_epochs:
        return config.lr * epochs / config.warmup_epochs
    done = (epochs - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * (1 + math.cos(math.pi * done)) / 2


# --- evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: MimoWideResNet, x: Tensor) -> Tensor:
    """log p_m (N, M, C) in double precision of uint8 images (N, 3, H, W), all of them in order."""
    model.eval()
    batches = testing_batches(x[OWN], 250, model.members)
    logits = torch.cat([model(part) for part in batches])
    return all_rows(logits, len(x)).double().log_softmax(-1)


def evaluate(log_probs: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy and NLL of the ensemble and of each member, and how much members differ."""
    answers = {"": ensemble_log_probs(log_probs)}
    if log_probs.shape[1] > 1:
        answers |= {f"member{m}_": part for m, part in enumerate(log_probs.unbind(1), 1)}
    numbers = {name: scores(answer, y) for name, answer in answers.items()}
    row = {f"val_{n}{key}": float(numbers[n][key]) for n in numbers for key in ("accuracy", "nll")}
    return row | {f"val_{name}": value for name, value in diversity(log_probs).items()}


def images_by_part(data: Data) -> dict[str, Tensor]:
    """Validation and test images, the test images under each corruption, and strange images."""
    parts = {"val": data.val.x, "test": data.test.x}
    for kind, levels in SEVERITIES.items():
        parts |= {f"{kind} {level}": corrupt(data.test.x, kind, level) for level in levels}
    return parts | data.strange


def predict_all(network: MimoWideResNet, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """log p_m (N, M, C) of all members, on the CPU, by part."""
    return {part: predict(network, x).cpu() for part, x in parts.items()}


def predict_arms(
    runs: list[dict[str, list[Plan]]],
    networks: dict[Plan, MimoWideResNet],
    parts: dict[str, Tensor],
) -> dict[str, list[dict[str, Tensor]]]:
    """log p_m of all members of an arm's networks, by arm, run and part; each network is asked
    once, however many arms it serves.
    """
    bar = tqdm(networks.items(), "predicting", leave=False, disable=None)
    own = {plan: predict_all(network, parts) for plan, network in bar}
    return {
        name: [
            {part: torch.cat([own[plan][part] for plan in arms[name]], 1) for part in parts}
            for arms in runs
        ]
        for name in runs[0]
    }


def evaluate_arm(predicted: dict[str, Tensor], data: Data) -> dict[str, float | list[float]]:
    """The numbers of one arm in one run, from its members' log p_m (N, M, C) by part.

    corrupted_ is the mean over all kinds and severities, _tempered with one temperature fitted on
    the clean validation images; auroc_ of strange images, by the ensemble's entropy, and by the
    members' mutual information where there are members.
    """
    y = data.test.y.cpu()
    answers = {part: ensemble_log_probs(log_probs) for part, log_probs in predicted.items()}
    numbers = {"temperature": best_temperature(answers["val"], data.val.y.cpu())}
    for suffix, temperature in (("", 1.0), ("_tempered", numbers["temperature"])):
        found = {
            part: scores(temper(answers[part], temperature), y) for part in ("test", *CORRUPTED)
        }
        for name in SCORES:
            numbers[name + suffix] = float(found["test"][name])
            values = [float(found[part][name]) for part in CORRUPTED]
            numbers[f"corrupted_{name}{suffix}"] = mean(values)
            if not suffix:
                numbers[f"by_severity_{name}"] = values
    for strange in data.strange:
        pairs = {"entropy": [entropy(answers[part]) for part in ("test", strange)]}
        if predicted["test"].shape[1] > 1:
            pairs["mutual_information"] = [
                mutual_information(predicted[part].transpose(0, 1)) for part in ("test", strange)
            ]
        numbers |= {f"auroc_{kind}_{strange}": auroc(*pair) for kind, pair in pairs.items()}
    return numbers


def summarise(predicted: dict[str, list[dict[str, Tensor]]], data: Data, config: Config) -> dict:
    """metrics.json's numbers by arm, each a mean and standard deviation over the runs."""
    members = [
        [{part: x[:, m : m + 1] for part, x in one.items()} for one in predicted["mimo"]]
        for m in range(config.members)
    ]
    evaluated = {
        name: [evaluate_arm(one, data) for one in runs] for name, runs in predicted.items()
    }
    one_member = [evaluate_arm(one, data) for runs in members for one in runs]
    metrics = {"arms": {name: over_runs(numbers) for name, numbers in evaluated.items()}}
    metrics["arms"]["member"] = over_runs(one_member)
    differing = [diversity(one["test"]) for one in predicted["mimo"]]
    metrics["diversity"] = {name: mean(one[name] for one in differing) for name in differing[0]}
    if config.compare:
        metrics["mimo_minus_twin"] = paired(evaluated["mimo"], evaluated["twin"])
        metrics["mimo_minus_twin"] |= clean_errors(predicted, data)
    return metrics


def over_runs(numbers: list[dict]) -> dict[str, dict]:
    """Mean and standard deviation of each number of evaluate_arm over the runs."""
    found = {}
    for name in numbers[0]:
        values = torch.tensor([one[name] for one in numbers], dtype=torch.float64)
        found[name] = {key: value.tolist() for key, value in mean_and_sd(values).items()}
    return found


def paired(mimo: list[dict], twin: list[dict]) -> dict[str, dict[str, float]]:
    """Mean and standard error over the runs of each number's difference between the two arms."""
    differences = [
        {name: a[name] - b[name] for name in b if isinstance(b[name], float)}
        for a, b in zip(mimo, twin, strict=True)
    ]
    return {
        name: {"mean": value["mean"], "standard_error": value["sd"] / math.sqrt(len(mimo))}
        for name, value in over_runs(differences).items()
    }


def clean_errors(predicted: dict[str, list[dict[str, Tensor]]], data: Data) -> dict[str, float]:
    """Standard errors, over the sources of the test images, of the mean differences of all runs."""
    y, source, differences = data.test.y.cpu(), data.test.source.cpu(), {"accuracy": 0, "nll": 0}
    count = len(predicted["mimo"])
    for one, other in zip(predicted["mimo"], predicted["twin"], strict=True):
        a, b = (ensemble_log_probs(part["test"]) for part in (one, other))
        hits = [(part.argmax(1) == y).double() for part in (a, b)]
        differences["accuracy"] = differences["accuracy"] + (hits[0] - hits[1]) / count
        right = (b - a).gather(1, y[:, None])[:, 0]
        differences["nll"] = differences["nll"] + right / count
    return {
        f"{name}_error_over_images": error_over_sources(value, source)
        for name, value in differences.items()
    }


def study(data: Data, config: Config, run: Path) -> list[dict]:
    """What MIMO has over its twin, by width, M and rho, at equal compute, over the runs."""
    parts, found = images_by_part(data), []
    for width in config.study_widths:
        twins = evaluate_runs(Plan(width, 1, 0.0, 0), parts, data, config, run)
        for members in config.study_members:
            for rho in config.study_repetitions:
                plan = Plan(width, members, rho, 0)
                ensembles = evaluate_runs(plan, parts, data, config, run)
                row = {"width": width, "members": members, "input_repetition": rho}
                row |= {"twin": over_runs(twins), "mimo": over_runs(ensembles)}
                found.append(row | {"mimo_minus_twin": paired(ensembles, twins)})
    return found


def evaluate_runs(
    plan: Plan, parts: dict[str, Tensor], data: Data, config: Config, run: Path
) -> list[dict]:
    """Numbers of evaluate_arm for each run of a plan, and how often two members disagree."""
    found = []
    for number in range(config.runs):
        predicted = predict_all(fit(plan._replace(number=number), data, config, run), parts)
        disagreement = diversity(predicted["test"])["disagreement"]
        alone = [
            float(scores(one, data.test.y.cpu())["accuracy"]) for one in predicted["test"].unbind(1)
        ]
        about = {"disagreement": disagreement, "worst_member_accuracy": min(alone)}
        found.append(evaluate_arm(predicted, data) | about)
    return found


def timing(
    networks: dict[Plan, MimoWideResNet], data: Data, config: Config, run: Path
) -> dict[str, float]:
    """Seconds of training of run 0 by arm, and of a forward pass of 100 images."""
    arms = plans(config, 0)
    numbers = {
        f"{name}_train_seconds": sum(
            row["train_seconds"] for plan in needed for row in read_rows(run, plan.name)
        )
        for name, needed in arms.items()
    }
    if config.compare:
        pair = (networks[arms[name][0]] for name in ("twin", "mimo"))
        numbers |= time_forward(*pair, data.test.x)
    return numbers


@torch.no_grad()
def time_forward(twin: MimoWideResNet, mimo: MimoWideResNet, x: Tensor) -> dict[str, float]:
    """Seconds of a forward pass, one network after the other 25 times, and the median of ratios."""
    x = x[torch.arange(100, device=x.device) % len(x)]
    inputs = [next(testing_batches(x, len(x), model.members)) for model in (twin, mimo)]
    calls = [lambda m=m, x=x: m(x) for m, x in zip((twin, mimo), inputs, strict=True)]
    pairs = [[stopwatch(call) for call in calls] for _ in range(27)][2:]  # warm-up
    return {
        "twin_forward_seconds": median(pair[0] for pair in pairs),
        "mimo_forward_seconds": median(pair[1] for pair in pairs),
        "forward_percent": 100 * (median(pair[1] / pair[0] for pair in pairs) - 1),
    }


def stopwatch(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    call().sum().item()  # waits for the device
    return time.perf_counter() - began


# --- report -----------------------------------------------------------------------------------


def save_model(model: MimoWideResNet, data: Data, config: Config, run: Path) -> None:
    """model.pt: all that predict.py needs, the ensemble of run 0."""
    description = {
        "project": "mimo_cls",
        "depth": config.depth,
        "width": config.width,
        "members": config.members,
        "classes": list(data.classes),
        "image_size": data.train.x.shape[-1],
        "weights": model.state_dict(),
    }
    save(run / "model.pt", description)


def headline(metrics: dict) -> dict[str, float]:
    """Means over the runs."""
    numbers, names = {}, ("accuracy", "nll", "ece", "nll_tempered")
    for arm in ("mimo", "twin", "small", "deep"):
        if arm not in metrics["arms"]:
            continue
        found = metrics["arms"][arm]
        shown = [*names, *(f"corrupted_{name}" for name in names)]
        numbers |= {f"{arm}_{name}": found[name]["mean"] for name in shown}
        place = next(name for name in found if name.startswith("auroc_entropy"))
        numbers[f"{arm}_auroc"] = found[place]["mean"]
    numbers["disagreement"] = metrics["diversity"]["disagreement"]
    numbers["independence"] = metrics["independence"]
    for name in ("parameters", "multiply_adds"):
        numbers[f"{name}_overhead_percent"] = metrics["overhead"][f"{name}_percent"]
    return numbers


def plot_results(
    metrics: dict,
    predicted: dict[str, list[dict[str, Tensor]]],
    variances: Tensor,
    data: Data,
    config: Config,
    run: Path,
) -> None:
    """The pictures of a run; those of single networks are of run 0."""
    title = f"{data.name}, WRN-{config.depth}-{config.width}, M = {config.members}"
    rows = {
        name: read_rows(run, needed[0].name)
        for name, needed in plans(config, 0).items()
        if name in ("mimo", "twin")
    }
    try_plot(plot_curves, rows, title, run / "curves.png")
    try_plot(plot_corruption, metrics["arms"], SEVERITIES, title, run / "corruption.png")
    answers = {
        name: torch.stack([ensemble_log_probs(one["test"]) for one in predicted[name]])
        for name in rows
    }
    ece = {name: metrics["arms"][name]["ece"]["mean"] for name in rows}
    y, log_probs = data.test.y.cpu(), predicted["mimo"][0]["test"]
    try_plot(plot_calibration, answers, y, ece, title, run / "reliability.png")
    try_plot(plot_independence, variances, title, run / "independence.png")
    uncertainty = mutual_information(log_probs.transpose(0, 1))
    most = uncertainty.argsort(descending=True, stable=True)[:8]
    images = (part[most] for part in (data.test.x.cpu(), y, log_probs.exp()))
    try_plot(plot_disagreement, *images, data.classes, title, run / "disagreement.png")
    if config.study:
        try_plot(plot_room, metrics["study"], title.rsplit(", W", 1)[0], run / "room.png")


if __name__ == "__main__":
    run_main(main, DataError)
