"""Self-training: which pictures get a pseudo-label, and which round is kept.

Thresholds by class: Wang et al. 2023, "FreeMatch" (arXiv 2205.07246), equations 5 to 8. Labels of
weakly on strongly augmented pictures: Sohn et al. 2020, "FixMatch" (arXiv 2001.07685). Balance of
the classes: Sinkhorn & Knopp 1967, as in SwAV (arXiv 2006.09882). Averaged teacher: Tarvainen &
Valpola 2017 (arXiv 1703.01780). `plain`: Lee 2013, "Pseudo-Label"; Cascante-Bonilla et al. 2021,
"Curriculum Labeling" (arXiv 2001.06001). Temperature: Guo et al. 2017, "On Calibration".
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

NONE = -1  # the pseudo-label of a picture that has none


def conv_norm_relu(inputs: int, outputs: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class SmallCNN(nn.Module):
    """Class logits (N, classes) from images (N, channels, H, W) in [0, 1], 8 pixels and up."""

    def __init__(self, *, channels: int, width: int, classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            *conv_norm_relu(channels, width),
            nn.MaxPool2d(2),
            *conv_norm_relu(width, 2 * width),
            nn.MaxPool2d(2),
            *conv_norm_relu(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * width, classes),
        )
        if channels > 1:  # 40% less time on a CPU; 10% with grey pictures of 8 x 8 pixels
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees (N, 16 * width)."""
        return self.layers[:-1](x)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """The teacher: exponential means of the weights and of batch normalisation's statistics."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


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


class Labels(NamedTuple):
    """What a network predicts for each picture of the pool (N,)."""

    predicted: Tensor  # its most probable class; NONE where it did not look
    label: Tensor  # the pseudo-label, which the next round learns; NONE where it is not sure
    confidence: Tensor  # the label's probability when it was given, 0 where there is none


def no_labels(count: int, device: torch.device | None = None) -> Labels:
    nothing = torch.full((count,), NONE, device=device)
    return Labels(nothing, nothing.clone(), torch.zeros_like(nothing, dtype=torch.float64))


def next_labels(
    before: Labels,
    probs: Tensor,
    fingerprints: Tensor,
    *,
    add: int,
    threshold: float,
    balanced: bool,
    revise: bool,
) -> Labels:
    """The labels after a round, from those before it and calibrated probs (N, C).

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
    return Labels(predicted, label, confidence)


def by_confidence(confidence: Tensor, fingerprints: Tensor) -> Tensor:
    """Indices (N,), the surest first; ties go by the pictures' fingerprints, not their places."""
    order = fingerprints.argsort(stable=True)
    return order[confidence[order].argsort(descending=True, stable=True)]


def rank_in_class(classes: Tensor, count: int) -> Tensor:
    """For each entry (N,) how many before it have its class."""
    seen = F.one_hot(classes, count).cumsum(0)
    return seen.gather(1, classes[:, None])[:, 0] - 1


# --- labels by a teacher, with thresholds by class --------------------------------------------


def balance(probs: Tensor, turns: int = 5) -> Tensor:
    """Probabilities (N, C) whose mean over the pictures is near 1 / C for each class.

    Each turn divides by the classes' means, then makes each row sum to 1 again.
    """
    for _ in range(turns):
        probs = probs / probs.mean(0)
        probs = probs / probs.sum(1, keepdim=True)
    return probs


def class_thresholds(class_means: Tensor, confidence: Tensor) -> Tensor:
    """FreeMatch, equation 8: the mean confidence, lower for classes that are predicted less.

    tau_c = m_c / max m * mean_i max_c p_ic, where m_c (C,) is the mean probability of class c.
    """
    return class_means / class_means.max() * confidence


