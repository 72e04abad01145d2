// A warp per run of rows. A lane's channels are two runs of eight, 8 lane + 256 v.
#include "kernels/embed_norm.h"

#include <type_traits>

#include "kernels/common/launch.h"
#include "kernels/common/norm.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector8.cuh"

namespace pgolf {
namespace {

constexpr int kWidth = kEmbedNormWidth;
constexpr int kVectors = kWidth / 256;
constexpr int kChannels = 8 * kVectors;  // per lane
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kSumColumns = kWidth + 4;     // of a row of partial sums: the gate's gradient, and lambda's behind it

using Row = float[kChannels];

__device__ __forceinline__ int channel_of(int i) { return 256 * (i / 8) + 8 * (threadIdx.x % 32) + i % 8; }

// A row as it lies in memory, on its way.
struct PackedRow {
    uint4 vectors[kVectors];
};

__device__ __forceinline__ PackedRow fetch_row(const __nv_bfloat16* matrix, int64_t row) {
    PackedRow packed;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        packed.vectors[v] = __ldg(reinterpret_cast<const uint4*>(matrix + row * kWidth + channel_of(8 * v)));
    return packed;
}

__device__ __forceinline__ void unpack(Row& x, const PackedRow& packed) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) unpack8(reinterpret_cast<float(&)[8]>(x[8 * v]), packed.vectors[v]);
}

__device__ __forceinline__ void store_row(__nv_bfloat16* matrix, uint32_t row, const Row& x) {
    matrix += int64_t(row) * kWidth;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<uint4*>(matrix + channel_of(8 * v)) = pack8(reinterpret_cast<const float(&)[8]>(x[8 * v]));
}

__device__ __forceinline__ float dot(const Row& a, const Row& b) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum = fmaf(a[i], b[i], sum);
    return warp_sum(sum);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ __forceinline__ float rstd_of(const Row& x) { return rsqrtf(dot(x, x) * (1.f / kWidth) + kRmsEpsilon); }

__device__ __forceinline__ bool is_valid(const EmbedNormParams& p, int64_t token) { return token >= 0 && token < p.num_rows; }

// What e of a row is made of, on its way.
template <bool kFloat>
struct Parts {
    std::conditional_t<kFloat, float4[kChannels / 4], PackedRow> table;
    PackedRow addend;
    bool valid;
};

template <bool kFloat>
__device__ __forceinline__ Parts<kFloat> fetch(const EmbedNormParams& p, uint32_t row, int64_t token) {
    Parts<kFloat> parts;
    parts.valid = is_valid(p, token);
    const int64_t from = parts.valid ? token : 0;
    if constexpr (kFloat) {
#pragma unroll
        for (int q = 0; q < kChannels / 4; ++q)
            parts.table[q] = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(p.table) + from * kWidth + channel_of(4 * q)));
    } else {
        parts.table = fetch_row(static_cast<const __nv_bfloat16*>(p.table), from);
    }
    if (p.addend) parts.addend = fetch_row(p.addend, row);
    return parts;
}

// e of a row; nan for a token out of range.
template <bool kFloat>
__device__ __forceinline__ void embed(Row& e, const EmbedNormParams& p, const Parts<kFloat>& parts) {
    if constexpr (kFloat) {
        // The stream's dtype, as a separate gather would round.
#pragma unroll
        for (int i = 0; i < kChannels; ++i) e[i] = __bfloat162float(__float2bfloat16_rn((&parts.table[i / 4].x)[i % 4]));
    } else {
        unpack(e, parts.table);
    }
    if (p.addend) {
        Row added;
        unpack(added, parts.addend);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) e[i] += added[i];
    }
    if (!parts.valid) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) e[i] = __int_as_float(0x7fffffff);
    }
}

// The tokens of a run of rows and of the rows around it, one a lane.
struct Tokens {
    int64_t mine;
    uint32_t begin;
    __device__ Tokens(const EmbedNormParams& p, uint32_t begin) : begin(begin) {
        const int64_t row = int64_t(begin) - 1 + threadIdx.x % 32;
        mine = row >= 0 && row < p.m ? p.tokens[row] : 0;
    }
    __device__ int64_t of(uint32_t row) const { return __shfl_sync(0xffffffffu, mine, row + 1 - begin); }
};
static_assert(kEmbedNormRows + 2 <= 32);

__device__ __forceinline__ bool carries(const EmbedNormParams& p, uint32_t row, int64_t token) {
    return row % p.sequence != 0 && !(p.mask_bos && token == p.bos);
}

// kToken: gate, zero beyond the window; kChannel: sigmoid(gate).
template <Smear kSmear>
__device__ __forceinline__ void load_gate(Row& gate, const EmbedNormParams& p) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
        const int channel = channel_of(i);
        if constexpr (kSmear == Smear::kToken) gate[i] = channel < p.window ? p.gate[channel] : 0.f;
        if constexpr (kSmear == Smear::kChannel) gate[i] = sigmoid(p.gate[channel]);
    }
}

