"""Photographs of the forest floor with boxes around litter, split so that no scene is on two sides.

scenes   forest floors that scenes.py draws, needs no download
folder   your own photographs with CVAT-for-images XML or COCO json
"""

import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
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
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
ALIKE = 5  # of the 64 bits of two pictures' hashes may differ if they show one scene
PATIENCE = 20.0  # seconds that scene_pattern may need for all names
SMALLEST = 2.0  # pixels, as the network sees them; what is left of a thinner box is dropped
LONGEST = 1333 / 800  # longer side over image_size at most, as torchvision has it
TURNED_BACK = {  # by EXIF orientation: what undoes exif_transpose
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

# --- reading files: the same in every project that has it --------------------------------------


TIMEOUT = 20  # seconds without a byte that end a download


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


def download(url: str, path: Path, what: str, checksum: str = "") -> Path:
    """`path`, fetched from `url` if it is not there yet; a broken transfer leaves nothing behind.

    `checksum` is "md5:..." or "sha256:...", of which a beginning is enough. The usual proxy
    variables count. Raises DataError that says what was tried.
    """
    if path.is_file():
        check_sum(path, checksum)
        return path
    temporary, there = path.with_name(f"{path.name}.{os.getpid()}.part"), path.parent.is_dir()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        request = Request(url, headers={"User-Agent": "Mozilla/5.0"})
        with urlopen(request, timeout=TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            about = f"{what} ({size / 1e6:.1f} MB)" if size else what
            tqdm.write(f"downloading {about} from {url} to {path}", file=sys.stderr)
            copy_stream(answer, temporary, size)
        check_sum(temporary, checksum)
        temporary.replace(path)
    except (OSError, HTTPException, ValueError, DataError) as error:
        reason = f"{what} is not in {path.parent} and could not be downloaded from {url}"
        raise DataError(f"{reason}: {error or type(error).__name__}; by hand: {path}") from error
    finally:
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something
            if not there:
                path.parent.rmdir()
    return path


def copy_stream(answer: Any, path: Path, size: int) -> None:
    """To a file, with a progress bar. Raises OSError unless `size` bytes came (0: not known), or if
    over a minute fewer than 1,000 bytes a second did.
    """
    bar = tqdm(total=size or None, unit="B", unit_scale=True, leave=False, disable=None)
    with path.open("wb") as file, bar:
        began, done = time.monotonic(), 0
        while block := answer.read1(1 << 20):
            file.write(block)
            done += len(block)
            bar.update(len(block))
            seconds = time.monotonic() - began
            if seconds > 60 and done < 1000 * seconds:
                raise OSError(f"the transfer stalled at {done} bytes")
    if size and done != size:
        raise OSError(f"the transfer broke off at {done} of {size} bytes")


def check_sum(path: Path, checksum: str) -> None:
    """Raises DataError if the file's digest does not begin as `checksum`, "md5:..."."""
    if not checksum:
        return
    kind, _, wanted = checksum.partition(":")
    digest = hashlib.new(kind)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if not digest.hexdigest().startswith(wanted):
        raise DataError(f"{path}: damaged, or another file: its {kind} is not {wanted}")


def read_text(path: Path) -> str:
    """A file in UTF-8. Raises DataError that names it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a text in UTF-8 ({error})") from error


# --- end of reading files ---------------------------------------------------------------------


# --- reading pictures: the same in every project that has it -----------------------------------

DECODING = 1  # of cached pictures: another number whenever decoding gives other pixels


def open_picture(path: Path) -> Image.Image:
    """The picture in RGB, turned as its EXIF data say; 16-bit greys are scaled by their range.

    Raises DataError that names the file, whatever Pillow raises.
    """
    try:
        if not path.is_file():  # of a named pipe, reading would never end
            raise FileNotFoundError("there is no such file")
        with Image.open(path) as file:
            if file.width * file.height > 100_000_000:
                raise ValueError(f"{file.width} x {file.height} pixels are too many")
            picture = ImageOps.exif_transpose(file)
            if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
                values = np.asarray(picture, dtype=np.float64)
                low, high = values.min(), values.max()
                if not np.isfinite(high - low):
                    raise ValueError("it holds values that are not finite")
                scaled = (values - low) * (255 / max(high - low, 1e-12))
                picture = Image.fromarray(scaled.round().astype(np.uint8))
            return picture.convert("RGB")
    except Exception as error:  # a broken file makes Pillow's readers raise almost anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{path} ({reason})") from error


def visible_files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted; hidden ones are left out, linked folders followed once, and
    not to a folder that holds `folder`.
    """
    found, seen = [], set(map(str, folder.resolve().parents))
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(root, name) for name in files if name[0] != "."]
    return sorted(found)


def stamp(path: Path) -> tuple[str, int, int]:
    """By which a cached file is known: path, length and time; a link to nothing has neither."""
    with suppress(OSError):
        about = path.stat()
        return str(path), about.st_size, about.st_mtime_ns
    return str(path), 0, 0


def cached(folder: Path, name: str, key: object, make: Callable) -> Any:
    """What `make` returns, from a file of `folder` if it was made before with the same `key`.

    A damaged file is made anew; a folder that is full or may only be read is no error.
    """
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = folder / f".{name}-{digest}.pt"
    with suppress(Exception):  # not there, or damaged
        return torch.load(path, weights_only=True)
    result = make()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    with suppress(OSError, RuntimeError):  # torch.save on a full disk is a RuntimeError
        for old in folder.glob(f".{name}-*.part"):  # of a run that was killed
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
        torch.save(result, temporary)
        temporary.replace(path)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    return result


def left_out(bad: list[str]) -> str:
    """For a run's first lines: how many files could not be read, and the first of them."""
    return f"; unreadable files left out: {len(bad)}, the first: {bad[0]}" if bad else ""


def find_pictures(inputs: list[str]) -> dict[str, Path]:
    """Path by name of each file given and each below a folder given. A name is the path as seen
    from the folder that holds all inputs, so no two are equal.

    Raises DataError if an input is not there or none was given.
    """
    paths = [Path(os.path.abspath(os.path.expanduser(text))) for text in inputs]
    if lost := [path for path in paths if not path.exists()]:
        raise DataError(f"{lost[0]}: there is no such file or folder")
    files = [file for path in paths for file in (visible_files(path) if path.is_dir() else [path])]
    if not files:
        raise DataError("expected at least one picture, or a folder of pictures")
    base = os.path.commonpath([path if path.is_dir() else path.parent for path in paths])
    return {Path(os.path.relpath(file, base)).as_posix(): file for file in files}


def pretrained_weights(url: str, data_dir: Path) -> dict[str, Tensor]:
    """The state dict at `url`, kept in data_dir/checkpoints; the hash that torchvision's file names
    carry (resnet18-f37072fd.pth) is checked in any case, and no code of the file runs.
    """
    name = url.rsplit("/", 1)[-1]
    digest = re.search(r"-([0-9a-f]{8,})\.pth$", name)
    checksum = f"sha256:{digest[1]}" if digest else ""
    path = download(url, data_dir / "checkpoints" / name, f"weights {name}", checksum)
    return read_weights(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict on the CPU. Raises DataError if the file is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own
        reason = str(error).split("\n")[0][:200]
        raise DataError(f"{path}: not a file of weights that can be loaded ({reason})") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: expected a state dict, found {type(state).__name__}")
    return state


# --- end of reading pictures ------------------------------------------------------------------


class Pictures(NamedTuple):
    """A split; the lists run over its pictures, those without litter among them."""

    names: list[str]
    x: list[Tensor]  # uint8 (3, H, W)
    y: list[dict[str, Tensor]]  # "boxes" float (K, 4) as x1 y1 x2 y2, "labels" long (K,) from 1 on
    ignored: list[Tensor]  # boxes float (M, 4) in which nothing counts (COCO's iscrowd)
    confounders: list[dict[str, Tensor]]  # like y, things that look like litter; [] if unknown


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
    """The set `dataset`.

    With one class every box is of it, else boxes have to be labelled with `classes`. `draw` is
    scenes.draw_split. Raises DataError that names the file at fault.
    """
    if dataset == "folder":
        return load_folder(data_dir, image_size, classes, scene_pattern, seed)
    options = {"size": image_size, "classes": classes, "seed": seed}
    return load_scenes(data_dir, scene_counts, draw, options)


# --- scenes -----------------------------------------------------------------------------------


def load_scenes(data_dir: Path, counts: tuple[int, ...], draw: Callable, options: dict) -> Data:
    """Drawn once and kept in a file of `data_dir`, until the code that draws them changes."""
    code = Path(draw.__code__.co_filename).read_bytes()
    key = (hashlib.sha256(code).hexdigest(), counts, options)
    with suppress(OSError):
        data_dir.mkdir(parents=True, exist_ok=True)
    try:
        parts = cached(
            data_dir, "scenes", key,
            lambda: [draw(number, count=count, **options) for number, count in enumerate(counts)],
        )  # fmt: skip
    except ValueError as error:
        raise DataError(str(error)) from error
    splits = [
        Pictures(
            names=[f"{split} {number}" for number in range(len(x))],
            x=list(x),
            y=y,
            ignored=[torch.zeros(0, 4)] * len(x),
            confounders=confounders,
        )
        for split, (x, y, confounders) in zip(SPLITS, parts, strict=True)
    ]
    for split, one in zip(SPLITS, splits, strict=True):
        if not any(len(y["boxes"]) for y in one.y):
            few = f"no drawn scene of the split '{split}' has a box"
            raise DataError(f"image_size, scene_counts: {few}; larger ones are needed")
    note = "data: scenes drawn by the project (for photographs see litter.yaml)"
    return Data("scenes", options["classes"], *splits, note)


def target(boxes: list, labels: list[int]) -> dict[str, Tensor]:
    """boxes float (K, 4) and labels long (K,); of a clean picture (0, 4) and (0,)."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}


# --- photographs ------------------------------------------------------------------------------


class Box(NamedTuple):
    label: str
    corners: list[float]  # x1 y1 x2 y2
    ignored: bool  # an area in which nothing counts


class Annotated(NamedTuple):
    """What an annotation file holds on a photograph."""

    name: str
    size: tuple[float, float] | None  # width and height that the boxes refer to
    boxes: list[Box]
    source: Path


def load_folder(
    folder: Path, image_size: int, classes: tuple[str, ...], scene_pattern: str, seed: int
) -> Data:
    """Every photograph that an annotation file below `folder` names, or that lies in a clean/.

    test.txt, a name per line, fixes the test set, else the seed does. Raises DataError that names
    the file at fault.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    found, others = read_annotations(folder)
    if not found:
        reason = f", only others as {others[0]}" if others else ""
        raise DataError(f"{folder}: expected CVAT-for-images xml or COCO json, found none{reason}")
    items, missing = locate(folder, found)
    stamps = [(*stamp(path), one) for path, one in items]
    key = (stamps, image_size, classes, DECODING)
    decoded = cached(folder, "decoded", key, lambda: decode_photos(items, image_size, classes))
    places, x, y, ignored, remarks = decoded
    names = [name_of(items[place][0], folder) for place in places]
    remarks = [f"data: {folder.resolve().name}", *remarks]
    if others:
        remarks.append(f"files that are no annotations: {len(others)}, as {others[0].name}")
    if missing:
        remarks.append(f"annotated photographs that are not there: {len(missing)}, as {missing[0]}")
    fixed, unknown = fixed_test_names(folder / "test.txt", names)
    if unknown:
        remarks.append(f"test.txt names {len(unknown)} that are not there, as '{unknown[0]}'")
    lists, dropped = split(names, x, y, scene_pattern, fixed, seed)
    if dropped:
        remarks.append(f"{dropped} left out of training: they show a scene of test.txt")
    columns = (names, x, y, ignored)
    splits = [Pictures(*([part[i] for i in one] for part in columns), []) for one in lists]
    for name, one in zip(SPLITS, splits, strict=True):
        if not any(len(y["boxes"]) for y in one.y):
            few = "photographs of at least 3 scenes with litter are needed"
            raise DataError(f"{folder}: no photograph of the split '{name}' has a box; {few}")
    return Data(folder.resolve().name, classes, *splits, "; ".join(remarks))


def name_of(path: Path, folder: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(folder).as_posix())


def fixed_test_names(path: Path, names: list[str]) -> tuple[set[str], list[str]]:
    """The photographs that the lines of test.txt name, with or without their folders and suffix;
    the lines that match none. A line may be a folder, too.
    """
    if not path.exists():
        return set(), []
    lines = [unicodedata.normalize("NFC", line.strip()) for line in read_text(path).splitlines()]
    lines = [line.removeprefix("./") for line in lines if line]
    lines = [line.replace("\\", "/").rstrip("/") for line in lines]
    known = {line: [name for name in names if means(line, name)] for line in lines}
    fixed = {name for matches in known.values() for name in matches}
    if lines and not fixed:
        raise DataError(f"{path}: no photograph is named as in its lines, the first: {lines[0]}")
    return fixed, [line for line, matches in known.items() if not matches]


def means(line: str, name: str) -> bool:
    ends = (f"/{name}", f"/{name.rpartition('.')[0]}")
    return name.startswith(f"{line}/") or any(end.endswith(f"/{line}") for end in ends)


def read_annotations(folder: Path) -> tuple[list[Annotated], list[Path]]:
    """The content of all annotation files, and the xml and json files that are no annotations.

    Raises DataError that names the file and what is wrong in it.
    """
    found, others = [], []
    for path in visible_files(folder):
        if path.suffix.lower() not in (".xml", ".json"):
            continue
        try:
            own = read_coco(path) if path.suffix.lower() == ".json" else read_cvat(path)
        except ElementTree.ParseError as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: expected another form: {error!r}") from error
        for one in own or ():
            numbers = [value for box in one.boxes for value in box.corners]
            if not (min(one.size) > 0 and all(map(math.isfinite, [*one.size, *numbers]))):
                raise DataError(f"{path}: image '{one.name}': impossible size or box")
            if not isinstance(one.name, str):
                raise DataError(f"{path}: image '{one.name}': expected a name")
        if own is None:
            others.append(path)
        else:
            found += own
    return found, others


def read_cvat(path: Path) -> list[Annotated] | None:
    """CVAT-for-images: <image name width height> with <box label xtl ytl xbr ybr rotation> in it;
    None if it is another xml.
    """
    root = ElementTree.parse(path).getroot()
    if root.tag != "annotations":
        return None
    found = []
    for image in root.iter("image"):
        size = (float(image.attrib["width"]), float(image.attrib["height"]))
        boxes = []
        for box in image.iter("box"):
            corners = [float(box.attrib[key]) for key in CORNERS]
            corners = enclosing(corners, float(box.attrib.get("rotation", 0)))
            boxes.append(Box(box.attrib["label"], corners, False))
        found.append(Annotated(image.attrib["name"], size, boxes, path))
    return found


def enclosing(corners: list[float], degrees: float) -> list[float]:
    """The upright box around x1 y1 x2 y2 turned about its centre."""
    x1, y1, x2, y2 = corners
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    width = (cos * (x2 - x1) + sin * (y2 - y1)) / 2
    height = (sin * (x2 - x1) + cos * (y2 - y1)) / 2
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return [x - width, y - height, x + width, y + height] if degrees else corners


def read_coco(path: Path) -> list[Annotated] | None:
    """COCO json: "images", "annotations" with "bbox" as x y width height, "categories"; what is
    "iscrowd" is ignored. None if it is another json, or none at all.
    """
    try:
        content = json.loads(read_text(path))
    except (DataError, json.JSONDecodeError, RecursionError):
        return None
    parts = {"images", "annotations", "categories"}
    if not isinstance(content, dict) or not parts <= content.keys():
        return None
    labels = {kind["id"]: str(kind["name"]) for kind in content["categories"]}
    boxes = {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        left, top, width, height = map(float, one["bbox"])
        corners = [left, top, left + width, top + height]
        box = Box(labels[one["category_id"]], corners, bool(one.get("iscrowd", 0)))
        boxes[one["image_id"]].append(box)
    return [
        Annotated(i["file_name"], (float(i["width"]), float(i["height"])), boxes[i["id"]], path)
        for i in content["images"]
    ]


def locate(folder: Path, found: list[Annotated]) -> tuple[list[tuple[Path, Annotated]], list[str]]:
    """The photographs that are annotated or lie in a clean/, and the names of those not there.

    Raises DataError if none is there, one is annotated twice, or two bear the name.
    """
    paths = [path for path in visible_files(folder) if path.suffix.lower() in SUFFIXES]
    by_name = {}
    for path in paths:
        by_name.setdefault(unicodedata.normalize("NFC", path.name), []).append(path)
    items, missing = {}, []
    for one in found:
        name = unicodedata.normalize("NFC", one.name).replace("\\", "/")
        there = by_name.get(Path(name).name, [])
        # next to or below the file, else anywhere: CVAT has annotations/ next to images/
        near = [path for path in there if path.is_relative_to(one.source.parent)] or there
        exact = [path for path in near if f"/{name_of(path, folder)}".endswith(f"/{name}")] or near
        if not exact:
            missing.append(one.name)
        elif len(exact) > 1:
            both = " or ".join(name_of(path, folder) for path in exact[:2])
            raise DataError(f"{one.source}: image '{one.name}' may be {both}")
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


def decode_photos(
    items: list[tuple[Path, Annotated]], image_size: int, classes: tuple[str, ...]
) -> tuple[list[int], list[Tensor], list[dict], list[Tensor], list[str]]:
    """Places in `items`, pictures, targets, ignored boxes, and remarks on what was left out."""
    places, x, y, ignored, bad, clipped, dropped = [], [], [], [], [], [], []
    for place, (path, one) in enumerate(tqdm(items, "decoding", leave=False, disable=None)):
        try:
            picture, raw_size = read_photo(path, image_size, one.size)
        except DataError as error:
            bad.append(str(error))
            continue
        scale = [new / old for new, old in zip(picture.size, one.size or raw_size, strict=True)]
        boxes, labels, crowds = [], [], []
        for box in one.boxes:
            if len(classes) > 1 and box.label not in classes and not box.ignored:
                raise DataError(
                    f"{one.source}: image '{one.name}': label '{box.label}' is no class"
                )
            corners, cut, empty = fit_box(box.corners, scale, picture.size)
            clipped += [path.name] * (cut and not empty)
            dropped += [path.name] * empty
            if box.ignored and not empty:
                crowds.append(corners)
            elif not empty:
                boxes.append(corners)
                labels.append(1 + classes.index(box.label) if len(classes) > 1 else 1)
        places.append(place)
        x.append(to_tensor(picture))
        y.append(target(boxes, labels))
        ignored.append(target(crowds, [])["boxes"])
    remarks = [left_out(bad).removeprefix("; ")] if bad else []
    for what, where in (("clipped to their photograph", clipped), ("dropped as empty", dropped)):
        if where:
            remarks.append(f"boxes {what}: {len(where)}, the first in {where[0]}")
    return places, x, y, ignored, remarks


def to_tensor(picture: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def fit_box(box: list[float], scale: list[float], size: tuple[int, int]) -> tuple:
    """The box, scaled by its picture's two factors and clipped; was it cut; is nothing left."""
    scaled = [value * factor for value, factor in zip(box, [*scale, *scale], strict=True)]
    inside = [min(max(value, 0.0), end) for value, end in zip(scaled, [*size, *size], strict=True)]
    cut = max(abs(a - b) for a, b in zip(scaled, inside, strict=True)) > 0.01
    return inside, cut, min(inside[2] - inside[0], inside[3] - inside[1]) < SMALLEST


def read_photo(
    path: Path, image_size: int, annotated: tuple[float, float] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """The photograph as the network sees it, and the width and height that it had before.

    Its shorter side becomes `image_size`, or its longer one LONGEST times that, if it is very long.
    It is turned as its EXIF orientation says, unless the annotation's width and height show that
    its boxes were drawn on the photograph as it is stored. Raises DataError that names the file.
    """
    picture = open_picture(path)
    if annotated == picture.size[::-1] != picture.size:
        with Image.open(path) as file:
            back = TURNED_BACK.get(file.getexif().get(0x0112, 1))
        picture = picture if back is None else picture.transpose(back)
    factor = min(image_size / min(picture.size), LONGEST * image_size / max(picture.size))
    wanted = tuple(max(1, round(side * factor)) for side in picture.size)
    return picture.resize(wanted, Image.Resampling.BILINEAR), picture.size


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
    shares = (0.85, 0.15) if fixed else SHARES
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [scene for scene in dict.fromkeys(scenes[i] for i in order) if scene not in test]
    side = dict.fromkeys(test, "test")
    for kind in (True, False):
        mine = [scene for scene in shuffled if (scene in littered) == kind]
        ends = split_ends(len(mine), shares)
        for place, scene in enumerate(mine):
            side[scene] = SPLITS[sum(place >= end for end in ends)]
    parts, dropped = {name: [] for name in SPLITS}, 0
    for i, (scene, name) in enumerate(zip(scenes, names, strict=True)):
        if scene in test and name not in fixed:
            dropped += 1
        else:
            parts[side[scene]].append(i)
    return list(parts.values()), dropped


def split_ends(count: int, shares: tuple[float, ...]) -> list[int]:
    """Where the parts of `count` scenes end, but the last; none is empty if there are enough."""
    ends, last = [], len(shares) - 1
    for place, share in enumerate(np.cumsum(shares)[:-1]):
        most = count - (last - place) if count > last else count
        ends.append(min(round(float(share) * count), most))
    return ends


def scenes_of(names: list[str], x: list[Tensor], pattern: str) -> list[int]:
    """A number for each picture's scene. Two pictures show one scene if they look alike, or if the
    regular expression `pattern` finds the same text in their names; so do the pictures between.
    """
    bits = np.stack([difference_hash(picture) for picture in x]).astype(np.int32)
    same = bits @ bits.T + (1 - bits) @ (1 - bits).T >= 64 - ALIKE
    found = search_names(pattern, names)
    texts = np.array([match[0] if match else f"/{i}" for i, match in enumerate(found)])
    same |= texts[:, None] == texts[None]
    scenes = np.arange(len(names))
    while True:  # the smallest number spreads until nothing changes
        spread = np.where(same, scenes[None], len(names)).min(1)
        if (spread == scenes).all():
            return scenes.tolist()
        scenes = spread


def search_names(pattern: str, names: list[str]) -> list[re.Match | None]:
    """What the pattern finds in each file's own name. Raises DataError if it needs too long."""
    if not pattern:
        return [None] * len(names)
    limited = hasattr(signal, "setitimer")  # Windows has none

    def give_up(*_: object) -> None:
        raise DataError("scene_pattern: the regular expression needs too long; make it simpler")

    before = signal.signal(signal.SIGALRM, give_up) if limited else None
    try:
        if limited:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        return [re.search(pattern, name.rsplit("/")[-1]) for name in names]
    finally:
        if limited:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def difference_hash(x: Tensor) -> np.ndarray:
    """64 bits: whether the brightness rises from each of 8 x 9 cells to its right neighbour."""
    small = F.interpolate(x.float().mean(0)[None, None], (8, 9), mode="area")[0, 0]
    return (small[:, 1:] > small[:, :-1]).flatten().numpy()


# --- batches ----------------------------------------------------------------------------------


def training_batches(
    pictures: Pictures,
    batch_size: int,
    jitter: float,
    device: torch.device,
    part: slice = slice(None),
) -> Iterator[tuple[list[Tensor], list[dict], int]]:
    """Shuffled, augmented float pictures (3, H, W) in [0, 1] with their targets, each once, and
    their number in the batch, of which only `part` is made; it may be empty.
    """
    for chosen in torch.randperm(len(pictures.x)).split(batch_size):
        draws = torch.stack([torch.rand(4) for _ in chosen])
        own = list(zip(chosen[part].tolist(), draws[part].tolist(), strict=True))
        shown = [(without_ignored(pictures, i).to(device), pictures.y[i], four) for i, four in own]
        pairs = [augment(x, y, jitter, four) for x, y, four in shown]
        y = [{name: value.to(device) for name, value in y.items()} for _, y in pairs]
        yield [x for x, _ in pairs], y, len(chosen)


def without_ignored(pictures: Pictures, number: int) -> Tensor:
    """The picture, grey where nothing counts, so that nothing is learned from there."""
    x, boxes = pictures.x[number], pictures.ignored[number].round().int().tolist()
    if boxes:
        x = x.clone()
    for x1, y1, x2, y2 in boxes:
        x[:, y1:y2, x1:x2] = 128
    return x


def batches(x: list[Tensor], batch_size: int, device: torch.device) -> Iterator[list[Tensor]]:
    """Float pictures in [0, 1], in order."""
    for start in range(0, len(x), batch_size):
        yield [picture.to(device).float() / 255 for picture in x[start : start + batch_size]]


def augment(
    x: Tensor, y: dict[str, Tensor], jitter: float, draws: list[float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A float picture: mirrored half of the time, scaled by 1 / jitter to jitter and, if enlarged,
    a random part of the old size cut out. Boxes of which less than a third is left go. `draws` are
    four random numbers in [0, 1).
    """
    boxes, (height, width) = y["boxes"].clone(), x.shape[1:]
    flip, factor, top, left = draws
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
