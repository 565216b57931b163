"""Language models that write: several prompts at a time, each until it ends.

Prompts are padded on the left to one of few lengths, so that few programs serve all; one program
reads them, another writes token after token into the same caches. Letters: B batch, P tokens of
the prompts, S columns of the caches, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import compiling
from gatedfm.data import lm_batches
from gatedfm.data.types import DataError
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.models.lm import for_inference
from gatedfm.models.speech_config import ConfigError

# Tokens between two looks at what has been written, where a text may end it.
STRIDE = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen.

  Attributes:
    temperature: logits are divided by it; 0 takes the likeliest token.
    top_p: draws among the fewest tokens that hold this probability (Holtzman et al., "The Curious
      Case of Neural Text Degeneration", 2020); 1 draws among all.
    seed: of the draws. A prompt's depend on it and on the prompt's number, not on what else is
      in its batch.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for what cannot be done."""
    if not 0 <= self.temperature < float('inf'):
      raise ConfigError(f'temperature is {self.temperature}; it must be 0 or more')
    if not 0 < self.top_p <= 1:
      raise ConfigError(f'top_p is {self.top_p}; it must lie above 0 and not above 1')
    if self.top_p < 1 and not self.temperature:
      raise ConfigError(f'top_p is {self.top_p}, but nothing is drawn: set a temperature')

  @property
  def kind(self) -> str:
    """What the program has to do: greedy, all or nucleus."""
    if not self.temperature:
      return 'greedy'
    return 'nucleus' if self.top_p < 1 else 'all'


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Written:
  """What follows a prompt.

  Attributes:
    text: without the text that ended it.
    tokens: up to the one that completed that text; without the model's own token for the end.
    ended: whether it came to an end, or ran out of tokens.
  """

  text: str
  tokens: tuple[int, ...]
  ended: bool


@flax.struct.dataclass
class Draw:
  """Arguments of the choice of tokens: scalars, and a key for each row, `[B]`."""

  temperature: jax.Array
  top_p: jax.Array
  keys: jax.Array


@flax.struct.dataclass
class State:
  """Texts that are being written.

  Attributes:
    tokens: `[B, S]`; at: scalar, columns that are filled; ended: `[B]`.
    caches: of all layers, filled up to the column before the last token's.
  """

  tokens: jax.Array
  at: jax.Array
  ended: jax.Array
  caches: Any


@dataclasses.dataclass(frozen=True)
class _Batch:
  """Prompts of one shape; rows beyond the last prompt have ended before they begin."""

  numbers: np.ndarray  # [B] of the prompt in the order given, -1 for none
  tokens: np.ndarray  # [B, P]
  starts: np.ndarray  # [B] the column that a prompt begins in
  length: int  # S


