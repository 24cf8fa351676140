"""mc_dropout: masks, averages and scores against closed forms, and the experiment itself."""

import csv
import functools
import itertools
import json
import math
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from projects import call, config_of, data_asked_for, load_project, tiny_run, train, train_until
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from torch import nn

from mc_dropout.model import (
    acquire,
    average_logits,
    average_probs,
    best_temperature,
    bin_of,
    calibration_error,
    dropout_on,
    entropy,
    make_cnn,
    mc_logits,
    mean_and_sd,
    mutual_information,
    paired_difference,
    risks,
    scores,
    standard_logits,
    temper,
)

PROJECT = load_project("mc_dropout")
TRAIN, DATA, MODEL = PROJECT.train, PROJECT.data, PROJECT.model

TINY = [
    "--dataset", "digits", "--device", "cpu", "--image_size", "8", "--widths", "4,6",
    "--hidden", "8", "--runs", "3", "--epochs", "2", "--epoch_steps", "6", "--batch_size", "16",
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


def passes_differ(network: nn.Module, x: torch.Tensor) -> bool:
    logits = mc_logits(network, x, passes=8, seed=0).log_softmax(-1)
    return bool((mutual_information(logits.double()) > 1e-6).all())


def test_dropout_is_found_wherever_it_is():
    """Each pass has masks of its own, in whatever the dropout is nested."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Dropout(0.5))

        def forward(self, x):
            return x + self.inside(x)

    for network in (
        nn.Sequential(inner, nn.Dropout(1e-9), nn.Linear(20, 3)),
        nn.Sequential(inner, nn.Linear(20, 3)),
        nn.Sequential(nn.Sequential(Residual()), nn.Linear(20, 3)),
        Residual(),
    ):
        assert passes_differ(network, torch.randn(5, 20))
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3))
    assert passes_differ(network, torch.randn(5, 4, 8))  # its fast path knows no dropout
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    attention.self_attn.dropout = 0.5
    assert passes_differ(nn.Sequential(attention, nn.Flatten()), torch.randn(5, 4, 8))


def test_the_common_front_of_a_nested_network_is_computed_once():
    front, calls = nn.Linear(20, 20), []
    front.register_forward_hook(lambda layer, x, y: calls.append(len(y)))
    network = nn.Sequential(nn.Sequential(front, nn.ReLU(), nn.Dropout(0.5)), nn.Linear(20, 3))
    flat = nn.Sequential(front, nn.ReLU(), nn.Dropout(0.5), network[1])
    x = torch.randn(5, 20)
    nested = mc_logits(network, x, passes=7, seed=0)
    assert calls == [5]
    assert torch.equal(nested, mc_logits(flat, x, passes=7, seed=0))


def test_dropout_in_place_does_not_spoil_the_next_passes():
    network = nn.Sequential(nn.Identity(), nn.Dropout(0.5, inplace=True), nn.Identity())
    logits = mc_logits(network, torch.ones(4, 400), passes=6, seed=0, chunk_passes=1)
    assert (logits > 0).double().mean((1, 2)).tolist() == pytest.approx([0.5] * 6, abs=0.06)


def test_batch_normalisation_after_dropout_is_refused():
    """Its statistics are those with dropout on (Li et al. 2019)."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )
    with pytest.raises(ValueError, match="batch normalisation after dropout"):
        mc_logits(network, torch.rand(2, 1, 8, 8), passes=2, seed=0)
    before = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5))
    assert mc_logits(before, torch.rand(2, 1, 8, 8), passes=2, seed=0).shape == (2, 2, 64)


def test_many_passes_converge_to_the_mean_over_all_masks():
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
    found = mutual_information(logits.log_softmax(-1))
    assert torch.allclose(found, by_hand(mean) - by_hand(probs).mean(0))
    same = logits[:1].float().expand(5, -1, -1).log_softmax(-1)
    assert (mutual_information(same) >= 0).all()
    assert (mutual_information(same) < 1e-5).all()
    sure = 1000 * torch.eye(4, dtype=torch.float64)[:, None]  # each pass is sure of another class
    assert mutual_information(sure.log_softmax(-1)).item() == pytest.approx(math.log(4))


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
    assert [float(value) for value in perfect.values()] == pytest.approx([1, 0, 0, 0])


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


def test_mean_sd_and_paired_difference():
    mc, standard = np.random.default_rng(0).normal(size=(2, 10, 4))
    standard = standard[:, 0]
    found = mean_and_sd(torch.from_numpy(mc))
    assert np.allclose(found["mean"], mc.mean(0))
    assert np.allclose(found["sd"], mc.std(0, ddof=1))
    found = paired_difference(torch.from_numpy(mc), torch.from_numpy(standard))
    for t in range(4):
        difference = mc[:, t] - standard
        assert found["mean"][t] == pytest.approx(difference.mean())
        assert found["standard_error"][t] == pytest.approx(difference.std(ddof=1) / math.sqrt(10))


def test_one_temperature_is_the_minimum_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    log_probs = (6 * torch.randn(300, 4, generator=generator, dtype=torch.float64)).log_softmax(-1)
    y = torch.distributions.Categorical(logits=log_probs / 3).sample()
    found = best_temperature(log_probs, y)
    grid = torch.linspace(0.5, 8, 3000, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(log_probs / t, y) for t in grid])
    assert found == pytest.approx(float(grid[losses.argmin()]), abs=0.003)
    assert 2 < found < 4.5
    expected = F.nll_loss(temper(log_probs, found), y)
    assert expected == pytest.approx(float(losses.min()), abs=1e-6)
    assert temper(log_probs, found).exp().sum(-1) == pytest.approx(1)
    assert best_temperature(log_probs, log_probs.argmax(1)) == pytest.approx(0.01, rel=1e-3)
    assert best_temperature(log_probs, log_probs.argmin(1)) == pytest.approx(100, rel=1e-3)


