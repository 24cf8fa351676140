"""Self-training: labels against brute force, the experiment's wiring, and whole tiny runs."""

import csv
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from projects import call, load_project, train, train_until
from sklearn.semi_supervised import LabelSpreading

from self_training.data import (
    UNKNOWN,
    Images,
    Source,
    augment,
    fingerprints,
    in_channels,
    load,
    split,
    training_batches,
)
from self_training.model import (
    NONE,
    LiveLabels,
    SmallCNN,
    averaged,
    balance,
    best_round,
    calibrated_probs,
    class_thresholds,
    confident_labels,
    fit_temperature,
    label_quality,
    next_labels,
    no_labels,
    rank_in_class,
    share_changed,
    sklearn_accuracy,
)
from self_training.plots import plot_arms, plot_examples, plot_quality

PROJECT = load_project("self_training")
DataError = PROJECT.data.DataError
SMALL = ["--device", "cpu", "--repeats", "1", "--steps", "6", "--width", "4", "--rounds", "2"]
TINY = ["--dataset", "digits", "--pool_size", "150", *SMALL]
PLAIN = {"threshold": 0.0, "balanced": False, "revise": False}


def random_probs(count: int, classes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(1)


# --- which pictures get a label ---------------------------------------------------------------


def test_surer_beats_louder():
    """The largest raw score belongs to a picture that the network cannot decide on."""
    logits = torch.tensor([[60.0, 59.9, 59.8], [3.0, -3.0, -3.0], [0.2, 0.1, 0.0]])
    probs = calibrated_probs(logits, 1.0)
    after = next_labels(no_labels(3), probs, torch.arange(3), add=1, **PLAIN)
    assert after.label.tolist() == [NONE, 0, NONE]
    assert after.confidence[1] == pytest.approx(1 / (1 + 2 * math.exp(-6)), abs=1e-12)
    logits = torch.tensor([[20.0, 0.0], [30.0, 0.0], [25.0, 0.0]])
    assert logits.softmax(1)[:, 0].tolist() == [1, 1, 1]  # float32 does not tell them apart
    probs = calibrated_probs(logits, 1.0)
    after = next_labels(no_labels(3), probs, torch.arange(3), add=1, **PLAIN)
    assert after.label.tolist() == [NONE, 0, NONE]


def by_hand(probs, held, *, add, threshold, balanced, revise):
    """The indices chosen, by a plain loop over the surest first."""
    classes = probs.shape[1]
    places = add + (len(held) if revise else 0)
    quota = math.ceil(places / classes) if balanced else places
    chosen, full = [], [0] * classes
    for i in sorted(range(len(probs)), key=lambda i: -float(probs[i].max())):
        c = int(probs[i].argmax())
        free = revise or i not in held
        if free and probs[i].max() >= threshold and full[c] < quota and len(chosen) < places:
            chosen.append(i)
            full[c] += 1
    return set(chosen) | (set() if revise else set(held))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("revise", [False, True])
def test_selection_is_that_of_a_plain_loop(balanced, revise):
    how = {"threshold": 0.6, "balanced": balanced, "revise": revise}
    pseudo, held, ever = no_labels(300), set(), set()
    for number in range(8):
        probs = random_probs(300, 4, number)
        expected = by_hand(probs, held, add=31, **how)
        after = next_labels(pseudo, probs, torch.arange(300), add=31, **how)
        given = after.label != NONE
        assert set(given.nonzero()[:, 0].tolist()) == expected
        assert len(expected) <= len(held) + 31
        if revise:
            assert torch.equal(after.label[given], probs.argmax(1)[given])
        else:  # nothing is added twice, changed or withdrawn
            old = torch.tensor(sorted(held), dtype=torch.long)
            assert torch.equal(after.label[old], pseudo.label[old])
            assert torch.equal(after.confidence[old], pseudo.confidence[old])
        pseudo, held, ever = after, expected, ever | expected
    assert revise == bool(ever - held)  # some were withdrawn


@pytest.mark.parametrize("balanced", [False, True])
def test_the_order_of_the_pool_decides_nothing(balanced):
    """All confidences are equal: the same pictures are taken, wherever they stand."""
    x = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).repeat(30, 1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    how = {"add": 11, "threshold": 0.5, "balanced": balanced, "revise": True}
    straight = next_labels(no_labels(60), probs, fingerprints(x), **how)
    shuffled = next_labels(no_labels(60), probs[order], fingerprints(x[order]), **how)
    assert torch.equal(straight.label[order], shuffled.label)
    assert (straight.label != NONE).nonzero()[:, 0].tolist() != list(range(11))


def test_rank_in_class():
    assert rank_in_class(torch.tensor([1, 0, 1, 1, 0]), 2).tolist() == [0, 0, 1, 2, 1]


def test_the_time_of_a_selection_does_not_grow_with_the_square():
    def seconds(count: int) -> float:
        probs, before = random_probs(count, 10), no_labels(count)
        how = {"add": count // 10, "threshold": 0.5, "balanced": True, "revise": True}
        began = time.process_time()
        for _ in range(3):
            next_labels(before, probs, torch.arange(count), **how)
        return time.process_time() - began

    seconds(1000)
    assert seconds(200_000) < 60 * seconds(10_000)  # of the square: 400


# --- temperature ------------------------------------------------------------------------------


def test_temperature_is_the_minimum_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (400,), generator=generator)
    logits = 4 * torch.randn(400, 5, generator=generator) + 4 * F.one_hot(y, 5)
    found = fit_temperature(logits, y)
    grid = torch.linspace(0.2, 5, 4801).tolist()
    losses = [float(F.cross_entropy(logits.double() / t, y)) for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=1.5e-3)
    assert fit_temperature(logits / 2, y) == pytest.approx(found / 2, rel=1e-6)


def test_temperature_stays_within_bounds_where_all_is_right_or_all_is_wrong():
    logits = torch.eye(3)
    assert fit_temperature(logits, torch.tensor([0, 1, 2])) == pytest.approx(0.2)
    assert fit_temperature(logits, torch.tensor([1, 2, 0])) == pytest.approx(5.0)


# --- thresholds by class ----------------------------------------------------------------------


def test_thresholds_are_those_of_the_paper():
    """FreeMatch's equation 8 in plain loops, and by hand."""
    probs = random_probs(50, 4)
    global_threshold = sum(max(row) for row in probs.tolist()) / 50
    means = [sum(row[c] for row in probs.tolist()) / 50 for c in range(4)]
    wanted = [mean / max(means) * global_threshold for mean in means]
    found = class_thresholds(probs.mean(0), probs.max(1).values.mean())
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)
    given = confident_labels(probs, balanced=False)
    for row, predicted, label, confidence in zip(
        probs.tolist(), *map(torch.Tensor.tolist, given), strict=True
    ):
        best = row.index(max(row))
        assert predicted == best
        assert label == (best if max(row) >= wanted[best] else NONE)
        assert confidence == (max(row) if label != NONE else 0)
    assert 5 < (given.label == NONE).sum() < 45


