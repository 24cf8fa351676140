"""A convolutional autoencoder, a classifier over its encoder, and the optimizer Muon.

The code is linear (Hinton & Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural
Networks"), so its opponent is PCA with as many components, the best linear autoencoder (Baldi &
Hornik 1989). Muon: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

import math
from collections.abc import Iterable
from statistics import mean, stdev

import torch
from torch import Tensor, nn

SIZE = 32  # height and width of an image in pixels
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
        self.spread = nn.Sequential(
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
        return self.convolutions(self.spread(code))


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

    def vary(self, x: Tensor, deviation: Tensor) -> Tensor:
        """New images: the codes of x with normal noise of `deviation` (code_size,), decoded."""
        codes = self.encoder(x)
        noise = torch.randn(codes.shape).to(codes.device)  # the same on every device
        return self.decode(codes + deviation * noise)

    def interpolate(self, ends: Tensor, count: int) -> Tensor:
        """`count` images on the line between the codes of two images (2, 3, 32, 32)."""
        one, other = self.encoder(ends)
        share = torch.linspace(0, 1, count, device=ends.device)[:, None]
        return self.decode((1 - share) * one + share * other)


class Classifier(nn.Module):
    """Class logits (N, classes) from images (N, 3, 32, 32): encoder, standardised code, linear.

    A code is as small or large as its decoder likes it; without `standardise` a fresh head would
    start from logits of any size.
    """

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.encoder = encoder
        size = encoder.code.out_features
        self.register_buffer("code_mean", torch.zeros(size))
        self.register_buffer("code_sd", torch.ones(size))
        self.head = nn.Linear(size, classes)

    def standardise(self, codes: Tensor) -> None:
        """From now on `features` of the images behind `codes` (N, size) have mean 0 and sd 1."""
        self.code_mean.copy_(codes.mean(0))
        self.code_sd.copy_(codes.std(0, correction=0).clamp(min=1e-6))

    def features(self, x: Tensor) -> Tensor:
        return (self.encoder(x) - self.code_mean) / self.code_sd

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Pca:
    """Reconstructions of images (N, 3, 32, 32) from `code_size` principal components.

    Fitted to images in [0, 1]; `components` are orthonormal rows (code_size, 3072).
    """

    def __init__(self, x: Tensor, code_size: int):
        from sklearn.decomposition import PCA  # imported where it is used: it is slow

        # more passes than this solver's default, so that it is exact to four digits
        solver = PCA(code_size, svd_solver="randomized", iterated_power=8, random_state=0)
        solver.fit(x.flatten(1).cpu().numpy())
        self.mean = torch.from_numpy(solver.mean_).to(x)
        self.components = torch.from_numpy(solver.components_).to(x)

    def __call__(self, x: Tensor) -> Tensor:
        code = (x.flatten(1) - self.mean) @ self.components.T
        return (code @ self.components + self.mean).view(x.shape)


def image_errors(reconstructions: Tensor, x: Tensor) -> Tensor:
    """Each image's mean squared error (N,) over channels and pixels, outputs clamped to [0, 1]."""
    return (reconstructions.clamp(0, 1) - x).double().square().flatten(1).mean(1)


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error, pixels in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))


def summarise(errors: dict[str, dict[str, Tensor]]) -> dict:
    """MSE over all images, pixels and channels and its PSNR, from each image's error (N,)."""
    numbers = {}
    for row, columns in errors.items():
        mse = {name: float(values.mean()) for name, values in columns.items()}
        numbers[row] = {n: {"mse": value, "psnr": psnr(value)} for n, value in mse.items()}
    return numbers


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


# --- comparison of starts ---------------------------------------------------------------------


def compare_starts(rows: dict[str, list[list[dict]]]) -> dict:
    """Mean and standard deviation over the seeds at each epoch, and the paired first-epoch gain."""
    numbers = {}
    for start, seeds in rows.items():
        numbers[start] = {}
        for name in ("train_loss", "val_loss", "val_accuracy"):
            by_epoch = [[row[name] for row in epoch] for epoch in zip(*seeds, strict=True)]
            numbers[start][name] = {
                "mean": [mean(values) for values in by_epoch],
                "sd": [spread(values) for values in by_epoch],
            }
        if start != "random":
            pairs = zip(seeds, rows["random"], strict=True)
            gains = [one[0]["val_accuracy"] - other[0]["val_accuracy"] for one, other in pairs]
            numbers[start]["first_epoch_gain"] = gain_of(gains)
    numbers["epochs_to_catch_up"] = catch_up(rows, "epoch")
    return numbers


def gain_of(gains: list[float]) -> dict:
    """Mean and standard error of paired differences, one for each seed."""
    return {"mean": mean(gains), "standard_error": spread(gains) / math.sqrt(len(gains))}


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def catch_up(rows: dict[str, list[list[dict]]], unit: str) -> dict[str, list[float | None]]:
    """What the random start of each seed needs to reach a pretrained start's first epoch.

    `unit` is epoch or seconds, of training alone; None if it never does.
    """
    needed = {start: [] for start in rows if start != "random"}
    for start, answers in needed.items():
        for own, random in zip(rows[start], rows["random"], strict=True):
            aim, spent, answer = own[0]["val_accuracy"], 0.0, None
            for row in random:
                spent += row["seconds"]
                if answer is None and row["val_accuracy"] >= aim:
                    answer = row["epoch"] if unit == "epoch" else spent
            answers.append(answer)
    return needed
