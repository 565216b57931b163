"""A trained model at work: encode, decode greedily with caches, identify the language.

Letters: B batch, T frames of 10 ms, S frames of 40 ms, M mel bands, L tokens, P primer
tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gatedfm.data.corpus import Assets
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
    tokens: `[B, L]` decoder tokens after the primer, `eos` from the end on.
    ctc: `[B, S]` best CTC class per frame, 0 (blank) in padding.
    language: `[B]` index of the most likely language, by the first decoder step.
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
  primer_BxP: jax.Array,
  length: int,
  steps: jax.Array,
  eos: int,
  allowed_V: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Greedy decoding with key/value caches until every utterance has ended.

  Args:
    model: unrolled, `params` its parameters.
    encoded: what `model.encode` gave.
    primer_BxP: first tokens, `<sos>` first; -1 where the model is to choose.
    length: cache positions.
    steps: decoder steps at most, below `length`; traced, so that naming a language (one step)
      and transcribing share a program.
    eos: token that ends an utterance.
    allowed_V: bool, tokens that may be written.

  Returns: tokens `[B, length]` with the primer, `eos` after the end; and the logits `[B, V]`
    of the first step, which tell the language.
  """
  call = functools.partial(model.apply, {'params': params})
  caches = call(encoded, length, method='start')
  b, p = primer_BxP.shape
  forced_BxL = jnp.full((b, length), -1, jnp.int32).at[:, :p].set(primer_BxP)

  def step(carry: tuple) -> tuple:
    position, tokens_BxL, done_B, caches, first_BxV = carry
    logits_BxV, caches = call(tokens_BxL[:, position], position, caches, encoded, method='step')
    first_BxV = jnp.where(position == 0, logits_BxV, first_BxV)
    best_B = jnp.argmax(jnp.where(allowed_V, logits_BxV, -jnp.inf), -1).astype(jnp.int32)
    forced_B = forced_BxL[:, position + 1]
    next_B = jnp.where(done_B, eos, jnp.where(forced_B >= 0, forced_B, best_B))
    done_B = done_B | (next_B == eos)
    return position + 1, tokens_BxL.at[:, position + 1].set(next_B), done_B, caches, first_BxV

  def unfinished(carry: tuple) -> jax.Array:
    return (carry[0] < steps) & ~jnp.all(carry[2])

  tokens_BxL = jnp.full((b, length), eos, jnp.int32).at[:, 0].set(primer_BxP[:, 0])
  first_BxV = jnp.zeros((b, allowed_V.shape[0]))
  carry = (jnp.zeros((), jnp.int32), tokens_BxL, jnp.zeros(b, bool), caches, first_BxV)
  _, tokens_BxL, _, _, first_BxV = lax.while_loop(unfinished, step, carry)
  return tokens_BxL, first_BxV


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
  """

  def __init__(
    self,
    cfg: SpeechConfig,
    params: Any,
    assets: Assets,
    execution: str = 'mask',
    notimestamps: bool = False,
  ):
    self._suffix = ['<notimestamps>'] if notimestamps else []
    self.cfg, self.tokenizer, self.stats = cfg, assets.tokenizer, assets.stats
    self.model, self.params = for_inference(cfg, params, execution)
    self._languages = np.array(
      [self.tokenizer.token_id(f'<{x}>') for x in self.tokenizer.languages]
    )
    allowed = np.ones(self.tokenizer.vocab_size, bool)
    for token in (
      0,
      1,
      *(self.tokenizer.token_id(t) for t in self.tokenizer.tokens if t[:1] == '<'),
    ):
      allowed[token] = False
    allowed[self.tokenizer.eos] = True
    self._allowed = jnp.asarray(allowed)
    self._run = jax.jit(self._forward, static_argnames='length')
    self._programs: dict[tuple, Any] = {}

  @classmethod
  def load(cls, workdir: Path | str, execution: str = 'mask') -> Recognizer:
    """From the workdir of a training run: its newest checkpoint, configuration, assets.

    Raises:
      CheckpointError: the workdir holds no run, naming what is missing.
    """
    workdir = Path(workdir)
    cfg = config_lib.from_dict(config_lib.TrainConfig, checkpoints.load_config(workdir))
    params = jax.tree.map(jnp.asarray, checkpoints.load_params(workdir))
    assets = Assets.load(workdir / 'assets')
    return cls(cfg.model, params, assets, execution, cfg.data.notimestamps)

  def _forward(
    self,
    params: Any,
    features_BxTxM: jax.Array,
    frames_B: jax.Array,
    language_B: jax.Array,
    task_B: jax.Array,
    primer_BxP: jax.Array,
    steps: jax.Array,
    gates: Gates | None,
    length: int,
  ) -> Decoded:
    x_BxTxM = (features_BxTxM - self.stats.mean) / self.stats.std
    context = gating.Context(language_B, task_B)
    call = functools.partial(self.model.apply, {'params': params})
    encoded = call(x_BxTxM, frames_B, context, gates, method='encode')
    tokens_BxL, first_BxV = greedy(
      self.model, params, encoded, primer_BxP, length, steps, self.tokenizer.eos, self._allowed
    )
    ctc_BxS = jnp.argmax(call(encoded, method='ctc_logits'), -1)
    return Decoded(
      tokens_BxL[:, primer_BxP.shape[1] :],
      jnp.where(encoded.mask, ctc_BxS, 0),
      jnp.argmax(first_BxV[:, self._languages], -1),
      encoded.gates,
    )

  def primer(self, task: str, languages: Sequence[str]) -> np.ndarray:
    """`<sos> <lang> <task>` of each utterance, `[B, 3]`; for `lid` the model fills in the rest."""
    t = self.tokenizer
    if task == 'lid':
      rows = [[t.sos, -1, -1] + [-1] * len(self._suffix)] * len(languages)
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
      max_tokens: cap of new tokens; 0 is one per encoder frame (the finest that CTC could
        write), within the model's limit.

    Raises:
      ValueError: a language or task that the model does not know, with those it knows.
    """
    t = self.tokenizer
    known = task != 'lid'
    language_B = np.array([t.language_id(x) if known else 0 for x in languages], np.int32)
    task_B = np.full(len(languages), t.task_id(task), np.int32)
    primer = self.primer(task, languages)
    limit = min(max_tokens or features_BxTxM.shape[1] // 4, self.cfg.max_tokens)
    length = primer.shape[1] + limit
    # A language takes one step: the token after <sos>.
    steps = np.int32(length - 1 if known else 1)
    shape = (features_BxTxM.shape, length, gates is None)
    args = (self.params, features_BxTxM, frames_B, language_B, task_B, primer, steps, gates)
    if shape not in self._programs:
      self._programs[shape] = self._run.lower(*args, length=length).compile()
    return self._programs[shape](*args)

  def program_bytes(self) -> int:
    """Memory of the largest program so far: parameters, inputs, outputs and temporaries."""
    stats = [p.memory_analysis() for p in self._programs.values()]
    return max(
      m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes for m in stats
    )

  def texts(self, decoded: Decoded) -> list[str]:
    """The decoder's texts."""
    rows = np.asarray(decoded.tokens)
    ends = [np.flatnonzero(np.append(r, self.tokenizer.eos) == self.tokenizer.eos)[0] for r in rows]
    return [self.tokenizer.decode(r[:n].tolist()) for r, n in zip(rows, ends)]

  def ctc_texts(self, decoded: Decoded) -> list[str]:
    """The texts of the best CTC path: repeats merged, blanks dropped."""
    out = []
    for row in np.asarray(decoded.ctc):
      kept = row[np.append(True, row[1:] != row[:-1]) & (row != 0)]
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
    f'{frames / 100:.1f} s of audio; the model takes at most {BUCKETS[-1] / 100:.0f} s: '
    'cut the file into shorter pieces'
  )
