"""One trunk with two heads, triplet mining, and the triplet loss.

Hermans, Beyer & Leibe 2017, "In Defense of the Triplet Loss for Person Re-Identification" (equation
numbers are theirs); semi-hard negatives: Schroff et al. 2015, "FaceNet"; ResNet: He et al. 2016.
"""

import math
from typing import NamedTuple

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

    The embedding is not normalised: a unit sphere in two dimensions is a mere circle.
    """

    def __init__(self, trunk: nn.Module, width: int, *, classes: int, embedding_size: int):
        super().__init__()
        self.trunk = trunk
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


def make_trunk(resnet: str, widths: tuple[int, ...], state: dict | None) -> tuple[nn.Module, int]:
    """torchvision's `resnet` without its last layer, or the small one; and its features' width.

    `state` are pretrained weights, None for random ones.
    """
    from torchvision.models import get_model  # imported where it is used: it is slow

    if resnet == "small":
        return small_resnet(widths), widths[-1]
    trunk = get_model(resnet, weights=None)
    if state is not None:
        trunk.load_state_dict(state)
    width, trunk.fc = trunk.fc.in_features, nn.Identity()
    return trunk, width


def small_resnet(widths: tuple[int, ...]) -> nn.Sequential:
    """A block of two convolutions per width, each at half the resolution of the one before."""
    from torchvision.models.resnet import BasicBlock

    layers = [conv(3, widths[0], 3, 2), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    before = widths[0]
    for number, width in enumerate(widths):
        stride = 1 if number == 0 else 2
        shortcut = None  # the identity, where shapes allow
        if stride != 1 or before != width:
            # a strided 1x1 convolution, in two steps: the one step writes past its memory on CPUs
            # with AVX2, if it has less than 8 channels (oneDNN issue 6035)
            every = nn.MaxPool2d(1, stride)
            shortcut = nn.Sequential(every, conv(before, width, 1, 1), nn.BatchNorm2d(width))
        layers.append(BasicBlock(before, width, stride, shortcut))
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def conv(before: int, after: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, size // 2, bias=False)


# --- mining and loss --------------------------------------------------------------------------


class Triplets(NamedTuple):
    """Row numbers (T,) in a batch of anchor, positive and negative."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


@torch.no_grad()
def mine(embedding: Tensor, y: Tensor, mining: str) -> Triplets:
    """Triplets of a batch (N, D) with the classes y (N,); none for an anchor that lacks a positive
    (another row of its class) or a negative.

    hard      per anchor the farthest positive and the nearest negative: "batch hard", eq. 5
    semihard  per anchor and positive the nearest negative that is farther than the positive
    all       every triplet: "batch all", eq. 6
    """
    distance = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")
    same = y[:, None] == y
    positive = same & ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    if mining == "hard":
        far = distance.masked_fill(~positive, -1).max(1)
        near = distance.masked_fill(same, math.inf).min(1)
        anchor = ((far.values >= 0) & (near.values < math.inf)).nonzero()[:, 0]
        return Triplets(anchor, far.indices[anchor], near.indices[anchor])
    if mining == "semihard":
        anchor, other = positive.nonzero().T
        near, order = distance.masked_fill(same, math.inf).sort(1)
        place = torch.searchsorted(near, distance.masked_fill(~positive, math.inf), right=True)
        place = place[anchor, other].clamp(max=len(y) - 1)
        found = near[anchor, place] < math.inf
        found &= near[anchor, place] > distance[anchor, other]
        return Triplets(*(part[found] for part in (anchor, other, order[anchor, place])))
    return Triplets(*(positive[:, :, None] & ~same[:, None, :]).nonzero().T)


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Distances (T,) of rows; where two coincide the gradient is 0, that of a square root is not
    finite there.
    """
    square = (a - b).square().sum(1)
    apart = square > 0
    return torch.where(apart, square, 1).sqrt() * apart


def triplet_losses(embedding: Tensor, triplets: Triplets, margin: float | None) -> Tensor:
    """Each triplet's loss (T,): max(d(a, p) - d(a, n) + margin, 0); without a margin the soft one,
    ln(1 + exp(d(a, p) - d(a, n))).
    """
    a, p, n = (embedding[rows] for rows in triplets)
    gap = euclidean(a, p) - euclidean(a, n)
    return F.softplus(gap) if margin is None else (gap + margin).clamp(min=0)


def mean_or_zero(losses: Tensor, embedding: Tensor) -> Tensor:
    """The mean of losses (T,); of none 0, with a gradient of 0."""
    return losses.mean() if len(losses) else 0 * embedding.sum()


# --- the watch for collapse -------------------------------------------------------------------


def resting_loss(margin: float | None) -> float:
    """The loss of an embedding that maps everything to one point."""
    return math.log(2) if margin is None else margin


def collapsed(loss: float, mean_distance: float, margin: float | None) -> bool:
    """Whether the loss sits within 5% of its resting point while the batch has shrunk to a point:
    a healthy loss passes that value on its way down, but with distances of the margin's order.
    """
    rest = resting_loss(margin)
    return abs(loss - rest) < 0.05 * rest and mean_distance < 0.1 * rest


def mean_distance(embedding: Tensor) -> Tensor:
    """() Over all pairs of a batch (N, D)."""
    return F.pdist(embedding.detach()).mean()


def active_share(losses: Tensor, margin: float | None) -> Tensor:
    """() The share of mined triplets (T,) that still push; with the soft margin, which never quite
    lets go, of those whose negative is nearer than the positive.
    """
    active = losses.detach() > (math.log(2) if margin is None else 0)
    return active.float().sum() / max(1, len(losses))
