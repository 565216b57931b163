"""Timing side by side: order, ratios, and programs compiled beforehand."""

import time
from concurrent import futures

import numpy as np
import pytest

from gatedfm.evaluation import timing


class Sleeper:
  """Takes as long as it is told; a program takes longer, one after the other."""

  def __init__(self, seconds, calls, name, bytes_=7):
    self.seconds, self.calls, self.name, self.bytes = seconds, calls, name, bytes_
    self.prepared = set()
    self.compiler = futures.ThreadPoolExecutor(1)

  def prepare(self, batch, frames):
    self.prepared.add((batch, frames))
    return [self.compiler.submit(time.sleep, 0.1)]

  def __call__(self, mel, frames, task, languages):
    self.calls.append((self.name, mel.shape[1], task, languages[0]))
    assert mel.shape[:2] in self.prepared
    time.sleep(self.seconds)
    return np.zeros(1)

  def program_bytes(self):
    return self.bytes


def utterance(seconds, task='asr'):
  return timing.Utterance(np.ones(int(16_000 * seconds), np.int16), 'fra', task)


@pytest.fixture(scope='module')
def result():
  calls = []
  points = {
    'dense': Sleeper(0.012, calls, 'dense', 9),
    'gated': Sleeper(0.004, calls, 'gated'),
  }
  utterances = [utterance(0.3), utterance(1.0), utterance(0.4, 'lid'), utterance(0.5)]
  out = timing.side_by_side(points, utterances, rounds=3)
  return out, calls, utterances


def test_ratios_refer_to_the_first_point(result):
  out, _, _ = result
  assert out['dense']['time_ratio'] == 1
  assert set(out['dense']['time_ratio_by_task'].values()) == {1.0}
  assert 0.2 < out['gated']['time_ratio'] < 0.8
  assert sorted(out['gated']['time_ratio_by_task']) == ['asr', 'lid']
  for point, least in (('dense', 0.012), ('gated', 0.004)):
    seconds = out[point]['seconds_per_utterance']
    assert least <= seconds['q25'] <= seconds['median'] <= seconds['q75'] < 0.1


def test_compilation_is_apart(result):
  out, _, _ = result
  for point in out.values():
    assert 0.2 <= point['compile_seconds'] < 1.0  # two shapes of 0.1 s
    assert (point['utterances'], point['rounds']) == (4, 3)
  assert out['dense']['peak_memory_bytes'] == 9


def test_points_take_turns(result):
  _, calls, utterances = result
  timed = calls[-2 * 3 * len(utterances) :]
  order = [timed[i][0] for i in range(0, len(timed), 2)]
  assert order[:4] == ['dense', 'gated', 'dense', 'gated']
  assert order[4:8] == ['gated', 'dense', 'gated', 'dense']
  for a, b in zip(timed[::2], timed[1::2]):
    assert {a[0], b[0]} == {'dense', 'gated'}
    assert a[1:] == b[1:]


def test_audio_goes_in_padded_to_its_bucket():
  calls = []
  sleeper = Sleeper(0, calls, 'a')
  sleeper.prepare(1, 64)
  timing.run_once(sleeper, utterance(0.3, 'st_eng'))
  assert calls == [('a', 64, 'st_eng', 'fra')]
