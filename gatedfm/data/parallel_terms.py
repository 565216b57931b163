"""Short texts in several languages with their translations: names and numbers."""

import functools
import re

from gatedfm.data import languages as languages_lib
from gatedfm.data import splits
from gatedfm.data.types import LANGUAGES, DataError, Parallel

# Sparse beyond a hundred, to keep the numbers from outweighing the names.
_NUMBERS = (*range(100), *range(100, 1000, 37), *range(1000, 10_000, 970))
_SALT = 'terms-0'


@functools.cache
def terms(languages: tuple[str, ...] = LANGUAGES) -> list[Parallel]:
  """Countries, languages, currencies, months, days (Babel) and numbers (num2words).

  Args:
    languages: ISO 639-3; English is added. Some have no numbers.

  Returns:
    Names known in all these languages, and numbers, with their group (terms that share a
    text in any language) and split 80/10/10.

  Raises:
    DataError: a language that Babel lacks.
  """
  wanted = tuple(dict.fromkeys((*languages, 'eng')))
  names = {language: _names(language) for language in wanted}
  numbers = {language: _numbers(language) for language in wanted}
  ids = [i for i in names['eng'] if all(i in names[language] for language in wanted)]
  ids += list(numbers['eng'])
  known = {language: names[language] | numbers[language] for language in wanted}
  texts = [{lang: known[lang][i] for lang in wanted if i in known[lang]} for i in ids]
  keys = [[(k, splits.text_key(v)) for k, v in text.items()] for text in texts]
  firsts = splits.connected(keys)
  groups = [splits.text_key(texts[first]['eng']) for first in firsts]
  return [
    Parallel(id, text, group, splits.split_of(group, _SALT))
    for id, text, group in zip(ids, texts, groups)
  ]


def _names(language: str) -> dict[str, str]:
  import babel

  try:
    locale = babel.Locale.parse(languages_lib.CODES.get(language, language))
  except babel.UnknownLocaleError as error:
    raise DataError(f'Babel knows no names in {language!r}: drop this language') from error
  tables = {
    'territory': {k: v for k, v in locale.territories.items() if not k.isdigit()},
    'language': locale.languages,
    'currency': locale.currencies,
    'month': locale.months['stand-alone']['wide'],
    'day': locale.days['stand-alone']['wide'],
  }
  # Words only: what is read aloud should not hang on how a symbol or a digit is read.
  words = re.compile(r"[^\W\d_]+(?:[\s’'-]+[^\W\d_]+)*")
  return {
    f'{table}/{key}': name
    for table, entries in tables.items()
    for key, name in entries.items()
    if words.fullmatch(name)
  }


def _numbers(language: str) -> dict[str, str]:
  import num2words

  code = languages_lib.CODES.get(language, language)
  if code not in num2words.CONVERTER_CLASSES:
    return {}
  return {f'number/{n}': num2words.num2words(n, lang=code) for n in _NUMBERS}
