"""Cluster, then label: k-means whose objective also counts how impure the clusters are.

Demiriz, Bennett & Embrechts 1999, "Semi-Supervised Clustering Using Genetic Algorithms": dispersion
plus impurity, over all points and over the labelled ones. They search with a genetic algorithm;
here it is a descent in the manner of Lloyd's, each of whose steps can only lower the objective. For
points x_i in clusters a_i with centres c_k, of which m are labelled, n_kj of class j in cluster k,

    J = 1/n sum_i d(x_i, c_{a_i})  +  alpha/m sum_k m_k Gini_k                                  (1)
    m_k Gini_k = m_k - sum_j n_kj^2 / m_k,    m_k = sum_j n_kj                                  (2)

with the squared Euclidean distance, which the mean minimises, or with the plain one, which the
geometric median minimises. A cluster without labelled points has no impurity.
"""

from typing import Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor

MEDIAN_STEPS = 20  # of Weiszfeld's iteration, each time the centres move


def weighted_gini(counts: np.ndarray) -> np.ndarray:
    """Equation 2 (K,) from the labelled points of each cluster by class, (K, C)."""
    labelled = counts.sum(1)
    return labelled - (counts**2).sum(1) / np.maximum(labelled, 1)


def join_change(labelled, squares, same):
    """By how much equation 2 rises if a point joins a cluster with `same` points of its class.

    The cluster's m_k is `labelled`, its sum_j n_kj^2 `squares`, which rises by 2 same + 1. A point
    that leaves lowers (2) by as much as joining what it leaves behind would raise it.
    """
    return 1 + squares / np.maximum(labelled, 1) - (squares + 2 * same + 1) / (labelled + 1)


def move_labelled(
    costs: np.ndarray, y: np.ndarray, own: np.ndarray, counts: np.ndarray, weight: float
) -> np.ndarray:
    """The clusters (M,) of the labelled points after moves that each lower n * J, until none does.

    `costs` (M, K) are distances up to a constant per point, `y` and `own` (M,) classes and
    clusters, `counts` (K, C); `weight` is alpha * n / m. A move of point i from a to b changes
    n * J, with the join_change of b, and of a without i, by

        costs_ib - costs_ia + weight * (join_b - join_a)                                        (3)

    which takes O(K) for all b. Points are sifted all at once by the counts at hand, and those that
    would gain are taken in the order of their gain and seen again one by one, as the counts change.
    """
    own, counts, rows = own.copy(), counts.copy(), np.arange(len(y))
    labelled, squares = counts.sum(1), (counts**2).sum(1)
    least = 1e-12 * (np.abs(costs).max(initial=0) + weight)  # a smaller change is rounding

    def leave_change(a, j):
        same = counts[a, j]
        return -join_change(labelled[a] - 1, squares[a] - 2 * same + 1, same - 1)

    while True:
        join = join_change(labelled[:, None], squares[:, None], counts)
        change = costs + weight * join.T[y]
        change += (weight * leave_change(own, y) - costs[rows, own])[:, None]
        change[rows, own] = 0
        gain = -change.min(1)
        gainers = np.flatnonzero(gain > least)
        if not len(gainers):
            return own
        for i in gainers[np.argsort(-gain[gainers], kind="stable")]:
            a, j = own[i], y[i]
            join = join_change(labelled, squares, counts[:, j])
            change = costs[i] - costs[i, a] + weight * (join + leave_change(a, j))  # equation 3
            change[a] = 0
            b = change.argmin()
            if change[b] < -least:
                squares[a] -= 2 * counts[a, j] - 1
                squares[b] += 2 * counts[b, j] + 1
                for cluster, step in ((a, -1), (b, 1)):
                    counts[cluster, j] += step
                    labelled[cluster] += step
                own[i] = b


