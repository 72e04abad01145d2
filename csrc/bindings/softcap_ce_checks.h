// What the two softcapped cross-entropies, on logits and with the head, take alike.
#pragma once
#include "bindings/checks.h"
#include "kernels/softcap_ce.h"

namespace pgolf {

inline void check_loss_arguments(const Tensor& targets, const Tensor& loss, const Tensor& workspace, int64_t reduction, int64_t n) {
    check(targets, "targets", ScalarType::Long, {n});
    check_contiguous(targets, "targets");
    check(workspace, "workspace", ScalarType::Byte, {-1});
    check_contiguous(workspace, "workspace");
    check_aligned(workspace, "workspace");
    STD_TORCH_CHECK(workspace.size(0) >= int64_t(sizeof(SoftcapCEWorkspace)), "workspace: expected ", sizeof(SoftcapCEWorkspace), " bytes");
    STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0, 1 or 2");
    if (reduction == int64_t(SoftcapCEReduction::kNone)) check(loss, "loss", ScalarType::Float, {n});
    else check(loss, "loss", ScalarType::Float, {});
    check_contiguous(loss, "loss");
}

}  // namespace pgolf
