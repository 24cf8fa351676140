"""unet_transfer: what ports get wrong, bad data, and a run that is killed in each of its stages."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from projects import train, train_until
from sklearn.metrics import f1_score, jaccard_score

from unet_transfer import data
from unet_transfer.model import (
    LossSums,
    UNet,
    confusion_matrix,
    loss_sums,
    segmentation_loss,
    segmentation_metrics,
)

TRAIN = Path(__file__).parent.parent / "unet_transfer" / "train.py"
TINY = [
    "--dataset", "digits", "--device", "cpu", "--widths", "4,8", "--mask_count", "8",
    "--image_size", "32,32", "--pretrain_size", "16,16", "--crop_count", "60",
    "--pretrain_batch_size", "16", "--pretrain_epochs", "2", "--batch_size", "16",
    "--epoch_steps", "2", "--stage1_epochs", "2", "--stage2_epochs", "2",
]  # fmt: skip
SIZES = data.Sizes(image=(32, 32), crop=(16, 16))


def small_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(widths=(4, 8, 16), segments=3)


def train_a_step(model: UNet) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x, y = torch.rand(2, 3, 16, 16), torch.randint(3, (2, 16, 16))
    segmentation_loss(loss_sums(model(x), y, 255)).backward()
    optimizer.step()


# --- the network ------------------------------------------------------------------------------


def test_a_frozen_down_part_keeps_every_parameter_and_buffer():
    model = small_unet()
    model.freeze_down(True)
    before = copy.deepcopy(model.state_dict())
    train_a_step(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "down" in name)
    assert not torch.equal(after["up.head.weight"], before["up.head.weight"])
    assert model.up.training and not model.down.training


def test_an_unfrozen_down_part_learns_again():
    model = small_unet()
    model.freeze_down(True)
    model.freeze_down(False)
    before = copy.deepcopy(model.state_dict())
    train_a_step(model)
    moved = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert {"down.blocks.0.0.weight", "down.blocks.0.1.running_mean"} <= set(moved)


@pytest.mark.parametrize("size", [(37, 51), (1, 1), (2, 7), (64, 48)])
def test_odd_sizes_come_out_as_they_went_in(size):
    model = small_unet().eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, 3, *size)


# --- loss and metrics -------------------------------------------------------------------------


def brute_force_loss(logits: np.ndarray, target: np.ndarray, ignore: int) -> float:
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cross_entropy, pixels, dice = 0.0, 0, []
    for n, h, w in np.ndindex(target.shape):
        if target[n, h, w] != ignore:
            cross_entropy -= np.log(probs[n, target[n, h, w], h, w])
            pixels += 1
    for c in set(target[target != ignore].tolist()):
        valid, truth, p = target != ignore, target == c, probs[:, c]
        dice.append(2 * p[truth & valid].sum() / (p[valid].sum() + truth.sum()))
    return cross_entropy / pixels + 1 - np.mean(dice)


def random_case(classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, classes, 5, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(classes - 1, (3, 5, 7), generator=generator)  # the last never occurs
    target[torch.rand(3, 5, 7, generator=generator) < 0.2] = 255
    return logits, target


def test_the_loss_is_its_formula():
    logits, target = random_case()
    loss = segmentation_loss(loss_sums(logits, target, 255))
    assert float(loss) == pytest.approx(brute_force_loss(logits.numpy(), target.numpy(), 255))


def test_the_loss_has_the_right_gradient():
    logits, target = random_case()
    logits = logits[:1, :, :2, :3].clone().requires_grad_()
    target = target[:1, :2, :3]
    torch.autograd.gradcheck(lambda z: segmentation_loss(loss_sums(z, target, 255)), logits)


def test_sums_of_batches_give_the_loss_of_the_whole():
    logits, target = random_case()
    parts = [loss_sums(logits[i : i + 1], target[i : i + 1], 255) for i in range(3)]
    added = LossSums(*(sum(field) for field in zip(*parts, strict=True)))
    whole = segmentation_loss(loss_sums(logits, target, 255))
    assert float(segmentation_loss(added)) == pytest.approx(float(whole))
    batch_means = torch.stack([segmentation_loss(part) for part in parts]).mean()
    assert float(batch_means) != pytest.approx(float(whole), rel=1e-3)


def test_ignored_pixels_count_in_neither_loss_nor_metric():
    logits, target = random_case()
    logits.requires_grad_()
    loss = segmentation_loss(loss_sums(logits, target, 255))
    loss.backward()
    ignored = target == 255
    assert logits.grad.permute(0, 2, 3, 1)[ignored].eq(0).all()
    assert logits.grad.permute(0, 2, 3, 1)[~ignored].ne(0).any()
    assert confusion_matrix(logits.argmax(1), target, 4, 255).sum() == (~ignored).sum()
    nothing = loss_sums(logits, torch.full_like(target, 255), 255)
    assert segmentation_loss(nothing).item() == 0


def test_metrics_are_scikit_learns_over_all_pixels():
    logits, target = random_case()
    predicted = logits.argmax(1)
    predicted[predicted == 3] = 0  # class 3 occurs nowhere
    parts = [confusion_matrix(predicted[i], target[i], 4, 255) for i in range(3)]
    metrics = segmentation_metrics(sum(parts))
    valid = target != 255
    truth, guess = target[valid].numpy(), predicted[valid].numpy()
    iou = jaccard_score(truth, guess, average=None)
    assert metrics["iou_per_class"][:3] == pytest.approx(iou.tolist())
    assert metrics["iou_per_class"][3] is None
    assert metrics["miou"] == pytest.approx(iou.mean())
    assert metrics["dice"] == pytest.approx(f1_score(truth, guess, average="macro"))
    assert metrics["pixel_accuracy"] == pytest.approx((truth == guess).mean())
    batch_means = np.mean([segmentation_metrics(part)["miou"] for part in parts])
    assert metrics["miou"] != pytest.approx(batch_means, rel=1e-3)


# --- scenes of digits -------------------------------------------------------------------------


def digits(**changes: int) -> data.Task:
    options = {"digit_classes": 5, "crop_count": 60, "mask_count": 8, "seed": 0} | changes
    return data.load_digits(SIZES, **options)


def test_no_pixel_of_a_test_scene_occurs_in_a_training_scene(monkeypatch):
    sources = []
    compose = data.compose

    def spy(source_digits, classes, photos, count, size, **options):
        sources.append((source_digits, photos))
        return compose(source_digits, classes, photos, 2, size, **options)

    monkeypatch.setattr(data, "compose", spy)
    digits()
    inks = [{image.numpy().tobytes() for image in ink} for ink, _ in sources]
    columns = [{col.numpy().tobytes() for col in photo.unbind(3)} for _, photo in sources]
    train, val, test = range(0, 2), range(2, 4), range(4, 6)  # pretraining, segmentation
    for one, other in ((train, val), (train, test), (val, test)):
        for a in one:
            for b in other:
                assert not inks[a] & inks[b]
                assert not columns[a] & columns[b]
    assert sum(len(columns[i]) for i in (0, 2, 4)) == 640


def test_scenes_hang_on_the_seed_and_test_scenes_not_on_the_number_of_masks():
    one, again, more, other = digits(), digits(), digits(mask_count=9), digits(seed=1)
    assert torch.equal(one.segmentation.train.x, again.segmentation.train.x)
    assert torch.equal(one.segmentation.test.x, more.segmentation.test.x)
    assert not torch.equal(one.segmentation.test.x, other.segmentation.test.x)


def test_scenes_hold_one_to_three_digits_and_crops_the_digit_they_are_named_after():
    task = digits(mask_count=60)
    x, masks = task.segmentation.train
    assert (x.dtype, masks.dtype, x.shape) == (torch.uint8, torch.uint8, (60, 3, 32, 32))
    assert set(masks.unique().tolist()) == set(range(6))
    assert {len(mask.unique()) for mask in masks} <= {1, 2, 3, 4}  # background and up to three
    assert set(task.classification.train.y.unique().tolist()) == set(range(5))


def test_ink_lies_where_the_mask_says():
    ink, centre, side = torch.ones(1, 1, 8, 8), torch.tensor([[20.0, 40.0]]), torch.tensor([16.0])
    where = data.place(ink, centre, side, torch.zeros(1), (64, 64))
    rows, columns = where[0].gt(0.5).nonzero().T
    assert (rows.float().mean() + 0.5, columns.float().mean() + 0.5) == (20.0, 40.0)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 27, 32, 47)


# --- batches ----------------------------------------------------------------------------------


def test_a_mask_moves_with_its_image():
    torch.manual_seed(0)
    y = torch.rand(64, 1, 4, 4).gt(0.5).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    x, target = data.augment(y.expand(-1, 3, -1, -1), y[:, 0].long(), mirror=True)
    assert torch.equal(x[:, 0].gt(0.5).long(), target)
    assert not torch.equal(target, y[:, 0].long())


def test_digits_are_never_mirrored():
    torch.manual_seed(0)
    ramp = torch.linspace(0.3, 0.7, 16).expand(64, 3, 16, 16)
    plain, _ = data.augment(ramp, torch.zeros(64).long(), mirror=False)
    turned, _ = data.augment(ramp, torch.zeros(64).long(), mirror=True)
    assert (plain[..., -1] >= plain[..., 0]).all()
    assert (turned[..., -1] < turned[..., 0]).any()
    assert not digits().mirror


def test_every_example_occurs_before_any_comes_again():
    examples = data.Examples(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10))
    drawn = [y for _, y in data.training_batches(examples, 4, 5, mirror=False)]
    assert [len(y) for y in drawn] == [4] * 5
    assert sorted(torch.cat(drawn)[:10].tolist()) == list(range(10))


# --- photographs ------------------------------------------------------------------------------


def write_folder(folder: Path, count: int = 20) -> Path:
    """`count` photographs of 24 x 18 pixels with masks of three classes and two image classes."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    lines = ["file,class"]
    for number in range(count):
        name = f"{number:02}"
        image = rng.integers(0, 255, (18, 24, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
        mask = rng.choice([0, 1, 2, 9], (18, 24)).astype(np.uint8)
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
        lines.append(f"{name}.png,{'cat' if number % 2 else 'dog'}")
    (folder / "classes.csv").write_text("\n".join(lines) + "\n")
    (folder / "segments.txt").write_text("ground\nleft\nright\n")
    return folder


def load_folder(folder: Path) -> data.Task:
    return data.load_folder(folder, SIZES, seed=0, ignore_index=9)


def test_masks_are_resized_to_the_nearest_pixel(tmp_path):
    folder = write_folder(tmp_path / "mine")
    task = load_folder(folder)
    masks = torch.cat([part.y for part in task.segmentation])
    assert set(masks.unique().tolist()) == {0, 1, 2, data.IGNORE}  # nothing in between
    original = torch.from_numpy(np.array(Image.open(folder / "masks" / "00.png")))
    rows = ((torch.arange(32) + 0.5) * 18 / 32).long()
    columns = ((torch.arange(32) + 0.5) * 24 / 32).long()
    expected = original[rows][:, columns]
    expected[expected == 9] = data.IGNORE
    assert any(torch.equal(mask, expected) for mask in masks)


def test_the_second_start_reads_what_the_first_decoded(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "mine")
    first = load_folder(folder)
    monkeypatch.setattr(data, "decode_items", None)
    second = load_folder(folder)
    assert torch.equal(first.segmentation.test.x, second.segmentation.test.x)
    assert torch.equal(first.classification.train.y, second.classification.train.y)


def test_pretraining_never_sees_a_segmentation_test_image(tmp_path):
    folder = write_folder(tmp_path / "mine")
    whole = data.Sizes(image=(18, 24), crop=(18, 24))
    task = data.load_folder(folder, whole, seed=0, ignore_index=9)
    seen = [{image.numpy().tobytes() for image in part.x} for part in task.classification[:2]]
    tested = {image.numpy().tobytes() for image in task.segmentation.test.x}
    assert len(tested) == 4 and not tested & (seen[0] | seen[1])


def write_pets(data_dir: Path) -> None:
    root = data_dir / "oxford-iiit-pet"
    (root / "images").mkdir(parents=True)
    (root / "annotations" / "trimaps").mkdir(parents=True)
    names = [f"{breed}_{number}" for breed in ("Big_Cat", "dog") for number in range(10)]
    for place, name in enumerate(names):
        Image.new("RGB", (20, 30), (10 * place, 0, 0)).save(root / "images" / f"{name}.jpg")
        trimap = np.tile(np.array([1, 2, 3, 3], dtype=np.uint8).repeat(5), (30, 1))
        Image.fromarray(trimap).save(root / "annotations" / "trimaps" / f"{name}.png")
    for part, chosen in (("trainval", names[::2]), ("test", names[1::2])):
        lines = [f"{name} {1 + name.startswith('dog')} 1 1" for name in chosen]
        (root / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")


def test_pets_are_read_as_published(tmp_path):
    write_pets(tmp_path)
    task = data.load_pets(tmp_path, SIZES, seed=0)
    assert (task.classes, task.segments) == (("Big_Cat", "dog"), ("background", "pet"))
    assert [len(part.x) for part in task.segmentation] == [8, 2, 10]
    columns = task.segmentation.test.y[0, 0].tolist()
    assert columns == [1] * 8 + [0] * 8 + [data.IGNORE] * 16  # the border counts nowhere


def spoil_mask(folder: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(folder / "masks" / "03.png")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / "classes.csv").unlink(), "classes.csv: there is no such file"),
        (lambda f: (f / "classes.csv").write_text("a,b\n"), "classes.csv: expected the columns"),
        (lambda f: (f / "classes.csv").write_text("file,class\nx.png,a\n"), "images/x.png is not"),
        (lambda f: (f / "segments.txt").unlink(), "segments.txt: there is no such file"),
        (lambda f: (f / "segments.txt").write_text("a\nb\n"), "index 2 stands in the mask"),
        (lambda f: spoil_mask(f, np.zeros((5, 5), np.uint8)), "03.png: expected class indices"),
        (lambda f: spoil_mask(f, np.zeros((18, 24, 3), np.uint8)), "03.png: expected class"),
        (lambda f: (f / "images").rename(f / "pictures"), "images: there are no images"),
        (
            lambda f: [p.unlink() for p in (f / "masks").iterdir()],
            "no image of the split 'train' has a mask",
        ),
    ],
)
def test_bad_data_is_named(tmp_path, spoil, complaint):
    folder = write_folder(tmp_path / "mine")
    spoil(folder)
    with pytest.raises(data.DataError, match=complaint):
        load_folder(folder)