def squared_costs(x: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (K, N) of centres (K, D) and points (N, D), less |x|^2."""
    centres = centres.to(x.dtype)
    return torch.addmm(centres.square().sum(1)[:, None], centres, x.T, alpha=-2)


def nearest(x: Tensor, centres: Tensor, chunk: int) -> Tensor:
    """Which of the centres (K, D) is nearest to each point: (N,) from (N, D)."""
    return torch.cat([squared_costs(points, centres).min(0).indices for points in x.split(chunk)])


def geometric_medians(x: Tensor, own: Tensor, centres: Tensor, chunk: int) -> Tensor:
    """Centres (K, D) nearer to their points (N, D), whose clusters are `own` (N,), in total.

    Weiszfeld's iteration in the form of Vardi & Zhang 2000, which never raises the sum of distances
    and does not stick to a data point: where the centre is one, that point holds it back.
    """
    for _ in range(MEDIAN_STEPS):
        pull, weights = torch.zeros_like(centres), centres.new_zeros(len(centres), 1)
        here = torch.zeros_like(weights)
        for points, clusters in zip(x.split(chunk), own.split(chunk), strict=True):
            gap = points.double() - centres[clusters]
            distance = gap.norm(dim=1, keepdim=True)
            weight = torch.where(distance > 0, 1 / distance, 0)
            pull.index_add_(0, clusters, weight * gap)
            weights.index_add_(0, clusters, weight)
            here.index_add_(0, clusters, (distance == 0).double())
        tiny = torch.finfo(centres.dtype).tiny
        held = (here / pull.norm(dim=1, keepdim=True).clamp(min=tiny)).clamp(max=1)
        centres = centres + (1 - held) * pull / weights.clamp(min=tiny)
    return centres


def extend_start(x: Tensor, centres: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Add points of x (N, D) to centres (k, D), k >= 0, until there are `clusters` of them.

    k-means++ (Arthur & Vassilvitskii 2007): a point is drawn in proportion to its squared distance
    from the nearest centre so far; at random where all are 0.
    """
    nearest = x.new_full((len(x),), float("inf"))
    for centre in centres:
        nearest = torch.minimum(nearest, (x - centre).square().sum(1))
    while len(centres) < clusters:
        chance = nearest.double() if nearest.isfinite().all() and nearest.any() else None
        drawn = torch.rand(1, generator=generator, dtype=torch.float64).to(x.device)
        if chance is None:
            index = (drawn * len(x)).long()
        else:
            total = chance.cumsum(0)
            index = torch.searchsorted(total, drawn * total[-1], right=True).clamp(max=len(x) - 1)
        centres = torch.cat((centres, x[index]))
        nearest = torch.minimum(nearest, (x - x[index]).square().sum(1))
    return centres


class Descent:
    """Centres, clusters, and the sums from which the objective follows; each step lowers it.

    x (N, D) has mean 0; y (N,) holds classes 0 .. C - 1, or -1; centres (K, D). Clusters' sizes
    (K,), sums of points (K, D) and labelled points by class (K, C) are kept in float64 and change
    only by the points that move. So does the objective, in O(K (D + C)), if distances are squared.
    """

    def __init__(
        self, x: Tensor, y: Tensor, centres: Tensor, *, alpha: float, distance: str, chunk: int
    ):
        self.x, self.y, self.chunk, self.plain = x, y, chunk, distance == "plain"
        self.labelled = (y >= 0).nonzero()[:, 0]
        self.x_labelled = x[self.labelled]
        # without impurity a labelled point goes where it would go without its label
        self.free = (y < 0) | (alpha == 0)
        self.alpha = alpha if len(self.labelled) else 0.0
        self.centres = centres.double()
        self.square_sum = float(sum(part.double().square().sum() for part in x.split(chunk)))
        self.own = nearest(x, self.centres, chunk)
        self.sizes = torch.bincount(self.own, minlength=len(centres)).double()
        self.sums = torch.zeros_like(self.centres)
        for points, clusters in zip(x.split(chunk), self.own.split(chunk), strict=True):
            self.sums.index_add_(0, clusters, points.double())
        self.classes = int(y.max()) + 1
        self.counts = self.count_labels()

    def costs(self, x: Tensor) -> Tensor:
        """Distances (K, N) of points (N, D) from the centres; squared ones without |x|^2."""
        if self.plain:
            centres = self.centres.to(x.dtype)
            return torch.cdist(centres, x, compute_mode="donot_use_mm_for_euclid_dist")
        return squared_costs(x, self.centres)

    def count_labels(self) -> Tensor:
        """Labelled points (K, C) of each cluster by class."""
        pairs = self.own[self.labelled] * self.classes + self.y[self.labelled]
        counts = torch.bincount(pairs, minlength=len(self.centres) * self.classes)
        return counts.view(len(self.centres), self.classes).double()

    def move(self, index: Tensor, to: Tensor) -> int:
        """Put the points `index` (M,) into other clusters, `to` (M,); returns M."""
        if not len(index):
            return 0
        clusters, come_from = len(self.centres), self.own[index]
        self.sizes += torch.bincount(to, minlength=clusters)
        self.sizes -= torch.bincount(come_from, minlength=clusters)
        parts = (tensor.split(self.chunk) for tensor in (index, to, come_from))
        for points, new, old in zip(*parts, strict=True):
            change = self.sums.new_zeros(clusters, len(points))
            change.scatter_(0, new[None], 1.0).scatter_(0, old[None], -1.0)
            self.sums.addmm_(change, self.x.index_select(0, points).double())
        self.own[index] = to
        if (self.y[index] >= 0).any():
            self.counts = self.count_labels()
        return len(index)

    def assign(self) -> int:
        """Step 2: points without a label go to the nearest centre; how many have moved.

        A point stays unless another centre is strictly nearer: few need to be looked at closely.
        """
        start, index, to = 0, [], []
        for points in self.x.split(self.chunk):
            part = slice(start, start + len(points))
            costs = self.costs(points)
            better = costs.amin(0) < costs.gather(0, self.own[None, part])[0]
            moved = (better & self.free[part]).nonzero()[:, 0]
            index.append(moved + start)
            to.append(costs.index_select(1, moved).min(0).indices)
            start += len(points)
        return self.move(torch.cat(index), torch.cat(to))

    def move_labelled(self) -> int:
        """Step 3: labelled points go where the whole objective is lower; how many have moved."""
        if self.alpha == 0:
            return 0
        own, y = self.own[self.labelled], self.y[self.labelled]
        costs = self.costs(self.x_labelled).T.double().contiguous()
        arrays = (part.cpu().numpy() for part in (costs, y, own, self.counts))
        weight = self.alpha * len(self.x) / len(self.labelled)
        to = torch.from_numpy(move_labelled(*arrays, weight)).to(own.device)
        changed = to != own
        return self.move(self.labelled[changed], to[changed])

    def update_centres(self) -> None:
        """Step 4: centres to the mean, or towards the median, of their points."""
        self.fill_empty()
        if self.plain:
            self.centres = geometric_medians(self.x, self.own, self.centres, self.chunk)
        else:
            means = self.sums / self.sizes.clamp(min=1)[:, None]
            self.centres = torch.where(self.sizes[:, None] > 0, means, self.centres)

    def fill_empty(self) -> None:
        """Empty clusters start anew at the point farthest from its centre.

        Its distance vanishes, and a cluster that is split is not less pure, so the objective falls.
        A cluster stays empty where all other points lie on their centres (duplicates).
        """
        empty = (self.sizes == 0).nonzero()[:, 0]
        if not len(empty):
            return
        distance = self.distances()
        for cluster in empty:
            distance[self.sizes[self.own] < 2] = 0  # would leave another cluster empty
            farthest = distance.argmax()
            if distance[farthest] <= 0:
                return
            self.move(farthest[None], cluster[None])
            self.centres[cluster] = self.x[farthest].double()
            distance[farthest] = 0

    def distances(self) -> Tensor:
        """Distance (N,) of each point from its own centre, squared or plain."""
        parts = []
        for points, clusters in zip(
            self.x.split(self.chunk), self.own.split(self.chunk), strict=True
        ):
            gap = points.double() - self.centres[clusters]
            parts.append(gap.norm(dim=1) if self.plain else gap.square().sum(1))
        return torch.cat(parts)

    def dispersion(self) -> float:
        """The first term of equation 1."""
        if self.plain:
            return float(self.distances().mean())
        cross = (self.centres * self.sums).sum()
        own = (self.centres.square().sum(1) * self.sizes).sum()
        return max(0.0, (self.square_sum - 2 * float(cross) + float(own)) / len(self.x))

    def impurity(self) -> float:
        """The second term of equation 1 without alpha, between 0 and 1; 0 without labels."""
        return float(weighted_gini(self.counts.cpu().numpy()).sum()) / max(1, len(self.labelled))

    def objective(self) -> float:
        return self.dispersion() + self.alpha * self.impurity()

    def iterate(self) -> dict:
        """Steps 2, 3 and 4 once; the objective before and after each, and what has moved."""
        row = {"before": self.objective()}
        row["assigned"] = self.assign()
        row["after_assign"] = self.objective()
        row["labelled_moved"] = self.move_labelled()
        row["after_move"] = self.objective()
        self.update_centres()
        row["after_centres"] = self.objective()
        impurity = self.impurity()
        dispersion = row["after_centres"] - self.alpha * impurity
        return row | {"dispersion": dispersion, "impurity": impurity}


class ClusterThenLabel(BaseEstimator):
    """Semi-supervised k-means with scikit-learn's conventions; -1 in y is an unlabelled point.

    `init` is "labelled" (means of the classes, further centres by k-means++), "k-means++" or the
    centres (K, D) themselves. Of n_init starts that with the lowest objective is kept. `chunk` is
    the number of points that are worked on at a time.
    """

    def __init__(
        self,
        clusters: int,
        alpha: float = 1.0,
        *,
        distance: Literal["squared", "plain"] = "squared",
        init: str | Tensor = "labelled",
        n_init: int = 10,
        max_iter: int = 300,
        tol: float = 0.0,
        random_state: int = 0,
        chunk: int | None = None,
    ):
        self.clusters, self.alpha, self.distance, self.init = clusters, alpha, distance, init
        self.n_init, self.max_iter, self.tol = n_init, max_iter, tol
        self.random_state, self.chunk = random_state, chunk

    def fit(self, x: Tensor | np.ndarray, y: Tensor | np.ndarray | None = None):
        """Cluster x (N, D), of which y (N,) labels some. Raises ValueError in one line."""
        x, y = self.check(x, y)
        known = y >= 0
        self.classes_, codes = torch.unique(y[known], return_inverse=True)
        y = torch.full_like(y, -1)
        y[known] = codes
        self.mean_ = x.double().mean(0)  # small numbers: no cancellation in |c|^2 - 2 x.c
        x = (x - self.mean_).to(x.dtype)
        generator = torch.Generator().manual_seed(self.random_state)
        best, self.n_iter_total_ = None, 0
        for _ in range(1 if self.one_start() else self.n_init):
            descent, history = self.descend(x, y, self.start(x, y, generator))
            objective = descent.objective()
            self.n_iter_total_ += len(history)
            if best is None or objective < best[0]:
                best = objective, descent, history
        self.objective_, descent, self.history_ = best
        self.n_iter_ = len(self.history_)  # of the best start; n_iter_total_: of all
        self.labels_, self.impurity_ = descent.own, descent.impurity()
        self.cluster_centers_ = (descent.centres + self.mean_).to(x.dtype)
        self.label_clusters(descent)
        return self

    def check(self, x, y) -> tuple[Tensor, Tensor]:
        x = torch.as_tensor(x)
        x = x if x.dtype in (torch.float32, torch.float64) else x.double()
        if x.dim() != 2 or not x.numel():
            raise ValueError(f"x: expected (N, D) with N, D > 0, found {tuple(x.shape)}")
        if not x.isfinite().all():
            raise ValueError("x: expected finite numbers, found nan or inf")
        y = torch.full((len(x),), -1) if y is None else torch.as_tensor(y)
        y = y.to(x.device)
        if y.shape != x.shape[:1] or y.is_floating_point() or int(y.min()) < -1:
            raise ValueError("y: expected a whole number per row of x, -1 for unlabelled")
        if not 1 <= self.clusters <= len(x):
            raise ValueError(f"clusters: expected 1 to {len(x)} (points), found {self.clusters}")
        if not (self.alpha >= 0 and self.n_init > 0 and self.max_iter > 0 and self.tol >= 0):
            raise ValueError("expected alpha, tol of at least 0 and n_init, max_iter of at least 1")
        if self.distance not in ("squared", "plain"):
            raise ValueError(f"distance: expected squared or plain, found {self.distance!r}")
        return x, y.long()

    def chunk_of(self, x: Tensor) -> int:
        """Points at a time: what fits a processor's cache, or fills a GPU."""
        return self.chunk or (16384 if x.device.type == "cpu" else 2**20)

    def one_start(self) -> bool:
        """Whether all starts would be the same."""
        if isinstance(self.init, str):
            return self.init == "labelled" and self.clusters <= len(self.classes_)
        return True

    def start(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Centres (K, D); of more classes than clusters, those with most labels have one."""
        if not isinstance(self.init, str):
            centres = torch.as_tensor(self.init).to(x.device)
            if centres.shape != (self.clusters, x.shape[1]):
                raise ValueError(f"init: expected ({self.clusters}, {x.shape[1]}) centres")
            return (centres - self.mean_).to(x.dtype)
        centres = x[:0]
        if self.init == "labelled" and len(self.classes_):
            sizes = torch.bincount(y[y >= 0])
            classes = sizes.argsort(descending=True, stable=True)[: self.clusters]
            centres = torch.stack([x[y == label].mean(0) for label in classes])
        elif self.init not in ("labelled", "k-means++"):
            raise ValueError(f"init: expected labelled, k-means++ or centres, found {self.init!r}")
        return extend_start(x, centres, self.clusters, generator)

    def descend(self, x: Tensor, y: Tensor, centres: Tensor) -> tuple[Descent, list[dict]]:
        """Steps 2 to 4 until the objective stops falling; a row per iteration."""
        options = {"alpha": self.alpha, "distance": self.distance, "chunk": self.chunk_of(x)}
        descent, history = Descent(x, y, centres, **options), []
        while len(history) < self.max_iter:
            history.append(descent.iterate())
            before, after = history[-1]["before"], history[-1]["after_centres"]
            if before - after <= self.tol * before:
                break
        descent.assign()  # so that labels_ of unlabelled points are the nearest centres, as later
        return descent, history

    def label_clusters(self, descent: Descent) -> None:
        """Class shares (K, C) of the clusters among their labelled points.

        A cluster without any takes those of the nearest cluster that has some.
        """
        counts, centres = descent.counts, descent.centres
        has = counts.sum(1) > 0
        if has.any():
            source = has.nonzero()[:, 0][torch.cdist(centres, centres[has]).argmin(1)]
            source = torch.where(has, torch.arange(len(has), device=has.device), source)
            counts = counts[source]
        self.cluster_probs_ = counts / counts.sum(1, keepdim=True)

    def cluster(self, x: Tensor | np.ndarray) -> Tensor:
        """The cluster (N,) with the nearest centre."""
        x = torch.as_tensor(x).to(self.cluster_centers_)
        x = (x - self.mean_).to(x.dtype)
        return nearest(x, self.cluster_centers_ - self.mean_, self.chunk_of(x))

    def predict_proba(self, x: Tensor | np.ndarray) -> Tensor:
        """Shares (N, C) of the classes `classes_` among the labelled points of x's clusters."""
        if not len(self.classes_):
            raise ValueError("predict: no point was labelled, so that clusters have no classes")
        return self.cluster_probs_[self.cluster(x)]

    def predict(self, x: Tensor | np.ndarray) -> Tensor:
        """The most frequent class (N,) in the cluster; of equally frequent ones the first."""
        return self.classes_[self.predict_proba(x).argmax(1)]
