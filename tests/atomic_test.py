"""Files are replaced whole, whoever writes them."""

import os
from concurrent import futures

import pytest

from gatedfm import atomic


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
  path = tmp_path / 'a' / 'b.txt'
  atomic.write_text(path, 'one')
  atomic.write_text(path, 'два')
  assert path.read_bytes() == 'два'.encode()
  assert [p.name for p in path.parent.iterdir()] == ['b.txt']


def test_the_mode_follows_the_umask(tmp_path):
  before = os.umask(0o027)
  try:
    atomic.write_text(tmp_path / 'a', '')
  finally:
    os.umask(before)
  assert (tmp_path / 'a').stat().st_mode & 0o777 == 0o640


def test_writers_of_one_process_number_do_not_meet(tmp_path, monkeypatch):
  """As on hosts that share a file system: each has a process 7."""
  monkeypatch.setattr('os.getpid', lambda: 7)
  contents = [bytes([i]) * 1_000_000 for i in range(8)]
  with futures.ThreadPoolExecutor(8) as pool:
    for _ in range(3):
      list(pool.map(lambda content: atomic.write_bytes(tmp_path / 'a', content), contents))
      assert (tmp_path / 'a').read_bytes() in contents
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
  atomic.write_text(tmp_path / 'a', 'old')

  def refuse(*_):
    raise OSError('disk full')

  monkeypatch.setattr('os.replace', refuse)
  with pytest.raises(OSError, match='disk full'):
    atomic.write_text(tmp_path / 'a', 'new')
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('a', 'old')]


def test_what_cannot_be_written_is_told_beforehand(tmp_path):
  atomic.check(tmp_path / 'a' / 'b.txt')
  assert [p.name for p in tmp_path.rglob('*')] == ['a']
  with pytest.raises(IsADirectoryError, match='a is a folder; name a file'):
    atomic.check(tmp_path / 'a')
  (tmp_path / 'file').touch()
  with pytest.raises(FileExistsError):
    atomic.check(tmp_path / 'file' / 'b.txt')
