"""Encoder layers and stack: E-Branchformer and Transformer, every module behind its gate.

Layer order as in `espnet2/asr/encoder/e_branchformer_encoder.py`. Letters: B batch,
T subsampled frames, D model width.

The merge `W(m + conv(m)) + b` over `m = [attention; cgMLP]` is linear and its convolution is
depthwise, so it splits exactly into one half per branch and a constant vector. Each half
lives in its branch: closing a branch saves its half of the merge too, and the constant, which
ESPnet's merge emits even for m = 0, is added whatever the gates say.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gatedfm.models import gate_predictor
from gatedfm.models import stack as stack_lib
from gatedfm.models.speech_config import SpeechConfig
from gatedfm.nn import attention, cgmlp, gating, layers
from gatedfm.partitioning import constrain

Gates = dict[str, jax.Array]


class FfnBranch(nn.Module):
  """Norm, feed-forward, dropout, scale: `[B, T, D] -> [B, T, D]`."""

  hidden: int
  activation: str
  scale: float
  dropout: float
  dtype: layers.Dtype

  @nn.compact
  def __call__(
    self, x: jax.Array, deterministic: bool, channels: jax.Array | None = None
  ) -> jax.Array:
    y = layers.LayerNorm(name='norm')(x)
    ffn = layers.FeedForward(
      self.hidden, layers.ACTIVATIONS[self.activation], self.dropout, self.dtype, name='ffn'
    )
    return self.scale * nn.Dropout(self.dropout)(ffn(y, deterministic, channels), deterministic)


class MergeHalf(nn.Module):
  """One branch's half of the merge, `(x + conv(x)) @ kernel`, without its constant.

  `folded` where the constant stands in the layer's `merge_bias`: then there is no `conv_bias`.
  """

  features: int
  kernel_size: int
  dtype: layers.Dtype
  folded: bool

  def setup(self):
    d = self.features
    # Fan-in 2D, as the undivided projection has.
    init = nn.initializers.variance_scaling(2 / 3, 'fan_avg', 'uniform')
    taps = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
    self.conv_kernel = layers.param(
      self, 'conv_kernel', taps, ('small', 'small'), (self.kernel_size, d)
    )
    if not self.folded:
      self.conv_bias = layers.param(self, 'conv_bias', nn.initializers.zeros, ('small',), (d,))
    self.kernel = layers.param(self, 'kernel', init, ('embed', 'embed_out'), (d, d))

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is not None:
      x = jnp.where(mask, x, 0)
    return layers.dot(x + layers.depthwise(x, self.conv_kernel), self.kernel, self.dtype)

  def constant(self) -> jax.Array:
    """`[D]`: what the half emits for x = 0, the convolution's bias through the kernel."""
    return layers.dot(self.conv_bias, self.kernel, self.dtype)


class AttentionBranch(nn.Module):
  """Norm, self-attention, dropout and (E-Branchformer) this branch's half of the merge."""

  cfg: SpeechConfig
  merged: bool

  def setup(self):
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    self.norm = layers.LayerNorm()
    self.attention = attention.Attention(cfg.heads, cfg.d, cfg.attention_dropout, dtype)
    self.drop = nn.Dropout(cfg.dropout)
    if self.merged:
      self.merge = MergeHalf(cfg.d, cfg.kernel, dtype, cfg.merge_folded)

  def __call__(
    self,
    x: jax.Array,
    mask_BxT: jax.Array,
    conv_mask: jax.Array | None,
    deterministic: bool,
    heads: jax.Array | None = None,
  ) -> jax.Array:
    y = self.attention(self.norm(x), mask_BxT[:, None, None, :], deterministic, heads)
    y = self.drop(y, deterministic)
    return self.merge(y, conv_mask) if self.merged else y

  def merge_constant(self) -> jax.Array:
    """`[D]`: the merge half's constant, added whether or not the branch runs."""
    return self.merge.constant()


class CgMlpBranch(nn.Module):
  """Norm, cgMLP, dropout and this branch's half of the merge."""

  cfg: SpeechConfig

  def setup(self):
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    self.norm = layers.LayerNorm()
    self.cgmlp = cgmlp.CgMlp(cfg.cgmlp, cfg.kernel, cfg.dropout, dtype)
    self.drop = nn.Dropout(cfg.dropout)
    self.merge = MergeHalf(cfg.d, cfg.kernel, dtype, cfg.merge_folded)

  def __call__(self, x: jax.Array, conv_mask: jax.Array | None, deterministic: bool) -> jax.Array:
    y = self.cgmlp(self.norm(x), conv_mask, deterministic)
    return self.merge(self.drop(y, deterministic), conv_mask)

  def merge_constant(self) -> jax.Array:
    """`[D]`: the merge half's constant, added whether or not the branch runs."""
    return self.merge.constant()


