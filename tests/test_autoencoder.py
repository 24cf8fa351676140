"""autoencoder: Muon, one kind of MSE, PCA, new codes, and an experiment whose wires are pulled."""

import copy
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from projects import call, data_asked_for, load_project, tiny_run, train_until
from sklearn.decomposition import PCA

from autoencoder import data
from autoencoder.model import (
    Autoencoder,
    CodeNeighbours,
    Muon,
    fit_pca,
    hide,
    image_errors,
    nearest_image,
    one_cycle,
    orthogonalise,
    path_between,
    psnr,
)

TINY = [
    "--dataset", "digits_photographs", "--device", "cpu", "--precision", "float32",
    "--bundled_images", "100", "--widths", "4,8", "--code_size", "8", "--epochs_x", "2",
    "--epochs_y", "1", "--batch_size", "32", "--masked_epochs", "1", "--label_counts", "20,100",
    "--classifier_epochs", "2,1", "--seeds", "0", "--noise_levels", "0",
    "--judge_epochs", "1",    "--added_labels", "10", "--added_copies", "1", "--added_epochs", "1",
]  # fmt: skip


def small_autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder((4, 8), 8, torch.full((3, 32, 32), 0.5)).eval()


# --- Muon -------------------------------------------------------------------------------------


def test_muon_takes_the_steps_of_torchs_muon():
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6)):
        start = torch.randn(shape)
        one, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
        ours = Muon([one], lr=0.1, dtype=torch.bfloat16)  # torch's own steps are in bfloat16
        theirs = torch.optim.Muon([other], lr=0.1, momentum=0.95, weight_decay=0)
        for _ in range(4):
            one.grad = torch.randn(shape)
            other.grad = one.grad.clone()
            ours.step()
            theirs.step()
        moved = (other - start).norm()
        assert (one - other).norm() < 0.03 * moved, shape


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_newton_schulz_keeps_the_singular_vectors_and_evens_out_the_values(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalise(matrix) @ v.T
    assert inside.diag().min() > 0.3 and inside.diag().max() < 1.3
    assert (inside - inside.diag().diag()).abs().max() < 1e-6
    full = u @ inside @ v  # nothing lies outside of the span of the singular vectors
    torch.testing.assert_close(full, orthogonalise(matrix))


def test_a_kernel_is_stepped_as_the_matrix_of_its_output_channels():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    Muon([kernel], lr=0.1).step()
    Muon([matrix], lr=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), matrix)


def test_the_rate_rises_and_ends_at_nothing():
    rates = [one_cycle(step, total=100, warm_up=0.1) for step in range(100)]
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(1 / 90)


# --- reconstruction ---------------------------------------------------------------------------


def test_the_error_is_a_mean_over_channels_and_pixels_of_clamped_outputs():
    x = torch.full((2, 3, 32, 32), 0.75)
    output = torch.stack((torch.full((3, 32, 32), 5.0), torch.full((3, 32, 32), 0.5)))
    assert image_errors(output, x).tolist() == [0.0625, 0.0625]
    assert psnr(0.01) == pytest.approx(20)


def test_a_code_has_its_size_and_neither_code_nor_output_is_bounded():
    model = small_autoencoder()
    x = torch.rand(64, 3, 32, 32)
    code = model.encoder(x)
    assert code.shape == (64, 8) and code.min() < 0 < code.max()
    assert torch.equal(model.encoder.code(torch.zeros(1, 512))[0], model.encoder.code.bias)
    output = model.decode(1000 * torch.randn(64, 8))
    assert output.shape == x.shape and output.min() < 0 and output.max() > 1
    with torch.no_grad():
        model.decoder.convolutions[-2].weight.zero_()
        model.decoder.convolutions[-2].bias.zero_()
    assert model(x).eq(0.5).all()  # the mean image


def test_pca_is_scikit_learns_and_perfect_on_its_own_subspace():
    rng = np.random.default_rng(0)
    scales = 0.8 ** np.arange(50)[:, None]  # of the components, as in pictures: they fall off
    x = (rng.standard_normal((60, 50)) @ (scales * rng.standard_normal((50, 3072)))) / 10
    x = torch.from_numpy(x).view(60, 3, 32, 32)
    ours = fit_pca(x, 12)(x).flatten(1).numpy()
    exact = PCA(12, svd_solver="full").fit(x.flatten(1).numpy())
    flat = x.flatten(1).numpy()
    best = ((exact.inverse_transform(exact.transform(flat)) - flat) ** 2).mean()
    assert ((ours - flat) ** 2).mean() == pytest.approx(best, rel=1e-3)
    low = torch.from_numpy(rng.random((60, 4)) @ rng.random((4, 3072))).view(60, 3, 32, 32)
    torch.testing.assert_close(fit_pca(low, 6)(low), low)


def test_hidden_patches_are_the_mean_image_and_the_share_is_theirs():
    torch.manual_seed(0)
    x, mean = torch.ones(200, 3, 32, 32), torch.full((3, 32, 32), 0.5)
    hidden = hide(x, mean, 0.25)
    patches = hidden[:, 0].unfold(1, 4, 4).unfold(2, 4, 4)
    assert set(hidden.unique().tolist()) == {0.5, 1.0}
    assert torch.equal(patches.amin((3, 4)), patches.amax((3, 4)))
    assert hidden.eq(0.5).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(hidden[:, 0], hidden[:, 2])


# --- codes ------------------------------------------------------------------------------------


def test_local_noise_has_the_mean_and_covariance_of_the_nearest_codes_of_the_class():
    torch.manual_seed(0)
    near, far = torch.randn(10, 3, dtype=torch.double), 100 + torch.randn(10, 3).double()
    other = torch.randn(40, 3, dtype=torch.double)  # as near, but of another class
    known = CodeNeighbours(torch.cat((near, far, other)), torch.tensor([0] * 20 + [1] * 40))
    z, y = torch.full((40000, 3), 0.5, dtype=torch.double), torch.zeros(40000).long()
    for level in (0.6, 1.0):
        varied = known.vary(z, y, level)
        center = near.mean(0)
        wanted = center + math.sqrt(1 - level**2) * (0.5 - center)
        torch.testing.assert_close(varied.mean(0), wanted, atol=0.03, rtol=0)
        covariance = level**2 * torch.from_numpy(np.cov(near.T.numpy(), bias=True))
        torch.testing.assert_close(torch.cov(varied.T), covariance, atol=0.05, rtol=0.05)
    assert torch.equal(known.vary(z, y, 0.0), known.vary(z, y, 0.0))
    torch.testing.assert_close(known.vary(z, y, 0.0), z)


