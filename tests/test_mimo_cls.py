"""mimo_cls: what ports get wrong, scores against brute force, and runs as a user starts them."""

import itertools
import json
import math
import pickle
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from mimo_cls import data
from mimo_cls.model import (
    MimoWideResNet,
    bin_of,
    calibration_error,
    cost,
    diversity,
    ensemble_log_probs,
    entropy,
    mimo_loss,
    mutual_information,
    overhead,
    scores,
)

TRAIN = Path(__file__).parent.parent / "mimo_cls" / "train.py"
TINY = [
    "--dataset", "digits", "--device", "cpu", "--image_size", "8", "--train_images", "40",
    "--test_images", "20", "--epochs", "2", "--batch_size", "16", "--timed_images", "4",
    "--batch_repetition", "2", "--precision", "float32",
    "--input_repetition", "0",
]  # fmt: skip


# --- who sees what ----------------------------------------------------------------------------


def orders_of(rho: float, *, images: int = 20, members: int = 3, repetition: int = 4):
    return data.member_orders(
        images, members=members, input_repetition=rho, batch_repetition=repetition
    )


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.5, 1.0])
def test_the_first_share_rho_is_the_same_for_all_members_and_the_rest_is_not(rho):
    torch.manual_seed(0)
    orders = orders_of(rho)
    assert orders.shape == (3, 80)
    same = round(rho * 80)
    assert (orders[:, :same] == orders[0, :same]).all()
    agree = [(a[same:] == b[same:]).double().mean() for a, b in itertools.combinations(orders, 2)]
    if rho < 1:
        assert max(agree) < 0.3  # chance: 1 in 20
    for order in orders:  # every member sees every image, batch_repetition times
        assert order.bincount().tolist() == [4] * 20


def test_copies_of_an_image_are_spread_over_the_batch_and_every_step_draws_anew():
    torch.manual_seed(0)
    first, second = orders_of(0.0), orders_of(0.0)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], torch.arange(20).repeat(4))
    pairs = {(a, b) for order in (first, second) for a, b in order[:2].T.tolist()}
    assert len(pairs) > 100  # of 160: copies meet different partners


def images_that_tell_their_class(count: int = 40) -> data.Images:
    """Of one colour each, which is its number; its class hangs on it."""
    number = torch.arange(count)
    x = (6 * number).byte()[:, None, None, None].expand(count, 3, 8, 8).contiguous()
    return data.Images(x, 100 + number)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_each_member_has_the_class_of_the_image_that_it_sees(rho):
    torch.manual_seed(0)
    images, seen = images_that_tell_their_class(), []
    options = {"members": 3, "input_repetition": rho, "batch_repetition": 2, "flip": False}
    for x, y in data.training_batches(images, 10, **options):
        assert x.shape == (20, 9, 8, 8) and y.shape == (20, 3)
        assert x.is_contiguous(memory_format=torch.channels_last)
        shown = ((x[:, :, 3, 3] * 0.25 + 0.5) * 255 / 6).round().long()  # the middle is never black
        assert torch.equal(shown.view(20, 3, 3), (y - 100)[:, :, None].expand(-1, -1, 3))
        same = round(rho * 20)
        assert (y[:same] == y[:same, :1]).all()
        assert rho == 1 or not (y[same:] == y[same:, :1]).all()
        assert len(y.unique()) == 10
        seen.append(y[:, 0])
    assert sorted(torch.cat(seen).tolist()) == sorted(images.y.repeat(2).tolist())


def test_in_testing_members_see_the_same_image_in_the_channels_of_training():
    torch.manual_seed(0)
    x = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8)
    (part,) = data.testing_batches(x, 100, members=3)
    expected = torch.cat([data.as_float(x)] * 3, 1)  # red, green, blue, red, green, blue, ...
    assert torch.equal(part, expected)
    assert torch.equal(data.compose(data.as_float(x), torch.arange(7).expand(3, 7)), expected)
    parts = list(data.testing_batches(x, 3, members=2))
    assert [len(part) for part in parts] == [3, 3, 1]  # no image is left out
    assert torch.equal(torch.cat(parts)[:, :3], data.as_float(x))


