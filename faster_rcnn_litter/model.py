"""Faster R-CNN of torchvision's parts, for few objects in a picture and machines without a GPU.

Ren, He, Girshick & Sun 2015, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal
Networks", over a feature pyramid (Lin et al. 2017). Deviations for `small`: group normalisation
(Wu & He 2018), a pyramid of 64 channels that begins at stride 8, a box head of 128 features, and
only as many sampled regions as a picture with a handful of objects needs.

torchvision is imported where it is used: it is slow, and --help should not wait for it.
"""

import contextlib
import io
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors, as in section 3.1.1
WIDTHS = (24, 32, 64, 96, 128)  # channels at strides 2, 4, 8, 16, 32
BLOCKS = (0, 1, 1, 2, 1)  # residual blocks at each of them
PYRAMID, BOX_HEAD = 64, 128  # channels; features of a region
POOLED = 1.0  # share of the picture's side from which boxes are pooled at stride 16
LOSSES = ("objectness", "rpn_box_reg", "classifier", "box_reg")
MATCH = 0.5  # IoU from which a prediction has found an annotated box


class Sampling(NamedTuple):
    """How many boxes of a picture the stages look at."""

    anchors: int  # in the loss of the first stage
    regions: int  # in the loss of the second stage
    proposals: int  # handed from the first stage to the second in training
    test_proposals: int  # and in prediction


FEW = Sampling(anchors=256, regions=64, proposals=250, test_proposals=150)  # of small
MANY = Sampling(anchors=256, regions=512, proposals=2000, test_proposals=1000)  # torchvision's


# --- the network ------------------------------------------------------------------------------


def normalised(inputs: int, channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and group normalisation in groups of 8 channels."""
    convolution = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(channels // 8, channels))


class Residual(nn.Module):
    """The basic block of He et al. 2016, (N, C, H, W) to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = normalised(channels, channels)
        self.second = normalised(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.first(x).relu())).relu()


class LightBackbone(nn.Module):
    """{"0", "1", "2"}: features (N, 64, H / s, W / s) at s = 8, 16, 32 of pictures (N, 3, H, W)."""

    out_channels = PYRAMID

    def __init__(self) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        self.stages = nn.ModuleList()
        for inputs, width, blocks in zip((3, *WIDTHS[:-1]), WIDTHS, BLOCKS, strict=True):
            down = nn.Sequential(normalised(inputs, width, stride=2), nn.ReLU())
            self.stages.append(nn.Sequential(down, *(Residual(width) for _ in range(blocks))))
        self.fpn = FeaturePyramidNetwork(WIDTHS[2:], PYRAMID)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return self.fpn(OrderedDict((str(i), part) for i, part in enumerate(features[2:])))


def make_detector(
    architecture: str, *, classes: int, sides: list[float], image_size: int, coco: bool = False
) -> nn.Module:
    """`small` with random weights, or one of torchvision's, with COCO weights if `coco`.

    `classes` counts the background, label 0. `sides` are those of small's anchors in pixels, at
    strides 8, 16, 32; torchvision's networks keep the anchors of their weights. COCO weights come
    from torch.hub's folder with their head of 91 classes, and with batch normalisation frozen.
    """
    from torchvision.models import detection

    sampling = FEW if architecture == "small" else MANY
    options = {
        "rpn_batch_size_per_image": sampling.anchors,
        "box_batch_size_per_image": sampling.regions,
        "rpn_pre_nms_top_n_train": 2 * sampling.proposals,
        "rpn_post_nms_top_n_train": sampling.proposals,
        "rpn_pre_nms_top_n_test": 2 * sampling.test_proposals,
        "rpn_post_nms_top_n_test": sampling.test_proposals,
        "rpn_score_thresh": 0.0,
        "box_score_thresh": 0.01,  # precision is wanted at every recall
    }
    if architecture == "small":
        model = small_detector(classes, sides, image_size, options)
    else:
        make = getattr(detection, f"fasterrcnn_{architecture}")
        if coco:
            model = freeze_batchnorm(make(weights="DEFAULT", progress=False, **options))
        else:
            model = make(weights=None, weights_backbone=None, num_classes=classes, **options)
    model.transform.resize = lambda image, target=None: (image, target)  # data.py did that
    return model