def test_a_nearest_image_is_found_and_its_distance_is_a_root_mean_square():
    torch.manual_seed(0)
    others = torch.randint(0, 200, (30, 3, 32, 32), dtype=torch.uint8)
    far, which = nearest_image(others[[7, 22]] + 51, others, chunk=4)
    assert which.tolist() == [7, 22]
    torch.testing.assert_close(far, torch.tensor([0.2, 0.2]), atol=1e-3, rtol=0)
    assert nearest_image(others[:2], others)[0].max() < 2e-3


def test_a_path_keeps_to_where_codes_are_dense():
    angle = torch.linspace(0, math.pi, 60)
    arc = torch.stack((angle.cos(), angle.sin()), 1)
    between = path_between(arc[1:-1], arc[[0, -1]], 9)
    torch.testing.assert_close(between[[0, -1]], arc[[0, -1]])
    torch.testing.assert_close(between.norm(dim=1), torch.ones(9), atol=0.01, rtol=0)
    hops = between.diff(dim=0).norm(dim=1)
    assert hops.max() < 1.05 * hops.min()
    apart = path_between(torch.zeros(20, 2) + arc[:20] * 1e-3, torch.tensor([[9.0, 9], [5, 5]]), 3)
    torch.testing.assert_close(apart[[0, 2]], torch.tensor([[9.0, 9], [5, 5]]))


# --- data -------------------------------------------------------------------------------------


def test_no_test_pixel_of_the_bundled_pair_is_trained_on(monkeypatch):
    inks, strips = [], []
    render, cut = data.render_digits, data.cut_crops
    monkeypatch.setattr(
        data, "render_digits", lambda source, _, g: inks.append(source.x) or render(source, 40, g)
    )
    monkeypatch.setattr(
        data, "cut_crops", lambda photos, _, g: strips.append(photos) or cut(photos, 40, g)
    )
    x, y = data.load_digits(40, 0), data.load_crops(40, 0)
    digits = [{image.numpy().tobytes() for image in part} for part in inks]
    columns = [{column.numpy().tobytes() for column in part.unbind(3)} for part in strips]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not digits[one] & digits[other] and not columns[one] & columns[other]
    assert sum(map(len, columns)) == 640 and len(digits[0]) > 1000
    assert (x.mirror, y.mirror) == (False, True)
    assert not torch.equal(x.val.x, x.test.x)


def test_rendered_digits_have_more_than_the_rank_of_their_64_pixels():
    generator = torch.Generator().manual_seed(0)
    source = data.Images(torch.rand(300, 8, 8), torch.arange(300))
    x, y = data.render_digits(source, 200, generator)
    assert x.dtype == torch.uint8 and x.shape == (200, 3, 32, 32) and len(set(y.tolist())) > 100
    assert torch.linalg.matrix_rank(x[:, 0].flatten(1).double()) > 180


def test_flat_crops_are_rare():
    photo = torch.zeros(1, 3, 64, 400, dtype=torch.uint8)
    photo[..., 200:] = torch.randint(0, 255, (3, 64, 200), dtype=torch.uint8)  # the right half
    x = data.cut_crops(photo, 200, torch.Generator().manual_seed(0)).x
    flat = x.flatten(1).eq(0).all(1).float().mean()
    assert 0.01 < flat < 0.15  # of three crops all: a half each, to the third power


def test_every_image_comes_once_and_only_what_may_be_is_mirrored_or_moved():
    ramp = torch.arange(32, dtype=torch.uint8).expand(64, 3, 32, 32).contiguous()
    images = data.Images(ramp, torch.arange(64))
    torch.manual_seed(0)
    for mirror in (False, True):
        drawn = list(data.shuffled_batches(images, 10, mirror=mirror))
        x = torch.cat([part for part, _ in drawn])
        order = torch.cat([y for _, y in drawn]).tolist()
        assert sorted(order) == list(range(64)) != order
        assert x[:, 0, 0, 31].gt(0).all().item() is not mirror
    assert x.max() == pytest.approx(31 / 255)
    torch.manual_seed(0)
    moved = data.move(ramp, 2)
    assert set((moved[:, 0, 5, 10].int() - 10).tolist()) == {-2, -1, 0, 1, 2}
    assert moved[:, 0, 5, 0].max() == 2 and moved[:, 0, 5, 31].max() == 31  # the border repeated
    tall = data.move(ramp.transpose(2, 3).contiguous(), 2)
    assert set((tall[:, 0, 10, 5].int() - 10).tolist()) == {-2, -1, 0, 1, 2}


def test_labels_are_spread_over_the_classes_and_more_hold_those_of_fewer():
    images = data.Images(torch.arange(100)[:, None], torch.arange(100) % 4)
    few, more = (data.choose_labelled(images, count, 3) for count in (10, 50))
    assert sorted(torch.bincount(few.y).tolist()) == [2, 2, 3, 3]
    assert set(few.x[:, 0].tolist()) < set(more.x[:, 0].tolist())
    assert torch.equal(few.x[:, 0] % 4, few.y)
    assert set(data.choose_labelled(images, 10, 4).x[:, 0].tolist()) != set(few.x[:, 0].tolist())
    skewed = data.Images(torch.zeros(100, 1), torch.arange(100).clamp(max=3))
    assert len(data.choose_labelled(skewed, 30, 0).x) == 30


def write_folder(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(25):
                image = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / part / name / f"{number}.png")
    return folder


def test_a_broken_image_is_left_out_and_counted_and_a_lone_class_refused(tmp_path):
    folder = write_folder(tmp_path / "mine")
    (folder / "train" / "cat" / "3.png").write_bytes(b"no image")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "test" / "cat" / ".DS_Store").write_bytes(b"")
    images, bad = data.load_folder(folder, 0)
    assert len(bad) == 1 and "3.png" in bad[0]
    assert (len(images.train.x), len(images.val.x), len(images.test.x)) == (47, 2, 50)
    assert images.classes == ("cat", "dog")
    assert torch.bincount(torch.cat((images.train.y, images.val.y))).tolist() == [24, 25]
    (folder / "test" / "dog").rename(folder / "test" / "bird")
    with pytest.raises(data.DataError, match="class 'bird' is not in both"):
        data.load_folder(folder, 0)
    for number in range(11):
        (folder / "test" / "cat" / f"{number}.png").unlink()
    with pytest.raises(data.DataError, match="at least 40 readable pictures, found 39"):
        data.load_folder(folder, 0)


