"""What may and may not influence the model's answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech

from gatedfm import gates as gates_lib
from gatedfm.models.speech import SpeechModel, decoder_gates, for_inference
from gatedfm.models.speech_config import ENCODER_MODULES, GateConfig
from gatedfm.nn import subsampling

ENCODERS = tuple(ENCODER_MODULES)
FRAMES = tiny_speech.FRAMES


@functools.cache
def program(encoder, **changes):
  """`run(features, frames, tokens, context) -> Output` of the dense model, compiled once."""
  cfg = tiny_speech.config(encoder, **changes)
  call = tiny_speech.jit(lambda p, *args: SpeechModel(cfg).apply({'params': p}, *args))
  return functools.partial(call, tiny_speech.params(encoder))


def perturbed(x, *index):
  return x.at[index].add(tiny_speech.features(x.shape[1], x.shape[0], seed=9)[index])


@pytest.mark.parametrize('encoder', ENCODERS)
def test_shapes_types_and_values(encoder):
  out = program(encoder)(*tiny_speech.inputs())
  s = subsampling.subsampled_length(FRAMES)
  b, v = tiny_speech.BATCH, tiny_speech.VOCABULARY
  assert out.ctc_logits.shape == (b, s, v)
  assert out.logits.shape == (b, tiny_speech.TOKENS, v)
  assert out.encoded.memory.shape == (b, s, 8)
  assert out.encoded.mask.shape == (b, s)
  assert out.encoded.gates.values == {}
  assert all(np.isfinite(a).all() for a in (out.ctc_logits, out.logits))


def test_decoder_is_causal():
  x, frames, tokens, context = tiny_speech.inputs()
  run = program('transformer')
  before = run(x, frames, tokens, context).logits
  for i in range(tiny_speech.TOKENS):
    after = run(x, frames, tokens.at[:, i].add(1), context).logits
    changed = np.abs(after - before).max((0, 2)) > 1e-6
    # Every later position hears of it, none before.
    assert changed.tolist() == [j >= i for j in range(tiny_speech.TOKENS)]


@pytest.mark.parametrize('encoder', ENCODERS)
def test_examples_do_not_meet(encoder):
  x, frames, tokens, context = tiny_speech.inputs()
  run = program(encoder)
  before = run(x, frames, tokens, context)
  after = run(perturbed(x, 1), frames, tokens.at[1].add(1), context)
  for name in ('ctc_logits', 'logits'):
    np.testing.assert_array_equal(getattr(after, name)[0], getattr(before, name)[0])
    assert np.abs(getattr(after, name)[1] - getattr(before, name)[1]).max() > 1e-3


@pytest.mark.parametrize('encoder', ENCODERS)
def test_what_lies_beyond_the_frames_is_ignored(encoder):
  """Garbage there, even infinities, changes nothing."""
  x, frames, tokens, context = tiny_speech.inputs()
  run = program(encoder)
  before = run(x, frames, tokens, context)
  beyond = jnp.arange(FRAMES)[:, None] >= frames[:, None, None]
  after = run(jnp.where(beyond, jnp.inf, x), frames, tokens, context)
  np.testing.assert_array_equal(after.logits, before.logits)


def test_an_utterance_is_alone_in_its_padding():
  """With `conv_sees_padding=False` an utterance's encoding does not depend on the bucket."""
  model = SpeechModel(tiny_speech.config(conv_sees_padding=False))
  params, context, length = tiny_speech.params(), tiny_speech.context(1), 19
  encode = tiny_speech.jit(
    lambda x: model.apply({'params': params}, x, jnp.array([length]), context, method='encode')
  )
  x = tiny_speech.features(length, 1)
  alone, beside = encode(x), encode(jnp.pad(x, ((0, 0), (0, FRAMES - length), (0, 0))))
  s = subsampling.subsampled_length(length)
  assert alone.mask.all()
  assert beside.mask[0].tolist() == [i < s for i in range(beside.mask.shape[1])]
  np.testing.assert_allclose(beside.memory[:, :s], alone.memory, rtol=1e-5, atol=1e-5)


def test_padding_as_espnet_has_it():
  """By default frames that are partly padding count."""
  x, frames, tokens, context = tiny_speech.inputs()
  mask = program('e_branchformer')(x, frames, tokens, context).encoded.mask
  whole = np.arange(FRAMES) < frames[:, None]
  np.testing.assert_array_equal(mask, subsampling.subsampled_mask(whole))
  assert mask.sum() > sum(subsampling.subsampled_length(int(n)) for n in frames)


def test_an_empty_utterance_stays_finite():
  x, _, tokens, context = tiny_speech.inputs()
  for encoder in ENCODERS:
    out = program(encoder)(x, tiny_speech.frames().at[1].set(0), tokens, context)
    assert np.isfinite(out.logits).all()


def test_unrolled_is_scanned():
  model, params = for_inference(tiny_speech.config(), tiny_speech.params())
  assert not model.cfg.scan_layers
  run = tiny_speech.jit(lambda p: model.apply({'params': p}, *tiny_speech.inputs()))
  scanned = program('e_branchformer')(*tiny_speech.inputs())
  np.testing.assert_allclose(run(params).logits, scanned.logits, rtol=1e-5, atol=1e-5)


