"""cotton_triplet: mining against loops, splits that share nothing, an experiment that is what it
says, a run that is killed, predict.py.
"""

import contextlib
import copy
import csv
import functools
import io
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from projects import call, data_asked_for, load_project, train, train_until
from sklearn.metrics import f1_score, silhouette_score

project = load_project("cotton_triplet")
data, model, trainer, predictor = project.data, project.model, project.train, project.predict
TRAIN = Path(__file__).parent.parent / "cotton_triplet" / "train.py"
TINY = [
    "--dataset", "leaves", "--device", "cpu", "--image_size", "16", "--leaf_count", "90",
    "--widths", "4,8", "--epochs", "2", "--pictures_per_class", "5", "--precision", "float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def leaves_dir(tmp_path_factory) -> Path:
    """Where the tiny runs' leaves are drawn once."""
    return tmp_path_factory.mktemp("leaves")


@pytest.fixture(scope="module")
def run(leaves_dir, tmp_path_factory) -> Path:
    """One tiny run with all trainings, at which many tests look."""
    out = tmp_path_factory.mktemp("runs")
    flags = ["--data_dir", leaves_dir, "--out_dir", out, "--ablation", "true", "--epochs", "3"]
    return train("cotton_triplet", *TINY, *flags)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def history_of(folder: Path) -> list[dict]:
    """Rows without what depends on the clock."""
    rows = list(csv.DictReader((folder / "history.csv").open()))
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


# --- distances, mining and loss ---------------------------------------------------------------


def distances(embedding: torch.Tensor) -> np.ndarray:
    points = embedding.detach().numpy()
    return np.array([[math.dist(a, b) for b in points] for a in points])


def made_batches() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Some on a grid of eighths, where equal distances are equal to the last bit."""
    torch.manual_seed(0)
    x, y = torch.randn(14, 3, dtype=torch.float64), torch.randint(4, (14,))
    alone = torch.tensor([0, 0, 1, 1, 2])
    return {
        "random": (x, y),
        "ties": (torch.randint(3, (14, 2)).double(), y),
        "duplicates": ((8 * x).round()[torch.arange(14) // 2] / 8, y),
        "all one point": (torch.zeros(14, 2).double(), y),
        "one class": (x, torch.zeros(14, dtype=torch.long)),
        "a class with one picture": (x[:5], alone),
        "no two of a class": (x, torch.arange(14)),
    }


def all_triplets(d: np.ndarray, y: torch.Tensor) -> list[tuple]:
    """(a, d(a, p), d(a, n)) of every triplet, by three loops."""
    count = range(len(y))
    return [
        (a, d[a][p], d[a][n])
        for a in count
        for p in count
        if p != a and y[p] == y[a]
        for n in count
        if y[n] != y[a]
    ]


def brute_force(embedding: torch.Tensor, y: torch.Tensor, mining: str) -> list[tuple]:
    d, found = distances(embedding), []
    every = all_triplets(d, y)
    for a in range(len(y)):
        own = [triplet for triplet in every if triplet[0] == a]
        if mining == "hard" and own:
            found.append((a, max(t[1] for t in own), min(t[2] for t in own)))
        positives = [p for p in range(len(y)) if p != a and y[p] == y[a]]
        for p in positives if mining == "semihard" else []:
            far = sorted(d[a][n] for n in range(len(y)) if y[n] != y[a] and d[a][n] > d[a][p])
            found += [(a, d[a][p], far[0])] if far else []
    return sorted(found)


@pytest.mark.parametrize("name", made_batches())
@pytest.mark.parametrize("mining", ["hard", "semihard"])
def test_mining_is_that_of_a_triple_loop(mining, name):
    embedding, y = made_batches()[name]
    a, p, n = triplets = model.mine(model.pair_distances(embedding, embedding), y, mining)
    assert (y[a] == y[p]).all() and (y[a] != y[n]).all() and (a != p).all()
    d, expected = distances(embedding), brute_force(embedding, y, mining)
    found = sorted((i, d[i][j], d[i][k]) for i, j, k in zip(*map(list, triplets), strict=True))
    assert len(found) == len(expected)
    found, expected = (np.array(rows, float).reshape(-1, 3) for rows in (found, expected))
    assert np.allclose(found, expected)


@pytest.mark.parametrize("name", made_batches())
@pytest.mark.parametrize("margin", [0.7, None])
def test_batch_all_is_that_of_a_triple_loop(name, margin):
    embedding, y = made_batches()[name]
    d = model.pair_distances(embedding, embedding)
    losses = model.margin_loss(model.all_gaps(d, y), margin)
    gaps = np.array([p - n for _, p, n in all_triplets(distances(embedding), y)])
    expected = np.log1p(np.exp(gaps)) if margin is None else np.maximum(gaps + margin, 0)
    assert np.allclose(np.sort(losses.numpy()), np.sort(expected), atol=1e-7)


def test_the_loss_is_that_of_torch_on_the_mined_triplets():
    embedding, y = made_batches()["random"]
    d = model.pair_distances(embedding, embedding)
    for mining in ("hard", "semihard"):
        parts = [embedding[rows] for rows in model.mine(d, y, mining)]
        theirs = torch.nn.TripletMarginLoss(margin=0.7, eps=0, reduction="none")(*parts)
        ours = model.margin_loss(model.mined_gaps(d, y, mining), 0.7)
        assert torch.allclose(ours, theirs, atol=1e-12)
        assert torch.allclose(model.triplet_loss(d, y, mining, 0.7).loss, theirs.mean())


def plain_loss(d: torch.Tensor, y: torch.Tensor, mining: str, margin: float) -> torch.Tensor:
    """The triplet loss of a batch by loops, differentiable in d (N, N)."""
    n = len(y)
    positive = [[j for j in range(n) if j != i and y[j] == y[i]] for i in range(n)]
    negative = [[j for j in range(n) if y[j] != y[i]] for i in range(n)]
    every = [(d[i, p] - d[i, q] + margin) for i in range(n)
             for p in positive[i] for q in negative[i]]  # fmt: skip
    active = [loss for loss in every if loss > 0]
    batch_all = sum(active) / max(1, len(active))
    hard = [(max(d[i, p] for p in positive[i]) - min(d[i, q] for q in negative[i]) + margin)
            for i in range(n)]  # fmt: skip
    batch_hard = sum(loss.clamp(min=0) for loss in hard) / n
    h = sum(loss.item() < margin for loss in hard) / n
    shares = {"all": 0.0, "hard": 1.0, "gradual": h}
    return (1 - shares[mining]) * batch_all + shares[mining] * batch_hard


def clusters(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    y = torch.arange(12) % 3
    return 3 * torch.eye(3).double()[y] + spread * torch.randn(12, 3, dtype=torch.float64), y


@pytest.mark.parametrize("mining", ["gradual", "all", "hard"])
@pytest.mark.parametrize("spread", [0.3, 1.5, 20.0])
def test_the_batch_loss_is_its_formula(mining, spread):
    embedding, y = clusters(spread)
    d = model.pair_distances(embedding, embedding)
    ours = model.triplet_loss(d, y, mining, 1.0)
    assert float(ours.loss) == pytest.approx(float(plain_loss(d, y, mining, 1.0)))


def test_hard_mining_comes_with_the_share_of_anchors_that_reach_its_goal():
    shares = []
    for spread in (50.0, 1.0, 0.3, 0.01):
        embedding, y = clusters(spread)
        d = model.pair_distances(embedding, embedding)
        share = float(model.triplet_loss(d, y, "gradual", 1.0).hard_share)
        hard = brute_force(embedding, y, "hard")
        assert share == pytest.approx(sum(far < near for _, far, near in hard) / len(hard))
        shares.append(share)
    assert shares == sorted(shares) and shares[0] == 0 < shares[1] < 1 == shares[3]


@pytest.mark.parametrize("mining", ["gradual", "semihard", "hard", "all"])
def test_a_larger_map_of_the_same_shape_has_the_same_loss(mining):
    """With absolute distances, semi-hard negatives reward mere scale: .93 at 1, .08 at 100."""
    torch.manual_seed(1)
    points, y = torch.randn(72, 2), torch.arange(72) % 6

    def loss(scale: float, unit) -> float:
        d = model.pair_distances(scale * points, scale * points)
        return float(model.triplet_loss(unit(d), y, mining, 1.0).loss)

    assert loss(100.0, model.relative) == pytest.approx(loss(1.0, model.relative), rel=1e-4)
    d = model.relative(model.pair_distances(points, points))
    assert float(d.sum() / (72 * 71)) == pytest.approx(1)
    if mining == "semihard":
        assert loss(100.0, lambda d: d) < 0.2 < loss(1.0, lambda d: d)


@pytest.mark.parametrize("margin", [1.0, None])
@pytest.mark.parametrize("unit", [lambda d: d, model.relative])
def test_gradients_are_those_of_finite_differences_and_finite_where_points_coincide(margin, unit):
    embedding, y = made_batches()["random"]

    def loss(e: torch.Tensor, y: torch.Tensor = y) -> torch.Tensor:
        return model.triplet_loss(unit(model.pair_distances(e, e)), y, "hard", margin).loss

    assert torch.autograd.gradcheck(loss, embedding.clone().requires_grad_())
    twins = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    loss(twins, torch.tensor([0, 0, 1, 1])).backward()
    assert twins.grad.isfinite().all() and twins.grad.abs().sum() > 0
    point = torch.zeros(4, 2, requires_grad=True)
    loss(point, torch.tensor([0, 0, 1, 1])).backward()
    assert point.grad.isfinite().all()


@pytest.mark.parametrize("mining", ["gradual", "semihard", "hard", "all"])
def test_a_batch_without_triplets_has_a_loss_and_a_gradient_of_zero(mining):
    embedding = torch.randn(4, 2, requires_grad=True)
    d = model.pair_distances(embedding, embedding)
    mined = model.triplet_loss(d, torch.zeros(4), mining, 1.0)
    mined.loss.backward()
    assert mined.loss.item() == 0 and not embedding.grad.any()
    assert float(mined.active) == 0


def test_no_gradient_flows_through_mining_nor_through_the_share_of_hard():
    embedding, y = clusters(1.0)
    d = model.pair_distances(embedding.requires_grad_(), embedding)
    assert not any(part.requires_grad for part in model.mine(d, y, "hard"))
    assert not model.triplet_loss(d, y, "gradual", 1.0).hard_share.requires_grad


def test_the_ratio_of_distances_is_that_of_means_over_pairs():
    embedding, y = made_batches()["random"]
    d, pairs = distances(embedding), {True: [], False: []}
    for i, j in np.ndindex(14, 14):
        if i != j:
            pairs[bool(y[i] == y[j])].append(d[i, j])
    ours = model.pair_distances(embedding, embedding)
    ratio = np.mean(pairs[True]) / np.mean(pairs[False])
    assert float(model.within_to_between(ours, y)) == pytest.approx(ratio)
    assert float(model.within_to_between(ours, torch.zeros(14))) == 1


def test_the_watch_sees_every_collapse_and_no_healthy_map():
    """Collapsed batch hard: a loss of margin + d_max - d_min, here 1.8, at distances of 0.07."""
    torch.manual_seed(2)
    y, order = torch.arange(72) % 6, torch.randn(72, 2)
    maps = {
        "a point": (1e-6 * order, True),
        "small, with order": (0.02 * (6 * F.one_hot(y)[:, :2] + order), True),
        "large, without order": (100 * order, True),
        "open": (torch.stack((2 * (y % 3), 3 * (y // 3)), 1) + 0.3 * order, False),
    }
    for name, (points, lost) in maps.items():
        d = model.pair_distances(points, points)
        mean = float(d.sum() / (72 * 71))
        assert model.collapsed(float(model.within_to_between(d, y)), mean, 1.0) == lost, name


# --- retrieval --------------------------------------------------------------------------------


def test_precision_and_map_at_r_are_those_of_loops():
    torch.manual_seed(3)
    queries, gallery = torch.randn(20, 2), torch.randn(37, 2)
    query_y, gallery_y = torch.randint(4, (20,)), torch.randint(3, (37,))  # 3 is not in the gallery
    first, average = [], []
    for q, label in zip(queries, query_y, strict=True):
        order = sorted(range(37), key=lambda i: math.dist(q, gallery[i]))
        hits = [int(gallery_y[i] == label) for i in order]
        r = sum(hits)
        first.append(hits[0])
        precisions = [sum(hits[: k + 1]) / (k + 1) * hits[k] for k in range(r)]
        average.append(sum(precisions) / r if r else 0)
    scores = model.retrieval_scores(queries, query_y, gallery, gallery_y)
    assert scores["precision_at_1"] == pytest.approx(np.mean(first))
    assert scores["map_at_r"] == pytest.approx(np.mean(average))


def test_the_nearest_come_first():
    found, rows = model.nearest(torch.tensor([[0.0]]), torch.tensor([[5.0], [1.0], [-2.0]]), 5)
    assert rows.tolist() == [[1, 2, 0]] and found.tolist() == [[1, 2, 5]]


# --- networks ---------------------------------------------------------------------------------


def two_heads(trunk: torch.nn.Module, size: int = 16, **options) -> "model.TwoHeads":
    width = model.trunk_width(trunk, size)
    return model.TwoHeads(trunk, width, classes=3, embedding_size=2, **options)


def test_both_heads_read_one_trunk_and_the_embedding_is_not_normalised():
    torch.manual_seed(0)
    net = two_heads(model.make_trunk("small", (4, 8))).eval()
    out = net(torch.rand(5, 3, 16, 16))
    assert [tuple(part.shape) for part in out] == [(5, 3), (5, 2), (5, 8)]
    assert torch.equal(out.logits, net.classify(out.features))
    assert torch.equal(out.embedding, net.embed(out.features))
    assert out.embedding.norm(dim=1).std() > 1e-4


def test_pictures_are_normalised_as_imagenet_asks():
    net = two_heads(model.make_trunk("small", (4, 8))).eval()
    x = torch.rand(2, 3, 16, 16)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((x.permute(0, 2, 3, 1) - mean) / deviation).permute(0, 3, 1, 2)
    assert torch.allclose(net(x).features, net.trunk(normalised), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_any_classifier_of_torchvision_is_a_trunk(name):
    from torchvision.models import get_model

    torch.manual_seed(0)
    state = get_model(name, weights=None).state_dict()
    trunk = model.make_trunk(name, (), state=state)
    assert model.trunk_width(trunk, 64) in (512, 1000, 1024)
    kept = {key.removeprefix("0."): value for key, value in trunk.state_dict().items()}
    assert kept.keys() <= state.keys() and len(state) - len(kept) <= 2
    assert all(torch.equal(state[key], value) for key, value in kept.items())


@pytest.fixture(scope="module")
def program() -> bytes:
    """A small exported network, as a user would make one."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3, 2), torch.nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)).relu()

    torch.manual_seed(4)
    net = Net().eval()
    net.norm.running_mean.normal_()
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(net, (torch.randn(2, 3, 16, 16),), dynamic_shapes=batch)
    file = io.BytesIO()
    torch.export.save(exported, file)
    return file.getvalue()


def test_an_exported_network_is_a_trunk_that_learns_or_is_frozen(program):
    trunk = model.make_trunk("net.pt2", (), program=program)
    net = two_heads(trunk, pretrained=True)
    assert net.train() is net and net.training and net.embed[1].training
    before = copy.deepcopy(net.state_dict())
    x, y = torch.rand(6, 3, 16, 16), torch.arange(6) % 3
    for frozen in (True, False):
        net.freeze_trunk(frozen)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        F.cross_entropy(net(x).logits, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
        assert any("conv.weight" in name for name in moved) != frozen
        assert any("classify" in name for name in moved)
    with pytest.raises(ValueError, match="of pictures of 20 pixels"):
        model.trunk_width(trunk, 20)
    for broken in (b"", b"<html>not found</html>", program[: len(program) // 2]):
        with pytest.raises(ValueError, match="not a program"):
            model.make_trunk("net.pt2", (), program=broken)


def test_pickled_objects_in_an_exported_network_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr("archive/data/constants/custom_obj_0", b"code")
    with pytest.raises(data.DataError, match="whose code would run"):
        data.find_program(str(tmp_path / "net.pt2"), tmp_path)


def test_a_pretrained_trunk_keeps_its_statistics():
    net = two_heads(model.make_trunk("small", (4, 8)), pretrained=True)
    before = copy.deepcopy(net.trunk.state_dict())
    net.train()(torch.rand(4, 3, 16, 16))
    assert all(torch.equal(before[key], value) for key, value in net.trunk.state_dict().items())


def test_a_network_with_heads_can_be_exported():
    net = two_heads(model.make_trunk("small", (4, 8))).eval()
    x = torch.rand(3, 3, 16, 16)
    exported = torch.export.export(net, (x,)).module()
    assert all(map(torch.allclose, exported(x), net(x)))


# --- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(7, 7, 7), (40, 3, 1, 12), (5, 5)])
@pytest.mark.parametrize(("classes", "pictures"), [(3, 4), (2, 5)])
def test_batches_are_p_classes_of_k_and_hold_every_picture(counts, classes, pictures):
    torch.manual_seed(1)
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    found = data.pk_batches(y, classes, pictures)
    assert len(found) == data.count_batches(y, classes, pictures)
    for batch in found:
        sizes = y[batch].bincount()
        assert sizes[sizes > 0].tolist() == [pictures] * min(classes, len(counts))
    assert torch.cat(found).unique().tolist() == list(range(len(y)))


def test_the_order_of_batches_changes():
    torch.manual_seed(1)
    y = torch.arange(3).repeat_interleave(12)
    first, second = (torch.cat(data.pk_batches(y, 3, 4)) for _ in range(2))
    assert (first == second).double().mean() < 0.3
    assert (first.view(-1, 3, 4) == torch.arange(36).view(3, -1, 4).transpose(0, 1)).sum() < 12


def test_augmenting_turns_mirrors_and_relights_and_spoils_nothing():
    torch.manual_seed(2)
    x = torch.full((300, 3, 17, 17), 0.4)
    x[:, :, 8, 2:8] = 0.9  # a line from the middle to the left
    before = x.clone()
    found = data.augment(x)
    assert torch.equal(x, before)
    assert found.shape == x.shape and 0 <= found.min() <= found.max() <= 1
    background = found.flatten(2).median(2).values
    assert background.std(0).min() > 0.03
    assert (background[:, 0] - background[:, 2]).abs().mean() > 1e-3
    bright = (found.mean(1) - background.mean(1)[:, None, None]).clamp(min=0)
    place, weight = torch.arange(17) - 8.0, bright.sum((1, 2))
    for axis in (1, 2):  # the line lies to all sides
        where = (bright.sum(axis) * place).sum(1) / weight
        assert where.min() < -2 and where.max() > 2


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
            for kind, copied in enumerate(copies):
                copied.save(root / name / f"{kind}{number:02}.png")
    return root


def load_folder(folder: Path, seed: int = 0) -> "data.Data":
    return data.load(
        dataset="folder", data_dir=folder, image_size=32, leaf_count=60, same_bits=16, seed=seed
    )


def test_copies_of_a_picture_are_never_in_two_splits(tmp_path):
    found = load_folder(write_folder(tmp_path / "mine"))
    parts = (found.train, found.val, found.test)
    assert found.numbers["groups"] == 12 and [len(part.x) for part in parts] == [32, 8, 8]
    hashes = [data.difference_hashes(part.x) for part in parts]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        alike = torch.stack([hashes[one][0] @ turned.T for turned in hashes[other]])
        assert ((128 - alike) / 2).min() > 16
    for part in parts:
        assert part.y.unique().tolist() == [0, 1] and len(part.y) % 4 == 0
    assert len(found.names) == 32 and found.names[0].startswith("aphids/")
    for name, x in zip(found.names, found.train.x, strict=True):
        picture = data.open_picture(tmp_path / "mine" / name)
        assert torch.equal(data.shrink(picture, (32, 32)), x)


def test_labels_are_those_of_the_folders_and_splits_those_of_the_seed(tmp_path):
    folder = write_folder(tmp_path / "mine")
    found, other = load_folder(folder), load_folder(folder, seed=1)
    assert found.classes == ("aphids", "healthy")
    assert [name.split("/")[0] for name in found.names] == [
        found.classes[label] for label in found.train.y.tolist()
    ]
    assert found.names != other.names and found.names == load_folder(folder).names


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
    groups = data.copy_groups(x, names, same_bits=8).tolist()
    assert groups[0] == groups[1] == groups[4]
    assert len(set(groups)) == 3


def test_given_splits_lose_what_resembles_a_test_picture(tmp_path):
    write_folder(tmp_path / "set" / "Train")  # in capitals, as some sets come
    for label, name in enumerate(("aphids", "healthy")):
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        photo(100 * label + 3).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(
            tmp_path / "set" / "test" / name / "x.png"
        )
    found = load_folder(tmp_path / "set")
    assert found.numbers["left_out"] == 8 and len(found.test.x) == 2
    assert [len(found.train.x), len(found.val.x)] == [32, 8]
    assert "8 left out" in found.note
    assert not {tuple(x.flatten().tolist()) for x in found.val.x} & {
        tuple(x.flatten().tolist()) for x in found.train.x
    }


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / "healthy").rename(f.parent / "away"), "at least 2 classes"),
        (lambda f: [p.unlink() for p in (f / "healthy").iterdir()], "healthy: there is no pic"),
        (
            lambda f: [p.unlink() for p in (f / "aphids").iterdir() if p.stem[1:] > "01"],
            "aphids: too few pictures: none for .*needs 4",
        ),
        (lambda f: (f / "healthy").rename(f / "checkpoints"), "at least 2 classes"),
    ],
)
def test_bad_data_is_named(tmp_path, spoil, complaint):
    folder = write_folder(tmp_path / "mine")
    spoil(folder)
    with pytest.raises(data.DataError, match=complaint):
        load_folder(folder)