def test_a_picture_is_squeezed_whole_and_keeps_its_class(tmp_path):
    folder = write_folder(tmp_path / "mine")
    wide = np.zeros((16, 64, 3), dtype=np.uint8)
    wide[:, 32:] = 255
    Image.fromarray(wide).save(folder / "test" / "dog" / "0.png")
    _, images = data.read_images(folder / "test", folder, [])
    x = images.x[25]
    assert images.y.tolist() == [0] * 25 + [1] * 25
    assert x[:, :, :14].max() == 0 and x[:, :, 18:].min() == 255


# --- the experiment: a small pair, trained in a second ----------------------------------------

SMALL = [
    *TINY, "--bias_lr", "1e-2", "--label_counts", "20", "--classifier_epochs", "2",
    "--noise_levels", "0", "--seeds", "0",
]  # fmt: skip
project = load_project("autoencoder")
train_py, studies = project.train, project.studies


@pytest.fixture(scope="module")
def pair() -> data.Pair:
    """Digits and photographs as train.py gets them, of few images."""
    own = load_project("autoencoder").data

    def few(train_images: int, seed: int) -> tuple:
        return (60, 40, 40), [torch.Generator().manual_seed(number) for number in range(3)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "counts_and_generators", few)
        x, y = own.load_digits(60, 0), own.load_crops(60, 0)
    return own.Pair(x, y, "data: small")


