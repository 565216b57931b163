"""Scores of recognition, translation and language identification, with intervals.

Every metric here has the same shape: each utterance yields a row of counts, the rows of a
group add up, and the score is a function of the sum. `Counts` holds the rows, so one
implementation gives the corpus score of each group, their mean and the bootstrap:

  counts = metrics.character_errors(references, hypotheses, languages)
  counts.scores()                              # {'fra': 0.12, 'spa': 0.09, 'mean': 0.105}
  metrics.interval(counts, seed=0)             # 95% interval of the mean
  metrics.difference_interval(gated, dense)    # paired

Strings are taken as they come: normalise references and hypotheses alike with
`gatedfm.data.text.normalize` before calling.

Array letters: E utterances, K counts of one utterance, R bootstrap resamples.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from importlib import metadata

import jiwer
import numpy as np
import sacrebleu

MEAN = 'mean'


@dataclasses.dataclass(frozen=True)
class Counts:
  """What each utterance contributes to a score.

  Attributes:
    metric: 'cer', 'wer', 'bleu', 'chrf', 'lid' or 'accuracy'.
    rows_ExK: counts that add up over utterances.
    groups: E names: the language, or the direction 'fra-eng' of a translation.
    score_of: maps summed counts [R, K] to scores [R].
    tokenization: the units that were counted.
    signature: whatever else one needs to reproduce the score.
  """

  metric: str
  rows_ExK: np.ndarray
  groups: tuple[str, ...]
  score_of: Callable[[np.ndarray], np.ndarray]
  tokenization: str
  signature: str

  def scores(self) -> dict[str, float]:
    """The corpus score of each group, and under 'mean' their unweighted mean."""
    scores = {
      group: float(self.score_of(rows.sum(0, keepdims=True))[0])
      for group, rows in self.by_group().items()
    }
    return scores | {MEAN: float(np.mean(list(scores.values())))}

  def pooled(self) -> float:
    """The score of all utterances taken as one corpus."""
    return float(self.score_of(self.rows_ExK.sum(0, keepdims=True))[0])

  def by_group(self) -> dict[str, np.ndarray]:
    """The rows of each group, groups in alphabetical order."""
    names = np.asarray(self.groups)
    return {str(name): self.rows_ExK[names == name] for name in np.unique(names)}


@dataclasses.dataclass(frozen=True)
class Interval:
  """A measured value and the bounds of its percentile bootstrap interval."""

  value: float
  low: float
  high: float


def character_errors(
  references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str]
) -> Counts:
  """Character error rate by language, as a fraction of the reference characters.

  Spaces count as characters, as in jiwer and in ESPnet. An empty hypothesis is all
  deletions; what is said against an empty reference is all insertions.

  Args:
    references: E normalised transcripts.
    hypotheses: E normalised outputs, in the same order.
    languages: E language codes.

  Raises:
    ValueError: lengths differ, there is no utterance, or all references of a language
      are empty, so that its rate is undefined.
  """
  return _errors('cer', jiwer.process_characters, references, hypotheses, languages)


def word_errors(
  references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str]
) -> Counts:
  """Word error rate by language; words are separated by white space.

  Arguments, empty strings and errors as in `character_errors`.
  """
  return _errors('wer', jiwer.process_words, references, hypotheses, languages)


def bleu(references: Sequence[str], hypotheses: Sequence[str], directions: Sequence[str]) -> Counts:
  """Corpus BLEU (0 to 100) by direction such as 'fra-eng', with sacrebleu.

  The order is effective: it ends at the longest n-gram that the hypotheses of a corpus
  contain. Where sentences have one to four words a corpus may hold no 4-gram at all, and
  plain BLEU would give even a perfect output 0. On ordinary text both are equal. Empty
  hypotheses cost brevity; what is said against an empty reference costs precision.

  Raises:
    ValueError: as `character_errors`.
  """
  scorer = sacrebleu.BLEU(effective_order=True)
  return _translation('bleu', scorer, '13a', references, hypotheses, directions)


def chrf(references: Sequence[str], hypotheses: Sequence[str], directions: Sequence[str]) -> Counts:
  """Corpus chrF2 (0 to 100) by direction, with sacrebleu: character 1- to 6-grams.

  sacrebleu leaves an utterance with an empty reference out of chrF.

  Raises:
    ValueError: as `character_errors`.
  """
  scorer = sacrebleu.CHRF()
  return _translation('chrf', scorer, 'characters', references, hypotheses, directions)


def identification(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
  """Accuracy of language identification by true language; `pooled()` is the overall one.

  Args:
    references: E true language codes.
    hypotheses: E codes; '' where the model named no language, which is wrong.

  Raises:
    ValueError: lengths differ, there is no utterance, or a true language is empty.
  """
  _check(references, hypotheses, references)
  return _right('lid', np.asarray(references) == np.asarray(hypotheses), references, 'utterances')


def accuracy(correct: Sequence[bool], tasks: Sequence[str]) -> Counts:
  """Share of questions that were answered right, by task.

  Args:
    correct: E, whether each was.
    tasks: E names of where each is from.

  Raises:
    ValueError: lengths differ, or there is no question.
  """
  if len(correct) != len(tasks) or not len(tasks):
    raise ValueError(f'{len(correct)} answers to {len(tasks)} questions: give one of each')
  return _right('accuracy', np.asarray(correct, bool), tasks, 'questions')


def _right(metric: str, correct_E: np.ndarray, groups: Sequence[str], unit: str) -> Counts:
  rows_Ex2 = np.stack([correct_E, np.ones_like(correct_E)], axis=1).astype(np.int64)
  return Counts(metric, rows_Ex2, tuple(groups), _ratio, unit, '')


def confusion(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, dict[str, int]]:
  """How often each true language was taken for which: {true: {named: utterances}}.

  Raises:
    ValueError: as `identification`.
  """
  _check(references, hypotheses, references)
  counts = collections.defaultdict(collections.Counter)
  for reference, hypothesis in zip(references, hypotheses):
    counts[reference][hypothesis] += 1
  return {language: dict(sorted(counts[language].items())) for language in sorted(counts)}


def interval(
  counts: Counts, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
  """Bootstrap interval of the mean over groups.

  Utterances are redrawn with replacement within each group, so that a resample keeps the
  size of every language. Koehn (2004), "Statistical significance tests for machine
  translation evaluation".
  """
  means_R = _resampled_means(counts, resamples, seed)
  low, high = _percentiles(means_R, confidence)
  return Interval(counts.scores()[MEAN], low, high)


def difference_interval(
  system: Counts,
  baseline: Counts,
  *,
  resamples: int = 1000,
  seed: int = 0,
  confidence: float = 0.95,
) -> Interval:
  """Paired bootstrap interval of mean(system) - mean(baseline).

  Both are scored on the same redrawn utterances. The difference is told from none where
  the interval excludes 0.

  Raises:
    ValueError: the two are not counts of one metric over the same utterances.
  """
  if (system.metric, system.groups) != (baseline.metric, baseline.groups):
    raise ValueError(
      f'a paired difference needs one metric over the same utterances in the same order: '
      f'{system.metric} of {len(system.groups)} and {baseline.metric} of '
      f'{len(baseline.groups)} utterances were given'
    )
  differences_R = _resampled_means(system, resamples, seed) - _resampled_means(
    baseline, resamples, seed
  )
  low, high = _percentiles(differences_R, confidence)
  return Interval(system.scores()[MEAN] - baseline.scores()[MEAN], low, high)


def _errors(metric, process, references, hypotheses, languages):
  _check(references, hypotheses, languages)
  alignments = process(list(references), list(hypotheses)).alignments
  errors_E = [
    sum(
      max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
      for chunk in chunks
      if chunk.type != 'equal'
    )
    for chunks in alignments
  ]
  size = len if metric == 'cer' else lambda text: len(text.split())
  sizes_E = [size(reference.strip()) for reference in references]
  return Counts(
    metric,
    np.stack([errors_E, sizes_E], axis=1).astype(np.int64),
    tuple(languages),
    _ratio,
    'characters' if metric == 'cer' else 'white space',
    f'jiwer:{metadata.version("jiwer")}',
  )


def _translation(metric, scorer, tokenization, references, hypotheses, directions):
  _check(references, hypotheses, directions)
  # sacrebleu computes corpus scores and its own significance tests through this pair of
  # methods; its public ones give no counts, or take the seed from the environment.
  rows_ExK = scorer._extract_corpus_statistics(list(hypotheses), [list(references)])
  return Counts(
    metric,
    np.asarray(rows_ExK, np.int64),
    tuple(directions),
    functools.partial(_sacrebleu_scores, scorer),
    tokenization,
    str(scorer.get_signature()),
  )


def _sacrebleu_scores(scorer, sums_RxK):
  return np.asarray([scorer._compute_score_from_stats(s).score for s in sums_RxK.tolist()])


def _ratio(sums_Rx2):
  # _check sees to it that a corpus has units; a resample may draw empty references only.
  return sums_Rx2[:, 0] / np.maximum(sums_Rx2[:, 1], 1)


def _resampled_means(counts, resamples, seed):
  rng = np.random.default_rng(seed)
  scores = []
  for rows_ExK in counts.by_group().values():
    size = len(rows_ExK)
    draws_RxE = rng.multinomial(size, np.full(size, 1 / size), size=resamples)
    scores.append(counts.score_of(draws_RxE @ rows_ExK))
  return np.mean(scores, axis=0)


def _percentiles(values_R, confidence):
  tail = (1 - confidence) / 2
  low, high = np.quantile(values_R, [tail, 1 - tail])
  return float(low), float(high)


def _check(references, hypotheses, groups):
  if not len(references) == len(hypotheses) == len(groups):
    raise ValueError(
      f'{len(references)} references, {len(hypotheses)} hypotheses and {len(groups)} '
      'languages were given: each utterance needs one of each'
    )
  if not references:
    raise ValueError('there is no utterance to score: the evaluation set is empty')
  for name in sorted(set(groups)):
    if not any(r.strip() for r, g in zip(references, groups) if g == name):
      raise ValueError(
        f'all references of {name!r} are empty, so its score is undefined: leave this '
        'language out, or check its transcripts'
      )