def test_balancing_evens_the_classes_and_keeps_the_order_within_one():
    probs = (random_probs(400, 3).log() + torch.tensor([2.0, 0.0, -2.0])).softmax(1)
    assert probs.mean(0).max() > 0.6
    even = balance(probs, 50)
    assert even.mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert even.sum(1).tolist() == pytest.approx([1] * 400)
    ratio, before = even[:, 0] / even[:, 1], probs[:, 0] / probs[:, 1]
    assert torch.allclose(ratio / before, (ratio / before)[0], atol=1e-9)  # a weight per class
    loop = probs.clone()  # the five turns that are made, in plain loops
    for _ in range(5):
        loop = torch.stack([loop[:, c] / loop[:, c].mean() for c in range(3)], 1)
        loop = torch.stack([row / row.sum() for row in loop])
    assert torch.allclose(balance(probs), loop, atol=1e-12)
    labels = confident_labels(probs, balanced=True).label
    assert torch.equal(labels, confident_labels(loop, balanced=False).label)
    share = [float((labels == c).double().mean()) for c in range(3)]
    assert min(share) > 0.15


def test_live_labels_follow_the_running_means():
    live = LiveLabels(3, balanced=True, momentum=0.8)
    predicted, means, confidence = torch.full((3,), 1 / 3), torch.full((3,), 1 / 3), 1 / 3
    for number in range(4):
        probs = random_probs(20, 3, number).float()
        label, weight = live(probs)
        predicted = 0.8 * predicted + 0.2 * probs.mean(0)
        even = torch.stack([row / predicted / (row / predicted).sum() for row in probs])
        means = 0.8 * means + 0.2 * even.mean(0)
        confidence = 0.8 * confidence + 0.2 * float(even.max(1).values.mean())
        wanted = means / means.max() * confidence
        assert torch.equal(label, even.argmax(1))
        sure = even.max(1).values >= wanted[label]
        assert torch.equal(weight, sure)
    assert 0 < weight.sum() < 20


def test_the_teacher_is_the_mean_of_weights_and_of_statistics():
    torch.manual_seed(0)
    student = SmallCNN(channels=1, width=2, classes=3)
    teacher, wanted = averaged(student, 0.7), None
    for _ in range(3):
        with torch.no_grad():
            for part in student.parameters():
                part.add_(torch.randn_like(part))
            student(torch.rand(4, 1, 8, 8))  # moves the statistics
        state = {name: x.clone().double() for name, x in student.state_dict().items()}
        if wanted is None:
            wanted = state  # the first one counts whole
        else:
            wanted = {name: 0.7 * wanted[name] + 0.3 * state[name] for name in state}
        teacher.update_parameters(student)
    for name, x in teacher.module.state_dict().items():
        if x.is_floating_point():
            assert torch.allclose(x.double(), wanted[name], atol=1e-6), name


# --- which round is kept ----------------------------------------------------------------------


def test_the_share_that_changed_counts_what_was_seen_twice():
    before, after = torch.tensor([0, 1, NONE, 2, 1]), torch.tensor([0, 2, 1, NONE, 1])
    assert share_changed(before, after) == pytest.approx(1 / 3)
    assert share_changed(torch.full((3,), NONE), torch.tensor([0, 1, 2])) == 1


def test_each_way_to_stop_keeps_its_own_round():
    rows = [
        {"changed": c, "val_loss": v} for c, v in ((1.0, 0.2), (0.3, 0.5), (0.1, 0.3), (0.2, 0.4))
    ]
    kept = PROJECT.train.kept_rounds(rows)
    assert kept == {"last": 3, "agreement": 2, "validation": 0}
    assert PROJECT.train.kept_rounds([{"train_loss": 1.0}]) == {"last": 0}
    assert best_round([0.5, 0.3, 0.3, 0.9]) == 1 and best_round([0.5, 0.6]) == 0


def test_quality_of_labels():
    quality = label_quality(torch.tensor([0, 0, 1, NONE]), torch.tensor([0, 1, 1, 1]), 3)
    assert quality["pseudo_labels"] == 3
    assert quality["accuracy"] == pytest.approx(2 / 3)
    assert quality["accuracy_per_class"] == [0.5, 1.0, None]
    assert quality["share_per_class"] == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0]
    nothing = label_quality(no_labels(4).label, torch.zeros(4).long(), 2)
    assert nothing["accuracy"] is None and nothing["share_per_class"] == [None, None]


# --- data -------------------------------------------------------------------------------------


def numbered(count: int, test: bool) -> Source:
    """Pictures that hold their own number, in three classes."""
    x = torch.arange(count, dtype=torch.int32).view(torch.uint8).view(count, 1, 1, 4)
    images = Images(x, torch.arange(count) % 3)
    other = Images(255 - x[:30], images.y[:30]) if test else None
    files = tuple(map(str, range(count)))
    return Source("numbers", ("a", "b", "c"), images, other, files, "")


@pytest.mark.parametrize("test", [False, True])
def test_splits_are_disjoint_complete_and_fixed_by_the_seed(test):
    source = numbered(300, test)
    source = source._replace(train=Images(source.train.x, source.train.y.clone()))
    source.train.y[::10] = UNKNOWN
    how = {"labels_per_class": 5, "val_per_class": 7, "pool_size": 0}
    parts = split(source, seed=3, **how)
    sets = [
        {bytes(picture.flatten().tolist()) for picture in x}
        for x in (parts.labelled.x, parts.val.x, parts.pool, parts.test.x)
    ]
    assert len(set().union(*sets)) == sum(map(len, sets)) == 300 + 30 * test
    assert parts.labelled.y.bincount().tolist() == [5, 5, 5]
    assert parts.val.y.bincount().tolist() == [7, 7, 7]
    assert parts.test.y.min() >= 0 and len(parts.test.y) == (30 if test else 81)
    assert (parts.hidden == UNKNOWN).sum() == 30
    again, other = (split(source, seed=seed, **how) for seed in (3, 4))
    assert torch.equal(parts.pool, again.pool)
    assert not torch.equal(parts.pool, other.pool)
    assert torch.equal(source.train.x[parts.places], parts.pool)
    assert torch.equal(source.train.y[parts.places], parts.hidden)


def test_all_labels_are_used_where_none_is_to_be_hidden():
    source = numbered(300, True)
    source = source._replace(train=Images(source.train.x, source.train.y.clone()))
    source.train.y[:100] = UNKNOWN
    parts = split(source, labels_per_class=0, val_per_class=7, pool_size=0, seed=3)
    assert len(parts.labelled.y) == 200 - 21
    assert len(parts.pool) == 100 and (parts.hidden == UNKNOWN).all()


