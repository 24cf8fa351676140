"""Pairs of image sets X and Y, all images 3x32x32, each with a class.

digits_photographs  scikit-learn's handwritten digits and its two photographs: no download
mnist_cifar100      MNIST and CIFAR-100
mnist_folder        MNIST and your own images: train/CLASS/*, test/CLASS/*
folder              your own images and scikit-learn's photographs
"""

import gzip
import hashlib
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

SIZE = 32  # height and width in pixels
SHARES = (0.6, 0.15, 0.25)  # train, validation, test, of the bundled digits and photographs
VALIDATION = 0.05  # of the training images of all other sets
CHUNK = 500  # images at a time where nothing is trained
LEAST = 40  # images of your own in train/ and in test/

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


class Images(NamedTuple):
    """uint8 images (N, 3, 32, 32) and their classes (N,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(self.x.to(device), self.y.to(device))


class Set(NamedTuple):
    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    mirror: bool  # whether an image's mirror image could be one of the set

    def to(self, device: torch.device) -> "Set":
        parts = {name: getattr(self, name).to(device) for name in ("train", "val", "test")}
        return self._replace(**parts)


class Pair(NamedTuple):
    x: Set
    y: Set
    note: str  # what the person who started the run should know

    def to(self, device: torch.device) -> "Pair":
        return self._replace(x=self.x.to(device), y=self.y.to(device))


def load(*, dataset: str, data_dir: Path, bundled_images: int, seed: int) -> Pair:
    """The pair `dataset`; a bundled set has `bundled_images` training images.

    Raises DataError if it cannot be had.
    """
    if dataset == "digits_photographs":
        x, y = load_digits(bundled_images, seed), load_crops(bundled_images, seed)
        return Pair(x, y, f"data: scikit-learn's {x.name} and {y.name} (real: mnist_cifar100.yaml)")
    if dataset == "folder":
        (x, bad), y = load_folder(data_dir, seed), load_crops(bundled_images, seed)
    elif dataset == "mnist_folder":
        x, (y, bad) = load_mnist(data_dir, seed), load_folder(data_dir, seed)
    else:
        x, y, bad = load_mnist(data_dir, seed), load_cifar100(data_dir, seed), []
    return Pair(x, y, f"data: {x.name} and {y.name}{left_out(bad)}")


# --- what comes with scikit-learn -------------------------------------------------------------


def load_digits(train_images: int, seed: int) -> Set:
    """Drawn from the bundled 8x8 digits, which are split before."""
    from sklearn.datasets import load_digits as bundled_digits

    bunch = bundled_digits()
    ink = torch.from_numpy(bunch.images).float() / 16
    sources = split(Images(ink, torch.from_numpy(bunch.target).long()), SHARES, seed)
    parts = map(render_digits, sources, *counts_and_generators(train_images, seed))
    return Set("digits", tuple(map(str, range(10))), *parts, mirror=False)


def load_crops(train_images: int, seed: int) -> Set:
    """Squares of the two bundled photographs, which are cut into three strips before."""
    from sklearn.datasets import load_sample_images

    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    widths = part_sizes(photos.shape[3], SHARES)
    strips = photos.split(widths[::-1], dim=3)[::-1]  # train at the right
    parts = map(cut_crops, strips, *counts_and_generators(train_images, seed))
    return Set("photographs", ("temple", "flower"), *parts, mirror=True)


def counts_and_generators(train_images: int, seed: int) -> tuple[tuple, list[torch.Generator]]:
    """For training, validation and test images; these two do not depend on `train_images`."""
    counts = (train_images, 1000, 2000)
    return counts, [torch.Generator().manual_seed(3 * seed + number) for number in range(3)]


def render_digits(source: Images, count: int, generator: torch.Generator) -> Images:
    """White on black, made of ink (N, 8, 8) in [0, 1] at random: which, where, angle, size.

    Merely enlarged 8x8 digits would have rank 64, and PCA with 64 components no error at all.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    chosen = torch.randint(len(source.x), (count,), generator=generator)
    side, angle = uniform(16, 26, count), uniform(-0.35, 0.35, count)  # pixels, radians
    shift = uniform(-1, 1, count, 2) * (SIZE - side)[:, None] / 2 / (SIZE / 2)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack((cos, -sin, sin, cos), 1).view(-1, 2, 2) * (SIZE / side)[:, None, None]
    theta = torch.cat((turn, -turn @ shift[:, :, None]), 2)  # from canvas to digit, in [-1, 1]
    points = F.affine_grid(theta, [count, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(source.x[chosen, None], points, align_corners=False)
    x = (((ink - 0.2) / 0.5).clamp(0, 1) * 255).round().byte()
    return Images(x.expand(-1, 3, -1, -1).contiguous(), source.y[chosen])


def cut_crops(photos: Tensor, count: int, generator: torch.Generator) -> Images:
    """Squares of 32 to 64 pixels of photos (P, 3, h, w), scaled to 32; the class is which photo.

    Of three squares cut at random the one with the most contrast is kept, so that plain water and
    plain sky are rare.
    """
    y = torch.randint(len(photos), (count,), generator=generator)
    x = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    places = torch.rand(count, 3, 3, generator=generator).tolist()
    for number, candidates in enumerate(places):
        squares = [cut_square(photos[y[number]], *place) for place in candidates]
        best = max(squares, key=lambda square: square.std((1, 2)).sum())
        small = F.interpolate(best[None], SIZE, mode="bilinear", antialias=True)
        x[number] = small[0].round().byte()
    return Images(x, y)


def cut_square(photo: Tensor, size: float, down: float, right: float) -> Tensor:
    """Float (3, side, side), the square of a photo (3, h, w) that numbers in [0, 1] stand for."""
    side = SIZE + int(size * (SIZE + 1))
    top, left = (
        int(u * (n - side + 1)) for u, n in zip((down, right), photo.shape[1:], strict=True)
    )
    return photo[:, top : top + side, left : left + side].float()


# --- MNIST, CIFAR-100 and your own images -----------------------------------------------------


def load_mnist(data_dir: Path, seed: int) -> Set:
    """MNIST with two black pixels all around, its grey in three equal channels."""
    parts = []
    for x, y in read_idx("MNIST", data_dir):
        if x.shape[2:] != (28, 28):
            raise DataError(f"MNIST in {data_dir}: expected images of 28x28 pixels")
        parts.append(Images(F.pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous(), y))
    train, val = split(parts[0], (1 - VALIDATION, VALIDATION), seed)
    return Set("MNIST", tuple(map(str, range(10))), train, val, parts[1], mirror=False)


def load_cifar100(data_dir: Path, seed: int) -> Set:
    """From data_dir/cifar-100-python, or downloaded to it."""
    from torchvision.datasets import CIFAR100

    if not (data_dir / CIFAR100.base_folder).is_dir():
        archive = data_dir / CIFAR100.filename
        unpack(download(CIFAR100.url, archive, "CIFAR-100", f"md5:{CIFAR100.tgz_md5}"), data_dir)
    try:
        found = [CIFAR100(data_dir, train=train) for train in (True, False)]
    except Exception as error:  # torchvision's check, or what pickle makes of a damaged file
        folder = data_dir / CIFAR100.base_folder
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{folder}: damaged; remove it and start again ({reason})") from error
    parts = []
    for part in found:
        x = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Images(x, torch.tensor(part.targets)))
    train, val = split(parts[0], (1 - VALIDATION, VALIDATION), seed)
    return Set("CIFAR-100", tuple(found[0].classes), train, val, parts[1], mirror=True)


def load_folder(folder: Path, seed: int) -> tuple[Set, list[str]]:
    """train/CLASS/* and test/CLASS/* squeezed to 32x32, and lines on files that were left out.

    A picture's mirror image is taken to be one of the set. Raises DataError that names what is
    wrong.
    """
    bad: list[str] = []
    classes, images = read_images(folder / "train", folder, bad)
    test_classes, test = read_images(folder / "test", folder, bad)
    if classes != test_classes:
        differing = min(set(classes) ^ set(test_classes))
        raise DataError(f"{folder}: class '{differing}' is not in both train/ and test/")
    train, val = split(images, (1 - VALIDATION, VALIDATION), seed)
    return Set(folder.resolve().name, classes, train, val, test, mirror=True), bad


def read_images(folder: Path, cache: Path, bad: list[str]) -> tuple[tuple[str, ...], Images]:
    """Class names and images of folder/CLASS/*; adds to `bad` what cannot be read."""
    files = class_files(folder)
    paths = [path for paths in files.values() for path in paths]
    labels = torch.tensor([label for label, name in enumerate(files) for _ in files[name]])
    x, places, unreadable = decode(paths, (SIZE, SIZE), cache)
    bad += unreadable
    y = labels[places]
    if lost := [name for label, name in enumerate(files) if not (y == label).any()]:
        raise DataError(f"{folder / lost[0]}: no picture in this folder can be read")
    if len(x) < LEAST:
        raise DataError(f"{folder}: expected at least {LEAST} readable pictures, found {len(x)}")
    return tuple(files), Images(x, y)


def class_files(folder: Path) -> dict[str, list[Path]]:
    """As class_folders, whose DataError also says which folders are expected."""
    try:
        return class_folders(folder)
    except DataError as error:
        layout = "expected train/CLASS/* and test/CLASS/*, in data_dir"
        raise DataError(f"{error} ({layout})") from None


def part_sizes(count: int, shares: tuple[float, ...]) -> list[int]:
    first = [round(share * count) for share in shares[:-1]]
    return [*first, count - sum(first)]


def split(images: Images, shares: tuple[float, ...], seed: int) -> list[Images]:
    """Disjoint random parts of the given shares."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    parts = order.split(part_sizes(len(order), shares))
    return [Images(images.x[part], images.y[part]) for part in parts]


def choose_labelled(images: Images, count: int, seed: int) -> Images:
    """`count` images at random, of all classes as evenly as can be; more hold those of fewer."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    y = images.y.cpu()[order]
    turn = torch.empty(len(y), dtype=torch.long)  # 0 for the first image of each class, ...
    for label in y.unique():
        mine = y == label
        turn[mine] = torch.arange(int(mine.sum()))
    chosen = order[turn.argsort(stable=True)[:count]].to(images.x.device)
    return Images(images.x[chosen], images.y[chosen])


# --- batches ----------------------------------------------------------------------------------


def scaled(x: Tensor) -> Tensor:
    """Images in [0, 1] from uint8, channels last in memory; anything else as it is."""
    if x.dtype != torch.uint8:
        return x
    return (x.float() / 255).contiguous(memory_format=torch.channels_last)


def batches(images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in their order, as many at a time as fit where nothing is trained."""
    for x, y in zip(images.x.split(CHUNK), images.y.split(CHUNK), strict=True):
        yield scaled(x), y


@torch.no_grad()
def outputs_of(part: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """What `part` gives for all images (N, ...), from them (n, 3, 32, 32) in [0, 1] in parts."""
    return torch.cat([part(x) for x, _ in batches(images)])


def shuffled_batches(
    images: Images, batch_size: int, *, mirror: bool = False, shift: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once in a random order; with `mirror` half of them, at random, mirrored, and each
    moved by up to `shift` pixels.
    """
    order = torch.randperm(len(images.x)).to(images.x.device)
    for chosen in order.split(batch_size):
        x = images.x[chosen]
        if mirror:
            turned = torch.rand(len(x)).to(x.device) < 0.5
            x = torch.where(turned[:, None, None, None], x.flip(3), x)
        yield scaled(move(x, shift) if shift else x), images.y[chosen]


def move(x: Tensor, shift: int) -> Tensor:
    """Images (N, 3, H, W), each moved by up to `shift` pixels; the border is repeated."""
    shifts = [torch.randint(-shift, shift + 1, (len(x), 1)) for _ in range(2)]
    rows, columns = (
        (torch.arange(size) + own).clamp(0, size - 1).to(x.device)
        for size, own in zip(x.shape[2:], shifts, strict=True)
    )
    number = torch.arange(len(x), device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def mean_image(images: Images) -> Tensor:
    """Mean (3, 32, 32) of all images, in [0, 1]."""
    total = sum(x.sum(0, dtype=torch.double) for x, _ in batches(images))
    return (total / len(images.x)).float().cpu()