def small_detector(classes: int, sides: list[float], image_size: int, options: dict) -> nn.Module:
    """A box is pooled at stride 8 below POOLED of the picture's side, at 16 below twice that."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    return FasterRCNN(
        LightBackbone(),
        rpn_anchor_generator=AnchorGenerator([(side,) for side in sides], (RATIOS,) * len(sides)),
        box_roi_pool=MultiScaleRoIAlign(
            ["0", "1", "2"],
            output_size=7,
            sampling_ratio=1,
            canonical_scale=max(1, round(POOLED * image_size)),
        ),
        box_head=TwoMLPHead(PYRAMID * 7**2, BOX_HEAD),
        box_predictor=FastRCNNPredictor(BOX_HEAD, classes),
        **options,
    )


def replace_head(model: nn.Module, classes: int) -> None:
    """A fresh last layer for `classes` classes, background among them; all else stays."""
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    inputs = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FastRCNNPredictor(inputs, classes)


def freeze_batchnorm(module: nn.Module, eps: float | None = None) -> nn.Module:
    """`module` with a fixed scale and shift in place of each BatchNorm2d, with its eps or `eps`.

    Statistics of two pictures are noise. Without gradients alone, such a layer would still
    normalise by them in train mode, and move its running mean and variance.
    """
    from torchvision.ops import FrozenBatchNorm2d

    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = FrozenBatchNorm2d(child.num_features, child.eps if eps is None else eps)
            fixed.load_state_dict(child.state_dict())
            setattr(module, name, fixed)
        else:
            freeze_batchnorm(child, eps)
    return module


def frozen_eps(model: nn.Module) -> float | None:
    """Frozen batch normalisation's eps, which no state dict holds; None if nothing is frozen."""
    from torchvision.ops import FrozenBatchNorm2d

    eps = [part.eps for part in model.modules() if isinstance(part, FrozenBatchNorm2d)]
    return eps[0] if eps else None


class Mixed(nn.Module):
    """`inner`, under autocast if `amp`; what it returns is float32.

    Not the whole network: torchvision gives boxes the type of the features and of the first
    stage's output, and bfloat16 has only 8 bits for a coordinate.
    """

    def __init__(self, inner: nn.Module, amp: bool):
        super().__init__()
        self.inner, self.amp = inner, amp

    def forward(self, x: Tensor | list[Tensor]) -> dict[str, Tensor] | tuple[list[Tensor], ...]:
        device = x.device if isinstance(x, Tensor) else x[0].device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
            out = self.inner(x)
        if isinstance(out, dict):
            return OrderedDict((name, part.float()) for name, part in out.items())
        return tuple([part.float() for part in parts] for parts in out)


def mix_precision(model: nn.Module, amp: bool) -> nn.Module:
    """Convolutions over whole pictures in bfloat16 if `amp`, what computes boxes in float32."""
    model.backbone = Mixed(model.backbone, amp)
    model.rpn.head = Mixed(model.rpn.head, amp)
    return model


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as torchvision names it, without the wrapper of mix_precision."""
    return {name.replace(".inner.", "."): part for name, part in model.state_dict().items()}


def restore_detector(saved: dict, amp: bool) -> nn.Module:
    """The network of a run's model.pt, with batch normalisation frozen if it was."""
    model = make_detector(
        saved["architecture"],
        classes=1 + len(saved["classes"]),
        sides=saved["sides"],
        image_size=saved["image_size"],
    )
    if saved["eps"] is not None:
        freeze_batchnorm(model, saved["eps"])
    model.load_state_dict(saved["weights"])
    return mix_precision(model, amp)


# --- several processes ------------------------------------------------------------------------


