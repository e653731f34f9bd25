"""The files of ``examples/deploy``: they fit their schemas, one another and the commands that they run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from parties.cli import main
from parties.cli.config import PREFIX, known_settings
from parties.net.secret_files import check_private, read_public, read_secret
from parties.services.draining import DRAIN
from parties.two_party.sealing import SealingKey
from secure.errors import InvalidInput

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "examples" / "deploy"
COMPOSE = sorted(DEPLOY.glob("compose*.yaml"))
SITES = sorted(path.parent for path in DEPLOY.glob("kubernetes/*/kustomization.yaml"))
MANIFESTS = sorted(path for path in DEPLOY.glob("kubernetes/*/*.yaml") if path.name != "kustomization.yaml")
RUNNING = int(DRAIN)  # seconds that running queries get after SIGTERM
PORTS = {"serve": 50051, "dealer": 50052, "proxy": 8080}
NUMBERS = 9464  # the port of --metrics
STAYS = "127.0.0.1"  # where a proxy listens


def name_of(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def manifests(site: Path) -> dict[str, dict[str, Any]]:
    """The manifests of a site by their kinds."""
    found = [read(site / name) for name in read(site / "kustomization.yaml")["resources"]]
    return {each["kind"]: each for each in found}


def test_there_is_something_to_check() -> None:
    assert len(COMPOSE) == 3
    assert len(SITES) == 2
    assert len(MANIFESTS) == 10


# schemas


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_manifests_fit_the_schemas_of_kubernetes(path: Path, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(read(path), version, strict=True)


def test_a_mistake_in_a_manifest_is_found() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    found = manifests(DEPLOY / "kubernetes" / "server")["Deployment"]
    found["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(validate.ValidationError, match="terminationGracePeriod"):
        validate.validate(found, "1.37", strict=True)


@pytest.mark.parametrize("path", COMPOSE, ids=name_of)
def test_compose_files_fit_the_schema_of_compose(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "tests" / "schemas" / "compose-spec.json").read_text())
    checking = jsonschema.Draft7Validator(schema)
    assert [error.message for error in checking.iter_errors(read(path))] == []
    wrong = read(path)
    wrong["services"][next(iter(wrong["services"]))]["read-only"] = True
    assert any("read-only" in error.message for error in checking.iter_errors(wrong))


@pytest.mark.parametrize("site", SITES, ids=name_of)
def test_every_manifest_is_in_its_kustomization(site: Path) -> None:
    found = read(site / "kustomization.yaml")
    assert sorted(found["resources"]) == sorted(p.name for p in site.glob("*.yaml") if p.name != "kustomization.yaml")
    assert found["namespace"] == manifests(site)["Namespace"]["metadata"]["name"]
    assert len(manifests(site)) == len(found["resources"])


# commands


def compose_services() -> Iterator[tuple[Path, str, dict[str, Any]]]:
    for path in COMPOSE:
        for name, service in read(path)["services"].items():
            if "extends" not in service:
                yield path, name, service


def command_lines() -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(where, arguments of unseen, environment): every command that the files run."""
    for path, name, service in compose_services():
        if service["image"].startswith("unseen") and "entrypoint" not in service:
            yield f"{path.name}: {name}", service["command"], service.get("environment", {})
    for site in SITES:
        found = manifests(site)
        for container in found["Deployment"]["spec"]["template"]["spec"]["containers"]:
            environment = found["ConfigMap"]["data"] if container.get("envFrom") else {}
            yield f"{site.name}: {container['name']}", container["args"], environment


LINES, SERVICES = list(command_lines()), list(compose_services())


def plain(text: str) -> str:
    """A text of Compose with its variables at their defaults."""
    return re.sub(r"\$\{\w+(?::-([^}]*))?[^}]*\}", lambda found: found[1] or "", text)


@pytest.mark.parametrize(("where", "arguments", "environment"), LINES, ids=[where for where, *_ in LINES])
def test_every_command_is_one_of_unseen(where: str, arguments: list[str], environment: dict[str, str]) -> None:
    verb, *rest = map(plain, arguments)
    commands: Any = typer.main.get_command(main.app())
    command = commands.commands[verb]
    with command.make_context(verb, rest) as context:
        given = dict(context.params)
    if verb in PORTS:
        assert given["listen"] == f"{STAYS if verb == 'proxy' else '0.0.0.0'}:{PORTS[verb]}"
        assert given["tls"] is not None
        assert verb == "proxy" or given["state"] is not None
    known = known_settings(command)
    for name in environment.keys() - {"XDG_CACHE_HOME"}:
        key = name.removeprefix(f"{PREFIX}_").lower().replace("_", "-")
        assert key in known, f"{where} sets {name}"


def test_an_unknown_option_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --drian"):
        test_every_command_is_one_of_unseen("x", ["serve", "m", "--drian", "3"], {})
    with pytest.raises(AssertionError, match="UNSEEN_DAELER"):
        test_every_command_is_one_of_unseen(
            "x", ["serve", "m", "--listen", "0.0.0.0:50051", "--tls", "t", "--state", "s"], {"UNSEEN_DAELER": "a:1"}
        )


