"""What a sweep over embedding tables of text classifiers compares."""

# No postponed annotations here: flags are parsed by the fields' types.
import dataclasses
from pathlib import Path

from gatedfm.models.speech_config import ConfigError
from gatedfm.trainers.text_config import TextTrainConfig


@dataclasses.dataclass(slots=True)
class TablePoint:
  """One way to have a smaller table.

  Attributes:
    method: what it is called in tables and pictures.
    train: how it is trained; `init_from` may name an earlier point.
    compression: what was asked for; 0 where the method has its own.
    baseline: the point that its accuracy is compared with, seed by seed; '' compares with none.
  """

  method: str
  train: TextTrainConfig
  compression: float = 0.0
  baseline: str = ''


@dataclasses.dataclass(slots=True)
class TableSweepConfig:
  """Points, in the order of their training.

  Attributes:
    points: by name.
    data_dir: '' is `$GATEDFM_DATA` or the user's cache.
  """

  points: dict[str, TablePoint] = dataclasses.field(default_factory=dict)
  data_dir: str = ''

  def validate(self) -> None:
    """Raises ConfigError, naming the point and the mend, before anything is trained."""
    if not self.points:
      raise ConfigError('a sweep needs at least one point')
    names = list(self.points)
    for i, (name, point) in enumerate(self.points.items()):
      try:
        point.train.validate()
      except ConfigError as e:
        raise ConfigError(f'{name}: {e}') from None
      parent = point.train.init_from
      if parent in names and self.points[parent].train.seeds != point.train.seeds:
        raise ConfigError(f'{name} has other seeds than {parent}, which it starts from')
      if parent and parent not in names and not Path(parent).expanduser().is_absolute():
        raise ConfigError(f'{name}.init_from is {parent}: neither a point nor an absolute path')
      for field, value in (('init_from', point.train.init_from), ('baseline', point.baseline)):
        if value in names[i:]:
          raise ConfigError(f'{name}.{field} is {value}, which is not trained before it')
      if point.baseline and point.baseline not in names:
        raise ConfigError(f'{name}.baseline is {point.baseline}, which is no point')
      if point.baseline and self.points[point.baseline].train.seeds != point.train.seeds:
        raise ConfigError(f'{name} has other seeds than its baseline {point.baseline}')