def test_a_class_that_is_too_small_is_named():
    with pytest.raises(PROJECT.data.DataError, match=r"'.' has too few pictures, \d+ without"):
        PROJECT.data.split(
            numbered(30, True), labels_per_class=5, val_per_class=7, pool_size=0, seed=0
        )
    with pytest.raises(PROJECT.data.DataError, match="for the pool; set labels_per_class, or add"):
        PROJECT.data.split(
            numbered(30, True), labels_per_class=0, val_per_class=7, pool_size=0, seed=0
        )


def test_training_batches_show_every_picture_equally_often_in_a_new_order():
    images = Images(torch.arange(10).byte().view(10, 1, 1, 1), torch.arange(10))
    batches = list(training_batches(images, 5, 4))
    order = torch.cat([y for _, y in batches])
    assert order[:10].sort().values.tolist() == order[10:].sort().values.tolist() == [*range(10)]
    assert order[:10].tolist() != order[10:].tolist()
    for x, y in batches:
        assert torch.equal((x * 255).round().flatten().long(), y)


def test_augmentation_keeps_a_picture_roughly_in_place():
    torch.manual_seed(0)
    x = torch.zeros(200, 1, 16, 16)
    x[:, :, 6:10, 6:10] = 1
    moved = augment(x, 1.0, mirror=False)
    assert F.l1_loss(moved.mean(0), x.mean(0)) < 0.06
    assert not torch.equal(moved[0], moved[1])
    assert moved.min() >= 0 and moved.max() <= 1
    weak = augment(x, 0.2, mirror=False)
    assert F.l1_loss(weak, x) < 0.5 * F.l1_loss(moved, x)
    assert torch.equal(augment(x, 0.0, mirror=True), x)
    left = torch.zeros(200, 1, 16, 16)
    left[..., :4] = 1
    for mirror, low, high in ((True, 0.35, 0.65), (False, 0, 0.01)):
        moved = augment(left, 0.3, mirror=mirror, geometry_only=True)
        on_right = moved[..., 8:].sum((1, 2, 3)) > 20
        assert low <= on_right.float().mean() <= high


def test_strong_augmentation_changes_contrast_and_leaves_squares_out():
    torch.manual_seed(0)
    x = torch.full((300, 3, 16, 16), 0.5)
    x[:, :, :, 8:] = 0.8
    geometry = augment(x, 1.0, mirror=False, geometry_only=True)
    assert geometry.min() >= 0.49  # a photograph has no empty border, and nothing was left out
    full = augment(x, 1.0, mirror=False)
    empty = (full == 0).all(1).float().mean((1, 2))
    assert 0.02 < empty.mean() < 0.15 and empty.max() <= 0.3
    assert full[:, 0].mean((1, 2)).std() > 0.05


def test_digits_are_whole_and_in_range():
    source = load(dataset="digits", data_dir=Path(), image_size=0)
    assert source.train.x.shape == (1797, 1, 8, 8)
    assert source.train.x.max() == 255 and len(source.files) == 1797
    assert load(dataset="digits", data_dir=Path(), image_size=16).train.x.shape[2:] == (16, 16)


def test_network_takes_any_size_and_exports():
    for size in (8, 15, 28):
        x = torch.zeros(2, 3, size, size)
        model = SmallCNN(channels=3, width=4, classes=6).eval()
        assert model(x).shape == (2, 6)
        assert torch.equal(model.layers[-1](model.features(x)), model(x))
    assert model.layers[3](model.layers[:3](x)).stride(1) == 1
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-6)


def write_folder(folder: Path, unlabelled: int = 0) -> None:
    """Photographs of two classes, bright above and bright below."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 14), ("test", 4)):
        for number, name in enumerate(("above", "below")):
            (folder / part / name).mkdir(parents=True)
            for place in range(count):
                save_picture(folder / part / name / f"{place}.png", rng, number)
    if unlabelled:
        (folder / "unlabelled").mkdir()
    for place in range(unlabelled):
        save_picture(folder / "unlabelled" / f"{place}.png", rng, place % 2)


def save_picture(path: Path, rng: np.random.Generator, number: int) -> None:
    picture = rng.integers(0, 90, (12, 12, 3), dtype=np.uint8)
    picture[6 * number : 6 * number + 6] += 120
    Image.fromarray(picture).save(path)


def load_folder(folder: Path, image_size: int = 0) -> Source:
    return PROJECT.data.load(dataset="folder", data_dir=folder, image_size=image_size)


def test_a_folder_is_read_with_its_unlabelled_pictures(tmp_path):
    write_folder(tmp_path, unlabelled=5)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "above" / ".DS_Store").write_text("x")
    (tmp_path / "test" / "below" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source = load_folder(tmp_path)
    assert source.classes == ("above", "below")
    assert source.train.y.tolist() == [0] * 14 + [1] * 14 + [UNKNOWN] * 5
    assert len(source.test.y) == 7
    assert "unreadable files left out: 1, the first:" in source.note and "3.png" in source.note
    assert source.files[14] == "train/below/0.png" and source.files[-1] == "unlabelled/4.png"
    pixels = np.array(Image.open(tmp_path / source.files[14])).transpose(2, 0, 1)
    assert torch.equal(source.train.x[14], torch.from_numpy(pixels))
    for name in ("train/above", "train/below", "unlabelled"):  # the other layout
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "flat" / Path(name).name)
    flat = load_folder(tmp_path / "flat")
    assert flat.test is None and torch.equal(flat.train.x, source.train.x)
    assert flat.classes == source.classes and torch.equal(flat.train.y, source.train.y)


def test_pictures_are_turned_and_16_bits_are_read(tmp_path):
    write_folder(tmp_path)
    values = np.arange(144, dtype=np.uint8).reshape(12, 12)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.fromarray(np.stack([values] * 3, 2)).save(tmp_path / "train/above/0.png", exif=exif)
    Image.fromarray((values.astype(np.uint16) + 1) * 200).save(tmp_path / "train/above/1.png")
    x = load_folder(tmp_path).train.x
    assert torch.equal(x[0, 0], torch.from_numpy(np.rot90(values, -1).copy()))
    assert torch.allclose(x[1, 0].float(), torch.from_numpy(values).float() * 255 / 143, atol=1)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda data: (data / "test" / "below").rename(data / "test" / "beside"), "class 'b"),
        (lambda data: (data / "train" / "above").rename(data / "above"), "at least 2 classes"),
        (lambda data: Image.new("RGB", (9, 9)).save(data / "train/below/5.png"), "image_size"),
        (lambda data: [p.write_text("") for p in (data / "test/above").iterdir()], "could be read"),
        (lambda data: [p.unlink() for p in (data / "test/above").iterdir()], "no picture in this"),
    ],
)
def test_bad_data_is_named(tmp_path, spoil, complaint):
    write_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(PROJECT.data.DataError, match=complaint) as error:
        load_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_mnist_is_read_and_a_damaged_file_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        sizes = [n.to_bytes(4, "big") for n in (count, 28, 28)]
        pixels = bytes(range(count)) * 784
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"".join(sizes) + pixels)
        labels = b"\0\0\x08\x01" + sizes[0] + bytes(range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    source = PROJECT.data.load(dataset="mnist", data_dir=tmp_path, image_size=14)
    assert source.train.x.shape == (6, 1, 14, 14) and source.test.y.tolist() == [0, 1, 2, 3]
    (raw / "t10k-labels-idx1-ubyte").write_bytes(labels[:-1])
    with pytest.raises(PROJECT.data.DataError, match="t10k-labels-idx1-ubyte: damaged"):
        PROJECT.data.load(dataset="mnist", data_dir=tmp_path, image_size=14)


# --- the experiment ---------------------------------------------------------------------------


def settings(**changes: object) -> object:
    """A Config with config.yaml's values, small, and `changes`."""
    kind = PROJECT.train.Config
    kinds = PROJECT.run.get_type_hints(kind, include_extras=True)
    small = {"steps": 8, "rounds": 2, "width": 2, "batch_size": 6, "pool_batch_size": 10}
    small |= {"labels_per_class": 4, "val_per_class": 5, "device": "cpu", "repeats": 1}
    small |= {"lr": 0.03, "ema": 0.3} | changes
    texts = {name: str(value).lower() for name, value in small.items()}
    return PROJECT.run.read_config(kind, kinds, None, texts)


