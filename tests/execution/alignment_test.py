"""Forced alignment against every path that there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech

from gatedfm.execution import alignment, ctc_prefix

VOCAB, FRAMES, LENGTH, EOS = 4, 6, 4, 3  # blank, two letters, the end
align = tiny_speech.jit(lambda ctc, tokens: alignment.align(ctc, tokens, EOS))


def inputs(lengths, seed=0):
  logits = np.random.default_rng(seed).normal(0, 2, (len(lengths), FRAMES, VOCAB))
  return ctc_prefix.frames(np.float32(logits), np.arange(FRAMES) < np.array(lengths)[:, None])


def padded(*texts):
  return jnp.array([[*t, *[EOS] * (LENGTH - len(t))] for t in texts])


def likeliest(log_probs, text):
  """Spans of a text's tokens on its best path, by trying all paths."""
  best, spans = -np.inf, None
  for path in itertools.product(range(3), repeat=len(log_probs)):
    runs = [(k, len(list(g))) for k, g in itertools.groupby(path)]
    if tuple(k for k, _ in runs if k) != text:
      continue
    score = log_probs[np.arange(len(path)), list(path)].sum()
    if score > best:
      ends = np.cumsum([n for _, n in runs])
      best = score
      spans = [(end - n, end) for (k, n), end in zip(runs, ends) if k]
  return spans


@pytest.mark.parametrize('seed', range(3))
def test_the_best_of_all_paths(seed):
  texts = [(1,), (1, 2), (2, 2), (1, 2, 1), (1, 1, 2), (), (2, 1, 2, 1), (1, 1, 1)]
  lengths = [6, 5, 3, 3, 6, 4, 4, 5]
  ctc = inputs(lengths, seed)
  spans = np.asarray(align(ctc, padded(*texts)))
  for b, (text, n) in enumerate(zip(texts, lengths)):
    expected = likeliest(np.asarray(ctc.log_probs[b, :n]), text)
    assert spans[b, : len(text)].tolist() == [list(map(int, s)) for s in expected]
    assert (spans[b, len(text) :] == n).all()  # behind the last frame


def test_texts_longer_than_their_frames():
  """What fits is spelled, and nothing lies outside or goes back."""
  ctc = inputs([3, 3, 1, 0])
  spans = np.asarray(align(ctc, padded((1, 2, 1, 2), (1, 1, 1), (2, 1), (1,))))
  assert spans[0].tolist() == [[0, 1], [1, 2], [2, 3], [3, 3]]
  assert spans[1].tolist() == [[0, 1], [1, 2], [2, 3], [3, 3]]  # no frame for blanks between
  assert spans[2, :2].tolist() == [[0, 1], [1, 1]]
  assert (spans[3] == 0).all()


def test_long_texts_stay_in_order():
  """30 s of 40 ms frames, each token where it was put."""
  rng = np.random.default_rng(0)
  at = np.sort(rng.choice(np.arange(2, 740, 3), 60, replace=False))
  text = rng.integers(1, 40, 60)
  logits = rng.normal(0, 1, (1, 750, 41))
  logits[0, :, 0] += 8
  logits[0, at, text] += 20
  ctc = ctc_prefix.frames(np.float32(logits), np.ones((1, 750), bool))
  spans = jax.jit(lambda ctc, t: alignment.align(ctc, t, 40))(ctc, jnp.array(text[None]))
  np.testing.assert_array_equal(spans[0, :, 0], at)
  np.testing.assert_array_equal(spans[0, :, 1], at + 1)
