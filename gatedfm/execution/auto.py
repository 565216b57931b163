"""Which execution to take, and why: rules from what the benchmarks measured."""

from __future__ import annotations

import dataclasses

# Shares of the stacks' MACs that must be closed before branches pay for themselves: all open, they
# cost up to a tenth (`configs/gated_speech/benchmarks`).
WORTH_BRANCHES = 0.1
# Of examples that differ a decoder, writing token by token, saves only what all of them close.
WORTH_BUCKETS = 0.25
# Where these rules were measured; elsewhere nothing is claimed.
MEASURED = ('cpu',)


@dataclasses.dataclass(frozen=True)
class Choice:
  """An execution and the reason for it, for people."""

  execution: str
  reason: str

  def __str__(self) -> str:
    return f'execution {self.execution}: {self.reason}'


def choose(device: str, batch: int, patterns: int, saving: float, shared: bool = False) -> Choice:
  """The fastest execution of those that are never slower than computing everything.

  Args:
    device: JAX's platform, `cpu`, `gpu` or `tpu`.
    batch: examples at a time.
    patterns: distinct gate patterns to be expected; 1 where gates are fixed, 0 unknown.
    saving: share of the gated MACs that is expected to be closed.
    shared: the examples of a batch have one pattern (they were grouped by it).

  Raises:
    ValueError: a batch below 1, or a saving outside of [0, 1].
  """
  if batch < 1 or patterns < 0 or not 0 <= saving <= 1:
    raise ValueError(f'batch {batch}, {patterns} patterns, saving {saving}: no such traffic')
  if saving == 0:
    return Choice('mask', 'no module is expected to be closed')
  if patterns == 1:
    return Choice('compact', 'one gate pattern: arrays and program without what is closed')
  if device not in MEASURED:
    return Choice('mask', f'branches were not measured on {device}; name an execution to use one')
  expected = f'{saving:.0%} of the gated MACs expected to be closed'
  if batch == 1 or shared:
    if saving < WORTH_BRANCHES:
      return Choice('mask', f'{expected} do not pay for a branch at each module')
    return Choice('skip', f'{expected}, one pattern at a time: a branch at each module')
  if saving < WORTH_BUCKETS:
    return Choice('mask', f'{expected} do not pay for gathering examples')
  return Choice('bucketed', f'{expected}, gates differ within batches of {batch}')
