"""Layers called from the host, and models without their closed modules, give what masks give."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech

from gatedfm import gates as gates_lib
from gatedfm.execution.compact import compact
from gatedfm.execution.layerwise import Layerwise
from gatedfm.models.speech import for_inference

MASK = jnp.arange(6) < jnp.array([[6], [4]])
X = tiny_speech.features(6, 2)


@functools.cache
def model(encoder='e_branchformer'):
  cfg = tiny_speech.config(encoder)
  return for_inference(cfg, tiny_speech.params(encoder))


@functools.cache
def masked():
  run = lambda gates: nn.apply(
    lambda m: m.encoder(X, gates, MASK, tiny_speech.context(2), True)[0], model()[0]
  )({'params': model()[1]})
  return tiny_speech.jit(run)


def patterns():
  cfg = model()[0].cfg
  every = gates_lib.all_open(cfg.all_sites())
  cases = [every, jax.tree.map(jnp.zeros_like, every)]
  cases += [tiny_speech.random_gates(cfg, seed) for seed in range(10)]
  return [(g, gates_lib.pattern(g, cfg.all_sites())) for g in cases]


def test_layerwise_gives_what_mask_gives_with_few_programs(fast_compilation):
  built, params = model()
  engine, kinds = Layerwise(built.cfg), set()
  for gates, pattern in patterns():
    want = masked()(gates.stack('encoder', built.cfg.all_sites()))
    got = engine(params['encoder'], X, MASK, pattern)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    kinds |= set(zip(*(bits for _, bits in pattern.stack('encoder').sites)))
  assert [len(p) for p in engine.compiled()] == [len(kinds), 1]
  assert 2 < len(kinds) <= 16


def test_layerwise_compiles_before_it_runs(fast_compilation):
  built, params = model()
  engine = Layerwise(built.cfg)
  (_, pattern), *_ = patterns()
  for program in engine.prepare(params['encoder'], X, MASK, pattern):
    program.result()
  before = [len(p) for p in engine.compiled()]
  engine(params['encoder'], X, MASK, pattern)
  assert [len(p) for p in engine.compiled()] == before == [1, 1]


@pytest.mark.parametrize('encoder', ['e_branchformer', 'transformer'])
def test_compacted_arrays_give_what_mask_gives(encoder):
  built, params = model(encoder)
  sites = built.cfg.all_sites()
  inputs = tiny_speech.inputs()
  run = lambda params, gates: built.apply({'params': params}, *inputs, gates).logits
  dense = tiny_speech.jit(lambda gates: run(params, gates))
  sizes = set()
  for seed in range(4):
    gates = tiny_speech.random_gates(built.cfg, seed)
    pattern = gates_lib.pattern(gates, sites)
    small = compact(params, pattern)
    got = tiny_speech.jit(lambda p, pattern=pattern: run(p, pattern.fixed()))(small)
    np.testing.assert_allclose(got, dense(gates), rtol=1e-5, atol=1e-5)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    gone = [
      count(params[s.stack]['layers'][f'layers_{i}'][s.module])
      for s in sites
      for i, is_open in enumerate(dict(pattern.sites)[s.name])
      if not is_open
    ]
    assert count(small) == count(params) - sum(gone)
    sizes.add(count(small))
  assert len(sizes) > 1


def test_all_closed_keeps_what_no_gate_closes():
  built, params = model()
  sites = built.cfg.all_sites()
  closed = gates_lib.Pattern(tuple((s.name, (False,) * s.layers) for s in sites))
  left = compact(params, closed)
  assert set(left['encoder']['layers']['layers_0']) == {'merge_bias', 'norm_final'}
  assert left['decoder']['layers']['layers_1'] == {}
  assert left['ctc'] is params['ctc']
  assert 'ffn1' in params['encoder']['layers']['layers_0']


def test_what_cannot_be_compacted():
  built, params = model()
  pattern = gates_lib.pattern(*(f(built.cfg.all_sites()) for f in (gates_lib.all_open, tuple)))
  with pytest.raises(ValueError, match='encoder/ffn1 has 2 layers; the unrolled .* hold 1'):
    compact(tiny_speech.params(), pattern)
  with pytest.raises(ValueError, match='layer 0 of the encoder has no head; it has'):
    compact(params, gates_lib.Pattern((('encoder/head', (True, True)),)))
