"""Trained points from audio to summary and report."""

import collections
import copy
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from gatedfm import provenance
from gatedfm.analysis import report
from gatedfm.data import corpus
from gatedfm.evaluation import points, quality, sweep
from gatedfm.execution.decoding import Search
from gatedfm.execution.recognizer import Recognizer

TASKS = ('asr', 'lid', 'st_eng')


@pytest.fixture(scope='module')
def runs(dense_run, gated_run, tmp_path_factory):
  """Copies of the session's runs, beside which evaluations may be written."""
  folder = tmp_path_factory.mktemp('points')
  for run in (dense_run, gated_run):
    shutil.copytree(run, folder / run.name)
  return folder


@pytest.fixture(scope='module')
def gated(runs, tone_data, fast_compilation):
  other = f'manifest:{tone_data}/manifest.jsonl'
  return points.evaluate(runs / 'gated', 'validation', other), other


def outputs(runs, split='validation'):
  return [json.loads(x) for x in (runs / 'gated' / f'outputs_{split}.jsonl').open()]


def test_every_utterance_is_decoded_for_every_task(gated, runs):
  rows = outputs(runs)
  seen = collections.Counter((r['id'], r['task']) for r in rows)
  assert seen == {(f'validation/{i}', task): 1 for i in range(6) for task in TASKS}
  for r in rows:
    assert r['language'] == ('fra', 'rus')[int(r['id'][-1]) % 2]
    assert r['hypothesis'] in ('eng', 'fra', 'rus') or r['task'] != 'lid'
  spoken = {r['id']: r['reference'] for r in rows if r['task'] == 'asr'}
  assert set(spoken['validation/0'].split()) <= set(tiny_run.WORDS['fra'])


def test_the_scores_are_those_of_the_outputs(gated, runs):
  result, _ = gated
  counts = quality.counts(outputs(runs))
  for name in ('cer', 'wer', 'ctc_cer', 'bleu', 'chrf'):
    assert result[name] == counts[name].scores()
    low, high = result['interval'][name]
    assert low <= high
  assert sorted(result['cer']) == ['fra', 'mean', 'rus']
  assert result['lid']['same_source'] == counts['lid'].pooled()
  confusion = result['lid']['confusion_other_source']
  assert sum(n for row in confusion.values() for n in row.values()) == 8  # of the test split
  right = sum(confusion[x].get(x, 0) for x in confusion)
  assert result['lid']['other_source'] == right / 8


def test_elsewhere_the_weights_of_the_trained_tasks_do_not_count(runs, tone_data):
  cfg = points.load_train_config(runs / 'gated')
  cfg.data.loss_weights = (1.0, 30.0, 3.0)
  assets = corpus.Assets.load(runs / 'gated' / corpus.ASSETS)
  other = f'manifest:{tone_data}/manifest.jsonl'
  opened = points._splits(cfg, assets, 'validation', other, Path(cfg.data_dir))
  assert set(opened['other'].examples.task) == {assets.tokenizer.task_id('lid')}


def test_the_gate_map_adds_up(gated):
  result, _ = gated
  contexts = result['gate_map']['contexts']
  assert [(c['language'], c['task'], c['utterances']) for c in contexts] == [
    (language, task, 3) for task in TASKS for language in ('fra', 'rus')
  ]
  total = collections.defaultdict(float)
  for context in contexts:
    for site, layers in context['open'].items():
      counted = 3 * np.array(layers)
      np.testing.assert_allclose(counted, np.round(counted), atol=1e-6)
      total[site] += counted.sum() / 18
  sparsity = result['sparsity']
  assert sparsity['target'] == tiny_run.TARGET
  assert sparsity['sites'].keys() == total.keys()
  for site, closed in sparsity['sites'].items():
    np.testing.assert_allclose(closed, 1 - total[site], atol=1e-6)
  np.testing.assert_allclose(sparsity['modules'], np.mean(list(sparsity['sites'].values())))
  assert 0 < sparsity['macs'] < 1


def test_an_evaluation_is_reused_while_it_is_fresh(gated, runs, monkeypatch):
  result, other = gated
  path = runs / 'gated' / 'evaluation_validation.json'
  assert json.loads(path.read_text()) == result

  def decode(*_):
    raise AssertionError('decodes again')

  monkeypatch.setattr(points.quality, 'decode_all', decode)
  assert points.evaluate(runs / 'gated', 'validation', other) == result
  # No other source asked for: the evaluation that has one serves, and stays.
  assert points.evaluate(runs / 'gated', 'validation', '') == result
  with pytest.raises(AssertionError, match='decodes again'):
    points.evaluate(runs / 'gated', 'validation', other, ctc_weight=0.9)
  with pytest.raises(AssertionError, match='decodes again'):
    points.evaluate(runs / 'gated', 'validation', other, search=Search(beam=2))
  with pytest.raises(AssertionError, match='decodes again'):
    points.evaluate(runs / 'gated', 'validation', other + '?')
  old = result | {'key': result['key'] | {'step': 1}}
  path.write_text(json.dumps(old))
  with pytest.raises(AssertionError, match='decodes again'):
    points.evaluate(runs / 'gated', 'validation', other)
  path.write_text(json.dumps(result))


