"""The loop around the step: where a run starts from, what it refuses, when it logs and saves."""

import copy
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from gatedfm.data import corpus, pipeline
from gatedfm.data.types import DataError
from gatedfm.execution.recognizer import Recognizer
from gatedfm.factorization import svd
from gatedfm.trainers import checkpoints, log, loop, workdirs
from gatedfm.trainers.checkpoints import CheckpointError
from gatedfm.trainers.config import ConfigError
from gatedfm.trainers.workdirs import WorkdirError


class FakeStep:
  """Stands in for the compiled step: counts, and keeps what it was given."""

  def __init__(self):
    self.states, self.batches, self.sigterm_at, self.nan_at = [], [], None, None

  def make(self, *_):
    return self

  def prepare(self, *_):
    return []

  def __call__(self, state, batch, gating_now):
    self.states.append(jax.device_get(state))
    self.batches.append(jax.device_get(batch))
    at = int(state.step) + 1
    if at == self.sigterm_at:
      os.kill(os.getpid(), signal.SIGTERM)
    return state.replace(step=state.step + 1), {'loss': np.nan if at == self.nan_at else at}


class FakeEvaluator:
  def __init__(self, *_):
    pass

  def prepare(self, *_):
    pass

  def __call__(self, *_):
    return {'validation/loss': 1.0}


@pytest.fixture
def fake(monkeypatch, fast_compilation):
  fake, make_mesh = FakeStep(), loop.partitioning.make_mesh
  one = jax.devices()[:1]
  monkeypatch.setattr(loop.partitioning, 'make_mesh', lambda *sizes: make_mesh(*sizes, one))
  monkeypatch.setattr(loop.step, 'TrainStep', fake.make)
  monkeypatch.setattr(loop, 'Evaluator', FakeEvaluator)
  return fake


@pytest.fixture
def cfg(tone_data):
  cfg = tiny_run.dense(tone_data)
  cfg.steps = 8
  return cfg


def copied(run, tmp_path):
  shutil.copytree(run, tmp_path / run.name)
  return tmp_path / run.name


def rows(workdir, key='train/loss'):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {row['step']: row[key] for row in lines if key in row}


def content(folder):
  files = (p for p in Path(folder).rglob('*') if p.is_file())
  return {p: p.read_bytes() for p in files}


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_from_scratch_then_resuming_its_own(cfg, fake, tmp_path, capsys):
  """Stopped at a step that is being saved anyway: one checkpoint, not two."""
  cfg.checkpoint_every = 2
  fake.sigterm_at = 4
  with pytest.raises(loop.Stopped) as stopped:
    loop.train(cfg, tmp_path)
  assert stopped.value.code == 143
  out = capsys.readouterr().out
  assert 'restore: nothing to restore, starting from scratch' in out
  assert 'SIGTERM: saved step 4; the same command goes on' in out
  fake.sigterm_at = None
  before = fake.states[-1]
  loop.train(cfg, tmp_path)
  assert 'restore: resuming at step 4' in capsys.readouterr().out
  assert_equal(fake.states[4].params, before.params)
  assert len(fake.states) == 8
  assert list(rows(tmp_path)) == list(range(1, 9))
  # The data went on where it was: no batch twice.
  keys = {b['features'].tobytes() for b in fake.batches}
  assert len(keys) == 8
  loop.train(cfg, tmp_path)
  assert 'already trained to step 8' in capsys.readouterr().out
  assert len(fake.states) == 8


def test_what_auto_means_is_settled_when_a_run_begins(cfg, fake, tmp_path, monkeypatch):
  """Else a workdir would be trained on, or scored, with other data on another machine."""
  (mine,) = cfg.data.sources
  resolved = lambda spec, _: mine if spec == 'auto' else spec
  monkeypatch.setattr(loop.sources, 'resolve', resolved)
  cfg.data.sources, fake.sigterm_at = ('auto',), 2
  with pytest.raises(loop.Stopped):
    loop.train(copy.deepcopy(cfg), tmp_path)
  assert checkpoints.load_config(tmp_path)['data']['sources'] == [mine]
  monkeypatch.setattr(loop.sources, 'resolve', lambda spec, _: 'espeak')
  fake.sigterm_at = None
  loop.train(cfg, tmp_path)
  assert checkpoints.load_config(tmp_path)['data']['sources'] == [mine]


