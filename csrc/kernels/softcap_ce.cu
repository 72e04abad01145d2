// Three kernels: a tiny one counts the rows kept (the mean's gradient needs the count before the first row is
// written) and checks the targets; then one of two kernels does all the rows:
//
//   rows in registers   32 to 128 threads per row, 32 or 64 columns each; bulk copies bring the rows after this one
//   long rows           256 threads per row, two or three passes; also unaligned rows and caps above kMaxUnshiftedCap
#include "kernels/softcap_ce.h"

#include "kernels/common/launch.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/softcap.cuh"
#include "kernels/common/vector8.cuh"
#include "kernels/softcap_ce.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 256;     // of long rows and scaling
constexpr int kRowsThreads = 128;  // of rows in registers
constexpr int kMaxWarps = 8;
constexpr int kCountThreads = 1024;
constexpr float kMaxUnshiftedCap = 64.f;
constexpr double kLossUnits = 0x1p24;  // rows' losses are summed in units of 2^-24: exactly up to 2^29, and so the same in any order

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
    float (*scratch)[kMaxWarps];
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
        } else {
            __syncwarp();
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

// Sum of every thread's `loss` over the grid, by the last CTA to arrive.
__device__ void reduce_loss(const SoftcapCEParams& p, double loss) {
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
    for (unsigned cta = threadIdx.x; cta < gridDim.x; cta += blockDim.x) loss += __ldcg(&w.loss[cta]);
    loss = cta_sum(loss);
    const int64_t kept = rows_kept(w);
    if (threadIdx.x == 0) *p.loss = float(p.reduction == SoftcapCEReduction::kMean ? loss / double(kept) : loss);
}

// ---- targets ------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kCountThreads) softcap_ce_targets_kernel(const SoftcapCEParams p) {
    ptx::grid_dependency_launch();
    int64_t kept = 0;
    for (uint32_t row = blockIdx.x * kCountThreads + threadIdx.x; row < p.n; row += gridDim.x * kCountThreads) {
        const int target = target_of(p.targets[row], p);
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
    if (threadIdx.x == 0 && blockIdx.x == 0) p.workspace->arrived = p.workspace->portions = 0;
}

// ---- rows in registers --------------------------------------------------------------------------------

// Whether every |x| is at most `limit`. A nan passes: it comes out of the polynomial as it went in.
template <int kVectors>
__device__ __forceinline__ bool all_within(const uint4 (&x)[kVectors], float limit) {
    __nv_bfloat162 largest{0.f, 0.f};
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = (&x[k].x)[i];
            largest = __hmax2(largest, __habs2(reinterpret_cast<const __nv_bfloat162&>(word)));
        }
    return fmaxf(__low2float(largest), __high2float(largest)) <= limit;
}

// Sum of the exponentials; leaves exponential times slope in g.
template <int kRowThreads, int kVectors, bool kWithGrad, bool kNear>
__device__ __forceinline__ float exponentials(float (&g)[8 * kVectors], const uint4 (&x)[kVectors], const Softcap& softcap, int rank,
                                              int num_vectors) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        if (k * kRowThreads + rank >= num_vectors) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float value[4], t[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint32_t pair = (&x[k].x)[2 * half + j / 2];
                value[j] = j % 2 ? ptx::high_bf16(pair) : ptx::low_bf16(pair);
            }
            if constexpr (kNear) {
                softcap.tanh_near(t, value);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) t[j] = softcap.tanh(value[j]);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float e = softcap.exponential(t[j]);
                sum += e;
                if constexpr (kWithGrad) g[8 * k + 4 * half + j] = e * softcap_slope(t[j]);
            }
        }
    }
    return sum;
}

// Rows on their way or being read, per row being worked on. Measured: a third one hides more latency at 1024 columns
// and costs DRAM efficiency at 8192.
__host__ __device__ constexpr int num_slots(int vectors) { return vectors == 8 ? 2 : 3; }

