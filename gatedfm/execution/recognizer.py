"""A trained model at work: encode, decode with caches, identify the language.

Letters: B batch, T frames of 10 ms, S frames of 40 ms, M mel bands, L tokens, P primer
tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gatedfm import compiling
from gatedfm.data.corpus import ASSETS, Assets
from gatedfm.data.types import DataError
from gatedfm.execution import ctc_prefix
from gatedfm.gates import Gates
from gatedfm.models.speech import Encoded, SpeechModel, for_inference
from gatedfm.models.speech_config import SpeechConfig
from gatedfm.nn import gating
from gatedfm.trainers import checkpoints
from gatedfm.trainers import config as config_lib

BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)


@flax.struct.dataclass
class Decoded:
  """What decoding gives.

  Attributes:
    tokens: `[B, L]` tokens after the primer, `eos` from the end on.
    ctc: `[B, S]` best CTC class per frame, 0 (blank) in padding.
    language: `[B]` index of the most likely language, by the decoder's first logits.
    gates: all gates used.
  """

  tokens: jax.Array
  ctc: jax.Array
  language: jax.Array
  gates: Gates


def greedy(
  model: SpeechModel,
  params: Any,
  encoded: Encoded,
  ctc: ctc_prefix.Frames,
  primer_BxP: jax.Array,
  length: int,
  steps: jax.Array,
  eos: int,
  allowed_V: jax.Array,
  ctc_weight: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Greedy joint CTC/attention decoding with caches until every utterance has ended.

  Args:
    model: unrolled, `params` its parameters.
    encoded: what `model.encode` gave.
    ctc: what CTC says of the same utterances.
    primer_BxP: first tokens, `<sos>` first.
    length: tokens written at most.
    steps: the same limit, traced, so that naming a language (none) and transcribing share a
      program.
    eos: token that ends an utterance.
    allowed_V: bool, tokens that may be written.
    ctc_weight: of CTC's score of each token against the decoder's, traced; 0 ignores CTC.

  Returns: tokens `[B, length]` after the primer, `eos` after the end; and the logits `[B, V]`
    after `<sos>`, which tell the language.
  """
  call = functools.partial(model.apply, {'params': params})
  b, p = primer_BxP.shape
  caches = call(encoded, p + length, method='start')
  logits_BxPxV, caches = call(primer_BxP, 0, caches, encoded, method='step')

  # One token per frame is the most that CTC could write; padding adds none.
  limit_B = jnp.sum(ctc.mask, 1)

  def best(score_BxV: jax.Array, done_B: jax.Array) -> jax.Array:
    best_B = jnp.argmax(jnp.where(allowed_V, score_BxV, -jnp.inf), -1).astype(jnp.int32)
    return jnp.where(done_B, eos, best_B)

  def jointly(seen_BxV: jax.Array, prefix: ctc_prefix.Prefix, done_B: jax.Array) -> tuple:
    heard_BxV = ctc_prefix.scores(ctc, prefix, eos)
    token_B = best((1 - ctc_weight) * seen_BxV + ctc_weight * heard_BxV, done_B)
    gain_B = jnp.take_along_axis(heard_BxV, token_B[:, None], 1)[:, 0]
    return token_B, ctc_prefix.extend(ctc, prefix, token_B, gain_B)

  def choose(logits_BxV: jax.Array, prefix: ctc_prefix.Prefix, done_B: jax.Array) -> tuple:
    alone = lambda seen_BxV, prefix, done_B: (best(seen_BxV, done_B), prefix)
    seen_BxV = jax.nn.log_softmax(logits_BxV)
    return lax.cond(ctc_weight > 0, jointly, alone, seen_BxV, prefix, done_B)

  def write(carry: tuple) -> tuple:
    at, tokens_BxL, token_B, caches, prefix = carry
    logits_Bx1xV, caches = call(token_B[:, None], p + at, caches, encoded, method='step')
    done_B = (token_B == eos) | (at + 1 >= limit_B)
    token_B, prefix = choose(logits_Bx1xV[:, 0], prefix, done_B)
    return at + 1, tokens_BxL.at[:, at + 1].set(token_B), token_B, caches, prefix

  def unfinished(carry: tuple) -> jax.Array:
    return (carry[0] < steps - 1) & jnp.any(carry[2] != eos)

  token_B, prefix = choose(logits_BxPxV[:, -1], ctc_prefix.start(ctc), limit_B < 1)
  tokens_BxL = jnp.full((b, length), eos, jnp.int32).at[:, 0].set(token_B)
  carry = jnp.zeros((), jnp.int32), tokens_BxL, token_B, caches, prefix
  return lax.while_loop(unfinished, write, carry)[1], logits_BxPxV[:, 0]


