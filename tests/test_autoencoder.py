"""autoencoder: Muon, one kind of MSE, PCA of training images, safe encoders, a killed run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from autoencoder import data
from autoencoder.model import (
    Autoencoder,
    Classifier,
    Muon,
    Pca,
    catch_up,
    compare_starts,
    image_errors,
    one_cycle,
    orthogonalise,
    psnr,
)

TRAIN = Path(__file__).parent.parent / "autoencoder" / "train.py"
TINY = [
    "--dataset", "digits_photographs", "--device", "cpu", "--bundled_images", "100",
    "--widths", "4,8", "--code_size", "8", "--epochs_x", "2", "--epochs_y", "1",
    "--batch_size", "32", "--fractions", "0.2,1", "--classifier_epochs", "2,1",
    "--seeds", "0,1", "--noise_levels", "0,1", "--added_copies", "1", "--added_epochs", "1",
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
    ours = Pca(x, 12)(x).flatten(1).numpy()
    exact = PCA(12, svd_solver="full").fit(x.flatten(1).numpy())
    flat = x.flatten(1).numpy()
    best = ((exact.inverse_transform(exact.transform(flat)) - flat) ** 2).mean()
    assert ((ours - flat) ** 2).mean() == pytest.approx(best, rel=1e-3)
    low = torch.from_numpy(rng.random((60, 4)) @ rng.random((4, 3072))).view(60, 3, 32, 32)
    torch.testing.assert_close(Pca(low, 6)(low), low)


# --- classifier -------------------------------------------------------------------------------


def test_features_of_the_labelled_images_are_standardised():
    model = small_autoencoder()
    with torch.no_grad():
        model.encoder.code.weight.mul_(1000)
    classifier = Classifier(model.encoder, 10)
    x = torch.rand(50, 3, 32, 32)
    assert classifier.features(x).abs().max() > 10
    classifier.standardise(model.encoder(x).detach())
    features = classifier.features(x)
    assert features.mean(0).abs().max() < 1e-3
    assert (features.std(0, correction=0) - 1).abs().max() < 1e-3


def rows_of(*accuracies: float) -> list[dict]:
    common = {"seconds": 2.0, "train_loss": 1.0, "val_loss": 1.0}
    return [common | {"epoch": n, "val_accuracy": a} for n, a in enumerate(accuracies, 1)]


def test_catching_up_and_first_epoch_gains_are_paired_by_seed():
    rows = {
        "random": [rows_of(0.2, 0.4, 0.6), rows_of(0.3, 0.4, 0.5)],
        "fine_tuned": [rows_of(0.4, 0.9, 0.9), rows_of(0.7, 0.9, 0.9)],
    }
    assert catch_up(rows, "epoch") == {"fine_tuned": [2, None]}
    assert catch_up(rows, "seconds") == {"fine_tuned": [4.0, None]}
    gain = compare_starts(rows)["fine_tuned"]["first_epoch_gain"]
    assert gain["mean"] == pytest.approx(0.3)
    assert gain["standard_error"] == pytest.approx(0.1)


# --- data -------------------------------------------------------------------------------------


def test_no_test_pixel_of_the_bundled_pair_is_trained_on(monkeypatch):
    inks, strips = [], []
    draw, cut = data.draw_digits, data.cut_crops
    monkeypatch.setattr(
        data, "draw_digits", lambda source, _, g: inks.append(source.x) or draw(source, 40, g)
    )
    monkeypatch.setattr(
        data, "cut_crops", lambda photos, _, g: strips.append(photos) or cut(photos, 40, g)
    )
    pair = data.load_bundled(40, 0)
    digits = [{image.numpy().tobytes() for image in part} for part in inks]
    columns = [{column.numpy().tobytes() for column in part.unbind(3)} for part in strips]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not digits[one] & digits[other] and not columns[one] & columns[other]
    assert sum(map(len, columns)) == 640 and len(digits[0]) > 1000
    assert (pair.x.mirror, pair.y.mirror) == (False, True)


def test_drawn_digits_have_more_than_the_rank_of_their_64_pixels():
    x = data.load_bundled(200, 0).x.train.x
    assert x.dtype == torch.uint8 and x.shape == (200, 3, 32, 32)
    assert torch.linalg.matrix_rank(x[:, 0].flatten(1).double()) > 180


def test_every_image_comes_once_and_only_what_may_be_is_mirrored():
    ramp = torch.arange(32, dtype=torch.uint8).expand(64, 3, 32, 32).contiguous()
    images = data.Images(ramp, torch.arange(64))
    torch.manual_seed(0)
    for mirror in (False, True):
        drawn = list(data.shuffled(images, 10, mirror))
        x = torch.cat([part for part, _ in drawn])
        assert sorted(torch.cat([y for _, y in drawn]).tolist()) == list(range(64))
        assert x[:, 0, 0, 31].gt(0).all().item() is not mirror
    assert x.max() == pytest.approx(31 / 255)


def test_a_larger_fraction_holds_the_labels_of_a_smaller_one():
    images = data.Images(torch.zeros(100, 1), torch.arange(100))
    few, more = (data.choose(images, fraction, 3).y.tolist() for fraction in (0.1, 0.5))
    assert len(few) == 10 and set(few) < set(more)
    assert data.choose(images, 0.1, 4).y.tolist() != few


def test_without_a_network_the_bundled_pair_stands_in_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "reachable", lambda url: False)
    options = {"data_dir": tmp_path, "folder_dir": tmp_path, "bundled_images": 20, "seed": 0}
    pair = data.load(dataset="auto", **options)
    assert (pair.x.name, pair.y.name) == ("digits", "photographs") and "stand in" in pair.note
    with pytest.raises(data.DataError, match=r"MNIST is not in .* does not answer"):
        data.load(dataset="mnist_cifar100", **options)


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
    images, note = data.load_folder(folder, 0)
    assert "1 unreadable files left out" in note and "3.png" in note
    assert len(images.train.x) + len(images.val.x) == 49
    (folder / "test" / "dog").rename(folder / "test" / "bird")
    with pytest.raises(data.DataError, match="class 'bird' is not in both"):
        data.load_folder(folder, 0)


# --- whole runs -------------------------------------------------------------------------------


def start(*flags: str, cwd: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(TRAIN), *flags], cwd=cwd, text=True, **pipes)


def finish(process: subprocess.Popen, cwd: Path) -> tuple[Path, dict]:
    """Folder and metrics.json of a run that has to succeed, but for its timing."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    folder = cwd / output.splitlines()[-1]
    report = json.loads((folder / "metrics.json").read_text())
    del report["metrics"]["timing"]
    return folder, report["metrics"] | {"headline": report["headline"]}


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
        time.sleep(0.002)
    raise AssertionError(f"ended before {stage}: {process.stderr.read()}")


