"""What torchrun's processes must give: the numbers of one process, and whole runs after a death."""

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from in_processes import BATCH_NORM, group_norm
from projects import ROOT, load_project, train
from torch import nn

from unet_transfer import run as run_py

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FLAGS = {  # with uneven last batches, and a process that has nothing of one
    "bert_mlm": [
        "--most_tweets", "80", "--pretrain_characters", "20000", "--pretrain_epochs", "1",
        "--vocabulary", "400", "--layers", "1", "--width", "16", "--epochs", "2",
        "--batch_size", "17", "--dropout", "0",
    ],
    "faster_rcnn_litter": [
        "--image_size", "96", "--scene_counts", "9,5,5", "--epochs", "2", "--batch_size", "4",
        "--precision", "float32",
    ],
    "mimo_cls": [
        "--image_size", "8", "--train_images", "40", "--test_images", "21", "--epochs", "2",
        "--batch_size", "15", "--width", "1", "--runs", "1", "--warmup_epochs", "1",
    ],
    "unet_transfer": [
        "--widths", "4,8", "--mask_count", "8", "--image_size", "32,32",
        "--pretrain_size", "16,16", "--crop_count", "60", "--pretrain_batch_size", "15",
        "--pretrain_epochs", "1", "--batch_size", "7", "--epoch_steps", "2",
        "--stage1_epochs", "1", "--stage2_epochs", "2",
    ],
}  # fmt: skip
NORMED = ("mimo_cls", "unet_transfer")


def flags_of(project: str, out: Path) -> list[str]:
    places = ["--device", "cpu", "--data_dir", str(out / "data"), "--out_dir", str(out / "runs")]
    return [*FLAGS[project], *places]


def launch(*parts: object) -> subprocess.CompletedProcess:
    command = [*LAUNCH, *map(str, parts)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@functools.cache
def folder(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"torchrun-{name}-"))


@pytest.fixture(scope="module")
def two() -> None:
    """The runs of two processes, in folder("2"), those with group normalisation in folder("2g")."""
    jobs = [{"project": name, "flags": flags_of(name, folder(f"2{name}"))} for name in FLAGS]
    for name in NORMED:
        flags = flags_of(name, folder(f"2g{name}"))
        jobs.append({"project": name, "flags": flags, "groups": True})
    ended = launch(ROOT / "tests/in_processes.py", json.dumps(jobs))
    assert ended.returncode == 0, ended.stderr


def last_run(name: str) -> Path:
    (found,) = (folder(name) / "runs").iterdir()
    return found


def weights(run: Path) -> torch.Tensor:
    saved = torch.load(run / "model.pt", weights_only=True)["weights"]
    learned = [part for name, part in saved.items() if name.endswith(("weight", "bias"))]
    return torch.cat([part.double().flatten() for part in learned])


def numbers(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())["headline"]


@pytest.mark.parametrize("project", FLAGS)
def test_two_processes_give_the_numbers_of_one(two, project, monkeypatch):
    """Where there is batch normalisation, with group normalisation in its place."""
    normed = project in NORMED
    monkeypatch.setattr(nn, "BatchNorm2d", group_norm if normed else BATCH_NORM)
    one = train(project, *flags_of(project, folder(f"1{project}")))
    several = last_run(f"2{'g' * normed}{project}")
    assert "processes" not in json.loads((one / "metrics.json").read_text())
    assert json.loads((several / "metrics.json").read_text())["processes"] == 2
    assert numbers(several) == pytest.approx(numbers(one), rel=1e-4, abs=1e-6)
    assert (weights(several) - weights(one)).abs().max() < 1e-3
    rows = [(run / "history.csv").read_text().splitlines() for run in (one, several)]
    assert len(rows[0]) == len(rows[1])
    assert sorted(path.name for path in one.iterdir()) == sorted(
        path.name for path in several.iterdir()
    )


@pytest.mark.parametrize("project", NORMED)
def test_on_the_cpu_batch_normalisation_sees_a_processs_own_part(two, project):
    """So the numbers are others, though near, and not for another reason: see above."""
    one = train(project, *flags_of(project, folder(f"1b{project}")))
    difference = (weights(last_run(f"2{project}")) - weights(one)).abs().max()
    assert 3e-3 < difference < 1


def test_a_run_whose_process_dies_goes_on_by_itself_and_later_with_one_process(two, tmp_path):
    flags = [*flags_of("bert_mlm", tmp_path), "--epochs", "6", "--patience", "6"]
    flags += ["--data_dir", str(folder("2bert_mlm") / "data")]  # a small BERT is there
    job = [{"project": "bert_mlm", "flags": flags, "die": 3}]
    script = ROOT / "tests/in_processes.py"
    ended = launch("--max_restarts", 1, script, json.dumps(job))
    assert ended.returncode != 0
    (run,) = (tmp_path / "runs").iterdir()  # the second attempt went on in the first one's folder
    said = r"^(?:error: another process has ended|ended by torchrun, .*); to go on: torchrun"
    lines = re.findall(said, ended.stderr, re.MULTILINE)  # one of each attempt
    assert len(lines) == 2, ended.stderr
    assert "in_processes.py FAILED" in ended.stderr
    rows = (run / "history.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 + 2  # of each attempt two, and the header
    assert not list(run.glob("*.tmp"))
    train("bert_mlm", "--resume", run)
    whole = train("bert_mlm", *flags, "--out_dir", tmp_path / "whole")
    assert numbers(run) == pytest.approx(numbers(whole), rel=1e-4)


def test_a_wrong_setting_is_said_once(tmp_path):
    ended = launch(ROOT / "bert_mlm/train.py", "--epohcs", 3)
    errors = re.findall("^train.py: error: .*", ended.stderr, re.MULTILINE)
    assert errors == ["train.py: error: unknown flag '--epohcs', did you mean '--epochs'?"]
    assert "exitcode  : 2" in ended.stderr or "exitcode: 2" in ended.stderr


ALONE = ["autoencoder", "carlini_wagner", "cotton_triplet", "mc_dropout", "self_training"]


@pytest.mark.parametrize("name", [*ALONE, "semi_supervised_clustering"])
def test_a_project_of_one_process_refuses_several(name, monkeypatch, capsys):
    project = load_project(name)
    monkeypatch.setattr(project.run, "WORLD", 2)
    with pytest.raises(SystemExit) as end:
        project.run.start_run(project.train.Config, "", [])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(
        f"error: {name} trains in one process: start it without torchrun\n"
    )


def test_a_batch_of_fewer_examples_than_processes_is_refused(monkeypatch, capsys):
    project = load_project("unet_transfer")
    monkeypatch.setattr(project.run, "WORLD", 2)
    with pytest.raises(SystemExit) as end:
        project.run.start_run(project.train.Config, "", ["--batch_size", "1"], several=True)
    assert end.value.code == 2
    assert "batch_size: expected at least 1 for each of 2 processes" in capsys.readouterr().err


def test_all_rows_are_gathered_in_order(monkeypatch):
    """Of five, two processes have three and two."""
    monkeypatch.setattr(run_py, "WORLD", 2)
    lists = [["a", "c", "e"], ["b", "d"]]

    def all_gather_object(parts: list, own: list) -> None:
        parts[:] = lists

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert run_py.gather(lists[0]) == list("abcde")
