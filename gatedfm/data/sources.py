"""Sources of speech by name: what a configuration writes, and the source that it means."""

import inspect
import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatedfm.data import fetch, splits
from gatedfm.data import languages as languages_lib
from gatedfm.data.types import LANGUAGES, DataError, Source

KNOWN = {
  'stamps': 'human recordings of short descriptions in nine languages (Debian package)',
  'asterisk': 'studio prompts for language identification, split test only (Debian)',
  'espeak': 'synthetic speech of names and numbers; needs no download',
  'espeak:stamps': 'synthetic voices that read the texts of stamps',
  'espeak:phrases': 'synthetic voices that read random common words; text as much as one wants',
  'manifest:PATH': "a JSONL manifest of one's own data",
  'auto': 'stamps where apt-get exists or they are prepared, espeak elsewhere',
}


def data_folder(given: str = '') -> Path:
  """Where data is prepared: what is given, else $GATEDFM_DATA, else ~/.cache/gatedfm."""
  return Path(given or os.environ.get('GATEDFM_DATA') or '~/.cache/gatedfm').expanduser()


def load(spec: str, split: str, data_dir: Path | None = None, skip_bad: bool = False) -> Source:
  """Opens a split of a source, preparing it when it is asked for the first time.

  Args:
    spec: a key of `KNOWN`, with options as in a URL: 'asterisk?max_items=100',
      'espeak:stamps?voices=2&languages=fra,spa', 'manifest:my.jsonl?max_seconds=20'.
    split: 'train', 'validation' or 'test'.
    data_dir: the cache folder, `data_folder()` by default.
    skip_bad: leave out bad lines of a manifest instead of stopping there.

  Raises:
    DataError: unknown source, option or split, or data that cannot be had.
  """
  splits.check_split(split)
  opener, options, path = parse(spec)
  data_dir = Path(data_dir) if data_dir else data_folder()
  if opener is _manifest:
    return _manifest(split, data_dir, Path(path).expanduser(), skip_bad, **options)
  return opener(split, data_dir, **options)


def resolve(spec: str, data_dir: Path) -> str:
  """What `auto` means on this machine; any other spec as it stands.

  Args:
    spec: see `load`.
    data_dir: the cache folder.
  """
  if spec != 'auto':
    return spec
  if fetch.has_apt():
    return 'stamps'
  from gatedfm.data import stamps

  return 'stamps' if stamps.folder(data_dir).exists() else 'espeak'


def parse(spec: str) -> tuple[Callable[..., Source], dict[str, Any], str]:
  """Opener, its options and what follows a colon (a manifest's path); prepares nothing.

  Raises:
    DataError: unknown source or option, or a bad value.
  """
  name, _, query = spec.partition('?')
  kind, _, path = name.partition(':')
  opener = _manifest if kind == 'manifest' and path else _OPENERS.get(name)
  if opener is None:
    known = '\n'.join(f'  {key:<14} {what}' for key, what in KNOWN.items())
    raise DataError(f'unknown source {spec!r}; known are\n{known}')
  return opener, _options(spec, query, opener), path


def _options(spec: str, query: str, opener: Callable[..., Source]) -> dict[str, Any]:
  """Options of a spec, by the keyword parameters that the opener declares."""
  known = {
    name: parameter.annotation
    for name, parameter in inspect.signature(opener).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  }
  options = {}
  for name, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
    if name not in known:
      names = ', '.join(known) or 'none'
      raise DataError(f'unknown option {name!r} of source {spec!r}; known are: {names}')
    try:
      options[name] = (_languages if known[name] is tuple else known[name])(value)
    except ValueError as error:
      raise DataError(f'bad option {name!r} of source {spec!r}: {error}') from error
  return options


def _languages(value: str) -> tuple[str, ...]:
  return tuple(languages_lib.check(language) for language in value.split(','))


# The packages behind the sources load when a source is first opened.


def _auto(split: str, data_dir: Path) -> Source:
  return load(resolve('auto', data_dir), split, data_dir)


def _stamps(split: str, data_dir: Path) -> Source:
  from gatedfm.data import stamps

  return stamps.Stamps(stamps.prepare(data_dir), split)


def _asterisk(
  split: str,
  data_dir: Path,
  *,
  languages: tuple = ('fra', 'spa', 'rus'),
  max_items: int = 0,
) -> Source:
  from gatedfm.data import asterisk

  return asterisk.load(split, data_dir, languages, max_items or None)


def _espeak(
  split: str,
  data_dir: Path,
  *,
  languages: tuple = LANGUAGES,
  voices: int = 1,
  seed: int = 0,
) -> Source:
  from gatedfm.data import espeak, parallel_terms

  terms = parallel_terms.terms(languages)
  return espeak.load(split, data_dir, 'espeak', terms, languages, voices, seed)


def _espeak_stamps(
  split: str,
  data_dir: Path,
  *,
  languages: tuple = LANGUAGES,
  voices: int = 1,
  seed: int = 0,
) -> Source:
  from gatedfm.data import espeak, stamps

  texts = stamps.texts(stamps.prepare(data_dir))
  return espeak.load(split, data_dir, 'espeak:stamps', texts, languages, voices, seed)


def _espeak_phrases(
  split: str,
  data_dir: Path,
  *,
  languages: tuple = LANGUAGES,
  number: int = 1000,
  voices: int = 1,
  seed: int = 0,
) -> Source:
  from gatedfm.data import espeak, phrases

  texts = phrases.phrases(languages, number)
  return espeak.load(split, data_dir, 'espeak:phrases', texts, languages, voices, seed)


def _manifest(
  split: str,
  data_dir: Path,
  path: Path,
  skip_bad: bool,
  *,
  max_seconds: float = 30.0,
  max_chars: int = 1000,
) -> Source:
  from gatedfm.data import manifest

  return manifest.load(path, split, data_dir, skip_bad, max_seconds, max_chars)


_OPENERS = {
  'auto': _auto,
  'stamps': _stamps,
  'asterisk': _asterisk,
  'espeak': _espeak,
  'espeak:stamps': _espeak_stamps,
  'espeak:phrases': _espeak_phrases,
}
