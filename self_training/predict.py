"""The class of each picture and its probability, by the network that a run of train.py kept.

    python self_training/predict.py RUN PICTURE_OR_FOLDER...

writes predictions.csv, a row for each picture, and predictions.png, the surest and least sure ones.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

from run import run_main, start_predict, try_plot

import torch
from torch import Tensor, nn

from data import DataError, batches, in_channels, left_out, picture_batches
from model import SmallCNN, calibrated_probs
from plots import plot_predictions

SHOWN = 8  # pictures of each kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time (64)")
    given, saved, folder, device = start_predict(parser)
    model, bad, counts, shown = load_kept(saved, device), [], Counter(), []
    size, classes = tuple(saved["image_size"]), saved["classes"]
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "class", "probability"))
        for names, x in picture_batches(given.inputs, size, max(1, given.batch_size), bad):
            probability, label = predict_classes(model, x, saved, device)
            rows = [
                (name, classes[number], sure)
                for name, number, sure in zip(
                    names, label.tolist(), probability.tolist(), strict=True
                )
            ]
            writer.writerows((name, label, f"{sure:.6f}") for name, label, sure in rows)
            counts.update(label for _, label, _ in rows)
            extremes = surest_and_least(shown + list(zip(rows, x, strict=True)))
            shown = [(row, picture.clone()) for row, picture in extremes]  # not the whole batch
    show_results(saved, folder, counts, shown, bad)


def load_kept(saved: dict, device: torch.device) -> nn.Module:
    """The network of a run's model.pt."""
    size = {"channels": saved["channels"], "width": saved["width"]}
    model = SmallCNN(**size, classes=len(saved["classes"]))
    model.load_state_dict(saved["weights"])
    return model.to(device).eval()


@torch.no_grad()
def predict_classes(
    model: nn.Module, x: Tensor, saved: dict, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Probability and number (N,) of the likeliest class of uint8 pictures (N, 3, H, W)."""
    x = in_channels(x, saved["channels"]).to(device)
    logits = torch.cat([model(part) for part in batches(x)])
    return calibrated_probs(logits, saved["temperature"]).max(1)


def surest_and_least(items: list[tuple[tuple, Tensor]]) -> list[tuple[tuple, Tensor]]:
    """The surest and the least sure, so that no more than these stay in memory."""
    items = sorted(items, key=lambda item: -item[0][2])
    return items if len(items) <= 2 * SHOWN else items[:SHOWN] + items[-SHOWN:]


def show_results(saved: dict, folder: Path, counts: Counter, shown: list, bad: list[str]) -> None:
    """The picture, how many of each class, what could not be read, the folder."""
    if not counts:
        raise DataError(f"no picture could be read, the first: {bad[0]}")
    try_plot(plot_predictions, shown, folder / "predictions.png")
    for name, count in counts.most_common(20):
        print(f"{name:>32}  {count}")
    how = "calibrated on validation" if saved["calibrated"] else "not calibrated: no validation"
    print(f"pictures: {sum(counts.values())}; probabilities {how}{left_out(bad)}")
    print(folder)


if __name__ == "__main__":
    run_main(main, DataError)
