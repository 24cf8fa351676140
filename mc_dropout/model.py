"""Monte Carlo dropout: a network, its T stochastic forward passes, and what they are worth.

Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in
Deep Learning". A network trained with dropout is an approximate posterior q(W) over weights W; one
forward pass with dropout on draws W_t from it, and the predictive distribution is (their eq. 6)

    p(y | x) = 1/T sum_t softmax(f(x; W_t))

Deviations: batch normalisation in the convolutions; dropout before the two linear layers only.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
BINS = 15  # of the calibration errors


def make_cnn(
    *, channels: int, classes: int, widths: tuple[int, ...], hidden: int, dropout: float
) -> nn.Sequential:
    """Class logits (N, classes) from images (N, channels, H, W) in [0, 1], H and W at will."""
    layers = []
    for inputs, width in zip((channels, *widths[:-1]), widths, strict=True):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    layers[-1] = nn.AdaptiveMaxPool2d(3)
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Dropout(dropout),  # here the passes part: everything above is computed once
        nn.Linear(9 * widths[-1], hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )


# --- stochastic forward passes ----------------------------------------------------------------


@contextmanager
def dropout_on(network: nn.Module) -> Iterator[None]:
    """Eval mode but for the dropout modules, which sample; afterwards every mode is as before."""
    modes = {module: module.training for module in network.modules()}
    for module in modes:
        module.training = isinstance(module, DROPOUTS)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def mc_logits(
    network: nn.Sequential,
    x: Tensor,
    *,
    passes: int,
    seed: int,
    chunk_images: int,
    chunk_passes: int,
) -> Tensor:
    """Logits (passes, N, classes) from images (N, C, H, W), with a mask for each pass and image.

    The layers before the first dropout are computed once. The same seed and chunks give the same
    masks; the caller's generators are left as they were. Raises ValueError without a dropout.
    """
    stochastic = [n for n, layer in enumerate(network) if isinstance(layer, DROPOUTS)]
    if not stochastic:
        raise ValueError("network: expected a dropout module among its layers, found none")
    body, head = network[: stochastic[0]], network[stochastic[0] :]
    logits = []
    with dropout_on(network), torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        for images in x.split(chunk_images):
            features = body(images)
            parts = []
            for start in range(0, passes, chunk_passes):
                count = min(chunk_passes, passes - start)
                rows = features.expand(count, *features.shape).flatten(0, 1)
                parts.append(head(rows).unflatten(0, (count, len(images))))
            logits.append(torch.cat(parts))
    return torch.cat(logits, 1)


@torch.no_grad()
def standard_logits(network: nn.Module, x: Tensor, chunk_images: int) -> Tensor:
    """Logits (N, classes) with dropout off, as is usual at inference."""
    network.eval()
    return torch.cat([network(images) for images in x.split(chunk_images)])


def average_probs(logits: Tensor) -> Tensor:
    """log p(y | x) (T, N, C), of which row t averages the probabilities of passes 1 to t: eq. 6."""
    return logits.log_softmax(-1).logcumsumexp(0) - pass_numbers(logits).log()


def average_logits(logits: Tensor) -> Tensor:
    """As average_probs, but a geometric mean: the softmax of the mean logits. Not eq. 6."""
    return (logits.cumsum(0) / pass_numbers(logits)).log_softmax(-1)


def pass_numbers(logits: Tensor) -> Tensor:
    """1 to T as (T, 1, 1)."""
    return torch.arange(1, len(logits) + 1, device=logits.device, dtype=logits.dtype)[:, None, None]


# --- uncertainty and scores -------------------------------------------------------------------


def entropy(log_probs: Tensor) -> Tensor:
    """H(p) (...) in nats from log-probabilities (..., C)."""
    return torch.special.entr(log_probs.exp()).sum(-1)


def mutual_information(logits: Tensor) -> Tensor:
    """H(mean_t p_t) - mean_t H(p_t) (N,) in nats from logits (T, N, C) of T passes.

    What the passes disagree about; never negative (Jensen), so rounding below 0 is cut off.
    """
    log_probs = logits.log_softmax(-1)
    return (entropy(average_probs(logits)[-1]) - entropy(log_probs).mean(0)).clamp(min=0)


def scores(log_probs: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Each score (...), a mean over N images, from log-probabilities (..., N, C), classes (N,).

    nll in nats; brier summed over the classes, in [0, 2] (Brier 1950).
    """
    probs = log_probs.exp()
    truth = F.one_hot(y, probs.shape[-1]).to(probs.dtype)
    confidence, predicted = probs.max(-1)
    hit = (predicted == y).to(probs.dtype)
    return {
        "accuracy": hit.mean(-1),
        "nll": -(log_probs * truth).sum(-1).mean(-1),
        "brier": (probs - truth).square().sum(-1).mean(-1),
        "ece": calibration_error(confidence, hit),
        "adaptive_ece": adaptive_calibration_error(confidence, hit),
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


def adaptive_calibration_error(confidence: Tensor, hit: Tensor) -> Tensor:
    """As calibration_error, over 15 bins of equal numbers of images (Nguyen & O'Connor 2015)."""
    difference = (hit - confidence).gather(-1, confidence.argsort(dim=-1, stable=True))
    sums = [part.sum(-1) for part in difference.tensor_split(BINS, -1)]
    return torch.stack(sums, -1).abs().sum(-1) / confidence.shape[-1]


def spread(values: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation (...) over the runs, of values (R, ...)."""
    return {"mean": values.mean(0), "sd": values.std(0)}


def paired_difference(mc: Tensor, standard: Tensor) -> dict[str, Tensor]:
    """Mean (T,) over the runs of mc (R, T) minus standard (R,), and the mean's standard error.

    Both sides of a run share their weights, so what differs between runs cancels.
    """
    difference = mc - standard[:, None]
    return {
        "mean": difference.mean(0),
        "standard_error": difference.std(0) / math.sqrt(len(difference)),
    }


# --- several networks as one program ----------------------------------------------------------


def together(networks: list[nn.Module]) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """Parameters, and a function to logits (R, B, classes) from images (R, B, C, H, W), in train
    mode, each network seeing its own images.

    More than one network is stacked: the networks' own tensors become views of the stacked ones,
    so they learn with them. Dropout masks differ from network to network.
    """
    if len(networks) == 1:
        (network,) = networks
        return list(network.parameters()), lambda x: network.train()(x[0])[None]
    params, buffers = stack_module_state(networks)
    for number, network in enumerate(networks):
        for name, own in [*network.named_parameters(), *network.named_buffers()]:
            own.data = (params | buffers)[name].detach()[number]
    form = copy.deepcopy(networks[0]).to("meta").train()

    def one(params: dict, buffers: dict, x: Tensor) -> Tensor:
        return functional_call(form, (params, buffers), (x,))

    return list(params.values()), lambda x: vmap(one, randomness="different")(params, buffers, x)
