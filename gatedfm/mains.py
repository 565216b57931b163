"""What the command lines share: arguments, devices, caches, and errors for people."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import logging


def no_arguments(argv: list[str]) -> None:
  """Refuses stray arguments, such as a flag without its dashes."""
  if len(argv) > 1:
    raise SystemExit(f'unknown arguments {argv[1:]}; flags start with --, see --help')


def set_up() -> None:
  """Starts several hosts where there are any, and keeps compiled programs between calls."""
  import jax

  logging.set_verbosity(logging.WARNING)  # orbax and jax tell much that is not for users
  several_tpu_hosts = ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
  if several_tpu_hosts or 'JAX_COORDINATOR_ADDRESS' in os.environ:
    jax.distributed.initialize()
  cache = os.environ.get('GATEDFM_COMPILED') or Path.home() / '.cache' / 'gatedfm' / 'compiled'
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
  """Prints a foreseen error as one message without a traceback, and exits with 1.

  `GATEDFM_TRACEBACK=1` shows the traceback.
  """
  from gatedfm.data.types import DataError
  from gatedfm.models.speech_config import ConfigError
  from gatedfm.trainers.checkpoints import CheckpointError
  from gatedfm.trainers.loop import WorkdirError

  try:
    yield
  except (DataError, ConfigError, CheckpointError, WorkdirError, FloatingPointError) as e:
    if os.environ.get('GATEDFM_TRACEBACK'):
      raise
    print(f'error: {e}', file=sys.stderr)
    raise SystemExit(1) from None
