"""Random phrases of common words, and sources that only training reads."""

import dataclasses
from pathlib import Path

import pytest
import tiny_run

from gatedfm.data import corpus, phrases, splits
from gatedfm.data.types import LANGUAGES, DataError


def test_phrases_are_the_same_every_time_and_of_one_language():
  once, again = phrases.phrases(('fra', 'ell'), 200), phrases.phrases(('ell', 'fra'), 200)
  assert {p.id: p for p in once} == {p.id: p for p in again}
  assert all(set(p.texts) <= {'fra', 'ell'} and len(p.texts) == 1 for p in once)
  greek = [p.texts['ell'] for p in once if 'ell' in p.texts]
  assert 190 < len(greek) == len(set(greek)) <= 200
  assert not any(c.isascii() and c.isalpha() for text in greek for c in text)
  # A sigma that closes a word is written as such.
  assert not any(word.endswith('σ') for text in greek for word in text.split())
  assert any(word.endswith('ς') for text in greek for word in text.split())


def test_phrases_are_short_and_varied():
  found = phrases.phrases(('spa',), 2000)
  words = [p.texts['spa'].split() for p in found]
  assert {len(w) for w in words} == {1, 2, 3}
  known = phrases.common_words('spa')
  rank = {word: i for i, word in enumerate(known)}
  ranks = [rank[w] for row in words for w in row]
  # By the root of the rank: half of the words are of the commonest quarter.
  assert 0.45 < sum(r < len(known) / 4 for r in ranks) / len(ranks) < 0.6


def test_phrases_stand_in_one_split():
  found = phrases.phrases(('rus',), 1000)
  assert all(p.split == splits.split_of(p.group, 'phrases-0') for p in found)
  assert 0.75 < sum(p.split == 'train' for p in found) / len(found) < 0.85


def test_languages_without_a_word_list():
  assert {p.id.split('/')[0] for p in phrases.phrases(LANGUAGES, 5)} == {'phrase'}
  assert not phrases.common_words('bel')
  with pytest.raises(DataError, match='no word list of bel; drop'):
    phrases.phrases(('bel',), 5)


def test_extra_sources_are_trained_on_and_never_scored(tone_data):
  cfg = tiny_run.dense(tone_data)
  assets = tiny_run.make_assets(cfg)
  data = dataclasses.replace(
    cfg.data, extra=('espeak:phrases?languages=fra&number=8',), max_frames=600
  )
  folder = Path(cfg.data_dir)
  opened = {s: corpus.open_split(data, assets, s, folder) for s in ('train', 'test')}
  names = {s: [x.name for x in split.sources] for s, split in opened.items()}
  assert names['train'] == [*names['test'], 'espeak:phrases']
  assert set(opened['train'].examples.source) == {0, 1}
  again = corpus.make_assets(data, cfg.vocab, folder, False)
  assert again.tokenizer.tokens == assets.tokenizer.tokens