def test_other_data_of_the_same_name_is_evaluated_anew(gated, runs, monkeypatch):
  result, other = gated
  load, changed = points.sources.load, types.SimpleNamespace(fingerprint='changed')
  of_test = lambda spec, split, *a: changed if split == 'test' else load(spec, split, *a)
  monkeypatch.setattr(points.sources, 'load', of_test)
  assert points.evaluate(runs / 'gated', 'validation') == result
  monkeypatch.setattr(points.Recognizer, 'load', lambda *_: pytest.fail('evaluates'))
  with pytest.raises(pytest.fail.Exception, match='evaluates'):
    points.evaluate(runs / 'gated', 'validation', other)


def test_outputs_never_stand_beside_an_evaluation_of_others(
  gated, runs, tone_data, tmp_path, monkeypatch
):
  result, _ = gated
  shutil.copytree(runs / 'gated', tmp_path / 'gated')
  path = tmp_path / 'gated' / 'evaluation_validation.json'
  evaluate = lambda: points.evaluate(tmp_path / 'gated', 'validation')
  path.with_name('outputs_validation.jsonl').unlink()

  # Decoding is stood in for: its results are known.
  sites = points.load_train_config(runs / 'gated').model.sites()
  gate_map = types.SimpleNamespace(
    mean=lambda: {s.name: np.ones(s.layers) for s in sites}, contexts=list
  )
  recognizer = types.SimpleNamespace(prepare=lambda *_: [])
  monkeypatch.setattr(points.Recognizer, 'load', lambda *_: recognizer)
  monkeypatch.setattr(points.compiling, 'wait', lambda *_: [])
  monkeypatch.setattr(points.quality, 'decode_all', lambda *_: (gate_map, outputs(runs)))
  write = points.atomic.write_text

  def killed(file, text):
    if file == path:
      raise KeyboardInterrupt
    write(file, text)

  with monkeypatch.context() as patch:
    patch.setattr(points.atomic, 'write_text', killed)
    with pytest.raises(KeyboardInterrupt):
      evaluate()
  assert outputs(tmp_path) == outputs(runs)
  assert not path.exists()
  assert evaluate()['cer'] == result['cer']
  assert path.exists()


def test_gates_can_be_given(runs, tone_data, fast_compilation):
  """All open: every context says so, and no utterance is left out."""
  from gatedfm.gates import all_open

  cfg = points.load_train_config(runs / 'gated')
  assets = corpus.Assets.load(runs / 'gated' / 'assets')
  data = copy.deepcopy(cfg.data)
  data.tasks, data.loss_weights = ('asr',), ()
  split = corpus.open_split(data, assets, 'test', tone_data / 'cache')
  recognizer = Recognizer.load(runs / 'gated', 'mask')
  gate_map, rows = quality.decode_all(recognizer, split, all_open(cfg.model.sites()))
  assert len(rows) == 8
  assert all(set(sum(c['open'].values(), [])) == {1.0} for c in gate_map.contexts())


