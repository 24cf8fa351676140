"""Photographs of the forest floor with boxes around litter, split so that no scene is on two sides.

folder   one's own photographs with CVAT-for-images XML or COCO json
scenes   forest floors that scenes.py draws, needs no download
"""

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

SPLITS = ("train", "val", "test")
CORNERS = ("xtl", "ytl", "xbr", "ybr")
SHARES = (0.7, 0.15, 0.15)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
ALIKE = 5  # of the 64 bits of two pictures' hashes may differ if they show one scene
SMALLEST = 2.0  # pixels, as the network sees them; what is left of a thinner box is dropped


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


class Pictures(NamedTuple):
    """A split; the lists run over its pictures, those without litter among them."""

    names: list[str]
    x: list[Tensor]  # uint8 (3, H, W)
    y: list[dict[str, Tensor]]  # "boxes" float (K, 4) as x1 y1 x2 y2, "labels" long (K,) from 1 on
    confounders: list[dict[str, Tensor]]  # the same of things that look like litter; [] if unknown


class Data(NamedTuple):
    name: str
    classes: tuple[str, ...]  # of the labels 1, 2, ...; label 0 is the background
    train: Pictures
    val: Pictures
    test: Pictures
    note: str  # what the person who started the run should know


def load(
    *,
    dataset: str,
    data_dir: Path,
    image_size: int,
    classes: tuple[str, ...],
    scene_pattern: str,
    scene_counts: tuple[int, ...],
    draw: Callable,
    seed: int,
) -> Data:
    """The set `dataset`; `auto` is folder if annotations lie in `data_dir`, else scenes.

    With one class every box is of it, else boxes have to be labelled with `classes`. `draw` is
    scenes.draw_split. Raises DataError that names the file at fault.
    """
    if dataset == "folder" or (dataset == "auto" and annotation_files(data_dir)):
        return load_folder(data_dir, image_size, classes, scene_pattern, seed)
    options = {"size": image_size, "classes": classes, "seed": seed}
    data = load_scenes(data_dir, scene_counts, draw, options)
    if dataset == "auto":
        note = "no annotations in data_dir: scenes drawn by the project stand in for photographs"
        return data._replace(note=note)
    return data


# --- scenes -----------------------------------------------------------------------------------


def load_scenes(data_dir: Path, counts: tuple[int, ...], draw: Callable, options: dict) -> Data:
    """Drawn once and kept in a file of `data_dir`, until the code that draws them changes."""
    code = Path(draw.__code__.co_filename).read_bytes()
    key = repr((hashlib.sha256(code).hexdigest(), counts, options))
    try:
        parts = kept(
            data_dir, "scenes", key,
            lambda: [draw(number, count=count, **options) for number, count in enumerate(counts)],
        )  # fmt: skip
    except ValueError as error:
        raise DataError(str(error)) from error
    splits = [
        Pictures([f"{split} {number}" for number in range(len(x))], list(x), y, confounders)
        for split, (x, y, confounders) in zip(SPLITS, parts, strict=True)
    ]
    return Data("scenes", options["classes"], *splits, "data: scenes drawn by the project")


def kept(folder: Path, name: str, key: str, make: Callable) -> object:
    """What `make` returns, from a file of `folder` if it was made before with the same `key`.

    A folder that cannot be written to is no reason to fail: it is made anew next time.
    """
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
    if path.exists():
        return torch.load(path, weights_only=True, mmap=True)
    content = make()
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, beside)
        beside.replace(path)
    return content


