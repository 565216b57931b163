"""What compiled programs look like: instead of times, which a busy machine would falsify."""

import re

import jax
import numpy as np
import tiny_speech
from jax import P

from gatedfm import partitioning
from gatedfm.benchmarks import ways
from gatedfm.models.speech import for_inference

DEVICES = 8
COLLECTIVE = r' (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(-start)?\('


def computations(hlo):
  """{name: text} of the computations of a compiled program."""
  return {m[1]: m[0] for m in re.finditer(r'^(?:ENTRY )?%?([\w.-]+) .*?^}', hlo, re.M | re.S)}


def under_conditionals(hlo):
  """The text of all computations that some conditional's branches run."""
  texts = computations(hlo)
  called = lambda text: set(re.findall(r'%([\w.-]+)', text)) & set(texts)
  branches = '\n'.join(line for line in hlo.splitlines() if ' conditional(' in line)
  found, todo = set(), called(branches)
  while todo:
    found |= todo
    todo = set().union(*(called(texts[name]) for name in todo)) - found
  return '\n'.join(texts[name] for name in found)


def encoder(execution, rows, frames=24):
  """The encoder under an execution, its parameters, input and gates of each row."""
  cfg = tiny_speech.config()
  model, params = for_inference(cfg, tiny_speech.params(), execution)
  rng = np.random.default_rng(0)
  x_BxSxD = rng.normal(size=(rows, frames, cfg.d)).astype(np.float32)
  sites = [s for s in cfg.all_sites() if s.stack == 'encoder']
  gates = {s.module: rng.integers(0, 2, (s.layers, rows)).astype(np.float32) for s in sites}
  run = lambda x, gates: ways.encode(model, {'encoder': params['encoder']}, x, gates)
  return run, x_BxSxD, gates


def test_devices_of_a_mesh_branch_each_for_itself():
  """Each device has utterances of one pattern: it must wait for no other within a branch."""
  mesh = partitioning.make_mesh()
  mask, x_BxSxD, gates = encoder('mask', DEVICES)
  skip = encoder('skip', DEVICES)[0]
  by_device = jax.shard_map(
    skip, mesh=mesh, in_specs=(P('data'), P(None, 'data')), out_specs=P('data'), check_vma=False
  )
  compiled = jax.jit(by_device).lower(x_BxSxD, gates).compile(compiler_options=tiny_speech.FAST)
  assert len({tuple(np.concatenate([g[:, i] for g in gates.values()])) for i in range(8)}) > 1
  want = tiny_speech.jit(mask)(x_BxSxD, gates)
  np.testing.assert_allclose(compiled(x_BxSxD, gates), want, rtol=1e-5, atol=1e-5)
  inside = under_conditionals(compiled.as_text())
  assert ' dot(' in inside or 'custom-call' in inside
  assert not re.search(COLLECTIVE, inside)


def test_a_collective_in_a_branch_would_be_seen():
  mesh = partitioning.make_mesh()
  total = lambda x: jax.lax.cond(x[0] > 0, lambda x: jax.lax.psum(x, 'data'), lambda x: x, x)
  run = jax.shard_map(total, mesh=mesh, in_specs=P('data'), out_specs=P('data'), check_vma=False)
  hlo = jax.jit(run).lower(np.ones(DEVICES, np.float32)).compile().as_text()
  assert re.search(COLLECTIVE, under_conditionals(hlo))


def test_temporaries():
  """Branches take hardly more memory than what computes all, and what is not there none."""
  bytes_ = {}
  for name in ('mask', 'skip', 'static'):
    run, x_BxSxD, gates = encoder('mask' if name == 'static' else name, 1, frames=200)
    gates = {module: g[:, 0] for module, g in gates.items()}
    if name == 'static':
      fixed = {module: tuple((g > 0).tolist()) for module, g in gates.items()}
      run, gates = (lambda x, _, run=run, fixed=fixed: run(x, fixed)), {}
    compiled = tiny_speech.jit(run).lower(x_BxSxD, gates).compile()
    bytes_[name] = compiled.memory_analysis().temp_size_in_bytes
  assert bytes_['skip'] <= 1.1 * bytes_['mask']
  assert bytes_['static'] <= bytes_['mask']
