"""Compiling programs side by side, ahead of their first use.

XLA optimises one program on one or two cores; on a machine of many, a handful of batch shapes
is compiled in little more than the time of the slowest.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent import futures
from typing import Any

INTERVAL = 10  # seconds between two lines of progress


def workers() -> int:
  """Programs that are compiled at a time."""
  return min(8, os.cpu_count() or 1)


@functools.cache
def _pool() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(workers(), 'compile')


class Programs:
  """The executables of one jitted function, one per key (a batch shape, say).

  Lowering traces Python code under the caller's mesh and stays in the caller's thread;
  compiling goes to a pool that all functions share, first come, first served.
  """

  def __init__(self, function: Callable[..., Any]):
    self._function = function
    self._programs: dict[Hashable, futures.Future] = {}

  def prepare(self, key: Hashable, *args: Any, **static: Any) -> futures.Future:
    """Starts compiling for these arguments (arrays or `ShapeDtypeStruct`s) unless that is done."""
    if key not in self._programs:
      lowered = self._function.lower(*args, **static)
      self._programs[key] = _pool().submit(lowered.compile)
    return self._programs[key]

  def __call__(self, key: Hashable, *args: Any, **static: Any) -> Any:
    """Runs the program of `key`, waiting for it or compiling it where need be."""
    return self.prepare(key, *args, **static).result()(*args)

  def executables(self) -> list[Any]:
    """All executables so far, for their memory analysis; waits for them."""
    return [p.result() for p in self._programs.values()]


def wait(programs: Sequence[futures.Future], tell: Callable[[str], None]) -> None:
  """Waits for programs, telling every `INTERVAL` how many are missing; raises what failed."""
  start, waiting = time.perf_counter(), list(programs)
  while waiting:
    _, waiting = futures.wait(waiting, timeout=INTERVAL)
    if waiting:
      seconds = time.perf_counter() - start
      tell(f'compiling: {len(waiting)} of {len(programs)} programs to go after {seconds:.0f} s')
  for program in programs:
    program.result()
