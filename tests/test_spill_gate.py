"""The spill gate of .ci: reads ptxas reports, and lets nothing pass that no header announces."""

import importlib.util
from pathlib import Path

path = Path(__file__).parent.parent / ".ci" / "spills.py"
spec = importlib.util.spec_from_file_location("spills", path)
gate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gate)

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_90a'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z3badv' for 'sm_90a'
ptxas info    : Function properties for _Z3badv
    32 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
"""


def test_it_reads_the_report():
    assert list(gate.spills(REPORT)) == [("_Z4goodv", 0), ("_Z3badv", 40)]


def test_announcements_need_a_reason():
    assert gate.ANNOUNCED.search("// SPILLS bad 40: cold path, once per launch")
    assert not gate.ANNOUNCED.search("// SPILLS bad 40")
