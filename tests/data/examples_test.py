"""Which examples a source gives, and what is reported."""

import dataclasses
import re

import pytest
import tones

from gatedfm.data import examples, pipeline, text, tokenizer, types

TASKS = ('asr', 'lid', 'st_eng')


@pytest.fixture(scope='module')
def source():
  return tones.ToneSource(40)


@pytest.fixture(scope='module')
def tokens(source):
  texts = [
    text.normalize(words)
    for record in source.records
    for words in (record.text, *record.translations.values())
    if words
  ]
  return tokenizer.Tokenizer.train(texts, 70, ('fra', 'rus'), TASKS)


def build(source, tokens, **settings):
  return examples.build_examples([source], tokens, pipeline.DataConfig(**settings))


def edited(source, i, **changes):
  copy = tones.ToneSource(len(source))
  copy.records[i] = dataclasses.replace(copy.records[i], **changes)
  return copy


def test_every_task_that_a_record_serves(source, tokens):
  built, skipped = build(source, tokens)
  assert not skipped
  expected = [
    (u, task)
    for u, record in enumerate(source.records)
    for task in TASKS
    if task == 'lid'
    or (task == 'asr' and record.text is not None)
    or (task == 'st_eng' and record.translations)
  ]
  names = [TASKS[task] for task in built.task]
  assert list(zip(built.utterance.tolist(), names)) == expected
  assert len(expected) == 3 * 40 - 8


def test_rows_hold_what_the_decoder_and_ctc_are_to_write(source, tokens):
  for notimestamps in (False, True):
    built, _ = build(source, tokens, notimestamps=notimestamps)
    for e in range(len(built)):
      record = source.records[built.utterance[e]]
      task = TASKS[built.task[e]]
      target = [tokens.tokens[i] for i in built.row(built.target[e])]
      labels = built.row(built.transcript[e])
      assert len(target) == built.target_lengths[e]
      assert len(labels) == built.transcript_lengths[e]
      if task == 'lid':
        assert target == [f'<{record.language}>']
        assert built.language[e] == 0
        assert len(labels) == 0
        continue
      prefix = [f'<{record.language}>', f'<{task}>'] + ['<notimestamps>'] * notimestamps
      assert target[: len(prefix)] == prefix
      assert target[-1] == '<eos>'
      words = record.text if task == 'asr' else record.translations['eng']
      assert tokens.decode(built.row(built.target[e])) == text.normalize(words)
      assert tokens.decode(labels) == text.normalize(record.text or '')
      assert built.language[e] == 1 + ('fra', 'rus').index(record.language)


def test_lid_may_train_ctc(source, tokens):
  built, _ = build(source, tokens, tasks=('lid',), lid_ctc=True)
  assert sum(built.transcript >= 0) == 36


def test_loss_weights_go_by_the_name_of_a_task(source, tokens):
  assert build(source, tokens)[0].loss_weights.tolist() == [1, 1, 1]
  built, _ = build(source, tokens, tasks=('st_eng', 'asr'), loss_weights=(3.0, 0.5))
  assert built.loss_weights.tolist() == [0.5, 1, 3]


def test_a_record_may_restrict_its_tasks(source, tokens):
  built, skipped = build(edited(source, 0, tasks=('lid',)), tokens)
  assert [TASKS[t] for t in built.task[built.utterance == 0]] == ['lid']
  assert not skipped


@pytest.mark.parametrize(
  ('changes', 'reason', 'left'),
  [
    ({'language': 'deu'}, 'language deu is none of the tokenizer: fra rus', 0),
    ({'num_samples': 256}, '256 samples, at least 257', 0),
    ({'num_samples': 16_000 * 31}, '3101 frames, limit 3001', 0),
    ({'text': '?!'}, 'asr: no letter', 2),
    ({'text': 'un chat ' * 40}, r'asr: \d+ tokens, limit 256', 2),
    ({'translations': {'eng': 'the cat ' * 200}}, r'st_eng: \d+ tokens, limit 256', 2),
  ],
)
def test_what_cannot_be_used_is_reported(source, tokens, changes, reason, left):
  built, skipped = build(edited(source, 0, **changes), tokens)
  assert len(skipped) == 1
  assert skipped[0][0] == 'tones/0'
  assert re.search(reason, skipped[0][1])
  assert sum(built.utterance == 0) == left


def test_errors(source, tokens):
  with pytest.raises(ValueError, match=r"'st_deu'.*asr lid st_eng"):
    build(source, tokens, tasks=('st_deu',))
  with pytest.raises(types.DataError, match=r'tones serves any.*frames, limit 10'):
    build(source, tokens, max_frames=10)


def test_several_sources_and_selection(source, tokens):
  other = tones.ToneSource(4, name='other', seed=1)
  config = pipeline.DataConfig(tasks=('asr',))
  built, _ = examples.build_examples([source, other], tokens, config)
  assert sum(built.source == 1) == 4
  chosen = built.select(built.source == 1)
  assert len(chosen) == 4
  assert tokens.decode(chosen.row(chosen.transcript[0])) == text.normalize(other.records[0].text)
