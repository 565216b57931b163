"""The Grain input pipeline: static shapes, sharded by host, resumable at any batch."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from gatedfm.data.batching import EpochPlan, Shape, batch_shapes, in_order
from gatedfm.data.data_config import DataConfig
from gatedfm.data.examples import Examples, build_examples
from gatedfm.data.features import N_MELS, FeatureCache

__all__ = [
  'DataConfig',
  'Examples',
  'Shape',
  'TrainIterator',
  'batch_arrays',
  'batch_shapes',
  'build_examples',
  'eval_batches',
  'train_iterator',
]

Batch = dict[str, np.ndarray]


def _collate(
  examples: Examples,
  caches: Sequence[FeatureCache],
  shape: Shape,
  rows_B: np.ndarray,
  valid_B: np.ndarray,
) -> Batch:
  """Loads and pads the examples `rows_B` to `shape`; see `train_iterator`."""
  size = len(rows_B)
  batch = {
    'features': np.zeros((size, shape.frames, N_MELS), np.float32),
    'frames': examples.frames[rows_B],
    'decoder_input': np.zeros((size, shape.tokens), np.int32),
    'decoder_target': np.full((size, shape.tokens), -1, np.int32),
    'ctc_labels': np.zeros((size, shape.labels), np.int32),
    'ctc_length': np.zeros(size, np.int32),
    'language': examples.language[rows_B],
    'task': examples.task[rows_B],
    'weight': examples.loss_weights[examples.task[rows_B]],
    'index': rows_B.astype(np.int64),
    'valid': valid_B,
  }
  for b, e in enumerate(rows_B):
    feature_TxM = caches[examples.source[e]].get(examples.utterance[e])
    batch['features'][b, : len(feature_TxM)] = feature_TxM
    target = examples.row(examples.target[e])
    batch['decoder_target'][b, : len(target)] = target
    batch['decoder_input'][b, 0] = examples.sos
    batch['decoder_input'][b, 1 : len(target)] = target[:-1]
    labels = examples.row(examples.transcript[e])
    batch['ctc_labels'][b, : len(labels)] = labels
    batch['ctc_length'][b] = len(labels)
  return batch


def batch_arrays(shape: Shape) -> dict[str, tuple[tuple[int, ...], type]]:
  """Shape and type, over all hosts, of every array of a batch that goes to the devices."""
  b = shape.batch
  return {
    'features': ((b, shape.frames, N_MELS), np.float32),
    'decoder_input': ((b, shape.tokens), np.int32),
    'decoder_target': ((b, shape.tokens), np.int32),
    'ctc_labels': ((b, shape.labels), np.int32),
    'valid': ((b,), np.bool_),
    'weight': ((b,), np.float32),
  } | dict.fromkeys(('frames', 'ctc_length', 'language', 'task'), ((b,), np.int32))


def _check_caches(examples: Examples, caches: Sequence[FeatureCache]) -> None:
  for s, cache in enumerate(caches):
    mine = examples.source == s
    utterances = examples.utterance[mine]
    if (
      utterances.max(initial=-1) >= len(cache)
      or (cache.lengths[utterances] != examples.frames[mine]).any()
    ):
      raise ValueError(
        f'feature cache {cache.path} is of another source than the examples of source '
        f'{s}: give one cache per source, in the order of the sources'
      )
  if examples.source.max() >= len(caches):
    raise ValueError(
      f'the examples come from {examples.source.max() + 1} sources, but there are '
      f'{len(caches)} feature caches'
    )


def _host_slice(size: int, process_index: int, process_count: int) -> slice:
  if not 0 <= process_index < process_count:
    raise ValueError(f'process {process_index} is none of {process_count}')
  if size % process_count:
    raise ValueError(
      f'{process_count} hosts cannot share a batch of {size}: pass batch_shapes a '
      f'batch_multiple that {process_count} divides'
    )
  share = size // process_count
  return slice(process_index * share, (process_index + 1) * share)


@dataclasses.dataclass
class _TrainBatches:
  """Random access to the batches of all epochs: a Grain data source."""

  examples: Examples
  caches: Sequence[FeatureCache]
  shapes: Sequence[Shape]
  plan: EpochPlan
  process_index: int
  process_count: int

  def __len__(self) -> int:
    return sys.maxsize  # as grain.MapDataset.repeat

  def __getitem__(self, step: int) -> Batch:
    bucket, rows = self.plan[step]
    rows_B = rows[_host_slice(len(rows), self.process_index, self.process_count)]
    valid_B = np.ones(len(rows_B), bool)
    return _collate(self.examples, self.caches, self.shapes[bucket], rows_B, valid_B)


@dataclasses.dataclass
class _EvalBatches:
  """Random access to the batches of an evaluation: a Grain data source."""

  examples: Examples
  caches: Sequence[FeatureCache]
  shapes: Sequence[Shape]
  batches: list[tuple[int, np.ndarray]]
  process_index: int
  process_count: int

  def __len__(self) -> int:
    return len(self.batches)

  def __getitem__(self, k: int) -> Batch:
    bucket, rows = self.batches[k]
    size = self.shapes[bucket].batch
    # Padding repeats a true example: an empty one could make NaN in a model.
    padded = np.append(rows, np.repeat(rows[-1:], size - len(rows)))
    mine = _host_slice(size, self.process_index, self.process_count)
    valid_B = (np.arange(size) < len(rows))[mine]
    return _collate(self.examples, self.caches, self.shapes[bucket], padded[mine], valid_B)


def _read(batches: Any, first: int, workers: int) -> grain.IterDataset:
  """Batches from `first` on, read ahead by one thread or by worker processes."""
  ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  dataset = grain.MapDataset.source(batches)[first:].to_iter_dataset(ahead)
  if workers:
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    dataset = dataset.mp_prefetch(options)
  return dataset


class TrainIterator(grain.DatasetIterator):
  """Endless training batches; a Grain iterator, so Orbax saves and restores it.

  Its state is the number of batches taken, whatever the worker processes and hosts: the
  batches are a pure function of that number, so a run resumes bit for bit, and with
  another number of workers or hosts too.

  Attributes:
    shapes: all shapes that batches can have, over all hosts.
    batches_per_epoch: a constant.
  """

  def __init__(self, batches: _TrainBatches, workers: int):
    super().__init__()
    self.shapes = batches.shapes
    self.batches_per_epoch = batches.plan.batches_per_epoch
    self._open: Callable[[int], Iterator[Batch]] = lambda first: iter(
      _read(batches, first, workers)
    )
    self._next = 0
    self._batches = None

  def __next__(self) -> Batch:
    self._assert_not_closed()
    self.start_prefetch()
    batch = next(self._batches)
    self._next += 1
    return batch

  @property
  def epoch(self) -> float:
    """Epochs that the batches taken so far amount to."""
    return self._next / self.batches_per_epoch

  def get_state(self) -> dict[str, int]:
    """{'next_batch': batches taken so far}."""
    return {'next_batch': self._next}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to the place where `get_state` gave `state`."""
    self._stop()
    self._next = int(state['next_batch'])

  def start_prefetch(self) -> None:
    """Starts the thread or the worker processes."""
    if self._batches is None:
      self._batches = self._open(self._next)
      self._batches.start_prefetch()

  def close(self) -> None:
    """Ends the thread or the worker processes."""
    super().close()
    self._stop()

  def _stop(self) -> None:
    if self._batches is not None:
      self._batches.close()
      self._batches = None


