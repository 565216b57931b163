"""What a model writes is what whole forward passes, one for each token, would have written."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_speech
from flax import traverse_util
from tokenizers import Tokenizer, models, pre_tokenizers

from gatedfm import partitioning
from gatedfm.data import lm_batches
from gatedfm.data.bpe import LmTokenizer
from gatedfm.data.types import DataError
from gatedfm.execution import generation, lm_workdir
from gatedfm.execution.generation import Draw, Generator, Sampling
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm
from gatedfm.models.lm_config import LmConfig, llama
from gatedfm.models.speech_config import ConfigError

pytestmark = pytest.mark.usefixtures('fast_compilation')

SIZES = {'vocab_size': 23, 'd': 12, 'layers': 2, 'ffn': 10, 'max_tokens': 64, 'eos': -1, 'pad': 0}
KINDS = {
  'opt': LmConfig(**SIZES, heads=3, bos=22),
  'llama': llama(**SIZES, heads=4, kv_heads=2, head_width=4, tied=False, bos=22),
}
UNEVEN = Gates(
  {
    'decoder/attention_heads': np.array([[1, 0, 1, 1], [0, 1, 0, 0]], np.float32),
    'decoder/ffn': np.array([1.0, 0.0], np.float32),
  }
)
NO_ATTENTION = Gates({'decoder/attention': np.array([0.0, 1.0], np.float32)})
PROMPTS = [[22, 3, 4], [22, 1, 2, 3, 4, 5, 6, 7], [22], [22, 9, 9], [22, 8, 7, 6, 5]]
MOST = 9


@functools.cache
def words():
  out = Tokenizer(models.WordLevel({f'w{i}': i for i in range(22)}, unk_token='w0'))
  out.pre_tokenizer = pre_tokenizers.Whitespace()
  return LmTokenizer(out)


@functools.cache
def model(kind, eos=-1):
  cfg = dataclasses.replace(KINDS[kind], eos=eos)
  flat = tiny_speech.random_tree(lm.abstract_params(cfg), seed=5, scale=1.0)
  # Else the same token would follow any text.
  flat |= {k: 0.1 * x for k, x in flat.items() if k.endswith('bias')}
  return LmCheckpoint(cfg, traverse_util.unflatten_dict(flat, sep='/'), words(), {})


@functools.cache
def forward(kind):
  """Logits of texts padded on the right, without caches; gates multiply."""
  net, params = lm.for_inference(KINDS[kind], model(kind).params)
  return tiny_speech.jit(
    lambda ids, gates: net.apply({'params': params}, ids[None], gates=gates)[0]
  )


def naive(kind, prompt, most=MOST, gates=None):
  ids = list(prompt)
  sites = (*KINDS[kind].all_sites(), *KINDS[kind].unit_sites())
  whole = {s.name: np.ones((2, s.units) if s.units > 1 else 2, np.float32) for s in sites}
  whole |= {} if gates is None else gates.values
  for _ in range(most):
    padded = np.zeros(32, np.int32)
    padded[: len(ids)] = ids
    ids.append(int(np.argmax(forward(kind)(padded, Gates(whole))[len(ids) - 1])))
  return ids[len(prompt) :]


@pytest.mark.parametrize('kind', KINDS)
def test_greedy_is_naive(kind):
  """Prompts of differing lengths and more than there are rows."""
  generator = Generator(model(kind), rows=2)
  written = generator.generate(PROMPTS, MOST)
  want = [naive(kind, prompt) for prompt in PROMPTS]
  assert [list(w.tokens) for w in written] == want
  assert not any(w.ended for w in written)
  assert len({tuple(w) for w in want}) > 2  # they differ
  assert written[0].text == f' {words().decode(want[0])}'
  # Other numbers of tokens run in the programs that there are.
  programs = len(generator._read), len(generator._write)
  assert [list(w.tokens) for w in generator.generate(PROMPTS[:2], 4)] == [w[:4] for w in want[:2]]
  assert (len(generator._read), len(generator._write)) == programs


@pytest.mark.parametrize('gates', [UNEVEN, NO_ATTENTION], ids=['uneven', 'no attention'])
def test_compacted_models_write_what_masked_ones_would(gates):
  small = lm_workdir.compacted(model('llama'), gates, {})
  written = Generator(small).generate(PROMPTS, MOST)
  assert [list(w.tokens) for w in written] == [naive('llama', p, gates=gates) for p in PROMPTS]


def test_devices_that_share_a_model_write_the_same(tmp_path):
  lm_workdir.save(tmp_path / 'model', model('llama'))
  shared = lm_workdir.load(tmp_path / 'model', partitioning.make_mesh(1, 4, 2))
  assert len(jax.tree.leaves(shared.params)[0].sharding.device_set) == 8
  written = Generator(shared).generate(PROMPTS, MOST)
  assert [list(w.tokens) for w in written] == [naive('llama', prompt) for prompt in PROMPTS]


def test_texts_end_each_at_its_own_place():
  want = [naive('llama', prompt) for prompt in PROMPTS[:3]]
  eos = want[1][2]
  until = [w.index(eos) if eos in w else MOST for w in want]
  assert len(set(until)) > 1
  generator = Generator(model('llama', eos))
  states = []
  write = generator._write
  generator._write = lambda *args, **kwargs: states.append(write(*args, **kwargs)) or states[-1]
  written = generator.generate(PROMPTS[:3], MOST)
  assert [list(w.tokens) for w in written] == [w[:n] for w, n in zip(want, until)]
  assert [w.ended for w in written] == [n < MOST for n in until]
  # Where all have ended nothing more is computed.
  [alone] = generator.generate(PROMPTS[1:2], MOST)
  assert list(alone.tokens) == want[1][: until[1]]
  width = lm_batches.padded_length(len(PROMPTS[1]), 64)
  assert int(states[-1].at) == width + until[1] + 1
  assert 1 < until[1] + 1 < MOST


def test_texts_that_end_one():
  want = naive('llama', PROMPTS[1], 20)
  generator = Generator(model('llama'))
  at = next(n for n in range(3, 20) if want[n] not in want[:n])
  words_at = f'w{want[at]}'
  [written] = generator.generate(PROMPTS[1:2], 20, until=('none', f' {words_at}'))
  before = f' {words().decode(want[:at])}'
  assert written.text == before
  assert list(written.tokens) == want[: at + 1]
  assert written.ended
  [whole] = generator.generate(PROMPTS[1:2], 20, until=('none',))
  assert list(whole.tokens) == want
  assert not whole.ended


@pytest.mark.parametrize('sampling', [Sampling(1.5, seed=3), Sampling(2.0, 0.8, 4)])
def test_draws_repeat_and_do_not_depend_on_the_batch(sampling):
  by_two = Generator(model('opt'), rows=2)
  first, again = (by_two.generate(PROMPTS[:4], MOST, sampling) for _ in range(2))
  assert first == again
  assert Generator(model('opt')).generate(PROMPTS[:4], MOST, sampling) == first
  other = by_two.generate(PROMPTS[:4], MOST, dataclasses.replace(sampling, seed=9))
  assert other != first
  twice = by_two.generate([PROMPTS[0]] * 2, MOST, sampling)
  assert twice[0] != twice[1]


def test_draws_follow_the_distribution():
  logits = np.log([0.5, 0.3, 0.15, 0.05])
  rows, keys = 4000, jax.random.split(jax.random.key(0), 4000)
  draw = Draw(np.float32(0.5), np.float32(0.9), keys)
  shares = lambda kind: np.bincount(
    generation.choose(kind, np.tile(logits, (rows, 1)), draw, np.arange(rows)), minlength=4
  ) / rows  # fmt: skip
  want = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365  # sharper at half the temperature
  np.testing.assert_allclose(shares('all'), want, atol=0.025)
  kept = np.array([0.25, 0.09, 0, 0]) / 0.34  # the first two hold 0.93
  np.testing.assert_allclose(shares('nucleus'), kept, atol=0.025)


@pytest.mark.parametrize('top_p', [0.01, 0.3, 0.7, 0.999])
def test_nucleus_by_brute_force(top_p):
  logits = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
  got = np.isfinite(generation.nucleus(logits, top_p))
  for row, kept in zip(logits, got):
    shares = np.exp(row) / np.exp(row).sum()
    order = np.argsort(-row)
    least = next(n for n in range(1, 13) if n == 12 or shares[order[:n]].sum() >= top_p)
    assert set(np.flatnonzero(kept)) == set(order[:least])


def test_prepared_programs_are_all_that_is_needed():
  generator = Generator(model('opt'), rows=2)
  generator.prepare(PROMPTS, MOST)
  programs = dict(generator._read._programs), dict(generator._write._programs)
  generator.generate(PROMPTS, MOST)
  assert (generator._read._programs, generator._write._programs) == programs


def test_refusals():
  generator = Generator(model('opt'))
  assert generator.encode('w1 w2') == [22, 1, 2]
  assert generator.generate([], 3) == []
  full = [1] * 54
  [written] = generator.generate([full], 10)
  assert len(written.tokens) == 10
  for prompts, most, sampling, error, message in (
    ([[1], full + [1]], 10, generation.GREEDY, DataError, 'prompt 2 has 55 tokens.*room for 54'),
    ([[1], []], 10, generation.GREEDY, DataError, 'prompt 2 is empty'),
    ([[1]], 0, generation.GREEDY, ConfigError, '0 tokens to write'),
    ([[1]], 3, Sampling(-1.0), ConfigError, 'temperature is -1'),
    ([[1]], 3, Sampling(1.0, 0.0), ConfigError, 'top_p is 0'),
    ([[1]], 3, Sampling(0.0, 0.5), ConfigError, 'set a temperature'),
  ):
    with pytest.raises(error, match=message):
      generator.generate(prompts, most, sampling)
  with pytest.raises(DataError, match='no tokenizer'):
    Generator(dataclasses.replace(model('opt'), tokenizer=None))
