"""Audio files through a recognizer: rates and channels, what cannot be read, task names."""

import types
from concurrent import futures

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import tiny_run

from gatedfm import gates as gates_lib
from gatedfm.data import audio_io, features
from gatedfm.execution import files
from gatedfm.execution.decoding import GREEDY, Decoded, Search
from gatedfm.execution.long_form import Windows
from gatedfm.execution.words import Word
from gatedfm.models.speech_config import ConfigError, SpeechConfig

SITES = SpeechConfig(encoder='transformer', encoder_layers=2, decoder_layers=1)


class FakeRecognizer:
  """Says what it was given, and opens every second gate."""

  cfg = SITES

  def __init__(self, gated=True, mixes=False, search=GREEDY):
    self.calls, self.prepared = [], []
    self.mixes, self.search = mixes, search
    values = {s.name: (jnp.arange(s.layers) % 2.0)[:, None] for s in SITES.sites()}
    self._gates = gates_lib.Gates(values if gated else {})
    self.tokenizer = types.SimpleNamespace(
      tasks=('asr', 'lid', 'st_eng'),
      languages=('fra', 'rus'),
      decode=lambda ids: ' '.join(map(str, ids)),
    )

  def __call__(self, mel, frames, task, languages, timestamps=False):
    self.calls.append((mel, frames, task, languages))
    gates = {k: jnp.repeat(v, len(frames), 1) for k, v in self._gates.values.items()}
    spans = frames if timestamps else None
    tokens = np.zeros((len(frames), 1))
    return Decoded(tokens, mel, None, gates_lib.Gates(gates), spans=spans)

  def prepare(self, batch, frames, task='', timestamps=False):
    self.prepared.append((batch, frames, task, timestamps))
    done = futures.Future()
    done.set_result(None)
    return [done]

  texts = lambda self, decoded: ['a text'] * len(decoded.tokens)
  languages = lambda self, decoded: ['rus'] * len(decoded.tokens)

  def words(self, decoded):
    """Where features are numbers of seconds: those that a window has all of."""
    return [
      [
        Word(str(int(x)), at / 100 + 0.4, at / 100 + 0.6, (int(x),))
        for x, at, size in zip(*np.unique(row[:n, 0], return_index=True, return_counts=True))
        if size == 100
      ]
      for row, n in zip(decoded.ctc, decoded.spans)
    ]


def tone(rate, seconds=0.9):
  time = np.arange(int(rate * seconds)) / rate
  return 0.2 * np.sin(2 * np.pi * 440 * time) * (1 + np.sin(2 * np.pi * 5 * time))


@pytest.fixture
def stereo(tmp_path):
  path = tmp_path / 'stereo.wav'
  audio = tone(44_100)
  soundfile.write(path, np.stack([1.5 * audio, 0.5 * audio], 1), 44_100)
  return path


def test_other_rates_and_channels_become_16_khz_mono(stereo, tmp_path):
  fake, plain = FakeRecognizer(), tmp_path / 'plain.wav'
  soundfile.write(plain, tone(16_000), 16_000)
  for path in (stereo, plain):
    files.transcribe(fake, path, 'asr', 'fra')
  (a, frames, *_), (b, expected, *_) = fake.calls
  assert a.shape == b.shape == (1, 128, 80)
  assert abs(int(frames[0]) - int(expected[0])) <= 1
  np.testing.assert_array_equal(b[0, : expected[0]], features.log_mel(audio_io.load(plain)))
  assert not a[0, frames[0] :].any()
  loud = b[0, 5:80] > -6  # where there is sound: the tone and its neighbours
  np.testing.assert_allclose(a[0, 5:80][loud], b[0, 5:80][loud], atol=0.15)


def test_what_a_result_says(stereo):
  fake = FakeRecognizer()
  result = files.transcribe(fake, stereo, 'asr', 'fra')
  assert (result.text, result.language, result.open) == ('a text', 'fra', 2 / 7)
  assert result.pattern.startswith('encoder/attention:01 encoder/ffn:01 decoder/')
  dense = files.transcribe(FakeRecognizer(gated=False), stereo, 'asr', 'fra')
  assert (dense.pattern, dense.open) == ('dense', 1.0)


def test_compiling_is_told_of_and_not_timed(stereo, monkeypatch):
  now, told, fake = [0.0], [], FakeRecognizer()
  passes = lambda seconds: now.__setitem__(0, now[0] + seconds)
  read, run = files._read, FakeRecognizer.__call__

  def wait(programs, say):
    assert [p.result() for p in programs] == [None, None]
    passes(1000)
    say('compiling')

  monkeypatch.setattr(files.time, 'perf_counter', lambda: now[0])
  monkeypatch.setattr(files.compiling, 'wait', wait)
  monkeypatch.setattr(files, '_read', lambda path: passes(10) or read(path))
  monkeypatch.setattr(
    FakeRecognizer, '__call__', lambda *args, **how: passes(1) or run(*args, **how)
  )
  assert files.transcribe(fake, stereo, 'asr', say=told.append).seconds == 12  # lid and asr
  assert fake.prepared == [(1, 128, 'lid', False), (1, 128, 'asr', False)]
  assert told == ['compiling']