def experiment(pair: data.Pair, folder: Path, *flags: object) -> dict:
    """metrics.json, history and weights of a run on `pair`, by part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_py, "load", lambda **_: pair)
        patch.setattr(studies, "LEAST_IMAGES", 1)
        patch.setattr(train_py, "plot_results", lambda *_: None)
        output = call(train_py, *SMALL, *flags, "--out_dir", folder)
    run = Path(output.splitlines()[-1])
    report = json.loads((run / "metrics.json").read_text())
    weights = {path.stem: torch.load(path, weights_only=True) for path in run.glob("*.pt")}
    rows = load_project("autoencoder").run.load_checkpoint(run, "", {})
    return {"run": run, "weights": weights, "rows": rows, **report["metrics"]} | {
        "headline": report["headline"]
    }


def parts_of(result: dict) -> dict[str, str]:
    """What may move or not, each as a text to compare."""

    def of(stage: str, *keys: str) -> list:
        rows = [row for row in result["rows"] if row["stage"].startswith(stage)]
        return [[row[key] for key in keys] for row in rows]

    def weights(name: str) -> list:
        return [(key, value.tolist()) for key, value in result["weights"][name].items()]

    mse = result["reconstruction"]
    arms = ("random", "plain", "masked")
    study, probes = result["classifier"], result["probes"]
    parts = {
        "x weights": weights("autoencoder-x"),
        "y weights": weights("autoencoder-y"),
        "masked weights": weights("autoencoder-masked"),
        "judge weights": weights("judge"),
        "x val": of("autoencoder-x", "val_loss"),
        "y val": of("autoencoder-y", "val_loss"),
        "x on x": mse["trained_on_x"]["x"],
        "x on y": mse["trained_on_x"]["y"],
        "y on x": mse["trained_on_y"]["x"],
        "y on y": mse["trained_on_y"]["y"],
        "pca x on x": mse["pca_of_x"]["x"],
        "pca y on y": mse["pca_of_y"]["y"],
        "added": result["added"],
        "added weights": [
            weights(name) for name in sorted(result["weights"]) if name.startswith("with")
        ],
        "new images": result["generation"]["local"],
        "far": [v["to_nearest"] for v in result["generation"]["independent"].values()],
    }
    for arm in arms:
        parts[f"{arm} weights"] = [
            weights(n) for n in sorted(result["weights"]) if n.startswith(f"{arm}-")
        ]
        parts[f"{arm} train"] = of(f"{arm}-", "train_loss")
        parts[f"{arm} val"] = of(f"{arm}-", "val_loss")
        parts[f"{arm} test"] = [study[count][arm]["test_accuracy"] for count in study]
    for encoder in probes:
        parts[f"probe {encoder}"] = probes[encoder]
    return {name: json.dumps(value) for name, value in parts.items()}


@pytest.fixture(scope="module")
def plain(pair, tmp_path_factory) -> dict:
    return experiment(pair, tmp_path_factory.mktemp("plain"))


# Which part of the data is disturbed: what moves by it. Everything else stays to the last bit.
INFLUENCE = {
    "x val": {"x val", "random val", "plain val", "masked val"},
    "x val labels, y train labels, y test labels": {"random val", "plain val", "masked val"},
    "y val, y test": {"y val", "x on y", "y on y", "pca y on y"},
    "x test": {
        "x on x", "y on x", "pca x on x", "new images", "far", "random test", "plain test",
        "masked test", "added", "probe pixels", "probe pca", "probe untrained", "probe plain",
        "probe masked", "probe of_y",
    },
    "y train": {"y weights", "y val", "y on x", "y on y", "pca y on y", "probe of_y"},
    "x train labels": {
        "random weights", "random train", "random val", "random test", "plain weights",
        "plain train", "plain val", "plain test", "masked weights", "masked train", "masked val",
        "masked test", "judge weights", "added", "added weights", "new images", "probe pixels",
        "probe pca", "probe untrained", "probe plain", "probe masked", "probe of_y",
    },
}  # fmt: skip


def disturb(pair: data.Pair, parts: str) -> data.Pair:
    """Images moved by a pixel, so that the best epoch stays the best, or labels given to others."""
    for part in parts.split(", "):
        name, split, *labels = part.split()
        images = getattr(getattr(pair, name), split)
        changed = images._replace(y=images.y.roll(1)) if labels else images
        changed = changed if labels else images._replace(x=images.x.roll(1, 3))
        pair = pair._replace(**{name: getattr(pair, name)._replace(**{split: changed})})
    return pair


@pytest.mark.parametrize("part", INFLUENCE)
def test_each_part_of_the_data_moves_what_it_may_and_nothing_else(pair, plain, part, tmp_path):
    before, after = parts_of(plain), parts_of(experiment(disturb(pair, part), tmp_path))
    moved = {name for name in before if before[name] != after[name]}
    may_stay = {name for name in INFLUENCE[part] if name.endswith("test") or "probe" in name}
    may_stay |= {"added", "new images"}  # accuracies over 40 images may come out alike
    assert moved <= INFLUENCE[part]
    assert INFLUENCE[part] - may_stay <= moved
    if part.startswith("x t"):  # of so many accuracies some must
        assert moved & may_stay


def test_the_headline_is_computed_again_from_weights_and_data(pair, plain):
    sets = {"x": pair.x, "y": pair.y}
    for trained, images in sets.items():
        model = small_autoencoder()
        model.load_state_dict(plain["weights"][f"autoencoder-{trained}"])
        train = images.train.x.double().div(255).flatten(1).numpy()
        pca = PCA(8, svd_solver="full").fit(train)
        for name, other in sets.items():
            test = other.test.x.float() / 255
            with torch.no_grad():
                error = (model(test).clamp(0, 1) - test).double().square().mean().item()
            flat = test.flatten(1).double().numpy()
            back = pca.inverse_transform(pca.transform(flat)).clip(0, 1)
            mse = plain["reconstruction"]
            assert mse[f"trained_on_{trained}"][name]["mse"] == pytest.approx(error, rel=1e-5)
            wanted = pytest.approx(((back - flat) ** 2).mean(), rel=2e-3)
            assert mse[f"pca_of_{trained}"][name]["mse"] == wanted
        val = images.val.x.float() / 255
        with torch.no_grad():
            error = (model(val).clamp(0, 1) - val).square().mean().item()
        losses = [r["val_loss"] for r in plain["rows"] if r["stage"] == f"autoencoder-{trained}"]
        assert min(losses) == pytest.approx(error, rel=1e-4)
    mse, few = plain["reconstruction"], plain["classifier"]["20"]
    wanted = {
        "mse_x": mse["trained_on_x"]["x"]["mse"],
        "pca_mse_x": mse["pca_of_x"]["x"]["mse"],
        "mse_y": mse["trained_on_y"]["y"]["mse"],
        "pca_mse_y": mse["pca_of_y"]["y"]["mse"],
        "cross_mse_x_to_y": mse["trained_on_x"]["y"]["mse"],
        "cross_mse_y_to_x": mse["trained_on_y"]["x"]["mse"],
        "judge_accuracy": accuracy_of(plain["weights"]["judge"], pair.x.test),
        "new_image_accuracy": plain["generation"]["local"]["1"]["judge_accuracy"],
    }
    for arm in train_py.STARTS:
        weights = plain["weights"][f"{arm}-20labels-seed0"]
        wanted[f"{arm}_accuracy"] = accuracy_of(weights, pair.x.test)
        assert few[arm]["test_accuracy"]["of_seeds"] == [wanted[f"{arm}_accuracy"]]
    assert plain["headline"] == pytest.approx(wanted)
    saved = plain["weights"]["model"]
    model = small_autoencoder()
    model.load_state_dict(plain["weights"]["autoencoder-x"])
    codes = data.outputs_of(model.encoder, pair.x.train)
    torch.testing.assert_close(saved["codes"], codes, rtol=1e-4, atol=1e-5)
    assert torch.equal(saved["code_classes"], pair.x.train.y)


def accuracy_of(weights: dict, images: data.Images) -> float:
    model = studies.Classifier(small_autoencoder().encoder, 10)
    model.load_state_dict(weights)
    with torch.no_grad():
        guess = model(images.x.float() / 255).argmax(1)
    return (guess == images.y).double().mean().item()


def test_each_number_of_the_headline_is_the_one_of_its_name():
    rows, counts = ("trained_on_x", "trained_on_y", "pca_of_x", "pca_of_y"), ("20", "50", "60")
    mse = {row: {name: {"mse": f"{row} {name}"} for name in ("x", "y")} for row in rows}
    study = {
        count: {arm: {"test_accuracy": {"mean": f"{arm} {count}"}} for arm in train_py.STARTS}
        for count in counts
    }
    judged = {
        kind: {level: {"judge_accuracy": f"{kind} {level}"} for level in ("0.5", "1")}
        for kind in ("local", "independent")
    }
    judged["test_images"] = {"judge_accuracy": "test"}
    metrics = {"reconstruction": mse, "classifier": study, "generation": judged}
    config = settings(label_counts="20,50,60", classifier_epochs="1,1,1")
    assert train_py.headline(metrics, config) == {
        "mse_x": "trained_on_x x", "pca_mse_x": "pca_of_x x",
        "mse_y": "trained_on_y y", "pca_mse_y": "pca_of_y y",
        "cross_mse_x_to_y": "trained_on_x y", "cross_mse_y_to_x": "trained_on_y x",
        "random_accuracy": "random 50", "plain_accuracy": "plain 50",
        "masked_accuracy": "masked 50", "judge_accuracy": "test",
        "new_image_accuracy": "local 1",
    }  # fmt: skip


def test_a_killed_run_ends_like_an_unbroken_one(pair, plain, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_py, "load", lambda **_: pair)
        patch.setattr(studies, "LEAST_IMAGES", 1)
        train_until("autoencoder", 1, *SMALL, "--out_dir", tmp_path)
        (folder,) = tmp_path.iterdir()
        for more in (2, 2, 4):  # in Y's autoencoder, the study, the added images
            train_until("autoencoder", more, "--resume", folder)
            assert not (folder / "metrics.json").exists()
        patch.setattr(train_py, "plot_results", lambda *_: None)
        call(train_py, "--resume", folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["headline"] == plain["headline"]
    assert all(metrics["metrics"][name] == plain[name] for name in metrics["metrics"])


class Recorder:
    """Stands for train_classifier: notes what it is given, trains nothing."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, model, labelled, val, config, run, **options):
        self.calls.append((copy.deepcopy(model.state_dict()), labelled, val, options))
        accuracy = len(self.calls) / 100
        return [{"train_loss": 1.0, "val_loss": 2.0, "val_accuracy": accuracy}] * options["count"]


def settings(**changes: object):
    module = load_project("autoencoder").run
    kinds = module.get_type_hints(train_py.Config, include_extras=True)
    flags = dict(zip([name[2:] for name in TINY[::2]], TINY[1::2], strict=True))
    return module.read_config(train_py.Config, kinds, None, flags | changes)


