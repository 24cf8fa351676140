"""run.py, the same in all projects: settings, a run's folder, epochs, checkpoints, ends."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import torch
from projects import ROOT
from torch import nn

from unet_transfer import run as run_py
from unet_transfer.run import (
    Count,
    Decay,
    Epochs,
    Pixels,
    Rate,
    RunError,
    Seed,
    Width,
    epochs,
    fingerprint,
    finish_run,
    open_run,
    read_rows,
    run_main,
    start_run,
    sum_losses,
    try_plot,
)


@dataclass(frozen=True)
class Settings:
    dataset: Literal["digits", "folder"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    size: tuple[Pixels, Pixels]
    classes: Annotated[int, ">= 2", "<= 10"]
    count: Count
    epochs: Epochs
    lr: Rate
    decay: Decay
    share: Annotated[float, "< 1"]
    amp: bool
    widths: tuple[Width, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.classes > self.count:
            raise ValueError(f"classes: expected at most count, {self.count}")


GOOD = """\
dataset: digits   # of digits
data_dir: data
out_dir: runs
device: cpu
seed: 1
size: [8, 16]
classes: 3
count: 100
epochs: 2
lr: 1e-3
decay: 0
share: 0.5
amp: true
widths: [8, 16]
names: [a, b]
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch) -> Path:
    """A project's folder that holds config.yaml; no state of an earlier test."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.yaml").write_text(GOOD)
    monkeypatch.setattr(run_py, "PROJECT", folder)
    monkeypatch.setattr(run_py, "HEADER", {})
    monkeypatch.setattr(run_py, "LOCKS", {})
    monkeypatch.setattr(run_py.signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return folder


def settings(*flags: object) -> Settings:
    return start_run(Settings, "", list(map(str, flags)))[0]


def complaint(capsys, *flags: object) -> str:
    with pytest.raises(SystemExit) as end:
        settings(*flags)
    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert len(errors.splitlines()) == 1, errors
    assert len(errors) < 600
    return errors


# --- settings ---------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_config_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 1e-2\nepochs: 7\n")
    config = settings("--config", "mine.yaml", "--epochs", 9, "--widths=4")
    assert (config.lr, config.epochs, config.widths, config.count) == (1e-2, 9, (4,), 100)


def test_paths_of_a_file_are_seen_from_the_project_and_those_of_flags_from_here(project, tmp_path):
    (tmp_path / "mine.yaml").write_text("data_dir: sub/data\n")
    assert settings("--config", "mine.yaml").data_dir == project / "sub/data"
    assert settings("--data_dir", "sub").data_dir == Path("sub")
    assert settings("--data_dir", "~/sub").data_dir == Path.home() / "sub"
    (tmp_path / "mine.yaml").write_text("data_dir: ~/sub\n")
    assert settings("--config", "mine.yaml").data_dir == Path.home() / "sub"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("epohcs: 2", "unknown key 'epohcs', did you mean 'epochs'?"),
        ("colour: 2", "unknown key 'colour'"),
        ("seed: 1\nseed: 2", "key 'seed' occurs twice"),
        ("epochs: many", "epochs: expected int, found 'many'"),
        ("epochs: 1e-3", "epochs: expected int, found '1e-3'"),
        ("epochs: 0", "epochs: expected at least 1, found 0"),
        ("epochs: -3", "epochs: expected at least 1, found -3"),
        ("epochs: 1000000000", "epochs: expected at most 100000, found 1000000000"),
        ("epochs: {a: 1}", "epochs: expected one value or a list"),
        ("epochs: [1, 2]", "epochs: expected int, found '1,2'"),
        ("epochs:", "epochs: expected int, found ''"),
        ("classes: 1", "classes: expected at least 2, found 1"),
        ("classes: 11", "classes: expected at most 10, found 11"),
        ("count: 2", "classes: expected at most count, 2"),
        ("count: 1000000000000", "count: expected at most 10000000"),
        ("size: [8]", "size: expected 2 values, found '8'"),
        ("size: [8, 8, 8]", "size: expected 2 values, found '8,8,8'"),
        ("size: [8, 0]", "size: expected at least 1, found 0"),
        ("seed: -1", "seed: expected at least 0, found -1"),
        ("seed: 1234567890123456789012345678901", "seed: expected at most 4294967295, found"),
        ("widths: [8, x]", "widths: expected int, found 'x'"),
        ("widths: []", "widths: expected int, found ''"),
        ("lr: fast", "lr: expected float, found 'fast'"),
        ("lr: .nan", "lr: expected"),
        ("lr: nan", "lr: expected a finite number, found 'nan'"),
        ("lr: inf", "lr: expected a finite number, found 'inf'"),
        ("lr: 0", "lr: expected more than 0, found 0.0"),
        ("lr: 1e30", "lr: expected at most 100, found 1e+30"),
        ("decay: -0.1", "decay: expected at least 0, found -0.1"),
        ("share: 1", "share: expected less than 1, found 1.0"),
        ("share: 0", "share: expected more than 0, found 0.0"),
        ("amp: on", "amp: expected true | false, found 'on'"),
        ("dataset: cats", "dataset: expected digits | folder, found 'cats'"),
        ("dataset: auto", "dataset: expected digits | folder, found 'auto'"),
        ("device: cuda:99", "device: 'cuda:99' cannot be used here"),
        ("device: toaster", "device: expected auto | cpu | cuda | cuda:N"),
        ("", "expected lines of the form 'key: value'"),
        ("- 1\n- 2", "expected lines of the form 'key: value'"),
        ("{", "not YAML"),
        ("a: 1\n b: 2", "not YAML"),
        ("a: " + 3000 * "[", "not YAML"),
        (f"lr: {'9' * 10**6}x", "lr: expected float, found '999"),
    ],
)
def test_a_mistake_in_the_file_is_named_in_one_line(tmp_path, capsys, line, expected):
    (tmp_path / "mine.yaml").write_text(line + "\n")
    assert f"error: mine.yaml: {expected}" in complaint(capsys, "--config", "mine.yaml")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--epochs", "0"], "error: --epochs: expected at least 1, found 0"),
        (["--lr", "x"], "error: --lr: expected float, found 'x'"),
        (["--epohcs", "5"], "unknown flag '--epohcs', did you mean '--epochs'?"),
        (["--epohcs=5"], "unknown flag '--epohcs', did you mean '--epochs'?"),
        (["5"], "unknown flag '5'"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--config", "nowhere.yaml"], "error: nowhere.yaml: No such file or directory"),
        (["--resume", "nowhere", "--lr", "1"], "only --device may differ"),
        (["--resume", "nowhere", "--config", "mine.yaml"], "only --device may differ"),
        (["--resume", "nowhere"], "nowhere holds no history.pt"),
        (["--out_dir", "/dev/null/runs"], "/dev/null"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_in_one_line(capsys, flags, expected):
    assert expected in complaint(capsys, *flags)


def test_a_mistake_in_config_yaml_itself_is_named(project, capsys):
    (project / "config.yaml").write_text(GOOD.replace("seed: 1\n", ""))
    assert "config.yaml: missing key 'seed'" in complaint(capsys)
    (project / "config.yaml").write_text(GOOD.replace("lr: 1e-3", "lr: slow"))
    assert "config.yaml: lr: expected float" in complaint(capsys, "--epochs", 3)


def test_text_that_is_not_utf8_is_named_and_a_bom_is_no_part_of_a_key(project, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_bytes(b"lr: 1e-2  # f\xfcr\n")
    assert "mine.yaml: not YAML in UTF-8" in complaint(capsys, "--config", "mine.yaml")
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbflr: 1e-2\n")
    assert settings("--config", "mine.yaml").lr == 1e-2
    (project / "config.yaml").write_bytes(GOOD.replace("digits\n", "d\xfc\n").encode("latin-1"))
    with pytest.raises(SystemExit) as end:
        settings("--help")
    assert end.value.code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_one_line(capsys):
    assert "device: 'cuda' cannot be used here" in complaint(capsys, "--device", "cuda")


# --- a run's folder ---------------------------------------------------------------------------


def begin(*flags: object, data: object = (1, 2)) -> tuple[Settings, Path]:
    config, run, _ = start_run(Settings, "", list(map(str, flags)))
    open_run(run, config, "made", data)
    return config, run


def finish(config: Settings, run: Path, **numbers: float) -> dict:
    finish_run(run, config, dataset="made", headline=numbers, metrics={"all": [numbers]}, use="x")
    return json.loads((run / "metrics.json").read_text())


def test_the_folder_is_made_when_the_data_are_there_and_holds_the_resolved_settings(project):
    config, run, _ = start_run(Settings, "", [])
    assert not run.exists()
    open_run(run, config, "made", torch.zeros(3))
    kinds = run_py.get_type_hints(Settings, include_extras=True)
    assert run_py.read_config(Settings, kinds, run / "config.yaml", {}) == config


def test_list_shows_what_differs_and_the_headline_of_each_run(project, capsys):
    for rate, loss in (("0.1", 0.5), ("0.25", 0.125)):
        config, run = begin("--lr", rate)
        finish(config, run, loss=loss)
    begin("--lr", "0.75")  # has not ended
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        settings("--list")
    assert end.value.code is None
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert table[0] == ["run", "lr", "loss", "seconds"]
    assert [row[1:3] for row in table[1:]] == [["0.1", "0.5"], ["0.25", "0.125"], ["0.75", "-"]]
    with pytest.raises(SystemExit):
        settings("--list", "--out_dir", project / "nothing")
    assert "no runs" in capsys.readouterr().out


def test_folders_of_one_moment_have_different_names(monkeypatch):
    frozen = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda _: "still-000000"))
    monkeypatch.setattr(run_py, "datetime", frozen)
    names = [begin()[1].name for _ in range(3)]
    assert names == ["still-000000", "still-000000_n2", "still-000000_n3"]


def test_resume_refuses_what_it_would_mix(project, capsys, monkeypatch):
    _, run = begin()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("lr: 0.001", "lr: 0.002"))
    assert "config.yaml was changed after the run began" in complaint(capsys, "--resume", run)
    (run / "config.yaml").write_text(text)
    with pytest.raises(RunError, match="began with other data: made"):
        begin("--resume", run, data=(1, 3))
    begin("--resume", run)

    other = project.parent / "other"
    project.rename(other)
    monkeypatch.setattr(run_py, "PROJECT", other)
    run = other / run.relative_to(project)
    assert "is not a run of other" in complaint(capsys, "--resume", run)


def test_a_finished_run_is_not_resumed_even_without_its_metrics(capsys):
    config, run = begin()
    finish(config, run, accuracy=0.5)
    (run / "metrics.json").unlink()
    assert f"{run} is finished" in complaint(capsys, "--resume", run)


def test_a_damaged_checkpoint_is_named(capsys):
    _, run = begin()
    (run / "history.pt").write_bytes(b"")
    told = complaint(capsys, "--resume", run)
    assert "history.pt is damaged, or of no run; begin a new one" in told
    torch.save([1, 2], run / "history.pt")
    assert "is not a run of project" in complaint(capsys, "--resume", run)


def test_two_processes_do_not_work_in_one_folder(capsys, monkeypatch):
    _, run = begin()
    monkeypatch.setattr(run_py, "LOCKS", {})  # as another process sees it
    assert "another process is working in this folder" in complaint(capsys, "--resume", run)


def test_a_fingerprint_depends_on_values_shapes_types_and_order():
    x = torch.arange(6.0)
    others = [x + 1, x.view(2, 3), x.double(), x.tolist(), "x", None, (x, x), {"a": x}, x[:0]]
    prints = [fingerprint(other) for other in [x, *others]]
    assert len(set(prints)) == len(prints)
    assert fingerprint(x) == fingerprint(x.numpy()) == prints[0]
    assert fingerprint(x.view(2, 3).T) == fingerprint(x.view(2, 3).T.contiguous())
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])


def test_metrics_json_never_holds_nan_and_the_last_line_is_the_folder(capsys):
    config, run = begin()
    report = finish(config, run, accuracy=0.25, auc=math.nan)
    assert report["headline"] == {"accuracy": 0.25, "auc": None}
    assert report["metrics"]["all"][0]["auc"] is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [f"{'accuracy':>32}  0.25", f"{'auc':>32}  -", "use it: x", str(run)]


def test_a_full_disk_leaves_the_old_file_whole_and_is_named(tmp_path, monkeypatch):
    run_py.replace_file(tmp_path / "a", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="a could not be written: No space left"):
        run_py.replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "old"


def test_a_picture_that_fails_costs_nothing_else(capsys):
    def plot_nothing(_: int) -> None:
        raise ValueError("no data")

    try_plot(plot_nothing, 1)
    assert "warning: no picture from plot_nothing: ValueError: no data" in capsys.readouterr().err


def test_characters_that_the_font_lacks_are_no_warning(recwarn):
    try_plot(lambda: warnings.warn("Glyph 137 missing from font(s)", stacklevel=1))
    assert not recwarn


# --- epochs -----------------------------------------------------------------------------------


def fit(run: Path, losses: list[float], stop: int = 99, **options: object) -> nn.Module:
    """A network whose weight is the number of the epoch; its validation losses are given."""
    model = nn.Linear(1, 1)
    best = {"best": ("val_loss", min)} | options
    for row in epochs(run, "train", {"model": model}, len(losses), 0, **best):
        if row["epoch"] > stop:
            raise KeyboardInterrupt
        nn.init.constant_(model.weight, row["epoch"])
        row["draw"] = float(torch.rand(()))
        row["val_loss"] = losses[row["epoch"] - 1]
    return model


def test_the_best_epochs_weights_are_left_of_equals_the_last():
    assert fit(begin()[1], [3, 1, 2, 1, 5]).weight == 4
    assert fit(begin()[1], [3, 1, 2, 1, 5], best=("val_loss", max)).weight == 5
    assert fit(begin()[1], [3, 1, 2, 1, 5], best=None).weight == 5


def test_patience_ends_a_stage():
    run = begin()[1]
    assert fit(run, [3, 1, 2, 2, 0, 0], patience=2).weight == 2
    assert [row["epoch"] for row in read_rows(run, "train")] == [1, 2, 3, 4]
    run = begin()[1]
    fit(run, [3, 1, 2, 1, 0, 0], patience=3)  # an equal is no better one
    assert len(read_rows(run, "train")) == 6


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_resumed_stage_draws_and_ends_as_an_unbroken_one(stop):
    losses = [3.0, 1.0, 2.0, 4.0]
    whole, broken = begin()[1], begin()[1]
    fit(whole, losses)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, losses, stop=stop)
    assert fit(broken, losses).weight == 2
    numbers = [
        [(row["epoch"], row["draw"], row["val_loss"]) for row in read_rows(run, "train")]
        for run in (whole, broken)
    ]
    assert numbers[0] == numbers[1]
    assert len({row["draw"] for row in read_rows(whole, "train")}) == 4


def test_checkpoints_by_time_change_no_number():
    losses = [3.0, 1.0, 2.0, 4.0]
    whole, broken = begin()[1], begin()[1]
    fit(whole, losses)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, losses, stop=3, every=1000.0)
    assert read_rows(broken, "train") == []
    assert fit(broken, losses, every=1000.0).weight == 2
    draws = [[row["draw"] for row in read_rows(run, "train")] for run in (whole, broken)]
    assert draws[0] == draws[1]


def test_a_stage_that_another_has_followed_is_not_trained_again():
    run = begin()[1]
    fit(run, [1.0, 2.0])
    other = nn.Linear(1, 1)
    for row in epochs(run, "second", {"model": other}, 1, 0):
        row["x"] = 1
    assert fit(run, [1.0, 2.0], stop=0).weight == 1
    assert len(read_rows(run, "train")) == 2
    text = (run / "history.csv").read_text()
    assert text.splitlines()[0] == "stage,epoch,seconds,draw,val_loss,x"


@pytest.mark.parametrize("name", ["val_loss", "train_loss"])
def test_a_number_that_is_not_finite_ends_the_run_and_is_not_recorded(name):
    run = begin()[1]
    with pytest.raises(FloatingPointError, match=f"train epoch 2: {name} is not finite"):
        for row in epochs(run, "train", {"model": nn.Linear(1, 1)}, 3, 0, best=("val_loss", min)):
            row |= {"train_loss": 1.0, "val_loss": 1.0}
            row[name] = math.nan if row["epoch"] == 2 else 1.0
    assert [row["epoch"] for row in read_rows(run, "train")] == [1]


def test_losses_are_summed_exactly_and_the_first_step_that_is_not_finite_is_named():
    losses = [torch.tensor(1e8), torch.tensor(1.0), torch.tensor(-1e8)]
    assert float(sum_losses(losses, "here")) == 1.0
    pairs = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, math.inf])]
    assert sum_losses(pairs[:1], "here").tolist() == [1, 2]
    with pytest.raises(FloatingPointError, match="here: the loss is not finite at step 2"):
        sum_losses(pairs, "here")


def test_a_resumed_run_counts_the_seconds_of_its_earlier_process(tmp_path, monkeypatch):
    began = time.perf_counter()
    monkeypatch.setattr(run_py, "STARTED", began - 100)  # the process that is killed
    run_py.save_checkpoint(tmp_path, "train", {}, [{"stage": "train", "epoch": 1}])
    monkeypatch.setattr(run_py, "STARTED", began)  # the one that goes on
    for _ in range(2):  # as each stage asks for it
        assert run_py.load_checkpoint(tmp_path, "train", {}) == [{"stage": "train", "epoch": 1}]
    assert 100 <= time.perf_counter() - run_py.STARTED < 105


# --- how a program ends -----------------------------------------------------------------------


def ended(error: BaseException) -> object:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main, KeyError)
    return end.value.code


def test_what_a_user_can_mend_ends_in_one_line():
    assert ended(KeyError("a\nb")) == r"error: 'a\nb'"
    assert ended(FloatingPointError("no loss")) == "error: no loss"
    assert ended(OSError("disk\nfull")) == "error: disk full"
    memory = "error: out of memory; make smaller: size, count, widths"
    assert ended(MemoryError("7 TiB")).startswith(memory)
    assert ended(RuntimeError("can't allocate memory: 7 TiB")).startswith(memory)


def test_predictions_that_were_refused_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_py, "RUN", None)
    run_py.save(tmp_path / "model.pt", {"project": run_py.PROJECT.name})

    def main() -> None:
        *_, folder, _ = run_py.start_predict(argparse.ArgumentParser(), [str(tmp_path)])
        if kept:
            (folder / "predictions.csv").touch()
        raise OSError("a broken picture")

    for kept in (False, True):
        with pytest.raises(SystemExit, match="error: a broken picture"):
            run_main(main)
        assert len(list((tmp_path / "predictions").iterdir())) == kept


def test_a_fault_of_the_program_keeps_its_traceback():
    def main() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_main(main)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> list[str]:
    """The command of a run that needs no data: run.py alone, with three quick epochs."""
    folder = tmp_path_factory.mktemp("small") / "project"
    folder.mkdir()
    (folder / "run.py").write_bytes((ROOT / "unet_transfer" / "run.py").read_bytes())
    (folder / "config.yaml").write_text("out_dir: results  # a\ndevice: cpu  # b\nseed: 0  # c\n")
    (folder / "train.py").write_text(
        "import sys, time\n"
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "from run import *\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    out_dir: Path\n"
        "    device: str\n"
        "    seed: Seed\n"
        "def main():\n"
        "    config, run, device = start_run(Config, '')\n"
        "    open_run(run, config, 'none')\n"
        "    for row in epochs(run, 'train', {'model': torch.nn.Linear(1, 1)}, 3, 0):\n"
        "        time.sleep(1)\n"
        "    finish_run(run, config, dataset='none', headline={}, metrics={}, use='x')\n"
        "if __name__ == '__main__':\n"
        "    run_main(main)\n"
    )
    return [sys.executable, str(folder / "train.py")]


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on_and_a_closed_pipe_quietly(
    small_run, tmp_path
):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    flags = ["--out_dir", "out put"]
    stopped, deaf = (subprocess.Popen([*small_run, *flags], **pipes) for _ in range(2))
    deaf.stdout.readline()
    deaf.stdout.close()
    for line in stopped.stdout:
        if "epoch 1" in line:
            break
    stopped.send_signal(2)
    errors = stopped.stderr.read()
    assert stopped.wait(60) == 130
    assert "Traceback" not in errors
    command = errors.strip().removeprefix("interrupted; to go on: python ")
    again = subprocess.run(
        f"{sys.executable} {command}", shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "out put" in again.stdout.splitlines()[-1]
    assert deaf.wait(60) == 141
    assert deaf.stderr.read() == ""


@pytest.mark.parametrize("program", ["train.py", "predict.py"])
def test_ctrl_c_while_torch_is_imported_ends_in_one_line(program, tmp_path):
    text = "import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(text)  # is found before the real one
    ended = subprocess.run(
        [sys.executable, str(ROOT / "bert_mlm" / program)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr.strip()) == (130, "interrupted")


def test_a_run_killed_outright_goes_on(small_run, tmp_path):
    process = subprocess.Popen(
        [*small_run, "--out_dir", "out"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "epoch 1" in line:
            break
    process.kill()
    process.wait()
    (folder,) = (tmp_path / "out").iterdir()
    command = [*small_run, "--resume", str(folder)]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len((folder / "history.csv").read_text().splitlines()) == 4
    assert not list(tmp_path.rglob("*.tmp"))
