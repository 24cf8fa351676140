"""Self-training: the selection against brute force, and runs as a user starts them."""

import csv
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression

from self_training.data import (
    DataError,
    Images,
    Source,
    augment,
    fingerprints,
    load,
    split,
    training_batches,
)
from self_training.model import (
    NONE,
    SmallCNN,
    best_round,
    calibrated_probs,
    end_of_rounds,
    fit_temperature,
    label_quality,
    next_labels,
    no_labels,
    rank_in_class,
)
from self_training.plots import plot_accuracy, plot_examples, plot_quality

TRAIN = Path(__file__).parents[1] / "self_training" / "train.py"
SMALL = ["--device", "cpu", "--repeats", "1", "--steps", "8", "--width", "4", "--rounds", "3"]
TINY = ["--dataset", "digits", "--pool_size", "200", "--sklearn", "neighbours", *SMALL]
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


def test_scores_that_round_to_one_in_float32_are_still_told_apart():
    logits = torch.tensor([[20.0, 0.0], [30.0, 0.0], [25.0, 0.0]])
    assert logits.softmax(1)[:, 0].tolist() == [1, 1, 1]
    after = next_labels(
        no_labels(3), calibrated_probs(logits, 1.0), torch.arange(3), add=1, **PLAIN
    )
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


def test_each_picture_is_added_once_until_the_pool_is_empty():
    pseudo, added = no_labels(50), []
    for number in range(8):
        probs = random_probs(50, 3, number)
        after = next_labels(pseudo, probs, torch.arange(50), add=8, **PLAIN)
        added += ((after.label != NONE) & (pseudo.label == NONE)).nonzero()[:, 0].tolist()
        pseudo = after
    assert sorted(added) == list(range(50))


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


def flood(balanced: bool) -> tuple[list[float], list[int]]:
    """Accuracy by round, and pseudo-labels per class, of a logistic regression that teaches itself.

    Half of the pool are 0s, spread wide and far from the boundary: the surest points. Once they
    outnumber the 1s in the training set, the boundary moves over the 1s.
    """
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return np.concatenate((rng.normal(4, 2, (count, 1)), rng.normal(0, 0.7, (count, 1))))

    pool, x = draw(500), draw(5)
    truth, y = np.repeat([0, 1], 500), np.repeat([0, 1], 5)
    pseudo, scores = no_labels(1000), []
    how = {"threshold": 0.0, "balanced": balanced, "revise": False}
    for _ in range(11):
        label = pseudo.label.numpy()
        given = label != NONE
        teacher = LogisticRegression(C=0.1)
        teacher.fit(np.vstack((x, pool[given])), np.append(y, label[given]))
        scores.append(teacher.score(pool, truth))
        probs = torch.from_numpy(teacher.predict_proba(pool))
        pseudo = next_labels(pseudo, probs, torch.arange(1000), add=40, **how)
    return scores, np.bincount(label[given], minlength=2).tolist()


def test_one_class_floods_a_plain_selection_and_not_a_balanced_one():
    plain, (zeros, ones) = flood(False)
    assert plain[0] > 0.9 and plain[-1] < 0.6  # all but collapsed into class 0
    assert ones < 0.02 * zeros
    balanced, (zeros, ones) = flood(True)
    assert balanced[0] == plain[0] and balanced[-1] > 0.88
    assert zeros == ones == 200


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


# --- when to stop -----------------------------------------------------------------------------


def test_the_best_round_is_kept_and_may_be_round_0():
    assert best_round([0.5, 0.3, 0.3, 0.9]) == 1
    assert best_round([0.5, 0.6]) == 0


def test_patience_counts_rounds_since_the_best():
    how = {"rounds": 9, "patience": 2}
    assert end_of_rounds([0.5, 0.6], **how) is None
    assert end_of_rounds([0.5, 0.6, 0.4, 0.45], **how) is None
    assert "2 rounds" in end_of_rounds([0.5, 0.6, 0.5], **how)
    assert end_of_rounds([0.5, 0.4, 0.3], rounds=2, patience=2) == "all 2 rounds done"


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
    return Source("numbers", ("a", "b", "c"), images, other, False, "")