// kRowThreads threads per row; thread `rank` of them holds the vectors rank, rank + kRowThreads, ... of 8 columns.
// Rows and their targets arrive by asynchronous copies, in a ring of slots per group of kRowThreads threads. A group takes rows in
// portions, a first one by its number and then whichever is next: with equal shares, multiprocessors far from memory end late.
template <int kRowThreads, int kVectors, bool kWithGrad>
__global__ void __launch_bounds__(kRowsThreads, kVectors == 8 ? 4 : 6)
    softcap_ce_rows_kernel(const SoftcapCEParams p, const Softcap softcap) {
    constexpr int kGroups = kRowsThreads / kRowThreads;
    constexpr int kSlots = num_slots(kVectors);
    constexpr int kSlotVectors = kVectors * kRowThreads;
    constexpr uint32_t kPortion = kVectors == 8 ? 2 : 4;  // rows
    static_assert(kPortion >= kSlots, "the first portion fills the slots");
    extern __shared__ uint4 s_ring[];  // [kGroups][kSlots][kSlotVectors]
    __shared__ int64_t s_target[kGroups][kSlots];
    __shared__ uint32_t s_row[kGroups][kSlots];
    __shared__ uint64_t s_arrived[kGroups][kSlots];
    __shared__ float s_scratch[2][kMaxWarps];
    __shared__ double s_loss[kGroups];
    __shared__ float s_weight;
    RowReduction<kRowThreads> reduce{s_scratch};
    const int group = threadIdx.x / kRowThreads, rank = threadIdx.x % kRowThreads;
    const int num_vectors = uint32_t(p.v) / 8;
    uint32_t next_row = (blockIdx.x * kGroups + group) * kPortion, next_portion = 0;  // thread 0 of a group knows

    // The group's next row into a slot; behind the last one, its number alone.
    const auto fetch = [&](int slot) {
        const uint32_t row = next_row++;
        s_row[group][slot] = row;
        if (row < p.n) {
            ptx::mbarrier_arrive_expect(&s_arrived[group][slot], 16 * num_vectors);
            ptx::bulk_load(s_ring + (group * kSlots + slot) * kSlotVectors, p.logits + int64_t(row) * p.row_stride, 16 * num_vectors,
                           &s_arrived[group][slot]);
            ptx::copy_async_8(&s_target[group][slot], p.targets + row);
        } else {
            ptx::mbarrier_arrive(&s_arrived[group][slot]);
        }
        ptx::mbarrier_arrive_after_copies(&s_arrived[group][slot]);
    };
    // At the end of a portion, the next one; asked for a portion ahead, so that nothing waits for the answer.
    const auto continue_portion = [&] {
        if (next_row % kPortion > 0) return;
        next_row = next_portion * kPortion;
        next_portion = gridDim.x * kGroups + atomicAdd(&p.workspace->portions, 1u);
    };
    if (rank == 0) {
        for (int slot = 0; slot < kSlots; ++slot) ptx::mbarrier_init(&s_arrived[group][slot], 2);
        ptx::fence_mbarrier_init();
        for (int slot = 0; slot < kSlots; ++slot) fetch(slot);
        s_loss[group] = 0;
    }
    ptx::grid_dependency_wait();
    if (rank == 0) {
        next_portion = gridDim.x * kGroups + atomicAdd(&p.workspace->portions, 1u);
        continue_portion();
    }
    if (threadIdx.x < 32) s_weight = mean_weight(p);
    __syncthreads();

    int slot = 0;
    uint32_t parity = 0;  // of the ring's rounds, and so of its barriers
    while (true) {
        ptx::mbarrier_wait(&s_arrived[group][slot], parity);
        const uint32_t row = s_row[group][slot];
        if (row >= p.n) break;
        const uint4* s_x = s_ring + (group * kSlots + slot) * kSlotVectors;
        uint4 x[kVectors];
#pragma unroll
        for (int k = 0; k < kVectors; ++k) x[k] = k * kRowThreads + rank < num_vectors ? s_x[k * kRowThreads + rank] : uint4{0, 0, 0, 0};

        float g[8 * kVectors];
        float sum = __all_sync(0xffffffffu, all_within(x, softcap.near))
                        ? exponentials<kRowThreads, kVectors, kWithGrad, true>(g, x, softcap, rank, num_vectors)
                        : exponentials<kRowThreads, kVectors, kWithGrad, false>(g, x, softcap, rank, num_vectors);
        const int target = target_of(*const_cast<volatile int64_t*>(&s_target[group][slot]), p);  // read only now: two registers less
        const float x_target = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(s_x)[max(target, 0)]);
        // NOTE: behind its barrier every thread has read the slot, so the slot can be filled again.
        sum = reduce(sum, Sum{});
        if (rank == 0) {
            fetch(slot);
            continue_portion();
        }
        if (++slot == kSlots) slot = 0, parity ^= 1;

        const float row_weight = or_nan(s_weight, target);
        __nv_bfloat16* grad = p.grad_logits + int64_t(row) * p.v;
        if constexpr (kWithGrad) {
            const float scale = __fdividef(row_weight, sum);
            uint4* vectors = reinterpret_cast<uint4*>(grad) + rank;
            if (target == kIgnored) {  // whatever the row holds, nan too
                for (int vector = rank; vector < num_vectors; vector += kRowThreads) vectors[vector - rank] = uint4{0, 0, 0, 0};
            } else {
#pragma unroll
                for (int k = 0; k < kVectors; ++k) {
                    if (k * kRowThreads + rank >= num_vectors) break;
                    uint4 d;
#pragma unroll
                    for (int i = 0; i < 4; ++i) (&d.x)[i] = ptx::pack_bf16(scale * g[8 * k + 2 * i], scale * g[8 * k + 2 * i + 1]);
                    vectors[k * kRowThreads] = d;
                }
            }
        }
        // The thread of the target's column: the row's loss, and that column's gradient once more, now with the -1.
        if (rank == max(target, 0) / 8 % kRowThreads) {
            const float t = softcap.tanh(x_target);
            const float loss = target == kIgnored ? 0.f : or_nan(logf(sum) - p.cap * t, target);
            if (p.reduction == SoftcapCEReduction::kNone) p.loss[row] = loss;
            s_loss[group] += rint(loss * kLossUnits) / kLossUnits;
            if (kWithGrad && target >= 0)
                grad[target] = __float2bfloat16_rn((softcap.exponential(t) - sum) / sum * softcap_slope(t) * row_weight);
        }
    }
    __syncthreads();
    if (p.reduction != SoftcapCEReduction::kNone) reduce_loss(p, threadIdx.x < kGroups ? s_loss[threadIdx.x] : 0);
}

