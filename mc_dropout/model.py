"""Monte Carlo dropout: a network, its T stochastic forward passes, and their scores.

Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in
Deep Learning". A network trained with dropout is an approximate posterior q(W) over weights W; one
forward pass with dropout on draws W_t from it, and the predictive distribution is (their eq. 6)

    p(y | x) = 1/T sum_t softmax(f(x; W_t))

Deviations: batch normalisation in the convolutions; dropout before the two linear layers only.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout

BINS = 15  # of the calibration error
CHUNK_IMAGES, CHUNK_PASSES = 200, 20  # computed at once


def make_cnn(
    *, channels: int, classes: int, widths: tuple[int, ...], hidden: int, dropout: float
) -> nn.Sequential:
    """Class logits (N, classes) from images (N, channels, H, W) in [0, 1] of any H and W."""
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


def drops(module: nn.Module) -> bool:
    """Whether the module itself drops at random: a dropout, or attention and recurrence with it."""
    return isinstance(module, Dropout) or isinstance(getattr(module, "dropout", None), float)


def in_order(network: nn.Module) -> list[nn.Module]:
    """The layers of a Sequential, those of Sequentials within it in their place."""
    if type(network) is not nn.Sequential:
        return [network]
    return [layer for child in network for layer in in_order(child)]


def split_network(network: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """What comes before the first dropout, as far as can be told, and the rest.

    Raises ValueError without a dropout, or if batch normalisation comes after one: its running
    statistics are those of activations with dropout, so a network with dropout off would be
    evaluated with wrong ones (Li et al. 2019, "variance shift").
    """
    modules = list(network.modules())
    places = [place for place, module in enumerate(modules) if drops(module)]
    if not places:
        raise ValueError("network: expected a dropout module in it, found none")
    if any(isinstance(module, BatchNorm) for module in modules[places[0] :]):
        raise ValueError("network: batch normalisation after dropout has the wrong statistics")
    layers = in_order(network)
    first = [any(map(drops, layer.modules())) for layer in layers].index(True)
    return nn.Sequential(*layers[:first]), nn.Sequential(*layers[first:])


@contextmanager
def dropout_on(network: nn.Module) -> Iterator[None]:
    """Eval mode but for what drops at random; afterwards every mode is as before."""
    modes = {module: module.training for module in network.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would leave out a transformer's dropout
    for module in modes:
        module.training = drops(module)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def mc_logits(
    network: nn.Module,
    x: Tensor,
    *,
    passes: int,
    seed: int,
    chunk_images: int = CHUNK_IMAGES,
    chunk_passes: int = CHUNK_PASSES,
) -> Tensor:
    """Logits (T, N, classes) of T passes, each with a mask of its own for each pass and image.

    Raises ValueError as split_network does.
    """
    body, head = split_network(network)
    logits = []
    with dropout_on(network), torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        for images in x.split(chunk_images):
            features = body(images)
            parts = []
            for start in range(0, passes, chunk_passes):
                count = min(chunk_passes, passes - start)
                rows = features.repeat(count, *[1] * (features.dim() - 1))
                parts.append(head(rows).unflatten(0, (count, len(images))))
            logits.append(torch.cat(parts))
    return torch.cat(logits, 1)


@torch.no_grad()
def standard_logits(network: nn.Module, x: Tensor, chunk_images: int = CHUNK_IMAGES) -> Tensor:
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


# --- uncertainty ------------------------------------------------------------------------------


def entropy(log_probs: Tensor) -> Tensor:
    """H(p) (...) in nats from log-probabilities (..., C)."""
    return torch.special.entr(log_probs.exp()).sum(-1)


def log_mean(log_probs: Tensor) -> Tensor:
    """log mean_t p_t (...) from log-probabilities (T, ...)."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def mutual_information(log_probs: Tensor) -> Tensor:
    """H(mean_t p_t) - mean_t H(p_t) (N,) in nats from log-probabilities (T, N, C).

    What the T predictions disagree about; never negative (Jensen), so rounding is cut off.
    """
    mean = log_probs.logsumexp(0) - math.log(len(log_probs))
    return (entropy(mean) - entropy(log_probs).mean(0)).clamp(min=0)


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


def auroc(inside: Tensor, outside: Tensor) -> float:
    """How often an image from outside is the less certain one of a pair, from uncertainties (N,),
    (M,).
    """
    from sklearn.metrics import roc_auc_score  # imported where it is used: it is slow

    truth = [0] * len(inside) + [1] * len(outside)
    return float(roc_auc_score(truth, torch.cat([inside, outside]).cpu()))


def risks(uncertainty: Tensor, hit: Tensor) -> Tensor:
    """Error rate (N,) among the k most certain images, k = 1 to N; the mean is the area under
    risk against coverage (Geifman & El-Yaniv 2017).
    """
    wrong = 1 - hit.double()[uncertainty.argsort(stable=True)]
    return wrong.cumsum(0) / torch.arange(1, len(wrong) + 1, device=wrong.device)


def mean_and_sd(values: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation (...) over the runs, of values (R, ...); of one run 0."""
    return {"mean": values.mean(0), "sd": values.std(0, correction=min(1, len(values) - 1))}


def paired_difference(mc: Tensor, standard: Tensor) -> dict[str, Tensor]:
    """Mean (...) over the runs of mc (R, ...) minus standard, as large or (R,), and the mean's
    standard error. Both sides of a run share weights: what differs between runs cancels.
    """
    standard = standard.view(*standard.shape, *[1] * (mc.dim() - standard.dim()))
    found = mean_and_sd(mc - standard)
    return {"mean": found["mean"], "standard_error": found["sd"] / math.sqrt(len(mc))}


# --- active learning --------------------------------------------------------------------------


def acquire(method: str, network: nn.Sequential, x: Tensor, count: int, seed: int) -> Tensor:
    """Places (count,) of the images (N, C, H, W) whose labels `method` asks for next.

    bald: mutual information (Houlsby et al. 2011); mc_entropy: H of MC dropout's mean; entropy,
    margin: with dropout off; coreset: those nearest to the centres of k-means on the last
    features; random. Gal, Islam & Ghahramani 2017, "Deep Bayesian Active Learning".
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(x), generator=generator)[:count].to(x.device)
    if method == "coreset":
        return nearest_to_centres(standard_logits(network[:-1], x), count, seed)
    if method in ("bald", "mc_entropy"):
        log_probs = mc_logits(network, x, passes=50, seed=seed).double().log_softmax(-1)
        bald = method == "bald"
        worth = mutual_information(log_probs) if bald else entropy(log_mean(log_probs))
    else:
        log_probs = standard_logits(network, x).double().log_softmax(-1)
        first, second = log_probs.exp().topk(2).values.unbind(1)
        worth = entropy(log_probs) if method == "entropy" else second - first
    return worth.argsort(descending=True, stable=True)[:count]


def nearest_to_centres(features: Tensor, count: int, seed: int) -> Tensor:
    """Places (count,), no two equal, of the features (N, D) nearest to `count` centres."""
    from sklearn.cluster import KMeans  # imported where it is used: it is slow

    points = features.double().cpu()
    found = KMeans(count, n_init=1, random_state=seed % 2**32).fit(points.numpy())
    distance = torch.cdist(torch.from_numpy(found.cluster_centers_), points)
    places = []
    for row in distance:
        row[places] = torch.inf
        places.append(int(row.argmin()))
    return torch.tensor(places, device=features.device)
