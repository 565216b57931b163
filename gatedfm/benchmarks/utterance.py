"""A whole utterance, from features to tokens, its gates predicted on the way.

The predictor of a random model is made to decide as a pattern wants, by its biases alone, so that
its cost is in the time and its answer is known. Texts have no end of their own: as many tokens
are written as asked for. Letters: B batch, T frames of 10 ms, M mel bands, L tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import clock
from gatedfm.benchmarks import ways
from gatedfm.execution import ctc_prefix, decoding
from gatedfm.gates import Gates, Pattern
from gatedfm.models import speech_costs
from gatedfm.models.speech import SpeechModel, for_inference
from gatedfm.models.speech_config import GateConfig, SpeechConfig
from gatedfm.nn import gating

WAYS = ('mask', 'skip', 'scanned', 'compact')
PREDICTORS = {'encoder': 'encoder_gates', 'decoder': 'decoder_gates'}
PREDICTORS_BOUND = 0.01  # of the encoder's time
REPEATS = 100  # of predictors' calls
CERTAIN = 10.0  # log-odds of a decision


def gated(cfg: SpeechConfig, stacks: Sequence[str]) -> SpeechConfig:
  """The configuration with predictors that read all there is, for these stacks."""
  return dataclasses.replace(cfg, gates=GateConfig(enabled=True, stacks=tuple(stacks)))


def make(cfg: SpeechConfig, params: Any, mel_BxTxM: jax.Array, tokens: int) -> dict[str, ways.Way]:
  """The ways to run an utterance by name, `dense`, without predictors, first; see `ways.make`.

  `compact` knows the gates beforehand: one program for the whole pattern, without predictors.

  Args:
    cfg, params: of a model with predictors (`gated`), in the training layout.
    mel_BxTxM: normalised features, all frames valid.
    tokens: L, written by joint CTC/attention decoding.
  """
  blind = {
    name: {'mlp': {'kernel': jnp.zeros_like(params[name]['mlp']['kernel'])}}
    for name in PREDICTORS.values()
    if name in params
  }
  params = _merged(params, blind)
  forward = functools.partial(_run, tokens)
  predicted = for_inference(cfg, params)
  plain = dataclasses.replace(predicted[0].cfg, gates=GateConfig())
  own = {k: v for k, v in predicted[1].items() if k not in blind}
  traced = lambda execution, model, **k: ways.Traced(
    execution, forward, model, mel_BxTxM, functools.partial(_biases, cfg), **k
  )
  scanned = for_inference(cfg, params, scan_encoder=True)
  return {
    'dense': traced('mask', (SpeechModel(plain), own), dense=True),
    'mask': traced('mask', predicted),
    'skip': traced('skip', predicted),
    'scanned': traced('skip', scanned),
    'compact': ways.Static(forward, (SpeechModel(plain), own), mel_BxTxM, Pattern.fixed),
  }


def predictors(cfg: SpeechConfig, params: Any, mel_BxTxM: jax.Array, rounds: int) -> dict[str, Any]:
  """What it takes to decide, alone: a row whose `dense_seconds` are the dense encoder's.

  Called many times at a stretch, each waited for: a single call is too short to be told from
  waking up. An upper bound: inside of a larger program there is no call of its own to pay for.

  Args:
    cfg, params, mel_BxTxM: see `make`.
    rounds: side by side.
  """
  model, params = for_inference(cfg, params)
  frames_B, none = jnp.full(len(mel_BxTxM), mel_BxTxM.shape[1]), jnp.zeros(len(mel_BxTxM), int)
  own = {name: params[name] for name in PREDICTORS.values() if name in params}
  x_BxSxD, mask_BxS = model.apply({'params': params}, mel_BxTxM, frames_B, method='listen')

  def decide(own: Any, x_BxSxD: jax.Array) -> Any:
    run = lambda m: [
      m.decide(stack, x_BxSxD, mask_BxS, gating.Context(none, none)) for stack in cfg.gates.stacks
    ]
    return nn.apply(run, model)({'params': own})

  encoder = {'encoder': params['encoder']}
  encode = jax.jit(functools.partial(ways.encode, model, gates={}))
  decide = jax.jit(decide)
  calls = {
    'dense': lambda: encode(encoder, x_BxSxD),
    'predictors': lambda: [jax.block_until_ready(decide(own, x_BxSxD)) for _ in range(REPEATS)],
  }
  seconds = clock.laps(calls, rounds)
  seconds['predictors'] /= REPEATS
  products = sum(x.size for p in own.values() for x in jax.tree.leaves(p['mlp']) if x.ndim > 1)
  costs = speech_costs.site_costs(cfg, mel_BxTxM.shape[1], tokens=1)
  macs = sum(costs[s.name].macs * s.layers for s in cfg.all_sites() if s.stack == 'encoder')
  return {
    'way': 'predictors',
    'pruned': 0.0,
    'macs_kept': products / macs,
    'ratio': clock.quartiles(seconds['predictors'] / seconds['dense']),
    'seconds': clock.quartiles(seconds['predictors']),
    'dense_seconds': clock.quartiles(seconds['dense']),
    'bound': PREDICTORS_BOUND if cfg.d >= ways.GOAL_WIDTH else None,
  }


def describe(row: Mapping[str, Any]) -> str:
  """The predictors' row as a line for people."""
  ratio = row['ratio']['median']
  return (
    f"gates decided in {ratio:.2%} of the dense encoder's "
    f'{1e3 * row["dense_seconds"]["median"]:.1f} ms{ways.goal(ratio, row["bound"], ".0%")}'
  )


