"""What a configuration refuses, and what it says of its gates."""

import dataclasses

import pytest

from gatedfm.models.speech_config import CONTEXTS, ConfigError, GateConfig, SpeechConfig, owsm


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'encoder': 'conformer'}, "model.encoder is 'conformer'; choose one of e_branchformer"),
    ({'dtype': 'float16'}, 'dtype'),
    ({'activation_dtype': 'auto'}, 'activation_dtype'),
    ({'remat': 'some'}, 'remat'),
    ({'execution': 'compact'}, 'execution'),
    ({'encoder_layers': 0}, 'encoder_layers'),
    ({'decoder_ffn': 0}, 'decoder_ffn'),
    ({'cgmlp': 0}, 'cgmlp'),
    ({'kernel': 0}, 'kernel'),
    ({'d': 100}, 'model.d=100'),
    ({'d': 33, 'heads': 3}, 'model.d=33'),
    ({'cgmlp': 33}, 'model.cgmlp=33'),
    ({'dropout': 1.0}, 'dropout'),
    ({'gates': GateConfig(context=('weather',))}, "gates.context is 'weather'"),
    ({'gates': GateConfig(stacks=('middle',))}, "gates.stacks is 'middle'"),
    ({'gates': GateConfig(enabled=True, stacks=())}, 'gates.stacks is empty'),
    ({'gates': GateConfig(combine='multiply')}, 'gates.combine'),
    ({'gates': GateConfig(scope='module')}, 'gates.scope'),
    ({'gates': GateConfig(decoder_reads='tokens')}, 'gates.decoder_reads'),
    ({'gates': GateConfig(threshold=1.0)}, 'model.gates.threshold'),
    ({'gates': GateConfig(context='speech')}, r"model.gates.context is .* tuple: \('speech',\)"),
    ({'gates': GateConfig(hidden=32)}, r'model.gates.hidden is 32; write a tuple: \(32,\)'),
    ({'gates': GateConfig(hidden=(32, 0))}, 'widths of model.gates.hidden'),
    ({'gates': GateConfig(features=0)}, 'model.gates.features'),
  ],
)
def test_what_cannot_be_built_is_named(changes, named):
  with pytest.raises(ConfigError, match=named):
    dataclasses.replace(SpeechConfig(), **changes).validate()


@pytest.mark.parametrize('size', ['base', 'small', 'medium'])
def test_owsm_validates(size):
  owsm(size).validate()


def test_sites():
  cfg = SpeechConfig(encoder_layers=3, decoder_layers=2)
  assert {s.name: s.layers for s in cfg.all_sites()} == {
    'encoder/ffn1': 3,
    'encoder/attention': 3,
    'encoder/cgmlp': 3,
    'encoder/ffn2': 3,
    'decoder/self_attention': 2,
    'decoder/cross_attention': 2,
    'decoder/ffn': 2,
  }
  cfg.gates.stacks = ('decoder',)
  assert {s.stack for s in cfg.sites()} == {'decoder'}
  assert not cfg.predicts('decoder')
  cfg.gates.enabled = True
  assert cfg.predicts('decoder')
  assert not cfg.predicts('encoder')


def test_configurations_do_not_share_gates():
  one, other = SpeechConfig(), SpeechConfig()
  one.gates.context = ()
  assert other.gates.context == CONTEXTS
