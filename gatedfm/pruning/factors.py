"""Matrices of a trained model replaced by products of two smaller ones, chosen by their paths.

Rows may be weighted, so that the error counts where it matters: of a table by how often its rows
are read, of a projection by what it reads (in the spirit of ASVD and SVD-LLM), or by the squared
gradient (Hsu et al., "Language model compression with weighted low-rank factorization", 2022).
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gatedfm.data.lm_batches import LmBatch
from gatedfm.factorization import svd
from gatedfm.models.lm import for_inference
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.lm_losses import losses
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.nn import layers
from gatedfm.nn.layers import Compacted, Factorized

WEIGHTS = ('none', 'frequency', 'activation', 'fisher')
_TABLE, _PROJECTION = 'embedding', 'kernel'  # last parts of paths


@dataclasses.dataclass(frozen=True)
class Row:
  """What became of one matrix.

  Attributes:
    path: of the parameters.
    shape: of the matrix.
    rank: of its factors.
    parameters_removed: share of its parameters that is gone; negative where there are more.
    energy: share of its squared singular values (of weighted rows) that is kept.
  """

  path: str
  shape: tuple[int, int]
  rank: int
  parameters_removed: float
  energy: float


def matrices(params: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
  """Matrices by path, of those that match one of the patterns (`*`, `?` as of file names).

  Raises:
    ConfigError: a pattern that no matrix matches, with some that there are; factors already.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  known = lambda path: path.rsplit('/', 1)[-1] in (_TABLE, _PROJECTION)
  two = {path: leaf for path, leaf in flat.items() if known(path) and len(_shape(leaf)) == 2}
  out = {}
  for pattern in patterns:
    found = [path for path in two if fnmatch.fnmatchcase(path, pattern)]
    if not found:
      some = sorted({path.rsplit('/', 2)[-2] + '/' + path.rsplit('/', 1)[-1] for path in two})
      raise ConfigError(f'no matrix matches {pattern!r}; paths end in {", ".join(some)}')
    out |= {path: two[path] for path in found}
  if done := [path for path, leaf in out.items() if isinstance(leaf, Factorized)]:
    raise ConfigError(f'{done[0]} is a product of factors already: match others')
  return out


def _is_table(path: str) -> bool:
  return path.rsplit('/', 1)[-1] == _TABLE


def _shape(leaf: Any) -> tuple[int, ...]:
  return leaf.value.shape if isinstance(leaf, Compacted) else leaf.shape


