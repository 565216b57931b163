"""How likely a language model finds given tokens.

Letters: B batch, L tokens, P targets, C choices, S tokens of a prefix.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp

from gatedfm.gates import Gates
from gatedfm.models.lm import LanguageModel
from gatedfm.nn.attention import KeyValue


@flax.struct.dataclass
class Prefix:
  """Tokens that all examples begin with, read once.

  Attributes:
    caches: of each layer, `[1, G, S, K]`.
    mask_1xS: False for padding, which stands on the left.
  """

  caches: list[KeyValue]
  mask_1xS: jax.Array


def read_prefix(
  model: LanguageModel, params: Any, tokens_1xS: jax.Array, mask_1xS: jax.Array, gates: Gates | None
) -> Prefix:
  """Reads a prefix; unrolled layout, gates that all examples share."""
  call = lambda *args, method: model.apply({'params': params}, *args, method=method)
  caches = call(1, tokens_1xS.shape[1], gates, method='start')
  _, caches = call(tokens_1xS, 0, caches, mask_1xS, gates, method='step')
  return Prefix(caches, mask_1xS)


def losses(
  model: LanguageModel,
  params: Any,
  tokens_BxL: jax.Array,
  mask_BxL: jax.Array,
  at_BxP: jax.Array,
  gates: Gates | None = None,
  choices_BxC: jax.Array | None = None,
  prefix: Prefix | None = None,
) -> jax.Array:
  """Negative log-likelihood of each target, `[B, P]`, or of what may stand in the first's place.

  Args:
    model, params: in matching layouts.
    tokens_BxL, mask_BxL, at_BxP: as of `lm_batches.LmBatch`.
    gates: as of `LanguageModel`.
    choices_BxC: tokens, one of which may stand where the first target does; the result is then
      `[B, C]`.
    prefix: what stands in front of all rows.
  """
  if choices_BxC is not None:
    at_BxP = at_BxP[:, :1]
  log_BxPxV = _log_probabilities(model, params, tokens_BxL, mask_BxL, at_BxP, gates, prefix)
  if choices_BxC is not None:
    return -jnp.take_along_axis(log_BxPxV[:, 0], choices_BxC, 1)
  return -_of_targets(log_BxPxV, tokens_BxL, at_BxP)


def losses_and_hits(
  model: LanguageModel,
  params: Any,
  tokens_BxL: jax.Array,
  mask_BxL: jax.Array,
  at_BxP: jax.Array,
  gates: Gates | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`losses` of the targets, and whether each is the likeliest token of all, `[B, P]` both."""
  log_BxPxV = _log_probabilities(model, params, tokens_BxL, mask_BxL, at_BxP, gates, None)
  target_BxP = jnp.take_along_axis(tokens_BxL, at_BxP, 1)
  return -_of_targets(log_BxPxV, tokens_BxL, at_BxP), jnp.argmax(log_BxPxV, -1) == target_BxP


def _log_probabilities(model, params, tokens_BxL, mask_BxL, at_BxP, gates, prefix) -> jax.Array:
  """Of all tokens in the targets' places, `[B, P, V]`."""
  call = lambda *args, **kwargs: model.apply({'params': params}, *args, **kwargs)
  if prefix is None:
    x_BxLxD = call(tokens_BxL, mask_BxL, gates, method='hidden')
  else:
    x_BxLxD, _ = call(tokens_BxL, *_behind(prefix, mask_BxL), gates, method='step')
  x_BxPxD = jnp.take_along_axis(x_BxLxD, (at_BxP - 1)[..., None], 1)
  return jax.nn.log_softmax(call(x_BxPxD, gates, method='logits'))


def _of_targets(log_BxPxV: jax.Array, tokens_BxL: jax.Array, at_BxP: jax.Array) -> jax.Array:
  target_BxP = jnp.take_along_axis(tokens_BxL, at_BxP, 1)
  return jnp.take_along_axis(log_BxPxV, target_BxP[..., None], 2)[..., 0]


def _behind(prefix: Prefix, mask_BxL: jax.Array) -> tuple[int, list[KeyValue], jax.Array]:
  """Where `LanguageModel.step` goes on: the first free column, caches and mask for the rows."""
  rows, length = mask_BxL.shape
  spread = lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:]))
  grow = lambda x: jnp.pad(spread(x), ((0, 0), (0, 0), (0, length), (0, 0)))
  mask_BxS = jnp.concatenate([spread(prefix.mask_1xS), mask_BxL], 1)
  return prefix.mask_1xS.shape[1], jax.tree.map(grow, prefix.caches), mask_BxS
