"""Whose a workdir is: a single training's or a sweep's, of which configuration and process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gatedfm.trainers import checkpoints
from gatedfm.trainers import config as config_lib
from gatedfm.trainers.log import say

LOCK = '.lock'  # held by who trains in a workdir, or writes one
SUMMARY = 'summary.json'  # of a sweep


class WorkdirError(ValueError):
  """A workdir of another configuration, process or purpose, or whose data has changed."""


def refuse_several(workdir: Path) -> None:
  """Raises WorkdirError where a single training is to begin in the folder of a sweep."""
  if (workdir / checkpoints.CONFIG).exists():
    return
  runs = checkpoints.runs_in(workdir)
  if runs or (workdir / SUMMARY).exists():
    own = f', or the folder of a point, such as {runs[0]}' if runs else ''
    raise WorkdirError(f'{workdir} is the folder of a sweep: give another --workdir{own}')


def refuse_single(workdir: Path) -> None:
  """Raises WorkdirError where a sweep is to begin in the workdir of a single training."""
  if (workdir / checkpoints.CONFIG).exists():
    raise WorkdirError(
      f'{workdir} is the workdir of a single training: give another --workdir to the sweep'
    )


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
  """Makes the workdir and holds its lock, which ends with the process however it ends.

  The processes of one training share that of the first. Folders made here that stay empty,
  since the training is refused, go again.

  Raises:
    WorkdirError: another process holds it; in all of them, so that none waits for the first.
  """
  made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
  first = jax.process_index() == 0
  file, mine = _opened(workdir, first)
  with file:
    if jax.process_count() > 1:
      mine = bool(multihost_utils.broadcast_one_to_all(np.int32(mine)))
    if not mine:
      raise WorkdirError(f'{workdir}: another process works here; wait for it or stop it')
    try:
      yield
    finally:  # while it is locked
      if first:
        _remove_unused(made)


def _opened(workdir: Path, locked: bool) -> tuple[IO[str], bool]:
  """The lock's file, open; and whether it is locked, where that is wanted."""
  while True:
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # its last holder took the folder away just now
      file = (workdir / LOCK).open('w')
      mine = not locked or _lock(file)
      # Or the file alone: then what is locked is nobody's.
      if not mine or os.path.samestat(os.fstat(file.fileno()), (workdir / LOCK).stat()):
        return file, mine
      file.close()


def refuse_used(workdir: Path) -> None:
  """Raises WorkdirError where something stands already, before any work is done."""
  own = {LOCK, checkpoints.UNFINISHED}
  if (workdir / checkpoints.FINISHED).exists():  # killed while it was put in its place
    return
  if workdir.exists() and (not workdir.is_dir() or {p.name for p in workdir.iterdir()} - own):
    raise WorkdirError(f'{workdir} is not empty: choose another folder, or remove it')


@contextlib.contextmanager
def new(workdir: Path) -> Iterator[Path]:
  """Yields where to write what stands in the workdir in the end, its configuration last.

  Of what fails or is killed nothing stands there, and the same command begins anew.

  Raises:
    WorkdirError: something stands there, or another process writes there.
  """
  refuse_used(workdir)
  with alone(workdir):
    folder, first = workdir / checkpoints.UNFINISHED, jax.process_index() == 0
    if (workdir / checkpoints.FINISHED).exists():
      _put_in_place(workdir, first)
      raise WorkdirError(f'{workdir} had been finished, and is whole now: nothing is left to do')
    refuse_used(workdir)  # another may just have ended
    if first:
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir()
    _wait('there is a folder')
    try:
      yield folder
      _wait('all have written')
      if first:
        folder.rename(workdir / checkpoints.FINISHED)
      _put_in_place(workdir, first)
    finally:
      if first:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(workdir: Path, first: bool) -> None:
  """Moves what is finished up, the configuration last; the first process does."""
  if first:
    done = workdir / checkpoints.FINISHED
    for path in sorted(done.iterdir(), key=lambda path: path.name == checkpoints.CONFIG):
      path.rename(workdir / path.name)
    done.rmdir()
    (workdir / LOCK).unlink()
  _wait('all is in its place')


def _wait(what: str) -> None:
  """For all processes."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def _remove_unused(folders: Sequence[Path]) -> None:
  """Removes a workdir that holds nothing but its lock, and folders above it that hold nothing.

  Args:
    folders: the workdir, then those above it, upwards.
  """
  if folders and [path.name for path in folders[0].iterdir()] == [LOCK]:
    (folders[0] / LOCK).unlink()
    with contextlib.suppress(OSError):  # one that holds something
      for folder in folders:
        folder.rmdir()


def _lock(file: IO[str]) -> bool:
  """Locks a file; False where another process has done so."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as e:  # some network file systems have no locks
    say(f'{file.name} cannot be locked ({e}): start no second training there')
  return True


def check_owner(cfg: Any, workdir: Path, kind: str = 'speech') -> None:
  """Raises WorkdirError unless the workdir is free or belongs to this configuration.

  Args:
    cfg: of a training.
    workdir: where it is to go.
    kind: of the model, see `checkpoints.KINDS`.
  """
  if not (workdir / checkpoints.CONFIG).exists():
    return
  # A field that is newer than the workdir had its default there.
  before = config_lib.from_dict(type(cfg), checkpoints.load_config(workdir, kind))
  saved, mine = config_lib.to_dict(before), config_lib.to_dict(cfg)
  if changed := config_lib.differences(saved, mine):
    raise WorkdirError(
      f'{workdir} belongs to another configuration:\n  ' + '\n  '.join(changed)
      + '\nChoose another --workdir, or remove this one to start over.'
    )  # fmt: skip
