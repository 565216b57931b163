"""Before any test imports JAX: 8 CPU devices, and parsed flags for Grain's workers."""

import contextlib
import fcntl
import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def once(folder):
  """Yields whether the caller is to make `folder`; other test processes wait until it is made."""
  done = folder.with_name(f'{folder.name}.done')
  with folder.with_name(f'{folder.name}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield not done.exists()
    done.touch()


@pytest.fixture(scope='session')
def tone_data(tmp_path_factory, worker_id):
  """Folder of a manifest of tones, their features and the programs compiled for them.

  Test processes that run side by side share it.
  """
  import tiny_run

  base = tmp_path_factory.getbasetemp()
  folder = (base if worker_id == 'master' else base.parent) / 'tones'
  with once(folder) as mine:
    if mine:
      folder.mkdir()
      tiny_run.write_tones(folder)
  return folder


@pytest.fixture(scope='session')
def dense_run(tone_data):
  """Workdir of a trained dense model; copy it before changing anything."""
  import tiny_run

  workdir = tone_data / 'runs' / 'dense'
  workdir.parent.mkdir(exist_ok=True)
  with once(workdir) as mine:
    if mine:
      tiny_run.finish(tiny_run.train(tone_data, workdir))
  return workdir


@pytest.fixture(scope='session')
def gated_run(tone_data, dense_run):
  """Workdir of the same model with gates, trained as a point of a sweep."""
  import tiny_run

  workdir = dense_run.with_name('gated')
  config = ('--config=tests/tiny_run.py:sweep', f'--workdir={workdir.parent}', '--only=gated')
  with once(workdir) as mine:
    if mine:
      tiny_run.finish(tiny_run.start(tone_data, 'sweep', *config))
  return workdir


@pytest.fixture(scope='module')
def fast_compilation(tone_data, worker_id):
  """For tests that compile more than they compute."""
  import tiny_run

  tiny_run.compile_fast(tone_data / f'compiled_{worker_id}')
  yield
  tiny_run.compile_fast(None)
