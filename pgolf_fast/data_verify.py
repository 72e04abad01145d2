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

import pgolf_fast
from pgolf_fast import dataset, shards
from pgolf_fast.data_build import Progress
from pgolf_fast.dataset import CHALLENGE_VAL_DOCUMENTS
from pgolf_fast.denominator import check_byte_rule, check_sidecar, num_scored, rule_bytes
from pgolf_fast.documents import Workers, find_files, read_chunks
from pgolf_fast.errors import UserError
from pgolf_fast.shards import BOS, ShardError, hash_tokens, split_documents
from pgolf_fast.tokenizers import EOS, PAD, UNKNOWN, Tokenizer

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
    return Verification(Path(folder), config, progress).run()


class Verification:
    """One run over one folder: what was read of it, and the report that the checks write into."""

    def __init__(self, folder: Path, config: VerifyConfig, progress: Progress):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; `pgolf data build`, `get` and `demo` make one")
        self.folder, self.config, self.progress = folder, config, progress
        self.record = dataset.load_record(folder)
        model = dataset.find_tokenizer(folder, config.tokenizer)
        self.tokenizer = Tokenizer(model) if model else None
        if config.documents and self.tokenizer is None:
            raise UserError("documents: comparing with the source needs the tokenizer; give --tokenizer")
        self.files = {split: shards.find_shards(folder, split) for split in shards.SPLITS}
        self.scans: dict[str, list[ShardScan]] = {"train": [], "val": []}
        self.report = Report(str(folder))

    def run(self) -> Report:
        self.check_names()
        self.check_headers()
        if not self.report.is_ok:
            self.report.checks["the rest"] = "not looked at: first the files themselves must be whole"
            return self.report
        self.scan_shards()
        self.check_vocabulary()
        self.check_documents()
        self.check_overlap()
        self.check_hashes()
        val, scored_bytes = shards.read_split(self.files["val"]), None
        if self.tokenizer is None:
            self.report.checks["bytes"] = "not counted: no tokenizer here; give --tokenizer"
        elif not self.report.has_failed("vocabulary"):
            scored_bytes = self.check_bytes(val)
        if self.config.documents:
            self.check_source()
        self.certify(val, scored_bytes)
        return self.report

    def check_names(self) -> None:
        known = {path for paths in self.files.values() for path in paths}
        for path in sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.partial")]):
            if path not in known:
                remedy = f"name it like {shards.shard_name('train', 0)}, finish what left it, or remove it"
                self.report.fail("files", path, "not the name of a shard", remedy)
        for split, paths in self.files.items():
            numbers = [int(shards.NAME.fullmatch(path.name)[2]) for path in paths]
            missing = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
            if missing:
                self.report.fail("files", self.folder / shards.shard_name(split, missing[0]), "missing between the others", shards.REMEDY)
            if not paths and split in self.scans:
                self.report.fail("files", self.folder / shards.shard_name(split, 0), "missing, and there is no other", shards.REMEDY)
        if self.record is not None and not self.record.is_complete:
            remedy = "run the same `pgolf data build` again; it takes up where it stopped"
            self.report.fail("files", self.folder / dataset.RECORD_NAME, "the build did not finish", remedy)
        self.report.checks["files"] = ", ".join(f"{len(paths)} {split}" for split, paths in self.files.items())

    def check_headers(self) -> None:
        total = 0
        for path in (path for paths in self.files.values() for path in paths):
            try:
                total += shards.count_tokens(path)
            except ShardError as error:
                self.report.fail("headers", error.path, error.problem, error.remedy)
        self.report.checks["headers"] = f"{total:,} values in all"

    def scan_shards(self) -> None:
        tasks = [(split, self.files[split], number) for split in self.scans for number in range(len(self.files[split]))]
        with contextlib.ExitStack() as stack:
            run = map
            if self.config.processes > 1 and self.is_large():
                context = multiprocessing.get_context("forkserver")
                context.set_forkserver_preload([__name__])
                run = stack.enter_context(concurrent.futures.ProcessPoolExecutor(self.config.processes, context)).map
            _, paths, numbers = zip(*tasks)
            for done, ((split, _, _), scan) in enumerate(zip(tasks, run(scan_shard, paths, numbers)), start=1):
                self.scans[split].append(scan)
                self.progress(done, len(tasks))

    def is_large(self) -> bool:
        """Whether starting processes costs less than it saves."""
        return sum(path.stat().st_size for paths in self.files.values() for path in paths) > 500_000_000

    def hashes(self, split: str) -> list[bytes]:
        """Of the documents of a split, in order."""
        return [document_hash for scan in self.scans[split] for document_hash in scan.hashes]

    def check_vocabulary(self) -> None:
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else self.record.made_from["vocab_size"] if self.record else None
        for path, scan in ((path, scan) for split in self.scans for path, scan in zip(self.files[split], self.scans[split])):
            if vocab_size is not None and scan.largest >= vocab_size:
                try:
                    shards.check_vocabulary(path, shards.open_shard(path), vocab_size)
                except ShardError as error:
                    self.report.fail("vocabulary", path, error.problem, error.remedy)
            if scan.num_forbidden:
                at = shards.HEADER_BYTES + shards.TOKEN_BYTES * scan.first_forbidden
                problem = (
                    f"byte {at}: {scan.num_forbidden:,} of {scan.tokens:,} values are pad, EOS or unknown, which no token stream holds; "
                    "this looks like a byte sidecar mixed into the tokens"
                )
                remedy = f"a sidecar's name is {shards.shard_name('val_bytes', 0)}; rename or remove this file"
                self.report.fail("vocabulary", path, problem, remedy)
        for split, scans in self.scans.items():
            if scans[0].tokens and not scans[0].starts_with_bos:
                problem = f"starts without BOS (id {BOS}), so documents cannot be told apart"
                self.report.fail("vocabulary", self.files[split][0], problem, "build the shards again with BOS before each document")
        largest = max(scan.largest for scans in self.scans.values() for scan in scans)
        self.report.checks["vocabulary"] = f"largest token {largest} of {vocab_size or 'an unknown vocabulary'}"

    def check_documents(self) -> None:
        recorded = {split: self.record.splits[split].documents if self.record else None for split in self.scans}
        expected = self.config.val_documents or recorded["val"] or CHALLENGE_VAL_DOCUMENTS
        found = {split: len(self.hashes(split)) for split in self.scans}
        if found["val"] != expected:
            problem = f"{found['val']:,} validation documents where {expected:,} were said"
            if found["val"] == 10_000:
                problem += " (10,000 is what a script in circulation takes; the other 40,000 of the challenge's are then in training)"
            remedy = f"build both splits again with --val-documents {expected}, or fetch the published set (`pgolf data get`)"
            self.report.fail("documents", self.files["val"][0], problem, remedy)
        if not found["train"]:
            self.report.fail("documents", self.files["train"][0], "no document in the training split", shards.REMEDY)
        elif recorded["train"] not in (None, found["train"]):
            problem = f"{found['train']:,} training documents, but the build wrote {recorded['train']:,}"
            self.report.fail("documents", self.folder, problem, shards.REMEDY)
        self.report.checks["documents"] = f"{found['val']:,} validation, {found['train']:,} training"

    def check_overlap(self) -> None:
        val = set(self.hashes("val"))
        shared = [number for number, document_hash in enumerate(self.hashes("train")) if document_hash in val]
        if shared:
            problem = f"{len(shared):,} training documents are validation documents, the first is training document {shared[0]:,}"
            remedy = "build both splits again from one list of documents with `pgolf data build`, which leaves them out of training"
            self.report.fail("overlap", self.folder, problem, remedy)
        seen = f"{len(shared):,} of {len(val):,} different validation documents in training, by the hash of their tokens"
        self.report.checks["overlap"] = seen

    def check_hashes(self) -> None:
        if self.record is None:
            self.report.checks["hashes"] = f"nothing to compare with: no {dataset.RECORD_NAME}"
            return
        recorded = {shard.name: shard.sha256 for shard in self.record.shards}
        found = {path.name: scan.sha256 for split in self.scans for path, scan in zip(self.files[split], self.scans[split])}
        found |= {path.name: dataset.hash_file(path) for path in self.files["val_bytes"]}
        for name in sorted(recorded.keys() | found.keys()):
            if name not in recorded:
                self.report.fail("hashes", self.folder / name, "was not written by the build", shards.REMEDY)
            elif name not in found:
                self.report.fail("hashes", self.folder / name, "was written by the build and is gone", shards.REMEDY)
            elif recorded[name] != found[name]:
                self.report.fail("hashes", self.folder / name, "is not the file that the build wrote", shards.REMEDY)
        self.report.checks["hashes"] = f"{len(found)} files against {dataset.RECORD_NAME}"

    def check_bytes(self, val: np.ndarray) -> int | None:
        """Counts the validation bytes in the way that scores do, and returns those of the scored targets."""
        try:
            by_rule = check_byte_rule(self.tokenizer, val)
        except UserError as error:
            self.report.fail("bytes", self.files["val"][0], *str(error).rsplit("; ", 1))
            return None
        seen = f"byte rule {by_rule.bytes:,} == UTF-8 bytes of the decoded text, {by_rule.documents:,} documents"
        self.report.checks["bytes"] = seen
        counts = rule_bytes(self.tokenizer, val)
        if self.files["val_bytes"]:
            counts = self.check_sidecar(val)
            if counts is None:
                return None
            change = by_rule.bytes - int(counts.sum(dtype=np.int64))
            self.report.checks["bytes"] = f"{seen}; normalisation changed the text by {change:+,}"
        elif self.tokenizer.is_caseops:
            problem = "missing; CaseOps scores count original bytes"
            self.report.fail("sidecar", self.folder / shards.shard_name("val_bytes", 0), problem, shards.REMEDY)
        return int(counts[1 : num_scored(len(val), SCORED_ROW) + 1].sum(dtype=np.int64))

    def check_sidecar(self, val: np.ndarray) -> np.ndarray | None:
        for tokens_path, counts_path in zip(self.files["val"], self.files["val_bytes"]):
            if tokens_path.stat().st_size != counts_path.stat().st_size:
                self.report.fail("sidecar", counts_path, f"does not have one count for each token of {tokens_path.name}", shards.REMEDY)
        counts = shards.read_split(self.files["val_bytes"])
        try:
            agreement = check_sidecar(self.tokenizer, val, counts)
        except UserError as error:
            self.report.fail("sidecar", self.files["val_bytes"][0], *str(error).rsplit("; ", 1))
            return None
        total = int(counts.sum(dtype=np.int64))
        expected = self.record.splits["val"].counted_bytes if self.record else None
        if expected not in (None, total):
            problem = f"sums to {total:,} bytes, the build counted {expected:,}"
            self.report.fail("sidecar", self.files["val_bytes"][0], problem, shards.REMEDY)
        self.report.checks["sidecar"] = f"{total:,} original bytes; {agreement:.1%} of the tokens cover just their piece"
        return counts

    def check_source(self) -> None:
        """Tokenizes the source again, counting every byte, and compares document by document."""
        text_field = self.record.made_from["text_field"] if self.record else "text"
        sources = find_files([*self.config.val, *self.config.documents])
        total_bytes = sum(path.stat().st_size for path in sources)
        hashes = {split: self.hashes(split) for split in self.scans}
        in_val = set(hashes["val"])
        compared = {"val": 0, "train": 0}
        different = None  # (split, number) of the first document that is not the source's
        text_bytes = counted_bytes = num_exact = 0
        with Workers(self.tokenizer, self.config.processes) as workers:
            for result in workers.map(read_chunks(sources, text_field), True, text_field):
                counts = np.add.reduceat(result.counts, np.cumsum(result.lengths) - result.lengths, dtype=np.int64)
                for document_hash, counted, size in zip(result.hashes, counts.tolist(), result.text_bytes.tolist()):
                    split = "val" if compared["val"] < len(hashes["val"]) else "train"
                    if split == "train" and (document_hash in in_val or compared["train"] == len(hashes["train"])):
                        continue  # left out by the build: a duplicate, or after its token limit
                    if document_hash != hashes[split][compared[split]]:
                        different = different or (split, compared[split])
                    compared[split] += 1
                    text_bytes += size
                    counted_bytes += counted
                    num_exact += counted == size
                self.progress(result.read_bytes, total_bytes)
        for split in hashes:
            if compared[split] < len(hashes[split]):
                different = different or (split, compared[split])
        if different is not None:
            split, number = different
            remedy = "give the documents that these shards were made from, in their order, or build the shards again"
            self.report.fail("source", self.files[split][0], f"{split} document {number:,} is not the source's", remedy)
        num_stripped = sum(compared.values()) - num_exact
        self.report.checks["source"] = (
            f"{sum(compared.values()):,} documents, {text_bytes:,} bytes of text; tokens count {counted_bytes:,} "
            f"({num_stripped:,} documents lost white space at their ends)"
        )

    def certify(self, val: np.ndarray, scored_bytes: int | None) -> None:
        scored = num_scored(len(val), SCORED_ROW)
        kind = (self.tokenizer.vocab_size, self.tokenizer.is_caseops) if self.tokenizer else None
        public = next((known for known in PUBLIC_SETS if (known.vocab_size, known.is_caseops) == kind), None)
        shard_hashes = "".join(scan.sha256 for scan in self.scans["train"])
        self.report.certificate = {
            "result": "every check passed" if self.report.is_ok else f"{len(self.report.findings)} findings",
            "validation set": _name(public, scored, scored_bytes),
            "validation documents": len(self.hashes("val")),
            "validation tokens": len(val),
            f"scored tokens (rows of {SCORED_ROW})": scored,
            "scored bytes": scored_bytes,
            "training shards": len(self.scans["train"]),
            "training documents": len(self.hashes("train")),
            "training tokens": sum(scan.tokens for scan in self.scans["train"]),
            "validation tokens sha256": hashlib.sha256(np.ascontiguousarray(val, "<u2").data).hexdigest(),
            "training shards sha256": hashlib.sha256(shard_hashes.encode()).hexdigest(),
            "tokenizer sha256": self.tokenizer.sha256 if self.tokenizer else None,
            "checked by": f"pgolf_fast {pgolf_fast.__version__}",
        }


def _name(public: PublicSet | None, scored: int, scored_bytes: int | None) -> str:
    if public is None or scored != public.scored_tokens:
        reference = f" (the public {public.name} set scores {public.scored_tokens:,} tokens)" if public else ""
        return f"a set of your own{reference}"
    if None not in (public.scored_bytes, scored_bytes) and abs(scored_bytes - public.scored_bytes) > public.bytes_tolerance:
        return f"the tokens of the public {public.name} set, but {scored_bytes:,} scored bytes instead of {public.scored_bytes:,}"
    return f"the public {public.name} set"
