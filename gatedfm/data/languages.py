"""Language codes: ISO 639-3 in the project, other codes only where people or data write them."""

import re

from gatedfm.data.types import DataError

# ISO 639-3 by the two-letter code of ISO 639-1, or the longer one where there is none.
BY_CODE = {
  'ach': 'ach', 'af': 'afr', 'am': 'amh', 'an': 'arg', 'ar': 'ara', 'as': 'asm',
  'ast': 'ast', 'az': 'aze', 'be': 'bel', 'bg': 'bul', 'bn': 'ben', 'bs': 'bos',
  'ca': 'cat', 'ceb': 'ceb', 'ckb': 'ckb', 'cs': 'ces', 'cy': 'cym', 'da': 'dan',
  'de': 'deu', 'el': 'ell', 'en': 'eng', 'eo': 'epo', 'es': 'spa', 'et': 'est',
  'eu': 'eus', 'fa': 'fas', 'ff': 'ful', 'fi': 'fin', 'fil': 'fil', 'fr': 'fra',
  'ga': 'gle', 'gd': 'gla', 'gl': 'glg', 'gu': 'guj', 'ha': 'hau', 'he': 'heb',
  'hi': 'hin', 'hr': 'hrv', 'hu': 'hun', 'hy': 'hye', 'id': 'ind', 'ig': 'ibo',
  'is': 'isl', 'it': 'ita', 'iu': 'iku', 'ja': 'jpn', 'jv': 'jav', 'ka': 'kat',
  'kab': 'kab', 'kam': 'kam', 'kea': 'kea', 'kk': 'kaz', 'km': 'khm', 'kn': 'kan',
  'ko': 'kor', 'ky': 'kir', 'la': 'lat', 'lb': 'ltz', 'lg': 'lug', 'ln': 'lin',
  'lo': 'lao', 'lt': 'lit', 'luo': 'luo', 'lv': 'lav', 'mi': 'mri', 'mk': 'mkd',
  'ml': 'mal', 'mn': 'mon', 'mr': 'mar', 'ms': 'msa', 'mt': 'mlt', 'my': 'mya',
  'nb': 'nob', 'ne': 'nep', 'nl': 'nld', 'nn': 'nno', 'nso': 'nso', 'ny': 'nya',
  'oc': 'oci', 'om': 'orm', 'or': 'ori', 'pa': 'pan', 'pl': 'pol', 'ps': 'pus',
  'pt': 'por', 'ro': 'ron', 'ru': 'rus', 'sd': 'snd', 'sk': 'slk', 'sl': 'slv',
  'sn': 'sna', 'so': 'som', 'son': 'son', 'sq': 'sqi', 'sr': 'srp', 'sv': 'swe',
  'sw': 'swa', 'ta': 'tam', 'te': 'tel', 'tg': 'tgk', 'th': 'tha', 'tl': 'tgl',
  'tr': 'tur', 'uk': 'ukr', 'umb': 'umb', 'ur': 'urd', 'uz': 'uzb', 'vec': 'vec',
  'vi': 'vie', 'wo': 'wol', 'xh': 'xho', 'yo': 'yor', 'yue': 'yue', 'zh': 'zho',
  'zu': 'zul',
}  # fmt: skip
CODES = {language: code for code, language in BY_CODE.items()}
BY_CODE['cmn'] = 'zho'


def check(language: object) -> str:
  """Returns ISO 639-3 for a code of the table (`fr` -> `fra`) or of that form (`fra`).

  Raises:
    DataError: anything else, with the right code where it is known ('fr_FR' -> 'fra').
  """
  if isinstance(language, str):
    if language in BY_CODE or re.fullmatch('[a-z]{3}', language):
      return BY_CODE.get(language, language)
    code = re.split('[-_]', language.lower())[0]
    if suggestion := BY_CODE.get(code, code if code in CODES else None):
      raise DataError(f'bad language code {language!r}: write {suggestion!r} (ISO 639-3)')
  raise DataError(f"bad language code {language!r}: write it as in 'fr' or 'fra'")
