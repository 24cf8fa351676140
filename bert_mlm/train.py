"""A pretrained BERT learns by masked language modelling how people tweet about an earthquake.

Beside it the same architecture from scratch with the same budget, and the most frequent pieces.
Where bert-base-uncased cannot be had, a small BERT is pretrained first, on the English that comes
with Python, and kept in data_dir.

Run it with `python bert_mlm/train.py`, or `python bert_mlm/train.py --csv_file my.csv`.
"""

import copy
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from data import (
    DataError,
    Tweets,
    bucketed,
    general_english,
    load,
    reachable,
    whole_words,
)
from model import (
    IGNORE,
    Masking,
    adamw,
    compare_speed,
    encode,
    evaluate,
    evaluate_constant,
    fillings,
    from_scratch,
    load_pretrained,
    masked_logits,
    mlm_loss,
    quiet,
    small_bert,
    unigram_logits,
    word_pieces,
)
from plots import plot_accuracy, plot_curves, plot_gaps
from run import finish_run, load_checkpoint, save, save_checkpoint, seed_everything, start_run

HUB, HUB_MODEL = "https://huggingface.co", "bert-base-uncased"
HEADLINE = {  # whose score each is
    "perplexity_before": ("before", "perplexity"),
    "perplexity_after": ("after", "perplexity"),
    "top1_before": ("before", "top1"),
    "top1_after": ("after", "top1"),
    "unigram_top1": ("unigram", "top1"),
    "scratch_perplexity_after": ("scratch", "perplexity"),
}
ABOUT_TWEETS = ("dataset", "csv_file", "text_column", "language", "links", "names", "most_tweets")
PRETRAINING = (  # what the small BERT's weights hang on
    "seed", "max_length", "pretrain_mask_probability", "whole_words", "warmup", "weight_decay",
    "pretrain_characters", "pretrain_epochs", "pretrain_lr", "pretrain_batch_size", "vocabulary",
    "layers", "width",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Names and types; values and their comments stand in config.yaml."""

    dataset: Literal["auto", "csv", "sample"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: int
    csv_file: Path
    text_column: str
    language: str
    links: Literal["remove", "word", "keep"]
    names: Literal["remove", "word", "keep"]
    most_tweets: int
    model: str
    max_length: int
    mask_probability: float
    whole_words: bool
    epochs: int
    patience: int
    batch_size: int
    lr: float
    small_lr: float
    scratch_lr: float
    warmup: float
    weight_decay: float
    seeds: int
    pretrain_characters: int
    pretrain_epochs: int
    pretrain_lr: float
    pretrain_mask_probability: float
    pretrain_batch_size: int
    vocabulary: int
    layers: int
    width: int
    dropout: float

    def __post_init__(self) -> None:
        zero = ("seed", "weight_decay", "warmup", "dropout")
        least = dict.fromkeys(zero, 0) | {"vocabulary": 300, "max_length": 4}
        least |= {"most_tweets": 10, "pretrain_characters": 10_000}
        for name, value in vars(self).items():
            if isinstance(value, (bool, str, Path)):
                continue
            if name in least and value < least[name]:
                raise ValueError(f"{name}: expected at least {least[name]}, found {value}")
            if name not in least and not value > 0:
                raise ValueError(f"{name}: expected more than 0, found {value}")
        for name in ("mask_probability", "pretrain_mask_probability", "warmup", "dropout"):
            if not getattr(self, name) < 1:
                raise ValueError(f"{name}: expected less than 1, found {getattr(self, name)}")
        if self.width > 64 and self.width % 64:
            raise ValueError(f"width: expected a multiple of 64, found {self.width}")


class Start(NamedTuple):
    """What fine-tuning starts from."""

    model: nn.Module
    tokenizer: object
    masking: Masking
    lr: float
    about: dict  # for metrics.json


class Stage(NamedTuple):
    """What `fit` needs to know: the same loop pretrains and fine-tunes."""

    name: str
    train: list[dict]
    val: list[dict]  # masked already
    epochs: int
    patience: int
    batch_size: int
    lr: float
    seed: int


class Trial(NamedTuple):
    """What one seed gave."""

    tweets: Tweets
    train: list[dict]
    models: dict[str, nn.Module]  # before, after, scratch
    scores: dict[str, dict]  # of these on test, and unigram
    val_unigram: float  # its loss
    history: dict[str, list[dict]]


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    print(load_tweets(config, config.seed).note)  # a mistake shows before pretraining begins
    quiet()
    start = starting_point(config, run, device)
    trials = [compare(start, config, run, config.seed + n) for n in range(config.seeds)]
    first = trials[0]
    metrics = summarise(trials, start)
    metrics["padding"], metrics["timing"] = measure_speed(first, start, config)

    first.models["after"].save_pretrained(run / "model")
    start.tokenizer.save_pretrained(run / "model")
    draw(first, start, config, run)
    dataset = first.tweets.name
    finish_run(run, config, dataset=dataset, headline=headline(trials), metrics=metrics)


def load_tweets(config: Config, seed: int) -> Tweets:
    options = {name: getattr(config, name) for name in ABOUT_TWEETS}
    return load(**options, cache_dir=config.data_dir, seed=seed)


# --- the model to start from ------------------------------------------------------------------


def starting_point(config: Config, run: Path, device: torch.device) -> Start:
    """`auto`: bert-base-uncased if it is here or the hub answers, else the small BERT.

    Raises DataError if a model that was asked for by name cannot be had.
    """
    name = HUB_MODEL if config.model == "auto" else config.model
    about, lr = {"name": Path(name).name, "note": ""}, config.lr
    try:
        if name == "small":
            raise DataError("")
        model, tokenizer, missing = fetch(name)
    except DataError as error:
        if config.model not in ("auto", "small"):
            raise
        folder = small_bert_folder(config, run, device)
        model, tokenizer, missing = load_pretrained(str(folder), local=True, dropout=config.dropout)
        pretraining = json.loads((folder / "pretraining.json").read_text())
        note = f"{error}; it stands in" if str(error) else ""
        about = {"name": "small BERT", "note": note, "pretraining": pretraining}
        lr = config.small_lr
    if config.max_length > (most := tokenizer.model_max_length):
        raise DataError(f"max_length: {name} takes {most} pieces at most, not {config.max_length}")
    about |= {"missing": missing, "parameters": sum(p.numel() for p in model.parameters())}
    if missing:
        about["note"] += f"without a whole MLM head: {', '.join(missing)} begin at random"
    print(f"model: {about['name']}, {about['parameters']:,} parameters. {about['note']}")
    masking = Masking(tokenizer, config.mask_probability, config.whole_words)
    return Start(model.to(device), tokenizer, masking, lr, about)


def fetch(name: str) -> tuple[nn.Module, object, list[str]]:
    """A model from this machine or the hub, which is asked only if it answers. Raises DataError."""
    seed_everything(0, "head")  # where the checkpoint lacks one
    for local in (True, False):
        if not local and not reachable(HUB):
            raise DataError(f"{name}: no folder or model kept here, and {HUB} does not answer")
        try:
            return load_pretrained(name, local=local)
        except (OSError, ValueError) as error:
            if Path(name).is_dir() or not local:
                raise DataError(f"{name}: {' '.join(str(error).split())}") from error


def small_bert_folder(config: Config, run: Path, device: torch.device) -> Path:
    """Where the small BERT lies; it is pretrained if it is not there yet."""
    settings = repr([getattr(config, name) for name in PRETRAINING]).encode()
    versions = f"python{platform.python_version()}-sklearn{version('scikit-learn')}"  # of the texts
    key = hashlib.sha256(settings).hexdigest()[:8]
    folder = config.data_dir / f"small-bert-{versions}-{key}"
    if not folder.exists():
        pretrain(folder, config, run, device)
    return folder


def pretrain(folder: Path, config: Config, run: Path, device: torch.device) -> None:
    """Word pieces and a small BERT from general English, written into `folder`."""
    print("reading the English that comes with Python, to pretrain a small BERT")
    texts = general_english(config.pretrain_characters)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    tokenizer = word_pieces(texts, config.vocabulary, config.max_length)
    masking = Masking(tokenizer, config.pretrain_mask_probability, config.whole_words)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(config.seed))
    held_out, texts = ([texts[i] for i in part] for part in order.tensor_split([len(order) // 20]))
    train = encode(tokenizer, texts, config.max_length, all_of_it=True)
    seed_everything(config.seed, "initialisation of the small BERT")
    model = small_bert(tokenizer, layers=config.layers, width=config.width).to(device)
    stage = Stage(
        name="pretrain",
        train=train,
        val=masking.fixed(encode(tokenizer, held_out, config.max_length), config.seed),
        epochs=config.pretrain_epochs,
        patience=config.pretrain_epochs,
        batch_size=config.pretrain_batch_size,
        lr=config.pretrain_lr,
        seed=config.seed,
    )
    rows = fit(model, stage, masking, config, run)
    about = {
        "python": platform.python_version(),
        "scikit-learn": version("scikit-learn"),
        "paragraphs": len(texts),
        "characters": sum(map(len, texts)),
        "pieces": sum(len(text["input_ids"]) for text in train),
        "sha256": digest,
        "epochs": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
    }
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    (beside / "pretraining.json").write_text(json.dumps(about, indent=2) + "\n")
    try:
        beside.rename(folder)  # whole, or not at all
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(beside)  # another run was first, and its weights are the same


# --- training ---------------------------------------------------------------------------------


def compare(start: Start, config: Config, run: Path, seed: int) -> Trial:
    """Fine-tuned beside from scratch: the same tweets, masks, epochs at most and patience."""
    tweets = load_tweets(config, seed)
    train, val, test = (encode(start.tokenizer, part, config.max_length) for part in tweets[1:4])
    val, test = start.masking.fixed(val, 2 * seed), start.masking.fixed(test, 2 * seed + 1)
    models = {"before": start.model, "after": copy.deepcopy(start.model)}
    seed_everything(seed, "scratch")
    models["scratch"] = from_scratch(start.model).to(start.model.device)
    history = {}
    for name, lr in (("after", start.lr), ("scratch", config.scratch_lr)):
        budget = (config.epochs, config.patience, config.batch_size, lr, seed)
        stage = Stage(f"{'finetune' if name == 'after' else name}-seed{seed}", train, val, *budget)
        history[name] = fit(models[name], stage, start.masking, config, run)
    pad_id = start.tokenizer.pad_token_id
    scores = {name: evaluate(model, test, pad_id).summary() for name, model in models.items()}
    logits = unigram_logits(train, len(start.tokenizer))
    scores["unigram"] = evaluate_constant(logits, test).summary()
    val_unigram = evaluate_constant(logits, val).summary()["loss"]
    return Trial(tweets, train, models, scores, val_unigram, history)


def fit(model: nn.Module, stage: Stage, masking: Masking, config: Config, run: Path) -> list[dict]:
    """Leaves the weights of the best validation loss in `model`; returns a row per epoch.

    Row 0 is the model as it came. What a killed run has done of the stage is not done again.
    """
    steps = stage.epochs * math.ceil(len(stage.train) / stage.batch_size)
    rates = {"lr": stage.lr, "warmup": config.warmup, "weight_decay": config.weight_decay}
    optimizer, schedule = adamw(model, steps, **rates)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = load_checkpoint(run, stage.name, parts)
    rows = [row for row in history if row["stage"] == stage.name]

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    while len(rows) <= stage.epochs and not stalled(rows, stage.patience):
        row = {"stage": stage.name, "epoch": len(rows)}
        if rows:
            seed_everything(stage.seed, stage.name, len(rows))
            row |= train_one_epoch(model, stage, masking, step, f"{stage.name} epoch {len(rows)}")
        scores = evaluate(model, stage.val, masking.tokenizer.pad_token_id).summary()
        row |= {f"val_{name}": scores[name] for name in ("loss", "perplexity", "top1", "top5")}
        rows.append(row)
        if row["val_loss"] == min(earlier["val_loss"] for earlier in rows):
            save(run / f"{stage.name}.pt", model.state_dict())
        history.append(row)
        save_checkpoint(run, stage.name, parts, history)
        print("  ".join([stage.name, *(f"{n} {x:.4g}" for n, x in list(row.items())[1:])]))
    best = torch.load(run / f"{stage.name}.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(best)
    return rows


def stalled(rows: list[dict], patience: int) -> bool:
    """Whether the validation loss has had no new minimum for `patience` epochs."""
    losses = [row["val_loss"] for row in rows]
    return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def train_one_epoch(
    model: nn.Module, stage: Stage, masking: Masking, step: Callable, label: str
) -> dict:
    """Seconds and loss per chosen piece. Raises FloatingPointError on a loss not finite."""
    model.train()
    began, losses, counts = time.perf_counter(), [], []
    batches = bucketed([len(text["input_ids"]) for text in stage.train], stage.batch_size)
    for chosen in tqdm(batches, label, leave=False, disable=None):
        batch = masking([stage.train[place] for place in chosen])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch["labels"][batch["labels"] != IGNORE]
        loss = mlm_loss(masked_logits(model, batch), labels)
        step(loss)
        losses.append(loss.detach())
        counts.append(len(labels))
    losses = torch.stack(losses).double().cpu()  # read once: the loop never waits for the device
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).nonzero()[0]) + 1
        raise FloatingPointError(f"{label}: the loss is not finite at step {first}")
    counts = torch.tensor(counts, dtype=torch.float64)
    return {
        "seconds": time.perf_counter() - began,
        "train_loss": float((losses * counts).sum() / counts.sum().clamp(min=1)),
    }


# --- report -----------------------------------------------------------------------------------


def summarise(trials: list[Trial], start: Start) -> dict:
    """metrics.json's numbers: the first seed's in full, the loss of all, and what pretraining is
    worth: the difference in test loss, paired by seed.
    """
    first = trials[0]
    losses = {
        name: [trial.scores[name]["loss"] for trial in trials]
        for name in ("before", "after", "scratch", "unigram")
    }
    gains = [s - a for s, a in zip(losses["scratch"], losses["after"], strict=True)]
    metrics = {
        "model": start.about,
        "tweets": {part: len(getattr(first.tweets, part)) for part in ("train", "val", "test")},
        "test": first.scores,
        "epochs": {name: len(rows) - 1 for name, rows in first.history.items()},
        "test_loss_of_seeds": losses,
        "scratch_minus_after": {"mean": mean(gains)},
    }
    if len(gains) > 1:
        metrics["scratch_minus_after"]["standard_error"] = stdev(gains) / math.sqrt(len(gains))
    return metrics


def measure_speed(trial: Trial, start: Start, config: Config) -> tuple[dict, dict]:
    """The share of padding and the speed of training, as usually written and ours."""
    masked = start.masking.fixed(trial.train[: 20 * config.batch_size], config.seed)
    seed_everything(config.seed, "speed")
    groups = {
        "ordinary": torch.arange(len(masked)).split(config.batch_size),
        "ours": bucketed([len(one["input_ids"]) for one in masked], config.batch_size),
    }
    pad_id = start.tokenizer.pad_token_id
    return compare_speed(copy.deepcopy(start.model), masked, groups, pad_id, config.max_length)


def gaps(trial: Trial, start: Start, config: Config, count: int = 4) -> list[dict]:
    """The first test tweets, each with one word masked that the seed chooses among those that are
    one piece, and the best fillings before and after.
    """
    found, generator = [], torch.Generator().manual_seed(config.seed)
    for one in encode(start.tokenizer, trial.tweets.test, config.max_length):
        text, spans = one["text"], one["offset_mapping"]
        places = whole_words(text, spans)
        if not places or len(found) == count:
            continue
        place = places[int(torch.randint(len(places), (1,), generator=generator))]
        begin, end = spans[place]
        best = {
            when: fillings(trial.models[when], start.tokenizer, one["input_ids"], place)
            for when in ("before", "after")
        }
        found.append({"text": (text[:begin], text[end:]), "word": text[begin:end].strip()} | best)
    return found


def headline(trials: list[Trial]) -> dict[str, float]:
    """Means over the seeds."""
    return {
        name: mean(trial.scores[model][score] for trial in trials)
        for name, (model, score) in HEADLINE.items()
    }


def draw(trial: Trial, start: Start, config: Config, run: Path) -> None:
    """The pictures, of the first seed."""
    title = f"{start.about['name']} on {trial.tweets.name}"
    result = f"{title}: test perplexity " + ", ".join(
        f"{trial.scores[name]['perplexity']:.0f} {name}" for name in ("before", "after", "scratch")
    )
    pretraining = start.about.get("pretraining")
    plot_curves(trial.history, pretraining, trial.val_unigram, result, run / "curves.png")
    plot_accuracy(trial.scores, result, run / "accuracy.png")
    plot_gaps(gaps(trial, start, config), title, run / "gaps.png")


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
