"""A run of induction scores: what it writes and refuses."""

import json

import numpy as np
import pytest
import tiny_speech
from flax import traverse_util

from gatedfm.analysis.induction import Induction
from gatedfm.data.types import DataError
from gatedfm.evaluation import induction_runs
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm
from gatedfm.models.lm_config import llama
from gatedfm.models.speech_config import ConfigError
from gatedfm.trainers.checkpoints import CheckpointError
from gatedfm.trainers.workdirs import WorkdirError

CFG = llama(
  vocab_size=40, d=12, layers=2, heads=4, kv_heads=2, head_width=4, ffn=10, bos=2, max_tokens=48
)
HOW = Induction(sequences=2, shortest=3, step=1, multiple=20)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  flat = tiny_speech.random_tree(lm.abstract_params(CFG), seed=3, scale=0.5)
  params = traverse_util.unflatten_dict(flat, sep='/')
  folder = tmp_path_factory.mktemp('lm') / 'dense'
  lm_workdir.save(folder, LmCheckpoint(CFG, params, None, {'format': 'test'}))
  return folder


@pytest.fixture(scope='module')
def importance(tmp_path_factory):
  path = tmp_path_factory.mktemp('scores') / 'scores.npz'
  np.savez(path, **{'decoder.attention_heads': np.arange(8.0).reshape(2, 4)})
  return path


def test_a_run(checkpoint, importance, tmp_path, fast_compilation):
  lines = []
  result = induction_runs.run(checkpoint, tmp_path / 'new', HOW, importance, lines.append)
  assert result == json.loads((tmp_path / 'new' / 'induction.json').read_text())
  assert result['induction']['mode'] == 'algorithm2'
  assert result['induction']['inputs'] == 'hidden'
  assert result['order'] == 'number'
  for measure, line in zip(('prefix_matching', 'copying'), lines, strict=True):
    mean, variance = (np.array(result[measure][k]) for k in ('mean', 'variance'))
    assert mean.shape == variance.shape == (2, 4)
    assert mean.max() > 0
    assert variance.max() > 0
    left = result[measure]['retained']
    assert left['closed'][10] == 0.5
    np.testing.assert_allclose(left['share'][10], mean[1].sum() / mean.sum())
    n, h = divmod(mean.argmax(), 4)
    assert f'highest: layer {n} head {h} {mean.max():.3f}' in line
    assert (tmp_path / 'new' / f'{measure}.png').stat().st_size > 1000
  with pytest.raises(WorkdirError, match='is not empty'):
    induction_runs.run(checkpoint, tmp_path / 'new', HOW)


def test_of_a_pruned_model(checkpoint, tmp_path, fast_compilation):
  heads = np.array([[1, 0, 1, 1], [0, 0, 0, 0]], np.float32)
  small = lm_workdir.compacted(
    lm_workdir.load(checkpoint), Gates({'decoder/attention_heads': heads}), {}
  )
  lm_workdir.save(tmp_path / 'small', small)
  result = induction_runs.run(tmp_path / 'small', tmp_path / 'new', HOW)
  mean = np.array(result['prefix_matching']['mean'])
  np.testing.assert_array_equal(mean > 0, heads > 0)
  assert 'retained' not in result['copying']


@pytest.mark.parametrize(
  ('scores', 'message'),
  [
    (None, 'does not exist; give the scores.npz of gatedfm.prune'),
    ({'decoder.ffn': np.ones(2)}, 'no scores of heads'),
    ({'decoder.attention_heads': np.ones((3, 4))}, r'scores \(3, 4\) heads; this model has \(2, 4'),
  ],
)
def test_scores_of_nothing_or_another_model(checkpoint, tmp_path, scores, message):
  path = tmp_path / 'scores.npz'
  if scores is not None:
    np.savez(path, **scores)
  with pytest.raises(DataError, match=message):
    induction_runs.run(checkpoint, tmp_path / 'new', HOW, path)
  assert not (tmp_path / 'new').exists()


def test_a_damaged_file_of_scores(tmp_path):
  (tmp_path / 'scores.npz').write_bytes(b'PK\x03\x04 nothing of the kind')
  with pytest.raises(DataError, match='is no scores.npz'):
    induction_runs.read_importance(tmp_path / 'scores.npz', CFG)
  np.save(tmp_path / 'one.npy', np.ones(3))
  with pytest.raises(DataError, match='is no scores.npz'):
    induction_runs.read_importance(tmp_path / 'one.npy', CFG)


def test_refusals_write_nothing(checkpoint, tmp_path):
  with pytest.raises(ConfigError, match='36 tokens to draw 60 from'):
    induction_runs.run(checkpoint, tmp_path / 'new', Induction(sequences=1, shortest=15))
  with pytest.raises(CheckpointError):
    induction_runs.run(tmp_path / 'none', tmp_path / 'new', HOW)
  assert not (tmp_path / 'new').exists()
