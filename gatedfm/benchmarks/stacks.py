"""Time over dense against the MACs that gates keep, of a stack alone or of whole utterances.

Letters: B batch, S frames of 40 ms, L tokens, D model width.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import clock
from gatedfm import gates as gates_lib
from gatedfm.benchmarks import torch_peer, utterance, ways
from gatedfm.gates import Pattern
from gatedfm.models import speech_costs
from gatedfm.models.speech_config import ConfigError, SpeechConfig, choice, owsm
from gatedfm.trainers import step

# Time over dense that a way should stay below, by suite and the share k of the MACs that it keeps.
BOUNDS: dict[str, dict[str, Callable[[float], float]]] = {
  'encoder': {
    'mask': lambda k: 1.08,
    'skip': lambda k: 1.10 * k + 0.08,
    'scanned': lambda k: 1.20 * k + 0.12,
    'static': lambda k: k + 0.08,
    'layerwise': lambda k: 1.10 * k + 0.10,
    'bucketed': lambda k: k + 0.15,
  },
  'decoder': {
    'mask': lambda k: 1.08,
    'skip': lambda k: k + 0.10,
    'static': lambda k: k + 0.10,
    'bucketed': lambda k: 1.08,
  },
  'utterance': {
    'mask': lambda k: 1.08,
    'skip': lambda k: 1.10 * k + 0.10,
    'scanned': lambda k: 1.20 * k + 0.12,
    'compact': lambda k: k + 0.10,
  },
  'train': {
    'mask': lambda k: 1.08,
    'skip': lambda k: k + 0.10,
    'bucketed': lambda k: k + 0.20,
  },
}

NOISE = 0.02  # of parameters
TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.1}  # between ways


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed.

  Attributes:
    suite: `encoder`, `decoder`, `train` (see `ways.make`) or `utterance` (`utterance.make`).
    model: shapes and dtype; its parameters are random.
    batch: B, examples.
    frames: S, all of them valid.
    tokens: L, that the decoder writes.
    contexts: gate patterns in the batch; with more than one, ways for gates that differ.
    pruned: shares of the modules that are closed, one row of results for each.
    masks: random patterns per share; which modules are closed matters.
    rounds: side by side.
    seed: of parameters, inputs and patterns.
    against: `torch` times ESPnet's modules beside ours, '' nothing.
    stacks: whose gates an utterance's predictors decide.
  """

  suite: str
  model: SpeechConfig
  batch: int = 1
  frames: int = 100
  tokens: int = 20
  contexts: int = 1
  pruned: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7)
  masks: int = 3
  rounds: int = 15
  seed: int = 0
  against: str = ''
  stacks: tuple[str, ...] = ('encoder', 'decoder')

  def validate(self) -> None:
    """Raises ConfigError for what cannot be timed."""
    choice('suite', self.suite, tuple(BOUNDS))
    choice('against', self.against, ('', 'torch'))
    for name in ('batch', 'frames', 'tokens', 'contexts', 'masks', 'rounds'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be positive')
    if self.contexts > self.batch:
      raise ConfigError(f'{self.contexts} contexts need a batch as large; it is {self.batch}')
    if self.seed < 0:
      raise ConfigError(f'seed is {self.seed}; it must not be negative')
    if not self.pruned or any(not 0 <= p <= 1 for p in self.pruned):
      raise ConfigError(f'pruned is {self.pruned}; it is a list of shares in [0, 1]')
    self.model.validate()
    if not self.stacks or set(self.stacks) - {'encoder', 'decoder'}:
      raise ConfigError(f'stacks is {self.stacks}; name encoder, decoder or both')
    if self.suite == 'utterance' and (self.contexts > 1 or self.against):
      raise ConfigError('utterances are timed with one pattern, and against dense alone')
    if self.against:
      if self.contexts > 1:
        raise ConfigError(f'against torch a batch has one pattern, not {self.contexts} contexts')
      torch_peer.require(self.model)

  @property
  def sites(self) -> list[gates_lib.Site]:
    """Those whose gates are closed."""
    alone = ('decoder',) if self.suite == 'decoder' else ('encoder',)
    stacks = self.stacks if self.suite == 'utterance' else alone
    return [s for s in self.model.all_sites() if s.stack in stacks]


def model(
  shape: str, dtype: str, vocabulary: int = 1000, subsampling_channels: int = 0
) -> SpeechConfig:
  """A model of `layers x width` (both stacks; heads of 64, or one narrower) or of OWSM's shapes.

  Args:
    shape: `6x256`, say, or `base`, `small`, `medium`.
    dtype: of matrix products.
    vocabulary: of `layers x width`.
    subsampling_channels: of the convolutions before the encoder; 0 means as wide as the model.

  Raises:
    ConfigError: a shape that is neither.
  """
  if found := re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', shape):
    layers, d = map(int, found.groups())
    if d % 2 or (d > 64 and d % 64):
      raise ConfigError(f'model {shape!r}: a width is even up to 64, then a multiple of 64')
    wide = dict.fromkeys(('encoder_ffn', 'decoder_ffn', 'cgmlp'), 4 * d)
    depth = {'encoder_layers': layers, 'decoder_layers': layers}
    cfg = SpeechConfig(vocabulary, d=d, heads=max(1, d // 64), **depth, **wide)
  else:
    try:
      cfg = owsm(shape)
    except ConfigError:
      raise ConfigError(
        f'model {shape!r} is neither layers x width, such as 6x256, nor base, small or medium'
      ) from None
  return dataclasses.replace(
    cfg,
    dtype=dtype,
    subsampling_channels=subsampling_channels,
    dropout=0.0,
    attention_dropout=0.0,
  )


def shares(texts: Sequence[str]) -> tuple[float, ...]:
  """Numbers from a flag; raises ConfigError naming what is none."""
  try:
    return tuple(map(float, texts))
  except ValueError as e:
    raise ConfigError(f'pruned: {e}') from None


def random_pattern(sites: Sequence[gates_lib.Site], closed: int, rng: Any) -> Pattern:
  """A pattern with that many of all modules closed, drawn at random."""
  open_M = np.ones(sum(s.layers for s in sites), bool)
  open_M[rng.permutation(open_M.size)[:closed]] = False
  parts = np.split(open_M, np.cumsum([s.layers for s in sites])[:-1])
  return Pattern(tuple((s.name, tuple(p.tolist())) for s, p in zip(sites, parts)))


def macs(case: Case, pattern: Pattern) -> float:
  """Multiply-accumulates of one example through what is open or has no gate."""
  cfg, frames = case.model, _audio_frames(case)
  if case.suite == 'utterance':
    return speech_costs.total_macs(cfg, frames, case.tokens, pattern.to_gates())
  costs = speech_costs.site_costs(cfg, frames, case.tokens)
  output = case.tokens * cfg.d * cfg.vocab_size if case.suite == 'decoder' else 0
  # Going backward takes two products for each one going forward.
  times = 3 if case.suite == 'train' else 1
  return times * (sum(costs[name].macs * sum(row) for name, row in pattern.sites) + output)


def _audio_frames(case: Case) -> int:
  """Frames of 10 ms that become `case.frames`."""
  return 4 * case.frames + 3


def macs_kept(case: Case, patterns: Sequence[Pattern]) -> float:
  """k: the share of the stack's MACs that the patterns keep, on average."""
  dense = Pattern(tuple((s.name, (True,) * s.layers) for s in case.sites))
  return float(np.mean([macs(case, p) for p in patterns]) / macs(case, dense))


def run(case: Case, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
  """Times every way at every share of closed modules.

  Args:
    case: what to time.
    say: is told what was measured.

  Returns: one row per way and draw of patterns: `way`, `pruned` (share of the modules),
    `pattern` (of each context), `macs_kept` (k), `ratio` (of the rounds' times over dense,
    quartiles), `seconds` and `dense_seconds` (quartiles), `bound` (or None), `compile_seconds`,
    `temp_bytes`, `roofline` (operations per second over those of a large matrix product) and
    `difference`, the largest from what `mask` gives; then those of `torch_peer.rows`, or
    that of `utterance.predictors`.

  Raises:
    ConfigError: a case that cannot be timed.
    RuntimeError: a way that computes something else.
  """
  case.validate()
  cfg, params, x, timed = _make(case)
  peers = _peers(case, params, x)
  peak, rows = peak_flops(case.model.dtype), []
  for patterns in _draws(case):
    prepared = {name: way(patterns) for name, way in timed.items()}
    calls = {name: p.call for name, p in prepared.items()}
    theirs = {name: prepare(patterns[0]) for name, prepare in peers.items()}
    seconds = clock.laps(calls | theirs, case.rounds)
    results = {name: call() for name, call in calls.items()}
    for name in list(calls)[1:]:
      row = _row(case, patterns, name, prepared[name], seconds, peak)
      rows.append(row | {'difference': _difference(case, name, results)})
      say(describe(rows[-1]))
    if peers:
      about = {name: rows[-1][name] for name in ('pruned', 'pattern', 'macs_kept')}
      differences = _compare(case, params, x, patterns, theirs, results['mask'])
      for row in torch_peer.rows(case.suite, about, seconds, differences):
        rows.append(row)
        say(torch_peer.describe(row))
  if case.suite == 'utterance':
    rows.append(utterance.predictors(cfg, params, x, case.rounds))
    say(utterance.describe(rows[-1]))
  return rows


def _make(case: Case) -> tuple[SpeechConfig, Any, jax.Array, dict[str, ways.Way]]:
  """The model's configuration, random parameters and input, and what runs them."""
  cfg, key = case.model, jax.random.key(case.seed)
  if case.suite == 'utterance':
    cfg = utterance.gated(cfg, case.stacks)
    params = random_params(cfg, key)
    mel_BxTxM = jax.random.normal(key, (case.batch, _audio_frames(case), cfg.mels))
    return cfg, params, mel_BxTxM, utterance.make(cfg, params, mel_BxTxM, case.tokens)
  shape, dtype = (case.batch, case.frames, cfg.d), jnp.dtype(cfg.activation_dtype)
  x_BxSxD, params = jax.random.normal(key, shape, dtype), random_params(cfg, key)
  timed = ways.make(case.suite, cfg, params, x_BxSxD, case.tokens, case.contexts)
  return cfg, params, x_BxSxD, timed


def random_params(cfg: SpeechConfig, key: jax.Array) -> Any:
  """Parameters none of which is still 0 or 1, as biases, taps and norms are at first."""
  params = nn.unbox(step.init_params(cfg, key))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  noisy = [x + NOISE * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
  return jax.tree.unflatten(tree, noisy)


def _peers(case: Case, params: Any, x_BxSxD: jax.Array) -> dict[str, Callable]:
  """What `against` asks for: by way, from a pattern to the call."""
  if not case.against:
    return {}
  if case.suite == 'train':
    return torch_peer.gradients(case.model, params, x_BxSxD, ways.slope(x_BxSxD), ways.RATE)
  return torch_peer.calls(case.suite, case.model, params, x_BxSxD, case.tokens)


def _compare(case, params, x_BxSxD, patterns, theirs, ours) -> dict[str, float]:
  """How far theirs are from ours; of a training step, which has moved on, its gradients."""
  if case.suite != 'train':
    return torch_peer.check(theirs, ours)
  slopes = ways.gradients(case.model, params, x_BxSxD, patterns)
  return torch_peer.check_gradients(case.model, theirs, slopes)


def _draws(case: Case) -> Iterator[list[Pattern]]:
  """The patterns of each measurement, one per context."""
  rng, total = np.random.default_rng(case.seed), sum(s.layers for s in case.sites)
  for closed in dict.fromkeys(round(p * total) for p in case.pruned):
    # Of nothing and of everything there is one pattern.
    for _ in range(case.masks if 0 < closed < total else 1):
      yield [random_pattern(case.sites, closed, rng) for _ in range(case.contexts)]


def peak_flops(dtype: str, size: int = 2048) -> float:
  """Operations per second of a square matrix product in `dtype`, the best of several."""
  a = jnp.ones((size, size), jnp.dtype(dtype))
  dot = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
  return 2 * size**3 / clock.laps({'': lambda: dot(a)}, 5)[''].min()


def _difference(case: Case, way: str, results: dict[str, Any]) -> float:
  far = lambda a, b: jnp.max(jnp.abs(a - b).astype(jnp.float32))
  difference = float(max(jax.tree.leaves(jax.tree.map(far, results[way], results['mask']))))
  if not difference <= (tolerance := TOLERANCE[case.model.dtype]):
    raise RuntimeError(f'{way} and mask differ by {difference:.1e}, more than {tolerance:.0e}')
  return difference


def _row(case, patterns, way, prepared, seconds, peak) -> dict[str, Any]:
  k = macs_kept(case, patterns)
  computed = float(np.mean([macs(case, p) for p in patterns]))
  if way == 'mask':  # what is closed is computed all the same
    computed /= k
  operations = 2 * case.batch * computed
  return {
    'way': way,
    'pruned': 1 - float(np.mean([p.open_fraction for p in patterns])),
    'pattern': ' | '.join(map(str, patterns)),
    'macs_kept': k,
    'ratio': clock.quartiles(seconds[way] / seconds['dense']),
    'seconds': clock.quartiles(seconds[way]),
    'dense_seconds': clock.quartiles(seconds['dense']),
    'bound': BOUNDS[case.suite][way](k) if case.model.d >= ways.GOAL_WIDTH else None,
    'compile_seconds': prepared.compile_seconds,
    'temp_bytes': prepared.temp_bytes,
    'roofline': operations / float(np.median(seconds[way])) / peak,
  }


def describe(row: dict[str, Any]) -> str:
  """A row as a line for people."""
  r, dense = row['ratio'], 1e3 * row['dense_seconds']['median']
  return (
    f'{row["pruned"]:4.0%} closed, MACs kept {row["macs_kept"]:.2f} | {row["way"]:9} '
    f'{r["median"]:.2f} ({r["q25"]:.2f} to {r["q75"]:.2f}) of {dense:.1f} ms dense'
    f'{ways.goal(r["median"], row["bound"])}'
    f' | {row["roofline"]:.0%} of peak | compiled in {row["compile_seconds"]:.1f} s'
  )