def load_autoencoder(folder: Path, name: str) -> Autoencoder:
    model = small_autoencoder()
    model.load_state_dict(torch.load(folder / f"autoencoder-{name}.pt", weights_only=True))
    return model


def test_killed_and_resumed_is_unbroken_and_the_numbers_are_those_of_the_weights(tmp_path):
    unbroken = start(*TINY, "--out_dir", "unbroken", cwd=tmp_path)
    process = start(*TINY, "--out_dir", "killed", cwd=tmp_path)
    for stage in ("autoencoder-x", "fine_tuned-0.2-seed0"):
        folder = kill_in(stage, process, tmp_path / "killed")
        assert not (folder / "metrics.json").exists()
        process = start("--resume", str(folder), cwd=tmp_path)
    _, metrics = finish(process, tmp_path)
    folder, expected = finish(unbroken, tmp_path)
    assert metrics == expected

    # after all classifiers, autoencoder-*.pt are still the autoencoders behind the matrix
    pair = data.load_bundled(100, 0)
    for name, images in (("x", pair.x), ("y", pair.y)):
        model, test = load_autoencoder(folder, name), data.as_float(images.test.x)
        train = data.as_float(images.train.x)
        pca = PCA(8, svd_solver="full").fit(train.flatten(1).numpy())
        flat = test.flatten(1).numpy()
        own = {
            f"trained_on_{name}": model(test).detach().flatten(1).numpy(),
            f"pca_of_{name}": pca.inverse_transform(pca.transform(flat)),
        }
        for row, output in own.items():
            error = ((output.clip(0, 1) - flat) ** 2).mean(dtype=np.float64)
            assert metrics["reconstruction"][row][name]["mse"] == pytest.approx(error, rel=1e-3)
        with torch.no_grad():
            val = data.as_float(images.val.x)
            error = ((model(val).clamp(0, 1) - val) ** 2).mean().item()
        table = (folder / "history.csv").read_text().splitlines()
        losses = [
            float(line.split(",")[4]) for line in table if line.startswith(f"autoencoder-{name}")
        ]
        assert min(losses) == pytest.approx(error, rel=1e-4)
    clean = metrics["generation"]["by_noise_level"]["0"]["mse_to_clean"]
    assert clean == pytest.approx(metrics["headline"]["mse_x"], rel=1e-2)  # 8 bits


def test_bad_data_ends_a_run_in_one_line(tmp_path):
    flags = ["--dataset", "mnist_folder", "--folder_dir", "nowhere", "--out_dir", "out"]
    process = start(*flags, cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.startswith("error: ") and "nowhere" in errors and errors.count("\n") == 1


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    process = start(*TINY, "--lr", "1e30", "--out_dir", "out", cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.startswith("error: autoencoder-x epoch 1: the loss is not finite at step")
