"""Induction scores of a language model's heads: prefix matching and copying.

Source: Bansal et al., "Rethinking the Role of Scale for In-Context Learning", 2023, appendix A.4,
and its released code; the idea is of Olsson et al., "In-context Learning and Induction Heads",
2022. Paper and code differ, and both leave gaps: `Induction` names the choices. Letters: N layers,
H heads, T tokens (BOS and padding included), Z sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gatedfm.models.lm_config import LmConfig
from gatedfm.models.speech_config import ConfigError, choice

MODES = ('algorithm2', 'released')
MEASURES = ('prefix_matching', 'copying')
# What a layer is fed: what it is fed in the model, or the embeddings whatever its number.
INPUTS = {'algorithm2': 'hidden', 'released': 'embeddings'}


@dataclasses.dataclass(frozen=True)
class Induction:
  """How to score.

  Attributes:
    mode: `algorithm2` copies what a head's attention mixes, as the paper's Algorithm 2. `released`
      is after the released code: copying judges the value of each token itself, and prefix
      matching also counts the attention that the last token of each copy pays to the first token.
    inputs: of each layer: `hidden`, what it reads in the model, or `embeddings` (as the released
      code; "directly feed the sequence through each head" may be read either way), with which no
      head can build on another. Empty: `hidden` of `algorithm2`, `embeddings` of `released`.
    sequences: Z, of each measure.
    shortest, step: sequence s has `shortest + step * s` tokens of its own.
    copies: how often it is repeated, for prefix matching; of copying, where nothing is, it is as
      long as all copies.
    dropped: share of the ordered tokens that is left out at each end.
    output_bias: whether what a head writes includes the bias of the output projection.
    multiple: of tokens, to which texts are padded: a compilation each.
    seed: of the tokens.
  """

  mode: str = 'algorithm2'
  inputs: str = ''
  sequences: int = 100
  shortest: int = 25
  step: int = 2
  copies: int = 4
  dropped: float = 0.04
  output_bias: bool = True
  multiple: int = 128
  seed: int = 0

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for what cannot be done."""
    choice('mode', self.mode, MODES)
    if self.inputs:
      choice('inputs', self.inputs, tuple(INPUTS.values()))
    least = {'sequences': 1, 'shortest': 2, 'step': 0, 'copies': 2, 'multiple': 1, 'seed': 0}
    for name, bound in least.items():
      if getattr(self, name) < bound:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least {bound}')
    if not 0 <= self.dropped < 0.5:
      raise ConfigError(f'dropped is {self.dropped}; it must be at least 0 and below 0.5')

  @property
  def fed(self) -> str:
    """`inputs`, resolved."""
    return self.inputs or INPUTS[self.mode]

  def lengths(self) -> list[int]:
    """Tokens of each sequence before it is repeated."""
    return [self.shortest + self.step * s for s in range(self.sequences)]


def choose_tokens(cfg: LmConfig, how: Induction, order: Sequence[int] | None = None) -> np.ndarray:
  """The tokens that sequences are drawn from.

  Args:
    cfg: of the model, whose BOS, EOS and padding are left out.
    how: see `Induction`.
    order: tokens ranked (`LmTokenizer.merge_order`); None ranks them by number.

  Raises:
    ConfigError: too few tokens for the longest sequence, or too few positions.
  """
  how.validate()
  longest, special = how.copies * max(how.lengths()), {cfg.bos, cfg.eos, cfg.pad}
  ranked = range(cfg.vocab_size) if order is None else order
  ranked = np.array([t for t in ranked if t < cfg.vocab_size and t not in special], np.int32)
  ends = int(how.dropped * len(ranked))
  out = ranked[ends : len(ranked) - ends]
  if len(out) < longest:
    raise ConfigError(f'{len(out)} tokens to draw {longest} from: score fewer or shorter sequences')
  if (text := longest + len(cfg.start)) > cfg.max_tokens:
    raise ConfigError(
      f'{text} tokens; the model has positions for {cfg.max_tokens}: score fewer or shorter '
      'sequences'
    )
  return out


