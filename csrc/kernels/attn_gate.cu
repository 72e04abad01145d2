#include "kernels/attn_gate.h"

#include "kernels/common/launch.h"
#include "kernels/common/vector8.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 128;
static_assert(kThreads == kGateHeads * kGateMaxWindow, "the backward clears a sum a thread");

using Weights = float[kGateHeads][kGateMaxWindow];

// Zero beyond the window.
__device__ __forceinline__ void load_weights(Weights& s_weight, const AttnGateParams& p) {
    for (int i = threadIdx.x; i < kGateHeads * kGateMaxWindow; i += kThreads) {
        const int head = i / kGateMaxWindow, channel = i % kGateMaxWindow;
        s_weight[head][channel] = channel < p.window ? p.weight[head * p.window + channel] : 0.f;
    }
    __syncthreads();
}

__global__ void __launch_bounds__(kThreads) attn_gate_fwd_kernel(const AttnGateParams p) {
    __shared__ Weights s_weight;
    const int row = blockIdx.x * kThreads + threadIdx.x;
    // Asked for before the weights, whose way is as long.
    const uint4* channels = reinterpret_cast<const uint4*>(p.n + int64_t(min(row, p.m - 1)) * p.channels);
    const uint4 packed[2] = {channels[0], channels[1]};
    load_weights(s_weight, p);
    if (row >= p.m) return;
    float x[kGateMaxWindow], gate[kGateHeads];
    unpack8(reinterpret_cast<float(&)[8]>(x[0]), packed[0]);
    unpack8(reinterpret_cast<float(&)[8]>(x[8]), packed[1]);
#pragma unroll
    for (int head = 0; head < kGateHeads; ++head) {
        float logit = 0.f;
#pragma unroll
        for (int channel = 0; channel < kGateMaxWindow; ++channel) logit = fmaf(s_weight[head][channel], x[channel], logit);
        gate[head] = 1.f / (1.f + __expf(-p.scale * logit));
    }
    reinterpret_cast<uint4*>(p.gate)[row] = pack8(gate);
}

// Two lanes `offset` apart add up their 2 kLeft sums; one of them keeps the first half, in its first places, and one the second.
template <int kLeft>
__device__ __forceinline__ void share_sums(float (&sums)[kGateHeads * 8], int offset) {
    const bool upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
        const float first = sums[i], second = sums[kLeft + i];
        sums[i] = (upper ? second : first) + __shfl_xor_sync(0xffffffffu, upper ? first : second, offset);
    }
}

// Two threads a row, eight channels each: the sums of all sixteen would not fit in registers.
__global__ void __launch_bounds__(kThreads, 3) attn_gate_bwd_kernel(const AttnGateParams p) {
    __shared__ Weights s_weight, s_sums;
    const int half = threadIdx.x % 2, stride = gridDim.x * kThreads / 2;
    struct Row {
        uint4 n, dn, gate, dgate;
    };
    auto fetch = [&](int row) {
        const int64_t at = int64_t(min(row, p.m - 1)) * p.channels;
        return Row{reinterpret_cast<const uint4*>(p.n + at)[half], reinterpret_cast<const uint4*>(p.dn + at)[half],
                   reinterpret_cast<const uint4*>(p.gate)[min(row, p.m - 1)], reinterpret_cast<const uint4*>(p.dgate)[min(row, p.m - 1)]};
    };
    int row = (blockIdx.x * kThreads + threadIdx.x) / 2;
    Row next = fetch(row);
    load_weights(s_weight, p);
    s_sums[threadIdx.x / kGateMaxWindow][threadIdx.x % kGateMaxWindow] = 0.f;
    __syncthreads();
    float sums[kGateHeads * 8] = {};
    for (; row < p.m; row += stride) {
        float x[8], dx[8], gate[kGateHeads], d[kGateHeads];
        unpack8(x, next.n);
        unpack8(dx, next.dn);
        unpack8(gate, next.gate);
        unpack8(d, next.dgate);
        next = fetch(row + stride);
#pragma unroll
        for (int head = 0; head < kGateHeads; ++head) {
            const float l = p.scale * gate[head] * (1.f - gate[head]) * d[head];
#pragma unroll
            for (int channel = 0; channel < 8; ++channel) {
                dx[channel] = fmaf(l, s_weight[head][8 * half + channel], dx[channel]);
                sums[8 * head + channel] = fmaf(l, x[channel], sums[8 * head + channel]);
            }
        }
        reinterpret_cast<uint4*>(p.dn + int64_t(row) * p.channels)[half] = pack8(dx);
    }
    share_sums<32>(sums, 16);
    share_sums<16>(sums, 8);
    share_sums<8>(sums, 4);
    share_sums<4>(sums, 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = threadIdx.x % 32 / 2 * 4 + i;
        atomicAdd(&s_sums[at / 8][8 * half + at % 8], sums[i]);
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
