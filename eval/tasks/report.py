"""`report.html`: an evaluation in one file that needs no other, the worst samples first."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from ...configs.display import html_table

_SAMPLES, _SHOWN = 20, 1500  # of a task; characters of a text
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;"
    "text-align:left}pre{white-space:pre-wrap;background:#f6f6f6;padding:.6rem;margin:.3rem 0}"
    "summary{cursor:pointer}.bad{color:#b00020}img{max-width:100%}"
)


def page(results: Mapping, samples: Sequence[Mapping], record: Mapping) -> str:
    """The report of an evaluation.

    Args:
      results, samples, record: what `results.json`, `samples.jsonl` and `record.json` hold.
    """
    parts = [scores(results), _image(_bars(results))]
    for name, found in results["tasks"].items():
        mine = [line for line in samples if line["task"] == name]
        parts.append(f"<h2>{html.escape(name)}</h2>")
        if all("depth" in line for line in mine) and mine:
            parts.append(_image(_heat(mine, found["metric"])))
        parts += _worst(mine, found["metric"])
    told = {k: v for k, v in record.items() if k not in ("tasks", "config", "chat_template")}
    parts += ["<h2>Record</h2>", html_table([[k, str(v)] for k, v in told.items()])]
    asked = [[name, t["definition"], t["data_hash"], t["documents"]]
             for name, t in record["tasks"].items()]  # fmt: skip
    parts.append(html_table(asked, ["task", "definition", "data", "documents"]))
    return _whole(f"Evaluation of {results['checkpoint']}", parts)


def scores(results: Mapping) -> str:
    """The table of an evaluation's results."""
    rows = [
        [
            name,
            metric,
            s["value"],
            s["stderr"],
            f"{s['low']:.4f} to {s['high']:.4f}",
            s["documents"],
        ]
        for name, found in results["tasks"].items()
        for metric, s in found.items()
        if isinstance(s, Mapping) and s["value"] is not None
    ]
    head = ["task", "metric", "value", "standard error", "95% interval", "documents"]
    return html_table(rows, head)


def comparison(results: Mapping, first: Sequence[Mapping], second: Sequence[Mapping]) -> str:
    """The report of two evaluations on the same documents, where they differ most first."""
    rows = [
        [name, metric, s["value"], s["stderr"], f"{s['low']:.4f} to {s['high']:.4f}", s["better"],
         s["worse"], s["p"], s["documents"]]
        for name, found in results["tasks"].items()
        for metric, s in found.items()
    ]  # fmt: skip
    head = ["task", "metric", "difference", "standard error", "95% interval", "better", "worse",
            "p", "documents"]  # fmt: skip
    parts = [html_table(rows, head)]
    others = {(line["task"], line["document"]): line for line in second}
    for name, found in results["tasks"].items():
        metric = next(iter(found))
        pairs = [(line, others[name, line["document"]]) for line in first if line["task"] == name]
        pairs.sort(key=lambda p: -abs(p[1]["scores"][metric] - p[0]["scores"][metric]))
        parts.append(f"<h2>{html.escape(name)}</h2>")
        for a, b in pairs[:_SAMPLES]:
            if a["scores"][metric] != b["scores"][metric]:
                parts.append(_sample(a, metric) + "<b>the second</b>" + _pre(b["answer"]))
    title = f"{results['second']} against {results['first']}"
    return _whole(title, parts)


def _whole(title: str, parts: Sequence[str]) -> str:
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>{''.join(parts)}</html>\n"
    )


def _worst(samples: Sequence[Mapping], metric: str) -> list[str]:
    sign = -1 if metric == "bits_per_byte" else 1
    order = sorted(samples, key=lambda line: sign * line["scores"][metric])
    return [_sample(line, metric) for line in order[:_SAMPLES]]


def _sample(line: Mapping, metric: str) -> str:
    value = line["scores"][metric]
    target = line["target"]
    if line["choices"]:
        target = line["choices"][int(target)]
    bad = ' class="bad"' if metric != "bits_per_byte" and value < 1 else ""
    cut = f", {line['cut']} tokens cut" if line["cut"] else ""
    return (
        f"<details><summary{bad}>document {line['document']}: {metric} {value:.4g}{cut}</summary>"
        f"{_pre(line['prompt'], end=True)}<b>target</b>{_pre(target)}<b>answer</b>"
        f"{_pre(line['answer'])}</details>"
    )


def _pre(text: str, end: bool = False) -> str:
    if len(text) > _SHOWN:
        text = f"... {text[-_SHOWN:]}" if end else f"{text[:_SHOWN]} ..."
    return f"<pre>{html.escape(text)}</pre>"


def _bars(results: Mapping):
    """The metric of each task with its interval."""
    from matplotlib.figure import Figure

    found = [(name, f[f["metric"]]) for name, f in results["tasks"].items()]
    found = [(name, s) for name, s in found if s["value"] is not None]
    figure = Figure(figsize=(8, 0.6 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    values = [s["value"] for _, s in found]
    below = [max(0.0, s["value"] - s["low"]) for _, s in found]
    above = [max(0.0, s["high"] - s["value"]) for _, s in found]
    axes.barh([name for name, _ in found], values, xerr=[below, above], color="#4878a8", capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("score with its 95% interval")
    return figure


def _heat(samples: Sequence[Mapping], metric: str):
    """Score by length and depth of a needle."""
    from matplotlib.figure import Figure

    lengths = sorted({line["length"] for line in samples})
    depths = sorted({line["depth"] for line in samples})
    cells: dict[tuple, list[float]] = {}
    for line in samples:
        cells.setdefault((line["depth"], line["length"]), []).append(line["scores"][metric])
    grid = [
        [sum(c) / len(c) if (c := cells.get((d, n))) else float("nan") for n in lengths]
        for d in depths
    ]
    figure = Figure(figsize=(1.5 + 0.9 * len(lengths), 1.2 + 0.4 * len(depths)),
                    layout="constrained")  # fmt: skip
    axes = figure.subplots()
    shown = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth of the needle")
    figure.colorbar(shown, label=metric)
    return figure


def _image(figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return (
        f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
    )