def test_changed_data_is_not_resumed_on(cfg, fake, tone_data, tmp_path):
  """Batches go on by number: of other data they would be other utterances, test texts perhaps."""
  shutil.copytree(tone_data, tmp_path / 'tones', ignore=lambda *_: ('cache', 'runs'))
  manifest = tmp_path / 'tones' / 'manifest.jsonl'
  cfg.data.sources = (f'manifest:{manifest}',)
  fake.sigterm_at = 2
  with pytest.raises(loop.Stopped):
    loop.train(cfg, tmp_path / 'run')
  manifest.write_text(''.join(manifest.read_text().splitlines(keepends=True)[1:]))
  before = content(tmp_path / 'run')
  with pytest.raises(WorkdirError, match='has changed since .*run began.*continue_from='):
    loop.train(cfg, tmp_path / 'run')
  assert content(tmp_path / 'run') == before


def test_continuing_another_run(cfg, fake, dense_run, tmp_path, capsys):
  cfg.continue_from, cfg.steps = str(dense_run), tiny_run.STEPS + 3
  fake.sigterm_at = tiny_run.STEPS + 1
  with pytest.raises(loop.Stopped):
    loop.train(cfg, tmp_path)
  assert f'restore: continuing from {dense_run}' in capsys.readouterr().out
  first = fake.states[0]
  assert first.step == tiny_run.STEPS
  assert_equal(first.params, checkpoints.load_params(dense_run))
  moments = [x for x in jax.tree.leaves(first.opt_state) if x.ndim]
  assert all(x.any() for x in moments)
  assets = corpus.Assets.load(dense_run / 'assets')
  data_dir = Path(cfg.data_dir)
  split = corpus.open_split(cfg.data, assets, 'train', data_dir)
  batches = pipeline.train_iterator(split.examples, split.caches, cfg.data, split.shapes)
  batches.set_state({'next_batch': tiny_run.STEPS})
  np.testing.assert_array_equal(fake.batches[0]['features'], next(batches)['features'])
  batches.close()
  # Now there is a checkpoint of its own, and that comes first.
  loop.train(cfg, tmp_path)
  assert f'restore: resuming at step {tiny_run.STEPS + 1}' in capsys.readouterr().out


def test_continuing_needs_more_steps(cfg, fake, dense_run, tmp_path):
  cfg.continue_from, cfg.steps = str(dense_run), tiny_run.STEPS
  with pytest.raises(
    ConfigError, match=f'steps is {tiny_run.STEPS}, but .*dense stands at {tiny_run.STEPS}'
  ):
    loop.train(cfg, tmp_path)
  cfg.steps += 1  # as advised, in the same workdir
  loop.train(cfg, tmp_path)
  assert list(rows(tmp_path)) == [cfg.steps]


def test_continuing_another_model_is_refused(cfg, fake, dense_run, tmp_path):
  cfg.continue_from, cfg.steps, cfg.model.encoder_ffn = str(dense_run), 50, 32
  with pytest.raises(CheckpointError, match=r'params/encoder/.*model \(32,\), checkpoint \(16,\)'):
    loop.train(cfg, tmp_path)


def test_starting_from_another_runs_parameters(fake, tone_data, dense_run, tmp_path, capsys):
  cfg = tiny_run.gated(tone_data, str(dense_run))
  cfg.steps = 2
  loop.train(cfg, tmp_path)
  out = capsys.readouterr().out
  assert f"restore: parameters of {dense_run}, fresh ['decoder_gates', 'encoder_gates']" in out
  first, parent = fake.states[0], checkpoints.load_params(dense_run)
  assert first.step == 0
  assert set(first.params) - set(parent) == {'decoder_gates', 'encoder_gates'}
  assert_equal({k: first.params[k] for k in parent}, parent)
  assert content(tmp_path / 'assets').values()
  assert list(content(tmp_path / 'assets').values()) == list(content(dense_run / 'assets').values())


