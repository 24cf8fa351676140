"""faster_rcnn_litter: what ports get wrong, metrics by brute force, bad data, and broken runs."""

import copy
import csv
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from projects import call, config_of, load_project, tiny_run, train, train_until
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import FrozenBatchNorm2d, box_iou

from faster_rcnn_litter import data, scenes
from faster_rcnn_litter.model import (
    LOSSES,
    above,
    anchor_overlap,
    as_one_class,
    at_confidence,
    coco_metrics,
    count,
    cut_off,
    detect,
    false_positives_on,
    fit_anchors,
    freeze_batchnorm,
    frozen_eps,
    join_tiles,
    losses,
    make_detector,
    match,
    mistakes,
    mix_precision,
    outcome,
    outside,
    plain_state,
    restore_detector,
    tile_corners,
    working_confidence,
)

PROJECT = "faster_rcnn_litter"
TINY = [
    "--dataset", "scenes", "--device", "cpu", "--image_size", "96", "--scene_counts", "10,5,5",
    "--epochs", "2", "--batch_size", "5",
]  # fmt: skip


def small(classes: int = 2, amp: bool = False) -> nn.Module:
    torch.manual_seed(0)
    options = {"classes": classes, "sides": [16.0, 32.0, 64.0], "image_size": 96}
    return mix_precision(make_detector("small", **options), amp)


def target(boxes: list, labels: list | None = None) -> dict[str, Tensor]:
    return data.target(boxes, labels or [1] * len(boxes))


def prediction(boxes: list, scores: list, labels: list | None = None) -> dict[str, Tensor]:
    return target(boxes, labels) | {"scores": torch.tensor(scores, dtype=torch.float32)}


def some_pictures() -> tuple[list[Tensor], list[dict]]:
    torch.manual_seed(1)
    x = [torch.rand(3, 96, 96), torch.rand(3, 64, 80)]
    return x, [target([[10, 10, 40, 50], [50, 60, 80, 90]]), target([[5, 5, 30, 30]])]


# --- the network ------------------------------------------------------------------------------


def test_the_loss_has_four_parts_and_each_teaches_its_own_layer():
    model = small().train()
    parts = losses(model, *some_pictures())
    assert tuple(parts) == LOSSES and len(parts) == 4
    head, predictor = model.rpn.head.inner, model.roi_heads.box_predictor
    layers = [head.cls_logits, head.bbox_pred, predictor.cls_score, predictor.bbox_pred]
    for part, own in zip(parts.values(), layers, strict=True):
        model.zero_grad()
        part.backward(retain_graph=True)
        reached = [layer.weight.grad is not None and layer.weight.grad.any() for layer in layers]
        assert reached == [layer is own for layer in layers]


def test_a_batch_without_any_litter_has_a_finite_loss_and_gradient():
    model = small().train()
    x, _ = some_pictures()
    parts = losses(model, x, [target([]), target([])])
    sum(parts.values()).backward()
    assert parts["box_reg"] == 0 and parts["rpn_box_reg"] == 0 and parts["classifier"] > 0
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_losses_need_train_mode_and_predictions_eval_mode():
    x, y = some_pictures()
    with pytest.raises(RuntimeError, match="train mode"):
        losses(small().eval(), x, y)
    with pytest.raises(RuntimeError, match="eval mode"):
        detect(small().train(), x)


def test_predictions_are_litter_inside_their_picture_and_nothing_is_resized():
    model, seen = small().eval(), []
    model.backbone.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    x, _ = some_pictures()
    for picture, one in zip(x, detect(model, x), strict=True):
        assert set(one["labels"].tolist()) == {1}  # 0 is background
        assert (one["boxes"] >= 0).all() and (one["scores"].diff() <= 0).all()
        assert (one["boxes"].amax(0)[2:] <= torch.tensor(picture.shape[:0:-1])).all()
    assert seen == [(2, 3, 96, 96)]  # the smaller one padded


def test_boxes_stay_in_float32_under_bfloat16():
    model, plain = small(amp=True).eval(), small().eval()
    x, _ = some_pictures()
    one, other = detect(model, x)[0], detect(plain, x)[0]
    assert one["boxes"].dtype == one["scores"].dtype == torch.float32
    features = model.backbone(torch.rand(1, 3, 64, 64))
    assert all(part.dtype == torch.float32 for part in features.values())
    assert not torch.equal(one["scores"], other["scores"])  # the convolutions do round
    assert one["boxes"].frac().mul(256).frac().any()  # no coordinate of bfloat16


def test_anchors_have_their_sides_and_ratios():
    cells = small().rpn.anchor_generator.cell_anchors
    for cell, side in zip(cells, (16, 32, 64), strict=True):
        size = cell[:, 2:] - cell[:, :2]
        assert size.prod(1).sqrt().tolist() == pytest.approx([side] * 3, rel=0.05)
        assert (size[:, 1] / size[:, 0]).tolist() == pytest.approx([0.5, 1, 2], rel=0.1)


def test_anchor_overlap_is_the_iou_of_centred_boxes():
    torch.manual_seed(0)
    size = 5 + 60 * torch.rand(20, 2, dtype=torch.float64)
    boxes = torch.cat((100 - size / 2, 100 + size / 2), 1)
    shapes = [(s / r**0.5, s * r**0.5) for s in (16, 40) for r in (0.5, 1, 2)]
    anchors = torch.tensor(
        [[100 - w / 2, 100 - h / 2, 100 + w / 2, 100 + h / 2] for w, h in shapes]
    )
    expected = box_iou(boxes, anchors.double()).max(1).values
    assert torch.allclose(anchor_overlap(boxes, [16.0, 40.0]), expected)


def test_anchors_fit_the_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 20], [0, 0, 40, 40], [5, 5, 12, 19]])
    assert fit_anchors(boxes) == [10.0, 20.0, 40.0]


def test_frozen_batch_normalisation_keeps_its_statistics_and_its_function():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, eps=0.1)))
    model(1 + torch.rand(8, 3, 9, 9))  # the running statistics are no longer 0 and 1
    x = torch.rand(2, 3, 9, 9)
    expected = copy.deepcopy(model).eval()(x)
    freeze_batchnorm(model)
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        assert torch.allclose(model.train(mode)(x), expected, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert frozen_eps(model) == 0.1 and frozen_eps(small()) is None


def published_detector() -> nn.Module:
    torch.manual_seed(0)
    return fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)


def test_coco_weights_are_loaded_frozen_and_get_a_new_head(tmp_path, monkeypatch):
    modules, published = load_project(PROJECT), published_detector()
    state = published.state_dict()
    url = get_model_weights("fasterrcnn_mobilenet_v3_large_320_fpn").DEFAULT.url
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / url.rsplit("/", 1)[-1])
    monkeypatch.setattr(modules.data, "check_sum", lambda *_: None)
    hub = torch.hub.get_dir()
    config = SimpleNamespace(architecture="mobilenet_v3_large_320_fpn", data_dir=tmp_path)
    model = modules.train.coco_detector(config, {"classes": 2, "sides": [1.0], "image_size": 96})
    assert torch.hub.get_dir() == hub
    loaded = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert not [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    made, config = known_case()[0], SimpleNamespace(**vars(config), image_size=96, seed=0)
    config.weights, config.precision = Path("coco"), "float32"
    start = modules.train.new_model(config, made, torch.device("cpu"))
    before, model = plain_state(start.before), start.model
    assert start.pretrained and before.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in before.items())
    for key, value in plain_state(model).items():
        assert "box_predictor" in key or torch.equal(value, loaded[key])
    x, y = some_pictures()
    sum(losses(model.train(), x, y).values()).backward()
    assert {one["labels"].max().item() for one in detect(model.eval(), x)} <= {1}
    after = plain_state(model)
    assert all(torch.equal(after[key], loaded[key]) for key in after if "box_predictor" not in key)
    assert [part for part in model.modules() if isinstance(part, FrozenBatchNorm2d)]
    assert after["roi_heads.box_predictor.cls_score.weight"].shape == (2, 1024)


