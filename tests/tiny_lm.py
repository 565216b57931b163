"""Tiny language models with random weights, examples for them, and one on disk with a tokenizer."""

import numpy as np
import tiny_speech
from flax import traverse_util
from tokenizers import Tokenizer, models, pre_tokenizers

from gatedfm.data.bpe import LmTokenizer
from gatedfm.data.lm_batches import Pair
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
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


WORDS = llama(
  vocab_size=23, d=12, layers=2, heads=4, kv_heads=2, head_width=4, ffn=10, bos=22, max_tokens=64
)


def saved(folder):
  """A model of `WORDS`, whose tokens are w0 to w21."""
  flat = tiny_speech.random_tree(lm.abstract_params(WORDS), seed=3, scale=0.5)
  words = Tokenizer(models.WordLevel({f'w{i}': i for i in range(22)}, unk_token='w0'))
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  params = traverse_util.unflatten_dict(flat, sep='/')
  lm_workdir.save(folder, LmCheckpoint(WORDS, params, LmTokenizer(words), {'format': 'test'}))
  return folder
