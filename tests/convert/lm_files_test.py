"""Language models in and out: nothing changes on the way, and what does not fit is named."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_speech
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from gatedfm import mains, partitioning
from gatedfm.convert import hf, lm_files
from gatedfm.data.bpe import LmTokenizer
from gatedfm.data.types import DataError
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm
from gatedfm.models.lm_config import LmConfig, llama
from gatedfm.models.speech_config import ConfigError
from gatedfm.trainers.checkpoints import CheckpointError
from gatedfm.trainers.workdirs import WorkdirError

SIZES = {'vocab_size': 24, 'd': 12, 'layers': 2, 'ffn': 10, 'max_tokens': 12}
KINDS = {
  'opt': LmConfig(**SIZES, heads=2),
  'opt_350m': LmConfig(**SIZES, heads=2, pre_norm=False, final_norm=False, embed_width=8),
  'llama': llama(**SIZES, heads=6, kv_heads=2, tied=False, head_width=4, norm_eps=1e-6),
}
silent = lambda line: None


def tokenizer(words=10):
  out = Tokenizer(models.WordLevel({f'w{i}': i for i in range(words)}, unk_token='w0'))
  out.pre_tokenizer = pre_tokenizers.Whitespace()
  return LmTokenizer(out)


def make(cfg):
  shapes = lm.abstract_params(cfg)
  flat = tiny_speech.random_tree(shapes, seed=2)
  params = traverse_util.unflatten_dict(flat, sep='/')
  return LmCheckpoint(cfg, params, tokenizer(), {'format': 'test'})


@pytest.fixture(scope='module', params=KINDS)
def saved(request, tmp_path_factory):
  """A model's workdir and its export."""
  model = make(KINDS[request.param])
  folder = tmp_path_factory.mktemp('lm')
  lm_workdir.save(folder / 'own', model)
  lm_files.export(folder / 'own', folder / 'theirs', 'float32', silent)
  return folder, model


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_workdir_gives_back_what_was_saved(saved):
  folder, model = saved
  loaded = lm_workdir.load(folder / 'own')
  assert loaded.cfg == model.cfg
  assert loaded.origin == {'format': 'test'}
  assert loaded.tokenizer.encode('w3 w1') == [3, 1]
  same(loaded.params, model.params)


def test_an_export_is_imported_as_it_was(saved, tmp_path):
  folder, model = saved
  lines = []
  back = lm_files.bring('hf', folder / 'theirs', tmp_path / 'new', 'float32', lines.append)
  same(back.params, model.params)
  assert not back.cfg.add_bos  # its tokenizer puts nothing before a text
  assert dataclasses.replace(back.cfg, scan_layers=model.cfg.scan_layers, add_bos=True) == model.cfg
  same(lm_workdir.load(tmp_path / 'new').params, model.params)
  assert '2 layers' in lines[0]


def test_parameters_of_another_type(saved, tmp_path):
  folder, model = saved
  wide = 'bfloat16'
  lm_files.bring('hf', folder / 'theirs', tmp_path / 'new', wide, silent, computed=wide)
  loaded = lm_workdir.load(tmp_path / 'new')
  assert (loaded.cfg.dtype, loaded.cfg.activation_dtype) == (wide, wide)
  want = jax.tree.map(lambda a: np.asarray(a).astype(lm_files.DTYPES['bfloat16']), model.params)
  same(loaded.params, want)


def test_laid_out_on_devices(saved):
  folder, model = saved
  mesh = partitioning.make_mesh(data=1, fsdp=2, model=4)
  loaded = lm_workdir.load(folder / 'own', mesh)
  same(loaded.params, model.params)
  kernel = loaded.params['decoder']['layers']['layers_0']['ffn']['ffn']['w_1']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (6, 10)  # 4 do not divide 10
  embedding = loaded.params['decoder']['embedding']
  assert embedding.sharding.shard_shape(embedding.shape)[0] == 6


