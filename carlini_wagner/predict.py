"""What a run's networks see in pictures, so that anybody can check an adversarial one.

    python carlini_wagner/predict.py RUN PICTURE_OR_FOLDER...
    python carlini_wagner/predict.py RUN adversarial/fast --original originals

Each network's class, its probability and its margin over the next class go to predictions.csv;
with --original, a picture or a folder with pictures of the same names, the distances, too.
"""

import argparse
import csv
from pathlib import Path

from run import run_main, start_predict, try_plot, user_path

from torch import Tensor, nn

from data import DataError, crop_centre, crops, open_picture
from model import build_network, distance, look, margin
from plots import plot_seen

BATCH = 32  # pictures in memory at a time
SHOWN = 6  # pictures on the terminal and in seen.png


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "what the pictures were before: one picture, or a folder with the same names"
    parser.add_argument("--original", metavar="PATH", type=user_path, help=text)
    given, saved, folder, device = start_predict(parser)
    networks = [build_network(description).to(device) for description in saved["networks"]]
    bad, rows, shown, count = [], [], [], 0
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        for names, x in crops(given.inputs, saved["image_size"], BATCH, bad):
            new = predict(networks, x.to(device).float() / 255, saved["classes"])
            new = [{"file": name} | row for name, row in zip(names, new, strict=True)]
            if given.original:
                new = [
                    row | how_far(given.original, row["file"], y)
                    for row, y in zip(new, x, strict=True)
                ]
            table = csv.DictWriter(file, list(new[0]))
            if not count:
                table.writeheader()
            table.writerows(new)
            rows += new[: SHOWN - len(rows)]
            shown += x[: SHOWN - len(shown)]
            count += len(new)
    if not count:
        raise DataError(f"no picture could be read, the first: {bad[0]}")
    print_seen(rows, shown, count, bad, folder)


def predict(networks: list[nn.Module], x: Tensor, classes: list[str]) -> list[dict]:
    """A row for each picture of (N, 3, H, W) in [0, 1]; `second_` begins a second network's."""
    rows = [{} for _ in x]
    for prefix, network in zip(("", "second_"), networks, strict=False):
        logits, probs = look(network, x)
        best = logits.argmax(1)
        leads = margin(logits, best)
        for number, row in enumerate(rows):
            row[f"{prefix}class"] = classes[best[number]]
            row[f"{prefix}probability"] = float(probs[number, best[number]])
            row[f"{prefix}margin"] = float(leads[number])
    return rows


def how_far(original: Path, name: str, x: Tensor) -> dict[str, float | None]:
    """L2 and L-infinity to the original of `name`, pixels in [0, 1]; None where there is none."""
    path = original / name if original.is_dir() else original
    if not path.is_file():
        return {"l2": None, "linf": None}
    x0 = crop_centre(open_picture(path), x.shape[-1]).float() / 255
    x = x.float() / 255
    return {"l2": float(distance(x[None], x0[None])), "linf": float((x - x0).abs().max())}


def print_seen(
    rows: list[dict], shown: list[Tensor], count: int, bad: list[str], folder: Path
) -> None:
    for row in rows:
        far = f"  L2 {row['l2']:.4f}" if row.get("l2") is not None else ""
        seen = f"{row['class']} {row['probability']:.3f}, margin {row['margin']:.3f}"
        print(f"{row['file']}: {seen}{far}")
    if count > len(rows):
        print(f"and {count - len(rows)} more")
    if bad:
        print(f"unreadable files left out: {len(bad)}, the first: {bad[0]}")
    try_plot(plot_seen, rows, shown, folder / "seen.png")
    print(folder)


if __name__ == "__main__":
    run_main(main, DataError)
