"""The configuration of the data: what to train on and how to batch it.

No postponed annotations here: config flags read the fields' types to parse overrides.
"""

import dataclasses

from gatedfm.data import sources
from gatedfm.data.tokenizer import check_tasks
from gatedfm.data.types import DataError


@dataclasses.dataclass(slots=True)
class DataConfig:
  """What to train on and how to batch it.

  Attributes:
    sources: specs for `gatedfm.data.sources.load`.
    extra: specs of sources that are trained on and never scored, synthetic speech for one;
      tokenizer and feature statistics come from `sources` alone.
    tasks: 'asr', 'lid', 'st_xxx'.
    task_weights: times that an epoch sees each example of a task; () = once.
    source_weights: the same for each of `sources`, then of `extra`; both weights multiply. A
      large synthetic source at 0.2 gives each epoch another fifth of it.
    loss_weights: weight of each task's examples in the loss; () = 1. A language is one token and
      a transcript many, so that where gates choose what to give up, nats alone misprice them.
    batch_frames: B · T of a batch at most, over all hosts.
    batch_size: B of every bucket instead; 0 = by `batch_frames`.
    bucket_frames: boundaries of the buckets; () = those that pad the data the least.
    num_buckets: of these at most, so that many compilations.
    max_frames: of 10 ms; longer utterances are left out.
    max_tokens: longer texts are left out.
    notimestamps: whether the decoder's prefix has <notimestamps>, as OWSM's.
    lid_ctc: whether examples of 'lid' train CTC too.
    seed: of sampling and order.
    workers: Grain worker processes; 0 = one thread that reads ahead.
  """

  sources: tuple[str, ...] = ('auto',)
  extra: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ('asr', 'lid', 'st_eng')
  task_weights: tuple[float, ...] = ()
  source_weights: tuple[float, ...] = ()
  loss_weights: tuple[float, ...] = ()
  batch_frames: int = 16_000
  batch_size: int = 0
  bucket_frames: tuple[int, ...] = ()
  num_buckets: int = 6
  max_frames: int = 3_001
  max_tokens: int = 256
  notimestamps: bool = False
  lid_ctc: bool = False
  seed: int = 0
  workers: int = 0

  def validate(self) -> None:
    """Raises DataError, naming `data.FIELD` and the mend, before any data is prepared."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(field.default, tuple) and not isinstance(value, tuple | list):
        raise DataError(f'data.{field.name} is {value!r}; write a tuple: ({value!r},)')
    self._check_sources()
    try:
      check_tasks(self.tasks)
    except ValueError as e:
      raise DataError(f'data.tasks: {e}') from None
    tasks = f'tasks {" ".join(self.tasks)}', len(self.tasks)
    given = (*self.sources, *self.extra)
    origins = f'sources {" ".join(given)}', len(given)
    for name, (what, number) in (
      ('task_weights', tasks),
      ('source_weights', origins),
      ('loss_weights', tasks),
    ):
      weights = getattr(self, name)
      if weights and (len(weights) != number or min(weights) < 0 or not any(weights)):
        raise DataError(
          f'data.{name} is {weights}; it must give each of the {what} a weight of at least 0, '
          'and not all of them 0'
        )
    self._check_sizes()

  def _check_sources(self) -> None:
    if not self.sources:
      raise DataError(f'data.sources is empty; name one or more of {", ".join(sources.KNOWN)}')
    for name in ('sources', 'extra'):
      for spec in getattr(self, name):
        try:
          sources.parse(spec)
        except DataError as e:
          raise DataError(f'data.{name}: {e}') from None

  def _check_sizes(self) -> None:
    for least, names in (
      (1, ('batch_frames', 'num_buckets', 'max_frames', 'max_tokens')),
      (0, ('batch_size', 'seed', 'workers')),
    ):
      for name in names:
        if getattr(self, name) < least:
          raise DataError(f'data.{name} is {getattr(self, name)}; it must be at least {least}')
    ends = list(self.bucket_frames)
    if ends != sorted(set(ends)) or min(ends, default=1) < 1:
      raise DataError(f'data.bucket_frames is {self.bucket_frames}; it must increase from above 0')
