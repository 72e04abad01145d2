// A thread holds eight channels; width / 8 neighbouring threads are a group that handles a row together.
#include "kernels/embedding.h"

#include "kernels/common/vector8.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 128;      // of a CTA, at least: as many groups as fit, or one
constexpr int kRowsAhead = 8;      // whose loads a group has in flight
constexpr int kSumThreads = 512;   // of the second kernel: slices of a row that crosses borders

template <bool kFloat>
__device__ __forceinline__ void load8(float (&x)[8], const void* matrix, int64_t offset) {
    if constexpr (kFloat) {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(matrix) + offset);
        *reinterpret_cast<float4*>(x) = from[0];
        *reinterpret_cast<float4*>(x + 4) = from[1];
    } else {
        unpack8(x, *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(matrix) + offset));
    }
}

template <bool kFloat>
__device__ __forceinline__ void store8(void* matrix, int64_t offset, const float (&x)[8]) {
    if constexpr (kFloat) {
        float4* to = reinterpret_cast<float4*>(static_cast<float*>(matrix) + offset);
        to[0] = {x[0], x[1], x[2], x[3]};
        to[1] = {x[4], x[5], x[6], x[7]};
    } else {
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(matrix) + offset) = pack8(x);
    }
}

template <bool kFloat>
__global__ void embedding_fwd_kernel(const EmbeddingFwdParams p) {
    const uint32_t groups = gridDim.x * blockDim.y;
    const int channel = 8 * threadIdx.x;
    for (uint32_t place = blockIdx.x * blockDim.y + threadIdx.y; place < p.m; place += groups) {
        const int64_t index = p.indices[place];
        float x[8];
        if (index >= 0 && index < p.num_rows) {
            load8<kFloat>(x, p.table, index * p.width + channel);
        } else {
            for (int j = 0; j < 8; ++j) x[j] = __int_as_float(0x7fffffff);
            if (threadIdx.x == 0) {
                volatile int64_t* report = p.report;
                report[1] = index, report[2] = p.num_rows;
                __threadfence_system();
                report[0] = int64_t(place) + 1;
            }
        }
        store8<false>(p.out, int64_t(place) * p.width + channel, x);
    }
}

template <bool kFloat>
__device__ __forceinline__ void add_to_gradient(const EmbeddingBwdParams& p, int index, int channel, const float (&sum)[8]) {
    if (index < 0 || index >= p.num_rows) return;
    float x[8];
    load8<kFloat>(x, p.gradient, int64_t(index) * p.width + channel);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] += sum[j];
    store8<kFloat>(p.gradient, int64_t(index) * p.width + channel, x);
}

// partial_sums[0][range]: of the row that enters the range from the one before (and may fill it, and go on);
// partial_sums[1][range]: of a row that begins in the range and goes on.
template <bool kFloat>
__global__ void embedding_bwd_kernel(const EmbeddingBwdParams p, uint32_t num_ranges) {
    const uint32_t range = blockIdx.x * blockDim.y + threadIdx.y;
    if (range >= num_ranges) return;
    const int channel = 8 * threadIdx.x;
    const uint32_t begin = range * kEmbeddingRange, end = min(begin + kEmbeddingRange, p.m);
    int current = p.sorted[begin];
    bool entered = begin > 0 && p.sorted[begin - 1] == current;
    float sum[8] = {};

    const auto leave = [&](bool goes_on) {
        if (entered || goes_on) store8<true>(p.partial_sums, (int64_t(entered ? 0 : num_ranges) + range) * p.width + channel, sum);
        else add_to_gradient<kFloat>(p, current, channel, sum);
    };
    for (uint32_t first = begin; first < end; first += kRowsAhead) {
        uint4 rows[kRowsAhead];
        int index[kRowsAhead];
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            const uint32_t at = min(first + i, end - 1);
            index[i] = p.sorted[at];
            rows[i] = __ldg(reinterpret_cast<const uint4*>(p.d_out + p.order[at] * p.width + channel));
        }
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (first + i >= end) break;
            if (index[i] != current) {
                leave(false);
                current = index[i], entered = false;
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[j] = 0.f;
            }
            float x[8];
            unpack8(x, rows[i]);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[j] += x[j];
        }
    }
    leave(end < p.m && p.sorted[end] == current);
}

// One CTA per range: if a row begins there and goes on, its partial sums in order, slice by slice.
template <bool kFloat>
__global__ void __launch_bounds__(kSumThreads) embedding_borders_kernel(const EmbeddingBwdParams p, uint32_t num_ranges) {
    const uint32_t range = blockIdx.x, begin = range * kEmbeddingRange, end = begin + kEmbeddingRange;
    if (end >= p.m) return;
    const int index = p.sorted[end];
    if (p.sorted[end - 1] != index || (begin > 0 && p.sorted[begin - 1] == index)) return;  // nothing goes on, or it began before

    __shared__ float s_sums[kSumThreads][9];  // NOTE: an odd stride, so that neighbouring threads meet no bank twice
    const int channel = 8 * threadIdx.x, slices = blockDim.y;
    float sum[8] = {}, x[8];
    for (uint32_t other = range + threadIdx.y; other < num_ranges; other += slices) {
        if (other > range && p.sorted[other * kEmbeddingRange] != index) break;
        load8<true>(x, p.partial_sums, (int64_t(other == range ? num_ranges : 0) + other) * p.width + channel);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += x[j];
    }
    float* own = s_sums[threadIdx.y * blockDim.x + threadIdx.x];
#pragma unroll
    for (int j = 0; j < 8; ++j) own[j] = sum[j];
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int slice = 1; slice < slices; ++slice)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += s_sums[slice * blockDim.x + threadIdx.x][j];
    add_to_gradient<kFloat>(p, index, channel, sum);
}

dim3 groups_of(int width, int threads) { return dim3(width / 8, max(1, threads / (width / 8))); }

}  // namespace

cudaError_t embedding_fwd(const EmbeddingFwdParams& p, cudaStream_t stream) {
    const dim3 block = groups_of(p.width, kThreads);
    const unsigned ctas = (p.m + block.y - 1) / block.y;
    const auto kernel = p.is_float ? embedding_fwd_kernel<true> : embedding_fwd_kernel<false>;
    kernel<<<ctas, block, 0, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t embedding_bwd(const EmbeddingBwdParams& p, cudaStream_t stream) {
    const uint32_t num_ranges = (p.m + kEmbeddingRange - 1) / kEmbeddingRange;
    const dim3 block = groups_of(p.width, kThreads);
    const auto kernel = p.is_float ? embedding_bwd_kernel<true> : embedding_bwd_kernel<false>;
    kernel<<<(num_ranges + block.y - 1) / block.y, block, 0, stream>>>(p, num_ranges);
    const auto borders = p.is_float ? embedding_borders_kernel<true> : embedding_borders_kernel<false>;
    borders<<<num_ranges, groups_of(p.width, kSumThreads), 0, stream>>>(p, num_ranges);
    return cudaGetLastError();
}

}  // namespace pgolf
