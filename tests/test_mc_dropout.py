"""mc_dropout: masks, averages and scores against closed forms, and runs as a user starts them."""

import gzip
import itertools
import json
import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import nn

from mc_dropout.data import DataError, Images, batches, load, rotate, split
from mc_dropout.model import (
    adaptive_calibration_error,
    average_logits,
    average_probs,
    bin_of,
    calibration_error,
    dropout_on,
    entropy,
    make_cnn,
    mc_logits,
    mutual_information,
    paired_difference,
    scores,
    spread,
    standard_logits,
    together,
)

TRAIN = Path(__file__).parent.parent / "mc_dropout" / "train.py"
TINY = [
    "--dataset", "digits", "--device", "cpu", "--image_size", "10", "--widths", "4,6",
    "--hidden", "8", "--runs", "3", "--at_once", "2", "--epochs", "2", "--batch_size", "16",
    "--passes", "5", "--report_passes", "4", "--train_images", "50",
]  # fmt: skip
CHUNKS = {"chunk_images": 4, "chunk_passes": 3}


def small_cnn(dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    return make_cnn(channels=1, classes=3, widths=(4, 6), hidden=8, dropout=dropout)


# --- stochastic forward passes ----------------------------------------------------------------


def test_only_dropout_leaves_eval_mode_and_every_mode_comes_back():
    network = small_cnn().train()
    network[1].eval()
    before = [module.training for module in network.modules()]
    with pytest.raises(ZeroDivisionError), dropout_on(network):
        for module in network.modules():
            assert module.training == isinstance(module, nn.Dropout)
        raise ZeroDivisionError
    assert [module.training for module in network.modules()] == before

    statistics = network[1].running_mean.clone()
    mc_logits(network, torch.rand(4, 1, 12, 12), passes=2, seed=0, **CHUNKS)
    assert torch.equal(network[1].running_mean, statistics)
    assert [module.training for module in network.modules()] == before


def test_what_is_kept_is_scaled_by_one_over_one_minus_p():
    network = nn.Sequential(nn.Dropout(0.2), nn.Identity()).double()
    x = torch.ones(50, 40, dtype=torch.float64)
    values = mc_logits(network, x, passes=30, seed=0, **CHUNKS)
    assert values.unique().tolist() == pytest.approx([0, 1.25])
    assert values.mean() == pytest.approx(1, abs=5 * 0.5 / math.sqrt(values.numel()))


def test_masks_differ_between_passes_images_and_chunks():
    network = nn.Sequential(nn.Dropout(0.5), nn.Identity())
    values = mc_logits(network, torch.ones(10, 400), passes=7, seed=0, **CHUNKS)
    masks = (values.flatten(0, 1) > 0).double()
    agreement = np.corrcoef(masks) - np.eye(len(masks))
    assert np.abs(agreement).max() < 5 / math.sqrt(400)


def test_a_seed_fixes_the_masks_and_leaves_other_generators_alone():
    network, x = small_cnn(), torch.rand(5, 1, 12, 12)
    torch.manual_seed(3)
    first = mc_logits(network, x, passes=4, seed=1, **CHUNKS)
    here = torch.rand(1)
    torch.manual_seed(4)
    assert torch.equal(mc_logits(network, x, passes=4, seed=1, **CHUNKS), first)
    assert not torch.equal(mc_logits(network, x, passes=4, seed=2, **CHUNKS), first)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), here)


def test_layers_before_the_first_dropout_see_each_image_once():
    network, seen = small_cnn(), {"first": 0, "last": 0}
    for key, layer in (("first", network[0]), ("last", network[-1])):
        layer.register_forward_hook(
            lambda layer, x, y, key=key: seen.update({key: seen[key] + len(y)})
        )
    logits = mc_logits(network, torch.rand(10, 1, 12, 12), passes=7, seed=0, **CHUNKS)
    assert logits.shape == (7, 10, 3)
    assert seen == {"first": 10, "last": 70}


def test_passes_agree_with_dropout_off_where_nothing_is_dropped():
    network, x = small_cnn(dropout=0.0), torch.rand(10, 1, 12, 12)
    logits = mc_logits(network, x, passes=5, seed=0, **CHUNKS)
    standard = standard_logits(network, x, chunk_images=10)
    assert torch.allclose(logits, standard.expand_as(logits), atol=1e-6)


def test_a_network_without_dropout_is_refused():
    with pytest.raises(ValueError, match="expected a dropout module"):
        mc_logits(nn.Sequential(nn.Flatten()), torch.ones(1, 2), passes=2, seed=0, **CHUNKS)


