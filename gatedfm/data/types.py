"""What a source of speech is: records, in memory, and audio by index, on demand."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

SAMPLE_RATE = 16_000  # Hz, of all audio inside the project
MIN_SECONDS = 0.1  # shorter audio holds no speech
SPLITS = ('train', 'validation', 'test')
LANGUAGES = ('fra', 'spa', 'rus', 'ron', 'cat', 'bul', 'bel', 'ell', 'dan')


class DataError(ValueError):
  """Data that cannot be used or found; the message names the thing and the mend."""


@dataclasses.dataclass(frozen=True)
class Record:
  """One utterance without its audio.

  Attributes:
    id: unique within its source, the same on every machine.
    source: name of the source.
    language: spoken language, ISO 639-3.
    text: raw transcript, None where there is none.
    translations: raw text by ISO 639-3 language, without the spoken one.
    num_samples: length at 16 kHz.
    group: items that must stand in the same split share it.
    speaker: '' where unknown.
    tasks: what the item may be used for ('asr', 'lid', 'st_eng', ...); () means all that
      its fields allow.
  """

  id: str
  source: str
  language: str
  text: str | None
  translations: Mapping[str, str]
  num_samples: int
  group: str
  speaker: str = ''
  tasks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Parallel:
  """A text in several languages, without speech.

  Attributes:
    id: unique.
    texts: by ISO 639-3 language.
    group: texts that must stand in the same split share it.
    split: 'train', 'validation' or 'test'.
  """

  id: str
  texts: Mapping[str, str]
  group: str
  split: str


@runtime_checkable
class Source(Protocol):
  """One split of a data set.

  Attributes:
    name: name of the source.
    fingerprint: hash that changes with the content, the version and the split.
    records: the utterances, in an order that is the same on every machine.

  A source pickles in few bytes and opens its files once per process, so that worker
  processes may share it.
  """

  name: str
  fingerprint: str
  records: Sequence[Record]

  def __len__(self) -> int: ...

  def audio(self, i: int) -> np.ndarray:
    """Audio of record i: int16 [S] at 16 kHz, S = records[i].num_samples."""
    ...