def some_models(pair: data.Pair, config) -> dict[str, Autoencoder]:
    models = {name: train_py.new_autoencoder(pair.x, config) for name in ("x", "masked", "y")}
    for number, model in enumerate(models.values(), 1):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(number)
    return models


def test_arms_differ_in_nothing_but_the_encoder_and_the_rate(pair, tmp_path, monkeypatch):
    config = settings(
        random_lr="0.1", plain_lr="0.2", masked_lr="0.3", label_counts="20,50", seeds="0,1"
    )
    models, recorder = some_models(pair, config), Recorder()
    tests = iter(range(100))
    monkeypatch.setattr(studies, "train_classifier", recorder)
    monkeypatch.setattr(
        studies, "evaluate_classifier", lambda _, x: {"accuracy": float(next(tests)), "of": x}
    )
    numbers = studies.compare_starts(pair.x, models, config, tmp_path)
    assert len(recorder.calls) == 2 * 2 * 3  # numbers of labels, seeds, arms
    arms = [recorder.calls[first : first + 3] for first in range(0, 12, 3)]
    for place, arm in enumerate(arms):
        count, seed, passes = [(20, 0, 2), (20, 1, 2), (50, 0, 1), (50, 1, 1)][place]
        wanted = data.choose_labelled(pair.x.train, count, seed)
        for start, (weights, labelled, val, options) in zip(train_py.STARTS, arm, strict=True):
            assert torch.equal(labelled.x, wanted.x) and torch.equal(labelled.y, wanted.y)
            assert val is pair.x.val
            assert options["lr"] == {"random": 0.1, "plain": 0.2, "masked": 0.3}[start]
            assert (options["count"], options["seed"]) == (passes, seed)
            assert options["order"] == arm[0][3]["order"]
            assert torch.equal(weights["head.weight"], arm[0][0]["head.weight"])
            source = {"plain": "x", "masked": "masked"}.get(start)
            own = {n[8:]: w for n, w in weights.items() if n.startswith("encoder.")}
            if source:
                kept = models[source].encoder.state_dict()
                assert all(torch.equal(own[name], kept[name]) for name in kept)
            assert torch.equal(own["mean"], models["x"].encoder.mean)
    heads = [arm[0][0]["head.weight"] for arm in arms[:2]]
    assert not torch.equal(*heads)  # another seed, another head
    assert len({options["name"] for *_, options in recorder.calls}) == 12
    assert numbers["20"]["plain"]["test_accuracy"]["of_seeds"] == [1.0, 4.0]
    assert numbers["50"]["masked"]["test_accuracy"]["of_seeds"] == [8.0, 11.0]
    assert numbers["20"]["masked"]["val_accuracy"]["mean"] == pytest.approx([0.045, 0.045])
    assert numbers["20"]["masked"]["test_accuracy"]["sd"] == pytest.approx(3 / math.sqrt(2))


def test_added_images_are_as_many_steps_and_the_gain_has_its_sign(pair, tmp_path, monkeypatch):
    config = settings(added_labels="10", added_copies="3", seeds="0,1", added_noise="0")
    recorder, tests = Recorder(), iter([0.2, 0.5, 0.3, 0.8])
    monkeypatch.setattr(studies, "train_classifier", recorder)
    monkeypatch.setattr(studies, "evaluate_classifier", lambda *_: {"accuracy": next(tests)})
    autoencoder = some_models(pair, config)["x"]
    numbers = studies.add_generated(pair.x, autoencoder, config, tmp_path)["10"]
    assert numbers["without"]["of_seeds"] == [0.2, 0.3] and numbers["with"]["of_seeds"] == [
        0.5,
        0.8,
    ]
    assert numbers["gain"]["mean"] == pytest.approx(0.4)
    assert numbers["gain"]["standard_error"] == pytest.approx(0.1)
    for (one, less, _, options), (other, more, _, others) in zip(
        recorder.calls[::2], recorder.calls[1::2], strict=True
    ):
        assert len(less.x) == len(more.x) == 40 and torch.equal(less.y, more.y)
        assert {image.numpy().tobytes() for image in less.x} == {
            image.numpy().tobytes() for image in more.x[:10]
        }
        decoded = autoencoder(more.x[:10].float() / 255).clamp(0, 1).mul(255).round().byte()
        assert torch.equal(more.x[10:20], decoded) and torch.equal(more.x[10:20], more.x[30:])
        assert options["order"] == others["order"] and options["seed"] == others["seed"]
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_new_images_at_no_noise_are_reconstructions_and_judged_with_their_classes(pair, plain):
    for kind in ("local", "independent"):
        level = plain["generation"][kind]["0"]
        assert level["mse_to_clean"] == pytest.approx(
            plain["headline"]["mse_x"], rel=0.02
        )  # 8 bits
    far, _ = nearest_image(pair.x.test.x, pair.x.train.x)
    test = plain["generation"]["test_images"]
    assert test["to_nearest"] == pytest.approx(far.median().item())
    assert test["judge_accuracy"] == plain["headline"]["judge_accuracy"]
    assert test["mse_to_clean"] == 0
    noisy = plain["generation"]["independent"]["1"]["mse_to_clean"]
    assert noisy > plain["generation"]["independent"]["0"]["mse_to_clean"]


def test_noise_comes_from_training_codes_and_has_their_deviation(pair, monkeypatch):
    config, seen = settings(noise_levels="0.5"), []
    monkeypatch.setattr(studies, "decode_bytes", lambda model, codes: seen.append(codes) or
                        torch.zeros(len(codes), 3, 32, 32, dtype=torch.uint8))  # fmt: skip
    model = small_autoencoder()
    known = []
    monkeypatch.setattr(studies, "CodeNeighbours", lambda *a: known.append(a) or CodeNeighbours(*a))
    test = data.Images(pair.x.test.x.repeat(40, 1, 1, 1), pair.x.test.y.repeat(40))
    studies.generate(pair.x._replace(test=test), model, None, config)
    ((known_codes, labels),) = known
    assert torch.equal(known_codes, data.outputs_of(model.encoder, pair.x.train))
    assert torch.equal(labels, pair.x.train.y)
    codes = data.outputs_of(model.encoder, test)
    sd = data.outputs_of(model.encoder, pair.x.train).std(0)
    torch.testing.assert_close(
        (seen[1] - codes).std(0) / sd, torch.full((8,), 0.5), rtol=0.1, atol=0
    )
    torch.testing.assert_close((seen[3] - codes).std(0) / sd, torch.ones(8), rtol=0.1, atol=0)


