"""Manifests for Kubernetes: against its schemas, and against each other."""

import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GKE = ROOT / "launch" / "gke"
VALUES = {"PROJECT": "my-project", "BUCKET": "my-bucket", "IMAGE": "tumorjax:tpu", "SLICES": "2"}
STUDIES = ("study_tpu.yaml", "study_gpu.yaml")
VERSIONS = ("1.32.0", "1.37.0")  # GKE's oldest that is served, and the newest that is known

yaml = pytest.importorskip("yaml")
kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")


def documents(name):
    """The manifests of a file, with variables filled in as envsubst does."""
    text = re.sub(r"\$\{(\w+)\}", lambda match: VALUES[match[1]], (GKE / name).read_text())
    return [document for document in yaml.safe_load_all(text) if document]


def everything():
    return [
        (path.name, each) for path in sorted(GKE.glob("*.yaml")) for each in documents(path.name)
    ]


def check_custom(manifest):
    schemas = json.loads((ROOT / "tests/launch/custom_resources.json").read_text())
    jsonschema.validate(manifest, schemas[manifest["kind"]])


def check(manifest):
    """Raises what is wrong with a manifest."""
    if "x-k8s.io" not in manifest["apiVersion"]:
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
        return
    check_custom(manifest)
    for job in manifest["spec"].get("replicatedJobs", ()):
        template = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
        for version in VERSIONS:
            kubernetes_validate.validate(template | job["template"], version, strict=True)


@pytest.mark.parametrize(("name", "manifest"), everything())
def test_manifests_are_what_the_api_takes(name, manifest):
    check(manifest)


def of(manifest, *path):
    for key in path:
        manifest = manifest[key]
    return manifest


POD = ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec")


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("spec", "failurePolicy"), "maxRestart", 3),
        (("spec", "failurePolicy", "rules", 0), "action", "Restart"),
        (("spec", "replicatedJobs", 0, "template", "spec"), "paralelism", 8),
        (POD, "terminationGracePeriod", 30),
        ((*POD, "containers", 0), "env", [{"nam": "A"}]),
    ],
)
def test_the_check_finds_what_is_misspelt(path, key, value):
    manifest = documents("study_gpu.yaml")[0]
    check(manifest)
    of(manifest, *path)[key] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


@pytest.mark.parametrize("name", STUDIES)
def test_job_sets_are_those_of_the_published_models(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = documents(name)[0]
    spec = models.JobsetV1alpha2JobSetSpec.from_dict(manifest["spec"])
    # The models drop what they do not know.
    assert quantities(spec.to_dict()) == quantities(manifest["spec"])


def quantities(value):
    """Numbers as the models have them."""
    if isinstance(value, dict):
        return {key: quantities(each) for key, each in value.items()}
    if isinstance(value, list):
        return [quantities(each) for each in value]
    return float(value) if isinstance(value, int) else value


@pytest.mark.parametrize("name", STUDIES)
def test_exit_codes_have_their_consequences(name):
    [manifest] = documents(name)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    containers = {container["name"] for container in of(manifest, *POD)["containers"]}
    actions = {}
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes:
            assert codes["containerName"] in containers
            assert codes["operator"] == "In"
            assert codes["values"] == sorted(set(codes["values"])), "the API wants them in order"
            actions |= dict.fromkeys(codes["values"], rule["action"])
    # Told to stop: goes on in place. Wrong use and defects: the end. The rest: all anew.
    assert actions == {75: "Ignore", 2: "FailJob", 3: "FailJob"}
    assert job["backoffLimit"] == 0
    [rule] = manifest["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert of(manifest, *POD)["restartPolicy"] == "Never", "a podFailurePolicy needs it"


@pytest.mark.parametrize("name", STUDIES)
def test_grace_suffices_to_save(name):
    [manifest] = documents(name)
    pod = of(manifest, *POD)
    [argument] = [a for a in pod["containers"][0]["args"] if "grace_seconds" in a]
    assert float(argument.split("=")[1]) < pod["terminationGracePeriodSeconds"]


def test_a_tpu_slice_has_as_many_chips_as_its_topology():
    [manifest] = documents("study_tpu.yaml")
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = of(manifest, *POD)
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * chips == math.prod(int(side) for side in topology.split("x"))


def test_gpu_pods_know_how_many_they_are_and_where_the_first_is():
    [manifest] = documents("study_gpu.yaml")
    replicated = manifest["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    variables = {each["name"]: each["value"] for each in of(manifest, *POD)["containers"][0]["env"]}
    assert job["parallelism"] == job["completions"] == int(variables["JAX_NUM_PROCESSES"])
    assert job["completionMode"] == "Indexed", "Kubernetes sets JOB_COMPLETION_INDEX for it"
    names = (manifest["metadata"]["name"], replicated["name"])
    host = variables["JAX_COORDINATOR_ADDRESS"].rsplit(":", 1)[0]
    assert host == f"{names[0]}-{names[1]}-0-0.{manifest['spec']['network']['subdomain']}"


@pytest.mark.parametrize("name", STUDIES)
def test_the_queue_can_admit_the_studies(name):
    [manifest] = documents(name)
    kinds = {each["kind"]: each for each in documents("queue.yaml")}
    local, cluster = kinds["LocalQueue"], kinds["ClusterQueue"]
    queue = manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert queue == local["metadata"]["name"]
    assert manifest["metadata"]["namespace"] == local["metadata"]["namespace"]
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    labels = {
        each["metadata"]["name"]: each["spec"]["nodeLabels"]
        for each in documents("queue.yaml")
        if each["kind"] == "ResourceFlavor"
    }
    pod = of(manifest, *POD)
    replicated = manifest["spec"]["replicatedJobs"][0]
    pods = replicated["replicas"] * replicated["template"]["spec"]["parallelism"]
    for resource, count in pod["containers"][0]["resources"]["requests"].items():
        [flavor] = [
            flavor
            for group in cluster["spec"]["resourceGroups"]
            if resource in group["coveredResources"]
            for flavor in group["flavors"]
        ]
        [quota] = [each["nominalQuota"] for each in flavor["resources"] if each["name"] == resource]
        assert count * pods <= quota
        assert labels[flavor["name"]].items() <= pod["nodeSelector"].items()


@pytest.mark.parametrize("name", STUDIES)
def test_volumes_and_accounts_are_there(name):
    [manifest] = documents(name)
    pod = of(manifest, *POD)
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    [workdir] = [a for a in pod["containers"][0]["args"] if a.startswith("--workdir=")]
    assert workdir.removeprefix("--workdir=").startswith(mounts["runs"] + "/")
    for file in ("workdir_filestore.yaml", "workdir_bucket.yaml"):
        made = {each["metadata"]["name"]: each for each in documents(file)}
        assert claims <= set(made)
        assert all(
            each["metadata"].get("namespace", "default") == "default" for each in made.values()
        )
    [account] = documents("account.yaml")
    assert account["metadata"]["name"] == pod["serviceAccountName"]
