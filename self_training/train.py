"""Self-training: a network labels the pictures of which it is surest, learns from them, and stops.

Round 0 trains on the few labelled pictures. Every further round gives pseudo-labels to the surest
predictions and trains anew, from the same initial weights, until the validation loss has not
improved for some rounds. The weights of the best round are kept.

Run it with `python self_training/train.py`, or with `--labels_per_class 1`.
"""

import math
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    DataError,
    Images,
    Source,
    Splits,
    batches,
    fingerprints,
    load,
    split,
    training_batches,
)
from model import (
    NONE,
    PseudoLabels,
    SmallCNN,
    best_round,
    by_confidence,
    calibrated_probs,
    end_of_rounds,
    fit_temperature,
    label_quality,
    next_labels,
    no_labels,
    sklearn_accuracy,
)
from plots import plot_accuracy, plot_examples, plot_quality
from run import finish_run, load_checkpoint, save, save_checkpoint, seed_everything, start_run

METHODS = {  # name: (balanced, revise)
    "plain": (False, False),
    "balanced": (True, False),
    "revise": (False, True),
    "balanced_revise": (True, True),
}


@dataclass(frozen=True)
class Config:
    """Names and types; values and their comments stand in config.yaml."""

    dataset: Literal["auto", "mnist", "folder", "digits"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: int
    repeats: int
    image_size: int
    labels_per_class: int
    val_per_class: int
    pool_size: int
    width: int
    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    augment: bool
    restart: bool
    rounds: int
    patience: int
    add_per_round: float
    threshold: float
    balanced: bool
    revise: bool
    calibrate: bool
    ablation: bool
    sklearn: tuple[Literal["neighbours", "logistic"], ...]

    def __post_init__(self) -> None:
        least = {"seed": 0, "image_size": 0, "pool_size": 0, "weight_decay": 0, "threshold": 0}
        least |= {"batch_size": 2}  # batch normalisation
        for name, value in vars(self).items():
            if isinstance(value, (bool, str, Path, tuple)):
                continue
            if name in least and value < least[name]:
                raise ValueError(f"{name}: expected at least {least[name]}, found {value}")
            if name not in least and not value > 0:
                raise ValueError(f"{name}: expected more than 0, found {value}")
        if 0 < self.image_size < 8:
            raise ValueError(f"image_size: expected 0 or at least 8, found {self.image_size}")
        if self.threshold >= 1:
            raise ValueError(f"threshold: expected less than 1, found {self.threshold}")
        if self.add_per_round >= 1 and self.add_per_round % 1:
            raise ValueError(
                f"add_per_round: expected a share below 1 or a whole number, "
                f"found {self.add_per_round}"
            )


class Trial(NamedTuple):
    """What all networks of one repeat share."""

    config: Config  # with the repeat's own seed
    run: Path
    splits: Splits
    fingerprints: Tensor  # of the pool's pictures
    classes: int
    mirror: bool


class Outcome(NamedTuple):
    rows: list[dict]  # of history.csv, from round 0 on
    best: int  # the round that is kept
    reason: str  # why no further round followed


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    source = load(dataset=config.dataset, data_dir=config.data_dir, image_size=config.image_size)
    print(source.note)
    (run / "weights").mkdir(exist_ok=True)
    own = next(name for name, how in METHODS.items() if how == (config.balanced, config.revise))
    names = list(METHODS) if config.ablation else [own]
    repeats = []
    for seed in range(config.seed, config.seed + config.repeats):
        trial = new_trial(source, replace(config, seed=seed), run, device)
        outcomes = {name: self_train(trial, name) for name in names}
        train_references(trial)
        repeats.append((trial, outcomes))
    # every decision has been made: only now are test pictures and hidden labels looked at
    metrics = summarise([judge(*repeat) for repeat in repeats])
    trial, outcomes = repeats[0]
    shutil.copyfile(round_file(trial, own, outcomes[own].best), run / "best.pt")
    draw(source, metrics, own, trial, outcomes[own])
    numbers = headline(metrics, own)
    finish_run(run, config, dataset=source.name, headline=numbers, metrics=metrics)


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
    return Trial(config, run, splits.to(device), keys, len(source.classes), source.mirror)


# --- training: neither a test picture nor a true label of the pool decides anything here ------


def self_train(trial: Trial, name: str) -> Outcome:
    """All rounds of one method; what a killed run has done of them is not done again."""
    config, (labelled, _, pool, _, _) = trial.config, trial.splits
    model = train_once(trial, "supervised", labelled)
    history = load_checkpoint(trial.run, name, {})
    if rows := rows_of(trial, name, history):
        pseudo = restore(trial, name, rows[-1]["round"], model)
    else:
        pseudo = no_labels(len(pool), pool.device)
        rows = [end_round(trial, name, model, pseudo, {"round": 0}, history)]
    while True:
        losses = [row["val_loss"] for row in rows]
        if reason := end_of_rounds(losses, rounds=config.rounds, patience=config.patience):
            return Outcome(rows, best_round(losses), reason)
        began = time.perf_counter()
        probs = calibrated_probs(predict(model, pool), rows[-1]["temperature"])
        after = choose(trial, name, pseudo, probs)
        if torch.equal(after.label, pseudo.label):
            return Outcome(rows, best_round(losses), "nothing to add")
        row = {"round": len(rows)} | changes(pseudo, after)
        pseudo, given = after, after.label != NONE
        if config.restart:
            model = new_model(trial)
        images = join(labelled, Images(pool[given], pseudo.label[given]))
        row |= fit(model, images, trial, f"{name} round {len(rows)}", len(rows))
        row["seconds"] = time.perf_counter() - began
        rows.append(end_round(trial, name, model, pseudo, row, history))


def choose(trial: Trial, name: str, pseudo: PseudoLabels, probs: Tensor) -> PseudoLabels:
    """next_labels by the settings and the method's name."""
    share = trial.config.add_per_round
    balanced, revise = METHODS[name]
    return next_labels(
        pseudo,
        probs,
        trial.fingerprints,
        add=math.ceil(share * len(probs)) if share < 1 else int(share),
        threshold=trial.config.threshold,
        balanced=balanced,
        revise=revise,
    )


def changes(before: PseudoLabels, after: PseudoLabels) -> dict:
    """How many pseudo-labels a round added, withdrew and changed."""
    was, now = before.label != NONE, after.label != NONE
    return {
        "added": int((now & ~was).sum()),
        "withdrawn": int((was & ~now).sum()),
        "changed": int((was & now & (before.label != after.label)).sum()),
    }


def train_references(trial: Trial) -> None:
    """One network on all labels, one on those for training and validation together."""
    labelled, val, pool, hidden, _ = trial.splits
    train_once(trial, "oracle", join(labelled, Images(pool, hidden)))
    train_once(trial, "with_validation", join(labelled, val))


def train_once(trial: Trial, name: str, images: Images) -> nn.Module:
    """A network trained on `images` as in round 0, or loaded if that has been done."""
    model, history = new_model(trial), load_checkpoint(trial.run, name, {})
    if rows_of(trial, name, history):
        restore(trial, name, 0, model)
    else:
        pool = trial.splits.pool
        row = {"round": 0} | fit(model, images, trial, name, 0)
        end_round(trial, name, model, no_labels(len(pool), pool.device), row, history)
    return model


def new_model(trial: Trial) -> nn.Module:
    """The same initial weights whenever it is called for the same repeat."""
    seed_everything(trial.config.seed, "weights")
    pool = trial.splits.pool
    model = SmallCNN(channels=pool.shape[1], width=trial.config.width, classes=trial.classes)
    return model.to(pool.device)


def join(first: Images, second: Images) -> Images:
    return Images(*map(torch.cat, zip(first, second, strict=True)))


def fit(model: nn.Module, images: Images, trial: Trial, label: str, number: int) -> dict:
    """Takes `steps` steps. Raises FloatingPointError if a loss was not finite."""
    config, losses = trial.config, []
    seed_everything(config.seed, "round", number)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps)
    drawn = training_batches(
        images, config.batch_size, config.steps, augmented=config.augment, mirror=trial.mirror
    )
    model.train()
    for x, y in tqdm(drawn, label, config.steps, leave=False, disable=None):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)  # read once: the loop never waits for the device
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).nonzero()[0]) + 1
        raise FloatingPointError(f"{label}: the loss is not finite at step {first}")
    return {"train_pictures": len(images.x), "train_loss": float(losses.mean())}


