"""Which process of which job: as schedulers say it, and what makes no sense."""

import pytest

from tumorjax.cluster import Place, find
from tumorjax.errors import UserError

AUTO = {"coordinator": "auto"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[003-004,007]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}


def test_one_process_needs_no_coordinator():
    assert find({"coordinator": ""}, {}) is None
    assert find({}, SLURM) is None


def test_by_hand():
    settings = {"coordinator": "node1:1234", "num_processes": 2, "process_id": 1}
    assert find(settings, SLURM) == Place("node1:1234", 2, 1)
    assert find(settings | {"coordinator": "[fe80::1]:80"}, {}) == Place("[fe80::1]:80", 2, 1)


def test_skypilot_names_the_machines_and_this_ones_rank():
    variables = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7\n10.0.0.5"}
    assert find(AUTO, variables) == Place("10.0.0.4:8476", 3, 1)
    one = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.4"}
    assert find(AUTO, one) is None


def test_variables_of_a_kubernetes_job():
    variables = {
        "JAX_COORDINATOR_ADDRESS": "study-nodes-0-0.study:1111",
        "JAX_NUM_PROCESSES": "8",
        "JOB_COMPLETION_INDEX": "5",
    }
    assert find(AUTO, variables) == Place("study-nodes-0-0.study:1111", 8, 5)
    assert find(AUTO, variables | {"JAX_PROCESS_ID": "6"}) == Place(
        "study-nodes-0-0.study:1111", 8, 6
    )
    del variables["JOB_COMPLETION_INDEX"]
    with pytest.raises(UserError, match="neither JAX_PROCESS_ID nor JOB_COMPLETION_INDEX"):
        find(AUTO, variables)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-004,007]", "gpu003"),
        ("node001", "node001"),
        ("node001,node007", "node001"),
        ("a[12,14-16],b3", "a12"),
    ],
)
def test_a_slurm_step_has_its_first_node_as_coordinator(nodes, first):
    place = find(AUTO, SLURM | {"SLURM_STEP_NODELIST": nodes})
    # Another port for each job, of 4096: 4097 is the second.
    assert place == Place(f"{first}:61441", 3, 2)


def test_slurm_tasks_that_share_a_machine_take_a_gpu_each():
    several = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_LOCALID": "1"}
    assert find(AUTO, several).local_devices == (1,)
    assert find(AUTO, SLURM).local_devices is None
    assert find(AUTO, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


def test_what_jax_detects_itself(monkeypatch):
    for name, value in (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3"}).items():
        monkeypatch.setenv(name, value)
    # JAX's own reading of the same variables, but for the variable that ours wants.
    ours = find(AUTO)
    monkeypatch.setattr("tumorjax.cluster._slurm", lambda environment: None)
    jax = find(AUTO)
    assert (jax.count, jax.index, jax.local_devices) == (ours.count, ours.index, (0,))
    assert jax.coordinator.partition(":")[0] == ours.coordinator.partition(":")[0] == "gpu003"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (AUTO, "nothing here tells which process this is"),
        ({"coordinator": "node1"}, None),
        ({"coordinator": "node1:port"}, "Expected HOST:PORT"),
        ({"coordinator": "node1:70000"}, "Expected HOST:PORT"),
        ({"coordinator": "http://node1:80"}, "Expected HOST:PORT"),
        ({"coordinator": "a:1", "process_id": 2, "num_processes": 2}, "Expected 0 to 1"),
        ({"coordinator": "a:1", "process_id": -1, "num_processes": 2}, "Expected 0 to 1"),
        ({"coordinator": "a:1", "num_processes": 0}, "num_processes is 0. Expected 1 or more"),
        ({"coordinator": "a:1", "num_processes": "two"}, "'two'. Expected a whole number"),
    ],
)
def test_what_makes_no_sense_is_told(settings, words):
    if words is None:
        assert find(settings, {}) == Place("node1:8476", 1, 0)
        return
    with pytest.raises(UserError, match=words):
        find(settings, {})