// What a row gives its successor: e with smear token, n with smear channel.
template <Smear kSmear>
__device__ __forceinline__ void make_carried(Row& carried, const Row& e) {
    const float scale = kSmear == Smear::kChannel ? rstd_of(e) : 1.f;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) carried[i] = scale * e[i];
}

template <Smear kSmear, bool kFloat>
__global__ void __launch_bounds__(kThreads) embed_norm_fwd_kernel(const EmbedNormParams p) {
    const uint32_t begin = (blockIdx.x * kWarps + threadIdx.x / 32) * kEmbedNormRows, end = min(begin + kEmbedNormRows, p.m);
    if (begin >= p.m) return;
    const Tokens tokens(p, begin);
    Parts<kFloat> next = fetch<kFloat>(p, begin, tokens.of(begin));
    Row gate, previous = {};
    if constexpr (kSmear != Smear::kNone) {
        load_gate<kSmear>(gate, p);
        if (begin % p.sequence != 0) {
            Row e;
            embed<kFloat>(e, p, fetch<kFloat>(p, begin - 1, tokens.of(begin - 1)));
            make_carried<kSmear>(previous, e);
        }
    }
    const float lambda = kSmear == Smear::kToken ? *p.lambda : 0.f;
    for (uint32_t row = begin; row < end; ++row) {
        const int64_t token = tokens.of(row);
        if (!is_valid(p, token) && threadIdx.x % 32 == 0) {
            volatile int64_t* report = p.report;
            report[1] = token, report[2] = p.num_rows;
            __threadfence_system();
            report[0] = int64_t(row) + 1;
        }
        Row e, y;
        embed<kFloat>(e, p, next);
        if (row + 1 < end) next = fetch<kFloat>(p, row + 1, tokens.of(row + 1));
        const bool mixes = carries(p, row, token);
        if constexpr (kSmear == Smear::kToken) {
            const float g = mixes ? lambda * sigmoid(dot(gate, e)) : 0.f;
#pragma unroll
            for (int i = 0; i < kChannels; ++i) y[i] = mixes ? fmaf(g, previous[i], e[i]) : e[i], previous[i] = e[i];
            const float rstd = rstd_of(y);
#pragma unroll
            for (int i = 0; i < kChannels; ++i) y[i] *= rstd;
        } else {
            const float rstd = rstd_of(e);
#pragma unroll
            for (int i = 0; i < kChannels; ++i) {
                const float n = rstd * e[i];
                if constexpr (kSmear == Smear::kNone) y[i] = n;
                else y[i] = (1.f - gate[i]) * n + (mixes ? gate[i] * previous[i] : 0.f), previous[i] = n;
            }
        }
        store_row(p.y, row, y);
    }
}

// d of a norm: x -> rstd x, given n = rstd x.
__device__ __forceinline__ void norm_backward(Row& dx, const Row& dy, const Row& n, float rstd) {
    const float along = dot(dy, n) * (1.f / kWidth);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) dx[i] = rstd * (dy[i] - along * n[i]);
}

template <Smear kSmear, bool kFloat>
__global__ void __launch_bounds__(kThreads, 3) embed_norm_bwd_kernel(const EmbedNormParams p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Row gate = {}, sums = {};
    if constexpr (kSmear != Smear::kNone) load_gate<kSmear>(gate, p);
    const float lambda = kSmear == Smear::kToken ? *p.lambda : 0.f;
    float lambda_sum = 0.f;

    const uint32_t step = gridDim.x * kWarps * kEmbedNormRows;
    for (uint32_t begin = (blockIdx.x * kWarps + warp) * kEmbedNormRows; begin < p.m; begin += step) {
        const uint32_t end = min(begin + kEmbedNormRows, p.m);
        const Tokens tokens(p, begin);
        Row e, carried = {};  // carried: what row + 1 returns to row
        // With smear, one row more at the top, for what it returns alone, and one at the bottom, which it mixes in.
        const uint32_t top = kSmear != Smear::kNone && end < p.m ? end : end - 1;
        const uint32_t bottom = kSmear != Smear::kNone && begin > 0 ? begin - 1 : begin;
        embed<kFloat>(e, p, fetch<kFloat>(p, top, tokens.of(top)));
        PackedRow next_dy = fetch_row(p.y, top);
        Parts<kFloat> next{};
        if (top > bottom) next = fetch<kFloat>(p, top - 1, tokens.of(top - 1));
        for (uint32_t row = top + 1; row-- > begin;) {
            const bool is_own = row < end, mixes = carries(p, row, tokens.of(row));
            Row dy, d_e, below = {};  // below: e of row - 1
            unpack(dy, next_dy);
            if (row > bottom) embed<kFloat>(below, p, next);
            if (row > begin) next_dy = fetch_row(p.y, row - 1);
            if (row > bottom + 1) next = fetch<kFloat>(p, row - 2, tokens.of(row - 2));

            if constexpr (kSmear == Smear::kToken) {
                const float s = sigmoid(dot(gate, e)), g = mixes ? lambda * s : 0.f;
                Row n, dx;
#pragma unroll
                for (int i = 0; i < kChannels; ++i) n[i] = mixes ? fmaf(g, below[i], e[i]) : e[i];
                const float rstd = rstd_of(n);
#pragma unroll
                for (int i = 0; i < kChannels; ++i) n[i] *= rstd;
                norm_backward(dx, dy, n, rstd);
                const float dg = mixes ? dot(dx, below) : 0.f, du = dg * lambda * s * (1.f - s);
#pragma unroll
                for (int i = 0; i < kChannels; ++i) {
                    d_e[i] = dx[i] + du * gate[i] + carried[i];
                    carried[i] = g * dx[i];
                    if (is_own) sums[i] = fmaf(du, e[i], sums[i]);
                }
                if (is_own) lambda_sum = fmaf(dg, s, lambda_sum);
            } else {
                const float rstd = rstd_of(e), below_rstd = kSmear == Smear::kChannel && mixes ? rstd_of(below) : 0.f;
                Row n, dn;
#pragma unroll
                for (int i = 0; i < kChannels; ++i) {
                    n[i] = rstd * e[i];
                    if constexpr (kSmear == Smear::kNone) {
                        dn[i] = dy[i];
                    } else {
                        dn[i] = fmaf(1.f - gate[i], dy[i], carried[i]);
                        carried[i] = mixes ? gate[i] * dy[i] : 0.f;
                        if (is_own) sums[i] = fmaf(dy[i], below_rstd * below[i] - n[i], sums[i]);
                    }
                }
                norm_backward(d_e, dn, n, rstd);
            }
            if (is_own) store_row(p.d_e, row, d_e);
#pragma unroll
            for (int i = 0; i < kChannels; ++i) e[i] = below[i];
        }
    }

    if constexpr (kSmear != Smear::kNone) {  // the CTA's column sums, warp after warp
        __shared__ float s_sums[kWarps][kSumColumns];
#pragma unroll
        for (int i = 0; i < kChannels; ++i)
            s_sums[warp][channel_of(i)] = kSmear == Smear::kChannel ? sums[i] * gate[i] * (1.f - gate[i]) : sums[i];
        if (lane == 0) s_sums[warp][kWidth] = lambda_sum;
        __syncthreads();
        for (int column = threadIdx.x; column <= kWidth; column += kThreads) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += s_sums[w][column];
            p.partial_sums[int64_t(blockIdx.x) * kSumColumns + column] = sum;
        }
    }
}

