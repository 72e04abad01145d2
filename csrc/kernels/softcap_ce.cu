// Three kernels: a tiny one counts the rows kept (the mean's gradient needs the count before the first row is
// written) and checks the targets; then one of two kernels does all the rows:
//
//   rows in registers   32 to 256 threads per row, kVectors 16-byte vectors each; the next row's loads are in
//                       flight while this row is reduced, scaled and stored
//   long rows           256 threads per row, three passes
#include "kernels/softcap_ce.h"

#include "kernels/common/ptx.cuh"
#include "kernels/common/reduce.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kCtasPerSm = 3;  // 80 registers per thread: a row of kVectors vectors as floats, and the next row as bf16
constexpr int kVectors = kSoftcapCEMaxRow / 8 / kThreads;
constexpr int kCountThreads = 1024;
constexpr float kMaxConstantShiftCap = 40.f;
constexpr float kLog2E = 1.4426950408889634f;

// tanh on |u| <= 1 without the special-function unit, whose only slot goes to the exponential: u P(u^2) of degree 13,
// minimax in relative error (5.0e-8; with fp32 rounding 1.6e-7 over all floats of the range).
__device__ __forceinline__ float tanh_polynomial(float u) {
    const float s = u * u;
    float p = 1.041022595e-03f;
    p = fmaf(p, s, -6.203379016e-03f);
    p = fmaf(p, s, 2.028997988e-02f);
    p = fmaf(p, s, -5.345702916e-02f);
    p = fmaf(p, s, 1.332520396e-01f);
    p = fmaf(p, s, -3.333283961e-01f);
    p = fmaf(p, s, 9.999999404e-01f);
    return u * p;
}

// tanh on all floats: 1 - 2 / (1 + e^(2|u|)) where the polynomial ends.
__device__ __forceinline__ float tanh_any(float u) {
    const float far = 1.f - __fdividef(2.f, 1.f + ptx::exp2_approx(2.f * kLog2E * fabsf(u)));
    return fabsf(u) <= 1.f ? tanh_polynomial(u) : copysignf(far, u);
}

// What the elements of one row share.
struct Softcap {
    float inv_cap, cap_log2e;
    float t_shift;  // exponentials are taken relative to z = cap t_shift

    __device__ explicit Softcap(float cap) : inv_cap(1.f / cap), cap_log2e(cap * kLog2E), t_shift(1.f) {}

    template <bool kAny>
    __device__ __forceinline__ float tanh(float x) const {
        return kAny ? tanh_any(x * inv_cap) : tanh_polynomial(x * inv_cap);
    }
    __device__ __forceinline__ float exponential(float t) const { return ptx::exp2_approx(fmaf(t, cap_log2e, -cap_log2e * t_shift)); }
};

__device__ __forceinline__ float slope(float t) { return fmaf(-t, t, 1.f); }

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// A row's target in 32 bits: its column, or one of these.
enum : int { kIgnored = -1, kOutOfRange = -2 };

__device__ __forceinline__ int target_of(uint32_t row, const SoftcapCEParams& p) {
    if (row >= p.n) return kIgnored;
    const int64_t target = p.targets[row];
    return target == p.ignore_index ? kIgnored : target >= 0 && target < p.v ? int(target) : kOutOfRange;
}

__device__ __forceinline__ float or_nan(float x, int target) { return target == kOutOfRange ? __int_as_float(0x7fffffff) : x; }

// ---- reductions, each in a fixed order ------------------------------------------------------------

struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over the kRowThreads threads of a row. NOTE: two scratch rows in turn, so that one barrier per reduction is enough:
// a row of scratch is written again only behind the next reduction's barrier, which waits for its readers.
template <int kRowThreads>
struct RowReduction {
    float (*scratch)[kWarps];
    int turn = 0;

    template <typename Op>
    __device__ __forceinline__ float operator()(float x, Op op) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
        if constexpr (kRowThreads > 32) {
            constexpr int kRowWarps = kRowThreads / 32;
            const int group = threadIdx.x / kRowThreads;
            if (threadIdx.x % 32 == 0) scratch[turn][threadIdx.x / 32] = x;
            ptx::named_sync(1 + group, kRowThreads);
            x = scratch[turn][group * kRowWarps];
#pragma unroll
            for (int w = 1; w < kRowWarps; ++w) x = op(x, scratch[turn][group * kRowWarps + w]);
            turn ^= 1;
        }
        return x;
    }
};

