"""A pruning run: what it writes, measures and refuses."""

import json

import jax
import numpy as np
import pytest
import tiny_lm
from flax import traverse_util

from gatedfm.data.types import DataError
from gatedfm.evaluation import lm_timing, pruning_runs
from gatedfm.evaluation.pruning_runs import Pruning
from gatedfm.execution import lm_workdir
from gatedfm.gates import Gates
from gatedfm.models import lm, lm_costs
from gatedfm.models.speech_config import ConfigError
from gatedfm.pruning import allocation
from gatedfm.pruning.allocation import Allocation
from gatedfm.pruning.calibration import HEADS
from gatedfm.trainers.workdirs import WorkdirError


def how(own, **changes):
  options = {'calibration': own, 'examples': 4, 'tokens': 16, 'rounds': 2, 'shots': 1}
  return Pruning(**({'scorer': 'taylor', 'budget': 'heads:0.5,ffn:0.5'} | options | changes))


def test_a_run(checkpoint, own, tmp_path, fast_compilation):
  lines = []
  report = pruning_runs.run(checkpoint, tmp_path / 'new', how(own), lines.append)
  assert report == json.loads((tmp_path / 'new' / 'report.json').read_text())
  assert report['closed'] == {'decoder/attention_heads': '4 of 8', 'decoder/ffn': '1 of 2'}
  dense, pruned = report['dense'], report['pruned']
  for name in ('parameters', 'bytes', 'macs', 'layer_macs'):
    assert pruned[name] < dense[name]
  assert pruned['kv_bytes'] <= dense['kv_bytes']
  assert dense['prefill_ratio']['median'] == 1
  assert pruned['token']['median'] > 0
  for name in ('heads', 'ffn'):
    assert (tmp_path / 'new' / f'{name}.png').stat().st_size > 1000
  scores = np.load(tmp_path / 'new' / 'scores.npz')
  assert scores['decoder.attention_heads'].shape == (2, 4)
  small = lm_workdir.load(tmp_path / 'new')
  assert small.origin['parent'] == str(checkpoint)
  assert small.origin['pruning']['budget'] == 'heads:0.5,ffn:0.5'
  kept = small.cut['decoder/attention_heads']
  score = scores['decoder.attention_heads']
  assert score[kept == 0].max() < score[kept == 1].min()
  assert any('calibration: 1 of 1 batches' in line for line in lines)
  assert lines[-1].startswith('time: prefill')
  with pytest.raises(ConfigError, match='was pruned before'):
    pruning_runs.run(tmp_path / 'new', tmp_path / 'again', how(own))
  with pytest.raises(WorkdirError, match='is not empty'):
    pruning_runs.run(checkpoint, tmp_path / 'new', how(own))


def test_without_texts_and_timing(checkpoint, tmp_path):
  options = {'scorer': 'magnitude', 'budget': 'channels:0.5', 'calibration': (), 'rounds': 0}
  shape = Allocation('uniform')
  report = pruning_runs.run(checkpoint, tmp_path / 'new', how((), **options, allocation=shape))
  assert 'prefill' not in report['pruned']
  kept = lm_workdir.load(tmp_path / 'new').cut['decoder/ffn_channels']
  assert (kept.sum(1) == 5).all()


def test_in_steps_what_is_left_is_scored_anew(checkpoint, own):
  dense = lm_workdir.load(checkpoint)
  once, seen = pruning_runs.score(dense, how(own), print), []

  def score(closed):
    seen.append(closed)
    return once if closed is None else pruning_runs.score(dense, how(own), print, closed)

  gates = pruning_runs.in_steps(score, {HEADS: 0.75}, tiny_lm.WORDS, 3)
  assert [s if s is None else int((s[HEADS] == 0).sum()) for s in seen] == [None, 2, 4]
  assert (gates[HEADS] == 0).sum() == 6
  assert (gates[HEADS] <= seen[2][HEADS]).all()
  half = allocation.allocate(score(seen[2]), {HEADS: 0.75}, tiny_lm.WORDS, closed=seen[2])
  np.testing.assert_array_equal(gates[HEADS], half[HEADS])


def test_repair_leaves_shapes_and_changes_what_is_written(checkpoint, own, tmp_path):
  plain, fitted = how(own, rounds=0), how(own, rounds=0, repair=True)
  pruning_runs.run(checkpoint, tmp_path / 'plain', plain)
  pruning_runs.run(checkpoint, tmp_path / 'fitted', fitted)
  a, b = (lm_workdir.load(tmp_path / name) for name in ('plain', 'fitted'))
  assert jax.tree.map(np.shape, a.params) == jax.tree.map(np.shape, b.params)
  kernel = lambda m: m.params['decoder']['layers']['layers_1']['attention']['attention']['out']
  assert not np.allclose(kernel(a)['kernel'].value, kernel(b)['kernel'].value)


