// A warp per row. A lane's channels are two runs of eight, 8 lane + 256 v, so that every access is 16 bytes of a full line.
#include "kernels/mix_norm.h"

#include "kernels/common/launch.h"
#include "kernels/common/norm.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector8.cuh"

namespace pgolf {
namespace {

constexpr int kWidth = kMixNormWidth;
constexpr int kMaxTensors = kMixNormMaxTensors;
constexpr int kVectors = kWidth / 256;  // of 8 channels, per lane
constexpr int kChannels = 8 * kVectors;  // per lane
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

__device__ __forceinline__ int64_t vector_offset(uint32_t row, int v) { return int64_t(row) * kWidth + 256 * v + 8 * (threadIdx.x % 32); }

__device__ __forceinline__ uint4 load(const __nv_bfloat16* matrix, uint32_t row, int v) {
    return __ldg(reinterpret_cast<const uint4*>(matrix + vector_offset(row, v)));
}

__device__ __forceinline__ void store(__nv_bfloat16* matrix, uint32_t row, int v, const uint4& x) {
    *reinterpret_cast<uint4*>(matrix + vector_offset(row, v)) = x;
}

// Channels 256 v + 8 lane + 4 half + j of a row of coefficients lie at [v][half][lane].j: lanes read neighbouring 16 bytes.
struct Coefficients {
    float4 row[kMaxTensors][kVectors][2][32];

    __device__ __forceinline__ void fill(const float* coefficients, int num_rows) {
        for (int i = threadIdx.x; i < num_rows * kWidth / 4; i += kThreads) {
            const int channel = 4 * i % kWidth;
            row[4 * i / kWidth][channel / 256][channel / 4 % 2][channel / 8 % 32] =
                coefficients ? reinterpret_cast<const float4*>(coefficients)[i] : float4{1.f, 1.f, 1.f, 1.f};
        }
        __syncthreads();
    }

    __device__ __forceinline__ void read(float (&c)[8], int r, int v) const {
        *reinterpret_cast<float4*>(c) = row[r][v][0][threadIdx.x % 32];
        *reinterpret_cast<float4*>(c + 4) = row[r][v][1][threadIdx.x % 32];
    }
};

// Vector v of the mix, rounded. The backward must come to the same bits.
template <int kTensors>
__device__ __forceinline__ uint4 mix(const uint4 (&t)[kTensors][kVectors], const Coefficients& coefficients, const int* rows, int v) {
    float mixed[8] = {};
#pragma unroll
    for (int i = 0; i < kTensors; ++i) {
        float x[8], c[8];
        unpack8(x, t[i][v]);
        coefficients.read(c, rows[i], v);
#pragma unroll
        for (int j = 0; j < 8; ++j) mixed[j] = fmaf(c[j], x[j], mixed[j]);
    }
    return pack8(mixed);
}

// A row a warp and no persistent grid: with equal shares of the rows the kernel ends with the slowest multiprocessor, 7 % after their mean.
template <int kTensors>
__global__ void __launch_bounds__(kThreads) mix_norm_fwd_kernel(const MixNormFwdParams p) {
    const uint32_t row = blockIdx.x * kWarps + threadIdx.x / 32;
    uint4 t[kTensors][kVectors];  // on their way while the coefficients come
#pragma unroll
    for (int i = 0; i < kTensors; ++i)
#pragma unroll
        for (int v = 0; v < kVectors; ++v) t[i][v] = load(p.tensors[i], min(row, p.m - 1), v);
    __shared__ Coefficients s_coefficients;
    s_coefficients.fill(p.coefficients, p.num_rows);
    if (row >= p.m) return;

    uint4 mixed[kVectors];
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        mixed[v] = mix<kTensors>(t, s_coefficients, p.rows, v);
        if (p.mixed) store(p.mixed, row, v, mixed[v]);
        float x[8];
        unpack8(x, mixed[v]);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = fmaf(x[j], x[j], sum);
    }
    if (!p.rstd) return;
    const float rstd = rsqrtf(warp_sum(sum) * (1.f / kWidth) + kRmsEpsilon);
    if (threadIdx.x % 32 == 0) p.rstd[row] = rstd;
    if (!p.normed) return;
    const float scale = p.norm_scale * rstd;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        float x[8];
        unpack8(x, mixed[v]);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] *= scale;
        store(p.normed, row, v, pack8(x));
    }
}

// kTensors 0: the coefficients' gradient is not wanted, and the mix is read.
template <int kTensors>
__global__ void __launch_bounds__(kThreads) mix_norm_bwd_kernel(const MixNormBwdParams p) {
    __shared__ Coefficients s_coefficients;
    s_coefficients.fill(p.coefficients, p.num_rows);
    constexpr int kSums = kTensors > 0 ? kTensors : 1;
    alignas(16) float sums[kSums][kChannels] = {};

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t row = blockIdx.x * kWarps + warp; row < p.m; row += gridDim.x * kWarps) {
        uint4 t[kSums][kVectors], d_normed[kVectors] = {}, d_mixed[kVectors] = {};  // without tensors t[0] is the mix
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
            for (int i = 0; i < kTensors; ++i) t[i][v] = load(p.tensors[i], row, v);
            if (kTensors == 0 && p.d_normed) t[0][v] = load(p.mixed, row, v);
            if (p.d_normed) d_normed[v] = load(p.d_normed, row, v);
            if (p.d_mixed) d_mixed[v] = load(p.d_mixed, row, v);
        }

        float d[kChannels];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) unpack8(reinterpret_cast<float(&)[8]>(d[8 * v]), d_mixed[v]);
        if (p.d_normed) {
            const float rstd = p.rstd[row];
            uint4 mixed[kVectors];
            float dot = 0.f;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                if constexpr (kTensors > 0) mixed[v] = mix<kTensors>(t, s_coefficients, p.rows, v);
                else mixed[v] = t[0][v];
                float x[8], dn[8];
                unpack8(x, mixed[v]);
                unpack8(dn, d_normed[v]);
#pragma unroll
                for (int j = 0; j < 8; ++j) dot = fmaf(x[j], dn[j], dot);
            }
            const float scale = p.norm_scale * rstd, along = -scale * rstd * rstd * warp_sum(dot) * (1.f / kWidth);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                float x[8], dn[8];
                unpack8(x, mixed[v]);
                unpack8(dn, d_normed[v]);