def end_round(
    trial: Trial,
    name: str,
    model: nn.Module,
    pseudo: PseudoLabels,
    row: dict,
    history: list[dict],
) -> dict:
    """The round's row with its validation numbers, after network and row have been saved."""
    val = trial.splits.val
    logits = predict(model, val.x)
    temperature = fit_temperature(logits, val.y) if trial.config.calibrate else 1.0
    row = {"stage": f"{name}-seed{trial.config.seed}"} | row
    row["val_accuracy"] = accuracy(logits, val.y)
    row["val_loss"] = float(F.cross_entropy(logits.double() / temperature, val.y))
    row["temperature"] = temperature
    save(round_file(trial, name, row["round"]), {"model": model.state_dict()} | pseudo._asdict())
    history.append(row)
    save_checkpoint(trial.run, row["stage"], {}, history)
    numbers = [f"{key} {value:.4g}" for key, value in list(row.items())[1:]]
    print("  ".join([row["stage"], *numbers]), flush=True)
    return row


def rows_of(trial: Trial, name: str, history: list[dict]) -> list[dict]:
    return [row for row in history if row["stage"] == f"{name}-seed{trial.config.seed}"]


def round_file(trial: Trial, name: str, number: int) -> Path:
    return trial.run / "weights" / f"{name}-seed{trial.config.seed}-round{number}.pt"


