"""A hub id is downloaded only when asked to; here from a hub that this test serves on the loopback interface."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from owl2.export.checkpoint.hub import local_checkpoint
from owl2.runtime.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "someone/tiny-owl2"


def handler(folder: Path) -> type[http.server.BaseHTTPRequestHandler]:
    """The routes of the hub that a snapshot needs: the model, the list of its files, and each file."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            extra = ["run_me.py", "pytorch_model.bin", "checkpoint-9/model.safetensors"]
            names = [*(p.name for p in sorted(folder.iterdir())), *extra]
            record: object = None
            if path.startswith(f"/api/models/{MODEL}/tree/"):
                record = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
            elif path.startswith(f"/api/models/{MODEL}/"):
                siblings = [{"rfilename": name} for name in names]
                record = {"id": MODEL, "modelId": MODEL, "sha": COMMIT, "siblings": siblings, "private": False}
            if record is not None:
                content, headers = json.dumps(record).encode(), {"Content-Type": "application/json"}
            elif path.startswith(f"/{MODEL}/resolve/") and (folder / Path(path).name).is_file():
                content = (folder / Path(path).name).read_bytes()
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    return Hub


@pytest.fixture
def hub(golden: Path) -> Iterator[str]:
    """Address of a hub with one model, golden a2."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(golden / "a2_fp16_safetensors" / "model"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def export(hub: str, tmp_path: Path, model: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "owl2.export", model, str(tmp_path / "bundle"), "--download", "--weights", "fp32"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_download_and_export(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    result = export(hub, tmp_path, MODEL)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "bundle" / "owl2.json").is_file()
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert "model-00001-of-00005.safetensors" in fetched
    assert not {"run_me.py", "pytorch_model.bin", "checkpoint-9"} & fetched


@pytest.mark.slow
def test_a_model_the_hub_does_not_have(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    result = export(hub, tmp_path, "someone/else")
    assert result.returncode == 1
    assert "someone/else cannot be downloaded: " in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_nothing_is_downloaded_unasked() -> None:
    with pytest.raises(
        CheckpointError, match="folder someone/tiny-owl2 does not exist; if it is a hub id, add --download"
    ):
        local_checkpoint(MODEL, download=False)


def test_a_path_is_not_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match=r"'/a/b/c' is not a hub id; expected OWNER/MODEL"):
        local_checkpoint("/a/b/c", download=True)
