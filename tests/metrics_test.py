from importlib import metadata

import jiwer
import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from gatedfm import metrics

TEXTS = st.text('ab ', max_size=8).map(lambda text: ' '.join(text.split()))


def test_character_errors_of_each_language_and_their_mean():
  counts = metrics.character_errors(
    ['chat', 'le chien', 'gato'], ['chot', 'le chie', ''], ['fra', 'fra', 'spa']
  )
  assert counts.scores() == pytest.approx({'fra': 2 / 12, 'spa': 1.0, 'mean': (2 / 12 + 1) / 2})
  assert counts.pooled() == pytest.approx(6 / 16)
  assert counts.signature == f'jiwer:{metadata.version("jiwer")}'


def test_word_errors_count_substitutions_deletions_and_insertions():
  counts = metrics.word_errors(
    ['le chat noir', 'un deux trois', 'oui'],
    ['le chien noir', 'un trois', 'oui mais non'],
    ['fra'] * 3,
  )
  np.testing.assert_array_equal(counts.rows_ExK, [[1, 3], [1, 3], [2, 1]])
  assert counts.scores()['fra'] == pytest.approx(4 / 7)


def test_words_against_an_empty_reference_are_insertions():
  counts = metrics.character_errors(['', 'ab'], ['xyz', 'ab'], ['fra', 'fra'])
  assert counts.scores()['fra'] == pytest.approx(3 / 2)


@given(st.lists(st.tuples(TEXTS.filter(bool), TEXTS), min_size=1, max_size=6))
def test_error_rates_are_those_of_jiwer(pairs):
  references, hypotheses = map(list, zip(*pairs))
  languages = ['fra'] * len(pairs)
  cer = metrics.character_errors(references, hypotheses, languages).scores()['fra']
  wer = metrics.word_errors(references, hypotheses, languages).scores()['fra']
  assert cer == pytest.approx(jiwer.cer(references, hypotheses))
  assert wer == pytest.approx(jiwer.wer(references, hypotheses))


def test_bleu_by_hand():
  counts = metrics.bleu(['the cat sat on the mat'], ['the cat sat on a mat'], ['fra-eng'])
  by_hand = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
  assert counts.scores()['fra-eng'] == pytest.approx(by_hand)
  assert counts.tokenization == '13a'
  assert 'eff:yes' in counts.signature
  assert 'tok:13a' in counts.signature


def test_bleu_of_perfect_short_sentences_is_100():
  texts = ['dog', 'a cat']
  assert sacrebleu.BLEU().corpus_score(texts, [texts]).score == 0
  counts = metrics.bleu(texts, texts, ['fra-eng', 'fra-eng'])
  assert counts.scores()['fra-eng'] == pytest.approx(100)


def test_chrf_by_hand():
  # 1-grams: one of two; 2-grams: none of one; longer ones do not exist.
  counts = metrics.chrf(['ab'], ['ac'], ['fra-eng'])
  assert counts.scores()['fra-eng'] == pytest.approx(25)
  assert 'nc:6' in counts.signature


@pytest.mark.parametrize(
  ('metric', 'scorer'),
  [(metrics.bleu, sacrebleu.BLEU(effective_order=True)), (metrics.chrf, sacrebleu.CHRF())],
)
def test_translation_scores_are_those_of_sacrebleu(metric, scorer):
  references = ['the red house', 'a dog barks at night', 'big', 'it is a small bird']
  hypotheses = ['the house', 'a dog barks in the night', '', 'it is a small bird']
  counts = metric(references, hypotheses, ['spa-eng', 'spa-eng', 'fra-eng', 'fra-eng'])
  for name, part in (('spa-eng', slice(0, 2)), ('fra-eng', slice(2, 4))):
    expected = scorer.corpus_score(hypotheses[part], [references[part]]).score
    assert counts.scores()[name] == pytest.approx(expected)
  assert counts.signature == str(scorer.get_signature())


def test_identification_and_confusion():
  references = ['fra', 'fra', 'fra', 'cat']
  hypotheses = ['fra', 'cat', '', 'cat']
  counts = metrics.identification(references, hypotheses)
  assert counts.scores() == pytest.approx({'cat': 1, 'fra': 1 / 3, 'mean': 2 / 3})
  assert counts.pooled() == 0.5
  assert metrics.confusion(references, hypotheses) == {
    'cat': {'cat': 1},
    'fra': {'': 1, 'cat': 1, 'fra': 1},
  }


def test_interval_of_an_accuracy_is_the_binomial_one():
  counts = metrics.identification(['fra'] * 400, ['fra', 'spa'] * 200)
  result = metrics.interval(counts, resamples=4000, seed=1)
  assert result.value == 0.5
  half_width = 1.96 * np.sqrt(0.25 / 400)
  assert result.low == pytest.approx(0.5 - half_width, abs=0.006)
  assert result.high == pytest.approx(0.5 + half_width, abs=0.006)
  assert result == metrics.interval(counts, resamples=4000, seed=1)
  assert result != metrics.interval(counts, resamples=4000, seed=2)


def test_resamples_keep_the_size_of_each_language():
  # Were utterances drawn over languages, the mean of a perfect and a lost one would move.
  counts = metrics.identification(['fra'] * 5 + ['spa'] * 5, ['fra'] * 10)
  result = metrics.interval(counts)
  assert (result.low, result.value, result.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize('metric', [metrics.character_errors, metrics.bleu, metrics.chrf])
def test_a_system_does_not_differ_from_itself(metric):
  counts = metric(['ab cd', 'ef gh'] * 9, ['ab cd', 'e'] * 9, ['fra', 'spa'] * 9)
  result = metrics.difference_interval(counts, counts, resamples=50)
  assert (result.low, result.value, result.high) == (0, 0, 0)


def test_paired_difference_sees_what_two_intervals_do_not():
  rng = np.random.default_rng(0)
  references = ['abcdefghij'] * 200
  errors = rng.integers(0, 8, 200)
  baseline = ['x' * n + 'abcdefghij'[n:] for n in errors]
  system = ['x' * (n + 1) + 'abcdefghij'[n + 1 :] for n in errors]
  counts = [metrics.character_errors(references, h, ['fra'] * 200) for h in (system, baseline)]
  difference = metrics.difference_interval(*counts)
  assert difference.value == pytest.approx(0.1)
  assert difference.low == pytest.approx(0.1)
  assert metrics.interval(counts[0]).high - metrics.interval(counts[0]).low > 0.03


def test_a_resample_of_empty_references_alone_is_survived():
  counts = metrics.character_errors(['', 'ab'], ['', 'ab'], ['fra', 'fra'])
  assert metrics.interval(counts) == metrics.Interval(0, 0, 0)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='2 references, 1 hypotheses and 2'):
    metrics.word_errors(['a', 'b'], ['a'], ['fra', 'fra'])
  with pytest.raises(ValueError, match='no utterance'):
    metrics.bleu([], [], [])
  with pytest.raises(ValueError, match="all references of 'spa' are empty"):
    metrics.character_errors(['a', ''], ['a', 'b'], ['fra', 'spa'])
  one = metrics.identification(['fra'], ['fra'])
  two = metrics.identification(['fra', 'spa'], ['fra', 'spa'])
  with pytest.raises(ValueError, match='same utterances'):
    metrics.difference_interval(one, two)