template <typename T>
__device__ __forceinline__ T cta_sum(T x) {
    __shared__ T s_warp[32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll 1
    for (int w = 0; w < int(blockDim.x / 32); ++w) x += s_warp[w];
    return x;
}

__device__ int64_t rows_kept(const SoftcapCEWorkspace& workspace) {
    static_assert(SoftcapCEWorkspace::kCountCtas == 32);
    int64_t kept = workspace.kept[threadIdx.x % 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) kept += __shfl_xor_sync(0xffffffffu, kept, offset);
    return kept;
}

// Sum of every thread's `loss` over the grid, by the last CTA to arrive.
__device__ void reduce_loss(const SoftcapCEParams& p, double loss, int64_t kept) {
    __shared__ bool s_last;
    SoftcapCEWorkspace& w = *p.workspace;
    loss = cta_sum(loss);
    if (threadIdx.x == 0) {
        w.loss[blockIdx.x] = loss;
        __threadfence();
        s_last = atomicAdd(&w.arrived, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!s_last) return;
    __threadfence();
    loss = 0;
    for (unsigned cta = threadIdx.x; cta < gridDim.x; cta += kThreads) loss += __ldcg(&w.loss[cta]);
    loss = cta_sum(loss);
    if (threadIdx.x == 0) *p.loss = float(p.reduction == SoftcapCEReduction::kMean ? loss / double(kept) : loss);
}

// ---- targets ------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kCountThreads) softcap_ce_targets_kernel(const SoftcapCEParams p) {
    ptx::grid_dependency_launch();
    int64_t kept = 0;
    for (uint32_t row = blockIdx.x * kCountThreads + threadIdx.x; row < p.n; row += gridDim.x * kCountThreads) {
        const int target = target_of(row, p);
        kept += target != kIgnored;
        if (target == kOutOfRange) {
            volatile int64_t* report = p.report;
            report[1] = p.targets[row];
            report[2] = p.v;
            __threadfence_system();
            report[0] = int64_t(row) + 1;
        }
    }
    kept = cta_sum(kept);
    if (threadIdx.x == 0) p.workspace->kept[blockIdx.x] = kept;
    if (threadIdx.x == 0 && blockIdx.x == 0) p.workspace->arrived = 0;
}

// ---- rows in registers --------------------------------------------------------------------------------

// Thread `rank` of a row holds the vectors rank, rank + kRowThreads, ... of 8 columns.
template <int kRowThreads>
__device__ __forceinline__ void load_row(uint4 (&x)[kVectors], const __nv_bfloat16* row, int rank, int num_vectors) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int vector = k * kRowThreads + rank;
        x[k] = vector < num_vectors ? __ldcs(reinterpret_cast<const uint4*>(row) + vector) : uint4{0, 0, 0, 0};
    }
}

// Largest |x| of two bf16 in each word.
__device__ __forceinline__ float largest_magnitude(const uint4 (&x)[kVectors]) {
    __nv_bfloat162 m{0.f, 0.f};
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = (&x[k].x)[i];
            m = __hmax2(m, __habs2(reinterpret_cast<const __nv_bfloat162&>(word)));
        }
    return fmaxf(__low2float(m), __high2float(m));
}

// Sum of the exponentials; leaves exponential times slope in g.
template <int kRowThreads, bool kWithGrad, bool kAny>
__device__ __forceinline__ float exponentials(float (&g)[8 * kVectors], const uint4 (&x)[kVectors], const Softcap& cap, int rank, int num_vectors) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        if (k * kRowThreads + rank >= num_vectors) break;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const uint32_t pair = (&x[k].x)[j / 2];
            const float t = cap.tanh<kAny>(j % 2 ? high_bf16(pair) : low_bf16(pair));
            const float e = cap.exponential(t);
            sum += e;
            if constexpr (kWithGrad) g[8 * k + j] = e * slope(t);
        }
    }
    return sum;
}

