"""Searches, rounding and 8-bit pictures against closed forms; the experiment's wiring; runs."""

import copy
import csv
import functools
import itertools
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from projects import call, config_of, load_project, tiny_run, train, train_until
from torch import nn

modules = load_project("carlini_wagner")
data, model, predict, run, story = (
    modules.data,
    modules.model,
    modules.predict,
    modules.run,
    modules.train,
)
Goal, margin, distance, to_8bit = model.Goal, model.margin, model.distance, model.to_8bit

SIZES = ["--train_count", "512", "--batch_size", "16", "--epochs", "2", "--width", "4"]
EFFORT = ["--attack_batch", "3", "--rounds", "2", "--steps", "20", "--fast_steps", "15"]
EFFORT += ["--probability_steps", "20", "--rounding_steps", "12", "--probability_rounding", "12"]
COUNT = ["--picture_count", "4", "--target", "next"]
TINY = ["--dataset", "digits", "--device", "cpu", *SIZES, *EFFORT, *COUNT]


# --- what is asked ----------------------------------------------------------------------------


def scores_and_target(*, count: int = 40, classes: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    scores = 4 * torch.randn(count, classes, generator=generator, dtype=torch.float64) - 3
    return scores, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("scores", [model.identity, model.probabilities])
@pytest.mark.parametrize("targeted", [True, False])
def test_the_margin_of_a_goal_is_that_of_a_loop(scores, targeted):
    logits, target = scores_and_target()
    margins = Goal(target, 0.3, targeted, scores).margin(logits)
    assert (margins > 0).any() and (margins < 0).any()
    for row, goal, got in zip(
        scores(logits).tolist(), target.tolist(), margins.tolist(), strict=True
    ):
        lead = row[goal] - max(score for number, score in enumerate(row) if number != goal)
        assert got == pytest.approx(lead if targeted else -lead)
    rows = torch.tensor([3, 1])
    assert torch.equal(Goal(target).of(rows).label, target[rows])


@pytest.mark.parametrize("scores", [model.identity, model.probabilities])
def test_the_slope_is_that_of_the_logits_margin(scores):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, target = torch.rand(3, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 3])
    logits, margins, slope = Goal(target, 0.0, True, scores).slope(network, x)
    assert torch.equal(margins, margin(scores(network(x)), target))
    assert torch.equal(logits, network(x)) and not logits.requires_grad
    for place in itertools.product(range(3), range(2), range(2)):
        step = torch.zeros_like(x)
        step[(slice(None), *place)] = 1e-6
        difference = margin(network(x + step), target) - margin(network(x - step), target)
        torch.testing.assert_close(
            slope[(slice(None), *place)], difference / 2e-6, rtol=1e-5, atol=1e-7
        )


def test_saturated_probabilities_have_a_slope_all_the_same():
    network = Half(torch.full((3, 4, 4), 1000.0), 40000.0)
    x = torch.full((1, 3, 4, 4), 0.5)
    goal = Goal(torch.tensor([1]), 0.0, True, model.probabilities)
    _, margins, slope = goal.slope(network, x)
    assert margins == -1 and torch.equal(slope[0], network.a)
    assert model.alternating(network, x, goal, steps=30).success.all()


# --- the box, and networks whose nearest picture is known ---------------------------------------


def test_every_8bit_pixel_has_a_finite_w_that_gives_it_back_and_can_move():
    x = torch.arange(256) / 255
    w = model.to_w(x).requires_grad_()
    back = model.to_x(w)
    back.sum().backward()
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)
    assert back.min() >= 0 and back.max() <= 1
    assert w.grad.min() > 0.005  # of 0 and 1, too


class Half(nn.Module):
    """Two classes; the margin of class 1 is a . x - b, so that the nearest picture is known."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        score = (self.a * x).flatten(1).sum(1) - self.b
        return torch.stack((torch.zeros_like(score), score), 1)


def half_space(*, count: int = 3, size: int = 8):
    """Pictures (count, 3, size, size), their network and the least L2 to a margin of kappa.

    Some pixels lie at 0 and 1 and have to move inwards; none has to leave the box.
    """
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(80, 176, (count, 3, size, size), generator=generator) / 255
    a = torch.randn(3, size, size, generator=generator)
    x0[:, 0] = torch.where(a[0] > 0, 0.0, 1.0)
    b = float((a * x0).flatten(1).sum(1).max()) + 12.0
    network = Half(a, b)
    start = margin(network(x0), torch.ones(count, dtype=torch.long))
    return network, x0, lambda kappa: (kappa - start) / a.norm()


ATTACKS = {
    "logits": partial(model.carlini_wagner, rounds=6, steps=150, lr=1.0),
    "fast": partial(model.decoupled, steps=60),
    "probability": partial(model.alternating, steps=100),
}


@pytest.mark.parametrize("kappa", [0.0, 5.0])
@pytest.mark.parametrize("name", ATTACKS)
def test_each_search_finds_the_nearest_picture_of_a_half_space(name, kappa):
    network, x0, least = half_space()
    goal = Goal(torch.ones(len(x0), dtype=torch.long), kappa)
    found = ATTACKS[name](network, x0, goal)
    assert found.success.all()
    assert (goal.margin(network(found.x)) >= kappa).all()
    assert found.x.min() >= 0 and found.x.max() <= 1
    share = distance(found.x, x0) / least(kappa)
    assert (share > 1 - 1e-4).all() and (share < 1.01).all(), share
    moved = (found.x - x0)[:, 0].abs()  # the saturated pixels
    expected = network.a[0].abs() * (least(kappa) / network.a.norm())[:, None, None]
    assert (moved - expected).abs().mean() < 0.1 * expected.mean()


def test_the_first_step_of_the_fast_attack_is_the_nearest_picture_of_a_linear_network():
    network, x0, least = half_space()
    goal = Goal(torch.ones(len(x0), dtype=torch.long), 2.0)
    found = model.decoupled(network, x0, goal, steps=2)
    assert (found.trace[0, 2] == 0).all()  # the picture itself is asked first
    torch.testing.assert_close(found.trace[1, 2], 1.001 * least(2.0), rtol=2e-4, atol=0)
    away = found.x - x0
    direction = (network.a / network.a.norm()) * least(2.0)[:, None, None, None]
    torch.testing.assert_close(away, direction, rtol=1e-2, atol=1e-5)
    assert found.success.all() and (found.trace[1, 1] < 2.03).all()


@pytest.mark.parametrize("factor", [10.0, 0.1])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_network_with_larger_logits_is_attacked_with_the_same_result(name, factor):
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    scaled = nn.Sequential(copy.deepcopy(network), Scale(factor))
    x0 = torch.randint(0, 256, (4, 3, 4, 4)).double() / 255
    goal = Goal(network(x0).argsort(1)[:, 1])
    results = [ATTACKS[name](net, x0, goal) for net in (network, scaled)]
    assert all(found.success.all() for found in results)
    torch.testing.assert_close(results[0].x, results[1].x, rtol=1e-4, atol=1e-5)
    rounded = [model.round_off(net, x0, goal, results[0].x, steps=10) for net in (network, scaled)]
    assert torch.equal(rounded[0].x, rounded[1].x)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_the_fast_attack_goes_half_of_the_way_back_from_far_beyond_the_boundary():
    """Where the margin's slope turns out to be larger than at the picture, by first order."""

    class Steeper(nn.Module):
        def forward(self, x):  # margin -0.3 at the picture; from 0.05 on its slope is 21, before 1
            way = x[:, 0, 0, 0] - 0.2
            lead = way + 20 * (way - 0.05).clamp(min=0) - 0.3
            return torch.stack((torch.zeros_like(lead), lead), 1)

    x0 = torch.full((1, 3, 2, 2), 0.2)
    found = model.decoupled(Steeper(), x0, Goal(torch.tensor([1])), steps=5)
    first, *others = found.trace[1:5, 2, 0].tolist()
    least = (0.3 + 20 * 0.05) / 21
    assert first == pytest.approx(0.3, rel=2e-3)  # first order, from the picture itself
    assert others[:2] == pytest.approx([0.3 * 0.7, 0.3 * 0.7**2], rel=2e-3)  # at most 30%
    assert others[2] == pytest.approx((others[1] + least) / 2, rel=2e-2)


