"""Criteria, searches and 8-bit pictures against closed forms; runs as a user starts them."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from carlini_wagner.data import DataError, choose_digits, load_photographs, through_disk
from carlini_wagner.model import (
    Found,
    Normalised,
    SmallResNet,
    Tracker,
    carlini_wagner,
    criterion,
    decoupled,
    distance,
    distances,
    frozen,
    identity,
    join,
    margin,
    probabilities,
    repair,
    to_8bit,
    to_w,
    to_x,
)

TRAIN = Path(__file__).parents[1] / "carlini_wagner" / "train.py"
SIZES = ["--scenes", "512", "--batch_size", "16", "--epochs", "2", "--width", "4"]
SIZES += ["--picture_count", "4"]
EFFORT = ["--attack_batch", "2", "--rounds", "2", "--steps", "25", "--fast_steps", "20"]
TINY = ["--dataset", "digits", "--digit_target", "next", "--device", "cpu", *SIZES, *EFFORT]


# --- criteria ---------------------------------------------------------------------------------


def scores_and_target(*, count: int = 40, classes: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    scores = 4 * torch.randn(count, classes, generator=generator, dtype=torch.float64) - 3
    return scores, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("kappa", [0.0, 1.5])
def test_margin_and_criterion_are_those_of_a_loop(kappa):
    scores, target = scores_and_target()
    assert (scores.gather(1, target[:, None]) < 0).any()
    assert (margin(scores, target) > 0).any() and (margin(scores, target) < 0).any()
    for row, goal, got, value in zip(
        scores.tolist(),
        target.tolist(),
        margin(scores, target).tolist(),
        criterion(scores, target, kappa).tolist(),
        strict=True,
    ):
        other = max(score for number, score in enumerate(row) if number != goal)
        assert got == pytest.approx(row[goal] - other)
        assert value == pytest.approx(max(-kappa, other - row[goal]))


@pytest.mark.parametrize("scores", [identity, probabilities])
def test_the_gradient_of_the_objective_is_that_of_finite_differences(scores):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x0 = torch.rand(3, 3, 2, 2, dtype=torch.float64)
    x0[0, 0, 0, 0], x0[1, 0, 0, 0] = 0.0, 1.0
    target, c = torch.tensor([0, 1, 3]), torch.tensor([0.5, 2.0, 9.0], dtype=torch.float64)

    def objective(w):
        x = to_x(w)
        return (x - x0).square().sum((1, 2, 3)) + c * criterion(scores(network(x)), target, 0.3)

    w = (to_w(x0) + 0.1 * torch.randn_like(x0)).requires_grad_()
    assert torch.autograd.gradcheck(objective, w)


# --- the box ----------------------------------------------------------------------------------


def test_every_8bit_pixel_has_a_finite_w_that_gives_it_back_and_can_move():
    x = (torch.arange(256) / 255).requires_grad_()
    w = to_w(x.detach()).requires_grad_()
    back = to_x(w)
    back.sum().backward()
    torch.testing.assert_close(back, x.detach(), atol=1e-6, rtol=0)
    assert back.min() >= 0 and back.max() <= 1
    assert w.grad.min() > 0.005  # of 0 and 1, too


class Half(nn.Module):
    """Two classes; the margin of class 1 is a . x - b, so that the nearest picture is known."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        score = (self.a * x).flatten(1).sum(1) - self.b
        return torch.stack((torch.zeros_like(score), score), 1)


def half_space(*, count: int = 3, size: int = 8):
    """Pictures (count, 3, size, size), their network and the least L2 to a margin of kappa.

    Some pixels lie at 0 and 1 and have to move inwards; none has to leave the box.
    """
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(80, 176, (count, 3, size, size), generator=generator) / 255
    a = torch.randn(3, size, size, generator=generator)
    x0[:, 0] = torch.where(a[0] > 0, 0.0, 1.0)
    b = float((a * x0).flatten(1).sum(1).max()) + 12.0
    network = Half(a, b)
    start = margin(network(x0), torch.ones(count, dtype=torch.long))
    return network, x0, lambda kappa: (kappa - start) / a.norm()


