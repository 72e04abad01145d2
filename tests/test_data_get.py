"""`pgolf data get` against a server on loopback that speaks as much of the hub's protocol as a download needs."""

import hashlib
import http.server
import json
import threading

import numpy as np
import pytest

pytest.importorskip("huggingface_hub", reason="the [data] extra is not installed")

from pgolf_fast import data_get, shards
from pgolf_fast.data_get import GetConfig
from pgolf_fast.errors import UserError

NAME = data_get.SOURCES["caseops8192"].name
FOLDER = f"datasets/datasets/{NAME}"


class Hub(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes]
    faults: dict[str, list[str]]  # by file name: what to do wrong on the next GETs of it
    gets: list[str]

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        _, _, name = self.path.partition("/resolve/main/")
        body = self.files.get(name)
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if with_body:
            self.gets.append(name)
        fault = self.faults[name].pop(0) if with_body and self.faults.get(name) else None
        if fault == "server error":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(bytes(len(body)) if fault == "wrong bytes" else body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    for name in ("MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    files = {
        "datasets/manifest.json": json.dumps(
            {
                "datasets": [{"name": NAME, "tokenizer_name": "t", "stats": {"files_train": 3, "files_val": 1}}],
                "tokenizers": [{"name": "t", "model_path": "tokenizers/t.model"}],
            }
        ).encode(),
        "datasets/tokenizers/t.model": b"a model",
    }
    for name, seed in (("val_000000", 0), ("val_bytes_000000", 1), ("train_000000", 2), ("train_000001", 3), ("train_000002", 4)):
        path = tmp_path / f"fineweb_{name}.bin"
        shards.write_shard(path, np.random.default_rng(seed).integers(4, 8192, 1000))
        files[f"{FOLDER}/{path.name}"] = path.read_bytes()
    handler = type("Handler", (Hub,), {"files": files, "faults": {}, "gets": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    handler.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(hub, out, **fields):
    config = GetConfig(**{"variant": "caseops8192", "train_shards": 2, **fields})
    return data_get.get(config, out, endpoint=hub.endpoint, first_wait_s=0.01)


def test_brings_shards_sidecar_and_tokenizer_with_their_hashes(hub, tmp_path):
    result = fetch(hub, tmp_path / "set")
    names = [("train", 0), ("train", 1), ("val", 0), ("val_bytes", 0)]
    expected = [*(shards.shard_name(*name) for name in names), "tokenizer.model"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == expected == sorted(result["files"])
    for name in expected[:-1]:
        assert (tmp_path / "set" / name).read_bytes() == hub.files[f"{FOLDER}/{name}"]
        assert result["files"][name] == hashlib.sha256(hub.files[f"{FOLDER}/{name}"]).hexdigest()


@pytest.mark.parametrize("fault", ["server error", "wrong bytes", "cut"])
def test_a_passing_fault_is_tried_again(hub, tmp_path, fault):
    name = f"{FOLDER}/fineweb_train_000001.bin"
    hub.faults[name] = [fault, fault]
    fetch(hub, tmp_path / "set")
    assert (tmp_path / "set/fineweb_train_000001.bin").read_bytes() == hub.files[name]
    assert hub.gets.count(name) >= 2


def test_a_lasting_fault_is_named_and_leaves_no_shard(hub, tmp_path):
    hub.faults[f"{FOLDER}/fineweb_val_000000.bin"] = ["wrong bytes"] * 20
    with pytest.raises(UserError, match=r"fineweb_val_000000.bin: .*\(3 tries\); run the same command again"):
        fetch(hub, tmp_path / "set", retries=2)
    assert not (tmp_path / "set/fineweb_val_000000.bin").exists()


def test_what_is_there_and_whole_is_not_fetched_again_and_what_is_broken_is(hub, tmp_path):
    fetch(hub, tmp_path / "set")
    broken = tmp_path / "set/fineweb_train_000000.bin"
    broken.unlink()  # a hard link to the cache: replace it, do not write through it
    broken.write_bytes(b"")
    hub.gets.clear()
    fetch(hub, tmp_path / "set")
    assert broken.read_bytes() == hub.files[f"{FOLDER}/{broken.name}"]
    assert f"{FOLDER}/fineweb_val_000000.bin" not in hub.gets


def test_a_server_that_is_gone_is_one_sentence(hub, tmp_path):
    for _ in range(2):  # without anything in the cache, and with it
        with pytest.raises(UserError, match=r"\(2 tries\); run the same command again"):
            data_get.get(GetConfig("caseops8192", retries=1), tmp_path / "set", endpoint="http://127.0.0.1:9", first_wait_s=0.01)
        fetch(hub, tmp_path / "set")


def test_offline_uses_the_cache_and_says_what_it_lacks(hub, tmp_path):
    fetch(hub, tmp_path / "set", train_shards=1)
    hub.gets.clear()
    fetch(hub, tmp_path / "again", train_shards=1, offline=True)
    assert not hub.gets
    with pytest.raises(UserError, match="fineweb_train_000001.bin: not downloaded yet; run once without --offline"):
        fetch(hub, tmp_path / "again", train_shards=2, offline=True)


def test_a_folder_on_another_file_system_gets_copies(hub, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("cross-device link")

    monkeypatch.setattr(data_get.os, "link", refuse)
    fetch(hub, tmp_path / "set", train_shards=1)
    name = "fineweb_train_000000.bin"
    assert (tmp_path / "set" / name).read_bytes() == hub.files[f"{FOLDER}/{name}"]
    assert not list((tmp_path / "set").glob("*.partial"))


def test_repository_and_root_may_be_said_by_the_environment(hub, tmp_path, monkeypatch):
    hub.files = {name.replace("datasets/", "mine/", 1): body for name, body in hub.files.items()}
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "mine")
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "a/b")
    result = fetch(hub, tmp_path / "set", train_shards=0)
    assert result["repo"] == "a/b" and "tokenizer.model" in result["files"]
    assert fetch(hub, tmp_path / "set", train_shards=0, repo="c/d")["repo"] == "c/d", "what is said beats the environment"


def test_wrong_requests_are_named(hub, tmp_path):
    with pytest.raises(UserError, match="publishes 3"):
        fetch(hub, tmp_path / "set", train_shards=4)
    with pytest.raises(UserError, match="'sp7' is none of sp1024, caseops8192"):
        fetch(hub, tmp_path / "set", variant="sp7")
    with pytest.raises(UserError, match=f"no 'sp7' among its datasets, only {NAME}"):
        fetch(hub, tmp_path / "set", variant="sp7", repo="a/b")
    with pytest.raises(UserError, match="manifest.json: no such file in the repository"):
        fetch(hub, tmp_path / "set", root="elsewhere")


def test_a_manifest_of_another_kind_is_named(hub, tmp_path):
    hub.files["datasets/manifest.json"] = b"[]"
    with pytest.raises(UserError, match="not a manifest"):
        fetch(hub, tmp_path / "set")
