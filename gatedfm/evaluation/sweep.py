"""A sweep: points trained one after the other, evaluated, timed side by side and reported.

Every stage leaves its result in the workdir and is not repeated: the same command resumes.
"""

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatedfm.data import corpus, sources
from gatedfm.data.types import SPLITS
from gatedfm.trainers import log, workdirs
from gatedfm.trainers.config import ConfigError, TrainConfig, choice
from gatedfm.trainers.log import say


@dataclasses.dataclass(slots=True)
class SweepConfig:
  """Points and how they are compared.

  Attributes:
    points: training configurations by name, in the order of training; `init_from` may name
      an earlier point. Times refer to the first.
    other: source for language identification away from the training source; '' = none.
    split: what the summary reports; `validation` while anything is still being chosen.
    timed: utterances per task for timing; rounds: passes over them; longest: in frames.
    execution: how gated points are timed: `skip`, one program for all gates, or `static`,
      programs per gate pattern, each to be compiled.
    data_dir: '' is `$GATEDFM_DATA` or the user's cache.
  """

  points: dict[str, TrainConfig] = dataclasses.field(default_factory=dict)
  other: str = ''
  split: str = 'test'
  timed: int = 40
  rounds: int = 5
  longest: int = 256
  execution: str = 'skip'
  data_dir: str = ''

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, before anything is trained."""
    choice('split', self.split, SPLITS)
    choice('execution', self.execution, ('skip', 'static'))
    if not self.points:
      raise ConfigError('a sweep needs at least one point')
    if self.timed < 1 or self.rounds < 1:
      raise ConfigError('timed and rounds must be at least 1')
    if self.other:
      sources.parse(self.other)
    names, compared = list(self.points), _compared(next(iter(self.points.values())))
    for i, (name, point) in enumerate(self.points.items()):
      point.validate()
      if self.execution == 'static' and point.model.gates.scope == 'layer':
        raise ConfigError(
          f'{name}.model.gates.scope is layer, but execution is static, which needs the gates of '
          'a stack before it runs: time with skip'
        )
      if self.other and 'lid' not in point.data.tasks:
        raise ConfigError(f'other is {self.other}, but {name} has no task lid: drop one')
      if point.init_from in names[i:]:
        raise ConfigError(
          f'{name}.init_from is {point.init_from}, which is not trained before {name}: put it first'
        )
      for field, value in _compared(point).items():
        if value != compared[field]:
          raise ConfigError(
            f'{name}.{field} is {value!r}, but that of {names[0]} is {compared[field]!r}: points '
            'are compared utterance by utterance; make two sweeps of them'
          )


def _compared(point: TrainConfig) -> dict[str, Any]:
  """What decides which utterances a point is scored on."""
  return {
    'data.sources': tuple(point.data.sources),
    'data.tasks': tuple(point.data.tasks),
    'model.max_tokens': point.model.max_tokens,
  }


def check(cfg: Any) -> SweepConfig:
  """Returns a sound sweep configuration; raises ConfigError on anything else."""
  if not isinstance(cfg, SweepConfig):
    raise ConfigError(f'the configuration is a {type(cfg).__name__}, not a SweepConfig: train one '
                      'model with python -m gatedfm.train')  # fmt: skip
  cfg.validate()
  return cfg


def run(cfg: SweepConfig, workdir: Path) -> None:
  """Trains what is not trained yet, then evaluates, times and reports all points.

  Each point trains in a process of its own, which gives its memory back.

  Args:
    cfg: the sweep.
    workdir: gets a folder per point, `summary.json` and `report.html`.

  Raises:
    ConfigError: an impossible configuration.
    WorkdirError: the workdir of a single training.
    DataError: data to evaluate on that cannot be had; nothing is trained then.
    SystemExit: a training failed or was stopped; its own message says why.
  """
  start = time.perf_counter()
  check(cfg)
  workdirs.refuse_single(workdir)
  _open_data(cfg)
  for i, name in enumerate(cfg.points):
    say(f'sweep: point {i + 1}/{len(cfg.points)}: {name}')
    command = [sys.executable, '-m', 'gatedfm.sweep', *sys.argv[1:], f'--only={name}']
    if code := _process(command):
      raise SystemExit(code)
    say(f'sweep: {log.duration(time.perf_counter() - start)} so far')
  from gatedfm.analysis import report
  from gatedfm.evaluation import points

  paths = {name: workdir / name for name in cfg.points}
  summary = points.summarize(
    paths, workdir, other=cfg.other, split=cfg.split, data_dir=cfg.data_dir,
    number=cfg.timed, rounds=cfg.rounds, longest=cfg.longest, execution=cfg.execution,
  )  # fmt: skip
  report.write_report(summary, workdir / 'report.html')
  say(report.table(summary))
  say(f'sweep: done in {log.duration(time.perf_counter() - start)}; see {workdir}/report.html')


def _open_data(cfg: SweepConfig) -> None:
  """Prepares what is evaluated on: better refused now than after hours of training."""
  first = next(iter(cfg.points.values()))
  folder = sources.data_folder(cfg.data_dir or first.data_dir)
  corpus.open_sources(first.data, cfg.split, folder, first.skip_bad)
  if cfg.other:
    sources.load(cfg.other, 'test', folder)


def _process(command: Sequence[str]) -> int:
  """Runs a command, hands SIGTERM on to it, and returns its exit status (128 + N for signal N).

  Left alone, a training would go on without the sweep that started it.
  """
  child, stopped = None, False

  def stop(*_: Any) -> None:
    nonlocal stopped
    stopped = True
    if child:
      child.terminate()

  before = signal.signal(signal.SIGTERM, stop)
  try:
    child = subprocess.Popen(command)
    if stopped:  # before there was a child
      child.terminate()
    code = child.wait()
  finally:
    if child and child.poll() is None:
      child.terminate()
    signal.signal(signal.SIGTERM, before)
  if code < 0:
    return 128 - code
  return code or (128 + signal.SIGTERM if stopped else 0)


def train_point(cfg: SweepConfig, workdir: Path, name: str) -> None:
  """Trains one point of the sweep in this process."""
  from gatedfm.trainers import loop

  choice('only', name, tuple(check(cfg).points))
  workdirs.refuse_single(workdir)
  train = cfg.points[name]
  train.name = name
  train.data_dir = train.data_dir or cfg.data_dir
  if train.init_from in cfg.points:
    train.init_from = str(workdir / train.init_from)
  loop.train(train, workdir / name)
