"""A GGUF file of a tiny Llama with random weights, written by llama.cpp's own library."""

import gguf
import numpy as np

D, FFN, HEADS, GROUPS, LAYERS = 64, 96, 4, 2, 2
# The first two are control tokens; bytes stand for themselves in GPT-2's alphabet.
TOKENS = ['<|end|>', '<|start|>', *'abcdefgh123', 'Ġ', 'ab', 'Ġa', 'abc']
MERGES = ['a b', 'Ġ a', 'ab c']


def write(path, quantised=True, architecture='llama', tied=True, begins=False, scaling=None):
  """Writes the file; returns its matrices in Hugging Face's layout, before quantisation."""
  rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, architecture)
  writer.add_block_count(LAYERS)
  writer.add_context_length(32)
  writer.add_embedding_length(D)
  writer.add_feed_forward_length(FFN)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(GROUPS)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(5000.0)
  writer.add_vocab_size(len(TOKENS))
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(TOKENS)
  kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2)
  writer.add_token_types(kinds)
  writer.add_token_merges(MERGES)
  writer.add_bos_token_id(1)
  writer.add_add_bos_token(begins)
  if scaling:
    writer.add_rope_scaling_type(scaling)
  writer.add_eos_token_id(0)
  out = {}

  def add(name, shape, heads=0):
    a = rng.normal(size=shape).astype(np.float32) / 8
    out[name] = a
    if heads:  # as llama.cpp's converter turns them
      a = a.reshape(heads, 2, -1, shape[-1]).swapaxes(1, 2).reshape(shape)
    if quantised and len(shape) == 2:
      kind = gguf.GGMLQuantizationType.Q8_0
      writer.add_tensor(name, gguf.quants.quantize(a, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, a)

  add('token_embd.weight', (len(TOKENS), D))
  add('output_norm.weight', (D,))
  if not tied:
    add('output.weight', (len(TOKENS), D))
  kv = D // HEADS * GROUPS
  for i in range(LAYERS):
    add(f'blk.{i}.attn_q.weight', (D, D), HEADS)
    add(f'blk.{i}.attn_k.weight', (kv, D), GROUPS)
    add(f'blk.{i}.attn_v.weight', (kv, D))
    add(f'blk.{i}.attn_output.weight', (D, D))
    for name in ('gate', 'up'):
      add(f'blk.{i}.ffn_{name}.weight', (FFN, D))
    add(f'blk.{i}.ffn_down.weight', (D, FFN))
    for name in ('attn', 'ffn'):
      add(f'blk.{i}.{name}_norm.weight', (D,))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return out