def test_imported_onto_devices(saved, tmp_path, monkeypatch):
  folder, model = saved
  monkeypatch.setattr(lm_workdir, 'HOST_BYTES', 1)  # one array after the other
  mesh = mains.mesh(2)
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 4, 'model': 2}
  back = lm_files.bring('hf', folder / 'theirs', tmp_path / 'new', 'float32', silent, mesh)
  same(back.params, model.params)
  flat = traverse_util.flatten_dict(back.params, sep='/')
  assert {k: x.sharding for k, x in flat.items()} == lm_workdir.shardings(model.cfg, mesh)
  query = flat['decoder/layers/layers_1/attention/attention/query/kernel']
  assert query.addressable_shards[0].data.shape == (3, query.shape[1] // 2)
  same(lm_workdir.load(tmp_path / 'new').params, model.params)
  with pytest.raises(ConfigError, match=r'--model_parallel=3: mesh .* device count 8'):
    mains.mesh(3)
  assert mains.mesh(0) is None


def test_many_files(saved, tmp_path, monkeypatch):
  folder, model = saved
  monkeypatch.setattr(lm_files, 'SHARD_BYTES', 2000)
  lm_files.export(folder / 'own', tmp_path / 'theirs', 'float32', silent)
  assert len(list((tmp_path / 'theirs').glob('model-*-of-*.safetensors'))) > 1
  back = lm_files.bring('hf', tmp_path / 'theirs', tmp_path / 'new', 'float32', silent)
  same(back.params, model.params)


def pruned(kind, **gates):
  model = make(KINDS[kind])
  gates = {f'decoder/{name}': np.asarray(g, np.float32) for name, g in gates.items()}
  return lm_workdir.compacted(model, Gates(gates), {'format': 'pruned'})


ALIKE = {
  'opt': {'ffn_channels': np.arange(10) % 3, 'attention': [1, 0], 'ffn': [1, 0]},
  'llama': {'attention_heads': [[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]]},
}


@pytest.mark.parametrize('kind', ALIKE)
def test_a_pruned_model_goes_out_where_layers_are_alike(kind, tmp_path, fast_compilation):
  small = pruned(kind, **{k: np.asarray(g) > 0 for k, g in ALIKE[kind].items()})
  lm_workdir.save(tmp_path / 'own', small)
  lm_files.export(tmp_path / 'own', tmp_path / 'theirs', 'float32', silent)
  back = lm_files.bring('hf', tmp_path / 'theirs', tmp_path / 'new', 'float32', silent)
  lines = []
  lm_files.export_plain(tmp_path / 'own', tmp_path / 'plain', lines.append)
  assert f'{back.cfg.layers} layers, {back.cfg.heads} heads' in lines[0]
  plain = lm_workdir.load(tmp_path / 'plain')
  assert plain.origin['format'] == 'pruned'
  same(plain.params, back.params)

  def logits(model):
    net, params = lm.for_inference(model.cfg, model.params)
    ids, fixed = np.arange(10)[None], model.fixed()
    return tiny_speech.jit(lambda p: net.apply({'params': p}, ids, gates=fixed))(params)

  np.testing.assert_allclose(logits(back), logits(small), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('kind', 'gates', 'message'),
  [
    ('opt', {'attention_heads': [1, 0]}, "1 heads of 6 are left of a width of 12, and OPT's"),
    ('llama', {'ffn_channels': [[1] * 10, [1, 0] * 5]}, '--shape=uniform'),
    ('llama', {'attention_heads': [[1, 1, 1, 1, 1, 0]] * 2}, '--groups'),
    ('narrow', {'attention_heads': [1] * 5 + [0]}, r'5 heads do not .* one of \[1, 2, 3, 4\]'),
  ],
)
def test_what_their_layout_cannot_hold(kind, gates, message, tmp_path, monkeypatch):
  monkeypatch.setitem(KINDS, 'narrow', llama(**SIZES, heads=6, head_width=4))
  lm_workdir.save(tmp_path / 'own', pruned(kind, **gates))
  with pytest.raises(ConfigError, match=message):
    lm_files.export(tmp_path / 'own', tmp_path / 'theirs', 'float32', silent)
  assert not (tmp_path / 'theirs').exists()


def test_all_that_does_not_fit_is_named(saved, tmp_path):
  folder, model = saved
  theirs = tmp_path / 'theirs'
  theirs.mkdir()
  for name in ('config.json', 'tokenizer.json'):
    (theirs / name).write_bytes((folder / 'theirs' / name).read_bytes())
  tensors = load_file(folder / 'theirs' / 'model.safetensors')
  names = [row.theirs for row in hf.rows(model.cfg)]
  missing, wrong = names[-1], names[0]
  del tensors[missing]
  tensors[wrong] = tensors[wrong][1:].copy()
  tensors['more'] = np.zeros(3, np.float32)
  save_file(tensors, theirs / 'model.safetensors')
  with pytest.raises(DataError, match='3 tensors do not fit') as e:
    lm_files.bring('hf', theirs, tmp_path / 'new', 'float32', silent)
  for part in (f'{missing} ', f'{wrong}: model', 'more: not in the model'):
    assert part in str(e.value)
  assert not (tmp_path / 'new').exists()


def test_configurations_by_name_or_folder(saved, tmp_path):
  folder, model = saved
  assert lm_files.config_of('opt-66b').layers == 64
  assert lm_files.config_of('smollm2').groups == 3
  assert lm_files.config_of(str(folder / 'own')) == model.cfg
  theirs = lm_files.config_of(str(folder / 'theirs'))
  assert dataclasses.replace(theirs, scan_layers=model.cfg.scan_layers) == model.cfg
  with pytest.raises(DataError, match=r'config\.json cannot be read: .*give opt-66b'):
    lm_files.config_of(str(tmp_path))
  with pytest.raises(ConfigError, match="OPT size is '7b'"):
    lm_files.config_of('opt-7b')
  small = lm_workdir.compacted(model, Gates({'decoder/ffn': np.array([1.0, 0])}), {})
  lm_workdir.save(tmp_path / 'pruned', small)
  with pytest.raises(ConfigError, match='was pruned: export it as --export=plain'):
    lm_files.config_of(str(tmp_path / 'pruned'))


def test_oldest_names_of_opt(tmp_path):
  """Without `model.`, with a version, with the output layer once more."""
  model = make(KINDS['opt'])
  lm_workdir.save(tmp_path / 'own', model)
  lm_files.export(tmp_path / 'own', tmp_path / 'theirs', 'float32', silent)
  path = tmp_path / 'theirs' / 'model.safetensors'
  tensors = {k.removeprefix('model.'): v for k, v in load_file(path).items()}
  tensors['decoder.version'] = np.zeros(1, np.float32)
  tensors['lm_head.weight'] = tensors['decoder.embed_tokens.weight'].copy()
  save_file(tensors, path)
  back = lm_files.bring('hf', tmp_path / 'theirs', tmp_path / 'new', 'float32', silent)
  same(back.params, model.params)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'gpt2'}, "model_type is 'gpt2'; ours reads opt and llama"),
    ({'activation_function': 'tanh'}, "activation 'tanh'"),
    ({'_remove_final_layer_norm': True}, '_remove_final_layer_norm is True'),
    ({'hidden_size': None}, "config.json has no 'hidden_size'"),
    ({'hidden_size': '12'}, "hidden_size is '12'; it must be a whole number above 0"),
    ({'num_hidden_layers': 2.0}, 'num_hidden_layers is 2.0'),
    ({'num_attention_heads': 0}, 'num_attention_heads is 0'),
    ({'eos_token_id': '</s>'}, "eos_token_id is '</s>'; it must be a number"),
  ],
)
def test_options_that_ours_has_not(change, message):
  theirs = hf.to_config(KINDS['opt']) | change
  with pytest.raises(ConfigError, match=message):
    hf.config(theirs)


