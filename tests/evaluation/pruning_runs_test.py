"""A pruning run: what it writes, measures and refuses."""

import json

import numpy as np
import pytest
import tiny_speech
from flax import traverse_util
from tokenizers import Tokenizer, models, pre_tokenizers

from gatedfm.data.bpe import LmTokenizer
from gatedfm.data.types import DataError
from gatedfm.evaluation import lm_timing, pruning_runs
from gatedfm.evaluation.pruning_runs import Pruning
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm, lm_costs
from gatedfm.models.lm_config import llama
from gatedfm.models.speech_config import ConfigError
from gatedfm.pruning.allocation import Allocation
from gatedfm.trainers.workdirs import WorkdirError

CFG = llama(
  vocab_size=23, d=12, layers=2, heads=4, kv_heads=2, head_width=4, ffn=10, bos=22, max_tokens=64
)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  flat = tiny_speech.random_tree(lm.abstract_params(CFG), seed=3, scale=0.5)
  words = Tokenizer(models.WordLevel({f'w{i}': i for i in range(22)}, unk_token='w0'))
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  params = traverse_util.unflatten_dict(flat, sep='/')
  folder = tmp_path_factory.mktemp('lm') / 'dense'
  lm_workdir.save(folder, LmCheckpoint(CFG, params, LmTokenizer(words), {'format': 'test'}))
  return folder


@pytest.fixture(scope='module')
def own(tmp_path_factory):
  """Texts and questions of one's own."""
  folder = tmp_path_factory.mktemp('texts')
  (folder / 'a.txt').write_text(' '.join(f'w{i % 21}' for i in range(80)))
  rows = [
    {'context': f'w{i} w{i + 1}', 'choices': ['w1', 'w2 w3'], 'answer': i % 2, 'split': 'train'}
    for i in range(6)
  ]
  (folder / 'b.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return str(folder / 'a.txt'), str(folder / 'b.jsonl')


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
  assert (tmp_path / 'new' / 'heads.png').stat().st_size > 1000
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


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'scorer': 'best'}, ConfigError, "scorer is 'best'"),
    ({'budget': 'heads:2'}, ConfigError, 'between 0 and 1'),
    ({'calibration': ()}, ConfigError, 'scorer taylor reads texts'),
    ({'calibration': ('none.txt',)}, DataError, 'none.txt cannot be read'),
    ({'calibration': ('sst9',)}, DataError, "no task 'sst9'"),
    ({'examples': 0}, ConfigError, 'examples is 0'),
    ({'scorer': 'influence', 'budget': 'heads:0.5'}, ConfigError, 'no scores of decoder/att'),
  ],
)
def test_refusals_write_nothing(checkpoint, own, tmp_path, changes, error, message):
  with pytest.raises(error, match=message):
    pruning_runs.run(checkpoint, tmp_path / 'new', how(own, **changes))
  assert not (tmp_path / 'new').exists()


def test_costs_are_counted():
  shapes = traverse_util.unflatten_dict(lm.abstract_params(CFG), sep='/')
  d, k, f, v, t = 12, 4, 10, 23, 16
  layer = d * k * (2 * 4 + 2 * 2) + 3 * d * f
  costs = lm_costs.count(CFG, shapes, t)
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
