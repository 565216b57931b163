"""Grouping of mixed traffic: nobody is lost, batches are alike, waiting is bounded."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedfm.execution.stream import Batcher, Waiting, serve

SIZES = (1, 2, 4)


def waiting(*queues, gap=0.0):
  return [Waiting(f'{q}{i}', i * gap, q) for i, q in enumerate(queues)]


def fill(batcher, rows):
  for row in rows:
    batcher.add(row)
  return batcher


def items(batch):
  return [w.item for w in batch]


def test_the_longest_queue_goes_first_as_far_as_sizes_reach():
  batcher = fill(Batcher(SIZES, latency=9), waiting(*'abbabb', gap=0.1))
  assert items(batcher.take(1)) == ['b1', 'b2', 'b4', 'b5']
  assert items(batcher.take(1)) == ['a0', 'a3']
  assert batcher.take(1) == []


@pytest.mark.parametrize(
  ('number', 'share', 'sizes'),
  [
    (3, 1.0, [2, 1]),
    (3, 0.75, [3]),
    (3, 0.8, [2, 1]),
    (5, 0.5, [5]),
    (5, 0.7, [4, 1]),
    (8, 0.5, [8]),
    (11, 0.5, [8, 3]),
    (9, 0.5, [8, 1]),
  ],
)
def test_batches_are_padded_where_that_leaves_enough_rows_filled(number, share, sizes):
  batcher = fill(Batcher((1, 2, 4, 8), 9, share), waiting(*'a' * number))
  batches = []
  while batch := items(batcher.take(0)):
    batches.append(len(batch))
    padded = batcher.padded(batch)
    assert len(padded) in (1, 2, 4, 8)
    assert padded == batch + batch[-1:] * (len(padded) - len(batch))
  assert batches == sizes


def test_beyond_the_largest_batch_the_first_comer_decides():
  batcher = fill(Batcher(SIZES, latency=9), waiting(*'aaaabbbbb', gap=0.1))
  assert items(batcher.take(1))[0] == 'a0'


def test_who_has_waited_too_long_goes_first():
  rows = waiting(*'abbbb', gap=0.1)
  assert items(fill(Batcher(SIZES, latency=0.5), rows).take(0.45))[0] == 'b1'
  assert items(fill(Batcher(SIZES, latency=0.5), rows).take(0.5)) == ['a0']


class Simulation:
  """A server whose batch of n takes `base + n * each` seconds, on a clock of its own."""

  def __init__(self, base=0.1, each=0.05):
    self.now, self.base, self.each, self.batches = 0.0, base, each, []

  def run(self, batch):
    self.now += self.base + self.each * len(batch)
    self.batches.append(batch)
    return [item.upper() for item in batch]

  def sleep(self, seconds):
    assert seconds > 0
    self.now += seconds

  def serve(self, arrivals, **options):
    batcher = Batcher(SIZES, **options)
    return list(serve(arrivals, self.run, batcher, lambda: self.now, self.sleep))


@settings(max_examples=50, deadline=None)
@given(
  st.lists(st.tuples(st.sampled_from('abc'), st.floats(0, 0.5)), max_size=30),
  st.sampled_from([0.0, 0.3, 5.0]),
)
def test_everybody_is_served_once_in_the_order_of_its_queue(traffic, latency):
  now, arrivals = 0.0, []
  for i, (queue, gap) in enumerate(traffic):
    now += gap
    arrivals.append(Waiting(f'{queue}{i}', now, queue))
  simulation = Simulation()
  served = simulation.serve(arrivals, latency=latency)
  assert sorted(w.item for w, _, _ in served) == sorted(w.item for w in arrivals)
  assert all(result == w.item.upper() for w, result, _ in served)
  # At least the batch of one that it took.
  assert all(seconds >= 0.15 - 1e-9 for _, _, seconds in served)
  for batch in simulation.batches:
    assert len({item[0] for item in batch}) == 1
    assert len(batch) in SIZES
  order = collections.defaultdict(list)
  for w, _, _ in served:
    order[w.queue].append(w.arrival)
  assert all(times == sorted(times) for times in order.values())


def test_the_bound_holds_up_to_the_batches_before():
  """One lonely utterance among a flood of others."""
  flood = [Waiting(f'b{i}', 0.001 * i, 'b') for i in range(200)]
  arrivals = sorted([*flood, Waiting('a', 0.1, 'a')], key=lambda w: w.arrival)
  wait = lambda latency: next(
    s for w, _, s in Simulation().serve(arrivals, latency=latency) if w.item == 'a'
  )
  longest = 0.1 + 0.05 * 4
  assert wait(1000.0) == pytest.approx(200 / 4 * longest, abs=3 * longest)  # the last of all
  # Of the others 101 came before it, in batches of four; whoever came later waits for it.
  assert wait(0.5) == pytest.approx(101 / 4 * longest, abs=3 * longest)


def test_an_idle_server_waits_for_nobody():
  simulation = Simulation()
  served = simulation.serve(waiting(*'aaa', gap=10.0), latency=5.0)
  assert [round(s, 6) for _, _, s in served] == [0.15] * 3
  assert [len(b) for b in simulation.batches] == [1, 1, 1]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'sizes': (2, 4)}, 'one of them 1'),
    ({'sizes': (0, 1)}, 'positive'),
    ({'latency': -1}, 'latency is -1'),
    ({'fill': 0}, 'fill is 0'),
  ],
)
def test_impossible_batches(options, message):
  with pytest.raises(ValueError, match=message):
    Batcher(**options)


def test_a_missing_result_is_an_error():
  with pytest.raises(ValueError, match='zip'):
    list(serve(waiting('a'), lambda batch: [], Batcher()))
