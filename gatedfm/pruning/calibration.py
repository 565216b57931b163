"""One pass over calibration texts that collects all that the chosen scorers need.

Gates stand at every module and unit, all of them 1: the derivative of the loss by a gate is the
product of what the gate multiplies with its own derivative, `A . dL/dA`. A layer's gate closes both
its modules. Letters: N layers, B batch, L tokens, P targets, D model width, H heads, F hidden
width, U units.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import gates as gates_lib
from gatedfm.data.lm_batches import LmBatch
from gatedfm.gates import Gates
from gatedfm.models.lm import LmAttention, LmFfn, LmLayer, for_inference
from gatedfm.models.lm_config import STACK, LmConfig
from gatedfm.models.lm_losses import losses
from gatedfm.nn import layers

ATTENTION, FFN = f'{STACK}/attention', f'{STACK}/ffn'
HEADS, CHANNELS = f'{STACK}/attention_heads', f'{STACK}/ffn_channels'
RANKS = f'{STACK}/embedding_ranks'  # of models whose embeddings are factorized
LAYER = f'{STACK}/layer'  # no site of the model's: both modules' gates at once
NEEDS = ('gradients', 'activations', 'removals')


@flax.struct.dataclass
class Stats:
  """Sums over examples, by site.

  Attributes:
    examples: how many; tokens: all but the first of each; targets: that were predicted.
    by_token: `sum_{b,t} |dL/dg[b,t]|`, `[N]` or `[N, H]` (of channels, by example).
    by_example: `sum_b (sum_t dL/dg[b,t])^2`, `[N]` or `[N, U]`.
    mean_square: `sum_b (mean_t |x|)^2` of what output projections read, `[N, H K]` and `[N, F]`.
    square: `sum_{b,t} x^2` of the same.
    influence: `sum_{b,t} 1 - cos(x, x + module(x))`, `[N]`.
    removal: `sum_b` of what the loss grows by without the module, `[N]`.
  """

  examples: jax.Array
  tokens: jax.Array
  targets: jax.Array
  by_token: dict[str, jax.Array]
  by_example: dict[str, jax.Array]
  mean_square: dict[str, jax.Array]
  square: dict[str, jax.Array]
  influence: dict[str, jax.Array]
  removal: dict[str, jax.Array]


def collect(
  cfg: LmConfig,
  params: Any,
  batches: Iterable[LmBatch],
  needs: Iterable[str] = ('gradients', 'activations'),
  say: Callable[[str], None] = lambda line: None,
  gates: Gates | None = None,
  removed: Sequence[str] = (ATTENTION, FFN, LAYER),
) -> Stats:
  """Runs the batches once.

  An example's loss is the mean over its targets (Bansal et al., 2023, equation 8).

  Args:
    cfg, params: the dense model, in either layout.
    batches: of `lm_batches.batches`.
    needs: of `NEEDS`, what to collect; the rest stays empty. `removals` are the exact oracle: a
      forward pass for each module.
    say: is told how far it is.
    gates: closed (0) for what is gone already, `[N]` or `[N, U]` per site; it stays closed.
    removed: sites of `removals`.
  """
  _, params = for_inference(cfg, params)
  needs = tuple(n for n in NEEDS if n in set(needs))
  step, loss = programs(cfg, needs)
  base = everything(cfg).values | ({} if gates is None else dict(gates.values))
  remove = _remover(cfg, base, loss, removed) if 'removals' in needs else None
  total, start = None, time.perf_counter()
  batches = list(batches)
  for i, b in enumerate(batches):
    stats = step(params, base, b.tokens, b.mask, b.at, b.weight)
    if remove is not None:
      stats = stats.replace(removal=remove(params, b))
    total = stats if total is None else jax.tree.map(jnp.add, total, stats)
    seconds = time.perf_counter() - start
    left = seconds / (i + 1) * (len(batches) - i - 1)
    say(f'calibration: {i + 1} of {len(batches)} batches, {left:.0f} s left')
  if total is None:
    raise ValueError('no calibration texts')
  return jax.tree.map(np.asarray, total)


def _loss(model, params, tokens_BxL, mask_BxL, at_BxP, weight_BxP, gates) -> jax.Array:
  """Sum over examples of the mean over their targets."""
  each_B = jnp.maximum(weight_BxP.sum(1, keepdims=True), 1)
  return jnp.sum(losses(model, params, tokens_BxL, mask_BxL, at_BxP, gates) * weight_BxP / each_B)


def everything(cfg: LmConfig) -> Gates:
  """All gates of the model, open."""
  return gates_lib.all_open((*cfg.all_sites(), *cfg.unit_sites()))


def programs(cfg: LmConfig, needs: Sequence[str]) -> tuple[Callable[..., Any], ...]:
  """Jitted: `(params, gates, tokens, mask, at, weight) -> Stats` of a batch, and its loss.

  The loss is of `(params, tokens, mask, at, weight, gates)`, which skips what they close. Both are
  compiled once, whatever is closed already.
  """
  return _programs(dataclasses.astuple(cfg), tuple(needs))


@functools.cache
def _programs(cfg: tuple, needs: tuple[str, ...]) -> tuple[Callable[..., Any], ...]:
  model, _ = for_inference(LmConfig(*cfg), {})
  skipping, _ = for_inference(LmConfig(*cfg), {}, 'skip')
  return (
    jax.jit(functools.partial(_step, model, needs)),
    jax.jit(functools.partial(_loss, skipping)),
  )


def _remover(
  cfg: LmConfig, base: dict[str, Any], loss: Callable[..., jax.Array], removed: Sequence[str]
) -> Callable[[Any, LmBatch], dict[str, np.ndarray]]:
  """By how much a batch's loss grows without each module."""

  def without(site: str, layer: int) -> Gates:
    open_N = np.arange(cfg.layers) != layer
    names = (ATTENTION, FFN) if site == LAYER else (site,)
    return Gates(base | {name: base[name] * open_N for name in names})

  def remove(params: Any, b: LmBatch) -> dict[str, np.ndarray]:
    of = lambda gates: float(loss(params, b.tokens, b.mask, b.at, b.weight, gates))
    full = of(Gates(base))
    return {
      site: np.array([of(without(site, i)) - full for i in range(cfg.layers)]) for site in removed
    }

  return remove


