"""How likely a language model finds given tokens.

Letters: B batch, L tokens, P targets, C choices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gatedfm.gates import Gates
from gatedfm.models.lm import LanguageModel


def losses(
  model: LanguageModel,
  params: Any,
  tokens_BxL: jax.Array,
  mask_BxL: jax.Array,
  at_BxP: jax.Array,
  gates: Gates | None = None,
  choices_BxC: jax.Array | None = None,
) -> jax.Array:
  """Negative log-likelihood of each target, `[B, P]`, or of what may stand in the first's place.

  Args:
    model, params: in matching layouts.
    tokens_BxL, mask_BxL, at_BxP: as of `lm_batches.LmBatch`.
    gates: as of `LanguageModel`.
    choices_BxC: tokens, one of which may stand where the first target does; the result is then
      `[B, C]`.
  """
  call = lambda *args, **kwargs: model.apply({'params': params}, *args, **kwargs)
  x_BxLxD = call(tokens_BxL, mask_BxL, gates, method='hidden')
  if choices_BxC is not None:
    at_BxP = at_BxP[:, :1]
  x_BxPxD = jnp.take_along_axis(x_BxLxD, (at_BxP - 1)[..., None], 1)
  log_BxPxV = jax.nn.log_softmax(call(x_BxPxD, method='logits'))
  if choices_BxC is not None:
    return -jnp.take_along_axis(log_BxPxV[:, 0], choices_BxC, 1)
  target_BxP = jnp.take_along_axis(tokens_BxL, at_BxP, 1)
  return -jnp.take_along_axis(log_BxPxV, target_BxP[..., None], 2)[..., 0]
