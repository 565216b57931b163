"""The gate predictor of context-aware dynamic pruning (ICLR 2025, Algorithm 1)."""

from __future__ import annotations

import flax.linen as nn
import jax

from gatedfm.models.speech_config import SpeechConfig
from gatedfm.nn import gating

# Names under which predictors stand among a model's parameters.
GATE_MODULES = ('encoder_gates', 'decoder_gates', 'gate_predictor')


class GatePredictor(nn.Module):
  """Pooled speech and context -> gates of `layers` layers of a stack, `{module: [layers, B]}`.

  Attributes:
    cfg: the model's configuration; `cfg.gates` holds every choice.
    stack: `encoder` or `decoder`.
    layers: how many layers one call decides for: all (global) or 1 (inside a layer).
  """

  cfg: SpeechConfig
  stack: str
  layers: int

  @nn.compact
  def __call__(self, pooled_BxD: jax.Array, context: gating.Context) -> dict[str, jax.Array]:
    gates = self.cfg.gates
    modules = [s.module for s in self.cfg.sites() if s.stack == self.stack]
    embed = gating.ContextEmbedding(
      gates.context, gates.combine, self.cfg.languages, self.cfg.tasks, gates.features,
      name='context',
    )  # fmt: skip
    mlp = gating.GateMlp(len(modules) * self.layers, gates.hidden, gates.open_bias, name='mlp')
    x_BxE = embed(pooled_BxD, context)
    key = self.make_rng('gates') if context.sample else None
    g_BxG = gating.decide(mlp(x_BxE), gates.threshold, context, key)
    g_MxNxB = g_BxG.T.reshape(len(modules), self.layers, -1)
    return {m: g_MxNxB[i] for i, m in enumerate(modules)}
