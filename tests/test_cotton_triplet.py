"""cotton_triplet: mining against a triple loop, splits that share nothing, a run that is killed."""

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
from PIL import Image, ImageEnhance

from cotton_triplet import data, model
from cotton_triplet.model import Triplets, euclidean, mine, triplet_losses

TRAIN = Path(__file__).parent.parent / "cotton_triplet" / "train.py"
TINY = [
    "--dataset", "leaves", "--device", "cpu", "--image_size", "16", "--leaf_count", "90",
    "--widths", "4,8", "--epochs", "2", "--pictures_per_class", "5", "--precision", "float32",
]  # fmt: skip


# --- mining and loss --------------------------------------------------------------------------


def distances(embedding: torch.Tensor) -> np.ndarray:
    points = embedding.numpy()
    return np.array([[math.dist(a, b) for b in points] for a in points])


def brute_force(embedding: torch.Tensor, y: torch.Tensor, mining: str) -> list[tuple]:
    """Anchor, d(a, p) and d(a, n) of every triplet, by loops over anchors, positives, negatives."""
    d, count, found = distances(embedding), len(y), []
    for a in range(count):
        positives = [p for p in range(count) if p != a and y[p] == y[a]]
        negatives = [n for n in range(count) if y[n] != y[a]]
        if not positives or not negatives:
            continue
        if mining == "hard":
            found.append((a, max(d[a][p] for p in positives), min(d[a][n] for n in negatives)))
        for p in positives if mining != "hard" else []:
            far = [d[a][n] for n in negatives if mining == "all" or d[a][n] > d[a][p]]
            chosen = far if mining == "all" else sorted(far)[:1]
            found += [(a, d[a][p], near) for near in chosen]
    return sorted(found)


