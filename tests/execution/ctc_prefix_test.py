"""CTC prefix scores against sums over every alignment, and against ESPnet's recurrence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedfm.execution import ctc_prefix

VOCAB, FRAMES, EOS = 4, 6, 3  # blank, two letters, the end


def inputs(seed, lengths=(FRAMES,)):
  logits = np.random.default_rng(seed).normal(0, 2, (len(lengths), FRAMES, VOCAB))
  logits[..., EOS] = -30  # CTC never emits the decoder's end
  mask = np.arange(FRAMES) < np.array(lengths)[:, None]
  return ctc_prefix.frames(np.float32(logits), mask)


def spelled(path):
  return tuple(k for k, _ in itertools.groupby(path) if k)


def texts(x, b, length):
  """Probability of every text, by brute force over alignments."""
  probs, out = np.exp(np.float64(x.log_probs[b, :length])), {}
  for path in itertools.product(range(VOCAB), repeat=length):
    text = spelled(path)
    out[text] = out.get(text, 0.0) + probs[np.arange(length), list(path)].prod()
  return out


def prefix_of(x, text):
  """The prefix of one utterance after `text`, token by token."""
  prefix = ctc_prefix.start(x)
  for token in text:
    score = ctc_prefix.scores(x, prefix, EOS)[:, token]
    prefix = ctc_prefix.extend(x, prefix, jnp.full(len(x.mask), token), score)
  return prefix


@pytest.mark.parametrize('text', [(), (1,), (1, 1), (2, 1), (1, 2, 2), (2, 2, 2)])
def test_scores_are_sums_over_alignments(text):
  lengths = (FRAMES, 5)
  x = inputs(0, lengths)
  prefix = prefix_of(x, text)
  scores = ctc_prefix.scores(x, prefix, EOS)
  for b, length in enumerate(lengths):
    every = texts(x, b, length)
    begins = lambda g, every=every: sum(p for t, p in every.items() if t[: len(g)] == g)
    np.testing.assert_allclose(np.exp(prefix.score[b]), begins(text), rtol=2e-4)
    for token in (1, 2):
      expected = begins((*text, token)) / begins(text)
      np.testing.assert_allclose(np.exp(scores[b, token]), expected, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(np.exp(scores[b, EOS]), every[text] / begins(text), rtol=1e-3)
    assert scores[b, ctc_prefix.BLANK] < -1e8


def recurrence(log_probs, text):
  """`CTCPrefixScore`, a loop over frames in float64: (n, b) per frame."""
  frames = len(log_probs)
  n, b = np.full(frames + 1, -np.inf), np.append(0, np.cumsum(log_probs[:, 0]))
  last = None
  for token in text:
    phi = b if token == last else np.logaddexp(n, b)
    n2, b2 = np.full(frames + 1, -np.inf), np.full(frames + 1, -np.inf)
    for s in range(frames):
      n2[s + 1] = np.logaddexp(n2[s], phi[s]) + log_probs[s, token]
      b2[s + 1] = np.logaddexp(b2[s], n2[s]) + log_probs[s, 0]
    n, b, last = n2, b2, token
  return n, b


def test_long_utterances_stay_accurate():
  """30 s: cumulative sums reach thousands, and what they differ by must survive float32."""
  rng = np.random.default_rng(1)
  text = rng.integers(1, 40, 60)
  logits = rng.normal(0, 1.5, (1, 750, 40))
  at = np.sort(rng.choice(740, 60, replace=False))
  logits[:, :, 0] += 4
  logits[0, at, text] += 12
  x = ctc_prefix.frames(np.float32(logits), np.ones((1, 750), bool))
  prefix = jax.jit(prefix_of)(x, text[:40])
  n, b = recurrence(np.float64(x.log_probs[0]), text[:40])
  likely = np.logaddexp(n, b) > np.logaddexp(n, b).max() - 30
  np.testing.assert_allclose(
    prefix.token[0][likely & (n > -1e8)], n[likely & (n > -1e8)], atol=0.02
  )
  np.testing.assert_allclose(prefix.blank[0][likely], b[likely], atol=0.02)


def test_padding_changes_nothing():
  x = inputs(2, (4, FRAMES))
  alone = jax.tree.map(lambda a: a[:1, :4], x)
  for text in ((), (1,), (2, 2)):
    a, b = prefix_of(x, text), prefix_of(alone, text)
    np.testing.assert_allclose(
      ctc_prefix.scores(x, a, EOS)[0], ctc_prefix.scores(alone, b, EOS)[0], atol=1e-5
    )