def test_without_file_and_network_coco_weights_are_missed_in_one_line(tmp_path, monkeypatch):
    def off(*_: object, **__: object) -> None:
        raise OSError("no network")

    modules = load_project(PROJECT)
    monkeypatch.setattr(modules.data, "urlopen", off)
    config = SimpleNamespace(architecture="resnet50_fpn", data_dir=tmp_path)
    with pytest.raises(modules.data.DataError, match=r"could not be downloaded .* no network"):
        modules.train.coco_detector(config, {})


def test_the_trained_weights_load_into_torchvisions_own_detector(tmp_path):
    options = {"classes": 3, "sides": [1.0], "image_size": 96}
    model = make_detector("mobilenet_v3_large_320_fpn", **options)
    model = mix_precision(freeze_batchnorm(model), amp=False).eval()
    plain = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=96, box_score_thresh=0.01
    ).eval()
    torch.save(plain_state(model), tmp_path / "state.pt")
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = [torch.rand(3, 96, 96)]
    one, (other,) = detect(model, x)[0], plain(x)
    assert len(one["boxes"]) and torch.allclose(one["boxes"], other["boxes"], atol=1e-3)


def test_a_restored_detector_predicts_as_the_saved_one():
    model = small().eval()
    saved = {"architecture": "small", "classes": ["litter"], "sides": [16.0, 32.0, 64.0]}
    saved |= {"image_size": 96, "eps": None, "weights": plain_state(model)}
    other = restore_detector(saved, amp=False).eval()
    x, _ = some_pictures()
    for one, again in zip(detect(model, x), detect(other, x), strict=True):
        assert all(torch.equal(one[name], again[name]) for name in one)


# --- metrics ----------------------------------------------------------------------------------


def random_case(seed: int, pictures: int = 30) -> tuple[list[dict], list[dict]]:
    """Predictions near the truth and elsewhere; a third of the pictures are clean."""
    rng = np.random.default_rng(seed)
    predictions, y = [], []
    for number in range(pictures):
        corner = rng.uniform(0, 150, (rng.integers(1, 5) if number % 3 else 0, 2))
        boxes = np.concatenate((corner, corner + rng.uniform(20, 60, corner.shape)), 1)
        near = boxes + rng.normal(0, 4, boxes.shape)
        corner = rng.uniform(0, 150, (rng.integers(0, 3), 2))
        wrong = np.concatenate((corner, corner + 30), 1)
        scores = np.concatenate((rng.uniform(0.3, 1, len(near)), rng.uniform(0, 0.8, len(wrong))))
        order = np.argsort(-scores, kind="stable")
        boxes_found = np.concatenate((near, wrong))[order]
        predictions.append(prediction(boxes_found.tolist(), scores[order].tolist()))
        y.append(target(boxes.tolist()))
    return predictions, y


def brute_force_hits(predictions: list[dict], y: list[dict], iou: float) -> list[tuple]:
    """(score, is a hit) of all predictions, best first."""
    rows = []
    for one, truth in zip(predictions, y, strict=True):
        free = list(range(len(truth["boxes"])))
        for box, score in zip(one["boxes"], one["scores"].tolist(), strict=True):
            overlaps = {i: float(box_iou(box[None], truth["boxes"][i][None])) for i in free}
            best = max(overlaps, key=overlaps.get, default=None)
            hit = best is not None and overlaps[best] >= iou
            if hit:
                free.remove(best)
            rows.append((score, hit))
    return sorted(rows, key=lambda row: -row[0])


def brute_force_ap(predictions: list[dict], y: list[dict], iou: float) -> float:
    truth = sum(len(one["boxes"]) for one in y)
    found, points = 0, []
    for number, (_, hit) in enumerate(brute_force_hits(predictions, y, iou), start=1):
        found += hit
        points.append((found / truth, found / number))
    levels = [
        max((p for r, p in points if r >= level), default=0) for level in np.linspace(0, 1, 101)
    ]
    return sum(levels) / 101


def test_average_precision_is_its_definition():
    predictions, y = random_case(0)
    metrics, precision = coco_metrics(predictions, y)
    expected = [brute_force_ap(predictions, y, 0.5 + 0.05 * i) for i in range(10)]
    assert metrics["ap50"] == pytest.approx(expected[0], abs=1e-6)
    assert metrics["ap75"] == pytest.approx(expected[5], abs=1e-6)
    assert metrics["ap"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert np.mean(precision) == pytest.approx(expected[0], abs=1e-6)
    assert metrics["ap_large"] is None  # there is no large box


def test_false_positives_on_clean_pictures_lower_the_average_precision():
    y = [target([[10, 10, 40, 40]]), target([])]
    right = prediction([[10, 10, 40, 40]], [0.5])
    quiet, loud = prediction([], []), prediction([[0, 0, 30, 30]], [0.9])
    assert coco_metrics([right, quiet], y)[0]["ap"] == pytest.approx(1)
    assert coco_metrics([right, loud], y)[0]["ap"] == pytest.approx(0.5)
    assert coco_metrics([quiet, quiet], y)[0]["ap"] == 0
    assert coco_metrics([quiet, quiet], [target([])] * 2)[0]["ap"] is None


def test_nothing_counts_in_an_ignored_box():
    y = [target([[10, 10, 40, 40]]), target([])]
    crowd = torch.tensor([[0.0, 0, 30, 30]])
    loud = prediction([[0, 0, 28, 28], [20, 20, 90, 90]], [0.9, 0.1])
    right = prediction([[10, 10, 40, 40]], [0.5])
    none = torch.zeros(0, 4)
    assert coco_metrics([right, loud], y)[0]["ap"] < 0.6
    assert coco_metrics([right, loud], y, [none, crowd])[0]["ap"] == pytest.approx(1)
    assert outside(loud, crowd)["scores"].tolist() == pytest.approx([0.1])
    assert outside(loud, none)["scores"].tolist() == pytest.approx([0.9, 0.1])


def test_average_precision_by_class_is_that_of_the_class_alone():
    y = [target([[10, 10, 40, 40], [50, 50, 90, 90]], [1, 2])]
    one = prediction([[10, 10, 40, 40], [0, 0, 9, 9]], [0.9, 0.8], [1, 2])
    assert coco_metrics([one], y)[0]["ap_per_label"] == {"1": pytest.approx(1), "2": 0}


def test_an_outcome_tells_hits_false_positives_and_misses_apart():
    truth = target([[0, 0, 10, 10], [50, 50, 90, 90]])
    hits, wrong, missed = outcome(prediction([[0, 0, 10, 9], [60, 0, 70, 9]], [0.9, 0.8]), truth)
    assert (hits.tolist(), wrong.tolist()) == ([[0, 0, 10, 9]], [[60, 0, 70, 9]])
    assert missed.tolist() == [[50, 50, 90, 90]]


def test_tiles_cover_the_picture_overlap_and_are_joined():
    for size in ((300, 200), (7, 5), (1000, 33)):
        for tiles in (1, 2, 3):
            corners = tile_corners(size, tiles)
            seen = np.zeros(size[::-1], int)
            for left, top, right, bottom in corners:
                seen[top:bottom, left:right] += 1
            assert len(corners) == tiles**2 and seen.min() >= 1
            assert tiles == 1 or seen.max() >= 2
    one = prediction([[0, 0, 10, 10], [80, 0, 90, 20]], [0.5, 0.95])
    other = prediction([[0, 0, 10, 9], [40, 40, 50, 50], [80, 0, 110, 20]], [0.9, 0.2, 0.3])
    cuts = [cut_off(part["boxes"], (0, 0, 90, 60), (300, 60)) for part in (one, other)]
    assert [cut.tolist() for cut in cuts] == [[False, True], [False, False, False]]
    parts = [part | {"cut": cut} for part, cut in zip((one, other), cuts, strict=True)]
    assert join_tiles(parts)["scores"].tolist() == pytest.approx([0.9, 0.3, 0.2])


def test_a_box_is_found_once_and_by_a_prediction_of_its_class():
    truth = target([[0, 0, 10, 10], [50, 50, 70, 70]], [1, 2])
    boxes = [[0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 70, 70], [50, 50, 70, 69]]
    one = prediction(boxes, [0.9, 0.8, 0.7, 0.6], [1, 1, 1, 2])
    assert match(one, truth).tolist() == [0, -1, -1, 1]
    assert match(one, target([])).tolist() == [-1] * 4


@pytest.mark.parametrize("limit", [0, 0.1, 0.25, 10])
def test_the_working_confidence_is_the_best_of_all_that_are_allowed(limit):
    predictions, y = random_case(3)
    counts = count(predictions, y)
    clean = [not len(one["boxes"]) for one in y]
    best = (-1.0, 1.0)
    for threshold in sorted({float(s) for one in predictions for s in one["scores"]}):
        kept = [above(one, threshold) for one in predictions]
        found = sum(hit for _, hit in brute_force_hits(kept, y, 0.5))
        predicted, truth = sum(len(one["scores"]) for one in kept), counts.truth
        false = sum(len(one["scores"]) for one, c in zip(kept, clean, strict=True) if c)
        expected = {
            "precision": found / predicted,
            "recall": found / truth,
            "f1": 2 * found / (predicted + truth),
            "false_positives_per_clean_image": false / sum(clean),
        }
        assert at_confidence(counts, threshold) == pytest.approx(expected)
        if false <= limit * sum(clean):
            best = max(best, (expected["f1"], threshold))
    assert working_confidence(counts, limit) == best[1]


def test_where_no_confidence_is_allowed_nothing_is_reported():
    counts = count([prediction([[0, 0, 9, 9]], [0.9])], [target([])])
    assert working_confidence(counts, 0) == 1
    assert at_confidence(counts, 1.0)["false_positives_per_clean_image"] == 0


def test_false_positives_are_counted_for_the_confounder_they_lie_on():
    y = [target([[0, 0, 10, 10]]), target([])]
    kept = [prediction([[0, 0, 10, 10]], [0.9]), prediction([[40, 40, 60, 60]], [0.8])]
    things = [target([[0, 0, 10, 10]], [2]), target([[45, 45, 70, 70], [0, 0, 20, 20]], [2, 0])]
    assert false_positives_on(things, kept, y, 4) == ([1, 0, 2, 0], [0, 0, 1, 0])


def test_mistakes_are_sorted_and_complete():
    y = [target([[0, 0, 10, 10], [50, 50, 90, 90], [200, 200, 280, 280]]), target([])]
    one = prediction([[0, 0, 10, 9], [70, 70, 90, 90]], [0.5, 0.4])
    false, misses = mistakes([one, prediction([[1, 1, 9, 9]], [0.7])], y)
    assert [(round(score, 3), number) for score, number, _ in false] == [(0.7, 1), (0.4, 0)]
    assert [box.tolist()[0] for _, _, box in misses] == [200, 50]  # largest first
    assert [best for best, _, _ in misses] == pytest.approx([0, 0.25])


def test_any_class_of_coco_counts_as_litter_once():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]
    (one,) = as_one_class([prediction(boxes, [0.9, 0.8, 0.7], [44, 47, 1])])
    assert one["labels"].tolist() == [1, 1] and one["scores"].tolist() == pytest.approx([0.9, 0.7])