def test_risk_is_the_error_rate_of_the_most_certain():
    uncertainty = torch.tensor([0.3, 0.1, 0.9, 0.2])
    hit = torch.tensor([False, True, False, True])
    assert risks(uncertainty, hit).tolist() == pytest.approx([0, 0, 1 / 3, 2 / 4])


# --- active learning --------------------------------------------------------------------------


class Table(nn.Module):
    """Logits by the first pixel: a network whose answers are known."""

    def __init__(self, rows: list[list[float]]):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rows[x.flatten(1)[:, 0].long()]


def test_each_method_asks_for_what_it_says():
    table = Table([[9.0, 0, 0], [0.5, 0.5, -9], [0.2, 0.1, 0.0], [3.0, 0, 0]])
    network = nn.Sequential(table, nn.Dropout(1e-9))
    x = torch.arange(4.0)[:, None]
    options = {"network": network, "x": x, "count": 2, "seed": 0}
    assert acquire("entropy", **options).tolist() == [2, 1]
    assert acquire("mc_entropy", **options).tolist() == [2, 1]
    assert acquire("margin", **options).tolist() == [1, 2]
    drawn = [acquire("random", **options | {"seed": seed}).tolist() for seed in range(20)]
    assert len({tuple(one) for one in drawn}) > 5
    torch.manual_seed(0)
    unsure = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 2, bias=False))
    unsure[1].weight.data = torch.tensor([[2.0], [-2.0]])
    assert acquire("bald", unsure, torch.tensor([[0.0], [0.1], [5.0]]), 1, 0).tolist() == [2]
    blobs = torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0], [9.3], [9.1]])
    sure = nn.Sequential(nn.Identity(), nn.Linear(1, 2))
    groups = {0: "a", 1: "a", 2: "b", 3: "b", 4: "c", 5: "c", 6: "c"}
    places = acquire("coreset", sure, blobs, 3, 0).tolist()
    assert sorted(groups[place] for place in places) == ["a", "b", "c"]


# --- data -------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_fixed_by_the_seed():
    images = DATA.Images(torch.arange(100).byte().view(100, 1, 1, 1), torch.arange(100))
    parts = DATA.split(images, (0.6, 0.1, 0.3), seed=1)
    assert [len(part.x) for part in parts] == [60, 10, 30]
    assert sorted(torch.cat([part.y for part in parts]).tolist()) == list(range(100))
    assert all((part.x.flatten() == part.y).all() for part in parts)
    again = DATA.split(images, (0.6, 0.4), seed=1)
    other = DATA.split(images, (0.6, 0.4), seed=2)
    assert torch.equal(again[0].y, parts[0].y)
    assert not torch.equal(other[0].y, parts[0].y)


def test_digits_and_what_is_strange_to_them():
    digits = DATA.load(dataset="digits", data_dir=Path(), image_size=16, seed=0)
    assert [len(part.x) for part in (digits.train, digits.val, digits.test)] == [898, 180, 719]
    assert digits.test.x.shape[1:] == (1, 16, 16)
    assert digits.test.x.max() > 200
    everything = torch.cat([part.y for part in (digits.train, digits.val, digits.test)])
    from sklearn.datasets import load_digits as bundled

    assert everything.bincount().tolist() == np.bincount(bundled().target).tolist()
    means = torch.stack([digits.train.x[digits.train.y == c].float().mean(0) for c in range(10)])
    distance = torch.cdist(digits.test.x.flatten(1).float(), means.flatten(1))
    assert (distance.argmin(1) == digits.test.y).double().mean() > 0.85  # images keep their class
    assert list(digits.strange) == ["photographs", "turned by 90°"]
    crops = digits.strange["photographs"].float()
    assert crops.shape == (719, 1, 16, 16)
    assert digits.test.x[..., 0, 0].float().mean() < 5 < 30 < crops[..., 0, 0].mean()
    assert (crops.mean((1, 2, 3)).std() > 20) and (crops.std((1, 2, 3)) > 3).double().mean() > 0.7
    turned = digits.test.x.rot90(1, (2, 3)).float()
    assert (digits.strange["turned by 90°"].float() - turned).abs().max() <= 1


def test_a_quarter_turn_is_counterclockwise():
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(DATA.rotate(x, 90), x.rot90(1, (2, 3)), atol=1e-5)


def test_more_labels_hold_the_fewer_ones():
    images = DATA.Images(torch.arange(100).byte().view(100, 1, 1, 1), torch.arange(100))
    few, more = DATA.choose_images(images, 10, seed=3), DATA.choose_images(images, 30, seed=3)
    assert len(set(few.y.tolist())) == 10
    assert torch.equal(more.y[:10], few.y)
    assert torch.equal(more.x.flatten(), more.y.byte())
    assert not torch.equal(DATA.choose_images(images, 10, seed=4).y, few.y)


def test_batches_hold_every_image_as_often_in_another_order_each_time():
    images = DATA.Images(torch.arange(20).byte().view(20, 1, 1, 1), torch.arange(20))
    torch.manual_seed(0)
    first = list(DATA.training_batches(images, 6, 10))
    second = list(DATA.training_batches(images, 6, 10))
    assert [len(y) for _, y in first] == [6] * 10
    seen = torch.cat([y for _, y in first])
    assert seen[:20].sort().values.tolist() == list(range(20))
    assert seen[20:40].sort().values.tolist() == list(range(20))
    assert not torch.equal(seen[:20], seen[20:40])
    assert not torch.equal(seen, torch.cat([y for _, y in second]))
    pixels = torch.cat([x for x, _ in first]).flatten()
    assert torch.allclose(pixels, seen / 255)


