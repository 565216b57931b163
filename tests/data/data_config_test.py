"""The configuration of the data: what is wrong is said before anything is downloaded."""

import pytest

from gatedfm.data.data_config import DataConfig
from gatedfm.data.types import DataError


def test_sound_configurations():
  DataConfig().validate()
  DataConfig(extra=('espeak',), source_weights=(1.0, 0.2)).validate()
  DataConfig(task_weights=(1.0, 0.0, 2), loss_weights=(0, 0, 1), bucket_frames=(8, 16)).validate()


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('sources', (), 'is empty; name one or more of stamps'),
    ('sources', 'stamps', r"is 'stamps'; write a tuple: \('stamps',\)"),
    ('sources', ('stamps', 'espek'), "unknown source 'espek'; known are"),
    ('extra', ('espeak?voice=2',), "unknown option 'voice'"),
    ('extra', ('espeak?voices=two',), "bad option 'voices'"),
    ('tasks', (), 'at least one'),
    ('tasks', ('asr', 'asr'), 'distinct'),
    ('tasks', ('asr', 'sing'), "task 'sing' is none of asr, lid, st_xxx"),
    ('tasks', 'asr', 'write a tuple'),
    ('task_weights', (1.0, 2.0), 'each of the tasks asr lid st_eng a weight'),
    ('task_weights', (1.0, 2.0, -1.0), 'at least 0'),
    ('source_weights', (1.0, 0.2), 'each of the sources auto a weight'),
    ('loss_weights', (1.0,), 'each of the tasks asr lid st_eng a weight'),
    ('loss_weights', (0.0, 0.0, 0.0), 'not all of them 0'),
    ('num_buckets', 0, 'at least 1'),
    ('batch_frames', 0, 'at least 1'),
    ('batch_size', -1, 'at least 0'),
    ('bucket_frames', (100, 50), 'must increase'),
    ('bucket_frames', (0, 50), 'above 0'),
    ('max_frames', 0, 'at least 1'),
    ('max_tokens', 0, 'at least 1'),
    ('seed', -1, 'at least 0'),
    ('workers', -1, 'at least 0'),
  ],
)
def test_impossible_values_name_their_field(field, value, message):
  with pytest.raises(DataError, match=rf'^data\.{field}.*{message}'):
    DataConfig(**{field: value}).validate()
