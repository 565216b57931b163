"""Splits that do not leak: items that share a text stand together.

In parallel data the same sentence recurs in every language, and translations of two
different sentences may coincide in one of them, so a group is a connected component over
shared texts.
"""

import hashlib
import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence

from gatedfm.data.types import SPLITS, DataError

FRACTIONS = (0.8, 0.1, 0.1)  # train, validation, test


def text_key(text: str) -> str:
  """Text as compared between items: NFKC, case-folded, no punctuation, single spaces."""
  text = unicodedata.normalize('NFKC', text).casefold()
  return ' '.join(re.sub(r'[^\w\s]|_', ' ', text).split())


def connected(keys: Sequence[Iterable[Hashable]]) -> list[int]:
  """Connected components of items linked by shared keys.

  Args:
    keys: for each item the keys that it holds; items with a key in common are linked.

  Returns:
    For each item the smallest index in its component.
  """
  parent = list(range(len(keys)))

  def find(i: int) -> int:
    while parent[i] != i:
      parent[i] = parent[parent[i]]
      i = parent[i]
    return i

  holder: dict[Hashable, int] = {}
  for i, item in enumerate(keys):
    for key in item:
      a, b = find(i), find(holder.setdefault(key, i))
      parent[max(a, b)] = min(a, b)
  return [find(i) for i in range(len(keys))]


def split_of(group: str, salt: str = '', fractions: Sequence[float] = FRACTIONS) -> str:
  """'train', 'validation' or 'test' by those fractions, a pure function of group and salt."""
  digest = hashlib.sha256(f'{salt}\0{group}'.encode()).digest()
  position = int.from_bytes(digest[:8], 'big') / 2**64
  for split, fraction in zip(SPLITS[:-1], fractions[:-1]):
    if position < fraction:
      return split
    position -= fraction
  return SPLITS[-1]


def check_split(split: str, allowed: Sequence[str] = SPLITS) -> None:
  """Raises DataError unless `split` is one of `allowed`."""
  if split not in allowed:
    raise DataError(f'unknown split {split!r}: one of {", ".join(allowed)}')
