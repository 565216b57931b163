"""What a language model at rest answers, over tasks, numbers of shots and seeds; its perplexity."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatedfm import metrics
from gatedfm.data import questions, rows
from gatedfm.data.types import SPLITS, DataError
from gatedfm.evaluation.few_shot import Evaluator
from gatedfm.execution import lm_workdir
from gatedfm.models.speech_config import ConfigError, choice


@dataclasses.dataclass(frozen=True)
class Questions:
  """What is asked.

  Attributes:
    tasks: of `questions.load`; shots: in front of each question.
    seeds: how many draws of shots, from 0 on, each for other questions as long as there are
      enough. Intervals are of questions, given the shots that were drawn.
    number: of questions, per task, number of shots and seed.
    split: that they are of.
    shared: whether all questions of a draw have the same shots, which are then read once.
    text: a file whose perplexity is measured, '' for none.
  """

  tasks: tuple[str, ...]
  shots: tuple[int, ...] = (0, 4)
  seeds: int = 3
  number: int = 100
  split: str = 'test'
  shared: bool = True
  text: str = ''

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for what cannot be asked."""
    choice('split', self.split, SPLITS)
    if not self.tasks and not self.text:
      raise ConfigError(
        f'nothing to evaluate on: give tasks ({", ".join(questions.TASKS)}) or text'
      )
    if self.seeds < 1 or self.number < 1 or any(n < 0 for n in self.shots):
      raise ConfigError('seeds and number must be positive, shots not negative')


def evaluate(
  checkpoint: Path,
  asked: Questions,
  say: Callable[[str], None] = lambda line: None,
  mesh: Any = None,
) -> dict[str, Any]:
  """Accuracies by number of shots, plain and calibrated, each with its 95% interval; perplexity.

  Args:
    checkpoint: of the model, dense or pruned.
    asked: what it is asked.
    say: is told each result.
    mesh: devices that share the model (`partitioning`); None takes the first.

  Raises:
    ConfigError, DataError, CheckpointError: before anything is computed.
  """
  asked.validate()
  tasks = [questions.load(name) for name in asked.tasks]
  if len({task.name for task in tasks}) < len(tasks):
    raise ConfigError('two tasks of one name: rename a file')
  for task, shots in itertools.product(tasks, asked.shots):
    questions.sample(task, asked.split, 1, shots, 0)  # raises where there are too few
  text = rows.text_of(Path(asked.text).expanduser()) if asked.text else None
  model = lm_workdir.load(checkpoint, mesh)
  if model.tokenizer is None:
    raise DataError(f'{checkpoint} has no tokenizer beside it: import it again, with its own')
  evaluator = Evaluator(model.cfg, model.params, model.tokenizer, model.fixed())
  for task in tasks:
    own, train = len(task.questions[asked.split]), len(task.questions['train'])
    say(f'{task.name}: {own} questions for {asked.split}, {train} for training')
  out: dict[str, Any] = {'checkpoint': str(checkpoint), 'asked': dataclasses.asdict(asked)}
  if text is not None:
    out['perplexity'] = evaluator.perplexity(text)
    say(f'perplexity {out["perplexity"]:.3f}')
  for shots in asked.shots if tasks else ():
    answered = []
    for task, seed in itertools.product(tasks, range(asked.seeds)):
      how = asked.split, asked.number, shots, seed, None, task.blank is not None, asked.shared
      answered.append(evaluator.ask(task, *how))
      say(f'{task.name}, {shots} shots, seed {seed}: {answered[-1].correct.mean():.1%}')
    out[f'plain_{shots}'] = _scores(answered)
    # Of the tasks that can be; which they are stands beside the number.
    calibrated = [a.calibrated() for a in answered if a.blank is not None]
    if calibrated:
      out[f'calibrated_{shots}'] = _scores(calibrated)
    for kind in ('plain', 'calibrated'):
      if found := out.get(f'{kind}_{shots}'):
        low, high = found['interval']
        of = '' if len(found['tasks']) == len(tasks) else f' of {", ".join(found["tasks"])}'
        mean = found['accuracy']['mean']
        say(f'{shots} shots, {kind}{of}: {mean:.1%} ({low:.1%} to {high:.1%})')
  return out


def _scores(answered: list) -> dict[str, Any]:
  correct = [bool(c) for a in answered for c in a.correct]
  counts = metrics.accuracy(correct, [a.task for a in answered for _ in a.correct])
  bounds = metrics.interval(counts)
  out = {'tasks': sorted({a.task for a in answered}), 'accuracy': counts.scores()}
  return out | {'interval': [bounds.low, bounds.high]}
