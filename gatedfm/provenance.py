"""Where figures come from: command, revision, versions, machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'sentencepiece')


def collect(module: str) -> dict[str, Any]:
  """`created`, `versions`, `git_revision`, `device`, `cores`, `command` of what runs now.

  Args:
    module: that was called with `python -m`.
  """
  return {
    'created': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'versions': {p: importlib.metadata.version(p) for p in PACKAGES}
    | {'python': platform.python_version()},
    'git_revision': git_revision(),
    'device': f'{jax.devices()[0].device_kind} ({platform.machine()})',
    'cores': cores(),
    'command': ' '.join(['python', '-m', module, *sys.argv[1:]]),
  }


def cores() -> int:
  """How many this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def git_revision() -> str:
  """Commit of the source tree, with `+` if it has changes; `unknown` outside of git."""
  git = lambda *args: subprocess.run(
    ('git', *args), cwd=Path(__file__).parent, capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    return git('rev-parse', '--short', 'HEAD') + ('+' if git('status', '--porcelain') else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