@pytest.mark.parametrize(
  ('amplitude', 'silent'), [(0, True), (1e-7, True), (1e-4, False), (0.5, False)]
)
def test_silence_is_told_of(tmp_path, amplitude, silent):
  """The result is what it is; speech recorded far too quietly is no silence."""
  path, told = tmp_path / 'a.wav', []
  soundfile.write(path, amplitude * tone(16_000), 16_000, 'FLOAT')
  result = files.transcribe(FakeRecognizer(), path, 'asr', say=told.append)
  assert (result.text, result.language) == ('a text', 'rus')
  warning = f'{path}\twarning: silent; its language and text mean nothing'
  assert told == ([warning] if silent else [])


def test_without_a_language_it_is_found_out_first(stereo):
  fake = FakeRecognizer()
  assert files.transcribe(fake, stereo, 'st_eng').language == 'rus'
  assert [(task, languages) for *_, task, languages in fake.calls] == [
    ('lid', ['']),
    ('st_eng', ['rus']),
  ]


def test_a_language_is_identified_once(stereo):
  fake = FakeRecognizer()
  result = files.transcribe(fake, stereo, 'lid')
  assert result.text == result.language == 'rus'
  assert [(task, languages) for *_, task, languages in fake.calls] == [('lid', [''])]


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, '^missing file$'),
    ('a folder', '^is a folder, not an audio file$'),
    (b'', '^empty file$'),
    (b'no audio at all', '^undecodable audio: '),
    (np.zeros(800), r'^too short: 0\.05 s, at least 0\.1 s are needed$'),
    (np.full(16_000, np.inf), '^has NaN or infinite samples'),
  ],
)
def test_files_that_cannot_be_transcribed(tmp_path, content, message):
  path = tmp_path / 'bad.wav'
  if isinstance(content, str):
    path.mkdir()
  elif isinstance(content, bytes):
    path.write_bytes(content)
  elif content is not None:
    soundfile.write(path, content, 16_000, 'FLOAT')
  fake = FakeRecognizer()
  with pytest.raises(files.FileError, match=message):
    files.transcribe(fake, path, 'asr', 'fra')
  assert not fake.calls