class Generator:
  """Writes behind prompts.

  Args:
    model: whole or compacted.
    rows: prompts at a time.
  """

  def __init__(self, model: LmCheckpoint, rows: int = 8):
    self._cfg, self._tokenizer, self._rows = model.cfg, model.tokenizer, rows
    if model.tokenizer is None:
      raise DataError('this model has no tokenizer beside it: import it again, with its own')
    net, self._params = for_inference(model.cfg, model.params)
    call = functools.partial(_call, net, model.fixed())
    end = model.cfg.eos, model.cfg.padding
    self._read_function = functools.partial(read, call, end)
    self._read = compiling.Programs(
      jax.jit(self._read_function, static_argnames=('kind', 'length'))
    )
    self._write = compiling.Programs(
      jax.jit(functools.partial(write, call, end), static_argnames='kind', donate_argnames='state')
    )

  def encode(self, prompt: str) -> list[int]:
    """A beginning of text, where the model has one, and the prompt's tokens."""
    return [*self._cfg.start, *self._tokenizer.encode(prompt)]

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    most: int = 64,
    sampling: Sampling = GREEDY,
    until: Sequence[str] = (),
  ) -> list[Written]:
    """What the model writes behind each prompt.

    Args:
      prompts: as `encode` gives them.
      most: tokens written at most.
      sampling: how they are chosen.
      until: texts that end one, beside the model's own token for that.

    Raises:
      ConfigError, DataError: options that cannot be, or prompts that leave no room, before
        anything is computed.
    """
    batches = self._batches(prompts, most, sampling)
    out: list[Any] = [None] * len(prompts)
    for batch in batches:
      tokens_BxL = self._run(batch, most, sampling, until)
      for row in np.flatnonzero(batch.numbers >= 0):
        out[batch.numbers[row]] = self._written(tokens_BxL[row], until)
    return out

  def prepare(
    self, prompts: Sequence[Sequence[int]], most: int = 64, sampling: Sampling = GREEDY
  ) -> None:
    """Compiles what `generate` will need for such prompts, which it else does by itself."""
    programs = []
    for batch in self._batches(prompts, most, sampling):
      args, options, key = self._arguments(batch, sampling)
      programs.append(self._read.prepare(key, *args, **options))
      state = jax.eval_shape(functools.partial(self._read_function, **options), *args)
      rest = state, jnp.int32(0), *args[3:]
      programs.append(self._write.prepare(_but_prompts(key), args[0], *rest, kind=options['kind']))
    for program in programs:
      program.result()

  def _batches(self, prompts, most: int, sampling: Sampling) -> list[_Batch]:
    """The longest first."""
    sampling.validate()
    if most < 1:
      raise ConfigError(f'{most} tokens to write; it must be at least one')
    room = self._cfg.max_tokens - most
    for number, prompt in enumerate(prompts):
      if not prompt:
        raise DataError(f'prompt {number + 1} is empty, and nothing stands before a text')
      if len(prompt) > room:
        raise DataError(
          f'prompt {number + 1} has {len(prompt)} tokens; with {most} to write behind it the model '
          f'has room for {max(room, 0)}'
        )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    chunks = (order[i : i + self._rows] for i in range(0, len(order), self._rows))
    return [self._batch(prompts, chunk, most) for chunk in chunks]

  def _batch(self, prompts, chunk: Sequence[int], most: int) -> _Batch:
    rows = min(1 << (len(chunk) - 1).bit_length(), self._rows)
    longest, limit = max(len(prompts[i]) for i in chunk), self._cfg.max_tokens
    width = lm_batches.padded_length(longest, limit - most)
    tokens_BxP = np.full((rows, width), self._cfg.padding, np.int32)
    starts_B, numbers_B = np.full(rows, width - 1, np.int32), np.full(rows, -1, np.int32)
    for row, number in enumerate(chunk):
      prompt = prompts[number]
      starts_B[row], numbers_B[row] = width - len(prompt), number
      tokens_BxP[row, starts_B[row] :] = prompt
    return _Batch(numbers_B, tokens_BxP, starts_B, lm_batches.padded_length(width + most, limit))

  def _arguments(self, batch: _Batch, sampling: Sampling) -> tuple[tuple, dict[str, Any], tuple]:
    """Of the reading program, and its key."""
    key = jax.random.key(sampling.seed, impl='threefry2x32')
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(np.maximum(batch.numbers, 0))
    draw = Draw(jnp.float32(sampling.temperature), jnp.float32(sampling.top_p), keys_B)
    options = {'kind': sampling.kind, 'length': batch.length}
    args = self._params, batch.tokens, batch.numbers < 0, batch.starts, draw
    return args, options, (*batch.tokens.shape, *options.values())

  def _run(self, batch: _Batch, most: int, sampling: Sampling, until: Sequence[str]) -> np.ndarray:
    """Tokens behind each prompt, `[B, L]`, L of the longest."""
    args, options, key = self._arguments(batch, sampling)
    state, first = self._read(key, *args, **options), batch.tokens.shape[1]
    for limit in _limits(first, most, STRIDE if until else most):
      rest = state, jnp.int32(limit), *args[3:]
      state = self._write(_but_prompts(key), args[0], *rest, kind=options['kind'])
      ended_B, tokens_BxL = np.asarray(state.ended), np.asarray(state.tokens)[:, first : state.at]
      if until:
        ended_B = ended_B | [self._written(tokens, until).ended for tokens in tokens_BxL]
        state = state.replace(ended=jnp.asarray(ended_B))
      if ended_B.all():
        break
    return tokens_BxL

  def _written(self, tokens: np.ndarray, until: Sequence[str]) -> Written:
    """Up to the end, where there is one."""
    ends = np.flatnonzero(tokens == self._cfg.eos)
    tokens = (tokens[: ends[0]] if len(ends) else tokens).tolist()
    decode = functools.partial(self._tokenizer.decode, follows=True)
    text = decode(tokens)
    found = [at for at in map(text.find, until) if at >= 0]
    if found:
      text = text[: min(found)]
      holds = lambda n: any(end in decode(tokens[:n]) for end in until)
      tokens = tokens[: next(n for n in range(1, len(tokens) + 1) if holds(n))]
    return Written(text, tuple(tokens), bool(len(ends) or found))