@pytest.mark.parametrize("kappa", [0.0, 5.0])
def test_both_searches_find_the_nearest_picture_of_a_half_space(kappa):
    network, x0, least = half_space()
    target = torch.ones(len(x0), dtype=torch.long)
    common = {"scores": identity, "kappa": kappa}
    slow = carlini_wagner(network, x0, target, c=0.3, rounds=5, steps=200, lr=0.03, **common)
    fast = decoupled(network, x0, target, steps=80, **common)
    for found, tolerance in ((slow, 0.01), (fast, 0.02)):
        assert found.success.all()
        assert (margin(network(found.x), target) >= kappa).all()
        assert found.x.min() >= 0 and found.x.max() <= 1
        share = distance(found.x, x0) / least(kappa)
        assert (share > 1 - 1e-4).all() and (share < 1 + tolerance).all(), share
        moved = (found.x - x0)[:, 0].abs()  # the saturated pixels
        expected = network.a[0].abs() * (least(kappa) / network.a.norm())[:, None, None]
        assert (moved - expected).abs().mean() < 0.1 * expected.mean()
    assert torch.equal(fast.x, to_8bit(fast.x))


def test_a_pixel_at_the_edge_never_leaves_the_box():
    network, x0, _ = half_space()
    x0 = torch.where(network.a > 0, 1.0, 0.0).expand_as(x0).contiguous()  # nothing left to gain
    target = torch.ones(len(x0), dtype=torch.long)
    network.b = float((network.a * x0[0]).sum()) + 5.0
    found = carlini_wagner(
        network, x0, target, scores=identity, kappa=0.0, c=10.0, rounds=2, steps=50, lr=0.1
    )
    assert not found.success.any()
    assert found.x.min() >= 0 and found.x.max() <= 1


# --- each picture for itself ------------------------------------------------------------------


def test_a_batch_gives_what_its_pictures_give_alone():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    frozen(network)
    x0 = torch.rand(4, 3, 4, 4, dtype=torch.float64)
    x0[3] = 0.5  # an easy one beside hard ones: they need another c and stop at another time
    order = network(x0).argsort(1)
    target = torch.stack((order[0, 0], order[1, 0], order[2, 1], order[3, 2]))
    search = partial(carlini_wagner, scores=identity, kappa=0.5, c=0.3, rounds=5, steps=60, lr=0.05)
    fast = partial(decoupled, scores=identity, kappa=0.5, steps=30)
    for attack in (search, fast):
        together = attack(network, x0, target)
        for number in range(4):
            alone = attack(network, x0[number, None], target[number, None])
            torch.testing.assert_close(together.x[number], alone.x[0])
            assert together.queries[number] == alone.queries[0]
            assert together.c[number] == alone.c[0]
            best = together.trace[: int(alone.queries[0]), :, number]
            torch.testing.assert_close(best, alone.trace[..., 0], equal_nan=True)
    together = search(network, x0, target)
    assert together.queries.unique().numel() > 1  # finished ones have left the batch
    assert together.queries.max() < 5 * 60
    assert together.c.unique().numel() > 1


def test_the_best_of_each_picture_is_kept():
    x0 = torch.full((2, 3, 2, 2), 0.5)
    tracker, rows, c = Tracker(x0, 1.0), torch.arange(2), torch.tensor([3.0, 4.0])
    moves = [(0.10, -2.0), (0.30, 2.0), (0.20, 1.5), (0.05, 0.9), (0.25, 9.0)]
    for way, reached in moves:  # the second picture never comes beyond -2
        x = x0 + way
        tracker.see(rows, x, torch.tensor([reached, min(reached, -1.0 - way)]), c)
    found = tracker.found()
    assert found.success.tolist() == [True, False]
    torch.testing.assert_close(found.x[0], x0[0] + 0.20)  # the closest with margin 1 or more
    torch.testing.assert_close(found.x[1], x0[1] + 0.05)  # the closest try: margin -1.05
    assert found.trace[:, 3, 0].isnan().tolist() == [True, False, False, False, False]
    assert found.trace[:, 3, 1].isnan().all()


def test_a_failure_is_a_failure_and_leaves_the_closest_try():
    network, x0, _ = half_space()
    network.b += 1e4
    target = torch.ones(len(x0), dtype=torch.long)
    found = decoupled(network, x0, target, scores=identity, kappa=0.0, steps=10)
    assert not found.success.any()
    assert (margin(network(found.x), target) > margin(network(x0), target)).all()
    assert distances(found.x[found.success], x0[found.success])["mean_l2"] is None


def test_a_margin_of_probabilities_stops_where_logits_go_on():
    network, x0, _ = half_space()
    target = torch.ones(len(x0), dtype=torch.long)
    found = decoupled(network, x0, target, scores=probabilities, kappa=0.9, steps=60)
    gap = margin(probabilities(network(found.x)), target)
    assert found.success.all() and (gap >= 0.9).all() and (gap < 0.93).all()


