"""Builds the two native parts of pgolf_fast.

  pgolf_fast._host          pybind11 module, C++17, no torch, no CUDA; always built
  pgolf_fast/_C.abi3.so     the sm_90a kernels on libtorch's stable ABI; built where nvcc is,
                            with or without a GPU, against a CPU or CUDA build of torch

Environment:
  PGOLF_NO_CUDA=1           leave the kernels out
  PGOLF_KERNELS=a,b         only these kernel stems (the fast loop for one kernel)
  CUDA_HOME                 where nvcc is, if not on PATH or in /usr/local/cuda
  MAX_JOBS                  parallel compilations, if not one per 4 GB of RAM
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
GENCODE = "arch=compute_90a,code=sm_90a"  # NOTE: -arch=sm_90a also runs an sm_90 pass, which rejects wgmma
TORCH_TARGET = "0x020b000000000000"  # oldest torch served: 2.11
CALLS = {"linear_softcap_ce": "softcap_ce"}  # stems whose launch functions call another's: built together


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).exists()), None)


def toolkit_root(nvcc: str) -> Path:
    """Where nvcc's toolkit lies; asked of nvcc itself, which may be a wrapper script somewhere else."""
    report = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    here = next(line.split("=", 1)[1] for line in report.splitlines() if line.startswith("#$ _HERE_="))
    return Path(here).resolve().parent


def parallel_jobs() -> int:
    ram_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return int(os.environ.get("MAX_JOBS", max(1, min(os.cpu_count() or 1, int(ram_gb // 4)))))


def why_no_kernels() -> str | None:
    if os.environ.get("PGOLF_NO_CUDA") == "1":
        return "PGOLF_NO_CUDA=1"
    if find_nvcc() is None:
        return "no nvcc found (set CUDA_HOME to a CUDA 13 toolkit to build them)"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed here (its headers are needed)"
    return None


class KernelLibrary(Extension):
    """Every csrc/bindings/STEM.cpp with its csrc/kernels/STEM.cu and STEM_*.cu, in one shared library."""

    def __init__(self):
        stems = os.environ.get("PGOLF_KERNELS")
        bindings = sorted((ROOT / "csrc/bindings").glob("*.cpp"))
        if stems:
            chosen = set(stems.split(","))
            if unknown := chosen - {b.stem for b in bindings}:
                sys.exit(f"PGOLF_KERNELS: no {', '.join(sorted(unknown))}; there are {', '.join(b.stem for b in bindings)}")
            chosen |= {"build_info", *(CALLS[stem] for stem in chosen & CALLS.keys())}
            bindings = [b for b in bindings if b.stem in chosen]
        folder = ROOT / "csrc/kernels"
        kernels = [k for b in bindings for k in sorted([*folder.glob(f"{b.stem}.cu"), *folder.glob(f"{b.stem}_*.cu")])]
        super().__init__("pgolf_fast._C", [str(s.relative_to(ROOT)) for s in [*bindings, *kernels]], py_limited_api=True)


class Build(build_ext):
    def get_ext_filename(self, fullname):
        # Loaded by torch.ops.load_library, never by `import`: no interpreter version in its name.
        *package, name = fullname.split(".")
        return "/".join([*package, "_C.abi3.so"]) if name == "_C" else super().get_ext_filename(fullname)

    def build_extension(self, ext):
        if isinstance(ext, KernelLibrary):
            self.build_kernels(ext)
        else:
            super().build_extension(ext)

    def build_kernels(self, ext):
        torch_root = Path(importlib.util.find_spec("torch").origin).parent
        nvcc = find_nvcc()
        cuda_root = toolkit_root(nvcc)
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        work = ROOT / "build" / "kernels"
        work.mkdir(parents=True, exist_ok=True)
        include = f"-I{ROOT}/csrc"
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.split("release ")[1].split(",")[0]
        torch_version = (torch_root / "version.py").read_text().split("__version__ = '")[1].split("'")[0]
        build_info = f"sm_90a, nvcc {release}, torch {torch_version} headers"
        rules = [
            "ninja_required_version = 1.5",
            # The ptxas report (registers, spills) stays beside each object for the spill gate.
            f"rule nvcc\n  command = {nvcc} -std=c++17 -O3 -gencode {GENCODE} -Xptxas -v "
            f"-Xcompiler -fPIC,-fvisibility=hidden {include} -MD -MF $out.d -c $in -o $out > $out.log 2>&1 "
            "|| (cat $out.log; exit 1)\n  depfile = $out.d\n  deps = gcc\n  description = nvcc $in",
            f"rule cxx\n  command = g++ -std=c++17 -O2 -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION={TORCH_TARGET} -DUSE_CUDA "
            f"'-DPGOLF_BUILD_INFO=\"{build_info}\"' {include} "
            f"-I{torch_root}/include -I{cuda_root}/include -MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = g++ $in",
            # NOTE: --no-as-needed keeps libtorch in the dependency list although the linker sees no strong
            # reference; without it the weak stream symbol stays null under a CUDA build of torch.
            f"rule link\n  command = g++ -shared -o $out $in -L{torch_root}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 "
            f"-Wl,--as-needed -L{cuda_root}/lib64 -lcudart_static -ldl -lrt -lpthread\n  description = link $out",
        ]
        objects = []
        for source in ext.sources:
            obj = work / (source.replace("/", "_") + ".o")
            rules.append(f"build {obj}: {'nvcc' if source.endswith('.cu') else 'cxx'} {ROOT / source}")
            objects.append(str(obj))
        rules.append(f"build {out}: link {' '.join(objects)}\ndefault {out}\n")
        (work / "build.ninja").write_text("\n".join(rules))
        print(f"pgolf_fast: CUDA kernels for sm_90a with {nvcc}, {parallel_jobs()} jobs", flush=True)
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        if subprocess.run([*ninja, "-C", str(work), "-j", str(parallel_jobs())]).returncode:
            sys.exit("pgolf_fast: the kernels did not compile; the errors are above")


host = Extension(
    "pgolf_fast._host",
    [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/host").glob("*.cpp"))],
    include_dirs=[pybind11.get_include(), "csrc"],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden"],
    extra_link_args=["-s"],
    language="c++",
)
no_kernels = why_no_kernels()
if no_kernels:
    print(f"pgolf_fast: building without CUDA kernels: {no_kernels}", flush=True)
setup(ext_modules=[host] if no_kernels else [host, KernelLibrary()], cmdclass={"build_ext": Build})
