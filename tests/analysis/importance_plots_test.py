"""Figures of importance show the numbers that they are given."""

import matplotlib
import numpy as np
import pytest
from matplotlib import colors

from gatedfm.analysis import importance_plots, plots
from gatedfm.analysis.importance_plots import Curve, Panel


def legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def written(figure):
  """What stands in the cells of a heat map."""
  return [text.get_text() for text in figure.axes[0].texts]


def ticks(axis):
  return [text.get_text() for text in axis.get_ticklabels()]


def test_closed_heads_are_crossed_out():
  scores = np.array([[1.0, 0.0, 3.0], [4.0, 5.0, 6.0]])
  gates = np.array([[1, 0, 1], [0, 1, 1]])
  axes = importance_plots.importance(scores, gates).axes[0]
  # A score of 0 has no logarithm: it is drawn as the least that has.
  np.testing.assert_array_equal(axes.images[0].get_array(), np.maximum(scores, 1))
  x, y = axes.lines[0].get_data()
  assert set(zip(x, y)) == {(1, 0), (0, 1)}
  assert not importance_plots.importance(scores).axes[0].lines
  importance_plots.importance(np.zeros((2, 2)), np.ones((2, 2))).draw_without_rendering()


def test_bars_of_ffns_tell_the_closed_ones():
  scores = np.array([0.5, -0.1, 0.3])
  figure = importance_plots.ffn_importance(scores, np.array([1.0, 0, 1]))
  bars = {round(b.get_x() + b.get_width() / 2): b for b in figure.axes[0].patches}
  assert [bars[i].get_height() for i in range(3)] == scores.tolist()
  assert [bool(bars[i].get_hatch()) for i in range(3)] == [False, True, False]
  assert legend(figure) == ['open', 'closed']
  assert not importance_plots.ffn_importance(scores).legends


def panels():
  pruned = np.array([0.1, 0.5])
  taylor = Curve(pruned, np.array([0.8, 0.6]), np.array([0.7, 0.5]), np.array([0.9, 0.7]))
  random = Curve(pruned, np.array([0.7, 0.3]))
  return {
    ('heads', '0 shots'): Panel({'taylor': taylor, 'random': random}, 0.85),
    ('heads', '1 shot'): Panel({'random': random}),
    ('FFNs', '0 shots'): Panel({'taylor': taylor}, 0.85),
  }


def test_quality_curves():
  figure = importance_plots.quality_curves(panels())
  titles = [axes.get_title() for axes in figure.axes]
  assert titles == ['heads, 0 shots', 'heads, 1 shot', 'FFNs, 0 shots', '']
  assert not figure.axes[3].axison
  first = figure.axes[0]
  lines = {line.get_label(): line for line in first.lines}
  np.testing.assert_allclose(lines['taylor'].get_data(), [[0, 10, 50], [0.85, 0.8, 0.6]])
  assert set(lines['dense'].get_ydata()) == {0.85}
  [band] = first.collections  # of the scorer that has an interval
  corners = {tuple(np.round(p, 6)) for p in band.get_paths()[0].vertices}
  assert corners >= {(10, 0.7), (10, 0.9), (50, 0.5), (50, 0.7)}
  # One colour each, also where it stands alone, and one place in the legend.
  assert figure.axes[1].lines[0].get_color() == lines['random'].get_color()
  assert legend(figure) == ['taylor', 'random', 'dense']
  assert first.get_ylabel() == 'accuracy'
  assert first.get_yscale() == 'linear'
  other = importance_plots.quality_curves(panels(), 'perplexity')
  assert other.axes[0].get_yscale() == 'log'


def test_agreement_names_both_axes():
  values = np.array([[1, 0.25, -0.5], [0.25, 1, 0.125], [-0.5, 0.125, 1]])
  figure = importance_plots.agreement(values, ['a', 'b', 'c'], "Kendall's tau")
  axes = figure.axes[0]
  assert ticks(axes.xaxis) == ticks(axes.yaxis) == ['a', 'b', 'c']
  assert written(figure)[:3] == ['1.00', '0.25', '-0.50']
  assert axes.images[0].get_clim() == (-1, 1)
  assert figure.axes[1].get_ylabel() == "Kendall's tau"
  positive = importance_plots.agreement(np.abs(values), ['a', 'b', 'c'])
  assert positive.axes[0].images[0].get_clim() == (0, 1)


def test_the_joint_grid_leaves_out_what_was_not_measured():
  values = np.array([[0.75, 0.5, 0.25], [0.625, np.nan, 0.125]])
  figure = importance_plots.joint_grid(values, [0, 0.7], [0, 0.1, 0.2])
  axes = figure.axes[0]
  assert written(figure) == ['0.75', '0.5', '0.25', '0.625', '0.125']
  assert [t.get_position() for t in axes.texts][3:] == [(0, 1), (2, 1)]
  assert ticks(axes.yaxis) == ['0', '70']
  assert ticks(axes.xaxis) == ['0', '10', '20']
  assert axes.get_xlabel() == 'FFNs pruned (%)'
  np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), values)


def test_numbers_are_legible_on_their_cells():
  luminance = lambda color: np.dot(colors.to_rgb(color), [0.2126, 0.7152, 0.0722])
  values = np.linspace(0, 1, 11)[None]
  axes = importance_plots.joint_grid(values, [0], np.arange(11) / 11).axes[0]
  image = axes.images[0]
  for text, value in zip(axes.texts, values[0]):
    cell = image.cmap(image.norm(value))
    assert abs(luminance(text.get_color()) - luminance(cell)) > 0.3


def test_capacity_curves():
  pruned = np.array([0, 0.5, 1])
  figure = importance_plots.capacity_curves(
    pruned, {'0 shots': [1, 0.9, 0], '5 shots': [1, 0.6, 0]}
  )
  lines = figure.axes[0].lines
  np.testing.assert_allclose(lines[0].get_data(), [[0, 50, 100], [100, 90, 0]])
  np.testing.assert_allclose(lines[1].get_ydata(), [100, 60, 0])
  assert legend(figure) == ['0 shots', '5 shots', 'as many as heads']


@pytest.mark.parametrize('suffix', ['png', 'svg'])
def test_figures_are_saved_and_leave_matplotlib_as_it_was(tmp_path, suffix):
  before = dict(matplotlib.rcParams)
  plots.save(importance_plots.quality_curves(panels()), tmp_path / f'a.{suffix}')
  plots.save(importance_plots.agreement(np.eye(5), list('abcde')), tmp_path / f'b.{suffix}')
  assert all((tmp_path / f'{n}.{suffix}').stat().st_size > 1000 for n in 'ab')
  assert dict(matplotlib.rcParams) == before