def test_probes_compare_the_encoders_that_they_are_named_after(pair, monkeypatch):
    config = settings(label_counts="20,60", seeds="0,1")
    models, seen = some_models(pair, config), []
    pca = fit_pca(pair.x.train.x.float() / 255, 8)
    untrained = train_py.new_autoencoder(pair.x, config)
    methods = {"pca_of_x": {"x": pca}, "untrained": {"x": untrained}}
    monkeypatch.setattr(
        studies, "probe", lambda train, test: seen.append((train, test)) or {"linear": 0.5}
    )
    numbers = studies.probe_all(pair.x, train_py.encoders(models, methods), config)
    names = ["pixels", "pca", "untrained", "plain", "masked", "of_y"]
    assert list(numbers) == names and len(seen) == 6 * 3  # two seeds of 20 labels, once all
    x = pair.x.test.x.float() / 255
    wanted = [
        x.mean(1).flatten(1),
        pca.encode(x),
        untrained.encoder(x),
    ]
    wanted += [models[name].encoder(x) for name in ("x", "masked", "y")]
    for place, codes in enumerate(wanted):
        train, test = seen[3 * place]
        torch.testing.assert_close(test.x, codes.detach(), rtol=1e-4, atol=1e-4)
        assert torch.equal(test.y, pair.x.test.y) and len(train.x) == 20
        assert len(seen[3 * place + 2][0].x) == 60
    apart = data.Images(
        torch.eye(3).repeat_interleave(20, 0), torch.arange(3).repeat_interleave(20)
    )
    monkeypatch.undo()
    assert studies.probe(apart, apart) == {"linear": 1.0, "neighbours": 1.0}
    turned = apart._replace(y=(apart.y + 1) % 3)
    assert studies.probe(apart, turned) == {"linear": 0.0, "neighbours": 0.0}
    tiny = apart._replace(x=1e-4 * apart.x)  # as a code may be; it is standardised
    assert studies.probe(tiny, tiny)["linear"] == 1.0


def test_the_judge_learns_from_images_alone_by_its_own_settings(pair, tmp_path, monkeypatch):
    config, recorder = settings(judge_lr="0.5", judge_epochs="3", judge_shift="2"), Recorder()
    monkeypatch.setattr(studies, "train_classifier", recorder)
    studies.train_judge(pair.x, config, tmp_path)
    ((_, labelled, val, options),) = recorder.calls
    assert labelled is pair.x.train and val is pair.x.val
    wanted = {"lr": 0.5, "count": 3, "shift": 2, "seed": 0}
    assert {name: options[name] for name in wanted} == wanted


def test_added_copies_vary_by_the_noise_of_the_settings(pair):
    config, levels = settings(added_noise="0.3", added_copies="2"), []
    known = SimpleNamespace(vary=lambda codes, y, level: levels.append(level) or codes + level)
    model, few = small_autoencoder(), data.Images(*(part[:4] for part in pair.x.train))
    copies = studies.vary_copies(few, model, known, config, 0)
    made = model.decode(model.encoder(few.x.float() / 255) + 0.3).clamp(0, 1)
    assert levels == [0.3, 0.3] and torch.equal(copies.y, few.y.repeat(3))
    assert torch.equal(copies.x[4:], (255 * made).round().byte().repeat(2, 1, 1, 1))


# --- training, step by step -------------------------------------------------------------------


def adam_by_hand(weights, gradients, lr, decay):
    """Weights after Adam's steps with rates `lr`, in float64."""
    w, m, v = weights.double(), 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, lr, strict=True), 1):
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - rate * decay)
        w = w - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return w


def muon_by_hand(weights, gradients, lr):
    w, b = weights.double().flatten(1), 0.0
    for gradient, rate in zip(gradients, lr, strict=True):
        g = gradient.double().flatten(1)
        b = 0.95 * b + g
        o = orthogonalise(g + 0.95 * b)
        w = w - rate * math.sqrt(max(1, o.shape[0] / o.shape[1])) * o
    return w.view(weights.shape)


def gradients_along(model, pairs, loss_of, step):
    """Gradients at the weights before each step, which `step` takes."""
    seen = []
    for x, target in pairs:
        model.zero_grad()
        loss_of(model(x), target).backward()
        seen.append({name: w.grad.clone() for name, w in model.named_parameters()})
        step(len(seen), seen)
    return seen


