"""A network with two heads for pictures of leaves: one names the disease, one makes a map of them.

The map is an embedding, in two dimensions, shaped by a triplet loss with hard mining: every picture
nearer to the most different one of its class than to the most similar one of another.

Run it with `python cotton_triplet/train.py`, or `python cotton_triplet/train.py --margin 0.5`.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, NamedTuple

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
    find_program,
    load,
    pk_batches,
    pretrained_weights,
    thumbnails,
)
from model import (
    Outputs,
    TwoHeads,
    collapsed,
    in_plane,
    make_trunk,
    mine,
    nearest,
    other_pairs,
    pair_distances,
    relative,
    retrieval_scores,
    triplet_loss,
    trunk_width,
    within_to_between,
)
from plots import (
    plot_confusion,
    plot_curves,
    plot_film,
    plot_maps,
    plot_retrieval,
    plot_thumbnails,
    plot_triplets,
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
    resnet: str
    widths: tuple[Width, ...]
    weights: Literal["none", "imagenet"]
    frozen_epochs: Annotated[int, ">= 0", "<= 100000"]
    trunk_lr: Rate
    precision: Literal["auto", "float32", "bfloat16"]
    embedding_size: Annotated[int, ">= 2", "<= 4096"]
    triplet_weight: Annotated[float, ">= 0", "<= 1"]
    mining: Literal["gradual", "hard", "semihard", "all"]
    relative_margin: bool
    margin: Annotated[float, "> 0", "<= 1000"]
    soft_margin: bool
    classes_per_batch: Annotated[int, ">= 2", "<= 1000"]
    pictures_per_class: Annotated[int, ">= 2", "<= 1000"]
    epochs: Epochs
    lr: Rate
    weight_decay: Decay
    compare: bool
    ablation: bool

    def __post_init__(self) -> None:
        if self.weights == "imagenet" and (self.resnet == "small" or self.resnet.endswith(".pt2")):
            raise ValueError("weights: imagenet is for a classifier of torchvision; expected none")
        if self.ablation and not self.compare:
            raise ValueError("ablation: expected false where compare is false")


class Source(NamedTuple):
    """What a trunk begins with: pretrained weights, an exported program, or neither."""

    state: dict[str, Tensor] | None
    program: bytes | None

    def pretrained(self) -> bool:
        return self.state is not None or self.program is not None


def main() -> None:
    config, run, device = start_run(Config, __doc__)
    source = load_source(config)
    data = load_data(config, device)
    open_run(run, config, data.name, data.classes, data.train, data.val, data.test, *source)
    weights = {"both": config.triplet_weight, "no_triplet": 0.0, "no_cls": 1.0}
    models, outputs, metrics = {}, {}, {}
    if config.compare:
        metrics["baselines"] = baselines(new_model(data, config, source, device), data)
    for method in METHODS if config.ablation else ["both"]:
        models[method] = new_model(data, config, source, device)
        fit(models[method], method, weights[method], data, config, run)
        outputs[method] = {part: predict(models[method], getattr(data, part)) for part in PARTS}
        metrics[method] = test_numbers(outputs[method], data)
    rows = read_rows(run, "both")
    metrics["data"] = data.numbers | {part: len(getattr(data, part).x) for part in PARTS}
    metrics["parameters"] = sum(part.numel() for part in models["both"].parameters())
    metrics["collapsed_epochs"] = sum(row["collapsed"] for row in rows)
    metrics["timing"] = timing(outputs["both"]["train"].embedding, rows, data, config)
    plot_results(metrics, outputs, rows, data, config, run)
    save_model(models["both"], outputs["both"]["train"], source, data, config, run)
    finish_run(
        run,
        config,
        dataset=data.name,
        headline=headline(metrics),
        metrics=metrics,
        use=f"python cotton_triplet/predict.py {shlex.quote(str(run))} PICTURE...",
    )


def load_source(config: Config) -> Source:
    """Raises DataError if the weights cannot be had, or there is no such network."""
    state, program = None, None
    if config.resnet.endswith(".pt2"):
        program = find_program(config.resnet, config.data_dir)
    try:
        trunk_width(make_trunk(config.resnet, config.widths, program=program), config.image_size)
    except ValueError as error:
        raise DataError(f"resnet: {error}") from error
    if config.weights == "imagenet":
        from torchvision.models import get_model_weights  # imported where it is used: it is slow

        url = get_model_weights(config.resnet).DEFAULT.url
        state = pretrained_weights(url, config.data_dir)
    return Source(state, program)


def load_data(config: Config, device: torch.device) -> Data:
    data = load(
        dataset=config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        leaf_count=config.leaf_count,
        same_bits=config.same_bits,
        seed=config.seed,
    )
    batch = min(config.classes_per_batch, len(data.classes)) * config.pictures_per_class
    if batch > 2048:  # triplets are counted in billions
        raise DataError(f"pictures_per_class: {batch} pictures in a batch; expected at most 2048")
    sizes = ", ".join(f"{part} {len(getattr(data, part).x)}" for part in PARTS)
    print(f"{data.note}; {sizes}")
    return data.to(device)


# --- training ---------------------------------------------------------------------------------


def new_model(data: Data, config: Config, source: Source, device: torch.device) -> TwoHeads:
    """All methods begin with the same weights."""
    seed_everything(config.seed, "initialisation")
    trunk = make_trunk(config.resnet, config.widths, state=source.state, program=source.program)
    model = TwoHeads(
        trunk,
        trunk_width(trunk, config.image_size),
        classes=len(data.classes),
        embedding_size=config.embedding_size,
        pretrained=source.pretrained(),
    )
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

    The score weighs accuracy and precision@1 as the loss weighs its two terms. A pretrained trunk
    is frozen for the first epochs, then learns at a rate of its own.
    """
    y = data.train.y.cpu()
    steps = count_batches(y, config.classes_per_batch, config.pictures_per_class)
    optimizer = torch.optim.AdamW(rate_groups(model, config), weight_decay=config.weight_decay)
    peaks, total = [group["lr"] for group in optimizer.param_groups], config.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=total)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for row in epochs(run, method, parts, config.epochs, config.seed, best=("val_score", max)):
        seed_everything(config.seed, row["epoch"])  # each method sees the same pictures
        model.freeze_trunk(model.pretrained and row["epoch"] <= config.frozen_epochs)
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
            print(warning(row, config.mining))


