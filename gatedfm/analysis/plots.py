"""Figures of a run: learning curves, gate maps, accuracy and MACs against time.

Functions return `matplotlib.figure.Figure` and touch no global state, so they work in
threads, notebooks and reports alike; `save` writes them. The colours are those of Okabe
and Ito (2008), "Color Universal Design", told apart with any colour vision.
"""

import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib import figure as figures

from gatedfm import atomic, json_lines
from gatedfm.analysis import gate_maps

# Text and axes. An odd black, so that `to_svg` can tell it from others and let a dark
# page turn it light.
INK = '#16181d'
COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00')
MARKERS = 'osD^vPX<>p'
_STYLE = {
  'axes.axisbelow': True,
  'axes.edgecolor': INK,
  'axes.grid': True,
  'axes.labelcolor': INK,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlecolor': INK,
  'axes.titlesize': 11,
  'font.size': 10,
  'grid.alpha': 0.15,
  'grid.color': INK,
  'legend.frameon': False,
  'text.color': INK,
  'xtick.color': INK,
  'ytick.color': INK,
}
# Nothing to solid, so that closed modules recede on a light page and on a dark one.
_CLOSED_TO_OPEN = matplotlib.colors.LinearSegmentedColormap.from_list(
  'closed_to_open', [(0, 0.447, 0.698, 0.05), (0, 0.447, 0.698, 1)]
)
styled = matplotlib.rc_context(_STYLE)

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]


