"""ESPnet's E-Branchformer encoder and Transformer decoder with our weights, gated by Python's `if`.

What is all open runs through ESPnet's own `forward` and `forward_one_step`; where a gate is
closed the same submodules are called, each behind an `if`. The encoder's merge is split as
ours is (`models/encoder.py`): a closed branch costs none of it but its constant.

Sources: `espnet2/asr/encoder/e_branchformer_encoder.py`, `espnet2/asr/layers/cgmlp.py`,
`espnet2/asr/decoder/transformer_decoder.py`,
`espnet/nets/pytorch_backend/transformer/{attention,decoder_layer}.py`. Torch and ESPnet are
imported when they are asked for. Letters: B batch, S frames of 40 ms, L tokens, D model width,
H heads, K head width or taps, C channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gatedfm import provenance
from gatedfm.convert import espnet
from gatedfm.gates import Pattern
from gatedfm.models.speech_config import ConfigError, SpeechConfig

Tensor = Any
Thunk = Callable[[], Any]


@functools.cache
def load() -> Any:
  """Torch on all cores.

  Raises:
    ConfigError: torch or ESPnet is not installed.
  """
  # GNU's OpenMP lets idle threads spin for ten milliseconds, during which ours would run on what
  # cores are left; spinning for some microseconds is as fast for torch alone.
  os.environ.setdefault('GOMP_SPINCOUNT', '2000')
  try:
    import torch

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that there is no flash_attn
      import espnet2.asr.decoder.transformer_decoder
      import espnet2.asr.encoder.e_branchformer_encoder  # noqa: F401
  except ImportError as e:
    raise ConfigError(
      f'against torch needs torch and ESPnet ({e}): bash tests/parity/install.sh'
    ) from None
  torch.set_num_threads(provenance.cores())
  return torch


def state_of(cfg: SpeechConfig, params: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
  """One part of ESPnet's state dict; as tensors that several modules may share."""
  state = espnet.to_espnet(params, cfg).items()
  part = {k.removeprefix(prefix): a for k, a in state if k.startswith(prefix)}
  # Copied: JAX's arrays are not to be written to, and torch wants its own layout.
  return {k: load().tensor(np.array(a, order='C')) for k, a in part.items()}


def _layers(stack: str, pattern: Pattern) -> list[dict[str, bool]]:
  """Per layer: module -> whether it is open."""
  rows = {name.split('/', 1)[1]: row for name, row in pattern.stack(stack).sites}
  return [dict(zip(rows, bits)) for bits in zip(*rows.values())]


def grouped(torch: Any, x_BxCxS: Tensor, weight_Cx1xK: Tensor, bias_C: Tensor) -> Tensor:
  """ESPnet's depthwise 'same' convolution over time, `[B, C, S]`."""
  half, groups = weight_Cx1xK.shape[-1] // 2, len(bias_C)
  return torch.nn.functional.conv1d(x_BxCxS, weight_Cx1xK, bias_C, padding=half, groups=groups)


def two_dimensional(torch: Any, x_BxCxS: Tensor, weight_Cx1xK: Tensor, bias_C: Tensor) -> Tensor:
  """The same numbers; the faster of both orientations, forward alone and with its gradient."""
  half, groups = weight_Cx1xK.shape[-1] // 2, len(bias_C)
  axis, padding = (-1, (half, 0)) if torch.is_grad_enabled() else (2, (0, half))
  x, weight = x_BxCxS.unsqueeze(axis), weight_Cx1xK.unsqueeze(axis)
  y = torch.nn.functional.conv2d(x, weight, bias_C, padding=padding, groups=groups)
  return y.squeeze(axis)


