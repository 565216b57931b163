"""Cyclical learning rates as optax schedules, in closed form: CALR, CLR, and SGDR by optax.

All are pure functions of the step, counted from 0, for jit, vmap and `optax.inject_hyperparams`.
Sources: Acharya et al., "Online Embedding Compression for Text Classification using Low Rank Matrix
Factorization", AAAI 2019, and its released code (CALR); Smith, "Cyclical Learning Rates for
Training Neural Networks", 2017; Loshchilov and Hutter, "SGDR", 2017.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

CLR_MODES = ('triangular', 'triangular2', 'exp_range')


def calr_schedule(
  peak: float,
  floor: float,
  step_size: int,
  decay: float = 0.1,
  decay_every: int | None = None,
  restart: bool = True,
) -> optax.Schedule:
  """Cyclically annealed learning rate: triangles whose maximum falls, and comes back.

  Args:
    peak: first maximum.
    floor: minimum of every triangle.
    step_size: steps from minimum to maximum, half a cycle.
    decay: factor of the maximum; 1 never lowers it, which is plain CLR.
    decay_every: steps between two decays; None a cycle, as the authors describe it (their code
      takes an epoch, see `released_calr_schedule`).
    restart: whether the maximum is `peak` again where it has come down to `floor`; else the rate
      stays there.

  Raises:
    ValueError: rates, factors or steps out of range.
  """
  _check(peak, floor, step_size)
  decay_every = 2 * step_size if decay_every is None else decay_every
  phases = _phases(peak, floor, decay)
  if decay_every < 1:
    raise ValueError(f'decay_every is {decay_every}; it must be at least 1')

  def schedule(count: jax.Array) -> jax.Array:
    phase = jnp.asarray(count) // decay_every
    phase = phase % phases if restart else jnp.minimum(phase, phases)
    highest = jnp.maximum(peak * jnp.power(decay, phase.astype(jnp.float32)), floor)
    return _between(floor, highest, _triangle(count, step_size), peak)

  return schedule


def released_calr_schedule(
  peak: float,
  steps_per_epoch: int,
  step_size: int = 1000,
  decay: float = 0.1,
  power: int = 3,
  power_after: int = 5,
) -> optax.Schedule:
  """The released code's loop, to float precision.

  The maximum falls every epoch, wherever in its cycle the rate is; the ramp is a step ahead; and
  after the first restart the floor is another one.

  Args:
    peak, step_size, decay: as of `calr_schedule`.
    steps_per_epoch: steps between two decays.
    power: the floor is `peak * decay ** power`; the code has 5 for the dense training, 3 after
      compression.
    power_after: the same from the first restart on.

  Raises:
    ValueError: as of `calr_schedule`, or powers below 1.
  """
  if min(power, power_after) < 1 or not 0 < decay < 1:
    raise ValueError(f'powers {power} and {power_after} of {decay}: 1 at least, of less than 1')
  if steps_per_epoch < 1:
    raise ValueError(f'steps_per_epoch is {steps_per_epoch}; it must be at least 1')
  floor, later = (peak * decay**p for p in (power, power_after))
  _check(peak, max(floor, later), step_size)

  def schedule(count: jax.Array) -> jax.Array:
    epoch = jnp.asarray(count) // steps_per_epoch
    first = epoch < power
    phase = jnp.where(first, epoch, (epoch - power) % power_after)
    lowest = jnp.where(first, floor, later)
    highest = peak * jnp.power(decay, phase.astype(jnp.float32))
    return _between(lowest, highest, _triangle(jnp.asarray(count) + 1, step_size), peak)

  return schedule


def clr_schedule(
  peak: float, floor: float, step_size: int, mode: str = 'triangular', gamma: float = 0.9999
) -> optax.Schedule:
  """Cyclical learning rate (Smith, 2017, section 3).

  Args:
    peak, floor: maximum and minimum.
    step_size: half a cycle.
    mode: `triangular`; `triangular2` halves the amplitude with every cycle; `exp_range` multiplies
      it by `gamma` with every step.
    gamma: of `exp_range`.

  Raises:
    ValueError: rates, steps or mode out of range.
  """
  _check(peak, floor, step_size)
  if mode not in CLR_MODES:
    raise ValueError(f'mode is {mode!r}; choose from {", ".join(CLR_MODES)}')
  if not 0 < gamma <= 1:
    raise ValueError(f'gamma is {gamma}; it must lie above 0 and not above 1')

  def schedule(count: jax.Array) -> jax.Array:
    count = jnp.asarray(count)
    factor, times = {
      'triangular': (1.0, count),
      'triangular2': (0.5, count // (2 * step_size)),
      'exp_range': (gamma, count),
    }[mode]
    scale = jnp.power(factor, times.astype(jnp.float32))
    return _between(floor, peak, scale * _triangle(count, step_size), peak)

  return schedule


def sgdr_schedule(
  peak: float, floor: float, period: int, steps: int, multiplier: int = 2
) -> optax.Schedule:
  """Warm restarts of a cosine, by `optax.sgdr_schedule`, for as many cycles as `steps` take.

  Args:
    peak, floor: maximum and minimum of every cycle.
    period: steps of the first cycle.
    steps: of the whole training.
    multiplier: of the period from cycle to cycle.

  Raises:
    ValueError: rates or steps out of range.
  """
  _check(peak, floor, period)
  if multiplier < 1:
    raise ValueError(f'multiplier is {multiplier}; it must be at least 1')
  cycles, begun = [], 0
  while begun < max(steps, 1):
    length = period * multiplier ** len(cycles)
    cycles.append(
      {'init_value': peak, 'peak_value': peak, 'warmup_steps': 0, 'decay_steps': length}
      | {'end_value': floor}
    )
    begun += length
  return optax.sgdr_schedule(cycles)


def _triangle(count: jax.Array, step_size: int) -> jax.Array:
  """0 at the ends of a cycle, 1 in its middle."""
  step = jnp.asarray(count) % (2 * step_size)
  return jnp.minimum(step, 2 * step_size - step).astype(jnp.float32) / step_size


def _between(low: float, high: jax.Array, share: jax.Array, peak: float) -> jax.Array:
  """Rounding must not leave the bounds."""
  return jnp.clip(low + (high - low) * share, low, peak)


def _phases(peak: float, floor: float, decay: float) -> int:
  """Decays until the maximum has come down to the floor; whichever way a product was rounded."""
  if not 0 < decay <= 1:
    raise ValueError(f'decay is {decay}; it must lie above 0 and not above 1')
  if decay == 1 or floor == peak:
    return 1
  if floor == 0:
    raise ValueError('a maximum that decays never comes down to a floor of 0: give a higher one')
  return max(math.ceil(math.log(floor / peak) / math.log(decay) - 1e-6), 1)


def _check(peak: float, floor: float, steps: int) -> None:
  if not 0 <= floor <= peak or not peak:
    raise ValueError(f'rates between {floor} and {peak}: give 0 <= floor <= peak, peak above 0')
  if steps < 1:
    raise ValueError(f'{steps} steps are no part of a cycle; give 1 at least')
