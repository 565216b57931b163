"""Audio files of any length through a recognizer, one at a time.

Letters: N windows, T frames of 10 ms, M mel bands.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gatedfm import compiling
from gatedfm import gates as gates_lib
from gatedfm.data import audio_io, features, languages
from gatedfm.data.types import MIN_SECONDS, DataError
from gatedfm.execution import long_form
from gatedfm.execution import recognizer as recognizer_lib
from gatedfm.execution.decoding import Decoded
from gatedfm.execution.long_form import WINDOWS, Windows
from gatedfm.execution.recognizer import Recognizer
from gatedfm.execution.words import Word
from gatedfm.models.speech_config import ConfigError

_BATCH = 8  # windows of a long file at a time, where their gates may differ
_SILENT = 8  # int16: what could be brought to speech level has samples far above it


class FileError(DataError):
  """A file that cannot be transcribed; the others go on."""


@dataclasses.dataclass(frozen=True)
class Result:
  """What a file gave.

  Attributes:
    text: or the language, where that was asked for.
    language: of the file.
    pattern: of the gates; of a long file's windows, each that there was.
    open: share of the gates that were open.
    seconds: for reading and decoding; compiling is not among them.
    words: with their times, where asked for.
  """

  text: str
  language: str
  pattern: str
  open: float
  seconds: float
  words: tuple[Word, ...] = ()


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


def check(recognizer: Recognizer, task: str, language: str, timestamps: bool = False) -> None:
  """Raises ConfigError where the model does not know the task or language, or CTC not the task."""
  if not recognizer.search.decoder and task != 'asr':
    raise ConfigError(f'CTC writes transcripts, not {task}: drop --ctc or ask for asr')
  if timestamps and task != 'asr':
    raise ConfigError(f'CTC times transcripts, not {task}: drop --timestamps or ask for asr')
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
  timestamps: bool = False,
  windows: Windows = WINDOWS,
  say: Callable[[str], None] = print,
) -> Result:
  """Decodes one file of any rate, container and length.

  A transcript of a long file is joined from windows that overlap (`long_form.join`); other tasks
  take windows cut at pauses: translations are put one after the other, and the language is that
  of the most windows.

  Args:
    recognizer: `skip` execution, so that closed modules cost nothing.
    path: the audio file.
    task, language: as the tokenizer names them; '' identifies the language first.
    timestamps: also time each word of a transcript.
    windows: how audio longer than one is cut.
    say: is told how the compilation goes that a new length needs, and that a file is silent,
      which changes nothing in the result.

  Raises:
    FileError: missing, unreadable, empty, truncated or too short; the message does not repeat
      the path.
  """
  start = time.perf_counter()
  try:
    mel_TxM, silent = _read(path)
  except (DataError, ValueError) as e:
    message = str(e).replace(f' {path}', '').removeprefix(f'{path} ')
    raise FileError(message) from None
  if silent:
    say(f'{path}\twarning: silent; its language and text mean nothing')
  spans = windows.overlapping(len(mel_TxM)) if task == 'asr' else windows.at_pauses(mel_TxM)
  timed = timestamps or (task == 'asr' and len(spans) > 1)
  identify = not language and task != 'lid'
  batches = _batches(recognizer, mel_TxM, spans)
  read, shape = time.perf_counter() - start, batches[0][0].shape[:2]
  tasks = ['lid', task] if identify else [task]
  aligned = lambda task: timed and task != 'lid'
  programs = [p for name in tasks for p in recognizer.prepare(*shape, name, aligned(name))]
  compiling.wait(list(dict.fromkeys(programs)), say)  # one may do for both

  start, number = time.perf_counter(), len(spans)
  decode = lambda task, language: [
    recognizer(mel, frames, task, [language] * len(frames), timestamps=aligned(task))
    for mel, frames in batches
  ]
  rows = lambda of, decoded: [row for d in decoded for row in of(d)][:number]
  commonest = lambda names: collections.Counter(names).most_common(1)[0][0]
  if identify:
    language = commonest(rows(recognizer.languages, decode('lid', '')))
  decoded, words = decode(task, language), []
  if task == 'lid':
    language = text = commonest(rows(recognizer.languages, decoded))
  elif number > 1 and task == 'asr':
    heard = [
      [word.shifted(first / 100) for word in row]
      for (first, _), row in zip(spans, rows(recognizer.words, decoded))
    ]
    words = long_form.join(spans, heard)
    text = recognizer.tokenizer.decode([token for word in words for token in word.tokens])
  else:
    text = ' '.join(filter(None, rows(recognizer.texts, decoded)))
    words = rows(recognizer.words, decoded)[0] if timed else []
  seconds = read + time.perf_counter() - start
  patterns = rows(lambda d: _patterns(recognizer, d), decoded)
  return Result(
    text,
    language,
    ' | '.join(dict.fromkeys(name for name, _ in patterns)),
    float(np.mean([share for _, share in patterns])),
    seconds,
    tuple(words) if timestamps else (),
  )


def _patterns(recognizer: Recognizer, decoded: Decoded) -> list[tuple[str, float]]:
  """Gate pattern and open share of each example."""
  batch = len(decoded.tokens)
  sites = [s for s in recognizer.cfg.sites() if s.name in decoded.gates.values]
  if not sites:
    return [('dense', 1.0)] * batch
  gates = gates_lib.Gates({k: np.asarray(v) for k, v in decoded.gates.values.items()})
  patterns = [gates_lib.pattern(gates, sites, example=b) for b in range(batch)]
  return [(str(pattern), pattern.open_fraction) for pattern in patterns]


def _read(path: Path) -> tuple[np.ndarray, bool]:
  """Features of a file, `[T, M]`; if it is silent."""
  probe = audio_io.probe(path)
  if probe.problem:
    raise DataError(probe.problem)
  if probe.seconds < MIN_SECONDS:
    raise DataError(f'too short: {probe.seconds:.2f} s, at least {MIN_SECONDS:g} s are needed')
  audio_S = audio_io.load(path)
  return features.log_mel(audio_S), np.abs(audio_S).max() < _SILENT


def _batches(
  recognizer: Recognizer, mel_TxM: np.ndarray, spans: Sequence[tuple[int, int]]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Windows padded to their bucket and their lengths, `[n, T, M]` and `[n]`, n alike in all.

  Several windows at a time only where their gates may differ. What the last batch lacks is empty.
  """
  size = min(len(spans), _BATCH) if recognizer.mixes else 1
  number = -(-len(spans) // size) * size
  longest = max(end - first for first, end in spans)
  padded = np.zeros((number, recognizer_lib.bucket(longest), mel_TxM.shape[1]), np.float32)
  frames = np.zeros(number, np.int32)
  for i, (first, end) in enumerate(spans):
    padded[i, : end - first], frames[i] = mel_TxM[first:end], end - first
  return [(padded[i : i + size], frames[i : i + size]) for i in range(0, number, size)]
