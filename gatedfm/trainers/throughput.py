"""Metrics averaged between two console lines, and how fast the steps were."""

from __future__ import annotations

import time

import jax
import numpy as np

from gatedfm.models import speech_costs
from gatedfm.trainers import log
from gatedfm.trainers.config import TrainConfig


class Window:
  """Metrics averaged over a logging interval, and its throughput."""

  def __init__(self, cfg: TrainConfig):
    self._cfg = cfg
    self._peak = log.peak_flops(cfg.model.dtype) * jax.device_count()  # measured, so before steps
    self._cost: dict[tuple[int, int], float] = {}
    self._rows: list[dict[str, float]] = []
    self.begin()

  def begin(self) -> None:
    """The throughput is that of the steps counted from now on."""
    self._utterances, self._macs = 0, 0.0
    self._start = time.perf_counter()

  def count(self, batch: dict[str, np.ndarray]) -> None:
    """Counts a batch's utterances and work."""
    size, frames = batch['features'].shape[:2]
    tokens = batch['decoder_input'].shape[1]
    if (frames, tokens) not in self._cost:  # computed by jax, which would wait for the step
      self._cost[frames, tokens] = speech_costs.total_macs(self._cfg.model, frames, tokens)
    self._utterances += size * jax.process_count()
    self._macs += size * jax.process_count() * self._cost[frames, tokens]

  def pause(self, seconds: float) -> None:
    """Takes `seconds` (of compiling or evaluating) out of the interval's speed."""
    self._start += seconds

  def add(self, values: dict[str, float]) -> None:
    """Adds a step's metrics."""
    self._rows.append(values)

  def close(self) -> dict[str, float]:
    """The interval's means, and its speed where steps were counted; the next interval begins."""
    seconds = time.perf_counter() - self._start
    out = {f'train/{k}': float(np.mean([r[k] for r in self._rows])) for k in self._rows[0]}
    if self._utterances:
      # Forward and backward: three times the forward's multiply-accumulates, two FLOPs each.
      flops = 6 * self._macs / seconds
      out |= {
        'speed/utterances_per_second': self._utterances / seconds,
        'speed/tflops': flops / 1e12,
        'speed/mfu': flops / self._peak,
      }
    self._rows = []
    self.begin()
    return out


def brief(prefix: str, values: dict[str, float]) -> str:
  """The main values under a prefix, as `prefix: loss 1.234 ...`."""
  names = (
    'loss',
    'ctc_loss',
    'attention_loss',
    'token_accuracy',
    'sparsity',
    'sparsity_target',
  )
  parts = [f'{n} {values[f"{prefix}/{n}"]:.3f}' for n in names if f'{prefix}/{n}' in values]
  return f'{prefix}: ' + ' '.join(parts)


def line(cfg: TrainConfig, at: int, values: dict[str, float], clock: log.Clock) -> str:
  """The console line of a step; without speed and ETA where `values` have no speed."""
  out = f'step {at}/{cfg.steps} {100 * at // cfg.steps}% | {brief("train", values)[7:]}'
  if 'speed/mfu' not in values:
    return out
  return (
    f'{out} | {values["speed/utterances_per_second"]:.0f} utt/s | MFU {values["speed/mfu"]:.0%} | '
    f'ETA {log.duration(clock.eta(at))}'
  )