def test_what_is_no_picture_of_a_class_does_no_harm(tmp_path):
    """A truncated picture and a text are left out and counted; hidden files and the folder of
    pretrained weights do not count.
    """
    folder = write_folder(tmp_path / "mine")
    whole = (folder / "aphids" / "103.png").read_bytes()
    (folder / "aphids" / "103.png").write_bytes(whole[: len(whole) // 2])
    (folder / "aphids" / "notes.txt").write_text("?")
    (folder / "aphids" / ".DS_Store").write_text("?")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "net.pt2").write_bytes(b"?")
    found = load_folder(folder)
    assert re.search(r"unreadable files left out: 2, the first: .*103\.png", found.note)
    assert found.numbers["pictures"] == 47 and found.numbers["unreadable"] == 2
    labels = torch.cat([part.y for part in (found.train, found.val, found.test)])
    assert labels.bincount().tolist() == [23, 24]
    assert [name.split("/")[0] for name in found.names] == [
        found.classes[label] for label in found.train.y.tolist()
    ]
    assert found.classes == ("aphids", "healthy")


def test_leaves_are_those_of_the_seed_and_differ_by_look(tmp_path, leaves_dir):
    def leaves(seed: int, folder: Path) -> "data.Data":
        options = {"image_size": 16, "leaf_count": 90, "same_bits": 16}
        return data.load(dataset="leaves", data_dir=folder, seed=seed, **options)

    first, again, other = leaves(0, leaves_dir), leaves(0, tmp_path), leaves(1, tmp_path)
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.train.x, leaves(0, tmp_path).train.x)  # from the cache
    assert not torch.equal(first.train.x, other.train.x)
    assert first.train.y.bincount().tolist() == [11] * 6
    assert first.test.y.bincount().tolist() == [3] * 6
    assert first.names[0] == "healthy_1" and first.names[11] == "powdery_mildew_1"
    pixels = torch.cat([part.x.flatten(1) for part in (first.train, first.val, first.test)])
    assert len(pixels.unique(dim=0)) == len(pixels)


