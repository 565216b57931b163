"""Texts of one split stand in no other; a vocabulary holds what it is told to."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedfm.data import texts
from gatedfm.data.types import SPLITS, DataError


def write(folder, rows, name='own.jsonl'):
  path = folder / name
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def numbers(n):
  return [{'text': f'Number {i} is here', 'label': ['even', 'odd'][i % 2]} for i in range(n)]


def test_words_are_those_of_word_vectors():
  found = texts.words("He didn't say it's 3.5 in the U.S. (well-known) -LRB- can't ... ``x''")
  want = "he did n't say it 's 3.5 in the u.s. ( well-known ) -lrb- ca n't ... `` x ''"
  assert list(found) == want.split()
  assert texts.words('What is it ?') == texts.words('what is it?')


def test_splits_are_fixed_and_share_no_text(tmp_path):
  rows = numbers(300) + [{'text': f'number {i}, IS here!', 'label': 'odd'} for i in range(50)]
  one = texts.load(write(tmp_path, rows))
  assert one.labels == ('even', 'odd')
  assert one.dropped == 50
  held = {split: {words for words, _ in one.splits[split]} for split in SPLITS}
  assert sum(map(len, held.values())) == 300
  for a in SPLITS:
    assert all(held[a].isdisjoint(held[b]) for b in SPLITS if a != b)
    assert abs(len(held[a]) / 300 - dict(zip(SPLITS, texts.FRACTIONS))[a]) < 0.08
  other = texts.load(write(tmp_path, rows[100:300], 'other.jsonl'))
  for split in SPLITS:
    assert {words for words, _ in other.splits[split]} <= held[split]


def test_csv_with_splits(tmp_path):
  path = tmp_path / 'own.csv'
  lines = [f'"a text, number {i}",{i % 2},{split}' for i, split in enumerate(SPLITS * 2)]
  path.write_text('\n'.join(['text,label,split', *lines]))
  found = texts.load(str(path))
  assert {split: len(rows) for split, rows in found.splits.items()} == dict.fromkeys(SPLITS, 2)


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([{'text': 'a'}], "line 1: has no 'label'; a line has text and label"),
    ([{'text': ' ', 'label': 1}], 'an empty text'),
    ([{'text': 'a', 'label': 1, 'split': 'dev'}], "split 'dev'"),
    ([{'text': 3, 'label': 1}], 'text is a text'),
    ([], 'holds no examples'),
    ([{'text': f'one {i}', 'label': 1} for i in range(50)], "one label, '1'"),
    (numbers(2), 'has no texts for'),
    (
      [{'text': 'a b', 'label': 1, 'split': s} for s in ('train', 'test')],
      "'a b' is in train and in test: take one out",
    ),
    (
      [{'text': f'a {s}', 'label': s, 'split': s} for s in SPLITS],
      'no text for training has the label test, validation',
    ),
  ],
)
def test_bad_files_are_named(rows, message, tmp_path):
  with pytest.raises(DataError, match=message):
    texts.load(write(tmp_path, rows))


def test_unknown_sets_are_refused():
  with pytest.raises(DataError, match='one of agnews'):
    texts.load('trek')
  with pytest.raises(DataError, match='cannot be read'):
    texts.load('none.csv')


TRAIN = [words.split() for words in ('a b a c', 'b a d', 'zz')]


def test_vocabulary_rules():
  plain = texts.vocabulary(TRAIN)
  assert plain.words == ('_PAD', 'a', 'b', 'c', 'd', 'zz')
  assert plain.counts.tolist() == [0, 3, 2, 1, 1, 1]
  assert texts.vocabulary(TRAIN, {'a', 'd', 'x'}).words == ('_PAD', 'a', 'd')
  assert texts.vocabulary(TRAIN, {'a'}, without_vector='keep').words == plain.words
  rare = texts.vocabulary(TRAIN, unknown='row', min_count=2)
  assert rare.words == ('_PAD', '_UNKNOWN', 'a', 'b')
  assert rare.counts.tolist() == [0, 3, 3, 2]
  assert texts.vocabulary(TRAIN, most=1).words == ('_PAD', 'a')
  with pytest.raises(DataError, match='no word'):
    texts.vocabulary(TRAIN, {'x'})
  with pytest.raises(DataError, match='drop, keep'):
    texts.vocabulary(TRAIN, without_vector='random')


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.lists(st.sampled_from('abcxy'), max_size=7), min_size=1, max_size=5),
  st.integers(1, 6),
  st.sampled_from(['drop', 'row']),
)
def test_texts_are_rows_of_the_vocabulary(some, longest, unknown):
  vocabulary = texts.vocabulary(TRAIN, unknown=unknown)
  ids, lengths = vocabulary.encode(some, longest, minimum=1)
  assert ids.shape[1] == max(1, *lengths)
  for text, row, length in zip(some, ids, lengths):
    known = [w if w in 'abcd' else '_UNKNOWN' for w in text if w in 'abcd' or unknown == 'row']
    assert [vocabulary.words[i] for i in row[:length]] == known[:longest]
    assert (row[length:] == texts.PAD).all()
    assert np.all(row[:length] != texts.PAD)
