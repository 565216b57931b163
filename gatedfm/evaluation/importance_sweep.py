"""A sweep over pruned language models: scored once, closed by many budgets, asked, compared.

Every answer is a line of `answers.jsonl` as soon as it is there: the same command resumes. What is
pruned is masked, not compacted, so that all points run in the same few programs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm import atomic, json_lines, metrics, provenance
from gatedfm.analysis import importance_report, plots
from gatedfm.data import lm_batches, questions
from gatedfm.data.questions import Task
from gatedfm.data.types import DataError
from gatedfm.evaluation import pruning_runs
from gatedfm.evaluation.few_shot import Evaluator
from gatedfm.evaluation.importance_config import DENSE, ImportanceConfig, PrunedConfig
from gatedfm.evaluation.pruning_runs import Pruning
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm_costs
from gatedfm.models.speech_config import ConfigError
from gatedfm.pruning import allocation, calibration, score_files, scorers
from gatedfm.pruning.calibration import ATTENTION, FFN, LAYER
from gatedfm.pruning.scorers import Calibrated, Scores
from gatedfm.trainers import checkpoints, log, workdirs
from gatedfm.trainers import config as config_lib
from gatedfm.trainers.log import say
from gatedfm.trainers.workdirs import WorkdirError

ANSWERS, SUMMARY, CONFIG = 'answers.jsonl', 'summary.json', 'sweep.json'


def run(cfg: ImportanceConfig, workdir: Path) -> dict[str, Any]:
  """Scores, prunes, asks and summarises what is not there yet.

  Raises:
    ConfigError, DataError, CheckpointError: what cannot be done, before anything is computed.
    WorkdirError: the workdir of another sweep.
  """
  cfg.validate()
  tasks = {name: questions.load(name) for name in cfg.tasks}
  for task, shots in itertools.product(tasks.values(), cfg.shots):
    for split in ('train', cfg.split):
      questions.sample(task, split, 1, shots, 0)  # raises where there are too few
  fetched = cfg.checkpoint == 'smollm2' and not Path(cfg.checkpoint).exists()
  model = None if fetched else _whole(Path(cfg.checkpoint).expanduser())
  with workdirs.alone(workdir):
    _claim(cfg, workdir)
    return _run(cfg, workdir, model, tasks)


def _run(
  cfg: ImportanceConfig, workdir: Path, model: LmCheckpoint | None, tasks: Mapping[str, Task]
) -> dict[str, Any]:
  model, sweep_start = model or _fetched(workdir / 'model'), time.perf_counter()
  if cfg.dtype:
    model = _computing(model, cfg.dtype)
  scores = _Scores(cfg, model, workdir / 'scores')
  evaluator = Evaluator(model.cfg, model.params, model.tokenizer, room=cfg.room)
  rows = json_lines.read(workdir / ANSWERS)
  # Without what a kill has torn, behind which the next line would be lost.
  atomic.write_text(workdir / ANSWERS, ''.join(json.dumps(row) + '\n' for row in rows))
  done, todo = {_key(row) for row in rows}, list(_jobs(cfg))
  todo = [job for job in todo if job not in done]
  say(f'sweep: {len(cfg.points)} points; {len(done)} answers are there, {len(todo)} to go')
  gates = functools.lru_cache(maxsize=None)(
    lambda name, seed: _gates(cfg, model, scores, name, seed, workdir / 'gates')
  )
  # As large as the model for each such point, in memory and on disk.
  repaired = functools.cache(
    lambda name: evaluator.having(
      _repaired(cfg, model, name, gates(name, cfg.seeds[0]), workdir / 'repaired' / name)
    )
  )
  told, seconds = time.perf_counter(), []
  known = {_job(cfg, gates, row): row for row in rows if row['point'] in (DENSE, *cfg.points)}
  for i, (name, what, shots, seed) in enumerate(todo):
    closed = None if name == DENSE else gates(name, _seed_of(cfg, name, seed))
    own = repaired(name) if name != DENSE and cfg.points[name].repair else evaluator
    row, start = {'point': name, 'what': what, 'shots': shots, 'seed': seed}, time.perf_counter()
    job = _job(cfg, gates, row)
    if job in known:  # another point has the same gates
      row = known[job] | row
    elif what == 'perplexity':
      row['value'] = own.perplexity(_text(cfg, model), gates=closed)
    else:
      task = tasks[what]
      drawn = cfg.split, cfg.questions, shots, seed
      answered = own.ask(task, *drawn, closed, task.blank is not None, shared=True)
      row['plain'] = _bits(answered.correct)
      if answered.blank is not None:
        row['calibrated'] = _bits(answered.calibrated().correct)
    _append(workdir / ANSWERS, row)
    rows.append(row)
    known.setdefault(job, row)
    seconds.append(time.perf_counter() - start)
    if time.perf_counter() - told > 20 or i + 1 == len(todo):
      told = time.perf_counter()
      # Of most: some are behind a compilation.
      left = np.median(seconds) * (len(todo) - i - 1)
      say(f'sweep: {i + 1} of {len(todo)}: {name}, {what}; {log.duration(left)} left')
  summary = summarize(cfg, model, rows, lambda name: gates(name, cfg.seeds[0]))
  summary['rankings'] = importance_report.rankings(scores.kept())
  summary['seconds'] = time.perf_counter() - sweep_start
  atomic.write_text(workdir / SUMMARY, json.dumps(summary, indent=1) + '\n')
  for name, figure in importance_report.pictures(summary, scores.kept()).items():
    plots.save(figure, workdir / f'{name}.png')
  table = importance_report.tables(summary)
  atomic.write_text(workdir / 'table.md', table + '\n')
  say(f'{table}\nsweep: done; see {workdir}')
  return summary


def _claim(cfg: ImportanceConfig, workdir: Path) -> None:
  """Raises WorkdirError where another sweep, or something else, is at home."""
  own = json.loads(json.dumps(config_lib.to_dict(cfg)))
  path = workdir / CONFIG
  if not path.exists():
    workdirs.refuse_used(workdir)
    atomic.write_text(path, json.dumps(own, indent=1) + '\n')
    return
  # One that is older than a field had its default.
  default = json.loads(json.dumps(config_lib.to_dict(ImportanceConfig())))
  old = default | json.loads(path.read_text())
  point = config_lib.to_dict(PrunedConfig())
  old['points'] = {name: point | about for name, about in old['points'].items()}
  # Points may come, go and be asked or not: each has its own lines, which stay its own.
  points = old['points'] | own['points']
  old['points'] = {
    name: old['points'].get(name, point) | {'ask': point['ask']}
    for name, point in own['points'].items()
  }
  if changed := config_lib.differences(old, own):
    raise WorkdirError(f'{workdir} belongs to another sweep ({"; ".join(changed)}): choose another')
  atomic.write_text(path, json.dumps(own | {'points': points}, indent=1) + '\n')


def _whole(folder: Path) -> LmCheckpoint:
  model = lm_workdir.load(folder)
  if model.cut is not None:
    raise ConfigError(f'{folder} was pruned before: start from the model that it was cut from')
  if model.tokenizer is None:
    raise DataError(f'{folder} has no tokenizer beside it: import it again, with its own')
  return model


def _computing(model: LmCheckpoint, dtype: str) -> LmCheckpoint:
  cfg = dataclasses.replace(model.cfg, dtype=dtype, activation_dtype=dtype)
  return dataclasses.replace(model, cfg=cfg)


def _fetched(folder: Path) -> LmCheckpoint:
  from gatedfm.convert import lm_files

  if not (folder / checkpoints.CONFIG).exists():
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left unfinished
    lm_files.bring('smollm2', Path(), folder, 'float32', say)
  return _whole(folder)


def _jobs(cfg: ImportanceConfig) -> Iterator[tuple[str, str, int, int]]:
  """What is asked: all points' perplexity first, then a seed and a number of shots at a time."""
  names = [DENSE, *cfg.points]
  yield from ((name, 'perplexity', 0, cfg.seeds[0]) for name in names)
  asked = [name for name in names if name == DENSE or cfg.points[name].ask]
  for seed, shots, name, task in itertools.product(cfg.seeds, cfg.shots, asked, cfg.tasks):
    yield name, task, shots, seed