def test_each_look_is_drawn_under_its_name_over_backgrounds_of_its_split(monkeypatch, tmp_path):
    drawn = []

    def draw(look, count, size, photos, generator):
        number = list(data.LOOKS).index(look)
        drawn.append((look, photos))
        return torch.full((count, 3, size, size), number, dtype=torch.uint8)

    monkeypatch.setattr(data, "draw_leaves", draw)
    found = data.load_leaves(tmp_path, 16, 60, seed=7)
    for part in (found.train, found.val, found.test):
        assert torch.equal(part.x[:, 0, 0, 0].long(), part.y)
    assert found.classes == tuple(data.LOOKS)
    step = {photos.stride(3) for _, photos in drawn}.pop()
    ends = {(photos.storage_offset() // step, photos.shape[3]) for _, photos in drawn}
    assert ends == {(0, 448), (448, 64), (512, 128)}  # of photographs 640 wide


def test_data_are_asked_for_by_the_seed(tmp_path):
    flags = [*TINY, "--seed", 7, "--out_dir", tmp_path]
    assert data_asked_for(project, *flags)["seed"] == 7


# --- one tiny run: what it reports ------------------------------------------------------------


@pytest.fixture(scope="module")
def again(run, leaves_dir) -> SimpleNamespace:
    """The data of the run and what its saved network predicts, by plain lines."""
    options = {"image_size": 16, "leaf_count": 90, "same_bits": 16, "seed": 0}
    found = data.load(dataset="leaves", data_dir=leaves_dir, **options)
    saved = torch.load(run / "model.pt", weights_only=True)
    net = predictor.load_network(saved, torch.device("cpu"))
    with torch.no_grad():
        parts = [net(part.x.float() / 255) for part in (found.train, found.val, found.test)]
    return SimpleNamespace(data=found, saved=saved, train=parts[0], val=parts[1], test=parts[2])


def test_the_headline_is_what_the_saved_weights_give(run, again):
    report, y = report_of(run), again.data.test.y
    predicted = again.test.logits.argmax(1)
    d = torch.cdist(again.test.embedding, again.train.embedding)
    expected = {
        "accuracy": float((predicted == y).double().mean()),
        "macro_f1": f1_score(y, predicted, average="macro"),
        "precision_at_1": float((again.data.train.y[d.argmin(1)] == y).double().mean()),
        "silhouette": silhouette_score(again.test.embedding.numpy(), y.numpy()),
    }
    for name, value in expected.items():
        assert report["headline"][name] == pytest.approx(value, abs=1e-5), name
    both = report["metrics"]["both"]
    assert report["headline"]["map_at_r"] == both["embedding"]["map_at_r"]
    confusion = np.zeros((6, 6), int)
    np.add.at(confusion, (y.numpy(), predicted.numpy()), 1)
    assert both["confusion"] == confusion.tolist()
    d = torch.cdist(again.test.features, again.train.features)
    share = float((again.data.train.y[d.argmin(1)] == y).double().mean())
    assert both["features"]["precision_at_1"] == pytest.approx(share)


def test_the_saved_gallery_is_the_training_set(run, again):
    gallery = again.saved["gallery"]
    assert torch.allclose(gallery["embedding"], again.train.embedding, atol=1e-5)
    assert torch.equal(gallery["y"], again.data.train.y)
    assert torch.equal(gallery["thumbnails"], again.data.train.x)
    best = torch.load(run / "both.pt", weights_only=True)
    assert all(torch.equal(best[key], value) for key, value in again.saved["weights"].items())


def test_the_best_epoch_of_validation_is_the_one_kept(run, again):
    rows = [row for row in history_of(run) if row["stage"] == "both"]
    film = torch.load(run / "film-both.pt", weights_only=True)
    assert sorted(film) == [1, 2, 3]
    best = max(rows, key=lambda row: float(row["val_score"]))
    assert torch.allclose(film[int(best["epoch"])], again.val.embedding, atol=1e-5)
    y = again.data.val.y
    accuracy = float((again.val.logits.argmax(1) == y).double().mean())
    d = torch.cdist(again.val.embedding, again.val.embedding).fill_diagonal_(torch.inf)
    precision = float((y[d.argmin(1)] == y).double().mean())
    assert float(best["val_accuracy"]) == pytest.approx(accuracy)
    assert float(best["val_precision_at_1"]) == pytest.approx(precision)
    assert float(best["val_score"]) == pytest.approx((accuracy + precision) / 2)


def test_the_plots_show_what_metrics_json_says(run, again, monkeypatch, tmp_path):
    shown = {}
    for name in ("curves", "confusion", "maps", "film", "triplets", "retrieval", "thumbnails"):
        monkeypatch.setattr(trainer, f"plot_{name}", functools.partial(shown.setdefault, name))
    monkeypatch.setattr(trainer, "try_plot", lambda plot, *args: plot(args))
    metrics = report_of(run)["metrics"]
    parts = {"train": again.train, "val": again.val, "test": again.test}
    config = SimpleNamespace(embedding_size=2, ablation=False, mining="gradual")
    rows = project.run.read_rows(run, "both")
    trainer.plot_results(metrics, {"both": parts}, rows, again.data, config, run)
    y, labels = again.data.test.y, again.data.train.y
    wrong = again.test.logits.argmax(1) != y
    assert shown["curves"][0] == rows and len(rows) == 3
    assert shown["curves"][1] == metrics["baselines"]["colour_accuracy"]
    assert shown["confusion"][0] == metrics["both"]["confusion"]
    points = shown["maps"][0][""]
    assert np.array_equal(points["test"][0], again.test.embedding.numpy())
    assert np.array_equal(points["train"][1], labels.numpy())
    assert np.array_equal(points["wrong"], wrong.numpy())
    film = torch.load(run / "film-both.pt", weights_only=True)
    assert all(np.array_equal(shown["film"][0][epoch], film[epoch]) for epoch in film)
    assert np.array_equal(shown["film"][1], again.data.val.y)
    assert np.array_equal(shown["thumbnails"][1], again.data.test.x.permute(0, 2, 3, 1))
    check_triplets(shown["triplets"][0], again)
    d = torch.cdist(again.test.embedding.double(), again.train.embedding.double())
    missed = labels[d.argmin(1)] != y
    for row in shown["retrieval"][0]:
        match = (again.data.test.x.permute(0, 2, 3, 1).numpy() == row["query"]).all((1, 2, 3))
        place = int(match.argmax())
        near = d[place].argsort()[:5]
        assert row["label"] == y[place] and row["labels"] == labels[near].tolist()
        assert np.allclose(row["distances"], d[place][near], atol=1e-5)
        first = int((y == y[place]).nonzero()[0])
        first_missed = (missed & (y == y[place])).nonzero()[:1].flatten().tolist()
        assert place in (first, *first_missed)


def check_triplets(shown: list[dict], again: SimpleNamespace) -> None:
    """One for each class; no anchor of it has a larger gap."""
    d, y = torch.cdist(again.test.embedding, again.test.embedding), again.data.test.y
    assert [triplet["labels"][0] for triplet in shown] == list(range(6))
    for label, triplet in enumerate(shown):
        gaps = [(d[a][y == label].max() - d[a][y != label].min()).item()
                for a in (y == label).nonzero().flatten()]  # fmt: skip
        far, near = triplet["distances"]
        assert far - near == pytest.approx(max(gaps), abs=1e-5)
        assert triplet["labels"][1] == label != triplet["labels"][2]


def test_the_rest_of_the_report(run, again):
    metrics, rows = report_of(run)["metrics"], history_of(run)
    both = [row for row in rows if row["stage"] == "both"]
    assert metrics["collapsed_epochs"] == sum(int(row["collapsed"]) for row in both)
    share = {"both": 0.5, "no_triplet": 0.0, "no_cls": 1.0}  # of the map in the loss and the score
    for row in rows:
        assert int(row["collapsed"]) == (float(row["within_to_between"]) > 0.9)
        accuracy, precision = float(row["val_accuracy"]), float(row["val_precision_at_1"])
        score = accuracy + share[row["stage"]] * (precision - accuracy)
        assert float(row["val_score"]) == pytest.approx(score)
    parts = {"train": again.data.train, "val": again.data.val, "test": again.data.test}
    sizes = {name: len(part.x) for name, part in parts.items()}
    total = sum(sizes.values())
    assert metrics["data"] == {"pictures": total, "groups": total} | sizes
    names = {path.name for path in run.iterdir()}
    pictures = {"ablation", "embedding", "film", "triplets", "curves", "confusion"}
    pictures |= {"thumbnails", "retrieval"}
    assert {f"{name}.png" for name in pictures} <= names


# --- the experiment ---------------------------------------------------------------------------


class Recorder:
    """What happens in a run, seen from inside: batches, rates, weights, losses."""

    def __init__(self, monkeypatch):
        self.inputs, self.batches, self.rates, self.weights, self.chosen = [], [], [], [], []
        self.evaluated = []
        augment, one_epoch, predict = (
            trainer.augment,
            trainer.train_one_epoch,
            trainer.predict,
        )

        def watch_augment(x):
            self.inputs.append(x.clone())
            self.batches.append(augment(x))
            return self.batches[-1].clone()

        def watch_epoch(net, train, order, optimizer, *rest):
            self.chosen.append(order)
            self.weights.append(copy.deepcopy(net.state_dict()))
            self.rates.append([group["lr"] for group in optimizer.param_groups])
            self.optimizer = optimizer
            row = one_epoch(net, train, order, optimizer, *rest)
            self.weights.append(copy.deepcopy(net.state_dict()))
            return row

        def watch_predict(net, examples):
            self.evaluated.append(examples)
            return predict(net, examples)

        monkeypatch.setattr(trainer, "augment", watch_augment)
        monkeypatch.setattr(trainer, "train_one_epoch", watch_epoch)
        monkeypatch.setattr(trainer, "predict", watch_predict)


def made_data(counts: tuple[int, int, int] = (12, 6, 6), classes: int = 3) -> "data.Data":
    """Noise pictures of classes with a tint each."""
    generator = torch.Generator().manual_seed(3)

    def examples(count: int) -> "data.Examples":
        y = torch.arange(count) % classes
        x = torch.randint(0, 200, (count, 3, 16, 16), generator=generator)
        x[torch.arange(count), y % 3] += 40
        return data.Examples(x.byte(), y)

    parts = [examples(count) for count in counts]
    names = tuple(f"n{number}" for number in range(counts[0]))
    labels = tuple(f"class {number}" for number in range(classes))
    return data.Data("made", labels, *parts, names, {"pictures": sum(counts)}, "data: made")


def made_run(monkeypatch, tmp_path, found: "data.Data", *flags: object) -> Path:
    monkeypatch.setattr(trainer, "load", lambda **_: found)
    options = ["--data_dir", tmp_path, "--out_dir", tmp_path / "runs", *flags]
    with contextlib.redirect_stderr(io.StringIO()):
        return train("cotton_triplet", *TINY, *options)


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(trainer, "plot_results", lambda *_: None)
    monkeypatch.setattr(trainer, "timing", lambda *_: {})


def cycle(step: int, total: int, low: float, high: float, last: float) -> float:
    """One cycle, by cosines: from `low` to `high` in 30% of the steps, then to `last`."""
    up = 0.3 * total - 1
    start, end, part = low, high, step / up
    if step > up:
        start, end, part = high, last, (step - up) / (total - 1 - up)
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("both", ["--triplet_weight", "0.3", "--margin", "0.8"]),
        ("both", ["--mining", "hard", "--relative_margin", "false", "--triplet_weight", "0.7"]),
        ("both", ["--mining", "all", "--margin", "0.6", "--triplet_weight", "0.5"]),
        ("no_triplet", ["--ablation", "true", "--triplet_weight", "0.3"]),
        ("no_cls", ["--ablation", "true", "--triplet_weight", "0.3"]),
    ],
)
def test_steps_by_hand(monkeypatch, tmp_path, no_pictures, method, flags):
    """Two epochs of two steps: forward, whole loss, gradient, AdamW with decay, one-cycle rate."""
    seen = Recorder(monkeypatch)
    found = made_data((24, 6, 6))
    options = [*flags, "--pictures_per_class", "4", "--lr", "0.02", "--weight_decay", "0.5"]
    made_run(monkeypatch, tmp_path, found, *options)
    place = 2 * {"both": 0, "no_triplet": 1, "no_cls": 2}[method]
    order = seen.chosen[place : place + 2]
    steps, start = [chosen for part in order for chosen in part], 2 * place
    net = two_heads(model.make_trunk("small", (4, 8)))
    net.load_state_dict(seen.weights[start])
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    triplet_weight = {"no_triplet": 0.0, "no_cls": 1.0}.get(
        method, float(given["--triplet_weight"])
    )
    margin, mining = float(given.get("--margin", 1)), given.get("--mining", "gradual")
    moments = {name: [torch.zeros_like(w)] * 2 for name, w in net.named_parameters()}
    for step, chosen in enumerate(steps):
        assert torch.equal(seen.inputs[start + step], found.train.x[chosen].float() / 255)
        y = found.train.y[chosen]
        out = net.train()(seen.batches[start + step])
        d = (out.embedding[:, None] - out.embedding[None] + 1e-20).square().sum(2).sqrt()
        if given.get("--relative_margin") != "false":
            d = d / (d.sum() / (len(y) * (len(y) - 1)))
        loss = (1 - triplet_weight) * F.cross_entropy(out.logits, y)
        loss = loss + triplet_weight * plain_loss(d, y, mining, margin)
        net.zero_grad()
        loss.backward()
        lr = cycle(step, 4, 0.02 / 25, 0.02, 0.02 / 25 / 1e4)
        beta = cycle(step, 4, 0.95, 0.85, 0.95)  # the momentum's cycle is the other way round
        for name, weight in net.named_parameters():
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            m = beta * moments[name][0] + (1 - beta) * grad
            v = 0.999 * moments[name][1] + 0.001 * grad**2
            moments[name] = [m, v]
            scale = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            move = m / (1 - beta ** (step + 1)) / scale
            if weight.grad is not None:
                weight.data = weight.data * (1 - lr * 0.5) - lr * move
    expected, ours = net.state_dict(), seen.weights[2 * place + 3]
    for name in ("embed.0.bias", "embed.1.running_mean", "embed.3.bias"):
        del expected[name]  # no gradient but rounding, of which Adam makes steps
    for name, value in expected.items():
        off = (ours[name].double() - value.double()).abs()
        assert off.median() < 1e-4 and (off > 5e-3).double().mean() < 0.02, name


