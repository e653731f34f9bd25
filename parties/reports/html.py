"""A profile as one self-contained HTML page: charts, and a table with every number beneath each.

The page is made from the JSON document of ``unseen profile``. Names in it come from other people's models: text is
escaped wherever it goes, and the page's content security policy lets it load nothing at all, and run no script but
the two whose hashes it names.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from secure.cost.traffic import OFFLINE, ONLINE
from secure.errors import MissingPackage, printable
from secure.units import in_units

MOST = 25  # bars; what costs less is summed as "others"
COLOURS = ("#0072b2", "#e69f00", "#999999")  # told apart by colour-blind people too (Okabe and Ito)
COUNTS = (("rounds, unmerged", "rounds"), ("multiply-accumulates", "multiply_accumulates"), ("comparisons",) * 2)
SECONDS = (("computing", "compute"), ("packing", "wire"), ("waiting", "waiting"))
LEAST = 1e-9  # where the error of a cosine of exactly 1 is drawn
LOOKS = (  # of a variant's point
    ("chosen", "chosen", "star", "#e69f00"),
    ("yes", "accurate enough", "circle", "#0072b2"),
    ("no", "not accurate enough", "x", "#d55e00"),
    ("", "not judged", "diamond", "#999999"),
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px;
  margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .5em 0 1em } caption { text-align: left; color: #555 }
th, td { padding: .15em .8em; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
td { overflow-wrap: break-word } tbody th { font-weight: normal; overflow-wrap: anywhere; min-width: 11em }
th:first-child { text-align: left; padding-left: 0 } .wide { overflow-x: auto } .facts td { overflow-wrap: anywhere }
figure { margin: 0 } h1 { overflow-wrap: anywhere } h2 { margin-top: 2em }
@page { size: A4; margin: 15mm }
@media print { body { margin: 0; padding: 0 } figure, tr { break-inside: avoid } h2 { break-after: avoid }
  h2 + p { break-after: avoid } .wide { overflow: visible } table { font-size: 10px } th, td { padding: .1em .4em } }
"""
DRAW = """
const narrow = matchMedia("(max-width: 700px)"), charts = JSON.parse(document.getElementById("charts").textContent);
for (const [i, {data, layout, long, short}] of charts.entries()) {
  const name = "chart" + i, names = () => long ? {"yaxis.ticktext": narrow.matches ? short : long} : {};
  const drawn = Plotly.newPlot(name, data, layout, {displayModeBar: false, responsive: true});
  drawn.then(() => Plotly.relayout(name, names()));
  narrow.addEventListener("change", () => Plotly.relayout(name, names()));
  addEventListener("beforeprint", () => Plotly.relayout(name, {width: 660}));
  addEventListener("afterprint", () => Plotly.relayout(name, {width: null, autosize: true}));
}
"""

Rows = Mapping[str, Mapping[str, Any]]
LinkName = tuple[str, str, str]
"""Sender, receiver, phase."""


def html_report(document: Mapping[str, Any]) -> str:
    """The page of a profile."""
    charts: list[dict[str, Any]] = []
    body = [_summary(document)]
    links = list(_sizes(document.get("total", {})))
    for title, key in (("Bytes by module", "modules"), ("Bytes by kind of operation", "kinds")):
        body.append(_costs(title, document.get(key, {}), links, charts))
    body += [_correlations(document.get("correlations", {}), charts), _networks(document, charts)]
    body.append(_variants(document, charts))
    return page(f"unseen profile: {document.get('labels', {}).get('model', 'a model')}", body, charts)


def page(heading: str, body: Sequence[str], charts: Sequence[Mapping[str, Any]]) -> str:
    """Sections of HTML and the charts that they hold as one page. MissingPackage where plotly is not there."""
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise MissingPackage("plotly is not installed", "pip install 'unseen[report]'") from None
    title, plotly = escaped(heading), get_plotlyjs()
    digests = (b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (plotly, DRAW))
    policy = f"{POLICY}; script-src" + "".join(f" 'sha256-{digest}'" for digest in digests)
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style><script>{plotly}</script></head>\n"
        f"<body><h1>{title}</h1>\n<noscript>Charts need JavaScript; the tables have every number.</noscript>"
        f"{''.join(body)}\n<script type='application/json' id=charts>{_data(charts)}</script>"
        f"<script>{DRAW}</script></body></html>\n"
    )