def made_source(seed: int = 0) -> Source:
    """Three classes of noisy 8 x 8 pictures, bright at another place each; 120 and 40 of them."""
    rng = np.random.default_rng(seed)
    parts = []
    for count in (120, 40):
        y = np.arange(count) % 3
        x = rng.integers(0, 90, (count, 1, 8, 8))
        for picture, label in zip(x, y, strict=True):
            picture[0, 2 * label : 2 * label + 4, 1:5] += 110
        parts.append(PROJECT.data.Images(torch.from_numpy(x).byte(), torch.from_numpy(y)))
    files = tuple(map(str, range(120)))
    return PROJECT.data.Source("made", ("a", "b", "c"), *parts, files, "")


def new_trial(folder: Path, **changes: object) -> object:
    (folder / "weights").mkdir(parents=True)
    return PROJECT.train.new_trial(made_source(), settings(**changes), folder, torch.device("cpu"))


def outputs(trial: object) -> dict[str, dict]:
    """Of each arm what training decided, and what the test says."""
    arms = PROJECT.train.arms_of(trial)
    outcomes = {arm.name: PROJECT.train.self_train(trial, arm) for arm in arms}
    report = PROJECT.train.evaluate_arms(trial, outcomes)
    found = {"sklearn": {"test": report["sklearn"]}, "sklearn_val": {"test": report["sklearn_val"]}}
    for name, outcome in outcomes.items():
        rows = report["arms"][name]["rounds"]
        labels = [PROJECT.train.read_round(trial, name, n).label for n in range(len(rows))]
        models = [PROJECT.train.read_model(trial, name, n).state_dict() for n in range(len(rows))]
        state = [torch.cat([x.double().flatten() for x in m.values()]).tolist() for m in models]
        val = ("val_loss", "val_accuracy", "temperature")
        found[name] = {
            "weights": state,
            "labels": [label.tolist() for label in labels],
            "loss": [row["train_loss"] for row in outcome.rows],
            "val": [[row.get(key) for key in val] for row in outcome.rows],
            "agreement": [outcome.kept.get("agreement"), [r.get("changed") for r in outcome.rows]],
            "test": [row["test_accuracy"] for row in rows],
            "quality": [(row["pseudo_labels"], row["accuracy"]) for row in rows],
        }
    return found


def moved(before: dict, after: dict) -> set[str]:
    return {
        f"{arm} {key}"
        for arm in before
        for key in before[arm]
        if before[arm][key] != after[arm][key]
    }


ARMS = ("supervised", "plain", "rounds", "every_step", "supervised_val", "method_val", "oracle")
TRAINED = ("supervised", "rounds", "method_val", "oracle")  # well enough to be right
POOLED = ("plain", "rounds", "every_step", "method_val")
LEARNED = ("weights", "loss", "test")


def named(arms: tuple[str, ...], *keys: str) -> set[str]:
    return {f"{arm} {key}" for arm in arms for key in keys}


SKLEARN = {"sklearn test", "sklearn_val test"}
QUALITY = named(POOLED, "quality")
OWN_VAL = ("supervised", "plain", "rounds", "every_step", "oracle")  # they do not learn it
LABELS = named(POOLED, "labels", "agreement", "quality")
INFLUENCE = {  # what is disturbed: (what must move, what else may)
    "test_labels": (SKLEARN | named(ARMS, "test"), set()),
    "test_pictures": (SKLEARN | named(TRAINED, "test"), named(ARMS, "test")),
    "hidden_labels": (
        QUALITY | named(("oracle",), "weights", "loss"),
        named(("oracle",), *LEARNED, "val"),
    ),
    "val_labels": (
        named(OWN_VAL, "val") | named(("supervised_val", "method_val"), "weights", "loss"),
        SKLEARN - {"sklearn test"}
        | named(("supervised_val", "method_val", "plain"), *LEARNED)
        | named(("method_val", "plain"), "labels", "agreement", "quality"),
    ),
    "pool_pictures": (
        named((*POOLED, "oracle"), "weights", "loss") | named(POOLED, "labels", "quality"),
        SKLEARN | LABELS | named((*POOLED, "oracle"), *LEARNED, "val"),
    ),
    "training_labels": (
        named(ARMS, "weights", "loss"),
        SKLEARN | LABELS | named(ARMS, *LEARNED, "val"),
    ),
}
INFLUENCE |= {f"{part}_pictures": INFLUENCE[f"{part}_labels"] for part in ("val", "training")}