def test_untargeted_any_other_class_will_do():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 12, generator=generator)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False))
    network[1].weight.data = weights
    x0 = 0.5 + 0.02 * torch.randn(6, 3, 2, 2, generator=generator)
    label = network(x0).argmax(1)
    gaps = [
        [
            float((network(x0[n, None])[0, y] - score) / (weights[y] - weights[other]).norm())
            for other, score in enumerate(network(x0[n, None])[0])
            if other != y
        ]
        for n, y in enumerate(label.tolist())
    ]
    least = torch.tensor([min(row) for row in gaps])  # the nearest of the four boundaries
    for search in ATTACKS.values():
        found = search(network, x0, Goal(label, targeted=False))
        assert found.success.all() and (network(found.x).argmax(1) != label).all()
        assert (distance(found.x, x0) > least - 1e-4).all()
        assert (distance(found.x, x0) < 1.02 * least).float().mean() > 0.6  # else another boundary


def test_a_pixel_at_the_edge_never_leaves_the_box():
    network, x0, _ = half_space()
    x0 = torch.where(network.a > 0, 1.0, 0.0).expand_as(x0).contiguous()  # nothing left to gain
    network.b = float((network.a * x0[0]).sum()) + 5.0
    for search in ATTACKS.values():
        found = search(network, x0, Goal(torch.ones(len(x0), dtype=torch.long)))
        assert not found.success.any()
        assert found.x.min() >= 0 and found.x.max() <= 1


# --- Carlini & Wagner's c -----------------------------------------------------------------------


def test_the_search_over_c_sees_failures_after_the_first_success(monkeypatch):
    """In a half-space the least c that can succeed is 2 D / |a|; a round with less has to fail."""
    network, x0, least = half_space()
    goal, tried = Goal(torch.ones(len(x0), dtype=torch.long)), []
    minimise = model.minimise

    def watch(network, goal, best, c, **options):
        won = minimise(network, goal, best, c, **options)
        tried.append((c, won, best))
        return won

    monkeypatch.setattr(model, "minimise", watch)
    model.carlini_wagner(network, x0, goal, rounds=4, steps=150, lr=1.0)
    needed = 2 * least(0.0) / network.a.norm()
    c, won, (best, *_) = zip(*tried, strict=True)
    torch.testing.assert_close(c[0], needed, rtol=1e-2, atol=0)
    assert torch.stack(won)[torch.stack(c) > 1.2 * needed].all() and best.success.all()
    rate = least(0.0) / math.sqrt(x0[0].numel())
    for share, expected in ((0.5, False), (0.9, False), (1.3, True), (3.0, True)):
        won = minimise(network, goal, best, share * needed, steps=150, rate=rate)
        assert (won == expected).all(), share


def test_c_is_four_times_larger_then_smaller_then_between(monkeypatch):
    network, x0, _ = half_space(count=2)
    answers = iter([[False, True], [False, True], [True, False], [False, True], [True, True]])
    tried = []

    def answer(network, goal, best, c, **_):
        tried.append(c.clone())
        return torch.tensor(next(answers))

    monkeypatch.setattr(model, "minimise", answer)
    goal = Goal(torch.ones(2, dtype=torch.long))
    model.carlini_wagner(network, x0, goal, rounds=5, steps=1, lr=1.0)
    shares = torch.stack(tried) / tried[0]
    expected = [[1, 1], [4, 1 / 4], [16, 1 / 16], [8, 1 / 8], [128**0.5, 1 / 128**0.5]]
    torch.testing.assert_close(shares, torch.tensor(expected))


def test_two_steps_of_adam_by_hand():
    network, x0, _ = half_space()
    network.a = network.a.double()
    x0 = x0.double()
    goal, c = Goal(torch.ones(len(x0), dtype=torch.long), 1.0), torch.tensor([0.3, 1.0, 9.0])
    best = model.Tracker(x0, goal, network(x0))
    rate = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)
    model.minimise(network, goal, best, c.double(), steps=3, rate=rate)
    w = model.to_w(x0).requires_grad_()
    optimizer = torch.optim.Adam([{"params": [w], "lr": 1.0}])
    for step in range(2):
        x = (torch.tanh(w) / 0.99 + 1) / 2
        loss = (x - x0).square().sum((1, 2, 3)) - c * (network(x)[:, 1] - 1).clamp(max=best.asked)
        optimizer.zero_grad()
        loss.sum().backward()
        old = w.detach().clone()
        optimizer.step()
        share = rate * (1 + math.cos(math.pi * step / 3)) / 2
        with torch.no_grad():
            w.copy_(old + share[:, None, None, None] * (w - old))
        expected = distance(model.to_x(w.detach()), x0)
        torch.testing.assert_close(best.trace[step + 1][2], expected, rtol=1e-4, atol=1e-9)


def test_a_picture_whose_objective_has_stopped_falling_leaves(monkeypatch):
    network, x0, _ = half_space()
    goal = Goal(torch.ones(len(x0), dtype=torch.long))
    best = model.Tracker(x0, goal, network(x0))
    rate = torch.tensor([0.0, 1e-3, 1e-3])  # the first one cannot move
    model.minimise(network, goal, best, torch.full((3,), 0.3), steps=50, rate=rate)
    queries = best.found().queries.tolist()
    assert queries[0] == 10 and min(queries[1:]) > 15


# --- the owner's rule --------------------------------------------------------------------------


class TwoPixels(nn.Module):
    """The logits of two classes are the means of the picture's two columns."""

    def forward(self, x):
        return 4 * x.mean((1, 2))


def test_the_owners_rule_step_by_step_on_two_pixels():
    """Where the target does not lead, along the criterion's slope alone; else straight home."""
    x0 = torch.tensor([0.6, 0.3]).expand(1, 3, 1, 2).contiguous().double()
    goal = Goal(torch.tensor([1]), 0.0, True, model.probabilities)
    found = model.alternating(TwoPixels(), x0, goal, steps=12)
    pixels, path = np.array([0.6, 0.3]), []
    uphill = np.array([-1.0, 1.0]) / math.sqrt(6)  # in each of three colours
    slack = model.SLACK * float(torch.tensor([4 * 0.6, 4 * 0.3]).softmax(0).diff().abs())
    for step in range(12):
        away = (pixels - [0.6, 0.3]) * math.sqrt(3)
        length = np.linalg.norm(away)
        path.append(length)
        lead = np.exp(4 * pixels) / np.exp(4 * pixels).sum()
        if step == 0:
            pixels = pixels + uphill * 1.001 * 0.3 * math.sqrt(3) / math.sqrt(2)
            continue
        share = 0.001 + (0.3 - 0.001) * (1 + math.cos(math.pi * step / 12)) / 2
        if lead[1] - lead[0] >= slack:
            pixels = pixels - share * (pixels - [0.6, 0.3])
        else:
            pixels = pixels + uphill * share * length
    assert found.trace[:, 2, 0].tolist() == pytest.approx(path, rel=1e-6)
    assert found.success.all()
    least = 0.3 * math.sqrt(3) / math.sqrt(2)
    assert found.trace[-1, 2, 0] == pytest.approx(least, rel=0.05)


# --- each picture for itself ------------------------------------------------------------------


def test_a_batch_gives_what_its_pictures_give_alone():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x0 = torch.rand(4, 3, 4, 4, dtype=torch.float64)
    x0[3] = 0.5  # an easy one among hard ones: they need another c and stop at another time
    x0 = to_8bit(x0)
    order = network(x0).argsort(1)
    target = torch.stack((order[0, 0], order[1, 0], order[2, 1], order[3, 2]))
    search = partial(model.carlini_wagner, rounds=4, steps=60, lr=1.0)
    rounding = partial(model.round_off, steps=12)
    attacks = [search, partial(model.decoupled, steps=30), partial(model.alternating, steps=30)]
    for attack in (*attacks, lambda n, x, goal: rounding(n, x, goal, 0.9 * x)):
        together = attack(network, x0, Goal(target, 0.5))
        for number in range(4):
            alone = attack(network, x0[number, None], Goal(target[number, None], 0.5))
            torch.testing.assert_close(together.x[number], alone.x[0])
            assert together.queries[number] == alone.queries[0]
            torch.testing.assert_close(together.c[number], alone.c[0])
            best = together.trace[: int(alone.queries[0]), :, number]
            torch.testing.assert_close(best, alone.trace[..., 0], equal_nan=True)
    together = search(network, x0, Goal(target, 0.5))
    assert together.queries.unique().numel() > 1  # finished ones have left the batch
    assert together.c.unique().numel() > 1


