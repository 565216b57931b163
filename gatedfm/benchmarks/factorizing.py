"""How long, and in how much memory, a table on disk is factorized. Letters: V rows, D features."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm.benchmarks.embeddings import Case
from gatedfm.factorization import svd

SUITES = ('svd',)
GOAL = 2 * 2**30  # bytes of the process's own


@dataclasses.dataclass(frozen=True)
class SvdCase(Case):
  """What is timed: `rows`, `features`, `compression` and `seed` of `Case`."""

  rows: int = 2_000_000


def run(case: SvdCase, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
  """Factorizes a random table, which is read from a file.

  Returns: a row with `table_bytes`, `own_bytes` (most that the process had of its own, without
    pages of the file, which the system may drop), `goal`, `seconds`, `rank`, `energy`.
  """
  case.validate()
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'table.npy'
    say(f'writing {4 * case.rows * case.features / 1e9:.1f} GB')
    _write(path, case)
    table = np.load(path, mmap_mode='r')
    with _Watch() as watch:
      start = time.perf_counter()
      found = svd.factorize(table, compression=case.compression)
      seconds = time.perf_counter() - start
  row = {
    'way': 'svd',
    'rows': case.rows,
    'features': case.features,
    'rank': found.rank,
    'energy': found.energy,
    'table_bytes': 4 * case.rows * case.features,
    'own_bytes': watch.most,
    'goal': GOAL,
    'seconds': seconds,
  }
  say(
    f'{case.rows} x {case.features} by rank {found.rank}: {seconds:.0f} s, at most '
    f'{watch.most / 2**30:.2f} GiB of its own for {row["table_bytes"] / 2**30:.2f} GiB'
  )
  return [row]


def _write(path: Path, case: SvdCase) -> None:
  """Rows of falling features, as word vectors have them."""
  rng, scale = np.random.default_rng(case.seed), 0.99 ** np.arange(case.features)
  shape = case.rows, case.features
  table = np.lib.format.open_memmap(path, 'w+', np.float32, shape)
  for start in range(0, case.rows, svd.BLOCK):
    part = table[start : start + svd.BLOCK]
    part[:] = rng.standard_normal(part.shape, np.float32) * scale


class _Watch:
  """Most bytes that the process had of its own meanwhile, looked at every few milliseconds."""

  def __enter__(self) -> _Watch:
    self.most, self._done = 0, threading.Event()
    self._thread = threading.Thread(target=self._look, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._done.set()
    self._thread.join()

  def _look(self) -> None:
    while not self._done.wait(0.005):
      self.most = max(self.most, own_bytes())


def own_bytes() -> int:
  """Resident bytes of this process without those of files; 0 where the system does not tell."""
  path = Path('/proc/self/status')
  lines = path.read_text().splitlines() if path.exists() else []
  found = [line.split()[1] for line in lines if line.startswith('RssAnon')]
  return 1024 * int(found[0]) if found else 0
