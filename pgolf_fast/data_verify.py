"""Is this data set what it says: `pgolf data verify`.

Every check reads the files, not the record of how they were made; the record only says what to expect. What is wrong comes out as
findings, each with a file and a remedy, all of them in one run; the certificate is what to paste where a score is claimed.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np

from pgolf_fast import dataset, shards
from pgolf_fast.data_build import Progress, split_documents
from pgolf_fast.dataset import CHALLENGE_VAL_DOCUMENTS, Record
from pgolf_fast.denominator import check_byte_rule, check_sidecar, num_scored, rule_bytes
from pgolf_fast.documents import Workers, find_files, hash_tokens, read_chunks
from pgolf_fast.errors import UserError
from pgolf_fast.shards import ShardError
from pgolf_fast.tokenizers import BOS, EOS, PAD, UNKNOWN, Tokenizer

SCORED_ROW = 2048  # the recipes' validation length; the stream is cut to whole rows and one token
FORBIDDEN = (PAD, EOS, UNKNOWN)  # in a token stream; a byte sidecar is full of them


@dataclasses.dataclass(frozen=True)
class PublicSet:
    """A validation set of the challenge, by what runs on it have logged."""

    name: str
    vocab_size: int
    is_caseops: bool
    scored_tokens: int
    scored_bytes: int | None = None
    bytes_tolerance: int = 0  # where the figure was solved from logged scores


PUBLIC_SETS = (
    PublicSet("sp1024", 1024, False, 62_021_632, 151_080_363),
    PublicSet("sp4096", 4096, False, 45_508_608),
    PublicSet("sp8192", 8192, False, 40_540_160),
    PublicSet("caseops8192", 8192, True, 47_851_520, 151_074_499, bytes_tolerance=2),
)


@dataclasses.dataclass(frozen=True)
class Finding:
    check: str
    where: str  # a file, or the folder
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.remedy}"


@dataclasses.dataclass
class Report:
    folder: str
    checks: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> what was seen
    findings: list[Finding] = dataclasses.field(default_factory=list)
    certificate: dict[str, str | int | None] = dataclasses.field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        return not self.findings

    def fail(self, check: str, where: str | Path, problem: str, remedy: str) -> None:
        self.findings.append(Finding(check, str(where), problem, remedy))

    def has_failed(self, *checks: str) -> bool:
        return any(finding.check in checks for finding in self.findings)


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    tokenizer: Path | None = None
    """The SentencePiece model; the folder's own tokenizer.model otherwise."""
    val_documents: int | None = None
    """How many validation documents there must be. Otherwise: what the build recorded, or the challenge's own number."""
    documents: tuple[Path, ...] = ()
    """The source documents: tokenizes them again and compares every token and every byte."""
    val: tuple[Path, ...] = ()
    """The source's validation documents, where the build was given some of their own."""
    processes: int = os.cpu_count() or 1
    """That read shards and tokenize."""


@dataclasses.dataclass(frozen=True)
class ShardScan:
    """What one pass over a shard saw. A document belongs to the shard in which it starts."""

    tokens: int
    largest: int
    num_forbidden: int
    first_forbidden: int | None  # position
    starts_with_bos: bool
    hashes: list[bytes]  # of its documents
    sha256: str


def scan_shard(paths: list[Path], number: int) -> ShardScan:
    tokens = np.asarray(shards.open_shard(paths[number]))
    starts = np.flatnonzero(tokens == BOS)
    forbidden = np.flatnonzero(np.isin(tokens, FORBIDDEN))
    own = tokens[starts[0] :] if len(starts) else tokens[:0]
    for path in paths[number + 1 :] if len(starts) else []:  # the rest of its last document
        following = shards.open_shard(path)
        ends = np.flatnonzero(following == BOS)
        own = np.concatenate([own, following[: ends[0]] if len(ends) else following])
        if len(ends):
            break
    return ShardScan(
        tokens=len(tokens),
        largest=int(tokens.max()) if len(tokens) else 0,
        num_forbidden=len(forbidden),
        first_forbidden=int(forbidden[0]) if len(forbidden) else None,
        starts_with_bos=bool(len(tokens)) and int(tokens[0]) == BOS,
        hashes=[hash_tokens(document) for document in split_documents(own)],
        sha256=dataset.hash_file(paths[number]),
    )


