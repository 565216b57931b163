"""Asterisk prompts on a small tree: real G.722, encoded by ffmpeg from tones."""

import pickle
import subprocess

import numpy as np
import pytest

from gatedfm.data import asterisk, audio_io, fetch
from gatedfm.data.types import DataError

FOLDER = 'usr/share/asterisk/sounds/fr_CA_f_June'


def encode(path, seconds, frequency=440):
  path.parent.mkdir(parents=True, exist_ok=True)
  samples = np.sin(2 * np.pi * frequency * np.arange(int(16_000 * seconds)) / 16_000)
  subprocess.run(
    [
      audio_io.ffmpeg(), '-v', 'error', '-y', '-f', 's16le', '-ar', '16000', '-ac', '1',
      '-i', '-', '-f', 'g722', str(path),
    ],
    input=audio_io.to_int16(samples / 4).tobytes(),
    check=True,
  )  # fmt: skip


@pytest.fixture
def root(tmp_path):
  root = tmp_path / 'unpacked'
  for name in ('hello', 'digits/1', 'vm-goodbye'):
    encode(root / FOLDER / f'{name}.g722', 0.8)
  for name in ('beep', 'silence/1', 'letters/a', 'phonetic/a_p', 'tt-monkeys'):
    encode(root / FOLDER / f'{name}.g722', 0.8)
  encode(root / FOLDER / 'short.g722', 0.3)
  return root


def test_only_speech_of_enough_length_is_found(root):
  found = asterisk.find(root, 'fra')
  ids = [record.id for record, _ in found]
  assert ids == ['digits/1:fra', 'hello:fra', 'vm-goodbye:fra']
  assert {record.speaker for record, _ in found} == {'June'}
  assert all(record.text is None for record, _ in found)


def test_decoding_gives_the_tone_that_was_encoded(root):
  decoded = list(asterisk.decode(asterisk.find(root, 'fra')))
  for record, audio in decoded:
    assert record.num_samples == len(audio) == 12_800
    spectrum = np.abs(np.fft.rfft(audio))
    assert spectrum.argmax() * 16_000 / len(audio) == pytest.approx(440, abs=2)


@pytest.fixture
def packages(root, monkeypatch):
  """`load` sees a package whose unpacking copies the small tree."""
  monkeypatch.setattr(fetch, 'fetch', lambda package, downloads: root)
  monkeypatch.setattr(fetch, 'unpack', lambda deb, folder: deb.rename(folder))


def test_source_stores_the_audio_once_and_pickles_small(packages, tmp_path, monkeypatch):
  source = asterisk.load('test', tmp_path, ['fra'])
  monkeypatch.setattr(asterisk, 'decode', None)  # a second time would fail
  again = asterisk.load('test', tmp_path, ['fra'])
  assert again.fingerprint == source.fingerprint
  assert [len(again.audio(i)) for i in range(3)] == [12_800] * 3
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy.audio(1), source.audio(1))


def test_subset_is_the_same_each_time_and_has_its_own_fingerprint(packages, tmp_path):
  whole = asterisk.load('test', tmp_path, ['fra'])
  part = asterisk.load('test', tmp_path, ['fra'], max_items=2)
  assert [r.id for r in part.records] == [
    r.id for r in asterisk.load('test', tmp_path, ['fra'], max_items=2).records
  ]
  assert len(part) == 2
  assert part.fingerprint != whole.fingerprint
  for i, record in enumerate(part.records):
    np.testing.assert_array_equal(part.audio(i), whole.audio(whole.records.index(record)))


def test_there_is_only_a_test_split(tmp_path):
  with pytest.raises(DataError, match="unknown split 'train': one of test"):
    asterisk.load('train', tmp_path)


def test_unknown_language_lists_the_known(tmp_path):
  with pytest.raises(DataError, match="no 'dan': languages are fra, spa, rus, ita, eng"):
    asterisk.load('test', tmp_path, ['dan'])
