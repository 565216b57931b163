"""The gated speech encoder-decoder: recognition, translation, language identification.

Letters: B batch, T frames of 10 ms, S frames of 40 ms, M mel bands, L tokens, V vocabulary,
N layers, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from gatedfm import gates as gates_lib
from gatedfm.gates import Gates
from gatedfm.models import decoder as decoder_lib
from gatedfm.models import encoder as encoder_lib
from gatedfm.models import stack
from gatedfm.models.gate_predictor import GATE_MODULES, GatePredictor
from gatedfm.models.speech_config import SpeechConfig
from gatedfm.nn import gating, layers, subsampling


@flax.struct.dataclass
class Encoded:
  """What the encoder leaves for the decoder: `[B, S, D]`, `[B, S]` bool, all gates used."""

  memory: jax.Array
  mask: jax.Array
  gates: Gates


@flax.struct.dataclass
class Output:
  """Teacher-forced logits: CTC `[B, S, V]`, decoder `[B, L, V]`; and the encoder's output."""

  ctc_logits: jax.Array
  logits: jax.Array
  encoded: Encoded


class SpeechModel(nn.Module):
  """E-Branchformer or Transformer encoder, Transformer decoder, CTC head, gate predictor.

  Gates come from the caller (`gates=`), else from the predictor where the configuration has
  one, else there are none: the dense model.
  """

  cfg: SpeechConfig

  def setup(self):
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    channels = cfg.subsampling_channels or cfg.d
    self.subsample = subsampling.Conv2dSubsampling(cfg.d, channels, dtype)
    self.drop = nn.Dropout(cfg.dropout)
    self.encoder = encoder_lib.Encoder(cfg)
    self.decoder = decoder_lib.Decoder(cfg)
    self.ctc = layers.Linear(cfg.vocab_size, ('embed', 'vocab'), dtype)
    if cfg.predicts('encoder') and cfg.gates.scope == 'global':
      self.encoder_gates = GatePredictor(cfg, 'encoder', cfg.encoder_layers)
    if cfg.predicts('decoder'):
      # In the decoder a layer's own input would not be known before decoding starts, so
      # layer-wise predictors there read the same pooled speech, each with its own network.
      if cfg.gates.scope == 'global':
        self.decoder_gates = GatePredictor(cfg, 'decoder', cfg.decoder_layers)
      else:
        self.decoder_gates = nn.vmap(
          GatePredictor,
          variable_axes={'params': 0},
          split_rngs={'params': True, 'gates': True},
          in_axes=None,
          axis_size=cfg.decoder_layers,
          metadata_params={nn.PARTITION_NAME: 'layers'},
        )(cfg, 'decoder', 1)

  def encode(
    self,
    features_BxTxM: jax.Array,
    frames_B: jax.Array,
    context: gating.Context,
    gates: Gates | None = None,
    deterministic: bool = True,
  ) -> Encoded:
    """Encodes normalised log-mel features and decides every gate of the utterance.

    Args:
      features_BxTxM: normalised log-mel, anything beyond `frames_B` is ignored.
      frames_B: valid frames per example.
      context: language, task and how gates are decided.
      gates: overrides the predictor; values `()`, `[N]` or `[N, B]` per site, and `[N, U]` or
        `[N, B, U]` per site of heads or channels (`cfg.unit_sites()`), which are multiplied by,
        under `skip` too. Sites that it does not name are open; under `skip`, so is any
        gate of a module above 0.
      deterministic: False turns dropout on.

    Raises:
      ValueError: gates for a site that the model has not, or of a wrong shape.
    """
    x_BxSxD, mask_BxS = self.listen(features_BxTxM, frames_B, deterministic)
    given = self._given(gates)
    if not gates:
      given['encoder'] = self.decide('encoder', x_BxSxD, mask_BxS, context)
    memory_BxSxD, given['encoder'] = self.encoder(
      x_BxSxD, given['encoder'], mask_BxS, context, deterministic
    )
    if not gates:
      read = memory_BxSxD if self.cfg.gates.decoder_reads == 'memory' else x_BxSxD
      given['decoder'] = self.decide('decoder', read, mask_BxS, context)
    return Encoded(memory_BxSxD, mask_BxS, _joined(given))

  def listen(
    self, features_BxTxM: jax.Array, frames_B: jax.Array, deterministic: bool = True
  ) -> tuple[jax.Array, jax.Array]:
    """The encoder stack's input `[B, S, D]` and its mask `[B, S]`; arguments as of `encode`."""
    cfg = self.cfg
    mask_BxT = jnp.arange(features_BxTxM.shape[1]) < frames_B[:, None]
    x = jnp.where(mask_BxT[..., None], features_BxTxM, 0)
    x = self.subsample(x.astype(jnp.dtype(cfg.activation_dtype)))
    if cfg.conv_sees_padding:
      mask_BxS = subsampling.subsampled_mask(mask_BxT)
    else:
      # ESPnet's slicing keeps the frames that are partly padding; alone, they would not exist.
      mask_BxS = jnp.arange(x.shape[1]) < subsampling.subsampled_length(frames_B)[:, None]
    return self.drop(subsampling.add_positions(x), deterministic), mask_BxS

  def decide(
    self, stack: str, x_BxSxD: jax.Array, mask_BxS: jax.Array, context: gating.Context
  ) -> dict[str, jax.Array]:
    """Gates `{module: [N, B]}` that a stack's predictor reads off x, context and their mean.

    Empty where the stack has no predictor, or one in each layer, which reads that layer's input.
    """
    cfg = self.cfg
    if not cfg.predicts(stack) or (stack == 'encoder' and cfg.gates.scope == 'layer'):
      return {}
    predictor = self.encoder_gates if stack == 'encoder' else self.decoder_gates
    layers_ = cfg.encoder_layers if stack == 'encoder' else cfg.decoder_layers
    decided = predictor(gating.masked_mean(x_BxSxD, mask_BxS), context)
    return {m: g.reshape(layers_, -1) for m, g in decided.items()}

  def _given(self, gates: Gates | None) -> dict[str, dict[str, jax.Array]]:
    """Gates of the caller by stack and module; empty where the predictor decides."""
    if gates is None:
      return {'encoder': {}, 'decoder': {}}
    sites = self.cfg.all_sites()
    sites += tuple(s for s in self.cfg.unit_sites() if s.name in gates.values)
    whole = gates_lib.completed(gates, sites)
    return {s: whole.stack(s, sites) for s in ('encoder', 'decoder')}

  def __call__(
    self,
    features_BxTxM: jax.Array,
    frames_B: jax.Array,
    tokens_BxL: jax.Array,
    context: gating.Context,
    gates: Gates | None = None,
    deterministic: bool = True,
  ) -> Output:
    """Teacher-forced forward pass: `encode`, then logits for every input token."""
    encoded = self.encode(features_BxTxM, frames_B, context, gates, deterministic)
    logits_BxLxV = self.decoder(
      tokens_BxL, decoder_gates(encoded), encoded.memory, encoded.mask, deterministic
    )
    return Output(self.ctc_logits(encoded), logits_BxLxV, encoded)

  def ctc_logits(self, encoded: Encoded) -> jax.Array:
    """CTC logits, `[B, S, V]` float32."""
    return self.ctc(encoded.memory).astype(jnp.float32)

  def start(self, encoded: Encoded, length: int) -> list[decoder_lib.LayerCache]:
    """Decoder caches for up to `length` tokens; cross keys and values are projected here."""
    return self.decoder.start(encoded.memory, decoder_gates(encoded), length)

  def step(
    self,
    tokens_BxP: jax.Array,
    position: jax.Array,
    caches: list[decoder_lib.LayerCache],
    encoded: Encoded,
  ) -> tuple[jax.Array, list[decoder_lib.LayerCache]]:
    """Decodes P tokens from `position` on: logits `[B, P, V]` and the new caches."""
    return self.decoder.step(tokens_BxP, position, caches, decoder_gates(encoded), encoded.mask)


