"""The descent against brute force, closed forms and scikit-learn; the experiment against itself."""

import csv
import itertools
import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from projects import Killed, call, data_asked_for, load_project, tiny_run, train
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.utils._python_dispatch import TorchDispatchMode

from semi_supervised_clustering import data, model
from semi_supervised_clustering.model import (
    ClusterThenLabel,
    Descent,
    Points,
    geometric_medians,
    join_change,
    move_labelled,
    nearest_centre,
    tangent,
    weighted_gini,
)

PROJECT = "semi_supervised_clustering"
FOLDER = Path(__file__).parent.parent / PROJECT
TINY = [
    "--dataset", "iris", "--device", "cpu", "--splits", "2", "--label_counts", "5,10",
    "--alphas", "0,1", "--clusters_per_class", "1,2", "--folds", "2", "--n_init", "2",
]  # fmt: skip
ITERATION = {"before", "after_assign", "after_move", "after_centres"}


def problem(seed: int, n: int = 60, d: int = 3, classes: int = 3, labelled: float = 0.4):
    """Points (n, d) and classes that are loosely related, with most of the latter hidden."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=n)
    x = rng.normal(size=(n, d)) + 1.5 * rng.normal(size=(classes, d))[truth]
    y = np.where(rng.random(n) < labelled, truth, -1)
    return torch.from_numpy(x), torch.from_numpy(y), rng


def brute_objective(x, y, own, centres, *, alpha, unit, plain=False, w=None):
    """Equations 1 and 2, written out over points and clusters."""
    w = torch.ones(len(x)).double() if w is None else w.double()
    gaps = (x.double() - centres[own]).square().sum(1)
    total = float(((gaps.sqrt() if plain else gaps) * w).sum()) / unit
    for cluster in own.unique():
        members = (own == cluster) & (y >= 0)
        mass = torch.bincount(y[members], w[members])
        if float(mass.sum()):
            total += alpha * float(mass.sum() * (1 - (mass / mass.sum()).square().sum()))
    return total / float(w.sum())


def descent(x, y, centres, *, w=None, whiten=None, **options):
    w = torch.ones(1).expand(len(x)) if w is None else w
    points = Points(x, y, w, torch.zeros(x.shape[1]), whiten)
    return Descent(points, centres, **({"unit": 1.0, "alpha": 1.0} | options))


def truth_of(steps, x, y, **options):
    centres = torch.from_numpy(steps.centres)
    return brute_objective(x, y, steps.own.long(), centres, **options)


# --- the objective ----------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_step_raises_the_objective(seed, plain, weighted, monkeypatch):
    monkeypatch.setattr(model, "TABLE", 1500)  # chunks of 512
    x, y, rng = problem(seed, n=700 if seed == 5 else 90)
    options = {"alpha": [0.0, 0.05, 0.5, 2.0, 20.0, 1000.0][seed], "unit": 0.7, "plain": plain}
    w = torch.from_numpy(rng.random(len(x))) if weighted else None
    start = torch.from_numpy(rng.normal(size=(2 + seed, 3)) * (4 if seed % 2 else 1))
    if seed == 3:
        start[-1] = 1e3  # an empty cluster
    steps = descent(x, y, start, w=w, **options)
    moved = {"assign": 0, "move_labelled": 0}
    before = truth_of(steps, x, y, w=w, **options)
    for _ in range(12):
        for name in ("assign", "move_labelled", "update_centres"):
            count = getattr(steps, name)()
            after = truth_of(steps, x, y, w=w, **options)
            assert after <= before + 1e-12 * before, name
            assert steps.objective() == pytest.approx(after, rel=1e-9)
            moved[name] = moved.get(name, 0) + (count or 0)
            before = after
    assert moved["assign"] > 0
    assert moved["move_labelled"] > 0 or options["alpha"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_points_that_are_not_examined_are_nearest_to_their_centre(seed, monkeypatch):
    """The bounds: after every step 2, each unlabelled point's centre is its nearest."""
    x, y, _ = problem(seed, n=2000, d=2 + seed, labelled=0.1)
    x = x.float() if seed % 2 else x
    steps = descent(x, y, x[:7], alpha=0.5)
    steps.chunk, steps.bounded, looked = 300, True, []
    monkeypatch.setattr(
        model,
        "nearest_centre",
        lambda points, *_: looked.append(len(points)) or nearest_centre(points, *_),
    )
    for _ in range(25):
        steps.assign()
        exact = torch.cdist(x.double(), torch.from_numpy(steps.centres))
        free = y < 0
        own = exact.gather(1, steps.own.long()[:, None])[:, 0]
        assert (own[free] <= exact.min(1).values[free] + 1e-5).all()
        steps.move_labelled()
        steps.update_centres()
    assert sum(looked) < 0.7 * 25 * len(x)  # and most are not looked at


