"""unet_transfer: what ports get wrong, bad data, and a run that is killed in each of its stages."""

import copy
import csv
import json
import math
import os
import shlex
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from projects import call, data_asked_for, load_project, tiny_run, train, train_until
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


def test_one_step_of_the_loss_on_one_pixel_is_plain_cross_entropy_plus_dice():
    logits = torch.tensor([[[[2.0]], [[0.0]]]], dtype=torch.float64)
    target = torch.zeros(1, 1, 1, dtype=torch.long)
    p = float(logits.softmax(1)[0, 0])
    expected = float(F.cross_entropy(logits, target)) + 1 - 2 * p / (p + 1)
    assert float(segmentation_loss(loss_sums(logits, target, 255))) == pytest.approx(expected)


# --- scenes of digits -------------------------------------------------------------------------


def digits(**changes: int) -> data.Task:
    options = {"digit_classes": 5, "crop_count": 60, "mask_count": 8, "seed": 0} | changes
    return data.load_digits(SIZES, **options)


def test_no_pixel_of_a_test_scene_occurs_in_a_training_scene(monkeypatch):
    sources, seeds = [], []
    compose = data.compose

    def spy(source_digits, classes, photos, count, size, **options):
        sources.append((source_digits, photos))
        seeds.append(options["generator"].initial_seed())
        return compose(source_digits, classes, photos, 2, size, **options)

    monkeypatch.setattr(data, "compose", spy)
    digits(seed=1)
    assert seeds == [3, 3, 4, 4, 5, 5]
    inks = [{image.numpy().tobytes() for image in ink} for ink, _ in sources]
    columns = [{col.numpy().tobytes() for col in photo.unbind(3)} for _, photo in sources]
    train, val, test = range(0, 2), range(2, 4), range(4, 6)  # pretraining, segmentation
    for one, other in ((train, val), (train, test), (val, test)):
        for a in one:
            for b in other:
                assert not inks[a] & inks[b]
                assert not columns[a] & columns[b]
    assert sum(len(columns[i]) for i in (0, 2, 4)) == 640


def test_scenes_depend_on_the_seed_and_test_scenes_not_on_the_number_of_masks():
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
    assert torch.cat(drawn)[:10].tolist() != torch.cat(drawn)[10:].tolist() != list(range(10))
    assert sorted(torch.cat(drawn)[:10].tolist()) == list(range(10))


def test_training_batches_are_augmented_and_in_the_unit_interval():
    x = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    examples = data.Examples(x, torch.arange(6))
    drawn, y = next(data.training_batches(examples, 6, 1, mirror=False))
    plain, same = next(data.batches(examples, 6))
    assert drawn.min() >= 0 and 0.9 < drawn.max() <= 1 and torch.equal(plain, x.float() / 255)
    assert all(
        not torch.equal(image, plain[number]) for image, number in zip(drawn, y, strict=True)
    )
    assert torch.equal(same, examples.y)


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
    others = [data.load_pets(tmp_path, SIZES, seed=seed).segmentation for seed in (1, 2, 3)]
    vals = [splits.val.x.flatten().tolist() for splits in (task.segmentation, *others)]
    assert any(val != vals[0] for val in vals[1:])  # cut out by the seed
    assert all(torch.equal(splits.test.x, task.segmentation.test.x) for splits in others)


def blank_masks(folder: Path, value: int = 0) -> None:
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.full((18, 24), value, np.uint8)).save(path)


def add_line(folder: Path, line: str) -> None:
    with (folder / "classes.csv").open("a") as file:
        file.write(f"{line}\n")


def as_jpeg(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        path.rename(path.with_suffix(".jpg"))


def spoil_mask(folder: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(folder / "masks" / "03.png")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / "classes.csv").write_text("file,class\n" + "x" * 200_000), "not a csv"),
        (lambda f: (f / "classes.csv").write_bytes(b"file,class\n\xe9,a\n"), "text in UTF-8"),
        (lambda f: (f / "segments.txt").write_text("a\nb\nc\nd\n"), "'d' .index 3. is in no train"),
        (lambda f: (f / "classes.csv").unlink(), "classes.csv: there is no such file"),
        (lambda f: (f / "classes.csv").write_text("a,b\n"), "classes.csv: expected the columns"),
        (
            lambda f: (f / "classes.csv").write_text("file,class\n03.png,a\n"),
            "classes.csv: expected at least 2 classes to learn from, found 1",
        ),
        (lambda f: (f / "classes.csv").write_text("file,class\nx.png,a\n"), "images/x.png is not"),
        (lambda f: add_line(f, "03.png,dog"), "images/03.png has two classes: cat, dog"),
        (lambda f: as_jpeg(f), "masks/00.jpg: expected masks in PNG"),
        (lambda f: (f / "segments.txt").unlink(), "segments.txt: there is no such file"),
        (lambda f: (f / "segments.txt").write_text("a\nb\n"), "index 2 occurs in the mask"),
        (lambda f: blank_masks(f), "the segment 'left' .index 1. is in no training mask"),
        (lambda f: spoil_mask(f, np.zeros((5, 5), np.uint8)), "03.png: expected class indices"),
        (lambda f: spoil_mask(f, np.zeros((18, 24, 3), np.uint8)), "03.png: expected class"),
        (lambda f: (f / "images").rename(f / "pictures"), "images: there are no images"),
        (
            lambda f: [p.unlink() for p in (f / "masks").iterdir()],
            "no image of the split 'train' has a mask",
        ),
    ],
)
def test_bad_data_is_named(tmp_path, short_fields, spoil, complaint):
    folder = write_folder(tmp_path / "mine")
    spoil(folder)
    with pytest.raises(data.DataError, match=complaint):
        load_folder(folder)


