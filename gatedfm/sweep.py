"""Trains or prunes, evaluates, times and reports a family of models; restartable.

Example:
  python -m gatedfm.sweep --config=configs/gated_speech/quickstart.py --workdir=runs/quickstart
  python -m gatedfm.sweep --config=configs/importance_pruning/quickstart.py --workdir=runs/lm
  python -m gatedfm.sweep --config=configs/factorized_embedding/quickstart.py --workdir=runs/tables

The same command resumes: what is trained, evaluated or prepared is not repeated.
"""

from absl import flags
from ml_collections import config_flags

from gatedfm import mains

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where points, summary and report go.')
_ONLY = flags.DEFINE_string('only', None, 'Train this point alone, and stop.')
flags.mark_flags_as_required(['config', 'workdir'])


def _refuse_hosts() -> None:
  """Raises ConfigError: the trainings would join the cluster as what the sweep already is there."""
  from gatedfm.models.speech_config import ConfigError

  raise ConfigError(
    'a sweep runs on one host. Train each point on all of them with --only=POINT, then sweep on '
    'one, without JAX_COORDINATOR_ADDRESS and TPU_WORKER_HOSTNAMES in its environment'
  )


def _refuse_only() -> None:
  """Raises ConfigError: nothing is trained there."""
  from gatedfm.models.speech_config import ConfigError

  raise ConfigError('--only trains a point of a speech model; leave it out: this sweep resumes')


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  if mains.several_hosts() and not _ONLY.value:
    with mains.clear_errors():
      _refuse_hosts()
  mains.set_up()
  from gatedfm.evaluation import importance_sweep, sweep, table_sweep
  from gatedfm.evaluation.importance_config import ImportanceConfig
  from gatedfm.evaluation.table_config import TableSweepConfig

  others = {ImportanceConfig: importance_sweep.run, TableSweepConfig: table_sweep.run}
  with mains.clear_errors():
    cfg, workdir = mains.loaded(_CONFIG.value), mains.folder(_WORKDIR.value)
    if run := others.get(type(cfg)):
      if _ONLY.value:
        _refuse_only()
      run(cfg, workdir)
    elif _ONLY.value:
      sweep.train_point(cfg, workdir, _ONLY.value)
    else:
      sweep.run(cfg, workdir)


if __name__ == '__main__':
  mains.run(main)