def test_a_truncated_file_is_refused(stereo):
  content = stereo.read_bytes()
  stereo.write_bytes(content[: len(content) // 2])
  fake = FakeRecognizer()
  with pytest.raises(files.FileError, match=r'^truncated: 0\.45 of 0\.90 s are there$'):
    files.transcribe(fake, stereo, 'asr', 'fra')
  assert not fake.calls


@pytest.fixture
def counting(tmp_path, monkeypatch):
  """A file of 61 s whose features are the second that they are of."""
  path = tmp_path / 'long.wav'
  soundfile.write(path, np.tile(tone(16_000, 1), 61), 16_000)
  seconds = np.arange(6_100)[:, None] // 100 * np.ones(80)
  monkeypatch.setattr(files.features, 'log_mel', lambda audio: seconds.astype(np.float32))
  return path


@pytest.mark.parametrize('mixes', [False, True])
@pytest.mark.parametrize('windows', [Windows(), Windows(8, 4), Windows(5.5, 0)])
def test_transcripts_of_long_files_are_joined(counting, windows, mixes):
  fake = FakeRecognizer(mixes=mixes)
  result = files.transcribe(fake, counting, 'asr', 'fra', True, windows)
  heard = [int(word.text) for word in result.words]
  assert result.text == ' '.join(map(str, heard))
  assert heard == sorted(set(heard))
  np.testing.assert_allclose([word.start for word in result.words], np.array(heard) + 0.4)
  # What the edge of a window cuts is heard by its neighbour, where they overlap.
  assert len(heard) == 61 if windows.overlap else 48 <= len(heard) < 61
  assert files.transcribe(fake, counting, 'asr', 'fra', windows=windows).words == ()
  shapes = {mel.shape for mel, *_ in fake.calls}
  assert len(shapes) == 1
  assert (shapes.pop()[0] > 1) == mixes
  assert all(timed for *_, timed in fake.prepared)


def test_translations_of_long_files_follow_each_other(counting):
  fake = FakeRecognizer()
  result = files.transcribe(fake, counting, 'st_eng', '', False, Windows(30, 6))
  assert result.text == 'a text a text a text'
  assert result.language == 'rus'
  frames = [int(n[0]) for _, n, task, _ in fake.calls if task == 'st_eng']
  assert sum(frames) == 6_100
  assert max(frames) <= 3_000
  assert [(task, timed) for *_, task, timed in fake.prepared] == [('lid', False), ('st_eng', False)]


def test_the_language_of_a_long_file_is_that_of_most_windows(counting):
  fake = FakeRecognizer()
  names = iter(['rus', 'fra', 'fra'])
  fake.languages = lambda decoded: [next(names)]
  assert files.transcribe(fake, counting, 'lid').text == 'fra'


def test_words_of_a_short_file(stereo):
  result = files.transcribe(FakeRecognizer(), stereo, 'asr', 'fra', True)
  assert result.text == 'a text'
  assert files.transcribe(FakeRecognizer(), stereo, 'asr', 'fra').words == ()


@pytest.mark.parametrize(
  ('task', 'name'),
  [('asr', 'asr'), ('lid', 'lid'), ('st:en', 'st_eng'), ('st:eng', 'st_eng'), ('st_fr', 'st_fra')],
)
def test_task_names(task, name):
  assert files.parse_task(task) == name


@pytest.mark.parametrize('task', ['', 'st', 'st:', 'translate:en', 'ASR'])
def test_wrong_tasks(task):
  with pytest.raises(ConfigError, match='is not asr, lid or st:LANGUAGE'):
    files.parse_task(task)


def test_languages():
  assert [files.parse_language(x) for x in ('', 'fr', 'fra')] == ['', 'fra', 'fra']
  with pytest.raises(ConfigError, match="'klingon': write it as in 'fr'"):
    files.parse_language('klingon')


@pytest.mark.parametrize(
  ('task', 'language', 'message'),
  [
    ('st_fra', 'rus', 'does not do st_fra; it does asr lid st_eng'),
    ('asr', 'dan', 'does not know dan; it knows fra rus'),
  ],
)
def test_a_model_that_cannot(task, language, message):
  with pytest.raises(ConfigError, match=message):
    files.check(FakeRecognizer(), task, language)


def test_what_ctc_cannot_do():
  alone = FakeRecognizer(search=Search(decoder=False))
  files.check(alone, 'asr', 'fra', True)
  with pytest.raises(ConfigError, match='CTC writes transcripts, not st_eng: drop --ctc'):
    files.check(alone, 'st_eng', 'fra')
  with pytest.raises(ConfigError, match='CTC times transcripts, not st_eng: drop --timestamps'):
    files.check(FakeRecognizer(), 'st_eng', 'fra', True)


def test_a_model_that_cannot_identify_languages():
  fake = FakeRecognizer()
  fake.tokenizer = types.SimpleNamespace(tasks=('asr',), languages=('fra',))
  files.check(fake, 'asr', 'fra')
  with pytest.raises(ConfigError, match='cannot identify languages; give --language'):
    files.check(fake, 'asr', '')


def test_the_command_goes_on_after_a_bad_file(gated_run, tone_data, stereo):
  test = tone_data / 'test1.wav'
  arguments = (f'--checkpoint={gated_run}', '--task=st:en', stereo, 'missing.wav', test)
  out, err = tiny_run.finish(tiny_run.start(tone_data, 'transcribe', *arguments), code=1)
  assert err.strip().endswith('missing.wav\terror: missing file')
  lines = out.splitlines()
  assert [line.split('\t')[0] for line in lines if '\t' in line] == [str(stereo), str(test)]
  gates = [line for line in lines if ' open ' in line]
  assert len(gates) == 2
  for line in gates:
    pattern = gates_lib.parse_pattern(line.split('%')[1])
    assert f'open {pattern.open_fraction:.0%}' in line


def test_the_command_times_words_by_ctc_alone(gated_run, tone_data):
  arguments = ('--language=fr', '--ctc', '--beam=2', '--timestamps', tone_data / 'test1.wav')
  start = lambda *more: tiny_run.start(
    tone_data, 'transcribe', f'--checkpoint={gated_run}', *arguments, *more
  )
  good, bad = start('--maxlenratio=0.5'), start('--window=40')
  out, _ = tiny_run.finish(good)
  first, gates, *times = out.splitlines()
  assert 'encoder/' in gates
  assert 'decoder/' not in gates
  rows = [line.split() for line in times]
  assert ' '.join(row[2] for row in rows) == first.split('\t')[2]
  assert all(0 <= float(start) <= float(end) for start, end, _ in rows)
  _, err = tiny_run.finish(bad, code=1)
  assert err == 'error: windows of 40 s: choose between 1 and 30.72 s\n'
