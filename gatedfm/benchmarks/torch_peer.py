"""ESPnet's torch modules with the weights of our random model, run eagerly beside ours.

Torch and ESPnet are imported when they are asked for. Letters: B batch, S frames of 40 ms,
L tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gatedfm import clock
from gatedfm.benchmarks import torch_stacks
from gatedfm.convert import espnet
from gatedfm.gates import Pattern
from gatedfm.models.speech_config import ConfigError, SpeechConfig

# What each way is, by suite.
WAYS = {
  'encoder': {
    'torch': 'depthwise convolutions as released, Conv1d(groups=channels)',
    'torch_fast': 'depthwise convolutions as conv2d over (1, time)',
  },
  'train': {
    'torch': 'depthwise convolutions as released, Conv1d(groups=channels)',
    'torch_fast': 'depthwise convolutions as conv2d over (time, 1)',
  },
  'decoder': {
    'torch': 'forward_one_step with its cache: projects the memory and all tokens at every step',
    'torch_fast': 'keys and values cached, those of the memory projected once',
  },
}
TOLERANCE = 1e-4


def require(cfg: SpeechConfig) -> None:
  """Raises ConfigError, with the mend, where the comparison cannot be made."""
  if cfg.dtype != 'float32' or cfg.activation_dtype != 'float32':
    raise ConfigError(f'against torch all is float32, but dtype is {cfg.dtype}: --dtype=float32')
  if cfg.encoder != 'e_branchformer':
    raise ConfigError(f'against torch the encoder is e_branchformer, not {cfg.encoder}')
  if jax.default_backend() != 'cpu':
    raise ConfigError(
      f'torch runs on the CPU and JAX on {jax.default_backend()}: set JAX_PLATFORMS=cpu'
    )
  torch_stacks.load()


def calls(
  stack: str, cfg: SpeechConfig, params: Mapping[str, Any], x_BxSxD: jax.Array, tokens: int
) -> dict[str, Callable[[Pattern], torch_stacks.Thunk]]:
  """By way: what makes of a pattern the call to be timed, without gradients.

  Args:
    stack: `encoder` or `decoder`.
    cfg: shapes, dense.
    params: of the whole model, scanned.
    x_BxSxD: the stack's input: the encoder's, or the memory.
    tokens: L, that a decoder writes, token i being `7 i mod V`.

  Returns: calls that give the memory `[B, S, D]`, or the log-probabilities `[B, V]` after L
    tokens.

  Raises:
    ConfigError: as `require`.
  """
  require(cfg)
  if stack == 'encoder':
    return {way: peer.forward for way, peer in _encoders(cfg, params, x_BxSxD).items()}
  peer = torch_stacks.Decoder(cfg, params, x_BxSxD, tokens)
  return {'torch': peer.released, 'torch_fast': peer.cached}


def gradients(
  cfg: SpeechConfig,
  params: Mapping[str, Any],
  x_BxSxD: jax.Array,
  slope_BxSxD: jax.Array,
  rate: float,
) -> dict[str, Callable[[Pattern], torch_stacks.Thunk]]:
  """Like `calls` for the encoder, a step of descent by `rate` on the loss `sum(memory * slope)`.

  Returns: calls that give the loss and the gradients by ESPnet's names (`convert.espnet`), None
    for parameters of closed modules.

  Raises:
    ConfigError: as `require`.
  """
  require(cfg)
  slope = torch_stacks.load().tensor(np.asarray(slope_BxSxD))
  peers = _encoders(cfg, params, x_BxSxD)
  return {way: functools.partial(peer.gradient, slope, rate) for way, peer in peers.items()}


def check_gradients(
  cfg: SpeechConfig, peers: Mapping[str, torch_stacks.Thunk], slopes: Mapping[str, Any]
) -> dict[str, float]:
  """The same of `gradients` calls and ours (scanned layout), by their largest entries.

  Raises:
    RuntimeError: see `check`.
  """
  want = espnet.to_espnet(slopes, cfg)
  flat = lambda grads: np.concatenate(
    [np.zeros(want[k].size) if g is None else np.ravel(g) for k, g in sorted(grads.items())]
  )
  differences = {}
  for way, call in peers.items():
    theirs = call()[1]
    difference = flat(theirs) - flat({k: want[k] for k in theirs})
    differences |= _checked({way: float(np.abs(difference).max())})
  return differences


def check(peers: Mapping[str, torch_stacks.Thunk], want: jax.Array) -> dict[str, float]:
  """The largest difference of each call's output from ours.

  Raises:
    RuntimeError: one exceeds 1e-4, so that times would be of different computations.
  """
  want = np.asarray(want)
  return _checked({way: float(np.abs(call().numpy() - want).max()) for way, call in peers.items()})


def _checked(differences: dict[str, float]) -> dict[str, float]:
  for way, difference in differences.items():
    if not difference <= TOLERANCE:
      raise RuntimeError(f'{way} and ours differ by {difference:.1e}, more than {TOLERANCE:.0e}')
  return differences


def rows(
  suite: str,
  about: dict[str, Any],
  seconds: Mapping[str, np.ndarray],
  differences: dict[str, float],
) -> list[dict[str, Any]]:
  """One row per way of torch.

  Args:
    suite: `encoder`, `decoder` or `train`.
    about: fields that all rows share.
    seconds: rounds side by side, of ours (`dense` among them) and of torch's.
    differences: what `check` gave.

  Returns: `about` and `way`, `ratio` (of the rounds' times over our dense), `times` (by each of
    our ways: how many times as long as it torch takes with the same gates; `dense` has none
    closed), `seconds`, `dense_seconds`, all in quartiles; `difference`, `peer` (what the way is).
  """
  ours = [way for way in seconds if way not in differences]
  return [
    about
    | {
      'way': way,
      'ratio': clock.quartiles(seconds[way] / seconds['dense']),
      'times': {name: clock.quartiles(seconds[way] / seconds[name]) for name in ours},
      'seconds': clock.quartiles(seconds[way]),
      'dense_seconds': clock.quartiles(seconds['dense']),
      'difference': difference,
      'peer': peer(suite, way),
    }
    for way, difference in differences.items()
  ]


def peer(suite: str, way: str) -> str:
  """What a way of torch is: versions, threads, form."""
  versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('espnet', 'torch'))
  return f'{versions}, eager, {torch_stacks.load().get_num_threads()} threads; {WAYS[suite][way]}'


def describe(row: dict[str, Any]) -> str:
  """A row as a line for people."""
  times = ', '.join(f'{t["median"]:.2f} {way}' for way, t in row['times'].items())
  return (
    f'{row["pruned"]:4.0%} closed, MACs kept {row["macs_kept"]:.2f} | {row["way"]:10} '
    f'{1e3 * row["seconds"]["median"]:.1f} ms | times as long as our {times}'
  )


def _encoders(
  cfg: SpeechConfig, params: Any, x_BxSxD: jax.Array
) -> dict[str, torch_stacks.Encoder]:
  state = torch_stacks.state_of(cfg, params, 'encoder.')
  x = torch_stacks.load().tensor(np.asarray(x_BxSxD))
  forms = {'torch': torch_stacks.grouped, 'torch_fast': torch_stacks.two_dimensional}
  return {way: torch_stacks.Encoder(cfg, state, x, form) for way, form in forms.items()}
