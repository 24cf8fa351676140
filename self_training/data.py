"""Pictures of which few keep their labels: a split without overlap, fixed by a seed.

mnist    through torchvision (LeCun, Cortes & Burges 1998)
folder   one's own train/CLASS/* and test/CLASS/*
digits   the 1,797 that come with scikit-learn
"""

import hashlib
import math
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

MNIST_HOST = "https://ossci-datasets.s3.amazonaws.com"
TEST_SHARE = 0.3  # of a set that comes without a test set


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


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
    train: Images
    test: Images | None
    mirror: bool  # whether a picture's mirror image has the same class
    note: str  # what the person who started the run should know


class Splits(NamedTuple):
    """Disjoint parts. The pool's true labels are kept apart: no decision may see them."""

    labelled: Images
    val: Images
    pool: Tensor  # uint8 (N, C, H, W)
    hidden: Tensor  # (N,) true classes of the pool
    test: Images

    def to(self, device: torch.device) -> "Splits":
        return Splits(*(part.to(device) for part in self))


def load(*, dataset: str, data_dir: Path, image_size: int) -> Source:
    """The data set; `auto` is MNIST, or scikit-learn's digits where MNIST cannot be had.

    Pictures are brought to image_size x image_size pixels, or left as they are if it is 0.
    Raises DataError if a data set that was asked for by name cannot be had.
    """
    if dataset == "digits":
        return load_digits(image_size)
    if dataset == "folder":
        return load_folder(data_dir, image_size)
    try:
        return load_mnist(data_dir, image_size)
    except DataError as error:
        if dataset == "mnist":
            raise
        note = f"{error}; scikit-learn's digits stand in for it"
        return load_digits(image_size)._replace(note=note)


def load_digits(image_size: int) -> Source:
    """1,797 digits, 8 x 8 pixels."""
    from sklearn.datasets import load_digits as bundled_digits

    bunch = bundled_digits()
    x = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = Images(resize(x.round().byte(), image_size), torch.from_numpy(bunch.target).long())
    return Source("digits", tuple(map(str, range(10))), images, None, False, "data: digits")


def load_mnist(data_dir: Path, image_size: int) -> Source:
    """60,000 and 10,000 digits, 28 x 28 pixels; torchvision verifies what it downloads."""
    from torchvision.datasets import MNIST  # imported where it is used: it is slow

    try:
        parts = [MNIST(data_dir, train=train) for train in (True, False)]
    except RuntimeError:  # not there
        parts = download_mnist(data_dir)
    train, test = (
        Images(resize(part.data[:, None], image_size), part.targets.long()) for part in parts
    )
    return Source("MNIST", tuple(map(str, range(10))), train, test, False, "data: MNIST")


