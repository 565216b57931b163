"""From scores and a budget to gates: which modules and units are closed.

Letters: N layers, U units, G groups of heads that share keys and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gatedfm.gates import Gates, Site
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.pruning.calibration import ATTENTION, CHANNELS, FFN, HEADS

# What budgets call the sites.
NAMES = {'heads': HEADS, 'ffn': FFN, 'attention': ATTENTION, 'channels': CHANNELS}
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
  """

  shape: str = 'ragged'
  bucket: int = 1
  floor: int = 0
  groups: bool = False

  def __post_init__(self):
    choice('shape', self.shape, SHAPES)
    if self.bucket < 1 or self.floor < 0:
      raise ConfigError(
        f'bucket {self.bucket} must be positive and floor {self.floor} not negative'
      )


RAGGED = Allocation()


def parse_budget(text: str) -> dict[str, float]:
  """`heads:0.7,ffn:0.2` as shares to close, by site.

  Raises:
    ConfigError: anything else.
  """
  out = {}
  for item in text.split(','):
    name, _, share = item.partition(':')
    if name not in NAMES:
      raise ConfigError(f'budget {item!r}: write NAME:SHARE, names are {", ".join(NAMES)}')
    try:
      value = float(share)
    except ValueError:
      raise ConfigError(f'budget {item!r}: {share!r} is not a number') from None
    if not 0 <= value <= 1:
      raise ConfigError(f'budget {item!r}: a share to close is between 0 and 1')
    if NAMES[name] in out:
      raise ConfigError(f'budget {text!r} names {name} twice')
    out[NAMES[name]] = value
  return out


def allocate(
  scores: Mapping[str, np.ndarray],
  budget: Mapping[str, float],
  cfg: LmConfig,
  how: Allocation = RAGGED,
  closed: Gates | None = None,
) -> Gates:
  """Closes the lowest scores of each site, `int(share * gates)` of them.

  Args:
    scores: `[N]` or `[N, U]` by site.
    budget: share to close, by site.
    cfg: of the model.
    how: see `Allocation`.
    closed: gates that are closed already, which stay so and count.

  Returns: 0 or 1, of the sites that the budget names.

  Raises:
    ConfigError: a budget that the scorer has no scores for, or that the floor forbids.
  """
  sites = {s.name: s for s in (*cfg.all_sites(), *cfg.unit_sites())}
  out = {}
  for name, share in budget.items():
    if name not in scores:
      known = [k for k, site in NAMES.items() if site in scores]
      raise ConfigError(f'this scorer has no scores of {name}; it has those of {", ".join(known)}')
    before = None if closed is None else closed.values.get(name)
    out[name] = _close(np.asarray(scores[name], np.float64), share, sites[name], cfg, how, before)
  return Gates(out)


def _close(score, share, site: Site, cfg: LmConfig, how: Allocation, before) -> np.ndarray:
  flat = score.reshape(site.layers, site.units)
  if not np.isfinite(flat).all():
    raise ConfigError(f'scores of {site.name} are not finite: calibrate with float32')
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
  return np.repeat(open_NxU, together, 1).reshape(score.shape).astype(np.float32)


def _open(rows: np.ndarray, share: float, how: Allocation, floor: int, name: str) -> np.ndarray:
  """Which stay open, `[N, U]` bool."""
  n, u = rows.shape
  if floor > u:
    raise ConfigError(f'{name} has {u} units; {floor} cannot stay open')
  if n * u - int(share * n * u) < floor * n:
    raise ConfigError(f'{name}: {share:.0%} closed leave fewer than {floor} units in each layer')
  # Of equal scores the first stay, so that results repeat.
  rank = np.empty((n, u), int)
  rank[np.arange(n)[:, None], np.argsort(-rows, 1, kind='stable')] = np.arange(u)
  if how.shape == 'uniform':
    return rank < u - int(share * u)
  spared = np.where(rank < floor, np.inf, rows)
  order = np.argsort(spared, axis=None, kind='stable')
  open_NxU = np.ones(n * u, bool)
  open_NxU[order[: int(share * n * u)]] = False
  open_NxU = open_NxU.reshape(n, u)
  if how.shape == 'ragged':
    return open_NxU
  kept_N = np.round(open_NxU.sum(1) / how.bucket).astype(int) * how.bucket
  return rank < np.clip(kept_N, floor, u)[:, None]


def combine(parts: Sequence[Gates]) -> Gates:
  """Closed where any of them closes."""
  out: dict[str, np.ndarray] = {}
  for part in parts:
    for name, gates in part.values.items():
      out[name] = np.minimum(out[name], gates) if name in out else np.asarray(gates)
  return Gates(out)