def test_augmentation_shifts_over_black_and_mirrors_only_when_asked():
    torch.manual_seed(0)
    ramp = torch.arange(50, 210, 10).byte().expand(64, 3, 16, 16)
    plain, turned = data.augment(ramp, flip=False), data.augment(ramp, flip=True)
    assert plain.dtype == torch.uint8 and plain.shape == ramp.shape
    middle = plain[:, 0, 8].long()
    for row in middle:
        kept = row[row > 0]
        assert len(kept) >= 14
        assert (kept.diff() == 10).all()
    assert {int((row > 0).sum()) for row in middle} == {14, 15, 16}
    rising = turned[:, 0, 8, 8] > turned[:, 0, 8, 7]
    assert 15 < rising.sum() < 49


def test_corruptions_are_what_they_say():
    flat = torch.full((50, 3, 16, 16), 128, dtype=torch.uint8)
    noisy = data.add_noise(flat, 0.1).double() / 255
    assert noisy.std() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(data.blur(flat, 2.0), flat)
    point = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    point[:, :, 14:19, 14:19] = 255
    soft = data.blur(point, 1.5).double()[0, 0]
    at = torch.arange(33) - 16.0
    spread = (soft.sum(0) * at**2).sum() / soft.sum()
    assert spread == pytest.approx(2.0 + 1.5**2, rel=0.05)  # variances of box and kernel add up
    assert soft.sum() == pytest.approx(25 * 255, rel=0.01)


# --- the network and its cost -----------------------------------------------------------------


def small_network(members: int = 3) -> MimoWideResNet:
    torch.manual_seed(0)
    return MimoWideResNet(10, 1, members=members, classes=5)


def test_wrn_28_10_has_its_published_size_and_mimo_costs_less_than_one_percent_more():
    assert cost(28, 10, members=1, classes=10, image_size=32)["parameters"] == 36_479_194
    numbers = overhead(28, 10, members=3, classes=10, image_size=32)
    more = numbers["parameters"] - numbers["single_parameters"]
    assert more == 2 * (3 * 16 * 9) + 2 * 10 * (640 + 1)
    assert 0 < numbers["parameters_percent"] < 1
    assert 0 < numbers["multiply_adds_percent"] < 1
    more = numbers["multiply_adds"] - numbers["single_multiply_adds"]
    assert more == 2 * (3 * 16 * 9) * 32 * 32 + 2 * 10 * 640


def test_multiply_adds_are_those_counted_by_hand():
    macs = 3 * 16 * 9 * 64  # 8x8 images: the stem
    macs += 2 * 16 * 16 * 9 * 64
    macs += (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32) * 16
    macs += (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64) * 4
    macs += 64 * 5
    numbers = cost(10, 1, members=1, classes=5, image_size=8)
    assert numbers["multiply_adds"] == macs
    assert numbers["parameters"] == sum(p.numel() for p in small_network(1).parameters())


def test_logits_have_a_place_for_each_member_and_any_size_goes():
    network = small_network().eval()
    assert network(torch.rand(2, 9, 8, 8)).shape == (2, 3, 5)
    assert network(torch.rand(2, 9, 11, 32)).shape == (2, 3, 5)
    assert network.head.out_features == 15 and network.stem.in_channels == 9


def test_the_loss_is_a_sum_over_members_and_a_mean_over_inputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(5, (4, 3), generator=generator)
    expected = 0.0
    for n, m in itertools.product(range(4), range(3)):
        z = logits[n, m].tolist()
        expected += math.log(sum(map(math.exp, z))) - z[y[n, m]]
    assert mimo_loss(logits, y).item() == pytest.approx(expected / 4)
    torch.autograd.gradcheck(lambda z: mimo_loss(z, y), logits)


