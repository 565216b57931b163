"""Few-shot accuracy of language models by the likelihood of answers, and perplexity.

One program per shape of batches serves every choice of gates, so that a sweep of masks compiles
once. Letters: B batch, L tokens, P targets, C choices, Q questions.
"""

from __future__ import annotations

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
from gatedfm.models.lm_losses import losses


@dataclasses.dataclass(frozen=True)
class Answered:
  """What a model answered.

  Attributes:
    task, split, shots, seed: what was asked.
    scores: `[Q, C]` log-likelihoods of the choices, -inf where a question has fewer.
    answers: `[Q]` the right ones.
  """

  task: str
  split: str
  shots: int
  seed: int
  scores: np.ndarray
  answers: np.ndarray

  @property
  def correct(self) -> np.ndarray:
    """`[Q]` bool."""
    return self.scores.argmax(1) == self.answers

  def counts(self) -> metrics.Counts:
    """For accuracy, its interval, and paired differences."""
    return metrics.accuracy(self.correct, [self.task] * len(self.answers))


class Evaluator:
  """A language model that is asked.

  Args:
    cfg, params: of the model, in either layout, or compacted.
    tokenizer: its own.
    fixed: gates that compaction has fixed, else None.
    rows: B, examples at a time.
    most: tokens of a prompt at most; longer ones lose their beginning.
  """

  def __init__(
    self,
    cfg: LmConfig,
    params: Any,
    tokenizer: LmTokenizer,
    fixed: Gates | None = None,
    rows: int = 8,
    most: int = 1024,
  ):
    self._cfg, self._tokenizer, self._rows = cfg, tokenizer, rows
    self._most = min(most, cfg.max_tokens)
    model, self._params = for_inference(cfg, params)

    def targets(params: Any, tokens, mask, at, gates) -> jax.Array:
      return losses(model, params, tokens, mask, at, fixed or gates)

    def choices(params: Any, tokens, mask, at, answers_BxC, gates) -> jax.Array:
      return losses(model, params, tokens, mask, at, fixed or gates, answers_BxC)

    self._targets = compiling.Programs(jax.jit(targets))
    self._choices = compiling.Programs(jax.jit(choices))
    sites = (*cfg.all_sites(), *cfg.unit_sites())
    self._open = {s.name: np.ones((s.layers, s.units) if s.units > 1 else s.layers) for s in sites}

  def _gates(self, gates: Gates | None) -> Gates:
    """Of all sites, so that any choice of them runs in the same program."""
    given = {} if gates is None else gates.values
    whole = {n: np.broadcast_to(given.get(n, g), g.shape) for n, g in self._open.items()}
    return Gates({n: np.asarray(g, np.float32) for n, g in whole.items()})

  def _context(self, text: str) -> tuple[int, ...]:
    """A beginning of text, where the model has one, and the text."""
    start = () if self._cfg.bos < 0 else (self._cfg.bos,)
    return (*start, *self._tokenizer.encode(text))

  def log_likelihoods(
    self,
    prompts: Sequence[tuple[str, Sequence[str]]],
    gates: Gates | None = None,
  ) -> np.ndarray:
    """Of each prompt's choices, `[Q, C]`; -inf where a prompt has fewer choices than another.

    Args:
      prompts: texts with the choices that may follow, a space between them.
      gates: 0 or 1 (or between) per site; sites not named are open.
    """
    widest = max(len(choices) for _, choices in prompts)
    out = np.full((len(prompts), widest), -np.inf)
    encoded = [
      (self._context(text), [tuple(self._tokenizer.encode(f' {c}')) for c in choices])
      for text, choices in prompts
    ]
    gates = self._gates(gates)
    if all(len(c) == 1 for _, choices in encoded for c in choices):
      self._of_one_token(encoded, gates, out)
      return out
    where, pairs = [], []
    for q, (context, choices) in enumerate(encoded):
      for c, choice in enumerate(choices):
        where.append((q, c))
        pairs.append(Pair(context, choice))
    for b in self._batches(pairs):
      args = self._params, b.tokens, b.mask, b.at, gates
      loss_BxP = np.asarray(self._targets((b.tokens.shape, b.at.shape), *args))
      for row in np.flatnonzero(b.number >= 0):
        out[where[b.number[row]]] = -np.sum(loss_BxP[row] * b.weight[row])
    return out

  def _of_one_token(self, encoded: Sequence, gates: Gates, out: np.ndarray) -> None:
    """All choices of a prompt at once: each is a token after it."""
    pairs = [Pair(context, choices[0]) for context, choices in encoded]
    for b in self._batches(pairs):
      answers_BxC = np.zeros((len(b.number), out.shape[1]), np.int32)
      real = np.flatnonzero(b.number >= 0)
      for row in real:
        ids = [choice[0] for choice in encoded[b.number[row]][1]]
        answers_BxC[row, : len(ids)] = ids
      args = self._params, b.tokens, b.mask, b.at, answers_BxC, gates
      loss_BxC = np.asarray(self._choices((b.tokens.shape, answers_BxC.shape), *args))
      for row in real:
        number = len(encoded[b.number[row]][1])
        out[b.number[row], :number] = -loss_BxC[row, :number]

  def _batches(self, pairs: Sequence[Pair]) -> Iterable[LmBatch]:
    return lm_batches.batches(pairs, self._rows, self._most, max(self._cfg.pad, 0))

  def ask(
    self,
    task: Task,
    split: str = 'test',
    number: int = 200,
    shots: int = 0,
    seed: int = 0,
    gates: Gates | None = None,
    calibrate: bool = False,
  ) -> Answered:
    """Answers questions of a task.

    Args:
      task: of `questions.load`.
      split: train, validation or test.
      number: at most so many questions.
      shots: answered questions of the training split in front of each.
      seed: of the questions and shots that are drawn.
      gates: see `log_likelihoods`.
      calibrate: subtracts what the model says of a question without content behind the same shots
        (Zhao et al., "Calibrate Before Use", 2021).

    Raises:
      DataError: a split without questions, or a task that cannot be calibrated.
    """
    drawn = questions.sample(task, split, number, shots, seed)
    prompt = lambda question, shown: (task.prompt(question, shown), question.choices)
    scores = self.log_likelihoods([prompt(q, shown) for q, shown in drawn], gates)
    if calibrate:
      if task.blank is None:
        raise DataError(f'{task.name} has no question without content: ask without calibration')
      blank = self.log_likelihoods([prompt(task.blank, shown) for _, shown in drawn], gates)
      scores = scores - blank
    answers = np.array([question.answer for question, _ in drawn])
    return Answered(task.name, split, shots, seed, scores, answers)

  def perplexity(self, text: str, window: int = 512, gates: Gates | None = None) -> float:
    """Of a text's tokens, each given those before it in its window of `window`."""
    window = min(window, self._most)
    pairs = lm_batches.windows(self._tokenizer.encode(text), window, self._cfg.bos)
    total = count = 0.0
    gates = self._gates(gates)
    for b in self._batches(pairs):
      args = self._params, b.tokens, b.mask, b.at, gates
      loss_BxP = np.asarray(self._targets((b.tokens.shape, b.at.shape), *args))
      total += float(np.sum(loss_BxP * b.weight))
      count += float(np.sum(b.weight))
    return float(np.exp(total / count))
