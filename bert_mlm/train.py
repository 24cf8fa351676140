"""A pretrained BERT learns by masked language modelling how people tweet about an earthquake.

Baselines: the same architecture from scratch with the same budget, and the most frequent tokens.
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
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Literal, NamedTuple

from run import (
    OWN,
    RANK,
    Batch,
    Count,
    Decay,
    Epochs,
    Rate,
    Seed,
    Width,
    epochs,
    finish_run,
    mean_of_all,
    one_first,
    open_run,
    own_draws,
    parallel,
    read_rows,
    run_main,
    save,
    seed_everything,
    start_run,
    sum_losses,
    total,
    try_plot,
    wait_for_all,
)

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
    begin_at_unigram,
    best_words,
    encode,
    evaluate,
    evaluate_constant,
    fill,
    from_scratch,
    interval,
    longest_text,
    mask_error,
    masked_logits,
    mlm_loss,
    part_of,
    resampled,
    small_bert,
    summary,
    train_tokenizer,
    unigram_logits,
)
from plots import plot_accuracy, plot_curves, plot_gaps

FIRST_STEPS = 10  # the time is estimated from these but the first, in which a GPU loads its kernels
MOST_MASKS = 100
MASK_ERROR = 0.02
GAPS = 200  # test tweets in which a word is filled
PROMPTS = (
    "a magnitude 7.8 [MASK] hit the south of the country",
    "my family is trapped under the [MASK]",
    "we need [MASK] and blankets",
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
    epoch_steps: Count
    checkpoint_minutes: Annotated[float, ">= 0", "<= 1440"]
    lr: Rate
    head_lr: Rate
    small_lr: Rate
    scratch_lr: Rate
    warmup: Annotated[float, ">= 0", "< 1"]
    weight_decay: Decay
    masks: Annotated[int, ">= 2", "<= 100"]
    val_masks: Annotated[int, ">= 1", "<= 100"]
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
    epochs: int  # passes over train
    patience: int
    batch_size: int
    lr: float
    seed: int
    fresh: tuple[str, ...] = ()  # parameters that learn at head_lr


class Trial(NamedTuple):
    """What one seed gave."""

    tweets: Tweets
    models: dict[str, nn.Module]  # before, after, scratch
    scores: dict[str, dict]  # of these on test, and unigram
    gain: dict | None  # by what the loss of scratch is more than that of after
    val_unigram: float  # its loss
    history: dict[str, list[dict]]


def main() -> None:
    config, run, device = start_run(Config, __doc__, several=True)
    tweets = load_tweets(config, config.seed)
    sizes = ", ".join(f"{part} {len(getattr(tweets, part))}" for part in ("train", "val", "test"))
    print(f"{tweets.note}; {sizes}")
    quiet()
    start = starting_point(config, run, device, tweets)
    trials = [compare(start, config, run, config.seed + n) for n in range(config.seeds)]
    metrics = summarise(trials, start)
    gaps = fill_tweets(trials[0], start, config)
    prompts = fill_prompts(trials[0], start, config.max_length)
    metrics["right_words"] = right_words(gaps, trials[0].models)
    metrics["prompts"] = {"[MASK]".join(row["text"]): row["best"] for row in prompts}
    plot_results(trials[0], prompts, gaps, start, config, run)
    save_model(trials[0], start, config, run)
    finish_run(
        run,
        config,
        dataset=tweets.name,
        headline=headline(trials),
        metrics=metrics,
        use=f'python bert_mlm/predict.py {shlex.quote(str(run))} "We need [MASK] and blankets."',
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
            config.data_dir.mkdir(parents=True, exist_ok=True)
            pretrain(folder, config, run, device)
        *found, pretraining = read_kept(folder, config.dropout)
        about |= {"name": "small BERT", "pretraining": pretraining}
    else:
        seed_everything(0, "head")  # where the checkpoint has none
        with one_first():
            found = find_model(config.model, config.data_dir)
        if config.max_length > (most := longest_text(*found[:2])):
            raise DataError(f"max_length: {config.model} takes {most} tokens at most")
        open_run(run, config, *data, found[0].state_dict())
    model, tokenizer, missing = found
    about |= {"missing": missing, "parameters": sum(p.numel() for p in model.parameters())}
    if missing:
        about["note"] = f"without a whole MLM head: {', '.join(missing)} begin at random"
    print(f"model: {about['name']}, {about['parameters']:,} parameters. {about['note']}".rstrip())
    masking = Masking(tokenizer, config.mask_probability, config.whole_words)
    lr = config.small_lr if config.model == "small" else config.lr
    return Start(model.to(device), tokenizer, masking, lr, about)


def small_bert_folder(config: Config) -> Path:
    """The folder of the small BERT, named after all that decides its weights."""
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
    """WordPiece tokens and a small BERT from general English, written into `folder`."""
    print("reading the English that comes with Python, to pretrain a small BERT")
    texts = general_english(config.pretrain_characters)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    tokenizer = train_tokenizer(texts, config.vocabulary, config.max_length)
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
        "tokens": sum(len(text["input_ids"]) for text in train),
        "sha256": digest,
        "epochs": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
    }
    keep(model, tokenizer, about, folder)
    wait_for_all()


def keep(model: nn.Module, tokenizer, about: dict, folder: Path) -> None:
    """All of it, or nothing. Raises DataError if it cannot be written."""
    if RANK:
        return
    for old in folder.parent.glob("small-bert-*.tmp"):  # of a run that was killed
        if time.time() - old.stat().st_mtime > 3600:
            shutil.rmtree(old, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "pretraining.json").write_text(json.dumps(about, indent=2) + "\n")
        temporary.rename(folder)
    except Exception as error:  # a full disk is no OSError to safetensors
        if not folder.exists():  # else another run was first, and its weights are the same
            raise DataError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_kept(folder: Path, dropout: float) -> tuple[nn.Module, object, list[str], dict]:
    """What `keep` wrote: model, tokenizer, nothing missing, about. Raises DataError."""
    try:
        about = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
        return *load_pretrained(str(folder), local=True, dropout=dropout), about
    except (OSError, ValueError, DataError) as error:
        raise DataError(f"{folder} is damaged; remove it and start again ({error})") from error


# --- training ---------------------------------------------------------------------------------


def compare(start: Start, config: Config, run: Path, seed: int) -> Trial:
    """Fine-tuned and from scratch: the same tweets, masks, epochs at most and patience."""
    tweets, pad_id = load_tweets(config, seed), start.tokenizer.pad_token_id
    train, val, test = (encode(start.tokenizer, part, config.max_length) for part in tweets[1:4])
    val = several_masks(val, start.masking, 2 * seed, config.val_masks)
    models, history = {"before": start.model, "after": copy.deepcopy(start.model)}, {}
    budget = (train, val, config.epochs, config.patience, config.batch_size)
    fresh = tuple(start.about["missing"])
    begin_at_unigram(models["after"], train, set(fresh))
    stages = {"after": Stage(f"finetune-seed{seed}", *budget, start.lr, seed, fresh)}
    if config.compare:
        seed_everything(seed, "scratch")
        models["scratch"] = from_scratch(start.model).to(start.model.device)
        stages["scratch"] = Stage(f"scratch-seed{seed}", *budget, config.scratch_lr, seed)
    for name, stage in stages.items():
        history[name] = fit(models[name], stage, start.masking, config, run)
    scorers = {name: partial(scores_of, model, pad_id=pad_id) for name, model in models.items()}
    scorers["unigram"] = partial(evaluate_constant, unigram_logits(train, len(start.tokenizer)))
    sums = test_sums(scorers, test, start.masking, 2 * seed + 1, config.masks)
    scores = {name: describe(own) for name, own in sums.items()}
    gain = pretraining_gain(sums) if config.compare else None
    val_unigram = summary(scorers["unigram"](val))["loss"]
    return Trial(tweets, models, scores, gain, val_unigram, history)


def fit(model: nn.Module, stage: Stage, masking: Masking, config: Config, run: Path) -> list[dict]:
    """Leaves the weights of the best validation loss in `model`; returns a row per epoch.

    Row 0 is the model as it came. An epoch is a pass over the texts or, of a pass that needs more
    than `epoch_steps` steps, a part: as much as may be lost when the run is killed.
    """
    steps = math.ceil(len(stage.train) / stage.batch_size)
    parts_of_pass = math.ceil(steps / config.epoch_steps)
    optimizer, schedule = adamw(
        model,
        stage.epochs * steps,
        lr=stage.lr,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        fresh=stage.fresh,
        fresh_lr=config.head_lr,
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    count, patience = stage.epochs * parts_of_pass, stage.patience * parts_of_pass
    options = {"best": ("val_loss", min), "patience": patience, "first": 0}
    options["every"] = 60 * config.checkpoint_minutes
    trained = parallel(model)
    for row in epochs(run, stage.name, parts, count, stage.seed, **options):
        if row["epoch"]:
            number, part = divmod(row["epoch"] - 1, parts_of_pass)
            batches = batches_of_pass(stage, number)[part::parts_of_pass]
            label = f"{stage.name} epoch {row['epoch']}"
            row["train_loss"] = train_one_epoch(
                trained, stage, batches, masking, optimizer, schedule, label
            )
        scores = summary(scores_of(model, stage.val, masking.tokenizer.pad_token_id))
        row |= {f"val_{name}": scores[name] for name in ("loss", "perplexity", "top1", "top5")}
    return read_rows(run, stage.name)


def batches_of_pass(stage: Stage, number: int) -> list[list[int]]:
    """The same in each part of the pass."""
    generator = torch.Generator().manual_seed(1_000_003 * stage.seed + number)
    return bucketed([len(text["input_ids"]) for text in stage.train], stage.batch_size, generator)


def train_one_epoch(
    model: nn.Module,
    stage: Stage,
    batches: list[list[int]],
    masking: Masking,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    label: str,
) -> float:
    """Loss per chosen token. Raises FloatingPointError if a loss was not finite."""
    model.train()
    losses, tokens, began = [], 0, 0.0
    for chosen in tqdm(batches, label, leave=False, disable=None):
        batch = masking([stage.train[place] for place in chosen])
        count = int((batch["labels"] != IGNORE).sum())
        batch = {name: value.to(model.device) for name, value in part_of(batch, OWN).items()}
        labels = batch["labels"][batch["labels"] != IGNORE]
        with own_draws():
            logits = masked_logits(model, batch)
        loss = mean_of_all(mlm_loss(logits, labels), len(labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach() * count)
        tokens += count
        if len(losses) == 1:
            began = time.perf_counter()
        if len(losses) == FIRST_STEPS:
            tell_time(stage, schedule, (time.perf_counter() - began) / (FIRST_STEPS - 1))
    return float(sum_losses(losses, label)) / max(tokens, 1)


def tell_time(stage: Stage, schedule: torch.optim.lr_scheduler.LRScheduler, seconds: float) -> None:
    """Of a stage's first steps, once, if it takes more than a minute."""
    steps = stage.epochs * math.ceil(len(stage.train) / stage.batch_size)
    if schedule.last_epoch == FIRST_STEPS and steps * seconds > 60:
        minutes = f"about {steps * seconds / 60:.0f} min"
        print(f"{stage.name}: {seconds:.2g} s a step, {minutes} for at most {steps} steps")


