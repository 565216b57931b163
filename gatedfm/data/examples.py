"""What a model is asked about each utterance: one example per utterance and task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gatedfm.data import features, text, types
from gatedfm.data.data_config import DataConfig
from gatedfm.data.tokenizer import Tokenizer

NO_TEXT = -1


@dataclasses.dataclass(frozen=True)
class Examples:
  """Examples as arrays, E of them, ordered by source, utterance and task.

  Attributes:
    source: i32 [E], which of the sources that were given.
    utterance: i32 [E], which record of that source.
    frames: i32 [E], feature frames.
    task: i32 [E], the tokenizer's task id.
    language: i32 [E], the tokenizer's context id; 0 where the task is to find it.
    target: i32 [E], row of the decoder's target: <lang> <task> [<notimestamps>] pieces
      <eos>, or <lang> alone for 'lid'.
    transcript: i32 [E], row of the CTC labels, -1 where there are none.
    tokens: i32 [all tokens], the rows one after the other.
    offsets: i64 [rows + 1], where each row starts.
    sos: token id with which the decoder's input starts.
    tasks: names of the task ids.
    loss_weights: f32 [tasks], by task id, of an example's loss.
  """

  source: np.ndarray
  utterance: np.ndarray
  frames: np.ndarray
  task: np.ndarray
  language: np.ndarray
  target: np.ndarray
  transcript: np.ndarray
  tokens: np.ndarray
  offsets: np.ndarray
  sos: int
  tasks: tuple[str, ...]
  loss_weights: np.ndarray

  def __len__(self) -> int:
    return len(self.utterance)

  def select(self, rows: np.ndarray) -> Examples:
    """The examples `rows` (i64 [n] or bool [E]) alone, numbered anew in that order."""
    columns = ('source', 'utterance', 'frames', 'task', 'language', 'target', 'transcript')
    return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in columns})

  def row(self, row: int) -> np.ndarray:
    """Token ids of one row, i32 [its length]; none for row -1."""
    if row == NO_TEXT:
      return self.tokens[:0]
    return self.tokens[self.offsets[row] : self.offsets[row + 1]]

  @property
  def target_lengths(self) -> np.ndarray:
    """i64 [E], tokens of the decoder's target."""
    return np.diff(self.offsets)[self.target]

  @property
  def transcript_lengths(self) -> np.ndarray:
    """i64 [E], CTC labels; 0 where there are none."""
    return np.append(np.diff(self.offsets), 0)[self.transcript]


def build_examples(
  sources: Sequence[types.Source], tokenizer: Tokenizer, config: DataConfig
) -> tuple[Examples, list[tuple[str, str]]]:
  """Makes an example of every utterance for every task that it can serve.

  A task that a record has no text for, or does not allow, is passed over: 'asr' needs the
  transcript, 'st_xxx' the translation to xxx, 'lid' neither. CTC labels are the
  transcript, whatever the task (as in ESPnet's `text_ctc`), but for 'lid', unless
  `config.lid_ctc`: recognising the words is not part of finding the language.

  Args:
    sources: one or several; the order counts.
    tokenizer: knows the languages and tasks.
    config: sound; `tasks`, `loss_weights`, `max_frames`, `max_tokens`, `notimestamps`,
      `lid_ctc` are read.

  Returns:
    The examples, and (record id, reason) for all that could not be used.

  Raises:
    ValueError: a task that the tokenizer does not know.
    DataError: no example is left; the message has the first reasons.
  """
  task_ids = {task: tokenizer.task_id(task) for task in config.tasks}
  loss_weights = np.ones(len(tokenizer.tasks), np.float32)
  if config.loss_weights:
    loss_weights[list(task_ids.values())] = config.loss_weights
  table, columns, skipped = _Table(), [], []
  for s, source in enumerate(sources):
    for u, record in enumerate(source.records):
      reason = _unusable(record, tokenizer, config)
      if reason:
        skipped.append((record.id, reason))
        continue
      frames = int(features.num_frames(record.num_samples))
      for task in config.tasks:
        words = _words(record, task)
        if words is None:
          continue
        pieces = tokenizer.encode(text.normalize(words))
        if task != 'lid' and not 0 < len(pieces) <= config.max_tokens:
          what = f'{len(pieces)} tokens, limit {config.max_tokens}'
          reason = what if pieces else 'no letter in the text'
          skipped.append((record.id, f'{task}: {reason}'))
          continue
        lid = task == 'lid'
        target = [tokenizer.token_id(f'<{record.language}>')]
        if not lid:
          target.append(tokenizer.token_id(f'<{task}>'))
          if config.notimestamps:
            target.append(tokenizer.token_id('<notimestamps>'))
          target += [*pieces, tokenizer.eos]
        transcript = NO_TEXT
        if record.text is not None and (not lid or config.lid_ctc):
          labels = tokenizer.encode(text.normalize(record.text))
          if 0 < len(labels) <= config.max_tokens:
            transcript = table.add(labels)
        language = 0 if lid else tokenizer.language_id(record.language)
        columns.append((s, u, frames, task_ids[task], language, table.add(target), transcript))
  if not columns:
    reasons = '; '.join(f'{name}: {reason}' for name, reason in skipped[:3])
    raise types.DataError(
      f'no utterance of {", ".join(s.name for s in sources)} serves any of the tasks '
      f'{" ".join(config.tasks)}: {reasons or "no text for them"}'
    )
  arrays = np.array(columns, np.int32).T.copy()
  examples = Examples(*arrays, *table.arrays(), tokenizer.sos, tokenizer.tasks, loss_weights)
  return examples, skipped


def _unusable(record: types.Record, tokenizer: Tokenizer, config: DataConfig) -> str | None:
  if record.language not in tokenizer.languages:
    known = ' '.join(tokenizer.languages)
    return f'language {record.language} is none of the tokenizer: {known}'
  if record.num_samples < features.MIN_SAMPLES:
    return f'{record.num_samples} samples, at least {features.MIN_SAMPLES} are needed'
  frames = features.num_frames(record.num_samples)
  if frames > config.max_frames:
    return f'{frames} frames, limit {config.max_frames}'
  return None


def _words(record: types.Record, task: str) -> str | None:
  """The text that the decoder is to write for `task`; None where it has no such task."""
  if record.tasks and task not in record.tasks:
    return None
  if task == 'lid':
    return ''
  return record.text if task == 'asr' else record.translations.get(task[3:])


class _Table:
  """Token rows, each distinct one kept once."""

  def __init__(self):
    self._rows = {}

  def add(self, tokens: Sequence[int]) -> int:
    return self._rows.setdefault(tuple(tokens), len(self._rows))

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all rows i32, their offsets i64 [rows + 1]."""
    lengths = [len(row) for row in self._rows]
    tokens = np.fromiter((i for row in self._rows for i in row), np.int32, sum(lengths))
    return tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