def confident_labels(probs: Tensor, *, balanced: bool) -> Labels:
    """From probs (N, C), those pictures labelled whose confidence reaches the class's threshold."""
    predicted = probs.argmax(1)
    probs = balance(probs) if balanced else probs
    confidence, label = probs.max(1)
    sure = confidence >= class_thresholds(probs.mean(0), confidence.mean())[label]
    return Labels(predicted, torch.where(sure, label, NONE), torch.where(sure, confidence, 0.0))


class LiveLabels(nn.Module):
    """Labels for a batch at a time: what confident_labels does, with running means."""

    def __init__(self, classes: int, *, balanced: bool, momentum: float = 0.95):
        super().__init__()
        self.balanced, self.momentum = balanced, momentum
        self.register_buffer("predicted", torch.full((classes,), 1 / classes))
        self.register_buffer("class_means", torch.full((classes,), 1 / classes))
        self.register_buffer("confidence", torch.tensor(1 / classes))

    def forward(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (N,) and weights (N,), 0 or 1, from the teacher's probabilities (N, C)."""
        self.predicted.lerp_(probs.mean(0), 1 - self.momentum)
        if self.balanced:
            probs = probs / self.predicted
            probs = probs / probs.sum(1, keepdim=True)
        confidence, label = probs.max(1)
        self.class_means.lerp_(probs.mean(0), 1 - self.momentum)
        self.confidence.lerp_(confidence.mean(), 1 - self.momentum)
        return label, confidence >= class_thresholds(self.class_means, self.confidence)[label]


# --- which round stays ------------------------------------------------------------------------


def share_changed(before: Tensor, after: Tensor) -> float:
    """The share of pictures whose predicted class (N,) changed, of those predicted both times.

    1 if there is none: NONE is the class of a picture that was not looked at.
    """
    both = (before != NONE) & (after != NONE)
    return float((before[both] != after[both]).double().mean()) if both.any() else 1.0


def best_round(scores: list[float]) -> int:
    """The round, 0 included, with the lowest score; the first of equals."""
    return scores.index(min(scores))


def label_quality(labels: Tensor, truth: Tensor, classes: int) -> dict:
    """How many pseudo-labels (N,) there are, the share that is right, and both by pseudo-label.

    Pictures whose `truth` is NONE, not known, are left out. None where there is nothing to divide
    by.
    """
    given = (labels != NONE) & (truth != NONE)
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


SKLEARN = ("neighbours", "logistic", "spreading")


def sklearn_accuracy(
    name: str, labelled: tuple[Tensor, Tensor], pool: Tensor, test: tuple[Tensor, Tensor]
) -> dict:
    """Test accuracies of scikit-learn's classifiers, by the setting of each, from (N, D) and (N,).

    neighbours, logistic: SelfTrainingClassifier, which adds all predictions above 0.75, neither
    calibrated nor balanced, until there are none, or for ten rounds. spreading: LabelSpreading.
    """
    from sklearn.exceptions import ConvergenceWarning  # imported where it is used: it is slow
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier

    x, pool, test_x = (part.flatten(1).cpu().numpy() for part in (labelled[0], pool, test[0]))
    y, truth = labelled[1].cpu().numpy(), test[1].cpu().numpy()
    fewest = int(np.bincount(y).min())
    kinds = {
        "neighbours": [
            (f"k={k}", SelfTrainingClassifier(KNeighborsClassifier(k))) for k in {1, min(3, fewest)}
        ],
        "logistic": [
            (f"C={c}", SelfTrainingClassifier(LogisticRegression(C=c, max_iter=300)))
            for c in (1, 10)
        ],
        "spreading": [
            (f"k={k}", LabelSpreading(kernel="knn", n_neighbors=min(k, len(x) + len(pool))))
            for k in (5, 7, 10)
        ],
    }
    everything = np.vstack((x, pool))
    labels = np.append(y, np.full(len(pool), NONE))  # scikit-learn calls a missing label -1, too
    scores = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # a picture that no label reaches
        for setting, classifier in kinds[name]:
            classifier.fit(everything, labels)
            scores[setting] = float(classifier.score(test_x, truth))
    return scores
