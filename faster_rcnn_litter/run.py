"""Settings, the run's folder, seeds, the loop over epochs, checkpoints: the same in all projects.

`train.py` calls start_run first, open_run once the data are there, epochs for each stage of
training, finish_run last. `predict.py` calls start_predict. What `torchrun` asks of a run stands
under "several processes".
"""

import argparse
import contextlib
import csv
import difflib
import hashlib
import importlib.metadata
import io
import json
import math
import operator
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nobody watches that a run is resumed once
    fcntl = None

PROJECT = Path(__file__).resolve().parent
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK, WORLD, LOCAL_RANK, LOCAL_WORLD, ATTEMPT = (
    int(os.environ[name]) if TORCHRUN else default
    for name, default in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }.items()
)
OWN = slice(RANK, None, WORLD)  # this process's part of a batch, of examples, of batches
STORE: Any = None  # torchrun's own, which outlives its processes


def end_on_ctrl_c(run: Path | None = None) -> None:
    """From here on Ctrl-C ends the program in one line that says how to go on, status 130."""

    def end(number: int, _: Any) -> None:
        speak()
        print(f"\n{ends[number]}{to_go_on(run)}", file=sys.stderr)
        sys.exit(128 + number)

    ends = {signal.SIGINT: "interrupted"}
    if run and TORCHRUN:  # which ends all processes after the first that fails
        ends[signal.SIGTERM] = "ended by torchrun, or by a signal to it"
    for number in ends:
        signal.signal(number, end)


def to_go_on(run: Path | None) -> str:
    if not run or not (run / "history.pt").exists():
        return ""
    program = f"torchrun --nproc_per_node {LOCAL_WORLD}" if TORCHRUN else "python"
    return f"; to go on: {program} {shlex.join([sys.argv[0], '--resume', str(run)])}"


def speak() -> None:
    """Before an error: of several processes only the first that fails is heard."""
    if STORE is None:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would cut the error off
    try:
        heard = STORE.add(f"errors of attempt {ATTEMPT}", 1) == 1
    except RuntimeError:  # torchrun is gone
        heard = RANK == 0
    sys.stderr = sys.__stderr__ if heard else open(os.devnull, "w")  # noqa: SIM115


if Path(sys.argv[0]).resolve().parent == PROJECT:  # started as a program, which imports this first
    end_on_ctrl_c()

import numpy as np
import torch
import yaml

STARTED = time.perf_counter()
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn")
HEADER: dict[str, Any] = {}  # of the checkpoints of the run in progress: what it must not mix with
LOCKS: dict[Path, int] = {}  # run folders that this process works in
RUN: Path | None = None  # the folder of the run or the predictions in progress

# Bounds of a setting. A plain int or float is more than 0 and at most 1e9.
Seed = Annotated[int, ">= 0", "<= 4294967295"]
Count = Annotated[int, ">= 1", "<= 10000000"]  # examples, steps, tries
Epochs = Annotated[int, ">= 1", "<= 100000"]
Batch = Annotated[int, ">= 1", "<= 65536"]
Pixels = Annotated[int, ">= 1", "<= 4096"]
Width = Annotated[int, ">= 1", "<= 8192"]  # channels, units
Rate = Annotated[float, "> 0", "<= 100"]  # of an optimizer
Decay = Annotated[float, ">= 0", "<= 10"]
Share = Annotated[float, "> 0", "< 1"]

BOUNDS = {
    ">=": (operator.ge, "at least"),
    ">": (operator.gt, "more than"),
    "<=": (operator.le, "at most"),
    "<": (operator.lt, "less than"),
}


class RunError(Exception):
    """Why a run's folder cannot be used, in one line for the person who started the program."""


# --- settings ---------------------------------------------------------------------------------


