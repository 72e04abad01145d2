#include "kernels/qkv.h"

#include <utility>

#include "kernels/common/gemm.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/norm.h"
#include "kernels/common/vector8.cuh"

namespace pgolf {
namespace {

constexpr int kHalf = kQkvRotated / 2;

__device__ __forceinline__ float2 unpack(uint32_t pair) { return {ptx::low_bf16(pair), ptx::high_bf16(pair)}; }

// ---- forward: a tile of 256 columns is four heads. A thread holds, of two rows, columns 8 j + 2 (lane % 4) and the next, so
// dimensions i and i + 8 of a head are its own, and four neighbouring lanes hold a row of a head. The product has been rounded.

struct QkvArguments {
    const float* gain;
    const __nv_bfloat16 *cos, *sin;
    float* rstd;
    int q_heads, normed_heads, positions;
};

static_assert(gemm::kColumnBlock == kQkvHeadDim && kHalf == 8, "finish() gets a head, and a thread its dimensions i and i + 8");

struct Qkv : gemm::PlainOp {
    static constexpr int kBlockN = 256, kAMajor = wgmma::kMajorK, kBMajor = wgmma::kMajorK;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
    using Arguments = QkvArguments;

    struct Fetched {
        uint32_t cos[2], sin[2];  // of the two rows, pairs
    };
    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int row, int, int) {
        Fetched fetched;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = (row + 8 * r) % p.positions * kHalf + 2 * (threadIdx.x % 4);
            fetched.cos[r] = __ldg(reinterpret_cast<const unsigned*>(p.cos + at));
            fetched.sin[r] = __ldg(reinterpret_cast<const unsigned*>(p.sin + at));
        }
        return fetched;
    }
    // One head.
    static __device__ __forceinline__ void finish(const Arguments& p, const Fetched& fetched, uint32_t (&pairs)[16], int row, int column,
                                                  int m) {
        const int quad = threadIdx.x % 4, head = column / kQkvHeadDim;
        if (head >= p.normed_heads) return;
        const float gain = head < p.q_heads ? __ldg(p.gain + head) : 1.f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float2 x[8];
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                x[j] = unpack(pairs[2 * j + r]);
                sum = fmaf(x[j].y, x[j].y, fmaf(x[j].x, x[j].x, sum));
            }
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float rstd = rsqrtf(sum * (1.f / kQkvHeadDim) + kRmsEpsilon);
            if (quad == 0 && row + 8 * r < m) p.rstd[int64_t(row + 8 * r) * p.normed_heads + head] = rstd;
            const float factor = rstd * gain;
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j].x *= factor, x[j].y *= factor;
            const float2 cos = unpack(fetched.cos[r]), sin = unpack(fetched.sin[r]), first = x[0];
            x[0].x = first.x * cos.x + x[1].x * sin.x;
            x[0].y = first.y * cos.y + x[1].y * sin.y;
            x[1].x = x[1].x * cos.x - first.x * sin.x;
            x[1].y = x[1].y * cos.y - first.y * sin.y;
#pragma unroll
            for (int j = 0; j < 8; ++j) pairs[2 * j + r] = ptx::pack_bf16(x[j].x, x[j].y);
        }
    }
};

// ---- passes of their own: a warp per row, eight dimensions a lane, eight lanes a head, so four heads at a time.

constexpr int kWarps = 8;
constexpr int kMaxGroups = kQkvMaxHeads / 4;

__device__ __forceinline__ float sum_over_head(float x) {
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// kGroups: of four heads, the last perhaps not full.
template <int kGroups>
__global__ void __launch_bounds__(32 * kWarps) qkv_normalize_kernel(const QkvNormalizeParams p) {
    const int lane = threadIdx.x % 32, part = lane % 8;
    const int heads = p.q_heads + 2 * p.kv_heads, normed_heads = p.q_heads + p.kv_heads;
    for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < p.m; row += gridDim.x * kWarps) {
        __nv_bfloat16* const at = p.qkv + int64_t(row) * heads * kQkvHeadDim + 8 * lane;
        uint4 x8[kGroups] = {};
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
            if (4 * group + lane / 8 < normed_heads) x8[group] = *reinterpret_cast<const uint4*>(at + 256 * group);
        float cos[8], sin[8];
        const int position = row % p.positions;
        unpack8(cos, __ldg(reinterpret_cast<const uint4*>(p.cos + position * kHalf)));
        unpack8(sin, __ldg(reinterpret_cast<const uint4*>(p.sin + position * kHalf)));
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int head = 4 * group + lane / 8;
            float x[8], squares = 0.f;
            unpack8(x, x8[group]);
#pragma unroll
            for (int j = 0; j < 8; ++j) squares = fmaf(x[j], x[j], squares);
            const float rstd = rsqrtf(sum_over_head(squares) * (1.f / kQkvHeadDim) + kRmsEpsilon);
            const float factor = head < p.q_heads ? rstd * __ldg(p.gain + head) : rstd;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                x[j] *= factor;
                const float other = __shfl_xor_sync(0xffffffffu, x[j], 1);
                if (part < 2) x[j] = fmaf(part == 0 ? other : -other, sin[j], x[j] * cos[j]);
            }
            if (head >= normed_heads) continue;
            *reinterpret_cast<uint4*>(at + 256 * group) = pack8(x);
            if (part == 0) p.rstd[int64_t(row) * normed_heads + head] = rstd;
        }
    }
}