def test_what_a_row_says_is_the_mean_over_its_batches(monkeypatch, tmp_path, no_pictures):
    seen, found = Recorder(monkeypatch), made_data((24, 6, 6))
    losses, cross_entropy = [], F.cross_entropy

    def watch(logits, y, **options):
        losses.append(cross_entropy(logits, y, **options))
        return losses[-1]

    monkeypatch.setattr(trainer.F, "cross_entropy", watch)
    folder = made_run(monkeypatch, tmp_path, found, "--pictures_per_class", "4")
    rows = history_of(folder)
    assert [len(order) for order in seen.chosen] == [2, 2]
    assert float(rows[0]["train_cls_loss"]) == pytest.approx(float(sum(losses[:2])) / 2)


def test_every_epoch_holds_every_picture_in_a_new_order(monkeypatch, tmp_path, no_pictures):
    seen, found = Recorder(monkeypatch), made_data((24, 6, 6))
    flags = ["--ablation", "true", "--pictures_per_class", "4", "--epochs", "3"]
    made_run(monkeypatch, tmp_path, found, *flags)
    orders = [torch.cat(order).tolist() for order in seen.chosen]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != orders[2]
    assert orders[:3] == orders[3:6] == orders[6:]  # each method sees the same pictures
    assert torch.equal(seen.batches[0], seen.batches[6])  # augmented alike
    assert not torch.equal(seen.batches[0][0], found.train.x[seen.chosen[0][0][0]] / 255)
    first, second, third = seen.weights[0], seen.weights[6], seen.weights[12]
    assert all(torch.equal(first[key], second[key]) for key in first)  # all begin alike
    assert all(torch.equal(first[key], third[key]) for key in first)
    made_run(monkeypatch, tmp_path, found, "--seed", "5")
    assert not torch.equal(seen.weights[18]["classify.weight"], first["classify.weight"])


