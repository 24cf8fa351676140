"""Small images with a class each, and strange ones, which are of none of the classes.

digits   the 1,797 handwritten digits that come with scikit-learn
mnist    MNIST; FashionMNIST, where it can be had, is strange to it
folder   your own images: train/CLASS/*, test/CLASS/*
"""

import gzip
import hashlib
import os
import shutil
import sys
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

SHARES = (0.5, 0.1, 0.4)  # digits: training, validation, test
LEAST = 10  # pictures in train/ and in test/
STRANGE = 1000  # crops of photographs, at most

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


def read_idx(name: str, data_dir: Path) -> list[tuple[Tensor, Tensor]]:
    """uint8 images (N, 1, 28, 28) and classes (N,) of the training and the test set of MNIST or
    FashionMNIST, from data_dir/NAME/raw (packed or not), or downloaded to it.

    Raises DataError that names the damaged file, or what was tried.
    """
    from torchvision import datasets  # imported where it is used: it costs two seconds
    from torchvision.datasets.mnist import read_image_file, read_label_file

    kind, parts = getattr(datasets, name), []
    for number, (packed, md5) in enumerate(kind.resources):
        path = data_dir / name / "raw" / packed.removesuffix(".gz")
        if not path.is_file():
            unzip(fetch_idx(kind.mirrors, packed, md5, path), path)
        try:
            parts.append((read_label_file if number % 2 else read_image_file)(str(path)))
        except (OSError, ValueError, AssertionError, RuntimeError, IndexError) as error:
            reason = str(error) or type(error).__name__
            raise DataError(f"{path}: damaged; remove it and start again ({reason})") from error
    pairs = [(parts[0][:, None], parts[1].long()), (parts[2][:, None], parts[3].long())]
    if any(len(x) != len(y) for x, y in pairs):
        raise DataError(f"{data_dir / name / 'raw'}: there are not as many images as classes")
    return pairs


def fetch_idx(mirrors: list[str], packed: str, md5: str, path: Path) -> Path:
    """The packed file, which may lie there already, from the first mirror that answers."""
    target = path.with_name(packed)
    if target.is_file():
        return target
    for number, mirror in enumerate(reversed(mirrors)):
        try:
            return download(mirror + packed, target, packed, f"md5:{md5}")
        except DataError:
            if number == len(mirrors) - 1:
                raise
    raise DataError(f"{target}: there is nowhere to download it from")


