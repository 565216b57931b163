"""A recognizer behind a stream: utterances come one by one and are answered in batches.

Letters: B batch, T frames of 10 ms, M mel bands.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures

import numpy as np

from gatedfm.execution import stream
from gatedfm.execution.recognizer import Recognizer, bucket
from gatedfm.models.speech_config import ConfigError


@dataclasses.dataclass(frozen=True)
class Utterance:
  """Raw log-mel features `[T, M]`, what to do with them (`asr`, `st_xxx` or `lid`), and their
  language (ISO 639-3; not read for `lid`)."""

  features: np.ndarray
  task: str
  language: str = ''

  @property
  def queue(self) -> tuple[int, str, str]:
    """Whom it can share a batch with.

    A program is of one length and task, and task and language are what is known beforehand of
    the gates; what speech adds may differ within a batch.
    """
    return bucket(len(self.features)), self.task, self.language


def prepare(
  recognizer: Recognizer, batcher: stream.Batcher, frames: Sequence[int]
) -> list[futures.Future]:
  """Starts compiling for utterances of these lengths, in all sizes of batches: what to wait for."""
  shapes = [(size, t) for t in sorted({bucket(n) for n in frames}) for size in batcher.sizes]
  return [program for shape in shapes for program in recognizer.prepare(*shape)]


def answer(recognizer: Recognizer, utterances: Sequence[Utterance]) -> list[str]:
  """The texts, or the languages, of utterances of one queue."""
  size, task, _ = utterances[0].queue
  mel_BxTxM = np.zeros((len(utterances), size, recognizer.cfg.mels), np.float32)
  for row_TxM, u in zip(mel_BxTxM, utterances):
    row_TxM[: len(u.features)] = u.features
  frames_B = np.array([len(u.features) for u in utterances], np.int32)
  decoded = recognizer(mel_BxTxM, frames_B, task, [u.language for u in utterances])
  return recognizer.languages(decoded) if task == 'lid' else recognizer.texts(decoded)


def serve(
  recognizer: Recognizer,
  arrivals: Iterable[tuple[float, Utterance]],
  batcher: stream.Batcher,
) -> Iterator[tuple[Utterance, str, float]]:
  """Answers utterances as they come, see `stream.serve`.

  Args:
    recognizer: of an execution whose batches may differ in their gates (`bucketed`, `mask`,
      `compact`); any other takes batches of one.
    arrivals: seconds from the start, in order, and the utterance.
    batcher: groups them.

  Yields: utterance, its text or language, seconds from arrival to answer.

  Raises:
    ConfigError: a recognizer that cannot take batches.
  """
  if not recognizer.mixes and max(batcher.sizes) > 1:
    raise ConfigError(
      'this execution takes one gate pattern at a time, and speech decides it: load the '
      "recognizer with execution='bucketed', or batch one by one: Batcher((1,))"
    )
  waiting = (stream.Waiting(u, arrival, u.queue) for arrival, u in arrivals)
  run = functools.partial(answer, recognizer)
  for served, text, seconds in stream.serve(waiting, run, batcher):
    yield served.item, text, seconds