@pytest.mark.parametrize('possible', [True, False])
def test_a_budget_in_latency_is_measured(checkpoint, own, monkeypatch, possible):
  """A machine on which time is MACs, or does not change at all."""
  dense, asked = lm_workdir.load(checkpoint), how(own, budget='latency:0.3')

  def times(models, tokens, rounds, writes):
    macs = [lm_costs.count(m.cfg, m.params, 512)['macs'] for m in models.values()]
    return {'pruned': {'prefill_ratio': {'median': macs[1] / macs[0] if possible else 1.0}}}

  monkeypatch.setattr(lm_timing, 'side_by_side', times)
  scores, lines = pruning_runs.score(dense, asked, print), []
  if not possible:
    with pytest.raises(ConfigError, match='not reached in 5 trials of closing heads, ffn'):
      pruning_runs.close(dense, scores, asked, lines.append)
    return
  gates = pruning_runs.close(dense, scores, asked, lines.append)
  small = lm_workdir.compacted(dense, gates, {})
  left = [lm_costs.count(m.cfg, m.params, 512)['macs'] for m in (small, dense)]
  assert 0.5 < left[0] / left[1] <= 0.7
  assert len(lines) > 1


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'scorer': 'best'}, ConfigError, "scorer is 'best'"),
    ({'budget': 'heads:2'}, ConfigError, 'between 0 and 1'),
    ({'budget': 'heads:0.1'}, ConfigError, 'closes none of 8 attention_heads'),
    ({'calibration': ()}, ConfigError, 'scorer taylor reads texts'),
    ({'calibration': ('none.txt',)}, DataError, 'none.txt cannot be read'),
    ({'calibration': ('sst9',)}, DataError, "no task 'sst9'"),
    ({'examples': 0}, ConfigError, 'examples is 0'),
    ({'steps': 0}, ConfigError, 'steps is 0'),
    ({'budget': 'latency:0.2', 'rounds': 0}, ConfigError, 'is measured'),
    ({'scorer': 'random', 'calibration': (), 'repair': True}, ConfigError, 'repair reads texts'),
    ({'scorer': 'influence', 'budget': 'heads:0.5'}, ConfigError, 'no scores of decoder/att'),
  ],
)
def test_refusals_write_nothing(checkpoint, own, tmp_path, changes, error, message):
  with pytest.raises(error, match=message):
    pruning_runs.run(checkpoint, tmp_path / 'new', how(own, **changes))
  assert not (tmp_path / 'new').exists()


def test_costs_are_counted():
  shapes = traverse_util.unflatten_dict(lm.abstract_params(tiny_lm.WORDS), sep='/')
  d, k, f, v, t = 12, 4, 10, 23, 16
  layer = d * k * (2 * 4 + 2 * 2) + 3 * d * f
  costs = lm_costs.count(tiny_lm.WORDS, shapes, t)
  assert costs['parameters'] == 2 * (layer + 2 * d) + d + v * d  # tied embeddings
  assert costs['bytes'] == 4 * costs['parameters']
  assert costs['layer_macs'] == 2 * (layer * t + 2 * 4 * k * t * (t + 1) // 2)
  assert costs['macs'] == costs['layer_macs'] + v * d * t
  assert costs['kv_bytes'] == 2 * 2 * 2 * k * t * 4


def test_timed_models_write_what_they_are(checkpoint):
  """The text that is timed is read as any other: its last logits are those of a forward pass."""
  dense = lm_workdir.load(checkpoint)
  gates = Gates({'decoder/attention': np.array([1.0, 0.0], np.float32)})
  small = lm_workdir.compacted(dense, gates, {})
  for model in (dense, small):
    read, write = lm_timing._calls(model, 8, 3)
    logits, caches = read()
    net, params = lm.for_inference(model.cfg, model.params)
    ids = np.random.default_rng(0).integers(0, 23, (1, 8))
    want = net.apply({'params': params}, ids, None, model.fixed())[:, -1]
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)
    assert write().shape == (1, 1)
    # Of an attention that is gone there is nothing to keep.
    assert [c.key.shape[1] for c in caches] == [2, 2 if model is dense else 0]
