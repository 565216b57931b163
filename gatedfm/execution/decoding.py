"""Decoding: from the encoder's output to tokens, greedily, CTC and decoder together.

Letters: B batch, T frames of 10 ms, S frames of 40 ms, M mel bands, L tokens, P primer tokens,
K hypotheses, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gatedfm.execution import ctc_prefix
from gatedfm.gates import Gates
from gatedfm.models.speech import Encoded, SpeechModel
from gatedfm.models.speech_config import ConfigError


@dataclasses.dataclass(frozen=True)
class Search:
  """How a text is searched for; the names and meanings of lengths are ESPnet's.

  Attributes:
    beam: hypotheses kept after each token; 1 decodes greedily.
    length_penalty: of a beam, added to a hypothesis's score for each token, its end too
      (`penalty` in ESPnet): positive favours long texts.
    maxlenratio: most tokens per encoder frame of 40 ms; 0 is one; below 0, that many tokens
      whatever the frames.
    minlenratio: the same of the fewest. ESPnet drops hypotheses that end earlier; here they
      cannot end, so that none is lost.
    decoder: False leaves the attention decoder out of the program: CTC alone, by the best path
      (`beam` 1) or by searching the likeliest text.

  Raises:
    ConfigError: options that cannot be, or not together.
  """

  beam: int = 1
  length_penalty: float = 0.0
  maxlenratio: float = 0.0
  minlenratio: float = 0.0
  decoder: bool = True

  def __post_init__(self):
    if self.beam < 1:
      raise ConfigError(f'a beam of {self.beam} holds no hypothesis: 1 is greedy decoding')
    for name in ('length_penalty', 'maxlenratio', 'minlenratio'):
      if not math.isfinite(getattr(self, name)):
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be a number')
    for name in ('maxlenratio', 'minlenratio'):
      value = getattr(self, name)
      if value < 0 and value != int(value):
        raise ConfigError(f'{name} {value}: below 0 it is a number of tokens, such as -20')
    least, most = self.minlenratio, self.maxlenratio or 1.0
    if (least < 0) == (most < 0) and abs(least) > abs(most):
      raise ConfigError(f'minlenratio {least} asks for more tokens than maxlenratio {most} allows')
    if self.beam == 1 and self.length_penalty:
      raise ConfigError('greedy decoding weighs no lengths: length_penalty needs a beam above 1')
    if self.beam == 1 and not self.decoder and (self.maxlenratio or self.minlenratio):
      raise ConfigError(
        'the best CTC path has the length that it has: maxlenratio and minlenratio need a beam '
        'above 1'
      )

  def lengths(self, frames: int) -> tuple[int, int]:
    """Fewest and most tokens of an utterance of `frames` encoder frames; none of nothing."""
    tokens = lambda ratio: int(-ratio if ratio < 0 else ratio * frames)
    most = max(1, tokens(self.maxlenratio)) if self.maxlenratio else frames
    return (min(tokens(self.minlenratio), most), most) if frames else (0, 0)


GREEDY = Search()


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
    length: room for tokens, which the program is compiled for; so it is for what follows.
    search: how the text is searched for.
    timestamps: whether to say when each token is heard.
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
  search: Search = flax.struct.field(pytree_node=False, default=GREEDY)
  timestamps: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def key(self) -> tuple:
    """What tells requests apart that need programs of their own."""
    leaves, tree = jax.tree.flatten(self.gates)
    static = self.length, self.search, self.timestamps
    return (*self.features.shape[:2], *static, tree, tuple(map(np.shape, leaves)))

  def limits(self, mask_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fewest and most tokens of each utterance, `[B]` each, by its encoder frames."""
    table = np.array([self.search.lengths(n) for n in range(mask_BxS.shape[1] + 1)], np.int32)
    least_B, most_B = jnp.asarray(table)[jnp.sum(mask_BxS, 1)].T
    return least_B, jnp.minimum(most_B, self.steps)


