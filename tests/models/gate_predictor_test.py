"""Gates decided from the context: what they read, in every arrangement of the predictor."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech
from jax.interpreters import partial_eval

from gatedfm import gates as gates_lib
from gatedfm.models.speech import SpeechModel, for_inference
from gatedfm.models.speech_config import CONTEXTS, GateConfig

SUBSETS = [c for n in range(4) for c in itertools.combinations(CONTEXTS, n)]
STACKS = [('encoder',), ('decoder',), ('encoder', 'decoder')]
ARRANGEMENTS = list(
  itertools.product(('concat', 'add'), ('global', 'layer'), STACKS, ('memory', 'subsampled'))
)


def config(encoder='transformer', **gates):
  small = {'enabled': True, 'hidden': (4,), 'features': 3, 'open_bias': 0.0}
  return tiny_speech.config(encoder, GateConfig(**(small | gates)))


def encode(model, params, x, frames, language, task):
  context = tiny_speech.context(len(x)).replace(language=language, task=task)
  return model.apply({'params': params}, x, frames, context, method='encode')


def arguments(batch=tiny_speech.BATCH):
  x, frames, _, context = tiny_speech.inputs(batch)
  return x, frames, context.language, context.task


def params_of(cfg, seed=0):
  return tiny_speech.random_tree(tiny_speech.shapes(cfg), seed)


def inputs_read(cfg):
  """What each site's gates depend on, by the program: speech, language, task, and the encoder."""

  def run(x, frames, language, task):
    context = tiny_speech.context().replace(language=language, task=task)
    init = functools.partial(SpeechModel(cfg).init_with_output, method='encode')
    return init(jax.random.key(0), x, frames, context)[0].gates

  jaxpr, out = jax.make_jaxpr(run, return_shape=True)(*arguments())
  for i, name in enumerate(sorted(out.values)):
    wanted = [i == j for j in range(len(out.values))]
    needed, (x, frames, language, task) = partial_eval.dce_jaxpr(jaxpr.jaxpr, wanted)
    assert x or not frames
    encoder = any(e.primitive.name == 'scan' for e in tiny_speech.equations(needed))
    kinds = {'speech': x, 'language': language, 'task': task, 'encoder': encoder}
    yield name, {k for k, used in kinds.items() if used}


