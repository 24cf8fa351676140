"""Cluster, then label: k-means whose objective also counts how impure the clusters are.

Demiriz, Bennett & Embrechts 1999, "Semi-Supervised Clustering Using Genetic Algorithms": dispersion
plus impurity, over all points and over the labelled ones. They search with a genetic algorithm;
here it is a descent like Lloyd's, none of whose steps can raise the objective. For points x_i of
weight w_i (sum W) in clusters a_i with centres c_k, and labelled weight m_kj of class j in k,

    W J = sum_i w_i d(x_i, c_{a_i}) / s  +  alpha sum_k m_k Gini_k                              (1)
    m_k Gini_k = m_k - sum_j m_kj^2 / m_k,    m_k = sum_j m_kj                                  (2)

with the squared Euclidean distance, which the mean minimises, or with the plain one, which the
geometric median minimises. The unit s is the mean of d(x_i, mean of all), so that alpha has no
scale: a labelled point joins a cluster of another class where that is nearer by more than alpha s.
With metric "pooled" d is the squared Mahalanobis distance under the clusters' pooled covariance S,
s is the number of features, and log det S / s is added to J (Friedman & Rubin 1967).
"""

import copy
import sys
import warnings
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)
from torch import Tensor

MEDIAN_STEPS = 20  # of Weiszfeld's iteration, each time the centres move
ROUNDS = 100  # at most, of clustering and then estimating the covariance
SAMPLE = 10_000  # rows from which on the starts are tried on a sample
HELD = 2**20  # numbers of a table that is small enough to keep in the clusters' coordinates
TABLE = 2**19  # numbers worked on at a time on a CPU: what its processor's cache holds
FEW = 1 / 64  # share of the points that move, below which bounds save more than they cost
LABELLED = 4096  # labelled points that are moved at a time
MANY = 256  # labelled points that would gain by a move: from here on all of them move at once


# --- impurity ---------------------------------------------------------------------------------


def weighted_gini(counts: np.ndarray) -> np.ndarray:
    """Equation 2 (K,) from the labelled weight of each cluster by class, (K, C)."""
    labelled = counts.sum(1)
    return labelled - (counts**2).sum(1) / np.where(labelled > 0, labelled, 1)


def join_change(labelled, squares, same, weight):
    """By how much equation 2 rises if a point of this weight joins a cluster.

    The cluster's m_k is `labelled`, its sum_j m_kj^2 `squares`, and `same` its weight of the
    point's class. A point that leaves lowers (2) by as much as joining what it leaves behind would
    raise it.
    """
    after, total = squares + weight * (2 * same + weight), labelled + weight
    before = squares / np.where(labelled > 0, labelled, 1)
    return weight + before - after / np.where(total > 0, total, 1)


def tangent(counts: np.ndarray) -> np.ndarray:
    """Slopes (K, C) of equation 2, which is concave: no point moved by them can raise it.

    Where a cluster has no labels there is no slope; 1 - 1/C bounds its impurity from above.
    """
    labelled = counts.sum(1, keepdims=True)
    shares = counts / np.where(labelled > 0, labelled, 1)
    slopes = 1 - 2 * shares + (shares**2).sum(1, keepdims=True)
    return np.where(labelled > 0, slopes, 1 - 1 / counts.shape[1])


def count_labels(own: np.ndarray, y: np.ndarray, w: np.ndarray, shape: tuple) -> np.ndarray:
    """Labelled weight (K, C) of each cluster by class."""
    return np.bincount(own * shape[1] + y, w, shape[0] * shape[1]).reshape(shape)


def move_changes(costs, y, w, own, counts, pull: float) -> np.ndarray:
    """By how much s W J changes (M, K) if a point i alone moves from its cluster a to b:

        w_i (costs_ib - costs_ia) + pull (join_b - join_a)                                      (3)

    with the join_change of b, and of a without i; see move_labelled.
    """
    rows, labelled, squares = np.arange(len(y)), counts.sum(1), (counts**2).sum(1)
    join = join_change(labelled, squares, counts.T[y], w[:, None])
    same, left = counts[own, y] - w, squares[own] - w * (2 * counts[own, y] - w)
    leave = join_change(labelled[own] - w, left, same, w)
    change = w[:, None] * (costs - costs[rows, own][:, None]) + pull * (join - leave[:, None])
    change[rows, own] = 0
    return change


def move_labelled(costs, y, w, own, counts, pull: float) -> np.ndarray:
    """The clusters (M,) of labelled points after moves that each lower (1), until none does.

    `costs` (M, K) are distances up to a constant per point, `y`, `w` and `own` (M,) classes,
    weights and clusters, `counts` (K, C) the labelled weight of all points; `pull` is alpha s.
    Equation (3) is computed for all points at once. If many would gain, all go where distance plus
    tangent is least; else those that would gain are examined again one by one, in the order of
    their gain, as the counts change.
    """
    own, counts = own.copy(), counts.copy()
    least = 1e-12 * w * (np.abs(costs).max(initial=0) + pull)  # a smaller change is rounding
    while True:
        gain = -move_changes(costs, y, w, own, counts, pull).min(1)
        gainers = np.flatnonzero(gain > least)
        if not len(gainers):
            return own
        if len(gainers) > MANY:
            to = (costs + pull * tangent(counts).T[y]).argmin(1)
            if (to != own).any():
                of = (y, w, counts.shape)
                counts += count_labels(to, *of) - count_labels(own, *of)
                own = to
                continue
        for i in gainers[np.argsort(-gain[gainers], kind="stable")]:
            one = slice(i, i + 1)
            (change,) = move_changes(costs[one], y[one], w[one], own[one], counts, pull)
            b = change.argmin()
            if change[b] < -least[i]:
                counts[own[i], y[i]] -= w[i]
                counts[b, y[i]] += w[i]
                own[i] = b


