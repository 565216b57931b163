"""A stream of mixed utterances through one server: throughput, and how long anybody waits.

Utterances differ in length and in gate pattern, a pattern per context (a language and a task,
say), contexts as frequent as Zipf has it. A context comes with its utterance, and its pattern is
known: what predicts from speech would have to listen before it queues. Letters: B batch, T frames
of 10 ms, N layers.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gatedfm import clock, compiling
from gatedfm.benchmarks import stacks, utterance
from gatedfm.execution import stream
from gatedfm.gates import Gates, Pattern
from gatedfm.models import speech_costs
from gatedfm.models.speech import for_inference
from gatedfm.models.speech_config import ConfigError, SpeechConfig

# Whether a way's batches have one gate pattern: `skip` needs that, the others ask for none.
WAYS = {'dense': False, 'bucketed': False, 'skip': True}
FRAMES_PER_TOKEN = 25  # four tokens a second
LOAD = 0.7


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What comes.

  Attributes:
    model: shapes and dtype; its parameters are random.
    utterances: how many.
    contexts: gate patterns; the one of rank r comes in proportion to 1 / r.
    pruned: shares of all modules that each pattern closes, at random; a stream for each.
    seconds: of an utterance, shortest and longest, evenly spread.
    buckets: padded lengths in frames of 10 ms.
    sizes: of batches, see `stream.Batcher`.
    latency: seconds after which whoever waits goes first.
    rounds: passes of the whole stream by each way, side by side.
    seed: of parameters, features, patterns and traffic.
  """

  model: SpeechConfig
  utterances: int = 500
  contexts: int = 8
  pruned: tuple[float, ...] = (0.5,)
  seconds: tuple[float, float] = (1.0, 5.0)
  buckets: tuple[int, ...] = (128, 256, 512)
  sizes: tuple[int, ...] = (1, 4, 8, 16)
  latency: float = 2.0
  rounds: int = 3
  seed: int = 0

  def validate(self) -> None:
    """Raises ConfigError for what cannot be timed."""
    for name in ('utterances', 'contexts', 'rounds'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be positive')
    if self.seed < 0:
      raise ConfigError(f'seed is {self.seed}; it must not be negative')
    stream.Batcher(self.sizes, self.latency)
    if not self.pruned or any(not 0 <= p <= 1 for p in self.pruned):
      raise ConfigError(f'pruned is {self.pruned}; it is a list of shares in [0, 1]')
    if not 0.1 <= self.seconds[0] <= self.seconds[1] <= max(self.buckets) / 100:
      raise ConfigError(f'seconds is {self.seconds}; buckets end at {max(self.buckets) / 100} s')
    self.model.validate()


@dataclasses.dataclass(frozen=True)
class Item:
  """An utterance: normalised features `[T, M]` in its bucket, valid frames, its context."""

  mel: np.ndarray
  frames: int
  context: int


def items(traffic: Traffic) -> list[Item]:
  """The utterances in order of arrival."""
  rng = np.random.default_rng(traffic.seed)
  weight = 1 / np.arange(1, traffic.contexts + 1)
  contexts = rng.choice(traffic.contexts, traffic.utterances, p=weight / weight.sum())
  seconds = rng.uniform(*traffic.seconds, traffic.utterances)
  out = []
  for context, frames in zip(contexts, (100 * seconds).astype(int)):
    size = min(b for b in traffic.buckets if b >= frames)
    mel = rng.normal(size=(size, traffic.model.mels)).astype(np.float32)
    out.append(Item(mel, int(frames), int(context)))
  return out


def patterns(traffic: Traffic, pruned: float) -> list[Pattern]:
  """One per context."""
  rng, sites = np.random.default_rng(traffic.seed + 1), traffic.model.all_sites()
  closed = round(pruned * sum(s.layers for s in sites))
  return [stacks.random_pattern(sites, closed, rng) for _ in range(traffic.contexts)]


class _Server:
  """Answers batches of one length by one way."""

  def __init__(self, way: str, traffic: Traffic, params: Any):
    self.way, self._traffic = way, traffic
    execution = 'mask' if way == 'dense' else way
    model, self._params = for_inference(traffic.model, params, execution)
    forward = lambda params, mel, frames, gates: utterance.write(
      mel.shape[1] // FRAMES_PER_TOKEN, model, params, mel, frames, gates
    )
    self._programs = compiling.Programs(jax.jit(forward))
    self.know([Pattern(tuple((s.name, (True,) * s.layers) for s in traffic.model.all_sites()))])

  def know(self, known: Sequence[Pattern]) -> None:
    """Sets the patterns of the contexts."""
    names = [name for name, _ in known[0].sites]
    self._bits = {n: np.array([dict(p.sites)[n] for p in known], np.float32).T for n in names}

  def _arguments(self, batch: Sequence[Item]) -> tuple:
    mel = np.stack([item.mel for item in batch])
    frames = np.array([item.frames for item in batch], np.int32)
    contexts = [item.context for item in batch]
    shared = contexts[0] if WAYS[self.way] else contexts
    gates = Gates({n: bits[:, shared] for n, bits in self._bits.items()})
    return self._params, mel, frames, None if self.way == 'dense' else gates

  def prepare(self) -> list[Any]:
    """Starts compiling for all lengths and sizes."""
    traffic, out = self._traffic, []
    for size in traffic.buckets:
      item = Item(np.zeros((size, traffic.model.mels), np.float32), size, 0)
      for number in traffic.sizes:
        out.append(self._programs.prepare((number, size), *self._arguments([item] * number)))
    return out

  def __call__(self, batch: Sequence[Item]) -> list[np.ndarray]:
    """Tokens of each utterance."""
    key = len(batch), len(batch[0].mel)
    return list(np.asarray(self._programs(key, *self._arguments(batch))['tokens']))

  def waiting(self, item: Item, arrival: float) -> stream.Waiting:
    """In the queue of its length and, where batches must agree, of its pattern."""
    return stream.Waiting(item, arrival, (len(item.mel), item.context if WAYS[self.way] else None))


def run(traffic: Traffic, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
  """Serves the stream by every way.

  First all at once, for the throughput; then as a Poisson process at 70% of what the dense model
  can do, for the waiting: the same arrivals for all.

  Returns: one row per way and share: `way`, `pruned`, `macs_kept`, `ratio` (seconds for the
    stream over dense, quartiles over rounds), `throughput` (utterances per second, median),
    `speedup` (over dense, median), `latency` (`p50` and `p95` in seconds under load), `batch` (mean
    number of utterances, under load), `compile_seconds`, `differing` (share of utterances whose
    tokens are not `skip`'s).

  Raises:
    ConfigError: traffic that cannot be timed.
  """
  traffic.validate()
  coming = items(traffic)
  params = stacks.random_params(traffic.model, jax.random.key(traffic.seed))
  servers, compiled = {}, {}
  for way in WAYS:
    server, start = _Server(way, traffic, params), time.perf_counter()
    compiling.wait(server.prepare(), say, f'programs of {way}')
    servers[way], compiled[way] = server, time.perf_counter() - start
  rows = []
  for pruned in traffic.pruned:
    known = patterns(traffic, pruned)
    for server in servers.values():
      server.know(known)
    for row in _stream(traffic, servers, coming, _macs_kept(traffic, coming, known), say):
      rows.append(row | {'pruned': pruned, 'compile_seconds': compiled[row['way']]})
      say(describe(rows[-1]))
  return rows


def _stream(traffic, servers, coming, kept, say) -> Iterator[dict[str, Any]]:
  """A row per way, of the patterns that the servers know."""
  texts, rows = {}, []

  def at_once(way: str, server: _Server, some: Sequence[Item]) -> None:
    texts[way] = _serve(traffic, server, some, np.zeros(len(some)))[0]

  for way, server in servers.items():
    at_once(way, server, coming[: max(traffic.sizes)])  # wakes all up; does not count
  calls = {way: functools.partial(at_once, way, server, coming) for way, server in servers.items()}
  for r in range(traffic.rounds):
    rows.append(clock.lap(calls, r % 2 == 0))
    each = ', '.join(f'{way} {seconds:.1f} s' for way, seconds in rows[-1].items())
    say(f'stream: {len(coming)} utterances, round {r + 1} of {traffic.rounds}: {each}')
  seconds = {way: np.array([row[way] for row in rows]) for way in servers}
  rate = LOAD * len(coming) / np.median(seconds['dense'])
  gaps = np.random.default_rng(traffic.seed + 2).exponential(1 / rate, len(coming))
  for way, server in servers.items():
    _, waits, batches = _serve(traffic, server, coming, np.cumsum(gaps))
    differing = np.mean([(a != b).any() for a, b in zip(texts[way], texts['skip'])])
    yield {
      'way': way,
      'macs_kept': 1.0 if way == 'dense' else kept,
      'ratio': clock.quartiles(seconds[way] / seconds['dense']),
      'throughput': float(len(coming) / np.median(seconds[way])),
      'speedup': float(np.median(seconds['dense'] / seconds[way])),
      'latency': {f'p{q}': float(np.percentile(waits, q)) for q in (50, 95)},
      'batch': len(coming) / batches,
      'differing': None if way == 'dense' else float(differing),
    }


def _serve(
  traffic: Traffic, server: _Server, coming: Sequence[Item], arrivals: np.ndarray
) -> tuple[list[np.ndarray], list[float], int]:
  """Tokens in order of arrival, seconds that each waited, number of batches."""
  texts, waits, batches = {}, [], 0

  def answer(batch: list[tuple[int, Item]]) -> list[np.ndarray]:
    nonlocal batches
    batches += 1
    return server([item for _, item in batch])

  queue = []
  for number, (item, arrival) in enumerate(zip(coming, arrivals)):
    waiting = server.waiting(item, float(arrival))
    queue.append(dataclasses.replace(waiting, item=(number, item)))
  batcher = stream.Batcher(traffic.sizes, traffic.latency)
  for waiting, tokens, wait in stream.serve(queue, answer, batcher):
    texts[waiting.item[0]] = tokens
    waits.append(wait)
  return [texts[n] for n in range(len(coming))], waits, batches


def _macs_kept(traffic: Traffic, coming: Sequence[Item], known: Sequence[Pattern]) -> float:
  """Share of the stream's MACs, padding included, that the patterns keep."""
  count = functools.cache(
    lambda size, context: speech_costs.total_macs(
      traffic.model,
      size,
      size // FRAMES_PER_TOKEN,
      None if context is None else known[context].to_gates(),
    )
  )
  total = lambda own: sum(count(len(i.mel), i.context if own else None) for i in coming)
  return total(True) / total(False)


def describe(row: dict[str, Any]) -> str:
  """A row as a line for people."""
  return (
    f'{row["pruned"]:4.0%} closed | {row["way"]:8} {row["throughput"]:6.1f} utterances/s,'
    f' {row["speedup"]:.2f} x dense'
    f' | MACs kept {row["macs_kept"]:.2f} | at {LOAD:.0%} load p50 {row["latency"]["p50"]:.2f} s,'
    f' p95 {row["latency"]["p95"]:.2f} s, batches of {row["batch"]:.1f}'
    f' | compiled in {row["compile_seconds"]:.0f} s'
    + (f' | {row["differing"]:.1%} of the texts differ' if row['differing'] else '')
  )