// ---- long or unaligned rows -----------------------------------------------------------------------------

template <bool kAligned>
__device__ __forceinline__ void load8(float (&x)[8], const __nv_bfloat16* row, int column, int count) {
    if constexpr (kAligned) {
        const uint4 v = *reinterpret_cast<const uint4*>(row + column);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = j % 2 ? ptx::high_bf16((&v.x)[j / 2]) : ptx::low_bf16((&v.x)[j / 2]);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = j < count ? __bfloat162float(row[column + j]) : 0.f;
    }
}

template <bool kAligned, bool kWithGrad>
__global__ void __launch_bounds__(kThreads) softcap_ce_long_rows_kernel(const SoftcapCEParams p, const Softcap softcap) {
    __shared__ float s_scratch[2][kMaxWarps];
    RowReduction<kThreads> reduce{s_scratch};
    ptx::grid_dependency_wait();
    const float weight = mean_weight(p);
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
        float t_shift = 0.f;  // exponentials are taken relative to z = cap t_shift
        if (p.cap > kMaxUnshiftedCap) {
            float largest = -INFINITY;
            for_each_chunk([&](const float (&x)[8], int, int count) {
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (j < count) largest = fmaxf(largest, x[j]);
            });
            t_shift = softcap.tanh(reduce(largest, Max{}));
        }

        float sum = 0.f;
        for_each_chunk([&](const float (&x)[8], int, int count) {
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (j < count) sum += softcap.exponential(softcap.tanh(x[j]) - t_shift);
        });
        sum = reduce(sum, Sum{});

        const int target = target_of(p.targets[row], p);
        if (threadIdx.x == 0) {
            const float t_target = softcap.tanh(__bfloat162float(logits[max(target, 0)]));
            const float loss = target == kIgnored ? 0.f : or_nan(logf(sum) - p.cap * (t_target - t_shift), target);
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
                    const float t = softcap.tanh(x[j]);
                    const float e = softcap.exponential(t - t_shift);
                    d[j] = target == kIgnored ? 0.f : (column + j == target ? e - sum : e) * inv_sum * softcap_slope(t) * row_weight;
                }
                if constexpr (kAligned) {
                    *reinterpret_cast<uint4*>(grad + column) = pack8(d);
                } else {
#pragma unroll
                    for (int j = 0; j < 8; ++j)
                        if (j < count) grad[column + j] = __float2bfloat16_rn(d[j]);
                }
            });
        }
    }
    if (p.reduction != SoftcapCEReduction::kNone) reduce_loss(p, loss_sum);
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
            for (int i = 0; i < 4; ++i) (&v.x)[i] = ptx::pack_bf16(scale * ptx::low_bf16((&v.x)[i]), scale * ptx::high_bf16((&v.x)[i]));
            __stcs(reinterpret_cast<uint4*>(grad), v);
        } else {
            for (int j = 0; j < count; ++j)
                grad[j] = __float2bfloat16_rn(p.scale[p.scale_stride ? (first + j) / p.v * p.scale_stride : 0] * __bfloat162float(grad[j]));
        }
    }
}

