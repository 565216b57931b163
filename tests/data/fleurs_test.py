"""The maker of FLEURS manifests on a small tree of the corpus' layout."""

import numpy as np
import pytest
import soundfile

from gatedfm.data import fleurs, manifest
from gatedfm.data.types import DataError

TEXTS = {
  'fr_fr': {'7': 'Bonjour à "tous".', '8': 'Merci.'},
  'cmn_hans_cn': {'7': '大家好。', '9': '谢谢。'},
}


@pytest.fixture
def root(tmp_path):
  for name, sentences in TEXTS.items():
    for split in ('train', 'dev', 'test'):
      folder = tmp_path / name / 'audio' / split
      folder.mkdir(parents=True)
      rows = []
      for i, text in sentences.items():
        soundfile.write(folder / f'{split}{i}.wav', np.full(8000, 0.1), 16_000)
        rows.append('\t'.join([i, f'{split}{i}.wav', text, text.lower(), 'x | y', '8000', 'MALE']))
      (tmp_path / name / f'{split}.tsv').write_text('\n'.join(rows) + '\n', 'utf-8')
  return tmp_path


def test_lines_pass_the_check_with_parallel_translations(root):
  path = root / 'fleurs.jsonl'
  assert manifest.write(path, fleurs.lines(root, list(TEXTS))) == 12
  report = manifest.check(path, root / 'cache')
  assert not report.problems
  records = {entry.record.id: entry for entry in report.entries}
  french = records['fr_fr/dev/dev7.wav']
  assert french.split == 'validation'
  assert french.record.text == 'Bonjour à "tous".'
  assert french.record.translations == {'zho': '大家好。'}
  assert french.record.group == records['cmn_hans_cn/dev/dev7.wav'].record.group
  assert records['fr_fr/test/test8.wav'].record.translations == {}


def test_missing_tables_and_other_columns_are_named(root):
  with pytest.raises(DataError, match=r'es_419/train\.tsv.*unpacked whole'):
    list(fleurs.lines(root, ['es_419']))
  (root / 'fr_fr' / 'test.tsv').write_text('7\ta.wav\ttext\n')
  with pytest.raises(DataError, match=r'test\.tsv line 1 has 3 columns, expected 7'):
    list(fleurs.lines(root, ['fr_fr']))
