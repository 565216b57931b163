"""Where a language model's arrays lie on many devices, and what each holds; nothing is allocated.

Letters: B batch, G heads of keys and values, S cached tokens, K head width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from gatedfm import partitioning
from gatedfm.models import lm
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.models.stack import PREFIX
from gatedfm.nn import low_rank

# Bytes of memory, and how many of them a host has; of TPUs as a pod's hosts have them.
CHIPS = {
  'v4': (32 * 2**30, 4),
  'v5e': (16 * 10**9, 4),
  'v5p': (95 * 10**9, 4),
  'a100': (80 * 10**9, 8),
  'h100': (80 * 10**9, 8),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """Equal arrays, one per layer or a single one.

  Attributes:
    name: `*` stands for the layer.
    count: how many there are.
    shape, dtype: of each.
    axes: logical names of its axes.
    spec: mesh axes that each of its axes is split over; those it cannot be split evenly over are
      left out (`partitioning.shardings`).
    part: shape of what one device holds of each.
    bytes, device_bytes: of all of them together; of what one device holds.
  """

  name: str
  count: int
  shape: tuple[int, ...]
  dtype: str
  axes: tuple[str | None, ...]
  spec: tuple[Any, ...]
  part: tuple[int, ...]

  @property
  def bytes(self) -> int:
    return self.count * math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

  @property
  def device_bytes(self) -> int:
    return self.count * math.prod(self.part) * jnp.dtype(self.dtype).itemsize

  def as_dict(self) -> dict[str, Any]:
    """Plain data, with both sizes."""
    sizes = {'bytes': self.bytes, 'device_bytes': self.device_bytes}
    return dataclasses.asdict(self) | sizes


def parameters(cfg: LmConfig, mesh: Any, dtype: str = 'bfloat16') -> list[Row]:
  """A row for each kind of parameter, in the unrolled layout."""
  return _rows(lm.initializer(cfg), mesh, dtype)


def caches(cfg: LmConfig, mesh: Any, batch: int, length: int, dtype: str = 'bfloat16') -> list[Row]:
  """Keys and values of all layers, `[B, G, S, K]`, as sharded parameters and batches make them."""
  shape = batch, cfg.groups, length, cfg.width
  zeros = lambda: nn.LogicallyPartitioned(jnp.zeros(shape), ('batch', 'heads', 'time', None))
  layer = lambda: {'key': zeros(), 'value': zeros()}
  init = lambda: {'cache': {f'{PREFIX}{i}': layer() for i in range(cfg.layers)}}
  return _rows(init, mesh, dtype)


def _rows(init: Callable[[], Any], mesh: Any, dtype: str) -> list[Row]:
  boxed = jax.eval_shape(init)
  shardings, kinds = low_rank.flat(partitioning.shardings(init, mesh)), {}
  for path, box in low_rank.flat(boxed).items():
    shape, where = tuple(box.value.shape), shardings[path]
    name = re.sub(rf'{PREFIX}\d+', '*', path)
    key = name, 0, shape, dtype, tuple(box.names), tuple(where.spec), where.shard_shape(shape)
    kinds[key] = kinds.get(key, 0) + 1
  return [dataclasses.replace(Row(*key), count=count) for key, count in kinds.items()]


@dataclasses.dataclass(frozen=True)
class Fit:
  """A model on a number of chips.

  Attributes:
    chip, chips: of `CHIPS`, and how many.
    groups: heads of keys and values.
    fsdp, model: sizes of the mesh; its data axis is 1.
    chip_bytes: of memory of each.
    parameters, caches: what they are given to.
  """

  chip: str
  chips: int
  groups: int
  fsdp: int
  model: int
  chip_bytes: int
  parameters: Sequence[Row]
  caches: Sequence[Row]

  def device_bytes(self) -> dict[str, int]:
    """What each chip holds: `parameters`, `caches`, `total`; activations come on top of it."""
    out = {name: sum(r.device_bytes for r in getattr(self, name)) for name in _HELD}
    return out | {'total': sum(out.values())}

  def as_dict(self) -> dict[str, Any]:
    """Plain data."""
    own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    rows = {name: [row.as_dict() for row in own[name]] for name in _HELD}
    return own | rows | {'device_bytes': self.device_bytes()}


_HELD = ('parameters', 'caches')


def fit(
  cfg: LmConfig, chip: str, chips: int, batch: int, length: int, dtype: str = 'bfloat16'
) -> Fit:
  """Lays a model out over all chips, heads whole.

  The model axis is the largest that divides the chips of a host, which it must not leave, and
  the heads of keys and values, since a head that two chips share is gathered for its products,
  and its cache kept by both. The other chips take rows of matrices and examples.

  Raises:
    ConfigError: an unknown chip, no chips, or more cached tokens than positions.
  """
  choice('chip', chip, tuple(CHIPS))
  for name, value in (('chips', chips), ('batch', batch), ('length', length)):
    if value < 1:
      raise ConfigError(f'{name} is {value}; it must be positive')
  if length > cfg.max_tokens:
    raise ConfigError(f'length {length}: the model has positions for {cfg.max_tokens}')
  size, of_host = CHIPS[chip]
  model = math.gcd(chips, of_host, cfg.groups)
  mesh = AbstractMesh((1, chips // model, model), partitioning.MESH_AXES)
  held = parameters(cfg, mesh, dtype), caches(cfg, mesh, batch, length, dtype)
  return Fit(chip, chips, cfg.groups, chips // model, model, size, *held)


def markdown(fits: Sequence[Fit]) -> str:
  """A table for each, and its totals."""
  return '\n\n'.join(_section(fit) for fit in fits)


def _section(fit: Fit) -> str:
  gb = lambda x: f'{x / 1e9:.3f}'
  lines = [
    f'### {fit.chips} x {fit.chip}: mesh data=1, fsdp={fit.fsdp}, model={fit.model}',
    '',
    '| array | number | shape | axes | split over | part of a chip | GB | GB per chip |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for row in (*fit.parameters, *fit.caches):
    sizes = [' x '.join(map(str, shape)) for shape in (row.shape, row.part)]
    axes = ', '.join(a or '-' for a in row.axes)
    split = ', '.join('+'.join(a) if isinstance(a, tuple) else a or '-' for a in row.spec)
    name = f'`{row.name.removeprefix("decoder/")}`'
    cells = name, row.count, sizes[0], axes, split, sizes[1], gb(row.bytes), gb(row.device_bytes)
    lines.append(f'| {" | ".join(map(str, cells))} |')
  number = sum(row.count * math.prod(row.shape) for row in fit.parameters)
  each = fit.device_bytes()
  enough = 'fits' if each['total'] <= fit.chip_bytes else 'does not fit'
  dtype = fit.parameters[0].dtype
  lines += [
    '',
    f'{number / 1e9:.3f} billion parameters in {dtype}: {gb(each["parameters"])} GB per chip; keys '
    f'and values {gb(each["caches"])} GB; together {gb(each["total"])} of {gb(fit.chip_bytes)} GB: '
    f'{enough}, activations not counted.',
    '',
    f'The model axis is the largest that divides {fit.chips} chips, the {CHIPS[fit.chip][1]} of a '
    f'host, and {fit.groups} heads of keys and values.',
  ]
  return '\n'.join(lines)