def test_a_member_learns_from_its_own_image_alone():
    """After a few steps with rho = 0, each member can tell its own image."""
    torch.manual_seed(0)
    network = MimoWideResNet(10, 1, members=2, classes=2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    x = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    x[10:] = 255
    images = data.Images(x, torch.arange(20) // 10)
    options = {"members": 2, "input_repetition": 0.0, "batch_repetition": 2, "flip": False}
    for _ in range(12):
        for inputs, y in data.training_batches(images, 20, **options):
            optimizer.zero_grad()
            mimo_loss(network(inputs), y).backward()
            optimizer.step()
    hits = (network(inputs).argmax(-1) == y).double().mean(0)
    assert (y[:, 0] != y[:, 1]).any()
    assert (hits > 0.9).all()


# --- scores -----------------------------------------------------------------------------------


def random_case(members: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (60, members, 4) in double precision and classes (60,)."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(60, members, 4, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1), torch.randint(4, (60,), generator=generator)


def test_the_ensemble_averages_probabilities():
    log_probs, y = random_case()
    mean = log_probs.exp().mean(1)
    assert torch.allclose(ensemble_log_probs(log_probs), mean.log(), atol=1e-13, rtol=0)
    by_hand = -sum(math.log(mean[n, y[n]]) for n in range(60)) / 60
    assert scores(ensemble_log_probs(log_probs), y)["nll"] == pytest.approx(by_hand, rel=1e-12)
    logits_averaged = log_probs.mean(1).log_softmax(-1)
    assert scores(logits_averaged, y)["nll"] != pytest.approx(by_hand, rel=1e-3)
    assert torch.equal(ensemble_log_probs(log_probs[:, :1]), log_probs[:, 0])
    hopeless = torch.tensor([[[0.0, -2000.0], [0.0, -2000.0]]], dtype=torch.float64)
    assert ensemble_log_probs(hopeless)[0, 1] == pytest.approx(-2000)  # finite


def test_scores_are_those_of_scikit_learn():
    log_probs, y = random_case()
    probs, found = log_probs[:, 0].exp(), scores(log_probs[:, 0], y)
    assert found["accuracy"] == pytest.approx(accuracy_score(y, probs.argmax(-1)))
    assert found["nll"] == pytest.approx(log_loss(y, probs, labels=range(4)))
    brier = brier_score_loss(y, probs, labels=range(4), scale_by_half=False)
    assert found["brier"] == pytest.approx(brier)


def test_calibration_error_is_the_weighted_gap_of_fifteen_equal_bins():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(300, generator=generator, dtype=torch.float64)
    hit = (torch.rand(300, generator=generator) < confidence**2).double()
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            gap = hit[inside].mean() - confidence[inside].mean()
            expected += float(inside.sum() / 300 * gap.abs())
    assert float(calibration_error(confidence, hit)) == pytest.approx(expected)
    edges = torch.tensor([0.0, 1e-9, 0.2, 0.2 + 1e-9, 1.0], dtype=torch.float64)
    assert bin_of(edges).tolist() == [0, 0, 2, 3, 14]


def test_diversity_is_a_mean_over_pairs_of_members():
    log_probs, _ = random_case()
    p = log_probs.exp().numpy()
    disagreement, kl = [], []
    for i, j in itertools.permutations(range(3), 2):
        disagreement.append(np.mean(p[:, i].argmax(-1) != p[:, j].argmax(-1)))
        kl.append(np.mean((p[:, i] * np.log(p[:, i] / p[:, j])).sum(-1)))
    found = diversity(log_probs)
    assert found["disagreement"] == pytest.approx(np.mean(disagreement))
    assert found["kl"] == pytest.approx(np.mean(kl))
    same = log_probs[:, :1].expand(-1, 3, -1)
    assert diversity(same) == pytest.approx({"disagreement": 0, "kl": 0})
    assert diversity(log_probs[:, :1]) == {"disagreement": 0, "kl": 0}


def test_mutual_information_is_what_members_disagree_about():
    log_probs, _ = random_case()
    p = log_probs.exp()
    assert torch.allclose(entropy(log_probs), -(p * log_probs).sum(-1))
    mean = p.mean(1)
    expected = -(mean * mean.log()).sum(-1) + (p * log_probs).sum(-1).mean(1)
    assert torch.allclose(mutual_information(log_probs), expected)
    assert mutual_information(log_probs[:, :1].expand(-1, 3, -1)).abs().max() < 1e-12
    assert entropy(torch.tensor([0.0, -torch.inf])) == 0


# --- data -------------------------------------------------------------------------------------


def digits(**changes: int) -> data.Data:
    options = {"size": 16, "train_images": 60, "test_images": 40, "seed": 0} | changes
    return data.load_digits(**options)


def test_no_digit_and_no_column_of_a_photograph_is_in_two_splits(monkeypatch):
    sources = []
    draw, crop = data.draw, data.crop
    monkeypatch.setattr(data, "draw", lambda *args: sources.append(args[1]) or draw(*args))
    grounds = []
    monkeypatch.setattr(data, "crop", lambda *args: grounds.append(args[0]) or crop(*args))
    digits(train_images=2000, test_images=2000)
    inks = [{ink.numpy().tobytes() for ink in part} for part in sources]
    columns = [{part.numpy().tobytes() for part in photo.unbind(3)} for photo in grounds[:3]]
    for parts in (inks, columns):
        assert all(parts)
        assert not any(a & b for a, b in itertools.combinations(parts, 2))
    assert torch.equal(grounds[2], grounds[3])  # strange images show the test photographs


def test_digits_hang_on_the_seed_and_test_images_not_on_the_number_of_training_images():
    one, again, more, other = digits(), digits(), digits(train_images=61), digits(seed=1)
    assert torch.equal(one.train.x, again.train.x) and not one.flip
    assert torch.equal(one.test.x, more.test.x)
    assert not torch.equal(one.test.x, other.test.x)
    assert one.test.x.shape == (40, 3, 16, 16) and one.test.x.dtype == torch.uint8
    assert [len(part.y) for part in (one.train, one.val, one.test)] == [60, 20, 40]
    assert set(digits(train_images=300).train.y.tolist()) == set(range(10))


def test_a_digit_is_drawn_upright_in_the_middle():
    digit = torch.zeros(1, 1, 8, 8)
    digit[..., :4, :] = 1  # the upper half
    values = iter([0.0, 1.0, 0.0, 1.0, 1.0, 0.5])  # angle, side, place, opacity, colour, dimming
    ground = torch.full((1, 3, 16, 16), 100.0)
    scene = data.draw(ground, digit, lambda low, high, *shape: torch.full(shape, next(values)))
    assert (scene[0, :, 1:7, 1:15] == 255).all()
    assert (scene[0, :, 9:] == 50).all()


def write_cifar10(data_dir: Path) -> None:
    """Two images per training file and in the test file, after the official layout."""
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.arange(3072, dtype=np.uint8)[None].repeat(20, 0)
    batch = {"data": pixels, "labels": list(range(10)) * 2}
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": [f"class{n}" for n in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))


LOAD = {"image_size": 8, "train_images": 20, "test_images": 10, "flip": False, "seed": 0}


def test_cifar10_is_read_as_published(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    write_cifar10(tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    found = data.load(dataset="cifar10", data_dir=tmp_path, ood_dir=tmp_path / "none", **LOAD)
    assert [len(part.y) for part in (found.train, found.val, found.test)] == [90, 10, 20]
    assert found.test.x.shape == (20, 3, 32, 32) and found.flip
    plane = torch.arange(1024).remainder(256).byte().view(32, 32)
    assert torch.equal(found.test.x[0, 0], plane)  # three planes of rows
    assert found.classes[3] == "class3" and found.test.y.tolist() == [*range(10), *range(10)]
    assert list(found.strange) == ["digits over photographs", "photographs without a digit"]


def test_a_damaged_download_is_named(tmp_path):
    write_cifar10(tmp_path)
    with pytest.raises(data.DataError, match=r"CIFAR-10 in .* could not be read"):
        data.load_cifar10(tmp_path, seed=0)


def test_without_a_network_digits_stand_in_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "reachable", lambda url: False)
    options = {"data_dir": tmp_path, "ood_dir": tmp_path, **LOAD}
    found = data.load(dataset="auto", **options)
    assert found.name == "digits over photographs" and "stand in for it" in found.note
    with pytest.raises(data.DataError, match="CIFAR-10 is not in"):
        data.load(dataset="cifar10", **options)


def test_a_host_that_does_not_answer_costs_no_more_than_the_time_allowed(monkeypatch):
    monkeypatch.setattr(data, "urlopen", lambda *_, **__: time.sleep(2) or nullcontext())
    began = time.perf_counter()
    assert not data.reachable("https://example.org", seconds=0.1)
    assert time.perf_counter() - began < 1.5


def make_folder(folder: Path, test_classes: tuple[str, ...] = ("dark", "light")) -> Path:
    """Twenty images in each class of train/, six in test/."""
    generator = np.random.default_rng(0)
    for part, classes, images in (("train", ("dark", "light"), 20), ("test", test_classes, 6)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for number in range(images):
                level = 40 if name == "dark" else 180
                pixels = generator.integers(level, level + 40, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def test_a_folder_with_strange_images_beside_it(tmp_path):
    folder = make_folder(tmp_path / "shades")
    (tmp_path / "other" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9), (255, 0, 0)).save(tmp_path / "other" / "a" / "red.PNG")
    (folder / "train" / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    options = {"data_dir": folder, "ood_dir": tmp_path / "other", **LOAD}
    found = data.load(dataset="folder", **options)
    assert "1 unreadable files left out, the first: " in found.note
    assert [len(part.y) for part in (found.train, found.val, found.test)] == [36, 4, 12]
    assert next(iter(found.strange)) == "other"
    assert found.strange["other"][0, :, 4, 4].tolist() == [255, 0, 0]
    for x, y in (found.train, found.val, found.test):
        assert torch.equal(x.float().mean((1, 2, 3)) > 110, y == 1)  # images keep their class


# --- as a user starts it ----------------------------------------------------------------------


def start(*flags: str, cwd: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(TRAIN), *flags], cwd=cwd, text=True, **pipes)


def report_of(process: subprocess.Popen, cwd: Path) -> tuple[Path, dict, str]:
    """Folder, metrics.json and output of a run that has to succeed."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    run = cwd / output.splitlines()[-1]
    return run, json.loads((run / "metrics.json").read_text()), output


def is_newer(path: Path, other: Path) -> bool:
    """Whether the checkpoint was written after the table: only then is there a state to restore."""
    return path.exists() and path.stat().st_mtime_ns >= other.stat().st_mtime_ns


def kill_in(stage: str, process: subprocess.Popen, out_dir: Path) -> Path:
    """Kill the run once the first epoch of `stage` has been recorded; its folder."""
    while process.poll() is None:
        for table in out_dir.glob("*/history.csv"):
            if f"\n{stage}" in table.read_text() and is_newer(table.with_name("history.pt"), table):
                process.kill()
                process.communicate()
                return table.parent
        time.sleep(0.005)
    raise AssertionError(process.stderr.read())


STUDY = [*TINY, "--study", "true", "--study_members", "1,2", "--study_repetitions", "0.5"]


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    whole = start(*STUDY, "--out_dir", "whole", cwd=tmp_path)
    process = start(*STUDY, "--out_dir", "b", cwd=tmp_path)
    broken = kill_in("M2-rho0,1", process, tmp_path / "b")
    assert not (broken / "metrics.json").exists()
    _, resumed, _ = report_of(start("--resume", str(broken), cwd=tmp_path), tmp_path)
    run, unbroken, _ = report_of(whole, tmp_path)
    unbroken["metrics"].pop("timing")
    resumed["metrics"].pop("timing")
    assert resumed["metrics"] == unbroken["metrics"]
    tables = [(folder / "history.csv").read_text().splitlines() for folder in (run, broken)]
    lines = [[line.split(",")[:2] + line.split(",")[3:] for line in table] for table in tables]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1 + 3 * 2
    check_report(unbroken)
    pictures = {path.stem for path in run.glob("*.png")}
    assert pictures == {"curves", "reliability", "corruption", "disagreement", "study"}


def check_report(report: dict) -> None:
    metrics, headline = report["metrics"], report["headline"]
    assert report["dataset"] == "digits over photographs"
    assert headline["ensemble_nll"] == metrics["ensemble"]["nll"]
    assert headline["single_ece"] == metrics["single"]["ece"]
    assert headline["parameter_overhead_percent"] == metrics["overhead"]["parameters_percent"]
    for who in ("single", "ensemble", "member1", "member2"):
        assert len(metrics[who]["noise"]["error"]) == len(metrics[who]["blur"]["ece"]) == 5
        assert 0 <= metrics[who]["ood_auroc"]["photographs without a digit"] <= 1
    pairs = [(row["members"], row["input_repetition"]) for row in metrics["study"]]
    assert pairs == [(1, 0), (2, 0.5)]
    assert metrics["study"][0]["nll"] == metrics["single"]["nll"]


def test_a_folder_at_fault_is_named_in_one_line(tmp_path):
    folder = make_folder(tmp_path / "shades", test_classes=("dark", "grey"))
    options = {"data_dir": folder, "ood_dir": tmp_path / "none", **LOAD}
    with pytest.raises(data.DataError, match="class 'grey' is not in both"):
        data.load(dataset="folder", **options)
    (folder / "test" / "white").mkdir()
    flags = (*TINY, "--dataset", "folder", "--data_dir", str(folder), "--out_dir", "out")
    process = start(*flags, cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1, errors
    assert "white" in errors


def test_a_loss_that_is_not_finite_ends_the_run_with_epoch_and_step(tmp_path):
    flags = (*TINY, "--lr", "1e30", "--warmup_epochs", "0", "--out_dir", "out")
    process = start(*flags, cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.startswith("error: single epoch 1: the loss is not finite at step ")


def test_the_rate_goes_with_the_number_of_different_images():
    """In a process of its own: the module's siblings are plain imports."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import train\n"
        "from types import SimpleNamespace as S\n"
        "base = dict(lr=0.1, batch_repetition=4, warmup_epochs=1, epochs=10, drops=(0.4, 0.8))\n"
        "for size in (64, 256):\n"
        "    for schedule in ('steps', 'cosine'):\n"
        "        c = S(**base, batch_size=size, schedule=schedule, drop_factor=0.2)\n"
        "        print(*(train.learning_rate(c, e, 1000) for e in (0.5, 1, 4, 4.1, 8.5, 10)))\n"
        "sys.argv = ['train.py', '--depth', '12']; train.main()"
    )
    cosine = [0.5, *((1 + math.cos(math.pi * t / 9)) / 2 for t in (0, 3, 3.1, 7.5, 9))]
    command = [sys.executable, "-c", code, str(TRAIN.parent)]
    answer = subprocess.run(command, capture_output=True, text=True)
    lines = iter(answer.stdout.splitlines())
    for size in (64, 256):
        for factors in ([0.5, 1, 1, 0.2, 0.04, 0.04], cosine):
            rates = [float(rate) for rate in next(lines).split()]
            assert rates == pytest.approx([0.1 * size / 128 * f for f in factors], abs=1e-12)
    assert answer.returncode == 2  # of the impossible setting, named in one line
    assert re.fullmatch(r".+ error: --depth: expected 10, 16, 22, .+, found 12\n", answer.stderr)
