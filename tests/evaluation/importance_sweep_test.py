"""A sweep over pruned models: what it asks, keeps, resumes and sums up."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gatedfm import json_lines, metrics
from gatedfm.data import questions
from gatedfm.data.types import DataError
from gatedfm.evaluation import importance_sweep
from gatedfm.evaluation.few_shot import Evaluator
from gatedfm.evaluation.importance_config import ImportanceConfig, PrunedConfig
from gatedfm.execution import lm_workdir
from gatedfm.gates import Gates
from gatedfm.models.speech_config import ConfigError
from gatedfm.pruning import score_files
from gatedfm.trainers.checkpoints import CheckpointError
from gatedfm.trainers.workdirs import WorkdirError

POINTS = {
  'heads50': PrunedConfig('taylor', 'heads:0.5'),
  'random': PrunedConfig('random', 'heads:0.5'),
  'ffn50': PrunedConfig('oracle', 'ffn:0.5'),
  'steps': PrunedConfig('taylor', 'heads:0.5', 2),
  'on': PrunedConfig('taylor', 'heads:0.75', 3),
  'fitted': PrunedConfig('taylor', 'heads:0.5', repair=True),
  'same': PrunedConfig('taylor', 'heads:0.6'),  # four of eight, too
  'unasked': PrunedConfig('taylor', 'heads:0.9', ask=False),
}


@pytest.fixture(scope='module')
def cfg(checkpoint, own):
  return ImportanceConfig(
    checkpoint=str(checkpoint), tasks=(own[1],), shots=(0, 2), seeds=(0, 1), questions=5,
    examples=4, removals=4, text=own[1], text_tokens=12, room=64, points=POINTS,
  )  # fmt: skip


@pytest.fixture(scope='module')
def result(cfg, tmp_path_factory, fast_compilation):
  workdir = tmp_path_factory.mktemp('sweep') / 'run'
  return workdir, importance_sweep.run(cfg, workdir)


def test_every_point_is_asked_once(cfg, result):
  workdir, _ = result
  rows = json_lines.read(workdir / 'answers.jsonl')
  assert len(rows) == 8 * (1 + 2 * 2) + 1
  assert len({importance_sweep._key(row) for row in rows}) == len(rows)
  assert all(len(row['plain']) == 5 for row in rows if row['what'] != 'perplexity')


def test_answers_are_those_of_the_masked_model(cfg, result, checkpoint, own):
  workdir, _ = result
  model = lm_workdir.load(checkpoint)
  scores = score_files.load(workdir / 'scores' / 'b_2_gradients.npz')
  zero = score_files.load(workdir / 'scores' / 'b_0_gradients.npz')
  mean = (scores['taylor:decoder/attention_heads'] + zero['taylor:decoder/attention_heads']) / 2
  gates = np.ones(8, np.float32)
  gates[np.argsort(mean, axis=None)[:4]] = 0
  evaluator = Evaluator(model.cfg, model.params, model.tokenizer, room=64)
  task = questions.load(own[1])
  gates = Gates({'decoder/attention_heads': gates.reshape(2, 4)})
  want = evaluator.ask(task, 'test', 5, 2, 1, gates, shared=True).correct
  rows = {importance_sweep._key(row): row for row in json_lines.read(workdir / 'answers.jsonl')}
  assert rows['heads50', own[1], 2, 1]['plain'] == ''.join('01'[int(c)] for c in want)


def test_the_same_gates_are_asked_once(cfg, result, tmp_path, monkeypatch):
  _, summary = result
  same, first = (summary['points'][name] for name in ('same', 'heads50'))
  assert same['perplexity'] == first['perplexity']
  assert same['plain_2'] == first['plain_2']
  assert 'plain_0' not in summary['points']['unasked']
  assert summary['points']['unasked']['perplexity'] != first['perplexity']
  asked = []
  ask = Evaluator.ask
  monkeypatch.setattr(Evaluator, 'ask', lambda *a, **k: asked.append(a) or ask(*a, **k))
  few = dataclasses.replace(cfg, points={name: POINTS[name] for name in ('heads50', 'same')})
  importance_sweep.run(few, tmp_path)
  assert len(asked) == 2 * 4
  few.points['same'] = dataclasses.replace(POINTS['same'], ask=False)  # no longer
  assert 'plain_0' not in importance_sweep.run(few, tmp_path)['points']['same']


def test_steps_that_close_the_same_are_scored_once(result):
  rescored = list((result[0] / 'scores' / 'rescored').glob('*/*.npz'))
  assert len(rescored) == 2 * 2  # a quarter closed, of both points, and half; two numbers of shots


def test_other_products(cfg, result, tmp_path):
  names = ('heads50', 'fitted')
  few = dataclasses.replace(cfg, shots=(0,), seeds=(0,), points={n: POINTS[n] for n in names})
  other = importance_sweep.run(dataclasses.replace(few, dtype='bfloat16'), tmp_path)
  assert other['points']['dense']['perplexity'] != result[1]['points']['dense']['perplexity']
  assert other['points']['dense']['perplexity'] == pytest.approx(
    result[1]['points']['dense']['perplexity'], rel=0.05
  )
  mine, theirs = (
    score_files.load(f / 'scores' / 'b_0_gradients.npz') for f in (tmp_path, result[0])
  )
  for name, score in mine.items():
    assert np.isfinite(score).all()
    assert not np.array_equal(score, theirs[name])
    np.testing.assert_allclose(score, theirs[name], rtol=0.2, atol=0.05 * theirs[name].max())
  # Fits are in float32: those of the same gates are the same.
  gates = [score_files.load(f / 'gates' / 'fitted_0.npz') for f in (tmp_path, result[0])]
  same = all(np.array_equal(gates[0][name], gates[1][name]) for name in gates[0])
  fitted = [lm_workdir.load(f / 'repaired' / 'fitted') for f in (tmp_path, result[0])]
  assert (fitted[0].cfg.dtype, fitted[1].cfg.dtype) == ('bfloat16', 'float32')
  equal = jax.tree.map(np.array_equal, fitted[0].params, fitted[1].params)
  assert all(jax.tree.leaves(equal)) == same
  assert other['config']['dtype'] == 'bfloat16'


def test_the_summary(cfg, result, own):
  workdir, summary = result
  assert json.loads((workdir / 'summary.json').read_text()) == json.loads(json.dumps(summary))
  assert '| dense | 1.00 | 1.00 |' in (workdir / 'table.md').read_text()
  dense, point = summary['points']['dense'], summary['points']['heads50']
  assert point['closed'] == {'decoder/attention_heads': 4}
  assert 0.5 < point['kept']['layer_macs'] < 1
  assert point['perplexity'] != dense['perplexity']
  assert summary['points']['fitted']['perplexity'] != point['perplexity']
  rows = json_lines.read(workdir / 'answers.jsonl')
  bits = {n: ''.join(r['plain'] for r in rows if r['point'] == n and r['shots'] == 2)
          for n in ('dense', 'heads50')}  # fmt: skip
  counts = {n: metrics.accuracy([b == '1' for b in v], ['t'] * len(v)) for n, v in bits.items()}
  assert point['plain_2']['accuracy'][own[1]] == counts['heads50'].pooled()
  paired = metrics.difference_interval(counts['heads50'], counts['dense'])
  assert point['plain_2']['difference'] == pytest.approx(paired.value)
  assert 'calibrated_2' not in point  # own questions have none without content
  names = {path.stem for path in workdir.glob('*.png')}
  assert {'perplexity', 'accuracy_plain', 'agreement_heads', 'importance_heads'} <= names


def test_it_resumes_where_it_was_killed(cfg, result, tmp_path, monkeypatch):
  whole = (result[0] / 'answers.jsonl').read_text()
  importance_sweep._claim(cfg, tmp_path)
  lines = whole.splitlines()
  (tmp_path / 'answers.jsonl').write_text('\n'.join(lines[:9]) + '\n' + lines[9][:11])
  (tmp_path / 'scores').symlink_to(result[0] / 'scores')
  asked = []
  ask = Evaluator.ask
  monkeypatch.setattr(Evaluator, 'ask', lambda *a, **k: asked.append(a) or ask(*a, **k))
  few = dataclasses.replace(cfg, points={'heads50': POINTS['heads50'], 'random': POINTS['random']})
  importance_sweep.run(few, tmp_path)
  wanted = 3 * 4  # of which some are there
  had = [json.loads(line) for line in lines[:9]]
  had = [r for r in had if r['what'] != 'perplexity' and r['point'] in ('dense', *few.points)]
  assert len(asked) == wanted - len(had)
  asked.clear()
  importance_sweep.run(few, tmp_path)  # a torn line costs its own answer alone
  assert not asked
  text = (tmp_path / 'answers.jsonl').read_text()
  assert len(json_lines.read(tmp_path / 'answers.jsonl')) == len(text.splitlines())


def test_a_sweep_older_than_a_field_goes_on(cfg, tmp_path):
  importance_sweep._claim(cfg, tmp_path)
  path = tmp_path / 'sweep.json'
  old = json.loads(path.read_text())
  del old['dtype'], old['points']['random']['ask']
  path.write_text(json.dumps(old))
  importance_sweep._claim(cfg, tmp_path)
  with pytest.raises(WorkdirError, match="dtype: '' -> 'bfloat16'"):
    importance_sweep._claim(dataclasses.replace(cfg, dtype='bfloat16'), tmp_path)


def test_a_point_keeps_its_name(cfg, result):
  """One that was left out for a while does not come back as another."""
  workdir, _ = result
  fewer = {name: point for name, point in POINTS.items() if name != 'ffn50'}
  fewer['unasked'] = dataclasses.replace(POINTS['unasked'], ask=True)  # now it is
  importance_sweep._claim(dataclasses.replace(cfg, points=fewer), workdir)
  other = POINTS | {'ffn50': PrunedConfig('taylor', 'ffn:0.5')}
  with pytest.raises(WorkdirError, match='ffn50'):
    importance_sweep._claim(dataclasses.replace(cfg, points=other), workdir)
  importance_sweep._claim(cfg, workdir)


def test_refusals(cfg, result, tmp_path):
  with pytest.raises(WorkdirError, match='another sweep'):
    importance_sweep.run(dataclasses.replace(cfg, questions=4), result[0])
  for changes, message in (
    ({'points': {}}, 'needs points'),
    ({'points': {'dense': PrunedConfig('taylor', 'ffn:0.1')}}, 'name yours otherwise'),
    ({'points': {'a': PrunedConfig('best', 'ffn:0.1')}}, r'points.a: scorer'),
    ({'points': {'a': PrunedConfig('taylor', 'ffn:2')}}, r'points.a: budget'),
    ({'points': {'a': PrunedConfig('oracle', 'heads:0.5')}}, r'points.a: .* no scores'),
    ({'points': {'a': PrunedConfig('taylor', 'latency:0.5')}}, r'points.a: a budget in latency'),
    ({'questions': 0}, 'questions is 0'),
    ({'split': 'dev'}, 'split is'),
    ({'shots': (-1,)}, 'not be negative'),
    ({'aggregation': 'means'}, 'aggregation is'),
    ({'tasks': ('a/b.jsonl', 'c/b.jsonl')}, 'two tasks of one name'),
    ({'tasks': ('sst9',)}, "no task 'sst9'"),
    ({'shots': (10_000,)}, '10000 shots need'),
    ({'checkpoint': str(tmp_path / 'none')}, 'does not exist'),
  ):
    with pytest.raises((ConfigError, CheckpointError, DataError), match=message):
      importance_sweep.run(dataclasses.replace(cfg, **changes), tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
