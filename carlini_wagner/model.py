"""Targeted and untargeted attacks, rounding to 8 bits, and the networks attacked.

Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks" (arXiv 1608.04644),
section and equation numbers are theirs. The fast attack follows Rony et al. 2019, "Decoupling
Direction and Norm" (arXiv 1811.09600). Every function works on a batch in which each picture has
its own target, its own c, its own best so far and its own end. No length is one of a network: all
are shares of the first-order distance |margin| / |slope|, or of the distance reached.
"""

import io
import math
import os
from collections.abc import Callable
from itertools import pairwise
from statistics import mean, median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRETCH = 0.01  # tanh reaches this far beyond the pixels' range on either side
SLACK = 3e-5  # asked beyond kappa, as a share of the scores' range: sums in another order differ
WINDOWS = 10  # a picture's progress is checked this often in one round of the search over c
PROGRESS = 1e-4  # the share by which its objective has to fall from window to window
LEVEL = 1 / 255  # of an 8-bit picture


# --- what is asked ----------------------------------------------------------------------------


def margin(scores: Tensor, target: Tensor) -> Tensor:
    """s_t - max_{j != t} s_j, (N,), of scores (N, classes): 0 or more where the target wins."""
    own = scores.gather(1, target[:, None])[:, 0]
    others = scores.scatter(1, target[:, None], -math.inf)
    return own - others.amax(1)


def identity(logits: Tensor) -> Tensor:
    return logits


def probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(1)


SCORES = {"probability": probabilities, "logits": identity, "fast": identity}  # by attack


