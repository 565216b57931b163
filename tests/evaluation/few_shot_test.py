"""Few-shot answers: likelihoods as one prompt at a time gives them, whatever the batches."""

import jax
import numpy as np
import pytest
import tiny_speech
from flax import traverse_util
from tokenizers import Tokenizer, models, pre_tokenizers

from gatedfm.data import questions
from gatedfm.data.bpe import LmTokenizer
from gatedfm.data.questions import Question, Task
from gatedfm.data.types import DataError
from gatedfm.evaluation.few_shot import Evaluator
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm
from gatedfm.models.lm_config import llama

CFG = llama(vocab_size=23, d=12, layers=2, heads=4, kv_heads=2, head_width=4, ffn=10, bos=22)
WORDS = {f'w{i}': i for i in range(22)}


@pytest.fixture(scope='module')
def tokenizer():
  out = Tokenizer(models.WordLevel(WORDS, unk_token='w0'))
  out.pre_tokenizer = pre_tokenizers.Whitespace()
  return LmTokenizer(out)


@pytest.fixture(scope='module')
def params():
  flat = tiny_speech.random_tree(lm.abstract_params(CFG), seed=3, scale=0.5)
  return traverse_util.unflatten_dict(flat, sep='/')


@pytest.fixture(scope='module')
def evaluator(params, tokenizer, fast_compilation):
  return Evaluator(CFG, params, tokenizer, room=48, most=64)


def by_hand(params, tokenizer, context, choice):
  """Log-likelihood of a choice, by a plain forward pass."""
  start, end = [22, *tokenizer.encode(context)], tokenizer.encode(f' {choice}')
  model, own = lm.for_inference(CFG, params)
  logits = model.apply({'params': own}, np.array([start + end]))[0]
  log = np.asarray(jax.nn.log_softmax(logits))
  return sum(log[len(start) + i - 1, token] for i, token in enumerate(end))


ONE = [('w1 w2 w3', ['w4', 'w5']), ('w7', ['w8', 'w9', 'w10']), ('w1 w1 w1 w1', ['w2', 'w3'])]
MANY = [('w1 w2', ['w4 w5', 'w5']), ('w7', ['w8 w1 w1', 'w9', 'w10 w2'])]


@pytest.mark.parametrize('prompts', [ONE, MANY], ids=['one token', 'many tokens'])
def test_likelihoods(evaluator, params, tokenizer, prompts):
  got = evaluator.log_likelihoods(prompts)
  assert got.shape == (len(prompts), 3)
  for row, (context, choices) in zip(got, prompts):
    want = [by_hand(params, tokenizer, context, c) for c in choices]
    np.testing.assert_allclose(row[: len(choices)], want, rtol=1e-4)
    assert (row[len(choices) :] == -np.inf).all()


def task(number=9):
  rng = np.random.default_rng(0)
  make = lambda: Question(
    ' '.join(f'w{i}' for i in rng.integers(1, 22, 4)), ('w1', 'w2', 'w3'), int(rng.integers(3))
  )
  questions = {s: [make() for _ in range(number)] for s in ('train', 'validation', 'test')}
  return Task('t', questions, Question('w21', ('w1', 'w2', 'w3'), 0))


def test_answers_and_accuracy(evaluator, params, tokenizer):
  own = task()
  out = evaluator.ask(own, 'test', 5, shots=2, seed=1)
  assert out.scores.shape == (5, 3)
  np.testing.assert_array_equal(out.correct, out.scores.argmax(1) == out.answers)
  assert out.counts().scores()['t'] == pytest.approx(out.correct.mean())
  again = evaluator.ask(own, 'test', 5, shots=2, seed=1)
  np.testing.assert_array_equal(again.scores, out.scores)
  with pytest.raises(DataError, match='asked without calibration'):
    again.calibrated()
  asked = evaluator.ask(own, 'test', 5, shots=0, calibrate=True)
  blank = evaluator.log_likelihoods([('w21', ['w1', 'w2', 'w3'])])
  np.testing.assert_allclose(asked.calibrated().scores, asked.scores - blank, rtol=1e-5)
  without = Task('t', own.questions)
  with pytest.raises(DataError, match='no question without content'):
    evaluator.ask(without, calibrate=True)


@pytest.mark.parametrize('choices', [('w1', 'w2', 'w3'), ('w1', 'w2 w3')], ids=['one', 'many'])
@pytest.mark.parametrize('kept', [None, [[1, 0, 1, 1], [0, 0, 0, 0]]], ids=['dense', 'compacted'])
def test_a_shared_beginning_is_read_once(params, tokenizer, choices, kept, fast_compilation):
  """And gives what reading it with every question gives."""
  cut, fixed, own = params, None, task()
  if kept is not None:
    gates = {'decoder/attention_heads': np.array(kept), 'decoder/ffn': np.array([0, 1])}
    model = LmCheckpoint(CFG, params, tokenizer, {})
    small = lm_workdir.compacted(model, Gates(gates), {})
    cut, fixed = small.params, small.fixed()
  evaluator = Evaluator(CFG, cut, tokenizer, fixed, room=48, most=128)
  drawn = questions.sample(own, 'test', 5, 6, 1, shared=True)
  assert all(shown == drawn[0][1] for _, shown in drawn)
  prompts = [(own.prompt(q, shown), choices) for q, shown in drawn]
  together = evaluator.log_likelihoods(prompts)
  assert len(evaluator._read) == 1
  alone = np.concatenate([evaluator.log_likelihoods([p]) for p in prompts])
  assert len(evaluator._read) == 1
  np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_gates_compile_nothing_and_agree_with_compaction(evaluator, params, tokenizer):
  gates = Gates(
    {
      'decoder/attention_heads': np.array([[1, 0, 1, 1], [0, 0, 1, 0]], np.float32),
      'decoder/ffn': np.array([1.0, 0.0], np.float32),
    }
  )
  evaluator.log_likelihoods(ONE)
  programs = len(evaluator._choices)
  masked = evaluator.log_likelihoods(ONE, gates)
  assert len(evaluator._choices) == programs
  assert (masked != evaluator.log_likelihoods(ONE)).any()
  small = lm_workdir.compacted(LmCheckpoint(CFG, params, tokenizer, {}), gates, {})
  other = Evaluator(CFG, small.params, tokenizer, small.fixed(), room=48, most=64)
  np.testing.assert_allclose(other.log_likelihoods(ONE), masked, rtol=1e-4)


def test_perplexity(evaluator, params, tokenizer):
  text = ' '.join(f'w{i % 22}' for i in range(3, 40, 3))
  ids = tokenizer.encode(text)
  total = sum(
    by_hand(params, tokenizer, ' '.join(f'w{i}' for i in ids[start:at]), f'w{ids[at]}')
    for start in range(0, len(ids), 7)
    for at in range(start, min(start + 7, len(ids)))
  )
  assert evaluator.perplexity(text, window=8) == pytest.approx(np.exp(-total / len(ids)), rel=1e-4)