@pytest.mark.parametrize("clusters", [1, 2, 7, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_is_the_first_of_the_least_distances(clusters, dtype):
    points = torch.from_numpy(np.random.default_rng(clusters).integers(-3, 4, (500, 3))).to(dtype)
    centres = points[:clusters].double()  # some of them the same, and many points half-way
    exact = (points.double()[:, None] - centres).square().sum(2)
    first = (exact == exact.min(1, keepdim=True).values).int().max(1).indices
    near, best = nearest_centre(points, centres)
    assert torch.equal(near.long(), first)
    assert torch.equal(best + points.square().sum(1), exact.min(1).values.to(dtype))
    again, _, margin = nearest_centre(points, centres, True)
    assert torch.equal(again, near)
    two = exact.sqrt().sort(1).values
    if clusters == 1:
        assert margin.min() > 1e9
        return
    gap = two[:, 1] - two[:, 0]
    assert (margin <= gap).all()
    assert (margin[gap > 0.1] > gap[gap > 0.1].clamp(max=9) - 0.01).all()


def test_bounds_are_kept_only_once_few_points_move(monkeypatch):
    """They cost as much as the rest of the pass, and save nothing while most points are late."""
    x, y, _ = problem(1, n=4000, d=2, labelled=0)
    steps, passes = descent(x, y, x[:9], alpha=0.0), []
    steps.chunk = 1000
    monkeypatch.setattr(
        model, "nearest_centre", lambda *given: passes.append(given[2]) or nearest_centre(*given)
    )
    moved = [steps.iterate()["assigned"] / len(x) for _ in range(40)]
    few = next(i for i, share in enumerate(moved[1:], 1) if share < model.FEW)
    assert few > 2
    assert passes == [False] * 4 * few + [True] * (len(passes) - 4 * few)
    assert any(passes)


def test_nearest_centre_step_leaves_labelled_points_alone():
    x, y, _ = problem(0, n=200)
    steps = descent(x, y, x[:3], alpha=50.0)
    assert steps.move_labelled() > 0
    own = steps.own.clone()
    steps.update_centres()
    assert steps.assign() > 0
    assert torch.equal(steps.own[y >= 0], own[y >= 0])
    assert not torch.equal(steps.own, own)


@pytest.mark.parametrize("seed", range(3))
def test_sums_follow_the_points_that_move(seed):
    x, y, rng = problem(seed, n=150)
    w = torch.from_numpy(rng.random(150))
    steps = descent(x, y, x[:5], alpha=3.0, w=w)
    for _ in range(4):
        steps.iterate()
    for cluster in range(5):
        members = steps.own == cluster
        assert steps.sizes[cluster] == pytest.approx(float(w[members].sum()))
        expected = (x[members] * w[members, None]).sum(0)
        np.testing.assert_allclose(steps.sums[cluster, :-1], expected, atol=1e-9)
        seen = members & (y >= 0)
        np.testing.assert_allclose(
            steps.counts[cluster], torch.bincount(y[seen], w[seen], minlength=3), atol=1e-12
        )


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_change_of_one_move_is_that_of_the_whole_objective(weight):
    counts = np.random.default_rng(0).integers(0, 4, size=(5, 3)).astype(float)
    counts[2] = 0
    labelled, squares = counts.sum(1), (counts**2).sum(1)
    for a, b, j in itertools.product(range(5), range(5), range(3)):
        if a == b or counts[a, j] == 0:
            continue
        moved = counts.copy()
        moved[a, j] -= weight
        moved[b, j] += weight
        whole = weighted_gini(moved).sum() - weighted_gini(counts).sum()
        left = squares[a] - weight * (2 * counts[a, j] - weight)
        change = join_change(labelled[b], squares[b], counts[b, j], weight)
        change -= join_change(labelled[a] - weight, left, counts[a, j] - weight, weight)
        assert change == pytest.approx(whole, abs=1e-12)


def test_tangent_bounds_the_impurity_from_above():
    rng = np.random.default_rng(0)
    for _ in range(200):
        here, there = rng.integers(0, 5, size=(2, 4, 3)).astype(float)
        here[0] = 0
        bound = weighted_gini(here) + (tangent(here) * (there - here)).sum(1)
        assert (weighted_gini(there) <= bound + 1e-12).all()


def test_gini_by_hand():
    counts = np.array([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    assert weighted_gini(counts) == pytest.approx([4 * (1 - 9 / 16 - 1 / 16), 0, 0])


@pytest.mark.parametrize("many", [256, 3])
@pytest.mark.parametrize("seed", range(6))
def test_labelled_moves_end_where_no_single_move_helps(seed, many, monkeypatch):
    monkeypatch.setattr(model, "MANY", many)
    x, y, rng = problem(seed, n=30, labelled=1.0)
    costs = torch.cdist(x, x[:4]).square().numpy()
    y, own, pull = y.numpy(), costs.argmin(1), float(rng.choice([0.3, 3.0, 30.0]))
    w = rng.random(30) + 0.5

    def counts(clusters):
        table = np.zeros((4, 3))
        np.add.at(table, (clusters, y), w)
        return table

    def total(clusters):
        dispersion = (costs[np.arange(30), clusters] * w).sum()
        return dispersion + pull * weighted_gini(counts(clusters)).sum()

    end = move_labelled(costs, y, w, own, counts(own), pull)
    assert total(end) <= total(own) + 1e-9
    assert (end != own).any() or pull < 1
    for point, cluster in itertools.product(range(30), range(4)):
        other = end.copy()
        other[point] = cluster
        assert total(other) >= total(end) - 1e-9


def best_of_all(x, y, clusters, **options):
    """The lowest objective over all assignments, each with its means as centres."""
    best = float("inf")
    for own in itertools.product(range(clusters), repeat=len(x)):
        own = torch.tensor(own)
        centres = torch.stack(
            [x[own == k].mean(0) if (own == k).any() else x[0] for k in range(clusters)]
        )
        best = min(best, brute_objective(x, y, own, centres, **options))
    return best


def test_finds_the_optimum_of_tiny_data_often():
    found = []
    for seed in range(8):
        x, y, _ = problem(seed, n=7, d=2, classes=2, labelled=0.6)
        if not (y >= 0).any():
            continue
        unit = float((x - x.mean(0)).square().sum(1).mean())
        ours = ClusterThenLabel(2, 1.0, init="k-means++", n_init=20, random_state=seed)
        value, optimum = ours.fit(x, y).objective_, best_of_all(x, y, 2, alpha=1.0, unit=unit)
        assert value >= optimum - 1e-12
        found.append(value <= optimum + 1e-9)
    assert np.mean(found) >= 0.75, found


@pytest.mark.parametrize("metric", ["euclidean", "pooled"])
def test_alpha_has_no_scale(metric):
    x, y, _ = problem(3, n=200, labelled=0.2)
    fits = [
        ClusterThenLabel(4, 0.2, metric=metric, random_state=0).fit(x * scale, y)
        for scale in (1, 1024)
    ]
    assert torch.equal(fits[0].labels_, fits[1].labels_)
    assert fits[0].impurity_ == fits[1].impurity_
    more = ClusterThenLabel(4, 0.2, random_state=0).fit(torch.cat((x, x)), torch.cat((y, y)))
    if metric == "euclidean":  # nor does it depend on the number of points
        assert more.objective_ == pytest.approx(fits[0].objective_, rel=1e-9)


def test_alpha_trades_dispersion_for_purity():
    x, y, _ = problem(1, n=300, labelled=0.3)
    options = {"init": "k-means++", "n_init": 10, "random_state": 0}
    fits = [ClusterThenLabel(3, a, **options).fit(x, y) for a in (0, 0.05, 100)]
    rows = [fit.history_[-1] for fit in fits]
    impurity, dispersion = ([row[key] for row in rows] for key in ("impurity", "dispersion"))
    assert impurity[0] > impurity[1] > impurity[2] == 0
    assert dispersion[0] < dispersion[1] < dispersion[2]


# --- next to scikit-learn ---------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [1, 3, 8, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_weight_it_is_scikit_learns_kmeans(clusters, dtype):
    x, y, rng = problem(clusters, n=50 if clusters == 50 else 400, d=5)
    x = (x + 3).to(dtype)
    start = x[torch.from_numpy(rng.permutation(len(x))[:clusters])]
    ours = ClusterThenLabel(clusters, 0.0, init=start, tol=0).fit(x, y)
    theirs = KMeans(clusters, init=start.numpy(), n_init=1, tol=0).fit(x.numpy())
    assert ours.labels_.tolist() == theirs.labels_.tolist()
    exact = dtype == torch.float64
    np.testing.assert_allclose(
        ours.cluster_centers_, theirs.cluster_centers_, rtol=0, atol=1e-12 if exact else 1e-5
    )
    unit = float((x.double() - x.double().mean(0)).square().sum())
    assert ours.objective_ * unit == pytest.approx(theirs.inertia_, rel=1e-4, abs=1e-9)
    if exact:
        assert ours.objective_ * unit == pytest.approx(theirs.inertia_, rel=1e-10, abs=1e-9)
        assert ours.n_iter_ == theirs.n_iter_


def test_weights_are_those_of_scikit_learns_kmeans():
    x, _, rng = problem(4, n=300)
    w = rng.integers(0, 4, size=300).astype(float)
    ours = ClusterThenLabel(4, 0.0, init=x[:4]).fit(x, sample_weight=w)
    theirs = KMeans(4, init=x[:4].numpy(), n_init=1, tol=0).fit(x.numpy(), sample_weight=w)
    assert ours.labels_.tolist() == theirs.labels_.tolist()
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-12)


def test_empty_cluster_starts_anew_as_in_scikit_learn():
    x, _, _ = problem(1, n=300)
    start = torch.cat((x[:4], torch.full((1, 3), 1e3)))
    ours = ClusterThenLabel(5, 0.0, init=start).fit(x)
    theirs = KMeans(5, init=start.numpy(), n_init=1, tol=0).fit(x.numpy())
    assert ours.labels_.tolist() == theirs.labels_.tolist()
    assert torch.bincount(ours.labels_, minlength=5).min() > 0


def test_filling_an_empty_cluster_empties_no_other():
    x = torch.tensor([[0.0], [0.4], [10]])
    steps = descent(x, torch.tensor([0, -1, 1]), torch.tensor([[0.2], [13], [1000]]))
    before = steps.objective()
    steps.update_centres()
    assert steps.sizes.tolist() == [1, 1, 1]
    assert steps.objective() < before


def cannot_apply(estimator) -> dict[str, str]:
    return {
        "check_classifiers_classes": "has -1 as a class, which here is an unlabelled point",
        "check_supervised_y_no_nan": "takes NaN for a mistake, which here is an unlabelled point",
    }


@parametrize_with_checks(
    [
        ClusterThenLabel(random_state=0, n_init=2),
        ClusterThenLabel(random_state=0, n_init=2, metric="pooled"),
    ],
    expected_failed_checks=cannot_apply,
)
def test_scikit_learns_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def test_pipelines_and_a_search_over_alpha_and_clusters():
    x, y, _ = problem(7, n=200, labelled=0.5)
    chain = make_pipeline(StandardScaler(), ClusterThenLabel(random_state=0, n_init=1))
    grid = {"clusterthenlabel__alpha": [0.0, 1.0], "clusterthenlabel__n_clusters": [3, 6]}
    search = GridSearchCV(chain, grid, cv=3).fit(x.numpy(), y.numpy())
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.predict(x.numpy()).shape == (200,)
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    assert (again.predict(x.numpy()) == search.predict(x.numpy())).all()


def test_labels_of_any_kind_and_tables():
    pandas = pytest.importorskip("pandas")
    x, y, _ = problem(2, n=120)
    names = np.array(["ash", "beech", "cedar"], dtype=object)
    text = np.where(y >= 0, names[y], None)
    fits = [
        ClusterThenLabel(random_state=0).fit(rows, labels)
        for rows, labels in (
            (x, y),
            (x.numpy(), np.where(y >= 0, y, np.nan)),
            (x.numpy(), text),
            (pandas.DataFrame(x.numpy(), columns=list("abc")), pandas.Series(text)),
            (x.numpy(), pandas.array(text, dtype="string").to_numpy(object)),
        )
    ]
    for other in fits[1:]:
        assert (np.asarray(other.labels_) == fits[0].labels_.numpy()).all()
    assert isinstance(fits[0].predict(x), torch.Tensor)
    assert fits[1].classes_.tolist() == [0, 1, 2]
    for each in fits[2:]:
        assert each.classes_.tolist() == names.tolist()
    assert fits[3].feature_names_in_.tolist() == ["a", "b", "c"]
    assert (fits[2].predict(x.numpy()) == names[fits[0].predict(x).numpy()]).all()
    with pytest.raises(ValueError, match="NaN"):
        fits[0].predict(x * float("nan"))


def test_score_leaves_unlabelled_rows_out():
    x = torch.tensor([[0.0], [0.1], [5], [5.1]])
    ours = ClusterThenLabel(2, random_state=0).fit(x, torch.tensor([0, -1, 1, -1]))
    assert ours.score(x, torch.tensor([0, 1, 1, -1])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no row is labelled"):
        ours.score(x, torch.full((4,), -1))


# --- large tables -----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "pooled"])
def test_starts_on_a_sample_reach_the_objective_of_all_rows(metric):
    x, y, _ = problem(3, n=6000, d=4, labelled=0.02)
    options = {"metric": metric, "random_state": 0, "n_init": 3}
    whole = ClusterThenLabel(3, 0.5, sample=None, **options).fit(x, y)
    sampled = ClusterThenLabel(3, 0.5, sample=1000, **options).fit(x, y)
    tolerance = 0.002 * (1 if metric == "euclidean" else abs(whole.objective_))
    assert sampled.objective_ == pytest.approx(whole.objective_, abs=tolerance)
    assert (sampled.predict(x) == whole.predict(x)).double().mean() > 0.98


def test_a_sample_stands_for_all_rows_and_holds_labels():
    x, y, _ = problem(3, n=6000, labelled=0.02)
    w = torch.ones(1).expand(6000)
    ours = ClusterThenLabel(3, sample=1000)
    drawn = ours.draw_sample(Points(x, y, w, torch.zeros(3)), torch.Generator().manual_seed(0))
    labelled = int((y >= 0).sum())
    assert (drawn.y >= 0).sum() == labelled
    assert drawn.w[drawn.y >= 0].unique().tolist() == [1]
    assert float(drawn.w.sum()) == pytest.approx(6000)
    assert len(drawn.x) == labelled + 600


def test_a_table_in_a_file_gives_the_same_and_is_not_copied(tmp_path):
    x, y, _ = problem(5, n=4000, d=4, labelled=0.05)
    np.save(tmp_path / "x.npy", x.float().numpy())
    rows = np.load(tmp_path / "x.npy", mmap_mode="r")
    mapped = ClusterThenLabel(3, random_state=0, sample=1000).fit(rows, y.numpy())
    held = ClusterThenLabel(3, random_state=0, sample=1000).fit(x.float().numpy(), y.numpy())
    assert (mapped.labels_ == held.labels_).all()
    assert mapped.check_rows(rows, reset=False).data_ptr() == rows.ctypes.data
    assert (mapped.predict(rows) == held.predict(x.float().numpy())).all()


def test_threads_are_not_used_and_given_back(monkeypatch):
    x, y, _ = problem(4, n=20_000, labelled=0.01)
    x, seen, fits = x.float(), [], []

    def look(*given):
        seen.append(torch.get_num_threads())
        return nearest_centre(*given)

    monkeypatch.setattr(model, "nearest_centre", look)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            fits.append(ClusterThenLabel(6, random_state=3, metric="pooled").fit(x, y))
            fits[-1].predict(x)
            assert torch.get_num_threads() == count
        monkeypatch.setattr(model, "extend_start", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fits[0].fit(x, y)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert set(seen) == {1}
    assert fits[0].history_ == fits[1].history_
    assert torch.equal(fits[0].labels_, fits[1].labels_)


@pytest.mark.parametrize("options", [{}, {"metric": "pooled"}, {"distance": "plain"}])
def test_no_second_copy_of_the_table_is_made(options, monkeypatch):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, given=(), named=None):
            nonlocal largest
            made = operation(*given, **(named or {}))
            unused = operation is torch.ops.aten.empty.memory_format  # see one_thread
            if isinstance(made, torch.Tensor) and not (operation.is_view or unused):
                largest = max(largest, made.untyped_storage().nbytes())
            return made

    x, y, _ = problem(4, n=20_000, d=16, labelled=0.01)
    monkeypatch.setattr(model, "TABLE", 2**14)
    monkeypatch.setattr(model, "HELD", 0)
    ours = ClusterThenLabel(6, random_state=0, n_init=1, max_iter=9, sample=1000, **options)
    x, y = x.float().numpy(), y.numpy()
    with Watch():
        ours.fit(x, y).predict(x)
    assert largest <= x.nbytes / 7  # the sample, or a number in float64 for each row


def test_chunks_do_not_change_the_result(monkeypatch):
    x, y, _ = problem(4, n=1500)
    monkeypatch.setattr(model, "HELD", 0)
    fits = []
    for table in (2**18, 1000):
        monkeypatch.setattr(model, "TABLE", table)
        fits.append(ClusterThenLabel(6, 2.0, random_state=3).fit(x, y))
    assert torch.equal(fits[0].labels_, fits[1].labels_)
    assert torch.equal(fits[0].predict(x), fits[1].predict(x))


# --- the pooled metric ------------------------------------------------------------------------


def test_pooled_objective_is_the_formula_and_falls():
    """J = (mean squared Mahalanobis distance + log det S + tr(S^-1 prior)) / D + impurity."""
    x, y, _ = problem(2, n=300, d=4, labelled=0.2)
    x = x @ torch.from_numpy(np.random.default_rng(0).normal(size=(4, 4)))
    ours = ClusterThenLabel(3, 0.7, metric="pooled", random_state=0).fit(x, y)
    values = [ours.history_[0]["before"], *(row["after_centres"] for row in ours.history_)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(values))
    own = ours.labels_
    centres = torch.stack([x[own == k].mean(0) for k in range(3)])
    gap = x - centres[own]
    within = gap.T @ gap / len(x)
    prior = 1e-2 * torch.diag((x - x.mean(0)).square().mean(0))
    covariance = within + prior
    inverse = torch.linalg.inv(covariance)
    square = torch.einsum("nd,de,ne->n", gap, inverse, gap).mean()
    added = torch.logdet(covariance) + (inverse @ prior).trace()
    counts = np.zeros((3, 3))
    np.add.at(counts, (own[y >= 0].numpy(), y[y >= 0].numpy()), 1)
    penalty = 0.7 * weighted_gini(counts).sum() / len(x)
    expected = float(square + added) / 4 + penalty
    assert ours.objective_ == pytest.approx(expected, abs=1e-4)
    white = ours.whiten_
    torch.testing.assert_close(white @ white.T, inverse, rtol=2e-2, atol=2e-2)


def test_pooled_metric_finds_long_clusters_that_kmeans_cuts():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], 300)
    x = np.c_[rng.normal(0, 8, 600), 3.0 * truth + rng.normal(0, 0.4, 600)]
    y = np.full(600, -1)
    y[[0, 1, 2, 300, 301, 302]] = truth[[0, 1, 2, 300, 301, 302]]
    right = {
        metric: ClusterThenLabel(metric=metric, random_state=0).fit(x, y).score(x, truth)
        for metric in ("euclidean", "pooled")
    }
    assert right["pooled"] > 0.99
    assert right["euclidean"] < 0.8


def test_pooled_metric_does_not_depend_on_the_features_units():
    x, y, _ = problem(6, n=300, labelled=0.2)
    near = ClusterThenLabel(metric="pooled", random_state=0).fit(x, y)
    far = ClusterThenLabel(metric="pooled", random_state=0).fit(x * torch.tensor([1, 1e3, 1e-3]), y)
    assert torch.equal(near.labels_, far.labels_)


# --- odd inputs -------------------------------------------------------------------------------


def test_median_beats_the_mean_and_meets_the_optimality_condition():
    x, _, _ = problem(0, n=41, d=2)
    points = Points(x, None, torch.ones(len(x)), torch.zeros(2))
    own = torch.zeros(len(x), dtype=torch.int32)
    centre = x.mean(0, keepdim=True).numpy()
    for _ in range(20):
        centre = geometric_medians(points, own, centre, 10)
    gap = x - torch.from_numpy(centre)
    assert (gap / gap.norm(dim=1, keepdim=True)).sum(0).norm() < 1e-6
    assert gap.norm(dim=1).sum() < (x - x.mean(0)).norm(dim=1).sum() - 1e-3


def test_median_leaves_a_data_point_and_stays_at_an_optimal_one():
    x = torch.tensor([[0.0, 0], [10, 0], [11, 1]], dtype=torch.float64)
    points = Points(x, None, torch.ones(3), torch.zeros(2))
    own = torch.zeros(3, dtype=torch.int32)
    far = torch.from_numpy(geometric_medians(points, own, x[:1].numpy(), 2))
    assert (x - far).norm(dim=1).sum() < (x - x[0]).norm(dim=1).sum() - 1
    stays = geometric_medians(points, own, x[1:2].numpy(), 2)
    np.testing.assert_allclose(stays, x[1:2])


def test_cluster_without_labels_takes_those_of_the_nearest_labelled_one():
    x = torch.tensor([[0.0], [1], [10], [11], [14], [15]])
    y = torch.tensor([5, -1, 7, 7, -1, -1])
    ours = ClusterThenLabel(3, init=torch.tensor([[0.0], [10], [15]])).fit(x, y)
    assert ours.predict(x).tolist() == [5, 5, 7, 7, 7, 7]
    assert ours.predict_proba(x)[:, 1].tolist() == [0, 0, 1, 1, 1, 1]
    assert ours.impurity_ == 0


def test_predictions_are_class_shares_and_labels_agree_with_predict():
    x, y, _ = problem(2, n=300, labelled=0.2)
    ours = ClusterThenLabel(7, 0.03, random_state=1).fit(x, y)
    free = y < 0
    assert torch.equal(ours.labels_[free], ours.cluster(x)[free])
    probs = ours.predict_proba(x)
    torch.testing.assert_close(probs.sum(1), torch.ones(300, dtype=torch.float64))
    own = ours.labels_ == ours.labels_[free][0]
    counts = torch.bincount(y[own & (y >= 0)], minlength=3).double()
    if counts.sum():
        torch.testing.assert_close(probs[free][0], counts / counts.sum())
    assert torch.equal(ours.predict(x), torch.from_numpy(ours.classes_)[probs.argmax(1)])
    _, distance = ours.nearest(x)
    expected = torch.cdist(x, ours.cluster_centers_).min(1).values
    np.testing.assert_allclose(distance, expected, rtol=1e-5)


def test_a_class_without_weight_starts_at_its_mean():
    x, y = torch.tensor([[0.0], [1], [10], [12]]), torch.tensor([0, 0, 1, 1])
    ours = ClusterThenLabel(2, n_init=1).fit(x, y, sample_weight=torch.tensor([1.0, 1, 0, 0]))
    assert ours.history_[0]["labelled_moved"] == ours.history_[0]["assigned"] == 0
    assert ours.labels_.tolist() == [0, 0, 1, 1]


def test_starts_and_seeds():
    x, y, _ = problem(4, n=200)
    ours = ClusterThenLabel(6, 2.0, random_state=3)
    first, again = ours.fit(x, y).labels_, clone(ours).fit(x.numpy(), y.numpy()).labels_
    assert (first.numpy() == again).all()
    many = ClusterThenLabel(6, 2.0, n_init=10, random_state=0).fit(x, y).objective_
    assert many <= ClusterThenLabel(6, 2.0, n_init=1, random_state=0).fit(x, y).objective_
    free = ClusterThenLabel(6, init="k-means++").fit(x, y)  # random_state None
    assert free.labels_.shape == (200,)


def test_other_labels_on_the_same_clusters():
    x, y, _ = problem(4, n=200)
    kmeans = ClusterThenLabel(5, 0.0, init="k-means++", random_state=0).fit(x)
    ours = kmeans.relabel(y)
    expected = ClusterThenLabel(5, 0.0, init="k-means++", random_state=0).fit(x, y)
    assert torch.equal(ours.predict(x), expected.predict(x))
    assert ours.impurity_ == pytest.approx(expected.impurity_)
    assert not len(kmeans.classes_)


@pytest.mark.parametrize(
    "options", [{}, {"distance": "plain"}, {"metric": "pooled"}, {"init": "k-means++"}]
)
def test_odd_inputs_work(options):
    x, y, _ = problem(5, n=20)
    none = torch.full_like(y, -1)
    one = none.clone()
    one[3] = 2
    full = problem(5, n=20, labelled=1.1)[1]
    same, constant = torch.ones(20, 3), torch.cat((x, torch.ones(20, 1)), 1)
    options = {"n_init": 2, "max_iter": 30, "random_state": 0} | options
    for points, labels, clusters in (
        (x, one, 3), (x, full, 3), (x, full, 2), (x, y, 1), (x, y, 20), (same, y, 3),
        (torch.cat((x, x)), torch.cat((y, y)), 25), (constant, y, 4), (x[:, :1], y, 3),
        (x.float() * 1e3, y, 3), ((x * 10).long(), y, 3), (x[:1], one[3:4], 1), (x, none, None),
    ):  # fmt: skip
        ours = ClusterThenLabel(clusters, **options).fit(points, labels)
        assert np.isfinite(ours.objective_)
        assert ours.cluster_centers_.isfinite().all()
        if (labels >= 0).any():
            assert set(ours.predict(points).tolist()) <= set(labels[labels >= 0].tolist())
    with pytest.raises(ValueError, match="no point was labelled"):
        ClusterThenLabel(3, **options).fit(x, none).predict(x)


def test_far_from_the_origin_nothing_is_cancelled():
    x, y, _ = problem(6, n=200)
    near = ClusterThenLabel(3, random_state=0).fit(x, y)
    far = ClusterThenLabel(3, random_state=0).fit(x + 1e6, y)
    assert torch.equal(near.labels_, far.labels_)
    assert far.objective_ == pytest.approx(near.objective_, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n_clusters": 0}, "n_clusters: expected 1 to 60"),
        ({"n_clusters": 61}, "n_clusters: expected 1 to 60"),
        ({"alpha": -1}, "expected alpha"),
        ({"distance": "cosine"}, "distance: expected squared or plain"),
        ({"metric": "cosine"}, "metric: expected euclidean or pooled"),
        ({"metric": "pooled", "distance": "plain"}, "only squared"),
        ({"init": "random"}, "init: expected labelled"),
        ({"init": torch.zeros(2, 2)}, "init: expected"),
    ],
)
def test_impossible_settings_are_refused(change, complaint):
    x, y, _ = problem(0)
    with pytest.raises(ValueError, match=complaint):
        ClusterThenLabel(**({"n_clusters": 3} | change)).fit(x, y)


# --- data -------------------------------------------------------------------------------------

CSV = "size,kind,weight,name\n1,a,10,p\n2,b,,q\n3,,30,r\n4,a,40,s\n"


def table_of(tmp_path, text, columns=("all",), encoding="utf-8"):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    return data.read_csv(path, "kind", columns)


def test_csv_with_missing_values_and_labels(tmp_path):
    table = table_of(tmp_path, CSV)
    assert table.classes == ("a", "b")
    assert table.y.tolist() == [0, 1, -1, 0]
    assert table.features == ("size", "weight")
    assert "name: left out, as line 2 holds 'p'" in table.note
    whole = data.drop_incomplete(table)
    assert whole.x.tolist() == [[1, 10], [3, 30], [4, 40]]
    assert (whole.dropped, whole.rows.tolist()) == (1, [0, 2, 3])
    assert "rows that lack a feature: 1, " in whole.note


def test_text_is_read_as_text(tmp_path):
    """What is missing is so among numbers only; thousands have commas; an index has no name."""
    text = ',size,kind,weight\n0,"1,234",none,1\n1,n/a,NA,2\n2,#N/A,b,3\n3,-5e1,,?\n'
    table = table_of(tmp_path, text)
    assert table.classes == ("NA", "b", "none")
    assert table.y.tolist() == [2, 0, 1, -1]
    assert table.features == ("size", "weight")
    assert table.x[:, 0].nan_to_num(7).tolist() == [1234, 7, 7, -50]
    assert "nameless: left out" in table.note
    for other in (text.replace(",", ";").replace('"1;234"', '"1,234"'), "\ufeff" + text):
        assert table_of(tmp_path, other).x.nan_to_num(7).equal(table.x.nan_to_num(7))
    decomposed = "size,kind,Gro\u0308\u00dfe\n1,a,1\n2,b,2\n"
    assert table_of(tmp_path, decomposed, ("Gr\u00f6\u00dfe",)).x.tolist() == [[1], [2]]
    long = CSV.replace("q", "q" * 140_000)
    assert table_of(tmp_path, long).features == ("size", "weight")


@pytest.mark.parametrize(
    ("text", "columns", "complaint"),
    [
        (CSV.replace("kind", "sort"), "all", "no column 'kind'"),
        (CSV.replace("10", "ten"), "weight", "line 2: expected a number, found 'ten'"),
        (CSV.replace("10", "inf"), "weight", "line 2: expected a number, found 'inf'"),
        (CSV + "5,a\n", "all", "line 6: expected 4 values, found 2"),
        (CSV.replace("weight", "size"), "all", "the column 'size' occurs twice"),
        (CSV, "height", "no column 'height'"),
        (CSV, "kind", "cannot be both feature and class"),
        ("kind,name\na,p\nb,q\n", "all", "no column but 'kind' holds numbers"),
        ("kind,size\n", "size", "expected a header and rows below it"),
        ("kind,size\n", "all", "expected a header and rows below it"),
        (CSV.replace("b", "a"), "all", "expected at least 2 classes in"),
        ("", "all", "expected a header"),
        (None, "all", "cannot be read"),
        (CSV.replace("p", "Gr\u00f6\u00dfe"), "all", "expected a text in UTF-8"),
    ],
)
def test_bad_table_is_named_in_one_line(tmp_path, text, columns, complaint):
    path = tmp_path / "t.csv"
    if text is not None:
        path.write_bytes(text.encode("cp1252"))
    with pytest.raises(data.DataError) as error:
        data.read_csv(path, "kind", (columns,))
    assert complaint in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_penguins_are_in_the_folder():
    table = load_project(PROJECT).train.load(**LOAD)
    assert table.x.shape == (342, 4)
    assert table.dropped == 2
    assert torch.bincount(table.y).tolist() == [151, 68, 123]
    assert table.classes == ("Adelie", "Chinstrap", "Gentoo")


LOAD = {
    "dataset": "penguins", "data_dir": Path("none"), "csv_file": Path("none"), "label_column": "x",
    "feature_columns": ("all",), "missing": "drop", "blob_sizes": (1, 1, 1), "seed": 0,
}  # fmt: skip


def test_splits_are_disjoint_nested_and_scaled_on_training_rows():
    table = data.load_bundled("wine")
    table = table._replace(x=table.x.clone())
    table.x[::7, 0] = float("nan")
    options = {"test_share": 0.25, "scale": True, "seed": 4}
    few = data.split(table, label_count=5, **options)
    many = data.split(table, label_count=30, **options)
    assert sorted(few.rows.tolist() + few.rows_test.tolist()) == list(range(178))
    assert torch.equal(few.rows, many.rows)
    shown = few.given >= 0
    assert (int(shown.sum()), int((many.given >= 0).sum())) == (5, 30)
    assert set(few.given[shown].tolist()) == {0, 1, 2}
    assert torch.equal(few.given[shown], many.given[shown])
    assert torch.equal(many.given[many.given >= 0], many.y[many.given >= 0])
    torch.testing.assert_close(few.x.mean(0), torch.zeros(13).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(few.x[:, 1:].std(0, correction=0), torch.ones(12).double())
    train_rows = table.x[few.rows, 1]
    expected = (table.x[few.rows_test, 1] - train_rows.mean()) / train_rows.std(correction=0)
    torch.testing.assert_close(few.x_test[:, 1], expected)
    assert few.x.isfinite().all()
    other = data.split(table, label_count=5, **(options | {"seed": 5}))
    assert not torch.equal(few.rows_test, other.rows_test)
    everything = data.split(table, label_count=0, **options)
    assert torch.equal(everything.given, everything.y)
    with pytest.raises(data.DataError, match=r"label_counts: wine has 134 .* smaller label_counts"):
        data.split(table, label_count=134, **options)


def test_data_are_asked_for_by_the_seed(tmp_path):
    flags = [*TINY, "--seed", 7, "--out_dir", tmp_path]
    assert data_asked_for(load_project(PROJECT), *flags)["seed"] == 7


# --- the experiment ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program():
    return load_project(PROJECT).train


@pytest.fixture(scope="module")
def config(program):
    """Of TINY, with the defaults of config.yaml."""
    run = load_project(PROJECT).run
    kinds = run.get_type_hints(program.Config, include_extras=True)
    flags = {name[2:]: value for name, value in zip(TINY[::2], TINY[1::2], strict=True)}
    return run.read_config(program.Config, kinds, None, flags)


def scores_of(program, config, table, part):
    free = program.unlabelled_arms(table, config, "cpu", 0)
    torch.manual_seed(0)
    return program.try_methods(part, free, config, table, 0)


def ends(row: dict, *endings: str) -> set[str]:
    return {name for name in row if name.endswith(endings)}


@pytest.mark.parametrize(
    ("disturbed", "may_move", "has_to_move"),
    [
        # what is disturbed, the columns of history.csv that may move, some that have to
        ("hidden classes", ("_accuracy", "_ari", "_nmi"), ("_ari", "_nmi")),
        ("test classes", ("_test_accuracy",), ("_test_accuracy",)),
        ("test rows", ("_test_accuracy",), ("ours3_test_accuracy", "logistic_test_accuracy")),
        ("given classes", ("",), ("3_accuracy", "_mean_accuracy", "logistic_ari", "spreading_ari")),
        ("unlabelled rows", ("",), ("ours6_ari", "seeded6_ari", "logistic_ari", "spreading_ari")),
    ],
)
def test_what_moves_what(program, config, disturbed, may_move, has_to_move):
    table = program.load_table(config)
    part = program.sample_split(table, config, 10, 0)
    before = scores_of(program, config, table, part)
    hidden, order = (part.given < 0).nonzero()[:, 0], torch.Generator().manual_seed(1)
    shuffle = torch.randperm(len(hidden), generator=order)
    if disturbed == "hidden classes":
        y = part.y.clone()
        y[hidden] = y[hidden[shuffle]]
        part = part._replace(y=y)
    elif disturbed in ("test classes", "test rows"):  # in the table: splits must not care
        test = part.rows_test
        turned = test.roll(7)
        y, x = table.y.clone(), table.x.clone()
        if disturbed == "test classes":
            y[test] = table.y[turned]
        else:
            x[test] = table.x[turned] + 3
        table = table._replace(x=x, y=y)
        part = program.sample_split(table, config, 10, 0)
        assert torch.equal(part.rows_test, test)
    elif disturbed == "given classes":
        labelled = (part.given >= 0).nonzero()[:, 0]
        given = part.given.clone()
        given[labelled] = (given[labelled] + torch.arange(len(labelled))) % 3
        part = part._replace(given=given)
    else:
        x = part.x.clone()
        x[hidden] = x[hidden[shuffle]]
        part = part._replace(x=x)
    after = scores_of(program, config, table, part)
    moved = {name for name in before if before[name] != after[name]}
    allowed = ends(before, *may_move)
    if disturbed == "hidden classes":
        allowed -= ends(before, "_test_accuracy")
    if disturbed == "given classes":  # k-means has seen none of them
        allowed -= {name for name in ends(before, "_ari", "_nmi") if name.startswith("kmeans")}
    if disturbed == "unlabelled rows":  # from the labelled points alone
        allowed -= {"logistic_test_accuracy", "nearest_mean_test_accuracy"}
    assert moved <= allowed, moved - allowed
    wanted = ends(before, *has_to_move)
    assert wanted and wanted <= moved, wanted - moved


def long_clusters(seed: int, corners: bool = False):
    """A table on which it is known who is right: two classes, apart in a narrow direction only;
    with `corners` each class has two clusters, at opposite corners.
    """
    rng = np.random.default_rng(seed)
    y = np.arange(400) % 2
    x = np.c_[rng.normal(0, 10, 400), 3.0 * y + rng.normal(0, 0.3, 400)]
    if corners:
        other = rng.integers(2, size=400)
        x = np.c_[5.0 * other, 5.0 * (other ^ y)] + rng.normal(0, 0.5, (400, 2))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    return data.Table("made", x, y, ("no", "yes"), ("a", "b"), torch.arange(400), 0)


def tiny_part(program, config, table, labels=10, number=0):
    return program.sample_split(table, config, labels, number)


def test_known_answers_of_the_arms(program, config):
    table, config = long_clusters(0), replace(config, scale=False)
    row = scores_of(program, config, table, tiny_part(program, config, table))
    for name in ("ours2", "seeded2", "constrained2", "chosen", "mixture"):
        assert row[f"{name}_accuracy"] > 0.99, name
        assert row[f"{name}_test_accuracy"] > 0.98, name
    for name in ("kmeans2", "ours_euclidean2"):  # they cut the long clusters
        assert row[f"{name}_accuracy"] < 0.9, name


def test_each_arm_has_its_settings(program, config, monkeypatch):
    table = program.load_table(config)
    part, asked = tiny_part(program, config, table), []

    class Asked(program.ClusterThenLabel):
        def fit(self, x, y=None):
            asked.append(self.get_params() | {"labels": 0 if y is None else int((y >= 0).sum())})
            return super().fit(x, y)

    monkeypatch.setattr(program, "ClusterThenLabel", Asked)
    monkeypatch.setattr(program, "choose", lambda *_: (3, 0.5))
    scores_of(program, config, table, part)
    keys = ("n_clusters", "alpha", "metric", "init", "labels")
    rows = [tuple(each[key] for key in keys) for each in asked]
    expected = []
    for k in (3, 6):
        expected.append((k, 0.0, "euclidean", "k-means++", 0))  # kmeans
        expected.append((k, 0.0, "pooled", "k-means++", 0))  # kmeans_pooled
    for k in (3, 6):
        expected.append((k, 1.0, "pooled", "labelled", 10))  # ours
        expected.append((k, 0.0, "pooled", "labelled", 10))  # seeded
        expected.append((k, 1e6, "pooled", "labelled", 10))  # constrained
        expected.append((k, 1.0, "euclidean", "labelled", 10))  # ours_euclidean
    expected.append((3, 0.5, "pooled", "labelled", 10))  # chosen
    assert rows == expected
    assert {(each["n_init"], each["random_state"], each["tol"]) for each in asked} == {(2, 0, 1e-7)}


def test_the_arms_have_their_names(program, config):
    """Fitted anew by hand: no two arms are exchanged."""
    table = program.load_table(config)
    part = tiny_part(program, config, table)
    row = scores_of(program, config, table, part)
    arms = {
        "ours": {"metric": "pooled"},
        "seeded": {"metric": "pooled", "alpha": 0.0},
        "constrained": {"metric": "pooled", "alpha": 1e6},
        "ours_euclidean": {},
        "kmeans": {"alpha": 0.0, "init": "k-means++"},
        "kmeans_pooled": {"alpha": 0.0, "init": "k-means++", "metric": "pooled"},
    }
    hidden = part.given < 0
    for (name, options), k in itertools.product(arms.items(), (3, 6)):
        ours = ClusterThenLabel(k, n_init=2, tol=1e-7, random_state=0, **options)
        if name.startswith("kmeans"):
            ours = ours.fit(part.x).relabel(part.given)
        else:
            ours.fit(part.x, part.given)
        right = (ours.predict(part.x) == part.y)[hidden].double().mean()
        assert row[f"{name}{k}_accuracy"] == pytest.approx(float(right)), name
        on_test = (ours.predict(part.x_test) == part.y_test).double().mean()
        assert row[f"{name}{k}_test_accuracy"] == pytest.approx(float(on_test)), name


def test_the_number_of_clusters_is_chosen_by_hidden_labels(program, config):
    table = long_clusters(0, corners=True)
    part = tiny_part(program, config, table, labels=40)
    torch.manual_seed(0)
    clusters, _ = program.choose(part, config, table, 0, [2, 4])
    assert clusters == 4  # two clusters hold half of each class
    plain = long_clusters(0)
    part = tiny_part(program, config, plain, labels=40)
    assert program.choose(part, config, plain, 0, [2, 4])[0] == 2  # of equals the first


def test_cross_validation_hides_what_it_asks(program, config, monkeypatch):
    table = program.load_table(config)
    part, seen = tiny_part(program, config, table), []

    class Watched(program.ClusterThenLabel):
        def fit(self, x, y=None):
            seen.append(y.clone())
            return super().fit(x, y)

        def predict(self, x):
            hidden = (seen[-1] < 0) & (part.given >= 0)
            assert torch.equal(x, part.x[hidden][torch.cdist(x, part.x[hidden]).argmin(1)])
            assert len(x) == int(hidden.sum()) == 5
            return super().predict(x)

    monkeypatch.setattr(program, "ClusterThenLabel", Watched)
    program.choose(part, config, table, 0, [3, 6])
    assert len(seen) == 2 * len(config.alphas) * config.folds
    for first, second in itertools.batched(seen, 2) if hasattr(itertools, "batched") else ():
        assert torch.equal(torch.maximum(first, second), part.given)


def test_other_methods_learn_from_all_rows_or_from_the_labelled_ones(program, config, monkeypatch):
    from sklearn import linear_model, mixture, neighbors, semi_supervised

    part, seen = tiny_part(program, config, program.load_table(config)), {}
    kinds = [mixture.GaussianMixture, semi_supervised.LabelSpreading]
    kinds += [linear_model.LogisticRegression, neighbors.NearestCentroid]
    for kind in kinds:

        def watch(self, x, y=None, *rest, fit=kind.fit, name=kind.__name__):
            seen[name] = (x, y)
            return fit(self, x, y, *rest)

        monkeypatch.setattr(kind, "fit", watch)
    program.score_baselines(part)
    x, given = part.x.double().numpy(), part.given.numpy()
    some = (x[given >= 0], given[given >= 0])
    wanted = {"GaussianMixture": (x, None), "LabelSpreading": (x, given)}
    wanted |= {"LogisticRegression": some, "NearestCentroid": some}
    assert seen.keys() == wanted.keys() and len(some[0]) == 10
    for name, (inputs, labels) in wanted.items():
        assert np.array_equal(seen[name][0], inputs), name
        assert np.array_equal(seen[name][1], labels) or seen[name][1] is labels, name


def test_scores_by_hand(program):
    part = data.Split(
        x=torch.zeros(6, 1), y=torch.tensor([0, 0, 1, 1, -1, 0]),
        given=torch.tensor([0, -1, -1, -1, -1, -1]), rows=torch.arange(6),
        x_test=torch.zeros(3, 1), y_test=torch.tensor([0, 1, 1]), rows_test=torch.arange(3),
        scaling=None,
    )  # fmt: skip
    predicted, on_test = torch.tensor([1, 0, 0, 1, 0, 0]), torch.tensor([0, 0, 1])
    scores = program.score(part, predicted, on_test, torch.tensor([9, 5, 4, 4, 7, 5]))
    assert scores["accuracy"] == 3 / 4  # rows 1, 2, 3, 5
    assert scores["test_accuracy"] == pytest.approx(2 / 3)
    assert scores["ari"] == scores["nmi"] == 1


def test_summary_by_hand(program):
    def row(ours, kmeans):
        scores = {"ours3": ours, "kmeans3": kmeans, "kmeans6": 0.0, "chosen": ours, "logistic": 0.5}
        numbers = {f"{n}_{key}": x for n, x in scores.items() for key in program.SCORES}
        return numbers | {"chosen_clusters": 3, "chosen_alpha": 0.5}

    summary = program.summarise({7: [row(0.9, 0.5), row(0.7, 0.6)]})
    assert summary["by_labels"]["7"]["ours3"]["accuracy"]["mean"] == pytest.approx(0.8)
    assert summary["by_labels"]["7"]["ours3"]["ari"]["sd"] == pytest.approx(0.2 / 2**0.5)
    assert summary["by_labels"]["7"]["chosen"]["times_chosen"] == {"3 clusters, alpha 0.5": 2}
    assert set(summary["ours_minus"]["7"]) == {"kmeans3"}
    assert summary["ours_minus"]["7"]["kmeans3"]["mean"] == pytest.approx(0.25)


# --- a whole run ------------------------------------------------------------------------------


def report_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def split_by_hand(table, seed: int, number: int, label_count: int):
    """Training and test rows and given labels, written out anew."""
    state = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    order = torch.randperm(len(table.x), generator=torch.Generator().manual_seed(state)).tolist()
    count = round(0.2 * len(order))
    test, pool = order[:count], order[count:]
    first = [next(row for row in pool if table.y[row] == label) for label in range(3)]
    given = (first + [row for row in pool if row not in first])[:label_count]
    mean, deviation = table.x[pool].mean(0), table.x[pool].std(0, correction=0)
    return (table.x - mean) / deviation, pool, test, given


def test_the_headline_is_recomputed():
    from sklearn.linear_model import LogisticRegression

    folder, _, errors = tiny_run(PROJECT)
    assert "warning" not in errors
    report, table = report_of(folder), data.load_bundled("iris")
    arms = {
        "accuracy": {"metric": "pooled"},
        "seeded_accuracy": {"metric": "pooled", "alpha": 0.0},
        "kmeans_accuracy": {"alpha": 0.0, "init": "k-means++"},
    }
    right = {name: [] for name in (*arms, "supervised_accuracy")}
    for number in range(2):
        x, pool, _, given = split_by_hand(table, 0, number, 10)
        y = torch.full((len(x),), -1)
        y[given] = table.y[given]
        unseen = [row for row in pool if row not in given]
        for name, options in arms.items():
            ours = ClusterThenLabel(3, random_state=number, n_init=2, tol=1e-7, **options)
            ours = ours.fit(x[pool], None if "init" in options else y[pool]).relabel(y[pool])
            right[name].append(float((ours.predict(x[unseen]) == table.y[unseen]).double().mean()))
        linear = LogisticRegression(max_iter=1000).fit(x[given], table.y[given])
        right["supervised_accuracy"].append(linear.score(x[unseen], table.y[unseen]))
    assert set(report["headline"]) == set(right)
    for name, values in right.items():
        assert report["headline"][name] == pytest.approx(np.mean(values)), name


def test_model_and_predictions_are_those_of_split_0():
    folder, _, _ = tiny_run(PROJECT)
    report, table = report_of(folder)["metrics"]["cluster"], data.load_bundled("iris")
    _, pool, test, given = split_by_hand(table, 0, 0, 10)
    saved = torch.load(folder / "model.pt", weights_only=True)
    z = (table.x - saved["mean"]) / saved["deviation"]
    y = torch.full((150,), -1)
    y[given] = table.y[given]  # what the clustering may know
    ours = ClusterThenLabel(3, metric="pooled", n_init=2, tol=1e-7, random_state=0)
    ours.fit(z[pool], y[pool])
    torch.testing.assert_close(saved["estimator"]["centres"], ours.centres_)
    assert report["objective"] == pytest.approx(ours.objective_)
    z = (z - saved["estimator"]["shift"]) @ saved["estimator"]["whiten"]
    own = torch.cdist(z, saved["estimator"]["centres"]).argmin(1)
    label = saved["estimator"]["probs"].argmax(1)[own]
    rows = rows_of(folder / "predictions.csv")
    assert [int(row["row"]) for row in rows] == list(range(150))
    assert [int(row["cluster"]) for row in rows] == own.tolist()
    assert [row["predicted"] for row in rows] == [table.classes[code] for code in label]
    assert {int(row["row"]) for row in rows if row["split"] == "test"} == set(test)
    known = {int(row["row"]): row["label_given"] for row in rows if row["label_given"]}
    assert known == {row: table.classes[table.y[row]] for row in given}
    unseen = [row for row in pool if row not in given]
    right = label == table.y
    assert report["accuracy"] == pytest.approx(float(right[unseen].double().mean()))
    assert report["test_accuracy"] == pytest.approx(float(right[test].double().mean()))
    assert report["labels"] == 10


def test_history_is_the_descent_and_the_splits():
    folder, *_ = tiny_run(PROJECT)
    rows, metrics = rows_of(folder / "history.csv"), report_of(folder)["metrics"]
    stages = [row["stage"] for row in rows]
    assert stages.count("splits") == 2
    assert stages.count("alpha") == 2  # two alphas; label_count and the most labels are both 10
    descent_rows = [row for row in rows if row["stage"] == "cluster"]
    assert metrics["cluster"]["iterations"] == len(descent_rows)
    assert float(descent_rows[-1]["after_centres"]) >= metrics["cluster"]["objective"] - 1e-9
    splits = [row for row in rows if row["stage"] == "splits"]
    for count, name, key in itertools.product((5, 10), ("ours3", "chosen", "spreading"), ("nmi",)):
        values = [float(row[f"{count}_{name}_{key}"]) for row in splits]
        expected = metrics["by_labels"][str(count)][name][key]
        assert expected["mean"] == pytest.approx(np.mean(values))
        assert expected["sd"] == pytest.approx(np.std(values, ddof=1))
    for row in (row for row in rows if row["stage"] == "alpha"):
        point = metrics["by_alpha"][row["labels"]][f"{float(row['alpha']):g}"]
        assert point["accuracy"]["mean"] == pytest.approx(float(row["accuracy_mean"]))
    same = metrics["by_labels"]["10"]
    assert metrics["by_alpha"]["10"]["1"]["accuracy"] == same["ours3"]["accuracy"]
    assert metrics["by_alpha"]["10"]["0"]["accuracy"] == same["seeded3"]["accuracy"]
    for name in ("clusters", "objective", "labels", "alpha"):
        assert (folder / f"{name}.png").stat().st_size > 5000


def without_clock(folder: Path) -> tuple[dict, list[dict]]:
    metrics = report_of(folder)["metrics"]
    metrics.pop("timing")
    return metrics, [row | {"seconds": ""} for row in rows_of(folder / "history.csv")]


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_a_killed_run_ends_like_an_unbroken_one(checkpoint, program, tmp_path, monkeypatch):
    """Killed after a split, and in the sweep of alpha."""
    keep, done = program.save_checkpoint, []

    def save_checkpoint(*parts):
        keep(*parts)
        done.append(1)
        if len(done) == checkpoint:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(program, "save_checkpoint", save_checkpoint)
        train(PROJECT, *TINY, "--out_dir", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "metrics.json").exists()
    monkeypatch.setattr(program, "plot_results", lambda *_: None)
    train(PROJECT, "--resume", folder)
    assert without_clock(folder) == without_clock(tiny_run(PROJECT)[0])


def own_table(tmp_path: Path, classes=("s", "v", "x")) -> Path:
    """iris, a third of it without a class, with an index, a column of text and a missing value."""
    iris = data.load_bundled("iris")
    lines = [",a,b,c,d,site,kind"]
    for number, (x, y) in enumerate(zip(iris.x.tolist(), iris.y.tolist(), strict=True)):
        if number == 20:
            x[1] = ""
        label = classes[y] if number % 3 else ""
        lines.append(",".join(map(str, (number, *x, "here", label))))
    (tmp_path / "mine.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "mine.csv"


def test_own_table_without_the_comparison_and_predict(tmp_path):
    path = own_table(tmp_path)
    flags = ["--dataset", "csv", "--csv_file", path, "--label_column", "kind", "--device", "cpu"]
    flags += ["--compare", "false", "--label_count", "0", "--out_dir", tmp_path / "runs"]
    folder = train(PROJECT, *flags)
    report = report_of(folder)
    assert report["metrics"]["data"]["rows_without_class"] == 50
    assert set(report["headline"]) == {"accuracy", "test_accuracy"}
    assert report["headline"]["accuracy"] is None  # no hidden class to compare with
    assert report["headline"]["test_accuracy"] > 0.7
    assert set(report["metrics"]) == {"data", "cluster", "timing"}
    assert {each.name for each in folder.glob("*.png")} == {"clusters.png", "objective.png"}
    trained = rows_of(folder / "predictions.csv")
    assert len(trained) == 149

    (tmp_path / "more").mkdir()
    bad = tmp_path / "more" / "bad.csv"
    bad.write_text("a,b\n1,2\n")
    (tmp_path / "more" / "mine.csv").write_text(path.read_text())
    predict = load_project(PROJECT).predict
    inputs = [path, tmp_path / "more", tmp_path / "nowhere.csv"]
    output = call(predict, folder, *inputs, "--out_dir", tmp_path / "out", "--device", "cpu")
    assert f"not read: {bad}: there is no column 'c'" in output
    assert "nowhere.csv cannot be read" in output
    assert "rows that lack a feature, without an answer: 2" in output
    found = rows_of(Path(output.splitlines()[-1]) / "predictions.csv")
    assert len(found) == 300
    assert [row["file"] for row in found[::150]] == [str(path), str(tmp_path / "more/mine.csv")]
    whole = [row for row in found[:150] if row["class"]]
    for row, other in zip(whole, trained, strict=True):
        keys = ("row", "cluster", "class", "probability")
        assert [row[key] for key in keys[:3]] == [other[k] for k in ("row", "cluster", "predicted")]
        assert float(row["probability"]) == pytest.approx(float(other["share_in_cluster"]))
        assert float(row["distance"]) >= 0


def test_predict_streams(tmp_path, monkeypatch):
    folder, _, _ = tiny_run(PROJECT)
    program = load_project(PROJECT).predict
    monkeypatch.setattr(program, "BATCH", 7)
    header = ",".join(torch.load(folder / "model.pt", weights_only=True)["features"])
    (tmp_path / "t.csv").write_text(header + "\n" + "5.1,3.5,1.4,.2\n,,,\n6,3,5,2\n" * 10)
    sizes, read = [], program.read_batches

    def watched(*parts):
        for x in read(*parts):
            sizes.append(len(x))
            yield x

    monkeypatch.setattr(program, "read_batches", watched)
    output = call(program, folder, tmp_path / "t.csv", "--out_dir", tmp_path, "--device", "cpu")
    rows = rows_of(Path(output.splitlines()[-1]) / "predictions.csv")
    assert sizes == [7, 7, 7, 7, 2]
    assert [row["class"] for row in rows] == ["setosa", "", rows[2]["class"]] * 10
    assert [int(row["row"]) for row in rows] == list(range(30))


def test_rows_that_lack_a_feature_get_the_mean_if_they_did_in_training(tmp_path):
    flags = ["--dataset", "csv", "--csv_file", own_table(tmp_path), "--label_column", "kind"]
    flags += ["--missing", "mean", "--compare", "false", "--out_dir", tmp_path, "--device", "cpu"]
    folder = train(PROJECT, *flags)
    (tmp_path / "one.csv").write_text("a,b,c,d\n5.1,,1.4,0.2\n")
    predict = load_project(PROJECT).predict
    output = call(predict, folder, tmp_path / "one.csv", "--device", "cpu")
    (row,) = rows_of(Path(output.splitlines()[-1]) / "predictions.csv")
    assert row["class"] == "s"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--label_counts", "5,10,500"], "label_counts: iris has 120 training rows"),
        (["--clusters", "121"], "clusters: expected at most 120, the training rows"),
        (["--dataset", "csv", "--csv_file", "none.csv"], "none.csv cannot be read: No such file"),
    ],
)
def test_too_small_a_table_is_refused_with_the_key_to_change(program, flags, complaint, tmp_path):
    with pytest.raises(program.DataError, match=complaint):
        call(program, *TINY, *flags, "--out_dir", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--label_count", "20"], "label_counts: expected 20"),
        (["--distance", "plain"], "distance: expected squared where metric is pooled"),
        (["--scale_sizes", "10x2"], "scale_sizes: expected as"),
        (["--scale_sizes", "10x2x20"], "scale_sizes: expected more points"),
        (["--blob_sizes", "10,2"], "blob_sizes: expected 3 values"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(program, flags, complaint, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        call(program, *TINY, *flags, "--out_dir", tmp_path)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("classes", [("$a_b^", "NA", "x" * 60), ("\u00e9", "\u00df", "$")])
def test_plots_survive_any_class_names(classes, tmp_path, capsys):
    flags = ["--dataset", "csv", "--csv_file", own_table(tmp_path, classes), "--device", "cpu"]
    flags += ["--label_column", "kind", "--compare", "false", "--label_count", "5"]
    folder = train(PROJECT, *flags, "--out_dir", tmp_path)
    assert "warning" not in capsys.readouterr().err
    assert (folder / "clusters.png").is_file()


def test_the_least_data_and_many_classes(program, config, tmp_path):
    for name, (points, classes, features) in {"few": (8, 2, 1), "many": (600, 60, 3)}.items():
        flags = ["--dataset", "blobs", "--blob_sizes", f"{points},{features},{classes}"]
        flags += ["--label_counts", f"{classes + 1}", "--label_count", f"{classes + 1}"]
        flags += ["--splits", "1", "--n_init", "1", "--alphas", "1", "--clusters_per_class", "1"]
        folder = train(PROJECT, *TINY, *flags, "--folds", "2", "--out_dir", tmp_path / name)
        assert len(list(folder.glob("*.png"))) == 4
        assert report_of(folder)["headline"]["accuracy"] is not None


def test_the_scale_study(program, config, monkeypatch):
    numbers = program.time_one_size("3000x4x3", config, torch.device("cpu"))["fits"]
    start = numbers["sklearn_same_start"], numbers["ours_alpha_0_same_start"]
    assert start[0]["dispersion"] == pytest.approx(start[1]["dispersion"], rel=1e-4)
    assert all(numbers[name]["seconds"] > 0 for name in ("ours_labelled", "sklearn_kmeans++"))


def test_pictures_show_the_numbers_of_the_report(program, config, monkeypatch, tmp_path):
    shown = {}
    for name in ("plot_clusters", "plot_objective", "plot_label_counts", "plot_alpha"):

        def keep(*parts, name=name):
            shown[name] = parts

        keep.__name__ = name
        monkeypatch.setattr(program, name, keep)
    folder = train(PROJECT, *TINY, "--out_dir", tmp_path)
    metrics = report_of(folder)["metrics"]
    part, models, classes, _, _ = shown["plot_clusters"]
    assert classes == data.load_bundled("iris").classes
    hidden = part.given < 0
    right = [
        float((model.predict(part.x) == part.y)[hidden].double().mean())
        for model in models.values()
    ]
    kmeans = ClusterThenLabel(3, 0.0, init="k-means++", n_init=2, tol=1e-7, random_state=0)
    kmeans = kmeans.fit(part.x).relabel(part.given)
    assert list(models) == ["k-means", "ours"]
    shares = [model.predict_proba(part.x) for model in (models["k-means"], kmeans)]
    assert torch.allclose(*shares)  # of the labels given, not of all
    assert right[1] == pytest.approx(metrics["cluster"]["accuracy"])
    assert models["ours"].objective_ == pytest.approx(metrics["cluster"]["objective"])
    assert len(shown["plot_objective"][0]) == metrics["cluster"]["iterations"]
    assert shown["plot_label_counts"][:2] == (metrics["by_labels"], 3)
    assert shown["plot_alpha"][:2] == (metrics["by_alpha"], 1.0)
    timing = metrics["timing"]
    steps = timing["points_per_second"] * timing["fit_seconds"] / len(part.x)
    assert steps == pytest.approx(models["ours"].n_iter_total_)


def test_each_number_of_the_headline_is_the_one_of_its_name(program, config):
    arms = ("ours3", "ours6", "seeded3", "kmeans3", "kmeans_pooled3", "logistic", "nearest_mean")
    by_labels = {
        str(count): {arm: {"accuracy": {"mean": f"{arm} {count}"}} for arm in arms}
        for count in (5, 10, 20)
    }
    own = replace(config, label_count=10, label_counts=(5, 10, 20))
    metrics = {"by_labels": by_labels, "cluster": {"clusters": 3}}
    assert program.headline(metrics, own) == {
        "accuracy": "ours3 10", "seeded_accuracy": "seeded3 10",
        "kmeans_accuracy": "kmeans3 10", "supervised_accuracy": "logistic 10",
    }  # fmt: skip


def test_settings_reach_the_model(program, config):
    table = program.load_table(config)
    mine = {"clusters": 4, "alpha": 0.3, "metric": "euclidean", "distance": "plain"}
    mine |= {"n_init": 7, "max_iter": 9, "tol": 0.01}
    changed = replace(config, **mine)
    made = program.make_model(changed, table, number=5).get_params()
    expected = mine | {"n_clusters": 4, "random_state": 5}
    del expected["clusters"]
    assert {name: made[name] for name in expected} == expected
    assert program.cluster_counts(table, changed, 100) == [3, 4, 6]
    assert program.cluster_counts(table, changed, 5) == [3, 4]
    assert program.ours_of(changed, table) == "ours4"
    first, second = (program.sample_split(table, config, 10, number) for number in (0, 1))
    other = program.sample_split(table, replace(config, seed=1), 10, 0)
    assert not torch.equal(first.rows, second.rows)
    assert not torch.equal(first.rows, other.rows)
    unscaled = program.sample_split(table, replace(config, scale=False), 10, 0)
    assert unscaled.x.std(0, correction=0).max() > 1.5