#pragma unroll
                for (int j = 0; j < 8; ++j) d[8 * v + j] = fmaf(scale, dn[j], fmaf(along, x[j], d[8 * v + j]));
            }
        }

        for (int r = 0; r < p.num_rows; ++r)
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                float gradient[8] = {}, c[8];
                if (p.accumulate[r]) unpack8(gradient, load(p.accumulate[r], row, v));
                s_coefficients.read(c, r, v);
#pragma unroll
                for (int j = 0; j < 8; ++j) gradient[j] = fmaf(c[j], d[8 * v + j], gradient[j]);
                store(p.gradients[r], row, v, pack8(gradient));
            }

#pragma unroll
        for (int i = 0; i < kTensors; ++i)
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                float x[8];
                unpack8(x, t[i][v]);
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[i][8 * v + j] = fmaf(d[8 * v + j], x[j], sums[i][8 * v + j]);
            }
    }

    // The CTA's column sums, warp after warp.
    if constexpr (kTensors > 0) {
        __shared__ float4 s_sums[kWarps][kWidth / 4];
#pragma unroll
        for (int i = 0; i < kTensors; ++i) {
#pragma unroll
            for (int q = 0; q < kChannels / 4; ++q)
                s_sums[warp][64 * (q / 2) + 2 * lane + q % 2] = *reinterpret_cast<const float4*>(&sums[i][4 * q]);
            __syncthreads();
            for (int channel = threadIdx.x; channel < kWidth; channel += kThreads) {
                float sum = 0.f;
#pragma unroll
                for (int w = 0; w < kWarps; ++w) sum += reinterpret_cast<const float*>(s_sums[w])[channel];
                p.partial_sums[(int64_t(blockIdx.x) * kTensors + i) * kWidth + channel] = sum;
            }
            __syncthreads();
        }
    }
}

// d_coefficients from the CTAs' sums, always in the same order: thread (column, slice) adds every kSlices-th CTA, then slice after slice.
constexpr int kSlices = 32;

__global__ void __launch_bounds__(32 * kSlices) mix_norm_sum_kernel(const MixNormBwdParams p, int num_ctas) {
    const int column = threadIdx.x % 32, slice = threadIdx.x / 32, channel = blockIdx.x * 32 + column, r = blockIdx.y;
    float sum = 0.f;
    for (int i = 0; i < p.num_tensors; ++i) {
        if (p.rows[i] != r) continue;
#pragma unroll 8
        for (int cta = slice; cta < num_ctas; cta += kSlices) sum += p.partial_sums[(int64_t(cta) * p.num_tensors + i) * kWidth + channel];
    }
    __shared__ float s_sums[kSlices][32];
    s_sums[slice][column] = sum;
    __syncthreads();
    if (slice > 0) return;
    for (int other = 1; other < kSlices; ++other) sum += s_sums[other][column];
    p.d_coefficients[r * kWidth + channel] = sum;
}

}  // namespace

cudaError_t mix_norm_fwd(const MixNormFwdParams& p, cudaStream_t stream) {
    using Kernel = void (*)(MixNormFwdParams);
    constexpr Kernel kernels[] = {mix_norm_fwd_kernel<1>, mix_norm_fwd_kernel<2>, mix_norm_fwd_kernel<3>, mix_norm_fwd_kernel<4>,
                                  mix_norm_fwd_kernel<5>};
    kernels[p.num_tensors - 1]<<<(p.m + kWarps - 1) / kWarps, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t mix_norm_bwd(const MixNormBwdParams& p, cudaStream_t stream) {
    using Kernel = void (*)(MixNormBwdParams);
    constexpr Kernel kernels[] = {mix_norm_bwd_kernel<0>, mix_norm_bwd_kernel<1>, mix_norm_bwd_kernel<2>,
                                  mix_norm_bwd_kernel<3>, mix_norm_bwd_kernel<4>, mix_norm_bwd_kernel<5>};
    const Kernel kernel = kernels[p.num_tensors];
    int ctas = 0;
    if (cudaError_t status = resident_ctas(kernel, kThreads, ctas); status != cudaSuccess) return status;
    if (p.num_tensors > 0) ctas = min(ctas, kMixNormMaxCtas);
    ctas = int(min(uint32_t(ctas), (p.m + kWarps - 1) / kWarps));
    kernel<<<ctas, kThreads, 0, stream>>>(p);
    if (p.num_tensors > 0) mix_norm_sum_kernel<<<dim3(kWidth / 32, p.num_rows), 32 * kSlices, 0, stream>>>(p, ctas);
    return cudaGetLastError();
}

}  // namespace pgolf
