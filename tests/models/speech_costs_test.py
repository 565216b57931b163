"""Costs from the configuration against the parameters and products of the traced model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech

from gatedfm import gates as gates_lib
from gatedfm.models import speech_costs
from gatedfm.models.speech import SpeechModel, for_inference
from gatedfm.models.speech_config import GateConfig, owsm
from gatedfm.nn import gating, layers

GATED = GateConfig(enabled=True, hidden=(5, 7), features=3)
CONFIGS = {
  'dense': tiny_speech.config(),
  'global': tiny_speech.config(gates=GATED, subsampling_channels=0),
  'layer': tiny_speech.config(gates=dataclasses.replace(GATED, scope='layer', combine='add')),
  'decoder alone': tiny_speech.config(
    'transformer',
    dataclasses.replace(GATED, stacks=('decoder',), context=('language', 'task')),
    decoder_layers=3,
  ),
  'blind': tiny_speech.config('transformer', dataclasses.replace(GATED, context=(), hidden=())),
}


def count_macs(jaxpr):
  """MACs of all products and convolutions, times the trips of a scan."""
  total = 0
  for eqn in jaxpr.eqns:
    out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      total += out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    elif eqn.primitive.name == 'conv_general_dilated':
      rhs = eqn.invars[1].aval.shape
      features = rhs[eqn.params['dimension_numbers'].rhs_spec[0]]
      total += out * math.prod(rhs) // features
    else:
      assert eqn.primitive.name not in ('cond', 'while')
      total += eqn.params.get('length', 1) * sum(count_macs(j) for j in tiny_speech.jaxprs_of(eqn))
  return total


def macs(fn, *args):
  return count_macs(jax.make_jaxpr(fn)(*args).jaxpr)


def parameters(tree):
  return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))


@functools.cache
def shapes(name):
  return tiny_speech.shapes(CONFIGS[name])


def test_counter_counts_scans_and_custom_derivatives():
  kernel = jnp.ones((3, 4))

  def body(x, _):
    return x, layers.dot(x, kernel, jnp.float32)

  assert macs(lambda x: jax.lax.scan(body, x, length=5), jnp.ones((2, 3))) == 5 * 2 * 3 * 4
  conv = lambda x: layers.depthwise_grouped(x, jnp.ones((3, 8)))
  assert macs(jax.jit(conv), jnp.ones((2, 7, 8))) == 2 * 7 * 8 * 3


@pytest.mark.parametrize('name', CONFIGS)
def test_parameters_of_sites_and_rest_make_the_model(name):
  cfg = CONFIGS[name]
  costs = speech_costs.site_costs(cfg, 31, 4)
  assert list(costs) == [s.name for s in cfg.all_sites()]
  sites = sum(s.size * costs[s.name].params for s in cfg.all_sites())
  assert sites + speech_costs.rest_cost(cfg, 31, 4).params == parameters(shapes(name))


@pytest.mark.parametrize(
  ('size', 'published'),
  [('base', 101_182_628), ('small', 366_653_348), ('medium', 1_016_891_044)],
)
def test_parameters_of_owsm(size, published):
  cfg = owsm(size)
  costs = speech_costs.site_costs(cfg, 3001, 1)
  sites = sum(s.size * costs[s.name].params for s in cfg.all_sites())
  assert sites + speech_costs.rest_cost(cfg, 3001, 1).params == published


def test_parameters_of_each_module():
  """A module's share is what the parameter tree holds under its name."""
  cfg, costs = CONFIGS['dense'], speech_costs.site_costs(CONFIGS['dense'], 31, 4)
  for stack in ('encoder', 'decoder'):
    layer = shapes('dense')[stack]['layers']['scan']
    for site in cfg.all_sites():
      if site.stack == stack:
        assert site.layers * costs[site.name].params == parameters(layer[site.module])


@pytest.mark.parametrize(
  ('name', 'frames'), [('global', 31), ('layer', 60), ('decoder alone', 45), ('blind', 7)]
)
def test_macs_are_those_of_the_traced_model(name, frames, monkeypatch):
  # The CPU's shift-and-add convolutions are not products; count the other form of them.
  monkeypatch.setattr(layers, 'depthwise', layers.depthwise_grouped)
  cfg, tokens = CONFIGS[name], 2
  model = SpeechModel(dataclasses.replace(cfg, scan_layers=False, merge_folded=True))
  params = jax.eval_shape(lambda p: for_inference(cfg, p)[1], shapes(name))
  call = lambda method, p, *args: model.apply({'params': p}, *args, method=method)
  x = jnp.zeros((1, frames, cfg.mels))
  ids = gating.Context(jnp.zeros(1, int), jnp.zeros(1, int))
  encode = lambda p, x: call('encode', p, x, jnp.array([frames]), ids)
  encoded = jax.eval_shape(encode, params, x)
  total = macs(encode, params, x)
  total += macs(lambda p, e: call('ctc_logits', p, e), params, encoded)

  start = lambda p, e, length: call('start', p, e, length)
  total += macs(lambda p, e: start(p, e, tokens), params, encoded)
  assert total == speech_costs.total_macs(cfg, frames, 0)

  for i in range(tokens):
    # A cache of just the tokens there are: a longer one multiplies masked positions too.
    caches = jax.eval_shape(lambda p, e, i=i: start(p, e, i + 1), params, encoded)
    step = lambda p, c, e, i=i: call('step', p, jnp.zeros((1, 1), int), i, c, e)
    total += macs(step, params, caches, encoded)
    assert total == speech_costs.total_macs(cfg, frames, i + 1)