def start_run(
    settings: type, description: str, argv: list[str] | None = None, *, several: bool = False
) -> tuple[Any, Path, torch.device]:
    """The settings, the path of the run's folder, the device.

    `settings` is a dataclass of names, types and bounds, among them `out_dir` and `device`. Each
    field is a key of config.yaml and a flag. Flags win over --config's file, which may hold any
    part of the keys, and that over config.yaml. A mistake ends the program in one line, status 2.
    The folder is there only with --resume; else open_run makes it. --list shows the runs, and ends.
    `several` says that the project trains in several processes, which torchrun starts.
    """
    kinds = get_type_hints(settings, include_extras=True)
    parser = make_parser(kinds, description)
    begun = meet() if TORCHRUN else None
    given, unknown = parser.parse_known_args(argv)
    flags = {name: text for name, text in vars(given).items() if text is not None}
    resume, show_list = flags.pop("resume", None), flags.pop("list")
    if begun:  # by the processes that torchrun has ended and starts again
        resume, flags = begun, {name: flags[name] for name in flags.keys() & {"device"}}
    try:
        if WORLD > 1 and not several:
            raise ValueError(f"{PROJECT.name} trains in one process: start it without torchrun")
        if unknown:
            name = unknown[0].split("=")[0]
            near = hint(name, [f"--{key}" for key in kinds])
            raise ValueError(f"unknown flag '{shorten(name)}'{near}")
        if resume and flags.keys() - {"device"}:
            raise ValueError("--resume: only --device may differ from the run's own settings")
        if resume:
            check_resumable(resume)
        path = resume / "config.yaml" if resume else flags.pop("config", None)
        config = read_config(settings, kinds, path, flags)
        batches = [key for key in kinds if key.endswith("batch_size")]
        if small := [key for key in batches if getattr(config, key) < WORLD]:
            raise ValueError(f"{small[0]}: expected at least 1 for each of {WORLD} processes")
        if show_list:
            print(table_of_runs(config.out_dir))
            sys.exit()
        run = resume or new_folder(config.out_dir)
    except (OSError, ValueError, RunError, yaml.YAMLError) as error:
        parser.error(one_line(error))
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(line_buffering=True)  # a log file, too, shows each line at once
    join_processes(config.device)
    run = agree_on_folder(run)
    where = f"{WORLD} processes, the first on {config.device}" if WORLD > 1 else config.device
    print(f"run: {run} on {where}   (interrupted? --resume {shlex.quote(str(run))})")
    end_on_ctrl_c(run)
    return config, run, torch.device(config.device)


