"""Pairs of image sets, all images 3x32x32, each with a class.

mnist_cifar100      both through torchvision
mnist_folder        instead of CIFAR-100 one's own images: train/CLASS/*, test/CLASS/*
digits_photographs  scikit-learn's handwritten digits and its two photographs: no download
"""

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32  # height and width in pixels
SHARES = (0.6, 0.15, 0.25)  # train, validation, test, of the bundled digits and photographs
VALIDATION = 0.05  # of the training images of all other sets


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


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


def load(*, dataset: str, data_dir: Path, folder_dir: Path, bundled_images: int, seed: int) -> Pair:
    """The pair `dataset`; `auto` is MNIST and CIFAR-100, or the bundled pair without them.

    The bundled sets have `bundled_images` training images each. Raises DataError if a pair that
    was asked for by name cannot be had.
    """
    if dataset == "digits_photographs":
        return load_bundled(bundled_images, seed)
    if dataset == "mnist_folder":
        folder, note = load_folder(folder_dir, seed)
        return Pair(load_mnist(data_dir, seed), folder, note)
    try:
        x, y = load_mnist(data_dir, seed), load_cifar100(data_dir, seed)
        return Pair(x, y, f"data: {x.name} and {y.name}")
    except DataError as error:
        if dataset == "mnist_cifar100":
            raise
        note = f"{error}; scikit-learn's digits and photographs stand in"
        return load_bundled(bundled_images, seed)._replace(note=note)


# --- what comes with scikit-learn -------------------------------------------------------------


def load_bundled(train_images: int, seed: int) -> Pair:
    """Digits and photographs; both are split before images are made of them."""
    from sklearn.datasets import load_digits, load_sample_images

    bunch = load_digits()
    ink = torch.from_numpy(bunch.images).float() / 16
    parts = split(Images(ink, torch.from_numpy(bunch.target).long()), SHARES, seed)
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    strips = photos.split(sizes(photos.shape[3], SHARES)[::-1], dim=3)[::-1]  # train at the right
    digits, crops = [], []
    for number, count in enumerate((train_images, 1000, 2000)):
        generator = torch.Generator().manual_seed(3 * seed + number)  # test images stay the same
        digits.append(draw_digits(parts[number], count, generator))
        crops.append(cut_crops(strips[number], count, generator))
    return Pair(
        Set("digits", tuple(map(str, range(10))), *digits, mirror=False),
        Set("photographs", ("temple", "flower"), *crops, mirror=True),
        "data: scikit-learn's digits and photographs",
    )


