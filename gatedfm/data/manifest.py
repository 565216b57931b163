"""A user's own data: a JSONL manifest, checked before anything is trained.

One object per line:

  audio                 path, relative to the manifest; what soundfile or ffmpeg reads
  language              spoken language, ISO 639-3; a two-letter code is read as such: 'fr' as 'fra'
  text                  transcript
  translation           object {language: text}, or a string with translation_language
  task                  'asr', 'lid', 'st_eng', ... or a list; all that the fields allow
  start, end            seconds, where the utterance is a part of the file
  id, speaker, group    group: lines that must stand in the same split
  split                 'train', 'validation' or 'test'; else by a hash of group or text

Only audio and language are needed. An empty text or translation is bad: leave it out.
"""

import concurrent.futures
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm import atomic
from gatedfm.data import audio_io, languages, splits, store
from gatedfm.data.progress import track
from gatedfm.data.types import MIN_SECONDS, SAMPLE_RATE, SPLITS, DataError, Record

FIELDS = (
  'audio', 'language', 'text', 'translation', 'translation_language', 'task', 'start',
  'end', 'id', 'speaker', 'group', 'split',
)  # fmt: skip
_SPLIT_NAMES = dict(zip(SPLITS, SPLITS)) | {
  'dev': 'validation', 'valid': 'validation', 'val': 'validation',
}  # fmt: skip
_SLACK = 0.1  # seconds by which containers and decoders may differ on a length
_LATEST = 1e9  # seconds; no start or end is later
_SHOWN = 20  # problems that a report spells out


