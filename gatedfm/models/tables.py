"""Embedding tables by name: which module, how small, and how each is made of a trained table.

Letters: V rows, D features, R rank.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gatedfm.factorization import product_quantization, svd
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.nn import quantized
from gatedfm.nn.compressed import BandedEmbed, HashedEmbed, ProductQuantizedEmbed
from gatedfm.nn.embedding import FactorizedEmbed
from gatedfm.nn.quantized import QuantizedEmbed, QuantizedFactors

KINDS = (
  'dense',
  'factorized',
  'quantized',
  'quantized_factors',
  'product_quantized',
  'banded',
  'hashed',
)
# Whose codes no training changes.
CODED = ('quantized', 'quantized_factors', 'product_quantized')
INITS = ('svd', 'weighted_svd', 'released_svd', 'random')
_BANDS = (0.1, 0.4, 1.0)  # where bands of rows by frequency end; each has half the last one's rank

Variables = dict[str, Any]


@dataclasses.dataclass(slots=True)
class TableConfig:
  """What stands for an embedding table.

  Attributes:
    kind: one of `KINDS`: `dense` (`nn.Embed`), `factorized`, `quantized`, `quantized_factors`,
      `product_quantized`, `banded` (rows in the order of their frequency), `hashed`.
    compression: share to remove. Of `factorized` of the parameters, as published; of others of the
      float32 bytes. `quantized` has its bits instead.
    rank: R of factors, of the first band; 0 follows from the compression, of `quantized_factors`
      without one from the factors that they are made of.
    bits: 16, 8 or 4, of what is quantized.
    parts: of product quantization; 0 follows from the compression.
    pieces: of each of these parts, at most 256.
    buckets: of hashing; 0 follows from the compression.
    init: how factors are made of a trained table: `svd`; `weighted_svd` by the words' frequencies;
      `released_svd`, whose second factor is wrong as in the published code; `random`.
    split: where the singular values go, `reference` or `balanced`; see `svd.factorize`.
    project_relu: of DAN, a ReLU behind the average of its words, as in the published code.
  """

  kind: str = 'dense'
  compression: float = 0.0
  rank: int = 0
  bits: int = 8
  parts: int = 0
  pieces: int = 256
  buckets: int = 0
  init: str = 'svd'
  split: str = 'reference'
  project_relu: bool = False

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend."""
    choice('table.kind', self.kind, KINDS)
    choice('table.init', self.init, INITS)
    choice('table.split', self.split, svd.SPLITS)
    if not 0 <= self.compression < 1:
      raise ConfigError(f'table.compression is {self.compression}; it is a share, 0 to below 1')
    if self.bits not in quantized.TYPES:
      raise ConfigError(f'table.bits is {self.bits}; it is one of {tuple(quantized.TYPES)}')
    if min(self.rank, self.parts, self.buckets) < 0 or not 1 <= self.pieces <= 256:
      raise ConfigError('table.rank, parts and buckets are not negative, pieces 1 to 256')
    size = {'product_quantized': 'parts', 'hashed': 'buckets'}.get(self.kind, 'rank')
    sized = self.kind not in ('dense', 'quantized')
    # Quantized factors may have the rank of those that they are made of.
    known = self.compression or getattr(self, size) or self.kind == 'quantized_factors'
    if sized and not known:
      raise ConfigError(f'a {self.kind} table needs table.compression or table.{size}')
    if not sized and self.compression:
      raise ConfigError(
        f'table.compression is {self.compression}, but a {self.kind} table has '
        + ('its table.bits' if self.kind == 'quantized' else 'none: choose another table.kind')
      )
    if self.init == 'released_svd' and self.split != 'reference':
      raise ConfigError('table.init is released_svd, which has table.split reference')
    if self.project_relu and self.kind not in ('factorized', 'dense'):
      raise ConfigError(f'table.project_relu is of factorized tables, not of {self.kind} ones')


@dataclasses.dataclass(frozen=True)
class Size:
  """What is kept of a table: parameters (numbers and codes alike) and bytes at rest."""

  parameters: int
  bytes: int