# --- scenes -----------------------------------------------------------------------------------


def draw(number: int = 0, count: int = 15, classes: tuple = ("litter",), seed: int = 0) -> tuple:
    return scenes.draw_split(number, size=96, count=count, classes=classes, seed=seed)


def test_boxes_are_those_of_the_pixels_that_show_the_thing(monkeypatch):
    owners, cover = [], scenes.cover

    def spy(scene, owner, leaves, rng):
        before = np.bincount(owner.ravel(), minlength=9)
        cover(scene, owner, leaves, rng)
        after = np.bincount(owner.ravel(), minlength=9)
        assert (2 * after >= before)[1:].all()  # at least half of each is seen
        owners.append(owner)

    monkeypatch.setattr(scenes, "cover", spy)
    _, truth, confounders = draw(count=20)
    for owner, litter, others in zip(owners, truth, confounders, strict=True):
        expected = set()
        for number in range(1, owner.max() + 1):
            rows, columns = np.nonzero(owner == number)
            expected.add((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        boxes = torch.cat((litter["boxes"], others["boxes"])).tolist()
        assert {tuple(map(int, box)) for box in boxes} == expected
    assert any(len(one["boxes"]) > 1 for one in truth)


def test_a_thing_is_drawn_where_its_box_is():
    scene, owner = Image.new("RGB", (96, 96)), np.zeros((96, 96), np.int8)
    sprite = Image.new("RGBA", (30, 20), (250, 0, 0, 255))
    assert scenes.put(scene, owner, sprite, np.random.default_rng(0))
    assert np.array_equal(np.asarray(scene)[..., 0] == 250, owner == 1)
    assert (owner == 1).any()


def test_every_fifth_scene_is_clean_and_labels_begin_at_one():
    _, truth, confounders = draw(count=20)
    assert [not len(one["boxes"]) for one in truth] == [i % 5 == 0 for i in range(20)]
    assert all(one["boxes"].shape[1:] == (4,) and one["boxes"].is_floating_point() for one in truth)
    assert {label for one in truth for label in one["labels"].tolist()} == {1}
    assert sum(len(one["boxes"]) for one in confounders) > 5
    materials = ("glass", "metal", "paper", "plastic")
    _, truth, _ = draw(count=20, classes=materials)
    assert {label for one in truth for label in one["labels"].tolist()} == {1, 2, 3, 4}


def test_scenes_depend_on_seed_and_split_and_training_has_ground_of_its_own(monkeypatch):
    columns, ground = [], scenes.ground

    def spy(rng, photos, size):
        columns.append({row.tobytes() for photo in photos for row in np.asarray(photo).T})
        return ground(rng, photos, size)

    monkeypatch.setattr(scenes, "ground", spy)
    x = [draw(number, 1)[0] for number in (0, 1, 2, 0)]
    assert torch.equal(x[0], x[3]) and not torch.equal(x[0], x[1])
    assert not columns[0] & (columns[1] | columns[2])
    assert columns[1] == columns[2]  # alike, so that a threshold carries over
    assert not torch.equal(x[1], x[2])


# --- photographs ------------------------------------------------------------------------------


def write_photo(path: Path, seed: int, size: tuple = (64, 48), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size).save(path, **options)


def image_xml(name: str, boxes: str, width: int = 64, height: int = 48) -> str:
    return f'<image id="0" name="{name}" width="{width}" height="{height}">{boxes}</image>'


def box_xml(x1: float, y1: float, x2: float, y2: float, label: str = "litter") -> str:
    return f'<box label="{label}" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}"></box>'


def write_folder(folder: Path, count: int = 20) -> Path:
    """litter/ with annotations.xml, every fourth picture without a box, and clean/."""
    images = []
    for number in range(count):
        write_photo(folder / "litter" / f"{number:02}.png", number)
        boxes = box_xml(8, 6, 40, 30) if number % 4 else ""
        images.append(image_xml(f"{number:02}.png", boxes))
    (folder / "litter" / "annotations.xml").write_text(
        f"<annotations>{''.join(images)}</annotations>"
    )
    for number in range(8):
        write_photo(folder / "clean" / f"clean{number}.png", 100 + number)
    return folder


def load(folder: Path, **changes) -> data.Data:
    options = {"image_size": 64, "classes": ("litter",), "scene_pattern": "", "seed": 0} | changes
    options |= {"scene_counts": (2, 2, 2), "draw": scenes.draw_split}
    return data.load(dataset="folder", data_dir=folder, **options)


def all_of(found: data.Data) -> dict[str, dict]:
    parts = (found.train, found.val, found.test)
    return {name: y for part in parts for name, y in zip(part.names, part.y, strict=True)}


def test_pictures_without_boxes_stay_and_each_split_has_some(tmp_path):
    found = load(write_folder(tmp_path / "forest"))
    assert len(all_of(found)) == 28
    for part in (found.train, found.val, found.test):
        empty = [y for y in part.y if not len(y["boxes"])]
        assert empty and len(empty) < len(part.y)
        assert all(y["boxes"].shape == (0, 4) and y["boxes"].is_floating_point() for y in empty)


def test_boxes_are_scaled_with_their_picture_by_its_own_two_factors(tmp_path):
    folder = tmp_path / "mine"
    for number, size in enumerate([(640, 480), (100, 200), (48, 64)] * 3):
        write_photo(folder / f"{number}.jpg", number, size)
    images = [image_xml(f"{n}.jpg", box_xml(100, 50, 300, 250), 1000, 500) for n in range(9)]
    (folder / "annotations.xml").write_text(f"<annotations>{''.join(images)}</annotations>")
    boxes = all_of(load(folder, image_size=64))
    assert boxes["0.jpg"]["boxes"].tolist() == [pytest.approx([8.5, 6.4, 25.5, 32])]  # 85 x 64
    assert boxes["1.jpg"]["boxes"].tolist() == [pytest.approx([5.3, 10.7, 15.9, 53.5])]  # 53 x 107
    assert boxes["2.jpg"]["boxes"].tolist() == [pytest.approx([6.4, 8.5, 19.2, 42.5])]  # 64 x 85


@pytest.mark.parametrize(("annotated", "turned"), [((40, 80), True), ((80, 40), False)])
def test_exif_orientation_is_respected_as_the_boxes_were_drawn(tmp_path, annotated, turned):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[8:16, 48:72] = 255  # rows and columns as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    picture, size = data.read_photo(tmp_path / "a.png", 24, annotated)
    assert size == annotated and picture.size == (annotated[0] / 2, annotated[1] / 2)
    rows, columns = np.nonzero(np.asarray(picture)[..., 0] > 128)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert box == ((12, 24, 16, 36) if turned else (24, 4, 36, 8))


def test_outside_and_degenerate_boxes_are_clipped_or_dropped_and_counted(tmp_path):
    folder = write_folder(tmp_path / "forest")
    path = folder / "litter" / "annotations.xml"
    spoilt = [box_xml(-9, 10, 30, 60), box_xml(5, 5, 5, 20), box_xml(70, 5, 90, 20)]
    good = image_xml("05.png", box_xml(8, 6, 40, 30))
    path.write_text(path.read_text().replace(good, image_xml("05.png", "".join(spoilt))))
    found = load(folder)
    assert "boxes clipped to their photograph: 1, the first in 05.png" in found.note
    assert "boxes dropped as empty: 2, the first in 05.png" in found.note
    assert all_of(found)["litter/05.png"]["boxes"].tolist() == [
        pytest.approx([0, 13.33, 39.84, 64], abs=0.1)
    ]


def test_coco_json_is_read_like_cvat_xml(tmp_path):
    xml, coco = write_folder(tmp_path / "xml"), write_folder(tmp_path / "json")
    (coco / "litter" / "annotations.xml").unlink()
    images = [{"id": n, "file_name": f"{n:02}.png", "width": 64, "height": 48} for n in range(20)]
    boxes = [{"image_id": n, "category_id": 7, "bbox": [8, 6, 32, 24]} for n in range(20) if n % 4]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "x"}]}
    (coco / "litter" / "instances.json").write_text(json.dumps(content))
    one, other = all_of(load(xml)), all_of(load(coco))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name]["boxes"], other[name]["boxes"])
        assert torch.equal(one[name]["labels"], other[name]["labels"])


