// A thread keeps its head and its sixteen channels for the whole kernel and walks over the rows.
#include "kernels/qk_norm_rope.h"

#include "kernels/common/launch.h"
#include "kernels/common/vector8.cuh"

namespace pgolf {
namespace {

constexpr int kVectors = 2;  // of 8 channels, neighbours: the dimensions that rotate with each other lie in one thread
static_assert(kQkHalf == 8);
constexpr int kHeadLanes = kQkHeadDim / 8 / kVectors;
constexpr int kCtaRows = 8;  // at a time; a multiple of eight makes whole warps of any number of heads
constexpr int kMaxThreads = kQkMaxHeads * kHeadLanes * kCtaRows;
constexpr float kEpsilon = 1.1920928955078125e-7f;  // 2^-23, RMS_EPSILON of the model

__device__ __forceinline__ float head_sum(float x) {
#pragma unroll
    for (int offset = kHeadLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// What a thread is for: sixteen channels of one head.
struct Place {
    int head, row, lane, column;  // row: of the CTA's; column: of the packed matrix
    bool is_query, is_value;

    __device__ explicit Place(const QkNormRopeParams& p, int heads) {
        const int group = threadIdx.x / kHeadLanes;
        head = group % heads, row = group / heads, lane = threadIdx.x % kHeadLanes;
        column = head * kQkHeadDim + 8 * kVectors * lane;
        is_query = head < p.q_heads, is_value = head >= p.q_heads + p.kv_heads;
    }

    // The channels of this head in the matrix of its kind alone.
    __device__ const QkRows& rows(const QkNormRopeParams& p) const { return is_query ? p.q : is_value ? p.v : p.k; }
    __device__ int own_column(const QkNormRopeParams& p) const {
        return column - (is_query ? 0 : is_value ? p.q_heads + p.kv_heads : p.q_heads) * kQkHeadDim;
    }
};

// The rows of a thread and their positions, which advance without a division.
struct Walk {
    uint32_t first, step, position, position_step;

    __device__ Walk(const QkNormRopeParams& p, const Place& place) : first(blockIdx.x * kCtaRows), step(gridDim.x * kCtaRows) {
        position = (first + place.row) % p.positions, position_step = step % p.positions;
    }
    __device__ __forceinline__ void advance(const QkNormRopeParams& p) {
        first += step, position += position_step;
        if (position >= p.positions) position -= p.positions;
    }
};

using Channels = uint4[kVectors];

__device__ __forceinline__ void load(Channels& x, const QkRows& rows, uint32_t row, int column) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) x[v] = *reinterpret_cast<const uint4*>(rows.data + int64_t(row) * rows.stride + column + 8 * v);
}

__device__ __forceinline__ void store(const QkRows& rows, uint32_t row, int column, const float (&x)[kVectors][8]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<uint4*>(rows.data + int64_t(row) * rows.stride + column + 8 * v) = pack8(x[v]);
}

// The rotation of a head's 16 leading dimensions, i with i + 8: the first lane's two vectors.
struct Rotation {
    uint4 cosine, sine;
    bool rotates;

    // NOTE: loaded with the row, not where it is used: its latency would be waited for once per row.
    __device__ __forceinline__ Rotation(const QkNormRopeParams& p, const Place& place, uint32_t position)
        : rotates(place.lane == 0 && !place.is_value) {
        if (!rotates) return;
        cosine = __ldg(reinterpret_cast<const uint4*>(p.cos) + position);
        sine = __ldg(reinterpret_cast<const uint4*>(p.sin) + position);
    }

    __device__ __forceinline__ void apply(float (&x)[kVectors][8], float sign) const {  // sign -1: the transpose
        if (!rotates) return;
        float c[8], s[8];
        unpack8(c, cosine);
        unpack8(s, sine);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float a = x[0][j], b = x[1][j], signed_sine = sign * s[j];
            x[0][j] = fmaf(b, signed_sine, a * c[j]);
            x[1][j] = fmaf(-a, signed_sine, b * c[j]);
        }
    }
};

__global__ void __maxnreg__(56) qk_norm_rope_fwd_kernel(const QkNormRopeParams p) {
    const Place place(p, p.q_heads + (p.v.data ? 2 : 1) * p.kv_heads);
    const float gain = place.is_query ? p.gain[place.head] : 1.f;
    const QkRows out = place.rows(p);
    const int out_column = place.own_column(p);
    for (Walk walk(p, place); walk.first < p.m; walk.advance(p)) {
        const uint32_t row = walk.first + place.row;
        const uint32_t read_row = min(row, p.m - 1);  // past the end: work thrown away, so that warps stay whole
        Channels packed, added;
        load(packed, p.qkv, read_row, place.column);
        if (place.is_value) load(added, p.value_add, read_row, out_column);
        const Rotation rotation(p, place, walk.position);

        float x[kVectors][8], squares = 0.f;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            unpack8(x[v], packed[v]);
#pragma unroll
            for (int j = 0; j < 8; ++j) squares = fmaf(x[v][j], x[v][j], squares);
        }
        const float scale = gain * rsqrtf(head_sum(squares) * (1.f / kQkHeadDim) + kEpsilon);
        rotation.apply(x, 1.f);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            float a[8] = {};
            if (place.is_value) unpack8(a, added[v]);
#pragma unroll
            for (int j = 0; j < 8; ++j) x[v][j] = place.is_value ? x[v][j] + a[j] : scale * x[v][j];
        }
        if (row < p.m) store(out, row, out_column, x);
    }
}