// kGroups: of four heads, the last perhaps not full.
template <int kGroups>
__global__ void __launch_bounds__(32 * kWarps) qkv_backward_kernel(const QkvBackwardParams p) {
    __shared__ float s_dgain[4 * kMaxGroups];
    if (threadIdx.x < 4 * kMaxGroups) s_dgain[threadIdx.x] = 0.f;
    __syncthreads();
    const int lane = threadIdx.x % 32, part = lane % 8;
    const int heads = p.q_heads + 2 * p.kv_heads, normed_heads = p.q_heads + p.kv_heads;
    float gain[kGroups], over_gain[kGroups], dgain[kGroups] = {};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        const int head = 4 * group + lane / 8;
        gain[group] = head < p.q_heads ? p.gain[head] : 1.f;
        over_gain[group] = gain[group] != 0.f ? 1.f / gain[group] : 0.f;
    }
    for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < p.m; row += gridDim.x * kWarps) {
        const int64_t at = int64_t(row) * heads * kQkvHeadDim + 8 * lane;
        uint4 d8[kGroups] = {}, x8[kGroups] = {};
        float rstd[kGroups] = {};
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int head = 4 * group + lane / 8;
            if (head >= normed_heads) continue;
            d8[group] = *reinterpret_cast<const uint4*>(p.dqkv + at + 256 * group);
            x8[group] = __ldg(reinterpret_cast<const uint4*>(p.qkv + at + 256 * group));
            rstd[group] = __ldg(p.rstd + int64_t(row) * normed_heads + head);
        }
        float cos[8], sin[8];
        const int position = row % p.positions;
        unpack8(cos, __ldg(reinterpret_cast<const uint4*>(p.cos + position * kHalf)));
        unpack8(sin, __ldg(reinterpret_cast<const uint4*>(p.sin + position * kHalf)));
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            float d[8], x[8], dot = 0.f;
            unpack8(d, d8[group]);
            unpack8(x, x8[group]);
#pragma unroll
            for (int j = 0; j < 8; ++j) dot = fmaf(d[j], x[j], dot);
            dot = sum_over_head(dot) * over_gain[group];
            dgain[group] += dot;
            const float scale = rstd[group] * gain[group], along = -rstd[group] * dot * (1.f / kQkvHeadDim);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                d[j] = fmaf(scale, d[j], along * x[j]);
                const float other = __shfl_xor_sync(0xffffffffu, d[j], 1);
                if (part < 2) d[j] = fmaf(part == 0 ? -other : other, sin[j], d[j] * cos[j]);
            }
            if (4 * group + lane / 8 < normed_heads)
                *reinterpret_cast<uint4*>(p.dqkv + at + 256 * group) = pack8(d);
        }
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
        if (part == 0) atomicAdd(s_dgain + 4 * group + lane / 8, dgain[group]);
    __syncthreads();
    if (threadIdx.x < p.q_heads) atomicAdd(p.dgain + threadIdx.x, s_dgain[threadIdx.x]);
}

}  // namespace

cudaError_t qkv_forward(const QkvForwardParams& p, cudaStream_t stream) {
    const int normed_heads = p.q_heads + p.kv_heads;
    const QkvArguments arguments{p.gain, p.cos, p.sin, p.rstd, p.q_heads, normed_heads, p.positions};
    return gemm::launch<Qkv>(p.n, p.weight, p.qkv, nullptr, {p.m, (normed_heads + p.kv_heads) * kQkvHeadDim, p.width}, stream, arguments);
}

namespace {

// kernels[g - 1] serves g groups of four heads.
template <class Params>
cudaError_t launch_rows(void (*const (&kernels)[kMaxGroups])(Params), const Params& p, cudaStream_t stream) {
    if (p.m == 0) return cudaSuccess;
    const int groups = (p.q_heads + p.kv_heads + 3) / 4;
    if (groups > kMaxGroups) return cudaErrorInvalidValue;
    int ctas = 0;
    if (cudaError_t status = resident_ctas(kernels[groups - 1], 32 * kWarps, ctas); status != cudaSuccess) return status;
    kernels[groups - 1]<<<min(ctas, (p.m + kWarps - 1) / kWarps), 32 * kWarps, 0, stream>>>(p);
    return cudaGetLastError();
}

template <int... kGroups>
cudaError_t launch_normalize(const QkvNormalizeParams& p, cudaStream_t stream, std::integer_sequence<int, kGroups...>) {
    return launch_rows({qkv_normalize_kernel<kGroups + 1>...}, p, stream);
}

template <int... kGroups>
cudaError_t launch_backward(const QkvBackwardParams& p, cudaStream_t stream, std::integer_sequence<int, kGroups...>) {
    return launch_rows({qkv_backward_kernel<kGroups + 1>...}, p, stream);
}

}  // namespace

cudaError_t qkv_normalize(const QkvNormalizeParams& p, cudaStream_t stream) {
    return launch_normalize(p, stream, std::make_integer_sequence<int, kMaxGroups>{});
}

cudaError_t qkv_backward(const QkvBackwardParams& p, cudaStream_t stream) {
    return launch_backward(p, stream, std::make_integer_sequence<int, kMaxGroups>{});
}

}  // namespace pgolf
