"""Matrices as products of two smaller ones: truncated SVD by the Gram matrix, on the host.

A table `[V, D]` is read in blocks of rows, twice, so it may be a memory map of what is larger than
memory; nothing else of V rows is made but the first factor, and of a wide one nothing of D columns
but the second and the right vectors. Source: Acharya et al., "Online
Embedding Compression for Text Classification using Low Rank Matrix Factorization", AAAI 2019.
Letters: V rows, D columns, R rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

SPLITS = ('reference', 'balanced')
BLOCK = 65_536  # rows


@dataclasses.dataclass(frozen=True)
class Factors:
  """A product that stands for a table.

  Attributes:
    first: `[V, R]`; second: `[R, D]`.
    singular: `[min(V, D)]`, of the whole table (with its rows weighted, where they were), falling.
  """

  first: np.ndarray
  second: np.ndarray
  singular: np.ndarray

  @property
  def rank(self) -> int:
    """R."""
    return len(self.second)

  @property
  def energy(self) -> float:
    """Share of the squared singular values that is kept; of a table of zeros all."""
    squares = np.square(self.singular)
    return float(squares[: self.rank].sum() / squares.sum()) if squares.any() else 1.0

  @property
  def compression(self) -> float:
    """Share of the table's parameters that is gone; negative where there are more."""
    rows, columns = len(self.first), self.second.shape[1]
    return 1 - self.rank * (rows + columns) / (rows * columns)

  def product(self) -> np.ndarray:
    """The table that it stands for, `[V, D]`."""
    return self.first @ self.second


def rank_of(rows: int, columns: int, compression: float) -> int:
  """Largest rank whose two factors have at most `1 - compression` of the table's parameters.

  `floor((1 - c) V D / (V + D))`.

  Raises:
    ValueError: a compression that leaves no rank.
  """
  if not 0 <= compression < 1:
    raise ValueError(f'compression is {compression}; it is a share to remove, from 0 to below 1')
  # 0.9 of 1 leaves 0.09999999999999998.
  rank = math.floor((1 - compression) * rows * columns / (rows + columns) + 1e-9)
  if rank < 1:
    share = f'{100 * compression:g}% of {rows} x {columns}'
    raise ValueError(f'{share} removed leaves no rank: remove less')
  return rank


def factorize(
  table: np.ndarray,
  rank: int | None = None,
  compression: float | None = None,
  energy: float | None = None,
  row_weights: np.ndarray | None = None,
  split: str = 'reference',
  dtype: np.dtype | type = np.float32,
) -> Factors:
  """The best product of a rank, by the (weighted) sum of squared differences.

  Args:
    table: `[V, D]`, on the host.
    rank, compression, energy: exactly one. R itself; the share of parameters to remove
      (`rank_of`); the least rank that keeps this share of the squared singular values.
    row_weights: `[V]`, not negative, such as words' frequencies: how much each row's error counts.
    split: where the singular values go. `reference` into the second factor, as published;
      `balanced` their roots into both.
    dtype: of the factors.

  Raises:
    ValueError: none or several of the three, out of range, or a table that cannot be factorized.
  """
  rows, columns = _check(table, row_weights, split)
  if sum(x is not None for x in (rank, compression, energy)) != 1:
    raise ValueError('give one of rank, compression and energy')
  singular, basis = _singular(table, row_weights)
  if compression is not None:
    rank = rank_of(rows, columns, compression)
  elif energy is not None:
    rank = _rank_for(singular, energy)
  most = min(rows, columns)
  if not 1 <= rank <= most:
    raise ValueError(f'rank is {rank}; of {rows} x {columns} it is between 1 and {most}')
  basis_DxR = basis(rank)
  # Whatever the weights, rows are best told by where they fall in the basis: U S of the table.
  norms_R = _norms(table, basis_DxR)
  scale_R = norms_R if split == 'reference' else np.sqrt(norms_R)
  scale_R = np.where(scale_R > 0, scale_R, 1)
  first = np.empty((rows, rank), dtype)
  for start in range(0, rows, BLOCK):
    part = np.asarray(table[start : start + BLOCK], np.float64)
    first[start : start + BLOCK] = part @ (basis_DxR / scale_R)
  return Factors(first, np.ascontiguousarray((basis_DxR * scale_R).T, dtype), singular)


