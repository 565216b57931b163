"""Checkpoints: the one file that knows orbax (v1 API).

A checkpoint holds the train state and the run's progress: batches taken from the data and
seconds trained. Saves are asynchronous and atomic: a run may be killed at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from gatedfm.nn import low_rank

FOLDER = 'checkpoints'
# Kinds of models, and what only their configurations have.
KINDS = {'speech': 'model', 'language': 'language_model', 'text': 'classifier'}
_READERS = {
  'speech': 'gatedfm.train, evaluate and transcribe',
  'language': 'gatedfm.prune, factorize, few_shot, generate and induction',
  'text': 'gatedfm.train and classify',
}
CONFIG = 'config.json'
UNFINISHED, FINISHED = '.unfinished', '.finished'  # what becomes a workdir: workdirs.new


class CheckpointError(ValueError):
  """A checkpoint that is not there or does not fit; the message says what to do."""


def _abstract_progress() -> dict[str, Any]:
  return {'next_batch': np.zeros((), np.int64), 'seconds': np.zeros((), np.float64)}


class Checkpoints:
  """The checkpoints of one workdir.

  Args:
    workdir: checkpoints go to its folder `checkpoints`.
    keep: how many of the latest stay.
    mine: whether this process trains here, and may clear what a killed run left half-written.
    host_bytes: of memory that a save takes for what it writes at a time, no less than the largest
      array; None takes as much as all arrays have.
  """

  def __init__(
    self, workdir: Path, keep: int = 2, mine: bool = True, host_bytes: int | None = None
  ):
    self._workdir = workdir
    context = ocp.Context()
    context.memory.write_concurrent_bytes = host_bytes
    self._manager = ocp.training.Checkpointer(
      (workdir / FOLDER).absolute(),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=mine,
      context=context,
    )

  @property
  def latest(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._manager.latest.step if self._manager.latest else None

  def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
    """Saves in the background; a step that is saved already is left alone."""
    if self.latest != step:
      progress = {
        'next_batch': np.asarray(progress['next_batch'], np.int64),
        'seconds': np.asarray(progress['seconds'], np.float64),
      }
      self._manager.save_checkpointables_async(step, {'state': state, 'progress': progress})

  def load(self, abstract_state: Any) -> tuple[Any, dict[str, float]]:
    """The newest state, laid out as `abstract_state` says, and progress.

    Raises:
      CheckpointError: model or optimizer are others, with every array that does not fit.
    """
    saved = self._manager.checkpointables_metadata(self.latest).metadata['state']
    _check(self._workdir, abstract_state, saved)
    out = self._manager.load_checkpointables(
      self.latest, {'state': abstract_state, 'progress': _abstract_progress()}
    )
    return out['state'], {k: v.item() for k, v in out['progress'].items()}

  def wait(self) -> None:
    """Returns when nothing is being written any more."""
    self._manager.wait()

  def close(self) -> None:
    """Waits for what is being written and lets go."""
    self._manager.wait()
    self._manager.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def _paths(tree: Any) -> dict[str, tuple[int, ...]]:
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator='/'): tuple(a.shape) for p, a in flat}


def _mismatches(want: dict[str, tuple], have: dict[str, tuple], optional: str) -> Iterator[str]:
  for name in sorted(set(want) | set(have)):
    if name not in have:
      if not any(part in name.split('/') for part in optional.split()):
        yield f'{name} {want[name]}: not in the checkpoint'
    elif name not in want:
      yield f'{name} {have[name]}: not in the model'
    elif want[name] != have[name]:
      yield f'{name}: model {want[name]}, checkpoint {have[name]}'


def _check(workdir: Path, abstract: Any, saved: Any, optional: str = '') -> None:
  wrong = list(_mismatches(_paths(abstract), _paths(saved), optional))
  if wrong:
    raise CheckpointError(
      f'{len(wrong)} arrays of {workdir} do not fit the model:\n  ' + '\n  '.join(wrong)
    )


def latest_step(workdir: Path) -> int:
  """Step of the newest complete checkpoint of a workdir, which is only read.

  Raises:
    CheckpointError: there is none.
  """
  folder = workdir / FOLDER
  if not folder.is_dir():
    raise CheckpointError(f'{workdir} has no checkpoints; give the workdir of a model')
  # What is still being written, by a run that goes on, has a longer name.
  steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
  if not steps:
    raise CheckpointError(f'{folder} holds no complete checkpoint; train, or import it, first')
  return max(steps)


def load_params(workdir: Path, abstract: Any = None, optional: str = '') -> Any:
  """The parameters of a workdir's newest checkpoint.

  Args:
    workdir: of a training run.
    abstract: parameter tree of `jax.ShapeDtypeStruct` with shardings, or None for host
      arrays as they were saved.
    optional: space-separated module names that the checkpoint may lack (a gate predictor);
      they are absent from the result then.

  Raises:
    CheckpointError: no checkpoint, or parameters that do not match, all of them by name.
  """
  folder, step = workdir / FOLDER, latest_step(workdir)
  with ocp.training.Checkpointer(folder.absolute()) as manager:
    saved = manager.checkpointables_metadata(step).metadata['state']['params']
  if abstract is None:
    target = jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), saved)
  else:
    abstract = low_rank.separate(abstract)
    _check(workdir, abstract, saved, optional)
    have = traverse_util.flatten_dict(saved)
    kept = {k: v for k, v in traverse_util.flatten_dict(abstract).items() if k in have}
    target = traverse_util.unflatten_dict(kept)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context:
    path = str((folder / str(step)).absolute())
    try:
      params = ocp.load(path, {'params': target}, checkpointable_name='state')['params']
      return low_rank.joined(params)
    except (KeyError, OSError, TypeError, ValueError) as e:  # whatever a file cut short makes of it
      raise CheckpointError(f'{path} is damaged: {e}') from e


def runs_in(folder: Path) -> list[Path]:
  """The workdirs of training runs in a folder, such as the points of a sweep."""
  return sorted(path.parent for path in folder.glob(f'*/{CONFIG}'))


def load_config(workdir: Path, kind: str = 'speech') -> dict[str, Any]:
  """The configuration of a workdir's model, as plain data.

  Args:
    workdir: of a training run, or of a language model.
    kind: of `KINDS`, what it must be.

  Raises:
    CheckpointError: there is none, or of another kind, or no such folder, or it is one of runs,
      which are named.
  """
  path = workdir / CONFIG
  if path.exists():
    try:
      config = json.loads(path.read_text())
    except ValueError as e:
      raise CheckpointError(f'{path} is damaged: {e}') from None
    if KINDS[kind] not in config:
      other = next((k for k, key in KINDS.items() if key in config), '')
      there = f'; it holds a {other} model, which {_READERS[other]} take' if other else ''
      raise CheckpointError(f'{workdir} does not hold a {kind} model{there}')
    return config
  if not workdir.exists():
    raise CheckpointError(f'{workdir} does not exist; give the workdir of a {kind} model')
  if (workdir / UNFINISHED).exists() or (workdir / FINISHED).exists():
    raise CheckpointError(f'{workdir} is not finished: wait, or give its command once more')
  if runs := runs_in(workdir):
    raise CheckpointError(f'{workdir} is no run itself; give one of {", ".join(map(str, runs))}')
  raise CheckpointError(f'{workdir} has no {CONFIG}; give the workdir of a {kind} model')
