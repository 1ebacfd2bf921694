"""The findings as one HTML file, which needs nothing else to be shown."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from kpt_dask.annotation_check.findings import CheckResult, Finding, told

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; height: auto }
td, th { text-align: left; padding: 0 1.5rem 0 0 }
article { border-top: 1px solid; break-inside: avoid }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ checked }} checked in {{ url }}, {{ found }}.
A finding is a doubt: labels are wrong only if a person who looks at them says so.</p>
{% for sentence in unchecked %}<p>{{ sentence }}</p>
{% endfor %}
{% for entry in entries %}
<article>
<h2>{{ entry.finding.atlas }}{% if entry.finding.organs %}:
{{ entry.finding.organs|join(", ") }}{% endif %}</h2>
<p>{{ entry.finding.sentence }}; {{ entry.finding.remedy }}.</p>
{% if entry.finding.reasons %}
<table>
<thead><tr><th>measure</th><th>here</th><th>usual</th><th>standard deviations</th></tr></thead>
<tbody>
{% for one in entry.finding.reasons %}
<tr><td>{{ one.measure }}</td><td>{{ one.value|told }}</td>
<td>{{ one.usual|told }}</td><td>{{ "%+.1f"|format(one.deviation) }}</td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}
<img src="data:image/png;base64,{{ entry.encoded }}"
 alt="Outlines of the labels in the store beside the predicted ones, over the scan">
</article>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True, eq=False)
class Entry:
    """A finding with its picture, PNG."""

    finding: Finding
    png: bytes

    @property
    def encoded(self) -> str:
        """The picture as base64."""
        return base64.b64encode(self.png).decode("ascii")


def write_page(path: Path, entries: Sequence[Entry], result: CheckResult, url: str) -> None:
    """Write the page.

    Parameters
    ----------
    path : Path
        File to write.
    entries : sequence of Entry
        One for each finding.
    result : CheckResult
        The check.
    url : str
        Place of the store.
    """
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["told"] = told
    template = environment.from_string(_PAGE)
    number, found = len(result.checked), len(entries)
    page = template.render(
        title="Check of annotations",
        checked=f"{number} {'atlas' if number == 1 else 'atlases'}",
        found=f"{found} {'finding' if found == 1 else 'findings'}",
        url=url,
        unchecked=result.unchecked,
        entries=entries,
    )
    path.write_text(page, encoding="utf-8")
