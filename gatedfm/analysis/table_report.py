"""A sweep over embedding tables as tables and pictures, from its summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib import figure as figures

from gatedfm.analysis.plots import COLORS, INK, MARKERS, styled


def table(summary: Mapping[str, Any], split: str = 'test') -> str:
  """A row per point: method, what is gone, accuracy, and what is lost with its interval."""
  names = [
    'texts',
    'model',
    'method',
    'parameters gone',
    'bytes gone',
    f'{split} accuracy',
    'against dense',
  ]
  rows = [names, ['---'] * len(names)]
  for point in summary['points'].values():
    small = point['table']
    rows.append(
      [
        point['texts'],
        point['kind'],
        _label(point),
        f'{100 * small["parameters_removed"]:.1f}%',
        f'{100 * small["bytes_removed"]:.1f}%',
        f'{100 * point["accuracy"][split]["mean"]:.1f}',
        _points(point.get('difference', {}).get(split)),
      ]
    )
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _label(point: Mapping[str, Any]) -> str:
  asked = point['compression']
  return point['method'] + (f', {100 * asked:g}% asked' if asked else '')


def _points(difference: Mapping[str, Any] | None) -> str:
  if difference is None:
    return ''
  text = f'{100 * difference["mean"]:+.2f}'
  if 'low' in difference:
    text += f' ({100 * difference["low"]:+.2f} to {100 * difference["high"]:+.2f})'
  return text


def pictures(summary: Mapping[str, Any]) -> dict[str, figures.Figure]:
  """Accuracy lost against what is gone, a figure for each set of texts and kind of model."""
  groups = dict.fromkeys((p['texts'], p['kind']) for p in summary['points'].values())
  out = {}
  for texts, kind in groups:
    mine = [p for p in summary['points'].values() if (p['texts'], p['kind']) == (texts, kind)]
    mine = [p for p in mine if 'difference' in p]
    if mine:
      name = texts.rsplit('/', 1)[-1].split('.')[0]
      out[f'{name}_{kind}'] = _lost(mine, f'{name}, {kind.upper()}')
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
    gone = np.array([100 * p['table']['bytes_removed'] for p in mine])
    found = [p['difference']['test'] for p in mine]
    lost = np.array([-100 * f['mean'] for f in found])
    bars = np.array([100 * (f['high'] - f['mean']) if 'high' in f else 0.0 for f in found])
    style = {'color': COLORS[i % len(COLORS)], 'marker': MARKERS[i % len(MARKERS)]}
    line = '-' if i < len(COLORS) else '--'
    axes.errorbar(gone, lost, bars, label=method, linestyle=line, capsize=2, **style)
  axes.axhline(0, color=INK, linewidth=0.8)
  axes.axhline(1, color=INK, linewidth=0.8, linestyle=':')
  axes.set(xlabel='bytes of the table gone, %', ylabel='test accuracy lost, points', title=title)
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), fontsize=8)
  return figure


@styled
def schedules(
  curves: Mapping[str, Callable[[np.ndarray], Any]], steps: int, mark: int = 0
) -> figures.Figure:
  """Learning rates by step.

  Args:
    curves: schedules by name.
    steps: how many are drawn.
    mark: a line every so many steps, such as an epoch; 0 draws none.
  """
  figure = figures.Figure(figsize=(7.2, 1.2 + 1.4 * len(curves)), layout='constrained')
  panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
  at = np.arange(steps)
  for axes, color, (name, schedule) in zip(panels, COLORS, curves.items()):
    axes.plot(at, np.asarray([schedule(at)]).reshape(-1), color=color)
    for x in range(mark, steps, mark) if mark else ():
      axes.axvline(x, color=INK, linewidth=0.5, alpha=0.4)
    axes.set(ylabel='learning rate', title=name)
  panels[-1].set(xlabel='step')
  return figure
