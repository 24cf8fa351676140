"""Small images with a class each, and what lies outside their distribution.

mnist    through torchvision; FashionMNIST, where it can be had, is out of distribution
folder   one's own images: train/CLASS/*, test/CLASS/*
digits   the 1,797 handwritten digits that come with scikit-learn, resized to 28x28
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


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


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
    fashion: Tensor | None  # uint8 images (N, 1, 28, 28) of FashionMNIST, if it could be had
    note: str  # what the person who started the run should know

    def to(self, device: torch.device) -> "Data":
        parts = {name: getattr(self, name).to(device) for name in ("train", "val", "test")}
        fashion = None if self.fashion is None else self.fashion.to(device)
        return self._replace(**parts, fashion=fashion)


def load(*, dataset: str, data_dir: Path, image_size: int, seed: int) -> Data:
    """The data set `dataset`; `auto` is MNIST, or digits where MNIST cannot be had.

    Raises DataError if a data set that was asked for by name cannot be had.
    """
    if dataset == "digits":
        return load_digits(seed)
    if dataset == "folder":
        return load_folder(data_dir, image_size, seed)
    try:
        return load_mnist(data_dir, seed)
    except DataError as error:
        if dataset == "mnist":
            raise
        note = f"{error}; scikit-learn's digits stand in for it"
        return load_digits(seed)._replace(note=note)


def load_digits(seed: int) -> Data:
    from sklearn.datasets import load_digits as bundled_digits

    bunch = bundled_digits()
    x = torch.from_numpy(bunch.images).float()[:, None] / 16 * 255
    x = F.interpolate(x, size=28, mode="bilinear", align_corners=False).round().byte()
    images = Images(x, torch.from_numpy(bunch.target).long())
    names = tuple(map(str, range(10)))
    return Data("digits", names, *split(images, (0.6, 0.1, 0.3), seed), None, "data: digits")


def load_mnist(data_dir: Path, seed: int) -> Data:
    """The official test set; a twelfth (5,000) of the official training set is for validation."""
    images, test = read_idx("MNIST", data_dir)
    train, val = split(images, (11 / 12, 1 / 12), seed)
    data = Data("MNIST", tuple(map(str, range(10))), train, val, test, None, "data: MNIST")
    try:
        return data._replace(fashion=read_idx("FashionMNIST", data_dir)[1].x)
    except DataError as error:
        return data._replace(note=f"data: MNIST; {error}, so it is left out")


def read_idx(name: str, data_dir: Path) -> list[Images]:
    """Training and test images of MNIST or FashionMNIST, from `data_dir` or downloaded to it."""
    from torchvision import datasets  # imported where it is used: it costs two seconds

    kind = getattr(datasets, name)
    files = [data_dir / name / "raw" / Path(file).stem for file, _ in kind.resources]
    missing = not all(file.is_file() for file in files)
    if missing and not reachable(kind.mirrors[0] + kind.resources[-1][0]):
        raise DataError(
            f"{name} is not in {data_dir} and could not be downloaded: "
            f"{kind.mirrors[0]} does not answer"
        )
    try:
        parts = [kind(data_dir, train=train, download=missing) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "the files are damaged"
        raise DataError(f"{name} in {data_dir} could not be read: {reason}") from error
    images = [Images(part.data[:, None], part.targets.long()) for part in parts]
    if any(len(x) != len(y) for x, y in images):
        raise DataError(f"{name} in {data_dir}: there are not as many images as classes")
    return images


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


def load_folder(folder: Path, image_size: int, seed: int) -> Data:
    """Colour images of one's own; a tenth of train/ is for validation.

    Files that cannot be read are left out and counted. Raises DataError that names the fault.
    """
    bad: list[str] = []
    names, images = read_images(folder / "train", image_size, bad)
    test_names, test = read_images(folder / "test", image_size, bad)
    if names != test_names:
        differing = sorted(set(names) ^ set(test_names))[0]
        raise DataError(f"{folder}: class '{differing}' is not in both train/ and test/")
    note = f"data: {folder.resolve().name}"
    if bad:
        note += f"; {len(bad)} unreadable files left out, the first: {bad[0]}"
    train, val = split(images, (0.9, 0.1), seed)
    return Data(folder.resolve().name, names, train, val, test, None, note)


def read_images(folder: Path, image_size: int, bad: list[str]) -> tuple[tuple[str, ...], Images]:
    """Class names and images (N, 3, size, size) of folder/CLASS/*; adds to `bad` what is not."""
    from PIL import Image, ImageOps
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:  # names the folder or the class without an image
        raise DataError(str(error).splitlines()[0]) from error
    pictures, labels = [], []
    for path, label in found.samples:
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow's broken PNG is a SyntaxError
            bad.append(f"{path} ({error})")
            continue
        pictures.append(np.asarray(picture.resize((image_size, image_size))))
        labels.append(label)
    if len(pictures) < 10 or not 2 <= len(set(labels)) == len(found.classes):
        wanted = "at least 10 readable images, two classes, and an image of each"
        raise DataError(f"{folder}: expected {wanted}")
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return tuple(found.classes), Images(x, torch.tensor(labels))


def split(images: Images, shares: tuple[float, ...], seed: int) -> list[Images]:
    """Disjoint random parts of the given shares."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    sizes = [round(share * len(order)) for share in shares[:-1]]
    parts = order.split([*sizes, len(order) - sum(sizes)])
    return [Images(images.x[part], images.y[part]) for part in parts]


def as_float(x: Tensor) -> Tensor:
    """Images in [0, 1] from uint8."""
    return x.float() / 255


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) turned counterclockwise about their centre, on black."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import rotate as turn

    return turn(x, degrees, InterpolationMode.BILINEAR)


def batches(images: Images, batch_size: int, orders: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Float images (R, B, C, H, W) and classes (R, B) for R networks at once, each in its order.

    `orders` (R, N) holds a permutation of the images in each row.
    """
    for chosen in orders.to(images.x.device).split(batch_size, dim=1):
        yield as_float(images.x[chosen]), images.y[chosen]
