"""Turns a run's summary.json into a table for the terminal and a report.html.

Example:
  python -m gatedfm.report --summary=runs/quickstart/summary.json

With --markdown, prints all tables in Markdown instead.
"""

from absl import flags

from gatedfm import mains

_SUMMARY = flags.DEFINE_string('summary', None, 'The summary.json of a run.')
_OUT = flags.DEFINE_string('out', '', 'Where to write; report.html beside the summary.')
_MARKDOWN = flags.DEFINE_bool('markdown', False, 'Print all tables in Markdown, write nothing.')
_FIGURES = flags.DEFINE_string('figures', '', 'Folder for the figures as SVG and PNG, if wanted.')
flags.mark_flag_as_required('summary')


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  from gatedfm.analysis import plots, report

  path = mains.folder(_SUMMARY.value)
  try:
    summary = report.load(path)
  except OSError as e:
    raise SystemExit(f'error: {path}: {e.strerror}; give the summary.json of a sweep') from None
  except ValueError as e:
    raise SystemExit(f'error: {e}') from None
  if _MARKDOWN.value:
    for title, rows in report.tables(summary):
      print(f'### {title}\n\n{report.markdown(rows)}\n')
    return
  out = mains.folder(_OUT.value) if _OUT.value else path.with_name('report.html')
  report.write_report(path, out)
  if _FIGURES.value:
    for name, figure in report.make_figures(summary, path.parent).items():
      for suffix in ('svg', 'png'):
        plots.save(figure, mains.folder(_FIGURES.value) / f'{name}.{suffix}')
  print(report.table(summary))
  print(f'\n{out}')


if __name__ == '__main__':
  mains.run(main)
