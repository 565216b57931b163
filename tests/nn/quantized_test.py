"""Tables of whole numbers are off by half a step at most, and answer as what they stand for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gatedfm.nn import quantized
from gatedfm.nn.quantized import QuantizedEmbed

ROWS = hnp.arrays(np.float32, (4, 5), elements=st.floats(-1e3, 1e3, width=32))


def variables(table, bits, scale_dtype=np.float32):
  codes, scale = quantized.quantize(table, bits, scale_dtype)
  return {'quantized': {'codes': jnp.asarray(codes), 'scale': jnp.asarray(scale)}}


@settings(max_examples=40, deadline=None)
@given(ROWS, st.sampled_from([16, 8, 4]))
def test_half_a_step_at_most(table, bits):
  held = variables(table, bits)
  got = np.asarray(QuantizedEmbed(4, 5, bits).apply(held, jnp.arange(4)))
  step = np.abs(table).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
  assert (np.abs(got - table) <= 0.5 * step * (1 + 1e-3) + 1e-30).all()
  # The largest of each row is held as it is,
  at = np.abs(table).argmax(1)
  rows = np.arange(4)
  # as far as XLA, which takes subnormal scales for 0, can tell.
  np.testing.assert_allclose(got[rows, at], table[rows, at], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize('bits', [16, 8, 4])
@pytest.mark.parametrize('features', [6, 7])
@pytest.mark.parametrize('rows', [9, 8195])
def test_attend_is_the_product_with_what_is_looked_up(bits, features, rows):
  table = np.random.default_rng(0).normal(size=(rows, features)).astype(np.float32)
  held, small = variables(table, bits), QuantizedEmbed(rows, features, bits)
  whole = np.asarray(small.apply(held, jnp.arange(rows)))
  assert np.abs(whole - table).max() < {16: 1e-3, 8: 0.05, 4: 0.6}[bits]
  query = np.random.default_rng(1).normal(size=(2, 3, features)).astype(np.float32)
  got = small.apply(held, jnp.asarray(query), method='attend')
  np.testing.assert_allclose(got, query @ whole.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('bits', 'bytes_'), [(16, 14), (8, 7), (4, 4)])
def test_bytes(bits, bytes_):
  codes, scale = quantized.quantize(np.ones((3, 7), np.float32), bits, ml_dtypes.bfloat16)
  assert codes.nbytes == 3 * bytes_
  assert scale.nbytes == 3 * 2


@pytest.mark.parametrize('bits', [16, 8, 4])
def test_codes_are_made_for_rounded_scales(bits):
  table = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
  rough = variables(table, bits, ml_dtypes.bfloat16)
  small = QuantizedEmbed(50, 64, bits, scale_dtype=jnp.bfloat16)
  off = np.abs(np.asarray(small.apply(rough, jnp.arange(50))) - table)
  step = np.abs(table).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
  assert (off <= 0.5 * step * (1 + 2**-7)).all()  # bfloat16 has eight bits


def test_a_new_one_has_the_shapes_of_what_quantize_makes():
  for bits in (16, 8, 4):
    held = variables(np.ones((5, 7), np.float32), bits)['quantized']
    new = QuantizedEmbed(5, 7, bits).init(jax.random.key(0), jnp.arange(2))
    assert set(new) == {'quantized'}
    for name, box in new['quantized'].items():
      assert (box.value.shape, box.value.dtype) == (held[name].shape, held[name].dtype)
      assert box.names[0] == 'vocab'


def test_numbers_out_of_range_and_other_refusals():
  held = variables(np.ones((5, 7), np.float32), 8)
  got = QuantizedEmbed(5, 7).apply(held, jnp.array([4, 5, -6]))
  assert np.isnan(got).any(1).tolist() == [False, True, True]
  table = np.arange(35, dtype=np.float32).reshape(5, 7)
  for number in (-1, -5):  # from the end, as of nn.Embed
    got = QuantizedEmbed(5, 7, 16).apply(variables(table, 16), jnp.array([number]))
    np.testing.assert_allclose(got[0], table[number], atol=1e-3)
  with pytest.raises(Exception, match='the table has 5 rows'):
    QuantizedEmbed(5, 7, checked=True).apply(held, jnp.array([5]))
  with pytest.raises(ValueError, match='must be integers'):
    QuantizedEmbed(5, 7).apply(held, jnp.ones(2))
  with pytest.raises(ValueError, match='bits is 2; choose from 16, 8, 4'):
    quantized.quantize(np.ones((2, 2)), 2)
  with pytest.raises(ValueError, match='rows 0 to 2 hold numbers that are not finite'):
    quantized.quantize(np.array([[1, np.nan], [1, 1]]))
