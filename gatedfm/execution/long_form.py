"""Audio longer than a model takes: windows that overlap, and their words joined.

Letters: T frames of 10 ms, M mel bands.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gatedfm.execution.words import Word
from gatedfm.models.speech_config import ConfigError

_LONGEST = 30.72  # seconds; the longest shape that single files are padded to
_SAME = 0.2  # seconds between the middles of a word as two windows hear it, at most
_PAUSE = 20  # frames of 10 ms over which loudness is averaged to find a pause


@dataclasses.dataclass(frozen=True)
class Windows:
  """How long audio is cut: seconds of a window, and those that neighbours share at least.

  Raises:
    ConfigError: a window longer than the model takes, or mostly overlap.
  """

  seconds: float = 30.0
  overlap: float = 5.0

  def __post_init__(self):
    if not 1 <= self.seconds <= _LONGEST:
      raise ConfigError(f'windows of {self.seconds:g} s: choose between 1 and {_LONGEST:g} s')
    if not 0 <= self.overlap <= self.seconds / 2:
      raise ConfigError(
        f'an overlap of {self.overlap:g} s: choose between 0 and half of a window, '
        f'{self.seconds / 2:g} s'
      )

  def overlapping(self, frames: int) -> list[tuple[int, int]]:
    """First frame of each window and the one after its last; all of one length, evenly spread."""
    window, shared = round(100 * self.seconds), round(100 * self.overlap)
    if frames <= window:
      return [(0, frames)]
    number = math.ceil((frames - shared) / (window - shared))
    starts = np.rint(np.linspace(0, frames - window, number)).astype(int).tolist()
    return [(start, start + window) for start in starts]

  def at_pauses(self, mel_TxM: np.ndarray) -> list[tuple[int, int]]:
    """Windows without overlap, each cut where it is quietest within half of `overlap` in all."""
    frames = len(mel_TxM)
    window, reach = round(100 * self.seconds), round(25 * self.overlap)
    if frames <= window:
      return [(0, frames)]
    number = math.ceil(frames / (window - 2 * reach))
    kernel = np.full(_PAUSE, 1 / _PAUSE)
    loudness_T = np.convolve(mel_TxM.mean(1), kernel, 'same')
    cuts = [0]
    for middle in np.rint(np.linspace(0, frames, number + 1)).astype(int)[1:-1].tolist():
      near = loudness_T[middle - reach : middle + reach + 1]
      cuts.append(middle - reach + int(near.argmin()))
    return list(zip(cuts, [*cuts[1:], frames]))


WINDOWS = Windows()


def join(windows: Sequence[tuple[int, int]], words: Sequence[Sequence[Word]]) -> list[Word]:
  """One sequence of words from those that each window heard.

  Where two windows overlap, each keeps the words whose middle lies on its side of the overlap's
  middle: there it hears what comes before and after. A word across that middle may be timed on
  different sides of it; the same text at nearly the same time is kept once all the same.

  Args:
    windows: frames of 10 ms, in order.
    words: of each window, with times from the beginning of the whole.
  """
  out = list(words[0])
  for (_, end), (start, _), new in zip(windows, windows[1:], words[1:]):
    cut = (end + start) / 200
    i, j = (bisect.bisect_left(x, cut, key=_middle) for x in (out, new))
    if i and j < len(new) and _same(out[i - 1], new[j]):
      j += 1
    elif i < len(out) and j and _same(out[i], new[j - 1]):
      i += 1
    out = [*out[:i], *new[j:]]
  return out


def _middle(word: Word) -> float:
  return (word.start + word.end) / 2


def _same(a: Word, b: Word) -> bool:
  return a.text == b.text and abs(_middle(a) - _middle(b)) < _SAME
