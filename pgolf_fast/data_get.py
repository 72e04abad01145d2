"""The challenge's published shards: `pgolf data get`. Every file is checked against the hash that its repository states for it."""

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pgolf_fast import dataset, shards
from pgolf_fast.errors import UserError

Progress = Callable[[int, int, str], None]  # files done, files in all, the file under way
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a variant is published, in the layout of the challenge's own downloader."""

    repo: str
    name: str  # of the data set in the repository's manifest.json


SOURCES = {
    "sp1024": Source("willdepueoai/parameter-golf", "fineweb10B_sp1024"),
    "caseops8192": Source("romeerp/parameter-golf-caseops-v1", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"),
}


@dataclasses.dataclass(frozen=True)
class GetConfig:
    variant: str = "sp1024"
    """A known variant (sp1024, caseops8192), or the name of a data set in the repository's manifest."""
    train_shards: int = 80
    """How many, from the first on; 100 million tokens or 200 MB each. Validation always comes whole."""
    repo: str | None = None
    """Another dataset repository; MATCHED_FINEWEB_REPO_ID does the same."""
    root: str | None = None
    """The folder in the repository that holds manifest.json; MATCHED_FINEWEB_REMOTE_ROOT_PREFIX does the same."""
    offline: bool = False
    """Use only what was downloaded before."""
    retries: int = 4
    """After the first try, each waiting twice as long as the one before."""


class Repository:
    """Downloads single files, with retries, each checked against its stated hash."""

    def __init__(self, repo: str, config: GetConfig, endpoint: str | None, first_wait_s: float):
        try:
            import huggingface_hub
        except ImportError:
            raise UserError("downloading needs huggingface-hub; `pip install pgolf-fast[data]`") from None
        self.hub = huggingface_hub
        self.repo, self.config, self.endpoint, self.first_wait_s = repo, config, endpoint, first_wait_s

    def get(self, name: str) -> Path:
        """The file in the local cache."""
        if self.config.offline:
            try:
                return Path(self.hub.hf_hub_download(self.repo, name, repo_type="dataset", endpoint=self.endpoint, local_files_only=True))
            except self.hub.errors.LocalEntryNotFoundError:
                raise UserError(f"{self.repo}/{name}: not downloaded yet; run once without --offline") from None
        return self._try(name, lambda is_retry: self._download(name, is_retry))

    def stated_hash(self, name: str) -> str | None:
        """The sha256 in the repository's own record; small files that it keeps another way have none."""
        return self._try(name, lambda is_retry: self._stated_hash(name))

    def _try(self, name: str, action: Callable):
        wait_s = self.first_wait_s
        for attempt in range(self.config.retries + 1):
            try:
                return action(attempt > 0)
            except self.hub.errors.RemoteEntryNotFoundError:  # the local one says that there is no connection
                raise UserError(f"{self.repo}/{name}: no such file in the repository; check --variant, --repo and --root") from None
            except self.hub.errors.RepositoryNotFoundError:
                raise UserError(f"{self.repo}: no such dataset repository, or a private one; check --repo, or `hf auth login`") from None
            except Exception as error:  # connection, server, hash: whatever it was may pass
                if attempt == self.config.retries:
                    reason = (str(error).strip() or repr(error)).splitlines()[0]
                    raise UserError(f"{self.repo}/{name}: {reason} ({attempt + 1} tries); run the same command again to go on") from None
                time.sleep(wait_s)
                wait_s *= 2

    def _download(self, name: str, is_retry: bool) -> Path:
        path = Path(self.hub.hf_hub_download(self.repo, name, repo_type="dataset", endpoint=self.endpoint, force_download=is_retry))
        stated = self._stated_hash(name)
        if stated is not None and dataset.hash_file(path) != stated:
            raise OSError(f"downloaded bytes do not have the stated sha256 {stated[:12]}...")
        return path

    def _stated_hash(self, name: str) -> str | None:
        url = self.hub.hf_hub_url(self.repo, name, repo_type="dataset", endpoint=self.endpoint)
        etag = self.hub.get_hf_file_metadata(url, endpoint=self.endpoint).etag
        return etag if etag and SHA256.fullmatch(etag) else None


def get(
    config: GetConfig,
    out: str | Path,
    progress: Progress = lambda done, total, name: None,
    endpoint: str | None = None,
    first_wait_s: float = 1.0,
) -> dict:
    """Brings a variant into folder `out`: its shards, and its tokenizer as tokenizer.model. Files that are there are not fetched again."""
    out = Path(out)
    known = SOURCES.get(config.variant)
    repo = config.repo or os.environ.get("MATCHED_FINEWEB_REPO_ID") or (known.repo if known else None)
    root = config.root or os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX") or "datasets"
    if repo is None:
        raise UserError(f"variant: {config.variant!r} is none of {', '.join(SOURCES)}; for another one name its --repo")
    if config.train_shards < 0 or config.retries < 0:
        raise UserError("train_shards, retries: expected numbers of at least 0")
    repository = Repository(repo, config, endpoint, first_wait_s)
    name = known.name if known else config.variant
    manifest = _read_manifest(repository.get(f"{root}/manifest.json"), f"{repo}/{root}/manifest.json")
    entry = _find(manifest, "datasets", name, repo)
    tokenizer = _find(manifest, "tokenizers", entry["tokenizer_name"], repo)
    has_sidecar = "caseops" in name
    num_train, num_val = int(entry["stats"]["files_train"]), int(entry["stats"]["files_val"])
    if config.train_shards > num_train:
        raise UserError(f"train_shards: {repo} publishes {num_train} of {name}, not {config.train_shards}; ask for fewer")
    splits = [("val", num_val), *([("val_bytes", num_val)] if has_sidecar else []), ("train", config.train_shards)]
    files = {f"{root}/{tokenizer['model_path']}": dataset.TOKENIZER_NAME}
    names = [shards.shard_name(split, number) for split, count in splits for number in range(count)]
    files |= {f"{root}/datasets/{name}/{shard}": shard for shard in names}
    out.mkdir(parents=True, exist_ok=True)
    got = {}
    for done, (remote, local) in enumerate(files.items()):
        progress(done, len(files), local)
        got[local] = _place(repository, remote, out / local)
    progress(len(files), len(files), "")
    return {"folder": str(out), "repo": repo, "variant": name, "files": got}


def _place(repository: Repository, remote: str, path: Path) -> str:
    """One file at its place, fetched unless the one there is whole; returns its sha256."""
    if path.exists() and (repository.config.offline or repository.stated_hash(remote) == dataset.hash_file(path)):
        return dataset.hash_file(path)
    cached = repository.get(remote).resolve()
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(cached, partial)
    except OSError:  # another file system
        shutil.copyfile(cached, partial)
    partial.replace(path)
    if path.suffix == ".bin":
        shards.count_tokens(path)
    return dataset.hash_file(path)


def _read_manifest(path: Path, name: str) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {key: {entry["name"]: entry for entry in manifest[key]} for key in ("datasets", "tokenizers")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: not a manifest of the challenge's layout ({error!r}); check --repo and --root") from None


def _find(manifest: dict, kind: str, name: str, repo: str) -> dict:
    if name not in manifest[kind]:
        raise UserError(f"{repo}: no {name!r} among its {kind}, only {', '.join(manifest[kind])}; check --variant")
    return manifest[kind][name]
