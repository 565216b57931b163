"""Labelled texts for classifiers, in fixed splits that share no text; words, vocabulary, arrays.

Sources: sets of StaICC (`staicc.py`), or one's own JSONL or CSV with `text` and `label`.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm.data import rows, sources, splits, staicc
from gatedfm.data.types import SPLITS, DataError

SETS = tuple(staicc.LABELS)
FRACTIONS = (0.7, 0.1, 0.2)  # train, validation, test
PAD = 0  # the row of a vocabulary that stands for no word
UNKNOWN = 1  # the row of all words without one, where there is such a row
_PAD_NAME, _UNKNOWN_NAME = '_PAD', '_UNKNOWN'
# As the Penn Treebank, and with it GloVe, takes texts apart: "do n't", "it 's", "-lrb- a -rrb-".
_WORD = re.compile(
  r"n't\b|'(?:s|re|ve|ll|d|m)\b|-[lr][rcs]b-|\.\.\.+|``|''|(?:[^\W\d_]\.){2,}"
  r"|\w+?(?=n't\b)|\w+(?:[-.]\w+)*|[^\w\s]"
)


@dataclasses.dataclass(frozen=True)
class Texts:
  """A set of labelled texts.

  Attributes:
    name: of the set.
    labels: names of the classes.
    splits: (words, number of the label) of each text.
    dropped: texts that stood there before (in other letters), or had no words.
  """

  name: str
  labels: tuple[str, ...]
  splits: Mapping[str, Sequence[tuple[tuple[str, ...], int]]]
  dropped: int


def words(text: str) -> tuple[str, ...]:
  """Lower-cased words and marks."""
  return tuple(_WORD.findall(text.lower()))


def load(name: str, data_dir: Path | None = None) -> Texts:
  """A set of StaICC by name, or a file ending in .jsonl or .csv.

  A text's split is a function of the text alone, the same in all sets; lines of one's own may say
  theirs (`split`).

  Raises:
    DataError: no such set or file, one that is damaged, or a split or class without examples.
  """
  if name.endswith(rows.SUFFIXES):
    path = Path(name).expanduser()
    examples = rows.read(path, _example, 'text and label')
    labels = tuple(sorted({label for _, label, _ in examples}))
    return _texts(
      path.stem, labels, [(text, labels.index(label), s) for text, label, s in examples]
    )
  if name not in SETS:
    raise DataError(f'no set {name!r}: give a .jsonl or .csv file, or one of {", ".join(SETS)}')
  read = staicc.rows(name, (data_dir or sources.data_folder()) / 'few_shot')
  return _texts(name, staicc.LABELS[name], [(text, label, '') for text, label in read])


def given(path: Path) -> list[tuple[str, str]]:
  """Texts of a .txt (one a line), .jsonl or .csv file, with their labels, '' where there is none.

  Raises:
    DataError: no such file, one that is damaged, or of another kind.
  """
  if path.suffix in rows.SUFFIXES:
    found = rows.read(path, lambda row: _example({'label': None} | row, ''), 'text')
    return [(text, label) for text, label, _ in found]
  if path.suffix != '.txt':
    raise DataError(f'{path}: give a .txt, .jsonl or .csv file')
  lines = [line for line in rows.text_of(path).splitlines() if line.strip()]
  if not lines:
    raise DataError(f'{path} holds no text')
  return [(line, '') for line in lines]


def _example(row: dict[str, Any], unlabelled: str | None = None) -> tuple[str, str, str]:
  """Text, label and split; without a label `unlabelled`, if that is given."""
  text, label, split = row['text'], row['label'], row.get('split') or ''
  if label in (None, '') and unlabelled is not None:
    label = unlabelled
  if not isinstance(text, str) or not isinstance(label, str | int):
    raise ValueError('text is a text, label a name or a number')
  if not text.strip() or (not str(label).strip() and unlabelled is None):
    raise ValueError('an empty text or label')
  if split and split not in SPLITS:
    raise ValueError(f'split {split!r} is none of {", ".join(SPLITS)}')
  return text, str(label).strip(), split


def _texts(name: str, labels: tuple[str, ...], examples: Iterable[tuple[str, int, str]]) -> Texts:
  out: dict[str, list[tuple[tuple[str, ...], int]]] = {split: [] for split in SPLITS}
  seen: dict[str, str] = {}
  dropped = 0
  for text, label, split in examples:
    key, found = splits.text_key(text), words(text)
    split = split or splits.split_of(key, fractions=FRACTIONS)
    if not found or key in seen:
      if seen.get(key, split) != split:
        raise DataError(f'{name}: {text[:60]!r} is in {seen[key]} and in {split}: take one out')
      dropped += 1
      continue
    seen[key] = split
    out[split].append((found, label))
  if len(labels) < 2:
    raise DataError(f'{name} has one label, {labels[0]!r}: there is nothing to tell apart')
  for split, items in out.items():
    if not items:
      raise DataError(f"{name} has no texts for {split}: give more, or say each line's split")
  if missing := set(range(len(labels))) - {label for _, label in out['train']}:
    names = ', '.join(labels[i] for i in sorted(missing))
    raise DataError(f'{name}: no text for training has the label {names}')
  return Texts(name, labels, out, dropped)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Words by row of a table; the first stands for no word.

  Attributes:
    words: all rows, `_PAD` first and, where unknown words have a row, `_UNKNOWN` second.
    counts: `[V]`, how often each stands in the training texts.
  """

  words: tuple[str, ...]
  counts: np.ndarray

  @property
  def unknown(self) -> bool:
    """Whether words without a row are read as one; else they are left out."""
    return len(self.words) > UNKNOWN and self.words[UNKNOWN] == _UNKNOWN_NAME

  def encode(
    self, texts: Sequence[Sequence[str]], longest: int, minimum: int = 0
  ) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[N, L]` int32, padded with `PAD`, and lengths `[N]`.

    Args:
      texts: words of each.
      longest: words of a text that are read; L is no more than the longest text needs.
      minimum: of L.
    """
    index = {word: i for i, word in enumerate(self.words)}
    default = UNKNOWN if self.unknown else PAD
    found = [[i for w in text if (i := index.get(w, default)) != PAD] for text in texts]
    found = [ids[:longest] for ids in found]
    lengths = np.array([len(ids) for ids in found], np.int32)
    out = np.full((len(texts), max([minimum, *lengths])), PAD, np.int32)
    for row, ids in zip(out, found):
      row[: len(ids)] = ids
    return out, lengths


def vocabulary(
  texts: Iterable[Sequence[str]],
  known: Collection[str] | None = None,
  without_vector: str = 'drop',
  unknown: str = 'drop',
  min_count: int = 1,
  most: int = 0,
) -> Vocabulary:
  """The words of training texts, by falling frequency.

  The published work drops both words without a vector and words that training did not show.

  Args:
    texts: words of each.
    known: words that have a vector; None means all.
    without_vector: `drop` or `keep` words that have none.
    unknown: `drop` words without a row from texts, or give them one `row`.
    min_count: words that are rarer have no row.
    most: at most so many rows for words; 0 means all.

  Raises:
    DataError: another rule, or no word left.
  """
  for name, value, allowed in (
    ('without_vector', without_vector, ('drop', 'keep')),
    ('unknown', unknown, ('drop', 'row')),
  ):
    if value not in allowed:
      raise DataError(f'{name} is {value!r}; choose from {", ".join(allowed)}')
  counter = collections.Counter(word for text in texts for word in text)
  kept = [
    (word, n)
    for word, n in sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    if n >= min_count and (known is None or without_vector == 'keep' or word in known)
  ]
  kept = kept[: most or None]
  if not kept:
    raise DataError('no word of the training texts is left for the vocabulary')
  rest = counter.total() - sum(n for _, n in kept)
  special = [(_PAD_NAME, 0), *([(_UNKNOWN_NAME, rest)] if unknown == 'row' else [])]
  names, counts = zip(*special, *kept)
  return Vocabulary(names, np.array(counts, np.int64))
