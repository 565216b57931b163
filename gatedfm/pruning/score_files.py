"""Scores by site in .npz files; a site's slash is a point there."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gatedfm import atomic
from gatedfm.data.types import DataError


def save(path: Path, scores: Mapping[str, np.ndarray]) -> None:
  """Writes the file whole."""
  buffer = io.BytesIO()
  np.savez(buffer, **{name.replace('/', '.'): score for name, score in scores.items()})
  atomic.write_bytes(path, buffer.getvalue())


def load(path: Path) -> dict[str, np.ndarray]:
  """What `save` wrote.

  Raises:
    DataError: no such file, or another.
  """
  try:
    with np.load(path) as file:
      return {name.replace('.', '/'): file[name] for name in file.files}
  except FileNotFoundError:
    raise DataError(f'{path} does not exist; give the scores.npz of gatedfm.prune') from None
  except (OSError, ValueError, TypeError, zipfile.BadZipFile) as e:  # TypeError: one array alone
    raise DataError(f'{path} is no scores.npz of gatedfm.prune: {e}') from None
