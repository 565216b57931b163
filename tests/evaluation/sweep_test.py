"""What a sweep refuses before it trains, and how it ends."""

import signal
import sys

import pytest
import tiny_run

from gatedfm.evaluation import sweep


@pytest.fixture
def training(tmp_path, monkeypatch):
  """Makes what stands for every training: a Python script."""

  def make(script):
    path = tmp_path / 'python'
    path.write_text(f'#!{sys.executable}\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(path))

  return make


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
