"""Language models: pruned ones timed beside the dense one, and what scoring them costs.

Parameters and what is closed are random: neither changes the time. Letters: N layers, H heads.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gatedfm.data import lm_batches
from gatedfm.data.lm_batches import Pair
from gatedfm.evaluation import lm_timing
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm, lm_costs
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.nn import low_rank
from gatedfm.pruning import allocation, calibration, scorers
from gatedfm.pruning.calibration import FFN, HEADS
from gatedfm.pruning.scorers import Calibrated

BOUND = 1.10  # reading a text, over the MACs that are kept
SUITES = ('lm', 'scoring')


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed.

  Attributes:
    suite: `lm`, pruned models beside the dense one; `scoring`, one pass beside a loop.
    model: its shapes.
    budgets: of `allocation.parse_budget`, one model each.
    tokens: of the text.
    rounds: side by side.
    seed: of parameters, text and what is closed.
  """

  suite: str
  model: LmConfig
  budgets: tuple[str, ...] = ('heads:0.3', 'heads:0.5', 'heads:0.7', 'ffn:0.2')
  tokens: int = 512
  rounds: int = 9
  seed: int = 0

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for what cannot be timed."""
    choice('suite', self.suite, SUITES)
    self.model.validate()
    for budget in self.budgets:
      if set(allocation.parse_budget(budget)) & set(allocation.COSTS):
        raise ConfigError(f'budget {budget}: name what is closed, such as heads:0.5')
    most = self.model.max_tokens - lm_timing.WRITES
    if not 8 <= self.tokens <= most:
      raise ConfigError(f'tokens is {self.tokens}; it is between 8 and {most}')
    if self.rounds < 1 or self.seed < 0 or not self.budgets:
      raise ConfigError('rounds must be positive, seed not negative, and budgets one at least')


def run(case: Case, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
  """Times a case; one row for each budget, or for each way of scoring.

  Returns: of `lm` rows with `way` (compacted), `pruned` (the budget), `macs_kept` (of reading the
    text up to its last token's logits), `bytes_kept`, `kv_kept`, `ratio` and `token_ratio` (over
    dense, of reading and of writing a token after it, quartiles), `bound`, seconds; of `scoring`
    rows with `way`, `passes`, `seconds`, `compile_seconds`, `parameter_bytes`, `temp_bytes`.
  """
  case.validate()
  return _pruned(case, say) if case.suite == 'lm' else _scoring(case, say)


def _dense(case: Case) -> LmCheckpoint:
  rng, shapes = np.random.default_rng(case.seed), lm.abstract_params(case.model)
  draw = lambda shape: jnp.asarray(0.02 * rng.standard_normal(shape, np.float32))
  flat = {path: draw(x.shape) for path, x in shapes.items()}
  return LmCheckpoint(case.model, low_rank.tree(flat), None, {})


def _pruned(case: Case, say: Callable[[str], None]) -> list[dict[str, Any]]:
  dense = _dense(case)
  models = {'dense': dense}
  scores = scorers.random(Calibrated(case.model, dense.params, seed=case.seed))
  for budget in case.budgets:
    gates = allocation.allocate(scores, allocation.parse_budget(budget), case.model)
    models[budget] = lm_workdir.compacted(dense, gates, {})
  say(f'{len(models)} models compile first')
  times = lm_timing.side_by_side(models, case.tokens, case.rounds)
  costs = {name: lm_costs.count(m.cfg, m.params, case.tokens) for name, m in models.items()}
  # Of all tokens but the last no logits are computed.
  logits = case.model.d * case.model.vocab_size
  reading = {name: c['layer_macs'] + logits for name, c in costs.items()}
  rows = []
  for budget in case.budgets:
    kept = lambda name, of=budget: costs[of][name] / costs['dense'][name]
    k = reading[budget] / reading['dense']
    rows.append(
      {
        'way': 'compacted',
        'pruned': budget,
        'macs_kept': k,
        'bytes_kept': kept('bytes'),
        'kv_kept': kept('kv_bytes'),
        'ratio': times[budget]['prefill_ratio'],
        'token_ratio': times[budget]['token_ratio'],
        'bound': BOUND * k,
        'seconds': times[budget]['prefill'],
        'token_seconds': times[budget]['token'],
        'dense_seconds': times['dense']['prefill'],
        'dense_token_seconds': times['dense']['token'],
        'compile_seconds': times[budget]['compile_seconds'],
      }
    )
    say(_describe(rows[-1]))
  return rows


def _describe(row: dict[str, Any]) -> str:
  r, token = row['ratio'], row['token_ratio']
  goal = 'within' if r['median'] <= row['bound'] else 'MISSED'
  return (
    f'{row["pruned"]:10} MACs kept {row["macs_kept"]:.2f}, bytes {row["bytes_kept"]:.2f}, cache '
    f'{row["kv_kept"]:.2f} | reading {r["median"]:.2f} ({r["q25"]:.2f} to {r["q75"]:.2f}) of '
    f'{row["dense_seconds"]["median"]:.2f} s, goal {row["bound"]:.2f} {goal} | a token '
    f'{token["median"]:.2f} ({token["q25"]:.2f} to {token["q75"]:.2f}) of '
    f'{1e3 * row["dense_token_seconds"]["median"]:.0f} ms'
  )


def _scoring(case: Case, say: Callable[[str], None]) -> list[dict[str, Any]]:
  """All heads and FFNs: derivatives by gates in one pass, or the loss without each in turn."""
  cfg, params = case.model, _dense(case).params
  ids = np.random.default_rng(case.seed).integers(0, cfg.vocab_size, case.tokens).tolist()
  (b,) = lm_batches.batches([Pair(tuple(ids[:-4]), tuple(ids[-4:]))], 1, case.tokens)
  arrays, whole = (b.tokens, b.mask, b.at, b.weight), calibration.everything(cfg)
  step, loss = calibration.programs(cfg, ('gradients',))
  without = [_without(whole, site, i) for site in (HEADS, FFN) for i in range(whole[site].size)]
  ways = {
    'one pass': (step, [(params, whole.values, *arrays)]),
    'one at a time': (loss, [(params, *arrays, gates) for gates in (whole, *without)]),
  }
  rows = []
  for way, (function, calls) in ways.items():
    start = time.perf_counter()
    program = function.lower(*calls[0]).compile()
    compiled = time.perf_counter() - start
    jax.block_until_ready(program(*calls[0]))
    start = told = time.perf_counter()
    for i, call in enumerate(calls):
      jax.block_until_ready(program(*call))
      if time.perf_counter() - told > 20:
        told = time.perf_counter()
        say(f'{way}: {i + 1} of {len(calls)} passes')
    memory = program.memory_analysis()
    rows.append(
      {
        'way': way,
        'passes': len(calls),
        'tokens': case.tokens,
        'seconds': time.perf_counter() - start,
        'compile_seconds': compiled,
        'parameter_bytes': sum(x.nbytes for x in jax.tree.leaves(params)),
        'temp_bytes': memory.temp_size_in_bytes,
      }
    )
    row = rows[-1]
    say(
      f'{way:13}: {row["passes"]} passes in {row["seconds"]:.1f} s; {row["temp_bytes"] / 1e6:.0f} '
      f'MB beside {row["parameter_bytes"] / 1e6:.0f} of parameters; compiled in {compiled:.0f} s'
    )
  return rows


def _without(whole: Gates, site: str, number: int) -> Gates:
  gates = np.array(whole[site])
  gates.flat[number] = 0
  return Gates(whole.values | {site: gates})