def test_the_kept_epoch_is_that_of_the_best_score(monkeypatch, tmp_path, no_pictures):
    seen, found = Recorder(monkeypatch), made_data()
    scores = iter([0.2, 0.9, 0.4])
    evaluate = trainer.evaluate

    def made_scores(*args):
        return evaluate(*args) | {"val_score": next(scores)}

    monkeypatch.setattr(trainer, "evaluate", made_scores)
    folder = made_run(monkeypatch, tmp_path, found, "--epochs", "3", "--lr", "0.05")
    kept = torch.load(folder / "model.pt", weights_only=True)["weights"]
    expected = seen.weights[3]  # after the second epoch
    assert all(torch.equal(kept[key], expected[key]) for key in expected)


def test_evaluation_is_of_each_picture_by_itself(monkeypatch, tmp_path, no_pictures):
    seen, found = Recorder(monkeypatch), made_data()
    folder = made_run(monkeypatch, tmp_path, found)
    saved = torch.load(folder / "model.pt", weights_only=True)
    net = predictor.load_network(saved, torch.device("cpu"))
    alone = torch.cat([net(x[None].float() / 255).embedding for x in found.train.x])
    assert torch.allclose(saved["gallery"]["embedding"], alone, atol=1e-5)
    images = [part.x for part in seen.evaluated]
    expected = [found.val.x] * 2 + [found.train.x, found.val.x, found.test.x]
    assert all(a is b for a, b in zip(images, expected, strict=True))
    assert len(seen.inputs) == 2 * len(seen.chosen[0])  # nothing but training is augmented
    assert net.trunk[1].running_mean.abs().sum() > 0
    moved = net.trunk[1].running_mean - seen.weights[0]["trunk.1.running_mean"]
    assert moved.abs().sum() > 0  # training was in training mode