def warning(row: dict, mining: str) -> str:
    """Of an epoch whose map is lost."""
    advice = "a smaller lr" if mining == "gradual" else "mining gradual, or a smaller lr"
    return (
        "warning: no map yet, or no longer: pictures of one class lie "
        f"{row['within_to_between']:.2f} times as far apart as those of two, which are "
        f"{row['mean_distance']:.2g} apart; if it stays so: {advice}"
    )


def rate_groups(model: TwoHeads, config: Config) -> list[dict]:
    """The optimizer's groups: heads and trunk."""
    trunk = list(model.trunk.parameters())
    heads = [*model.classify.parameters(), *model.embed.parameters()]
    trunk_lr = config.trunk_lr if model.pretrained else config.lr
    return [{"params": heads, "lr": config.lr}, {"params": trunk, "lr": trunk_lr}]


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
    half, sums = use_bfloat16(config), []
    for chosen in tqdm(order, label, leave=False, disable=None):
        chosen = chosen.to(train.x.device)
        x, y = augment(train.x[chosen].float() / 255), train.y[chosen]
        out = model(x, half=half)
        cls_loss = F.cross_entropy(out.logits, y)
        distance = pair_distances(out.embedding, out.embedding)
        mined = triplet_loss(in_units(distance, config), y, config.mining, margin_of(config))
        loss = (1 - triplet_weight) * cls_loss + triplet_weight * mined.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean_distance = distance.sum() / max(1, len(y) * (len(y) - 1))
        watched = (cls_loss, *mined, mean_distance, within_to_between(distance, y))
        sums.append(torch.stack([number.detach().float() for number in watched]))
    names = ("train_cls_loss", "train_triplet_loss", "active_triplets", "hard_share")
    names += ("mean_distance", "within_to_between")
    row = dict(zip(names, (sum_losses(sums, label) / len(order)).tolist(), strict=True))
    unit = 0.0 if config.relative_margin else config.margin
    row["collapsed"] = int(collapsed(row["within_to_between"], row["mean_distance"], unit))
    return row


