"""A tiny language model on disk, texts and questions of one's own."""

import json

import pytest
import tiny_lm


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return tiny_lm.saved(tmp_path_factory.mktemp('lm') / 'dense')


@pytest.fixture(scope='module')
def own(tmp_path_factory):
  """A text, and questions of which each split has some."""
  folder = tmp_path_factory.mktemp('texts')
  (folder / 'a.txt').write_text(' '.join(f'w{i % 21}' for i in range(80)))
  rows = [
    {
      'context': f'w{i} w{i + 1}',
      'choices': ['w1', 'w2 w3'],
      'answer': i % 2,
      'split': 'train' if i < 6 else 'test',
    }
    for i in range(12)
  ]
  (folder / 'b.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return str(folder / 'a.txt'), str(folder / 'b.jsonl')
