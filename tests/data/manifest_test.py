"""Manifests: every kind of bad line, splits, and reading."""

import json
import logging
import pickle

import numpy as np
import pytest
import soundfile

from gatedfm.data import audio_io, manifest
from gatedfm.data.types import SPLITS, DataError


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  audio = 0.1 * rng.standard_normal(22_050)
  for name in ('a.wav', 'b.wav', 'c.flac'):
    soundfile.write(tmp_path / name, audio, 22_050)
  soundfile.write(tmp_path / 'long.wav', np.zeros(31 * 8000), 8000)
  soundfile.write(tmp_path / 'short.wav', np.zeros(400), 8000)
  (tmp_path / 'empty.wav').touch()
  (tmp_path / 'text.wav').write_text('no audio')
  content = (tmp_path / 'c.flac').read_bytes()
  (tmp_path / 'cut.flac').write_bytes(content[: len(content) // 2])
  return tmp_path


GOOD = {'audio': 'a.wav', 'language': 'fra', 'text': 'Une grenouille.'}


def write(folder, *lines):
  path = folder / 'data.jsonl'
  text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  path.write_text('\n'.join(text) + '\n', encoding='utf-8')
  return path


BAD = [
  ('{"audio": ', 'bad JSON'),
  (GOOD | {'text': '\ud83d'}, 'surrogates not allowed'),
  ('[1, 2]', 'not a JSON object'),
  (GOOD | {'texts': 'x'}, "unknown field 'texts': did you mean 'text'?"),
  (GOOD | {'colour': 'x'}, "unknown field 'colour': known are audio, language, text"),
  ({'language': 'fra'}, "missing field 'audio'"),
  ({'audio': 'a.wav'}, "missing field 'language'"),
  (GOOD | {'text': 5}, "'text' should be a string, not 5"),
  (GOOD | {'language': 'fr_FR'}, "bad language code 'fr_FR': write 'fra'"),
  (GOOD | {'language': 'xx'}, "bad language code 'xx': write it as in 'fr' or 'fra'"),
  (GOOD | {'language': 'French'}, "bad language code 'French'"),
  (GOOD | {'language': 7}, 'bad language code 7'),
  (GOOD | {'translation': {'en_GB': 'A frog.'}}, "write 'eng'"),
  (GOOD | {'translation': {'en': 'A', 'eng': 'B'}}, 'has a language twice: en, eng'),
  (GOOD | {'translation': 'A frog.'}, "add 'translation_language'"),
  (GOOD | {'translation': {'eng': 1}}, 'should map languages to texts'),
  (GOOD | {'text': 'x' * 1001}, 'text of 1001 characters, at most 1000'),
  (GOOD | {'translation': {'eng': 'x' * 1001}}, 'text of 1001 characters'),
  (GOOD | {'task': 'tts'}, "unknown task 'tts'"),
  (GOOD | {'task': ['asr', 3]}, 'unknown task 3'),
  (GOOD | {'task': 5}, 'unknown task 5'),
  (GOOD | {'text': ''}, 'empty text: leave it out'),
  (GOOD | {'text': ' ', 'task': 'lid'}, 'empty text'),
  (GOOD | {'translation': {'eng': ' '}}, 'empty translation into eng'),
  (GOOD | {'text': None, 'task': 'asr'}, "missing field 'text', which the task 'asr'"),
  (GOOD | {'task': 'st_eng'}, "missing translation into 'eng'"),
  (GOOD | {'split': 'training'}, "unknown split 'training': one of train, validation"),
  (GOOD | {'split': ['train']}, 'unknown split'),
  (GOOD | {'start': 'x'}, "'start' should be seconds, not 'x'"),
  (GOOD | {'start': -1}, "'start' should be seconds"),
  (GOOD | {'start': True}, "'start' should be seconds"),
  (GOOD | {'start': float('nan')}, "'start' should be seconds, not nan"),
  (GOOD | {'end': float('nan')}, "'end' should be seconds, not nan"),
  (GOOD | {'end': float('inf')}, "'end' should be seconds, not inf"),
  (GOOD | {'end': 10**400}, "'end' should be seconds, not 1000"),
  (GOOD | {'end': 3}, "'end' is 3 s but"),
  (GOOD | {'start': 0.5, 'end': 0.55}, 'too short: 0.05 s'),
  (GOOD | {'audio': 'gone.wav'}, 'missing file'),
  (GOOD | {'audio': 'a\0.wav'}, 'missing file'),
  (GOOD | {'audio': 'empty.wav'}, 'empty file'),
  (GOOD | {'audio': 'text.wav'}, 'undecodable audio'),
  (GOOD | {'audio': 'cut.flac'}, 'truncated'),
  (GOOD | {'audio': 'short.wav'}, 'too short: 0.05 s'),
  (GOOD | {'audio': 'long.wav'}, 'too long: 31.0 s, at most 30'),
]


@pytest.mark.parametrize(('line', 'reason'), BAD)
def test_each_badness_is_reported_with_its_line(folder, line, reason):
  report = manifest.check(write(folder, GOOD, line), folder / 'cache')
  assert len(report.entries) == 1
  ((number, found),) = report.problems
  assert number == 2
  assert reason in found


def test_all_bad_lines_are_told_before_anything_else(folder):
  path = write(folder, *[line for line, _ in BAD])
  with pytest.raises(manifest.ManifestError) as error:
    manifest.load(path, 'train', folder / 'cache')
  message = str(error.value)
  assert f'{len(BAD)} bad of {len(BAD)} lines' in message
  assert 'line 20:' in message
  assert 'line 21:' not in message
  assert f'and {len(BAD) - 20} more' in message
  assert 'skip them with --config.skip_bad' in message


def test_skip_bad_goes_on_with_the_good_lines_and_logs_the_others_once(folder, caplog):
  path = write(folder, *[GOOD | {'split': s} for s in ('train', 'test')], GOOD | {'audio': 'no'})
  with caplog.at_level(logging.WARNING):
    for number, split in enumerate(('train', 'test'), start=1):
      source = manifest.load(path, split, folder / 'cache', skip_bad=True)
      assert [record.id for record in source.records] == [f'line {number}']
  (message,) = caplog.messages
  assert 'line 3: missing file' in message


def test_duplicate_ids_are_bad(folder):
  path = write(folder, GOOD | {'id': 'x'}, GOOD | {'id': 'y'}, GOOD | {'id': 'x'})
  report = manifest.check(path, folder / 'cache')
  assert report.problems == [(3, "id 'x' is also that of line 1")]


def test_an_id_may_look_like_a_line_number(folder):
  path = write(folder, GOOD | {'id': '3'}, GOOD, GOOD)
  report = manifest.check(path, folder / 'cache')
  assert not report.problems
  assert [entry.record.id for entry in report.entries] == ['3', 'line 2', 'line 3']
  path = write(folder, GOOD | {'id': 'line 2'}, GOOD)
  report = manifest.check(path, folder / 'cache')
  assert report.problems == [(2, "id 'line 2' is also that of line 1")]


@pytest.mark.parametrize('content', ['', '\n\n'])
def test_empty_and_missing_manifests(folder, content):
  (folder / 'data.jsonl').write_text(content)
  with pytest.raises(manifest.ManifestError, match='is empty'):
    manifest.check(folder / 'data.jsonl', folder)
  message = r'cannot read [^:]*nowhere\.jsonl: No such [^:]*$'
  with pytest.raises(manifest.ManifestError, match=message):
    manifest.check(folder / 'nowhere.jsonl', folder)


def test_fields_arrive_in_the_records(folder):
  line = GOOD | {
    'id': 'frog', 'speaker': 'ann', 'group': 'g', 'split': 'dev', 'start': 0.25,
    'end': 0.75, 'task': ['asr', 'st_eng'], 'translation': 'A frog.',
    'translation_language': 'eng',
  }  # fmt: skip
  source = manifest.load(write(folder, line), 'validation', folder / 'cache')
  (record,) = source.records
  assert (record.id, record.speaker, record.language) == ('frog', 'ann', 'fra')
  assert record.translations == {'eng': 'A frog.'}
  assert record.tasks == ('asr', 'st_eng')
  assert record.num_samples == 8000
  whole = audio_io.load(folder / 'a.wav', 0.25, 0.75)
  np.testing.assert_array_equal(source.audio(0), whole[:8000])


def test_two_letters_mean_the_three_of_iso_639_3(folder):
  spelled = (('fra', 'eng'), ('fr', 'en'))
  lines = [
    GOOD | {'language': a, 'translation': {b: 'A frog.'}, 'task': ['asr', f'st_{b}']}
    for a, b in spelled
  ]
  lines.append(GOOD | {'translation': 'A frog.', 'translation_language': 'en'})
  report = manifest.check(write(folder, *lines), folder / 'cache')
  assert not report.problems
  records = [entry.record for entry in report.entries]
  assert {record.language for record in records} == {'fra'}
  assert all(record.translations == {'eng': 'A frog.'} for record in records)
  assert [record.tasks for record in records] == [('asr', 'st_eng'), ('asr', 'st_eng'), ()]


def test_only_audio_and_language_are_needed(folder):
  source = manifest.load(
    write(folder, {'audio': 'c.flac', 'language': 'deu', 'split': 'test'}), 'test', folder
  )
  assert source.records[0].text is None
  assert len(source.audio(0)) == source.records[0].num_samples == 16_000


def test_audio_paths_are_relative_to_the_manifest(folder, monkeypatch, tmp_path_factory):
  monkeypatch.chdir(tmp_path_factory.mktemp('elsewhere'))
  path = write(folder, GOOD, GOOD | {'audio': str(folder / 'b.wav')})
  assert not manifest.check(path, folder / 'cache').problems


def test_lines_that_share_a_text_or_a_translation_stand_in_one_split(folder):
  lines = [GOOD | {'text': f'Phrase {i}.'} for i in range(100)]
  lines += [GOOD | {'audio': 'b.wav', 'text': f'phrase {i}'} for i in range(100)]
  spanish = {'audio': 'c.flac', 'language': 'spa'}
  lines += [
    spanish | {'text': f'frase {i}', 'translation': {'fra': f'Phrase {i}'}} for i in range(100)
  ]
  report = manifest.check(write(folder, *lines), folder / 'cache')
  names = [entry.split for entry in report.entries]
  assert names[:100] == names[100:200] == names[200:]
  assert {name: names.count(name) > 0 for name in SPLITS} == dict.fromkeys(SPLITS, True)
  assert names.count('train') > 200


def test_a_given_group_decides_alone(folder):
  lines = [GOOD | {'text': f'Phrase {i}', 'group': 'one'} for i in range(30)]
  report = manifest.check(write(folder, *lines), folder / 'cache')
  assert len({entry.split for entry in report.entries}) == 1


def test_an_empty_group_is_none(folder):
  lines = [GOOD | {'text': f'Phrase {i}'} for i in range(30)]
  check = lambda lines: manifest.check(write(folder, *lines), folder / 'cache').entries
  assert check([line | {'group': ''} for line in lines]) == check(lines)


def test_a_split_without_lines_is_an_error(folder):
  path = write(folder, GOOD | {'split': 'train'})
  with pytest.raises(DataError, match="no good line in the split 'test'"):
    manifest.load(path, 'test', folder / 'cache')


def test_unchanged_files_are_not_probed_again(folder, monkeypatch):
  path = write(folder, GOOD, GOOD | {'audio': 'b.wav'})
  manifest.check(path, folder / 'cache')
  probed = []
  probe = audio_io.probe
  monkeypatch.setattr(audio_io, 'probe', lambda p: probed.append(p.name) or probe(p))
  soundfile.write(folder / 'b.wav', np.zeros(12_345), 16_000)
  report = manifest.check(path, folder / 'cache')
  assert probed == ['b.wav']
  assert report.entries[1].record.num_samples == 12_345


def test_fingerprint_follows_content(folder):
  line = GOOD | {'split': 'train'}
  load = lambda *lines: manifest.load(write(folder, *lines), 'train', folder / 'cache')
  first = load(line).fingerprint
  assert load(line).fingerprint == first
  assert load(line | {'text': 'Autre.'}).fingerprint != first
  soundfile.write(folder / 'a.wav', np.full(16_000, 0.1), 16_000)
  assert load(line).fingerprint != first


def test_source_pickles_small(folder):
  source = manifest.load(write(folder, GOOD | {'split': 'train'}), 'train', folder)
  payload = pickle.dumps(source)
  assert len(payload) < 1000
  copy = pickle.loads(payload)
  assert copy.records == source.records
  np.testing.assert_array_equal(copy.audio(0), source.audio(0))


def test_a_file_that_shrank_since_the_check_is_named(folder):
  source = manifest.load(write(folder, GOOD | {'split': 'train'}), 'train', folder)
  soundfile.write(folder / 'a.wav', np.zeros(1000), 16_000)
  with pytest.raises(DataError, match=r'a\.wav is shorter than when it was checked'):
    source.audio(0)