def escaped(value: object) -> str:
    return html.escape(printable(str(value)))


def _data(charts: Sequence[Mapping[str, Any]]) -> str:
    """JSON that may stand in a script: nothing in it can end the element."""
    return json.dumps(charts, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: object, most: int = 200) -> str:
    """A name for plotly, which takes some HTML in labels; the angle brackets are written out. A long one's end."""
    text = printable(str(value))
    return html.escape(text if len(text) <= most else "…" + text[1 - most :], quote=False)


def _number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.3f}".removesuffix(".000") if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else escaped("" if value is None else value)


def table_html(heads: Sequence[str], rows: Sequence[Sequence[object]], style: str = "") -> str:
    head = "".join(f"<th scope=col>{escaped(h)}</th>" for h in heads)
    lines = "".join(
        f"<tr><th scope=row>{escaped(first)}</th>{''.join(f'<td>{_number(v)}</td>' for v in rest)}</tr>\n"
        for first, *rest in rows
    )
    return (
        f'<div class="wide {style}" role=region tabindex=0 aria-label="{escaped(heads[0])}, in numbers"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _figure(
    charts: list[dict[str, Any]], what: str, chart: Mapping[str, Any], *, x: str, height: int, **rest: Any
) -> str:
    """Room for a chart without zoom, which would catch a finger that scrolls; ``x`` names its axis."""
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}
    layout: dict[str, Any] = {"height": height, "dragmode": False, "legend": legend, **rest}
    layout["margin"] = {"l": 10, "r": 20, "t": 30, "b": 50}
    layout["xaxis"] = {"title": {"text": x}, "fixedrange": True, **rest.get("xaxis", {})}
    layout["yaxis"] = {"automargin": True, "fixedrange": True, **rest["yaxis"]}
    charts.append({**chart, "layout": layout})
    label = f"Chart, {what}; its numbers follow"
    return f'<figure><div id="chart{len(charts) - 1}" role=img aria-label="{label}"></div></figure>'


def bar_chart(
    charts: list[dict[str, Any]],
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    axis: str,
    *,
    log: bool = False,
) -> str:
    """Horizontal bars, stacked or, on a logarithmic axis, side by side. Names are ticks: none is taken for a number."""
    if not names:
        return ""
    places = list(range(len(names)))
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "y": places,
            "x": [v if math.isfinite(v) and (v > 0 or not log) else None for v in values],
            "customdata": [_plain(n) for n in names],
            "hovertemplate": f"%{{customdata}}<br>{label}: %{{x:.4~g}} {axis}<extra></extra>",
            "marker": {"color": colour},
        }
        for (label, values), colour in zip(series.items(), COLOURS, strict=False)
    ]
    ticks = {key: [_plain(n, most) for n in names] for key, most in (("long", 45), ("short", 20))}
    return _figure(
        charts,
        axis,
        {"data": data, **ticks},
        x=axis,
        height=140 + 26 * len(names) * (2 if log else 1),
        barmode="group" if log else "stack",
        xaxis={"type": "log" if log else "linear"},
        yaxis={"autorange": "reversed", "tickvals": places},
    )


