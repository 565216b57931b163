"""The command lines: help with an example, errors without tracebacks."""

import os
import re
import subprocess
import sys

import pytest
import tiny_run

from gatedfm import mains
from gatedfm.data.types import DataError
from gatedfm.models.speech_config import ConfigError
from gatedfm.pruning import scorers
from gatedfm.trainers.checkpoints import CheckpointError
from gatedfm.trainers.workdirs import WorkdirError

CONFIGS = 'configs/gated_speech'
MAINS = ('train', 'evaluate', 'transcribe', 'sweep', 'report')


def run(*arguments, **variables):
  environment = os.environ | {'PYTHONPATH': str(tiny_run.ROOT)} | variables
  command = [sys.executable, '-m', *arguments]
  return subprocess.run(command, cwd=tiny_run.ROOT, env=environment, capture_output=True, text=True)


LANGUAGE = (
  'memory',
  'prune',
  'few_shot',
  'induction',
  'generate',
  'import_checkpoint',
  'factorize',
  'classify',
)


@pytest.mark.parametrize('name', [*MAINS, 'benchmark', *LANGUAGE])
def test_help_shows_an_example(name):
  result = run(f'gatedfm.{name}', '--help')
  assert result.returncode == 0
  assert f'Example:\n  python -m gatedfm.{name} --' in result.stdout
  assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(
  ('name', 'flag'), [('transcribe', '--beam'), ('few_shot', '--model_parallel')]
)
def test_help_shows_flags_that_commands_share(name, flag):
  assert f'  {flag}: ' in run(f'gatedfm.{name}', '--help').stdout


def test_help_names_all_scorers():
  text = ' '.join(run('gatedfm.prune', '--help').stdout.split())
  assert f'are scored: {", ".join(scorers.SCORERS)}.' in text


def test_help_says_where_data_is_prepared():
  text = ' '.join(run('gatedfm.evaluate', '--help').stdout.split())
  assert 'Where data is prepared; empty: ' in text
  assert '$GATEDFM_DATA or ~/.cache/gatedfm' in text


@pytest.mark.parametrize('name', MAINS)
def test_required_flags(name):
  result = run(f'gatedfm.{name}')
  assert result.returncode
  assert re.fullmatch(r'error: --\w+ is not given \(--help shows an example\)\n', result.stderr)