def verify(folder: str | Path, config: VerifyConfig, progress: Progress = lambda done, total: None) -> Report:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `pgolf data build`, `get` and `demo` make one")
    report = Report(str(folder))
    record = dataset.load_record(folder)
    model = dataset.find_tokenizer(folder, config.tokenizer)
    tokenizer = Tokenizer(model) if model else None
    files = {split: shards.find_shards(folder, split) for split in shards.SPLITS}
    _check_names(report, folder, files, record)
    _check_headers(report, files)
    if report.has_failed("files", "headers"):
        report.checks["the rest"] = "not looked at: first the files themselves must be whole"
        return report
    scans = _scan_all(files, config.processes, progress)
    _check_vocabulary(report, files, scans, tokenizer, record)
    _check_documents(report, folder, files, scans, config.val_documents, record)
    _check_overlap(report, folder, scans)
    _check_hashes(report, folder, scans, files, record)
    val = shards.read_split(files["val"])
    counts = shards.read_split(files["val_bytes"]) if files["val_bytes"] else None
    scored_bytes = None
    if tokenizer is None:
        report.checks["bytes"] = "not counted: no tokenizer here; give --tokenizer"
    elif not report.has_failed("vocabulary"):
        scored_bytes = _check_bytes(report, folder, files, val, counts, tokenizer, record)
    if config.documents:
        if tokenizer is None:
            raise UserError("documents: comparing with the source needs the tokenizer; give --tokenizer")
        _check_source(report, files, scans, tokenizer, config, record, progress)
    _certify(report, files, scans, tokenizer, val, scored_bytes)
    return report


def _check_names(report: Report, folder: Path, files: dict[str, list[Path]], record: Record | None) -> None:
    known = {path for paths in files.values() for path in paths}
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.partial")]):
        if path not in known:
            report.fail("files", path, "not the name of a shard", f"name it like {shards.shard_name('train', 0)}, finish what left it, or remove it")
    for split in ("train", "val"):
        if not files[split]:
            report.fail("files", folder, f"no {shards.shard_name(split, 0)}", shards.REMEDY)
    for split, paths in files.items():
        numbers = [int(shards.NAME.fullmatch(path.name)[2]) for path in paths]
        missing = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
        if missing:
            report.fail("files", folder / shards.shard_name(split, missing[0]), "missing between the others", shards.REMEDY)
    if record is not None and not record.is_complete:
        report.fail("files", folder / dataset.RECORD_NAME, "the build did not finish", "run the same `pgolf data build` again; it takes up where it stopped")
    report.checks["files"] = ", ".join(f"{len(paths)} {split}" for split, paths in files.items())


def _check_headers(report: Report, files: dict[str, list[Path]]) -> None:
    total = 0
    for path in (path for paths in files.values() for path in paths):
        try:
            total += shards.count_tokens(path)
        except ShardError as error:
            report.fail("headers", error.path, error.problem, error.remedy)
    report.checks["headers"] = f"{total:,} values in all"


def _scan_all(files: dict[str, list[Path]], processes: int, progress: Progress) -> dict[str, list[ShardScan]]:
    tasks = [(split, paths, number) for split, paths in files.items() if split != "val_bytes" for number in range(len(paths))]
    scans = {"train": [], "val": []}
    with contextlib.ExitStack() as stack:
        run = map
        if processes > 1 and _is_large(files):
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            run = stack.enter_context(concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context)).map
        results = run(scan_shard, [paths for _, paths, _ in tasks], [number for _, _, number in tasks])
        for done, ((split, _, _), scan) in enumerate(zip(tasks, results), start=1):
            scans[split].append(scan)
            progress(done, len(tasks))
    return scans


def _is_large(files: dict[str, list[Path]]) -> bool:
    """Whether starting processes costs less than it saves."""
    return sum(path.stat().st_size for paths in files.values() for path in paths) > 500_000_000


def _check_vocabulary(report: Report, files, scans, tokenizer: Tokenizer | None, record: Record | None) -> None:
    vocab_size = tokenizer.vocab_size if tokenizer else record.made_from["vocab_size"] if record else None
    for path, scan in ((path, scan) for split in scans for path, scan in zip(files[split], scans[split])):
        if vocab_size is not None and scan.largest >= vocab_size:
            report.fail("vocabulary", path, f"token {scan.largest} is outside the vocabulary of {vocab_size}",
                        "give the tokenizer that these shards were made with, or build them again")  # fmt: skip
        if scan.num_forbidden:
            report.fail("vocabulary", path,
                        f"byte {shards.HEADER_BYTES + shards.TOKEN_BYTES * scan.first_forbidden}: {scan.num_forbidden:,} of {scan.tokens:,} values are "
                        "pad, EOS or unknown, which no token stream holds; this looks like a byte sidecar mixed into the tokens",
                        f"a sidecar's name is {shards.shard_name('val_bytes', 0)}; rename or remove this file")  # fmt: skip
        if scan is scans["train"][0] or scan is scans["val"][0]:
            if scan.tokens and not scan.starts_with_bos:
                report.fail("vocabulary", path, f"starts without BOS (id {BOS}), so documents cannot be told apart",
                            "build the shards again with BOS before each document")  # fmt: skip
    report.checks["vocabulary"] = f"largest token {max(scan.largest for split in scans.values() for scan in split)} of {vocab_size or 'an unknown vocabulary'}"


