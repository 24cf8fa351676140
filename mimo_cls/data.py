"""Images held as bytes on the device, and what a MIMO network eats: batches of M images at once.

digits   scikit-learn's handwritten digits over crops of its two photographs
cifar10  Krizhevsky 2009
folder   your own images: train/CLASS/*, test/CLASS/*
"""

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

LEAST = 10  # pictures in train/ and in test/
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"
SEVERITIES = {  # standard deviations of values in [0, 1] and of pixels; what is left of contrast
    "noise": (0.05, 0.1, 0.15, 0.2, 0.3),
    "blur": (0.4, 0.6, 0.8, 1.0, 1.5),
    "contrast": (0.75, 0.6, 0.45, 0.3, 0.2),
}

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


class Images(NamedTuple):
    """uint8 images (N, 3, H, W), their classes (N,), and which share a source (N,): a digit that
    is composed into several images is one draw, not several.
    """

    x: Tensor
    y: Tensor
    source: Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(*(part.to(device) for part in self))


class Data(NamedTuple):
    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    strange: dict[str, Tensor]  # by name, uint8 images (N, 3, H, W) of none of the classes
    mirror: bool  # whether an image's mirror image has the same class
    note: str  # what the person who started the run should know

    def to(self, device: torch.device) -> "Data":
        parts = {name: getattr(self, name).to(device) for name in ("train", "val", "test")}
        strange = {name: x.to(device) for name, x in self.strange.items()}
        return self._replace(**parts, strange=strange)


# --- batches ----------------------------------------------------------------------------------


def member_orders(
    images: int, *, members: int, input_repetition: float, batch_repetition: int
) -> Tensor:
    """Which image each member sees, (members, batch_repetition * images).

    Each of the images stands `batch_repetition` times in one shared random order. Its first part,
    of the share `input_repetition`, is the same for all members; each member permutes the rest anew
    (Havasi et al. 2021).
    """
    shared = torch.arange(images).repeat(batch_repetition)
    shared = shared[torch.randperm(len(shared))]
    same, rest = shared.tensor_split([round(input_repetition * len(shared))])
    orders = [torch.cat((same, rest[torch.randperm(len(rest))])) for _ in range(members)]
    return torch.stack(orders)


def stack_images(x: Tensor, orders: Tensor) -> Tensor:
    """Images (N, M * 3, H, W) from (B, 3, H, W): member m sees x[orders[m]], orders (M, N)."""
    return torch.cat([x[order] for order in orders], 1)