FACTORS = ('decoder/embedding:4', 'decoder/output/kernel:16', 'ctc/kernel:16')


def test_matrices_of_another_run_become_factors(cfg, fake, dense_run, tmp_path, capsys):
  cfg.init_from, cfg.model.factors, cfg.steps = str(dense_run), FACTORS, 4
  cfg.checkpoint_every, fake.sigterm_at = 2, 2
  with pytest.raises(loop.Stopped):
    loop.train(cfg, tmp_path / 'run')
  assert 'restore: decoder/embedding by rank 4, ' in capsys.readouterr().out
  first, parent = fake.states[0].params, checkpoints.load_params(dense_run)
  for module in ('decoder/output', 'ctc'):
    pair = [tree['decoder']['output'] if '/' in module else tree['ctc'] for tree in (first, parent)]
    got, want = (np.asarray(x['kernel']) for x in pair)
    np.testing.assert_allclose(got, want, atol=1e-5)
  table = first['decoder']['embedding']
  best = svd.factorize(parent['decoder']['embedding'], 4).product()
  np.testing.assert_allclose(np.asarray(table), best, atol=1e-5)
  fake.sigterm_at = None
  loop.train(cfg, tmp_path / 'run')
  assert 'restore: resuming at step 2' in capsys.readouterr().out
  assert_equal(fake.states[2].params, first)
  # Factors start from factors as they are.
  cfg.init_from = str(tmp_path / 'run')
  cfg.model.factors = (*FACTORS, 'subsample/out/kernel:9')
  loop.train(cfg, tmp_path / 'next')
  again = fake.states[4].params
  assert_equal(again['decoder'], first['decoder'])
  assert again['subsample']['out']['kernel'].rank == 9


@pytest.mark.parametrize(
  ('factors', 'message'),
  [
    (('decoder/embedding',), 'write PATH:RANK'),
    (('decoder/nothing:3',), 'decoder/nothing:3 of factors is none'),
    (('decoder/embedding:17',), 'no such rank'),
    ('decoder/embedding:3', 'write a tuple'),
  ],
)
def test_factors_that_cannot_be(factors, message, cfg, fake, dense_run, tmp_path):
  cfg.init_from, cfg.model.factors = str(dense_run), factors
  with pytest.raises(ConfigError, match=message):
    loop.train(cfg, tmp_path / 'run')
  assert not fake.states


def test_factors_are_trained_and_recognise(cfg, dense_run, tmp_path, fast_compilation):
  cfg.init_from, cfg.model.factors, cfg.steps = str(dense_run), FACTORS, 2
  loop.train(cfg, tmp_path / 'run')
  start, end = (checkpoints.load_params(w)['decoder'] for w in (dense_run, tmp_path / 'run'))
  assert end['embedding'].rank == 4
  moved = np.abs(np.asarray(end['output']['kernel']) - start['output']['kernel'])
  assert 0 < moved.max() < 0.1
  features = np.random.default_rng(0).normal(-5, 4, (1, 64, 80)).astype(np.float32)
  answers = [
    Recognizer.load(tmp_path / 'run', execution)(features, np.array([64]), 'asr', ['fra'])
    for execution in ('mask', 'skip')
  ]
  np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)


def test_parameters_that_do_not_fit_are_named(fake, tone_data, dense_run, tmp_path):
  cfg = tiny_run.gated(tone_data, str(dense_run))
  cfg.model.decoder_ffn = 24
  with pytest.raises(CheckpointError, match=r'decoder/layers.*model \(16, 24\)') as error:
    loop.train(cfg, tmp_path)
  assert 'gates' not in str(error.value)
  assert not fake.states


