"""Which examples stand together: buckets of static shape, and the plan of an epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from gatedfm.data.data_config import DataConfig
from gatedfm.data.examples import Examples

_MULTIPLE = 8  # of frames, tokens and labels in a shape
CHUNK = 512  # texts to be labelled at a time
_USUAL = 95  # percentile of the texts of a bucket that its shape has room for


@dataclasses.dataclass(frozen=True)
class Shape:
  """Static shape of the batches of one bucket, over all hosts.

  Attributes:
    batch: B, examples.
    frames: T, the longest utterance that fits.
    tokens: L, of the decoder.
    labels: U, of CTC.
  """

  batch: int
  frames: int
  tokens: int
  labels: int


def _round_up(value: int) -> int:
  return -(-int(value) // _MULTIPLE) * _MULTIPLE


def _usual(sizes: np.ndarray) -> int:
  return np.percentile(sizes, _USUAL, method='higher')


def bucket_ends(frames: np.ndarray, num_buckets: int) -> list[int]:
  """The at most `num_buckets` boundaries that pad `frames` the least: exact, by dynamic
  programming over the distinct lengths rounded up to a multiple of 8."""
  rounded = -(-frames.astype(np.int64) // _MULTIPLE) * _MULTIPLE
  ends, counts = np.unique(rounded, return_counts=True)
  below = np.concatenate([[0], np.cumsum(counts)])
  # cost[j]: least padded size of the j shortest lengths, in the buckets so far.
  cost, splits = np.where(np.arange(len(ends) + 1), np.inf, 0.0), []
  for _ in range(min(num_buckets, len(ends))):
    last_bucket = ends[None, :] * (below[None, 1:] - below[:-1, None])  # [start, end]
    total = np.where(last_bucket > 0, cost[:-1, None] + last_bucket, np.inf)
    splits.append(total.argmin(0))
    cost = np.concatenate([[np.inf], total.min(0)])
  boundaries, end = [], len(ends)
  for split in reversed(splits):
    boundaries.append(int(ends[end - 1]))
    end = split[end - 1]
  return boundaries[::-1]


def batch_shapes(
  sets: Sequence[Examples], config: DataConfig, batch_multiple: int = 1
) -> tuple[Shape, ...]:
  """Shapes that hold every example of `sets`, shortest first; at most one per bucket.

  Tokens and labels have room for the usual texts of a bucket's lengths, not for the longest,
  which would pad all others threefold: an unusually long text moves up to a later bucket. An
  example fits every later bucket too, since tokens and labels never shrink; the last holds all.

  Args:
    sets: all examples that will use the shapes, training and evaluation.
    config: sound; `batch_frames`, `batch_size`, `bucket_frames`, `num_buckets` are read.
    batch_multiple: divides every batch, e.g. the devices that share it.

  Raises:
    ValueError: buckets that end before the longest utterance, or a batch size that
      `batch_multiple` does not divide or `batch_frames` cannot hold.
  """
  frames = np.concatenate([examples.frames for examples in sets])
  tokens = np.concatenate([examples.target_lengths for examples in sets])
  labels = np.concatenate([examples.transcript_lengths for examples in sets])
  boundaries = list(config.bucket_frames) or bucket_ends(frames, config.num_buckets)
  if boundaries[-1] < frames.max():
    raise ValueError(
      f'bucket_frames {config.bucket_frames} must reach the longest utterance of '
      f'{frames.max()} frames; or set max_frames to leave that one out'
    )
  bucket = np.searchsorted(boundaries, frames)
  shapes: list[Shape] = []
  for b in np.unique(bucket):
    mine, high, last = bucket == b, boundaries[b], b == bucket.max()
    batch = config.batch_size or config.batch_frames // high
    batch -= batch % batch_multiple
    if not batch or (config.batch_size and batch != config.batch_size):
      raise ValueError(
        f'a batch of {batch_multiple} (the multiple that the devices ask for) does not '
        f'fit batch_size {config.batch_size} or batch_frames {config.batch_frames} at '
        f'{high} frames: raise it to a multiple, or shorten max_frames'
      )
    before = shapes[-1] if shapes else Shape(0, 0, _MULTIPLE, _MULTIPLE)
    room = [_round_up(x.max() if last else _usual(x[mine])) for x in (tokens, labels)]
    shapes.append(Shape(batch, high, max(before.tokens, room[0]), max(before.labels, room[1])))
  return tuple(shapes)


def assign(examples: Examples, shapes: Sequence[Shape]) -> np.ndarray:
  """The first shape that holds each example: i64 [E].

  Raises:
    ValueError: an example fits none.
  """
  longest = shapes[-1]
  sizes = (examples.frames, examples.target_lengths, examples.transcript_lengths)
  limits = [(shape.frames, shape.tokens, shape.labels) for shape in shapes]
  bucket = np.zeros(len(examples), np.int64)
  for size, limit in zip(sizes, zip(*limits)):
    bucket = np.maximum(bucket, np.searchsorted(limit, size))
  if (bucket == len(shapes)).any():
    raise ValueError(
      f'example {int(bucket.argmax())} does not fit the largest shape {longest}: give '
      'batch_shapes every set that will use the shapes'
    )
  return bucket


class EpochPlan:
  """The batches of every epoch, as a pure function of (seed, epoch).

  Each epoch takes every example of weight 1 (that of its task times that of its source) once,
  of weight 2 twice, of weight 0.5 every second one at random. Batches hold one bucket each, in
  random order. What does not fill a batch of its bucket moves up to the next; what does not
  fill the last batch of the largest bucket is completed with examples drawn at random, so that
  batches are always full and every epoch has the same number of them.

  Attributes:
    batches_per_epoch: a constant.
  """

  def __init__(
    self,
    examples: Examples,
    shapes: Sequence[Shape],
    task_weights: dict[int, float],
    seed: int,
    source_weights: Sequence[float] = (),
  ):
    """Plans over `examples`; `task_weights` by task id, `source_weights` by number, () = 1.

    Raises:
      ValueError: weights that leave less than one example.
    """
    self._shapes = tuple(shapes)
    self._seed = seed
    kinds = [(examples.task == task, weight) for task, weight in task_weights.items()]
    if source_weights:
      kinds = [
        (kind & (examples.source == s), weight * of_source)
        for kind, weight in kinds
        for s, of_source in enumerate(source_weights)
      ]
    # Strata of one bucket and kind: (examples, whole copies, how many once more).
    self._strata = [[] for _ in shapes]
    bucket = assign(examples, shapes)
    for kind, weight in kinds:
      copies, fraction = divmod(weight, 1)
      members = [np.flatnonzero((bucket == b) & kind) for b in range(len(shapes))]
      # Rounding the running sum keeps the total right and each share constant.
      shares = np.round(fraction * np.cumsum([0, *map(len, members)])).astype(int)
      for b, extra in enumerate(np.diff(shares)):
        self._strata[b].append((members[b], int(copies), int(extra)))
    self._cache = (None, None)
    self.batches_per_epoch = len(self._plan(0)[0])

  def __getitem__(self, step: int) -> tuple[int, np.ndarray]:
    """Batch `step`, counted from the first epoch: (shape number, examples i64 [B])."""
    epoch, k = divmod(step, self.batches_per_epoch)
    number, plan = self._cache
    if number != epoch:
      plan = self._plan(epoch)
      self._cache = (epoch, plan)
    buckets, starts, order = plan
    batch = self._shapes[buckets[k]].batch
    return int(buckets[k]), order[starts[k] : starts[k] + batch]

  def __getstate__(self):
    return {**self.__dict__, '_cache': (None, None)}

  def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape number and first place in the order of each batch; the order of examples."""
    rng = np.random.default_rng((self._seed, epoch))
    rest, order, buckets = np.zeros(0, np.int64), [], []
    for b, (shape, strata) in enumerate(zip(self._shapes, self._strata)):
      drawn = [rest]
      for members, copies, extra in strata:
        drawn += [members] * copies + [rng.permutation(members)[:extra]]
      pool = rng.permutation(np.concatenate(drawn))
      if b == len(self._shapes) - 1:
        everything = np.concatenate([*order, pool])
        if not len(everything):
          raise ValueError('the weights of tasks and sources leave no example to train on')
        missing = -len(pool) % shape.batch
        pool = np.append(pool, np.resize(rng.permutation(everything), missing))
      full = len(pool) // shape.batch
      order.append(pool[: full * shape.batch])
      rest = pool[full * shape.batch :]
      buckets.append(np.full(full, b))
    buckets = np.concatenate(buckets)
    sizes = np.array([shape.batch for shape in self._shapes])[buckets]
    starts = np.cumsum(sizes) - sizes
    shuffled = rng.permutation(len(buckets))
    return buckets[shuffled], starts[shuffled], np.concatenate(order)


