"""Ways to execute a stack's gates, each ready to be timed on the same parameters and input.

Letters: B batch, S frames of 40 ms, L tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm.execution.layerwise import Layerwise
from gatedfm.gates import Gates, Pattern
from gatedfm.models import stack
from gatedfm.models.speech import Encoded, SpeechModel, for_inference
from gatedfm.models.speech_config import SpeechConfig
from gatedfm.nn import gating

RATE = 1e-3  # of gradient descent
GOAL_WIDTH = 256  # of models that goals are for: in narrower ones much is no matrix product
# Of a batch whose examples share their gates, and of one in which they differ.
SHARED = ('mask', 'skip', 'scanned', 'static', 'layerwise')
APART = ('mask', 'bucketed')
# The layers of a cached decoder stay unrolled, and its steps too short for the host.
BY_SUITE = {'encoder': SHARED, 'decoder': ('mask', 'skip', 'static'), 'train': ('mask', 'skip')}


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A way for certain gates: `call()` runs it, compiled.

  `compile_seconds` and `temp_bytes` (temporaries of the largest program) are of all that it runs.
  """

  call: Callable[[], Any]
  compile_seconds: float
  temp_bytes: int


Way = Callable[[Sequence[Pattern]], Prepared]


def make(
  suite: str, cfg: SpeechConfig, params: Any, x_BxSxD: jax.Array, tokens: int, contexts: int
) -> dict[str, Way]:
  """The ways of a suite by name, `dense` first: from patterns to what can be timed.

  Args:
    suite: `encoder` runs once over frames, `decoder` writes tokens one by one with caches (the
      projection of the memory included), `train` is forward and backward of the encoder.
    cfg, params: the model, its parameters in the training layout.
    x_BxSxD: the encoder's input, or the decoder's memory.
    tokens: L, that the decoder writes.
    contexts: patterns in a batch; example b has the pattern of number b modulo `contexts`.
  """
  kind = 'decoder' if suite == 'decoder' else 'encoder'
  forward = functools.partial(_decode, tokens) if suite == 'decoder' else encode
  if suite == 'train':
    base = dataclasses.replace(cfg, scan_layers=False, remat='none')
    unrolled = SpeechModel(base), stack.unstack(params)
    forward = _train
  else:
    unrolled = for_inference(cfg, params)

  share = lambda model: (model[0], {kind: model[1][kind]})
  kind_of = _Trained if suite == 'train' else Traced
  arrays = lambda patterns: _arrays(patterns, kind, len(x_BxSxD))
  traced = lambda execution, model, **k: kind_of(
    execution, forward, share(model), x_BxSxD, arrays, **k
  )
  fixed = lambda pattern: {name.split('/')[1]: bits for name, bits in pattern.sites}
  builders = {
    'mask': lambda: traced('mask', unrolled),
    'skip': lambda: traced('skip', unrolled),
    'scanned': lambda: traced('skip', for_inference(cfg, params, scan_encoder=True)),
    'static': lambda: Static(forward, share(unrolled), x_BxSxD, fixed),
    'layerwise': lambda: _Layerwise(unrolled, x_BxSxD),
    'bucketed': lambda: traced('bucketed', unrolled),
  }
  names = BY_SUITE[suite] if contexts == 1 else APART
  return {'dense': traced('mask', unrolled, dense=True)} | {n: builders[n]() for n in names}


class Traced:
  """One program for all gates, compiled at the first call.

  Args:
    execution: of the model.
    forward: `(model, params, x, gates)`, what is timed.
    model: with its parameters.
    x: its input.
    arrays: makes `gates` of patterns.
    dense: there are none.
  """

  donated = ()

  def __init__(self, execution, forward, model, x, arrays, dense=False):
    cfg = dataclasses.replace(model[0].cfg, execution=execution)
    run = functools.partial(forward, SpeechModel(cfg))
    self._jitted = jax.jit(run, donate_argnums=self.donated)
    self._params, self._x = model[1], x
    self._arrays = (lambda patterns: {}) if dense else arrays
    self._compiled = None

  def __call__(self, patterns: Sequence[Pattern]) -> Prepared:
    args = self._params, self._x, self._arrays(patterns)
    self._compiled = self._compiled or _compile(self._jitted, *args)
    return self._compiled.on(*args)


class _Trained(Traced):
  """The same of a training step, whose parameters, donated, are the next one's."""

  donated = (0,)

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self._params = jax.tree.map(jnp.copy, self._params)

  def __call__(self, patterns: Sequence[Pattern]) -> Prepared:
    prepared = super().__call__(patterns)
    program, (_, *rest) = prepared.call.func, prepared.call.args

    def call() -> Any:
      self._params = program(self._params, *rest)
      return self._params

    return dataclasses.replace(prepared, call=call)


class Static:
  """A program per pattern, in which closed modules are not; `fixed` makes its gates."""

  def __init__(self, forward, model, x, fixed):
    self._forward, self._model, self._x, self._fixed = forward, model, x, fixed

  def __call__(self, patterns: Sequence[Pattern]) -> Prepared:
    (pattern,) = patterns
    model, params = self._model
    jitted = jax.jit(functools.partial(self._forward, model, gates=self._fixed(pattern)))
    return _compile(jitted, params, self._x).on(params, self._x)


