"""Pictures of leaves by what ails them, split so that no copy of a training picture is tested.

leaves   drawn leaves with the six looks, over crops of scikit-learn's photographs; no download
folder   class folders of photographs, as published sets of cotton diseases come
"""

import functools
import hashlib
import math
import os
import re
import sys
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, lerp
from tqdm import tqdm

SPLITS = ("train", "val", "test")

# --- reading files: the same in every project that has it -------------------------------------


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


# --- end of reading files ---------------------------------------------------------------------

# --- reading pictures: the same in every project that has it ----------------------------------


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


def shrink(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W), bilinear with antialiasing; the whole picture, whatever its aspect ratio."""
    pixels = np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


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


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The files of each class: a visible subfolder of `folder` each, sorted by name (NFC).

    Raises DataError if there are not at least two classes, or one has no file.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    named = {unicodedata.normalize("NFC", path.name): path for path in folders}
    named.pop("__MACOSX", None)
    if len(named) < 2:
        raise DataError(f"{folder}: expected a folder for each of at least 2 classes")
    files = {name: visible_files(named[name]) for name in sorted(named)}
    if empty := [name for name, paths in files.items() if not paths]:
        raise DataError(f"{folder / empty[0]}: there is no picture in this folder")
    return files


def decode(files: list[Path], size: tuple[int, int] | None, cache: Path) -> tuple:
    """uint8 pictures (N, 3, H, W), their places in `files`, and lines on files left out.

    Without a size all pictures must have one size. The result is kept in the folder `cache`, by
    path, length and time of each file. Raises DataError if no picture can be read.
    """
    stats = [stamp(path) for path in files]

    def make() -> tuple:
        pictures, places, bad = [], [], []
        for place, path in enumerate(tqdm(files, "decoding", leave=False, disable=None)):
            try:
                picture = open_picture(path)
            except DataError as error:
                bad.append(str(error))
                continue
            pictures.append(shrink(picture, size or picture.size[::-1]))
            places.append(place)
            if pictures[-1].shape != pictures[0].shape:
                raise DataError(f"{path}: its size differs from other pictures'; set image_size")
        if not pictures:
            raise DataError(f"{bad[0] if bad else cache}: no picture could be read")
        return torch.stack(pictures), torch.tensor(places), bad

    return cached(cache, "decoded", (stats, size, DECODING), make)


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


def picture_batches(
    inputs: list[str], size: tuple[int, int], batch_size: int, bad: list[str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and uint8 pictures (B, 3, H, W), a batch at a time in memory; adds to `bad` what cannot
    be read.
    """
    names, pictures = [], []
    for name, path in tqdm(find_pictures(inputs).items(), "predicting", leave=False, disable=None):
        try:
            pictures.append(shrink(open_picture(path), size))
            names.append(name)
        except DataError as error:
            bad.append(str(error))
        if len(names) == batch_size:
            yield names, torch.stack(pictures)
            names, pictures = [], []
    if names:
        yield names, torch.stack(pictures)


# --- end of reading pictures ------------------------------------------------------------------

# --- reading weights: the same in every project that has it -----------------------------------


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


# --- end of reading weights -------------------------------------------------------------------


