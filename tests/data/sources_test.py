"""Sources by name, and packages by apt-get (a stand-in for it)."""

import hashlib
import io
import json
import shutil
import stat
import tarfile

import numpy as np
import pytest
import soundfile

from gatedfm.data import espeak, fetch, progress, sources, stamps
from gatedfm.data.types import DataError


@pytest.mark.parametrize('spec', ['stamp', '', 'espeak:stamp', 'manifest', 'manifest:'])
def test_unknown_sources_list_the_known(spec, tmp_path):
  with pytest.raises(DataError, match='unknown source') as error:
    sources.load(spec, 'train', tmp_path)
  assert all(name in str(error.value) for name in sources.KNOWN)


def test_options_are_checked(tmp_path):
  with pytest.raises(DataError, match=r"unknown option 'voice' .* languages, voices, seed"):
    sources.load('espeak?voice=2', 'train', tmp_path)
  with pytest.raises(DataError, match="bad option 'voices'"):
    sources.load('espeak?voices=two', 'train', tmp_path)
  with pytest.raises(DataError, match='known are: none'):
    sources.load('stamps?voices=2', 'train', tmp_path)
  with pytest.raises(DataError, match="bad option 'languages' .* 'fr_FR': write 'fra'"):
    sources.load('espeak?languages=spa,fr_FR', 'train', tmp_path)
  assert sources.parse('espeak?languages=spa,fr')[1] == {'languages': ('spa', 'fra')}


@pytest.mark.parametrize('language', ['ach', 'xyz'])  # with a short code, and without
def test_languages_without_names_are_named(language, tmp_path):
  with pytest.raises(DataError, match=f"no names in '{language}'"):
    sources.load(f'espeak?languages={language}', 'train', tmp_path)


@pytest.mark.parametrize('spec', ['stamps', 'espeak', 'asterisk', 'espeak:stamps'])
def test_unknown_split_is_refused_before_any_download(spec, tmp_path, monkeypatch):
  refuse = lambda *args: pytest.fail('fetched')
  monkeypatch.setattr(fetch, 'fetch', refuse)
  with pytest.raises(DataError, match="unknown split 'dev'"):
    sources.load(spec, 'dev', tmp_path)


@pytest.mark.parametrize(('apt', 'expected'), [(True, 'stamps'), (False, 'espeak')])
def test_auto_prefers_human_speech(apt, expected, tmp_path, monkeypatch):
  monkeypatch.setattr(fetch, 'has_apt', lambda: apt)
  monkeypatch.setattr(stamps, 'prepare', lambda data_dir: data_dir)
  monkeypatch.setattr(stamps, 'Stamps', lambda folder, split: 'stamps')
  monkeypatch.setattr(espeak, 'load', lambda *args: 'espeak')
  assert sources.load('auto', 'train', tmp_path) == expected
  assert sources.resolve('auto', tmp_path) == expected
  assert sources.resolve('asterisk?max_items=3', tmp_path) == 'asterisk?max_items=3'


def test_auto_takes_stamps_that_are_prepared(tmp_path, monkeypatch):
  monkeypatch.setattr(fetch, 'has_apt', lambda: False)
  stamps.folder(tmp_path).mkdir(parents=True)
  assert sources.resolve('auto', tmp_path) == 'stamps'


def test_manifest_by_path_with_options(tmp_path):
  soundfile.write(tmp_path / 'a.wav', np.full(36_000, 0.1), 16_000)
  lines = [{'audio': 'a.wav', 'language': code, 'split': 'train'} for code in ('fra', 'deu')]
  path = tmp_path / 'my data.jsonl'
  path.write_text('\n'.join(map(json.dumps, [*lines, lines[0]])), encoding='utf-8')
  source = sources.load(f'manifest:{path}', 'train', tmp_path)
  assert [r.language for r in source.records] == ['fra', 'deu', 'fra']
  with pytest.raises(DataError, match='at most 2 are allowed'):
    sources.load(f'manifest:{path}?max_seconds=2', 'train', tmp_path)
  with pytest.raises(DataError, match='no good line'):
    sources.load(f'manifest:{path}?max_seconds=2', 'train', tmp_path, skip_bad=True)


