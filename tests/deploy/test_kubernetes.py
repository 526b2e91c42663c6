"""The manifests: valid, rendered for each overlay, and of one mind with the server."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.cli import _make_parser
from service.launch.settings import Settings
from service.launch.sources import load
from service.routes import SERVICE
from tests.deploy.dockerfile import stages
from tests.paths import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu", "platform", "servers")
LABELS = {"app.kubernetes.io/name": "tokenwire"}
FRONT_LABELS = {"app.kubernetes.io/name": "tokenwire-front"}
# Kinds of others, whose shape is checked here: what each has, and what of it must be there.
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "PodMonitor": (
        "monitoring.coreos.com/v1",
        {
            "selector": {"matchLabels": {}},
            "podMetricsEndpoints": [{"port": "", "path": "", "interval": ""}],
        },
    ),
    "InferencePool": (
        "inference.networking.k8s.io/v1",
        {
            "selector": {"matchLabels": {}},
            "targetPorts": [{"number": 0}],
            "endpointPickerRef": {"name": "", "port": {"number": 0}, "failureMode": ""},
        },
    ),
}

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file."""
    return [item for item in yaml.safe_load_all(path.read_text()) if item]


def sources() -> list[Path]:
    """The files with whole objects: not the kustomizations, their patches, and a chart's values."""
    files = {*FOLDER.glob("base/*.yaml"), *FOLDER.glob("components/*/*.yaml")}
    return sorted(path for path in files if path.name != "kustomization.yaml")