def read_curves(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads a metrics.jsonl: {name: (steps, values)}, steps ascending.

  A run logs some steps again after its resumption, of which the last counts.
  """
  points = {}
  for row in json_lines.read(Path(path)):
    step = row.pop('step')
    for name, value in row.items():
      if isinstance(value, int | float):
        points.setdefault(name, {})[step] = value
  return {
    name: (np.asarray(steps := sorted(values)), np.asarray([values[s] for s in steps]))
    for name, values in points.items()
  }


@styled
def learning_curves(runs: Mapping[str, Curves]) -> figures.Figure | None:
  """Loss and sparsity by step, one colour for each run.

  Args:
    runs: {point: {'train/loss', 'validation/loss', 'train/sparsity': (steps, values)}}; a panel
      that no run has data for is left out.

  Returns:
    None where no run has any of these curves.
  """
  panels = [
    ('loss (training pale)', ('train/loss', 'validation/loss'), 1),
    ('sparsity (%)', ('train/sparsity',), 100),
  ]
  panels = [panel for panel in panels if any(n in run for run in runs.values() for n in panel[1])]
  if not panels:
    return None
  colors = _colors(runs)
  figure = figures.Figure(figsize=(3.6 * len(panels) + 0.4, 3.4), layout='constrained')
  for axes, (title, names, scale) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
    axes.set(title=title, xlabel='step')
    for point, run in runs.items():
      for name in names:
        if name in run:
          steps, values = _thin(*run[name])
          training = name == 'train/loss'
          axes.plot(
            steps,
            values * scale,
            color=colors[point],
            alpha=0.4 if training else 1,
            linewidth=1 if training else 1.8,
            marker='' if training or len(steps) > 40 else 'o',
            markersize=3,
            label=point,
          )
    if scale == 100:
      axes.set_ylim(bottom=0)
  handles = {
    label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())
  }
  figure.legend(handles.values(), handles, loc='outside lower center', ncols=4)
  return figure


@styled
def gate_map(gates: gate_maps.GateMap) -> figures.Figure:
  """A heat map: contexts as rows, by task; modules as columns, by site and layer."""
  contexts, modules = gates.open_CxM.shape
  counts = [layers for _, layers in gates.sites]
  sizes = [gates.tasks.count(task) for task in dict.fromkeys(gates.tasks)]
  cell = min(0.26, 12 / modules)
  figure = figures.Figure(
    figsize=(cell * modules + 2.6, 0.2 * contexts + 1.8), layout='constrained'
  )
  axes = figure.add_subplot()
  axes.grid(False)
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0)
  x_edges, x_cells, columns = _cells(counts)
  y_edges, y_cells, rows = _cells(sizes)
  open_YxX = np.full((len(y_edges) - 1, len(x_edges) - 1), np.nan)
  open_YxX[np.ix_(rows, columns)] = gates.open_CxM
  image = axes.pcolormesh(
    x_edges, y_edges, open_YxX, vmin=0, vmax=1, cmap=_CLOSED_TO_OPEN, rasterized=True
  )
  axes.invert_yaxis()
  axes.set_yticks(y_cells, gates.languages)
  for task, middle in zip(dict.fromkeys(gates.tasks), _middles(y_cells, sizes)):
    axes.annotate(
      task.replace('_', ' '),
      (0, middle),
      xycoords=('axes fraction', 'data'),
      xytext=(-34, 0),
      textcoords='offset points',
      ha='right',
      va='center',
      fontweight='bold',
    )
  layers = np.concatenate([np.arange(1, count + 1) for count in counts])
  shown = (layers - 1) % (1 if modules <= 48 else 3) == 0
  axes.set_xticks(x_cells[shown], layers[shown], fontsize=7)
  axes.set_xlabel('layer')
  for (site, count), middle in zip(gates.sites, _middles(x_cells, counts)):
    label = site.replace('/', '\n', 1).replace('_', '\n')
    axes.annotate(
      label,
      (middle, 1),
      xycoords=('data', 'axes fraction'),
      xytext=(0, 4),
      textcoords='offset points',
      ha='center',
      va='bottom',
      fontsize=9 if cell * count > 0.7 else 7,
    )
  bar = figure.colorbar(image, ax=axes, shrink=min(1, 10 / contexts), pad=0.01)
  bar.set_ticks([0, 0.5, 1], labels=['closed', 'half', 'open'])
  bar.outline.set(edgecolor=INK, alpha=0.3)
  return figure


@styled
def quality_against_time(points: Mapping[str, Mapping[str, Any]]) -> figures.Figure | None:
  """Mean CER of each point against its measured time, as a share of the first's.

  Args:
    points: the 'points' of summary.json, the first of them the one that all are compared
      with. Those without a CER or time_ratio are left out.
      An optional 'interval': {'cer': [low, high]} gives error bars.

  Returns:
    None where the first point or every other lacks one of the numbers.
  """
  places = {
    name: (100 * point['time_ratio'], 100 * point['cer']['mean'])
    for name, point in points.items()
    if point.get('time_ratio') and (point.get('cer') or {}).get('mean') is not None
  }
  first = next(iter(points))
  if first not in places or len(places) == 1:
    return None
  figure, axes = _scatter(places, points)
  colors = _colors(points)
  for name, place in places.items():
    bounds = (points[name].get('interval') or {}).get('cer')
    reach = np.abs(100 * np.asarray(bounds) - place[1])[:, None] if bounds else None
    axes.errorbar(*place, yerr=reach, color=colors[name], alpha=0.6, capsize=3, lw=1)
  low, high = axes.get_ylim()
  pad = max(0.12 * (high - low), 0.5)
  axes.set(xlim=(0, 1.08 * max(x for x, _ in places.values())), ylim=(low - pad, high + pad))
  time, cer = places[first]
  axes.fill_between([0, time], low - pad, cer, color=COLORS[2], alpha=0.1, lw=0)
  axes.text(0.02, 0.03, 'ideal: faster, no worse', color=COLORS[2], transform=axes.transAxes)
  axes.set_xlabel(f'time for an utterance (% of {first})')
  axes.set_ylabel('CER, mean of the languages (%)')
  return figure


@styled
def macs_against_time(points: Mapping[str, Mapping[str, Any]]) -> figures.Figure | None:
  """Measured time of each point against its multiply-accumulates, both relative to the first's.

  On the diagonal every operation that is saved saves its share of the time.

  Returns:
    None where the first point or every other lacks one of the numbers.
  """
  key = 'macs_per_audio_second'
  first = next(iter(points))
  dense = points[first].get(key)
  places = {
    name: (100 * point[key] / dense, 100 * point['time_ratio'])
    for name, point in points.items()
    if dense and point.get('time_ratio') and point.get(key)
  }
  if first not in places or len(places) == 1:
    return None
  figure, axes = _scatter(places, points)
  top = max(max(place) for place in places.values()) * 1.08
  axes.plot([0, top], [0, top], color=INK, alpha=0.5, linestyle='--', linewidth=1)
  axes.set(xlim=(0, top), ylim=(0, top))
  axes.text(
    0.03 * top,
    0.05 * top,
    'ideal: time falls as MACs do',
    alpha=0.7,
    rotation=45,
    rotation_mode='anchor',
    transform_rotates_text=True,
  )
  axes.set_xlabel(f'MACs (% of {first})')
  axes.set_ylabel(f'time for an utterance (% of {first})')
  return figure


@styled
def time_against_macs(rows: Sequence[Mapping[str, Any]]) -> figures.Figure:
  """A benchmark's time over dense against the MACs kept, a marker per pattern, by way.

  Args:
    rows: with `way`, `macs_kept` and `ratio` (`median`, `q25`, `q75`).
  """
  figure = figures.Figure(figsize=(7.2, 4.2), layout='constrained')
  axes = figure.add_subplot()
  for number, way in enumerate(dict.fromkeys(row['way'] for row in rows)):
    mine = [row for row in rows if row['way'] == way]
    middle = np.array([row['ratio']['median'] for row in mine])
    low, high = (np.array([row['ratio'][q] for row in mine]) for q in ('q25', 'q75'))
    axes.errorbar(
      [row['macs_kept'] for row in mine],
      middle,
      (middle - low, high - middle),
      color=COLORS[number % len(COLORS)],
      marker=MARKERS[number % len(MARKERS)],
      linestyle='',
      label=way,
    )
  axes.plot([0, 1], [0, 1], color=INK, alpha=0.5, linestyle='--', linewidth=1, label='ideal')
  axes.set(xlim=(0, 1.05), xlabel='MACs kept (of dense)', ylabel='time (of dense)')
  axes.set_ylim(bottom=0)
  figure.legend(loc='outside right upper')
  return figure


def save(figure: figures.Figure, path: str | os.PathLike) -> None:
  """Writes a figure as its suffix says (.svg, .png, .pdf), atomically."""
  path, buffer = Path(path), io.BytesIO()
  with matplotlib.rc_context({'svg.hashsalt': path.stem}):
    figure.savefig(buffer, format=path.suffix[1:], dpi=160, metadata=_metadata(path.suffix[1:]))
  atomic.write_bytes(path, buffer.getvalue())


def to_svg(figure: figures.Figure, name: str) -> str:
  """An <svg> element to put into a page: text as text, ids of its own, ink as the page's.

  Args:
    figure: what to draw.
    name: an identifier that no other figure of the page has.
  """
  buffer = io.StringIO()
  with matplotlib.rc_context({'svg.hashsalt': name, 'svg.fonttype': 'none'}):
    figure.savefig(buffer, format='svg', transparent=True, metadata=_metadata('svg'))
  svg = buffer.getvalue()
  svg = svg[svg.index('<svg') :].replace(INK, 'currentColor')
  return re.sub(r'(\bid="|"#|url\(#)', rf'\1{name}-', svg)


def _metadata(suffix):
  if suffix != 'svg':
    return None
  # Nothing that names a time or an address: the same picture gives the same bytes.
  return dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))


def _colors(names):
  """{name: colour}: ink for the first, the palette for the others in their order."""
  first, *others = names
  return {first: INK} | {n: COLORS[i % len(COLORS)] for i, n in enumerate(others)}


def _thin(steps, values, limit=200):
  """Means of blocks, so that a long run does not make a large picture."""
  size = -(-len(steps) // limit)
  starts = np.arange(0, len(steps), size)
  counts = np.diff([*starts, len(steps)])
  return steps[starts + counts - 1], np.add.reduceat(values, starts) / counts


def _cells(counts: Sequence[int], gap=0.3):
  """Lays out groups of unit cells with gaps between: (edges, cell centres, cell index)."""
  widths, is_cell = [], []
  for count in counts:
    widths += [1] * count + [gap]
    is_cell += [True] * count + [False]
  edges = np.cumsum([0, *widths[:-1]])
  index = np.flatnonzero(is_cell)
  return edges, (edges[:-1] + edges[1:])[index] / 2, index


def _middles(centres, counts):
  return [group.mean() for group in np.split(centres, np.cumsum(counts)[:-1])]


def _scatter(places, points):
  """A marker for each place, told apart by colour and shape, and a legend beside them."""
  # As high as its legend.
  height = max(4.2, 0.23 * len(points) + 0.2)
  figure = figures.Figure(figsize=(7.2, height), layout='constrained')
  axes = figure.add_subplot()
  colors = _colors(points)
  for number, name in enumerate(points):
    if name in places:
      marker, size = ('*', 160) if number == 0 else (MARKERS[number % len(MARKERS)], 45)
      axes.scatter(*places[name], s=size, color=colors[name], marker=marker, label=name, zorder=3)
  figure.legend(loc='outside right upper')
  return figure, axes
