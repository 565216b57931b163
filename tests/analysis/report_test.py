import collections
import copy
import html.parser
import json
import re
import subprocess
import sys

import pytest

from gatedfm.analysis import report


class _Page(html.parser.HTMLParser):
  """Collects what a test wants to know of a page; checks that elements nest."""

  def __init__(self, text):
    super().__init__()
    self.open, self.text, self.attributes = [], [], []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, *pair) for pair in attrs]
    if tag != 'meta':
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.attributes += [(tag, *pair) for pair in attrs]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def _write(summary, tmp_path):
  path = tmp_path / 'out' / 'report.html'
  report.write_report(summary, path)
  assert [p.name for p in path.parent.iterdir()] == ['report.html']
  return path.read_text()


def test_the_numbers_of_the_summary_stand_in_the_page(summary, tmp_path):
  text = ' '.join(_Page(_write(summary, tmp_path)).text)
  dense, gated = summary['points']['dense'], summary['points']['gated_0.5']
  for number in (
    f'{100 * dense["cer"]["mean"]:.2f}',
    f'{100 * gated["cer"]["ell"]:.2f}',
    f'{100 * gated["wer"]["dan"]:.2f}',
    f'{gated["bleu"]["rus-eng"]:.1f}',
    f'{gated["chrf"]["fra-eng"]:.1f}',
    f'{100 * gated["lid"]["other_source"]:.1f}',
    f'{1000 * gated["seconds_per_utterance"]["median"]:.2f}',
    '50.5',
    '46.5',
    '62.0',
    '812',
    '648',
    summary['git_revision'],
    summary['device'],
    summary['versions']['flax'],
    summary['command'],
    '0, 1, 2',
    'decided above all by the task',
  ):
    assert number in text, number


def test_the_page_stands_alone(summary, tmp_path):
  page = _Page(_write(summary, tmp_path))
  for tag, name, value in page.attributes:
    assert tag not in ('script', 'link')
    if name in ('src', 'href', 'xlink:href'):
      assert value.startswith(('#', 'data:')), (tag, name, value)
    if not name.startswith('xmlns'):
      assert 'http' not in (value or '')
  ids = collections.Counter(value for _, name, value in page.attributes if name == 'id')
  assert max(ids.values()) == 1


def test_the_page_escapes_what_it_is_given(summary, tmp_path):
  evil = '<script>alert("&")</script>'
  for key in ('command', 'device', 'git_revision', 'created'):
    summary[key] = evil
  summary['versions'] = {evil: evil}
  summary['points'][evil] = summary['points'].pop('gated_0.5')
  summary['headline']['point'] = evil
  page = _write(summary, tmp_path)
  assert '<script' not in page
  assert evil in ''.join(_Page(page).text)


def test_nulls_and_missing_values_show_as_dashes(summary, tmp_path):
  bare = copy.deepcopy(summary)
  bare['headline'] = None
  del bare['data'], bare['versions']
  bare['points']['gated_0.3'] = {'cer': None, 'lid': {'same_source': 0.5}, 'gate_map': None}
  bare['points']['gated_0.7']['lid']['other_source'] = None
  bare['points']['gated_0.7']['gate_map'] = {'contexts': []}
  page = ''.join(_Page(_write(bare, tmp_path)).text)
  assert '–' in page
  assert 'None' not in page
  rows = {row[0]: row for row in report.results(bare)}
  assert rows['gated_0.3'][1:8] == ['–', '–', '–', '–', '50.0', '–', '–']
  assert rows['gated_0.7'][6] == '–'
  assert 'No gated point' in report.table(bare)
  for point in bare['points'].values():
    point['chrf'] = None
  assert 'chrF' in report.results(summary)[0]
  assert 'chrF' not in report.results(bare)[0]


def test_a_dense_model_alone_has_a_report(summary, tmp_path):
  summary['points'] = {'dense': summary['points']['dense']}
  summary['headline'] = {}
  page = _write(summary, tmp_path)
  assert 'Gate maps' not in page
  assert 'Accuracy against time' not in page
  assert 'Learning curves' in page


def test_headline(summary):
  summary['headline'] |= {
    'cer_difference': -0.0012,
    'cer_difference_interval': [-0.003, 0.001],
  }
  assert report.headline(summary) == (
    'gated_0.5 takes 62.0% of the time of dense at a CER of 14.31% against 14.00% of dense, a '
    'difference of -0.12 points (95% interval -0.30 to +0.10).'
  )
  summary['points']['gated_0.5']['parent'] = 'gated_0.3'
  assert '% of gated_0.3, a difference' in report.headline(summary)