def target(boxes: list, labels: list[int]) -> dict[str, Tensor]:
    """boxes float (K, 4) and labels long (K,); of a clean picture (0, 4) and (0,)."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}


# --- photographs ------------------------------------------------------------------------------


class Annotated(NamedTuple):
    """What an annotation file says of a photograph."""

    name: str
    size: tuple[float, float] | None  # width and height that the boxes refer to
    boxes: list[tuple[str, list[float]]]  # label and x1 y1 x2 y2
    source: Path


def load_folder(
    folder: Path, image_size: int, classes: tuple[str, ...], scene_pattern: str, seed: int
) -> Data:
    """Every photograph that an annotation file below `folder` names, or that lies in a clean/.

    test.txt, a list of names, fixes the test set, else the seed does. Raises DataError that names
    the file at fault.
    """
    found = [one for path in annotation_files(folder) for one in read_annotations(path)]
    if not found:
        raise DataError(f"{folder}: expected annotations.xml (CVAT) or a COCO json, found none")
    items, missing = locate(folder, found)
    stamp = [(str(path), path.stat().st_mtime, one) for path, one in items]
    key = repr((stamp, image_size, classes))
    *pictures, remarks = kept(folder, "decoded", key, lambda: decode(items, image_size, classes))
    title = folder.resolve().name
    remarks = [f"data: {title}", *remarks]
    if missing:
        remarks.append(f"{len(missing)} named photographs are not there, as {missing[0]}")
    test = folder / "test.txt"
    fixed = set(test.read_text().split()) if test.is_file() else set()
    lists, dropped = split(*pictures, scene_pattern, fixed, seed)
    if dropped:
        remarks.append(f"{dropped} left out of training: they show a scene of test.txt")
    splits = [Pictures(*([part[i] for i in one] for part in pictures), []) for one in lists]
    for name, one in zip(SPLITS, splits, strict=True):
        if not any(len(y["boxes"]) for y in one.y):
            raise DataError(f"{folder}: no photograph of the split '{name}' has a box")
    return Data(title, classes, *splits, "; ".join(remarks))


def annotation_files(folder: Path) -> list[Path]:
    return sorted([*folder.rglob("annotations.xml"), *folder.rglob("*.json")])


def read_annotations(path: Path) -> list[Annotated]:
    """Raises DataError that names the file and what is wrong in it."""
    try:
        found = read_coco(path) if path.suffix == ".json" else read_cvat(path)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected another form: {error!r}") from error
    for one in found:
        numbers = [value for _, box in one.boxes for value in box]
        if not (min(one.size) > 0 and all(map(math.isfinite, numbers))):
            raise DataError(f"{path}: image '{one.name}': impossible size or box")
    return found


def read_cvat(path: Path) -> list[Annotated]:
    """CVAT-for-images: <image name width height> with <box label xtl ytl xbr ybr> in it."""
    found = []
    for image in ElementTree.parse(path).iter("image"):
        size = (float(image.attrib["width"]), float(image.attrib["height"]))
        boxes = [
            (box.attrib["label"], [float(box.attrib[key]) for key in CORNERS])
            for box in image.iter("box")
        ]
        found.append(Annotated(image.attrib["name"], size, boxes, path))
    return found


def read_coco(path: Path) -> list[Annotated]:
    """COCO json: "images", "annotations" with "bbox" as x y width height, "categories"."""
    content = json.loads(path.read_text(encoding="utf-8"))
    labels = {kind["id"]: kind["name"] for kind in content["categories"]}
    boxes = {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        left, top, width, height = map(float, one["bbox"])
        box = [left, top, left + width, top + height]
        boxes[one["image_id"]].append((labels[one["category_id"]], box))
    return [
        Annotated(i["file_name"], (float(i["width"]), float(i["height"])), boxes[i["id"]], path)
        for i in content["images"]
    ]


def locate(folder: Path, found: list[Annotated]) -> tuple[list[tuple[Path, Annotated]], list[str]]:
    """The photographs that are annotated or lie in a clean/, and the names of those not there.

    Raises DataError if none is there or one is annotated twice.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    by_name = {}
    for path in paths:
        by_name.setdefault(path.name, []).append(path)
    items, missing = {}, []
    for one in found:
        there = by_name.get(Path(one.name).name, [])
        there = [path for path in there if path.is_relative_to(one.source.parent)]
        exact = [path for path in there if path.as_posix().endswith("/" + one.name)] or there
        if not exact:
            missing.append(one.name)
        elif exact[0] in items:
            raise DataError(f"{one.source}: image '{one.name}' is annotated twice")
        else:
            items[exact[0]] = one
    for path in paths:
        if path not in items and "clean" in path.relative_to(folder).parts[:-1]:
            items[path] = Annotated(path.name, None, [], path)
    if not items:
        raise DataError(f"{folder}: none of the {len(missing)} annotated photographs is there")
    return list(items.items()), missing