def _summary(document: Mapping[str, Any]) -> str:
    total, labels = document.get("total", {}), document.get("labels", {})
    rows: list[tuple[object, ...]] = [(key, labels[key]) for key in ("model", "length") if key in labels]
    rows.append(("deployment", document.get("deployment")))
    rows.append(("rounds, merged", total.get("rounds")))
    rows += [(_label(link), _size(size)) for link, size in _sizes(total).items()]
    rows += [(label, total.get(key)) for label, key in COUNTS[1:]]
    for party, memory in document.get("memory", {}).items():
        rows.append((f"memory of the {party}: shares at once", _size(memory["live"])))
        rows.append((f"memory of the {party}: correlations a query", _size(memory["correlations"])))
    rows.append(("failure probability within the ranges", document.get("failure_probability")))
    rows += [(key, value) for key, value in labels.items() if key not in ("model", "length")]
    rows.append(("Program", document.get("program_digest")))
    return (
        "<p>Rounds, bytes and memory are <b>exact</b>: the protocols themselves were run, without data. Seconds are "
        "<b>projected</b> from kernels timed on the machine that made this report and from each network's latency and "
        f"bandwidth; they are not measured on a network.</p>{table_html(('a query', 'figure'), rows, 'facts')}"
    )


def _sizes(row: Mapping[str, Any]) -> dict[LinkName, int]:
    """Bytes by link."""
    return {(t["sender"], t["receiver"], t["phase"]): int(t["bytes"]) for t in row.get("traffic", ())}


def _label(link: LinkName) -> str:
    sender, receiver, phase = link
    return f"{phase}, {sender} to {receiver}"


def _size(size: int) -> str:
    return f"{in_units(size)} ({size:,} bytes)"


def _costs(title: str, groups: Rows, links: Sequence[LinkName], charts: list[dict[str, Any]]) -> str:
    sizes = {name: _sizes(row) for name, row in groups.items()}
    ordered = sorted(groups, key=lambda name: -sum(sizes[name].values()))
    dear = [name for name in ordered if sum(sizes[name].values())]
    shown, rest = dear[:MOST], dear[MOST:]
    names = shown + ([f"others ({len(rest)})"] if rest else [])
    series = {
        _label(link): [sizes[name].get(link, 0) / 1e6 for name in shown]
        + ([sum(sizes[name].get(link, 0) for name in rest) / 1e6] if rest else [])
        for link in links
    }
    heads = [title.split()[2], *(f"bytes {_label(link)}" for link in links), *(label for label, _ in COUNTS)]
    rows = [
        (n, *(sizes[n].get(link, 0) for link in links), *(groups[n].get(key) for _, key in COUNTS)) for n in ordered
    ]
    return f"<h2>{escaped(title)}</h2>{bar_chart(charts, names, series, 'MB')}{table_html(heads, rows)}"


