// int6 codes to and from packed bytes; the layout is drawn in kernels/int6_layout.h.
#include "kernels/int6_layout.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace pgolf {

using Codes = py::array_t<int8_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

Bytes int6_pack_codes(const Codes& codes) {
    if (codes.ndim() != 2) throw std::invalid_argument("codes: expected [rows, columns] of int8");
    const int64_t rows = codes.shape(0), columns = codes.shape(1), row_bytes = int6_row_bytes(columns);
    Bytes packed({rows, row_bytes});
    const int8_t* src = codes.data();
    uint8_t* dst = packed.mutable_data();
    bool in_range = true;
    {
        py::gil_scoped_release release;
        for (int64_t r = 0; r < rows; ++r, src += columns, dst += row_bytes) {
            for (int64_t c = 0; c < columns; c += 4) {
                uint32_t group = 0;
                for (int64_t i = 0; i < 4 && c + i < columns; ++i) {
                    in_range &= src[c + i] >= -kInt6Bias && src[c + i] < kInt6Bias;
                    group |= uint32_t((src[c + i] + kInt6Bias) & 63) << (6 * i);
                }
                for (int64_t b = c / 4 * 3; b < c / 4 * 3 + 3 && b < row_bytes; ++b, group >>= 8) dst[b] = uint8_t(group);
            }
        }
    }
    if (!in_range) throw std::invalid_argument("codes: a value lies outside [-32, 31]");
    return packed;
}

Codes int6_unpack_codes(const Bytes& packed, int64_t columns) {
    if (packed.ndim() != 2) throw std::invalid_argument("packed: expected [rows, bytes] of uint8");
    if (columns < 0 || packed.shape(1) != int6_row_bytes(columns))
        throw std::invalid_argument("columns: does not match the " + std::to_string(packed.shape(1)) + " bytes of a row");
    const int64_t rows = packed.shape(0), row_bytes = packed.shape(1);
    Codes codes({rows, columns});
    const uint8_t* src = packed.data();
    int8_t* dst = codes.mutable_data();
    py::gil_scoped_release release;
    for (int64_t r = 0; r < rows; ++r, src += row_bytes, dst += columns) {
        for (int64_t c = 0; c < columns; c += 4) {
            uint32_t group = 0;
            const int64_t first = c / 4 * 3;
            for (int64_t b = 0; b < 3 && first + b < row_bytes; ++b) group |= uint32_t(src[first + b]) << (8 * b);
            for (int64_t i = 0; i < 4 && c + i < columns; ++i) dst[c + i] = int8_t(int((group >> (6 * i)) & 63) - kInt6Bias);
        }
    }
    return codes;
}

void register_int6(py::module_& m) {
    m.def("int6_pack_codes", &int6_pack_codes, py::arg("codes").noconvert(),
          "int8 codes [rows, columns] to packed uint8 [rows, ceil(6 columns / 8)]");
    m.def("int6_unpack_codes", &int6_unpack_codes, py::arg("packed").noconvert(), py::arg("columns"), "the inverse");
}

}  // namespace pgolf