@pytest.mark.parametrize('name', ['init_from', 'continue_from'])
def test_a_parent_that_is_not_there(cfg, tmp_path, name):
  setattr(cfg, name, str(tmp_path / 'nothing'))
  with pytest.raises(CheckpointError, match='nothing does not exist; give the workdir'):
    loop.train(cfg, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_the_workdir_of_another_configuration_is_refused(cfg, fake, dense_run, tmp_path):
  workdir = copied(dense_run, tmp_path)
  before = content(workdir)
  cfg.optimizer.peak_lr, cfg.vocab = 0.5, 99
  with pytest.raises(WorkdirError) as error:
    loop.train(cfg, workdir)
  message = str(error.value)
  for line in (
    'optimizer.peak_lr: 0.003 -> 0.5',
    'vocab: 56 -> 99',
    f'steps: {tiny_run.STEPS} -> 8',
  ):
    assert line in message
  assert 'Choose another --workdir' in message
  assert content(workdir) == before
  assert not fake.states


def test_one_process_at_a_time_trains_in_a_workdir(cfg, fake, tmp_path, monkeypatch, capsys):
  cfg.steps = 1
  with (tmp_path / workdirs.LOCK).open('w') as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(WorkdirError, match=f'{tmp_path}: another process works here'):
      loop.train(cfg, tmp_path)
    assert list(content(tmp_path)) == [tmp_path / workdirs.LOCK]
    # The other processes of a training that spans several share the first one's lock.
    with monkeypatch.context() as patch:
      patch.setattr(jax, 'process_index', lambda: 1)
      with workdirs.alone(tmp_path):
        pass
  loop.train(cfg, tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(fcntl, 'flock', lambda *_: os.stat('/nowhere'))
    loop.train(cfg, tmp_path)
  assert f'{tmp_path}/{workdirs.LOCK} cannot be locked' in capsys.readouterr().out


def test_operation_may_change(tone_data, fake, dense_run, tmp_path, capsys):
  workdir = copied(dense_run, tmp_path)
  cfg = tiny_run.dense(tone_data)
  cfg.log_every, cfg.eval_every, cfg.keep, cfg.tensorboard, cfg.data.workers = 9, 9, 1, True, 1
  loop.train(cfg, workdir)
  assert 'already trained' in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_never_saved(cfg, fake, tmp_path):
  cfg.checkpoint_every, fake.nan_at = 3, 6
  with pytest.raises(FloatingPointError, match=r'step 6: loss is not finite. Batch: train/\d+'):
    loop.train(cfg, tmp_path)
  with checkpoints.Checkpoints(tmp_path) as ckpt:
    assert ckpt.latest == 3


def test_logged_values_are_means_and_do_not_depend_on_resumption(cfg, fake, tmp_path):
  cfg.steps, cfg.log_every, cfg.checkpoint_every, cfg.eval_every = 8, 3, 6, 4
  fake.nan_at = 7  # the loss of step n is n, but for this
  with pytest.raises(FloatingPointError):
    loop.train(cfg, tmp_path)
  fake.nan_at = None
  loop.train(cfg, tmp_path)
  assert rows(tmp_path) == {1: 1.0, 3: 2.5, 6: 5.0, 8: 7.5}
  assert list(rows(tmp_path, 'validation/loss')) == [4, 8]


def test_speed_leaves_evaluation_and_compilation_out(cfg, fake, tmp_path, monkeypatch, capsys):
  """By a clock that stands still but for a second a step and what is slow, as the first step."""
  now = [0.0]
  monkeypatch.setattr(loop.time, 'perf_counter', lambda: now[0])
  monkeypatch.setattr(log, 'peak_flops', lambda _: 1.0)  # it measures by the same clock
  passes = lambda seconds: now.__setitem__(0, now[0] + seconds)

  class Slow(FakeStep):
    def __call__(self, *args):
      passes(1 if self.states else 500)
      return super().__call__(*args)

  evaluate = lambda *_: passes(1000) or {'validation/loss': 1.0}
  monkeypatch.setattr(loop.step, 'TrainStep', Slow().make)
  monkeypatch.setattr(loop, '_prepare', lambda *args: {(s.batch, s.frames): [s] for s in args[3]})
  monkeypatch.setattr(loop.compiling, 'wait', lambda *_: passes(100))
  monkeypatch.setattr(FakeEvaluator, '__call__', evaluate)
  cfg.steps, cfg.log_every, cfg.eval_every = 6, 3, 2
  loop.train(cfg, tmp_path)
  assert now[0] == 500 + 5 + 3 * 1000 + 2 * 100
  speed = rows(tmp_path, 'speed/utterances_per_second')
  assert speed == {3: 8.0, 6: 8.0}
  lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith('step ')]
  assert lines[0] == 'step 1/6 16% | loss 1.000'
  assert lines[1].endswith('ETA 0:03')


def test_lines_on_compiling_count_the_same(cfg, fake, tmp_path, monkeypatch, capsys):
  """Two shapes to train on and one to validate on: what is announced is what is waited for."""
  waited, cfg.steps, cfg.data.num_buckets = [], 1, 2
  fake.prepare = lambda *_: ['gradient', 'update']
  monkeypatch.setattr(loop.compiling, 'wait', lambda *args: waited.append((args[0], args[2])))
  loop.train(cfg, tmp_path)
  line = 'compiling: programs for the first batch: 2; later ones: 2\n'
  assert line in capsys.readouterr().out
  assert waited == [(['gradient', 'update'], 'programs for this batch')]


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('vocab', 4000, 'vocab.*too large'),
    ('vocab', 20, 'vocab.*too small'),
    ('mesh.data', 3, 'mesh.*does not fit the device count 1:'),
    ('data.bucket_frames', (10,), 'data.*bucket_frames'),
    ('steps', 0, 'steps'),
  ],
)
def test_impossible_values_are_refused_before_anything_is_compiled(
  cfg, fake, tmp_path, field, value, message
):
  owner, _, name = field.rpartition('.')
  setattr(getattr(cfg, owner) if owner else cfg, name, value)
  with pytest.raises((ConfigError, DataError), match=message):
    loop.train(cfg, tmp_path / 'run')
  assert not fake.states