@flax.struct.dataclass
class Decoded:
  """What decoding gives.

  Attributes:
    tokens: `[B, L]` tokens after the primer, `eos` from the end on.
    ctc: `[B, S]` best CTC class per frame, 0 (blank) in padding.
    language: `[B]` index of the most likely language, by the decoder's first logits; None
      without decoder.
    gates: all gates used.
    hypotheses: of a beam, `[B, K, L]`, the best first, which is `tokens`; else None.
    scores: theirs, `[B, K]`, -inf where fewer were found; else None.
    spans: where asked for, `[B, L, 2]` first frame of each token and the first after it.
  """

  tokens: jax.Array
  ctc: jax.Array
  language: jax.Array | None
  gates: Gates
  hypotheses: jax.Array | None = None
  scores: jax.Array | None = None
  spans: jax.Array | None = None


def writable(
  score: jax.Array, at: jax.Array, least_B: jax.Array, x: Request, vocabulary: Vocabulary
) -> jax.Array:
  """Scores `[B, ..., V]`, -inf of symbols and, with fewer tokens than `least`, of the end."""
  allowed_V = jnp.asarray(vocabulary.allowed)
  if not x.search.minlenratio:
    return jnp.where(allowed_V, score, -jnp.inf)
  is_end_V = np.arange(len(vocabulary.allowed)) == vocabulary.eos
  early = (at < least_B).reshape(-1, *(1,) * (score.ndim - 1))
  return jnp.where(allowed_V & ~(early & is_end_V), score, -jnp.inf)


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
    x: primer, length, steps, limits and CTC's weight (0 ignores CTC).
    vocabulary: what may be written.
  """
  call = functools.partial(model.apply, {'params': params})
  eos, length, ctc_weight = vocabulary.eos, x.length, x.ctc_weight
  b, p = x.primer.shape
  caches = call(encoded, p + length, method='start')
  # The primer's last token is the loop's first: one place to choose, which takes long to compile.
  logits_BxPxV, caches = call(x.primer[:, :-1], 0, caches, encoded, method='step')

  # Padding adds no frames, and so no tokens.
  least_B, limit_B = x.limits(ctc.mask)

  def best(score_BxV: jax.Array, at: jax.Array, done_B: jax.Array) -> jax.Array:
    score_BxV = writable(score_BxV, at, least_B, x, vocabulary)
    return jnp.where(done_B, eos, jnp.argmax(score_BxV, -1).astype(jnp.int32))

  def jointly(seen_BxV: jax.Array, prefix: ctc_prefix.Prefix, *state: jax.Array) -> tuple:
    heard_BxV = ctc_prefix.scores(ctc, prefix, eos)
    token_B = best((1 - ctc_weight) * seen_BxV + ctc_weight * heard_BxV, *state)
    gain_B = jnp.take_along_axis(heard_BxV, token_B[:, None], 1)[:, 0]
    return token_B, ctc_prefix.extend(ctc, prefix, token_B, gain_B)

  def choose(logits_BxV: jax.Array, prefix: ctc_prefix.Prefix, *state: jax.Array) -> tuple:
    alone = lambda seen_BxV, prefix, *state: (best(seen_BxV, *state), prefix)
    seen_BxV = jax.nn.log_softmax(logits_BxV)
    return lax.cond(ctc_weight > 0, jointly, alone, seen_BxV, prefix, *state)

  def write(carry: tuple) -> tuple:
    at, tokens_BxL, token_B, done_B, caches, prefix = carry
    logits_Bx1xV, caches = call(token_B[:, None], p - 1 + at, caches, encoded, method='step')
    token_B, prefix = choose(logits_Bx1xV[:, 0], prefix, at, done_B)
    done_B = (token_B == eos) | (at + 1 >= limit_B)
    return at + 1, tokens_BxL.at[:, at].set(token_B), token_B, done_B, caches, prefix

  def unfinished(carry: tuple) -> jax.Array:
    return (carry[0] < x.steps) & ~jnp.all(carry[3])

  tokens_BxL = jnp.full((b, length), eos, jnp.int32)
  start = jnp.zeros((), jnp.int32), tokens_BxL, x.primer[:, -1], limit_B < 1, caches
  return Decoded(
    lax.while_loop(unfinished, write, (*start, ctc_prefix.start(ctc)))[1],
    ctc_prefix.best_path(ctc),
    jnp.argmax(logits_BxPxV[:, 0, vocabulary.languages], -1),
    encoded.gates,
  )
