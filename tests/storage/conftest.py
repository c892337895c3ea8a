"""Storage servers on this machine, and buckets in them, for tests of gs:// and s3://."""

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid

import pytest

from tests.storage.fault_proxy import FaultProxy
from tests.storage.gcs_server import GcsServer

BUCKET = "tumour-studies"


@pytest.fixture(scope="session")
def s3_server():
    """The URL of moto's S3 server; it has an environment of its own (`MOTO_SERVER`, or PATH)."""
    program = os.environ.get("MOTO_SERVER") or shutil.which("moto_server")
    if not program:
        pytest.skip("no moto_server on PATH; see CONTRIBUTING.md")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], **quiet)
    try:
        request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(request, timeout=10).close()
                break
            except urllib.error.URLError:
                assert process.poll() is None, "moto_server ended at once"
                assert time.monotonic() < deadline, "moto_server does not answer"
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def gcs_server():
    with GcsServer(BUCKET) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_proxy(gcs_server):
    """tensorstore asks once in a process where Google is; so all of it goes through one proxy."""
    with FaultProxy(gcs_server.url) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")
        yield proxy


@pytest.fixture(scope="session")
def s3_proxy(s3_server):
    with FaultProxy(s3_server) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield proxy


@pytest.fixture(params=["gs", "s3"])
def proxy(request):
    """The proxy in front of a server; without faults unless a test asks for some."""
    proxy = request.getfixturevalue({"gs": "gcs_proxy", "s3": "s3_proxy"}[request.param])
    proxy.scheme = request.param
    proxy.script, proxy.rate, proxy.count = [], 0.0, {}
    proxy.matches = lambda method, path: True
    yield proxy
    proxy.script, proxy.rate = [], 0.0


@pytest.fixture
def bucket(proxy):
    """A URL of its own for each test."""
    return f"{proxy.scheme}://{BUCKET}/{uuid.uuid4().hex[:8]}"