@pytest.mark.parametrize("kind", ["autoencoder", "masked", "classifier"])
def test_two_steps_are_those_taken_by_hand(pair, kind, tmp_path, monkeypatch):
    config = settings(batch_size="30", classifier_batch_size="30", bias_lr="0.01", warm_up="0.25")
    monkeypatch.setattr(studies, "LEAST_IMAGES", 1)
    rates = [1.0, 2 / 3]  # one_cycle of two steps, a quarter of them rising
    if kind == "classifier":
        model = studies.new_classifier(pair.x, {"x": small_autoencoder()}, "random", config, 0)
        loss_of, options = F.cross_entropy, {"name": "c", "order": "o", "count": 1, "lr": 0.05}
    else:
        model, loss_of = train_py.new_autoencoder(pair.x, config), F.mse_loss
    by_hand, inputs, targets = copy.deepcopy(model), [], []
    model.register_forward_pre_hook(lambda m, given: inputs.extend(given if m.training else ()))
    part = studies if kind == "classifier" else train_py

    def spy(*args, **options):
        for x, y in data.shuffled_batches(*args, **options):
            targets.append(y if kind == "classifier" else x)
            yield x, y

    monkeypatch.setattr(part, "shuffled_batches", spy)
    run = tmp_path / "run"
    run.mkdir()
    if kind == "classifier":
        studies.train_classifier(model, pair.x.train, pair.x.val, config, run, seed=0, **options)
        trained = model
    else:
        monkeypatch.setattr(train_py, "new_autoencoder", lambda *_: model)
        hidden = 0.5 if kind == "masked" else 0.0
        trained = train_py.train_autoencoder(pair.x, "x", 1, hidden, config, run)
    drawn = list(zip(inputs, targets, strict=True))
    assert [len(x) for x, _ in drawn] == [30, 30]
    check_examples(drawn, pair, kind)
    start = {name: w.detach().clone() for name, w in by_hand.named_parameters()}

    def step(done, seen):
        with torch.no_grad():
            for name, w in by_hand.named_parameters():
                own = [gradients[name] for gradients in seen]
                if kind == "classifier":
                    w.copy_(adam_by_hand(start[name], own, [0.05 * r for r in rates[:done]], 0.01))
                elif w.ndim > 1:
                    w.copy_(muon_by_hand(start[name], own, [0.02 * r for r in rates[:done]]))
                else:
                    w.copy_(adam_by_hand(start[name], own, [0.01 * r for r in rates[:done]], 0.0))

    gradients_along(by_hand, drawn, loss_of, step)
    for (name, w), other in zip(by_hand.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(w, other, rtol=2e-3, atol=2e-4, msg=name)
        assert not torch.equal(start[name], other)


def check_examples(drawn: list, pair: data.Pair, kind: str) -> None:
    """All training images once, whole as targets, hidden only where they should be."""
    x, target = (torch.cat(part) for part in zip(*drawn, strict=True))
    images = target if kind != "classifier" else x
    known = {image.numpy().tobytes() for image in data.scaled(pair.x.train.x).contiguous()}
    assert {image.contiguous().numpy().tobytes() for image in images} == known
    if kind == "classifier":
        assert not torch.equal(x, data.scaled(pair.x.train.x))
    else:
        assert torch.equal(x, target) is (kind == "autoencoder")


def test_the_order_changes_with_the_epoch_and_is_shared_by_arms(pair, tmp_path, monkeypatch):
    config, orders = settings(classifier_batch_size="30"), []
    monkeypatch.setattr(studies, "LEAST_IMAGES", 120)

    def order_of(_, labelled, shift, *rest):
        orders.append(torch.cat([x for x, _ in data.shuffled_batches(labelled, 30, shift=shift)]))
        return 0.0

    monkeypatch.setattr(studies, "classify_one_epoch", order_of)
    for name in ("one", "other"):
        model = studies.new_classifier(pair.x, {"x": small_autoencoder()}, "random", config, 0)
        options = {"name": name, "order": "same", "count": 2, "lr": 0.1, "seed": 0}
        studies.train_classifier(model, pair.x.train, pair.x.val, config, tmp_path, **options)
    assert len(orders[0]) == 120 and len(orders) == 4  # 60 images come twice
    assert torch.equal(orders[0], orders[2]) and torch.equal(orders[1], orders[3])
    assert not torch.equal(orders[0], orders[1])


def test_y_is_mirrored_and_moved_and_digits_are_not(pair, monkeypatch):
    config = settings(shift="3")
    asked = []
    keep = train_py.shuffled_batches
    monkeypatch.setattr(
        train_py, "shuffled_batches", lambda *a, **k: asked.append(k) or keep(*a, **k)
    )
    model = train_py.new_autoencoder(pair.x, config)
    for images in (pair.x, pair.y):
        train_py.train_one_epoch(model, images, 0.0, {}, "x", config)
    assert asked == [{"mirror": False, "shift": 0}, {"mirror": True, "shift": 3}]
    asked.clear()
    monkeypatch.setattr(studies, "shuffled_batches", train_py.shuffled_batches)
    model = studies.new_classifier(pair.x, {"x": model}, "random", config, 0)
    optimizers = {"adam": torch.optim.AdamW(model.parameters(), 0.1)}
    studies.classify_one_epoch(model, pair.x.train, 2, optimizers, "judge", config)
    assert asked == [{"shift": 2}]


def test_the_mean_loss_counts_images_and_evaluation_is_over_all_of_them(pair, monkeypatch):
    config = settings()
    model = torch.nn.Linear(1, 1, bias=False)
    parts = [(torch.full((n, 1), float(n)), None) for n in (30, 10)]
    monkeypatch.setattr(train_py, "shuffled_batches", lambda *_, **__: parts)
    with torch.no_grad():
        model.weight.zero_()
    forty = pair.x._replace(train=data.Images(torch.zeros(40, 1), torch.zeros(40)))
    loss = train_py.train_one_epoch(model, forty, 0.0, {}, "x", config)
    assert loss == pytest.approx((30 * 900 + 10 * 100) / 40)
    model = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]]))  # cross-entropy of class 0 is x
    parts = [(x, torch.zeros(len(x)).long()) for x, _ in parts]
    monkeypatch.setattr(studies, "shuffled_batches", lambda *_, **__: parts)
    loss = studies.classify_one_epoch(model, forty.train, 0, {}, "x", config)
    assert loss == pytest.approx((30 * 30 + 10 * 10) / 40, rel=1e-3)
    monkeypatch.setattr(project.data, "CHUNK", 7)
    images = data.Images(torch.arange(40)[:, None].float(), torch.arange(40) % 2)
    logits = torch.stack((torch.zeros(40), torch.linspace(-1, 1, 40)), 1)
    numbers = studies.evaluate_classifier(lambda x: logits[x[:, 0].long()], images)
    assert numbers["loss"] == pytest.approx(float(F.cross_entropy(logits, images.y)))
    assert numbers["accuracy"] == 0.5


def test_data_are_asked_for_by_the_seed(tmp_path):
    flags = [*TINY, "--seed", 7, "--out_dir", tmp_path]
    assert data_asked_for(load_project("autoencoder"), *flags)["seed"] == 7


# --- report, settings, prediction -------------------------------------------------------------


def test_plots_are_given_the_numbers_of_metrics_json(pair, tmp_path):
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_py, "load", lambda **_: pair)
        patch.setattr(studies, "LEAST_IMAGES", 1)
        patch.setattr(train_py, "try_plot", lambda plot, *args: given.update({plot.__name__: args}))
        output = call(train_py, *SMALL, "--out_dir", tmp_path)
    report = json.loads((Path(output.splitlines()[-1]) / "metrics.json").read_text())["metrics"]
    for plot, place, key in (
        ("plot_curves", 2, "reconstruction"),
        ("plot_cross", 0, "reconstruction"),
        ("plot_classifier", 0, "classifier"),
        ("plot_probes", 0, "probes"),
        ("plot_noise", 2, "generation"),
        ("plot_new", 2, "generation"),
    ):
        assert json.loads(json.dumps(given[plot][place])) == report[key], plot
    history, pca = given["plot_curves"][:2]
    val = pair.x.val.x.flatten(1) / 255
    exact = PCA(8, svd_solver="full").fit(pair.x.train.x.flatten(1).numpy() / 255)
    back = exact.inverse_transform(exact.transform(val.numpy())).clip(0, 1)
    assert pca["x"] == pytest.approx(((back - val.numpy()) ** 2).mean(), rel=2e-3)
    assert [len(history[name]) for name in ("x", "y")] == [2, 1]
    new, copies = given["plot_new"][:2]
    far = (new[:, None] - pair.x.train.x.float()[None] / 255).square().flatten(2).mean(2)
    assert torch.equal(copies, pair.x.train.x[far.argmin(1)].float() / 255)
    shown = given["plot_reconstructions"][0]["y"]
    assert set(shown) == {"original", "trained_on_x", "trained_on_y", "pca_of_y"}
    error = image_errors(shown["trained_on_y"], shown["original"])
    assert error[:4].max() <= error[4:8].min() and error[4:8].max() <= error[8:].min()


