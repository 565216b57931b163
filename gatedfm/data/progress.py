"""A progress line with rate and ETA, rewritten in place on a terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar('T')


def track(
  items: Iterable[T], total: int, what: str, unit: str = 'items', stream=None
) -> Iterator[T]:
  """Yields `items` while reporting on `stream` (stderr by default).

  Args:
    items: what to go through.
    total: how many there are.
    what: a verb phrase for the line, e.g. 'decoding stamps'.
    unit: what is counted.
    stream: a text stream; where it is a terminal the line is rewritten in place.
  """
  stream = stream or sys.stderr
  tty = stream.isatty()
  start = shown = time.monotonic()
  done = 0
  for item in items:
    yield item
    done += 1
    now = time.monotonic()
    if done < total and now - shown >= (0.2 if tty else 5):
      shown = now
      rate = done / (now - start)
      line = (
        f'{what}: {done}/{total} {unit} {100 * done // total}%'
        f' | {rate:.{0 if rate >= 10 else 1}f}/s | ETA {(total - done) / rate:.0f} s'
      )
      stream.write(f'\r{line}\x1b[K' if tty else f'{line}\n')
      stream.flush()
  seconds = time.monotonic() - start
  stream.write(f'{chr(13) if tty else ""}{what}: {done} {unit} in {seconds:.1f} s\n')
  stream.flush()