def in_units(distance: Tensor, config: Config) -> Tensor:
    """The distances (N, N) in which the margin is meant."""
    return relative(distance) if config.relative_margin else distance


def margin_of(config: Config) -> float | None:
    return None if config.soft_margin else config.margin


# --- evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: TwoHeads, examples: Examples) -> Outputs:
    """The model's outputs for all examples, in float32."""
    model.eval()
    parts = [model(x) for x, _ in batches(examples, BATCH)]
    return Outputs(*(torch.cat(part) for part in zip(*parts, strict=True)))


def evaluate(outputs: Outputs, y: Tensor, triplet_weight: float) -> dict[str, float]:
    """Of the validation images; each one's nearest neighbour is sought among the others, if its
    class has any. Without such images the score is the accuracy.
    """
    accuracy = float((outputs.logits.argmax(1) == y).double().mean())
    distance = pair_distances(outputs.embedding, outputs.embedding)
    neighbour = distance.masked_fill(~other_pairs(len(y), y.device), torch.inf).argmin(1)
    paired = y.bincount()[y] > 1
    precision = float((y[neighbour] == y)[paired].double().mean())
    both = (1 - triplet_weight) * accuracy + triplet_weight * precision
    return {
        "val_cls_loss": float(F.cross_entropy(outputs.logits.double(), y)),
        "val_accuracy": accuracy,
        "val_precision_at_1": precision,
        "val_score": both if paired.any() else accuracy,
    }


def test_numbers(outputs: dict[str, Outputs], data: Data) -> dict:
    """metrics.json's numbers on the test images, which are used here and nowhere before."""
    from sklearn.metrics import confusion_matrix, f1_score  # imported where used: they are slow

    y, predicted = data.test.y.cpu(), outputs["test"].logits.argmax(1).cpu()
    metrics = {
        "accuracy": float((y == predicted).double().mean()),
        "macro_f1": float(f1_score(y, predicted, average="macro")),
        "confusion": confusion_matrix(y, predicted, labels=range(len(data.classes))).tolist(),
    }
    for space in ("embedding", "features"):
        train, test = (getattr(outputs[part], space) for part in ("train", "test"))
        scores = retrieval_scores(test, data.test.y, train, data.train.y)
        metrics[space] = scores | {"silhouette": silhouette(test, data.test.y)}
    return metrics


def silhouette(points: Tensor, y: Tensor) -> float:
    """Of points (N, D) by class; NaN where it is not defined, as with one point in each class."""
    from sklearn.metrics import silhouette_score

    if not 1 < len(y.unique()) < len(y):
        return float("nan")
    return float(silhouette_score(points.cpu().numpy(), y.cpu().numpy()))


def baselines(model: TwoHeads, data: Data) -> dict[str, float]:
    """Test accuracy of linear classifiers on six numbers of colour, and on the features of a
    pretrained trunk as it came.
    """
    colours = [colour_numbers(getattr(data, part).x) for part in PARTS]
    numbers = {"colour_accuracy": linear_accuracy(colours, data)}
    if model.pretrained:
        features = [predict(model, getattr(data, part)).features for part in PARTS]
        numbers["probe_accuracy"] = linear_accuracy(features, data)
    return numbers


