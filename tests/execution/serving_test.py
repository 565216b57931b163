"""A stream through a recognizer: every utterance has the answer that it has alone."""

import numpy as np
import pytest
import tiny_run

from gatedfm import compiling
from gatedfm.execution import serving
from gatedfm.execution.recognizer import Recognizer
from gatedfm.execution.serving import Utterance
from gatedfm.execution.stream import Batcher
from gatedfm.models.speech_config import ConfigError


@pytest.fixture(scope='module')
def model(tone_data, fast_compilation):
  assets = tiny_run.make_assets(tiny_run.dense(tone_data))
  cfg, params = tiny_run.random_model(tone_data, assets)
  return cfg, params, assets


@pytest.fixture(scope='module')
def coming():
  """Utterances of two lengths, two languages, three tasks."""
  rng = np.random.default_rng(0)
  kinds = [('asr', 'fra'), ('st_eng', 'rus'), ('lid', ''), ('asr', 'rus')]
  lengths = [50, 40, 100, 60, 64, 33, 90, 45, 128, 50, 50, 120]
  mel = lambda n: rng.normal(size=(n, 80)).astype(np.float32)
  return [Utterance(mel(n), *kinds[i % len(kinds)]) for i, n in enumerate(lengths)]


@pytest.mark.parametrize('execution', ['mask', 'bucketed'])
def test_answers_are_those_that_each_has_alone(model, coming, execution):
  recognizer, batcher = Recognizer(*model, execution, ctc_weight=0.5), Batcher((1, 2), latency=9)
  compiling.wait(serving.prepare(recognizer, batcher, [60, 100, 128]), print)
  programs = len(recognizer._programs.compiled()[0])
  assert programs == 4  # two lengths, two sizes
  served = list(serving.serve(recognizer, ((0.0, u) for u in coming), batcher))
  assert len(recognizer._programs.compiled()[0]) == programs
  texts = {id(u): text for u, text, _ in served}
  assert len(texts) == len(served) == len(coming)
  alone = Recognizer(*model, 'skip', ctc_weight=0.5)
  expected = [serving.answer(alone, [u])[0] for u in coming]
  assert [texts[id(u)] for u in coming] == expected
  assert len(set(expected)) > 4
  known = set(recognizer.tokenizer.languages)
  assert all((text in known) == (u.task == 'lid') for u, text, _ in served)


def test_one_pattern_at_a_time_takes_no_batches(model, coming):
  skip = Recognizer(*model, 'skip')
  with pytest.raises(ConfigError, match="execution='bucketed'"):
    next(serving.serve(skip, [(0.0, coming[0])], Batcher()))
  ((_, text, seconds),) = serving.serve(skip, [(0.0, coming[0])], Batcher((1,)))
  assert text == serving.answer(skip, coming[:1])[0]
  assert seconds > 0


def test_what_is_too_long_is_named(model):
  with pytest.raises(ValueError, match='cut the file'):
    _ = Utterance(np.zeros((4000, 80), np.float32), 'asr', 'fra').queue
