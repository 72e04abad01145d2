#include "kernels/attn_gate.h"

#include "kernels/common/launch.h"
#include "kernels/common/vector8.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 128;

using Weights = float[kGateHeads][kGateMaxWindow];

// Zero beyond the window.
__device__ __forceinline__ void load_weights(Weights& s_weight, const AttnGateParams& p) {
    for (int i = threadIdx.x; i < kGateHeads * kGateMaxWindow; i += kThreads) {
        const int head = i / kGateMaxWindow, channel = i % kGateMaxWindow;
        s_weight[head][channel] = channel < p.window ? p.weight[head * p.window + channel] : 0.f;
    }
    __syncthreads();
}

__device__ __forceinline__ void load_channels(float (&x)[kGateMaxWindow], const __nv_bfloat16* row) {
    unpack8(reinterpret_cast<float(&)[8]>(x[0]), reinterpret_cast<const uint4*>(row)[0]);
    unpack8(reinterpret_cast<float(&)[8]>(x[8]), reinterpret_cast<const uint4*>(row)[1]);
}

__global__ void __launch_bounds__(kThreads) attn_gate_fwd_kernel(const AttnGateParams p) {
    __shared__ Weights s_weight;
    load_weights(s_weight, p);
    const int row = blockIdx.x * kThreads + threadIdx.x;
    if (row >= p.m) return;
    float x[kGateMaxWindow], gate[kGateHeads];
    load_channels(x, p.n + int64_t(row) * p.channels);
#pragma unroll
    for (int head = 0; head < kGateHeads; ++head) {
        float logit = 0.f;
#pragma unroll
        for (int channel = 0; channel < kGateMaxWindow; ++channel) logit = fmaf(s_weight[head][channel], x[channel], logit);
        gate[head] = 1.f / (1.f + __expf(-p.scale * logit));
    }
    reinterpret_cast<uint4*>(p.gate)[row] = pack8(gate);
}

// Two threads a row, eight channels each: the sums of all sixteen would not fit in registers.
__global__ void __launch_bounds__(kThreads) attn_gate_bwd_kernel(const AttnGateParams p) {
    __shared__ Weights s_weight, s_sums;
    load_weights(s_weight, p);
    for (int i = threadIdx.x; i < kGateHeads * kGateMaxWindow; i += kThreads) s_sums[i / kGateMaxWindow][i % kGateMaxWindow] = 0.f;
    __syncthreads();
    const int half = threadIdx.x % 2;
    float sums[kGateHeads][8] = {};
    for (int row = (blockIdx.x * kThreads + threadIdx.x) / 2; row < p.m; row += gridDim.x * kThreads / 2) {
        float x[8], dx[8], gate[kGateHeads], d[kGateHeads];
        uint4* dn = reinterpret_cast<uint4*>(p.dn + int64_t(row) * p.channels) + half;
        unpack8(x, reinterpret_cast<const uint4*>(p.n + int64_t(row) * p.channels)[half]);
        unpack8(dx, *dn);
        unpack8(gate, reinterpret_cast<const uint4*>(p.gate)[row]);
        unpack8(d, reinterpret_cast<const uint4*>(p.dgate)[row]);
#pragma unroll
        for (int head = 0; head < kGateHeads; ++head) {
            const float l = p.scale * gate[head] * (1.f - gate[head]) * d[head];
#pragma unroll
            for (int channel = 0; channel < 8; ++channel) {
                dx[channel] = fmaf(l, s_weight[head][8 * half + channel], dx[channel]);
                sums[head][channel] = fmaf(l, x[channel], sums[head][channel]);
            }
        }
        *dn = pack8(dx);
    }
#pragma unroll
    for (int head = 0; head < kGateHeads; ++head)
#pragma unroll
        for (int channel = 0; channel < 8; ++channel) {
            float sum = sums[head][channel];
#pragma unroll
            for (int offset = 16; offset > 1; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            if (threadIdx.x % 32 < 2) atomicAdd(&s_sums[head][8 * half + channel], sum);
        }
    __syncthreads();
    for (int i = threadIdx.x; i < kGateHeads * p.window; i += kThreads) atomicAdd(p.dweight + i, s_sums[i / p.window][i % p.window]);
}

}  // namespace

cudaError_t attn_gate_fwd(const AttnGateParams& p, cudaStream_t stream) {
    if (p.m == 0) return cudaSuccess;
    attn_gate_fwd_kernel<<<(p.m + kThreads - 1) / kThreads, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t attn_gate_bwd(const AttnGateParams& p, cudaStream_t stream) {
    if (p.m == 0) return cudaSuccess;
    int ctas = 0;
    if (cudaError_t status = resident_ctas(attn_gate_bwd_kernel, kThreads, ctas); status != cudaSuccess) return status;
    attn_gate_bwd_kernel<<<min(int64_t(ctas), (2 * int64_t(p.m) + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace pgolf
