"""Decoding: from the encoder's output to tokens, greedily, CTC and decoder together.

Letters: B batch, T frames of 10 ms, S frames of 40 ms, M mel bands, L tokens, P primer tokens,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gatedfm.execution import ctc_prefix
from gatedfm.gates import Gates
from gatedfm.models.speech import Encoded, SpeechModel


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What decoding needs of a tokenizer: `eos`, tokens `[V]` bool that may be written, and the
  tokens of the languages."""

  eos: int
  allowed: np.ndarray
  languages: np.ndarray


@flax.struct.dataclass
class Request:
  """A batch of one task, on its way through the model.

  Attributes:
    features: `[B, T, M]` raw log-mel, padded; frames: `[B]` valid ones.
    language, task: `[B]` context ids.
    primer: `[B, P]` first tokens of the decoder.
    steps: tokens written at most, traced: naming a language writes none.
    ctc_weight: of CTC in joint decoding, traced.
    gates: None, or the caller's in place of the predictor's.
    length: room for tokens, which the program is compiled for.
  """

  features: jax.Array
  frames: jax.Array
  language: jax.Array
  task: jax.Array
  primer: jax.Array
  steps: jax.Array
  ctc_weight: jax.Array
  gates: Gates | None
  length: int = flax.struct.field(pytree_node=False)

  @property
  def key(self) -> tuple:
    """What tells requests apart that need programs of their own."""
    leaves, tree = jax.tree.flatten(self.gates)
    return (*self.features.shape[:2], self.length, tree, tuple(map(np.shape, leaves)))


@flax.struct.dataclass
class Decoded:
  """What decoding gives.

  Attributes:
    tokens: `[B, L]` tokens after the primer, `eos` from the end on.
    ctc: `[B, S]` best CTC class per frame, 0 (blank) in padding.
    language: `[B]` index of the most likely language, by the decoder's first logits.
    gates: all gates used.
  """

  tokens: jax.Array
  ctc: jax.Array
  language: jax.Array
  gates: Gates


def greedy(
  model: SpeechModel,
  params: Any,
  encoded: Encoded,
  ctc: ctc_prefix.Frames,
  x: Request,
  vocabulary: Vocabulary,
) -> Decoded:
  """Greedy joint CTC/attention decoding with caches until every utterance has ended.

  Args:
    model: unrolled, `params` its parameters.
    encoded: what `model.encode` gave.
    ctc: what CTC says of the same utterances.
    x: primer, length, steps and CTC's weight (0 ignores CTC).
    vocabulary: what may be written.
  """
  call = functools.partial(model.apply, {'params': params})
  eos, length, ctc_weight = vocabulary.eos, x.length, x.ctc_weight
  b, p = x.primer.shape
  caches = call(encoded, p + length, method='start')
  # The primer's last token is the loop's first: one place to choose, which takes long to compile.
  logits_BxPxV, caches = call(x.primer[:, :-1], 0, caches, encoded, method='step')

  # One token per frame is the most that CTC could write; padding adds none.
  limit_B = jnp.sum(ctc.mask, 1)

  def best(score_BxV: jax.Array, done_B: jax.Array) -> jax.Array:
    best_B = jnp.argmax(jnp.where(vocabulary.allowed, score_BxV, -jnp.inf), -1).astype(jnp.int32)
    return jnp.where(done_B, eos, best_B)

  def jointly(seen_BxV: jax.Array, prefix: ctc_prefix.Prefix, done_B: jax.Array) -> tuple:
    heard_BxV = ctc_prefix.scores(ctc, prefix, eos)
    token_B = best((1 - ctc_weight) * seen_BxV + ctc_weight * heard_BxV, done_B)
    gain_B = jnp.take_along_axis(heard_BxV, token_B[:, None], 1)[:, 0]
    return token_B, ctc_prefix.extend(ctc, prefix, token_B, gain_B)

  def choose(logits_BxV: jax.Array, prefix: ctc_prefix.Prefix, done_B: jax.Array) -> tuple:
    alone = lambda seen_BxV, prefix, done_B: (best(seen_BxV, done_B), prefix)
    seen_BxV = jax.nn.log_softmax(logits_BxV)
    return lax.cond(ctc_weight > 0, jointly, alone, seen_BxV, prefix, done_B)

  def write(carry: tuple) -> tuple:
    at, tokens_BxL, token_B, done_B, caches, prefix = carry
    logits_Bx1xV, caches = call(token_B[:, None], p - 1 + at, caches, encoded, method='step')
    token_B, prefix = choose(logits_Bx1xV[:, 0], prefix, done_B)
    done_B = (token_B == eos) | (at + 1 >= limit_B)
    return at + 1, tokens_BxL.at[:, at].set(token_B), token_B, done_B, caches, prefix

  def unfinished(carry: tuple) -> jax.Array:
    return (carry[0] < x.steps) & ~jnp.all(carry[3])

  tokens_BxL = jnp.full((b, length), eos, jnp.int32)
  start = jnp.zeros((), jnp.int32), tokens_BxL, x.primer[:, -1], limit_B < 1, caches
  return Decoded(
    lax.while_loop(unfinished, write, (*start, ctc_prefix.start(ctc)))[1],
    jnp.where(ctc.mask, jnp.argmax(ctc.log_probs, -1), ctc_prefix.BLANK),
    jnp.argmax(logits_BxPxV[:, 0, vocabulary.languages], -1),
    encoded.gates,
  )