def unzip(packed: Path, path: Path) -> None:
    """`path` from its .gz file; raises DataError if that is damaged."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with gzip.open(packed) as source, temporary.open("wb") as file:
            shutil.copyfileobj(source, file)
        temporary.replace(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{packed}: damaged; remove it and start again ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


# --- end of reading pictures ------------------------------------------------------------------


class Images(NamedTuple):
    """uint8 images (N, C, H, W) and their classes (N,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(self.x.to(device), self.y.to(device))


class Data(NamedTuple):
    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    strange: dict[str, Tensor]  # by name, uint8 images (N, C, H, W) to be uncertain about
    note: str  # what the person who started the run should know

    def to(self, device: torch.device) -> "Data":
        parts = {name: getattr(self, name).to(device) for name in ("train", "val", "test")}
        strange = {name: x.to(device) for name, x in self.strange.items()}
        return self._replace(**parts, strange=strange)


def load(*, dataset: str, data_dir: Path, image_size: int, seed: int) -> Data:
    """The data set `dataset`. Strange to it are crops of photographs, its own test images turned
    by 90 degrees, and FashionMNIST for MNIST. Raises DataError if the set cannot be had.
    """
    if dataset == "digits":
        data = load_digits(image_size, seed)
    elif dataset == "mnist":
        data = load_mnist(data_dir, seed)
    else:
        data = load_folder(data_dir, image_size, seed)
    crops = photographs(data.test.x, seed)
    turned = (255 * rotate(as_float(data.test.x), 90)).round().byte()
    return data._replace(strange={"photographs": crops, "turned by 90°": turned} | data.strange)


def load_digits(image_size: int, seed: int) -> Data:
    from sklearn.datasets import load_digits as bundled_digits  # imported where it is used: slow

    bunch = bundled_digits()
    x = torch.from_numpy(bunch.images).float()[:, None] / 16 * 255
    x = F.interpolate(x, size=image_size, mode="bilinear", align_corners=False).round().byte()
    parts = split(Images(x, torch.from_numpy(bunch.target).long()), SHARES, seed)
    note = "data: scikit-learn's digits (--config mc_dropout/mnist.yaml takes MNIST)"
    return Data("digits", tuple(map(str, range(10))), *parts, {}, note)


def load_mnist(data_dir: Path, seed: int) -> Data:
    """The official test set; a twelfth (5,000) of the official training set is for validation."""
    images, test = (Images(*part) for part in read_idx("MNIST", data_dir))
    train, val = split(images, (11 / 12, 1 / 12), seed)
    data = Data("MNIST", tuple(map(str, range(10))), train, val, test, {}, "data: MNIST")
    try:
        fashion = read_idx("FashionMNIST", data_dir)[1][0]
    except DataError as error:
        return data._replace(note=f"data: MNIST; FashionMNIST is left out: {error}")
    return data._replace(strange={"FashionMNIST": fashion})


def load_folder(folder: Path, image_size: int, seed: int) -> Data:
    """Colour images of your own; a tenth of train/ is for validation.

    Files that cannot be read are left out and counted. Raises DataError that names the fault.
    """
    classes, parts, bad = [], [], []
    for part in ("train", "test"):
        files = class_files(folder / part)
        paths = [path for paths in files.values() for path in paths]
        labels = [number for number, paths in enumerate(files.values()) for _ in paths]
        x, places, unreadable = decode(paths, (image_size, image_size), folder)
        y = torch.tensor(labels)[places]
        if len(y) < LEAST or len(y.unique()) < len(files):
            wanted = f"at least {LEAST} readable pictures, of every class one, found {len(y)}"
            raise DataError(f"{folder / part}: expected {wanted}{left_out(unreadable)}")
        classes.append(tuple(files))
        parts.append(Images(x, y))
        bad += unreadable
    if classes[0] != classes[1]:
        differing = sorted(set(classes[0]) ^ set(classes[1]))[0]
        raise DataError(f"{folder}: class '{differing}' is not in both train/ and test/")
    train, val = split(parts[0], (0.9, 0.1), seed)
    name = folder.resolve().name
    return Data(name, classes[0], train, val, parts[1], {}, f"data: {name}{left_out(bad)}")


def class_files(folder: Path) -> dict[str, list[Path]]:
    """As class_folders, whose DataError also says which folders are expected."""
    try:
        return class_folders(folder)
    except DataError as error:
        layout = "expected train/CLASS/* and test/CLASS/*, in data_dir"
        raise DataError(f"{error} ({layout})") from None


def split(images: Images, shares: tuple[float, ...], seed: int) -> list[Images]:
    """Disjoint random parts of the given shares."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    sizes = [round(share * len(order)) for share in shares[:-1]]
    parts = order.split([*sizes, len(order) - sum(sizes)])
    return [Images(images.x[part], images.y[part]) for part in parts]


def choose_images(images: Images, count: int, seed: int) -> Images:
    """`count` images drawn by `seed`; a larger count holds those of a smaller one."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    chosen = order[:count].to(images.x.device)
    return Images(images.x[chosen], images.y[chosen])


def as_float(x: Tensor) -> Tensor:
    """Images in [0, 1] from uint8."""
    return x.float() / 255


# --- strange images ---------------------------------------------------------------------------


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) turned counterclockwise about their centre, on black."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import rotate as turn

    return turn(x, degrees, InterpolationMode.BILINEAR)


def photographs(x: Tensor, seed: int) -> Tensor:
    """Crops of scikit-learn's two photographs, of the form of images `x` (N, C, S, S)."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float()
    if x.shape[1] == 1:
        photos = photos.mean(1, keepdim=True)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    return sample_crops(photos, min(len(x), STRANGE), x.shape[-1], uniform).round().byte()


def sample_crops(photos: Tensor, count: int, size: int, uniform: Callable) -> Tensor:
    """Random crops (count, C, size, size) of photos (P, C, h, w), shrunk to a half to a quarter."""
    _, channels, height, width = photos.shape
    which = uniform(0, len(photos), count).long()
    crops = torch.empty(count, channels, size, size)
    corners = uniform(0, 1, count, 2)
    steps = uniform(2, 5, count).long().clamp(min=1, max=max(1, min(height, width) // size))
    for number, (photo, corner, step) in enumerate(zip(which, corners, steps, strict=True)):
        span = int(step) * size
        top, left = int(corner[0] * (height - span)), int(corner[1] * (width - span))
        picture = photos[photo, :, top : top + span, left : left + span]
        crops[number] = F.avg_pool2d(picture, int(step))
    return crops


# --- batches ----------------------------------------------------------------------------------


def training_batches(
    images: Images, batch_size: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Float images (B, C, H, W) and classes (B,); all occur once, then again in another order."""
    count = len(images.x)
    rounds = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count) for _ in range(rounds)])[: steps * batch_size]
    for chosen in order.to(images.x.device).split(batch_size):
        yield as_float(images.x[chosen]), images.y[chosen]
