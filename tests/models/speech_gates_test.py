"""The central test: however gates are executed, it is one model, teacher-forced and decoding.

One program of each execution serves all gates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedfm import gates as gates_lib
from gatedfm.models import stack
from gatedfm.models.decoder import DecoderLayer
from gatedfm.models.encoder import EncoderLayer
from gatedfm.models.speech import SpeechModel, for_inference
from gatedfm.models.speech_config import ENCODER_MODULES
from gatedfm.nn import gating

ENCODERS = tuple(ENCODER_MODULES)
TOKENS = tiny_speech.TOKENS
ONE = tiny_speech.inputs(batch=1)
# What may skip: layer by layer, or all of the encoder's in one loop.
SKIPS = ('skip', 'scanned')


@functools.cache
def config_and_params(encoder):
  """Of the Transformer one layer will do: its decoder is the E-Branchformer's."""
  few = {} if encoder == 'e_branchformer' else {'encoder_layers': 1, 'decoder_layers': 1}
  cfg = tiny_speech.config(encoder, **few)
  return cfg, tiny_speech.random_tree(tiny_speech.shapes(cfg))


def everything(model, params, gates, x, frames, tokens, context):
  """Memory, CTC logits, teacher-forced logits, and the same logits decoded step by step."""
  call = functools.partial(model.apply, {'params': params})
  out = call(x, frames, tokens, context, gates)
  caches = call(out.encoded, TOKENS + 1, method='start')

  def step(caches, at):
    logits, caches = call(at[1][:, None], at[0], caches, out.encoded, method='step')
    return caches, logits[:, 0]

  _, logits = jax.lax.scan(step, caches, (jnp.arange(TOKENS), tokens.T))
  return {
    'memory': out.encoded.memory,
    'ctc': out.ctc_logits,
    'logits': out.logits,
    'decoded': jnp.swapaxes(logits, 0, 1),
  }


@functools.cache
def traced_program(encoder, execution, gated):
  cfg, params = config_and_params(encoder)
  scanned = execution == 'scanned'
  model, params = for_inference(cfg, params, 'skip' if scanned else execution, scanned)
  gates = gates_lib.all_open(cfg.all_sites()) if gated else None
  return jax.jit(functools.partial(everything, model)).trace(params, gates, *ONE), params


@functools.cache
def lowered(encoder, execution, gated):
  return traced_program(encoder, execution, gated)[0].lower()


@functools.cache
def program(encoder, execution, gated=True):
  """`run(gates)`, compiled once for whatever the gates are; and the compiled text."""
  params = traced_program(encoder, execution, gated)[1]
  compiled = lowered(encoder, execution, gated).compile(compiler_options=tiny_speech.FAST)
  return lambda gates: compiled(params, gates, *ONE), compiled.as_text()


def run(encoder, execution, gates):
  return program(encoder, execution)[0](gates)


def closed(cfg, *names):
  """Gates open everywhere but in the named sites."""
  gates = gates_lib.all_open(cfg.all_sites())
  return gates_lib.Gates(gates.values | {n: jnp.zeros_like(gates[n]) for n in names})


def assert_close(a, b, tolerance=1e-5):
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


def agree(encoder, gates):
  """Checks that all ways give one answer, steps what the sentence gives; returns it."""
  mask = run(encoder, 'mask', gates)
  for way in ('mask', *SKIPS):
    other = run(encoder, way, gates)
    assert_close(mask, other)
    assert_close({'': other['logits']}, {'': other['decoded']})
  return mask


@pytest.mark.parametrize('encoder', ENCODERS)
def test_without_gates_skip_and_mask_are_one_program(encoder):
  text = lambda execution: lowered(encoder, execution, False).as_text()
  assert text('mask') == text('skip')


