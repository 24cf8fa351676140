"""One trunk with two heads, triplet mining, the triplet loss, and what is measured of a map.

Hermans, Beyer & Leibe 2017, "In Defense of the Triplet Loss for Person Re-Identification" (equation
numbers are theirs); semi-hard negatives: Schroff et al. 2015, "FaceNet"; MAP@R: Musgrave et al.
2020, "A Metric Learning Reality Check"; ResNet: He et al. 2016.
"""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Outputs(NamedTuple):
    """Class logits (N, C), embeddings (N, D), and the trunk's features (N, F) under both."""

    logits: Tensor
    embedding: Tensor
    features: Tensor


class TwoHeads(nn.Module):
    """Images (N, 3, H, W) in [0, 1] to Outputs in float32; both heads read the same features.

    The embedding is not normalised: a unit sphere in two dimensions is a mere circle. A pretrained
    trunk always stays in evaluation mode: small sets would spoil its batch statistics.
    """

    def __init__(
        self,
        trunk: nn.Module,
        width: int,
        *,
        classes: int,
        embedding_size: int,
        pretrained: bool = False,
    ):
        super().__init__()
        self.trunk, self.pretrained = trunk, pretrained
        self.classify = nn.Linear(width, classes)
        self.embed = nn.Sequential(
            nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, embedding_size)
        )
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, x: Tensor, *, half: bool = False) -> Outputs:
        x = ((x - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            features = self.trunk(x)
        features = features.float()  # distances need float32's digits
        return Outputs(self.classify(features), self.embed(features), features)

    def train(self, mode: bool = True) -> "TwoHeads":
        super().train(mode)
        self.trunk.train(mode and not self.pretrained)
        return self

    def freeze_trunk(self, frozen: bool) -> None:
        self.trunk.requires_grad_(not frozen)


# --- trunks -----------------------------------------------------------------------------------


def make_trunk(
    resnet: str,
    widths: tuple[int, ...],
    *,
    state: dict[str, Tensor] | None = None,
    program: bytes | None = None,
) -> nn.Module:
    """What gives features (N, F): the small network, a torchvision classifier without its last
    layer, with weights of `state` if given, or an exported program, the content of a .pt2 file.

    Raises ValueError if there is no such network.
    """
    if program is not None:
        try:
            return Exported(program)
        except Exception as error:  # zipfile, json, pickle and torch each have their own
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"not a program of torch.export that can be loaded ({reason})"
            ) from error
    if resnet == "small":
        return small_resnet(widths)
    from torchvision import models  # imported where it is used: it is slow

    if resnet not in models.list_models(module=models):
        raise ValueError(f"'{resnet}' is neither small, nor a classifier of torchvision, nor .pt2")
    trunk = models.get_model(resnet, weights=None)
    if state is not None:
        trunk.load_state_dict(state)
    linear = [name for name, part in trunk.named_modules() if isinstance(part, nn.Linear)]
    if linear:  # else, as in squeezenet, the logits serve as features
        trunk.set_submodule(linear[-1], nn.Identity())
    return nn.Sequential(trunk, FirstOutput())


class FirstOutput(nn.Module):
    """Of networks with auxiliary outputs in training the first; flat."""

    def forward(self, x: Tensor | tuple) -> Tensor:
        return (x[0] if isinstance(x, tuple) else x).flatten(1)


class Exported(nn.Module):
    """A program of torch.export: images to features (N, F) or (N, F, h, w), which are averaged."""

    def __init__(self, program: bytes):
        super().__init__()
        self.program = torch.export.load(io.BytesIO(program)).module()

    def forward(self, x: Tensor) -> Tensor:
        features = self.program(x)
        return features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)

    def train(self, mode: bool = True) -> "Exported":
        self.training = mode  # a program has the mode in which it was exported
        return self


@torch.no_grad()
def trunk_width(trunk: nn.Module, image_size: int) -> int:
    """F. Raises ValueError if the trunk takes no pictures of this size."""
    try:
        return trunk.eval()(torch.zeros(2, 3, image_size, image_size)).shape[1]
    except Exception as error:  # each network has its own complaint
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no features of pictures of {image_size} pixels ({reason})") from error


