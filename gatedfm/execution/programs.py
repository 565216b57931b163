"""The compiled programs behind a recognizer: one for all gates, one per gate pattern, or per layer.

Letters: B batch, T frames of 10 ms, S frames of 40 ms, M mel bands, D model, P primer tokens,
V vocabulary.
"""

from __future__ import annotations

import functools
from concurrent import futures
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import compiling
from gatedfm import gates as gates_lib
from gatedfm.data.features import FeatureStats
from gatedfm.execution import alignment, beam, ctc_decoding, ctc_prefix, decoding
from gatedfm.execution.decoding import Decoded, Request, Vocabulary
from gatedfm.execution.layerwise import Layerwise
from gatedfm.gates import Gates, Pattern
from gatedfm.models.speech import Encoded, SpeechModel
from gatedfm.models.speech_config import ConfigError
from gatedfm.nn import gating


def write(
  model: SpeechModel,
  params: Any,
  encoded: Encoded,
  ctc: ctc_prefix.Frames,
  x: Request,
  vocabulary: Vocabulary,
) -> Decoded:
  """From encoder and CTC to texts, in the way that `x.search` asks for; see `decoding.greedy`."""
  if x.search.decoder:
    way = decoding.greedy if x.search.beam == 1 else beam.jointly
    out = way(model, params, encoded, ctc, x, vocabulary)
  else:
    out = ctc_decoding.alone(ctc, encoded.gates, x, vocabulary)
  if x.timestamps:
    out = out.replace(spans=alignment.align(ctc, out.tokens, vocabulary.eos))
  return out


class Whole:
  """One program per shape, whatever the gates; or for one pattern, whatever the utterance.

  Args:
    model: unrolled, or with its encoder in one loop.
    stats: normalisation of the features.
    vocabulary: what may be written.
    fixed: the gates of all utterances, known beforehand: what they close is not in the program.
  """

  def __init__(
    self,
    model: SpeechModel,
    stats: FeatureStats,
    vocabulary: Vocabulary,
    fixed: Pattern | None = None,
  ):
    self._model, self._stats, self._vocabulary, self._fixed = model, stats, vocabulary, fixed
    self._programs = compiling.Programs(jax.jit(self._forward))

  def _forward(self, params: Any, x: Request) -> Decoded:
    call = functools.partial(self._model.apply, {'params': params})
    mel_BxTxM = (x.features - self._stats.mean) / self._stats.std
    context = gating.Context(x.language, x.task)
    gates = x.gates if self._fixed is None else self._fixed.fixed()
    encoded = call(mel_BxTxM, x.frames, context, gates, method='encode')
    ctc = ctc_prefix.frames(call(encoded, method='ctc_logits'), encoded.mask)
    out = write(self._model, params, encoded, ctc, x, self._vocabulary)
    return out if self._fixed is None else out.replace(gates=Gates({}))

  def prepare(self, params: Any, x: Request) -> list[futures.Future]:
    """Starts compiling for requests like `x`: what to wait for."""
    return [self._programs.prepare(x.key, params, x)]

  def __call__(self, params: Any, x: Request) -> Decoded:
    """Decodes; raises ValueError for gates of the caller's where there is one pattern."""
    if self._fixed is None:
      return self._programs(x.key, params, x)
    if x.gates is not None:
      raise ValueError("compact execution has closed modules no longer: use execution='skip'")
    return self._programs(x.key, params, x).replace(gates=_shown(self._fixed, len(x.frames)))

  def compiled(self) -> list[compiling.Programs]:
    """Everything compiled."""
    return [self._programs]


def _shown(pattern: Pattern, batch: int) -> Gates:
  """A pattern as the gates of a batch, `[N, B]`."""
  each = lambda bits: np.repeat(np.array(bits, np.float32)[:, None], batch, 1)
  return Gates({name: each(bits) for name, bits in pattern.sites})


