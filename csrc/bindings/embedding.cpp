// Registers the gather of table rows and the gradient of the table: check, fill the params, launch.
#include "kernels/embedding.h"

#include "bindings/checks.h"

namespace pgolf {
namespace {

bool is_float(const Tensor& t, const char* argument, int64_t width) {
    const bool is_float = t.scalar_type() == ScalarType::Float;
    check(t, argument, is_float ? ScalarType::Float : ScalarType::BFloat16, {-1, width});
    check_contiguous(t, argument);
    check_aligned(t, argument);
    STD_TORCH_CHECK(t.size(0) > 0 && t.size(0) <= INT32_MAX, argument, ": expected 1 to 2^31 rows, got ", t.size(0));
    return is_float;
}

__nv_bfloat16* rows(const Tensor& t, const char* argument, int64_t m) {
    __nv_bfloat16* const data = bf16s(t, argument, {m, -1});
    STD_TORCH_CHECK(m > 0 && m < (int64_t(1) << 31), argument, ": expected 1 to 2^31 rows, got ", m);
    const int64_t width = t.size(1);
    const bool width_fits = width > 0 && width % 8 == 0 && width <= 4096;
    STD_TORCH_CHECK(width_fits, argument, ": the kernel takes widths that are multiples of 8 up to 4096, got ", width);
    return data;
}

template <typename T>
T* list(const Tensor& t, const char* argument, ScalarType dtype, int64_t size) {
    check(t, argument, dtype, {size});
    check_contiguous(t, argument);
    return static_cast<T*>(t.data_ptr());
}

void fwd(Tensor indices, Tensor table, Tensor out, Tensor report) {
    EmbeddingFwdParams p{};
    const int64_t m = out.size(0);
    p.out = rows(out, "out", m);
    p.indices = list<int64_t>(indices, "indices", ScalarType::Long, m);
    p.is_float = is_float(table, "table", out.size(1));
    p.table = table.data_ptr();
    p.report = host_report(report);
    p.m = uint32_t(m), p.num_rows = int(table.size(0)), p.width = int(out.size(1));
    const OnDeviceOf here(table);
    check_launch(embedding_fwd(p, here.stream), "embedding_fwd");
}

void bwd(Tensor d_out, Tensor sorted, Tensor order, Tensor gradient, Tensor partial_sums) {
    EmbeddingBwdParams p{};
    const int64_t m = d_out.size(0), width = d_out.size(1), ranges = (m + kEmbeddingRange - 1) / kEmbeddingRange;
    p.d_out = rows(d_out, "d_out", m);
    p.sorted = list<int32_t>(sorted, "sorted", ScalarType::Int, m);
    p.order = list<int64_t>(order, "order", ScalarType::Long, m);
    p.is_float = is_float(gradient, "gradient", width);
    p.gradient = gradient.data_ptr();
    p.partial_sums = list<float>(partial_sums, "partial_sums", ScalarType::Float, 2 * ranges * width);
    check_aligned(partial_sums, "partial_sums");
    p.m = uint32_t(m), p.num_rows = int(gradient.size(0)), p.width = int(width);
    const OnDeviceOf here(d_out);
    check_launch(embedding_bwd(p, here.stream), "embedding_bwd");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def("embedding_fwd(Tensor indices, Tensor table, Tensor(a!) out, Tensor(b!) report) -> ()");
    m.def("embedding_bwd(Tensor d_out, Tensor sorted, Tensor order, Tensor(a!) gradient, Tensor(b!) partial_sums) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("embedding_fwd", TORCH_BOX(&pgolf::fwd));
    m.impl("embedding_bwd", TORCH_BOX(&pgolf::bwd));
}
