// The gate of each attention head, from the first channels of the block's normalised input:
//
//     gate = sigmoid(scale * n[:, :window] W^T)          l = scale * gate (1 - gate) dgate
//     dn[:, :window] += l W                              dW += l^T n[:, :window]
//
// Too narrow for the matrix engine: a thread per row, all in float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace pgolf {

constexpr int kGateHeads = 8;
constexpr int kGateMaxWindow = 16;  // n and dn have at least as many channels

// Matrices with contiguous rows, 16-byte aligned.
struct AttnGateParams {
    const __nv_bfloat16* n;      // [m, channels]
    const float* weight;         // [kGateHeads, window]
    __nv_bfloat16* gate;         // [m, kGateHeads]: out of the forward, into the backward
    const __nv_bfloat16* dgate;  // [m, kGateHeads]
    __nv_bfloat16* dn;           // [m, channels], added to
    float* dweight;              // [kGateHeads, window], added to, in no fixed order
    float scale;
    int m, channels, window;
};

cudaError_t attn_gate_fwd(const AttnGateParams& p, cudaStream_t stream);
cudaError_t attn_gate_bwd(const AttnGateParams& p, cudaStream_t stream);

}  // namespace pgolf
