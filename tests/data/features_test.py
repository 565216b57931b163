"""Log-mel features against first principles and torch; statistics; the cache."""

import collections
import dataclasses
import math
import pickle
import shutil

import numpy as np
import pytest
import tones

from gatedfm.data import features, types


def speech_like(num_samples=4_000, seed=0):
  rng = np.random.default_rng(seed)
  time = np.arange(num_samples) / 16_000
  voice = sum(np.sin(2 * np.pi * 120 * k * time + k) / k for k in range(1, 30))
  audio = (0.5 + 0.4 * np.sin(20 * time)) * voice + rng.normal(0, 0.05, num_samples)
  return (6_000 * audio).astype(np.int16)


def test_filters_are_slaneys():
  """Edges by the published formula, one by one; areas of 1 per Hz (slaney norm)."""

  def hz(mel):
    return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

  top = 15 + math.log(8) * 27 / math.log(6.4)
  edges = [hz(top * i / 81) for i in range(82)]
  filters = features.mel_filters()
  assert filters.shape == (257, 80)
  assert filters.dtype == np.float32
  for m in (0, 1, 17, 40, 79):
    low, middle, high = edges[m : m + 3]
    for k in range(257):
      f = k * 31.25
      height = min((f - low) / (middle - low), (high - f) / (high - middle))
      assert filters[k, m] == pytest.approx(max(0, height) * 2 / (high - low), abs=1e-8)
  # librosa 0.11: filters.mel(sr=16000, n_fft=512, n_mels=80), three of its numbers.
  assert filters[1, 0] == pytest.approx(0.02253456, rel=1e-6)
  assert filters[100, 55] == pytest.approx(0.004093722, rel=1e-6)
  assert filters.sum() == pytest.approx(2.558260781, rel=1e-6)


def naive_log_mel(audio_S, frame, filters):
  """One frame by a direct Fourier sum over the 400 samples under the window."""
  samples = audio_S.astype(np.float64) / 32_768
  index = frame * 160 - 200 + np.arange(400)
  index = np.abs(index)
  index = np.where(index >= len(samples), 2 * (len(samples) - 1) - index, index)
  hann = 0.5 * (1 - np.cos(2 * np.pi * np.arange(400) / 400))
  weighted = samples[index] * hann
  angle = -2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512
  power = np.abs(np.exp(angle) @ weighted) ** 2
  return np.log(np.maximum(power @ filters.astype(np.float64), 1e-10))


def test_frames_equal_a_direct_fourier_sum():
  audio_S = speech_like()
  logmel_TxM = features.log_mel(audio_S)
  assert logmel_TxM.shape == (26, 80)
  assert logmel_TxM.dtype == np.float32
  for frame in (0, 1, 2, 13, 24, 25):
    expected = naive_log_mel(audio_S, frame, features.mel_filters())
    np.testing.assert_allclose(logmel_TxM[frame], expected, atol=1e-4)


def test_silence_is_the_logarithm_of_the_floor():
  silence = features.log_mel(np.zeros(1_000, np.int16))
  np.testing.assert_allclose(silence, math.log(1e-10), rtol=1e-6)


@pytest.mark.parity
def test_equals_torch():
  """The calls of ESPnet's Stft and LogMel, written out."""
  torch = pytest.importorskip('torch')
  filters = torch.from_numpy(features.mel_filters())
  for num_samples in (257, 400, 4_000, 16_001):
    audio_S = speech_like(num_samples, seed=num_samples)
    spectrum = torch.stft(
      torch.from_numpy(audio_S / np.float32(32_768)),
      n_fft=512,
      win_length=400,
      hop_length=160,
      center=True,
      window=torch.hann_window(400),
      pad_mode='reflect',
      normalized=False,
      onesided=True,
      return_complex=True,
    )
    power = spectrum.real**2 + spectrum.imag**2
    expected_TxM = torch.clamp(power.T @ filters, min=1e-10).log().numpy()
    np.testing.assert_allclose(features.log_mel(audio_S), expected_TxM, atol=1e-4)


def test_integers_and_floats_agree():
  audio_S = speech_like()
  np.testing.assert_array_equal(features.log_mel(audio_S), features.log_mel(audio_S / 32_768))


@pytest.mark.parametrize('num_samples', [257, 319, 320, 321, 4_000])
def test_number_of_frames(num_samples):
  frames = features.log_mel(np.zeros(num_samples, np.int16)).shape[0]
  assert frames == features.num_frames(num_samples)
  assert features.num_frames(480_000) == 3_001


