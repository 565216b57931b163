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
from flax import traverse_util

from gatedfm.models.lm_config import STACK, LmConfig
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
  flat = traverse_util.flatten_dict(dict(params[STACK]), sep='/')
  shape = lambda x: x.value.shape if isinstance(x, Compacted) else x.shape
  kernels = {k: shape(x) for k, x in flat.items() if k.endswith('kernel')}
  layers = sum(math.prod(s) for k, s in kernels.items() if k.startswith('layers/')) * tokens
  # Each query head meets its own and all tokens before it twice: scores, then values.
  pairs = tokens * (tokens + 1) // 2
  queries = sum(s[1] for k, s in kernels.items() if k.endswith('query/kernel'))
  layers += 2 * queries * pairs
  rest = sum(math.prod(s) for k, s in kernels.items() if not k.startswith('layers/')) * tokens
  if cfg.tied:
    rest += math.prod(shape(flat['embedding'])) * tokens
  keys = sum(s[1] for k, s in kernels.items() if k.endswith('key/kernel'))
  return {
    'parameters': sum(x.size for x in leaves),
    'bytes': sum(x.size * np.dtype(x.dtype).itemsize for x in leaves),
    'macs': layers + rest,
    'layer_macs': layers,
    'kv_bytes': 2 * keys * tokens * np.dtype(cfg.activation_dtype).itemsize,
  }
