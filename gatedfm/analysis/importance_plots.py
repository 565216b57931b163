"""Figures of importance: scores by layer, quality under pruning, agreement between tasks.

In the manner of `plots`, which saves them. Letters: N layers, U units, P points of a curve, T
tasks, H numbers of pruned heads, F numbers of pruned FFNs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib import axes as axes_lib
from matplotlib import figure as figures
from matplotlib import ticker

from gatedfm.analysis.plots import COLORS, INK, MARKERS, styled


@dataclasses.dataclass(frozen=True)
class Curve:
  """Quality of one way to prune, `[P]` each.

  Attributes:
    pruned: shares that are closed, 0 to 1.
    quality: accuracy, or perplexity.
    low, high: its 95% interval; None where there is none.
  """

  pruned: np.ndarray
  quality: np.ndarray
  low: np.ndarray | None = None
  high: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
  """Curves by scorer, and the dense model's quality; None where it is not known."""

  curves: Mapping[str, Curve]
  dense: float | None = None


@styled
def importance(scores_NxU: np.ndarray, open_NxU: np.ndarray | None = None) -> figures.Figure:
  """Scores of units by layer, logarithmic; what is closed is crossed out.

  Args:
    scores_NxU: of each layer's heads, not negative.
    open_NxU: gates, 0 or 1; None where nothing is closed.
  """
  layers, units = scores_NxU.shape
  figure = figures.Figure(figsize=(2.2 + 0.3 * units, 1.2 + 0.16 * layers), layout='constrained')
  axes = figure.add_subplot()
  positive = scores_NxU[scores_NxU > 0]
  least = positive.min() if positive.size else 1.0
  norm = matplotlib.colors.LogNorm(least, max(scores_NxU.max(), least * 1.01))
  shown = axes.imshow(
    np.maximum(scores_NxU, least), cmap='viridis', norm=norm, aspect='auto', origin='lower'
  )
  if open_NxU is not None:
    rows, columns = np.nonzero(np.asarray(open_NxU) == 0)
    axes.plot(columns, rows, 'x', color='white', markersize=4, label='closed')
  axes.set(xlabel='head', ylabel='layer')
  axes.grid(False)
  figure.colorbar(shown, ax=axes, label='score')
  return figure


@styled
def ffn_importance(scores_N: np.ndarray, open_N: np.ndarray | None = None) -> figures.Figure:
  """A bar for each layer's FFN; those that are closed are pale and hatched.

  Args:
    scores_N: of each layer's FFN; an oracle's may be negative.
    open_N: gates, 0 or 1; None where nothing is closed.
  """
  layers = len(scores_N)
  closed_N = np.zeros(layers, bool) if open_N is None else np.asarray(open_N) == 0
  figure = figures.Figure(figsize=(1.6 + 0.16 * layers, 3.0), layout='constrained')
  axes = figure.add_subplot()
  looks = (('open', ~closed_N, {}), ('closed', closed_N, {'alpha': 0.3, 'hatch': '///'}))
  for label, chosen_N, look in looks:
    if chosen_N.any():
      at = np.flatnonzero(chosen_N)
      axes.bar(at, np.asarray(scores_N)[at], color=COLORS[0], edgecolor=INK, label=label, **look)
  axes.axhline(0, color=INK, linewidth=0.8)
  axes.set(xlabel='layer', ylabel='score of its FFN')
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  if closed_N.any():
    figure.legend(loc='outside right upper')
  return figure


@styled
def quality_curves(
  panels: Mapping[tuple[str, str], Panel], quality: str = 'accuracy'
) -> figures.Figure:
  """Quality against the share that is pruned, a curve with its 95% band for each scorer.

  Args:
    panels: by row and column, such as `('heads', '0 shots')`; where there is none the grid stays
      empty. A scorer has one colour in all of them.
    quality: what is shown; perplexity is drawn on a logarithmic axis.
  """
  rows, columns = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
  scorers = list(dict.fromkeys(name for panel in panels.values() for name in panel.curves))
  size = (0.9 + 2.9 * len(columns), 0.9 + 2.4 * len(rows))
  figure = figures.Figure(figsize=size, layout='constrained')
  grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
  for axes, key in zip(grid.flat, ((row, column) for row in rows for column in columns)):
    if key not in panels:
      axes.set_axis_off()
      continue
    _draw(axes, panels[key], scorers)
    axes.set(title=', '.join(filter(None, key)), xlabel=f'{key[0]} pruned (%)')
    if quality == 'perplexity':
      axes.set_yscale('log')
  for axes in grid[:, 0]:
    axes.set_ylabel(quality)
  handles = {
    label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())
  }
  columns = 4 if max(map(len, handles), default=0) < 12 else 2
  figure.legend(handles.values(), handles, loc='outside lower center', ncols=columns)
  return figure