# --- evaluation -------------------------------------------------------------------------------


def scores_of(model: nn.Module, masked: list[dict], pad_id: int) -> torch.Tensor:
    """As `evaluate`, the texts divided between the processes."""
    return total(evaluate(model, masked, pad_id, part=OWN))


def several_masks(texts: list[dict], masking: Masking, seed: int, count: int) -> list[dict]:
    """Each text under `count` fixed masks. Raises DataError if they choose no token."""
    masked = [one for number in range(count) for one in masking.fixed(texts, seed, number)]
    if not any((one["labels"] != IGNORE).any() for one in masked):
        raise DataError("mask_probability: not one token of the validation texts was chosen")
    return masked


def test_sums(
    scorers: dict[str, Callable], texts: list[dict], masking: Masking, seed: int, least: int
) -> dict[str, torch.Tensor]:
    """Sums (masks, texts, kinds, 4) by model, all under the same fixed masks: at least `least`, and
    so many that the masks' choice moves no perplexity by more than MASK_ERROR (standard error).
    """
    sums = {name: [] for name in scorers}
    for number in range(MOST_MASKS):
        masked = masking.fixed(texts, seed, number)
        for name, score in scorers.items():
            sums[name].append(score(masked=masked))
        if number + 1 >= least and all(
            mask_error(torch.stack(own)) < MASK_ERROR for own in sums.values()
        ):
            break
    return {name: torch.stack(own) for name, own in sums.items()}


