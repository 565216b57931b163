"""The builder of tuxpaint-stamps on a small tree of its layout."""

import json
import pickle
import shutil

import numpy as np
import pytest
import soundfile

from gatedfm.data import audio_io, splits, stamps, store
from gatedfm.data.types import SPLITS, DataError, Source

# Item: texts, spoken languages. The frogs share the English text, the two banks only the
# French one, which links them; the rest stand alone.
TREE = {
  'animals/frog': ('A frog.', {'fr': 'Une grenouille.', 'es': 'Una rana.'}, 'fr es'),
  'animals/frog-1': ('a frog', {'fr': 'Une rainette.'}, 'fr'),
  'town/bank': ('A bank.', {'fr': 'Un banc.', 'da': 'En bank.'}, 'fr da'),
  'town/bench': ('A bench.', {'fr': 'un banc', 'da': 'En bænk.'}, 'da'),
} | {
  f'numbers/{n}': (f'Number {n}.', {'fr': f'Numéro {n}.', 'de': f'Nummer {n}.'}, 'fr')
  for n in range(40)
}


def write_tree(root, tree=TREE):
  rng = np.random.default_rng(0)
  for name, (english, texts, spoken) in tree.items():
    path = root / f'{name}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [english, *(f'{locale}.utf8={text}' for locale, text in texts.items())]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    for locale in spoken.split():
      audio = 0.1 * rng.standard_normal((11025, 2))
      soundfile.write(root / f'{name}_desc_{locale}.ogg', audio, 44_100)
  return root


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp('stamps')
  return stamps.prepare(folder / 'cache', write_tree(folder / 'tree'))


@pytest.fixture(scope='module')
def opened(prepared):
  return {split: stamps.Stamps(prepared, split) for split in SPLITS}


def test_the_data_set_stands_where_it_is_looked_for(prepared):
  assert prepared == stamps.folder(prepared.parents[2])
  assert (prepared / 'dataset_info.json').exists()


def test_texts_are_mapped_to_iso_codes_and_untranslated_locales_left_out():
  content = 'A cat.\nfr.utf8=Un chat. \npt_BR.utf8=Um gato.\nzh_CN.utf8=猫\nru.utf8=\nx\n'
  assert stamps.parse_texts(content) == {'eng': 'A cat.', 'fra': 'Un chat.', 'zho': '猫'}


def test_items_that_share_a_text_in_any_spoken_language_are_one_group(tmp_path):
  items = {item.id: item for item in stamps.read_items(write_tree(tmp_path))}
  assert items['animals/frog'].group == items['animals/frog-1'].group == 'a frog'
  assert items['town/bank'].group == items['town/bench'].group
  assert len({item.group for item in items.values()}) == len(items) - 2


def test_every_recording_is_there_once_with_its_text_and_translations(opened):
  records = {r.id: r for source in opened.values() for r in source.records}
  assert len(records) == sum(len(spoken.split()) for _, _, spoken in TREE.values())
  frog = records['animals/frog:spa']
  assert (frog.language, frog.text) == ('spa', 'Una rana.')
  assert frog.translations == {'eng': 'A frog.', 'fra': 'Une grenouille.'}


def test_no_text_of_a_language_stands_in_two_splits(opened):
  seen = {}
  for split, source in opened.items():
    assert len(source)
    for record in source.records:
      for language, text in {record.language: record.text, **record.translations}.items():
        assert seen.setdefault((language, splits.text_key(text)), split) == split


def test_audio_is_levelled_mono_at_16_khz_and_survives_pickling(opened):
  source = opened['train']
  assert isinstance(source, Source)
  audio = source.audio(3)
  assert audio.dtype == np.int16
  assert len(audio) == source.records[3].num_samples == 4000
  level = 10 * np.log10(np.mean(np.square(audio / 32768)))
  assert level == pytest.approx(audio_io.SPEECH_LEVEL, abs=0.5)
  payload = pickle.dumps(source)
  assert len(payload) < 1000
  np.testing.assert_array_equal(pickle.loads(payload).audio(3), audio)


def test_opening_reads_the_index_alone_and_fingerprints_differ(prepared, opened):
  again = stamps.Stamps(prepared, 'test')
  assert '_examples' not in again.__dict__
  assert again.fingerprint == opened['test'].fingerprint != opened['train'].fingerprint
  assert again.records == opened['test'].records


def test_a_data_set_that_another_process_made_meanwhile_stands(tmp_path, prepared, monkeypatch):
  def read_items(root):
    shutil.copytree(prepared, folder)
    return items

  tree = write_tree(tmp_path / 'tree')
  items, cache = stamps.read_items(tree), tmp_path / 'cache'
  folder = cache / 'tfds' / prepared.relative_to(prepared.parents[1])
  monkeypatch.setattr(stamps, 'read_items', read_items)
  assert stamps.prepare(cache, tree) == folder
  assert len(stamps.Stamps(folder, 'train')) == len(stamps.Stamps(prepared, 'train'))
  assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_texts_of_all_items_are_kept(prepared):
  texts = stamps.texts(prepared)
  assert {text.id for text in texts} == set(TREE)
  assert texts[0].texts['fra'] == 'Une rainette.'


def test_copies_and_recordings_with_two_transcripts_are_left_out(tmp_path):
  tree = {n: (f'The {n}.', {'fr': f'Le {n}.'}, '') for n in ('a', 'b', 'c')}
  write_tree(tmp_path, tree | {'a2': ('The a.', {'fr': 'le a'}, '')})
  for name, seed in (('a', 0), ('b', 1)):
    audio = 0.1 * np.random.default_rng(seed).standard_normal(8000)
    soundfile.write(tmp_path / f'{name}_desc_fr.ogg', audio, 16_000)
  for name, copy in (('a', 'a2'), ('b', 'c')):
    shutil.copy(tmp_path / f'{name}_desc_fr.ogg', tmp_path / f'{copy}_desc_fr.ogg')
  items = stamps.read_items(tmp_path)
  assert [clip.id for clip in stamps.select(items)] == [f'{items[0].id}:fra']
  assert len({item.split for item in items if item.id in ('b', 'c')}) == 1


def test_recordings_too_short_for_their_transcript_are_left_out(tmp_path):
  tree = {}
  for n in range(60):
    words = ' '.join(['mot'] * (3 + n % 9)) + f' {n}'
    tree[f's{n}'] = (f'Sentence {n}', {'fr': words}, '')
  write_tree(tmp_path, tree)
  rng = np.random.default_rng(0)
  for name, (_, texts, _) in tree.items():
    seconds = 0.2 if name == 's5' else 0.3 + 0.06 * len(texts['fr'])
    audio = 0.1 * rng.standard_normal(int(8000 * seconds))
    soundfile.write(tmp_path / f'{name}_desc_fr.ogg', audio, 8000)
  kept = {clip.item.id for clip in stamps.select(stamps.read_items(tmp_path))}
  assert kept == set(tree) - {'s5'}


def test_a_tree_without_texts_is_named(tmp_path):
  with pytest.raises(DataError, match=str(tmp_path)):
    stamps.read_items(tmp_path)


def test_index_is_plain_json(prepared, opened):
  line = (prepared / 'records-test.jsonl').read_text(encoding='utf-8').splitlines()[0]
  assert store.to_record(json.loads(line)) == opened['test'].records[0]