def test_the_best_of_each_picture_is_kept():
    x0 = torch.full((2, 3, 2, 2), 0.5)
    tracker = model.Tracker(x0, Goal(torch.tensor([0, 0]), 1.0), torch.tensor([[0.0, 2.0]] * 2))
    rows, c = torch.arange(2), torch.tensor([3.0, 4.0])
    moves = [(0.10, -2.0), (0.30, 2.0), (0.20, 1.5), (0.05, 0.9), (0.25, 9.0)]
    for way, reached in moves:  # the second picture never comes beyond -1.05
        x = x0 + way
        tracker.see(rows, x, torch.tensor([reached, min(reached, -1.0 - way)]), c)
    found = tracker.found()
    assert found.success.tolist() == [True, False]
    torch.testing.assert_close(found.x[0], x0[0] + 0.20)  # the closest with margin 1 or more
    torch.testing.assert_close(found.x[1], x0[1] + 0.05)  # the closest try: margin -1.05
    assert found.trace[:, 3, 0].isnan().tolist() == [True, False, False, False, False]
    assert found.trace[:, 3, 1].isnan().all()
    assert found.trace[2, 3, 0] == pytest.approx(0.2 * math.sqrt(12))
    assert found.c.tolist() == [3, 4] and found.queries.tolist() == [5, 5]


def test_a_failure_is_a_failure_and_leaves_the_closest_try():
    network, x0, _ = half_space()
    network.b += 1e4
    target = torch.ones(len(x0), dtype=torch.long)
    found = model.decoupled(network, x0, Goal(target), steps=10)
    assert not found.success.any()
    assert (margin(network(found.x), target) > margin(network(x0), target)).all()
    assert model.distances(found.x[found.success], x0[found.success])["mean_l2"] is None


def test_a_margin_of_probabilities_stops_where_logits_go_on():
    network, x0, _ = half_space()
    goal = Goal(torch.ones(len(x0), dtype=torch.long), 0.9, True, model.probabilities)
    for name in ("probability", "fast"):  # whose steps do not need a slope of probabilities
        gap = goal.margin(network(ATTACKS[name](network, x0, goal).x))
        assert (gap >= 0.9).all() and (gap < 0.93).all()


def test_batches_of_different_length_are_joined():
    network, x0, _ = half_space()
    target = torch.ones(len(x0), dtype=torch.long)
    parts = [
        model.decoupled(network, x0[:count], Goal(target[:count]), steps=steps)
        for count, steps in ((2, 5), (1, 9))
    ]
    whole = model.join(parts)
    assert whole.x.shape[0] == 3 and whole.trace.shape == (9, 4, 3)
    assert whole.queries.tolist() == [5, 5, 9]
    assert whole.trace[5:, :, :2].isnan().all() and not whole.trace[:, 0, 2].isnan().any()


# --- rounding -----------------------------------------------------------------------------------