def training_batches(
    images: Images,
    batch_size: int,
    *,
    members: int,
    input_repetition: float,
    batch_repetition: int,
    mirror: bool,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented inputs (N, M * 3, H, W) and the members' classes (N, M), once through the images.

    A batch holds `batch_size` different images, N = batch_repetition * batch_size; of an epoch's
    random order, an incomplete batch at the end is left out. Of each batch's inputs only `part`.
    """
    order = torch.randperm(len(images.x)).to(images.x.device)
    for chosen in order.split(batch_size)[: max(1, len(order) // batch_size)]:
        x, y = augment(images.x[chosen], mirror=mirror), images.y[chosen]
        orders = member_orders(
            len(chosen),
            members=members,
            input_repetition=input_repetition,
            batch_repetition=batch_repetition,
        ).to(x.device)[:, part]
        yield stack_images(to_input(x), orders), y[orders].T  # the same index for image and class


def testing_batches(x: Tensor, batch_size: int, members: int) -> Iterator[Tensor]:
    """Inputs (B, M * 3, H, W) from uint8 images, all of them in order: every member sees each."""
    for part in x.split(batch_size):
        same = torch.arange(len(part), device=x.device).expand(members, -1)
        yield stack_images(to_input(part), same)


def augment(x: Tensor, *, mirror: bool) -> Tensor:
    """uint8 images (N, 3, H, W), each shifted by up to an eighth over black and, with `mirror`,
    mirrored half of the time.
    """
    count, _, height, width = x.shape
    pad = (height // 8, width // 8)
    x = F.pad(x, (pad[1], pad[1], pad[0], pad[0]))
    turned = torch.rand(count, 1, device=x.device) < 0.5
    places = []
    for length, most in zip((height, width), pad, strict=True):
        shift = torch.randint(2 * most + 1, (count, 1), device=x.device)
        places.append(shift + torch.arange(length, device=x.device))
    rows, columns = places
    if mirror:
        columns = torch.where(turned, columns.flip(1), columns)
    number = torch.arange(count, device=x.device)[:, None, None]
    x = x.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]]
    return x.permute(0, 3, 1, 2)  # stays channels_last


def to_input(x: Tensor) -> Tensor:
    """uint8 images about zero, in channels_last."""
    x = x.to(torch.float32, memory_format=torch.channels_last)
    return (x / 255 - 0.5) / 0.25


# --- images that are harder than those of training --------------------------------------------


def corrupt(x: Tensor, kind: str, severity: float) -> Tensor:
    """uint8 images under one of SEVERITIES."""
    return {"noise": add_noise, "blur": blur, "contrast": flatten_contrast}[kind](x, severity)


def add_noise(x: Tensor, deviation: float) -> Tensor:
    """uint8 images with Gaussian noise; of the values in [0, 1] `deviation` is the standard one."""
    generator = torch.Generator().manual_seed(0)  # on the CPU: every device sees the same noise
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x + 255 * deviation * noise).round().clamp(0, 255).byte()


def blur(x: Tensor, deviation: float) -> Tensor:
    """uint8 images under a Gaussian blur of `deviation` pixels, the border repeated."""
    reach = min(int(np.ceil(3 * deviation)), min(x.shape[2:]) - 1)
    at = torch.arange(-reach, reach + 1, dtype=torch.float32, device=x.device)
    kernel = torch.exp(-at.square() / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    x = F.pad(x.float(), (reach,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    return x.round().clamp(0, 255).byte()


def flatten_contrast(x: Tensor, share: float) -> Tensor:
    """uint8 images of which only a share of each one's distances from its mean is left."""
    x = x.float()
    mean = x.mean((1, 2, 3), keepdim=True)
    return (mean + share * (x - mean)).round().clamp(0, 255).byte()


# --- data sets --------------------------------------------------------------------------------


def load(
    *,
    dataset: str,
    data_dir: Path,
    image_size: int,
    train_images: int,
    test_images: int,
    seed: int,
) -> Data:
    """The data set `dataset`. Strange to digits are photographs without one, to others also digits
    over photographs. Raises DataError if the set cannot be had.
    """
    if dataset == "digits":
        return load_digits(image_size, train_images, test_images, seed)
    if dataset == "folder":
        data = load_folder(data_dir, image_size, seed)
    else:
        data = load_cifar10(data_dir, seed)
    digits = load_digits(data.test.x.shape[-1], 1, test_images, seed)
    strange = digits.strange | {"digits over photographs": digits.test.x}
    return data._replace(strange=strange)


def load_cifar10(data_dir: Path, seed: int) -> Data:
    """The official test set; a tenth of the official training set is the validation set."""
    from torchvision.datasets import CIFAR10  # imported where it is used: it costs two seconds

    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    if not all((data_dir / CIFAR10.base_folder / name).is_file() for name in names):
        archive = data_dir / CIFAR10.filename
        unpack(download(CIFAR_URL, archive, "CIFAR-10", f"md5:{CIFAR_MD5}"), data_dir)
    try:
        parts = [CIFAR10(data_dir, train=train) for train in (True, False)]
    except (OSError, RuntimeError, ValueError) as error:
        reason = f"damaged; remove it and start again ({error})"
        raise DataError(f"{data_dir / CIFAR10.base_folder}: {reason}") from error
    images, test = (
        with_sources(torch.from_numpy(one.data).permute(0, 3, 1, 2), torch.tensor(one.targets))
        for one in parts
    )
    train, val = split(images, 0.1, seed)
    return Data("CIFAR-10", tuple(parts[0].classes), train, val, test, {}, True, "data: CIFAR-10")


def load_folder(folder: Path, image_size: int, seed: int) -> Data:
    """train/CLASS/*, test/CLASS/*; a tenth of train/ is the validation set.

    A photograph's mirror image is taken to be of the same class. Files that cannot be read are left
    out and counted. Raises DataError that names the fault.
    """
    classes, parts, bad = [], [], []
    for part in ("train", "test"):
        files = class_folders(folder / part)
        paths = [path for paths in files.values() for path in paths]
        labels = [number for number, paths in enumerate(files.values()) for _ in paths]
        x, places, unreadable = decode(paths, (image_size, image_size), folder)
        y = torch.tensor(labels)[places]
        if len(y) < LEAST or len(y.unique()) < len(files):
            wanted = f"at least {LEAST} readable pictures, one of each class"
            found = f"found {len(y)}{left_out(unreadable)}"
            raise DataError(f"{folder / part}: expected {wanted}, {found}")
        classes.append(tuple(files))
        parts.append(with_sources(x, y))
        bad += unreadable
    if classes[0] != classes[1]:
        differing = sorted(set(classes[0]) ^ set(classes[1]))[0]
        raise DataError(f"{folder}: class '{differing}' is not in both train/ and test/")
    train, val = split(parts[0], 0.1, seed)
    name = folder.resolve().name
    return Data(name, classes[0], train, val, parts[1], {}, True, f"data: {name}{left_out(bad)}")


def with_sources(x: Tensor, y: Tensor) -> Images:
    """Images each of which is its own source."""
    return Images(x, y, torch.arange(len(y)))


def split(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Disjoint random parts, the second of the given share."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([len(order) - round(share * len(order))])
    return tuple(Images(*(values[part] for values in images)) for part in parts)


# --- digits over photographs ------------------------------------------------------------------


def load_digits(size: int, train_images: int, test_images: int, seed: int) -> Data:
    """Half as many images for validation as for testing; photographs without a digit are strange.

    Digits and columns of the photographs are split, 60% / 20% / 20%, before they are combined.
    """
    from sklearn.datasets import load_digits as bundled_digits
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    bunch = bundled_digits()
    order = torch.randperm(len(bunch.target), generator=generator)
    inks = torch.from_numpy(bunch.images).float()[order, None] / 16
    classes = torch.from_numpy(bunch.target).long()[order]
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float()
    sources = [shares(part, dim) for part, dim in ((inks, 0), (classes, 0), (photos, 3))]
    counts = (train_images, max(1, test_images // 2), test_images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    parts, ground = [], photos
    for number, (ink, y, ground) in enumerate(zip(*sources, strict=True)):
        generator.manual_seed(3 * seed + number)  # so no split depends on the size of another
        chosen = torch.randint(len(ink), (counts[number],), generator=generator)
        crops = sample_crops(ground, counts[number], size, uniform)
        scene = compose(crops, ink[chosen], uniform)
        parts.append(Images(scene.round().byte(), y[chosen], chosen))
    empty = sample_crops(ground, test_images, size, uniform).round().byte()
    names = tuple(map(str, range(10)))
    strange = {"photographs without a digit": empty}
    note = "data: digits over photographs (--config mimo_cls/cifar10.yaml takes CIFAR-10)"
    return Data("digits over photographs", names, *parts, strange, False, note)


def shares(values: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Three runs of neighbours along `dim`, of 60%, 20% and 20%."""
    count = values.shape[dim]
    return values.tensor_split([round(0.6 * count), round(0.8 * count)], dim)


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


def compose(scene: Tensor, digits: Tensor, uniform: Callable) -> Tensor:
    """Scenes (N, 3, S, S) in [0, 255] with bright digits (N, 1, 8, 8), each of a random colour,
    opacity, size, place and angle, over dimmed scenes.
    """
    count, _, size, _ = scene.shape
    angle, side = uniform(-0.3, 0.3, count), uniform(0.8, 1.0, count)
    middle = uniform(-1, 1, count, 2) * (1 - side)[:, None] * 0.8  # in [-1, 1]
    cos, sin = angle.cos() / side, angle.sin() / side
    turn = torch.stack((torch.stack((cos, -sin), 1), torch.stack((sin, cos), 1)), 1)
    theta = torch.cat((turn, -turn @ middle[:, :, None]), 2)
    points = F.affine_grid(theta, [count, 1, size, size], align_corners=False)
    ink = ((F.grid_sample(digits, points, align_corners=False) - 0.25) / 0.4).clamp(0, 1)
    opacity = ink * uniform(0.2, 1.0, count)[:, None, None, None]
    colour = 255 * uniform(0.5, 1.0, count, 3)[:, :, None, None]
    dim = uniform(0.2, 0.6, count)[:, None, None, None]
    return dim * scene * (1 - opacity) + colour * opacity