@pytest.mark.parametrize('execution', gating.EXECUTIONS)
def test_open_layers_are_dense_bit_for_bit(execution):
  """Operation by operation: compiled, fusion may round inside a branch as it would not outside."""
  cfg = tiny_speech.config(execution=execution)
  x = tiny_speech.features(TOKENS, 1)
  mask = jnp.ones((1, TOKENS), bool)
  layer = lambda kind: jax.tree.map(lambda a: a[0], tiny_speech.params()[kind]['layers']['scan'])
  ones = lambda kind: {s.module: jnp.ones(()) for s in cfg.all_sites() if s.stack == kind}

  def encode(gates):
    variables = {'params': layer('encoder')}
    return EncoderLayer(cfg).apply(variables, x, gates, mask, tiny_speech.context(1), True)[0]

  def decode(gates):
    call = functools.partial(DecoderLayer(cfg).apply, {'params': layer('decoder')})
    cache = call(2 * x, gates, TOKENS, method='start')
    step = call(x[:, :1], cache, gates, 0, mask, method='step')
    return call(x, gates, 2 * x, mask, True)[0], step

  with jax.disable_jit():
    for run, kind in ((encode, 'encoder'), (decode, 'decoder')):
      jax.tree.map(np.testing.assert_array_equal, run(ones(kind)), run({}))


@pytest.mark.parametrize('encoder', ENCODERS)
def test_all_open_is_dense_compiled(encoder):
  gates = gates_lib.all_open(config_and_params(encoder)[0].all_sites())
  dense = program(encoder, 'mask', gated=False)[0](None)
  mask = run(encoder, 'mask', gates)
  for name in dense:
    np.testing.assert_array_equal(mask[name], dense[name], err_msg=name)
  for way in SKIPS:
    assert_close(run(encoder, way, gates), dense, 1e-6)


@pytest.mark.parametrize('encoder', ENCODERS)
def test_closing_a_whole_site(encoder):
  """mask = skip, the steps = the sentence, and the closed site is missed."""
  cfg, _ = config_and_params(encoder)
  dense = program(encoder, 'mask', gated=False)[0](None)
  for site in cfg.all_sites():
    gates = closed(cfg, site.name)
    mask = agree(encoder, gates)
    assert np.abs(mask['logits'] - dense['logits']).max() > 1e-4, site.name
    same = np.array_equal(mask['memory'], dense['memory'])
    assert same == (site.stack == 'decoder'), site.name


@pytest.mark.parametrize('encoder', ENCODERS)
def test_closing_everything(encoder):
  cfg, _ = config_and_params(encoder)
  gates = closed(cfg, *[s.name for s in cfg.all_sites()])
  mask = agree(encoder, gates)
  assert np.isfinite(mask['logits']).all()


@pytest.mark.parametrize('encoder', ENCODERS)
def test_random_patterns(encoder):
  cfg, _ = config_and_params(encoder)

  @settings(max_examples=12, deadline=None, database=None)
  @given(st.integers(0, 10_000))
  def holds(seed):
    agree(encoder, tiny_speech.random_gates(cfg, seed))

  holds()


@pytest.mark.parametrize('encoder', ENCODERS)
def test_skip_branches_once_a_gate_and_selects_nowhere(encoder):
  """Every closed gate must really be skipped: XLA turns some conditionals into selects."""
  cfg, _ = config_and_params(encoder)
  gates = sum(s.size for s in cfg.all_sites())
  # The program above also projects keys for decoding, and decodes: the decoder once more.
  again = cfg.decoder_layers + sum(s.size for s in cfg.all_sites() if s.stack == 'decoder')
  assert program(encoder, 'skip')[1].count(' conditional(') == gates + again
  low = lambda execution, gated: lowered(encoder, execution, gated).as_text()
  selects = lambda text: text.count('stablehlo.select')
  assert low('skip', True).count('stablehlo.case') == gates + again
  assert selects(low('skip', True)) == selects(low('skip', False))
  assert ' conditional(' not in program(encoder, 'mask')[1]