class Encoder:
  """ESPnet's E-Branchformer stack and closing norm on one input, `[B, S, D]`."""

  def __init__(self, cfg: SpeechConfig, state: dict[str, Tensor], x: Tensor, form: Callable):
    from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder

    self.torch = load()
    self.form = functools.partial(form, self.torch)
    self.x, self.mask = x, self.torch.ones(len(x), 1, x.shape[1], dtype=self.torch.bool)
    self.module = EBranchformerEncoder(
      cfg.mels,
      cfg.d,
      attention_heads=cfg.heads,
      attention_layer_type='selfattn',
      pos_enc_layer_type='abs_pos',
      cgmlp_linear_units=cfg.cgmlp,
      cgmlp_conv_kernel=cfg.kernel,
      merge_conv_kernel=cfg.kernel,
      num_blocks=cfg.encoder_layers,
      use_ffn=True,
      macaron_ffn=True,
      linear_units=cfg.encoder_ffn,
      use_flash_attn=False,
    ).eval()
    self.module.load_state_dict(state, assign=True)
    for block in self.module.encoders:
      for conv in (block.cgmlp.csgu.conv, block.depthwise_conv_fusion):
        if form is not grouped:
          conv.forward = functools.partial(self.form, weight_Cx1xK=conv.weight, bias_C=conv.bias)

  def forward(self, pattern: Pattern) -> Thunk:
    """The memory without gradients; what the closed halves of the merge emit is computed here."""
    torch, layers = self.torch, _layers('encoder', pattern)
    with torch.no_grad():
      constants = [self._constant(*pair) for pair in zip(self.module.encoders, layers)]

    def run() -> Tensor:
      with torch.no_grad():
        return self._stack(layers, constants)

    return run

  def gradient(self, slope: Tensor, rate: float, pattern: Pattern) -> Thunk:
    """The loss and its gradients by name, after a step of descent.

    What descends is a copy of the parameters, so that all steps have the same gradients.
    """
    layers = _layers('encoder', pattern)
    trained = {k: p for k, p in self.module.named_parameters() if not k.startswith('embed.')}
    moved = {k: p.detach().clone() for k, p in trained.items()}

    def run() -> tuple[Tensor, dict[str, Tensor | None]]:
      constants = [self._constant(*pair) for pair in zip(self.module.encoders, layers)]
      loss = (self._stack(layers, constants) * slope).sum()
      slopes = self.torch.autograd.grad(loss, trained.values(), allow_unused=True)
      steps = [(p, g) for p, g in zip(moved.values(), slopes) if g is not None]
      self.torch._foreach_add_(*map(list, zip(*steps)), alpha=-rate)
      return loss, {f'encoder.{k}': g for k, g in zip(trained, slopes)}

    return run

  def _stack(self, layers: list[dict[str, bool]], constants: list[Tensor]) -> Tensor:
    x = self.x
    for block, gates, constant in zip(self.module.encoders, layers, constants):
      x = block(x, self.mask)[0] if all(gates.values()) else self._layer(block, x, gates, constant)
    return self.module.after_norm(x)

  def _constant(self, block: Any, gates: dict[str, bool]) -> Tensor:
    """`[D]`: the merge's bias and what the convolution's bias gives in closed branches."""
    d, out = block.size, block.merge_proj.bias
    for i, name in enumerate(('attention', 'cgmlp')):
      if not gates[name]:
        half = slice(i * d, (i + 1) * d)
        out = out + block.merge_proj.weight[:, half] @ block.depthwise_conv_fusion.bias[half]
    return out

  def _layer(self, block: Any, x: Tensor, gates: dict[str, bool], constant: Tensor) -> Tensor:
    """`EBranchformerEncoderLayer.forward` without dropout and what is closed."""
    if gates['ffn1']:
      x = x + block.ff_scale * block.feed_forward_macaron(block.norm_ff_macaron(x))
    branches = []
    if gates['attention']:
      y = block.norm_mha(x)
      branches.append(block.attn(y, y, y, self.mask))
    if gates['cgmlp']:
      branches.append(block.cgmlp(block.norm_mlp(x), self.mask))
    x = x + self._merge(block, branches, gates, constant)
    if gates['ffn2']:
      x = x + block.ff_scale * block.feed_forward(block.norm_ff(x))
    return block.norm_final(x)

  def _merge(
    self, block: Any, branches: list[Tensor], gates: dict[str, bool], constant: Tensor
  ) -> Tensor:
    if not branches:
      return constant
    d, conv = block.size, block.depthwise_conv_fusion
    kept = slice(0 if gates['attention'] else d, 2 * d if gates['cgmlp'] else d)
    y = branches[0] if len(branches) == 1 else self.torch.cat(branches, -1)
    z = self.form(y.transpose(1, 2), conv.weight[kept], conv.bias[kept]).transpose(1, 2)
    return self.torch.nn.functional.linear(y + z, block.merge_proj.weight[:, kept], constant)


