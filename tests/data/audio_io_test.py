"""Reading audio of any rate and container, levels, and what is wrong with files."""

import re
import subprocess

import numpy as np
import pytest
import soundfile

from gatedfm.data import audio_io
from gatedfm.data.types import DataError


def tone(seconds, rate, frequency=440, channels=1):
  wave = 0.3 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)
  return np.stack([wave] * channels, axis=1)


def pitch(audio):
  return np.abs(np.fft.rfft(audio)).argmax() * 16_000 / len(audio)


@pytest.mark.parametrize('rate', [8000, 11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize('kind', ['wav', 'flac', 'ogg', 'mp3'])
def test_any_rate_and_container_become_16_khz_mono(tmp_path, rate, kind):
  path = tmp_path / f'a.{kind}'
  soundfile.write(path, tone(1, rate, channels=2), rate)
  audio = audio_io.load(path)
  assert audio.dtype == np.int16
  assert audio.ndim == 1
  assert len(audio) == pytest.approx(16_000, rel=0.1 if kind == 'mp3' else 1e-3)
  assert pitch(audio) == pytest.approx(440, abs=2)
  assert audio_io.probe(path).seconds == pytest.approx(1, rel=0.1)
  assert not audio_io.probe(path).problem


def convert(source, path, *options):
  command = [audio_io.ffmpeg(), '-v', 'error', '-i', source, *options, path]
  subprocess.run(command, check=True)
  return path


@pytest.fixture
def two_tones(tmp_path):
  path = tmp_path / 'tones.wav'
  soundfile.write(path, np.concatenate([tone(1, 24_000), tone(1, 24_000, 880)]), 24_000)
  return path


@pytest.fixture
def m4a(tmp_path, two_tones):
  return convert(two_tones, tmp_path / 'a.m4a')


@pytest.fixture
def video(tmp_path, two_tones):
  """Three seconds of pictures and two of sound, the header in front."""
  pictures = ('-f', 'lavfi', '-i', 'testsrc=duration=3:size=64x64:rate=10', '-c:v', 'mpeg4')
  return convert(two_tones, tmp_path / 'a.mp4', *pictures, '-movflags', '+faststart')


def test_ffmpeg_reads_what_soundfile_does_not_and_cuts_it(m4a):
  assert audio_io.probe(m4a).seconds == pytest.approx(2, abs=0.1)
  assert pitch(audio_io.load(m4a, 0.2, 0.8)) == pytest.approx(440, abs=3)
  part = audio_io.load(m4a, 1.2, 1.8)
  assert pitch(part) == pytest.approx(880, abs=3)
  assert len(part) == 9600


def test_part_of_a_file_is_that_part(tmp_path):
  path = tmp_path / 'a.wav'
  soundfile.write(path, np.concatenate([tone(1, 8000), tone(1, 8000, 880)]), 8000)
  assert pitch(audio_io.load(path, 1.1, 1.9)) == pytest.approx(880, abs=2)
  assert len(audio_io.load(path, 1.5)) == 8000


def test_level_is_common_and_pauses_do_not_count():
  speech = np.concatenate([tone(1, 16_000)[:, 0], np.zeros(16_000)])
  loud, soft = audio_io.level(3 * speech), audio_io.level(speech / 100)
  np.testing.assert_allclose(loud, soft, atol=1e-6)
  power = np.mean(np.square(loud[:16_000]))
  assert 10 * np.log10(power) == pytest.approx(audio_io.SPEECH_LEVEL, abs=0.1)


def test_level_leaves_silence_and_never_clips():
  assert not audio_io.level(np.zeros(1000, np.float32)).any()
  assert not len(audio_io.level(np.zeros(0, np.float32)))
  spiky = 1e-3 * tone(1, 16_000)[:, 0]
  spiky[100] = 0.5
  assert np.abs(audio_io.level(spiky)).max() <= 0.991


def halve(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize('kind', ['wav', 'flac', 'ogg', 'mp3'])
def test_truncated_files_are_seen(tmp_path, kind):
  path = tmp_path / f'a.{kind}'
  soundfile.write(path, np.random.default_rng(0).standard_normal(32_000) / 9, 16_000)
  halve(path)
  assert 'truncated' in audio_io.probe(path).problem


@pytest.mark.parametrize('kind', ['m4a', 'webm'])
def test_truncated_files_that_ffmpeg_reads_are_seen(tmp_path, two_tones, kind):
  path = convert(two_tones, tmp_path / f'a.{kind}', '-movflags', '+faststart')
  assert audio_io.probe(path).seconds == pytest.approx(2, abs=0.1)
  halve(path)
  assert re.search(r'truncated .* [01]\.\d\d of 2\.0\d s', audio_io.probe(path).problem)


def test_sound_may_end_before_the_pictures_of_a_video_but_not_with_them(video):
  assert audio_io.probe(video) == (pytest.approx(2, abs=0.1), '')
  halve(video)
  assert 'truncated' in audio_io.probe(video).problem


def test_lengths_that_are_not_declared_are_measured(tmp_path, two_tones):
  streamed = convert(two_tones, tmp_path / 'a.webm', '-live', '1')
  assert audio_io.probe(streamed) == (pytest.approx(2, abs=0.1), '')
  assert len(audio_io.load(streamed)) == pytest.approx(32_000, rel=0.05)


def test_estimated_lengths_are_not_believed(tmp_path):
  # Silence takes few bits: by its beginning ffmpeg takes such a stream for a longer one.
  source = tmp_path / 'a.wav'
  noise = np.random.default_rng(0).standard_normal(5 * 16_000) / 9
  soundfile.write(source, np.concatenate([np.zeros(5 * 16_000), noise]), 16_000)
  path = convert(source, tmp_path / 'a.aac')
  assert audio_io.probe(path) == (pytest.approx(10, abs=0.2), '')


def test_missing_empty_and_undecodable_files_are_told_apart(tmp_path):
  (tmp_path / 'zero.wav').touch()
  (tmp_path / 'text.wav').write_text('this is no audio')
  soundfile.write(tmp_path / 'none.wav', np.zeros(0), 16_000)
  problem = lambda name: audio_io.probe(tmp_path / name).problem
  assert problem('gone.wav').startswith('missing')
  assert problem('zero.wav').startswith('empty')
  assert problem('none.wav').startswith('empty')
  assert problem('text.wav').startswith('undecodable')
  with pytest.raises(DataError, match=r'undecodable audio .*text\.wav'):
    audio_io.load(tmp_path / 'text.wav')


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('kind', ['wav', 'mkv'])  # soundfile reads the one, ffmpeg the other
def test_samples_that_are_no_numbers_are_refused(tmp_path, kind, bad):
  audio, source, path = tone(1, 16_000), tmp_path / 'a.wav', tmp_path / f'bad.{kind}'
  audio[5] = bad
  soundfile.write(source, audio, 16_000, 'FLOAT')
  convert(source, path, '-c', 'copy')
  with pytest.raises(DataError, match=rf'bad\.{kind} has NaN or infinite samples'):
    audio_io.load(path)


def test_float_audio_beyond_full_scale_clips_in_int16():
  audio = audio_io.to_int16(np.array([-2, -1, 0.5, 1, 2]))
  assert audio.tolist() == [-32768, -32768, 16384, 32767, 32767]
