#include "kernels/qkv.h"

#include "kernels/common/gemm.cuh"

namespace pgolf {
namespace {

constexpr float kEpsilon = 1.1920928955078125e-7f;  // 2^-23, RMS_EPSILON of the model
constexpr int kHalf = kQkvRotated / 2;

__device__ __forceinline__ float2 unpack(uint32_t pair) { return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)}; }

// ---- forward: a tile of 192 columns is three heads. A thread holds, of two rows, columns 8 j + 2 (lane % 4) and the next, so
// dimensions i and i + 8 of a head are its own, and four neighbouring lanes hold a row of a head.

struct QkvArguments {
    const float* gain;
    const __nv_bfloat16 *cos, *sin;
    float* rstd;
    int q_heads, normed_heads, positions;
};

struct Qkv {
    static constexpr int kBlockN = 192, kAMajor = wgmma::kMajorK, kBMajor = wgmma::kMajorK;
    static constexpr bool kTransformA = false, kHasAux = false;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
    static __device__ __forceinline__ uint32_t result(float low, float high, uint32_t) { return ptx::pack_bf16(low, high); }

    using Arguments = QkvArguments;
    // acc[4 j + 2 r] and the next: row `row + 8 r`, columns `n0 + 8 j + 2 (lane % 4)` and the next.
    static __device__ __forceinline__ void finish(const Arguments& p, float (&acc)[96], int row, int n0, int m) {
        const int quad = threadIdx.x % 4;
        float2 cos[2], sin[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = (row + 8 * r) % p.positions * kHalf + 2 * quad;
            cos[r] = unpack(__ldg(reinterpret_cast<const unsigned*>(p.cos + at)));
            sin[r] = unpack(__ldg(reinterpret_cast<const unsigned*>(p.sin + at)));
        }
#pragma unroll
        for (int h = 0; h < 3; ++h) {
            const int head = n0 / kQkvHeadDim + h;
            if (head >= p.normed_heads) return;
            const float gain = head < p.q_heads ? __ldg(p.gain + head) : 1.f;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float sum = 0.f;
#pragma unroll
                for (int j = 8 * h; j < 8 * h + 8; ++j) {
                    sum = fmaf(acc[4 * j + 2 * r], acc[4 * j + 2 * r], sum);
                    sum = fmaf(acc[4 * j + 2 * r + 1], acc[4 * j + 2 * r + 1], sum);
                }
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                const float rstd = rsqrtf(sum * (1.f / kQkvHeadDim) + kEpsilon);
                if (quad == 0 && row + 8 * r < m) p.rstd[int64_t(row + 8 * r) * p.normed_heads + head] = rstd;
                const float factor = rstd * gain;
#pragma unroll
                for (int j = 8 * h; j < 8 * h + 8; ++j) acc[4 * j + 2 * r] *= factor, acc[4 * j + 2 * r + 1] *= factor;
                const int a = 32 * h + 2 * r, b = a + 4;
                const float a0 = acc[a], a1 = acc[a + 1];
                acc[a] = a0 * cos[r].x + acc[b] * sin[r].x;
                acc[a + 1] = a1 * cos[r].y + acc[b + 1] * sin[r].y;
                acc[b] = acc[b] * cos[r].x - a0 * sin[r].x;
                acc[b + 1] = acc[b + 1] * cos[r].y - a1 * sin[r].y;
            }
        }
    }
};

// ---- backward: a warp per row, eight dimensions a lane, eight lanes a head, so four heads at a time.

constexpr int kWarps = 8;
constexpr int kMaxGroups = 8;  // of four query heads