def restore(trial: Trial, name: str, number: int, model: nn.Module) -> PseudoLabels:
    """The round's pseudo-labels; its weights are put into `model`."""
    device = trial.splits.pool.device
    state = torch.load(round_file(trial, name, number), map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    return PseudoLabels(state["label"], state["confidence"])


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Class logits (N, C) of uint8 images."""
    model.eval()
    return torch.cat([model(part) for part in batches(x)])


def accuracy(logits: Tensor, y: Tensor) -> float:
    return int((logits.argmax(1) == y).sum()) / len(y)


# --- report -----------------------------------------------------------------------------------


def judge(trial: Trial, outcomes: dict[str, Outcome]) -> dict:
    """Test accuracy of every network of one repeat, and how many pseudo-labels were right."""
    splits = trial.splits
    parts = {"labelled": splits.labelled.x, "validation": splits.val.x}
    parts |= {"pool": splits.pool, "test": splits.test.x}
    judged = {"sizes": {name: len(part) for name, part in parts.items()}, "methods": {}}
    for name in ("supervised", "with_validation", "oracle"):
        judged[name] = judge_round(trial, name, {"round": 0})["test_accuracy"]
    judged["sklearn"] = {
        name: sklearn_accuracy(name, splits.labelled, splits.pool, splits.test)
        for name in trial.config.sklearn
    }
    for name, outcome in outcomes.items():
        judged["methods"][name] = {
            "rounds": [judge_round(trial, name, row) for row in outcome.rows],
            "best": outcome.best,
            "reason": outcome.reason,
            "seconds": [row["seconds"] for row in outcome.rows[1:]],
        }
    return judged


def judge_round(trial: Trial, name: str, row: dict) -> dict:
    splits, model = trial.splits, new_model(trial)
    labels = restore(trial, name, row["round"], model).label
    told = ("round", "added", "withdrawn", "changed", "val_accuracy", "val_loss")
    numbers = {key: row[key] for key in told if key in row}
    numbers["test_accuracy"] = accuracy(predict(model, splits.test.x), splits.test.y)
    numbers["pool_left"] = int((labels == NONE).sum())
    return numbers | label_quality(labels, splits.hidden, trial.classes)


def summarise(repeats: list[dict]) -> dict:
    """metrics.json's numbers: mean and standard deviation over the repeats."""
    metrics = {"sizes": repeats[0]["sizes"]}
    for name in ("supervised", "with_validation", "oracle"):
        metrics[name] = spread([judged[name] for judged in repeats])
    metrics["sklearn"] = {
        name: {kind: spread([judged["sklearn"][name][kind] for judged in repeats]) for kind in two}
        for name, two in repeats[0]["sklearn"].items()
    }
    metrics["methods"] = {
        name: summarise_method([judged["methods"][name] for judged in repeats])
        for name in repeats[0]["methods"]
    }
    methods = [method for judged in repeats for method in judged["methods"].values()]
    seconds = [x for method in methods for x in method["seconds"]]
    metrics["seconds_per_round"] = median(seconds) if seconds else None
    return metrics


def summarise_method(trials: list[dict]) -> dict:
    """`rounds` holds, for each repeat, a dict per round; the best round is what is kept."""
    best = [trial["rounds"][trial["best"]] for trial in trials]
    after = [chosen["test_accuracy"] for chosen in best]
    before = [trial["rounds"][0]["test_accuracy"] for trial in trials]
    right = [chosen["accuracy"] for chosen in best if chosen["pseudo_labels"]]
    return {
        "test_accuracy": spread(after),
        "gain": spread([new - old for new, old in zip(after, before, strict=True)]),
        "last_round": spread([trial["rounds"][-1]["test_accuracy"] for trial in trials]),
        "pseudo_label_accuracy": spread(right) if right else None,
        "best_round": [trial["best"] for trial in trials],
        "termination": [trial["reason"] for trial in trials],
        "rounds": [trial["rounds"] for trial in trials],
    }


def spread(values: list[float]) -> dict:
    sd = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "sd": sd, "of_seeds": values}