def outputs_of(folder: Path) -> dict[str, object]:
    """Groups of what a run gives, for the influence table."""
    report, rows = report_of(folder), history_of(folder)
    columns = {key: [(k, v) for row in rows for k, v in row.items() if k.startswith(key)]
               for key in ("train_", "val_")}  # fmt: skip
    saved = torch.load(folder / "model.pt", weights_only=True)
    metrics = report["metrics"]
    last = torch.load(folder / "film-both.pt", weights_only=True)
    return {
        "training": columns["train_"],
        "validation": columns["val_"],
        "weights": [value.tolist() for value in saved["weights"].values()],
        "class_head": [metrics["both"][key] for key in ("accuracy", "macro_f1", "confusion")],
        "map": metrics["both"]["embedding"],
        "features": metrics["both"]["features"],
        "baselines": metrics["baselines"],
        "gallery": [saved["gallery"]["embedding"].tolist(), saved["gallery"]["y"].tolist()],
        "film": {epoch: frame.tolist() for epoch, frame in last.items()},
    }


INFLUENCE = {  # disturbed: what moves; all the rest stays equal to the last bit
    "train labels": "training validation weights map features baselines gallery film",
    "train pictures": "training validation weights map features baselines gallery film",
    "val labels": "validation",
    "val pictures": "validation film",
    "test labels": "class_head map features baselines",
    "test pictures": "map features baselines",
    "train names": "",
    "seed": "training validation weights map features gallery film",
}
MAY_MOVE = {  # what depends on few pictures: it may move or not
    "train labels": "class_head",
    "train pictures": "class_head",
    "val labels": "baselines",  # its penalty is chosen there
    "val pictures": "baselines",
    "test pictures": "class_head",
    "seed": "class_head",
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_results", lambda *_: None)
        patch.setattr(trainer, "timing", lambda *_: {})
        folder = tmp_path_factory.mktemp("made")
        return outputs_of(made_run(patch, folder, influence_data(), "--epochs", "1"))


def influence_data() -> "data.Data":
    return made_data((36, 18, 18))


@pytest.mark.parametrize("disturbed", INFLUENCE)
def test_influence(monkeypatch, tmp_path, no_pictures, undisturbed, disturbed):
    """With one epoch, so that the kept weights are the last whatever validation says."""
    found, flags = influence_data(), ["--epochs", "1"]
    part, _, what = disturbed.partition(" ")
    if part == "seed":
        flags += ["--seed", "1"]
    elif what == "names":
        found = found._replace(names=tuple(f"other {name}" for name in found.names))
    else:
        examples = getattr(found, part)
        order = torch.randperm(len(examples.y), generator=torch.Generator().manual_seed(1))
        labels = examples.y[order]
        labels[:4] = 2
        new = {"labels": examples._replace(y=labels)}
        new["pictures"] = examples._replace(x=255 - examples.x[order])
        found = found._replace(**{part: new[what]})
    got = outputs_of(made_run(monkeypatch, tmp_path, found, *flags))
    moved = {name for name in got if got[name] != undisturbed[name]}
    must, may = (set(table.get(disturbed, "").split()) for table in (INFLUENCE, MAY_MOVE))
    assert must <= moved <= must | may


def test_known_answers_of_the_class_head_and_the_map():
    """A head that is right on 7 of 10, a map of which 6 of 10 lie next to their class."""
    y, train_y = torch.arange(10) % 2, torch.tensor([0, 0, 1, 1])
    logits = F.one_hot(y, 2).double()
    logits[:3] = 1 - logits[:3]
    gallery = torch.tensor([[0.0], [0.1], [10.0], [10.1]])
    place = y.clone()
    place[:4] = 1 - place[:4]
    embedding = 10.0 * place[:, None].float() + 0.01 * torch.arange(10)[:, None]
    features = 10.0 * y[:, None].float() + 0.01 * torch.arange(10)[:, None]
    outputs = {
        "test": model.Outputs(logits, embedding, features),
        "train": model.Outputs(torch.zeros(4, 2), gallery, gallery),
        "val": None,
    }
    examples = {"test": data.Examples(None, y), "train": data.Examples(None, train_y)}
    made = SimpleNamespace(classes=("a", "b"), **examples)
    numbers = trainer.test_numbers(outputs, made)
    assert numbers["accuracy"] == pytest.approx(0.7)
    assert numbers["confusion"] == [[3, 2], [1, 4]]
    assert numbers["macro_f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert numbers["embedding"]["precision_at_1"] == pytest.approx(0.6)
    assert numbers["embedding"]["map_at_r"] == pytest.approx(0.6)
    assert numbers["features"]["precision_at_1"] == 1
    assert numbers["features"]["silhouette"] > 0.9 > numbers["embedding"]["silhouette"]


def test_known_answers_of_validation():
    """Each one's neighbour is sought among the others, if its class has any."""
    y = torch.tensor([0, 0, 1, 1, 2])
    embedding = torch.tensor([[0.0], [0.1], [5.0], [0.3], [5.1]])
    outputs = model.Outputs(F.one_hot(torch.tensor([0, 0, 1, 1, 1]), 3).double(), embedding, None)
    numbers = trainer.evaluate(outputs, y, 0.25)
    assert numbers["val_accuracy"] == pytest.approx(0.8)
    assert numbers["val_precision_at_1"] == pytest.approx(0.5)  # of the first four
    assert numbers["val_score"] == pytest.approx(0.75 * 0.8 + 0.25 * 0.5)
    assert numbers["val_cls_loss"] == pytest.approx(math.log(math.e + 2) - 0.8)
    single = model.Outputs(outputs.logits[[0, 2]], embedding[[0, 2]], None)
    numbers = trainer.evaluate(single, y[[0, 2]], 0.5)
    assert math.isnan(numbers["val_precision_at_1"]) and numbers["val_score"] == 1


def test_the_baseline_of_colours_knows_colours_and_nothing_else():
    tinted = made_data((60, 30, 30))
    assert trainer.baselines(SimpleNamespace(pretrained=False), tinted) == {"colour_accuracy": 1}
    grid = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 255
    y = torch.arange(60) % 2
    grid[y == 1, :, :8] = grid[y == 1, :, :8].flip(2)  # other pictures, the same colours
    plain = data.Examples(grid.byte(), y)
    made = tinted._replace(train=plain, val=plain, test=plain._replace(y=1 - y))
    score = trainer.baselines(SimpleNamespace(pretrained=False), made)["colour_accuracy"]
    train_score = trainer.baselines(SimpleNamespace(pretrained=False), made._replace(test=plain))
    assert score + train_score["colour_accuracy"] == pytest.approx(1)
    x = torch.randint(256, (4, 3, 5, 5)).byte()
    colours = trainer.colour_numbers(x).numpy()
    pixels = x.numpy().reshape(4, 3, -1).astype(float)
    assert np.allclose(colours[:, :3], pixels.mean(2), atol=1e-3)
    assert np.allclose(colours[:, 3:], pixels.std(2, ddof=1), atol=1e-3)


def test_a_baseline_is_fitted_on_training_and_chosen_on_validation():
    """Inputs for which the strongest penalty is best on validation, the weakest on the test set."""
    fitted, scored = [], []

    class Model:
        def __init__(self, C, **_):
            self.c = C

        def fit(self, x, y):
            fitted.append((x.tolist(), y.tolist()))
            return self

        def score(self, x, y):
            scored.append((self.c, x.tolist()))
            return self.c if x[0][0] == 3 else 1 - self.c / 10  # 3: the test set

    inputs = [torch.tensor([[float(n)], [n + 0.5]]) for n in (1, 2, 3)]
    y = torch.tensor([0, 1])
    made = SimpleNamespace(**{part: data.Examples(None, y) for part in ("train", "val", "test")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.linear_model.LogisticRegression", Model)
        patch.setattr("sklearn.pipeline.make_pipeline", lambda *parts: parts[-1])
        assert trainer.linear_accuracy(inputs, made) == 0.01
    assert all(x == [[1.0], [1.5]] for x, _ in fitted)
    assert {x[0][0] for c, x in scored if c != 0.01} == {2.0}


def test_a_baseline_knows_numbers_whatever_their_scale():
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    parts = [data.Examples(None, (part[:, 0] > 0).long()) for part in x.split(30)]
    made = SimpleNamespace(train=parts[0], val=parts[1], test=parts[2])
    small = list((x * torch.tensor([1e-5, 10.0])).split(30))
    assert trainer.linear_accuracy(small, made) == trainer.linear_accuracy(x.split(30), made) > 0.9


def test_a_pretrained_trunk_is_loaded_frozen_then_learns_at_its_own_rate(
    monkeypatch, tmp_path, no_pictures, program
):
    seen, found = Recorder(monkeypatch), made_data()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "net.pt2").write_bytes(program)
    flags = ["--resnet", "net.pt2", "--frozen_epochs", "2", "--epochs", "4", "--lr", "0.04"]
    folder = made_run(monkeypatch, tmp_path, found, *flags, "--trunk_lr", "0.001")
    fresh = model.make_trunk("net.pt2", (), program=program).state_dict()

    def trunk(number: int) -> dict:
        state = seen.weights[number]
        return {key: state[f"trunk.{key}"] for key in fresh}

    for number in (0, 1, 3):  # at the start, after the first and the second epoch
        assert all(torch.equal(fresh[key], trunk(number)[key]) for key in fresh)
    assert not all(torch.equal(fresh[key], trunk(5)[key]) for key in fresh)  # after the third
    net = predictor.load_network(
        torch.load(folder / "model.pt", weights_only=True), torch.device("cpu")
    )
    groups = seen.optimizer.param_groups
    assert [group["max_lr"] for group in groups] == [0.04, 0.001]
    heads = sum(p.numel() for p in [*net.classify.parameters(), *net.embed.parameters()])
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    assert sizes == [heads, sum(p.numel() for p in net.trunk.parameters())]
    with torch.no_grad():
        fresh = model.make_trunk("net.pt2", (), program=program)
        untouched = two_heads(fresh, pretrained=True).eval()
        features = [untouched(getattr(found, part).x / 255).features for part in trainer.PARTS]
    probe = trainer.linear_accuracy(features, found)
    assert report_of(folder)["headline"]["probe_accuracy"] == probe
    picture = tmp_path / "mine.png"
    Image.fromarray(found.test.x[0].permute(1, 2, 0).numpy()).save(picture)
    call(predictor, folder, picture)  # all of it is in model.pt


def test_imagenet_weights_go_into_the_trunk(monkeypatch, tmp_path, no_pictures):
    from torchvision.models import get_model

    torch.manual_seed(9)
    state = get_model("squeezenet1_1", weights=None).state_dict()
    asked = []
    monkeypatch.setattr(trainer, "pretrained_weights", lambda *a: asked.append(a) or state)
    seen = Recorder(monkeypatch)
    flags = ["--resnet", "squeezenet1_1", "--weights", "imagenet", "--epochs", "1"]
    flags += ["--image_size", "32", "--frozen_epochs", "1", "--compare", "false"]
    found = made_data()
    bigger = [getattr(found, part) for part in ("train", "val", "test")]
    bigger = [data.Examples(p.x.repeat_interleave(2, 2).repeat_interleave(2, 3), p.y)
              for p in bigger]  # fmt: skip
    found = found._replace(train=bigger[0], val=bigger[1], test=bigger[2])
    made_run(monkeypatch, tmp_path, found, *flags)
    ((url, folder),) = asked
    assert url.startswith("https://download.pytorch.org/models/squeezenet1_1-")
    assert folder == tmp_path
    for number in (0, 1):
        kept = seen.weights[number]
        assert all(torch.equal(value, kept[f"trunk.0.{key}"]) for key, value in state.items())


def test_speed_counts_the_pictures_that_a_step_has(monkeypatch):
    """60 classes a batch, of which there are 3, are 3."""
    monkeypatch.setattr(trainer, "mining_seconds", lambda *_: 0.1)
    found, rows = made_data((24, 6, 6)), [{"train_seconds": 2.0}]
    speeds = []
    for classes in (3, 60):
        config = SimpleNamespace(classes_per_batch=classes, pictures_per_class=4)
        speeds.append(trainer.timing(None, rows, found, config)["train_images_per_second"])
    assert speeds == [12.0, 12.0]


@pytest.mark.parametrize(("soft", "relative"), [(True, False), (False, True), (False, False)])
def test_margins_are_those_asked_for(soft, relative):
    config = SimpleNamespace(soft_margin=soft, margin=0.4, relative_margin=relative)
    assert trainer.margin_of(config) == (None if soft else 0.4)
    d = torch.tensor([[0.0, 4.0], [4.0, 0.0]])
    assert float(trainer.in_units(d, config)[0, 1]) == (1 if relative else 4)


# --- whole runs -------------------------------------------------------------------------------


def test_only_the_method(monkeypatch, tmp_path, leaves_dir):
    flags = [*TINY, "--compare", "false", "--data_dir", leaves_dir, "--out_dir", tmp_path]
    folder = train("cotton_triplet", *flags)
    report = report_of(folder)
    assert "baselines" not in report["metrics"] and "colour_accuracy" not in report["headline"]
    assert {row["stage"] for row in history_of(folder)} == {"both"}


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, leaves_dir, run):
    """Killed in the second of its three trainings."""
    flags = [*TINY, "--ablation", "true", "--epochs", "3", "--data_dir", leaves_dir]
    train_until("cotton_triplet", 4, *flags, "--out_dir", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "metrics.json").exists()
    train("cotton_triplet", "--resume", folder)
    reports = [report_of(path) for path in (folder, run)]
    for report in reports:
        del report["metrics"]["timing"], report["seconds"]
    assert reports[0] == reports[1]
    assert history_of(folder) == history_of(run) and len(history_of(run)) == 9
    films = [torch.load(path / "film-both.pt") for path in (folder, run)]
    assert all(torch.equal(films[0][epoch], films[1][epoch]) for epoch in (1, 2, 3))
    weights = [torch.load(path / "model.pt")["weights"] for path in (folder, run)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--dataset", "folder", "--data_dir", "nowhere"], "nowhere: there is no such folder"),
        ([*TINY, "--resnet", "no_such_net"], "'no_such_net' is neither small, nor a classifier"),
        ([*TINY, "--resnet", "absent.pt2"], "there is neither absent.pt2 nor"),
        ([*TINY, "--pictures_per_class", "999"], "pictures_per_class: 5994 pictures in a batch"),
        ([*TINY, "--resnet", "vit_b_32"], "no features of pictures of 16 pixels"),
    ],
)
def test_a_run_that_cannot_go_on_says_why_and_leaves_no_folder(
    tmp_path, leaves_dir, monkeypatch, flags, complaint
):
    monkeypatch.chdir(tmp_path)
    place = [] if "--data_dir" in flags else ["--data_dir", leaves_dir]
    with pytest.raises(data.DataError, match=re.escape(complaint)):
        call(trainer, *flags, *place, "--out_dir", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "augment", lambda x: x / 0)
    with pytest.raises(FloatingPointError, match="both epoch 1: the loss is not finite at step 1"):
        made_run(monkeypatch, tmp_path, made_data())


@pytest.mark.parametrize("classes", [2, 30])
def test_the_least_legal_data_are_enough_for_every_number_and_picture(
    monkeypatch, tmp_path, classes
):
    """One picture of each class in validation and test; names that break a title; many classes."""
    found = made_data((2 * classes, classes, classes), classes)
    names = tuple(f"${number}_{'x' * 40}" for number in range(classes))
    folder = made_run(monkeypatch, tmp_path, found._replace(name="a $ b", classes=names))
    report = report_of(folder)
    assert report["headline"]["silhouette"] is None
    assert "NaN" not in (folder / "metrics.json").read_text()
    pictures = {path.stem for path in folder.glob("*.png")}  # no triplets: no class has two
    assert pictures == {"curves", "confusion", "embedding", "thumbnails", "film", "retrieval"}


# --- predict.py -------------------------------------------------------------------------------


def test_predictions_are_those_of_evaluation(run, again, tmp_path):
    """On test pictures, written as PNG, and odd ones: alpha, grey, turned by EXIF, broken."""
    folder = tmp_path / "mine" / "deep"
    folder.mkdir(parents=True)
    for place in range(3):
        pixels = again.data.test.x[place * 5].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{place}.png")
    photo(1).convert("RGBA").save(tmp_path / "mine" / "alpha.png")
    photo(2).convert("L").resize((31, 70)).save(tmp_path / "mine" / "grey.png")
    turned = photo(3).resize((40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "mine" / "turned.png", exif=exif)
    (tmp_path / "mine" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    output = call(predictor, run, tmp_path / "mine", "--out_dir", tmp_path / "out")
    (out,) = (tmp_path / "out").iterdir()
    assert output.splitlines()[-1] == str(out)
    assert "unreadable files left out: 1, the first: " in output and "broken.jpg" in output
    rows = {row["file"]: row for row in csv.DictReader((out / "predictions.csv").open())}
    names = [f"deep/{place}.png" for place in range(3)]
    assert set(rows) == {*names, "alpha.png", "grey.png", "turned.png"}
    classes, gallery = again.data.classes, again.data.names
    for place, name in enumerate(names):
        row, number = rows[name], place * 5
        probability, label = again.test.logits[number].softmax(0).max(0)
        assert row["class"] == classes[int(label)]
        assert float(row["probability"]) == pytest.approx(float(probability), abs=1e-5)
        where = [float(row["map_1"]), float(row["map_2"])]
        assert where == pytest.approx(again.test.embedding[number].tolist(), abs=1e-5)
        d = torch.cdist(again.test.embedding[number][None], again.train.embedding)[0]
        for rank, nearest in enumerate(d.argsort()[:5].tolist(), start=1):
            assert float(row[f"nearest_{rank}_distance"]) == pytest.approx(
                float(d[nearest]), abs=1e-5
            )
            if rank == 1:
                assert row["nearest_1"] == gallery[nearest]
                assert row["nearest_1_class"] == classes[int(again.data.train.y[nearest])]
    assert {"map.png", "retrieval.png"} <= {path.name for path in out.iterdir()}
    with torch.no_grad():
        net = predictor.load_network(again.saved, torch.device("cpu"))
        upright = turned.transpose(Image.Transpose.ROTATE_270).convert("RGB")
        x = torch.from_numpy(np.array(upright.resize((16, 16), Image.Resampling.BILINEAR)))
        expected = net(x.permute(2, 0, 1)[None] / 255).embedding[0]
    where = [float(rows["turned.png"][key]) for key in ("map_1", "map_2")]
    assert where == pytest.approx(expected.tolist(), abs=1e-5)


def test_predicting_from_a_map_of_more_dimensions(tmp_path, leaves_dir):
    flags = [*TINY, "--embedding_size", "3", "--epochs", "1", "--data_dir", leaves_dir]
    folder = train("cotton_triplet", *flags, "--out_dir", tmp_path / "runs")
    photo(1).save(tmp_path / "one.png")
    call(predictor, folder, tmp_path / "one.png")
    (out,) = (folder / "predictions").iterdir()
    (row,) = csv.DictReader((out / "predictions.csv").open())
    assert math.isfinite(float(row["map_1"])) and (out / "map.png").exists()


def test_nothing_to_predict_is_said_in_one_line(run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"?")
    done = subprocess.run(
        [sys.executable, TRAIN.parent / "predict.py", run, tmp_path / "broken.jpg"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "no picture could be read" in done.stderr
