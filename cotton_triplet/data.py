"""Pictures of leaves by what ails them, split so that no copy of a training picture is tested.

folder   class folders of photographs, as published sets of cotton diseases come
leaves   drawn leaves with the six looks, over crops of scikit-learn's photographs; no download
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, lerp
from tqdm import tqdm

SPLITS = ("train", "val", "test")


class DataError(Exception):
    """Why the data cannot be used, in one line for the person who started the run."""


class Examples(NamedTuple):
    """uint8 images (N, 3, S, S) and their classes (N,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Examples":
        return Examples(self.x.to(device), self.y.to(device))


class Data(NamedTuple):
    name: str
    classes: tuple[str, ...]
    train: Examples
    val: Examples
    test: Examples
    numbers: dict[str, int]  # for metrics.json
    note: str  # what the person who started the run should know

    def to(self, device: torch.device) -> "Data":
        return self._replace(**{name: getattr(self, name).to(device) for name in SPLITS})


def load(
    *, dataset: str, data_dir: Path, image_size: int, leaf_count: int, same_bits: int, seed: int
) -> Data:
    """The set `dataset`; `auto` is folder, or leaves where data_dir has no class folders.

    Raises DataError if a data set asked for by name cannot be had.
    """
    if dataset == "leaves":
        return load_leaves(data_dir, image_size, leaf_count, seed)
    try:
        return load_folder(data_dir, image_size, same_bits, seed)
    except DataError as error:
        if dataset == "folder":
            raise
        leaves = load_leaves(data_dir, image_size, leaf_count, seed)
        return leaves._replace(note=f"{error}; drawn leaves stand in for photographs")


def cached(folder: Path, kind: str, key: object, make: Callable) -> tuple:
    """What `make()` returns, kept in a file of `folder` until this code or `key` changes."""
    digest = hashlib.sha256(repr(key).encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    path = folder / f"{kind}-{digest}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    made = make()
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):  # a folder that may only be read: made again next time
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(made, beside)
        beside.replace(path)
    return made


# --- drawn leaves -----------------------------------------------------------------------------


def load_leaves(folder: Path, image_size: int, count: int, seed: int) -> Data:
    """`count` drawn leaves; train, val and test have backgrounds from different photographs."""
    from sklearn.datasets import load_sample_images  # imported where it is used: it is slow

    photos = np.stack(load_sample_images().images)
    photos = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255
    shares = (0.7, 0.1, 0.2)
    sources = photos.split([round(share * photos.shape[3]) for share in shares], 3)
    counts = [math.ceil(share * count / len(LOOKS)) for share in shares]  # of each look

    def draw_all() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        splits = [[] for _ in shares]
        for look in tqdm(LOOKS, "drawing leaves", leave=False, disable=None):
            for split, number, source in zip(splits, counts, sources, strict=True):
                sizes = [min(250, number - start) for start in range(0, number, 250)]
                split += [draw(look, n, image_size, source, generator) for n in sizes]
        return tuple(torch.cat(split) for split in splits)

    drawn = cached(folder, "leaves", (image_size, count, seed), draw_all)
    looks = torch.arange(len(LOOKS))
    splits = [Examples(x, looks.repeat_interleave(n)) for x, n in zip(drawn, counts, strict=True)]
    total = len(LOOKS) * sum(counts)
    numbers = {"pictures": total, "groups": total}
    return Data("leaves", tuple(LOOKS), *splits, numbers, f"data: {total} drawn leaves")


class Sheet(NamedTuple):
    """Where the pixels of N pictures lie on their leaves: u, v (N, 1, S, S), in leaf radii."""

    u: Tensor
    v: Tensor
    generator: torch.Generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def each(self, low: float, high: float, channels: int = 1) -> Tensor:
        """(N, channels, 1, 1)"""
        return self.uniform(low, high, len(self.u), channels, 1, 1)

    def noise(self, cells: int) -> Tensor:
        """(N, 1, S, S) of about -1 to 1, smooth over S / cells pixels."""
        grid = self.uniform(-1, 1, len(self.u), 1, cells, cells)
        return F.interpolate(grid, self.u.shape[2:], mode="bicubic", align_corners=False)

    def places(self, number: int, reach: float) -> list[tuple[Tensor, Tensor]]:
        """Points (N, 1, 1, 1) each, uniform over a disc."""
        far = [reach * self.each(0, 1).sqrt() for _ in range(number)]
        turns = [self.each(0, 2 * math.pi) for _ in range(number)]
        return [(r * turn.cos(), r * turn.sin()) for r, turn in zip(far, turns, strict=True)]

    def spots(
        self, places: list, least: int, radius: tuple[float, float], corners: int = 0
    ) -> Tensor:
        """Distance (N, 1, S, S) from the nearest spot, in radii of that spot.

        A picture has spots at `least` or more of the places: discs, or polygons of `corners`.
        """
        number = self.each(least, len(places) + 1).floor()
        best = torch.full_like(self.u, 99.0)
        for place, (a, b) in enumerate(places):
            right, down = self.u - a, self.v - b
            away = torch.hypot(right, down)
            if corners:
                step, start = 2 * math.pi / corners, self.each(0, 2 * math.pi)
                turns = [start + side * step + self.each(-0.4, 0.4) for side in range(corners)]
                sides = [turn.cos() * right + turn.sin() * down for turn in turns]
                away = torch.stack(sides).amax(0)
            away = away / self.each(*radius)
            best = torch.where(place < number, torch.minimum(best, away), best)
        return best

    def edge(self, distance: Tensor, limit: float = 1.0, soft: float = 0.3) -> Tensor:
        """1 where `distance` is below `limit`, 0 where it is above, with a soft edge."""
        return ((limit - distance) / soft + 0.5).clamp(0, 1)


def draw(look: str, count: int, size: int, photos: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (count, 3, size, size) uint8 of leaves with one look."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    u, v = (axis.expand(count, 1, size, size) for axis in (line, line[:, None]))
    flat = Sheet(u, v, generator)
    picture = crop_photos(photos, flat)
    below = pose(flat)  # half of the time another leaf, a healthy one, lies below
    there = below.edge(outline(below), soft=0.06) * (flat.each(0, 1) < 0.5)
    picture = lerp(picture, blade(below), there)
    sheet = pose(flat)
    shape = outline(sheet)
    leaf, opacity = LOOKS[look](sheet, blade(sheet), sheet.edge(shape, soft=0.06))
    picture = picture * (1 - 0.4 * sheet.edge(shape, 1.1, 0.3))  # its shadow
    return develop(flat, lerp(picture, leaf, opacity))


def colour(*rgb: float) -> Tensor:
    return torch.tensor(rgb)[:, None, None]


def crop_photos(photos: Tensor, flat: Sheet) -> Tensor:
    """Random crops (N, 3, S, S) of photos (P, 3, h, w), mirrored half of the time."""
    count, size = len(flat.u), flat.u.shape[2]
    half = size * flat.each(0.5, 1.5) / photos.shape[2]  # of a crop, in half heights of a photo
    stretch = photos.shape[2] / photos.shape[3]
    a, b = (flat.each(-1, 1) * (1 - half * wide).clamp(min=0) for wide in (stretch, 1))
    right = flat.u * flat.each(-1, 1).sign()
    points = torch.stack((a + right * half * stretch, b + flat.v * half), -1)[:, 0]
    tall = points.reshape(1, -1, size, 2)  # one tall picture: the photos are not repeated
    crops = F.grid_sample(
        photos.flatten(0, 1)[None], tall, padding_mode="border", align_corners=False
    )
    crops = crops.view(len(photos), 3, count, size, size)
    which = flat.uniform(0, len(photos), count).long()
    return crops[which, :, torch.arange(count)]


def pose(flat: Sheet) -> Sheet:
    """The leaf's coordinates: turned, shifted, foreshortened; its radius 0.6 to 0.9 half sides."""
    turn, scale, squeeze = flat.each(0, 2 * math.pi), flat.each(0.6, 0.9), flat.each(0.7, 1)
    right, down = flat.u + flat.each(-0.2, 0.2), flat.v + flat.each(-0.2, 0.2)
    u = turn.cos() * right - turn.sin() * down
    v = turn.sin() * right + turn.cos() * down
    lean = flat.each(-0.3, 0.3)
    return flat._replace(u=(u + lean * v) / (scale * squeeze), v=v / scale)


def outline(sheet: Sheet) -> Tensor:
    """Distance from the leaf's middle, 1 at its lobed edge."""
    radius, around = torch.hypot(sheet.u, sheet.v), torch.atan2(sheet.v, sheet.u)
    edge = 1.0
    for lobes, most in ((1, 0.08), (2, 0.1), (3, 0.15), (5, 0.15), (8, 0.04)):
        edge = edge + sheet.each(0, most) * (lobes * around + sheet.each(0, 2 * math.pi)).cos()
    return radius / edge


def blade(sheet: Sheet) -> Tensor:
    """A clean leaf (N, 3, S, S): green, veined, mottled, lit from a side."""
    green = torch.cat((sheet.each(0.1, 0.42), sheet.each(0.34, 0.62), sheet.each(0.06, 0.28)), 1)
    veins = torch.zeros_like(sheet.u)
    for turn in (-1.1, -0.55, 0.0, 0.55, 1.1):  # from the stalk, palmately
        turn = turn + sheet.each(-0.12, 0.12)
        right, down = sheet.u + 0.7, sheet.v
        off, ahead = turn.sin() * right - turn.cos() * down, turn.cos() * right + turn.sin() * down
        veins = torch.maximum(veins, sheet.edge(off.abs(), 0.03, 0.05) * (ahead > 0))
    light = 1 + sheet.each(-0.3, 0.3) * sheet.u + sheet.each(-0.3, 0.3) * sheet.v
    mottled = green * (1 + 0.15 * sheet.noise(5) + 0.12 * sheet.noise(16))
    return (mottled + veins * sheet.each(-0.08, 0.18)) * light


def powdery_mildew(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """White, powdery patches without a clear edge."""
    away = sheet.spots(sheet.places(7, 0.75), 2, (0.15, 0.4)) + 0.4 * sheet.noise(10)
    powder = sheet.edge(away, 0.8, 0.8) * (0.75 + 0.35 * sheet.noise(24)).clamp(0, 1)
    return lerp(leaf, colour(0.9, 0.91, 0.87), powder * sheet.each(0.45, 0.95)), opacity


def aphids(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Two to four clusters of small insects, all dark or all pale."""
    places = []
    for a, b in sheet.places(4, 0.65):
        near = sheet.places(9, 0.25)
        places += [(a + right, b + down) for right, down in near]
    insects = sheet.edge(sheet.spots(places, 18, (0.035, 0.06)), soft=0.6)
    dark = sheet.each(0, 1) < 0.5
    skin = torch.where(dark, colour(0.1, 0.1, 0.06), colour(0.82, 0.85, 0.5))
    return lerp(leaf, skin, insects), opacity


def army_worm(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Ragged holes, some at the edge, with a thin brown rim."""
    away = sheet.spots(sheet.places(8, 0.95), 3, (0.1, 0.26)) + 0.3 * sheet.noise(14)
    leaf = lerp(leaf, colour(0.36, 0.25, 0.1), sheet.edge(away, 1.2) * sheet.each(0.2, 0.9))
    return leaf, opacity * (1 - sheet.edge(away, soft=0.2))


def bacterial_blight(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Angular brown lesions, in a yellow halo."""
    away = sheet.spots(sheet.places(12, 0.8), 5, (0.05, 0.13), corners=4)
    leaf = lerp(leaf, colour(0.75, 0.7, 0.2), sheet.edge(away, 1.5, 0.8) * sheet.each(0.1, 0.6))
    return lerp(leaf, colour(0.27, 0.15, 0.07), sheet.edge(away) * sheet.each(0.65, 1)), opacity


def target_spot(sheet: Sheet, leaf: Tensor, opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Round lesions of rings within rings, pale and brown."""
    away = sheet.spots(sheet.places(5, 0.7), 2, (0.16, 0.32)) + 0.06 * sheet.noise(12)
    rings = 0.5 + 0.5 * (2 * math.pi * sheet.each(1.6, 2.6) * away).cos()
    brown = lerp(colour(0.33, 0.2, 0.1), colour(0.78, 0.67, 0.48), rings)
    return lerp(leaf, brown, sheet.edge(away, soft=0.2) * sheet.each(0.6, 1)), opacity


SICK = (powdery_mildew, aphids, army_worm, bacterial_blight, target_spot)
LOOKS = {"healthy": lambda _, *leaf: leaf} | {look.__name__: look for look in SICK}


def develop(flat: Sheet, picture: Tensor) -> Tensor:
    """uint8: specks and glare anywhere, as on any leaf; exposure, tint and grain of a camera."""
    specks = flat.edge(flat.spots(flat.places(7, 1.2), 0, (0.025, 0.05)), soft=0.6)
    picture = lerp(picture, flat.each(0.05, 0.85).expand(-1, 3, -1, -1), specks * 0.8)
    glare = flat.edge(flat.spots(flat.places(2, 0.9), 0, (0.2, 0.5)), 0.6, 1.2)
    picture = lerp(picture, torch.ones(1), glare * flat.each(0, 0.35))
    picture = (picture - 0.45) * flat.each(0.75, 1.2) + 0.45 + flat.each(-0.12, 0.12)
    grain = 0.02 * torch.randn(picture.shape, generator=flat.generator)
    picture = picture * flat.each(0.9, 1.1, 3) + grain
    return (picture.clamp(0, 1) * 255).round().byte()


# --- photographs ------------------------------------------------------------------------------


def load_folder(folder: Path, image_size: int, same_bits: int, seed: int) -> Data:
    """CLASS/* split by groups of near-duplicates, or {train,val,test}/CLASS/* (val may be missing).

    Of folders that fix the splits, pictures of which test (or val) has a near-duplicate are left
    out of the others. Raises DataError that names the folder at fault.
    """
    fixed = (folder / "train").is_dir() and (folder / "test").is_dir()
    roots = {s: folder / s for s in SPLITS if (folder / s).is_dir()} if fixed else {"": folder}
    names = subfolders(roots["train"] if fixed else folder)
    if len(names) < 2:
        raise DataError(f"{folder}: expected a folder for each of at least 2 classes")
    for root in roots.values():
        if subfolders(root) != names:
            raise DataError(f"{root}: expected the folders {', '.join(names)} and no others")
    items = [
        (path, split, label)
        for split, root in roots.items()
        for label, name in enumerate(names)
        for path in pictures(root / name)
    ]
    key = [(str(path), path.stat().st_mtime, image_size) for path, *_ in items]
    x, good, bad = cached(folder, "decoded", key, lambda: decode(items, image_size))
    items = [items[number] for number in good]
    y = torch.tensor([label for *_, label in items], dtype=torch.long)
    groups = near_duplicates(x, [path.stem for path, *_ in items], same_bits)
    if fixed:
        parts, left_out = keep_apart([split for _, split, _ in items], groups)
        if not len(parts["val"]):
            cut = split_by_group(y[parts["train"]], groups[parts["train"]], (0.8, 0.2), seed)
            parts["val"], parts["train"] = (parts["train"][part] for part in (cut[1], cut[0]))
    else:
        parts = dict(zip(SPLITS, split_by_group(y, groups, (0.6, 0.2, 0.2), seed), strict=True))
        left_out = 0
    for split, part in parts.items():
        for label in set(range(len(names))) - set(y[part].tolist()):
            raise DataError(f"{folder / names[label]}: too few pictures: none for '{split}'")
    name, count = folder.resolve().name, int(groups.max()) + 1
    note = f"data: {name}; {len(items)} pictures in {count} groups of near-duplicates"
    note += f"; {left_out} left out, as a held-out picture resembles them" if left_out else ""
    note += f"; {len(bad)} unreadable files left out, the first: {bad[0]}" if bad else ""
    numbers = {"pictures": len(items), "groups": count}
    numbers |= {"left_out": left_out, "unreadable": len(bad)}
    splits = (Examples(x[parts[split]], y[parts[split]]) for split in SPLITS)
    return Data(name, tuple(names), *splits, numbers, note)


def subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def pictures(folder: Path) -> list[Path]:
    """Raises DataError if there are none."""
    suffixes = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    if not found:
        raise DataError(f"{folder}: there are no pictures")
    return found


def decode(items: list[tuple], size: int) -> tuple[Tensor, list[int], list[str]]:
    """uint8 images (N, 3, S, S), the numbers of the items they are, and the unreadable files."""
    images, good, bad = [], [], []
    for number, (path, *_) in enumerate(tqdm(items, "decoding", leave=False, disable=None)):
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow's broken PNG is a SyntaxError
            bad.append(f"{path.name} ({error})")
            continue
        pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        good.append(number)
    if not images:
        raise DataError(f"{bad[0]}: neither this nor any other picture could be read")
    return torch.stack(images), good, bad


def difference_hash(x: Tensor) -> Tensor:
    """(8, N, 128) of -1 and 1: whether a picture gets lighter rightwards and downwards, in 8 x 8
    places, for each of its 8 rotations by right angles and mirror images.
    """
    grey = F.interpolate(x.float().mean(1, keepdim=True), (9, 9), mode="area")[:, 0]
    turned = [torch.rot90(grey, turn, (1, 2)) for turn in range(4)]
    turned = torch.stack(turned + [image.flip(2) for image in turned])
    right = turned[..., :8, 1:] > turned[..., :8, :8]
    down = turned[..., 1:, :8] > turned[..., :8, :8]
    return torch.cat((right.flatten(2), down.flatten(2)), 2).float() * 2 - 1


def near_duplicates(x: Tensor, names: list[str], same_bits: int) -> Tensor:
    """The group (N,) of each picture: linked if their hashes differ in at most `same_bits` of 128,
    in any of 8 orientations, or if one is named as the other with an ending (leaf_1, leaf_1_crop).
    """
    from scipy.sparse import coo_matrix  # imported where it is used: it is slow
    from scipy.sparse.csgraph import connected_components

    hashes = difference_hash(x)
    links = []
    for start in range(0, len(x), 1024):
        block = hashes[0, start : start + 1024]
        differing = (128 - torch.stack([block @ turned.T for turned in hashes]).amax(0)) / 2
        links.append((differing <= same_bits).nonzero() + torch.tensor([start, 0]))
    first = {}
    for number, name in enumerate(names):
        first.setdefault(name, number)
    for number, name in enumerate(names):
        ends = [match.start() for match in re.finditer(r"[^A-Za-z0-9]", name)]
        stems = [first[name[:end]] for end in ends if name[:end] in first]
        links.append(torch.tensor([[number, stem] for stem in stems]).reshape(-1, 2).long())
    rows, columns = torch.cat(links).T.numpy()
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), (len(x), len(x)))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


def split_by_group(y: Tensor, groups: Tensor, shares: tuple[float, ...], seed: int) -> list[Tensor]:
    """Numbers of the pictures of each split; whole groups, in `shares` of every class."""
    generator = torch.Generator().manual_seed(seed)
    members = [(groups == group).nonzero()[:, 0].tolist() for group in groups.unique()]
    members = [members[place] for place in torch.randperm(len(members), generator=generator)]
    chosen = [[] for _ in shares]
    for label in y.unique().tolist():
        mine = [group for group in members if y[group[0]] == label]
        wanted = torch.tensor(shares) * sum(map(len, mine))
        for part in mine:
            split = int(wanted.argmax())
            chosen[split] += part
            wanted[split] -= len(part)
    return [torch.tensor(sorted(part), dtype=torch.long) for part in chosen]


def keep_apart(splits: list[str], groups: Tensor) -> tuple[dict[str, Tensor], int]:
    """Numbers of the pictures of each given split, and how many are left out, so that no group is
    in two splits: it stays in test, else in val.
    """
    parts, taken, left_out = {}, set(), 0
    for split in reversed(SPLITS):
        mine = [number for number, name in enumerate(splits) if name == split]
        kept = [number for number in mine if int(groups[number]) not in taken]
        taken |= {int(groups[number]) for number in kept}
        left_out += len(mine) - len(kept)
        parts[split] = torch.tensor(kept, dtype=torch.long)
    return parts, left_out


# --- batches ----------------------------------------------------------------------------------


def batches(examples: Examples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Float images (B, 3, S, S) in [0, 1] and their classes, in order, as they are."""
    for x, y in zip(examples.x.split(batch_size), examples.y.split(batch_size), strict=True):
        yield x.float() / 255, y
