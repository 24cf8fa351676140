"""Reconstruct your own pictures with the autoencoder of a run, or make new ones.

python autoencoder/predict.py RUN PICTURE...        files and folders, squeezed to 32x32 pixels
python autoencoder/predict.py RUN --generate 36     new images, from the codes of each class
python autoencoder/predict.py RUN --interpolate A.png B.png
"""

import argparse
import csv
from pathlib import Path

from run import run_main, seed_everything, start_predict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import SIZE, DataError, open_picture, picture_batches, scaled, shrink
from model import Autoencoder, CodeNeighbours, Pca, decode_bytes, image_errors, path_between
from plots import plot_lines

BATCH = 256
SHOWN = 12  # pictures in a line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generate", metavar="N", type=int, default=0, help="how many new images")
    text = "two pictures, and those between them"
    parser.add_argument("--interpolate", metavar=("A", "B"), nargs=2, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the new images (0)")
    given, saved, folder, device = start_predict(parser)
    if not 0 <= given.generate <= 100_000:
        raise DataError(f"--generate: expected 0 to 100000, found {given.generate}")
    autoencoder, pca = load_autoencoder(saved, device)
    if given.generate:
        seed_everything(given.seed, "generate")
        write_new(autoencoder, saved, given.generate, folder)
    if given.interpolate:
        interpolate(autoencoder, saved, given.interpolate, folder)
    if given.inputs or not (given.generate or given.interpolate):
        reconstruct(autoencoder, pca, given.inputs, folder)
    print(folder)


def load_autoencoder(saved: dict, device: torch.device) -> tuple[Autoencoder, Pca]:
    weights = saved["weights"]
    autoencoder = Autoencoder(
        tuple(saved["widths"]), saved["code_size"], weights["encoder.mean"].cpu()
    )
    autoencoder.load_state_dict(weights)
    pca = Pca(saved["pca_mean"].to(device), saved["pca_components"].to(device))
    return autoencoder.to(device).eval(), pca


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, pca: Pca, inputs: list[str], folder: Path) -> None:
    """predictions.csv (a row per picture), codes.npy (a row each), reconstructions.png (the first).

    Raises DataError if no picture can be read.
    """
    bad: list[str] = []
    codes, lines, totals = [], {}, {"mse": 0.0, "pca_mse": 0.0}
    device = autoencoder.encoder.mean.device
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", *totals])
        for names, pictures in picture_batches(inputs, (SIZE, SIZE), BATCH, bad):
            x = scaled(pictures).to(device)
            outputs = {"mse": autoencoder(x), "pca_mse": pca(x)}
            errors = {name: image_errors(y, x).cpu() for name, y in outputs.items()}
            table.writerows(zip(names, *(own.tolist() for own in errors.values()), strict=True))
            totals = {name: totals[name] + float(own.sum()) for name, own in errors.items()}
            codes.append(autoencoder.encoder(x).cpu().numpy())
            lines = lines or first_line(x, *outputs.values())
    if not codes:
        raise DataError(f"no picture could be read, the first: {bad[0]}")
    for reason in bad:
        tqdm.write(f"left out: {reason}")
    codes = np.concatenate(codes)
    np.save(folder / "codes.npy", codes)
    title = "pictures as the networks see them, and what comes back"
    plot_lines(lines, title, folder / "reconstructions.png")
    print(f"pictures: {len(codes)}, left out: {len(bad)}; mean squared error, pixels in [0, 1]:")
    print(f"{'autoencoder':>16}  {totals['mse'] / len(codes):.5f}")
    print(f"{'PCA':>16}  {totals['pca_mse'] / len(codes):.5f}")


def first_line(x: Tensor, own: Tensor, pca: Tensor) -> dict[str, Tensor]:
    rows = {"picture": x, "autoencoder": own, "PCA": pca}
    return {name: part[:SHOWN].clamp(0, 1).cpu() for name, part in rows.items()}


def write_new(autoencoder: Autoencoder, saved: dict, count: int, folder: Path) -> None:
    """new/CLASS-NUMBER.png, the classes in turn, and new.png, a picture of the first."""
    known = CodeNeighbours(
        *(saved[name].to(autoencoder.encoder.mean.device) for name in ("codes", "code_classes"))
    )
    labels = known.y.unique().tolist()
    order = torch.randperm(len(known.y)).to(known.y.device)
    members = {label: order[known.y[order] == label] for label in labels}
    chosen = []
    for number in range(count):
        turn, place = divmod(number, len(labels))
        own = members[labels[place]]
        chosen.append(own[turn % len(own)])
    codes, y = known.codes[torch.stack(chosen)], known.y[torch.stack(chosen)]
    x = decode_bytes(autoencoder, known.vary(codes, y, 1.0)).cpu()
    (folder / "new").mkdir()
    for number, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        name = "".join(c if c.isalnum() else "_" for c in saved["classes"][label])
        path = folder / "new" / f"{number:05d}-{name}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    lines = {f"{n}": scaled(x[n : n + SHOWN]) for n in range(0, min(count, 8 * SHOWN), SHOWN)}
    plot_lines(lines, "new images, by number", folder / "new.png")
    print(f"new images: {count}, in {folder / 'new'}")


@torch.no_grad()
def interpolate(autoencoder: Autoencoder, saved: dict, ends: list[str], folder: Path) -> None:
    """interpolation.png: from one picture to another, straight and where codes are dense."""
    x = torch.stack([shrink(open_picture(Path(path)), (SIZE, SIZE)) for path in ends])
    codes = autoencoder.encoder(scaled(x).to(autoencoder.encoder.mean.device))
    share = torch.linspace(0, 1, SHOWN).to(codes)[:, None]
    ways = {
        "straight line": torch.lerp(codes[0], codes[1], share),
        "where codes\nare dense": path_between(saved["codes"].to(codes), codes, SHOWN),
    }
    lines = {way: scaled(decode_bytes(autoencoder, y)).cpu() for way, y in ways.items()}
    title = "from the first picture to the second through their codes"
    plot_lines(lines, title, folder / "interpolation.png")
    print(f"{SHOWN} images between {ends[0]} and {ends[1]} in {folder / 'interpolation.png'}")


if __name__ == "__main__":
    run_main(main, DataError)
