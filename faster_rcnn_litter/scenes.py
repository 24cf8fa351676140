"""Forest floors, drawn: ground, leaves, twigs and moss, litter with exact boxes, and confounders.

The ground's texture is cut from scikit-learn's two photographs. Boxes are those of the pixels that
can be seen of a piece, after leaves were laid over its edge and the picture's border cut it off.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from tqdm import tqdm

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
CANVAS = 112  # side of the square in pixels that a thing is drawn on before it is turned and shrunk
MATERIALS = {
    "cap": "metal",
    "can": "metal",
    "wrapper": "plastic",
    "bag": "plastic",
    "paper": "paper",
    "shard": "glass",
}
CONFOUNDERS = ("blossom", "berries", "mushroom", "puddle")
VIVID = np.array(
    [(205, 30, 40), (235, 190, 30), (30, 80, 190), (20, 140, 80), (235, 235, 235), (230, 110, 20),
     (190, 40, 140), (60, 170, 210), (180, 185, 190), (25, 25, 30)]
)  # fmt: skip


def draw_split(
    number: int, *, size: int, count: int, classes: tuple[str, ...], seed: int
) -> tuple[Tensor, list[dict], list[dict]]:
    """uint8 pictures (count, 3, size, size), their litter, their confounders: each a dict per
    picture of "boxes" float (K, 4) and "labels" long (K,), for confounders indices of CONFOUNDERS.

    Every fifth picture has no litter. Splits 0, 1, 2 have no leaf and no random number in common.
    Training has columns of the photographs of its own; validation and test, which have to be alike
    for a threshold to carry over, share theirs.
    """
    from sklearn.datasets import load_sample_images  # imported where it is used: it is slow

    if len(classes) > 1 and (unknown := set(MATERIALS.values()) - set(classes)):
        raise ValueError(f"classes: scenes have {min(unknown)}, too; name it, or one class for all")
    rng = np.random.default_rng([seed, number])
    columns = np.split(np.arange(640), [384])[min(number, 1)]
    photos = [Image.fromarray(p[:, columns]).convert("L") for p in load_sample_images().images]
    leaves = [leaf(rng) for _ in range(160)] + [twig(rng) for _ in range(30)]
    pictures, truth, confounders = [], [], []
    for place in tqdm(range(count), f"drawing split {number}", leave=False, disable=None):
        pixels, things = draw_scene(rng, photos, leaves, size, clean=place % 5 == 0)
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        litter = [(box, MATERIALS[kind]) for kind, box in things if kind in MATERIALS]
        labels = [classes.index(m) + 1 if len(classes) > 1 else 1 for _, m in litter]
        truth.append(as_target([box for box, _ in litter], labels))
        others = [(box, kind) for kind, box in things if kind in CONFOUNDERS]
        kinds = [CONFOUNDERS.index(kind) for _, kind in others]
        confounders.append(as_target([box for box, _ in others], kinds))
    return torch.stack(pictures), truth, confounders


def as_target(boxes: list, labels: list[int]) -> dict[str, Tensor]:
    """boxes float (K, 4), labels long (K,); K may be 0."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}


def draw_scene(
    rng: np.random.Generator, photos: list, leaves: list, size: int, *, clean: bool
) -> tuple[np.ndarray, list[tuple[str, list[int]]]]:
    """Pixels (size, size, 3), and kind and box of what can be seen of litter and confounders."""
    scene = ground(rng, photos, size)
    for _ in range(rng.integers(15, 60)):
        sprite = leaves[rng.integers(len(leaves))]
        scene.paste(sprite, tuple(rng.integers(-20, size, 2).tolist()), sprite)
    owner = np.zeros((size, size), np.int8)  # which thing a pixel shows
    kinds = [] if clean else list(rng.choice(list(MATERIALS), rng.integers(1, 5)))
    kinds += list(rng.choice(CONFOUNDERS, rng.integers(0, 4)))
    things = []
    for kind in rng.permutation(kinds):
        sprite = draw_thing(str(kind), rng, size)
        if put(scene, owner, sprite, rng):
            things.append(str(kind))
    cover(scene, owner, leaves, rng)
    boxes = []
    for number in range(1, len(things) + 1):
        rows, columns = (np.flatnonzero((owner == number).any(axis)) for axis in (1, 0))
        boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    return light(scene, rng), list(zip(things, boxes, strict=True))


