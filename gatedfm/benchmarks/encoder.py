"""The encoder stack alone: its time over dense, against the MACs that its gates keep.

Letters: B batch, S frames of 40 ms, D model width.
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
from gatedfm.gates import Pattern
from gatedfm.models import speech_costs
from gatedfm.models.speech import SpeechModel, for_inference
from gatedfm.models.speech_config import ConfigError, SpeechConfig, owsm
from gatedfm.nn import gating
from gatedfm.trainers import step

# Time over dense that a way should stay below, by the share k of the MACs that it keeps.
BOUNDS: dict[str, Callable[[float], float]] = {
  'mask': lambda k: 1.08,
  'skip': lambda k: 1.10 * k + 0.08,
  'static': lambda k: k + 0.08,
}


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed.

  Attributes:
    model: shapes and dtype; its parameters are random.
    batch: B, examples that share their gates.
    frames: S, all of them valid.
    pruned: shares of the modules that are closed, one row of results for each.
    masks: random patterns per share; which modules are closed matters.
    rounds: side by side.
    seed: of parameters, inputs and patterns.
  """

  model: SpeechConfig
  batch: int = 1
  frames: int = 100
  pruned: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7)
  masks: int = 3
  rounds: int = 15
  seed: int = 0

  def validate(self) -> None:
    """Raises ConfigError for what cannot be timed."""
    for name in ('batch', 'frames', 'masks', 'rounds'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be positive')
    if not self.pruned or any(not 0 <= p <= 1 for p in self.pruned):
      raise ConfigError(f'pruned is {self.pruned}; it is a list of shares in [0, 1]')
    self.model.validate()


def model(shape: str, dtype: str) -> SpeechConfig:
  """A model of `layers x width` (one decoder layer, heads of 64) or of OWSM's shapes.

  Raises:
    ConfigError: a shape that is neither.
  """
  if found := re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', shape):
    layers, d = map(int, found.groups())
    wide = dict.fromkeys(('encoder_ffn', 'decoder_ffn', 'cgmlp'), 4 * d)
    heads = max(1, d // 64)
    cfg = SpeechConfig(64, d=d, heads=heads, encoder_layers=layers, decoder_layers=1, **wide)
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


def macs_kept(cfg: SpeechConfig, pattern: Pattern, frames: int) -> float:
  """k: the share of the stack's multiply-accumulates in what is open."""
  costs = speech_costs.site_costs(cfg, 4 * frames + 3, 0)
  total = sum(costs[name].macs * len(row) for name, row in pattern.sites)
  return sum(costs[name].macs * sum(row) for name, row in pattern.sites) / total


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
  sites = [s for s in case.model.all_sites() if s.stack == 'encoder']
  shape = (case.batch, case.frames, case.model.d)
  dtype = jnp.dtype(case.model.activation_dtype)
  x_BxSxD = jax.random.normal(jax.random.key(case.seed), shape, dtype)
  params = step.nn.unbox(step.init_params(case.model, jax.random.key(case.seed)))
  models = {way: for_inference(case.model, params, way) for way in gating.EXECUTIONS}
  models |= {'dense': models['mask'], 'static': models['mask']}
  models = {way: (model, {'encoder': p['encoder']}) for way, (model, p) in models.items()}
  opened = gates_lib.all_open(sites).stack('encoder', sites)
  programs = {'dense': _compile(*models['dense'], x_BxSxD, {})}
  for way in gating.EXECUTIONS:
    programs[way] = _compile(*models[way], x_BxSxD, opened)
  rng, rows = np.random.default_rng(case.seed), []
  for pruned in case.pruned:
    # Of nothing and of everything there is one pattern.
    for _ in range(case.masks if 0 < pruned < 1 else 1):
      pattern = random_pattern(sites, pruned, rng)
      fixed = pattern.fixed().stack('encoder', sites)
      programs['static'] = _compile(*models['static'], x_BxSxD, fixed)
      gates = jax.tree.map(jnp.asarray, pattern.to_gates().stack('encoder', sites))
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


def _compile(model: SpeechModel, params: Any, x_BxSxD: jax.Array, gates: dict) -> _Program:
  """The stack for gates like `gates`; for these very ones where they are tuples of bools."""
  batch = x_BxSxD.shape[0]
  fixed = any(isinstance(g, tuple) for g in gates.values())

  def stack(params: Any, x_BxSxD: jax.Array, given: dict) -> jax.Array:
    context = gating.Context(jnp.zeros(batch, int), jnp.zeros(batch, int))
    mask_BxS = jnp.ones(x_BxSxD.shape[:2], bool)
    run = lambda m: m.encoder(x_BxSxD, gates if fixed else given, mask_BxS, context, True)[0]
    return nn.apply(run, model)({'params': params})

  start = time.perf_counter()
  program = jax.jit(stack).lower(params, x_BxSxD, {} if fixed else gates).compile()
  seconds = time.perf_counter() - start
  return _Program(program, seconds, program.memory_analysis().temp_size_in_bytes)


def _rows(case, pattern, pruned, programs, seconds) -> list[dict[str, Any]]:
  k = macs_kept(case.model, pattern, case.frames)
  return [
    {
      'way': way,
      'pruned': pruned,
      'pattern': str(pattern),
      'macs_kept': k,
      'ratio': clock.quartiles(seconds[way] / seconds['dense']),
      'seconds': clock.quartiles(seconds[way]),
      'dense_seconds': clock.quartiles(seconds['dense']),
      'bound': BOUNDS[way](k),
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
