"""Log-mel features as ESPnet computes them, their statistics, and an on-disk cache."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.sparse

from gatedfm import atomic
from gatedfm.data import progress, types
from gatedfm.data.types import SAMPLE_RATE

N_FFT = 512
WIN_LENGTH = 400
HOP_LENGTH = 160
N_MELS = 80
FLOOR = 1e-10
MIN_SAMPLES = N_FFT // 2 + 1  # reflection by half a window needs one sample more

_LAYOUT = 1  # of the cache directory; part of its key
_CHUNK = 32  # utterances that a worker process takes at a time
# Two hours of audio make a worker process worth its start: both take some five seconds.
_SAMPLES_PER_WORKER = 7_200 * SAMPLE_RATE


def num_frames(num_samples):
  """Frames of 10 ms that `log_mel` makes of `num_samples` (int or array) at 16 kHz."""
  return 1 + num_samples // HOP_LENGTH


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
  """Slaney's scale: linear (200/3 Hz per mel) up to 1 kHz, then 27 mel per factor 6.4."""
  return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def _hz_to_mel(hz: float) -> float:
  return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


@functools.lru_cache(maxsize=4)
def mel_filters(n_mels: int = N_MELS) -> np.ndarray:
  """Slaney-normalised triangular filters from 0 to 8 kHz, f32 [257, n_mels].

  Source: `librosa.filters.mel(sr=16000, n_fft=512, htk=False, norm='slaney')`, which
  ESPnet's `espnet2/layers/log_mel.py` calls.
  """
  bins_hz = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
  edges_hz = _mel_to_hz(np.linspace(0, _hz_to_mel(SAMPLE_RATE / 2), n_mels + 2))
  widths_hz = np.diff(edges_hz)
  rising = (bins_hz[:, None] - edges_hz[:-2]) / widths_hz[:-1]
  falling = (edges_hz[2:] - bins_hz[:, None]) / widths_hz[1:]
  triangles = np.maximum(0, np.minimum(rising, falling))
  return (triangles * 2 / (edges_hz[2:] - edges_hz[:-2])).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _sparse_filters(n_mels: int) -> scipy.sparse.csr_array:
  """Filters [n_mels, 257]: at most two of them meet in a bin. Sparse also keeps BLAS out,
  whose threads, one team per process, fight for the cores and run many times slower."""
  return scipy.sparse.csr_array(mel_filters(n_mels).T)


@functools.lru_cache(maxsize=1)
def _window() -> np.ndarray:
  """Periodic Hann window of 400 samples, centred in 512 zeros, as torch.stft pads it."""
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WIN_LENGTH) / WIN_LENGTH)
  side = (N_FFT - WIN_LENGTH) // 2
  return np.pad(hann, side).astype(np.float32)


def log_mel(audio_S: np.ndarray, n_mels: int = N_MELS) -> np.ndarray:
  """Natural-log mel power spectrum of one utterance.

  Source: ESPnet's `DefaultFrontend` with `LogMel` (espnet2/asr/frontend/default.py):
  16 kHz, n_fft 512, Hann window of 25 ms every 10 ms, centred with reflection, power,
  Slaney mel from 0 to 8 kHz, clamp at 1e-10, natural logarithm. No normalisation.

  Args:
    audio_S: int16 [S], or floating point [S] in [-1, 1), at 16 kHz.
    n_mels: number of mel bins.

  Returns:
    f32 [T, n_mels], T = 1 + S // 160.

  Raises:
    ValueError: not one channel, another dtype, fewer than 257 samples, or a sample that
      is not a finite number.
  """
  audio_S = np.asarray(audio_S)
  if audio_S.ndim != 1:
    raise ValueError(f'audio must be one channel [S], got shape {audio_S.shape}')
  if len(audio_S) < MIN_SAMPLES:
    raise ValueError(
      f'audio has {len(audio_S)} samples; features need at least {MIN_SAMPLES} (16 ms at '
      '16 kHz): leave this utterance out'
    )
  if audio_S.dtype == np.int16:
    audio_S = audio_S.astype(np.float32) / 32_768
  elif np.issubdtype(audio_S.dtype, np.floating):
    audio_S = audio_S.astype(np.float32)
  else:
    raise ValueError(f'audio must be int16 or floating point, got {audio_S.dtype}')
  if not np.isfinite(audio_S).all():
    raise ValueError('audio has NaN or infinite samples')
  half = N_FFT // 2
  # As np.pad(mode='reflect') does, in a tenth of its time.
  padded_S = np.concatenate([audio_S[half:0:-1], audio_S, audio_S[-2 : -half - 2 : -1]])
  windows = np.lib.stride_tricks.sliding_window_view(padded_S, N_FFT)[::HOP_LENGTH]
  spectrum = scipy.fft.rfft(windows * _window())  # 4x the speed of numpy's
  power = spectrum.real**2 + spectrum.imag**2
  mel_TxM = (_sparse_filters(n_mels) @ power.T).T
  return np.log(np.maximum(mel_TxM, FLOOR), order='C')


