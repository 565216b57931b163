"""Stores of records and audio: whole or not there, whoever writes them."""

import numpy as np
import pytest

from gatedfm.data import store
from gatedfm.data.types import Record


def items(language, number):
  for i in range(number):
    record = Record(f'{i}', 'test', language, None, {}, 0, f'{i}')
    yield record, np.full(10 + i, i, np.int16)


def test_a_store_keeps_records_and_audio(tmp_path):
  store.write(tmp_path / 'store', items('fra', 3))
  source = store.StoredSource('test', tmp_path / 'store')
  assert [record.num_samples for record in source.records] == [10, 11, 12]
  np.testing.assert_array_equal(source.audio(2), np.full(12, 2))


def test_the_store_of_a_faster_process_stands(tmp_path):
  folder = tmp_path / 'store'

  def overtaken():
    yield from items('spa', 3)
    store.write(folder, items('fra', 2))

  store.write(folder, overtaken())
  source = store.StoredSource('test', folder)
  assert [record.language for record in source.records] == ['fra', 'fra']
  assert [path.name for path in tmp_path.iterdir()] == ['store']


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_a_store_that_fails(tmp_path, error):
  def failing():
    yield from items('fra', 2)
    raise error

  with pytest.raises(error):
    store.write(tmp_path / 'store', failing())
  assert not list(tmp_path.iterdir())
