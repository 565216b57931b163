"""Language models in GGUF files (llama.cpp's), dequantised tensor by tensor.

Names, layouts and options become Hugging Face's, which `convert.hf` reads on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from gatedfm.convert.tensor_files import LazyTensor
from gatedfm.data.types import DataError

_TOP = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
}
_LAYER = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
# How texts are cut before byte pairs are merged, by what llama.cpp calls it.
_CUTS = {'smollm': True, 'gpt-2': False}  # whether digits stand alone
_CONTROL = 3  # token type


class GgufFile:
  """An open file of the Llama kind.

  Raises:
    DataError: no such file, a damaged one, or another kind of model.
  """

  def __init__(self, path: Path):
    if not path.is_file():
      raise DataError(f'{path} is no file: give a .gguf file')
    try:
      self._reader = gguf.GGUFReader(path)
    except Exception as e:  # whatever a damaged file makes it raise
      raise DataError(f'{path} is not a GGUF file: {e}') from None
    self._path = path
    kind = self._field('general.architecture')
    if kind != 'llama':
      raise DataError(f'{path} is of architecture {kind!r}; this reads llama')

  def _field(self, name: str, default: Any = None) -> Any:
    field = self._reader.fields.get(name)
    if field is None and default is None:
      raise DataError(f'{self._path} does not say {name}')
    return default if field is None else field.contents()

  def config(self) -> dict[str, Any]:
    """The options, as a `config.json` of Hugging Face says them."""
    of = lambda name, *default: self._field(f'llama.{name}', *default)
    token = lambda name: self._field(f'tokenizer.ggml.{name}_token_id', -1)
    heads, width = of('attention.head_count'), of('embedding_length')
    scaling = of('rope.scaling.type', 'none')
    tied = all(t.name != 'output.weight' for t in self._reader.tensors)
    return {
      'model_type': 'llama',
      'vocab_size': len(self._field('tokenizer.ggml.tokens')),
      'hidden_size': width,
      'num_hidden_layers': of('block_count'),
      'num_attention_heads': heads,
      'num_key_value_heads': of('attention.head_count_kv', heads),
      'head_dim': of('rope.dimension_count', width // heads),
      'intermediate_size': of('feed_forward_length'),
      # Stored in single precision: 9.99999974e-06 was 1e-05.
      'rms_norm_eps': float(f'{of("attention.layer_norm_rms_epsilon"):.6g}'),
      'rope_theta': of('rope.freq_base', 10_000.0),
      'rope_scaling': None if scaling == 'none' else {'rope_type': scaling},
      'max_position_embeddings': of('context_length'),
      'tie_word_embeddings': tied,
      'bos_token_id': token('bos'),
      'eos_token_id': token('eos'),
      'pad_token_id': token('padding'),
    }

  def tensors(self) -> dict[str, LazyTensor]:
    """Under Hugging Face's names and in its layout, dequantised to float32 when read."""
    config = self.config()
    heads = {'attn_q': config['num_attention_heads'], 'attn_k': config['num_key_value_heads']}
    out = {}
    for tensor in self._reader.tensors:
      parts = tensor.name.split('.')
      if parts[0] == 'blk' and len(parts) == 4 and parts[2] in _LAYER:
        name = f'model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}'
        turned = heads.get(parts[2], 0)
      else:
        name, turned = _TOP.get(tensor.name, tensor.name), 0
      shape = tuple(int(n) for n in reversed(tensor.shape))
      out[name] = LazyTensor(shape, lambda tensor=tensor, turned=turned: _read(tensor, turned))
    return out

  def tokenizer(self) -> Tokenizer:
    """Byte-level BPE, as the file has it.

    Raises:
      DataError: another kind of tokenizer.
    """
    of = lambda name: self._field(f'tokenizer.ggml.{name}')
    kind, cut = of('model'), self._field('tokenizer.ggml.pre', 'gpt-2')
    if kind != 'gpt2' or cut not in _CUTS:
      raise DataError(f'{self._path}: tokenizer {kind} {cut}; this reads gpt2 {"|".join(_CUTS)}')
    tokens, merges = of('tokens'), [tuple(m.split(' ')) for m in of('merges')]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    out = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if _CUTS[cut]:
      cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    out.pre_tokenizer, out.decoder = pre_tokenizers.Sequence(cuts), decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, of('token_type')) if kind == _CONTROL]
    out.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    if self._field('tokenizer.ggml.add_bos_token', False):
      bos = tokens[of('bos_token_id')]
      out.post_processor = processors.TemplateProcessing(
        single=f'{bos} $A', special_tokens=[(bos, of('bos_token_id'))]
      )
    return out


def _read(tensor: Any, heads: int) -> np.ndarray:
  """A tensor in float32; of queries and keys the channels back in Hugging Face's order.

  There rotary positions turn channels half a head apart, in llama.cpp neighbours.
  """
  try:
    out = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
  except NotImplementedError as e:
    kind = tensor.tensor_type.name
    raise DataError(f'{tensor.name} is of type {kind}, which cannot be dequantised: {e}') from None
  if not heads:
    return out
  return out.reshape(heads, -1, 2, out.shape[-1]).swapaxes(1, 2).reshape(out.shape)
