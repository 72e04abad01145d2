// The residual stream between matrix products: a per-channel mix of up to five tensors, and the RMSNorm of the mix.
//
//     mixed  = sum_i c[rows[i]] * t_i                                    in float32, rounded once to bfloat16
//     normed = norm_scale * rstd * mixed,    rstd = 1 / sqrt(mean(mixed^2) + 2^-23)     of the rounded mix
//
//     d      = d_mixed + norm_scale * rstd * (d_normed - n * mean(n * d_normed)),  n = rstd * mixed
//     dt_r   = c[r] * d + accumulate[r]            one per coefficient row: tensors that share a row share a gradient
//     dc[r]  = sum over rows of the matrix, sum_{i : rows[i] = r} of d * t_i
//
// Bound by memory: a warp holds one row, 16 channels a lane, and every tensor is read once. The backward
// mixes again where it reads the tensors anyway (for dc); otherwise it reads `mixed` alone.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

constexpr int kMixNormWidth = 512;
constexpr int kMixNormMaxTensors = 5;
constexpr int kMixNormMaxCtas = 528;  // of the backward, each with one row of partial column sums

// All matrices are [m, kMixNormWidth], contiguous and 16-byte aligned.
struct MixNormFwdParams {
    const __nv_bfloat16* tensors[kMixNormMaxTensors];
    int rows[kMixNormMaxTensors];
    const float* coefficients;  // [num_rows, kMixNormWidth]; null: ones, and num_rows is 1
    __nv_bfloat16* mixed;       // null: not written
    __nv_bfloat16* normed;      // null: not written
    float* rstd;                // [m]; null: not written, and no norm
    uint32_t m;                 // > 0
    int num_tensors, num_rows;  // 1 to kMixNormMaxTensors
    float norm_scale;
};

struct MixNormBwdParams {
    const __nv_bfloat16 *d_mixed, *d_normed;             // null: no such gradient
    const __nv_bfloat16* mixed;                          // read if num_tensors is 0
    const float* rstd;                                   // [m], with d_normed
    const __nv_bfloat16* tensors[kMixNormMaxTensors];
    int rows[kMixNormMaxTensors];
    const float* coefficients;                           // as in the forward
    const __nv_bfloat16* accumulate[kMixNormMaxTensors]; // of each coefficient row; null: nothing to add
    __nv_bfloat16* gradients[kMixNormMaxTensors];        // of each coefficient row
    float* partial_sums;                                 // [kMixNormMaxCtas, num_tensors, kMixNormWidth], written and read within the call
    float* d_coefficients;                               // [num_rows, kMixNormWidth], if num_tensors > 0
    uint32_t m;
    int num_tensors, num_rows;                           // num_tensors 0: the coefficients' gradient is not wanted
    float norm_scale;
};

cudaError_t mix_norm_fwd(const MixNormFwdParams& p, cudaStream_t stream);
cudaError_t mix_norm_bwd(const MixNormBwdParams& p, cudaStream_t stream);

}  // namespace pgolf