class Staged:
  """Programs of what is open alone, one per gate pattern: a closed module is not even in them.

  Three stages with the host in between, which reads each decision as a pattern: `listen`
  decides the encoder's gates, `encode` runs the encoder and decides the decoder's, `decode`
  writes. A pattern never met before is compiled when it comes.

  Args:
    model: unrolled, with gates decided before each stack.
    stats, vocabulary: see `Whole`.
    limit: programs kept per stage; beyond it the one not used for longest is dropped.

  Raises:
    ConfigError: a model that decides gates layer by layer.
  """

  def __init__(
    self, model: SpeechModel, stats: FeatureStats, vocabulary: Vocabulary, limit: int = 128
  ):
    cfg = model.cfg
    if cfg.predicts('encoder') and cfg.gates.scope == 'layer':
      raise ConfigError(
        'static and layerwise execution need the gates of a stack before it runs; this model '
        "decides them layer by layer: use execution='skip'"
      )
    self._model, self._stats, self._vocabulary = model, stats, vocabulary
    heard = () if cfg.gates.decoder_reads == 'memory' else ('decoder_gates',)
    self._listens = 'subsample', 'encoder_gates', *heard  # what `listen` reads
    self._sites = {k: [s for s in cfg.all_sites() if s.stack == k] for k in ('encoder', 'decoder')}
    stage = lambda f, **static: compiling.Programs(jax.jit(f, **static), limit)
    self._listen = stage(self._listening)
    self._encode = stage(self._encoding, static_argnames='pattern')
    self._decode = stage(self._decoding, static_argnames='pattern')

  @staticmethod
  def _needed(params: dict[str, Any], *names: str) -> dict[str, Any]:
    """The parameters of a stage: each array more makes every call slower."""
    return {name: params[name] for name in names if name in params}

  def _decided(self, stack: str, decided: dict[str, jax.Array]) -> jax.Array | None:
    """Gates of a stack as one array `[modules, N, B]`, one transfer; None where all are open."""
    return jnp.stack([decided[s.module] for s in self._sites[stack]]) if decided else None

  def _listening(self, params: Any, x: Request) -> tuple:
    mel_BxTxM = (x.features - self._stats.mean) / self._stats.std
    context = gating.Context(x.language, x.task)

    def run(model: SpeechModel) -> tuple:
      heard_BxSxD, mask_BxS = model.listen(mel_BxTxM, x.frames)
      gates = {'encoder': model.decide('encoder', heard_BxSxD, mask_BxS, context)}
      if self._model.cfg.gates.decoder_reads != 'memory':
        gates['decoder'] = model.decide('decoder', heard_BxSxD, mask_BxS, context)
      return heard_BxSxD, mask_BxS, {k: self._decided(k, g) for k, g in gates.items()}

    return nn.apply(run, self._model)({'params': params})

  def _encoding(
    self, params: Any, heard: tuple[jax.Array, jax.Array], x: Request, pattern: Pattern
  ) -> tuple:
    heard_BxSxD, mask_BxS = heard
    context = gating.Context(x.language, x.task)
    gates = pattern.fixed().stack('encoder', self._sites['encoder'])

    def run(model: SpeechModel) -> tuple:
      memory_BxSxD, _ = model.encoder(heard_BxSxD, gates, mask_BxS, context, True)
      return memory_BxSxD, *self._heard(model, memory_BxSxD, mask_BxS, context)

    return nn.apply(run, self._model)({'params': params})

  def _heard(self, model, memory_BxSxD, mask_BxS, context) -> tuple:
    """What CTC says of the memory, and what gates of the decoder are decided by it."""
    logits_BxSxV = model.ctc_logits(Encoded(memory_BxSxD, mask_BxS, Gates({})))
    decided = {}
    if self._model.cfg.gates.decoder_reads == 'memory':
      gates = model.decide('decoder', memory_BxSxD, mask_BxS, context)
      decided['decoder'] = self._decided('decoder', gates)
    return ctc_prefix.frames(logits_BxSxV, mask_BxS), decided

  def _decoding(
    self, params: Any, memory_BxSxD: jax.Array, ctc: ctc_prefix.Frames, x: Request, pattern: Pattern
  ) -> Decoded:
    encoded = Encoded(memory_BxSxD, ctc.mask, pattern.fixed())
    return write(self._model, params, encoded, ctc, x, self._vocabulary)

  def _pattern(self, stack: str, bits_MxNxB: jax.Array | None, given: Gates | None) -> Pattern:
    """The pattern of a stack, from its decisions or from the caller's gates.

    Raises:
      ValueError: gates that differ by example.
    """
    sites = self._sites[stack]
    if given is not None:
      values = {s.name: np.asarray(given[s.name]) for s in sites}
    elif bits_MxNxB is not None:
      values = dict(zip((s.name for s in sites), np.asarray(bits_MxNxB)))
    else:
      values = {s.name: np.ones(()) for s in sites}
    return gates_lib.pattern(Gates(values), sites)

  def prepare(self, params: Any, x: Request) -> list[futures.Future]:
    """Starts compiling for requests like `x` what does not depend on their gates."""
    return [self._listen.prepare(x.key, self._needed(params, *self._listens), x)]

  def __call__(self, params: Any, x: Request) -> Decoded:
    given, x = x.gates, x.replace(gates=None)
    if given is not None:
      given = gates_lib.completed(given, self._model.cfg.all_sites())
    key, batch = x.key, len(x.frames)
    *heard, decided = self._listen(key, self._needed(params, *self._listens), x)
    x = x.replace(features=None, frames=None)  # heard; no stage more takes them
    encoder = self._pattern('encoder', decided['encoder'], given)
    memory_BxSxD, ctc, more = self._run_encoder(key, params, heard, x, encoder)
    decoder, mine = Pattern(()), {}
    if x.search.decoder:
      decoder = self._pattern('decoder', (decided | more)['decoder'], given)
      mine = self._needed(params, 'decoder')
    out = self._run_decoder(key, mine, memory_BxSxD, ctc, x, decoder)
    return out.replace(gates=_shown(Pattern((*encoder.sites, *decoder.sites)), batch))

  def _run_encoder(self, key, params, heard, x, pattern) -> tuple:
    mine = self._needed(params, 'encoder', 'ctc', 'decoder_gates')
    return self._encode((key, pattern), mine, heard, x, pattern=pattern)

  def _run_decoder(self, key, params, memory_BxSxD, ctc, x, pattern) -> Decoded:
    return self._decode((key, pattern), params, memory_BxSxD, ctc, x, pattern=pattern)

  def compiled(self) -> list[compiling.Programs]:
    """Everything compiled."""
    return [self._listen, self._encode, self._decode]


