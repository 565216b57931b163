"""Named arrays in files of Hugging Face checkpoints, read one at a time and without torch.

`model.safetensors`, `pytorch_model.bin` (a zip of a pickle and raw data, or before torch 1.6 some
pickles with raw data behind them) and the indexes of either that name many such files. Pickles are
read by an unpickler that knows tensors and nothing else.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from gatedfm.data.types import DataError

NAMES = (
  'model.safetensors.index.json',
  'model.safetensors',
  'pytorch_model.bin.index.json',
  'pytorch_model.bin',
)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """An array that is read when it is asked for."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


Tensors = Mapping[str, LazyTensor]


def in_folder(folder: Path) -> dict[str, LazyTensor]:
  """All tensors of a checkpoint's folder, by name.

  Raises:
    DataError: no such files, or damaged or hostile ones; it is named.
  """
  if not folder.is_dir():
    raise DataError(f'{folder} is not a folder: give that of a checkpoint, with its config.json')
  found = next((folder / name for name in NAMES if (folder / name).exists()), None)
  if found is None:
    raise DataError(f'{folder} holds none of {", ".join(NAMES)}')
  if found.suffix != '.json':
    return in_file(found)
  try:
    parts = json.loads(found.read_text())['weight_map']
    files = {part: in_file(folder / part) for part in sorted(set(parts.values()))}
    return {name: files[part][name] for name, part in parts.items()}
  except DataError:
    raise
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
    raise DataError(f'{found}: not an index of the files beside it ({e!r})') from None


def in_file(path: Path) -> dict[str, LazyTensor]:
  """The tensors of one file, by name; see `in_folder`."""
  if not path.exists():
    raise DataError(f'{path} is missing: fetch all files of the checkpoint')
  return _safetensors(path) if path.suffix == '.safetensors' else _torch(path)


def _safetensors(path: Path) -> dict[str, LazyTensor]:
  try:
    file = safetensors.safe_open(path, 'numpy')
  except safetensors.SafetensorError as e:
    raise DataError(f'{path}: {e}') from None

  def lazy(name: str) -> LazyTensor:
    return LazyTensor(tuple(file.get_slice(name).get_shape()), lambda: file.get_tensor(name))

  names = file.keys()  # itself no mapping
  return {name: lazy(name) for name in names}


_DTYPES = {
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'DoubleStorage': np.float64,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}


@dataclasses.dataclass(frozen=True)
class _Storage:
  dtype: Any
  key: str
  offset: int = 0  # of a view into it, as old files have them


@dataclasses.dataclass(frozen=True)
class _View:
  """A tensor as a pickle describes it: where in a storage, and in which strides."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _view(storage: _Storage, offset: int, shape: tuple, strides: tuple, *rest: Any) -> _View:
  numbers = (offset, *shape, *strides)
  if not isinstance(storage, _Storage) or not all(type(n) is int for n in numbers):
    raise pickle.UnpicklingError('a tensor without a storage, or of a shape that is no numbers')
  if len(shape) != len(strides):
    raise pickle.UnpicklingError('a tensor with other numbers of axes and of strides')
  return _View(storage, offset, tuple(shape), tuple(strides))


_KNOWN = {
  ('collections', 'OrderedDict'): collections.OrderedDict,
  ('torch._utils', '_rebuild_tensor_v2'): _view,
  ('torch._utils', '_rebuild_parameter'): lambda view, *rest: view,
  **{('torch', name): name for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
  """Knows tensors; whatever else a pickle names would be run, and is refused."""

  def __init__(self, file: BinaryIO):
    super().__init__(file)
    self.dtypes: dict[str, Any] = {}  # of storages that it has met

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _KNOWN:
      raise pickle.UnpicklingError(f'it asks for {module}.{name}, which is no part of a tensor')
    return _KNOWN[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, *rest = pid
    if kind != 'storage' or dtype not in _DTYPES:
      raise pickle.UnpicklingError(f'it holds a {kind} of {dtype}')
    self.dtypes[key] = _DTYPES[dtype]
    view = rest[2] if len(rest) > 2 else None
    return _Storage(_DTYPES[dtype], key, view[1] if view else 0)


# What `torch.save` began its files with before 1.6, and still does when asked for that format.
_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)

# Where in a file a storage begins, and how many bytes it has, by key.
_Spans = dict[str, tuple[int, int]]


def _torch(path: Path) -> dict[str, LazyTensor]:
  try:
    with path.open('rb') as file:
      raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      read = _legacy if raw[: len(_MAGIC)] == _MAGIC else _zipped
      state, spans = read(file, raw)
  except (zipfile.BadZipFile, struct.error, EOFError) as e:
    raise DataError(
      f'{path} is no zip archive that torch writes, nor a file of torch before 1.6: damaged? ({e})'
    ) from None
  except Exception as e:  # whatever a damaged or hostile pickle raises
    raise DataError(f'{path}: its pickle is not one of plain tensors: {e}') from None
  named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
  if not named or not all(isinstance(v, _View) for v in state.values()):
    raise DataError(f'{path} holds something else than named tensors')
  return {name: _lazy(path, raw, view, spans) for name, view in state.items()}


def _zipped(file: BinaryIO, raw: mmap.mmap) -> tuple[Any, _Spans]:
  with zipfile.ZipFile(file) as archive:
    members = archive.infolist()
    (data,) = [m.filename for m in members if m.filename.endswith('/data.pkl')]
    state = _Unpickler(io.BytesIO(archive.read(data))).load()
  spans, prefix = {}, f'{data.removesuffix("data.pkl")}data/'
  for member in members:
    if member.filename.startswith(prefix) and not member.compress_type:
      # Behind the local header, whose name and extra fields have lengths of their own.
      name, extra = struct.unpack_from('<HH', raw, member.header_offset + 26)
      start = member.header_offset + 30 + name + extra
      spans[member.filename.removeprefix(prefix)] = start, member.file_size
  return state, spans


def _legacy(file: BinaryIO, raw: mmap.mmap) -> tuple[Any, _Spans]:
  """Magic number, version, machine, state and keys; then each storage behind its length."""
  pickles = [_Unpickler(file) for _ in range(5)]
  *_, state, keys = [one.load() for one in pickles]
  spans, at, dtypes = {}, file.tell(), pickles[3].dtypes
  for key in keys:
    (count,) = struct.unpack_from('<Q', raw, at)
    spans[key] = at + 8, count * np.dtype(dtypes[key]).itemsize
    at = sum(spans[key])
  return state, spans


def _lazy(path: Path, raw: mmap.mmap, view: _View, spans: _Spans) -> LazyTensor:
  """A view into the file, where storages stand as they are."""
  storage, dtype = view.storage, np.dtype(view.storage.dtype)
  start, size = spans.get(storage.key, (0, -1))
  offset = storage.offset + view.offset
  last = offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides))
  if not 0 <= size <= len(raw) - start or min((offset, *view.strides, *view.shape)) < 0:
    raise DataError(f'{path}: storage {storage.key} is missing, cut short or compressed')
  if 0 not in view.shape and (last + 1) * dtype.itemsize > size:
    raise DataError(f'{path}: a tensor reaches beyond its storage {storage.key}')

  def read() -> np.ndarray:
    flat = np.frombuffer(raw, dtype, size // dtype.itemsize, start)
    strides = [s * dtype.itemsize for s in view.strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], view.shape, strides, writeable=False)

  return LazyTensor(view.shape, read)