def test_many_passes_come_to_the_mean_over_all_masks():
    torch.manual_seed(0)
    head = nn.Linear(3, 4).double()
    network, x = nn.Sequential(nn.Dropout(0.3), head), torch.tensor([[2.0, -3.0, 4.0]]).double()
    exact, second = 0, 0
    for mask in itertools.product((0, 1), repeat=3):
        weight = math.prod(0.7 if kept else 0.3 for kept in mask)
        probs = head(x * torch.tensor(mask) / 0.7).softmax(-1)
        exact, second = exact + weight * probs, second + weight * probs**2
    sizes = {"chunk_images": 1, "chunk_passes": 1000}
    logits = mc_logits(network, x, passes=4000, seed=0, **sizes)
    error = ((second - exact**2) / 4000).sqrt()
    assert ((average_probs(logits)[-1].exp() - exact).abs() < 4 * error).all()


def test_row_t_averages_the_probabilities_of_the_first_t_passes():
    logits = 5 * torch.randn(6, 4, 3, dtype=torch.float64)
    for t in range(1, 7):
        probs = torch.stack([logits[i].softmax(-1) for i in range(t)]).mean(0)
        assert torch.allclose(average_probs(logits)[t - 1].exp(), probs)
        geometric = logits[:t].mean(0).softmax(-1)
        assert torch.allclose(average_logits(logits)[t - 1].exp(), geometric)
    assert not torch.allclose(average_probs(logits), average_logits(logits))


# --- uncertainty and scores -------------------------------------------------------------------


def test_entropy_and_mutual_information():
    logits = 3 * torch.randn(5, 200, 4, dtype=torch.float64)
    probs = logits.softmax(-1)

    def by_hand(p):
        return -(p * p.log()).sum(-1)

    mean = probs.mean(0)
    assert torch.allclose(entropy(mean.log()), by_hand(mean))
    assert torch.allclose(mutual_information(logits), by_hand(mean) - by_hand(probs).mean(0))
    same = logits[:1].float().expand(5, -1, -1)
    assert (mutual_information(same) >= 0).all()
    assert (mutual_information(same) < 1e-5).all()
    sure = 1000 * torch.eye(4, dtype=torch.float64)[:, None]  # each pass is sure of another class
    assert mutual_information(sure).item() == pytest.approx(math.log(4))


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 50, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (50,), generator=generator)
    found = scores(logits.log_softmax(-1), y)
    for row, part in enumerate(logits):
        probs = part.softmax(-1)
        assert found["accuracy"][row] == pytest.approx(accuracy_score(y, probs.argmax(-1)))
        assert found["nll"][row] == pytest.approx(log_loss(y, probs, labels=range(4)))
        brier = brier_score_loss(y, probs, labels=range(4), scale_by_half=False)
        assert found["brier"][row] == pytest.approx(brier)
    perfect = scores(
        torch.log(torch.eye(4, dtype=torch.float64).clamp(min=1e-300)), torch.arange(4)
    )
    assert [float(value) for value in perfect.values()] == pytest.approx([1, 0, 0, 0, 0])


def test_calibration_error_is_the_weighted_gap_of_fifteen_equal_bins():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(2, 300, generator=generator, dtype=torch.float64)
    hit = (torch.rand(2, 300, generator=generator) < confidence**2).double()
    found = calibration_error(confidence, hit)
    for row in range(2):
        expected = 0.0
        for b in range(15):
            inside = (confidence[row] > b / 15) & (confidence[row] <= (b + 1) / 15)
            if inside.any():
                gap = hit[row][inside].mean() - confidence[row][inside].mean()
                expected += inside.sum() / 300 * gap.abs()
        assert found[row] == pytest.approx(float(expected))
    edges = torch.tensor([0.0, 1e-9, 0.2, 0.2 + 1e-9, 1.0], dtype=torch.float64)
    assert bin_of(edges).tolist() == [0, 0, 2, 3, 14]


def test_adaptive_calibration_error_has_as_many_images_in_each_bin():
    generator = torch.Generator().manual_seed(0)
    confidence = 1 - 0.01 * torch.rand(150, generator=generator, dtype=torch.float64)
    hit = (torch.rand(150, generator=generator) < 0.9).double()
    order = np.argsort(confidence.numpy())
    bins = [(hit.numpy()[part], confidence.numpy()[part]) for part in order.reshape(15, 10)]
    expected = np.mean([abs(right.mean() - sure.mean()) for right, sure in bins])
    assert adaptive_calibration_error(confidence, hit) == pytest.approx(expected)
    # all confidences lie in the last equal-width bin, which sees only the mean
    gap = abs(hit.mean() - confidence.mean())
    assert calibration_error(confidence, hit) == pytest.approx(float(gap))