def test_only_the_method_with_the_least_legal_data(tmp_path, capsys):
    folder = write_folder(tmp_path / "mine")
    flags = ["--dataset", "folder", "--data_dir", folder, "--compare", "false", "--out_dir"]
    *_, use, last = call(train_py, *TINY, *flags, tmp_path / "my runs").splitlines()
    run = Path(last)
    assert shlex.split(use)[4] == last  # a command to copy
    report = json.loads((run / "metrics.json").read_text())
    assert report["dataset"] == "mine" and set(report["headline"]) == {"mse_x", "pca_mse_x"}
    assert set(report["metrics"]) == {"reconstruction", "generation", "parameters"}
    stages = {line.split(",")[0] for line in (run / "history.csv").read_text().splitlines()[1:]}
    assert stages == {"autoencoder-x"}
    assert {path.name for path in run.glob("*.png")} == {
        "curves.png", "reconstructions.png", "noise.png", "new.png", "interpolation.png"
    }  # fmt: skip
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(
        train_py.DataError, match=r"label_counts: expected at most 48, .* found 100"
    ):
        call(train_py, *TINY, *flags[:4], "--out_dir", tmp_path / "my runs")
    with pytest.raises(train_py.DataError, match=r"code_size: expected at most 48, .*, found 49"):
        call(train_py, *TINY, *flags, tmp_path / "my runs", "--code_size", "49")
    assert len(list((tmp_path / "my runs").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--widths", "4,4,4,4,4,4"], "widths: expected at most 5, found 6"),
        (["--label_counts", "20,10"], "label_counts: expected rising numbers"),
        (["--label_counts", "20"], "classifier_epochs: expected as many as label_counts"),
        (["--noise_levels", "1.5"], "--noise_levels: expected at most 1, found 1.5"),
        (["--hidden_share", "1"], "--hidden_share: expected less than 1"),
        (["--code_size", "4000"], "--code_size: expected at most 3072"),
    ],
)
def test_a_mistake_in_the_settings_is_named(flags, complaint, capsys, tmp_path):
    with pytest.raises(SystemExit):
        call(train_py, *TINY, *flags, "--out_dir", tmp_path)
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run(pair, monkeypatch):
    parts = [(torch.full((2, 1), value), torch.zeros(2).long()) for value in (1.0, math.nan, 1.0)]
    model, config = torch.nn.Linear(1, 1), settings()
    for part in (train_py, studies):
        monkeypatch.setattr(part, "shuffled_batches", lambda *_, **__: iter(parts))
    text = "here: the loss is not finite at step 2"
    with pytest.raises(FloatingPointError, match=text):
        train_py.train_one_epoch(model, pair.x, 0.0, {}, "here", config)
    with pytest.raises(FloatingPointError, match=text):
        studies.classify_one_epoch(model, pair.x.train, 0, {}, "here", config)


def test_predictions_are_those_of_the_run(tmp_path):
    run, *_ = tiny_run("autoencoder")
    predict = load_project("autoencoder").predict
    test = load_project("autoencoder").data.load_digits(100, 0).test
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    for number, image in enumerate(test.x[:3]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(pictures / f"{number}.png")
    Image.fromarray(np.zeros((9, 70, 4), np.uint8)).save(pictures / "more" / "0.png")
    Image.fromarray(np.zeros((50, 41), np.uint8)).save(pictures / "grey.png")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    output = call(predict, run, pictures, "--out_dir", tmp_path / "out")
    folder = Path(output.splitlines()[-1])
    rows = [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()]
    assert rows[0] == ["file", "mse", "pca_mse"]
    assert [row[0] for row in rows[1:]] == ["0.png", "1.png", "2.png", "grey.png", "more/0.png"]
    saved = torch.load(run / "model.pt", weights_only=True)
    model, pca = predict.load_autoencoder(saved, torch.device("cpu"))
    few = test._replace(x=test.x[:3], y=test.y[:3])
    for column, method in ((1, model), (2, pca)):
        wanted = train_py.errors_of(method, few).tolist()
        assert [float(row[column]) for row in rows[1:4]] == pytest.approx(wanted, rel=1e-4)
    codes = data.outputs_of(model.encoder, few).numpy()
    assert np.load(folder / "codes.npy")[:3] == pytest.approx(codes, abs=1e-5)
    assert "pictures: 5, left out: 1;" in output and (folder / "reconstructions.png").is_file()
    best = torch.load(run / "autoencoder-x.pt", weights_only=True)
    assert all(torch.equal(best[name], saved["weights"][name]) for name in best)


def test_new_pictures_are_made_of_each_class_in_turn(tmp_path):
    run, *_ = tiny_run("autoencoder")
    predict = load_project("autoencoder").predict
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(image)
    flags = ["--generate", "12", "--interpolate", image, image, "--out_dir", tmp_path / "out"]
    folder = Path(call(predict, run, *flags).splitlines()[-1])
    names = sorted(path.name for path in (folder / "new").iterdir())
    assert names[:2] == ["00000-0.png", "00001-1.png"] and names[-1] == "00011-1.png"
    assert (folder / "new.png").is_file() and (folder / "interpolation.png").is_file()
    assert not (folder / "predictions.csv").exists()
    with pytest.raises(predict.DataError, match="no such file"):
        call(predict, run, tmp_path / "nowhere")


def test_the_network_can_be_exported():
    model, x = small_autoencoder(), torch.rand(2, 3, 32, 32)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
