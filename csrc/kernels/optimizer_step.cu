#include "kernels/optimizer_step.h"

#include <cuda_bf16.h>

#include "kernels/common/reduce.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 4;  // elements of an access

// Elements in the dtype they are stored in, four at a time where all four exist.
template <class T>
struct Elements;

template <>
struct Elements<float> {
    static __device__ __forceinline__ void load(const float* p, float (&x)[kVector]) {
        const float4 v = *reinterpret_cast<const float4*>(p);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
    static __device__ __forceinline__ void store(float* p, const float (&x)[kVector]) {
        *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
    }
    static __device__ __forceinline__ float rounded(float x) { return x; }
};

template <>
struct Elements<__nv_bfloat16> {
    static __device__ __forceinline__ void load(const __nv_bfloat16* p, float (&x)[kVector]) {
        const uint2 v = *reinterpret_cast<const uint2*>(p);
        x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
        x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
    }
    static __device__ __forceinline__ void store(__nv_bfloat16* p, const float (&x)[kVector]) {
        const __nv_bfloat162 low = __floats2bfloat162_rn(x[0], x[1]), high = __floats2bfloat162_rn(x[2], x[3]);
        *reinterpret_cast<uint2*>(p) = make_uint2(reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high));
    }
    static __device__ __forceinline__ float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
};

template <class T>
__device__ __forceinline__ void load(const void* base, int64_t first, int count, float (&x)[kVector]) {
    const T* p = static_cast<const T*>(base) + first;
    if (count == kVector) return Elements<T>::load(p, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = i < count ? float(p[i]) : 0.f;
}

template <class T>
__device__ __forceinline__ void store(void* base, int64_t first, int count, const float (&x)[kVector]) {
    T* p = static_cast<T*>(base) + first;
    if (count == kVector) return Elements<T>::store(p, x);
#pragma unroll  // NOTE: a loop to `count` would put x into local memory
    for (int i = 0; i < kVector; ++i)
        if (i < count) p[i] = T(x[i]);
}

// The tensor that this block works on, and which of the tensor's blocks it is.
template <class Entry>
__device__ __forceinline__ const Entry& entry_of_block(const TensorTable<Entry>& table, int& block) {
    int i = 0;
    while (int(blockIdx.x) >= table.first_block[i + 1]) ++i;
    block = blockIdx.x - table.first_block[i];
    return table.tensors[i];
}

// Calls f(first element, how many of four) for this thread's elements of a chunk.
template <class F>
__device__ __forceinline__ void for_each_vector(int block, int64_t elements, F f) {
#pragma unroll
    for (int i = 0; i < kOptimizerChunk / (kThreads * kVector); ++i) {
        const int64_t first = int64_t(block) * kOptimizerChunk + (i * kThreads + threadIdx.x) * kVector;
        if (first < elements) f(first, int(min(int64_t(kVector), elements - first)));
    }
}

__device__ __forceinline__ double block_sum(double x) {
    __shared__ double sums[kWarps];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0;
    for (int i = 0; i < kWarps; ++i) total += sums[i];
    return total;
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(__grid_constant__ const TensorTable<GradientNormTensor> table, double* partials) {
    int block;
    const GradientNormTensor& t = entry_of_block(table, block);
    float sum = 0;
    for_each_vector(block, t.elements, [&](int64_t first, int count) {
        float g[kVector];
        t.is_bf16 ? load<__nv_bfloat16>(t.grad, first, count, g) : load<float>(t.grad, first, count, g);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum += g[i] * g[i];
    });
    const double total = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const double* partials, int64_t count, float* norm) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *norm = float(sqrt(sum));
}

// A warp per row.
template <class G, class T>
__device__ __forceinline__ void direction_of_row(const MuonDirectionTensor& t, int64_t row, const MuonDirectionScalars& scalars) {
    using E = Elements<T>;
    using Direction = Elements<__nv_bfloat16>;
    const float scale = *scalars.scale, momentum = *scalars.momentum;
    const int lane = threadIdx.x % 32;
    const int64_t begin = row * t.columns;
    float squares = 0;
#pragma unroll 4
    for (int column = lane * kVector; column < t.columns; column += 32 * kVector) {
        const int count = min(kVector, t.columns - column);
        float g[kVector], m[kVector], d[kVector];
        load<G>(t.grad, begin + column, count, g);
        load<T>(t.momentum, begin + column, count, m);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            g[i] = E::rounded(scale * g[i]);
            m[i] = E::rounded(E::rounded(momentum * m[i]) + g[i]);
            d[i] = Direction::rounded(g[i] + momentum * m[i]);
            squares += d[i] * d[i];
        }
        store<T>(t.momentum, begin + column, count, m);
        store<__nv_bfloat16>(t.direction, begin + column, count, d);
    }
    if (scalars.row_epsilon == 0.f) return;
    const float length = Direction::rounded(fmaxf(sqrtf(warp_sum(squares)), scalars.row_epsilon));
    for (int column = lane * kVector; column < t.columns; column += 32 * kVector) {  // what this thread has just stored
        const int count = min(kVector, t.columns - column);
        float d[kVector];
        load<__nv_bfloat16>(t.direction, begin + column, count, d);
#pragma unroll
        for (int i = 0; i < kVector; ++i) d[i] = d[i] / length;
        store<__nv_bfloat16>(t.direction, begin + column, count, d);
    }
}

