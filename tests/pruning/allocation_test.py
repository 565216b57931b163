"""Budgets are kept, the lowest go, and shapes are what they say."""

import dataclasses

import numpy as np
import pytest
import tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Cost, Gates
from gatedfm.models import lm_costs
from gatedfm.models.speech_config import ConfigError
from gatedfm.pruning import scorers
from gatedfm.pruning.allocation import NAMES, Allocation, allocate, combine, parse_budget
from gatedfm.pruning.calibration import ATTENTION, CHANNELS, FFN, HEADS, LAYER
from gatedfm.pruning.scorers import Calibrated

CFG = tiny_lm.KINDS['llama']  # 3 layers, 6 heads on 2 of keys and values, 10 channels


def draw(seed, *shape):
  return np.random.default_rng(seed).random(shape)


def test_budgets_are_read():
  assert parse_budget('heads:0.7,ffn:0.2') == {HEADS: 0.7, FFN: 0.2}
  assert parse_budget('channels:1') == {CHANNELS: 1.0}


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', "budget ''"),
    ('head:0.5', 'names are heads, ffn, attention, channels, layers, ranks, params'),
    ('heads', 'is not a number'),
    ('heads:70', 'between 0 and 1'),
    ('heads:0.1,heads:0.2', 'names heads twice'),
    ('heads:0.1,macs:0.2', 'stands alone'),
  ],
)
def test_other_budgets_are_not(text, message):
  with pytest.raises(ConfigError, match=message):
    parse_budget(text)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.floats(0, 1), st.integers(0, 3))
def test_the_lowest_go_and_the_floor_holds(seed, share, floor):
  score = draw(seed, 3, 6)
  number = int(share * 18 + 1e-9)
  if 18 - number < 3 * floor:
    return
  gates = allocate({HEADS: score}, {HEADS: share}, CFG, Allocation(floor=floor))[HEADS]
  assert gates.shape == (3, 6)
  assert (gates == 0).sum() == number
  assert (gates.sum(1) >= floor).all()
  if floor == 0 and 0 < number < 18:
    assert score[gates == 0].max() < score[gates == 1].min()
  for row, kept in zip(score, gates):  # in each layer the highest stay
    assert set(np.flatnonzero(kept)) == set(np.argsort(-row)[: int(kept.sum())])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0, 1))
def test_shapes(seed, share):
  score = draw(seed, 3, 10)
  if share * 30 >= 1 and round(share * 10) == 0:
    with pytest.raises(ConfigError, match='close nothing'):
      allocate({CHANNELS: score}, {CHANNELS: share}, CFG, Allocation('uniform'))
    return
  uniform = allocate({CHANNELS: score}, {CHANNELS: share}, CFG, Allocation('uniform'))[CHANNELS]
  assert (uniform.sum(1) == 10 - round(share * 10)).all()
  bucketed = allocate({CHANNELS: score}, {CHANNELS: share}, CFG, Allocation('bucketed', 4))
  assert set(bucketed[CHANNELS].sum(1)) <= {0, 4, 8, 10}
  if int(share * 30) == 0:
    assert bucketed[CHANNELS].all()
  for gates in (uniform, bucketed[CHANNELS]):
    for row, kept in zip(score, gates):
      assert set(np.flatnonzero(kept)) == set(np.argsort(-row)[: int(kept.sum())])


def test_shares_are_numbers_of_units():
  gates = allocate(
    {CHANNELS: draw(0, 10, 10)}, {CHANNELS: 0.29}, dataclasses.replace(CFG, layers=10)
  )
  assert (gates[CHANNELS] == 0).sum() == 29  # 0.29 * 100 is a little less


def test_groups_close_together():
  score = draw(0, 3, 6)
  gates = allocate({HEADS: score}, {HEADS: 0.5}, CFG, Allocation(groups=True))[HEADS]
  by_group = gates.reshape(3, 2, 3)
  assert (by_group.min(-1) == by_group.max(-1)).all()
  assert (gates == 0).sum() == 9
  sums = score.reshape(3, 2, 3).sum(-1)
  closed = by_group[..., 0] == 0
  assert sums[closed].max() < sums[~closed].min()