@pytest.mark.parametrize(
  ('name', 'arguments', 'message'),
  [
    ('evaluate', ('--checkpoint=a', '--spilt=test'), 'Unknown command line flag'),
    ('evaluate', ('--checkpoint=a', 'test'), r"unknown arguments ['test']"),
    ('transcribe', ('--checkpoint=a',), 'no audio files given'),
    ('benchmark', ('--pruned=0,2',), 'error: pruned is (0.0, 2.0); it is a list of shares'),
    ('benchmark', ('--json=a.png',), 'error: --json=a.png must end in .json'),
    ('benchmark', ('--json=/dev/null/a.json',), 'error: '),
    ('benchmark', ('--model=huge',), "error: model 'huge' is neither layers x width"),
    ('memory', ('--model=smollm2', '--chips=v4:'), 'error: --chips=v4:: write KIND:NUMBER'),
    ('memory', ('--model=smollm2', '--chips=v3:8'), "error: chip is 'v3'"),
    ('memory', ('--model=smollm2', '--chips=v4:²'), 'error: --chips=v4:²: write KIND:NUMBER'),
    ('generate', ('--checkpoint=none', '--prompt=a'), 'give the workdir of a language model'),
    (
      'generate',
      ('--checkpoint=a', '--prompt=a', '--top_p=0.5'),
      'error: top_p is 0.5, but',
    ),
    ('import_checkpoint', ('--to=a',), 'error: say either --from=hf|gguf|smollm2 PATH'),
    ('import_checkpoint', ('--to=a', '--from=hf'), 'error: give 1 path behind the flags'),
    (
      'import_checkpoint',
      ('--to=a', '--from=smollm2', 'b'),
      'error: give no path behind',
    ),
    (
      'import_checkpoint',
      ('--to=a', '--export=plain', '--param_dtype=bfloat16', 'b'),
      'error: --param_dtype is not read by --export=plain',
    ),
    (
      'classify',
      ('--checkpoint=a',),
      'error: give texts, a file of them as --texts, or --write_vectors',
    ),
    ('report', ('--summary=a', 'out.html'), "unknown arguments ['out.html']"),
    ('data.europarl_st', ('--root=a', '--out=b', 'de'), "unknown arguments ['de']"),
    ('data.fleurs', ('--root=a', '--out=b', '--languages=fr_fr', 'de'), "unknown arguments ['de']"),
    (
      'train',
      (f'--config={CONFIGS}/tiny.py', '--workdir=a', '--config.stepz=5'),
      'error: --config: TrainConfig has no field stepz; it has name, seed, steps',
    ),
    (
      'sweep',
      (
        '--config=configs/gated_speech/quickstart.py',
        '--workdir=a',
        '--config.points.dens.steps=5',
      ),
      "error: --config: there is no 'dens'",
    ),
    (
      'sweep',
      (
        '--config=configs/importance_pruning/quickstart.py',
        '--workdir=a',
        '--config.dtype=float8',
      ),
      "error: dtype is 'float8'",
    ),
    (
      'sweep',
      (
        '--config=configs/factorized_embedding/quickstart.py',
        '--workdir=a',
        '--config.points.trec_dan_calr_90.train.epochs=-1',
      ),
      'error: trec_dan_calr_90: epochs is not negative',
    ),
    (
      'sweep',
      (
        '--config=configs/gated_speech/full.py',
        '--workdir=a',
        '--config.points.encoder_0.5.steps=1',
      ),
      'error: --config.points.encoder_0.5.steps: a name that is not a plain word stands in',
    ),
    (
      'sweep',
      (
        '--config=configs/gated_speech/full.py',
        '--workdir=a',
        "--config.points['encoder_0.5'].steps=-1",
      ),
      'error: steps is -1',
    ),
    (
      'sweep',
      (
        '--config=configs/gated_speech/full.py',
        '--workdir=a',
        '--config.points.gated-a.steps=1',
      ),
      'error: --config: a name that is not a plain word stands in',
    ),
    (
      'sweep',
      (f'--config={CONFIGS}/quickstart.py', '--workdir=a', '--only=foo'),
      "error: only is 'foo'",
    ),
    (
      'train',
      (f'--config={CONFIGS}/base.py:huge', '--workdir=a'),
      ": owsm size is 'huge'; choose one of base, small, medium",
    ),
    (
      'train',
      (f'--config={CONFIGS}/tiny.py:foo', '--workdir=a'),
      f'error: --config={CONFIGS}/tiny.py:foo: get_config() takes 0 positional arguments but 1 '
      'was given; what follows the colon is the argument of get_config',
    ),
  ],
)
def test_wrong_arguments(name, arguments, message):
  result = run(f'gatedfm.{name}', *arguments)
  assert result.returncode
  assert message in result.stderr
  assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('more', [(), ('--config.steps=5',)])
def test_a_missing_config_file_is_one_line(more):
  result = run('gatedfm.train', f'--config={CONFIGS}/nothing.py', '--workdir=a', *more)
  assert result.returncode == 1
  assert result.stderr == f"error: --config: No such file or directory: '{CONFIGS}/nothing.py'\n"


