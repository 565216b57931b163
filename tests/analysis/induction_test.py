"""Measures of induction: terms counted by hand, a head planted by hand, what is drawn and kept."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tokenizers import Tokenizer, models

from gatedfm.analysis import induction
from gatedfm.analysis.head_scorer import HeadScorer
from gatedfm.analysis.induction import Induction
from gatedfm.data.bpe import LmTokenizer
from gatedfm.models import lm
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.speech_config import ConfigError


def test_terms_of_prefix_matching():
  """Of four copies of 25 tokens: 25, 50 and 75 terms; the released code's three more."""
  ones = jnp.ones((1, 128, 128))
  count = lambda first: 75 * float(induction.prefix_matching(ones, 25, 4, 1, first)[0])
  assert count(False) == pytest.approx(150)
  assert count(True) == pytest.approx(153)
  # Those three: the last token of each copy but the first, to the first token behind BOS.
  one = np.zeros((1, 128, 128), np.float32)
  one[0, :, 1] = 1
  of_first = lambda first: 75 * float(induction.prefix_matching(one, 25, 4, 1, first)[0])
  assert of_first(False) == 0
  assert of_first(True) == pytest.approx(3)
  for j in (50, 75, 100):
    one[0, j, 1] = 0
  assert of_first(True) == 0


def test_copying_by_hand():
  weights = np.array([[[1, 0, 0, 9], [0.4, 0.6, 0, 9], [0.5, 0.2, 0.3, 9], [9, 9, 9, 9]]])
  p = np.array([[1, 7, 7, 7], [0.2, 0.3, 7, 7], [0.5, 0.4, 0.1, 7], [7, 7, 7, 7.0]])
  got = induction.copying(jnp.asarray(weights), jnp.log(p)[None], 2, 1)
  # Token 1: only its own probability lies above the mean. Token 2: 1/6 and 1/15 do.
  assert float(got[0]) == pytest.approx((1 + (1 / 6) / (1 / 6 + 1 / 15)) / 2)
  flat = induction.copying(jnp.asarray(weights), jnp.full((1, 4, 4), 3.7), 2, 1)
  assert float(flat[0]) == 0


V, P = 22, 20  # tokens and positions, each an axis; and an axis for each token that came before
PLANTED = LmConfig(
  vocab_size=V, d=2 * V + P, layers=2, heads=2, head_width=V + P, ffn=1, max_tokens=P - 2,
  bos=0, eos=0, pad=-1,
)  # fmt: skip


def planted():
  """Layer 0, head 0 writes which token came before; layer 1, head 0 looks for its own token
  there, or at itself where it finds none, and copies. The other heads look at BOS, and say
  nothing."""
  cfg, token, place, before = PLANTED, np.arange(V), V + np.arange(P), V + P + np.arange(V)
  flat = {k: np.zeros(x.shape, np.float32) for k, x in lm.abstract_params(cfg).items()}
  for name in flat:
    if name.endswith('scale'):
      flat[name] += 1
  flat['decoder/embedding'][token, token] = 1
  flat['decoder/position_embedding'][np.arange(P), place] = 1
  of = lambda layer: {
    w: flat[f'decoder/layers/layers_{layer}/attention/attention/{w}/kernel']
    for w in ('query', 'key', 'value', 'out')
  }
  sharp, width = 30.0, V + P
  zero, one = of(0), of(1)
  zero['query'][place[1:], np.arange(P - 1)] = sharp
  zero['key'][place, np.arange(P)] = 1
  zero['value'][token, token] = zero['out'][token, before] = 1
  one['query'][token, token] = sharp
  one['key'][before, token] = 1
  one['query'][place, V + np.arange(P)] = sharp / 3
  one['key'][place, V + np.arange(P)] = 1
  one['value'][token, token] = one['out'][token, token] = 1
  for layer, own in enumerate((zero, one)):
    own['key'][0, width] = 1  # BOS
    flat[f'decoder/layers/layers_{layer}/attention/attention/query/bias'][width] = 10 * sharp
  return traverse_util.unflatten_dict(flat, sep='/')


