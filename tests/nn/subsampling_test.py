"""Subsampling against convolutions by definition; lengths, masks and positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import build, normal

from gatedfm.nn import subsampling


def conv3x3_stride2(x_BxTxMxC, kernel, bias):
  b, t, m, _ = x_BxTxMxC.shape
  out = np.zeros((b, (t - 1) // 2, (m - 1) // 2, kernel.shape[-1]))
  for i in range(out.shape[1]):
    for j in range(out.shape[2]):
      window = x_BxTxMxC[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
      out[:, i, j] = np.einsum('bijc,ijco->bo', window, kernel)
  return np.maximum(out + bias, 0)


@pytest.mark.parametrize('frames', [7, 12])
def test_subsampling(frames):
  x = normal(2, frames, 11)
  run, p = build(subsampling.Conv2dSubsampling(6, 3), x)
  y = run(p, x)
  h = conv3x3_stride2(np.asarray(x)[..., None], p['conv_1_kernel'], p['conv_1_bias'])
  h = conv3x3_stride2(h, p['conv_2_kernel'], p['conv_2_bias'])
  # Channel-major: all bands of the first channel, then of the second.
  rows = np.concatenate([h[..., c] for c in range(3)], -1)
  want = rows @ p['out']['kernel'] + p['out']['bias']
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
  assert y.shape[1] == subsampling.subsampled_length(frames)


def test_length_of_thirty_seconds():
  assert subsampling.subsampled_length(3001) == 749


@pytest.mark.parametrize('frames', range(7, 24))
def test_mask_has_the_length_of_what_it_masks(frames):
  whole = np.ones((1, frames), bool)
  assert subsampling.subsampled_mask(whole).shape == (1, subsampling.subsampled_length(frames))
  assert subsampling.subsampled_mask(whole).all()


def test_positions():
  table = subsampling.positions(50, 8)
  rate = 10_000 ** -(np.arange(0, 8, 2) / 8)
  for t in (0, 1, 49):
    np.testing.assert_allclose(table[t, 0::2], np.sin(t * rate), atol=1e-5)
    np.testing.assert_allclose(table[t, 1::2], np.cos(t * rate), atol=1e-5)
  assert subsampling.positions(5, 7).shape == (5, 7)


def test_one_position_at_a_time_is_all_at_once():
  x = normal(2, 5, 8)
  whole = subsampling.add_positions(x)
  np.testing.assert_allclose(
    whole, x * np.sqrt(8) + subsampling.positions(5, 8), rtol=1e-6, atol=1e-6
  )
  for i in range(5):
    one = subsampling.add_positions(x[:, i : i + 1], jnp.int32(i), limit=5)
    np.testing.assert_array_equal(one[:, 0], whole[:, i])