@pytest.mark.parametrize(
  ('name', 'value'),
  [('JAX_COORDINATOR_ADDRESS', 'localhost:1'), ('TPU_WORKER_HOSTNAMES', 'a,b')],
)
def test_a_sweep_on_several_hosts_is_refused(name, value, monkeypatch):
  """Before it joins them, which would wait for the others."""
  monkeypatch.setenv(name, value)
  result = run('gatedfm.sweep', f'--config={CONFIGS}/quickstart.py', '--workdir=a')
  assert result.returncode == 1
  assert result.stderr.startswith('error: a sweep runs on one host. Train each point on all')
  assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('cfg.optimizer.warmpu = 20', 'OptimizerConfig has no field warmpu; it has name, peak_lr, '),
    ("{}['there']", "KeyError('there')"),
    ('TrainConfig(stepz=5)', 'TrainConfig has no field stepz; it has name, seed, steps, '),
    ("cfg.name = 'a' + 1", 'TypeError('),
    ('cfg.steps = 0; cfg.validate()', 'steps is 0; it must be at least 1'),
    ("open('there')", "[Errno 2] No such file or directory: 'there'"),
    ('cfg.optimizer.warmup.steps', "AttributeError(\"'int' object has no attribute 'steps'\")"),
  ],
)
def test_what_is_wrong_in_a_config_file_is_one_line_with_its_place(tmp_path, line, message):
  path = tmp_path / 'mine.py'
  path.write_text(f"""from gatedfm.trainers.config import TrainConfig
def get_config():
  cfg = TrainConfig()
  {line}
  return cfg
""")
  arguments = ('gatedfm.train', f'--config={path}', f'--workdir={tmp_path}/run')
  result = run(*arguments)
  assert result.returncode == 1
  assert result.stderr.startswith(f'error: {path}, line 4: {message}')
  assert len(result.stderr.splitlines()) == 1
  result = run(*arguments, GATEDFM_TRACEBACK='1')
  assert result.returncode
  assert 'Traceback' in result.stderr


TRANSCRIBE = ('transcribe', '--checkpoint=nothing', 'a.wav')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((*TRANSCRIBE, '--task=sing'), 'is not asr, lid or st:LANGUAGE'),
    ((*TRANSCRIBE, '--task=asr'), 'nothing does not exist; give the workdir of a speech model'),
    (('train', f'--config={CONFIGS}/tiny.py', '--workdir=README.md'), "File exists: 'README.md'"),
    (('data.europarl_st', '--root=nowhere', '--out=b'), 'no de/TARGET of en, de, fr, it below'),
    (('data.fleurs', '--root=nowhere', '--out=b', '--languages=fr_fr'), 'corpus unpacked whole?'),
    (('report', '--summary=nothing'), 'No such file or directory'),
    (('report', '--summary=pyproject.toml'), 'pyproject.toml is no summary: Expecting'),
  ],
)
def test_errors_are_one_line(arguments, message):
  name, *arguments = arguments
  result = run(f'gatedfm.{name}', *arguments)
  assert result.returncode == 1
  assert result.stderr.startswith('error: ')
  assert message in result.stderr
  assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  'arguments',
  [
    ('evaluate', '--checkpoint=~/nothing'),
    ('transcribe', '--checkpoint=~/nothing', 'a.wav'),
    ('train', f'--config={CONFIGS}/tiny.py', '--workdir=~/a', '--config.init_from=~/nothing'),
    ('data.fleurs', '--root=~/nothing', '--out=~/b', '--languages=fr_fr'),
    ('data.europarl_st', '--root=~/nothing', '--out=~/b'),
  ],
  ids=lambda arguments: arguments[0],
)
def test_the_home_folder_may_be_written_short(arguments, tmp_path):
  name, *arguments = arguments
  result = run(f'gatedfm.{name}', *arguments, HOME=str(tmp_path))
  assert result.stderr.startswith('error: ')
  assert f'{tmp_path}/nothing' in result.stderr


def test_a_workdir_may_be_written_short(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert mains.folder('~/runs/a') == tmp_path / 'runs' / 'a'
  assert str(mains.folder('runs/a')) == 'runs/a'


@pytest.mark.parametrize(
  'error', [DataError, ConfigError, CheckpointError, WorkdirError, FloatingPointError]
)
def test_foreseen_errors(error, monkeypatch, capsys):
  monkeypatch.delenv('GATEDFM_TRACEBACK', raising=False)
  with pytest.raises(SystemExit) as stopped, mains.clear_errors():
    raise error('lower it')
  assert stopped.value.code == 1
  assert capsys.readouterr().err == 'error: lower it\n'
  monkeypatch.setenv('GATEDFM_TRACEBACK', '1')
  with pytest.raises(error), mains.clear_errors():
    raise error('lower it')


def test_unforeseen_errors_keep_their_traceback():
  with pytest.raises(ZeroDivisionError), mains.clear_errors():
    _ = 1 / 0
