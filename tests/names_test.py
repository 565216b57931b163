"""Names that our code takes from our own modules exist: no path that tests miss can lack one."""

import ast
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