__global__ void __launch_bounds__(kThreads)
    direction_kernel(__grid_constant__ const TensorTable<MuonDirectionTensor> table, const MuonDirectionScalars scalars) {
    int block;
    const MuonDirectionTensor& t = entry_of_block(table, block);
    const int64_t row = int64_t(block) * kWarps + threadIdx.x / 32;
    if (row >= t.rows) return;
    using bf16 = __nv_bfloat16;
    if (t.momentum_is_bf16)
        t.grad_is_bf16 ? direction_of_row<bf16, bf16>(t, row, scalars) : direction_of_row<float, bf16>(t, row, scalars);
    else
        t.grad_is_bf16 ? direction_of_row<bf16, float>(t, row, scalars) : direction_of_row<float, float>(t, row, scalars);
}

// The rates of four elements, which may lie in two rows.
__device__ __forceinline__ void load_rates(const StepSize& s, float factor, int64_t first, int count, float (&lr)[kVector]) {
    if (s.elements_per_rate == 0) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) lr[i] = factor * s.rates[0];
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) lr[i] = factor * s.rates[(i < count ? first + i : first) / s.elements_per_rate];
    }
}

// A running average: loaded with the rest, before anything is stored.
struct Average {
    float* base;
    float values[kVector];

    __device__ __forceinline__ Average(float* base, int64_t first, int count) : base(base) {
        if (base != nullptr) load<float>(base, first, count, values);
    }
    __device__ __forceinline__ void follow(const float (&p)[kVector], float decay, int64_t first, int count) {
        if (base == nullptr) return;
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] += (1.f - decay) * (p[i] - values[i]);
        store<float>(base, first, count, values);
    }
};

__global__ void __launch_bounds__(kThreads)
    muon_apply_kernel(__grid_constant__ const TensorTable<MuonApplyTensor> table, const float* lr_factor, float average_decay) {
    int block;
    const MuonApplyTensor& t = entry_of_block(table, block);
    const float factor = *lr_factor;
    for_each_vector(block, t.elements, [&](int64_t first, int count) {
        float p[kVector], u[kVector], lr[kVector];
        load<float>(t.param, first, count, p);
        load<__nv_bfloat16>(t.update, first, count, u);
        Average average(t.average, first, count);
        load_rates(t.step_size, factor, first, count, lr);
#pragma unroll
        for (int i = 0; i < kVector; ++i) p[i] = p[i] * (1.f - lr[i] * t.step_size.weight_decay) - lr[i] * t.shape_factor * u[i];
        store<float>(t.param, first, count, p);
        average.follow(p, average_decay, first, count);
    });
}

