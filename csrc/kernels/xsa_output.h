// Backward of a block's output projection, attended W^T with attended = out of xsa_attention, up to what attention's own
// backward begins with: one product, and in its epilogue, for every token and head, with g = d_projected W,
//
//     share = (g . v) / |v|^2           dy = gate (g - share v)           dv = -(share out + own dy), summed over v's query heads
//     delta = dy . out / gate + own dy . v                                dgate = (g . out) / gate, and 0 where gate is 0
//
// (xsa_attention.h has the algebra; without XSA share is 0.) So g is never written, nor read again beside out and v. dy and delta
// are written times their row's factor, as XsaAttentionBwdParams wants them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/xsa_attention.h"

namespace pgolf {

constexpr int kXsaOutputGroup = 2;  // query heads of a key head: the two of a tile

// Matrices 16-byte aligned; rows contiguous one after another, but those of v and of the gradients, which lie strides apart (elements,
// multiples of 8). M = batch * tokens.
struct XsaOutputBwdParams {
    const __nv_bfloat16* d_projected;  // [M, width]
    const __nv_bfloat16* weight;       // [width, q_heads 64]
    const __nv_bfloat16* out;          // [M, q_heads 64]
    const __nv_bfloat16* v;            // [M, kv_heads 64]
    const __nv_bfloat16* gate;         // [M, q_heads], or null
    const float *lse, *own;            // [batch, q_heads, tokens]
    const XsaPlace* places;            // [M], or null for a dense batch
    __nv_bfloat16* dy;                 // [M, q_heads 64]
    __nv_bfloat16 *dq, *dk;            // [M, heads 64]; only tokens after the last document are written: zeros
    __nv_bfloat16* dv;                 // [M, kv_heads 64]
    __nv_bfloat16* dgate;              // [M, q_heads], with gate
    float* stats;                      // as in XsaAttentionBwdParams, all of it is written
    int64_t v_stride, gradient_stride, stats_width;
    int batch, tokens, width, q_heads;
    bool xsa;
};

cudaError_t xsa_output_bwd(const XsaOutputBwdParams& p, cudaStream_t stream);

}  // namespace pgolf
