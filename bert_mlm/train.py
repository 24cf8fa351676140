"""A pretrained BERT learns by masked language modelling how people tweet about an earthquake.

Beside it the same architecture from scratch with the same budget, and the most frequent pieces.
The default, a small BERT, is pretrained first, on the English that comes with Python, and kept in
data_dir.

Run it with `python bert_mlm/train.py`, or `python bert_mlm/train.py --dataset csv --csv_file MINE`.
"""

import copy
import hashlib
import json
import math
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Literal, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from data import (
    DataError,
    Tweets,
    bucketed,
    find_model,
    general_english,
    load,
    load_pretrained,
    quiet,
    whole_words,
)
from model import (
    IGNORE,
    Masking,
    adamw,
    encode,
    evaluate,
    evaluate_constant,
    fillings,
    from_scratch,
    longest_text,
    masked_logits,
    mlm_loss,
    small_bert,
    unigram_logits,
    word_pieces,
)
from plots import plot_accuracy, plot_curves, plot_gaps
from run import (
    Batch,
    Decay,
    Epochs,
    Rate,
    Seed,
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

MaskShare = Annotated[float, ">= 0.01", "< 1"]
HEADLINE = {  # whose score each is
    "perplexity_before": ("before", "perplexity"),
    "perplexity_after": ("after", "perplexity"),
    "top1_before": ("before", "top1"),
    "top1_after": ("after", "top1"),
    "unigram_top1": ("unigram", "top1"),
    "scratch_perplexity_after": ("scratch", "perplexity"),
}


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["sample", "csv"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    csv_file: Path
    text_column: str
    language: str
    links: Literal["remove", "word", "keep"]
    names: Literal["remove", "word", "keep"]
    most_tweets: Annotated[int, ">= 10", "<= 100000000"]
    model: str
    max_length: Annotated[int, ">= 4", "<= 4096"]
    mask_probability: MaskShare
    whole_words: bool
    epochs: Epochs
    patience: Epochs
    batch_size: Batch
    lr: Rate
    small_lr: Rate
    scratch_lr: Rate
    warmup: Annotated[float, ">= 0", "< 1"]
    weight_decay: Decay
    seeds: Annotated[int, ">= 1", "<= 1000"]
    compare: bool
    pretrain_characters: Annotated[int, ">= 10000", "<= 1000000000"]
    pretrain_epochs: Epochs
    pretrain_lr: Rate
    pretrain_mask_probability: MaskShare
    pretrain_batch_size: Batch
    vocabulary: Annotated[int, ">= 300", "<= 200000"]
    layers: Annotated[int, ">= 1", "<= 100"]
    width: Width
    dropout: Annotated[float, ">= 0", "< 1"]

    def __post_init__(self) -> None:
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
    models: dict[str, nn.Module]  # before, after, scratch
    scores: dict[str, dict]  # of these on test, and unigram
    val_unigram: float  # its loss
    history: dict[str, list[dict]]


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    tweets = load_tweets(config, config.seed)
    print(tweets.note)
    quiet()
    start = starting_point(config, run, device, tweets)
    trials = [compare(start, config, run, config.seed + n) for n in range(config.seeds)]
    metrics = summarise(trials, start)
    plot_results(trials[0], start, config, run)
    save_model(trials[0], start, config, run)
    finish_run(
        run,
        config,
        dataset=tweets.name,
        headline=headline(trials),
        metrics=metrics,
        use=f'python bert_mlm/predict.py {run} "We need [MASK] and blankets."',
    )


def load_tweets(config: Config, seed: int) -> Tweets:
    return load(
        dataset=config.dataset,
        csv_file=config.csv_file,
        text_column=config.text_column,
        language=config.language,
        links=config.links,
        names=config.names,
        most_tweets=config.most_tweets,
        data_dir=config.data_dir,
        seed=seed,
    )


# --- the model to start from ------------------------------------------------------------------


def starting_point(config: Config, run: Path, device: torch.device, tweets: Tweets) -> Start:
    """The model asked for; the small BERT is pretrained if it is not kept in data_dir yet.

    Opens the run's folder as soon as nothing can be missing any more. Raises DataError.
    """
    data = (tweets.name, tweets.train, tweets.val, tweets.test)
    about = {"name": Path(config.model).name, "note": ""}
    if config.model == "small":
        folder = small_bert_folder(config)
        open_run(run, config, *data, folder.name)
        if not folder.exists():
            pretrain(folder, config, run, device)
        found = load_pretrained(str(folder), local=True, dropout=config.dropout)
        pretraining = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
        about |= {"name": "small BERT", "pretraining": pretraining}
    else:
        seed_everything(0, "head")  # where the checkpoint lacks one
        found = find_model(config.model, config.data_dir)
        if config.max_length > (most := longest_text(*found[:2])):
            raise DataError(f"max_length: {config.model} takes {most} pieces at most")
        open_run(run, config, *data, found[0].state_dict())
    model, tokenizer, missing = found
    about |= {"missing": missing, "parameters": sum(p.numel() for p in model.parameters())}
    if missing:
        about["note"] = f"without a whole MLM head: {', '.join(missing)} begin at random"
    print(f"model: {about['name']}, {about['parameters']:,} parameters. {about['note']}")
    masking = Masking(tokenizer, config.mask_probability, config.whole_words)
    lr = config.small_lr if config.model == "small" else config.lr
    return Start(model.to(device), tokenizer, masking, lr, about)


def small_bert_folder(config: Config) -> Path:
    """Where the small BERT lies or will lie, by all that decides its weights."""
    settings = (
        config.seed,
        config.max_length,
        config.pretrain_mask_probability,
        config.whole_words,
        config.warmup,
        config.weight_decay,
        config.pretrain_characters,
        config.pretrain_epochs,
        config.pretrain_lr,
        config.pretrain_batch_size,
        config.vocabulary,
        config.layers,
        config.width,
    )
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    versions = f"python{platform.python_version()}-sklearn{version('scikit-learn')}"  # of the texts
    return config.data_dir / f"small-bert-{versions}-{key}"


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
    keep(model, tokenizer, about, folder)


def keep(model: nn.Module, tokenizer, about: dict, folder: Path) -> None:
    """All of it, or nothing."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / "pretraining.json").write_text(json.dumps(about, indent=2) + "\n")
        beside.rename(folder)
    except OSError:
        if not folder.exists():  # else another run was first, and its weights are the same
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# --- training ---------------------------------------------------------------------------------


def compare(start: Start, config: Config, run: Path, seed: int) -> Trial:
    """Fine-tuned beside from scratch: the same tweets, masks, epochs at most and patience."""
    tweets = load_tweets(config, seed)
    train, val, test = (encode(start.tokenizer, part, config.max_length) for part in tweets[1:4])
    val, test = start.masking.fixed(val, 2 * seed), start.masking.fixed(test, 2 * seed + 1)
    models, history = {"before": start.model, "after": copy.deepcopy(start.model)}, {}
    rates = {"after": start.lr}
    if config.compare:
        rates["scratch"] = config.scratch_lr
        seed_everything(seed, "scratch")
        models["scratch"] = from_scratch(start.model).to(start.model.device)
    for name, lr in rates.items():
        budget = (config.epochs, config.patience, config.batch_size, lr, seed)
        stage = Stage(f"{'finetune' if name == 'after' else name}-seed{seed}", train, val, *budget)
        history[name] = fit(models[name], stage, start.masking, config, run)
    pad_id = start.tokenizer.pad_token_id
    scores = {name: evaluate(model, test, pad_id).summary() for name, model in models.items()}
    logits = unigram_logits(train, len(start.tokenizer))
    scores["unigram"] = evaluate_constant(logits, test).summary()
    val_unigram = evaluate_constant(logits, val).summary()["loss"]
    return Trial(tweets, models, scores, val_unigram, history)


def fit(model: nn.Module, stage: Stage, masking: Masking, config: Config, run: Path) -> list[dict]:
    """Leaves the weights of the best validation loss in `model`; returns a row per epoch.

    Row 0 is the model as it came.
    """
    steps = stage.epochs * math.ceil(len(stage.train) / stage.batch_size)
    rates = {"lr": stage.lr, "warmup": config.warmup, "weight_decay": config.weight_decay}
    optimizer, schedule = adamw(model, steps, **rates)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    options = {"best": ("val_loss", min), "patience": stage.patience, "first": 0}
    for row in epochs(run, stage.name, parts, stage.epochs, stage.seed, **options):
        if row["epoch"]:
            label = f"{stage.name} epoch {row['epoch']}"
            row["train_loss"] = train_one_epoch(model, stage, masking, optimizer, schedule, label)
        scores = evaluate(model, stage.val, masking.tokenizer.pad_token_id).summary()
        row |= {f"val_{name}": scores[name] for name in ("loss", "perplexity", "top1", "top5")}
    return read_rows(run, stage.name)


def train_one_epoch(
    model: nn.Module,
    stage: Stage,
    masking: Masking,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    label: str,
) -> float:
    """Loss per chosen piece. Raises FloatingPointError if a loss was not finite."""
    model.train()
    losses, pieces = [], 0
    batches = bucketed([len(text["input_ids"]) for text in stage.train], stage.batch_size)
    for chosen in tqdm(batches, label, leave=False, disable=None):
        batch = masking([stage.train[place] for place in chosen])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch["labels"][batch["labels"] != IGNORE]
        loss = mlm_loss(masked_logits(model, batch), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach() * len(labels))
        pieces += len(labels)
    return float(sum_losses(losses, label)) / max(pieces, 1)


# --- report -----------------------------------------------------------------------------------


def summarise(trials: list[Trial], start: Start) -> dict:
    """metrics.json's numbers: the first seed's in full, the loss of all, and what pretraining is
    worth: the difference in test loss, paired by seed.
    """
    first = trials[0]
    losses = {name: [trial.scores[name]["loss"] for trial in trials] for name in first.scores}
    metrics = {
        "model": start.about,
        "tweets": {part: len(getattr(first.tweets, part)) for part in ("train", "val", "test")},
        "test": first.scores,
        "epochs": {name: len(rows) - 1 for name, rows in first.history.items()},
        "test_loss_of_seeds": losses,
    }
    if "scratch" in losses:
        gains = [s - a for s, a in zip(losses["scratch"], losses["after"], strict=True)]
        metrics["scratch_minus_after"] = {"mean": mean(gains)}
        if len(gains) > 1:
            error = stdev(gains) / math.sqrt(len(gains))
            metrics["scratch_minus_after"]["standard_error"] = error
    return metrics


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
        if model in trials[0].scores
    }


def plot_results(trial: Trial, start: Start, config: Config, run: Path) -> None:
    """The pictures, of the first seed."""
    title = f"{start.about['name']} on {trial.tweets.name}"
    result = f"{title}: test perplexity " + ", ".join(
        f"{trial.scores[name]['perplexity']:.0f} {name}" for name in trial.models
    )
    pretraining = start.about.get("pretraining")
    curves = (trial.history, pretraining, trial.val_unigram)
    try_plot(plot_curves, *curves, result, run / "curves.png")
    try_plot(plot_accuracy, trial.scores, result, run / "accuracy.png")
    try_plot(plot_gaps, gaps(trial, start, config), title, run / "gaps.png")


def save_model(trial: Trial, start: Start, config: Config, run: Path) -> None:
    """model/, which transformers loads, and model.pt: all that predict.py needs."""
    trial.models["after"].save_pretrained(run / "model")
    start.tokenizer.save_pretrained(run / "model")
    description = {
        "project": "bert_mlm",
        "max_length": config.max_length,
        "files": {path.name: path.read_text() for path in (run / "model").glob("*.json")},
        "weights": trial.models["after"].state_dict(),
    }
    save(run / "model.pt", description)


if __name__ == "__main__":
    run_main(main, DataError)
