"""Metrics files that survive kills, and times for people."""

import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from gatedfm import json_lines
from gatedfm.trainers import log


def test_rows_that_will_run_again_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  first = log.Log(tmp_path, 0, tensorboard=False)
  for step in range(1, 6):
    first.write(step, {'train/loss': 1.0 / step})
  first.write(4, {'validation/loss': 2.0})
  first.close()
  with open(path, 'a') as file:
    file.write('{"step": 6, "train/lo')
  assert [r['step'] for r in json_lines.read(path)] == [1, 2, 3, 4, 5, 4]

  second = log.Log(tmp_path, 4, tensorboard=False)
  assert [r['step'] for r in json_lines.read(path)] == [1, 2, 3, 4, 4]
  second.write(5, {'train/loss': 0.25})
  second.close()
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [r['step'] for r in rows] == [1, 2, 3, 4, 4, 5]
  assert rows[-1]['train/loss'] == 0.25


def test_events_are_written_where_wanted(tmp_path):
  with_events = log.Log(tmp_path, 0, tensorboard=True)
  with_events.write(1, {'train/loss': 1.0})
  with_events.close()
  assert list((tmp_path / 'events').iterdir())


def events(path):
  """The events of a file: each in a frame of its length, a checksum, itself, a checksum."""
  content = path.read_bytes()
  while content:
    (size,) = struct.unpack('<Q', content[:8])
    yield event_pb2.Event.FromString(content[12 : 12 + size])
    content = content[16 + size :]


def test_events_that_will_be_written_again_are_purged(tmp_path):
  log.Log(tmp_path, 4, tensorboard=True).close()
  (path,) = (tmp_path / 'events').iterdir()
  started = [e for e in events(path) if e.HasField('session_log')]
  assert [(e.step, e.session_log.status) for e in started] == [(5, event_pb2.SessionLog.START)]


@pytest.mark.parametrize(
  ('seconds', 'text'), [(-3, '0:00'), (59.6, '1:00'), (125, '2:05'), (3723, '1:02:03')]
)
def test_durations(seconds, text):
  assert log.duration(seconds) == text


def test_clock_leaves_pauses_out_of_the_pace(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(log.time, 'perf_counter', lambda: now[0])
  clock = log.Clock(steps=30, seconds=50.0)
  now[0] += 1000  # a first step, with all that it waits for
  clock.begin(10)
  now[0] += 25
  clock.pause(5)
  assert clock.seconds == 1075
  assert clock.eta(20) == 20  # 10 steps in 20 s, 10 to go