def _check_documents(report: Report, folder, files, scans, given: int | None, record: Record | None) -> None:
    recorded = record.splits["val"].documents if record else None
    expected = given or recorded or CHALLENGE_VAL_DOCUMENTS
    found = {split: sum(len(scan.hashes) for scan in scans[split]) for split in scans}
    if found["val"] != expected:
        trap = " (10,000 is the default of a preparation script in circulation; the next 40,000 validation documents are then in training)"
        report.fail("documents", files["val"][0],
                    f"{found['val']:,} validation documents where {expected:,} were said{trap if found['val'] == 10_000 else ''}",
                    f"build both splits again with --val-documents {expected}, or fetch the published set (`pgolf data get`)")  # fmt: skip
    if not found["train"]:
        report.fail("documents", files["train"][0], "no document in the training split", shards.REMEDY)
    if record and record.splits["train"].documents != found["train"]:
        report.fail("documents", folder, f"{found['train']:,} training documents, but the build wrote {record.splits['train'].documents:,}", shards.REMEDY)
    report.checks["documents"] = f"{found['val']:,} validation, {found['train']:,} training"


def _check_overlap(report: Report, folder: Path, scans: dict[str, list[ShardScan]]) -> None:
    val = {document_hash for scan in scans["val"] for document_hash in scan.hashes}
    shared = [number for number, document_hash in enumerate(h for scan in scans["train"] for h in scan.hashes) if document_hash in val]
    if shared:
        report.fail("overlap", folder,
                    f"{len(shared):,} training documents are validation documents, the first is training document {shared[0]:,}",
                    "build both splits again from one list of documents with `pgolf data build`, which leaves them out of training")  # fmt: skip
    report.checks["overlap"] = f"{len(shared):,} of {len(val):,} different validation documents in training, by the hash of their tokens"


def _check_hashes(report: Report, folder: Path, scans, files, record: Record | None) -> None:
    if record is None:
        report.checks["hashes"] = f"nothing to compare with: no {dataset.RECORD_NAME}"
        return
    recorded = {shard.name: shard.sha256 for shard in record.shards}
    found = {path.name: scan.sha256 for split in scans for path, scan in zip(files[split], scans[split])}
    found |= {path.name: dataset.hash_file(path) for path in files["val_bytes"]}
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            problem = "is not the file that the build wrote" if name in found else "was written by the build and is gone"
            report.fail("hashes", folder / name, problem if name in recorded else "was not written by the build", shards.REMEDY)
    report.checks["hashes"] = f"{len(found)} files against {dataset.RECORD_NAME}"


def _check_bytes(report: Report, folder, files, val, counts, tokenizer: Tokenizer, record: Record | None) -> int | None:
    """Counts the validation bytes in the way its scores do; returns the bytes of the scored targets."""
    try:
        by_rule = check_byte_rule(tokenizer, val)
    except UserError as error:
        report.fail("bytes", files["val"][0], *str(error).rsplit("; ", 1))
        return None
    seen = f"byte rule {by_rule.bytes:,} == UTF-8 bytes of the decoded text, {by_rule.documents:,} documents"
    if counts is None:
        if tokenizer.is_caseops:
            report.fail("sidecar", folder / shards.shard_name("val_bytes", 0), "missing; CaseOps scores count original bytes", shards.REMEDY)
        report.checks["bytes"] = seen
        return int(rule_bytes(tokenizer, val)[1 : num_scored(len(val), SCORED_ROW) + 1].sum(dtype=np.int64))
    for tokens_path, counts_path in zip(files["val"], files["val_bytes"]):
        if tokens_path.stat().st_size != counts_path.stat().st_size:
            report.fail("sidecar", counts_path, f"does not have one count for each token of {tokens_path.name}", shards.REMEDY)
    try:
        agreement = check_sidecar(tokenizer, val, counts)
    except UserError as error:
        report.fail("sidecar", files["val_bytes"][0], *str(error).rsplit("; ", 1))
        return None
    total = int(counts.sum(dtype=np.int64))
    expected = record.splits["val"].counted_bytes if record else None
    if expected is not None and total != expected:
        report.fail("sidecar", files["val_bytes"][0], f"sums to {total:,} bytes, the build counted {expected:,}", shards.REMEDY)
    report.checks["sidecar"] = f"{total:,} original bytes; {agreement:.1%} of the tokens cover just their piece"
    report.checks["bytes"] = f"{seen}; normalisation changed them by {by_rule.bytes - total:+,}"
    return int(counts[1 : num_scored(len(val), SCORED_ROW) + 1].sum(dtype=np.int64))