def test_a_rounded_multiple_gains_most_of_all_8bit_pictures_as_close():
    """Of a linear margin; against all differences of up to four levels in five pixels."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((1, 1, 1, 5), 128 / 255)
    every = np.array(list(itertools.product(range(-4, 5), repeat=5)))
    for trial in range(20):
        slope = torch.randn(1, 1, 1, 5, generator=generator)
        norm = torch.tensor([(1 + trial % 4) * 0.9 / 255])
        away = model.rounded_multiple(x0, slope, norm) - x0
        assert distance(away, 0 * away) <= norm
        levels = (away * 255).round().flatten().numpy()
        as_close = every[(every**2).sum(1) <= (levels**2).sum()]
        gains = as_close @ slope.flatten().numpy()
        assert levels @ slope.flatten().numpy() == pytest.approx(gains.max(), rel=1e-5)


def test_rounding_makes_an_8bit_success_at_a_tenth_more_distance():
    network, x0, least = half_space(count=8)
    x0 = to_8bit(x0)
    goal = Goal(torch.ones(8, dtype=torch.long))
    way = (network.a / network.a.norm()).expand_as(x0)
    nearest = x0 + way * least(0.001)[:, None, None, None]  # just over the boundary
    assert (goal.margin(network(nearest)) > 0).all()
    assert (goal.margin(network(to_8bit(nearest))) < 0).any()  # else there is nothing to do
    found = model.round_off(network, x0, goal, nearest, steps=25)
    assert found.success.all() and (goal.margin(network(found.x)) >= 0).all()
    assert torch.equal(found.x, to_8bit(found.x))
    assert found.x.min() >= 0 and found.x.max() <= 1
    assert (distance(found.x, x0) < 1.02 * distance(nearest, x0)).all()
    assert found.queries.tolist() == [25] * 8


@pytest.mark.parametrize("times", [0.3, 4.0])
def test_rounding_follows_the_margin_from_far_off(times):
    """From far too small or far too large a change it ends where it does from the nearest one."""
    network, x0, least = half_space(count=4, size=16)
    x0 = to_8bit(x0)
    goal = Goal(torch.ones(4, dtype=torch.long))
    away = (network.a / network.a.norm()) * least(0.0)[:, None, None, None]
    start = (x0 + times * away).clamp(0, 1)
    found = model.round_off(network, x0, goal, start, steps=25)
    assert found.success.all()
    assert (distance(found.x, x0) < 1.03 * least(0.0)).all()


def test_three_roundings_by_hand():
    """Slopes added to the fractions, the norm moved; from a success and a failure."""
    network, x0, least = half_space(count=1)
    x0 = to_8bit(x0)
    goal = Goal(torch.ones(1, dtype=torch.long))
    towards = network.a / network.a.norm()
    for times in (1.5, 0.95, 0.3):
        start = x0 + times * least(0.0) * (towards + 0.3 * towards.flip(2))
        seen = model.round_off(network, x0, goal, start, steps=3).trace[:, 2]
        norm, difference, x = 1.15 * distance(start, x0), start - x0, to_8bit(start)
        closest = math.inf
        for step in range(3):
            torch.testing.assert_close(seen[step], distance(x, x0), rtol=1e-4, atol=0)
            lead = network(x)[0, 1] - model.SLACK * network(x0)[0].diff().abs()
            rise = (network.a * (x - x0)).sum() / distance(x, x0)
            off = 1.001 * lead / rise / norm
            change = 0.001 + (0.03 - 0.001) * (1 + math.cos(math.pi * step / 3)) / 2
            factor = 1 - (off / 4).clamp(change, 0.3) if lead > 0 else 1 + (-off).clamp(0.01, 0.3)
            if lead > 0:
                closest = min(closest, float(distance(x, x0)))
            elif closest < math.inf:
                factor = 1 + change
            norm = (norm * factor).clamp(max=closest) if step else norm
            share = 0.01 + (0.7 - 0.01) * (1 + math.cos(math.pi * step / 3)) / 2
            difference = difference + share * difference.norm() * towards
            x = model.rounded_multiple(x0, difference, norm)


def test_where_all_changes_are_below_half_a_level_rounding_succeeds_all_the_same():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(80, 176, (1, 3, 16, 16), generator=generator) / 255
    a = torch.randn(3, 16, 16, generator=generator)
    network = Half(a, float((a * x0).sum()) + 0.025 * float(a.norm()))
    goal = Goal(torch.ones(1, dtype=torch.long))
    found = model.decoupled(network, x0, goal, steps=20)
    assert found.success.all() and (to_8bit(found.x) != x0).float().mean() < 0.1
    rounded = model.round_off(network, x0, goal, found.x, steps=40)
    assert rounded.success.all()
    gains = a.abs().flatten().sort(descending=True).values.cumsum(0)  # of one level each
    levels = 1 + int((gains < 255 * 0.025 * a.norm()).sum())
    assert 1.2 * distance(found.x, x0) < math.sqrt(levels) / 255  # what 8 bits cost here
    assert (distance(rounded.x, x0) < 1.03 * math.sqrt(levels) / 255).all()


def test_rounding_begins_even_from_the_picture_itself():
    network, x0, _ = half_space()
    x0 = to_8bit(x0)
    found = model.round_off(network, x0, Goal(torch.ones(3, dtype=torch.long)), x0, steps=120)
    assert found.success.all()


# --- networks -----------------------------------------------------------------------------------


def test_normalisation_is_part_of_the_network():
    network = model.Normalised(nn.BatchNorm2d(3).eval(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(network(x)[:, 1], (x[:, 1] - 0.4) / 0.3, rtol=1e-4, atol=1e-4)


def small_description(classes: int = 10) -> dict:
    torch.manual_seed(0)
    state = model.SmallResNet(width=4, classes=classes).state_dict()
    return {"kind": "small", "width": 4, "classes": classes, "state": state}


def test_a_built_network_is_frozen_and_in_eval_mode():
    network = model.build_network(small_description())
    assert not network.training and not any(w.requires_grad for w in network.parameters())
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))  # no statistics of the batch


def export(network: nn.Module, path: Path, *, batch: bool = True) -> None:
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},) if batch else None
    example = (torch.rand(2, 3, 16, 16),)
    program = torch.export.export(network.eval(), example, dynamic_shapes=shapes)
    torch.export.save(program, path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network that no library has, as a .pt2 file, and itself."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 6, 3, stride=2)
    network = nn.Sequential(
        convolution, nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten(), nn.Linear(294, 5)
    )
    path = tmp_path_factory.mktemp("exported") / "own.pt2"
    export(network, path)
    return path, network


def test_an_exported_network_gives_the_same_logits_and_slopes(exported):
    path, network = exported
    description = data.describe_network(path.name, "imagenet", path.parent)
    description |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    again = model.build_network(description)
    x = torch.rand(3, 3, 16, 16)
    plain = model.Normalised(network, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    goal = Goal(torch.tensor([0, 1, 2]))
    for one, other in zip(goal.slope(again, x), goal.slope(plain, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_files_from_elsewhere_run_no_code(tmp_path, exported):
    mark = tmp_path / "ran"
    torch.save(Bomb(mark), tmp_path / "state.pth")
    (tmp_path / "checkpoints").mkdir()
    torch.save(Bomb(mark), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    for weights in ("state.pth", "imagenet"):
        with pytest.raises(data.DataError, match=r"resnet18-f37072fd|state\.pth"):
            data.describe_network("resnet18", weights, tmp_path)
    (tmp_path / "empty.pth").touch()
    (tmp_path / "page.pt2").write_text("<html>")
    for network, weights in (("resnet18", "empty.pth"), ("page.pt2", ""), ("lost.pt2", "")):
        with pytest.raises(data.DataError, match=weights or network):
            data.describe_network(network, weights, tmp_path)
    repack(exported[0], tmp_path / "object.pt2", "own/data/constants/custom_obj_0", b"x")
    with pytest.raises(data.DataError, match="pickled objects"):
        data.describe_network("object.pt2", "", tmp_path)
    assert not mark.exists()


def repack(source: Path, path: Path, name: str, content: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info, old.read(info))
        new.writestr(name, content)


# --- data ---------------------------------------------------------------------------------------


def test_pictures_come_back_from_disk_as_they_were(tmp_path):
    x = to_8bit(torch.rand(2, 3, 6, 6))
    back = data.through_disk(x, ["a", "b"], tmp_path / "new")
    assert torch.equal(back, x)
    assert np.asarray(Image.open(tmp_path / "new" / "b.png")).shape == (6, 6, 3)


def test_digits_are_chosen_by_pair_and_only_if_classified_correctly():
    y = torch.arange(10).repeat(20)
    right = torch.arange(200) % 7 > 0
    chosen, target = data.choose_digits(y, right, target="pairs", count=90)
    assert len(set(zip(y[chosen].tolist(), target.tolist(), strict=True))) == 90
    assert (y[chosen] != target).all() and right[chosen].all()
    assert len(set(chosen.tolist())) == 90
    wanted = {"next": lambda y: (y + 1) % 10, "any": lambda y: y, "3": lambda y: 0 * y + 3}
    for name, rule in wanted.items():
        chosen, target = data.choose_digits(y, right, target=name, count=64)
        assert len(chosen) == 64 and right[chosen].all()
        assert torch.equal(target, rule(y[chosen]))
        assert name == "any" or (target != y[chosen]).all()
    for name in ("pairs", "next"):
        with pytest.raises(data.DataError, match="train it for longer"):
            data.choose_digits(y, right & False, target=name, count=3)


def test_the_splits_share_no_digit_and_no_column_of_a_photograph(monkeypatch):
    parts = []
    compose = data.compose

    def watch(ink, y, photos, count, generator):
        parts.append((ink, photos, count))
        return compose(ink, y, photos, 5, generator)

    monkeypatch.setattr(data, "compose", watch)
    data.load_digits(train_count=7, seed=0)
    assert [count for *_, count in parts] == [7, 1000, 2000]
    assert sum(len(ink) for ink, *_ in parts) == 1797
    assert sum(photos.shape[3] for _, photos, _ in parts) == 640
    columns = [{photos[:, :, :, n].numpy().tobytes() for n in range(photos.shape[3])}
               for _, photos, _ in parts]  # fmt: skip
    assert not columns[0] & columns[1] and not columns[0] & columns[2]
    scenes = data.load_digits(train_count=7, seed=1)
    assert not torch.equal(scenes.train.x, scenes.val.x)


def test_mnist_is_padded_and_its_parts_are_disjoint(monkeypatch):
    x = torch.arange(1500)[:, None, None, None].expand(-1, 1, 28, 28) % 251
    train, test = (x.byte(), torch.arange(1500)), (x.byte() + 3, torch.arange(1500) + 5000)
    monkeypatch.setattr(data, "read_idx", lambda name, folder: [train, test])
    monkeypatch.setattr(data, "COUNTS", (300, 200))
    splits = data.load_mnist(train_count=900, seed=0, data_dir=Path())
    assert [len(part.x) for part in splits] == [900, 300, 200]
    for part, first in zip(splits, (train, train, test), strict=True):
        place = part.y % 5000
        assert part.x.shape[1:] == (3, 32, 32) and part.x.dtype == torch.uint8
        assert (part.x[:, :, :2] == 0).all() and (part.x[..., 30:] == 0).all()
        assert torch.equal(part.x[:, 1, 16, 16], first[0][place, 0, 16, 16])
    used = set(splits.train.y.tolist()) & set(splits.val.y.tolist())
    assert not used and (splits.test.y >= 5000).all() and (splits.train.y < 5000).all()
    assert splits.train.y.tolist() != sorted(splits.train.y.tolist())
    other = data.load_mnist(train_count=900, seed=1, data_dir=Path())
    assert all(set(a.y.tolist()) != set(b.y.tolist()) for a, b in zip(splits, other, strict=True))
    with pytest.raises(data.DataError, match="train_count: MNIST has only 1200"):
        data.load_mnist(train_count=1201, seed=0, data_dir=Path())


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_digits_are_asked_for_by_the_seed_and_their_number(name, monkeypatch):
    monkeypatch.setattr(story, f"load_{name}", lambda **options: options)
    config = tiny_config("--dataset", name, "--seed", "7", "--train_count", "99")
    asked = story.load_splits(config)
    assert (asked["seed"], asked["train_count"]) == (7, 99)


@pytest.fixture
def photos(tmp_path):
    """A folder with a wide picture, a tall one with EXIF, a grey 16-bit one and broken ones."""
    folder = tmp_path / "photos"
    (folder / ".hidden").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    turned = Image.fromarray(noise[:, :20])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "b.jpg", exif=exif)
    Image.fromarray((noise[..., 0].astype("uint16") + 1) * 200).save(folder / "c$.png")
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:900])
    (folder / "e.txt").write_text("not a picture")
    (folder / ".hidden" / "f.png").write_bytes((folder / "a.png").read_bytes())
    return folder


def test_photographs_from_files_folders_and_lists(photos, tmp_path):
    (tmp_path / "list.txt").write_text("photos\n\nphotos/b.jpg\nflower.jpg\n")
    load = partial(data.load_photographs, data_dir=tmp_path, size=16)
    loaded = load(("list.txt",), count=99)
    assert loaded.x.shape == (5, 3, 16, 16)
    assert loaded.names == ["a.png", "b.jpg", "c$.png", "b.jpg", "flower.jpg"]
    assert len(loaded.bad) == 2 and "d.png" in loaded.bad[0]
    assert loaded.x[2].float().std() > 20  # 16 bits are not all white
    assert load(("photos",), count=2).names == ["a.png", "b.jpg"]
    for source, name in (("photos/d.png", "d.png"), ("lost.png", "neither here nor in")):
        with pytest.raises(data.DataError, match=name):
            load((source,), count=9)


def test_a_picture_of_the_right_size_is_left_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(data.crop_centre(Image.fromarray(pixels), 16).permute(1, 2, 0), pixels)
    wide = Image.fromarray(np.repeat(pixels, 2, axis=1))
    wide.paste((9, 9, 9), (0, 0, 8, 16))  # what a crop of the centre leaves out
    wide.paste((9, 9, 9), (24, 0, 32, 16))
    kept = data.crop_centre(wide, 16).permute(1, 2, 0).numpy()
    assert np.array_equal(kept, np.repeat(pixels, 2, axis=1)[:, 8:24])


def test_classes_by_name_or_number(tmp_path):
    classes = ["goldfish", "crane", "Flamingo", "crane"]
    number = partial(data.class_number, classes=classes)
    assert [number("flamingo"), number("2"), number("0")] == [2, 2, 0]
    for target, text in (("crane", r"\[1, 3\]"), ("cat", "none of that name"), ("4", "only 4")):
        with pytest.raises(data.DataError, match=text):
            number(target)
    (tmp_path / "names.txt").write_text("\ufeffcat\n\ndog\n", encoding="utf-8")
    assert data.class_names("names.txt", 2, tmp_path) == ["cat", "dog"]
    assert data.class_names("numbers", 3, tmp_path) == ["0", "1", "2"]
    imagenet = data.class_names("imagenet", 1000, tmp_path)
    assert (imagenet[1], imagenet[130]) == ("goldfish", "flamingo")
    with pytest.raises(data.DataError, match="class_names: 2 of names"):
        data.class_names("names.txt", 3, tmp_path)


# --- training: two steps by hand, and what depends on what --------------------------------------


def test_two_training_steps_by_hand():
    torch.manual_seed(0)
    train = data.Examples(torch.randint(0, 256, (10, 3, 8, 8)).byte(), torch.arange(10))
    network = model.SmallResNet(width=2, classes=10)
    hand = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
    torch.manual_seed(5)
    network.eval()  # the loop has to see to it
    loss = story.train_one_epoch(network, train, optimizer, schedule, 6, "train")
    torch.manual_seed(5)
    order, total = torch.randperm(10), 0.0
    first = {name: torch.zeros_like(w) for name, w in hand.named_parameters()}
    second = copy.deepcopy(first)
    # one-cycle over 4 steps: cosines from a 25th of the peak to it at step 0.2, then down to a
    # 250,000th at step 3; Adam's first beta goes from 0.95 to 0.85 and back
    down = (1 + math.cos(math.pi * (1 - 0.2) / (3 - 0.2))) / 2
    rates = [0.1 / 25, 4e-7 + (0.1 - 4e-7) * down]
    betas = [0.95, 0.95 - 0.1 * down]
    for step, rows in enumerate(order.split(6)):
        logits = hand(train.x[rows].float() / 255)
        log_probs = logits - logits.exp().sum(1, keepdim=True).log()
        value = -log_probs[range(len(rows)), train.y[rows]].mean()
        total += float(value.detach()) * len(rows)  # the last batch is smaller
        grads = torch.autograd.grad(value, list(hand.parameters()))
        beta = betas[step]
        for (name, w), grad in zip(hand.named_parameters(), grads, strict=True):
            first[name] = beta * first[name] + (1 - beta) * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            top = first[name] / (1 - beta ** (step + 1))
            root = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            w.data = w.data * (1 - rates[step] * 0.01) - rates[step] * top / root
    assert loss == pytest.approx(total / 10, rel=1e-5)
    for one, other in zip(network.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


tiny_config = functools.partial(config_of, modules, *TINY)


@pytest.fixture(scope="module")
def scenes():
    """128 + 200 + 200 scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "COUNTS", (200, 200))
        return data.load_digits(train_count=128, seed=0)