def train_iterator(
  examples: Examples,
  caches: Sequence[FeatureCache],
  config: DataConfig,
  shapes: Sequence[Shape],
  process_index: int = 0,
  process_count: int = 1,
) -> TrainIterator:
  """Endless batches for training, reshuffled every epoch (see `EpochPlan`).

  A batch has static shapes, those of its bucket: features f32 [B, T, 80] (raw log-mel,
  zero-padded), frames i32 [B], decoder_input i32 [B, L] (<sos> first, zero-padded),
  decoder_target i32 [B, L] (-1 = ignored), ctc_labels i32 [B, U] (zero-padded),
  ctc_length i32 [B] (0 = not for CTC), language i32 [B] and task i32 [B] (context ids),
  weight f32 [B] (of the example's loss), index i64 [B] (number of the example), valid bool [B]
  (all true here).

  Args:
    examples: from `build_examples`.
    caches: the features of each source, in the order of the sources.
    config: sound; `tasks`, `task_weights`, `source_weights`, `seed`, `workers` are read.
    shapes: from `batch_shapes`.
    process_index: this host, of
    process_count: hosts; each reads its contiguous share of the rows of every batch.

  Raises:
    ValueError: caches of other sources, hosts that do not divide the batches, or weights that
      leave no example.
  """
  weights = config.task_weights or (1.0,) * len(config.tasks)
  _check_caches(examples, caches)
  for shape in shapes:
    _host_slice(shape.batch, process_index, process_count)
  by_id = {examples.tasks.index(task): w for task, w in zip(config.tasks, weights)}
  plan = EpochPlan(examples, shapes, by_id, config.seed, config.source_weights)
  batches = _TrainBatches(examples, caches, shapes, plan, process_index, process_count)
  return TrainIterator(batches, config.workers)


def eval_batches(
  examples: Examples,
  caches: Sequence[FeatureCache],
  shapes: Sequence[Shape],
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Batches for evaluation: every example once, by length, in the same static shapes.

  Rows that fill up a batch have `valid` False and repeat an example of it. Arguments,
  content and errors are otherwise as for `train_iterator`.
  """
  _check_caches(examples, caches)
  for shape in shapes:
    _host_slice(shape.batch, process_index, process_count)
  batches = in_order(examples, shapes)
  source = _EvalBatches(examples, caches, shapes, batches, process_index, process_count)
  return iter(_read(source, 0, workers=0))
