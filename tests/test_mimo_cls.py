"""mimo_cls: what ports get wrong, scores against brute force, and the experiment itself."""

import csv
import functools
import itertools
import json
import math
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from projects import call, config_of, data_asked_for, load_project, tiny_run, train, train_until
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from mimo_cls.model import (
    MimoWideResNet,
    best_temperature,
    bin_of,
    calibration_error,
    cost,
    diversity,
    ensemble_log_probs,
    entropy,
    error_over_sources,
    independence,
    mimo_loss,
    mutual_information,
    overhead,
    scores,
    temper,
    variance_shares,
)

PROJECT = load_project("mimo_cls")
TRAIN, data = PROJECT.train, PROJECT.data
TINY = [
    "--dataset", "digits", "--device", "cpu", "--image_size", "8", "--train_images", "40",
    "--test_images", "20", "--epochs", "2", "--batch_size", "16", "--batch_repetition", "2",
    "--width", "1", "--runs", "2", "--warmup_epochs", "1", "--input_repetition", "0",
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
    """Of one colour each, which is its number; its class depends on it."""
    number = torch.arange(count)
    x = (6 * number).byte()[:, None, None, None].expand(count, 3, 8, 8).contiguous()
    return data.Images(x, 100 + number, number)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_each_member_has_the_class_of_the_image_that_it_sees(rho):
    torch.manual_seed(0)
    images, seen = images_that_tell_their_class(), []
    options = {"members": 3, "input_repetition": rho, "batch_repetition": 2, "mirror": False}
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
    expected = torch.cat([data.to_input(x)] * 3, 1)  # red, green, blue, red, green, blue, ...
    assert torch.equal(part, expected)
    assert torch.equal(data.stack_images(data.to_input(x), torch.arange(7).expand(3, 7)), expected)
    parts = list(data.testing_batches(x, 3, members=2))
    assert [len(part) for part in parts] == [3, 3, 1]  # no image is left out
    assert torch.equal(torch.cat(parts)[:, :3], data.to_input(x))


def test_augmentation_shifts_over_black_and_mirrors_only_when_asked():
    torch.manual_seed(0)
    ramp = torch.arange(50, 210, 10).byte().expand(64, 3, 16, 16)
    plain, turned = data.augment(ramp, mirror=False), data.augment(ramp, mirror=True)
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
    grey = data.flatten_contrast(point, 0.3).double()
    assert grey.mean() == pytest.approx(point.double().mean(), abs=0.5)
    assert grey.max() - grey.min() == pytest.approx(0.3 * 255, abs=1)
    for kind, levels in data.SEVERITIES.items():
        harm = [
            (data.corrupt(point, kind, level).double() - point).square().mean() for level in levels
        ]
        assert harm == sorted(harm) and harm[0] > 0, kind
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
    images = data.Images(x, torch.arange(20) // 10, torch.arange(20))
    options = {"members": 2, "input_repetition": 0.0, "batch_repetition": 2, "mirror": False}
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
    assert torch.allclose(mutual_information(log_probs.transpose(0, 1)), expected)
    same = log_probs[:, :1].expand(-1, 3, -1).transpose(0, 1)
    assert mutual_information(same).abs().max() < 1e-12
    assert entropy(torch.tensor([0.0, -torch.inf])) == 0


def test_one_temperature_is_the_minimum_of_the_loss():
    log_probs, y = random_case()
    mean = ensemble_log_probs(log_probs)
    grid = torch.linspace(0.3, 100, 50000, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(mean / t, y) for t in grid])
    found = F.nll_loss(temper(mean, best_temperature(mean, y)), y)
    assert float(found) == pytest.approx(float(losses.min()), abs=1e-5)
    assert best_temperature(mean, mean.argmax(1)) == pytest.approx(0.01, rel=1e-3)


def test_an_error_over_sources_counts_a_source_once():
    """With each image twice, the error is that of half as many images."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator, dtype=torch.float64)
    one = error_over_sources(values, torch.arange(50))
    assert one == pytest.approx(float(values.std(correction=0)) / math.sqrt(50))
    twice = error_over_sources(values.repeat(2), torch.arange(50).repeat(2))
    assert twice == pytest.approx(one)
    assert error_over_sources(values.repeat(2), torch.arange(100)) < 0.75 * one


def test_independence_of_features_by_construction():
    """A feature of one image alone has all its variance from it; a shared one does not."""
    torch.manual_seed(0)
    network = small_network(members=2).eval()
    with torch.no_grad():
        network.stem.weight[:8, 3:] = 0  # of the first channels only image 1 counts
        network.stem.weight[8:, :3] = 0
    stem_only = network.stem

    def features(x):
        return stem_only(x).square().mean((2, 3)).repeat(1, 4)

    network.features = features
    found = variance_shares(network, torch.randn(20, 3, 8, 8), contexts=4)
    assert found.shape == (64, 2)
    assert (found[:8, 1] == 0).all() and (found[:8, 0] > 0).all()
    assert (found[8:16, 0] == 0).all() and (found[8:16, 1] > 0).all()
    assert independence(found) == pytest.approx(1)
    assert independence(torch.tensor([[2.0, 2.0], [3.0, 1.0], [0.0, 0.0]])) == 0.625


def test_a_network_of_equal_halves_shares_all():
    network = small_network(members=2).eval()
    with torch.no_grad():
        network.stem.weight[:, 3:] = network.stem.weight[:, :3]
    found = variance_shares(network, torch.randn(30, 3, 8, 8), contexts=30)
    assert independence(found) == pytest.approx(0.5, abs=0.1)


# --- data -------------------------------------------------------------------------------------


def digits(**changes: int) -> data.Data:
    options = {"size": 16, "train_images": 60, "test_images": 40, "seed": 0} | changes
    return data.load_digits(**options)


def test_no_digit_and_no_column_of_a_photograph_is_in_two_splits(monkeypatch):
    sources, grounds = [], []
    compose, crop = data.compose, data.sample_crops
    monkeypatch.setattr(data, "compose", lambda *args: sources.append(args[1]) or compose(*args))
    monkeypatch.setattr(data, "sample_crops", lambda *args: grounds.append(args[0]) or crop(*args))
    digits(train_images=2000, test_images=2000)
    inks = [{ink.numpy().tobytes() for ink in part} for part in sources]
    columns = [{part.numpy().tobytes() for part in photo.unbind(3)} for photo in grounds[:3]]
    for parts in (inks, columns):
        assert all(parts)
        assert not any(a & b for a, b in itertools.combinations(parts, 2))
    assert torch.equal(grounds[2], grounds[3])  # strange images show the test photographs


def test_digits_depend_on_the_seed_and_test_images_not_on_the_number_of_training_images():
    one, again, more, other = digits(), digits(), digits(train_images=61), digits(seed=1)
    assert torch.equal(one.train.x, again.train.x) and not one.mirror
    assert torch.equal(one.test.x, more.test.x)
    assert not torch.equal(one.test.x, other.test.x)
    assert one.test.x.shape == (40, 3, 16, 16) and one.test.x.dtype == torch.uint8
    assert [len(part.y) for part in (one.train, one.val, one.test)] == [60, 20, 40]
    assert set(digits(train_images=300).train.y.tolist()) == set(range(10))
    many = digits(test_images=2000).test
    assert len(many.source.unique()) <= 360
    for source in many.source.unique()[:50]:
        assert len(many.y[many.source == source].unique()) == 1


def test_digits_are_of_the_class_that_is_said():
    """The brightest parts of scenes look like the digits that they are said to be."""
    from sklearn.datasets import load_digits as bundled

    bunch = bundled()
    scenes = digits(size=8, train_images=3000).train
    dark = scenes.x.float().amax(1)
    means = torch.stack([dark[scenes.y == c].mean(0) for c in range(10)]).flatten(1)
    inks = torch.from_numpy(bunch.images).float()
    ink_means = torch.stack([inks[torch.from_numpy(bunch.target) == c].mean(0) for c in range(10)])
    both = [part - part.mean(0) for part in (means, ink_means.flatten(1))]
    correlation = F.normalize(both[0], dim=1) @ F.normalize(both[1], dim=1).T
    assert (correlation.argmax(1) == torch.arange(10)).sum() >= 8


def test_a_digit_is_composed_upright_in_the_middle():
    digit = torch.zeros(1, 1, 8, 8)
    digit[..., :4, :] = 1  # the upper half
    values = iter([0.0, 1.0, 0.0, 1.0, 1.0, 0.5])  # angle, side, place, opacity, colour, dimming
    ground = torch.full((1, 3, 16, 16), 100.0)
    scene = data.compose(ground, digit, lambda low, high, *shape: torch.full(shape, next(values)))
    assert (scene[0, :, 1:7, 1:15] == 255).all()
    assert (scene[0, :, 9:] == 50).all()


def write_cifar10(data_dir: Path) -> None:
    """Two images per class in each training file and in the test file, in the official layout."""
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.arange(3072, dtype=np.uint8)[None].repeat(20, 0)
    batch = {"data": pixels, "labels": list(range(10)) * 2}
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": [f"class{n}" for n in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))


LOAD = {"image_size": 8, "train_images": 20, "test_images": 10, "seed": 0}


def test_cifar10_is_read_as_published(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    write_cifar10(tmp_path)
    with pytest.raises(data.DataError, match=r"cifar-10-batches-py: damaged"):
        data.load_cifar10(tmp_path, seed=0)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    found = data.load(dataset="cifar10", data_dir=tmp_path, **LOAD)
    assert [len(part.y) for part in (found.train, found.val, found.test)] == [90, 10, 20]
    assert found.test.x.shape == (20, 3, 32, 32) and found.mirror
    plane = torch.arange(1024).remainder(256).byte().view(32, 32)
    assert torch.equal(found.test.x[0, 0], plane)  # three planes of rows
    assert found.classes[3] == "class3" and found.test.y.tolist() == [*range(10), *range(10)]
    assert list(found.strange) == ["photographs without a digit", "digits over photographs"]
    assert found.strange["digits over photographs"].shape == (10, 3, 32, 32)


def test_cifar10_that_cannot_be_had_says_how_to_get_it(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(data, "urlopen", refuse)
    with pytest.raises(data.DataError, match=r"CIFAR-10 is not in .* no network; by hand: "):
        data.load_cifar10(tmp_path, seed=0)


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


def test_a_folder_of_ones_own(tmp_path):
    folder = make_folder(tmp_path / "shades")
    (folder / "train" / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    (folder / "test" / ".hidden").mkdir()
    found = data.load(dataset="folder", data_dir=folder, **LOAD)
    assert "unreadable files left out: 1, the first: " in found.note
    assert [len(part.y) for part in (found.train, found.val, found.test)] == [36, 4, 12]
    assert len(found.strange) == 2 and found.mirror
    for x, y, _ in (found.train, found.val, found.test):
        assert torch.equal(x.float().mean((1, 2, 3)) > 110, y == 1)  # images keep their class


def test_a_folder_at_fault_is_named_in_one_line(tmp_path):
    folder = make_folder(tmp_path / "shades", test_classes=("dark", "grey"))
    options = {"dataset": "folder", "data_dir": folder, **LOAD}
    with pytest.raises(data.DataError, match="class 'grey' is not in both"):
        data.load(**options)
    for path in sorted((folder / "test" / "grey").iterdir())[1:]:
        path.unlink()
    with pytest.raises(data.DataError, match="expected at least 10 readable pictures"):
        data.load(**options)


def test_data_are_asked_for_by_the_seed(tmp_path):
    flags = [*TINY, "--seed", 7, "--out_dir", tmp_path]
    assert data_asked_for(PROJECT, *flags)["seed"] == 7


# --- settings ---------------------------------------------------------------------------------

tiny_config = functools.partial(config_of, PROJECT, *TINY)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "12"], "depth: expected 10, 16, 22, 28, ..., found 12"),
        (["--warmup_epochs", "2"], r"warmup_epochs: expected fewer than epochs \(2\), found 2"),
        (["--input_repetition", "1.1"], "input_repetition: expected at most 1, found 1.1"),
        (["--members", "1"], "members: expected at least 2, found 1"),
        (["--study", "true", "--compare", "false"], "study: expected false where compare is false"),
    ],
)
def test_settings_that_cannot_be_meant(flags, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(*flags)


def test_the_rate_warms_up_and_falls_as_a_cosine():
    config = tiny_config("--epochs", "10", "--warmup_epochs", "2", "--lr", "0.4")
    rates = [TRAIN.learning_rate(config, at) for at in (0.5, 1, 2, 4, 6, 10)]
    cosine = [(1 + math.cos(math.pi * t / 8)) / 2 for t in (0, 2, 4, 8)]
    assert rates == pytest.approx([0.1, 0.2, *(0.4 * x for x in cosine)])
    none = tiny_config("--epochs", "10", "--warmup_epochs", "0", "--lr", "0.4")
    assert TRAIN.learning_rate(none, 5) == pytest.approx(0.2)


def test_arms_have_the_networks_and_the_cost_that_they_claim():
    flags = ["--members", "4", "--width", "4", "--runs", "5", "--study", "true"]
    config = tiny_config(*flags)
    arms = TRAIN.plans(config, 3)
    assert arms["twin"] == [TRAIN.Plan(4, 1, 0.0, 3)]
    assert arms["mimo"] == [TRAIN.Plan(4, 4, 0.0, 3)]
    assert arms["deep"] == [TRAIN.Plan(4, 1, 0.0, n) for n in (3, 4, 0, 1)]
    numbers = [plan.number for n in range(5) for plan in TRAIN.plans(config, n)["small"]]
    assert numbers == list(range(20))  # no two alike
    options = {"members": 1, "classes": 10, "image_size": 8}
    small = cost(10, arms["small"][0].width, **options)
    twin = cost(10, 4, **options)
    for name, value in twin.items():
        assert 4 * small[name] == pytest.approx(value, rel=0.08), name
    assert "deep" not in TRAIN.plans(tiny_config("--members", "3"), 0)  # there are but two runs
    assert list(TRAIN.plans(tiny_config(), 0)) == ["mimo", "twin", "deep"]
    assert list(TRAIN.plans(tiny_config("--compare", "false"), 0)) == ["mimo"]


# --- two steps by hand ------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2])
def test_two_steps_by_hand(members):
    """The loss as a sum over members, SGD with Nesterov momentum and decay, the rate of the step.

    The twin passes twice through the images where the ensemble sees each of them twice.
    """
    flags = ["--epochs", "4", "--warmup_epochs", "1", "--lr", "0.3", "--weight_decay", "0.01"]
    config = tiny_config(*flags, "--batch_size", "4")
    known = digits(size=8, train_images=5 if members == 1 else 9)
    plan = TRAIN.Plan(1, members, 0.5 if members > 1 else 0.0, 0)
    torch.manual_seed(0)
    network = MimoWideResNet(10, 1, members=members, classes=10)
    hand = MimoWideResNet(10, 1, members=members, classes=10)
    hand.load_state_dict(network.state_dict())
    optimizer = torch.optim.SGD(
        network.parameters(), config.lr, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    torch.manual_seed(1)
    loss = TRAIN.train_one_epoch(network, optimizer, plan, known, config, 2)
    torch.manual_seed(1)
    losses, speed, rate_at = [], {}, {0.5: 1.5, 1.0: 2.0}
    batches = []
    options = {"members": members, "mirror": False, "input_repetition": plan.input_repetition}
    for _ in range(2 if members == 1 else 1):
        repetition = 1 if members == 1 else 2
        batches += data.training_batches(known.train, 4, batch_repetition=repetition, **options)
    assert len(batches) == 2
    assert [len(x) for x, _ in batches] == [4 * (1 if members == 1 else 2)] * 2
    for step, (x, y) in enumerate(batches):
        hand.train()
        log_probs = hand(x).log_softmax(-1)
        total = -log_probs.gather(2, y[:, :, None]).sum() / len(x)
        losses.append(float(total.detach()) / members)
        gradients = torch.autograd.grad(total, list(hand.parameters()))
        done = (rate_at[(step + 1) / 2] - 1) / 3
        rate = 0.3 * (1 + math.cos(math.pi * done)) / 2
        for place, (weight, g) in enumerate(zip(hand.parameters(), gradients, strict=True)):
            with torch.no_grad():
                g = g + 0.01 * weight
                speed[place] = g if step == 0 else 0.9 * speed[place] + g
                weight -= rate * (g + 0.9 * speed[place])
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    for name, value in network.state_dict().items():
        assert torch.allclose(value, hand.state_dict()[name], rtol=1e-3, atol=1e-5), name
    assert network.training


def test_fit_makes_the_optimizer_that_the_readme_says_and_keeps_the_best_epoch(
    monkeypatch, tmp_path
):
    config = tiny_config("--epochs", "4", "--weight_decay", "0.003", "--lr", "0.2")
    known = digits(size=8)
    nll, left, seen = iter([0.9, 0.3, 0.5, 0.4]), [], []

    def train_one_epoch(model, optimizer, plan, *rest):
        seen.append(optimizer.param_groups[0] | {"epoch": rest[-1]})
        with torch.no_grad():
            model.head.bias += 1
        left.append(float(model.head.bias.detach()[0]))
        return 0.0

    monkeypatch.setattr(TRAIN, "train_one_epoch", train_one_epoch)
    monkeypatch.setattr(TRAIN, "evaluate", lambda *_: {"val_nll": next(nll)})
    PROJECT.run.open_run(tmp_path / "run", config, "known")
    model = TRAIN.fit(TRAIN.Plan(1, 2, 0.0, 0), known, config, tmp_path / "run")
    assert float(model.head.bias[0]) == left[1]
    assert [one["epoch"] for one in seen] == [1, 2, 3, 4]
    first = seen[0]
    assert (first["momentum"], first["nesterov"]) == (0.9, True)
    assert (first["weight_decay"], first["lr"]) == (0.003, 0.2)
    assert len(first["params"]) == len(list(model.parameters()))
    again = TRAIN.fit(TRAIN.Plan(1, 2, 0.0, 0), known, config, tmp_path / "run")
    assert torch.equal(again.head.bias, model.head.bias) and len(seen) == 4  # trained once


def test_runs_differ_and_arms_of_a_run_begin_alike(monkeypatch, tmp_path):
    config, starts = tiny_config(), {}

    def train_one_epoch(model, optimizer, plan, data, config, epoch):
        state = model.state_dict()
        starts.setdefault(plan, state["blocks.0.conv1.weight"].clone())
        starts[plan, epoch] = torch.rand(1).item()
        return 0.0

    monkeypatch.setattr(TRAIN, "train_one_epoch", train_one_epoch)
    PROJECT.run.open_run(tmp_path / "run", config, "known")
    plans = [TRAIN.Plan(1, 2, 0.0, number) for number in (0, 1)]
    for plan in plans:
        TRAIN.fit(plan, digits(size=8), config, tmp_path / "run")
    assert not torch.equal(starts[plans[0]], starts[plans[1]])
    draws = [starts[plan, epoch] for plan in plans for epoch in (1, 2)]
    assert len(set(draws)) == 4  # each epoch has an order of its own


# --- known answers ----------------------------------------------------------------------------


def log_odds(rights: list[float]) -> torch.Tensor:
    """log p (N, 2) of two classes, for which the probability of class 0 is as given."""
    right = torch.tensor(rights, dtype=torch.float64)
    return torch.stack((right.log(), (1 - right).log()), 1)


def known_data() -> object:
    """Ten images, of which pairs share a source, and five strange ones."""
    x = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    images = data.Images(x, torch.zeros(10, dtype=torch.long), torch.arange(10) // 2)
    strange = {"odd": x[:5]}
    return data.Data("known", ("a", "b"), images, images, images, strange, False, "")


def said_by(val: list, test: list, corrupted: list, odd: list) -> dict[str, torch.Tensor]:
    """What an arm says; each argument holds, by member, the probabilities of class 0."""
    parts = {"val": val, "test": test, "odd": odd}
    parts |= dict.fromkeys(TRAIN.CORRUPTED, corrupted)
    return {part: torch.stack([log_odds(one) for one in x], 1) for part, x in parts.items()}


def nll(right: float, confidence: float) -> float:
    return -(right * math.log(confidence) + (1 - right) * math.log(1 - confidence))


def test_each_number_of_the_headline_is_the_one_of_its_arm():
    """The twin is right on 9 of 10 and of corrupted images on 5, the ensemble on 8 and 7."""
    some = {n: [0.9] * n + [0.1] * (10 - n) for n in range(11)}
    known, config = known_data(), tiny_config()
    twin = said_by([some[9]], [some[9]], [some[5]], [[0.95] * 5])
    mimo = said_by([some[9]] * 2, [some[8]] * 2, [some[7]] * 2, [[0.6] * 5] * 2)
    small = said_by([some[9]] * 2, [some[6]] * 2, [some[4]] * 2, [[0.99] * 3 + [0.6] * 2] * 2)
    deep = said_by([some[9]] * 2, [some[10]] * 2, [some[3]] * 2, [[0.6] * 5, [0.9] * 5])
    mimo["test"] = mimo["test"].clone()
    mimo["test"][0, 1] = mimo["test"][0, 1].flip(0)  # members disagree about the first
    arms = {"mimo": [mimo] * 2, "twin": [twin] * 2, "small": [small] * 2, "deep": [deep] * 2}
    metrics = TRAIN.summarise(arms, known, config)
    metrics["overhead"] = {"parameters_percent": 1.0, "multiply_adds_percent": 2.0}
    metrics["independence"] = 0.9
    found = TRAIN.headline(metrics)
    clean = (7 * nll(1, 0.9) + 2 * nll(0, 0.9) + math.log(2)) / 10
    expected = {
        "mimo_accuracy": 0.8, "mimo_nll": clean, "mimo_corrupted_accuracy": 0.7,
        "mimo_corrupted_nll": nll(0.7, 0.9), "mimo_corrupted_ece": 0.2, "mimo_auroc": 0.9,
        "twin_accuracy": 0.9, "twin_nll": nll(0.9, 0.9), "twin_ece": 0.0,
        "twin_nll_tempered": nll(0.9, 0.9), "twin_corrupted_accuracy": 0.5,
        "twin_corrupted_nll": nll(0.5, 0.9), "twin_corrupted_ece": 0.4,
        "twin_corrupted_nll_tempered": nll(0.5, 0.9), "twin_auroc": 0.0,
        "small_accuracy": 0.6, "small_corrupted_nll": nll(0.4, 0.9), "small_auroc": 0.4,
        "deep_accuracy": 1.0, "deep_corrupted_accuracy": 0.3, "deep_auroc": 1.0,
        "disagreement": 0.1, "independence": 0.9, "parameters_overhead_percent": 1.0,
        "multiply_adds_overhead_percent": 2.0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    minus = metrics["mimo_minus_twin"]
    assert minus["accuracy"] == pytest.approx({"mean": -0.1, "standard_error": 0.0})
    assert minus["corrupted_nll"]["mean"] == pytest.approx(nll(0.7, 0.9) - nll(0.5, 0.9))
    assert minus["nll_error_over_images"] > 0
    # only the ninth image differs, and it shares a source with the tenth
    assert minus["accuracy_error_over_images"] == pytest.approx(math.sqrt(4 * 0.2**2 + 0.8**2) / 10)
    assert metrics["arms"]["member"]["accuracy"]["mean"] == pytest.approx(0.75)
    assert metrics["arms"]["mimo"]["auroc_mutual_information_odd"]["mean"] == pytest.approx(0.45)
    assert len(metrics["arms"]["twin"]["by_severity_nll"]["mean"]) == len(TRAIN.CORRUPTED)


def test_a_curve_of_one_epoch_is_a_dot_and_epochs_are_whole():
    plt = PROJECT.plots.plt
    figure, axes = plt.subplots()
    axes.plot([1], [0.5])
    axes.plot([1, 2, 3], [0.5, 0.4, 0.3])
    PROJECT.plots.mark_epochs(axes)
    assert [line.get_marker() for line in axes.lines] == ["o", "None"]
    assert all(tick == int(tick) for tick in axes.get_xticks())
    plt.close(figure)


def test_plots_are_given_the_arms_and_the_run_that_they_name(monkeypatch, tmp_path):
    """Members disagree most about image 3 in run 0, about image 5 in run 1."""
    config, known, given = tiny_config(), known_data(), {}
    known = known._replace(test=known.test._replace(x=known.test.x + torch.arange(10).byte().view(
        10, 1, 1, 1)))  # fmt: skip

    def run_of(surprise: int, *firsts: float) -> dict:
        members = [[first] * 10 for first in firsts]
        members[-1][surprise] = 0.05
        return {"test": torch.stack([log_odds(one) for one in members], 1)}

    said = {"mimo": [run_of(3, 0.9, 0.8), run_of(5, 0.7, 0.6)], "twin": [run_of(1, 0.8)] * 2}
    metrics = {"arms": {name: {"ece": {"mean": name}} for name in said}}
    monkeypatch.setattr(TRAIN, "read_rows", lambda run, name: name)
    monkeypatch.setattr(TRAIN, "try_plot", lambda plot, *a: given.update({plot.__name__: a}))
    TRAIN.plot_results(metrics, said, "variances", known, config, tmp_path)
    names = {name: plans[0].name for name, plans in TRAIN.plans(config, 0).items()}
    assert given["plot_curves"][0] == {"mimo": names["mimo"], "twin": names["twin"]}
    assert given["plot_corruption"][0] is metrics["arms"]
    answers, _, ece, *_ = given["plot_calibration"]
    assert ece == {"mimo": "mimo", "twin": "twin"}
    assert answers["mimo"][:, 0, 0].exp().tolist() == pytest.approx([0.85, 0.65])
    assert answers["twin"][:, 0, 0].exp().tolist() == pytest.approx([0.8, 0.8])
    assert given["plot_independence"][0] == "variances"
    images, _, probs, *_ = given["plot_disagreement"]
    assert int(images[0, 0, 0, 0]) == 3 and len(images) == 8
    assert probs[0, :, 0].tolist() == pytest.approx([0.9, 0.05])


def test_a_temperature_is_fitted_on_validation_and_used_everywhere():
    some = {n: [0.9] * n + [0.1] * (10 - n) for n in range(11)}
    found = TRAIN.evaluate_arm(said_by([some[7]], [some[9]], [some[5]], [[0.9] * 5]), known_data())
    assert found["temperature"] == pytest.approx(math.log(9) / math.log(7 / 3), rel=1e-6)
    assert found["nll_tempered"] == pytest.approx(nll(0.9, 0.7))
    assert found["corrupted_nll_tempered"] == pytest.approx(nll(0.5, 0.7))
    assert found["corrupted_ece_tempered"] == pytest.approx(0.2)
    assert found["nll"] == pytest.approx(nll(0.9, 0.9))


def test_evaluation_of_an_epoch():
    log_probs, y = random_case(members=2)
    row = TRAIN.evaluate(log_probs, y)
    assert row["val_nll"] == pytest.approx(log_loss(y, log_probs.exp().mean(1), labels=range(4)))
    for m in (0, 1):
        expected = accuracy_score(y, log_probs[:, m].argmax(1))
        assert row[f"val_member{m + 1}_accuracy"] == pytest.approx(expected)
    assert row["val_disagreement"] == diversity(log_probs)["disagreement"]


# --- one tiny run, looked at from all sides ---------------------------------------------------


def tiny() -> tuple[Path, dict]:
    folder = tiny_run("mimo_cls")[0]
    return folder, json.loads((folder / "metrics.json").read_text())


def rows_of(folder: Path) -> list[dict]:
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: x for name, x in row.items() if "seconds" not in name} for row in rows]


def network_of(folder: Path, name: str, width: float, members: int) -> MimoWideResNet:
    network = MimoWideResNet(10, width, members=members, classes=10)
    network.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return network.eval()


def by_hand(probs: np.ndarray, y: np.ndarray) -> dict[str, float]:
    top, hit = probs.max(1), probs.argmax(1) == y
    bins = np.minimum(np.ceil(top * 15).astype(int), 15)
    ece = sum(abs(hit[bins == b].sum() - top[bins == b].sum()) for b in range(1, 16)) / len(y)
    return {"accuracy": hit.mean(), "nll": log_loss(y, probs, labels=range(10)), "ece": ece}


@functools.cache
def studied() -> tuple[Path, dict]:
    """A tiny run with the study, which has all arms."""
    flags = ["--study", "true", "--study_widths", "1", "--study_members", "2"]
    flags += ["--study_repetitions", "0,0.5", "--out_dir", tempfile.mkdtemp(prefix="mimo_cls-")]
    folder = train("mimo_cls", *TINY, *flags)
    return folder, json.loads((folder / "metrics.json").read_text())


def test_the_headline_is_computed_again_from_the_saved_weights():
    folder, report = studied()
    known = data.load_digits(8, 40, 20, 0)
    y, odd = known.test.y.numpy(), known.strange["photographs without a digit"]
    thin = [(f"w0.7071-M1-rho0-run{n}", 1 / math.sqrt(2), 1) for n in range(4)]
    networks = {
        "mimo": [[("w1-M2-rho0-run0", 1, 2)], [("w1-M2-rho0-run1", 1, 2)]],
        "twin": [[("w1-M1-rho0-run0", 1, 1)], [("w1-M1-rho0-run1", 1, 1)]],
        "small": [thin[:2], thin[2:]],
        "deep": [[(f"w1-M1-rho0-run{n}", 1, 1) for n in pair] for pair in ((0, 1), (1, 0))],
    }

    def probs(names: list, x: torch.Tensor) -> np.ndarray:
        found = []
        for name in names:
            network = network_of(folder, *name)
            inputs = ((x.float() / 255 - 0.5) / 0.25).repeat(1, network.members, 1, 1)
            with torch.no_grad():
                found.append(network(inputs).double().softmax(-1))
        return torch.cat(found, 1).mean(1).numpy()

    corrupted = [
        data.corrupt(known.test.x, kind, level)
        for kind, levels in data.SEVERITIES.items()
        for level in levels
    ]
    for arm, runs in networks.items():
        rows = []
        for names in runs:
            clean, strange = (probs(names, x) for x in (known.test.x, odd))
            row = by_hand(clean, y)
            harmed = [by_hand(probs(names, x), y) for x in corrupted]
            row |= {f"corrupted_{k}": np.mean([one[k] for one in harmed]) for k in harmed[0]}
            unsure = [-(p * np.log(p)).sum(1) for p in (clean, strange)]
            row["auroc"] = roc_auc_score([0] * 20 + [1] * 20, np.concatenate(unsure))
            rows.append(row)
        for name in rows[0]:
            expected = np.mean([row[name] for row in rows])
            assert report["headline"][f"{arm}_{name}"] == pytest.approx(expected, abs=1e-5), name


def test_what_a_run_leaves():
    folder, report = tiny()
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {"curves", "reliability", "corruption", "disagreement", "independence"}
    stages = [row["stage"] for row in rows_of(folder)]
    assert len(stages) == 2 * (2 + 2) and len(set(stages)) == 4
    assert report["metrics"]["overhead"]["parameters_percent"] > 0
    state = torch.load(folder / "model.pt", weights_only=True)["weights"]
    for name, value in network_of(folder, "w1-M2-rho0-run0", 1, 2).state_dict().items():
        assert torch.equal(state[name], value)
    assert set(report["metrics"]["timing"]) >= {"mimo_train_seconds", "forward_percent"}


def numbers_of(known: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Weights, rows and metrics of a tiny run on `known`, without pictures and timing."""
    with monkeypatch.context() as patch:
        patch.setattr(TRAIN, "load_data", lambda config: known)
        patch.setattr(TRAIN, "plot_results", lambda *_: None)
        patch.setattr(TRAIN, "timing", lambda *_: {})
        patch.setattr(TRAIN, "CORRUPTED", ["noise 0.1"])
        patch.setitem(TRAIN.SEVERITIES, "noise", (0.1,))
        patch.setitem(TRAIN.SEVERITIES, "blur", ())
        patch.setitem(TRAIN.SEVERITIES, "contrast", ())
        output = call(TRAIN, *TINY, "--out_dir", tmp_path)
    folder = Path(output.splitlines()[-1])
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    found = {f"{arm} {name}": x for arm, numbers in metrics["arms"].items()
             for name, x in numbers.items()}  # fmt: skip
    rows = rows_of(folder)
    losses = {row["stage"].split("-")[1]: row["train_loss"] for row in rows}
    found |= {f"train_loss of {name}": x for name, x in losses.items()}
    found["val"] = [row["val_nll"] for row in rows]
    last = network_of(folder, "w1-M2-rho0-run1", 1, 2)
    found["independence"] = metrics["independence"]
    return found | {"weights": last.stem.weight.tolist()}


def test_what_each_part_of_the_data_may_move(tmp_path, monkeypatch):
    """A leak is an output that moves, a dead wire one that does not."""
    known = data.load_digits(8, 40, 20, 0)
    before = numbers_of(known, tmp_path, monkeypatch)

    def moved(**parts: object) -> set[str]:
        after = numbers_of(known._replace(**parts), tmp_path, monkeypatch)
        return {name for name in before if before[name] != after[name]}

    train, val, test = known.train, known.val, known.test
    fitted = {name for name in before if "train_loss" in name or name == "weights"}
    by_epoch = {"val", "weights", "independence"}  # the epoch that is kept may be another
    assert fitted | {"val", "independence"} <= moved(train=train._replace(y=train.y.flip(0)))
    assert fitted | {"val", "independence"} <= moved(train=train._replace(x=255 - train.x))
    losses = {name for name in before if "train_loss" in name}
    for change in ({"y": val.y.flip(0)}, {"x": 255 - val.x}):
        found = moved(val=val._replace(**change))
        assert "val" in found and not losses & found
        fits = {f"{arm} temperature" for arm in ("mimo", "twin", "deep")}
        assert {name for name in fits if before[name]["mean"] < 99} <= found  # else at its bound
    found = moved(test=test._replace(y=(test.y + 1) % 10))
    stay = {name for name in before if "auroc" in name or "temperature" in name}
    assert not found & (stay | fitted | by_epoch)
    for arm in ("mimo", "twin", "deep", "member"):
        assert {f"{arm} nll", f"{arm} corrupted_nll", f"{arm} nll_tempered"} <= found
    found = moved(test=test._replace(x=255 - test.x))
    assert not found & (fitted | {"val"} | {name for name in before if "temperature" in name})
    assert {"mimo nll", "twin corrupted_nll", "independence"} <= found
    strange = {name: 255 - x for name, x in known.strange.items()}
    found = moved(strange=strange)
    assert found and all("auroc" in name for name in found)
    assert {name for name in before if "auroc_entropy" in name} <= found


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    whole, report = tiny()
    train_until("mimo_cls", 3, *TINY, "--out_dir", tmp_path)
    (broken,) = tmp_path.iterdir()
    assert not (broken / "metrics.json").exists()
    resumed = json.loads((train("mimo_cls", "--resume", broken) / "metrics.json").read_text())
    for one in (report, resumed):
        one["metrics"].pop("timing")
    assert resumed["metrics"] == report["metrics"]
    assert rows_of(broken) == rows_of(whole)


def test_without_a_comparison_only_the_ensemble_is_trained(tmp_path):
    folder = train("mimo_cls", *TINY, "--compare", "false", "--out_dir", tmp_path)
    report = json.loads((folder / "metrics.json").read_text())
    assert {row["stage"] for row in rows_of(folder)} == {"w1-M2-rho0-run0"}
    assert not [name for name in report["headline"] if name.startswith(("twin", "small", "deep"))]
    assert list(report["metrics"]["arms"]) == ["mimo", "member"]
    assert rows_of(folder) == rows_of(tiny()[0])[:2]
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {"curves", "reliability", "corruption", "disagreement", "independence"}


def test_the_study_compares_each_ensemble_with_the_twin_of_its_width(tmp_path, monkeypatch):
    said = []

    def evaluate_runs(plan, *_):
        said.append(plan)
        value = {"nll": 10.0 * plan.width + plan.members, "disagreement": plan.input_repetition}
        return [value, {name: x + plan.members for name, x in value.items()}]

    monkeypatch.setattr(TRAIN, "evaluate_runs", evaluate_runs)
    config = tiny_config("--study_widths", "1,2", "--study_members", "2,3")
    rows = TRAIN.study(digits(size=8), config, tmp_path)
    assert [(row["width"], row["members"], row["input_repetition"]) for row in rows] == [
        (w, m, rho) for w in (1, 2) for m in (2, 3) for rho in (0, 0.5)
    ]
    assert said.count(TRAIN.Plan(2, 1, 0.0, 0)) == 1 and len(said) == 2 + 8
    for row in rows:
        m = row["members"]
        assert row["twin"]["nll"]["mean"] == 10 * row["width"] + 1.5
        difference = row["mimo_minus_twin"]["nll"]
        assert difference["mean"] == pytest.approx(1.5 * m - 1.5)
        assert difference["standard_error"] == pytest.approx((m - 1) / 2)
    PROJECT.plots.plot_room(
        [row | {"mimo": row["mimo"], "mimo_minus_twin": dict.fromkeys(
            ("accuracy", "nll", "corrupted_nll"), row["mimo_minus_twin"]["nll"])}
         for row in rows], "a", tmp_path / "room.png")  # fmt: skip
    assert (tmp_path / "room.png").is_file()


def test_times_are_of_the_arms_that_they_are_named_for(monkeypatch, tmp_path):
    config = tiny_config()
    networks = {plan: plan for arm in TRAIN.plans(config, 0).values() for plan in arm}
    monkeypatch.setattr(TRAIN, "time_forward", lambda twin, mimo, _: {"pair": (twin, mimo)})
    seconds = [{"train_seconds": 2.0}, {"train_seconds": 3.0}]
    wanted = networks[TRAIN.Plan(1, 2, 0.0, 0)].name
    monkeypatch.setattr(TRAIN, "read_rows", lambda _, name: seconds[: 1 + (name == wanted)])
    found = TRAIN.timing(networks, digits(size=8), config, tmp_path)
    assert found["mimo_train_seconds"] == 5 and found["twin_train_seconds"] == 2
    assert [plan.members for plan in found["pair"]] == [1, 2]


def test_the_study_trains_what_it_says():
    folder, report = studied()
    metrics = report["metrics"]
    same, other = metrics["study"]
    assert same["twin"]["nll"] == metrics["arms"]["twin"]["nll"]
    assert same["mimo"]["corrupted_nll"] == metrics["arms"]["mimo"]["corrupted_nll"]
    assert other["mimo"]["nll"] != same["mimo"]["nll"]
    assert same["mimo"]["disagreement"]["mean"] == metrics["diversity"]["disagreement"]
    stages = {row["stage"] for row in rows_of(folder)}
    assert len(stages) == 4 + 4 + 2  # what the arms have trained is not trained again


# --- your own pictures ------------------------------------------------------------------------


def test_predict_says_what_evaluation_says(tmp_path):
    folder, _ = tiny()
    known = data.load_digits(8, 40, 20, 0)
    pictures = tmp_path / "mine"
    pictures.mkdir()
    for number, picture in enumerate(known.test.x):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(pictures / f"{number:02}.png")
    (pictures / "a broken one.png").write_bytes(b"no picture")
    output = call(PROJECT.predict, folder, pictures, "--out_dir", tmp_path / "out")
    results = Path(output.splitlines()[-1])
    with (results / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{n:02}.png" for n in range(20)]
    assert "unreadable: 1" in output and "a broken one.png" in output
    log_probs = TRAIN.predict(network_of(folder, "w1-M2-rho0-run0", 1, 2), known.test.x)
    mean = ensemble_log_probs(log_probs)
    assert [row["class"] for row in rows] == [str(int(c)) for c in mean.argmax(1)]
    columns = {
        "probability": mean.exp().max(1).values,
        "entropy": entropy(mean),
        "mutual_information": mutual_information(log_probs.transpose(0, 1)),
    }
    for name, values in columns.items():
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), abs=2e-6)
    assert (results / "certainty.png").is_file()


