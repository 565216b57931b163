"""Words of a text and when they are said."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence

import numpy as np

from gatedfm.data.tokenizer import Tokenizer

FRAME = 0.04  # seconds of an encoder frame
_START = '\N{LOWER ONE EIGHTH BLOCK}'  # how SentencePiece marks that a word begins
# Scripts that put no spaces between words, as Unicode names their characters.
_UNSPACED = ('CJK', 'HIRAGANA', 'KATAKANA', 'THAI', 'LAO', 'KHMER', 'MYANMAR', 'TIBETAN')


@dataclasses.dataclass(frozen=True)
class Word:
  """A word (where words are not spaced, a token), its tokens, and its start and end in seconds.

  The times are those of CTC's frames, which are 40 ms long and see some 15 ms more on each side.
  """

  text: str
  start: float
  end: float
  tokens: tuple[int, ...]

  def shifted(self, seconds: float) -> Word:
    """The same word, said later."""
    return dataclasses.replace(self, start=self.start + seconds, end=self.end + seconds)


def of(tokenizer: Tokenizer, ids: Sequence[int], spans_LxP: np.ndarray) -> list[Word]:
  """The words of a text.

  Args:
    tokenizer: that of the ids.
    ids: tokens without `eos`.
    spans_LxP: `[L, 2]`, `Decoded.spans` of the text.
  """
  firsts = [i for i, token in enumerate(ids) if not i or _begins(tokenizer.tokens[token])]
  out = []
  for first, end in zip(firsts, [*firsts[1:], len(ids)]):
    tokens = tuple(ids[first:end])
    if text := tokenizer.decode(tokens):
      start, stop = float(spans_LxP[first, 0]) * FRAME, float(spans_LxP[end - 1, 1]) * FRAME
      out.append(Word(text, start, stop, tokens))
  return out


def _begins(token: str) -> bool:
  """Whether a word begins with this token."""
  return token[:1] == _START or unicodedata.name(token[:1], '').startswith(_UNSPACED)
