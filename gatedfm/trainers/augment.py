"""Augmentation of log-mel features inside the jitted step.

Letters: B batch, T frames, M mel bands.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(slots=True)
class AugmentConfig:
  """SpecAugment (Park et al. 2019; OWSM's two frequency and ten time masks by default), and
  two warps that stand in for speed perturbation and vocal tract length perturbation.

  Attributes:
    freq_masks, freq_width: how many frequency masks, of at most how many bands.
    time_masks, time_fraction: how many time masks, each at most this share of the utterance.
    tempo: time axis stretched by a factor in [1 - tempo, 1 + tempo]; 0 = off.
    formant: mel axis stretched by a factor in [1 - formant, 1 + formant]; 0 = off.
    gain: standard deviation of a constant added to every log-mel (channel loudness).
    tilt: standard deviation of a slope over the bands (channel colour), end to end.
    noise: standard deviation of noise added to every normalised log-mel.
  """

  freq_masks: int = 2
  freq_width: int = 27
  time_masks: int = 10
  time_fraction: float = 0.05
  tempo: float = 0.0
  formant: float = 0.0
  gain: float = 0.0
  tilt: float = 0.0
  noise: float = 0.0


class _Draws:
  """Uniform numbers in [0, 1) per example, out of one draw: each further call to the random
  generator costs more to compile than all of SpecAugment."""

  def __init__(self, key: jax.Array, batch: int, number: int):
    self._columns = iter(jax.random.uniform(key, (number, batch)))

  def uniform(self, low: float = 0.0, high: float = 1.0) -> jax.Array:
    return low + (high - low) * next(self._columns)

  def normal(self) -> jax.Array:
    return jax.scipy.special.ndtri(jnp.clip(next(self._columns), 1e-6, 1 - 1e-6))


def _span(draws: _Draws, length_B: jax.Array, width_B: jax.Array, size: int) -> jax.Array:
  """True within one span of at most `width` inside `length` per example, `[B, size]`."""
  width_B = jnp.floor(draws.uniform() * (jnp.floor(width_B) + 1))
  start_B = jnp.floor(draws.uniform() * jnp.maximum(length_B - width_B, 1))
  at = jnp.arange(size)
  return (at >= start_B[:, None]) & (at < (start_B + width_B)[:, None])


def _spec_augment(
  draws: _Draws, x_BxTxM: jax.Array, frames_B: jax.Array, cfg: AugmentConfig
) -> jax.Array:
  b, t, m = x_BxTxM.shape
  bands, hidden = jnp.full((b,), m), jnp.zeros((b, t, m), bool)
  for _ in range(cfg.freq_masks):
    hidden |= _span(draws, bands, jnp.full((b,), cfg.freq_width), m)[:, None, :]
  for _ in range(cfg.time_masks):
    hidden |= _span(draws, frames_B, frames_B * cfg.time_fraction, t)[..., None]
  return jnp.where(hidden, 0, x_BxTxM)


def _interpolate(x: jax.Array, at: jax.Array) -> jax.Array:
  """Linear interpolation along axis 1 of `[B, X, Y]` at positions `[B, X']`."""
  last = x.shape[1] - 1
  at = jnp.clip(at, 0, last)
  low = jnp.floor(at).astype(jnp.int32)
  high = jnp.minimum(low + 1, last)
  w = (at - low)[..., None].astype(x.dtype)
  take = lambda i: jnp.take_along_axis(x, i[..., None], 1)
  return take(low) * (1 - w) + take(high) * w


def _warp(
  draws: _Draws, x_BxTxM: jax.Array, frames_B: jax.Array, cfg: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
  """Stretches time and mel axes; a stretch beyond T is cut to what fits, so no speech is lost."""
  _, t, m = x_BxTxM.shape
  if cfg.tempo:
    factor_B = draws.uniform(1 - cfg.tempo, 1 + cfg.tempo)
    factor_B = jnp.minimum(factor_B, t / jnp.maximum(frames_B, 1))
    # The last frames never mix with the padding behind them.
    at_BxT = jnp.minimum(jnp.arange(t) / factor_B[:, None], frames_B[:, None] - 1)
    x_BxTxM = _interpolate(x_BxTxM, at_BxT)
    frames_B = jnp.clip(jnp.floor(frames_B * factor_B).astype(frames_B.dtype), 1, t)
  if cfg.formant:
    factor_B = draws.uniform(1 - cfg.formant, 1 + cfg.formant)
    x_BxMxT = _interpolate(x_BxTxM.swapaxes(1, 2), jnp.arange(m) * factor_B[:, None])
    x_BxTxM = x_BxMxT.swapaxes(1, 2)
  return x_BxTxM, frames_B


def augment(
  key: jax.Array, x_BxTxM: jax.Array, frames_B: jax.Array, cfg: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
  """Warps, channel, noise, then SpecAugment, whose masks set 0: the mean.

  Args:
    key: PRNG key.
    x_BxTxM: normalised log-mel.
    frames_B: valid frames.
    cfg: what is on.

  Returns: features and their new valid lengths.
  """
  b, _, m = x_BxTxM.shape
  draws = _Draws(key, b, 4 + 2 * (cfg.freq_masks + cfg.time_masks))
  x_BxTxM, frames_B = _warp(draws, x_BxTxM, frames_B, cfg)
  if cfg.gain:
    x_BxTxM += cfg.gain * draws.normal()[:, None, None]
  if cfg.tilt:
    slope_M = jnp.linspace(-0.5, 0.5, m)
    x_BxTxM += cfg.tilt * slope_M * draws.normal()[:, None, None]
  if cfg.noise:
    x_BxTxM += cfg.noise * jax.random.normal(jax.random.fold_in(key, 1), x_BxTxM.shape)
  return _spec_augment(draws, x_BxTxM, frames_B, cfg), frames_B
