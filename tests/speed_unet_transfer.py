"""Training speed of unet_transfer's U-Net and of a plain one of the same size, in turn.

Run it with `python tests/speed_unet_transfer.py`, with nothing else running.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from unet_transfer.model import UNet, loss_sums, segmentation_loss

WIDTHS, SEGMENTS, BATCH = (16, 32, 64, 128), 6, 32


class PlainUNet(nn.Module):
    """The usual one: biased convolutions, transposed convolutions to upsample, NCHW memory."""

    def __init__(self) -> None:
        super().__init__()
        fine, coarse = WIDTHS[:-1][::-1], WIDTHS[1:][::-1]
        self.down = nn.ModuleList(map(self.block, (3, *WIDTHS[:-1]), WIDTHS))
        self.widen = nn.ModuleList(
            nn.ConvTranspose2d(*pair, 2, 2) for pair in zip(coarse, fine, strict=True)
        )
        self.up = nn.ModuleList(self.block(2 * width, width) for width in fine)
        self.head = nn.Conv2d(WIDTHS[0], SEGMENTS, 1)

    @staticmethod
    def block(inputs: int, width: int) -> nn.Sequential:
        layers = []
        for channels in (inputs, width):
            convolution = nn.Conv2d(channels, width, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for widen, block in zip(self.widen, self.up, strict=True):
            x = block(torch.cat((skips.pop(), widen(x)), 1))
        return self.head(x)


def images_per_second(model: nn.Module, x: Tensor, y: Tensor) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = max(1, 2**18 // x[:, 0].numel())
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        segmentation_loss(loss_sums(model(x), y, 255)).backward()
        optimizer.step()
    return steps * len(x) / (time.perf_counter() - began)


def main() -> None:
    plain = PlainUNet()
    ours = UNet(widths=WIDTHS, segments=SEGMENTS).to(memory_format=torch.channels_last)
    for model in (plain, ours):
        print(type(model).__name__, sum(part.numel() for part in model.parameters()), "parameters")
    for size in (64, 128):
        x, y = torch.rand(BATCH, 3, size, size), torch.randint(SEGMENTS, (BATCH, size, size))
        pairs = [(images_per_second(plain, x, y), images_per_second(ours, x, y)) for _ in range(9)]
        pairs = pairs[1:]  # the first is a warm-up
        speeds = [median(column) for column in zip(*pairs, strict=True)]
        ratio = median(own / other for other, own in pairs)
        print(f"{size} px: plain {speeds[0]:.0f}, ours {speeds[1]:.0f} images/s; ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
