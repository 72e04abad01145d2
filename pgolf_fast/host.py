"""The C++ byte-level module `_host`, or in its place something that says how to build it once it is needed."""

from pgolf_fast.errors import UserError


class _NotBuilt:
    def __getattr__(self, name: str):
        raise UserError(f"{name}: the _host module is not built; `pip install --no-build-isolation .` with a C++17 compiler builds it")


try:
    from pgolf_fast import _host as host
except ImportError:
    host = _NotBuilt()