@dataclasses.dataclass(frozen=True)
class FeatureStats:
  """Mean and standard deviation of every mel bin over a training set: f32 [n_mels]."""

  mean: np.ndarray
  std: np.ndarray

  @classmethod
  def of(cls, features: Iterable[np.ndarray]) -> 'FeatureStats':
    """Statistics over all frames of several feature arrays [T, n_mels].

    Source: ESPnet's `espnet2/layers/global_mvn.py` (population variance), accumulated in
    float64.

    Raises:
      ValueError: there is no frame.
    """
    count, total, square = 0, 0.0, 0.0
    for feature_TxM in features:
      feature_TxM = np.asarray(feature_TxM, np.float64)
      count += len(feature_TxM)
      total = total + feature_TxM.sum(0)
      square = square + (feature_TxM**2).sum(0)
    if not count:
      raise ValueError('feature statistics need at least one frame: the set is empty')
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 1e-20))
    return cls(mean.astype(np.float32), std.astype(np.float32))

  def save(self, path: Path | str) -> None:
    """Writes an .npz with `mean` and `std`, atomically."""
    file = io.BytesIO()
    np.savez(file, mean=self.mean, std=self.std)
    atomic.write_bytes(Path(path), file.getvalue())

  @classmethod
  def load(cls, path: Path | str) -> 'FeatureStats':
    """Reads what `save` wrote; raises DataError where the file is damaged."""
    try:
      with np.load(path) as arrays:
        return cls(arrays['mean'], arrays['std'])
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
      raise types.DataError(
        f'{path} holds no feature statistics or is damaged ({e!r}): copy it again from where the '
        'model was trained'
      ) from e


