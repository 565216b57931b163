"""What a benchmark times is the same computation, and its figures are what they say."""

import dataclasses

import numpy as np
import pytest

from gatedfm.analysis import plots
from gatedfm.benchmarks import stacks, utterance, ways
from gatedfm.models import speech_costs
from gatedfm.models.speech_config import ConfigError

MODEL = stacks.model('2x8', 'float32', 11)
CASE = stacks.Case('encoder', MODEL, 1, 6, 3, pruned=(0.0, 0.5), masks=2, rounds=3)


CASES = {
  'encoder': dataclasses.replace(CASE, batch=2),
  'decoder': dataclasses.replace(CASE, suite='decoder'),
  'train': dataclasses.replace(CASE, suite='train', masks=1),
  'utterance': dataclasses.replace(CASE, suite='utterance', masks=1),
  'apart': dataclasses.replace(CASE, batch=5, contexts=3),
}


@pytest.fixture(scope='module', params=CASES)
def case(request):
  return CASES[request.param]


@pytest.fixture(scope='module')
def every_row(fast_compilation, case):
  return stacks.run(case)


@pytest.fixture
def rows(every_row):
  """Those of ways to execute gates."""
  return [row for row in every_row if row['way'] != 'predictors']


def names(case):
  if case.suite == 'utterance':
    return utterance.WAYS
  return ways.APART if case.contexts > 1 else ways.BY_SUITE[case.suite]


def test_every_way_gives_what_mask_gives(rows, case):
  draws = 1 + case.masks  # of nothing closed there is one pattern
  assert [row['way'] for row in rows] == [*names(case)] * draws
  assert max(row['difference'] for row in rows) < 1e-5


def test_shares_patterns_and_bounds(rows, case):
  for row in rows:
    bits = ''.join(part.split(':')[1] for part in row['pattern'].replace(' | ', ' ').split())
    assert bits.count('0') == row['pruned'] * len(bits)
    assert (row['macs_kept'] == 1) == (row['pruned'] == 0)
    assert row['bound'] is None  # so narrow a model has no goals
    assert 0 < row['ratio']['q25'] <= row['ratio']['median'] <= row['ratio']['q75']
    assert row['compile_seconds'] > 0
    assert row['temp_bytes'] > 0
    assert 0 < row['roofline'] < 1
    assert row['pattern'].count('|') == case.contexts - 1
  # Patterns of one share are different draws, with the same modules for all ways.
  assert len({row['pattern'] for row in rows}) == 1 + case.masks


def test_an_utterance_tells_what_its_predictors_take(every_row, rows, case):
  more = every_row[len(rows) :]
  assert len(more) == (case.suite == 'utterance')
  for row in more:
    assert row['ratio']['median'] > 0
    # Two networks of 8 speech and 32 context features, 32 hidden, 16 and 6 times 2 outputs.
    sizes = (8 + 2 * 16) * 32 + 32 * 8 * 2, (8 + 2 * 16) * 32 + 32 * 6 * 2
    costs = speech_costs.site_costs(case.model, stacks._audio_frames(case), 1)
    encoder = sum(2 * cost.macs for name, cost in costs.items() if name.startswith('encoder'))
    assert row['macs_kept'] == sum(sizes) / encoder


def test_a_share_is_that_of_whole_modules():
  case = dataclasses.replace(CASE, pruned=(0.0, 0.01, 0.3, 1.0))
  patterns = [patterns[0] for patterns in stacks._draws(case)]
  # 8 modules: 0.01 of them are none, which are not drawn again, 0.3 are two.
  assert [round(8 * (1 - p.open_fraction)) for p in patterns] == [0, 2, 2, 8]


def test_macs_kept_are_those_of_what_is_open(case):
  rng, total = np.random.default_rng(0), sum(s.layers for s in case.sites)
  everything, nothing = (stacks.random_pattern(case.sites, n, rng) for n in (0, total))
  assert stacks.macs_kept(case, [everything]) == 1
  if case.suite == 'utterance':
    costs = [
      speech_costs.total_macs(case.model, 27, 3, p.to_gates()) for p in (nothing, everything)
    ]
    assert stacks.macs_kept(case, [nothing]) == costs[0] / costs[1] < 1
    return
  # The decoder's output layer has no gate.
  own = sum(site.layers * _macs(case)[site.name] for site in case.sites)
  output = 3 * 8 * 11 if case.suite == 'decoder' else 0
  assert stacks.macs_kept(case, [nothing]) == pytest.approx(output / (own + output))
  half = (1 + output / (own + output)) / 2
  assert stacks.macs_kept(case, [everything, nothing]) == pytest.approx(half)
  assert stacks.macs(case, everything) == (own + output) * (3 if case.suite == 'train' else 1)