@pytest.mark.parametrize(
  ('audio', 'message'),
  [
    (np.zeros(256, np.int16), '256 samples.*at least 257'),
    (np.zeros((500, 2), np.int16), 'one channel'),
    (np.zeros(500, np.int32), 'int32'),
    (np.full(500, np.nan), 'NaN'),
  ],
)
def test_bad_audio(audio, message):
  with pytest.raises(ValueError, match=message):
    features.log_mel(audio)


def test_stats_equal_numpy_over_all_frames(tmp_path):
  parts = [np.random.default_rng(n).normal(5, 3, (n, 80)).astype(np.float32) for n in (3, 40)]
  stats = features.FeatureStats.of(iter(parts))
  stacked = np.concatenate(parts).astype(np.float64)
  np.testing.assert_allclose(stats.mean, stacked.mean(0), rtol=1e-6)
  np.testing.assert_allclose(stats.std, stacked.std(0), rtol=1e-5)
  stats.save(tmp_path / 'stats.npz')
  loaded = features.FeatureStats.load(tmp_path / 'stats.npz')
  np.testing.assert_array_equal(loaded.mean, stats.mean)
  np.testing.assert_array_equal(loaded.std, stats.std)
  with pytest.raises(ValueError, match='at least one frame'):
    features.FeatureStats.of([])


def test_damaged_stats_are_named(tmp_path):
  path = tmp_path / 'stats.npz'
  features.FeatureStats(np.zeros(80), np.ones(80)).save(path)
  whole = path.read_bytes()
  np.savez(tmp_path / 'other.npz', mean=np.zeros(80))
  for content in (b'', b'text', whole[:-50], (tmp_path / 'other.npz').read_bytes()):
    path.write_bytes(content)
    with pytest.raises(types.DataError, match=f'{path} holds no feature statistics'):
      features.FeatureStats.load(path)


@pytest.mark.parametrize('workers', [0, 2])
def test_cache_holds_the_features(tmp_path, workers, capsys, monkeypatch):
  monkeypatch.setattr(features, '_SAMPLES_PER_WORKER', 1)
  source = tones.ToneSource(5)
  cache = features.FeatureCache.build(source, tmp_path, workers)
  assert 'features of tones' in capsys.readouterr().err
  assert len(pickle.dumps(cache)) < 500
  for opened in (cache, pickle.loads(pickle.dumps(cache))):
    assert len(opened) == 5
    for i in range(5):
      expected_TxM = features.log_mel(source.audio(i))
      np.testing.assert_array_equal(opened.get(i), expected_TxM)
      assert opened.lengths[i] == len(expected_TxM)
  with pytest.raises(ValueError, match='read-only'):
    cache.get(0)[:] = 0
  assert [path.name for path in tmp_path.iterdir()] == [cache.path.name]


def test_cache_is_built_once_per_fingerprint(tmp_path, capsys):
  source = tones.ToneSource(3)
  first = features.FeatureCache.build(source, tmp_path)
  capsys.readouterr()
  source.audio = None
  assert features.FeatureCache.build(source, tmp_path).path == first.path
  assert capsys.readouterr().err == ''
  other = tones.ToneSource(3, seed=1)
  assert features.FeatureCache.build(other, tmp_path).path != first.path


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_utterance_is_named_and_nothing_is_left(tmp_path, workers, monkeypatch):
  monkeypatch.setattr(features, '_SAMPLES_PER_WORKER', 1)
  with pytest.raises(ValueError, match=r'tones/2: audio has .* its record says'):
    features.FeatureCache.build(Truncated(4), tmp_path, workers)
  assert not list(tmp_path.iterdir())


def test_a_short_utterance_has_no_frames(tmp_path):
  source = tones.ToneSource(3)
  source.records[1] = dataclasses.replace(source.records[1], num_samples=256)
  cache = features.FeatureCache.build(source, tmp_path)
  assert cache.get(1).shape == (0, 80)
  np.testing.assert_array_equal(cache.get(2), features.log_mel(source.audio(2)))


def test_nothing_to_compute_and_nowhere_to_write(tmp_path, monkeypatch):
  with pytest.raises(types.DataError, match='no utterance of at least 257'):
    features.FeatureCache.build(tones.ToneSource(0), tmp_path)
  usage = collections.namedtuple('usage', 'free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(1_000))
  with pytest.raises(types.DataError, match=r'take .* GB, but'):
    features.FeatureCache.build(tones.ToneSource(3), tmp_path)
  assert not list(tmp_path.iterdir())


class Truncated(tones.ToneSource):
  def audio(self, i):
    return super().audio(i)[: -1 if i == 2 else None]