def test_splits_that_a_source_lacks_are_not_counted(tone_data, tmp_path):
  lines = (tone_data / 'manifest.jsonl').read_text().splitlines()
  rows = [r for r in map(json.loads, lines) if r['split'] != 'test']
  for row in rows:
    row['audio'] = str(tone_data / row['audio'])
  (tmp_path / 'part.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  cfg = tiny_run.dense(tone_data)
  cfg.data.sources = (f'manifest:{tmp_path}/part.jsonl',)
  data = points._data(cfg, tmp_path)
  assert {split: data[split]['fra']['utterances'] for split in data} == {
    'train': 12,
    'validation': 3,
  }


def test_utterances_of_languages_that_no_model_knows_are_not_timed(tone_data):
  cfg = tiny_run.dense(tone_data)
  for longest in (64, 1):  # some are as short; none is
    picked = points.timing_utterances(cfg, ('fra',), Path(cfg.data_dir), 'test', 2, longest)
    assert [u.task for u in picked] == [task for task in TASKS for _ in range(2)]
    assert {u.language for u in picked} == {'fra'}


def test_the_headline_is_the_fastest_gated_point_that_is_no_worse():
  def row(time_ratio, low, gated=True):
    cer = {'value': low + 0.01, 'low': low, 'high': low + 0.02}
    gate_map = {'contexts': []} if gated else None
    return {'time_ratio': time_ratio, 'gate_map': gate_map, 'difference': {'cer': cer}}

  rows = {
    'dense_faster': row(0.1, -0.5, gated=False),
    'gated_0.5': row(0.6, -0.002),
    'gated_0.7': row(0.4, 0.001),  # fastest, but worse
  }
  assert points._headline(rows) == {
    'point': 'gated_0.5',
    'time_ratio': 0.6,
    'no_worse': True,
    'cer_difference': pytest.approx(0.008),
    'cer_difference_interval': [-0.002, pytest.approx(0.018)],
  }
  del rows['gated_0.5']
  worse = points._headline(rows)
  assert (worse['point'], worse['no_worse']) == ('gated_0.7', False)
  del rows['gated_0.7']
  assert points._headline(rows) == {}


@pytest.fixture(scope='module')
def swept(runs, tone_data, fast_compilation):
  """The sweep of the session's runs: their training is done, its processes only recorded."""
  commands = []

  patch = pytest.MonkeyPatch()
  patch.setattr(sweep, '_process', commands.append)
  patch.setattr(sweep.sys, 'argv', ['sweep', '--config=c.py'])
  patch.setattr(provenance, 'git_revision', lambda: 'abc')
  cfg = tiny_run.sweep(tone_data)
  # A second dense model, as another seed would be.
  shutil.copytree(runs / 'dense', runs / 'dense_seed1')
  cfg.points = {
    'dense': cfg.points['dense'],
    'dense_seed1': copy.deepcopy(cfg.points['dense']),
    'gated': cfg.points['gated'],
  }
  sweep.run(cfg, runs)
  patch.undo()
  return commands


def test_a_sweep_trains_its_points_in_order(swept):
  assert [c[-1] for c in swept] == ['--only=dense', '--only=dense_seed1', '--only=gated']
  assert all(c[1:4] == ['-m', 'gatedfm.sweep', '--config=c.py'] for c in swept)


def test_the_summary_compares_points(swept, runs):
  summary = json.loads((runs / 'summary.json').read_text())
  assert list(summary['points']) == ['dense', 'dense_seed1', 'gated']
  assert summary['command'] == 'python -m gatedfm.sweep --config=c.py'
  assert summary['seeds'] == [0]
  assert summary['data']['train']['fra']['utterances'] == 12
  assert sum(row['utterances'] for row in summary['data']['test'].values()) == 8
  dense, same, gated = summary['points'].values()
  assert dense['time_ratio'] == 1
  assert [row['execution'] for row in (dense, same, gated)] == ['skip', 'skip', 'static']
  assert gated['time_ratio'] > 0
  assert gated['utterances'] == 2 * len(TASKS)
  assert sorted(gated['time_ratio_by_task']) == sorted(TASKS)
  assert dense['sparsity']['modules'] == 0
  assert dense['gate_map'] is None
  assert gated['macs_per_audio_second'] < dense['macs_per_audio_second']
  for name, score in same['difference'].items():
    assert score == {'value': 0, 'low': 0, 'high': 0}, name
  for name in ('cer', 'chrf'):
    difference = gated['difference'][name]
    expected = gated[name]['mean'] - dense[name]['mean']
    np.testing.assert_allclose(difference['value'], expected, atol=1e-9)
    assert difference['low'] <= difference['value'] <= difference['high']
  assert summary['headline']['point'] == 'gated'


def test_the_report_takes_the_summary(swept, runs, tmp_path):
  html = (runs / 'report.html').read_text()
  report.write_report(runs / 'summary.json', tmp_path / 'report.html')
  assert (tmp_path / 'report.html').stat().st_size > 10_000
  for name in ('dense', 'gated', 'svg'):
    assert name in html
  assert 'gated' in report.table(json.loads((runs / 'summary.json').read_text()))


def test_outputs_end_at_newlines_alone(tmp_path):
  row = {'id': 'a\u2028b', 'hypothesis': 'c\x85d'}
  path = tmp_path / 'outputs_test.jsonl'
  path.write_text(2 * (json.dumps(row, ensure_ascii=False) + '\n'), encoding='utf-8')
  assert points._outputs(tmp_path, 'test') == [row, row]


def test_differences_are_over_what_both_points_scored():
  """Another tokenizer may leave another text out as too long."""
  row = lambda i, said: {
    'id': str(i), 'task': 'asr', 'language': 'fra',
    'reference': 'abcd', 'hypothesis': said, 'ctc': said,
  }  # fmt: skip
  mine = [row(0, 'abcd'), row(1, 'abc'), row(2, '')]
  baseline = [row(3, ''), row(1, 'ab'), row(0, 'abcd')]
  differences = points._differences(mine, baseline)
  assert differences['cer']['value'] == pytest.approx(1 / 8 - 2 / 8)
