#include "kernels/attn_gate.h"

#include "bindings/checks.h"

namespace pgolf {
namespace {

AttnGateParams params(const Tensor& n, const Tensor& weight, double scale, const Tensor& gate) {
    AttnGateParams p{};
    const int64_t m = n.size(0), channels = n.size(1), window = weight.size(1);
    const bool widths_fit = window <= kGateMaxWindow && channels >= kGateMaxWindow && channels % 8 == 0;
    STD_TORCH_CHECK(widths_fit, "n, weight: the kernel takes a window of up to ", kGateMaxWindow,
                    " of at least as many channels, a multiple of 8");
    p.m = int_size(m, "n"), p.channels = int(channels), p.window = int(window), p.scale = float(scale);
    p.n = bf16s(n, "n", {m, channels});
    p.gate = bf16s(gate, "gate", {m, kGateHeads});
    p.weight = floats(weight, "weight", {kGateHeads, window});
    return p;
}

void fwd(Tensor n, Tensor weight, double scale, Tensor gate) {
    const AttnGateParams p = params(n, weight, scale, gate);
    OnDeviceOf here(n);
    check_launch(attn_gate_fwd(p, here.stream), "attn_gate_fwd");
}

void bwd(Tensor dgate, Tensor gate, Tensor n, Tensor weight, double scale, Tensor dn, Tensor dweight) {
    AttnGateParams p = params(n, weight, scale, gate);
    p.dgate = bf16s(dgate, "dgate", {p.m, kGateHeads});
    p.dn = bf16s(dn, "dn", {p.m, p.channels});
    p.dweight = floats(dweight, "dweight", {kGateHeads, p.window});
    OnDeviceOf here(n);
    check_launch(attn_gate_bwd(p, here.stream), "attn_gate_bwd");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def("attn_gate_fwd(Tensor n, Tensor weight, float scale, Tensor(a!) gate) -> ()");
    m.def("attn_gate_bwd(Tensor dgate, Tensor gate, Tensor n, Tensor weight, float scale, Tensor(a!) dn, Tensor(b!) dweight) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("attn_gate_fwd", TORCH_BOX(&pgolf::fwd));
    m.impl("attn_gate_bwd", TORCH_BOX(&pgolf::bwd));
}