@functools.cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay, as kubectl puts them together."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl")
    command = ["kubectl", "kustomize", str(FOLDER / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def validate(item: dict[str, Any]) -> None:
    """Checks an object against the schema of its kind, in which nothing unknown is allowed."""
    if item["kind"] in FOREIGN:
        version, shape = FOREIGN[item["kind"]]
        assert item["apiVersion"] == version
        check_shape(item["spec"], shape, item["kind"])
    else:
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


def check_shape(value: Any, shape: Any, where: str) -> None:
    """The same names at every level, and values of the same types; an empty mapping is any."""
    assert type(value) is type(shape), where
    if isinstance(shape, dict) and shape:
        assert value.keys() == shape.keys(), where
        for name, part in shape.items():
            check_shape(value[name], part, f"{where}.{name}")
    elif isinstance(shape, list):
        for number, part in enumerate(value):
            check_shape(part, shape[0], f"{where}[{number}]")


def one(items: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The only object of a kind."""
    (found,) = (item for item in items if item["kind"] == kind)
    return found


@functools.cache
def base() -> list[dict[str, Any]]:
    """The objects of the base, as they are written."""
    return [item for path in sorted(FOLDER.glob("base/*.yaml")) for item in read(path)]


def pod() -> dict[str, Any]:
    """What the Deployment says of a pod."""
    spec: dict[str, Any] = one(base(), "Deployment")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    """What it says of the only container."""
    (found,) = pod()["containers"]
    return dict(found)


def settings(words: list[str] | None = None, command: str = "serve") -> Settings:
    """The settings of a pod, of a server unless it has other arguments."""
    arguments = vars(_make_parser().parse_args(words or container()["args"]))
    assert arguments.pop("command") == command
    return load(arguments, one(base(), "ConfigMap")["data"])


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)
def test_every_object_is_valid(path: Path) -> None:
    objects = read(path)
    assert objects
    for item in objects:
        validate(item)


def test_an_unknown_name_or_a_wrong_type_is_not_valid() -> None:
    wrong = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "daat": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(wrong)
    monitor = one(read(FOLDER / "components/pod-monitor/pod-monitor.yaml"), "PodMonitor")
    with pytest.raises(AssertionError):
        validate({**monitor, "spec": {**monitor["spec"], "podMetricsEndpoints": [{"port": 8080}]}})


@each_overlay
def test_an_overlay_is_valid_as_a_whole(overlay: str) -> None:
    items = rendered(overlay)
    for item in items:
        validate(item)
    assert {item["metadata"].get("namespace", "tokenwire") for item in items} == {"tokenwire"}
    kinds = {item["kind"] for item in items}
    assert kinds >= {"Deployment", "Service", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"}
    assert kinds >= {"HorizontalPodAutoscaler", "ServiceAccount", "Namespace"}
    assert (FOREIGN.keys() <= kinds) == (overlay == "platform")


@each_overlay
def test_an_overlay_has_the_image_and_the_device(overlay: str) -> None:
    servers = [item for item in rendered(overlay) if item["metadata"]["name"] == "tokenwire"]
    spec = one(servers, "Deployment")["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    on_gpu = overlay != "cpu"
    assert server["image"] == ("tokenwire:cuda" if on_gpu else "tokenwire:cpu")
    assert ("nvidia.com/gpu" in server["resources"]["limits"]) == on_gpu
    added = ["--gateway-port=50052"] if overlay == "servers" else []
    assert server["args"] == [*container()["args"], *added]  # patches replace nothing
    assert server["resources"]["limits"]["memory"] == server["resources"]["requests"]["memory"]


def test_pods_keep_to_the_restricted_standard() -> None:
    """As Kubernetes enforces it in a namespace with this label."""
    enforced = one(base(), "Namespace")["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"
    of_pod, of_container = pod()["securityContext"], container()["securityContext"]
    assert of_pod["runAsNonRoot"] is True
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_container["allowPrivilegeEscalation"] is False
    assert of_container["readOnlyRootFilesystem"] is True
    assert of_container["capabilities"] == {"drop": ["ALL"]}
    allowed = {"configMap", "emptyDir", "secret"}
    assert {kind for item in pod()["volumes"] for kind in item if kind != "name"} <= allowed
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod().keys()


def test_pods_have_the_images_user_and_no_token() -> None:
    user = stages(REPOSITORY / "Dockerfile")["server"].texts("USER")
    of_pod = pod()["securityContext"]
    assert user == [f"{of_pod['runAsUser']}:{of_pod['runAsGroup']}"]
    account = one(base(), "ServiceAccount")
    assert pod()["serviceAccountName"] == account["metadata"]["name"]
    assert pod()["automountServiceAccountToken"] is account["automountServiceAccountToken"] is False


def test_all_that_is_written_to_is_a_volume() -> None:
    volumes = {item["name"]: item for item in pod()["volumes"]}
    mounts = {item["mountPath"]: volumes[item["name"]] for item in container()["volumeMounts"]}
    written = {*stages(REPOSITORY / "Dockerfile")["server"].words("VOLUME"), "/tmp", "/dev/shm"}
    assert {path for path, volume in mounts.items() if "emptyDir" in volume} == written
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert all("sizeLimit" in mounts[path]["emptyDir"] for path in written)


def test_probes_ask_for_the_services_health() -> None:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[name]["grpc"] == {"port": settings().grpc_port, "service": SERVICE}
    assert settings().grpc_tls is None
    assert "health" in settings().api_key_exempt


def test_a_server_that_mends_itself_is_not_killed() -> None:
    """An engine is restarted after ten seconds of silence, and then loads its model."""
    liveness, startup = container()["livenessProbe"], container()["startupProbe"]
    loading = startup["periodSeconds"] * startup["failureThreshold"]
    assert loading >= 600
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= loading
    assert one(base(), "Deployment")["spec"]["progressDeadlineSeconds"] > loading


def test_a_pod_has_time_to_drain() -> None:
    before = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    readiness = container()["readinessProbe"]
    assert before >= readiness["periodSeconds"] * readiness["failureThreshold"]
    ending = 3 * 10  # each of the three processes
    assert pod()["terminationGracePeriodSeconds"] >= before + settings().drain_seconds + ending


def test_ports_are_those_that_the_server_listens_on() -> None:
    ports = {item["name"]: item["containerPort"] for item in container()["ports"]}
    assert ports == {"http": settings().port, "grpc": settings().grpc_port}
    assert (settings().hostname, settings().grpc_host) == ("0.0.0.0", "0.0.0.0")
    for service in (item for item in base() if item["kind"] == "Service"):
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    (ingress,) = one(base(), "NetworkPolicy")["spec"]["ingress"]
    assert {item["port"] for item in ingress["ports"]} == ports.keys()


def test_everything_is_about_these_pods() -> None:
    deployment = one(base(), "Deployment")
    assert deployment["spec"]["template"]["metadata"]["labels"] == LABELS
    assert deployment["spec"]["selector"]["matchLabels"] == LABELS
    assert one(base(), "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == LABELS
    assert one(base(), "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == LABELS
    for service in (item for item in base() if item["kind"] == "Service"):
        assert service["spec"]["selector"] == LABELS
    for path in FOLDER.glob("components/*/*-*.yaml"):
        (item,) = read(path)
        assert item["spec"]["selector"]["matchLabels"] == LABELS


def test_foreign_kinds_name_what_is_there() -> None:
    monitor = one(read(FOLDER / "components/pod-monitor/pod-monitor.yaml"), "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {item["name"] for item in container()["ports"]}
    pool = one(read(FOLDER / "components/inference-pool/inference-pool.yaml"), "InferencePool")
    assert pool["spec"]["targetPorts"] == [{"number": settings().port}]


def test_the_front_finds_the_servers_and_is_the_only_one_to_reach_their_port_for_it() -> None:
    items = read(FOLDER / "components/front/front.yaml")
    named = {(item["kind"], item["metadata"]["name"]): item["spec"] for item in items}
    (kustomization,) = read(FOLDER / "components/front/kustomization.yaml")
    arguments, ports = (it["value"] for it in yaml.safe_load(kustomization["patches"][0]["patch"]))
    server = settings([*container()["args"], arguments])
    assert ports == {"name": "gateway", "containerPort": server.gateway_port}

    pod = named["Deployment", "tokenwire-front"]["template"]
    assert pod["metadata"]["labels"] == FRONT_LABELS
    (envoy,) = pod["spec"]["containers"]
    front = settings(envoy["args"], "envoy")
    gateway_ports = named["Service", "tokenwire-gateway"]
    assert front.service_addresses == (f"tokenwire-gateway:{gateway_ports['ports'][0]['port']}",)
    assert (gateway_ports["clusterIP"], gateway_ports["selector"]) == ("None", LABELS)
    assert gateway_ports["ports"][0]["port"] == server.gateway_port
    assert named["Service", "tokenwire-front"]["selector"] == FRONT_LABELS
    assert envoy["ports"] == [{"name": "http", "containerPort": front.port}]
    assert envoy["readinessProbe"]["grpc"] == {"port": front.port, "service": SERVICE}

    policy = named["NetworkPolicy", "tokenwire-gateway"]
    assert policy["podSelector"]["matchLabels"] == LABELS
    (ingress,) = policy["ingress"]
    assert ingress["from"] == [{"podSelector": {"matchLabels": FRONT_LABELS}}]
    assert ingress["ports"] == [{"protocol": "TCP", "port": "gateway"}]


def test_the_front_is_held_as_the_servers_are() -> None:
    items = read(FOLDER / "components/front/front.yaml")
    spec = one(items, "Deployment")["spec"]["template"]["spec"]
    (envoy,) = spec["containers"]
    same = ("serviceAccountName", "automountServiceAccountToken", "terminationGracePeriodSeconds")
    assert [spec[name] for name in same] == [pod()[name] for name in same]
    assert spec["securityContext"].items() <= pod()["securityContext"].items()
    assert envoy["securityContext"] == container()["securityContext"]
    assert envoy["envFrom"] == container()["envFrom"]
    assert one(items, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == FRONT_LABELS
    memory = envoy["resources"]["limits"]["memory"]
    assert int(memory.removesuffix("Mi")) << 20 > settings().max_gateway_bytes


def test_the_autoscaler_counts_by_a_metric_that_the_server_and_the_adapter_have() -> None:
    autoscaler = one(base(), "HorizontalPodAutoscaler")["spec"]
    deployment = one(base(), "Deployment")
    assert autoscaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # which would undo what the autoscaler did
    (metric,) = (item["pods"]["metric"]["name"] for item in autoscaler["metrics"])
    (adapter,) = read(FOLDER / "prometheus-adapter.yaml")
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["matches"] == metric
    assert rule["seriesQuery"].startswith(f"{metric}{{")
    assert f"`{metric}`" in (REPOSITORY / "docs" / "metrics.md").read_text()


def test_settings_have_one_place() -> None:
    name = one(base(), "ConfigMap")["metadata"]["name"]
    kinds = [next(iter(source)) for source in container()["envFrom"]]
    assert kinds == ["configMapRef", "secretRef"]
    assert container()["envFrom"][0]["configMapRef"]["name"] == name
    assert "env" not in container()
    assert settings().json_output
    assert settings().drain_seconds == Settings().drain_seconds
