// Output head and softcapped cross-entropy in one: logits = x weight^T are never written.
//
//     z = cap tanh(logits / cap)      loss_i = lse_j(z_ij) - z_i,target
//
// Training: with S_i = sum_j e^z_ij, the gradient of the logits is row_scale_i G_ij, where
//     G_ij = (e^z_ij - [j = target] S_i) (1 - tanh^2)        row_scale_i = weight_i / S_i
// so that G can be stored tile by tile, before S is known: bfloat16 has float32's range, and |z| <= cap bounds e^z.
// Then dx = row_scale (G weight) and dweight = G^T scaled_x with scaled_x = row_scale x are two plain matrix products.
//
// The tanh is the special-function unit's, of the target's logit too: where a row is sure of its target, the errors cancel in the loss.
//
// SPILLS linear_softcap_ce_kernel 40: one register of the instance with G; its consumers read it once a tile, between exponentials
#pragma once
#include "kernels/softcap_ce.h"

namespace pgolf {

constexpr int kLinearSoftcapCEDepth = 512;
constexpr int kLinearSoftcapCEVocabularyMultiple = 256;
constexpr float kLinearSoftcapCEMaxCap = 64.f;

struct LinearSoftcapCEParams {
    const __nv_bfloat16* x;       // [n, kLinearSoftcapCEDepth] contiguous
    const __nv_bfloat16* weight;  // [v, kLinearSoftcapCEDepth] contiguous
    const int64_t* targets;       // [n], each in [0, v) or ignore_index
    float* loss;                  // [n] for kNone, else one element
    __nv_bfloat16* g;             // [n, v] contiguous; null: loss only
    float* row_scale;             // [n]; weight_i as in softcap_ce.h
    __nv_bfloat16* scaled_x;      // [n, kLinearSoftcapCEDepth] contiguous
    SoftcapCEWorkspace* workspace;
    int64_t* report;
    uint32_t n;
    int32_t v;                    // a multiple of kLinearSoftcapCEVocabularyMultiple
    int64_t ignore_index;
    float cap;                    // > 0, at most kLinearSoftcapCEMaxCap
    SoftcapCEReduction reduction;
};

cudaError_t linear_softcap_ce_fwd(const LinearSoftcapCEParams& p, cudaStream_t stream);

struct LinearSoftcapCEDxParams {
    const __nv_bfloat16* g;       // [n, v]
    const __nv_bfloat16* weight;  // [v, kLinearSoftcapCEDepth]
    const float* row_scale;       // [n]
    const float* grad_loss;       // of row i at grad_loss[i * grad_stride]; stride 0: one for all
    __nv_bfloat16* dx;            // [n, kLinearSoftcapCEDepth]; all contiguous, 16-byte aligned
    int n, v, grad_stride;
};

// dx = grad_loss row_scale (G weight), of the product rounded to bfloat16
cudaError_t linear_softcap_ce_dx(const LinearSoftcapCEDxParams& p, cudaStream_t stream);

}  // namespace pgolf
