"""The environment that the launch scripts make, with a stand-in for Python."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Version check: passes. `-m venv` makes one with pip.
PYTHON = """#!/bin/sh
if [ "$2" = venv ]; then
  echo made >> "$LOG"
  mkdir -p "$3/bin" && printf '#!/bin/sh\nexit 0\n' > "$3/bin/python" && chmod +x "$3/bin/python"
fi
"""


@pytest.fixture
def install(tmp_path):
  """Calls `install` of a copy of the script; returns how many environments it has made by then.

  With `count` returns how often that stands in what it says.
  """
  (tmp_path / 'launch').mkdir()
  shutil.copy(ROOT / 'launch' / 'environment.sh', tmp_path / 'launch')
  python, log = tmp_path / 'python', tmp_path / 'log'
  python.write_text(PYTHON)
  python.chmod(0o755)

  def call(*files, count=''):
    commands = '. launch/environment.sh; allocator() { :; }; install "$@"'
    environment = os.environ | {'GATEDFM_PYTHON': str(python), 'LOG': str(log)}
    out = subprocess.run(
      ['bash', '-euo', 'pipefail', '-c', commands, 'bash', *files],
      cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    return out.count(count) if count else len(log.read_text().splitlines())

  return call


def test_an_environment_is_made_once(install):
  assert install() == 1
  assert install() == 1


def test_pins_that_go_back_are_installed_again(install, tmp_path):
  def installs(pins):
    (tmp_path / 'pins.txt').write_text(pins)
    return install('pins.txt', count='installing pins.txt')

  assert [installs(p) for p in ('a==1', 'a==1', 'a==2', 'a==1')] == [1, 0, 1, 1]


def test_a_failure_leaves_the_shell_that_asked_and_no_stamp(install, tmp_path):
  install()  # makes the environment
  python = tmp_path / '.venv' / 'bin' / 'python'
  python.write_text('#!/bin/sh\n[ "$3" != install ]\n')  # has pip, which installs nothing
  (tmp_path / 'pins.txt').write_text('a==1')
  commands = '. launch/environment.sh; allocator() { :; }; install pins.txt || echo refused'
  environment = os.environ | {'GATEDFM_PYTHON': str(tmp_path / 'python')}
  shell = ['bash', '-c', commands]
  for _ in range(2):
    out = subprocess.run(shell, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert out.stdout.splitlines() == ['installing pins.txt into .venv', 'refused']
  (tmp_path / 'pins.txt').unlink()  # no stamp and no pins are not alike
  out = subprocess.run(shell, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
  assert out.stdout.splitlines() == ['refused']


def test_an_environment_without_pip_is_made_anew(install, tmp_path):
  half = tmp_path / '.venv' / 'bin' / 'python'
  half.parent.mkdir(parents=True)
  half.write_text('#!/bin/sh\necho "No module named pip" >&2; exit 1\n')
  half.chmod(0o755)
  (tmp_path / '.venv' / 'installed-0').touch()
  assert install() == 1
  assert install() == 1
  assert not (tmp_path / '.venv' / 'installed-0').exists()