template <int kRowThreads, bool kWithGrad, bool kRowShift>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) softcap_ce_rows_kernel(const SoftcapCEParams p) {
    constexpr int kGroups = kThreads / kRowThreads;
    __shared__ float s_scratch[2][kWarps];
    RowReduction<kRowThreads> reduce{s_scratch};
    const int rank = threadIdx.x % kRowThreads;
    const int num_vectors = p.v / 8;
    const uint32_t step = gridDim.x * kGroups;
    Softcap cap(p.cap);

    // One row ahead: the row, its target's logit. Two rows ahead: the target, which says where that logit is.
    uint32_t row = blockIdx.x * kGroups + threadIdx.x / kRowThreads;
    uint4 x[kVectors];
    int target = target_of(row, p), next_target = target_of(row + step, p);
    __nv_bfloat16 x_target{};
    if (row < p.n) {
        load_row<kRowThreads>(x, p.logits + int64_t(row) * p.row_stride, rank, num_vectors);
        x_target = p.logits[int64_t(row) * p.row_stride + max(target, 0)];
    }

    ptx::grid_dependency_wait();
    const int64_t kept = rows_kept(*p.workspace);
    const float weight = p.reduction == SoftcapCEReduction::kMean ? 1.f / float(kept) : 1.f;
    double loss_sum = 0;

    for (; row < p.n; row += step) {
        if constexpr (kRowShift) {
            float largest = -INFINITY;
#pragma unroll
            for (int k = 0; k < kVectors; ++k)
                if (k * kRowThreads + rank < num_vectors)
#pragma unroll
                    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fmaxf(low_bf16((&x[k].x)[i]), high_bf16((&x[k].x)[i])));
            cap.t_shift = cap.tanh<true>(reduce(largest, Max{}));
        }
        float g[8 * kVectors];
        const bool within_polynomial = __all_sync(0xffffffffu, largest_magnitude(x) <= p.cap);
        float sum = within_polynomial ? exponentials<kRowThreads, kWithGrad, false>(g, x, cap, rank, num_vectors)
                                      : exponentials<kRowThreads, kWithGrad, true>(g, x, cap, rank, num_vectors);

        const float t_target = cap.tanh<true>(__bfloat162float(x_target));
        if (row + step < p.n) {
            load_row<kRowThreads>(x, p.logits + int64_t(row + step) * p.row_stride, rank, num_vectors);
            x_target = p.logits[int64_t(row + step) * p.row_stride + max(next_target, 0)];
        }

        sum = reduce(sum, Sum{});
        if (rank == 0) {
            const float loss = target == kIgnored ? 0.f : or_nan(fmaf(p.cap, cap.t_shift - t_target, logf(sum)), target);
            if (p.reduction == SoftcapCEReduction::kNone) p.loss[row] = loss;
            loss_sum += loss;
        }
        if constexpr (kWithGrad) {
            const float row_weight = or_nan(weight, target), scale = row_weight / sum;
            __nv_bfloat16* grad = p.grad_logits + int64_t(row) * p.v;
#pragma unroll
            for (int k = 0; k < kVectors; ++k) {
                const int vector = k * kRowThreads + rank;
                if (vector >= num_vectors) break;
                uint4 d{0, 0, 0, 0};
                if (target != kIgnored)
#pragma unroll
                    for (int i = 0; i < 4; ++i) (&d.x)[i] = ptx::pack_bf16(scale * g[8 * k + 2 * i], scale * g[8 * k + 2 * i + 1]);
                __stcs(reinterpret_cast<uint4*>(grad) + vector, d);
            }
            // The thread that stored the target's column stores it again, now with the -1.
            if (target >= 0 && rank == (target / 8) % kRowThreads)
                grad[target] = __float2bfloat16_rn((cap.exponential(t_target) / sum - 1.f) * slope(t_target) * row_weight);
        }
        target = next_target;
        next_target = target_of(row + 2 * step, p);
    }
    if (p.reduction != SoftcapCEReduction::kNone) reduce_loss(p, loss_sum, kept);
}

