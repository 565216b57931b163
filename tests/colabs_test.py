"""The notebooks: their code compiles, and reads what a summary has."""

import ast
import json
import pathlib
import shutil

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SUMMARY = ROOT / 'configs' / 'gated_speech' / 'results' / 'quickstart.json'


def code_cells():
  """(name, code without the lines for the shell and for IPython) of every code cell."""
  for path in sorted((ROOT / 'colabs').glob('*.ipynb')):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    for number, cell in enumerate(cells):
      if cell['cell_type'] == 'code':
        yield f'{path.stem}-{number}', ''.join(map(plain, cell['source']))


def plain(line):
  """A line for Python; `pass` in the place of one for the shell or IPython."""
  code = line.lstrip()
  return line[: -len(code)] + 'pass\n' if code[:1] in ('!', '%') else line


CELLS = dict(code_cells())
READERS = [name for name, code in CELLS.items() if 'summary.json' in code]


@pytest.mark.parametrize('name', CELLS)
def test_cells_compile(name):
  ast.parse(CELLS[name])


@pytest.mark.parametrize('name', READERS)
def test_what_a_cell_reads_of_the_summary_is_there(name, tmp_path, monkeypatch, capsys):
  (tmp_path / 'runs' / 'quickstart').mkdir(parents=True)
  shutil.copy(SUMMARY, tmp_path / 'runs' / 'quickstart' / 'summary.json')
  monkeypatch.chdir(tmp_path)
  exec(compile(CELLS[name], name, 'exec'), {})
  printed = capsys.readouterr().out
  assert all(point in printed for point in json.loads(SUMMARY.read_text())['points'])


def test_there_is_such_a_cell():
  assert READERS