__global__ void __maxnreg__(64) qk_norm_rope_bwd_kernel(const QkNormRopeParams p) {
    __shared__ float s_sums[kMaxThreads / kHeadLanes];
    const int heads = p.q_heads + (p.v.data ? 2 : 1) * p.kv_heads;
    const Place place(p, heads);
    const float gain = place.is_query ? p.gain[place.head] : 1.f;
    const QkRows in = place.rows(p);
    const int in_column = place.own_column(p);
    float gain_sum = 0.f;
    for (Walk walk(p, place); walk.first < p.m; walk.advance(p)) {
        const uint32_t row = walk.first + place.row, read_row = min(row, p.m - 1);
        // NOTE: the result may overwrite what is read here, so threads past the end may read the last row's result; they are not counted.
        Channels packed = {}, packed_d;
        load(packed_d, in, read_row, in_column);
        if (!place.is_value) load(packed, p.qkv, read_row, place.column);
        const Rotation rotation(p, place, walk.position);

        float x[kVectors][8], t[kVectors][8], squares = 0.f, dot = 0.f;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) unpack8(t[v], packed_d[v]);
        rotation.apply(t, -1.f);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            unpack8(x[v], packed[v]);
#pragma unroll
            for (int j = 0; j < 8; ++j) squares = fmaf(x[v][j], x[v][j], squares), dot = fmaf(x[v][j], t[v][j], dot);
        }
        const float rstd = rsqrtf(head_sum(squares) * (1.f / kQkHeadDim) + kEpsilon);
        dot = head_sum(dot) * rstd;  // n . t
        if (row >= p.m) continue;
        gain_sum += dot;
        const float scale = place.is_value ? 1.f : gain * rstd, along = rstd * dot * (1.f / kQkHeadDim);  // a value's x is zero
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
#pragma unroll
            for (int j = 0; j < 8; ++j) t[v][j] = scale * fmaf(-along, x[v][j], t[v][j]);
        store(p.d_qkv, row, place.column, t);
    }
    if (threadIdx.x % kHeadLanes == 0) s_sums[threadIdx.x / kHeadLanes] = gain_sum;
    __syncthreads();
    if (threadIdx.x >= p.q_heads) return;
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < kCtaRows; ++r) sum += s_sums[r * heads + threadIdx.x];
    p.partial_sums[int64_t(blockIdx.x) * p.q_heads + threadIdx.x] = sum;
}

// A warp per query head; every run adds in the same order.
__global__ void qk_norm_rope_gain_kernel(const QkNormRopeParams p, int num_ctas) {
    const int head = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0.f;
#pragma unroll 8
    for (int cta = lane; cta < num_ctas; cta += 32) sum += p.partial_sums[int64_t(cta) * p.q_heads + head];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) p.d_gain[head] = sum;
}

// ---- launch ---------------------------------------------------------------------------------------------

struct Launch {
    int ctas, threads;
};

template <typename Kernel>
cudaError_t persistent_launch(Kernel kernel, const QkNormRopeParams& p, Launch& launch) {
    launch.threads = (p.q_heads + (p.v.data ? 2 : 1) * p.kv_heads) * kHeadLanes * kCtaRows;
    if (cudaError_t status = resident_ctas(kernel, launch.threads, launch.ctas); status != cudaSuccess) return status;
    launch.ctas = int(min((p.m + kCtaRows - 1) / kCtaRows, uint32_t(min(launch.ctas, kQkMaxCtas))));
    return cudaSuccess;
}

}  // namespace

cudaError_t qk_norm_rope_fwd(const QkNormRopeParams& p, cudaStream_t stream) {
    Launch launch;
    if (cudaError_t status = persistent_launch(qk_norm_rope_fwd_kernel, p, launch); status != cudaSuccess) return status;
    qk_norm_rope_fwd_kernel<<<launch.ctas, launch.threads, 0, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t qk_norm_rope_bwd(const QkNormRopeParams& p, cudaStream_t stream) {
    Launch launch;
    if (cudaError_t status = persistent_launch(qk_norm_rope_bwd_kernel, p, launch); status != cudaSuccess) return status;
    qk_norm_rope_bwd_kernel<<<launch.ctas, launch.threads, 0, stream>>>(p);
    qk_norm_rope_gain_kernel<<<1, 32 * p.q_heads, 0, stream>>>(p, launch.ctas);
    return cudaGetLastError();
}

}  // namespace pgolf