def smooth(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """A field (size, size) of smooth noise in about [0, 1]."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


def ground(rng: np.random.Generator, photos: list, size: int) -> Image.Image:
    """A crop of a photograph as soil of two random browns, with moss in places."""
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(50, 125))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
    crop = photo.crop((left, top, left + side, top + side)).resize((size, size), BILINEAR)
    grey = np.asarray(ImageOps.equalize(crop), np.float32) / 255
    grey = (0.6 * grey + 0.4 * smooth(rng, 48, size))[..., None]
    dark = rng.uniform((25, 18, 10), (70, 50, 35)).astype(np.float32)
    span = rng.uniform(40, 110) * rng.uniform((0.9, 0.75, 0.5), (1.1, 1.0, 0.8)).astype(np.float32)
    green = rng.uniform((40, 60, 15), (90, 125, 40)).astype(np.float32)
    moss = np.clip(4 * (smooth(rng, 5, size) - rng.uniform(0.5, 1.0)), 0, 0.8)[..., None]
    soil = dark + span * grey
    return Image.fromarray((soil + moss * (green * (0.4 + grey) - soil)).clip(0, 255).astype("u1"))


def light(scene: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Shadow, sun flecks, brightness, tint, blur and noise of a photograph (H, W, 3) uint8."""
    if rng.random() < 0.4:
        scene = scene.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    size = scene.size[0]
    shadow = 1 - np.float32(rng.uniform(0, 0.6)) * smooth(rng, int(rng.integers(2, 9)), size)
    tint = rng.uniform(0.7, 1.25) * rng.uniform(0.92, 1.08, 3)
    noise = rng.integers(-128, 128, (size, size, 1), dtype=np.int8).astype(np.float32)
    noise *= np.float32(rng.uniform(0.02, 0.09))
    pixels = np.asarray(scene, np.float32) * shadow[..., None] * tint.astype(np.float32)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def put(
    scene: Image.Image, owner: np.ndarray, sprite: Image.Image, rng: np.random.Generator
) -> bool:
    """Lays a thing with its shadow where it hides none, under the next number in `owner`; False if
    no such place was found.
    """
    width, height = sprite.size
    for _ in range(8):
        left, top = (int(rng.integers(-n // 8, len(owner) - 7 * n // 8)) for n in sprite.size)
        solid, part = overlap(sprite, owner, left, top)
        if not owner[part].any() and solid.mean() > 0.2 and min(solid.shape) >= 8:
            break
    else:
        return False
    alpha = sprite.getchannel("A")
    offset = (left + max(1, width // 12), top + max(1, height // 10))
    scene.paste((12, 9, 6), offset, alpha.point(lambda value: value // 2))
    scene.paste(sprite, (left, top), sprite)
    owner[part][solid] = owner.max() + 1
    return True


def cover(scene: Image.Image, owner: np.ndarray, leaves: list, rng: np.random.Generator) -> None:
    """Lays up to six leaves over the edges of things, at least half of each of which stays seen."""
    whole = np.bincount(owner.ravel())
    for _ in range(rng.integers(0, 7) if owner.any() else 0):
        sprite = leaves[rng.integers(len(leaves))]
        row, column = rng.choice(np.argwhere(owner)).tolist()
        left, top = column - sprite.size[0] // 2, row - sprite.size[1] // 2
        solid, part = overlap(sprite, owner, left, top)
        covered = owner.copy()
        covered[part][solid] = 0
        seen = np.bincount(covered.ravel(), minlength=len(whole))
        if (2 * seen >= whole)[1:].all():
            scene.paste(sprite, (left, top), sprite)
            owner[:] = covered


def overlap(sprite: Image.Image, owner: np.ndarray, left: int, top: int) -> tuple:
    """Where the sprite is solid, and which part of the scene that is, cut at the scene's border."""
    width, height = sprite.size
    x, y = max(left, 0), max(top, 0)
    right, bottom = min(left + width, owner.shape[1]), min(top + height, owner.shape[0])
    solid = np.asarray(sprite)[y - top : bottom - top, x - left : right - left, 3] > 100
    return solid, np.s_[y:bottom, x:right]


# --- things on the ground ---------------------------------------------------------------------


def draw_thing(kind: str, rng: np.random.Generator, size: int) -> Image.Image:
    """RGBA, cut to what is visible; longer side 18 to 80 pixels in a scene of 224, puddles more."""
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    DRAW[kind](ImageDraw.Draw(canvas), rng)
    relief = {"puddle": 0.3, "bag": 0.7, "paper": 0.5, "wrapper": 0.6}.get(kind, 0.4)
    canvas = shade(canvas, rng, relief)
    canvas = canvas.rotate(float(rng.uniform(0, 360)) if kind != "puddle" else 0, BILINEAR)
    canvas = canvas.crop(canvas.getbbox())
    low, high = {"puddle": (40, 110), "berries": (18, 44), "cap": (18, 48)}.get(kind, (20, 80))
    side = low * (high / low) ** rng.random() * size / 224
    squash = rng.uniform(0.65, 1)  # the camera looks at the ground from a slant
    scale = side / max(canvas.size)
    width, height = canvas.size
    small = (max(6, round(width * scale)), max(6, round(height * scale * squash)))
    return canvas.resize(small, Image.Resampling.HAMMING)


def shade(sprite: Image.Image, rng: np.random.Generator, relief: float) -> Image.Image:
    """Folds: the colours times a smooth field of noise."""
    pixels = np.array(sprite)
    folds = 1 + relief * (smooth(rng, int(rng.integers(3, 9)), CANVAS) - 0.6)
    pixels[..., :3] = (pixels[..., :3] * folds[..., None]).clip(0, 255)
    return Image.fromarray(pixels)


def outline(rng: np.random.Generator, points: int, rough: float, aspect: float = 1.0) -> list:
    """Corners of a blob around the canvas's centre."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radius = 0.45 * (1 - rough * rng.random(points))
    across = 0.5 + radius * np.cos(angle)
    down = 0.5 + aspect * radius * np.sin(angle)
    return list(zip(CANVAS * across, CANVAS * down, strict=True))


def round_blob(rng: np.random.Generator, rough: float, aspect: float = 1.0) -> list:
    """As outline, but without corners."""
    angle = np.linspace(0, 2 * np.pi, 60)
    waves = sum(rng.uniform(-1, 1) * np.sin(k * angle + rng.uniform(0, 6)) / k for k in (2, 3, 4))
    radius = 0.4 * (1 + rough * waves).clip(0.4, 1.2)
    across = 0.5 + radius * np.cos(angle)
    down = 0.5 + aspect * radius * np.sin(angle)
    return list(zip(CANVAS * across, CANVAS * down, strict=True))


def vivid(rng: np.random.Generator) -> tuple[int, ...]:
    colour = VIVID[rng.integers(len(VIVID))] + rng.integers(-25, 26, 3)
    return tuple(colour.clip(0, 255).tolist())


def disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple) -> None:
    box = [CANVAS * value for value in (x - radius, y - radius, x + radius, y + radius)]
    pen.ellipse(box, fill=colour)


def cap(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    angle = np.linspace(0, 2 * np.pi, 126)
    radius = 0.43 + 0.03 * np.sign(np.sin(21 * angle))
    edge = np.stack((0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)), 1) * CANVAS
    colour = vivid(rng)
    pen.polygon([tuple(point) for point in edge], fill=(150, 150, 155, 255))
    disc(pen, 0.5, 0.5, 0.36, colour)
    if rng.random() < 0.6:
        disc(pen, 0.5, 0.5, rng.uniform(0.1, 0.25), vivid(rng))
    disc(pen, 0.38, 0.36, 0.07, tuple(min(255, value + 90) for value in colour))


def can(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    half = rng.uniform(0.2, 0.28)
    left, right = CANVAS * (0.5 - half), CANVAS * (0.5 + half)
    colour, band = vivid(rng), vivid(rng)
    pen.rounded_rectangle([left, 8, right, CANVAS - 8], 8, fill=colour)
    middle = CANVAS * rng.uniform(0.3, 0.7)
    pen.rectangle([left, middle - 10, right, middle + 10], fill=band)
    for x, add in ((0.25, 70), (0.32, 40), (0.8, -60)):  # the gleam of a cylinder
        at = left + x * (right - left)
        gleam = tuple(int(np.clip(value + add, 0, 255)) for value in colour)
        pen.rectangle([at, 12, at + 6, CANVAS - 12], fill=gleam)
    pen.ellipse([left, 3, right, 18], fill=(190, 192, 195))
    pen.ellipse([left + 8, 6, right - 8, 15], fill=(120, 122, 125))


def wrapper(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    half = rng.uniform(0.15, 0.3)
    top, bottom = CANVAS * (0.5 - half), CANVAS * (0.5 + half)
    teeth = np.linspace(top, bottom, 11)
    left = [(6 + 5 * (i % 2), y) for i, y in enumerate(teeth)]
    right = [(CANVAS - 6 - 5 * (i % 2), y) for i, y in enumerate(teeth)]
    pen.polygon(left + right[::-1], fill=vivid(rng))
    for _ in range(rng.integers(1, 4)):
        x = CANVAS * rng.uniform(0.15, 0.75)
        lean, width = rng.uniform(-15, 15), rng.uniform(5, 22)
        stripe = [(x, top), (x + width, top), (x + width + lean, bottom), (x + lean, bottom)]
        pen.polygon(stripe, fill=vivid(rng))


def paper(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    tone = int(rng.integers(195, 256))
    corners = outline(rng, int(rng.integers(5, 10)), 0.35)
    pen.polygon(corners, fill=(tone, tone, int(tone * rng.uniform(0.85, 1))))
    for _ in range(rng.integers(2, 6)):
        a, b = rng.choice(len(corners), 2, replace=False)
        dark = int(tone * rng.uniform(0.6, 0.85))
        pen.line([corners[a], (CANVAS / 2, CANVAS / 2), corners[b]], (dark, dark, dark), 2)


def shard(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    tints = [(40, 120, 60), (130, 80, 25), (190, 215, 215), (90, 150, 140)]
    colour = tints[rng.integers(len(tints))]
    corners = outline(rng, int(rng.integers(3, 6)), 0.5)
    pen.polygon(corners, fill=(*colour, int(rng.integers(150, 225))))
    pen.line([*corners, corners[0]], (*(min(255, value + 90) for value in colour), 255), 4)
    pen.line([corners[0], (CANVAS / 2, CANVAS / 2)], (245, 250, 250, 255), 4)


def bag(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    tints = [(235, 235, 240), (70, 110, 190), (30, 30, 35), (210, 60, 60), (120, 170, 90)]
    colour = tints[rng.integers(len(tints))]
    edge = round_blob(rng, 0.35)
    pen.polygon(edge, fill=(*colour, int(rng.integers(200, 256))))
    for _ in range(rng.integers(4, 9)):
        a, b = rng.integers(len(edge), size=2)
        fold = tuple(int(np.clip(value + rng.integers(-70, 71), 0, 255)) for value in colour)
        pen.line([edge[a], (CANVAS * rng.uniform(0.35, 0.65),) * 2, edge[b]], (*fold, 255), 2)


def blossom(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    tints = [(230, 120, 170), (245, 215, 60), (240, 240, 235), (140, 90, 200), (210, 40, 60)]
    colour, petals = tints[rng.integers(len(tints))], int(rng.integers(5, 9))
    for angle in np.arange(petals) * 2 * np.pi / petals:
        disc(pen, 0.5 + 0.27 * np.cos(angle), 0.5 + 0.27 * np.sin(angle), 0.75 / petals, colour)
    disc(pen, 0.5, 0.5, 0.13, (225, 180, 40))


def berries(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    tints = [(180, 20, 30), (40, 40, 90), (200, 70, 20)]
    colour = tints[rng.integers(len(tints))]
    for _ in range(rng.integers(3, 10)):
        x, y = rng.uniform(0.2, 0.8, 2)
        disc(pen, x, y, 0.13, colour)
        disc(pen, x - 0.04, y - 0.04, 0.03, (250, 230, 230))


def mushroom(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    tints = [(140, 90, 50), (190, 150, 100), (200, 40, 30), (225, 215, 195)]
    colour = tints[rng.integers(len(tints))]
    pen.rounded_rectangle([46, 50, 66, 106], 6, fill=(225, 215, 190))
    pen.pieslice([8, 12, 104, 96], 180, 360, fill=colour)
    if colour == (200, 40, 30):
        for _ in range(6):
            x, y = rng.uniform(0.25, 0.75), rng.uniform(0.2, 0.42)
            disc(pen, x, y, 0.035, (245, 240, 235))


def puddle(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    edge = round_blob(rng, 0.35, aspect=rng.uniform(0.4, 0.8))
    pen.polygon(edge, fill=(60, 58, 55, 235))
    sky = tuple((np.array((170, 190, 210)) * rng.uniform(0.6, 1.15)).clip(0, 255).astype(int))
    inner = [(56 + 0.75 * (x - 56), 56 + 0.6 * (y - 52)) for x, y in edge]
    pen.polygon(inner, fill=(*map(int, sky), 235))


DRAW = {
    "cap": cap, "can": can, "wrapper": wrapper, "paper": paper, "shard": shard, "bag": bag,
    "blossom": blossom, "berries": berries, "mushroom": mushroom, "puddle": puddle,
}  # fmt: skip


def leaf(rng: np.random.Generator) -> Image.Image:
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)
    tints = [(120, 75, 30), (160, 105, 45), (90, 60, 35), (175, 135, 60), (100, 110, 45)]
    colour = np.array(tints[rng.integers(len(tints))]) + rng.integers(-20, 21, 3)
    along = np.linspace(0, np.pi, 20)
    half = rng.uniform(0.12, 0.28) * np.sin(along) ** rng.uniform(0.6, 1.4)
    half = half * (1 + rng.uniform(0, 0.25) * np.sin(rng.integers(5, 12) * along))
    down = np.linspace(0.06, 0.94, 20)
    side = [(0.5 + sign * half, down) for sign in (-1, 1)]
    left, right = (list(zip(CANVAS * x, CANVAS * y, strict=True)) for x, y in side)
    pen.polygon(left + right[::-1], fill=tuple(colour.clip(0, 255).tolist()))
    dark = tuple((colour * 0.6).clip(0, 255).astype(int).tolist())
    pen.line([(CANVAS / 2, 4), (CANVAS / 2, CANVAS - 2)], dark, 2)
    return fallen(shade(canvas, rng, 0.7), rng, rng.uniform(14, 44))


def twig(rng: np.random.Generator) -> Image.Image:
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)
    tone = int(rng.integers(40, 110))
    bend = [(56 + rng.uniform(-8, 8), y) for y in np.linspace(2, 110, 5)]
    pen.line(bend, (tone, int(0.75 * tone), tone // 2), int(rng.integers(4, 9)))
    pen.line([bend[2], (56 + rng.uniform(-35, 35), 20)], (tone, int(0.75 * tone), tone // 2), 4)
    return fallen(canvas, rng, rng.uniform(30, 80))


def fallen(canvas: Image.Image, rng: np.random.Generator, side: float) -> Image.Image:
    canvas = canvas.rotate(float(rng.uniform(0, 360)), BILINEAR)
    canvas = canvas.crop(canvas.getbbox())
    scale = side / max(canvas.size)
    return canvas.resize(tuple(max(2, round(n * scale)) for n in canvas.size), BICUBIC)
