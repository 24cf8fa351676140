"""Pictures of which few keep their labels: a split without overlap, fixed by a seed.

digits   the 1,797 that come with scikit-learn
mnist    60,000 handwritten digits (LeCun, Cortes & Burges 1998)
folder   your own pictures in a folder per class, and without a label in unlabelled/
"""

import gzip
import hashlib
import math
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

TEST_SHARE = 0.3  # of a set that comes without a test set
UNLABELLED = "unlabelled"  # the folder of pictures without a class
UNKNOWN = -1  # the class of a picture that nobody has labelled

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


class Images(NamedTuple):
    """uint8 images (N, C, H, W) and their classes (N,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(self.x.to(device), self.y.to(device))


class Source(NamedTuple):
    """A data set before it is split; `test` is None where the split has to draw one."""

    name: str
    classes: tuple[str, ...]
    train: Images  # UNKNOWN is the class of a picture from unlabelled/
    test: Images | None
    files: tuple[str, ...]  # a name for each picture of `train`
    note: str  # what the person who started the run should know


class Splits(NamedTuple):
    """Disjoint parts. The pool's true labels are kept apart: no decision may see them."""

    labelled: Images
    val: Images
    pool: Tensor  # uint8 (N, C, H, W)
    hidden: Tensor  # (N,) true classes of the pool, or UNKNOWN
    test: Images
    places: Tensor  # (N,) of the pool's pictures in Source.train

    def to(self, device: torch.device) -> "Splits":
        return Splits(*(part.to(device) for part in self))


def load(*, dataset: str, data_dir: Path, image_size: int) -> Source:
    """The data set, its pictures image_size x image_size pixels, or as they are if that is 0.

    Raises DataError if it cannot be had.
    """
    if dataset == "digits":
        return load_digits(image_size)
    return (load_mnist if dataset == "mnist" else load_folder)(data_dir, image_size)


def load_digits(image_size: int) -> Source:
    """1,797 digits, 8 x 8 pixels."""
    from sklearn.datasets import load_digits as bundled_digits

    bunch = bundled_digits()
    x = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = Images(resize(x.round().byte(), image_size), torch.from_numpy(bunch.target).long())
    files = tuple(f"digits/{number}" for number in range(len(x)))
    note = "data: scikit-learn's digits (MNIST: --config self_training/mnist.yaml)"
    return Source("digits", tuple(map(str, range(10))), images, None, files, note)


def load_mnist(data_dir: Path, image_size: int) -> Source:
    """60,000 and 10,000 digits, 28 x 28 pixels."""
    train, test = (Images(resize(x, image_size), y) for x, y in read_idx("MNIST", data_dir))
    files = tuple(f"MNIST/train/{number}" for number in range(len(train.x)))
    return Source("MNIST", tuple(map(str, range(10))), train, test, files, "data: MNIST")


def resize(x: Tensor, image_size: int) -> Tensor:
    """uint8 images (N, C, image_size, image_size), or `x` itself if image_size is 0."""
    if not image_size or x.shape[2:] == (image_size, image_size):
        return x
    size = (image_size, image_size)
    parts = [
        F.interpolate(part.float(), size, mode="bilinear", antialias=True)
        for part in x.split(10_000)
    ]
    return torch.cat(parts).round().clamp(0, 255).byte()


def load_folder(folder: Path, image_size: int) -> Source:
    """train/CLASS/* and test/CLASS/*, or CLASS/* alone; unlabelled/* where there is one.

    Unreadable files are left out and counted. Raises DataError that names what is at fault.
    """
    size = (image_size, image_size) if image_size else None
    known = labelled_files(folder / "train" if (folder / "train").is_dir() else folder)
    classes = tuple(known)
    extra = folder / "unlabelled"
    known[UNLABELLED] = visible_files(extra) if extra.is_dir() else []
    train, files, bad = read_labelled(known, size, folder)
    test = None
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        others = labelled_files(folder / "test")
        if odd := sorted(set(classes) ^ set(others)):
            raise DataError(f"{folder}: class '{odd[0]}' is in only one of train/ and test/")
        test, _, more = read_labelled(others, size, folder)
        bad += more
        if test.x.shape[1:] != train.x.shape[1:]:
            raise DataError(f"{folder / 'test'}: another size than in train/; set image_size")
    name = folder.resolve().name
    return Source(name, classes, train, test, files, f"data: {name}{left_out(bad)}")


