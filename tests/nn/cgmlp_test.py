"""The convolutional gating MLP against its formula, and its padding."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import build, depthwise, normal
from scipy.special import erf

from gatedfm.nn import cgmlp


def reference(p, x, mask=1.0):
  h = x @ p['w_1']['kernel'] + p['w_1']['bias']
  h = h * 0.5 * (1 + erf(h / np.sqrt(2)))
  r, g = np.split(h, 2, -1)
  g = (g - g.mean(-1, keepdims=True)) / np.sqrt(g.var(-1, keepdims=True) + 1e-12)
  g = (g * p['norm']['scale'] + p['norm']['bias']) * mask
  g = depthwise(g, p['conv']['kernel']) + p['conv']['bias']
  return (r * g) @ p['w_2']['kernel'] + p['w_2']['bias']


@pytest.mark.parametrize('taps', [3, 4])
def test_formula(taps):
  x = normal(2, 7, 6)
  run, p = build(cgmlp.CgMlp(12, taps), x)
  np.testing.assert_allclose(run(p, x), reference(p, np.asarray(x)), rtol=1e-3, atol=1e-3)


def test_a_mask_hides_padding_and_its_absence_shows_it():
  x = normal(1, 7, 6)
  other = x.at[:, 5:].set(9.0)
  mask = (jnp.arange(7) < 5)[None, :, None]
  run, p = build(cgmlp.CgMlp(12, 3), x, mask)
  masked = run(p, x, mask)
  np.testing.assert_allclose(
    masked, reference(p, np.asarray(x), np.asarray(mask)), rtol=1e-3, atol=1e-3
  )
  np.testing.assert_array_equal(masked[:, :5], run(p, other, mask)[:, :5])
  assert np.abs(run(p, x, None) - run(p, other, None))[:, :5].max() > 0.01
