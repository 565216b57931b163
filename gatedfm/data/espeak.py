"""Synthetic speech by espeak-ng (wheel espeakng-loader): any text, many voices.

espeak-ng keeps its state in globals of the process, hence one lock here and a pool of
processes for whole sets. https://github.com/espeak-ng/espeak-ng
"""

import _ctypes
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from gatedfm.data import audio_io, splits, store
from gatedfm.data import languages as languages_lib
from gatedfm.data.progress import track
from gatedfm.data.types import LANGUAGES, SAMPLE_RATE, DataError, Parallel, Record

# Voices that sound like people; the last ones are kept from training.
TRAIN_VARIANTS = (
  'm1', 'f1', 'm2', 'f2', 'm3', 'f3', 'm4', 'f4', 'm5', 'Alicia', 'm6', 'Andrea', 'Alex',
  'Annie', 'Diogo', 'Hugo', 'Henrique', 'linda', 'Marco', 'Michael', 'john', 'steph2',
  'max', 'paul',
)  # fmt: skip
TEST_VARIANTS = ('m7', 'f5', 'm8', 'belinda', 'Mike', 'steph')
VARIANTS = TRAIN_VARIANTS + TEST_VARIANTS
_RATES, _PITCHES, _RANGES = (130, 210), (35, 65), (30, 70)  # words/min, 0..100, 0..100
_PAUSE = (0.02, 0.12)  # seconds of silence before and after
_EDGE = 10 ** (-40 / 20)  # quieter than this against the peak is silence
_FORMAT = 1  # of the stored sets; a change makes them anew

# Values of speak_lib.h.
_SYNCHRONOUS, _UTF8, _RATE, _PITCH, _RANGE = 2, 1, 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(
  ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_LOCK = threading.Lock()


def synthesize(text: str, language: str, variant: str, seed: int = 0) -> np.ndarray:
  """Reads a text aloud; the same arguments give the same samples.

  Speed, pitch and pauses vary with the arguments, in natural bounds.

  Args:
    text: what to say.
    language: ISO 639-3.
    variant: one of VARIANTS, or another voice variant of espeak-ng.
    seed: for another reading by the same voice.

  Returns:
    int16 [S] at 16 kHz, at the common speech level.

  Raises:
    DataError: a language or voice that espeak-ng lacks, or a text that makes no sound.
  """
  key = f'{text}\0{language}\0{variant}\0{seed}'.encode()
  rng = np.random.default_rng(list(hashlib.sha256(key).digest()))
  voice = f'{languages_lib.CODES.get(language, language)}+{variant}'
  settings = {
    _RATE: int(rng.integers(*_RATES)),
    _PITCH: int(rng.integers(*_PITCHES)),
    _RANGE: int(rng.integers(*_RANGES)),
  }
  with _LOCK, _library() as (library, rate, chunks):
    if library.espeak_SetVoiceByName(voice.encode()):
      raise DataError(f'espeak-ng has no voice {voice!r} for {language!r}')
    for parameter, value in settings.items():
      library.espeak_SetParameter(parameter, value, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(int(rng.integers(1, 2**31))))
    ctypes.CDLL(None).srand(int(rng.integers(1, 2**31)))
    raw = text.encode() + b'\0'
    library.espeak_Synth(raw, len(raw), 0, 0, 0, _UTF8, None, None)
    audio = np.concatenate([np.zeros(0, np.int16), *chunks])
  audio = audio_io.resample(np.float32(audio) / 32768, rate)
  loud = np.flatnonzero(np.abs(audio) > _EDGE * np.abs(audio).max(initial=1e-4))
  if not len(loud):
    raise DataError(f'espeak-ng makes no sound of {text!r} in {language!r}')
  before, after = (rng.uniform(*_PAUSE, size=2) * SAMPLE_RATE).astype(int)
  audio = np.pad(audio[loud[0] : loud[-1] + 1], (before, after))
  return audio_io.to_int16(audio_io.level(audio))


@contextlib.contextmanager
def _library() -> Iterator[tuple[ctypes.CDLL, int, list[np.ndarray]]]:
  """The library, its sample rate and the list that takes the samples of a synthesis.

  It is loaded and unloaded each time (4 ms): the phases of its oscillators survive a
  synthesis, and even its own termination, and would make the next one depend on it.
  """
  import espeakng_loader

  library = ctypes.CDLL(espeakng_loader.get_library_path())
  data_path = espeakng_loader.get_data_path().encode()
  chunks: list[np.ndarray] = []

  @_CALLBACK
  def take(samples, count, events):
    del events
    if samples and count > 0:
      chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
    return 0

  try:
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path, 0)
    if rate <= 0:
      raise DataError('espeak-ng does not start: reinstall espeakng-loader')
    library.espeak_SetSynthCallback(take)
    yield library, rate, chunks
    library.espeak_Terminate()
  finally:
    _ctypes.dlclose(library._handle)