def _but_prompts(key: tuple) -> tuple:
  """The writing program's key: whatever the prompts' width was, it is the same."""
  return key[0], *key[2:]


def _limits(first: int, most: int, stride: int) -> Iterator[int]:
  """Columns to write up to, one after the other."""
  for done in range(0, most, stride):
    yield first + min(done + stride, most)


def _call(net: Any, fixed: Any, params: Any, *args: Any, method: str) -> Any:
  gates = () if method == 'logits' else (fixed,)
  return net.apply({'params': params}, *args, *gates, method=method)


def read(
  call: Any,
  end: tuple[int, int],
  params: Any,
  tokens_BxP: jax.Array,
  ended_B: jax.Array,
  starts_B: jax.Array,
  draw: Draw,
  *,
  kind: str,
  length: int,
) -> State:
  """Prompts read into new caches of `length` columns, and the first token behind each."""
  b, p = tokens_BxP.shape
  caches = call(params, b, length, method='start')
  mask_BxS = jnp.arange(length) >= starts_B[:, None]
  x_BxPxD, caches = call(params, tokens_BxP, 0, caches, mask_BxS, method='step')
  logits_BxV = call(params, x_BxPxD[:, -1], method='logits')
  tokens_BxS = jnp.zeros((b, length), jnp.int32).at[:, :p].set(tokens_BxP)
  state = State(tokens_BxS, jnp.int32(p), ended_B, caches)
  return _append(end, state, caches, choose(kind, logits_BxV, draw, p - starts_B))


def write(
  call: Any,
  end: tuple[int, int],
  params: Any,
  state: State,
  limit: jax.Array,
  starts_B: jax.Array,
  draw: Draw,
  *,
  kind: str,
) -> State:
  """Token after token up to column `limit`, or until all texts have ended."""
  mask_BxS = jnp.arange(state.tokens.shape[1]) >= starts_B[:, None]

  def step(state: State) -> State:
    last = state.at - 1
    token_Bx1 = jax.lax.dynamic_slice_in_dim(state.tokens, last, 1, 1)
    x_Bx1xD, caches = call(params, token_Bx1, last, state.caches, mask_BxS, method='step')
    logits_BxV = call(params, x_Bx1xD[:, 0], method='logits')
    return _append(end, state, caches, choose(kind, logits_BxV, draw, state.at - starts_B))

  more = lambda state: (state.at < limit) & ~jnp.all(state.ended)
  return jax.lax.while_loop(more, step, state)


def _append(end: tuple[int, int], state: State, caches: Any, token_B: jax.Array) -> State:
  eos, pad = end
  token_B = jnp.where(state.ended, pad, token_B).astype(jnp.int32)
  tokens_BxS = jax.lax.dynamic_update_slice_in_dim(state.tokens, token_B[:, None], state.at, 1)
  return State(tokens_BxS, state.at + 1, state.ended | (token_B == eos), caches)


def choose(kind: str, logits_BxV: jax.Array, draw: Draw, place_B: jax.Array) -> jax.Array:
  """The next token of each row, `[B]`.

  Args:
    kind: as of `Sampling`.
    logits_BxV: of that token.
    draw: how.
    place_B: how many tokens precede it, which tells its draw from others.
  """
  if kind == 'greedy':
    return jnp.argmax(logits_BxV, -1)
  logits_BxV = logits_BxV / draw.temperature
  if kind == 'nucleus':
    logits_BxV = nucleus(logits_BxV, draw.top_p)
  keys_B = jax.vmap(jax.random.fold_in)(draw.keys, place_B)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BxV)


def nucleus(logits_BxV: jax.Array, top_p: jax.Array) -> jax.Array:
  """Logits of the fewest tokens that hold a probability of `top_p`; -inf for the others."""
  sorted_BxV = -jnp.sort(-logits_BxV, -1)
  share_BxV = jax.nn.softmax(sorted_BxV)
  before_BxV = jnp.cumsum(share_BxV, -1) - share_BxV
  kept_B = jnp.maximum(jnp.sum(before_BxV < top_p, -1), 1)
  least_Bx1 = jnp.take_along_axis(sorted_BxV, kept_B[:, None] - 1, -1)
  return jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