def write_idx(folder: Path, name: str, count: int) -> None:
    """Files of MNIST's format with `count` training images and half as many for testing."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for part, size in (("train", count), ("t10k", count // 2)):
        images = struct.pack(">4i", 2051, size, 28, 28) + bytes(i % 251 for i in range(size)) * 784
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2i", 2049, size) + bytes(i % 10 for i in range(size))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def test_mnist_is_read_from_its_folder_together_with_fashion(tmp_path):
    write_idx(tmp_path, "MNIST", 120)
    write_idx(tmp_path, "FashionMNIST", 40)
    options = {"dataset": "mnist", "data_dir": tmp_path, "image_size": 28, "seed": 0}
    data = DATA.load(**options)
    assert (data.name, data.note) == ("MNIST", "data: MNIST")
    assert [len(part.x) for part in (data.train, data.val, data.test)] == [110, 10, 60]
    assert data.test.y.tolist() == [i % 10 for i in range(60)]
    assert data.strange["FashionMNIST"].shape == (20, 1, 28, 28)
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-20])
    with pytest.raises(DATA.DataError, match=r"train-labels-idx1-ubyte: damaged"):
        DATA.load(**options)


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


def test_a_folder_of_your_own(tmp_path):
    folder = make_folder(tmp_path / "shades")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    data = DATA.load(dataset="folder", data_dir=folder, image_size=10, seed=0)
    assert "unreadable files left out: 1, the first: " in data.note
    assert [len(part.x) for part in (data.train, data.val, data.test)] == [22, 2, 12]
    assert data.classes == ("dark", "light")
    for x, y in (data.train, data.val, data.test):
        assert torch.equal(x.float().mean((1, 2, 3)) > 110, y == 1)
    assert data.strange["photographs"].shape == (12, 3, 10, 10)


def test_a_folder_at_fault_is_named_in_one_line(tmp_path):
    folder = make_folder(tmp_path / "shades", test_classes=("dark", "grey"))
    options = {"dataset": "folder", "data_dir": folder, "image_size": 10, "seed": 0}
    with pytest.raises(DATA.DataError, match="class 'grey' is not in both"):
        DATA.load(**options)
    for path in sorted((folder / "test" / "grey").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DATA.DataError, match="expected at least 10 readable pictures"):
        DATA.load(**options)
    (folder / "test" / "white").mkdir()
    with pytest.raises(DATA.DataError, match=r"white: there is no picture.*\(expected train/CLASS"):
        DATA.load(**options)


def test_data_are_asked_for_by_the_seed(tmp_path):
    flags = [*TINY, "--seed", 7, "--out_dir", tmp_path]
    assert data_asked_for(PROJECT, *flags)["seed"] == 7


# --- settings ---------------------------------------------------------------------------------

tiny_config = functools.partial(config_of, PROJECT, *TINY)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report_passes", "200"], r"report_passes: expected at most passes \(5\), found 200"),
        (["--dropout", "1"], "dropout: expected less than 1, found 1"),
        (["--runs", "1"], "runs: expected at least 2, found 1"),
        (["--study", "true", "--compare", "false"], "study: expected false where compare is false"),
        (["--active", "true", "--active_pool", "50"], "active_pool: expected at least the 120"),
        (["--image_size", "500"], "image_size: expected at most 128, found 500"),
    ],
)
def test_impossible_settings_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(*flags)


def test_more_labels_than_there_are_is_named():
    with pytest.raises(DATA.DataError, match=r"train_images: expected at most 898, .* found 899"):
        TRAIN.load_data(tiny_config("--train_images", "899"), torch.device("cpu"))


# --- two steps by hand ------------------------------------------------------------------------


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Rate and momentum are annealed by cosines: up over 30% of the steps from a 25th, down to
    nothing.
    """
    up = 0.3 * steps - 1
    if step <= up:
        low, high, done = peak / 25, peak, step / up
    else:
        low, high, done = peak, peak / 25e4, (step - up) / (steps - 1 - up)
    return low + (high - low) * (1 - math.cos(math.pi * done)) / 2


def momentum(step: int, steps: int) -> float:
    up = 0.3 * steps - 1
    first, last, done = (
        (0.95, 0.85, step / up) if step <= up else (0.85, 0.95, (step - up) / (steps - 1 - up))
    )
    return first + (last - first) * (1 - math.cos(math.pi * done)) / 2


def test_two_steps_by_hand():
    """Forward with dropout, cross-entropy, AdamW with its decay, the one-cycle rate."""
    flags = ["--epoch_steps", "2", "--epochs", "10", "--batch_size", "7", "--weight_decay", "0.3"]
    config = tiny_config(*flags)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images = DATA.Images(x, torch.randint(3, (12,), generator=generator))
    network, expected = small_cnn().double(), small_cnn().double()
    optimizer, schedule = TRAIN.one_cycle_optimizer(network, config)
    step_by_step = {"labelled": images, "config": config, "label": ""}
    convert = DATA.as_float

    DATA.as_float = lambda x: convert(x).double()  # rounding would hide small faults
    try:
        torch.manual_seed(5)
        loss = TRAIN.train_one_epoch(
            network, optimizer=optimizer, schedule=schedule, **step_by_step
        )
    finally:
        DATA.as_float = convert
    torch.manual_seed(5)
    order = torch.cat([torch.randperm(12), torch.randperm(12)])[:14]
    first, second, losses = {}, {}, []
    for step, chosen in enumerate(order.split(7)):
        expected.train()
        logits = expected((x[chosen].float() / 255).double())
        hand = -(logits.log_softmax(1)[torch.arange(7), images.y[chosen]]).mean()
        losses.append(float(hand.detach()))
        gradients = torch.autograd.grad(hand, list(expected.parameters()))
        rate, beta = one_cycle(step, 20, config.lr), momentum(step, 20)
        for place, (weight, g) in enumerate(zip(expected.parameters(), gradients, strict=True)):
            first[place] = beta * first.get(place, 0) + (1 - beta) * g
            second[place] = 0.999 * second.get(place, 0) + 0.001 * g**2
            up, down = (
                first[place] / (1 - beta ** (step + 1)),
                second[place] / (1 - 0.999 ** (step + 1)),
            )
            with torch.no_grad():
                weight *= 1 - rate * config.weight_decay
                weight -= rate * up / (down.sqrt() + 1e-8)
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-9)
    for name, value in network.state_dict().items():
        assert torch.allclose(value, expected.state_dict()[name], rtol=1e-6, atol=1e-9), name
    assert network.training


