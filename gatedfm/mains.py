"""What the command lines share: arguments, devices, caches, and errors for people."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging


def run(main: Callable[[list[str]], None]) -> None:
  """`app.run` where flags or a configuration file that cannot be are one line with the mend.

  `GATEDFM_TRACEBACK=1` shows the traceback.
  """

  def parse(argv: list[str]) -> list[str]:
    for flag in flags.FLAGS.flags_by_module_dict().get(__name__, ()):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # --help shows those alone
    try:
      rest = flags.FLAGS(argv)
    except SystemExit as e:  # absl ends --help, which it answers here, with 1
      raise SystemExit(e.code if _place(e) else 0) from None
    except (KeyError, AttributeError, ValueError, OSError, flags.Error) as e:
      if os.environ.get('GATEDFM_TRACEBACK'):
        raise
      raise SystemExit(f'error: {_explain(e)}') from None
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # orbax and jax tell much that is not for users
    return rest

  app.run(main, flags_parser=parse)


# As ml_collections says it of a flag, and Python of a line in a configuration file.
_UNKNOWN_FIELD = (
  r"Field (?P<field>\S+) not found on dataclass <class '\S+\.(?P<name>\w+)'>",
  r"'(?P<name>\w+)' object has no attribute '(?P<field>\w+)'",
  r"(?P<name>\w+)\.__init__\(\) got an unexpected keyword argument '(?P<field>\w+)'",
)


def _explain(error: Exception) -> str:
  """One line on what a flag or a configuration file asks for that is not there, and where."""
  # ml_collections puts the traceback of its file's TypeErrors and ValueErrors in the message.
  if isinstance(error, OSError):
    return _unread(error)
  flag = re.match(r'flag (--.+): Error whilst parsing config file', str(error))
  if flag:
    error = error.__context__.__context__
  message = str(error.args[0]) if error.args else ''
  place = _place(error)
  for pattern in _UNKNOWN_FIELD:
    found = re.search(pattern, message)
    fields = _fields(found['name']) if found else ()
    if fields:
      what = f'{found["name"]} has no field {found["field"]}; it has {", ".join(fields)}'
      return f'{place or "--config"}: {what}'
  if place:
    return f'{place}: {message if isinstance(error, ValueError) else repr(error)}'
  if flag:
    return f'{flag[1]}: {message}; what follows the colon is the argument of get_config'
  if missing := re.search(r'Flag (--\w+) must have a value other than None', message):
    return f'{missing[1]} is not given (--help shows an example)'
  if isinstance(error, flags.Error):
    return f'{message} (--help shows all flags)'
  if isinstance(error, ValueError):  # ml_collections reads the names of flags as Python
    named = re.match(r"Could not parse '(.+)': ", message)
    return (
      f'--config{f".{named[1]}" if named else ""}: a name that is not a plain word stands in '
      'brackets and quotes: "--config.points[\'a-0.5\'].seed=1"'
    )
  return f'--config: there is no {message!r}'


def _unread(error: OSError) -> str:
  """One line on a configuration file that cannot be read, or that cannot read another."""
  cause = error.__cause__ or error  # ml_collections tells it at the first use of the flag
  if place := _place(cause):
    return f'{place}: {cause}'
  found = re.search(r'\[Errno \d+\] (.+)', str(cause))
  return f'--config: {found[1] if found else cause}'


def _place(error: BaseException) -> str:
  """File and line of the user's own code that raised, '' where none did."""
  libraries = [sysconfig.get_path(name) for name in ('stdlib', 'purelib', 'platlib')]
  others = (Path(__file__).parent, *map(Path, libraries))
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    path = Path(frame.filename)
    if not frame.filename.startswith('<') and not any(map(path.is_relative_to, others)):
      return f'{path}, line {frame.lineno}'
  return ''