def test_options_of_no_kind():
  with pytest.raises(ConfigError, match='named options'):
    hf.config([1])
  assert hf.config(hf.to_config(KINDS['opt']) | {'eos_token_id': []}).eos == -1
  assert hf.config(hf.to_config(KINDS['opt']) | {'pad_token_id': None}).pad == -1


@pytest.mark.parametrize(
  ('kind', 'change', 'lost'),
  [
    ('opt', {'norm_eps': 1e-3}, 'norm_eps'),
    ('opt', {'position_offset': 0}, 'position_offset'),
    ('llama', {'norm': 'layer', 'use_bias': True}, 'norm, use_bias'),
  ],
)
def test_what_their_classes_cannot_hold(kind, change, lost):
  with pytest.raises(ConfigError, match=f'have no such {lost}: it cannot be exported'):
    hf.to_config(dataclasses.replace(KINDS[kind], **change))


def test_refusals(saved, tmp_path):
  folder, _ = saved
  with pytest.raises(WorkdirError, match='is not empty'):
    lm_files.bring('hf', folder / 'theirs', folder / 'own', 'float32', silent)
  with pytest.raises(WorkdirError, match='is not empty'):
    lm_files.export(folder / 'own', folder / 'theirs', 'float32', silent)
  with pytest.raises(CheckpointError, match='does not exist'):
    lm_files.export(tmp_path / 'none', tmp_path / 'new', 'float32', silent)
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'config.json').write_text('{"steps": 3}')
  with pytest.raises(CheckpointError, match='does not hold a language model'):
    lm_workdir.load(run)
  other = tmp_path / 'other'
  other.mkdir()
  for path in (folder / 'theirs').iterdir():
    (other / path.name).write_bytes(path.read_bytes())
  tokenizer(30).save(other / 'tokenizer.json')
  with pytest.raises(DataError, match='the tokenizer has 30 tokens, the model 24'):
    lm_files.bring('hf', other, tmp_path / 'new', 'float32', silent)
  (other / 'config.json').write_text('{')
  with pytest.raises(DataError, match=r'config\.json cannot be read'):
    lm_files.bring('hf', other, tmp_path / 'new', 'float32', silent)
  with pytest.raises(DataError, match='no file'):
    lm_files.bring('gguf', tmp_path / 'none.gguf', tmp_path / 'new', 'float32', silent)
  assert json.loads((folder / 'own' / 'config.json').read_text())['param_dtype'] == 'float32'
