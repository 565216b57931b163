"""Tensors of files: as torch and safetensors write them; damaged and hostile files are refused."""

import collections
import io
import json
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gatedfm.convert import tensor_files
from gatedfm.data.types import DataError


class Storage:
  """Stands for torch's storage of a tensor."""

  def __init__(self, key, array):
    self.key, self.array = key, array


KINDS = {'float32': 'FloatStorage', 'float16': 'HalfStorage', 'bfloat16': 'BFloat16Storage'}


@pytest.fixture
def torch_like(monkeypatch):
  """Names that torch's pickles refer to."""
  utils = types.ModuleType('torch._utils')
  exec('def _rebuild_tensor_v2(*a): ...\ndef _rebuild_parameter(*a): ...', utils.__dict__)
  torch = types.ModuleType('torch')
  torch._utils = utils
  for kind in KINDS.values():
    setattr(torch, kind, type(kind, (), {'__module__': 'torch'}))
  monkeypatch.setitem(sys.modules, 'torch', torch)
  monkeypatch.setitem(sys.modules, 'torch._utils', utils)
  return torch


class Tensor:
  """Pickles as a torch tensor does."""

  def __init__(self, torch, storage, offset, shape, strides, parameter=False):
    self.args = torch, storage, offset, shape, strides
    self.parameter = parameter

  def __reduce__(self):
    torch, storage, offset, shape, strides = self.args
    rebuilt = torch._utils._rebuild_tensor_v2
    args = (storage, offset, shape, strides, False, collections.OrderedDict())
    if not self.parameter:
      return rebuilt, args
    inner = Tensor(*self.args)
    return torch._utils._rebuild_parameter, (inner, True, collections.OrderedDict())


def pickled(torch, obj, views=()):
  """As torch pickles an object; storages in `views` begin in another one."""

  class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
      if isinstance(obj, Storage):
        kind = getattr(torch, KINDS[str(obj.array.dtype)])
        return ('storage', kind, obj.key, 'cpu', obj.array.size, dict(views).get(obj.key))
      return None

  buffer = io.BytesIO()
  Pickler(buffer, 2).dump(obj)
  return buffer.getvalue()


def write_bin(path, torch, state, storages, compression=zipfile.ZIP_STORED):
  """A file as `torch.save` writes it."""
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('model/data.pkl', pickled(torch, state))
    for storage in storages:
      archive.writestr(f'model/data/{storage.key}', storage.array.tobytes())


def write_legacy(path, torch, state, storages, views=(), machine=None):
  """A file as torch before 1.6 wrote it."""
  keys = [storage.key for storage in storages]
  out = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001)]
  out += [pickled(torch, x, views) for x in (machine or {'little_endian': True}, state, keys)]
  for storage in storages:
    out += [struct.pack('<q', storage.array.size), storage.array.tobytes()]
  path.write_bytes(b''.join(out))


WRITERS = {'zip': write_bin, 'legacy': write_legacy}


@pytest.mark.parametrize('write', WRITERS)
def test_torch_files(write, tmp_path, torch_like):
  a = Storage('0', np.arange(24, dtype=np.float32))
  b = Storage('1', np.arange(6).astype(ml_dtypes.bfloat16))
  state = collections.OrderedDict(
    whole=Tensor(torch_like, a, 0, (4, 6), (6, 1)),
    turned=Tensor(torch_like, a, 0, (6, 4), (1, 6)),
    part=Tensor(torch_like, a, 7, (2, 3), (6, 1)),
    small=Tensor(torch_like, b, 0, (6,), (1,), parameter=True),
    scalar=Tensor(torch_like, a, 5, (), ()),
  )
  path = tmp_path / 'pytorch_model.bin'
  WRITERS[write](path, torch_like, state, [a, b])
  found = tensor_files.in_folder(tmp_path)
  whole = np.arange(24, dtype=np.float32).reshape(4, 6)
  want = {
    'whole': whole,
    'turned': whole.T,
    'part': whole[1:3, 1:4],
    'small': np.arange(6).astype(ml_dtypes.bfloat16),
    'scalar': np.float32(5),
  }
  assert set(found) == set(want)
  for name, value in want.items():
    got = found[name].read()
    assert found[name].shape == value.shape
    assert got.dtype == value.dtype
    np.testing.assert_array_equal(got, value)


def test_safetensors_and_their_index(tmp_path):
  first = {'a': np.ones((2, 3), np.float16)}
  second = {'b': np.arange(4).astype(ml_dtypes.bfloat16)}
  save_file(first, tmp_path / 'one.safetensors')
  save_file(second, tmp_path / 'two.safetensors')
  index = {'weight_map': {'a': 'one.safetensors', 'b': 'two.safetensors'}}
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  found = tensor_files.in_folder(tmp_path)
  for name, value in (first | second).items():
    assert found[name].shape == value.shape
    np.testing.assert_array_equal(found[name].read(), value)
  (tmp_path / 'two.safetensors').unlink()
  with pytest.raises(DataError, match=r'^[^ ]*two\.safetensors is missing: fetch all files'):
    tensor_files.in_folder(tmp_path)
  index['weight_map']['c'] = 'one.safetensors'
  (tmp_path / 'two.safetensors').write_bytes((tmp_path / 'one.safetensors').read_bytes())
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(DataError, match='not an index'):
    tensor_files.in_folder(tmp_path)