@pytest.mark.parametrize("test", [False, True])
def test_splits_are_disjoint_complete_and_fixed_by_the_seed(test):
    how = {"labels_per_class": 5, "val_per_class": 7, "pool_size": 0}
    parts = split(numbered(300, test), seed=3, **how)
    sets = [
        {bytes(picture.flatten().tolist()) for picture in x}
        for x in (parts.labelled.x, parts.val.x, parts.pool, parts.test.x)
    ]
    assert len(set().union(*sets)) == sum(map(len, sets)) == 300 + 30 * test
    assert parts.labelled.y.bincount().tolist() == [5, 5, 5]
    assert parts.val.y.bincount().tolist() == [7, 7, 7]
    again, other = (split(numbered(300, test), seed=seed, **how) for seed in (3, 4))
    assert torch.equal(parts.pool, again.pool)
    assert not torch.equal(parts.pool, other.pool)
    numbers = parts.pool.flatten(1).contiguous().view(torch.int32)[:, 0]
    assert torch.equal(numbers % 3, parts.hidden.int())


def test_a_class_that_is_too_small_is_named():
    with pytest.raises(DataError, match=r"class '.' has too few pictures"):
        split(numbered(30, True), labels_per_class=5, val_per_class=7, pool_size=0, seed=0)


def test_training_batches_show_every_picture_equally_often():
    images = Images(torch.arange(10).byte().view(10, 1, 1, 1), torch.arange(10))
    batches = list(training_batches(images, 4, 5, augmented=False, mirror=False))
    assert torch.cat([y for _, y in batches]).bincount().tolist() == [2] * 10
    for x, y in batches:
        assert torch.equal((x * 255).round().flatten().long(), y)


def test_augmentation_keeps_a_picture_roughly_in_place():
    torch.manual_seed(0)
    x = torch.zeros(200, 1, 16, 16)
    x[:, :, 6:10, 6:10] = 1
    moved = augment(x, mirror=False)
    assert F.l1_loss(moved.mean(0), x.mean(0)) < 0.05
    assert not torch.equal(moved[0], moved[1])
    left = torch.zeros(200, 1, 16, 16)
    left[..., :4] = 1
    on_right = augment(left, mirror=True)[..., 8:].sum((1, 2, 3)) > 20
    assert 0.35 < on_right.float().mean() < 0.65


def test_digits_are_whole_and_in_range():
    source = load(dataset="digits", data_dir=Path(), image_size=0)
    assert source.train.x.shape == (1797, 1, 8, 8)
    assert source.train.x.max() == 255
    assert load(dataset="digits", data_dir=Path(), image_size=16).train.x.shape[2:] == (16, 16)


def test_network_takes_any_size():
    for size in (8, 15, 28):
        x = torch.zeros(2, 3, size, size)
        assert SmallCNN(channels=3, width=4, classes=6)(x).shape == (2, 6)


def test_a_run_without_any_pseudo_label_can_be_drawn(tmp_path):
    empty = label_quality(no_labels(4).label, torch.zeros(4).long(), 2)
    rounds = [[{"round": 0, "test_accuracy": 0.5} | empty]]
    method = {
        "rounds": rounds,
        "best_round": [0],
        "test_accuracy": {"of_seeds": [0.5], "mean": 0.5},
    }
    half = {"mean": 0.5, "of_seeds": [0.5]}
    metrics = {"methods": {"plain": method}, "oracle": half, "supervised": half}
    metrics["sklearn"] = {"logistic": {"self_training": half}}
    plot_accuracy(metrics, "plain", "title", tmp_path / "accuracy.png")
    plot_quality(metrics["methods"], "plain", ("a", "b"), "title", tmp_path / "quality.png")
    none = {"x": np.zeros((0, 1, 4, 4)), "label": [], "truth": [], "confidence": []}
    plot_examples(none, none, 0, ("a", "b"), "title", tmp_path / "examples.png")
    assert len(list(tmp_path.iterdir())) == 3


# --- runs -------------------------------------------------------------------------------------


def start(*flags: str, cwd: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(TRAIN), *flags], cwd=cwd, text=True, **pipes)


def folder_of(process: subprocess.Popen, cwd: Path) -> Path:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return cwd / output.splitlines()[-1]


