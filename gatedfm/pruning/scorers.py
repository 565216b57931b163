"""Scorers: how much each module or unit is worth, from what calibration collected.

A scorer gives scores by site, `[N]` for modules and layers and `[N, U]` for units, larger for what
is worth more; it names what it needs. Sources: Michel et al., 2019; Bansal et al., 2023 (`taylor`);
Kwon et al., 2022 (`fisher`); Muralidharan et al., 2024 (`activation`); Sun et al., 2024 (`wanda`);
Men et al., 2024 (`influence`). Letters: N layers, H heads, K head width, F hidden width, D model
width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from gatedfm.models import stack
from gatedfm.models.lm_config import STACK, LmConfig
from gatedfm.models.speech_config import choice
from gatedfm.nn.layers import Factorized
from gatedfm.pruning.calibration import ATTENTION, CHANNELS, FFN, HEADS, LAYER, RANKS, Stats

Scores = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Calibrated:
  """What scorers read: the dense model (unrolled) and what was collected on it."""

  cfg: LmConfig
  params: Any
  stats: Stats | None = None
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A function of `Calibrated`.

  Attributes:
    score: the function.
    needs: what of `calibration.NEEDS` it reads.
    comparable: sites whose scores are of one unit, such as a loss.
    sites: that it scores.
  """

  score: Callable[[Calibrated], Scores]
  needs: tuple[str, ...] = ()
  comparable: tuple[str, ...] = ()
  sites: tuple[str, ...] = (HEADS, CHANNELS, ATTENTION, FFN, LAYER, RANKS)


def taylor(x: Calibrated, layer_norm: bool = False) -> Scores:
  """`E |A . dL/dA|`, the mean over tokens (Bansal et al., 2023).

  Of the last layer only positions that predict a target have a derivative: its mean is over those.

  Args:
    x: calibrated with gradients.
    layer_norm: divides each layer's scores by their L2 norm (Michel et al., 2019).
  """
  stats, out = x.stats, {}
  for name, total in stats.by_token.items():
    mean = np.array(total, np.float64)
    # Embeddings are read by all.
    last = len(mean) if name == RANKS else len(mean) - 1
    mean[:last] /= stats.tokens
    mean[last:] /= stats.targets
    if layer_norm and mean.ndim == 2:
      mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-20)
    out[name] = mean
  return out


def fisher(x: Calibrated) -> Scores:
  """`sum_b (dL_b/dg)^2`, the diagonal of the gates' empirical Fisher matrix, example by example."""
  return {name: np.array(v, np.float64) for name, v in x.stats.by_example.items()}


def activation(x: Calibrated) -> Scores:
  """L2 over examples of the mean |x| that output projections read; of a head over its channels."""
  channels = {name: np.sqrt(v) for name, v in x.stats.mean_square.items()}
  return _gathered(x.cfg, channels, lambda v: np.sqrt(np.sum(np.square(v), -1)))


def wanda(x: Calibrated) -> Scores:
  """`sum_j |W_ij| ||x_i||` of the output projection's rows i; of a head or module their sum."""
  out = {}
  for name, module, kernel in ((HEADS, 'attention', 'out'), (CHANNELS, 'ffn', 'w_2')):
    weight_NxF = np.stack([np.abs(k).sum(1) for k in _kernels(x, module, kernel)])
    out[name] = weight_NxF * np.sqrt(x.stats.square[name])
  return _gathered(x.cfg, out, lambda v: np.sum(v, -1))


def magnitude(x: Calibrated) -> Scores:
  """L2 norm of a unit's row or rows of the output projection; of a rank its product's norm: of
  factors by SVD without weights the singular value."""
  out = {}
  for name, module, kernel in ((HEADS, 'attention', 'out'), (CHANNELS, 'ffn', 'w_2')):
    out[name] = np.stack([np.linalg.norm(k, axis=1) for k in _kernels(x, module, kernel)])
  out = _gathered(x.cfg, out, lambda v: np.sqrt(np.sum(np.square(v), -1)))
  table = x.params[STACK]['embedding']
  if isinstance(table, Factorized):  # singular values, wherever a split has put them
    norm = lambda factor, axis: np.linalg.norm(np.asarray(factor, np.float32), axis=axis)
    out[RANKS] = (norm(table.first, 0) * norm(table.second, 1))[None]
  return out


