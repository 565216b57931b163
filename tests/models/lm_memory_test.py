"""What a model takes on each chip: as sharded arrays take it, and OPT-66B without one of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech
from flax import traverse_util

from gatedfm import partitioning
from gatedfm.models import lm, lm_memory
from gatedfm.models.lm_config import LmConfig, opt
from gatedfm.models.speech_config import ConfigError

CFG = LmConfig(vocab_size=50, d=48, layers=2, heads=4, ffn=64, max_tokens=16)


def held(tree, device):
  shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
  return sum(s.data.nbytes for s in shards if s.device == device)


@pytest.mark.parametrize('heads', [4, 6])
def test_bytes_are_those_of_arrays(heads, fast_compilation):
  """Of parameters as they are laid out, and of caches as XLA lays them out then."""
  cfg = dataclasses.replace(CFG, heads=heads)
  mesh = partitioning.make_mesh(data=1, fsdp=2, model=4)
  where = partitioning.shardings(lm.initializer(cfg), mesh)
  tree = traverse_util.unflatten_dict(lm.abstract_params(cfg), sep='/')
  params = jax.tree.map(lambda x, s: jax.device_put(jnp.ones(x.shape), s), tree, where)
  rows = lm_memory.parameters(cfg, mesh, 'float32')
  assert sum(r.device_bytes for r in rows) == held(params, jax.devices()[5])
  assert sum(r.bytes for r in rows) == sum(x.nbytes for x in jax.tree.leaves(params))
  assert sum(r.count for r in rows) == len(jax.tree.leaves(params))

  net, params = lm.for_inference(cfg, params)
  ids, mask = np.zeros((4, 8), np.int32), np.ones((4, 16), bool)
  inputs = jax.device_put((ids, mask), partitioning.batch_sharding(mesh))

  def read(params, ids, mask):
    caches = net.apply({'params': params}, 4, 16, method='start')
    return net.apply({'params': params}, ids, 0, caches, mask, method='step')[1]

  with partitioning.activate(mesh):
    caches = tiny_speech.jit(read)(params, *inputs)
  rows = lm_memory.caches(cfg, mesh, 4, 16, 'float32')
  assert sum(r.device_bytes for r in rows) == held(caches, jax.devices()[5])
  assert {r.part[:2] for r in rows} == {(2, 1) if heads == 4 else (2, heads)}


@pytest.fixture(scope='module')
def opt66b():
  return lm_memory.fit(opt('66b'), 'v4', 64, batch=16, length=2048)


def test_opt_66b(opt66b):
  """72 heads and the 4 chips of a host: matrices over 16 x 4 chips."""
  fit = opt66b
  assert (fit.fsdp, fit.model) == (16, 4)
  # 65.720 billion, as transformers counts them.
  assert sum(r.count * math.prod(r.shape) for r in fit.parameters) == 65_719_701_504
  for row in (*fit.parameters, *fit.caches):
    assert row.device_bytes * fit.chips >= row.bytes
  spread = [r for r in fit.parameters if r.name.endswith(('kernel', '/embedding'))]
  assert all(r.device_bytes * fit.chips == r.bytes for r in (*spread, *fit.caches))
  assert sum(r.bytes for r in spread) > 0.999 * sum(r.bytes for r in fit.parameters)
  each = fit.device_bytes()
  assert each['total'] == each['parameters'] + each['caches'] < fit.chip_bytes
  # Two bytes of keys and of values, 16 texts of 2048 tokens, 64 layers of width 9216.
  assert each['caches'] == 2 * 2 * 16 * 2048 * 64 * 9216 // 64


def test_as_a_table(opt66b):
  text = lm_memory.markdown([opt66b])
  assert '### 64 x v4: mesh data=1, fsdp=16, model=4' in text
  assert '| `layers/*/ffn/ffn/w_1/kernel` | 64 | 9216 x 36864 | embed, mlp | fsdp, model |' in text
  assert '65.720 billion parameters in bfloat16' in text
  assert opt66b.as_dict()['parameters'][0]['device_bytes'] > 0
  tiny = dataclasses.replace(opt66b, chip_bytes=10)
  assert 'GB: does not fit' in lm_memory.markdown([tiny])


def test_a_batch_that_does_not_divide_is_everywhere():
  fit = lm_memory.fit(CFG, 'h100', 8, batch=3, length=16)
  assert (fit.fsdp, fit.model) == (2, 4)
  assert {r.part for r in fit.caches} == {(3, 1, 16, 12)}


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('v3', 8, 1, 8), "chip is 'v3'"),
    (('v4', 0, 1, 8), 'chips is 0'),
    (('v4', 8, 0, 8), 'batch is 0'),
    (('v4', 8, 1, 17), 'length 17: the model has positions for 16'),
  ],
)
def test_what_cannot_be(arguments, message):
  with pytest.raises(ConfigError, match=message):
    lm_memory.fit(CFG, *arguments)
