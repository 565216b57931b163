"""Windows of long audio, and words joined across them."""

import itertools

import numpy as np
import pytest

from gatedfm.execution import long_form
from gatedfm.execution.long_form import Windows
from gatedfm.execution.words import Word
from gatedfm.models.speech_config import ConfigError


@pytest.mark.parametrize('windows', [Windows(), Windows(10, 5), Windows(2.5, 0), Windows(30.72, 1)])
@pytest.mark.parametrize('frames', [1, 250, 3_000, 3_072, 3_073, 6_001, 20_000])
def test_windows_cover_all(windows, frames):
  size, shared = round(100 * windows.seconds), round(100 * windows.overlap)
  spans = windows.overlapping(frames)
  assert spans[0][0] == 0
  assert spans[-1][1] == frames
  assert {end - start for start, end in spans} == {min(size, frames)}
  overlaps = [end - start for (_, end), (start, _) in itertools.pairwise(spans)]
  assert all(n >= shared - 1 for n in overlaps)  # rounding spreads by a frame
  middles = [(end + start) / 2 for (_, end), (start, _) in itertools.pairwise(spans)]
  assert middles == sorted(set(middles))
  # No more windows than needed.
  assert len(spans) <= 1 + max(0, frames - size) / (size - shared) + 1

  mel = np.random.default_rng(frames).normal(size=(frames, 3))
  spans = windows.at_pauses(mel)
  assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
  assert spans[-1][1] == frames
  assert all(0 < end - start <= size for start, end in spans)


def test_pauses_are_where_it_is_quiet():
  mel = np.zeros((4_000, 80))
  mel[2_060:2_100] = -9.0
  ((_, cut), _) = Windows(30, 5).at_pauses(mel)
  assert 2_060 <= cut < 2_100


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((31, 5), 'windows of 31 s: choose between 1 and 30.72 s'),
    ((0.5, 0), 'windows of 0.5 s'),
    ((10, 6), 'an overlap of 6 s: choose between 0 and half of a window, 5 s'),
    ((10, -1), 'an overlap of -1 s'),
  ],
)
def test_windows_that_cannot_be(arguments, message):
  with pytest.raises(ConfigError, match=message):
    Windows(*arguments)


def words(*timed):
  """A word of 0.1 s around each time."""
  return [Word(text, at - 0.05, at + 0.05, (ord(text),)) for text, at in timed]


def joined(*of_windows, spans=((0, 1_000), (800, 1_800))):
  return [w.text for w in long_form.join(spans, of_windows)]  # cut at 9 s


def test_each_window_keeps_its_side():
  left = words(('a', 1), ('b', 8.5), ('x', 9.7))
  assert joined(left, words(('y', 8.2), ('c', 9.5), ('d', 15))) == ['a', 'b', 'c', 'd']
  assert joined([], words(('y', 8.2), ('c', 9.5))) == ['c']
  assert joined(left, []) == ['a', 'b']
  third = words(('e', 17.5))
  spans = ((0, 1_000), (800, 1_800), (1_600, 2_600))
  assert joined(left, words(('d', 15)), third, spans=spans) == ['a', 'b', 'd', 'e']


def test_a_word_across_the_middle_is_there_once():
  early, late = ('m', 8.97), ('m', 9.03)
  assert joined(words(('a', 1), early), words(late, ('b', 12))) == ['a', 'm', 'b']  # kept by both
  assert joined(words(('a', 1), late), words(early, ('b', 12))) == ['a', 'm', 'b']  # by neither
  # The same word said twice is two words.
  twice = words(('a', 1), ('m', 8.8), ('m', 9.2)), words(('m', 8.8), ('m', 9.2))
  assert joined(*twice) == ['a', 'm', 'm']