# --- points and centres -----------------------------------------------------------------------


@contextmanager
def one_thread():
    """Torch's operations by one thread: most here are too small to gain by more, and sums keep
    their order. Freed memory is kept for the next operation, not taken back page by page.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.empty(2**19)  # glibc keeps blocks smaller than the largest that was freed
    try:
        yield
    finally:
        torch.set_num_threads(count)


def slices(count: int, size: int) -> list[slice]:
    """Slices of `count` rows of at most `size` each, of about the same length."""
    parts = -(-count // size)
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


class Points:
    """Rows x (N, D), codes y (N,) of their classes or -1, and weights w (N,).

    Seen in the coordinates (x - shift) @ whiten, which are made when they are asked for, so that a
    table needs no second copy in memory, and may lie in a file (numpy.memmap).
    """

    def __init__(self, x: Tensor, y, w, shift: Tensor, whiten: Tensor | None = None):
        self.x, self.y, self.w, self.shift = x, y, w, shift.to(x)
        self.whiten = None if whiten is None else whiten.to(x)
        self.held = self.seen(x) if x.numel() <= HELD else None

    def __len__(self) -> int:
        return len(self.x)

    def seen(self, rows: Tensor) -> Tensor:
        rows = rows - self.shift
        return rows if self.whiten is None else rows @ self.whiten

    def part(self, rows: slice | Tensor) -> Tensor:
        """Coordinates (n, D) of some of the points."""
        of = self.x if self.held is None else self.held
        of = of[rows] if isinstance(rows, slice) else of.index_select(0, rows)
        return self.seen(of) if self.held is None else of

    def parts(self, size: int = 0):
        """Pairs of a slice and its points."""
        for rows in slices(len(self), size or chunk_of(self.x, 16)):
            yield rows, self.part(rows)

    def seen_by(self, shift: Tensor, whiten: Tensor | None = None) -> "Points":
        return Points(self.x, self.y, self.w, shift, whiten)

    def labelled(self, code: int) -> Tensor:
        return (self.y == code).nonzero()[:, 0]


def chunk_of(x: Tensor, clusters: int) -> int:
    """Points at a time: what fits a processor's cache, or fills a GPU."""
    if x.device.type != "cpu":
        return max(512, 2**26 // clusters)
    return max(512, TABLE // (clusters + x.shape[1]))


def squared_costs(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (K, n) of centres (K, D) and points (n, D), less |x|^2."""
    return torch.addmm(centres.square().sum(1)[:, None], centres, points.T, alpha=-2)


def nearest_centre(points: Tensor, centres: Tensor, second: bool = False):
    """The nearest of the centres (K, D) of points (n, D), and its squared distance less |x|^2.

    With `second` also by how much the second is farther at least, less than 0 where rounding may
    hide which of them is nearer.
    """
    centres, clusters = centres.to(points), len(centres)
    costs = squared_costs(points, centres)
    best = costs.amin(0)
    hit = torch.eq(costs, best, out=torch.empty_like(costs) if second else costs)  # 1. or 0.
    number = torch.arange(clusters, 2 * clusters).to(points) @ hit  # faster than min with indices
    near = number.int() - clusters
    if number.max() >= 2 * clusters:  # of equally near ones the first
        tied = (number >= 2 * clusters).nonzero()[:, 0]
        near[tied] = hit.index_select(1, tied).max(0).indices.int()
    if not second:
        return near, best
    square = squares(points)
    rounding = torch.finfo(points.dtype).eps * (8 + points.shape[1] / 4)
    rounding = rounding * (square + centres.square().sum(1).max())
    farther = costs.add_(hit, alpha=torch.finfo(points.dtype).max / 4).amin(0)
    margin = (farther + square - rounding).clamp(min=0).sqrt()
    margin -= (best + square + rounding).clamp(min=0).sqrt()
    margin[number >= 2 * clusters] = -float("inf")
    return near, best, margin


def places(mask: Tensor) -> Tensor:
    """Where the mask (n,) is true; numpy is several times as fast as torch."""
    if mask.device.type != "cpu":
        return mask.nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def squares(points: Tensor) -> Tensor:
    """|x|^2 (n,) of points (n, D)."""
    return points.square() @ points.new_ones(points.shape[1])


def cluster_sums(points: Tensor, w: Tensor, own: Tensor, clusters: int) -> np.ndarray:
    """Sums (K, D + 1) of w x and w over the points (n, D) of each cluster `own` (n,), float64."""
    if points.device.type != "cpu":
        ones = points.new_ones(len(points), 1)
        rows = torch.cat((points, ones), 1).double() * w[:, None]
        sums = rows.new_zeros(clusters, rows.shape[1])
        return sums.index_add_(0, own, rows).cpu().numpy()
    few = max(512, TABLE // 8 // points.shape[1])
    if len(own) > few:  # float64 takes more memory
        parts = slices(len(own), few)
        return sum(cluster_sums(points[i], w[i], own[i], clusters) for i in parts)
    weights, numbers = w.double().numpy(), own.numpy()
    if len(own) * clusters <= 2**14:
        member = (np.arange(clusters)[:, None] == numbers) * weights
    else:
        from scipy.sparse import csc_matrix  # many times as fast as index_add_

        place = (weights, numbers, np.arange(len(own) + 1, dtype=np.int32))
        member = csc_matrix(place, shape=(clusters, len(own)))
    sums = np.empty((clusters, points.shape[1] + 1))
    sums[:, :-1] = member @ points.double().numpy()
    sums[:, -1] = np.bincount(numbers, weights, clusters)
    return sums


def geometric_medians(points: Points, own: Tensor, centres: np.ndarray, chunk: int):
    """Centres (K, D) nearer to their points, whose clusters are `own` (N,), in total.

    Weiszfeld's iteration in the form of Vardi & Zhang 2000, which never raises the sum of distances
    and does not stick to a data point: where the centre is one, that point holds it back.
    """
    for _ in range(MEDIAN_STEPS):
        at, pull, here = torch.from_numpy(centres).to(points.x.device), 0, 0
        for rows, part in points.parts(chunk):
            gap, w = part.double() - at[own[rows]], points.w[rows]
            distance = gap.norm(dim=1)
            weight = torch.where(distance > 0, w / distance, 0)
            pull = pull + cluster_sums(gap, weight, own[rows], len(at))
            here = here + cluster_sums(gap, w * (distance == 0), own[rows], len(at))
        pull, weights, here = pull[:, :-1], pull[:, -1:], here[:, -1:]
        tiny = np.finfo(centres.dtype).tiny
        strength = np.linalg.norm(pull, axis=1, keepdims=True)
        held = np.minimum(here, strength) / strength.clip(tiny)  # at most 1
        centres = centres + (1 - held) * pull / weights.clip(tiny)
    return centres


def extend_start(points: Points, centres: Tensor, clusters: int, generator) -> Tensor:
    """Add points to centres (k, D), k >= 0, until there are `clusters` of them.

    k-means++ (Arthur & Vassilvitskii 2007): a point is drawn in proportion to its weight and its
    squared distance from the nearest centre so far; by weight alone where all distances are 0.
    """
    distance, w = points.x.new_full((len(points),), float("inf")), points.w

    def come_near(centre: Tensor) -> None:
        for rows, part in points.parts():
            each = (part - centre).square().sum(1)
            distance[rows] = torch.minimum(distance[rows], each)

    for centre in centres:
        come_near(centre)
    while len(centres) < clusters:
        known = distance.isfinite().all() and distance.any()
        chance = (distance.double() * w if known else w.double()).cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64).to(distance.device)
        index = torch.searchsorted(chance, drawn * chance[-1], right=True)
        centres = torch.cat((centres, points.part(index.clamp(max=len(points) - 1))))
        come_near(centres[-1])
    return centres


# --- the descent ------------------------------------------------------------------------------


class Descent:
    """Centres, clusters, and the sums from which the objective follows; no step raises it.

    Of `points` (N, D) and centres (K, D); `unit` is s, `constant` what is added to J. `sums` of the
    points and the weights of each cluster (K, D + 1) and `counts`, its labelled weight by class
    (K, C), are kept in float64 and change only by the points that move. So does the objective, in
    O(K (D + C)), if distances are squared.

    Once few points move, a point is examined again only if the centres may have moved so far that
    another could be its nearest (bounds of Hamerly 2010): `path` (K,) is how far a cluster's centre
    and the farthest moving other have come, `due` (N,) the path at which a point has to be
    examined. Labelled points, which step 3 moves, are never due.
    """

    def __init__(self, points, centres, alpha, unit, *, constant=0.0, plain=False, own=None):
        self.points, self.plain, self.own = points, plain, own
        self.history, self.whiten = [], None  # the latter only where the estimator has set it
        self.alpha, self.unit, self.constant = alpha, unit, constant
        self.labelled = (points.y >= 0).nonzero()[:, 0]
        self.y = points.y[self.labelled].cpu().numpy()
        self.w_labelled = points.w[self.labelled].double().cpu().numpy()
        self.centres = centres.double().cpu().numpy()
        self.chunk = chunk_of(points.x, len(centres))
        self.guided = bool(len(self.labelled)) and alpha > 0
        self.path, self.bounded = np.zeros(len(centres)), False
        self.due = points.x.new_full((len(points),), -float("inf"), dtype=torch.float32)
        if self.guided:
            self.due[self.labelled] = float("inf")
        self.sum_up()

    def sum_up(self) -> None:
        """Compute all sums; points without a cluster join the nearest."""
        first, (clusters, features) = self.own is None, self.centres.shape
        if first:
            self.own = torch.zeros(len(self.points), dtype=torch.int32, device=self.due.device)
        self.sums, self.square_sum = np.zeros((clusters, features + 1)), 0.0
        for rows, part in self.points.parts(self.chunk):
            if first:
                self.own[rows] = nearest_centre(part, torch.from_numpy(self.centres))[0]
            w = self.points.w[rows]
            self.sums += cluster_sums(part, w, self.own[rows], clusters)
            self.square_sum += float((part.square().sum(1) * w).sum(dtype=torch.float64))
        self.weight, self.counts = total_weight(self.points.w), self.count()
        self.settled = first  # whether the nearest centres of all points are known

    @property
    def sizes(self) -> np.ndarray:
        return self.sums[:, -1].copy()

    def count(self) -> np.ndarray:
        own = self.own[self.labelled].cpu().numpy()
        shape = (len(self.centres), int(self.y.max(initial=0)) + 1)
        return count_labels(own, self.y, self.w_labelled, shape)

    def move(self, index: Tensor, points: Tensor, to: Tensor) -> None:
        """Put the points `index` (n,), (n, D) into other clusters, `to` (n,)."""
        w, old, clusters = self.points.w[index], self.own[index], len(self.centres)
        self.sums += cluster_sums(points, w, to, clusters)
        self.sums -= cluster_sums(points, w, old, clusters)
        self.own[index] = to.int()

    def assign(self) -> int:
        """Step 2: points that step 3 does not move go to the nearest centre; how many moved."""
        if self.settled:
            return 0
        moved = 0
        for rows in self.late():
            moved += self.look(rows)
        if moved and not self.guided and len(self.labelled):
            self.counts = self.count()
        self.bounded |= moved < FEW * len(self.points) and len(self.points) > self.chunk
        self.settled = True
        return moved

    def late(self) -> list[slice | Tensor]:
        """The points that have to be examined again, in parts; all if that is not much more."""
        if self.bounded:
            path, late = torch.from_numpy(self.path).to(self.due), []
            for rows in slices(len(self.points), 2**18):
                mask = self.due[rows] < path.index_select(0, self.own[rows])
                late.append(places(mask).int() + rows.start)
            late = torch.cat(late)
            if 4 * len(late) < len(self.points):
                return late.split(self.chunk)
        return slices(len(self.points), self.chunk)

    def look(self, rows: slice | Tensor) -> int:
        """Step 2 for some of the points: how many moved."""
        points = self.points.part(rows)
        near, _, *margin = nearest_centre(points, torch.from_numpy(self.centres), self.bounded)
        change = near != self.own[rows]
        if self.guided or self.bounded:
            due = self.due[rows]
            change &= due < float("inf")
        if self.bounded:
            path = torch.from_numpy(self.path).to(points).index_select(0, near)
            self.due[rows] = torch.where(due < float("inf"), margin[0] + path, due).float()
        change = places(change)
        if len(change):
            index = change + rows.start if isinstance(rows, slice) else rows[change]
            self.move(index, points.index_select(0, change), near[change])
        return len(change)

    def move_labelled(self) -> int:
        """Step 3: labelled points go where the whole objective is lower; how many moved."""
        moved = 0
        if not self.guided:
            return moved
        for start in range(0, len(self.labelled), LABELLED):
            rows = slice(start, start + LABELLED)
            index = self.labelled[rows]
            points, own = self.points.part(index), self.own[index].cpu().numpy()
            y, w, costs = self.y[rows], self.w_labelled[rows], self.costs(points)
            to = move_labelled(costs, y, w, own, self.counts, self.alpha * self.unit)
            (change,) = np.nonzero(to != own)
            if len(change):
                change = torch.from_numpy(change).to(index)
                to = torch.from_numpy(to).to(index.device)
                self.move(index[change], points[change], to[change])
                self.counts = self.count()
                moved += len(change)
        return moved

    def costs(self, points: Tensor) -> np.ndarray:
        """Distances (n, K) of points (n, D) from the centres; squared ones without |x|^2."""
        points, centres = points.double(), torch.from_numpy(self.centres).to(points.device)
        if self.plain:
            return torch.cdist(points, centres).cpu().numpy()
        return squared_costs(points, centres).T.contiguous().cpu().numpy()

    def update_centres(self) -> None:
        """Step 4: centres to the mean, or towards the median, of their points."""
        before = self.centres
        self.fill_empty()
        if self.plain:
            self.centres = geometric_medians(self.points, self.own, self.centres, self.chunk)
        else:
            sizes = self.sizes[:, None]
            means = self.sums[:, :-1] / np.where(sizes > 0, sizes, 1)
            self.centres = np.where(sizes > 0, means, self.centres)
        steps = np.linalg.norm(self.centres - before, axis=1)
        others = np.full(len(steps), steps.max())
        others[steps.argmax()] = np.delete(steps, steps.argmax()).max(initial=0)
        self.path = self.path + (steps + others) * (1 + 1e-6)
        self.settled &= not steps.any()

    def fill_empty(self) -> None:
        """Move the centres of empty clusters to the points farthest from their centres.

        Its distance vanishes, and a cluster that is split is not less pure, so the objective falls.
        A cluster stays empty where all other points lie on their centres (duplicates).
        """
        if self.sizes.min() > 1e-9 * self.weight / len(self.points):
            return
        members = torch.bincount(self.own, minlength=len(self.centres)).cpu().numpy()
        empty = np.flatnonzero(members == 0)
        if not len(empty):
            return
        distance = self.distances() * (self.points.w > 0)
        for cluster in empty:
            single = torch.from_numpy(members < 2).to(self.own.device)
            distance[single[self.own]] = 0  # would leave another cluster empty
            farthest = distance.argmax()[None]
            if distance[farthest] <= 0:
                break
            members[int(self.own[farthest])] -= 1
            members[cluster] += 1
            point, to = self.points.part(farthest), torch.full_like(farthest, int(cluster))
            self.move(farthest, point, to)
            if self.due[farthest] < float("inf"):
                self.due[farthest] = -float("inf")
            self.centres = self.centres.copy()
            self.centres[cluster] = point[0].double().cpu().numpy()
            distance[farthest] = 0
        self.counts = self.count()

    def distances(self) -> Tensor:
        """Distance (N,) of each point from its own centre, squared or plain."""
        parts, centres = [], torch.from_numpy(self.centres).to(self.own.device)
        for rows, points in self.points.parts(self.chunk):
            square = (points.double() - centres[self.own[rows]]).square().sum(1)
            parts.append(square.sqrt() if self.plain else square)
        return torch.cat(parts)

    def dispersion(self) -> float:
        """The first term of equation 1, divided by W."""
        if self.plain:
            return float((self.distances() * self.points.w).sum()) / self.weight / self.unit
        cross = (self.centres * self.sums[:, :-1]).sum()
        own = (self.centres**2).sum(1) @ self.sizes
        return float(max(0.0, self.square_sum - 2 * cross + own) / self.weight / self.unit)

    def impurity(self) -> float:
        """The mean Gini of the labelled points' clusters, between 0 and 1; 0 without labels."""
        return float(weighted_gini(self.counts).sum() / max(self.w_labelled.sum(), 1e-300))

    def objective(self) -> float:
        penalty = self.alpha * weighted_gini(self.counts).sum() / self.weight
        return float(self.constant + self.dispersion() + penalty)

    def iterate(self) -> dict:
        """Steps 2, 3 and 4 once; the objective before and after each, and what has moved."""
        row = {"before": self.objective()}
        row["assigned"] = self.assign()
        row["after_assign"] = self.objective() if row["assigned"] else row["before"]
        row["labelled_moved"] = self.move_labelled()
        row["after_move"] = self.objective() if row["labelled_moved"] else row["after_assign"]
        self.update_centres()
        row["after_centres"] = self.objective()
        return row | {"dispersion": self.dispersion(), "impurity": self.impurity()}

    def run(self, max_iter: int, tol: float) -> list[dict]:
        """Steps 2 to 4 until the objective stops falling; a row per iteration."""
        history = self.history
        while len(history) < max_iter:
            history.append(self.iterate())
            before, after = history[-1]["before"], history[-1]["after_centres"]
            if before - after <= tol * abs(before - self.constant):
                break
        self.assign()  # so that labels_ of unlabelled points are the nearest centres, as later
        return history


# --- the estimator ----------------------------------------------------------------------------


class ClusterThenLabel(ClassifierMixin, ClusterMixin, BaseEstimator):
    """Semi-supervised k-means with scikit-learn's conventions; -1 or NaN in y is unlabelled.

    Takes numpy arrays, tables of pandas and tensors, and returns tensors for tensors.

    n_clusters     None: one per class, 8 if nothing is labelled
    alpha          weight of impurity: 0 is k-means, from about 10 on labels are hardly ever mixed
    metric         "euclidean", or "pooled": Mahalanobis under the clusters' pooled covariance
    distance       "squared" (centre: mean) or "plain" (centre: geometric median)
    init           "labelled" (means of the classes, further centres by k-means++), "k-means++", or
                   the centres (K, D) themselves
    n_init         starts, of which the lowest objective is kept
    max_iter, tol  an iteration that lowers J by at most the share tol of it is the last
    shrinkage      share of the features' variances that is added to the pooled covariance
    sample         of more rows than this the starts are tried on a sample; None: never
    """

    def __init__(
        self,
        n_clusters: int | None = None,
        alpha: float = 1.0,
        *,
        metric: Literal["euclidean", "pooled"] = "euclidean",
        distance: Literal["squared", "plain"] = "squared",
        init: str | np.ndarray | Tensor = "labelled",
        n_init: int = 10,
        max_iter: int = 300,
        tol: float = 0.0,
        shrinkage: float = 1e-2,
        sample: int | None = SAMPLE,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.n_clusters, self.alpha = n_clusters, alpha
        self.metric, self.distance = metric, distance
        self.init, self.n_init, self.max_iter, self.tol = init, n_init, max_iter, tol
        self.shrinkage, self.sample, self.random_state = shrinkage, sample, random_state

    def fit(self, x, y=None, sample_weight=None):
        """Cluster x (N, D), of which y (N,) labels some. Raises ValueError in one line."""
        rows = self.check_rows(x, reset=True)
        y = self.check_labels(y, rows)
        w = torch.ones(1).expand(len(rows))
        if sample_weight is not None:
            w = torch.from_numpy(_check_sample_weight(as_array(sample_weight), as_array(x)))
            if not (w.min() >= 0 and w.sum() > 0):
                raise ValueError("sample_weight: expected numbers of at least 0, not all of them 0")
        self.clusters_ = self.n_clusters
        if self.n_clusters is None:
            self.clusters_ = len(self.classes_) or min(8, len(rows))
        self.check_settings(len(rows))
        generator = torch.Generator()
        generator.manual_seed(int(check_random_state(self.random_state).randint(2**31)))
        with one_thread():
            points = Points(rows, y, w.to(rows.device), torch.zeros(rows.shape[1]))
            self.shift_ = mean_of(points)
            best = self.best_start(points.seen_by(self.shift_), generator)
            self.keep(best, x)
        return self

    # what is fitted

    def best_start(self, points: Points, generator: torch.Generator) -> Descent:
        """The fit of the lowest objective; of many rows, the starts are tried on a sample."""
        tried = self.draw_sample(points, generator)
        self.unit_ = self.unit_of(points)
        drawn = isinstance(self.init, str) and (
            self.init == "k-means++" or self.clusters_ > len(self.classes_)
        )  # otherwise all starts are the same
        fits = [self.descend(tried, None, generator) for _ in range(self.n_init if drawn else 1)]
        self.n_iter_total_ = sum(len(fit.history) for fit in fits)
        best = min(fits, key=Descent.objective)
        if tried is not points:
            start = best.centres, best.whiten
            del tried, fits, best  # the sample's rows need not stay in memory
            best = self.descend(points, start, generator)
            self.n_iter_total_ += len(best.history)
        return best

    def draw_sample(self, points: Points, generator: torch.Generator) -> Points:
        """A random share of the unlabelled rows, weighted to stand for all, and labelled ones."""
        if self.sample is None or len(points) <= self.sample:
            return points
        taken, shares = torch.zeros_like(points.y, dtype=torch.bool), []
        for group in (points.y >= 0, points.y < 0):
            size = int(group.sum())
            count = min(size, max(self.sample // 2, len(points) // 10))
            chosen = torch.randperm(size, generator=generator, dtype=torch.int32)[:count]
            marks = torch.zeros(size, dtype=torch.bool)
            marks[chosen.long()] = True
            taken.masked_scatter_(group, marks.to(group.device))
            shares.append(size / max(count, 1))
        index = taken.nonzero()[:, 0]
        w, y = points.w[index], points.y[index]
        w = torch.where(y >= 0, w * shares[0], w * shares[1])
        return Points(points.x[index], y, w, points.shift)

    def unit_of(self, points: Points) -> float:
        """s of equation 1."""
        if self.metric == "pooled":
            return float(points.x.shape[1])
        sum_of = 0.0
        for rows, part in points.parts():
            square = part.square().sum(1)
            each = square.sqrt() if self.distance == "plain" else square
            sum_of += float((each * points.w[rows]).sum(dtype=torch.float64))
        return sum_of / total_weight(points.w) or 1.0

    def descend(self, points: Points, start: tuple | None, generator) -> Descent:
        """Until the objective stops falling, from centres and coordinates `start` or its own."""
        if self.metric == "pooled":
            return self.descend_pooled(points, start, generator)
        centres = self.start(points, generator) if start is None else torch.from_numpy(start[0])
        descent = Descent(points, centres, self.alpha, self.unit_, plain=self.distance == "plain")
        descent.run(self.max_iter, self.tol)
        return descent

    def descend_pooled(self, points: Points, start: tuple | None, generator) -> Descent:
        """Cluster in whitened coordinates and estimate the covariance, alternately.

        With W the clusters' covariance and V the features' variances, S = W + shrinkage V is the
        minimum of tr(S^-1 (W + shrinkage V)) + log det S, so neither step raises J.
        """
        scatter, prior = self.scatter(points)
        own, history, previous = None, [], np.inf
        if start is None:
            centres, covariance = None, self.labelled_covariance(points, scatter) + prior
        else:
            centres, whiten = start
            centres = centres @ np.linalg.inv(whiten)
            covariance = np.linalg.inv(whiten @ whiten.T)
        for _ in range(ROUNDS):
            whiten, constant = whitening(covariance, prior)
            seen = points.seen_by(self.shift_, torch.from_numpy(whiten))
            first = centres is None
            at = self.start(seen, generator) if first else torch.from_numpy(centres @ whiten)
            descent = Descent(seen, at, self.alpha, self.unit_, constant=constant, own=own)
            history += descent.run(self.max_iter, self.tol)
            objective, own = descent.objective(), descent.own
            if not previous - objective > max(self.tol, 1e-9) or len(history) >= self.max_iter:
                break
            previous, centres = objective, descent.centres @ np.linalg.inv(whiten)
            covariance = scatter - (centres.T * descent.sizes) @ centres / descent.weight + prior
        descent.history, descent.whiten = history, whiten
        return descent

    def scatter(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Covariance of all points (D, D), and the diagonal matrix that is added to S."""
        covariance = 0
        for rows, part in points.parts():
            square = part.T @ (part * points.w[rows, None].to(part))
            covariance = covariance + square.double().cpu().numpy()
        covariance = covariance / total_weight(points.w)
        variances = np.diag(covariance)
        prior = self.shrinkage * np.where(variances > 0, variances, 1)
        return covariance, np.diag(prior)

    def labelled_covariance(self, points: Points, whole: np.ndarray) -> np.ndarray:
        """Within the labelled classes, shrunk towards `whole` (D, D) as if by D points."""
        scatter, weight = len(whole) * whole, len(whole)
        for label in range(len(self.classes_)):
            index = points.labelled(label)
            x, w = points.x[index].double().cpu().numpy(), points.w[index].double().cpu().numpy()
            if w.sum() > 0:
                gap = x - np.average(x, axis=0, weights=w)
                scatter, weight = scatter + (gap.T * w) @ gap, weight + w.sum()
        return scatter / weight

    def start(self, points: Points, generator: torch.Generator) -> Tensor:
        """Centres (K, D); of more classes than clusters, those with most labels have one."""
        if not isinstance(self.init, str):
            return points.seen(torch.as_tensor(self.init).to(points.x))
        centres = points.part(slice(0, 0))
        if self.init == "labelled":
            members = [points.labelled(label) for label in range(len(self.classes_))]
            sizes = np.array([float(points.w[index].sum()) for index in members])
            for label in np.argsort(-sizes, kind="stable")[: self.clusters_]:
                index = members[label]
                w = points.w[index].to(centres)
                w = w if sizes[label] > 0 else torch.ones_like(w)
                mean = (points.part(index) * w[:, None]).sum(0) / w.sum()
                centres = torch.cat((centres, mean[None]))
        return extend_start(points, centres, self.clusters_, generator)

    # what is taken and kept

    def check_rows(self, x, reset: bool) -> Tensor:
        """x as a tensor (N, D) of float32 or float64, without a copy where it is one already."""
        array = validate_data(self, as_array(x), dtype=[np.float64, np.float32], reset=reset)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize > 2:
            return x.detach()
        with warnings.catch_warnings():  # a table that may not be written to is only read
            warnings.simplefilter("ignore", UserWarning)
            rows = torch.from_numpy(array)
        return rows.to(x.device) if isinstance(x, Tensor) else rows

    def check_labels(self, y, rows: Tensor) -> Tensor:
        """Codes (N,) of the classes, of which `classes_` is made; -1 where unlabelled."""
        if y is None:
            y = np.full(len(rows), -1, dtype=np.int8)
        y = column_or_1d(as_array(y), warn=True)
        check_consistent_length(rows, y)
        if y.dtype.kind == "f" and np.isinf(y).any():
            raise ValueError("y: expected classes, -1 or NaN, found infinity (inf)")
        known = ~is_unlabelled(y)
        named = y[known]
        if y.dtype.kind == "f" and (named == np.round(named)).all():
            named = named.astype(int)  # NaN has made numbers of classes floating-point
        with warnings.catch_warnings():  # few labels, many classes: the rule here
            warnings.simplefilter("ignore", UserWarning)
            check_classification_targets(named)
        if y.dtype == object and len({type(value) for value in named} - {str}) == 0:
            named = named.astype(str)
        self.classes_, named = np.unique(named, return_inverse=True)
        codes = np.full(len(rows), -1, np.int8 if len(self.classes_) < 128 else np.int32)
        codes[known] = named
        return torch.from_numpy(codes).to(rows.device)

    def check_settings(self, count: int) -> None:
        if not 1 <= self.clusters_ <= count:
            raise ValueError(f"n_clusters: expected 1 to {count} (n_samples), not {self.clusters_}")
        if not (self.alpha >= 0 and self.n_init > 0 and self.max_iter > 0 and self.tol >= 0):
            raise ValueError("expected alpha, tol of at least 0 and n_init, max_iter of at least 1")
        for name, choices in (
            ("metric", ("euclidean", "pooled")),
            ("distance", ("squared", "plain")),
            ("init", ("labelled", "k-means++")),
        ):
            value = getattr(self, name)
            if isinstance(value, str) and value not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, found {value!r}")
        if self.metric == "pooled" and self.distance == "plain":
            raise ValueError("distance: with metric pooled only squared is possible")
        shape = (self.clusters_, self.n_features_in_)
        if not isinstance(self.init, str):
            init = np.asarray(as_array(self.init))
            if init.shape != shape or not np.isfinite(init).all():
                raise ValueError(f"init: expected {shape} centres, all of them finite")

    def keep(self, descent: Descent, x) -> None:
        whiten = descent.whiten
        self.objective_, self.impurity_ = descent.objective(), descent.impurity()
        self.history_, self.n_iter_ = descent.history, len(descent.history)  # of the best start
        self.whiten_ = None if whiten is None else torch.from_numpy(whiten)
        self.shift_ = self.shift_.cpu()
        self.centres_ = torch.from_numpy(descent.centres)  # in the clusters' coordinates
        centres = descent.centres if whiten is None else descent.centres @ np.linalg.inv(whiten)
        centres = torch.from_numpy(centres + self.shift_.numpy()).to(descent.points.x.dtype)
        self.cluster_centers_ = give(centres.numpy(), x)
        self.labels_ = give(descent.own.cpu().numpy(), x)
        self.label_clusters(descent.counts, descent.centres)

    def label_clusters(self, counts: np.ndarray, centres: np.ndarray) -> None:
        """Class shares (K, C) of the clusters among their labelled points.

        A cluster without any takes those of the nearest cluster that has some.
        """
        has = counts.sum(1) > 0
        if has.any():
            gaps = np.linalg.norm(centres[:, None] - centres[None, has], axis=2)
            source = np.where(has, np.arange(len(has)), np.flatnonzero(has)[gaps.argmin(1)])
            counts = counts[source]
        self.cluster_probs_ = counts / np.where(has.any(), counts.sum(1, keepdims=True), 1)

    def relabel(self, y) -> "ClusterThenLabel":
        """A copy with the same clusters, whose classes are those of y (N,) for the rows of fit."""
        other = copy.copy(self)
        codes = other.check_labels(y, self.labels_).cpu().numpy()
        known, own = codes >= 0, as_array(self.labels_)
        shape = (self.clusters_, max(1, len(other.classes_)))
        counts = count_labels(own[known], codes[known], np.ones(known.sum()), shape)
        other.impurity_ = float(weighted_gini(counts).sum() / max(1, known.sum()))
        other.label_clusters(counts, self.centres_.numpy())
        return other

    def state(self) -> dict:
        """What predicting needs, as torch.save and weights_only take it; see from_state."""
        return {
            "shift": self.shift_,
            "whiten": self.whiten_,
            "centres": self.centres_,
            "probs": torch.from_numpy(self.cluster_probs_),
        }

    @classmethod
    def from_state(cls, state: dict, classes: list) -> "ClusterThenLabel":
        """An estimator that predicts as the one that gave `state`; its classes get these names."""
        model = cls(len(state["centres"]))
        model.shift_, model.whiten_ = state["shift"], state["whiten"]
        model.centres_, model.cluster_probs_ = state["centres"], state["probs"].numpy()
        model.clusters_, model.n_features_in_ = state["centres"].shape[0], len(state["shift"])
        model.classes_ = np.array(classes)
        return model

    # what is predicted

    def nearest(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Nearest cluster (N,) and distance from its centre (N,), in the clusters' coordinates."""
        check_is_fitted(self)
        rows = self.check_rows(x, reset=False)
        clusters, distances = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
        points = Points(rows, None, None, self.shift_, self.whiten_)
        with one_thread():
            for part, inputs in points.parts(chunk_of(rows, self.clusters_)):
                near, best = nearest_centre(inputs, self.centres_)
                distance = (best + squares(inputs)).clamp(min=0).sqrt()
                clusters[part], distances[part] = near.cpu().numpy(), distance.cpu().numpy()
        return clusters, distances

    def cluster(self, x):
        """The cluster (N,) with the nearest centre."""
        return give(self.nearest(x)[0], x)

    def cluster_with_class(self, x) -> np.ndarray:
        """As `cluster`. Raises ValueError if no point of fit was labelled."""
        clusters, _ = self.nearest(x)
        if not len(self.classes_):
            raise ValueError("predict: no point was labelled, so that clusters have no classes")
        return clusters

    def predict_proba(self, x):
        """Shares (N, C) of the classes `classes_` among the labelled points of x's clusters."""
        clusters = self.cluster_with_class(x)
        return give(self.cluster_probs_[clusters], x)

    def predict(self, x):
        """The most frequent class (N,) in the cluster; of equally frequent ones the first."""
        clusters = self.cluster_with_class(x)
        return give(self.classes_[self.cluster_probs_.argmax(1)][clusters], x)

    def score(self, x, y, sample_weight=None) -> float:
        """Accuracy of `predict` on the rows that y (N,) labels."""
        known = ~is_unlabelled(column_or_1d(as_array(y), warn=True))
        if not known.any():
            raise ValueError("score: no row is labelled")
        right = as_array(self.predict(x))[known] == as_array(y)[known]
        weights = None if sample_weight is None else as_array(sample_weight)[known]
        return float(np.average(right, weights=weights))


def whitening(covariance: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, float]:
    """A (D, D) with A A' = S^-1, and what S adds to J: (log det S + tr(S^-1 prior)) / D."""
    scale = np.sqrt(np.diag(covariance))  # features may have very different units
    values, vectors = np.linalg.eigh(covariance / scale / scale[:, None])
    values = values.clip(1e-12)
    whiten = vectors / np.sqrt(values) / scale[:, None]
    added = np.log(values).sum() + 2 * np.log(scale).sum() + (whiten.T @ prior @ whiten).trace()
    return whiten, float(added / len(values))


def mean_of(points: Points) -> Tensor:
    """Weighted mean (D,) of the rows; small numbers: no cancellation in |c|^2 - 2 x.c."""
    few = max(512, TABLE // 8 // points.x.shape[1])
    sums = sum(part.double().T @ points.w[rows].double() for rows, part in points.parts(few))
    return (sums / total_weight(points.w)).to(points.x.dtype).double()


def total_weight(w: Tensor) -> float:
    """Sum of the weights (N,) in float64, of which no copy is made."""
    return sum(float(part.sum(dtype=torch.float64)) for part in w.split(2**17))


def as_array(x):
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else x


def give(array: np.ndarray, like):
    """A tensor on the device of `like`, if that is a tensor, else the array."""
    if not isinstance(like, Tensor) or array.dtype.kind not in "biuf":
        return array
    if array.dtype == np.int32:
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)


def is_unlabelled(y: np.ndarray) -> np.ndarray:
    """Where y (N,) is -1, NaN or None."""
    if y.dtype.kind in "fiu":
        return (y == -1) | (y != y)
    if y.dtype.kind != "O":
        return np.zeros(len(y), dtype=bool)
    unknown = getattr(sys.modules.get("pandas"), "NA", None)
    return np.array([v is None or v is unknown or v != v or v == -1 for v in y], dtype=bool)