class FeatureCache:
  """The log-mel features of every utterance of a source, in one memory-mapped file.

  Pickles as its path alone, so that worker processes open it at no cost.

  Attributes:
    path: the cache directory.
    lengths: i32 [utterances], frames of each.
  """

  def __init__(self, path: Path | str):
    """Opens a cache that `build` made.

    Raises:
      FileNotFoundError: there is none at `path`.
    """
    self.path = Path(path)
    self.lengths = np.load(self.path / 'lengths.npy')
    self._offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
    self._frames = np.memmap(
      self.path / 'features.f32', np.float32, 'r', shape=(self._offsets[-1], N_MELS)
    )

  def __reduce__(self):
    return FeatureCache, (self.path,)

  def __len__(self) -> int:
    return len(self.lengths)

  def get(self, i: int) -> np.ndarray:
    """Features of utterance `i`, f32 [T, 80]: a read-only view of the file."""
    return self._frames[self._offsets[i] : self._offsets[i + 1]]

  @classmethod
  def build(cls, source: types.Source, cache_dir: Path | str, workers: int = 0) -> 'FeatureCache':
    """Opens the cache of `source`, computing it first where there is none.

    Args:
      source: its audio must be picklable with it when `workers` > 1.
      cache_dir: holds one directory per source and feature layout.
      workers: processes at most, one per two hours of audio; else this one does it.

    Returns:
      The open cache, with one entry per record of `source`, in its order. A record of
      fewer than 257 samples has 0 frames; `examples.build_examples` reports it.

    Raises:
      DataError: no utterance is long enough, one is not as long as its record says (the
        message names it), or the disk is too small. Nothing is left behind.
    """
    layout = (_LAYOUT, SAMPLE_RATE, N_FFT, WIN_LENGTH, HOP_LENGTH, N_MELS, FLOOR)
    key = hashlib.sha256(json.dumps([source.fingerprint, layout]).encode()).hexdigest()
    path = Path(cache_dir) / key[:20]
    if not path.exists():
      temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
      temporary.mkdir(parents=True)
      try:
        _write(source, temporary, workers)
        os.rename(temporary, path)
      except OSError:
        if not path.exists():  # else another process was faster, and its cache stands
          raise
      finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return cls(path)


def _write(source: types.Source, path: Path, workers: int) -> None:
  samples = np.array([record.num_samples for record in source.records], np.int64)
  lengths = np.where(samples < MIN_SAMPLES, 0, num_frames(samples)).astype(np.int32)
  size = int(lengths.sum(dtype=np.int64)) * N_MELS * 4
  if not size:
    raise types.DataError(
      f'source {source.name!r} has no utterance of at least {MIN_SAMPLES} samples'
    )
  free = shutil.disk_usage(path).free
  if size > free:  # else a write to the mapped file would end the process
    raise types.DataError(
      f'the features of {source.name!r} take {size / 1e9:.1f} GB, but {path.parent} has '
      f'{free / 1e9:.1f} GB free: make room or choose another data directory'
    )
  np.save(path / 'lengths.npy', lengths)
  with open(path / 'features.f32', 'wb') as file:
    file.truncate(size)
  workers = min(workers, samples.sum() // _SAMPLES_PER_WORKER)
  utterances = np.flatnonzero(lengths).tolist()
  with _writers(source, path, workers) as write:
    for _ in progress.track(
      write(utterances), len(utterances), f'features of {source.name}', 'utterances'
    ):
      pass


@contextlib.contextmanager
def _writers(source: types.Source, path: Path, workers: int) -> Iterator:
  """A `map` that writes the features of each utterance that it is given."""
  if workers <= 1:
    yield functools.partial(map, _Writer(source, path))
    return
  with futures.ProcessPoolExecutor(
    workers,
    # Not fork: the parent may hold threads of JAX, which a fork breaks.
    multiprocessing.get_context('spawn'),
    initializer=_start_worker,
    initargs=(source, path),
  ) as pool:
    yield functools.partial(pool.map, _work, chunksize=_CHUNK)


class _Writer:
  """Computes utterances and writes them to their place in the file."""

  def __init__(self, source: types.Source, path: Path):
    lengths = np.load(path / 'lengths.npy')
    self._source = source
    self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    self._frames = np.memmap(
      path / 'features.f32', np.float32, 'r+', shape=(self._offsets[-1], N_MELS)
    )

  def __call__(self, i: int) -> None:
    record = self._source.records[i]
    audio_S = self._source.audio(i)
    if len(audio_S) != record.num_samples:
      raise types.DataError(
        f'{record.id}: audio has {len(audio_S)} samples, its record says '
        f'{record.num_samples}; prepare the source {self._source.name!r} again'
      )
    self._frames[self._offsets[i] : self._offsets[i + 1]] = log_mel(audio_S)


_writer: _Writer | None = None


def _start_worker(source: types.Source, path: Path) -> None:
  global _writer
  _writer = _Writer(source, path)


def _work(i: int) -> None:
  _writer(i)