def load(
  split: str,
  data_dir: Path,
  name: str,
  parallels: Sequence[Parallel],
  languages: Sequence[str] = LANGUAGES,
  voices: int = 1,
  seed: int = 0,
) -> store.StoredSource:
  """Opens a set of synthetic speech, reading it aloud the first time.

  Other records or another version of espeak-ng make another set.

  Voices of the validation and test splits are not heard in training.

  Args:
    split: 'train', 'validation' or 'test'.
    data_dir: the cache folder.
    name: of the source.
    parallels: texts by language; those of the split are read.
    languages: spoken languages.
    voices: how many voices read each text.
    seed: chooses voices, speeds and pitches.

  Raises:
    DataError: unknown split, or a language that espeak-ng lacks.
  """
  splits.check_split(split)
  jobs = _jobs([p for p in parallels if p.split == split], languages, voices, seed, split)
  records = [_record(name, parallel, language, v) for parallel, language, v in jobs]
  rows = (json.dumps(dataclasses.asdict(r), sort_keys=True) for r in records)
  content = '\n'.join([f'{_FORMAT}', metadata.version('espeakng-loader'), f'{seed}', *rows])
  digest = hashlib.sha256(content.encode()).hexdigest()[:16]
  folder = data_dir / 'espeak' / f'{name.replace(":", "-")}-{split}-{digest}'
  if not folder.exists():
    store.write(folder, _read_aloud(records, seed))
  return store.StoredSource(name, folder)


def _jobs(
  parallels: Sequence[Parallel],
  languages: Sequence[str],
  voices: int,
  seed: int,
  split: str,
) -> list[tuple[Parallel, str, str]]:
  """(texts, language, variant) of every reading; a text is read once by a voice."""
  variants = TRAIN_VARIANTS if split == 'train' else TEST_VARIANTS
  jobs = {}
  for parallel in parallels:
    for language in languages:
      if language not in parallel.texts:
        continue
      key = splits.text_key(parallel.texts[language])
      digest = hashlib.sha256(f'{seed}\0{language}\0{key}'.encode()).digest()
      start = int.from_bytes(digest[:8], 'big')
      for i in range(min(voices, len(variants))):
        variant = variants[(start + i) % len(variants)]
        jobs.setdefault((language, key, variant), (parallel, language, variant))
  return list(jobs.values())


def _record(name: str, parallel: Parallel, language: str, variant: str) -> Record:
  return Record(
    id=f'{parallel.id}:{language}:{variant}',
    source=name,
    language=language,
    text=parallel.texts[language],
    translations={k: v for k, v in parallel.texts.items() if k != language},
    num_samples=0,
    group=parallel.group,
    speaker=variant,
  )


def _read_aloud(records: Sequence[Record], seed: int) -> Iterator[tuple[Record, np.ndarray]]:
  processes = min(os.cpu_count(), 1 + len(records) // 200)
  texts = [r.text for r in records]
  spoken = [r.language for r in records]
  variants = [r.speaker for r in records]
  # A fresh process each: the state of espeak-ng, like that of JAX, does not survive a fork.
  with concurrent.futures.ProcessPoolExecutor(
    processes, multiprocessing.get_context('spawn')
  ) as pool:
    audios = pool.map(synthesize, texts, spoken, variants, [seed] * len(records), chunksize=32)
    yield from zip(records, track(audios, len(records), 'espeak reads aloud', 'texts'))