def test_two_pictures_of_one_scene_stay_on_one_side(tmp_path):
    folder = write_folder(tmp_path / "forest")
    pixels = np.asarray(Image.open(folder / "clean" / "clean0.png")).astype(int)
    for number in range(1, 8):  # the same place in another light
        bright = (0.8 * pixels + 5 * number).clip(0, 255).astype(np.uint8)
        Image.fromarray(bright).save(folder / "clean" / f"clean{number}.png")
    for seed in range(4):
        found = load(folder, seed=seed, scene_pattern="^0")
        for alike in ("clean", "0"):
            sides = [
                number
                for number, part in enumerate(found[2:5])
                if any(name.split("/")[1].startswith(alike) for name in part.names)
            ]
            assert len(sides) == 1, alike
        assert sum(len(part.names) for part in found[2:5]) == 28


def test_test_txt_fixes_the_test_set_and_its_scenes_leave_training(tmp_path):
    folder = write_folder(tmp_path / "forest")
    path = folder / "litter" / "annotations.xml"
    for old, new in (("01.png", "a b.png"), ("02.png", "Cafe\u0301.png")):
        (folder / "litter" / old).rename(folder / "litter" / new)
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    lines = "\ufeffa b.png\nlitter/Caf\u00e9.png\r\n\n./03.png\nnobody.png\n"
    (folder / "test.txt").write_text(lines, encoding="utf-8")
    shutil.copy(folder / "litter" / "a b.png", folder / "clean" / "again.png")
    found = load(folder)
    assert sorted(found.test.names) == ["litter/03.png", "litter/Caf\u00e9.png", "litter/a b.png"]
    assert "clean/again.png" not in found.train.names + found.val.names
    assert "1 left out of training" in found.note
    assert "test.txt names 1 that are not there, as 'nobody.png'" in found.note
    (folder / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(data.DataError, match=r"test.txt: expected a text in UTF-8"):
        load(folder)


def test_a_line_of_test_txt_may_lack_the_suffix_or_be_a_folder(tmp_path):
    folder = write_folder(tmp_path / "forest")
    (folder / "test.txt").write_text("litter\\02\n03\nclean/\nlitt\n")
    found = load(folder)
    clean = [f"clean/clean{number}.png" for number in range(8)]
    assert sorted(found.test.names) == [*clean, "litter/02.png", "litter/03.png"]
    assert "test.txt names 1 that are not there, as 'litt'" in found.note


def test_two_photographs_of_one_name_are_named(tmp_path):
    folder = write_folder(tmp_path / "forest")
    write_photo(folder / "litter" / "more" / "05.png", 200)
    both = r"image '05\.png' may be litter/05\.png or litter/more/05\.png"
    with pytest.raises(data.DataError, match=both):
        load(folder)
    path = folder / "litter" / "annotations.xml"
    text = path.read_text().replace('name="', 'name="litter/')
    (folder / "annotations.xml").write_text(text)  # seen from there the paths differ
    path.unlink()
    assert "litter/05.png" in {name for part in load(folder)[2:5] for name in part.names}


def test_a_pattern_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(data, "PATIENCE", 0.2)
    with pytest.raises(data.DataError, match="scene_pattern: the regular expression needs too"):
        data.search_names("(a+)+$", ["a" * 60 + "b"])
    assert data.search_names("a+", ["x/baab"])[0][0] == "aa"


@pytest.mark.parametrize("count", range(3, 30))
def test_no_split_is_left_without_a_scene(count):
    ends = [0, *data.split_ends(count, data.SHARES), count]
    assert all(a < b for a, b in itertools.pairwise(ends))
    assert abs(ends[1] - 0.7 * count) <= 1.1
    assert len(data.split_ends(count, (0.85, 0.15))) == 1


def test_json_files_of_another_kind_do_not_hinder(tmp_path):
    folder = write_folder(tmp_path / "forest")
    (folder / "metrics.json").write_text("{}")
    (folder / "broken.json").write_text("{")
    (folder / "captions.json").write_text('{"images": [], "annotations": []}')
    (folder / "latin.json").write_bytes(b'{"a": "\xe9"}')
    (folder / "lost.json").symlink_to("nothing.json")
    found = load(folder)
    assert "files that are no annotations: 5, as broken.json" in found.note
    assert len(all_of(found)) == 28


def test_a_turned_box_of_cvat_is_enclosed(tmp_path):
    assert data.enclosing([10, 20, 30, 60], 0) == [10, 20, 30, 60]
    assert data.enclosing([10, 20, 30, 60], 90) == pytest.approx([0, 30, 40, 50])
    half = (20 + 40) * math.sqrt(0.5) / 2
    expected = [20 - half, 40 - half, 20 + half, 40 + half]
    assert data.enclosing([10, 20, 30, 60], 45) == pytest.approx(expected)
    folder = write_folder(tmp_path / "forest")
    path = folder / "litter" / "annotations.xml"
    path.write_text(path.read_text().replace("<box ", '<box rotation="90.0" '))
    (box,) = all_of(load(folder, image_size=48))["litter/01.png"]["boxes"].tolist()
    assert box == pytest.approx([12, 2, 36, 34], abs=0.01)


def test_a_crowd_is_ignored_and_grey_in_training(tmp_path):
    folder = write_folder(tmp_path / "forest")
    (folder / "litter" / "annotations.xml").unlink()
    images = [{"id": n, "file_name": f"{n:02}.png", "width": 64, "height": 48} for n in range(20)]
    boxes = [{"image_id": n, "category_id": 7, "bbox": [8, 6, 32, 24]} for n in range(20)]
    boxes += [one | {"bbox": [0, 0, 8, 8], "iscrowd": 1} for one in boxes]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "x"}]}
    (folder / "litter" / "coco.json").write_text(json.dumps(content))
    (folder / "metrics.json").write_text('{"project": "x"}')  # not a COCO set
    found = load(folder, image_size=48)
    assert "files that are no annotations: 1, as metrics.json" in found.note
    place = next(i for i, name in enumerate(found.train.names) if name.startswith("litter/"))
    assert found.train.y[place]["boxes"].tolist() == [[8, 6, 40, 30]]
    assert found.train.ignored[place].tolist() == [[0, 0, 8, 8]]
    x = data.without_ignored(found.train, place)
    assert (x[:, :8, :8] == 128).all() and torch.equal(x[:, 8:], found.train.x[place][:, 8:])


