"""Where the bytes of a submission go: weights by role, metadata, code, and the total against the cap.

Code is counted three ways, because the challenge's own rulings differ:

    literal  the main script as it is
    wrapped  every counted file, without comments, inside one self-extracting script, as the records ship theirs
    strict   every counted file as it is

The rules count the code of one script, train_gpt.py, and the records ship theirs wrapped: so `wrapped` gates, unless strict is asked for.
"""

import ast
import base64
import json
import lzma
import re
from dataclasses import dataclass
from pathlib import Path

import pgolf_fast
from pgolf_fast.artifact import estimate_bytes, stream_bytes
from pgolf_fast.errors import UserError
from pgolf_fast.quantize import QuantTable, quantize

CAP_BYTES = 16_000_000
MAIN_SCRIPT = "train_gpt.py"
SUBMISSION_VERBS = ("train", "quantize", "pack", "eval")  # what a submission's script does
C_SUFFIXES = (".cu", ".cuh", ".cpp", ".cc", ".c", ".h", ".hpp")
CODE_SUFFIXES = {".py", ".pyi", ".toml", *C_SUFFIXES, ".sh"}
STRING_OR_C_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)


def forecast_bytes(state, config: QuantTable) -> int:
    """The artifact's size if training stopped now: plain rounding, and the entropy of the codes' histograms.

    GPTQ moves the codes, but hardly their histogram.
    """
    tensors, _ = quantize(state, config, plain_rounding=True)
    return estimate_bytes(tensors)


@dataclass(frozen=True)
class CodeBytes:
    literal: int
    wrapped: int
    strict: int


@dataclass(frozen=True)
class Ledger:
    weights: dict[str, int]  # by role, as compressed; "all" where the codec makes one stream of it
    metadata: int
    code: CodeBytes

    def total(self, count: str) -> int:
        return sum(self.weights.values()) + self.metadata + getattr(self.code, count)

    def headroom(self, count: str) -> int:
        return CAP_BYTES - self.total(count)


def ledger(artifact: bytes, code: CodeBytes) -> Ledger:
    sizes = stream_bytes(artifact)
    return Ledger({role: size for role, size in sizes.items() if role != "metadata"}, sizes["metadata"], code)


def code_files(root: Path) -> dict[str, str]:
    """Name to text of the source files of a submission folder, or of one script."""
    if root.is_file():
        return {root.name: _text(root)}
    if not root.is_dir():
        raise UserError(f"code: nothing at {root}; give the submission's folder or its script")
    paths = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in CODE_SUFFIXES)
    visible = [p for p in paths if not any(part.startswith((".", "__pycache__")) for part in p.relative_to(root).parts)]
    return {p.relative_to(root).as_posix(): _text(p) for p in visible}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"code: {path}: not UTF-8 at byte {error.start}, so no source file; convert it, or leave it out") from None


def own_sources() -> dict[str, str]:
    """What a submission made of this package runs: the modules that its verbs import, first the one to start; recipes; native sources.

    Left out, as the records leave out their data scripts: what makes data sets, audits, benchmarks, reports. Native sources are there where
    this runs from a checkout.
    """
    package = Path(pgolf_fast.__file__).parent
    files = {f"{package.name}/{name}": text for name, text in code_files(package).items()}
    counted = _imported(files, [f"{package.name}/__main__.py", *(f"{package.name}/commands/{verb}.py" for verb in SUBMISSION_VERBS)])
    counted += [name for name in files if name.endswith(".toml")]
    native, build = package.parent / "csrc", package.parent / "setup.py"
    if native.is_dir():
        files |= {f"{native.name}/{name}": text for name, text in code_files(native).items()} | code_files(build)
    return {name: files[name] for name in [*counted, *(name for name in files if not name.startswith(f"{package.name}/"))]}


def _imported(files: dict[str, str], entries: list[str]) -> list[str]:
    """The entries and what they import, wherever the statement stands."""
    found, waiting = {}, entries
    while waiting:
        name, *waiting = waiting
        if name in found or name not in files:
            continue
        found[name] = True
        for node in ast.walk(ast.parse(files[name])):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for parts in (module.split(".") for module in modules):
                above = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]  # a module's packages are imported before it
                waiting = [*waiting, *(f"{path}{end}" for path in above for end in (".py", "/__init__.py"))]
    return list(found)


def count_code(files: dict[str, str]) -> CodeBytes:
    """`literal` counts the file named train_gpt.py, or the only file; without either, there is no main script and all files count."""
    sizes = {name: len(text.encode()) for name, text in files.items()}
    strict = sum(sizes.values())
    main = MAIN_SCRIPT if MAIN_SCRIPT in files else next(iter(files), "")
    return CodeBytes(literal=sizes.get(MAIN_SCRIPT, strict), wrapped=len(wrap(files, main)) if files else 0, strict=strict)


def wrap(files: dict[str, str], main: str) -> bytes:
    """One script that unpacks `files`, without their comments, into a temporary folder and runs `main` from there."""
    files = {name: without_comments(name, text) for name, text in files.items()}
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    packed = base64.b85encode(
        lzma.compress(json.dumps(files, ensure_ascii=False).encode(), lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=filters)
    )
    return (
        b"import base64,json,lzma,pathlib,runpy,sys,tempfile\n"
        b"with tempfile.TemporaryDirectory() as d:\n"
        b' for n,t in json.loads(lzma.decompress(base64.b85decode("' + packed + b'"))).items():\n'
        b"  p=pathlib.Path(d,n);p.parent.mkdir(parents=True,exist_ok=True);p.write_text(t,encoding='utf-8')\n"
        b" sys.path.insert(0,d);runpy.run_path(d+'/" + main.encode() + b"',run_name='__main__')\n"
    )


def without_comments(name: str, text: str) -> str:
    """The same program, a quarter smaller when compressed: Python without docstrings too, C without indentation."""
    if name.endswith(C_SUFFIXES):
        bare = STRING_OR_C_COMMENT.sub(lambda found: found[1] or " ", text)
        return "\n".join(line.strip() for line in bare.splitlines() if line.strip())
    if not name.endswith(".py"):
        return text
    try:
        tree = ast.parse(text)
    except SyntaxError:  # of another Python
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
