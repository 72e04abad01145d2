// Registers the head fused with the softcapped cross-entropy: check, fill the params, launch.
#include "kernels/linear_softcap_ce.h"

#include <tuple>

#include "bindings/softcap_ce_checks.h"

namespace pgolf {

// `g` of no elements: loss only.
static void linear_softcap_ce_fwd_cuda(const Tensor& x, const Tensor& weight, const Tensor& targets, const Tensor& loss, const Tensor& g,
                                       const Tensor& row_scale, const Tensor& scaled_x, const Tensor& workspace, const Tensor& report,
                                       double cap, int64_t reduction, int64_t ignore_index) {
    check(x, "x", ScalarType::BFloat16, {-1, kLinearSoftcapCEDepth});
    check_contiguous(x, "x");
    check_aligned(x, "x");
    const int64_t n = x.size(0), v = weight.size(0);
    STD_TORCH_CHECK(n > 0 && n < (int64_t(1) << 31) && v < (int64_t(1) << 30), "x, weight: empty or too large");
    check(weight, "weight", ScalarType::BFloat16, {v, kLinearSoftcapCEDepth});
    check_contiguous(weight, "weight");
    check_aligned(weight, "weight");
    STD_TORCH_CHECK(v % kLinearSoftcapCEVocabularyMultiple == 0, "weight: expected a multiple of ", kLinearSoftcapCEVocabularyMultiple, " rows");
    STD_TORCH_CHECK(cap > 0 && cap <= kLinearSoftcapCEMaxCap, "cap: expected in (0, ", kLinearSoftcapCEMaxCap, "]");
    check_loss_arguments(targets, loss, workspace, report, reduction, n);
    const bool with_grad = g.numel() > 0;
    if (with_grad) {
        check(g, "g", ScalarType::BFloat16, {n, v});
        check_contiguous(g, "g");
        check_aligned(g, "g");
        check(row_scale, "row_scale", ScalarType::Float, {n});
        check(scaled_x, "scaled_x", ScalarType::BFloat16, {n, kLinearSoftcapCEDepth});
        check_contiguous(scaled_x, "scaled_x");
        check_aligned(scaled_x, "scaled_x");
    }

    LinearSoftcapCEParams p{};
    p.x = static_cast<const __nv_bfloat16*>(x.data_ptr());
    p.weight = static_cast<const __nv_bfloat16*>(weight.data_ptr());
    p.targets = static_cast<const int64_t*>(targets.data_ptr());
    p.loss = static_cast<float*>(loss.data_ptr());
    p.g = with_grad ? static_cast<__nv_bfloat16*>(g.data_ptr()) : nullptr;
    p.row_scale = with_grad ? static_cast<float*>(row_scale.data_ptr()) : nullptr;
    p.scaled_x = with_grad ? static_cast<__nv_bfloat16*>(scaled_x.data_ptr()) : nullptr;
    p.workspace = static_cast<SoftcapCEWorkspace*>(workspace.data_ptr());
    p.report = static_cast<int64_t*>(report.data_ptr());
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
    const int64_t n = g.size(0), v = g.size(1), depth = kLinearSoftcapCEDepth;
    for (const auto& [tensor, argument, rows, columns] : {std::tuple{&g, "g", n, v}, {&weight, "weight", v, depth}, {&dx, "dx", n, depth}}) {
        check(*tensor, argument, ScalarType::BFloat16, {rows, columns});
        check_contiguous(*tensor, argument);
        check_aligned(*tensor, argument);
    }
    STD_TORCH_CHECK(n < (int64_t(1) << 31) && v < (int64_t(1) << 30), "g: too large");
    check(row_scale, "row_scale", ScalarType::Float, {n});
    check_contiguous(row_scale, "row_scale");
    const bool one = grad_loss.dim() == 0;
    if (one) check(grad_loss, "grad_loss", ScalarType::Float, {});
    else check(grad_loss, "grad_loss", ScalarType::Float, {n});

    LinearSoftcapCEDxParams p{};
    p.g = static_cast<const __nv_bfloat16*>(g.data_ptr());
    p.weight = static_cast<const __nv_bfloat16*>(weight.data_ptr());
    p.row_scale = static_cast<const float*>(row_scale.data_ptr());
    p.grad_loss = static_cast<const float*>(grad_loss.data_ptr());
    p.dx = static_cast<__nv_bfloat16*>(dx.data_ptr());
    p.n = int(n);
    p.v = int(v);
    p.grad_stride = one ? 0 : int(grad_loss.stride(0));
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
