"""Attention against a loop over heads, masks and caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import build, normal
from tiny_speech import jit, key

from gatedfm.nn import attention

B, T, S, D, HEADS = 2, 3, 4, 6, 2


def reference(p, x, memory, mask):
  """One head after the other, in float64."""
  p = jax.tree.map(np.float64, p)
  project = lambda name, a: a @ p[name]['kernel'] + p[name]['bias']
  q, k, v = project('query', x), project('key', memory), project('value', memory)
  width, out = D // HEADS, []
  for h in range(HEADS):
    part = slice(h * width, (h + 1) * width)
    score = q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(width)
    score = np.where(mask[:, 0], score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    out.append(weight / weight.sum(-1, keepdims=True) @ v[..., part])
  return project('out', np.concatenate(out, -1))


def test_self_attention_is_attention_to_itself():
  x = normal(B, T, D)
  run, p = build(attention.Attention(HEADS, D), x, None)
  want = reference(p, x, x, np.ones((1, 1, 1, T), bool))
  np.testing.assert_allclose(run(p, x, None), want, rtol=1e-4, atol=1e-4)


def test_attention_to_a_projected_memory():
  x, memory = normal(B, T, D), normal(B, S, D, seed=1)
  mask = (np.arange(S) < np.array([[4], [2]]))[:, None, None]
  module = attention.Attention(HEADS, D)
  _, p = build(module, x, None)

  @jit
  def read(memory):
    bound = module.bind({'params': p})
    return bound.attend(x, bound.project(memory), mask)

  y = read(memory)
  np.testing.assert_allclose(y, reference(p, x, memory, mask), rtol=1e-4, atol=1e-4)
  # What is masked has no part in it.
  np.testing.assert_array_equal(y, read(memory.at[1, 2:].set(1e3)))


def test_a_query_with_nothing_to_see_stays_finite():
  x = normal(B, T, D)
  mask = jnp.zeros((B, 1, 1, T), bool)
  module = attention.Attention(HEADS, D)
  _, p = build(module, x, mask)
  loss = lambda x: module.apply({'params': p}, x, mask).sum()
  y, grad = jit(jax.value_and_grad(loss))(x)
  assert np.isfinite(y)
  assert np.isfinite(grad).all()


def test_causal_mask():
  assert attention.causal_mask(3)[0, 0].tolist() == [
    [True, False, False],
    [True, True, False],
    [True, True, True],
  ]


def test_cached_attention_is_causal_attention():
  x = normal(B, T, D)
  module = attention.Attention(HEADS, D)
  run, p = build(module, x, attention.causal_mask(T))
  whole = run(p, x, attention.causal_mask(T))
  cache = attention.empty_cache(B, T + 2, HEADS, D // HEADS, jnp.float32)

  @jit
  def step(now, cache, i):
    bound = module.bind({'params': p})
    cache = attention.update_cache(cache, bound.project(now), i)
    return bound.attend(now, cache, jnp.arange(T + 2) <= i), cache

  for i in range(T):
    y, cache = step(x[:, i : i + 1], cache, i)
    np.testing.assert_allclose(y[:, 0], whole[:, i], rtol=1e-5, atol=1e-5)


def test_grouped_heads_in_bfloat16():
  """Behind a cache as in float32; XLA:CPU does not multiply every layout."""

  class Cached(attention.Attention):
    def __call__(self, x):
      cache = attention.empty_cache(len(x), 40, 3, 16, x.dtype)
      kv = attention.update_cache(cache, self.project(x), 0)
      return self.attend(x, kv, attention.causal_mask(40)[:, :, : x.shape[1]])

  x, options = normal(16, 32, 64), {'kv_heads': 3, 'width': 16}
  run, p = build(Cached(9, 64, **options), x)
  p = jax.tree.map(lambda a: a / 8, p)
  narrow = jax.jit(Cached(9, 64, dtype=jnp.bfloat16, **options).apply)
  for rows in (16, 1):
    got = narrow({'params': p}, x[:rows].astype(jnp.bfloat16)).astype(jnp.float32)
    np.testing.assert_allclose(got, run(p, x[:rows]), rtol=0.1, atol=0.1)


def test_dropout_falls_on_the_weights():
  x = normal(B, T, D)
  module = attention.Attention(HEADS, D, dropout=0.5)
  run, p = build(module, x, None)
  rngs = {'dropout': key(0)}
  dropped = jit(lambda p: module.apply({'params': p}, x, None, deterministic=False, rngs=rngs))(p)
  assert np.abs(dropped - run(p, x, None)).max() > 0.01


def test_heads_divide_the_width():
  with pytest.raises(ValueError, match='4 heads do not divide a width of 6'):
    build(attention.Attention(4, D), normal(B, T, D), None)
