"""Seconds of language models side by side: reading a text, and writing a token after it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import clock
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.models.lm import for_inference

WRITES = 16


def side_by_side(
  models: Mapping[str, LmCheckpoint], tokens: int = 512, rounds: int = 7, writes: int = WRITES
) -> dict[str, dict[str, Any]]:
  """Times models, one text at a time.

  Args:
    models: by name; ratios are of the first.
    tokens: of the text, and columns of the cache beside those that are written; fewer where the
      models have no positions for both.
    rounds: side by side, in alternating order, after compilation.
    writes: tokens written in a row, whose mean counts.

  Returns: per model `prefill` and `token` (seconds, quartiles), `prefill_ratio` and
    `token_ratio` (over the first, quartiles) and `compile_seconds`.
  """
  calls: dict[str, dict[str, Any]] = {'prefill': {}, 'token': {}}
  compiled = {}
  tokens = min(tokens, *(model.cfg.max_tokens - writes for model in models.values()))
  for name, model in models.items():
    start = time.perf_counter()
    calls['prefill'][name], calls['token'][name] = _calls(model, tokens, writes)
    compiled[name] = time.perf_counter() - start
  out: dict[str, dict[str, Any]] = {n: {'compile_seconds': compiled[n]} for n in models}
  first = next(iter(models))
  for kind, each in (('prefill', 1), ('token', writes)):
    seconds = clock.laps(calls[kind], rounds)
    for name, s in seconds.items():
      out[name][kind] = clock.quartiles(s / each)
      out[name][f'{kind}_ratio'] = clock.quartiles(s / seconds[first])
  return out


def _calls(model: LmCheckpoint, tokens: int, writes: int) -> tuple[Any, Any]:
  """Compiled: reading a text up to its last token's logits; writing tokens behind it."""
  net, params = for_inference(model.cfg, model.params)
  fixed, length = model.fixed(), tokens + writes
  ids = jnp.asarray(np.random.default_rng(0).integers(0, model.cfg.vocab_size, (1, tokens)))
  mask = jnp.ones((1, length), bool)
  apply = lambda params, *args, method: net.apply({'params': params}, *args, method=method)

  def read(params: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
    caches = apply(params, 1, length, fixed, method='start')
    x, caches = apply(params, ids, 0, caches, mask, fixed, method='step')
    return apply(params, x[:, -1], method='logits'), caches

  def write(params: Any, logits: jax.Array, caches: Any) -> jax.Array:
    def step(i: jax.Array, carry: tuple) -> tuple:
      token, caches = carry
      x, caches = apply(params, token, tokens + i, caches, mask, fixed, method='step')
      best = jnp.argmax(apply(params, x[:, -1], method='logits'), -1)[:, None]
      return best.astype(token.dtype), caches

    first = jnp.argmax(logits, -1)[:, None].astype(jnp.int32)
    return jax.lax.fori_loop(0, writes, step, (first, caches))[0]

  read, write = jax.jit(read), jax.jit(write)
  result = jax.block_until_ready(read(params, ids))
  jax.block_until_ready(write(params, *result))
  return lambda: read(params, ids), lambda: write(params, *result)