def _merged(tree: Any, other: Mapping[str, Any]) -> Any:
  """`tree` with the leaves of `other` in place of its own."""
  return {
    k: (_merged(v, other[k]) if isinstance(v, dict) else other[k]) if k in other else v
    for k, v in tree.items()
  }


def _biases(cfg: SpeechConfig, patterns: Sequence[Pattern]) -> Mapping[str, Any]:
  """Parameters with which the predictors decide as the one pattern says."""
  (pattern,) = patterns
  out = {}
  for stack in cfg.gates.stacks:
    bits = np.array([b for _, row in pattern.stack(stack).sites for b in row])
    log_odds = np.where(bits, CERTAIN, -CERTAIN).astype(np.float32)
    bias = np.stack([np.zeros_like(log_odds), log_odds], 1).reshape(-1)
    out[PREDICTORS[stack]] = {'mlp': {'bias': jnp.asarray(bias)}}
  return out


def _run(
  tokens: int, model: SpeechModel, params: Any, mel_BxTxM: jax.Array, gates: Mapping | Gates
) -> dict[str, jax.Array]:
  """`write` with all frames valid; `gates` are the predictors' biases or fixed."""
  fixed = gates if isinstance(gates, Gates) else None
  params = params if fixed else _merged(params, gates)
  frames_B = jnp.full(len(mel_BxTxM), mel_BxTxM.shape[1])
  return write(tokens, model, params, mel_BxTxM, frames_B, fixed)


def write(
  tokens: int,
  model: SpeechModel,
  params: Any,
  mel_BxTxM: jax.Array,
  frames_B: jax.Array,
  gates: Gates | None,
) -> dict[str, jax.Array]:
  """Memory `[B, S, D]` and L tokens `[B, L]`, which have no end, of normalised features."""
  none = jnp.zeros(len(mel_BxTxM), jnp.int32)
  call = functools.partial(model.apply, {'params': params})
  encoded = call(mel_BxTxM, frames_B, gating.Context(none, none), gates, method='encode')
  ctc = ctc_prefix.frames(call(encoded, method='ctc_logits'), encoded.mask)
  vocabulary = model.cfg.vocab_size
  never_ends = np.arange(vocabulary) > 0  # all but CTC's blank, and the end, which is the last
  never_ends[-1] = False
  request = decoding.Request(
    features=None,
    frames=frames_B,
    language=none,
    task=none,
    primer=jnp.ones((len(mel_BxTxM), 3), jnp.int32),
    steps=jnp.int32(tokens),
    ctc_weight=jnp.float32(0.3),
    gates=None,
    length=tokens,
  )
  what = decoding.Vocabulary(vocabulary - 1, never_ends, np.arange(1, 2))
  decoded = decoding.greedy(model, params, encoded, ctc, request, what)
  return {'memory': encoded.memory, 'tokens': decoded.tokens}
