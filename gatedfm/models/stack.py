"""A stack of equal layers, scanned over stacked parameters or unrolled; and between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gatedfm.models.gate_predictor import GATE_MODULES
from gatedfm.models.speech_config import SpeechConfig
from gatedfm.nn import layers

Gates = dict[str, jax.Array | tuple[bool, ...]]
PREFIX = 'layers_'


class Stack(nn.Module):
  """`length` layers of one class: (x, gates `{module: [N, ...]}`, *rest) -> (x, gates used).

  Scanned, the parameters have a leading layer axis and the program one body, whatever the
  depth: the layout of checkpoints and of training. Unrolled, each layer has its own arrays,
  (`unstack` converts), and its branches need no copies of them. Where a loop skips, without
  dropout, matrices stay stacked and are sliced inside the branch that reads them.
  """

  layer: type[nn.Module]
  cfg: SpeechConfig
  length: int
  unroll: bool = False

  def setup(self):
    cfg, layer = self.cfg, self.layer
    if cfg.remat != 'none':
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      layer = nn.remat(
        layer,
        prevent_cse=not cfg.scan_layers,
        static_argnums=(5,),  # deterministic, counting the module itself
        policy=policy if cfg.remat == 'dots' else None,
      )
    if self.scanned:
      self.scan = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True, 'gates': True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=self.length,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )(cfg)
    else:
      self.layers = [layer(cfg) for _ in range(self.length)]

  @property
  def scanned(self) -> bool:
    """Whether parameters have a leading layer axis."""
    return self.cfg.scan_layers and not self.unroll

  def __call__(
    self, x: jax.Array, gates: Gates, a: Any, b: Any, deterministic: bool
  ) -> tuple[jax.Array, Gates]:
    """Runs the stack; `a` and `b` go to every layer (masks, memory, context).

    Raises:
      ValueError: gates fixed on the host (tuples of bools) in the scanned layout.
    """
    if self.scanned:
      if any(isinstance(g, tuple) for g in gates.values()):
        raise ValueError('one program body for all layers: fixed gates need scan_layers=False')
      if self.cfg.execution == 'skip' and deterministic and not self.is_initializing():
        return self._scan_in_place(x, gates, a, b)
      return self.scan(x, gates, a, b, deterministic)
    used = []
    for layer, g in self._pairs(gates):
      x, g = layer(x, g, a, b, deterministic)
      used.append(g)
    return x, jax.tree.map(lambda *g: g if isinstance(g[0], bool) else jnp.stack(g), *used)

  def _scan_in_place(self, x: jax.Array, gates: Gates, a: Any, b: Any) -> tuple[jax.Array, Gates]:
    """The scan, with matrices left where they are: `layers.Indexed`."""
    layer = self.layer(self.cfg, parent=None)
    leaves, tree = jax.tree_util.tree_flatten_with_path(self.variables['params']['scan'])
    # Taps are small, and read 31 times: XLA would fuse their slicing into every read. A predictor
    # is small and always runs.
    small = {'conv', *GATE_MODULES}
    named = [[key.key for key in path] for path, _ in leaves]
    stays = [names[-1] == 'kernel' and not small & set(names) for names in named]
    sliced = [None if s else w for s, (_, w) in zip(stays, leaves)]

    def body(x: jax.Array, step: tuple) -> tuple[jax.Array, Gates]:
      i, own, g = step
      mine = [layers.Indexed(w, i) if s else v for s, v, (_, w) in zip(stays, own, leaves)]
      return layer.apply({'params': jax.tree.unflatten(tree, mine)}, x, g, a, b, True)

    return jax.lax.scan(body, x, (jnp.arange(self.length), sliced, gates))

  def _pairs(self, gates: Gates) -> Iterator[tuple[nn.Module, Gates]]:
    for i, layer in enumerate(self.layers):
      yield layer, {m: g[i] for m, g in gates.items()}

  def each(self, visit: Callable[[nn.Module, Gates, int], Any], gates: Gates) -> list[Any]:
    """`visit(layer, its gates, i)` for every layer in order; unrolled layout only."""
    if self.scanned:
      raise ValueError('cached decoding needs unroll_decoder and unstacked parameters')
    return [visit(layer, g, i) for i, (layer, g) in enumerate(self._pairs(gates))]


def unstack(params: dict[str, Any]) -> dict[str, Any]:
  """Scanned parameters -> the unrolled layout, wherever a stack stands in the tree."""
  if not isinstance(params, dict):
    return params
  if set(params) == {'scan'}:
    length = jax.tree.leaves(params)[0].shape[0]
    return {
      f'{PREFIX}{i}': jax.tree.map(lambda a, i=i: a[i], params['scan']) for i in range(length)
    }
  return {k: unstack(v) for k, v in params.items()}


def restack(params: dict[str, Any]) -> dict[str, Any]:
  """Inverse of `unstack`."""
  if not isinstance(params, dict):
    return params
  if params and all(k.startswith(PREFIX) for k in params):
    trees = [params[f'{PREFIX}{i}'] for i in range(len(params))]
    return {'scan': jax.tree.map(lambda *a: jnp.stack(a), *trees)}
  return {k: restack(v) for k, v in params.items()}