def _check(table: np.ndarray, row_weights: np.ndarray | None, split: str) -> tuple[int, int]:
  if table.ndim != 2 or not table.size:
    raise ValueError(f'a table of shape {table.shape} is no matrix')
  if split not in SPLITS:
    raise ValueError(f'split is {split!r}; choose from {", ".join(SPLITS)}')
  if row_weights is not None:
    fits = np.shape(row_weights) == (len(table),)
    if not fits or not np.isfinite(row_weights).all() or np.min(row_weights) < 0:
      raise ValueError(f'row_weights are {len(table)} numbers that are not negative')
    if not np.any(row_weights):
      raise ValueError('row_weights are all zero: no row would count')
  return table.shape


def _singular(
  table: np.ndarray, row_weights: np.ndarray | None
) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
  """Falling singular values of the weighted table; what makes its first right vectors `[D, R]`."""
  rows, columns = table.shape
  wide = rows < columns
  # Rising, and by rounding below zero where there is nothing.
  values, vectors = np.linalg.eigh((_gram_of_rows if wide else _gram)(table, row_weights))
  singular, vectors = np.sqrt(np.maximum(values[::-1], 0)), vectors[:, ::-1]
  if not wide:
    return singular, lambda rank: vectors[:, :rank]

  def basis(rank: int) -> np.ndarray:
    left_VxR = vectors[:, :rank] / np.where(singular[:rank] > 0, singular[:rank], 1)
    out = np.empty((columns, rank))
    for start, part in _columns(table, row_weights):
      out[start : start + part.shape[1]] = part.T @ left_VxR
    return out

  return singular, basis


def _columns(table: np.ndarray, row_weights: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
  """Blocks of columns of the weighted table, in double precision, and where they start."""
  root = 1.0 if row_weights is None else np.sqrt(np.asarray(row_weights, np.float64))[:, None]
  for start in range(0, table.shape[1], BLOCK):
    part = np.asarray(table[:, start : start + BLOCK], np.float64)
    if not np.isfinite(part).all():
      end = start + part.shape[1]
      raise ValueError(f'columns {start} to {end} hold numbers that are not finite')
    yield start, part * root


def _gram_of_rows(table: np.ndarray, row_weights: np.ndarray | None) -> np.ndarray:
  """`[V, V]` of a table with fewer rows than columns: products of its weighted rows."""
  return sum(part @ part.T for _, part in _columns(table, row_weights))


def _gram(table: np.ndarray, row_weights: np.ndarray | None) -> np.ndarray:
  """`sum_v w_v t_v t_v^T`, `[D, D]` in double precision."""
  out = np.zeros((table.shape[1],) * 2)
  for start in range(0, len(table), BLOCK):
    part = np.asarray(table[start : start + BLOCK], np.float64)
    if not np.isfinite(part).all():
      raise ValueError(f'rows {start} to {start + len(part)} hold numbers that are not finite')
    weighted = part
    if row_weights is not None:
      weighted = part * np.asarray(row_weights[start : start + BLOCK], np.float64)[:, None]
    out += part.T @ weighted
  return (out + out.T) / 2


def _norms(table: np.ndarray, basis_DxR: np.ndarray) -> np.ndarray:
  """Lengths of the columns of the table in that basis, `[R]`."""
  out = np.zeros(basis_DxR.shape[1])
  for start in range(0, len(table), BLOCK):
    out += np.square(np.asarray(table[start : start + BLOCK], np.float64) @ basis_DxR).sum(0)
  return np.sqrt(out)


def _rank_for(singular: np.ndarray, energy: float) -> int:
  if not 0 < energy <= 1:
    raise ValueError(f'energy is {energy}; it is a share to keep, above 0 and not above 1')
  kept = np.cumsum(np.square(singular))
  return int(np.searchsorted(kept, energy * kept[-1] * (1 - 1e-12))) + 1