def test_a_truncated_image_is_left_out_and_counted(tmp_path):
    folder = write_folder(tmp_path / "mine")
    whole = (folder / "images" / "05.png").read_bytes()
    (folder / "images" / "05.png").write_bytes(whole[: len(whole) // 2])
    task = load_folder(folder)
    assert f"unreadable files left out: 1, the first: {folder}/images/05.png" in task.note
    assert sum(len(part.x) for part in task.segmentation) == 19


def test_masks_of_0_and_255_are_background_and_object(tmp_path):
    folder = write_folder(tmp_path / "mine")
    mask = np.zeros((18, 24), np.uint8)
    mask[:9] = 255
    for path in (folder / "masks").iterdir():
        Image.fromarray(mask).save(path)
    for names in (None, "ground\nthing\n"):
        (folder / "segments.txt").unlink(missing_ok=True)
        if names:
            (folder / "segments.txt").write_text(names)
        task = data.load_folder(folder, SIZES, seed=0, ignore_index=255)
        assert task.segments == (tuple(names.split()) if names else ("background", "object"))
        for part in task.segmentation:
            assert part.y[:, :16].eq(1).all() and part.y[:, 16:].eq(0).all()
    blank_masks(folder, 255)  # no background at all: 255 is then what does not count
    with pytest.raises(data.DataError, match=r"'ground' .index 0. is in no training mask"):
        data.load_folder(folder, SIZES, seed=0, ignore_index=255)


def test_masks_of_one_bit_and_a_lost_segment(tmp_path):
    folder = write_folder(tmp_path / "mine")
    (folder / "segments.txt").write_text("ground\nthing\n")
    mask = np.arange(18)[:, None].repeat(24, 1) < 9
    for path in (folder / "masks").iterdir():
        Image.fromarray(mask).save(path)
    task = load_folder(folder)
    assert task.segmentation.test.y[:, :16].eq(1).all() and "no test mask" not in task.note
    for path in sorted((folder / "masks").iterdir())[5:]:
        Image.fromarray(mask.astype(np.uint8) * 2).save(path)
    (folder / "segments.txt").write_text("ground\nthing\nother\n")
    assert "in no validation or no test mask: thing" in load_folder(folder).note


def test_names_are_matched_as_people_write_them(tmp_path):
    """.PNG, images/Train in capitals, a BOM, blanks in the csv, NFD names, a class left empty."""
    folder = write_folder(tmp_path / "mine")
    lines = []
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        split = ("Train", "VAL", "test")[number % 3]
        name = unicodedata.normalize("NFD" if number == 0 else "NFC", f"é{number:02}")
        for kind, suffix in (("images", ".png"), ("masks", ".PNG")):
            (folder / kind / split).mkdir(exist_ok=True)
            (folder / kind / path.name).rename(folder / kind / split / f"{name}{suffix}")
        label = ("cat", " dog ", "")[number % 7 % 3]
        lines.append(f" {split}/{unicodedata.normalize('NFC', name)}.png ,{label}")
    text = "\ufefffile, class\n" + "\n".join(lines) + "\n\n"
    (folder / "classes.csv").write_text(text, encoding="utf-8")
    task = load_folder(folder)
    assert [len(part.x) for part in task.segmentation] == [7, 7, 6]
    assert task.classes == ("cat", "dog")
    assert sum(len(part.x) for part in task.classification) == 20 - 6


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_any_name_and_separator_of_the_csv_is_read(tmp_path, separator):
    folder = write_folder(tmp_path / "mine")
    for number, name in enumerate(["new\nline", 'q"u', "a,b;c", "100% $x$"]):
        for kind in ("images", "masks"):
            (folder / kind / f"{number:02}.png").rename(folder / kind / f"{name}.png")
    names = sorted(path.name for path in (folder / "images").iterdir())
    with (folder / "classes.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["file ", " class"], *([name, "ab"[name > "1"]] for name in names)])
    task = load_folder(folder)
    assert sum(len(part.x) for part in task.classification) == 20 and task.classes == ("a", "b")


def test_masks_and_images_that_are_alone_are_counted(tmp_path):
    folder = write_folder(tmp_path / "mine")
    (folder / "masks" / "03.png").rename(folder / "masks" / "03_mask.png")
    (folder / "images" / "04.png").unlink()
    (folder / "images" / "04.png").symlink_to("nothing.png")
    note = load_folder(folder).note
    assert "masks without an image: 1, the first: " in note and "03_mask.png" in note
    assert "unreadable files left out: 1" in note


def test_few_masks_among_many_images_are_in_every_split(tmp_path):
    folder = write_folder(tmp_path / "mine")
    for path in sorted((folder / "masks").iterdir())[5:]:
        path.unlink()
    for seed in range(5):
        task = data.load_folder(folder, SIZES, seed=seed, ignore_index=9)
        assert [len(part.x) for part in task.segmentation] == [3, 1, 1]
        assert sum(len(part.x) for part in task.classification) == 20
    (folder / "masks" / "00.png").unlink()
    (folder / "masks" / "01.png").unlink()
    with pytest.raises(data.DataError, match="at least 5 images with a class and 5 with a mask"):
        load_folder(folder)


def test_16_bit_greys_are_as_8_bit_ones(tmp_path):
    folder, rng = write_folder(tmp_path / "mine"), np.random.default_rng(1)
    grey = rng.integers(0, 256, (18, 24)).astype(np.uint8)
    grey[0, :2] = 0, 255
    Image.fromarray(grey).save(folder / "images" / "00.png")
    eight = load_folder(folder)
    Image.fromarray((grey.astype(np.uint16) + 1) * 200).save(folder / "images" / "00.png")
    os.utime(folder / "images" / "00.png", (1, 1))
    sixteen = load_folder(folder)
    for one, other in zip(eight.segmentation, sixteen.segmentation, strict=True):
        assert torch.equal(one.x, other.x)


# --- the experiment: a small task, trained in a second ----------------------------------------

SMALL = [*TINY, "--pretrain_epochs", "1", "--stage1_epochs", "1", "--stage2_epochs", "1"]
train_py = load_project("unet_transfer").train


@pytest.fixture(scope="module")
def task() -> data.Task:
    """Digits as train.py gets them, of few images."""
    own = load_project("unet_transfer").data
    sizes = own.Sizes(image=(32, 32), crop=(16, 16))
    task = own.load_digits(sizes, 0, digit_classes=5, crop_count=32, mask_count=8)
    few = [
        own.Splits(*(own.Examples(part.x[:32], part.y[:32]) for part in parts))
        for parts in (task.classification, task.segmentation)
    ]
    return task._replace(classification=few[0], segmentation=few[1])


def experiment(task: data.Task, folder: Path, *flags: object) -> dict:
    """metrics.json, rows and weights of a run on `task`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_py, "load", lambda **_: task)
        patch.setattr(train_py, "plot_results", lambda *_: None)
        output = call(train_py, *SMALL, *flags, "--out_dir", folder)
    run = Path(output.splitlines()[-1])
    report = json.loads((run / "metrics.json").read_text())
    weights = {
        path.stem.split("-")[0]: torch.load(path, weights_only=True) for path in run.glob("*-*.pt")
    }
    rows = load_project("unet_transfer").run.load_checkpoint(run, "", {})
    model = torch.load(run / "model.pt", weights_only=True)
    return {"run": run, "weights": weights, "rows": rows, "model": model, **report}


@pytest.fixture(scope="module")
def plain(task, tmp_path_factory) -> dict:
    return experiment(task, tmp_path_factory.mktemp("plain"))


STAGES = ("pretrain", "stage1", "transfer", "scratch")


def parts_of(result: dict) -> dict[str, str]:
    """What may move or not, each as a text to compare."""
    metrics, parts = result["metrics"], {}
    for stage in STAGES:
        rows = [row for row in result["rows"] if row["stage"].startswith(f"{stage}-")]
        weights = result["weights"][stage]
        parts[f"{stage} weights"] = [(name, value.tolist()) for name, value in weights.items()]
        parts[f"{stage} train"] = [row["train_loss"] for row in rows]
        parts[f"{stage} val"] = [row["val_loss"] for row in rows]
        parts[f"{stage} test"] = metrics["classification" if stage == "pretrain" else stage]
    return {name: json.dumps(value) for name, value in parts.items()}


def all_of(*stages: str) -> set[str]:
    return {f"{stage} {part}" for stage in stages for part in ("weights", "train", "val", "test")}


SEGMENTED = ("stage1", "transfer", "scratch")
# Which part of the data is disturbed: what moves by it. Everything else stays to the last bit.
INFLUENCE = {
    "classification train x": all_of("pretrain", "stage1", "transfer"),
    "classification train y": all_of("pretrain", "stage1", "transfer"),
    "classification val x": {"pretrain val"},
    "classification val y": {"pretrain val"},
    "classification test x": {"pretrain test"},
    "classification test y": {"pretrain test"},
    "segmentation train x": all_of(*SEGMENTED),
    "segmentation train y": all_of(*SEGMENTED),
    "segmentation val x": {f"{stage} val" for stage in SEGMENTED},
    "segmentation val y": {f"{stage} val" for stage in SEGMENTED},
    "segmentation test x": {f"{stage} test" for stage in SEGMENTED},
    "segmentation test y": {f"{stage} test" for stage in SEGMENTED},
}


@pytest.mark.parametrize("part", INFLUENCE)
def test_each_part_of_the_data_moves_what_it_may_and_nothing_else(task, plain, part, tmp_path):
    kind, split, which = part.split()
    examples = getattr(getattr(task, kind), split)
    changed = getattr(examples, which).flip(0) if which == "y" else 255 - examples.x
    splits = getattr(task, kind)._replace(**{split: examples._replace(**{which: changed})})
    before = parts_of(plain)
    after = parts_of(experiment(task._replace(**{kind: splits}), tmp_path))
    moved = {name for name in before if before[name] != after[name]}
    chosen = {"scratch weights", "scratch test"} if "segmentation val" in part else set()
    assert INFLUENCE[part] <= moved <= INFLUENCE[part] | chosen  # another epoch may be the best


def test_weights_go_from_stage_to_stage_and_frozen_is_frozen(task, plain):
    pretrained, stage1, transfer = (plain["weights"][name] for name in STAGES[:3])
    down = [name for name in stage1 if name.startswith("down.")]
    assert all(torch.equal(stage1[name], pretrained[name]) for name in down)  # buffers, too
    config = settings()
    start = train_py.new_model(train_py.UNet, task, config, 0).state_dict()
    assert all(not torch.equal(stage1[name], start[name]) for name in ("up.head.weight",))
    assert all(torch.equal(transfer[name], plain["model"]["weights"][name]) for name in transfer)
    moved = [name for name in transfer if not torch.equal(transfer[name], stage1[name])]
    assert {name for name in transfer if "num_batches" not in name} == {
        name for name in moved if "num_batches" not in name
    }
    steps = {
        name: plain["weights"][name]["up.blocks.0.1.num_batches_tracked"] for name in SEGMENTED
    }
    per_epoch = 2
    assert (steps["stage1"], steps["transfer"]) == (per_epoch, 2 * per_epoch)
    assert plain["model"]["segments"] == list(task.segments)


def settings(**changes: object):
    module = load_project("unet_transfer").run
    kinds = module.get_type_hints(train_py.Config, include_extras=True)
    flags = dict(zip([name[2:] for name in TINY[::2]], TINY[1::2], strict=True))
    return module.read_config(train_py.Config, kinds, None, flags | changes)


def test_the_headline_is_computed_again_from_weights_and_data(task, plain):
    model = train_py.Classifier((4, 8), 5)
    model.load_state_dict(plain["weights"]["pretrain"])
    x, y = task.classification.test
    with torch.no_grad():
        logits = model.eval()(x.float() / 255)
    wanted = {"classification_accuracy": (logits.argmax(1) == y).double().mean().item()}
    loss = F.cross_entropy(logits.double(), y).item()
    assert plain["metrics"]["classification"]["test_loss"] == pytest.approx(loss, rel=1e-5)
    x, y = task.segmentation.test
    for stage in SEGMENTED:
        unet = train_py.UNet((4, 8), 6)
        unet.load_state_dict(plain["weights"][stage])
        with torch.no_grad():
            guess = unet.eval()(x.float() / 255).argmax(1)
            loss = dice_and_cross_entropy(unet(x.float() / 255).double(), y.long()).item()
        assert plain["metrics"][stage]["test_loss"] == pytest.approx(loss, rel=1e-5)
        seen = sorted(set(y.unique().tolist()) | set(guess.unique().tolist()))
        iou = jaccard_score(y.flatten(), guess.flatten(), average=None, labels=seen)
        wanted[f"{stage}_miou"] = float(np.mean(iou))
        own = plain["metrics"][stage]
        assert own["test_pixel_accuracy"] == pytest.approx((guess == y).double().mean().item())
        names = [task.segments[number] for number in seen]
        assert [own["test_iou_per_class"][name] for name in names] == pytest.approx(iou.tolist())
    assert plain["headline"] == pytest.approx(wanted)
    assert plain["metrics"]["masks"] == {"train": 8, "val": 32, "test": 32}


def test_each_number_of_the_headline_is_its_methods():
    metrics = {"classification": {"test_accuracy": 0.1}}
    metrics |= {name: {"test_miou": 0.2 + n} for n, name in enumerate(SEGMENTED)}
    assert train_py.headline(metrics) == {
        "classification_accuracy": 0.1,
        "stage1_miou": 0.2,
        "transfer_miou": 1.2,
        "scratch_miou": 2.2,
    }


def test_budgets_are_equal_compute(plain):
    compute, rows = plain["metrics"]["compute"], plain["rows"]
    trained = {s: [r for r in rows if r["stage"].startswith(f"{s}-")] for s in STAGES}
    assert [len(trained[stage]) for stage in STAGES[:3]] == [1, 1, 1]
    whole = sum(compute[stage] for stage in STAGES[:3])
    assert len(trained["scratch"]) == round(whole) == compute["scratch"]
    assert compute["transfer"] == 1 and compute["stage1"] < 1
    # 2 steps of 16 crops of 16 x 16 pixels against 2 steps of 16 scenes of 32 x 32, and no up part
    assert 0.05 < compute["pretrain"] < 0.25


def test_a_killed_run_ends_like_an_unbroken_one(task, tmp_path):
    flags = ["--study", "true", "--mask_counts", "4", "--seeds", "0,1", "--stage2_epochs", "2"]
    unbroken = experiment(task, tmp_path / "unbroken", *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_py, "load", lambda **_: task)
        patch.setattr(train_py, "plot_results", lambda *_: None)
        train_until("unet_transfer", 1, *SMALL, *flags, "--out_dir", tmp_path / "killed")
        (folder,) = (tmp_path / "killed").iterdir()
        for epochs in (1, 1, 3, 4):  # in stage 1, stage 2, scratch, the study
            train_until("unet_transfer", epochs, "--resume", folder)
            assert not (folder / "metrics.json").exists()
        assert train("unet_transfer", "--resume", folder) == folder
    report = json.loads((folder / "metrics.json").read_text())
    for metrics in (report["metrics"], unbroken["metrics"]):
        del metrics["train_images_per_second"]
    assert (report["metrics"], report["headline"]) == (unbroken["metrics"], unbroken["headline"])
    rows = [(run / "history.csv").read_text().splitlines() for run in (folder, unbroken["run"])]
    assert len(rows[0]) == len(rows[1])


@pytest.mark.parametrize("kind", ["pretrain", "stage1", "transfer"])
def test_four_steps_are_those_taken_by_hand(task, kind, tmp_path):
    """Of masks with a border that does not count."""
    masks = task.segmentation.train
    bordered = torch.where(torch.arange(32) < 5, data.IGNORE, masks.y)
    rates = {"weight_decay": "0.1", "lr": "0.02", "down_lr": "0.005", "pretrain_lr": "0.03"}
    config = settings(epoch_steps="4", pretrain_batch_size="8", batch_size="8", **rates)
    (tmp_path / "run").mkdir()
    if kind == "pretrain":
        model = train_py.new_model(train_py.Classifier, task, config, 0)
        stage = train_py.pretraining(task, model, config, 0)
        rates = {"": 0.03}
    else:
        model = train_py.new_model(train_py.UNet, task, config, 0)
        model.freeze_down(kind == "stage1")
        groups = {model.up: config.lr} | ({model.down: config.down_lr} if kind != "stage1" else {})
        masks = masks._replace(y=bordered.to(masks.y.dtype))
        stage = train_py.segmentation(task, masks, config, "x", kind, 1, groups)
        rates = {"up.": 0.02} | ({"down.": 0.005} if kind != "stage1" else {})
    assert stage.steps == 4
    drawn = list(stage.batches())
    stage = stage._replace(epochs=1, batches=lambda: iter(drawn))
    by_hand = copy.deepcopy(model)
    train_py.fit(model, stage, config, tmp_path / "run", 0)
    by_hand.train()
    state = {}
    for step, (x, y) in enumerate(drawn, 1):
        by_hand.zero_grad()
        logits = by_hand(x)
        if kind == "pretrain":
            loss = F.cross_entropy(logits, y)
        else:
            loss = dice_and_cross_entropy(logits, y)
        loss.backward()
        take_adamw_step(by_hand, state, step, rates, decay=0.1)
    for (name, w), other in zip(by_hand.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(w, other, rtol=2e-3, atol=2e-4, msg=name)


def dice_and_cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Over the pixels that count, in a row (P, C)."""
    logits, y = logits.movedim(1, 3).flatten(0, 2), y.flatten()
    logits, y = logits[y != data.IGNORE], y[y != data.IGNORE]
    probs, truth = logits.softmax(1), F.one_hot(y, logits.shape[1]).float()
    dice = 2 * (probs * truth).sum(0) / (probs.sum(0) + truth.sum(0))
    return F.cross_entropy(logits, y) + 1 - dice[truth.sum(0) > 0].mean()


def one_cycle(step: int, total: int) -> tuple[float, float]:
    """Part of the peak rate, and beta 1, before step 0, 1, ...: 30% of the steps rise, in cosines
    from a 25th of the peak; then they fall to a 10,000th of that, and momentum goes the other way.
    """
    top = 0.3 * total - 1
    if step <= top:
        share, ends, betas = step / top, (1 / 25, 1.0), (0.95, 0.85)
    else:
        share, ends, betas = (step - top) / (total - 1 - top), (1.0, 1 / 25e4), (0.85, 0.95)
    back = (1 + math.cos(math.pi * share)) / 2
    return tuple(last + (first - last) * back for first, last in (ends, betas))


def take_adamw_step(
    model: torch.nn.Module, state: dict, step: int, rates: dict, decay: float
) -> None:
    factor, beta = one_cycle(step - 1, 4)
    for name, w in model.named_parameters():
        for rate in [factor * peak for prefix, peak in rates.items() if name.startswith(prefix)]:
            g = w.grad.double()
            m, v = state.get(name, (0.0, 0.0))
            m, v = beta * m + (1 - beta) * g, 0.999 * v + 0.001 * g * g
            state[name] = m, v
            with torch.no_grad():
                w.mul_(1 - rate * decay)
                change = (m / (1 - beta**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                w.sub_((rate * change).float())


def test_the_best_epoch_is_kept_and_not_the_last(task, tmp_path, monkeypatch):
    config = settings(stage1_epochs="4")
    scores = iter([0.3, 0.9, 0.5, 0.1])
    model, seen = train_py.new_model(train_py.UNet, task, config, 0), []

    def evaluate(model, **_):
        seen.append(copy.deepcopy(model.state_dict()))
        return {"miou": next(scores), "loss": 1.0}

    monkeypatch.setattr(train_py, "evaluate_masks", evaluate)
    groups = {model: 0.01}
    stage = train_py.segmentation(task, task.segmentation.train, config, "x", "s", 4, groups)
    rows = train_py.fit(model, stage, config, tmp_path, 0)
    assert [row["val_miou"] for row in rows] == [0.3, 0.9, 0.5, 0.1]
    assert all(torch.equal(seen[1][name], value) for name, value in model.state_dict().items())
    assert not torch.equal(seen[1]["up.head.weight"], seen[3]["up.head.weight"])


@pytest.mark.parametrize("mirror", [True, False])
def test_stages_are_given_their_data_rates_and_validation(task, mirror, tmp_path, monkeypatch):
    config = settings(
        lr="0.1", down_lr="0.2", scratch_lr="0.3", pretrain_lr="0.4", mask_count="4",
        pretrain_epochs="3", stage1_epochs="4", stage2_epochs="5",
    )  # fmt: skip
    stages, models, groups, drawn = {}, {}, {}, []
    task, draw = task._replace(mirror=mirror), train_py.training_batches

    def watch(examples, batch_size, steps, *, mirror, part):
        drawn.append(mirror)
        return draw(examples, batch_size, steps, mirror=mirror, part=part)

    monkeypatch.setattr(train_py, "training_batches", watch)
    real = {"classes": train_py.evaluate_classes, "masks": train_py.evaluate_masks}

    def fit(model, stage, *_):
        name = stage.name.split("-")[0]
        frozen = not any(w.requires_grad for w in model.down.parameters())
        groups[name] = [
            (group["lr"], [w is own for own in model.down.parameters()].count(True) > 0)
            for group in stage.groups
            for w in list(group["params"])[:1]
        ]
        stages[name], models[name] = stage, (copy.deepcopy(model), frozen)
        return [{"train_seconds": 1.0}]

    monkeypatch.setattr(train_py, "fit", fit)
    monkeypatch.setattr(train_py, "step_flops", lambda *_: 1)
    compared = train_py.compare(task, config, tmp_path, mask_count=4, seed=3)
    assert list(stages) == list(STAGES)
    # with steps of one cost each: 3 epochs of 2 steps of pretraining, then 4 and 5 of 2
    assert [stage.epochs for stage in stages.values()] == [3, 4, 5, 12]
    assert groups == {  # rate, and whether it is the down part's
        "pretrain": [(0.4, True)],
        "stage1": [(0.1, False)],
        "transfer": [(0.1, False), (0.2, True)],
        "scratch": [(0.3, True)],
    }
    assert {name: frozen for name, (_, frozen) in models.items()} == {
        "pretrain": False, "stage1": True, "transfer": False, "scratch": False
    }  # fmt: skip
    evaluated = {name: stage.evaluate for name, stage in stages.items()}
    assert evaluated["pretrain"].func is real["classes"]
    assert evaluated["pretrain"].keywords["examples"] is task.classification.val
    for name in SEGMENTED:
        assert evaluated[name].func is real["masks"]
        assert evaluated[name].keywords["examples"] is task.segmentation.val
        assert (stages[name].score, stages["pretrain"].score) == ("miou", "accuracy")
    own = train_py.new_model(train_py.UNet, task, config, 3).state_dict()
    other = train_py.new_model(train_py.UNet, task, config, 4).state_dict()
    scratch, stage1 = models["scratch"][0].state_dict(), models["stage1"][0].state_dict()
    assert all(torch.equal(scratch[name], own[name]) for name in own)
    assert all(torch.equal(stage1[name], own[name]) for name in own if name.startswith("up."))
    assert not torch.equal(own["up.head.weight"], other["up.head.weight"])
    assert set(compared.models) == set(SEGMENTED)
    assert compared.metrics["masks"] == {"train": 4, "val": 32, "test": 32}
    for stage in stages.values():
        assert [len(y) for _, y in stage.batches()] == [16, 16]
    assert drawn == [mirror] * 4


def test_masks_of_a_larger_number_hold_those_of_a_smaller_one(task):
    few, more = (train_py.choose_masks(task.segmentation.train, count, 1) for count in (3, 6))
    assert len(few.x) == 3 and torch.equal(few.x, more.x[:3]) and torch.equal(few.y, more.y[:3])
    place = [int((task.segmentation.train.x == x).flatten(1).all(1).nonzero()) for x in few.x]
    assert torch.equal(task.segmentation.train.y[place], few.y)
    assert not torch.equal(train_py.choose_masks(task.segmentation.train, 3, 2).x, few.x)


def test_the_study_asks_for_each_number_of_masks_and_seed(task, tmp_path, monkeypatch):
    config, asked = settings(mask_counts="4,8", seeds="0,1", study="true"), []

    def compare(task, config, run, *, mask_count, seed):
        asked.append((mask_count, seed))
        score = {"stage1": 0.1, "transfer": 0.2, "scratch": 0.3}
        metrics = {name: {"test_miou": x + seed + 10 * mask_count} for name, x in score.items()}
        return train_py.Compared(metrics, {}, {})

    monkeypatch.setattr(train_py, "compare", compare)
    numbers = train_py.study(task, config, tmp_path)
    assert asked == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert set(numbers) == set(SEGMENTED)
    assert numbers["transfer"]["8"]["of_seeds"] == pytest.approx([80.2, 81.2])
    assert numbers["scratch"]["4"]["mean"] == pytest.approx(40.8)
    assert numbers["scratch"]["4"]["sd"] == pytest.approx(1 / math.sqrt(2))


def test_evaluation_is_over_all_images_in_evaluation_mode(task):
    x, y = task.segmentation.val
    model = train_py.UNet((4, 8), 6)
    model.train()
    whole = train_py.evaluate_masks(model, task.segmentation.val, 100)
    assert not model.training
    parts = train_py.evaluate_masks(model, task.segmentation.val, 5)
    assert parts.pop("iou_per_class") == pytest.approx(whole.pop("iou_per_class"))
    assert parts == pytest.approx(whole, rel=1e-5)
    with torch.no_grad():
        logits = model(x.float() / 255)
    loss = dice_and_cross_entropy(logits.double(), y.long()).item()
    assert whole["loss"] == pytest.approx(loss, rel=1e-5)
    few = data.Examples(
        torch.arange(10)[:, None, None, None].expand(-1, 3, 1, 1).byte(), torch.arange(10) % 2
    )
    classifier = torch.nn.Identity()
    classifier.forward = lambda x: torch.stack((torch.zeros(len(x)), x[:, 0, 0, 0] - 6.5 / 255), 1)
    numbers = train_py.evaluate_classes(classifier.train(), few, 4)
    assert not classifier.training
    assert numbers["accuracy"] == 0.6  # of 0 to 9: even below 6.5, odd above
    assert numbers["loss"] == pytest.approx(
        float(F.cross_entropy(classifier.forward(few.x.float() / 255).double(), few.y))
    )


def test_the_training_loss_is_a_mean_over_images():
    pairs = [(torch.ones(n, 1), torch.full((n,), float(n))) for n in (30, 10)]
    stage = train_py.Stage(
        "s", 1, 2, [], lambda: iter(pairs), lambda z, y: (z[:, 0] * 0 + y).mean(), None, ""
    )
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert train_py.train_one_epoch(model, stage, optimizer, schedule, "x") == 25
    stage = stage._replace(loss=lambda z, y: z.sum() * math.nan)
    with pytest.raises(FloatingPointError, match="x: the loss is not finite at step 1"):
        train_py.train_one_epoch(model, stage, optimizer, schedule, "x")


def test_data_are_asked_for_by_the_seed(tmp_path):
    flags = [*TINY, "--seed", 7, "--out_dir", tmp_path]
    assert data_asked_for(load_project("unet_transfer"), *flags)["seed"] == 7


# --- report, settings, prediction -------------------------------------------------------------


SUFFIX = dict.fromkeys(SEGMENTED, "8masks-seed0") | {"pretrain": "seed0"}


def test_plots_are_given_the_numbers_of_metrics_json(task, tmp_path):
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_py, "load", lambda **_: task)
        patch.setattr(train_py, "try_plot", lambda plot, *args: given.update({plot.__name__: args}))
        flags = ["--study", "true", "--mask_counts", "4", "--seeds", "0"]
        run = Path(call(train_py, *SMALL, *flags, "--out_dir", tmp_path).splitlines()[-1])
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    history, compute, title, _ = given["plot_curves"]
    assert list(history) == list(STAGES) and compute == metrics["compute"]
    assert f"{metrics['transfer']['test_miou']:.2f} pretrained" in title
    assert given["plot_label_efficiency"][0] == metrics["label_efficiency"]
    for stage, rows in history.items():
        assert rows == load_project("unet_transfer").run.read_rows(run, f"{stage}-{SUFFIX[stage]}")
    x, y, masks, segments, *_ = given["plot_examples"]
    assert list(masks) == ["scratch", "stage1", "transfer"] and segments == task.segments
    scores = [
        segmentation_metrics(confusion_matrix(guess, own, 6, 255))["miou"]
        for guess, own in zip(masks["transfer"], y, strict=True)
    ]
    assert len(scores) == 6 and scores == sorted(scores)
    places = [int((task.segmentation.test.x == 255 * own).flatten(1).all(1).sum()) for own in x]
    assert places == [1] * 6


class OneClass(torch.nn.Module):
    """Sees one class everywhere."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.up = number, torch.nn.Module()
        self.up.head = torch.nn.Conv2d(1, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        everywhere = torch.full_like(x[:, 0], self.number).long()
        return F.one_hot(everywhere, 6).movedim(3, 1).float()


def test_the_examples_are_each_methods_own(task, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(train_py, "try_plot", lambda plot, *args: given.update({plot: args}))
    models = {method: OneClass(number) for number, method in enumerate(SEGMENTED)}
    metrics = {method: {"test_miou": 0.5} for method in SEGMENTED} | {"compute": {}}
    compared = train_py.Compared(metrics, models, {})
    train_py.plot_results(metrics, compared, task, settings(), tmp_path)
    x, _, masks, *_ = given[train_py.plot_examples]
    assert {name: mask.unique().tolist() for name, mask in masks.items()} == {
        "stage1": [0], "transfer": [1], "scratch": [2]
    }  # fmt: skip
    assert all(mask.shape == x[:, 0].shape for mask in masks.values())


@pytest.mark.parametrize("segments", [2, 60])
def test_every_plot_survives_the_least_data(segments, tmp_path):
    plots = load_project("unet_transfer").plots
    names = tuple(f"${number}" if number == 1 else str(number) for number in range(segments))
    x, y = torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8).long()
    plots.plot_examples(x, y, {"transfer": y}, names, "one", tmp_path / "examples.png")
    row = {"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_miou": 0.5}
    history = {name: [row] for name in ("pretrain", "stage1", "transfer")}
    compute = dict.fromkeys(history, 1.0)
    plots.plot_curves(history, compute, "one", tmp_path / "curves.png")
    colors = plots.segment_colors(segments)
    assert len(colors) == len(set(colors)) == segments
    assert len(list(tmp_path.iterdir())) == 2


def test_only_the_method(tmp_path, capsys):
    folder = write_folder(tmp_path / "mine")
    flags = ["--dataset", "folder", "--data_dir", folder, "--compare", "false"]
    flags += ["--ignore_index", "9", "--pretrain_epochs", "1", "--out_dir", tmp_path / "my runs"]
    *_, use, last = call(train_py, *TINY, *flags).splitlines()
    run = Path(last)
    assert shlex.split(use)[4] == last  # a command to copy
    report = json.loads((run / "metrics.json").read_text())
    assert set(report["headline"]) == {"classification_accuracy", "stage1_miou", "transfer_miou"}
    stages = {line.split("-")[0] for line in (run / "history.csv").read_text().splitlines()[1:]}
    assert stages == {"pretrain", "stage1", "transfer"}
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(train_py.DataError, match=r"mask_count: expected at most 12, .* found 13"):
        call(train_py, *TINY, *flags, "--mask_count", "13")
    assert len(list((tmp_path / "my runs").iterdir())) == 1


def test_bad_data_leaves_no_run(tmp_path):
    flags = ["--dataset", "folder", "--data_dir", tmp_path / "nowhere"]
    with pytest.raises(train_py.DataError, match="nowhere/images: there are no images"):
        call(train_py, *TINY, *flags, "--out_dir", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_predictions_are_those_of_the_run(tmp_path):
    run, *_ = tiny_run("unet_transfer")
    modules = load_project("unet_transfer")
    test = digits().segmentation.test
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    for number in range(2):
        image = test.x[number].permute(1, 2, 0).numpy()
        Image.fromarray(image).save(pictures / f"{number}.png")
    Image.fromarray(np.zeros((9, 70, 4), np.uint8)).save(pictures / "more" / "0.png")
    Image.fromarray(np.zeros((51, 40), np.uint8)).save(pictures / "grey.png")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    output = call(modules.predict, run, pictures, "--out_dir", tmp_path / "out")
    folder = Path(output.splitlines()[-1])
    rows = [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()]
    assert rows[0] == ["file", "background", "0", "1", "2", "3", "4"]
    assert [row[0] for row in rows[1:]] == ["0.png", "1.png", "grey.png", "more/0.png"]
    saved = torch.load(run / "model.pt", weights_only=True)
    model = modules.predict.load_unet(saved, torch.device("cpu"))
    wanted = train_py.predict(model, test.x[:2].float() / 255)
    for number in range(2):
        mask = Image.open(folder / "masks" / f"{number}.png.png")
        assert mask.mode == "P"
        assert torch.equal(torch.from_numpy(np.array(mask)).long(), wanted[number])
        shares = torch.bincount(wanted[number].flatten(), minlength=6) / 1024
        assert [float(x) for x in rows[1 + number][1:]] == pytest.approx(shares.tolist(), abs=1e-6)
    colors = np.array(modules.plots.segment_colors(6)) * 255
    assert np.array(mask.convert("RGB"))[0, 0] == pytest.approx(colors[int(wanted[1][0, 0])], abs=1)
    assert Image.open(folder / "masks" / "more" / "0.png.png").size == (70, 9)
    assert Image.open(folder / "overlays" / "grey.png.png").size == (40, 51)
    assert "pictures: 4, left out: 1;" in output


def test_masks_are_enlarged_as_torch_does():
    predict = load_project("unet_transfer").predict
    logits = torch.randn(4, 7, 9, generator=torch.Generator().manual_seed(0))
    for size in ((300, 17), (7, 9), (5, 40)):
        wanted = F.interpolate(logits[None], size, mode="bilinear")[0].argmax(0)
        assert (predict.enlarge(logits, size) == wanted).float().mean() > 0.999


@pytest.mark.parametrize(("size", "tile"), [((70, 45), 16), ((16, 16), 16), ((9, 100), 16)])
def test_tiles_leave_no_seams(size, tile):
    """A network that looks at single pixels must give the same by tiles, wherever they end."""
    predict = load_project("unet_transfer").predict
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)
    model = torch.nn.Conv2d(3, 4, 1)
    high = min(tile, size[0]), min(tile, size[1])
    mask = predict.segment_tiles(model, Image.fromarray(pixels), high, (tile, tile))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    assert (torch.from_numpy(mask) == model(x).argmax(1)[0]).all()
    covered = sum(predict.fall(16) for _ in range(2))
    assert covered.min() > 0
    for length in (16, 17, 24, 100):
        begins = predict.starts(length, 16)
        assert (
            begins[0] == 0
            and begins[-1] == length - 16
            and max(np.diff([*begins, begins[-1]])) <= 8
        )


def test_the_network_can_be_exported():
    model, x = small_unet().eval(), torch.rand(2, 3, 16, 24)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
