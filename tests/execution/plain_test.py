"""Compacted models as plain ones: the same logits; what is not alike is named."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_speech
from flax import traverse_util

from gatedfm import partitioning
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.execution.plain import plain, projected
from gatedfm.gates import Gates
from gatedfm.models import lm, stack
from gatedfm.models.lm_config import LmConfig, llama
from gatedfm.models.speech_config import ConfigError
from gatedfm.pruning import factors
from gatedfm.pruning.allocation import Allocation, allocate

SIZES = {'vocab_size': 19, 'd': 12, 'layers': 4, 'ffn': 10, 'max_tokens': 12}
KINDS = {
  'opt': LmConfig(**SIZES, heads=3),
  'opt_350m': LmConfig(**SIZES, heads=3, pre_norm=False, final_norm=False, embed_width=8),
  'llama': llama(**SIZES, heads=6, kv_heads=3, head_width=4),
}
HEADS, CHANNELS = 'decoder/attention_heads', 'decoder/ffn_channels'
ATTENTION, FFN = 'decoder/attention', 'decoder/ffn'
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 7)).astype(np.int32)


def cut(kind, gates, fold=False):
  cfg = KINDS[kind]
  flat = tiny_speech.random_tree(lm.abstract_params(cfg), seed=2)
  dense = LmCheckpoint(cfg, traverse_util.unflatten_dict(flat, sep='/'), None, {'format': 'test'})
  return lm_workdir.compacted(dense, Gates(gates), {'parent': 'a'}, fold)


def logits(model, params=None, scan=False):
  cfg = dataclasses.replace(model.cfg, scan_layers=scan)
  run = lambda p: lm.LanguageModel(cfg).apply({'params': p}, TOKENS, gates=model.fixed())
  return tiny_speech.jit(run)(model.params if params is None else params)


def uniform(cfg, share, **how):
  """Gates by random scores, as many closed in each layer."""
  scores = np.random.default_rng(4)
  scores = {HEADS: scores.random((4, cfg.heads)), CHANNELS: scores.random((4, cfg.ffn))}
  return allocate(scores, {HEADS: share, CHANNELS: 0.3}, cfg, Allocation('uniform', **how)).values


def without(*layers):
  return np.array([float(i not in layers) for i in range(4)])


@pytest.mark.parametrize(
  ('kind', 'share', 'how', 'modules', 'sizes'),
  [
    ('opt', 0.4, {}, {}, (4, 2, 2, 7)),
    ('opt_350m', 0.4, {}, {}, (4, 2, 2, 7)),
    ('opt', 0, {}, {ATTENTION: without(1), FFN: without(1)}, (3, 3, 3, 7)),
    ('llama', 0.4, {'groups': True}, {}, (4, 4, 2, 7)),
    ('llama', 0.7, {'groups': True}, {ATTENTION: without(0), FFN: without(0)}, (3, 2, 1, 7)),
    (
      'opt',
      0,
      {},
      {ATTENTION: without(2), CHANNELS: np.outer(without(2), np.ones(10))},
      (3, 3, 3, 10),
    ),
    # The attention of layer 1 with the feed-forward of layer 2.
    ('llama', 0, {}, {ATTENTION: without(2), FFN: without(1)}, (3, 6, 3, 7)),
  ],
)
def test_a_plain_model_is_the_compacted_one(kind, share, how, modules, sizes, fast_compilation):
  gates = uniform(KINDS[kind], share, **how) | modules
  small = cut(kind, gates)
  model = plain(small)
  cfg = model.cfg
  assert (cfg.layers, cfg.heads, cfg.groups, cfg.ffn) == sizes
  cfg.validate()
  assert model.cut is None
  assert model.origin == {'parent': 'a', 'kept': cut(kind, gates, fold=True).kept()}
  shapes = traverse_util.flatten_dict(jax.tree.map(np.shape, model.params), sep='/')
  assert shapes == {k: x.shape for k, x in lm.abstract_params(cfg).items()}
  want = logits(small)
  np.testing.assert_allclose(logits(model), want, rtol=1e-5, atol=1e-5)
  if kind == 'llama':
    scanned = logits(model, stack.restack(model.params), scan=True)
    np.testing.assert_allclose(scanned, want, rtol=1e-5, atol=1e-5)
  assert plain(model) is model


def test_a_plain_model_is_cut_and_laid_out_again(tmp_path):
  model = plain(cut('llama', uniform(KINDS['llama'], 0.4, groups=True)))
  lm_workdir.save(tmp_path / 'plain', model)
  mesh = partitioning.make_mesh(data=1, fsdp=4, model=2)
  spread = lm_workdir.load(tmp_path / 'plain', mesh)
  query = spread.params['decoder']['layers']['layers_0']['attention']['attention']['query']
  assert query['kernel'].addressable_shards[0].data.shape == (3, 8)
  again = plain(lm_workdir.compacted(spread, Gates({CHANNELS: np.arange(7.0) > 2}), {}))
  assert again.cfg.ffn == 4


def ragged(site, layer, *units):
  gates = np.ones((4, 6 if site == HEADS else 10))
  gates[layer, list(units)] = 0
  return {site: gates}


@pytest.mark.parametrize(
  ('kind', 'gates', 'message'),
  [
    ('llama', ragged(HEADS, 2, 0, 1), 'layer 2 keeps 4 heads and layer 0 6: .*--shape=uniform'),
    ('opt', ragged(CHANNELS, 0, 5), 'layer 1 keeps 10 channels and layer 0 9'),
    ('llama', {HEADS: np.array([1.0, 1, 1, 1, 0, 1])}, r'layer 0 .* by \[2, 2, 1\] .*--groups'),
    (
      'llama',
      {HEADS: np.array([[1.0, 0, 1, 0, 0, 0]] + [[0, 0, 1, 1, 0, 0]] * 3)},
      r'layer 1 .* by \[2\] query heads, those of layer 0 by \[1, 1\]',
    ),
    ('opt', {FFN: without(3)}, 'attention of layer 3 has no feed-forward behind it'),
    ('opt', {ATTENTION: without(0)}, 'feed-forward of layer 0 has no attention before it'),
    ('opt', {ATTENTION: np.zeros(4), FFN: np.zeros(4)}, 'no module is left'),
    ('opt_350m', {ATTENTION: without(1), FFN: without(1)}, 'norms after each sum'),
    ('opt_350m', {CHANNELS: np.zeros(10)}, 'norms after each sum'),
  ],
)
def test_what_is_not_alike_is_named(kind, gates, message):
  with pytest.raises(ConfigError, match=message):
    plain(cut(kind, gates))


@pytest.mark.parametrize(
  ('kind', 'match', 'asked'),
  [
    ('opt', 'decoder/embedding', None),
    ('opt_350m', 'decoder/embedding', None),
    ('llama', 'decoder/embedding', 'decoder/embedding:5 are products of factors'),
    ('opt', '*/ffn/w_1/kernel', 'export the model that was factorized'),
  ],
)
def test_factorized_embeddings_between_projections(kind, match, asked):
  cfg = KINDS[kind]
  flat = tiny_speech.random_tree(lm.abstract_params(cfg), seed=2)
  params = traverse_util.unflatten_dict(flat, sep='/')
  params, rows = factors.factorize(params, [match], rank=5)
  small = LmCheckpoint(factors.factored(cfg, rows), params, None, {})
  if asked:
    with pytest.raises(ConfigError, match=asked):
      projected(small)
    return
  narrow = projected(small)
  assert (narrow.cfg.embed_width, narrow.cfg.factors) == (5, ())
  np.testing.assert_allclose(logits(narrow), logits(small), rtol=1e-4, atol=1e-5)
  assert projected(narrow) is narrow