def test_pictures_of_any_kind_are_taken(tmp_path):
    folder, _ = tiny()
    ramp = np.random.default_rng(0).integers(0, 255, (17, 23), dtype=np.uint8)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray((ramp.astype(np.uint16) + 1) * 200).save(tmp_path / "grey16.png")
    Image.fromarray(np.dstack([ramp] * 4)).save(tmp_path / "alpha.png")
    output = call(PROJECT.predict, folder, tmp_path, "--out_dir", tmp_path / "out")
    with (Path(output.splitlines()[-1]) / "predictions.csv").open() as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == ["alpha.png", "grey.png", "grey16.png"]
    assert float(rows["grey16.png"]["entropy"]) == pytest.approx(
        float(rows["grey.png"]["entropy"]), abs=0.02
    )


def test_pictures_survive_the_least_data(tmp_path):
    plots, path = PROJECT.plots, tmp_path / "a.png"
    y = torch.zeros(1, dtype=torch.long)
    plots.plot_calibration({"mimo": log_odds([0.5])[None]}, y, {"mimo": 0.1}, "a", path)
    x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    plots.plot_disagreement(x, y, torch.full((1, 2, 2), 0.5), ("$a$", "b$"), "a", path)
    plots.plot_independence(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "a", path)
    plots.plot_extremes({"most certain": [("$", x[0])], "least certain": []}, path)
    assert path.is_file()


def test_the_network_can_be_exported():
    network = small_network(2).eval()
    x = torch.rand(2, 6, 8, 8)
    exported = torch.export.export(network, (x,)).module()
    assert torch.allclose(exported(x), network(x), atol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_with_epoch_and_step():
    config, known = tiny_config(), digits(size=8)
    network = MimoWideResNet(10, 1, members=1, classes=10)
    with torch.no_grad():
        network.stem.weight[:] = torch.nan
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    message = r"w1-M1-rho0-run0 epoch 1: the loss is not finite at step 1"
    with pytest.raises(FloatingPointError, match=message):
        TRAIN.train_one_epoch(network, optimizer, TRAIN.Plan(1, 1, 0.0, 0), known, config, 1)