def test_evaluation_is_a_mean_over_images_with_dropout_off_and_on():
    config, network = tiny_config(), small_cnn()
    x = torch.randint(256, (230, 1, 8, 8), dtype=torch.uint8)
    images = DATA.Images(x, torch.randint(3, (230,)))
    network.train()
    found = TRAIN.evaluate(network, images, config)
    logits = network.eval()(x / 255)
    assert found["val_loss"] == pytest.approx(
        float(F.cross_entropy(logits.detach(), images.y)), rel=1e-5
    )
    hits = (logits.argmax(1) == images.y).double().mean()
    assert found["val_accuracy"] == pytest.approx(float(hits))
    assert found["val_mc_loss"] != pytest.approx(found["val_loss"], rel=1e-6)
    assert list(TRAIN.evaluate(network, images, tiny_config("--compare", "false"))) == [
        "val_mc_loss",
        "val_mc_accuracy",
    ]


# --- known answers ----------------------------------------------------------------------------


def known_data() -> object:
    """Ten test images of class 0, which the first pixel tells apart; strange ones apart, too."""

    def images(first: range) -> torch.Tensor:
        x = torch.zeros(len(first), 1, 8, 8, dtype=torch.uint8)
        x[:, 0, 0, 0] = torch.tensor(list(first)).byte()
        return x

    zeros = torch.zeros(10, dtype=torch.long)
    parts = {"train": range(10), "val": range(10, 20), "test": range(20, 30)}
    parts = {name: DATA.Images(images(numbers), zeros) for name, numbers in parts.items()}
    strange = {"photographs": images(range(30, 35)), "turned by 90°": images(range(35, 40))}
    return DATA.Data("known", ("a", "b"), **parts, strange=strange, note="")


def log_odds(rights: list[float]) -> torch.Tensor:
    """Logits (N, 2) for which the probability of class 0 is as given."""
    right = torch.tensor(rights, dtype=torch.float64)
    return torch.stack((right.log(), (1 - right).log()), 1)


def test_each_number_of_the_headline_is_the_one_of_its_arm(monkeypatch):
    """Standard dropout is right on 6 of 10, MC on 8; both say .9, over all passes but the first."""
    config, data = tiny_config("--report_passes", "2"), known_data()
    standard = {10: [0.9] * 9 + [0.1], 20: [0.9] * 6 + [0.1] * 4, 30: [0.6] * 5, 35: [0.9] * 5}
    standard[0] = [0.9] * 10
    mc = {0: [0.9] * 10, 10: [0.9] * 5 + [0.1] * 5, 20: [0.9] * 8 + [0.1] * 2, 30: [0.9] * 5}
    mc[35] = [0.9] * 5

    def says(table: dict, x: torch.Tensor) -> torch.Tensor:
        return log_odds(table[int(255 * x[0, 0, 0, 0] + 0.5)])

    def passes_say(network, x, passes, seed):
        logits = says(mc, x).expand(passes, -1, -1).clone()
        if int(255 * x[0, 0, 0, 0] + 0.5) == 35:  # passes disagree about turned images
            logits[1] = logits[1].flip(1)
        if int(255 * x[0, 0, 0, 0] + 0.5) == 30:  # and, surer than of test images, of photographs
            logits[0], logits[1] = log_odds([0.99] * 5), log_odds([0.85] * 5)
        logits[2:] = 7.0  # what comes after report_passes must not matter
        return logits

    monkeypatch.setattr(TRAIN, "standard_logits", lambda network, x: says(standard, x))
    monkeypatch.setattr(TRAIN, "mc_logits", passes_say)
    outcomes = [TRAIN.assess(None, data.train, data, config, n) for n in range(3)]
    metrics = TRAIN.summarise(outcomes, config)
    metrics["ensemble"] = TRAIN.assess_ensemble(outcomes, data)
    metrics["timing"] = {f"passes_{t}_seconds_per_10000": float(t) for t in (1, 10, 100)}
    found = TRAIN.headline(metrics, config)

    def nll(right: int, confidence: float) -> float:
        return -(right * math.log(confidence) + (10 - right) * math.log(1 - confidence)) / 10

    unsure = 1 / (1 + (0.1 / 0.9) ** 0.01)  # at the largest temperature, 100
    expected = {
        "standard_accuracy": 0.6,
        "standard_nll": nll(6, 0.9),
        "standard_nll_tempered": nll(6, 0.9),  # on validation it is right as often as it says
        "standard_ece": 0.3,
        "standard_ece_tempered": 0.3,
        "standard_risk": sum(max(0, k - 6) / k for k in range(1, 11)) / 10,
        "standard_auroc": 1.0,  # it is less sure of photographs than of any test image
        "mc_accuracy": 0.8,
        "mc_nll": nll(8, 0.9),
        "mc_nll_tempered": nll(8, unsure),  # right on half of validation: it should say .5
        "mc_ece": 0.1,
        "mc_ece_tempered": 0.8 - unsure,
        "mc_risk": sum(max(0, k - 8) / k for k in range(1, 11)) / 10,
        "mc_auroc": 1.0,  # by what passes disagree about
        "ensemble_nll": nll(6, 0.9),
        "cost_ratio_100_passes": 100.0,
    }
    assert found == pytest.approx(expected, abs=2e-3) and list(found) == list(expected)
    turned = {kind: one["mean"] for kind, one in metrics["auroc"]["turned by 90°"].items()}
    assert turned["mutual_information"] == turned["mc_entropy"] == 1
    assert turned["standard_entropy"] == 0.5
    assert metrics["test"]["mc_minus_standard"]["accuracy"]["mean"][1] == pytest.approx(0.2)
    difference = metrics["test"]["mc_minus_standard_tempered"]["nll"]["mean"]
    assert difference == pytest.approx(nll(8, unsure) - nll(6, 0.9), abs=1e-3)
    photographs = metrics["auroc"]["photographs"]
    assert photographs["mc_entropy"]["mean"] == 0
    minus = {kind: found["minus_standard"]["mean"] for kind, found in photographs.items()}
    assert minus == {"mutual_information": 0, "mc_entropy": -1, "standard_entropy": 0}
    assert metrics["ensemble"]["auroc"] == {"photographs": 1.0, "turned by 90°": 0.5}