def resolved(cfg: TableConfig, rows: int, features: int) -> TableConfig:
  """The configuration with ranks, parts or buckets for what the compression asks.

  Raises:
    ConfigError: a compression that leaves nothing, or more than there is.
  """
  cfg.validate()
  most = min(rows, features)
  fits = lambda cfg: size(cfg, rows, features).bytes <= (1 - cfg.compression) * 4 * rows * features
  largest = lambda field, values: _largest(cfg, field, values, fits, rows, features)
  if cfg.kind == 'factorized' and not cfg.rank:
    try:
      cfg = dataclasses.replace(cfg, rank=svd.rank_of(rows, features, cfg.compression))
    except ValueError as e:
      raise ConfigError(f'table.compression: {e}') from None
  elif cfg.kind in ('quantized_factors', 'banded') and not cfg.rank and cfg.compression:
    cfg = largest('rank', range(1, most + 1))
  elif cfg.kind == 'product_quantized':
    cfg = dataclasses.replace(cfg, pieces=min(cfg.pieces, rows))
    if not cfg.parts:
      cfg = largest('parts', [m for m in range(1, features + 1) if not features % m])
  elif cfg.kind == 'hashed' and not cfg.buckets:
    # More rows of either factor are fewer of the other: from the middle on, more is larger.
    cfg = largest('buckets', range(math.isqrt(rows), rows + 1))
  if cfg.kind == 'quantized_factors' and not cfg.rank:
    raise ConfigError('a quantized_factors table needs table.compression or table.rank')
  if cfg.kind == 'product_quantized' and features % cfg.parts:
    raise ConfigError(f'table.parts is {cfg.parts}, which does not divide {features} features')
  if cfg.kind == 'hashed' and cfg.buckets > rows:
    raise ConfigError(f'table.buckets is {cfg.buckets}, of {rows} rows at most as many')
  if cfg.init == 'released_svd' and rows < features:
    raise ConfigError(f'table.init is released_svd, which needs as many rows as features: {rows}')
  if cfg.rank > most:
    raise ConfigError(f'table.rank is {cfg.rank}, of {rows} x {features} at most {most}')
  return cfg


def _largest(
  cfg: TableConfig, field: str, values: Any, fits: Any, rows: int, features: int
) -> TableConfig:
  """The configuration with the largest value that fits; sizes rise with values."""
  values = list(values)
  low, high = 0, len(values)
  while low < high:
    middle = (low + high) // 2
    if fits(dataclasses.replace(cfg, **{field: values[middle]})):
      low = middle + 1
    else:
      high = middle
  if not low:
    raise ConfigError(
      f'table.compression is {cfg.compression}: nothing of {rows} x {features} is left as a '
      f'{cfg.kind} table; remove less'
    )
  return dataclasses.replace(cfg, **{field: values[low - 1]})


def make(cfg: TableConfig, rows: int, features: int, **names: Any) -> nn.Module:
  """The module, which is called and attends as `nn.Embed`; `cfg` is a resolved one."""
  shape = rows, features
  match cfg.kind:
    case 'dense':
      init = nn.with_logical_partitioning(nn.linear.default_embed_init, ('vocab', 'embed'))
      return nn.Embed(*shape, embedding_init=init, **names)
    case 'factorized':
      return FactorizedEmbed(*shape, cfg.rank, **names)
    case 'quantized':
      return QuantizedEmbed(*shape, cfg.bits, scale_dtype=jnp.bfloat16, **names)
    case 'quantized_factors':
      return QuantizedFactors(*shape, cfg.rank, cfg.bits, scale_dtype=jnp.bfloat16, **names)
    case 'product_quantized':
      return ProductQuantizedEmbed(*shape, cfg.parts, cfg.pieces, **names)
    case 'banded':
      return BandedEmbed(*shape, *_bands(cfg, rows, features), **names)
  return HashedEmbed(*shape, cfg.buckets, **names)


