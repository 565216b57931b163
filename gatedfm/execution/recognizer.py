"""A trained model at work: encode, decode with caches, identify the language.

Letters: B batch, T frames of 10 ms, S frames of 40 ms, M mel bands, L tokens, P primer
tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gatedfm.data.corpus import ASSETS, Assets
from gatedfm.data.types import DataError
from gatedfm.execution import EXECUTIONS, auto, compact, ctc_decoding, decoding, programs, words
from gatedfm.execution.decoding import GREEDY, Search
from gatedfm.gates import Gates, Pattern
from gatedfm.models.speech import for_inference
from gatedfm.models.speech_config import ConfigError, SpeechConfig, choice
from gatedfm.trainers import checkpoints
from gatedfm.trainers import config as config_lib

BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)


class Recognizer:
  """A trained model with its assets, ready for batches of features.

  One compilation per batch shape, whatever the utterances; under `static` a few per pattern.

  Args:
    cfg: the model's configuration.
    params: its parameters, in the training layout.
    assets: tokenizer and feature statistics.
    execution: one of `EXECUTIONS`. For batches whose examples differ in their gates: `mask`,
      which computes everything, and `bucketed`, which gathers who opens a module. For single
      utterances, or gates that a batch shares: `skip`, one program that branches at each module;
      `scanned`, the same with the encoder's layers in one loop; `static`, programs per gate
      pattern, compiled when a pattern is first met; `layerwise`, encoder layers called one by
      one. For one pattern: `compact`, without the parameters that it closes.
    notimestamps: whether the model was trained with `<notimestamps>` in its primer.
    ctc_weight: of CTC in joint decoding of transcripts (ESPnet's usual choice); 0 is the
      attention decoder alone.
    search: how texts are searched for.
    pattern: of `compact` alone; None where the model's predictors read nothing and decide one.

  Attributes:
    mixes: whether utterances of one batch may differ in their gates, or have none.
  """

  def __init__(
    self,
    cfg: SpeechConfig,
    params: Any,
    assets: Assets,
    execution: str = 'mask',
    notimestamps: bool = False,
    ctc_weight: float = 0.3,
    search: Search = GREEDY,
    pattern: Pattern | None = None,
  ):
    choice('execution', execution, EXECUTIONS)
    if pattern is not None and execution != 'compact':
      raise ConfigError(f'{execution} execution has no fixed pattern: give its gates to each call')
    mixing = ('mask', 'bucketed')
    self._ctc_weight, self._binary, self.search = ctc_weight, execution not in mixing, search
    self.mixes = execution in (*mixing, 'compact') or not cfg.gates.enabled
    self._suffix = ['<notimestamps>'] if notimestamps else []
    self.cfg, self.tokenizer, self.stats = cfg, assets.tokenizer, assets.stats
    # How the model itself runs; `static` and `compact` fix its gates, of which no branch is left.
    inner = {'scanned': 'skip', 'layerwise': 'skip', 'static': 'mask', 'compact': 'mask'}
    self.model, self.params = for_inference(
      cfg, params, inner.get(execution, execution), scan_encoder=execution == 'scanned'
    )
    t = self.tokenizer
    allowed = np.array([token[:1] != '<' for token in t.tokens])
    allowed[[t.blank, t.unk]], allowed[t.eos] = False, True
    languages = np.array([t.token_id(f'<{x}>') for x in t.languages])
    vocabulary = decoding.Vocabulary(t.eos, allowed, languages)
    engines = {'static': programs.Staged, 'layerwise': programs.Layered}
    engine, options = engines.get(execution, programs.Whole), {}
    if execution == 'compact':
      pattern = pattern or compact.fixed_pattern(self.model, self.params)
      self.params = compact.compact(compact.without_predictors(self.params), pattern)
      options = {'fixed': pattern}
    self._programs = engine(self.model, self.stats, vocabulary, **options)

  @classmethod
  def load(
    cls,
    workdir: Path | str,
    execution: str = 'mask',
    ctc_weight: float | None = None,
    search: Search = GREEDY,
    batch: int = 1,
    say: Callable[[str], None] = lambda line: None,
  ) -> Recognizer:
    """From the workdir of a training run: its newest checkpoint, configuration, assets.

    Args:
      workdir: of the run.
      execution: see the class; or `auto`, chosen by device, batch, and the sparsity that the
        gates were trained for (`auto.choose`).
      ctc_weight: None decodes with the weight that the model was trained with.
      search: see the class.
      batch: utterances at a time, for `auto`.
      say: is told what `auto` chose, and why.

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
    if execution == 'auto':
      gates, device = cfg.model.gates, jax.default_backend()
      saving = cfg.sparsity.target if gates.enabled else 0.0
      fixed = gates.enabled and not gates.context and gates.scope != 'layer'
      chosen = auto.choose(device, batch, 1 if fixed else 0, saving)
      say(str(chosen))
      execution = chosen.execution
    weight = cfg.ctc_weight if ctc_weight is None else ctc_weight
    return cls(cfg.model, params, assets, execution, cfg.data.notimestamps, weight, search)

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
    timestamps: bool = False,
  ) -> decoding.Decoded:
    """Decodes a batch of one task.

    Args:
      features_BxTxM: raw log-mel, padded.
      frames_B: valid frames.
      task: `asr`, `st_xxx` or `lid`.
      languages: ISO 639-3 code of each utterance; not read for `lid`.
      gates: overrides the predictor.
      timestamps: also align each transcript, for `words`.

    Raises:
      ValueError: a language or task that the model does not know, with those it knows; gates
        between open and closed under `skip` or `static`; a translation to be aligned, or to be
        written by CTC.
    """
    x = self._request(features_BxTxM, frames_B, task, languages, gates, timestamps)
    return self._programs(self.params, x)

  def prepare(
    self, batch: int, frames: int, task: str = '', timestamps: bool = False
  ) -> list[futures.Future]:
    """Starts compiling for `batch` utterances of `frames`: what to wait for.

    Under `static` that is what does not depend on the gates. Any task does for all, unless texts
    are written by CTC alone, or aligned, which is done for transcripts.
    """
    t, none = self.tokenizer, np.zeros(batch, np.int32)
    features = np.zeros((batch, frames, self.cfg.mels), np.float32)
    languages = t.languages[:1] * batch
    x = self._request(features, none, task or t.tasks[0], languages, None, timestamps)
    return self._programs.prepare(self.params, x)

  def _request(
    self, features_BxTxM, frames_B, task, languages, gates=None, timestamps=False
  ) -> decoding.Request:
    """What the programs take; arguments as of `__call__`."""
    t, search = self.tokenizer, self.search
    features_BxTxM = np.asarray(features_BxTxM, np.float32)
    frames_B = np.asarray(frames_B, np.int32)
    if features_BxTxM.ndim != 3 or features_BxTxM.shape[2] != self.cfg.mels:
      raise ValueError(f'features are {features_BxTxM.shape}, not [B, T, {self.cfg.mels}]')
    if not len(features_BxTxM) == frames_B.size == len(languages):
      raise ValueError(
        f'{len(features_BxTxM)} utterances, {frames_B.size} lengths and {len(languages)} '
        'languages: give one of each'
      )
    known = task != 'lid'
    if task not in ('asr', 'lid') and (timestamps or not search.decoder):
      raise ValueError(f'CTC hears what is said and writes and aligns transcripts, not {task}')
    if not known and not search.decoder:
      search = GREEDY  # languages are the decoder's to tell
    language_B = np.array([t.language_id(x) if known else 0 for x in languages], np.int32)
    task_B = np.full(len(languages), t.task_id(task), np.int32)
    primer = self.primer(task, languages)
    # Programs are compiled for shapes and types, whatever the caller's numbers are.
    if gates is not None:
      gates = Gates({name: np.asarray(g, np.float32) for name, g in gates.values.items()})
    modules = [s.name for s in self.cfg.all_sites()]
    for name, g in gates.values.items() if gates is not None and self._binary else ():
      if name in modules and ((g != 0) & (g != 1)).any():
        raise ValueError(f"gates of {name} lie between open and closed: use execution='mask'")
    # Frames enough for any utterance of this shape; caches end where the model's positions do.
    length = search.lengths(features_BxTxM.shape[1] // 4)[1]
    if search.decoder:
      length = min(length, self.cfg.max_tokens - primer.shape[1])
    return decoding.Request(
      features_BxTxM,
      frames_B,
      language_B,
      task_B,
      primer,
      # A language is known from the primer; CTC knows nothing of other languages' texts.
      np.int32(length if known else 0),
      np.float32(self._ctc_weight if task == 'asr' else 0),
      gates,
      length,
      search,
      timestamps,
    )

  def program_bytes(self) -> int:
    """Memory of the largest program so far: parameters, inputs, outputs and temporaries."""
    return max(p.peak_bytes() for p in self._programs.compiled())

  def texts(self, decoded: decoding.Decoded) -> list[str]:
    """The texts."""
    return [self.tokenizer.decode(self._ended(r)) for r in np.asarray(decoded.tokens)]

  def _ended(self, row_L: np.ndarray) -> list[int]:
    """Tokens up to the first `eos`."""
    eos = self.tokenizer.eos
    return row_L[: np.flatnonzero(np.append(row_L, eos) == eos)[0]].tolist()

  def nbest(self, decoded: decoding.Decoded) -> list[list[tuple[str, float]]]:
    """A beam's texts of each utterance with their scores, the best first."""
    pairs = zip(np.asarray(decoded.hypotheses), np.asarray(decoded.scores))
    return [
      [(self.tokenizer.decode(self._ended(r)), float(s)) for r, s in zip(*pair) if s > -np.inf]
      for pair in pairs
    ]

  def words(self, decoded: decoding.Decoded) -> list[list[words.Word]]:
    """The words of each text with their times, of utterances decoded with `timestamps`."""
    rows = zip(np.asarray(decoded.tokens), np.asarray(decoded.spans))
    return [words.of(self.tokenizer, self._ended(r), spans) for r, spans in rows]

  def ctc_texts(self, decoded: decoding.Decoded) -> list[str]:
    """The texts of the best CTC path: repeats merged, blanks dropped."""
    path_BxS = jnp.asarray(decoded.ctc)
    rows = ctc_decoding.collapsed(path_BxS, path_BxS.shape[1], self.tokenizer.eos)
    return [self.tokenizer.decode(self._ended(r)) for r in np.asarray(rows)]

  def languages(self, decoded: decoding.Decoded) -> list[str]:
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