def test_validation_is_of_the_mean_over_all_its_passes(monkeypatch):
    """The first pass is wrong about all images."""

    def passes_say(network, x, passes, seed):
        return torch.stack([log_odds([0.1] * 10)] + [log_odds([0.9] * 10)] * (passes - 1))

    monkeypatch.setattr(TRAIN, "mc_logits", passes_say)
    row = TRAIN.evaluate(None, known_data().val, tiny_config("--compare", "false"))
    mean = (0.1 + 0.9 * (TRAIN.VAL_PASSES - 1)) / TRAIN.VAL_PASSES
    assert row == pytest.approx({"val_mc_loss": -math.log(mean), "val_mc_accuracy": 1.0})


def test_plots_are_given_the_arms_that_they_name(monkeypatch, tmp_path):
    rights = {"mc": ([0.8] * 10, [0.7] * 10), "standard": ([0.6] * 10, [0.5] * 10)}
    outcomes = [
        TRAIN.Outcome({}, {"mc_entropy": torch.tensor([float(n)])}, {}, {
            name: {"test": log_odds(right[n])} for name, right in rights.items()
        }) for n in range(2)
    ]  # fmt: skip
    metrics = {"test": {name: {"ece": {"mean": name}} for name in rights}}
    given, data = {}, known_data()
    monkeypatch.setattr(TRAIN, "try_plot", lambda plot, *a: given.update({plot.__name__: a}))
    TRAIN.plot_results(metrics, outcomes, "network", data, tiny_config(), tmp_path)
    assert given["plot_worth"][0] is given["plot_passes"][0] is metrics
    assert given["plot_worth"][1]["mc_entropy"].tolist() == [[0], [1]]
    log_probs, y, ece, *_ = given["plot_reliability"]
    assert ece == {"mc": "mc", "standard": "standard"} and torch.equal(y, data.test.y)
    for name, right in rights.items():
        assert torch.equal(log_probs[name], torch.stack([log_odds(one) for one in right]))
    images, _, probs, classes, *_ = given["plot_certainty"]  # of run 0, with dropout on
    assert torch.equal(images, data.test.x) and classes == data.classes
    assert probs[:, 0].tolist() == pytest.approx([0.8] * 10)
    assert given["plot_turning"][0] == "network"


def test_active_learning_is_tested_on_the_test_images_and_asks_what_it_does_not_know(
    tmp_path, monkeypatch
):
    """A network that is right on 7 of 10 test images, asked of the first that has no label."""

    def says(network, x):
        return log_odds([0.9] * 7 + [0.1] * 3 if int(255 * x[0, 0, 0, 0] + 0.5) == 20 else [0.9])

    flags = ["--active_pool", "8", "--active_start", "2", "--active_step", "1"]
    config, seen = tiny_config(*flags, "--active_rounds", "3"), []
    monkeypatch.setattr(TRAIN, "standard_logits", says)
    monkeypatch.setattr(TRAIN, "acquire", lambda *parts: torch.arange(1))
    monkeypatch.setattr(
        TRAIN, "train_one_epoch", lambda _, some, *rest: seen.append(some.x[:, 0, 0, 0]) or 0.0
    )
    rows = TRAIN.ask("entropy", known_data(), config, tmp_path, 0)
    assert [row["test_accuracy"] for row in rows] == [0.7] * 4
    assert [row["labels"] for row in rows] == [2, 3, 4, 5]
    known = [set(images.tolist()) for images in seen[:: config.epochs]]
    assert known[0] < known[1] < known[2] < known[3]


def test_the_ensemble_averages_the_networks_probabilities():
    data = known_data()
    rights = ([0.8] * 10, [0.4] * 10)
    outcomes = [
        TRAIN.Outcome({}, {}, {}, {"standard": dict.fromkeys(
            ("val", "test", *data.strange), log_odds(one).log_softmax(-1))})
        for one in rights
    ]  # fmt: skip
    outcomes = [
        one._replace(log_probs={"standard": {
            part: x[: 5 if part in data.strange else 10] for part, x in
            one.log_probs["standard"].items()}})
        for one in outcomes
    ]  # fmt: skip
    found = TRAIN.assess_ensemble(outcomes, data)
    assert found["networks"] == 2
    assert found["plain"]["nll"] == pytest.approx(-math.log(0.6), abs=1e-6)
    assert found["plain"]["accuracy"] == 1


# --- one tiny run, looked at from all sides ---------------------------------------------------


def tiny() -> tuple[Path, dict]:
    folder = tiny_run("mc_dropout")[0]
    return folder, json.loads((folder / "metrics.json").read_text())


def rows_of(folder: Path) -> list[dict]:
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def network_of(folder: Path, number: int) -> nn.Sequential:
    network = make_cnn(channels=1, classes=10, widths=(4, 6), hidden=8, dropout=0.5)
    network.load_state_dict(torch.load(folder / f"run{number}.pt", weights_only=True))
    return network.eval()


def by_hand(log_probs: np.ndarray, y: np.ndarray) -> dict[str, float]:
    probs = np.exp(log_probs)
    top, hit = probs.max(1), probs.argmax(1) == y
    bins = np.minimum(np.ceil(top * 15).astype(int), 15)
    ece = sum(abs(hit[bins == b].sum() - top[bins == b].sum()) for b in range(1, 16)) / len(y)
    nll = log_loss(y, probs, labels=range(10))
    return {"accuracy": accuracy_score(y, probs.argmax(1)), "nll": nll, "ece": ece}


