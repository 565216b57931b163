"""Language models on disk: configuration, parameters, tokenizer, and where they come from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from gatedfm import atomic, partitioning
from gatedfm.data.bpe import LmTokenizer
from gatedfm.models import lm
from gatedfm.models.lm_config import LmConfig
from gatedfm.trainers import checkpoints
from gatedfm.trainers import config as config_lib
from gatedfm.trainers.checkpoints import CheckpointError
from gatedfm.trainers.workdirs import WorkdirError

TOKENIZER = 'tokenizer.json'


@dataclasses.dataclass(frozen=True)
class LmCheckpoint:
  """A language model at rest.

  Attributes:
    cfg: its configuration.
    params: unrolled.
    tokenizer: None where it came without one.
    origin: where it comes from, as plain data.
  """

  cfg: LmConfig
  params: dict[str, Any]
  tokenizer: LmTokenizer | None
  origin: Mapping[str, Any]


def refuse_used(workdir: Path) -> None:
  """Raises WorkdirError where something stands already, before any work is done."""
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise WorkdirError(f'{workdir} is not empty: choose another folder, or remove it')


def save(workdir: Path, model: LmCheckpoint) -> None:
  """Writes a model; its configuration comes last, so that without one it is incomplete."""
  workdir.mkdir(parents=True, exist_ok=True)
  with checkpoints.Checkpoints(workdir) as manager:
    manager.save(0, {'params': model.params}, {'next_batch': 0, 'seconds': 0.0})
  if model.tokenizer is not None:
    model.tokenizer.save(workdir / TOKENIZER)
  about = {
    'language_model': config_lib.to_dict(model.cfg),
    'param_dtype': str(jax.tree.leaves(model.params)[0].dtype),
    'origin': model.origin,
  }
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
  about = checkpoints.load_config(workdir)
  if 'language_model' not in about:
    raise CheckpointError(
      f'{workdir} is not a language model: give a folder that gatedfm.import_checkpoint wrote'
    )
  cfg = config_lib.from_dict(LmConfig, about['language_model'])
  abstract, dtype = lm.abstract_params(cfg), np.dtype(about['param_dtype'])
  alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  where = dict.fromkeys(abstract, alone) if mesh is None else shardings(cfg, mesh)
  abstract = {
    k: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where[k]) for k, x in abstract.items()
  }
  tree = traverse_util.unflatten_dict(abstract, sep='/')
  params = checkpoints.load_params(workdir, tree)
  path = workdir / TOKENIZER
  tokenizer = LmTokenizer.load(path) if path.exists() else None
  return LmCheckpoint(cfg, params, tokenizer, about['origin'])


def shardings(cfg: LmConfig, mesh: Any) -> dict[str, Any]:
  """Where each parameter of the unrolled layout lives, by path."""
  tree = partitioning.shardings(lm.initializer(cfg), mesh)
  return traverse_util.flatten_dict(tree, sep='/')
