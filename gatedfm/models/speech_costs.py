"""What the speech model costs, counted exactly from its configuration, with nothing traced.

Multiply-accumulates (MACs) are those of matrix products and convolutions, for one utterance
of which nothing is padding; norms, activations and softmax are not counted. Decoding is
counted as the cached decoder runs it: cross-attention keys and values projected once, the
self-attention of step i over the i + 1 tokens there are.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from gatedfm import gates as gates_lib
from gatedfm.models.speech_config import ENCODER_MODULES, SpeechConfig
from gatedfm.nn import subsampling

# Every helper counts `[parameters, MACs]`.
Count = np.ndarray


def _linear(inputs: int, outputs: int, rows: int) -> Count:
  return np.array([inputs * outputs + outputs, rows * inputs * outputs])


def _norm(width: int) -> Count:
  return np.array([2 * width, 0])


def _depthwise(taps: int, channels: int, rows: int) -> Count:
  return np.array([taps * channels + channels, rows * taps * channels])


def _ffn(d: int, hidden: int, rows: int) -> Count:
  return _norm(d) + _linear(d, hidden, rows) + _linear(hidden, d, rows)


def _attention(d: int, queries: int, keys: int, pairs: int) -> Count:
  """Norm, q and out over `queries` rows, k and v over `keys` rows, `pairs` of them meeting."""
  projections = 2 * _linear(d, d, queries) + 2 * _linear(d, d, keys)
  return _norm(d) + projections + np.array([0, 2 * d * pairs])


def _merge_half(d: int, taps: int, rows: int) -> Count:
  return _depthwise(taps, d, rows) + np.array([d * d, rows * d * d])


def _sizes(frames: int, tokens: int) -> int:
  """Subsampled frames; raises ValueError where there is nothing to count."""
  steps = subsampling.subsampled_length(frames)
  if steps < 1:
    raise ValueError(f'{frames} frames leave nothing after subsampling; it needs at least 7')
  if tokens < 0:
    raise ValueError(f'tokens is {tokens}; it must not be negative')
  return steps


def _predictor(cfg: SpeechConfig, stack: str, layers: int) -> Count:
  """One gate predictor that decides for `layers` layers of a stack, run once."""
  gates = cfg.gates
  width = cfg.d if gates.combine == 'add' else gates.features
  tables = {'language': cfg.languages, 'task': cfg.tasks}
  read = [rows for name, rows in tables.items() if name in gates.context]
  parts = [width] * len(read)
  total = np.array([sum(read) * width, 0])
  if 'speech' in gates.context:
    total = total + _norm(cfg.d)
    parts.append(cfg.d)
  inputs = (parts[0] if gates.combine == 'add' else sum(parts)) if parts else 1
  modules = sum(s.stack == stack for s in cfg.sites())
  for outputs in (*gates.hidden, 2 * layers * modules):
    total = total + _linear(inputs, outputs, 1)
    inputs = outputs
  return total


def _rest(cfg: SpeechConfig, frames: int, tokens: int) -> Count:
  steps, d, v = _sizes(frames, tokens), cfg.d, cfg.vocab_size
  half = lambda n: (n - 1) // 2
  c, bands = cfg.subsampling_channels or d, half(half(cfg.mels))
  first = half(frames) * half(cfg.mels)
  total = _linear(9, c, first) + _linear(9 * c, c, steps * bands) + _linear(c * bands, d, steps)
  if cfg.encoder == 'e_branchformer':
    # The merge's bias, which holds both halves' constants at inference, and the layer's norm.
    total = total + cfg.encoder_layers * (np.array([d, 0]) + _norm(d))
  total = total + _norm(d) + _linear(d, v, steps)  # closing norm, CTC head
  total = total + np.array([v * d, 0]) + _norm(d) + _linear(d, v, tokens)
  for stack, layers in (('encoder', cfg.encoder_layers), ('decoder', cfg.decoder_layers)):
    if cfg.predicts(stack):
      globally = cfg.gates.scope == 'global'
      predictor = _predictor(cfg, stack, layers if globally else 1)
      total = total + (1 if globally else layers) * predictor
  return total


def _cost(count: Count, dtype: str) -> gates_lib.Cost:
  params, macs = count.tolist()
  return gates_lib.Cost(params, macs, params * jnp.dtype(dtype).itemsize)


def site_costs(
  cfg: SpeechConfig, frames: int, tokens: int, dtype: str = 'float32'
) -> dict[str, gates_lib.Cost]:
  """Cost of one gate, that is of one layer's module, of every gateable site.

  A module includes its norm and, in an E-Branchformer, its half of the merge. The keys and
  values that a decoder's cross-attention projects once per utterance count as its own.

  Args:
    cfg: the model's configuration.
    frames: 10-ms frames of the utterance.
    tokens: decoder steps; 0 leaves the projection of cross-attention keys and values alone.
    dtype: of the stored parameters, for the bytes.

  Returns: costs by site name, `cfg.all_sites()` in order.

  Raises:
    ValueError: fewer frames than subsampling needs, or a negative number of tokens.
  """
  steps, d = _sizes(frames, tokens), cfg.d
  ffn = _ffn(d, cfg.encoder_ffn, steps)
  attend = _attention(d, steps, steps, steps * steps)
  if cfg.encoder == 'e_branchformer':
    half, merge = cfg.cgmlp // 2, _merge_half(d, cfg.kernel, steps)
    spatial = _norm(half) + _depthwise(cfg.kernel, half, steps)
    cgmlp = _norm(d) + _linear(d, cfg.cgmlp, steps) + spatial + _linear(half, d, steps)
    counts = {'ffn1': ffn, 'attention': attend + merge, 'cgmlp': cgmlp + merge, 'ffn2': ffn}
  else:
    counts = {'attention': attend, 'ffn': ffn}
  out = {f'encoder/{m}': counts[m] for m in ENCODER_MODULES[cfg.encoder]}
  out['decoder/self_attention'] = _attention(d, tokens, tokens, tokens * (tokens + 1) // 2)
  out['decoder/cross_attention'] = _attention(d, tokens, steps, tokens * steps)
  out['decoder/ffn'] = _ffn(d, cfg.decoder_ffn, tokens)
  return {name: _cost(count, dtype) for name, count in out.items()}


def rest_cost(
  cfg: SpeechConfig, frames: int, tokens: int, dtype: str = 'float32'
) -> gates_lib.Cost:
  """Cost of all that no gate closes, summed over layers.

  That is subsampling, the merge's bias and the layers' closing norms (E-Branchformer),
  both stacks' closing norms, CTC head, embedding, output layer and gate predictors.
  Arguments and errors as for `site_costs`.
  """
  return _cost(_rest(cfg, frames, tokens), dtype)


def total_macs(
  cfg: SpeechConfig, frames: int, tokens: int, gates: gates_lib.Gates | None = None
) -> float:
  """MACs to encode, score by CTC and decode one utterance.

  Args:
    cfg, frames, tokens: as for `site_costs`.
    gates: values of any of `cfg.all_sites()`, fractions (means over examples) included;
      sites without one are open.

  Raises:
    ValueError: as `site_costs`, or gates of unknown sites or other shapes.
  """
  sites = cfg.all_sites()
  values = gates_lib.all_open(sites).values | (gates.values if gates else {})
  gates_lib.validate(gates_lib.Gates(values), sites)
  costs = site_costs(cfg, frames, tokens)
  kept = sum(s.size * costs[s.name].macs * float(np.mean(values[s.name])) for s in sites)
  return rest_cost(cfg, frames, tokens).macs + kept


def macs_per_audio_second(
  cfg: SpeechConfig, frames: int, tokens: int, gates: gates_lib.Gates | None = None
) -> float:
  """`total_macs` over the utterance's seconds, of 100 frames each."""
  return total_macs(cfg, frames, tokens, gates) / (frames / 100)
