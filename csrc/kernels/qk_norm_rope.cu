// A thread keeps its head and its eight channels for the whole kernel and walks over the rows.
#include "kernels/qk_norm_rope.h"

#include "kernels/common/vector8.cuh"

namespace pgolf {
namespace {

constexpr int kHeadLanes = kQkHeadDim / 8;
constexpr int kCtaRows = 4;  // at a time; a multiple of four makes whole warps of any number of heads
constexpr int kUnroll = 4;   // rows of a thread whose loads are in flight together
constexpr int kMaxThreads = kQkMaxHeads * kHeadLanes * kCtaRows;
constexpr float kEpsilon = 1.1920928955078125e-7f;  // 2^-23, RMS_EPSILON of the model

__device__ __forceinline__ float head_sum(float x) {
#pragma unroll
    for (int offset = kHeadLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// What a thread is for: eight channels of one head.
struct Place {
    int head, row, lane, column;  // row: of the CTA's; column: of the packed matrix
    bool is_query, is_value;
    int partner, table;           // lane of the channels these rotate with, and column of the rotary table
    bool rotates, is_first;       // first: of the pair (i, i + half)

    __device__ explicit Place(const QkNormRopeParams& p, int heads) {
        const int group = threadIdx.x / kHeadLanes, half_lanes = p.half / 8;
        head = group % heads, row = group / heads, lane = threadIdx.x % kHeadLanes;
        column = head * kQkHeadDim + 8 * lane;
        is_query = head < p.q_heads, is_value = head >= p.q_heads + p.kv_heads;
        rotates = lane < 2 * half_lanes && !is_value, is_first = lane < half_lanes;
        partner = threadIdx.x % 32 + (!rotates ? 0 : is_first ? half_lanes : -half_lanes);
        table = 8 * (is_first ? lane : lane - half_lanes);
    }

    // The channels of this head in the matrix of its kind alone.
    __device__ const QkRows& rows(const QkNormRopeParams& p) const { return is_query ? p.q : is_value ? p.v : p.k; }
    __device__ int own_column(const QkNormRopeParams& p) const {
        return column - (is_query ? 0 : is_value ? p.q_heads + p.kv_heads : p.q_heads) * kQkHeadDim;
    }
};

__device__ __forceinline__ uint4& vector_at(const QkRows& rows, uint32_t row, int column) {
    return *reinterpret_cast<uint4*>(rows.data + int64_t(row) * rows.stride + column);
}

__device__ __forceinline__ uint4 from_lane(const uint4& x, int lane) {
    return {__shfl_sync(0xffffffffu, x.x, lane), __shfl_sync(0xffffffffu, x.y, lane), __shfl_sync(0xffffffffu, x.z, lane), __shfl_sync(0xffffffffu, x.w, lane)};
}

// y = x cos +- other sin, where this lane rotates: + for the first of a pair, and the other way round in the transpose.
__device__ __forceinline__ void rotate(float (&x)[8], const uint4& packed_other, const QkNormRopeParams& p, const Place& place, uint32_t row, bool transpose) {
    if (!place.rotates) return;
    const int64_t entry = int64_t(row % p.positions) * p.half + place.table;
    float other[8], cosine[8], sine[8];
    unpack8(other, packed_other);
    unpack8(cosine, __ldg(reinterpret_cast<const uint4*>(p.cos + entry)));
    unpack8(sine, __ldg(reinterpret_cast<const uint4*>(p.sin + entry)));
    const float sign = place.is_first != transpose ? 1.f : -1.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = fmaf(sign * sine[j], other[j], x[j] * cosine[j]);
}

__global__ void __launch_bounds__(kMaxThreads) qk_norm_rope_fwd_kernel(const QkNormRopeParams p) {
    const Place place(p, p.q_heads + (p.v.data ? 2 : 1) * p.kv_heads);
    const float gain = place.is_query ? p.gain[place.head] : 1.f;
    const QkRows out = place.rows(p);
    const int out_column = place.own_column(p);
    for (uint32_t first = blockIdx.x * kCtaRows * kUnroll; first < p.m; first += gridDim.x * kCtaRows * kUnroll) {
        uint4 packed[kUnroll], added[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const uint32_t row = min(first + u * kCtaRows + place.row, p.m - 1);  // past the end: work thrown away, so that warps stay whole
            packed[u] = vector_at(p.qkv, row, place.column);
            if (place.is_value) added[u] = vector_at(p.value_add, row, out_column);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const uint32_t row = first + u * kCtaRows + place.row;
            float x[8], sum = 0.f;
            unpack8(x, packed[u]);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum = fmaf(x[j], x[j], sum);
            const float scale = gain * rsqrtf(head_sum(sum) * (1.f / kQkHeadDim) + kEpsilon);
            rotate(x, from_lane(packed[u], place.partner), p, place, row, false);
            if (place.is_value) {
                float a[8];
                unpack8(a, added[u]);
#pragma unroll
                for (int j = 0; j < 8; ++j) x[j] += a[j];
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j) x[j] *= scale;
            }
            if (row < p.m) vector_at(out, row, out_column) = pack8(x);
        }
    }
}

__global__ void __launch_bounds__(kMaxThreads) qk_norm_rope_bwd_kernel(const QkNormRopeParams p) {
    __shared__ float s_sums[kMaxThreads / kHeadLanes];
    const int heads = p.q_heads + (p.v.data ? 2 : 1) * p.kv_heads;
    const Place place(p, heads);
    const float gain = place.is_query ? p.gain[place.head] : 1.f;
    const QkRows in = place.rows(p);
    const int in_column = place.own_column(p);
    float gain_sum = 0.f;
    for (uint32_t first = blockIdx.x * kCtaRows * kUnroll; first < p.m; first += gridDim.x * kCtaRows * kUnroll) {
        uint4 packed[kUnroll] = {}, packed_d[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const uint32_t row = min(first + u * kCtaRows + place.row, p.m - 1);
            // NOTE: the result may overwrite what is read here, so rows past the end may hold the last row's result; they are not counted.
            packed_d[u] = vector_at(in, row, in_column);
            if (!place.is_value) packed[u] = vector_at(p.qkv, row, place.column);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const uint32_t row = first + u * kCtaRows + place.row;
            float x[8], t[8], squares = 0.f, dot = 0.f;
            unpack8(x, packed[u]);
            unpack8(t, packed_d[u]);
            rotate(t, from_lane(packed_d[u], place.partner), p, place, row, true);
#pragma unroll
            for (int j = 0; j < 8; ++j) squares = fmaf(x[j], x[j], squares), dot = fmaf(x[j], t[j], dot);
            const float rstd = rsqrtf(head_sum(squares) * (1.f / kQkHeadDim) + kEpsilon);
            dot = head_sum(dot) * rstd;  // n . t
            if (row >= p.m) continue;
            gain_sum += dot;
            const float scale = place.is_value ? 1.f : gain * rstd, along = place.is_value ? 0.f : rstd * dot * (1.f / kQkHeadDim);
#pragma unroll
            for (int j = 0; j < 8; ++j) t[j] = scale * fmaf(-along, x[j], t[j]);
            vector_at(p.d_qkv, row, place.column) = pack8(t);
        }
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
    int device = 0, num_sms = 0, per_sm = 0;
    launch.threads = (p.q_heads + (p.v.data ? 2 : 1) * p.kv_heads) * kHeadLanes * kCtaRows;
    if (cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
    if (cudaError_t status = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device); status != cudaSuccess) return status;
    if (cudaError_t status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, launch.threads, 0); status != cudaSuccess) return status;
    const int64_t wanted = (int64_t(p.m) + kCtaRows * kUnroll - 1) / (kCtaRows * kUnroll);
    launch.ctas = int(min(wanted, int64_t(min(num_sms * per_sm, kQkMaxCtas))));
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