def test_inference_folds_the_merges_constants_and_leaves_the_callers_alone():
  cfg = tiny_speech.config()
  mine = jax.tree.map(np.array, tiny_speech.params())
  kept = jax.tree.map(np.copy, mine)
  folded = [for_inference(cfg, mine)[1]['encoder']['layers'] for _ in range(2)]
  jax.tree.map(np.testing.assert_array_equal, mine, kept)
  jax.tree.map(np.testing.assert_array_equal, *folded)
  given = kept['encoder']['layers']['scan']
  for i in range(cfg.encoder_layers):
    layer, want = folded[0][f'layers_{i}'], given['merge_bias'][i]
    for branch in ('attention', 'cgmlp'):
      assert 'conv_bias' not in layer[branch]['merge']
      merge = given[branch]['merge']
      want = want + merge['conv_bias'][i] @ merge['kernel'][i]
    np.testing.assert_allclose(layer['merge_bias'], want, rtol=1e-5, atol=1e-6)


def test_what_inference_reads_token_by_token_stays_float32():
  """On CPUs, where a bfloat16 matrix would be converted at every token; others hold bfloat16."""
  cfg = tiny_speech.config(dtype='bfloat16')
  _, params = for_inference(cfg, tiny_speech.params())
  kinds = {
    '/'.join(k.key for k in path): x.dtype.name
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key == 'kernel'
  }
  layer = 'decoder/layers/layers_0'
  assert kinds[f'{layer}/self_attention/attention/query/kernel'] == 'float32'
  assert kinds[f'{layer}/cross_attention/attention/query/kernel'] == 'float32'
  assert kinds[f'{layer}/cross_attention/attention/key/kernel'] == 'bfloat16'
  assert kinds['decoder/output/kernel'] == 'float32'
  assert kinds['encoder/layers/layers_0/attention/attention/query/kernel'] == 'bfloat16'


def test_decoder_gates_are_the_decoders():
  cfg = tiny_speech.config()
  encoded = jax.eval_shape(
    lambda gates: SpeechModel(cfg).apply(
      {'params': tiny_speech.params()},
      tiny_speech.features(),
      tiny_speech.frames(),
      tiny_speech.context(),
      gates,
      method='encode',
    ),
    gates_lib.all_open(cfg.all_sites()),
  )
  assert set(encoded.gates.values) == {s.name for s in cfg.all_sites()}
  assert set(decoder_gates(encoded)) == {'self_attention', 'cross_attention', 'ffn'}


def test_a_closed_module_has_no_gradient():
  """But for its half of the merge's constant, which stays."""
  cfg = tiny_speech.config()
  gates, (_, _, grads) = tiny_speech.gradients(seed=3)
  for site in cfg.all_sites():
    module = dict(grads[site.stack]['layers']['scan'][site.module])
    merge = module.pop('merge', {})
    for i, gate in enumerate(gates[site.name][:, 0].tolist()):
      taps = {'merge': merge['conv_kernel']} if merge else {}
      leaves = jax.tree.leaves_with_path(module | taps)
      for path, leaf in leaves:
        if gate == 0 or path[-1].key != 'bias' or path[-2].key != 'key':
          # A key's bias shifts all scores of a query alike: it never has a gradient.
          assert np.any(leaf[i] != 0) == (gate == 1), (site.name, i, path)
      if merge:
        assert np.any(merge['conv_bias'][i])


@pytest.mark.parametrize(('scan', 'remat'), [(True, 'full'), (False, 'dots')])
def test_every_layout_trains_with_dropout(scan, remat):
  """`deterministic` and the context's `sample` are no arrays, and must pass recomputation."""
  gates = GateConfig(enabled=True, scope='layer', hidden=(), features=2)
  layout = {'scan_layers': scan, 'remat': remat, 'dropout': 0.1}
  cfg = tiny_speech.config('transformer', gates, **layout)
  x, frames, tokens, context = tiny_speech.inputs()
  keys = {'params': jax.random.key(0), 'gates': jax.random.key(1), 'dropout': jax.random.key(2)}
  context = context.replace(sample=True)

  def loss(params, deterministic=False):
    inputs = (x, frames, tokens, context)
    call = functools.partial(SpeechModel(cfg).apply, {'params': params}, *inputs)
    return jnp.sum(call(deterministic=deterministic, rngs=keys).logits)

  params = tiny_speech.shapes(cfg)
  grads = jax.eval_shape(jax.grad(loss), params)
  assert jax.tree.structure(grads) == jax.tree.structure(params)

  def draws(deterministic):
    jaxpr = jax.make_jaxpr(lambda p: loss(p, deterministic))(params).jaxpr
    return sum(e.primitive.name == 'random_bits' for e in tiny_speech.equations(jaxpr))

  # Evaluating, only gates are drawn: of the decoder's layers at once and the encoder's each.
  assert draws(True) == (2 if scan else 1 + cfg.encoder_layers)
  assert draws(False) > draws(True) + 10
