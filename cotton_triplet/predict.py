"""What a trained network predicts for your own pictures of leaves.

Class and probability, the place on the map, and the five nearest training pictures of each; the map
of the training pictures with the new ones on it.

Run it with `python cotton_triplet/predict.py RUN PICTURE...`; folders are searched for pictures.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from run import run_main, start_predict, try_plot

import numpy as np
import torch

from data import DataError, picture_batches, thumbnails
from model import TwoHeads, in_plane, make_trunk, nearest, trunk_width
from plots import plot_new_points, plot_retrieval

BATCH = 64  # pictures at a time in memory
SHOWN = 8  # pictures that are kept for retrieval.png and map.png
NEAREST = 5


class Prediction(NamedTuple):
    """Of one picture: class, probability, place (2,) on the map, nearest training pictures."""

    name: str
    label: int
    probability: float
    place: np.ndarray
    rows: list[int]
    distances: list[float]
    thumbnail: np.ndarray


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given, saved, folder, device = start_predict(parser, argv)
    model = load_network(saved, device)
    bad, places, labels, shown = [], [], [], []
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header())
        for found in predictions(model, saved, given.inputs, bad, device):
            table.writerow(table_row(found, saved))
            places.append(found.place)
            labels.append(found.label)
            if len(shown) < SHOWN:
                shown.append(found)
    if not shown:
        raise DataError(f"no picture could be read, the first: {bad[0]}")
    plot_pictures(np.stack(places), np.array(labels), shown, saved, folder)
    print_table(shown, labels, bad, saved)
    print(folder)


def load_network(saved: dict, device: torch.device) -> TwoHeads:
    """The network of model.pt, ready to predict."""
    program = saved["program"]
    program = None if program is None else program.numpy().tobytes()
    trunk = make_trunk(saved["resnet"], tuple(saved["widths"]), program=program)
    model = TwoHeads(
        trunk,
        trunk_width(trunk, saved["image_size"]),
        classes=len(saved["classes"]),
        embedding_size=saved["embedding_size"],
        pretrained=saved["pretrained"],
    )
    model.load_state_dict(saved["weights"])
    return model.to(device, memory_format=torch.channels_last).eval()


@torch.no_grad()
def predictions(
    model: TwoHeads, saved: dict, inputs: list[str], bad: list[str], device: torch.device
) -> Iterator[Prediction]:
    """One picture after another; adds to `bad` what cannot be read."""
    gallery = saved["gallery"]["embedding"].to(device)
    plane = in_plane(saved["gallery"]["embedding"])
    size = (saved["image_size"],) * 2
    for names, x in picture_batches(inputs, size, BATCH, bad):
        out = model(x.to(device).float() / 255)
        probability, label = out.logits.softmax(1).max(1)
        distances, rows = nearest(out.embedding, gallery, NEAREST)
        parts = (label.tolist(), probability.tolist(), plane(out.embedding), rows.tolist())
        small = thumbnails(x).permute(0, 2, 3, 1).numpy()
        yield from map(Prediction, names, *parts, distances.tolist(), small)


def header() -> list[str]:
    columns = ["file", "class", "probability", "map_1", "map_2"]
    for number in range(1, NEAREST + 1):
        columns += [f"nearest_{number}", f"nearest_{number}_class", f"nearest_{number}_distance"]
    return columns


def table_row(found: Prediction, saved: dict) -> list:
    classes, gallery = saved["classes"], saved["gallery"]
    row = [found.name, classes[found.label], found.probability, *found.place.tolist()]
    for place, distance in zip(found.rows, found.distances, strict=True):
        row += [gallery["names"][place], classes[int(gallery["y"][place])], distance]
    return row


def plot_pictures(
    places: np.ndarray, labels: np.ndarray, shown: list[Prediction], saved: dict, folder: Path
) -> None:
    gallery, classes = saved["gallery"], tuple(saved["classes"])
    y, images = gallery["y"].numpy(), gallery["thumbnails"]
    train = in_plane(gallery["embedding"])(gallery["embedding"])
    axis = "dimension" if saved["embedding_size"] == 2 else "component"
    pictures = [(found.place, found.thumbnail) for found in shown]
    path = folder / "map.png"
    try_plot(plot_new_points, train, y, places, labels, pictures, classes, axis, path)
    rows = [
        {
            "query": found.thumbnail,
            "label": None,
            "name": f"{Path(found.name).name[-20:]}\n{classes[found.label]}",
            "images": images[found.rows].permute(0, 2, 3, 1).numpy(),
            "labels": y[found.rows].tolist(),
            "distances": found.distances,
        }
        for found in shown
    ]
    try_plot(plot_retrieval, rows, classes, saved["dataset"], folder / "retrieval.png")


def print_table(shown: list[Prediction], labels: list[int], bad: list[str], saved: dict) -> None:
    """A short table; how many of each class; what could not be read."""
    classes, y = saved["classes"], saved["gallery"]["y"]
    for found in shown:
        near = classes[int(y[found.rows[0]])]
        name = classes[found.label]
        print(f"{found.probability:6.3f}  {name:<24}  nearest: {near:<24}  {found.name}")
    counts = np.bincount(labels, minlength=len(classes))
    parts = [f"{count} {name}" for name, count in zip(classes, counts, strict=True) if count]
    print(f"pictures: {len(labels)} ({', '.join(parts)})")
    if bad:
        print(f"unreadable files left out: {len(bad)}, the first: {bad[0]}")


if __name__ == "__main__":
    run_main(main, DataError)