// Gradients of gate and lambda: 32 columns a CTA, every 32nd CTA's sum a thread, then slice after slice.
constexpr int kSlices = 32;

__global__ void __launch_bounds__(32 * kSlices) embed_norm_sum_kernel(const EmbedNormParams p, int num_ctas) {
    const int lane = threadIdx.x % 32, slice = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    __shared__ float s_sums[kSlices][32];
    float sum = 0.f;
    if (column <= kWidth) {
#pragma unroll 8
        for (int cta = slice; cta < num_ctas; cta += kSlices) sum += p.partial_sums[int64_t(cta) * kSumColumns + column];
    }
    s_sums[slice][lane] = sum;
    __syncthreads();
    if (slice > 0) return;
    for (int other = 1; other < kSlices; ++other) sum += s_sums[other][lane];
    if (column < (p.smear == Smear::kToken ? p.window : kWidth)) p.d_gate[column] = sum;
    if (column == kWidth && p.smear == Smear::kToken) *p.d_lambda = sum;
}

// ---- launch ---------------------------------------------------------------------------------------------

using Kernel = void (*)(EmbedNormParams);

template <bool kFloat>
constexpr Kernel kFwd[] = {embed_norm_fwd_kernel<Smear::kNone, kFloat>, embed_norm_fwd_kernel<Smear::kToken, kFloat>,
                           embed_norm_fwd_kernel<Smear::kChannel, kFloat>};
template <bool kFloat>
constexpr Kernel kBwd[] = {embed_norm_bwd_kernel<Smear::kNone, kFloat>, embed_norm_bwd_kernel<Smear::kToken, kFloat>,
                           embed_norm_bwd_kernel<Smear::kChannel, kFloat>};

unsigned ctas_of(uint32_t m) { return (m + kWarps * kEmbedNormRows - 1) / (kWarps * kEmbedNormRows); }

}  // namespace

cudaError_t embed_norm_fwd(const EmbedNormParams& p, cudaStream_t stream) {
    const Kernel kernel = (p.is_float ? kFwd<true> : kFwd<false>)[int(p.smear)];
    kernel<<<ctas_of(p.m), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t embed_norm_bwd(const EmbedNormParams& p, cudaStream_t stream) {
    const Kernel kernel = (p.is_float ? kBwd<true> : kBwd<false>)[int(p.smear)];
    int ctas = 0;
    if (cudaError_t status = resident_ctas(kernel, kThreads, ctas); status != cudaSuccess) return status;
    ctas = int(min(ctas_of(p.m), unsigned(min(ctas, kEmbedNormMaxCtas))));
    kernel<<<ctas, kThreads, 0, stream>>>(p);
    if (p.smear != Smear::kNone) embed_norm_sum_kernel<<<(kWidth + 32) / 32, 32 * kSlices, 0, stream>>>(p, ctas);
    return cudaGetLastError();
}

}  // namespace pgolf