def _macs(case):
  costs = speech_costs.site_costs(case.model, 27, case.tokens)
  return {name: cost.macs for name, cost in costs.items()}


def test_a_line_tells_what_exceeds_its_bound(rows):
  row = rows[0] | {'ratio': {'median': 2.0, 'q25': 1.0, 'q75': 3.0}}
  assert '0% closed, MACs kept 1.00 | mask      2.00 (1.00 to 3.00)' in stacks.describe(row)
  assert 'goal' not in stacks.describe(row)
  assert 'goal 1.08 MISSED' in stacks.describe(row | {'bound': 1.08})
  assert 'goal 2.00' in stacks.describe(row | {'bound': 2.0})
  assert 'MISSED' not in stacks.describe(row | {'bound': 2.0})


def test_goals_are_of_wide_models():
  wide = stacks.Case('encoder', dataclasses.replace(MODEL, d=256, heads=4), frames=3)
  quartiles = {'median': 1.0, 'q25': 1.0, 'q75': 1.0}
  prepared = ways.Prepared(lambda: None, 1.0, 1)
  patterns = next(iter(stacks._draws(wide)))
  seconds = {'dense': np.ones(1), 'skip': np.ones(1)}
  row = stacks._row(wide, patterns, 'skip', prepared, seconds, 1.0)
  assert row['bound'] == pytest.approx(1.18)
  assert row['ratio'] == quartiles


def test_the_picture_has_all_rows(rows, case):
  axes = plots.time_against_macs(rows).axes[0]
  lines = axes.containers
  assert [c.get_label() for c in lines] == [*names(case)]
  assert {len(c.lines[0].get_xdata()) for c in lines} == {1 + case.masks}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pruned': (1.5,)}, r'pruned is \(1.5,\).*shares'),
    ({'rounds': 0}, 'rounds is 0; it must be positive'),
    ({'batch': 0}, 'batch is 0'),
    ({'suite': 'middle'}, "suite is 'middle'"),
    ({'seed': -1}, 'seed is -1'),
    ({'stacks': ('middle',)}, r"stacks is \('middle',\)"),
    ({'suite': 'utterance', 'batch': 2, 'contexts': 2}, 'utterances are timed with one pattern'),
    ({'contexts': 2}, '2 contexts need a batch as large; it is 1'),
  ],
)
def test_what_cannot_be_timed(change, message):
  with pytest.raises(ConfigError, match=message):
    stacks.run(dataclasses.replace(CASE, **change))


def test_shapes():
  assert stacks.model('small', 'bfloat16').d == 768
  assert stacks.model('3x128', 'float32').heads == 2
  assert stacks.model('1x64', 'float32', subsampling_channels=16).subsampling_channels == 16
  for shape in ('huge', '0x4', '6x'):
    with pytest.raises(ConfigError, match=f"model '{shape}' is neither layers x width.*small"):
      stacks.model(shape, 'float32')
  for shape in ('2x100', '2x7'):
    with pytest.raises(ConfigError, match=f"model '{shape}': a width is even up to 64"):
      stacks.model(shape, 'float32')
  with pytest.raises(ConfigError, match="pruned: .*'half'"):
    stacks.shares(['0.5', 'half'])


def test_an_utterance_predicts_its_gates(fast_compilation):
  """The predictors' biases alone decide, and as the pattern says."""
  case = dataclasses.replace(CASE, suite='utterance', stacks=('decoder',))
  cfg = utterance.gated(case.model, case.stacks)
  assert {s.stack for s in case.sites} == {'decoder'}
  pattern = stacks.random_pattern(case.sites, 3, np.random.default_rng(0))
  biases = utterance._biases(cfg, [pattern])
  assert list(biases) == ['decoder_gates']
  bias = biases['decoder_gates']['mlp']['bias'].reshape(-1, 2)
  bits = [b for _, row in pattern.sites for b in row]
  assert [bool(keep > drop) for drop, keep in bias] == bits
  *_, timed = stacks._make(case)
  results = [timed[way]([pattern]).call() for way in ('dense', 'mask', 'skip')]
  np.testing.assert_array_equal(results[0]['memory'], results[1]['memory'])  # its encoder is dense
  np.testing.assert_array_equal(results[1]['tokens'], results[2]['tokens'])
  assert results[0]['tokens'].shape == (1, case.tokens)
  assert not (np.asarray(results[0]['tokens']) == cfg.vocab_size - 1).any()
