"""`deploy/llm-d.yaml`: what the router is told to read is there, and pods are let go as the server drains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from dsv4.api.app import MONITORING, OPEN_PATHS
from dsv4.cli import build_parser
from dsv4.config import EngineConfig
from dsv4.engine.async_engine import AsyncEngine
from prometheus_client.parser import text_string_to_metric_families

from tests.support.scripted import scripted
from tests.support.serving import running

FILE = Path(__file__).parents[1] / "deploy" / "llm-d.yaml"
ALL = {document["kind"]: document for document in yaml.safe_load_all(FILE.read_text())}
TEMPLATE = ALL["Deployment"]["spec"]["template"]
POD = TEMPLATE["spec"]
(CONTAINER,) = POD["containers"]
ROUTER = yaml.safe_load(ALL["ConfigMap"]["data"]["config.yaml"])


def parameters(plugin: str) -> dict[str, Any]:
    (found,) = (p["parameters"] for p in ROUTER["plugins"] if p["type"] == plugin)
    return dict(found)


@pytest.fixture(scope="module")
def settings() -> Any:
    """What the command line of the container makes of its arguments."""
    return build_parser().parse_args(CONTAINER["args"])


def test_the_router_reads_metrics_that_there_are() -> None:
    (engine,) = parameters("core-metrics-extractor")["engineConfigs"]
    assert engine.pop("name") == TEMPLATE["metadata"]["labels"]["llm-d.ai/engine-type"]
    labels = {engine.pop(f"cache{what}LabelName") for what in ("BlockSize", "NumBlocks")}
    with scripted():
        started = AsyncEngine.from_config(EngineConfig(num_pages=64, block_size=128, max_num_seqs=2))
        with running(started) as server:
            text = httpx.get(server.url + "/metrics").text
    samples = {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}
    assert set(engine) == {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec", "cacheInfoSpec"}
    for name in engine.values():
        assert name in samples, name
    told = samples[engine["cacheInfoSpec"]].labels
    assert {told[label] for label in labels} == {"128", "64"}


def test_the_router_and_the_events_agree(settings: Any) -> None:
    events = json.loads(CONTAINER["args"][CONTAINER["args"].index("--kv-events-config") + 1])
    topic, address, model = events["topic"].split("@")
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    reader = parameters("precise-prefix-cache-producer")
    assert topic + "@" == reader["kvEventsConfig"]["topicFilter"]
    assert address == f"$(POD_IP):{ports['http']}" and CONTAINER["env"][0]["name"] == "POD_IP"
    assert model == TEMPLATE["metadata"]["labels"]["llm-d.ai/model"]
    assert f"--served-model-name={model}" in CONTAINER["args"]
    assert parameters("token-producer")["modelName"] == model
    assert events["endpoint"].endswith(f":{ports['kv-events']}")
    assert events["replay_endpoint"].endswith(f":{ports['kv-replay']}")
    assert reader["kvEventsConfig"]["podDiscoveryConfig"]["socketPort"] == ports["kv-events"]
    assert reader["tokenProcessorConfig"]["blockSize"] == int(settings.block_size)
    installed = (FILE.parent / "Containerfile").read_text().count('/wheels/*.whl)[events]"')
    assert installed == 2  # else the image cannot tell of blocks
    known = {plugin["type"] for plugin in ROUTER["plugins"]}
    assert {p["pluginRef"] for profile in ROUTER["schedulingProfiles"] for p in profile["plugins"]} <= known


def test_a_pod_is_let_go_when_nobody_asks_it_any_more(settings: Any) -> None:
    delay, timeout = float(settings.drain_delay), float(settings.drain_timeout)
    ready = CONTAINER["readinessProbe"]
    assert delay >= 2 * ready["failureThreshold"] * ready["periodSeconds"] + ready["timeoutSeconds"]
    assert POD["terminationGracePeriodSeconds"] > delay + timeout + 40  # and the step at hand
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert "/health" in OPEN_PATHS
    alive = CONTAINER["livenessProbe"]
    assert alive["periodSeconds"] * alive["failureThreshold"] > delay + timeout  # which is 503 too


def test_it_runs_as_an_ordinary_user_that_writes_only_where_it_must() -> None:
    assert POD["securityContext"]["runAsNonRoot"] and POD["securityContext"]["runAsUser"] == 10001
    own = CONTAINER["securityContext"]
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    writable = {m["mountPath"] for m in CONTAINER["volumeMounts"] if not m.get("readOnly")}
    assert writable == {"/var/cache/dsv4", "/tmp", "/dev/shm"}
    assert {m["name"] for m in CONTAINER["volumeMounts"]} == {v["name"] for v in POD["volumes"]}


def test_pool_and_route_lead_to_the_pods() -> None:
    pool, (rule,) = ALL["InferencePool"]["spec"], ALL["HTTPRoute"]["spec"]["rules"]
    assert pool["selector"]["matchLabels"].items() <= TEMPLATE["metadata"]["labels"].items()
    assert pool["targetPorts"] == [{"number": 8000}]
    assert rule["backendRefs"][0]["name"] == ALL["InferencePool"]["metadata"]["name"]
    outside = [match["path"]["value"] for match in rule["matches"]]
    assert not [path for path in (*MONITORING, "/admin") if path.startswith(tuple(outside))]
