// Registers the head fused with the softcapped cross-entropy: check, fill the params, launch.
#include "kernels/linear_softcap_ce.h"

#include "bindings/softcap_ce_checks.h"

namespace pgolf {

// `g` of no elements: loss only.
static void linear_softcap_ce_fwd_cuda(const Tensor& x, const Tensor& weight, const Tensor& targets, const Tensor& loss, const Tensor& g,
                                       const Tensor& row_scale, const Tensor& scaled_x, const Tensor& workspace, const Tensor& report,
                                       double cap, int64_t reduction, int64_t ignore_index) {
    LinearSoftcapCEParams p{};
    p.x = bf16s(x, "x", {-1, kLinearSoftcapCEDepth});
    p.weight = bf16s(weight, "weight", {-1, kLinearSoftcapCEDepth});
    const int64_t n = x.size(0), v = weight.size(0), multiple = kLinearSoftcapCEVocabularyMultiple;
    STD_TORCH_CHECK(n > 0 && n < (int64_t(1) << 31) && v < (int64_t(1) << 30), "x, weight: empty or too large");
    STD_TORCH_CHECK(v > 0 && v % multiple == 0, "weight: expected a multiple of ", multiple, " rows, got ", v);
    STD_TORCH_CHECK(cap > 0 && cap <= kLinearSoftcapCEMaxCap, "cap: expected in (0, ", kLinearSoftcapCEMaxCap, "]");
    check_loss_arguments(targets, loss, workspace, reduction, n);
    if (g.numel() > 0) {
        p.g = bf16s(g, "g", {n, v});
        p.row_scale = floats(row_scale, "row_scale", {n});
        p.scaled_x = bf16s(scaled_x, "scaled_x", {n, kLinearSoftcapCEDepth});
    }
    p.targets = static_cast<const int64_t*>(targets.data_ptr());
    p.loss = static_cast<float*>(loss.data_ptr());
    p.workspace = static_cast<SoftcapCEWorkspace*>(workspace.data_ptr());
    p.report = host_report(report);
    p.n = uint32_t(n);
    p.v = int32_t(v);
    p.ignore_index = ignore_index;
    p.cap = float(cap);
    p.reduction = SoftcapCEReduction(reduction);
    const OnDeviceOf device(x);
    check_launch(linear_softcap_ce_fwd(p, device.stream), "linear_softcap_ce_fwd");
}

static void linear_softcap_ce_dx_cuda(const Tensor& g, const Tensor& weight, const Tensor& row_scale, const Tensor& grad_loss,
                                      const Tensor& dx) {
    LinearSoftcapCEDxParams p{};
    p.g = bf16s(g, "g", {-1, -1});
    const int64_t n = g.size(0), v = g.size(1);
    STD_TORCH_CHECK(v > 0 && v % 8 == 0 && v < (int64_t(1) << 30), "g: expected a multiple of 8 columns, got ", v);
    p.n = int_size(n, "g"), p.v = int(v);
    p.weight = bf16s(weight, "weight", {p.v, kLinearSoftcapCEDepth});
    p.dx = bf16s(dx, "dx", {p.n, kLinearSoftcapCEDepth});
    p.row_scale = floats(row_scale, "row_scale", {p.n});
    const bool one = grad_loss.dim() == 0;
    if (one) check(grad_loss, "grad_loss", ScalarType::Float, {});
    else check(grad_loss, "grad_loss", ScalarType::Float, {p.n});
    p.grad_loss = static_cast<const float*>(grad_loss.data_ptr());
    const int64_t stride = one ? 0 : grad_loss.stride(0);
    STD_TORCH_CHECK(p.n <= 1 || stride <= INT32_MAX, "grad_loss: expected a stride below 2^31, got ", stride, "; contiguous() gives it");
    p.grad_stride = int(stride);
    const OnDeviceOf device(g);
    check_launch(linear_softcap_ce_dx(p, device.stream), "linear_softcap_ce_dx");
}

}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def(
        "linear_softcap_ce_fwd(Tensor x, Tensor weight, Tensor targets, Tensor(a!) loss, Tensor(b!) g, Tensor(c!) row_scale, "
        "Tensor(d!) scaled_x, Tensor(e!) workspace, Tensor(f!) report, float cap, int reduction, int ignore_index) -> ()");
    m.def("linear_softcap_ce_dx(Tensor g, Tensor weight, Tensor row_scale, Tensor grad_loss, Tensor(a!) dx) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("linear_softcap_ce_fwd", TORCH_BOX(&pgolf::linear_softcap_ce_fwd_cuda));
    m.impl("linear_softcap_ce_dx", TORCH_BOX(&pgolf::linear_softcap_ce_dx_cuda));
}