class WholeBatchSampler:
    """torchvision's choice of anchors or regions, as one process makes it for the whole batch; of
    `world` processes each has the pictures rank, rank + world, ... of it.

    How much is drawn for a picture depends on it, so all processes draw for all. `share` is this
    process's part of what was chosen in the last call: the weight of its mean in the batch's.
    """

    def __init__(self, inner: object, rank: int, world: int):
        self.inner, self.rank, self.world = inner, rank, world
        self.blank, self.share = False, 0.0  # whether the only picture is one_blank

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        counts = [[int((one >= 1).sum()), int((one == 0).sum())] for one in matched]
        everyone = [None] * self.world
        torch.distributed.all_gather_object(everyone, [] if self.blank else counts)
        kept, chosen, device = [], [0] * self.world, matched[0].device
        for number in range(sum(map(len, everyone))):
            rank, place = number % self.world, number // self.world
            positive, negative = everyone[rank][place]
            own = rank == self.rank
            other = torch.arange(positive + negative, device=device) < positive
            pair = self.inner([matched[place] if own else other.float()])
            chosen[rank] += int(sum(mask.sum() for (mask,) in pair))
            kept += [[mask for (mask,) in pair]] if own else []
        self.share = chosen[self.rank] / max(1, sum(chosen))
        if self.blank:  # one of it, of weight 0: a mean over nothing would be NaN
            first = torch.arange(len(matched[0]), device=device) == 0
            kept, self.blank = [[torch.zeros_like(first), first]], False
        return tuple(map(list, zip(*kept, strict=True)))


def as_whole_batch(model: nn.Module, rank: int, world: int) -> None:
    """In training, what depends on all pictures of a batch is as if one process had them all: the
    size to which they are padded, and the anchors and regions that are sampled.
    """
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler = WholeBatchSampler(part.fg_bg_sampler, rank, world)
    transform, largest = model.transform, model.transform.max_by_axis

    def max_by_axis(sizes: list[list[int]]) -> list[int]:
        size = torch.tensor(largest(sizes), device=next(model.parameters()).device)
        if transform.training:
            torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)
        return size.tolist()

    transform.max_by_axis = max_by_axis


def one_blank(model: nn.Module) -> tuple[list[Tensor], list[dict]]:
    """A picture for a process that has none of the batch, of which nothing is sampled."""
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler.blank = True
    weight = next(model.parameters())
    boxes, labels = weight.new_zeros(0, 4), weight.new_zeros(0, dtype=torch.int64)
    return [weight.new_zeros(3, 32, 32)], [{"boxes": boxes, "labels": labels}]


# --- anchors ----------------------------------------------------------------------------------


def anchor_overlap(boxes: Tensor, sides: list[float]) -> Tensor:
    """(K,) IoU of each box (K, 4) with the best of the anchors' shapes, centre upon centre."""
    size = boxes[:, 2:] - boxes[:, :2]
    root = torch.tensor(RATIOS, dtype=boxes.dtype).sqrt()
    shapes = torch.stack((1 / root, root), 1)  # width and height of area 1
    anchors = (torch.tensor(sides, dtype=boxes.dtype)[:, None, None] * shapes).flatten(0, 1)
    both = torch.minimum(size[:, None], anchors).prod(2)
    return (both / (size.prod(1)[:, None] + anchors.prod(1) - both)).max(1).values


def fit_anchors(boxes: Tensor) -> list[float]:
    """Sides s, 2 s, 4 s for the three levels; s has the best mean overlap with the boxes (K, 4)."""
    sides = [[s, 2 * s, 4 * s] for s in range(6, 65)]
    overlaps = torch.stack(
        [anchor_overlap(boxes, list(map(float, three))).mean() for three in sides]
    )
    return list(map(float, sides[int(overlaps.argmax())]))


# --- losses and predictions -------------------------------------------------------------------


def losses(model: nn.Module, x: list[Tensor], y: list[dict]) -> dict[str, Tensor]:
    """The four parts, by LOSSES' names, whose sum is minimised; the model has to be in train mode.

    x: float pictures (3, H, W) in [0, 1]; y: for each "boxes" float (K, 4) and "labels" long (K,)
    from 1 on, K may be 0. Of several processes each has its addend. Each stage has the two parts of
    eq. 1: cross-entropy over sampled anchors (in the second stage regions), and smooth L1 of the
    offsets of eq. 2 over those on a thing.
    """
    if not model.training:
        raise RuntimeError("losses need train mode")
    network = getattr(model, "module", model)  # which DistributedDataParallel may wrap
    parts = model(x, y) if x else model(*one_blank(network))
    means = [parts[f"loss_{name}"] for name in LOSSES]
    if isinstance(network.rpn.fg_bg_sampler, WholeBatchSampler):
        first, second = network.rpn.fg_bg_sampler.share, network.roi_heads.fg_bg_sampler.share
        shares = (first, first, second, second)
        means = [mean * share for mean, share in zip(means, shares, strict=True)]
    return dict(zip(LOSSES, means, strict=True))


