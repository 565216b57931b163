"""Programs per gate pattern write what one program for all gates writes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import tiny_speech

from gatedfm import gates as gates_lib
from gatedfm.execution.recognizer import Recognizer
from gatedfm.execution.stream import Batcher, Waiting, serve
from gatedfm.gates import Gates
from gatedfm.models.speech_config import ConfigError
from gatedfm.trainers import step

OTHERS = ('scanned', 'layerwise', 'bucketed')
LANGUAGES = ['fra', 'rus', 'rus']


@pytest.fixture(scope='module')
def assets(tone_data):
  return tiny_run.make_assets(tiny_run.dense(tone_data))


def make(tone_data, assets, executions=('skip', 'static'), **changes):
  """Recognizers of one gated model of random parameters, whose gates follow their context."""
  model = tiny_run.random_model(tone_data, assets, **changes)
  return [Recognizer(*model, assets, x, ctc_weight=0.5) for x in executions]


@pytest.fixture(scope='module')
def others(tone_data, assets, fast_compilation):
  return dict(zip(OTHERS, make(tone_data, assets, OTHERS)))


@pytest.fixture(scope='module')
def pair(tone_data, assets, fast_compilation):
  return make(tone_data, assets)


def features(b, frames=(64, 50, 33)):
  mel = np.random.default_rng(b).normal(-5, 4, (1, 64, 80)).astype(np.float32)
  mel[:, frames[b] :] = 0
  return mel, np.array([frames[b]], np.int32)


def assert_same(a, b):
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.ctc, b.ctc)
  np.testing.assert_array_equal(a.language, b.language)
  assert set(a.gates.values) == set(b.gates.values)
  for name, gates in a.gates.values.items():
    np.testing.assert_array_equal(gates, b.gates[name])


def check(skip, static):
  """All tasks and utterances; returns the patterns met."""
  patterns = set()
  for b, task in itertools.product(range(3), ('asr', 'st_eng', 'lid')):
    mine = static(*features(b), task, [LANGUAGES[b]])
    assert_same(skip(*features(b), task, [LANGUAGES[b]]), mine)
    patterns.add(gates_lib.pattern(mine.gates, static.cfg.all_sites()))
  return patterns


def test_static_writes_what_skip_writes(pair):
  assert len(check(*pair)) > 2


@pytest.mark.parametrize('execution', OTHERS)
def test_every_execution_writes_what_skip_writes(pair, others, execution):
  assert len(check(pair[0], others[execution])) > 2
  one = gates_lib.all_open(pair[0].cfg.all_sites())
  for gates in (one, jax.tree.map(jnp.zeros_like, one), tiny_speech.random_gates(pair[0].cfg, 3)):
    a, b = (r(*features(0), 'asr', ['fra'], gates) for r in (pair[0], others[execution]))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.ctc, b.ctc)


def test_bucketed_batches_mix_what_others_refuse(pair, others):
  mel, frames = (np.concatenate(x) for x in zip(*map(features, range(3))))
  together = others['bucketed'](mel, frames, 'asr', LANGUAGES)
  for b in range(3):
    alone = pair[0](*features(b), 'asr', [LANGUAGES[b]])
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[b])
  with pytest.raises(ValueError, match="skip needs one gate .* execution='bucketed'"):
    pair[0](mel, frames, 'asr', LANGUAGES)


def test_compact_writes_what_skip_writes_with_fewer_parameters(tone_data, assets, fast_compilation):
  skip, compact = make(tone_data, assets, ('skip', 'compact'), context=())
  for b, task in itertools.product(range(2), ('asr', 'lid')):
    a, c = (r(*features(b), task, [LANGUAGES[b]]) for r in (skip, compact))
    assert_same(a, c)
  size = lambda r: sum(x.size for x in jax.tree.leaves(r.params))
  pattern = gates_lib.pattern(a.gates, skip.cfg.all_sites())
  assert 0 < pattern.open_fraction < 1
  assert size(compact) < size(skip)
  with pytest.raises(ValueError, match='has closed modules no longer'):
    compact(*features(0), 'asr', ['fra'], a.gates)


def test_compact_takes_a_pattern_and_else_needs_one(tone_data, assets, pair):
  cfg, params = pair[0].cfg, step.nn.unbox(step.init_params(pair[0].cfg, jax.random.key(0)))
  everything = gates_lib.all_open(cfg.all_sites())
  pattern = gates_lib.pattern(everything, cfg.all_sites())
  given = Recognizer(cfg, params, assets, 'compact', pattern=pattern)
  skip = Recognizer(cfg, params, assets, 'skip')
  a, b = given(*features(0), 'asr', ['fra']), skip(*features(0), 'asr', ['fra'], everything)
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.ctc, b.ctc)
  with pytest.raises(ConfigError, match='this model decides by context'):
    Recognizer(cfg, params, assets, 'compact')
  with pytest.raises(ConfigError, match="execution is 'sparse'; choose one of mask, bucketed"):
    Recognizer(cfg, params, assets, 'sparse')


@pytest.mark.parametrize(
  'changes',
  [
    {'decoder_reads': 'subsampled'},
    {'stacks': ('encoder',)},
    {'stacks': ('decoder',)},
    {'context': ()},
    {'enabled': False},
  ],
  ids=str,
)
def test_whatever_decides(tone_data, assets, fast_compilation, changes):
  skip, static = make(tone_data, assets, **changes)
  for task in ('asr', 'lid'):
    a, b = (r(*features(1), task, ['rus']) for r in (skip, static))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.ctc, b.ctc)
    for name, gates in a.gates.values.items():  # a stack without predictor has none under skip
      np.testing.assert_array_equal(np.squeeze(gates), np.squeeze(b.gates[name]))


def test_all_open_and_all_closed(pair):
  one = gates_lib.all_open(pair[0].cfg.all_sites())
  for gates in (one, jax.tree.map(jnp.zeros_like, one), Gates({'encoder/ffn': 0.0})):
    a, b = (r(*features(0), 'asr', ['fra'], gates) for r in pair)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.ctc, b.ctc)


def test_a_pattern_is_compiled_once_and_for_what_is_open(pair):
  _, static = pair
  one = gates_lib.all_open(static.cfg.all_sites())
  closed = jax.tree.map(jnp.zeros_like, one)
  run = lambda gates: static(*features(0), 'asr', ['fra'], gates)
  run(one), run(closed)
  sizes = [len(p) for p in static._programs.compiled()]
  flops = {}
  for key, program in static._programs._encode._programs.items():
    flops[key[-1]] = program.result().cost_analysis()['flops']
  sites = static.cfg.all_sites()
  pattern = lambda gates: gates_lib.pattern(gates, sites).stack('encoder')
  assert flops[pattern(closed)] < 0.5 * flops[pattern(one)]
  run(one), run(closed), static(*features(0), 'st_eng', ['rus'], one)
  assert [len(p) for p in static._programs.compiled()] == sizes


def test_examples_of_a_batch_share_their_gates(pair):
  _, static = pair
  mel, frames = (np.concatenate(x) for x in zip(features(0), features(1)))
  sites = static.cfg.all_sites()
  one = {s.name: np.ones((s.layers, 2)) for s in sites}
  together = static(mel, frames, 'asr', ['fra', 'rus'], Gates(one))
  for b in range(2):
    alone = static(*features(b), 'asr', [LANGUAGES[b]], gates_lib.all_open(sites))
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[b])
  one['encoder/ffn'] = np.array([[1.0, 0.0]])
  with pytest.raises(ValueError, match='encoder/ffn differ by example.*utterances of one pattern'):
    static(mel, frames, 'asr', ['fra', 'rus'], Gates(one))


def test_gates_may_be_lists_or_a_fixed_pattern(pair):
  pattern = gates_lib.pattern(gates_lib.all_open(pair[0].cfg.all_sites()), pair[0].cfg.all_sites())
  for gates in (pattern.fixed(), Gates({'encoder/ffn': [1]}), Gates({'encoder/ffn': (1.0,)})):
    a, b = (r(*features(0), 'asr', ['fra'], gates) for r in pair)
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_what_skip_and_static_cannot_do(tone_data, assets, pair):
  for recognizer in pair:
    with pytest.raises(ValueError, match="encoder/ffn lie between open and closed.*'mask'"):
      recognizer(*features(0), 'asr', ['fra'], Gates({'encoder/ffn': 0.5}))
  _, static = pair
  with pytest.raises(ValueError, match='unknown sites'):
    static(*features(0), 'asr', ['fra'], Gates({'encoder/fnn': 0.0}))
  with pytest.raises(ValueError, match="layer by layer: use execution='skip'"):
    make(tone_data, assets, ('static',), scope='layer')


@pytest.mark.parametrize(('execution', 'sizes'), [('skip', (1,)), ('bucketed', (1, 3))])
def test_mixed_utterances_share_the_programs_of_their_shapes(pair, others, execution, sizes):
  """200 of two lengths, three tasks, two languages, and whatever gates follow from that."""
  recognizer = pair[0] if execution == 'skip' else others[execution]
  rng = np.random.default_rng(0)
  lengths, tasks = (48, 64), ('asr', 'st_eng', 'lid')
  kinds = [(lengths[a], tasks[b]) for a, b in zip(rng.integers(0, 2, 200), rng.integers(0, 3, 200))]
  patterns = set()

  def answer(batch):
    (frames,), (task,) = map(set, zip(*batch))
    mel = rng.normal(-5, 4, (len(batch), frames, 80)).astype(np.float32)
    valid = rng.integers(frames - 12, frames, len(batch)).astype(np.int32)
    languages = rng.choice(['fra', 'rus'], len(batch)).tolist()
    decoded = recognizer(mel, valid, task, languages)
    gates = np.concatenate([np.asarray(g) for g in decoded.gates.values.values()])
    patterns.update(map(bytes, gates.T))
    return batch

  for size in sizes:
    for frames in lengths:
      for program in recognizer.prepare(size, frames):
        program.result()
  for kind in kinds[:2]:  # what the host computes on the way is compiled once, too
    answer([kind])
  compiled = []
  listener = lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else 0
  jax.monitoring.register_event_duration_secs_listener(listener)
  stream = [Waiting(kind, 0.0, kind) for kind in kinds]
  served = list(serve(stream, answer, Batcher(sizes)))
  assert len(served) == 200
  assert len(patterns) > 5
  assert not compiled
