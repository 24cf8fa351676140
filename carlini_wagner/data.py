"""Pictures to attack, as 8-bit RGB, and the networks' files.

digits   scikit-learn's handwritten digits over crops of its two photographs, 32 px, no download
mnist    MNIST (LeCun et al. 1998), padded to 32 px
images   files, folders and web addresses, for a network of torchvision or of a .pt2 file
"""

import gzip
import hashlib
import io
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
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

SHARES = (0.6, 0.1, 0.3)  # of the digits and of the photographs' columns: train, val, test
COUNTS = (1000, 2000)  # pictures to validate and to test on
SAMPLES = ("china.jpg", "flower.jpg")  # photographs that come with scikit-learn
SHA256 = {  # of files at web addresses, by name
    "n01443537_goldfish.JPEG": "61ff9f1e0c4ed5906efed08c19d0c501b5ba75e45df77818d533a28e825341aa",
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


def read_text(path: Path) -> str:
    """A file in UTF-8. Raises DataError that names it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a text in UTF-8 ({error})") from error


# --- end of reading files ---------------------------------------------------------------------

# --- reading pictures: the same in every project that has it ----------------------------------


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

# --- reading MNIST: the same in every project that has it -------------------------------------


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


# --- end of reading MNIST ---------------------------------------------------------------------

# --- reading weights: the same in every project that has it -----------------------------------


def pretrained_weights(url: str, data_dir: Path) -> dict[str, Tensor]:
    """The state dict at `url`, kept in data_dir/checkpoints; the hash that torchvision's file names
    carry (resnet18-f37072fd.pth) is checked in any case, and no code of the file runs.
    """
    name = url.rsplit("/", 1)[-1]
    digest = re.search(r"-([0-9a-f]{8,})\.pth$", name)
    checksum = f"sha256:{digest[1]}" if digest else ""
    path = download(url, data_dir / "checkpoints" / name, f"weights {name}", checksum)
    return read_weights(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict on the CPU. Raises DataError if the file is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own
        reason = str(error).split("\n")[0][:200]
        raise DataError(f"{path}: not a file of weights that can be loaded ({reason})") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: expected a state dict, found {type(state).__name__}")
    return state


# --- end of reading weights -------------------------------------------------------------------


class Examples(NamedTuple):
    """uint8 images (N, 3, H, W) and their classes (N,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Examples":
        return Examples(self.x.to(device), self.y.to(device))


class Splits(NamedTuple):
    train: Examples
    val: Examples
    test: Examples


# --- handwritten digits -----------------------------------------------------------------------


def load_digits(*, train_count: int, seed: int) -> Splits:
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
    counts = (train_count, *COUNTS)
    parts = zip(share_out(len(y)), share_out(photos.shape[3]), counts, strict=True)
    return Splits(
        *(
            compose(ink[own], y[own], photos[..., columns], count, generator)
            for own, columns, count in parts
        )
    )


def share_out(count: int) -> list[slice]:
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


def load_mnist(*, train_count: int, seed: int, data_dir: Path) -> Splits:
    """MNIST at 32 px: `train_count` digits to train, 1000 others to validate, 2000 of the test set.

    Raises DataError if it is not in `data_dir` and cannot be downloaded, or has too few images.
    """
    train, test = read_idx("MNIST", data_dir)
    validate, tested = COUNTS
    if len(train[0]) < train_count + validate:
        raise DataError(
            f"train_count: MNIST has only {len(train[0]) - validate} images to train on"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train[0]), generator=generator)
    parts = (order[:train_count], order[train_count : train_count + validate])
    picked = torch.randperm(len(test[0]), generator=generator)[:tested]
    return Splits(*(frame_digits(*train, rows) for rows in parts), frame_digits(*test, picked))


def frame_digits(x: Tensor, y: Tensor, rows: Tensor) -> Examples:
    """The images `rows` of grey ones (N, 1, 28, 28), in three equal colours, framed in black."""
    return Examples(F.pad(x[rows], (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous(), y[rows])


def choose_digits(y: Tensor, right: Tensor, *, target: str, count: int) -> tuple[Tensor, Tensor]:
    """`count` images and the classes to reach, (N,) each, from all classes and whether they are
    classified correctly.

    Targets: in turn every class to every other one (`pairs`); of each image, (y + 1) mod 10
    (`next`), its own (`any`, to be left), or one digit. Raises DataError if there is no such image.
    """
    if target != "pairs":
        digit = None if target in ("next", "any") else class_number(target, [*map(str, range(10))])
        wanted = y.clone() if target == "any" else (y + 1) % 10
        wanted = wanted if digit is None else torch.full_like(y, digit)
        chosen = (right & ((wanted != y) | (target == "any"))).nonzero()[:count, 0].tolist()
        goals = wanted[chosen].tolist()
    else:
        pairs = [(one, other) for one in range(10) for other in range(10) if one != other]
        left = {digit: (right & (y == digit)).nonzero()[:, 0].tolist() for digit in range(10)}
        places = (pairs[number % len(pairs)] for number in range(count))
        found = [(left[one].pop(0), other) for one, other in places if left[one]]
        chosen, goals = [place for place, _ in found], [goal for _, goal in found]
    if not chosen:
        raise DataError(
            "epochs: the network classifies no such digit correctly; train it for longer"
        )
    return torch.tensor(chosen), torch.tensor(goals)


# --- photographs ------------------------------------------------------------------------------


class Photographs(NamedTuple):
    x: Tensor  # uint8 (N, 3, size, size)
    names: list[str]
    bad: list[str]  # files that could not be read, and why


def load_photographs(
    sources: tuple[str, ...], *, data_dir: Path, size: int, count: int
) -> Photographs:
    """The first `count` readable pictures of files, folders, addresses and lists of them (.txt, one
    a line). Raises DataError if there is none.
    """
    x, names, bad = [], [], []
    for path in find_photographs(sources, data_dir):
        try:
            x.append(crop_centre(open_picture(path), size))
        except DataError as error:
            bad.append(str(error))
            continue
        names.append(path.name)
        if len(x) == count:
            break
    if not x:
        raise DataError(f"images: no readable picture; {bad[0] if bad else 'the folder is empty'}")
    return Photographs(torch.stack(x), names, bad)


def crop_centre(picture: Image.Image, size: int) -> Tensor:
    """uint8 (3, size, size): as usual for ImageNet, the shorter side `size` pixels, the centre cut
    out. A picture of that size is left as it is, to the last bit.
    """
    pixels = np.array(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def crops(
    inputs: list[str], size: int, batch_size: int, bad: list[str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and uint8 pictures (B, 3, size, size) of files and folders, one batch at a time;
    adds to `bad` what cannot be read.
    """
    names, pictures = [], []
    for name, path in tqdm(find_pictures(inputs).items(), "pictures", leave=False, disable=None):
        try:
            pictures.append(crop_centre(open_picture(path), size))
            names.append(name)
        except DataError as error:
            bad.append(str(error))
        if len(names) == batch_size:
            yield names, torch.stack(pictures)
            names, pictures = [], []
    if names:
        yield names, torch.stack(pictures)


def find_photographs(sources: tuple[str, ...], data_dir: Path) -> Iterator[Path]:
    """The files that `sources` name, addresses downloaded; a folder's own in order of names."""
    for source in sources:
        if source.startswith(("http://", "https://")):
            name = source.rsplit("/", 1)[-1]
            checksum = f"sha256:{SHA256[name]}" if name in SHA256 else ""
            yield download(source, data_dir / name, f"picture {name}", checksum)
            continue
        path = find_file(source, data_dir)
        if path.is_dir():
            yield from visible_files(path)
        elif path.suffix == ".txt" and path.is_file():
            lines = tuple(filter(None, map(str.strip, read_text(path).splitlines())))
            yield from find_photographs(lines, data_dir)
        elif path.is_file():
            yield path
        elif source in SAMPLES:
            from sklearn import datasets  # imported where it is used: it is slow

            yield Path(datasets.__file__).parent / "images" / source
        else:
            raise DataError(f"images: '{source}' is neither here nor in {data_dir}")


def find_file(name: str, data_dir: Path) -> Path:
    """The path `name` if there is such a file or folder, else that in `data_dir`."""
    path = Path(os.path.expanduser(name))
    return path if path.exists() else data_dir / path


def class_number(target: str, classes: list[str]) -> int:
    """Of a class by name or number. Raises DataError if there is none, or are several."""
    if target.isdecimal() and target not in classes:
        if int(target) >= len(classes):
            raise DataError(f"target: {target}, but the network knows only {len(classes)} classes")
        return int(target)
    numbers = [n for n, name in enumerate(classes) if name.lower() == target.lower()]
    if len(numbers) != 1:
        several = f": give its number, one of {numbers}" if numbers else "; none of that name"
        raise DataError(
            f"target: expected the name or number of one class, found '{target}'{several}"
        )
    return numbers[0]


# --- networks from files ----------------------------------------------------------------------


def describe_network(network: str, weights: str, data_dir: Path) -> dict:
    """What model.build_network makes the network from: a .pt2 file's bytes, or the name of one of
    torchvision's networks and a state dict. Raises DataError if they cannot be had.
    """
    if network.endswith(".pt2"):
        return {"kind": "exported", "program": read_program(find_file(network, data_dir))}
    if weights == "imagenet":
        state = pretrained_weights(imagenet(network).url, data_dir)
    else:
        state = read_weights(find_file(weights, data_dir))
    return {"kind": "torchvision", "name": network, "state": state}


def read_program(path: Path) -> Tensor:
    """The bytes of a .pt2 file. Raises DataError if it is none, or holds pickled objects: their
    code would run.
    """
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"network: {path}: not a file of torch.export ({error})") from error
    if any("custom_obj" in name for name in names):
        raise DataError(f"network: {path}: it holds pickled objects, whose code would run")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def imagenet(network: str) -> Any:
    """torchvision's entry on its ImageNet weights; DataError if it has no such network."""
    from torchvision.models import get_model_weights  # imported where it is used: it is slow

    try:
        return get_model_weights(network).DEFAULT
    except ValueError:
        raise DataError(f"network: torchvision has no '{network}'") from None


def class_names(source: str, count: int, data_dir: Path) -> list[str]:
    """`imagenet` (as torchvision knows them), `numbers`, or a text file with a name a line.

    Raises DataError if there are not `count` names.
    """
    if source == "numbers":
        return [str(number) for number in range(count)]
    if source == "imagenet":
        names = list(imagenet("resnet18").meta["categories"])
    else:
        lines = read_text(find_file(source, data_dir)).splitlines()
        names = [line.strip() for line in lines if line.strip()]
    if len(names) != count:
        raise DataError(
            f"class_names: {len(names)} of {source}, but the network has {count} classes"
        )
    return names


# --- pictures as files ------------------------------------------------------------------------


def through_disk(x: Tensor, names: list[str], folder: Path) -> Tensor:
    """Pictures (N, 3, H, W) of pixels k / 255 as `folder`/NAME.png, read again from there."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    back = []
    for name, picture in zip(names, pixels, strict=True):
        path = folder / f"{name}.png"
        Image.fromarray(picture).save(path)
        back.append(crop_centre(open_picture(path), x.shape[-1]))
    return torch.stack(back).to(x.device).float() / 255