# GMAC for 30 s, from ESPnet's modules: subsampling; one layer's feed-forward, attention,
# cgMLP and merge; the whole encoder; the gateable part of it without the merge, percent.
PUBLISHED = {
  'base': (21.2, 0.88, 0.87, 0.68, 0.24, 42.5, 47),
  'small': (84.3, 3.53, 2.63, 2.69, 0.92, 204, 55),
  'medium': (149.8, 6.28, 4.29, 4.76, 1.62, 568, 69),
}


@pytest.mark.parametrize('size', PUBLISHED)
def test_published_budget(size):
  front, ffn, attention, cgmlp, merge, encoder, gateable = PUBLISHED[size]
  cfg, giga = owsm(size), 1e9
  costs = speech_costs.site_costs(cfg, 3001, 0)
  cost = lambda m: costs[f'encoder/{m}'].macs / giga
  rounded = functools.partial(pytest.approx, rel=0)
  assert cost('ffn1') == cost('ffn2') == rounded(ffn, abs=0.005)
  # Each branch holds half of the merge.
  assert cost('attention') == rounded(attention + merge / 2, abs=0.0076)
  assert cost('cgmlp') == rounded(cgmlp + merge / 2, abs=0.0076)
  head = 749 * cfg.d * cfg.vocab_size / giga
  ours = speech_costs.rest_cost(cfg, 3001, 0).macs / giga - head
  assert ours == rounded(front, abs=0.05)
  stack = cfg.encoder_layers * sum(cost(m) for m in ('ffn1', 'attention', 'cgmlp', 'ffn2'))
  assert ours + stack == rounded(encoder, abs=0.5)
  exact = 2 * 749 * (cfg.d + cfg.kernel) * cfg.d / giga
  assert exact == rounded(merge, abs=0.005)
  share = (stack - cfg.encoder_layers * exact) / (ours + stack)
  assert 100 * share == rounded(gateable, abs=0.5)


def test_published_decoding_with_cached_keys():
  cfg = owsm('medium')
  total = lambda tokens: speech_costs.total_macs(cfg, 3001, tokens) / 1e9
  assert total(51) - total(50) == pytest.approx(0.34, abs=0.01)
  cross = speech_costs.site_costs(cfg, 3001, 0)['decoder/cross_attention']
  assert 18 * cross.macs / 1e9 == pytest.approx(28.3, abs=0.05)


def test_gates_take_their_macs_away():
  cfg = CONFIGS['dense']
  costs, sites = speech_costs.site_costs(cfg, 60, 5), cfg.all_sites()
  rest, full = speech_costs.rest_cost(cfg, 60, 5).macs, speech_costs.total_macs(cfg, 60, 5)
  closed = gates_lib.Gates({s.name: jnp.zeros(s.layers) for s in sites})
  assert speech_costs.total_macs(cfg, 60, 5, closed) == rest
  assert speech_costs.total_macs(cfg, 60, 5, gates_lib.all_open(sites)) == full
  # A site that is not named is open; a mean over examples is a fraction.
  some = gates_lib.Gates({'encoder/cgmlp': np.array([0.0, 0.25])})
  assert speech_costs.total_macs(cfg, 60, 5, some) == pytest.approx(
    full - 1.75 * costs['encoder/cgmlp'].macs
  )
  assert speech_costs.macs_per_audio_second(cfg, 60, 5) == pytest.approx(full / 0.6)


def test_bytes_follow_the_stored_dtype():
  cfg = CONFIGS['dense']
  whole, half = (speech_costs.site_costs(cfg, 31, 4, d) for d in ('float32', 'bfloat16'))
  for name, cost in whole.items():
    assert cost.bytes == 4 * cost.params == 2 * half[name].bytes
  assert speech_costs.rest_cost(cfg, 31, 4, 'bfloat16').bytes == 2 * (
    speech_costs.rest_cost(cfg, 31, 4).params
  )


@pytest.mark.parametrize(
  ('frames', 'tokens', 'gates', 'named'),
  [
    (6, 1, None, '6 frames'),
    (31, -1, None, 'tokens is -1'),
    (31, 1, {'encoder/ffn9': 1.0}, 'encoder/ffn9'),
    (31, 1, {'encoder/ffn1': np.ones(7)}, 'encoder/ffn1'),
  ],
)
def test_errors_name_the_thing(frames, tokens, gates, named):
  gates = gates_lib.Gates(gates) if gates else None
  with pytest.raises(ValueError, match=named):
    speech_costs.total_macs(CONFIGS['dense'], frames, tokens, gates)
