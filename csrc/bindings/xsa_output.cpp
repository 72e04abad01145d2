// Registers the backward of the attention's output projection: check, fill the params, launch.
#include "kernels/xsa_output.h"

#include "bindings/xsa_checks.h"

namespace pgolf {
namespace {

// [B, T, heads, 64] that is a matrix of B T rows, `stride` elements apart.
__nv_bfloat16* head_matrix(const Tensor& t, const char* argument, const XsaOutputBwdParams& p, int64_t heads, int64_t* stride) {
    check(t, argument, ScalarType::BFloat16, {p.batch, p.tokens, heads, kXsaHeadDim});
    check_aligned(t, argument);
    STD_TORCH_CHECK(t.stride(3) == 1 && t.stride(2) == kXsaHeadDim, argument, ": the heads of a token must be contiguous");
    const bool equally_spaced = t.stride(1) % 8 == 0 && (p.batch == 1 || t.stride(0) == p.tokens * t.stride(1));
    STD_TORCH_CHECK(equally_spaced, argument, ": expected equally spaced tokens, 16-byte aligned");
    *stride = t.stride(1);
    return static_cast<__nv_bfloat16*>(t.data_ptr());
}

void bwd(Tensor d_projected, Tensor weight, Tensor out, Tensor v, optional<Tensor> gate, Tensor lse, Tensor own,
         optional<Tensor> places, Tensor dq, Tensor dk, Tensor dv, optional<Tensor> dgate, Tensor dy, Tensor stats, bool xsa) {
    const int64_t batch = out.size(0), tokens = out.size(1), q_heads = out.size(2), kv_heads = v.size(2), width = weight.size(0);
    STD_TORCH_CHECK(q_heads == kXsaOutputGroup * kv_heads, "v: expected half as many heads as out");
    int_size(batch * tokens, "out");
    STD_TORCH_CHECK(width > 0 && width % 8 == 0, "weight: the kernel takes widths that are multiples of 8, got ", width);
    XsaOutputBwdParams p{};
    p.batch = int(batch), p.tokens = int(tokens), p.q_heads = int(q_heads), p.width = int_size(width, "weight"), p.xsa = xsa;
    p.d_projected = bf16s(d_projected, "d_projected", {batch * tokens, width});
    p.weight = bf16s(weight, "weight", {width, q_heads * kXsaHeadDim});
    p.out = bf16s(out, "out", {batch, tokens, q_heads, kXsaHeadDim});
    p.dy = bf16s(dy, "dy", {batch, tokens, q_heads, kXsaHeadDim});
    p.v = head_matrix(v, "v", p, kv_heads, &p.v_stride);
    int64_t stride;
    p.dq = head_matrix(dq, "dq", p, q_heads, &p.gradient_stride);
    p.dk = head_matrix(dk, "dk", p, kv_heads, &stride);
    STD_TORCH_CHECK(stride == p.gradient_stride, "dk: expected the stride of dq");
    p.dv = head_matrix(dv, "dv", p, kv_heads, &stride);
    STD_TORCH_CHECK(stride == p.gradient_stride, "dv: expected the stride of dq");
    if (gate) {
        STD_TORCH_CHECK(dgate.has_value(), "dgate: goes with gate");
        p.gate = bf16s(*gate, "gate", {batch, tokens, q_heads});
        p.dgate = bf16s(*dgate, "dgate", {batch, tokens, q_heads});
    }
    p.lse = floats(lse, "lse", {batch, q_heads, tokens});
    p.own = floats(own, "own", {batch, q_heads, tokens});
    p.places = places_of(places, batch * tokens);
    p.stats_width = stats.size(-1);
    STD_TORCH_CHECK(p.stats_width % 4 == 0 && p.stats_width >= tokens, "stats: too narrow");
    p.stats = floats(stats, "stats", {batch * q_heads, 2, p.stats_width});
    OnDeviceOf here(out);
    check_launch(xsa_output_bwd(p, here.stream), "xsa_output_bwd");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def(
        "xsa_output_bwd(Tensor d_projected, Tensor weight, Tensor out, Tensor v, Tensor? gate, Tensor lse, Tensor own, Tensor? places, "
        "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dgate, Tensor(e!) dy, Tensor(f!) stats, bool xsa) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) { m.impl("xsa_output_bwd", TORCH_BOX(&pgolf::bwd)); }
