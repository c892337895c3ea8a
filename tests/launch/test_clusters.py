"""SkyPilot's and xpk's own checks of what they are given, where they are installed.

Both pin versions that do not fit with this program's, so that they live in environments of their
own: have `sky` or `xpk` on the PATH.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKYPILOT = sorted((ROOT / "launch" / "skypilot").glob("*.yaml"))

yaml = pytest.importorskip("yaml")

# Prints what SkyPilot understood; it raises where a key is unknown or a value is none of its.
UNDERSTOOD = """
import json, sys
import sky
from sky.utils import yaml_utils

with open(sys.argv[1]) as file:
    given = yaml_utils.safe_load(file.read())
if len(sys.argv) > 2:
    given["resources"]["use_spots"] = True
task = sky.Task.from_yaml_config(given, env_overrides=[("BUCKET", "my-bucket")])
[resources] = task.resources
print(json.dumps(dict(
    nodes=task.num_nodes,
    accelerators=resources.accelerators,
    spot=resources.use_spot,
    recovery=resources.job_recovery,
    mounts={path: [each.name, each.mode.value] for path, each in task.storage_mounts.items()},
)))
"""


def interpreter(program):
    """The Python that a program was installed for."""
    found = shutil.which(program)
    if not found:
        pytest.skip(f"{program} is missing: install it in an environment of its own")
    with open(found) as file:
        return file.readline().removeprefix("#!").strip()


@pytest.mark.slow
@pytest.mark.parametrize("file", SKYPILOT, ids=lambda path: path.name)
def test_skypilot_takes_the_tasks(file, tmp_path):
    command = [interpreter("sky"), "-c", UNDERSTOOD, str(file)]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr
    understood = json.loads(process.stdout.splitlines()[-1])
    assert understood["spot"] is True
    assert understood["recovery"]["recover_on_exit_codes"] == [75, 69]
    assert understood["mounts"] == {"/runs": ["my-bucket", "MOUNT"]}
    expected = {
        "study_tpu.yaml": (1, {"tpu-v5litepod-256": 1}),
        "study_gpu.yaml": (2, {"H100": 8}),
    }
    assert (understood["nodes"], understood["accelerators"]) == expected[file.name]
    process = subprocess.run(
        [*command, "misspelt"], cwd=ROOT, env=environment, capture_output=True, timeout=200
    )
    assert process.returncode != 0, "a key that there is not"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_xpk_makes_the_same_of_it_as_the_manifest(kind, tmp_path):
    bin_folder = Path(interpreter("xpk")).parent
    made = tmp_path / "made.yaml"
    variables = {
        "PROJECT": "my-project",
        "ZONE": "us-west4-a",
        "CLUSTER": "my-cluster",
        "IMAGE": "tumorjax:tpu",
        "BUCKET": "my-bucket",
        "HOME": str(tmp_path),
        "PATH": f"{bin_folder}:/usr/bin:/bin:/usr/local/bin",
    }
    subprocess.run(
        [
            "launch/gke/xpk.sh",
            kind,
            "--dry-run",
            "--skip-validation",
            f"--output-manifest-file={made}",
        ],
        cwd=ROOT,
        env=variables,
        check=True,
        capture_output=True,
        timeout=300,
    )
    text = (ROOT / "launch" / "gke" / f"study_{kind}.yaml").read_text()
    ours = yaml.safe_load(re.sub(r"\$\{SLICES\}", "1", text))["spec"]["replicatedJobs"][0]
    theirs = yaml.safe_load(made.read_text())["spec"]
    assert theirs["failurePolicy"]["maxRestarts"] == 20
    job = theirs["replicatedJobs"][0]
    assert job["replicas"] == 1
    for key in ("parallelism", "completions", "backoffLimit"):
        assert job["template"]["spec"][key] == ours["template"]["spec"][key], key
    pods = [each["template"]["spec"]["template"]["spec"] for each in (job, ours)]
    assert pods[0]["terminationGracePeriodSeconds"] == pods[1]["terminationGracePeriodSeconds"]
    limits = [pod["containers"][0]["resources"]["limits"] for pod in pods]
    assert limits[0] == limits[1]
    if kind == "tpu":
        selected = pods[1]["nodeSelector"]
        assert selected.items() <= pods[0]["nodeSelector"].items()
    [rule] = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {69, 75} <= set(rule["onExitCodes"]["values"]), "codes that it starts again after"
    assert not {2, 3} & set(rule["onExitCodes"]["values"])
