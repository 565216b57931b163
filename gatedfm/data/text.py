"""Text normalisation, shared by training targets and by scoring."""

import re
import unicodedata

_ZERO_WIDTH_JOINERS = '\u200c\u200d'  # spelling, in Persian and the Indic scripts
_JOINERS = "'-·" + _ZERO_WIDTH_JOINERS

# Spellings of one sign. Read before NFKC, which turns a spacing accent into a space.
_APOSTROPHES = "'`´‘’‛ʼʹˈ′＇΄᾽᾿"
_HYPHENS = '-‐‑﹣－'
_MIDDLE_DOTS = '·•∙⋅‧・'
_SPELLINGS = {
  **{ord(c): "'" for c in _APOSTROPHES},
  **{ord(c): '-' for c in _HYPHENS},
  **{ord(c): '·' for c in _MIDDLE_DOTS},
  **{ord(c): c for c in _ZERO_WIDTH_JOINERS},
  0x200B: ' ',  # zero-width space: a word boundary
}

_STRESS = re.compile('(?<=[\u0400-\u04ff])[\u0300\u0301]+')
_NO_GEMINATE_L = re.compile('(?<!l)·|·(?!l)')
_TWO_JOINERS = re.compile("['\\-]{2,}")


class _Before(dict):
  """Character table used before NFKC: unifies spellings, drops invisible characters."""

  def __missing__(self, code: int) -> str | None:
    category = unicodedata.category(chr(code))
    self[code] = {'Sk': ' ', 'Cf': None}.get(category, chr(code))
    return self[code]


class _After(dict):
  """Character table used after NFKC: all but letters, marks, numbers becomes a space."""

  def __missing__(self, code: int) -> str:
    keep = unicodedata.category(chr(code))[0] in 'LMN'
    self[code] = chr(code) if keep else ' '
    return self[code]


_BEFORE = _Before(_SPELLINGS)
_AFTER = _After({ord(c): c for c in _JOINERS})


def _trim(word: str) -> str:
  start = next((i for i, c in enumerate(word) if c.isalnum()), len(word))
  return word[start:].rstrip(_JOINERS)


def normalize(text: str) -> str:
  """Lower-cases, composes (NFKC) and strips punctuation and symbols; idempotent.

  Kept inside a word: apostrophe and hyphen in any of their spellings (`l’eau` ->
  `l'eau`, `сям’я` -> `сям'я`), the Catalan `l·l`, combining marks that no composed
  letter has, zero-width joiners. Stress accents on Cyrillic letters are dropped: they are
  annotation, not spelling. Every other punctuation mark or symbol separates words.

  Args:
    text: any Unicode text.

  Returns:
    The words, separated by single spaces; '' where the text has no letter or number.
  """
  text = unicodedata.normalize('NFKC', text.translate(_BEFORE)).lower()
  text = unicodedata.normalize('NFKC', _STRESS.sub('', text))
  text = _NO_GEMINATE_L.sub(' ', text.translate(_AFTER))
  text = _TWO_JOINERS.sub(' ', text)
  return ' '.join(filter(None, map(_trim, text.split())))
