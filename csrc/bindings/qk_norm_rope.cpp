// Registers the attention's input stage: check, fill the params, launch.
#include "kernels/qk_norm_rope.h"

#include <optional>

#include "bindings/checks.h"

namespace pgolf {
namespace {

using std::optional;

QkRows rows_of(const Tensor& t, const char* argument, int64_t m, int64_t columns) {
    check(t, argument, ScalarType::BFloat16, {m, -1});
    check_aligned(t, argument);
    STD_TORCH_CHECK(t.size(1) >= columns, argument, ": expected at least ", columns, " columns, got ", t.size(1));
    const bool is_readable = t.stride(1) == 1 && (m == 1 || t.stride(0) % 8 == 0);
    STD_TORCH_CHECK(is_readable, argument, ": expected rows of contiguous elements, a multiple of 8 apart");
    return {static_cast<__nv_bfloat16*>(t.data_ptr()), t.stride(0)};
}

const __nv_bfloat16* table(const Tensor& t, const char* argument, int64_t positions) {
    check(t, argument, ScalarType::BFloat16, {positions, kQkHalf});
    check_contiguous(t, argument);
    check_aligned(t, argument);
    return static_cast<const __nv_bfloat16*>(t.data_ptr());
}

float* floats(const Tensor& t, const char* argument, std::initializer_list<int64_t> shape) {
    check(t, argument, ScalarType::Float, shape);
    check_contiguous(t, argument);
    return static_cast<float*>(t.data_ptr());
}

// What both directions share.
QkNormRopeParams params(const Tensor& qkv, const Tensor& gain, const Tensor& cos, const Tensor& sin, int64_t kv_heads, const Tensor& q,
                        const Tensor& k, const optional<Tensor>& v) {
    QkNormRopeParams p{};
    const int64_t m = qkv.size(0), q_heads = gain.size(0), positions = cos.size(0);
    STD_TORCH_CHECK(m > 0 && m < (int64_t(1) << 31), "qkv: expected 1 to 2^31 rows, got ", m);
    const bool heads_fit = q_heads > 0 && kv_heads > 0 && q_heads + 2 * kv_heads <= kQkMaxHeads;
    STD_TORCH_CHECK(heads_fit, "gain: the kernel takes up to ", kQkMaxHeads, " heads of queries, keys and values in all");
    STD_TORCH_CHECK(positions > 0 && positions < (int64_t(1) << 31), "cos: expected 1 to 2^31 positions, got ", positions);
    p.m = uint32_t(m), p.positions = uint32_t(positions);
    p.q_heads = int(q_heads), p.kv_heads = int(kv_heads);
    p.qkv = rows_of(qkv, "qkv", m, (q_heads + 2 * kv_heads) * kQkHeadDim);
    p.gain = floats(gain, "gain", {q_heads});
    p.cos = table(cos, "cos", positions);
    p.sin = table(sin, "sin", positions);
    p.q = rows_of(q, "q", m, q_heads * kQkHeadDim);
    p.k = rows_of(k, "k", m, kv_heads * kQkHeadDim);
    if (v) p.v = rows_of(*v, "v", m, kv_heads * kQkHeadDim);
    return p;
}

void fwd(Tensor qkv, Tensor gain, Tensor cos, Tensor sin, int64_t kv_heads, optional<Tensor> value_add, Tensor q, Tensor k,
         optional<Tensor> v) {
    QkNormRopeParams p = params(qkv, gain, cos, sin, kv_heads, q, k, v);
    STD_TORCH_CHECK(v.has_value() == value_add.has_value(), "v: goes with value_add");
    if (value_add) p.value_add = rows_of(*value_add, "value_add", p.m, kv_heads * kQkHeadDim);
    const OnDeviceOf here(qkv);
    check_launch(qk_norm_rope_fwd(p, here.stream), "qk_norm_rope_fwd");
}

void bwd(Tensor dq, Tensor dk, optional<Tensor> dv, Tensor qkv, Tensor gain, Tensor cos, Tensor sin, int64_t kv_heads, Tensor d_qkv,
         Tensor partial_sums, Tensor d_gain) {
    QkNormRopeParams p = params(qkv, gain, cos, sin, kv_heads, dq, dk, dv);
    p.d_qkv = rows_of(d_qkv, "d_qkv", p.m, (p.q_heads + 2 * p.kv_heads) * kQkHeadDim);
    p.partial_sums = floats(partial_sums, "partial_sums", {kQkMaxCtas, p.q_heads});
    p.d_gain = floats(d_gain, "d_gain", {p.q_heads});
    const OnDeviceOf here(qkv);
    check_launch(qk_norm_rope_bwd(p, here.stream), "qk_norm_rope_bwd");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def(
        "qk_norm_rope_fwd(Tensor qkv, Tensor gain, Tensor cos, Tensor sin, int num_kv_heads, Tensor? value_add, Tensor(a!) q, "
        "Tensor(b!) k, Tensor(c!)? v) -> ()");
    m.def(
        "qk_norm_rope_bwd(Tensor dq, Tensor dk, Tensor? dv, Tensor qkv, Tensor gain, Tensor cos, Tensor sin, int num_kv_heads, "
        "Tensor(a!) d_qkv, Tensor(b!) partial_sums, Tensor(c!) d_gain) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("qk_norm_rope_fwd", TORCH_BOX(&pgolf::fwd));
    m.impl("qk_norm_rope_bwd", TORCH_BOX(&pgolf::bwd));
}