def _correlations(found: Mapping[str, int], charts: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    ordered = sorted(found.items(), key=lambda item: -item[1])
    chart = bar_chart(charts, [n for n, _ in ordered], {"offline": [s / 1e6 for _, s in ordered]}, "MB")
    return f"<h2>Correlations by kind</h2>{chart}{table_html(('correlations', 'bytes'), ordered)}"


def _networks(document: Mapping[str, Any], charts: list[dict[str, Any]]) -> str:
    networks = document.get("networks") or []
    if not networks:
        waiting = document.get("waiting_seconds", {})
        if not waiting:
            return ""
        table = table_html(("network", "seconds"), list(waiting.items()))
        chart = bar_chart(
            charts, list(waiting), {"waiting": list(waiting.values())}, "seconds", log=_far(list(waiting.values()))
        )
        return f"<h2>Waiting for the network</h2><p>Nothing was timed: without computation.</p>{chart}{table}"
    lines = [(row, party) for row in networks for party in row["parties"]]
    log = _far([row["seconds"] for row in networks])
    names = [f"{row['name']}, {party}" for row, party in lines]
    series = {label: [row["parties"][party][key] for row, party in lines] for label, key in SECONDS}
    heads = ["network, party", "round trip, ms", "Mbps", "a query, s", *(f"{label}, s" for label, _ in SECONDS)]
    rows = [
        (name, *(row[k] for k in ("round_trip_ms", "mbps", "seconds")), *(row["parties"][party][k] for _, k in SECONDS))
        for name, (row, party) in zip(names, lines, strict=True)
    ]
    note = "<p>The axis is logarithmic: the parts stand side by side.</p>" if log else ""
    chart = bar_chart(charts, names, series, "seconds", log=log)
    return f"<h2>Seconds a query, by network</h2>{note}{chart}{table_html(heads, rows)}"


def _far(times: Sequence[float]) -> bool:
    return max(times) > 20 * min(times) > 0


def _variants(document: Mapping[str, Any], charts: list[dict[str, Any]]) -> str:
    variants = document.get("variants") or []
    if not variants:
        return ""
    best, asked = document.get("chosen"), document.get("asked_accuracy")
    networks = list(dict.fromkeys(n for v in variants for n in v.get("seconds") or {}))
    network = document["asked_network"] if document.get("asked_network") in networks else (networks or [None])[0]
    groups: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, v in enumerate(variants, 1):
        cosine = v.get("lowest_cosine")
        if cosine is not None and math.isfinite(cosine) and network in (v.get("seconds") or {}):
            state = "chosen" if best is not None and v["name"] == best else _meets(v)
            groups.setdefault(state, []).append((number, v))
    chart = _points(charts, groups, str(network), asked) if groups else ""
    rows = [
        (
            f"{number}. {v['name']}" + (" (chosen)" if best is not None and v["name"] == best else ""),
            *(v.get("rounds"), _bytes(v, ONLINE), _bytes(v, OFFLINE)),
            *((v.get("seconds") or {}).get(n) for n in networks),
            "" if v.get("lowest_cosine") is None else f"{v['lowest_cosine']:.9g}",
            *(_meets(v), v.get("problem")),
        )
        for number, v in enumerate(variants, 1)
    ]
    heads = ("variant", "rounds", "bytes online", "bytes offline", *(f"s, {n}" for n in networks), "lowest cosine")
    said = "" if asked is None else f"Asked: a lowest cosine of {asked:g} or more. "
    said += "None is chosen." if best is None else f"Chosen: {escaped(best)}."
    table = table_html((*heads, "accurate enough", "problem"), rows)
    return (
        f"<h2>Variants: cost and accuracy</h2><p>{said} Numbers in the chart are those of the table.</p>{chart}{table}"
    )


def _meets(variant: Mapping[str, Any]) -> str:
    known = variant.get("meets") is not None and variant.get("lowest_cosine") is not None
    return _number(bool(variant["meets"])) if known else ""


def _bytes(variant: Mapping[str, Any], phase: str) -> int | None:
    """The bytes of all links in one phase; None where nothing was counted."""
    found = variant.get("traffic")
    return None if found is None else sum(t["bytes"] for t in found if t["phase"] == phase)


def _points(
    charts: list[dict[str, Any]],
    groups: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]],
    network: str,
    asked: float | None,
) -> str:
    data = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": said,
            "textposition": "top center",
            "text": [str(number) for number, _ in groups[state]],
            "customdata": [_plain(v["name"]) for _, v in groups[state]],
            "x": [v["seconds"][network] for _, v in groups[state]],
            "y": [max(LEAST, 1 - v["lowest_cosine"]) for _, v in groups[state]],
            "hovertemplate": "%{customdata}<br>%{x:.4~g} s, 1 - cosine: %{y:.3~g}<extra></extra>",
            "marker": {"size": 18 if state == "chosen" else 12, "symbol": symbol, "color": colour},
            "cliponaxis": False,
        }
        for state, said, symbol, colour in LOOKS
        if state in groups
    ]
    marks: dict[str, Any] = {}
    if asked is not None and asked < 1:
        height = 1 - asked
        line = {"color": "#555", "dash": "dash", "width": 1}
        marks["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}
        ]
        note = {"text": f"asked: {asked:g}", "xref": "paper", "x": 1, "y": math.log10(height), "showarrow": False}
        marks["annotations"] = [{**note, "xanchor": "right", "yanchor": "bottom"}]
    errors = {"title": {"text": "1 - lowest cosine"}, "type": "log", "exponentformat": "power", "dtick": 1}
    x = f"seconds, {_plain(network)}"
    return _figure(charts, "accuracy and cost", {"data": data}, x=x, height=440, showlegend=True, yaxis=errors, **marks)
