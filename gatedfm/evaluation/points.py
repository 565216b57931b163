"""Evaluates trained points and gathers them into one summary.

A *point* is one trained workdir: the dense model, or a gated one. Its quality goes to
`evaluation_SPLIT.json` beside the checkpoint and is reused while checkpoint and data stay the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm import atomic, compiling, metrics, provenance
from gatedfm import gates as gates_lib
from gatedfm.data import corpus, features, pipeline, sources
from gatedfm.data.types import SAMPLE_RATE, SPLITS, DataError
from gatedfm.evaluation import quality, timing
from gatedfm.execution.decoding import GREEDY, Search
from gatedfm.execution.recognizer import Recognizer
from gatedfm.models import speech_costs
from gatedfm.trainers import checkpoints, workdirs
from gatedfm.trainers import config as config_lib
from gatedfm.trainers.config import ConfigError
from gatedfm.trainers.log import say

LONGEST = 3_001  # frames of an utterance that is scored


def load_train_config(workdir: Path) -> config_lib.TrainConfig:
  """The configuration that a workdir was trained with."""
  return config_lib.from_dict(config_lib.TrainConfig, checkpoints.load_config(workdir))


def _splits(
  cfg: config_lib.TrainConfig, assets: corpus.Assets, split: str, other: str, data_dir: Path
) -> dict[str, corpus.Split]:
  # Scored on everything: an utterance too long to train on is still one to recognise.
  whole = {
    'max_frames': LONGEST,
    'loss_weights': (),  # of the trained tasks, which `other` does not have
    'max_tokens': cfg.model.max_tokens,
    'num_buckets': 2,
    'batch_frames': max(cfg.data.batch_frames, LONGEST + 8),  # rounded up to a multiple of 8
  }
  data = dataclasses.replace(cfg.data, bucket_frames=(), **whole)
  out = {'same': corpus.open_split(data, assets, split, data_dir, 1, cfg.skip_bad, say)}
  if other:
    if 'lid' not in cfg.data.tasks:
      raise ConfigError(f'{cfg.name or "the model"} does not identify languages: drop {other}')
    data = dataclasses.replace(data, sources=(other,), extra=(), tasks=('lid',))
    out['other'] = corpus.open_split(data, assets, 'test', data_dir, say=say)
  # One set of shapes, and so of programs, for both.
  shapes = pipeline.batch_shapes([s.examples for s in out.values()], data)
  return {name: dataclasses.replace(s, shapes=shapes) for name, s in out.items()}


def file_of(workdir: Path, split: str, ctc_weight: float | None, search: Search) -> Path:
  """`evaluation_SPLIT.json`, which sweeps read, or that of another search beside it."""
  plain = dataclasses.asdict(GREEDY)
  other = {k: v for k, v in dataclasses.asdict(search).items() if v != plain[k]}
  other |= {} if ctc_weight is None else {'ctc_weight': ctc_weight}
  return workdir / f'evaluation_{"_".join([split, *(f"{k}={v}" for k, v in other.items())])}.json'


def evaluate(
  workdir: Path,
  split: str = 'test',
  other: str = '',
  data_dir: str = '',
  ctc_weight: float | None = None,
  search: Search = GREEDY,
) -> dict:
  """Quality, gates and costs of a point on a split, from its file (`file_of`) where that is fresh.

  Args:
    workdir: of a training run.
    split: of the training sources; `test` reports once, `validation` may choose.
    other: source spec for language identification on another source than the trained one.
    data_dir: where data is prepared.
    ctc_weight: of CTC in joint decoding of transcripts; None is that of the training.
    search: how texts are searched for.

  Raises:
    CheckpointError: no trained model there.
    ConfigError: `other` for a model that does not identify languages.
    DataError: data that cannot be had.
  """
  path = file_of(workdir, split, ctc_weight, search)
  cfg = load_train_config(workdir)
  folder = sources.data_folder(data_dir or cfg.data_dir)
  key = {
    'step': checkpoints.latest_step(workdir),
    'split': split,
    'data': [s.fingerprint for s in corpus.open_sources(cfg.data, split, folder, cfg.skip_bad)],
    'other': [other, sources.load(other, 'test', folder).fingerprint] if other else [],
    'ctc_weight': cfg.ctc_weight if ctc_weight is None else ctc_weight,
    **({} if search == GREEDY else {'search': dataclasses.asdict(search)}),
  }
  outputs_path = path.with_name(path.stem.replace('evaluation', 'outputs', 1) + '.jsonl')
  if path.exists() and outputs_path.exists():
    saved = json.loads(path.read_text(encoding='utf-8'))
    # Who asks for no other source is served by an evaluation that had one, and does not lose it.
    if saved['key'] == key | ({} if other else {'other': saved['key']['other']}):
      return saved
  recognizer = Recognizer.load(workdir, 'mask', ctc_weight, search)
  assets = corpus.Assets.load(workdir / corpus.ASSETS)
  opened = _splits(cfg, assets, split, other, folder)
  shapes = opened['same'].shapes
  say(f'compiling: programs: {len(shapes)}, at a time: {compiling.workers()}')
  compiling.wait([p for s in shapes for p in recognizer.prepare(s.batch, s.frames)], say)
  gate_map, outputs = quality.decode_all(recognizer, opened['same'])
  counts = quality.counts(outputs)
  result = {name: c.scores() for name, c in counts.items() if name != 'lid'}
  result['interval'] = {
    name: [i.low, i.high] for name, c in counts.items() for i in [metrics.interval(c)]
  }
  lid = {
    'same_source': counts['lid'].pooled() if 'lid' in counts else None,
    'other_source': None,
  }
  if 'other' in opened:
    _, elsewhere = quality.decode_all(recognizer, opened['other'])
    lid['other_source'] = quality.counts(elsewhere)['lid'].pooled()
    lid['confusion_other_source'] = metrics.confusion(
      [r['reference'] for r in elsewhere], [r['hypothesis'] for r in elsewhere]
    )
  result |= {
    'key': key,
    'lid': lid,
    **_costs(cfg, gate_map, opened['same']),
    'gate_map': {'contexts': gate_map.contexts()} if cfg.model.gates.enabled else None,
    'workdir': str(workdir),
  }
  lines = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in outputs)
  path.unlink(missing_ok=True)  # of other outputs; a kill leaves none rather than that
  atomic.write_text(outputs_path, lines)
  atomic.write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + '\n')
  return result


def _costs(cfg: config_lib.TrainConfig, gate_map: quality.GateMap, split: corpus.Split) -> dict:
  """Sparsity by site, by modules and by MACs, and MACs per second of audio."""
  model, sites = cfg.model, cfg.model.sites() if cfg.model.gates.enabled else ()
  mean = gate_map.mean()
  gates = gates_lib.Gates({s.name: mean[s.name] for s in sites})
  examples = split.examples
  frames = int(np.mean(examples.frames))
  tokens = int(np.mean(examples.target_lengths))
  costs = speech_costs.site_costs(model, frames, tokens)
  closed = lambda by: float(gates_lib.sparsity(gates, sites, by)) if sites else 0.0
  return {
    'sparsity': {
      'target': cfg.sparsity.target if sites else None,
      'modules': closed(None),
      'macs': closed(costs),
      'sites': {k: float(v) for k, v in gates_lib.sparsity_by_site(gates, sites).items()},
    },
    'macs_per_audio_second': speech_costs.macs_per_audio_second(model, frames, tokens, gates),
  }


def timing_utterances(
  cfg: config_lib.TrainConfig,
  languages: Sequence[str],
  data_dir: Path,
  split: str,
  number: int,
  longest: int,
) -> list[timing.Utterance]:
  """`number` utterances of each source and task, evenly over the split, of known languages.

  None is longer than `longest` frames; where all are longer, the shortest.
  """
  out = []
  for source in corpus.open_sources(cfg.data, split, data_dir, cfg.skip_bad):
    frames = np.array([features.num_frames(r.num_samples) for r in source.records])
    known = np.flatnonzero([r.language in languages for r in source.records])
    rows = known[frames[known] <= longest]
    if not len(rows):
      rows = known[np.argsort(frames[known], kind='stable')[:number]]
    picked = [rows[j] for j in np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(int)]
    out += [
      timing.Utterance(source.audio(i), source.records[i].language, task)
      for task in cfg.data.tasks
      for i in picked
    ]
  return out


def summarize(
  points: Mapping[str, Path],
  workdir: Path,
  *,
  other: str = '',
  split: str = 'test',
  data_dir: str = '',
  number: int = 40,
  rounds: int = 5,
  longest: int = 256,
  execution: str = 'skip',
) -> dict[str, Any]:
  """Evaluates and times all points and writes `summary.json` in `workdir`.

  Args:
    points: trained workdirs by name; times refer to the first, and so do differences
      without a parent.
    other, split, data_dir: see `evaluate`.
    number, rounds, longest: utterances per task, passes and longest frames for timing.
    execution: how gated points are timed, `skip` or `static`; a model without gates is one
      program, which has nothing to skip.
  """
  quality_of = {}
  for name, path in points.items():
    say(f'evaluate: {name}')
    quality_of[name] = evaluate(path, split, other, data_dir)
  baseline = next(iter(points))
  cfg = load_train_config(points[baseline])
  folder = sources.data_folder(data_dir or cfg.data_dir)
  languages = corpus.Assets.load(points[baseline] / corpus.ASSETS).tokenizer.languages
  utterances = timing_utterances(cfg, languages, folder, split, number, longest)
  say(f'time: {len(points)} points side by side on {len(utterances)} utterances x {rounds} rounds')
  executions = {
    name: execution if load_train_config(path).model.gates.enabled else 'skip'
    for name, path in points.items()
  }
  recognizers = {name: Recognizer.load(path, executions[name]) for name, path in points.items()}
  times = timing.side_by_side(recognizers, utterances, rounds)
  rows = {name: quality_of[name] | times[name] | {'execution': executions[name]} for name in points}
  outputs = {name: _outputs(points[name], split) for name in points}
  for name in points:
    # A gated point is compared with the dense model that it was made of.
    parent = Path(load_train_config(points[name]).init_from).name
    rows[name]['parent'] = parent if parent in points else baseline
    rows[name]['difference'] = _differences(outputs[name], outputs[rows[name]['parent']])
  summary = {
    'schema': 1,
    **provenance.collect('gatedfm.sweep'),
    'seeds': sorted({load_train_config(p).seed for p in points.values()}),
    'split': split,
    'data': _data(cfg, folder),
    'points': rows,
    'headline': _headline(rows),
  }
  atomic.write_text(
    workdir / workdirs.SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + '\n'
  )
  return summary


def _outputs(workdir: Path, split: str) -> list[dict[str, str]]:
  with (workdir / f'outputs_{split}.jsonl').open(encoding='utf-8') as lines:
    return [json.loads(line) for line in lines]


def _differences(mine: Sequence[dict], baseline: Sequence[dict]) -> dict[str, dict[str, float]]:
  """Point minus parent for every metric's mean, with its paired 95% bootstrap interval.

  Over the utterances that both scored: tokenizers may differ in which texts are too long.
  """
  key = lambda r: (r['id'], r['task'])
  both = set(map(key, mine)) & set(map(key, baseline))
  common = lambda rows: sorted((r for r in rows if key(r) in both), key=key)
  a, b = (quality.counts(common(rows)) for rows in (mine, baseline))
  out = {}
  for name in a:
    i = metrics.difference_interval(a[name], b[name])
    out[name] = {'value': i.value, 'low': i.low, 'high': i.high}
  return out


def _data(cfg: config_lib.TrainConfig, data_dir: Path) -> dict[str, dict]:
  """Utterances and hours by split and language, of the splits that there are."""
  out: dict[str, dict] = {}
  for split in SPLITS:
    rows: dict[str, dict] = {}
    for spec in cfg.data.sources:
      # What was scored is there; a source need not have every split.
      with contextlib.suppress(DataError):
        for r in sources.load(spec, split, data_dir, cfg.skip_bad).records:
          row = rows.setdefault(r.language, {'utterances': 0, 'hours': 0.0})
          row['utterances'] += 1
          row['hours'] += r.num_samples / SAMPLE_RATE / 3600
    if rows:
      out[split] = dict(sorted(rows.items()))
  return out


def _headline(rows: Mapping[str, dict]) -> dict[str, Any]:
  """The fastest gated point whose CER is not worse than its parent's beyond the interval."""
  gated = {n: r for n, r in rows.items() if r['gate_map']}
  if not gated:
    return {}
  fine = {n: r for n, r in gated.items() if r['difference'].get('cer', {'low': 0})['low'] <= 0}
  name = min(fine or gated, key=lambda n: gated[n]['time_ratio'])
  row = rows[name]
  difference = {f'{k}_difference': v['value'] for k, v in row['difference'].items()}
  if cer := row['difference'].get('cer'):
    difference['cer_difference_interval'] = [cer['low'], cer['high']]
  return {
    'point': name,
    'time_ratio': row['time_ratio'],
    'no_worse': name in fine,
  } | difference
