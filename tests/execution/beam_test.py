"""Beam search against all texts there are, against greedy decoding, and between executions."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import tiny_speech

from gatedfm.execution import beam, ctc_prefix, programs
from gatedfm.execution.decoding import Request, Search, Vocabulary
from gatedfm.execution.recognizer import Recognizer
from gatedfm.models.speech import SpeechModel
from gatedfm.models.speech_config import ConfigError
from gatedfm.nn import gating

VOCAB, FRAMES, EOS = 4, 5, 3  # blank, two letters, the end
WRITABLE = Vocabulary(EOS, np.array([False, True, True, True]), np.array([1]))
HISTORIES = 97


def ctc_frames(lengths, seed=0):
  logits = np.random.default_rng(seed).normal(0, 2, (len(lengths), FRAMES, VOCAB))
  logits[..., EOS] = -30  # CTC never emits the decoder's end
  mask = np.arange(FRAMES) < np.array(lengths)[:, None]
  return ctc_prefix.frames(np.float32(logits), mask)


def table(lengths, seed=1):
  """Log-probabilities `[B, HISTORIES, V]` of a decoder that remembers all that was written."""
  logits = np.random.default_rng(seed).normal(0, 1.5, (len(lengths), HISTORIES, VOCAB))
  return np.asarray(jax.nn.log_softmax(np.float32(logits)))


def remember(history, token):
  return (7 * history + token + 1) % HISTORIES


def search(lengths, options, weight=0.4, alone=False, count=None):
  """`beam.search` with that decoder (or none), whose cache is its memory: texts and scores."""
  log_probs, ctc = table(lengths), ctc_frames(lengths)

  def step(last_BxK, at, history_KxB):
    if count is not None:
      jax.debug.callback(lambda: count.append(1))
    # The primer's last token, which is written before anything, is none of the text's.
    history = jnp.where(at == 0, history_KxB.T, remember(history_KxB.T, last_BxK))
    return jax.vmap(lambda table, h: table[h])(jnp.asarray(log_probs), history), history.T

  b, length = len(lengths), options.lengths(FRAMES)[1]
  none = np.zeros(b, np.int32)
  x = Request(
    none, none, none, none, none[:, None], np.int32(length), weight, None, length, options
  )
  memory = jnp.zeros((options.beam, b), jnp.int32)
  follow = lambda memory, parent_BxK, at: jnp.take_along_axis(memory, parent_BxK.T, 0)
  decoder = None if alone else step
  run = lambda weight: beam.search(decoder, follow, memory, weight, ctc, x, WRITABLE)
  found = tiny_speech.jit(run)(np.float32(weight))
  jax.effects_barrier()
  return [
    [(tuple(t[t != EOS].tolist()), float(s)) for t, s in zip(*rows) if s > -np.inf]
    for rows in zip(np.asarray(found.tokens), np.asarray(found.score))
  ]


def every_text(lengths, b, options, weight=0.4, alone=False):
  """Score of every text of one utterance, one token at a time."""
  log_probs = table(lengths)[b]
  ctc = jax.tree.map(lambda a: a[b : b + 1], ctc_frames(lengths))
  least, most = options.lengths(lengths[b])
  scores = tiny_speech.jit(lambda prefix: ctc_prefix.scores(ctc, prefix, EOS))
  extend = tiny_speech.jit(lambda *args: ctc_prefix.extend(ctc, *args))
  out = {}

  def go_on(text, score, history, prefix):
    if len(text) == most:
      out[text] = score
      return
    heard = scores(prefix)
    for token in (1, 2, EOS):
      seen = 0.0 if alone else (1 - weight) * log_probs[history, token]
      new = score + seen + (1 if alone else weight) * float(heard[0, token])
      new += options.length_penalty
      if token == EOS:
        if len(text) >= least:
          out[text] = new
      else:
        one = jnp.array([token])
        longer = extend(prefix, one, heard[:, token])
        go_on((*text, token), new, remember(history, token), longer)

  go_on((), 0.0, 0, ctc_prefix.start(ctc))
  return out


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'length_penalty': 1.5},
    {'length_penalty': -0.7},
    {'maxlenratio': -2},
    {'maxlenratio': 0.5, 'minlenratio': 0.4, 'length_penalty': 0.1},
    {'minlenratio': -3},
  ],
  ids=str,
)
@pytest.mark.parametrize('alone', [False, True])
def test_wide_beams_find_the_best_of_all_texts(options, alone):
  options, lengths = Search(beam=40, **options), (FRAMES, 3)
  found = search(lengths, options, alone=alone)
  for b in range(2):
    expected = every_text(lengths, b, options, alone=alone)
    best = max(expected, key=expected.get)
    assert found[b][0][0] == best
    scores = [s for _, s in found[b]]
    assert scores == sorted(scores, reverse=True)
    assert len({t for t, _ in found[b]}) == len(found[b]) > 1
    for text, score in found[b]:
      np.testing.assert_allclose(score, expected[text], rtol=1e-4, atol=1e-4)


def test_ctc_alone_sums_over_paths():
  """Scores of whole texts are their log-probabilities over all alignments."""
  lengths = (FRAMES, 4)
  found, ctc = search(lengths, Search(beam=30), alone=True), ctc_frames(lengths)
  for b, length in enumerate(lengths):
    probs, sums = np.float64(ctc.probs[b, :length]), {}
    for path in itertools.product(range(VOCAB), repeat=length):
      text = tuple(k for k, _ in itertools.groupby(path) if k)
      sums[text] = sums.get(text, 0.0) + probs[np.arange(length), list(path)].prod()
    assert found[b][0][0] == max(sums, key=sums.get)
    for text, score in found[b]:
      if len(text) < length:  # the longest ends unscored
        np.testing.assert_allclose(score, np.log(sums[text]), rtol=1e-3)


def test_narrow_beams_keep_the_best_of_each_step():
  """ESPnet's rule, by hand: the best K of all continuations, the ended ones among them."""
  lengths, k = (FRAMES,), 2
  options = Search(beam=k)
  expected = every_text(lengths, 0, options, weight=0.0)
  log_probs = table(lengths)[0]
  running, ended = [((), 0.0, 0)], {}
  for at in range(FRAMES):
    more = [(t, s + log_probs[h, n], h, n) for t, s, h in running for n in (1, 2, EOS)]
    more = sorted(more, key=lambda m: -m[1])[:k]
    running = [((*t, n), s, remember(h, n)) for t, s, h, n in more if n != EOS]
    ended |= {t: s for t, s, _, n in more if n == EOS}
    if at == FRAMES - 1:
      ended |= {t: s for t, s, _ in running}
  best = max(ended, key=ended.get)
  found = search(lengths, options, weight=0.0)[0]
  assert found[0][0] == best
  np.testing.assert_allclose(found[0][1], expected[best], rtol=1e-5)


