"""Closed heads and channels: multiplied by zero or cut out of the arrays, the answer is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech

from gatedfm.benchmarks import ways
from gatedfm.execution.compact import compact, compact_units
from gatedfm.execution.layerwise import Layerwise
from gatedfm.gates import Gates, Pattern
from gatedfm.models.speech import for_inference
from gatedfm.models.speech_config import ENCODER_MODULES

TOKENS = tiny_speech.TOKENS


@functools.cache
def model(encoder='e_branchformer', execution='mask'):
  cfg = tiny_speech.config(encoder)
  return for_inference(cfg, tiny_speech.params(encoder), execution)


def random_units(cfg, seed, batch=None):
  rng = np.random.default_rng(seed)
  shape = lambda s: (s.layers, *(() if batch is None else (batch,)), s.units)
  return Gates({s.name: rng.integers(0, 2, shape(s)).astype(np.float32) for s in cfg.unit_sites()})


def everything(built, params, gates, inputs):
  """Teacher-forced logits, and the same decoded step by step."""
  call = functools.partial(built.apply, {'params': params})
  tokens = inputs[2]
  out = call(*inputs, gates)
  caches = call(out.encoded, TOKENS, method='start')
  decoded = []
  for i in range(TOKENS):
    logits, caches = call(tokens[:, i : i + 1], i, caches, out.encoded, method='step')
    decoded.append(logits[:, 0])
  return out.logits, jnp.stack(decoded, 1), out.ctc_logits


def assert_close(a, b):
  for x, y in zip(a, b):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('encoder', list(ENCODER_MODULES))
def test_mask_is_compact(encoder):
  built, params = model(encoder)
  inputs = tiny_speech.inputs(2)
  run = tiny_speech.jit(lambda gates: everything(built, params, gates, inputs))
  sizes = set()
  nothing = jax.tree.map(np.zeros_like, random_units(built.cfg, 0))
  for gates in (nothing, random_units(built.cfg, 1), random_units(built.cfg, 2)):
    small = compact_units(params, gates, built.cfg)
    got = tiny_speech.jit(lambda p: everything(built, p, None, inputs))(small)
    want = run(gates)
    assert_close(want, got)
    assert_close(want[:1], want[1:2])
    sizes.add(sum(x.size for x in jax.tree.leaves(small)))
  assert len(sizes) == 3
  assert max(sizes) < sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize('execution', ['skip', 'bucketed'])
def test_every_execution_multiplies_by_units(execution):
  """Beside gates of modules; `bucketed` with all of them differing by example."""
  batch = 2 if execution == 'bucketed' else 1  # as many as heads: no axis may be taken for another
  inputs = tiny_speech.inputs(batch)
  cfg = model()[0].cfg
  each = batch if execution == 'bucketed' else None
  results = []
  for way in ('mask', execution):
    built, params = model('e_branchformer', way)
    run = tiny_speech.jit(lambda gates, b=built, p=params: everything(b, p, gates, inputs))
    results.append(run)
  for seed in range(4):
    modules = tiny_speech.random_gates(cfg, seed, each)
    for units in (random_units(cfg, seed), random_units(cfg, seed, each)):
      gates = Gates(modules.values | units.values)
      assert_close(results[0](gates), results[1](gates))


def test_modules_and_units_are_compacted_together():
  built, params = model()
  sites = built.cfg.all_sites()
  rng = np.random.default_rng(0)
  pattern = Pattern(tuple((s.name, tuple((rng.random(s.layers) < 0.6).tolist())) for s in sites))
  units = random_units(built.cfg, 3)
  small = compact_units(compact(params, pattern), units, built.cfg)
  inputs = tiny_speech.inputs(1)
  got = tiny_speech.jit(lambda p: everything(built, p, pattern.fixed(), inputs))(small)
  gates = Gates(pattern.to_gates().values | units.values)
  assert_close(tiny_speech.jit(lambda g: everything(built, params, g, inputs))(gates), got)


def test_which_units_a_site_has():
  units = {s.name: (s.unit, s.units) for s in tiny_speech.config().unit_sites()}
  assert units == {
    'encoder/ffn1_channels': ('channel', 12),
    'encoder/attention_heads': ('head', 2),
    'encoder/ffn2_channels': ('channel', 12),
    'decoder/self_attention_heads': ('head', 2),
    'decoder/cross_attention_heads': ('head', 2),
    'decoder/ffn_channels': ('channel', 16),
  }


@pytest.mark.parametrize(
  ('gates', 'message'),
  [
    ({'encoder/ffn1': np.ones(2)}, 'unknown sites'),
    ({'encoder/attention_heads': np.ones((2, 3))}, 'is not 2 units'),
    ({'encoder/attention_heads': np.full((2, 2), 0.5)}, 'attention_heads lie between'),
    ({'encoder/attention_heads': np.ones((2, 3, 2))}, 'attention_heads differ by example'),
  ],
)
def test_what_cannot_be_cut(gates, message):
  built, params = model()
  with pytest.raises(ValueError, match=message):
    compact_units(params, Gates(gates), built.cfg)


def test_a_single_head_has_gates_of_layers():
  cfg = tiny_speech.config(heads=1)
  built, params = for_inference(cfg, tiny_speech.random_tree(tiny_speech.shapes(cfg)))
  heads = Gates({'encoder/attention_heads': np.array([0.0, 1.0])})
  small = compact_units(params, heads, built.cfg)['encoder']['layers']
  widths = [
    small[f'layers_{i}']['attention']['attention']['query']['kernel'].value.shape[1] for i in (0, 1)
  ]
  assert widths == [0, 8]


def test_stacked_parameters_are_refused():
  built, params = for_inference(tiny_speech.config(), tiny_speech.params(), 'skip', True)
  with pytest.raises(
    ValueError, match="encoder/ffn1_channels: the encoder's parameters are stacked"
  ):
    compact_units(params, random_units(built.cfg, 0), built.cfg)


def test_layers_called_from_the_host_have_widths_of_their_own():
  built, params = model()
  small = compact_units(params, random_units(built.cfg, 1), built.cfg)
  x_BxSxD, mask_BxS = jax.random.normal(jax.random.key(0), (1, 8, 8)), jnp.ones((1, 8), bool)
  open_ = Pattern(
    tuple((s.name, (True,) * s.layers) for s in built.cfg.all_sites() if s.stack == 'encoder')
  )
  got = Layerwise(built.cfg)(small['encoder'], x_BxSxD, mask_BxS, open_)
  want = tiny_speech.jit(functools.partial(ways.encode, built, gates={}))(small, x_BxSxD)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('changes', [{'encoder_ffn': 24}, {'cgmlp': 24}, {'d': 16}])
def test_parameters_of_another_width_are_an_error(changes):
  """Nobody has compacted them: it is another model's checkpoint."""
  built, params = for_inference(tiny_speech.config(**changes), tiny_speech.params())
  run = lambda: jax.eval_shape(lambda: built.apply({'params': params}, *tiny_speech.inputs(1)))
  with pytest.raises(Exception, match='shape'):
    run()
