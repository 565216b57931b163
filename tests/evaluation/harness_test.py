"""Language models under the evaluation harness, as far as that goes without it."""

import functools
import sys

import jax
import numpy as np
import pytest
import tiny_lm
import tiny_speech

from gatedfm.evaluation import harness
from gatedfm.execution import lm_workdir
from gatedfm.execution.generation import GREEDY, Sampling
from gatedfm.gates import Gates
from gatedfm.models.lm import for_inference
from gatedfm.models.speech_config import ConfigError


class Cache:
  """The harness's, that keeps what it is told."""

  def __init__(self):
    self.told = []

  def add_partial(self, *args):
    self.told.append(args)


def answering(folder, **options):
  out = harness.Answering(folder, **options)
  out.cache_hook = Cache()
  return out


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  return tiny_lm.saved(tmp_path_factory.mktemp('lm') / 'dense')


@functools.cache
def forward(folder):
  """Logits of a text's tokens, padded behind, where no token looks."""
  model = lm_workdir.load(folder)
  net, params = for_inference(model.cfg, model.params)
  return tiny_speech.jit(lambda ids: net.apply({'params': params}, ids[None])[0])


def expected(folder, context, target):
  """Token after token, each in a pass of its own."""
  total, greedy = 0.0, True
  for i, token in enumerate(target):
    ids = np.zeros(16, np.int32)
    size = len(context) + i
    ids[:size] = *context, *target[:i]
    log = jax.nn.log_softmax(forward(folder)(ids)[size - 1])
    total += float(log[token])
    greedy &= int(log.argmax()) == token
  return total, greedy


REQUESTS = [((1, 5, 3), (7,)), ((2,), (4, 9, 9)), ((8, 8, 1, 2, 6, 0, 3), (11, 2)), ((22,), (5,))]


def test_likelihoods(dense):
  ours = answering(dense)
  # What greedy decoding writes is among the requests.
  start = [1, 5, 3]
  best = []
  for _ in range(3):
    best.append(max(range(22), key=lambda t: expected(dense, start + best, [t])[0]))
  requests = [*REQUESTS, (tuple(start), tuple(best))]
  got = ours._loglikelihood_tokens([(('a', 'b'), list(c), list(t)) for c, t in requests])
  for (context, target), (value, greedy) in zip(requests, got):
    want, want_greedy = expected(dense, context, target)
    assert value == pytest.approx(want, abs=1e-4)
    assert greedy == want_greedy
  assert got[-1][1]
  assert not all(g for _, g in got)
  assert sorted(v for _, _, (v, _) in ours.cache_hook.told) == sorted(v for v, _ in got)


def test_a_pruned_model(dense, tmp_path):
  model = lm_workdir.load(dense)
  closed = Gates({'decoder/attention_heads': np.float32([[1, 1, 0, 0], [0, 0, 0, 0]])})
  lm_workdir.save(tmp_path / 'small', lm_workdir.compacted(model, closed, {}))
  got = answering(tmp_path / 'small')._loglikelihood_tokens(
    [(None, list(c), list(t)) for c, t in REQUESTS]
  )
  net, params = for_inference(model.cfg, model.params)
  for (context, target), (value, _) in zip(REQUESTS, got):
    ids = np.array([[*context, *target]], np.int32)
    log = jax.nn.log_softmax(net.apply({'params': params}, ids, None, closed)[0])
    want = sum(float(log[len(context) + i - 1, t]) for i, t in enumerate(target))
    assert value == pytest.approx(want, abs=1e-4)


def test_long_texts_lose_their_beginning(dense):
  ours = answering(dense, max_length=5)
  context, target = [1, 5, 3, 2, 8, 4], [7, 9]
  ((value, _),) = ours._loglikelihood_tokens([(None, context, target)])
  # The last target is not read: five tokens are.
  want, _ = expected(dense, context[-4:], target)
  assert value == pytest.approx(want, abs=1e-4)


def test_tokens(dense):
  plain, begun = answering(dense), answering(dense, add_bos_token=True)
  assert plain.tok_encode('w3 w4') == [3, 4]
  assert begun.tok_encode('w3 w4') == [22, 3, 4]
  assert begun.tok_encode('w3', add_special_tokens=False) == [3]
  assert plain.tok_encode('w3', add_special_tokens=True) == [3]
  assert plain.prefix_token_id == 22


@pytest.mark.parametrize(
  ('options', 'want'),
  [
    ({}, (9, GREEDY, [])),
    ({'until': '\n', 'max_gen_toks': 3}, (3, GREEDY, ['\n'])),
    ({'until': ['a', ''], 'do_sample': False, 'temperature': 0.7}, (9, GREEDY, ['a'])),
    ({'do_sample': True, 'top_p': 0.9}, (9, Sampling(1.0, 0.9), [])),
    ({'temperature': 0.5, 'num_beams': 1}, (9, Sampling(0.5), [])),
  ],
)
def test_options(options, want):
  assert harness._read(options, 9) == want


@pytest.mark.parametrize('option', [{'num_beams': 4}, {'top_k': 5}, {'length_penalty': 0.5}])
def test_options_that_would_change_the_text_are_refused(option):
  with pytest.raises(ConfigError, match=next(iter(option))):
    harness._read(option, 9)


def test_without_the_harness(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval.api.model', None)
  with pytest.raises(ConfigError, match='pip install lm_eval'):
    harness.register.__wrapped__()
