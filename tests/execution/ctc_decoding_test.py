"""CTC alone: no decoder in the program, the best path's text, times, and what it cannot do."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import tiny_speech

from gatedfm.execution import alignment, ctc_decoding, ctc_prefix
from gatedfm.execution.decoding import Search
from gatedfm.execution.recognizer import Recognizer
from gatedfm.nn import gating

LANGUAGES = ['fra', 'rus', 'rus']
LENGTHS = np.array([64, 50, 33], np.int32)


@pytest.fixture(scope='module')
def assets(tone_data):
  return tiny_run.make_assets(tiny_run.dense(tone_data))


@pytest.fixture(scope='module')
def trained(tone_data, assets):
  """Random parameters, with blanks and without symbols, which CTC never learns."""
  cfg, params = tiny_run.random_model(tone_data, assets)
  symbols = np.array([token[0] == '<' for token in assets.tokenizer.tokens])
  bias = jnp.where(symbols, -50.0, params['ctc']['bias'])
  params['ctc']['bias'] = bias.at[ctc_prefix.BLANK].set(1.0)
  params['ctc']['kernel'] = 3 * params['ctc']['kernel']  # rather sure of each frame
  return cfg, params


@pytest.fixture(scope='module')
def make(trained, assets, fast_compilation):
  cfg, params = trained
  alone = {name: p for name, p in params.items() if name != 'decoder'}
  return lambda execution='mask', decoder=False, **options: Recognizer(
    cfg, params if decoder else alone, assets, execution, search=Search(decoder=decoder, **options)
  )


@pytest.fixture(scope='module')
def path(make):
  return make()


def features(rows=slice(None)):
  mel = np.random.default_rng(0).normal(-5, 4, (3, 64, 80)).astype(np.float32)
  mel = np.where(np.arange(64)[:, None] < LENGTHS[:, None, None], mel, 0)
  return mel[rows], LENGTHS[rows]


def test_paths_collapse():
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 3, (20, 9))
  texts = [[k for k, _ in itertools.groupby(row) if k] for row in rows.tolist()]
  for length in (9, 3):
    found = np.asarray(ctc_decoding.collapsed(jnp.array(rows), length, 7))
    for row, text in zip(found.tolist(), texts):
      assert row == (text + [7] * 9)[:length]


def test_no_decoder_is_needed(path, make):
  """Its parameters are not even there."""
  joint = make(decoder=True)
  found, expected = (r(*features(), 'asr', LANGUAGES) for r in (path, joint))
  np.testing.assert_array_equal(found.ctc, expected.ctc)
  assert path.texts(found) == joint.ctc_texts(expected) == path.ctc_texts(found)
  assert len(set(path.texts(found))) > 1
  assert {name.split('/')[0] for name in found.gates.values} == {'encoder'}
  for name, gates in found.gates.values.items():
    np.testing.assert_array_equal(gates, expected.gates[name])


def test_a_beam_finds_texts_as_likely(path, make):
  """Than the best path's text, over all of its paths."""
  wide, (mel, frames) = make(beam=16), features()
  found, greedy = (r(mel, frames, 'asr', LANGUAGES) for r in (wide, path))
  assert [texts[0][0] for texts in wide.nbest(found)] == wide.texts(found)
  languages = jnp.array([wide.tokenizer.language_id(x) for x in LANGUAGES])
  context, eos = gating.Context(languages, jnp.zeros(3, jnp.int32)), wide.tokenizer.eos

  @tiny_speech.jit
  def score(params, x, frames, tokens):
    encoded = wide.model.apply({'params': params}, x, frames, context, method='encode')
    logits = wide.model.apply({'params': params}, encoded, method='ctc_logits')
    ctc, total = ctc_prefix.frames(logits, encoded.mask), jnp.zeros(3)
    prefix, done = ctc_prefix.start(ctc), jnp.zeros(3, bool)
    for at in range(tokens.shape[1]):
      gain = jnp.take_along_axis(ctc_prefix.scores(ctc, prefix, eos), tokens[:, at, None], 1)[:, 0]
      prefix = ctc_prefix.extend(ctc, prefix, tokens[:, at], gain)
      total, done = total + jnp.where(done, 0, gain), done | (tokens[:, at] == eos)
    return total

  ended = np.pad(greedy.tokens, ((0, 0), (0, 1)), constant_values=eos)
  x = (mel - wide.stats.mean) / wide.stats.std
  assert (found.scores[:, 0] >= score(wide.params, x, frames, ended) - 1e-3).all()


@pytest.mark.parametrize('execution', ['skip', 'static'])
@pytest.mark.parametrize('beam', [1, 3])
def test_executions_agree(make, path, execution, beam):
  together = (path if beam == 1 else make(beam=3))(*features(), 'asr', LANGUAGES)
  other = make(execution, beam=beam)
  for b in range(2):
    mine = other(*features(slice(b, b + 1)), 'asr', LANGUAGES[b : b + 1])
    np.testing.assert_array_equal(mine.tokens[0], together.tokens[b])
    assert set(mine.gates.values) == set(together.gates.values)


def test_times_follow_the_path(path):
  """The best path's text is aligned along that path."""
  found = path(*features(), 'asr', LANGUAGES, timestamps=True)
  for b in range(3):
    at, expected = 0, []
    for token, run in itertools.groupby(np.asarray(found.ctc[b]).tolist()):
      size = len(list(run))
      expected += [[at, at + size]] if token else []
      at += size
    assert np.asarray(found.spans[b, : len(expected)]).tolist() == expected
  words = path.words(found)
  assert [' '.join(w.text for w in row) for row in words] == path.texts(found)


def test_joint_texts_are_timed_too(make):
  joint = make('skip', decoder=True, maxlenratio=-5)
  mel, frames = features(slice(1))
  found = joint(mel, frames, 'asr', ['fra'], timestamps=True)
  plain = joint(mel, frames, 'asr', ['fra'])
  np.testing.assert_array_equal(found.tokens, plain.tokens)
  assert plain.spans is None
  ctc = ctc_prefix.Frames(*(jnp.zeros((1, 16, joint.cfg.vocab_size)),) * 2, jnp.ones((1, 16), bool))
  assert found.spans.shape == alignment.align(ctc, found.tokens, joint.tokenizer.eos).shape
  assert (np.diff(np.asarray(found.spans), axis=2) >= 0).all()


def test_what_ctc_cannot_do(path, make):
  mel, frames = features()
  message = 'CTC hears what is said and writes and aligns transcripts, not st_eng'
  with pytest.raises(ValueError, match=message):
    path(mel, frames, 'st_eng', LANGUAGES)
  with pytest.raises(ValueError, match=message):
    make(decoder=True)(mel, frames, 'st_eng', LANGUAGES, timestamps=True)


def test_languages_are_still_told(trained, assets, fast_compilation):
  cfg, params = trained
  alone, joint = (Recognizer(cfg, params, assets, search=Search(decoder=d)) for d in (False, True))
  a, b = (r.languages(r(*features(), 'lid', [''] * 3)) for r in (alone, joint))
  assert a == b
