"""Random phrases of a language's common words: text to be read aloud for training.

Word lists and frequencies: `wordfreq` (Speer, 2022).
"""

import collections
import functools
import hashlib
import re
import unicodedata

import numpy as np

from gatedfm.data import languages as languages_lib
from gatedfm.data import splits
from gatedfm.data.types import LANGUAGES, DataError, Parallel

_WORDS = 20_000  # most common ones
_LENGTHS = (0.25, 0.4, 0.35)  # shares of one, two and three words, as short descriptions have
_RARE_LETTER = 5e-4  # letters of a smaller share of the words are of other languages
_SALT = 'phrases-0'


def phrases(languages: tuple[str, ...] = LANGUAGES, number: int = 1000) -> list[Parallel]:
  """Phrases without meaning, one language each; the same on every machine.

  A word's chance falls with the root of its rank: in speech common words make up half of a
  text, here rarer ones get their turn.

  Args:
    languages: ISO 639-3; those that have no word list give no phrases.
    number: phrases per language, over all splits.

  Raises:
    DataError: none of the languages has a word list.
  """
  known = [x for x in languages if common_words(x)]
  if not known:
    raise DataError(f'no word list of {", ".join(languages)}; drop the source of phrases')
  return [p for language in known for p in _of(language, number)]


def _of(language: str, number: int) -> list[Parallel]:
  words = common_words(language)
  rng = np.random.default_rng(list(hashlib.sha256(f'{_SALT}\0{language}'.encode()).digest()))
  chance = 1 / np.sqrt(1 + np.arange(len(words)))
  drawn = rng.choice(len(words), (number, len(_LENGTHS)), p=chance / chance.sum())
  lengths = 1 + rng.choice(len(_LENGTHS), number, p=_LENGTHS)
  out = {}
  for row, length in zip(drawn, lengths):
    text = ' '.join(words[i] for i in row[:length])
    group = f'{language}:{text}'
    out[group] = Parallel(
      f'phrase/{text.replace(" ", "_")}', {language: text}, group, splits.split_of(group, _SALT)
    )
  return list(out.values())


@functools.cache
def common_words(language: str) -> tuple[str, ...]:
  """The most common words in the language's own letters, commonest first; () where unknown."""
  import wordfreq

  code = languages_lib.CODES.get(language, language)
  if code not in wordfreq.available_languages('best'):
    return ()
  # The list is case-folded, which turns a Greek word's closing sigma into another letter.
  words = [re.sub('σ$', 'ς', w) for w in wordfreq.top_n_list(code, _WORDS)]
  script = lambda w: {unicodedata.name(c).split()[0] for c in w if c != "'"}
  usual = collections.Counter(x for w in words for x in script(w)).most_common(1)[0][0]
  words = [w for w in words if script(w) == {usual}]
  letters = collections.Counter(c for w in words for c in set(w))
  return tuple(w for w in words if min(letters[c] for c in w) > _RARE_LETTER * len(words))
