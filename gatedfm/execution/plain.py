"""Compacted language models that are alike in all layers, as dense models of smaller sizes.

A plain model is scanned, laid out on devices and pruned like any other, and formats that know one
number of heads and channels for all layers can hold it. Letters: N layers, H query heads, G heads
of keys and values, R query heads to each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from gatedfm.execution import compact
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.models.lm_config import STACK, LmConfig
from gatedfm.models.speech_config import ConfigError
from gatedfm.models.stack import PREFIX
from gatedfm.nn.layers import Compacted


def plain(model: LmCheckpoint) -> LmCheckpoint:
  """The same function of tokens, with sizes in its configuration and nothing cut.

  What is left of a pre-norm model must be attention and feed-forward in turns, each pair a layer
  of the result, wherever the two stood; layers keep equally many heads and channels, and heads
  of keys and values that stay equally many query heads. Which those are stands in its origin, as
  `kept`.

  Raises:
    ConfigError: a model that no such sizes describe, and what to prune it by.
  """
  if model.cut is None:
    return model
  # What is left without heads or channels is a constant, and no layer of its own.
  params, cut = compact.fold(model.params, model.cut, model.cfg)
  model = dataclasses.replace(model, params=params, cut=cut)
  cfg, pairs = model.cfg, _pairs(model)
  heads_NxH, channels_NxF, *ranks = (model.cut[site.name] for site in cfg.unit_sites())
  attentions, ffns = (list(numbers) for numbers in zip(*pairs))
  heads = _alike(attentions, heads_NxH[attentions].sum(1), 'heads')
  ffn = _alike(ffns, channels_NxF[ffns].sum(1), 'channels')
  groups = _groups(cfg, attentions, heads_NxH[attentions])
  sizes = {
    'layers': len(pairs),
    'heads': heads,
    'kv_heads': 0 if groups == heads else groups,
    'head_width': 0 if cfg.width * heads == cfg.d else cfg.width,
    'ffn': ffn,
  }
  layers = model.params[STACK]['layers']
  of = lambda i: layers[f'{PREFIX}{i}']
  merged = {f'{PREFIX}{n}': of(i) | {'ffn': of(j)['ffn']} for n, (i, j) in enumerate(pairs)}
  params = model.params | {STACK: model.params[STACK] | {'layers': merged}}
  if ranks:
    left = cfg.ranks | {f'{STACK}/embedding': int(ranks[0].sum())}
    sizes['factors'] = tuple(f'{path}:{rank}' for path, rank in left.items())
  is_cut = lambda x: isinstance(x, Compacted)
  smaller = dataclasses.replace(cfg, **sizes)
  smaller.validate()
  return dataclasses.replace(
    model,
    cfg=smaller,
    params=jax.tree.map(lambda x: x.value if is_cut(x) else x, params, is_leaf=is_cut),
    origin={**model.origin, 'kept': model.kept()},
    cut=None,
  )


def projected(model: LmCheckpoint) -> LmCheckpoint:
  """The same function, factorized embeddings as narrow ones between projections, as OPT-350m's.

  Args:
    model: of which nothing is cut (`plain`).

  Raises:
    ConfigError: factors that no such projections stand for.
  """
  cfg = model.cfg
  if not cfg.factors:
    return model
  if set(cfg.ranks) != {f'{STACK}/embedding'} or cfg.positions != 'learned' or not cfg.tied:
    raise ConfigError(
      f'{", ".join(cfg.factors)} are products of factors, for which there is a place only where '
      'they are the tied embeddings of OPT: export the model that was factorized, or let this one '
      'stay in our format'
    )
  decoder = model.params[STACK]
  first, second = decoder['embedding'].first, decoder['embedding'].second
  into, out = second, second.T
  if cfg.embed_width:
    into, out = into @ decoder['project_in']['kernel'], decoder['project_out']['kernel'] @ out
  narrow = {'embedding': first, 'project_in': {'kernel': into}, 'project_out': {'kernel': out}}
  return dataclasses.replace(
    model,
    cfg=dataclasses.replace(cfg, embed_width=first.shape[1], factors=()),
    params=model.params | {STACK: decoder | narrow},
  )


def _pairs(model: LmCheckpoint) -> list[tuple[int, int]]:
  """Layers that attention and feed-forward of each new layer come from."""
  attention_N, ffn_N = (model.cut[site.name] for site in model.cfg.all_sites())
  attentions, ffns = np.flatnonzero(attention_N).tolist(), np.flatnonzero(ffn_N).tolist()
  if not model.cfg.pre_norm and len(attentions) + len(ffns) < 2 * model.cfg.layers:
    raise ConfigError(
      'a module was closed, and a model with norms after each sum keeps the norm of it: no smaller '
      'plain model is the same; prune heads or channels of it, with --shape=uniform'
    )
  left = sorted([(i, 0) for i in attentions] + [(j, 1) for j in ffns])
  for n, (layer, module) in enumerate([*left, (model.cfg.layers, 0)]):
    if module != n % 2:
      alone = f'attention of layer {left[n - 1][0]}', 'feed-forward behind it'
      if module:
        alone = f'feed-forward of layer {layer}', 'attention before it'
      raise ConfigError(
        f'the {alone[0]} has no {alone[1]}: a plain model has both by turns; prune heads and '
        'channels with --shape=uniform in place of modules, or whole layers'
      )
  if not left:
    raise ConfigError('no module is left: a plain model has a layer at least')
  return list(zip(attentions, ffns, strict=True))


def _alike(layers: Sequence[int], counts_N: np.ndarray, what: str) -> int:
  """How many each layer keeps."""
  first = int(counts_N[0])
  for layer, count in zip(layers, counts_N.astype(int).tolist()):
    if count != first:
      raise ConfigError(
        f'layer {layer} keeps {count} {what} and layer {layers[0]} {first}: a plain model has one '
        'number for all layers; prune with --shape=uniform (and --groups, where heads share keys)'
      )
  return first


def _groups(cfg: LmConfig, layers: Sequence[int], heads_NxH: np.ndarray) -> int:
  """How many heads of keys and values each layer keeps."""
  reads_NxG = heads_NxH.reshape(len(layers), cfg.groups, -1).sum(-1).astype(int)
  first = None
  for layer, reads_G in zip(layers, reads_NxG):
    left = reads_G[reads_G > 0].tolist()
    first = first or left
    if len(set(left)) > 1 or left != first:
      raise ConfigError(
        f'the heads of keys and values that layer {layer} keeps are read by {left} query heads'
        + (f', those of layer {layers[0]} by {first}' if left != first else '')
        + ': a plain model has one number for all; prune with --groups and --shape=uniform'
      )
  return len(first)
