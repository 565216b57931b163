"""The encoder layer by layer from the host: a program for each kind of layer, not of encoder.

A layer has one of 2^M gate patterns (M = 4 modules of an E-Branchformer), so 16 programs serve
every pattern of an encoder of any depth, and no branch is left in them. Letters: B batch,
S frames of 40 ms, D model width.
"""

from __future__ import annotations

from concurrent import futures
from typing import Any

import jax

from gatedfm import compiling
from gatedfm.gates import Pattern
from gatedfm.models import stack
from gatedfm.models.encoder import EncoderLayer
from gatedfm.models.speech_config import SpeechConfig
from gatedfm.nn import layers

LayerGates = tuple[tuple[str, bool], ...]


class Layerwise:
  """Runs the encoder's stack and closing norm for gates that the host knows.

  Args:
    cfg: of the model; its parameters come unrolled (`for_inference`).
  """

  def __init__(self, cfg: SpeechConfig):
    layer, norm = EncoderLayer(cfg, parent=None), layers.LayerNorm(parent=None)

    def run(params: Any, x_BxSxD: jax.Array, mask_BxS: jax.Array, gates: LayerGates) -> jax.Array:
      # Gates are given, so the layer asks no predictor, which would read a context.
      return layer.apply({'params': params}, x_BxSxD, dict(gates), mask_BxS, None, True)[0]

    self._layer = compiling.Programs(jax.jit(run, static_argnames='gates'))
    self._norm = compiling.Programs(jax.jit(lambda p, x_BxSxD: norm.apply({'params': p}, x_BxSxD)))

  def prepare(
    self, params: Any, x_BxSxD: jax.Array, mask_BxS: jax.Array, pattern: Pattern
  ) -> list[futures.Future]:
    """Starts compiling what `pattern` needs; arguments as of a call, or their shapes."""
    programs = [
      self._layer.prepare(_key(mine, x_BxSxD, gates), mine, x_BxSxD, mask_BxS, gates=gates)
      for mine, gates in _layers(params, pattern)
    ]
    return [*programs, self._norm.prepare(x_BxSxD.shape, params['after_norm'], x_BxSxD)]

  def __call__(
    self, params: Any, x_BxSxD: jax.Array, mask_BxS: jax.Array, pattern: Pattern
  ) -> jax.Array:
    """The memory `[B, S, D]`.

    Args:
      params: of the encoder.
      x_BxSxD: its input; mask_BxS: which frames are valid.
      pattern: with the encoder's sites, one for the whole batch.
    """
    for mine, gates in _layers(params, pattern):
      key = _key(mine, x_BxSxD, gates)
      x_BxSxD = self._layer(key, mine, x_BxSxD, mask_BxS, gates=gates)
    return self._norm(x_BxSxD.shape, params['after_norm'], x_BxSxD)

  def compiled(self) -> list[compiling.Programs]:
    """Everything compiled."""
    return [self._layer, self._norm]


def _key(params: Any, x_BxSxD: jax.Array, gates: LayerGates) -> tuple:
  """What layers of one program agree in: compacted ones differ in their widths."""
  return x_BxSxD.shape, gates, tuple(a.shape for a in jax.tree.leaves(params))


def _layers(params: Any, pattern: Pattern) -> list[tuple[Any, LayerGates]]:
  """Parameters and gates of each layer."""
  rows = [(name.split('/', 1)[1], bits) for name, bits in pattern.stack('encoder').sites]
  return [
    (params['layers'][f'{stack.PREFIX}{i}'], tuple((name, bits[i]) for name, bits in rows))
    for i in range(len(params['layers']))
  ]
