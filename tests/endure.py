"""What a run has to endure: python tests/endure.py [--kills 10] [project ...]

    kills       SIGKILL at random moments, each time resumed: the metrics of an unbroken run
    together    two runs at the same time, with one new data_dir: the metrics of an unbroken run
    read-only   a checkout that cannot be written to, with --out_dir and --data_dir elsewhere
    full disk   one line of error, a checkpoint that loads, and after more room a whole run

The last two mount small file systems and so need root. Each project runs with the tiny settings of
its own tests; all ten take up to an hour on two cores, which is why this is not a test.
"""

import argparse
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CLOCK = re.compile(r"seconds|per_second|timing|cost_ratio")  # what a clock decides
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests import projects and one another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("projects", nargs="*", help="all, unless some are named")
    parser.add_argument("--kills", type=int, default=10, help="how often each project is killed")
    flags = parser.parse_args()
    everyone = sorted(path.parent.name for path in ROOT.glob("*/config.yaml"))
    failures = 0
    for project in flags.projects or everyone:
        with tempfile.TemporaryDirectory() as folder:
            failures += endure(project, Path(folder), flags.kills)
    sys.exit(f"{failures} failed" if failures else 0)


def endure(project: str, folder: Path, kills: int) -> int:
    """Print a line for each trial; how many of them failed."""
    began = time.perf_counter()
    whole = finish(start(project, folder / "out", folder / "data"))
    seconds = time.perf_counter() - began
    trials = {
        "kills": lambda: kill_and_resume(project, folder, whole, kills, seconds),
        "together": lambda: run_together(project, folder / "together", whole),
        "read-only": lambda: run_read_only(project, folder / "read_only", whole),
        "full disk": lambda: fill_the_disk(project, folder / "disk", whole),
    }
    failures = 0
    for name, trial in trials.items():
        try:
            outcome = trial()
        except (AssertionError, OSError, RuntimeError) as error:
            outcome, failures = f"FAILED: {error}", failures + 1
        print(f"{project:28} {name:10} {outcome}", flush=True)
    return failures


# --- a run ------------------------------------------------------------------------------------


def command(project: str, *flags: str | Path, root: Path = ROOT) -> list[str]:
    return [sys.executable, str(root / project / "train.py"), *map(str, flags)]


def begin(command: list[str]) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tempfile.gettempdir())


def start(project: str, out: Path, data: Path, root: Path = ROOT) -> subprocess.Popen:
    tiny = importlib.import_module(f"test_{project}").TINY
    return begin(command(project, *tiny, "--out_dir", out, "--data_dir", data, root=root))


def finish(process: subprocess.Popen) -> dict:
    """The run's metrics without what a clock decides; AssertionError if it failed."""
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-300:]
    report = json.loads((Path(output.splitlines()[-1]) / "metrics.json").read_text())
    return without_clocks(report["headline"] | report["metrics"])


def without_clocks(numbers: dict) -> dict:
    kept = {key: value for key, value in numbers.items() if not CLOCK.search(key)}
    return {
        key: without_clocks(value) if isinstance(value, dict) else value
        for key, value in kept.items()
    }


def same(numbers: dict, whole: dict) -> None:
    different = [key for key in whole if numbers.get(key) != whole[key]]
    assert not different, f"{different} differ from those of an unbroken run"


# --- trials -----------------------------------------------------------------------------------


def kill_and_resume(project: str, folder: Path, whole: dict, kills: int, seconds: float) -> str:
    early = 0
    for number in range(kills):
        out = folder / f"kill-{number}"
        process = start(project, out, folder / "data")
        time.sleep(random.Random(number).uniform(0.2, 1) * seconds)
        process.kill()
        process.communicate()
        runs = list(out.glob("*/history.pt"))
        if not runs:  # nothing was begun that could be resumed
            early += 1
            continue
        if torch.load(runs[0], weights_only=True)["finished"]:
            continue
        same(finish(begin(command(project, "--resume", runs[0].parent))), whole)
    return f"{kills - early} killed and resumed, {early} killed before they had a folder"


def run_together(project: str, folder: Path, whole: dict) -> str:
    for process in [start(project, folder / "out", folder / "data") for _ in range(2)]:
        same(finish(process), whole)
    return "the same metrics twice"


def run_read_only(project: str, folder: Path, whole: dict) -> str:
    with small_disk(folder / "checkout", megabytes=64) as disk:
        leave = shutil.ignore_patterns("data", "results", "__pycache__")
        shutil.copytree(ROOT / project, disk / project, ignore=leave)
        mount("-o", "remount,ro", disk)
        same(finish(start(project, folder / "out", folder / "data", root=disk)), whole)
    return "the same metrics"


def fill_the_disk(project: str, folder: Path, whole: dict) -> str:
    """Room for half of what a whole run writes, then for all of it."""
    finish(start(project, folder / "room", folder / "data"))
    files = [path for path in (folder / "room").rglob("*") if path.is_file()]
    pages = sum(-(-path.stat().st_size // 4096) for path in files)
    with small_disk(folder / "out", kilobytes=2 * pages) as disk:
        process = start(project, disk, folder / "data")
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 1, f"status {process.returncode}: {errors[-300:]}"
        last = errors.splitlines()[-1]
        assert last.startswith("error: ") and "Traceback" not in errors, errors[-300:]
        (run,) = disk.iterdir()
        if (run / "history.pt").exists():
            torch.load(run / "history.pt", weights_only=True)
        mount("-o", "remount,size=1g", disk)
        same(finish(begin(command(project, "--resume", run))), whole)
    return f"'{last}', then resumed to the same metrics"


@contextmanager
def small_disk(folder: Path, *, megabytes: int = 0, kilobytes: int = 0) -> Iterator[Path]:
    """A file system of that size, mounted at `folder`; RuntimeError where that is not allowed."""
    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={kilobytes + 1024 * megabytes}k", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def mount(*words: str | Path) -> None:
    answer = subprocess.run(["mount", *words], capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"mount: {answer.stderr.strip()} (as root?)")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # two runs at the same time would wait for one another
    main()
