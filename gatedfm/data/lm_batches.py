"""Texts with targets as batches of few shapes: what scoring and evaluation of language models read.

Letters: B batch, L tokens, P targets of an example.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from gatedfm.data.types import DataError

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144)


@dataclasses.dataclass(frozen=True)
class Pair:
  """Tokens that are given and tokens that are to follow them."""

  context: tuple[int, ...]
  target: tuple[int, ...]

  def __post_init__(self):
    if not self.context or not self.target:
      raise DataError('context and target need a token each: put the beginning of text in front')

  def __len__(self) -> int:
    return len(self.context) + len(self.target)


@dataclasses.dataclass(frozen=True)
class LmBatch:
  """Examples of one shape, padded on the right; rows beyond the last example have no weight.

  Attributes:
    tokens: `[B, L]`; mask: `[B, L]`, where there are tokens.
    at: `[B, P]` positions of the targets; weight: `[B, P]` 1 for a target, 0 for padding.
    number: `[B]` of the example in the order given, -1 for none.
  """

  tokens: np.ndarray
  mask: np.ndarray
  at: np.ndarray
  weight: np.ndarray
  number: np.ndarray


def batches(
  pairs: Sequence[Pair], room: int, most: int, pad: int = 0, rows: int | None = None
) -> Iterator[LmBatch]:
  """All pairs once, the longest first; how many there are in a batch follows from its length.

  Args:
    pairs: in any order.
    room: tokens of a batch, B times L, or one example where that is longer.
    most: tokens that the model has positions for; longer contexts lose their beginning.
    pad: token that fills rows.
    rows: B at most; None leaves it to `room`.

  Raises:
    DataError: a target that alone is longer than that.
  """
  cut = [_cut(pair, most) for pair in pairs]
  by_targets = collections.defaultdict(list)
  for number, pair in enumerate(cut):
    by_targets[1 << (len(pair.target) - 1).bit_length()].append(number)
  for targets, numbers in sorted(by_targets.items(), reverse=True):
    numbers.sort(key=lambda number: -len(cut[number]))
    while numbers:
      length = padded_length(len(cut[numbers[0]]), most)
      number = max(1, min(room // length, rows or room))
      yield _batch(cut, numbers[:number], number, length, targets, pad)
      del numbers[:number]


def _cut(pair: Pair, most: int) -> Pair:
  if len(pair.target) >= most:
    raise DataError(f'a target of {len(pair.target)} tokens; the model has positions for {most}')
  spare = len(pair) - most
  return pair if spare <= 0 else Pair(pair.context[spare:], pair.target)


def padded_length(tokens: int, most: int) -> int:
  """The shape, one of few, that so many tokens are padded to; `most` at most."""
  return next((min(n, most) for n in LENGTHS if n >= tokens), most)


def _batch(pairs, numbers, rows, length, targets, pad) -> LmBatch:
  out = LmBatch(
    np.full((rows, length), pad, np.int32),
    np.zeros((rows, length), bool),
    np.ones((rows, targets), np.int32),
    np.zeros((rows, targets), np.float32),
    np.full(rows, -1, np.int32),
  )
  for row, number in enumerate(numbers):
    context, target = pairs[number].context, pairs[number].target
    n, size = len(target), len(context) + len(target)
    out.tokens[row, :size] = *context, *target
    out.mask[row, :size] = True
    out.at[row, :n] = len(context) + np.arange(n)
    out.weight[row, :n] = 1
    out.number[row] = number
  # A row of padding sees its own first token, so that its numbers are finite.
  out.mask[len(numbers) :, 0] = True
  return out


def windows(tokens: Sequence[int], length: int, start: tuple[int, ...]) -> list[Pair]:
  """A long text cut into windows of `length`, each behind `start`, a token or none."""
  if length < 2:
    raise DataError(f'windows of {length} tokens hold no target')
  if not tokens:
    raise DataError('the text is empty')
  step = length - 1
  # Without a token for the beginning the first of a window is given.
  if start:
    return [Pair(start, tuple(tokens[i : i + step])) for i in range(0, len(tokens), step)]
  cut = [tuple(tokens[i : i + length]) for i in range(0, len(tokens), step)]
  return [Pair(w[:1], w[1:]) for w in cut if len(w) > 1]
