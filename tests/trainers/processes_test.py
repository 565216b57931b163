"""Training by two processes that share every batch, as hosts of a pod do.

The reference is one process with two devices: random numbers follow the layout of a batch.
"""

import fcntl
import json
import signal
import socket

import jax
import numpy as np
import pytest
import tiny_run

from gatedfm.trainers import checkpoints, workdirs


def start(tone_data, workdir):
  """Two processes on one workdir, one device each."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  arguments = ('--config=tests/tiny_run.py:dense', f'--workdir={workdir}')
  return [
    tiny_run.start(
      tone_data, 'train', *arguments,
      JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES='2', JAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]  # fmt: skip


def until_step(process, step):
  """Reads the first process's output until it has logged `step`."""
  for line in process.stdout:
    if line.startswith(f'step {step}/'):
      return
  pytest.fail(f'no step {step}: {process.stderr.read()}')


def test_two_processes_stop_together_and_end_like_one(tone_data, tmp_path):
  flags = f'{tiny_run.FAST} --xla_force_host_platform_device_count=2'
  arguments = ('--config=tests/tiny_run.py:dense', f'--workdir={tmp_path}/one')
  tiny_run.finish(tiny_run.start(tone_data, 'train', *arguments, XLA_FLAGS=flags))
  workdir = tmp_path / 'run'
  first, second = start(tone_data, workdir)
  until_step(first, 5)
  second.send_signal(signal.SIGTERM)  # one of them alone
  out, _ = tiny_run.finish(first, 143)
  tiny_run.finish(second, 143)
  saved = checkpoints.latest_step(workdir)
  assert 5 <= saved < tiny_run.STEPS
  assert f'SIGTERM: saved step {saved}' in out

  first, second = start(tone_data, workdir)
  out, _ = tiny_run.finish(first)
  tiny_run.finish(second)
  assert f'restore: resuming at step {saved}' in out
  assert "cpu mesh {'data': 2" in out
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows if 'train/loss' in r] == list(range(1, tiny_run.STEPS + 1))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, checkpoints.load_params(workdir), checkpoints.load_params(tmp_path / 'one'))


def test_a_workdir_in_use_is_refused_by_every_process(tone_data, tmp_path):
  with (tmp_path / workdirs.LOCK).open('w') as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    for process in start(tone_data, tmp_path):
      _, err = tiny_run.finish(process, 1)
      assert f'error: {tmp_path}: another process works here' in err
