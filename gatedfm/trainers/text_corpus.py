"""What a text classifier is trained on: arrays of each split, and the table that it starts from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np

from gatedfm.data import batching, sources, texts, word_vectors
from gatedfm.data.texts import Vocabulary
from gatedfm.data.types import DataError
from gatedfm.factorization import svd
from gatedfm.models.speech_config import ConfigError
from gatedfm.trainers.text_config import TextDataConfig


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A split: rows of the vocabulary `[N, L]`, lengths `[N]`, numbers of the labels `[N]`."""

  ids: np.ndarray
  lengths: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)


@dataclasses.dataclass(frozen=True)
class TextCorpus:
  """Texts as arrays.

  Attributes:
    labels: names of the classes.
    vocabulary: of the training texts.
    table: `[V, D]` that embeddings start from; None where there are no vectors.
    splits: arrays by split.
    full_features: D before any compression.
  """

  labels: tuple[str, ...]
  vocabulary: Vocabulary
  table: np.ndarray | None
  splits: Mapping[str, Arrays]
  full_features: int

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of labels, of the words that have rows, of these rows and of all splits."""
    digest = hashlib.sha256('\n'.join([*self.labels, '', *self.vocabulary.words]).encode())
    if self.table is not None:
      digest.update(np.ascontiguousarray(self.table).tobytes())
    for split, arrays in sorted(self.splits.items()):
      digest.update(split.encode())
      for array in (arrays.ids, arrays.lengths, arrays.labels):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def load(cfg: TextDataConfig, pad: bool, data_dir: str = '') -> TextCorpus:
  """Reads texts and vectors.

  Args:
    cfg: of which.
    pad: whether every text is padded to `cfg.longest`, as the released code does.
    data_dir: '' is the user's cache.

  Raises:
    DataError: texts or vectors that cannot be had or used.
  """
  folder = sources.data_folder(data_dir)
  found = texts.load(cfg.texts, folder)
  train = list(found.splits['train'])
  if cfg.limit:
    train.sort(key=lambda item: hashlib.sha256(' '.join(item[0]).encode()).digest())
    train = train[: cfg.limit]
  vectors = word_vectors.read(cfg.vectors, folder) if cfg.vectors else None
  vocabulary = texts.vocabulary(
    [words for words, _ in train],
    None if vectors is None else set(vectors.words),
    cfg.without_vector,
    cfg.unknown,
    cfg.min_count,
    cfg.most,
  )
  splits = {}
  for split, items in found.splits.items():
    items = train if split == 'train' else items
    least = cfg.longest if pad else 1
    ids, lengths = vocabulary.encode([words for words, _ in items], cfg.longest, least)
    splits[split] = Arrays(ids, lengths, np.array([label for _, label in items], np.int32))
  if missing := set(range(len(found.labels))) - set(splits['train'].labels.tolist()):
    names = ', '.join(found.labels[i] for i in sorted(missing))
    raise DataError(f'data.limit of {cfg.limit} leaves no text with the label {names}: raise it')
  table = None if vectors is None else _table(vectors, vocabulary)
  full = 0 if table is None else table.shape[1]
  return compressed(TextCorpus(found.labels, vocabulary, table, splits, full), cfg)


def compressed(corpus: TextCorpus, cfg: TextDataConfig) -> TextCorpus:
  """The corpus with its table as `cfg.offline` wants it; raises ConfigError as `offline` does."""
  if not cfg.offline:
    return corpus
  table = offline(corpus.table, cfg.offline_compression, cfg.offline)
  return dataclasses.replace(corpus, table=table)


def _table(vectors: word_vectors.WordVectors, vocabulary: Vocabulary) -> np.ndarray:
  """Vectors of the vocabulary; zeros for padding, the mean for unknown words, random ones for
  words without."""
  table, there = vectors.rows(vocabulary.words)
  if not there.any():
    raise DataError('none of the words of the training texts has a vector: give others')
  if not np.isfinite(table).all():
    word = vocabulary.words[int(np.flatnonzero(~np.isfinite(table).all(1))[0])]
    raise DataError(f'the vector of {word!r} has numbers that are not finite')
  special = 1 + vocabulary.unknown
  table[:special], there[:special] = 0, True
  if vocabulary.unknown:
    table[texts.UNKNOWN] = table[special:][there[special:]].mean(0)
  spread = float(table[special:][there[special:]].std())
  rng = np.random.default_rng(0)
  table[~there] = spread * rng.normal(size=(int((~there).sum()), table.shape[1]))
  return table


def offline(table: np.ndarray, compression: float, kind: str) -> np.ndarray:
  """The published baseline: `[V, k]`, k the share of the D features that stays.

  Args:
    table: `[V, D]`.
    compression: share of the features to remove, `k = int((1 - c) D)`.
    kind: `u`, columns of length 1, as released; `us`, with their singular values.

  Raises:
    ConfigError: nothing would be left.
  """
  rank = math.floor((1 - compression) * table.shape[1] + 1e-9)
  if rank < 1:
    raise ConfigError(f'data.offline_compression {compression} leaves no feature: compress less')
  found = svd.factorize(table, rank)
  return found.first if kind == 'u' else found.first * found.singular[:rank].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Batch:
  """Which texts a step takes: `[Z, B]` for each of Z seeds, all no longer than `length`.

  `weights` are 0 for what fills the last batch of a bucket.
  """

  length: int
  index: np.ndarray
  weights: np.ndarray


class Batches:
  """Batches of an epoch, for all seeds of the same lengths, each seed's texts in its own order.

  Args:
    arrays: of the training texts.
    batch: B.
    buckets: of lengths, at most.
    seeds: of the orders.
    padded: whether all texts are as long as the longest, see `load`.
  """

  def __init__(
    self,
    arrays: Arrays,
    batch: int,
    buckets: int,
    seeds: tuple[int, ...],
    padded: bool = False,
  ):
    self._batch, self._seeds = batch, seeds
    ends = batching.bucket_ends(np.maximum(arrays.lengths, 1), buckets)
    place = np.searchsorted(ends, np.maximum(arrays.lengths, 1))
    self._buckets = [
      (min(end, arrays.ids.shape[1]), np.flatnonzero(place == i)) for i, end in enumerate(ends)
    ]
    if padded:
      self._buckets = [(arrays.ids.shape[1], np.arange(len(arrays)))]

  def __len__(self) -> int:
    """Steps of an epoch."""
    return sum(-(-len(rows) // self._batch) for _, rows in self._buckets)

  def epoch(self, number: int) -> Iterator[Batch]:
    """The batches of an epoch; a function of its number and the seeds alone."""
    out = []
    for at, (length, rows) in enumerate(self._buckets):
      steps = -(-len(rows) // self._batch)
      fill = steps * self._batch - len(rows)
      order = [np.random.default_rng((s, number, at)).permutation(rows) for s in self._seeds]
      index = np.stack([np.concatenate([o, np.resize(o, fill)]) for o in order])
      weights = np.ones(index.shape, np.float32)
      weights[:, len(rows) :] = 0
      for i in range(0, index.shape[1], self._batch):
        part = slice(i, i + self._batch)
        out.append(Batch(length, index[:, part], weights[:, part]))
    for i in np.random.default_rng(number).permutation(len(out)):
      yield out[i]