def test_a_coco_image_without_a_name_and_a_test_txt_that_is_none_are_named(tmp_path):
    folder = write_folder(tmp_path / "forest")
    (folder / "test.txt").mkdir()
    with pytest.raises(data.DataError, match=r"test.txt: expected a text"):
        load(folder)
    content = {"images": [{"id": 1, "file_name": None, "width": 64, "height": 48}]}
    content |= {"annotations": [], "categories": []}
    (folder / "coco.json").write_text(json.dumps(content))
    with pytest.raises(data.DataError, match=r"coco.json: image 'None': expected a name"):
        load(folder)


def test_annotations_may_lie_beside_the_photographs_folder(tmp_path):
    folder = write_folder(tmp_path / "forest")
    (folder / "annotations").mkdir()
    (folder / "litter" / "annotations.xml").rename(folder / "annotations" / "task 1.XML")
    assert len(all_of(load(folder))) == 28


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("</annotations>", "", "annotations.xml: cannot be read"),
        ('xtl="8"', 'xtl="left"', "annotations.xml: expected another form: .*left"),
        ('xtl="8"', 'x="8"', "annotations.xml: expected another form: .*xtl"),
        ('xtl="8"', 'xtl="nan"', "image '01.png': impossible size or box"),
        ('width="64"', 'width="0"', "image '00.png': impossible size or box"),
        ('name="01.png"', 'name="00.png"', "image '00.png' is annotated twice"),
        (".png", ".svg", "none of the 20 annotated photographs is there"),
        ("<box", "<polygon", "no photograph of the split 'train' has a box"),
    ],
)
def test_bad_annotations_are_named(tmp_path, old, new, complaint):
    folder = write_folder(tmp_path / "forest")
    path = folder / "litter" / "annotations.xml"
    path.write_text(
        path.read_text()
        .replace(old, new)
        .replace("</box", f"</{new[1:]}" if "poly" in new else "</box")
    )
    if "svg" in new:
        shutil.rmtree(folder / "clean")
    with pytest.raises(data.DataError, match=complaint):
        load(folder)


def test_a_label_that_is_no_class_is_named(tmp_path):
    with pytest.raises(data.DataError, match="label 'litter' is no class"):
        load(write_folder(tmp_path / "forest"), classes=("glass", "metal"))


def test_unreadable_and_missing_photographs_are_left_out_and_counted(tmp_path):
    folder = write_folder(tmp_path / "forest")
    photo = folder / "litter" / "05.png"
    photo.write_bytes(photo.read_bytes()[:200])
    (folder / "litter" / "06.png").unlink()
    found = load(folder)
    assert f"unreadable files left out: 1, the first: {photo}" in found.note
    assert "annotated photographs that are not there: 1, as 06.png" in found.note
    assert len(all_of(found)) == 26


def test_the_second_start_reads_what_the_first_decoded(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "forest")
    first = load(folder)
    monkeypatch.setattr(data, "read_photo", None)
    assert all(map(torch.equal, first.test.x, load(folder).test.x))


