"""Checkpoints: what is kept, what is refused, and what parameters may lack."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedfm.trainers import checkpoints
from gatedfm.trainers.checkpoints import CheckpointError, Checkpoints


def state(value):
  return {
    'params': {'ffn': {'kernel': jnp.full((2, 3), value)}, 'encoder_gates': {'b': jnp.ones(4)}},
    'step': jnp.int32(value),
  }


def progress(batches):
  return {'next_batch': batches, 'seconds': 1.5}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Four saves, of which two are kept."""
  folder = tmp_path_factory.mktemp('run')
  with Checkpoints(folder, keep=2) as ckpt:
    assert ckpt.latest is None
    for step in (2, 4, 6, 8):
      ckpt.save(step, state(step), progress(10 * step))
    ckpt.save(8, state(99), progress(99))  # saved already, if only on its way: left alone
  return folder


def test_keeps_the_latest_whole(workdir):
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == ['6', '8']
  with Checkpoints(workdir) as ckpt:
    assert ckpt.latest == 8
    loaded, went = ckpt.load(jax.eval_shape(lambda: state(0)))
  jax.tree.map(np.testing.assert_array_equal, loaded, state(8))
  assert went == {'next_batch': 80, 'seconds': 1.5}


def test_an_unfinished_save_is_no_checkpoint(workdir, tmp_path):
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  # What orbax leaves where it was killed: a folder under a temporary name.
  (copy / 'checkpoints' / '10.orbax-checkpoint-tmp').mkdir()
  with Checkpoints(copy) as ckpt:
    assert ckpt.latest == 8
  np.testing.assert_array_equal(checkpoints.load_params(copy)['ffn']['kernel'], 8)


def test_a_state_of_another_optimizer_is_refused(workdir):
  abstract = jax.eval_shape(lambda: state(0) | {'momentum': jnp.ones(2)})
  with Checkpoints(workdir) as ckpt, pytest.raises(CheckpointError, match=r'momentum \(2,\): not'):
    ckpt.load(abstract)


def test_parameters_alone(workdir):
  loaded = checkpoints.load_params(workdir)
  jax.tree.map(np.testing.assert_array_equal, loaded, state(8)['params'])
  abstract = jax.eval_shape(lambda: state(0)['params'])
  fitted = checkpoints.load_params(workdir, abstract)
  jax.tree.map(np.testing.assert_array_equal, fitted, state(8)['params'])


def test_a_missing_optional_module_is_left_out(workdir):
  abstract = jax.eval_shape(lambda: state(0)['params'] | {'decoder_gates': {'b': jnp.ones(5)}})
  loaded = checkpoints.load_params(workdir, abstract, 'gate_predictor decoder_gates')
  assert sorted(loaded) == ['encoder_gates', 'ffn']
  with pytest.raises(CheckpointError, match=r'decoder_gates/b \(5,\): not in the checkpoint'):
    checkpoints.load_params(workdir, abstract)


def test_mismatches_are_all_listed(workdir):
  abstract = jax.eval_shape(
    lambda: {'ffn': {'kernel': jnp.ones((2, 4)), 'bias': jnp.ones(4)}, 'norm': jnp.ones(1)}
  )
  with pytest.raises(CheckpointError) as error:
    checkpoints.load_params(workdir, abstract, 'encoder_gates')
  message = str(error.value)
  assert message.startswith(f'4 arrays of {workdir} do not fit')
  for line in (
    'ffn/kernel: model (2, 4), checkpoint (2, 3)',
    'ffn/bias (4,): not in the checkpoint',
    'norm (1,): not in the checkpoint',
    'encoder_gates/b (4,): not in the model',
  ):
    assert line in message


def test_not_a_workdir(tmp_path):
  with pytest.raises(CheckpointError, match='has no config.json'):
    checkpoints.load_config(tmp_path)
  with pytest.raises(CheckpointError, match='has no checkpoints'):
    checkpoints.load_params(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(CheckpointError, match='no complete checkpoint'):
    checkpoints.load_params(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'model': {}, 'steps': 3}))
  assert checkpoints.load_config(tmp_path) == {'model': {}, 'steps': 3}
  with pytest.raises(CheckpointError, match='does not hold a language model'):
    checkpoints.load_config(tmp_path, 'language')
  (tmp_path / 'config.json').write_text(json.dumps({'language_model': {}}))
  with pytest.raises(CheckpointError, match='does not hold a speech model'):
    checkpoints.load_config(tmp_path)


def test_a_folder_of_runs_names_them(tmp_path):
  for name in ('gated', 'dense'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'config.json').write_text('{}')
  (tmp_path / 'notes').mkdir()
  message = f'is no run itself; give one of {tmp_path}/dense, {tmp_path}/gated$'
  with pytest.raises(CheckpointError, match=message):
    checkpoints.load_config(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(CheckpointError, match='nothing does not exist; give the workdir'):
    checkpoints.load_config(tmp_path / 'nothing')