class Examples(NamedTuple):
    """uint8 images (N, 3, S, S) and their classes (N,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Examples":
        return Examples(self.x.to(device), self.y.to(device))


class Data(NamedTuple):
    name: str
    classes: tuple[str, ...]
    train: Examples
    val: Examples
    test: Examples
    names: tuple[str, ...]  # of the training pictures
    numbers: dict[str, int]  # for metrics.json
    note: str  # what the person who started the run should know

    def to(self, device: torch.device) -> "Data":
        return self._replace(**{name: getattr(self, name).to(device) for name in SPLITS})


def load(
    *, dataset: str, data_dir: Path, image_size: int, leaf_count: int, same_bits: int, seed: int
) -> Data:
    """Raises DataError if the photographs cannot be had."""
    if dataset == "leaves":
        return load_leaves(data_dir, image_size, leaf_count, seed)
    return load_folder(data_dir, image_size, same_bits, seed)


# --- drawn leaves -----------------------------------------------------------------------------


def load_leaves(folder: Path, image_size: int, count: int, seed: int) -> Data:
    """`count` drawn leaves; train, val and test have backgrounds from different photographs."""
    from sklearn.datasets import load_sample_images  # imported where it is used: it is slow

    photos = np.stack(load_sample_images().images)
    photos = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255
    shares = (0.7, 0.1, 0.2)
    sources = photos.split([round(share * photos.shape[3]) for share in shares], 3)
    counts = [math.ceil(share * count / len(LOOKS)) for share in shares]  # of each look

    def draw_all() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        splits = [[] for _ in shares]
        for look in tqdm(LOOKS, "drawing leaves", leave=False, disable=None):
            for split, number, source in zip(splits, counts, sources, strict=True):
                sizes = [min(250, number - start) for start in range(0, number, 250)]
                split += [draw_leaves(look, n, image_size, source, generator) for n in sizes]
        return tuple(torch.cat(split) for split in splits)

    code = Path(__file__).read_text(encoding="utf-8")  # another drawing, another file
    drawn = cached(folder, "leaves", (image_size, count, seed, torch.__version__, code), draw_all)
    looks = torch.arange(len(LOOKS))
    splits = [Examples(x, looks.repeat_interleave(n)) for x, n in zip(drawn, counts, strict=True)]
    total = len(LOOKS) * sum(counts)
    names = tuple(f"{look}_{n + 1}" for look in LOOKS for n in range(counts[0]))
    note = f"data: {total} drawn leaves; cotton_triplet/cotton6.yaml is for photographs"
    numbers = {"pictures": total, "groups": total}
    return Data("leaves", tuple(LOOKS), *splits, names, numbers, note)


class Sheet(NamedTuple):
    """Where the pixels of N pictures lie on their leaves: u, v (N, 1, S, S), in leaf radii."""

    u: Tensor
    v: Tensor
    generator: torch.Generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def each(self, low: float, high: float, channels: int = 1) -> Tensor:
        """(N, channels, 1, 1)"""
        return self.uniform(low, high, len(self.u), channels, 1, 1)

    def noise(self, cells: int) -> Tensor:
        """(N, 1, S, S) of about -1 to 1, smooth over S / cells pixels."""
        grid = self.uniform(-1, 1, len(self.u), 1, cells, cells)
        return F.interpolate(grid, self.u.shape[2:], mode="bicubic", align_corners=False)

    def places(self, number: int, reach: float) -> list[tuple[Tensor, Tensor]]:
        """Points (N, 1, 1, 1) each, uniform over a disc."""
        far = [reach * self.each(0, 1).sqrt() for _ in range(number)]
        turns = [self.each(0, 2 * math.pi) for _ in range(number)]
        return [(r * turn.cos(), r * turn.sin()) for r, turn in zip(far, turns, strict=True)]

    def spots(
        self, places: list, least: int, radius: tuple[float, float], corners: int = 0
    ) -> Tensor:
        """Distance (N, 1, S, S) from the nearest spot, in radii of that spot.

        A picture has spots at `least` or more of the places: discs, or polygons of `corners`.
        """
        number = self.each(least, len(places) + 1).floor()
        best = torch.full_like(self.u, 99.0)
        for place, (a, b) in enumerate(places):
            right, down = self.u - a, self.v - b
            away = torch.hypot(right, down)
            if corners:
                step, start = 2 * math.pi / corners, self.each(0, 2 * math.pi)
                turns = [start + side * step + self.each(-0.4, 0.4) for side in range(corners)]
                sides = [turn.cos() * right + turn.sin() * down for turn in turns]
                away = torch.stack(sides).amax(0)
            away = away / self.each(*radius)
            best = torch.where(place < number, torch.minimum(best, away), best)
        return best

    def edge(self, distance: Tensor, limit: float = 1.0, soft: float = 0.3) -> Tensor:
        """1 where `distance` is below `limit`, 0 where it is above, with a soft edge."""
        return ((limit - distance) / soft + 0.5).clamp(0, 1)


def draw_leaves(
    look: str, count: int, size: int, photos: Tensor, generator: torch.Generator
) -> Tensor:
    """Pictures (count, 3, size, size) uint8 of leaves with one look."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    u, v = (axis.expand(count, 1, size, size) for axis in (line, line[:, None]))
    flat = Sheet(u, v, generator)
    picture = crop_backgrounds(photos, flat)
    below = pose(flat)  # half of the time another leaf, a healthy one, lies below
    there = below.edge(leaf_outline(below), soft=0.06) * (flat.each(0, 1) < 0.5)
    picture = lerp(picture, blade(below), there)
    sheet = pose(flat)
    shape = leaf_outline(sheet)
    leaf, opacity = LOOKS[look](sheet, blade(sheet), sheet.edge(shape, soft=0.06))
    picture = picture * (1 - 0.4 * sheet.edge(shape, 1.1, 0.3))  # its shadow
    return develop(flat, lerp(picture, leaf, opacity))


