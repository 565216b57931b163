"""What our code imports of its own: names that exist, and no module through others itself."""

import ast
import graphlib
import importlib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for top in ('gatedfm', 'configs') for p in (ROOT / top).rglob('*.py'))


def _modules(tree: ast.AST) -> dict[str, types.ModuleType]:
  """What a file's names mean, of those that it imports as modules of ours, wherever it does."""
  out = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module.split('.')[0] in ('gatedfm', 'configs'):
      for alias in node.names:
        value = getattr(importlib.import_module(node.module), alias.name, None)
        if value is None:
          value = importlib.import_module(f'{node.module}.{alias.name}')
        if isinstance(value, types.ModuleType):
          out[alias.asname or alias.name] = value
  return out


def missing(source: str) -> list[str]:
  """`module.name` of every such name that is not there."""
  tree = ast.parse(source)
  modules = _modules(tree)
  # A parameter or variable may bear a module's name.
  own = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
  own |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
  return [
    f'{node.value.id}.{node.attr}'
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
    and isinstance(node.value, ast.Name)
    and node.value.id in modules.keys() - own
    and not hasattr(modules[node.value.id], node.attr)
  ]


def test_a_missing_name_is_seen():
  source = 'def f():\n  from gatedfm.data import sources\n  sources.load, sources.nothing'
  assert missing(source) == ['sources.nothing']


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_exist(path):
  assert missing(path.read_text(encoding='utf-8')) == []


def test_no_module_imports_itself_through_others():
  """Also not where a function imports it, which only hides a cycle."""
  names = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in FILES}
  imports = {}
  for name, path in names.items():
    nodes = ast.walk(ast.parse(path.read_text(encoding='utf-8')))
    taken = (n for n in nodes if isinstance(n, ast.ImportFrom))
    both = {x for n in taken for a in n.names for x in (n.module, f'{n.module}.{a.name}')}
    imports[name] = both & names.keys()
  graphlib.TopologicalSorter(imports).prepare()
