"""Trees of parameters in which products of two factors stand where matrices stood.

On disk and in tables of shapes a factor is an array of its own, `PATH/first` and `PATH/second`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from gatedfm.nn.layers import Factorized

_KEYS = {'first', 'second'}


def ranks(factors: Iterable[str]) -> dict[str, int]:
  """R by path, of items `PATH:RANK`.

  Raises:
    ValueError: another item.
  """
  out = {}
  for item in factors:
    path, _, rank = item.rpartition(':')
    if not path or not rank.isdecimal() or not int(rank):
      raise ValueError(f'factors {item!r}: write PATH:RANK, such as decoder/embedding:26')
    out[path] = int(rank)
  return out


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves by path, factors each by itself."""
  out = {}
  for path, leaf in traverse_util.flatten_dict(dict(params), sep='/').items():
    if isinstance(leaf, Factorized):
      out |= {f'{path}/first': leaf.first, f'{path}/second': leaf.second}
    else:
      out[path] = leaf
  return out


def tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flat`."""
  return joined(traverse_util.unflatten_dict(dict(leaves), sep='/'))


def separate(node: Any) -> Any:
  """A tree as it is saved, in which factors are dictionaries."""
  if isinstance(node, Factorized):
    return {'first': node.first, 'second': node.second}
  return {k: separate(v) for k, v in node.items()} if isinstance(node, dict) else node


def joined(node: Any) -> Any:
  """Inverse of `separate`."""
  if not isinstance(node, dict):
    return node
  if set(node) == _KEYS:
    return Factorized(**node)
  return {k: joined(v) for k, v in node.items()}


def with_factors(
  params: Mapping[str, Any], ranks: Mapping[str, int], key: jax.Array
) -> dict[str, Any]:
  """Fresh parameters (boxed with their axes' names, or plain) with factors for some matrices.

  Their products have the variance that the matrices had.

  Args:
    params: of an initialiser.
    ranks: R by path.
    key: of the initialiser; each path has its own of it.

  Raises:
    ValueError: a path without a matrix, or a rank that is none.
  """
  found = traverse_util.flatten_dict(dict(params), sep='/')
  for path, rank in ranks.items():
    if path not in found:
      raise ValueError(f'{path}:{rank} of factors is none of the parameters')
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    found[path] = _fresh(path, found[path], rank, own)
  return traverse_util.unflatten_dict(found, sep='/')


def _fresh(path: str, leaf: Any, rank: int, key: jax.Array) -> Factorized:
  boxed = isinstance(leaf, nn.LogicallyPartitioned)
  value = leaf.value if boxed else leaf
  if value.ndim != 2 or not 1 <= rank <= min(value.shape):
    raise ValueError(f'{path}:{rank} of factors: shape {value.shape} has no such rank')
  spread = jnp.sqrt(jnp.std(value.astype(jnp.float32)) / math.sqrt(rank))
  keys = jax.random.split(key)
  shapes = (value.shape[0], rank), (rank, value.shape[1])
  made = [(spread * jax.random.normal(k, s)).astype(value.dtype) for k, s in zip(keys, shapes)]
  if boxed:
    names = (leaf.names[0], 'rank'), ('rank', leaf.names[1])
    made = [nn.LogicallyPartitioned(x, n) for x, n in zip(made, names)]
  return Factorized(*made)
