"""Language models on disk: configuration, parameters, tokenizer, and where they come from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gatedfm import atomic, partitioning
from gatedfm import gates as gates_lib
from gatedfm.data.bpe import LmTokenizer
from gatedfm.execution import compact
from gatedfm.gates import Gates, Pattern
from gatedfm.models import lm
from gatedfm.models.lm_config import LmConfig
from gatedfm.nn import low_rank
from gatedfm.nn.layers import Compacted
from gatedfm.trainers import checkpoints
from gatedfm.trainers import config as config_lib

TOKENIZER = 'tokenizer.json'
HOST_BYTES = 2**27  # taken for writing a model, or as much as its largest array


@dataclasses.dataclass(frozen=True)
class LmCheckpoint:
  """A language model at rest.

  Attributes:
    cfg: its configuration, before anything was cut out of it.
    params: unrolled; what compaction has left.
    tokenizer: None where it came without one.
    origin: where it comes from, as plain data.
    cut: gates of what was cut out: `[N]` per site of modules, `[N, U]` per site of units; None
      where nothing was.
  """

  cfg: LmConfig
  params: dict[str, Any]
  tokenizer: LmTokenizer | None
  origin: Mapping[str, Any]
  cut: Gates | None = None

  @property
  def pattern(self) -> Pattern | None:
    """Of the modules; None where all are there."""
    return None if self.cut is None else _pattern(self.cfg, self.cut)

  def fixed(self) -> Gates | None:
    """The gates to run it with."""
    return None if self.cut is None else self.pattern.fixed()

  def kept(self) -> dict[str, Any]:
    """What was not cut out, as plain data: by site '0110', or one such text per layer."""
    return {name: _bits(gates) for name, gates in self.cut.values.items()}


def compacted(
  model: LmCheckpoint, gates: Gates, origin: Mapping[str, Any], fold: bool = False
) -> LmCheckpoint:
  """The model without what `gates` close: modules, heads, hidden channels.

  Args:
    model: of which nothing was cut before.
    gates: 0 or 1; sites that it does not name stay whole.
    origin: to be saved with it.
    fold: closes modules that lose all their heads or channels too (`compact.fold`).

  Raises:
    ValueError: gates that do not fit, or a model that was cut before.
  """
  if model.cut is not None:
    raise ValueError('this model was compacted before: start from the model that it was cut from')
  sites = (*model.cfg.all_sites(), *model.cfg.unit_sites())
  whole = gates_lib.completed(gates, sites)
  each = lambda s: (s.layers, s.units) if s.units > 1 else (s.layers,)
  spread = lambda s: np.array(np.broadcast_to(whole[s.name], each(s)), np.float32)
  cut = Gates({s.name: spread(s) for s in sites})
  for name, gates_N in cut.values.items():
    if ((gates_N != 0) & (gates_N != 1)).any():
      raise ValueError(f'gates of {name} lie between open and closed: nothing to cut there')
  params = _cut(model.params, model.cfg, cut)
  if fold:
    params, cut = compact.fold(params, cut, model.cfg)
  return dataclasses.replace(model, params=params, origin=origin, cut=cut)


def _pattern(cfg: LmConfig, cut: Gates) -> Pattern:
  return gates_lib.pattern(cut, cfg.all_sites())


def _cut(params: dict[str, Any], cfg: LmConfig, cut: Gates) -> dict[str, Any]:
  """Modules first: units of one that is gone are gone with it."""
  params = compact.compact(params, _pattern(cfg, cut))
  # Whole layers' units stay plain arrays only where no layer has lost one.
  narrowed = {s.name: cut[s.name] for s in cfg.unit_sites() if not cut[s.name].all()}
  return compact.compact_units(params, Gates(narrowed), cfg) if narrowed else params


def save(workdir: Path, model: LmCheckpoint) -> None:
  """Writes a model; its configuration comes last, so that without one it is incomplete."""
  workdir.mkdir(parents=True, exist_ok=True)
  value = lambda x: x.value if isinstance(x, Compacted) else x
  flat = {k: value(x) for k, x in low_rank.flat(model.params).items()}
  # Of a layer without heads or channels empty arrays are left, which orbax does not take.
  plain = {k: x for k, x in flat.items() if x.size}
  largest = max(x.nbytes for x in plain.values())
  with checkpoints.Checkpoints(workdir, host_bytes=max(largest, HOST_BYTES)) as manager:
    manager.save(
      0, {'params': traverse_util.unflatten_dict(plain, sep='/')}, {'next_batch': 0, 'seconds': 0.0}
    )
  if model.tokenizer is not None:
    model.tokenizer.save(workdir / TOKENIZER)
  about = {
    'language_model': config_lib.to_dict(model.cfg),
    'param_dtype': str(jax.tree.leaves(model.params)[0].dtype),
    'origin': model.origin,
  }
  if model.cut is not None:
    about['kept'] = model.kept()
  atomic.write_text(workdir / checkpoints.CONFIG, json.dumps(about, indent=1) + '\n')


def load(workdir: Path | str, mesh: Any = None) -> LmCheckpoint:
  """Reads a model.

  Args:
    workdir: that `save` wrote.
    mesh: devices to lay the parameters out on (`partitioning`); None takes the first device.

  Raises:
    CheckpointError: no language model there, or parameters that are not its configuration's.
  """
  workdir = Path(workdir)
  about = checkpoints.load_config(workdir, 'language')
  cfg = config_lib.from_dict(LmConfig, about['language_model'])
  kept = about.get('kept')
  cut = None if kept is None else Gates({name: _gates(bits) for name, bits in kept.items()})
  params = _read(workdir, cfg, cut, np.dtype(about['param_dtype']), mesh)
  path = workdir / TOKENIZER
  tokenizer = LmTokenizer.load(path) if path.exists() else None
  return LmCheckpoint(cfg, params, tokenizer, about['origin'], cut)


def _read(workdir: Path, cfg: LmConfig, cut: Gates | None, dtype: Any, mesh: Any) -> dict[str, Any]:
  """The parameters, laid out on `mesh`; of what was cut all devices have a copy.

  Its axes may be of lengths that they do not divide.
  """
  dense = lm.abstract_params(cfg)
  if mesh is None:
    where = dict.fromkeys(dense, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    everywhere = where[next(iter(where))]
  else:
    where, everywhere = shardings(cfg, mesh), jax.NamedSharding(mesh, jax.P())

  def left() -> dict[str, Any]:
    tree = low_rank.tree({k: jnp.zeros(x.shape, dtype) for k, x in dense.items()})
    return tree if cut is None else _cut(tree, cfg, cut)

  flat = low_rank.flat(jax.eval_shape(left))
  target = {}
  for k, x in flat.items():
    shape, at = (x.value.shape, everywhere) if isinstance(x, Compacted) else (x.shape, where[k])
    target[k] = jax.ShapeDtypeStruct(shape, dtype, sharding=at)
  some = low_rank.tree({k: x for k, x in target.items() if x.size})
  read = low_rank.flat(checkpoints.load_params(workdir, some))
  read |= {k: jnp.zeros(x.shape, dtype) for k, x in target.items() if not x.size}
  wrap = lambda x, value: x.replace(value=value) if isinstance(x, Compacted) else value
  return low_rank.tree({k: wrap(x, read[k]) for k, x in flat.items()})


def _bits(gates: np.ndarray) -> list[str] | str:
  """`[N]` as '0110', `[N, U]` as one such text per layer."""
  row = lambda g: ''.join('01'[int(x)] for x in g)
  return row(gates) if gates.ndim == 1 else [row(g) for g in gates]


def _gates(bits: list[str] | str) -> np.ndarray:
  row = lambda text: np.array([c == '1' for c in text], np.float32)
  return row(bits) if isinstance(bits, str) else np.stack([row(text) for text in bits])


def shardings(cfg: LmConfig, mesh: Any) -> dict[str, Any]:
  """Where each parameter of the unrolled layout lives, by path."""
  tree = partitioning.shardings(lm.initializer(cfg), mesh)
  return low_rank.flat(tree)
