"""Settings, the run's folder, seeds, checkpoints: the same file, to the letter, in every project.

`train.py` calls start_run first; seed_everything before it makes a model and before every epoch;
load_checkpoint and save_checkpoint around the epochs of each stage; finish_run last.
"""

import argparse
import csv
import difflib
import importlib.metadata
import io
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
import yaml

PROJECT = Path(__file__).resolve().parent
STARTED = time.perf_counter()
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn")


def start_run(
    settings: type, description: str, argv: list[str] | None = None
) -> tuple[Any, Path, torch.device]:
    """The settings, the run's folder, the device.

    `settings` is a dataclass of names and types, among them `out_dir` and `device`. Each field is a
    key of config.yaml and a flag; flags win. A mistake ends the program in one line, status 2.
    """
    kinds = get_type_hints(settings)
    parser = make_parser(kinds, description)
    given, unknown = parser.parse_known_args(argv)
    flags = {name: text for name, text in vars(given).items() if text is not None}
    path, resume = flags.pop("config", PROJECT / "config.yaml"), flags.pop("resume", None)
    try:
        if unknown:
            name = unknown[0].split("=")[0]
            raise ValueError(f"unknown flag '{name}'{hint(name, [f'--{key}' for key in kinds])}")
        if resume and flags.keys() - {"device"}:
            raise ValueError("--resume: only --device may differ from the run's own settings")
        config = read_config(settings, kinds, resume / "config.yaml" if resume else path, flags)
        run = resume or open_run(config)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    sys.stdout.reconfigure(line_buffering=True)  # a log file, too, shows each line at once
    print(f"run: {run} on {config.device}   (cut short? --resume {run})")
    end_on_ctrl_c(run)
    return config, run, torch.device(config.device)


def make_parser(kinds: dict[str, Any], description: str) -> argparse.ArgumentParser:
    """--config, --resume, and a flag for each key, with the key's comment as its help."""
    text = (PROJECT / "config.yaml").read_text()
    comments = dict(re.findall(r"^(\w+):.*?\s#\s*(.+)$", text.replace("%", "%%"), re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--config FILE | --resume RUN] [--KEY VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")  # without usage
    parser.add_argument("--config", metavar="FILE", type=Path, help="the settings (config.yaml)")
    parser.add_argument("--resume", metavar="RUN", type=Path, help="folder of a run to finish")
    for name in kinds:
        parser.add_argument(f"--{name}", metavar="VALUE", help=comments.get(name))
    return parser


def read_config(settings: type, kinds: dict[str, Any], path: Path, flags: dict[str, str]) -> Any:
    """`settings` filled from the file and the flags; ValueError names the place of a mistake."""
    texts = read_texts(path, kinds) | flags
    try:
        config = settings(**{name: convert(name, texts[name], kinds[name]) for name in kinds})
        return replace(config, device=choose_device(config.device))
    except ValueError as error:  # its text begins with the key
        where = "--" if str(error).split(":")[0] in flags else f"{path}: "
        raise ValueError(f"{where}{error}") from None


def read_texts(path: Path, kinds: dict[str, Any]) -> dict[str, str]:
    """Each key's value as text. YAML's own reading is wrong here: `1e-3` would be a string, `on`
    True, and of a key that stands twice the first would vanish.
    """
    try:
        root, texts = yaml.compose(path.read_text(encoding="utf-8")), {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected lines of the form 'key: value'")
    for key, node in root.value:
        name = str(key.value)
        if name not in kinds:
            raise ValueError(f"{path}: unknown key '{name}'{hint(name, list(kinds))}")
        if name in texts:
            raise ValueError(f"{path}: key '{name}' stands twice")
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise ValueError(f"{path}: {name}: expected one value or a list of values")
        texts[name] = ",".join(item.value for item in items)
        if kinds[name] is Path:  # in a file, paths are seen from the project's folder
            texts[name] = str(PROJECT / texts[name])
    if missing := [name for name in kinds if name not in texts]:
        raise ValueError(f"{path}: missing key '{missing[0]}'")
    return texts


def hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def convert(name: str, text: str, kind: Any) -> Any:
    """`text` as `kind`: true or false, a word of a Literal, a tuple from comma-separated words."""
    if get_origin(kind) is tuple:
        return tuple(convert(name, word.strip(), get_args(kind)[0]) for word in text.split(","))
    choices = {word: word for word in get_args(kind)}  # of a Literal
    if kind is bool:
        choices = {"true": True, "false": False}
    expected = " | ".join(choices) or kind.__name__
    try:
        value = choices[text] if choices else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name}: expected {expected}, found '{text}'") from None
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, found '{text}'")
    return value


def choose_device(name: str) -> str:
    """Its full name; `auto` is CUDA where there is one. Raises ValueError if it cannot be used."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected auto | cpu | cuda | cuda:N, found '{name}'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.zeros((), device=name).device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: '{name}' cannot be used here: {reason}") from None


def open_run(config: Any) -> Path:
    """A new folder `out_dir/<date-time>` that holds the settings as they were resolved."""
    config.out_dir.mkdir(parents=True, exist_ok=True)
    while True:
        run = config.out_dir / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]
        try:
            run.mkdir()
            break
        except FileExistsError:  # another run began within the same millisecond
            time.sleep(0.001)
    plain = asdict(config)
    for name, value in plain.items():
        if isinstance(value, Path):
            plain[name] = os.path.relpath(value, PROJECT)
        elif isinstance(value, tuple):
            plain[name] = list(value)
    (run / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    return run


def end_on_ctrl_c(run: Path) -> None:
    """From here on Ctrl-C ends the program in one line that says how to go on, status 130."""

    def end(*_: Any) -> None:
        print(f"\ninterrupted; to go on: python {sys.argv[0]} --resume {run}", file=sys.stderr)
        sys.exit(130)

    signal.signal(signal.SIGINT, end)


def finish_run(run: Path, config: Any, *, dataset: str, headline: dict, metrics: dict) -> None:
    """Write metrics.json and show the headline; the run's folder is the last line."""
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
        "headline": headline,
        "metrics": metrics,
    }
    replace_file(run / "metrics.json", (json.dumps(report, indent=2) + "\n").encode())
    for name, value in headline.items():
        print(f"{name:>32}  {value:.4g}")
    print(run)


def seed_everything(*parts: int | str) -> None:
    """Start every generator anew from `parts`, as (seed, stage, epoch).

    So a resumed epoch draws what it would have drawn, and no generator's state has to be saved.
    """
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def replace_file(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a killed run leaves the old file or the new one whole.

    Raises OSError that names the file; a full disk, too, leaves the old file whole.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror}") from error


def save(path: Path, state: Any) -> None:
    """`state` for `torch.load(path, weights_only=True)`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getbuffer())


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
    save(run / "history.pt", checkpoint)


def load_checkpoint(run: Path, stage: str, parts: dict[str, Any]) -> list[dict]:
    """All rows up to the last checkpoint, none for a new run.

    `parts` are put into the state saved there if it is of this stage. They are left alone if the
    stage has not begun, or has ended and another has begun: its best weights are then in a file.
    """
    global STARTED
    if not (run / "history.pt").exists():
        return []
    checkpoint = torch.load(run / "history.pt", map_location="cpu", weights_only=True)
    STARTED = min(STARTED, time.perf_counter() - checkpoint["seconds"])  # an earlier process's too
    if checkpoint["stage"] == stage:
        for name, part in parts.items():
            part.load_state_dict(checkpoint["parts"][name])
    return checkpoint["history"]
