"""Pictures to attack, as 8-bit RGB: photographs, or handwritten digits over photographs.

images   files, folders and web addresses; the default is one photograph of a goldfish
digits   scikit-learn's handwritten digits over crops of its two photographs, 32 px, no download
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
SHARES = (0.6, 0.1, 0.3)  # of the digits and of the photographs' columns: train, val, test
SHA256 = {  # of the file that the default asks for, by name
    "n01443537_goldfish.JPEG": "61ff9f1e0c4ed5906efed08c19d0c501b5ba75e45df77818d533a28e825341aa",
}


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


class Examples(NamedTuple):
    """uint8 images (N, 3, H, W) and their classes (N,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Examples":
        return Examples(self.x.to(device), self.y.to(device))


class Digits(NamedTuple):
    train: Examples
    val: Examples
    test: Examples


# --- digits over photographs ------------------------------------------------------------------


def load_digits(*, train_count: int, seed: int) -> Digits:
    """Scenes of 32 px, `train_count` to train, 1000 to validate, 2000 to test.

    The digits and the photographs are split before scenes are composed from them.
    """
    from sklearn.datasets import load_digits as bundled_digits
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    bunch = bundled_digits()
    order = torch.randperm(len(bunch.target), generator=generator)
    ink = torch.from_numpy(bunch.images).float()[order, None] / 16
    y = torch.from_numpy(bunch.target).long()[order]
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2) / 255
    counts = (train_count, 1000, 2000)
    parts = zip(cut(len(y)), cut(photos.shape[3]), counts, strict=True)
    return Digits(
        *(
            compose(ink[own], y[own], photos[..., columns], count, generator)
            for own, columns, count in parts
        )
    )


def cut(count: int) -> list[slice]:
    """0 .. count - 1 in runs of neighbours, in the proportions of SHARES."""
    ends = [round(sum(SHARES[:number]) * count) for number in range(len(SHARES) + 1)]
    return [slice(*ends[number : number + 2]) for number in range(len(SHARES))]


def compose(
    ink: Tensor, y: Tensor, photos: Tensor, count: int, generator: torch.Generator
) -> Examples:
    """`count` scenes: a digit of ink (N, 1, 8, 8), turned, shifted and coloured, over a crop of
    photos (P, 3, H, W) in [0, 1].
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    chosen = torch.randint(len(y), (count,), generator=generator)
    angle, scale, shift = uniform(-0.3, 0.3), uniform(1.0, 1.3), uniform(-0.2, 0.2, 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack((cos, -sin, shift[:, 0], sin, cos, shift[:, 1]), 1).view(count, 2, 3)
    points = F.affine_grid(theta, [count, 1, 32, 32], align_corners=False)
    opacity = F.grid_sample(ink[chosen], points, align_corners=False)
    opacity = ((opacity - 0.2) / 0.4).clamp(0, 1) * uniform(0.8, 1.0, 1, 1, 1)

    crops = torch.empty(count, 3, 32, 32)
    corner = uniform(0, 1, 3)
    for number, (which, top, left) in enumerate(corner.tolist()):
        photo = photos[int(which * len(photos))]
        row, column = int(top * (photo.shape[1] - 64)), int(left * (photo.shape[2] - 64))
        crops[number] = F.avg_pool2d(photo[:, row : row + 64, column : column + 64], 2)
    dark = crops.mean((1, 2, 3)) < 0.45  # the ink has to stand out from what lies under it
    colour = torch.where(dark[:, None], uniform(0.7, 1.0, 3), uniform(0.0, 0.3, 3))
    x = crops * (1 - opacity) + colour[:, :, None, None] * opacity
    return Examples((x * 255).round().byte(), y[chosen])


def choose_digits(y: Tensor, right: Tensor, *, pairs: bool, count: int) -> tuple[Tensor, Tensor]:
    """`count` scenes and their targets, (N,) each, from classes and whether they are seen rightly.

    Targets: in turn every class to every other one (`pairs`), or (y + 1) mod 10. Raises DataError
    if there is no such scene.
    """
    wanted = [(one, other) for one in range(10) for other in range(10) if one != other]
    left = {digit: (right & (y == digit)).nonzero()[:, 0].tolist() for digit in range(10)}
    chosen = [] if pairs else right.nonzero()[:count, 0].tolist()
    target = [(digit + 1) % 10 for digit in y[chosen].tolist()] if chosen else []
    for number in range(count if pairs else 0):
        source, other = wanted[number % len(wanted)]
        if left[source]:
            chosen.append(left[source].pop(0))
            target.append(other)
    if not chosen:
        raise DataError("digits: the network sees no such scene rightly; train it for longer")
    return torch.tensor(chosen), torch.tensor(target)


# --- photographs ------------------------------------------------------------------------------


class Photographs(NamedTuple):
    x: Tensor  # uint8 (N, 3, size, size)
    names: list[str]
    bad: list[str]  # files that could not be read, and why


def load_photographs(sources: tuple[str, ...], *, data_dir: Path, size: int) -> Photographs:
    """Files, folders, addresses and lists of them (.txt, one a line): shorter side `size` pixels,
    centre cropped. Raises DataError if there is not one readable picture.
    """
    x, names, bad = [], [], []
    for path in find_photographs(sources, data_dir):
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError) as error:  # Pillow's broken PNG is a SyntaxError
            bad.append(f"{path} ({error})")
            continue
        x.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        names.append(path.name)
    if not x:
        raise DataError(f"images: no readable picture; {bad[0] if bad else 'the folder is empty'}")
    return Photographs(torch.stack(x), names, bad)


def choose_target(before: Tensor, target: str, classes: int) -> Tensor:
    """Classes (N,) to reach: of number `target`, or for `next` (class before + 1) mod classes.

    Raises DataError if there is no such class.
    """
    if target == "next":
        return (before + 1) % classes
    if int(target) >= classes:
        raise DataError(f"target: {target}, but the network knows only {classes} classes")
    return torch.full_like(before, int(target))


def find_photographs(sources: tuple[str, ...], data_dir: Path) -> Iterator[Path]:
    """The files that `sources` name, addresses downloaded; a folder's own in order of names."""
    for source in sources:
        if source.startswith(("http://", "https://")):
            yield fetch(source, data_dir)
            continue
        path = Path(source) if Path(source).exists() else data_dir / source
        if path.is_dir():
            files = sorted(path.rglob("*"))
            yield from (file for file in files if file.suffix.lower() in ENDINGS)
        elif path.suffix == ".txt" and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            yield from find_photographs(tuple(filter(None, map(str.strip, lines))), data_dir)
        elif path.is_file():
            yield path
        else:
            raise DataError(f"images: '{source}' is neither here nor in {data_dir}")


