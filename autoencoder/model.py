"""A convolutional autoencoder, a classifier over its encoder, and the optimizer Muon.

The code is linear (Hinton & Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural
Networks"), so its baseline is PCA with as many components, the best linear autoencoder (Baldi &
Hornik 1989). Muon: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

SIZE = 32  # height and width of an image in pixels
NEIGHBOURS = 10  # of a code
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of Jordan et al. 2024


class Encoder(nn.Module):
    """Codes (N, code_size), not bounded, from images (N, 3, 32, 32) in [0, 1].

    Every stage halves the resolution: the first moves 2x2 pixels into channels, the others stride.
    """

    def __init__(self, widths: tuple[int, ...], code_size: int, mean: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)  # (3, 32, 32), of the training images
        layers, inputs = [nn.PixelUnshuffle(2)], 12
        for place, width in enumerate(widths):
            layers += [nn.Conv2d(inputs, width, 3, 1 if place == 0 else 2, 1), nn.GELU()]
            inputs = width
        self.convolutions = nn.Sequential(*layers)
        self.code = nn.Linear(inputs * (SIZE >> len(widths)) ** 2, code_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self.convolutions(x - self.mean).flatten(1))


class Decoder(nn.Module):
    """What is added to the mean image, (N, 3, 32, 32), from codes (N, code_size)."""

    def __init__(self, widths: tuple[int, ...], code_size: int):
        super().__init__()
        side = SIZE >> len(widths)
        self.widen = nn.Sequential(
            nn.Linear(code_size, widths[-1] * side**2),
            nn.GELU(),
            nn.Unflatten(1, (widths[-1], side, side)),
        )
        layers = []
        for width, finer in zip(widths[:0:-1], widths[-2::-1], strict=True):
            layers += [nn.Conv2d(width, 4 * finer, 3, padding=1), nn.PixelShuffle(2), nn.GELU()]
        layers += [nn.Conv2d(widths[0], 12, 3, padding=1), nn.PixelShuffle(2)]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, code: Tensor) -> Tensor:
        return self.convolutions(self.widen(code))


class Autoencoder(nn.Module):
    """Reconstructions (N, 3, 32, 32), not bounded, of images (N, 3, 32, 32) in [0, 1]."""

    def __init__(self, widths: tuple[int, ...], code_size: int, mean: Tensor):
        super().__init__()
        self.encoder = Encoder(widths, code_size, mean)
        self.decoder = Decoder(widths, code_size)

    def decode(self, code: Tensor) -> Tensor:
        return self.encoder.mean + self.decoder(code)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encoder(x))


@torch.no_grad()
def decode_bytes(autoencoder: Autoencoder, codes: Tensor) -> Tensor:
    """uint8 images (N, 3, 32, 32), 500 at a time."""
    decoded = torch.cat([autoencoder.decode(part).clamp(0, 1) for part in codes.split(500)])
    return (decoded * 255).round().byte()


class Classifier(nn.Module):
    """Class logits (N, classes) from images (N, 3, 32, 32): encoder and a linear layer."""

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.code.out_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def hide(x: Tensor, mean: Tensor, share: float) -> Tensor:
    """Images (N, 3, H, W) in which patches of 4x4 pixels, each with probability `share`, are the
    mean image's (3, H, W).
    """
    hidden = torch.rand(len(x), 1, x.shape[2] // 4, x.shape[3] // 4).to(x.device) < share
    return torch.where(hidden.repeat_interleave(4, 2).repeat_interleave(4, 3), mean, x)


class Pca(NamedTuple):
    """Reconstructions of images (N, 3, 32, 32) in [0, 1] from their principal components."""

    mean: Tensor  # (3072,)
    components: Tensor  # orthonormal rows (code_size, 3072)

    def encode(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - self.mean) @ self.components.T

    def __call__(self, x: Tensor) -> Tensor:
        return (self.encode(x) @ self.components + self.mean).view(x.shape)


def fit_pca(x: Tensor, code_size: int) -> Pca:
    """PCA of images (N, 3, 32, 32) in [0, 1]."""
    from sklearn.decomposition import PCA  # imported where it is used: it is slow

    # more passes than this solver's default, so that it is exact to four digits
    solver = PCA(code_size, svd_solver="randomized", iterated_power=8, random_state=0)
    solver.fit(x.flatten(1).cpu().numpy())
    return Pca(torch.from_numpy(solver.mean_).to(x), torch.from_numpy(solver.components_).to(x))


def image_errors(reconstructions: Tensor, x: Tensor) -> Tensor:
    """Each image's mean squared error (N,) over channels and pixels, outputs clamped to [0, 1]."""
    return (reconstructions.clamp(0, 1) - x).double().square().flatten(1).mean(1)


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error, pixels in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly U V^T of matrix = U S V^T: Newton-Schulz steps bring its singular values close to 1.

    X <- a X + b (X X^T) X + c (X X^T)^2 X maps each singular value s to a s + b s^3 + c s^5. With
    these a, b, c it ends between about 0.7 and 1.2; what counts is that small values rise fast.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T  # X X^T is then the smaller of the two products
    x = x / x.norm().clamp(min=1e-7)  # the largest singular value is at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Momentum B <- mu B + G, then W <- W - rate sqrt(max(1, rows / columns)) O(G + mu B).

    O is `orthogonalise`. A convolution's kernel (out, in, h, w) is a matrix (out, in h w).
    """

    def __init__(self, parameters: Iterable, lr: float, dtype: torch.dtype = torch.float32):
        super().__init__(parameters, {"lr": lr, "momentum": 0.95})
        self.dtype = dtype  # of the Newton-Schulz steps

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                gradient, state = weight.grad.flatten(1), self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
                ahead = gradient + group["momentum"] * momentum  # Nesterov
                update = orthogonalise(ahead.to(self.dtype)).to(weight.dtype)
                rate = group["lr"] * math.sqrt(max(1, update.shape[0] / update.shape[1]))
                weight.sub_(rate * update.view_as(weight))


def one_cycle(step: int, *, total: int, warm_up: float) -> float:
    """The rate at `step` as a part of its peak: up in a line, then down in a line to 0."""
    rising = warm_up * total
    return min((step + 1) / max(rising, 1), max(total - step, 0) / (total - rising))


def new_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warm_up: float
) -> torch.optim.lr_scheduler.LambdaLR:
    rate = partial(one_cycle, total=steps, warm_up=warm_up)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def in_bfloat16(precision: str, device: str) -> bool:
    """With `auto`, where the device multiplies in bfloat16 faster than in float32."""
    if precision == "auto":
        return device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return precision == "bfloat16"


# --- codes ------------------------------------------------------------------------------------


class CodeNeighbours(NamedTuple):
    """Known codes (N, K) and their classes (N,): around each place a normal distribution with the
    mean and the covariance of its nearest codes of one class. Together they are a mixture that is
    dense where codes are, and has their full covariance there.
    """

    codes: Tensor
    y: Tensor

    def vary(self, codes: Tensor, y: Tensor, level: float) -> Tensor:
        """Codes (M, K) of classes y (M,) with noise of `level` standard deviations, at most 1.

        z <- m + sqrt(1 - level^2) (z - m) + level sum_j e_j (z_j - m) / sqrt(J) with the J nearest
        codes z_j and their mean m: at level 1 z matters only by its neighbours.
        """
        varied = torch.empty_like(codes)
        for label in y.unique().tolist():
            mine = y == label
            pool, z = self.codes[self.y == label], codes[mine]
            near = torch.cdist(z, pool).topk(min(NEIGHBOURS, len(pool)), largest=False).indices
            center = pool[near].mean(1)
            noise = torch.randn(near.shape).to(codes) / math.sqrt(near.shape[1])
            spread = torch.einsum("mj,mjk->mk", noise, pool[near] - center[:, None])
            varied[mine] = center + math.sqrt(1 - level**2) * (z - center) + level * spread
        return varied


def nearest_image(x: Tensor, others: Tensor, chunk: int = 2000) -> tuple[Tensor, Tensor]:
    """Root mean square difference (N,) of each x to the nearest of `others`, and its number (N,).

    Both are images in [0, 1], or uint8.
    """
    flat = to_unit(x)
    best, which = torch.full((len(x),), math.inf).to(flat), torch.zeros(len(x)).long().to(x.device)
    for first in range(0, len(others), chunk):
        squares = torch.cdist(flat, to_unit(others[first : first + chunk])).square()
        found, place = (squares / flat.shape[1]).min(1)
        which = torch.where(found < best, first + place, which)
        best = torch.minimum(found, best)
    return best.sqrt(), which


def to_unit(x: Tensor) -> Tensor:
    return x.flatten(1).float() / (255 if x.dtype == torch.uint8 else 1)


def path_between(codes: Tensor, ends: Tensor, count: int) -> Tensor:
    """`count` codes from one to the other of two codes (2, K), where `codes` (N, K) are dense.

    The shortest path over hops between neighbours, each as long as its squared distance: many short
    hops are less than a long one.
    """
    from scipy.sparse.csgraph import dijkstra
    from sklearn.neighbors import kneighbors_graph

    points = torch.cat((ends, codes)).double().cpu()
    graph = kneighbors_graph(points.numpy(), min(NEIGHBOURS, len(points) - 1), mode="distance")
    _, before = dijkstra(graph.power(2), directed=False, indices=0, return_predecessors=True)
    stops = [1]
    while stops[-1] > 0:
        stops.append(int(before[stops[-1]]))
    stops = [0, *stops[-2::-1]] if stops[-1] == 0 else [0, 1]  # no way: a straight line
    line = points[stops]
    length = torch.cat((torch.zeros(1), line.diff(dim=0).norm(dim=1).cumsum(0)))
    wanted = torch.linspace(0, float(length[-1]), count, dtype=torch.double)
    after = torch.searchsorted(length, wanted).clamp(1, len(line) - 1)
    share = (wanted - length[after - 1]) / (length[after] - length[after - 1]).clamp(min=1e-12)
    return torch.lerp(line[after - 1], line[after], share[:, None]).to(codes)
