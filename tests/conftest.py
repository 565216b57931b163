"""Before any test imports JAX: 8 CPU devices, and parsed flags for Grain's workers."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope='session')
def tone_data(tmp_path_factory):
  """Folder of a manifest of tones, their features and the programs compiled for them."""
  import tiny_run

  folder = tmp_path_factory.mktemp('tones')
  tiny_run.write_tones(folder)
  return folder


@pytest.fixture(scope='session')
def dense_run(tone_data):
  """Workdir of a trained dense model; copy it before changing anything."""
  import tiny_run

  workdir = tone_data / 'runs' / 'dense'
  tiny_run.finish(tiny_run.train(tone_data, workdir))
  return workdir


@pytest.fixture(scope='session')
def gated_run(tone_data, dense_run):
  """Workdir of the same model with gates, trained as a point of a sweep."""
  import tiny_run

  config = '--config=tests/tiny_run.py:sweep'
  workdir = dense_run.parent
  tiny_run.finish(
    tiny_run.start(tone_data, 'sweep', config, f'--workdir={workdir}', '--only=gated')
  )
  return workdir / 'gated'


@pytest.fixture(scope='module')
def fast_compilation(tone_data):
  """For tests that compile more than they compute."""
  import tiny_run

  tiny_run.compile_fast(tone_data / 'compiled_here')
  yield
  tiny_run.compile_fast(None)