def test_searching_ends_with_the_last_utterance():
  """No step is taken for what is known, and padding takes none."""

  def steps(lengths, penalty=0.0):
    search(lengths, Search(beam=3, length_penalty=penalty), count=(count := []))
    return len(count)

  assert steps((0, 0)) == 0
  assert steps((3, 0)) == steps((3,)) <= 3
  # Dear tokens make an early end the best; cheap ones may bring the best until the last.
  assert steps((FRAMES,), -9.0) < steps((FRAMES,), 9.0)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'beam': 0}, 'beam of 0 holds no hypothesis'),
    ({'beam': 2, 'length_penalty': float('nan')}, 'length_penalty is nan; it must be a number'),
    ({'maxlenratio': float('inf')}, 'maxlenratio is inf'),
    ({'maxlenratio': -2.5}, 'maxlenratio -2.5: below 0 it is a number of tokens'),
    ({'maxlenratio': 0.2, 'minlenratio': 0.3}, 'more tokens than maxlenratio 0.2 allows'),
    ({'maxlenratio': -2, 'minlenratio': -3}, 'more tokens than maxlenratio -2'),
    ({'minlenratio': 1.5}, 'more tokens than maxlenratio 1.0'),
    ({'length_penalty': 1.0}, 'length_penalty needs a beam above 1'),
    ({'decoder': False, 'maxlenratio': 0.5}, 'the best CTC path has the length that it has'),
  ],
)
def test_options_that_cannot_be(options, message):
  with pytest.raises(ConfigError, match=message):
    Search(**options)


def test_lengths_are_espnets():
  assert Search().lengths(7) == (0, 7)
  assert Search(maxlenratio=0.01).lengths(7) == (0, 1)
  assert Search(maxlenratio=0.3, minlenratio=0.1).lengths(10) == (1, 3)
  assert Search(maxlenratio=-4, minlenratio=-2).lengths(10) == (2, 4)
  assert Search(maxlenratio=-4, minlenratio=0.5).lengths(10) == (4, 4)
  assert Search(maxlenratio=-4).lengths(0) == (0, 0)