def test_a_truncated_image_is_left_out_and_counted(tmp_path):
    folder = write_folder(tmp_path / "mine")
    whole = (folder / "images" / "05.png").read_bytes()
    (folder / "images" / "05.png").write_bytes(whole[: len(whole) // 2])
    task = load_folder(folder)
    assert f"1 unreadable files left out, the first: {folder}/images/05.png" in task.note
    assert sum(len(part.x) for part in task.segmentation) == 19


# --- whole runs -------------------------------------------------------------------------------


def start(*flags: str, cwd: Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(TRAIN), *flags], cwd=cwd, text=True, **pipes)


def metrics_of(folder: Path) -> dict:
    """What metrics.json says, but for its speed."""
    report = json.loads((folder / "metrics.json").read_text())
    del report["metrics"]["train_images_per_second"]
    return report["metrics"] | report["headline"]


def test_a_run_killed_in_every_stage_ends_like_an_unbroken_one(tmp_path):
    flags = [*TINY, "--study", "true", "--mask_counts", "4", "--seeds", "0,1", "--out_dir"]
    unbroken = train("unet_transfer", *flags, tmp_path / "unbroken")
    train_until("unet_transfer", 1, *flags, tmp_path / "killed")
    (folder,) = (tmp_path / "killed").iterdir()
    for epochs in (2, 3, 4, 13):  # in stage 1, stage 2, scratch, the study
        train_until("unet_transfer", epochs, "--resume", folder)
        assert not (folder / "metrics.json").exists()
    assert train("unet_transfer", "--resume", folder) == folder
    assert metrics_of(folder) == metrics_of(unbroken)
    rows = [(path / "history.csv").read_text().splitlines() for path in (folder, unbroken)]
    assert len(rows[0]) == len(rows[1])


def test_bad_data_ends_a_run_in_one_line(tmp_path):
    flags = ["--dataset", "folder", "--data_dir", "nowhere", "--out_dir", "out"]
    process = start(*flags, cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors == "error: nowhere/images: there are no images\n"


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(tmp_path):
    process = start(*TINY, "--out_dir", "out", cwd=tmp_path)
    while not list(tmp_path.glob("out/*/history.csv")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(2)
    _, errors = process.communicate(timeout=300)
    (folder,) = (tmp_path / "out").iterdir()
    assert process.returncode == 130
    assert errors.strip() == f"interrupted; to go on: python {TRAIN} --resume out/{folder.name}"


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    flags = ["--pretrain_lr", "90", "--weight_decay", "10", "--pretrain_epochs", "60"]
    with pytest.raises(FloatingPointError, match=r"pretrain-seed0 epoch \d+: .* at step \d+"):
        train("unet_transfer", *TINY, *flags, "--out_dir", tmp_path)


def test_one_step_of_the_loss_on_one_pixel_is_plain_cross_entropy_plus_dice():
    logits = torch.tensor([[[[2.0]], [[0.0]]]], dtype=torch.float64)
    target = torch.zeros(1, 1, 1, dtype=torch.long)
    p = float(logits.softmax(1)[0, 0])
    expected = float(F.cross_entropy(logits, target)) + 1 - 2 * p / (p + 1)
    assert float(segmentation_loss(loss_sums(logits, target, 255))) == pytest.approx(expected)
