"""Parameters of ESPnet's speech-to-text models (OWSM) to ours and back, exactly.

One table says which of their tensors is which of ours and how the two are laid out;
reading, writing and checking all walk it. Their side is the numpy state dict of
`ESPnetS2TModel` (`espnet2/s2t/espnet_model.py`) with an E-Branchformer or Transformer
encoder, absolute positions, `conv2d` subsampling and a pre-norm Transformer decoder; ours
is the scanned tree of `SpeechModel` (`models.stack.unstack` unrolls it).

Letters: B batch, T frames, L tokens, D model, N layers, K taps, C channels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gatedfm.data.features import FeatureStats
from gatedfm.models.speech import SpeechModel
from gatedfm.models.speech_config import GateConfig, SpeechConfig
from gatedfm.nn import gating

Arrays = Mapping[str, np.ndarray]

# Feature extraction and normalisation stand in their state dict but are not parameters.
NOT_PARAMETERS = ('frontend.', 'normalize.')


class Layout(NamedTuple):
  """How one array is laid out on either side."""

  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
MATRIX = Layout(lambda a: a.T, lambda a: a.T)  # (out, in) and (in, out)
IMAGE = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
TAPS = Layout(lambda a: a[:, 0].T, lambda a: a.T[:, None])  # (C, 1, K) and (K, C)


@dataclasses.dataclass(frozen=True)
class Row:
  """One of their tensors and where it lives in our tree.

  Attributes:
    theirs: name, with `{i}` for the layer where `layers` is not 0.
    ours: paths; several share the tensor, each a slice of equal width.
    layout: how the layouts differ.
    axis: of our layout, along which several paths share the tensor.
    layers: N where our array stacks the tensors of N layers, else 0.
  """

  theirs: str
  ours: tuple[str, ...]
  layout: Layout
  axis: int = 0
  layers: int = 0

  def within(self, theirs: str, ours: str, layers: int = 0) -> Row:
    """This row inside a module of either side."""
    return Row(
      f'{theirs}.{self.theirs}',
      tuple(f'{ours}/{path}' for path in self.ours),
      self.layout,
      self.axis,
      layers,
    )


def _linear(theirs: str, ours: str, layout: Layout = MATRIX) -> tuple[Row, ...]:
  return (
    Row(f'{theirs}.weight', (f'{ours}/kernel',), layout),
    Row(f'{theirs}.bias', (f'{ours}/bias',), SAME),
  )


def _norm(theirs: str, ours: str) -> tuple[Row, ...]:
  return (
    Row(f'{theirs}.weight', (f'{ours}/scale',), SAME),
    Row(f'{theirs}.bias', (f'{ours}/bias',), SAME),
  )


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
  pairs = (('q', 'query'), ('k', 'key'), ('v', 'value'), ('out', 'out'))
  return sum((_linear(f'{theirs}.linear_{t}', f'{ours}/{o}') for t, o in pairs), ())


def _ffn(theirs: str, ours: str) -> tuple[Row, ...]:
  return _linear(f'{theirs}.w_1', f'{ours}/w_1') + _linear(f'{theirs}.w_2', f'{ours}/w_2')


def _halves(path: str) -> tuple[str, str]:
  """The merge reads [attention; cgMLP]; each branch keeps its half."""
  return f'attention/merge/{path}', f'cgmlp/merge/{path}'


E_BRANCHFORMER_LAYER = (
  *_norm('norm_ff_macaron', 'ffn1/norm'),
  *_ffn('feed_forward_macaron', 'ffn1/ffn'),
  *_norm('norm_mha', 'attention/norm'),
  *_attention('attn', 'attention/attention'),
  *_norm('norm_mlp', 'cgmlp/norm'),
  *_linear('cgmlp.channel_proj1.0', 'cgmlp/cgmlp/w_1'),
  *_norm('cgmlp.csgu.norm', 'cgmlp/cgmlp/norm'),
  *_linear('cgmlp.csgu.conv', 'cgmlp/cgmlp/conv', TAPS),
  *_linear('cgmlp.channel_proj2', 'cgmlp/cgmlp/w_2'),
  Row('depthwise_conv_fusion.weight', _halves('conv_kernel'), TAPS, axis=1),
  Row('depthwise_conv_fusion.bias', _halves('conv_bias'), SAME),
  Row('merge_proj.weight', _halves('kernel'), MATRIX),
  Row('merge_proj.bias', ('merge_bias',), SAME),
  *_norm('norm_ff', 'ffn2/norm'),
  *_ffn('feed_forward', 'ffn2/ffn'),
  *_norm('norm_final', 'norm_final'),
)
TRANSFORMER_LAYER = (
  *_norm('norm1', 'attention/norm'),
  *_attention('self_attn', 'attention/attention'),
  *_norm('norm2', 'ffn/norm'),
  *_ffn('feed_forward', 'ffn/ffn'),
)
ENCODER_LAYERS = {'e_branchformer': E_BRANCHFORMER_LAYER, 'transformer': TRANSFORMER_LAYER}
DECODER_LAYER = (
  *_norm('norm1', 'self_attention/norm'),
  *_attention('self_attn', 'self_attention/attention'),
  *_norm('norm2', 'cross_attention/norm'),
  *_attention('src_attn', 'cross_attention/attention'),
  *_norm('norm3', 'ffn/norm'),
  *_ffn('feed_forward', 'ffn/ffn'),
)
UNSTACKED = (
  Row('encoder.embed.conv.0.weight', ('subsample/conv_1_kernel',), IMAGE),
  Row('encoder.embed.conv.0.bias', ('subsample/conv_1_bias',), SAME),
  Row('encoder.embed.conv.2.weight', ('subsample/conv_2_kernel',), IMAGE),
  Row('encoder.embed.conv.2.bias', ('subsample/conv_2_bias',), SAME),
  *_linear('encoder.embed.out.0', 'subsample/out'),
  *_norm('encoder.after_norm', 'encoder/after_norm'),
  Row('decoder.embed.0.weight', ('decoder/embedding',), SAME),
  *_norm('decoder.after_norm', 'decoder/after_norm'),
  *_linear('decoder.output_layer', 'decoder/output'),
  *_linear('ctc.ctc_lo', 'ctc'),
)


def table(cfg: SpeechConfig) -> tuple[Row, ...]:
  """Every tensor of a model of this configuration."""
  stacks = (
    ('encoder.encoders', 'encoder', ENCODER_LAYERS[cfg.encoder], cfg.encoder_layers),
    ('decoder.decoders', 'decoder', DECODER_LAYER, cfg.decoder_layers),
  )
  return UNSTACKED + tuple(
    row.within(f'{theirs}.{{i}}', f'{ours}/layers/scan', layers)
    for theirs, ours, rows, layers in stacks
    for row in rows
  )


def _to_ours(state: Arrays, cfg: SpeechConfig) -> dict[str, np.ndarray]:
  ours = {}
  for row in table(cfg):
    slices = []
    for i in range(row.layers or 1):
      array = row.layout.to_ours(np.asarray(state[row.theirs.format(i=i)], np.float32))
      slices.append(np.split(array, len(row.ours), row.axis))
    for path, arrays in zip(row.ours, zip(*slices)):
      ours[path] = np.stack(arrays) if row.layers else arrays[0]
  return ours


def _to_theirs(ours: Arrays, cfg: SpeechConfig) -> dict[str, np.ndarray]:
  theirs = {}
  for row in table(cfg):
    parts = [np.asarray(ours[path]) for path in row.ours]
    for i, arrays in enumerate(zip(*parts) if row.layers else [parts]):
      array = np.concatenate(arrays, row.axis) if len(arrays) > 1 else arrays[0]
      theirs[row.theirs.format(i=i)] = row.layout.to_theirs(array)
  return theirs


def _our_shapes(cfg: SpeechConfig) -> dict[str, tuple[int, ...]]:
  """Paths and shapes of the dense, scanned model; nothing is computed."""
  model = SpeechModel(dataclasses.replace(cfg, gates=GateConfig(), scan_layers=True, remat='none'))
  features_BxTxM, one_B = jnp.zeros((1, 16, cfg.mels)), jnp.ones(1, jnp.int32)
  context = gating.Context(one_B, one_B)
  init = lambda key: model.init(key, features_BxTxM, 16 * one_B, one_B[:, None], context)
  params = jax.eval_shape(lambda key: nn.unbox(init(key))['params'], jax.random.key(0))
  return {k: v.shape for k, v in traverse_util.flatten_dict(params, sep='/').items()}


def _their_shapes(cfg: SpeechConfig) -> dict[str, tuple[int, ...]]:
  zeros = {k: np.broadcast_to(np.int8(0), s) for k, s in _our_shapes(cfg).items()}
  return {k: a.shape for k, a in _to_theirs(zeros, cfg).items()}


def _check(what: str, found: Arrays, expected: Mapping[str, tuple[int, ...]]) -> None:
  """Raises ValueError naming everything missing, unexpected or of another shape."""
  shapes = {k: tuple(np.shape(a)) for k, a in found.items()}
  both = sorted(shapes.keys() & expected.keys())
  wrong = {
    'missing': sorted(expected.keys() - shapes.keys()),
    'unexpected': sorted(shapes.keys() - expected.keys()),
    'mis-shaped': [
      f'{k} {shapes[k]}, expected {expected[k]}' for k in both if shapes[k] != expected[k]
    ],
  }
  lines = [f'{kind} ({len(v)}):\n    ' + '\n    '.join(v) for kind, v in wrong.items() if v]
  if lines:
    raise ValueError('\n  '.join([f'{what} does not fit the model configuration:', *lines]))


def from_espnet(state: Arrays, cfg: SpeechConfig) -> dict[str, Any]:
  """ESPnet's state dict as the dense, scanned parameters of `SpeechModel(cfg)`.

  Args:
    state: name -> array; `frontend.*` and `normalize.*` are passed over (`feature_stats`).
    cfg: sizes, from `infer_config` or known; its gates are ignored, ESPnet has none.

  Returns: nested float32 numpy arrays.

  Raises:
    ValueError: tensors are missing, unexpected or of another shape; all are named.
  """
  state = {k: a for k, a in state.items() if not k.startswith(NOT_PARAMETERS)}
  _check('the ESPnet state dict', state, _their_shapes(cfg))
  return traverse_util.unflatten_dict(_to_ours(state, cfg), sep='/')


def to_espnet(params: Mapping[str, Any], cfg: SpeechConfig) -> dict[str, np.ndarray]:
  """Inverse of `from_espnet`: dense, scanned parameters as ESPnet's state dict.

  Raises:
    ValueError: parameters are missing, unexpected or of another shape; all are named. Leave
      a gate predictor's out (ESPnet has none); restack unrolled ones (`models.stack`).
  """
  ours = traverse_util.flatten_dict(params, sep='/')
  _check('the parameter tree', ours, _our_shapes(cfg))
  return _to_theirs(ours, cfg)


def feature_stats(state: Arrays) -> FeatureStats:
  """The mean and standard deviation, `[mels]` each, that ESPnet's `GlobalMVN` carries.

  Raises:
    ValueError: the state dict has none.
  """
  names = ('normalize.mean', 'normalize.std')
  if missing := [name for name in names if name not in state]:
    raise ValueError(f'the ESPnet state dict has no {" and no ".join(missing)}')
  return FeatureStats(*(np.asarray(state[name], np.float32) for name in names))


def _count(state: Arrays, prefix: str) -> int:
  """Layers of a stack: one more than the highest index under `prefix`."""
  found = (re.match(rf'{re.escape(prefix)}\.(\d+)\.', name) for name in state)
  return max((int(m[1]) + 1 for m in found if m), default=0)


def infer_config(state: Arrays, heads: int | None = None) -> SpeechConfig:
  """The configuration that a state dict's shapes imply.

  Args:
    state: ESPnet's state dict.
    heads: attention heads, which no shape tells; None means heads of 64, as OWSM has.

  Returns: sizes filled in, everything else default; mel bands come from `normalize.mean`,
    and are 80 without it.

  Raises:
    ValueError: tensors that tell a size are missing, or `heads` is needed.
  """
  layer = 'encoder.encoders.0'
  branches = f'{layer}.cgmlp.channel_proj1.0.weight' in state
  told_by = {
    'd': 'encoder.after_norm.weight',
    'vocab_size': 'decoder.embed.0.weight',
    'subsampling_channels': 'encoder.embed.conv.0.weight',
    'encoder_ffn': f'{layer}.feed_forward.w_1.weight',
    'decoder_ffn': 'decoder.decoders.0.feed_forward.w_1.weight',
  }
  if branches:
    told_by['cgmlp'] = f'{layer}.cgmlp.channel_proj1.0.weight'
    told_by['kernel'] = f'{layer}.cgmlp.csgu.conv.weight'
  if missing := sorted(set(told_by.values()) - set(state)):
    raise ValueError(
      f'cannot tell the sizes of this ESPnet S2T state dict: no {", ".join(missing)}'
    )
  # Sizes are output widths, the first axis; taps are the last.
  sizes = {k: np.shape(state[n])[-1 if k == 'kernel' else 0] for k, n in told_by.items()}
  d = sizes['d']
  if heads is None and d % 64:
    raise ValueError(f'a width of {d} does not divide into heads of 64; say how many heads')
  if sizes['subsampling_channels'] == d:
    sizes['subsampling_channels'] = 0  # meaning d
  if 'normalize.mean' in state:
    sizes['mels'] = np.size(state['normalize.mean'])
  return SpeechConfig(
    encoder='e_branchformer' if branches else 'transformer',
    heads=heads or d // 64,
    encoder_layers=_count(state, 'encoder.encoders'),
    decoder_layers=_count(state, 'decoder.decoders'),
    **sizes,
  )
