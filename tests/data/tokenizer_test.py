"""Order, round trips and errors of the tokenizer."""

import json
import pickle
import re

import pytest
import tones

from gatedfm.data import text, tokenizer
from gatedfm.data.types import DataError

LANGUAGES, TASKS = ('fra', 'rus'), ('asr', 'lid', 'st_eng')
TEXTS = [
  text.normalize(words)
  for record in tones.ToneSource(60).records
  for words in (record.text, *record.translations.values())
  if words
]


@pytest.fixture(scope='module')
def trained():
  return tokenizer.Tokenizer.train(TEXTS, 70, LANGUAGES, TASKS)


def test_vocabulary_has_the_order_of_owsm(trained):
  head = '<blank> <unk> <na> <nospeech> <fra> <rus> <asr> <lid> <st_eng> <notimestamps>'
  assert trained.tokens[:10] == tuple(head.split())
  assert trained.tokens[-3:] == ('<sos>', '<eos>', '<sop>')
  assert len(trained.tokens) == len(set(trained.tokens)) == trained.vocab_size == 70
  assert (trained.blank, trained.unk, trained.na) == (0, 1, 2)
  assert (trained.sos, trained.eos, trained.sop) == (67, 68, 69)
  assert not any(re.fullmatch('<.*>', piece) for piece in trained.tokens[10:-3])
  for i, token in enumerate(trained.tokens[2:10], 2):
    assert trained.token_id(token) == i


def test_pieces_spell_the_text(trained):
  ids = trained.encode(TEXTS[0])
  assert ''.join(trained.tokens[i] for i in ids) == '▁' + TEXTS[0].replace(' ', '▁')


def test_round_trip_drops_symbols_and_marks_unknown_characters(trained):
  for words in TEXTS:
    ids = trained.encode(words)
    assert trained.decode([trained.sos, 4, 6, *ids, trained.eos, 0, 1, 2]) == words
  assert trained.unk in trained.encode('ж')
  assert trained.encode('') == []
  assert trained.decode([]) == ''


def test_training_is_deterministic_and_survives_saving(trained, tmp_path):
  again = tokenizer.Tokenizer.train(TEXTS, 70, LANGUAGES, TASKS)
  again.save(tmp_path / 'deep' / 'tokenizer.json')
  loaded = tokenizer.Tokenizer.load(tmp_path / 'deep' / 'tokenizer.json')
  assert [path.name for path in (tmp_path / 'deep').iterdir()] == ['tokenizer.json']
  for other in (loaded, pickle.loads(pickle.dumps(trained))):
    assert other.tokens == trained.tokens
    assert (other.languages, other.tasks) == (LANGUAGES, TASKS)
    assert [other.encode(t) for t in TEXTS] == [trained.encode(t) for t in TEXTS]


def test_timestamps_follow_notimestamps():
  timed = tokenizer.Tokenizer.train(TEXTS, 1571, LANGUAGES, TASKS, timestamps=True)
  first = timed.token_id('<notimestamps>') + 1
  assert timed.tokens[first : first + 2] == ('<0.00>', '<0.02>')
  assert timed.tokens[first + 1500] == '<30.00>'
  assert timed.decode([first, *timed.encode(TEXTS[0]), first + 1500]) == TEXTS[0]


def test_error_says_the_largest_and_smallest_size():
  with pytest.raises(ValueError, match='too large') as error:
    tokenizer.Tokenizer.train(TEXTS, 5000, LANGUAGES, TASKS)
  largest = int(re.search(r'can fill is (\d+)', str(error.value))[1])
  assert tokenizer.Tokenizer.train(TEXTS, largest, LANGUAGES, TASKS).vocab_size == largest
  with pytest.raises(ValueError, match='too large'):
    tokenizer.Tokenizer.train(TEXTS, largest + 1, LANGUAGES, TASKS)
  with pytest.raises(ValueError, match='too small') as error:
    tokenizer.Tokenizer.train(TEXTS, 30, LANGUAGES, TASKS)
  smallest = int(re.search(r'at least (\d+)', str(error.value))[1])
  assert tokenizer.Tokenizer.train(TEXTS, smallest, LANGUAGES, TASKS).vocab_size == smallest


def test_context_ids_and_errors(trained):
  assert [trained.language_id(language) for language in LANGUAGES] == [1, 2]
  assert [trained.task_id(task) for task in TASKS] == [0, 1, 2]
  with pytest.raises(ValueError, match=r"'deu'.*fra rus"):
    trained.language_id('deu')
  with pytest.raises(ValueError, match=r"'st_fra'.*asr lid st_eng"):
    trained.task_id('st_fra')
  with pytest.raises(ValueError, match=r'<deu>.*<fra> <rus>'):
    trained.token_id('<deu>')
  with pytest.raises(ValueError, match=r'70 is outside 0..69'):
    trained.decode([70])


@pytest.mark.parametrize(
  ('texts', 'languages', 'tasks', 'message'),
  [
    ([''], LANGUAGES, TASKS, 'at least one text'),
    (TEXTS, ('fra', 'fra'), TASKS, 'distinct'),
    (TEXTS, ('fr',), TASKS, 'ISO 639-3'),
    (TEXTS, LANGUAGES, ('translate',), 'st_xxx'),
    (TEXTS, LANGUAGES, (), 'at least one'),
  ],
)
def test_bad_arguments(texts, languages, tasks, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.Tokenizer.train(texts, 70, languages, tasks)


def test_other_and_damaged_files_are_refused(trained, tmp_path):
  trained.save(tmp_path / 'whole')
  whole = (tmp_path / 'whole').read_text()
  model = json.loads(whole)['sentencepiece']
  damaged = [whole[:-100], whole.replace(model, model[:-7]), whole.replace(model, model[400:])]
  contents = [b'{"a": 1}', b'[]', b'\xff\xfe', b'hello', whole.replace('-1"', '-9"').encode()]
  for content in [*contents, *(x.encode() for x in damaged)]:
    (tmp_path / 'file').write_bytes(content)
    with pytest.raises(DataError, match=f'{tmp_path}/file is not a tokenizer'):
      tokenizer.Tokenizer.load(tmp_path / 'file')
