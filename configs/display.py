"""What a notebook shows of results and models: a table where it can draw one, text elsewhere."""

import html
from collections.abc import Mapping, Sequence


def html_table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Return an HTML table; a number stands at the right of its cell."""

    def cell(value, tag):
        text = f"{value:,.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int \
            else str(value)  # fmt: skip
        right = ' style="text-align:right"' if isinstance(value, int | float) else ""
        return f"<{tag}{right}>{html.escape(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell(x, "th") for x in head) + "</tr>"] if head else []
    lines += ["<tr>" + "".join(cell(x, "td") for x in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


class Results(dict):
    """Numbers by name, as `results.json` holds them; a table in a notebook."""

    def _repr_html_(self) -> str:
        return html_table(list(self.items()))


def print_results(results: Mapping) -> None:
    """Print a line for each number or text."""
    width = max(map(len, results))
    for name, value in results.items():
        print(f"  {name:<{width}}  {f'{value:,.5g}' if isinstance(value, float) else value}")


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of which is the head, as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
