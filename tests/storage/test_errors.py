"""What a user can mend about a bucket is told in one line, at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.storage.gcs_server import GcsServer
from tumorjax.errors import UserError
from tumorjax.key_values import clear_errors, insist

ROOT = Path(__file__).resolve().parents[2]


def job(url, **environment):
    """Runs a job on a workdir; returns its exit code and its one line."""
    command = [sys.executable, "-m", "tumorjax.main", "--config=configs/laws.py"]
    command += [f"--workdir={url}", "--config.results=none.csv"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | environment
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("tumorjax:")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.returncode, lines[0]


def test_an_unknown_bucket(proxy):
    url, before = f"{proxy.scheme}://no-such-bucket/study", proxy.requests
    code, line = job(url, **{k: v for k, v in os.environ.items() if "AWS" in k})
    assert code == 2
    assert f"{url}/.writable: there is no bucket {proxy.scheme}://no-such-bucket" in line
    assert "Make it, or correct the URL" in line
    assert proxy.requests - before <= 2  # at once, without asking again and again


def test_expired_credentials_of_google():
    with GcsServer("bucket", token="new") as server:
        code, line = job(
            "gs://bucket/study",
            STORAGE_EMULATOR_HOST=server.url,
            TENSORSTORE_GCS_HTTP_URL=server.url,
            GOOGLE_AUTH_TOKEN_FOR_TESTING="old",
        )
    assert code == 2
    assert "gs://bucket/study/.writable: access was refused" in line
    assert "gcloud auth application-default login" in line
    assert server.requests <= 2


def test_expired_credentials_of_amazon(s3_proxy):
    s3_proxy.matches, s3_proxy.script = lambda method, path: True, ["expired"] * 10
    url = "s3://tumour-studies/study"
    code, line = job(url, **{k: v for k, v in os.environ.items() if "AWS" in k})
    assert len(s3_proxy.script) >= 8  # told at once, without asking again and again
    s3_proxy.script = []
    assert code == 2
    assert f"{url}/.writable: access was refused" in line
    assert "expired" in line


def test_a_server_that_hangs_is_asked_again(s3_proxy):
    """In a process of its own, since curl's patience is set once in a process."""
    s3_proxy.matches, s3_proxy.script = lambda method, path: True, ["hang"]
    code = "from tumorjax.buckets import BucketPath as P; p = P('s3://tumour-studies/hangs');"
    code += "p.write_bytes(b'1'); print(p.read_bytes())"
    ours = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | ours, capture_output=True
    )
    assert done.stdout == b"b'1'\n", done.stderr
    assert s3_proxy.count["hang"] == 1
    assert time.monotonic() - started < 25


def test_missing_credentials_of_amazon(s3_proxy):
    code, line = job(
        "s3://tumour-studies/study",
        AWS_ENDPOINT_URL=s3_proxy.url,
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE="/nonexistent",
        AWS_SHARED_CREDENTIALS_FILE="/nonexistent",
    )
    assert code == 2
    assert "access was refused" in line
    assert "AWS_ACCESS_KEY_ID" in line


def test_what_never_ends_is_asked_again_and_then_told():
    asked = []

    class Silent:
        def result(self, timeout):
            asked.append(timeout)
            if len(asked) < 3:
                raise TimeoutError
            return "there"

    assert insist(Silent, 7) == "there"
    assert asked == [7, 7, 7]

    class Never:
        def result(self, timeout):
            raise TimeoutError

    with (
        pytest.raises(UserError, match="gs://b/x: the server does not answer"),
        clear_errors("gs://b/x"),
    ):
        insist(Never, 7)