def made_batches() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(14, 3, dtype=torch.float64), torch.randint(4, (14,))
    alone = torch.tensor([0, 0, 1, 1, 2])
    return {
        "random": (x, y),
        "ties": (torch.randint(3, (14, 2)).double(), y),
        "duplicates": (x[torch.arange(14) // 2], y),
        "all one point": (torch.zeros(14, 2).double(), y),
        "one class": (x, torch.zeros(14, dtype=torch.long)),
        "a class with one picture": (x[:5], alone),
        "no two of a class": (x, torch.arange(14)),
    }


@pytest.mark.parametrize("name", made_batches())
@pytest.mark.parametrize("mining", ["hard", "semihard", "all"])
def test_mining_is_that_of_a_triple_loop(mining, name):
    embedding, y = made_batches()[name]
    triplets = mine(embedding, y, mining)
    a, p, n = triplets
    assert (y[a] == y[p]).all() and (y[a] != y[n]).all() and (a != p).all()
    d, expected = distances(embedding), brute_force(embedding, y, mining)
    found = sorted((i, d[i][j], d[i][k]) for i, j, k in zip(*map(list, (a, p, n)), strict=True))
    assert len(found) == len(expected)
    assert np.allclose(
        np.array(found, float).reshape(-1, 3), np.array(expected, float).reshape(-1, 3)
    )


@pytest.mark.parametrize("mining", ["hard", "semihard", "all"])
def test_the_loss_is_that_of_torch_on_the_mined_triplets(mining):
    embedding, y = made_batches()["random"]
    triplets = mine(embedding, y, mining)
    parts = [embedding[rows] for rows in triplets]
    theirs = torch.nn.TripletMarginLoss(margin=0.7, eps=0, reduction="none")(*parts)
    assert torch.allclose(triplet_losses(embedding, triplets, 0.7), theirs, atol=1e-12)
    far, near = (torch.linalg.norm(parts[0] - other, dim=1) for other in parts[1:])
    soft = torch.log1p(torch.exp(far - near))
    assert torch.allclose(triplet_losses(embedding, triplets, None), soft, atol=1e-12)


@pytest.mark.parametrize("margin", [1.0, None])
def test_gradients_are_those_of_finite_differences_and_finite_where_points_coincide(margin):
    embedding, y = made_batches()["random"]
    triplets = mine(embedding, y, "hard")
    embedding.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: triplet_losses(e, triplets, margin).sum(), embedding)
    twins = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    triplets = mine(twins.detach(), torch.tensor([0, 0, 1, 1]), "hard")
    triplet_losses(twins, triplets, margin).mean().backward()
    assert twins.grad.isfinite().all()
    assert twins.grad.abs().sum() > 0  # the pair that lies apart still pulls


def test_a_batch_without_triplets_has_a_loss_and_a_gradient_of_zero():
    embedding = torch.randn(4, 2, requires_grad=True)
    losses = triplet_losses(embedding, mine(embedding, torch.zeros(4), "hard"), 1.0)
    loss = model.mean_or_zero(losses, embedding)
    loss.backward()
    assert loss.item() == 0 and not embedding.grad.any()
    assert float(model.active_share(losses, 1.0)) == 0


def test_no_gradient_flows_through_mining():
    embedding = torch.randn(6, 2, requires_grad=True)
    triplets = mine(embedding, torch.tensor([0, 0, 0, 1, 1, 1]), "hard")
    assert isinstance(triplets, Triplets) and not any(part.requires_grad for part in triplets)


def test_the_watch_tells_a_collapse_from_a_loss_that_passes_by():
    y = torch.tensor([0, 0, 1, 1])
    for margin in (0.5, None):
        point = torch.zeros(4, 2)
        loss = float(triplet_losses(point, mine(point, y, "hard"), margin).mean())
        assert loss == pytest.approx(model.resting_loss(margin))
        assert model.collapsed(loss, float(model.mean_distance(point)), margin)
        assert not model.collapsed(loss, 1.0, margin)
        assert not model.collapsed(0.5 * loss, 0.0, margin)
    triplets = Triplets(*torch.tensor([[0, 1], [1, 0], [2, 2]]))
    line = torch.tensor([[0.0], [1.0], [1.5]])
    losses = triplet_losses(line, triplets, 0.2)  # gaps -0.5 and 0.5
    assert float(model.active_share(losses, 0.2)) == 0.5
    assert float(model.active_share(triplet_losses(line, triplets, None), None)) == 0.5
    assert torch.equal(euclidean(line[:1], line[1:2]), torch.ones(1))


def test_both_heads_read_one_trunk_and_the_embedding_is_not_normalised():
    torch.manual_seed(0)
    trunk, width = model.make_trunk("small", (4, 8), None)
    net = model.TwoHeads(trunk, width, classes=3, embedding_size=2).eval()
    out = net(torch.rand(5, 3, 16, 16))
    assert [tuple(part.shape) for part in out] == [(5, 3), (5, 2), (5, 8)]
    assert torch.equal(out.logits, net.classify(out.features))
    assert torch.equal(out.embedding, net.embed(out.features))
    assert out.embedding.norm(dim=1).std() > 1e-4


# --- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(7, 7, 7), (40, 3, 1, 12), (5, 5)])
@pytest.mark.parametrize(("classes", "pictures"), [(3, 4), (2, 5)])
def test_batches_are_p_classes_of_k_and_hold_every_picture(counts, classes, pictures):
    torch.manual_seed(1)
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    found = model.pk_batches(y, classes, pictures)
    assert len(found) == model.count_batches(y, classes, pictures)
    for batch in found:
        sizes = y[batch].bincount()
        assert sizes[sizes > 0].tolist() == [pictures] * min(classes, len(counts))
    assert torch.cat(found).unique().tolist() == list(range(len(y)))


def test_what_is_tested_is_not_augmented_and_augmenting_spoils_nothing():
    torch.manual_seed(2)
    examples = data.Examples(torch.randint(256, (9, 3, 16, 16)).byte(), torch.arange(9))
    before = examples.x.clone()
    twice = [torch.cat([x for x, _ in data.batches(examples, 4)]) for _ in range(2)]
    assert torch.equal(*twice) and torch.equal(twice[0], before.float() / 255)
    augmented = model.augment(twice[0])
    assert augmented.shape == before.shape and 0 <= augmented.min() <= augmented.max() <= 1
    assert (augmented - twice[0]).abs().flatten(1).mean(1).min() > 0.01  # each is changed
    assert torch.equal(examples.x, before) and torch.equal(twice[1], before.float() / 255)


# --- data -------------------------------------------------------------------------------------


def photo(number: int) -> Image.Image:
    grid = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((48, 48), Image.Resampling.BICUBIC)


def write_folder(root: Path, originals: int = 6) -> Path:
    """Two classes; of each photograph a mirror image, a turned one, and one of more contrast."""
    for label, name in enumerate(("aphids", "healthy")):
        (root / name).mkdir(parents=True)
        for number in range(originals):
            image = photo(100 * label + number)
            copies = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.rotate(90)]
            copies.append(ImageEnhance.Contrast(image).enhance(0.6))
            for kind, copy in enumerate(copies):
                copy.save(root / name / f"{kind}{number:02}.png")
    return root