__device__ __forceinline__ void unpack8(float (&x)[8], const uint4& packed) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack((&packed.x)[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
}

__global__ void __launch_bounds__(32 * kWarps) qkv_backward_kernel(const QkvBackwardParams p) {
    extern __shared__ float s_dgain[];  // [q_heads]
    for (int i = threadIdx.x; i < p.q_heads; i += 32 * kWarps) s_dgain[i] = 0.f;
    __syncthreads();
    const int lane = threadIdx.x % 32, part = lane % 8;
    const int heads = p.q_heads + 2 * p.kv_heads, normed_heads = p.q_heads + p.kv_heads;
    float dgain[kMaxGroups] = {};
    for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < p.m; row += gridDim.x * kWarps) {
        float cos[8], sin[8];
        const int position = row % p.positions;
        unpack8(cos, __ldg(reinterpret_cast<const uint4*>(p.cos + position * kHalf)));
        unpack8(sin, __ldg(reinterpret_cast<const uint4*>(p.sin + position * kHalf)));
#pragma unroll
        for (int group = 0; group < kMaxGroups; ++group) {
            const int head = 4 * group + lane / 8;
            if (4 * group >= heads) break;
            const bool is_here = head < heads, is_q = head < p.q_heads, is_normed = head < normed_heads;
            const int64_t at = (int64_t(row) * heads + head) * kQkvHeadDim + 8 * part;
            uint4 d8 = {}, x8 = {};
            if (is_here) {
                const __nv_bfloat16* from = is_q ? p.dq + (int64_t(row) * p.q_heads + head) * kQkvHeadDim
                                            : is_normed ? p.dk + (int64_t(row) * p.kv_heads + head - p.q_heads) * kQkvHeadDim
                                                        : p.dv + (int64_t(row) * p.kv_heads + head - normed_heads) * kQkvHeadDim;
                d8 = __ldg(reinterpret_cast<const uint4*>(from + 8 * part));
            }
            if (is_normed) x8 = __ldg(reinterpret_cast<const uint4*>(p.qkv + at));
            float d[8], x[8], dot = 0.f;
            unpack8(d, d8);
            unpack8(x, x8);
#pragma unroll
            for (int j = 0; j < 8; ++j) dot = fmaf(d[j], x[j], dot);
#pragma unroll
            for (int offset = 4; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
            const float gain = is_q ? __ldg(p.gain + head) : 1.f;
            dot *= gain != 0.f ? 1.f / gain : 0.f;
            if (is_q) dgain[group] += dot;
            const float rstd = is_normed ? __ldg(p.rstd + int64_t(row) * normed_heads + head) : 1.f;
            const float along = is_normed ? dot * (1.f / kQkvHeadDim) : 0.f;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                d[j] = rstd * (gain * d[j] - along * x[j]);
                const float other = __shfl_xor_sync(0xffffffffu, d[j], 1);
                if (is_normed && part < 2) d[j] = part == 0 ? d[j] * cos[j] - other * sin[j] : other * sin[j] + d[j] * cos[j];
            }
            if (is_here)
                *reinterpret_cast<uint4*>(p.dqkv + at) = {ptx::pack_bf16(d[0], d[1]), ptx::pack_bf16(d[2], d[3]), ptx::pack_bf16(d[4], d[5]),
                                                          ptx::pack_bf16(d[6], d[7])};
        }
    }
#pragma unroll
    for (int group = 0; group < kMaxGroups; ++group)
        if (part == 0 && 4 * group + lane / 8 < p.q_heads) atomicAdd(s_dgain + 4 * group + lane / 8, dgain[group]);
    __syncthreads();
    for (int i = threadIdx.x; i < p.q_heads; i += 32 * kWarps) atomicAdd(p.dgain + i, s_dgain[i]);
}

}  // namespace

cudaError_t qkv_forward(const QkvForwardParams& p, cudaStream_t stream) {
    const int normed_heads = p.q_heads + p.kv_heads;
    const QkvArguments arguments{p.gain, p.cos, p.sin, p.rstd, p.q_heads, normed_heads, p.positions};
    return gemm::launch<Qkv>(p.n, p.weight, p.qkv, nullptr, {p.m, (normed_heads + p.kv_heads) * kQkvHeadDim, p.width}, stream, arguments);
}

cudaError_t qkv_backward(const QkvBackwardParams& p, cudaStream_t stream) {
    if (p.m == 0) return cudaSuccess;
    if (p.q_heads + 2 * p.kv_heads > 4 * kMaxGroups) return cudaErrorInvalidValue;
    int device = 0, sms = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    const int ctas = min(8 * sms, (p.m + kWarps - 1) / kWarps);
    qkv_backward_kernel<<<ctas, 32 * kWarps, p.q_heads * sizeof(float), stream>>>(p);
    return cudaGetLastError();
}

}  // namespace pgolf