class Layered(Staged):
  """`Staged`, with the encoder layer by layer and a decoder that branches.

  A handful of programs serves all patterns: the host chooses each layer's.
  """

  def __init__(self, model: SpeechModel, stats: FeatureStats, vocabulary: Vocabulary):
    super().__init__(model, stats, vocabulary)
    self._layers = Layerwise(model.cfg)
    self._finish = compiling.Programs(jax.jit(self._finishing))
    self._decode = compiling.Programs(jax.jit(self._branching))

  def _finishing(self, params: Any, memory_BxSxD: jax.Array, mask_BxS: jax.Array, x: Request):
    context = gating.Context(x.language, x.task)
    run = lambda model: self._heard(model, memory_BxSxD, mask_BxS, context)
    return nn.apply(run, self._model)({'params': params})

  def _branching(
    self, params: Any, memory_BxSxD: jax.Array, ctc: ctc_prefix.Frames, x: Request, gates: Gates
  ) -> Decoded:
    encoded = Encoded(memory_BxSxD, ctc.mask, gates)
    return write(self._model, params, encoded, ctc, x, self._vocabulary)

  def _run_encoder(self, key, params, heard, x, pattern) -> tuple:
    memory_BxSxD = self._layers(params['encoder'], *heard, pattern)
    mine = self._needed(params, 'ctc', 'decoder_gates')
    return memory_BxSxD, *self._finish(key, mine, memory_BxSxD, heard[1], x)

  def _run_decoder(self, key, params, memory_BxSxD, ctc, x, pattern) -> Decoded:
    return self._decode(key, params, memory_BxSxD, ctc, x, pattern.to_gates())

  def compiled(self) -> list[compiling.Programs]:
    """Everything compiled."""
    return [self._listen, *self._layers.compiled(), self._finish, self._decode]