def download_mnist(data_dir: Path) -> list:
    """torchvision's training and test set. Raises DataError if they cannot be had."""
    from torchvision.datasets import MNIST

    reason = f"MNIST is not in {data_dir} and could not be downloaded"
    if not reachable(MNIST_HOST):
        raise DataError(
            f"{reason}: {MNIST_HOST} does not answer; "
            f"by hand: put the four uncompressed files into {data_dir / 'MNIST' / 'raw'}"
        )
    try:
        return [MNIST(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(f"{reason}: {error}") from error


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


def resize(x: Tensor, size: int) -> Tensor:
    """uint8 images (N, C, H, W) at size x size pixels, bilinear with antialiasing; 0: as is."""
    if size == 0 or x.shape[2:] == (size, size):
        return x
    parts = []
    for part in x.split(1000):
        small = F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        parts.append(small.round().clamp(0, 255).byte())
    return torch.cat(parts)


# --- folders of photographs -------------------------------------------------------------------


def load_folder(folder: Path, image_size: int) -> Source:
    """train/CLASS/* and test/CLASS/* with the same classes; unreadable files are left out.

    Raises DataError that names the folder or file at fault.
    """
    files = {part: list_images(folder / part) for part in ("train", "test")}
    classes = tuple(files["train"])
    if classes != tuple(files["test"]):
        odd = sorted(set(files["train"]) ^ set(files["test"]))
        raise DataError(f"{folder}: class '{odd[0]}' is in only one of train/ and test/")
    parts, bad = [], []
    for part in ("train", "test"):
        x, y, unread = read(list(files[part].values()), folder, image_size)
        counts = y.bincount(minlength=len(classes))
        if not counts.all():
            empty = classes[int(counts.argmin())]
            raise DataError(f"{folder / part / empty}: no image in it could be read")
        parts.append(Images(x, y))
        bad += unread
    note = f"data: {folder.resolve().name}"
    if bad:
        note += f"; {len(bad)} unreadable files left out, the first: {bad[0]}"
    return Source(folder.resolve().name, classes, *parts, True, note)


def list_images(folder: Path) -> dict[str, list[Path]]:
    """The files of each class. Raises DataError if there is no class, or one is empty."""
    names = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if len(names) < 2:
        raise DataError(f"{folder}: expected a folder for each of at least two classes")
    files = {name: sorted(p for p in (folder / name).iterdir() if p.is_file()) for name in names}
    if empty := [name for name in names if not files[name]]:
        raise DataError(f"{folder / empty[0]}: there is no image in this folder")
    return files


def read(files: list[list[Path]], cache: Path, image_size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, 3, H, W), classes (N,), unreadable files; kept in a file of the folder `cache`."""
    stamps = [[(str(path), path.stat().st_mtime) for path in paths] for paths in files]
    key = hashlib.sha256(repr((stamps, image_size)).encode()).hexdigest()[:12]
    path = cache / f"decoded-{key}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    result = decode(files, image_size)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):  # a folder that may only be read is decoded again next time
        torch.save(result, beside)
        beside.replace(path)
    return result


def decode(files: list[list[Path]], image_size: int) -> tuple[Tensor, Tensor, list[str]]:
    """What `read` returns. Raises DataError if sizes differ and image_size is 0."""
    pictures, classes, bad = [], [], []
    pairs = [(path, label) for label, paths in enumerate(files) for path in paths]
    for path, label in tqdm(pairs, "decoding", leave=False, disable=None):
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow's broken PNG is a SyntaxError
            bad.append(f"{path} ({' '.join(str(error).split())})")
            continue
        if image_size:
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        pictures.append(np.array(image))
        classes.append(label)
        if pictures[-1].shape != pictures[0].shape:
            raise DataError(f"{path}: its size differs from other images'; give --image_size")
    if not pictures:
        raise DataError(f"{bad[0]}: no image could be read")
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor(classes), bad


# --- splits and batches -----------------------------------------------------------------------


def split(
    source: Source, *, labels_per_class: int, val_per_class: int, pool_size: int, seed: int
) -> Splits:
    """Labelled, validation and test pictures and the pool, drawn by `seed`.

    The pool is the rest of the training set, at most `pool_size` pictures of it (0: all). Raises
    DataError if a class is too small.
    """
    images, test = source.train, source.test
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    if test is None:
        count = round(TEST_SHARE * len(order))
        test = Images(images.x[order[:count]], images.y[order[:count]])
        order = order[count:]
    taken, parts = torch.zeros(len(images.x), dtype=torch.bool), []
    for wanted in (labels_per_class, val_per_class):
        free = order[~taken[order]]
        chosen = torch.cat([free[images.y[free] == n][:wanted] for n in range(len(source.classes))])
        counts = images.y[chosen].bincount(minlength=len(source.classes))
        if counts.min() < wanted:
            raise DataError(
                f"{source.name}: class '{source.classes[int(counts.argmin())]}' has too few "
                f"pictures for {labels_per_class} labels and {val_per_class} to validate on"
            )
        taken[chosen] = True
        parts.append(Images(images.x[chosen], images.y[chosen]))
    pool = order[~taken[order]][: pool_size or None]
    if not len(pool):
        raise DataError(f"{source.name}: no picture is left for the pool")
    return Splits(*parts, images.x[pool], images.y[pool], test)


def fingerprints(x: Tensor) -> Tensor:
    """A number (N,) for each picture that hangs on its pixels alone, not on its place."""
    return torch.tensor([zlib.crc32(picture.tobytes()) for picture in x.cpu().numpy()])


def batches(x: Tensor, batch_size: int = 1000) -> Iterator[Tensor]:
    """Float images (B, C, H, W) in [0, 1], in order."""
    for part in x.split(batch_size):
        yield part.float() / 255


def training_batches(
    images: Images, batch_size: int, steps: int, *, augmented: bool, mirror: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Float images (B, C, H, W) in [0, 1] and classes; all occur once, then again."""
    count = len(images.x)
    batch_size = min(batch_size, count)
    turns = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count) for _ in range(turns)])[: steps * batch_size]
    for chosen in order.to(images.x.device).split(batch_size):
        x = images.x[chosen].float() / 255
        yield (augment(x, mirror=mirror) if augmented else x), images.y[chosen]


def augment(x: Tensor, *, mirror: bool) -> Tensor:
    """Random turn by up to 8 degrees, size by up to a tenth, shift by up to 6%, mirroring."""

    def uniform(most: float) -> Tensor:
        return most * (2 * torch.rand(len(x), device=x.device) - 1)

    angle, scale = uniform(math.radians(8)), 1 + uniform(0.1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    flip = uniform(1).sign() if mirror else torch.ones_like(cos)
    across = torch.stack((flip * cos, -sin, uniform(0.12)), 1)
    along = torch.stack((flip * sin, cos, uniform(0.12)), 1)
    points = F.affine_grid(torch.stack((across, along), 1), list(x.shape), align_corners=False)
    edge = "reflection" if mirror else "zeros"  # photographs have no empty border
    return F.grid_sample(x, points, align_corners=False, padding_mode=edge)
