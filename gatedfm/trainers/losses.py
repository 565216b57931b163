"""Hybrid CTC/attention loss and the sparsity penalty.

Letters: B batch, S encoder frames, L tokens, U CTC labels, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

BLANK = 0
IGNORED = -1
# optax.ctc_loss stands in log(0) by -1e5, so an impossible alignment costs about 1e5. An untrained
# model of 50,000 tokens costs 11 nats a frame of 40 ms: 1e4 for as little as 37 s of speech.
IMPOSSIBLE = 5e4


def ctc_loss(
  logits_BxSxV: jax.Array,
  lengths_B: jax.Array,
  labels_BxU: jax.Array,
  label_lengths_B: jax.Array,
) -> jax.Array:
  """Connectionist temporal classification, `[B]`, in nats per utterance.

  Utterances without labels (no transcript) or without a possible alignment count 0, as
  ESPnet's `<na>` exclusion and torch's `zero_infinity` do.

  Args:
    logits_BxSxV: unnormalised, class 0 is blank.
    lengths_B: valid frames.
    labels_BxU: 0-padded labels.
    label_lengths_B: valid labels; 0 leaves the utterance out.
  """
  s, u = logits_BxSxV.shape[1], labels_BxU.shape[1]
  padding_BxS = (jnp.arange(s) >= lengths_B[:, None]).astype(jnp.float32)
  padding_BxU = (jnp.arange(u) >= label_lengths_B[:, None]).astype(jnp.float32)
  loss_B = optax.ctc_loss(logits_BxSxV, padding_BxS, labels_BxU, padding_BxU, blank_id=BLANK)
  return jnp.where((label_lengths_B > 0) & (loss_B < IMPOSSIBLE), loss_B, 0.0)


def attention_loss(logits_BxLxV: jax.Array, targets_BxL: jax.Array, smoothing: float) -> jax.Array:
  """Label-smoothed KL divergence summed over an utterance's tokens, `[B]`.

  The smoothed target puts `1 - smoothing` on the token and spreads the rest over the other
  V - 1. Source: `espnet/nets/pytorch_backend/transformer/label_smoothing_loss.py`.

  Args:
    logits_BxLxV: unnormalised.
    targets_BxL: token ids, -1 ignored.
    smoothing: mass taken from the token.
  """
  v = logits_BxLxV.shape[-1]
  log_p = jax.nn.log_softmax(logits_BxLxV)
  token_BxL = jnp.take_along_axis(log_p, jnp.maximum(targets_BxL, 0)[..., None], -1)[..., 0]
  low = smoothing / (v - 1)
  cross_BxL = -(1 - smoothing - low) * token_BxL - low * jnp.sum(log_p, -1)
  xlogx = lambda p: p * jnp.log(p) if p else 0.0
  entropy = -xlogx(1 - smoothing) - (v - 1) * xlogx(low)
  return jnp.sum(jnp.where(targets_BxL != IGNORED, cross_BxL - entropy, 0.0), -1)


def token_accuracy(logits_BxLxV: jax.Array, targets_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Right and counted teacher-forced tokens, two scalars."""
  counted = targets_BxL != IGNORED
  right = (jnp.argmax(logits_BxLxV, -1) == targets_BxL) & counted
  return jnp.sum(right), jnp.sum(counted)


def sparsity_penalty(sparsity: jax.Array, target: jax.Array, kind: str) -> jax.Array:
  """Distance of the sparsity from its target.

  `abs_squared` is |d| + d^2 (the square because "simply minimizing the absolute difference
  wasn't enough"; the published formula was not available, so the sum is a reading of it);
  `abs` and `squared` are its parts; `hinge` is `abs_squared` that lets more sparsity pass.

  Raises:
    ValueError: an unknown kind.
  """
  d = target - sparsity
  kinds = {
    'abs_squared': lambda: jnp.abs(d) + jnp.square(d),
    'abs': lambda: jnp.abs(d),
    'squared': lambda: jnp.square(d),
    'hinge': lambda: jnp.maximum(d, 0) + jnp.square(jnp.maximum(d, 0)),
  }
  if kind not in kinds:
    raise ValueError(f'penalty {kind!r} is not one of {", ".join(kinds)}')
  return kinds[kind]()