def draw_digits(source: Images, count: int, generator: torch.Generator) -> Images:
    """White on black, drawn from ink (N, 8, 8) in [0, 1] at random: which, where, angle, size.

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
    """Squares of 32 to 64 pixels of photos (P, 3, h, w), scaled to 32; the class is which photo."""
    y = torch.randint(len(photos), (count,), generator=generator)
    x = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    draws = torch.rand(count, 3, generator=generator).tolist()
    for number, (size, down, right) in enumerate(draws):
        side = SIZE + int(size * (SIZE + 1))
        top, left = (
            int(u * (n - side + 1)) for u, n in zip((down, right), photos.shape[2:], strict=True)
        )
        crop = photos[y[number], None, :, top : top + side, left : left + side]
        small = F.interpolate(crop.float(), SIZE, mode="bilinear", antialias=True)
        x[number] = small[0].round().byte()
    return Images(x, y)


# --- MNIST, CIFAR-100 and one's own images ----------------------------------------------------


def load_mnist(data_dir: Path, seed: int) -> Set:
    """MNIST with two black pixels all around, its grey in three equal channels."""
    from torchvision.datasets import MNIST  # imported where it is used: it costs two seconds

    names = [Path(file).stem for file, _ in MNIST.resources]
    there = all((data_dir / "MNIST" / "raw" / name).is_file() for name in names)
    url = MNIST.mirrors[0] + MNIST.resources[-1][0]
    parts = []
    for part in read_torchvision(MNIST, data_dir, there, url):
        if part.data.shape[1:] != (28, 28) or len(part.data) != len(part.targets):
            raise DataError(f"MNIST in {data_dir}: expected 28x28 images, each with a class")
        x = F.pad(part.data, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
        parts.append(Images(x.contiguous(), part.targets.long()))
    train, val = split(parts[0], (1 - VALIDATION, VALIDATION), seed)
    return Set("MNIST", tuple(map(str, range(10))), train, val, parts[1], mirror=False)


def load_cifar100(data_dir: Path, seed: int) -> Set:
    from torchvision.datasets import CIFAR100

    there = (data_dir / CIFAR100.base_folder / "train").is_file()
    found = read_torchvision(CIFAR100, data_dir, there, CIFAR100.url)
    parts = []
    for part in found:
        x = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Images(x, torch.tensor(part.targets)))
    train, val = split(parts[0], (1 - VALIDATION, VALIDATION), seed)
    return Set("CIFAR-100", tuple(found[0].classes), train, val, parts[1], mirror=True)


def read_torchvision(kind: type, data_dir: Path, there: bool, url: str) -> list:
    """Training and test part, from `data_dir` or downloaded to it and verified."""
    name = kind.__name__
    if not there and not reachable(url):
        host = url.split("/")[2]
        raise DataError(
            f"{name} is not in {data_dir} and could not be downloaded: {host} does not answer"
        )
    try:
        return [kind(data_dir, train=train, download=not there) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "the files are damaged"
        raise DataError(f"{name} in {data_dir} could not be read: {reason}") from error


def reachable(url: str, seconds: float = 6.0) -> bool:
    """Whether the file can be asked for. In a thread, as looking up a name has no time limit."""
    answers = []

    def ask() -> None:
        with suppress(OSError), urlopen(Request(url, method="HEAD"), timeout=seconds):
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def load_folder(folder: Path, seed: int) -> tuple[Set, str]:
    """One's own images and a note; files that cannot be read are left out and counted.

    Raises DataError that names what is wrong.
    """
    bad: list[str] = []
    classes, images = read_images(folder / "train", bad)
    test_classes, test = read_images(folder / "test", bad)
    if classes != test_classes:
        differing = min(set(classes) ^ set(test_classes))
        raise DataError(f"{folder}: class '{differing}' is not in both train/ and test/")
    name = folder.resolve().name
    note = f"data: MNIST and {name}"
    if bad:
        note += f"; {len(bad)} unreadable files left out, the first: {bad[0]}"
    train, val = split(images, (1 - VALIDATION, VALIDATION), seed)
    return Set(name, classes, train, val, test, mirror=True), note


def read_images(folder: Path, bad: list[str]) -> tuple[tuple[str, ...], Images]:
    """Class names and images of folder/CLASS/*, their middle square scaled to 32 pixels.

    What is not an image is added to `bad`.
    """
    from PIL import Image, ImageOps
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:  # names the folder, or the class without an image
        raise DataError(str(error).splitlines()[0]) from error
    pictures, labels = [], []
    for path, label in found.samples:
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow's broken PNG is a SyntaxError
            bad.append(f"{path} ({error})")
            continue
        pictures.append(np.asarray(ImageOps.fit(picture, (SIZE, SIZE))))
        labels.append(label)
    if len(pictures) < 40 or not 2 <= len(set(labels)) == len(found.classes):
        wanted = "at least 40 readable images, two classes, and an image of each"
        raise DataError(f"{folder}: expected {wanted}")
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return tuple(found.classes), Images(x, torch.tensor(labels))


def sizes(count: int, shares: tuple[float, ...]) -> list[int]:
    first = [round(share * count) for share in shares[:-1]]
    return [*first, count - sum(first)]


def split(images: Images, shares: tuple[float, ...], seed: int) -> list[Images]:
    """Disjoint random parts of the given shares."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    parts = order.split(sizes(len(order), shares))
    return [Images(images.x[part], images.y[part]) for part in parts]


def choose(images: Images, fraction: float, seed: int) -> Images:
    """A random part of the images; a larger fraction holds those of a smaller one."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    chosen = order[: max(1, round(fraction * len(order)))].to(images.x.device)
    return Images(images.x[chosen], images.y[chosen])


# --- batches ----------------------------------------------------------------------------------


def as_float(x: Tensor) -> Tensor:
    """Images in [0, 1] from uint8, channels last in memory; anything else as it is."""
    if x.dtype != torch.uint8:
        return x
    return (x.float() / 255).contiguous(memory_format=torch.channels_last)


def batches(images: Images, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in their order."""
    for x, y in zip(images.x.split(batch_size), images.y.split(batch_size), strict=True):
        yield as_float(x), y


def shuffled(images: Images, batch_size: int, mirror: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once in a random order; with `mirror` half of them, at random, mirrored."""
    order = torch.randperm(len(images.x)).to(images.x.device)
    for chosen in order.split(batch_size):
        x = images.x[chosen]
        if mirror:
            turned = torch.rand(len(x)).to(x.device) < 0.5
            x = torch.where(turned[:, None, None, None], x.flip(3), x)
        yield as_float(x), images.y[chosen]


def mean_image(images: Images) -> Tensor:
    """Mean (3, 32, 32) of all images, in [0, 1]."""
    total = sum(x.sum(0, dtype=torch.double) for x, _ in batches(images, 500))
    return (total / len(images.x)).float().cpu()
