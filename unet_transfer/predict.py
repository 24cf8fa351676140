"""Segment your own pictures with the U-Net of a run.

python unet_transfer/predict.py RUN PICTURE...              files and folders
python unet_transfer/predict.py RUN PICTURE... --tile 256   large pictures, in overlapping tiles
"""

import argparse
import csv
from pathlib import Path

from run import run_main, start_predict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import DataError, find_pictures, open_picture, shrink
from model import UNet
from plots import segment_colors

BAND = 128  # rows of a mask that are worked on at once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "height in pixels of the tiles that are segmented one by one (0: the whole picture)"
    parser.add_argument("--tile", metavar="PIXELS", type=int, default=0, help=text)
    given, saved, folder, device = start_predict(parser)
    if given.tile and not 8 <= given.tile <= 10_000:
        raise DataError(f"--tile: expected 8 to 10000 pixels, found {given.tile}")
    model, segments = load_unet(saved, device), saved["segments"]
    colors = (255 * np.array(segment_colors(len(segments)))).round().astype(np.uint8)
    bad: list[str] = []
    total, count = np.zeros(len(segments)), 0
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", *segments])
        for name, path in tqdm(find_pictures(given.inputs).items(), leave=False, disable=None):
            try:
                picture = open_picture(path)
            except DataError as error:
                bad.append(str(error))
                continue
            mask = segment(model, picture, tuple(saved["image_size"]), given.tile)
            write_pictures(picture, mask, colors, folder, name)
            shares = np.bincount(mask.ravel(), minlength=len(segments)) / mask.size
            table.writerow([name, *(f"{share:.6f}" for share in shares)])
            total, count = total + shares, count + 1
    report_shares(total, count, segments, bad)
    print(folder)


def load_unet(saved: dict, device: torch.device) -> UNet:
    model = UNet(tuple(saved["widths"]), len(saved["segments"]))
    model.load_state_dict(saved["weights"])
    return model.to(device, memory_format=torch.channels_last).eval()


@torch.no_grad()
def segment(model: UNet, picture: Image.Image, size: tuple[int, int], tile: int) -> np.ndarray:
    """Segments (H, W) uint8 of a picture of H x W pixels, squeezed to `size` as in training.

    With `tile` not the whole is squeezed but each of the tiles, `tile` pixels high.
    """
    width, height = picture.size
    if tile:
        return segment_tiles(model, picture, size, (tile, max(1, round(tile * size[1] / size[0]))))
    return enlarge(logits_of(model, picture, size), (height, width)).cpu().numpy()


def logits_of(model: UNet, picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """(C, *size) of the whole picture, squeezed."""
    x = shrink(picture, size)[None].to(next(model.parameters()).device)
    return model(x.float() / 255)[0]


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest (H, W) of logits (C, h, w) that are resized bilinearly, a band at a time."""
    wide = F.interpolate(logits[None], (logits.shape[1], size[1]), mode="bilinear")[0]
    place = (torch.arange(size[0]) + 0.5) * logits.shape[1] / size[0] - 0.5
    place = place.clamp(0, logits.shape[1] - 1).to(logits)
    bands = []
    for part in place.split(BAND):
        above = part.floor().long()
        below = (above + 1).clamp(max=logits.shape[1] - 1)
        share = (part - above)[:, None]
        bands.append(torch.lerp(wide[:, above], wide[:, below], share).argmax(0).byte())
    return torch.cat(bands)


def segment_tiles(
    model: UNet, picture: Image.Image, size: tuple[int, int], tile: tuple[int, int]
) -> np.ndarray:
    """From the weighted sum of the probabilities of all tiles over a pixel; neighbours overlap by
    half, and a tile's weight falls to its borders, so that no seam shows.

    Only one row of tiles is in memory at a time.
    """
    width, height = picture.size
    high, wide = min(tile[0], height), min(tile[1], width)
    tops, lefts = starts(height, high), starts(width, wide)
    weight = fall(high)[:, None] * fall(wide)[None]
    mask, sums = np.empty((height, width), np.uint8), None
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for left in lefts:
            part = picture.crop((left, top, left + wide, top + high))
            probs = logits_of(model, part, size).softmax(0)
            probs = F.interpolate(probs[None], (high, wide), mode="bilinear")[0].cpu()
            sums = torch.zeros(len(probs), high, width) if sums is None else sums
            sums[:, :, left : left + wide] += weight * probs
        done = following - top
        mask[top:following] = sums[:, :done].argmax(0).byte().numpy()
        sums = torch.cat((sums[:, done:], torch.zeros(len(sums), done, width)), 1)
    return mask


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that overlap by half or more and cover 0 to `length`."""
    return [*range(0, length - tile, max(1, tile // 2)), length - tile]


def fall(length: int) -> Tensor:
    """Weights from the middle, 1, to almost 0 at both ends."""
    return 1 - (2 * (torch.arange(length) + 0.5) / length - 1).abs()


def write_pictures(
    picture: Image.Image, mask: np.ndarray, colors: np.ndarray, folder: Path, name: str
) -> None:
    """masks/NAME.png, its values the segments' numbers, in their colours, and overlays/NAME.png."""
    indexed = Image.fromarray(mask).convert("P")
    indexed.putpalette(colors.tobytes())
    overlay = Image.blend(picture, indexed.convert("RGB"), 0.5)
    for kind, image in (("masks", indexed), ("overlays", overlay)):
        path = folder / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def report_shares(total: np.ndarray, count: int, segments: list[str], bad: list[str]) -> None:
    """Raises DataError if no picture could be read."""
    if not count:
        raise DataError(f"no picture could be read, the first: {bad[0]}")
    for reason in bad:
        tqdm.write(f"left out: {reason}")
    print(f"pictures: {count}, left out: {len(bad)}; mean share of pixels:")
    for segment_name, share in zip(segments, total / count, strict=True):
        print(f"{segment_name:>16}  {share:.3f}")


if __name__ == "__main__":
    run_main(main, DataError)