def fetch(url: str, data_dir: Path) -> Path:
    """The file at `url`, kept in `data_dir`; DataError if it cannot be had or is another one."""
    path = data_dir / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    by_hand = f"; to get it by hand, put {url} into {data_dir}"
    if not reachable(url):
        raise DataError(f"images: {url} does not answer{by_hand}")
    try:
        with urlopen(Request(url, headers={"User-Agent": "Mozilla/5.0"}), timeout=30) as answer:
            content = answer.read()
        if hashlib.sha256(content).hexdigest() != SHA256.get(path.name, "") and path.name in SHA256:
            raise OSError("another file than expected (checksum)")
        data_dir.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise DataError(f"images: {url} could not be downloaded: {error}{by_hand}") from error
    return path


def reachable(url: str, seconds: float = 6.0) -> bool:
    """Whether the host answers in time. In a thread, as looking up a name has no time limit."""
    answers = []

    def ask() -> None:
        with suppress(OSError), urlopen(Request(url, method="HEAD"), timeout=seconds):
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


class Weights(NamedTuple):
    state: dict[str, Tensor]  # of a torchvision network
    classes: list[str]


def load_weights(path: Path, network: str, data_dir: Path) -> Weights:
    """The file `path`, or torchvision's weights for ImageNet if its name is `imagenet`.

    Raises DataError if they cannot be had. Classes of one's own weights are named by number.
    """
    if path.name == "imagenet":
        return imagenet_weights(network, data_dir)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        classes = len(list(state.values())[-1])
    except FileNotFoundError:
        raise DataError(f"weights: there is no file {path}") from None
    except Exception as error:  # whatever a file of another kind makes torch.load raise
        reason = str(error).splitlines()[0][:100]
        raise DataError(f"weights: {path} is no state dict of {network}: {reason}") from None
    return Weights(state, [str(number) for number in range(classes)])


def imagenet_weights(network: str, data_dir: Path) -> Weights:
    """Verified by torchvision and kept in `data_dir`."""
    from torchvision.models import get_model_weights  # imported where it is used: it is slow

    try:
        weights = get_model_weights(network).DEFAULT
    except ValueError:
        raise DataError(f"network: torchvision has no '{network}'") from None
    there = (data_dir / weights.url.rsplit("/", 1)[-1]).exists()
    if not there and not reachable(weights.url):
        raise DataError(f"weights: {weights.url} is not in {data_dir} and does not answer")
    try:
        state = weights.get_state_dict(model_dir=str(data_dir), check_hash=True, progress=False)
    except (OSError, RuntimeError) as error:
        raise DataError(f"weights: {weights.url} could not be downloaded: {error}") from error
    return Weights(state, list(weights.meta["categories"]))


# --- pictures as files ------------------------------------------------------------------------


def through_disk(x: Tensor, before: Tensor, target: Tensor, folder: Path) -> Tensor:
    """Pictures (N, 3, H, W) of pixels k / 255 as PNGs in `folder`, read again from there.

    Each is named after its number, its class `before` and its `target`, (N,) both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    back = []
    for number, picture in enumerate(pixels):
        path = folder / f"{number:03d}-{int(before[number])}-to-{int(target[number])}.png"
        Image.fromarray(picture).save(path)
        with Image.open(path) as file:
            back.append(torch.from_numpy(np.array(file)).permute(2, 0, 1))
    return torch.stack(back).to(x.device).float() / 255