def test_modules():
  score = np.array([0.3, 0.1, 0.2])
  for shape in ('ragged', 'uniform'):
    gates = allocate({FFN: score}, {FFN: 0.34}, CFG, Allocation(shape))[FFN]
    np.testing.assert_array_equal(gates, [1, 0, 1])
  np.testing.assert_array_equal(allocate({FFN: score}, {FFN: 0.0}, CFG)[FFN], [1, 1, 1])
  np.testing.assert_array_equal(allocate({FFN: score}, {FFN: 1.0}, CFG)[FFN], [0, 0, 0])


def test_what_is_closed_stays_closed():
  score = draw(1, 3, 6)
  first = allocate({HEADS: score}, {HEADS: 0.3}, CFG)
  # Scored anew, what is closed would look best.
  again = np.where(first[HEADS] == 0, 9.0, draw(2, 3, 6))
  second = allocate({HEADS: again}, {HEADS: 0.6}, CFG, closed=first)
  assert (second[HEADS][first[HEADS] == 0] == 0).all()
  assert (second[HEADS] == 0).sum() == int(0.6 * 18)


@pytest.mark.parametrize('kind', ['params', 'macs'])
def test_floors_of_costs(kind):
  """Modules' floor is of the whole model; what is closed stays closed behind a floor."""
  total = getattr(lm_costs.total(CFG, 512), kind)
  of = lambda site, number: {
    kind: number * getattr(lm_costs.of_gates(CFG, 512)[site], kind) / total
  }
  two = Allocation(floor=2, over=('ffn',))
  gates = allocate({FFN: np.array([0.3, 0.1, 0.2])}, of(FFN, 1), CFG, two)
  np.testing.assert_array_equal(gates[FFN], [1, 0, 1])
  with pytest.raises(ConfigError, match='cannot be closed'):
    allocate({FFN: np.array([0.3, 0.1, 0.2])}, of(FFN, 2), CFG, two)
  how = Allocation(floor=3, over=('heads',))
  first = allocate({HEADS: draw(1, 3, 6)}, of(HEADS, 4), CFG, how)
  assert (first[HEADS] == 0).sum() == 4
  again = np.where(first[HEADS] == 0, 9.0, draw(2, 3, 6))
  second = allocate({HEADS: again}, of(HEADS, 8), CFG, how, first)
  assert (second[HEADS] == 0).sum() == 8
  assert (second[HEADS][first[HEADS] == 0] == 0).all()
  assert (second[HEADS].sum(1) >= 3).all()


def test_impossible_allocations():
  score = {HEADS: draw(0, 3, 6)}
  with pytest.raises(ConfigError, match='no scores of decoder/ffn; it has those of heads'):
    allocate(score, {FFN: 0.1}, CFG)
  with pytest.raises(ConfigError, match='fewer than 3 units'):
    allocate(score, {HEADS: 0.9}, CFG, Allocation(floor=3))
  with pytest.raises(ConfigError, match='shape'):
    Allocation('square')
  with pytest.raises(ConfigError, match='not finite'):
    allocate({HEADS: np.full((3, 6), np.nan)}, {HEADS: 0.5}, CFG)


def test_combine():
  a = Gates({HEADS: np.array([[1.0, 0]]), FFN: np.ones(1)})
  both = combine([a, Gates({HEADS: np.array([[0.0, 1]])})])
  np.testing.assert_array_equal(both[HEADS], [[0, 0]])
  np.testing.assert_array_equal(both[FFN], [1])


