"""Tokens gathered to words, with times."""

import types

import numpy as np
import pytest

from gatedfm.execution import words

TOKENS = ('<blank>', '▁a', 'b', '▁', 'c', '你', '好', '<fra>', '▁ไ')


def decode(ids):
  pieces = [TOKENS[i] for i in ids if TOKENS[i][0] != '<']
  return ''.join(pieces).replace('▁', ' ').removeprefix(' ')


TOKENIZER = types.SimpleNamespace(tokens=TOKENS, decode=decode)


@pytest.mark.parametrize(
  ('ids', 'expected'),
  [
    ([], []),
    ([1, 2, 1, 4], [('ab', 0, 1), ('ac', 2, 3)]),
    ([2, 3, 4, 2], [('b', 0, 0), ('cb', 1, 3)]),
    ([1, 5, 6, 2], [('a', 0, 0), ('你', 1, 1), ('好b', 2, 3)]),
    ([3, 1], [('a', 1, 1)]),  # a word of nothing is none
    ([7, 1], [('a', 1, 1)]),
  ],
)
def test_words(ids, expected):
  spans = np.array([[10 * i, 10 * i + 5] for i in range(len(ids))]).reshape(-1, 2)
  found = words.of(TOKENIZER, ids, spans)
  assert [(w.text, w.start, w.end) for w in found] == [
    (text, pytest.approx(0.4 * first), pytest.approx(0.4 * last + 0.2))
    for text, first, last in expected
  ]
  for word in found:
    assert decode(word.tokens) == word.text


def test_words_can_be_said_later():
  word = words.Word('a', 0.5, 0.75, (1,))
  assert word.shifted(2) == words.Word('a', 2.5, 2.75, (1,))