def _joined(stacks: dict[str, dict[str, jax.Array]]) -> Gates:
  """`{stack: {module: gates}}` by site name."""
  return Gates({f'{s}/{m}': g for s, stack_ in stacks.items() for m, g in stack_.items()})


def decoder_gates(encoded: Encoded) -> dict[str, jax.Array]:
  """The decoder's share of the gates, by module name."""
  values = encoded.gates.values
  return {k.split('/', 1)[1]: v for k, v in values.items() if k.startswith('decoder/')}


def for_inference(
  cfg: SpeechConfig,
  params: dict[str, Any],
  execution: str = 'mask',
  scan_encoder: bool = False,
) -> tuple[SpeechModel, dict[str, Any]]:
  """The model and parameters in the unrolled layout, in which skipping and decoding are fastest.

  With `scan_encoder` the encoder's layers are one loop: a program whose size, and the time to
  compile it, do not grow with depth.

  Matrices come in the type of their products: cast once here instead of at every call and,
  behind a gate, at every token. On CPUs a decoder's stay float32, as `layers.dot` wants them for
  up to eight rows; skipping with a larger batch there converts them at every token. The merge's
  constants are folded (`encoder.fold_constants`).
  """
  layout = {'scan_layers': scan_encoder, 'unroll_decoder': True, 'merge_folded': True}
  cfg = dataclasses.replace(cfg, execution=execution, remat='none', **layout)
  dtype = jnp.dtype(cfg.dtype)

  def cast(path: tuple, x: jax.Array) -> jax.Array:
    names = [k.key for k in path if hasattr(k, 'key')]  # factors have names of another kind
    # Gates are decided, and depthwise convolutions computed, in float32.
    exact = 'conv' in names or any(name in GATE_MODULES for name in names)
    # A decoder reads its matrices token by token, except for what it makes of the memory.
    once = 'cross_attention' in names and ('key' in names or 'value' in names)
    exact |= names[0] == 'decoder' and not once and layers.reads_float32(1)
    return x.astype(dtype) if names[-1] == 'kernel' and not exact else x

  params = stack.unstack(params)
  if scan_encoder:
    params = params | {'encoder': stack.restack(params['encoder'])}
  return SpeechModel(cfg), jax.tree_util.tree_map_with_path(
    cast, encoder_lib.fold_constants(params)
  )
