"""Cached greedy decoding against the plain way, both executions, and what is refused."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import tiny_speech

from gatedfm.data.types import DataError
from gatedfm.execution import ctc_prefix, decoding
from gatedfm.execution import recognizer as recognizer_lib
from gatedfm.execution.auto import choose
from gatedfm.execution.recognizer import Recognizer
from gatedfm.gates import Pattern
from gatedfm.models.speech import SpeechModel
from gatedfm.models.speech_config import ConfigError
from gatedfm.nn import gating
from gatedfm.trainers import config as config_lib

LENGTHS = np.array([64, 50, 33, 64])
LANGUAGES = ['fra', 'rus', 'rus', 'fra']


@pytest.fixture(scope='module')
def assets(tone_data):
  return tiny_run.make_assets(tiny_run.dense(tone_data))


@pytest.fixture(scope='module')
def trained(tone_data, assets):
  """A gated model of random parameters, whose outputs are long and differ."""
  cfg, params = tiny_run.random_model(tone_data, assets)
  # Texts should end, but not all at once, and follow the speech.
  output = params['decoder']['output']
  output['bias'] = output['bias'].at[-2].add(3.0)
  read = params['decoder']['layers']['layers_0']['cross_attention']['attention']
  read['value']['kernel'], read['query']['kernel'] = (
    4 * read['value']['kernel'],
    4 * read['query']['kernel'],
  )
  return cfg, params


@pytest.fixture(scope='module')
def mask(trained, assets, fast_compilation):
  return Recognizer(*trained, assets, 'mask', ctc_weight=0)


@pytest.fixture(scope='module')
def skip(trained, assets, fast_compilation):
  return Recognizer(*trained, assets, 'skip', ctc_weight=0)


def features(seed=0, frames=LENGTHS):
  mel = np.random.default_rng(seed).normal(-5, 4, (len(frames), 64, 80)).astype(np.float32)
  return np.where(np.arange(64)[:, None] < frames[:, None, None], mel, 0), frames.astype(np.int32)


def plainly(recognizer, trained, mel, frames, task, languages, length, weight=0.0):
  """Greedy decoding by a whole forward pass for each token; and the first step's logits.

  CTC's share goes through all that was written for each token anew.
  """
  cfg, params = trained
  t = recognizer.tokenizer
  context = gating.Context(
    jnp.array([t.language_id(x) if task != 'lid' else 0 for x in languages]),
    jnp.full(len(languages), t.task_id(task)),
  )
  x = (mel - recognizer.stats.mean) / recognizer.stats.std
  forward = tiny_speech.jit(
    lambda tokens: SpeechModel(cfg).apply({'params': params}, x, frames, tokens, context)
  )
  symbols = [t.blank, t.unk] + [i for i, token in enumerate(t.tokens) if token[0] == '<']
  barred = [i for i in symbols if i != t.eos]
  names = [[f'<{x}>', f'<{task}>'] for x in languages]
  rows = np.full((len(languages), length), t.eos)
  rows[:, :3] = [[t.sos, *map(t.token_id, row)] for row in names]
  out = forward(rows)
  first = np.asarray(out.logits)[:, 0]
  ctc = ctc_prefix.frames(out.ctc_logits, out.encoded.mask)
  for at in range(2, length - 1):
    prefix = ctc_prefix.start(ctc)
    for i in range(3, at + 1):
      score = jnp.take_along_axis(ctc_prefix.scores(ctc, prefix, t.eos), rows[:, i : i + 1], 1)
      prefix = ctc_prefix.extend(ctc, prefix, rows[:, i], score[:, 0])
    attention = jax.nn.log_softmax(forward(rows).logits[:, at])
    heard = ctc_prefix.scores(ctc, prefix, t.eos)
    logits = np.array((1 - weight) * attention + weight * heard)
    logits[:, barred] = -np.inf
    ended = (rows[:, 3 : at + 1] == t.eos).any(1) | (at - 2 >= np.asarray(ctc.mask).sum(1))
    rows[:, at + 1] = np.where(ended, t.eos, logits.argmax(1))
  return rows[:, 3:], first


def test_joint_decoding_weighs_what_ctc_hears(mask, trained, assets):
  mel, frames = features()
  joint = Recognizer(*trained, assets, 'mask', ctc_weight=0.6)
  length = 3 + 64 // 4
  expected, _ = plainly(mask, trained, mel, frames, 'asr', LANGUAGES, length, weight=0.6)
  np.testing.assert_array_equal(joint(mel, frames, 'asr', LANGUAGES).tokens, expected)
  alone = mask(mel, frames, 'asr', LANGUAGES)
  assert (expected != np.asarray(alone.tokens)).any()
  # A translation is not what CTC hears.
  a, b = (r(mel, frames, 'st_eng', LANGUAGES) for r in (joint, mask))
  np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize('task', ['asr', 'st_eng'])
def test_cached_decoding_equals_whole_forward_passes(mask, trained, task):
  mel, frames = features()
  decoded = mask(mel, frames, task, LANGUAGES)
  length = 3 + 64 // 4
  expected, _ = plainly(mask, trained, mel, frames, task, LANGUAGES, length)
  np.testing.assert_array_equal(decoded.tokens, expected)
  written = (expected != mask.tokenizer.eos).sum(1)
  assert len(set(written)) > 1
  assert written.max() > 3
  assert len(set(map(tuple, expected.tolist()))) > 2
  texts = mask.texts(decoded)
  assert texts == [mask.tokenizer.decode(r[:n].tolist()) for r, n in zip(expected, written)]


def test_the_language_is_the_best_of_the_first_step(mask, trained):
  mel, frames = features()
  t = mask.tokenizer
  names = mask.languages(mask(mel, frames, 'lid', [''] * 4))
  _, first = plainly(mask, trained, mel, frames, 'lid', LANGUAGES, 4)
  ids = [t.token_id(f'<{x}>') for x in t.languages]
  assert names == [t.languages[i] for i in first[:, ids].argmax(1)]
  # A language that is named is not read.
  assert names == mask.languages(mask(mel, frames, 'lid', LANGUAGES))


def test_mask_and_skip_write_the_same(mask, skip):
  patterns, values = set(), set()
  mel, frames = features()
  for b, language in enumerate(LANGUAGES[:3]):
    one = mel[b : b + 1], frames[b : b + 1]
    for task in ('asr', 'st_eng'):
      a, c = mask(*one, task, [language]), skip(*one, task, [language])
      np.testing.assert_array_equal(a.tokens, c.tokens)
      np.testing.assert_array_equal(a.ctc, c.ctc)
      jax.tree.map(np.testing.assert_array_equal, a.gates, c.gates)
      gates = tuple(float(g.item()) for g in jax.tree.leaves(a.gates))
      patterns.add(gates)
      values.update(gates)
  assert len(patterns) > 1
  assert values == {0.0, 1.0}


def test_an_utterance_does_not_depend_on_its_batch(mask):
  mel, frames = features()
  whole = mask(mel, frames, 'asr', LANGUAGES)
  alone = mask(mel[2:3], frames[2:3], 'asr', ['rus'])
  np.testing.assert_array_equal(alone.tokens[0], whole.tokens[2])
  np.testing.assert_array_equal(alone.ctc[0], whole.ctc[2])
  assert not np.asarray(whole.ctc)[2, 8:].any()


def test_one_program_per_shape(skip):
  compiled = []
  listener = lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else 0
  mel, frames = features()
  skip(mel[:1], frames[:1], 'asr', ['fra'])
  (programs,) = skip._programs.compiled()
  number = len(programs)
  jax.monitoring.register_event_duration_secs_listener(listener)
  for b, task in ((1, 'asr'), (2, 'st_eng'), (3, 'lid')):
    jax.block_until_ready(skip(mel[b : b + 1], frames[b : b + 1], task, ['rus']))
  assert not compiled
  assert len(programs) == number
  assert skip.program_bytes() > sum(x.nbytes for x in jax.tree.leaves(skip.params))
  for program in skip.prepare(1, 48):
    program.result()
  assert compiled
  compiled.clear()
  skip(mel[:1, :48], np.minimum(frames[:1], 48), 'asr', ['fra'])
  assert not compiled
  assert len(programs) == number + 1


def test_the_number_of_new_tokens_can_be_capped(mask, trained, assets):
  mel, frames = features()
  short = Recognizer(*trained, assets, ctc_weight=0, search=decoding.Search(maxlenratio=-2))
  whole, capped = (r(mel, frames, 'asr', LANGUAGES) for r in (mask, short))
  assert capped.tokens.shape == (4, 2)
  np.testing.assert_array_equal(capped.tokens, whole.tokens[:, :2])


def test_given_gates_override_the_predictor(mask, trained):
  mel, frames = features()
  closed = jax.tree.map(jnp.zeros_like, tiny_speech.gates_lib.all_open(trained[0].sites()))
  decoded = mask(mel, frames, 'asr', LANGUAGES, closed)
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(decoded.gates))
  predicted = mask(mel, frames, 'asr', LANGUAGES)
  assert (np.asarray(decoded.ctc) != np.asarray(predicted.ctc)).any()


def test_gates_of_any_structure_one_after_the_other(mask, trained):
  """All mean the same: one FFN closed, the rest open."""
  mel, frames = features()
  Gates, name = tiny_speech.gates_lib.Gates, 'encoder/ffn'
  every = {s.name: np.ones(s.layers) for s in trained[0].sites()}
  run = lambda values: mask(mel, frames, 'asr', LANGUAGES, Gates(values))
  opened = run(every)
  closed = run(every | {name: jnp.zeros(1)})
  assert (np.asarray(opened.ctc) != np.asarray(closed.ctc)).any()
  for values in ({name: np.zeros((1, 4), int)}, {name: 0.0}, every | {name: False}):
    decoded = run(values)
    np.testing.assert_array_equal(decoded.tokens, closed.tokens)
    np.testing.assert_array_equal(decoded.ctc, closed.ctc)


def test_ctc_paths_collapse(mask):
  t = mask.tokenizer
  a, b, c = [i for i, token in enumerate(t.tokens) if token.isalpha()][:3]
  rows = np.array([[0, a, a, 0, a, b, b, c], [b, 0, 0, 0, 0, 0, 0, 0], [0] * 8])
  decoded = decoding.Decoded(tokens=rows, ctc=rows, language=rows, gates=None)
  assert mask.ctc_texts(decoded) == [t.decode([a, a, b, c]), t.decode([b]), '']


def test_texts_end_with_their_first_end_token(mask):
  t = mask.tokenizer
  words = t.encode('un chat')
  rows = np.full((3, len(words) + 2), t.eos)
  rows[0, : len(words)] = words
  rows[1, :] = (words * 3)[: rows.shape[1]]
  decoded = decoding.Decoded(tokens=rows, ctc=rows, language=rows, gates=None)
  assert mask.texts(decoded) == ['un chat', t.decode(rows[1]), '']


def test_primers(mask, trained, assets):
  t = mask.tokenizer
  name = lambda row: [t.tokens[i] for i in row]
  assert name(mask.primer('st_eng', ['rus'])[0]) == ['<sos>', '<rus>', '<st_eng>']
  assert name(mask.primer('lid', [''])[0]) == ['<sos>', '<eos>', '<eos>']
  timed = Recognizer(*trained, assets, notimestamps=True)
  assert name(timed.primer('asr', ['fra'])[0])[-1] == '<notimestamps>'
  assert timed.primer('lid', ['']).shape == timed.primer('asr', ['fra']).shape


def test_symbols_are_never_written(mask):
  t = mask.tokenizer
  written = {t.tokens[i] for i in np.flatnonzero(mask._programs._vocabulary.allowed)}
  assert {token for token in written if token[0] == '<'} == {'<eos>'}
  assert len(written) == t.vocab_size - sum(token[0] == '<' for token in t.tokens) + 1


def test_unknown_languages_and_tasks(mask):
  mel, frames = features()
  with pytest.raises(ValueError, match="unknown language 'deu'.*fra rus"):
    mask(mel, frames, 'asr', ['deu'] * 4)
  with pytest.raises(ValueError, match="unknown task 'st_fra'.*asr lid st_eng"):
    mask(mel, frames, 'st_fra', LANGUAGES)


@pytest.mark.parametrize(
  ('cut', 'message'),
  [
    (lambda mel, frames, names: (mel[..., :40], frames, names), r'not \[B, T, 80\]'),
    (lambda mel, frames, names: (mel, frames[:2], names), '4 utterances, 2 lengths and 4'),
    (lambda mel, frames, names: (mel, frames, names[:1]), '4 lengths and 1 languages'),
  ],
)
def test_arrays_that_do_not_belong_together(mask, cut, message):
  mel, frames, names = cut(*features(), LANGUAGES)
  with pytest.raises(ValueError, match=message):
    mask(mel, frames, 'asr', names)


def test_a_pattern_is_of_compact_alone(trained, assets):
  with pytest.raises(ConfigError, match='skip execution has no fixed pattern'):
    Recognizer(*trained, assets, 'skip', pattern=Pattern(()))


def test_buckets():
  assert [recognizer_lib.bucket(n) for n in (1, 64, 65, 3072)] == [64, 64, 128, 3072]
  with pytest.raises(ValueError, match=r'30\.7 s of audio.*at most 30.7 s: cut the file'):
    recognizer_lib.bucket(3073)


def test_loading_a_run(gated_run, tmp_path):
  loaded = Recognizer.load(gated_run, 'skip')
  assert loaded.cfg.gates.enabled
  assert loaded.tokenizer.languages == ('eng', 'fra', 'rus')
  assert loaded._ctc_weight == tiny_run.dense('').ctc_weight
  assert Recognizer.load(gated_run, 'skip', 0.9)._ctc_weight == 0.9
  said = []
  auto = Recognizer.load(gated_run, 'auto', say=said.append)
  target = config_lib.from_dict(
    config_lib.TrainConfig, json.loads((gated_run / 'config.json').read_text())
  ).sparsity.target
  assert auto.mixes == (target < 0.1)
  assert said == [str(choose('cpu', 1, 0, target))]
  with pytest.raises(ValueError, match='has no config.json; give the workdir of a speech model'):
    Recognizer.load(tmp_path)


def test_assets_of_another_model_are_refused(assets, tone_data, tmp_path):
  cfg = tiny_run.complete(tiny_run.dense(tone_data), assets)
  cfg.model.tasks = 2
  assets.save(tmp_path / 'assets')
  (tmp_path / 'config.json').write_text(json.dumps(config_lib.to_dict(cfg)))
  with pytest.raises(DataError, match=r'assets belongs to another.*tasks 3, model\.tasks is 2'):
    Recognizer.load(tmp_path)


def test_configurations_are_left_alone(trained, assets):
  before = copy.deepcopy(trained[0])
  Recognizer(*trained, assets, 'skip')
  assert trained[0] == before