def headline(metrics: dict, own: str) -> dict:
    """Means over the repeats; of scikit-learn's classifiers the best."""
    method = metrics["methods"][own]
    numbers = {
        "supervised_accuracy": metrics["supervised"]["mean"],
        "self_training_accuracy": method["test_accuracy"]["mean"],
        "oracle_accuracy": metrics["oracle"]["mean"],
        "sklearn_accuracy": max(x["self_training"]["mean"] for x in metrics["sklearn"].values()),
    }
    if method["pseudo_label_accuracy"]:  # none where every best round is round 0
        numbers["pseudo_label_accuracy"] = method["pseudo_label_accuracy"]["mean"]
    return numbers


def draw(source: Source, metrics: dict, own: str, trial: Trial, outcome: Outcome) -> None:
    """The three pictures; the examples are of the first repeat."""
    config, run = trial.config, trial.run
    count = config.labels_per_class
    title = f"{source.name}, {count} label{'s' if count > 1 else ''} a class"
    plot_accuracy(metrics, own, title, run / "accuracy.png")
    plot_quality(metrics["methods"], own, source.classes, title, run / "pseudo_labels.png")
    last = len(outcome.rows) - 1
    shown = outcome.best or last  # round 0 has no pseudo-labels
    first = surest(trial, own, min(1, last), only_wrong=False)
    mistakes = surest(trial, own, shown, only_wrong=True)
    plot_examples(first, mistakes, shown, source.classes, title, run / "examples.png")


def surest(trial: Trial, name: str, number: int, *, only_wrong: bool) -> dict:
    """Pictures, labels, truths and confidences of a round's 16 surest pseudo-labels."""
    splits = trial.splits
    label, confidence = restore(trial, name, number, new_model(trial))
    wanted = label != splits.hidden if only_wrong else torch.ones_like(label, dtype=torch.bool)
    order = by_confidence(confidence, trial.fingerprints)
    order = order[((label != NONE) & wanted)[order]][:16]
    parts = {"x": splits.pool, "label": label, "truth": splits.hidden, "confidence": confidence}
    return {key: part[order].cpu().numpy() for key, part in parts.items()}


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