def test_table_is_aligned(summary):
  lines = report.table(summary).splitlines()
  heading, rows = lines[0], lines[2:6]
  assert [row.split()[0] for row in rows] == [
    'dense',
    'gated_0.3',
    'gated_0.5',
    'gated_0.7',
  ]
  assert {len(row) for row in rows} == {len(heading)}
  assert len(heading) <= 110
  assert len(rows[2].split()) == 13


def test_curves_are_found_after_the_run_has_moved(summary, tmp_path):
  moved = tmp_path / 'moved'
  moved.mkdir()
  for name, point in summary['points'].items():
    (tmp_path / name).rename(moved / name)
    assert point['workdir'] == str(tmp_path / name)
  assert 'learning_curves' in report.make_figures(summary, moved)
  assert 'learning_curves' not in report.make_figures(summary, tmp_path)


def test_many_points_show_the_curves_of_dense_and_headline(summary, monkeypatch):
  for number in range(6):
    name = f'gated_extra_{number}'
    summary['points'][name] = summary['points']['gated_0.3'] | {'gate_map': None}
  assert len(report._curves(summary, report.Path('.'))) == 4  # one for each workdir
  monkeypatch.setattr(report, '_MAX_CURVES', 3)
  assert list(report._curves(summary, report.Path('.'))) == ['dense', 'gated_0.5']


def test_a_foreign_summary_is_refused_before_anything_is_written(summary, tmp_path):
  out = tmp_path / 'report.html'
  out.write_text('the old one')
  for change in ({'schema': 2}, {'points': {}}):
    with pytest.raises(ValueError, match='summary of schema 1'):
      report.write_report(summary | change, out)
  summary['points']['gated_0.3']['gate_map']['contexts'][0]['utterances'] = 0
  with pytest.raises(ValueError, match='no utterances'):
    report.write_report(summary, out)
  assert out.read_text() == 'the old one'


def test_command_line(summary, tmp_path):
  path = tmp_path / 'summary.json'
  path.write_text(json.dumps(summary))
  result = subprocess.run(
    [sys.executable, '-m', 'gatedfm.report', f'--summary={path}']
    + [f'--figures={tmp_path / "figures"}'],
    check=True,
    capture_output=True,
    text=True,
  )
  assert report.table(summary) in result.stdout
  assert (tmp_path / 'report.html').stat().st_size > 50_000
  names = {p.name for p in (tmp_path / 'figures').iterdir()}
  assert {
    'gate_map_gated_0.5.png',
    'quality_against_time.svg',
    'learning_curves.png',
  } <= names


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{"schema": 1', 'summary.json is no summary: Expecting'),
    ('[]', 'summary.json is no summary, which is a JSON object'),
    ('{"schema": 0}', 'summary.json has schema 0 and points []: evaluate again'),
  ],
)
def test_what_is_no_summary_is_refused_in_one_line(tmp_path, content, message):
  path = tmp_path / 'summary.json'
  path.write_text(content)
  with pytest.raises(ValueError, match=re.escape(message)) as refused:
    report.load(path)
  assert '\n' not in str(refused.value)


def test_the_page_names_the_split(summary, tmp_path):
  text = lambda: ' '.join(' '.join(_Page(_write(summary, tmp_path)).text).split())
  assert 'of the test split' in text()
  summary['split'] = 'validation'
  assert 'of the validation split' in text()
  assert 'test split' not in text()


def test_differences_to_the_parent(summary, tmp_path):
  assert report.differences(summary) == []
  for point in summary['points'].values():
    point['parent'] = 'dense'
    point['difference'] = {'cer': {'value': -0.01, 'low': -0.025, 'high': 0.004}}
  rows = report.differences(summary)
  assert [row[0] for row in rows] == ['point', 'gated_0.3', 'gated_0.5', 'gated_0.7']
  assert rows[1][1:4] == ['dense', '-1.00 (-2.50 to +0.40)', '–']
  assert '-1.00 (-2.50 to +0.40)' in ''.join(_Page(_write(summary, tmp_path)).text)


def test_markdown():
  assert report.markdown([['a', 'b'], ['1', '2']]) == '| a | b |\n|---|---|\n| 1 | 2 |'


def test_tables_have_the_results_first(summary):
  (title, rows), *others = report.tables(summary)
  assert title == 'Results'
  assert rows == report.results(summary)
  assert 'Closed modules by site, %' in dict(others)