def test_a_loop_slices_matrices_inside_its_branches_alone():
  """Sliced outside, matrices of closed modules would be copied all the same."""
  traced, params = traced_program('e_branchformer', 'scanned', True)
  body, *more = [
    body
    for e in traced.jaxpr.jaxpr.eqns
    if e.primitive.name == 'scan' and e.params['length'] == 2
    for body in tiny_speech.jaxprs_of(e)
  ]
  assert not more
  stacked = jax.tree_util.tree_leaves_with_path(params['encoder']['layers']['scan'])
  matrices = [w.shape for path, w in stacked if path[-1].key == 'kernel' and path[-2].key != 'conv']
  taken = lambda eqns: sorted(
    e.invars[0].aval.shape
    for e in eqns
    if e.primitive.name == 'dynamic_slice' and e.invars[0].aval.shape in matrices
  )
  branches = [e for e in tiny_speech.equations(body) if e.primitive.name == 'cond']
  assert len(branches) == len(ENCODER_MODULES['e_branchformer'])
  inside = [taken(tiny_speech.equations(b)) for e in branches for b in tiny_speech.jaxprs_of(e)]
  assert sorted(sum(inside, [])) == taken(tiny_speech.equations(body)) == sorted(matrices)
  # And what the loop slices for itself is small.
  sliced = {v.aval.shape for v in body.invars}
  assert not sliced & {shape[1:] for shape in matrices}


def test_a_closed_branch_computes_nothing_and_takes_its_own_parameters_alone():
  """What else a conditional took in, the other layers' weights, it would have to copy."""
  traced, params = traced_program('e_branchformer', 'skip', True)
  conds = [e for e in tiny_speech.equations(traced.jaxpr.jaxpr) if e.primitive.name == 'cond']
  layer = params['encoder']['layers']['layers_0']
  most = max(len(jax.tree.leaves(layer[m])) for m in ENCODER_MODULES['e_branchformer'])
  # Beside the parameters: the gate, x, masks, positions, a cache.
  assert max(len(e.invars) for e in conds) <= most + 6
  for eqn in conds:
    closed, opened = tiny_speech.jaxprs_of(eqn)
    products = lambda jaxpr: [
      e for e in tiny_speech.equations(jaxpr) if e.primitive.name == 'dot_general'
    ]
    assert not products(closed)
    assert products(opened)


def test_gradients_through_branches_are_those_of_masks():
  """And nothing shaped like a parameter leaves a branch going forward."""
  cfg = tiny_speech.config(scan_layers=False)
  params = stack.unstack(tiny_speech.params())

  def loss(params, execution, features, frames, tokens, context, gates):
    model = SpeechModel(tiny_speech.config(scan_layers=False, execution=execution))
    out = model.apply({'params': params}, features, frames, tokens, context, gates)
    return jnp.sum(jnp.sin(out.logits)) + jnp.sum(jnp.cos(out.ctc_logits))

  gradient = lambda execution: tiny_speech.jit(
    lambda gates: jax.grad(loss)(params, execution, *tiny_speech.inputs(), gates)
  )
  mask, skip = gradient('mask'), gradient('skip')
  sites = cfg.all_sites()
  cases = [gates_lib.all_open(sites), closed(cfg, *[s.name for s in sites])]
  for gates in (*cases, *(tiny_speech.random_gates(cfg, seed) for seed in range(6))):
    want, got = mask(gates), skip(gates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), want, got)
  traced = skip.trace(cases[0]).jaxpr.jaxpr
  conds = [e for e in tiny_speech.equations(traced) if e.primitive.name == 'cond']
  forward = conds[: sum(s.size for s in sites)]
  matrices = {w.shape for w in jax.tree.leaves(params) if w.ndim == 2}
  assert not matrices & {v.aval.shape for e in forward for v in e.outvars}
  assert len(conds) == 2 * len(forward)