def colour(*rgb: float) -> Tensor:
    return torch.tensor(rgb)[:, None, None]


def crop_backgrounds(photos: Tensor, flat: Sheet) -> Tensor:
    """Random crops (N, 3, S, S) of photos (P, 3, h, w), mirrored half of the time."""
    count, size = len(flat.u), flat.u.shape[2]
    half = size * flat.each(0.5, 1.5) / photos.shape[2]  # of a crop, in half heights of a photo
    stretch = photos.shape[2] / photos.shape[3]
    a, b = (flat.each(-1, 1) * (1 - half * wide).clamp(min=0) for wide in (stretch, 1))
    right = flat.u * flat.each(-1, 1).sign()
    points = torch.stack((a + right * half * stretch, b + flat.v * half), -1)[:, 0]
    tall = points.reshape(1, -1, size, 2)  # one tall picture: the photos are not repeated
    crops = F.grid_sample(
        photos.flatten(0, 1)[None], tall, padding_mode="border", align_corners=False
    )
    crops = crops.view(len(photos), 3, count, size, size)
    which = flat.uniform(0, len(photos), count).long()
    return crops[which, :, torch.arange(count)]


def pose(flat: Sheet) -> Sheet:
    """The leaf's coordinates: turned, shifted, foreshortened; its radius 0.6 to 0.9 half sides."""
    turn, scale, squeeze = flat.each(0, 2 * math.pi), flat.each(0.6, 0.9), flat.each(0.7, 1)
    right, down = flat.u + flat.each(-0.2, 0.2), flat.v + flat.each(-0.2, 0.2)
    u = turn.cos() * right - turn.sin() * down
    v = turn.sin() * right + turn.cos() * down
    lean = flat.each(-0.3, 0.3)
    return flat._replace(u=(u + lean * v) / (scale * squeeze), v=v / scale)


def leaf_outline(sheet: Sheet) -> Tensor:
    """Distance from the leaf's middle, 1 at its lobed edge."""
    radius, around = torch.hypot(sheet.u, sheet.v), torch.atan2(sheet.v, sheet.u)
    edge = 1.0
    for lobes, most in ((1, 0.08), (2, 0.1), (3, 0.15), (5, 0.15), (8, 0.04)):
        edge = edge + sheet.each(0, most) * (lobes * around + sheet.each(0, 2 * math.pi)).cos()
    return radius / edge


def blade(sheet: Sheet) -> Tensor:
    """A clean leaf (N, 3, S, S): green, veined, mottled, lit from a side."""
    green = torch.cat((sheet.each(0.1, 0.42), sheet.each(0.34, 0.62), sheet.each(0.06, 0.28)), 1)
    veins = torch.zeros_like(sheet.u)
    for turn in (-1.1, -0.55, 0.0, 0.55, 1.1):  # from the stalk, palmately
        turn = turn + sheet.each(-0.12, 0.12)
        right, down = sheet.u + 0.7, sheet.v
        off, ahead = turn.sin() * right - turn.cos() * down, turn.cos() * right + turn.sin() * down
        veins = torch.maximum(veins, sheet.edge(off.abs(), 0.03, 0.05) * (ahead > 0))
    light = 1 + sheet.each(-0.3, 0.3) * sheet.u + sheet.each(-0.3, 0.3) * sheet.v
    mottled = green * (1 + 0.15 * sheet.noise(5) + 0.12 * sheet.noise(16))
    return (mottled + veins * sheet.each(-0.08, 0.18)) * light


