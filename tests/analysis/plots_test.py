import re

import matplotlib
import numpy as np
import pytest

from gatedfm.analysis import gate_maps, plots


def test_read_curves_keeps_the_last_of_a_step(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    '{"step": 1, "time": 0.1, "train/loss": 3.0, "note": "text"}\n'
    '{"step": 2, "train/loss": 2.5}\n'
    '{"step": 2, "train/loss": 2.0}\n'
    '{"step": 2, "train/loss": 2.25, "validation/loss": 1}\n'
  )
  curves = plots.read_curves(path)
  assert set(curves) == {'time', 'train/loss', 'validation/loss'}
  np.testing.assert_array_equal(curves['train/loss'], [[1, 2], [3.0, 2.25]])


def test_learning_curves_draw_the_panels_that_have_data(summary):
  runs = {
    name: plots.read_curves(point['workdir'] + '/metrics.jsonl')
    for name, point in summary['points'].items()
  }
  figure = plots.learning_curves(runs)
  titles = [axes.get_title() for axes in figure.axes]
  assert titles == ['loss (training pale)', 'sparsity (%)']
  steps, values = figure.axes[1].lines[2].get_data()
  assert steps[-1] == 2000
  assert values[-1] == pytest.approx(50)
  assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
  only_loss = {'dense': {'train/loss': (np.arange(3), np.ones(3))}}
  assert len(plots.learning_curves(only_loss).axes) == 1
  assert plots.learning_curves({'dense': {}}) is None


def test_a_long_run_is_thinned_to_block_means():
  steps, values = np.arange(100_000), np.tile([0.0, 2.0], 50_000)
  run = {'train/loss': (steps, values)}
  line = plots.learning_curves({'dense': run}).axes[0].lines[0]
  assert len(line.get_xdata()) == 200
  assert line.get_xdata()[-1] == 99_999
  np.testing.assert_allclose(line.get_ydata(), 1)


def test_gate_map_puts_each_fraction_into_its_cell(summary):
  gates = gate_maps.parse(summary['points']['gated_0.5']['gate_map'])
  figure = plots.gate_map(gates)
  mesh = figure.axes[0].collections[0]
  drawn = mesh.get_array().reshape(mesh._coordinates.shape[0] - 1, -1)
  cells = ~np.ma.getmaskarray(np.ma.masked_invalid(drawn))
  np.testing.assert_array_equal(drawn[cells], gates.open_CxM.ravel())
  assert cells.any(axis=1).sum() == 27
  labels = [text.get_text() for text in figure.axes[0].texts]
  assert 'st eng' in labels
  assert 'decoder\ncross\nattention' in labels
  ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
  assert ticks == list(gates.languages)


def test_quality_against_time_places_points_and_bars(summary):
  points = summary['points']
  points['gated_0.5']['interval'] = {'cer': [0.13, 0.16]}
  points['gated_0.7']['time_ratio'] = None
  axes = plots.quality_against_time(points).axes[0]
  places = [tuple(c.get_offsets()[0]) for c in axes.collections if c.get_label() in points]
  assert places[0] == pytest.approx((100, 14.0))
  assert places[2] == pytest.approx((62, 100 * points['gated_0.5']['cer']['mean']))
  assert len(places) == 3
  low, high = axes.get_ylim()
  assert low < 13
  assert high > 16


def test_macs_against_time_has_the_diagonal(summary):
  axes = plots.macs_against_time(summary['points']).axes[0]
  x, y = axes.lines[0].get_data()
  np.testing.assert_array_equal(x, y)
  assert tuple(axes.collections[0].get_offsets()[0]) == pytest.approx((100, 100))


@pytest.mark.parametrize('draw', [plots.quality_against_time, plots.macs_against_time])
def test_nothing_to_compare_gives_no_figure(summary, draw):
  points = summary['points']
  assert draw({'dense': points['dense']}) is None
  untimed = points['dense'] | {'time_ratio': None}
  assert draw({'dense': untimed, 'gated_0.5': points['gated_0.5']}) is None


def test_the_legend_of_many_points_is_not_cut(summary):
  points = dict(summary['points'])
  points |= {f'another_{i}': points['gated_0.5'] for i in range(30)}
  figure = plots.quality_against_time(points)
  figure.draw_without_rendering()
  box = figure.legends[0].get_window_extent()
  assert len(figure.legends[0].texts) == len(points)
  assert box.y0 >= 0
  assert box.y1 <= figure.bbox.height


def test_drawing_leaves_matplotlib_as_it_was(summary):
  before = dict(matplotlib.rcParams)
  plots.to_svg(plots.macs_against_time(summary['points']), 'a')
  assert dict(matplotlib.rcParams) == before


def test_svg_stands_in_a_page_of_its_own_names(summary):
  svg = plots.to_svg(plots.quality_against_time(summary['points']), 'left')
  assert svg.startswith('<svg')
  assert plots.INK not in svg
  assert 'currentColor' in svg
  ids = set(re.findall(r'\bid="([^"]+)"', svg))
  assert all(name.startswith('left-') for name in ids)
  links = re.findall(r'(?:href="|url\()#([^")]+)', svg)
  assert links
  assert set(links) <= ids
  assert 'gated_0.5' in svg  # text, not outlines


def test_save_writes_by_suffix_and_the_same_bytes_again(summary, tmp_path):
  for suffix, start in (('png', b'\x89PNG'), ('svg', b'<?xml')):
    written = []
    for folder in ('a', 'b'):
      path = tmp_path / folder / f'macs.{suffix}'
      plots.save(plots.macs_against_time(summary['points']), path)
      written.append(path.read_bytes())
      assert [p.name for p in path.parent.iterdir() if 'tmp' in p.name] == []
    assert written[0].startswith(start)
    assert written[0] == written[1]
