"""Self-training: a network labels the pictures of which it is sure, learns from them, and stops.

Round 0 trains on the few labelled pictures. Every further round labels the pool with the averaged
network of the round before, with a threshold for each class, and trains on these pictures, strongly
augmented, together with the labelled ones. The round whose labels changed least is kept.

Run it with `python self_training/train.py`, or with `--labels_per_class 1`.
"""

import csv
import io
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Literal, NamedTuple

from run import (
    Batch,
    Count,
    Decay,
    Rate,
    Width,
    epochs,
    finish_run,
    open_run,
    read_rows,
    read_torch,
    replace_file,
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
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from data import (
    UNKNOWN,
    DataError,
    Images,
    Source,
    Splits,
    augment,
    batches,
    fingerprints,
    load,
    split,
    training_batches,
)
from model import (
    NONE,
    SKLEARN,
    Labels,
    LiveLabels,
    SmallCNN,
    averaged,
    best_round,
    by_confidence,
    calibrated_probs,
    confident_labels,
    fit_temperature,
    label_quality,
    next_labels,
    no_labels,
    share_changed,
    sklearn_accuracy,
)
from plots import plot_arms, plot_examples, plot_quality

METHODS = ("plain", "rounds", "every_step")
Strength = Annotated[float, ">= 0", "<= 2"]


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["digits", "mnist", "folder"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Annotated[int, ">= 0", "<= 4000000000"]  # seed + repeats is a seed, too
    repeats: Annotated[int, ">= 1", "<= 1000"]
    image_size: Annotated[int, ">= 0", "<= 512"]
    mirror: bool
    labels_per_class: Annotated[int, ">= 0", "<= 1000000"]
    val_per_class: Annotated[int, ">= 0", "<= 1000000"]
    pool_size: Annotated[int, ">= 0", "<= 100000000"]
    method: Literal["rounds", "every_step", "plain"]
    compare: bool
    width: Width
    rounds: Annotated[int, ">= 1", "<= 10000"]
    steps: Annotated[int, ">= 2", "<= 1000000"]  # of a one-cycle schedule
    batch_size: Annotated[int, ">= 2", "<= 65536"]  # batch normalisation
    pool_batch_size: Batch
    lr: Rate
    weight_decay: Decay
    augment: Strength
    strong: Strength
    weak: Strength
    ema: Annotated[float, ">= 0", "< 1"]
    restart: bool
    balanced: bool
    stop: Literal["agreement", "validation"]
    patience: Count
    add_per_round: Annotated[float, "> 0", "<= 100000000"]
    threshold: Annotated[float, ">= 0", "< 1"]
    revise: bool
    sklearn_pool: Count

    def __post_init__(self) -> None:
        if 0 < self.image_size < 8:
            raise ValueError(f"image_size: expected 0 or at least 8, found {self.image_size}")
        if self.add_per_round >= 1 and self.add_per_round % 1:
            found = f"found {self.add_per_round}"
            raise ValueError(f"add_per_round: expected a share or a whole number, {found}")
        if self.stop == "validation" and not self.val_per_class:
            raise ValueError("stop: expected agreement where val_per_class is 0")


class Trial(NamedTuple):
    """What all networks of one repeat share."""

    config: Config  # with the repeat's own seed
    run: Path
    splits: Splits
    fingerprints: Tensor  # of the pool's pictures
    classes: int


class Arm(NamedTuple):
    """One way to train a network; all take the same number of steps."""

    name: str
    how: str  # of METHODS, or "once": on `images` alone
    images: Images  # with labels


class Learner(NamedTuple):
    """What learns, and what it learns from."""

    student: nn.Module
    teacher: AveragedModel  # the student's mean over the last steps: labels, and is tested
    live: LiveLabels  # of every_step
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


class Outcome(NamedTuple):
    rows: list[dict]  # of history.csv, from round 0 on
    kept: dict[str, int]  # the round that each way to stop keeps


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    source = load(dataset=config.dataset, data_dir=config.data_dir, image_size=config.image_size)
    repeats = range(config.seed, config.seed + config.repeats)
    trials = [new_trial(source, replace(config, seed=seed), run, device) for seed in repeats]
    print(source.note)
    open_run(run, config, source.name, source.train, source.test or (), source.files)
    (run / "weights").mkdir(exist_ok=True)
    outcomes = [{arm.name: self_train(trial, arm) for arm in arms_of(trial)} for trial in trials]
    # every decision has been made: only now are test pictures and hidden labels looked at
    reports = [evaluate_arms(*both) for both in zip(trials, outcomes, strict=True)]
    metrics = summarise(reports, config)
    plot_results(source, metrics, trials[0], outcomes[0][config.method])
    write_labels(source, trials[0], outcomes[0][config.method])
    save_model(source, trials[0], outcomes[0][config.method])
    finish_run(
        run,
        config,
        dataset=source.name,
        headline=headline(metrics, config),
        metrics=metrics,
        use=f"python self_training/predict.py {shlex.quote(str(run))} PICTURE...",
    )


def new_trial(source: Source, config: Config, run: Path, device: torch.device) -> Trial:
    """The split of the repeat's seed, on the device."""
    splits = split(
        source,
        labels_per_class=config.labels_per_class,
        val_per_class=config.val_per_class,
        pool_size=config.pool_size,
        seed=config.seed,
    )
    keys = fingerprints(splits.pool).to(device)
    return Trial(config, run, splits.to(device), keys, len(source.classes))


def arms_of(trial: Trial) -> list[Arm]:
    """The method and, to compare, the others; `_val` learns from the validation labels as well."""
    config, (labelled, val, pool, hidden, _, _) = trial.config, trial.splits
    if not config.compare:
        return [Arm(config.method, config.method, labelled)]
    arms = [Arm("supervised", "once", labelled)]
    arms += [Arm(method, method, labelled) for method in METHODS]
    if config.val_per_class:
        both = add_images(labelled, val)
        arms += [Arm("supervised_val", "once", both), Arm("method_val", config.method, both)]
    known = hidden != UNKNOWN
    if known.any():
        arms.append(Arm("oracle", "once", add_images(labelled, Images(pool[known], hidden[known]))))
    return arms


def add_images(first: Images, second: Images) -> Images:
    return Images(*map(torch.cat, zip(first, second, strict=True)))


# --- training: neither a test picture nor a true label of the pool decides anything here ------


def self_train(trial: Trial, arm: Arm) -> Outcome:
    """All rounds of one arm; a file for each in weights/ holds its teacher and its labels."""
    config, stage = trial.config, f"{arm.name}-seed{trial.config.seed}"
    learner = new_learner(trial)
    student, teacher, *others = learner
    fresh = {name: part.clone() for name, part in student.state_dict().items()}
    parts = {"model": teacher, "student": student}
    if arm.how == "every_step":  # one schedule over all rounds
        parts |= zip(("live", "optimizer", "schedule"), others, strict=True)
    best = ("val_loss" if stop_of(arm.name, config) == "validation" else "changed", min)
    how = {"patience": config.patience, "first": 0, "best": None if arm.how == "once" else best}
    rounds = 0 if arm.how == "once" else config.rounds
    for row in epochs(trial.run, stage, parts, rounds, config.seed, **how):
        number = row["epoch"]
        if number and nothing_new(trial, arm, number):
            break
        if arm.how == "plain" or config.restart:
            student.load_state_dict(fresh)
        if arm.how in ("plain", "rounds"):
            learner = Learner(*learner[:3], *one_cycle_adamw(student, config, config.steps))
            teacher.n_averaged.zero_()  # the average is over the steps of this round
        seed_everything(config.seed, "round", number)  # the same for all arms
        row |= train_round(trial, arm, number, learner)
        row |= end_round(trial, arm, number, teacher.module)
    rows = read_rows(trial.run, stage)
    return Outcome(rows, kept_rounds(rows))


def untrained_network(trial: Trial) -> nn.Module:
    """The same initial weights whenever it is called for the same repeat."""
    config, pool = trial.config, trial.splits.pool
    seed_everything(config.seed, "weights")
    model = SmallCNN(channels=pool.shape[1], width=config.width, classes=trial.classes)
    return model.to(pool.device)


def new_learner(trial: Trial) -> Learner:
    config, student = trial.config, untrained_network(trial)
    live = LiveLabels(trial.classes, balanced=config.balanced).to(trial.splits.pool.device)
    optimizing = one_cycle_adamw(student, config, all_steps(config))
    return Learner(student, averaged(student, config.ema), live, *optimizing)


def all_steps(config: Config) -> int:
    return config.steps * (config.rounds + 1)


def one_cycle_adamw(
    model: nn.Module, config: Config, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    return optimizer, schedule


def train_round(trial: Trial, arm: Arm, number: int, learner: Learner) -> dict:
    """Mean loss per step over one round's steps. Raises FloatingPointError if it is not finite."""
    config, (student, teacher, live, optimizer, schedule) = trial.config, learner
    drawn = round_batches(trial, arm, number)
    steps = all_steps(config) if arm.how == "once" else config.steps
    label, losses = f"{arm.name} round {number}", []
    student.train()
    teacher.eval()
    for x, y, u, wanted in tqdm(drawn, label, steps, leave=False, disable=None):
        weight = torch.ones_like(wanted)
        if arm.how == "every_step":
            weak = augment(u, config.weak, mirror=config.mirror, geometry_only=True)
            with torch.no_grad():
                wanted, weight = live(teacher(weak).softmax(1))
        strong = augment(u, config.strong, mirror=config.mirror)
        logits = student(torch.cat((augment(x, config.augment, mirror=config.mirror), strong)))
        loss = F.cross_entropy(logits[: len(x)], y)
        if len(u):
            each = F.cross_entropy(logits[len(x) :], wanted, reduction="none")
            loss = loss + (weight * each).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        teacher.update_parameters(student)
        losses.append(loss.detach())
    return {"train_loss": float(sum_losses(losses, label)) / len(losses)}


def round_batches(trial: Trial, arm: Arm, number: int) -> Iterator[tuple[Tensor, ...]]:
    """Labelled pictures x, y and pool pictures u with pseudo-labels, or none, for each step."""
    config, pool = trial.config, trial.splits.pool
    images, pseudo = arm.images, Images(pool[:0], trial.splits.hidden[:0])
    if arm.how == "every_step":  # the labels are not read
        pseudo = Images(pool, torch.full((len(pool),), NONE, device=pool.device))
    elif number:
        label = read_round(trial, arm.name, number - 1).label
        pseudo = Images(pool[label != NONE], label[label != NONE])
    if arm.how == "plain":  # as if they had been labelled
        images, pseudo = add_images(images, pseudo), Images(pool[:0], pseudo.y[:0])
    steps = all_steps(config) if arm.how == "once" else config.steps
    if not len(pseudo.x):
        nothing, size = (pool[:0].float(), pseudo.y), config.batch_size + config.pool_batch_size
        return ((*own, *nothing) for own in training_batches(images, size, steps))
    own = training_batches(images, config.batch_size, steps)
    other = training_batches(pseudo, config.pool_batch_size, steps)
    return ((*first, *second) for first, second in zip(own, other, strict=True))


def nothing_new(trial: Trial, arm: Arm, number: int) -> bool:
    """Whether round `number` would learn the labels that the round before it has learned."""
    if arm.how == "every_step":
        return False
    new = read_round(trial, arm.name, number - 1).label
    old = read_round(trial, arm.name, number - 2).label if number > 1 else None
    return not (new != NONE).any() if old is None else torch.equal(new, old)


@torch.no_grad()
def end_round(trial: Trial, arm: Arm, number: int, model: nn.Module) -> dict:
    """The round's numbers without any test picture; its file in weights/ is written."""
    config, val, row, temperature = trial.config, trial.splits.val, {}, 1.0
    if config.val_per_class and not arm.name.endswith("_val"):  # those have learned from it
        logits = predict(model, val.x)
        temperature = fit_temperature(logits, val.y)
        row["val_loss"] = float(F.cross_entropy(logits.double() / temperature, val.y))
        row["val_accuracy"] = accuracy(logits, val.y)
    row["temperature"] = temperature
    labels = no_labels(len(trial.splits.pool), trial.splits.pool.device)
    if arm.how != "once":
        before = read_round(trial, arm.name, number - 1) if number else labels
        labels = label_pool(trial, arm, number, before, model, temperature)
        row["changed"] = share_changed(before.predicted, labels.predicted)
        row["pseudo_labels"] = int((labels.label != NONE).sum())
    state = {"model": model.state_dict()} | labels._asdict()
    save(round_file(trial, arm.name, number), state)
    return row


def label_pool(
    trial: Trial, arm: Arm, number: int, before: Labels, model: nn.Module, temperature: float
) -> Labels:
    """The labels that the round's teacher gives.

    It looks at no more pictures than a round can draw: a round costs the same however large the
    pool. `plain` chooses among all of them, at the calibrated temperature.
    """
    config, pool = trial.config, trial.splits.pool
    if arm.how == "plain":
        return choose_plain(trial, before, calibrated_probs(predict(model, pool), temperature))
    seed_everything(config.seed, "pool", number)
    seen = torch.randperm(len(pool))[: config.steps * config.pool_batch_size].to(pool.device)
    probs = calibrated_probs(predict(model, pool[seen]), 1.0)
    labels = no_labels(len(pool), pool.device)
    for part, found in zip(labels, confident_labels(probs, balanced=config.balanced), strict=True):
        part[seen] = found
    return labels


def choose_plain(trial: Trial, before: Labels, probs: Tensor) -> Labels:
    """next_labels by the settings."""
    config, share = trial.config, trial.config.add_per_round
    return next_labels(
        before,
        probs,
        trial.fingerprints,
        add=math.ceil(share * len(probs)) if share < 1 else int(share),
        threshold=config.threshold,
        balanced=config.balanced,
        revise=config.revise,
    )


def kept_rounds(rows: list[dict]) -> dict[str, int]:
    """The round that is kept by each way to stop, which read no test picture."""
    kept = {"last": len(rows) - 1}
    if "changed" in rows[0]:
        kept["agreement"] = best_round([row["changed"] for row in rows])
    if "val_loss" in rows[0]:
        kept["validation"] = best_round([row["val_loss"] for row in rows])
    return kept


def stop_of(name: str, config: Config) -> str:
    """Which way to stop counts for an arm: one that learns from validation cannot use that."""
    if name in METHODS:
        return config.stop
    return "agreement" if name == "method_val" else "last"


def round_file(trial: Trial, name: str, number: int) -> Path:
    return trial.run / "weights" / f"{name}-seed{trial.config.seed}-round{number}.pt"


def read_round(trial: Trial, name: str, number: int) -> Labels:
    """The labels that the round's teacher gave."""
    state = read_torch(round_file(trial, name, number))
    return Labels(*(state[part].to(trial.splits.pool.device) for part in Labels._fields))


def read_model(trial: Trial, name: str, number: int) -> nn.Module:
    """The round's teacher."""
    model = untrained_network(trial)
    model.load_state_dict(read_torch(round_file(trial, name, number))["model"])
    return model


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Class logits (N, C) of uint8 images. Raises FloatingPointError if they are not finite."""
    model.eval()
    logits = torch.cat([model(part) for part in batches(x)])
    if not logits.isfinite().all():
        raise FloatingPointError("the network's outputs are not finite; a smaller lr may help")
    return logits


def accuracy(logits: Tensor, y: Tensor) -> float:
    return int((logits.argmax(1) == y).sum()) / len(y)


# --- test -------------------------------------------------------------------------------------


def evaluate_arms(trial: Trial, outcomes: dict[str, Outcome]) -> dict:
    """Test accuracy of every network of one repeat, and how many pseudo-labels were right."""
    config, splits = trial.config, trial.splits
    parts = {"labelled": splits.labelled.x, "validation": splits.val.x}
    parts |= {"pool": splits.pool, "test": splits.test.x}
    report = {"sizes": {name: len(part) for name, part in parts.items()}, "arms": {}}
    for name, (rows, kept) in outcomes.items():
        rounds = [evaluate_round(trial, name, row) for row in rows]
        report["arms"][name] = {"rounds": rounds, "kept": kept}
    if config.compare:
        report["sklearn"] = evaluate_sklearn(trial, "supervised", splits.labelled)
        if config.val_per_class:
            both = add_images(splits.labelled, splits.val)
            report["sklearn_val"] = evaluate_sklearn(trial, "supervised_val", both)
    return report


def evaluate_round(trial: Trial, name: str, row: dict) -> dict:
    splits, number = trial.splits, row["epoch"]
    labels = read_round(trial, name, number).label
    left_out = ("stage", "epoch", "train_loss")
    numbers = {"round": number} | {key: x for key, x in row.items() if key not in left_out}
    logits = predict(read_model(trial, name, number), splits.test.x)
    numbers["test_accuracy"] = accuracy(logits, splits.test.y)
    return numbers | label_quality(labels, splits.hidden, trial.classes)


@torch.no_grad()
def evaluate_sklearn(trial: Trial, name: str, labelled: Images) -> dict[str, float]:
    """Test accuracies of scikit-learn's classifiers on pixels, and on the features of `name`."""
    splits, model = trial.splits, read_model(trial, name, 0).eval()
    pool = splits.pool[: trial.config.sklearn_pool]
    views = {
        "pixels": lambda x: x.flatten(1).float() / 255,
        "features": lambda x: torch.cat([model.features(part) for part in batches(x)]),
    }
    scores = {}
    for view, see in views.items():
        own, test = ((see(part.x), part.y) for part in (labelled, splits.test))
        for kind in SKLEARN:
            found = sklearn_accuracy(kind, own, see(pool), test)
            scores |= {f"{kind} {setting}, {view}": score for setting, score in found.items()}
    return scores


# --- report -----------------------------------------------------------------------------------


def summarise(repeats: list[dict], config: Config) -> dict:
    """metrics.json's numbers: mean and standard deviation over the repeats."""
    metrics = {"sizes": repeats[0]["sizes"], "arms": {}}
    for name in repeats[0]["arms"]:
        trials = [report["arms"][name] for report in repeats]
        metrics["arms"][name] = summarise_arm(trials, stop_of(name, config))
    for key in ("sklearn", "sklearn_val"):
        if key in repeats[0]:
            names = repeats[0][key]
            metrics[key] = {
                name: summary_of_seeds([one[key][name] for one in repeats]) for name in names
            }
    return metrics


def summarise_arm(trials: list[dict], stop: str) -> dict:
    """Test accuracy of the rounds that `stop` keeps, and of those that other ways would keep."""
    by_stop = {
        way: summary_of_seeds(
            [trial["rounds"][trial["kept"][way]]["test_accuracy"] for trial in trials]
        )
        for way in trials[0]["kept"]
    }
    best = [trial["kept"][stop] for trial in trials]
    chosen = [trial["rounds"][number] for trial, number in zip(trials, best, strict=True)]
    right = [row["accuracy"] for row in chosen if row["accuracy"] is not None]
    return {
        "test_accuracy": by_stop[stop],
        "kept_by": by_stop,
        "pseudo_label_accuracy": summary_of_seeds(right) if right else None,
        "best_round": best,
        "rounds": [trial["rounds"] for trial in trials],
    }


def summary_of_seeds(values: list[float]) -> dict:
    sd = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "sd": sd, "of_seeds": values}


def headline(metrics: dict, config: Config) -> dict:
    """Means over the repeats; of scikit-learn's classifiers the best on the test pictures."""
    arms = metrics["arms"]
    numbers = {"self_training_accuracy": arms[config.method]["test_accuracy"]["mean"]}
    names = {"supervised_accuracy": "supervised", "oracle_accuracy": "oracle"}
    names |= {"self_training_val_accuracy": "method_val"}
    numbers |= {
        key: arms[arm]["test_accuracy"]["mean"] for key, arm in names.items() if arm in arms
    }
    for key in ("sklearn", "sklearn_val"):
        if key in metrics:
            best = max(score["mean"] for score in metrics[key].values())
            numbers[f"{key}_accuracy"] = best
    if right := arms[config.method]["pseudo_label_accuracy"]:  # none where nothing is known
        numbers["pseudo_label_accuracy"] = right["mean"]
    return numbers


def plot_results(source: Source, metrics: dict, trial: Trial, outcome: Outcome) -> None:
    """The three pictures; the examples are of the first repeat."""
    config, run = trial.config, trial.run
    count = len(trial.splits.labelled.y)
    title, own = f"{source.name}, {count} labels", config.method
    try_plot(plot_arms, metrics, own, title, run / "accuracy.png")
    path = run / "pseudo_labels.png"
    try_plot(plot_quality, metrics["arms"], own, source.classes, title, path)
    kept = outcome.kept[config.stop]
    first = surest(trial, own, 0, only_wrong=False)
    mistakes = surest(trial, own, kept, only_wrong=True)
    path = run / "examples.png"
    try_plot(plot_examples, first, mistakes, kept, source.classes, title, path)


def surest(trial: Trial, name: str, number: int, *, only_wrong: bool) -> dict:
    """Pictures, labels, truths and confidences of a round's 16 surest pseudo-labels."""
    splits = trial.splits
    _, label, confidence = read_round(trial, name, number)
    wrong = (label != splits.hidden) & (splits.hidden != UNKNOWN)
    wanted = wrong if only_wrong else torch.ones_like(wrong)
    order = by_confidence(confidence, trial.fingerprints)
    order = order[((label != NONE) & wanted)[order]][:16]
    parts = {"x": splits.pool, "label": label, "truth": splits.hidden, "confidence": confidence}
    return {key: part[order].cpu().numpy() for key, part in parts.items()}


def write_labels(source: Source, trial: Trial, outcome: Outcome) -> None:
    """pseudo_labels.csv: what the kept network of the first repeat predicts for the whole
    pool, and since which round.
    """
    name, kept = trial.config.method, outcome.kept[trial.config.stop]
    logits = predict(read_model(trial, name, kept), trial.splits.pool)
    confidence, label = calibrated_probs(logits, outcome.rows[kept]["temperature"]).max(1)
    since = torch.full_like(label, kept)
    same = torch.ones_like(label, dtype=torch.bool)
    for number in range(kept - 1, -1, -1):  # backwards, while the label stays the same
        same &= read_round(trial, name, number).predicted == label
        since[same] = number
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("file", "pseudo_label", "confidence", "round"))
    columns = (trial.splits.places, label, confidence, since)
    for place, number, sure, since_round in zip(*(c.tolist() for c in columns), strict=True):
        row = (source.files[place], source.classes[number], f"{sure:.6f}", since_round)
        writer.writerow(row)
    replace_file(trial.run / "pseudo_labels.csv", table.getvalue().encode())


def save_model(source: Source, trial: Trial, outcome: Outcome) -> None:
    """model.pt: all that predict.py needs, of the first repeat's kept round."""
    config, kept = trial.config, outcome.kept[trial.config.stop]
    state = {
        "project": "self_training",
        "width": config.width,
        "channels": trial.splits.pool.shape[1],
        "image_size": list(trial.splits.pool.shape[2:]),
        "classes": list(source.classes),
        "temperature": outcome.rows[kept]["temperature"],
        "calibrated": config.val_per_class > 0,
        "weights": read_model(trial, config.method, kept).state_dict(),
    }
    save(trial.run / "model.pt", state)


if __name__ == "__main__":
    run_main(main, DataError)
