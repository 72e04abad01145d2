#include "kernels/qkv.h"

#include "bindings/checks.h"

namespace pgolf {
namespace {

template <class Params>
void fill(Params& p, const Tensor& qkv, const Tensor& gain, const Tensor& cos, const Tensor& sin, const Tensor& rstd, int64_t kv_heads) {
    const int64_t m = qkv.size(0), q_heads = gain.size(0), width = (q_heads + 2 * kv_heads) * kQkvHeadDim;
    STD_TORCH_CHECK(kv_heads >= 0, "kv_heads: expected 0 or more, got ", kv_heads);
    p.m = int_size(m, "qkv"), p.q_heads = int(q_heads), p.kv_heads = int(kv_heads);
    p.qkv = bf16s(qkv, "qkv", {m, width});
    p.gain = floats(gain, "gain", {q_heads});
    const int64_t positions = cos.size(0);
    STD_TORCH_CHECK(positions > 0 && positions <= kQkvMaxPositions, "cos: expected 1 to ", kQkvMaxPositions, " positions, got ", positions);
    p.positions = int(positions);
    p.cos = bf16s(cos, "cos", {p.positions, kQkvRotated / 2});
    p.sin = bf16s(sin, "sin", {p.positions, kQkvRotated / 2});
    p.rstd = floats(rstd, "rstd", {m, q_heads + kv_heads});
}

// Of the passes of their own, normalize and backward.
void check_heads(int normed_heads) {
    const bool fits = normed_heads > 0 && normed_heads <= kQkvMaxHeads;
    STD_TORCH_CHECK(fits, "rstd: the kernel takes up to ", kQkvMaxHeads, " query and key heads, got ", normed_heads);
}

void forward(Tensor n, Tensor weight, Tensor gain, Tensor cos, Tensor sin, int64_t kv_heads, Tensor qkv, Tensor rstd) {
    QkvForwardParams p{};
    fill(p, qkv, gain, cos, sin, rstd, kv_heads);
    p.width = int_size(n.size(1), "n");
    STD_TORCH_CHECK(p.width > 0 && p.width % 8 == 0, "n: the kernel takes widths that are multiples of 8, got ", p.width);
    p.n = bf16s(n, "n", {p.m, p.width});
    p.weight = bf16s(weight, "weight", {qkv.size(1), p.width});
    OnDeviceOf here(n);
    check_launch(qkv_forward(p, here.stream), "qkv_forward");
}

void normalize(Tensor qkv, Tensor gain, Tensor cos, Tensor sin, int64_t kv_heads, Tensor rstd) {
    QkvNormalizeParams p{};
    fill(p, qkv, gain, cos, sin, rstd, kv_heads);
    check_heads(p.q_heads + p.kv_heads);
    OnDeviceOf here(qkv);
    check_launch(qkv_normalize(p, here.stream), "qkv_normalize");
}

void backward(Tensor dqkv, Tensor qkv, Tensor rstd, Tensor gain, Tensor cos, Tensor sin, Tensor dgain) {
    QkvBackwardParams p{};
    fill(p, qkv, gain, cos, sin, rstd, rstd.size(1) - gain.size(0));
    check_heads(p.q_heads + p.kv_heads);
    p.dqkv = bf16s(dqkv, "dqkv", {p.m, qkv.size(1)});
    p.dgain = floats(dgain, "dgain", {p.q_heads});
    OnDeviceOf here(qkv);
    check_launch(qkv_backward(p, here.stream), "qkv_backward");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def("qkv_forward(Tensor n, Tensor weight, Tensor gain, Tensor cos, Tensor sin, int kv_heads, Tensor(a!) qkv, Tensor(b!) rstd) -> ()");
    m.def("qkv_normalize(Tensor(a!) qkv, Tensor gain, Tensor cos, Tensor sin, int kv_heads, Tensor(b!) rstd) -> ()");
    m.def("qkv_backward(Tensor(a!) dqkv, Tensor qkv, Tensor rstd, Tensor gain, Tensor cos, Tensor sin, Tensor(b!) dgain) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("qkv_forward", TORCH_BOX(&pgolf::forward));
    m.impl("qkv_normalize", TORCH_BOX(&pgolf::normalize));
    m.impl("qkv_backward", TORCH_BOX(&pgolf::backward));
}