def prefix_matching(
  weights_HxTxT: jax.Array, length: jax.Array | int, copies: int, start: int, first: bool = False
) -> jax.Array:
  """Attention to what followed a token where it stood before, `[H]`.

  `1 / ((copies - 1) L) sum_j sum_k attention[j, k + 1]` over the tokens j from the second copy on
  and the k before them that are the same token.

  Args:
    weights_HxTxT: attention, rows over columns; rows beyond the text are ignored.
    length: L, tokens of a copy.
    copies: of them.
    start: tokens in front of the first copy: 1 where there is a BOS.
    first: counts, as the released code, also the first token for the last of each copy, as though
      BOS were one of its occurrences.
  """
  token_T = jnp.arange(weights_HxTxT.shape[-1]) - start
  row, column = token_T[:, None], token_T[None]
  follows = ((row + 1 - column) % length == 0) & (column <= row + 1 - length)
  counted = follows & (row >= length) & (row < copies * length) & (column >= (0 if first else 1))
  return jnp.sum(weights_HxTxT * counted, (1, 2)) / ((copies - 1) * length)


def copying(
  weights_HxTxT: jax.Array, logits_HxTxT: jax.Array, length: jax.Array | int, start: int
) -> jax.Array:
  """How much of what a head raises above the mean is the token that it attends to most, `[H]`.

  For each token j: the probabilities of tokens 0 to j, less their mean, cut at 0; that of the
  token which has most of the attention, over their sum (0 where nothing is raised). The score is
  the mean over the tokens behind `start`.

  Args:
    weights_HxTxT: attention, rows over columns; rows beyond the text are ignored.
    logits_HxTxT: that the head gives at j to the token at each column; only differences within a
      row matter, since a softmax's denominator falls out of the ratio.
    length: tokens behind `start`, all different.
    start: 1 where there is a BOS, which counts among the tokens before.
  """
  at_T = jnp.arange(weights_HxTxT.shape[-1])
  seen = at_T <= at_T[:, None]
  logits = jnp.where(seen, logits_HxTxT, -jnp.inf)
  # exp(x) - 1 is exactly 0 where all are alike: rounding raises none above the others.
  over = jnp.where(seen, jnp.expm1(logits - logits.max(-1, keepdims=True)), 0)
  mean = over.sum(-1, keepdims=True) / (at_T + 1)[:, None]
  raised = jnp.where(seen, jax.nn.relu(over - mean), 0)
  best = jnp.argmax(jnp.where(seen, weights_HxTxT, -1), -1)[..., None]
  share_HxT = jnp.take_along_axis(raised, best, -1)[..., 0] / _or_one(raised.sum(-1))
  return jnp.sum(share_HxT * ((at_T >= start) & (at_T < start + length)), -1) / length


def _or_one(x: jax.Array) -> jax.Array:
  return jnp.where(x > 0, x, 1)


def retained(
  scores_NxH: np.ndarray, importance_NxH: np.ndarray, fractions: Sequence[float]
) -> np.ndarray:
  """Share of the scores' sum that is left when the least important heads are closed.

  Args:
    scores_NxH: not negative, of either measure.
    importance_NxH: by which heads are ranked, once and over all layers.
    fractions: of heads to close; `int(fraction * heads)` are, as pruning counts them.

  Returns: of each fraction.

  Raises:
    ValueError: scores and importance of different heads, or scores that are all 0.
  """
  scores, importance = np.asarray(scores_NxH, np.float64), np.asarray(importance_NxH)
  if scores.shape != importance.shape:
    raise ValueError(f'scores of {scores.shape} heads, importance of {importance.shape}')
  ordered = scores.ravel()[np.argsort(importance, axis=None, kind='stable')]
  left = np.append(np.cumsum(ordered[::-1])[::-1], 0)
  if not left[0]:
    raise ValueError('the scores are all 0: there is nothing to retain')
  return left[[int(f * ordered.size) for f in fractions]] / left[0]
