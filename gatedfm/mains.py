"""What the command lines share: arguments, devices, caches, and errors for people."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, logging


def run(main: Callable[[list[str]], None]) -> None:
  """`app.run` whose wrong `--config.field` is one line that names the fields there are."""

  def parse(argv: list[str]) -> list[str]:
    try:
      return app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError) as e:
      raise SystemExit(f'error: {_unknown_field(str(e.args[0]))}') from None

  app.run(main, flags_parser=parse)


def _unknown_field(message: str) -> str:
  """What ml_collections says of a field that a dataclass has not, and those that it has."""
  found = re.search(r"Field (\S+) not found on dataclass <class '(\S+)\.(\w+)'>", message)
  if not found:
    return f'--config: there is no {message!r}'
  field, module, name = found.groups()
  fields = dataclasses.fields(getattr(importlib.import_module(module), name))
  return f'--config: {name} has no field {field}; it has {", ".join(f.name for f in fields)}'


def loaded(config: Any) -> Any:
  """The value of a `--config` flag; raises ConfigError where its file could not be read."""
  from gatedfm.models.speech_config import ConfigError

  try:
    getattr(config, 'name', None)  # what stands for a file that failed to load raises here
  except OSError as e:
    raise ConfigError(str(e).strip()) from None
  return config


def no_arguments(argv: list[str]) -> None:
  """Refuses stray arguments, such as a flag without its dashes."""
  if len(argv) > 1:
    raise SystemExit(f'unknown arguments {argv[1:]}; flags start with --, see --help')


def several_hosts() -> bool:
  """Whether the environment says that this process is one of several hosts'."""
  several_tpu_hosts = ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
  return several_tpu_hosts or 'JAX_COORDINATOR_ADDRESS' in os.environ


def set_up() -> None:
  """Joins several hosts where there are any, and keeps compiled programs between calls.

  TPU pods are found by themselves; elsewhere `JAX_COORDINATOR_ADDRESS` (host:port of the first),
  `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say where this process belongs.
  """
  import jax

  logging.set_verbosity(logging.WARNING)  # orbax and jax tell much that is not for users
  if several_hosts():
    # Where no cluster manager tells, the environment does.
    given = {'num_processes': 'JAX_NUM_PROCESSES', 'process_id': 'JAX_PROCESS_ID'}
    jax.distributed.initialize(
      **{name: int(os.environ[key]) for name, key in given.items() if key in os.environ}
    )
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
