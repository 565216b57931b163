"""Rank agreement, by counting."""

import functools
import itertools

import numpy as np
import pytest

from gatedfm.analysis import agreement


def ranks(x):
  """Mean ranks, by comparing each with each."""
  return np.array([np.sum(x < v) + (np.sum(x == v) - 1) / 2 for v in x])


def kendall(a, b):
  """Tau-b by pairs."""
  signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i in range(len(a)) for j in range(i)]
  total, untied_a, untied_b = (sum(f) for f in zip(*((s * t, s * s, t * t) for s, t in signs)))
  return total / np.sqrt(untied_a * untied_b)


def overlap(a, b, number):
  """Without ties."""
  top = [set(np.argsort(x)[-number:]) for x in (a, b)]
  return len(top[0] & top[1]) / number


@pytest.mark.parametrize('values', [4, 1000], ids=['ties', 'hardly any'])
@pytest.mark.parametrize('seed', range(3))
def test_by_brute_force(values, seed):
  rng = np.random.default_rng(seed)
  a, b = rng.integers(0, values, (2, 23)).astype(float)
  assert agreement.spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
  assert agreement.kendall(a, b) == pytest.approx(kendall(a, b))
  # Any shape, and any growing function of scores.
  table = lambda x: np.exp(x[:22] / values).reshape(2, 11)
  assert agreement.spearman(table(a), table(b)) == pytest.approx(agreement.spearman(a[:22], b[:22]))


@pytest.mark.parametrize('k', [4, 10, 30, 100])
def test_overlap_of_the_top(k):
  rng = np.random.default_rng(0)
  a, b = rng.permutation(30), rng.permutation(30)
  want = overlap(a, b, max(round(0.3 * k), 1))
  assert agreement.top_overlap(a, b, k) == pytest.approx(want)
  assert agreement.top_overlap(a, a, k) == agreement.top_overlap(a, 3.0 * a, k) == 1
  assert agreement.top_overlap(a, -a, min(k, 50)) == (0 if k < 100 else overlap(a, -a, 15))


def test_ties_at_the_threshold_count_by_their_room():
  a, b = np.array([5, 3, 3, 3, 1, 0]), np.array([5, 4, 0, 0.5, 3, 1])
  # Of a: all of the first, two thirds of each of the next three; of b: 0, 1 and 4.
  assert agreement.top_overlap(a, b, 50) == pytest.approx((1 + 2 / 3) / 3)
  assert agreement.top_overlap(a, a, 50) == pytest.approx(1)
  for order in itertools.permutations(range(6)):
    shuffled = a[list(order)], b[list(order)]
    assert agreement.top_overlap(*shuffled, 50) == pytest.approx((1 + 2 / 3) / 3)


def test_the_released_variant_loses_agreement():
  """True correlation 0.99, index vectors of argsort near 0; with a trend over units it is more."""
  rng = np.random.default_rng(0)
  a = rng.normal(size=4608)
  b = a + 0.12 * rng.normal(size=4608)
  assert agreement.spearman(a, b) > 0.985
  assert abs(agreement.released_argsort(a, b)) < 0.05
  trend = np.linspace(0, 4, 4608)
  assert agreement.released_argsort(a + trend, b + trend) > 0.3
  # By hand: the lists of units by score.
  lists = [0, 2, 1, 3], [2, 3, 1, 0]
  want = np.corrcoef(*lists)[0, 1]
  assert agreement.released_argsort([1, 7, 2, 9], [9, 5, 1, 4]) == pytest.approx(want)
  assert agreement.released_argsort(a, a) == pytest.approx(1)


def test_matrices():
  rng = np.random.default_rng(1)
  scores = {name: rng.random((3, 4)) for name in 'abc'}
  for name, measure in agreement.MEASURES.items():
    out = agreement.matrix(scores, measure)
    np.testing.assert_allclose(np.diag(out), 1)
    np.testing.assert_array_equal(out, out.T)
    assert out[0, 2] == pytest.approx(measure(scores['a'], scores['c'])), name
  half = agreement.matrix(scores, functools.partial(agreement.top_overlap, k=50))
  assert half[1, 2] == agreement.top_overlap(scores['b'], scores['c'], 50)


def test_across_shots():
  up = np.arange(5.0)
  near = np.array([0.0, 1, 2, 4, 3])
  scores = {('x', 0): up, ('x', 1): near, ('y', 0): up, ('y', 1): -up, ('y', 5): up}
  out = agreement.across_shots(scores)
  assert set(out) == {(0, 1), (0, 5), (1, 5)}
  assert out[0, 1].tasks == 2
  assert out[0, 1].mean == pytest.approx((0.9 - 1) / 2)
  assert out[0, 1].variance == pytest.approx(0.95**2)
  assert out[1, 5] == agreement.AcrossShots(pytest.approx(-1), 0, 1)
  assert agreement.across_shots({('x', 0): up, ('y', 1): up}) == {}


@pytest.mark.parametrize('measure', agreement.MEASURES.values(), ids=agreement.MEASURES)
@pytest.mark.parametrize(
  ('a', 'b', 'message'),
  [
    ([1, 2, 3], [1, 2], r'shapes \(3,\) and \(2,\)'),
    ([1, 2, 3], [4, 4, 4], '3 scores that are all alike'),
    ([1], [2], '1 scores'),
    ([1, np.nan], [1, 2], 'not finite'),
  ],
)
def test_refusals(measure, a, b, message):
  with pytest.raises(ValueError, match=message):
    measure(np.array(a), np.array(b))
  with pytest.raises(ValueError, match=f'^two against one: .*{message}'):
    agreement.matrix({'one': np.array(a), 'two': np.array(b)}, _off_diagonal(measure))


def _off_diagonal(measure):
  return lambda a, b: 1.0 if a is b else measure(b, a)


@pytest.mark.parametrize('k', [0, -1, 101])
def test_a_share_out_of_range_is_refused(k):
  with pytest.raises(ValueError, match='percent'):
    agreement.top_overlap(np.arange(3), np.arange(3), k)
