"""GGUF files give the matrices, options and tokens that were written into them."""

import json
import types

import gguf
import numpy as np
import pytest
import tiny_gguf

from gatedfm.convert import gguf_file, hf, lm_files
from gatedfm.data.types import DataError
from gatedfm.execution import lm_workdir
from gatedfm.models.speech_config import ConfigError


@pytest.mark.parametrize('tied', [True, False])
def test_matrices_and_options(tmp_path, tied):
  path = tmp_path / 'a.gguf'
  written = tiny_gguf.write(path, quantised=False, tied=tied)
  file = gguf_file.GgufFile(path)
  cfg = hf.config(file.config())
  assert (cfg.d, cfg.ffn, cfg.layers, cfg.heads, cfg.kv_heads) == (64, 96, 2, 4, 2)
  assert (cfg.theta, cfg.norm_eps, cfg.max_tokens, cfg.tied) == (5000.0, 1e-5, 32, tied)
  assert (cfg.bos, cfg.eos, cfg.pad) == (1, 0, -1)
  tensors = file.tensors()
  pairs = {
    'token_embd': 'model.embed_tokens',
    'blk.1.attn_q': 'model.layers.1.self_attn.q_proj',
    'blk.0.attn_k': 'model.layers.0.self_attn.k_proj',
    'blk.0.attn_v': 'model.layers.0.self_attn.v_proj',
    'blk.1.ffn_gate': 'model.layers.1.mlp.gate_proj',
    'blk.1.ffn_norm': 'model.layers.1.post_attention_layernorm',
  }
  for theirs, name in pairs.items():
    np.testing.assert_array_equal(tensors[f'{name}.weight'].read(), written[f'{theirs}.weight'])
  assert len(tensors) == len(written)


def test_an_import_dequantises(tmp_path):
  written = tiny_gguf.write(tmp_path / 'a.gguf')
  lm_files.bring('gguf', tmp_path / 'a.gguf', tmp_path / 'own', 'float32', lambda line: None)
  model = lm_workdir.load(tmp_path / 'own')
  got = model.params['decoder']['layers']['layers_0']['ffn']['ffn']['w_2']['kernel']
  want = written['blk.0.ffn_down.weight'].T
  assert 0 < np.abs(got - want).max() < 0.01
  t = model.tokenizer
  assert [tiny_gguf.TOKENS[i] for i in t.encode('abc ab 12')] == ['abc', 'Ġ', 'ab', 'Ġ', '1', '2']
  assert t.decode(t.encode('abc ab 12')) == 'abc ab 12'
  assert t.encode('<|start|>a')[0] == 1
  assert t.decode([1, 2]) == 'a'


@pytest.mark.parametrize('begins', [True, False])
def test_what_texts_begin_with(tmp_path, begins):
  tiny_gguf.write(tmp_path / 'a.gguf', begins=begins)
  silent = lambda line: None
  model = lm_files.bring('gguf', tmp_path / 'a.gguf', tmp_path / 'own', 'float32', silent)
  assert model.cfg.bos == 1
  assert model.cfg.start == ((1,) if begins else ())
  assert lm_workdir.load(tmp_path / 'own').cfg.start == model.cfg.start
  # Whoever imports it again knows it too.
  lm_files.export(tmp_path / 'own', tmp_path / 'hf', 'float32', silent)
  again = lm_files.bring('hf', tmp_path / 'hf', tmp_path / 'again', 'float32', silent)
  assert again.cfg.start == model.cfg.start
  about = json.loads((tmp_path / 'hf' / 'tokenizer_config.json').read_text())
  assert (about['bos_token'], about['eos_token']) == ('<|start|>', '<|end|>')
  assert 'pad_token' not in about


def test_scaled_positions_are_refused(tmp_path):
  tiny_gguf.write(tmp_path / 'a.gguf', scaling=gguf.RopeScalingType.LINEAR)
  with pytest.raises(ConfigError, match='rope_scaling is .*linear'):
    hf.config(gguf_file.GgufFile(tmp_path / 'a.gguf').config())
  tiny_gguf.write(tmp_path / 'b.gguf', scaling=gguf.RopeScalingType.NONE)
  hf.config(gguf_file.GgufFile(tmp_path / 'b.gguf').config())


def test_other_files(tmp_path):
  (tmp_path / 'a.gguf').write_bytes(b'nothing of the kind')
  with pytest.raises(DataError, match='is not a GGUF file'):
    gguf_file.GgufFile(tmp_path / 'a.gguf')
  tiny_gguf.write(tmp_path / 'b.gguf', architecture='mamba')
  with pytest.raises(DataError, match="architecture 'mamba'; this reads llama"):
    gguf_file.GgufFile(tmp_path / 'b.gguf')


@pytest.mark.parametrize('kind', ['Q8_K', 'I8'])
def test_types_that_gguf_cannot_read_are_named(kind):
  kind = gguf.GGMLQuantizationType[kind]
  tensor = types.SimpleNamespace(
    name='a.weight', data=np.zeros((1, 512), np.uint8), tensor_type=kind
  )
  with pytest.raises(DataError, match=f'a.weight is of type {kind.name}, which cannot be dequant'):
    gguf_file._read(tensor, 0)
