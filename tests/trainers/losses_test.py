"""CTC by enumeration, label smoothing by its definition, the kinds of penalty."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech

from gatedfm.trainers import losses


def collapse(path):
  return [k for k, _ in itertools.groupby(path) if k != losses.BLANK]


def enumerated(logits_SxV, labels):
  """-log of the summed probability of all paths that collapse to `labels`."""
  p_SxV = np.asarray(jax.nn.softmax(logits_SxV), np.float64)
  s, v = p_SxV.shape
  total = 0.0
  for path in itertools.product(range(v), repeat=s):
    if collapse(path) == list(labels):
      total += np.prod(p_SxV[range(s), path])
  return -np.log(total)


@tiny_speech.jit
@jax.value_and_grad
def _ctc(logits_SxV, frames, labels_U, length):
  one = lambda x: jnp.asarray(x)[None]
  return losses.ctc_loss(one(logits_SxV), one(frames), one(labels_U), one(length))[0]


def ctc(logits_SxV, frames, labels):
  """Loss and its gradient."""
  padded = np.zeros(3, np.int32)
  padded[: len(labels)] = labels
  loss, gradient = _ctc(logits_SxV, frames, padded, len(labels))
  return loss, np.asarray(gradient)


@pytest.mark.parametrize('frames', [3, 5])
@pytest.mark.parametrize('labels', [(1,), (1, 2), (2, 2), (2, 1, 2)])
def test_ctc_sums_over_all_alignments(labels, frames):
  logits_SxV = jax.random.normal(jax.random.key(0), (5, 3))
  expected = enumerated(logits_SxV[:frames], labels)
  np.testing.assert_allclose(ctc(logits_SxV, frames, labels)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(('labels', 'frames'), [((1, 2), 1), ((1, 1), 2), ((2, 1, 1), 3), ((), 5)])
def test_ctc_leaves_out_what_cannot_be_aligned_or_has_no_transcript(labels, frames):
  logits_SxV = jax.random.normal(jax.random.key(1), (5, 3))
  loss, gradient = ctc(logits_SxV, frames, labels)
  assert loss == 0
  assert not gradient.any()


def test_a_long_utterance_of_an_untrained_model_counts():
  frames, v = 2000, 1000
  labels_1xU = jnp.arange(1, 6)[None]
  loss_1 = losses.ctc_loss(
    jnp.zeros((1, frames, v)), jnp.array([frames]), labels_1xU, jnp.array([5])
  )
  assert 1.3e4 < loss_1[0] < frames * np.log(v)


def test_ctc_ignores_what_lies_beyond_the_frames():
  logits_SxV = jax.random.normal(jax.random.key(2), (5, 3))
  _, gradient = ctc(logits_SxV, 3, (1, 2))
  assert gradient[:3].any()
  assert not gradient[3:].any()


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.4])
def test_attention_loss_is_the_divergence_from_smoothed_targets(smoothing):
  rng = np.random.default_rng(0)
  logits_BxLxV = rng.normal(size=(3, 5, 7))
  targets_BxL = rng.integers(0, 7, (3, 5))
  targets_BxL[0, 3:] = targets_BxL[2, :] = losses.IGNORED
  expected_B = np.zeros(3)
  for b, i in itertools.product(range(3), range(5)):
    if targets_BxL[b, i] != losses.IGNORED:
      q_V = np.full(7, smoothing / 6)
      q_V[targets_BxL[b, i]] = 1 - smoothing
      log_p_V = logits_BxLxV[b, i] - np.log(np.exp(logits_BxLxV[b, i]).sum())
      kept = q_V > 0
      expected_B[b] += np.sum(q_V[kept] * (np.log(q_V[kept]) - log_p_V[kept]))
  got_B = losses.attention_loss(jnp.asarray(logits_BxLxV), jnp.asarray(targets_BxL), smoothing)
  np.testing.assert_allclose(got_B, expected_B, rtol=1e-4, atol=1e-6)


def test_perfect_prediction_of_smoothed_targets_costs_nothing():
  q_V = jnp.array([0.9, 0.05, 0.05])
  loss_B = losses.attention_loss(jnp.log(q_V)[None, None], jnp.array([[0]]), 0.1)
  np.testing.assert_allclose(loss_B, 0, atol=1e-6)


def test_token_accuracy_counts_targets_alone():
  logits_BxLxV = jax.nn.one_hot(jnp.array([[1, 2, 0], [2, 2, 2]]), 3)
  targets_BxL = jnp.array([[1, 0, -1], [2, -1, -1]])
  assert tuple(map(int, losses.token_accuracy(logits_BxLxV, targets_BxL))) == (2, 3)


@pytest.mark.parametrize(
  ('kind', 'below', 'above'),
  [('abs_squared', 0.24, 0.24), ('abs', 0.2, 0.2), ('squared', 0.04, 0.04), ('hinge', 0.24, 0)],
)
def test_penalties(kind, below, above):
  penalty = lambda s: losses.sparsity_penalty(s, 0.5, kind)
  np.testing.assert_allclose(penalty(0.3), below, rtol=1e-5)
  np.testing.assert_allclose(penalty(0.7), above, rtol=1e-5, atol=1e-7)
  assert penalty(0.5) == 0
  # Too little sparsity is pushed up, too much pulled down unless it is welcome.
  assert jax.grad(penalty)(0.3) < 0
  assert jax.grad(penalty)(0.7) > 0 or kind == 'hinge'


def test_unknown_penalty():
  with pytest.raises(ValueError, match='cubic.*abs_squared'):
    losses.sparsity_penalty(0.1, 0.5, 'cubic')