@torch.no_grad()
def detect(model: nn.Module, x: list[Tensor]) -> list[dict[str, Tensor]]:
    """For each picture "boxes" (K, 4), "labels" (K,), "scores" (K,), best first; in eval mode."""
    if model.training:
        raise RuntimeError("predictions need eval mode")
    return [{name: part.cpu() for name, part in one.items()} for one in model(x)]


def overlap_area(boxes: Tensor, others: Tensor) -> Tensor:
    """(K, M) area that boxes (K, 4) and others (M, 4) have in common."""
    low = torch.maximum(boxes[:, None, :2], others[:, :2])
    high = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    return (high - low).clamp(min=0).prod(2)


def tile_corners(size: tuple[int, int], tiles: int) -> list[tuple[int, int, int, int]]:
    """left, top, right, bottom of tiles x tiles parts of a picture of that width and height, which
    overlap by a quarter of their side.
    """
    spans = []
    for length in size:
        side = min(length, math.ceil(length / (1 + 0.75 * (tiles - 1))))
        starts = [round(i * (length - side) / max(1, tiles - 1)) for i in range(tiles)]
        spans.append([(start, start + side) for start in starts])
    return [(left, top, right, bottom) for top, bottom in spans[1] for left, right in spans[0]]


def cut_off(boxes: Tensor, tile: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """(K,) whether boxes (K, 4) end at a border of their tile that is none of the picture's."""
    edges = torch.tensor(tile, dtype=boxes.dtype)
    inner = edges != torch.tensor([0, 0, *size])
    return ((boxes - edges).abs() <= 1)[:, inner].any(1)


def join_tiles(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The predictions of all tiles, best first; of boxes of one class that overlap by half, the
    best stays. A "cut" box goes if another of its class covers most of it.
    """
    from torchvision.ops import batched_nms, box_area

    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    area, cut = box_area(joined["boxes"]), joined.pop("cut")
    both = overlap_area(joined["boxes"], joined["boxes"])
    covers = (both > 0.7 * area[:, None]) & (area[None] > area[:, None])
    covers &= joined["labels"][:, None] == joined["labels"]
    joined = {name: part[~(cut & covers.any(1))] for name, part in joined.items()}
    stays = batched_nms(joined["boxes"], joined["scores"], joined["labels"], 0.5)
    return {name: part[stays] for name, part in joined.items()}


def as_one_class(predictions: list[dict]) -> list[dict]:
    """COCO's classes all taken for litter; of boxes that then overlap by half, the best stays."""
    from torchvision.ops import nms

    merged = []
    for one in predictions:
        stays = nms(one["boxes"], one["scores"], 0.5)
        boxes, scores = one["boxes"][stays], one["scores"][stays]
        labels = torch.ones(len(stays), dtype=torch.int64)
        merged.append({"boxes": boxes, "labels": labels, "scores": scores})
    return merged


# --- metrics ----------------------------------------------------------------------------------


def coco_metrics(
    predictions: list[dict], y: list[dict], ignored: list[Tensor] | None = None
) -> tuple[dict, list[float]]:
    """pycocotools' AP and AR over all pictures, clean ones too, and the precision at IoU 0.5.

    The precision is at recall 0, 0.01, ..., 1, a mean over classes. Sizes are in pixels as the
    network sees them: small below 32 x 32, large from 96 x 96 on. What has no boxes is None; so is
    everything if there is no box at all. In the boxes (M, 4) of `ignored` nothing counts.
    """
    from pycocotools.cocoeval import COCOeval  # imported where it is used: it is slow

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(as_coco(y, ignored), as_coco(predictions), "bbox")
        evaluation.params.imgIds = list(range(len(y)))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    names += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
    stats = [float(value) if value >= 0 else None for value in evaluation.stats]
    metrics = dict(zip(names, stats, strict=True))
    curves = evaluation.eval["precision"][..., 0, 2]  # (IoU, 101, classes), -1 without boxes
    there = (curves >= 0).all((0, 1))
    labels = [label for label, seen in zip(evaluation.params.catIds, there, strict=True) if seen]
    by_class = curves[..., there].mean((0, 1)).tolist()
    metrics["ap_per_label"] = dict(zip(map(str, labels), by_class, strict=True))
    precision = curves[0][:, there].mean(1).tolist() if there.any() else [0.0] * 101
    return metrics, precision


def as_coco(pictures: list[dict], ignored: list[Tensor] | None = None) -> object:
    """pycocotools' data set; ignored boxes are crowds of each label that occurs."""
    from pycocotools.coco import COCO

    rows = []
    for number, one in enumerate(pictures):
        scores = one.get("scores", torch.ones(len(one["boxes"])))
        for box, label, score in zip(
            *(v.tolist() for v in (one["boxes"], one["labels"], scores)), strict=True
        ):
            x1, y1, x2, y2 = box
            row = {"id": len(rows) + 1, "image_id": number, "category_id": label, "score": score}
            row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            rows.append(row)
    labels = sorted({label for one in pictures for label in one["labels"].tolist()} or {1})
    for number, boxes in enumerate(ignored or ()):
        for x1, y1, x2, y2 in boxes.tolist():
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            for label in labels:
                place = {"id": len(rows) + 1, "image_id": number, "category_id": label}
                rows.append(place | box | {"iscrowd": 1})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(len(pictures))],
        "annotations": rows,
        "categories": [{"id": label} for label in labels],
    }
    coco.createIndex()
    return coco