@pytest.mark.parametrize('kind', tiny_lm.KINDS)
@pytest.mark.parametrize('cost', ['params', 'macs'])
@pytest.mark.parametrize(
  'over', [('heads', 'ffn'), ('heads', 'channels'), ('attention', 'channels'), ('layers',)]
)
def test_budgets_of_the_whole_model(kind, cost, over):
  """Counted in what compaction leaves: as much as was asked for, and hardly more."""
  cfg, tokens = tiny_lm.KINDS[kind], 20
  dense = LmCheckpoint(cfg, tiny_lm.params(kind), None, {})
  how = Allocation(groups=True, over=over, tokens=tokens)
  scores = scorers.random(Calibrated(cfg, dense.params, seed=3))
  gates = allocate(scores, {cost: 0.2}, cfg, how)
  name = {'params': 'parameters', 'macs': 'macs'}[cost]
  count = lambda model: lm_costs.count(cfg, model.params, tokens)[name]
  gone = (count(dense) - count(lm_workdir.compacted(dense, gates, {}))) / count(dense)
  costs = lm_costs.of_gates(cfg, tokens)
  largest = max(getattr(costs[NAMES[n]], cost) for n in over) / count(dense)
  groups = getattr(costs[HEADS], cost) * cfg.heads / count(dense)
  assert 0.2 - 1e-9 <= gone <= 0.2 + max(largest, groups)


@pytest.mark.parametrize('kind', tiny_lm.KINDS)
def test_costs_of_gates_add_up(kind):
  cfg = tiny_lm.KINDS[kind]
  costs, params = lm_costs.of_gates(cfg, 20), tiny_lm.params(kind)
  gates = Gates({ATTENTION: np.array([1, 0, 1]), FFN: np.array([0, 0, 1])})
  small = lm_workdir.compacted(LmCheckpoint(cfg, params, None, {}), gates, {})
  gone = lm_costs.count(cfg, params, 20), lm_costs.count(cfg, small.params, 20)
  of = lambda field: getattr(costs[ATTENTION], field) + 2 * getattr(costs[FFN], field)
  assert gone[0]['parameters'] - gone[1]['parameters'] == of('params')
  assert gone[0]['macs'] - gone[1]['macs'] == of('macs')
  assert costs[LAYER] == Cost(
    *(a + b for a, b in zip(*map(dataclasses.astuple, (costs[ATTENTION], costs[FFN]))))
  )


def test_more_than_there_is():
  scores = scorers.random(Calibrated(CFG, None))
  with pytest.raises(ConfigError, match=r'ffn are \d+% of the params: 90% cannot be closed'):
    allocate(scores, {'params': 0.9}, CFG, Allocation(over=('ffn',)))
  with pytest.raises(ConfigError, match='shape is uniform'):
    allocate(scores, {'params': 0.1}, CFG, Allocation('uniform'))
  with pytest.raises(ConfigError, match='has to be measured'):
    allocate(scores, {'latency': 0.1}, CFG)
  with pytest.raises(ConfigError, match='a part and its whole'):
    Allocation(over=('heads', 'attention'))


def test_layers_close_both_modules_and_what_is_closed_stays():
  scores = {LAYER: np.array([0.3, 0.1, 0.2])}
  gates = allocate(scores, {LAYER: 0.4}, CFG)
  for site in (ATTENTION, FFN):
    np.testing.assert_array_equal(gates[site], [1, 0, 1])
  again = allocate({LAYER: np.array([0.1, 0.3, 0.2])}, {LAYER: 0.7}, CFG, closed=gates)
  np.testing.assert_array_equal(again[FFN], [0, 0, 1])
  costs = allocate({LAYER: np.array([0.1, 0.3, 0.2])}, {'macs': 0.3}, CFG,
                   Allocation(over=('layers',)), gates)  # fmt: skip
  assert costs[FFN][1] == 0


def test_the_floor_of_a_budget_in_parameters():
  scores = scorers.random(Calibrated(CFG, None))
  gates = allocate(scores, {'params': 0.12}, CFG, Allocation(over=('heads',), floor=2))
  assert (gates[HEADS].sum(1) >= 2).all()
  assert (gates[HEADS] == 0).any()
