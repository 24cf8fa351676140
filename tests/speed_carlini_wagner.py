"""carlini_wagner's attacks and those of adversarial-library and foolbox, on one network.

`pip install adversarial-library foolbox`, then for instance (the .pt2 file is the README's)
`python tests/speed_carlini_wagner.py efficientnet-lite0.pt2 FOLDER --attacks fast,ddn,fmn`.
All pictures to the next class. "As PNG" is after rounding to 8 bits; a pass is one of one picture.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from carlini_wagner.data import describe_network, load_photographs
from carlini_wagner.model import (
    SCORES,
    Goal,
    alternating,
    build_network,
    carlini_wagner,
    decoupled,
    distance,
    look,
    round_off,
    to_8bit,
)

OURS = {"fast": decoupled, "logits": carlini_wagner, "probability": alternating}


class Counting(nn.Module):
    """A network that counts the pictures it is shown."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.shown = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.shown += len(x)
        return self.network(x)


def ours(name: str, options: dict, kappa: float, network, x, target):
    """The picture found, and the rounded one."""
    goal = Goal(target, kappa, True, SCORES[name])
    found = OURS[name](network, x, goal, **options).x
    steps = 110 if name == "probability" else 60
    return found, round_off(network, x, goal, found, steps=steps).x


def library(name: str, rounds: int, steps: int, network, x, target):
    """An opponent's picture, and the nearest of 8 bits."""
    if name == "foolbox":
        import foolbox

        attack = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=rounds, steps=steps)
        aim = foolbox.criteria.TargetedMisclassification(target)
        bounded = foolbox.PyTorchModel(network, bounds=(0, 1), device=x.device)
        found = attack(bounded, x, aim, epsilons=None)[1]
    else:
        from adv_lib import attacks

        found = {
            "ddn": partial(attacks.ddn, steps=100),
            "ddn-unrounded": partial(attacks.ddn, steps=100, levels=None),
            "fmn": partial(attacks.fmn, norm=2, steps=100),
            "cw": partial(
                attacks.carlini_wagner_l2, binary_search_steps=rounds, max_iterations=steps
            ),
        }[name](network, x, target, targeted=True)
    return found, to_8bit(found)


def summary(network: nn.Module, x: Tensor, x0: Tensor, goal: Goal) -> str:
    """Success, mean and median L2, and the least margin of the successes."""
    margins = goal.margin(look(network, x)[0])
    won = margins >= goal.kappa
    l2 = distance(x, x0)[won]
    if not len(l2):
        return "0.00 | | | "
    numbers = (l2.mean(), l2.median(), margins[won].min())
    return f"{won.double().mean():.2f} | " + " | ".join(f"{number:.4f}" for number in numbers)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--attacks", default="fast,ddn,ddn-unrounded,fmn")
    parser.add_argument("--count", type=int, default=21)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--mean", type=float, nargs=3, default=[0.498] * 3)
    parser.add_argument("--std", type=float, nargs=3, default=[0.502] * 3)
    parser.add_argument("--rounds", type=int, default=9, help="of cw and foolbox")
    parser.add_argument("--steps", type=int, default=1000, help="of cw and foolbox, in a round")
    parser.add_argument("--logits_steps", type=int, default=200)
    parser.add_argument("--kappa", type=float, default=0.0, help="of ours")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    description = describe_network(given.network, "", Path())
    network = build_network(description | {"mean": given.mean, "std": given.std})
    sources = {"data_dir": Path(), "size": given.size, "count": given.count}
    x = load_photographs(tuple(given.pictures), **sources).x.float() / 255
    logits, _ = look(network, x)
    target = (logits.argmax(1) + 1) % logits.shape[1]
    options = {
        "fast": {"steps": 40},
        "logits": {"rounds": 6, "steps": given.logits_steps, "lr": 1.0},
        "probability": {"steps": 40},
    }
    columns = "success | mean L2 | median | least margin"
    print(f"| {len(x)} pictures | {columns} | as PNG: {columns} | passes | seconds |")
    print("|" + "---|" * 11)
    for name in given.attacks.split(","):
        run = partial(library, name, given.rounds, given.steps)
        if name in OURS:
            run = partial(ours, name, options[name], given.kappa)
        counting, began = Counting(network), time.perf_counter()
        found, png = run(counting, x, target)
        seconds = time.perf_counter() - began
        goal = Goal(target, given.kappa if name in OURS else 0.0)
        cells = (summary(network, pictures.detach(), x, goal) for pictures in (found, png))
        cost = f"{counting.shown / len(x):.0f} | {seconds:.0f}"
        print(f"| {name} | {' | '.join(cells)} | {cost} |", flush=True)


if __name__ == "__main__":
    main()