def match(prediction: dict, y: dict) -> Tensor:
    """(K,) for each prediction, best first, the annotated box that it found and no better one had.

    -1 if none. Of the boxes of its class it takes the one it overlaps most, as pycocotools does.
    """
    from torchvision.ops import box_iou

    overlap = box_iou(prediction["boxes"], y["boxes"])
    overlap = overlap * (prediction["labels"][:, None] == y["labels"][None])
    found = torch.full((len(overlap),), -1)
    for place in range(len(overlap) if overlap.shape[1] else 0):
        best = int(overlap[place].argmax())
        if overlap[place, best] >= MATCH:
            found[place] = best
            overlap[:, best] = 0
    return found


def outside(prediction: dict, ignored: Tensor) -> dict:
    """The predictions of a picture of which less than half lies in an ignored box (M, 4)."""
    from torchvision.ops import box_area

    inside = overlap_area(prediction["boxes"], ignored)
    stays = (2 * inside < box_area(prediction["boxes"])[:, None]).all(1)
    return {name: part[stays] for name, part in prediction.items()}


class Counts(NamedTuple):
    """What is counted at each confidence (T,) that a prediction has, highest first."""

    confidence: Tensor
    found: Tensor
    predicted: Tensor
    on_clean: Tensor  # predictions on pictures without litter
    truth: int  # annotated boxes in all
    clean: int  # pictures without litter


def count(predictions: list[dict], y: list[dict]) -> Counts:
    scores = torch.cat([one["scores"] for one in predictions]).double()
    found = torch.cat([match(*pair) >= 0 for pair in zip(predictions, y, strict=True)])
    clean = torch.tensor([not len(one["boxes"]) for one in y])
    on_clean = clean.repeat_interleave(torch.tensor([len(one["scores"]) for one in predictions]))
    order = scores.argsort(descending=True, stable=True)
    scores, found, on_clean = scores[order], found[order], on_clean[order]
    last = torch.ones(len(scores), dtype=torch.bool)  # of those with one and the same confidence
    last[:-1] = scores[:-1] != scores[1:]
    return Counts(
        confidence=scores[last],
        found=found.cumsum(0)[last],
        predicted=torch.arange(1, len(scores) + 1)[last],
        on_clean=on_clean.cumsum(0)[last],
        truth=sum(len(one["boxes"]) for one in y),
        clean=int(clean.sum()),
    )