def test_repair_makes_an_8bit_success_of_a_rounded_failure():
    network, x0, least = half_space(count=8)
    target = torch.ones(len(x0), dtype=torch.long)
    way = (network.a / network.a.norm()).expand_as(x0)
    nearest = x0 + way * least(0.001)[:, None, None, None]  # just over the boundary
    assert (margin(network(nearest), target) > 0).all()
    assert (margin(network(to_8bit(nearest)), target) < 0).any()  # else there is nothing to repair
    success = torch.arange(8) < 7
    found = Found(nearest, success, torch.zeros(8), torch.full((8,), 100), torch.zeros(1, 4, 8))
    x, queries = repair(network, x0, target, found, scores=identity, kappa=0.0, steps=20)
    assert (margin(network(x), target) >= 0)[success].all()
    assert torch.equal(x, to_8bit(x)) and torch.equal(x[7], to_8bit(nearest[7]))
    assert (distance(x, x0) < 1.01 * distance(nearest, x0)).all()
    assert queries.tolist() == [120] * 7 + [100]  # a failure is only rounded


def test_batches_of_different_length_are_joined():
    network, x0, _ = half_space()
    target = torch.ones(len(x0), dtype=torch.long)
    parts = [
        decoupled(network, x0[:count], target[:count], scores=identity, kappa=0.0, steps=steps)
        for count, steps in ((2, 5), (1, 9))
    ]
    whole = join(parts)
    assert whole.x.shape[0] == 3 and whole.trace.shape == (9, 4, 3)
    assert whole.queries.tolist() == [5, 5, 9]
    assert whole.trace[5:, :, :2].isnan().all() and not whole.trace[:, 0, 2].isnan().any()


# --- networks and data ------------------------------------------------------------------------


