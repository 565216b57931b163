"""Buckets, epochs, hosts, resumption and alignment of the batches."""

import collections
import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import tones

from gatedfm.data import batching, features, pipeline, text, tokenizer

TASKS = ('asr', 'lid', 'st_eng')
CONFIG = pipeline.DataConfig(batch_frames=2_000, num_buckets=3, seed=7)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Two sources, their examples, caches and shapes for up to 4 hosts."""
  sources = [tones.ToneSource(40), tones.ToneSource(9, name='other', seed=1)]
  texts = [
    text.normalize(words)
    for source in sources
    for record in source.records
    for words in (record.text, *record.translations.values())
    if words
  ]
  tokens = tokenizer.Tokenizer.train(texts, 70, ('fra', 'rus'), TASKS)
  folder = tmp_path_factory.mktemp('features')
  caches = [features.FeatureCache.build(source, folder) for source in sources]
  examples, skipped = pipeline.build_examples(sources, tokens, CONFIG)
  assert not skipped
  shapes = pipeline.batch_shapes([examples], CONFIG, batch_multiple=4)
  return collections.namedtuple('Data', 'sources tokens caches examples shapes')(
    sources, tokens, caches, examples, shapes
  )


def train(data, process_index=0, process_count=1, **changes):
  config = dataclasses.replace(CONFIG, **changes)
  return pipeline.train_iterator(
    data.examples, data.caches, config, data.shapes, process_index, process_count
  )


def take(iterator, number):
  return list(itertools.islice(iterator, number))


def assert_same(left, right):
  assert len(left) == len(right) > 0
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def seen(batches):
  return collections.Counter(
    np.concatenate([batch['index'][batch['valid']] for batch in batches]).tolist()
  )


def test_an_epoch_sees_every_example_once(data):
  iterator = train(data)
  for _ in range(3):
    batches = take(iterator, iterator.batches_per_epoch)
    counts = seen(batches)
    repeats = counts.total() - len(data.examples)
    assert set(counts) == set(range(len(data.examples)))
    assert 0 <= repeats < data.shapes[-1].batch
    assert sum(count - 1 for count in counts.values()) == repeats
    assert all(batch['valid'].all() for batch in batches)
  assert iterator.epoch == 3


def test_batches_carry_the_weight_of_each_example(data):
  weights = np.array([1, 7, 2], np.float32)
  changed = data._replace(examples=dataclasses.replace(data.examples, loss_weights=weights))
  for batch in take(train(changed), 20):
    np.testing.assert_array_equal(batch['weight'], weights[batch['task']])


def test_task_weights_set_how_often_an_epoch_sees_a_task(data):
  iterator = train(data, task_weights=(2.0, 0.5, 0.0))
  sizes = np.bincount(data.examples.task)
  halves = []
  for _ in range(2):
    counts = seen(take(iterator, iterator.batches_per_epoch))
    by_task = [{}, {}, {}]
    for e, number in counts.items():
      by_task[data.examples.task[e]][e] = number
    fill = data.shapes[-1].batch
    assert sizes[0] == len(by_task[0])
    assert 0 <= sum(by_task[0].values()) - 2 * sizes[0] < fill
    assert abs(sum(by_task[1].values()) - sizes[1] / 2) < fill
    assert abs(len(by_task[1]) - sizes[1] / 2) <= 1
    assert not by_task[2]
    halves.append(set(by_task[1]))
  assert halves[0] != halves[1]


def test_source_weights_multiply_with_those_of_tasks(data):
  first = data.examples
  two = dataclasses.replace(
    first, source=np.where(np.arange(len(first)) % 3 == 0, 1, 0).astype(np.int32)
  )
  weights = {0: 1.0, 1: 2.0, 2: 0.0}
  plan = batching.EpochPlan(two, data.shapes, weights, 0, (1.0, 0.25))
  fill = data.shapes[-1].batch
  epochs = []
  for epoch in range(2):
    start = epoch * plan.batches_per_epoch
    rows = np.concatenate([plan[start + k][1] for k in range(plan.batches_per_epoch)])
    for task, weight in weights.items():
      for source, of_source in enumerate((1.0, 0.25)):
        kind = (two.task == task) & (two.source == source)
        got = int(np.isin(rows, np.flatnonzero(kind)).sum())
        assert abs(got - weight * of_source * kind.sum()) <= fill
    epochs.append(set(rows[two.source[rows] == 1]))
  assert epochs[0] != epochs[1]


def test_batches_follow_from_the_seed(data):
  batches = take(train(data), 30)
  assert_same(batches, take(train(data), 30))
  order = lambda batches: [batch['index'].tolist() for batch in batches]
  assert order(batches) != order(take(train(data, seed=8), 30))
  epoch = train(data).batches_per_epoch
  assert order(batches[:epoch]) != order(batches[epoch : 2 * epoch])


@pytest.mark.parametrize(('workers', 'then'), [(0, 2), (2, 0)])
def test_resumed_equals_uninterrupted(data, workers, then):
  """Across an epoch, by the same iterator and by one with other worker processes."""
  expected = take(train(data), 24)
  iterator = train(data, workers=workers)
  assert_same(take(iterator, 5), expected[:5])
  state = iterator.get_state()
  assert state == {'next_batch': 5}
  assert_same(take(iterator, 3), expected[5:8])
  iterator.set_state(state)
  assert_same(take(iterator, 19), expected[5:])
  iterator.close()
  with pytest.raises(ValueError, match='closed'):
    next(iterator)
  other = train(data, workers=then)
  other.set_state(pickle.loads(pickle.dumps(state)))
  assert_same(take(other, 4), expected[5:9])
  other.close()


def test_orbax_saves_and_restores_the_iterator(data, tmp_path):
  from orbax.checkpoint import v1 as ocp

  iterator = train(data)
  take(iterator, 4)
  ocp.save_checkpointables(tmp_path / 'checkpoint', {'data': iterator})
  expected = take(iterator, 3)
  restored = train(data)
  ocp.load_checkpointables(tmp_path / 'checkpoint', {'data': restored})
  assert_same(take(restored, 3), expected)


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_partition_the_batch(data, hosts):
  whole = take(train(data), 12)
  parts = [take(train(data, host, hosts), 12) for host in range(hosts)]
  for k, batch in enumerate(whole):
    for key, value in batch.items():
      joined = np.concatenate([part[k][key] for part in parts])
      np.testing.assert_array_equal(joined, value, err_msg=key)


def test_shapes_are_static_and_few(data):
  iterator = train(data)
  batches = take(iterator, 2 * iterator.batches_per_epoch)
  batches += list(pipeline.eval_batches(data.examples, data.caches, data.shapes))
  expected = {(s.batch, s.frames, s.tokens, s.labels) for s in data.shapes}
  assert 1 < len(expected) <= CONFIG.num_buckets
  described = [pipeline.batch_arrays(s) for s in data.shapes]
  for batch in batches:
    arrays = {k: (v.shape, v.dtype.type) for k, v in batch.items() if k != 'index'}
    assert arrays in described
    size, frames, _ = batch['features'].shape
    tokens, labels = batch['decoder_input'].shape[1], batch['ctc_labels'].shape[1]
    assert batch['decoder_target'].shape == batch['decoder_input'].shape
    assert (size, frames, tokens, labels) in expected
    assert size * frames <= CONFIG.batch_frames
    assert size % 4 == 0
    assert frames % 8 == tokens % 8 == labels % 8 == 0
    assert batch['frames'].max() <= frames


def test_batches_hold_what_the_examples_say(data):
  """Inputs, targets, features and contexts of one row belong together."""
  iterator = train(data)
  tasks = set()
  for batch in take(iterator, iterator.batches_per_epoch):
    for b, e in enumerate(batch['index']):
      record = data.sources[data.examples.source[e]].records[data.examples.utterance[e]]
      audio_S = data.sources[data.examples.source[e]].audio(data.examples.utterance[e])
      frames = batch['frames'][b]
      np.testing.assert_array_equal(batch['features'][b, :frames], features.log_mel(audio_S))
      assert not batch['features'][b, frames:].any()
      task = TASKS[batch['task'][b]]
      tasks.add(task)
      given, wanted = batch['decoder_input'][b], batch['decoder_target'][b]
      length = int((wanted >= 0).sum())
      assert (wanted[length:] == -1).all()
      assert given[0] == data.tokens.sos
      np.testing.assert_array_equal(given[1:length], wanted[: length - 1])
      assert not given[length:].any()
      assert wanted[0] == data.tokens.token_id(f'<{record.language}>')
      labels = batch['ctc_labels'][b, : batch['ctc_length'][b]]
      assert not batch['ctc_labels'][b, batch['ctc_length'][b] :].any()
      if task == 'lid':
        assert length == 1
        assert batch['language'][b] == batch['ctc_length'][b] == 0
        continue
      assert wanted[1] == data.tokens.token_id(f'<{task}>')
      assert wanted[length - 1] == data.tokens.eos
      words = record.text if task == 'asr' else record.translations['eng']
      assert data.tokens.decode(wanted[2:length]) == text.normalize(words)
      assert data.tokens.decode(labels) == text.normalize(record.text or '')
      assert batch['language'][b] == data.tokens.language_id(record.language)
  assert tasks == set(TASKS)


def test_evaluation_sees_each_example_once_by_length(data):
  evaluate = lambda *host: list(
    pipeline.eval_batches(data.examples, data.caches, data.shapes, *host)
  )
  batches = evaluate()
  assert set(seen(batches).values()) == {1}
  assert len(seen(batches)) == len(data.examples)
  lengths = [batch['features'].shape[1] for batch in batches]
  assert lengths == sorted(lengths)
  padded = [batch for batch in batches if not batch['valid'].all()]
  assert 0 < len(padded) <= len(data.shapes)
  assert all((batch['frames'] > 0).all() for batch in batches)
  halves = [evaluate(0, 2), evaluate(1, 2)]
  assert sum(map(seen, halves), collections.Counter()) == seen(batches)


def test_boundaries_pad_the_least_possible():
  frames = np.random.default_rng(0).gamma(2, 30, 60).astype(np.int32) + 20
  ends = np.unique(-(-frames // 8) * 8)
  padded = lambda bounds: np.array(bounds)[np.searchsorted(bounds, frames)].sum()
  for buckets in (1, 2, 3):
    others = itertools.combinations(ends[:-1], buckets - 1)
    least = min(padded([*other, ends[-1]]) for other in others)
    found = batching.bucket_ends(frames, buckets)
    assert len(found) == buckets
    assert padded(found) == least
  assert batching.bucket_ends(frames, 500) == ends.tolist()


def test_given_buckets_and_batch_size(data):
  config = pipeline.DataConfig(batch_size=8, bucket_frames=(40, 100, 200, 300))
  shapes = pipeline.batch_shapes([data.examples], config, 4)
  assert [(shape.batch, shape.frames) for shape in shapes] == [(8, 40), (8, 100), (8, 200)]


def test_unusually_long_texts_move_up_a_bucket(data):
  """One utterance with a long text must not pad the text of every batch of its bucket."""
  frames = np.where(np.arange(len(data.examples)) % 2, 180, 90).astype(np.int32)
  plain = dataclasses.replace(data.examples, frames=frames)
  target = plain.target.copy()
  target[0] = len(plain.offsets) - 1  # the new last row
  odd = dataclasses.replace(
    plain,
    target=target,
    tokens=np.append(plain.tokens, np.ones(200, np.int32)),
    offsets=np.append(plain.offsets, plain.offsets[-1] + 200),
  )
  config = dataclasses.replace(CONFIG, num_buckets=2)
  before, after = (pipeline.batch_shapes([x], config, 4) for x in (plain, odd))
  assert after[0] == before[0]
  assert after[0].tokens < after[1].tokens == 200
  bucket = batching.assign(odd, after)
  assert bucket[0] == 1
  assert (bucket[1:] == batching.assign(plain, before)[1:]).all()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'bucket_frames': (50, 100)}, 'reach the longest utterance of'),
    ({'batch_frames': 100}, 'batch of 4 .* does not fit'),
    ({'batch_size': 6}, 'batch of 4 .* does not fit'),
  ],
)
def test_bad_shapes(data, changes, message):
  with pytest.raises(ValueError, match=message):
    pipeline.batch_shapes([data.examples], dataclasses.replace(CONFIG, **changes), 4)


def test_bad_iterators(data):
  with pytest.raises(ValueError, match='no example'):
    train(data, task_weights=(0.0, 0.0, 0.0))
  with pytest.raises(ValueError, match='3 hosts cannot share'):
    train(data, 0, 3)
  with pytest.raises(ValueError, match='process 2 is none of 2'):
    train(data, 2, 2)
  swapped = data._replace(caches=data.caches[::-1])
  with pytest.raises(ValueError, match='another source'):
    train(swapped)
  with pytest.raises(ValueError, match='come from 2 sources, but there are 1'):
    train(data._replace(caches=data.caches[:1]))
  short = data.examples.select(data.examples.frames < 60)
  small = pipeline.batch_shapes([short], CONFIG, 4)
  with pytest.raises(ValueError, match='does not fit the largest shape'):
    pipeline.eval_batches(data.examples, data.caches, small)