def f1_scores(counts: Counts) -> Tensor:
    """(T,) 2 TP / (2 TP + FP + FN) of the predictions from each confidence on."""
    return 2 * counts.found / (counts.predicted + counts.truth)


def working_confidence(counts: Counts, max_false_positives: float = float("inf")) -> float:
    """That of the best F1 among those with at most so many false positives per clean picture.

    1 if there is none, so that nothing is reported.
    """
    allowed = counts.on_clean <= max_false_positives * max(counts.clean, 1e-300)
    if not allowed.any():
        return 1.0
    return float(counts.confidence[torch.where(allowed, f1_scores(counts), -1).argmax()])


def at_confidence(counts: Counts, threshold: float) -> dict[str, float | None]:
    """Precision, recall, F1, false positives per clean picture of predictions from `threshold`."""
    place = int((counts.confidence >= threshold).sum()) - 1
    columns = (counts.found, counts.predicted, counts.on_clean)
    found, predicted, on_clean = (int(c[place]) if place >= 0 else 0 for c in columns)
    return {
        "precision": found / max(predicted, 1),
        "recall": found / max(counts.truth, 1),
        "f1": 2 * found / max(predicted + counts.truth, 1),
        "false_positives_per_clean_image": on_clean / counts.clean if counts.clean else None,
    }


def false_positives_on(
    confounders: list[dict], kept: list[dict], y: list[dict], kinds: int
) -> tuple[list[int], list[int]]:
    """By kind, how many confounders there are, and on how many of them is a false positive: its
    centre lies in their box.
    """
    there, taken = torch.zeros(2, kinds, dtype=torch.int64)
    for thing, one, truth in zip(confounders, kept, y, strict=True):
        wrong = one["boxes"][match(one, truth) < 0]
        centre = (wrong[:, None, :2] + wrong[:, None, 2:]) / 2
        inside = ((centre > thing["boxes"][:, :2]) & (centre < thing["boxes"][:, 2:])).all(2).any(0)
        there += torch.bincount(thing["labels"], minlength=kinds)
        taken += torch.bincount(thing["labels"][inside], minlength=kinds)
    return there.tolist(), taken.tolist()


def above(prediction: dict, threshold: float) -> dict:
    """The predictions of a picture whose confidence is at least `threshold`."""
    return {name: part[prediction["scores"] >= threshold] for name, part in prediction.items()}


class Outcome(NamedTuple):
    """Boxes (K, 4) of a picture."""

    hits: Tensor  # predictions that found something
    wrong: Tensor  # false positives
    missed: Tensor  # annotated, not found


def outcome(kept: dict, y: dict) -> Outcome:
    found = match(kept, y)
    missed = torch.ones(len(y["boxes"]), dtype=torch.bool)
    missed[found[found >= 0]] = False
    return Outcome(kept["boxes"][found >= 0], kept["boxes"][found < 0], y["boxes"][missed])


def mistakes(kept: list[dict], y: list[dict]) -> tuple[list[tuple], list[tuple]]:
    """False positives (confidence, picture, box), surest first; missed boxes (best IoU with a
    prediction, picture, box), largest first.
    """
    from torchvision.ops import box_iou

    wrong, misses = [], []
    for number, (one, truth) in enumerate(zip(kept, y, strict=True)):
        scores = one["scores"][match(one, truth) < 0].tolist()
        boxes = outcome(one, truth)
        wrong += [(score, number, box) for score, box in zip(scores, boxes.wrong, strict=True)]
        overlap = box_iou(boxes.missed, one["boxes"])
        best = overlap.max(1).values.tolist() if overlap.shape[1] else [0.0] * len(overlap)
        misses += [(value, number, box) for value, box in zip(best, boxes.missed, strict=True)]
    wrong.sort(key=lambda one: -one[0])
    misses.sort(key=lambda one: -float((one[2][2:] - one[2][:2]).prod()))
    return wrong, misses
