"""`auto` takes what was measured to be faster, says why, and claims nothing elsewhere."""

import json
from pathlib import Path

import pytest

from gatedfm.execution.auto import choose

BENCHMARKS = Path(__file__).parents[2] / 'configs' / 'gated_speech' / 'benchmarks'


@pytest.mark.parametrize(
  ('traffic', 'execution'),
  [
    (('cpu', 1, 0, 0.5), 'skip'),
    (('cpu', 1, 0, 0.05), 'mask'),
    (('cpu', 1, 1, 0.05), 'compact'),
    (('cpu', 8, 4, 0.5), 'bucketed'),
    (('cpu', 8, 4, 0.05), 'mask'),
    (('cpu', 8, 4, 0.5, True), 'skip'),
    (('cpu', 8, 1, 0.5), 'compact'),
    (('gpu', 1, 0, 0.5), 'mask'),
    (('gpu', 1, 1, 0.5), 'compact'),
    (('tpu', 1, 0, 0.0), 'mask'),
  ],
)
def test_choices(traffic, execution):
  choice = choose(*traffic)
  assert choice.execution == execution
  assert str(choice).startswith(f'execution {execution}: ')


def test_impossible_traffic():
  for traffic in (('cpu', 0, 0, 0.5), ('cpu', 1, -1, 0.5), ('cpu', 1, 0, 1.5)):
    with pytest.raises(ValueError, match='no such traffic'):
      choose(*traffic)


@pytest.mark.parametrize('path', sorted(BENCHMARKS.glob('*.json')), ids=lambda p: p.stem)
def test_never_what_was_measured_slower_than_dense(path):
  """Where the published benchmarks have the row that it would choose."""
  result = json.loads(path.read_text())
  for row in result['rows']:
    batch = 8 if ' | ' in row.get('pattern', '') else 1
    choice = choose('cpu', batch, 0, 1 - row['macs_kept'])
    if row['way'] == choice.execution != 'mask':
      assert row['ratio']['median'] < 1.0, (path.stem, row['pruned'])
