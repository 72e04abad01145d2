// Queries, keys and values of a block in one product, the first two normalised and rotated on their way out:
//
//     raw = n W^T                                          [M, (Hq + 2 Hk) 64]: queries, keys, values
//     q   = gain_h R(raw_q rstd),   k = R(raw_k rstd)      rstd = 1 / sqrt(mean over the head + 2^-23),   v = raw_v
//     R rotates dimension i < 8 of a head with i + 8:      a' = a cos + b sin,   b' = b cos - a sin
//
// The product accumulates in float32 and is rounded to bfloat16, as torch's is: that is raw. q and k are made of it in float32 and rounded
// once. The backward needs neither raw nor n: R keeps products, so with d the gradient of q or k
//
//     d raw = rstd R^T(gain d - q (q . d) / (64 gain)),    d gain = sum of (q . d) / gain
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace pgolf {

constexpr int kQkvHeadDim = 64;
constexpr int kQkvRotated = 16;  // leading dimensions of a head
constexpr int kQkvMaxHeads = 32;  // queries' and keys' together, of normalize and backward
constexpr int kQkvMaxPositions = 1 << 28;  // an int indexes the tables

// Matrices with contiguous rows, 16-byte aligned. W = (q_heads + 2 kv_heads) 64.
struct QkvForwardParams {
    const __nv_bfloat16* n;        // [m, width]
    const __nv_bfloat16* weight;   // [W, width]
    const float* gain;             // [q_heads]
    const __nv_bfloat16 *cos, *sin;  // [positions, 8]
    __nv_bfloat16* qkv;            // [m, W]
    float* rstd;                   // [m, q_heads + kv_heads]
    int m, width, q_heads, kv_heads;
    int positions;                 // row r is at position r % positions; up to kQkvMaxPositions
};

// The same of a product that is made already and to which something was added.
struct QkvNormalizeParams {
    __nv_bfloat16* qkv;  // [m, W]: in, raw; out, as of the forward
    const float* gain;
    const __nv_bfloat16 *cos, *sin;
    float* rstd;
    int m, q_heads, kv_heads, positions;
};

struct QkvBackwardParams {
    __nv_bfloat16* dqkv;       // [m, W]: in, the gradients of q, k and v; out, of raw. Those of v stay
    const __nv_bfloat16* qkv;  // of the forward
    const float *rstd, *gain;
    const __nv_bfloat16 *cos, *sin;
    float* dgain;              // [q_heads], added to, in no fixed order
    int m, q_heads, kv_heads, positions;
};

cudaError_t qkv_forward(const QkvForwardParams& p, cudaStream_t stream);
cudaError_t qkv_normalize(const QkvNormalizeParams& p, cudaStream_t stream);
cudaError_t qkv_backward(const QkvBackwardParams& p, cudaStream_t stream);

}  // namespace pgolf