def _key(row: Mapping[str, Any]) -> tuple[str, str, int, int]:
  return row['point'], row['what'], row['shots'], row['seed']


def _job(cfg: ImportanceConfig, gates_of: Any, row: Mapping[str, Any]) -> tuple[Any, ...]:
  """What an answer depends on: points with the same gates answer alike, where none is repaired."""
  name, *about = _key(row)
  if name != DENSE:
    name = cfg.points[name].repair and name, _digest(gates_of(name, _seed_of(cfg, name, about[-1])))
  return name, *about


def _seed_of(cfg: ImportanceConfig, name: str, seed: int) -> int:
  point = cfg.points[name]
  return seed if point.scorer == 'random' and not point.repair else cfg.seeds[0]


def _bits(correct: np.ndarray) -> str:
  return ''.join('01'[int(c)] for c in correct)


def _append(path: Path, row: Mapping[str, Any]) -> None:
  with path.open('a', encoding='utf-8') as file:
    file.write(json.dumps(row) + '\n')
    file.flush()
    os.fsync(file.fileno())


def _text(cfg: ImportanceConfig, model: LmCheckpoint) -> str:
  """Questions' texts of the split that is asked, in their order."""
  tokens, parts = 0, []
  for question in questions.load(cfg.text).questions[cfg.split]:
    parts.append(question.context.split('\n')[0].split(': ', 1)[-1])
    tokens += len(model.tokenizer.encode(parts[-1]))
    if tokens >= cfg.text_tokens:
      break
  return '\n'.join(parts)


