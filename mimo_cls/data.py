"""Images held as bytes on the device, and what a MIMO network eats: batches of M images at once.

cifar10  Krizhevsky 2009, through torchvision
folder   one's own images: train/CLASS/*, test/CLASS/*
digits   scikit-learn's handwritten digits over crops of its two photographs
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
CIFAR_HOST = "https://www.cs.toronto.edu"


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


class Images(NamedTuple):
    """uint8 images (N, 3, H, W) and their classes (N,)."""

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
    strange: dict[str, Tensor]  # by name, uint8 images (N, 3, H, W) of none of the classes
    flip: bool  # whether an image's mirror image has the same class
    note: str  # what the person who started the run should know

    def to(self, device: torch.device) -> "Data":
        parts = {name: getattr(self, name).to(device) for name in ("train", "val", "test")}
        return self._replace(
            **parts, strange={name: x.to(device) for name, x in self.strange.items()}
        )


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


def compose(x: Tensor, orders: Tensor) -> Tensor:
    """Images (N, M * 3, H, W) from (B, 3, H, W): member m sees x[orders[m]], orders (M, N)."""
    return torch.cat([x[order] for order in orders], 1)


def training_batches(
    images: Images,
    batch_size: int,
    *,
    members: int,
    input_repetition: float,
    batch_repetition: int,
    flip: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented inputs (N, M * 3, H, W) and the members' classes (N, M), once through the images.

    A batch holds `batch_size` different images, N = batch_repetition * batch_size; of an epoch's
    random order, an incomplete batch at the end is left out.
    """
    order = torch.randperm(len(images.x)).to(images.x.device)
    for chosen in order.split(batch_size)[: max(1, len(order) // batch_size)]:
        x, y = augment(images.x[chosen], flip=flip), images.y[chosen]
        orders = member_orders(
            len(chosen),
            members=members,
            input_repetition=input_repetition,
            batch_repetition=batch_repetition,
        ).to(x.device)
        yield compose(as_float(x), orders), y[orders].T  # the same index for image and class


def testing_batches(x: Tensor, batch_size: int, members: int) -> Iterator[Tensor]:
    """Inputs (B, M * 3, H, W) from uint8 images, all of them in order: every member sees each."""
    for part in x.split(batch_size):
        same = torch.arange(len(part), device=x.device).expand(members, -1)
        yield compose(as_float(part), same)


def augment(x: Tensor, *, flip: bool) -> Tensor:
    """uint8 images (N, 3, H, W), each shifted by up to an eighth over black and, with `flip`,
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
    if flip:
        columns = torch.where(turned, columns.flip(1), columns)
    number = torch.arange(count, device=x.device)[:, None, None]
    x = x.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]]
    return x.permute(0, 3, 1, 2)  # stays channels_last


def as_float(x: Tensor) -> Tensor:
    """uint8 images about zero, in channels_last."""
    x = x.to(torch.float32, memory_format=torch.channels_last)
    return (x / 255 - 0.5) / 0.25


# --- images that are harder than those of training --------------------------------------------


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


# --- data sets --------------------------------------------------------------------------------


def load(
    *,
    dataset: str,
    data_dir: Path,
    ood_dir: Path,
    image_size: int,
    train_images: int,
    test_images: int,
    flip: bool,
    seed: int,
) -> Data:
    """The data set `dataset`; `auto` is cifar10, or digits where it cannot be had.

    Photographs without and with digits, and the images in `ood_dir` if there are any, are strange
    to it. Raises DataError if a data set that was asked for by name cannot be had.
    """
    digits = load_digits(image_size, train_images, test_images, seed)
    if dataset == "digits":
        return digits
    try:
        if dataset == "folder":
            data = load_folder(data_dir, image_size, flip, seed)
        else:
            data = load_cifar10(data_dir, seed)
    except DataError as error:
        if dataset != "auto":
            raise
        note = f"{error}; scikit-learn's digits over photographs stand in for it"
        return digits._replace(note=note)
    strange = {"digits over photographs": digits.test.x} | digits.strange
    bad: list[str] = []
    files = sorted(path for path in ood_dir.rglob("*") if path.suffix.lower() in SUFFIXES)
    pictures = read(files, image_size, bad)[0]
    if len(pictures):
        strange = {ood_dir.resolve().name: pictures} | strange
    note = f"{data.note}; strange images: {', '.join(strange)}{left_out(bad)}"
    return data._replace(strange=strange, note=note)


def load_cifar10(data_dir: Path, seed: int) -> Data:
    """The official test set; a tenth of the official training set is the validation set."""
    from torchvision.datasets import CIFAR10  # imported where it is used: it costs two seconds

    folder = data_dir / CIFAR10.base_folder
    missing = not (folder / CIFAR10.meta["filename"]).is_file()
    if missing and not reachable(CIFAR_HOST):
        raise DataError(
            f"CIFAR-10 is not in {folder} and could not be downloaded: {CIFAR_HOST} does not answer"
        )
    try:
        parts = [CIFAR10(data_dir, train=train, download=missing) for train in (True, False)]
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "the files are damaged"
        raise DataError(f"CIFAR-10 in {folder} could not be read: {reason}") from error
    images, test = (
        Images(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
        for part in parts
    )
    train, val = split(images, 0.1, seed)
    names = tuple(parts[0].classes)
    return Data("CIFAR-10", names, train, val, test, {}, True, "data: CIFAR-10")


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


def load_folder(folder: Path, image_size: int, flip: bool, seed: int) -> Data:
    """train/CLASS/*, test/CLASS/*; a tenth of train/ is the validation set.

    Files that cannot be read are left out and counted. Raises DataError that names the fault.
    """
    from torchvision.datasets import ImageFolder

    bad: list[str] = []
    names, parts = [], []
    for part in ("train", "test"):
        try:
            found = ImageFolder(folder / part)
        except FileNotFoundError as error:  # names the folder or the class without an image
            raise DataError(str(error).splitlines()[0]) from error
        x, good = read([Path(path) for path, _ in found.samples], image_size, bad)
        y = torch.tensor(found.targets)[good]
        if len(y) < 10 or not 2 <= len(y.unique()) == len(found.classes):
            wanted = "at least 10 readable images, two classes, and an image of each"
            raise DataError(f"{folder / part}: expected {wanted}{left_out(bad)}")
        names.append(tuple(found.classes))
        parts.append(Images(x, y))
    if names[0] != names[1]:
        differing = sorted(set(names[0]) ^ set(names[1]))[0]
        raise DataError(f"{folder}: class '{differing}' is not in both train/ and test/")
    train, val = split(parts[0], 0.1, seed)
    name = folder.resolve().name
    return Data(name, names[0], train, val, parts[1], {}, flip, f"data: {name}{left_out(bad)}")


def read(paths: list[Path], size: int, bad: list[str]) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, size, size) and their places in `paths`; adds to `bad` what is none."""
    from PIL import Image, ImageOps

    pictures, good = [], []
    for place, path in enumerate(paths):
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow's broken PNG is a SyntaxError
            bad.append(f"{path} ({error})")
            continue
        pictures.append(np.asarray(picture.resize((size, size))))
        good.append(place)
    x = np.stack(pictures) if pictures else np.empty((0, size, size, 3), np.uint8)
    return torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(good, dtype=torch.long)


def left_out(bad: list[str]) -> str:
    return f"; {len(bad)} unreadable files left out, the first: {bad[0]}" if bad else ""


def split(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Disjoint random parts, the second of the given share."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([len(order) - round(share * len(order))])
    return tuple(Images(images.x[part], images.y[part]) for part in parts)


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
        generator.manual_seed(3 * seed + number)  # so no split hangs on the size of another
        chosen = torch.randint(len(ink), (counts[number],), generator=generator)
        scene = draw(crop(ground, counts[number], size, uniform), ink[chosen], uniform)
        parts.append(Images(scene.round().byte(), y[chosen]))
    empty = crop(ground, test_images, size, uniform).round().byte()
    names = tuple(map(str, range(10)))
    strange = {"photographs without a digit": empty}
    return Data("digits over photographs", names, *parts, strange, False, "data: digits")


def shares(values: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Three runs of neighbours along `dim`, of 60%, 20% and 20%."""
    count = values.shape[dim]
    return values.tensor_split([round(0.6 * count), round(0.8 * count)], dim)


def crop(photos: Tensor, count: int, size: int, uniform: Callable) -> Tensor:
    """Random crops (count, 3, size, size) of photos (P, 3, h, w), shrunk to a half or a quarter."""
    height, width = photos.shape[2:]
    which = uniform(0, len(photos), count).long()
    crops = torch.empty(count, 3, size, size)
    corners = uniform(0, 1, count, 2)
    steps = uniform(2, 5, count).long().clamp(max=min(height, width) // size)
    for number, (photo, corner, step) in enumerate(zip(which, corners, steps, strict=True)):
        span = int(step) * size
        top, left = int(corner[0] * (height - span)), int(corner[1] * (width - span))
        picture = photos[photo, :, top : top + span, left : left + span]
        crops[number] = F.avg_pool2d(picture, int(step))
    return crops


def draw(scene: Tensor, digits: Tensor, uniform: Callable) -> Tensor:
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