class EncoderLayer(nn.Module):
  """One E-Branchformer or Transformer layer.

  Called with x `[B, T, D]`, this layer's gates (`{module: () or [B]}`, empty for dense), the
  bool time mask `[B, T]`, the gate context and `deterministic`; returns x and the gates used.
  """

  cfg: SpeechConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    gates: Gates,
    mask_BxT: jax.Array,
    context: gating.Context,
    deterministic: bool,
  ) -> tuple[jax.Array, Gates]:
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    if not gates and cfg.predicts('encoder') and cfg.gates.scope == 'layer':
      predictor = gate_predictor.GatePredictor(cfg, 'encoder', 1, name='gate_predictor')
      gates = {m: g[0] for m, g in predictor(gating.masked_mean(x, mask_BxT), context).items()}
    conv_mask = None if cfg.conv_sees_padding else mask_BxT[..., None]
    add = lambda total, name, module, x, *args: gating.add_gated(
      cfg.execution, gates.get(name), module, total, x, *args
    )
    ffn = lambda name, activation, scale: FfnBranch(
      cfg.encoder_ffn, activation, scale, cfg.dropout, dtype, name=name
    )
    units = functools.partial(gating.unit_gates, gates)
    heads = units('attention_heads')
    if cfg.encoder == 'transformer':
      attend = AttentionBranch(cfg, merged=False, name='attention')
      x = add(x, 'attention', attend, x, mask_BxT, conv_mask, deterministic, heads)
      x = add(x, 'ffn', ffn('ffn', 'relu', 1.0), x, deterministic, units('ffn_channels'))
      return constrain(x, 'batch', 'time', 'act_embed'), gates

    x = add(x, 'ffn1', ffn('ffn1', 'swish', 0.5), x, deterministic, units('ffn1_channels'))
    attend = AttentionBranch(cfg, merged=True, name='attention')
    convolve = CgMlpBranch(cfg, name='cgmlp')
    bias = layers.param(self, 'merge_bias', nn.initializers.zeros, ('small',), (cfg.d,))
    if not cfg.merge_folded:
      bias = bias + attend.merge_constant() + convolve.merge_constant()
    merged = jnp.broadcast_to(bias.astype(x.dtype), x.shape)
    merged = add(merged, 'attention', attend, x, mask_BxT, conv_mask, deterministic, heads)
    merged = add(merged, 'cgmlp', convolve, x, conv_mask, deterministic)
    x = x + nn.Dropout(cfg.dropout)(merged, deterministic)
    x = add(x, 'ffn2', ffn('ffn2', 'swish', 0.5), x, deterministic, units('ffn2_channels'))
    x = layers.LayerNorm(name='norm_final')(x)
    return constrain(x, 'batch', 'time', 'act_embed'), gates


def fold_constants(params: dict[str, Any]) -> dict[str, Any]:
  """Parameters for `merge_folded`: each layer's merge constants in its `merge_bias`."""
  if not isinstance(params, dict):
    return params
  params = {k: fold_constants(v) for k, v in params.items()}
  if 'merge_bias' in params:
    for branch in ('attention', 'cgmlp'):
      merge = dict(params[branch]['merge'])
      # Not `+=`, which would write into the caller's arrays.
      constant = jnp.einsum('...d,...de->...e', merge.pop('conv_bias'), merge['kernel'])
      params['merge_bias'] = params['merge_bias'] + constant
      params[branch] = params[branch] | {'merge': merge}
  return params


class Encoder(nn.Module):
  """The stack and its closing norm: x `[B, T, D]` -> memory `[B, T, D]` and gates `[N, ...]`."""

  cfg: SpeechConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    gates: Gates,
    mask_BxT: jax.Array,
    context: gating.Context,
    deterministic: bool,
  ) -> tuple[jax.Array, Gates]:
    stack = stack_lib.Stack(EncoderLayer, self.cfg, self.cfg.encoder_layers, name='layers')
    x, gates = stack(x, gates, mask_BxT, context, deterministic)
    return layers.LayerNorm(name='after_norm')(x), gates
