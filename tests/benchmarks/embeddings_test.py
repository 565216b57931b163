"""What is timed of tables is what it says: sizes, and steps that train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedfm.benchmarks import embeddings
from gatedfm.benchmarks.embeddings import Case
from gatedfm.models.speech_config import ConfigError

CASE = Case(rows=500, features=12, compression=0.7, batch=4, length=5, units=8, rounds=2)


def test_rows():
  lines = []
  rows = {row['way']: row for row in embeddings.run(CASE, lines.append)}
  assert list(rows) == ['dense', 'factorized', 'int8', 'int8 factors', 'folded']
  rank = int(0.3 * 500 * 12 / 512)
  assert rows['dense']['bytes'] == 4 * 500 * 12
  assert rows['factorized']['parameters'] == rank * 512
  assert rows['int8']['bytes'] == 500 * (12 + 2)
  assert rows['int8 factors']['bytes'] == 500 * (rank + 2) + 4 * rank * 12
  assert rows['folded']['bytes'] == 4 * 500 * rank
  for row in rows.values():
    # The file has a head that names what is in it.
    assert 0 < row['disk_bytes'] - row['bytes'] < 600
    for kind in ('lookup', 'read', 'step'):
      assert row[kind]['seconds']['median'] > 0
  assert rows['dense']['step']['over_dense']['median'] == 1
  assert rows['dense']['training_bytes'] == 4 * rows['dense']['bytes']
  assert rows['int8']['training_bytes'] == rows['int8']['bytes']
  assert any(line.startswith('factorized') and 'goal 1.1' in line for line in lines)


def test_steps_train():
  ways = embeddings._ways(CASE)
  ids, labels = jnp.zeros((4, 5), jnp.int32), jnp.zeros(4, jnp.int32)
  call = embeddings._step(CASE, ways['factorized'], ids, labels)
  first = jax.tree.map(np.array, call()[0])
  second = jax.tree.map(np.array, call()[0])
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, second)
  assert moved[0]['projection'] > 0
  # Of the table only what was looked up, which is the first row.
  rows = np.abs(first[0]['embedding'] - second[0]['embedding']).max(1)
  assert rows[0] > 0
  assert (rows[1:] == 0).all()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [({'rows': 0}, 'rows is 0'), ({'compression': 0.99}, 'leaves no rank'), ({'seed': -1}, 'seed')],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    Case(**({'rows': 500, 'features': 12} | changes)).validate()
