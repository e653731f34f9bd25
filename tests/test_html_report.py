"""The HTML report: every number, no script of anybody else's, nothing from a network, and charts in a browser."""

import copy
import hashlib
import math
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly")

from parties.reports.html import DRAW, MOST, html_report

COST: dict[str, Any] = {
    "rounds": 3,
    "traffic": [
        {"sender": "client", "receiver": "server", "phase": "online", "bytes": 1_234_567},
        {"sender": "server", "receiver": "client", "phase": "online", "bytes": 7_654_321},
        {"sender": "dealer", "receiver": "server", "phase": "offline", "bytes": 1_111_111},
    ],
    "multiply_accumulates": 2_222_222,
    "comparisons": 3_333,
}
EVIL = "</script><script>document.title='owned'</script>"
USED = {"compute": 0.125, "wire": 0.25, "waiting": 0.5}
BOTH = {"server": USED, "client": USED}
FREE = {"rounds": 0, "traffic": [], "multiply_accumulates": 0, "comparisons": 0}
DOCUMENT: dict[str, Any] = {
    "program_digest": "ab" * 32,
    "labels": {"model": EVIL, "length": "8"},
    "deployment": "two-party",
    "total": COST,
    "failure_probability": 0.0,
    "memory": {party: {"live": 5_000_000, "correlations": 6_000_000} for party in ("server", "client")},
    "modules": {"encoder.layer.0": COST, EVIL: COST},
    "kinds": {"compare": COST},
    "correlations": {"compare": 1_111_111},
    "networks": [
        {"name": "loopback", "round_trip_ms": 0.0, "mbps": None, "seconds": 0.875, "parties": BOTH},
        {"name": "far", "round_trip_ms": 80.0, "mbps": 100.0, "seconds": 87.5, "parties": BOTH},
    ],
    "variants": [
        {"name": "one", "rounds": 5, "seconds": {"wan": 2.5}, "lowest_cosine": 0.999991, "problem": None},
        {"name": "two", "rounds": None, "seconds": {}, "lowest_cosine": None, "problem": "does not fit"},
    ],
    "chosen": "one",
}


def own(page: str) -> str:
    """The page without plotly's bundle."""
    return re.sub(r"</style><script>.*?</script></head>", "</style></head>", page, count=1, flags=re.S)


def test_names_of_others_are_text() -> None:
    page = own(html_report(DOCUMENT))
    assert EVIL not in page
    assert "&lt;/script&gt;&lt;script&gt;document.title" in page
    assert page.count("</script>") == 2  # the charts' data, and what draws them


def test_what_cannot_be_printed_can_be_written() -> None:
    page = own(html_report({**DOCUMENT, "modules": {"a\ud800b": COST, "c\u202ed": COST}}))
    assert "a?b" in page
    assert "c?d" in page
    page.encode()


def test_only_the_scripts_of_the_page_may_run() -> None:
    from plotly.offline import get_plotlyjs  # type: ignore[import-not-found,import-untyped,unused-ignore]

    (scripts,) = re.findall(r"script-src ([^;\"]*)", html_report(DOCUMENT).split("<style>")[0])
    digests = [hashlib.sha256(script.encode()).digest() for script in (get_plotlyjs(), DRAW)]
    assert scripts.split() == [f"'sha256-{b64encode(digest).decode()}'" for digest in digests]


def test_nothing_is_loaded_from_anywhere() -> None:
    page = html_report(DOCUMENT)
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|img|iframe)[^>]*\ssrc=|<link|@import", own(page))


def test_every_number_is_in_a_table() -> None:
    page = own(html_report(DOCUMENT))
    for number in (
        "1,234,567",
        "7,654,321",
        "1,111,111",
        "2,222,222",
        "3,333",
        "0.125",
        "87.500",
        "does not fit",
        "0.999991",
    ):
        assert number in page
    assert "one (chosen)" in page


def test_what_costs_nothing_is_in_the_table_alone() -> None:
    page = own(html_report({**DOCUMENT, "kinds": {"reshape": FREE}}))
    assert page.count("reshape") == 1
    assert "reshape</th>" in page


def test_variants_say_what_they_cost_and_whether_they_will_do() -> None:
    sizes = {("a", "b", "online"): 1_000_000, ("b", "a", "online"): 234_567, ("c", "a", "offline"): 7_654_000}
    traffic = [{"sender": s, "receiver": r, "phase": p, "bytes": size} for (s, r, p), size in sizes.items()]
    known = {"rounds": 5, "traffic": traffic}
    seconds = {"lan": 0.5, "wan": 2.5}
    variants = [
        {"name": name, **known, "seconds": seconds, "lowest_cosine": cosine, "meets": cosine > 0.999}
        for name, cosine in (("fine", 1.0), ("rough", 0.99), ("broken", math.nan))
    ]
    asked = {"chosen": None, "asked_accuracy": 0.999, "asked_network": "wan"}
    page = own(html_report({**DOCUMENT, "variants": variants, **asked}))
    for text in (
        "1,234,567",
        "7,654,000",
        "<td>yes</td>",
        "<td>no</td>",
        "None is chosen",
        '"seconds, wan"',
        "asked: 0.999",
    ):
        assert text in page
    assert '"text": ["1"]' in page
    assert '"3"' not in page  # no place on the chart


@pytest.mark.parametrize("missing", ["networks", "variants", "correlations", "memory", "modules", "kinds"])
def test_parts_may_be_missing(missing: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    del document[missing]
    assert "<h1>" in html_report(document)


def test_without_timings_the_waiting_is_shown() -> None:
    document = {**DOCUMENT, "networks": [], "waiting_seconds": {"far": 12.5}}
    assert "12.500" in own(html_report(document))


def test_many_modules_end_as_others() -> None:
    document = {**DOCUMENT, "modules": {f"layer.{i}": COST for i in range(MOST + 9)}}
    page = own(html_report(document))
    assert '"others (9)"' in page
    assert f"layer.{MOST + 8}</th>" in page


@pytest.mark.parametrize("empty", ["networks", "variants", "correlations", "memory", "modules", "kinds"])
def test_parts_may_be_empty(empty: str) -> None:
    assert "<h1>" in html_report({**DOCUMENT, empty: type(DOCUMENT[empty])()})


def test_without_plotly_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"plotly is not installed\nhint: pip install 'unseen\[report\]'"):
        html_report(DOCUMENT)


@pytest.mark.slow
def test_a_browser_draws_the_charts(tmp_path: Path) -> None:
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
    )
    if not browser:
        pytest.skip("no Chromium here")
    page = tmp_path / "report.html"
    page.write_text(html_report(DOCUMENT), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=8000"]
    command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout.count("main-svg") >= 5
    assert "<title>unseen profile: &lt;/script" in done.stdout  # the name's script did not run
    assert "CONSOLE" not in done.stderr
