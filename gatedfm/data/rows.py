"""People's own files of examples: JSONL, or CSV with a line of names."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gatedfm.data.types import DataError

SUFFIXES = ('.jsonl', '.csv')
T = TypeVar('T')


def text_of(path: Path) -> str:
  """A file's text; raises DataError."""
  try:
    return path.read_text(encoding='utf-8-sig')  # Excel puts a mark in front
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f'{path} cannot be read: {getattr(e, "strerror", e)}') from None


def read(path: Path, made: Callable[[dict[str, Any]], T], fields: str) -> list[T]:
  """What `made` makes of each line.

  Args:
    path: ending in one of `SUFFIXES`.
    made: of a line's fields; raises KeyError, TypeError, ValueError or AttributeError where they
      are not what they should be.
    fields: for the message, such as 'text and label'.

  Raises:
    DataError: naming the line and the mend.
  """
  text = text_of(path)
  if path.suffix == '.csv':
    reader = csv.DictReader(io.StringIO(text, newline=''))
    try:
      rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
      raise DataError(f'{path}, behind line {reader.line_num}: {e}') from None
  else:
    rows = [(i + 1, line) for i, line in enumerate(text.split('\n')) if line.strip()]
  out = []
  for number, row in rows:
    try:
      out.append(made(json.loads(row) if isinstance(row, str) else row))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
      message = f'has no {e}' if isinstance(e, KeyError) else str(e)
      raise DataError(f'{path}, line {number}: {message}; a line has {fields}') from None
  if not out:
    raise DataError(f'{path} holds no examples; a line has {fields}')
  return out