def _check_source(report: Report, files, scans, tokenizer: Tokenizer, config: VerifyConfig, record: Record | None, progress) -> None:
    """Tokenizes the source again, counting every byte, and compares document by document."""
    text_field = record.made_from["text_field"] if record else "text"
    sources = find_files([*config.val, *config.documents])
    total_bytes = sum(path.stat().st_size for path in sources)
    val = [document_hash for scan in scans["val"] for document_hash in scan.hashes]
    train = [document_hash for scan in scans["train"] for document_hash in scan.hashes]
    in_val, expected = set(val), {"val": iter(val), "train": iter(train)}
    compared, different = {"val": 0, "train": 0}, None
    text_bytes = counted_bytes = num_exact = 0
    with Workers(tokenizer, config.processes) as workers:
        for result in workers.map(read_chunks(sources, text_field), True, text_field):
            counts = np.add.reduceat(result.counts, np.cumsum(result.lengths) - result.lengths, dtype=np.int64)
            for document_hash, counted, size in zip(result.hashes, counts, result.text_bytes):
                split = "val" if compared["val"] < len(val) else "train"
                if split == "train" and (document_hash in in_val or compared["train"] == len(train)):
                    continue  # left out by the build: a duplicate, or after its token limit
                if document_hash != next(expected[split]) and different is None:
                    different = (split, compared[split])
                compared[split] += 1
                text_bytes, counted_bytes, num_exact = text_bytes + int(size), counted_bytes + int(counted), num_exact + int(counted == size)
            progress(result.read_bytes, total_bytes)
    for split, hashes in (("val", val), ("train", train)):
        if compared[split] < len(hashes) and different is None:
            different = (split, compared[split])
    if different is not None:
        report.fail("source", files[different[0]][0], f"{different[0]} document {different[1]:,} is not the source's",
                    "give the documents that these shards were made from, in their order, or build the shards again")  # fmt: skip
    num_compared = sum(compared.values())
    report.checks["source"] = (
        f"{num_compared:,} documents, {text_bytes:,} bytes of text; tokens count {counted_bytes:,} "
        f"({num_compared - num_exact:,} documents lost white space at their ends)"
    )


def _certify(report: Report, files, scans, tokenizer: Tokenizer | None, val: np.ndarray, scored_bytes: int | None) -> None:
    from pgolf_fast import __version__

    scored = num_scored(len(val), SCORED_ROW)
    kind = (tokenizer.vocab_size, tokenizer.is_caseops) if tokenizer else None
    public = next((known for known in PUBLIC_SETS if (known.vocab_size, known.is_caseops) == kind), None)
    report.certificate = {
        "result": "every check passed" if report.is_ok else f"{len(report.findings)} findings",
        "validation set": _name(public, scored, scored_bytes),
        "validation documents": sum(len(scan.hashes) for scan in scans["val"]),
        "validation tokens": len(val),
        f"scored tokens (rows of {SCORED_ROW})": scored,
        "scored bytes": scored_bytes,
        "training shards": len(scans["train"]),
        "training documents": sum(len(scan.hashes) for scan in scans["train"]),
        "training tokens": sum(scan.tokens for scan in scans["train"]),
        "validation tokens sha256": hashlib.sha256(np.ascontiguousarray(val, "<u2").data).hexdigest(),
        "training shards sha256": hashlib.sha256("".join(scan.sha256 for scan in scans["train"]).encode()).hexdigest(),
        "tokenizer sha256": tokenizer.sha256 if tokenizer else None,
        "checked by": f"pgolf_fast {__version__}",
    }


def _name(public: PublicSet | None, scored: int, scored_bytes: int | None) -> str:
    if public is None or scored != public.scored_tokens:
        reference = f" (the public {public.name} set scores {public.scored_tokens:,} tokens)" if public else ""
        return f"a set of your own{reference}"
    if public.scored_bytes is not None and scored_bytes is not None and abs(scored_bytes - public.scored_bytes) > public.bytes_tolerance:
        return f"the tokens of the public {public.name} set, but {scored_bytes:,} scored bytes instead of {public.scored_bytes:,}"
    return f"the public {public.name} set"
