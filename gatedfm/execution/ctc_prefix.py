"""CTC scores of what a decoder has written so far, for joint CTC/attention decoding.

Attention decoders loop, skip and invent; CTC, which must account for every frame, does not.
Joint decoding adds what CTC thinks of each continuation to the decoder's log-probability.
Source: Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition"
(2017), section III-B; the quantities are those of ESPnet's `CTCPrefixScore`.

Letters: B batch, S frames of 40 ms, V vocabulary.
"""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
from jax import lax

BLANK = 0
# Log-probability of the impossible: finite, so that differences of two are numbers.
IMPOSSIBLE = -1e9


@flax.struct.dataclass
class Frames:
  """CTC's view of an utterance: (log-)probabilities `[B, S, V]` and valid frames `[B, S]`."""

  log_probs: jax.Array
  probs: jax.Array
  mask: jax.Array


@flax.struct.dataclass
class Prefix:
  """A text so far, g, for each utterance.

  Attributes:
    token: `[B, S + 1]`; at s, log-probability that the first s frames spell g and end in its
      last token.
    blank: `[B, S + 1]`; the same, ending in a blank (or, of the empty text, at the start).
    last: `[B]` the last token, -1 where the text is empty.
    score: `[B]` log-probability that the utterance's text begins with g.
  """

  token: jax.Array
  blank: jax.Array
  last: jax.Array
  score: jax.Array


def frames(ctc_logits_BxSxV: jax.Array, mask_BxS: jax.Array) -> Frames:
  """`Frames` of CTC logits; padding (`mask` False) is cut off."""
  log_probs = jax.nn.log_softmax(ctc_logits_BxSxV.astype(jnp.float32))
  return Frames(log_probs, jnp.exp(log_probs), mask_BxS)


def best_path(x: Frames) -> jax.Array:
  """The likeliest class of each frame, `[B, S]`, blank in padding."""
  return jnp.where(x.mask, jnp.argmax(x.log_probs, -1), BLANK)


def start(x: Frames) -> Prefix:
  """The empty text."""
  blanks_BxS = jnp.where(x.mask, x.log_probs[..., BLANK], 0)
  blank = jnp.cumsum(jnp.pad(blanks_BxS, ((0, 0), (1, 0))), 1)
  b = blank.shape[0]
  return Prefix(jnp.full_like(blank, IMPOSSIBLE), blank, jnp.full(b, -1), jnp.zeros(b))


def scores(x: Frames, prefix: Prefix, eos: int) -> jax.Array:
  """Log-probability of each next token given the text so far, `[B, V]`; the end at `eos`.

  Not above zero; of a token that no alignment allows, a large negative number.
  """
  after_token, after_blank = prefix.token[:, :-1], prefix.blank[:, :-1]
  either = jnp.where(x.mask, jnp.logaddexp(after_token, after_blank), IMPOSSIBLE)
  blank = jnp.where(x.mask, after_blank, IMPOSSIBLE)
  # A product of probabilities, scaled by the likeliest frame so that it cannot vanish.
  largest = jnp.max(either, 1, keepdims=True)
  starts_BxV = jnp.einsum('bs,bsv->bv', jnp.exp(either - largest), x.probs)
  # A token follows itself only across a blank.
  again_BxS = jnp.take_along_axis(x.probs, jnp.maximum(prefix.last, 0)[:, None, None], 2)[..., 0]
  repeated_B = jnp.sum(jnp.exp(blank - largest) * again_BxS, 1)
  is_last_BxV = jnp.arange(starts_BxV.shape[-1]) == prefix.last[:, None]
  starts_BxV = jnp.where(is_last_BxV, repeated_B[:, None], starts_BxV)
  tiny = jnp.finfo(jnp.float32).tiny
  scores_BxV = largest + jnp.log(jnp.maximum(starts_BxV, tiny))
  ends_B = jnp.logaddexp(prefix.token[:, -1], prefix.blank[:, -1])
  return scores_BxV.at[:, eos].set(ends_B).at[:, BLANK].set(IMPOSSIBLE) - prefix.score[:, None]


def extend(x: Frames, prefix: Prefix, token_B: jax.Array, score_B: jax.Array) -> Prefix:
  """The text with one more token, whose entry of `scores` is `score_B`.

  ESPnet's recurrence over frames, n[s+1] = (n[s] + phi[s]) p[s], is linear, so it has the
  closed form n[s+1] = P[s+1] sum_{r <= s} phi[r] / P[r] with P the running product of p: one
  cumulative sum in place of a loop over frames.
  """
  own_BxS = jnp.take_along_axis(x.log_probs, token_B[:, None, None], 2)[..., 0]
  repeated_Bx1 = (token_B == prefix.last)[:, None]
  before_token = jnp.where(repeated_Bx1, IMPOSSIBLE, prefix.token)
  phi_BxS = jnp.logaddexp(before_token, prefix.blank)[:, :-1]
  token = _run(own_BxS, phi_BxS, x.mask)
  # Beyond the end nothing is spelled any more: the total stays as it is, as a blank's.
  token = jnp.where(jnp.pad(x.mask, ((0, 0), (1, 0)), constant_values=True), token, IMPOSSIBLE)
  blank = _run(x.log_probs[..., BLANK], token[:, :-1], x.mask)
  return Prefix(token, blank, token_B, prefix.score + score_B)


def _run(log_p_BxS: jax.Array, enter_BxS: jax.Array, mask_BxS: jax.Array) -> jax.Array:
  """`[B, S + 1]`: log-probability of having entered at some frame and emitted p ever since."""
  log_p = jnp.where(mask_BxS, log_p_BxS, 0)
  total = jnp.cumsum(log_p, 1)
  out = total + lax.cumlogsumexp(enter_BxS - (total - log_p), axis=1)
  return jnp.pad(out, ((0, 0), (1, 0)), constant_values=IMPOSSIBLE)
