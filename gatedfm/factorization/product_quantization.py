"""Tables whose rows are put together from few pieces: product quantization, on the host.

A row's features are cut into parts; each part is replaced by the nearest of at most 256 that
k-means finds. Source: Jégou et al., "Product Quantization for Nearest Neighbor Search", 2011; for
word vectors Joulin et al., "FastText.zip", 2016. Letters: V rows, D features, M parts, K pieces of
a part, W = D / M features of a part.
"""

from __future__ import annotations

import numpy as np
from scipy.cluster import vq

MOST = 256  # pieces, so that a code is a byte
_SAMPLE = 50_000  # rows that pieces are fitted to
_BLOCK = 65_536


def fit(
  table: np.ndarray, parts: int, pieces: int = MOST, seed: int = 0, rounds: int = 20
) -> tuple[np.ndarray, np.ndarray]:
  """Codes `[V, M]` uint8 and pieces `[M, K, W]` float32.

  Args:
    table: `[V, D]`; read in blocks.
    parts: M, which divides D.
    pieces: K, at most 256 and at most V.
    seed: of the sample and of k-means.
    rounds: of k-means.

  Raises:
    ValueError: numbers of parts or pieces that cannot be, or a table that is not finite.
  """
  rows, features = table.shape
  if parts < 1 or features % parts:
    even = [m for m in range(1, features + 1) if not features % m]
    raise ValueError(f'{parts} parts do not divide {features} features: choose one of {even}')
  if not 1 <= pieces <= min(MOST, rows):
    raise ValueError(f'pieces is {pieces}; it is between 1 and {min(MOST, rows)}')
  rng = np.random.default_rng(seed)
  some = np.sort(rng.choice(rows, min(rows, _SAMPLE), replace=False))
  sample = _cut(np.asarray(table[some], np.float32), parts)
  if not np.isfinite(sample).all():
    raise ValueError('the table holds numbers that are not finite')
  found = np.stack([_means(sample[:, m], pieces, rounds, rng) for m in range(parts)])
  codes = np.empty((rows, parts), np.uint8)
  for start in range(0, rows, _BLOCK):
    block = _cut(np.asarray(table[start : start + _BLOCK], np.float32), parts)
    if not np.isfinite(block).all():
      raise ValueError('the table holds numbers that are not finite')
    for m in range(parts):
      codes[start : start + _BLOCK, m] = vq.vq(block[:, m], found[m])[0]
  return codes, found


def _cut(rows_VxD: np.ndarray, parts: int) -> np.ndarray:
  return rows_VxD.reshape(len(rows_VxD), parts, -1)


def _means(rows: np.ndarray, pieces: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
  """K-means from rows that differ; where there are fewer than pieces, each is one."""
  different = np.unique(rows, axis=0)
  if len(different) <= pieces:
    return np.pad(different, ((0, pieces - len(different)), (0, 0)), mode='edge')
  start = different[rng.choice(len(different), pieces, replace=False)]
  return vq.kmeans2(rows, start, iter=rounds, minit='matrix', missing='warn')[0].astype(np.float32)