def test_spread_and_paired_difference():
    mc, standard = np.random.default_rng(0).normal(size=(2, 10, 4))
    standard = standard[:, 0]
    found = spread(torch.from_numpy(mc))
    assert np.allclose(found["mean"], mc.mean(0))
    assert np.allclose(found["sd"], mc.std(0, ddof=1))
    found = paired_difference(torch.from_numpy(mc), torch.from_numpy(standard))
    for t in range(4):
        difference = mc[:, t] - standard
        assert found["mean"][t] == pytest.approx(difference.mean())
        assert found["standard_error"][t] == pytest.approx(difference.std(ddof=1) / math.sqrt(10))


# --- several networks as one program ----------------------------------------------------------


def train_three(networks: list[nn.Module], x: torch.Tensor, y: torch.Tensor) -> None:
    """Three steps of AdamW, all networks at once; x (steps, R, B, ...), y (steps, R, B)."""
    parameters, forward = together(networks)
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for images, classes in zip(x, y, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(forward(images).transpose(1, 2), classes, reduction="sum").backward()
        optimizer.step()


def test_networks_trained_at_once_become_what_each_becomes_alone():
    def make(seed):
        torch.manual_seed(seed)
        sizes = {"channels": 1, "classes": 3, "widths": (4, 6), "hidden": 8, "dropout": 0.0}
        return make_cnn(**sizes).double()

    x = torch.rand(3, 2, 5, 1, 12, 12, dtype=torch.float64)
    y = torch.randint(3, (3, 2, 5))
    both, alone = [make(1), make(2)], [make(1), make(2)]
    train_three(both, x, y)
    for number, network in enumerate(alone):
        train_three([network], x[:, number : number + 1], y[:, number : number + 1])
    for one, other in zip(both, alone, strict=True):
        before = make(1).state_dict()
        for name, value in one.state_dict().items():
            assert torch.allclose(value, other.state_dict()[name], atol=1e-10), name
        assert not torch.equal(one.state_dict()["1.running_mean"], before["1.running_mean"])


def test_networks_trained_at_once_draw_their_own_masks():
    network = small_cnn()
    _, forward = together([network, small_cnn()])
    first, second = forward(torch.rand(1, 6, 1, 12, 12).expand(2, -1, -1, -1, -1))
    assert not torch.allclose(first, second)


# --- data -------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_fixed_by_the_seed():
    images = Images(torch.arange(100).byte().view(100, 1, 1, 1), torch.arange(100))
    parts = split(images, (0.6, 0.1, 0.3), seed=1)
    assert [len(part.x) for part in parts] == [60, 10, 30]
    assert sorted(torch.cat([part.y for part in parts]).tolist()) == list(range(100))
    again, other = split(images, (0.6, 0.4), seed=1), split(images, (0.6, 0.4), seed=2)
    assert torch.equal(again[0].y, parts[0].y)
    assert not torch.equal(other[0].y, parts[0].y)
    digits = load(dataset="digits", data_dir=Path(), image_size=28, seed=0)
    assert len(digits.train.x) + len(digits.val.x) + len(digits.test.x) == 1797
    assert digits.test.x.shape[1:] == (1, 28, 28)
    assert digits.test.x.max() > 200


def test_a_quarter_turn_and_each_network_in_its_own_order():
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(rotate(x, 90), x.rot90(1, (2, 3)), atol=1e-5)
    images = Images(torch.arange(5).byte().view(5, 1, 1, 1), torch.arange(5))
    orders = torch.stack([torch.tensor([4, 3, 2, 1, 0]), torch.tensor([0, 2, 4, 1, 3])])
    drawn = list(batches(images, 2, orders))
    assert torch.equal(torch.cat([y for _, y in drawn], 1), orders)
    assert torch.equal((torch.cat([x for x, _ in drawn], 1) * 255).flatten(1).long(), orders)


def write_idx(folder: Path, name: str, count: int) -> None:
    """Files of MNIST's format with `count` training images and half as many for testing."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for part, size in (("train", count), ("t10k", count // 2)):
        images = struct.pack(">4i", 2051, size, 28, 28) + bytes(i % 251 for i in range(size)) * 784
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2i", 2049, size) + bytes(i % 10 for i in range(size))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def test_mnist_is_read_from_its_folder_with_fashion_beside_it(tmp_path):
    write_idx(tmp_path, "MNIST", 120)
    write_idx(tmp_path, "FashionMNIST", 40)
    data = load(dataset="auto", data_dir=tmp_path, image_size=28, seed=0)
    assert (data.name, data.note) == ("MNIST", "data: MNIST")
    assert [len(part.x) for part in (data.train, data.val, data.test)] == [110, 10, 60]
    assert data.fashion.shape == (20, 1, 28, 28)

    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(gzip.compress(labels.read_bytes()))  # forgotten to unpack
    with pytest.raises(DataError, match=r"MNIST in .* could not be read"):
        load(dataset="mnist", data_dir=tmp_path, image_size=28, seed=0)
    fallback = load(dataset="auto", data_dir=tmp_path, image_size=28, seed=0)
    assert fallback.name == "digits"
    assert "scikit-learn's digits stand in" in fallback.note


def make_folder(folder: Path, test_classes: tuple[str, ...] = ("dark", "light")) -> Path:
    """Twelve images in each class of train/, six in test/."""
    generator = np.random.default_rng(0)
    for part, classes, count in (("train", ("dark", "light"), 12), ("test", test_classes, 6)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                level = 40 if name == "dark" else 180
                pixels = generator.integers(level, level + 40, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


# --- as a user starts it ----------------------------------------------------------------------


def start(*flags: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, str(TRAIN), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, text=True, **pipes)


def report_of(process: subprocess.Popen, cwd: Path) -> tuple[Path, dict, str]:
    """Folder, metrics.json and output of a run that has to succeed."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    run = cwd / output.splitlines()[-1]
    return run, json.loads((run / "metrics.json").read_text()), output


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    folder = make_folder(tmp_path / "shades")
    (folder / "train" / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    flags = (*TINY, "--dataset", "folder", "--data_dir", str(folder))
    whole = start(*flags, "--out_dir", "unbroken", cwd=tmp_path)
    killed = start(*flags, "--out_dir", "killed", cwd=tmp_path)
    while not list(tmp_path.glob("killed/*/history.pt")):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    (run,) = tmp_path.glob("killed/*")
    assert not (run / "metrics.json").exists()
    resumed = report_of(start("--resume", str(run), cwd=tmp_path), tmp_path)
    unbroken = report_of(whole, tmp_path)
    assert "1 unreadable files left out, the first: " in unbroken[2]
    timing = unbroken[1]["metrics"].pop("timing")
    resumed[1]["metrics"].pop("timing")
    assert resumed[1]["metrics"] == unbroken[1]["metrics"]
    history = [(folder / "history.csv").read_text().splitlines() for folder in (run, unbroken[0])]
    losses = [[line.split(",")[4:] for line in lines] for lines in history]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1 + 3 * 2

    report = unbroken[1]
    metrics, headline = report["metrics"], report["headline"]
    assert report["dataset"] == "shades"
    assert headline["mc_nll"] == metrics["test"]["mc"]["nll"]["mean"][3]
    assert headline["standard_ece"] == metrics["test"]["standard"]["ece"]["mean"]
    ratio = timing["passes_100_seconds_per_10000"] / timing["passes_1_seconds_per_10000"]
    assert headline["cost_ratio_100_passes"] == ratio
    for split_name, score in itertools.product(("test", "train"), ("accuracy", "nll", "brier")):
        numbers = metrics[split_name]
        difference = numbers["mc_minus_standard"][score]["mean"]
        assert len(difference) == 5
        expected = numbers["mc"][score]["mean"][4] - numbers["standard"][score]["mean"]
        assert difference[4] == pytest.approx(expected, abs=1e-6)
    assert set(metrics["ood_auroc"]["rotated"]) == {
        "standard_entropy",
        "mc_entropy",
        "mutual_information",
    }
    pictures = {path.stem for path in unbroken[0].glob("*.png")}
    assert pictures == {"passes", "rotation", "reliability", "certainty"}


def test_a_folder_at_fault_is_named_in_one_line(tmp_path):
    folder = make_folder(tmp_path / "shades", test_classes=("dark", "grey"))
    with pytest.raises(DataError, match="class 'grey' is not in both"):
        load(dataset="folder", data_dir=folder, image_size=10, seed=0)
    (folder / "test" / "white").mkdir()
    flags = (*TINY, "--dataset", "folder", "--data_dir", str(folder), "--out_dir", "out")
    process = start(*flags, cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1, errors
    assert "white" in errors


def test_more_passes_reported_than_made_is_a_mistake(tmp_path):
    process = start("--report_passes", "200", "--out_dir", "out", cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors == (
        "train.py: error: --report_passes: expected at most passes (100), found 200\n"
    )
    assert not (tmp_path / "out").exists()
