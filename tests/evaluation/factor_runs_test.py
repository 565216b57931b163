"""A factorized language model on disk: what it writes, measures and refuses."""

import json

import pytest

from gatedfm.evaluation import factor_runs, pruning_runs
from gatedfm.evaluation.factor_runs import Factoring
from gatedfm.evaluation.pruning_runs import Pruning
from gatedfm.execution import lm_workdir
from gatedfm.models.speech_config import ConfigError
from gatedfm.trainers.workdirs import WorkdirError

TABLE = 'decoder/embedding'


def how(own=(), match=(TABLE,), size=('rank', 3), **changes):
  options = {'calibration': own, 'examples': 4, 'tokens': 16, 'rounds': 2} | changes
  return Factoring(match, size, **options)


def test_a_run(checkpoint, own, tmp_path, fast_compilation):
  lines = []
  given = how(own, (TABLE, '*/w_1/kernel'), weights='activation')
  report = factor_runs.run(checkpoint, tmp_path / 'new', given, lines.append)
  assert report == json.loads((tmp_path / 'new' / 'report.json').read_text())
  assert [row['rank'] for row in report['factors']] == [3, 3, 3]
  dense, small = report['dense'], report['factorized']
  removed = sum(row['parameters_removed'] * row['shape'][0] * row['shape'][1]
                for row in report['factors'])  # fmt: skip
  assert dense['parameters'] - small['parameters'] == round(removed)
  assert small['prefill']['median'] > 0
  assert any(line.startswith('decoder/embedding: 23 x 12 by rank 3') for line in lines)
  read = lm_workdir.load(tmp_path / 'new')
  assert read.cfg.ranks[TABLE] == 3
  assert read.origin['parent'] == str(checkpoint)
  # Pruned on top, by the same commands.
  budget = Pruning('taylor', 'heads:0.5', own, examples=4, tokens=16, rounds=0)
  pruning_runs.run(tmp_path / 'new', tmp_path / 'pruned', budget)
  both = lm_workdir.load(tmp_path / 'pruned')
  assert both.cfg.ranks == read.cfg.ranks
  assert both.cut['decoder/attention_heads'].sum() == 4
  with pytest.raises(ConfigError, match='was pruned: take weights none'):
    factor_runs.run(
      tmp_path / 'pruned', tmp_path / 'x', how(own, ('*/w_2/kernel',), weights='fisher')
    )
  with pytest.raises(WorkdirError, match='is not empty'):
    factor_runs.run(checkpoint, tmp_path / 'new', how())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'match': ()}, 'match is empty'),
    ({'match': ('decoder/w',)}, 'no matrix matches'),
    ({'size': ('rank', 30)}, 'rank is 30'),
    ({'size': ('compression', 1.5)}, 'compression is 1.5'),
    ({'weights': 'fisher'}, 'give --calibration'),
    ({'own': ('sst2',)}, 'need no calibration'),
    ({'weights': 'hessian', 'own': ('sst2',)}, 'activation'),
    ({'tokens': 0}, 'at least 1'),
  ],
)
def test_what_cannot_be_is_refused(changes, message, checkpoint, tmp_path):
  with pytest.raises(ConfigError, match=message):
    factor_runs.run(checkpoint, tmp_path / 'new', how(**changes))
  assert not (tmp_path / 'new').exists()


def test_growth_is_said(checkpoint, tmp_path):
  lines = []
  given = how(size=('energy', 1.0), rounds=0)
  factor_runs.run(checkpoint, tmp_path / 'new', given, lines.append)
  assert any('no smaller than before' in line for line in lines)
