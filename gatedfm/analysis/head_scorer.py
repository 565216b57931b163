"""All heads of a language model scored by `induction`, layer by layer, as its own code attends.

Letters: N layers, H heads, K head width, T tokens (BOS and padding included), D model width, F
channels of all heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import gates as gates_lib
from gatedfm.analysis import induction
from gatedfm.analysis.induction import MEASURES, Induction
from gatedfm.gates import Gates
from gatedfm.models import stack
from gatedfm.models.lm import LanguageModel, LmLayer, for_inference
from gatedfm.models.lm_config import STACK, LmConfig
from gatedfm.nn import attention, layers


class HeadScorer:
  """Scores all heads of a model, one sequence and one layer at a time.

  Texts are padded behind their end, where causal attention lets no token see it: padding changes
  shapes, and with them at most the order of sums. Everything is computed in float32.
  """

  def __init__(
    self, cfg: LmConfig, how: Induction | None = None, order: Sequence[int] | None = None
  ):
    """Arguments and errors as of `choose_tokens`."""
    self.how = how or Induction()
    self.cfg = dataclasses.replace(
      cfg,
      dtype='float32',
      activation_dtype='float32',
      execution='mask',
      remat='none',
      scan_layers=False,
    )
    self._tokens = induction.choose_tokens(cfg, self.how, order)
    self._start = len(cfg.start)
    self._layer = LmLayer(self.cfg)
    self._programs = {
      'prefix_matching': jax.jit(self._prefix_matching, static_argnames='fixed'),
      'copying': jax.jit(self._copying, static_argnames='fixed'),
    }

  def scores(self, params: Any, gates: Gates | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Scores `[N, H]` by measure, of one sequence after the other.

    Long and short sequences take turns, so that how many are left tells what time is left.

    Args:
      params: in either layout; what compaction has left will do.
      gates: `[N]` per site of modules, `[N, U]` per site of units, as of `LanguageModel`. Heads
        that they close, or that are gone, score 0: nothing comes out of them.

    Raises:
      ValueError: gates that do not fit, or that differ by example.
    """
    model, params = for_inference(self.cfg, params)
    each = self._gates(gates)
    lengths = self.how.lengths()
    for s in sorted(range(len(lengths)), key=lambda s: min(s, len(lengths) - 1 - s)):
      drawn = self.draw(s)
      texts = {'prefix_matching': np.tile(drawn[: lengths[s]], self.how.copies), 'copying': drawn}
      divided = {'prefix_matching': lengths[s], 'copying': len(drawn)}
      yield {m: self._run(m, model, params, each, texts[m], divided[m]) for m in MEASURES}

  def draw(self, s: int) -> np.ndarray:
    """Tokens of sequence `s`, all different: copying's, of which prefix matching repeats the
    first `lengths()[s]`."""
    rng = np.random.default_rng((self.how.seed, s))
    return rng.choice(self._tokens, self.how.copies * self.how.lengths()[s], replace=False)

  def _gates(self, gates: Gates | None) -> list[dict[str, Any]]:
    """Of each layer by module."""
    sites = self.cfg.all_sites()
    if gates is not None:
      sites += tuple(s for s in self.cfg.unit_sites() if s.name in gates.values)
    if any(s.unit == 'rank' for s in sites):
      raise ValueError('gates of ranks are not read here: score the compacted model')
    whole = {} if gates is None else gates_lib.completed(gates, sites).stack(STACK, sites)
    units = {s.module: s.units > 1 for s in sites}
    if any(np.ndim(g) > 1 + units[m] for m, g in whole.items()):
      raise ValueError('gates differ by example: score with one gate for all texts')
    return [{m: g[i] for m, g in whole.items()} for i in range(self.cfg.layers)]

  def _run(
    self, measure: str, model: LanguageModel, params: Any, gates: list, text: np.ndarray, length
  ) -> np.ndarray:
    """Scores `[N, H]` on one text; layer by layer, which all share a program."""
    text = np.concatenate([self.cfg.start, text]).astype(np.int32)
    room = -(-len(text) // self.how.multiple) * self.how.multiple
    text = np.pad(text, (0, min(room, self.cfg.max_tokens) - len(text)))
    decoder = params[STACK]
    embed = lambda m, tokens: m.decoder.embed(tokens, jnp.arange(len(text))[None])
    x_1xTxD = model.apply({'params': params}, text[None], method=embed)
    reader, rows = _reader(decoder, text), []
    own = [decoder['layers'][f'{stack.PREFIX}{i}'] for i in range(self.cfg.layers)]
    for layer, layer_gates in zip(own, gates):
      fixed = tuple((m, g) for m, g in layer_gates.items() if isinstance(g, bool))
      changing = {m: g for m, g in layer_gates.items() if not isinstance(g, bool)}
      x_1xTxD, found = self._programs[measure](
        layer, x_1xTxD, changing, reader, length, fixed=fixed
      )
      rows.append(found)
    return np.stack([self._whole(*row) for row in zip(rows, own, gates)])

  def _whole(self, found: jax.Array | None, layer: dict, gates: dict) -> np.ndarray:
    """Scores of all H heads of a layer from those of heads that are left."""
    out = np.zeros(self.cfg.heads)
    if found is not None:
      kernel = layer['attention']['attention']['query']['kernel']
      kept = getattr(kernel, 'kept', None)
      out[slice(None) if kept is None else list(kept)] = found
    is_open = np.asarray(gates.get('attention_heads', 1)) * np.asarray(gates.get('attention', 1))
    return np.where(is_open > 0, out, 0)

  def _prefix_matching(self, params, x_1xTxD, gates, reader, length, fixed):
    x_1xTxD, weights_HxTxT, _ = self._look(params, x_1xTxD, gates | dict(fixed))
    if weights_HxTxT is None:
      return x_1xTxD, None
    how = (length, self.how.copies, self._start, self.how.mode == 'released')
    return x_1xTxD, induction.prefix_matching(weights_HxTxT, *how)

  def _copying(self, params, x_1xTxD, gates, reader, length, fixed):
    gates = gates | dict(fixed)
    after_1xTxD, weights_HxTxT, mixed_TxF = self._look(params, x_1xTxD, gates)
    if weights_HxTxT is None:
      return after_1xTxD, None
    if self.how.mode == 'released':
      _, _, mixed_TxF = self._look(params, x_1xTxD, gates, alone=True)
    logits_HxTxT = self._logits(params, reader, mixed_TxF, len(weights_HxTxT))
    return after_1xTxD, induction.copying(weights_HxTxT, logits_HxTxT, length, self._start)

  def _look(self, params: Any, x_1xTxD: jax.Array, gates: dict, alone: bool = False) -> tuple:
    """A layer at work: what the next one reads, attention weights `[H, T, T]`, what heads hand to
    the output projection, `[T, F]`; None of an attention that is gone.

    Args:
      params, x_1xTxD, gates: of the layer.
      alone: lets each token attend to itself alone: heads then hand on their values.
    """
    found, length = {}, x_1xTxD.shape[1]

    def listen(call, args, kwargs, context):
      module, out = context.module, call(*args, **kwargs)
      if isinstance(module, attention.Attention) and context.method_name == 'weights':
        weights, grouped = out
        if weights.size:
          found['weights'] = weights[0].reshape(-1, length, length)
        return (jnp.broadcast_to(jnp.eye(length), weights.shape), grouped) if alone else out
      if isinstance(module, layers.Linear) and module.name == 'out':
        found['mixed'] = args[0][0]
      return out

    seen, positions_1xT = attention.causal_mask(length), jnp.arange(length)[None]
    with nn.intercept_methods(listen):
      after_1xTxD, _ = self._layer.apply(
        {'params': params}, x_1xTxD, gates, seen, positions_1xT, True
      )
    after_1xTxD = after_1xTxD if self.how.fed == 'hidden' else x_1xTxD
    return after_1xTxD, found.get('weights'), found.get('mixed')

  def _logits(self, params: Any, reader: Any, mixed_TxF: jax.Array, heads: int) -> jax.Array:
    """Logits that each head by itself gives to the text's tokens, `[H, T, T]`, no closing norm.

    From a head's channels to logits all is linear but for a bias: it is taken apart once, by
    channel, in place of an output and a vocabulary of logits for each head and token.
    """
    length, channels = mixed_TxF.shape
    cfg = dataclasses.replace(self.cfg, vocab_size=length)
    write = lambda m, y: m.attention.attention.out(y)

    def read(y: jax.Array) -> jax.Array:
      y = self._layer.apply({'params': params}, y, method=write)
      return LanguageModel(cfg).apply({'params': {STACK: reader}}, y, method='logits')

    bias_1xT = read(jnp.zeros((1, channels)))
    by_channel_HxKxT = (read(jnp.eye(channels)) - bias_1xT).reshape(heads, -1, length)
    mixed_TxHxK = mixed_TxF.reshape(length, heads, -1)
    logits_HxTxT = jnp.einsum('thk,hks->hts', mixed_TxHxK, by_channel_HxKxT)
    return logits_HxTxT + bias_1xT if self.how.output_bias else logits_HxTxT


def _reader(decoder: dict[str, Any], text: np.ndarray) -> dict[str, Any]:
  """What `logits` reads, of a vocabulary that is the text: token t is the one that stands at t."""
  out = {k: v for k, v in decoder.items() if k != 'layers'}
  if 'output' in out:
    kernel = decoder['output']['kernel']
    out['output'] = {'kernel': kernel.T.take(text).T if _is_product(kernel) else kernel[:, text]}
  table = decoder['embedding']
  return out | {'embedding': table.take(text) if _is_product(table) else table[text]}


def _is_product(matrix: Any) -> bool:
  return isinstance(matrix, layers.Factorized)