class _Scores:
  """Scores by task and number of shots, taken when they are first asked for, kept in files."""

  def __init__(self, cfg: ImportanceConfig, model: LmCheckpoint, folder: Path):
    self._cfg, self._model, self._folder = cfg, model, folder

  def aggregated(self, scorer: str, closed: Gates | None = None) -> Scores:
    """Of all tasks and numbers of shots."""
    each = [
      self.of(scorer, task, shots, closed)
      for task, shots in itertools.product(self._cfg.tasks, self._cfg.shots)
    ]
    return scorers.aggregate(each, self._cfg.aggregation)

  def of(self, scorer: str, task: str, shots: int, closed: Gates | None = None) -> Scores:
    """Of one task; points whose first steps close the same share what is scored behind them."""
    needs = scorers.get(scorer).needs
    removed = (site.split('/')[-1] for site in self._removed(needs))
    parts = (Path(task).stem, str(shots), *needs, *removed)
    folder = self._folder if closed is None else self._folder / 'rescored' / _digest(closed)
    path = folder / f'{"_".join(parts)}.npz'
    if not path.exists():
      stats = self._collect(task, shots, needs, closed)
      known = [n for n, s in scorers.SCORERS.items() if s.needs == needs]
      found = {n: self._score(n, stats) for n in known}
      flat = {f'{n}:{site}': v for n, scores in found.items() for site, v in scores.items()}
      score_files.save(path, flat)
    flat = score_files.load(path)
    return {k.split(':')[1]: v for k, v in flat.items() if k.startswith(f'{scorer}:')}

  def kept(self) -> dict[tuple[str, int], Scores]:
    """The dense model's, on disk, by task and number of shots, then by scorer and site."""
    out: dict[tuple[str, int], Scores] = {}
    for task, shots in itertools.product(self._cfg.tasks, self._cfg.shots):
      name = f'{Path(task).stem}_{shots}'
      for path in sorted([*self._folder.glob(f'{name}.npz'), *self._folder.glob(f'{name}_*.npz')]):
        out.setdefault((Path(task).stem, shots), {}).update(score_files.load(path))
    return out

  def _score(self, name: str, stats: Any, seed: int = 0) -> Scores:
    return scorers.get(name).score(Calibrated(self._model.cfg, self._model.params, stats, seed))

  def _collect(self, task: str, shots: int, needs: Sequence[str], closed: Gates | None) -> Any:
    if not needs:
      return None
    cfg, model = self._cfg, self._model
    number = cfg.removals if 'removals' in needs else cfg.examples
    how = Pruning('taylor', '', (task,), number, shots, seed=cfg.seeds[0])
    pairs = pruning_runs.texts(task, model, how)
    batches = lm_batches.batches(pairs, cfg.room, how.tokens, model.cfg.padding)
    tell = lambda line: say(f'{task}, {shots} shots, {"/".join(needs)}: {line}')
    return calibration.collect(
      model.cfg, model.params, batches, needs, tell, closed, self._removed(needs)
    )

  def _removed(self, needs: Sequence[str]) -> list[str]:
    """What the oracle is asked about: each is a pass per layer."""
    if 'removals' not in needs:
      return []
    mine = [p for p in self._cfg.points.values() if scorers.get(p.scorer).needs == needs]
    asked = {site for p in mine for site in allocation.parse_budget(p.budget)}
    return sorted(asked & {ATTENTION, FFN, LAYER})