def disturb(trial: object, what: str) -> object:
    """The trial with a part of its data changed: labels turned by one class, pictures inverted."""
    part, kind = what.rsplit("_", 1)
    name = {"training": "labelled", "hidden": "hidden"}.get(part, part)
    old = getattr(trial.splits, name)
    if name in ("pool", "hidden"):
        new = 255 - old if name == "pool" else (old + 1) % 3
    else:
        new = old._replace(x=255 - old.x) if kind == "pictures" else old._replace(y=(old.y + 1) % 3)
    return trial._replace(splits=trial.splits._replace(**{name: new}))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    return outputs(new_trial(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("what", INFLUENCE)
def test_what_each_part_of_the_data_may_move(tmp_path, undisturbed, what):
    must, may = INFLUENCE[what]
    found = moved(undisturbed, outputs(disturb(new_trial(tmp_path), what)))
    assert must - found == set(), "a dead wire"
    assert found - must - may == set(), "a leak"


def cycle(step: int, total: int, low: float, top: float, end: float) -> float:
    """The one-cycle schedule: by cosines up over the first 30%, down over the rest."""
    peak = 0.3 * total - 1
    first, last, share = (
        (low, top, step / peak) if step <= peak else (top, end, (step - peak) / (total - 1 - peak))
    )
    return last + (first - last) / 2 * (1 + math.cos(math.pi * share))


def adamw(parts: dict, grads: dict, state: dict, step: int, total: int, config: object) -> None:
    """One step of AdamW with the schedule's rate and its first beta, in plain sight."""
    lr = cycle(step, total, config.lr / 25, config.lr, config.lr / 25 / 1e4)
    beta = cycle(step, total, 0.95, 0.85, 0.95)
    for name, part in parts.items():
        m, v, power = state.setdefault(name, [0.0, 0.0, 1.0])
        m = beta * m + (1 - beta) * grads[name]
        v = 0.999 * v + 0.001 * grads[name] ** 2
        state[name] = [m, v, power]
        corrected = m / (1 - beta ** (step + 1))
        root = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        part.data = part.data * (1 - lr * config.weight_decay) - lr * corrected / root


@pytest.mark.parametrize(
    ("name", "restart"),
    [
        ("supervised", False),
        ("plain", False),  # restarts all the same
        ("rounds", False),
        ("rounds", True),
        ("every_step", False),
    ],
)
def test_the_steps_by_hand(tmp_path, monkeypatch, name, restart):
    """Batches, loss, gradient, optimizer, schedule and teacher of the last round (every_step: the
    first).
    """
    monkeypatch.setattr(PROJECT.train, "LiveLabels", partial(LiveLabels, momentum=0.3))
    trial = new_trial(tmp_path, steps=4, ema=0.8, restart=restart)
    (arm,) = (arm for arm in PROJECT.train.arms_of(trial) if arm.name == name)
    PROJECT.train.self_train(trial, arm)
    last = 2 if name in ("plain", "rounds") else 0
    steps = 12 if name == "supervised" else 4
    total = 12 if name in ("supervised", "every_step") else 4  # of the schedule
    for number in range(last + 1):
        if number == 0 or restart or name == "plain":
            student, _, live, *_ = PROJECT.train.new_learner(trial)
        student, teacher = replay(trial, arm, number, student, live, steps, total)
    found = PROJECT.train.read_model(trial, name, last).state_dict()
    for key, x in teacher.items():
        if x.is_floating_point():
            assert torch.allclose(found[key].double(), x, atol=1e-4), key


def replay(trial, arm, number, student, live, steps, total) -> tuple:
    """The network after a round, and the mean of its states, by the formulas."""
    config, splits, state = trial.config, trial.splits, {}
    label = torch.full((len(splits.pool),), NONE)
    if number:
        label = PROJECT.train.read_round(trial, arm.name, number - 1).label
    given, images, pool = label != NONE, splits.labelled, None
    if arm.how == "plain":
        x, y = torch.cat((images.x, splits.pool[given])), torch.cat((images.y, label[given]))
        images = Images(x, y)
    elif arm.how == "rounds" and number:
        pool = Images(splits.pool[given], label[given])
    elif arm.how == "every_step":
        pool = Images(splits.pool, label)
    labeller = SmallCNN(channels=1, width=2, classes=3).eval()
    PROJECT.run.seed_everything(config.seed, "round", number)
    sizes = (6, 10) if pool else (16,)
    streams = [
        training_batches(part, size, steps)
        for part, size in zip((images, pool), sizes, strict=False)
    ]
    teacher, learned = {key: x.clone().double() for key, x in student.state_dict().items()}, []
    student.train()
    for step, batch in enumerate(zip(*streams, strict=True)):
        (x, y), *other = batch
        losses = []
        if other:
            ((u, wanted),) = other
            weight = torch.ones(len(u))
            if arm.how == "every_step":
                labeller.load_state_dict(teacher)
                weak = augment(u, config.weak, mirror=False, geometry_only=True)
                with torch.no_grad():
                    wanted, weight = live(labeller(weak).softmax(1))
            learned += weight.tolist()
            u = augment(u, config.strong, mirror=False)
            x = augment(x, config.augment, mirror=False)
            logits = student(torch.cat((x, u)))
            chosen = logits[len(x) :].log_softmax(1).gather(1, wanted[:, None])[:, 0]
            losses.append(-(weight * chosen).sum() / len(u))
        else:
            x = augment(x, config.augment, mirror=False)
            logits = student(x)
        losses.append(-logits[: len(x)].log_softmax(1).gather(1, y[:, None]).mean())
        parts = dict(student.named_parameters())
        grads = dict(zip(parts, torch.autograd.grad(sum(losses), parts.values()), strict=True))
        adamw(parts, grads, state, step, total, config)
        now = student.state_dict()
        decay = 0.8 if step else 0.0
        teacher = {
            key: decay * teacher[key] + (1 - decay) * x.double() if x.is_floating_point() else x
            for key, x in now.items()
        }
    assert arm.how != "every_step" or 0.1 < np.mean(learned) < 0.9  # some labels do not count
    return student, teacher


def test_a_round_looks_at_no_more_pictures_than_it_can_learn(tmp_path):
    trial = new_trial(tmp_path, pool_batch_size=5, steps=3, val_per_class=0, compare=False)
    (arm,) = PROJECT.train.arms_of(trial)
    assert (arm.name, arm.how) == ("rounds", "rounds")
    PROJECT.train.self_train(trial, arm)
    seen = [PROJECT.train.read_round(trial, "rounds", n).predicted != NONE for n in range(3)]
    assert [int(x.sum()) for x in seen] == [15, 15, 15] and len(trial.splits.pool) == 108
    assert not torch.equal(seen[0], seen[1])


def test_the_kept_round_is_what_is_saved_written_and_shown(tmp_path, monkeypatch):
    """Not the last one: labels, model and pictures come from the round that the stop keeps."""
    trial = new_trial(tmp_path, compare=False)
    (arm,) = PROJECT.train.arms_of(trial)
    outcome = PROJECT.train.self_train(trial, arm)
    rows = [row | {"temperature": 0.5 + n / 5} for n, row in enumerate(outcome.rows)]
    outcome = outcome._replace(rows=rows, kept={"last": 2, "agreement": 1, "validation": 0})
    said = PROJECT.train.read_round(trial, "rounds", 1).label.clamp(min=0)
    half = torch.where(torch.arange(len(said)) % 2 == 0, said, (said + 1) % trial.classes)
    source, trial = made_source(), trial._replace(splits=trial.splits._replace(hidden=half))
    PROJECT.train.save_model(source, trial, outcome)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    model = PROJECT.train.read_model(trial, "rounds", 1)
    assert all(torch.equal(x, saved["weights"][name]) for name, x in model.state_dict().items())
    assert saved["temperature"] == 0.7
    PROJECT.train.write_labels(source, trial, outcome)
    probs = calibrated_probs(PROJECT.train.predict(model, trial.splits.pool), saved["temperature"])
    table = list(csv.DictReader((tmp_path / "pseudo_labels.csv").open()))
    found = [float(row["confidence"]) for row in table]
    assert found == pytest.approx(probs.max(1).values.tolist(), abs=1e-6)
    shown = {}
    for plot in ("plot_arms", "plot_quality", "plot_examples"):

        def keep(*args: object, plot: str = plot) -> None:
            shown[plot] = args

        monkeypatch.setattr(PROJECT.train, plot, keep)
    metrics = {"arms": {"rounds": {}}}
    PROJECT.train.plot_results(source, metrics, trial, outcome)
    assert shown["plot_arms"][0] is metrics and shown["plot_quality"][0] is metrics["arms"]
    first, mistakes, number, *_ = shown["plot_examples"]
    splits = trial.splits
    for items, place in ((first, 0), (mistakes, 1)):
        given = PROJECT.train.read_round(trial, "rounds", place)
        wrong = (given.label != NONE) & (given.label != splits.hidden)
        chosen = wrong if place else given.label != NONE
        wanted = given.confidence[chosen].sort(descending=True).values[:16]
        assert items["confidence"].tolist() == wanted.tolist()
        assert all((items["label"] != items["truth"]).tolist()) or not place
    assert number == 1 and len(mistakes["x"])


def test_scikit_learn_gets_the_same_labels_and_the_right_features(tmp_path, monkeypatch):
    trial, calls = new_trial(tmp_path, sklearn_pool=20), []
    arms = {arm.name: arm for arm in PROJECT.train.arms_of(trial)}
    names = ("supervised", "supervised_val")
    outcomes = {name: PROJECT.train.self_train(trial, arms[name]) for name in names}

    def keep(kind: str, *parts: object) -> dict:
        calls.append((kind, *parts))
        return {"k=1": len(calls)}

    monkeypatch.setattr(PROJECT.train, "sklearn_accuracy", keep)
    report = PROJECT.train.evaluate_arms(trial, outcomes)
    assert list(report["sklearn"].values()) == [1, 2, 3, 4, 5, 6]
    assert list(report["sklearn_val"].values()) == [7, 8, 9, 10, 11, 12]
    splits = trial.splits
    both = torch.cat((splits.labelled.x, splits.val.x))
    for name, images, own in (
        ("supervised", splits.labelled.x, calls[:6]),
        ("supervised_val", both, calls[6:]),
    ):
        model = PROJECT.train.read_model(trial, name, 0).eval()
        for place, (_, labelled, pool, test) in enumerate(own):
            for found, x in (
                (labelled[0], images),
                (pool, splits.pool[:20]),
                (test[0], splits.test.x),
            ):
                x = x.float() / 255
                with torch.no_grad():
                    wanted = x.flatten(1) if place < 3 else model.features(x)
                assert torch.allclose(found, wanted, atol=1e-6)
            assert torch.equal(test[1], splits.test.y)
        assert torch.equal(labelled[1], arms[name].images.y)


@pytest.mark.parametrize("on", [False, True])
def test_settings_reach_the_choice_of_labels(tmp_path, monkeypatch, on):
    changes = {"balanced": on, "revise": on, "threshold": 0.4, "add_per_round": 7}
    changes |= {"pool_batch_size": 20}  # a round looks at the whole pool
    trial, calls = new_trial(tmp_path, **changes), {"next_labels": [], "confident_labels": []}
    assert PROJECT.train.new_learner(trial).live.balanced == on

    def watch(name: str, real: object) -> None:
        def keep(*parts: object, **how: object) -> object:
            calls[name].append((parts, how))
            return real(*parts, **how)

        monkeypatch.setattr(PROJECT.train, name, keep)

    watch("next_labels", PROJECT.train.next_labels)
    watch("confident_labels", PROJECT.train.confident_labels)
    for arm in PROJECT.train.arms_of(trial)[1:3]:
        outcome = PROJECT.train.self_train(trial, arm)
        (parts, how), *_ = calls["next_labels" if arm.name == "plain" else "confident_labels"]
        model = PROJECT.train.read_model(trial, arm.name, 0)
        logits = PROJECT.train.predict(model, trial.splits.pool)
        if arm.name == "plain":  # the validation labels calibrate its choice
            assert how == {"add": 7, "threshold": 0.4, "balanced": on, "revise": on}
            temperature = outcome.rows[0]["temperature"]
            assert temperature != 1
            assert torch.allclose(parts[1], calibrated_probs(logits, temperature))
        else:
            assert how == {"balanced": on}
            probs = calibrated_probs(logits, 1.0)
            assert torch.allclose(parts[0].sort(0).values, probs.sort(0).values, atol=1e-5)


def test_patience_ends_an_arm(tmp_path, monkeypatch):
    trial = new_trial(tmp_path, rounds=6, patience=2, compare=False)
    shares = iter([1.0, 0.3, 0.5, 0.4, 0.2, 0.1, 0.1])
    monkeypatch.setattr(PROJECT.train, "share_changed", lambda *_: next(shares))
    (arm,) = PROJECT.train.arms_of(trial)
    outcome = PROJECT.train.self_train(trial, arm)
    assert len(outcome.rows) == 4 and outcome.kept["agreement"] == 1


def test_all_arms_take_the_same_number_of_steps(tmp_path, monkeypatch):
    trial, steps, taken = new_trial(tmp_path), {}, []
    kind = PROJECT.train.AveragedModel
    update = kind.update_parameters

    def counted(teacher: object, model: object) -> None:
        taken.append(1)
        update(teacher, model)

    monkeypatch.setattr(kind, "update_parameters", counted)
    for arm in PROJECT.train.arms_of(trial):
        taken.clear()
        PROJECT.train.self_train(trial, arm)
        steps[arm.name] = len(taken)
    assert steps == dict.fromkeys(ARMS, 3 * 8)


def test_each_repeat_has_a_split_and_weights_of_its_own(tmp_path):
    trials = [new_trial(tmp_path / str(n), seed=n) for n in (0, 1)]
    first, second = (trial.splits for trial in trials)
    assert not torch.equal(first.pool, second.pool)
    weights = [PROJECT.train.untrained_network(trial).state_dict() for trial in trials]
    assert not torch.equal(weights[0]["layers.0.weight"], weights[1]["layers.0.weight"])
    again = PROJECT.train.untrained_network(trials[0]).state_dict()
    assert torch.equal(again["layers.0.weight"], weights[0]["layers.0.weight"])


def made_repeat(offset: float) -> dict:
    """What evaluate_arms gives, each arm and each of its rounds with a number of its own."""
    arms = {}
    for place, name in enumerate(ARMS):
        rounds = [
            {
                "round": n,
                "test_accuracy": (place + n / 10) / 10 + offset,
                "accuracy": 0.9 - n / 10,
                "seconds": 1.0,
                "pseudo_labels": 1,
            }
            for n in range(4)
        ]
        kept = {"last": 3, "agreement": 2, "validation": 1}
        arms[name] = {"rounds": rounds, "kept": kept}
    scores = {"spreading k=7, pixels": 0.31 + offset, "logistic C=1, features": 0.3 + offset}
    sizes = {"labelled": 12, "validation": 15, "pool": 9, "test": 9}
    return {
        "sizes": sizes,
        "arms": arms,
        "sklearn": scores,
        "sklearn_val": {"neighbours k=1, pixels": 0.4},
    }


def test_the_headline_is_traced_to_the_right_arms():
    config = settings(stop="agreement", method="rounds")
    repeats = [made_repeat(0.0), made_repeat(0.02)]
    metrics = PROJECT.train.summarise(repeats, config)
    wanted = {
        "self_training_accuracy": 0.22 + 0.01,  # arm 2, round 2
        "supervised_accuracy": 0.03 + 0.01,  # the last one
        "oracle_accuracy": 0.63 + 0.01,
        "self_training_val_accuracy": 0.52 + 0.01,
        "sklearn_accuracy": 0.31 + 0.01,
        "sklearn_val_accuracy": 0.4,
        "pseudo_label_accuracy": 0.7,
    }
    assert PROJECT.train.headline(metrics, config) == pytest.approx(wanted)
    assert metrics["arms"]["rounds"]["test_accuracy"]["of_seeds"] == pytest.approx([0.22, 0.24])
    assert metrics["arms"]["rounds"]["test_accuracy"]["sd"] == pytest.approx(0.02 / math.sqrt(2))
    config = settings(stop="validation", method="every_step")
    metrics = PROJECT.train.summarise(repeats, config)
    found = PROJECT.train.headline(metrics, config)
    assert found["self_training_accuracy"] == pytest.approx(0.31 + 0.01)
    assert found["self_training_val_accuracy"] == pytest.approx(0.52 + 0.01)


def test_label_spreading_gets_what_it_should():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(0, 1, (60, 4)) + 3 * np.eye(3, 4)[y]
    parts = [torch.from_numpy(part) for part in (x[:9], y[:9], x[9:40], x[40:], y[40:])]
    found = sklearn_accuracy("spreading", (parts[0], parts[1]), parts[2], (parts[3], parts[4]))
    labels = np.where(np.arange(40) < 9, y[:40], -1)
    wanted = LabelSpreading(kernel="knn", n_neighbors=7).fit(x[:40], labels)
    assert found["k=7"] == wanted.score(x[40:], y[40:])
    assert set(found) == {"k=5", "k=7", "k=10"}


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A whole tiny run on the digits."""
    return train("self_training", *TINY, "--out_dir", tmp_path_factory.mktemp("whole"))


def report_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def without_seconds(folder: Path) -> tuple:
    metrics = report_of(folder)["metrics"]
    for arm in metrics["arms"].values():
        for rows in arm["rounds"]:
            for row in rows:
                del row["seconds"]
    table = list(csv.DictReader((folder / "history.csv").open()))
    for row in table:
        del row["seconds"]
    return metrics, table


@pytest.mark.parametrize("checkpoints", [2, 9])  # in plain, and in the middle of every_step
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, run, checkpoints):
    train_until("self_training", checkpoints, *TINY, "--out_dir", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "metrics.json").exists()
    assert train("self_training", "--resume", folder) == folder
    assert without_seconds(folder) == without_seconds(run)


def test_the_headline_is_recomputed_from_weights_and_data(run):
    source = load(dataset="digits", data_dir=Path(), image_size=0)
    parts = split(source, labels_per_class=5, val_per_class=10, pool_size=150, seed=0)
    numbers, rounds = report_of(run)["headline"], {}
    table = list(csv.DictReader((run / "history.csv").open()))
    rows = [row for row in table if row["stage"] == "rounds-seed0"]
    changed = [float(row["changed"]) for row in rows]
    kept = changed.index(min(changed))
    rounds = {"self_training": ("rounds", kept), "supervised": ("supervised", 0)}
    changed = [float(r["changed"]) for r in table if r["stage"] == "method_val-seed0"]
    rounds |= {
        "oracle": ("oracle", 0),
        "self_training_val": ("method_val", changed.index(min(changed))),
    }
    for key, (arm, number) in rounds.items():
        state = torch.load(run / f"weights/{arm}-seed0-round{number}.pt", weights_only=True)
        model = SmallCNN(channels=1, width=4, classes=10).eval()
        model.load_state_dict(state["model"])
        with torch.no_grad():
            right = model(parts.test.x.float() / 255).argmax(1) == parts.test.y
        assert numbers[f"{key}_accuracy"] == pytest.approx(float(right.double().mean())), key
    state = torch.load(run / f"weights/rounds-seed0-round{kept}.pt", weights_only=True)
    given = state["label"] != NONE
    right = (state["label"] == parts.hidden)[given].double().mean()
    assert numbers["pseudo_label_accuracy"] == pytest.approx(float(right))
    saved = torch.load(run / "model.pt", weights_only=True)
    assert all(torch.equal(x, state["model"][name]) for name, x in saved["weights"].items())
    assert saved["temperature"] == pytest.approx(float(rows[kept]["temperature"]))
    assert {"accuracy.png", "pseudo_labels.png", "examples.png"} <= {p.name for p in run.iterdir()}


def test_the_labels_are_written_with_the_round_since_which_they_stay(run):
    table = list(csv.DictReader((run / "pseudo_labels.csv").open()))
    assert list(table[0]) == ["file", "pseudo_label", "confidence", "round"]
    source = load(dataset="digits", data_dir=Path(), image_size=0)
    parts = split(source, labels_per_class=5, val_per_class=10, pool_size=150, seed=0)
    assert [row["file"] for row in table] == [source.files[n] for n in parts.places]
    saved = torch.load(run / "model.pt", weights_only=True)
    model = SmallCNN(channels=1, width=4, classes=10).eval()
    model.load_state_dict(saved["weights"])
    with torch.no_grad():
        probs = calibrated_probs(model(parts.pool.float() / 255), saved["temperature"])
    assert [int(row["pseudo_label"]) for row in table] == probs.argmax(1).tolist()
    found = [float(row["confidence"]) for row in table]
    assert found == pytest.approx(probs.max(1).values.tolist(), abs=2e-5)
    kept = report_of(run)["metrics"]["arms"]["rounds"]["best_round"][0]
    states = [
        torch.load(run / f"weights/rounds-seed0-round{n}.pt", weights_only=True)["predicted"]
        for n in range(kept + 1)
    ]
    for place, row in enumerate(table):
        since, label = int(row["round"]), int(row["pseudo_label"])
        assert all(state[place] == label for state in states[since:])
        assert since == 0 or states[since - 1][place] != label


@pytest.fixture(scope="module")
def own_run(tmp_path_factory) -> Path:
    """Two labelled classes and pictures without any label, without the comparison."""
    data = tmp_path_factory.mktemp("own")
    write_folder(data, unlabelled=9)
    flags = ["--dataset", "folder", "--data_dir", data, "--labels_per_class", "0"]
    flags += ["--val_per_class", "4", "--compare", "false", "--out_dir", data / "runs"]
    return train("self_training", *flags, *SMALL)


def test_a_run_on_unlabelled_pictures_without_the_comparison(own_run):
    report = report_of(own_run)
    assert list(report["headline"]) == ["self_training_accuracy"]
    assert list(report["metrics"]["arms"]) == ["rounds"]
    assert "sklearn" not in report["metrics"]
    assert report["metrics"]["sizes"] == {"labelled": 20, "validation": 8, "pool": 9, "test": 8}
    assert len(list(own_run.glob("*.png"))) == 3
    stages = {row["stage"] for row in csv.DictReader((own_run / "history.csv").open())}
    assert stages == {"rounds-seed0"}
    table = list(csv.DictReader((own_run / "pseudo_labels.csv").open()))
    assert sorted(row["file"] for row in table) == [f"unlabelled/{n}.png" for n in range(9)]
    assert {row["pseudo_label"] for row in table} <= {"above", "below"}


def test_predictions_are_those_of_training_whatever_the_file(own_run, tmp_path):
    data = own_run.parent.parent
    odd = tmp_path / "odd"
    odd.mkdir()
    picture = Image.open(data / "unlabelled" / "0.png")
    picture.resize((31, 17)).convert("L").save(odd / "grey.png")
    picture.convert("RGBA").save(odd / "alpha.png")
    exif = Image.Exif()
    exif[274] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(odd / "turned.png", exif=exif)
    (odd / "broken.png").write_bytes(b"no picture")
    output = call(
        PROJECT.predict, own_run, data / "unlabelled", odd, "--out_dir", tmp_path, "--batch_size", 4
    )
    folder = Path(output.splitlines()[-1])
    assert "unreadable files left out: 1" in output and "pictures: 12" in output
    rows = {Path(r["file"]).name: r for r in csv.DictReader((folder / "predictions.csv").open())}
    told = {Path(r["file"]).name: r for r in csv.DictReader((own_run / "pseudo_labels.csv").open())}
    for name, row in told.items():
        assert rows[name]["class"] == row["pseudo_label"]
        assert float(rows[name]["probability"]) == pytest.approx(float(row["confidence"]), abs=2e-6)
    for name in ("alpha.png", "turned.png"):
        assert rows[name]["probability"] == rows["0.png"]["probability"]
    assert (folder / "predictions.png").is_file() and "grey.png" in rows


def test_colours_become_luminance():
    x = torch.randint(0, 256, (5, 3, 4, 4)).byte()
    grey = in_channels(x, 1)
    for picture, found in zip(x, grey, strict=True):
        wanted = Image.fromarray(picture.permute(1, 2, 0).numpy()).convert("L")
        assert np.abs(np.array(wanted).astype(int) - found[0].numpy()).max() <= 1
    assert in_channels(x, 3) is x


def test_the_least_data_can_be_drawn(tmp_path):
    empty = label_quality(no_labels(4).label, torch.zeros(4).long(), 2)
    half = {"mean": 0.5, "sd": 0.0, "of_seeds": [0.5]}
    rounds = [[{"round": 0, "test_accuracy": 0.5, "changed": 1.0} | empty]]
    arm = {"rounds": rounds, "best_round": [0], "test_accuracy": half}
    sizes = {"labelled": 2, "validation": 0}
    metrics = {"arms": {"rounds": arm}, "sizes": sizes}
    plot_arms(metrics, "rounds", "ti$tle", tmp_path / "accuracy.png")
    plot_quality(metrics["arms"], "rounds", ("a$", "b"), "title", tmp_path / "quality.png")
    none = {"x": np.zeros((0, 1, 4, 4)), "label": [], "truth": [], "confidence": []}
    plot_examples(none, none, 0, ("a", "b"), "title", tmp_path / "examples.png")
    assert len(list(tmp_path.iterdir())) == 3


def test_the_least_data_give_a_whole_run(tmp_path):
    """One label a class, one picture without a label, one test picture a class, no validation."""
    write_folder(tmp_path, unlabelled=1)
    for path in tmp_path.glob("t*/*/*.png"):
        if path.stem != "0":
            path.unlink()
    flags = ["--dataset", "folder", "--data_dir", tmp_path, "--labels_per_class", "1"]
    flags += ["--val_per_class", "0", "--out_dir", tmp_path / "runs"]
    folder = train("self_training", *flags, *SMALL)
    report = report_of(folder)
    assert report["metrics"]["sizes"] == {"labelled": 2, "validation": 0, "pool": 1, "test": 2}
    keys = {"self_training_accuracy", "supervised_accuracy", "sklearn_accuracy"}
    assert set(report["headline"]) == keys
    assert len(list(folder.glob("*.png"))) == 3


def test_a_network_that_is_not_finite_ends_the_run():
    model = SmallCNN(channels=1, width=2, classes=3)
    torch.nn.init.constant_(model.layers[0].weight, math.inf)
    with pytest.raises(FloatingPointError, match="smaller lr"):
        PROJECT.train.predict(model, torch.ones(3, 1, 8, 8).byte())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--dataset", "folder", "--data_dir", "nowhere"], "nowhere"),
        (["--add_per_round", "2.5"], "whole number"),
        (["--stop", "validation", "--val_per_class", "0"], "expected agreement"),
        (["--image_size", "5"], "at least 8"),
        (["--labels_per_class", "500"], "too few pictures"),
    ],
)
def test_mistakes_leave_no_run(tmp_path, flags, complaint, capsys):
    with pytest.raises((SystemExit, PROJECT.data.DataError)) as error:
        train("self_training", *flags, "--out_dir", tmp_path / "runs")
    assert complaint in str(error.value) + capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True
