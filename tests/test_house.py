"""What must hold in all projects. A project is a folder with a config.yaml: none is named here.

A project's own tests give, as `TINY`, the flags of a run that takes seconds.
"""

import ast
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from unet_transfer import run as run_py
from unet_transfer.run import read_texts, start_run

ROOT = Path(__file__).parent.parent
PROJECTS = sorted(path.parent.name for path in ROOT.glob("*/config.yaml"))
ROOMS = ("data", "model", "plots", "run")
ROOM_FILES = [f"{room}.py" for room in (*ROOMS, "train")]
FILES = ("README.md", "config.yaml", *ROOM_FILES, "results/reference/metrics.json")
COMMON_KEYS = ["dataset", "data_dir", "out_dir", "device", "seed"]
PARTS = ["Method", "Results", "Run", "What is written", "What was measured"]
TYPE_SIZES = (
    'plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})'
)
every_project = pytest.mark.parametrize("project", PROJECTS)


def start(*command: str | Path, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Status, output and errors."""
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def timed(*command: str | Path, cwd: Path) -> tuple[float, tuple[int, str, str]]:
    """Processor seconds, and what finish returns. Another process counts only once awaited."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    outcome = finish(start(*command, cwd=cwd))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, outcome


def tiny_flags(project: str) -> list[str]:
    return importlib.import_module(f"test_{project}").TINY


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@every_project
def test_the_files_of_the_plan_are_there(project):
    missing = [name for name in FILES if not (ROOT / project / name).is_file()]
    assert not missing
    assert (ROOT / "tests" / f"test_{project}.py").is_file()


@every_project
def test_who_may_know_whom(project):
    for room in ROOMS:
        known = imported(ROOT / project / f"{room}.py")
        assert not known & {*ROOMS, "train", *PROJECTS}, room
    assert not imported(ROOT / project / "train.py") & set(PROJECTS)
    for room in ("data", "model"):
        assert "yaml" not in imported(ROOT / project / f"{room}.py")
        assert "print(" not in (ROOT / project / f"{room}.py").read_text()


@every_project
def test_run_py_is_the_same_to_the_letter(project):
    first = (ROOT / PROJECTS[0] / "run.py").read_bytes()
    assert (ROOT / project / "run.py").read_bytes() == first


@every_project
def test_every_key_has_a_comment_and_a_field(project):
    lines = (ROOT / project / "config.yaml").read_text().splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    keys = [re.fullmatch(r"(\w+):.*\S.* # \S.*", line) for line in lines]
    assert all(keys), [line for line, key in zip(lines, keys, strict=True) if not key]
    tree = ast.parse((ROOT / project / "train.py").read_text())
    (config,) = [node for node in tree.body if getattr(node, "name", "") == "Config"]
    fields = [node.target.id for node in config.body if isinstance(node, ast.AnnAssign)]
    assert [key[1] for key in keys] == fields
    assert fields[: len(COMMON_KEYS)] == COMMON_KEYS


@every_project
def test_train_py_tells_its_story_in_one_order(project):
    """Settings, main, its parts, and last what the run reports."""
    text = (ROOT / project / "train.py").read_text()
    tree = ast.parse(text)
    names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    functions = [name for name in names if not name[0].isupper()]
    assert names[0] == "Config"
    assert functions[0] == "main"
    assert functions.index("headline") < functions.index("draw")
    *_, report = text.split("\n# --- ")
    assert report.startswith("report -")
    assert "def headline(" in report and "def draw(" in report
    assert all(len(line) == 96 for line in text.splitlines() if line.startswith("# ---"))


@every_project
def test_readmes_and_plots_have_one_look(project):
    readme = (ROOT / project / "README.md").read_text()
    assert re.findall(r"^## (.*)$", readme, re.MULTILINE) == PARTS
    assert TYPE_SIZES in (ROOT / project / "plots.py").read_text().splitlines()


@every_project
def test_a_lone_copy_runs_in_an_empty_directory(project, tmp_path):
    leave = shutil.ignore_patterns("data", "results", "__pycache__")
    shutil.copytree(ROOT / project, tmp_path / project, ignore=leave)
    run = start(f"{project}/train.py", *tiny_flags(project), "--out_dir", "out", cwd=tmp_path)
    seconds, (status, output, errors) = timed(f"{project}/train.py", "--help", cwd=tmp_path)
    assert status == 0, errors
    if seconds > 5:  # a slow machine, or slow imports?
        needed, _ = timed("-c", "import torch, matplotlib.pyplot, sklearn.base", cwd=tmp_path)
        assert seconds < 1.4 * needed
    for key in read_texts(ROOT / project / "config.yaml", AnyKey()):
        assert f"--{key} " in output

    status, output, errors = finish(run)
    assert status == 0, errors
    folder = tmp_path / output.splitlines()[-1]
    report = strict_json(folder / "metrics.json")
    keys = ["project", "dataset", "device", "seed", "seconds", "versions", "commit"]
    assert list(report) == [*keys, "headline", "metrics"]
    assert report["project"] == project
    assert {"config.yaml", "history.csv", "history.pt"} < {path.name for path in folder.iterdir()}
    assert list(folder.glob("*.png"))
    assert not list(folder.glob("*.tmp"))


class AnyKey(dict):
    """Kinds for read_texts that take every key."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> type:
        return str


def strict_json(path: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{path}: {name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# --- the numbers in the READMEs are those of the recorded runs --------------------------------


def table_rows(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def same_number(text: str, value: float) -> bool:
    """Whether `text` is `value`, rounded to the digits that `text` shows."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= 0.5000001 * 10**-digits


@every_project
def test_the_readme_shows_the_recorded_numbers(project):
    rows = table_rows((ROOT / project / "README.md").read_text())
    (header,) = [row for row in rows if row[0] == "headline"]
    folders = [re.search(r"\((results/reference[\w-]*)/?\)", cell)[1] for cell in header[1:]]
    recorded = sorted((ROOT / project / "results").glob("reference*"))
    assert sorted(folders) == [f"results/{path.name}" for path in recorded]
    for place, folder in enumerate(folders, start=1):
        headline = strict_json(ROOT / project / folder / "metrics.json")["headline"]
        shown = {row[0].strip("`"): row[place] for row in rows if row[0].startswith("`")}
        for name, value in headline.items():
            assert same_number(shown[name], value), f"{folder}: {name} is {value}"


@every_project
def test_the_front_door_shows_the_recorded_numbers(project):
    front = (ROOT / "README.md").read_text()
    (row,) = [" ".join(row) for row in table_rows(front) if f"({project})" in row[0]]
    report = strict_json(ROOT / project / "results/reference/metrics.json")
    numbers = report["headline"] | {"minutes": report["seconds"] / 60}
    claims = re.findall(r"`(\w+)` ([\d.]+)", row)
    assert claims
    for name, text in claims:
        assert same_number(text, numbers[name]), f"{name} is {numbers[name]}"
    (picture,) = re.findall(rf"!\[.+?\]\(({project}/results/reference/\w+\.png)\)", front)
    assert (ROOT / picture).is_file()


@every_project
def test_what_is_recorded_is_small_and_whole(project):
    for folder in (ROOT / project / "results").glob("reference*"):
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert {"config.yaml", "metrics.json", "history.csv"} <= sizes.keys()
        assert sum(sizes.values()) < 2**20
        assert not [name for name in sizes if name.endswith((".pt", ".safetensors"))]


# --- mistakes in the settings -----------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    dataset: Literal["auto", "digits"]
    out_dir: Path
    device: str
    seed: int
    epochs: int
    lr: float
    amp: bool
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs: expected more than 0, found {self.epochs}")


GOOD = """\
dataset: auto
out_dir: runs
device: cpu
seed: 1
epochs: 2
lr: 1e-3
amp: true
widths: [8, 16]
"""


def settings(text: str, folder: Path, *flags: str) -> Settings:
    (folder / "mine.yaml").write_text(text)
    argv = ["--config", str(folder / "mine.yaml"), "--out_dir", str(folder / "runs"), *flags]
    return start_run(Settings, "", argv)[0]


def test_settings_come_from_the_file_and_flags_win(tmp_path):
    config = settings(GOOD, tmp_path, "--widths", "4", "--lr=2e-4")
    assert (config.lr, config.amp, config.epochs, config.widths) == (2e-4, True, 2, (4,))
    config = settings(GOOD, tmp_path)
    assert (config.lr, config.widths) == (1e-3, (8, 16))


def one_line(capsys, code: int) -> str:
    errors = capsys.readouterr().err
    assert code == 2
    assert len(errors.splitlines()) == 1, errors
    return errors


@pytest.mark.parametrize(
    ("good", "bad", "complaint"),
    [
        ("epochs:", "epohcs:", "mine.yaml: unknown key 'epohcs', did you mean 'epochs'?"),
        ("epochs:", "colour:", "mine.yaml: unknown key 'colour'"),
        ("seed: 1\n", "", "mine.yaml: missing key 'seed'"),
        ("seed: 1\n", "seed: 1\nseed: 2\n", "mine.yaml: key 'seed' stands twice"),
        ("epochs: 2", "epochs: many", "mine.yaml: epochs: expected int, found 'many'"),
        ("epochs: 2", "epochs: 1e-3", "mine.yaml: epochs: expected int, found '1e-3'"),
        ("epochs: 2", "epochs: 0", "mine.yaml: epochs: expected more than 0, found 0"),
        ("epochs: 2", "epochs: -3", "mine.yaml: epochs: expected more than 0, found -3"),
        ("epochs: 2", "epochs: {a: 1}", "mine.yaml: epochs: expected one value or a list"),
        ("epochs: 2", "epochs: [1, 2]", "mine.yaml: epochs: expected int, found '1,2'"),
        ("epochs: 2", "epochs:", "mine.yaml: epochs: expected int, found ''"),
        ("widths: [8, 16]", "widths: [8, x]", "mine.yaml: widths: expected int, found 'x'"),
        ("lr: 1e-3", "lr: fast", "mine.yaml: lr: expected float, found 'fast'"),
        ("lr: 1e-3", "lr: .nan", "mine.yaml: lr: expected"),
        ("lr: 1e-3", "lr: inf", "mine.yaml: lr: expected a finite number, found 'inf'"),
        ("amp: true", "amp: on", "mine.yaml: amp: expected true | false, found 'on'"),
        ("dataset: auto", "dataset: cats", "dataset: expected auto | digits, found 'cats'"),
        ("device: cpu", "device: cuda:99", "device: 'cuda:99' cannot be used here"),
        ("device: cpu", "device: toaster", "device: expected auto | cpu | cuda | cuda:N"),
        (GOOD, "", "mine.yaml: expected lines of the form 'key: value'"),
        (GOOD, "- 1\n- 2\n", "mine.yaml: expected lines of the form 'key: value'"),
        (GOOD, "{", "mine.yaml: not YAML"),
        (GOOD, "a: 1\n b: 2\n", "mine.yaml: not YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named_in_one_line(tmp_path, capsys, good, bad, complaint):
    with pytest.raises(SystemExit) as end:
        settings(GOOD.replace(good, bad), tmp_path)
    assert complaint in one_line(capsys, end.value.code)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--epochs", "0"], "--epochs: expected more than 0, found 0"),
        (["--lr", "x"], "--lr: expected float, found 'x'"),
        (["--epohcs", "5"], "unknown flag '--epohcs', did you mean '--epochs'?"),
        (["--epohcs=5"], "unknown flag '--epohcs', did you mean '--epochs'?"),
        (["5"], "unknown flag '5'"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "nowhere"], "only --device may differ"),
        (["--out_dir", "/dev/null/runs"], "/dev/null"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_in_one_line(tmp_path, capsys, flags, complaint):
    with pytest.raises(SystemExit) as end:
        settings(GOOD, tmp_path, *flags)
    assert complaint in one_line(capsys, end.value.code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        settings(GOOD, tmp_path, "--device", "cuda")
    assert "device: 'cuda' cannot be used here" in one_line(capsys, end.value.code)


@every_project
def test_every_project_refuses_a_wrong_setting_in_one_line(project, tmp_path):
    text = (ROOT / project / "config.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text + "seed: 1\n")
    twice = start(ROOT / project / "train.py", "--config", "mine.yaml", cwd=tmp_path)
    flags = ["--dataset", "no such set", "--out_dir", "out"]
    unknown = start(ROOT / project / "train.py", *flags, cwd=tmp_path)
    wanted = "train.py: error: mine.yaml: key 'seed' stands twice\n"
    assert finish(twice) == (2, "", wanted)
    status, _, errors = finish(unknown)
    assert status == 2
    assert re.fullmatch(r"train.py: error: --dataset: expected .+\n", errors)
    assert os.listdir(tmp_path) == ["mine.yaml"]


# --- resume -----------------------------------------------------------------------------------


def test_a_resumed_run_counts_the_seconds_of_its_earlier_process(tmp_path, monkeypatch):
    began = time.perf_counter()
    monkeypatch.setattr(run_py, "STARTED", began - 100)  # the process that is killed
    run_py.save_checkpoint(tmp_path, "train", {}, [{"stage": "train", "epoch": 1}])
    monkeypatch.setattr(run_py, "STARTED", began)  # the one that goes on
    for _ in range(2):  # as each stage asks for it
        assert run_py.load_checkpoint(tmp_path, "train", {}) == [{"stage": "train", "epoch": 1}]
    assert 100 <= time.perf_counter() - run_py.STARTED < 105