def _draw(axes: axes_lib.Axes, panel: Panel, scorers: Sequence[str]) -> None:
  for number, name in enumerate(scorers):
    if name not in panel.curves:
      continue
    curve, color = panel.curves[name], COLORS[number % len(COLORS)]
    # From the dense model on, where there is one.
    first = [] if panel.dense is None else [panel.dense]
    x = [*[0.0] * len(first), *(100 * np.asarray(curve.pruned))]
    if curve.low is not None:
      low, high = [*first, *curve.low], [*first, *curve.high]
      axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    marker = MARKERS[number % len(MARKERS)]
    quality = [*first, *curve.quality]
    axes.plot(x, quality, color=color, marker=marker, markersize=4, label=name)
  if panel.dense is not None:
    axes.axhline(panel.dense, color=INK, alpha=0.6, linestyle='--', linewidth=1, label='dense')


@styled
def agreement(
  agreement_TxT: np.ndarray, names: Sequence[str], label: str = 'rank correlation'
) -> figures.Figure:
  """How alike tasks score the same units, written into each cell.

  Args:
    agreement_TxT: as of `agreement.matrix`, -1 to 1; where nothing is negative, colours go from 0.
    names: of the tasks.
    label: of the measure.
  """
  low = -1.0 if np.nanmin(agreement_TxT) < 0 else 0.0
  figure = _annotated(agreement_TxT, (names, names), label, (low, 1.0), '{:.2f}')
  figure.axes[0].tick_params('x', rotation=45 if len(names) > 3 else 0)
  return figure


@styled
def joint_grid(
  quality_HxF: np.ndarray,
  heads_H: Sequence[float],
  ffns_F: Sequence[float],
  quality: str = 'accuracy',
) -> figures.Figure:
  """Quality where heads and FFNs are pruned together, written into each cell.

  Args:
    quality_HxF: NaN where it was not measured.
    heads_H, ffns_F: shares that are closed, 0 to 1.
    quality: what is shown.
  """
  names = tuple([f'{100 * share:g}' for share in shares] for shares in (heads_H, ffns_F))
  bounds = np.nanmin(quality_HxF), np.nanmax(quality_HxF)
  figure = _annotated(quality_HxF, names, quality, bounds, '{:.3g}')
  figure.axes[0].set(xlabel='FFNs pruned (%)', ylabel='heads pruned (%)')
  return figure


def _annotated(
  values: np.ndarray,
  names: tuple[Sequence[str], Sequence[str]],
  label: str,
  bounds: tuple[float, float],
  form: str,
) -> figures.Figure:
  """A heat map with its numbers, of rows and columns by name."""
  rows, columns = map(len, names)
  size = (2.6 + 0.55 * columns, 1.6 + 0.4 * rows)
  figure = figures.Figure(figsize=size, layout='constrained')
  axes = figure.add_subplot()
  axes.grid(False)
  norm = matplotlib.colors.Normalize(*bounds)
  shown = axes.imshow(values, cmap='viridis', norm=norm, aspect='auto')
  for (row, column), value in np.ndenumerate(values):
    if np.isfinite(value):
      # The darker half of the colours takes light figures.
      ink = 'white' if norm(value) < 0.6 else 'black'
      text = form.format(value)
      axes.text(column, row, text, color=ink, ha='center', va='center', fontsize=8)
  axes.set_yticks(range(rows), names[0])
  axes.set_xticks(range(columns), names[1])
  figure.colorbar(shown, ax=axes, label=label)
  return figure


@styled
def capacity_curves(pruned_P: np.ndarray, retained: Mapping[str, np.ndarray]) -> figures.Figure:
  """How much of heads' total capacity, such as prefix matching, is left as heads are pruned.

  Args:
    pruned_P: shares of the heads that are closed, 0 to 1.
    retained: `[P]` shares of the capacity that are left, 0 to 1, by what ranked the heads.
  """
  figure = figures.Figure(figsize=(5.6, 3.4), layout='constrained')
  axes = figure.add_subplot()
  curves = {name: Curve(pruned_P, 100 * np.asarray(share)) for name, share in retained.items()}
  _draw(axes, Panel(curves), list(curves))
  axes.plot(
    [0, 100], [100, 0], color=INK, alpha=0.5, linestyle='--', linewidth=1, label='as many as heads'
  )
  axes.set(xlim=(0, 100), ylim=(0, 103), xlabel='heads pruned (%)', ylabel='capacity left (%)')
  figure.legend(loc='outside right upper')
  return figure
