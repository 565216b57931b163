"""A language model scored, pruned by a budget, compacted, measured: one workdir."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm import atomic, provenance
from gatedfm.analysis import importance_plots, plots
from gatedfm.data import lm_batches, questions, rows
from gatedfm.data.lm_batches import Pair
from gatedfm.data.types import DataError
from gatedfm.evaluation import lm_timing
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm_costs
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.pruning import allocation, calibration, repair, score_files, scorers
from gatedfm.pruning.allocation import Allocation
from gatedfm.pruning.calibration import FFN, HEADS
from gatedfm.pruning.scorers import Calibrated, Scores
from gatedfm.trainers import workdirs

REPORT, SCORES = 'report.json', 'scores.npz'
_ROOM = 1024  # tokens at a time
_LEAST = {'examples': 1, 'shots': 0, 'tokens': 8, 'rounds': 0, 'seed': 0, 'steps': 1}


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
    steps: of rising budgets, each scored anew on what the step before left; 1 is the published
      protocol, which scores once.
    repair: whether what is left is fitted to the dense model (`repair.least_squares`).
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
  steps: int = 1
  repair: bool = False

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for what cannot be done."""
    needs = scorers.get(self.scorer).needs
    budget = allocation.parse_budget(self.budget)
    allocation.check(budget, self.allocation, scorers.get(self.scorer).sites)
    if 'latency' in budget and (self.steps > 1 or not self.rounds):
      raise ConfigError('a budget in latency is measured, and in one step: rounds, and steps=1')
    choice('aggregation', self.aggregation, scorers.AGGREGATIONS)
    if (needs or self.repair) and not self.calibration:
      reader = f'scorer {self.scorer}' if needs else 'repair'
      raise ConfigError(
        f'{reader} reads texts: give tasks ({", ".join(questions.TASKS)}) or files to --calibration'
      )
    for name, least in _LEAST.items():
      if getattr(self, name) < least:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least {least}')