@pytest.mark.parametrize('number', range(len(ARRANGEMENTS)))
def test_gates_read_the_context_that_they_name_and_nothing_else(number):
  """All arrangements of the predictor, and with each a subset of contexts."""
  combine, scope, stacks, reads = ARRANGEMENTS[number]
  # 24 arrangements and 8 subsets: the step walks every pair of choices past every subset.
  context = SUBSETS[(number + number // 8) % len(SUBSETS)]
  cfg = config(context=context, combine=combine, scope=scope, stacks=stacks, decoder_reads=reads)
  read = dict(inputs_read(cfg))
  assert set(read) == {s.name for s in cfg.sites()}
  for name, kinds in read.items():
    if name.startswith('decoder/'):
      through = reads == 'memory' and 'speech' in context
    else:
      through = scope == 'layer'
    assert kinds == set(context) | ({'encoder'} if through else set()), name


def test_every_subset_takes_part():
  assert {(i + i // 8) % 8 for i in range(len(ARRANGEMENTS))} == set(range(8))
  assert len(SUBSETS) == 8


@functools.cache
def program(scope):
  cfg = config(scope=scope)
  params = params_of(cfg, seed=1)
  call = tiny_speech.jit(functools.partial(encode, SpeechModel(cfg)))
  return cfg, params, functools.partial(call, params)


@pytest.mark.parametrize('scope', ['global', 'layer'])
def test_each_example_decides_for_itself(scope):
  cfg, _, run = program(scope)
  gates = run(*arguments()).gates
  gates_lib.validate(gates, cfg.sites())
  rows = np.concatenate([gates[s.name] for s in cfg.sites()])
  assert rows.shape == (sum(s.layers for s in cfg.sites()), tiny_speech.BATCH)
  assert set(np.unique(rows)) == {0.0, 1.0}
  assert len(np.unique(rows, axis=1).T) > 1
  # The same utterance, language and task next to others: the same gates.
  x, frames, language, task = arguments()
  again = run(x[::-1], frames[::-1], language[::-1], task[::-1]).gates
  for s in cfg.sites():
    np.testing.assert_array_equal(again[s.name][:, ::-1], gates[s.name])


def test_predicted_gates_are_the_gates_used():
  """Given back as `gates=`, they give the same answer."""
  cfg, params, run = program('layer')
  encoded = run(*arguments())
  model = SpeechModel(cfg)
  x, frames, _, context = tiny_speech.inputs()
  given = tiny_speech.jit(
    lambda gates: model.apply({'params': params}, x, frames, context, gates, method='encode')
  )(encoded.gates)
  np.testing.assert_allclose(given.memory, encoded.memory, rtol=1e-5, atol=1e-5)
  for name, value in encoded.gates.values.items():
    np.testing.assert_array_equal(given.gates[name], value)


@pytest.mark.parametrize('scanned', [False, True])
@pytest.mark.parametrize('scope', ['global', 'layer'])
def test_skip_follows_the_predictor(scope, scanned):
  cfg, params, run = program(scope)
  masked = run(*arguments())
  model, unrolled = for_inference(cfg, params, 'skip', scanned)
  skip = tiny_speech.jit(functools.partial(encode, model))
  x, frames, language, task = arguments()
  for b in range(2):
    row = slice(b, b + 1)
    one = skip(unrolled, x[row], frames[row], language[row], task[row])
    np.testing.assert_allclose(one.memory[0], masked.memory[b], rtol=1e-5, atol=1e-5)
    for name, value in masked.gates.values.items():
      np.testing.assert_array_equal(one.gates[name][:, 0], value[:, b])


def test_training_samples_and_reaches_the_predictor():
  """Gates are exactly 0 or 1, differ by key, and every logit has a gradient."""
  cfg = config(context=('language',), hidden=())
  model, params = SpeechModel(cfg), params_of(cfg)
  x, frames, tokens, context = tiny_speech.inputs()
  context = context.replace(sample=True, temperature=2.0)

  def loss(params, key):
    out = model.apply({'params': params}, x, frames, tokens, context, rngs={'gates': key})
    return jnp.sum(jnp.sin(out.logits)), out.encoded.gates

  run = tiny_speech.jit(jax.grad(loss, has_aux=True))
  (grads, gates), (_, other) = run(params, tiny_speech.key(0)), run(params, tiny_speech.key(1))
  flat = lambda g: np.concatenate([g[s.name] for s in cfg.sites()])
  assert set(np.unique(flat(gates))) == {0.0, 1.0}
  assert np.any(flat(gates) != flat(other))
  for stack in ('encoder_gates', 'decoder_gates'):
    assert np.all(grads[stack]['mlp']['bias'] != 0)


def test_threshold_comes_from_the_configuration():
  cfg, params, run = program('global')
  low = dataclasses.replace(cfg, gates=dataclasses.replace(cfg.gates, threshold=0.0001))
  every = tiny_speech.jit(functools.partial(encode, SpeechModel(low)))(params, *arguments()).gates
  assert float(gates_lib.sparsity(every, cfg.sites())) == 0
  assert 0 < float(gates_lib.sparsity(run(*arguments()).gates, cfg.sites())) < 1


def test_ungated_stacks_have_no_gates():
  cfg = config(stacks=('decoder',))
  assert {s.stack for s in cfg.sites()} == {'decoder'}
  assert 'encoder_gates' not in tiny_speech.shapes(cfg)
  assert 'gate_predictor' not in tiny_speech.shapes(cfg)['encoder']['layers']['scan']
