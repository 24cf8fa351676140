"""A small U-Net whose down part can be pretrained as a classifier, its loss and its metrics.

Ronneberger, Fischer & Brox 2015, "U-Net: Convolutional Networks for Biomedical Image
Segmentation". Deviations: padded convolutions, so that output and input agree in size; batch
normalisation; a 1x1 convolution before nearest-neighbour upsampling instead of a transposed one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def double_conv(channels_in: int, channels: int) -> nn.Sequential:
    """Twice convolution 3x3, batch normalisation, ReLU: (N, in, H, W) to (N, channels, H, W)."""
    layers = []
    for inputs in (channels_in, channels):
        layers += [
            nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class Down(nn.Module):
    """Features (N, widths[i], H / 2^i, W / 2^i), finest first, from images (N, 3, H, W)."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        inputs = (3, *widths[:-1])
        self.blocks = nn.ModuleList(map(double_conv, inputs, widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.blocks[0](x)]
        for block in self.blocks[1:]:
            # ceil_mode: an odd last row is kept, and nothing shrinks below one pixel
            features.append(block(F.max_pool2d(features[-1], 2, ceil_mode=True)))
        return features


class Up(nn.Module):
    """Segment logits (N, segments, H, W) from the features of Down."""

    def __init__(self, widths: tuple[int, ...], segments: int):
        super().__init__()
        pairs = list(zip(widths[1:], widths[:-1], strict=True))[
            ::-1
        ]  # (coarse, fine), coarse first
        self.squeezes = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for coarse, fine in pairs)
        self.blocks = nn.ModuleList(double_conv(2 * fine, fine) for _, fine in pairs)
        self.head = nn.Conv2d(widths[0], segments, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        *skips, x = features
        for squeeze, block, skip in zip(self.squeezes, self.blocks, reversed(skips), strict=True):
            # to the skip's own size, which is odd where the coarse map was rounded up
            x = F.interpolate(squeeze(x), size=skip.shape[-2:], mode="nearest")
            x = block(torch.cat((skip, x), 1))
        return self.head(x)


class UNet(nn.Module):
    """Segment logits (N, segments, H, W) from images (N, 3, H, W) in [0, 1] of any H and W."""

    def __init__(self, widths: tuple[int, ...], segments: int):
        super().__init__()
        self.down = Down(widths)
        self.up = Up(widths, segments)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def freeze_down(self, frozen: bool) -> None:
        """Whether training leaves the down part's parameters and buffers as they are."""
        self.down.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "UNet":
        """As in nn.Module, but a frozen down part stays in eval mode.

        requires_grad does not stop batch normalisation, whose running mean and variance move with
        every forward pass in train mode.
        """
        super().train(mode)
        frozen = not any(weight.requires_grad for weight in self.down.parameters())
        self.down.train(mode and not frozen)
        return self


class Classifier(nn.Module):
    """Class logits (N, classes) from images (N, 3, H, W): Down, mean over the pixels, linear."""

    def __init__(self, widths: tuple[int, ...], classes: int):
        super().__init__()
        self.down = Down(widths)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(x)[-1].mean((2, 3)))


class LossSums(NamedTuple):
    """What the segmentation loss is made of; sums of batches may be added up field by field."""

    cross_entropy: Tensor  # over pixels, nats
    pixels: Tensor
    overlap: Tensor  # (C,), sum of p_c over the pixels of class c
    predicted: Tensor  # (C,), sum of p_c over all pixels
    truth: Tensor  # (C,), pixels of class c


def loss_sums(logits: Tensor, target: Tensor, ignore_index: int) -> LossSums:
    """From logits (N, C, H, W) and classes (N, H, W); pixels of `ignore_index` count nowhere."""
    valid = target != ignore_index
    classes = torch.where(valid, target, 0)
    log_probs = logits.log_softmax(1)
    own = log_probs.gather(1, classes[:, None])[:, 0]  # log-probability of the true class
    zeros = own.new_zeros(logits.shape[1])
    index = classes.flatten()
    return LossSums(
        cross_entropy=-torch.where(valid, own, 0).sum(),
        pixels=valid.sum(),
        overlap=zeros.scatter_add(0, index, torch.where(valid, own.exp(), 0).flatten()),
        predicted=(log_probs.exp() * valid[:, None]).sum((0, 2, 3)),
        truth=zeros.scatter_add(0, index, valid.flatten().to(own.dtype)),
    )


def segmentation_loss(sums: LossSums) -> Tensor:
    """Cross-entropy plus soft Dice loss, a mean over the classes that occur in the truth.

    Soft Dice (Milletari, Navab & Ahmadi 2016, V-Net) of class c with plain sums below the line:
    2 sum(p_c t_c) / (sum p_c + sum t_c), over all pixels of the batch or data set at once.
    Without a single valid pixel the loss is 0.
    """
    dice = 2 * sums.overlap / (sums.predicted + sums.truth).clamp(min=1)
    present = sums.truth > 0
    dice_loss = (present * (1 - dice)).sum() / present.sum().clamp(min=1)
    return sums.cross_entropy / sums.pixels.clamp(min=1) + dice_loss


def confusion_matrix(predicted: Tensor, target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Pixel counts (classes, classes), truth by row; matrices of batches may be added up."""
    valid = target != ignore_index
    pairs = target[valid].long() * classes + predicted[valid].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def segmentation_metrics(confusion: Tensor) -> dict:
    """mIoU, mean Dice, pixel accuracy and IoU per class from the counts of a whole data set.

    IoU = TP / (TP + FP + FN), Dice = 2 TP / (2 TP + FP + FN). A class that occurs neither in the
    truth nor among the predictions has None and is left out of the means.
    """
    confusion = confusion.double()
    hit, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    seen = union > 0
    iou, dice = hit / union, 2 * hit / (union + hit)
    return {
        "miou": float(iou[seen].mean()),
        "dice": float(dice[seen].mean()),
        "pixel_accuracy": float(hit.sum() / confusion.sum()),
        "iou_per_class": [
            float(value) if there else None for value, there in zip(iou, seen, strict=True)
        ],
    }
