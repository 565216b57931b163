"""Few-shot accuracy of language models by the likelihood of answers, and perplexity.

One program per shape of batches serves every choice of gates, so that a sweep of masks compiles
once; what all prompts begin with (shots, say) is read once and kept as keys and values. Letters: B
batch, L tokens, P targets, C choices, Q questions, S tokens of a prefix.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from gatedfm import compiling, metrics
from gatedfm.data import lm_batches, questions
from gatedfm.data.bpe import LmTokenizer
from gatedfm.data.lm_batches import LmBatch, Pair
from gatedfm.data.questions import Task
from gatedfm.data.types import DataError
from gatedfm.gates import Gates
from gatedfm.models.lm import for_inference
from gatedfm.models.lm_config import LmConfig
from gatedfm.models.lm_losses import Prefix, losses, read_prefix

LEAST = 24  # tokens of a prefix that is worth a program of its own
PREFIXES = 16


@dataclasses.dataclass(frozen=True)
class Answered:
  """What a model answered.

  Attributes:
    task, split, shots, seed: what was asked.
    scores: `[Q, C]` log-likelihoods of the choices, -inf where a question has fewer.
    answers: `[Q]` the right ones.
    blank: `[Q, C]` what it says of a question without content behind the same shots, or None.
  """

  task: str
  split: str
  shots: int
  seed: int
  scores: np.ndarray
  answers: np.ndarray
  blank: np.ndarray | None = None

  @property
  def correct(self) -> np.ndarray:
    """`[Q]` bool."""
    return self.scores.argmax(1) == self.answers

  def calibrated(self) -> Answered:
    """Judged by what content adds (Zhao et al., "Calibrate Before Use", 2021).

    Raises:
      DataError: asked without calibration.
    """
    if self.blank is None:
      raise DataError(f'{self.task} was asked without calibration: ask with calibrate=True')
    blank = np.where(np.isfinite(self.blank), self.blank, 0)
    return dataclasses.replace(self, scores=self.scores - blank, blank=None)

  def counts(self) -> metrics.Counts:
    """For accuracy, its interval, and paired differences."""
    return metrics.accuracy(self.correct, [self.task] * len(self.answers))


class Evaluator:
  """A language model that is asked.

  Args:
    cfg, params: of the model, in either layout, or compacted.
    tokenizer: its own.
    fixed: gates that compaction has fixed, else None.
    room: tokens at a time, B times L; of what prompts begin with, `PREFIXES` times as many.
    most: tokens of a prompt at most; longer ones lose their beginning.
    execution: `skip` saves the time of modules whose gates are closed, `mask` computes them.
  """

  def __init__(
    self,
    cfg: LmConfig,
    params: Any,
    tokenizer: LmTokenizer,
    fixed: Gates | None = None,
    room: int = 512,
    most: int = 1024,
    execution: str = 'skip',
  ):
    self._cfg, self._tokenizer, self._room = cfg, tokenizer, room
    self._most = min(most, cfg.max_tokens)
    model, params = for_inference(cfg, params, execution)
    self._params = _as_read(cfg, params)

    def targets(params, tokens, mask, at, gates, prefix) -> jax.Array:
      return losses(model, params, tokens, mask, at, fixed or gates, prefix=prefix)

    def choices(params, tokens, mask, at, answers_BxC, gates, prefix) -> jax.Array:
      return losses(model, params, tokens, mask, at, fixed or gates, answers_BxC, prefix)

    def read(params, tokens, mask, gates) -> Prefix:
      return read_prefix(model, params, tokens, mask, fixed or gates)

    self._targets, self._choices, self._read = (
      compiling.Programs(jax.jit(f)) for f in (targets, choices, read)
    )
    sites = (*cfg.all_sites(), *cfg.unit_sites())
    self._open = {s.name: np.ones((s.layers, s.units) if s.units > 1 else s.layers) for s in sites}

  def having(self, params: Any) -> Evaluator:
    """The same of other parameters of the same shapes, unrolled: nothing is compiled anew."""
    other = copy.copy(self)
    other._params = _as_read(self._cfg, params)
    return other

  def _gates(self, gates: Gates | None) -> Gates:
    """Of all sites, so that any choice of them runs in the same program."""
    given = {} if gates is None else gates.values
    whole = {n: np.broadcast_to(given.get(n, g), g.shape) for n, g in self._open.items()}
    return Gates({n: np.asarray(g, np.float32) for n, g in whole.items()})

  def _context(self, text: str) -> tuple[int, ...]:
    """A beginning of text, where the model has one, and the text."""
    return (*self._cfg.start, *self._tokenizer.encode(text))

  def log_likelihoods(
    self,
    prompts: Sequence[tuple[str, Sequence[str]]],
    gates: Gates | None = None,
  ) -> np.ndarray:
    """Of each prompt's choices, `[Q, C]`; -inf where a prompt has fewer choices than another.

    Args:
      prompts: texts with the choices that may follow, a space between them.
      gates: 0 or 1 (or between: `execution='mask'`) per site; sites not named are open.
    """
    widest = max(len(choices) for _, choices in prompts)
    out = np.full((len(prompts), widest), -np.inf)
    encoded = [
      (self._context(text), [tuple(self._tokenizer.encode(f' {c}', follows=True)) for c in choices])
      for text, choices in prompts
    ]
    gates = self._gates(gates)
    encoded, prefix = self._begin(encoded, gates)
    if all(len(c) == 1 for _, choices in encoded for c in choices):
      self._of_one_token(encoded, gates, prefix, out)
      return out
    where, pairs = [], []
    for q, (context, choices) in enumerate(encoded):
      for c, choice in enumerate(choices):
        where.append((q, c))
        pairs.append(Pair(context, choice))
    for b, loss_BxP in self._losses(pairs, gates, prefix):
      for row in np.flatnonzero(b.number >= 0):
        out[where[b.number[row]]] = -np.sum(loss_BxP[row] * b.weight[row])
    return out

  def _begin(self, encoded: Sequence, gates: Gates) -> tuple[Sequence, Prefix | None]:
    """Reads what all prompts begin with; returns what is left of them, a token at least."""
    contexts = [context for context, _ in encoded]
    longest = max(len(context) + max(map(len, choices)) for context, choices in encoded)
    # Positions of the padding in front are free: they are counted over tokens alone.
    same = next(
      (i for i, tokens in enumerate(zip(*contexts)) if len(set(tokens)) > 1),
      min(map(len, contexts)),
    )
    same = min(same, min(map(len, contexts)) - 1)
    if same < LEAST or longest > self._most or len(contexts) == 1:
      return encoded, None
    length = lm_batches.padded_length(same, self._most)
    tokens_1xS, mask_1xS = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
    tokens_1xS[0, length - same :], mask_1xS[0, length - same :] = contexts[0][:same], True
    prefix = self._read(length, self._params, tokens_1xS, mask_1xS, gates)
    return [(context[same:], choices) for context, choices in encoded], prefix

  def _of_one_token(
    self, encoded: Sequence, gates: Gates, prefix: Prefix | None, out: np.ndarray
  ) -> None:
    """All choices of a prompt at once: each is a token after it."""
    pairs = [Pair(context, choices[0]) for context, choices in encoded]
    for b in self._batches(pairs, prefix):
      answers_BxC = np.zeros((len(b.number), out.shape[1]), np.int32)
      real = np.flatnonzero(b.number >= 0)
      for row in real:
        ids = [choice[0] for choice in encoded[b.number[row]][1]]
        answers_BxC[row, : len(ids)] = ids
      args = self._params, b.tokens, b.mask, b.at, answers_BxC, gates, prefix
      key = b.tokens.shape, answers_BxC.shape, _length(prefix)
      loss_BxC = np.asarray(self._choices(key, *args))
      for row in real:
        number = len(encoded[b.number[row]][1])
        out[b.number[row], :number] = -loss_BxC[row, :number]

  def _losses(
    self, pairs: Sequence[Pair], gates: Gates, prefix: Prefix | None = None
  ) -> Iterable[tuple[LmBatch, np.ndarray]]:
    """Each batch with its targets' losses, `[B, P]`."""
    for b in self._batches(pairs, prefix):
      args = self._params, b.tokens, b.mask, b.at, gates, prefix
      yield b, np.asarray(self._targets((b.tokens.shape, b.at.shape, _length(prefix)), *args))

  def _batches(self, pairs: Sequence[Pair], prefix: Prefix | None) -> Iterable[LmBatch]:
    # Each row has a copy of the prefix's keys and values.
    rows = None if prefix is None else max(1, PREFIXES * self._room // _length(prefix))
    return lm_batches.batches(pairs, self._room, self._most, self._cfg.padding, rows)

  def ask(
    self,
    task: Task,
    split: str = 'test',
    number: int = 200,
    shots: int = 0,
    seed: int = 0,
    gates: Gates | None = None,
    calibrate: bool = False,
    shared: bool = False,
  ) -> Answered:
    """Answers questions of a task.

    Args:
      task: of `questions.load`.
      split: train, validation or test.
      number: at most so many questions.
      shots: answered questions of the training split in front of each.
      seed: of the questions and shots that are drawn.
      gates: see `log_likelihoods`.
      calibrate: asks a question without content, too, for `Answered.calibrated`.
      shared: whether all questions have the same shots, which are then read once.

    Raises:
      DataError: a split without questions, or a task that cannot be calibrated.
    """
    drawn = questions.sample(task, split, number, shots, seed, shared)
    prompt = lambda question, shown: (task.prompt(question, shown), question.choices)
    asked, blanks = [prompt(q, shown) for q, shown in drawn], []
    if calibrate:
      if task.blank is None:
        raise DataError(f'{task.name} has no question without content: ask without calibration')
      blanks = [prompt(task.blank, shown) for _, shown in drawn]
    each = list(dict.fromkeys(blanks))
    scores, blank = np.split(self.log_likelihoods([*asked, *each], gates), [len(asked)])
    blank = blank[[each.index(b) for b in blanks]] if blanks else None
    answers = np.array([question.answer for question, _ in drawn])
    return Answered(task.name, split, shots, seed, scores, answers, blank)

  def perplexity(self, text: str, window: int = 512, gates: Gates | None = None) -> float:
    """Of a text's tokens, each given those before it in its window of `window`."""
    window = min(window, self._most)
    pairs = lm_batches.windows(self._tokenizer.encode(text), window, self._cfg.start)
    total = count = 0.0
    for b, loss_BxP in self._losses(pairs, self._gates(gates)):
      total += float(np.sum(loss_BxP * b.weight))
      count += float(np.sum(b.weight))
    return float(np.exp(total / count))


def _as_read(cfg: LmConfig, params: Any) -> Any:
  """Matrices as narrow as products read them, which would convert them each time."""
  narrow = np.dtype(cfg.dtype).itemsize
  small = lambda x: x.astype(cfg.dtype) if x.ndim > 1 and x.dtype.itemsize > narrow else x
  return jax.tree.map(small, params)


def _length(prefix: Prefix | None) -> int:
  return 0 if prefix is None else prefix.mask_1xS.shape[1]
