"""What a sweep over pruned language models compares."""

# No postponed annotations here: flags are parsed by the fields' types.
import dataclasses
from pathlib import Path

from gatedfm.data.types import SPLITS
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.pruning import allocation, scorers

DENSE = 'dense'


@dataclasses.dataclass(slots=True)
class PrunedConfig:
  """One pruned model.

  Attributes:
    scorer, budget: as of `gatedfm.prune`.
    steps: of rising budgets, each scored anew on what the step before left; 1 scores once.
    repair: whether what is left is fitted to the dense model, on `examples` of each task.
    ask: whether it answers questions; else its perplexity is all.
  """

  scorer: str = 'taylor'
  budget: str = ''
  steps: int = 1
  repair: bool = False
  ask: bool = True


@dataclasses.dataclass(slots=True)
class ImportanceConfig:
  """What is compared, and on what.

  Attributes:
    checkpoint: folder of a language model, or `smollm2`, which is then imported into the workdir.
    tasks: sets of StaICC, or files; scored on their training split, asked on `split`.
    shots: answered questions in front of each, the same for all questions of a seed.
    seeds: of shots, each with other questions; random scores are drawn anew for each, but where
      there is repair. Intervals are of questions, given the shots that were drawn.
    questions: per task, number of shots and seed.
    examples: of each task and number of shots, that scores are taken on; removals: of the oracle.
    aggregation: of their scores, see `scorers.aggregate`.
    text: set whose questions' texts give the perplexity; text_tokens: how much of it.
    room: tokens at a time.
    dtype: `float32` or `bfloat16`, that is computed in; '' is the model's own. Repair's fits are
      in float32.
    points: by name.
  """

  checkpoint: str = 'smollm2'
  tasks: tuple[str, ...] = ('sst2', 'trec', 'rotten_tomatoes', 'tweet_eval_emotion', 'agnews')
  shots: tuple[int, ...] = (0, 4)
  seeds: tuple[int, ...] = (0, 1, 2)
  split: str = 'test'
  questions: int = 70
  examples: int = 64
  removals: int = 8
  aggregation: str = 'mean'
  text: str = 'agnews'
  text_tokens: int = 4096
  room: int = 512
  dtype: str = ''
  points: dict[str, PrunedConfig] = dataclasses.field(default_factory=dict)

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, before anything is computed."""
    if not self.points or not self.tasks or not self.shots or not self.seeds:
      raise ConfigError('a sweep needs points, tasks, shots and seeds, one of each at least')
    if DENSE in self.points:
      raise ConfigError(f'{DENSE} is what all points are compared with: name yours otherwise')
    for name, point in self.points.items():
      try:
        budget = allocation.parse_budget(point.budget)
        allocation.check(budget, allocation.RAGGED, scorers.get(point.scorer).sites)
      except ConfigError as e:
        raise ConfigError(f'points.{name}: {e}') from None
      if 'latency' in budget:
        raise ConfigError(
          f'points.{name}: a budget in latency is for gatedfm.prune, which measures'
        )
      if point.steps < 1:
        raise ConfigError(f'points.{name}.steps is {point.steps}; it must be at least 1')
    choice('split', self.split, SPLITS)
    choice('aggregation', self.aggregation, scorers.AGGREGATIONS)
    if self.dtype:
      choice('dtype', self.dtype, ('float32', 'bfloat16'))
    if min(*self.shots, *self.seeds) < 0:
      raise ConfigError('shots and seeds must not be negative')
    if len({Path(task).stem for task in self.tasks}) < len(self.tasks):
      raise ConfigError('two tasks of one name: rename a file')
    for name in ('questions', 'examples', 'removals', 'text_tokens', 'room'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least 1')
