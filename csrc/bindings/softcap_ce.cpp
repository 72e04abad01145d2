// Registers the softcapped cross-entropy: check, fill the params, launch.
#include "kernels/softcap_ce.h"

#include "bindings/softcap_ce_checks.h"

namespace pgolf {

// `grad_logits` of no elements: no gradient wanted.
static void softcap_ce_fwd_cuda(const Tensor& logits, const Tensor& targets, const Tensor& loss, const Tensor& grad_logits,
                                const Tensor& workspace, const Tensor& report, double cap, int64_t reduction, int64_t ignore_index) {
    check(logits, "logits", ScalarType::BFloat16, {-1, -1});
    const int64_t n = logits.size(0), v = logits.size(1);
    STD_TORCH_CHECK(n < (int64_t(1) << 31) && v < (int64_t(1) << 30), "logits: too large");
    STD_TORCH_CHECK(logits.stride(1) == 1 || v == 1, "logits: expected contiguous rows");
    check_loss_arguments(targets, loss, workspace, reduction, n);
    const bool with_grad = grad_logits.numel() > 0;
    if (with_grad) {
        check(grad_logits, "grad_logits", ScalarType::BFloat16, {n, v});
        check_contiguous(grad_logits, "grad_logits");
    }

    SoftcapCEParams p{};
    p.logits = static_cast<const __nv_bfloat16*>(logits.data_ptr());
    p.targets = static_cast<const int64_t*>(targets.data_ptr());
    p.loss = static_cast<float*>(loss.data_ptr());
    p.grad_logits = with_grad ? static_cast<__nv_bfloat16*>(grad_logits.data_ptr()) : nullptr;
    p.workspace = static_cast<SoftcapCEWorkspace*>(workspace.data_ptr());
    p.report = host_report(report);
    p.n = uint32_t(n);
    p.v = int32_t(v);
    p.row_stride = logits.stride(0);
    p.ignore_index = ignore_index;
    p.cap = float(cap);
    p.reduction = SoftcapCEReduction(reduction);
    const OnDeviceOf device(logits);
    check_launch(softcap_ce_fwd(p, device.stream), "softcap_ce_fwd");
}

static void softcap_ce_scale_cuda(const Tensor& grad_logits, const Tensor& scale) {
    check(grad_logits, "grad_logits", ScalarType::BFloat16, {-1, -1});
    check_contiguous(grad_logits, "grad_logits");
    check_aligned(grad_logits, "grad_logits");
    const bool per_row = scale.dim() == 1;
    if (per_row) check(scale, "scale", ScalarType::Float, {grad_logits.size(0)});
    else check(scale, "scale", ScalarType::Float, {});

    SoftcapCEScaleParams p{};
    p.grad_logits = static_cast<__nv_bfloat16*>(grad_logits.data_ptr());
    p.scale = static_cast<const float*>(scale.data_ptr());
    p.n = grad_logits.size(0);
    p.v = grad_logits.size(1);
    p.scale_stride = per_row ? scale.stride(0) : 0;
    const OnDeviceOf device(grad_logits);
    check_launch(softcap_ce_scale(p, device.stream), "softcap_ce_scale_");
}

}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def(
        "softcap_ce_fwd(Tensor logits, Tensor targets, Tensor(a!) loss, Tensor(b!) grad_logits, Tensor(c!) workspace, Tensor(d!) report, "
        "float cap, int reduction, int ignore_index) -> ()");
    m.def("softcap_ce_scale_(Tensor(a!) grad_logits, Tensor scale) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("softcap_ce_fwd", TORCH_BOX(&pgolf::softcap_ce_fwd_cuda));
    m.impl("softcap_ce_scale_", TORCH_BOX(&pgolf::softcap_ce_scale_cuda));
}
