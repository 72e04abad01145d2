// torch.ops.pgolf_fast_sm90.int6_pack and int6_unpack: lists of matrices to and from two flat buffers.
#include "kernels/int6_pack.h"

#include <climits>
#include <vector>

#include "bindings/checks.h"

namespace pgolf {

constexpr int64_t kMaxColumns = INT_MAX - 65536;  // the kernels add what a block holds of a row to a column

static Int6Float float_type(const Tensor& t, const char* argument) {
    switch (t.scalar_type()) {
        case ScalarType::BFloat16: return Int6Float::kBFloat16;
        case ScalarType::Half: return Int6Float::kFloat16;
        case ScalarType::Float: return Int6Float::kFloat32;
        default: STD_TORCH_CHECK(false, argument, ": expected bfloat16, float16 or float32");
    }
}

// The next `count` elements of a flat output, of which `used` are taken already.
template <typename T>
static T* take(const Tensor& flat, const char* argument, int64_t& used, int64_t count) {
    T* begin = static_cast<T*>(flat.mutable_data_ptr()) + used;
    used += count;
    STD_TORCH_CHECK(used <= flat.numel(), argument, ": too small for the list");
    return begin;
}

static void pack(std::vector<Tensor> weights, std::vector<Tensor> given_scales, Tensor packed, Tensor scales) {
    STD_TORCH_CHECK(!weights.empty(), "weights: the list is empty");
    STD_TORCH_CHECK(given_scales.empty() || given_scales.size() == weights.size(), "given_scales: expected one per matrix, or none");
    check(packed, "packed", ScalarType::Byte, {-1});
    check(scales, "scales", ScalarType::Half, {-1});
    check_contiguous(packed, "packed");
    check_contiguous(scales, "scales");
    const Int6Float type = float_type(weights[0], "weights");
    std::vector<Int6PackMatrix> matrices(weights.size());
    int64_t bytes_used = 0, rows_used = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
        const Tensor& w = weights[i];
        check(w, "weights", weights[0].scalar_type(), {-1, -1});
        STD_TORCH_CHECK(w.get_device_index() == packed.get_device_index(), "weights: on another device than the output");
        STD_TORCH_CHECK(w.size(0) <= INT_MAX && w.size(1) <= kMaxColumns, "weights: 2^31 rows, or 2^31 - 2^16 columns, or more");
        STD_TORCH_CHECK(w.size(1) <= 1 || w.stride(1) == 1, "weights: expected neighbouring columns to be neighbours in memory");
        if (!given_scales.empty()) {
            check(given_scales[i], "given_scales", ScalarType::Half, {w.size(0)});
            check_contiguous(given_scales[i], "given_scales");
            const bool same_device = given_scales[i].get_device_index() == packed.get_device_index();
            STD_TORCH_CHECK(same_device, "given_scales: on another device than the output");
        }
        matrices[i] = {w.const_data_ptr(),
                       given_scales.empty() ? nullptr : static_cast<const uint16_t*>(given_scales[i].const_data_ptr()),
                       take<uint8_t>(packed, "packed", bytes_used, w.size(0) * int6_row_bytes(w.size(1))),
                       take<uint16_t>(scales, "scales", rows_used, w.size(0)),
                       w.stride(0),
                       int32_t(w.size(0)),
                       int32_t(w.size(1))};
    }
    OnDeviceOf on(packed);
    check_launch(int6_pack(matrices.data(), int64_t(matrices.size()), type, on.stream), "int6_pack");
}

static void unpack(std::vector<Tensor> packed, std::vector<Tensor> scales, std::vector<int64_t> columns, Tensor weights) {
    STD_TORCH_CHECK(packed.size() == scales.size() && packed.size() == columns.size(), "packed, scales, columns: expected equal lengths");
    STD_TORCH_CHECK(weights.is_cuda() && weights.is_contiguous(), "weights: expected a contiguous CUDA tensor");
    const Int6Float type = float_type(weights, "weights");
    std::vector<Int6UnpackMatrix> matrices(packed.size());
    int64_t used = 0;
    for (size_t i = 0; i < packed.size(); ++i) {
        const int64_t rows = packed[i].size(0);
        STD_TORCH_CHECK(rows <= INT_MAX && columns[i] >= 0 && columns[i] <= kMaxColumns, "columns: outside [0, 2^31 - 2^16), or 2^31 rows");
        check(packed[i], "packed", ScalarType::Byte, {-1, int6_row_bytes(columns[i])});
        check_contiguous(packed[i], "packed");
        check(scales[i], "scales", ScalarType::Half, {rows});
        check_contiguous(scales[i], "scales");
        STD_TORCH_CHECK(packed[i].get_device_index() == weights.get_device_index(), "packed: on another device than the output");
        STD_TORCH_CHECK(scales[i].get_device_index() == weights.get_device_index(), "scales: on another device than the output");
        const int64_t element_bytes = type == Int6Float::kFloat32 ? 4 : 2;
        matrices[i] = {static_cast<const uint8_t*>(packed[i].const_data_ptr()), static_cast<const uint16_t*>(scales[i].const_data_ptr()),
                       static_cast<uint8_t*>(weights.mutable_data_ptr()) + used * element_bytes, int32_t(rows), int32_t(columns[i])};
        used += rows * columns[i];
    }
    STD_TORCH_CHECK(used == weights.numel(), "weights: expected ", used, " elements, got ", weights.numel());
    OnDeviceOf on(weights);
    check_launch(int6_unpack(matrices.data(), int64_t(matrices.size()), type, on.stream), "int6_unpack");
}

}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def("int6_pack(Tensor[] weights, Tensor[] given_scales, Tensor(a!) packed, Tensor(b!) scales) -> ()");
    m.def("int6_unpack(Tensor[] packed, Tensor[] scales, int[] columns, Tensor(a!) weights) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("int6_pack", TORCH_BOX(&pgolf::pack));
    m.impl("int6_unpack", TORCH_BOX(&pgolf::unpack));
}