def describe(sums: torch.Tensor) -> dict:
    """Scores, with 95% bootstrap intervals over the texts."""
    loss, top1, _, count = resampled(sums).T
    error = {"masks": len(sums), "standard_error_of_masks": mask_error(sums)}
    intervals = {
        "perplexity_interval": interval((loss / count).exp()),
        "top1_interval": interval(top1 / count),
    }
    return summary(sums) | error | intervals


def pretraining_gain(sums: dict[str, torch.Tensor]) -> dict:
    """Loss from scratch minus loss after fine-tuning, on the same masks of the same texts."""
    losses = [resampled(sums[name])[:, 0] for name in ("scratch", "after")]
    counts = resampled(sums["after"])[:, 3]
    mean = summary(sums["scratch"])["loss"] - summary(sums["after"])["loss"]
    return {"mean": mean, "interval": interval((losses[0] - losses[1]) / counts)}


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
    if first.gain:
        gains = [trial.gain["mean"] for trial in trials]
        metrics["scratch_minus_after"] = {"mean": mean(gains), "of_seeds": gains}
        metrics["scratch_minus_after"]["interval_of_first"] = first.gain["interval"]
        if len(gains) > 1:
            error = stdev(gains) / math.sqrt(len(gains))
            metrics["scratch_minus_after"]["standard_error"] = error
    return metrics


