"""Downloads from a hub on this machine, by huggingface_hub in a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import converters
from converters.hub import resolve
from tests.converters.conftest import assert_equal_params

WEIGHTS = "diffusion_pytorch_model.safetensors"
TOKEN = "hf_secret"


class FakeHub(ThreadingHTTPServer):
    """Repositories as {repository: {revision: {file name: bytes}}}; private ones want the token.

    The first download of a file in `dropped` breaks off in the middle.
    """

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.repositories = repositories
        self.dropped = set()
        self.requests = []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self):
        return [name for method, name, _ in self.requests if method == "GET"]


class FakeHubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def refuse(self, status, qvalue, **headers):
        self.send_response(status)
        for name, value in {"X-Error-Code": qvalue, "Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def list_files(self, owner, name):
        files = self.server.repositories[f"{owner}/{name}"]["main"]
        listed = [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in files]
        content = json.dumps(listed).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self):
        hub = self.server
        if self.path.startswith("/api/models/"):
            return self.list_files(*self.path.split("?")[0].split("/")[3:5])
        owner, name, _, revision, file = self.path.strip("/").split("/", 4)
        repository = hub.repositories.get(f"{owner}/{name}")
        hub.requests.append((self.command, file, self.headers.get("Range")))
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        if owner == "private" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "GatedRepo")
        commits = {commit_of(revision): files for revision, files in repository.items()}
        commit = revision if revision in commits else commit_of(revision)
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound")
        content = commits[commit].get(file)
        if content is None:
            return self.refuse(404, "EntryNotFound", **{"X-Repo-Commit": commit})
        begin = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") : -1])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hash_of(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if file in hub.dropped:
            hub.dropped.remove(file)
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        self.wfile.write(content[begin:])
        return None


def commit_of(revision):
    return f"{sum(revision.encode()):040x}"


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


def read_tree(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def hub(dit, tmp_path):
    """A pipeline whose main revision is sharded, with files that no one needs."""
    forward, params = dit
    pipeline = tmp_path / "origin"
    converters.save_pretrained(forward, params, pipeline / "transformer", max_shard_bytes=30_000)
    parts = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(parts))
    (pipeline / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"not needed")
    (pipeline / "README.md").write_bytes(b"not needed")
    converters.save_pretrained(forward, params, tmp_path / "single")
    server = FakeHub(
        {
            "org/dit": {"main": read_tree(pipeline)},
            "private/dit": {"main": {}, "v2": read_tree(tmp_path / "single")},
        }
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(hub, cache, *arguments, offline=False, **options):
    """Resolve in a fresh process whose hub is this one; return the path or the error."""
    qvalue = (
        "import json, sys, time\n"
        "time.sleep = lambda seconds: None\n"  # between attempts
        "from huggingface_hub import constants\n"
        "constants.DOWNLOAD_CHUNK_SIZE = 1024\n"  # small, so that a part of a file is kept
        "from converters.hub import resolve\n"
        "source, options = json.loads(sys.argv[1])\n"
        "try: print(json.dumps({'path': str(resolve(source, **options))}))\n"
        "except ValueError as error: print(json.dumps({'error': str(error)}))\n"
    )
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment = {
        **kept,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(cache / "home"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_TOKEN": "",
    }
    options = {"cache_dir": str(cache), **options}
    done = subprocess.run(
        [sys.executable, "-c", qvalue, json.dumps([*arguments, options])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def test_needed_files_only_resumed_and_then_offline(hub, dit, tmp_path):
    cache = tmp_path / "cache"
    transformer = {name for name in hub.repositories["org/dit"]["main"] if "safetensors" in name}
    shard = min(name for name in transformer if name.endswith(".safetensors"))
    hub.dropped.add(shard)
    path = ask(hub, cache, "org/dit")["path"]
    assert path.endswith(f"{commit_of('main')}/transformer/{WEIGHTS}.index.json")
    assert set(hub.downloads()) == {
        "model_index.json",
        "transformer/config.json",
        *transformer,
    }
    # the one that broke off went on where it had stopped
    size = len(hub.repositories["org/dit"]["main"][shard])
    ranges = [bytes_ for method, name, bytes_ in hub.requests if (method, name) == ("GET", shard)]
    assert ranges == [None, f"bytes={size // 2 // 1024 * 1024}-"]

    hub.requests.clear()
    assert ask(hub, cache, "org/dit")["path"] == path
    assert hub.downloads() == []
    assert ask(hub, cache, "org/dit", local_files_only=True)["path"] == path
    asked = len(hub.requests)
    assert ask(hub, cache, "org/dit", offline=True)["path"] == path
    assert len(hub.requests) == asked
    forward, params = converters.from_pretrained("org/dit", cache_dir=cache, local_files_only=True)
    assert forward == dit[0]
    assert_equal_params(params, dit[1])


def test_revision_and_token(hub, tmp_path):
    cache = tmp_path / "cache"
    for revision in ("v2", commit_of("v2")):
        path = ask(hub, cache, "private/dit", revision=revision, token=TOKEN)["path"]
        assert path.endswith(f"{commit_of('v2')}/{WEIGHTS}")
    path = ask(hub, cache, f"private/dit/{WEIGHTS}", revision="v2", token=TOKEN)["path"]
    assert path.endswith(f"{commit_of('v2')}/{WEIGHTS}")
    refused = ask(hub, tmp_path / "other", "private/dit", revision="v2")["error"]
    assert "token=" in refused
    assert "private/dit" in refused
    unknown = ask(hub, cache, "private/dit", revision="v3", token=TOKEN)["error"]
    assert "v3" in unknown


def test_what_a_hub_does_not_have(hub, tmp_path):
    cache = tmp_path / "cache"
    assert "org/none is no directory here" in ask(hub, cache, "org/none")["error"]
    assert "has no vae/config.json" in ask(hub, cache, "org/dit", subfolder="vae")["error"]
    assert "has no file x.pt" in ask(hub, cache, "org/dit/x.pt")["error"]
    missing = ask(hub, tmp_path / "empty", "org/dit", local_files_only=True)["error"]
    assert "cache" in missing
    assert "HTTP" not in missing


def test_server_that_does_not_answer(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    error = ask(hub, tmp_path / "cache", "org/dit")["error"]
    assert "did not answer" in error


@pytest.mark.parametrize("source", ["nowhere", "/no/such/file", "a/b/c.txt", "./a", "org/a b"])
def test_neither_here_nor_a_repository(source):
    with pytest.raises(ValueError, match="no file or directory here"):
        resolve(source)


def test_missing_shard(dit, tmp_path):
    report = converters.save_pretrained(*dit, tmp_path / "saved", max_shard_bytes=30_000)
    lost = report["files"][1]
    (tmp_path / "saved" / lost).unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of its {len(report['files'])} shards: {lost}"):
        converters.from_pretrained(tmp_path / "saved")


def test_variants_of_a_repository(hub, tmp_path):
    files = hub.repositories["org/dit"]["main"]
    (index,) = (name for name in files if name.endswith("safetensors.index.json"))
    renamed = index.replace("index.json", "index.fp16.json")
    files[renamed] = files.pop(index)
    shards = {name for name in files if name.endswith(".safetensors")}
    for name in [name for name in files if name.endswith(".bin")]:
        del files[name]
    path = ask(hub, tmp_path / "cache", "org/dit", variant="fp16")["path"]
    assert path.endswith(renamed)
    assert shards <= set(hub.downloads())
    error = ask(hub, tmp_path / "cache", "org/dit")["error"]
    assert "There are weights for variant='fp16'." in error
