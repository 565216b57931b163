"""The language model: gates, layouts and caches all give the dense model's answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech

from gatedfm.gates import Gates, all_open
from gatedfm.models import stack
from gatedfm.models.lm import LanguageModel, for_inference
from gatedfm.models.lm_config import LmConfig, llama, opt, smollm2
from gatedfm.models.speech_config import ConfigError

B, L = 3, 9
SIZES = {'vocab_size': 19, 'd': 12, 'layers': 3, 'ffn': 10, 'max_tokens': 12}
KINDS = {
  'opt': LmConfig(**SIZES, heads=2),
  'opt_350m': LmConfig(**SIZES, heads=2, pre_norm=False, final_norm=False, embed_width=8),
  'llama': llama(**SIZES, heads=6, kv_heads=2, tied=False, head_width=4),
}


@pytest.fixture(scope='module', params=KINDS)
def built(request, fast_compilation):
  """Configuration and random parameters in the scanned layout."""
  cfg = KINDS[request.param]
  cfg.validate()
  model = LanguageModel(cfg)
  init = lambda key: tiny_speech.nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32)))['params']
  shapes = jax.eval_shape(init, jax.random.key(0))
  return cfg, tiny_speech.random_tree(shapes, seed=1, scale=0.5)


def tokens(length=L):
  return np.random.default_rng(0).integers(0, 19, (B, length)).astype(np.int32)


def random_gates(cfg, seed, shape=()):
  """0 or 1, `[N, *shape]` per module."""
  rng = np.random.default_rng(seed)
  draw = lambda s: (rng.random((s.layers, *shape)) < 0.5).astype(np.float32)
  return Gates({s.name: draw(s) for s in cfg.all_sites()})


def run(model, params, *args, **kwargs):
  return np.asarray(tiny_speech.jit(lambda p: model.apply({'params': p}, *args, **kwargs))(params))


def test_all_open_is_dense_and_scanned_is_unrolled(built):
  cfg, params = built
  dense = run(LanguageModel(cfg), params, tokens())
  assert dense.shape == (B, L, cfg.vocab_size)
  sites = (*cfg.all_sites(), *cfg.unit_sites())
  np.testing.assert_array_equal(
    run(LanguageModel(cfg), params, tokens(), gates=all_open(sites)), dense
  )
  unrolled = run(*for_inference(cfg, params), tokens())
  np.testing.assert_allclose(unrolled, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_mask_skip_scanned_skip_and_fixed_agree(built, seed):
  cfg, params = built
  gates = random_gates(cfg, seed)
  unrolled = stack.unstack(params)
  want = run(for_inference(cfg, params)[0], unrolled, tokens(), gates=gates)
  fixed = Gates({n: tuple(bool(b) for b in g) for n, g in gates.values.items()})
  ways = {
    'skip': (for_inference(cfg, params, 'skip'), gates),
    'scanned': ((LanguageModel(dataclasses.replace(cfg, execution='skip')), params), gates),
    'fixed': (for_inference(cfg, params), fixed),
  }
  for name, ((model, own), given) in ways.items():
    got = run(model, own, tokens(), gates=given)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)
  assert (want != run(for_inference(cfg, params)[0], unrolled, tokens())).any()


def test_a_closed_layer_passes_on_what_it_gets(built):
  cfg, params = built
  closed = Gates({s.name: jnp.array([1.0, 0, 1]) for s in cfg.all_sites()})
  got = run(*for_inference(cfg, params), tokens(), gates=closed)
  if not cfg.pre_norm:  # the norms of its sums are left: a layer of zeros
    zeros = jax.tree_util.tree_map_with_path(
      lambda path, a: a if 'norm' in str(path[-2]) else a.at[1].set(0),
      params['decoder']['layers']['scan'],
    )
    own = {'decoder': params['decoder'] | {'layers': {'scan': zeros}}}
    np.testing.assert_allclose(got, run(*for_inference(cfg, own), tokens()), rtol=1e-5, atol=1e-5)
    return
  shorter = dataclasses.replace(cfg, layers=2)
  own = jax.tree.map(lambda a: a[np.array([0, 2])], params['decoder']['layers']['scan'])
  own = {'decoder': params['decoder'] | {'layers': {'scan': own}}}
  np.testing.assert_allclose(got, run(*for_inference(shorter, own), tokens()), rtol=1e-5, atol=1e-5)


def test_examples_with_gates_of_their_own(built):
  cfg, params = built
  gates = random_gates(cfg, 5, (B,))
  model, own = for_inference(cfg, params)
  got = run(model, own, tokens(), gates=gates)
  for b in range(B):
    alone = Gates({n: g[:, b] for n, g in gates.values.items()})
    want = run(model, own, tokens()[b : b + 1], gates=alone)
    np.testing.assert_allclose(got[b : b + 1], want, rtol=1e-4, atol=1e-5)
  bucketed = for_inference(cfg, params, 'bucketed')
  np.testing.assert_allclose(run(*bucketed, tokens(), gates=gates), got, rtol=1e-4, atol=1e-5)


def test_heads_and_channels(built):
  """A closed head is one whose part of the output projection is zero."""
  cfg, params = built
  head, channel = cfg.unit_sites()
  heads, channels = np.ones((3, head.units)), np.ones((3, channel.units))
  heads[1, 1], channels[2, 3] = 0, 0
  model, own = for_inference(cfg, params)
  gates = Gates({head.name: jnp.array(heads), channel.name: jnp.array(channels)})
  got = run(model, own, tokens(), gates=gates)
  cut = jax.tree.map(np.array, own)
  layers = cut['decoder']['layers']
  k = cfg.width
  layers['layers_1']['attention']['attention']['out']['kernel'][k : 2 * k] = 0
  layers['layers_2']['ffn']['ffn']['w_2']['kernel'][3] = 0
  np.testing.assert_allclose(got, run(model, cut, tokens()), rtol=1e-5, atol=1e-5)
  # Gates of every token: the same answer where they are alike.
  each = jnp.broadcast_to(jnp.array(heads)[:, None, None], (3, B, L, head.units))
  apply = lambda g: model.apply(
    {'params': own}, tokens(), None, {'attention_heads': g}, True, method=_decoded
  )
  alike = Gates({head.name: jnp.array(heads)})
  np.testing.assert_allclose(
    jax.jit(apply)(each), run(model, own, tokens(), gates=alike), rtol=1e-5, atol=1e-5
  )


def _decoded(model, *args):
  return model.logits(model.decoder.hidden(*args))


@pytest.mark.parametrize('execution', ['mask', 'skip'])
@pytest.mark.parametrize('padded', [False, True])
def test_cached_steps_are_whole_forward_passes(built, execution, padded):
  cfg, params = built
  model, own = for_inference(cfg, params, execution)
  gates, ids = random_gates(cfg, 2), tokens()
  mask = np.ones((B, L), bool)
  if padded:
    mask[1, :2], mask[2, :4] = False, False
  want = run(model, own, ids, mask if padded else None, gates)
  call = tiny_speech.jit(
    lambda p, ids, at, caches: model.apply(
      {'params': p}, ids, at, caches, mask, gates, method='step'
    )
  )
  caches = model.apply({'params': own}, B, L, gates, method='start')
  hidden, at = [], 0
  for width in (5, 1, 1, 2):
    x, caches = call(own, ids[:, at : at + width], jnp.int32(at), caches)
    hidden.append(x)
    at += width
  got = model.apply({'params': own}, jnp.concatenate(hidden, 1), method='logits')
  np.testing.assert_allclose(np.asarray(got)[mask], want[mask], rtol=1e-4, atol=1e-5)


def test_bfloat16(built):
  """Parameters and products of half the width: the same logits, as far as its digits go."""
  cfg, params = built
  want = run(*for_inference(cfg, params), tokens())
  halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  wide = {'dtype': 'bfloat16', 'activation_dtype': 'bfloat16'}
  model, own = for_inference(dataclasses.replace(cfg, **wide), halved)
  got = run(model, own, tokens())
  assert got.dtype == np.float32
  assert (got != got.astype(jnp.bfloat16)).any()  # logits keep their digits
  assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()
  start = model.apply({'params': own}, B, L, method='start')
  args = tokens(), 0, start, np.ones((B, L), bool)
  step = tiny_speech.jit(lambda p: model.apply({'params': p}, *args, method='step'))
  cached = model.apply({'params': own}, step(own)[0], method='logits')
  np.testing.assert_allclose(cached, got, atol=0.02 * np.abs(want).max())


def test_later_tokens_are_not_seen(built):
  cfg, params = built
  model, own = for_inference(cfg, params)
  other = tokens().copy()
  other[:, 6:] = (other[:, 6:] + 1) % 19
  a, b = run(model, own, tokens()), run(model, own, other)
  np.testing.assert_array_equal(a[:, :6], b[:, :6])
  assert (a[:, 6:] != b[:, 6:]).any(-1).all()


def count(cfg):
  init = lambda k: LanguageModel(cfg).init(k, jnp.zeros((1, 1), jnp.int32))
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))


@pytest.mark.parametrize(
  ('cfg', 'millions'),
  [(opt('125m'), 125.24), (opt('350m'), 331.20), (opt('1.3b'), 1315.8), (smollm2(), 134.52)],
)
def test_published_sizes(cfg, millions):
  assert count(cfg) / 1e6 == pytest.approx(millions, rel=2e-4)


def test_the_largest_opt_is_traced_without_memory():
  assert count(opt('66b')) / 1e9 == pytest.approx(65.72, rel=1e-3)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'heads': 5}, '5 heads do not divide a width of 768'),
    ({'kv_heads': 5}, '5 heads of keys and values do not divide 12'),
    ({'activation': 'tanh'}, "activation is 'tanh'"),
    ({'pre_norm': False}, 'no final_norm'),
    ({'positions': 'rotary', 'head_width': 7}, 'a head has 7'),
    ({'layers': 0}, 'layers is 0'),
    ({'kv_heads': -1}, 'kv_heads is -1'),
  ],
)
def test_impossible_models(change, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(LmConfig(), **change).validate()


def test_too_many_tokens(built):
  cfg, params = built
  with pytest.raises(ValueError, match='13 tokens; the model has positions for 12'):
    run(LanguageModel(cfg), params, tokens(13))
  with pytest.raises(ValueError, match='unknown sites'):
    run(LanguageModel(cfg), params, tokens(), gates=Gates({'decoder/cgmlp': jnp.ones(3)}))
