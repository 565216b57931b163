"""A stream is answered alike by every way, and its figures are of what was served."""

import dataclasses

import numpy as np
import pytest

from gatedfm.benchmarks import stacks, traffic
from gatedfm.models.speech_config import ConfigError

TRAFFIC = traffic.Traffic(
  stacks.model('1x8', 'float32', 11),
  utterances=12,
  contexts=3,
  pruned=(0.5,),
  seconds=(0.3, 1.0),
  buckets=(64, 128),
  sizes=(1, 2),
  rounds=1,
)


def test_a_stream(fast_compilation):
  lines = []
  rows = traffic.run(TRAFFIC, lines.append)
  assert [row['way'] for row in rows] == list(traffic.WAYS)
  for row in rows:
    assert row['differing'] in (None, 0.0)
    assert row['throughput'] > 0
    assert row['latency']['p95'] >= row['latency']['p50'] > 0
    assert 1 <= row['batch'] <= 2
    assert (row['macs_kept'] < 1) == (row['way'] != 'dense')
  assert rows[0]['speedup'] == rows[0]['ratio']['median'] == 1
  assert sum('utterances/s' in line for line in lines) == len(rows)


def test_what_comes_is_zipf_weighted_and_in_the_shortest_bucket():
  many = dataclasses.replace(TRAFFIC, utterances=3000, contexts=4)
  items = traffic.items(many)
  share = np.bincount([item.context for item in items]) / len(items)
  np.testing.assert_allclose(share, np.array([12, 6, 4, 3]) / 25, atol=0.03)
  for item in items:
    assert 30 <= item.frames <= 100
    assert len(item.mel) == (64 if item.frames <= 64 else 128)


def test_patterns_close_their_share_of_all_modules():
  for pattern in traffic.patterns(TRAFFIC, 0.5):
    assert pattern.open_fraction == pytest.approx(0.5, abs=0.08)
  assert all(p.open_fraction == 1 for p in traffic.patterns(TRAFFIC, 0.0))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'utterances': 0}, 'utterances is 0'),
    ({'pruned': (2.0,)}, r'pruned is \(2\.0,\)'),
    ({'seconds': (0.5, 9.0)}, r'seconds is \(0\.5, 9\.0\); buckets end at 1\.28 s'),
  ],
)
def test_what_cannot_be_served(change, message):
  with pytest.raises(ConfigError, match=message):
    traffic.run(dataclasses.replace(TRAFFIC, **change))
