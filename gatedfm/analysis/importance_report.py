"""A sweep over pruned language models as tables and pictures, from its summary and its scores."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure as figures

from gatedfm.analysis import agreement, importance_plots
from gatedfm.analysis.importance_plots import Curve, Panel

HEADS, FFN = 'decoder/attention_heads', 'decoder/ffn'
DENSE = 'dense'


def budget(point: Mapping[str, Any]) -> dict[str, float]:
  """`heads:0.3,ffn:0.1` of a summary's point as shares by name."""
  parts = (item.partition(':') for item in point.get('budget', '').split(',') if item)
  return {name: float(share) for name, _, share in parts}


def label(point: Mapping[str, Any]) -> str:
  """Scorer and protocol."""
  out = point['scorer']
  if point['steps'] > 1:
    each = next(iter(budget(point).values())) / point['steps']
    out += f', scored every {100 * each:.0f}%'
  return out + (', repaired' if point['repair'] else '')


def tables(summary: Mapping[str, Any]) -> str:
  """`table` and `affordable_table`, each behind what it says."""
  return '\n\n'.join([
    'Shares of the dense model that are left; perplexity; accuracy in percent, in brackets the '
    'difference from the dense model on the same questions, in points, with its 95% interval:',
    table(summary),
    'The largest share (%) up to which no share that was tried loses more than a point on '
    'average (in brackets: at the lower end of the interval); < where the least tried loses more:',
    affordable_table(summary),
  ])  # fmt: skip


def table(summary: Mapping[str, Any]) -> str:
  """A row per point: what is left, perplexity, accuracies with their differences from dense."""
  kinds = _kinds(summary)
  names = ['point', 'parameters', 'MACs of layers', 'perplexity', *kinds.values()]
  rows = [names, ['---'] * len(names)]
  for name, point in summary['points'].items():
    kept = point.get('kept', {'parameters': 1.0, 'layer_macs': 1.0})
    row = [name, f'{kept["parameters"]:.2f}', f'{kept["layer_macs"]:.2f}']
    row.append(f'{point["perplexity"]:.1f}' if 'perplexity' in point else '')
    rows.append(row + [_accuracy(point.get(kind)) for kind in kinds])
  return _markdown(rows)


