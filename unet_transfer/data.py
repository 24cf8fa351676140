"""Images with a class each, fewer with a mask, split so that no test pixel is ever trained on.

digits   scenes of scikit-learn's handwritten digits over crops of its two photographs
pets     Oxford-IIIT Pet (Parkhi et al. 2012): breed, and pet against background
folder   your own images/, masks/ and classes.csv
"""

import csv
import hashlib
import io
import math
import os
import shutil
import sys
import tarfile
import tempfile
import time
import unicodedata
import zlib
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
from torch import Tensor
from tqdm import tqdm

IGNORE = 255  # of a mask's pixel: counts in neither loss nor metric
NEAREST = Image.Resampling.NEAREST
SPLITS = ("train", "val", "test")
SHARES = (0.6, 0.2, 0.2)
PETS = {  # name of the archive: its md5, as torchvision has it
    "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
}
PETS_URL = "https://thor.robots.ox.ac.uk/pets/"

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


def unpack(archive: Path, folder: Path) -> None:
    """The archive's files in `folder`: all of them or, if it is killed meanwhile, none.

    Raises DataError if the archive is damaged.
    """
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as temporary:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise DataError(f"{archive}: damaged, remove it and start again ({error})") from error
        for part in Path(temporary).iterdir():
            shutil.rmtree(folder / part.name, ignore_errors=True)  # what an older start left there
            part.replace(folder / part.name)


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


# --- end of reading pictures ------------------------------------------------------------------


class Sizes(NamedTuple):
    """Height and width in pixels."""

    image: tuple[int, int]  # to segment
    crop: tuple[int, int]  # to classify


