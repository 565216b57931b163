"""OWSM v3.1's sizes, as published: 101M, 367M and 1.02B parameters."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gatedfm.models.speech import SpeechModel
from gatedfm.models.speech_config import owsm
from gatedfm.nn import gating


@pytest.mark.parametrize(
  ('size', 'parameters'),
  [('base', 101_182_628), ('small', 366_653_348), ('medium', 1_016_891_044)],
)
def test_parameter_count(size, parameters):
  model = SpeechModel(owsm(size))
  context = gating.Context(jnp.zeros(1, int), jnp.zeros(1, int))
  init = lambda: model.init(
    jax.random.key(0),
    jnp.zeros((1, 20, 80)),
    jnp.array([20]),
    jnp.zeros((1, 2), int),
    context,
  )
  params = jax.eval_shape(lambda: nn.unbox(init()))
  assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == parameters


def test_unknown_size_is_named():
  with pytest.raises(ValueError, match='large'):
    owsm('large')