def planted_scores(**changes):
  how = Induction(sequences=2, shortest=3, step=1, dropped=0.0, multiple=17, **changes)
  each = list(HeadScorer(PLANTED, how).scores(planted()))
  return (np.mean([x[m] for x in each], 0) for m in induction.MEASURES)


def test_a_planted_head_is_found(fast_compilation):
  matching, copying = planted_scores()
  np.testing.assert_allclose(matching, [[0, 0], [1, 0]], atol=0.02)
  np.testing.assert_allclose(copying, [[0, 0], [1, 0]], atol=0.02)
  # Fed with embeddings it finds no token before: it stands on the head below.
  matching, copying = planted_scores(mode='released')
  assert matching.max() < 0.1
  np.testing.assert_allclose(copying, [[0, 0], [1, 0]], atol=0.02)


def test_tokens_are_ranked_as_bpe_merges():
  vocabulary = {'ab': 0, '<s>': 1, 'b': 2, 'abc': 3, 'a': 4, 'c': 5, 'bc': 6}
  bpe = Tokenizer(models.BPE(vocabulary, [('b', 'c'), ('a', 'b'), ('ab', 'c'), ('a', 'bc')]))
  bpe.add_special_tokens(['<s>', '<new>'])
  assert LmTokenizer(bpe).merge_order() == [2, 4, 5, 6, 0, 3]
  words = Tokenizer(models.WordLevel({'x': 1, 'y': 0}, unk_token='x'))
  assert LmTokenizer(words).merge_order() == [0, 1]


def test_tokens_to_draw_from():
  cfg = LmConfig(vocab_size=103, max_tokens=128, bos=2, eos=2, pad=1)
  how = Induction(sequences=1, shortest=5, dropped=0.04)
  ordinary = [t for t in range(103) if t not in (1, 2)]
  assert induction.choose_tokens(cfg, how).tolist() == ordinary[4:-4]
  ranked = induction.choose_tokens(cfg, how, [*reversed(range(103)), 500])
  assert ranked.tolist() == ordinary[::-1][4:-4]
  scorer = HeadScorer(cfg, how)
  assert len(scorer.draw(0)) == 20
  np.testing.assert_array_equal(scorer.draw(0), HeadScorer(cfg, how).draw(0))
  other = HeadScorer(cfg, dataclasses.replace(how, seed=1))
  assert scorer.draw(0).tolist() != other.draw(0).tolist()


def test_the_published_lengths():
  lengths = Induction().lengths()
  assert (len(lengths), lengths[0], lengths[-1]) == (100, 25, 223)
  assert 4 * lengths[-1] + 1 == 893


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'mode': 'exact'}, "mode is 'exact'"),
    ({'inputs': 'logits'}, "inputs is 'logits'"),
    ({'sequences': 0}, 'sequences is 0; it must be at least 1'),
    ({'dropped': 0.5}, 'dropped is 0.5'),
    ({'shortest': 26}, '93 tokens to draw 104 from'),
    ({'shortest': 20}, '81 tokens; the model has positions for 80'),
  ],
)
def test_refusals(changes, message):
  cfg = LmConfig(vocab_size=103, max_tokens=80, bos=2, eos=2, pad=1)
  with pytest.raises(ConfigError, match=message):
    HeadScorer(cfg, Induction(**({'sequences': 1} | changes)))


def test_what_pruning_retains():
  scores, importance = np.array([[4.0, 1], [3, 2]]), np.array([[0.9, 0.1], [0.2, 0.2]])
  kept = induction.retained(scores, importance, (0, 0.25, 0.5, 0.74, 0.75, 1))
  np.testing.assert_allclose(kept, [1, 0.9, 0.6, 0.6, 0.4, 0])
  with pytest.raises(ValueError, match=r'\(2, 2\) heads, importance of \(2,\)'):
    induction.retained(scores, importance[0], (0,))
  with pytest.raises(ValueError, match='all 0'):
    induction.retained(0 * scores, importance, (0,))
