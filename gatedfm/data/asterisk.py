"""Asterisk's studio prompts: language identification on other speakers and microphones.

One speaker per language; the English and the Spanish one are the same person. The packages
carry no transcripts. https://www.asterisk.org; licences CC BY(-SA) 3.0.
"""

import hashlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gatedfm.data import audio_io, fetch, splits, store
from gatedfm.data.progress import track
from gatedfm.data.types import SAMPLE_RATE, DataError, Record

_VERSION = '1.6.1-1'
_SHA256 = {
  'en': '38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806',
  'es': 'e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8',
  'fr': '7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0',
  'it': '46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016',
  'ru': '673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b',
}
_CODES = {'fra': 'fr', 'spa': 'es', 'rus': 'ru', 'ita': 'it', 'eng': 'en'}
PACKAGES = {
  language: fetch.DebianPackage(
    f'asterisk-core-sounds-{code}-g722', _VERSION, _SHA256[code], megabytes=12
  )
  for language, code in _CODES.items()
}

# Not speech, or spelled letters, which sound alike in many languages.
_SKIPPED_FOLDERS = {'silence', 'letters', 'phonetic'}
_SKIPPED = {
  'ascending-2tone', 'descending-2tone', 'beep', 'beeperr', 'confbridge-join',
  'confbridge-leave', 'tt-monkeys',
}  # fmt: skip
_SECONDS = (0.5, 30)
_SAMPLES_PER_BYTE = 2  # G.722 at 64 kbit/s
_AT_ONCE = 64  # files that one ffmpeg decodes


def load(
  split: str,
  data_dir: Path,
  languages: Sequence[str] = ('fra', 'spa', 'rus'),
  max_items: int | None = None,
) -> store.StoredSource:
  """Opens the prompts, decoding them the first time.

  Args:
    split: only 'test' exists.
    data_dir: the cache folder.
    languages: any of fra, spa, rus, ita, eng.
    max_items: at most so many per language; always the same ones, and the same prompts
      in all languages that have them.

  Raises:
    DataError: another split, an unknown language, or a package that cannot be fetched.
  """
  splits.check_split(split, ('test',))
  languages = tuple(languages)
  if unknown := [language for language in languages if language not in PACKAGES]:
    raise DataError(f'asterisk has no {unknown[0]!r}: languages are {", ".join(PACKAGES)}')
  folder = data_dir / 'asterisk' / f'{_VERSION}-{"-".join(languages)}'
  if not folder.exists():
    debs = {code: fetch.fetch(PACKAGES[code], data_dir / 'downloads') for code in languages}
    with tempfile.TemporaryDirectory() as unpacked:
      prompts = []
      for language, deb in debs.items():
        fetch.unpack(deb, Path(unpacked) / language)
        prompts += find(Path(unpacked) / language, language)
      store.write(folder, decode(prompts))
  source = store.StoredSource('asterisk', folder)
  if max_items is None:
    return source
  return store.StoredSource('asterisk', folder, _subset(source.records, max_items))


def find(root: Path, language: str) -> list[tuple[Record, Path]]:
  """Prompts with speech below `root`, between 0.5 and 30 s, sorted by name."""
  found = []
  for path in sorted(root.rglob('*.g722')):
    num_samples = path.stat().st_size * _SAMPLES_PER_BYTE
    low, high = (seconds * SAMPLE_RATE for seconds in _SECONDS)
    if (
      path.stem in _SKIPPED
      or path.parent.name in _SKIPPED_FOLDERS
      or not low <= num_samples <= high
    ):
      continue
    voice, *name = path.relative_to(root / 'usr/share/asterisk/sounds').parts
    prompt = Path(*name).with_suffix('').as_posix()
    record = Record(
      id=f'{prompt}:{language}',
      source='asterisk',
      language=language,
      text=None,
      translations={},
      num_samples=num_samples,
      group=prompt,
      speaker=voice.rsplit('_', 1)[-1],
    )
    found.append((record, path))
  return found


def decode(
  prompts: Sequence[tuple[Record, Path]],
) -> Iterator[tuple[Record, np.ndarray]]:
  """Decodes G.722 files, many by one ffmpeg, to int16 [S] at the common speech level."""
  with tempfile.TemporaryDirectory() as folder:
    batches = [prompts[i : i + _AT_ONCE] for i in range(0, len(prompts), _AT_ONCE)]
    for batch in track(batches, len(batches), 'decoding asterisk prompts', 'batches'):
      inputs, outputs = [], []
      for i, (_, path) in enumerate(batch):
        inputs += ['-f', 'g722', '-i', str(path)]
        outputs += ['-map', f'{i}', '-f', 'f32le', f'{folder}/{i}']
      command = [audio_io.ffmpeg(), '-v', 'error', '-nostdin', '-y', *inputs, *outputs]
      result = subprocess.run(command, capture_output=True, text=True)
      if result.returncode:
        raise DataError(f'ffmpeg cannot decode G.722: {result.stderr.strip()}')
      for i, (record, _) in enumerate(batch):
        audio = np.fromfile(f'{folder}/{i}', '<f4')
        yield record, audio_io.to_int16(audio_io.level(audio))


def _subset(records: Sequence[Record], max_items: int) -> list[int]:
  """Indices of at most max_items records per language, chosen by the hash of the prompt."""
  rank = lambda i: hashlib.sha256(records[i].group.encode()).digest()
  chosen, count = [], {}
  for i in sorted(range(len(records)), key=rank):
    language = records[i].language
    count[language] = count.get(language, 0) + 1
    if count[language] <= max_items:
      chosen.append(i)
  return sorted(chosen)
