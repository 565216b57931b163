"""What augmentation keeps: lengths, padding, bounds of masks, the key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech

from gatedfm.trainers import augment

OFF = augment.AugmentConfig(freq_masks=0, time_masks=0)
ALL = augment.AugmentConfig(
  freq_masks=2, freq_width=5, time_masks=3, time_fraction=0.1, tempo=0.2, formant=0.1,
  gain=0.1, tilt=0.1, noise=0.1,
)  # fmt: skip
FRAMES = jnp.array([60, 50, 59, 1, 33])
KEYS = range(20)


def features(t=60, m=20, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(len(FRAMES), t, m)), jnp.float32)


def run(cfg):
  return tiny_speech.jit(
    lambda key, x: augment.augment(jax.random.key(key, impl='rbg'), x, FRAMES, cfg)
  )


def test_off_is_the_identity():
  x, frames = run(OFF)(0, features())
  np.testing.assert_array_equal(x, features())
  np.testing.assert_array_equal(frames, FRAMES)


def test_follows_from_the_key():
  go = run(ALL)
  for a, b, c in zip(go(1, features()), go(1, features()), go(2, features())):
    np.testing.assert_array_equal(a, b)
    assert (np.asarray(a) != np.asarray(c)).any()


def test_lengths_stay_valid_and_follow_the_tempo():
  go, seen = run(dataclasses.replace(OFF, tempo=0.2)), []
  for key in KEYS:
    x, frames = go(key, features())
    assert x.shape == features().shape
    assert frames.dtype == FRAMES.dtype
    assert (frames >= 1).all()
    assert (frames <= 60).all()
    seen.append(np.asarray(frames / FRAMES))
  seen = np.array(seen)
  # The first utterance fills the array, so it is never stretched; the last one has room.
  assert seen[:, 0].max() == 1
  assert 1.1 < seen[:, 4].max() <= 1.2
  assert 0.78 <= seen[:, 4].min() < 0.9


def test_tempo_keeps_the_whole_utterance():
  """A ramp from 0 to 1 still goes from 0 to 1, as much faster as there are fewer frames."""
  ramp_T = jnp.arange(60) / (FRAMES[:, None] - 1).clip(1)
  x = jnp.broadcast_to(ramp_T[..., None], features().shape)
  go = run(dataclasses.replace(OFF, tempo=0.2))
  for key in KEYS:
    y, frames = go(key, x)
    for b in (0, 1, 2, 4):
      row = np.asarray(y[b, : frames[b], 0])
      assert row[0] == 0
      assert abs(row[-1] - 1) < 0.06
      assert (np.diff(row) >= 0).all()


@pytest.mark.parametrize('cfg', [ALL, dataclasses.replace(ALL, formant=0.0, noise=0.0)])
def test_nothing_beyond_the_frames_matters(cfg):
  go, x = run(cfg), features()
  padding = (jnp.arange(60) >= FRAMES[:, None])[..., None]
  for key in KEYS:
    (a, frames), (b, others) = go(key, x), go(key, jnp.where(padding, 1e6, x))
    np.testing.assert_array_equal(frames, others)
    valid = np.arange(60) < np.asarray(frames)[:, None]
    np.testing.assert_array_equal(np.asarray(a)[valid], np.asarray(b)[valid])


def test_masks_stay_in_their_bounds():
  cfg = augment.AugmentConfig(freq_masks=2, freq_width=5, time_masks=3, time_fraction=0.1)
  go, bands, times = run(cfg), [], []
  for key in KEYS:
    x, frames = go(key, jnp.ones((len(FRAMES), 60, 20)))
    hidden = np.asarray(x) == 0
    assert set(np.unique(x)) <= {0.0, 1.0}
    np.testing.assert_array_equal(frames, FRAMES)
    for b, n in enumerate(FRAMES):
      masked_M, masked_T = hidden[b].all(0), hidden[b].all(1)
      # Nothing but whole bands and whole frames.
      np.testing.assert_array_equal(hidden[b], masked_M[None] | masked_T[:, None])
      assert masked_M.sum() <= 2 * 5
      assert masked_T.sum() <= 3 * 0.1 * n
      assert not masked_T[n:].any()
      bands.append(masked_M.sum())
      times.append(masked_T.sum())
  assert max(bands) > 5
  assert max(times) > 6


def test_gain_and_tilt_are_lines_over_the_bands():
  x, _ = run(dataclasses.replace(OFF, gain=0.5, tilt=0.5))(3, features())
  change = np.asarray(x - features())
  assert change.std() > 0.05
  np.testing.assert_allclose(change, np.broadcast_to(change[:, :1], change.shape), atol=1e-5)
  np.testing.assert_allclose(np.diff(change, 2, axis=-1), 0, atol=1e-5)


def test_formant_stretches_the_mel_axis():
  """A ramp over the bands keeps its start and gets another slope, within the bounds."""
  x = jnp.broadcast_to(jnp.arange(20.0), features().shape)
  y, _ = run(dataclasses.replace(OFF, formant=0.1))(0, x)
  slopes = np.asarray(y[:, 0, 10] / 10)
  assert np.unique(slopes).size == len(FRAMES)
  assert (np.abs(slopes - 1) <= 0.1).all()
  assert (np.asarray(y[..., 0]) == 0).all()
