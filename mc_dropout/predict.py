"""Class, probability and uncertainty of your own pictures, by a network that train.py left.

    python mc_dropout/predict.py RUN PICTURE_OR_FOLDER...

Writes predictions.csv, a row per picture, and the most and the least certain ones as a picture.
Mutual information is what the passes disagree about: high where the network has seen little.
"""

import argparse
import csv
from pathlib import Path

from run import run_main, start_predict, try_plot

import torch
from torch import Tensor, nn

from data import DataError, as_float, picture_batches
from model import average_probs, entropy, make_cnn, mc_logits, mutual_information
from plots import plot_extremes

COLUMNS = ("file", "class", "probability", "entropy", "mutual_information")
SHOWN = 8  # pictures of each kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    help_text = "invert pictures of dark ink on light paper: MNIST's digits are light on black"
    parser.add_argument("--invert", action="store_true", help=help_text)
    parser.add_argument("--batch_size", type=int, default=100, help="pictures at once (100)")
    given, saved, folder, device = start_predict(parser)
    network = load_cnn(saved).to(device)
    bad: list[str] = []
    extremes = {"most certain": [], "least certain": []}
    size = (saved["image_size"],) * 2
    count = 0
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for names, x in picture_batches(given.inputs, size, given.batch_size, bad):
            x = prepare(x, saved, given.invert)
            rows = predict(network, x.to(device), names, saved)
            table.writerows(rows)
            count += len(rows)
            keep_most_and_least(extremes, rows, x)
    report_extremes(extremes, count, bad, folder)


def load_cnn(saved: dict) -> nn.Sequential:
    network = make_cnn(
        channels=saved["channels"],
        classes=len(saved["classes"]),
        widths=tuple(saved["widths"]),
        hidden=saved["hidden"],
        dropout=saved["dropout"],
    )
    network.load_state_dict(saved["weights"])
    return network


def prepare(x: Tensor, saved: dict, invert: bool) -> Tensor:
    """uint8 images (N, C, H, W) as in training, from colour pictures (N, 3, H, W)."""
    if saved["channels"] == 1:
        x = x.float().mean(1, keepdim=True).round().byte()
    return 255 - x if invert else x


def predict(network: nn.Sequential, x: Tensor, names: list[str], saved: dict) -> list[tuple]:
    """A row of COLUMNS for each image; the mask of a pass depends on its place in the batch."""
    logits = mc_logits(network, as_float(x), passes=saved["passes"], seed=saved["seed"]).double()
    mean = average_probs(logits)[-1]
    probability, label = mean.exp().max(-1)
    measures = (probability, entropy(mean), mutual_information(logits.log_softmax(-1)))
    numbers = torch.stack(measures, 1).cpu().tolist()
    return [
        (name, saved["classes"][place], *(round(value, 6) for value in row))
        for name, place, row in zip(names, label.tolist(), numbers, strict=True)
    ]


def keep_most_and_least(extremes: dict[str, list], rows: list[tuple], x: Tensor) -> None:
    """Of each kind, the SHOWN pictures so far: no other stays in memory."""
    for kind, sign in (("most certain", 1), ("least certain", -1)):
        found = [*extremes[kind], *zip(rows, x.unbind(), strict=True)]
        extremes[kind] = sorted(found, key=lambda pair: sign * pair[0][3])[:SHOWN]


def report_extremes(extremes: dict[str, list], count: int, bad: list[str], folder: Path) -> None:
    """The picture, a short table, what could not be read, the folder."""
    if not count:
        raise DataError(f"no picture could be read, the first: {bad[0]}")
    shown = {
        kind: [(f"{row[1]} ({row[2]:.0%})", picture.clone()) for row, picture in found]
        for kind, found in extremes.items()
    }
    try_plot(plot_extremes, shown, folder / "certainty.png")
    print("  ".join(COLUMNS))
    for row, _ in extremes["least certain"]:
        print("  ".join(map(str, row)))
    print(f"pictures: {count}, the least certain above; unreadable: {len(bad)}")
    for line in bad[:5]:
        print(f"unreadable: {line}")
    print(folder)


if __name__ == "__main__":
    run_main(main, DataError)