def metrics_of(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    del metrics["seconds_per_round"]
    return metrics


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    unbroken = start(*TINY, "--out_dir", "unbroken", cwd=tmp_path)
    killed = start(*TINY, "--out_dir", "killed", cwd=tmp_path)
    while not list(tmp_path.glob("killed/*/weights/balanced-seed0-round1.pt")):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    (folder,) = tmp_path.glob("killed/*")
    assert not (folder / "metrics.json").exists()
    whole = folder_of(unbroken, tmp_path)
    assert folder_of(start("--resume", str(folder), cwd=tmp_path), tmp_path) == folder
    assert metrics_of(folder) == metrics_of(whole)
    tables = [list(csv.DictReader((run / "history.csv").open())) for run in (folder, whole)]
    for table in tables:
        for row in table:
            del row["seconds"]
    assert tables[0] == tables[1]
    check_best_round(whole, tables[1])
    assert {"accuracy.png", "pseudo_labels.png", "examples.png"} <= {
        p.name for p in whole.iterdir()
    }


def check_best_round(folder: Path, table: list[dict]) -> None:
    """best.pt is the round with the lowest validation loss, and its accuracy is the one told."""
    method = metrics_of(folder)["methods"]["balanced_revise"]
    losses = [float(r["val_loss"]) for r in table if r["stage"] == "balanced_revise-seed0"]
    best = losses.index(min(losses))
    assert method["best_round"] == [best]
    state = torch.load(folder / "best.pt", weights_only=True)
    model = SmallCNN(channels=1, width=4, classes=10).eval()
    model.load_state_dict(state["model"])
    source = load(dataset="digits", data_dir=Path(), image_size=0)
    parts = split(source, labels_per_class=5, val_per_class=10, pool_size=200, seed=0)
    with torch.no_grad():
        right = model(parts.test.x.float() / 255).argmax(1) == parts.test.y
    assert float(right.double().mean()) == pytest.approx(method["test_accuracy"]["of_seeds"][0])
    given = state["label"] != NONE
    rows = method["rounds"][0]
    assert rows[best]["pseudo_labels"] == int(given.sum())
    assert rows[0]["test_accuracy"] == metrics_of(folder)["supervised"]["mean"]
    if given.any():
        right = state["label"][given] == parts.hidden[given]
        assert rows[best]["accuracy"] == pytest.approx(float(right.double().mean()))


def write_folder(folder: Path, seed: int = 0) -> None:
    """Photographs of two classes, bright above and bright below; `seed` changes the test set."""
    for part, count in (("train", 24), ("test", 6)):
        rng = np.random.default_rng(seed if part == "test" else 0)
        for number, name in enumerate(("above", "below")):
            (folder / part / name).mkdir(parents=True)
            for place in range(count):
                picture = rng.integers(0, 90, (12, 12, 3), dtype=np.uint8)
                picture[6 * number : 6 * number + 6] += 120
                Image.fromarray(picture).save(folder / part / name / f"{place}.png")


FOLDER = ["--dataset", "folder", "--ablation", "false", "--augment", "true", *SMALL]


def test_the_test_set_decides_nothing_and_a_broken_picture_is_left_out(tmp_path):
    runs = []
    for seed in (1, 2):
        write_folder(tmp_path / f"data{seed}", seed)
        flags = ["--data_dir", f"data{seed}", "--val_per_class", "4", "--out_dir", f"runs{seed}"]
        runs.append(start(*FOLDER, *flags, cwd=tmp_path))
    (tmp_path / "data2" / "test" / "below" / "5.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    output, errors = runs[1].communicate(timeout=300)
    assert runs[1].returncode == 0, errors
    first, second = folder_of(runs[0], tmp_path), tmp_path / output.splitlines()[-1]
    tables = [list(csv.DictReader((run / "history.csv").open())) for run in (first, second)]
    for row in tables[0] + tables[1]:
        del row["seconds"]
    assert tables[0] == tables[1]
    sizes = [metrics_of(run)["sizes"] for run in (first, second)]
    assert [size["test"] for size in sizes] == [12, 11]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda data: (data / "test" / "below").rename(data / "test" / "beside"), "class 'b"),
        (lambda data: (data / "train" / "above").rename(data / "above"), "at least two classes"),
        (lambda data: Image.new("RGB", (9, 9)).save(data / "train/below/5.png"), "--image_size"),
        (lambda data: [p.write_text("") for p in (data / "test/above").iterdir()], "could be read"),
    ],
)
def test_bad_data_is_named(tmp_path, spoil, complaint):
    write_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=complaint) as error:
        load(dataset="folder", data_dir=tmp_path, image_size=0)
    assert "\n" not in str(error.value)


def test_mistakes_end_a_run_in_one_line(tmp_path):
    absent = start(*FOLDER, "--data_dir", "nowhere", "--out_dir", "runs", cwd=tmp_path)
    wrong = start("--add_per_round", "2.5", "--out_dir", "runs", cwd=tmp_path)
    for process, status, complaint in ((absent, 1, "nowhere"), (wrong, 2, "whole number")):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == status
        assert complaint in errors and len(errors.splitlines()) == 1
