"""Reads audio of any container and rate as 16 kHz mono int16.

soundfile (libsndfile) reads wav, flac, ogg, opus and mp3; ffmpeg reads the rest (m4a, webm,
video): the one on PATH, or the one in the wheel imageio-ffmpeg.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from gatedfm.data.types import SAMPLE_RATE, DataError

SPEECH_LEVEL = -26.0  # dB below full scale, usual for telephone and corpus speech
_UNKNOWN = 0x7FFFFFFF  # bytes: what streams declare, and more


def to_int16(audio: np.ndarray) -> np.ndarray:
  """Float audio in [-1, 1] (any shape) to int16, rounded; louder samples clip."""
  return np.clip(np.rint(audio * 32768), -32768, 32767).astype(np.int16)


def resample(audio: np.ndarray, rate: float) -> np.ndarray:
  """Float32 audio [S'] or [S', channels] at `rate` Hz to float32 mono [S] at 16 kHz."""
  if audio.ndim == 2:
    audio = audio.mean(axis=1)
  return audio if rate == SAMPLE_RATE else soxr.resample(audio, rate, SAMPLE_RATE)


def level(audio: np.ndarray, decibels: float = SPEECH_LEVEL) -> np.ndarray:
  """Brings speech to a common loudness, so that loudness says nothing of the source.

  The level is the power of the 10 ms frames within 30 dB of the loudest one, the idea of
  ITU-T P.56. Peaks stay below full scale; digital silence stays as it is.

  Args:
    audio: float [S] at 16 kHz; samples beyond [-1, 1] are welcome.
    decibels: wanted active level, dB below full scale.

  Returns:
    float32 [S].
  """
  hop = SAMPLE_RATE // 100
  frames = np.pad(audio, (0, -len(audio) % hop)).reshape(-1, hop)
  power = np.mean(np.square(frames, dtype=np.float64), axis=1)
  loudest = power.max(initial=0)
  if loudest < 1e-10:
    return np.asarray(audio, np.float32)
  active = power[power > loudest * 1e-3].mean()
  gain = min(10 ** (decibels / 20) / np.sqrt(active), 0.99 / np.abs(audio).max())
  return np.asarray(audio * gain, np.float32)


def load(path: Path, start: float = 0, end: float | None = None) -> np.ndarray:
  """Decodes a file, or the part of it between two times.

  Args:
    path: an audio file, or a video with sound.
    start: seconds from its beginning.
    end: seconds from its beginning; None is its end.

  Returns:
    int16 [S] at 16 kHz, channels averaged, at the common speech level.

  Raises:
    DataError: neither soundfile nor ffmpeg can decode it, or a sample is no finite number.
  """
  try:
    with soundfile.SoundFile(path) as file:
      rate = file.samplerate
      if start:
        file.seek(min(round(start * rate), file.frames))
      frames = -1 if end is None else round((end - start) * rate)
      audio = file.read(frames, dtype='float32')
  except soundfile.LibsndfileError:
    audio, rate = _ffmpeg_load(path, start, end), SAMPLE_RATE
  if not np.isfinite(audio).all():  # one such sample would spoil the level of all
    raise DataError(f'{path} has NaN or infinite samples: export it again')
  return to_int16(level(resample(audio, rate)))


class Probe(NamedTuple):
  """What is known of an audio file: its length in seconds, or what is wrong with it."""

  seconds: float
  problem: str = ''


def probe(path: Path) -> Probe:
  """Checks that a file is there, decodable, not empty and not truncated.

  Truncated is a file that declares more than can be read; a format without a declared
  length (ogg, webm of browsers) ends where it ends. Only the last frames are decoded where
  soundfile reads the file, and all of it where ffmpeg does.
  """
  if path.is_dir():
    return Probe(0, f'{path} is a folder, not an audio file')
  if not path.is_file():
    return Probe(0, f'missing file {path}')
  if not path.stat().st_size:
    return Probe(0, f'empty file {path}')
  try:
    file = soundfile.SoundFile(path)
  except soundfile.LibsndfileError as error:
    return _ffmpeg_probe(path, error.error_string)
  with file:
    if not file.frames:
      return Probe(0, f'empty or truncated {path}: it holds no audio')
    length = file.frames / file.samplerate
    header = re.search(r'data : (\d+) \(should be (\d+)\)', file.extra_info)
    if header and int(header[2]) < int(header[1]) < _UNKNOWN:
      declared = length * int(header[1]) / int(header[2])
      return Probe(0, f'truncated {path}: {length:.2f} of {declared:.2f} s are there')
    if _tail_readable(file):
      return Probe(length)
  return _compared(path, _readable_frames(path) / file.samplerate, length)


def _compared(path: Path, readable: float, declared: float) -> Probe:
  if readable < declared * 0.99 - 0.1:
    return Probe(0, f'truncated {path}: {readable:.2f} of {declared:.2f} s can be decoded')
  return Probe(readable)


def _tail_readable(file: soundfile.SoundFile) -> bool:
  try:
    file.seek(max(0, file.frames - 400))
    return len(file.read()) > 0
  except soundfile.LibsndfileError:
    return False


def _readable_frames(path: Path) -> int:
  count = 0
  try:
    with soundfile.SoundFile(path) as file:
      while read := len(file.read(SAMPLE_RATE)):
        count += read
  except soundfile.LibsndfileError:
    pass  # what was read until here is the answer
  return count


def _ffmpeg_probe(path: Path, problem: str) -> Probe:
  text = _decoding(path, '-vn')
  readable = _times('time=', text)
  if not readable or 'Audio:' not in text:
    return Probe(0, f'undecodable audio {path}: {problem}')
  declared = _times('Duration: ', text)
  if not declared or 'Estimating duration' in text:
    return Probe(readable[-1])
  found = _compared(path, readable[-1], declared[0])
  if found.problem and 'Video:' in text:
    # Sound may end before its pictures do: truncated files lack both.
    pictures = _times('time=', _decoding(path, '-an', '-c', 'copy'))
    if pictures and not _compared(path, pictures[-1], declared[0]).problem:
      return Probe(readable[-1])
  return found


def _decoding(path: Path, *options: str) -> str:
  """What ffmpeg says of a file, and of decoding it."""
  command = [ffmpeg(), '-hide_banner', '-nostdin', '-i', str(path), *options, '-f', 'null', '-']
  return _run(command).stderr.decode(errors='replace')


def _times(name: str, text: str) -> list[float]:
  """Seconds of all times that stand behind a name."""
  found = re.findall(rf'{name}(\d+):(\d+):([\d.]+)', text)
  return [int(hours) * 3600 + int(minutes) * 60 + float(rest) for hours, minutes, rest in found]


@functools.cache
def ffmpeg() -> str:
  """The ffmpeg to run: on PATH, else in the wheel. Raises DataError where there is none."""
  if found := shutil.which('ffmpeg'):
    return found
  try:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()
  except (ImportError, RuntimeError) as error:
    raise DataError(
      'this audio needs ffmpeg: install ffmpeg, or `pip install imageio-ffmpeg`'
    ) from error


def _ffmpeg_load(path: Path, start: float, end: float | None) -> np.ndarray:
  # Seeking alone is off by up to a frame of the codec, so it goes to a second before, and
  # a filter cuts by the time stamps.
  seek = ['-ss', f'{max(0, start - 1)}', '-copyts', '-start_at_zero']
  cut = f'atrim={start}' if end is None else f'atrim={start}:{end}'
  command = [ffmpeg(), '-v', 'error', '-nostdin', *seek, '-i', str(path), '-vn']
  command += ['-af', f'{cut},asetpts=PTS-STARTPTS', '-ac', '1', '-ar', f'{SAMPLE_RATE}']
  result = _run([*command, '-f', 'f32le', '-'])
  if result.returncode:
    lines = result.stderr.decode(errors='replace').strip().splitlines()
    raise DataError(f'undecodable audio {path}: {lines[-1] if lines else "ffmpeg failed"}')
  return np.frombuffer(result.stdout, '<f4')


def _run(command: list[str]) -> subprocess.CompletedProcess:
  return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