class Decoder:
  """ESPnet's Transformer decoder, writing the tokens `[B, L]` one by one over one memory."""

  def __init__(self, cfg: SpeechConfig, params: Any, memory_BxSxD: jax.Array, tokens: int):
    from espnet2.asr.decoder.transformer_decoder import TransformerDecoder

    self.torch = load()
    self.memory = self.torch.tensor(np.asarray(memory_BxSxD))
    tokens_L = self.torch.arange(tokens) * 7 % cfg.vocab_size
    self.tokens_BxL = tokens_L.expand(len(self.memory), tokens)
    self.module = TransformerDecoder(
      cfg.vocab_size,
      cfg.d,
      attention_heads=cfg.heads,
      linear_units=cfg.decoder_ffn,
      num_blocks=cfg.decoder_layers,
      use_flash_attn=False,
    ).eval()
    self.module.load_state_dict(state_of(cfg, params, 'decoder.'), assign=True)

  def _written(self, layers: list[dict[str, bool]], start: Callable, step: Callable) -> Thunk:
    """The log-probabilities after the last of the steps, without gradients."""

    def run() -> Tensor:
      with self.torch.no_grad():
        state = start(layers)
        for i in range(self.tokens_BxL.shape[1]):
          y, state = step(i, state, layers)
        return y

    return run

  def released(self, pattern: Pattern) -> Thunk:
    """Token by token as `TransformerDecoder.score` does it."""
    layers = _layers('decoder', pattern)
    opened = all(all(gates.values()) for gates in layers)
    step = self._one_step if opened else self._one_gated_step
    return self._written(layers, lambda layers: None, step)

  def _one_step(self, i: int, cache: list | None, layers: list) -> tuple[Tensor, list]:
    tokens, mask = self.tokens_BxL[:, : i + 1], self._subsequent(i + 1)
    return self.module.forward_one_step(tokens, mask, self.memory, cache=cache)

  def _one_gated_step(self, i: int, cache: list | None, layers: list) -> tuple[Tensor, list]:
    """`forward_one_step` and `DecoderLayer.forward` without dropout and what is closed."""
    mask, new = self._subsequent(i + 1)[:, -1:], []
    x = self.module.embed(self.tokens_BxL[:, : i + 1])
    for block, gates, old in zip(self.module.decoders, layers, cache or [None] * len(layers)):
      y = x[:, -1:]
      if gates['self_attention']:
        x = block.norm1(x)
        y = y + block.self_attn(x[:, -1:], x, x, mask)
      if gates['cross_attention']:
        y = y + block.src_attn(block.norm2(y), self.memory, self.memory, None)
      if gates['ffn']:
        y = y + block.feed_forward(block.norm3(y))
      x = y if old is None else self.torch.cat([old, y], 1)
      new.append(x)
    return self._scores(x), new

  def _subsequent(self, size: int) -> Tensor:
    from espnet.nets.pytorch_backend.transformer.mask import subsequent_mask

    return subsequent_mask(size)[None]

  def _scores(self, x_BxLxD: Tensor) -> Tensor:
    """Log-probabilities `[B, V]` after the last token."""
    y = self.module.output_layer(self.module.after_norm(x_BxLxD[:, -1]))
    return self.torch.log_softmax(y, -1)

  def cached(self, pattern: Pattern) -> Thunk:
    """With keys and values cached, as a decoder in torch could do it."""
    return self._written(_layers('decoder', pattern), self._projected, self._one_cached_step)

  def _projected(self, layers: list[dict[str, bool]]) -> list[tuple]:
    """Per layer room for the tokens' keys and values, `[B, H, L, K]`, and the memory's."""
    out = []
    for block, gates in zip(self.module.decoders, layers):
      attn, cross = block.src_attn, None
      if gates['cross_attention']:
        cross = tuple(_heads(attn, f(self.memory)) for f in (attn.linear_k, attn.linear_v))
      shape = len(self.memory), attn.h, self.tokens_BxL.shape[1], attn.d_k
      out.append((self.torch.empty(shape), self.torch.empty(shape), cross))
    return out

  def _one_cached_step(self, i: int, state: list[tuple], layers: list) -> tuple[Tensor, list]:
    embedding, positions = self.module.embed
    x = embedding(self.tokens_BxL[:, i : i + 1]) * positions.xscale + positions.pe[:, i : i + 1]
    for block, gates, (keys, values, cross) in zip(self.module.decoders, layers, state):
      if gates['self_attention']:
        y, attn = block.norm1(x), block.self_attn
        keys[:, :, i : i + 1] = _heads(attn, attn.linear_k(y))
        values[:, :, i : i + 1] = _heads(attn, attn.linear_v(y))
        x = x + self._attend(attn, y, keys[:, :, : i + 1], values[:, :, : i + 1])
      if gates['cross_attention']:
        x = x + self._attend(block.src_attn, block.norm2(x), *cross)
      if gates['ffn']:
        x = x + block.feed_forward(block.norm3(x))
    return self._scores(x), state

  def _attend(self, attn: Any, x_Bx1xD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    queries = _heads(attn, attn.linear_q(x_Bx1xD))
    scores = self.torch.matmul(queries, keys.transpose(-2, -1)) / attn.d_k**0.5
    return attn.forward_attention(values, scores, None)


def _heads(attn: Any, x_BxLxD: Tensor) -> Tensor:
  """`[B, H, L, K]`."""
  return x_BxLxD.view(*x_BxLxD.shape[:2], attn.h, attn.d_k).transpose(1, 2)
