"""Programs compiled ahead: one per key, errors where they are waited for."""

import threading

import jax
import jax.numpy as jnp
import pytest

from gatedfm import compiling


class Slow:
  """A function whose lowering can be held up, in place of jax.jit's."""

  def __init__(self):
    self.go, self.compiled = threading.Event(), []

  def lower(self, *args, **static):
    slow = self

    class Lowered:
      def compile(self):
        assert slow.go.wait(60)
        slow.compiled.append((args, static))
        if args == ('bad',):
          raise ValueError('does not compile')
        return lambda *args: (*args, *static.values())

    return Lowered()


def test_each_key_is_compiled_once():
  programs = compiling.Programs(jax.jit(lambda x, n: x * n, static_argnames='n'))
  first = programs.prepare('a', jax.ShapeDtypeStruct((2,), jnp.float32), n=3)
  assert programs.prepare('a', jnp.zeros(2), n=3) is first
  assert programs('a', jnp.ones(2), n=3).tolist() == [3, 3]
  assert programs('b', jnp.ones(3), n=2).tolist() == [2, 2, 2]
  assert len(programs) == 2
  assert programs.prepare('a') is first
  assert programs.peak_bytes() >= 24


def test_the_program_not_used_for_longest_goes():
  programs = compiling.Programs(jax.jit(lambda x: 2 * x), limit=2)
  a, b = programs.prepare('a', 1), programs.prepare('b', 2)
  assert programs('a', 3) == 6
  programs('c', 3)
  assert len(programs) == 2
  assert programs.prepare('a', 1) is a
  assert programs.prepare('b', 2) is not b


def test_compiling_does_not_wait_for_compiling():
  slow = Slow()
  programs = compiling.Programs(slow)
  prepared = [programs.prepare(i, i) for i in range(3)]
  assert not slow.compiled
  assert not any(p.done() for p in prepared)
  slow.go.set()
  assert programs(1, 1) == (1,)
  compiling.wait(prepared, pytest.fail)
  assert {args for args, _ in slow.compiled} == {(0,), (1,), (2,)}


def test_waiting_tells_and_raises(monkeypatch):
  slow, told = Slow(), []
  programs = compiling.Programs(slow)
  prepared = [programs.prepare('bad', 'bad')]

  def tell(message):
    told.append(message)
    slow.go.set()

  monkeypatch.setattr(compiling, 'INTERVAL', 0.01)
  with pytest.raises(ValueError, match='does not compile'):
    compiling.wait(prepared, tell, 'programs for this batch')
  assert told[0] == 'compiling: programs for this batch to go: 1 of 1 after 0 s'