def influence(x: Calibrated) -> Scores:
  """`E [1 - cos(x, x + module(x))]` of modules; units have none."""
  tokens = x.stats.tokens + x.stats.examples  # with the first of each, which nothing predicts
  return {name: np.array(v) / tokens for name, v in x.stats.influence.items()}


def oracle(x: Calibrated) -> Scores:
  """What the loss grows by without the module (Bansal et al., 2023, equation 7, of the loss)."""
  return {name: np.array(v) / x.stats.examples for name, v in x.stats.removal.items()}


def random(x: Calibrated) -> Scores:
  """Uniform: the control that every other scorer has to beat."""
  rng = np.random.default_rng(x.seed)
  sites = (*x.cfg.all_sites(), *x.cfg.unit_sites())
  scores = {s.name: rng.random((s.layers, s.units) if s.units > 1 else s.layers) for s in sites}
  return scores | {LAYER: rng.random(x.cfg.layers)}


_UNITS, _MODULES = (HEADS, CHANNELS, ATTENTION, FFN), (ATTENTION, FFN, LAYER)
_ALL = (*_UNITS, LAYER, RANKS)
# Channels and ranks are scored by their sum over tokens, these token by token.
_BY_TOKEN = (HEADS, *_MODULES)
SCORERS: dict[str, Scorer] = {
  'taylor': Scorer(taylor, ('gradients',), _BY_TOKEN),
  'taylor_layer_norm': Scorer(lambda x: taylor(x, layer_norm=True), ('gradients',)),
  'fisher': Scorer(fisher, ('gradients',), _ALL),
  'activation': Scorer(activation, ('activations',), sites=_UNITS),
  'wanda': Scorer(wanda, ('activations',), sites=_UNITS),
  'magnitude': Scorer(magnitude, sites=(*_UNITS, RANKS)),
  'influence': Scorer(influence, ('activations',), _MODULES, _MODULES),
  'oracle': Scorer(oracle, ('removals',), _MODULES, _MODULES),
  'random': Scorer(random, comparable=_ALL),
}


def get(name: str) -> Scorer:
  """A scorer by name; raises ConfigError, with those that there are, on any other."""
  choice('scorer', name, tuple(SCORERS))
  return SCORERS[name]


def _gathered(cfg: LmConfig, channels: Scores, over: Callable[[np.ndarray], np.ndarray]) -> Scores:
  """Scores of channels `[N, H K]` and `[N, F]`; of heads and modules gathered from them."""
  heads_NxHxK = channels[HEADS].reshape(cfg.layers, cfg.heads, cfg.width)
  return {
    HEADS: over(heads_NxHxK),
    ATTENTION: over(channels[HEADS]),
    CHANNELS: channels[CHANNELS],
    FFN: over(channels[CHANNELS]),
  }


def _kernels(x: Calibrated, module: str, kernel: str) -> list[np.ndarray]:
  """That matrix of each layer, `[in, out]`."""
  layers = x.params[STACK]['layers']
  return [
    np.asarray(layers[f'{stack.PREFIX}{i}'][module][module][kernel]['kernel'], np.float32)
    for i in range(x.cfg.layers)
  ]


AGGREGATIONS = ('mean', 'rank', 'zscore')


def aggregate(scores: Sequence[Mapping[str, np.ndarray]], how: str = 'mean') -> Scores:
  """One score from those of several tasks.

  Args:
    scores: of each task, of the same sites.
    how: `mean` (the paper's: tasks with large derivatives weigh more), `rank` (mean of the ranks
      over a site) or `zscore` (mean of the standardised scores).

  Raises:
    ConfigError: another way. ValueError: no scores, or of differing sites.
  """
  choice('aggregation', how, AGGREGATIONS)
  if not scores or any(set(s) != set(scores[0]) for s in scores):
    raise ValueError('scores of several tasks must be of the same sites')

  def each(v: np.ndarray) -> np.ndarray:
    v = np.asarray(v, np.float64)
    if how == 'rank':
      return (scipy.stats.rankdata(v).reshape(v.shape) - 1) / v.size
    return (v - v.mean()) / max(v.std(), 1e-20) if how == 'zscore' else v

  return {name: np.mean([each(s[name]) for s in scores], 0) for name in scores[0]}