def small_run(splits, folder: Path):
    """Rows of the history, networks, metrics and the task of a run on `splits`."""
    flags = ["--criteria", "fast", "--epochs", "3", "--fast_steps", "6", "--rounding_steps", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "load_splits", lambda config: splits)
        patch.setattr(story, "plot_results", lambda *_: None)
        words = [*TINY, *flags, "--out_dir", folder]
        kept = {}
        keep = story.digits_task

        def watch(*parts):
            kept["task"], *others = keep(*parts)
            return kept["task"], *others

        patch.setattr(story, "digits_task", watch)
        path = Path(call(story, *words).splitlines()[-1])
    rows = list(csv.DictReader((path / "history.csv").open()))
    report = json.loads((path / "metrics.json").read_text())
    saved = torch.load(path / "model.pt", weights_only=True)
    return rows, saved["networks"], report["metrics"], kept["task"]


def column(rows: list[dict], name: str, stage: str) -> list[str]:
    return [row[name] for row in rows if row["stage"] == stage]


def same_weights(one: dict, other: dict) -> bool:
    return all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])


def test_what_depends_on_which_part_of_the_data(scenes, tmp_path):
    """Labels of each part are permuted, one part at a time:

    train: all moves. val: only val columns and, by the epoch chosen, weights. test: nothing of
    the training; accuracies, pictures and attacks move.
    """
    whole = small_run(scenes, tmp_path / "whole")
    again = small_run(scenes, tmp_path / "again")
    assert column(whole[0], "val_loss", "train") == column(again[0], "val_loss", "train")
    assert same_weights(whole[1][0], again[1][0]) and torch.equal(whole[3].x, again[3].x)
    assert not same_weights(whole[1][0], whole[1][1])  # the second network is another one
    assert whole[2]["test_accuracy"] != whole[2]["second_test_accuracy"]
    runs = {}
    for number, part in enumerate(("train", "val", "test")):
        other = [data.Examples(*pair) for pair in scenes]
        order = torch.randperm(len(other[number].y), generator=torch.Generator().manual_seed(9))
        other[number] = other[number]._replace(y=other[number].y[order])
        runs[part] = small_run(data.Splits(*other), tmp_path / part)
    for stage in ("train", "train-second"):
        losses = {part: column(rows[0], "train_loss", stage) for part, rows in runs.items()}
        values = {part: column(rows[0], "val_accuracy", stage) for part, rows in runs.items()}
        before = [column(whole[0], name, stage) for name in ("train_loss", "val_accuracy")]
        assert losses["train"] != before[0] and losses["val"] == losses["test"] == before[0]
        assert values["train"] != before[1] != values["val"] and values["test"] == before[1]
    for place in (0, 1):
        assert same_weights(runs["test"][1][place], whole[1][place])
        assert not same_weights(runs["train"][1][place], whole[1][place])
    assert runs["test"][2]["test_accuracy"] != whole[2]["test_accuracy"]
    assert runs["test"][2]["second_test_accuracy"] != whole[2]["second_test_accuracy"]
    assert not torch.equal(runs["test"][3].x, whole[3].x)  # other scenes are classified correctly
    check_against_the_data(whole, scenes)


