"""Metrics to JSONL (the truth) and TensorBoard, and one console line per interval."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gatedfm import atomic, json_lines


def say(message: str) -> None:
  """A line for people, at once."""
  print(message, flush=True)


def duration(seconds: float) -> str:
  """`1:02:03` or `2:03`."""
  minutes, s = divmod(round(max(seconds, 0)), 60)
  hours, m = divmod(minutes, 60)
  return f'{hours}:{m:02}:{s:02}' if hours else f'{m}:{s:02}'


class Log:
  """Writes `metrics.jsonl` and TensorBoard events of a workdir.

  Args:
    workdir: where.
    step: step that the run starts from: what stands in the file beyond it belongs to steps
      that a killed run did not save, and is dropped, since they are about to be run again;
      TensorBoard is told to hide its events.
    tensorboard: whether to write events too.
  """

  def __init__(self, workdir: Path, step: int, tensorboard: bool):
    self._path = workdir / 'metrics.jsonl'
    rows = [r for r in json_lines.read(self._path) if r['step'] <= step]
    atomic.write_text(self._path, ''.join(json.dumps(r) + '\n' for r in rows))
    self._file = open(self._path, 'a')  # noqa: SIM115
    self._events = None
    if tensorboard:
      import tensorboardX

      self._events = tensorboardX.SummaryWriter(str(workdir / 'events'), purge_step=step + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Appends one row; values are host floats under slash names."""
    row = {'step': step, 'time': round(time.time(), 3)} | values
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in values.items() if self._events else ():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    if self._events:
      self._events.close()


class Clock:
  """Seconds that a workdir has taken, and the time that is left at the pace of its steps."""

  def __init__(self, steps: int, seconds: float):
    self._steps, self._before = steps, seconds
    self._start = time.perf_counter()
    self.begin(0)

  def begin(self, step: int) -> None:
    """The pace is that of the steps after this one."""
    self._first, self._paused = step, time.perf_counter() - self._start

  def pause(self, seconds: float) -> None:
    """Takes `seconds` (of compiling or evaluating) out of the pace."""
    self._paused += seconds

  @property
  def seconds(self) -> float:
    """Of all calls on this workdir, pauses included."""
    return self._before + time.perf_counter() - self._start

  def eta(self, step: int) -> float:
    """Seconds to the last step at the pace so far; `step` is later than that of `begin`."""
    pace = (time.perf_counter() - self._start - self._paused) / (step - self._first)
    return pace * (self._steps - step)


# Dense peak of one device, in FLOP/s of bfloat16 products (vendors' data sheets).
_PEAKS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
}


@functools.cache
def peak_flops(dtype: str) -> float:
  """FLOP/s that one device could do: from a table, elsewhere measured by a large product.

  On CPU all devices of a process share the cores, so the measured peak is divided by them.
  """
  kind = jax.devices()[0].device_kind
  for name, peak in _PEAKS.items():
    if kind.startswith(name):
      return peak if dtype == 'bfloat16' else peak / 2
  n = 1024
  a = jnp.ones((n, n), dtype)
  product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
  jax.block_until_ready(product(a))
  best = min(_timed(product, a) for _ in range(5))
  share = jax.local_device_count() if jax.default_backend() == 'cpu' else 1
  return 2 * n**3 / best / share


def _timed(function: Callable[..., Any], *args: Any) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start
