"""Mesh, the one table of logical axis rules, and shardings derived from it.

Every parameter and activation names its axes; this table alone says where they live. The
trainer never mentions a mesh axis, so one device, eight fake ones or a pod run the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

MESH_AXES = ('data', 'fsdp', 'model')

# Logical axis -> mesh axis. Small parameters (norms, biases, convolution taps) are replicated:
# sharded, each would cost a gather inside every branch.
RULES = (
  ('batch', ('data', 'fsdp')),
  ('embed', 'fsdp'),  # D of a matrix
  ('mlp', 'model'),  # F, cgMLP channels
  ('heads', 'model'),  # H*K of q, k, v and of the output projection
  ('vocab', 'model'),  # V
  ('layers', None),  # N, scanned
  ('embed_out', 'model'),  # D where a square matrix has two
  ('rank', None),  # R of a factorized matrix, a few dozen
  ('small', None),  # norms, biases, taps
  ('time', None),  # T or L of activations
  ('act_embed', None),  # D of activations
)


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices: Any = None) -> Mesh:
  """A data x fsdp x model mesh; one axis may be -1, taking the devices that are left.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or `model` spans hosts.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, model]
  if sizes.count(-1) == 1:
    known = int(np.prod([s for s in sizes if s != -1]))
    sizes[sizes.index(-1)] = len(devices) // max(known, 1)
  if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
    raise ValueError(
      f'mesh data={data} fsdp={fsdp} model={model} does not fit the device count '
      f'{len(devices)}: their product must equal it (one may be -1)'
    )
  # Linen's logical constraints need Auto axes; jax.make_mesh would default to Explicit.
  mesh = jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
  _check_hosts(mesh.devices)
  return mesh


def _check_hosts(devices: np.ndarray) -> None:
  """Raises ValueError where hosts would have to read the same rows of a batch.

  Each reads a share of its own, so two of them in one row of the mesh would silently hold
  different data as if they were the same.
  """
  for row in devices.reshape(-1, devices.shape[-1]):
    if len({d.process_index for d in row}) > 1:
      raise ValueError(
        f'mesh model={devices.shape[-1]} spans hosts, which read different rows of a batch; '
        'choose one that divides the devices of a host'
      )


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
  """Makes `mesh` and the rules current; `with mesh:` would silently disable constraints."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Names an activation's axes; without an active mesh this is the identity."""
  return nn.with_logical_constraint(x, axes)


def shardings(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
  """Shardings of what `init(*args)` returns, from its boxed parameters' logical names.

  An axis whose length the mesh axis does not divide is replicated (a vocabulary of 50,002
  over four devices), since jit accepts even shards alone.
  """

  def fit(leaf: Any) -> Any:
    boxed = isinstance(leaf, nn.meta.AxisMetadata)
    value = leaf.value if boxed else leaf
    if not hasattr(value, 'shape'):
      return value  # a box around nothing: a parameter that this optimizer leaves to another
    spec = nn.logical_to_mesh_axes(leaf.names, RULES) if boxed else ()
    axes = []
    for size, axis in zip(value.shape, tuple(spec) + (None,) * value.ndim):
      names = (axis,) if isinstance(axis, str) else tuple(axis or ())
      parts = int(np.prod([mesh.shape[n] for n in names]))
      axes.append(axis if size % parts == 0 else None)
    return NamedSharding(mesh, jax.P(*axes))

  is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
  return jax.tree.map(fit, jax.eval_shape(init, *args), is_leaf=is_box)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """How a batch is laid out: its leading axis over data and fsdp."""
  return NamedSharding(mesh, jax.P(('data', 'fsdp')))


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Makes each process's rows into global arrays over `mesh`."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def abstract_batch(
  arrays: dict[str, tuple[tuple[int, ...], Any]], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """What `global_batch` makes of a batch, as shapes, types and shardings alone."""
  sharding = batch_sharding(mesh)
  return {k: jax.ShapeDtypeStruct(s, d, sharding=sharding) for k, (s, d) in arrays.items()}
