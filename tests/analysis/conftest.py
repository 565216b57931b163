"""A summary.json as an evaluation writes it, with made-up but plausible numbers."""

import json
import math

import numpy as np
import pytest

LANGUAGES = ('fra', 'spa', 'rus', 'ron', 'cat', 'bul', 'bel', 'ell', 'dan')
SITES = {
  'encoder/ffn1': 6,
  'encoder/attention': 6,
  'encoder/cgmlp': 6,
  'encoder/ffn2': 6,
  'decoder/self_attention': 3,
  'decoder/cross_attention': 3,
  'decoder/ffn': 3,
}
TASKS = ('asr', 'lid', 'st_eng')


@pytest.fixture
def summary(tmp_path):
  """Dense and three gated points; each workdir holds a metrics.jsonl."""
  points = {'dense': _point(tmp_path, 'dense', None, 1.0)}
  for target, ratio in ((0.3, 0.81), (0.5, 0.62), (0.7, 0.47)):
    name = f'gated_{target}'
    points[name] = _point(tmp_path, name, target, ratio)
  return {
    'schema': 1,
    'created': '2026-01-02T03:04:05+00:00',
    'seeds': [0, 1, 2],
    'versions': {'jax': '0.10.2', 'flax': '0.12.8', 'python': '3.11.2'},
    'git_revision': '0123456789abcdef',
    'device': 'cpu: 2 cores',
    'command': 'bash launch/local.sh --note="a < b & c"',
    'split': 'test',
    'data': {
      'train': {lang: {'utterances': 640 + i, 'hours': 0.26} for i, lang in enumerate(LANGUAGES)},
      'test': {lang: {'utterances': 80, 'hours': 0.033} for lang in LANGUAGES},
    },
    'points': points,
    'headline': {
      'point': 'gated_0.5',
      'time_ratio': 0.62,
      'cer_difference': points['gated_0.5']['cer']['mean'] - points['dense']['cer']['mean'],
    },
  }


def _point(folder, name, target, ratio):
  rng = np.random.default_rng(round(100 * ratio))
  sparsity = target or 0.0
  languages = {lang: 0.10 + 0.01 * i + 0.2 * sparsity**6 for i, lang in enumerate(LANGUAGES)}
  directions = {f'{lang}-eng': 18.0 + i - 5 * sparsity**3 for i, lang in enumerate(LANGUAGES)}
  with_mean = lambda values: values | {'mean': sum(values.values()) / len(values)}
  workdir = folder / name
  workdir.mkdir()
  _write_curves(workdir / 'metrics.jsonl', sparsity, rng)
  cer = with_mean(languages)
  return {
    'cer': cer,
    'wer': with_mean({lang: 2.1 * value for lang, value in languages.items()}),
    'bleu': with_mean(directions),
    'chrf': with_mean({key: 1.9 * value for key, value in directions.items()}),
    'lid': {'same_source': 0.9812 - 0.01 * sparsity, 'other_source': 0.7345},
    'sparsity': {
      'target': target,
      'modules': sparsity * 1.01,
      'macs': sparsity * 0.93,
      'sites': dict.fromkeys(SITES, sparsity),
    },
    'macs_per_audio_second': 412e6 * (1 - 0.8 * 0.93 * sparsity),
    'seconds_per_utterance': {
      'median': 0.0432 * ratio,
      'q25': 0.0391 * ratio,
      'q75': 0.0497 * ratio,
    },
    'time_ratio': ratio,
    'peak_memory_bytes': 812 * 2**20,
    'workdir': str(workdir),
    'gate_map': {'contexts': _contexts(sparsity, rng)} if target else None,
  }


def _contexts(sparsity, rng):
  """Gates that hang on the task above all."""
  fixed = {site: rng.normal(0, 1.5, n) for site, n in SITES.items()}
  contexts = []
  for task in TASKS:
    of_task = {site: rng.normal(0, 2.5, n) for site, n in SITES.items()}
    for lang in LANGUAGES:
      logits = {
        site: fixed[site] + of_task[site] + rng.normal(3 - 6 * sparsity, 0.7, n)
        for site, n in SITES.items()
      }
      contexts.append(
        {
          'language': lang,
          'task': task,
          'utterances': int(rng.integers(70, 90)),
          'open': {site: (1 / (1 + np.exp(-4 * x))).tolist() for site, x in logits.items()},
        }
      )
  return contexts


def _write_curves(path, sparsity, rng):
  rows = []
  for step in range(10, 2010, 10):
    loss = 0.4 + 4 * math.exp(-step / 500) + 0.08 * rng.normal()
    row = {'step': step, 'time': 0.4 * step, 'train/loss': loss, 'train/ctc_loss': loss}
    row['train/sparsity'] = sparsity * min(1, step / 800)
    if step % 200 == 0:
      row['validation/loss'] = loss + 0.15
    rows.append(json.dumps(row))
  path.write_text('\n'.join(rows) + '\n{"step": 2010, "train/lo')
