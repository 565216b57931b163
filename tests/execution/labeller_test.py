"""Trained classifiers on texts of people's own."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run
from tiny_texts import config, write_data

from gatedfm.data import rows, texts, word_vectors
from gatedfm.data.types import DataError
from gatedfm.execution.labeller import Labeller, trained_vectors
from gatedfm.models.speech_config import ConfigError
from gatedfm.models.tables import TableConfig
from gatedfm.trainers import checkpoints, text_loop
from gatedfm.trainers.checkpoints import CheckpointError


@pytest.fixture(scope='module')
def folder(tmp_path_factory, fast_compilation):
  folder = tmp_path_factory.mktemp('labels')
  write_data(folder)
  some = {
    'dense': None,
    'small': TableConfig('quantized_factors', rank=2),
    'folded': TableConfig('factorized', rank=2),
    'relu': TableConfig('factorized', rank=2, project_relu=True),
  }
  for name, table in some.items():
    text_loop.train(config(folder, table=table, epochs=3), folder / name)
  return folder


@pytest.mark.parametrize('name', ['dense', 'small', 'folded', 'relu'])
def test_accuracy_is_what_training_has_reported(folder, name):
  lines = [json.loads(line) for line in (folder / 'own.jsonl').read_text().splitlines()]
  result = json.loads((folder / name / text_loop.RESULT).read_text())['accuracy']
  for split, at in (('test', 0), ('validation', 1)):
    labeller = Labeller.load(folder / name, (0, 3)[at])
    asked = [line for line in lines if line['split'] == split]
    found = labeller([line['text'] for line in asked])
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    right = [labeller.labels[i] == line['label'] for i, line in zip(found.argmax(1), asked)]
    assert np.mean(right) == pytest.approx(result[split][at])
  # The best on validation, where none is named; alone as among others.
  best = Labeller.load(folder / name)([line['text'] for line in lines])
  named = Labeller.load(folder / name, (0, 3)[int(np.argmax(result['validation']))])
  for i in (0, 100, 239):
    np.testing.assert_allclose(best[i], named([lines[i]['text']])[0], rtol=1e-4)


def test_texts_without_a_known_word_and_none(folder):
  labeller = Labeller.load(folder / 'dense')
  blank, other = labeller(['', 'zzz'])
  np.testing.assert_array_equal(blank, other)
  assert labeller([]).shape == (0, 2)


@pytest.mark.parametrize('name', ['dense', 'small', 'folded'])
def test_vectors_are_the_rows_of_the_table(folder, name):
  found = trained_vectors(folder / name, 3)
  params = jax.tree.map(lambda x: x[1], checkpoints.load_params(folder / name))
  assert 'apple' in found.words
  assert 'saw' not in found.words  # has no vector
  table = dict(zip(found.words, found.table))
  if name == 'dense':
    np.testing.assert_array_equal(found.table, params['params']['table']['embedding'][1:])
  if name == 'folded':
    own = params['params']['table']
    np.testing.assert_allclose(found.table, own['embedding'][1:] @ own['projection'], rtol=1e-4)
  assert np.linalg.matrix_rank(found.table, 1e-3) == (6 if name == 'dense' else 2)
  path = folder / f'{name}.txt'
  run = [f'--checkpoint={folder / name}', '--seed=3', f'--write_vectors={path}']
  done = subprocess.run(
    [sys.executable, '-m', 'gatedfm.classify', *run], cwd=tiny_run.ROOT, capture_output=True
  )
  assert done.returncode == 0, done.stderr
  again = word_vectors.read(str(path))
  assert list(again.words) == list(table)
  np.testing.assert_allclose(again.table, found.table, rtol=1e-5, atol=1e-7)


def test_what_cannot_be(folder, tmp_path):
  with pytest.raises(ConfigError, match=r'seed 7 was not trained .*: take one of \[0, 3\]'):
    Labeller.load(folder / 'dense', 7)
  with pytest.raises(CheckpointError, match='does not exist'):
    Labeller.load(tmp_path / 'none')
  (tmp_path / 'config.json').write_bytes((folder / 'dense' / 'config.json').read_bytes())
  with pytest.raises(CheckpointError, match='is not trained to its end'):
    Labeller.load(tmp_path)


def test_files_of_texts(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_text('text,label\n"one, two",x\nthree,\n')
  assert texts.given(path) == [('one, two', 'x'), ('three', '')]
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "one"}\n{"text": "two", "label": 3}\n')
  assert texts.given(path) == [('one', ''), ('two', '3')]
  path = tmp_path / 'a.txt'
  path.write_text('one\n\ntwo\n')
  assert texts.given(path) == [('one', ''), ('two', '')]
  path.write_text('\n')
  with pytest.raises(DataError, match=r'a\.txt holds no text'):
    texts.given(path)
  with pytest.raises(DataError, match=r'none\.txt cannot be read: No such file'):
    rows.text_of(tmp_path / 'none.txt')
  with pytest.raises(DataError, match=r'a\.xls: give a \.txt'):
    texts.given(tmp_path / 'a.xls')
  path = tmp_path / 'b.jsonl'
  path.write_text('{"words": "one"}\n')
  with pytest.raises(DataError, match="line 1: has no 'text'; a line has text"):
    texts.given(path)


def test_the_command(folder):
  command = [sys.executable, '-m', 'gatedfm.classify', f'--checkpoint={folder / "dense"}']
  run = functools.partial(subprocess.run, cwd=tiny_run.ROOT, capture_output=True, text=True)
  done = run([*command, f'--texts={folder / "own.jsonl"}'])
  assert done.returncode == 0, done.stderr
  answers = [line.split('\t') for line in done.stdout.splitlines()]
  assert len(answers) == 240
  assert {label for label, _, _ in answers} == {'fruit', 'tool'}
  found = Labeller.load(folder / 'dense')(['my apple'])[0]
  assert 'accuracy ' in done.stderr
  done = run([*command, 'my  apple'])
  label = ('fruit', 'tool')[int(found.argmax())]
  assert done.stdout == f'{label}\t{found.max():.3f}\tmy apple\n'
