"""What a benchmark times is the same computation, and its figures are what they say."""

import dataclasses

import numpy as np
import pytest

from gatedfm.analysis import plots
from gatedfm.benchmarks import stacks
from gatedfm.models import speech_costs
from gatedfm.models.speech_config import ConfigError

MODEL = stacks.model('2x8', 'float32', 11)
CASE = stacks.Case('encoder', MODEL, 1, 6, 3, pruned=(0.0, 0.5), masks=2, rounds=3)


@pytest.fixture(scope='module', params=['encoder', 'decoder'])
def stack(request):
  return request.param


@pytest.fixture(scope='module')
def rows(fast_compilation, stack):
  return stacks.run(dataclasses.replace(CASE, stack=stack))


def test_every_way_gives_what_mask_gives(rows):
  ways = {'mask', 'skip', 'static'}
  assert [row['way'] for row in rows] == [
    way for _ in range(3) for way in ('mask', 'skip', 'static')
  ]
  assert {row['way'] for row in rows} == ways
  assert max(row['difference'] for row in rows) < 1e-5


def test_shares_patterns_and_bounds(rows, stack):
  for row in rows:
    bits = ''.join(part.split(':')[1] for part in row['pattern'].split())
    assert bits.count('0') == row['pruned'] * len(bits)
    assert (row['macs_kept'] == 1) == (row['pruned'] == 0)
    assert row['bound'] == stacks.BOUNDS[stack][row['way']](row['macs_kept'])
    assert 0 < row['ratio']['q25'] <= row['ratio']['median'] <= row['ratio']['q75']
    assert row['compile_seconds'] > 0
    assert row['temp_bytes'] > 0
  # Two patterns of one share are two draws, with the same modules for all ways.
  assert len({row['pattern'] for row in rows}) == 3


def test_macs_kept_are_those_of_what_is_open(stack):
  case = dataclasses.replace(CASE, stack=stack)
  rng = np.random.default_rng(0)
  everything, nothing = (stacks.random_pattern(case.sites, p, rng) for p in (0.0, 1.0))
  assert stacks.macs_kept(case, everything) == 1
  # The decoder's output layer has no gate.
  own = sum(site.layers * _macs(case)[site.name] for site in case.sites)
  output = 3 * 8 * 11 if stack == 'decoder' else 0
  assert stacks.macs_kept(case, nothing) == pytest.approx(output / (own + output))


def _macs(case):
  costs = speech_costs.site_costs(case.model, 27, case.tokens)
  return {name: cost.macs for name, cost in costs.items()}


def test_a_line_tells_what_exceeds_its_bound(rows):
  row = rows[0] | {'ratio': {'median': 2.0, 'q25': 1.0, 'q75': 3.0}}
  assert '0% closed, MACs kept 1.00 | mask   2.00 (1.00 to 3.00)' in stacks.describe(row)
  assert 'EXCEEDED' in stacks.describe(row)
  assert 'EXCEEDED' not in stacks.describe(row | {'bound': 2.0})


def test_the_picture_has_all_rows(rows):
  axes = plots.time_against_macs(rows).axes[0]
  lines = axes.containers
  assert [c.get_label() for c in lines] == ['mask', 'skip', 'static']
  assert [len(c.lines[0].get_xdata()) for c in lines] == [3, 3, 3]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pruned': (1.5,)}, r'pruned is \(1.5,\).*shares'),
    ({'rounds': 0}, 'rounds is 0; it must be positive'),
    ({'batch': 0}, 'batch is 0'),
    ({'stack': 'middle'}, "stack is 'middle'"),
  ],
)
def test_what_cannot_be_timed(change, message):
  with pytest.raises(ConfigError, match=message):
    stacks.run(dataclasses.replace(CASE, **change))


def test_shapes():
  assert stacks.model('small', 'bfloat16').d == 768
  assert stacks.model('3x128', 'float32').heads == 2
  for shape in ('huge', '0x4', '6x'):
    with pytest.raises(ConfigError, match=f"model '{shape}' is neither layers x width.*small"):
      stacks.model(shape, 'float32')
  with pytest.raises(ConfigError, match="pruned: .*'half'"):
    stacks.shares(['0.5', 'half'])