def unsure_of(said: dict, side: str, part: str) -> np.ndarray:
    """Entropy of standard dropout, mutual information of MC dropout."""
    mean = -(np.exp(said[side, part]) * said[side, part]).sum(1)
    each = said["passes", part]
    return mean if side == "standard" else mean + (each * np.log(each)).sum(2).mean(0)


def test_the_headline_is_computed_again_from_the_saved_weights():
    folder, report = tiny()
    digits = DATA.load(dataset="digits", data_dir=Path(), image_size=8, seed=0)
    images = {"val": digits.val.x, "test": digits.test.x, "odd": digits.strange["photographs"]}
    found = []
    for number in range(3):
        network, said = network_of(folder, number), {}
        for part, x in images.items():
            with torch.no_grad():
                said["standard", part] = network(x / 255).double().log_softmax(-1).numpy()
            logits = mc_logits(network, x / 255, passes=5, seed=number)[:4].double()
            said["passes", part] = logits.softmax(-1).numpy()
            said["mc", part] = np.log(said["passes", part].mean(0))
        row, y = {}, digits.test.y.numpy()
        for side in ("standard", "mc"):
            row |= {f"{side}_{k}": v for k, v in by_hand(said[side, "test"], y).items()}
            grid = np.exp(np.linspace(math.log(0.01), math.log(100), 4000))
            val = torch.from_numpy(said[side, "val"])
            losses = [float(F.cross_entropy(val / t, digits.val.y)) for t in grid]
            scaled = torch.from_numpy(said[side, "test"]) / grid[np.argmin(losses)]
            row[f"{side}_nll_tempered"] = by_hand(scaled.log_softmax(1).numpy(), y)["nll"]
            unsure = -(np.exp(said[side, "test"]) * said[side, "test"]).sum(1)
            wrong = (said[side, "test"].argmax(1) != y)[np.argsort(unsure, kind="stable")]
            row[f"{side}_risk"] = (wrong.cumsum() / np.arange(1, len(y) + 1)).mean()

        for side in ("standard", "mc"):
            pair = [unsure_of(said, side, part) for part in ("test", "odd")]
            truth = np.repeat([0, 1], [len(part) for part in pair])
            row[f"{side}_auroc"] = roc_auc_score(truth, np.concatenate(pair))
        found.append(row)
    for name in found[0]:
        expected = np.mean([row[name] for row in found])
        assert report["headline"][name] == pytest.approx(expected, abs=2e-5), name
    said = [network_of(folder, n)(digits.test.x / 255).softmax(1).double() for n in range(3)]
    mean = torch.stack(said).mean(0).log().detach().numpy()
    expected = log_loss(digits.test.y, np.exp(mean), labels=range(10))
    assert report["headline"]["ensemble_nll"] == pytest.approx(expected, abs=1e-5)


def test_what_a_run_leaves():
    folder, report = tiny()
    rows = rows_of(folder)
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        (f"run{n}", str(epoch)) for n in range(3) for epoch in (1, 2)
    ]
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {"worth", "passes", "rotation", "reliability", "certainty"}
    metrics = report["metrics"]
    assert set(metrics["auroc"]) == {"photographs", "turned by 90°"}
    assert (
        len(metrics["test"]["mc"]["nll"]["mean"]) == len(metrics["train"]["mc"]["nll"]["sd"]) == 5
    )
    history = torch.load(folder / "history.pt", weights_only=True)
    assert history["finished"]
    state = torch.load(folder / "model.pt", weights_only=True)
    for name, value in network_of(folder, 0).state_dict().items():
        assert torch.equal(state["weights"][name], value)
    others = [network_of(folder, n).state_dict()["0.weight"] for n in range(3)]
    assert not torch.equal(others[0], others[1]) and not torch.equal(others[1], others[2])


def test_the_last_weights_are_those_after_all_steps(monkeypatch, tmp_path):
    """Nothing chooses an epoch: fit leaves what training left."""
    config = tiny_config()
    data = TRAIN.load_data(config, torch.device("cpu"))
    left, steps = [], []
    train_one_epoch = TRAIN.train_one_epoch

    def watch(network, labelled, optimizer, *rest):
        loss = train_one_epoch(network, labelled, optimizer, *rest)
        left.append({name: x.clone() for name, x in network.state_dict().items()})
        steps.append(int(next(iter(optimizer.state.values()))["step"]))
        return loss

    monkeypatch.setattr(TRAIN, "train_one_epoch", watch)
    PROJECT.run.open_run(tmp_path / "run", config, "known")
    some = DATA.choose_images(data.train, 50, 0)
    network = TRAIN.fit("run0", some, data, config, tmp_path / "run", 0)
    assert steps == [6, 12]
    for name, value in network.state_dict().items():
        assert torch.equal(value, left[-1][name])
    assert not torch.equal(left[0]["0.weight"], left[1]["0.weight"])


def test_each_run_begins_with_weights_of_its_own():
    config = tiny_config()
    data = TRAIN.load_data(config, torch.device("cpu"))
    first, again, other = (TRAIN.new_network(data, config, number) for number in (0, 0, 1))
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert first[-2].p == first[-5].p == config.dropout


