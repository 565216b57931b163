"""A stack alone: its time over dense, against the MACs that its gates keep.

The encoder runs once over frames; the decoder writes tokens one by one with caches, the
projection of the encoder's output included. Letters: B batch, S frames of 40 ms, L tokens,
D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import clock
from gatedfm import gates as gates_lib
from gatedfm.gates import Gates, Pattern
from gatedfm.models import speech_costs
from gatedfm.models.speech import Encoded, SpeechModel, for_inference
from gatedfm.models.speech_config import ConfigError, SpeechConfig, choice, owsm
from gatedfm.nn import gating
from gatedfm.trainers import step

# Time over dense that a way should stay below, by stack and the share k of the MACs that it keeps.
BOUNDS: dict[str, dict[str, Callable[[float], float]]] = {
  'encoder': {
    'mask': lambda k: 1.08,
    'skip': lambda k: 1.10 * k + 0.08,
    'static': lambda k: k + 0.08,
  },
  'decoder': {
    'mask': lambda k: 1.08,
    'skip': lambda k: k + 0.10,
    'static': lambda k: k + 0.10,
  },
}


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed.

  Attributes:
    stack: `encoder` or `decoder`.
    model: shapes and dtype; its parameters are random.
    batch: B, examples that share their gates.
    frames: S, all of them valid.
    tokens: L, that the decoder writes.
    pruned: shares of the modules that are closed, one row of results for each.
    masks: random patterns per share; which modules are closed matters.
    rounds: side by side.
    seed: of parameters, inputs and patterns.
  """

  stack: str
  model: SpeechConfig
  batch: int = 1
  frames: int = 100
  tokens: int = 20
  pruned: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7)
  masks: int = 3
  rounds: int = 15
  seed: int = 0

  def validate(self) -> None:
    """Raises ConfigError for what cannot be timed."""
    choice('stack', self.stack, tuple(BOUNDS))
    for name in ('batch', 'frames', 'tokens', 'masks', 'rounds'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be positive')
    if not self.pruned or any(not 0 <= p <= 1 for p in self.pruned):
      raise ConfigError(f'pruned is {self.pruned}; it is a list of shares in [0, 1]')
    self.model.validate()

  @property
  def sites(self) -> list[gates_lib.Site]:
    """Those of the stack."""
    return [s for s in self.model.all_sites() if s.stack == self.stack]


def model(shape: str, dtype: str, vocabulary: int = 1000) -> SpeechConfig:
  """A model of `layers x width` (both stacks, heads of 64) or of OWSM's shapes.

  Raises:
    ConfigError: a shape that is neither.
  """
  if found := re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', shape):
    layers, d = map(int, found.groups())
    wide = dict.fromkeys(('encoder_ffn', 'decoder_ffn', 'cgmlp'), 4 * d)
    heads = max(1, d // 64)
    depth = {'encoder_layers': layers, 'decoder_layers': layers}
    cfg = SpeechConfig(vocabulary, d=d, heads=heads, **depth, **wide)
  else:
    try:
      cfg = owsm(shape)
    except ConfigError as e:
      raise ConfigError(f'model {shape!r} is neither layers x width, as 6x256, nor {e}') from None
  return dataclasses.replace(cfg, dtype=dtype, dropout=0.0, attention_dropout=0.0)


def shares(texts: Sequence[str]) -> tuple[float, ...]:
  """Numbers from a flag; raises ConfigError naming what is none."""
  try:
    return tuple(map(float, texts))
  except ValueError as e:
    raise ConfigError(f'pruned: {e}') from None


def random_pattern(sites: Sequence[gates_lib.Site], pruned: float, rng: Any) -> Pattern:
  """A pattern with that share of all modules closed, drawn at random, rounded to whole ones."""
  open_M = np.ones(sum(s.layers for s in sites), bool)
  open_M[rng.permutation(open_M.size)[: round(pruned * open_M.size)]] = False
  parts = np.split(open_M, np.cumsum([s.layers for s in sites])[:-1])
  return Pattern(tuple((s.name, tuple(p.tolist())) for s, p in zip(sites, parts)))


def macs_kept(case: Case, pattern: Pattern) -> float:
  """k: the share of the stack's multiply-accumulates in what is open or has no gate."""
  cfg = case.model
  costs = speech_costs.site_costs(cfg, 4 * case.frames + 3, case.tokens)
  macs = lambda share: sum(costs[name].macs * share(row) for name, row in pattern.sites)
  output = case.tokens * cfg.d * cfg.vocab_size if case.stack == 'decoder' else 0
  return (macs(sum) + output) / (macs(len) + output)


def run(case: Case, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
  """Times every way at every share of closed modules.

  Args:
    case: what to time.
    say: is told what was measured.

  Returns: one row per way and pattern: `way`, `pruned` (share of the modules), `macs_kept` (k),
    `ratio` (of the rounds' times over dense, quartiles), `seconds` and `dense_seconds` (quartiles),
    `bound`, `compile_seconds`, `temp_bytes` and `difference`, the largest from what `mask` gives.

  Raises:
    ConfigError: a case that cannot be timed.
  """
  case.validate()
  sites = case.sites
  shape = (case.batch, case.frames, case.model.d)
  dtype = jnp.dtype(case.model.activation_dtype)
  x_BxSxD = jax.random.normal(jax.random.key(case.seed), shape, dtype)
  params = step.nn.unbox(step.init_params(case.model, jax.random.key(case.seed)))
  models = {way: for_inference(case.model, params, way) for way in gating.EXECUTIONS}
  models |= {'dense': models['mask'], 'static': models['mask']}
  models = {way: (model, {case.stack: p[case.stack]}) for way, (model, p) in models.items()}
  compiled = lambda way, gates: _compile(case, *models[way], x_BxSxD, gates)
  opened = gates_lib.all_open(sites).stack(case.stack, sites)
  programs = {'dense': compiled('dense', {})}
  programs |= {way: compiled(way, opened) for way in gating.EXECUTIONS}
  rng, rows = np.random.default_rng(case.seed), []
  for pruned in case.pruned:
    # Of nothing and of everything there is one pattern.
    for _ in range(case.masks if 0 < pruned < 1 else 1):
      pattern = random_pattern(sites, pruned, rng)
      programs['static'] = compiled('static', pattern.fixed().stack(case.stack, sites))
      gates = pattern.to_gates().stack(case.stack, sites)
      given = dict.fromkeys(gating.EXECUTIONS, gates)
      calls = {
        way: functools.partial(p.run, models[way][1], x_BxSxD, given.get(way, {}))
        for way, p in programs.items()
      }
      rows += _rows(case, pattern, pruned, programs, clock.laps(calls, case.rounds))
      want = np.asarray(calls['mask'](), np.float32)
      for row in rows[1 - len(calls) :]:
        got = np.asarray(calls[row['way']](), np.float32)
        row['difference'] = float(np.abs(got - want).max())
        say(describe(row))
  return rows


@dataclasses.dataclass(frozen=True)
class _Program:
  run: Callable[[Any, jax.Array, Any], jax.Array]
  compile_seconds: float
  temp_bytes: int


def _compile(case: Case, model: SpeechModel, params: Any, x_BxSxD: jax.Array, gates: dict):
  """The stack for gates like `gates`; for these very ones where they are tuples of bools."""
  fixed = any(isinstance(g, tuple) for g in gates.values())
  forward = _encode if case.stack == 'encoder' else functools.partial(_decode, case.tokens)
  stack = lambda params, x_BxSxD, given: forward(model, params, x_BxSxD, gates if fixed else given)
  start = time.perf_counter()
  program = jax.jit(stack).lower(params, x_BxSxD, {} if fixed else gates).compile()
  seconds = time.perf_counter() - start
  return _Program(program, seconds, program.memory_analysis().temp_size_in_bytes)


def _encode(model: SpeechModel, params: Any, x_BxSxD: jax.Array, gates: dict) -> jax.Array:
  """The memory, `[B, S, D]`."""
  none = jnp.zeros(x_BxSxD.shape[0], int)
  mask_BxS = jnp.ones(x_BxSxD.shape[:2], bool)
  run = lambda m: m.encoder(x_BxSxD, gates, mask_BxS, gating.Context(none, none), True)[0]
  return nn.apply(run, model)({'params': params})


def _decode(
  tokens: int, model: SpeechModel, params: Any, memory_BxSxD: jax.Array, gates: dict
) -> jax.Array:
  """The last logits, `[B, V]`, after `tokens` given ones: all ways read the same text."""
  call = functools.partial(model.apply, {'params': params})
  mask_BxS = jnp.ones(memory_BxSxD.shape[:2], bool)
  encoded = Encoded(memory_BxSxD, mask_BxS, Gates({f'decoder/{m}': g for m, g in gates.items()}))
  batch, vocabulary = memory_BxSxD.shape[0], model.cfg.vocab_size

  def write(i: jax.Array, carry: tuple) -> tuple:
    token_Bx1 = jnp.full((batch, 1), (7 * i) % vocabulary)
    logits_Bx1xV, caches = call(token_Bx1, i, carry[1], encoded, method='step')
    return logits_Bx1xV[:, 0], caches

  start = jnp.zeros((batch, vocabulary)), call(encoded, tokens, method='start')
  return jax.lax.fori_loop(0, tokens, write, start)[0]


def _rows(case, pattern, pruned, programs, seconds) -> list[dict[str, Any]]:
  k = macs_kept(case, pattern)
  return [
    {
      'way': way,
      'pruned': pruned,
      'pattern': str(pattern),
      'macs_kept': k,
      'ratio': clock.quartiles(seconds[way] / seconds['dense']),
      'seconds': clock.quartiles(seconds[way]),
      'dense_seconds': clock.quartiles(seconds['dense']),
      'bound': BOUNDS[case.stack][way](k),
      'compile_seconds': program.compile_seconds,
      'temp_bytes': program.temp_bytes,
    }
    for way, program in programs.items()
    if way != 'dense'
  ]


def describe(row: dict[str, Any]) -> str:
  """A row as a line for people."""
  r, dense = row['ratio'], 1e3 * row['dense_seconds']['median']
  return (
    f'{row["pruned"]:4.0%} closed, MACs kept {row["macs_kept"]:.2f} | {row["way"]:6} '
    f'{r["median"]:.2f} ({r["q25"]:.2f} to {r["q75"]:.2f}) of {dense:.1f} ms dense'
    f' | bound {row["bound"]:.2f}{"" if r["median"] <= row["bound"] else " EXCEEDED"}'
    f' | compiled in {row["compile_seconds"]:.1f} s'
  )
