"""Debian packages with pinned version and SHA-256, fetched into a cache; needs no root.

The data keep their own licences and are never part of this repository.
"""

import dataclasses
import hashlib
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

from gatedfm.data.types import DataError


class FetchError(DataError):
  """A package could not be fetched; the message names it and the mend."""


@dataclasses.dataclass(frozen=True)
class DebianPackage:
  """A package of Debian, pinned.

  Attributes:
    name: binary package.
    version: the pinned version.
    sha256: of the .deb file, in hexadecimal.
    megabytes: size, for the message.
  """

  name: str
  version: str
  sha256: str
  megabytes: int

  @property
  def file_name(self) -> str:
    return f'{self.name}_{self.version}_all.deb'


def has_apt() -> bool:
  """Whether packages can be fetched here."""
  return shutil.which('apt-get') is not None


def sha256(path: Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def fetch(package: DebianPackage, downloads: Path) -> Path:
  """Brings a package into `downloads`, unless it is there.

  The pinned version is asked for first. A distribution that carries another version gives
  that one with a warning: the data may differ, hence the numbers too.

  Args:
    package: what to fetch.
    downloads: the cache folder, made where missing.

  Returns:
    The path of the .deb file.

  Raises:
    FetchError: no apt-get, package not known to it, or a file with a wrong checksum.
  """
  target = downloads / package.file_name
  if target.exists() and sha256(target) == package.sha256:
    return target
  others = sorted(downloads.glob(f'{package.name}_*.deb'))
  others = [path for path in others if path != target]
  if others:
    return _other_version(package, others[-1])

  if not has_apt():
    raise FetchError(
      f'cannot fetch {package.name} {package.version}: apt-get is not'
      f' installed here. Put {package.file_name} (a package of Debian) into'
      f" {downloads}, or use the source 'espeak', which needs no download"
    )
  downloads.mkdir(parents=True, exist_ok=True)
  print(
    f'fetching {package.name} {package.version} ({package.megabytes} MB) with apt-get',
    flush=True,
  )
  with tempfile.TemporaryDirectory(dir=downloads) as folder:
    found = _apt_download(package, Path(folder))
    if found.name != package.file_name:
      found = found.rename(downloads / found.name)
      return _other_version(package, found)
    digest = sha256(found)
    if digest != package.sha256:
      raise FetchError(
        f'{package.file_name} has SHA-256 {digest}, expected {package.sha256}: the archive'
        ' that apt-get uses is damaged or altered; try another mirror'
      )
    os.replace(found, target)
  return target


def unpack(deb: Path, folder: Path) -> None:
  """Unpacks the files of a .deb into `folder`: with dpkg-deb, where that is missing without.

  Raises:
    FetchError: a damaged package, or one packed with what only dpkg-deb reads.
  """
  if shutil.which('dpkg-deb'):
    command = ['dpkg-deb', '-x', str(deb), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
      raise FetchError(f'dpkg-deb cannot unpack {deb}: {result.stderr.strip()}; delete it')
    return
  try:
    with open(deb, 'rb') as file:
      name = _seek_files(file)
      if name.endswith('.zst') and 'zst' not in tarfile.TarFile.OPEN_METH:
        raise FetchError(f'{deb} is packed with zstd: install dpkg-deb, or use Python 3.14')
      with tarfile.open(fileobj=file, mode='r|*') as archive:
        archive.extractall(folder, filter='data')
  except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
    raise FetchError(f'cannot unpack {deb}: {error}; delete it') from error


def _seek_files(file: BinaryIO) -> str:
  """Goes to the archive of files in a .deb, an `ar` container; returns the archive's name."""
  if file.read(8) != b'!<arch>\n':
    raise tarfile.ReadError('it is not a package of Debian')
  while len(header := file.read(60)) == 60 and header[48:58].strip().isdigit():
    name, size = header[:16].decode('ascii', 'replace').rstrip(' /'), int(header[48:58])
    if name.startswith('data.tar'):
      return name
    file.seek(size + size % 2, os.SEEK_CUR)  # members start at even offsets
  raise tarfile.ReadError('it holds no data.tar')


def _other_version(package: DebianPackage, path: Path) -> Path:
  warnings.warn(
    f'using {path.name}, not the pinned {package.file_name}: the data may differ from those'
    ' of published numbers',
    stacklevel=3,
  )
  return path


def _apt_download(package: DebianPackage, folder: Path) -> Path:
  """Runs apt-get download; after a failure refreshes the lists once where it may."""

  errors = []

  def download(*names: str) -> bool:
    for name in names:
      result = subprocess.run(
        ['apt-get', 'download', name], cwd=folder, capture_output=True, text=True
      )
      if not result.returncode:
        return True
      errors.append(result.stderr.strip())
    return False

  names = (f'{package.name}={package.version}', package.name)
  found = download(*names)
  if not found and os.geteuid() == 0:
    subprocess.run(['apt-get', 'update'], capture_output=True)
    found = download(*names)
  if not found:
    raise FetchError(
      f'apt-get cannot download {package.name} {package.version}: run `apt-get update` as'
      f' root and try again, or put {package.file_name} (a package of Debian)'
      f' into {folder.parent}. apt-get said: {errors[-1]}'
    )
  return next(folder.glob(f'{package.name}_*.deb'))