def small_resnet(widths: tuple[int, ...]) -> nn.Sequential:
    """A convolution at full resolution, then a block of two convolutions for each width; each block
    halves the resolution.
    """
    from torchvision.models.resnet import BasicBlock

    layers = [plain_conv(3, widths[0], 3, 1), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    for before, width in zip((widths[0], *widths), widths, strict=False):
        # a strided 1x1 convolution, in two steps: the one step writes past its memory on CPUs with
        # AVX2, if it has less than 8 channels (oneDNN issue 6035)
        every = nn.MaxPool2d(1, 2)
        shortcut = nn.Sequential(every, plain_conv(before, width, 1, 1), nn.BatchNorm2d(width))
        layers.append(BasicBlock(before, width, 2, shortcut))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def plain_conv(before: int, after: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, size // 2, bias=False)


# --- distances --------------------------------------------------------------------------------


def pair_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M) of rows, by one multiplication in float64, where its cancellation
    costs nothing. Where two coincide the gradient is 0; that of a square root is not finite there.
    """
    wide, other = a.double(), b.double()
    norms = wide.square().sum(1)[:, None] + other.square().sum(1)
    square = norms - 2 * wide @ other.T
    apart = square > 1e-14 * norms
    return (torch.where(apart, square, 1).sqrt() * apart).to(a.dtype)


def other_pairs(count: int, device: torch.device) -> Tensor:
    """(count, count): whether two rows are different ones."""
    return ~torch.eye(count, dtype=torch.bool, device=device)


def relative(distance: Tensor) -> Tensor:
    """Distances (N, N) in units of their mean over all pairs: a larger or smaller map of the same
    shape has the same loss, so that neither growth nor collapse is rewarded.
    """
    count = len(distance)
    return distance / (distance.sum() / max(1, count * (count - 1))).clamp(min=1e-12)


@torch.no_grad()
def within_to_between(distance: Tensor, y: Tensor) -> Tensor:
    """() The mean distance of two of one class by that of two of different ones: 1 of a map without
    any order (or without such pairs), 0 where each class is a point.
    """
    same = y[:, None] == y
    positive = same & other_pairs(len(y), y.device)
    within, between = ((distance * where).sum() / where.sum() for where in (positive, ~same))
    ratio = within / between.clamp(min=1e-12)
    return torch.where(ratio.isnan(), 1, ratio)


# --- mining and loss --------------------------------------------------------------------------


class Triplets(NamedTuple):
    """Row numbers (T,) in a batch of anchor, positive and negative."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


@torch.no_grad()
def mine(distance: Tensor, y: Tensor, mining: str) -> Triplets:
    """Triplets of a batch with distances (N, N) and classes y (N,); none for an anchor that lacks
    a positive (another row of its class) or a negative.

    hard      per anchor the farthest positive and the nearest negative: "batch hard", eq. 5
    semihard  per anchor and positive the nearest negative that is farther than the positive
    """
    same = y[:, None] == y
    positive = same & other_pairs(len(y), y.device)
    if mining == "hard":
        far = distance.masked_fill(~positive, -1).max(1)
        near = distance.masked_fill(same, math.inf).min(1)
        anchor = ((far.values >= 0) & (near.values < math.inf)).nonzero()[:, 0]
        return Triplets(anchor, far.indices[anchor], near.indices[anchor])
    anchor, other = positive.nonzero().T
    near, order = distance.masked_fill(same, math.inf).sort(1)
    place = torch.searchsorted(near, distance.masked_fill(~positive, math.inf), right=True)
    place = place[anchor, other].clamp(max=len(y) - 1)
    found = near[anchor, place] < math.inf
    found &= near[anchor, place] > distance[anchor, other]
    return Triplets(*(part[found] for part in (anchor, other, order[anchor, place])))


def margin_loss(gap: Tensor, margin: float | None) -> Tensor:
    """max(gap + margin, 0) of gap = d(a, p) - d(a, n); without a margin the soft one,
    ln(1 + exp(gap)).
    """
    return F.softplus(gap) if margin is None else (gap + margin).clamp(min=0)


def mined_gaps(distance: Tensor, y: Tensor, mining: str) -> Tensor:
    """d(a, p) - d(a, n) (T,) of each mined triplet."""
    anchor, positive, negative = mine(distance, y, mining)
    return distance[anchor, positive] - distance[anchor, negative]


def all_gaps(distance: Tensor, y: Tensor) -> Tensor:
    """d(a, p) - d(a, n) (T,) of every triplet of the batch: "batch all", eq. 6."""
    same = y[:, None] == y
    anchor, positive = (same & other_pairs(len(y), y.device)).nonzero().T
    gap = distance[anchor, positive][:, None] - distance[anchor]
    return gap.masked_select(~same[anchor])


class Mined(NamedTuple):
    """() The batch's triplet loss, the share of active triplets, and that of batch hard in it."""

    loss: Tensor
    active: Tensor
    hard_share: Tensor


def triplet_loss(distance: Tensor, y: Tensor, mining: str, margin: float | None) -> Mined:
    """Of a batch with distances (N, N). `gradual` goes from `all` to `hard` as the map opens:
    (1 - h) all + h hard, with h the share of anchors that reach the goal of batch hard, farthest
    positive nearer than nearest negative.

    Batch hard alone collapses: on a map without order its gradients, of outliers only, pull all
    together. With h it begins where there is order, and is left again should the order be lost.
    """
    if mining in ("hard", "semihard"):
        losses = margin_loss(mined_gaps(distance, y, mining), margin)
        share = torch.full_like(distance[0, 0], float(mining == "hard"))
        return Mined(mean_or_zero(losses, distance), active_share(losses, margin), share)
    losses = margin_loss(all_gaps(distance, y), margin)
    loss, share = mean_or_zero(losses[losses > 0], distance), torch.zeros_like(distance[0, 0])
    if mining == "gradual" and len(losses):
        gaps = mined_gaps(distance, y, "hard")
        share = (gaps.detach() < 0).to(distance.dtype).mean()
        loss = (1 - share) * loss + share * margin_loss(gaps, margin).mean()
    return Mined(loss, active_share(losses, margin), share)


def mean_or_zero(losses: Tensor, distance: Tensor) -> Tensor:
    """The mean of losses (T,); of none 0, with a gradient of 0."""
    return losses.mean() if len(losses) else 0 * distance.sum()


def active_share(losses: Tensor, margin: float | None) -> Tensor:
    """() The share of triplets (T,) that still push; with the soft margin, which never quite lets
    go, of those whose negative is nearer than the positive.
    """
    active = losses.detach() > (math.log(2) if margin is None else 0)
    return active.float().sum() / max(1, len(losses))


def collapsed(ratio: float, mean_distance: float, unit: float) -> bool:
    """Whether a map is lost: its classes lie as near to one another as to themselves, or all of it
    is a point, of less than a tenth of `unit`, the distance that its loss asks for.
    """
    return ratio > 0.9 or mean_distance < 0.1 * unit


# --- retrieval --------------------------------------------------------------------------------


def nearest(queries: Tensor, gallery: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances and row numbers (Q, count) of the nearest rows of the gallery, the nearest first;
    fewer if there are fewer.
    """
    parts = [
        pair_distances(block, gallery).topk(min(count, len(gallery)), largest=False)
        for block in queries.split(256)
    ]
    distances, rows = zip(*parts, strict=True)
    return torch.cat(distances), torch.cat(rows)


def retrieval_scores(
    queries: Tensor, query_y: Tensor, gallery: Tensor, gallery_y: Tensor
) -> dict[str, float]:
    """precision@1: the share of queries whose nearest row is of their class. MAP@R: over the R
    nearest rows, R as many as the gallery has of the class, the mean precision at the places of
    rows of the class, a miss counted as 0. Queries whose class the gallery lacks count as missed.
    """
    right = average = 0.0
    for block, y in zip(queries.split(256), query_y.split(256), strict=True):
        order = pair_distances(block, gallery).argsort(dim=1, stable=True)
        hits = (gallery_y[order] == y[:, None]).double()
        total = hits.sum(1, keepdim=True)
        rank = torch.arange(1, len(gallery) + 1, device=y.device)
        kept = hits * (rank <= total)
        average += float((kept.cumsum(1) / rank * kept).sum(1).div(total[:, 0].clamp(min=1)).sum())
        right += float(hits[:, 0].sum())
    return {"precision_at_1": right / len(queries), "map_at_r": average / len(queries)}


def in_plane(points: Tensor) -> Callable[[Tensor], np.ndarray]:
    """What takes points (M, D) to the plane: principal components of `points`, if D is over 2."""
    from sklearn.decomposition import PCA  # imported where it is used: it is slow

    if points.shape[1] == 2:
        return lambda others: others.cpu().numpy()
    components = PCA(2).fit(points.cpu().numpy())
    return lambda others: components.transform(others.cpu().numpy())
