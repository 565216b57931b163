"""Least-squares repair: what is left is fitted to what the dense model computed.

Layer by layer, the output projection of each module that stays is solved for anew, so that the
residual stream of the pruned model comes as close as it can to the dense one's; no gradient is
taken. In the family of Kwon et al., 2022 (masks rescaled by least squares) and of optimal brain
surgery (Hassibi and Stork, 1993), of whole projections and with what earlier layers have lost as
part of the target. Letters: B batch, L tokens, D model width, F what a projection reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import gates as gates_lib
from gatedfm.data.lm_batches import LmBatch
from gatedfm.gates import Gates
from gatedfm.models import stack
from gatedfm.models.lm import LmAttention, LmFfn, for_inference
from gatedfm.models.lm_config import STACK, LmConfig
from gatedfm.models.speech_config import ConfigError
from gatedfm.nn import attention, layers
from gatedfm.pruning.calibration import ATTENTION, CHANNELS, FFN, HEADS

# Module, the projection that is solved for, its units' gates.
_PARTS = (('attention', 'out', ATTENTION, HEADS), ('ffn', 'w_2', FFN, CHANNELS))


def least_squares(
  cfg: LmConfig,
  params: dict[str, Any],
  gates: Gates,
  batches: Iterable[LmBatch],
  ridge: float = 0.01,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """The dense parameters with the output projections that fit those gates.

  `W' = argmin |X W' - (x_dense - x)|^2 + ridge m |W' - W|^2`: X what the projection of the pruned
  model reads, x its stream before the module, x_dense the dense stream after it, m the mean square
  of X over tokens and channels times the number of tokens.

  Args:
    cfg, params: the dense model, of the pre-norm kind, in either layout.
    gates: 0 or 1, `[N]` and `[N, U]` per site.
    batches: calibration texts; all their tokens count.
    ridge: how far solutions are drawn to the weights that there are.
    say: is told how far it is.

  Returns: unrolled, of the same shapes, to be masked or compacted by the same gates.

  Raises:
    ConfigError: norms after the sums, which leave no linear stream; factors.
  """
  if not cfg.pre_norm:
    raise ConfigError(
      'least-squares repair needs norms before the modules; this model has them after'
    )
  if cfg.factors:
    raise ConfigError('least-squares repair fits whole matrices; this model has factors')
  _, params = for_inference(cfg, params)
  whole = gates_lib.completed(gates, (*cfg.all_sites(), *cfg.unit_sites()))
  spread = lambda name, shape: np.broadcast_to(np.asarray(whole[name], np.float32), shape)
  embed, run, advance = _programs(dataclasses.astuple(cfg))
  batches = [_seen(b) for b in batches]
  # Both streams of every batch, side by side.
  streams = [(x, x) for x in (embed(params, b.tokens, b.mask) for b in batches)]
  new_layers = dict(params[STACK]['layers'])
  for i in range(cfg.layers):
    name = f'{stack.PREFIX}{i}'
    for module, projection, site, units in _PARTS:
      size = cfg.heads if module == 'attention' else cfg.ffn
      own, open_U = new_layers[name][module], jnp.asarray(spread(units, (cfg.layers, size))[i])
      if not spread(site, (cfg.layers,))[i]:
        streams = [
          (x + run[module](own, x, x, x, b.mask, jnp.ones(size))[2], y)
          for (x, y), b in zip(streams, batches)
        ]
        continue
      moments, after = None, []
      for (x, y), b in zip(streams, batches):
        square, cross, out = run[module](own, x, y, x - y, b.mask, open_U)
        after.append(x + out)
        moments = (
          (square, cross) if moments is None else jax.tree.map(jnp.add, moments, (square, cross))
        )
      inner = own[module]
      solved = _solve(*map(np.asarray, moments), np.asarray(inner[projection]['kernel']), ridge)
      changed = inner | {projection: inner[projection] | {'kernel': jnp.asarray(solved)}}
      own = own | {module: changed}
      new_layers[name] = new_layers[name] | {module: own}
      streams = [
        (x, y + advance[module](own, y, b.mask, open_U))
        for x, (_, y), b in zip(after, streams, batches)
      ]
    say(
      f'repair: {i + 1} of {cfg.layers} layers, {_distance(streams, batches):.3f} of the stream off'
    )
  return params | {STACK: params[STACK] | {'layers': new_layers}}


def _seen(b: LmBatch) -> LmBatch:
  """Without the token that rows of padding see of themselves."""
  return dataclasses.replace(b, mask=b.mask & (b.weight.sum(1) > 0)[:, None])


def _solve(
  square_FxF: np.ndarray, cross_FxD: np.ndarray, kernel_FxD: np.ndarray, ridge: float
) -> np.ndarray:
  """The ridge regression around the kernel; rows of what is never read stay as they are."""
  read = np.flatnonzero(np.diag(square_FxF) > 0)
  solved = np.array(kernel_FxD)
  if read.size:
    square = square_FxF[np.ix_(read, read)].astype(np.float64)
    weight = ridge * np.trace(square) / read.size
    square += weight * np.eye(read.size)
    right = cross_FxD[read] + weight * kernel_FxD[read]
    solved[read] = np.linalg.solve(square, right)
  return solved


def _distance(streams: Any, batches: Any) -> float:
  """Norm of the streams' difference over that of the dense one."""
  off = total = 0.0
  for (x, y), b in zip(streams, batches):
    off += float(jnp.sum(jnp.square(x - y) * b.mask[..., None]))
    total += float(jnp.sum(jnp.square(x) * b.mask[..., None]))
  return (off / total) ** 0.5


