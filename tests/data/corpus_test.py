"""Splits: what is said of them, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny_run

from gatedfm.data import corpus
from gatedfm.data.types import DataError


@pytest.fixture(scope='module')
def opened(tone_data):
  """Configuration and assets of the tones."""
  cfg = tiny_run.dense(tone_data)
  return cfg, tiny_run.make_assets(cfg)


def open_split(opened, split='train', **changes):
  cfg, assets = opened
  said = []
  data = dataclasses.replace(cfg.data, **changes)
  corpus.open_split(data, assets, split, Path(cfg.data_dir), say=said.append)
  return said


def test_examples_are_counted_by_task(opened):
  (said,) = open_split(opened)
  assert 'train: 72 examples (24 asr, 24 lid, 24 st_eng) of 24 utterances, batch shapes (' in said


def test_what_is_left_out_is_counted_by_reason(opened):
  _, said = open_split(opened, max_frames=60)
  number, rest = said.removeprefix('data: train: left out: ').split(' ', 1)
  assert 0 < int(number) < 24
  assert rest.startswith('too many frames, limit 60 (such as train/')


def test_a_task_that_nothing_trains_is_refused(opened, tone_data, tmp_path):
  """Left to itself, it would be missed only where the model is used."""
  lines = (tone_data / 'manifest.jsonl').read_text(encoding='utf-8').splitlines()
  rows = [{k: v for k, v in json.loads(x).items() if k != 'translation'} for x in lines]
  (tmp_path / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for wav in tone_data.glob('*.wav'):
    shutil.copy(wav, tmp_path)
  sources = (f'manifest:{tmp_path}/manifest.jsonl',)
  with pytest.raises(DataError, match='no training utterance serves st_eng .*drop st_eng from'):
    open_split(opened, sources=sources)
  (said,) = open_split(opened, 'validation', sources=sources)
  assert '(6 asr, 6 lid, 0 st_eng)' in said