def decode(
    items: list[tuple[Path, Annotated]], image_size: int, classes: tuple[str, ...]
) -> tuple[list[str], list[Tensor], list[dict], list[str]]:
    """Names, pictures, targets, and remarks on what was left out or mended."""
    names, x, y, bad, clipped, dropped = [], [], [], [], [], []
    for path, one in tqdm(items, "decoding", leave=False, disable=None):
        try:
            picture, raw_size = read_photo(path, image_size, one.size)
        except (OSError, SyntaxError) as error:  # Pillow's broken PNG is a SyntaxError
            bad.append(f"{path.name} ({error})")
            continue
        scale = [new / old for new, old in zip(picture.size, one.size or raw_size, strict=True)]
        boxes, labels = [], []
        for label, box in one.boxes:
            if len(classes) > 1 and label not in classes:
                raise DataError(f"{one.source}: image '{one.name}': label '{label}' is no class")
            box, cut, empty = fit_box(box, scale, picture.size)
            clipped += [path.name] * (cut and not empty)
            dropped += [path.name] * empty
            if not empty:
                boxes.append(box)
                labels.append(1 + classes.index(label) if len(classes) > 1 else 1)
        names.append(path.name)
        x.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous())
        y.append(target(boxes, labels))
    remarks = [f"{len(bad)} unreadable photographs left out, the first: {bad[0]}"] if bad else []
    for what, where in (("clipped to their photograph", clipped), ("dropped as empty", dropped)):
        if where:
            remarks.append(f"{len(where)} boxes {what}, the first in {where[0]}")
    return names, x, y, remarks


def fit_box(box: list[float], scale: list[float], size: tuple[int, int]) -> tuple:
    """The box, scaled by its picture's two factors and clipped; was it cut; is nothing left."""
    scaled = [value * factor for value, factor in zip(box, [*scale, *scale], strict=True)]
    inside = [min(max(value, 0.0), end) for value, end in zip(scaled, [*size, *size], strict=True)]
    cut = max(abs(a - b) for a, b in zip(scaled, inside, strict=True)) > 0.01
    return inside, cut, min(inside[2] - inside[0], inside[3] - inside[1]) < SMALLEST