def test_a_folder_without_annotations_is_named(tmp_path):
    with pytest.raises(data.DataError, match="found none"):
        load(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(data.DataError, match=r"found none, only others as .*a.json"):
        load(tmp_path)


def test_a_box_moves_with_its_picture():
    torch.manual_seed(0)
    x = torch.zeros(3, 60, 90, dtype=torch.uint8)
    x[:, 20:40, 15:55] = 255
    y, shapes = target([[15, 20, 55, 40]]), set()
    for _ in range(60):
        picture, moved = data.augment(x, y, 1.5, torch.rand(4).tolist())
        shapes.add(picture.shape)
        assert picture.shape[1] <= 60 and picture.shape[2] <= 90
        rows, columns = (picture[0] > 0.5).nonzero().T
        seen = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        assert (moved["boxes"][0] - seen).abs().max() <= 1
    assert len(shapes) > 5 and y["boxes"].tolist() == [[15, 20, 55, 40]]


def test_a_box_that_is_nearly_cut_off_goes():
    torch.manual_seed(0)
    x, y = torch.zeros(3, 60, 60, dtype=torch.uint8), target([[0, 0, 6, 6]])
    draws = torch.rand(40, 4).tolist()
    kept = [len(data.augment(x, y, 2.0, four)[1]["boxes"]) for four in draws]
    assert set(kept) == {0, 1}


# --- whole runs -------------------------------------------------------------------------------


def metrics_of(folder: Path) -> dict:
    report = json.loads((folder / "metrics.json").read_text())
    report["metrics"].pop("timing")
    return report["metrics"] | report["headline"]


def test_a_run_cut_short_ends_like_an_unbroken_one(tmp_path):
    whole, *_ = tiny_run(PROJECT)
    train_until(PROJECT, 1, *TINY, "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    assert metrics_of(train(PROJECT, "--resume", folder)) == metrics_of(whole)
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        parts = sum(float(row[name]) for name in LOSSES)
        assert float(row["train_loss"]) == pytest.approx(parts)


def test_bad_data_is_an_error_and_leaves_no_folder(tmp_path):
    flags = ["--dataset", "folder", "--data_dir", tmp_path / "none", "--out_dir", tmp_path / "out"]
    with pytest.raises(load_project(PROJECT).data.DataError, match="there is no such folder"):
        train(PROJECT, *flags)
    assert not list((tmp_path / "out").iterdir())


def test_scenes_too_small_for_a_box_are_named(tmp_path):
    flags = [*TINY, "--image_size", 33, "--data_dir", tmp_path, "--out_dir", tmp_path / "out"]
    with pytest.raises(load_project(PROJECT).data.DataError, match="image_size, scene_counts"):
        train(PROJECT, *flags, "--scene_counts", "2,2,2")


def test_without_comparison_the_untrained_network_is_not_tested(tmp_path):
    folder = train(PROJECT, *TINY, "--epochs", 1, "--compare", "false", "--out_dir", tmp_path)
    report = json.loads((folder / "metrics.json").read_text())
    assert "before" not in report["metrics"] and "ap50" in report["headline"]
    assert (folder / "precision_recall.png").exists()


@pytest.mark.parametrize("clean", [True, False])
def test_pictures_are_drawn_of_the_least_data(tmp_path, capsys, clean):
    """A folder with no clean picture, or with one box in each split; and no box is found."""
    folder = tmp_path / "mine"
    for number in range(9):
        write_photo(folder / f"{number}.png", number)
    boxes = [box_xml(8, 6, 40, 30) if number % 3 or not clean else "" for number in range(9)]
    images = [image_xml(f"{n}.png", box) for n, box in enumerate(boxes)]
    (folder / "annotations.xml").write_text(f"<annotations>{''.join(images)}</annotations>")
    flags = ["--dataset", "folder", "--data_dir", folder, "--image_size", 48, "--epochs", 1]
    run = train(PROJECT, *flags, "--device", "cpu", "--out_dir", tmp_path / "out")
    assert "warning" not in capsys.readouterr().err
    assert len(list(run.glob("*.png"))) == 5


def test_weights_of_a_run_go_on_and_other_files_are_refused(tmp_path):
    folder, *_ = tiny_run(PROJECT)
    saved = torch.load(folder / "model.pt", weights_only=True)
    torch.save(saved | {"classes": ["glass"]}, tmp_path / "other.pt")
    flags = [*TINY, "--epochs", 1, "--out_dir", tmp_path / "out"]
    report = metrics_of(train(PROJECT, *flags, "--weights", folder / "model.pt"))
    assert report["data"]["start"] == f"weights of {folder.name}"
    assert report["before"]["ap50"] == metrics_of(folder)["test"]["ap50"]
    (tmp_path / "text.pt").write_text("x")
    error = load_project(PROJECT).data.DataError
    for name, reason in (("other.pt", "classes"), ("text.pt", "not a file of weights")):
        with pytest.raises(error, match=f"{name}.*{reason}"):
            train(PROJECT, *flags, "--weights", tmp_path / name)


# --- predict.py -------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predictions_are_those_of_the_evaluation_whatever_the_photograph(tmp_path):
    folder, *_ = tiny_run(PROJECT)
    modules, photos = load_project(PROJECT), tmp_path / "photos"
    write_photo(photos / "a" / "one.png", 0, (100, 130))
    write_photo(photos / "b" / "one.png", 1, (300, 96))
    Image.open(photos / "a" / "one.png").convert("RGBA").save(photos / "alpha $.png")
    Image.open(photos / "a" / "one.png").convert("L").save(photos / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(photos / "b" / "one.png").rotate(90, expand=True)
    turned.save(photos / "turned.png", exif=exif)
    (photos / "broken.png").write_bytes(b"x")
    flags = [folder, photos, "--threshold", 0.05, "--device", "cpu", "--out_dir", tmp_path / "out"]
    output = call(modules.predict, *flags)
    out = Path(output.splitlines()[-1])
    rows = {row["file"]: row for row in read_rows(out / "predictions.csv")}
    assert set(rows) == {"a/one.png", "b/one.png", "alpha $.png", "grey.png", "turned.png"}
    assert "unreadable files left out: 1, the first: " in output and "broken.png" in output
    with pytest.raises(modules.data.DataError, match=r"no photograph could be read.*broken.png"):
        call(modules.predict, folder, photos / "broken.png", "--out_dir", tmp_path / "none")
    assert {path.relative_to(out / "pictures").as_posix() for path in out.rglob("*.png")} == {
        f"{name}.png" for name in rows
    }
    boxes = read_rows(out / "boxes.csv")
    saved = torch.load(folder / "model.pt", weights_only=True)
    model = restore_detector(saved, amp=False).eval()
    for name in rows:
        picture, size = data.read_photo(photos / name, saved["image_size"])
        x = data.to_tensor(picture).float() / 255
        found = above(detect(model, [x])[0], 0.05)
        scale = torch.tensor([size[0] / x.shape[2], size[1] / x.shape[1]] * 2)
        mine = [row for row in boxes if row["file"] == name]
        assert int(rows[name]["boxes"]) == len(found["boxes"]) == len(mine)
        shown = [[float(row[key]) for key in ("x1", "y1", "x2", "y2")] for row in mine]
        if mine:
            assert np.allclose(shown, found["boxes"] * scale, atol=0.06)
    as_one = [{k: row[k] for k in row if k != "file"} for row in boxes]
    one, other = ([r for r, b in zip(as_one, boxes, strict=True) if b["file"] == n]
                  for n in ("a/one.png", "alpha $.png"))  # fmt: skip
    assert one == other
    coco = json.loads((out / "detections.json").read_text())
    assert [entry["file_name"] for entry in coco] == [row["file"] for row in boxes]
    x, y, width, height = coco[0]["bbox"]
    assert (x + width, y + height) == pytest.approx(
        (float(boxes[0]["x2"]), float(boxes[0]["y2"])), abs=0.1
    )


def test_tiles_find_in_a_large_photograph_what_is_small_in_it(tmp_path, monkeypatch):
    """A detector that finds white squares of 10 to 20 pixels as it sees them."""
    predict = load_project(PROJECT).predict

    def detect_squares(_: nn.Module, x: list[Tensor]) -> list[dict]:
        rows, columns = (x[0][0] > 0.5).nonzero().T
        if not len(rows) or not 10 <= rows.max() - rows.min() + 1 <= 20:
            return [prediction([], [])]
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        return [prediction([[float(value) for value in box]], [0.9])]

    monkeypatch.setattr(predict, "detect", detect_squares)
    picture = np.zeros((400, 400, 3), np.uint8)
    picture[40:56, 300:316] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    device = torch.device("cpu")
    found, _ = predict.find_litter(None, tmp_path / "a.png", 100, 1, device)
    assert not len(found["boxes"])
    found, size = predict.find_litter(None, tmp_path / "a.png", 100, 4, device)
    assert size == (400, 400)
    assert found["boxes"].tolist() == [pytest.approx([300, 40, 316, 56], abs=1)]


# --- the experiment ---------------------------------------------------------------------------


def experiment(tmp_path: Path, monkeypatch, disturb: str = "") -> dict:
    """Each kind of output of a one-epoch run in which one part of the data was disturbed."""
    train_py = load_project(PROJECT).train
    handed, evaluations = {}, {"val": [], "test": []}
    load_data, evaluate = train_py.load_data, train_py.evaluate

    def disturbed(config: object) -> data.Data:
        found = load_data(config)
        split, _, part = disturb.partition(" ")
        if part == "pictures":
            own = getattr(found, split)
            found = found._replace(**{split: own._replace(x=[255 - x for x in own.x])})
        if part == "boxes":  # those of one picture go
            own = getattr(found, split)
            y = [target([]) if place == 1 else one for place, one in enumerate(own.y)]
            found = found._replace(**{split: own._replace(y=y)})
        return found

    def recorded(model: nn.Module, pictures: data.Pictures, *args: object, **options: object):
        result = evaluate(model, pictures, *args, **options)
        found = [{name: part.tolist() for name, part in one.items()} for one in result.predictions]
        counts = [part.tolist() if isinstance(part, Tensor) else part for part in result.counts]
        evaluations[pictures.names[0].split()[0]].append((found, counts))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train_py, "load_data", disturbed)
        patch.setattr(train_py, "evaluate", recorded)
        for name in ("plot_curves", "plot_precision_recall"):
            patch.setattr(train_py, name, lambda *args, name=name: handed.update({name: args}))
        folder = train(PROJECT, *TINY, "--epochs", 1, "--out_dir", tmp_path / disturb)
    (row,) = read_rows(folder / "history.csv")
    saved = torch.load(folder / "model.pt", weights_only=True)
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    before, after = evaluations["test"]
    return {
        "training": {name: row[name] for name in ("train_loss", *LOSSES)},
        "weights": {name: value.tolist() for name, value in saved["weights"].items()},
        "validation": evaluations["val"],
        "test": after,
        "before": before,
        "handed": handed,
        "metrics": metrics,
        "threshold": saved["threshold"],
    }


MOVES = {  # what may move; all else has to stay equal to the last bit
    "train pictures": {"training", "weights", "validation", "test"},
    "train boxes": {"training", "weights", "validation", "test", "before"},  # anchors fit them
    "val pictures": {"validation"},
    "val boxes": {"validation"},
    "test pictures": {"test", "before"},
    "test boxes": {"test", "before"},
}
OUTPUTS = ("training", "weights", "validation", "test", "before")


def test_each_part_of_the_data_moves_what_it_may_and_nothing_else(tmp_path, monkeypatch):
    whole = experiment(tmp_path, monkeypatch)
    for disturb, may_move in MOVES.items():
        other = experiment(tmp_path, monkeypatch, disturb)
        assert {name for name in OUTPUTS if other[name] != whole[name]} == may_move, disturb
    handed, metrics = whole["handed"], whole["metrics"]
    (row,), *_ = handed["plot_curves"]
    assert str(row["train_loss"]) == whole["training"]["train_loss"]
    curves, point, *_ = handed["plot_precision_recall"]
    assert [*curves] == ["before training: random weights", "after training"]
    assert point == {"confidence": metrics["threshold"]} | metrics["test"]
    assert whole["threshold"] == metrics["threshold"]


def known_case() -> tuple[data.Data, dict[str, list[dict]]]:
    """Data and predictions of which every number is known: see the test."""
    box, far = [[10, 10, 40, 40]], [[50, 50, 90, 90]]
    x = [torch.full((3, 96, 96), i, dtype=torch.uint8) for i in range(6)]

    def pictures(name: str, y: list[dict]) -> data.Pictures:
        ignored = [torch.tensor([[60.0, 0, 90, 30]])] + [torch.zeros(0, 4)] * (len(y) - 1)
        things = [target([])] * 4 + [target(far, [2])] * 2 if name == "test" else []
        names = [f"{name} {i}" for i in range(len(y))]
        return data.Pictures(names, x[: len(y)], y, ignored, things)

    val = pictures("val", [target(box), target(box), target(box), target([])])
    test = pictures("test", [target(box)] * 4 + [target([])] * 2)
    predictions = {
        "val": [
            prediction(box, [0.9]),
            prediction(box, [0.8]),
            prediction(box + far, [0.6, 0.3]),
            prediction(far, [0.7]),
        ],
        "test": [
            prediction(box, [0.95]),
            prediction(box + far, [0.85, 0.82]),
            prediction(box, [0.65]),  # below the working confidence of 0.8, above that of best F1
            prediction(far, [0.9]),
            prediction(far, [0.99]),
            prediction(far, [0.7]),  # between the two confidences
        ],
    }
    return data.Data("made", ("litter",), test, val, test, ""), predictions


def evaluate_known_case(monkeypatch) -> tuple[dict, dict]:
    """The evaluations and metrics.json's numbers; one more detection lies where nothing counts."""
    train_py, (made, predictions) = load_project(PROJECT).train, known_case()
    config = SimpleNamespace(batch_size=4, max_false_positives=0.0)
    evaluated, queue = {}, []
    monkeypatch.setattr(train_py, "detect", lambda _, x: [queue.pop(0) for _ in x])
    for split in ("val", "test"):
        queue += copy.deepcopy(predictions[split])
        queue[0] = prediction([*queue[0]["boxes"].tolist(), [62, 2, 88, 28]], [0.95, 0.97])
        evaluated[split] = train_py.evaluate(small(), getattr(made, split), config)
    return evaluated, train_py.summarise(evaluated, made, config)


def test_every_number_of_the_headline_is_the_known_one(monkeypatch):
    modules = load_project(PROJECT)
    made, predictions = known_case()
    _, metrics = evaluate_known_case(monkeypatch)
    # the box on the clean validation picture has .7, so from .8 on nothing is wrong there
    assert metrics["threshold"] == pytest.approx(0.8)
    assert metrics["best_f1_threshold"] == pytest.approx(0.6)
    headline = modules.train.headline(metrics)
    assert headline["recall"] == 2 / 4
    assert headline["precision"] == 2 / 5
    assert headline["false_positives_per_clean_image"] == 1 / 2
    assert metrics["test"]["best_f1_recall"] == 3 / 4
    assert metrics["test"]["best_f1_precision"] == 3 / 7
    kinds = metrics["confounders_with_false_positive"]
    assert list(kinds.values()) == [0, 0, 1 / 2, 0]  # of two mushrooms, one at .99, one at .7
    assert headline["ap50"] == pytest.approx(brute_force_ap(predictions["test"], made.test.y, 0.5))


def test_plots_are_given_the_evaluations_of_metrics_json(monkeypatch, tmp_path):
    train_py, made = load_project(PROJECT).train, known_case()[0]
    evaluated, metrics = evaluate_known_case(monkeypatch)
    metrics["data"], given = {"start": "nothing"}, {}
    monkeypatch.setattr(train_py, "try_plot", lambda plot, *a: given.update({plot.__name__: a}))
    history, before = [{"epoch": 1}], evaluated["val"]
    train_py.plot_results(before, evaluated, history, made, metrics, tmp_path)
    assert given["plot_curves"][0] is history
    curves, point = given["plot_precision_recall"][:2]
    assert curves["before training: nothing"] is before.precision
    assert curves["after training"] is evaluated["test"].precision
    assert (point["confidence"], point["precision"]) == (metrics["threshold"], 2 / 5)
    for split, (confidence, _) in given["plot_f1"][0].items():
        assert confidence is evaluated[split].counts.confidence
    assert list(given["plot_f1"][0]) == ["val", "test"] and given["plot_f1"][1] is metrics
    for name in ("plot_detections", "plot_mistakes"):
        assert given[name][0] is made.test.x
    shown = [[len(boxes) for boxes in one] for one in given["plot_detections"][1]]
    assert shown == [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0]]
    wrong, misses = given["plot_mistakes"][1:3]
    assert [number for _, number, _ in wrong] == [4, 3, 1]
    assert sorted(number for _, number, _ in misses) == [2, 3]


def test_the_headline_is_what_the_saved_network_gives_on_the_test_pictures():
    folder, *_ = tiny_run(PROJECT)
    report = json.loads((folder / "metrics.json").read_text())
    saved = torch.load(folder / "model.pt", weights_only=True)
    model = restore_detector(saved, load_project(PROJECT).train.use_bfloat16(
        SimpleNamespace(precision="auto", device="cpu"))).eval()  # fmt: skip
    pictures, y, _ = scenes.draw_split(2, size=96, count=5, classes=("litter",), seed=0)
    found = [one for part in pictures.split(5) for one in detect(model, list(part.float() / 255))]
    assert report["headline"]["ap50"] == pytest.approx(brute_force_ap(found, y, 0.5), abs=1e-6)
    hits = [hit for score, hit in brute_force_hits(found, y, 0.5) if score >= saved["threshold"]]
    boxes = sum(len(one["boxes"]) for one in y)
    assert report["headline"]["recall"] == pytest.approx(sum(hits) / boxes)
    assert report["headline"]["precision"] == pytest.approx(sum(hits) / max(1, len(hits)))


def settings(**changes: object) -> SimpleNamespace:
    values = {"batch_size": 2, "jitter": 1.2, "lr": 0.01, "weight_decay": 0.1, "warmup": 0.5}
    values |= {"pretrained_lr": 0.02, "pretrained_weight_decay": 0.3}
    return SimpleNamespace(**values | changes)


def some_split() -> data.Pictures:
    torch.manual_seed(3)
    x = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(4)]
    y = [target([[4 * i, 6, 30 + 4 * i, 40]]) for i in range(4)]
    return data.Pictures(list("abcd"), x, y, [torch.zeros(0, 4)] * 4, [])


