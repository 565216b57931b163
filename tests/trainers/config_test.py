"""Configurations: unknown keys and flags, impossible values, what may change on a workdir."""

import copy
import dataclasses
import json
import operator
import pathlib
import sys

import pytest
import tiny_run
from absl import flags
from ml_collections import config_flags

from gatedfm.data.types import DataError
from gatedfm.evaluation.sweep import SweepConfig
from gatedfm.trainers import config as config_lib
from gatedfm.trainers.config import ConfigError, TrainConfig


def changed(path, value):
  cfg = tiny_run.dense('/tones')
  owner = cfg
  *parents, name = path.split('.')
  for parent in parents:
    owner = getattr(owner, parent)
  assert hasattr(owner, name), path
  setattr(owner, name, value)
  return cfg


@pytest.mark.parametrize('make', [tiny_run.dense, tiny_run.gated, lambda _: TrainConfig()])
def test_survives_json(make):
  cfg = make('/tones')
  values = json.loads(json.dumps(config_lib.to_dict(cfg)))
  assert config_lib.from_dict(TrainConfig, values) == cfg


@pytest.mark.parametrize(
  'owner', ['', 'model', 'model.gates', 'data', 'augment', 'optimizer', 'sparsity', 'mesh']
)
def test_a_field_that_is_misspelt_in_a_file_is_refused(owner):
  for cfg in (TrainConfig(), copy.deepcopy(TrainConfig())):
    part = operator.attrgetter(owner)(cfg) if owner else cfg
    with pytest.raises(AttributeError, match='stpes'):
      part.stpes = 3


def test_a_field_of_a_sweep_that_is_misspelt_in_a_file_is_refused():
  with pytest.raises(AttributeError, match='stpes'):
    SweepConfig().stpes = 3


def test_unknown_keys_are_named():
  values = config_lib.to_dict(TrainConfig())
  values['model']['width'] = 3
  with pytest.raises(ConfigError, match='SpeechConfig has no width; it has .*heads'):
    config_lib.from_dict(TrainConfig, values)


def parse(monkeypatch, *arguments):
  monkeypatch.setenv('TONES', '/tones')
  monkeypatch.setattr(sys, 'argv', ['train', *arguments])
  values = flags.FlagValues()
  path = str(pathlib.Path(tiny_run.__file__))
  config = config_flags.DEFINE_config_file('config', path, flag_values=values)
  values(['train', *arguments])
  return config.value


def test_flags_override_fields_with_their_types(monkeypatch):
  cfg = parse(
    monkeypatch, '--config.model.d=32', '--config.model.gates.enabled=True',
    "--config.data.tasks=('asr',)", '--config.optimizer.peak_lr=1e-2',
  )  # fmt: skip
  assert (cfg.model.d, cfg.model.gates.enabled) == (32, True)
  assert (cfg.data.tasks, cfg.optimizer.peak_lr) == (('asr',), 0.01)


@pytest.mark.parametrize('flag', ['--config.width=3', '--config.model.gates.off=1', '--width=3'])
def test_unknown_flags_are_refused(monkeypatch, flag):
  with pytest.raises((AttributeError, KeyError, flags.Error), match='width|off'):
    parse(monkeypatch, flag)


def test_values_of_another_type_are_refused(monkeypatch):
  with pytest.raises((flags.IllegalFlagValueError, ValueError), match='many'):
    parse(monkeypatch, '--config.model.d=many')


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('steps', 0, 'steps is 0'),
    ('keep', 0, 'keep is 0'),
    ('log_every', -1, 'log_every is -1'),
    ('ctc_weight', 1.5, 'ctc_weight'),
    ('smoothing', 1.0, 'smoothing'),
    ('model.d', 15, r'model\.d=15'),
    ('model.heads', 3, r'model\.heads=3'),
    ('model.kernel', 0, r'model\.kernel'),
    ('model.encoder', 'conformer', "'conformer'; choose one of e_branchformer"),
    ('model.dtype', 'float16', 'dtype'),
    ('model.dropout', 1.0, r'model\.dropout'),
    ('model.gates.threshold', 0.0, r'gates\.threshold'),
    ('model.gates.context', ('mood',), r'gates\.context'),
    ('model.mels', 40, r'model\.mels is 40, but features have 80'),
    ('model.subsampling_channels', -1, r'model\.subsampling_channels is -1'),
    ('optimizer.name', 'sgd', r'optimizer\.name'),
    ('optimizer.schedule', 'step', r'optimizer\.schedule'),
    ('optimizer.peak_lr', 0.0, r'optimizer\.peak_lr'),
    ('optimizer.warmup', 0, 'warmup'),
    ('sparsity.target', 1.0, r'sparsity\.target is 1'),
    ('sparsity.weight', -1.0, r'sparsity\.weight is -1'),
    ('sparsity.ramp', 1.1, r'sparsity\.ramp'),
    ('sparsity.freeze', 1.0, r'sparsity\.freeze'),
    ('sparsity.penalty', 'cubic', r'sparsity\.penalty'),
    ('sparsity.count', 'flops', r'sparsity\.count'),
    ('sparsity.tau_end', 0.0, r'sparsity\.tau'),
  ],
)
def test_impossible_values_name_their_field(path, value, message):
  with pytest.raises(ConfigError, match=message):
    changed(path, value).validate()


def test_gates_are_trained_by_masks():
  cfg = changed('model.execution', 'skip')
  cfg.validate()
  cfg.model.gates.enabled = True
  with pytest.raises(ConfigError, match=r'model\.execution is skip'):
    cfg.validate()


def test_impossible_data_is_refused_with_the_rest():
  with pytest.raises(DataError, match=r'data\.num_buckets is 0'):
    changed('data.num_buckets', 0).validate()


def test_one_parent_at_most():
  cfg = dataclasses.replace(tiny_run.dense('/tones'), init_from='a', continue_from='b')
  with pytest.raises(ConfigError, match='init_from and continue_from'):
    cfg.validate()


def test_differences_leave_operation_out():
  old = config_lib.to_dict(tiny_run.dense('/tones'))
  assert config_lib.differences(old, old) == []
  for path in config_lib.OPERATIONAL:
    assert config_lib.differences(old, config_lib.to_dict(changed(path, 7))) == []
  new = config_lib.to_dict(changed('model.gates.hidden', (8, 8)))
  assert config_lib.differences(old, new) == ['model.gates.hidden: [32] -> [8, 8]']
  del new['seed']
  assert 'seed: 0 -> None' in config_lib.differences(old, new)
