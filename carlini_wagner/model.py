"""Targeted attacks: criteria, Carlini & Wagner's search, a fast one, and the networks attacked.

Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks" (arXiv 1608.04644),
section and equation numbers are theirs. The fast attack comes from Rony et al. 2019, "Decoupling
Direction and Norm" (arXiv 1811.09600). Every function works on a batch in which each picture has
its own target, its own c, its own best so far and its own end.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import mean, median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRETCH = 0.01  # tanh reaches this far beyond the pixels' range on either side
SLACK = 1e-4  # asked beyond kappa: sums in another order may change a margin's last digits
WINDOWS = 10  # a picture's progress is judged this often in one round of the search over c
PROGRESS = 1e-4  # the share by which its objective has to fall from window to window


# --- criteria ---------------------------------------------------------------------------------


def margin(scores: Tensor, target: Tensor) -> Tensor:
    """s_t - max_{j != t} s_j, (N,), of scores (N, classes): 0 or more where the target wins."""
    own = scores.gather(1, target[:, None])[:, 0]
    others = scores.scatter(1, target[:, None], -math.inf)
    return own - others.amax(1)


def criterion(scores: Tensor, target: Tensor, kappa: float) -> Tensor:
    """max(-kappa, max_{j != t} s_j - s_t), (N,): f_6 of section V.A with section VIII.D's kappa.

    On logits it is the paper's; on probabilities it is the project owner's.
    """
    return (-margin(scores, target)).clamp(min=-kappa)


def identity(logits: Tensor) -> Tensor:
    return logits


def probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(1)


SCORES = {"probability": probabilities, "logits": identity, "fast": identity}  # by attack


def distance(x: Tensor, x0: Tensor) -> Tensor:
    """L2 distance of each picture, (N,), of pixels in [0, 1]."""
    return (x - x0).flatten(1).norm(dim=1)


def distances(x: Tensor, x0: Tensor) -> dict:
    """Mean and median L2 and L-infinity, None of no pictures; pixels in [0, 1]."""
    l2 = distance(x, x0).tolist()
    linf = (x - x0).flatten(1).abs().amax(1).tolist() if len(x) else []
    return {
        f"{kind}_{name}": function(values) if values else None
        for name, values in (("l2", l2), ("linf", linf))
        for kind, function in (("mean", mean), ("median", median))
    }


# --- what a search found ----------------------------------------------------------------------


class Found(NamedTuple):
    """The best picture of each row, (N, 3, H, W) in [0, 1], and what it took.

    Where `success` is false, `x` is the closest try: the one of the largest margin.
    """

    x: Tensor
    success: Tensor  # (N,) bool
    c: Tensor  # (N,), with which `x` was found
    queries: Tensor  # (N,) int, each one forward and one backward pass
    trace: Tensor  # (queries, 4, N): criterion, margin, L2, and L2 of the best success; else nan


class Tracker:
    """Keeps the best of each row while a search goes on; a success has margin `asked` or more."""

    def __init__(self, x0: Tensor, kappa: float):
        self.x0, self.x, self.asked = x0, x0.clone(), kappa + SLACK
        self.success = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        self.margin = x0.new_full((len(x0),), -math.inf)
        self.l2 = x0.new_full((len(x0),), math.inf)  # of the best success
        self.c = x0.new_zeros(len(x0))
        self.trace = []

    def see(self, rows: Tensor, x: Tensor, margins: Tensor, c: Tensor) -> Tensor:
        """One query each of the pictures `rows` (R,), at `x` (R, 3, H, W): which of them succeeded.

        A success is kept if it is closer than the last; before the first one, a failure is kept
        if its margin is larger.
        """
        l2, success = distance(x, self.x0[rows]), margins >= self.asked
        larger = ~self.success[rows] & (margins > self.margin[rows])
        better = torch.where(success, l2 < self.l2[rows], larger)
        kept, closer = rows[better], rows[better & success]
        self.x[kept], self.margin[kept], self.c[kept] = x[better], margins[better], c[better]
        self.success[closer], self.l2[closer] = True, l2[better & success]
        line = self.x0.new_full((4, len(self.x0)), math.nan)
        best = torch.where(self.success, self.l2, math.nan)[rows]
        line[:, rows] = torch.stack(((-margins).clamp(min=-self.asked), margins, l2, best))
        self.trace.append(line)
        return success

    def found(self) -> Found:
        trace = torch.stack(self.trace)
        asked = ~trace[:, 0].isnan()  # (iterations, N): a picture is not queried in all of them
        order = (~asked).byte().argsort(dim=0, stable=True)[: int(asked.sum(0).max())]
        trace = trace.gather(0, order[:, None].expand(-1, 4, -1))
        return Found(self.x, self.success, self.c, asked.sum(0), trace)


def join(parts: list[Found]) -> Found:
    """One Found of several batches; shorter traces are filled up with nan."""
    longest = max(len(part.trace) for part in parts)
    traces = [
        F.pad(part.trace, (0, 0, 0, 0, 0, longest - len(part.trace)), value=math.nan)
        for part in parts
    ]
    names = ("x", "success", "c", "queries")
    fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Found(**fields, trace=torch.cat(traces, 2))


# --- Carlini & Wagner -------------------------------------------------------------------------


def to_w(x: Tensor) -> Tensor:
    """The w of which `to_x` makes the pixels `x` in [0, 1]; finite for 0 and 1, too."""
    return torch.atanh((2 * x - 1) * (1 - STRETCH))


def to_x(w: Tensor) -> Tensor:
    """Section V.B: x = (tanh(w) + 1) / 2, so that no gradient step leaves the pixels' range.

    Deviation: tanh is stretched, so that x is 0 or 1 at a finite w, where its slope is not 0;
    with the paper's, a saturated pixel has an infinite w and never moves.
    """
    return (torch.tanh(w) / (1 - STRETCH) + 1) / 2


def carlini_wagner(
    network: nn.Module,
    x0: Tensor,
    target: Tensor,
    *,
    scores: Callable[[Tensor], Tensor],
    kappa: float,
    c: float,
    rounds: int,
    steps: int,
    lr: float,
) -> Found:
    """Searches min |x - x0|^2 + c f(x) (section VI.A) for pictures (N, 3, H, W) in [0, 1].

    In each round every picture has its own c, ten times larger after a failure, halfway between
    the largest failed and the smallest successful one as soon as there is one. With one round, c
    is what was given.
    """
    best = Tracker(x0, kappa)
    c = x0.new_full((len(x0),), c)
    lower, upper = torch.zeros_like(c), torch.full_like(c, math.inf)
    for _ in range(rounds):
        won = minimise(network, target, best, c, scores=scores, steps=steps, lr=lr)
        upper = torch.where(won, torch.minimum(upper, c), upper)
        lower = torch.where(won, lower, torch.maximum(lower, c))
        c = torch.where(upper.isinf(), 10 * c, (lower + upper) / 2)
    return best.found()


def minimise(
    network: nn.Module,
    target: Tensor,
    best: Tracker,
    c: Tensor,
    *,
    scores: Callable[[Tensor], Tensor],
    steps: int,
    lr: float,
) -> Tensor:
    """One round: which pictures (N,) succeeded with their `c` (N,); `best` takes in all queries.

    Adam moves w. A picture leaves the batch when its own objective has stopped falling.
    Deviations: a round begins at the picture's best success so far, and the learning rate falls
    along a cosine: the constraint's kink is then met by ever smaller steps.
    """
    rows = torch.arange(len(c), device=c.device)
    won = torch.zeros_like(best.success)
    lowest, last = torch.full_like(c, math.inf), torch.full_like(c, math.inf)
    w = to_w(torch.where(best.success[:, None, None, None], best.x, best.x0))
    edge = float(to_w(torch.ones(())))  # beyond it pixels would leave [0, 1]
    first, second = torch.zeros_like(w), torch.zeros_like(w)  # moments, of Adam
    for step in range(steps):
        w = w.detach().requires_grad_()
        x = to_x(w)
        values = scores(network(x))
        away = (x - best.x0[rows]).square().sum((1, 2, 3))
        # the constant c kappa changes no gradient and makes the objective's least value 0
        objective = away + c[rows] * (criterion(values, target[rows], best.asked) + best.asked)
        (slope,) = torch.autograd.grad(objective.sum(), w)
        with torch.no_grad():
            won[rows] |= best.see(rows, x, margin(values, target[rows]), c[rows])
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            scale = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
            w = w - rate * first / (1 - 0.9 ** (step + 1)) / scale
            w = w.clamp(-edge, edge)
        lowest[rows] = torch.minimum(lowest[rows], objective.detach())
        if (step + 1) % math.ceil(steps / WINDOWS) == 0:
            falling = lowest[rows] < (1 - PROGRESS) * last[rows]
            last[rows] = lowest[rows]
            rows, w, first, second = (part[falling] for part in (rows, w, first, second))
            if not len(rows):
                break
    return won


# --- the fast attack, and the 8-bit picture ---------------------------------------------------


def to_8bit(x: Tensor) -> Tensor:
    """The nearest pictures that an 8-bit file can hold."""
    return (x * 255).round() / 255


def decoupled(
    network: nn.Module,
    x0: Tensor,
    target: Tensor,
    *,
    scores: Callable[[Tensor], Tensor],
    kappa: float,
    steps: int,
    start: Tensor | None = None,
    reach: float = 1.0,
) -> Found:
    """The nearest 8-bit picture over the boundary, its direction and its norm moved apart.

    Rony et al. 2019, algorithm 1: a step along the gradient turns the difference x - x0, whose
    norm is then made smaller after a success, larger after a failure; every query is at an 8-bit
    picture. Deviations: the step is a share of the norm (`reach` at first, along a cosine to a
    hundredth), the norm changes by 5% at first and by less as the steps shrink, and it never
    exceeds that of the best success, so that all late queries search below it. From `start` with
    a small `reach` it repairs what rounding has spoilt.
    """
    best = Tracker(x0, kappa)
    rows, none = torch.arange(len(x0), device=x0.device), x0.new_zeros(len(x0))
    x = to_8bit(x0 if start is None else start)
    norm = x0.new_ones(len(x0)) if start is None else distance(x, x0)
    for step in range(steps):
        x = x.detach().requires_grad_()
        margins = margin(scores(network(x)), target)
        (slope,) = torch.autograd.grad(margins.sum(), x)
        with torch.no_grad():
            success = best.see(rows, x.detach(), margins.detach(), none)
            share = 0.01 + (reach - 0.01) * (1 + math.cos(math.pi * step / steps)) / 2
            turned = x - x0 + stretch(slope, share * norm)
            change = 0.05 * math.sqrt(share)
            norm = torch.minimum(norm * torch.where(success, 1 - change, 1 + change), best.l2)
            x = to_8bit((x0 + stretch(turned, norm)).clamp(0, 1))
    return best.found()


def repair(
    network: nn.Module,
    x0: Tensor,
    target: Tensor,
    found: Found,
    *,
    scores: Callable[[Tensor], Tensor],
    kappa: float,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """What was `found` in 8 bits, and the queries (N,) of both; failures are only rounded."""
    x, queries = to_8bit(found.x), found.queries.clone()
    won = found.success.nonzero()[:, 0]
    if len(won):
        options = {"scores": scores, "kappa": kappa, "steps": steps, "reach": 0.1}
        result = decoupled(network, x0[won], target[won], start=found.x[won], **options)
        x[won] = result.x
        queries[won] += result.queries
    return x, queries


def stretch(d: Tensor, norm: Tensor) -> Tensor:
    """`d` (N, 3, H, W) with the L2 norms `norm` (N,); where it is 0 it stays so."""
    lengths = d.flatten(1).norm(dim=1).clamp(min=1e-12)
    return d * (norm / lengths)[:, None, None, None]


# --- networks ---------------------------------------------------------------------------------


class Block(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016); stride 2 where the width grows."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        stride = 1 if inputs == width else 2
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Identity()
        if stride == 2:
            self.skip = nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.skip(x))


class SmallResNet(nn.Module):
    """Class logits (N, classes) from images (N, 3, H, W) in [0, 1]."""

    def __init__(self, *, width: int, classes: int):
        super().__init__()
        widths = (width, width, 2 * width, 4 * width)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *(Block(*pair) for pair in pairwise(widths)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 0.5) / 0.25)


class Normalised(nn.Module):
    """A network for normalised pixels as one for pixels in [0, 1]: the box has to stay a box."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


def torchvision_network(
    name: str, state: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]
) -> nn.Module:
    """Class logits (N, classes) from images in [0, 1]; the last bias tells how many classes.

    Raises ValueError if the weights are not those of torchvision's network `name`.
    """
    from torchvision.models import get_model  # imported where it is used: it is slow

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    try:
        classes = len(list(state.values())[-1])
        network = get_model(name, weights=None, num_classes=classes, **options)
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    return Normalised(network, mean, std)


def frozen(network: nn.Module) -> nn.Module:
    """In eval mode and without gradients of the weights: an attack changes pictures only."""
    return network.eval().requires_grad_(False)


@torch.no_grad()
def look(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and probabilities (N, classes); FloatingPointError if one is not finite."""
    logits = torch.cat([network(part) for part in x.split(256)])
    if not logits.isfinite().all():
        raise FloatingPointError("the network's logits are not finite")
    return logits, logits.softmax(1)
