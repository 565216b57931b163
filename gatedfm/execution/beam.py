"""Beam search over texts, CTC and decoder together, or CTC alone.

A text's score is `(1 - w) log p_decoder + w log p_ctc + length_penalty * tokens`, where CTC scores
an unfinished text by the probability that the utterance's begins with it. Source: Watanabe et
al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition" (2017), section III-B,
as in ESPnet's `BatchBeamSearch` with `CTCPrefixScorer`: of all continuations of all hypotheses
the best K are kept, those of them that end are put aside, and a text that reaches the longest
length ends there, unscored.

Letters: B batch, K hypotheses, S frames of 40 ms, L tokens, P primer tokens, V vocabulary,
H heads, W head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax import lax

from gatedfm.execution import ctc_prefix
from gatedfm.execution.decoding import Decoded, Request, Vocabulary, writable
from gatedfm.models.decoder import LayerCache
from gatedfm.models.speech import Encoded, SpeechModel, decoder_gates

# Log-probabilities `[B, K, V]` of the next token and the caches, after `(last_BxK, at, caches)`.
Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
# The caches after `at` tokens, of hypotheses that continue others: `(caches, parent_BxK, at)`.
Follow = Callable[[Any, jax.Array, jax.Array], Any]

_BLOCK = 32  # positions of a cache that follow their hypotheses at a time


@flax.struct.dataclass
class Texts:
  """Hypotheses: tokens `[B, K, L]`, `eos` from the end on, and scores `[B, K]`, -inf of none."""

  tokens: jax.Array
  score: jax.Array


@flax.struct.dataclass
class State:
  """Where the search stands.

  Attributes:
    at: tokens written.
    running: texts without an end; last: their last tokens, `[B, K]`.
    prefix: CTC's view of them, `[B, K, ...]`.
    caches: the decoder's.
    ended: the best texts that ended, best first.
    done: `[B]` utterances whose best text is known.
  """

  at: jax.Array
  running: Texts
  last: jax.Array
  prefix: ctc_prefix.Prefix
  caches: Any
  ended: Texts
  done: jax.Array


def jointly(
  model: SpeechModel,
  params: Any,
  encoded: Encoded,
  ctc: ctc_prefix.Frames,
  x: Request,
  vocabulary: Vocabulary,
) -> Decoded:
  """Joint CTC/attention beam search; arguments as of `decoding.greedy`.

  An utterance's hypotheses share its gates and its cross-attention keys and values, of which
  there is one copy; self-attention caches follow their hypotheses.
  """
  call = functools.partial(model.apply, {'params': params})
  k, p = x.search.beam, x.primer.shape[1]
  block = min(_BLOCK, p + x.length)
  caches = call(encoded, -(-(p + x.length) // block) * block, method='start')
  logits_BxPxV, caches = call(x.primer[:, :-1], 0, caches, encoded, method='step')
  cross = [cache.cross for cache in caches]

  # Hypotheses come first in the caches, so that attention is a batch of products as they lie.
  @functools.partial(jax.vmap, in_axes=(1, None, 0), out_axes=(1, 0))
  def step(last_B: jax.Array, at: jax.Array, own: list) -> tuple:
    caches = [LayerCache(*both) for both in zip(own, cross)]
    logits_Bx1xV, caches = call(last_B[:, None], p - 1 + at, caches, encoded, method='step')
    return jax.nn.log_softmax(logits_Bx1xV[:, 0]), [cache.own for cache in caches]

  gates = decoder_gates(encoded).get('self_attention', [True] * len(caches))

  def follow(own: list, parent_BxK: jax.Array, at: jax.Array) -> list:
    """Moves what is written of the layers that wrote."""

    def move(i: jax.Array, cache: Any) -> Any:
      part = lambda c: lax.dynamic_slice_in_dim(c, i * block, block, 3)
      write = lambda c, new: lax.dynamic_update_slice_in_dim(c, new, i * block, 3)
      moved = _rows(jax.tree.map(part, cache), parent_BxK.T, 0)
      return jax.tree.map(write, cache, moved)

    blocks = (p - 1 + at) // block + 1
    bounds = [jnp.where(jnp.any(jnp.asarray(g) > 0), blocks, 0) for g in gates]
    return [lax.fori_loop(0, n, move, cache) for n, cache in zip(bounds, own)]

  own = jax.tree.map(lambda c: jnp.repeat(c[None], k, 0), [cache.own for cache in caches])
  ended = search(step, follow, own, x.ctc_weight, ctc, x, vocabulary)
  return Decoded(
    ended.tokens[:, 0],
    ctc_prefix.best_path(ctc),
    jnp.argmax(logits_BxPxV[:, 0, vocabulary.languages], -1),
    encoded.gates,
    ended.tokens,
    ended.score,
  )


def search(
  step: Step | None,
  follow: Follow,
  caches: Any,
  ctc_weight: jax.Array,
  ctc: ctc_prefix.Frames,
  x: Request,
  vocabulary: Vocabulary,
) -> Texts:
  """The best texts that ended, best first.

  Ends when no running text can beat an utterance's best ended one: without a positive length
  penalty scores only fall, with one they rise by it for each token still to come at most. The
  best text is thus what a search to the longest length gives; of the others there may be better.

  Args:
    step, follow: the decoder and its caches' way; no `step` scores by CTC alone.
    caches: what it starts with.
    ctc_weight: of CTC beside the decoder, traced.
    ctc, x, vocabulary: see `decoding.greedy`.
  """
  eos, penalty = vocabulary.eos, x.search.length_penalty
  b, k = len(ctc.mask), x.search.beam
  least_B, limit_B = x.limits(ctc.mask)
  # Hypotheses share their utterance's frames.
  heard_by = jax.vmap(functools.partial(ctc_prefix.scores, eos=eos), (None, 1), 1)
  extended = jax.vmap(ctc_prefix.extend, (None, 1, 1, 1), 1)
  uses_ctc = ctc_weight > 0

  def gains(state: State) -> tuple[jax.Array, jax.Array, Any]:
    """Of every continuation its score and CTC's share of it, `[B, K, V]`; the new caches."""
    if step is None:
      heard_BxKxV = heard_by(ctc, state.prefix)
      return heard_BxKxV, heard_BxKxV, state.caches
    seen_BxKxV, caches = step(state.last, state.at, state.caches)
    heard_BxKxV = lax.cond(
      uses_ctc, heard_by, lambda ctc, prefix: jnp.zeros_like(seen_BxKxV), ctc, state.prefix
    )
    return (1 - ctc_weight) * seen_BxKxV + ctc_weight * heard_BxKxV, heard_BxKxV, caches

  def write(state: State) -> State:
    gain_BxKxV, heard_BxKxV, caches = gains(state)
    score_BxKx1 = state.running.score[..., None]
    score_BxKxV = writable(gain_BxKxV, state.at, least_B, x, vocabulary) + score_BxKx1 + penalty
    score_BxKxV = jnp.where(score_BxKx1 > -jnp.inf, score_BxKxV, -jnp.inf)
    v = score_BxKxV.shape[-1]
    score_BxK, chosen_BxK = lax.top_k(score_BxKxV.reshape(b, k * v), k)
    parent_BxK, last_BxK = chosen_BxK // v, chosen_BxK % v

    heard_BxK = jnp.take_along_axis(heard_BxKxV.reshape(b, k * v), chosen_BxK, 1)
    prefix = _rows(state.prefix, parent_BxK)
    if step is None:
      prefix = extended(ctc, prefix, last_BxK, heard_BxK)
    else:
      same = lambda ctc, prefix, last_BxK, heard_BxK: prefix
      prefix = lax.cond(uses_ctc, extended, same, ctc, prefix, last_BxK, heard_BxK)
    caches = follow(caches, parent_BxK, state.at)
    tokens_BxKxL = _rows(state.running.tokens, parent_BxK).at[:, :, state.at].set(last_BxK)

    at = state.at + 1
    ends_BxK = (last_BxK == eos) | (at >= limit_B)[:, None]
    kept = lambda which_BxK: jnp.where(which_BxK & ~state.done[:, None], score_BxK, -jnp.inf)
    ended = _better(state.ended, Texts(tokens_BxKxL, kept(ends_BxK)))
    running = Texts(tokens_BxKxL, kept(~ends_BxK))
    to_come_B = max(penalty, 0.0) * (limit_B - at)
    done_B = state.done | (ended.score[:, 0] >= jnp.max(running.score, 1) + to_come_B)
    return State(at, running, last_BxK, prefix, caches, ended, done_B)

  nothing = Texts(jnp.full((b, k, x.length), eos, jnp.int32), jnp.full((b, k), -jnp.inf))
  start = State(
    jnp.zeros((), jnp.int32),
    nothing.replace(score=nothing.score.at[:, 0].set(0)),  # alike at first, they count as one
    jnp.repeat(x.primer[:, -1:], k, 1),
    jax.tree.map(lambda a: jnp.repeat(a[:, None], k, 1), ctc_prefix.start(ctc)),
    caches,
    nothing,
    limit_B < 1,
  )
  return lax.while_loop(lambda state: ~jnp.all(state.done), write, start).ended


def _rows(tree: Any, index: jax.Array, axis: int = 1) -> Any:
  """Of arrays `[B, K, ...]` the hypotheses `index` `[B, K]`; or of `[K, B, ...]`, by `[K, B]`."""
  pick = lambda a: jnp.take_along_axis(a, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), axis)
  return jax.tree.map(pick, tree)


def _better(a: Texts, b: Texts) -> Texts:
  """The best K of both, best first."""
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), a, b)
  score_BxK, index_BxK = lax.top_k(both.score, a.score.shape[1])
  return Texts(_rows(both.tokens, index_BxK), score_BxK)