def test_dropout_works_behind_a_gate():
  cfg = tiny_speech.config(scan_layers=False, execution='skip', dropout=0.5)
  params, gates = stack.unstack(tiny_speech.params()), gates_lib.all_open(cfg.all_sites())
  apply = functools.partial(SpeechModel(cfg).apply, {'params': params}, *tiny_speech.inputs())
  run = tiny_speech.jit(lambda key: apply(gates, False, rngs={'dropout': key}).logits)
  one, again, other = (run(tiny_speech.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 1e-3


def test_skip_refuses_gates_that_differ_by_example():
  cfg = tiny_speech.config()
  model, params = for_inference(cfg, tiny_speech.params(), 'skip')
  gates = tiny_speech.random_gates(cfg, 0, tiny_speech.BATCH)
  with pytest.raises(ValueError, match='skip needs one gate for the whole batch'):
    jax.eval_shape(lambda: model.apply({'params': params}, *tiny_speech.inputs(), gates))


def test_decoding_needs_the_unrolled_layout():
  cfg = tiny_speech.config()
  model, params = SpeechModel(cfg), tiny_speech.params()

  def start():
    call = functools.partial(model.apply, {'params': params})
    encoded = call(*tiny_speech.inputs()[:2], tiny_speech.context(), method='encode')
    return call(encoded, 3, method='start')

  with pytest.raises(ValueError, match='unroll_decoder'):
    jax.eval_shape(start)


@functools.cache
def batch_program(encoder, execution):
  cfg, params = config_and_params(encoder)
  model, params = for_inference(cfg, params, execution)
  batch = tiny_speech.inputs()
  run = tiny_speech.jit(functools.partial(everything, model))
  return lambda gates: run(params, gates, *batch)


@pytest.mark.parametrize('encoder', ENCODERS)
def test_bucketed_gives_each_example_what_mask_gives_it(encoder):
  cfg, _ = config_and_params(encoder)
  every = gates_lib.all_open(cfg.all_sites())
  each = jax.tree.map(lambda g: jnp.repeat(g[:, None], tiny_speech.BATCH, 1), every)
  cases = [each, jax.tree.map(jnp.zeros_like, each)]
  cases += [tiny_speech.random_gates(cfg, seed, tiny_speech.BATCH) for seed in range(12)]
  for gates in cases:
    bucketed = batch_program(encoder, 'bucketed')(gates)
    assert_close(batch_program(encoder, 'mask')(gates), bucketed)
    assert_close({'': bucketed['logits']}, {'': bucketed['decoded']})


def test_examples_of_a_batch_have_gates_of_their_own():
  """Under mask a row's answer is what its gates would give alone."""
  cfg = tiny_speech.config()
  model, params = SpeechModel(cfg), tiny_speech.params()
  call = tiny_speech.jit(
    lambda gates: model.apply({'params': params}, *tiny_speech.inputs(), gates)
  )
  gates = tiny_speech.random_gates(cfg, 5, tiny_speech.BATCH)
  together = call(gates).logits
  for b in range(tiny_speech.BATCH):
    row = jax.tree.map(lambda g, b=b: jnp.repeat(g[:, b : b + 1], tiny_speech.BATCH, 1), gates)
    np.testing.assert_allclose(call(row).logits[b], together[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('execution', gating.EXECUTIONS)
def test_bfloat16_activations_keep_their_type_through_gates(execution):
  """The branches of a conditional must agree in type; checked by tracing alone."""
  cfg = tiny_speech.config(dtype='bfloat16', activation_dtype='bfloat16')
  model, params = for_inference(cfg, tiny_speech.params(), execution)
  gates = gates_lib.all_open(cfg.all_sites())
  out = jax.eval_shape(lambda: everything(model, params, gates, *ONE))
  assert out['memory'].dtype == jnp.bfloat16
  assert out['logits'].dtype == out['decoded'].dtype == out['ctc'].dtype == jnp.float32
