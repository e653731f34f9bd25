"""The page of a proxy: what is in it, who gets it, and what a browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
from collections.abc import Iterator
from importlib.resources import files

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("parties.proxy.app")

import secure
from parties.proxy.page import KEPT, History
from secure.cost.traffic import OFFLINE, ONLINE, Traffic
from secure.deployments.deployment import ROWS
from secure.session.link import Report
from tests.browser import Browser, opened
from tests.proxies import ServedProxy, running
from tests.test_proxy import TEXTS, embedder, writer  # noqa: F401  (fixtures)

PAGE = files("parties.proxy").joinpath("page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def embeds(embedder: secure.Compiled) -> Iterator[ServedProxy]:  # noqa: F811
    with running(embedder) as served:
        yield served


def got(served: ServedProxy, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(served.address, timeout=60)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


def with_key(served: ServedProxy) -> dict[str, str]:
    return {"Authorization": f"Bearer {served.token}"}


def test_the_page_is_whole_and_loads_nothing(embeds: ServedProxy) -> None:
    status, headers, text = got(embeds, "/")
    assert (status, text) == (200, PAGE)
    assert not re.search(
        r"""(src|href|action)=["'](?!data:,)|@import|url\(|\son[a-z]+=|\sstyle=|https?://(?!www\.w3)""", text
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|sessionStorage", text)
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert embeds.token not in text
    assert embeds.model not in text


def test_the_policy_lets_its_own_script_run_alone(embeds: ServedProxy) -> None:
    policy = dict(
        part.strip().partition(" ")[::2] for part in got(embeds, "/")[1]["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == "'none'"
    for name in ("script", "style"):
        (own,) = re.findall(rf"<{name}>(.*?)</{name}>", PAGE, flags=re.S)
        assert policy[f"{name}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'"


def test_every_field_has_a_label() -> None:
    made = set(re.findall(r"""(?:id="|\{ id: "|\[\[?")(key|one|other|kind|count)\b""", PAGE))
    labels = set(re.findall(r"""for(?:="|: ")([a-z]+)""", PAGE)) | set(re.findall(r"""\["(one|other)", "[A-Z]""", PAGE))
    assert made <= labels
    assert '<html lang="en">' in PAGE


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil:1", ""])
def test_another_name_gets_nothing(embeds: ServedProxy, host: str) -> None:
    for path in ("/", "/status"):
        status, _, text = got(embeds, path, Host=host, **with_key(embeds))
        assert status == 421
        assert embeds.model not in text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:80", "192.0.2.1"])
def test_names_of_this_machine(embeds: ServedProxy, host: str) -> None:
    assert got(embeds, "/", Host=host)[0] == 200
    assert got(embeds, "/status", Host=host, **with_key(embeds))[0] == 200


def test_other_origins_get_no_numbers(embeds: ServedProxy) -> None:
    key = with_key(embeds)
    assert got(embeds, "/status", Origin=f"http://{embeds.address}", **key)[0] == 200
    assert got(embeds, "/status", Origin="http://evil.example", **key)[0] == 403
    assert got(embeds, "/status", Origin="null", **key)[0] == 403
    assert got(embeds, "/status", Sec_Fetch_Site="cross-site", **key)[0] == 403
    assert "access-control-allow-origin" not in got(embeds, "/status", **key)[1]


def test_numbers_need_the_key(embeds: ServedProxy) -> None:
    assert got(embeds, "/status")[0] == 401
    assert got(embeds, "/status", Authorization="Bearer unseen_wrong")[0] == 401
    assert got(embeds, f"/status?key={embeds.token}")[0] == 401


def test_the_numbers(embeds: ServedProxy) -> None:
    before = embeds.ask("/status").body
    assert embeds.ask("/v1/embeddings", {"input": TEXTS[:2]}).status == 200
    found = embeds.ask("/status").body
    assert (found["model"], found["endpoint"]) == (embeds.model, "embeddings")
    assert found["program"] == embeds.session.program.digest
    assert found["sessions"] == {"alive": 1, "all": 1}
    assert found["running"] == 0
    more = found["totals"]["queries"] - before["totals"]["queries"]
    assert more >= 1
    last = found["queries"][-1]
    assert last["rounds"] > 0
    assert sum(each["bytes"] for each in last["traffic"] if each["phase"] == "online") > 0
    assert [row[0] for row in found["learns"]["rows"]] == list(ROWS)
    assert all(len(row) == 1 + len(found["learns"]["columns"]) for row in found["learns"]["rows"])
    said = json.dumps(found)
    assert not any(word in said for text in TEXTS[:2] for word in text.split())


def test_the_history_is_bounded() -> None:
    history = History()
    links = (Traffic("client", "server", 3, ONLINE), Traffic("dealer", "server", 5, OFFLINE))
    for number in range(2 * KEPT):
        history.add(Report(2, links, 0.1, 0.2, 0.0, 0.0, number, 8))
    found = history.as_dict()
    assert len(found["queries"]) == found["kept"] == KEPT
    assert found["totals"] == {"queries": 2 * KEPT, "rounds": 4 * KEPT, ONLINE: 6 * KEPT, OFFLINE: 10 * KEPT}


def test_a_text_counts_while_it_is_written(writer: secure.Compiled) -> None:  # noqa: F811
    with running(writer) as served:
        body = {"prompt": "the cat sat", "max_tokens": 4, "ignore_eos": True}
        assert served.ask("/v1/completions", body).status == 200
        found = served.ask("/status").body
        assert found["totals"]["queries"] == 4
        assert found["room"] > 4


# in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened(tmp_path_factory.mktemp("browser")) as found:
        yield found


def is_narrow(browser: Browser) -> bool:
    """True if nothing of the page is wider than its window."""
    return bool(browser.run("document.documentElement.scrollWidth <= innerWidth"))


def asks_the_proxy_alone(browser: Browser, served: ServedProxy) -> None:
    assert browser.asked
    assert all(url.startswith((f"http://{served.address}/", "about:", "data:")) for url in browser.asked)
    assert not any(served.token in url.partition("#")[0] for url in browser.asked)
    browser.asked.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_a_browser_shows_it(embeds: ServedProxy, browser: Browser, width: int, dark: bool) -> None:
    browser.size(width, 844, dark=dark)
    browser.open("about:blank")
    browser.open(f"http://{embeds.address}/")
    browser.wait("document.getElementById('key') && document.activeElement.id === 'key'")
    browser.said.clear()
    browser.type("key", "unseen_wrong")
    browser.press("Enter")
    browser.wait("document.getElementById('refused').textContent.includes('token')")
    browser.said.clear()  # the console says that the status was 401
    assert is_narrow(browser)
    browser.type("key", embeds.token)
    browser.press("Enter")
    browser.wait("!document.getElementById('live').hidden && document.getElementById('one')")
    browser.type("one", TEXTS[1])
    browser.type("other", TEXTS[2])
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "go"
    browser.press("Enter")
    browser.wait("document.querySelector('#answer .score')")
    one, other = embeds.session.embed(TEXTS[1:3])
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    assert float(browser.run("document.querySelector('#answer .score').textContent")) == pytest.approx(cosine, abs=2e-3)
    browser.wait("document.getElementById('traffic').textContent.includes('with the query')")
    assert browser.run("document.querySelectorAll('#chart rect').length") >= 1
    assert browser.run("document.querySelectorAll('#learns tbody tr').length") == len(ROWS)
    assert is_narrow(browser)
    assert browser.run("location.href") == f"http://{embeds.address}/"
    assert embeds.token not in browser.run("document.documentElement.outerHTML")
    assert browser.said == []
    asks_the_proxy_alone(browser, embeds)


@pytest.mark.slow
def test_text_streams_into_it(writer: secure.Compiled, browser: Browser) -> None:  # noqa: F811
    with running(writer) as served:
        browser.size(1280, 844)
        browser.open("about:blank")
        browser.open(f"http://{served.address}/#{served.token}")
        browser.wait("document.getElementById('count')")
        assert browser.run("location.href") == f"http://{served.address}/"
        browser.said.clear()
        browser.type("one", "the cat sat")
        browser.run("document.getElementById('count').value = 5")
        browser.run("document.getElementById('go').click()")
        browser.wait("document.getElementById('answer').textContent.includes('in all')")
        reply = served.ask("/v1/completions", {"prompt": "the cat sat", "max_tokens": 5})
        assert browser.run("document.getElementById('written').textContent") == reply.body["choices"][0]["text"]
        assert browser.said == []
        asks_the_proxy_alone(browser, served)


@pytest.mark.slow
def test_the_policy_refuses_scripts_of_others(embeds: ServedProxy, browser: Browser) -> None:
    browser.open(f"http://{embeds.address}/")
    browser.wait("document.getElementById('key')")
    browser.run("window.owned = 0")
    for script in (
        "const s = document.createElement('script'); s.textContent = 'owned=1'; document.body.append(s)",
        "document.body.setAttribute('onclick', 'owned=2'); document.body.click()",
    ):
        browser.run(f"(() => {{ try {{ {script} }} catch {{}} }})()")
    assert browser.run("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
    assert browser.run("window.owned") == 0