# The real model, with caches.


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """So that these short texts take several."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(beam, '_BLOCK', 4)
    yield


LANGUAGES = ['fra', 'rus', 'rus']
LENGTHS = np.array([64, 50, 33], np.int32)


@pytest.fixture(scope='module')
def assets(tone_data):
  return tiny_run.make_assets(tiny_run.dense(tone_data))


@pytest.fixture(scope='module')
def trained(tone_data, assets):
  """A gated model of random parameters, whose texts end and follow the speech."""
  cfg, params = tiny_run.random_model(tone_data, assets)
  output = params['decoder']['output']
  output['bias'] = output['bias'].at[-2].add(3.0)
  return cfg, params


@pytest.fixture(scope='module')
def make(trained, assets, fast_compilation):
  return lambda execution, **options: Recognizer(
    *trained, assets, execution, ctc_weight=0.4, search=Search(**options)
  )


def features(rows=slice(None)):
  mel = np.random.default_rng(0).normal(-5, 4, (3, 64, 80)).astype(np.float32)
  mel = np.where(np.arange(64)[:, None] < LENGTHS[:, None, None], mel, 0)
  return mel[rows], LENGTHS[rows]


@pytest.fixture(scope='module')
def wide(make):
  return make('mask', beam=4, length_penalty=0.3)


def test_a_beam_of_one_is_greedy(make, monkeypatch):
  greedy = make('mask')
  expected = greedy(*features(), 'asr', LANGUAGES)
  monkeypatch.setattr(programs.decoding, 'greedy', beam.jointly)
  found = make('mask')(*features(), 'asr', LANGUAGES)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_array_equal(found.language, expected.language)
  np.testing.assert_array_equal(found.ctc, expected.ctc)
  assert found.hypotheses.shape == (3, 1, 16)


@pytest.mark.parametrize('task', ['asr', 'st_eng'])
def test_scores_are_those_of_whole_forward_passes(wide, trained, task):
  cfg, params = trained
  t, (mel, frames) = wide.tokenizer, features()
  found = wide(mel, frames, task, LANGUAGES)
  weight = 0.4 if task == 'asr' else 0.0
  context = gating.Context(
    jnp.array([t.language_id(x) for x in LANGUAGES]), jnp.full(3, t.task_id(task))
  )
  x = (mel - wide.stats.mean) / wide.stats.std
  run = tiny_speech.jit(
    lambda tokens: SpeechModel(cfg).apply({'params': params}, x, frames, tokens, context)
  )
  assert len({tuple(r) for r in np.asarray(found.hypotheses).reshape(12, -1).tolist()}) > 6
  for k in range(4):
    texts = np.asarray(found.hypotheses)[:, k]
    out = run(np.concatenate([wide.primer(task, LANGUAGES), texts], 1))
    seen = np.asarray(jax.nn.log_softmax(out.logits))[:, 2:]
    ctc = ctc_prefix.frames(out.ctc_logits, out.encoded.mask)
    prefix, heard = ctc_prefix.start(ctc), []
    for at in range(texts.shape[1]):
      scores = ctc_prefix.scores(ctc, prefix, t.eos)
      heard.append(scores)
      prefix = ctc_prefix.extend(ctc, prefix, texts[:, at], scores[np.arange(3), texts[:, at]])
    for b, limit in enumerate(np.asarray(ctc.mask).sum(1)):
      if found.scores[b, k] == -np.inf:
        continue
      said = (texts[b] != t.eos).sum()
      steps = range(said + (said < limit))  # the longest text ends unscored
      token = lambda at, b=b, texts=texts: texts[b, at]
      expected = sum(
        (1 - weight) * seen[b, at, token(at)] + weight * heard[at][b, token(at)] + 0.3
        for at in steps
      )
      np.testing.assert_allclose(found.scores[b, k], expected, rtol=1e-3, atol=1e-3)


def test_a_beam_finds_better_texts(make, wide):
  greedy = make('mask')(*features(), 'asr', LANGUAGES)
  found = wide(*features(), 'asr', LANGUAGES)
  assert (np.asarray(greedy.tokens) != np.asarray(found.tokens)).any()
  (best, score), *others = wide.nbest(found)[0]
  assert best == wide.texts(found)[0]
  assert all(score >= s for _, s in others)


@pytest.mark.parametrize('execution', ['skip', 'static'])
def test_executions_agree(make, wide, trained, execution):
  """Utterances with all gates open, all closed and some of both; alone and in a batch."""
  some = tiny_speech.random_gates(trained[0], seed=2)
  columns = [jax.tree.map(f, some) for f in (jnp.ones_like, jnp.zeros_like, jnp.asarray)]
  each = jax.tree.map(lambda *gates: jnp.stack(gates, 1), *columns)
  together = wide(*features(), 'asr', LANGUAGES, each)
  other = make(execution, beam=4, length_penalty=0.3)
  for b in range(3):
    mine = other(*features(slice(b, b + 1)), 'asr', LANGUAGES[b : b + 1], columns[b])
    np.testing.assert_array_equal(mine.hypotheses[0], together.hypotheses[b])
    np.testing.assert_allclose(mine.scores[0], together.scores[b], rtol=1e-4, atol=1e-4)


def test_lengths_bound_texts(make):
  for options in ({}, {'beam': 3}):
    short = make('mask', maxlenratio=-3, minlenratio=-2, **options)
    found = short(*features(), 'asr', LANGUAGES)
    assert found.tokens.shape == (3, 3)
    written = (np.asarray(found.tokens) != short.tokenizer.eos).sum(1)
    assert set(written.tolist()) <= {2, 3}


def test_a_language_is_told_by_any_search(make, wide):
  greedy = make('mask')
  expected = greedy.languages(greedy(*features(), 'lid', [''] * 3))
  assert wide.languages(wide(*features(), 'lid', [''] * 3)) == expected


def test_options_are_programs_of_their_own(make):
  recognizer = make('mask', beam=2)
  keys = {
    recognizer._request(*features(), 'asr', LANGUAGES).key,
    dataclasses.replace(recognizer._request(*features(), 'asr', LANGUAGES), timestamps=True).key,
    make('mask', beam=3)._request(*features(), 'asr', LANGUAGES).key,
  }
  assert len(keys) == 3