// ---- long or unaligned rows -----------------------------------------------------------------------------

template <bool kAligned>
__device__ __forceinline__ void load8(float (&x)[8], const __nv_bfloat16* row, int column, int count) {
    if constexpr (kAligned) {
        const uint4 v = *reinterpret_cast<const uint4*>(row + column);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = j % 2 ? high_bf16((&v.x)[j / 2]) : low_bf16((&v.x)[j / 2]);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = j < count ? __bfloat162float(row[column + j]) : 0.f;
    }
}

template <bool kAligned, bool kWithGrad>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) softcap_ce_long_rows_kernel(const SoftcapCEParams p) {
    __shared__ float s_scratch[2][kWarps];
    RowReduction<kThreads> reduce{s_scratch};
    Softcap cap(p.cap);
    ptx::grid_dependency_wait();
    const int64_t kept = rows_kept(*p.workspace);
    const float weight = p.reduction == SoftcapCEReduction::kMean ? 1.f / float(kept) : 1.f;
    double loss_sum = 0;

    for (uint32_t row = blockIdx.x; row < p.n; row += gridDim.x) {
        const __nv_bfloat16* logits = p.logits + int64_t(row) * p.row_stride;
        const auto for_each_chunk = [&](auto&& use) {
            for (int column = 8 * threadIdx.x; column < p.v; column += 8 * kThreads) {
                const int count = min(p.v - column, 8);
                float x[8];
                load8<kAligned>(x, logits, column, count);
                use(x, column, count);
            }
        };
        float largest = -INFINITY;
        for_each_chunk([&](const float (&x)[8], int, int count) {
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (j < count) largest = fmaxf(largest, x[j]);
        });
        cap.t_shift = cap.tanh<true>(reduce(largest, Max{}));

        float sum = 0.f;
        for_each_chunk([&](const float (&x)[8], int, int count) {
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (j < count) sum += cap.exponential(cap.tanh<true>(x[j]));
        });
        sum = reduce(sum, Sum{});

        const int target = target_of(row, p);
        if (threadIdx.x == 0) {
            const float t_target = cap.tanh<true>(__bfloat162float(logits[max(target, 0)]));
            const float loss = target == kIgnored ? 0.f : or_nan(fmaf(p.cap, cap.t_shift - t_target, logf(sum)), target);
            if (p.reduction == SoftcapCEReduction::kNone) p.loss[row] = loss;
            loss_sum += loss;
        }
        if constexpr (kWithGrad) {
            const float row_weight = or_nan(weight, target), inv_sum = 1.f / sum;
            __nv_bfloat16* grad = p.grad_logits + int64_t(row) * p.v;
            for_each_chunk([&](const float (&x)[8], int column, int count) {
                float d[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float t = cap.tanh<true>(x[j]);
                    const float softmax = cap.exponential(t) * inv_sum;
                    d[j] = target == kIgnored ? 0.f : (softmax - float(column + j == target)) * slope(t) * row_weight;
                }
                if constexpr (kAligned) {
                    *reinterpret_cast<uint4*>(grad + column) = {ptx::pack_bf16(d[0], d[1]), ptx::pack_bf16(d[2], d[3]), ptx::pack_bf16(d[4], d[5]),
                                                                ptx::pack_bf16(d[6], d[7])};
                } else {
#pragma unroll
                    for (int j = 0; j < 8; ++j)
                        if (j < count) grad[column + j] = __float2bfloat16_rn(d[j]);
                }
            });
        }
    }
    if (p.reduction != SoftcapCEReduction::kNone) reduce_loss(p, loss_sum, kept);
}