def _digest(gates: Gates) -> str:
  parts = (name.encode() + np.asarray(g, np.float32).tobytes() for name, g in gates.values.items())
  return hashlib.sha256(b''.join(parts)).hexdigest()[:16]


def _gates(
  cfg: ImportanceConfig, model: LmCheckpoint, scores: _Scores, name: str, seed: int, folder: Path
) -> Gates:
  """Kept in a file, so that all answers of a point are of the same."""
  path = folder / f'{name}_{seed}.npz'
  if path.exists():
    return Gates(score_files.load(path))
  point = cfg.points[name]
  budget = allocation.parse_budget(point.budget)

  def scored(closed: Gates | None) -> Scores:
    if point.scorer == 'random':
      found = scorers.random(Calibrated(model.cfg, model.params, seed=seed))
    else:
      found = scores.aggregated(point.scorer, closed)
    return pruning_runs.weighed(point.scorer, budget, allocation.RAGGED, found)

  gates = pruning_runs.in_steps(scored, budget, model.cfg, point.steps)
  score_files.save(path, gates.values)
  return gates


def _repaired(
  cfg: ImportanceConfig, model: LmCheckpoint, name: str, closed: Gates, folder: Path
) -> dict[str, Any]:
  """Parameters fitted to those gates; kept in a workdir of a model of its own."""
  if not (folder / checkpoints.CONFIG).exists():
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left unfinished
    how = Pruning('taylor', '', cfg.tasks, cfg.examples, seed=cfg.seeds[0])
    dense = _computing(model, 'float32')
    params = pruning_runs.fitted(dense, closed, how, lambda line: say(f'{name}: {line}'))
    lm_workdir.save(folder, dataclasses.replace(model, params=params))
  return lm_workdir.load(folder).params


def summarize(
  cfg: ImportanceConfig, model: LmCheckpoint, rows: Sequence[Mapping[str, Any]], gates_of: Any
) -> dict[str, Any]:
  """Accuracies with intervals, differences from the dense model, perplexities, costs."""
  by_point: dict[str, list] = {name: [] for name in (DENSE, *cfg.points)}
  for row in rows:
    if row['point'] in by_point:
      by_point[row['point']].append(row)
  points = {}
  dense_costs = lm_costs.count(model.cfg, model.params, 512)
  for name, mine in by_point.items():
    about = {} if name == DENSE else dataclasses.asdict(cfg.points[name])
    for row in mine:
      if row['what'] == 'perplexity':
        about['perplexity'] = row['value']
    if name != DENSE:
      gates = gates_of(name)
      about['closed'] = {site: int((g == 0).sum()) for site, g in gates.values.items()}
      costs = lm_costs.count(model.cfg, lm_workdir.compacted(model, gates, {}).params, 512)
      about['kept'] = {k: costs[k] / dense_costs[k] for k in ('parameters', 'layer_macs')}
    if not about.get('ask', True):
      mine = []  # what it answered while it was asked
    for kind, shots in itertools.product(('plain', 'calibrated'), cfg.shots):
      counts = _counts(mine, kind, shots)
      if counts is not None:
        about[f'{kind}_{shots}'] = _accuracy(counts, _counts(by_point[DENSE], kind, shots))
    points[name] = about
  about = config_lib.to_dict(cfg)
  del about['points']
  origin = provenance.collect('gatedfm.sweep')
  return origin | {'config': about, 'model': dict(model.origin) | dense_costs, 'points': points}


def _counts(rows: Sequence[Mapping[str, Any]], kind: str, shots: int) -> metrics.Counts | None:
  """Of all tasks and seeds, in one order; None where there is none yet."""
  mine = [r for r in rows if kind in r and r['shots'] == shots]
  mine.sort(key=lambda r: (r['what'], r['seed']))
  if not mine:
    return None
  correct = [bit == '1' for r in mine for bit in r[kind]]
  return metrics.accuracy(correct, [r['what'] for r in mine for _ in r[kind]])


def _accuracy(counts: metrics.Counts, dense: metrics.Counts | None) -> dict[str, Any]:
  bounds = metrics.interval(counts)
  out = {'questions': len(counts.groups), 'tasks': sorted(set(counts.groups))}
  out['accuracy'] = counts.scores()
  out['interval'] = [bounds.low, bounds.high]
  if dense is not None and dense.groups == counts.groups:
    paired = metrics.difference_interval(counts, dense)
    out |= {'difference': paired.value, 'difference_interval': [paired.low, paired.high]}
  return out
