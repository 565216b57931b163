"""What a sweep refuses before it trains, and how it ends."""

import json
import signal
import sys

import pytest
import tiny_run

from gatedfm.data.types import DataError
from gatedfm.evaluation import sweep
from gatedfm.trainers.config import ConfigError


@pytest.fixture
def training(tmp_path, monkeypatch):
  """Makes what stands for every training: a Python script."""

  def make(script):
    path = tmp_path / 'python'
    path.write_text(f'#!{sys.executable}\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(path))

  return make


def test_a_parent_is_trained_before_its_children(tone_data):
  cfg = tiny_run.sweep(tone_data)
  cfg.validate()
  cfg.points = dict(reversed(cfg.points.items()))
  with pytest.raises(ConfigError, match=r'gated.init_from is dense, .* not trained before gated'):
    cfg.validate()


@pytest.mark.parametrize(
  ('section', 'field', 'value'),
  [
    ('data', 'sources', ('espeak',)),
    ('data', 'tasks', ('asr', 'lid')),
    ('model', 'max_tokens', 33),
  ],
)
def test_points_that_cannot_be_compared_are_refused(tone_data, section, field, value):
  cfg = tiny_run.sweep(tone_data)
  cfg.points['gated'].data.loss_weights = ()
  setattr(getattr(cfg.points['gated'], section), field, value)
  with pytest.raises(ConfigError, match=rf'gated.{section}.{field} is .*, but that of dense is'):
    cfg.validate()


def test_static_timing_needs_gates_decided_before_a_stack(tone_data):
  cfg = tiny_run.sweep(tone_data)
  cfg.execution = 'static'
  cfg.validate()
  cfg.points['gated'].model.gates.scope = 'layer'
  with pytest.raises(ConfigError, match=r'gated.model.gates.scope is layer.*time with skip'):
    cfg.validate()
  cfg.execution = 'mask'
  with pytest.raises(ConfigError, match='execution'):
    cfg.validate()


@pytest.mark.parametrize('missing', ['split', 'other'])
def test_data_to_evaluate_on_is_opened_before_training(tone_data, tmp_path, training, missing):
  training('raise SystemExit("trains")')
  manifest, lines = tmp_path / 'part.jsonl', (tone_data / 'manifest.jsonl').open()
  rows = [json.loads(line) for line in lines]
  kept = [r | {'audio': str(tone_data / r['audio'])} for r in rows if r['split'] != 'test']
  manifest.write_text(''.join(json.dumps(r) + '\n' for r in kept))
  cfg = tiny_run.sweep(tone_data)
  if missing == 'other':
    cfg.other = f'manifest:{manifest}'
  else:
    for point in cfg.points.values():
      point.data.sources = (f'manifest:{manifest}',)
  with pytest.raises(DataError, match="part.jsonl has no good line in the split 'test'"):
    sweep.run(cfg, tmp_path)


def test_without_a_folder_of_its_own_data_is_where_the_environment_says(
  tone_data, tmp_path, training, monkeypatch
):
  training('raise SystemExit("trains")')
  cfg = tiny_run.sweep(tone_data)
  monkeypatch.setenv('GATEDFM_DATA', cfg.points['dense'].data_dir)
  for point in cfg.points.values():
    point.data_dir = ''
  with pytest.raises(SystemExit):
    sweep.run(cfg, tmp_path)


@pytest.mark.parametrize(
  ('script', 'code'),
  [('raise SystemExit(3)', 3), ('import os; os.kill(os.getpid(), 9)', 128 + signal.SIGKILL)],
)
def test_a_sweep_stops_where_a_training_does(tone_data, tmp_path, training, script, code):
  training(script)
  with pytest.raises(SystemExit) as stopped:
    sweep.run(tiny_run.sweep(tone_data), tmp_path)
  assert stopped.value.code == code


HANDLES_SIGTERM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(20)
"""


@pytest.mark.parametrize('code', [143, 0])
def test_sigterm_reaches_the_training_and_ends_the_sweep(tone_data, tmp_path, training, code):
  """Also where the training had just come to its end."""
  training(HANDLES_SIGTERM.format(code=code))
  mine = lambda *_: pytest.fail('not handed on')
  before = signal.signal(signal.SIGTERM, mine)
  try:
    with pytest.raises(SystemExit) as stopped:
      sweep.run(tiny_run.sweep(tone_data), tmp_path)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is mine
  finally:
    signal.signal(signal.SIGTERM, before)
