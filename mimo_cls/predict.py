"""Class, probability and uncertainty of your own pictures, by an ensemble that train.py left.

    python mimo_cls/predict.py RUN PICTURE_OR_FOLDER...

Writes predictions.csv, a row per picture, and the most and the least certain ones as a picture.
Mutual information is what the members disagree about.
"""

import argparse
import csv
from pathlib import Path

from run import run_main, start_predict, try_plot

import torch
from torch import Tensor

from data import DataError, picture_batches, testing_batches
from model import MimoWideResNet, ensemble_log_probs, entropy, mutual_information
from plots import plot_extremes

COLUMNS = ("file", "class", "probability", "entropy", "mutual_information")
SHOWN = 8  # pictures of each kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=250, help="pictures at once (250)")
    given, saved, folder, device = start_predict(parser)
    model = load_ensemble(saved).to(device)
    bad: list[str] = []
    extremes = {"most certain": [], "least certain": []}
    size = (saved["image_size"],) * 2
    count = 0
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for names, x in picture_batches(given.inputs, size, given.batch_size, bad):
            rows = predict(model, x.to(device), names, saved["classes"])
            table.writerows(rows)
            count += len(rows)
            keep_most_and_least(extremes, rows, x)
    report_extremes(extremes, count, bad, folder)


def load_ensemble(saved: dict) -> MimoWideResNet:
    classes = len(saved["classes"])
    model = MimoWideResNet(
        saved["depth"], saved["width"], members=saved["members"], classes=classes
    )
    model.load_state_dict(saved["weights"])
    return model.eval()


@torch.no_grad()
def predict(model: MimoWideResNet, x: Tensor, names: list[str], classes: list[str]) -> list[tuple]:
    """A row of COLUMNS for each of the uint8 images (N, 3, H, W)."""
    (inputs,) = testing_batches(x, len(x), model.members)
    log_probs = model(inputs).double().log_softmax(-1)
    mean = ensemble_log_probs(log_probs)
    probability, label = mean.exp().max(-1)
    measures = (probability, entropy(mean), mutual_information(log_probs.transpose(0, 1)))
    numbers = torch.stack(measures, 1).cpu().tolist()
    return [
        (name, classes[place], *(round(value, 6) for value in row))
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