def factorize(
  params: Mapping[str, Any],
  patterns: Sequence[str],
  row_weights: Mapping[str, np.ndarray] | None = None,
  split: str = 'balanced',
  **size: Any,
) -> tuple[dict[str, Any], list[Row]]:
  """The parameters with factors for the matrices that match, and what became of each.

  Args:
    params: unrolled; heads or channels may have been cut out of them.
    patterns: of paths, see `matrices`.
    row_weights: by path, as of `svd.factorize`; matrices without any count all rows alike.
    split: as of `svd.factorize`; `balanced` factors train best together.
    size: one of `rank`, `compression` and `energy`, as of `svd.factorize`.

  Raises:
    ConfigError: as `matrices`; a size that is none.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  rows = []
  for path, leaf in matrices(params, patterns).items():
    value = leaf.value if isinstance(leaf, Compacted) else leaf
    weights = None if row_weights is None else row_weights.get(path)
    try:
      found = svd.factorize(np.asarray(value), row_weights=weights, split=split, **size)
    except ValueError as e:
      raise ConfigError(f'{path}: {e}') from None
    made = jnp.asarray(found.first, value.dtype), jnp.asarray(found.second, value.dtype)
    flat[path] = _in_place_of(path, leaf, *made)
    rows.append(Row(path, tuple(value.shape), found.rank, found.compression, found.energy))
  return traverse_util.unflatten_dict(flat, sep='/'), rows


def _in_place_of(path: str, leaf: Any, first: jax.Array, second: jax.Array) -> Factorized:
  """Factors of which the one is `Compacted` that has the units that the matrix has lost."""
  if not isinstance(leaf, Compacted):
    return Factorized(first, second)
  if path.split('/')[-2] in ('out', 'w_2'):  # units lie along their rows
    return Factorized(leaf.replace(value=first), second)
  return Factorized(first, leaf.replace(value=second))


def row_weights(
  kind: str,
  cfg: LmConfig,
  params: Mapping[str, Any],
  patterns: Sequence[str],
  batches: Iterable[LmBatch],
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, np.ndarray]:
  """Weights of the rows of matching matrices, by path, from texts.

  Args:
    kind: `frequency` counts tokens, of tables alone; `activation` is the mean square of what a
      projection reads, of tables the frequency; `fisher` the mean square over batches of the
      loss's gradient, summed over each row. `none` gives no weights.
    cfg, params: a language model, unrolled.
    patterns: as of `matrices`.
    batches: of `lm_batches.batches`.
    say: is told how far it is.

  Raises:
    ConfigError: another kind, or one that a matrix has not.
  """
  choice('weights', kind, WEIGHTS)
  found = matrices(params, patterns)
  if kind == 'none':
    return {}
  if kind == 'frequency' and (others := [p for p in found if not _is_table(p)]):
    raise ConfigError(f'{others[0]} is no table of tokens: take weights activation or fisher')
  collect = _fisher(cfg, params, list(found)) if kind == 'fisher' else _read(cfg, list(found))
  total: dict[str, np.ndarray] = collections.defaultdict(float)
  batches = list(batches)
  for i, batch in enumerate(batches):
    for path, part in jax.device_get(collect(params, batch)).items():
      total[path] = total[path] + np.asarray(part, np.float64)
    say(f'weights: {i + 1} of {len(batches)} batches')
  # A row that no text needed counts little, not nothing: others may.
  return {path: np.maximum(w, 1e-3 * np.mean(w)) for path, w in total.items()}


def _read(cfg: LmConfig, paths: Sequence[str]) -> Callable[[Any, LmBatch], dict[str, jax.Array]]:
  """Squares of what projections read, and how often rows of tables are read."""
  model, _ = for_inference(cfg, {})
  tables = [path for path in paths if _is_table(path)]

  @jax.jit
  def collect(params: Any, tokens_BxL: jax.Array, mask_BxL: jax.Array) -> dict[str, jax.Array]:
    out = {}
    seen_BxLx1 = mask_BxL[..., None].astype(jnp.float32)

    def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
      path = '/'.join((*context.module.path, 'kernel'))
      if isinstance(context.module, layers.Linear) and path in paths:
        out[path] = jnp.sum(jnp.square(args[0].astype(jnp.float32)) * seen_BxLx1, (0, 1))
      return call(*args, **kwargs)

    with nn.intercept_methods(listen):
      model.apply({'params': params}, tokens_BxL, mask_BxL)
    for path in tables:
      rows = jnp.zeros(cfg.vocab_size).at[tokens_BxL].add(mask_BxL.astype(jnp.float32))
      out[path] = rows
    return out

  return lambda params, batch: collect(params, batch.tokens, batch.mask)


def _fisher(
  cfg: LmConfig, params: Mapping[str, Any], paths: Sequence[str]
) -> Callable[[Any, LmBatch], dict[str, jax.Array]]:
  """Squared gradients of a batch's loss, summed over each row; of the matching matrices alone."""
  model, _ = for_inference(cfg, {})

  @jax.jit
  def collect(params: Any, b: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
    flat = traverse_util.flatten_dict(dict(params), sep='/')
    mine = {path: flat[path] for path in paths}
    tokens, mask, at, weight = b

    def loss(mine: dict[str, jax.Array]) -> jax.Array:
      whole = traverse_util.unflatten_dict(flat | mine, sep='/')
      return jnp.sum(losses(model, whole, tokens, mask, at, None) * weight) / jnp.sum(weight)

    squares = lambda g: jnp.sum(jnp.square(g.value if isinstance(g, Compacted) else g), 1)
    return {path: squares(g) for path, g in jax.grad(loss)(mine).items()}

  return lambda params, batch: collect(params, (batch.tokens, batch.mask, batch.at, batch.weight))


def factored(cfg: LmConfig, rows: Sequence[Row]) -> LmConfig:
  """The configuration of a model with these factors."""
  new = [f'{row.path}:{row.rank}' for row in rows]
  return dataclasses.replace(cfg, factors=(*cfg.factors, *new))