def labelled_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each class. Raises DataError if there are not two classes, or one is empty."""
    try:
        files = class_folders(folder)
    except DataError as error:
        layout = "expected train/CLASS/* and test/CLASS/*, or CLASS/*"
        raise DataError(f"{error} ({layout}, in data_dir)") from None
    files.pop(UNLABELLED, None)
    if len(files) < 2:
        raise DataError(f"{folder}: expected a folder for each of at least 2 classes")
    return files


def read_labelled(
    files: dict[str, list[Path]], size: tuple[int, int] | None, cache: Path
) -> tuple[Images, tuple[str, ...], list[str]]:
    """Images, their paths below `cache`, and lines on what was left out."""
    numbers = {name: place for place, name in enumerate(files) if name != UNLABELLED}
    pairs = [(path, numbers.get(name, UNKNOWN)) for name, paths in files.items() for path in paths]
    x, places, bad = decode([path for path, _ in pairs], size, cache)
    y = torch.tensor([pairs[place][1] for place in places])
    for name, number in numbers.items():
        if not (y == number).any():
            raise DataError(f"{files[name][0].parent}: no picture in it could be read")
    names = tuple(pairs[place][0].relative_to(cache).as_posix() for place in places)
    return Images(x, y), names, bad


# --- splits and batches -----------------------------------------------------------------------


def split(
    source: Source, *, labels_per_class: int, val_per_class: int, pool_size: int, seed: int
) -> Splits:
    """Labelled, validation and test pictures and the pool, drawn by `seed`.

    labels_per_class 0 takes all that validation leaves. The pool is the rest of the training set,
    at most `pool_size` pictures of it (0: all). Raises DataError if a class is too small.
    """
    images, test = source.train, source.test
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    if test is None:
        known = order[images.y[order] != UNKNOWN]
        chosen = known[: round(TEST_SHARE * len(known))]
        test = Images(images.x[chosen], images.y[chosen])
        order = order[~torch.isin(order, chosen)]
    labelled, val, taken = sample_labelled(source, order, labels_per_class, val_per_class)
    pool = order[~taken[order]][: pool_size or None]
    if not len(pool):
        ways = "lower labels_per_class" if labels_per_class else "set labels_per_class"
        reason = f"no picture is left for the pool; {ways}, or add pictures to {UNLABELLED}/"
        raise DataError(f"{source.name}: {reason}")
    return Splits(labelled, val, images.x[pool], images.y[pool], test, pool)


def sample_labelled(
    source: Source, order: Tensor, labels_per_class: int, val_per_class: int
) -> tuple[Images, Images, Tensor]:
    """Labelled and validation pictures, the first of each class in `order`; which are taken (N,).

    Raises DataError if a class is too small.
    """
    images, everything = source.train, len(order)
    wanted = {"labelled": labels_per_class or everything, "val": val_per_class}
    taken, parts = torch.zeros(len(images.x), dtype=torch.bool), {}
    for name in wanted if labels_per_class else reversed(wanted):
        count, free = wanted[name], order[~taken[order]]
        chosen = [free[images.y[free] == n][:count] for n in range(len(source.classes))]
        fewest = min(range(len(chosen)), key=lambda n: len(chosen[n]))
        if len(chosen[fewest]) < (1 if count == everything else count):
            found = int((images.y[order] == fewest).sum())
            raise DataError(
                f"{source.name}: class '{source.classes[fewest]}' has too few pictures, {found} "
                "without those for testing, for "
                f"labels_per_class {labels_per_class} and val_per_class {val_per_class}"
            )
        places = torch.cat(chosen)
        taken[places] = True
        parts[name] = Images(images.x[places], images.y[places])
    return parts["labelled"], parts["val"], taken


def fingerprints(x: Tensor) -> Tensor:
    """A number (N,) for each picture that depends on its pixels alone, not on its place."""
    return torch.tensor([zlib.crc32(picture.tobytes()) for picture in x.cpu().numpy()])


def batches(x: Tensor, batch_size: int = 1000) -> Iterator[Tensor]:
    """Float images (B, C, H, W) in [0, 1], in order."""
    for part in x.split(batch_size):
        yield part.float() / 255


def in_channels(x: Tensor, channels: int) -> Tensor:
    """uint8 images (N, channels, H, W) from coloured ones (N, 3, H, W): 1 is their luminance."""
    if channels == x.shape[1]:
        return x
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True).round().byte()


def training_batches(images: Images, batch_size: int, steps: int) -> Iterator[tuple]:
    """Float images (B, C, H, W) in [0, 1] and classes; all occur once, then again."""
    count = len(images.x)
    batch_size = min(batch_size, count)
    turns = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count) for _ in range(turns)])[: steps * batch_size]
    for chosen in order.to(images.x.device).split(batch_size):
        yield images.x[chosen].float() / 255, images.y[chosen]


def augment(x: Tensor, strength: float, *, mirror: bool, geometry_only: bool = False) -> Tensor:
    """Images (N, C, H, W) in [0, 1] turned, stretched, sheared, shifted, of other contrast, with a
    square left out, each by a random amount in proportion to `strength`.
    """
    if not (strength and len(x)):
        return x

    def uniform(most: float) -> Tensor:
        return strength * most * (2 * torch.rand(len(x), device=x.device) - 1)

    angle, shear = uniform(math.radians(25)), uniform(0.2)
    wide, high = uniform(0.2).exp(), uniform(0.2).exp()
    flip = uniform(1).sign() if mirror else torch.ones_like(angle)
    across = torch.stack((flip * wide * angle.cos(), shear - wide * angle.sin(), uniform(0.25)), 1)
    along = torch.stack((flip * high * angle.sin(), high * angle.cos(), uniform(0.25)), 1)
    points = F.affine_grid(torch.stack((across, along), 1), list(x.shape), align_corners=False)
    edge = "reflection" if x.shape[1] == 3 else "zeros"  # photographs have no empty border
    x = F.grid_sample(x, points, align_corners=False, padding_mode=edge)
    if geometry_only:
        return x
    middle = x.mean((1, 2, 3), keepdim=True) if x.shape[1] == 3 else 0
    x = (middle + (x - middle) * uniform(0.4).exp()[:, None, None, None]).clamp(0, 1)
    if x.shape[1] == 3:
        tint = 0.2 * strength * (2 * torch.rand(len(x), 3, 1, 1, device=x.device) - 1)
        x = (x + tint).clamp(0, 1)
    return x.masked_fill(random_squares(x, strength), 0.0)


def random_squares(x: Tensor, strength: float) -> Tensor:
    """True (N, 1, H, W) in a square of random place, at most half of the height wide."""
    half = 0.25 * x.shape[2] * strength * torch.rand(len(x), 1, device=x.device)
    inside = []
    for side in x.shape[2:]:
        middle = side * torch.rand(len(x), 1, device=x.device)
        inside.append((torch.arange(side, device=x.device) + 0.5 - middle).abs() < half)
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
