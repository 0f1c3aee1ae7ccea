"""The Kubernetes manifests: valid by the published schemas, and true to the images, the settings and each other."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml

from shared.catalogue import load_catalogue
from shared.settings import PROJECT_ROOT, Settings, variable_of

FOLDER = PROJECT_ROOT / "deploy" / "kubernetes"
#: the oldest and a recent Kubernetes; the files use nothing that is younger
VERSIONS = ("1.30", "1.34")
#: beyond IMAGEFARM_GRACE_SECONDS: uploads, giving jobs back, saying goodbye
BEYOND_GRACE = 25
KNOWN = {variable_of(Settings, field) for field in Settings.model_fields}
DOCKERFILE = (PROJECT_ROOT / "Dockerfile").read_text()


class Document(NamedTuple):
    """One object, and the file it is in."""

    file: str
    body: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def pod(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body["spec"]["template"]["spec"]
        return found

    @property
    def container(self) -> dict[str, Any]:
        (found,) = self.pod["containers"]
        return dict(found)


def documents() -> Iterator[Document]:
    for path in sorted(FOLDER.rglob("*.yaml")):
        for body in yaml.safe_load_all(path.read_text()):
            yield Document(path.relative_to(FOLDER).as_posix(), body)


def of_kind(*kinds: str) -> list[Document]:
    return [document for document in documents() if document.kind in kinds]


def one(kind: str, name: str) -> Document:
    (found,) = [document for document in of_kind(kind) if document.name == name]
    return found


RUNNING = of_kind("Deployment", "Job")
SETTINGS = one("ConfigMap", "imagefarm-settings").body["data"]
SECRETS = {secret.name: secret.body["stringData"] for secret in of_kind("Secret")}


def test_every_part_of_the_farm_is_there() -> None:
    assert sorted((d.kind, d.name) for d in documents() if d.kind not in {"Kustomization", "Secret"}) == [
        ("ConfigMap", "imagefarm-settings"),
        ("Deployment", "api"),
        ("Deployment", "keeper"),
        ("Deployment", "worker"),
        ("Job", "migrate"),
        ("Namespace", "imagefarm"),
        ("PodDisruptionBudget", "api"),
        ("PodDisruptionBudget", "keeper"),
        ("PodDisruptionBudget", "worker"),
        ("ScaledObject", "worker"),
        ("Service", "api"),
        ("TriggerAuthentication", "imagefarm-autoscaler"),
    ]


@pytest.fixture
def schemas() -> Any:
    """The schemas that Kubernetes publishes. Loaded here, so that the other tests run without them."""
    import kubernetes_validate

    return kubernetes_validate


@pytest.mark.parametrize("version", VERSIONS)
def test_the_published_schemas_accept_every_object(schemas: Any, version: str) -> None:
    checked = 0
    for document in documents():
        # those of kustomize and KEDA are not among Kubernetes' own
        if not document.body["apiVersion"].startswith(("kustomize.", "keda.")):
            schemas.validate(document.body, version, strict=True)
            checked += 1
    assert checked == 12


def test_a_wrong_field_would_be_found(schemas: Any) -> None:
    broken = one("Deployment", "api").body
    broken["spec"]["replica"] = 2
    with pytest.raises(schemas.ValidationError):
        schemas.validate(broken, VERSIONS[0], strict=True)


def test_kustomize_takes_every_file_but_the_example() -> None:
    for folder in (FOLDER, FOLDER / "autoscaling"):
        listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
        assert listed["namespace"] == one("Namespace", "imagefarm").name
        there = {path.name for path in folder.glob("*.yaml")}
        assert set(listed["resources"]) == there - {"kustomization.yaml", "secrets.example.yaml"}


@pytest.mark.parametrize("document", RUNNING, ids=lambda document: document.name)
def test_a_pod_runs_an_image_of_ours_as_the_dockerfile_means_it(document: Document) -> None:
    image, command = document.container["image"], document.container["command"]
    target = image.removeprefix("imagefarm-")
    assert f"FROM source AS {target}" in DOCKERFILE
    assert command == ["imagefarm", document.name]
    if document.name == target:
        assert f'CMD ["imagefarm", "{target}"]' in DOCKERFILE
    assert f"--uid {document.pod['securityContext']['runAsUser']} " in DOCKERFILE
    assert document.pod["enableServiceLinks"] is False, "Kubernetes would make up settings that we refuse"


def test_the_images_have_the_version_of_the_project() -> None:
    version = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["images"]
    used = {document.container["image"] for document in RUNNING}
    assert {image["name"]: image["newTag"] for image in images} == dict.fromkeys(used, version)


@pytest.mark.parametrize("document", RUNNING, ids=lambda document: document.name)
def test_a_pod_is_given_settings_that_exist(document: Document) -> None:
    names = {variable["name"] for variable in document.container.get("env", [])}
    for source in document.container["envFrom"]:
        if "configMapRef" in source:
            assert source["configMapRef"]["name"] == "imagefarm-settings"
            names |= SETTINGS.keys()
        else:
            names |= SECRETS[source["secretRef"]["name"]].keys()
    assert names <= KNOWN
    assert {"DATABASE_URL", "REDIS_URL", "STORAGE_URL"} <= names


def test_no_secret_is_baked_in() -> None:
    assert {value for values in SECRETS.values() for value in values.values()} == {""}
    for document in documents():
        if document.kind != "Secret":
            assert not re.search(r"(password|secret_key|access_key)\W*[:=]\s*\S", str(document.body), re.I), document


def test_selectors_find_their_pods() -> None:
    pods = {d.name: d.body["spec"]["template"]["metadata"]["labels"] for d in of_kind("Deployment")}
    for deployment in of_kind("Deployment"):
        assert deployment.body["spec"]["selector"]["matchLabels"] == pods[deployment.name]
    for budget in of_kind("PodDisruptionBudget"):
        assert budget.body["spec"]["selector"]["matchLabels"] == pods[budget.name]
    service = one("Service", "api")
    assert service.body["spec"]["selector"] == pods["api"]


def test_the_api_is_asked_where_it_listens() -> None:
    container = one("Deployment", "api").container
    (port,) = container["ports"]
    listen = {variable["name"]: variable["value"] for variable in container["env"]}["IMAGEFARM_LISTEN"]
    assert listen == f"0.0.0.0:{port['containerPort']}"
    probed = {container[probe]["httpGet"]["path"]: container[probe]["httpGet"]["port"]
              for probe in ("readinessProbe", "livenessProbe")}  # fmt: skip
    assert probed == {"/readyz": port["name"], "/healthz": port["name"]}
    (served,) = one("Service", "api").body["spec"]["ports"]
    assert (served["port"], served["targetPort"]) == (port["containerPort"], port["name"])


def test_a_worker_has_a_gpu_and_time_to_stop() -> None:
    worker = one("Deployment", "worker")
    assert worker.container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker.pod["terminationGracePeriodSeconds"] == int(SETTINGS["IMAGEFARM_GRACE_SECONDS"]) + BEYOND_GRACE
    assert "replicas" not in worker.body["spec"], "to apply the file again must not undo the autoscaler"


def test_compose_gives_a_worker_time_to_stop() -> None:
    compose = yaml.safe_load((PROJECT_ROOT / "docker-compose.yml").read_text())
    grace = Settings.model_fields["grace_seconds"].default
    for name in ("worker-cpu", "worker-gpu"):
        service = compose["services"][name]
        assert "IMAGEFARM_GRACE_SECONDS" not in service["environment"]
        assert int(service["stop_grace_period"].removesuffix("s")) >= grace + BEYOND_GRACE


def test_the_autoscaler_reads_the_queue_of_the_model_that_its_workers_serve() -> None:
    scaled = one("ScaledObject", "worker").body["spec"]
    worker = one("Deployment", scaled["scaleTargetRef"]["name"])
    serves = {variable["name"]: variable["value"] for variable in worker.container["env"]}["IMAGEFARM_WORKER_MODELS"]
    assert serves in load_catalogue(PROJECT_ROOT / "models" / "catalogue.toml")

    (trigger,) = scaled["triggers"]
    url = urlsplit(trigger["metadata"]["url"])
    service, namespace = one("Service", "api"), one("Namespace", "imagefarm")
    assert url.hostname == f"{service.name}.{namespace.name}.svc"
    assert url.port == service.body["spec"]["ports"][0]["port"]
    assert url.path == f"/api/v1/queues/{serves}"
    assert trigger["metadata"]["valueLocation"] == "wanted_workers"
    assert trigger["metadata"]["targetValue"] == "1"

    assert trigger["metadata"]["authMode"] == "bearer"
    authentication = one("TriggerAuthentication", trigger["authenticationRef"]["name"])
    (reference,) = authentication.body["spec"]["secretTargetRef"]
    assert reference["parameter"] == "token"
    assert reference["key"] in SECRETS[reference["name"]]