def numbers_of(data: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict:
    """Rows, weights and metrics of a tiny run on `data`, without pictures and timing."""
    with monkeypatch.context() as patch:
        patch.setattr(TRAIN, "load_data", lambda config, device: data)
        patch.setattr(TRAIN, "plot_results", lambda *_: None)
        times = {f"passes_{t}_seconds_per_10000": 1.0 for t in (1, 10, 100)}
        patch.setattr(TRAIN, "time_passes", lambda *_: times)
        output = call(TRAIN, *TINY, "--runs", "2", *flags, "--out_dir", tmp_path)
    folder = Path(output.splitlines()[-1])
    report = json.loads((folder / "metrics.json").read_text())
    return {
        "weights": {name: x.tolist() for name, x in network_of(folder, 1).state_dict().items()},
        "train_loss": [row["train_loss"] for row in rows_of(folder)],
        "val_rows": [(row["val_loss"], row["val_mc_loss"]) for row in rows_of(folder)],
        "train": report["metrics"]["train"],
        "test": {k: v for k, v in report["metrics"]["test"].items() if "tempered" not in k},
        "tempered": [report["metrics"]["test"][f"{s}_tempered"] for s in ("standard", "mc")],
        "temperature": [
            report["metrics"]["test"][f"{s}_tempered"]["temperature"] for s in ("standard", "mc")
        ],
        "risk": report["metrics"]["risk"],
        "auroc": report["metrics"]["auroc"],
        "ensemble": report["metrics"]["ensemble"]["plain"],
        "active": report["metrics"].get("active"),
    }


def other_labels(images: object) -> object:
    return images._replace(y=images.y.flip(0))


def other_images(images: object) -> object:
    return images._replace(x=255 - images.x)


def test_what_each_part_of_the_data_may_move(tmp_path, monkeypatch):
    """A leak is an output that moves, a dead wire one that does not."""
    data = TRAIN.load_data(tiny_config(), torch.device("cpu"))
    order = torch.randperm(898, generator=torch.Generator().manual_seed(0))
    used, unused = order[:50], order[50:]

    def disturbed(places: torch.Tensor) -> object:
        x, y = data.train.x.clone(), data.train.y.clone()
        x[places], y[places] = 255 - x[places], (y[places] + 1) % 10
        return data._replace(train=DATA.Images(x, y))

    odd = {name: 255 - x for name, x in data.strange.items()}
    everything = {"weights", "train_loss", "val_rows", "train", "test", "tempered", "temperature"}
    everything |= {"risk", "auroc", "ensemble"}
    table = {
        "labelled": (disturbed(used), everything),
        "not labelled": (disturbed(unused), set()),
        "validation labels": (
            data._replace(val=other_labels(data.val)), {"val_rows", "tempered", "temperature"}
        ),
        "validation images": (
            data._replace(val=other_images(data.val)), {"val_rows", "tempered", "temperature"}
        ),
        "test labels": (
            data._replace(test=other_labels(data.test)), {"test", "tempered", "risk", "ensemble"}
        ),
        "test images": (
            data._replace(test=other_images(data.test)),
            {"test", "tempered", "risk", "auroc", "ensemble"},
        ),
        "strange images": (data._replace(strange=odd), {"auroc"}),
    }  # fmt: skip
    before = numbers_of(data, tmp_path, monkeypatch)
    for name, (changed, moves) in table.items():
        after = numbers_of(changed, tmp_path, monkeypatch)
        assert {key for key in before if before[key] != after[key]} == moves, name


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    whole, report = tiny()
    train_until("mc_dropout", 3, *TINY, "--out_dir", tmp_path)
    (broken,) = tmp_path.iterdir()
    assert not (broken / "metrics.json").exists()
    resumed = json.loads((train("mc_dropout", "--resume", broken) / "metrics.json").read_text())
    for one in (report, resumed):
        one["metrics"].pop("timing")
    assert resumed["metrics"] == report["metrics"]
    assert rows_of(broken) == rows_of(whole)


def test_without_a_comparison_nothing_of_standard_dropout_is_left(tmp_path):
    flags = [*TINY, "--compare", "false", "--out_dir", tmp_path / "my runs"]
    *_, use, last = call(TRAIN, *flags).splitlines()
    folder = Path(last)
    assert shlex.split(use)[4] == last  # a command to copy
    report = json.loads((folder / "metrics.json").read_text())
    assert not [name for name in report["headline"] if name.startswith(("standard", "ensemble"))]
    assert "standard" not in json.dumps(report["metrics"]["test"])
    assert not (folder / "run1.pt").exists()
    assert "val_loss" not in rows_of(folder)[0]
    _, whole = tiny()
    assert rows_of(folder)[-1]["train_loss"] == rows_of(tiny()[0])[1]["train_loss"]
    assert set(report["headline"]) < set(whole["headline"])
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {"worth", "passes", "rotation", "reliability", "certainty"}


STUDIES = [
    "--study", "true", "--study_images", "20,50", "--active", "true", "--active_start", "10",
    "--active_step", "5", "--active_rounds", "2", "--active_pool", "60", "--active_seeds", "2",
]  # fmt: skip


def test_studies_and_active_learning(tmp_path, monkeypatch):
    """The size of labels, who starts with what, and what no method may see: hidden labels."""
    asked, trained, assessed = [], [], []
    acquire_, train_, assess_ = TRAIN.acquire, TRAIN.train_one_epoch, TRAIN.assess

    def watch(method, network, x, count, seed):
        places = acquire_(method, network, x, count, seed)
        asked.append((method, len(x), count, x[places].flatten(1).sum(1).tolist()))
        return places

    def watch_train(network, labelled, optimizer, schedule, config, label):
        start = float(network[0].weight.detach().abs().sum())
        loss = train_(network, labelled, optimizer, schedule, config, label)
        trained.append((label, len(labelled.y), start, labelled.y.sum().item()))
        return loss

    def watch_assess(network, labelled, *rest):
        assessed.append((len(labelled.y), float(labelled.x.float().mean())))
        return assess_(network, labelled, *rest)

    monkeypatch.setattr(TRAIN, "acquire", watch)
    monkeypatch.setattr(TRAIN, "train_one_epoch", watch_train)
    monkeypatch.setattr(TRAIN, "assess", watch_assess)
    folder = train("mc_dropout", *TINY, *STUDIES, "--out_dir", tmp_path)
    report = json.loads((folder / "metrics.json").read_text())
    assert list(report["metrics"]["study"]) == ["20", "50"]
    assert [count for count, _ in assessed] == [50] * 3 + [20] * 3 + [50] * 3
    of_runs = [len({mean for _, mean in assessed[first : first + 3]}) for first in (0, 3, 6)]
    assert of_runs == [1, 3, 3]  # in the study each run draws its own labels
    nll = report["metrics"]["study"]["20"]
    difference = nll["mc"]["nll"]["mean"] - nll["standard"]["nll"]["mean"]
    assert nll["mc_minus_standard"]["nll"]["mean"] == pytest.approx(difference, abs=1e-6)

    active = report["metrics"]["active"]
    assert active["labels"] == [10, 15, 20]
    rows = [row for row in rows_of(folder) if row["stage"].startswith("active")]
    for method in TRAIN.METHODS:
        stages = [f"active-{method}-seed{seed}" for seed in (0, 1)]
        of_method = [
            [float(row["test_accuracy"]) for row in rows if row["stage"] == stage]
            for stage in stages
        ]
        assert active[method]["mean"] == pytest.approx(np.mean(of_method, 0), abs=1e-6)
        random = np.array(active["random"]["mean"])
        minus = np.array(active[method]["minus_random"]["mean"])
        assert minus == pytest.approx(np.array(active[method]["mean"]) - random, abs=2e-6)
        over = active[method]["minus_entropy_over_rounds"]["mean"]
        expected = np.mean(active[method]["mean"]) - np.mean(active["entropy"]["mean"])
        assert over == pytest.approx(expected, abs=2e-6)
    assert report["headline"]["active_bald_accuracy"] == pytest.approx(
        np.mean(active["bald"]["mean"])
    )
    assert len(asked) == 6 * 2 * 3 and {one[2] for one in asked} == {5}
    assert [one[1] for one in asked[:3]] == [50, 45, 40]
    first = [one for one in trained if "seed0 round 1 epoch 1" in one[0]]
    assert len(first) == 6 and len({one[1:] for one in first}) == 1  # the same labels and weights
    other = [one for one in trained if "seed1 round 1 epoch 1" in one[0]]
    assert other[0][2:] != first[0][2:]

    data = TRAIN.load_data(tiny_config(*STUDIES), torch.device("cpu"))
    before, asked_before = active, list(asked)
    asked.clear()
    pool = torch.randperm(898, generator=torch.Generator().manual_seed(0))[:60]
    known = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:10]
    hidden = torch.ones(898, dtype=torch.bool)
    hidden[pool[known]] = False
    y = torch.where(hidden, (data.train.y + 1) % 10, data.train.y)
    flags = [*STUDIES, "--study", "false", "--active_seeds", "2"]
    changed = data._replace(train=DATA.Images(data.train.x, y))
    after = numbers_of(changed, tmp_path / "hidden", monkeypatch, *flags)["active"]
    for place in range(0, len(asked), 6):  # the first round of seed 0, of each method
        assert asked[place] == asked_before[place]
    assert after["bald"]["mean"][1:] != before["bald"]["mean"][1:]


