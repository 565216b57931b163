"""Augmentation of log-mel features inside the jitted step.

Letters: B batch, T frames, M mel bands.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass
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


def _mask(key: jax.Array, length_B: jax.Array, width_B: jax.Array, size: int) -> jax.Array:
  """True where masked, `[B, size]`: one span of up to `width` within `length` per example."""
  k1, k2 = jax.random.split(key)
  b = length_B.shape[0]
  width_B = jnp.floor(jax.random.uniform(k1, (b,)) * (width_B + 1))
  start_B = jnp.floor(jax.random.uniform(k2, (b,)) * jnp.maximum(length_B - width_B, 1))
  at = jnp.arange(size)
  return (at >= start_B[:, None]) & (at < (start_B + width_B)[:, None])


def spec_augment(
  key: jax.Array, x_BxTxM: jax.Array, frames_B: jax.Array, cfg: AugmentConfig
) -> jax.Array:
  """Zeroes random spans of bands and frames; features are normalised, so 0 is the mean."""
  b, t, m = x_BxTxM.shape
  for i in range(cfg.freq_masks):
    k = jax.random.fold_in(key, i)
    full = jnp.full((b,), float(m))
    span = _mask(k, full, jnp.full((b,), float(cfg.freq_width)), m)
    x_BxTxM = jnp.where(span[:, None, :], 0, x_BxTxM)
  hidden = jnp.zeros((b, t), bool)
  for i in range(cfg.time_masks):
    k = jax.random.fold_in(key, 1000 + i)
    hidden |= _mask(k, frames_B * 1.0, frames_B * cfg.time_fraction, t)
  return jnp.where(hidden[..., None], 0, x_BxTxM)


def _interpolate(x: jax.Array, at: jax.Array) -> jax.Array:
  """Linear interpolation along axis 1 of `[B, X, Y]` at positions `[B, X']`."""
  last = x.shape[1] - 1
  at = jnp.clip(at, 0, last)
  low = jnp.floor(at).astype(jnp.int32)
  high = jnp.minimum(low + 1, last)
  w = (at - low)[..., None].astype(x.dtype)
  take = lambda i: jnp.take_along_axis(x, i[..., None], 1)
  return take(low) * (1 - w) + take(high) * w


def warp(
  key: jax.Array, x_BxTxM: jax.Array, frames_B: jax.Array, cfg: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
  """Stretches time and mel axes; returns features and their new valid lengths.

  A stretch beyond T is cut to what fits, so that no speech is lost to the bucket's shape.
  """
  b, t, m = x_BxTxM.shape
  k1, k2 = jax.random.split(key)
  if cfg.tempo:
    factor_B = 1 + cfg.tempo * jax.random.uniform(k1, (b,), minval=-1.0)
    factor_B = jnp.minimum(factor_B, t / jnp.maximum(frames_B, 1))
    x_BxTxM = _interpolate(x_BxTxM, jnp.arange(t) / factor_B[:, None])
    frames_B = jnp.clip(jnp.floor(frames_B * factor_B).astype(frames_B.dtype), 1, t)
  if cfg.formant:
    factor_B = 1 + cfg.formant * jax.random.uniform(k2, (b,), minval=-1.0)
    x_BxMxT = _interpolate(x_BxTxM.swapaxes(1, 2), jnp.arange(m) * factor_B[:, None])
    x_BxTxM = x_BxMxT.swapaxes(1, 2)
  return x_BxTxM, frames_B


def augment(
  key: jax.Array, x_BxTxM: jax.Array, frames_B: jax.Array, cfg: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
  """All of it on normalised features: warps, channel, noise, SpecAugment."""
  b, _, m = x_BxTxM.shape
  k1, k2, k3, k4, k5 = jax.random.split(key, 5)
  x_BxTxM, frames_B = warp(k1, x_BxTxM, frames_B, cfg)
  if cfg.gain:
    x_BxTxM += cfg.gain * jax.random.normal(k2, (b, 1, 1))
  if cfg.tilt:
    slope = jnp.linspace(-0.5, 0.5, m) * jax.random.normal(k3, (b, 1, 1))
    x_BxTxM += cfg.tilt * slope
  if cfg.noise:
    x_BxTxM += cfg.noise * jax.random.normal(k4, x_BxTxM.shape)
  return spec_augment(k5, x_BxTxM, frames_B, cfg), frames_B