def _step(model, needs, params, base, tokens_BxL, mask_BxL, at_BxP, weight_BxP) -> Stats:
  real_B = weight_BxP.sum(1) > 0
  seen_BxL = mask_BxL & real_B[:, None]
  sums: dict[str, dict[str, jax.Array]] = {name: {} for name in Stats.__annotations__}
  if 'gradients' in needs:
    closed = lambda gates: Gates(
      {n: g * jnp.reshape(base[n], _shape(base[n], g)) for n, g in gates.values.items()}
    )
    args = model, params, tokens_BxL, mask_BxL, at_BxP, weight_BxP
    slopes = jax.grad(lambda gates: _loss(*args, closed(gates)))(
      _open(model.cfg, *tokens_BxL.shape)
    ).values
    slopes[LAYER] = slopes[ATTENTION] + slopes[FFN]
    for name, g in slopes.items():
      g_NxBxTxU = g[:, :, None] if name in (CHANNELS, RANKS) else g
      sums['by_token'][name] = jnp.sum(jnp.abs(g_NxBxTxU), (1, 2))
      sums['by_example'][name] = jnp.sum(jnp.square(jnp.sum(g_NxBxTxU, 2)), 1)
  if 'activations' in needs:
    given = Gates(base) if base else None
    for kind, found in _activations(model, params, tokens_BxL, mask_BxL, seen_BxL, given).items():
      sums[kind] = found
  count = lambda x: jnp.sum(x).astype(jnp.float32)
  sums['examples'] = count(real_B)
  sums['tokens'] = count(jnp.maximum(seen_BxL.sum(1) - 1, 0))
  sums['targets'] = count(weight_BxP)
  return Stats(**sums)


def _shape(gates: Any, like: jax.Array) -> tuple[int, ...]:
  """Of `[N]` or `[N, U]` gates beside those of every token or example."""
  n, *units = np.shape(gates)
  return n, *(1,) * (like.ndim - 1 - len(units)), *units


def _open(cfg: LmConfig, batch: int, length: int) -> Gates:
  """Gates of every token; of channels and ranks of every example: they would be as large as x."""
  sites = {s.name: s for s in (*cfg.all_sites(), *cfg.unit_sites())}
  each = (cfg.layers, batch, length)
  out = {
    ATTENTION: jnp.ones(each),
    FFN: jnp.ones(each),
    HEADS: jnp.ones((*each, sites[HEADS].units)),
    CHANNELS: jnp.ones((cfg.layers, batch, sites[CHANNELS].units)),
  }
  if RANKS in sites:
    out[RANKS] = jnp.ones((1, batch, sites[RANKS].units))
  return Gates(out)


def _activations(model, params, tokens_BxL, mask_BxL, seen_BxL, gates) -> dict[str, dict[str, Any]]:
  """Forward statistics of each layer, stacked."""
  rows: dict[tuple[str, str], list] = collections.defaultdict(list)
  seen_BxLx1 = seen_BxL[..., None].astype(jnp.float32)
  lengths_Bx1 = jnp.maximum(seen_BxLx1.sum(1), 1)

  def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    module, out = context.module, call(*args, **kwargs)
    if context.method_name != '__call__' or not args:
      return out
    x = args[0].astype(jnp.float32)
    if isinstance(module, layers.Linear) and module.name in ('out', 'w_2'):
      site = HEADS if module.name == 'out' else CHANNELS
      mean_BxF = jnp.sum(jnp.abs(x) * seen_BxLx1, 1) / lengths_Bx1
      rows['mean_square', site].append(jnp.sum(jnp.square(mean_BxF), 0))
      rows['square', site].append(jnp.sum(jnp.square(x) * seen_BxLx1, (0, 1)))
    elif type(module) in _MODULES:
      site = _MODULES[type(module)]
      after = out[0] if site == LAYER else x + out
      rows['influence', site].append(jnp.sum((1 - _cosine(x, after)) * seen_BxLx1[..., 0]))
    return out

  with nn.intercept_methods(listen):
    model.apply({'params': params}, tokens_BxL, mask_BxL, gates, method='hidden')
  found: dict[str, dict[str, Any]] = collections.defaultdict(dict)
  for (kind, site), each in rows.items():
    found[kind][site] = jnp.stack(each)
  return found


_MODULES = {LmAttention: ATTENTION, LmFfn: FFN, LmLayer: LAYER}


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.sum(a * b, -1) / jnp.maximum(norms, 1e-12)
