"""A ResNet with two heads on pictures of leaves: one names the disease, one makes a map of them.

The map is an embedding, in two dimensions, shaped by a triplet loss with hard mining: every picture
nearer to the most different one of its class than to the most similar one of another.

Run it with `python cotton_triplet/train.py`, or `python cotton_triplet/train.py --margin 0.5`.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (
    Data,
    DataError,
    Examples,
    augment,
    batches,
    count_batches,
    load,
    pk_batches,
    pretrained_weights,
)
from model import (
    Outputs,
    TwoHeads,
    active_share,
    collapsed,
    euclidean,
    make_trunk,
    mean_distance,
    mean_or_zero,
    mine,
    resting_loss,
    triplet_losses,
)
from plots import plot_confusion, plot_curves, plot_film, plot_maps, plot_triplets
from run import (
    Decay,
    Epochs,
    Rate,
    Seed,
    Width,
    epochs,
    finish_run,
    open_run,
    read_rows,
    read_torch,
    run_main,
    save,
    seed_everything,
    start_run,
    sum_losses,
    try_plot,
)

PARTS = ("train", "val", "test")
METHODS = {"both": "both terms", "no_triplet": "no triplet term", "no_cls": "no cls term"}
BATCH = 256  # images at a time where nothing is learned


@dataclass(frozen=True)
class Config:
    """Names, types and bounds; values and their comments stand in config.yaml."""

    dataset: Literal["leaves", "folder"]
    data_dir: Path
    out_dir: Path
    device: str
    seed: Seed
    image_size: Annotated[int, ">= 16", "<= 1024"]
    leaf_count: Annotated[int, ">= 60", "<= 1000000"]
    same_bits: Annotated[int, ">= 0", "<= 128"]
    resnet: Literal["small", "resnet18", "resnet34", "resnet50"]
    widths: tuple[Width, ...]
    weights: Literal["none", "imagenet"]
    precision: Literal["auto", "float32", "bfloat16"]
    embedding_size: Annotated[int, ">= 2", "<= 4096"]
    triplet_weight: Annotated[float, ">= 0", "<= 1"]
    mining: Literal["hard", "semihard", "all"]
    margin: Annotated[float, "> 0", "<= 1000"]
    soft_margin: bool
    classes_per_batch: Annotated[int, ">= 2", "<= 1000"]
    pictures_per_class: Annotated[int, ">= 2", "<= 1000"]
    epochs: Epochs
    lr: Rate
    weight_decay: Decay
    ablation: bool

    def __post_init__(self) -> None:
        if self.resnet == "small" and self.weights == "imagenet":
            raise ValueError("weights: expected none with resnet small, found 'imagenet'")


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    data = load_data(config, device)
    state = pretrained(config)
    open_run(run, config, data.name, data.classes, data.train, data.val, data.test)
    weights = {"both": config.triplet_weight, "no_triplet": 0.0, "no_cls": 1.0}
    models, said, metrics = {}, {}, {}
    for method in METHODS if config.ablation else ["both"]:
        models[method] = new_model(data, config, state, device)
        fit(models[method], method, weights[method], data, config, run)
        said[method] = {part: predict(models[method], getattr(data, part)) for part in PARTS}
        metrics[method] = test_numbers(said[method], data)
    rows = read_rows(run, "both")
    metrics["data"] = data.numbers | {part: len(getattr(data, part).x) for part in PARTS}
    metrics["parameters"] = sum(part.numel() for part in models["both"].parameters())
    metrics["collapsed_epochs"] = sum(row["collapsed"] for row in rows)
    metrics["timing"] = timing(models["both"], rows, data, config)
    plot_results(metrics, said, rows, data, config, run)
    save_model(models["both"], said["both"]["train"], data, config, run)
    finish_run(
        run,
        config,
        dataset=data.name,
        headline=headline(metrics),
        metrics=metrics,
        use=f"python cotton_triplet/predict.py {run} PICTURE...",
    )


def load_data(config: Config, device: torch.device) -> Data:
    data = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        leaf_count=config.leaf_count,
        same_bits=config.same_bits,
        seed=config.seed,
    )
    print(data.note)
    return data.to(device)


# --- training ---------------------------------------------------------------------------------


def pretrained(config: Config) -> dict | None:
    """ImageNet weights, None for random ones. Raises DataError if they cannot be had."""
    from torchvision.models import get_model_weights  # imported where it is used: it is slow

    if config.weights == "none":
        return None
    url = get_model_weights(config.resnet).IMAGENET1K_V1.url
    return pretrained_weights(url, config.data_dir)


def new_model(data: Data, config: Config, state: dict | None, device: torch.device) -> TwoHeads:
    """All methods begin with the same weights."""
    seed_everything(config.seed, "initialisation")
    trunk, width = make_trunk(config.resnet, config.widths, state)
    model = TwoHeads(trunk, width, classes=len(data.classes), embedding_size=config.embedding_size)
    return model.to(device, memory_format=torch.channels_last)


def use_bfloat16(config: Config) -> bool:
    """With `auto`, where the device multiplies in bfloat16 faster than in float32."""
    if config.precision == "auto":
        return config.device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return config.precision == "bfloat16"


def fit(
    model: TwoHeads, method: str, triplet_weight: float, data: Data, config: Config, run: Path
) -> None:
    """Leaves the weights of the best validation score in `model`.

    The score weighs accuracy and precision@1 as the loss weighs its two terms.
    """
    y = data.train.y.cpu()
    steps = count_batches(y, config.classes_per_batch, config.pictures_per_class)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    total = config.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=total)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for row in epochs(run, method, parts, config.epochs, config.seed, best=("val_score", max)):
        seed_everything(config.seed, row["epoch"])  # each method sees the same pictures
        began, label = time.perf_counter(), f"{method} epoch {row['epoch']}"
        order = pk_batches(y, config.classes_per_batch, config.pictures_per_class)
        row |= train_one_epoch(
            model, data.train, order, optimizer, schedule, triplet_weight, config, label
        )
        row["train_seconds"] = time.perf_counter() - began
        outputs = predict(model, data.val)
        row |= evaluate(outputs, data.val.y, triplet_weight)
        keep_frame(run / f"film-{method}.pt", row["epoch"], outputs.embedding.cpu())
        if row["collapsed"] and triplet_weight:
            print(
                f"warning: the embedding is collapsed: a loss of {row['train_triplet_loss']:.3f} "
                "is that of a single point; if it stays so: semihard mining, or a smaller lr"
            )


def keep_frame(path: Path, epoch: int, embedding: Tensor) -> None:
    """Add what an epoch made of the validation images to the film strip's file."""
    frames = read_torch(path) if path.exists() else {}
    save(path, frames | {epoch: embedding})