template <class T>
__device__ __forceinline__ void adam_chunk(const AdamTensor& t, int block, const AdamScalars& s, float bias1, float bias2) {
    const float scale = *s.scale, factor = *s.lr_factor, beta1 = float(s.beta1), beta2 = float(s.beta2);
    const float rest1 = float(1 - s.beta1), rest2 = float(1 - s.beta2);
    for_each_vector(block, t.elements, [&](int64_t first, int count) {
        float p[kVector], g[kVector], mean[kVector], square[kVector], lr[kVector];
        load<T>(t.param, first, count, p);
        load<T>(t.grad, first, count, g);
        load<T>(t.mean, first, count, mean);
        load<T>(t.square, first, count, square);
        Average average(t.average, first, count);
        load_rates(t.step_size, factor, first, count, lr);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            g[i] = Elements<T>::rounded(scale * g[i]);
            mean[i] = beta1 * mean[i] + rest1 * g[i];
            square[i] = beta2 * square[i] + rest2 * g[i] * g[i];
            const float update = mean[i] / bias1 / (sqrtf(square[i] / bias2) + s.epsilon);
            p[i] = Elements<T>::rounded(p[i] * (1.f - lr[i] * t.step_size.weight_decay) - lr[i] * update);
        }
        store<T>(t.mean, first, count, mean);
        store<T>(t.square, first, count, square);
        store<T>(t.param, first, count, p);
        average.follow(p, s.average_decay, first, count);
    });
}

__global__ void __launch_bounds__(kThreads) adam_apply_kernel(__grid_constant__ const TensorTable<AdamTensor> table, const AdamScalars s) {
    __shared__ float bias[2];
    if (threadIdx.x % 32 == 0 && threadIdx.x < 64) bias[threadIdx.x / 32] = float(1 - pow(threadIdx.x == 0 ? s.beta1 : s.beta2, *s.step));
    __syncthreads();
    int block;
    const AdamTensor& t = entry_of_block(table, block);
    t.is_bf16 ? adam_chunk<__nv_bfloat16>(t, block, s, bias[0], bias[1]) : adam_chunk<float>(t, block, s, bias[0], bias[1]);
}

template <class Entry, class F>
int fill_blocks(TensorTable<Entry>& table, F blocks_of) {
    table.first_block[0] = 0;
    for (int i = 0; i < table.count; ++i) table.first_block[i + 1] = table.first_block[i] + int(blocks_of(table.tensors[i]));
    return table.first_block[table.count];
}

template <class Entry>
int chunk_blocks(TensorTable<Entry>& table) {
    return fill_blocks(table, [](const Entry& t) { return optimizer_chunks(t.elements); });
}

}  // namespace

int64_t optimizer_chunks(int64_t elements) { return (elements + kOptimizerChunk - 1) / kOptimizerChunk; }

cudaError_t gradient_norm(TensorTable<GradientNormTensor>& table, double* partials, float* norm, cudaStream_t stream) {
    const int blocks = chunk_blocks(table);
    if (blocks > 0) squares_kernel<<<blocks, kThreads, 0, stream>>>(table, partials);
    norm_kernel<<<1, kThreads, 0, stream>>>(partials, blocks, norm);
    return cudaGetLastError();
}

cudaError_t muon_direction(TensorTable<MuonDirectionTensor>& table, const MuonDirectionScalars& scalars, cudaStream_t stream) {
    const int blocks = fill_blocks(table, [](const MuonDirectionTensor& t) { return (t.rows + kWarps - 1) / kWarps; });
    if (blocks > 0) direction_kernel<<<blocks, kThreads, 0, stream>>>(table, scalars);
    return cudaGetLastError();
}

cudaError_t muon_apply(TensorTable<MuonApplyTensor>& table, const float* lr_factor, float average_decay, cudaStream_t stream) {
    const int blocks = chunk_blocks(table);
    if (blocks > 0) muon_apply_kernel<<<blocks, kThreads, 0, stream>>>(table, lr_factor, average_decay);
    return cudaGetLastError();
}

cudaError_t adam_apply(TensorTable<AdamTensor>& table, const AdamScalars& scalars, cudaStream_t stream) {
    const int blocks = chunk_blocks(table);
    if (blocks > 0) adam_apply_kernel<<<blocks, kThreads, 0, stream>>>(table, scalars);
    return cudaGetLastError();
}

}  // namespace pgolf
