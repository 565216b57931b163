"""Lines of JSON, torn ones left out."""

from gatedfm import json_lines


def test_torn_lines_are_skipped_wherever_they_stand(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    '{"step": 1, "note": "a\u2028b"}\n'
    '{"step": 2, "train/l{"step": 2, "train/loss": 2.0}\n'
    '7\n'
    '{"step": 3}\n'
    '{"step": 4, "tra',
    encoding='utf-8',
  )
  assert json_lines.read(path) == [{'step': 1, 'note': 'a\u2028b'}, {'step': 3}]


def test_a_missing_file_has_no_lines(tmp_path):
  assert json_lines.read(tmp_path / 'metrics.jsonl') == []
