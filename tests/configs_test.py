"""Every configuration file gives something that can be run."""

import dataclasses
import importlib.util
import pathlib

import pytest

from gatedfm.evaluation.importance_config import ImportanceConfig, PrunedConfig
from gatedfm.evaluation.sweep import SweepConfig
from gatedfm.evaluation.table_config import TablePoint, TableSweepConfig
from gatedfm.trainers import config as config_lib
from gatedfm.trainers.config import TrainConfig
from gatedfm.trainers.text_config import TextTrainConfig

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / 'configs').rglob('*.py'))


def load(path, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))  # configurations build on each other
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def check(cfg):
  assert isinstance(cfg, TrainConfig | TextTrainConfig)
  cfg.validate()
  assert config_lib.from_dict(type(cfg), config_lib.to_dict(cfg)) == cfg


def fields(value, path=''):
  for field in dataclasses.fields(value):
    inner = getattr(value, field.name)
    yield f'{path}{type(value).__name__}.{field.name}', field.type
    if dataclasses.is_dataclass(inner):
      yield from fields(inner, path)


@pytest.mark.parametrize(
  'kind',
  [
    TrainConfig,
    TextTrainConfig,
    SweepConfig,
    ImportanceConfig,
    PrunedConfig,
    TableSweepConfig,
    TablePoint,
  ],
)
def test_fields_can_be_flags(kind):
  """ml_collections parses by the types themselves, not by their names."""
  cfg = kind('', TextTrainConfig()) if kind is TablePoint else kind()
  assert [name for name, own in fields(cfg) if isinstance(own, str)] == []


def test_there_are_configurations():
  assert {'tiny', 'quickstart', 'full', 'base'} <= {path.stem for path in FILES}


@pytest.mark.parametrize('path', FILES, ids=lambda path: f'{path.parent.stem}-{path.stem}')
def test_configuration(path, monkeypatch):
  module = load(path, monkeypatch)
  assert module.__doc__
  cfg = module.get_config()
  if isinstance(cfg, SweepConfig):
    cfg.validate()
    for name, point in cfg.points.items():
      check(point)
      # Gated points have a parent.
      assert point.init_from in cfg.points or not point.init_from, name
      assert point.init_from or not point.model.gates.enabled, name
    points = list(cfg.points.values())
    assert len({id(p.model) for p in points}) == len(points)
  elif isinstance(cfg, TableSweepConfig):
    cfg.validate()
    for point in cfg.points.values():
      check(point.train)
  elif isinstance(cfg, ImportanceConfig):
    cfg.validate()
  else:
    check(cfg)


@pytest.mark.parametrize('size', ['base', 'small', 'medium'])
def test_sizes(size, monkeypatch):
  path = ROOT / 'configs' / 'gated_speech' / 'base.py'
  cfg = load(path, monkeypatch).get_config(size)
  check(cfg)
  assert cfg.name.endswith(size)
