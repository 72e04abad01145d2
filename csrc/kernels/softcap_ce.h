// Softcapped cross-entropy.   z = cap tanh(x / cap),   loss_i = lse_j(z_ij) - z_i,target
//                             dx_ij = weight_i (softmax(z)_ij - [j = target]) (1 - tanh^2(x_ij / cap))
//
// One read of x and one write of dx serve both directions: a row of up to kSoftcapCEMaxRow columns stays in
// the registers of its threads between the sum of exponentials and the gradient. Longer rows, and rows that
// are not 16-byte aligned, are read again for each pass by a second kernel, from L2 but for the first time.
//
// No running maximum: z lies in [-cap, cap], so up to cap = 64 every exp(z), and the sum of a row of them, is a
// normal float. Larger caps go to the second kernel, which finds the row's largest z first.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

enum class SoftcapCEReduction { kNone, kMean, kSum };

constexpr int kSoftcapCEMaxRow = 8192;

// Written and read within one call; needs no initial value.
struct SoftcapCEWorkspace {
    static constexpr int kMaxCtas = 2048;
    static constexpr int kCountCtas = 96;
    // Per CTA, or with the head per consumer warp, so that the total is summed in a fixed order; softcap_ce.cu rounds its terms, whose
    // order varies.
    double loss[kMaxCtas];
    int64_t kept[kCountCtas];  // per CTA of the counting kernel: targets that are not ignore_index
    unsigned arrived;          // CTAs whose loss is in `loss`
    unsigned portions;         // of rows, handed out so far beyond each group of threads' first
};

struct SoftcapCEParams {
    const __nv_bfloat16* logits;    // [n, v], rows `row_stride` elements apart
    const int64_t* targets;         // [n], each in [0, v) or ignore_index
    float* loss;                    // [n] for kNone, else one element
    __nv_bfloat16* grad_logits;     // [n, v] contiguous; null: no gradient. weight_i is 1 / (rows kept) for kMean, 0 if ignored, else 1
    SoftcapCEWorkspace* workspace;
    int64_t* report;                // host-mapped: a target out of range leaves (row + 1, target, v) here, and nan in its row and loss
    uint32_t n;                     // < 2^31, as v is
    int32_t v;
    int64_t row_stride, ignore_index;
    float cap;                      // > 0, finite
    SoftcapCEReduction reduction;
};

// First half of every call: counts the rows kept, reports targets out of range, readies the workspace. Uses targets,
// workspace, report, n, v and ignore_index alone.
cudaError_t softcap_ce_count_targets(const SoftcapCEParams& p, cudaStream_t stream);

cudaError_t softcap_ce_fwd(const SoftcapCEParams& p, cudaStream_t stream);

struct SoftcapCEScaleParams {
    __nv_bfloat16* grad_logits;  // [n, v] contiguous, 16-byte aligned; multiplied in place
    const float* scale;          // scale of row i at scale[i * scale_stride]; stride 0: one for all
    int64_t n, v, scale_stride;
};

// Rows whose scale is exactly 1 are neither read nor written.
cudaError_t softcap_ce_scale(const SoftcapCEScaleParams& p, cudaStream_t stream);

}  // namespace pgolf