class _Layerwise:
  """The encoder's layers called one by one from the host."""

  def __init__(self, model, x_BxSxD):
    self._engine = Layerwise(model[0].cfg)
    self._args = model[1]['encoder'], x_BxSxD, jnp.ones(x_BxSxD.shape[:2], bool)
    self._seconds = 0.0

  def __call__(self, patterns: Sequence[Pattern]) -> Prepared:
    start = time.perf_counter()
    programs = self._engine.prepare(*self._args, *patterns)
    temp_bytes = max(p.result().memory_analysis().temp_size_in_bytes for p in programs)
    self._seconds += time.perf_counter() - start  # of all kinds of layers so far
    call = functools.partial(self._engine, *self._args, *patterns)
    return Prepared(call, self._seconds, temp_bytes)


@dataclasses.dataclass(frozen=True)
class _Compiled:
  program: Callable[..., Any]
  seconds: float
  temp_bytes: int

  def on(self, *args: Any) -> Prepared:
    return Prepared(functools.partial(self.program, *args), self.seconds, self.temp_bytes)


def _compile(jitted: Any, *args: Any) -> _Compiled:
  start = time.perf_counter()
  program = jitted.lower(*args).compile()
  seconds = time.perf_counter() - start
  return _Compiled(program, seconds, program.memory_analysis().temp_size_in_bytes)


def _arrays(patterns: Sequence[Pattern], kind: str, batch: int) -> Mapping[str, jax.Array]:
  """Gates by module, `[N]` of one pattern or `[N, B]` of several."""
  rows = [{n.split('/')[1]: bits for n, bits in p.stack(kind).sites} for p in patterns]
  if len(rows) == 1:
    return {m: jnp.asarray(bits, jnp.float32) for m, bits in rows[0].items()}
  each = [rows[b % len(rows)] for b in range(batch)]
  return {m: jnp.asarray(np.array([r[m] for r in each]).T, jnp.float32) for m in rows[0]}


def encode(
  model: SpeechModel, params: Any, x_BxSxD: jax.Array, gates: Mapping[str, Any]
) -> jax.Array:
  """The memory `[B, S, D]` of all-valid frames; gates `[N]` or `[N, B]` by module."""
  none = jnp.zeros(x_BxSxD.shape[0], int)
  mask_BxS = jnp.ones(x_BxSxD.shape[:2], bool)
  run = lambda m: m.encoder(x_BxSxD, dict(gates), mask_BxS, gating.Context(none, none), True)[0]
  return nn.apply(run, model)({'params': params})


def slope(x_BxSxD: jax.Array) -> jax.Array:
  """Of the loss that is trained on, by the memory: the input, scaled to a loss of about 1."""
  return x_BxSxD / x_BxSxD.size**0.5


def gradients(cfg: SpeechConfig, params: Any, x_BxSxD: jax.Array, patterns: Sequence[Pattern]):
  """What `train` descends along, in the layout of `params`, by masks."""
  gates = _arrays(patterns, 'encoder', len(x_BxSxD))
  return jax.jit(functools.partial(_slopes, SpeechModel(cfg)))(params, x_BxSxD, gates)


def _slopes(model: SpeechModel, params: Any, x_BxSxD: jax.Array, gates: Mapping[str, Any]) -> Any:
  """Gradients of `sum(memory * slope(x))`."""
  loss = lambda params: jnp.sum(encode(model, params, x_BxSxD, gates) * slope(x_BxSxD))
  return jax.grad(loss)(params)


def _train(model: SpeechModel, params: Any, x_BxSxD: jax.Array, gates: Mapping[str, Any]) -> Any:
  """Parameters after a step of gradient descent."""
  slopes = _slopes(model, params, x_BxSxD, gates)
  return jax.tree.map(lambda p, g: p - RATE * g, params, slopes)


def _decode(
  tokens: int, model: SpeechModel, params: Any, memory_BxSxD: jax.Array, gates: Mapping[str, Any]
) -> jax.Array:
  """The last log-probabilities `[B, V]` after `tokens` given ones: all ways read the same text."""
  call = functools.partial(model.apply, {'params': params})
  mask_BxS = jnp.ones(memory_BxSxD.shape[:2], bool)
  encoded = Encoded(memory_BxSxD, mask_BxS, Gates({f'decoder/{m}': g for m, g in gates.items()}))
  batch, vocabulary = memory_BxSxD.shape[0], model.cfg.vocab_size

  def write(i: jax.Array, carry: tuple) -> tuple:
    token_Bx1 = jnp.full((batch, 1), (7 * i) % vocabulary)
    logits_Bx1xV, caches = call(token_Bx1, i, carry[1], encoded, method='step')
    return jax.nn.log_softmax(logits_Bx1xV[:, 0]), caches

  start = jnp.zeros((batch, vocabulary)), call(encoded, tokens, method='start')
  return jax.lax.fori_loop(0, tokens, write, start)[0]


def goal(ratio: float, bound: float | None, shown: str = '.2f') -> str:
  """What is said of a row's bound, '' where there is none."""
  if bound is None:
    return ''
  return f' | goal {bound:{shown}}' + ('' if ratio <= bound else ' MISSED')
