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

  Args:
    function: jitted.
    limit: programs kept, 0 for all; beyond it the one not used for longest is dropped.
  """

  def __init__(self, function: Callable[..., Any], limit: int = 0):
    self._function, self._limit = function, limit
    self._programs: dict[Hashable, futures.Future] = {}

  def prepare(self, key: Hashable, *args: Any, **static: Any) -> futures.Future:
    """Starts compiling for these arguments (arrays or `ShapeDtypeStruct`s) unless that is done."""
    # A dictionary keeps the order of insertion: the first is the one not used for longest.
    program = self._programs.pop(key, None)
    if program is None or (program.done() and program.exception()):  # memory may be free by now
      lowered = self._function.lower(*args, **static)
      program = _pool().submit(lowered.compile)
      if self._limit and len(self._programs) >= self._limit:
        del self._programs[next(iter(self._programs))]
    self._programs[key] = program
    return program

  def __call__(self, key: Hashable, *args: Any, **static: Any) -> Any:
    """Runs the program of `key`, waiting for it or compiling it where need be."""
    return self.prepare(key, *args, **static).result()(*args)

  def __len__(self) -> int:
    return len(self._programs)

  def peak_bytes(self) -> int:
    """Memory of the largest program: parameters, inputs, outputs, temporaries; waits for all."""
    stats = [p.result().memory_analysis() for p in self._programs.values()]
    return max(
      (m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes for m in stats),
      default=0,
    )


def wait(
  programs: Sequence[futures.Future], tell: Callable[[str], None], what: str = 'programs'
) -> None:
  """Waits for programs, telling every `INTERVAL` how many are missing; raises what failed.

  Args:
    programs: what `Programs.prepare` returned.
    tell: is given the lines.
    what: the programs are called there.
  """
  start, waiting = time.perf_counter(), list(programs)
  while waiting:
    _, waiting = futures.wait(waiting, timeout=INTERVAL)
    if waiting:
      seconds = time.perf_counter() - start
      tell(f'compiling: {what} to go: {len(waiting)} of {len(programs)} after {seconds:.0f} s')
  for program in programs:
    program.result()
