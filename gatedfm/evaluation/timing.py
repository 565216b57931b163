"""Seconds per utterance with real skipping, points side by side in one process.

Each utterance goes through every point in turn, A/B/A/B, from audio samples to tokens on the
host: features, gate prediction, encoder, cached greedy decoding. Compilation is apart.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gatedfm import clock, compiling
from gatedfm.data import features
from gatedfm.execution import recognizer as recognizer_lib
from gatedfm.execution.recognizer import Recognizer
from gatedfm.trainers.log import say


@dataclasses.dataclass(frozen=True)
class Utterance:
  """Audio `[S]` int16 at 16 kHz, its language and the task to time."""

  audio: np.ndarray
  language: str
  task: str


def run_once(recognizer: Recognizer, utterance: Utterance) -> Any:
  """From samples to decoded output, not waited for."""
  mel_TxM = features.log_mel(utterance.audio)
  frames = len(mel_TxM)
  padded = np.zeros((1, recognizer_lib.bucket(frames), mel_TxM.shape[1]), np.float32)
  padded[0, :frames] = mel_TxM
  return recognizer(padded, np.array([frames], np.int32), utterance.task, [utterance.language])


def side_by_side(
  recognizers: Mapping[str, Recognizer],
  utterances: Sequence[Utterance],
  rounds: int,
) -> dict[str, dict[str, Any]]:
  """Times every point on every utterance.

  Args:
    recognizers: by point name, `skip` or `static` execution; ratios refer to the first.
    utterances: timed one by one, batch 1.
    rounds: passes over the utterances; the order of the points alternates.

  Returns: per point `seconds_per_utterance` (median over utterances of the median over
    rounds, quartiles over utterances), `time_ratio` (sum over utterances, of the medians),
    `time_ratio_by_task`, `compile_seconds` of all shapes and patterns (with a first pass over
    the utterances), `peak_memory_bytes` of the largest program.
  """
  compile_seconds = {}
  lengths = {recognizer_lib.bucket(int(features.num_frames(len(u.audio)))) for u in utterances}
  for name, recognizer in recognizers.items():
    start = time.perf_counter()
    compiling.wait([p for frames in sorted(lengths) for p in recognizer.prepare(1, frames)], say)
    for u in utterances:  # every length, and under `static` every pattern
      jax.block_until_ready(run_once(recognizer, u))
    compile_seconds[name] = time.perf_counter() - start

  names = list(recognizers)
  seconds = {n: np.zeros((rounds, len(utterances))) for n in names}
  for r in range(rounds):
    for i, u in enumerate(utterances):
      calls = {n: functools.partial(run_once, recognizers[n], u) for n in names}
      for name, s in clock.lap(calls, (r + i) % 2 == 0).items():
        seconds[name][r, i] = s

  typical = {n: np.median(s, 0) for n, s in seconds.items()}
  tasks = np.array([u.task for u in utterances])
  out = {}
  for name, t in typical.items():
    base = typical[names[0]]
    out[name] = {
      'seconds_per_utterance': clock.quartiles(t),
      'time_ratio': t.sum() / base.sum(),
      'time_ratio_by_task': {
        task: t[tasks == task].sum() / base[tasks == task].sum() for task in sorted(set(tasks))
      },
      'compile_seconds': compile_seconds[name],
      'peak_memory_bytes': recognizers[name].program_bytes(),
      'utterances': len(utterances),
      'rounds': rounds,
    }
  return jax.tree.map(lambda x: x if isinstance(x, (int, str)) else float(x), out)
