"""Loss and gradient of 512 embeddings of 128 dimensions, 8 classes, by each mining of
cotton_triplet/model.py and by pytorch-metric-learning (which has to be installed), in turn:

    python tests/speed_cotton_triplet.py [N] [ROUNDS]
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from pytorch_metric_learning import distances, losses, miners

from cotton_triplet.model import pair_distances, triplet_loss

MARGIN, CLASSES, WIDTH = 0.3, 8, 128


def ours(mining: str) -> Callable:
    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return triplet_loss(pair_distances(x, x), y, mining, MARGIN).loss

    return loss


def theirs(mining: str) -> Callable:
    distance = distances.LpDistance(normalize_embeddings=False)
    criterion = losses.TripletMarginLoss(margin=MARGIN, distance=distance)
    miner = {
        "hard": miners.BatchHardMiner(distance=distance),
        "semihard": miners.TripletMarginMiner(MARGIN, "semihard", distance=distance),
        "all": None,
    }[mining]
    return lambda x, y: criterion(x, y, miner(x, y) if miner else None)


def seconds(loss: Callable, x: torch.Tensor, y: torch.Tensor) -> float:
    x = x.clone().requires_grad_()
    began = time.perf_counter()
    loss(x, y).backward()
    return time.perf_counter() - began


def main() -> None:
    count, rounds = (int(text) for text in (sys.argv[1:] + ["512", "9"][len(sys.argv) - 1 :]))
    torch.manual_seed(0)
    x, y = torch.randn(count, WIDTH), torch.arange(count) % CLASSES
    pairs = {"hard": "hard", "semihard": "semihard", "all": "all", "gradual": "all"}
    for mining, other in pairs.items():
        both = [(seconds(ours(mining), x, y), seconds(theirs(other), x, y)) for _ in range(rounds)]
        own, their = (statistics.median(times) for times in zip(*both[1:], strict=True))
        ratio = statistics.median(a / b for a, b in both[1:])
        other = f"theirs ({other}) {1e3 * their:.1f} ms"
        print(f"{mining:>9} {1e3 * own:8.1f} ms, {other}, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