class Examples(NamedTuple):
    """uint8 images (N, 3, H, W) and their classes (N,) or masks (N, H, W)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Examples":
        return Examples(self.x.to(device), self.y.to(device))


class Splits(NamedTuple):
    train: Examples
    val: Examples
    test: Examples

    def to(self, device: torch.device) -> "Splits":
        return Splits(*(part.to(device) for part in self))


class Task(NamedTuple):
    name: str
    classes: tuple[str, ...]  # of the images
    segments: tuple[str, ...]  # of the pixels
    classification: Splits
    segmentation: Splits
    mirror: bool  # whether an image's mirror image has the same class
    note: str  # what the person who started the run should know


def load(
    *,
    dataset: str,
    data_dir: Path,
    sizes: Sizes,
    digit_classes: int,
    crop_count: int,
    ignore_index: int,
    mask_count: int,
    seed: int,
) -> Task:
    """The task `dataset`.

    For training on digits, `crop_count` crops are composed for classification and `mask_count`
    scenes for segmentation. Raises DataError if the data set cannot be had.
    """
    if dataset == "digits":
        return load_digits(
            sizes, seed, digit_classes=digit_classes, crop_count=crop_count, mask_count=mask_count
        )
    if dataset == "folder":
        return load_folder(data_dir, sizes, seed, ignore_index)
    return load_pets(data_dir, sizes, seed)


# --- scenes of digits -------------------------------------------------------------------------


def load_digits(
    sizes: Sizes, seed: int, *, digit_classes: int, crop_count: int, mask_count: int
) -> Task:
    """One digit to classify, one to three to segment, over photographs.

    The digits and the photographs are split before scenes are composed from them.
    """
    from sklearn.datasets import load_digits as bundled_digits
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    bunch = bundled_digits()
    y = torch.from_numpy(bunch.target)
    kept = (y < digit_classes).nonzero()[:, 0]
    kept = kept[torch.randperm(len(kept), generator=generator)]
    digits = torch.from_numpy(bunch.images).float()[kept, None] / 16
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    digit_parts = [part.tolist() for part in cut_shares(len(kept), SHARES)]
    column_parts = [part.tolist() for part in cut_shares(photos.shape[3], SHARES)]

    crops, scenes = [], []
    counts = ((crop_count, mask_count), (1000, 200), (1000, 500))
    for number, (of_crops, of_scenes) in enumerate(counts):
        own = digit_parts[number]
        source = (digits[own], y[kept][own], photos[..., column_parts[number]].float() / 255)
        generator.manual_seed(3 * seed + number)  # so validation and test need no mask_count
        x, _, first = compose(*source, of_crops, sizes.crop, grid=1, generator=generator)
        crops.append(Examples(x, first))
        x, masks, _ = compose(*source, of_scenes, sizes.image, grid=2, generator=generator)
        scenes.append(Examples(x, masks))
    names = tuple(map(str, range(digit_classes)))
    segments = ("background", *names)
    note = "data: scenes of scikit-learn's digits (for real photographs see pets.yaml)"
    return Task("digits", names, segments, Splits(*crops), Splits(*scenes), False, note)


def compose(
    digits: Tensor,
    classes: Tensor,
    photos: Tensor,
    count: int,
    size: tuple[int, int],
    *,
    grid: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes (count, 3, H, W) uint8, masks (count, H, W) uint8, class of each first digit.

    Each scene has one to three digits in different cells of a grid x grid raster, one at the most
    if grid is 1: ink of one random colour, laid over a crop of a photograph by opacity. In the
    mask 0 is background, 1 + class a digit.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    cell = (size[0] / grid, size[1] / grid)
    scene = crop_at_random(photos, count, size, 32 / min(cell), uniform)
    mask = torch.zeros(count, *size, dtype=torch.uint8)
    cells = torch.rand(count, grid * grid, generator=generator).argsort(1)
    number = torch.randint(1, min(3, grid * grid) + 1, (count,), generator=generator)
    chosen = torch.randint(len(digits), (count, 3), generator=generator)
    for turn in range(min(3, grid * grid)):
        corner = torch.stack((cells[:, turn] // grid, cells[:, turn] % grid), 1)
        jitter = uniform(-0.1, 0.1, count, 2) if grid == 1 else uniform(-0.25, 0.25, count, 2)
        centre = (corner + 0.5 + jitter) * torch.tensor(cell)
        side = uniform(0.6, 1.1, count) * min(cell)
        ink = place(digits[chosen[:, turn]], centre, side, uniform(-0.5, 0.5, count), size)
        ink = ink * (number > turn)[:, None, None]
        opacity = ink[:, None] * uniform(0.6, 1.0, count)[:, None, None, None]
        colour = uniform(0, 1, count, 3)[:, :, None, None]
        scene = scene * (1 - opacity) + colour * opacity
        label = (1 + classes[chosen[:, turn]]).to(torch.uint8)[:, None, None]
        mask = torch.where(ink > 0.5, label, mask)
    return (scene * 255).round().byte(), mask, classes[chosen[:, 0]]


def crop_at_random(
    photos: Tensor, count: int, size: tuple[int, int], zoom: float, uniform: Callable
) -> Tensor:
    """Random crops (count, 3, H, W) of photos (P, 3, h, w) at 0.5 to 1.5 times `zoom`, mirrored
    half of the time, with random brightness and contrast.
    """
    height, width = photos.shape[2:]
    extent = torch.stack((torch.full((count,), float(size[1])), torch.full((count,), size[0])), 1)
    extent = extent / (uniform(0.5, 1.5, count) * zoom)[:, None]
    half = (extent / torch.tensor([width, height])).clamp(max=1)  # of a crop, in [-1, 1]
    centre = uniform(-1, 1, count, 2) * (1 - half)
    mirrored = half * torch.stack((uniform(-1, 1, count).sign(), torch.ones(count)), 1)
    theta = torch.cat((torch.diag_embed(mirrored), centre[:, :, None]), 2)
    which = uniform(0, len(photos), count).long()
    crops = torch.empty(count, 3, *size)
    for number, photo in enumerate(photos):
        mine = which == number
        if not mine.any():
            continue
        points = F.affine_grid(theta[mine], [int(mine.sum()), 3, *size], align_corners=False)
        long = points.reshape(1, -1, size[1], 2)  # one tall picture: the photo is not repeated
        tall = F.grid_sample(photo[None], long, align_corners=False, padding_mode="border")
        crops[mine] = tall[0].view(3, -1, *size).transpose(0, 1)
    contrast, brightness = uniform(0.6, 1.2, count), uniform(-0.15, 0.15, count)
    crops = (crops - 0.5) * contrast[:, None, None, None] + 0.5
    return (crops + brightness[:, None, None, None]).clamp(0, 1)


def place(
    digits: Tensor, centre: Tensor, side: Tensor, angle: Tensor, size: tuple[int, int]
) -> Tensor:
    """Ink (N, H, W) in [0, 1] of digits (N, 1, 8, 8) of `side` pixels, turned by `angle` radians,
    at `centre` (N, 2) = (row, column).
    """
    height, width = size
    row, column = centre.T
    # from the scene's [-1, 1] to pixels around the centre, turned, to the digit's [-1, 1]
    cos, sin = 2 / side * angle.cos(), 2 / side * angle.sin()
    right, down = width / 2 - column, height / 2 - row
    across = (cos * width / 2, -sin * height / 2, cos * right - sin * down)
    along = (sin * width / 2, cos * height / 2, sin * right + cos * down)
    theta = torch.stack([torch.stack(part, 1) for part in (across, along)], 1)
    points = F.affine_grid(theta, [len(digits), 1, height, width], align_corners=False)
    ink = F.grid_sample(digits, points, align_corners=False)[:, 0]
    return ((ink - 0.25) / 0.4).clamp(0, 1)


def cut_shares(count: int, shares: tuple[float, ...]) -> list[Tensor]:
    """0 .. count - 1 in as many runs of neighbours as there are shares."""
    sizes = [round(share * count) for share in shares[:-1]]
    return list(torch.arange(count).split([*sizes, count - sum(sizes)]))


# --- photographs ------------------------------------------------------------------------------


class Item(NamedTuple):
    """A photograph, its class (-1: none) and its mask, if it has one."""

    image: Path
    label: int
    mask: Path | None


def load_pets(data_dir: Path, sizes: Sizes, seed: int) -> Task:
    """Breed, and pet against background; the border that the trimaps leave open is ignored.

    The official test set; a fifth of the official trainval set is the validation set.
    """
    root = data_dir / "oxford-iiit-pet"
    for name, md5 in PETS.items():
        if not (root / name.split(".")[0]).is_dir():
            what = f"Oxford-IIIT Pet's {name}"
            unpack(download(PETS_URL + name, root / name, what, f"md5:{md5}"), root)
    parts, names = {}, {}
    for part in ("trainval", "test"):
        lines = read_text(root / "annotations" / f"{part}.txt").splitlines()
        parts[part] = []
        for name, label, *_ in (line.split() for line in lines if line.strip()):
            names[int(label) - 1] = name.rsplit("_", 1)[0]
            mask = root / "annotations" / "trimaps" / f"{name}.png"
            item = Item(root / "images" / f"{name}.jpg", int(label) - 1, mask)
            parts[part].append(item)
    train, val = shuffled(parts["trainval"], (0.8, 0.2), seed)
    values = torch.full((256,), IGNORE, dtype=torch.uint8)
    values[1], values[2] = 1, 0  # 3 is the border
    return photograph_task(
        "Oxford-IIIT Pet",
        tuple(names[label] for label in sorted(names)),
        ("background", "pet"),
        {"train": train, "val": val, "test": parts["test"]},
        values,
        sizes,
        cache=data_dir,
    )


def load_folder(folder: Path, sizes: Sizes, seed: int, ignore_index: int) -> Task:
    """images/**, masks/** (PNG of class indices, same names), classes.csv (columns file, class).

    Subfolders images/train, images/val, images/test fix the splits, else the seed does, in equal
    shares of the images with and without a mask. The lines of segments.txt name the indices of the
    masks; it may be missing if all masks hold 0 and 255. Raises DataError that names the file at
    fault.
    """
    paths = visible_files(folder / "images")
    if not paths:
        layout = "expected images/, masks/ and classes.csv in data_dir"
        raise DataError(f"{folder / 'images'}: there are no images ({layout})")
    images = {composed(path.relative_to(folder / "images").as_posix()): path for path in paths}
    labels = read_labels(folder / "classes.csv", set(images))
    classes = tuple(sorted(set(labels.values())))
    masks = find_masks(folder / "masks")
    items = {}
    for name, path in images.items():
        label = classes.index(labels[name]) if name in labels else -1
        items[name] = Item(path, label, masks.get(without_suffix(name)))
    segments, values = read_segments(folder, list(masks.values()), ignore_index)
    tops = {name: name.split("/")[0].lower() for name in items}
    if set(tops.values()) <= set(SPLITS):
        parts = [[items[name] for name in items if tops[name] == split] for split in SPLITS]
    else:
        parts = [[], [], []]
        for masked in (True, False):
            own = [item for item in items.values() if (item.mask is not None) == masked]
            parts = [a + b for a, b in zip(parts, shuffled(own, SHARES, seed), strict=True)]
    splits = dict(zip(SPLITS, parts, strict=True))
    name = folder.resolve().name
    task = photograph_task(name, classes, segments, splits, values, sizes, cache=folder)
    lost = sorted(masks.keys() - set(map(without_suffix, images)))
    more = f"; masks without an image: {len(lost)}, the first: {masks[lost[0]]}" if lost else ""
    return task._replace(note=task.note + more)


def find_masks(folder: Path) -> dict[str, Path]:
    """Path of each .png (or .PNG) by its name without it, as seen from `folder`."""
    files = visible_files(folder)
    paths = [path for path in files if path.suffix.lower() == ".png"]
    if files and not paths:
        raise DataError(f"{files[0]}: expected masks in PNG, which keeps their numbers")
    return {without_suffix(composed(path.relative_to(folder).as_posix())): path for path in paths}


def without_suffix(name: str) -> str:
    return name.rpartition(".")[0] or name


def read_segments(
    folder: Path, masks: list[Path], ignore_index: int
) -> tuple[tuple[str, ...], Tensor]:
    """The segments' names, and the segment (256,) that each value of a mask stands for.

    Masks of 0 and 255 alone are background and object, whatever `ignore_index` is.
    """
    path, segments = folder / "segments.txt", ("background", "object")
    if path.exists() or not masks:
        lines = read_text(path).splitlines()
        segments = tuple(line.strip() for line in lines if line.strip())
    values = torch.arange(256, dtype=torch.uint8)
    if len(segments) == 2 and found_values(folder, masks) == [0, 255]:
        values[255] = 1
        return segments, values
    if not path.exists():
        raise DataError(f"{path}: there is no such file; only masks of 0 and 255 need none")
    values[ignore_index] = IGNORE
    return segments, values


def found_values(folder: Path, masks: list[Path]) -> list[int]:
    """All values that the readable masks hold; kept in a file of `folder`."""
    stats = [stamp(path) for path in masks]

    def make() -> list[int]:
        found: set[int] = set()
        for path in masks:
            with suppress(DataError):
                found |= set(np.unique(np.array(open_mask(path))).tolist())
        return sorted(int(value) for value in found)

    return cached(folder, "values", (stats, DECODING), make)


def composed(name: str) -> str:
    """A name in the one of Unicode's spellings that names are compared in."""
    return unicodedata.normalize("NFC", name)


def read_labels(path: Path, known: set[str]) -> dict[str, str]:
    """Class by file, from a csv with columns `file`, relative to images/, and `class`, separated
    by commas, semicolons or tabs. Raises DataError if a file is not there or has two classes.
    """
    text = read_text(path)
    separator = max(",;\t", key=text.split("\n")[0].count)
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True))
    except csv.Error as error:
        raise DataError(f"{path}: not a csv ({error})") from error
    header = [cell.strip() for cell in rows[0]] if rows else []
    if not {"file", "class"} <= set(header):
        raise DataError(f"{path}: expected the columns file,class")
    labels = {}
    for row in rows[1:]:
        cells = dict(zip(header, map(str.strip, row), strict=False))
        name, label = composed(cells.get("file", "")), cells.get("class", "")
        if label and labels.setdefault(name, label) != label:
            raise DataError(f"{path}: images/{name} has two classes: {labels[name]}, {label}")
    if lost := sorted(labels.keys() - known):
        raise DataError(f"{path}: images/{lost[0]} is not there")
    if (count := len(set(labels.values()))) < 2:
        raise DataError(f"{path}: expected at least 2 classes to learn from, found {count}")
    return labels


def shuffled(items: list[Item], shares: tuple[float, ...], seed: int) -> list[list[Item]]:
    """Disjoint random parts in the given shares."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [[items[place] for place in order[part]] for part in cut_shares(len(items), shares)]


def photograph_task(
    name: str,
    classes: tuple[str, ...],
    segments: tuple[str, ...],
    splits: dict[str, list[Item]],
    values: Tensor,
    sizes: Sizes,
    *,
    cache: Path,
) -> Task:
    """The task of photographs, each decoded once; kept in a file of the folder `cache`.

    `values` (256,) is the segment that a mask's value stands for. A photograph's mirror image is
    taken to be of the same class.
    """
    files = [item for items in splits.values() for item in items]
    stats = [stamp(path) for item in files for path in (item.image, item.mask) if path]
    key = (splits, stats, sizes, segments, values.tolist(), DECODING)

    def decode() -> list[tuple]:
        return [decode_items(items, values, len(segments), sizes) for items in splits.values()]

    crops, images, unreadable = zip(*cached(cache, "decoded", key, decode), strict=True)
    for kind, parts in (("class", crops), ("mask", images)):
        for split, part in zip(splits, parts, strict=True):
            if part is None:
                raise DataError(
                    f"{name}: no image of the split '{split}' has a {kind}; without fixed splits "
                    f"at least 5 images with a class and 5 with a mask are needed"
                )
    crops, images = (Splits(*(Examples(*part) for part in parts)) for parts in (crops, images))
    bad = [line for lines in unreadable for line in lines]
    note = f"data: {name}{left_out(bad)}{absent(name, segments, images)}"
    return Task(name, classes, segments, crops, images, True, note)


def absent(name: str, segments: tuple[str, ...], images: Splits) -> str:
    """A note on segments that are in no validation or test mask. Raises DataError if one is in no
    training mask.
    """
    seen = [set(part.y.unique().tolist()) for part in images]
    for number, segment in enumerate(segments):
        if number not in seen[0]:
            raise DataError(
                f"{name}: the segment '{segment}' (index {number}) is in no training mask; "
                f"see segments.txt and ignore_index"
            )
    lost = [s for n, s in enumerate(segments) if n not in seen[1] or n not in seen[2]]
    return f"; in no validation or no test mask: {', '.join(lost)}" if lost else ""


def decode_items(items: list[Item], values: Tensor, segments: int, sizes: Sizes) -> tuple:
    """(images, classes), (images, masks), each None if there are none, and the unreadable files.

    Images are resized bilinearly with antialiasing, masks to the nearest neighbour.
    """
    crops, images, bad = [], [], []
    for item in tqdm(items, "decoding", leave=False, disable=None):
        try:
            image = open_picture(item.image)
            mask = open_mask(item.mask) if item.mask else None
        except DataError as error:
            bad.append(str(error))
            continue
        if mask is not None:
            mask = to_segments(mask, item, image.size, values, segments)
            mask = torch.from_numpy(np.array(mask.resize(sizes.image[::-1], NEAREST)))
            images.append((shrink(image, sizes.image), mask))
        if item.label >= 0:
            crops.append((shrink(image, sizes.crop), torch.tensor(item.label)))
    parts = (
        tuple(map(torch.stack, zip(*part, strict=True))) if part else None
        for part in (crops, images)
    )
    return *parts, bad


def open_mask(path: Path) -> Image.Image:
    """As it is. Raises DataError that names the file, whatever Pillow raises."""
    try:
        with Image.open(path) as file:
            file.load()
            return file
    except Exception as error:  # a broken file makes Pillow's readers raise almost anything
        raise DataError(f"{path} ({type(error).__name__}: {error})") from error


def to_segments(
    mask: Image.Image, item: Item, size: tuple[int, int], values: Tensor, segments: int
) -> Image.Image:
    """The mask's segments as a picture. Raises DataError if it does not fit its image."""
    if mask.size != size or mask.mode not in ("L", "P", "1"):
        raise DataError(
            f"{item.mask}: expected class indices in one channel of {size} as its image, "
            f"found mode {mask.mode} of {mask.size}"
        )
    found = values[torch.from_numpy(np.array(mask).astype(np.int64))]
    wrong = found[(found >= segments) & (found != IGNORE)]
    if len(wrong):
        raise DataError(
            f"{item.mask}: index {int(wrong[0])} occurs in the mask, but segments are {segments}"
        )
    return Image.fromarray(found.numpy())


# --- batches ----------------------------------------------------------------------------------


def training_batches(
    examples: Examples, batch_size: int, steps: int, *, mirror: bool, part: slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented float images (B, 3, H, W) in [0, 1] and targets; all occur once, then again. Of
    each batch only `part`, which is the same whatever the other parts are.
    """
    count = len(examples.x)
    rounds = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count) for _ in range(rounds)])[: steps * batch_size]
    for chosen in order.to(examples.x.device).split(batch_size):
        x, y = examples.x[chosen].float() / 255, examples.y[chosen].long()
        x, y = augment(x, y, mirror=mirror)
        yield x[part], y[part]


def batches(examples: Examples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Float images (B, 3, H, W) in [0, 1] and targets, in order."""
    for x, y in zip(examples.x.split(batch_size), examples.y.split(batch_size), strict=True):
        yield x.float() / 255, y.long()


def augment(x: Tensor, y: Tensor, *, mirror: bool) -> tuple[Tensor, Tensor]:
    """Random shift by up to an eighth (the border is repeated), brightness, contrast, mirroring.

    A target (N, H, W) moves with its image, a class (N,) stays.
    """
    count, _, *size = x.shape
    where = []
    for length in size:
        shift = torch.randint(-(length // 8), length // 8 + 1, (count, 1), device=x.device)
        position = torch.arange(length, device=x.device) + shift
        where.append(position.clamp(0, length - 1))
    rows, columns = where[0][:, :, None], where[1][:, None, :]
    if mirror:
        turned = torch.rand(count, 1, 1, device=x.device) < 0.5
        columns = torch.where(turned, size[1] - 1 - columns, columns)
    number = torch.arange(count, device=x.device)[:, None, None]
    x = x.permute(0, 2, 3, 1)[number, rows, columns].permute(0, 3, 1, 2)  # stays channels_last
    y = y[number, rows, columns] if y.dim() == 3 else y
    contrast = 1 + 0.3 * (2 * torch.rand(count, 1, 1, 1, device=x.device) - 1)
    brightness = 0.2 * (2 * torch.rand(count, 1, 1, 1, device=x.device) - 1)
    return ((x - 0.5) * contrast + 0.5 + brightness).clamp(0, 1), y
