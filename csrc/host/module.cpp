// pgolf_fast._host: byte-level work on the CPU, without torch. One register_*() per source file.
#include <pybind11/pybind11.h>

namespace pgolf {
void register_caseops(pybind11::module_& m);
void register_int6(pybind11::module_& m);
void register_piece_spans(pybind11::module_& m);
void register_rowsort(pybind11::module_& m);
}

PYBIND11_MODULE(_host, m) {
    m.doc() = "Byte-level work on the CPU: no torch, no CUDA.";
    pgolf::register_caseops(m);
    pgolf::register_int6(m);
    pgolf::register_piece_spans(m);
    pgolf::register_rowsort(m);
}
