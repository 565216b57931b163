"""The language model against Hugging Face's torch modules, random weights."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from transformers import modeling_gguf_pytorch_utils  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / 'convert'))
import tiny_gguf  # noqa: E402

from gatedfm.convert import hf, lm_files, tensor_files  # noqa: E402
from gatedfm.convert.tensor_files import LazyTensor  # noqa: E402
from gatedfm.execution import lm_workdir  # noqa: E402
from gatedfm.execution.lm_workdir import LmCheckpoint  # noqa: E402
from gatedfm.gates import Gates  # noqa: E402
from gatedfm.models import lm  # noqa: E402
from gatedfm.models.lm import for_inference  # noqa: E402
from gatedfm.pruning import factors  # noqa: E402
from gatedfm.pruning.allocation import Allocation, allocate  # noqa: E402

pytestmark = pytest.mark.parity

SIZES = {'vocab_size': 67, 'hidden_size': 48, 'num_hidden_layers': 3, 'max_position_embeddings': 40}
OPT = SIZES | {'num_attention_heads': 4, 'ffn_dim': 80, 'word_embed_proj_dim': 48, 'dropout': 0.0}
LLAMA = SIZES | {'num_attention_heads': 6, 'intermediate_size': 80}
CASES = {
  'opt': ('OPT', OPT),
  'opt_350m': ('OPT', OPT | {'do_layer_norm_before': False, 'word_embed_proj_dim': 20}),
  'opt_350m_untied': (
    'OPT',
    OPT | {'do_layer_norm_before': False, 'word_embed_proj_dim': 20, 'tie_word_embeddings': False},
  ),
  'llama': ('Llama', LLAMA | {'num_key_value_heads': 6, 'tie_word_embeddings': False}),
  'llama_gqa': ('Llama', LLAMA | {'num_key_value_heads': 2, 'tie_word_embeddings': True}),
  'llama_wide': ('Llama', LLAMA | {'num_key_value_heads': 3, 'head_dim': 10, 'rms_norm_eps': 1e-5}),
}


@pytest.fixture(scope='module', params=CASES)
def pair(request):
  """Their module, and ours with its weights."""
  kind, sizes = CASES[request.param]
  torch.manual_seed(0)
  theirs = getattr(transformers, f'{kind}ForCausalLM')(
    getattr(transformers, f'{kind}Config')(**sizes)
  )
  with torch.no_grad():  # biases and norms too
    for p in theirs.parameters():
      p.add_(0.05 * torch.randn_like(p))
  theirs.eval()
  cfg = hf.config(theirs.config.to_dict())
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  lazy = {k: LazyTensor(v.shape, lambda v=v: v) for k, v in state.items()}
  flat = {path: tensor.read() for path, tensor in hf.lazy_params(lazy, cfg).items()}
  return theirs, cfg, traverse_util.unflatten_dict(flat, sep='/'), state


def tokens(cfg, batch=3, length=17):
  return np.random.default_rng(1).integers(3, cfg.vocab_size, (batch, length)).astype(np.int32)


def theirs_logits(module, ids, mask):
  with torch.no_grad():
    return module(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()


def random_model(kind):
  name, sizes = CASES[kind]
  cfg = hf.config(getattr(transformers, f'{name}Config')(**sizes).to_dict())
  rng, shapes = np.random.default_rng(3), lm.abstract_params(cfg)
  flat = {k: rng.normal(0, 0.2, x.shape).astype(np.float32) for k, x in shapes.items()}
  return LmCheckpoint(cfg, traverse_util.unflatten_dict(flat, sep='/'), None, {})


@pytest.mark.parametrize('side', ['none', 'left', 'right'])
def test_logits(pair, side):
  theirs, cfg, params, _ = pair
  ids, mask = tokens(cfg), np.ones((3, 17), bool)
  if side != 'none':
    for b, n in enumerate((0, 4, 9)):
      mask[b, slice(0, n) if side == 'left' else slice(17 - n, 17)] = False
  want = theirs_logits(theirs, np.where(mask, ids, 1), mask)
  model, own = for_inference(cfg, params)
  got = model.apply({'params': own}, ids, mask if side != 'none' else None)
  np.testing.assert_allclose(np.asarray(got)[mask], want[mask], atol=1e-4, rtol=1e-4)


def test_and_back(pair):
  _, cfg, params, state = pair
  back = dict(hf.to_theirs(params, cfg))
  state = {k: v for k, v in state.items() if k != 'lm_head.weight' or not cfg.tied}
  assert set(back) == set(state)
  for name, value in state.items():
    np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize('zipped', [True, False])
def test_their_files(pair, zipped, tmp_path):
  """Torch's files are read without torch, and ours by theirs."""
  theirs, cfg, params, state = pair
  views = {k: torch.tensor(v).to(torch.bfloat16) for k, v in state.items()}
  views |= {'turned': torch.arange(12.0).reshape(3, 4).T, 'part': torch.arange(9.0)[2:7]}
  views['kept'] = torch.nn.Parameter(torch.ones(2))
  path = tmp_path / 'pytorch_model.bin'
  torch.save(views, path, _use_new_zipfile_serialization=zipped)
  found = tensor_files.in_folder(tmp_path)
  assert set(found) == set(views)
  for name, tensor in views.items():
    want = tensor.detach().float().numpy()
    np.testing.assert_array_equal(found[name].read().astype(np.float32), want)

  lm_workdir.save(tmp_path / 'own', LmCheckpoint(cfg, params, None, {}))
  lm_files.export(tmp_path / 'own', tmp_path / 'exported', 'float32', lambda line: None)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'exported')
  ids = tokens(cfg)
  everything = np.ones(ids.shape, bool)
  want = theirs_logits(theirs, ids, everything)
  np.testing.assert_allclose(theirs_logits(again.eval(), ids, everything), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize('kind', ['opt', 'opt_350m'])
def test_factorized_embeddings_in_their_hands(kind, tmp_path):
  """And with ranks that pruning has closed."""
  dense = random_model(kind)
  params, rows = factors.factorize(dense.params, ['decoder/embedding'], rank=9)
  cfg = factors.factored(dense.cfg, rows)
  small = LmCheckpoint(cfg, params, None, {})
  ranks = np.ones((1, 9), np.float32)
  ranks[0, [2, 7]] = 0
  ids = tokens(cfg)
  model, own = for_inference(cfg, params)
  for name, gates in (('whole', None), ('cut', Gates({'decoder/embedding_ranks': ranks}))):
    out = small if gates is None else lm_workdir.compacted(small, gates, {})
    lm_workdir.save(tmp_path / name, out)
    lm_files.export(tmp_path / name, tmp_path / f'{name}_hf', 'float32', lambda line: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f'{name}_hf').eval()
    assert theirs.get_input_embeddings().weight.shape == (67, 9 if gates is None else 7)
    want = model.apply({'params': own}, ids, gates=gates)
    got = theirs_logits(theirs, ids, np.ones(ids.shape, bool))
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


PRUNED = {
  'opt': {'decoder/ffn_channels': 0.3},
  'llama': {'decoder/ffn_channels': 0.3, 'decoder/attention_heads': 0.4},
  'llama_gqa': {'decoder/ffn_channels': 0.3, 'decoder/attention_heads': 0.5},
}


@pytest.mark.parametrize('kind', PRUNED)
def test_pruned_models_in_their_hands(kind, tmp_path):
  """Channels, heads and a whole layer less."""
  dense = random_model(kind)
  cfg, rng = dense.cfg, np.random.default_rng(3)
  scores = {s.name: rng.random((s.layers, s.units)) for s in cfg.unit_sites()}
  gates = allocate(scores, PRUNED[kind], cfg, Allocation('uniform', groups=kind == 'llama_gqa'))
  layers = {s.name: np.array([1.0, 0, 1]) for s in cfg.all_sites()}
  lm_workdir.save(tmp_path / 'own', lm_workdir.compacted(dense, Gates(gates.values | layers), {}))
  lm_files.export(tmp_path / 'own', tmp_path / 'exported', 'float32', lambda line: None)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'exported').eval()
  ids = tokens(cfg)
  model, params = for_inference(cfg, dense.params)
  masked = Gates({k: jnp.asarray(g) for k, g in (gates.values | layers).items()})
  want = model.apply({'params': params}, ids, gates=masked)
  got = theirs_logits(theirs, ids, np.ones(ids.shape, bool))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  size = sum(x.size for x in jax.tree.leaves(dense.params))
  assert sum(p.numel() for p in theirs.parameters()) < 0.8 * size


def test_gguf_as_transformers_reads_it(tmp_path):
  tiny_gguf.write(tmp_path / 'a.gguf')
  # Its `from_pretrained` wants another package for this; what reads the file does not.
  read = modeling_gguf_pytorch_utils.load_gguf_checkpoint
  theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**read(tmp_path / 'a.gguf')['config'])
  )
  tensors = read(tmp_path / 'a.gguf', return_tensors=True, model_to_load=theirs)['tensors']
  assert theirs.load_state_dict(tensors, strict=False).missing_keys == ['lm_head.weight']
  theirs.eval()
  own = lm_files.bring('gguf', tmp_path / 'a.gguf', tmp_path / 'own', 'float32', lambda line: None)
  ids = np.random.default_rng(0).integers(0, own.cfg.vocab_size, (2, 11))
  model, params = for_inference(own.cfg, own.params)
  want = theirs_logits(theirs, ids, np.ones(ids.shape, bool))
  np.testing.assert_allclose(model.apply({'params': params}, ids), want, rtol=1e-4, atol=1e-4)
