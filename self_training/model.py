"""Self-training: which pictures get a pseudo-label, how sure the network must be, when to stop.

Lee 2013, "Pseudo-Label"; Cascante-Bonilla et al. 2021, "Curriculum Labeling" (arXiv 2001.06001),
which starts every round from the same weights and chooses all pseudo-labels anew (`revise`);
Guo et al. 2017, "On Calibration of Modern Neural Networks", for the temperature. A pseudo-label
weighs as much in the loss as a true one (Lee raises its weight slowly).
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NONE = -1  # the pseudo-label of a picture that has none


def conv(inputs: int, outputs: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class SmallCNN(nn.Module):
    """Class logits (N, classes) from images (N, channels, H, W) in [0, 1], 8 pixels and up."""

    def __init__(self, *, channels: int, width: int, classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            *conv(channels, width),
            nn.MaxPool2d(2),
            *conv(width, 2 * width),
            nn.MaxPool2d(2),
            *conv(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * width, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def fit_temperature(logits: Tensor, y: Tensor, low: float = 0.2, high: float = 5.0) -> float:
    """The T in [low, high] that minimises the mean cross-entropy of logits (N, C) / T.

    Guo et al., equation 9. With b = 1 / T the loss is convex and its derivative, the mean of
    sum_c p_c z_c - z_y, grows with b: bisection finds the zero. The bounds hold T where every
    validation picture is right, which would send it to 0.
    """
    logits, below, above = logits.double(), 1 / high, 1 / low
    own = logits.gather(1, y[:, None])[:, 0]
    for _ in range(50):
        middle = (below + above) / 2
        slope = ((middle * logits).softmax(1) * logits).sum(1) - own
        below, above = (below, middle) if float(slope.mean()) > 0 else (middle, above)
    return 2 / (below + above)


def calibrated_probs(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities (N, C) in float64, in which fewer confidences round to exactly 1."""
    return (logits.double() / temperature).softmax(1)


class PseudoLabels(NamedTuple):
    """Of each picture of the pool (N,)."""

    label: Tensor  # a class, or NONE
    confidence: Tensor  # its calibrated probability when it was given, 0 where there is none


def no_labels(count: int, device: torch.device | None = None) -> PseudoLabels:
    confidence = torch.zeros(count, dtype=torch.float64, device=device)
    return PseudoLabels(torch.full((count,), NONE, device=device), confidence)


def next_labels(
    before: PseudoLabels,
    probs: Tensor,
    fingerprints: Tensor,
    *,
    add: int,
    threshold: float,
    balanced: bool,
    revise: bool,
) -> PseudoLabels:
    """The pseudo-labels after a round, from those before it and calibrated probs (N, C).

    The surest predictions, max_c p_c >= threshold, are taken: at most `add` more than there were.
    balanced: no class gets more than its equal part of the places, however sure the network is.
    revise: all pseudo-labels are chosen anew, so one may change or be withdrawn; else they stay.
    """
    confidence, predicted = probs.max(1)
    held = before.label != NONE
    places = add + int(held.sum()) if revise else add
    eligible = confidence >= threshold if revise else (confidence >= threshold) & ~held
    order = by_confidence(confidence, fingerprints)
    order = order[eligible[order]]
    if balanced:
        quota = math.ceil(places / probs.shape[1])
        order = order[rank_in_class(predicted[order], probs.shape[1]) < quota]
    chosen = torch.zeros_like(held)
    chosen[order[:places]] = True
    kept = torch.zeros_like(held) if revise else held
    label = torch.where(kept, before.label, torch.where(chosen, predicted, NONE))
    confidence = torch.where(kept, before.confidence, torch.where(chosen, confidence, 0.0))
    return PseudoLabels(label, confidence)


def by_confidence(confidence: Tensor, fingerprints: Tensor) -> Tensor:
    """Indices (N,), the surest first; ties go by the pictures' fingerprints, not their places."""
    order = fingerprints.argsort(stable=True)
    return order[confidence[order].argsort(descending=True, stable=True)]


def rank_in_class(classes: Tensor, count: int) -> Tensor:
    """For each entry (N,) how many before it have its class."""
    seen = F.one_hot(classes, count).cumsum(0)
    return seen.gather(1, classes[:, None])[:, 0] - 1


def best_round(val_losses: list[float]) -> int:
    """The round, 0 included, with the lowest validation loss; the first of equals."""
    return val_losses.index(min(val_losses))


def end_of_rounds(val_losses: list[float], *, rounds: int, patience: int) -> str | None:
    """Why no further round follows on those so far, round 0 included; None if one does."""
    done = len(val_losses) - 1
    if done - best_round(val_losses) >= patience:
        return f"no lower validation loss for {patience} rounds"
    return f"all {rounds} rounds done" if done >= rounds else None


def label_quality(labels: Tensor, truth: Tensor, classes: int) -> dict:
    """How many pseudo-labels (N,) there are, the share that is right, and both by pseudo-label.

    None where there is nothing to divide by.
    """
    given = labels != NONE
    right = labels[given] == truth[given]
    counts = labels[given].bincount(minlength=classes).tolist()
    hits = labels[given][right].bincount(minlength=classes).tolist()
    return {
        "pseudo_labels": sum(counts),
        "accuracy": sum(hits) / sum(counts) if sum(counts) else None,
        "accuracy_per_class": [
            hit / count if count else None for hit, count in zip(hits, counts, strict=True)
        ],
        "share_per_class": [count / sum(counts) if sum(counts) else None for count in counts],
    }


def sklearn_accuracy(
    name: str, labelled: tuple[Tensor, Tensor], pool: Tensor, test: tuple[Tensor, Tensor]
) -> dict:
    """Test accuracy of a scikit-learn classifier, alone and in its SelfTrainingClassifier.

    From uint8 images and classes. scikit-learn adds all predictions above 0.75, uncalibrated
    and unbalanced, until there are none, or for ten rounds.
    """
    from sklearn.base import clone  # imported where it is used: it is slow
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.semi_supervised import SelfTrainingClassifier

    x, pool, test_x = (
        part.flatten(1).float().cpu().numpy() / 255 for part in (labelled[0], pool, test[0])
    )
    y, truth = labelled[1].cpu().numpy(), test[1].cpu().numpy()
    kind = {
        "neighbours": KNeighborsClassifier(min(3, int(np.bincount(y).min()))),
        "logistic": LogisticRegression(C=10, max_iter=300),
    }[name]
    unknown = np.full(len(pool), NONE)  # scikit-learn, too, calls a missing label -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        alone = clone(kind).fit(x, y)
        both = SelfTrainingClassifier(kind).fit(np.vstack((x, pool)), np.append(y, unknown))
    scores = {"supervised": alone, "self_training": both}
    return {kind: float(model.score(test_x, truth)) for kind, model in scores.items()}