def check_against_the_data(whole: tuple, scenes) -> None:
    """The numbers of a run, computed again from its weights and the data."""
    rows, networks, metrics, task = whole
    for description, name, stage in zip(
        networks, ("test_accuracy", "second_test_accuracy"), ("train", "train-second"), strict=True
    ):
        network = model.build_network(description)
        hits = {}
        for part in ("val", "test"):
            examples = getattr(scenes, part)
            logits = network(examples.x.float() / 255)
            hits[part] = float((logits.argmax(1) == examples.y).sum()) / len(examples.y)
        assert metrics[name] == pytest.approx(hits["test"])
        values = [float(text) for text in column(rows, "val_accuracy", stage)]
        assert max(values) == pytest.approx(hits["val"])  # the best epoch's weights, not the last
    scene = {x.numpy().tobytes(): int(y) for x, y in zip(*scenes.test, strict=True)}
    shown = (task.x * 255).round().byte()
    labels = torch.tensor([scene[x.numpy().tobytes()] for x in shown])  # all of the test part
    network = model.build_network(networks[0])
    assert torch.equal(network(task.x).argmax(1), labels) and torch.equal(task.before, labels)
    assert torch.equal(task.target, (labels + 1) % 10)


def test_an_epoch_holds_each_example_once_in_another_order(scenes, monkeypatch, tmp_path):
    config, seen = tiny_config("--epochs", "3"), []
    train = data.Examples(torch.arange(40)[:, None, None, None].expand(-1, 3, 32, 32).byte(),
                          torch.arange(40) % 10)  # fmt: skip
    monkeypatch.setattr(run, "HEADER", {})
    network = model.SmallResNet(width=2, classes=10)
    modes = []

    def watch(_, inputs):
        if torch.is_grad_enabled():
            seen.extend((inputs[0][:, 0, 0, 0] * 255).round().long().tolist())
        modes.append((torch.is_grad_enabled(), network.training))

    network.register_forward_pre_hook(watch)
    tmp_path.mkdir(exist_ok=True)
    story.fit(network, "train", train, scenes.val, config, tmp_path)
    orders = [seen[start : start + 40] for start in (0, 40, 80)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])
    assert set(modes) == {(True, True), (False, False)}  # training mode in training alone


