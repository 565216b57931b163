"""mask == compact for language models, whatever is closed, saved and read again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech
from flax import traverse_util

from gatedfm import partitioning
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm, lm_losses
from gatedfm.models.lm import for_inference
from gatedfm.models.lm_config import LmConfig, llama

B, L = 2, 7
SIZES = {'vocab_size': 19, 'd': 12, 'layers': 3, 'ffn': 10, 'max_tokens': 12}
KINDS = {
  'opt': LmConfig(**SIZES, heads=3),
  'opt_350m': LmConfig(**SIZES, heads=3, pre_norm=False, final_norm=False, embed_width=8),
  'llama': llama(**SIZES, heads=6, kv_heads=2, tied=False, head_width=4),
}
HEADS, CHANNELS = 'decoder/attention_heads', 'decoder/ffn_channels'
ATTENTION, FFN = 'decoder/attention', 'decoder/ffn'


def model(kind):
  cfg = KINDS[kind]
  flat = tiny_speech.random_tree(lm.abstract_params(cfg), seed=2)
  params = traverse_util.unflatten_dict(flat, sep='/')
  return LmCheckpoint(cfg, params, None, {'format': 'test'})


def tokens():
  return np.random.default_rng(0).integers(0, 19, (B, L)).astype(np.int32)


def corner(name, cfg):
  """Gates of a corner, by name."""
  rng = np.random.default_rng(3)
  draw = lambda *shape: (rng.random(shape) < 0.5).astype(np.float32)
  heads, channels = np.ones((3, cfg.heads), np.float32), np.ones((3, cfg.ffn), np.float32)
  if name == 'heads of a layer':
    heads[1] = 0
    return {HEADS: heads}
  if name == 'uneven groups':  # of six query heads on two of keys and values
    heads[0, 0], heads[1, -2:], heads[2, : cfg.heads // 2] = 0, 0, 0
    return {HEADS: heads}
  if name == 'channels of a layer':
    channels[2] = 0
    return {CHANNELS: channels}
  if name == 'modules':
    return {ATTENTION: np.array([1.0, 0, 1]), FFN: np.array([0.0, 1, 1])}
  if name == 'a layer':
    return {ATTENTION: np.array([1.0, 0, 1]), FFN: np.array([1.0, 0, 1])}
  if name == 'everything':
    return {ATTENTION: np.zeros(3), FFN: np.zeros(3)}
  if name == 'nothing':
    return {HEADS: heads}
  return {
    HEADS: draw(3, cfg.heads),
    CHANNELS: draw(3, cfg.ffn),
    ATTENTION: np.array([1.0, 1, 0]),
    FFN: np.array([1.0, 0, 1]),
  }


CORNERS = [
  'heads of a layer', 'uneven groups', 'channels of a layer', 'modules', 'a layer', 'everything',
  'nothing', 'all at once',
]  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', CORNERS)
def test_mask_is_compact(kind, name, tmp_path, fast_compilation):
  dense = model(kind)
  gates = Gates(corner(name, dense.cfg))
  small = lm_workdir.compacted(dense, gates, {'parent': 'a'})
  net, params = for_inference(dense.cfg, dense.params)
  masked = Gates({k: jnp.asarray(v) for k, v in gates.values.items()})
  want = tiny_speech.jit(lambda p: net.apply({'params': p}, tokens(), gates=masked))(params)

  lm_workdir.save(tmp_path / 'own', small)
  again = lm_workdir.load(tmp_path / 'own')
  assert again.origin == {'parent': 'a'}
  for one in (small, again):
    fixed = one.fixed()
    run = tiny_speech.jit(lambda p, fixed=fixed: net.apply({'params': p}, tokens(), gates=fixed))
    np.testing.assert_allclose(run(one.params), want, rtol=1e-5, atol=1e-5)

  np.testing.assert_allclose(cached(net, again), want, rtol=1e-4, atol=1e-5)


def cached(net, one):
  """Logits with caches, in two steps."""
  fixed, mask = one.fixed(), np.ones((B, L), bool)
  step = tiny_speech.jit(
    lambda p, ids, at, caches: net.apply({'params': p}, ids, at, caches, mask, fixed, method='step')
  )
  caches = net.apply({'params': one.params}, B, L, fixed, method='start')
  x, caches = step(one.params, tokens()[:, :4], jnp.int32(0), caches)
  y, _ = step(one.params, tokens()[:, 4:], jnp.int32(4), caches)
  hidden = jnp.concatenate([x, y], 1)
  return net.apply({'params': one.params}, hidden, method='logits')


EMPTIED = {
  # By module, those of three layers that lose all of their units.
  'first and last': ([0], [2]),
  'in a row': ([1, 2], [0, 1]),
  'all': ([0, 1, 2], [0, 1, 2]),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', EMPTIED)
def test_constants_are_folded(kind, name, tmp_path, fast_compilation):
  dense = model(kind)
  cfg, (attention, ffn) = dense.cfg, EMPTIED[name]
  heads, channels = np.ones((3, cfg.heads), np.float32), np.ones((3, cfg.ffn), np.float32)
  heads[attention], channels[ffn], heads[:, 0] = 0, 0, 0
  gates = Gates({HEADS: heads, CHANNELS: channels})
  kept = lm_workdir.compacted(dense, gates, {})
  small = lm_workdir.compacted(dense, gates, {}, fold=True)
  pattern = dict(small.pattern.sites)
  assert pattern[ATTENTION] == tuple(i not in attention for i in range(3))
  assert pattern[FFN] == tuple(i not in ffn for i in range(3))
  assert len(jax.tree.leaves(small.params)) < len(jax.tree.leaves(kept.params))
  lm_workdir.save(tmp_path / 'own', small)
  again = lm_workdir.load(tmp_path / 'own')

  net, params = for_inference(cfg, dense.params)
  ids, mask, at = tokens(), np.ones((B, L), bool), np.array([[5, 6], [3, 6]])
  call = lambda p, gates: (
    net.apply({'params': p}, ids, gates=gates),
    lm_losses.losses(net, p, ids, mask, at, gates),
  )
  masked = Gates({k: jnp.asarray(v) for k, v in gates.values.items()})
  want = tiny_speech.jit(lambda p: call(p, masked))(params)
  got = tiny_speech.jit(lambda p: call(p, again.fixed()))(again.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
  np.testing.assert_allclose(cached(net, again), want[0], rtol=1e-4, atol=1e-5)


def test_a_constant_that_nothing_takes_stays():
  cfg = dataclasses.replace(KINDS['llama'], use_bias=True)
  flat = tiny_speech.random_tree(lm.abstract_params(cfg), seed=2)
  dense = LmCheckpoint(cfg, traverse_util.unflatten_dict(flat, sep='/'), None, {})
  heads = np.ones((3, 6), np.float32)
  heads[:2] = 0
  small = lm_workdir.compacted(dense, Gates({HEADS: heads}), {}, fold=True)
  assert dict(small.pattern.sites)[ATTENTION] == (True, False, True)
  run = lambda m, gates: lm.for_inference(cfg, m.params)[0].apply(
    {'params': m.params}, tokens(), gates=gates
  )
  want = run(dense, Gates({HEADS: jnp.asarray(heads)}))
  np.testing.assert_allclose(run(small, small.fixed()), want, rtol=1e-5, atol=1e-5)


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_what_is_closed_is_gone():
  dense = model('llama')
  cfg, d, k, f = dense.cfg, 12, 4, 10
  layer = lambda m, i: m.params['decoder']['layers'][f'layers_{i}']
  heads = np.ones((3, 6), np.float32)
  heads[0, :3], heads[1, 1] = 0, 0  # a whole group; one of a group
  small = lm_workdir.compacted(dense, Gates({HEADS: heads}), {})
  # Queries and output of four heads, keys and values of one.
  assert size(dense.params) - size(small.params) == d * k * (2 * 4 + 2 * 1)
  caches = lm.LanguageModel(dataclasses.replace(cfg, scan_layers=False)).apply(
    {'params': small.params}, B, L, small.fixed(), method='start'
  )
  assert [c.key.shape[1] for c in caches] == [1, 2, 2]
  gone = lm_workdir.compacted(dense, Gates({FFN: np.array([1.0, 0, 1])}), {})
  assert size(dense.params) - size(gone.params) == 3 * d * f + d
  assert 'ffn' not in layer(gone, 1)


def test_a_compacted_model_on_devices(tmp_path):
  dense = model('llama')
  small = lm_workdir.compacted(dense, Gates(corner('all at once', dense.cfg)), {})
  lm_workdir.save(tmp_path / 'own', small)
  mesh = partitioning.make_mesh(data=2, fsdp=2, model=2)
  laid_out = lm_workdir.load(tmp_path / 'own', mesh)
  jax.tree.map(np.testing.assert_array_equal, laid_out.params, small.params)


def test_only_whole_models_are_cut():
  dense = model('opt')
  small = lm_workdir.compacted(dense, Gates(corner('modules', dense.cfg)), {})
  with pytest.raises(ValueError, match='compacted before'):
    lm_workdir.compacted(small, Gates({}), {})
  with pytest.raises(ValueError, match='unknown sites'):
    lm_workdir.compacted(dense, Gates({'decoder/cgmlp': np.ones(3)}), {})
  with pytest.raises(ValueError, match='between open and closed'):
    lm_workdir.compacted(dense, Gates({HEADS: np.full((3, 3), 0.5)}), {})