class Hostile:
  """Would write a file where it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


@pytest.mark.parametrize('write', WRITERS)
def test_a_hostile_pickle_never_runs(write, tmp_path, torch_like):
  harm = tmp_path / 'harm'
  WRITERS[write](tmp_path / 'pytorch_model.bin', torch_like, {'w': Hostile(harm)}, [])
  with pytest.raises(DataError, match=r'io\.open, which is no part of a tensor'):
    tensor_files.in_folder(tmp_path)
  machine = {'little_endian': Hostile(harm)}
  write_legacy(tmp_path / 'pytorch_model.bin', torch_like, {}, [], machine=machine)
  with pytest.raises(DataError, match=r'io\.open, which is no part of a tensor'):
    tensor_files.in_folder(tmp_path)
  assert not harm.exists()


@pytest.mark.parametrize('write', WRITERS)
def test_tensors_that_are_none(write, tmp_path, torch_like):
  """Of a shape that is no numbers, of other strides, without a storage; names that are none."""
  a = Storage('0', np.arange(6, dtype=np.float32))
  path = tmp_path / 'pytorch_model.bin'
  fine = torch_like, a, 0, (2, 3), (3, 1)
  for wrong in (
    {'w': Tensor(torch_like, a, 0, ('2', 3), (3, 1))},
    {'w': Tensor(torch_like, a, 0, (2, 3), (3,))},
    {'w': Tensor(torch_like, a, 1.5, (2, 3), (3, 1))},
    {'w': Tensor(torch_like, 'a', 0, (2, 3), (3, 1))},
    {3: Tensor(*fine)},
  ):
    WRITERS[write](path, torch_like, wrong, [a])
    with pytest.raises(DataError, match=r'pytorch_model\.bin'):
      tensor_files.in_folder(tmp_path)
  WRITERS[write](path, torch_like, {'w': Tensor(*fine)}, [a])
  assert tensor_files.in_folder(tmp_path)['w'].shape == (2, 3)


def test_old_files_view_storages(tmp_path, torch_like):
  whole = Storage('0', np.arange(24, dtype=np.float32))
  state = {'w': Tensor(torch_like, whole, 1, (2, 3), (3, 1))}
  path = tmp_path / 'pytorch_model.bin'
  write_legacy(path, torch_like, state, [whole], {'0': ('1', 5, 10)})
  want = np.arange(6.0, 12).reshape(2, 3)
  np.testing.assert_array_equal(tensor_files.in_folder(tmp_path)['w'].read(), want)


def test_damaged_old_files(tmp_path, torch_like):
  path, a = tmp_path / 'pytorch_model.bin', Storage('0', np.arange(6, dtype=np.float32))
  fine = Tensor(torch_like, a, 0, (2, 3), (3, 1))
  write_legacy(path, torch_like, {'w': fine}, [a])
  whole = path.read_bytes()
  for cut, message in (
    (1, 'storage 0 is missing'),
    (25, 'no zip archive'),
    (40, 'not one of plain'),
  ):
    path.write_bytes(whole[:-cut])
    with pytest.raises(DataError, match=message):
      tensor_files.in_folder(tmp_path)
  write_legacy(path, torch_like, {'w': Tensor(torch_like, a, 1, (2, 3), (3, 1))}, [a])
  with pytest.raises(DataError, match='a tensor reaches beyond its storage 0'):
    tensor_files.in_folder(tmp_path)
  for size in (-1, 7, 2**63):
    path.write_bytes(whole[:-32] + struct.pack('<Q', size % 2**64) + whole[-24:])
    with pytest.raises(DataError, match='storage 0 is missing'):
      tensor_files.in_folder(tmp_path)
  write_legacy(path, torch_like, {'w': fine}, [])
  with pytest.raises(DataError, match='storage 0 is missing'):
    tensor_files.in_folder(tmp_path)


def test_damaged_torch_files(tmp_path, torch_like):
  path, a = tmp_path / 'pytorch_model.bin', Storage('0', np.arange(6, dtype=np.float32))
  fine = Tensor(torch_like, a, 0, (2, 3), (3, 1))
  cases = {
    'a tensor reaches beyond its storage 0': (Tensor(torch_like, a, 1, (2, 3), (3, 1)), [a], 0),
    'storage 0 is missing, cut short or compressed': (fine, [], 0),
    'is missing, cut short or compressed': (fine, [a], zipfile.ZIP_DEFLATED),
    'something else than named tensors': ([1, 2], [a], 0),
  }
  for message, (tensor, storages, compression) in cases.items():
    write_bin(path, torch_like, {'w': tensor}, storages, compression)
    with pytest.raises(DataError, match=message):
      tensor_files.in_folder(tmp_path)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(DataError, match='no zip archive'):
    tensor_files.in_folder(tmp_path)


def test_what_is_not_there(tmp_path):
  with pytest.raises(DataError, match='is not a folder'):
    tensor_files.in_folder(tmp_path / 'none')
  with pytest.raises(DataError, match=r'holds none of model\.safetensors'):
    tensor_files.in_folder(tmp_path)
  (tmp_path / 'model.safetensors').write_bytes(b'nonsense' * 4)
  with pytest.raises(DataError, match=r'model\.safetensors'):
    tensor_files.in_folder(tmp_path)
