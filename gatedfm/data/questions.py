"""Classification tasks as prompts for language models: few-shot sets of StaICC, or one's own.

Sources: the package StaICC (`staicc.py`). Splits are fixed by each text's hash, the same text in
the same split whatever the set, since some sets share sentences. One's own: JSONL or CSV with
`context`, `choices` and `answer`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm.data import rows, sources, staicc
from gatedfm.data.types import SPLITS, DataError

MOST_WORDS = 60  # of a text: few shots of longer ones fill a context


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked, what may be answered, and which of it is right."""

  context: str
  choices: tuple[str, ...]
  answer: int


@dataclasses.dataclass(frozen=True)
class Task:
  """A set of questions by split.

  Attributes:
    name: of the set.
    questions: by split.
    blank: the question without content, for contextual calibration; None where questions have
      no common form.
  """

  name: str
  questions: dict[str, list[Question]]
  blank: Question | None = None

  def prompt(self, question: Question, shots: Sequence[Question]) -> str:
    """The question behind answered ones; answers follow with a space in front."""
    answered = (f'{s.context} {s.choices[s.answer]}\n\n' for s in shots)
    return ''.join(answered) + question.context


# Names of the input and of the answer, which is a label.
_TEMPLATES: dict[str, tuple[str, str]] = {
  'agnews': ('Article', 'Topic'),
  'financial_phrasebank': ('Sentence', 'Sentiment'),
  'hate_speech_18': ('Post', 'Kind'),
  'rotten_tomatoes': ('Review', 'Sentiment'),
  'sst2': ('Review', 'Sentiment'),
  'sst5': ('Review', 'Sentiment'),
  'subjective': ('Text', 'Kind'),
  'trec': ('Question', 'Type'),
  'tweet_eval_emotion': ('Tweet', 'Emotion'),
  'tweet_eval_hate': ('Tweet', 'Kind'),
}
TASKS = tuple(_TEMPLATES)


def load(name: str, data_dir: Path | None = None) -> Task:
  """A set of StaICC by name, or a file ending in .jsonl or .csv.

  Raises:
    DataError: no such set or file, or one that is damaged.
  """
  if name.endswith(rows.SUFFIXES):
    return from_file(Path(name).expanduser())
  if name not in _TEMPLATES:
    raise DataError(f'no task {name!r}: give a .jsonl or .csv file, or one of {", ".join(TASKS)}')
  folder = (data_dir or sources.data_folder()) / 'few_shot'
  return _classification(name, staicc.rows(name, folder))


def _classification(name: str, texts: Sequence[tuple[str, int]]) -> Task:
  given, asked = _TEMPLATES[name]
  answers = staicc.LABELS[name]
  ask = lambda text, label: Question(f'{given}: {text}\n{asked}:', answers, label)
  questions: dict[str, list[Question]] = {split: [] for split in SPLITS}
  seen = set()
  for text, label in texts:
    key = text.lower()
    if text and len(text.split()) <= MOST_WORDS and key not in seen:
      seen.add(key)
      questions[split_of(key)].append(ask(text, label))
  return Task(name, questions, ask('N/A', 0))


def split_of(key: str) -> str:
  """Half for training, a fifth for validation, the rest for test, by hash."""
  place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big') / 2**64
  return 'train' if place < 0.5 else 'validation' if place < 0.7 else 'test'


def from_file(path: Path) -> Task:
  """One's own questions: JSONL, or CSV whose choices are separated by `|`.

  Each has `context`, `choices`, `answer` (a choice, or its number from 0), and may have `split`.

  Raises:
    DataError: naming the line and the mend.
  """
  questions: dict[str, list[Question]] = {split: [] for split in SPLITS}
  for split, question in rows.read(path, _question, 'context, choices and answer'):
    questions[split].append(question)
  return Task(path.stem, questions)


def _question(row: dict[str, Any]) -> tuple[str, Question]:
  context, choices, answer = row['context'], row['choices'], row['answer']
  choices = choices.split('|') if isinstance(choices, str) and '|' in choices else choices
  if not isinstance(choices, list) or not isinstance(answer, int | str):
    raise ValueError('choices are a list (in CSV separated by |), the answer is one or its number')
  choices = tuple(c.strip() for c in choices)
  if not context.strip() or len(choices) < 2 or not all(choices):
    raise ValueError('an empty context, or fewer than two choices')
  if isinstance(answer, str) and answer.strip() in choices:
    answer = choices.index(answer.strip())
  if not 0 <= int(answer) < len(choices):
    raise ValueError(f'answer {answer!r} is none of the choices')
  split = row.get('split') or split_of(context.lower())
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is none of {", ".join(SPLITS)}')
  return split, Question(context.rstrip(), choices, int(answer))


def sample(
  task: Task, split: str, number: int, shots: int, seed: int, shared: bool = False
) -> list[tuple[Question, list[Question]]]:
  """Questions of a split, each with answered ones of the training split, never itself.

  Args:
    task: where they are from.
    split: what is asked.
    number: at most so many questions, drawn without replacement.
    shots: answered questions each.
    seed: of the shots; and of the questions each seed has others, as long as there are enough.
    shared: whether all have the same shots (but itself, in the training split).

  Raises:
    DataError: a split without questions, or fewer for training than shots.
  """
  asked, train = task.questions[split], task.questions['train']
  if not asked:
    there = ', '.join(f'{len(found)} for {name}' for name, found in task.questions.items())
    raise DataError(
      f'{task.name} has no questions for {split} ({there}): ask of another split, or give some '
      f'lines of a file "split": "{split}"'
    )
  pool = len(train) - (split == 'train')
  if pool < shots:
    raise DataError(
      f'{task.name}: {shots} shots need as many other questions for training; there are {pool}: '
      'take fewer shots, or give more lines of a file "split": "train"'
    )
  rng = np.random.default_rng(seed)
  out, drawn = [], None
  order = np.random.default_rng(0).permutation(len(asked))
  for i in np.roll(order, -seed * number)[:number]:
    question = asked[i]
    if drawn is None or not shared:
      # One more than needed, should the question itself be among them.
      drawn = rng.choice(len(train), min(shots + 1, len(train)), replace=False) if shots else []
    others = [train[j] for j in drawn if train[j] is not question]
    out.append((question, others[:shots]))
  return out