class Goal(NamedTuple):
    """What a network has to see: class `label` (N,) leading by `kappa`; untargeted, any other one
    leading `label` by it.
    """

    label: Tensor
    kappa: float = 0.0
    targeted: bool = True
    scores: Callable[[Tensor], Tensor] = identity  # of logits: what the margin is a margin of

    def of(self, rows: Tensor) -> "Goal":
        return self._replace(label=self.label[rows])

    def margin(self, logits: Tensor) -> Tensor:
        """(N,), of logits (N, classes); kappa or more is a success.

        Its negative, held at -kappa, is f_6 of section V.A with section VIII.D's kappa; on
        probabilities it is the project owner's criterion.
        """
        margins = margin(self.scores(logits), self.label)
        return margins if self.targeted else -margins

    def slope(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, classes), margins (N,), and gradients of the logits' margins (N, 3, H, W).

        Near 0 and 1 probabilities have no slope. The margin of log-probabilities, which is that
        of the logits, has the sign of theirs, so its slope stands in for theirs.
        """
        x = x.detach().requires_grad_()
        logits = network(x)
        followed = self._replace(scores=identity).margin(logits)
        (slope,) = torch.autograd.grad(followed.sum(), x)
        return logits.detach(), self.margin(logits.detach()), slope


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

    def to(self, device: torch.device) -> "Found":
        return Found(*(part.to(device) for part in self))


class Tracker:
    """Keeps the best of each row while a search goes on; a success has margin `asked` or more.

    `logits` are those of `x0`: rounded sums change a margin by a share of their range.
    """

    def __init__(self, x0: Tensor, goal: Goal, logits: Tensor):
        scores = goal.scores(logits)
        self.x0, self.x = x0, x0.clone()
        self.rows = torch.arange(len(x0), device=x0.device)
        self.asked = goal.kappa + SLACK * (scores.amax(1) - scores.amin(1))
        self.success = torch.zeros_like(self.rows, dtype=torch.bool)
        self.margin = x0.new_full((len(x0),), -math.inf)
        self.l2 = x0.new_full((len(x0),), math.inf)  # of the best success
        self.c = x0.new_zeros(len(x0))
        self.trace = []

    def see(self, rows: Tensor, x: Tensor, margins: Tensor, c: Tensor) -> Tensor:
        """One query each of the pictures `rows` (R,), at `x` (R, 3, H, W): which of them succeeded.

        A success is kept if it is closer than the last; before the first one, a failure is kept
        if its margin is larger.
        """
        l2, success = distance(x, self.x0[rows]), margins >= self.asked[rows]
        larger = ~self.success[rows] & (margins > self.margin[rows])
        better = torch.where(success, l2 < self.l2[rows], larger)
        kept, closer = rows[better], rows[better & success]
        self.x[kept], self.margin[kept], self.c[kept] = x[better], margins[better], c[better]
        self.success[closer], self.l2[closer] = True, l2[better & success]
        line = self.x0.new_full((4, len(self.x0)), math.nan)
        best = torch.where(self.success, self.l2, math.nan)[rows]
        line[:, rows] = torch.stack(((-margins).maximum(-self.asked[rows]), margins, l2, best))
        self.trace.append(line)
        return success

    def near(self, logits: Tensor, goal: Goal, slope: Tensor, way: Tensor | None = None) -> Tensor:
        """First-order distance (N,) from where `logits` and `slope` were found, along the slope or
        `way` (N, 3, H, W): there, and a thousandth beyond, a linear network has the margin. At
        most the diagonal of the box.
        """
        asked = self.asked if goal.scores is identity else 0  # the slope is of logits in any case
        missing = asked - goal._replace(scores=identity).margin(logits)
        rise = slope.flatten(1).norm(dim=1)
        if way is not None:
            rise = (slope * way).flatten(1).sum(1) / way.flatten(1).norm(dim=1).clamp(min=1e-12)
        length = 1.001 * missing.abs() / rise.clamp(min=1e-12)
        return length.clamp(max=math.sqrt(slope[0].numel()))

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
    network: nn.Module, x0: Tensor, goal: Goal, *, rounds: int, steps: int, lr: float
) -> Found:
    """Searches min |x - x0|^2 + c f(x) (section VI.A) for pictures (N, 3, H, W) in [0, 1].

    In each round every picture has its own c. The first one, 2 D / |slope|, is the one that
    balances both parts' slopes at the first-order distance D. It is four times larger after a
    failure, four times smaller after a success, and between the largest failed and the smallest
    successful one as soon as there are both. `lr` is Adam's rate as a share of D / sqrt(pixels).
    """
    logits, margins, slope = goal.slope(network, x0)
    best = Tracker(x0, goal, logits)
    near = best.near(logits, goal, slope)
    c = 2 * near / slope.flatten(1).norm(dim=1).clamp(min=1e-12)
    best.see(best.rows, x0, margins, c)
    rate = lr * near / math.sqrt(x0[0].numel())
    lower, upper = torch.zeros_like(c), torch.full_like(c, math.inf)
    for _ in range(rounds):
        won = minimise(network, goal, best, c, steps=steps, rate=rate)
        upper = torch.where(won, torch.minimum(upper, c), upper)
        lower = torch.where(won, lower, torch.maximum(lower, c))
        between = torch.where(lower > 0, (lower * upper).sqrt(), upper / 4)
        c = torch.where(upper.isinf(), 4 * c, between)
    return best.found()


def minimise(
    network: nn.Module, goal: Goal, best: Tracker, c: Tensor, *, steps: int, rate: Tensor
) -> Tensor:
    """One round: which pictures (N,) won with their `c` (N,); `best` takes in all queries.

    Adam moves w. A picture leaves the batch when its own objective has stopped falling, and has
    won if it succeeded in its last window. Deviations: a round begins at the picture's best
    success so far, from which too small a c leads away; the learning rate falls along a cosine,
    so that the constraint's kink is met by ever smaller steps.
    """
    rows, window = best.rows, math.ceil(steps / WINDOWS)
    won = torch.zeros_like(best.success)
    lowest, last = torch.full_like(c, math.inf), torch.full_like(c, math.inf)
    w = to_w(torch.where(best.success[:, None, None, None], best.x, best.x0))
    edge = float(to_w(torch.ones(())))  # beyond it pixels would leave [0, 1]
    first, second = torch.zeros_like(w), torch.zeros_like(w)  # moments, of Adam
    for step in range(steps):
        w = w.detach().requires_grad_()
        x = to_x(w)
        margins = goal.of(rows).margin(network(x))
        away = (x - best.x0[rows]).square().sum((1, 2, 3))
        # the constant c kappa changes no gradient and makes the objective's least value 0
        objective = away + c[rows] * (best.asked[rows] - margins).clamp(min=0)
        (slope,) = torch.autograd.grad(objective.sum(), w)
        with torch.no_grad():
            success = best.see(rows, x.detach(), margins.detach(), c[rows])
            won[rows] = success if step % window == 0 else won[rows] | success
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            scale = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12
            share = rate[rows] * (1 + math.cos(math.pi * step / steps)) / 2
            w = w - share[:, None, None, None] * first / (1 - 0.9 ** (step + 1)) / scale
            w = w.clamp(-edge, edge)
        lowest[rows] = torch.minimum(lowest[rows], objective.detach())
        if (step + 1) % window == 0:
            falling = lowest[rows] < (1 - PROGRESS) * last[rows]
            last[rows] = lowest[rows]
            rows, w, first, second = (part[falling] for part in (rows, w, first, second))
            if not len(rows):
                break
    return won


# --- two attacks without a constant -----------------------------------------------------------


def decoupled(network: nn.Module, x0: Tensor, goal: Goal, *, steps: int) -> Found:
    """The nearest picture over the boundary, its direction and its norm moved apart.

    Rony et al. 2019, algorithm 1: a step along the slope turns the difference x - x0, whose norm is
    then made smaller after a success, larger after a failure. Deviations: the norm begins at the
    first-order distance and grows by it until the first success; the step is a share of the norm
    (a half at first, along a cosine to a hundredth), and so is the norm's change (5% to 0.1%),
    but after a success far beyond the boundary, half of the way back to it, to first order, and at
    most 30%; the norm never exceeds that of the best success.
    """
    logits, margins, slope = goal.slope(network, x0)
    best = Tracker(x0, goal, logits)
    best.see(best.rows, x0, margins, best.c)
    norm = best.near(logits, goal, slope)
    x = (x0 + stretch(slope, norm)).clamp(0, 1)
    for step in range(1, steps):
        logits, margins, slope = goal.slope(network, x)
        success = best.see(best.rows, x, margins, best.c)
        share, change = falling(0.5, 0.01, step / steps), falling(0.05, 0.001, step / steps)
        turned = x - x0 + stretch(slope, share * norm)
        near = best.near(logits, goal, slope)
        less = (near / norm / 2).clamp(change, 0.3)
        grown = torch.where(best.success, norm * (1 + change), norm + torch.minimum(near, norm))
        norm = torch.where(success, norm * (1 - less), grown).minimum(best.l2)
        x = (x0 + stretch(turned, norm)).clamp(0, 1)
    return best.found()


def alternating(network: nn.Module, x0: Tensor, goal: Goal, *, steps: int) -> Found:
    """The project owner's rule: while the target does not lead by kappa, a step along the slope of
    the criterion alone; else one towards x0, the slope of the distance.

    The first step is the first-order distance, a later one a share of the distance reached (a
    third at first, along a cosine to a thousandth).
    """
    logits, margins, slope = goal.slope(network, x0)
    best = Tracker(x0, goal, logits)
    best.see(best.rows, x0, margins, best.c)
    x = (x0 + stretch(slope, best.near(logits, goal, slope))).clamp(0, 1)
    for step in range(1, steps):
        _, margins, slope = goal.slope(network, x)
        success = best.see(best.rows, x, margins, best.c)
        way = torch.where(success[:, None, None, None], x0 - x, slope)
        x = (x + stretch(way, falling(0.3, 0.001, step / steps) * distance(x, x0))).clamp(0, 1)
    return best.found()


def falling(high: float, low: float, share: float) -> float:
    """Along a cosine, from `high` at 0 to `low` at 1."""
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


def stretch(d: Tensor, norm: Tensor) -> Tensor:
    """`d` (N, 3, H, W) with the L2 norms `norm` (N,); where it is 0 it stays so."""
    lengths = d.flatten(1).norm(dim=1).clamp(min=1e-12)
    return d * (norm / lengths)[:, None, None, None]


# --- the 8-bit picture ------------------------------------------------------------------------


def to_8bit(x: Tensor) -> Tensor:
    """The nearest pictures that an 8-bit file can hold."""
    return (x.clamp(0, 1) * 255).round() / 255


def round_off(network: nn.Module, x0: Tensor, goal: Goal, start: Tensor, *, steps: int) -> Found:
    """The nearest 8-bit success that is found from `start`; x0 is of 8 bits, too.

    Of all 8-bit differences with one norm, the one that changes a linear margin most is a rounded
    multiple of its slope: small components stay 0, large ones move by whole levels. So a difference
    that keeps its fractions follows the slopes seen at 8-bit pictures, each of which is its rounded
    multiple with the norm asked for: that is 3% to 0.1% less after a success, more after a
    failure, and never more than the best one's. Where the margin is far off, it is less by a
    quarter of what the margin exceeds the one asked for, to first order, and before there is a
    success more by as much as is missing, at most 30% in either case.
    """
    difference, best = start - x0, None
    norm = 1.15 * distance(start, x0).clamp(min=LEVEL)
    x = to_8bit(start)
    for step in range(steps):
        logits, margins, slope = goal.slope(network, x)
        best = best or Tracker(x0, goal, logits)
        success = best.see(best.rows, x, margins, best.c)
        if step:
            change = falling(0.03, 0.001, step / steps)
            off = best.near(logits, goal, slope, x - x0) / norm
            less = (off / 4).clamp(change, 0.3)
            more = torch.where(best.success, change, off.clamp(0.01, 0.3))
            norm = (norm * torch.where(success, 1 - less, 1 + more)).minimum(best.l2)
        length = difference.flatten(1).norm(dim=1).clamp(min=LEVEL)
        difference = difference + stretch(slope, falling(0.7, 0.01, step / steps) * length)
        x = rounded_multiple(x0, difference, norm)
    return best.found()


def rounded_multiple(x0: Tensor, difference: Tensor, norm: Tensor) -> Tensor:
    """x0 plus the multiple of `difference` that has about the L2 norm `norm` (N,) in 8 bits."""
    largest = difference.flatten(1).abs().amax(1).clamp(min=1e-12)
    lower, upper = torch.zeros_like(norm), (norm + LEVEL) / largest  # there, it alone is too long
    for _ in range(20):
        middle = (lower + upper) / 2
        short = distance(to_8bit(x0 + middle[:, None, None, None] * difference), x0) <= norm
        lower, upper = torch.where(short, middle, lower), torch.where(short, upper, middle)
    return to_8bit(x0 + lower[:, None, None, None] * difference)


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


def build_network(description: dict) -> nn.Module:
    """A network for pixels in [0, 1], frozen: an attack changes pictures only.

    `description` has `kind` small (state, width, classes), torchvision (name, state) or exported
    (program, the bytes of a .pt2 file); the latter two `mean` and `std`, too. Raises ValueError if
    it is not right in itself.
    """
    if description["kind"] == "small":
        network = SmallResNet(width=description["width"], classes=description["classes"])
        network.load_state_dict(description["state"])
        network.eval()
    elif description["kind"] == "torchvision":
        network = torchvision_network(description["name"], description["state"])
    else:
        network = exported_network(description["program"])
    if "mean" in description:
        network = Normalised(network, description["mean"], description["std"])
    return network.requires_grad_(False)


def torchvision_network(name: str, state: dict[str, Tensor]) -> nn.Module:
    """In eval mode; the last bias tells how many classes. Raises ValueError if the weights are not
    those of torchvision's network `name`.
    """
    from torchvision.models import get_model  # imported where it is used: it is slow

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    try:
        classes = len(list(state.values())[-1])
        network = get_model(name, weights=None, num_classes=classes, **options)
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    return network.eval()


def exported_network(program: Tensor) -> nn.Module:
    """From the bytes of a .pt2 file, exported in eval mode, whose weights must be plain tensors.

    Raises ValueError if it cannot be loaded.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.export.load would else unpickle anything
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return torch.export.load(io.BytesIO(program.numpy().tobytes())).module()
    except Exception as error:  # zipfile, json, pickle and torch each have their own
        raise ValueError(" ".join(str(error).split())[:200]) from None
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@torch.no_grad()
def look(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and probabilities (N, classes); FloatingPointError if one is not finite."""
    logits = torch.cat([network(part) for part in x.split(256)])
    if not logits.isfinite().all():
        raise FloatingPointError("the network's logits are not finite")
    return logits, logits.softmax(1)
