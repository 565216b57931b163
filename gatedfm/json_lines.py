"""Files of JSON objects, one a line, that a kill may have torn while they grew."""

import json
from pathlib import Path
from typing import Any

from absl import logging


def read(path: Path) -> list[dict[str, Any]]:
  """The objects of a file, none where it is missing; torn lines are skipped with a warning."""
  if not path.exists():
    return []
  rows = []
  with path.open(encoding='utf-8') as lines:
    for number, line in enumerate(lines, start=1):
      try:
        row = json.loads(line)
      except ValueError:
        row = None
      if isinstance(row, dict):
        rows.append(row)
      else:
        logging.warning('%s: line %d is torn and skipped', path, number)
  return rows