def _bands(cfg: TableConfig, rows: int, features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Ends and ranks; none is wider than it has rows."""
  ends = sorted({max(round(share * rows), 1) for share in _BANDS})
  sizes = np.diff((0, *ends))
  ranks = (max(min(cfg.rank >> i, features, n), 1) for i, n in enumerate(sizes.tolist()))
  return tuple(ends), tuple(ranks)


def size(cfg: TableConfig, rows: int, features: int) -> Size:
  """What a resolved table takes, counted on its variables."""
  module = make(cfg, rows, features)
  made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(1, jnp.int32))
  leaves = jax.tree.leaves(made)
  return Size(sum(x.size for x in leaves), sum(x.size * x.dtype.itemsize for x in leaves))


def from_dense(
  cfg: TableConfig, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0
) -> Variables:
  """Variables of a resolved configuration that stand for a trained table.

  Args:
    cfg: what to make of it.
    table: `[V, D]`, on the host; for `banded` its rows fall in frequency.
    counts: `[V]`, the words' frequencies, which `weighted_svd` needs.
    seed: of `random` factors and of clustering.

  Returns: `{'params': ..., 'quantized': ...}` as the module has them, host arrays.

  Raises:
    ConfigError: `weighted_svd` without counts. ValueError: a table that is not finite.
  """
  match cfg.kind:
    case 'dense':
      return {'params': {'embedding': np.asarray(table, np.float32)}}
    case 'factorized':
      return {'params': _factors(cfg, table, cfg.rank, counts, seed)}
    case 'quantized':
      return {quantized.COLLECTION: _codes(table, cfg.bits)}
    case 'quantized_factors':
      factors = _factors(cfg, table, cfg.rank, counts, seed)
      return quantize_factors(cfg, factors)
    case 'product_quantized':
      codes, pieces = product_quantization.fit(table, cfg.parts, cfg.pieces, seed)
      return {'params': {'pieces': pieces}, quantized.COLLECTION: {'codes': codes}}
    case 'banded':
      ends, ranks = _bands(cfg, *table.shape)
      parts, start = {}, 0
      for i, (end, rank) in enumerate(zip(ends, ranks)):
        mine = None if counts is None else counts[start:end]
        parts[f'band_{i}'] = _factors(cfg, table[start:end], rank, mine, seed)
        start = end
      return {'params': parts}
  return {'params': _hashed(np.asarray(table, np.float32), cfg.buckets)}


def quantize_factors(cfg: TableConfig, factors: dict[str, np.ndarray]) -> Variables:
  """Variables of `quantized_factors` from those of a `factorized` table."""
  codes = {'embedding': _codes(factors['embedding'], cfg.bits)}
  return {'params': {'projection': np.asarray(factors['projection'])}, quantized.COLLECTION: codes}


def _codes(table: np.ndarray, bits: int) -> dict[str, np.ndarray]:
  codes, scale = quantized.quantize(table, bits, ml_dtypes.bfloat16)
  return {'codes': codes, 'scale': scale}


def _factors(
  cfg: TableConfig, table: np.ndarray, rank: int, counts: np.ndarray | None, seed: int
) -> dict[str, np.ndarray]:
  rows, features = table.shape
  if cfg.init == 'random':
    made = FactorizedEmbed(rows, features, rank).init(jax.random.key(seed), jnp.zeros(1, int))
    return jax.tree.map(np.asarray, nn.unbox(made)['params'])
  weights = None
  if cfg.init == 'weighted_svd':
    if counts is None:
      raise ConfigError("table.init is weighted_svd, which needs the words' frequencies")
    weights = np.maximum(counts, 1)  # rows that were not seen count little, not nothing
  found = svd.factorize(np.asarray(table), rank, row_weights=weights, split=cfg.split)
  second = found.second
  if cfg.init == 'released_svd':
    second = _released(np.asarray(table), rank)
  return {'embedding': found.first, 'projection': second}


def _released(table: np.ndarray, rank: int) -> np.ndarray:
  """The second factor `[R, D]` of the published code, which takes rows of V for those of its
  transpose; signs of the singular vectors are arbitrary."""
  _, singular, transposed = np.linalg.svd(table, full_matrices=False)
  return np.asarray(singular[:rank, None] * transposed.T[:rank], np.float32)


def _hashed(table: np.ndarray, buckets: int) -> dict[str, np.ndarray]:
  """Remainders as the means of the rows that share them, quotients of one."""
  rows, features = table.shape
  at = np.arange(rows) % buckets
  remainder = np.zeros((buckets, features), np.float32)
  np.add.at(remainder, at, table)
  remainder /= np.bincount(at, minlength=buckets)[:, None]
  return {'remainder': remainder, 'quotient': np.ones((-(-rows // buckets), features), np.float32)}


def to_dense(cfg: TableConfig, variables: Variables, rows: int, features: int) -> np.ndarray:
  """The table `[V, D]` that variables of a resolved configuration stand for."""
  module = make(cfg, rows, features)
  block = 65_536
  look = jax.jit(module.apply)
  parts = (np.arange(i, min(i + block, rows)) for i in range(0, rows, block))
  return np.concatenate([np.asarray(look(variables, ids)) for ids in parts])