def load_folder(folder: Path) -> data.Data:
    return data.load(
        dataset="folder", data_dir=folder, image_size=32, leaf_count=60, same_bits=16, seed=0
    )


def test_copies_of_a_picture_are_never_in_two_splits(tmp_path):
    found = load_folder(write_folder(tmp_path / "mine"))
    parts = (found.train, found.val, found.test)
    assert found.numbers["groups"] == 12 and sum(len(part.x) for part in parts) == 48
    hashes = [data.difference_hash(part.x) for part in parts]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        alike = torch.stack([hashes[one][0] @ turned.T for turned in hashes[other]])
        assert ((128 - alike) / 2).min() > 16
    for part in parts:
        assert part.y.unique().tolist() == [0, 1] and len(part.y) % 4 == 0


def test_a_group_goes_whole_into_one_split():
    torch.manual_seed(3)
    groups = torch.randint(60, (300,)).unique(return_inverse=True)[1]
    y = groups % 3
    parts = data.split_by_group(y, groups, (0.6, 0.2, 0.2), seed=5)
    assert torch.cat(parts).sort().values.tolist() == list(range(300))
    held = [set(groups[part].tolist()) for part in parts]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    assert abs(len(parts[0]) - 180) < 20 and abs(len(parts[2]) - 60) < 20


def test_names_link_copies_that_hashes_miss():
    x = torch.stack([torch.from_numpy(np.array(photo(n))).permute(2, 0, 1) for n in range(5)])
    names = ["leaf_1", "leaf_1_crop", "leaf_10", "leaf_2", "leaf_1 (2)"]
    groups = data.near_duplicates(x, names, same_bits=8).tolist()
    assert groups[0] == groups[1] == groups[4]
    assert len(set(groups)) == 3


def test_given_splits_lose_what_resembles_a_test_picture(tmp_path):
    write_folder(tmp_path / "set" / "train")
    for label, name in enumerate(("aphids", "healthy")):
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        photo(100 * label + 3).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(
            tmp_path / "set" / "test" / name / "x.png"
        )
    found = load_folder(tmp_path / "set")
    assert found.numbers["left_out"] == 8 and len(found.test.x) == 2
    assert len(found.train.x) + len(found.val.x) == 40
    assert "8 left out" in found.note


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / "healthy").rename(f.parent / "away"), "at least 2 classes"),
        (lambda f: [p.unlink() for p in (f / "healthy").iterdir()], "healthy: there are no pic"),
        (
            lambda f: [p.unlink() for p in (f / "aphids").iterdir() if p.stem[1:] > "01"],
            "aphids: too few pictures: none for",
        ),
    ],
)
def test_bad_data_is_named(tmp_path, spoil, complaint):
    folder = write_folder(tmp_path / "mine")
    spoil(folder)
    with pytest.raises(data.DataError, match=complaint):
        load_folder(folder)


