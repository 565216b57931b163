"""Pruned language models are timed as what they are, and scoring as often as there are gates."""

import dataclasses

import pytest
import tiny_lm

from gatedfm.benchmarks import language
from gatedfm.models import lm_costs
from gatedfm.models.speech_config import ConfigError

CASE = language.Case('lm', tiny_lm.KINDS['llama'], ('heads:0.5', 'ffn:0.34'), 16, 2)


def test_pruned_models(fast_compilation):
  lines = []
  rows = language.run(CASE, lines.append)
  assert [row['pruned'] for row in rows] == ['heads:0.5', 'ffn:0.34']
  costs, cfg = lm_costs.of_gates(CASE.model, 16), CASE.model
  dense = 3 * costs['decoder/layer'].macs + cfg.d * cfg.vocab_size
  assert rows[1]['macs_kept'] == pytest.approx(1 - costs['decoder/ffn'].macs / dense)
  assert rows[1]['kv_kept'] == 1
  for row in rows:
    assert 0 < row['macs_kept'] < 1
    assert 0 < row['bytes_kept'] < 1
    assert row['bound'] == pytest.approx(1.1 * row['macs_kept'])
    for name in ('ratio', 'token_ratio', 'seconds', 'token_seconds'):
      assert 0 < row[name]['q25'] <= row[name]['median'] <= row[name]['q75']
  assert len(lines) == 3


def test_scoring(fast_compilation):
  once, each = language.run(dataclasses.replace(CASE, suite='scoring'))
  assert (once['passes'], each['passes']) == (1, 3 * 6 + 3 + 1)
  for row in (once, each):
    assert row['seconds'] > 0
    assert row['temp_bytes'] > 0
  assert once['temp_bytes'] > each['temp_bytes']  # it keeps what going backward needs


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'suite': 'chat'}, 'suite is'),
    ({'budgets': ('macs:0.5',)}, 'name what is closed'),
    ({'budgets': ()}, 'budgets one at least'),
    ({'tokens': 4}, 'between 8 and 16'),
    ({'tokens': 33}, 'between 8 and 16'),
    ({'rounds': 0}, 'rounds must be positive'),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(ConfigError, match=message):
    language.run(dataclasses.replace(CASE, **changes))