# --- your own pictures ------------------------------------------------------------------------


def test_predict_agrees_with_evaluation(tmp_path):
    folder, _ = tiny()
    digits = DATA.load(dataset="digits", data_dir=Path(), image_size=8, seed=0)
    pictures = tmp_path / "mine"
    pictures.mkdir()
    for number, picture in enumerate(digits.test.x[:12]):
        Image.fromarray(picture[0].numpy()).save(pictures / f"{number:02}.png")
    (pictures / "a broken one.png").write_bytes(b"no picture")
    output = call(PROJECT.predict, folder, pictures, "--out_dir", tmp_path / "out")
    results = Path(output.splitlines()[-1])
    with (results / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{n:02}.png" for n in range(12)]
    assert "unreadable: 1" in output and "a broken one.png" in output
    config = tiny_config("--passes", "4")  # as many as predict.py makes
    answer = TRAIN.answer(network_of(folder, 0), digits.test.x[:12], None, config, 0)
    probs = answer.log_probs["mc"].exp()
    assert [row["class"] for row in rows] == [str(int(c)) for c in probs.argmax(1)]
    columns = {
        "probability": probs.max(1).values,
        "entropy": answer.uncertainty["mc_entropy"],
        "mutual_information": answer.uncertainty["mutual_information"],
    }
    for name, values in columns.items():
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), abs=2e-6)
    assert (results / "certainty.png").is_file()


def test_pictures_of_any_kind_are_taken(tmp_path):
    folder, _ = tiny()
    generator = np.random.default_rng(0)
    ramp = generator.integers(0, 255, (17, 23), dtype=np.uint8)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray((ramp.astype(np.uint16) + 1) * 200).save(tmp_path / "grey16.png")
    Image.fromarray(np.dstack([ramp] * 4)).save(tmp_path / "alpha.png")
    picture = Image.fromarray(np.dstack([ramp] * 3))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    output = call(PROJECT.predict, folder, tmp_path, "--out_dir", tmp_path / "out", "--invert")
    results = Path(output.splitlines()[-1])
    assert len((results / "predictions.csv").read_text().splitlines()) == 1 + 4
    with pytest.raises(DATA.DataError, match="no picture could be read"):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "x.png").write_bytes(b"x")
        call(PROJECT.predict, folder, tmp_path / "x", "--out_dir", tmp_path / "out")


def test_pictures_survive_the_least_data(tmp_path):
    """Two images, one class of them, a name with a dollar."""
    plots, path = PROJECT.plots, tmp_path / "a.png"
    log_probs = {"mc": torch.full((1, 2, 2), 0.5).log()}
    y = torch.zeros(2, dtype=torch.long)
    plots.plot_reliability(log_probs, y, {"mc": 0.1}, "a", path)
    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    plots.plot_certainty(x, y, log_probs["mc"][0].exp(), ("$a$", "b"), "a", path)
    probs = {"mc": torch.full((2, 3, 2), 0.5)}
    plots.plot_rotation(torch.zeros(3, 1, 8, 8), [0, 15, 30], probs, ("$a", "b"), "a", path)
    plots.plot_extremes({"most certain": [("$", x[0])], "least certain": []}, path)
    assert path.is_file()


def test_the_network_can_be_exported():
    network = small_cnn().eval()
    x = torch.rand(2, 1, 12, 12)
    exported = torch.export.export(network, (x,)).module()
    assert torch.allclose(exported(x), network(x), atol=1e-6)
