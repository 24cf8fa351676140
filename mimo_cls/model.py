"""A Wide ResNet of several members: M images in, M predictions out, and what they are worth.

Havasi et al. 2021, "Training independent subnetworks for robust prediction" (MIMO). The first
convolution takes M images stacked by channel, the last layer gives M predictions; all between is
the network of one member. In training each member has an image of its own, and the loss is the sum
over members (their section 2; the regulariser is the optimizer's weight decay)

    L = E[ -sum_m log p(y_m | x_1 ... x_M) ]

In testing the same image is given M times and the ensemble's prediction is

    p(y | x) = 1/M sum_m p(y_m = y | x, ..., x)

The network is that of Zagoruyko & Komodakis 2016, "Wide residual networks", without dropout.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BINS = 15  # of the calibration error


# --- the network ------------------------------------------------------------------------------


class Block(nn.Module):
    """Features (N, out, H / stride, W / stride) from (N, in, H, W), activation before weights."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if (inputs, stride) != (outputs, 1):
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class MimoWideResNet(nn.Module):
    """Logits (N, M, classes) from M images stacked by channel (N, M * 3, H, W).

    WRN-depth-width: depth = 6 n + 4 with n blocks at each of three resolutions.
    """

    def __init__(self, depth: int, width: float, *, members: int, classes: int):
        super().__init__()
        self.members, self.classes = members, classes
        self.stem = nn.Conv2d(members * 3, 16, 3, padding=1, bias=False)  # grows with M
        blocks, channels = [], 16
        for stage, outputs in enumerate(round(base * width) for base in (16, 32, 64)):
            for number in range((depth - 4) // 6):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(Block(channels, outputs, stride))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, members * classes)  # grows with M
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, (N, 64 * width)."""
        return F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).unflatten(1, (self.members, self.classes))


def mimo_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over members and averaged over inputs.

    From logits (N, M, C) and classes (N, M).
    """
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / len(y)


def ensemble_log_probs(log_probs: Tensor) -> Tensor:
    """log mean_m p_m (N, C) from the members' log p_m (N, M, C): probabilities are averaged."""
    return log_probs.logsumexp(1) - math.log(log_probs.shape[1])


# --- scores -----------------------------------------------------------------------------------


def scores(log_probs: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Each score (...), a mean over N images, from log-probabilities (..., N, C), classes (N,).

    nll in nats; brier summed over the classes, in [0, 2] (Brier 1950).
    """
    probs = log_probs.exp()
    truth = F.one_hot(y, probs.shape[-1]).to(probs.dtype)
    confidence, predicted = probs.max(-1)
    hit = (predicted == y).to(probs.dtype)
    right = log_probs.gather(-1, y[:, None].expand(*log_probs.shape[:-1], 1))
    return {
        "accuracy": hit.mean(-1),
        "nll": -right.mean((-2, -1)),
        "brier": (probs - truth).square().sum(-1).mean(-1),
        "ece": calibration_error(confidence, hit),
    }


def calibration_error(confidence: Tensor, hit: Tensor) -> Tensor:
    """sum_b n_b / N |accuracy_b - confidence_b| over 15 bins of equal width (Guo et al. 2017).

    From the probability (..., N) of the predicted class and whether it was right (..., N).
    """
    sums = confidence.new_zeros(*confidence.shape[:-1], BINS)
    sums = sums.scatter_add(-1, bin_of(confidence), hit - confidence)  # n_b times the difference
    return sums.abs().sum(-1) / confidence.shape[-1]


def bin_of(confidence: Tensor) -> Tensor:
    """The number of the bin (b / 15, (b + 1) / 15] that holds each confidence."""
    return ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)


# --- uncertainty ------------------------------------------------------------------------------


def entropy(log_probs: Tensor) -> Tensor:
    """H(p) (...) in nats from log-probabilities (..., C)."""
    return torch.special.entr(log_probs.exp()).sum(-1)


def mutual_information(log_probs: Tensor) -> Tensor:
    """H(mean_t p_t) - mean_t H(p_t) (N,) in nats from log-probabilities (T, N, C).

    What the T predictions disagree about; never negative (Jensen), so rounding is cut off.
    """
    mean = log_probs.logsumexp(0) - math.log(len(log_probs))
    return (entropy(mean) - entropy(log_probs).mean(0)).clamp(min=0)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """How often an image from outside is the less certain one of a pair, from uncertainties (N,),
    (M,).
    """
    from sklearn.metrics import roc_auc_score  # imported where it is used: it is slow

    truth = [0] * len(inside) + [1] * len(outside)
    return float(roc_auc_score(truth, torch.cat([inside, outside]).cpu()))


def best_temperature(log_probs: Tensor, y: Tensor) -> float:
    """The T in [0.01, 100] of the least NLL of softmax(log p / T) (Guo et al. 2017).

    From log-probabilities (N, C). The NLL is convex in 1 / T: bisection for where its slope is 0.
    """
    low, high = math.log(0.01), math.log(100)
    right = log_probs.gather(1, y[:, None])[:, 0]
    for _ in range(60):
        middle = (low + high) / 2
        probs = (log_probs * math.exp(middle)).softmax(-1)
        slope = (probs * log_probs).sum(-1) - right
        low, high = (low, middle) if slope.mean() > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def temper(log_probs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (..., C) of softmax(log p / T)."""
    return (log_probs / temperature).log_softmax(-1)


def diversity(log_probs: Tensor) -> dict[str, float]:
    """How much members differ, means over images and pairs, from log p_m (N, M, C).

    disagreement: share of images for which the two predict different classes; kl: divergence
    KL(p_i | p_j) in nats over ordered pairs. One member differs from nobody: 0.
    """
    pairs = list(itertools.permutations(range(log_probs.shape[1]), 2))
    if not pairs:
        return {"disagreement": 0.0, "kl": 0.0}
    one, other = (log_probs[:, [pair[place] for pair in pairs]] for place in (0, 1))
    differ = one.argmax(-1) != other.argmax(-1)
    kl = (one.exp() * (one - other)).sum(-1)
    return {"disagreement": float(differ.double().mean()), "kl": float(kl.mean())}


@torch.no_grad()
def variance_shares(model: MimoWideResNet, x: Tensor, contexts: int) -> Tensor:
    """Variance (features, M) of each last feature when only member m's image changes.

    From images (N, 3, H, W) as in training: member m sees each of them, the other members one image
    of `contexts` in turn; the mean over these. A feature of one subnetwork has one entry that is
    not 0 (figure 4 of the paper).
    """
    model.eval()
    others = x[:contexts]
    found = torch.zeros(model.head.in_features, model.members, dtype=torch.float64)
    for m in range(model.members):
        for image in others:
            stacked = image.repeat(model.members, 1, 1).expand(len(x), -1, -1, -1).clone()
            stacked[:, 3 * m : 3 * m + 3] = x
            found[:, m] += model.features(stacked).double().var(0).cpu() / len(others)
    return found


def independence(variances: Tensor) -> float:
    """Share of each feature's variance that the member with most of it causes, from (F, M): the
    mean over features that vary; 1 / M if all members share all features, 1 if none is shared.
    """
    total = variances.sum(1)
    alive = total > 1e-12 * total.max()
    return float((variances[alive].max(1).values / total[alive]).mean())


# --- differences ------------------------------------------------------------------------------


def mean_and_sd(values: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation (...) over the runs, of values (R, ...); of one run 0."""
    return {"mean": values.mean(0), "sd": values.std(0, correction=min(1, len(values) - 1))}


def error_over_sources(difference: Tensor, source: Tensor) -> float:
    """Standard error of the mean of `difference` (N,), where images of one source (N,) are one
    draw: sqrt(sum_s (sum_{i in s} (d_i - mean))^2) / N.
    """
    centred = difference - difference.mean()
    sums = centred.new_zeros(int(source.max()) + 1).index_add(0, source, centred)
    return float(sums.square().sum().sqrt() / len(difference))


# --- cost -------------------------------------------------------------------------------------


def cost(
    depth: int, width: float, *, members: int, classes: int, image_size: int
) -> dict[str, int]:
    """Parameters, and multiply-adds of one forward pass (convolutions and the linear layer)."""
    with torch.device("meta"):  # shapes alone: nothing is computed
        network = MimoWideResNet(depth, width, members=members, classes=classes)
        x = torch.empty(1, members * 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter:
        network.eval()(x)
    parameters = sum(part.numel() for part in network.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}


def overhead(
    depth: int, width: float, *, members: int, classes: int, image_size: int
) -> dict[str, float]:
    """The cost of MIMO and of one member alone, and what it is more, in percent."""
    mimo, single = (
        cost(depth, width, members=count, classes=classes, image_size=image_size)
        for count in (members, 1)
    )
    numbers = {}
    for name, value in mimo.items():
        numbers |= {name: value, f"single_{name}": single[name]}
        numbers[f"{name}_percent"] = 100 * (value / single[name] - 1)
    return numbers
