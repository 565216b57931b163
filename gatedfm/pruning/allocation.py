"""From scores and a budget to gates: which modules and units are closed.

Letters: N layers, U units, G groups of heads that share keys and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gatedfm.gates import Gates, Site
from gatedfm.models import lm_costs
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.pruning.calibration import ATTENTION, CHANNELS, FFN, HEADS, LAYER, RANKS

# What budgets call the sites.
NAMES = {
  'heads': HEADS,
  'ffn': FFN,
  'attention': ATTENTION,
  'channels': CHANNELS,
  'layers': LAYER,
  'ranks': RANKS,
}
COSTS = ('params', 'macs', 'bytes', 'latency')  # budgets of the whole model
SHAPES = ('ragged', 'bucketed', 'uniform')


@dataclasses.dataclass(frozen=True)
class Allocation:
  """How gates are closed by their scores.

  Attributes:
    shape: `ragged` closes the lowest of all layers together; `uniform` the same number in each
      layer, so that layers stay alike; `bucketed` rounds each layer's number of open units to
      multiples of `bucket`.
    bucket: of `bucketed`.
    floor: units that stay open in each layer; modules, in the whole model.
    groups: whether query heads that share keys and values close together, by their scores' sum.
    over: what a budget in parameters or MACs closes.
    tokens: of the text whose MACs count.
  """

  shape: str = 'ragged'
  bucket: int = 1
  floor: int = 0
  groups: bool = False
  over: tuple[str, ...] = ('heads', 'ffn')
  tokens: int = 512

  def __post_init__(self):
    if not self.over:
      raise ConfigError(f'over is empty: name some of {", ".join(NAMES)}')
    for name in self.over:
      choice('over', name, tuple(NAMES))
    for pair in (('heads', 'attention'), ('ffn', 'channels')):
      if set(pair) <= set(self.over) or ('layers' in self.over and len(self.over) > 1):
        raise ConfigError(f'over is {", ".join(self.over)}: a part and its whole; choose one')
    choice('shape', self.shape, SHAPES)
    if self.bucket < 1 or self.floor < 0:
      raise ConfigError(
        f'bucket {self.bucket} must be positive and floor {self.floor} not negative'
      )


RAGGED = Allocation()


def parse_budget(text: str) -> dict[str, float]:
  """`heads:0.7,ffn:0.2` as shares to close, by site; `macs:0.3` as `{'macs': 0.3}`.

  Raises:
    ConfigError: anything else.
  """
  out = {}
  for item in text.split(','):
    name, _, share = item.partition(':')
    if name not in (*NAMES, *COSTS):
      raise ConfigError(
        f'budget {item!r}: write NAME:SHARE, names are {", ".join((*NAMES, *COSTS))}'
      )
    try:
      value = float(share)
    except ValueError:
      raise ConfigError(f'budget {item!r}: {share!r} is not a number') from None
    if not 0 <= value <= 1:
      raise ConfigError(f'budget {item!r}: a share to close is between 0 and 1')
    if NAMES.get(name, name) in out:
      raise ConfigError(f'budget {text!r} names {name} twice')
    out[NAMES.get(name, name)] = value
  if len(out) > 1 and set(out) & set(COSTS):
    raise ConfigError(f'budget {text!r}: one in {", ".join(COSTS)} stands alone')
  return out


def sites(budget: Mapping[str, float], how: Allocation = RAGGED) -> list[str]:
  """Names of the sites that a budget closes parts of."""
  return [NAMES[name] for name in how.over] if set(budget) & set(COSTS) else list(budget)


def check(budget: Mapping[str, float], how: Allocation, known: Sequence[str]) -> None:
  """Raises ConfigError for a budget of sites without scores, or of a cost in equal layers."""
  for name in sites(budget, how):
    if name == RANKS and name not in known:
      raise ConfigError(
        'no scores of ranks: there are some of taylor, fisher, magnitude and random, of models '
        'whose embeddings are factorized (python -m gatedfm.factorize)'
      )
    if name not in known:
      others = [k for k, site in NAMES.items() if site in known]
      raise ConfigError(f'this scorer has no scores of {name}; it has those of {", ".join(others)}')
  for kind in set(budget) & set(COSTS):
    if how.shape != 'ragged':
      raise ConfigError(
        f'a budget in {kind} leaves layers of differing shapes: shape is {how.shape}'
      )


def allocate(
  scores: Mapping[str, np.ndarray],
  budget: Mapping[str, float],
  cfg: LmConfig,
  how: Allocation = RAGGED,
  closed: Gates | None = None,
) -> Gates:
  """Closes the lowest scores.

  Of a budget by site, of each site `int(share * gates)`; where layers are `uniform`, of each the
  number nearest to its share, and where `bucketed`, what multiples of the bucket come to. Of one
  in `params`, `macs` or `bytes`, of all sites that `how.over` names together those of least score
  for their cost, until that share of the model's is gone (keys and values count where all their
  heads go together: `how.groups`).

  Args:
    scores: `[N]` or `[N, U]` by site.
    budget: share to close, of `parse_budget`.
    cfg: of the model.
    how: see `Allocation`.
    closed: gates that are closed already, which stay so and count.

  Returns: 0 or 1; layers as gates of both their modules.

  Raises:
    ConfigError: a budget that the scorer has no scores for, that the floor forbids, or that is
      more than there is.
  """
  check(budget, how, tuple(scores))
  costs, names = set(budget) & set(COSTS), sites(budget, how)
  known = {s.name: s for s in (*cfg.all_sites(), *cfg.unit_sites(), Site(LAYER, cfg.layers))}
  if HEADS in names and cfg.heads == 1:
    raise ConfigError('its layers have one head each: close attention instead')
  before = {} if closed is None else dict(closed.values)
  if LAYER in names and before:
    before[LAYER] = np.maximum(before[ATTENTION], before[FFN])
  # A site of one unit to a layer is one of modules.
  each = lambda n: (known[n].layers, known[n].units)[: 1 + (known[n].units > 1)]
  scores = {n: np.asarray(scores[n], np.float64).reshape(each(n)) for n in names}
  if costs:
    ((kind, share),) = budget.items()
    out = _by_cost(scores, kind, share, cfg, how, before)
  else:
    out = {n: _close(scores[n], budget[n], known[n], cfg, how, before.get(n)) for n in names}
  layers = out.pop(LAYER, None)
  parts = [Gates(out)] if layers is None else [Gates(out), Gates({ATTENTION: layers, FFN: layers})]
  return combine(parts)


def _by_cost(scores, kind, share, cfg: LmConfig, how: Allocation, before) -> dict[str, np.ndarray]:
  """Closes what is worth least for its price, until a share of the model's cost is gone."""
  if kind == 'latency':
    raise ConfigError(f'a budget in {kind} has to be measured: gatedfm.prune does')
  rows = {name: _together(name, score, cfg, how) for name, score in scores.items()}
  prices = {name: _price(name, kind, cfg, how) for name in rows}
  worth = [_worth(rows[n], prices[n], cfg, how, n, before.get(n)).ravel() for n in rows]
  price = np.concatenate([np.full(w.size, prices[n]) for n, w in zip(rows, worth)])
  starts = np.cumsum([0, *(w.size for w in worth)])
  worth = np.concatenate(worth)
  order = np.argsort(worth, kind='stable')
  spent = np.cumsum(price[order[: int(np.sum(worth < np.inf))]])  # what the floor spares is last
  total = getattr(lm_costs.total(cfg, how.tokens), kind)
  wanted, most = share * total, spent[-1] if spent.size else 0.0
  if wanted > most:
    raise ConfigError(
      f'{", ".join(how.over)} are {most / total:.0%} of the {kind}: {share:.0%} cannot be closed'
    )
  is_open = np.ones(worth.size, np.float32)
  is_open[order[: int(np.searchsorted(spent, wanted * (1 - 1e-9))) + 1 if wanted else 0]] = 0
  out = {}
  for start, (name, row) in zip(starts, rows.items()):
    mine = is_open[start : start + row.size].reshape(row.shape)
    each = scores[name].size // row.size
    out[name] = np.repeat(mine, each, 1).reshape(scores[name].shape)
  return out


