"""Files replaced in one step: readers see the old one or the new one, never a half.

Writers may be many: threads, processes, and hosts that share a file system. One that is killed
leaves a folder `.NAME.*` beside the file, which the next cannot clear away: it may be that of a
writer still at work.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Yields where to write what then replaces a file whole; folders are made where missing.

  Args:
    path: of the file; its mode follows the umask, as that of any new file.

  Raises:
    OSError: it cannot be written. Whatever is raised: what stood there stands.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # A folder of its own: no other writer's name, and the file inside has an ordinary mode.
  with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
    temporary = Path(folder) / path.name
    yield temporary
    os.replace(temporary, path)


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file whole; folders are made where missing.

  Args:
    path, and what is raised: as of `replacing`.
    content: all of it.
  """
  with replacing(path) as temporary:
    temporary.write_bytes(content)


def check(path: Path) -> None:
  """Tells before long work whether a file can be written there; folders are made where missing.

  Raises:
    OSError: it cannot.
  """
  if path.is_dir():
    raise IsADirectoryError(f'{path} is a folder; name a file')
  path.parent.mkdir(parents=True, exist_ok=True)
  tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent).cleanup()


def write_text(path: Path, content: str) -> None:
  """Writes a text file whole, as UTF-8; see `write_bytes`."""
  write_bytes(path, content.encode('utf-8'))