def run(
  checkpoint: Path, workdir: Path, how: Pruning, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
  """Prunes a model into a new workdir, which the commands then take like any other.

  Beside the compacted model stand the scores, a report (costs and times, before and after) and
  pictures of the heads' and FFNs' scores, where they were taken.

  Raises:
    ConfigError, DataError, WorkdirError, CheckpointError: before anything is written.
  """
  how.validate()
  with workdirs.new(workdir) as folder:
    return _run(checkpoint, folder, how, say)


def _run(
  checkpoint: Path, workdir: Path, how: Pruning, say: Callable[[str], None]
) -> dict[str, Any]:
  dense = lm_workdir.load(checkpoint)
  if dense.cut is not None:
    raise ConfigError(f'{checkpoint} was pruned before: start from the model that it was cut from')
  origin = provenance.collect('gatedfm.prune')
  _try_out(dense, how)
  start = time.perf_counter()
  scores = score(dense, how, say)
  seconds = time.perf_counter() - start
  gates = close(dense, scores, how, say)
  repaired = dense
  if how.repair:
    repaired = dataclasses.replace(dense, params=fitted(dense, gates, how, say))
  history = {'parent': str(checkpoint), 'pruning': dataclasses.asdict(how), **origin}
  small = lm_workdir.compacted(repaired, gates, history | {'of': dense.origin}, fold=True)
  report = history | {'scoring_seconds': seconds, 'closed': _closed(gates.values)}
  report |= measured({'dense': dense, 'pruned': small}, how.tokens, how.rounds)
  lm_workdir.save(workdir, small)
  score_files.save(workdir / SCORES, scores)
  report = written(workdir, report)
  pictures = {
    'heads': (HEADS, importance_plots.importance),
    'ffn': (FFN, importance_plots.ffn_importance),
  }
  for name, (site, draw) in pictures.items():
    if site in scores:
      plots.save(draw(scores[site], gates.values.get(site)), workdir / f'{name}.png')
  for line in describe(report):
    say(line)
  return report


def measured(
  models: Mapping[str, LmCheckpoint], tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
  """Costs of models by name and, of so many rounds side by side, their times."""
  times = lm_timing.side_by_side(models, tokens, rounds) if rounds else {}
  costs = {name: lm_costs.count(x.cfg, x.params, tokens) for name, x in models.items()}
  return {name: cost | times.get(name, {}) for name, cost in costs.items()}


def written(workdir: Path, report: Mapping[str, Any]) -> dict[str, Any]:
  """Writes a report, and returns it as it will be read."""
  text = json.dumps(report, indent=1)
  atomic.write_text(workdir / REPORT, text + '\n')
  return json.loads(text)


def _try_out(dense: LmCheckpoint, how: Pruning) -> None:
  """Raises for texts that cannot be read and budgets that cannot be kept, whatever is scored."""
  for name in how.calibration:
    texts(name, dense, how)
  budget = allocation.parse_budget(how.budget)
  if 'latency' not in budget:
    drawn = scorers.random(Calibrated(dense.cfg, dense.params))
    gates = in_steps(lambda closed: drawn, budget, dense.cfg, how.steps, how.allocation)
    if all(np.all(g) for g in gates.values.values()):
      sizes = ', '.join(f'{g.size} {name.split("/")[1]}' for name, g in gates.values.items())
      raise ConfigError(f'budget {how.budget} closes none of {sizes}: ask for more')


def close(dense: LmCheckpoint, scores: Scores, how: Pruning, say: Callable[[str], None]) -> Gates:
  """The gates that keep the budget, `scores` being those of the dense model."""
  budget = allocation.parse_budget(how.budget)
  ready = functools.partial(weighed, how.scorer, budget, how.allocation)
  if 'latency' in budget:
    return within_latency(dense, ready(scores), budget['latency'], how, say)
  of = lambda closed: ready(scores if closed is None else score(dense, how, say, closed))
  return in_steps(of, budget, dense.cfg, how.steps, how.allocation)


def weighed(scorer: str, budget: Mapping[str, float], how: Allocation, scores: Scores) -> Scores:
  """Scores of one unit, their means 1, where a budget weighs sites that are not comparable."""
  sites = allocation.sites(budget, how)
  alike = len(sites) == 1 or set(sites) <= set(scorers.get(scorer).comparable)
  if alike or not set(budget) & set(allocation.COSTS):
    return scores
  return {name: scores[name] / np.mean(scores[name]) for name in sites}


def score(
  dense: LmCheckpoint, how: Pruning, say: Callable[[str], None], closed: Gates | None = None
) -> Scores:
  """Scores of all that the scorer knows, in a model of which `closed` is gone already."""
  scorer = scorers.get(how.scorer)
  of = lambda stats: scorer.score(Calibrated(dense.cfg, dense.params, stats, how.seed))
  if not scorer.needs:
    return of(None)
  each, sites = [], allocation.sites(allocation.parse_budget(how.budget), how.allocation)
  for name in how.calibration:
    pairs = texts(name, dense, how)
    batches = lm_batches.batches(
      pairs, _ROOM, min(how.tokens, dense.cfg.max_tokens), dense.cfg.padding
    )
    tell = lambda line, name=name: say(f'{name}: {line}')
    each.append(
      of(calibration.collect(dense.cfg, dense.params, batches, scorer.needs, tell, closed, sites))
    )
  return scorers.aggregate(each, how.aggregation)


def fitted(
  dense: LmCheckpoint, gates: Gates, how: Pruning, say: Callable[[str], None]
) -> dict[str, Any]:
  """Parameters repaired on all calibration texts together."""
  pairs = [pair for name in how.calibration for pair in texts(name, dense, how)]
  most = min(how.tokens, dense.cfg.max_tokens)
  batches = lm_batches.batches(pairs, _ROOM, most, dense.cfg.padding)
  return repair.least_squares(dense.cfg, dense.params, gates, batches, say=say)


def in_steps(
  score: Callable[[Gates | None], Scores],
  budget: Mapping[str, float],
  cfg: LmConfig,
  steps: int,
  how: Allocation = allocation.RAGGED,
) -> Gates:
  """Closes a part of the budget at a time, what is closed staying so.

  Args:
    score: of the model of which those gates are closed; None for the dense one.
    budget, cfg, how: as of `allocation.allocate`.
    steps: parts; 1 scores the dense model alone.
  """
  closed = None
  for step in range(1, steps + 1):
    # The last part is the budget itself, whatever its products would round to.
    part = budget if step == steps else {n: share * step / steps for n, share in budget.items()}
    closed = allocation.allocate(score(closed), part, cfg, how, closed)
  return closed


def within_latency(
  dense: LmCheckpoint,
  scores: Scores,
  share: float,
  how: Pruning,
  say: Callable[[str], None],
  trials: int = 5,
) -> Gates:
  """Closes so many MACs that reading a text takes `1 - share` of the dense model's measured time.

  Raises:
    ConfigError: none of the trials came as low.
  """
  low, high, best = 0.0, 1.0, None
  for trial in range(trials):
    macs = share if trial == 0 else (low + high) / 2
    try:
      gates = allocation.allocate(scores, {'macs': macs}, dense.cfg, how.allocation)
    except ConfigError:
      high = macs
      continue
    models = {'dense': dense, 'pruned': lm_workdir.compacted(dense, gates, {})}
    times = lm_timing.side_by_side(models, how.tokens, how.rounds, writes=1)
    ratio = times['pruned']['prefill_ratio']['median']
    say(f'budget: without {macs:.0%} of the MACs reading takes {ratio:.2f} of the dense time')
    if ratio <= 1 - share:
      high, best = macs, gates
    else:
      low = macs
  if best is None:
    raise ConfigError(
      f'latency:{share} was not reached in {trials} trials of closing '
      f'{", ".join(how.allocation.over)}: ask for less'
    )
  return best


def texts(name: str, model: LmCheckpoint, how: Any) -> list[Pair]:
  """Calibration examples: prompts with their right answers, or windows of a text.

  Args:
    name: of a task or a file.
    model: whose tokenizer reads them.
    how: `examples`, `shots`, `tokens` and `seed`, as of `Pruning`.

  Raises:
    DataError: a model without tokenizer, or texts that cannot be read.
  """
  tokenizer, cfg = model.tokenizer, model.cfg
  if tokenizer is None:
    raise DataError('this model has no tokenizer beside it: import it again, with its own')
  if name.endswith('.txt'):
    text = rows.text_of(Path(name).expanduser())
    length = min(how.tokens, cfg.max_tokens)
    return lm_batches.windows(tokenizer.encode(text), length, cfg.start)[: how.examples]
  task = questions.load(name)
  drawn = questions.sample(task, 'train', how.examples, how.shots, how.seed)
  answer = lambda q: tuple(tokenizer.encode(f' {q.choices[q.answer]}', follows=True))
  return [Pair((*cfg.start, *tokenizer.encode(task.prompt(q, s))), answer(q)) for q, s in drawn]


def _closed(gates: dict[str, np.ndarray]) -> dict[str, str]:
  """`'63 of 270'` by site."""
  return {name: f'{int((g == 0).sum())} of {g.size}' for name, g in gates.items()}


def describe(report: dict[str, Any]) -> Sequence[str]:
  """A report as lines for people."""
  closed = ', '.join(f'{count} {name.split("/")[1]}' for name, count in report['closed'].items())
  return [f'closed: {closed}', *left(report['dense'], report['pruned'])]


def left(dense: Mapping[str, Any], small: Mapping[str, Any]) -> list[str]:
  """What a smaller model costs and takes of the dense one's, as lines for people."""
  share = lambda name: f'{small[name] / dense[name]:.2f} of the {name.replace("_", " ")}'
  names = ('parameters', 'bytes', 'macs', 'layer_macs', 'kv_bytes')
  lines = ['left: ' + ', '.join(map(share, names))]
  if 'prefill' in small:
    time_of = lambda kind: (
      f'{kind} {1e3 * small[kind]["median"]:.1f} ms, {small[f"{kind}_ratio"]["median"]:.2f} of '
      f'{1e3 * dense[kind]["median"]:.1f} ms'
    )
    lines.append('time: ' + '; '.join(map(time_of, ('prefill', 'token'))))
  return lines
