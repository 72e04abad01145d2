// From the packed product of the attention's input matrices to what attention reads: RMSNorm of each query and key head,
// rotary positions, the learned gain on the queries, and optionally a value embedding added to the values.
//
//     n = x / sqrt(mean(x^2) + 2^-23)          over the head's 64 channels
//     y_i = n_i cos + n_{i+half} sin,   y_{i+half} = n_{i+half} cos - n_i sin      for i < half; the rest of y is n
//     q = gain[head] y,   k = y,   v = x + value_add          in float32, rounded once
//
//     with t = R^T dq, R the rotation:   dgain[head] = sum of n . t,   dx = gain rstd (t - n mean(n . t))
//
// The position of a row is row mod `positions`. Bound by memory: four lanes hold a head, 32 bytes each; nothing is saved for
// the backward but the packed product itself.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

constexpr int kQkHeadDim = 64;
constexpr int kQkHalf = 8;        // half: 16 of the 64 dimensions rotate
constexpr int kQkMaxHeads = 24;   // queries, keys and values together
constexpr int kQkMaxCtas = 1056;  // of the backward, each with one row of partial sums of the gains' gradient

// Rows `stride` elements apart, 16-byte aligned.
struct QkRows {
    __nv_bfloat16* data;
    int64_t stride;
};

struct QkNormRopeParams {
    QkRows qkv;                       // [m, >= (q_heads + 2 kv_heads) * 64]: queries, keys, values, and columns that are not touched
    const float* gain;                // [q_heads]
    const __nv_bfloat16 *cos, *sin;   // [positions, kQkHalf], contiguous, 16-byte aligned
    QkRows q, k, v;                   // forward: results; backward: their gradients. v null: values are left alone
    QkRows value_add;                 // forward, with v: [m, kv_heads * 64]
    QkRows d_qkv;                     // backward: result, columns as in qkv. NOTE: q, k, v may be its own columns
    float* partial_sums;              // backward: [kQkMaxCtas, q_heads], written and read within the call
    float* d_gain;                    // backward: [q_heads]
    uint32_t m, positions;            // > 0
    int q_heads, kv_heads;
};

cudaError_t qk_norm_rope_fwd(const QkNormRopeParams& p, cudaStream_t stream);
cudaError_t qk_norm_rope_bwd(const QkNormRopeParams& p, cudaStream_t stream);

}  // namespace pgolf
