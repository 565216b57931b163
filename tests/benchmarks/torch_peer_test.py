"""Without torch: what cannot be compared is told before anything is compiled."""

import dataclasses
import sys

import pytest

from gatedfm.benchmarks import stacks, torch_stacks
from gatedfm.models.speech_config import ConfigError

MODEL = stacks.model('2x8', 'float32', 11)


def test_what_is_missing_is_told_with_the_mend(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  torch_stacks.load.cache_clear()
  with pytest.raises(ConfigError, match=r'needs torch and ESPnet.*bash tests/parity/install\.sh'):
    stacks.run(stacks.Case('encoder', MODEL, against='torch'))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'dtype': 'bfloat16'}, '--dtype=float32'),
    ({'encoder': 'transformer'}, 'e_branchformer, not transformer'),
  ],
)
def test_what_cannot_be_compared(change, message):
  model = dataclasses.replace(MODEL, **change)
  with pytest.raises(ConfigError, match=message):
    stacks.run(stacks.Case('encoder', model, against='torch'))


def test_against_torch_a_batch_has_one_pattern():
  with pytest.raises(ConfigError, match='one pattern, not 2 contexts'):
    stacks.run(stacks.Case('encoder', MODEL, batch=2, contexts=2, against='torch'))


def test_against_what():
  with pytest.raises(ConfigError, match="against is 'theano'"):
    stacks.run(stacks.Case('encoder', MODEL, against='theano'))
