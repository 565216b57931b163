"""Turns summary.json into a table for the terminal and a report.html.

The report is one file without any link to elsewhere. Error rates, accuracies, sparsities
and time ratios are fractions in the summary and per cent in both outputs; BLEU and chrF
run from 0 to 100 as they stand. What the summary lacks, or holds as null, shows as '–'.
"""

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import figure as figures

from gatedfm import atomic
from gatedfm.analysis import gate_maps, plots, report_page

SCHEMA = 1
# Column heading, path in a point of the summary, factor, format.
_COLUMNS = (
  ('CER %', 'cer/mean', 100, '.2f'),
  ('CTC CER %', 'ctc_cer/mean', 100, '.2f'),
  ('WER %', 'wer/mean', 100, '.2f'),
  ('BLEU', 'bleu/mean', 1, '.1f'),
  ('chrF', 'chrf/mean', 1, '.1f'),
  ('LID %', 'lid/same_source', 100, '.1f'),
  ('LID* %', 'lid/other_source', 100, '.1f'),
  ('sparsity %', 'sparsity/modules', 100, '.1f'),
  ('by MACs %', 'sparsity/macs', 100, '.1f'),
  ('MMAC/s', 'macs_per_audio_second', 1e-6, '.1f'),
  ('ms/utt', 'seconds_per_utterance/median', 1000, '.2f'),
  ('time %', 'time_ratio', 100, '.1f'),
  ('MiB', 'peak_memory_bytes', 2**-20, '.0f'),
  ('compile s', 'compile_seconds', 1, '.0f'),
)
# Title, key of a point, factor, format of the tables that go into detail.
_DETAILS = (
  ('Character error rate by language, %', 'cer', 100, '.2f'),
  ('Word error rate by language, %', 'wer', 100, '.2f'),
  ('BLEU by direction', 'bleu', 1, '.1f'),
  ('chrF by direction', 'chrf', 1, '.1f'),
  ('Closed modules by site, %', 'sparsity/sites', 100, '.1f'),
  ('Time by task, % of the first point', 'time_ratio_by_task', 100, '.0f'),
)
# Column heading, metric and factor of the differences to a point's parent.
_DIFFERENCES = (
  ('CER', 'cer', 100),
  ('WER', 'wer', 100),
  ('BLEU', 'bleu', 1),
  ('chrF', 'chrf', 1),
  ('LID', 'lid', 100),
)
_MISSING = '–'
_MAX_CURVES = 6

Rows = list[list[str]]


