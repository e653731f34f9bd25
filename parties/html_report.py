"""A profile as one self-contained HTML page: charts, and a table with every number beneath each.

The page is made from the JSON document of ``unseen profile``. Names in it come from other people's models: text is
escaped wherever it goes, and the page's content security policy lets it load nothing at all.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 25  # bars; what costs less is summed as "others"
COLOURS = ("#0072b2", "#e69f00", "#999999")  # told apart by colour-blind people too (Okabe and Ito)
BYTES = (("to server", "bytes_to_server"), ("to client", "bytes_to_client"), ("offline", "offline_bytes_to_server"))
COUNTS = (
    ("rounds, unmerged", "rounds"),
    ("multiply-accumulates", "multiply_accumulates"),
    ("comparisons", "comparisons"),
)
SECONDS = (("computing", "compute"), ("packing", "wire"), ("waiting", "waiting"))
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px;
  margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .5em 0 1em } caption { text-align: left; color: #555 }
th, td { padding: .15em .8em; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere } .wide { overflow-x: auto }
figure { margin: 0 } code { overflow-wrap: anywhere } h2 { margin-top: 2em }
@media print { details { display: block } }
"""

Rows = Mapping[str, Mapping[str, Any]]


def html_report(document: Mapping[str, Any]) -> str:
    """The page. ImportError with a hint where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise ImportError("plotly is not installed\nhint: pip install 'unseen[report]'") from None
    charts: list[dict[str, Any]] = []
    body = [_summary(document)]
    for title, key in (("Bytes by module", "modules"), ("Bytes by kind of operation", "kinds")):
        body.append(_costs(title, document.get(key, {}), charts))
    body += [_correlations(document.get("correlations", {}), charts), _networks(document, charts)]
    body.append(_variants(document, charts))
    title = _text(f"unseen profile: {document.get('labels', {}).get('model', 'a model')}")
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head>\n"
        f"<body><h1>{title}</h1>\n{''.join(body)}\n<script>{_DRAW % _data(charts)}</script></body></html>\n"
    )


_DRAW = """
for (const [i, chart] of %s.entries())
  Plotly.newPlot("chart" + i, chart.data, chart.layout, {displayModeBar: false, responsive: true});
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _data(charts: Sequence[Mapping[str, Any]]) -> str:
    """JSON that may stand in a script: nothing in it can end the element."""
    return json.dumps(charts).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: object) -> str:
    """A name for plotly, which takes some HTML in labels; the angle brackets are written out."""
    return html.escape(str(value), quote=False)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value >= 0.001 or value == 0 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else _text("" if value is None else value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th scope=col>{_text(h)}</th>" for h in heads)
    lines = "".join(
        f"<tr><td>{_text(first)}</td>{''.join(f'<td>{_number(v)}</td>' for v in rest)}</tr>" for first, *rest in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def _bars(
    charts: list[dict[str, Any]],
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    axis: str,
    *,
    log: bool = False,
) -> str:
    """Horizontal stacked bars, dearest on top."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "y": [_plain(n) for n in names],
            "x": list(values),
            "marker": {"color": colour},
        }
        for (label, values), colour in zip(series.items(), COLOURS, strict=False)
    ]
    layout = {
        "barmode": "group" if log else "stack",
        "height": 120 + 26 * max(1, len(names)) * (2 if log else 1),
        "margin": {"l": 10, "r": 10, "t": 10, "b": 50},
        "xaxis": {"title": {"text": axis}, "type": "log" if log else "linear"},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    }
    charts.append({"data": data, "layout": layout})
    return f'<figure><div id="chart{len(charts) - 1}"></div></figure>'


def _summary(document: Mapping[str, Any]) -> str:
    total, labels = document.get("total", {}), document.get("labels", {})
    rows: list[tuple[object, ...]] = [(key, value) for key, value in labels.items()]
    rows.append(("deployment", document.get("deployment", "two-party")))
    rows.append(("rounds, merged", total.get("rounds")))
    rows += [(f"MB {label}", total.get(key, 0) / 1e6) for label, key in BYTES]
    rows += [(label, total.get(key)) for label, key in COUNTS[1:]]
    for party, memory in document.get("memory", {}).items():
        rows.append((f"MB of shares at once, {party}", memory["live"] / 1e6))
        rows.append((f"MB of correlations a query, {party}", memory["correlations"] / 1e6))
    rows.append(("failure probability within the ranges", document.get("failure_probability")))
    rows.append(("Program", document.get("program_digest")))
    return (
        "<p>Rounds, bytes and memory are exact: the protocols themselves were run, without data. Seconds are projected "
        f"from this machine's timed kernels.</p>{_table(('a query', ''), rows)}"
    )


def _costs(title: str, groups: Rows, charts: list[dict[str, Any]]) -> str:
    def size(row: Mapping[str, Any]) -> int:
        return sum(int(row[key]) for _, key in BYTES)

    ordered = sorted(
        ((n, r) for n, r in groups.items() if size(r) or r["multiply_accumulates"]), key=lambda i: -size(i[1])
    )
    shown, rest = ordered[:MOST], ordered[MOST:]
    names = [name for name, _ in shown] + (["others"] if rest else [])
    series = {
        label: [row[key] / 1e6 for _, row in shown] + ([sum(row[key] for _, row in rest) / 1e6] if rest else [])
        for label, key in BYTES
    }
    heads = ["", *(f"bytes {label}" for label, _ in BYTES), *(label for label, _ in COUNTS)]
    table = _table(heads, [(n, *(r[k] for _, k in (*BYTES, *COUNTS))) for n, r in ordered])
    chart = _bars(charts, names, series, "MB")
    return f"<h2>{_text(title)}</h2>{chart}<details open><summary>numbers</summary>{table}</details>"


def _correlations(found: Mapping[str, int], charts: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    ordered = sorted(found.items(), key=lambda item: -item[1])
    chart = _bars(charts, [n for n, _ in ordered], {"offline, to the server": [s / 1e6 for _, s in ordered]}, "MB")
    return f"<h2>Correlations by kind</h2>{chart}{_table(('', 'bytes'), ordered)}"


def _networks(document: Mapping[str, Any], charts: list[dict[str, Any]]) -> str:
    networks = document.get("networks") or []
    if not networks:
        waiting = document.get("waiting_seconds", {})
        if not waiting:
            return ""
        chart = _bars(charts, list(waiting), {"waiting": list(waiting.values())}, "seconds")
        return f"<h2>Waiting for the network</h2>{chart}{_table(('', 'seconds'), list(waiting.items()))}"
    names = [row["name"] for row in networks]
    series = {label: [row["client"][key] for row in networks] for label, key in SECONDS}
    heads = ["", "round trip, ms", "Mbps", "seconds"]
    heads += [f"{party} {label}" for party in ("client", "server") for label, _ in SECONDS]
    rows = [
        (
            *(r[key] for key in ("name", "round_trip_ms", "mbps", "seconds")),
            *(r[party][key] for party in ("client", "server") for _, key in SECONDS),
        )
        for r in networks
    ]
    times = [row["seconds"] for row in networks]
    chart = _bars(charts, names, series, "seconds of the client", log=max(times) > 20 * min(times) > 0)
    return f"<h2>Seconds a query, by network</h2>{chart}{_table(heads, rows)}"


def _variants(document: Mapping[str, Any], charts: list[dict[str, Any]]) -> str:
    variants = document.get("variants") or []
    if not variants:
        return ""
    known = [v for v in variants if v.get("lowest_cosine") is not None and v.get("seconds")]
    networks = list(known[0]["seconds"]) if known else []
    chart = ""
    if known:
        points = {
            "type": "scatter",
            "mode": "markers+text",
            "textposition": "top center",
            "text": [_plain(v["name"]) for v in known],
            "x": [v["seconds"][networks[0]] for v in known],
            "y": [max(1e-9, 1 - v["lowest_cosine"]) for v in known],
            "marker": {"size": 11, "color": [COLOURS[v["name"] == document.get("chosen")] for v in known]},
        }
        layout = {
            "height": 420,
            "xaxis": {"title": {"text": f"seconds, {_plain(networks[0])}"}},
            "yaxis": {"title": {"text": "1 - lowest cosine"}, "type": "log", "automargin": True},
        }
        charts.append({"data": [points], "layout": layout})
        chart = f'<figure><div id="chart{len(charts) - 1}"></div></figure>'
    rows = [
        (
            v["name"] + (" (chosen)" if v["name"] == document.get("chosen") else ""),
            *(v.get(key) for key in ("rounds", "lowest_cosine", "problem")),
            *((v.get("seconds") or {}).get(n) for n in networks),
        )
        for v in variants
    ]
    heads = ("", "rounds", "lowest cosine", "problem", *networks)
    return f"<h2>Variants: cost and accuracy</h2>{chart}{_table(heads, rows)}"