# Kubernetes


@pytest.mark.parametrize("site", SITES, ids=name_of)
def test_pods_are_closed(site: Path) -> None:
    pod = manifests(site)["Deployment"]["spec"]["template"]["spec"]
    assert manifests(site)["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for kind in ("requests", "limits"):
            assert set(container["resources"][kind]) == {"cpu", "memory"}
    for container in pod["containers"]:
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        for mount in container["volumeMounts"]:
            assert mount["mountPath"] == "/tmp" or mount["readOnly"] is True


@pytest.mark.parametrize("site", SITES, ids=name_of)
def test_names_and_ports_agree(site: Path) -> None:
    found = manifests(site)
    spec = found["Deployment"]["spec"]
    pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == found["Service"]["spec"]["selector"] == labels
    if "PodDisruptionBudget" in found:
        budget = found["PodDisruptionBudget"]["spec"]
        assert budget["selector"]["matchLabels"] == labels
        assert budget["minAvailable"] < spec["replicas"]
    (container,) = pod["containers"]
    (name, port), health = ((p["name"], p["containerPort"]) for p in container["ports"])
    assert health == ("health", NUMBERS)
    assert container["args"][container["args"].index("--metrics") + 1] == f"0.0.0.0:{NUMBERS}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": health[0]}
    alive = container["livenessProbe"]
    assert alive["periodSeconds"] * alive["failureThreshold"] > RUNNING  # a service that drains answers 503
    assert port == PORTS[container["args"][0]]
    ((service, target),) = ((p["port"], p["targetPort"]) for p in found["Service"]["spec"]["ports"])
    assert (service, target) == (port, name)
    assert found["NetworkPolicy"]["spec"]["ingress"] == [{"ports": [{"port": port, "protocol": "TCP"}]}]
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounted = {m["name"] for c in (*pod["initContainers"], *pod["containers"]) for m in c["volumeMounts"]}
    assert volumes == mounted
    for secret in (volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume):
        assert secret in (site / "deployment.yaml").read_text().partition("apiVersion")[0]  # told at its head
        assert f"create secret generic {secret} " in (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.parametrize("site", SITES, ids=name_of)
def test_the_end_is_waited_for(site: Path) -> None:
    pod = manifests(site)["Deployment"]["spec"]["template"]["spec"]
    for container in pod["containers"]:
        pause = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        assert pod["terminationGracePeriodSeconds"] > RUNNING + int(pause[1])


def test_servers_reach_the_dealer_and_a_name_server_alone() -> None:
    server, dealer = (manifests(DEPLOY / "kubernetes" / name) for name in ("server", "dealer"))
    egress = server["NetworkPolicy"]["spec"]["egress"]
    assert [{p["port"] for p in rule["ports"]} for rule in egress] == [{PORTS["dealer"]}, {53}]
    assert server["ConfigMap"]["data"]["UNSEEN_DEALER"].endswith(f":{PORTS['dealer']}")
    assert dealer["NetworkPolicy"]["spec"]["egress"] == []
    assert server["Namespace"] != dealer["Namespace"]


@pytest.mark.parametrize("site", SITES, ids=name_of)
def test_secrets_are_copied_to_where_they_can_be_read(site: Path, tmp_path: Path) -> None:
    """As Kubernetes mounts them: links into a directory of another name, which unseen does not read from."""
    pod = manifests(site)["Deployment"]["spec"]["template"]["spec"]
    (init,) = pod["initContainers"]
    files = {
        "tls": ["cert.pem", "key.pem"],
        "mask": ["weight-mask-1.seed"],
        "tokens": ["tokens"],
        "key": ["dealer.key"],
    }
    for mount in init["volumeMounts"]:
        for name in files.get(mount["name"], []):
            volume = tmp_path / mount["mountPath"].lstrip("/")
            (volume / "..data").mkdir(parents=True, exist_ok=True)
            (volume / "..data" / name).write_text(name)
            (volume / "..data" / name).chmod(0o440)
            (volume / name).symlink_to(volume / "..data" / name)
            with pytest.raises(InvalidInput):
                read_secret(volume / name)
    (tmp_path / "copied").mkdir(mode=0o777)
    script = re.sub(r"/(secrets|copied)/", rf"{tmp_path}/\1/", init["command"][-1])
    subprocess.run([*init["command"][:-1], script], check=True, umask=0)
    (container,) = pod["containers"]
    for mount in container["volumeMounts"]:
        if "subPath" not in mount:
            continue
        copied = tmp_path / "mounted" / mount["subPath"]  # a subPath is mounted without what is above it
        copied.parent.mkdir(exist_ok=True, mode=0o755)
        shutil.move(tmp_path / "copied" / mount["subPath"], copied)
        check_private(copied)
        held = list(copied.iterdir())
        assert held
        for path in held:
            assert read_secret(path) == read_public(path) == path.name.encode()


def test_a_dealer_starts_on_a_state_directory_that_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key is there, and so is dealer.pub, closed to others as everything that the init container copies."""
    made = SealingKey.load(tmp_path)
    (tmp_path / "dealer.pub").chmod(0o600)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "chmod", refused)
    monkeypatch.setattr("parties.two_party.sealing.store", refused)
    assert SealingKey.load(tmp_path).public.fingerprint == made.public.fingerprint


def test_no_secret_is_in_the_repository() -> None:
    assert not [path for path in MANIFESTS if read(path)["kind"] == "Secret"]
    assert not [path for path in DEPLOY.rglob("*") if path.suffix in (".pem", ".key", ".seed")]


# Compose


@pytest.mark.parametrize(("path", "name", "service"), SERVICES, ids=[name for _, name, _ in SERVICES])
def test_containers_are_closed(path: Path, name: str, service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if service["image"].startswith("unseen"):
        assert service["user"].startswith("${UNSEEN_UID:?")
    if "restart" in service:
        assert service["deploy"]["resources"]["limits"]
    if service.get("command", [""])[0] in PORTS:
        port = PORTS[service["command"][0]]
        numbers = f"127.0.0.1:{NUMBERS}"
        if service["command"][0] != "proxy":  # which has it at its own port
            assert service["command"][service["command"].index("--metrics") + 1] == numbers
            port = NUMBERS
        assert f"http://127.0.0.1:{port}/healthz" in service["healthcheck"]["test"][-1]
        assert int(service["stop_grace_period"].removesuffix("s")) > RUNNING


def test_servers_share_what_makes_them_one() -> None:
    services = read(DEPLOY / "compose.yaml")["services"]
    one, two = services["server-1"], services["server-2"]
    assert one == two
    mounted = dict(volume.split(":")[:2] for volume in one["volumes"])
    assert set(mounted) == {"./compiled", "./tls/server", "./state/server"}
    compiling = services["compile"]
    assert compiling["command"][2] == "/secure/made/compiled"
    assert "./:/secure/made" in compiling["volumes"]
    for inside in one["command"]:
        if inside.startswith("/"):
            assert inside in mounted.values()
    assert services["dealer"]["profiles"] == ["trial"]  # never in the same hands otherwise


def test_nobody_but_its_program_reaches_the_proxy() -> None:
    services = read(DEPLOY / "compose.client.yaml")["services"]
    proxy, ask = services["proxy"], services["ask"]
    assert "ports" not in proxy
    assert "--unencrypted-beyond-loopback" not in proxy["command"]
    assert ask["network_mode"] == "service:proxy"
    assert ask["command"][0] == f"http://{STAYS}:{PORTS['proxy']}/v1"
    assert ask["command"][1] == proxy["command"][proxy["command"].index("--api-key-file") + 1]
    assert (DEPLOY / ask["entrypoint"][1].lstrip("/")).is_file()


def test_the_balancer_finds_its_servers() -> None:
    services, text = read(DEPLOY / "compose.yaml")["services"], (DEPLOY / "haproxy.cfg").read_text()
    balancer = services["balancer"]
    assert set(re.findall(r'"\$\{(\w+)\}"', text)) == set(balancer["environment"])
    for name in ("server-1", "server-2"):
        assert f"{name}:{PORTS['serve']}" in balancer["environment"].values()
        assert name in services
    assert balancer["ports"] == [f"{PORTS['serve']}:{PORTS['serve']}"]
    assert balancer["environment"]["UNSEEN_BIND"] == f"*:{PORTS['serve']}"


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")
def test_haproxy_reads_its_configuration() -> None:
    environment = {"UNSEEN_BIND": "127.0.0.1:1", "UNSEEN_SERVER_1": "127.0.0.1:2", "UNSEEN_SERVER_2": "127.0.0.1:3"}
    found = subprocess.run(
        ["haproxy", "-c", "-f", str(DEPLOY / "haproxy.cfg")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "WARNING" not in found.stderr


# images


def test_images_run_as_an_ordinary_user() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"(?m)^USER (.*)$", text) == ["10001:10001"]
    for path in re.findall(r"(?m)^COPY (?!--)(.+) \S+$", text):
        assert all((ROOT / each).exists() for each in path.split())
    extras = re.search(r'ARG EXTRAS="([\w,]+)"', text)
    assert extras is not None
    for extra in extras[1].split(","):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    # kernels are compiled before the user changes, into a directory of root's that is read and never written
    kernels = re.search(r"NUMBA_CACHE_DIR=(\S+)", text)
    assert kernels is not None
    assert kernels[1].startswith("/opt/unseen/")
    assert text.index("ENV ") < text.index("RUN python -P -m protocols.warm") < text.index("USER ")
    server = (DEPLOY / "Dockerfile.server").read_text()
    assert "\nCOPY --chown=10001:10001 --chmod=0700 compiled /compiled\n" in server
    assert "\nRUN chmod 0700 /compiled\n" in server
