"""Audio files through a recognizer, one at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gatedfm import compiling
from gatedfm import gates as gates_lib
from gatedfm.data import audio_io, features, languages
from gatedfm.data.types import MIN_SECONDS, DataError
from gatedfm.execution import recognizer as recognizer_lib
from gatedfm.execution.recognizer import Recognizer
from gatedfm.models.speech_config import ConfigError

_SILENT = 8  # int16: what could be brought to speech level has samples far above it


class FileError(DataError):
  """A file that cannot be transcribed; the others go on."""


@dataclasses.dataclass(frozen=True)
class Result:
  """Text (or language), language, gate pattern, the share of gates that were open, and seconds.

  The seconds are those of reading and decoding; compiling is not among them.
  """

  text: str
  language: str
  pattern: str
  open: float
  seconds: float


def parse_task(task: str) -> str:
  """`asr`, `lid`, `st:en` or `st:eng` -> the tokenizer's task name.

  Raises:
    ConfigError: anything else.
  """
  if task in ('asr', 'lid'):
    return task
  kind, _, target = task.replace('_', ':').partition(':')
  if kind != 'st' or not target:
    raise ConfigError(f'task {task!r} is not asr, lid or st:LANGUAGE')
  return f'st_{parse_language(target)}'


def parse_language(code: str) -> str:
  """`fr` or `fra` -> `fra` (ISO 639-3); '' stays ''. Raises ConfigError on anything else."""
  try:
    return languages.check(code) if code else ''
  except DataError as e:
    raise ConfigError(str(e)) from None


def check(recognizer: Recognizer, task: str, language: str, ctc: bool = False) -> None:
  """Raises ConfigError where the model does not know the task or language, or CTC not the task."""
  if ctc and task != 'asr':
    raise ConfigError(f'CTC writes transcripts, not {task}: drop --ctc or ask for asr')
  t = recognizer.tokenizer
  if task not in t.tasks:
    raise ConfigError(f'this model does not do {task}; it does {" ".join(t.tasks)}')
  if language and language not in t.languages:
    raise ConfigError(f'this model does not know {language}; it knows {" ".join(t.languages)}')
  if not language and task != 'lid' and 'lid' not in t.tasks:
    raise ConfigError('this model cannot identify languages; give --language')


def transcribe(
  recognizer: Recognizer,
  path: Path,
  task: str,
  language: str = '',
  ctc: bool = False,
  say: Callable[[str], None] = print,
) -> Result:
  """Decodes one file of any rate and container.

  Args:
    recognizer: `skip` execution, so that closed modules cost nothing.
    path: the audio file.
    task, language: as the tokenizer names them; '' identifies the language first.
    ctc: write the best CTC path.
    say: is told how the compilation goes that a new length needs, and that a file is silent,
      which changes nothing in the result.

  Raises:
    FileError: missing, unreadable, empty, truncated, too short or too long; the message does
      not repeat the path.
  """
  start = time.perf_counter()
  try:
    padded, frames, silent = _read(path)
  except (DataError, ValueError) as e:
    message = str(e).replace(f' {path}', '').removeprefix(f'{path} ')
    raise FileError(message) from None
  if silent:
    say(f'{path}\twarning: silent; its language and text mean nothing')
  read = time.perf_counter() - start
  compiling.wait(recognizer.prepare(1, padded.shape[1]), say)
  start = time.perf_counter()
  if not language and task != 'lid':
    language = recognizer.languages(recognizer(padded, frames, 'lid', ['']))[0]
  decoded = recognizer(padded, frames, task, [language])
  if task == 'lid':
    language = text = recognizer.languages(decoded)[0]
  else:
    text = (recognizer.ctc_texts if ctc else recognizer.texts)(decoded)[0]
  seconds = read + time.perf_counter() - start
  sites = [s for s in recognizer.cfg.sites() if s.name in decoded.gates.values]
  if not sites:
    return Result(text, language, 'dense', 1.0, seconds)
  one = gates_lib.Gates({k: np.asarray(v) for k, v in decoded.gates.values.items()})
  pattern = gates_lib.pattern(one, sites, example=0)
  return Result(text, language, str(pattern), pattern.open_fraction, seconds)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
  """Features of a file, padded to their bucket [1, T, M], their number [1]; if it is silent."""
  probe = audio_io.probe(path)
  if probe.problem:
    raise DataError(probe.problem)
  if probe.seconds < MIN_SECONDS:
    raise DataError(f'too short: {probe.seconds:.2f} s, at least {MIN_SECONDS:g} s are needed')
  audio_S = audio_io.load(path)
  mel_TxM = features.log_mel(audio_S)
  padded = np.zeros((1, recognizer_lib.bucket(len(mel_TxM)), mel_TxM.shape[1]), np.float32)
  padded[0, : len(mel_TxM)] = mel_TxM
  return padded, np.array([len(mel_TxM)], np.int32), np.abs(audio_S).max() < _SILENT
