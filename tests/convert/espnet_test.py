"""ESPnet state dicts, without ESPnet: their names and shapes are written out here."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gatedfm.convert import espnet
from gatedfm.models import stack
from gatedfm.models.speech import SpeechModel
from gatedfm.models.speech_config import GateConfig, SpeechConfig
from gatedfm.nn import gating

D, F, G, H, K, M, V = 8, 12, 6, 10, 5, 16, 11  # F, H: hidden widths; G: cgMLP's; M: mels


def linear(name: str, out: int, width: int) -> dict:
  return {f'{name}.weight': (out, width), f'{name}.bias': (out,)}


def norms(*names: str, width: int = D) -> dict:
  return {f'{n}.{p}': (width,) for n in names for p in ('weight', 'bias')}


def attention(name: str) -> dict:
  parts = [linear(f'{name}.linear_{x}', D, D) for x in ('q', 'k', 'v', 'out')]
  return {k: v for part in parts for k, v in part.items()}


def ffn(name: str, hidden: int) -> dict:
  return linear(f'{name}.w_1', hidden, D) | linear(f'{name}.w_2', D, hidden)


def encoder_layer(kind: str) -> dict:
  if kind == 'transformer':
    return norms('norm1', 'norm2') | attention('self_attn') | ffn('feed_forward', F)
  return (
    norms('norm_ff', 'norm_ff_macaron', 'norm_mha', 'norm_mlp', 'norm_final')
    | attention('attn')
    | ffn('feed_forward', F)
    | ffn('feed_forward_macaron', F)
    | linear('cgmlp.channel_proj1.0', G, D)
    | norms('cgmlp.csgu.norm', width=G // 2)
    | {'cgmlp.csgu.conv.weight': (G // 2, 1, K), 'cgmlp.csgu.conv.bias': (G // 2,)}
    | linear('cgmlp.channel_proj2', D, G // 2)
    | {
      'depthwise_conv_fusion.weight': (2 * D, 1, K),
      'depthwise_conv_fusion.bias': (2 * D,),
    }
    | linear('merge_proj', D, 2 * D)
  )


def shapes(kind: str) -> dict:
  decoder_layer = (
    norms('norm1', 'norm2', 'norm3')
    | attention('self_attn')
    | attention('src_attn')
    | ffn('feed_forward', H)
  )
  out = {
    'normalize.mean': (M,),
    'normalize.std': (M,),
    'frontend.logmel.melmat': (257, M),
    'encoder.embed.conv.0.weight': (D, 1, 3, 3),
    'encoder.embed.conv.0.bias': (D,),
    'encoder.embed.conv.2.weight': (D, D, 3, 3),
    'encoder.embed.conv.2.bias': (D,),
    **linear('encoder.embed.out.0', D, 3 * D),
    **norms('encoder.after_norm', 'decoder.after_norm'),
    'decoder.embed.0.weight': (V, D),
    **linear('decoder.output_layer', V, D),
    **linear('ctc.ctc_lo', V, D),
  }
  for i in range(2):
    out |= {f'encoder.encoders.{i}.{k}': v for k, v in encoder_layer(kind).items()}
  for i in range(3):
    out |= {f'decoder.decoders.{i}.{k}': v for k, v in decoder_layer.items()}
  return out


@pytest.fixture(params=['e_branchformer', 'transformer'])
def kind(request) -> str:
  return request.param


def random_state(kind: str) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes(kind).items()}


def model_shapes(cfg: SpeechConfig) -> dict:
  """What the model itself initialises."""
  context = gating.Context(jnp.zeros(1, int), jnp.zeros(1, int))
  init = lambda: SpeechModel(cfg).init(
    jax.random.key(0),
    jnp.zeros((1, 20, M)),
    jnp.array([20]),
    jnp.zeros((1, 2), int),
    context,
  )
  params = jax.eval_shape(lambda: nn.unbox(init())['params'])
  return {k: v.shape for k, v in traverse_util.flatten_dict(params, sep='/').items()}


def test_theirs_to_ours_and_back_is_exact(kind):
  state = random_state(kind)
  cfg = espnet.infer_config(state, heads=2)
  back = espnet.to_espnet(espnet.from_espnet(state, cfg), cfg)
  assert set(state) - set(back) == {k for k in state if k[:5] in ('norma', 'front')}
  for name, array in back.items():
    np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_ours_to_theirs_and_back_is_exact(kind):
  cfg = espnet.infer_config(random_state(kind), heads=2)
  rng = np.random.default_rng(1)
  ours = {k: rng.normal(size=s).astype(np.float32) for k, s in model_shapes(cfg).items()}
  params = traverse_util.unflatten_dict(ours, sep='/')
  back = espnet.from_espnet(espnet.to_espnet(params, cfg), cfg)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_tree_is_the_models_in_float32(kind):
  state = {k: a.astype(np.float16) for k, a in random_state(kind).items()}
  cfg = espnet.infer_config(state, heads=2)
  ours = traverse_util.flatten_dict(espnet.from_espnet(state, cfg), sep='/')
  assert {k: a.shape for k, a in ours.items()} == model_shapes(cfg)
  assert {a.dtype for a in ours.values()} == {np.dtype(np.float32)}


def test_layers_keep_their_order_and_branches_their_half_of_the_merge():
  state = random_state('e_branchformer')
  cfg = espnet.infer_config(state, heads=2)
  encoder = stack.unstack(espnet.from_espnet(state, cfg))['encoder']['layers']
  for i in range(2):
    layer, theirs = encoder[f'layers_{i}'], f'encoder.encoders.{i}'
    weight = state[f'{theirs}.merge_proj.weight']
    taps = state[f'{theirs}.depthwise_conv_fusion.weight']
    np.testing.assert_array_equal(layer['attention']['merge']['kernel'], weight[:, :D].T)
    np.testing.assert_array_equal(layer['cgmlp']['merge']['kernel'], weight[:, D:].T)
    np.testing.assert_array_equal(layer['cgmlp']['merge']['conv_kernel'], taps[D:, 0].T)


def test_everything_wrong_is_named_at_once():
  state = random_state('e_branchformer')
  cfg = espnet.infer_config(state, heads=2)
  state['encoder.encoders.1.attn.pos_bias_u'] = np.zeros(3)
  state['extra'] = np.zeros(3)
  del state['ctc.ctc_lo.bias'], state['decoder.decoders.2.norm3.weight']
  state['encoder.after_norm.bias'] = np.zeros(3)
  with pytest.raises(ValueError, match='the ESPnet state dict does not fit') as error:
    espnet.from_espnet(state, cfg)
  message = str(error.value)
  missing, unexpected, misshaped = (
    message.index(word) for word in ('missing (2)', 'unexpected (2)', 'mis-shaped (1)')
  )
  for name in ('ctc.ctc_lo.bias', 'decoder.decoders.2.norm3.weight'):
    assert missing < message.index(name) < unexpected
  for name in ('encoder.encoders.1.attn.pos_bias_u', 'extra'):
    assert unexpected < message.index(name) < misshaped
  assert 'encoder.after_norm.bias (3,), expected (8,)' in message[misshaped:]


def test_a_gate_predictor_is_named_not_dropped():
  state = random_state('transformer')
  cfg = espnet.infer_config(state, heads=2)
  cfg.gates = GateConfig(enabled=True)
  params = espnet.from_espnet(state, cfg)
  params['encoder_gates'] = {'mlp': {'bias': np.zeros(4)}}
  with pytest.raises(ValueError, match=r'unexpected.*\n *encoder_gates/mlp/bias'):
    espnet.to_espnet(params, cfg)


def test_config_is_read_from_shapes(kind):
  cfg = espnet.infer_config(random_state(kind), heads=2)
  branches = {'cgmlp': G, 'kernel': K} if kind == 'e_branchformer' else {}
  assert cfg == SpeechConfig(
    vocab_size=V,
    mels=M,
    encoder=kind,
    d=D,
    heads=2,
    encoder_layers=2,
    decoder_layers=3,
    encoder_ffn=F,
    decoder_ffn=H,
    **branches,
  )
  cfg.validate()


def test_config_has_heads_of_64_unless_told():
  state = random_state('transformer')
  with pytest.raises(ValueError, match='say how many heads'):
    espnet.infer_config(state)
  state['encoder.after_norm.weight'] = np.zeros(384)
  assert espnet.infer_config(state).heads == 6


def test_config_names_what_it_lacks():
  state = random_state('transformer')
  del state['decoder.embed.0.weight'], state['encoder.after_norm.weight']
  with pytest.raises(ValueError, match=r'decoder\.embed\.0.*encoder\.after_norm'):
    espnet.infer_config(state, heads=2)


def test_feature_statistics():
  state = random_state('transformer')
  stats = espnet.feature_stats(state)
  np.testing.assert_array_equal(stats.mean, state['normalize.mean'])
  np.testing.assert_array_equal(stats.std, state['normalize.std'])
  del state['normalize.std']
  with pytest.raises(ValueError, match=r'has no normalize\.std'):
    espnet.feature_stats(state)
