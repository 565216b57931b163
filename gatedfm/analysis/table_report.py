"""A sweep over embedding tables as tables and pictures, from its summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib import figure as figures
from matplotlib import ticker

from gatedfm.analysis.plots import COLORS, INK, MARKERS, styled

_MOST = 15  # points lost; what is worse lies on the upper edge of a picture
_GONE = (10, 50, 75, 90, 95, 98, 99)  # percent, where its axis has ticks


def table(summary: Mapping[str, Any], split: str = 'test') -> str:
  """Markdown: for each set of texts and kind of model, methods against what was asked to go.

  Its first line says what a cell has.
  """
  out = [
    f'Columns: share of the table that was asked to go. Cells: {split} accuracy against the '
    'baseline in points, ± 95% over seeds, ± 95% over texts, and the share of bytes that is gone '
    'where it is another; of points without a baseline, accuracies in percent.'
  ]
  for title, points in _groups(summary).items():
    asked = list(dict.fromkeys(sorted(p['compression'] for p in points)))
    heads = [f'{100 * c:g}%' if c else 'as it is' for c in asked]
    rows = [[title, *heads], ['---'] * (1 + len(asked))]
    for method in dict.fromkeys(p['method'] for p in points):
      cells = {p['compression']: _cell(p, split) for p in points if p['method'] == method}
      rows.append([method, *(cells.get(c, '') for c in asked)])
    out.append('\n'.join(f'| {" | ".join(row)} |' for row in rows))
  return '\n\n'.join(out)


def _groups(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
  """Points by what is comparable, with a name of it: of files the last part where that tells."""
  out: dict[str, list[Mapping[str, Any]]] = {}
  full = dict.fromkeys(point['texts'] for point in summary['points'].values())
  short = {texts: texts.rsplit('/', 1)[-1].split('.')[0] for texts in full}
  alone = len(set(short.values())) == len(short)
  for point in summary['points'].values():
    texts = short[point['texts']] if alone else point['texts'].replace('/', ' ')
    out.setdefault(f'{texts}, {point["kind"].upper()}', []).append(point)
  return out


def _cell(point: Mapping[str, Any], split: str) -> str:
  found, gone = point.get('difference', {}).get(split), 100 * point['table']['bytes_removed']
  if found is None:
    accuracy = point['accuracy'].items()
    return ', '.join(f'{name} {100 * each["mean"]:.1f}' for name, each in accuracy)
  text = f'{100 * found["mean"]:+.2f}'
  if 'low' in found:
    text += f' ± {50 * (found["high"] - found["low"]):.2f}'
  text += f' ± {50 * (found["texts_high"] - found["texts_low"]):.2f}'
  return text + (f' ({gone:.0f}%)' if round(gone) != round(100 * point['compression']) else '')


def pictures(summary: Mapping[str, Any]) -> dict[str, figures.Figure]:
  """Accuracy lost against what is gone, a figure for each set of texts and kind of model."""
  out = {}
  for title, points in _groups(summary).items():
    if mine := [p for p in points if 'test' in p.get('difference', ())]:
      out[title.replace(', ', '_').lower()] = _lost(mine, title)
  return out


@styled
def _lost(points: list[Mapping[str, Any]], title: str) -> figures.Figure:
  figure = figures.Figure(figsize=(7.2, 4.2), layout='constrained')
  axes = figure.add_subplot()
  methods = dict.fromkeys(p['method'] for p in points)
  for i, method in enumerate(methods):
    mine = sorted(
      (p for p in points if p['method'] == method), key=lambda p: p['table']['bytes_removed']
    )
    left = np.array([1 - p['table']['bytes_removed'] for p in mine])
    found = [p['difference']['test'] for p in mine]
    lost = np.array([-100 * f['mean'] for f in found])
    bars = np.array([100 * (f['high'] - f['mean']) if 'high' in f else 0.0 for f in found])
    bars, lost = np.where(lost > _MOST, 0, bars), np.minimum(lost, _MOST)
    style = {'color': COLORS[i % len(COLORS)], 'marker': MARKERS[i % len(MARKERS)]}
    line = '-' if i < len(COLORS) else '--'
    axes.errorbar(left, lost, bars, label=method, linestyle=line, capsize=2, **style)
  axes.axhline(0, color=INK, linewidth=0.8)
  axes.axhline(1, color=INK, linewidth=0.8, linestyle=':')
  # Halving what is left is a step, wherever it is: most differences are beyond 90%.
  axes.set(xlabel='bytes of the table gone, %', title=title, xscale='log')
  axes.xaxis.set_major_locator(ticker.FixedLocator([1 - gone / 100 for gone in _GONE]))
  axes.xaxis.set_major_formatter(lambda left, _: f'{100 * (1 - left):g}')
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.invert_xaxis()
  worse = any(-100 * p['difference']['test']['mean'] > _MOST for p in points)
  axes.set_ylim(top=_MOST if worse else None)
  axes.set_ylabel('test accuracy lost, points' + (f' (cut at {_MOST})' if worse else ''))
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), fontsize=8)
  return figure


@styled
def schedules(
  curves: Mapping[str, tuple[Callable[[np.ndarray], Any], int]], mark: int = 0
) -> figures.Figure:
  """Learning rates by step.

  Args:
    curves: schedules by name, and for how many steps each is drawn.
    mark: a line every so many steps, such as an epoch; 0 draws none.
  """
  figure = figures.Figure(figsize=(7.2, 1.2 + 1.4 * len(curves)), layout='constrained')
  panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
  for i, (axes, (name, (schedule, steps))) in enumerate(zip(panels, curves.items())):
    at, color = np.arange(steps), COLORS[i % len(COLORS)]
    axes.plot(at, np.asarray([schedule(at)]).reshape(-1), color=color)
    for x in range(mark, steps, mark) if mark else ():
      axes.axvline(x, color=INK, linewidth=0.5, alpha=0.4)
    axes.set(ylabel='learning rate', title=name)
  panels[-1].set(xlabel='step')
  return figure