def test_two_steps_are_those_of_adamw_by_hand_and_their_average():
    train_py, pictures = load_project(PROJECT).train, some_split()
    model, config = small(), settings()
    mine = copy.deepcopy(model).train()
    average = train_py.AveragedModel(model, multi_avg_fn=train_py.get_ema_multi_avg_fn(0.6))
    optimizer, schedule = train_py.make_optimizer(model, False, config, steps=2)
    torch.manual_seed(5)
    row = train_py.train_one_epoch(model, average, pictures, optimizer, schedule, config, "")

    torch.manual_seed(5)
    drawn = data.training_batches(pictures, 2, 1.2, torch.device("cpu"))
    names = [name for name, _ in mine.named_parameters()]
    first, second = (dict.fromkeys(names, 0.0) for _ in range(2))
    mean, total, seen = {}, 0.0, []
    rates = [0.01 * 1 / 2, 0.01]  # half a warm-up of one step, then the top of the cosine
    for step, ((x, y, _), rate) in enumerate(zip(drawn, rates, strict=True), start=1):
        seen += [len(x)]
        loss = sum(mine(x, y).values())
        total += loss.item() * len(x)
        mine.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, weight in mine.named_parameters():
                grad = weight.grad
                weight *= 1 - rate * 0.1  # decay apart from the gradient
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.999 * second[name] + 0.001 * grad**2
                size = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                weight -= rate * first[name] / (1 - 0.9**step) / size
                old = mean.get(name)
                mean[name] = weight.clone() if old is None else 0.6 * old + 0.4 * weight
    assert seen == [2, 2]
    assert row["train_loss"] == pytest.approx(total / 4, rel=1e-4)
    averaged, own = (dict(part.named_parameters()) for part in (average.module, mine))
    for name, weight in model.named_parameters():
        for one, other in ((weight, own[name]), (averaged[name], mean[name])):
            off = (one - other).abs() > 2e-5  # Adam makes a whole step of a gradient near 0
            assert off.double().mean() < 2e-3, name


