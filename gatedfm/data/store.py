"""Records as JSON lines, and a store of records and audio on disk, written once."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm import atomic
from gatedfm.data.types import Record

_RECORDS, _AUDIO = 'records.jsonl', 'audio.int16'


def write_records(path: Path, records: Iterable[Record]) -> None:
  """Writes records as JSON lines, atomically."""
  rows = [dataclasses.asdict(record) for record in records]
  lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + '\n' for row in rows]
  atomic.write_text(path, ''.join(lines))


def to_record(fields: Mapping[str, Any]) -> Record:
  """A record from its fields as JSON gives them."""
  return Record(**{**fields, 'tasks': tuple(fields['tasks'])})


def read_records(path: Path) -> list[Record]:
  """Reads what `write_records` wrote."""
  with open(path, encoding='utf-8') as lines:
    return [to_record(json.loads(line)) for line in lines]


def fingerprint(path: Path, *names: str) -> str:
  """Hash of an index of records and of what names the source, 16 hexadecimal digits."""
  digest = hashlib.sha256('\0'.join(names).encode() + b'\0' + path.read_bytes())
  return digest.hexdigest()[:16]


def write(folder: Path, items: Iterable[tuple[Record, np.ndarray]]) -> None:
  """Writes a store, atomically: the folder appears when it is whole.

  Where another process was faster, its store stands.

  Args:
    folder: where; its parents are made.
    items: records with their audio, int16 [S]; num_samples is set from the audio.
  """
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(prefix=f'{folder.name}.', dir=folder.parent))
  try:
    records = []
    with open(partial / _AUDIO, 'wb') as file:
      for record, audio in items:
        file.write(audio.astype('<i2').tobytes())
        records.append(dataclasses.replace(record, num_samples=len(audio)))
    write_records(partial / _RECORDS, records)
    partial.chmod(0o755)
    os.replace(partial, folder)
  except OSError:
    if not folder.exists():
      raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


class StoredSource:
  """A source over a store; the audio file is mapped once per process.

  Args:
    name: of the source.
    folder: of the store.
    chosen: indices of the records to use, all by default.
  """

  def __init__(self, name: str, folder: Path, chosen: Sequence[int] | None = None):
    self._arguments = (name, folder, chosen)
    self.name = name
    self._folder = folder
    records = read_records(folder / _RECORDS)
    ends = np.cumsum([record.num_samples for record in records], dtype=np.int64)
    keep = range(len(records)) if chosen is None else chosen
    self.records = [records[i] for i in keep]
    self._ends = ends[list(keep)]
    ids = hashlib.sha256('\n'.join(r.id for r in self.records).encode()).hexdigest()
    self.fingerprint = fingerprint(folder / _RECORDS, name, folder.name, ids)

  def __len__(self) -> int:
    return len(self.records)

  def audio(self, i: int) -> np.ndarray:
    """Audio of record i: int16 [S] at 16 kHz."""
    end = int(self._ends[i])
    return np.array(self._samples[end - self.records[i].num_samples : end])

  @functools.cached_property
  def _samples(self) -> np.ndarray:
    return np.memmap(self._folder / _AUDIO, dtype='<i2', mode='r')

  def __reduce__(self):
    return type(self), self._arguments
