"""Text normalisation."""

import unicodedata

import hypothesis
import pytest
from hypothesis import strategies

from gatedfm.data import text


@pytest.mark.parametrize(
  ('raw', 'expected'),
  [
    ('Hello, World!', 'hello world'),
    ('  a\t b\n', 'a b'),
    ("L’eau d'été, aujourd’hui", "l'eau d'été aujourd'hui"),
    ("« C'est ‘bon’ »", "c'est bon"),
    ('сям’я / сямʼя', "сям'я сям'я"),
    ('une arc‐en‑ciel - un train', 'une arc-en-ciel un train'),
    ('oui—non', 'oui non'),
    ('well--known', 'well known'),
    ('col·lecció co\u0140lecció col•lecció', 'col·lecció col·lecció col·lecció'),
    ('α· β·', 'α β'),
    ('fin·de', 'fin de'),
    ('Ο ΜΕΓΑΛΟΣ ΣΚΥΛΟΣ;', 'ο μεγαλος σκυλος'),
    ('за\u0301мок ѝ Й', 'замок ѝ й'),
    ('и\u0306', 'й'),
    ('e\u0301te\u0301', 'été'),
    ('ﬁn １２ ½', 'fin 12 1 2'),
    ('so\u00adft \ufefftext', 'soft text'),
    ('हिन्दी क्‍ष', 'हिन्दी क्‍ष'),
    ('Straße, İ', 'straße i\u0307'),
    ('?!… ¿« ©', ''),
    ('', ''),
  ],
)
def test_normalize(raw, expected):
  assert text.normalize(raw) == expected


@hypothesis.given(strategies.text())
def test_is_idempotent_and_clean(raw):
  once = text.normalize(raw)
  assert text.normalize(once) == once
  assert once == ' '.join(once.split())
  assert unicodedata.is_normalized('NFKC', once)
  kept = {unicodedata.category(c)[0] for c in once} - set('LMN')
  assert kept <= {unicodedata.category(c)[0] for c in " '-·\u200c\u200d"}
  for word in once.split():
    assert word[0].isalnum()
    assert word[-1] not in "'-·"