def test_pretrained_weights_learn_by_sgd_with_momentum_at_their_own_rate():
    train_py = load_project(PROJECT).train
    optimizer, schedule = train_py.make_optimizer(small(), True, settings(warmup=0.0), steps=10)
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.9, 0.3)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])


def test_an_epoch_holds_every_picture_once_in_an_order_that_changes(monkeypatch):
    pictures, orders = some_split(), []
    pictures.ignored[1] = torch.tensor([[50.0, 50, 60, 60]])
    monkeypatch.setattr(data, "augment", lambda x, y, *_: (x.float() / 255, y))
    for seed in (0, 1):
        torch.manual_seed(seed)
        drawn = list(data.training_batches(pictures, 3, 1.0, torch.device("cpu")))
        pairs = [pair for x, y, _ in drawn for pair in zip(x, y, strict=True)]
        for x, one in pairs:
            grey = bool((x[:, 50:60, 50:60] == 128 / 255).all())
            assert grey == (one["boxes"][0, 0].item() == 4)  # nothing is learned from there
        left = [one["boxes"][0, 0].item() for _, one in pairs]
        assert sorted(left) == [0, 4, 8, 12]
        orders.append(left)
    assert orders[0] != orders[1]


def test_the_best_epoch_of_the_average_is_what_is_tested(tmp_path, monkeypatch):
    modules = load_project(PROJECT)
    aps, kept = iter([0.2, 0.5, 0.1]), []
    evaluate = modules.train.evaluate

    def first_validations(model: nn.Module, pictures: data.Pictures, config: object, **o: object):
        result = evaluate(model, pictures, config, **o)
        value = next(aps, None) if pictures.names[0].startswith("val") else None
        kept.append({name: part.clone() for name, part in model.state_dict().items()})
        if value is None:
            return result
        return result._replace(metrics=result.metrics | {"ap": value})

    monkeypatch.setattr(modules.train, "evaluate", first_validations)
    flags = [*TINY, "--epochs", 3, "--compare", "false", "--out_dir", tmp_path]
    train(PROJECT, *flags)
    *validated, val, test = kept
    for name, part in test.items():
        assert torch.equal(part, validated[1][name]) and torch.equal(part, val[name])
    assert any(not torch.equal(part, validated[2][name]) for name, part in test.items())


def test_fit_averages_ends_its_cosine_and_keeps_a_row_as_the_settings_say(tmp_path, monkeypatch):
    """Two epochs of two batches: 3 pictures and 1."""
    train_py, split, rates, asked = load_project(PROJECT).train, some_split(), [], []
    config = settings(batch_size=3, epochs=2, seed=0, ema=0.7, patience=2, warmup=0.0)
    one_epoch, averaging = train_py.train_one_epoch, train_py.get_ema_multi_avg_fn

    def watch(model, average, pictures, optimizer, schedule, *rest):
        row = one_epoch(model, average, pictures, optimizer, schedule, *rest)
        rates.append(schedule.get_last_lr()[0])
        return row

    monkeypatch.setattr(train_py, "train_one_epoch", watch)
    monkeypatch.setattr(
        train_py, "get_ema_multi_avg_fn", lambda decay: asked.append(decay) or averaging(decay)
    )
    numbers = {"ap": 0.1, "ap50": 0.2, "ar100": 0.3}
    monkeypatch.setattr(train_py, "evaluate", lambda *_: SimpleNamespace(metrics=numbers))
    made = data.Data("made", ("litter",), split, split, split, "")
    rows = train_py.fit(small(), made, False, config, tmp_path)
    assert rates == pytest.approx([0.005, 0.0]) and asked == [0.7]
    assert [{name: row[f"val_{name}"] for name in numbers} for row in rows] == [numbers] * 2


def test_the_seed_decides_scenes_and_weights(tmp_path, monkeypatch):
    modules, made, heads, seeds = load_project(PROJECT), known_case()[0], [], []
    monkeypatch.setattr(modules.train, "load", lambda **o: seeds.append(o["seed"]) or made)
    for seed in (1, 1, 2):
        config = config_of(modules, *TINY, "--seed", seed)
        modules.train.load_data(config)
        start = modules.train.new_model(config, made, torch.device("cpu"))
        heads.append(start.model.roi_heads.box_predictor.cls_score.weight)
    assert seeds == [1, 1, 2] and torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    folder = write_folder(tmp_path / "forest")
    assert load(folder, seed=1).test.names != load(folder, seed=2).test.names


def test_the_networks_of_both_stages_export():
    """Not the whole detector: how many boxes it finds depends on the picture."""
    model = small().eval()
    x = torch.rand(1, 3, 96, 96)
    features = model.backbone(x)
    exported = torch.export.export(model.backbone, (x,)).module()(x)
    assert all(torch.allclose(exported[name], part, atol=1e-5) for name, part in features.items())
    regions = torch.rand(5, 64, 7, 7)
    head = nn.Sequential(model.roi_heads.box_head, model.roi_heads.box_predictor)
    again = torch.export.export(head, (regions,)).module()(regions)
    assert all(map(torch.allclose, again, head(regions)))


def test_each_split_has_its_own_place_in_the_metrics(tmp_path, monkeypatch):
    train_py = load_project(PROJECT).train
    evaluate, calls = train_py.evaluate, []

    def marked(model: nn.Module, pictures: data.Pictures, *args: object, **options: object):
        result = evaluate(model, pictures, *args, **options)
        calls.append(pictures.names[0].split()[0])
        return result._replace(metrics=result.metrics | {"ap50": 0.01 * len(calls)})

    monkeypatch.setattr(train_py, "evaluate", marked)
    metrics = metrics_of(train(PROJECT, *TINY, "--epochs", 1, "--out_dir", tmp_path))
    assert calls == ["test", "val", "val", "test"]  # before, the epoch's, and at the end both
    found = [metrics[name]["ap50"] for name in ("before", "val", "test")]
    assert found == [0.01, 0.03, 0.04] and metrics["ap50"] == 0.04


def test_powers_of_ten_on_an_axis_are_set_as_such_and_a_dollar_in_a_name_is_none(tmp_path):
    """A title is plain text, as it may hold a name; the ticks of a logarithmic axis are not."""
    plots = load_project("faster_rcnn_litter").plots
    assert plots.plt.rcParams["text.parse_math"]
    row = dict.fromkeys((*plots.PARTS, "train_loss", "val_ap", "val_ap50"), 0.1) | {"epoch": 1}
    plots.plot_curves([row, row | {"epoch": 2}], "a $\\x folder$", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()