def powdery_mildew(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """White, powdery patches without a clear edge."""
    away = sheet.spots(sheet.places(7, 0.75), 2, (0.15, 0.4)) + 0.4 * sheet.noise(10)
    powder = sheet.edge(away, 0.8, 0.8) * (0.75 + 0.35 * sheet.noise(24)).clamp(0, 1)
    return lerp(leaf, colour(0.9, 0.91, 0.87), powder * sheet.each(0.45, 0.95)), opacity


def aphids(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Two to four clusters of small insects, all dark or all pale."""
    places = []
    for a, b in sheet.places(4, 0.65):
        near = sheet.places(9, 0.25)
        places += [(a + right, b + down) for right, down in near]
    insects = sheet.edge(sheet.spots(places, 18, (0.035, 0.06)), soft=0.6)
    dark = sheet.each(0, 1) < 0.5
    skin = torch.where(dark, colour(0.1, 0.1, 0.06), colour(0.82, 0.85, 0.5))
    return lerp(leaf, skin, insects), opacity


def army_worm(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Ragged holes, some at the edge, with a thin brown rim."""
    away = sheet.spots(sheet.places(8, 0.95), 3, (0.1, 0.26)) + 0.3 * sheet.noise(14)
    leaf = lerp(leaf, colour(0.36, 0.25, 0.1), sheet.edge(away, 1.2) * sheet.each(0.2, 0.9))
    return leaf, opacity * (1 - sheet.edge(away, soft=0.2))


def bacterial_blight(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Angular brown lesions, in a yellow halo."""
    away = sheet.spots(sheet.places(12, 0.8), 5, (0.05, 0.13), corners=4)
    leaf = lerp(leaf, colour(0.75, 0.7, 0.2), sheet.edge(away, 1.5, 0.8) * sheet.each(0.1, 0.6))
    return lerp(leaf, colour(0.27, 0.15, 0.07), sheet.edge(away) * sheet.each(0.65, 1)), opacity


def target_spot(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Round lesions of rings within rings, pale and brown."""
    away = sheet.spots(sheet.places(5, 0.7), 2, (0.16, 0.32)) + 0.06 * sheet.noise(12)
    rings = 0.5 + 0.5 * (2 * math.pi * sheet.each(1.6, 2.6) * away).cos()
    brown = lerp(colour(0.33, 0.2, 0.1), colour(0.78, 0.67, 0.48), rings)
    return lerp(leaf, brown, sheet.edge(away, soft=0.2) * sheet.each(0.6, 1)), opacity


SICK = (powdery_mildew, aphids, army_worm, bacterial_blight, target_spot)
LOOKS = {"healthy": lambda _, *leaf: leaf} | {look.__name__: look for look in SICK}


def develop(flat: Sheet, picture: Tensor) -> Tensor:
    """uint8: specks and glare anywhere, as on any leaf; exposure, tint and grain of a camera."""
    specks = flat.edge(flat.spots(flat.places(7, 1.2), 0, (0.025, 0.05)), soft=0.6)
    picture = lerp(picture, flat.each(0.05, 0.85).expand(-1, 3, -1, -1), specks * 0.8)
    glare = flat.edge(flat.spots(flat.places(2, 0.9), 0, (0.2, 0.5)), 0.6, 1.2)
    picture = lerp(picture, torch.ones(1), glare * flat.each(0, 0.35))
    picture = (picture - 0.45) * flat.each(0.75, 1.2) + 0.45 + flat.each(-0.12, 0.12)
    grain = 0.02 * torch.randn(picture.shape, generator=flat.generator)
    picture = picture * flat.each(0.9, 1.1, 3) + grain
    return (picture.clamp(0, 1) * 255).round().byte()


# --- photographs ------------------------------------------------------------------------------


def load_folder(folder: Path, image_size: int, same_bits: int, seed: int) -> Data:
    """CLASS/* split by groups of near-duplicates, or {train,val,test}/CLASS/* (val may be missing).

    Of folders that fix the splits, pictures of which test (or val) has a near-duplicate are left
    out of the others. Raises DataError that names the folder at fault.
    """
    items, classes = find_items(folder)
    x, places, bad = decode([path for path, *_ in items], (image_size, image_size), folder)
    items = [items[place] for place in places.tolist()]
    y = torch.tensor([label for *_, label in items])
    groups = copy_groups(x, [path.stem for path, *_ in items], same_bits)
    parts, lost = split_items([split for _, split, _ in items], y, groups, seed)
    for split, part in parts.items():
        for label in sorted(set(range(len(classes))) - set(y[part].tolist())):
            few = f"{folder / classes[label]}: too few pictures: none for '{split}'"
            raise DataError(f"{few}; a class needs 4 that do not resemble one another")
    name, count = folder.resolve().name, int(groups.max()) + 1
    note = f"data: {name}; {len(items)} pictures in {count} groups of near-duplicates"
    note += f"; {lost} left out, as a held-out picture resembles them" if lost else ""
    numbers = {"pictures": len(items), "groups": count, "left_out": lost, "unreadable": len(bad)}
    splits = (Examples(x[parts[split]], y[parts[split]]) for split in SPLITS)
    names = tuple(items[i][0].relative_to(folder).as_posix() for i in parts["train"].tolist())
    return Data(name, tuple(classes), *splits, names, numbers, note + left_out(bad))


def find_items(folder: Path) -> tuple[list[tuple[Path, str, int]], list[str]]:
    """(file, split, class) of each file and the names of the classes; without fixed splits, "".

    Raises DataError if the splits have not the same classes.
    """
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    roots = {path.name.lower(): path for path in inside if path.name.lower() in SPLITS}
    if not {"train", "test"} <= roots.keys():
        roots = {"": folder}
    files = {split: class_folders(root) for split, root in roots.items()}
    for found in files.values():
        found.pop("checkpoints", None)  # pretrained weights lie there
    classes = list(next(iter(files.values())))
    for split, found in files.items():
        if len(found) < 2 or found.keys() != files.get("train", found).keys():
            wanted = ", ".join(files.get("train", ())) or "a folder for each of at least 2 classes"
            raise DataError(f"{roots[split]}: expected the folders {wanted} and no others")
    items = [
        (path, split, label)
        for split, found in files.items()
        for label, name in enumerate(classes)
        for path in found[name]
    ]
    return items, classes


def split_items(
    splits: list[str], y: Tensor, groups: Tensor, seed: int
) -> tuple[dict[str, Tensor], int]:
    """Numbers of the pictures of each split, and how many are left out; `splits` holds the split
    of each picture where folders fix it, else "".
    """
    if not splits or not splits[0]:
        return dict(zip(SPLITS, split_by_group(y, groups, (0.6, 0.2, 0.2), seed), strict=True)), 0
    parts, lost = keep_apart(splits, groups)
    if not len(parts["val"]):
        train = parts["train"]
        kept, cut = split_by_group(y[train], groups[train], (0.8, 0.2), seed)
        parts["train"], parts["val"] = train[kept], train[cut]
    return parts, lost


def difference_hashes(x: Tensor) -> Tensor:
    """(8, N, 128) of -1 and 1: whether a picture gets lighter rightwards and downwards, in 8 x 8
    places, for each of its 8 rotations by right angles and mirror images.
    """
    grey = F.interpolate(x.float().mean(1, keepdim=True), (9, 9), mode="area")[:, 0]
    turned = [torch.rot90(grey, turn, (1, 2)) for turn in range(4)]
    turned = torch.stack(turned + [image.flip(2) for image in turned])
    right = turned[..., :8, 1:] > turned[..., :8, :8]
    down = turned[..., 1:, :8] > turned[..., :8, :8]
    return torch.cat((right.flatten(2), down.flatten(2)), 2).float() * 2 - 1


def copy_groups(x: Tensor, names: list[str], same_bits: int) -> Tensor:
    """The group (N,) of each picture: linked if their hashes differ in at most `same_bits` of 128,
    in any of 8 orientations, or if one is named as the other with an ending (leaf_1, leaf_1_crop).
    """
    from scipy.sparse import coo_matrix  # imported where it is used: it is slow
    from scipy.sparse.csgraph import connected_components

    hashes = difference_hashes(x)
    links = []
    for start in range(0, len(x), 1024):
        block = hashes[0, start : start + 1024]
        alike = functools.reduce(torch.maximum, (block @ turned.T for turned in hashes))
        differing = (128 - alike) / 2
        links.append((differing <= same_bits).nonzero() + torch.tensor([start, 0]))
    first = {}
    for number, name in enumerate(names):
        first.setdefault(name, number)
    for number, name in enumerate(names):
        ends = [match.start() for match in re.finditer(r"[^A-Za-z0-9]", name)]
        stems = [first[name[:end]] for end in ends if name[:end] in first]
        links.append(torch.tensor([[number, stem] for stem in stems]).reshape(-1, 2).long())
    rows, columns = torch.cat(links).T.numpy()
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), (len(x), len(x)))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


def split_by_group(y: Tensor, groups: Tensor, shares: tuple[float, ...], seed: int) -> list[Tensor]:
    """Numbers of the pictures of each split; whole groups, in `shares` of every class."""
    generator = torch.Generator().manual_seed(seed)
    members = [(groups == group).nonzero()[:, 0].tolist() for group in groups.unique()]
    members = [members[place] for place in torch.randperm(len(members), generator=generator)]
    chosen = [[] for _ in shares]
    for label in y.unique().tolist():
        mine = [group for group in members if y[group[0]] == label]
        wanted = torch.tensor(shares) * sum(map(len, mine))
        for part in mine:
            split = int(wanted.argmax())
            chosen[split] += part
            wanted[split] -= len(part)
    return [torch.tensor(sorted(part), dtype=torch.long) for part in chosen]


def keep_apart(splits: list[str], groups: Tensor) -> tuple[dict[str, Tensor], int]:
    """Numbers of the pictures of each given split, and how many are left out, so that no group is
    in two splits: it stays in test, else in val.
    """
    parts, taken, left_out = {}, set(), 0
    for split in reversed(SPLITS):
        mine = [number for number, name in enumerate(splits) if name == split]
        kept = [number for number in mine if int(groups[number]) not in taken]
        taken |= {int(groups[number]) for number in kept}
        left_out += len(mine) - len(kept)
        parts[split] = torch.tensor(kept, dtype=torch.long)
    return parts, left_out


def find_program(name: str, data_dir: Path) -> bytes:
    """The exported network `name`, a path, or a file of data_dir/checkpoints.

    Raises DataError if it is not there, or holds pickled objects: their code would run.
    """
    paths = [Path(os.path.expanduser(name)), data_dir / "checkpoints" / name]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise DataError(f"resnet: there is neither {paths[0]} nor {paths[1]}")
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(found[0]) as archive:
        if any("custom_obj" in member for member in archive.namelist()):
            raise DataError(f"{found[0]}: it holds pickled objects, whose code would run")
    return found[0].read_bytes()


# --- batches ----------------------------------------------------------------------------------


def pk_batches(y: Tensor, classes: int, pictures: int) -> list[Tensor]:
    """Batches of numbers: `pictures` of each of `classes` classes of y (N,), every number in one.

    Each class, shuffled, is cut into runs of K; a batch takes a run of each of the P classes with
    most runs left. What a run or a class lacks is drawn again from the class.
    """
    members = [(y == label).nonzero()[:, 0] for label in range(int(y.max()) + 1)]
    runs = [cut_into_runs(own, pictures) for own in members]
    found = []
    while any(runs):
        left = torch.tensor([len(own) for own in runs]) + torch.rand(len(runs)) / 2
        chosen = left.topk(min(classes, len(runs))).indices.tolist()
        parts = [runs[c].pop() if runs[c] else sample_from(members[c], pictures) for c in chosen]
        found.append(torch.cat(parts))
    return found


def cut_into_runs(numbers: Tensor, length: int) -> list[Tensor]:
    """`numbers`, shuffled, in runs of `length`; the last is filled with numbers drawn again."""
    shuffled = numbers[torch.randperm(len(numbers))]
    filled = torch.cat((shuffled, sample_from(numbers, -len(numbers) % length)))
    return list(filled.split(length))


def sample_from(numbers: Tensor, count: int) -> Tensor:
    return numbers[torch.randint(len(numbers), (count,))]


def count_batches(y: Tensor, classes: int, pictures: int) -> int:
    """How many batches pk_batches makes."""
    runs = [math.ceil(count / pictures) for count in y.bincount().tolist()]
    return max(max(runs), math.ceil(sum(runs) / min(classes, len(runs))))


def augment(x: Tensor) -> Tensor:
    """Random mirroring, rotation, zoom and shift (the border is reflected), light and colour."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, device=x.device)

    count = len(x)
    angle, zoom = uniform(-math.pi, math.pi, count), uniform(0.8, 1.1, count)
    mirrored = uniform(-1, 1, count).sign()
    cos, sin, shift = zoom * angle.cos(), zoom * angle.sin(), uniform(-0.12, 0.12, 2, count)
    rows = (torch.stack((cos * mirrored, -sin, shift[0]), 1),)
    rows += (torch.stack((sin * mirrored, cos, shift[1]), 1),)
    points = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, points, padding_mode="reflection", align_corners=False)
    gain = uniform(0.75, 1.25, count, 1, 1, 1) * uniform(0.92, 1.08, count, 3, 1, 1)
    return ((x - 0.5) * gain + 0.5 + uniform(-0.12, 0.12, count, 1, 1, 1)).clamp(0, 1)


def batches(examples: Examples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Float images (B, 3, S, S) in [0, 1] and their classes, in order, as they are."""
    for x, y in zip(examples.x.split(batch_size), examples.y.split(batch_size), strict=True):
        yield x.float() / 255, y


def thumbnails(x: Tensor, size: int = 48) -> Tensor:
    """uint8 images (N, 3, S, S) at `size` pixels, or as they are if they are smaller."""
    if x.shape[2] <= size:
        return x
    parts = [F.interpolate(part.float(), (size, size), mode="area") for part in x.split(256)]
    return torch.cat([part.round().byte() for part in parts])