def in_order(examples: Examples, shapes: Sequence[Shape]) -> list[tuple[int, np.ndarray]]:
  """Batches that hold each example once, by length: (shape number, examples i64 [≤ B])."""
  bucket = assign(examples, shapes)
  batches = []
  for b, shape in enumerate(shapes):
    members = np.flatnonzero(bucket == b)
    members = members[np.argsort(examples.frames[members], kind='stable')]
    batches += [(b, members[i : i + shape.batch]) for i in range(0, len(members), shape.batch)]
  return batches


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Numbers of some texts; the same, repeated to a size of few; columns that they take."""

  rows: np.ndarray
  filled: np.ndarray
  length: int


def chunks(lengths: np.ndarray, width: int, padded: bool, least: int = 1) -> Iterator[Chunk]:
  """All texts, short ones together, in few shapes, and so few programs.

  Args:
    lengths: of texts `[N]`.
    width: of their rows.
    padded: whether all are read in full width.
    least: texts of a chunk, repeated where there are fewer; a power of two.
  """
  order = np.argsort(lengths, kind='stable')
  for i in range(0, len(order), CHUNK):
    rows = order[i : i + CHUNK]
    size = min(CHUNK, max(1 << (len(rows) - 1).bit_length(), least))
    most = -(-max(int(lengths[rows].max()), 1) // 8) * 8
    yield Chunk(rows, np.resize(rows, size), width if padded else min(most, width))
