"""Mixed traffic: utterances of many lengths and gate patterns, grouped while they wait.

A batch is fastest where its utterances are of one length and one gate pattern: no padding, and
what one closes all close. Utterances that come one by one are queued by both and served in
batches; while one is served the others' queues grow, so that batches are large where there is
much to do and small where nobody waits. Whoever has waited for longer than a bound goes first.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Waiting:
  """What waits: anything, when it came (seconds), and the queue it belongs to.

  The queue's name is whatever makes utterances alike: length bucket, task, and the gate pattern
  as far as it is known beforehand. It is a hint: what is grouped together may turn out to
  differ in its gates, and `bucketed` execution answers it all the same.
  """

  item: Any
  arrival: float
  queue: Hashable


class Batcher:
  """Queues, and which batch to serve next.

  Args:
    sizes: batch sizes that programs exist for, with 1 among them; kept sorted.
    latency: seconds; whoever has waited longer goes first, however few are like them. Else the
      longest queue does.
    fill: a batch of fewer than a size's rows is padded to it if they are at least this share of
      them; else it is as large as a size that is filled. A decoder reads its matrices once per
      batch, so that a few rows more cost less than another batch; 1 never pads.

  Raises:
    ValueError: sizes without 1, a negative latency, or a share that is none.
  """

  def __init__(
    self, sizes: Sequence[int] = (1, 2, 4, 8, 16), latency: float = 0.5, fill: float = 0.75
  ):
    if 1 not in sizes or min(sizes) < 1:
      raise ValueError(f'sizes {tuple(sizes)} must be positive, and one of them 1')
    if latency < 0:
      raise ValueError(f'latency is {latency}; it is a time in seconds')
    if not 0 < fill <= 1:
      raise ValueError(f'fill is {fill}; it is a share of rows in (0, 1]')
    self.sizes, self._latency, self._fill = tuple(sorted(sizes)), latency, fill
    self._queues: dict[Hashable, collections.deque[Waiting]] = {}

  def add(self, waiting: Waiting) -> None:
    """Queues one more."""
    self._queues.setdefault(waiting.queue, collections.deque()).append(waiting)

  def __len__(self) -> int:
    return sum(map(len, self._queues.values()))

  def take(self, now: float) -> list[Waiting]:
    """The batch to serve at time `now`, oldest first; empty where nobody waits."""
    if not self._queues:
      return []
    oldest = min(self._queues, key=lambda name: self._queues[name][0].arrival)
    if now - self._queues[oldest][0].arrival < self._latency:
      # Of equally long ones, that of whoever came first.
      oldest = min(
        self._queues,
        key=lambda n: (-min(len(self._queues[n]), self.sizes[-1]), self._queues[n][0].arrival),
      )
    queue = self._queues[oldest]
    number = min(len(queue), self.sizes[-1])
    if number < self._fill * self._holding(number):
      number = max(s for s in self.sizes if s <= number)
    batch = [queue.popleft() for _ in range(number)]
    if not queue:
      del self._queues[oldest]
    return batch

  def _holding(self, number: int) -> int:
    return next(s for s in self.sizes if s >= number)

  def padded(self, items: Sequence[Any]) -> list[Any]:
    """The items of a batch, the last of them repeated up to one of the sizes."""
    return [*items, *[items[-1]] * (self._holding(len(items)) - len(items))]


def serve(
  arrivals: Iterable[Waiting],
  run: Callable[[list[Any]], Sequence[Any]],
  batcher: Batcher,
  clock: Callable[[], float] = time.perf_counter,
  sleep: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[Waiting, Any, float]]:
  """Serves a stream, one batch at a time, as it comes.

  Args:
    arrivals: in order of arrival, in seconds from the start; what has not arrived yet is not
      looked at.
    run: answers the items of a batch, one result each, and returns when they are there; what
      pads a batch is among its items.
    batcher: groups them.
    clock, sleep: of the seconds that arrivals are told in.

  Yields: whoever was served, the result, and the seconds from arrival to result.
  """
  start, coming = clock(), iter(arrivals)
  head = next(coming, None)
  while head is not None or len(batcher):
    now = clock() - start
    while head is not None and head.arrival <= now:
      batcher.add(head)
      head = next(coming, None)
    batch = batcher.take(now)
    if not batch:
      sleep(head.arrival - now)
      continue
    results = run(batcher.padded([waiting.item for waiting in batch]))
    done = clock() - start
    for waiting, result in zip(batch, results[: len(batch)], strict=True):
      yield waiting, result, done - waiting.arrival