def colour_numbers(x: Tensor) -> Tensor:
    """Mean and standard deviation (N, 6) of red, green and blue of uint8 images."""
    parts = [block.float().flatten(2) for block in x.split(BATCH)]
    return torch.cat([torch.cat((part.mean(2), part.std(2)), 1) for part in parts])


def linear_accuracy(inputs: list[Tensor], data: Data) -> float:
    """Of a logistic regression on inputs (N, F) of PARTS, its penalty chosen on validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, val, test = (part.cpu().double().numpy() for part in inputs)
    y, val_y, test_y = (getattr(data, part).y.cpu().numpy() for part in PARTS)
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(train, y)
        for c in (0.01, 0.1, 1.0, 10.0)
    ]
    return float(max(models, key=lambda model: model.score(val, val_y)).score(test, test_y))


def timing(embedding: Tensor, rows: list[dict], data: Data, config: Config) -> dict[str, float]:
    """Images per second in training, the share of mining in a step, and its seconds for 512."""
    own = min(config.classes_per_batch, len(data.classes)) * config.pictures_per_class
    steps = count_batches(data.train.y.cpu(), config.classes_per_batch, config.pictures_per_class)
    seconds = median(row["train_seconds"] for row in rows) / steps
    return {
        "train_images_per_second": own / seconds,
        "mining_share": mining_seconds(embedding, data.train.y, own, config) / seconds,
        "mining_seconds_at_512": mining_seconds(embedding, data.train.y, 512, config),
    }


def mining_seconds(embedding: Tensor, y: Tensor, size: int, config: Config) -> float:
    """Of `size` random images, from embedding (N, D) to loss."""
    times = []
    for _ in range(4):
        chosen = torch.randint(len(y), (size,), device=y.device)
        began = clock(y)
        distance = pair_distances(embedding[chosen], embedding[chosen])
        triplet_loss(in_units(distance, config), y[chosen], config.mining, margin_of(config))
        times.append(clock(y) - began)
    return median(times[1:])


def clock(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


# --- report -----------------------------------------------------------------------------------


def headline(metrics: dict) -> dict[str, float]:
    both = metrics["both"]
    numbers = {name: both[name] for name in ("accuracy", "macro_f1")}
    spaces = ("precision_at_1", "map_at_r", "silhouette")
    numbers |= {name: both["embedding"][name] for name in spaces}
    return numbers | metrics.get("baselines", {})


def save_model(
    model: TwoHeads, outputs: Outputs, source: Source, data: Data, config: Config, run: Path
) -> None:
    """model.pt: all that predict.py needs, the map of the training pictures too."""
    program = source.program
    gallery = {
        "embedding": outputs.embedding.cpu(),
        "y": data.train.y.cpu(),
        "names": list(data.names),
        "thumbnails": thumbnails(data.train.x).cpu(),
    }
    description = {
        "project": "cotton_triplet",
        "resnet": config.resnet,
        "widths": list(config.widths),
        "program": torch.frombuffer(bytearray(program), dtype=torch.uint8) if program else None,
        "pretrained": source.pretrained(),
        "image_size": config.image_size,
        "embedding_size": config.embedding_size,
        "classes": list(data.classes),
        "dataset": data.name,
        "gallery": gallery,
        "weights": model.state_dict(),
    }
    save(run / "model.pt", description)


def plot_results(
    metrics: dict, outputs: dict, rows: list[dict], data: Data, config: Config, run: Path
) -> None:
    both, y = metrics["both"], data.test.y.cpu().numpy()
    title = f"{data.name}: test accuracy {both['accuracy']:.3f}, "
    title += f"precision@1 {both['embedding']['precision_at_1']:.3f}"
    colour = metrics.get("baselines", {}).get("colour_accuracy")
    try_plot(plot_curves, rows, colour, config.mining, title, run / "curves.png")
    try_plot(plot_confusion, both["confusion"], data.classes, title, run / "confusion.png")
    maps = {METHODS[method]: lay_out(outputs[method], data) for method in outputs}
    first = maps[METHODS["both"]]
    axis = "dimension" if config.embedding_size == 2 else "component"
    what = f"{data.name}: the embedding with and without each term of the loss"
    try_plot(plot_maps, {"": first}, data.classes, axis, title, run / "embedding.png")
    if config.ablation:
        try_plot(plot_maps, maps, data.classes, axis, what, run / "ablation.png")
    images = thumbnails(data.test.x).permute(0, 2, 3, 1).cpu().numpy()
    path = run / "thumbnails.png"
    try_plot(plot_thumbnails, first["test"][0], images, y, data.classes, axis, title, path)
    film = film_strip(run / "film-both.pt")
    labels = data.val.y.cpu().numpy()
    try_plot(plot_film, film, labels, data.classes, axis, data.name, run / "film.png")
    shown = hardest_triplets(outputs["both"]["test"].embedding, data.test)
    if shown:
        try_plot(plot_triplets, shown, data.classes, title, run / "triplets.png")
    found = neighbours(outputs["both"], data)
    try_plot(plot_retrieval, found, data.classes, title, run / "retrieval.png")


def film_strip(path: Path) -> dict[int, np.ndarray]:
    """Places (N, 2) of the validation images by epoch, all seen as the last."""
    frames = read_torch(path)
    plane = in_plane(frames[max(frames)])
    return {epoch: plane(points) for epoch, points in frames.items()}


def lay_out(outputs: dict[str, Outputs], data: Data) -> dict:
    """The points of plot_maps."""
    plane, y = in_plane(outputs["train"].embedding), data.test.y
    return {
        "train": (plane(outputs["train"].embedding), data.train.y.cpu().numpy()),
        "test": (plane(outputs["test"].embedding), y.cpu().numpy()),
        "wrong": (outputs["test"].logits.argmax(1) != y).cpu().numpy(),
    }


def hardest_triplets(embedding: Tensor, examples: Examples) -> list[dict]:
    """For each class the anchor whose d(a, p) - d(a, n) is largest, for plot_triplets."""
    distance, chosen = pair_distances(embedding, embedding), []
    anchor, positive, negative = mine(distance, examples.y, "hard")
    pairs = torch.stack((distance[anchor, positive], distance[anchor, negative]), 1)
    for label in examples.y[anchor].unique():
        gap = (pairs[:, 0] - pairs[:, 1]).masked_fill(examples.y[anchor] != label, -torch.inf)
        place = gap.argmax()
        rows = torch.stack((anchor[place], positive[place], negative[place]))
        images = examples.x[rows].permute(0, 2, 3, 1).cpu().numpy()
        labels = examples.y[rows].tolist()
        chosen.append({"images": images, "labels": labels, "distances": pairs[place].tolist()})
    return chosen


def neighbours(outputs: dict[str, Outputs], data: Data, most: int = 8) -> list[dict]:
    """For plot_retrieval: the first test image of each class, then of each the first whose nearest
    training image is of another; with the five nearest.
    """
    distances, rows = nearest(outputs["test"].embedding, outputs["train"].embedding, 5)
    y, found = data.test.y, data.train.y[rows]
    wrong = found[:, 0] != y
    firsts = [(y == label).nonzero()[:1, 0] for label in range(len(data.classes))]
    missed = [((y == label) & wrong).nonzero()[:1, 0] for label in range(len(data.classes))]
    chosen = torch.cat(firsts[: most // 2] + missed + firsts[most // 2 :]).tolist()
    return [
        {
            "query": data.test.x[place].permute(1, 2, 0).cpu().numpy(),
            "label": int(y[place]),
            "images": data.train.x[rows[place]].permute(0, 2, 3, 1).cpu().numpy(),
            "labels": found[place].tolist(),
            "distances": distances[place].tolist(),
        }
        for place in list(dict.fromkeys(chosen))[:most]
    ]


if __name__ == "__main__":
    run_main(main, DataError)
