"""Classifiers learn, go on where they stopped, and start from others' tables."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tiny_texts import FRUIT, OTHER, TOOLS, config, write_data

from gatedfm.data.types import DataError
from gatedfm.models.speech_config import ConfigError
from gatedfm.models.tables import TableConfig
from gatedfm.trainers import checkpoints, text_corpus, text_loop
from gatedfm.trainers.workdirs import WorkdirError


@pytest.fixture(scope='module')
def folder(tmp_path_factory, fast_compilation):
  folder = tmp_path_factory.mktemp('texts')
  write_data(folder)
  return folder


@pytest.fixture(scope='module')
def dense(folder):
  text_loop.train(config(folder), folder / 'dense')
  return folder / 'dense'


def result(workdir):
  return json.loads((workdir / text_loop.RESULT).read_text())


def killed(monkeypatch, cfg, workdir):
  """Trains for an epoch and what of the second comes before its checkpoint."""
  original = text_loop.log.Log.write

  def stop(self, step, values):
    original(self, step, values)
    if step == 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(text_loop.log.Log, 'write', stop)
  with pytest.raises(KeyboardInterrupt):
    text_loop.train(cfg, workdir)
  monkeypatch.undo()


def test_corpus(folder):
  corpus = text_corpus.load(config(folder).data, False)
  assert set(corpus.vocabulary.words) == {'_PAD', *FRUIT, *TOOLS[1:], *OTHER}
  assert (corpus.table[0] == 0).all()
  train = corpus.splits['train']
  kept = dataclasses.replace(config(folder).data, without_vector='keep', unknown='row')
  more = text_corpus.load(kept, False)
  assert len(more.vocabulary.words) == len(corpus.vocabulary.words) + 161 + 1
  np.testing.assert_allclose(more.table[1], corpus.table[1:].mean(0), rtol=1e-5)
  assert np.abs(more.table[2:]).sum(1).min() > 0
  # Each text once an epoch, for each seed, in another order.
  batches = text_corpus.Batches(train, 16, 2, (0, 3))
  epoch = list(batches.epoch(1))
  assert len(epoch) == len(batches)
  taken = [np.concatenate([b.index[z][b.weights[z] > 0] for b in epoch]) for z in (0, 1)]
  for rows in taken:
    assert sorted(rows) == list(range(len(train)))
  assert (taken[0] != taken[1]).any()
  for batch in epoch:
    assert train.lengths[batch.index].max() <= batch.length
  again = list(batches.epoch(1))
  assert all((a.index == b.index).all() for a, b in zip(epoch, again))
  assert any((a.index != b.index).any() for a, b in zip(epoch, batches.epoch(2)))


def test_offline_baseline(folder):
  plain = config(folder).data
  full = text_corpus.load(plain, False).table
  small = dataclasses.replace(plain, offline='us', offline_compression=0.5)
  table = text_corpus.load(small, False).table
  assert table.shape == (len(full), 3)
  u, s, _ = np.linalg.svd(full, full_matrices=False)
  np.testing.assert_allclose(np.abs(table), np.abs(u * s)[:, :3], atol=1e-4)
  small = dataclasses.replace(plain, offline='u', offline_compression=0.5)
  np.testing.assert_allclose(
    np.abs(text_corpus.load(small, False).table), np.abs(u[:, :3]), atol=1e-4
  )
  with pytest.raises(ConfigError, match='leaves no feature'):
    text_corpus.load(dataclasses.replace(small, offline_compression=0.9), False)


def test_it_learns_and_chooses_on_validation(dense, capsys):
  found = result(dense)
  assert np.mean(found['accuracy']['test']) > 0.8
  rows = [json.loads(line) for line in (dense / 'metrics.jsonl').read_text().splitlines()]
  best = max(row['validation/accuracy'] for row in rows)
  assert np.mean(found['accuracy']['validation']) >= best - 1e-6
  assert found['table']['bytes_removed'] == 0
  text_loop.train(config(dense.parent), dense)
  assert 'already trained' in capsys.readouterr().out
  other = config(dense.parent, epochs=5)
  with pytest.raises(WorkdirError, match='epochs: 6 -> 5'):
    text_loop.train(other, dense)


@pytest.mark.parametrize('kind', ['dan', 'lstm'])
def test_stopped_and_resumed_is_uninterrupted(kind, folder, monkeypatch):
  whole, cut = folder / f'{kind}_whole', folder / f'{kind}_cut'
  options = {'kind': kind, 'checkpoint_every': 1, 'epochs': 3}
  text_loop.train(config(folder, **options), whole)
  killed(monkeypatch, config(folder, **options), cut)
  text_loop.train(config(folder, **options), cut)
  a, b = checkpoints.load_params(whole), checkpoints.load_params(cut)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  rows = [(w / 'metrics.jsonl').read_text().splitlines() for w in (whole, cut)]
  for one, other in zip(*rows, strict=True):
    one, other = json.loads(one), json.loads(other)
    assert (one['step'], one['train/loss']) == (other['step'], other['train/loss'])


@pytest.mark.parametrize(
  'table',
  [
    TableConfig('factorized', 0.4),
    TableConfig('factorized', rank=6),
    TableConfig('quantized', bits=8),
    TableConfig('banded', rank=4),
    TableConfig('hashed', 0.4),
    TableConfig('product_quantized', parts=3, pieces=8),
  ],
)
def test_tables_are_made_of_the_trained_ones(table, dense):
  folder, before = dense.parent, result(dense)
  name = f'{table.kind}{table.rank}'
  # As it was made; then trained on.
  text_loop.train(config(folder, table=table, init_from=str(dense), epochs=0), folder / f'{name}_0')
  at_once = result(folder / f'{name}_0')
  small = folder / f'{name}_4'
  text_loop.train(config(folder, table=table, init_from=str(dense)), small)
  after = result(small)
  assert after['table'] == at_once['table']
  assert np.mean(after['accuracy']['test']) > 0.7
  if table.rank == 6 or table.kind == 'quantized':
    np.testing.assert_allclose(at_once['accuracy']['test'], before['accuracy']['test'], atol=0.03)
  if table.kind == 'quantized':
    old, new = (checkpoints.load_params(w)['quantized'] for w in (folder / f'{name}_0', small))
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_factors_are_quantized_as_they_were_trained(dense):
  folder = dense.parent
  factors = TableConfig('factorized', rank=3)
  text_loop.train(config(folder, table=factors, init_from=str(dense)), folder / 'factors')
  codes = TableConfig('quantized_factors')  # of the rank that there is
  options = {'init_from': str(folder / 'factors'), 'epochs': 0}
  text_loop.train(config(folder, table=codes, **options), folder / 'codes')
  one, other = result(folder / 'factors'), result(folder / 'codes')
  np.testing.assert_allclose(other['accuracy']['test'], one['accuracy']['test'], atol=0.05)
  assert other['table']['bytes'] < one['table']['bytes']
  codes = TableConfig('quantized_factors', rank=2)
  with pytest.raises(ConfigError, match=r'table.rank is 2, that of .* 3'):
    text_loop.train(config(folder, table=codes, **options), folder / 'codes2')


def test_a_fresh_lstm(folder):
  text_loop.train(config(folder, 'lstm', epochs=1), folder / 'lstm')
  options = {'init_from': str(folder / 'lstm'), 'epochs': 0}
  text_loop.train(config(folder, 'lstm', fresh_lstm=True, **options), folder / 'fresh')
  old, new = (checkpoints.load_params(folder / name)['params'] for name in ('lstm', 'fresh'))
  assert np.abs(old['lstm']['kernel'] - new['lstm']['kernel']).max() > 0.01
  np.testing.assert_array_equal(old['table']['embedding'], new['table']['embedding'])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'seeds': (0, 1)}, r'seeds are \(0, 1\), those of'),
    ({'kind': 'lstm'}, 'another classifier'),
    ({'epochs': 0, 'init_from': ''}, 'names nothing to evaluate'),
    ({'seeds': (1, 1)}, 'all different'),
    ({'fresh_lstm': True}, 'fresh_lstm'),
    ({'table': TableConfig('factorized', rank=7)}, 'at most 6'),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(change, message, dense, tmp_path):
  options = {'init_from': str(dense)} | change
  seeds = options.pop('seeds', (0, 3))
  cfg = config(dense.parent, **options)
  cfg.seeds = seeds
  with pytest.raises(ConfigError, match=message):
    text_loop.train(cfg, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('kind', ['quantized', 'product_quantized'])
def test_codes_of_nothing_are_refused(kind, folder, tmp_path):
  table = TableConfig(kind, parts=3 if kind == 'product_quantized' else 0)
  cfg = config(folder, table=table)
  cfg.data.vectors, cfg.classifier.features = '', 6
  with pytest.raises(ConfigError, match='keeps its codes: give data.vectors or init_from'):
    text_loop.train(cfg, tmp_path / 'run')


def test_other_texts_are_refused(dense, tmp_path):
  cfg = config(dense.parent, init_from=str(dense))
  cfg.data.min_count = 20
  with pytest.raises(ConfigError, match='other texts or another vocabulary'):
    text_loop.train(cfg, tmp_path / 'run')


def test_what_a_training_began_with_may_not_change(tmp_path, monkeypatch):
  """Whether it was killed in between, or its parent trained anew."""
  write_data(tmp_path)
  own = tmp_path / 'own.jsonl'
  texts = own.read_text()
  text_loop.train(config(tmp_path, epochs=1), tmp_path / 'dense')
  options = {'checkpoint_every': 1, 'epochs': 2}
  killed(monkeypatch, config(tmp_path, **options), tmp_path / 'cut')
  swapped = texts.replace('"fruit"', '"x"').replace('"tool"', '"fruit"').replace('"x"', '"tool"')
  own.write_text(swapped)
  before = (tmp_path / 'cut' / text_loop.CORPUS).read_text()
  for cfg, name in ((config(tmp_path, **options), 'cut'), (config(tmp_path, epochs=1), 'dense')):
    with pytest.raises(WorkdirError, match='have changed since the training'):
      text_loop.train(cfg, tmp_path / name)
  assert (tmp_path / 'cut' / text_loop.CORPUS).read_text() == before
  own.write_text(texts)
  child = config(tmp_path, init_from=str(tmp_path / 'dense'), **options)
  text_loop.train(child, tmp_path / 'child')
  shutil.rmtree(tmp_path / 'dense')
  text_loop.train(config(tmp_path, epochs=1), tmp_path / 'dense')
  with pytest.raises(WorkdirError, match='began with an earlier training of .*dense: remove it'):
    text_loop.train(child, tmp_path / 'child')


def test_what_it_starts_from_is_a_choice_too(dense, tmp_path):
  """And while options are chosen, test is not looked at."""
  cfg = config(dense.parent, init_from=str(dense), epochs=1, final=False)
  cfg.optimizer.peak_lr = 1e3
  made = text_loop.train(cfg, tmp_path / 'run')
  assert made['accuracy']['validation'] == result(dense)['accuracy']['validation']
  assert set(made['accuracy']) == {'validation'}
  with np.load(tmp_path / 'run' / text_loop.RIGHT) as right:
    assert right.files == ['validation']
    assert right['validation'].mean(1).tolist() == made['accuracy']['validation']


def test_as_released_all_texts_are_padded_alike(folder):
  cfg = config(folder, epochs=1)
  cfg.classifier.reference_compat, cfg.data.longest = True, 9  # some texts are longer
  corpus = text_loop.load_corpus(cfg)
  batches = text_corpus.Batches(corpus.splits['train'], 16, 3, cfg.seeds, True)
  assert {batch.length for batch in batches.epoch(1)} == {9}
  assert text_loop.train(cfg, folder / 'compat')['accuracy']


def test_vectors_that_cannot_be_started_from(tmp_path):
  write_data(tmp_path)
  vectors = tmp_path / 'v.txt'
  cfg = config(tmp_path)
  cfg.data.without_vector = 'keep'
  vectors.write_text('nobody 1 2\nknows 3 4\n')
  with pytest.raises(DataError, match='none of the words of the training texts has a vector'):
    text_loop.load_corpus(cfg)
  np.save(tmp_path / 'v.npy', np.array([[1, 2], [np.nan, 4]], np.float32))
  vectors.write_text('apple\npear\n')
  cfg.data.vectors = str(tmp_path / 'v.npy')
  with pytest.raises(DataError, match="the vector of 'pear' has numbers that are not finite"):
    text_loop.load_corpus(cfg)