def read_photo(
    path: Path, image_size: int, annotated: tuple[float, float] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """The photograph, its longer side at most `image_size`, and the size that it had before.

    It is turned as its EXIF orientation says, unless the annotation's width and height show that
    its boxes were drawn on the photograph as it is stored.
    """
    with Image.open(path) as file:
        stored = file.size
        quarter = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        factor = min(1.0, image_size / max(stored))
        file.draft("RGB", tuple(max(1, round(side * factor)) for side in stored))
        as_stored = quarter and annotated == stored and stored[0] != stored[1]
        picture = (file if as_stored else ImageOps.exif_transpose(file)).convert("RGB")
    size = stored[::-1] if quarter and not as_stored else stored
    wanted = tuple(max(1, round(side * factor)) for side in size)
    return picture.resize(wanted, Image.Resampling.BILINEAR), size


def list_photos(path: Path) -> list[Path]:
    """The photograph, or those of the folder. Raises DataError if there are none."""
    photos = sorted(path.rglob("*")) if path.is_dir() else [path]
    photos = [photo for photo in photos if photo.is_file() and photo.suffix.lower() in SUFFIXES]
    if not photos:
        raise DataError(f"predict: {path}: there are no photographs")
    return photos


# --- COCO weights -----------------------------------------------------------------------------


def find_coco_weights(architecture: str, data_dir: Path) -> None:
    """Turns torch.hub to the folder with torchvision's COCO weights, or where to download them to.

    By hand they are put into data_dir/checkpoints. Raises DataError if they cannot be had.
    """
    from torchvision.models import get_model_weights  # imported where it is used: it is slow

    if architecture == "small":
        raise DataError("there are no COCO weights for the architecture small")
    url = get_model_weights(f"fasterrcnn_{architecture}").DEFAULT.url
    name = url.rsplit("/", 1)[-1]
    for hub in (data_dir, Path(torch.hub.get_dir())):
        if (hub / "checkpoints" / name).is_file():
            torch.hub.set_dir(hub)
            return
    if not reachable(url):
        raise DataError(f"{data_dir / 'checkpoints' / name} is not there and {url} does not answer")
    torch.hub.set_dir(data_dir)


def reachable(url: str, seconds: float = 8.0) -> bool:
    """Whether the host answers in time. In a thread, as looking up a name has no time limit."""
    answers = []

    def ask() -> None:
        with suppress(OSError), urlopen(Request(url, method="HEAD"), timeout=seconds):
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


# --- splits -----------------------------------------------------------------------------------


def split(
    names: list[str], x: list[Tensor], y: list[dict], pattern: str, fixed: set[str], seed: int
) -> tuple[list[list[int]], int]:
    """Places of the pictures of train, val and test; how many were left out for their scene.

    Pictures of one scene stay together. `fixed` names the test pictures if it is not empty. Scenes
    with and without litter are dealt out apart, so that every split has its share of both.
    """
    scenes = scenes_of(names, x, pattern)
    test = {scene for scene, name in zip(scenes, names, strict=True) if name in fixed}
    littered = {scene for scene, one in zip(scenes, y, strict=True) if len(one["boxes"])}
    shares = (0.85, 0.15) if fixed else SHARES[:2]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [scene for scene in dict.fromkeys(scenes[i] for i in order) if scene not in test]
    side = dict.fromkeys(test, "test")
    for kind in (True, False):
        mine = [scene for scene in shuffled if (scene in littered) == kind]
        ends = [round(share * len(mine)) for share in np.cumsum(shares)]
        for place, scene in enumerate(mine):
            side[scene] = SPLITS[sum(place >= end for end in ends)]
    parts, dropped = {name: [] for name in SPLITS}, 0
    for i, (scene, name) in enumerate(zip(scenes, names, strict=True)):
        if scene in test and name not in fixed:
            dropped += 1
        else:
            parts[side[scene]].append(i)
    return list(parts.values()), dropped


def scenes_of(names: list[str], x: list[Tensor], pattern: str) -> list[int]:
    """A number for each picture's scene. Two pictures show one scene if they look alike, or if the
    regular expression `pattern` finds the same text in their names; so do the pictures between.
    """
    bits = np.stack([difference_hash(picture) for picture in x]).astype(np.int32)
    same = bits @ bits.T + (1 - bits) @ (1 - bits).T >= 64 - ALIKE
    found = [re.search(pattern, name) if pattern else None for name in names]
    texts = np.array([match[0] if match else f"/{i}" for i, match in enumerate(found)])
    same |= texts[:, None] == texts[None]
    scenes = np.arange(len(names))
    while True:  # the smallest number spreads until nothing changes
        spread = np.where(same, scenes[None], len(names)).min(1)
        if (spread == scenes).all():
            return scenes.tolist()
        scenes = spread


def difference_hash(x: Tensor) -> np.ndarray:
    """64 bits: whether the brightness rises from each of 8 x 9 cells to its right neighbour."""
    small = F.interpolate(x.float().mean(0)[None, None], (8, 9), mode="area")[0, 0]
    return (small[:, 1:] > small[:, :-1]).flatten().numpy()


# --- batches ----------------------------------------------------------------------------------


def training_batches(
    pictures: Pictures, batch_size: int, jitter: float, device: torch.device
) -> Iterator[tuple[list[Tensor], list[dict]]]:
    """Shuffled, augmented float pictures (3, H, W) in [0, 1] with their targets, each once."""
    for chosen in torch.randperm(len(pictures.x)).split(batch_size):
        pairs = [augment(pictures.x[i].to(device), pictures.y[i], jitter) for i in chosen.tolist()]
        y = [{name: part.to(device) for name, part in y.items()} for _, y in pairs]
        yield [x for x, _ in pairs], y


def batches(x: list[Tensor], batch_size: int, device: torch.device) -> Iterator[list[Tensor]]:
    """Float pictures in [0, 1], in order."""
    for start in range(0, len(x), batch_size):
        yield [picture.to(device).float() / 255 for picture in x[start : start + batch_size]]


def augment(x: Tensor, y: dict[str, Tensor], jitter: float) -> tuple[Tensor, dict[str, Tensor]]:
    """A float picture: mirrored half of the time, scaled by 1 / jitter to jitter and, if enlarged,
    a random part of the old size cut out. Boxes of which less than a third is left go.
    """
    boxes, (height, width) = y["boxes"].clone(), x.shape[1:]
    flip, factor, top, left = torch.rand(4).tolist()
    if flip < 0.5:
        x = x.flip(2)
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    size = [max(1, round(side * jitter ** (2 * factor - 1))) for side in (height, width)]
    x = F.interpolate(x[None].float() / 255, size, mode="bilinear")[0]
    top, left = int(top * max(0, size[0] - height + 1)), int(left * max(0, size[1] - width + 1))
    x = x[:, top : top + height, left : left + width]
    boxes = boxes * boxes.new_tensor([size[1] / width, size[0] / height] * 2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    boxes = boxes - boxes.new_tensor([left, top] * 2)
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([x.shape[2], x.shape[1]] * 2))
    sides = boxes[:, 2:] - boxes[:, :2]
    stays = (sides.prod(1) > area / 3) & (sides.min(1).values >= SMALLEST)
    return x, {"boxes": boxes[stays], "labels": y["labels"][stays]}
