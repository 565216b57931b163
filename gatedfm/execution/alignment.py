"""When each token of a text is heard: forced alignment by CTC.

Letters: B batch, S frames of 40 ms, L tokens, N states (2 L + 1: blanks and tokens in turn).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from gatedfm.execution import ctc_prefix

# What a path pays that leaves out the blank between two equal tokens: more than any path's
# frames cost, so that only texts do that have more tokens than fit.
_NO_BLANK = -1e6


def align(ctc: ctc_prefix.Frames, tokens_BxL: jax.Array, eos: int) -> jax.Array:
  """First frame of each token and the first one after it on the likeliest path, `[B, L, 2]`.

  Viterbi's algorithm over the CTC lattice of a text (Graves et al., "Connectionist Temporal
  Classification" (2006), section 4.1, with maxima for sums). A text of more tokens than frames
  is spelled as far as they go; the tokens beyond, and `eos`, lie behind the last frame.

  Args:
    ctc: what CTC says of each frame.
    tokens_BxL: texts, `eos` from their ends on.
    eos: the token of the end.
  """
  b, length = tokens_BxL.shape
  labels_BxN = jnp.full((b, 2 * length + 1), ctc_prefix.BLANK).at[:, 1::2].set(tokens_BxL)
  heard_BxSxN = jnp.take_along_axis(ctc.log_probs, labels_BxN[:, None], 2)
  states_N = jnp.arange(2 * length + 1)
  shifted = lambda a, n, fill: jnp.pad(a, ((0, 0), (n, 0)), constant_values=fill)[:, : a.shape[1]]
  # From a token to the next, over the blank between them.
  repeats_BxN = labels_BxN == shifted(labels_BxN, 2, -1)
  leap_BxN = jnp.where(repeats_BxN, _NO_BLANK, 0.0)
  leap_BxN = jnp.where(states_N % 2 == 1, leap_BxN, ctc_prefix.IMPOSSIBLE)

  def forward(best_BxN: jax.Array, frame: tuple) -> tuple[jax.Array, jax.Array]:
    heard_BxN, valid_B = frame
    impossible = ctc_prefix.IMPOSSIBLE
    ways_3xBxN = jnp.stack(
      [best_BxN, shifted(best_BxN, 1, impossible), shifted(best_BxN, 2, impossible) + leap_BxN]
    )
    steps_BxN = jnp.where(valid_B[:, None], jnp.argmax(ways_3xBxN, 0), 0).astype(jnp.int8)
    new_BxN = jnp.max(ways_3xBxN, 0) + heard_BxN
    return jnp.where(valid_B[:, None], new_BxN, best_BxN), steps_BxN

  # As if one blank came before the first frame.
  start_BxN = jnp.where(states_N == 0, 0.0, jnp.full((b, 1), ctc_prefix.IMPOSSIBLE))
  frames = jnp.swapaxes(heard_BxSxN, 0, 1), ctc.mask.T
  best_BxN, steps_SxBxN = lax.scan(forward, start_BxN, frames)

  # A path ends in the last token or the blank after it, where its frames reach that far.
  frames_B, tokens_B = jnp.sum(ctc.mask, 1), jnp.sum(tokens_BxL != eos, 1)
  last_B = jnp.clip(2 * tokens_B, 0, jnp.maximum(2 * frames_B - 1, 0))
  at = lambda a_BxN, n_B: jnp.take_along_axis(a_BxN, n_B[:, None], 1)[:, 0]
  token_B = jnp.maximum(last_B - 1, 0)
  earlier = (last_B % 2 == 0) & (at(best_BxN, token_B) > at(best_BxN, last_B))
  last_B = jnp.where(earlier, token_B, last_B)

  def backward(state_B: jax.Array, steps_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    return state_B - at(steps_BxN, state_B), state_B

  _, path_SxB = lax.scan(backward, last_B, steps_SxBxN, reverse=True)
  path_Bx1xS, token_Lx1 = path_SxB.T[:, None], states_N[1::2, None]
  count = lambda frames_BxLxS: jnp.sum(ctc.mask[:, None] & frames_BxLxS, 2)
  return jnp.stack([count(path_Bx1xS < token_Lx1), count(path_Bx1xS <= token_Lx1)], -1)