def affordable(
  summary: Mapping[str, Any], lost: float = 0.01
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
  """Which share of the heads, or of the FFNs, goes at no more than so much accuracy.

  Args:
    summary: of `importance_sweep.run`.
    lost: share of the questions, against the dense model.

  Returns: by `heads` and `ffn`, by scorer and protocol, by kind of accuracy: `mean`, the largest
    share up to which no share that was tried loses more; `surely`, the same of the lower ends of
    the differences' intervals; 0 where the smallest that was tried, `least`, loses more.
  """
  out: dict[str, dict[str, dict[str, dict[str, float]]]] = {'heads': {}, 'ffn': {}}
  for site, by_label in out.items():
    mine: dict[str, list] = {}
    for point in list(summary['points'].values())[1:]:
      if list(budget(point)) == [site]:
        mine.setdefault(label(point), []).append((budget(point)[site], point))
    for name, found in mine.items():
      found.sort(key=lambda f: f[0])
      for kind in _kinds(summary):
        asked = [(share, p[kind]) for share, p in found if 'difference' in p.get(kind, ())]
        ends = {
          'mean': [(share, a['difference']) for share, a in asked],
          'surely': [(share, a['difference_interval'][0]) for share, a in asked],
        }
        kept = {
          end: [share for share, _ in itertools.takewhile(lambda v: v[1] >= -lost - 1e-9, values)]
          for end, values in ends.items()
        }
        if asked:
          most = {end: max(shares, default=0.0) for end, shares in kept.items()}
          by_label.setdefault(name, {})[kind] = most | {'least': asked[0][0]}
  return out


def affordable_table(summary: Mapping[str, Any], lost: float = 0.01) -> str:
  """The same as rows of percent, in brackets what surely goes; `<` where no less was tried."""
  kinds = _kinds(summary)
  names = [f'goes at {100 * lost:g} point lost, %', *kinds.values()]
  rows = [names, ['---'] * len(names)]
  for site, by_label in affordable(summary, lost).items():
    for name, found in by_label.items():
      cells = (found.get(kind, {}) for kind in kinds)
      say = lambda c, end: f'{100 * c[end]:.0f}' if c[end] else f'<{100 * c["least"]:.0f}'
      said = [f'{say(c, "mean")} ({say(c, "surely")})' if c else '' for c in cells]
      rows.append([f'{site}, {name}', *said])
  return _markdown(rows)


def _kinds(summary: Mapping[str, Any]) -> dict[str, str]:
  """Which accuracies there are, and what they are called."""
  shots = summary['config']['shots']
  every = {f'{kind}_{n}': f'{kind}, {n} shots' for n in shots for kind in ('plain', 'calibrated')}
  return {kind: said for kind, said in every.items() if kind in summary['points'][DENSE]}


def _markdown(rows: Sequence[Sequence[str]]) -> str:
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _accuracy(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return ''
  text = f'{100 * found["accuracy"]["mean"]:.1f}'
  if found.get('difference'):
    low, high = (100 * x for x in found['difference_interval'])
    text += f' ({100 * found["difference"]:+.1f}: {low:+.1f} to {high:+.1f})'
  return text


def rankings(
  scores: Mapping[tuple[str, int], Mapping[str, np.ndarray]], scorer: str = 'taylor'
) -> dict[str, Any]:
  """How alike tasks, and numbers of shots, rank heads and FFNs, by every measure.

  Args:
    scores: by task and number of shots, then by `scorer:site`.
    scorer: whose.

  Returns: by `heads` and `ffn`, then by measure: `tasks`, the mean over pairs of tasks at the same
    number of shots, and `shots`, mean and variance over tasks by pair of numbers.
  """
  out = {}
  for site, name in ((HEADS, 'heads'), (FFN, 'ffn')):
    mine = {key: s[f'{scorer}:{site}'] for key, s in scores.items() if f'{scorer}:{site}' in s}
    found = {}
    for measure, of in agreement.MEASURES.items():
      pairs = [
        of(mine[a], mine[b])
        for a, b in itertools.combinations(mine, 2)
        if a[0] != b[0] and a[1] == b[1]
      ]
      shots = agreement.across_shots(mine, of).items()
      if pairs or shots:
        found[measure] = {
          'tasks': float(np.mean(pairs)) if pairs else None,
          'pairs': len(pairs),
          'shots': {f'{a} and {b}': dataclasses.asdict(across) for (a, b), across in shots},
        }
    if found:
      out[name] = found
  return out


def pictures(
  summary: Mapping[str, Any], scores: Mapping[tuple[str, int], Mapping[str, np.ndarray]]
) -> dict[str, figures.Figure]:
  """By name of their file.

  Args:
    summary: of `importance_sweep.run`.
    scores: by task and number of shots, then by `scorer:site`; what is missing is not drawn.
  """
  out = {}
  for name, key in (('perplexity', None), ('accuracy_plain', 'plain'),
                    ('accuracy_calibrated', 'calibrated')):  # fmt: skip
    panels = _panels(summary, key)
    if panels:
      out[name] = importance_plots.quality_curves(panels, name.split('_')[0])
  if grid := _grid(summary):
    out['joint_grid'] = importance_plots.joint_grid(*grid, quality='perplexity')
  for site, name in ((HEADS, 'heads'), (FFN, 'ffn')):
    mine = {
      f'{task}, {shots} shots': found[f'taylor:{site}']
      for (task, shots), found in scores.items()
      if f'taylor:{site}' in found
    }
    if len(mine) > 1:
      matrix = agreement.matrix(mine, agreement.spearman)
      out[f'agreement_{name}'] = importance_plots.agreement(matrix, list(mine), "Spearman's rho")
    if mine:
      mean = np.mean(list(mine.values()), 0)
      draw = importance_plots.importance if site == HEADS else importance_plots.ffn_importance
      out[f'importance_{name}'] = draw(mean)
  return out


def _panels(summary: Mapping[str, Any], kind: str | None) -> dict[tuple[str, str], Panel]:
  """Of perplexity (None), or of that kind of accuracy by number of shots."""
  out = {}
  for site in ('heads', 'ffn'):
    for shots in summary['config']['shots'] if kind else ('',):
      field = f'{kind}_{shots}' if kind else 'perplexity'
      curves: dict[str, list] = {}
      for point in list(summary['points'].values())[1:]:
        if list(budget(point)) == [site] and field in point:
          curves.setdefault(label(point), []).append((budget(point)[site], point[field]))
      dense = summary['points'][DENSE].get(field)
      if curves and dense is not None:
        title = f'{shots} shots' if kind else ''
        lines = {name: _curve(sorted(found, key=lambda f: f[0])) for name, found in curves.items()}
        out[site, title] = Panel(lines, dense['accuracy']['mean'] if kind else dense)
  return out


def _curve(found: Sequence[tuple[float, Any]]) -> Curve:
  shares = np.array([share for share, _ in found])
  if not isinstance(found[0][1], Mapping):
    return Curve(shares, np.array([value for _, value in found]))
  bounds = np.array([value['interval'] for _, value in found])
  mean = np.array([value['accuracy']['mean'] for _, value in found])
  return Curve(shares, mean, bounds[:, 0], bounds[:, 1])


def _grid(summary: Mapping[str, Any]) -> tuple[np.ndarray, list[float], list[float]] | None:
  """Perplexity where heads and FFNs of one scorer, scored once, are closed together."""
  cells = {(0.0, 0.0): summary['points'][DENSE].get('perplexity', np.nan)}
  for point in list(summary['points'].values())[1:]:
    shares = budget(point)
    if 'perplexity' in point and label(point) == 'taylor' and set(shares) <= {'heads', 'ffn'}:
      cells[shares.get('heads', 0.0), shares.get('ffn', 0.0)] = point['perplexity']
  both = [key for key in cells if all(key)]
  if not both:
    return None
  heads, ffns = ([0.0, *sorted({key[i] for key in both})] for i in (0, 1))
  return np.array([[cells.get((h, f), np.nan) for f in ffns] for h in heads]), heads, ffns
