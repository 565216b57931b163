"""Whose a workdir is: what trainings and sweeps refuse of each other."""

import json

import pytest
import tiny_run

from gatedfm.evaluation import sweep
from gatedfm.trainers import checkpoints, loop, workdirs
from gatedfm.trainers import config as config_lib
from gatedfm.trainers.workdirs import WorkdirError


@pytest.mark.parametrize('left', ['dense/config.json', 'summary.json'])
def test_no_single_training_in_the_folder_of_a_sweep(tone_data, tmp_path, left):
  path = tmp_path / left
  path.parent.mkdir(exist_ok=True)
  path.write_text('{}')
  with pytest.raises(WorkdirError) as error:
    loop.train(tiny_run.dense(tone_data), tmp_path)
  message = str(error.value)
  assert message.startswith(f'{tmp_path} is the folder of a sweep: give another --workdir')
  assert (f'such as {tmp_path}/dense' in message) == left.startswith('dense')
  assert [p for p in tmp_path.rglob('*') if p.is_file()] == [path]


def test_a_training_with_others_below_it_goes_on(tmp_path):
  """As where runs came to stand in its workdir later."""
  for folder in (tmp_path, tmp_path / 'dense'):
    folder.mkdir(exist_ok=True)
    (folder / checkpoints.CONFIG).write_text('{}')
  workdirs.refuse_several(tmp_path)


def test_no_sweep_in_the_workdir_of_a_single_training(tone_data, tmp_path):
  (tmp_path / checkpoints.CONFIG).write_text('{}')
  cfg = tiny_run.sweep(tone_data)
  message = f'{tmp_path} is the workdir of a single training: give another --workdir'
  with pytest.raises(WorkdirError, match=message):
    sweep.run(cfg, tmp_path)
  with pytest.raises(WorkdirError, match=message):
    sweep.train_point(cfg, tmp_path, 'dense')
  assert len(list(tmp_path.iterdir())) == 1


def test_a_field_newer_than_the_workdir_had_its_default_there(tone_data, tmp_path):
  cfg = tiny_run.dense(tone_data)
  older = config_lib.to_dict(cfg)
  del older['data']['source_weights']
  (tmp_path / checkpoints.CONFIG).write_text(json.dumps(older))
  workdirs.check_owner(cfg, tmp_path)
  cfg.data.source_weights = (0.5,) * len(cfg.data.sources)
  with pytest.raises(WorkdirError, match=r'data\.source_weights: \[\] -> \[0\.5'):
    workdirs.check_owner(cfg, tmp_path)


def test_a_new_workdir_appears_whole_or_not_at_all(tmp_path):
  workdir = tmp_path / 'above' / 'new'

  def fail():
    with workdirs.new(workdir) as folder:
      (folder / checkpoints.CONFIG).write_text('{}')
      raise ValueError('no such budget')

  with pytest.raises(ValueError, match='no such budget'):
    fail()
  assert list(tmp_path.iterdir()) == []
  with workdirs.new(workdir) as folder:
    (folder / 'scores').mkdir()
    (folder / checkpoints.CONFIG).write_text('{}')
    assert not (workdir / checkpoints.CONFIG).exists()
    with pytest.raises(checkpoints.CheckpointError, match=f'{workdir} is not finished'):
      checkpoints.load_config(workdir)
    with pytest.raises(WorkdirError, match=f'{workdir}: another process works here'):
      workdirs.new(workdir).__enter__()
  assert {path.name for path in workdir.iterdir()} == {'scores', checkpoints.CONFIG}
  with pytest.raises(WorkdirError, match=f'{workdir} is not empty'):
    workdirs.new(workdir).__enter__()


def test_what_a_killed_process_left_goes_when_it_is_repeated(tmp_path):
  left = tmp_path / checkpoints.UNFINISHED / checkpoints.FOLDER / '0.orbax-checkpoint-tmp'
  left.mkdir(parents=True)
  (tmp_path / workdirs.LOCK).touch()
  with workdirs.new(tmp_path) as folder:
    assert list(folder.iterdir()) == []
    (folder / checkpoints.CONFIG).write_text('{}')
  assert [path.name for path in tmp_path.iterdir()] == [checkpoints.CONFIG]


def test_killed_while_it_is_put_in_place(tmp_path):
  done = tmp_path / checkpoints.FINISHED
  done.mkdir()
  (done / checkpoints.CONFIG).write_text('{"model": {}}')
  (tmp_path / 'scores').mkdir()  # is in its place
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(checkpoints.CheckpointError, match='give its command once more'):
    checkpoints.load_config(tmp_path)
  with pytest.raises(WorkdirError, match='had been finished, and is whole now'):
    workdirs.new(tmp_path).__enter__()
  assert checkpoints.load_config(tmp_path) == {'model': {}}
  assert {p.name for p in tmp_path.iterdir()} == {'scores', 'notes.txt', checkpoints.CONFIG}


def test_a_lock_that_was_removed_is_nobodys(tmp_path, monkeypatch):
  """Between opening and locking it, its holder ends and takes the empty workdir away."""
  lock, left = workdirs._lock, ['once']

  def late(file):
    if left:
      left.pop()
      (tmp_path / 'new' / workdirs.LOCK).unlink()
      (tmp_path / 'new').rmdir()
    return lock(file)

  monkeypatch.setattr(workdirs, '_lock', late)
  with workdirs.alone(tmp_path / 'new'):
    assert not left
    assert (tmp_path / 'new' / workdirs.LOCK).exists()
    with pytest.raises(WorkdirError, match='another process works here'):
      workdirs.alone(tmp_path / 'new').__enter__()


def test_errors_inside_are_its_own(tmp_path):
  with pytest.raises(FileNotFoundError), workdirs.alone(tmp_path / 'new'):
    (tmp_path / 'none').read_text()
  assert list(tmp_path.iterdir()) == []