def make_parser(kinds: dict[str, Any], description: str) -> argparse.ArgumentParser:
    """--config, --resume, --list, and a flag for each key, with the key's comment as its help."""
    text = (PROJECT / "config.yaml").read_text(encoding="utf-8-sig", errors="replace")
    comments = dict(re.findall(r"^(\w+):.*?\s#\s*(.+)$", text.replace("%", "%%"), re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--config FILE | --resume RUN | --list] [--KEY VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda text: refuse(parser, text)
    about = "settings that differ from config.yaml"
    parser.add_argument("--config", metavar="FILE", type=user_path, help=about)
    parser.add_argument("--resume", metavar="RUN", type=user_path, help="folder of a run to finish")
    parser.add_argument("--list", action="store_true", help="show the runs in out_dir, and end")
    for name in kinds:
        parser.add_argument(f"--{name}", metavar="VALUE", help=comments.get(name))
    return parser


def refuse(parser: argparse.ArgumentParser, text: str) -> None:
    """In one line, without the usage."""
    speak()
    parser.exit(2, f"{parser.prog}: error: {text}\n")


def user_path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # Path's own fails where there is no such user


def read_config(settings: type, kinds: dict, path: Path | None, flags: dict[str, str]) -> Any:
    """`settings` filled from config.yaml, the file at `path` and the flags.

    Raises ValueError that names the place of a mistake.
    """
    base = PROJECT / "config.yaml"
    texts = read_texts(base, kinds)
    if missing := [name for name in kinds if name not in texts]:
        raise ValueError(f"{base}: missing key '{missing[0]}'")
    texts |= (read_texts(path, kinds) if path else {}) | flags
    try:
        config = settings(**{name: convert(name, texts[name], kinds[name]) for name in kinds})
        return replace(config, device=choose_device(config.device))
    except ValueError as error:  # its text begins with the key
        where = "--" if str(error).split(":")[0] in flags else f"{path or base}: "
        raise ValueError(f"{where}{error}") from None


def read_texts(path: Path, kinds: dict[str, Any]) -> dict[str, str]:
    """Each key's value as text. YAML's own reading is wrong here: `1e-3` would be a string, `on`
    True, and of a key that occurs twice the first would vanish.
    """
    try:
        root, texts = yaml.compose(path.read_text(encoding="utf-8-sig")), {}
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML in UTF-8: {shorten(str(error))}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected lines of the form 'key: value'")
    for key, node in root.value:
        name = str(key.value)
        if name not in kinds:
            raise ValueError(f"{path}: unknown key '{shorten(name)}'{hint(name, list(kinds))}")
        if name in texts:
            raise ValueError(f"{path}: key '{name}' occurs twice")
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise ValueError(f"{path}: {name}: expected one value or a list of values")
        texts[name] = ",".join(item.value for item in items)
        if kinds[name] is Path:  # in a file, paths are seen from the project's folder
            texts[name] = str(PROJECT / user_path(texts[name]))
    return texts


def hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def shorten(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def convert(name: str, text: str, kind: Any) -> Any:
    """`text` as `kind`: true or false, a word of a Literal, a tuple from comma-separated words, a
    number within the bounds of an Annotated.
    """
    kind, *bounds = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if get_origin(kind) is tuple:
        words, inner = [word.strip() for word in text.split(",")], get_args(kind)
        if inner[-1] is not ... and len(words) != len(inner):
            raise ValueError(f"{name}: expected {len(inner)} values, found '{shorten(text)}'")
        return tuple(convert(name, word, inner[0]) for word in words)
    choices = {word: word for word in get_args(kind)}  # of a Literal
    if kind is bool:
        choices = {"true": True, "false": False}
    expected = " | ".join(choices) or kind.__name__
    try:
        value = choices[text] if choices else user_path(text) if kind is Path else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name}: expected {expected}, found '{shorten(text)}'") from None
    if kind in (int, float):
        check_bounds(name, value, bounds)
    return value


def check_bounds(name: str, value: float, bounds: list[str]) -> None:
    """Raises ValueError if the number breaks a bound as "<= 10", or is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, found '{value}'")
    lower, upper = (any(bound[0] == sign for bound in bounds) for sign in "><")
    for bound in (*bounds, *([] if lower else ["> 0"]), *([] if upper else ["<= 1000000000"])):
        sign, limit = bound.split()
        holds, words = BOUNDS[sign]
        if not holds(value, float(limit)):
            raise ValueError(f"{name}: expected {words} {limit}, found {shorten(str(value))}")


def choose_device(name: str) -> str:
    """Its full name; `auto` is CUDA where there is one. Raises ValueError if it cannot be used."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected auto | cpu | cuda | cuda:N, found '{shorten(name)}'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1 and name != "cpu":
        name = f"cuda:{LOCAL_RANK}"
    try:
        return str(torch.zeros((), device=name).device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: '{name}' cannot be used here: {reason}") from None


# --- the run's folder -------------------------------------------------------------------------


def new_folder(parent: Path) -> Path:
    """The path of a folder `parent/<date-time>` that is not there yet."""
    parent.mkdir(parents=True, exist_ok=True)
    path = parent / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    number = 1
    while path.exists():  # two within a microsecond, or a clock that stands still
        number += 1
        path = path.with_name(f"{path.name.split('_n')[0]}_n{number}")
    return path


def table_of_runs(parent: Path) -> str:
    """A line for each run below `parent`: the settings that differ, the headline, the seconds.

    A run that has not ended has no headline.
    """
    settings, reports = {}, {}
    for path in sorted(parent.glob("*/config.yaml")):
        settings[path.parent.name] = yaml.safe_load(path.read_text(encoding="utf-8"))
        report = path.with_name("metrics.json")
        text = report.read_text(encoding="utf-8") if report.is_file() else '{"headline": {}}'
        reports[path.parent.name] = json.loads(text)
    if not settings:
        return f"{parent}: no runs"
    keys = dict.fromkeys(key for run in settings.values() for key in run)
    keys = [key for key in keys if len({str(run.get(key)) for run in settings.values()}) > 1]
    names = list(dict.fromkeys(name for run in reports.values() for name in run["headline"]))
    rows = [["run", *keys, *names, "seconds"]]
    for name, report in reports.items():
        numbers = [report["headline"].get(key) for key in names] + [report.get("seconds")]
        cells = ["-" if x is None else f"{x:.4g}" for x in numbers]
        rows.append([name, *(str(settings[name].get(key, "-")) for key in keys), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([f"{parent}:", *lines])


def check_resumable(run: Path) -> None:
    """Raises RunError unless `run` is an unfinished run of this project, left as it was, in which
    no other process works.
    """
    if not (run / "history.pt").is_file():
        raise RunError(f"--resume: {run} holds no history.pt: there is nothing to resume")
    saved = read_torch(run / "history.pt")
    if not isinstance(saved, dict) or saved.get("project") != PROJECT.name:
        raise RunError(f"--resume: {run} is not a run of {PROJECT.name} as it is today")
    if saved["finished"]:
        raise RunError(f"--resume: {run} is finished; see its metrics.json")
    if not (run / "config.yaml").is_file() or saved["settings"] != settings_digest(run):
        changed = f"--resume: {run / 'config.yaml'} was changed after the run began"
        raise RunError(f"{changed}; with other settings, begin a new run")
    lock(run)


def settings_digest(run: Path) -> str:
    return hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()


def lock(run: Path) -> None:
    """Until this process ends. Raises RunError if another program works in the folder."""
    if fcntl is None or RANK or run.resolve() in LOCKS:
        return
    handle = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise RunError(f"{run}: another process is working in this folder") from None
    LOCKS[run.resolve()] = handle


def open_run(run: Path, config: Any, name: str, *data: Any) -> None:
    """Make the run's folder with the settings, or check that a resumed run has the same data.

    `data` are tensors, arrays, texts and tuples of them: what the result depends on. Raises
    RunError if they are not those that the run began with.
    """
    description = {"name": name, "sha256": fingerprint(*data)}
    HEADER.clear()
    if RANK == 0 and not run.exists():
        make_folder(run, config)
        HEADER.update(project=PROJECT.name, settings=settings_digest(run), data=description)
        save_checkpoint(run, "", {}, [])
    wait_for_all()
    if not run.exists():
        raise RunError(f"{run}: not seen by process {RANK}; all machines must see out_dir")
    lock(run)
    saved = read_torch(run / "history.pt")
    if saved["data"] != description:
        raise RunError(
            f"--resume: {run} began with other data: {saved['data']['name']} "
            f"{saved['data']['sha256'][:8]}, now {name} {description['sha256'][:8]}"
        )
    HEADER.update(project=PROJECT.name, settings=settings_digest(run), data=description)


def make_folder(run: Path, config: Any) -> None:
    """With config.yaml."""
    run.mkdir()
    plain = {
        name: os.path.relpath(value, PROJECT) if isinstance(value, Path) else value
        for name, value in asdict(config).items()
    }
    plain |= {name: list(value) for name, value in plain.items() if isinstance(value, tuple)}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    replace_file(run / "config.yaml", text.encode())


def fingerprint(*parts: Any) -> str:
    """A digest of tensors, arrays, texts, numbers and tuples of them; of values, not of devices."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data.cast("B") if part.size else b"")
        elif isinstance(part, (tuple, list)):
            digest.update(fingerprint(*part).encode())
        elif isinstance(part, dict):
            digest.update(fingerprint(*part.items()).encode())
        else:
            digest.update(f"{type(part).__name__}{part}".encode())
    return digest.hexdigest()


def finish_run(
    run: Path, config: Any, *, dataset: str, headline: dict, metrics: dict, use: str
) -> None:
    """Write metrics.json, show the headline and `use`, the command that uses what was trained; the
    run's folder is the last line.
    """
    if RANK:
        return
    git = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        commit = ""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    report = {
        "project": PROJECT.name,
        "dataset": dataset,
        "device": config.device,
        "seed": config.seed,
        "seconds": round(time.perf_counter() - STARTED, 1),
        "versions": {"python": platform.python_version()} | versions,
        "commit": commit or None,
        "headline": without_nan(headline),
        "metrics": without_nan(metrics),
    } | ({"processes": WORLD} if WORLD > 1 else {})
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    checkpoint = read_torch(run / "history.pt")
    save(run / "history.pt", checkpoint | {"finished": True, "parts": {}})
    replace_file(run / "metrics.json", text.encode())
    for name, value in report["headline"].items():
        print(f"{name:>32}  {'-' if value is None else f'{value:.4g}'}")
    print(f"use it: {use}\n{run}")


def without_nan(value: Any) -> Any:
    """None for each number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def try_plot(plot: Callable, *args: Any, **options: Any) -> None:
    """Call it; a picture that fails is named, and the run goes on to its numbers. Characters that
    the font lacks are drawn as boxes, without a warning for each.
    """
    if RANK:
        return
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")
            plot(*args, **options)
    except Exception as error:
        reason = shorten(f"{type(error).__name__}: {error}")
        print(f"warning: no picture from {plot.__name__}: {reason}", file=sys.stderr)


# --- how a program ends -----------------------------------------------------------------------


def run_main(main: Callable[[], None], *errors: type[Exception]) -> None:
    """Call it; what the user can mend (`errors`, a full disk, too little memory) ends the program
    in one line, status 1. A folder in which nothing was written is removed.
    """
    try:
        main()
        leave()
    except BrokenPipeError:  # of `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        sys.exit(141)
    except (*errors, RunError, FloatingPointError, OSError) as error:
        speak()
        sys.exit(f"error: {one_line(error)}")
    except (MemoryError, RuntimeError) as error:
        speak()
        if WORLD > 1 and re.search("gloo|NCCL|[Cc]onnection", str(error)):
            ended = f"error: another process has ended{to_go_on(RUN)}"
            sys.exit(f"{ended} ({shorten(one_line(error))})")
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        sys.exit(f"error: out of memory; make smaller: {sizes()} ({shorten(one_line(error))})")
    except Exception:
        speak()
        raise
    finally:
        if RUN and RUN.is_dir() and not any(RUN.iterdir()):
            RUN.rmdir()
        for name, module in list(sys.modules.items()):  # the next project of a notebook has its own
            own = Path(getattr(module, "__file__", None) or "").parent == PROJECT
            if own and name != "__main__":
                del sys.modules[name]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def sizes() -> str:
    """The settings on which the memory needed depends."""
    text = (PROJECT / "config.yaml").read_text(encoding="utf-8-sig", errors="replace")
    words = "batch|size|count|images|width|widths"
    return ", ".join(re.findall(rf"^((?:\w+_)?(?:{words})(?:_\w+)?):", text, re.MULTILINE))


# --- epochs -----------------------------------------------------------------------------------


def epochs(
    run: Path,
    stage: str,
    parts: dict[str, Any],
    count: int,
    seed: int,
    *,
    best: tuple[str, Callable] | None = None,
    keep: str = "model",
    patience: int | None = None,
    first: int = 1,
    every: float = 0.0,
) -> Iterator[dict]:
    """A row of history.csv for each epoch that is left to do; the caller trains and fills it.

    `parts` (name to anything with state_dict) are put into the state of the last checkpoint, saved
    after each epoch, at most once in `every` seconds. In the end part `keep` has its weights from
    the epoch that was `best`, as ("val_loss", min), or from the last one. Without a better one for
    `patience` epochs the stage ends. Seeds are set anew from (seed, stage, epoch): a resumed epoch
    draws what it would have drawn. Raises FloatingPointError if loss or score are not finite.
    """
    history = load_checkpoint(run, stage, parts)
    rows = [row for row in history if row["stage"] == stage]
    saved = time.perf_counter()
    while len(rows) <= count - first and not stalled(rows, best, patience):
        epoch = first + len(rows)
        seed_everything(seed, stage, epoch)
        began = time.perf_counter()
        row = {"stage": stage, "epoch": epoch, "seconds": 0.0}
        yield row
        row["seconds"] = time.perf_counter() - began
        row.update(first_of_all(row))
        check_finite(row, best)
        rows.append(row)
        history.append(row)
        if best is None or row[best[0]] == best[1](old[best[0]] for old in rows):
            save(run / f"{stage}.pt", parts[keep].state_dict())
        over = len(rows) > count - first or stalled(rows, best, patience)
        if over or time.perf_counter() - saved >= every:
            save_checkpoint(run, stage, parts, history)
            saved = time.perf_counter()
        numbers = [f"{name} {x:.4g}" for name, x in row.items() if isinstance(x, (int, float))]
        print("  ".join([stage, *numbers]))
    wait_for_all()
    parts[keep].load_state_dict(read_torch(run / f"{stage}.pt"))


def stalled(rows: list[dict], best: tuple[str, Callable] | None, patience: int | None) -> bool:
    """Whether `patience` epochs have passed since the best one, of equals the first."""
    if not rows or not best or patience is None:
        return False
    scores = [row[best[0]] for row in rows]
    return len(scores) - 1 - scores.index(best[1](scores)) >= patience


def check_finite(row: dict, best: tuple[str, Callable] | None) -> None:
    watched = [name for name in row if name.startswith("train_") or (best and name == best[0])]
    for name in watched:
        if row[name] is not None and not math.isfinite(row[name]):
            place = f"{row['stage']} epoch {row['epoch']}"
            raise FloatingPointError(f"{place}: {name} is not finite; a smaller lr may help")


def sum_losses(losses: list[torch.Tensor], label: str) -> torch.Tensor:
    """Sum over the steps in float64, of one number or several per step.

    Read from the device once per epoch, so that the loop never waits for it. Raises
    FloatingPointError that names the first step whose loss is not finite.
    """
    losses = torch.stack(losses).double().cpu()
    finite = losses.isfinite().view(len(losses), -1).all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0]) + 1
        raise FloatingPointError(f"{label}: the loss is not finite at step {first}")
    return losses.sum(0)


def seed_everything(*parts: int | str) -> None:
    """Start every generator anew from `parts`, as (seed, stage, epoch).

    So a resumed epoch draws what it would have drawn, and no generator's state has to be saved.
    """
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- checkpoints ------------------------------------------------------------------------------


def replace_file(path: Path, content: bytes) -> None:
    """Write a temporary file, then rename: a killed run leaves the old file or the new one whole.

    Raises OSError that names the file; a full disk, too, leaves the old file whole. Of several
    processes the first writes.
    """
    if RANK:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror}") from error


def save(path: Path, state: Any) -> None:
    """`state` for `torch.load(path, weights_only=True)`."""
    if RANK:
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getbuffer())


def read_torch(path: Path) -> Any:
    """What `save` wrote, on the CPU. Raises RunError if the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own
        reason = shorten(str(error).split("\n")[0].split(". In PyTorch")[0])
        raise RunError(f"{path} is damaged, or of no run; begin a new one ({reason})") from None


def save_checkpoint(run: Path, stage: str, parts: dict[str, Any], history: list[dict]) -> None:
    """After an epoch: history.csv with all rows so far, history.pt with the state of `parts` too.

    `history` holds a row per epoch of every stage so far, each with its stage under "stage".
    """
    table = io.StringIO(newline="")
    names = dict.fromkeys(name for row in history for name in row)  # stages may differ in columns
    writer = csv.DictWriter(table, fieldnames=list(names))
    writer.writeheader()
    writer.writerows(history)
    replace_file(run / "history.csv", table.getvalue().encode())
    state = {name: part.state_dict() for name, part in parts.items()}
    seconds = time.perf_counter() - STARTED
    checkpoint = {"stage": stage, "seconds": seconds, "history": history, "parts": state}
    save(run / "history.pt", HEADER | {"finished": False} | checkpoint)


def load_checkpoint(run: Path, stage: str, parts: dict[str, Any]) -> list[dict]:
    """All rows up to the last checkpoint, none for a new run.

    `parts` are put into the state saved there if it is of this stage. They are left alone if the
    stage has not begun, or has ended and another has begun: its best weights are then in a file.
    """
    global STARTED
    if not (run / "history.pt").exists():
        return []
    checkpoint = read_torch(run / "history.pt")
    STARTED = min(STARTED, time.perf_counter() - checkpoint["seconds"])  # an earlier process's too
    if checkpoint["stage"] == stage:
        for name, part in parts.items():
            part.load_state_dict(checkpoint["parts"][name])
    return checkpoint["history"]


def read_rows(run: Path, stage: str) -> list[dict]:
    """The rows of one stage, those of an earlier process too."""
    return [row for row in load_checkpoint(run, "", {}) if row["stage"] == stage]


# --- several processes ------------------------------------------------------------------------
#
# torchrun starts WORLD processes, of which each runs the whole program: it draws the same numbers,
# takes the part OWN of each batch and gets the same weights. The first writes, prints and draws
# bars. In one process all of these functions do nothing.


def meet() -> Path | None:
    """Silences all processes but the first; the folder in which an earlier attempt of torchrun's
    (--max_restarts) has begun, if any.
    """
    global STORE
    from torch.distributed import TCPStore

    first = RANK == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    STORE = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=first)
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    run = Path(STORE.get("run").decode()) if ATTEMPT and STORE.check(["run"]) else None
    return run if run and (run / "history.pt").exists() else None


def agree_on_folder(run: Path) -> Path:
    """The first process's, which torchrun's next attempt will find."""
    global RUN
    RUN = first_of_all(run)
    if STORE is not None and RANK == 0:
        STORE.set("run", str(run.resolve()))
    return RUN


def join_processes(device: str) -> None:
    """From here on the processes work together: by NCCL, each on its own GPU, or by gloo."""
    from torch import distributed

    if WORLD == 1 or distributed.is_initialized():
        return
    if device != "cpu":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=distributed.PrefixStore(f"attempt {ATTEMPT}", STORE),
        rank=RANK,
        world_size=WORLD,
        timeout=timedelta(days=1),  # of a download, on which all wait; torchrun ends what has died
    )


def leave() -> None:
    if WORLD > 1 and torch.distributed.is_initialized():
        wait_for_all()
        torch.distributed.destroy_process_group()


def wait_for_all() -> None:
    if WORLD > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """The first process of a machine goes alone through the body, which downloads and fills caches;
    then the others.
    """
    if LOCAL_RANK:
        wait_for_all()
    yield
    if LOCAL_RANK == 0:
        wait_for_all()


def first_of_all(value: Any) -> Any:
    """The first process's value."""
    if WORLD == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def parallel(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, so wrapped that its gradients are the mean over the processes. On CUDA its batch
    normalisation is that of the whole batch; gloo, on the CPU, has none, and there each process
    normalises by its own part.
    """
    if WORLD == 1:
        return model
    if next(model.parameters()).is_cuda:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.11 lacks the new name
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return WORLD * gradient  # each process's own part of it; `parallel` divides by WORLD


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over the processes. After it and `parallel`, gradients are those of the whole batch
    in one process.
    """
    return x if WORLD == 1 else Total.apply(x)


def mean_of_all(loss: torch.Tensor, count: int) -> torch.Tensor:
    """The mean over what all processes count, from this one's mean over `count`, which may be 0."""
    if WORLD == 1:
        return loss
    loss, count = total(torch.stack((loss * count, loss.new_tensor(count)))).unbind()
    return loss / count.clamp(min=1)


def average_buffers(model: torch.nn.Module) -> None:
    """Of batch normalisation: each process has its own mean and variance of an epoch."""
    for buffer in model.buffers() if WORLD > 1 else ():
        if buffer.is_floating_point():
            buffer.copy_(total(buffer) / WORLD)


def all_rows(own: torch.Tensor, count: int) -> torch.Tensor:
    """All `count` rows, of which each process has its OWN."""
    if WORLD == 1:
        return own
    rows = own.new_zeros(count, *own.shape[1:])
    rows[OWN] = own
    return total(rows)


def gather(own: list) -> list:
    """All items, which are on the CPU and of which each process has its OWN, in order."""
    if WORLD == 1:
        return own
    parts = [None] * WORLD
    torch.distributed.all_gather_object(parts, own)
    items = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        items[rank::WORLD] = part
    return items


@contextlib.contextmanager
def own_draws() -> Iterator[None]:
    """What is drawn in here, as dropout, differs between the processes; what is drawn afterwards is
    again the same in all.
    """
    if WORLD == 1:
        yield
        return
    state = torch.get_rng_state()
    torch.manual_seed(zlib.crc32(state.numpy().tobytes()) + RANK)
    try:
        yield
    finally:
        torch.set_rng_state(state)


# --- prediction -------------------------------------------------------------------------------


def start_predict(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, dict, Path, torch.device]:
    """The arguments, what the run's model.pt holds, a new folder for the results, the device.

    `parser` has the project's own flags; RUN, INPUT, --out_dir and --device are added. A mistake
    ends the program in one line, status 2.
    """
    global RUN
    parser.error = lambda text: refuse(parser, text)
    parser.add_argument("run", metavar="RUN", type=user_path, help="a run's folder or its model.pt")
    parser.add_argument("inputs", metavar="INPUT", nargs="*", help="files and folders")
    place = "where the folder of results is made (RUN/predictions)"
    parser.add_argument("--out_dir", metavar="DIR", type=user_path, help=place)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N (auto)")
    given = parser.parse_args(argv)
    if WORLD > 1:
        parser.error("predict.py runs in one process: start it without torchrun")
    try:
        device = torch.device(choose_device(given.device))
        path = given.run / "model.pt" if given.run.is_dir() else given.run
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; a run writes it when it ends")
        saved = read_torch(path)
        if not isinstance(saved, dict) or saved.get("project") != PROJECT.name:
            raise ValueError(f"{path}: this is not the model of a run of {PROJECT.name}")
        RUN = folder = new_folder(given.out_dir or path.parent / "predictions")
        folder.mkdir()
    except (OSError, ValueError, RunError) as error:
        parser.error(one_line(error))
    end_on_ctrl_c()
    return given, saved, folder, device
