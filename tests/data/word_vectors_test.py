"""Word vectors come back from text and .npy as they were; bad lines are named."""

import gzip

import numpy as np
import pytest

from gatedfm.data import word_vectors
from gatedfm.data.types import DataError
from gatedfm.data.word_vectors import WordVectors

WORDS = ['the', 'a\u2028b', 'c\rd', 'été', '12']
TABLE = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def test_text_comes_back(tmp_path):
  path = tmp_path / 'v.txt'
  word_vectors.write(path, WordVectors(WORDS, TABLE))
  found = word_vectors.read(str(path))
  assert found.words == WORDS
  np.testing.assert_allclose(found.table, TABLE, rtol=1e-5)
  packed = tmp_path / 'v.vec.gz'
  packed.write_bytes(gzip.compress(b'5 3\n' + path.read_bytes() + b'the 0 0 0\n'))
  again = word_vectors.read(str(packed))
  assert again.words == WORDS
  np.testing.assert_array_equal(again.table, found.table)


def test_arrays_with_words_beside_them(tmp_path):
  np.save(tmp_path / 'v.npy', TABLE)
  (tmp_path / 'v.txt').write_bytes('\n'.join(WORDS).encode())
  found = word_vectors.read(str(tmp_path / 'v.npy'))
  assert found.words == WORDS
  rows, there = found.rows(['été', 'none', 'the'])
  np.testing.assert_array_equal(rows, [TABLE[3], np.zeros(3), TABLE[0]])
  assert there.tolist() == [True, False, True]
  (tmp_path / 'v.txt').write_text('one\n')
  with pytest.raises(DataError, match=r'shape \(5, 3\), v.txt 1 words'):
    word_vectors.read(str(tmp_path / 'v.npy'))


def test_published_ones_are_read_as_prepared(tmp_path):
  folder = tmp_path / 'word_vectors'
  folder.mkdir()
  np.save(folder / 'glove-50.npy', TABLE)
  (folder / 'glove-50.txt').write_bytes('\n'.join(WORDS).encode())
  np.testing.assert_array_equal(word_vectors.read('glove-50', tmp_path).table, TABLE)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('a 1 2\nb 1\n', 'line 2: a word and 2 numbers'),
    ('a 1 2\nb 1 x\n', 'line 2'),
    ('a 1 2\nb 1 nan\n', 'line 2'),
    ('\n', 'no word vectors'),
    ('word\n', 'line 1: a word and its numbers'),
  ],
)
def test_bad_lines_are_named(text, message, tmp_path):
  (tmp_path / 'v.txt').write_text(text)
  with pytest.raises(DataError, match=message):
    word_vectors.read(str(tmp_path / 'v.txt'))


def test_files_that_are_none(tmp_path):
  (tmp_path / 'v.gz').write_bytes(b'no gzip')
  with pytest.raises(DataError, match='cannot be read'):
    word_vectors.read(str(tmp_path / 'v.gz'))
  with pytest.raises(DataError, match='one of glove-50'):
    word_vectors.read('glove')


def test_words_with_spaces_and_lines_of_windows(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('the 1 2\n. . . 3 4\n')
  found = word_vectors.read(str(path))
  assert list(found.words) == ['the', '. . .']
  np.testing.assert_array_equal(found.table, [[1, 2], [3, 4]])
  np.save(tmp_path / 'b.npy', np.arange(6, dtype=np.float32).reshape(3, 2))
  (tmp_path / 'b.txt').write_bytes(b'one\r\ntwo\r\none\r\n')
  table, there = word_vectors.read(str(tmp_path / 'b.npy')).rows(['two', 'one', 'three'])
  np.testing.assert_array_equal(there, [True, True, False])
  np.testing.assert_array_equal(table, [[2, 3], [0, 1], [0, 0]])  # the first of several


@pytest.mark.parametrize('name', ['v', 'v.npy', 'v.gz'])
def test_vectors_that_could_not_be_read_again_are_not_written(name, tmp_path):
  with pytest.raises(DataError, match='name it .txt or .vec'):
    word_vectors.write(tmp_path / name, WordVectors(WORDS, TABLE))
  assert not list(tmp_path.iterdir())
  (tmp_path / 'a.txt').mkdir()
  with pytest.raises(IsADirectoryError, match='name a file'):
    word_vectors.check(tmp_path / 'a.txt')
