"""The descent against brute force, closed forms and scikit-learn; runs as a user starts them."""

import csv
import hashlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans

from semi_supervised_clustering import data
from semi_supervised_clustering.model import (
    ClusterThenLabel,
    Descent,
    geometric_medians,
    join_change,
    move_labelled,
    weighted_gini,
)

TRAIN = Path(__file__).parents[1] / "semi_supervised_clustering" / "train.py"
TINY = ["--dataset", "iris", "--device", "cpu", "--splits", "2", "--label_counts", "5,10"]
TINY += [
    "--shown_labels",
    "20",
    "--alphas",
    "0,1",
    "--clusters_per_class",
    "1,2",
    "--folds",
    "2",
    "--n_init",
    "2",
]


def problem(seed: int, n: int = 60, d: int = 3, classes: int = 3, labelled: float = 0.4):
    """Points (n, d) and classes that hang together loosely, with most of the latter hidden."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=n)
    x = rng.normal(size=(n, d)) + 1.5 * rng.normal(size=(classes, d))[truth]
    y = np.where(rng.random(n) < labelled, truth, -1)
    return torch.from_numpy(x), torch.from_numpy(y), rng


def brute_objective(x, y, own, centres, alpha, plain=False):
    """Equations 1 and 2, written out over points and clusters."""
    gaps = (x - centres[own]).square().sum(1)
    total = float((gaps.sqrt() if plain else gaps).mean())
    labelled = int((y >= 0).sum())
    for cluster in own.unique():
        members = y[(own == cluster) & (y >= 0)]
        if len(members):
            shares = torch.bincount(members).double() / len(members)
            total += alpha * len(members) / labelled * float(1 - shares.square().sum())
    return total


def descent(x, y, centres, **options):
    return Descent(x, y, centres, **({"distance": "squared", "chunk": 7, "alpha": 1.0} | options))


@pytest.mark.parametrize("distance", ["squared", "plain"])
@pytest.mark.parametrize("seed", range(6))
def test_no_step_raises_the_objective(seed, distance):
    x, y, rng = problem(seed)
    alpha = [0.0, 0.05, 0.5, 2.0, 20.0, 1000.0][seed]
    x = x - x.mean(0)
    start = torch.from_numpy(rng.normal(size=(2 + seed, 3)) * (4 if seed % 2 else 1))
    if seed == 3:
        start[-1] = 1e3  # an empty cluster
    steps = descent(x, y, start, alpha=alpha, distance=distance)
    moved = {"assign": 0, "move_labelled": 0}
    before = brute_objective(x, y, steps.own, steps.centres, alpha, distance == "plain")
    for _ in range(12):
        for name in ("assign", "move_labelled", "update_centres"):
            count = getattr(steps, name)()
            after = brute_objective(x, y, steps.own, steps.centres, alpha, distance == "plain")
            assert after <= before + 1e-12 * before, name
            assert steps.objective() == pytest.approx(after, rel=1e-10)
            moved[name] = moved.get(name, 0) + (count or 0)
            before = after
    assert moved["assign"] > 0
    assert moved["move_labelled"] > 0 or alpha == 0


def test_nearest_centre_step_leaves_labelled_points_alone():
    x, y, _ = problem(0, n=200)
    steps = descent(x - x.mean(0), y, (x - x.mean(0))[:3], alpha=50.0)
    assert steps.move_labelled() > 0
    own = steps.own.clone()
    steps.update_centres()
    assert steps.assign() > 0
    assert torch.equal(steps.own[y >= 0], own[y >= 0])
    assert not torch.equal(steps.own, own)


@pytest.mark.parametrize("seed", range(5))
def test_sums_follow_the_points_that_move(seed):
    x, y, _ = problem(seed, n=150)
    steps = descent(x, y, x[:5], alpha=3.0)
    for _ in range(4):
        steps.iterate()
    for cluster in range(5):
        members = steps.own == cluster
        assert int(steps.sizes[cluster]) == int(members.sum())
        torch.testing.assert_close(steps.sums[cluster], x[members].sum(0))
        counts = torch.bincount(y[members & (y >= 0)], minlength=3).double()
        assert torch.equal(steps.counts[cluster], counts)


def test_change_of_one_move_is_that_of_the_whole_objective():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, size=(5, 3)).astype(float)
    counts[2] = 0
    labelled, squares = counts.sum(1), (counts**2).sum(1)
    for a, b, j in itertools.product(range(5), range(5), range(3)):
        if a == b or counts[a, j] == 0:
            continue
        moved = counts.copy()
        moved[a, j] -= 1
        moved[b, j] += 1
        whole = weighted_gini(moved).sum() - weighted_gini(counts).sum()
        left = squares[a] - 2 * counts[a, j] + 1
        change = join_change(labelled[b], squares[b], counts[b, j])
        change -= join_change(labelled[a] - 1, left, counts[a, j] - 1)
        assert change == pytest.approx(whole, abs=1e-12)


def test_gini_by_hand():
    counts = np.array([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    assert weighted_gini(counts) == pytest.approx([4 * (1 - 9 / 16 - 1 / 16), 0, 0])


@pytest.mark.parametrize("seed", range(8))
def test_labelled_moves_end_where_no_single_move_helps(seed):
    x, y, rng = problem(seed, n=30, labelled=1.0)
    costs = torch.cdist(x, x[:4]).square().numpy()
    y, own, weight = y.numpy(), costs.argmin(1), float(rng.choice([0.3, 3.0, 30.0]))
    counts = np.zeros((4, 3))
    np.add.at(counts, (own, y), 1)

    def total(clusters):
        table = np.zeros((4, 3))
        np.add.at(table, (clusters, y), 1)
        return costs[np.arange(30), clusters].sum() + weight * weighted_gini(table).sum()

    end = move_labelled(costs, y, own, counts, weight)
    assert total(end) <= total(own) + 1e-9
    assert (end != own).any() or weight < 1
    for point, cluster in itertools.product(range(30), range(4)):
        other = end.copy()
        other[point] = cluster
        assert total(other) >= total(end) - 1e-9


@pytest.mark.parametrize("clusters", [1, 3, 8, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_weight_it_is_scikit_learns_kmeans(clusters, dtype):
    x, y, rng = problem(clusters, n=50 if clusters == 50 else 400, d=5)
    x = (x + 3).to(dtype)
    start = x[torch.from_numpy(rng.permutation(len(x))[:clusters])]
    ours = ClusterThenLabel(clusters, 0.0, init=start, tol=0).fit(x, y)
    options = {"n_init": 1, "tol": 0, "algorithm": "lloyd"}
    theirs = KMeans(clusters, init=start.numpy(), **options).fit(x.numpy())
    assert ours.labels_.tolist() == theirs.labels_.tolist()
    exact = dtype == torch.float64
    np.testing.assert_allclose(
        ours.cluster_centers_, theirs.cluster_centers_, rtol=0, atol=1e-12 if exact else 1e-5
    )
    assert ours.objective_ * len(x) == pytest.approx(theirs.inertia_, rel=1e-4, abs=1e-9)
    if exact:
        assert ours.objective_ * len(x) == pytest.approx(theirs.inertia_, rel=1e-12, abs=1e-9)
        assert ours.n_iter_ == theirs.n_iter_


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


def best_of_all(x, y, clusters, alpha):
    """The lowest objective over all assignments, each with its means as centres."""
    best = float("inf")
    for own in itertools.product(range(clusters), repeat=len(x)):
        own = torch.tensor(own)
        centres = torch.stack(
            [x[own == k].mean(0) if (own == k).any() else x[0] for k in range(clusters)]
        )
        best = min(best, brute_objective(x, y, own, centres, alpha))
    return best


def test_finds_the_optimum_of_tiny_data_often():
    found = []
    for seed in range(8):
        x, y, _ = problem(seed, n=7, d=2, classes=2, labelled=0.6)
        if not (y >= 0).any():
            continue
        model = ClusterThenLabel(2, 1.0, init="k-means++", n_init=20, random_state=seed)
        value, optimum = model.fit(x, y).objective_, best_of_all(x, y, 2, 1.0)
        assert value >= optimum - 1e-12
        found.append(value <= optimum + 1e-9)
    assert np.mean(found) >= 0.75, found


def test_median_beats_the_mean_and_meets_the_optimality_condition():
    x, _, _ = problem(0, n=41, d=2)
    own = torch.zeros(len(x), dtype=torch.long)
    centre = x.mean(0, keepdim=True)
    for _ in range(20):
        centre = geometric_medians(x, own, centre, 10)
    gap = x - centre
    assert (gap / gap.norm(dim=1, keepdim=True)).sum(0).norm() < 1e-6
    assert gap.norm(dim=1).sum() < (x - x.mean(0)).norm(dim=1).sum() - 1e-3


def test_median_leaves_a_data_point_and_stays_at_an_optimal_one():
    x = torch.tensor([[0.0, 0], [10, 0], [11, 1]], dtype=torch.float64)
    own = torch.zeros(3, dtype=torch.long)
    far = geometric_medians(x, own, x[:1], 2)
    assert (x - far).norm(dim=1).sum() < (x - x[0]).norm(dim=1).sum() - 1
    torch.testing.assert_close(geometric_medians(x, own, x[1:2], 2), x[1:2])


def test_cluster_without_labels_takes_those_of_the_nearest_labelled_one():
    x = torch.tensor([[0.0], [1], [10], [11], [14], [15]])
    y = torch.tensor([5, -1, 7, 7, -1, -1])
    model = ClusterThenLabel(3, init=torch.tensor([[0.0], [10], [15]])).fit(x, y)
    assert model.predict(x).tolist() == [5, 5, 7, 7, 7, 7]
    assert model.predict_proba(x)[:, 1].tolist() == [0, 0, 1, 1, 1, 1]
    assert model.impurity_ == 0


def test_predictions_are_class_shares_and_labels_agree_with_predict():
    x, y, _ = problem(2, n=300, labelled=0.2)
    model = ClusterThenLabel(7, 0.3, random_state=1).fit(x, y)
    free = y < 0
    assert torch.equal(model.labels_[free], model.cluster(x)[free])
    probs = model.predict_proba(x)
    torch.testing.assert_close(probs.sum(1), torch.ones(300, dtype=torch.float64))
    own = model.labels_ == model.labels_[free][0]
    counts = torch.bincount(y[own & (y >= 0)], minlength=3).double()
    if counts.sum():
        torch.testing.assert_close(probs[free][0], counts / counts.sum())
    assert torch.equal(model.predict(x), model.classes_[probs.argmax(1)])


def test_starts_conventions_and_chunks():
    x, y, _ = problem(4, n=200)
    model = ClusterThenLabel(6, 2.0, random_state=3)
    first, again = model.fit(x, y).labels_, clone(model).fit(x.numpy(), y.numpy()).labels_
    assert torch.equal(first, again)
    assert torch.equal(first, ClusterThenLabel(6, 2.0, random_state=3, chunk=9).fit(x, y).labels_)
    many = ClusterThenLabel(6, 2.0, n_init=10).fit(x, y).objective_
    assert many <= ClusterThenLabel(6, 2.0, n_init=1).fit(x, y).objective_


@pytest.mark.parametrize("distance", ["squared", "plain"])
@pytest.mark.parametrize("init", ["labelled", "k-means++"])
def test_odd_inputs_work(init, distance):
    x, y, _ = problem(5, n=20)
    none = torch.full_like(y, -1)
    one = none.clone()
    one[3] = 2
    full = problem(5, n=20, labelled=1.1)[1]
    same, constant = torch.ones(20, 3), torch.cat((x, torch.ones(20, 1)), 1)
    for points, labels, clusters in (
        (x, one, 3), (x, full, 3), (x, full, 2), (x, y, 1), (x, y, 20), (same, y, 3),
        (torch.cat((x, x)), torch.cat((y, y)), 25), (constant, y, 4), (x[:, :1], y, 3),
        (x.float() * 1e3, y, 3), ((x * 10).long(), y, 3), (x[:1], one[3:4], 1),
    ):  # fmt: skip
        options = {"init": init, "distance": distance, "n_init": 2, "max_iter": 30}
        model = ClusterThenLabel(clusters, **options).fit(points, labels)
        assert np.isfinite(model.objective_)
        assert model.cluster_centers_.isfinite().all()
        assert set(model.predict(points).tolist()) <= set(labels[labels >= 0].tolist())
    model = ClusterThenLabel(20, init=init, distance=distance).fit(x, y)
    assert model.objective_ == pytest.approx(0, abs=1e-12)  # a cluster per point
    with pytest.raises(ValueError, match="no point was labelled"):
        ClusterThenLabel(3, init=init, distance=distance).fit(x, none).predict(x)


def test_far_from_the_origin_nothing_is_cancelled():
    x, y, _ = problem(6, n=200)
    near = ClusterThenLabel(3).fit(x, y)
    far = ClusterThenLabel(3).fit(x + 1e6, y)
    assert torch.equal(near.labels_, far.labels_)
    assert far.objective_ == pytest.approx(near.objective_, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"clusters": 0}, "clusters: expected 1 to 60"),
        ({"clusters": 61}, "clusters: expected 1 to 60"),
        ({"alpha": -1}, "expected alpha"),
        ({"distance": "cosine"}, "distance: expected squared or plain"),
        ({"init": "random"}, "init: expected labelled"),
        ({"init": torch.zeros(2, 2)}, "init: expected"),
    ],
)
def test_impossible_settings_are_refused(change, complaint):
    x, y, _ = problem(0)
    with pytest.raises(ValueError, match=complaint):
        ClusterThenLabel(**({"clusters": 3} | change)).fit(x, y)


def test_impossible_data_are_refused():
    x, y, _ = problem(0)
    for points, labels in ((x[:, 0], y), (x * float("nan"), y), (x, y[:5]), (x, y - 5), (x[:0], y)):
        with pytest.raises(ValueError, match="expected"):
            ClusterThenLabel(1).fit(points, labels)


# --- data -------------------------------------------------------------------------------------

CSV = "size,kind,weight,name\n1,a,10,p\n2,b,,q\n3,,30,r\n4,a,40,s\n"


def test_csv_with_missing_values_and_labels(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    table = data.read_csv(path, "kind", ("all",))
    assert table.classes == ("a", "b")
    assert table.y.tolist() == [0, 1, -1, 0]
    assert table.x.shape == (4, 2)
    whole = data.drop_incomplete(table)
    assert whole.x.tolist() == [[1, 10], [3, 30], [4, 40]]
    assert (whole.dropped, whole.rows.tolist()) == (1, [0, 2, 3])
    assert "1 rows lack a feature" in whole.note


@pytest.mark.parametrize(
    ("text", "columns", "complaint"),
    [
        (CSV.replace("kind", "sort"), "all", "no column 'kind'"),
        (CSV.replace("10", "ten"), "weight", "line 2: expected a number, found 'ten'"),
        (CSV.replace("10", "inf"), "weight", "line 2: expected a number, found 'inf'"),
        (CSV + "5,a\n", "all", "line 6: expected 4 values, found 2"),
        (CSV, "height", "no column 'height'"),
        (CSV, "kind", "cannot be both feature and class"),
        ("kind,name\na,p\nb,q\n", "all", "no column but 'kind' holds numbers"),
        (CSV.replace("b", "a"), "all", "holds 1 classes"),
        ("", "all", "expected a header"),
        (None, "all", "cannot be read"),
    ],
)
def test_bad_table_is_named_in_one_line(tmp_path, text, columns, complaint):
    path = tmp_path / "t.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(data.DataError) as error:
        data.read_csv(path, "kind", (columns,))
    assert complaint in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


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
    train = table.x[few.rows, 1]
    expected = (table.x[few.rows_test, 1] - train.mean()) / train.std(correction=0)
    torch.testing.assert_close(few.x_test[:, 1], expected)
    assert few.x.isfinite().all()
    with pytest.raises(data.DataError, match="cannot be labelled"):
        data.split(table, label_count=134, **options)


def test_download_is_verified(tmp_path):
    source = tmp_path / "source.csv"
    source.write_text(CSV)
    known = hashlib.sha256(CSV.encode()).hexdigest()
    data.download(source.as_uri(), known, tmp_path / "in" / "t.csv")
    assert (tmp_path / "in" / "t.csv").read_text() == CSV
    with pytest.raises(data.DataError, match="not the known file"):
        data.download(source.as_uri(), "0" * 64, tmp_path / "u.csv")
    with pytest.raises(data.DataError, match="does not answer"):
        data.download((tmp_path / "none").as_uri(), known, tmp_path / "u.csv")
    assert not (tmp_path / "u.csv").exists()


# --- as a user starts it ----------------------------------------------------------------------


def start(*flags: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, str(TRAIN), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, text=True, **pipes)


def finish(process: subprocess.Popen, cwd: Path) -> tuple[Path, dict]:
    """The run's folder and its metrics but for what hangs on the clock."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    folder = cwd / output.splitlines()[-1]
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert metrics.pop("timing")["points_per_second"] > 0
    return folder, metrics


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    whole = start(*TINY, "--out_dir", "a", cwd=tmp_path)
    killed = start(*TINY, "--out_dir", "killed", cwd=tmp_path)
    while not any("labels-5," in f.read_text() for f in tmp_path.glob("killed/*/history.csv")):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    (folder,) = tmp_path.glob("killed/*")
    assert not (folder / "metrics.json").exists()
    _, resumed = finish(start("--resume", str(folder), cwd=tmp_path), tmp_path)
    unbroken, expected = finish(whole, tmp_path)
    assert resumed == expected
    rows = list(csv.DictReader((folder / "history.csv").open()))
    others = list(csv.DictReader((unbroken / "history.csv").open()))
    for row, other in zip(rows, others, strict=True):
        assert row | {"seconds": ""} == other | {"seconds": ""}
    assert {row["stage"] for row in rows} == {"cluster", "labels-5", "labels-10", "alpha-10"}
    for name in ("clusters", "objective", "labels", "alpha"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    lines = (folder / "predictions.csv").read_text().splitlines()
    assert len(lines) == 151


def test_own_table_with_few_labels_and_the_scale_study(tmp_path):
    iris = data.load_bundled("iris")
    lines = ["a,b,c,d,class"]
    for number, (x, y) in enumerate(zip(iris.x.tolist(), iris.y.tolist(), strict=True)):
        lines.append(",".join(map(str, x)) + "," + (iris.classes[y] if number % 3 else ""))
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    flags = [*TINY, "--dataset", "csv", "--csv_file", "mine.csv", "--scale_study", "true"]
    flags += ["--scale_sizes", "500,4,3", "--distance", "plain", "--max_iter", "20"]
    folder, metrics = finish(start(*flags, "--out_dir", "runs", cwd=tmp_path), tmp_path)
    assert metrics["data"]["rows_without_class"] == 50
    predicted = list(csv.DictReader((folder / "predictions.csv").open()))
    assert len(predicted) == 150
    assert (
        np.mean([row["predicted"] == iris.classes[int(row["row"]) // 50] for row in predicted])
        > 0.7
    )


def test_bad_data_end_in_one_line(tmp_path):
    (tmp_path / "bad.csv").write_text(CSV + "5,a\n")
    flags = ["--dataset", "csv", "--csv_file", "bad.csv", "--label_column", "kind"]
    process = start(*flags, "--out_dir", "runs", cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.splitlines() == ["error: bad.csv, line 6: expected 4 values, found 2"]
