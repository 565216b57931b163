"""A language model whose matrices become products of factors, measured: one workdir."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gatedfm import provenance
from gatedfm.data import lm_batches, questions
from gatedfm.evaluation import pruning_runs
from gatedfm.execution import lm_workdir
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.pruning import factors
from gatedfm.trainers import workdirs

SIZES = ('rank', 'compression', 'energy')
_ROOM = 1024  # tokens at a time


@dataclasses.dataclass(frozen=True)
class Factoring:
  """What to do.

  Attributes:
    match: patterns of the matrices' paths.
    size: one of `SIZES`, and its value.
    weights: of rows, of `factors.WEIGHTS`.
    split: where singular values go, see `svd.factorize`.
    calibration, examples, shots, tokens, rounds, seed: as of `pruning_runs.Pruning`.
  """

  match: tuple[str, ...]
  size: tuple[str, float]
  weights: str = 'none'
  split: str = 'balanced'
  calibration: tuple[str, ...] = ()
  examples: int = 100
  shots: int = 0
  tokens: int = 512
  rounds: int = 7
  seed: int = 0

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for what cannot be done."""
    choice('weights', self.weights, factors.WEIGHTS)
    choice('size', self.size[0], SIZES)
    name, value = self.size
    if name == 'rank' and (value < 1 or value % 1):
      raise ConfigError(f'rank is {value}; it is a whole number, at least 1')
    if name != 'rank' and not (0 <= value < 1 if name == 'compression' else 0 < value <= 1):
      raise ConfigError(f'{name} is {value}; it is a share, from 0 to 1')
    if not self.match:
      raise ConfigError('match is empty: name some matrices, such as decoder/embedding')
    if (self.weights != 'none') != bool(self.calibration):
      raise ConfigError(
        f'weights are {self.weights}: '
        + (
          f'give --calibration tasks ({", ".join(questions.TASKS)}) or files to take them on'
          if self.weights != 'none'
          else f'they need no calibration; choose one of {", ".join(factors.WEIGHTS[1:])}'
        )
      )
    if min(self.examples, self.tokens) < 1 or min(self.shots, self.rounds, self.seed) < 0:
      raise ConfigError('examples and tokens are at least 1, shots, rounds and seed not negative')


def run(
  checkpoint: Path, workdir: Path, how: Factoring, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
  """Factorizes matrices of a model into a new workdir, which the commands take like any other.

  Raises:
    ConfigError, DataError, WorkdirError, CheckpointError: before anything is written.
  """
  how.validate()
  with workdirs.new(workdir) as folder:
    return _run(checkpoint, folder, how, say)


def _run(
  checkpoint: Path, workdir: Path, how: Factoring, say: Callable[[str], None]
) -> dict[str, Any]:
  dense = lm_workdir.load(checkpoint)
  factors.matrices(dense.params, how.match)
  weights = {}
  if how.weights != 'none':
    if dense.cut is not None:
      raise ConfigError(f'{checkpoint} was pruned: take weights none, or factorize before pruning')
    pairs = [pair for name in how.calibration for pair in pruning_runs.texts(name, dense, how)]
    most = min(how.tokens, dense.cfg.max_tokens)
    batches = lm_batches.batches(pairs, _ROOM, most, dense.cfg.padding)
    weights = factors.row_weights(how.weights, dense.cfg, dense.params, how.match, batches, say)
  size = {how.size[0]: int(how.size[1]) if how.size[0] == 'rank' else how.size[1]}
  params, rows = factors.factorize(dense.params, how.match, weights, how.split, **size)
  history = {'parent': str(checkpoint), 'factoring': dataclasses.asdict(how)}
  history |= provenance.collect('gatedfm.factorize')
  cfg = factors.factored(dense.cfg, rows)
  small = dataclasses.replace(dense, cfg=cfg, params=params, origin=history | {'of': dense.origin})
  report = history | {'factors': [dataclasses.asdict(row) for row in rows]}
  models = {'dense': dense, 'factorized': small}
  report |= pruning_runs.measured(models, how.tokens, how.rounds)
  lm_workdir.save(workdir, small)
  report = pruning_runs.written(workdir, report)
  for line in describe(report):
    say(line)
  return report


def describe(report: dict[str, Any]) -> Sequence[str]:
  """A report as lines for people."""
  lines = [
    f'{row["path"]}: {row["shape"][0]} x {row["shape"][1]} by rank {row["rank"]}, '
    f'{100 * row["parameters_removed"]:.1f}% of its parameters gone, '
    f'{100 * row["energy"]:.1f}% of its energy kept'
    for row in report['factors']
  ]
  if grown := [row['path'] for row in report['factors'] if row['parameters_removed'] <= 0]:
    lines.append(f'no smaller than before: {", ".join(grown)}; take a lower rank')
  return [*lines, *pruning_runs.left(report['dense'], report['factorized'])]