def load(source: str | os.PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
  """Reads a summary from a path, or takes one that is read already.

  Raises:
    ValueError: it is no JSON, of another schema or has no points.
    FileNotFoundError: the path does not exist.
  """
  name, summary = 'this summary', source
  if not isinstance(source, Mapping):
    name = source
    try:
      summary = json.loads(Path(source).read_text(encoding='utf-8'))
    except ValueError as e:
      raise ValueError(f'{source} is no summary: {e}') from e
  if not isinstance(summary, Mapping):
    raise ValueError(f'{name} is no summary, which is a JSON object')
  if summary.get('schema') != SCHEMA or not summary.get('points'):
    raise ValueError(
      f'a summary of schema {SCHEMA} with at least one point is needed; {name} has schema '
      f'{summary.get("schema")!r} and points {list(summary.get("points") or ())}: evaluate '
      'again with this version'
    )
  return summary


def results(summary: Mapping[str, Any]) -> Rows:
  """The main table as text cells, the heading first and then a row for each point.

  Columns that no point has a value for are left out.
  """
  rows = [['point', *(heading for heading, *_ in _COLUMNS)]]
  for name, point in summary['points'].items():
    rows.append([name, *(_number(_get(point, p), f, s) for _, p, f, s in _COLUMNS)])
  known = [set(column[1:]) != {_MISSING} for column in zip(*rows)]
  return [list(itertools.compress(row, known)) for row in rows]


def table(summary: Mapping[str, Any]) -> str:
  """The results, aligned for a terminal, and the headline below.

  Columns: mean error rates (also of the CTC output alone), BLEU and chrF, accuracy of
  language identification on the same and on another source (LID*), closed modules, their
  MACs, all MACs for a second of audio, median time for an utterance, time relative to the
  first point's, memory of the largest program, seconds to compile (or to load what was compiled
  before) and to pass over the timed utterances once.
  """
  notes = 'LID*: another source. Texts are compared in lower case without punctuation.'
  return f'{aligned(results(load(summary)))}\n{notes}\n\n{headline(summary)}'


def differences(summary: Mapping[str, Any]) -> Rows:
  """What each point has more than its parent, the dense model that it was made of.

  Cells such as `+0.55 (-0.11 to +1.22)` hold the difference and its paired 95% interval over
  utterances, in points. Points without a parent are left out.
  """
  signed = lambda value, factor: _number(value, factor, '+.2f')
  rows = [['point', 'parent', *(heading for heading, *_ in _DIFFERENCES)]]
  for name, point in summary['points'].items():
    if point.get('parent') in (None, name):
      continue
    row = [name, point['parent']]
    for _, metric, factor in _DIFFERENCES:
      value, low, high = (
        _get(point, f'difference/{metric}/{key}') for key in ('value', 'low', 'high')
      )
      bounds = '' if low is None else f' ({signed(low, factor)} to {signed(high, factor)})'
      row.append(signed(value, factor) + bounds)
    rows.append(row)
  return rows if len(rows) > 1 else []


def markdown(rows: Rows) -> str:
  """Rows of text cells as a Markdown table."""
  lines = [f'| {" | ".join(row)} |' for row in rows]
  return '\n'.join([lines[0], f'|{"---|" * len(rows[0])}', *lines[1:]])


def aligned(rows: Rows) -> str:
  """Rows of text cells as a table for a terminal, a line below the heading."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = [
    '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
  ]
  lines.insert(1, '─' * len(lines[0]))
  return '\n'.join(lines)


def headline(summary: Mapping[str, Any]) -> str:
  """What the run found, in a sentence.

  Args:
    summary: its 'headline' has 'point', 'time_ratio' and 'cer_difference' to its parent, and
      may have 'cer_difference_interval': [low, high].
  """
  best = summary.get('headline') or {}
  name = best.get('point')
  if name is None:
    return 'No gated point was compared with a dense model.'
  points = summary['points']
  first = next(iter(points))
  ratio = _number(best.get('time_ratio'), 100, '.1f')
  parent = points[name].get('parent') or first
  cer, dense = (_number(_get(points[point], 'cer/mean'), 100, '.2f') for point in (name, parent))
  text = f'{name} takes {ratio}% of the time of {first} at a CER of {cer}%'
  text += f' against {dense}% of {parent}'
  difference, bounds = best.get('cer_difference'), best.get('cer_difference_interval')
  if difference is not None:
    text += f', a difference of {100 * difference:+.2f} points'
  if bounds:
    text += f' (95% interval {100 * bounds[0]:+.2f} to {100 * bounds[1]:+.2f})'
  return f'{text}.'


def make_figures(
  summary: Mapping[str, Any], folder: str | os.PathLike = '.'
) -> dict[str, figures.Figure]:
  """The figures that the summary has data for, by name.

  Names: 'quality_against_time', 'macs_against_time', 'learning_curves' and
  'gate_map_<point>'.

  Args:
    summary: as `load` gives it.
    folder: where to look for a workdir by its last name when it has moved.
  """
  points = summary['points']
  result = {
    'quality_against_time': plots.quality_against_time(points),
    'macs_against_time': plots.macs_against_time(points),
    'learning_curves': plots.learning_curves(_curves(summary, Path(folder))),
  }
  for name, gates in _gate_maps(summary).items():
    result[f'gate_map_{name}'] = plots.gate_map(gates)
  return {name: figure for name, figure in result.items() if figure is not None}


def write_report(
  source: str | os.PathLike | Mapping[str, Any], out_path: str | os.PathLike
) -> None:
  """Writes report.html from a summary or its path, atomically.

  Raises:
    ValueError: see `load` and `gate_maps.parse`; nothing is written then.
  """
  summary = load(source)
  out_path = Path(out_path)
  folder = out_path.parent if isinstance(source, Mapping) else Path(source).parent
  drawn = {
    name: plots.to_svg(figure, f'figure{number}')
    for number, (name, figure) in enumerate(make_figures(summary, folder).items())
  }
  maps = [
    (name, gate_maps.describe(gates), drawn[f'gate_map_{name}'])
    for name, gates in _gate_maps(summary).items()
  ]
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
  html = environment.from_string(report_page.TEMPLATE).render(
    summary=summary,
    headline=headline(summary),
    best=(summary.get('headline') or {}).get('point'),
    results=results(summary),
    details=_details(summary),
    data=_data(summary),
    maps=maps,
    drawn=drawn,
  )
  atomic.write_text(out_path, html)


def tables(summary: Mapping[str, Any]) -> list[tuple[str, Rows]]:
  """All tables of text cells, titled, the results first."""
  return [('Results', results(summary)), *_details(summary)]


def _details(summary) -> list[tuple[str, Rows]]:
  """Titled tables beside the main one."""
  tables = [('Difference to the parent, with its 95% interval', differences(summary))]
  tables += [(title, _detail(summary, *how)) for title, *how in _DETAILS]
  return [(title, rows) for title, rows in tables if rows]


def _get(tree, path):
  for key in path.split('/'):
    tree = (tree or {}).get(key)
  return tree


def _number(value, factor, spec):
  return _MISSING if value is None else format(value * factor, spec)


def _detail(summary, path, factor, spec) -> Rows:
  """A table of points by the keys under `path`; 'mean' is the last of the columns."""
  groups = {name: _get(point, path) or {} for name, point in summary['points'].items()}
  keys = dict.fromkeys(key for group in groups.values() for key in group)
  keys = sorted(keys, key='mean'.__eq__)
  if not keys:
    return []
  return [['point', *keys]] + [
    [name, *(_number(group.get(key), factor, spec) for key in keys)]
    for name, group in groups.items()
  ]


def _data(summary) -> Rows:
  """A table of languages by split."""
  splits = summary.get('data') or {}
  languages = dict.fromkeys(lang for split in splits.values() for lang in split)
  if not languages:
    return []
  rows = [['language', *(f'{split} {unit}' for split in splits for unit in ('utterances', 'h'))]]
  for lang in languages:
    cells = [splits[split].get(lang, {}) for split in splits]
    rows.append([lang])
    for cell in cells:
      rows[-1] += [
        _number(cell.get('utterances'), 1, 'd'),
        _number(cell.get('hours'), 1, '.2f'),
      ]
  return rows


def _gate_maps(summary) -> dict[str, gate_maps.GateMap]:
  """The maps of the gated points, that of the headline first."""
  best = (summary.get('headline') or {}).get('point')
  points = sorted(summary['points'].items(), key=lambda item: item[0] != best)
  return {
    name: gate_maps.parse(point['gate_map'])
    for name, point in points
    if _get(point, 'gate_map/contexts')
  }


def _curves(summary, folder: Path) -> dict[str, plots.Curves]:
  """The curves of all points that logged some, of the first and the headline if there are many."""
  best = (summary.get('headline') or {}).get('point')
  curves, seen = {}, set()
  for name, point in summary['points'].items():
    if not point.get('workdir'):
      continue
    workdir = Path(point['workdir'])
    options = (workdir / 'metrics.jsonl', folder / workdir.name / 'metrics.jsonl')
    path = next((path for path in options if path.is_file()), None)
    if path and path.resolve() not in seen:
      seen.add(path.resolve())
      curves[name] = plots.read_curves(path)
  if len(curves) > _MAX_CURVES:
    first = next(iter(summary['points']))
    curves = {name: curves[name] for name in (first, best) if name in curves}
  return curves