def test_where_data_is_prepared(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('GATEDFM_DATA', raising=False)
  assert sources.data_folder() == tmp_path / '.cache' / 'gatedfm'
  monkeypatch.setenv('GATEDFM_DATA', '/data')
  assert str(sources.data_folder()) == '/data'
  assert sources.data_folder('~/mine') == tmp_path / 'mine'


CONTENT = b'a package'
PACKAGE = fetch.DebianPackage('data', '1.0-1', hashlib.sha256(CONTENT).hexdigest(), megabytes=1)


@pytest.fixture
def apt(tmp_path, monkeypatch):
  """Puts a script in the place of apt-get; it logs its calls beside itself."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  monkeypatch.setenv('PATH', f'{folder}:/usr/bin:/bin')

  def install(body):
    script = folder / 'apt-get'
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/log\n{body}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder / 'log'

  return install


def test_package_is_fetched_once(apt, tmp_path):
  log = apt('printf "a package" > data_1.0-1_all.deb')
  for _ in range(2):
    found = fetch.fetch(PACKAGE, tmp_path / 'downloads')
    assert found.read_bytes() == CONTENT
  assert log.read_text() == 'download data=1.0-1\n'
  assert [path.name for path in (tmp_path / 'downloads').iterdir()] == [PACKAGE.file_name]


def test_damaged_package_is_refused_and_not_kept(apt, tmp_path):
  apt('printf "another" > data_1.0-1_all.deb')
  with pytest.raises(fetch.FetchError, match=r'data_1\.0-1_all\.deb has SHA-256'):
    fetch.fetch(PACKAGE, tmp_path / 'downloads')
  assert not list((tmp_path / 'downloads').iterdir())


def test_damaged_file_in_the_cache_is_fetched_anew(apt, tmp_path):
  apt('printf "a package" > data_1.0-1_all.deb')
  (tmp_path / PACKAGE.file_name).write_bytes(b'half')
  assert fetch.fetch(PACKAGE, tmp_path).read_bytes() == CONTENT


def test_other_version_is_taken_with_a_warning(apt, tmp_path):
  apt('[ "$2" = data ] && printf "newer" > data_2.0_all.deb')
  for _ in range(2):
    with pytest.warns(UserWarning, match=r'data_2\.0_all\.deb, not the pinned'):
      assert fetch.fetch(PACKAGE, tmp_path / 'downloads').name == 'data_2.0_all.deb'


def test_unknown_package_says_what_to_do(apt, tmp_path, monkeypatch):
  apt('echo "E: Unable to locate package data" >&2; exit 100')
  monkeypatch.setattr('os.geteuid', lambda: 1000)
  with pytest.raises(fetch.FetchError, match=r'apt-get update.*Unable to locate'):
    fetch.fetch(PACKAGE, tmp_path / 'downloads')


def test_root_refreshes_the_lists_by_itself(apt, tmp_path, monkeypatch):
  log = apt(
    'case "$1" in update) touch /dev/null; : > "$0.lists";; esac\n'
    '[ -f "$0.lists" ] || exit 100\n'
    '[ "$1" = download ] && printf "a package" > data_1.0-1_all.deb; exit 0'
  )
  monkeypatch.setattr('os.geteuid', lambda: 0)
  assert fetch.fetch(PACKAGE, tmp_path / 'downloads').read_bytes() == CONTENT
  assert 'update' in log.read_text().splitlines()


def test_without_apt_the_package_and_the_way_out_are_named(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(fetch.FetchError, match=r"data 1\.0-1: .*package of Debian.*'espeak'"):
    fetch.fetch(PACKAGE, tmp_path / 'downloads')


def write_deb(path, mode='xz', suffix=None):
  """A package of one file, `usr/a.txt`."""
  members = [('debian-binary', b'2.0\n')]
  for name, inside, content in (('control', 'control', b'Package: data\n'), ('data', *FILE)):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f'w:{mode}') as archive:
      info = tarfile.TarInfo(f'./{inside}')
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
    members.append((f'{name}.tar.{suffix or mode}', buffer.getvalue()))
  with open(path, 'wb') as file:
    file.write(b'!<arch>\n')
    for name, content in members:
      file.write(f'{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n'.encode())
      file.write(content + b'\n' * (len(content) % 2))
  return path


FILE = ('usr/a.txt', b'content')


@pytest.fixture(params=['Python', *filter(shutil.which, ['dpkg-deb'])])
def unpacker(request, tmp_path, monkeypatch):
  """The ways to unpack here: our own everywhere, and dpkg-deb's on Debian."""
  if request.param == 'Python':
    monkeypatch.setenv('PATH', str(tmp_path / 'nothing'))
  return request.param


@pytest.mark.parametrize('mode', ['xz', 'gz'])
def test_packages_are_unpacked_with_and_without_dpkg(mode, unpacker, tmp_path):
  fetch.unpack(write_deb(tmp_path / 'data.deb', mode), tmp_path / 'files')
  assert (tmp_path / 'files' / FILE[0]).read_bytes() == FILE[1]


@pytest.mark.parametrize('damage', [lambda x: b'text', lambda x: x[:100], lambda x: x[:-90]])
def test_a_damaged_package_is_named(damage, unpacker, tmp_path):
  path = write_deb(tmp_path / 'data.deb')
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(fetch.FetchError, match=rf'(?s)cannot unpack {path}: .*; delete it'):
    fetch.unpack(path, tmp_path / 'files')


def test_a_package_that_only_dpkg_reads_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.delitem(tarfile.TarFile.OPEN_METH, 'zst', raising=False)  # newer Pythons read it
  path = write_deb(tmp_path / 'data.deb', suffix='zst')
  with pytest.raises(fetch.FetchError, match='zstd: install dpkg-deb'):
    fetch.unpack(path, tmp_path / 'files')


def test_progress_reports_rate_and_eta(monkeypatch):
  clock = iter(range(0, 1000, 3))
  monkeypatch.setattr('time.monotonic', lambda: next(clock))
  stream = io.StringIO()
  assert list(progress.track('abcdef', 6, 'reading', 'letters', stream)) == list('abcdef')
  lines = stream.getvalue().splitlines()
  assert lines[0] == 'reading: 2/6 letters 33% | 0.3/s | ETA 12 s'
  assert lines[-1].startswith('reading: 6 letters in ')
