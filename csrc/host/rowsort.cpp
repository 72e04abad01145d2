// Similarity order of a matrix's rows: a greedy chain in L1, so that a general compressor finds like rows side by side.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace pgolf {

// Bytes, not int8: the compiler turns this form into the sum-of-absolute-differences instruction.
static uint32_t l1_distance(const uint8_t* a, const uint8_t* b, int64_t n) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += uint32_t(std::abs(int(a[i]) - int(b[i])));
    return sum;
}

// order[k] is the row at place k. Starts at row 0; each next row is the unused one nearest to the last in L1, the lowest index on a tie.
py::array_t<int32_t> similarity_order(const py::array_t<int8_t, py::array::c_style>& codes) {
    if (codes.ndim() != 2) throw std::invalid_argument("codes: expected [rows, columns] of int8");
    const int64_t rows = codes.shape(0), columns = codes.shape(1);
    if (columns > (int64_t(1) << 24)) throw std::invalid_argument("codes: more than 2^24 columns");
    py::array_t<int32_t> order(rows);
    int32_t* out = order.mutable_data();
    const int8_t* src = codes.data();
    py::gil_scoped_release release;
    if (rows == 0) return order;
    std::vector<uint8_t> shifted(rows * columns);
    for (size_t i = 0; i < shifted.size(); ++i) shifted[i] = uint8_t(src[i] + 128);
    std::vector<int32_t> unused(rows - 1);  // in rising order, so that the first of equals is the lowest
    std::iota(unused.begin(), unused.end(), 1);
    out[0] = 0;
    for (int64_t k = 1; k < rows; ++k) {
        const uint8_t* last = shifted.data() + out[k - 1] * columns;
        uint32_t least = UINT32_MAX;
        size_t nearest = 0;
        for (size_t i = 0; i < unused.size(); ++i) {
            const uint32_t distance = l1_distance(last, shifted.data() + unused[i] * columns, columns);
            if (distance < least) least = distance, nearest = i;
        }
        out[k] = unused[nearest];
        unused.erase(unused.begin() + nearest);
    }
    return order;
}

void register_rowsort(py::module_& m) {
    m.def("similarity_order", &similarity_order, py::arg("codes").noconvert(),
          "greedy L1 nearest-neighbour order of the rows of int8 codes");
}

}  // namespace pgolf