// ---- scaling ----------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) softcap_ce_scale_kernel(const SoftcapCEScaleParams p) {
    if (p.scale_stride == 0 && *p.scale == 1.f) return;
    const int64_t total = p.n * p.v;
    for (int64_t first = 8 * (int64_t(blockIdx.x) * kThreads + threadIdx.x); first < total; first += 8 * int64_t(gridDim.x) * kThreads) {
        const int count = int(min(total - first, int64_t(8)));
        const int64_t first_row = p.scale_stride ? first / p.v : 0, last_row = p.scale_stride ? (first + count - 1) / p.v : 0;
        __nv_bfloat16* grad = p.grad_logits + first;
        if (count == 8 && first_row == last_row) {
            const float scale = p.scale[first_row * p.scale_stride];
            if (scale == 1.f) continue;
            uint4 v = __ldcs(reinterpret_cast<const uint4*>(grad));
#pragma unroll
            for (int i = 0; i < 4; ++i) (&v.x)[i] = ptx::pack_bf16(scale * low_bf16((&v.x)[i]), scale * high_bf16((&v.x)[i]));
            __stcs(reinterpret_cast<uint4*>(grad), v);
        } else {
            for (int j = 0; j < count; ++j)
                grad[j] = __float2bfloat16_rn(p.scale[p.scale_stride ? (first + j) / p.v * p.scale_stride : 0] * __bfloat162float(grad[j]));
        }
    }
}

// ---- launch ---------------------------------------------------------------------------------------------

cudaError_t multiprocessors(int& count) {
    int device = 0;
    if (cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

template <int kRowThreads>
auto rows_kernel(bool with_grad, bool row_shift) {
    if (with_grad) return row_shift ? softcap_ce_rows_kernel<kRowThreads, true, true> : softcap_ce_rows_kernel<kRowThreads, true, false>;
    return row_shift ? softcap_ce_rows_kernel<kRowThreads, false, true> : softcap_ce_rows_kernel<kRowThreads, false, false>;
}

}  // namespace

cudaError_t softcap_ce_fwd(const SoftcapCEParams& p, cudaStream_t stream) {
    int num_sms = 0;
    if (cudaError_t status = multiprocessors(num_sms); status != cudaSuccess) return status;
    const bool with_grad = p.grad_logits != nullptr, row_shift = p.cap > kMaxConstantShiftCap;
    const bool aligned = p.v % 8 == 0 && p.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(p.grad_logits) % 16 == 0;

    void (*kernel)(SoftcapCEParams) = nullptr;
    int rows_per_cta = 1;
    if (aligned && p.v <= kSoftcapCEMaxRow) {
        const int threads = (p.v + 8 * kVectors - 1) / (8 * kVectors);
        if (threads <= 32) kernel = rows_kernel<32>(with_grad, row_shift), rows_per_cta = kThreads / 32;
        else if (threads <= 64) kernel = rows_kernel<64>(with_grad, row_shift), rows_per_cta = kThreads / 64;
        else if (threads <= 128) kernel = rows_kernel<128>(with_grad, row_shift), rows_per_cta = kThreads / 128;
        else kernel = rows_kernel<256>(with_grad, row_shift);
    } else if (aligned) {
        kernel = with_grad ? softcap_ce_long_rows_kernel<true, true> : softcap_ce_long_rows_kernel<true, false>;
    } else {
        kernel = with_grad ? softcap_ce_long_rows_kernel<false, true> : softcap_ce_long_rows_kernel<false, false>;
    }

    softcap_ce_targets_kernel<<<SoftcapCEWorkspace::kCountCtas, kCountThreads, 0, stream>>>(p);
    if (cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;

    // The rows kernel starts while the targets are counted, and waits for the count behind its first loads.
    const int64_t wanted = (int64_t(p.n) + rows_per_cta - 1) / rows_per_cta;
    const int64_t ctas = max(int64_t(1), min(wanted, int64_t(min(num_sms * kCtasPerSm, int(SoftcapCEWorkspace::kMaxCtas)))));
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(ctas));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, p);
}

cudaError_t softcap_ce_scale(const SoftcapCEScaleParams& p, cudaStream_t stream) {
    if (p.n * p.v == 0) return cudaSuccess;
    int num_sms = 0;
    if (cudaError_t status = multiprocessors(num_sms); status != cudaSuccess) return status;
    const int64_t wanted = (p.n * p.v + 8 * kThreads - 1) / (8 * kThreads);
    softcap_ce_scale_kernel<<<unsigned(min(wanted, int64_t(8 * num_sms))), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace pgolf
