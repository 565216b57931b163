"""Configuration of the training of text classifiers."""

import dataclasses

from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.models.text_classifier import TextConfig
from gatedfm.trainers.config import OptimizerConfig


@dataclasses.dataclass(slots=True)
class TextDataConfig:
  """Texts, their words and their vectors.

  Attributes:
    texts: a set of StaICC, or a .jsonl or .csv with `text` and `label`; see `data/texts.py`.
    vectors: `glove-50`, `sg-100` or a file (see `data/word_vectors.py`); '' has none: random rows.
    longest: words of a text that are read.
    without_vector, unknown, min_count, most: of the vocabulary; see `texts.vocabulary`.
    limit: training texts used, the first in the order of their hashes; 0 means all.
    batch: texts of a step.
    buckets: of lengths, each with its own program.
    offline: compresses vectors before the training, as the published baseline: `u` makes rows of
      the first singular vectors, `us` of these times their singular values; '' does not.
    offline_compression: share of the features that goes then.
  """

  texts: str = 'trec'
  vectors: str = 'glove-50'
  longest: int = 40
  without_vector: str = 'drop'
  unknown: str = 'drop'
  min_count: int = 1
  most: int = 0
  limit: int = 0
  batch: int = 50
  buckets: int = 4
  offline: str = ''
  offline_compression: float = 0.0

  def validate(self) -> None:
    choice('data.without_vector', self.without_vector, ('drop', 'keep'))
    choice('data.unknown', self.unknown, ('drop', 'row'))
    choice('data.offline', self.offline, ('', 'u', 'us'))
    if min(self.longest, self.min_count, self.batch, self.buckets) < 1:
      raise ConfigError('data.longest, min_count, batch and buckets must be at least 1')
    if min(self.most, self.limit) < 0:
      raise ConfigError('data.most and limit are not negative; 0 means all')
    if bool(self.offline) != bool(self.offline_compression):
      raise ConfigError('data.offline and data.offline_compression go together: give both or none')
    if not 0 <= self.offline_compression < 1:
      raise ConfigError('data.offline_compression is a share, 0 to below 1')
    if self.offline and not self.vectors:
      raise ConfigError('data.offline compresses data.vectors: give some')


@dataclasses.dataclass(slots=True)
class TextTrainConfig:
  """Everything that the training of a classifier depends on; several seeds train side by side.

  Attributes:
    name: shown in logs and reports.
    seeds: of parameters, order and dropout.
    epochs: over the training texts; 0 evaluates what `init_from`, or its compression, is.
    init_from: a workdir whose classifiers, of the same seeds and texts, start this one; a table of
      another kind is made of theirs.
    fresh_lstm: whether the LSTM starts anew nevertheless, as in the released code.
    checkpoint_every: in epochs.
    data_dir: where data is prepared; '' is `$GATEDFM_DATA` or the user's cache.
    final: whether the end reports on test, too; not while options are chosen.
    tensorboard: whether to write events beside `metrics.jsonl`.
  """

  name: str = ''
  seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
  epochs: int = 5
  init_from: str = ''
  fresh_lstm: bool = False
  checkpoint_every: int = 5
  data_dir: str = ''
  final: bool = True
  tensorboard: bool = False
  classifier: TextConfig = dataclasses.field(default_factory=TextConfig)
  data: TextDataConfig = dataclasses.field(default_factory=TextDataConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(name='adamw', weight_decay=0.0, b2=0.999, clip=1e9)
  )

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, before anything is read or compiled."""
    self.classifier.validate()
    self.data.validate()
    self.optimizer.validate()
    if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
      raise ConfigError(f'seeds are {self.seeds}: give some, all different, none negative')
    if self.epochs < 0 or self.checkpoint_every < 1:
      raise ConfigError('epochs is not negative, checkpoint_every at least 1')
    if not self.epochs and not self.init_from:
      raise ConfigError('epochs is 0, but init_from names nothing to evaluate: set one of them')
    if self.fresh_lstm and not (self.init_from and self.classifier.kind == 'lstm'):
      raise ConfigError('fresh_lstm is of an LSTM that init_from names')
