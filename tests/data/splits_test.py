"""Groups and splits."""

import collections
import re

import hypothesis
import hypothesis.strategies as st
import pytest

from gatedfm.data import splits
from gatedfm.data.types import SPLITS, DataError


def test_splits_are_fixed():
  # Written down: a change of the hash would silently mix training and test data.
  names = [splits.split_of(f'group {i}') for i in range(12)]
  assert ' '.join(name[:2] for name in names) == 'tr tr tr tr te tr tr va tr va te te'


def test_fractions_and_independence_of_salts():
  count = collections.Counter(splits.split_of(f'{i}', 'a') for i in range(20_000))
  for split, fraction in zip(SPLITS, splits.FRACTIONS):
    assert count[split] / 20_000 == pytest.approx(fraction, abs=0.01)
  tests = [i for i in range(20_000) if splits.split_of(f'{i}', 'a') == 'test']
  again = sum(splits.split_of(f'{i}', 'b') == 'test' for i in tests)
  assert again / len(tests) == pytest.approx(0.1, abs=0.03)


@hypothesis.given(st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=40))
def test_items_are_connected_just_when_a_path_of_shared_keys_joins_them(keys):
  found = splits.connected(keys)
  expected = list(range(len(keys)))  # by relaxation, the slow way
  changed = True
  while changed:
    changed = False
    for i, a in enumerate(keys):
      for j, b in enumerate(keys):
        if set(a) & set(b) and expected[i] > expected[j]:
          expected[i], changed = expected[j], True
  assert found == expected


@pytest.mark.parametrize(
  ('a', 'b'), [('A frog.', 'a frog'), ('«Un  Chat!»', 'un chat'), ('ﬁn_e', 'fin e')]
)
def test_text_keys_ignore_case_punctuation_and_compatibility_forms(a, b):
  assert splits.text_key(a) == splits.text_key(b)


def test_text_keys_keep_letters_apart():
  assert splits.text_key('ou') != splits.text_key('où')


def test_unknown_split_lists_the_known():
  with pytest.raises(DataError, match=re.escape("'dev': one of train, validation, test")):
    splits.check_split('dev')
