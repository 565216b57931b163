"""Synthetic speech: determinism, voices, parallel texts, and the stored source."""

import subprocess
import sys
import zlib

import numpy as np
import pytest

from gatedfm.data import audio_io, espeak, parallel_terms, splits
from gatedfm.data.types import LANGUAGES, SPLITS, DataError, Parallel


def test_same_arguments_give_the_same_samples_whatever_came_before():
  first = espeak.synthesize('Une grenouille', 'fra', 'm1')
  espeak.synthesize('Лягушка', 'rus', 'f2')
  np.testing.assert_array_equal(espeak.synthesize('Une grenouille', 'fra', 'm1'), first)
  code = (
    'from gatedfm.data import espeak; import zlib;'
    "print(zlib.crc32(espeak.synthesize('Une grenouille', 'fra', 'm1').tobytes()))"
  )
  other = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
  assert int(other.stdout) == zlib.crc32(first.tobytes())


def test_voice_seed_language_and_text_each_change_the_sound():
  base = ('un deux trois', 'fra', 'm1', 0)
  for other in (
    ('un deux', 'fra', 'm1', 0),
    ('un deux trois', 'cat', 'm1', 0),
    ('un deux trois', 'fra', 'f1', 0),
    ('un deux trois', 'fra', 'm1', 1),
  ):
    assert not np.array_equal(espeak.synthesize(*base), espeak.synthesize(*other))


@pytest.mark.parametrize('language', LANGUAGES)
def test_all_default_languages_speak_at_the_common_level(language):
  term = next(t for t in parallel_terms.terms() if t.id == 'territory/FR')
  audio = espeak.synthesize(term.texts[language], language, 'f1')
  assert audio.dtype == np.int16
  assert 0.3 < len(audio) / 16_000 < 2
  again = audio_io.level(audio / 32768)
  assert np.abs(again * 32768 - audio).max() < 400


def test_every_voice_exists():
  lengths = {v: len(espeak.synthesize('bonjour', 'fra', v)) for v in espeak.VARIANTS}
  assert min(lengths.values()) > 0.2 * 16_000
  assert len(set(lengths.values())) > len(lengths) // 2
  assert not set(espeak.TRAIN_VARIANTS) & set(espeak.TEST_VARIANTS)


def test_unknown_voices_and_mute_texts_are_named():
  with pytest.raises(DataError, match='no voice'):
    espeak.synthesize('hello', 'xxx', 'm1')
  with pytest.raises(DataError, match='no sound'):
    espeak.synthesize(' ', 'fra', 'm1')


def test_terms_are_parallel_and_no_text_stands_in_two_splits():
  terms = parallel_terms.terms()
  by_id = {term.id: term for term in terms}
  assert by_id['territory/GR'].texts['ell'] == 'Ελλάδα'
  assert by_id['number/21'].texts['dan'] == 'enogtyve'
  assert 'ell' not in by_id['number/21'].texts  # num2words has no Greek
  seen = {}
  for term in terms:
    assert 'eng' in term.texts
    for language, text in term.texts.items():
      assert seen.setdefault((language, splits.text_key(text)), term.split) == term.split
  count = [sum(term.split == split for term in terms) for split in SPLITS]
  assert count[0] / len(terms) == pytest.approx(0.8, abs=0.05)
  assert min(count) > 50


TEXTS = [
  Parallel('a', {'eng': 'one', 'fra': 'un', 'spa': 'uno'}, 'one', 'train'),
  Parallel('b', {'eng': 'two', 'fra': 'deux'}, 'two', 'train'),
  Parallel('c', {'eng': 'an', 'fra': 'Un'}, 'one', 'train'),
  Parallel('d', {'eng': 'three', 'fra': 'trois'}, 'three', 'test'),
]


def test_source_reads_each_text_once_per_voice_and_is_stored(tmp_path, monkeypatch):
  source = espeak.load('train', tmp_path, 'mine', TEXTS, ['fra', 'spa'], voices=2)
  spoken = [(r.language, r.text) for r in source.records]
  assert sorted(spoken) == [('fra', 'deux')] * 2 + [('fra', 'un')] * 2 + [('spa', 'uno')] * 2
  assert len({(r.text, r.speaker) for r in source.records}) == 6
  record = source.records[0]
  assert record.translations == {'eng': 'one', 'spa': 'uno'}
  expected = espeak.synthesize(record.text, record.language, record.speaker)
  np.testing.assert_array_equal(source.audio(0), expected)
  monkeypatch.setattr(espeak, '_read_aloud', None)  # a second time would fail
  again = espeak.load('train', tmp_path, 'mine', TEXTS, ['fra', 'spa'], voices=2)
  assert again.fingerprint == source.fingerprint


def test_a_stored_set_is_of_its_translations_and_of_a_version(tmp_path, monkeypatch):
  read = []
  silence = lambda records, seed: [read.append(r) or (r, np.zeros(9, np.int16)) for r in records]
  monkeypatch.setattr(espeak, '_read_aloud', silence)
  load = lambda *texts: espeak.load('train', tmp_path, 'mine', texts, ['fra']).records
  load(TEXTS[1])
  two = Parallel('b', {'eng': 'a pair', 'fra': 'deux'}, 'two', 'train')
  assert load(two)[0].translations == {'eng': 'a pair'}
  assert load(TEXTS[1])[0].translations == {'eng': 'two'}
  assert len(read) == 2
  monkeypatch.setattr(espeak.metadata, 'version', lambda _: '0')
  load(two)
  assert len(read) == 3


def test_test_voices_are_not_heard_in_training(tmp_path):
  source = espeak.load('test', tmp_path, 'mine', TEXTS, ['fra'], voices=3)
  assert {r.speaker for r in source.records} <= set(espeak.TEST_VARIANTS)
  assert {r.text for r in source.records} == {'trois'}