@functools.cache
def _programs(cfg: tuple) -> tuple[Any, dict[str, Any], dict[str, Any]]:
  """Embeddings; of both modules their moments and outputs, any layer's; their outputs alone."""
  cfg = LmConfig(*cfg)
  model, _ = for_inference(cfg, {})

  def embed(params: Any, tokens_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
    return nn.apply(lambda m: m.decoder.embed(tokens_BxL, _positions(mask_BxL)), model)(
      {'params': params}
    )

  parts = {'attention': LmAttention(model.cfg), 'ffn': LmFfn(model.cfg)}

  def apply(kind: str, own: Any, x: jax.Array, mask_BxL: jax.Array, open_U: jax.Array) -> tuple:
    """What the output projection reads, `[B, L, F]`, and the module's output."""
    read = []

    def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
      if isinstance(context.module, layers.Linear) and context.module.name in ('out', 'w_2'):
        read.append(args[0])
      return call(*args, **kwargs)

    if kind == 'attention':
      seen = attention.causal_mask(x.shape[1]) & mask_BxL[:, None, None, :]
      args = x, seen, _positions(mask_BxL), open_U[None], True
    else:
      args = x, True, open_U[None]
    with nn.intercept_methods(listen):
      out = parts[kind].apply({'params': own}, *args)
    return read[0], out

  def moments(kind, own, x_BxLxD, y_BxLxD, gap_BxLxD, mask_BxL, open_U) -> tuple:
    """`X^T X` and `X^T` target of the pruned stream y, and the dense module's output."""
    everything = jnp.ones_like(open_U)
    _, out_BxLxD = apply(kind, own, x_BxLxD, mask_BxL, everything)
    read_BxLxF, _ = apply(kind, own, y_BxLxD, mask_BxL, open_U)
    inner = own[kind]['out' if kind == 'attention' else 'w_2']
    target = gap_BxLxD + out_BxLxD - inner.get('bias', 0.0)
    read = read_BxLxF * mask_BxL[..., None]
    return (
      jnp.einsum('blf,blg->fg', read, read),
      jnp.einsum('blf,bld->fd', read, target),
      out_BxLxD,
    )

  run = {kind: jax.jit(functools.partial(moments, kind)) for kind in parts}
  advance = {kind: jax.jit(lambda *args, kind=kind: apply(kind, *args)[1]) for kind in parts}
  return jax.jit(embed), run, advance


def _positions(mask_BxL: jax.Array) -> jax.Array:
  return jnp.maximum(jnp.cumsum(mask_BxL, 1) - 1, 0)
