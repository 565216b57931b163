"""A language model scored, pruned by a budget, compacted, measured: one workdir."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm import atomic, provenance
from gatedfm.analysis import importance_plots, plots
from gatedfm.data import lm_batches, questions
from gatedfm.data.lm_batches import Pair
from gatedfm.data.types import DataError
from gatedfm.evaluation import lm_timing
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.models import lm_costs
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.pruning import allocation, calibration, scorers
from gatedfm.pruning.allocation import Allocation
from gatedfm.pruning.calibration import HEADS
from gatedfm.pruning.scorers import Calibrated, Scores

REPORT, SCORES = 'report.json', 'scores.npz'


@dataclasses.dataclass(frozen=True)
class Pruning:
  """What to do.

  Attributes:
    scorer: of `scorers.SCORERS`.
    budget: `heads:0.7,ffn:0.2`, shares to close.
    calibration: tasks (of `questions.load`) or text files; each is scored by itself.
    examples: of each task, of its training split, or windows of a text.
    shots: answered questions in front of each.
    aggregation: of several tasks' scores, see `scorers.aggregate`.
    allocation: see `Allocation`.
    tokens: of a prompt at most, and of the text that is timed.
    rounds: of the timing; 0 leaves it out.
    seed: of examples, shots and random scores.
  """

  scorer: str
  budget: str
  calibration: tuple[str, ...] = ()
  examples: int = 100
  shots: int = 0
  aggregation: str = 'mean'
  allocation: Allocation = allocation.RAGGED
  tokens: int = 512
  rounds: int = 7
  seed: int = 0

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for what cannot be done."""
    needs = scorers.get(self.scorer).needs
    allocation.parse_budget(self.budget)
    choice('aggregation', self.aggregation, scorers.AGGREGATIONS)
    if needs and not self.calibration:
      raise ConfigError(
        f'scorer {self.scorer} reads texts: give tasks ({", ".join(questions.TASKS)}) or files to '
        '--calibration'
      )
    for name, least in (('examples', 1), ('shots', 0), ('tokens', 8), ('rounds', 0), ('seed', 0)):
      if getattr(self, name) < least:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least {least}')


def run(
  checkpoint: Path, workdir: Path, how: Pruning, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
  """Prunes a model into a new workdir, which the commands then take like any other.

  Beside the compacted model stand the scores, a report (costs and times, before and after) and,
  where heads were scored, their map.

  Raises:
    ConfigError, DataError, WorkdirError, CheckpointError: before anything is written.
  """
  how.validate()
  lm_workdir.refuse_used(workdir)
  dense = lm_workdir.load(checkpoint)
  if dense.cut is not None:
    raise ConfigError(f'{checkpoint} was pruned before: start from the model that it was cut from')
  origin = provenance.collect('gatedfm.prune')
  scores, seconds = score(dense, how, say)
  gates = allocation.allocate(
    scores, allocation.parse_budget(how.budget), dense.cfg, how.allocation
  )
  history = {'parent': str(checkpoint), 'pruning': dataclasses.asdict(how), **origin}
  small = lm_workdir.compacted(dense, gates, history | {'of': dense.origin})
  report = history | {'scoring_seconds': seconds, 'closed': _closed(gates.values)}
  models = {'dense': dense, 'pruned': small}
  times = lm_timing.side_by_side(models, how.tokens, how.rounds) if how.rounds else {}
  for name, model in models.items():
    costs = lm_costs.count(model.cfg, model.params, how.tokens)
    report[name] = costs | times.get(name, {})
  lm_workdir.save(workdir, small)
  np.savez(workdir / SCORES, **{k.replace('/', '.'): v for k, v in scores.items()})
  report = json.loads(json.dumps(report))
  atomic.write_text(workdir / REPORT, json.dumps(report, indent=1) + '\n')
  if HEADS in scores:
    figure = importance_plots.importance(scores[HEADS], gates.values.get(HEADS))
    plots.save(figure, workdir / 'heads.png')
  for line in describe(report):
    say(line)
  return report


def score(dense: LmCheckpoint, how: Pruning, say: Callable[[str], None]) -> tuple[Scores, float]:
  """Scores of all that the scorer knows, and the seconds that they took."""
  scorer, start = scorers.get(how.scorer), time.perf_counter()
  if not scorer.needs:
    return scorer.score(Calibrated(dense.cfg, dense.params, None, how.seed)), 0.0
  each = []
  for name in how.calibration:
    pairs = texts(name, dense, how)
    batches = lm_batches.batches(pairs, 4, min(how.tokens, dense.cfg.max_tokens), _pad(dense.cfg))
    tell = lambda line, name=name: say(f'{name}: {line}')
    stats = calibration.collect(dense.cfg, dense.params, batches, scorer.needs, tell)
    each.append(scorer.score(Calibrated(dense.cfg, dense.params, stats, how.seed)))
  return scorers.aggregate(each, how.aggregation), time.perf_counter() - start


def _pad(cfg: LmConfig) -> int:
  return max(cfg.pad, 0)


def texts(name: str, model: LmCheckpoint, how: Pruning) -> list[Pair]:
  """Calibration examples: prompts with their right answers, or windows of a text.

  Raises:
    DataError: a model without tokenizer, or texts that cannot be read.
  """
  tokenizer, cfg = model.tokenizer, model.cfg
  if tokenizer is None:
    raise DataError('this model has no tokenizer beside it: import it again, with its own')
  if name.endswith('.txt'):
    try:
      text = Path(name).expanduser().read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
      raise DataError(f'{name} cannot be read: {e}') from None
    length = min(how.tokens, cfg.max_tokens)
    return lm_batches.windows(tokenizer.encode(text), length, cfg.bos)[: how.examples]
  task, start = questions.load(name), () if cfg.bos < 0 else (cfg.bos,)
  drawn = questions.sample(task, 'train', how.examples, how.shots, how.seed)
  answer = lambda q: tuple(tokenizer.encode(f' {q.choices[q.answer]}'))
  return [Pair((*start, *tokenizer.encode(task.prompt(q, s))), answer(q)) for q, s in drawn]


def _closed(gates: dict[str, np.ndarray]) -> dict[str, str]:
  """`'63 of 270'` by site."""
  return {name: f'{int((g == 0).sum())} of {g.size}' for name, g in gates.items()}


def describe(report: dict[str, Any]) -> Sequence[str]:
  """A report as lines for people."""
  dense, pruned = report['dense'], report['pruned']
  closed = ', '.join(f'{count} {name.split("/")[1]}' for name, count in report['closed'].items())
  share = lambda name: f'{pruned[name] / dense[name]:.2f} of the {name.replace("_", " ")}'
  names = ('parameters', 'bytes', 'macs', 'layer_macs', 'kv_bytes')
  lines = [f'closed: {closed}', 'left: ' + ', '.join(map(share, names))]
  if 'prefill' in pruned:
    time_of = lambda kind: (
      f'{kind} {1e3 * pruned[kind]["median"]:.1f} ms, {pruned[f"{kind}_ratio"]["median"]:.2f} of '
      f'{1e3 * dense[kind]["median"]:.1f} ms'
    )
    lines.append('time: ' + '; '.join(map(time_of, ('prefill', 'token'))))
  return lines