def _together(name: str, score: np.ndarray, cfg: LmConfig, how: Allocation) -> np.ndarray:
  """Scores `[N, U]` of what closes together: a group's heads, where `how` says so."""
  _check_finite(name, score)
  each = cfg.heads // cfg.groups if how.groups and name == HEADS else 1
  return score.reshape(len(score), -1, each).sum(-1)


def _price(name: str, kind: str, cfg: LmConfig, how: Allocation) -> float:
  """Of one of them."""
  of = lambda cost: float(getattr(cost, kind))
  each = of(lm_costs.of_gates(cfg, how.tokens)[name])
  if how.groups and name == HEADS:
    return each * (cfg.heads // cfg.groups) + of(lm_costs.keys_and_values(cfg, how.tokens))
  return each


def _worth(rows, price: float, cfg: LmConfig, how: Allocation, name: str, before) -> np.ndarray:
  """Score by price; least of what is closed, infinite of what the floor spares."""
  worth = rows / price
  if before is not None:
    gone = np.asarray(before).reshape(*rows.shape, -1).max(-1) == 0
    worth = np.where(gone, -np.inf, worth)
  floor = -(-how.floor * rows.shape[1] // cfg.heads) if name == HEADS else how.floor
  # A floor of modules is of the whole model, what is closed already not among them.
  of_each = worth if rows.shape[1] > 1 else worth.T
  rank = np.argsort(np.argsort(-of_each, 1, kind='stable'), 1)
  spared = np.where((rank < floor) & (of_each > -np.inf), np.inf, of_each)
  return spared if rows.shape[1] > 1 else spared.T


def _check_finite(name: str, score: np.ndarray) -> None:
  if not np.isfinite(score).all():
    raise ConfigError(f'scores of {name} are not finite: calibrate with float32')


def _close(score, share, site: Site, cfg: LmConfig, how: Allocation, before) -> np.ndarray:
  flat = score.reshape(site.layers, site.units)
  _check_finite(site.name, flat)
  together = cfg.heads // cfg.groups if how.groups and site.name == HEADS else 1
  flat = flat.reshape(site.layers, -1, together).sum(-1)
  if before is not None:
    gone = np.asarray(before).reshape(site.layers, -1, together).max(-1) == 0
    flat = np.where(gone, -np.inf, flat)
  # Layers of a site of modules have one unit: a number for each would close all or nothing.
  rows = flat if site.units > 1 else flat.T
  open_NxU = _open(rows, share, how, -(-how.floor // together), site.name)
  if site.units == 1:
    open_NxU = open_NxU.T
  if share * open_NxU.size >= 1 and open_NxU.all():
    raise ConfigError(
      f'{site.name}: {how.shape} layers of {rows.shape[1]} close nothing of {share:.0%}: ask for '
      f'more (one of each layer is {1 / rows.shape[1]:.2f}), or for another shape'
    )
  return np.repeat(open_NxU, together, 1).reshape(score.shape).astype(np.float32)


def _open(rows: np.ndarray, share: float, how: Allocation, floor: int, name: str) -> np.ndarray:
  """Which stay open, `[N, U]` bool."""
  n, u = rows.shape
  if floor > u:
    raise ConfigError(f'{name} has {u} units; {floor} cannot stay open')
  number = int(share * n * u + 1e-9)  # 0.29 of 100 are 29, whatever their product rounds to
  if n * u - number < floor * n:
    raise ConfigError(f'{name}: {share:.0%} closed leave fewer than {floor} units in each layer')
  # Of equal scores the first stay, so that results repeat.
  rank = np.empty((n, u), int)
  rank[np.arange(n)[:, None], np.argsort(-rows, 1, kind='stable')] = np.arange(u)
  if how.shape == 'uniform':
    return rank < max(u - round(share * u), floor)
  spared = np.where(rank < floor, np.inf, rows)
  order = np.argsort(spared, axis=None, kind='stable')
  open_NxU = np.ones(n * u, bool)
  open_NxU[order[:number]] = False
  open_NxU = open_NxU.reshape(n, u)
  if how.shape == 'ragged':
    return open_NxU
  left_N = open_NxU.sum(1)
  kept_N = np.round(left_N / how.bucket).astype(int) * how.bucket
  # A layer that has lost nothing stays as it is, whether or not buckets fill it.
  return rank < np.where(left_N == u, u, np.clip(kept_N, floor, u))[:, None]


def combine(parts: Sequence[Gates]) -> Gates:
  """Closed where any of them closes."""
  out: dict[str, np.ndarray] = {}
  for part in parts:
    for name, gates in part.values.items():
      out[name] = np.minimum(out[name], gates) if name in out else np.asarray(gates)
  return Gates(out)