class ManifestError(DataError):
  """A manifest with bad lines; the message is its report."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A good line: its record, the absolute path of the file, and the part in seconds."""

  record: Record
  path: str
  start: float
  end: float
  split: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What a manifest holds.

  Attributes:
    path: of the manifest.
    entries: the good lines.
    problems: (line number from 1, reason) of the bad ones, in order.
  """

  path: Path
  entries: Sequence[Entry]
  problems: Sequence[tuple[int, str]]

  def __str__(self) -> str:
    good, bad = len(self.entries), len(self.problems)
    lines = [f'{self.path}: {bad} bad of {good + bad} lines']
    lines += [f'  line {number}: {reason}' for number, reason in self.problems[:_SHOWN]]
    if bad > _SHOWN:
      lines.append(f'  and {bad - _SHOWN} more')
    return '\n'.join(lines)


def write(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
  """Writes a manifest, atomically; returns the number of lines."""
  rows = [json.dumps(line, ensure_ascii=False) + '\n' for line in lines]
  atomic.write_text(path, ''.join(rows))
  return len(rows)


def check(
  path: Path,
  data_dir: Path,
  max_seconds: float = 30,
  max_chars: int = 1000,
) -> Report:
  """Reads a manifest and probes its audio.

  Args:
    path: the manifest.
    data_dir: the cache folder; files that did not change are not probed again.
    max_seconds: longer utterances are bad: cut them with start and end.
    max_chars: longer texts are bad.

  Raises:
    ManifestError: there is no such file, or it holds no line.
  """
  try:
    with open(path, encoding='utf-8-sig') as file:
      lines = {n: line for n, line in enumerate(file, start=1) if line.strip()}
  except (OSError, UnicodeDecodeError) as error:
    why = getattr(error, 'strerror', None) or error  # without the path once more
    raise ManifestError(f'cannot read the manifest {path}: {why}') from error
  if not lines:
    raise ManifestError(f'the manifest {path} is empty')
  parsed, problems, seen = {}, {}, {}
  for number, line in lines.items():
    try:
      fields = _parse(line, max_chars)
      fields['audio'] = str(path.parent.absolute() / fields['audio'])
      name = fields.setdefault('id', f'line {number}')
      first = seen.setdefault(name, number)
      if first != number:
        raise DataError(f'id {name!r} is also that of line {first}')
      parsed[number] = fields
    except DataError as error:
      problems[number] = str(error)
  probes = _probe_all({fields['audio'] for fields in parsed.values()}, data_dir)
  good = {}
  for number, fields in parsed.items():
    try:
      good[number] = _bounds(fields, probes[fields['audio']], max_seconds)
    except DataError as error:
      problems[number] = str(error)
  entries = _entries(path, {number: parsed[number] for number in good}, good)
  return Report(path, entries, sorted(problems.items()))


def _parse(line: str, max_chars: int) -> dict[str, Any]:
  """The checked fields of a line; translations become one mapping, tasks a tuple."""
  try:
    fields = json.loads(line)
    json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text
  except ValueError as error:
    raise DataError(f'bad JSON: {error}') from error
  if not isinstance(fields, dict):
    raise DataError(f'not a JSON object: {line.strip()[:40]}')
  for name in fields:
    if name not in FIELDS:
      near = difflib.get_close_matches(name, FIELDS, n=1)
      hint = f'did you mean {near[0]!r}?' if near else f'known are {", ".join(FIELDS)}'
      raise DataError(f'unknown field {name!r}: {hint}')
  fields = {name: value for name, value in fields.items() if value is not None}
  for name in ('audio', 'language'):
    if not fields.get(name):
      raise DataError(f'missing field {name!r}')
  for name in ('audio', 'text', 'translation_language', 'id', 'speaker', 'group'):
    if not isinstance(fields.get(name, ''), str):
      raise DataError(f'{name!r} should be a string, not {fields[name]!r}')
  fields['language'] = languages.check(fields['language'])
  for name in ('start', 'end'):
    value = fields.get(name, 0)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < _LATEST:  # NaN, which Python's JSON knows, is neither
      raise DataError(f'{name!r} should be seconds, not {value!r}')
  if 'split' in fields and fields['split'] not in list(_SPLIT_NAMES):
    raise DataError(f'unknown split {fields["split"]!r}: one of {", ".join(SPLITS)}')
  fields['translation'] = _translations(fields)
  texts = {'text': fields['text']} if 'text' in fields else {}
  texts |= {f'translation into {k}': v for k, v in fields['translation'].items()}
  for name, text in texts.items():
    if not text.strip():
      raise DataError(f'empty {name}: leave it out')
    if len(text) > max_chars:
      raise DataError(f'text of {len(text)} characters, at most {max_chars} are allowed')
  fields['task'] = _tasks(fields)
  return fields


def _translations(fields: Mapping[str, Any]) -> dict[str, str]:
  value, language = fields.get('translation', {}), fields.get('translation_language')
  if isinstance(value, str):
    if language is None:
      raise DataError("'translation' is a string: add 'translation_language'")
    value = {language: value}
  if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
    raise DataError(f"'translation' should map languages to texts, not {value!r}")
  translations = {languages.check(language): text for language, text in value.items()}
  if len(translations) < len(value):
    raise DataError(f"'translation' has a language twice: {', '.join(value)}")
  return translations


def _tasks(fields: Mapping[str, Any]) -> tuple[str, ...]:
  tasks = fields.get('task', [])
  tasks = tasks if isinstance(tasks, list) else [tasks]
  for i, task in enumerate(tasks):
    if not isinstance(task, str) or not re.fullmatch('asr|lid|st_[a-z]{2,3}', task):
      raise DataError(f"unknown task {task!r}: 'asr', 'lid', or as 'st_eng'")
    if task.startswith('st_'):
      tasks[i] = task = f'st_{languages.check(task[3:])}'
    if task == 'asr' and 'text' not in fields:
      raise DataError("missing field 'text', which the task 'asr' needs")
    if task.startswith('st_') and task[3:] not in fields['translation']:
      raise DataError(f'missing translation into {task[3:]!r}, which {task!r} needs')
  return tuple(tasks)


def _bounds(
  fields: Mapping[str, Any], probe: audio_io.Probe, max_seconds: float
) -> tuple[float, float]:
  """Start and end of the utterance in seconds, checked against the file."""
  if probe.problem:
    raise DataError(probe.problem)
  length = probe.seconds
  start, end = float(fields.get('start', 0)), float(fields.get('end', length))
  if end > length + _SLACK:
    raise DataError(f"'end' is {end:g} s but {fields['audio']} has {length:.2f} s")
  end = min(end, length)
  if end - start < MIN_SECONDS:
    raise DataError(f'too short: {end - start:.2f} s of {fields["audio"]}')
  if end - start > max_seconds:
    raise DataError(f'too long: {end - start:.1f} s, at most {max_seconds:g} are allowed')
  return start, end


def _entries(
  path: Path, parsed: Mapping[int, Any], bounds: Mapping[int, tuple[float, float]]
) -> list[Entry]:
  """Entries with groups and splits: lines that share a text are one group."""
  keys = []
  for fields in parsed.values():
    texts = {fields['language']: fields.get('text', ''), **fields['translation']}
    shared = [(k, splits.text_key(v)) for k, v in texts.items() if splits.text_key(v)]
    named = [('group', fields['group'])] if fields.get('group') else []
    keys.append(named or shared or [('audio', fields['audio'])])
  entries = []
  for (number, fields), first in zip(parsed.items(), splits.connected(keys)):
    start, end = bounds[number]
    group = ':'.join(keys[first][0])
    record = Record(
      id=fields['id'],
      source=f'manifest:{path.name}',
      language=fields['language'],
      text=fields.get('text'),
      translations=fields['translation'],
      num_samples=round((end - start) * SAMPLE_RATE),
      group=group,
      speaker=fields.get('speaker', ''),
      tasks=fields['task'],
    )
    split = _SPLIT_NAMES[fields.get('split') or splits.split_of(group)]
    entries.append(Entry(record, fields['audio'], start, end, split))
  return entries


def _probe_all(paths: Iterable[str], data_dir: Path) -> dict[str, audio_io.Probe]:
  """Probes files by a pool of threads; what is known of unchanged files is reused."""
  cache = data_dir / 'manifests' / 'probes-2.json'  # numbered by what a probe tells
  known = json.loads(cache.read_text(encoding='utf-8')) if cache.exists() else {}
  stamps = {path: _stamp(path) for path in paths}
  new = sorted(p for p, stamp in stamps.items() if known.get(p, [None])[0] != stamp)
  if new:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      found = pool.map(lambda path: audio_io.probe(Path(path)), new)
      for path, probe in zip(new, track(found, len(new), 'checking audio', 'files')):
        known[path] = [stamps[path], *probe]
    atomic.write_text(cache, json.dumps(known, ensure_ascii=False))
  return {path: audio_io.Probe(*known[path][1:]) for path in stamps}


def _stamp(path: str) -> list[int]:
  try:
    stat = os.stat(path)
  except (OSError, ValueError):  # the latter of a path that no file can have
    return []
  return [stat.st_mtime_ns, stat.st_size]


@functools.cache
def _warn(report: str) -> None:
  """Logs a report once, however many splits are opened."""
  logging.warning('skipping bad lines of %s', report)


def load(
  path: Path,
  split: str,
  data_dir: Path,
  skip_bad: bool = False,
  max_seconds: float = 30,
  max_chars: int = 1000,
) -> 'Manifest':
  """Opens a split of a manifest.

  Args:
    path: the manifest.
    split: 'train', 'validation' or 'test'.
    data_dir: the cache folder.
    skip_bad: leave out bad lines, and log the report once, instead of raising it.
    max_seconds: see `check`.
    max_chars: see `check`.

  Raises:
    ManifestError: there are bad lines (with the report), or no good line in the split.
  """
  splits.check_split(split)
  report = check(path, data_dir, max_seconds, max_chars)
  if report.problems:
    if not skip_bad:
      raise ManifestError(
        f'{report}\n  mend these lines, or skip them with --config.skip_bad '
        '(--config.points.NAME.skip_bad in a sweep)'
      )
    _warn(str(report))
  entries = [entry for entry in report.entries if entry.split == split]
  if not entries:
    raise ManifestError(
      f'the manifest {path} has no good line in the split {split!r}; "split" '
      'puts a line where it is wanted'
    )
  content = ''.join(
    json.dumps([dataclasses.asdict(entry), _stamp(entry.path)], ensure_ascii=False) + '\n'
    for entry in entries
  )
  digest = hashlib.sha256(content.encode()).hexdigest()[:16]
  index = data_dir / 'manifests' / f'{digest}.jsonl'
  atomic.write_text(index, content)
  return Manifest(index)


class Manifest:
  """A split of a checked manifest as a source; audio is decoded on demand.

  Args:
    index: what `load` wrote: the entries, named by their hash.
  """

  def __init__(self, index: Path):
    self._index = index
    with open(index, encoding='utf-8') as lines:
      rows = [json.loads(line)[0] for line in lines]
    self.records = [store.to_record(row['record']) for row in rows]
    self._parts = [(row['path'], row['start'], row['end']) for row in rows]
    self.name = self.records[0].source
    self.fingerprint = index.stem

  def __len__(self) -> int:
    return len(self.records)

  def audio(self, i: int) -> np.ndarray:
    """Audio of record i: int16 [S] at 16 kHz. Raises DataError where undecodable."""
    path, start, end = self._parts[i]
    audio = audio_io.load(Path(path), start, end)
    missing = self.records[i].num_samples - len(audio)
    if missing > _SLACK * SAMPLE_RATE:
      raise DataError(f'{path} is shorter than when it was checked: is it being written?')
    return np.pad(audio, (0, max(missing, 0)))[: self.records[i].num_samples]

  def __reduce__(self):
    return type(self), (self._index,)