def _fields(name: str) -> tuple[str, ...]:
  """Fields of the configuration class of that name; () where there is none."""
  from gatedfm.evaluation import importance_config, sweep, table_config
  from gatedfm.trainers import config, text_config

  modules = sweep, importance_config, table_config, config, text_config
  found = (getattr(module, name, None) for module in modules)
  cls = next(filter(None, found), None)
  return tuple(f.name for f in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


def loaded(config: Any) -> Any:
  """The value of a `--config` flag; raises ConfigError where its file could not be read."""
  from gatedfm.models.speech_config import ConfigError

  try:
    getattr(config, 'name', None)  # what stands for a file that failed to load raises here
  except OSError as e:
    raise ConfigError(_unread(e)) from None
  return config


def no_arguments(argv: list[str]) -> None:
  """Refuses stray arguments, such as a flag without its dashes."""
  if len(argv) > 1:
    raise SystemExit(f'unknown arguments {argv[1:]}; flags start with --, see --help')


def several_hosts() -> bool:
  """Whether the environment says that this process is one of several hosts'."""
  several_tpu_hosts = ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
  return several_tpu_hosts or 'JAX_COORDINATOR_ADDRESS' in os.environ


def folder(value: str) -> Path:
  """The path that a flag gives: no shell expands the `~` of `--workdir=~/runs`."""
  return Path(value).expanduser()


def define_model_parallel() -> Callable[[], Any]:
  """Defines the flag of how devices share a language model; what makes the mesh of it."""
  found = flags.DEFINE_integer(
    'model_parallel', 0, "Devices that share a matrix's columns, others share rows; 0: one has all."
  )
  return lambda: mesh(found.value)


def mesh(model_parallel: int) -> Any:
  """All devices with a model axis of that size; None, the first device alone, for 0.

  Raises:
    ConfigError: a model axis that the number of devices does not allow.
  """
  from gatedfm import partitioning
  from gatedfm.models.speech_config import ConfigError

  if not model_parallel:
    return None
  try:
    return partitioning.make_mesh(data=1, fsdp=-1, model=model_parallel)
  except ValueError as e:
    raise ConfigError(f'--model_parallel={model_parallel}: {e}') from None


def define_search() -> Callable[..., Any]:
  """Defines the flags of how texts are searched for; what reads them as a `decoding.Search`."""
  number, ratio = flags.DEFINE_integer, flags.DEFINE_float
  found = {
    'beam': number('beam', 1, 'Hypotheses of the beam search; 1 decodes greedily.'),
    'length_penalty': ratio('length_penalty', 0.0, 'Added to a score for each token (beam).'),
    'maxlenratio': ratio(
      'maxlenratio', 0.0, 'Most tokens per 40 ms; 0 is one, -20 are 20 however long the audio.'
    ),
    'minlenratio': ratio('minlenratio', 0.0, 'The same of the fewest tokens.'),
  }

  def read(**more: Any) -> Any:
    from gatedfm.execution.decoding import Search

    return Search(**{name: flag.value for name, flag in found.items()}, **more)

  return read


def set_up() -> None:
  """Joins several hosts where there are any, and keeps compiled programs between calls.

  TPU pods are found by themselves; elsewhere `JAX_COORDINATOR_ADDRESS` (host:port of the first),
  `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say where this process belongs.
  """
  import jax

  if several_hosts():
    # Where no cluster manager tells, the environment does.
    given = {'num_processes': 'JAX_NUM_PROCESSES', 'process_id': 'JAX_PROCESS_ID'}
    jax.distributed.initialize(
      **{name: int(os.environ[key]) for name, key in given.items() if key in os.environ}
    )
  cache = os.environ.get('GATEDFM_COMPILED') or Path.home() / '.cache' / 'gatedfm' / 'compiled'
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def json_path(text: str, beside: str = '') -> Path | None:
  """Where numbers go; None where a flag names nothing.

  Args:
    text: the flag `--json`.
    beside: suffix of what is written beside them, if anything is.

  Raises:
    ConfigError: another suffix. OSError: they cannot be written there.
  """
  from gatedfm import atomic
  from gatedfm.models.speech_config import ConfigError

  if not text:
    return None
  path = folder(text)
  if path.suffix != '.json':
    also = f': a {beside} goes beside it' if beside else ''
    raise ConfigError(f'--json={path} must end in .json{also}')
  for target in (path, path.with_suffix(beside or path.suffix)):
    atomic.check(target)
  return path


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
  """Prints a foreseen error as one message without a traceback, and exits with 1.

  `GATEDFM_TRACEBACK=1` shows the traceback.
  """
  from gatedfm.data.types import DataError
  from gatedfm.models.speech_config import ConfigError
  from gatedfm.trainers.checkpoints import CheckpointError
  from gatedfm.trainers.workdirs import WorkdirError

  # A folder that a flag or a variable names and that cannot be made or written to.
  folders = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
  try:
    yield
  except (
    DataError, ConfigError, CheckpointError, WorkdirError, FloatingPointError, *folders
  ) as e:  # fmt: skip
    if os.environ.get('GATEDFM_TRACEBACK'):
      raise
    print(f'error: {e}', file=sys.stderr)
    raise SystemExit(1) from None