@pytest.mark.parametrize('before', [None, 'runs', 'runs/mine', 'runs/mine/notes'])
def test_a_refused_start_leaves_what_was_there_before(cfg, tmp_path, before):
  """No folder that it made, and every folder that it did not, also an empty one."""
  if before:
    (tmp_path / before).mkdir(parents=True)
  found = set(tmp_path.rglob('*'))
  cfg.vocab = 4000
  with pytest.raises(DataError, match='too large'):
    loop.train(cfg, tmp_path / 'runs' / 'mine')
  assert {p for p in tmp_path.rglob('*') if p.name != workdirs.LOCK} == found


def test_what_features_say_is_not_taken_for_the_vocabulary(cfg, tmp_path, monkeypatch):
  def refuse(*_):
    raise ValueError('no such band')

  monkeypatch.setattr(corpus, 'open_features', refuse)
  with pytest.raises(ValueError, match='^no such band') as raised:
    loop.train(cfg, tmp_path / 'run')
  assert raised.type is ValueError


@pytest.mark.parametrize('gates', [False, True])
def test_gates_reach_their_target(dense_run, gated_run, gates):
  """What the sessions' runs logged: dense without sparsity, gated close to its target."""
  if not gates:
    assert not rows(dense_run, 'train/sparsity')
    return
  train, target = rows(gated_run, 'train/sparsity'), rows(gated_run, 'train/sparsity_target')
  assert train[1] < 0.25
  assert target[1] == 0
  assert target[tiny_run.GATED_STEPS] == tiny_run.TARGET
  last = np.mean([train[i] for i in range(tiny_run.GATED_STEPS - 15, tiny_run.GATED_STEPS + 1)])
  assert abs(last - tiny_run.TARGET) < 0.2
  assert abs(rows(gated_run, 'validation/sparsity')[tiny_run.GATED_STEPS] - tiny_run.TARGET) < 0.25
