"""How alike two tasks, or two numbers of shots, rank the same units.

Sources: Bansal et al., 2023, section 4.3, which reports Spearman's correlation and the overlap of
the most important. Letters: T tasks, U units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import scipy.stats

Measure = Callable[[np.ndarray, np.ndarray], float]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
  """Spearman's rank correlation, -1 to 1; tied scores share the mean of their ranks.

  Args:
    a, b: scores of the same units, of any one shape.

  Raises:
    ValueError: scores of other shapes, of fewer than two units, not finite, or all alike.
  """
  return float(scipy.stats.spearmanr(*_checked(a, b)).statistic)


def kendall(a: np.ndarray, b: np.ndarray) -> float:
  """Kendall's tau-b, -1 to 1, which accounts for ties; arguments and errors as of `spearman`."""
  return float(scipy.stats.kendalltau(*_checked(a, b)).statistic)


def top_overlap(a: np.ndarray, b: np.ndarray, k: float = 30.0) -> float:
  """Share of the top k percent that both have in common, 0 to 1; chance gives k / 100.

  Of units tied at the threshold each counts with the share of them that has room, so that the
  order of units decides nothing.

  Args:
    a, b: scores, larger for what is worth more.
    k: percent of the units, at least one unit of them.

  Raises:
    ValueError: as of `spearman`, or k outside (0, 100].
  """
  if not 0 < k <= 100:
    raise ValueError(f'top {k} percent: k must lie above 0 and not above 100')
  a_U, b_U = _checked(a, b)
  number = max(round(k * a_U.size / 100), 1)
  return float(np.minimum(_in_top(a_U, number), _in_top(b_U, number)).sum() / number)


def _in_top(scores_U: np.ndarray, number: int) -> np.ndarray:
  """How much of each unit is among the `number` highest, `[U]`, 0 to 1."""
  least = np.partition(scores_U, -number)[-number]
  above_U, tied_U = scores_U > least, scores_U == least
  return above_U + tied_U * (number - above_U.sum()) / tied_U.sum()


def released_argsort(a: np.ndarray, b: np.ndarray) -> float:
  """Spearman's correlation of `argsort`'s index vectors, as the paper's scripts compute it.

  For comparison with published figures alone: those vectors list units by score, they are not the
  units' ranks. Two rankings that agree but for neighbours can come out at 0 (`spearman` does not).
  """
  return spearman(*(np.argsort(x, kind='stable') for x in _checked(a, b)))


MEASURES: dict[str, Measure] = {
  'spearman': spearman,
  'kendall': kendall,
  'top_overlap': top_overlap,
  'released_argsort': released_argsort,
}


def matrix(scores: Mapping[str, np.ndarray], measure: Measure = spearman) -> np.ndarray:
  """Agreement of each with each, `[T, T]`, in the order given.

  Args:
    scores: by name, of the same units.
    measure: one of `MEASURES`, or another that is symmetric.

  Raises:
    ValueError: as the measure does, naming the two.
  """
  names = list(scores)
  out_TxT = np.ones((len(names), len(names)))
  for i, first in enumerate(names):
    for j, second in enumerate(names[: i + 1]):
      out_TxT[i, j] = out_TxT[j, i] = _named(measure, scores, first, second)
  return out_TxT


@dataclasses.dataclass(frozen=True)
class AcrossShots:
  """Agreement of two numbers of shots: mean and variance over tasks, and how many there are."""

  mean: float
  variance: float
  tasks: int


def across_shots(
  scores: Mapping[tuple[str, int], np.ndarray], measure: Measure = spearman
) -> dict[tuple[int, int], AcrossShots]:
  """Agreement of each two numbers of shots, task by task (table 1 of the paper).

  Args:
    scores: by task and shots; a task that lacks one of two numbers does not count for them.
    measure: as of `matrix`.
  """
  tasks, shots = dict.fromkeys(t for t, _ in scores), sorted({s for _, s in scores})
  out = {}
  for pair in ((a, b) for a in shots for b in shots if a < b):
    both = [[(task, s) for s in pair] for task in tasks]
    found = [_named(measure, scores, *keys) for keys in both if all(k in scores for k in keys)]
    if found:
      out[pair] = AcrossShots(float(np.mean(found)), float(np.var(found)), len(found))
  return out


def _named(measure: Measure, scores: Mapping, first, second) -> float:
  try:
    return measure(scores[first], scores[second])
  except ValueError as e:
    raise ValueError(f'{first} against {second}: {e}') from None


def _checked(*scores: np.ndarray) -> list[np.ndarray]:
  """As vectors of one length that ranks can be made of."""
  arrays = [np.asarray(x, np.float64) for x in scores]
  if len({x.shape for x in arrays}) > 1:
    raise ValueError(f'scores of shapes {" and ".join(str(x.shape) for x in arrays)}')
  for x in arrays:
    if not np.isfinite(x).all():
      raise ValueError('scores that are not finite have no ranks')
    if x.size < 2 or (x == x.flat[0]).all():
      raise ValueError(f'{x.size} scores that are all alike rank nothing')
  return [x.ravel() for x in arrays]
