"""Litter on your own photographs, found by the detector of a run.

Run it with `python faster_rcnn_litter/predict.py RUN PHOTOGRAPH...`, files or folders.

It writes predictions.csv (a row per photograph), boxes.csv (a row per box, in the photograph's own
pixels), detections.json (COCO's form) and each photograph with its boxes.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from run import run_main, start_predict

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from data import DataError, find_pictures, open_picture, read_photo, to_tensor
from model import above, cut_off, detect, join_tiles, restore_detector, tile_corners

FOUND = "#39ff5a"
HEADER = ("file", "class", "confidence", "x1", "y1", "x2", "y2")


def main(argv: list[str] | None = None) -> None:
    given, saved, folder, device = start_predict(flags(), argv)
    model = restore_detector(saved, amp=device.type == "cuda").to(device).eval()
    threshold = saved["threshold"] if given.threshold is None else given.threshold
    photos = find_pictures(given.inputs)
    bad, counts = [], []
    with ExitStack() as stack:
        rows, boxes = (
            open_table(folder / name, stack) for name in ("predictions.csv", "boxes.csv")
        )
        rows.writerow(("file", "width", "height", "boxes", "highest_confidence"))
        boxes.writerow(HEADER)
        coco = stack.enter_context((folder / "detections.json").open("w", encoding="utf-8"))
        for number, (name, path) in enumerate(tqdm(photos.items(), leave=False, disable=None)):
            try:
                found, size = find_litter(model, path, saved["image_size"], given.tiles, device)
            except DataError as error:
                bad.append(str(error))
                continue
            found = above(found, threshold)
            best = f"{found['scores'].max():.4f}" if len(found["scores"]) else ""
            rows.writerow((name, *size, len(found["boxes"]), best))
            lines = list(box_rows(found, saved["classes"]))
            boxes.writerows((name, *line) for line in lines)
            for entry in coco_entries(found, number, name):
                coco.write(f"{', ' if coco.tell() else '['}{json.dumps(entry)}\n")
            draw_photo(path, lines, folder / "pictures" / f"{name}.png")
            counts.append(len(lines))
        coco.write("]\n" if coco.tell() else "[]\n")
    if not counts:
        raise DataError(f"no photograph could be read, the first: {bad[0]}")
    report(photos, counts, bad, threshold, folder)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "least confidence of a box (the run's working confidence)"
    parser.add_argument("--threshold", type=float, help=text)
    text = "divide photographs into N x N overlapping tiles, for litter that is small in them"
    parser.add_argument(
        "--tiles", metavar="N", type=int, choices=range(1, 17), default=1, help=text
    )
    return parser


def open_table(path: Path, stack: ExitStack) -> object:
    """A csv writer."""
    return csv.writer(stack.enter_context(path.open("w", newline="", encoding="utf-8")))


def find_litter(
    model: nn.Module, path: Path, image_size: int, tiles: int, device: torch.device
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The predictions for one photograph in its own pixels, and its width and height."""
    picture, size = read_photo(path, image_size * tiles)
    x, parts = to_tensor(picture), []
    for tile in tile_corners(picture.size, tiles):
        left, top, right, bottom = tile
        (found,) = detect(model, [x[:, top:bottom, left:right].to(device).float() / 255])
        boxes = found["boxes"] + torch.tensor([left, top] * 2)
        parts.append(found | {"boxes": boxes, "cut": cut_off(boxes, tile, picture.size)})
    found = join_tiles(parts)
    factor = torch.tensor([size[0] / picture.size[0], size[1] / picture.size[1]] * 2)
    return found | {"boxes": found["boxes"] * factor}, size


def box_rows(found: dict[str, Tensor], classes: list[str]) -> Iterator[tuple]:
    columns = (found["boxes"].round(decimals=1), found["labels"], found["scores"])
    for box, label, score in zip(*(column.tolist() for column in columns), strict=True):
        yield (classes[label - 1], f"{score:.4f}", *(f"{value:.1f}" for value in box))


def coco_entries(found: dict[str, Tensor], number: int, name: str) -> Iterator[dict]:
    """In the form of COCO's results, with the file's name added."""
    for box, label, score in zip(
        *(found[k].tolist() for k in ("boxes", "labels", "scores")), strict=True
    ):
        x1, y1, x2, y2 = (round(value, 2) for value in box)
        entry = {"image_id": number, "file_name": name, "category_id": label}
        yield entry | {"bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)], "score": score}


def draw_photo(path: Path, lines: list[tuple], target: Path, longest: int = 1600) -> None:
    """The photograph, its longer side `longest` pixels at most, with the boxes."""
    picture = open_picture(path)
    width = picture.size[0]
    picture.thumbnail((longest, longest), Image.Resampling.BILINEAR)
    factor, pen = picture.size[0] / width, ImageDraw.Draw(picture)
    line, letters = max(2, max(picture.size) // 400), max(12, max(picture.size) // 60)
    for label, score, *box in lines:
        corners = [float(value) * factor for value in box]
        pen.rectangle(corners, outline=FOUND, width=line)
        place, text = (corners[0] + 2 * line, corners[1] + line), f"{label} {score[:4]}"
        pen.text(place, text, fill=FOUND, font_size=letters)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)


def report(
    photos: dict[str, Path], counts: list[int], bad: list[str], threshold: float, folder: Path
) -> None:
    print(
        f"photographs: {len(counts)} of {len(photos)}, "
        f"boxes with a confidence of at least {threshold:.3f}: {sum(counts)}"
    )
    if bad:
        print(f"unreadable files left out: {len(bad)}, the first: {bad[0]}")
    print(folder)


if __name__ == "__main__":
    run_main(main, DataError)