def train_one_epoch(
    model: TwoHeads,
    train: Examples,
    order: list[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    triplet_weight: float,
    config: Config,
    label: str,
) -> dict[str, float]:
    """Means over the batches of `order`, all of one size. Raises FloatingPointError if a loss was
    not finite.
    """
    model.train()
    half, margin = use_bfloat16(config), margin_of(config)
    sums = []
    for chosen in tqdm(order, label, leave=False, disable=None):
        chosen = chosen.to(train.x.device)
        x, y = augment(train.x[chosen].float() / 255), train.y[chosen]
        out = model(x, half=half)
        cls_loss = F.cross_entropy(out.logits, y)
        losses = triplet_losses(out.embedding, mine(out.embedding, y, config.mining), margin)
        triplet_loss = mean_or_zero(losses, out.embedding)
        loss = (1 - triplet_weight) * cls_loss + triplet_weight * triplet_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        watched = (
            cls_loss,
            triplet_loss,
            active_share(losses, margin),
            mean_distance(out.embedding),
        )
        sums.append(torch.stack([number.detach() for number in watched]))
    names = ("train_cls_loss", "train_triplet_loss", "active_triplets", "mean_distance")
    means = sum_losses(sums, label) / len(order)
    row = dict(zip(names, means.tolist(), strict=True))
    row["collapsed"] = int(collapsed(row["train_triplet_loss"], row["mean_distance"], margin))
    return row


def margin_of(config: Config) -> float | None:
    return None if config.soft_margin else config.margin


# --- evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: TwoHeads, examples: Examples) -> Outputs:
    """What the model says of all examples, in float32."""
    model.eval()
    parts = [model(x) for x, _ in batches(examples, BATCH)]
    return Outputs(*(torch.cat(part) for part in zip(*parts, strict=True)))


def evaluate(said: Outputs, y: Tensor, triplet_weight: float) -> dict[str, float]:
    """Of the validation images; each one's nearest neighbour is sought among the others."""
    distance = torch.cdist(said.embedding, said.embedding).fill_diagonal_(torch.inf)
    precision = float((y[distance.argmin(1)] == y).double().mean())
    accuracy = float((said.logits.argmax(1) == y).double().mean())
    return {
        "val_cls_loss": float(F.cross_entropy(said.logits.double(), y)),
        "val_accuracy": accuracy,
        "val_precision_at_1": precision,
        "val_score": (1 - triplet_weight) * accuracy + triplet_weight * precision,
    }


def test_numbers(said: dict[str, Outputs], data: Data) -> dict:
    """metrics.json's numbers on the test images, which are used here and nowhere before."""
    from sklearn.metrics import confusion_matrix, f1_score  # imported where used: they are slow

    y, predicted = data.test.y.cpu(), said["test"].logits.argmax(1).cpu()
    metrics = {
        "accuracy": float((y == predicted).double().mean()),
        "macro_f1": float(f1_score(y, predicted, average="macro")),
        "confusion": confusion_matrix(y, predicted, labels=range(len(data.classes))).tolist(),
    }
    for space in ("embedding", "features"):
        train, test = (getattr(said[part], space).cpu().numpy() for part in ("train", "test"))
        metrics[space] = retrieval(train, data.train.y.cpu(), test, y)
    return metrics


def retrieval(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor) -> dict[str, float]:
    """How test rows (N, D) lie among training rows (M, D), and apart from one another by class."""
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import KNeighborsClassifier

    scores = {}
    for name, neighbours in (("precision_at_1", 1), ("knn5_accuracy", min(5, len(train)))):
        nearest = KNeighborsClassifier(neighbours).fit(train, train_y)
        scores[name] = float(nearest.score(test, test_y))
    return scores | {"silhouette": float(silhouette_score(test, test_y))}


def timing(model: TwoHeads, rows: list[dict], data: Data, config: Config) -> dict[str, float]:
    """Images per second in training, and the share of mining in a step, also at batch size 512."""
    own = config.classes_per_batch * config.pictures_per_class
    images = own * count_batches(
        data.train.y.cpu(), config.classes_per_batch, config.pictures_per_class
    )
    numbers = {"train_images_per_second": images / median(row["seconds"] for row in rows)}
    for name, size in (("mining_share", own), ("mining_share_at_512", 512)):
        trials = [time_step(model, data.train, size, config) for _ in range(4)][1:]
        numbers[name] = median(mining / whole for whole, mining in trials)
    return numbers


def time_step(model: TwoHeads, train: Examples, size: int, config: Config) -> tuple[float, float]:
    """Seconds of a training step of a copy of the model on `size` images, and of its mining."""
    trial = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(trial.parameters())
    chosen = torch.randint(len(train.x), (size,)).to(train.x.device)
    times = [clock(train.x)]
    x, y = augment(train.x[chosen].float() / 255), train.y[chosen]
    out = trial(x, half=use_bfloat16(config))
    times.append(clock(x))
    triplets = mine(out.embedding, y, config.mining)
    times.append(clock(x))
    losses = triplet_losses(out.embedding, triplets, margin_of(config))
    (F.cross_entropy(out.logits, y) + mean_or_zero(losses, out.embedding)).backward()
    optimizer.step()
    times.append(clock(x))
    return times[3] - times[0], times[2] - times[1]


def clock(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


# --- report -----------------------------------------------------------------------------------


def headline(metrics: dict) -> dict[str, float]:
    both = metrics["both"]
    numbers = {name: both[name] for name in ("accuracy", "macro_f1")}
    return numbers | {name: both["embedding"][name] for name in ("precision_at_1", "silhouette")}


def save_model(model: TwoHeads, outputs: Outputs, data: Data, config: Config, run: Path) -> None:
    """model.pt: all that predict.py needs."""
    description = {
        "project": "cotton_triplet",
        "resnet": config.resnet,
        "widths": list(config.widths),
        "image_size": config.image_size,
        "embedding_size": config.embedding_size,
        "classes": list(data.classes),
        "weights": model.state_dict(),
    }
    save(run / "model.pt", description)


def plot_results(
    metrics: dict, said: dict, rows: list[dict], data: Data, config: Config, run: Path
) -> None:
    both = metrics["both"]
    title = f"{data.name}: test accuracy {both['accuracy']:.3f}, "
    title += f"precision@1 {both['embedding']['precision_at_1']:.3f}"
    try_plot(plot_curves, rows, resting_loss(margin_of(config)), title, run / "curves.png")
    try_plot(plot_confusion, both["confusion"], data.classes, title, run / "confusion.png")
    maps = {METHODS[method]: lay_out(said[method], data) for method in said}
    first = METHODS["both"]
    axis = "dimension" if config.embedding_size == 2 else "component"
    try_plot(plot_maps, {first: maps[first]}, data.classes, axis, title, run / "embedding.png")
    if config.ablation:
        what = f"{data.name}: the embedding with and without each term of the loss"
        try_plot(plot_maps, maps, data.classes, axis, what, run / "ablation.png")
    frames = read_torch(run / "film-both.pt")
    plane = in_plane(frames[max(frames)])
    frames = {epoch: plane(points) for epoch, points in frames.items()}
    labels = data.val.y.cpu().numpy()
    try_plot(plot_film, frames, labels, data.classes, axis, data.name, run / "film.png")
    triplets = hardest_triplets(said["both"]["test"].embedding, data.test)
    try_plot(plot_triplets, triplets, data.classes, title, run / "triplets.png")


def in_plane(points: Tensor) -> Callable[[Tensor], np.ndarray]:
    """What takes points (M, D) to the plane: principal components of `points`, if D is over 2."""
    from sklearn.decomposition import PCA

    if points.shape[1] == 2:
        return lambda others: others.cpu().numpy()
    components = PCA(2).fit(points.cpu().numpy())
    return lambda others: components.transform(others.cpu().numpy())


def lay_out(said: dict[str, Outputs], data: Data) -> dict:
    """The points of plot_maps."""
    plane, y = in_plane(said["train"].embedding), data.test.y
    wrong = (said["test"].logits.argmax(1) != y).cpu().numpy()
    train = (plane(said["train"].embedding), data.train.y.cpu().numpy())
    return {
        "train": train,
        "test": (plane(said["test"].embedding), y.cpu().numpy()),
        "wrong": wrong,
    }


def hardest_triplets(embedding: Tensor, examples: Examples) -> list[dict]:
    """For each class the anchor whose d(a, p) - d(a, n) is largest, for plot_triplets."""
    triplets = mine(embedding, examples.y, "hard")
    a, p, n = (embedding[rows] for rows in triplets)
    distances = torch.stack((euclidean(a, p), euclidean(a, n)), 1)
    gap, chosen = distances[:, 0] - distances[:, 1], []
    for label in examples.y[triplets.anchor].unique():
        place = gap.masked_fill(examples.y[triplets.anchor] != label, -torch.inf).argmax()
        rows = torch.stack([part[place] for part in triplets])
        images = examples.x[rows].permute(0, 2, 3, 1).cpu().numpy()
        chosen.append({"images": images, "labels": examples.y[rows].tolist()})
        chosen[-1]["distances"] = distances[place].tolist()
    return chosen


if __name__ == "__main__":
    run_main(main, DataError)
