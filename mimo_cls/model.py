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

    def __init__(self, depth: int, width: int, *, members: int, classes: int):
        super().__init__()
        self.members, self.classes = members, classes
        self.stem = nn.Conv2d(members * 3, 16, 3, padding=1, bias=False)  # grows with M
        blocks, channels = [], 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
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

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3))
        return self.head(features).unflatten(1, (self.members, self.classes))


def mimo_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over members and averaged over inputs.

    From logits (N, M, C) and classes (N, M).
    """
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / len(y)


def ensemble_log_probs(log_probs: Tensor) -> Tensor:
    """log mean_m p_m (N, C) from the members' log p_m (N, M, C): probabilities are averaged."""
    return log_probs.logsumexp(1) - math.log(log_probs.shape[1])


# --- scores -----------------------------------------------------------------------------------


def scores(log_probs: Tensor, y: Tensor) -> dict[str, float]:
    """Means over N images from log-probabilities (N, C) and classes (N,).

    nll in nats; brier summed over the classes, in [0, 2] (Brier 1950).
    """
    probs = log_probs.exp()
    confidence, predicted = probs.max(1)
    hit = (predicted == y).to(probs.dtype)
    truth = F.one_hot(y, probs.shape[1])
    return {
        "accuracy": float(hit.mean()),
        "nll": float(F.nll_loss(log_probs, y)),
        "ece": float(calibration_error(confidence, hit)),
        "brier": float((probs - truth).square().sum(1).mean()),
    }


def calibration_error(confidence: Tensor, hit: Tensor) -> Tensor:
    """sum_b n_b / N |accuracy_b - confidence_b| over bins of equal width (Guo et al. 2017).

    From the probability (N,) of the predicted class and whether it was right (N,).
    """
    gaps = confidence.new_zeros(BINS).index_add(0, bin_of(confidence), hit - confidence)
    return gaps.abs().sum() / len(confidence)


def bin_of(confidence: Tensor) -> Tensor:
    """The number of the bin (b / 15, (b + 1) / 15] that holds each confidence."""
    return ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy (...) in nats of log-probabilities (..., C)."""
    return torch.special.entr(log_probs.exp()).sum(-1)


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


def mutual_information(log_probs: Tensor) -> Tensor:
    """H(mean_m p_m) - mean_m H(p_m) (N,) in nats from log p_m (N, M, C): 0 if members agree."""
    return entropy(ensemble_log_probs(log_probs)) - entropy(log_probs).mean(1)


# --- cost -------------------------------------------------------------------------------------


def cost(depth: int, width: int, *, members: int, classes: int, image_size: int) -> dict[str, int]:
    """Parameters, and multiply-adds of one forward pass (convolutions and the linear layer)."""
    with torch.device("meta"):  # shapes alone: nothing is computed
        network = MimoWideResNet(depth, width, members=members, classes=classes)
        x = torch.empty(1, members * 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter:
        network.eval()(x)
    parameters = sum(part.numel() for part in network.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}


def overhead(
    depth: int, width: int, *, members: int, classes: int, image_size: int
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
