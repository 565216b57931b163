"""A sweep over embedding tables of text classifiers: trained, compressed, trained on, compared.

Every point is a workdir of its own: the same command resumes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats

from gatedfm import atomic, provenance
from gatedfm.analysis import plots, table_report
from gatedfm.evaluation.table_config import TableSweepConfig
from gatedfm.models.speech_config import ConfigError
from gatedfm.trainers import config as config_lib
from gatedfm.trainers import log, optimizer, text_corpus, text_loop, workdirs
from gatedfm.trainers.log import say
from gatedfm.trainers.text_config import TextTrainConfig
from gatedfm.trainers.text_corpus import TextCorpus


def run(cfg: TableSweepConfig, workdir: Path) -> dict[str, Any]:
  """Trains what is not trained yet, then compares all points with their baselines.

  Points whose loss is not finite, and what needs them, are left out and named in the summary.

  Args:
    cfg: the sweep.
    workdir: gets a folder per point, `summary.json`, `table.md` and pictures.

  Raises:
    ConfigError, WorkdirError, DataError, CheckpointError: what cannot be, before it is trained.
  """
  cfg.validate()
  workdirs.refuse_single(workdir)
  start, results, failed = time.perf_counter(), {}, {}
  corpora: dict[str, TextCorpus] = {}
  for name in cfg.points:  # all are looked at before the first is trained
    train = _placed(cfg, name, workdir)
    corpus = _corpus(train, corpora)
    table = train.classifier.table
    if train.init_from and not (table.rank or table.compression):
      continue  # of the rank of its parent
    try:
      text_loop.complete(train, corpus)
    except ConfigError as e:
      raise ConfigError(f'{name}: {e}') from None
  for i, name in enumerate(cfg.points):
    train = _placed(cfg, name, workdir)
    there = (workdir / name / text_loop.RESULT).exists()
    say(f'sweep: point {i + 1}/{len(cfg.points)}: {name}' + (', which is there' if there else ''))
    missing = {cfg.points[name].train.init_from, cfg.points[name].baseline} & set(failed)
    try:
      if missing:
        raise FloatingPointError(f'{" and ".join(sorted(missing))} failed')
      results[name] = text_loop.train(train, workdir / name, _corpus(train, corpora))
    except FloatingPointError as e:  # the others are worth having all the same
      failed[name] = str(e)
      say(f'  {name} failed: {e}')
    # Each point has programs of its own; of hundreds the process could map no more into memory.
    jax.clear_caches()
    if results and not there and i + 1 < len(cfg.points):
      left = _left(cfg, list(cfg.points)[i + 1 :], results, workdir)
      say(f'sweep: {log.duration(time.perf_counter() - start)} so far, about '
          f'{log.duration(left)} left')  # fmt: skip
  summary = summarize(cfg, results, workdir) | {'failed': failed}
  summary['seconds'] = sum(result['seconds'] for result in results.values())
  atomic.write_text(workdir / workdirs.SUMMARY, json.dumps(summary, indent=1) + '\n')
  pictures = table_report.pictures(summary)
  if any(point.train.epochs for point in cfg.points.values()):
    pictures['schedules'] = _schedules(cfg, corpora)
  for name, figure in pictures.items():
    plots.save(figure, workdir / f'{name}.png')
  table = table_report.table(summary)
  atomic.write_text(workdir / 'table.md', table + '\n')
  lost = ''.join(f'\n{name} failed: {why}' for name, why in failed.items())
  say(f'{table}{lost}\nsweep: done; see {workdir}')
  return summary


def _corpus(train: TextTrainConfig, corpora: dict[str, TextCorpus]) -> TextCorpus:
  """The texts of a training, which those that differ by offline compression alone share."""
  data = dataclasses.replace(train.data, offline='', offline_compression=0.0)
  key = json.dumps([config_lib.to_dict(data), train.data_dir, train.classifier.reference_compat])
  if key not in corpora:
    corpora[key] = text_loop.load_corpus(dataclasses.replace(train, data=data))
  return text_corpus.compressed(corpora[key], train.data)


def _placed(cfg: TableSweepConfig, name: str, workdir: Path) -> TextTrainConfig:
  """The training of a point, its parent by folder."""
  train = cfg.points[name].train
  parent = str(workdir / train.init_from) if train.init_from in cfg.points else train.init_from
  data_dir = train.data_dir or cfg.data_dir
  return dataclasses.replace(train, name=name, init_from=parent, data_dir=data_dir)


def _left(
  cfg: TableSweepConfig, names: Sequence[str], results: Mapping[str, Any], workdir: Path
) -> float:
  """Seconds that points take by those of the same texts and kind that are done."""

  def kind(name: str) -> tuple[Any, ...]:
    train = cfg.points[name].train
    return train.data.texts, train.classifier.kind, train.epochs > 0

  seconds: dict[tuple[Any, ...], list[float]] = {}
  for name, result in results.items():
    seconds.setdefault(kind(name), []).append(result['seconds'])
  known = np.mean([s for found in seconds.values() for s in found])
  missing = [name for name in names if not (workdir / name / text_loop.RESULT).exists()]
  return float(sum(np.mean(seconds.get(kind(name), [known])) for name in missing))


def _schedules(cfg: TableSweepConfig, corpora: Mapping[str, TextCorpus]) -> Any:
  """The learning rates in use, drawn over the trainings of the first set of texts."""
  first = next(iter(cfg.points.values())).train
  corpus = next(iter(corpora.values()))
  split = corpus.splits['train']
  each = len(text_corpus.Batches(split, first.data.batch, first.data.buckets, (0,)))
  curves, seen = {}, set()
  for point in cfg.points.values():
    train, how = point.train, point.train.optimizer
    key = how.schedule, how.half_cycle, how.decay, how.decay_every, how.final_fraction
    if train.data.texts != first.data.texts or not train.epochs or key in seen:
      continue
    seen.add(key)
    name = f'{how.schedule}, {point.method}' if how.schedule in curves else how.schedule
    rate = optimizer.learning_rate(how, how.peak_lr, train.epochs * each)
    curves[name] = jax.vmap(rate), train.epochs * each
  return table_report.schedules(curves, each)


def summarize(
  cfg: TableSweepConfig, results: Mapping[str, dict[str, Any]], workdir: Path
) -> dict[str, Any]:
  """Accuracies and sizes; what is lost to the baseline, with intervals over seeds and texts."""
  points = {}
  for name, result in results.items():
    point = cfg.points[name]
    train = point.train
    row = {
      'texts': train.data.texts,
      'kind': train.classifier.kind,
      'method': point.method,
      'compression': point.compression,
      'table': result['table'],
      'accuracy': {split: _mean(values) for split, values in result['accuracy'].items()},
      'seconds': result['seconds'],
    }
    if point.baseline:
      row['baseline'] = point.baseline
      mine, theirs = (_right(workdir / at) for at in (name, point.baseline))
      row['difference'] = {
        split: _difference(mine[split], theirs[split]) for split in result['accuracy']
      }
    points[name] = row
  texts = {cfg.points[name].train.data.texts: result['texts'] for name, result in results.items()}
  return {
    'schema': 1,
    **provenance.collect('gatedfm.sweep'),
    'seeds': sorted({seed for p in cfg.points.values() for seed in p.train.seeds}),
    'texts': texts,
    'points': points,
  }


def _right(folder: Path) -> dict[str, np.ndarray]:
  with np.load(folder / text_loop.RIGHT) as right:
    return {split: right[split] for split in right.files}


def _difference(mine_ZxN: np.ndarray, theirs_ZxN: np.ndarray) -> dict[str, Any]:
  """Of accuracies, with an interval over seeds, and over texts of the mean of these seeds."""
  each_ZxN = mine_ZxN.astype(np.float64) - theirs_ZxN
  out = _mean(each_ZxN.mean(1))
  spread = each_ZxN.mean(0).std(ddof=1) / math.sqrt(each_ZxN.shape[1])
  half = float(stats.norm.ppf(0.975) * spread)
  return out | {'texts_low': out['mean'] - half, 'texts_high': out['mean'] + half}


def _mean(values: Sequence[float]) -> dict[str, Any]:
  """Mean over seeds, its 95% interval (Student's t), and each seed's value."""
  values = np.asarray(values, np.float64)
  out = {'mean': float(values.mean()), 'values': values.tolist()}
  if len(values) > 1:
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    out |= {'low': out['mean'] - float(half), 'high': out['mean'] + float(half)}
  return out
