"""Times that can be compared: side by side in one process, compilation apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def lap(calls: Mapping[str, Callable[[], Any]], forward: bool) -> dict[str, float]:
  """Seconds of each call, one after the other, until its result is there.

  Args:
    calls: what to time, by name; compiled and run once before.
    forward: their order, or backward: alternate, and what drifts hits all alike.
  """
  seconds = {}
  for name in calls if forward else reversed(calls):
    start = time.perf_counter()
    jax.block_until_ready(calls[name]())
    seconds[name] = time.perf_counter() - start
  return seconds


def laps(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
  """Seconds `[rounds]` of each call, after one call of each that does not count."""
  lap(calls, True)
  rows = [lap(calls, r % 2 == 0) for r in range(rounds)]
  return {name: np.array([row[name] for row in rows]) for name in calls}


def quartiles(values: np.ndarray) -> dict[str, float]:
  """`median`, `q25`, `q75`."""
  q25, median, q75 = np.percentile(values, [25, 50, 75])
  return {'median': float(median), 'q25': float(q25), 'q75': float(q75)}