// ---- launch ---------------------------------------------------------------------------------------------

struct RowsLaunch {
    void (*kernel)(SoftcapCEParams, Softcap);
    int threads, rows_per_cta, ring_bytes;
};

template <int kRowThreads, int kVectors>
RowsLaunch rows_in_registers(bool with_grad) {
    return {with_grad ? softcap_ce_rows_kernel<kRowThreads, kVectors, true> : softcap_ce_rows_kernel<kRowThreads, kVectors, false>,
            kRowsThreads, kRowsThreads / kRowThreads, num_slots(kVectors) * kVectors * kRowsThreads * int(sizeof(uint4))};
}

template <bool kAligned>
RowsLaunch long_rows(bool with_grad) {
    return {with_grad ? softcap_ce_long_rows_kernel<kAligned, true> : softcap_ce_long_rows_kernel<kAligned, false>, kThreads, 1, 0};
}

RowsLaunch choose(const SoftcapCEParams& p) {
    const bool with_grad = p.grad_logits != nullptr;
    const bool aligned = p.v % 8 == 0 && p.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(p.grad_logits) % 16 == 0;
    if (!aligned) return long_rows<false>(with_grad);
    if (p.cap > kMaxUnshiftedCap || p.v > kSoftcapCEMaxRow) return long_rows<true>(with_grad);
    if (p.v <= 1024) return rows_in_registers<32, 4>(with_grad);
    if (p.v <= 2048) return rows_in_registers<32, 8>(with_grad);
    if (p.v <= 4096) return rows_in_registers<64, 8>(with_grad);
    return rows_in_registers<128, 8>(with_grad);
}

}  // namespace

cudaError_t softcap_ce_count_targets(const SoftcapCEParams& p, cudaStream_t stream) {
    softcap_ce_targets_kernel<<<SoftcapCEWorkspace::kCountCtas, kCountThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t softcap_ce_fwd(const SoftcapCEParams& p, cudaStream_t stream) {
    const RowsLaunch rows = choose(p);
    int num_sms = 0, ctas_per_sm = 0;
    if (cudaError_t status = multiprocessors(num_sms); status != cudaSuccess) return status;
    if (cudaError_t status = cudaFuncSetAttribute(rows.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, rows.ring_bytes);
        status != cudaSuccess)
        return status;
    if (cudaError_t status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas_per_sm, rows.kernel, rows.threads, rows.ring_bytes);
        status != cudaSuccess)
        return status;

    if (cudaError_t status = softcap_ce_count_targets(p, stream); status != cudaSuccess) return status;

    // The rows kernel starts while the targets are counted, and waits for the count behind its first loads.
    const int64_t wanted = (int64_t(p.n) + rows.rows_per_cta - 1) / rows.rows_per_cta;
    const int64_t ctas = max(int64_t(1), min(wanted, int64_t(min(num_sms * ctas_per_sm, SoftcapCEWorkspace::kMaxCtas))));
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(ctas));
    config.blockDim = dim3(rows.threads);
    config.dynamicSmemBytes = rows.ring_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, rows.kernel, p, Softcap(p.cap));
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