def test_a_truncated_picture_is_left_out_and_counted(tmp_path):
    folder = write_folder(tmp_path / "mine")
    whole = (folder / "aphids" / "103.png").read_bytes()
    (folder / "aphids" / "103.png").write_bytes(whole[: len(whole) // 2])
    found = load_folder(folder)
    assert "1 unreadable files left out, the first: 103.png" in found.note
    assert found.numbers["pictures"] == 47


def test_leaves_are_those_of_the_seed_and_differ_by_look(tmp_path):
    def leaves(seed: int, folder: str) -> data.Data:
        options = {"image_size": 16, "leaf_count": 60, "same_bits": 16}
        return data.load(dataset="leaves", data_dir=tmp_path / folder, seed=seed, **options)

    first, again, other = leaves(0, "a"), leaves(0, "b"), leaves(1, "a")
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.train.x, leaves(0, "a").train.x)  # from the cache
    assert not torch.equal(first.train.x, other.train.x)
    assert first.train.y.bincount().tolist() == [7] * 6
    assert first.test.y.bincount().tolist() == [2] * 6
    pixels = torch.cat([part.x.flatten(1) for part in (first.train, first.val, first.test)])
    assert len(pixels.unique(dim=0)) == len(pixels)


# --- whole runs -------------------------------------------------------------------------------


def start(*flags: str, cwd: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(TRAIN), *flags], cwd=cwd, text=True, **pipes)


def metrics_of(process: subprocess.Popen, cwd: Path) -> dict:
    """What metrics.json of a run that has to succeed says, but for its speed."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    report = json.loads((cwd / output.splitlines()[-1] / "metrics.json").read_text())
    del report["metrics"]["timing"]
    return report["metrics"] | report["headline"]


def kill_in(stage: str, process: subprocess.Popen, out_dir: Path) -> Path:
    """Kill the run at the second row of `stage`: its checkpoint has the first. Its folder."""
    while process.poll() is None:
        for table in out_dir.glob("*/history.csv"):
            if table.read_text().count(f"\n{stage},") > 1:
                process.kill()
                process.wait()
                return table.parent
        time.sleep(0.002)
    raise AssertionError(f"ended before {stage}: {process.stderr.read()}")


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    flags = [*TINY, "--ablation", "true", "--embedding_size", "3", "--epochs", "6", "--data_dir"]
    whole = start(*flags, "leaves", "--out_dir", "unbroken", cwd=tmp_path)
    process = start(*flags, "leaves", "--out_dir", "killed", cwd=tmp_path)
    folder = kill_in("no_triplet", process, tmp_path / "killed")
    assert not (folder / "metrics.json").exists()
    resumed = metrics_of(start("--resume", str(folder), cwd=tmp_path), tmp_path)
    assert resumed == metrics_of(whole, tmp_path)
    (other,) = (tmp_path / "unbroken").iterdir()
    tables = []
    for path in (folder, other):
        rows = list(csv.DictReader((path / "history.csv").open()))
        tables.append([{**row, "seconds": None} for row in rows])
    assert tables[0] == tables[1] and len(tables[0]) == 18
    films = [torch.load(path / "film-both.pt") for path in (folder, other)]
    assert [sorted(film) for film in films] == [[1, 2, 3, 4, 5, 6]] * 2
    assert all(torch.equal(films[0][epoch], films[1][epoch]) for epoch in films[0])
    assert {"ablation.png", "embedding.png", "film.png", "triplets.png"} <= {
        path.name for path in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--dataset", "folder", "--data_dir", "nowhere"], "nowhere: there is no such folder"),
        ([*TINY, "--lr", "1e30"], "the loss is not finite at step"),
    ],
)
def test_a_run_that_cannot_go_on_ends_in_one_line(tmp_path, flags, complaint):
    process = start(*flags, "--out_dir", "out", cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.startswith("error: ") and complaint in errors and len(errors.splitlines()) == 1