class Recognizer:
  """A trained model with its assets, ready for batches of features.

  One compilation per batch shape and execution, whatever the utterances.

  Args:
    cfg: the model's configuration.
    params: its parameters, in the training layout.
    assets: tokenizer and feature statistics.
    execution: `skip` for single utterances (a closed module costs nothing), `mask` for
      batches whose examples differ in their gates.
    notimestamps: whether the model was trained with `<notimestamps>` in its primer.
    ctc_weight: of CTC in joint decoding of transcripts (ESPnet's usual choice); 0 is the
      attention decoder alone.
  """

  def __init__(
    self,
    cfg: SpeechConfig,
    params: Any,
    assets: Assets,
    execution: str = 'mask',
    notimestamps: bool = False,
    ctc_weight: float = 0.3,
  ):
    self._ctc_weight = ctc_weight
    self._suffix = ['<notimestamps>'] if notimestamps else []
    self.cfg, self.tokenizer, self.stats = cfg, assets.tokenizer, assets.stats
    self.model, self.params = for_inference(cfg, params, execution)
    self._languages = np.array(
      [self.tokenizer.token_id(f'<{x}>') for x in self.tokenizer.languages]
    )
    allowed = np.ones(self.tokenizer.vocab_size, bool)
    for token in (
      self.tokenizer.blank,
      self.tokenizer.unk,
      *(self.tokenizer.token_id(t) for t in self.tokenizer.tokens if t[:1] == '<'),
    ):
      allowed[token] = False
    allowed[self.tokenizer.eos] = True
    self._allowed = jnp.asarray(allowed)
    self._programs = compiling.Programs(jax.jit(self._forward, static_argnames='length'))

  @classmethod
  def load(
    cls, workdir: Path | str, execution: str = 'mask', ctc_weight: float | None = None
  ) -> Recognizer:
    """From the workdir of a training run: its newest checkpoint, configuration, assets.

    Args:
      workdir: of the run.
      execution: see the class.
      ctc_weight: None decodes with the weight that the model was trained with.

    Raises:
      CheckpointError: the workdir holds no run, naming what is missing.
      DataError: assets that are missing, damaged or another model's.
    """
    workdir = Path(workdir)
    cfg = config_lib.from_dict(config_lib.TrainConfig, checkpoints.load_config(workdir))
    assets = Assets.load(workdir / ASSETS)
    for name, size in assets.sizes.items():
      if getattr(cfg.model, name) != size:
        raise DataError(
          f'{workdir / ASSETS} belongs to another model: its tokenizer has {name} {size}, '
          f'model.{name} is {getattr(cfg.model, name)}; copy the folder of this run again'
        )
    params = jax.tree.map(jnp.asarray, checkpoints.load_params(workdir))
    weight = cfg.ctc_weight if ctc_weight is None else ctc_weight
    return cls(cfg.model, params, assets, execution, cfg.data.notimestamps, weight)

  def _forward(
    self,
    params: Any,
    features_BxTxM: jax.Array,
    frames_B: jax.Array,
    language_B: jax.Array,
    task_B: jax.Array,
    primer_BxP: jax.Array,
    steps: jax.Array,
    ctc_weight: jax.Array,
    gates: Gates | None,
    length: int,
  ) -> Decoded:
    x_BxTxM = (features_BxTxM - self.stats.mean) / self.stats.std
    context = gating.Context(language_B, task_B)
    call = functools.partial(self.model.apply, {'params': params})
    encoded = call(x_BxTxM, frames_B, context, gates, method='encode')
    ctc = ctc_prefix.frames(call(encoded, method='ctc_logits'), encoded.mask)
    tokens_BxL, first_BxV = greedy(
      self.model, params, encoded, ctc, primer_BxP, length, steps, self.tokenizer.eos,
      self._allowed, ctc_weight,
    )  # fmt: skip
    return Decoded(
      tokens_BxL,
      jnp.where(ctc.mask, jnp.argmax(ctc.log_probs, -1), ctc_prefix.BLANK),
      jnp.argmax(first_BxV[:, self._languages], -1),
      encoded.gates,
    )

  def primer(self, task: str, languages: Sequence[str]) -> np.ndarray:
    """`<sos> <lang> <task>` of each utterance, `[B, 3]`; of `lid` only `<sos>` is read."""
    t = self.tokenizer
    if task == 'lid':
      rows = [[t.sos, t.eos, t.eos] + [t.eos] * len(self._suffix)] * len(languages)
    else:
      names = [[f'<{x}>', f'<{task}>', *self._suffix] for x in languages]
      rows = [[t.sos, *map(t.token_id, row)] for row in names]
    return np.array(rows, np.int32)

  def __call__(
    self,
    features_BxTxM: np.ndarray,
    frames_B: np.ndarray,
    task: str,
    languages: Sequence[str],
    gates: Gates | None = None,
    max_tokens: int = 0,
  ) -> Decoded:
    """Decodes a batch of one task.

    Args:
      features_BxTxM: raw log-mel, padded.
      frames_B: valid frames.
      task: `asr`, `st_xxx` or `lid`.
      languages: ISO 639-3 code of each utterance; not read for `lid`.
      gates: overrides the predictor.
      max_tokens: cap of new tokens, within the model's limit; 0 is one per encoder frame.

    Raises:
      ValueError: a language or task that the model does not know, with those it knows.
    """
    key, args, length = self._arguments(
      features_BxTxM, frames_B, task, languages, gates, max_tokens
    )
    return self._programs(key, *args, length=length)

  def prepare(self, batch: int, frames: int) -> futures.Future:
    """Starts compiling for `batch` utterances of `frames`, of any task: what to wait for."""
    t, none = self.tokenizer, np.zeros(batch, np.int32)
    features = np.zeros((batch, frames, self.cfg.mels), np.float32)
    key, args, length = self._arguments(features, none, t.tasks[0], t.languages[:1] * batch)
    return self._programs.prepare(key, *args, length=length)

  def _arguments(
    self, features_BxTxM, frames_B, task, languages, gates=None, max_tokens=0
  ) -> tuple[Hashable, tuple, int]:
    """Key, arrays and length of `_forward`'s program; arguments as of `__call__`."""
    t = self.tokenizer
    known = task != 'lid'
    language_B = np.array([t.language_id(x) if known else 0 for x in languages], np.int32)
    task_B = np.full(len(languages), t.task_id(task), np.int32)
    primer = self.primer(task, languages)
    frames = features_BxTxM.shape[1]
    length = min(max_tokens or frames // 4, self.cfg.max_tokens - primer.shape[1])
    # A language is known from the primer; CTC knows nothing of other languages' texts.
    steps = np.int32(length if known else 0)
    weight = np.float32(self._ctc_weight if task == 'asr' else 0)
    # Programs are compiled for shapes and types, whatever the caller's numbers are.
    gates = jax.tree.map(lambda g: np.asarray(g, np.float32), gates)
    shapes = tuple(g.shape for g in jax.tree.leaves(gates))
    args = (self.params, features_BxTxM, frames_B, language_B, task_B, primer, steps, weight, gates)
    return (features_BxTxM.shape[:2], length, jax.tree.structure(gates), shapes), args, length

  def program_bytes(self) -> int:
    """Memory of the largest program so far: parameters, inputs, outputs and temporaries."""
    stats = [p.memory_analysis() for p in self._programs.executables()]
    return max(
      m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes for m in stats
    )

  def texts(self, decoded: Decoded) -> list[str]:
    """The texts."""
    rows = np.asarray(decoded.tokens)
    ends = [np.flatnonzero(np.append(r, self.tokenizer.eos) == self.tokenizer.eos)[0] for r in rows]
    return [self.tokenizer.decode(r[:n].tolist()) for r, n in zip(rows, ends)]

  def ctc_texts(self, decoded: Decoded) -> list[str]:
    """The texts of the best CTC path: repeats merged, blanks dropped."""
    out = []
    for row in np.asarray(decoded.ctc):
      kept = row[np.append(True, row[1:] != row[:-1]) & (row != ctc_prefix.BLANK)]
      out.append(self.tokenizer.decode(kept.tolist()))
    return out

  def languages(self, decoded: Decoded) -> list[str]:
    """The most likely language of each utterance."""
    return [self.tokenizer.languages[i] for i in np.asarray(decoded.language)]


def bucket(frames: int) -> int:
  """The padded length for single files: a short list, so that few shapes are compiled.

  Raises:
    ValueError: longer than 30 s; cut it first.
  """
  for size in BUCKETS:
    if frames <= size:
      return size
  raise ValueError(
    f'{frames / 100:.1f} s of audio; the model takes at most {BUCKETS[-1] / 100:.1f} s: '
    'cut the file into shorter pieces'
  )
