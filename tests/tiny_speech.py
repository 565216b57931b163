"""A speech model of a few thousand parameters, and its compiled functions, shared by tests.

Parameters are random everywhere (biases, norms and taps too), so that nothing agrees only
because it starts at zero.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import gates as gates_lib
from gatedfm.models.speech import SpeechModel
from gatedfm.models.speech_config import GateConfig, SpeechConfig
from gatedfm.nn import gating

# Compiling is most of what these tests do: cheaper code for the same program.
FAST = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  'xla_cpu_use_fusion_emitters': False,
}
jit = functools.partial(jax.jit, compiler_options=FAST)

BATCH, FRAMES, TOKENS, MELS, VOCABULARY = 4, 35, 4, 8, 12


def key(seed):
  """A PRNG key of the kind that compiles fastest."""
  return jax.random.key(seed, impl='unsafe_rbg')


def config(encoder='e_branchformer', gates=None, **changes):
  cfg = SpeechConfig(
    vocab_size=VOCABULARY,
    languages=4,
    tasks=3,
    mels=MELS,
    encoder=encoder,
    d=8,
    heads=2,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn=12,
    decoder_ffn=16,
    cgmlp=12,
    kernel=3,
    subsampling_channels=2,
    gates=gates or GateConfig(),
  )
  cfg = dataclasses.replace(cfg, **changes)
  cfg.validate()
  return cfg


def features(frames=FRAMES, batch=BATCH, seed=0):
  x = np.random.default_rng(seed).normal(size=(batch, frames, MELS))
  return jnp.asarray(x, jnp.float32)


def frames(batch=BATCH):
  """Valid frames: everything, then less and less."""
  return FRAMES - 8 * jnp.arange(batch)


def tokens(batch=BATCH):
  return jnp.arange(batch * TOKENS).reshape(batch, TOKENS) % VOCABULARY


def context(batch=BATCH):
  return gating.Context(1 + jnp.arange(batch) % 3, jnp.arange(batch) % 3)


def inputs(batch=BATCH):
  return features(batch=batch), frames(batch), tokens(batch), context(batch)


def boxed(cfg):
  """The parameters' shapes with their logical axis names; traced, never run."""
  return jax.eval_shape(lambda: SpeechModel(cfg).init(jax.random.key(0), *inputs()))['params']


def shapes(cfg):
  return jax.eval_shape(
    lambda: nn.unbox(SpeechModel(cfg).init(jax.random.key(0), *inputs()))['params']
  )


def random_tree(tree, seed=0, scale=0.3):
  rng = np.random.default_rng(seed)
  with jax.ensure_compile_time_eval():  # never a tracer, whoever asks first
    make = lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(make, tree)


@functools.cache
def params(encoder='e_branchformer'):
  """Random parameters of the dense model, scanned layout."""
  return random_tree(shapes(config(encoder)))


def random_gates(cfg, seed, batch=None):
  """0/1 gates of every site, `[N]` or `[N, batch]`."""
  rng = np.random.default_rng(seed)
  shape = lambda s: (s.layers,) if batch is None else (s.layers, batch)
  draw = lambda s: jnp.asarray(rng.integers(0, 2, shape(s)), jnp.float32)
  return gates_lib.Gates({s.name: draw(s) for s in cfg.all_sites()})


def gradient_function(cfg):
  """`run(params, gates, *inputs)`: loss, encoder output, and the parameters' gradients."""

  def loss(params, gates, *inputs):
    out = SpeechModel(cfg).apply({'params': params}, *inputs, gates)
    value = jnp.sum(jnp.sin(out.logits)) + jnp.sum(jnp.cos(out.ctc_logits))
    return value, out.encoded.memory

  run = jit(jax.value_and_grad(loss, has_aux=True))

  def flat(*args):
    (value, memory), grads = run(*args)
    return value, memory, grads

  return flat


@functools.cache
def gradients(seed):
  """Random gates, each alike for all examples, and what `gradient_function` gives for them."""
  each = random_gates(config(), seed)
  gates = jax.tree.map(lambda g: jnp.repeat(g[:, None], BATCH, 1), each)
  return gates, _dense_gradients()(params(), gates, *inputs())


@functools.cache
def _dense_gradients():
  return gradient_function(config())


def jaxprs_of(eqn):
  """Jaxprs that an equation runs; of a custom derivative, what runs going forward."""
  for value in eqn.params.values():
    for v in value if isinstance(value, tuple) else (value,):
      if hasattr(v, 'eqns'):
        yield v
      elif hasattr(getattr(v, 'jaxpr', None), 'eqns'):
        yield v.jaxpr


def equations(jaxpr):
  """All equations, those of inner jaxprs too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jaxprs_of(eqn):
      yield from equations(inner)
