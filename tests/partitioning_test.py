"""Eight devices compute what one computes, and the arrays really are spread over them."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech
from jax import P
from jax.sharding import NamedSharding

from gatedfm import partitioning
from gatedfm.models.speech import SpeechModel


@pytest.fixture(scope='module')
def mesh():
  return partitioning.make_mesh(data=2, fsdp=2, model=2)


def init(cfg):
  return lambda: SpeechModel(cfg).init(jax.random.key(0), *tiny_speech.inputs())['params']


@pytest.mark.parametrize(
  ('sizes', 'shape'),
  [
    ({}, (8, 1, 1)),
    ({'model': 2}, (4, 1, 2)),
    ({'data': 2, 'fsdp': -1, 'model': 2}, (2, 2, 2)),
    ({'data': 1, 'fsdp': 8}, (1, 8, 1)),
  ],
)
def test_mesh(sizes, shape):
  mesh = partitioning.make_mesh(**sizes)
  assert tuple(mesh.shape[a] for a in partitioning.MESH_AXES) == shape


@pytest.mark.parametrize(('hosts', 'model'), [([0, 0, 1, 1], 4), ([0, 1], 2), ([0, 1, 0, 1], 2)])
def test_a_model_axis_over_hosts_is_refused(hosts, model):
  devices = np.array([types.SimpleNamespace(process_index=i) for i in hosts])
  partitioning._check_hosts(devices.reshape(-1, 1, 1))
  with pytest.raises(ValueError, match=f'mesh model={model} spans hosts'):
    partitioning._check_hosts(devices.reshape(-1, 1, model))


def test_mesh_of_some_devices():
  mesh = partitioning.make_mesh(devices=jax.devices()[:2])
  assert mesh.devices.size == 2


@pytest.mark.parametrize(
  'sizes',
  [
    {'data': 3},
    {'data': 4},
    {'data': 16},
    {'model': 3},
    {'fsdp': -1},
    {'fsdp': 0},
    {'data': 8, 'model': -2, 'fsdp': -2},
  ],
)
def test_mesh_that_does_not_fit_says_so(sizes):
  named = ' '.join(f'{k}={v}' for k, v in ({'data': -1, 'fsdp': 1, 'model': 1} | sizes).items())
  with pytest.raises(ValueError, match=f'mesh {named} does not fit the device count 8:'):
    partitioning.make_mesh(**sizes)


def test_rules_speak_of_mesh_axes_and_every_parameter_has_a_rule():
  known = {name for name, _ in partitioning.RULES} | {None}
  for _, target in partitioning.RULES:
    names = (target,) if isinstance(target, str) else target or ()
    assert set(names) <= set(partitioning.MESH_AXES)
  boxed = tiny_speech.boxed(tiny_speech.config())
  for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
    assert set(leaf.names) <= known
    assert len(leaf.names) == leaf.value.ndim


def test_matrices_are_sharded_and_small_parameters_are_not(mesh):
  specs = jax.tree.map(lambda s: s.spec, partitioning.shardings(init(tiny_speech.config()), mesh))
  layer = specs['encoder']['layers']['scan']
  assert layer['ffn1']['ffn']['w_1']['kernel'] == P(None, 'fsdp', 'model')
  assert layer['ffn1']['ffn']['w_2']['kernel'] == P(None, 'model', 'fsdp')
  assert layer['attention']['attention']['query']['kernel'] == P(None, 'fsdp', 'model')
  assert layer['attention']['attention']['out']['kernel'] == P(None, 'model', 'fsdp')
  assert layer['attention']['merge']['kernel'] == P(None, 'fsdp', 'model')
  assert specs['decoder']['embedding'] == P('model', 'fsdp')
  assert specs['decoder']['output']['kernel'] == P('fsdp', 'model')
  spread = lambda spec: any(axis is not None for axis in spec)
  for path, spec in jax.tree.leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P)):
    name = path[-1].key
    if name in ('bias', 'scale', 'merge_bias', 'conv_kernel', 'conv_bias'):
      assert not spread(spec), path
    elif name in ('kernel', 'embedding') and 'conv' not in str(path[-2]):
      assert spread(spec), path


def test_an_axis_that_does_not_divide_is_replicated(mesh):
  cfg = tiny_speech.config(vocab_size=13, encoder_ffn=9)
  specs = jax.tree.map(lambda s: s.spec, partitioning.shardings(init(cfg), mesh))
  assert specs['decoder']['embedding'] == P(None, 'fsdp')
  assert specs['ctc']['kernel'] == P('fsdp', None)
  ffn = specs['encoder']['layers']['scan']['ffn1']['ffn']
  assert ffn['w_1']['kernel'] == P(None, 'fsdp', None)


def test_shardings_take_the_initializers_arguments(mesh):
  make = lambda rows: {'w': nn.LogicallyPartitioned(jnp.zeros((4, 6)) + rows, ('embed', 'mlp'))}
  assert partitioning.shardings(make, mesh, jnp.float32(1))['w'].spec == P('fsdp', 'model')


def test_constraints_take_effect_where_a_mesh_is_active(mesh):
  x = jnp.ones((8, 3, 4))
  fresh = lambda: jax.jit(lambda x: partitioning.constrain(2 * x, 'batch', 'time', 'mlp'))
  with partitioning.activate(mesh):
    y = fresh()(jax.device_put(x, NamedSharding(mesh, P())))
  assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(('data', 'fsdp'), None, 'model')), 3)
  assert y.addressable_shards[0].data.shape == (2, 3, 2)
  alone = fresh()(x)
  assert len(alone.sharding.device_set) == 1
  np.testing.assert_array_equal(alone, y)


def test_sharded_forward_and_gradient_are_those_of_one_device(mesh):
  cfg, params = tiny_speech.config(), tiny_speech.params()
  gates, (want, memory, want_grads) = tiny_speech.gradients(seed=3)

  with partitioning.activate(mesh):
    spread = jax.device_put(params, partitioning.shardings(init(cfg), mesh))
    # Inputs in full on every device: what splits the batch is the model's own constraints.
    everywhere = jax.device_put((gates, *tiny_speech.inputs()), NamedSharding(mesh, P()))
    run = tiny_speech.gradient_function(cfg)
    got, spread_memory, got_grads = run(spread, *everywhere)

  kernel = spread['encoder']['layers']['scan']['ffn1']['ffn']['w_1']['kernel']
  n, d, f = kernel.shape
  assert kernel.addressable_shards[0].data.shape == (n, d // 2, f // 2)
  assert spread_memory.addressable_shards[0].data.shape[0] == tiny_speech.BATCH // 4
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(spread_memory, memory, rtol=1e-5, atol=1e-5)
  for (path, a), b in zip(jax.tree.leaves_with_path(got_grads), jax.tree.leaves(want_grads)):
    scale = max(np.linalg.norm(b), 0.1)  # a key's bias has no gradient but rounding
    np.testing.assert_allclose(a / scale, b / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_batches_are_split_over_data_and_fsdp(mesh):
  batch = {'features': np.arange(24.0).reshape(8, 3), 'frames': np.arange(8)}
  spread = partitioning.global_batch(batch, mesh)
  for name, value in spread.items():
    assert value.sharding.is_equivalent_to(partitioning.batch_sharding(mesh), value.ndim)
    assert value.addressable_shards[0].data.shape[0] == 2
    np.testing.assert_array_equal(value, batch[name])