def test_the_rate_rises_and_falls_over_all_epochs(monkeypatch, scenes, tmp_path):
    config, rates = tiny_config("--epochs", "4", "--train_lr", "0.02"), []
    keep = story.train_one_epoch

    def watch(model, train, optimizer, schedule, batch_size, label):
        rates.append(optimizer.param_groups[0]["lr"])
        assert (batch_size, label) == (16, f"train epoch {len(rates)}")
        loss = keep(model, train, optimizer, schedule, batch_size, label)
        rates[-1] = (rates[-1], optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(story, "train_one_epoch", watch)
    monkeypatch.setattr(run, "HEADER", {})
    few = data.Examples(*(part[:64] for part in scenes.train))
    story.fit(model.SmallResNet(width=2, classes=10), "train", few, scenes.val, config, tmp_path)
    assert rates[0][0] == pytest.approx(0.02 / 25)
    assert rates[0][1] > 0.019 > rates[1][1] > rates[2][1] > rates[3][1]
    assert rates[-1][1] < 0.02 / 25  # of the whole schedule little more than the end is left


# --- what is reported -----------------------------------------------------------------------------


class Columns(nn.Module):
    """Logits of three classes: the means of a picture's three columns, times `factor`."""

    def __init__(self, factor=10.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x.mean((1, 2))


def picture(*columns: float) -> torch.Tensor:
    return (torch.tensor(columns) / 255).expand(3, 3, 3).contiguous()


def known_outcome():
    """Four pictures of class 0 with target 1; found: 3 right; PNGs: 2 right, one by far."""
    x = torch.stack([picture(200, 100, 0)] * 4)
    found = torch.stack([picture(150, 151, 0), picture(150, 160, 0), picture(100, 200, 0),
                         picture(190, 110, 0)])  # fmt: skip
    png = torch.stack([picture(150, 150, 3), picture(150, 160, 0), picture(100, 200, 0),
                       picture(160, 110, 0)])  # fmt: skip
    png[0, :, :, 1] -= 1 / 255
    success = torch.tensor([True, True, True, False])
    c, trace = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(2, 4, 4)
    part = model.Found(found, success, c, torch.tensor([10, 20, 30, 40]), trace)
    rounded = model.Found(png, success, 0 * c, torch.tensor([1, 2, 3, 4]), trace)
    outcome = story.Outcome(part, rounded, png, 1.5)
    zero = torch.zeros(4, dtype=torch.long)
    names, classes = ["a", "b", "c", "d"], ["cat", "dog", "fish"]
    return outcome, story.Task(x, zero, zero + 1, names, classes, [{}, {}])


class Sees(nn.Module):
    """A second network: class 1 only where the second column is very bright."""

    def forward(self, x):
        bright = x[..., 1].mean((1, 2)) - 180 / 255
        dark = x[..., 0].mean((1, 2)) - 149 / 255
        return torch.stack((torch.zeros_like(bright), bright, -10 * dark.clamp(max=0.1) - 5), 1)


def test_measured_numbers_are_those_known_in_advance():
    outcome, task = known_outcome()
    metrics = story.measure(outcome, Goal(task.target), task, [Columns(), Sees()])
    assert (metrics["success"], metrics["png_success"]) == (0.75, 0.5)
    far = [
        3 * math.hypot(*(a - b for a, b in zip(found, (200, 100, 0), strict=True))) / 255
        for found in ((150, 151, 0), (150, 160, 0), (100, 200, 0))
    ]
    assert metrics["mean_l2"] == pytest.approx(sum(far) / 3, rel=1e-5)
    assert metrics["median_l2"] == pytest.approx(far[1], rel=1e-5)
    assert metrics["png_mean_l2"] == pytest.approx((far[1] + far[2]) / 2, rel=1e-5)
    assert metrics["mean_linf"] == pytest.approx((51 + 60 + 100) / 3 / 255, rel=1e-4)
    assert metrics["png_mean_linf"] == pytest.approx((60 + 100) / 2 / 255, rel=1e-4)
    assert metrics["rounding_cost"] == pytest.approx(0, abs=1e-6)
    assert metrics["least_margin"] == pytest.approx(10 / 255, rel=1e-3)
    assert metrics["png_least_margin"] == pytest.approx(100 / 255, rel=1e-3)
    assert metrics["mean_forwards"] == metrics["mean_backwards"] == pytest.approx(27.5)
    assert metrics["transfer"] == 0.5  # of the two successes the brighter one
    assert metrics["transfer_any_change"] == 0.5
    assert metrics["seconds"] == 1.5
    rows = metrics["pictures"]
    assert [row["png_success"] for row in rows] == [False, True, True, False]
    assert [row["class_before"] for row in rows] == ["cat"] * 4
    assert [row["class_after"] for row in rows] == ["cat", "dog", "dog", "cat"]
    assert rows[2]["target"] == "dog" and rows[2]["l2"] == pytest.approx(far[2], abs=1e-5)
    assert rows[0]["l2_before_rounding"] == pytest.approx(far[0], abs=1e-5)
    assert rows[1]["forwards"] == 22 and rows[1]["c"] == 2
    assert rows[3]["margin"] == pytest.approx(-500 / 255, rel=1e-3)
    probs = torch.tensor([200.0, 100, 0]).mul(10 / 255).softmax(0)
    assert rows[0]["probability_before"] == pytest.approx(float(probs[0]), abs=1e-4)
    probs = torch.tensor([100.0, 200, 0]).mul(10 / 255).softmax(0)
    assert rows[2]["probability_after"] == pytest.approx(float(probs[1]), abs=1e-4)


def test_a_change_is_against_what_the_second_network_saw_and_a_cost_of_the_same_pictures():
    outcome, task = known_outcome()

    class Fish(nn.Module):
        """A second network: class 1 where the second column is very bright, else class 2."""

        def forward(self, x):
            bright = (x[..., 1].mean((1, 2)) > 180 / 255).long()
            return F.one_hot(2 - bright, 3).float()

    png = outcome.png.clone()
    png[3] = picture(100, 200, 0)  # what was not found before rounding
    outcome = outcome._replace(png=png)
    metrics = story.measure(outcome, Goal(task.target), task, [Columns(), Fish()])
    assert metrics["png_success"] == 0.75 and metrics["rounding_cost"] == pytest.approx(0, abs=1e-6)
    assert metrics["transfer_any_change"] == pytest.approx(2 / 3)  # the dim one is a fish as before


@pytest.mark.parametrize(("name", "steps"), [("fast", 9), ("logits", 9), ("probability", 7)])
def test_an_attack_joins_its_batches_seconds_and_rounding(name, steps, monkeypatch, tmp_path):
    outcome, task = known_outcome()
    config = tiny_config("--rounding_steps", "9", "--probability_rounding", "7")
    clock = iter([0.0, 1.0, 10.0, 13.0])
    monkeypatch.setattr(story, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    given = []

    def part_of(found, x, aim) -> model.Found:
        rows = [int(row) for row in aim.label]
        columns = (found.x[rows], found.success[rows], found.c[rows], found.queries[rows])
        return model.Found(*columns, found.trace[..., rows])

    def round_off(network, x, aim, found, *, steps):
        given.append((x, found, steps))
        return part_of(outcome.rounded, x, aim)

    monkeypatch.setattr(story, "search", lambda _, net, x, aim, c: part_of(outcome.found, x, aim))
    monkeypatch.setattr(story, "round_off", round_off)
    task = task._replace(target=torch.arange(4))  # by which a batch shows its rows
    got = story.attack(name, task, Columns(), config, tmp_path)
    assert got.seconds == 4 and got.queries.tolist() == [11, 22, 33, 44]
    assert torch.equal(got.found.x, outcome.found.x) and torch.equal(got.png, outcome.png)
    assert [asked for *_, asked in given] == [steps, steps]
    assert torch.equal(torch.cat([x for x, *_ in given]), task.x)
    assert torch.equal(torch.cat([found for _, found, _ in given]), outcome.found.x)


def test_plots_are_given_the_picture_and_the_numbers_of_their_attack(monkeypatch, tmp_path):
    """The second of four digits is the 3 that becomes an 8."""
    outcome, task = known_outcome()
    digits = torch.tensor([0, 3, 0, 0]), torch.tensor([1, 8, 1, 1])
    task = task._replace(before=digits[0], target=digits[1], classes=story.DIGITS)
    trace = torch.arange(32.0).view(2, 4, 4)
    other = outcome._replace(found=outcome.found._replace(trace=-trace), png=outcome.png.flip(0))
    outcomes = {
        "logits": outcome._replace(found=outcome.found._replace(trace=trace)),
        "fast": other,
    }
    metrics = {
        name: {"pictures": [
            {"l2": n + far, "l2_before_rounding": 99.0, "png_success": n < 3,
             "class_before": "3", "target": "8", "place": n} for n in range(4)
        ]} for name, far in (("logits", 0.5), ("fast", 0.25))
    }  # fmt: skip
    given, network = {}, Columns()
    monkeypatch.setattr(story, "try_plot", lambda plot, *a: given.update(
        {plot.func.__name__: plot.args} if isinstance(plot, functools.partial)
        else {plot.__name__: a}))  # fmt: skip
    config = tiny_config("--criteria", "logits,fast")
    story.plot_results(task, network, outcomes, metrics, config, tmp_path)
    shown, probs, notes = given["plot_example"][:3]
    assert list(shown) == list(probs) == ["original", "logits", "fast"]
    for name, x in (("original", task.x), ("logits", outcome.png), ("fast", other.png)):
        assert torch.equal(shown[name], x[1])
        assert torch.allclose(probs[name], network(x[1:2]).softmax(1)[0])
    assert all(note["place"] == 1 for note in notes.values())
    assert torch.equal(given["plot_search"][0]["fast"], -trace[..., 1])
    assert {name: own.tolist() for name, own in given["plot_queries"][0].items()} == {
        "logits": trace.tolist(), "fast": (-trace).tolist()
    }  # fmt: skip
    l2 = {"logits": [0.5, 1.5, 2.5, math.inf], "fast": [0.25, 1.25, 2.25, math.inf]}
    assert given["plot_bound"][0] == l2
    matrix = given["plot_matrix"]
    assert matrix[0] is task.x and matrix[1] is other.png and matrix[3] == l2["fast"]


def test_kappa_and_scores_decide_what_is_a_success():
    outcome, task = known_outcome()
    for kappa, share in ((0.0, 0.5), (1.0, 0.25), (3.9, 0.25), (4.0, 0.0)):
        goal = Goal(task.target, kappa)
        metrics = story.measure(outcome, goal, task, [Columns()])
        assert metrics["png_success"] == share
        assert "transfer" not in metrics
    goal = Goal(task.target, 0.5, True, model.probabilities)
    assert story.measure(outcome, goal, task, [Columns()])["png_success"] == 0.25
    away = Goal(task.before, 0.0, False)  # untargeted
    assert story.measure(outcome, away, task, [Columns()])["png_success"] == 0.5
    nothing = story.measure(outcome, Goal(task.target, 99.0), task, [Columns(), Sees()])
    assert nothing["png_mean_l2"] is nothing["rounding_cost"] is nothing["transfer"] is None
    names = {"criteria": ("fast", "logits")}
    config = type("Settings", (), names)
    numbers = story.headline({"fast": nothing, "logits": metrics}, config)
    assert numbers["fast_success"] == 0 and "fast_mean_l2" not in numbers
    assert {name.split("_")[0] for name in numbers} == {"fast", "logits"}


@pytest.mark.parametrize("name", ["probability", "logits", "fast"])
def test_each_attack_gets_its_own_steps_and_scores(name, monkeypatch):
    calls = []
    for function in ("alternating", "carlini_wagner", "decoupled"):
        monkeypatch.setattr(story, function, lambda *parts, f=function, **o: calls.append((f, o)))
    config = tiny_config()
    story.search(name, None, None, None, config)
    expected = {
        "probability": ("alternating", {"steps": 20}),
        "logits": ("carlini_wagner", {"rounds": 2, "steps": 20, "lr": 1.0}),
        "fast": ("decoupled", {"steps": 15}),
    }
    assert calls == [expected[name]]
    task = known_outcome()[1]
    goal = story.goal(name, task, config)
    scores = {"probability": model.probabilities}.get(name, model.identity)
    assert goal.scores is scores and goal.targeted and torch.equal(goal.label, task.target)
    kappa = story.goal(name, task, tiny_config("--kappa", "0.3", "--target", "any"))
    assert kappa.kappa == 0.3 and not kappa.targeted


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished():
    folder, output, _ = tiny_run("carlini_wagner")
    return folder, json.loads((folder / "metrics.json").read_text()), output


def test_the_headline_is_that_of_the_saved_pngs_and_weights(finished):
    folder, report, _ = finished
    saved = torch.load(folder / "model.pt", weights_only=True)
    network, second = (model.build_network(description) for description in saved["networks"])
    originals = read(folder / "originals")
    for name in ("probability", "logits", "fast"):
        numbers = report["metrics"][name]
        rows = numbers["pictures"]
        x = read(folder / "adversarial" / name)
        assert len(rows) == len(x) == len(originals) == 4
        logits = network(x)
        scores = logits.softmax(1) if name == "probability" else logits
        target = torch.tensor([int(row["target"]) for row in rows])
        reached = margin(scores, target)
        assert [row["margin"] for row in rows] == pytest.approx(reached.tolist(), abs=1e-4)
        won = reached >= 0
        assert [row["png_success"] for row in rows] == won.tolist()
        l2 = (x - originals).flatten(1).norm(dim=1)
        assert [row["l2"] for row in rows] == pytest.approx(l2.tolist(), abs=1e-5)
        head = {
            key: report["headline"].get(f"{name}_{key}") for key in ("png_success", "png_mean_l2")
        }
        assert head["png_success"] == pytest.approx(float(won.float().mean()))
        assert not won.any() or head["png_mean_l2"] == pytest.approx(
            float(l2[won].mean()), abs=1e-5
        )
        fooled = second(x).argmax(1) == target
        if won.any():
            assert numbers["transfer"] == pytest.approx(float(fooled[won].float().mean()))
        before = network(originals).argmax(1)
        assert [row["class_before"] for row in rows] == [str(int(y)) for y in before]
        assert torch.equal(target, (before + 1) % 10)
    for name in ("example.png", "search.png", "queries.png", "bound.png", "matrix.png"):
        assert (folder / name).stat().st_size > 5000


def read(folder: Path) -> torch.Tensor:
    pictures = [np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def without_seconds(part):
    if isinstance(part, dict):
        return {name: without_seconds(item) for name, item in part.items() if name != "seconds"}
    return part


def test_a_twice_killed_run_ends_like_an_unbroken_one(finished, tmp_path):
    train_until("carlini_wagner", 3, *TINY, "--out_dir", tmp_path)  # in the second network
    (folder,) = tmp_path.iterdir()
    train_until("carlini_wagner", 3, "--resume", folder)  # in the second attack
    assert train("carlini_wagner", "--resume", folder) == folder
    again = json.loads((folder / "metrics.json").read_text())
    assert without_seconds(again["metrics"]) == without_seconds(finished[1]["metrics"])
    assert again["headline"] == finished[1]["headline"]


def test_an_exported_network_without_a_second_one(exported, photos, tmp_path):
    flags = ["--dataset", "images", "--images", "photos", "--data_dir", photos.parent]
    flags += ["--network", exported[0], "--image_size", "16", "--class_names", "names.txt"]
    flags += ["--target", "any", "--compare", "false", "--kappa", "0.1", "--device", "cpu"]
    (photos.parent / "names.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    flags += ["--criteria", "logits,fast", *EFFORT, "--fast_steps", "40", "--rounding_steps", "40"]
    folder = train("carlini_wagner", *flags, "--out_dir", tmp_path / "runs")
    report = json.loads((folder / "metrics.json").read_text())
    numbers = report["metrics"]
    assert report["dataset"] == "images" and (numbers["unreadable"], numbers["pictures"]) == (2, 3)
    assert numbers["fast"]["png_success"] == 1 and numbers["fast"]["png_least_margin"] >= 0.1
    assert "transfer" not in numbers["fast"] and not (folder / "matrix.png").exists()
    rows = numbers["fast"]["pictures"]
    assert all(row["target"] == "any other" for row in rows)
    assert {row["class_after"] for row in rows} <= {"ant", "bee", "cat", "dog", "eel"}
    assert all(row["class_after"] != row["class_before"] for row in rows)
    names = sorted(path.name for path in (folder / "adversarial" / "fast").iterdir())
    assert names[0].startswith("000-") and "to" not in names[0]
    check_prediction(folder, rows, photos, tmp_path)


def check_prediction(folder: Path, rows: list[dict], photos: Path, tmp_path: Path) -> None:
    """predict.py sees in the PNGs what the run reported, and reads any picture."""
    where = ["--original", folder / "originals", "--device", "cpu", "--out_dir", tmp_path / "p"]
    output = call(predict, folder, folder / "adversarial" / "fast", *where)
    seen = list(csv.DictReader((Path(output.splitlines()[-1]) / "predictions.csv").open()))
    assert [row["file"] for row in seen] == [f"{row['file']}.png" for row in rows]
    assert [row["class"] for row in seen] == [row["class_after"] for row in rows]
    for name in ("probability", "l2"):
        old = [row["probability_after" if name == "probability" else name] for row in rows]
        assert [float(row[name]) for row in seen] == pytest.approx(old, abs=1e-4)
    assert [float(row["margin"]) for row in seen] == pytest.approx(
        [row["margin"] for row in rows],
        abs=1e-2,  # the next class may be another than before
    ) or all(float(row["margin"]) >= 0 for row in seen)
    output = call(predict, folder / "model.pt", photos, "--device", "cpu")
    place = Path(output.splitlines()[-1])
    lines = list(csv.DictReader((place / "predictions.csv").open()))
    assert [line["file"] for line in lines] == ["a.png", "b.jpg", "c$.png"]
    assert [line["class"] for line in lines] == [row["class_before"] for row in rows]
    assert "unreadable files left out: 2, the first" in output and "d.png" in output
    assert (place / "seen.png").stat().st_size > 5000 and "l2" not in lines[0]
    (photos.parent / "none").mkdir()
    with pytest.raises(data.DataError, match=r"d\.png"):
        call(predict, folder, photos / "d.png", "--device", "cpu")


def test_own_weights_of_a_torchvision_network_are_the_ones_attacked(photos, tmp_path, capsys):
    from torchvision.models import shufflenet_v2_x0_5

    for seed, name in enumerate(("mine.pt", "other.pt")):
        torch.manual_seed(seed)
        torch.save(shufflenet_v2_x0_5(num_classes=5).state_dict(), tmp_path / name)
    flags = ["--dataset", "images", "--images", "photos/a.png", "--data_dir", tmp_path]
    flags += ["--weights", "mine.pt", "--second_weights", "other.pt", "--image_size", "32"]
    flags += ["--network", "shufflenet_v2_x0_5", "--second_network", "shufflenet_v2_x0_5"]
    flags += ["--class_names", "numbers", "--target", "next"]
    flags += ["--criteria", "fast", *EFFORT, "--device", "cpu", "--out_dir", tmp_path / "runs"]
    folder = train("carlini_wagner", *flags)
    saved = torch.load(folder / "model.pt", weights_only=True)
    for description, name in zip(saved["networks"], ("mine.pt", "other.pt"), strict=True):
        state = torch.load(tmp_path / name, weights_only=True)
        assert all(torch.equal(description["state"][key], state[key]) for key in state)
        assert description["mean"] == pytest.approx([0.485, 0.456, 0.406])
    plain = shufflenet_v2_x0_5(num_classes=5).eval()
    plain.load_state_dict(torch.load(tmp_path / "mine.pt", weights_only=True))
    x = read(folder / "originals")
    means, spread = (
        torch.tensor(saved["networks"][0][name])[:, None, None] for name in ("mean", "std")
    )
    seen = int(plain((x - means) / spread).argmax())
    report = json.loads((folder / "metrics.json").read_text())["metrics"]["fast"]
    assert report["pictures"][0]["class_before"] == str(seen)
    assert report["pictures"][0]["target"] == str((seen + 1) % 5)
    assert "warning" not in capsys.readouterr().err  # each plot can be made of one picture


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--kappa", "1"], "--kappa: expected less than 1 with the criterion probability"),
        (["--dataset", "images"], "target: expected a class, next or any for images"),
        (["--criteria", "fast,fast"], "--criteria: expected each once"),
        (["--std", "0,1,1"], "--std: expected at least 0.001"),
        (["--mean", "1,1"], "--mean: expected 3 values"),
        (["--picture_count", "0"], "--picture_count: expected at least 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(flags, complaint, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        call(story, *flags, "--out_dir", tmp_path / "runs", "--device", "cpu")
    assert end.value.code == 2 and complaint in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_digit_that_is_none_is_named_before_networks_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(story, "load_splits", None)
    with pytest.raises(data.DataError, match="none of that name"):
        call(story, "--target", "cat", "--out_dir", tmp_path / "runs", "--device", "cpu")


def test_what_cannot_be_had_is_named_and_leaves_no_folder(exported, photos, tmp_path):
    flags = ["--dataset", "images", "--images", photos, "--target", "cat", "--compare", "false"]
    flags += ["--device", "cpu", "--out_dir", tmp_path / "runs", "--image_size", "16"]
    for more, complaint in (
        (["--network", "no_such_network"], "torchvision has no 'no_such_network'"),
        (["--network", "lost.pt2"], "lost.pt2"),
        (["--network", exported[0]], "class_names: 1000 of imagenet, but the network has 5"),
    ):
        with pytest.raises(data.DataError, match=complaint):
            call(story, *flags, *more)
    export(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), tmp_path / "one.pt2", batch=False)
    for more in (
        ["--network", exported[0], "--image_size", "20"],
        ["--network", tmp_path / "one.pt2"],
    ):
        with pytest.raises(data.DataError, match=r"\.pt2 fails on pictures of"):
            call(story, *flags, "--class_names", "numbers", *more)
    with pytest.raises(data.DataError, match="none of that name"):
        call(story, *flags, "--class_names", "numbers", "--network", exported[0])
    assert not list((tmp_path / "runs").iterdir())
