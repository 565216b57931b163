"""Tables and pictures say what the summary says."""

import numpy as np
import pytest

from gatedfm.analysis import importance_report


def accuracy(mean):
  return {
    'accuracy': {'mean': mean},
    'interval': [mean - 0.1, mean + 0.1],
    'difference': mean - 0.8,
    'difference_interval': [mean - 0.9, mean - 0.7],
  }


def point(scorer, budget, perplexity, mean=0.5, steps=1, repair=False):
  about = {'scorer': scorer, 'budget': budget, 'steps': steps, 'repair': repair}
  kept = {'parameters': 0.9, 'layer_macs': 0.8}
  return about | {'perplexity': perplexity, 'kept': kept, 'plain_0': accuracy(mean)}


@pytest.fixture
def summary():
  points = {
    'dense': {'perplexity': 10.0, 'plain_0': accuracy(0.8)},
    'h50': point('taylor', 'heads:0.5', 30.0, 0.6),
    'h10': point('taylor', 'heads:0.1', 12.0, 0.7),
    'f10': point('taylor', 'ffn:0.1', 14.0),
    'both': point('taylor', 'heads:0.5,ffn:0.1', 50.0),
    'random': point('random', 'heads:0.5', 90.0),
    'repaired': point('taylor', 'heads:0.5', 20.0, repair=True),
  }
  return {'config': {'shots': [0]}, 'points': points}


def test_the_table(summary):
  rows = importance_report.table(summary).splitlines()
  assert rows[0] == '| point | parameters | MACs of layers | perplexity | plain, 0 shots |'
  assert rows[2] == '| dense | 1.00 | 1.00 | 10.0 | 80.0 |'
  assert rows[3] == '| h50 | 0.90 | 0.80 | 30.0 | 60.0 (-20.0: -30.0 to -10.0) |'
  assert len(rows) == 2 + len(summary['points'])


def test_what_goes_at_a_loss():
  def lost(budget, difference, **options):
    low = difference - 0.02
    own = {'accuracy': {'mean': 0.5}, 'difference': difference, 'difference_interval': [low, 1]}
    return point('taylor', budget, 1.0, **options) | {'plain_0': own}

  dense = {'perplexity': 1.0, 'plain_0': accuracy(0.8)}
  points = {
    'dense': dense,
    'h30': lost('heads:0.3', -0.05),
    'h20': lost('heads:0.2', 0.0),
    'h10': lost('heads:0.1', 0.02),
    'h40': lost('heads:0.4', 0.0),  # as good by chance, behind one that is not
    'f10': lost('ffn:0.1', -0.02),
    'repaired': lost('ffn:0.1', 0.79 - 0.8, repair=True),
    's20': lost('heads:0.2', 0.0, steps=2),  # every 10%, both
    's30': lost('heads:0.3', 0.0, steps=3),
    'both': lost('heads:0.5,ffn:0.1', 0.0),
  }
  summary = {'config': {'shots': [0]}, 'points': points}
  found = importance_report.affordable(summary)
  assert found == {
    'heads': {
      'taylor': {'plain_0': {'mean': 0.2, 'surely': 0.1, 'least': 0.1}},
      'taylor, scored every 10%': {'plain_0': {'mean': 0.3, 'surely': 0.0, 'least': 0.2}},
    },
    'ffn': {
      'taylor': {'plain_0': {'mean': 0.0, 'surely': 0.0, 'least': 0.1}},
      'taylor, repaired': {'plain_0': {'mean': 0.1, 'surely': 0.0, 'least': 0.1}},
    },
  }
  assert importance_report.affordable_table(summary).splitlines() == [
    '| goes at 1 point lost, % | plain, 0 shots |',
    '| --- | --- |',
    '| heads, taylor | 20 (10) |',
    '| heads, taylor, scored every 10% | 30 (<20) |',
    '| ffn, taylor | <10 (<10) |',
    '| ffn, taylor, repaired | 10 (<10) |',
  ]
  wider = importance_report.affordable(summary, 0.05)
  assert wider['heads']['taylor']['plain_0'] == {'mean': 0.4, 'surely': 0.2, 'least': 0.1}


def test_the_pictures(summary):
  rng = np.random.default_rng(0)
  scores = {
    (task, 0): {
      'taylor:decoder/attention_heads': rng.random((3, 4)),
      'taylor:decoder/ffn': rng.random(3),
    }
    for task in ('a', 'b')
  }
  drawn = importance_report.pictures(summary, scores)
  assert set(drawn) == {
    'perplexity', 'accuracy_plain', 'joint_grid', 'agreement_heads', 'agreement_ffn',
    'importance_heads', 'importance_ffn',
  }  # fmt: skip
  heads = drawn['perplexity'].axes[0]
  lines = {line.get_label(): line.get_data() for line in heads.lines}
  np.testing.assert_allclose(lines['taylor'], [[0, 10, 50], [10, 12, 30]])
  np.testing.assert_allclose(lines['taylor, repaired'], [[0, 50], [10, 20]])
  assert lines['dense'][1][0] == 10
  cells = drawn['joint_grid'].axes[0].images[0].get_array()
  np.testing.assert_allclose(np.ma.filled(cells, np.nan), [[10, 14], [30, 50]])
  without = importance_report.pictures(summary, {})
  assert set(without) == {'perplexity', 'accuracy_plain', 'joint_grid'}


def test_rankings():
  """Two tasks that agree without shots, and that four shots turn around."""
  up, down = np.arange(12.0).reshape(3, 4), -np.arange(12.0).reshape(3, 4)
  of = lambda x: {'taylor:decoder/attention_heads': x, 'fisher:decoder/attention_heads': up}
  scores = {('a', 0): of(up), ('b', 0): of(up + 1), ('a', 4): of(down), ('b', 4): of(down)}
  found = importance_report.rankings(scores)
  assert set(found) == {'heads'}
  spearman = found['heads']['spearman']
  assert spearman['tasks'] == pytest.approx(1)
  assert spearman['pairs'] == 2
  assert spearman['shots'] == {'0 and 4': {'mean': pytest.approx(-1), 'variance': 0, 'tasks': 2}}
  assert found['heads']['top_overlap']['shots']['0 and 4']['mean'] == 0
  again = importance_report.rankings(scores, 'fisher')
  assert again['heads']['spearman']['shots']['0 and 4']['mean'] == pytest.approx(1)
