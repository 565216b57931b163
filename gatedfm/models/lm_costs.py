"""What a language model costs, counted from its parameters as they are: dense or compacted.

Multiply-accumulates (MACs) are those of matrix products of one text without padding; norms,
activations and softmax are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gatedfm.gates import Cost
from gatedfm.models import lm
from gatedfm.models.lm_config import STACK, LmConfig
from gatedfm.nn import low_rank
from gatedfm.nn.layers import Compacted


def count(cfg: LmConfig, params: Mapping[str, Any], tokens: int) -> dict[str, int]:
  """Costs of a model.

  Args:
    cfg: before compaction.
    params: unrolled arrays, or their shapes; what compaction has left.
    tokens: of the text that is read, each followed by logits.

  Returns: `parameters`, `bytes` (of them), `macs` (of reading the text), `layer_macs` (of the
    layers alone), `kv_bytes` (of keys and values of the text, in the type of activations).
  """
  leaves = jax.tree.leaves(params)
  shape = lambda x: x.value.shape if isinstance(x, Compacted) else x.shape
  flat = {k: shape(x) for k, x in low_rank.flat(params[STACK]).items()}
  kernels = {k: s for k, s in flat.items() if 'kernel' in k.split('/')}
  size = lambda of: sum(math.prod(s) for s in of) * tokens
  columns = lambda name: sum(
    s[1] for k, s in kernels.items() if k.endswith((f'{name}/kernel', f'{name}/kernel/second'))
  )
  layers = size(s for k, s in kernels.items() if k.startswith('layers/'))
  # Each query head meets its own and all tokens before it twice: scores, then values.
  pairs = tokens * (tokens + 1) // 2
  layers += 2 * columns('query') * pairs
  rest = size(s for k, s in kernels.items() if not k.startswith('layers/'))
  table = {k: s for k, s in flat.items() if k.startswith('embedding')}
  rest += size(s for k, s in table.items() if cfg.tied or k.endswith('second'))
  if cfg.tied:  # read on the way in too, by a row of the first factor
    rest += size(s for k, s in table.items() if k.endswith('second'))
  keys = columns('key')
  return {
    'parameters': sum(x.size for x in leaves),
    'bytes': sum(x.size * np.dtype(x.dtype).itemsize for x in leaves),
    'macs': layers + rest,
    'layer_macs': layers,
    'kv_bytes': 2 * keys * tokens * np.dtype(cfg.activation_dtype).itemsize,
  }


def total(cfg: LmConfig, tokens: int) -> Cost:
  """Of the whole model, dense."""
  shapes = low_rank.tree(lm.abstract_params(cfg))
  costs = count(cfg, shapes, tokens)
  size = np.dtype(cfg.activation_dtype).itemsize  # as of gates
  return Cost(costs['parameters'], costs['macs'], costs['parameters'] * size)


def of_gates(cfg: LmConfig, tokens: int) -> dict[str, Cost]:
  """What one open gate costs, by site, also of whole layers (`decoder/layer`).

  A query head's share of keys and values that others read too is not counted.

  Args:
    cfg: of the model.
    tokens: of the text that is read, for MACs.
  """
  d, k, size = cfg.d, cfg.width, np.dtype(cfg.activation_dtype).itemsize
  bias, pairs = int(cfg.use_bias), tokens * (tokens + 1) // 2
  # A norm that stands after the sum stays when its module goes.
  norm = d * (2 if cfg.norm == 'layer' else 1) if cfg.pre_norm else 0
  make = lambda matrices, rest, more=0: Cost(
    matrices + rest, matrices * tokens + more, (matrices + rest) * size
  )
  add = lambda *costs: Cost(
    *(sum(getattr(c, f) for c in costs) for f in ('params', 'macs', 'bytes'))
  )
  head = make(2 * d * k, bias * k, 2 * k * pairs)
  channel = make((3 if cfg.gated_ffn else 2) * d, bias * (2 if cfg.gated_ffn else 1))
  shared = make(2 * d * k * cfg.groups, bias * 2 * k * cfg.groups + bias * d + norm)
  attention = add(shared, *[head] * cfg.heads)
  ffn = add(make(0, bias * d + norm), *[channel] * cfg.ffn)
  named = {'attention': attention, 'ffn': ffn, 'layer': add(attention, ffn)}
  named |= {'attention_heads': head, 'ffn_channels': channel}
  # Of the two factors' columns and rows: read on the way in by the second, out by both.
  width = cfg.embed_width or cfg.d
  macs = (width + cfg.tied * (cfg.vocab_size + width)) * tokens
  params = cfg.vocab_size + width
  named |= {'embedding_ranks': Cost(params, macs, params * size)}
  return {f'{STACK}/{name}': cost for name, cost in named.items()}


def keys_and_values(cfg: LmConfig, tokens: int) -> Cost:
  """Of a group of heads that share them."""
  matrices, rest = 2 * cfg.d * cfg.width, int(cfg.use_bias) * 2 * cfg.width
  size = np.dtype(cfg.activation_dtype).itemsize
  return Cost(matrices + rest, matrices * tokens, (matrices + rest) * size)