def test_normalisation_is_part_of_the_network_and_frozen_means_frozen():
    network = Normalised(nn.BatchNorm2d(3), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    frozen(network)
    assert not network.network.training
    assert not any(weight.requires_grad for weight in network.parameters())
    x = torch.rand(2, 3, 4, 4)
    expected = (x[:, 1] - 0.4) / 0.3
    torch.testing.assert_close(network(x)[:, 1], expected, rtol=1e-4, atol=1e-4)


def test_pictures_come_back_from_disk_as_they_were(tmp_path):
    x = to_8bit(torch.rand(2, 3, 5, 7))
    back = through_disk(x, torch.tensor([4, 5]), torch.tensor([1, 2]), tmp_path / "new")
    assert torch.equal(back, x)
    assert np.asarray(Image.open(tmp_path / "new" / "001-5-to-2.png")).shape == (5, 7, 3)


def test_digits_are_chosen_by_pair_and_only_if_seen_rightly():
    y = torch.arange(10).repeat(20)
    right = torch.arange(200) % 7 > 0
    chosen, target = choose_digits(y, right, pairs=True, count=90)
    assert len(set(zip(y[chosen].tolist(), target.tolist(), strict=True))) == 90
    assert (y[chosen] != target).all() and right[chosen].all()
    assert len(set(chosen.tolist())) == 90
    chosen, target = choose_digits(y, right, pairs=False, count=64)
    assert len(chosen) == 64 and right[chosen].all()
    assert torch.equal(target, (y[chosen] + 1) % 10)
    for pairs in (True, False):
        with pytest.raises(DataError, match="train it for longer"):
            choose_digits(y, right & False, pairs=pairs, count=3)


def test_photographs_from_files_folders_and_lists(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, size in (("a.png", (40, 20)), ("b.jpg", (20, 50))):
        Image.new("RGB", size, (200, 10, 10)).save(folder / name)
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (tmp_path / "list.txt").write_text("folder\n\nfolder/b.jpg\n")
    loaded = load_photographs(("list.txt",), data_dir=tmp_path, size=16)
    assert loaded.x.shape == (3, 3, 16, 16) and loaded.names == ["a.png", "b.jpg", "b.jpg"]
    assert len(loaded.bad) == 1 and "c.png" in loaded.bad[0]
    with pytest.raises(DataError, match=r"c\.png"):
        load_photographs(("folder/c.png",), data_dir=tmp_path, size=16)


# --- runs -------------------------------------------------------------------------------------


def start(*flags: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, str(TRAIN), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, text=True, **pipes)


def finish(process: subprocess.Popen, cwd: Path) -> tuple[Path, dict]:
    """The folder of a run that has to succeed, and its metrics.json."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    folder = cwd / output.splitlines()[-1]
    return folder, json.loads((folder / "metrics.json").read_text())


def without_seconds(metrics: dict) -> dict:
    return {
        name: {key: value for key, value in part.items() if key != "seconds"}
        if isinstance(part, dict)
        else part
        for name, part in metrics.items()
    }


def kill_when(process: subprocess.Popen, folder: Path, stage: str) -> Path:
    """Kills the run in `folder` as soon as its history has a row of `stage`."""
    while not any(f"\n{stage}," in file.read_text() for file in folder.glob("*/history.csv")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.wait()
    (run,) = folder.glob("*")
    return run


def test_a_twice_killed_run_ends_like_an_unbroken_one(tmp_path):
    flags = [*TINY, "--data_dir"]
    unbroken = start(*flags, "a", "--out_dir", "unbroken", cwd=tmp_path)
    killed = start(*flags, "b", "--out_dir", "killed", cwd=tmp_path)
    run = kill_when(killed, tmp_path / "killed", "train")
    resumed = start("--resume", str(run), cwd=tmp_path)
    kill_when(resumed, tmp_path / "killed", "logits")
    folder, whole = finish(unbroken, tmp_path)
    _, again = finish(start("--resume", str(run), cwd=tmp_path), tmp_path)
    assert without_seconds(again["metrics"]) == without_seconds(whole["metrics"])
    assert again["headline"] == whole["headline"]
    check_saved_pictures(folder, whole["metrics"])
    for name in ("example.png", "search.png", "queries.png", "matrix.png"):
        assert (folder / name).stat().st_size > 5000


def check_saved_pictures(folder: Path, metrics: dict) -> None:
    """The PNGs of a run, seen by the network that lies beside them, are what metrics.json says."""
    network = SmallResNet(width=4, classes=10)
    network.load_state_dict(torch.load(folder / "train.pt", weights_only=True))
    frozen(network)
    for name in ("probability", "logits", "fast"):
        rows, paths = metrics[name]["pictures"], sorted(folder.glob(f"adversarial/{name}/*.png"))
        assert len(rows) == len(paths) == 4
        x = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])
        logits = network(x.permute(0, 3, 1, 2).float() / 255)
        scores = logits.softmax(1) if name == "probability" else logits
        target = torch.tensor([int(row["target"]) for row in rows])
        reached = margin(scores, target)
        assert [row["margin"] for row in rows] == pytest.approx(reached.tolist(), abs=1e-4)
        assert [row["png_success"] for row in rows] == (reached >= 0).tolist()
        l2 = [row["l2"] for row in rows if row["png_success"]]
        expected = sum(l2) / len(l2) if l2 else None
        assert metrics[name]["png_mean_l2"] == pytest.approx(expected, abs=1e-5)


def test_own_weights_of_a_torchvision_network(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    torch.save(resnet18(num_classes=5).state_dict(), tmp_path / "mine.pt")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"not a picture")
    weights = ["--weights", "mine.pt", "--second_weights", "mine.pt"]
    kinds = ["--network", "resnet18", "--second_network", "resnet18", "--image_size", "32"]
    what = ["--dataset", "images", "--images", "photos", "--target", "next", "--kappa", "0.1"]
    effort = ["--criteria", "logits,fast", "--rounds", "1", "--steps", "8", "--fast_steps", "20"]
    flags = [*what, *weights, *kinds, *effort, "--device", "cpu", "--out_dir", "runs"]
    folder, report = finish(start(*flags, cwd=tmp_path), tmp_path)
    assert report["dataset"] == "images" and report["metrics"]["unreadable"] == 1
    assert report["metrics"]["fast"]["png_success"] == 1
    assert report["metrics"]["fast"]["png_least_margin"] >= 0.1
    assert report["metrics"]["fast"]["transfer"] == 1  # the second network is the first
    assert len(list((folder / "adversarial" / "fast").glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("flags", "status", "complaint"),
    [
        (["--kappa", "5"], 2, "--kappa: expected at most 1 with the criterion probability"),
        (["--dataset", "images", "--images", "lost.png"], 1, "'lost.png' is neither here nor in"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path, flags, status, complaint):
    process = start(*flags, "--out_dir", "runs", "--device", "cpu", cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status
    assert complaint in errors and len(errors.splitlines()) == 1
    assert status == 1 or not (tmp_path / "runs").exists()
