"""The maker of Europarl-ST manifests on a small tree of the corpus' layout."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gatedfm.data import audio_io, europarl_st, manifest
from gatedfm.data.types import DataError


def write_direction(root, source, target, split, segments):
  folder = root / source / target / split
  folder.mkdir(parents=True)
  columns = [f'{speech} {start} {end}' for speech, start, end, _, _ in segments]
  for name, column in (
    ('segments.lst', columns),
    (f'segments.{source}', [segment[3] for segment in segments]),
    (f'segments.{target}', [segment[4] for segment in segments]),
    ('speeches.lst', sorted({segment[0] for segment in segments})),
  ):
    (folder / name).write_text(''.join(f'{x}\n' for x in column), encoding='utf-8')


@pytest.fixture
def root(tmp_path):
  root = tmp_path / 'v1.1'
  one, two, three = ('de.20080924.1', 'de.20080924.2', 'de.20080924.3')
  write_direction(root, 'de', 'en', 'train', [
    (one, '0.50', '1.25', 'Guten Tag!', 'Hello!'),
    (one, '1.25', '2.75', 'Frau Präsidentin!', 'Madam President!'),
  ])  # fmt: skip
  write_direction(root, 'de', 'en', 'dev', [(two, '0.00', '1.00', 'Ja.', 'Yes.')])
  write_direction(root, 'de', 'en', 'test', [(three, '0.00', '1.00', 'Nein.', 'No.')])
  write_direction(root, 'de', 'fr', 'train', [
    (one, '0.50', '1.25', 'Guten Tag!', 'Bonjour !'),
    (one, '1.20', '2.90', 'Frau Präsidentin!', 'Madame la Présidente !'),
    (three, '0.00', '1.00', 'Nein.', 'Non.'),
  ])  # fmt: skip
  write_direction(root, 'de', 'fr', 'dev', [])
  write_direction(root, 'de', 'fr', 'test', [])
  (root / 'de' / 'audios').mkdir()
  for speech in (one, two, three):
    wave = 0.1 * np.sin(np.arange(3 * 16_000) / 6)
    subprocess.run(
      [
        audio_io.ffmpeg(), '-v', 'error', '-f', 's16le', '-ar', '16000', '-ac', '1',
        '-i', '-', str(root / 'de' / 'audios' / f'{speech}.m4a'),
      ],
      input=audio_io.to_int16(wave).tobytes(),
      check=True,
    )  # fmt: skip
  return root


def test_segments_cut_alike_are_one_line_with_all_translations(root):
  lines = list(europarl_st.lines(root, ['de'], ['en', 'fr']))
  both = lines[0]
  assert both['translation'] == {'eng': 'Hello!', 'fra': 'Bonjour !'}
  assert both['task'] == ['asr', 'lid', 'st_eng', 'st_fra']
  assert (both['language'], both['start'], both['end']) == ('deu', 0.5, 1.25)


def test_other_cuts_are_for_translation_alone(root):
  lines = list(europarl_st.lines(root, ['de'], ['en', 'fr']))
  tasks = {line['id']: line['task'] for line in lines}
  assert tasks['de.20080924.1:1.25-2.75'] == ['asr', 'lid', 'st_eng']
  assert tasks['de.20080924.1:1.20-2.90'] == ['st_fra']


def test_a_speech_of_the_test_split_is_in_no_other(root):
  lines = list(europarl_st.lines(root, ['de'], ['fr', 'en']))
  found = [line['split'] for line in lines if line['group'] == 'de.20080924.3']
  assert set(found) == {'test'}
  assert [line['split'] for line in lines if line['group'].endswith('.2')] == ['validation']


def test_command_writes_a_manifest_that_passes_the_check(root, tmp_path):
  out = tmp_path / 'out' / 'europarl.jsonl'
  subprocess.run(
    [
      sys.executable, '-m', 'gatedfm.data.europarl_st', f'--root={root}', f'--out={out}',
      '--sources=de', '--targets=en,fr',
    ],
    check=True,
  )  # fmt: skip
  report = manifest.check(out, tmp_path / 'cache')
  assert not report.problems
  assert len(report.entries) == 5
  source = manifest.load(out, 'train', tmp_path / 'cache')
  assert len(source.audio(0)) == source.records[0].num_samples == 12_000


def test_missing_directions_and_torn_files_are_named(root):
  with pytest.raises(DataError, match='no it/TARGET of en, fr below'):
    list(europarl_st.lines(root, ['it'], ['en', 'fr']))
  (root / 'de/en/dev/segments.en').write_text('a\nb\n')
  with pytest.raises(DataError, match=r'dev differ in .*: segments\.lst 1, .*en 2'):
    list(europarl_st.lines(root, ['de'], ['en']))
  (root / 'de/en/dev/segments.lst').unlink()
  with pytest.raises(DataError, match=r'segments\.lst.*unpacked whole'):
    list(europarl_st.lines(root, ['de'], ['en']))


def test_a_line_ends_at_its_newline_alone(root):
  for name in ('segments.de', 'segments.en'):
    path = root / 'de/en/dev' / name
    path.write_text(path.read_text()[:-1] + '\u2028so\x85on.\r\n', newline='')
  texts = [line['text'] for line in europarl_st.lines(root, ['de'], ['en'])]
  assert 'Ja.\u2028so\x85on.' in texts


def test_lines_are_json(root):
  json.dumps(list(europarl_st.lines(root, ['de'], ['en'])))
