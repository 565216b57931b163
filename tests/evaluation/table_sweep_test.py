"""A sweep over tables trains each point once, compares seed by seed, and shows what is lost."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import tiny_texts

from gatedfm.analysis import table_report
from gatedfm.evaluation import table_sweep
from gatedfm.evaluation.table_config import TablePoint, TableSweepConfig
from gatedfm.models.speech_config import ConfigError
from gatedfm.models.tables import TableConfig
from gatedfm.trainers import schedules


def sweep(folder):
  dense = tiny_texts.config(folder)
  small = copy.deepcopy(dense)
  small.init_from, small.classifier.table = 'dense', TableConfig('factorized', 0.5)
  codes = copy.deepcopy(dense)
  codes.init_from, codes.epochs, codes.classifier.table = 'dense', 0, TableConfig('quantized')
  points = {
    'dense': TablePoint('dense', dense),
    'small': TablePoint('SVD', small, 0.5, 'dense'),
    'int8': TablePoint('int8', codes, baseline='dense'),
  }
  return TableSweepConfig(points)


@pytest.fixture(scope='module')
def run(tmp_path_factory, fast_compilation):
  folder = tmp_path_factory.mktemp('tables')
  tiny_texts.write_data(folder)
  return folder, table_sweep.run(sweep(folder), folder / 'sweep')


def test_summary(run):
  folder, summary = run
  assert summary == json.loads((folder / 'sweep' / 'summary.json').read_text())
  dense, small = (summary['points'][name] for name in ('dense', 'small'))
  assert 'difference' not in dense
  assert small['table']['parameters_removed'] >= 0.5
  for split in ('validation', 'test'):
    a, b = (np.array(p['accuracy'][split]['values']) for p in (small, dense))
    found = small['difference'][split]
    np.testing.assert_allclose(found['values'], a - b)
    np.testing.assert_allclose(found['mean'], (a - b).mean())
    assert found['low'] <= found['mean'] <= found['high']
  assert summary['points']['int8']['table']['bytes_removed'] > 0.6
  table = (folder / 'sweep' / 'table.md').read_text()
  assert table == table_report.table(summary) + '\n'
  caption, empty, *rest = table.splitlines()
  assert caption.startswith('Columns: ')
  assert not empty
  lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in rest]
  assert lines[0] == ['own, DAN', 'as it is', '50%']
  assert [line[0] for line in lines[2:]] == ['dense', 'SVD', 'int8']
  assert lines[2][1].startswith('validation ')
  found, gone = small['difference']['test'], 100 * small['table']['bytes_removed']
  seeds, texts = (100 * (found[high] - found['mean']) for high in ('high', 'texts_high'))
  assert lines[3][1:] == [
    '',
    f'{100 * found["mean"]:+.2f} ± {seeds:.2f} ± {texts:.2f} ({gone:.0f}%)',
  ]
  for name in ('own_dan', 'schedules'):
    assert (folder / 'sweep' / f'{name}.png').stat().st_size > 1000


def test_interval_over_texts():
  """Of one seed, the paired interval of two shares."""
  rng = np.random.default_rng(0)
  mine, theirs = rng.random((2, 1, 400)) < 0.7
  found = table_sweep._difference(mine, theirs)
  each = mine[0].astype(float) - theirs[0]
  np.testing.assert_allclose(found['mean'], each.mean())
  np.testing.assert_allclose(
    found['texts_high'] - found['mean'], 1.96 * each.std(ddof=1) / 20, 1e-4
  )
  alike = table_sweep._difference(mine, mine)
  assert alike['texts_low'] == alike['texts_high'] == 0


def test_student_interval():
  found = table_sweep._mean([1.0, 2.0, 3.0, 4.0, 5.0])
  # Of five values: 2.776 standard errors.
  np.testing.assert_allclose(found['high'] - 3, 2.776 * np.sqrt(2.5 / 5), rtol=1e-3)
  assert 'low' not in table_sweep._mean([1.0])


def test_what_is_there_is_not_trained_again(run, capsys):
  folder, summary = run
  again = table_sweep.run(sweep(folder), folder / 'sweep')
  out = capsys.readouterr().out
  assert out.count('which is there') == 3
  assert 'epoch 1' not in out
  assert again['points'] == summary['points']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda s: s.points.clear(), 'at least one'),
    (lambda s: setattr(s.points['small'], 'baseline', 'int8'), 'int8, which is not trained before'),
    (lambda s: setattr(s.points['small'], 'baseline', 'none'), 'is no point'),
    (lambda s: setattr(s.points['dense'].train, 'init_from', 'small'), 'not trained before'),
    (
      lambda s: s.points.update(
        small=TablePoint('a', dataclasses.replace(s.points['dense'].train, seeds=(1,)), 0, 'dense')
      ),
      'other seeds than its baseline',
    ),
    (lambda s: setattr(s.points['small'].train, 'epochs', -1), 'small: epochs'),
    (lambda s: setattr(s.points['dense'].train, 'seeds', (1, 2)), 'other seeds than dense, which'),
    (lambda s: setattr(s.points['dense'].train, 'init_from', 'none'), 'neither a point nor'),
  ],
)
def test_what_cannot_be_is_refused(change, message, tmp_path):
  cfg = sweep(tmp_path)
  change(cfg)
  with pytest.raises(ConfigError, match=message):
    table_sweep.run(cfg, tmp_path / 'sweep')
  assert not (tmp_path / 'sweep').exists()


def test_schedules_are_drawn():
  curves = {
    'CLR': (schedules.clr_schedule(1.0, 0.1, 5), 40),
    'CALR': (schedules.calr_schedule(1.0, 0.1, 5), 20),
  }
  figure = table_report.schedules(curves, 10)
  lines = [axes.lines[0].get_ydata() for axes in figure.axes]
  assert [len(line) for line in lines] == [40, 20]
  np.testing.assert_allclose(lines[0][[0, 5, 10]], [0.1, 1.0, 0.1], rtol=1e-6)


@pytest.mark.parametrize('worst', [0.14, 0.3])
def test_what_is_far_worse_lies_on_the_edge(worst):
  def point(method, gone, lost):
    difference = {'mean': -lost, 'low': -lost - 0.01, 'high': 0.01 - lost}
    table = {'bytes_removed': gone}
    return {'method': method, 'table': table, 'difference': {'test': difference}}

  points = [point('good', 0.5, 0.0), point('bad', 0.98, worst), point('bad', 0.9, 0.02)]
  axes = table_report._lost(points, 'texts').axes[0]
  cut = worst > 0.15
  assert ('cut at 15' in axes.get_ylabel()) == cut
  _, bad = axes.containers
  np.testing.assert_allclose(bad[0].get_xdata(), [0.1, 0.02])
  np.testing.assert_allclose(bad[0].get_ydata(), [2, 15 if cut else 14])
  lengths = [abs(high - low) for (_, low), (_, high) in bad[2][0].get_segments()]
  np.testing.assert_allclose(lengths, [2, 0 if cut else 2], atol=1e-9)
  assert axes.get_xlim()[0] > axes.get_xlim()[1]  # more is gone to the right
  assert axes.xaxis.get_major_formatter()(0.1, None) == '90'


def test_a_point_that_diverges_stops_no_other(run, capsys, monkeypatch):
  cfg = sweep(run[0])
  original = table_sweep.text_loop.train

  def train(train, workdir, corpus):
    if train.name == 'small':
      raise FloatingPointError('the loss is not finite')
    return original(train, workdir, corpus)

  monkeypatch.setattr(table_sweep.text_loop, 'train', train)
  child = copy.deepcopy(cfg.points['int8'])
  child.train.init_from = 'small'
  cfg.points['child'] = child
  summary = table_sweep.run(cfg, run[0] / 'sweep')
  assert set(summary['points']) == {'dense', 'int8'}
  assert summary['failed'] == {'small': 'the loss is not finite', 'child': 'small failed'}
  assert 'child failed: small failed' in capsys.readouterr().out
