"""Tiny language models with random weights, and examples for them."""

import numpy as np
import tiny_speech
from flax import traverse_util

from gatedfm.data.lm_batches import Pair
from gatedfm.models import lm
from gatedfm.models.lm_config import LmConfig, llama

SIZES = {'vocab_size': 19, 'd': 12, 'layers': 3, 'ffn': 10, 'max_tokens': 32}
KINDS = {
  'opt': LmConfig(**SIZES, heads=3),
  'opt_350m': LmConfig(**SIZES, heads=3, pre_norm=False, final_norm=False, embed_width=8),
  'llama': llama(**SIZES, heads=6, kv_heads=2, tied=False, head_width=4),
}


def params(kind, seed=2):
  flat = tiny_speech.random_tree(lm.abstract_params(KINDS[kind]), seed=seed, scale=0.4)
  return traverse_util.unflatten_dict(flat, sep='/')


def pairs(number=4, seed=0):
  """Contexts of 2 to 9 tokens, targets of 3 or 4: one shape."""
  rng = np.random.default_rng(seed)
  draw = lambda least, most: tuple(rng.integers(0, 19, rng.integers(least, most + 1)).tolist())
  return [Pair(draw(2, 9), draw(3, 4)) for _ in range(number)]
