"""SentencePiece unigram tokens with OWSM's prefix symbols, in OWSM's order."""

import base64
import functools
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from gatedfm import atomic
from gatedfm.data.types import DataError

_FORMAT = 'gatedfm-tokenizer-1'
_TIMES = tuple(f'<{i / 50:.2f}>' for i in range(1501))  # 0 to 30 s in steps of 20 ms
_TASK_NAME = re.compile('asr|lid|st_[a-z]{3}')


class Tokenizer:
  """Text to token ids and back.

  Order of the vocabulary, as in OWSM (ESPnet egs2/owsm_v3.1/s2t1): `<blank>` (0, the CTC
  blank), `<unk>` (1), the symbols `<na> <nospeech>`, languages, tasks, `<notimestamps>`
  and optionally 1501 times, then the SentencePiece pieces, then `<sos> <eos> <sop>`.

  Attributes:
    languages: ISO 639-3 codes, in the order of their context ids.
    tasks: 'asr', 'lid' or 'st_xxx' (translation to xxx), in the order of their ids.
    timestamps: whether the 1501 time symbols are part of the vocabulary.
    blank, unk, na, sos, eos, sop: token ids.
    vocab_size: number of tokens.
  """

  def __init__(
    self,
    model: bytes,
    languages: Sequence[str],
    tasks: Sequence[str],
    timestamps: bool = False,
  ):
    """Wraps a trained SentencePiece model, of which id 0 is the unknown piece."""
    self.languages = tuple(languages)
    self.tasks = tuple(tasks)
    self.timestamps = timestamps
    self._model = model
    self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    head = _head(self.languages, self.tasks, timestamps)
    self._first_piece = len(head)
    last_piece = len(head) + self._pieces.get_piece_size() - 1
    self.blank, self.unk, self.na = 0, 1, head.index('<na>')
    self.sos, self.eos, self.sop = range(last_piece, last_piece + 3)
    self.vocab_size = last_piece + 3
    self._symbols = {symbol: i for i, symbol in enumerate(head)}
    self._symbols |= {'<sos>': self.sos, '<eos>': self.eos, '<sop>': self.sop}

  def __reduce__(self):
    return Tokenizer, (self._model, self.languages, self.tasks, self.timestamps)

  @classmethod
  def train(
    cls,
    texts: Iterable[str],
    vocab_size: int,
    languages: Sequence[str],
    tasks: Sequence[str],
    timestamps: bool = False,
  ) -> 'Tokenizer':
    """Trains a unigram model; deterministic in its arguments.

    Args:
      texts: normalised texts (`gatedfm.data.text.normalize`), of all languages to be
        written: transcripts and translations.
      vocab_size: size of the whole vocabulary, symbols included.
      languages: ISO 639-3 codes, distinct.
      tasks: 'asr', 'lid', 'st_xxx', distinct.
      timestamps: adds the 1501 time symbols.

    Raises:
      ValueError: a language or task of another form or twice, no text, or a vocabulary
        that the texts cannot fill or that does not hold every character once; the message
        says which sizes would do.
    """
    head = _head(tuple(languages), tuple(tasks), timestamps)
    texts = [text for text in texts if text]
    if not texts:
      raise ValueError('the tokenizer needs at least one text to train on')
    symbols = len(head) + 3
    num_characters = len(set(''.join(texts)) - {' '}) + 1  # and the word-start mark
    if vocab_size < symbols + num_characters:
      raise ValueError(
        f'vocabulary size {vocab_size} is too small: {symbols} symbols and '
        f'{num_characters} characters need at least {symbols + num_characters}; raise vocab'
      )
    model = io.BytesIO()
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type='unigram',
        vocab_size=vocab_size - symbols + 1,  # and its own unknown piece
        character_coverage=1.0,
        normalization_rule_name='identity',
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,  # sums in one order
        max_sentence_length=1 << 20,  # bytes; longer ones would be left out silently
        minloglevel=2,
      )
    except RuntimeError as error:
      largest = re.search(r'value <= (\d+)', str(error))
      if not largest:
        raise
      raise ValueError(
        f'vocabulary size {vocab_size} is too large for {len(texts)} texts: the largest '
        f'that they can fill is {int(largest[1]) - 1 + symbols}; lower vocab to that'
      ) from error
    return cls(model.getvalue(), languages, tasks, timestamps)

  def save(self, path: Path | str) -> None:
    """Writes the tokenizer to one JSON file, atomically."""
    content = {
      'format': _FORMAT,
      'languages': self.languages,
      'tasks': self.tasks,
      'timestamps': self.timestamps,
      'sentencepiece': base64.b64encode(self._model).decode('ascii'),
    }
    atomic.write_text(Path(path), json.dumps(content, indent=1) + '\n')

  @classmethod
  def load(cls, path: Path | str) -> 'Tokenizer':
    """Reads what `save` wrote.

    Raises:
      DataError: the file is not a tokenizer, or damaged.
    """
    try:
      content = json.loads(Path(path).read_text(encoding='utf-8'))
      if content['format'] != _FORMAT:
        raise ValueError(f'its format is {content["format"]!r}')
      model = base64.b64decode(content['sentencepiece'], validate=True)
      return cls(model, content['languages'], content['tasks'], content['timestamps'])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:  # the last: SentencePiece's
      raise DataError(
        f'{path} is not a tokenizer file ({_FORMAT}) or damaged ({e!r}): copy it again from '
        'where the model was trained'
      ) from e

  def encode(self, text: str) -> list[int]:
    """Token ids of a normalised text; characters never seen in training become <unk>."""
    return [self._first_piece + i - 1 if i else self.unk for i in self._pieces.encode(text)]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids; every symbol (<unk> included) is dropped.

    Raises:
      ValueError: an id outside the vocabulary.
    """
    ids = [int(i) for i in ids]
    wrong = [i for i in ids if not 0 <= i < self.vocab_size]
    if wrong:
      raise ValueError(f'token id {wrong[0]} is outside 0..{self.vocab_size - 1}')
    pieces = range(self._first_piece, self.sos)
    return self._pieces.decode([i - self._first_piece + 1 for i in ids if i in pieces])

  def token_id(self, token: str) -> int:
    """Id of a symbol such as '<fra>' or '<st_eng>'.

    Raises:
      ValueError: no such symbol; the message lists those that there are.
    """
    if token not in self._symbols:
      known = ' '.join(s for s in self._symbols if s not in _TIMES)
      raise ValueError(f'no symbol {token!r} in the vocabulary; it has {known}')
    return self._symbols[token]

  @functools.cached_property
  def tokens(self) -> tuple[str, ...]:
    """Every token as text, by id."""
    head = _head(self.languages, self.tasks, self.timestamps)
    pieces = map(self._pieces.id_to_piece, range(1, self._pieces.get_piece_size()))
    return (*head, *pieces, '<sos>', '<eos>', '<sop>')

  def language_id(self, language: str) -> int:
    """Context id of a language: 1 + its index; 0 stands for an unknown language.

    Raises:
      ValueError: not one of `languages`.
    """
    if language not in self.languages:
      raise ValueError(
        f'unknown language {language!r}; this tokenizer has {" ".join(self.languages)}'
      )
    return 1 + self.languages.index(language)

  def task_id(self, task: str) -> int:
    """Context id of a task: its index.

    Raises:
      ValueError: not one of `tasks`.
    """
    if task not in self.tasks:
      raise ValueError(f'unknown task {task!r}; this tokenizer has {" ".join(self.tasks)}')
    return self.tasks.index(task)


def check_tasks(tasks: Sequence[str]) -> None:
  """Raises ValueError unless there are tasks, distinct and each of them asr, lid or st_xxx."""
  _check_distinct('task', tasks)
  for task in tasks:
    if not _TASK_NAME.fullmatch(task):
      raise ValueError(f'task {task!r} is none of asr, lid, st_xxx (xxx a language)')


def _check_distinct(kind: str, names: Sequence[str]) -> None:
  if len(set(names)) < len(names) or not names:
    raise ValueError(f'{kind}s must be distinct and at least one, got {names}')


def _head(languages: tuple[str, ...], tasks: tuple[str, ...], timestamps: bool) -> tuple[str, ...]:
  """The tokens before the pieces."""
  _check_distinct('language', languages)
  for language in languages:
    if not re.fullmatch('[a-z]{3}', language):
      raise ValueError(f'language {language!r} is not an ISO 639-3 code such as fra')
  check_tasks(tasks)
  return (
    '<blank>',
    '<unk>',
    '<na>',
    '<nospeech>',
    *(f'<{language}>' for language in languages),
    *(f'<{task}>' for task in tasks),
    '<notimestamps>',
    *(_TIMES if timestamps else ()),
  )