def fill_prompts(trial: Trial, start: Start, max_length: int) -> list[dict]:
    """Those of PROMPTS that have at most `max_length` tokens, with their best fillings."""
    tokenizer, tokens = start.tokenizer, {}
    for prompt in PROMPTS:
        own = tokenizer(prompt.replace("[MASK]", tokenizer.mask_token))["input_ids"]
        tokens |= {prompt: own} if len(own) <= max_length else {}
    if not tokens:
        return []
    models = trial.models.items()
    found = {name: fill(model, tokenizer, list(tokens.values())) for name, model in models}
    best = {name: best_words(tokenizer, probs) for name, probs in found.items()}
    return [
        {"text": prompt.split("[MASK]"), "word": None, "best": {n: b[row] for n, b in best.items()}}
        for row, prompt in enumerate(tokens)
    ]


def fill_tweets(trial: Trial, start: Start, config: Config) -> list[dict]:
    """Of the first test tweets, each with one whole word masked that the seed chooses: the word,
    its log-probability and the best fillings by each model.
    """
    found, texts, generator = [], [], torch.Generator().manual_seed(config.seed)
    for one in encode(start.tokenizer, trial.tweets.test[:GAPS], config.max_length):
        text, spans, tokens = one["text"], one["offset_mapping"], one["input_ids"]
        if not (places := whole_words(text, spans)):
            continue
        place = places[int(torch.randint(len(places), (1,), generator=generator))]
        begin, end = spans[place]
        gap = {"text": [text[:begin], text[end:]], "word": text[begin:end].strip()}
        found.append(gap | {"token": tokens[place], "best": {}, "log_prob": {}})
        texts.append([*tokens[:place], start.tokenizer.mask_token_id, *tokens[place + 1 :]])
    for name, model in trial.models.items() if found else ():
        probs = torch.cat([fill(model, start.tokenizer, [text]) for text in texts])
        best = best_words(start.tokenizer, probs)
        for row, gap in enumerate(found):
            gap["best"][name] = best[row]
            gap["log_prob"][name] = float(probs[row, gap["token"]].log())
    return found


def right_words(gaps: list[dict], models: dict) -> dict:
    """The share of whole words for which the best filling is the word."""
    right = {
        name: sum(gap["best"][name][0][0] == gap["word"].lower() for gap in gaps)
        / max(len(gaps), 1)
        for name in models
    }
    return {"words": len(gaps)} | right


def chosen_gaps(gaps: list[dict], seed: int) -> dict[str, list[dict]]:
    """Three for which fine-tuning raised the word's probability most, three at random."""
    gain = [gap["log_prob"]["after"] - gap["log_prob"]["before"] for gap in gaps]
    order = sorted(range(len(gaps)), key=gain.__getitem__, reverse=True)
    best, rest = order[:3], order[3:]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:3]
    parts = {"improved most": best, "at random": [rest[place] for place in drawn]}
    return {name: [gaps[place] for place in own] for name, own in parts.items()}


def headline(trials: list[Trial]) -> dict[str, float]:
    """Means over the seeds."""
    return {
        name: mean(trial.scores[model][score] for trial in trials)
        for name, (model, score) in HEADLINE.items()
        if model in trials[0].scores
    }


def plot_results(
    trial: Trial, prompts: list[dict], gaps: list[dict], start: Start, config: Config, run: Path
) -> None:
    """The pictures, of the first seed."""
    title = f"{start.about['name']} on {trial.tweets.name}"
    result = f"{title}: test perplexity " + ", ".join(
        f"{trial.scores[name]['perplexity']:.0f} {name}" for name in trial.models
    )
    pretraining = start.about.get("pretraining")
    curves = (trial.history, pretraining, trial.val_unigram)
    try_plot(plot_curves, *curves, result, run / "curves.png")
    try_plot(plot_accuracy, trial.scores, result, run / "accuracy.png")
    rows = {"fixed prompts": prompts} | chosen_gaps(gaps, config.seed)
    try_plot(plot_gaps, rows, title, run / "gaps.png")


def save_model(trial: Trial, start: Start, config: Config, run: Path) -> None:
    """model/, which transformers loads, and model.pt: all that predict.py needs."""
    if RANK:
        return
    trial.models["after"].save_pretrained(run / "model")
    start.tokenizer.save_pretrained(run / "model")
    description = {
        "project": "bert_mlm",
        "max_length": config.max_length,
        "links": config.links,
        "names": config.names,
        "files": {path.name: path.read_text() for path in (run / "model").glob("*.json")},
        "weights": trial.models["after"].state_dict(),
    }
    save(run / "model.pt", description)


if __name__ == "__main__":
    run_main(main, DataError)
