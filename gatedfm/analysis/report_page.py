"""The page that `report` fills in: a Jinja template, escaped throughout but for figures."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gatedfm: {{ headline }}</title>
<style>
:root { color-scheme: light dark; --ink: #16181d; --page: #fff; --line: #d8dbe0;
  --pale: #f3f5f8; --mark: #e3f0f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --page: #15171b; --line: #3a3f47; --pale: #1f2228;
    --mark: #17303f; }
}
body { margin: 0 auto; max-width: 68rem; padding: 1rem 1rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.5rem; }
.headline { font-size: 1.15rem; border-left: 4px solid #0072b2; padding-left: 0.8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); }
.facts td:last-child { text-align: left; }
tr.best td { background: var(--mark); font-weight: 600; }
svg { max-width: 100%; height: auto; }
.pair { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.wide svg { min-width: 44rem; }
pre { background: var(--pale); padding: 0.7rem; overflow-x: auto; border-radius: 4px; }
summary { cursor: pointer; margin: 0.6rem 0; }
small, .note { opacity: 0.75; }
</style>
</head>
<body>
{% macro grid(rows, best=none) %}
<div class="scroll"><table>
<thead><tr>{% for cell in rows[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows[1:] %}
<tr{% if row[0] == best %} class="best"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<h1>Gated speech model</h1>
<small>{{ summary.created }}</small>
<p class="headline">{{ headline }}</p>

<h2>Results</h2>
{{ grid(results, best) }}
<p class="note">Error rates, BLEU and chrF are unweighted means over languages or directions
of the {{ summary.split or 'test' }} split. LID*: language identification on another source.
Sparsity: the share of the gated modules that stay closed, and of their multiply-accumulates.
MMAC/s: million multiply-accumulates for a second of audio, all modules. Times are measured
with closed modules really skipped, after compilation; time % is relative to the first point in
the same run. MiB: peak memory.</p>
{% for title, rows in details %}
<details><summary>{{ title }}</summary>{{ grid(rows, best) }}</details>
{% endfor %}

{% if drawn.quality_against_time or drawn.macs_against_time %}
<h2>Accuracy against time</h2>
<div class="pair">
<div>{{ drawn.quality_against_time | safe }}</div>
<div>{{ drawn.macs_against_time | safe }}</div>
</div>
{% endif %}

{% if maps %}
<h2>Gate maps</h2>
{% for name, text, svg in maps %}
<details{% if loop.first %} open{% endif %}><summary>{{ name }}</summary>
<p>{{ text }}</p>
<div class="scroll wide">{{ svg | safe }}</div></details>
{% endfor %}
{% endif %}

{% if drawn.learning_curves %}
<h2>Learning curves</h2>
<div class="scroll wide">{{ drawn.learning_curves | safe }}</div>
{% endif %}

{% if data %}
<h2>Data</h2>
{{ grid(data) }}
{% endif %}

<h2>How it was made</h2>
<pre>{{ summary.command }}</pre>
<div class="scroll"><table class="facts"><tbody>
<tr><td>device</td><td>{{ summary.device }}</td></tr>
<tr><td>git revision</td><td>{{ summary.git_revision }}</td></tr>
<tr><td>seeds</td><td>{{ (summary.seeds or []) | join(', ') }}</td></tr>
{% for package, version in (summary.versions or {}).items() %}
<tr><td>{{ package }}</td><td>{{ version }}</td></tr>
{% endfor %}
</tbody></table></div>
</body>
</html>
"""
