#include "kernels/common/vector8.cuh"
#include "kernels/qkv.h"
#include "kernels/xsa_attention.cuh"

namespace pgolf {
namespace xsa {

using ptx::high_bf16, ptx::low_bf16;

// ---- per-row preparation -----------------------------------------------------------------------------

constexpr int kRowLanes = 8;  // 8 lanes of 16 bytes make one head's row
constexpr int kPrepareThreads = 256;

__device__ inline float row_sum(float x) {
#pragma unroll
    for (int offset = 1; offset < kRowLanes; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

struct Eight {
    float x[8];
    __device__ explicit Eight(const uint4& packed) { unpack8(x, packed); }
};
__device__ inline float dot(const Eight& a, const Eight& b) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += a.x[i] * b.x[i];
    return row_sum(sum);
}

// This lane's part of dout . y, from the scores up: for a gate of exactly 0, whose out tells nothing about y. Slow and rare.
__device__ inline float recomputed_dot(const XsaAttentionBwdParams& p, int batch, int start, int token, int head, int kv_head, int lane,
                                       float lse) {
    const XsaAttentionParams& f = p.fwd;
    auto at = [&](const HeadRows& x, int t, int h) {
        return reinterpret_cast<const __nv_bfloat16*>(row_chunk(x, batch, t, h, 0));
    };
    const __nv_bfloat16 *q = at(f.q, token, head), *grad_out = at(p.grad_out, token, head);
    float sum = 0.0f;
    for (int t = start + lane; t <= token; t += kRowLanes) {
        const __nv_bfloat16 *k = at(f.k, t, kv_head), *v = at(f.v, t, kv_head);
        float score = 0.0f, product = 0.0f;
#pragma unroll 1
        for (int d = 0; d < kXsaHeadDim; ++d) {
            score += __bfloat162float(q[d]) * __bfloat162float(k[d]);
            product += __bfloat162float(grad_out[d]) * __bfloat162float(v[d]);
        }
        sum += ptx::exp2_approx((score * f.scale - lse) * kLog2e) * product;
    }
    return sum;
}

// Eight lanes per (token, key head): dy, delta and dgate of its query heads, and the part of dv that does not pass
// through the probabilities, which is left in dv. Tokens after the last document get zeros everywhere.
// A block takes neighbouring tokens of one head, whose stats share memory sectors.
__global__ __launch_bounds__(kPrepareThreads, 3) void xsa_attention_prepare_kernel(const __grid_constant__ XsaAttentionBwdParams p) {
    const XsaAttentionParams& f = p.fwd;
    const int group = f.q_heads / f.kv_heads, chunk = threadIdx.x % kRowLanes;
    const int batch = blockIdx.z, kv_head = blockIdx.y, row = (blockIdx.x * kPrepareThreads + threadIdx.x) / kRowLanes;
    // NOTE: rows past the end run along on token 0, because the sums need every lane of the warp.
    const bool exists = row < f.tokens;
    const int token = exists ? row : 0;
    // Loaded whether it counts or not (the row exists), and one head ahead: behind a branch each load would wait for the one before.
    struct HeadInput {
        uint4 grad_out, out;
        float own, lse, gate;
    };
    auto fetch = [&](int head) {
        const int64_t at = (int64_t(batch) * f.q_heads + head) * f.tokens + token;
        return HeadInput{__ldg(row_chunk(p.grad_out, batch, token, head, chunk)), __ldg(row_chunk(f.out, batch, token, head, chunk)),
                         __ldg(f.own + at), __ldg(f.lse + at), f.gate.data != nullptr ? load_gate(f.gate, batch, token, head) : 1.0f};
    };
    const uint4 packed_v = __ldg(row_chunk(f.v, batch, token, kv_head, chunk));
    HeadInput next = fetch(kv_head * group);
    const XsaPlace place = p.places != nullptr ? p.places[token] : XsaPlace{0, token};
    const bool live = exists && place.start >= 0;
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    const uint32_t mask = live ? 0xffffffffu : 0u;
    auto if_live = [&](const uint4& x) { return Eight(make_uint4(x.x & mask, x.y & mask, x.z & mask, x.w & mask)); };
    const Eight v = if_live(packed_v);
    const float inverse_square = f.xsa ? 1.0f / fmaxf(dot(v, v), kXsaLeastSquare) : 0.0f;
    float dv[8] = {};
    for (int g = 0; g < group; ++g) {
        const int head = kv_head * group + g;
        const int64_t stat = int64_t(batch) * f.q_heads + head;
        const HeadInput now = next;
        if (g + 1 < group) next = fetch(head + 1);
        const Eight grad_out = if_live(now.grad_out), out = if_live(now.out);
        const float gate = live ? now.gate : 1.0f, own = live ? now.own : 0.0f, lse = now.lse;
        const RowScale scale(lse);
        const float share = dot(grad_out, v) * inverse_square;  // e / gate, and e z = share out
        float dy[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            dy[i] = gate * (grad_out.x[i] - share * v.x[i]);
            dv[i] -= share * out.x[i] + own * dy[i];
            dy[i] *= scale.factor;
        }
        const uint4 rounded = pack8(dy);
        if (exists) *row_chunk(p.dy, batch, token, head, chunk) = rounded;
        if (exists && !live) *row_chunk(p.dq, batch, token, head, chunk) = zeros;
        // dy . y, y = out / gate + own v. NOTE: of dy as it is stored: what its rounding adds to dp along y cancels against delta,
        // and the gradient of a token that sees only itself is zero.
        const Eight stored(rounded);
        const float delta = dot(stored, out) * (gate != 0.0f ? 1.0f / gate : 0.0f) + own * dot(stored, v);
        if (live && chunk == 0) {
            p.stats[2 * stat * p.stats_width + place.stats] = scale.shift;
            p.stats[(2 * stat + 1) * p.stats_width + place.stats] = delta;
        }
        if (p.dgate.data != nullptr) {
            float y_dot = 0.0f;
            if (live && gate == 0.0f) y_dot = recomputed_dot(p, batch, place.start, token, head, kv_head, chunk, lse);
            const float z_dot = row_sum(y_dot) - own * dot(grad_out, v), out_dot = dot(grad_out, out);
            const float dgate = gate == 0.0f ? z_dot : out_dot / gate;
            const int64_t at = batch * p.dgate.batch_stride + token * p.dgate.token_stride + head * p.dgate.head_stride;
            if (exists && chunk == 0 && p.dgate.is_bf16) static_cast<__nv_bfloat16*>(p.dgate.data)[at] = __float2bfloat16(dgate);
            if (exists && chunk == 0 && !p.dgate.is_bf16) static_cast<float*>(p.dgate.data)[at] = dgate;
        }
    }
    if (exists) *row_chunk(p.dv, batch, token, kv_head, chunk) = pack8(dv);
    if (exists && !live) *row_chunk(p.dk, batch, token, kv_head, chunk) = zeros;
}

// ---- what q and k were made from --------------------------------------------------------------------------

// The gradient of a tile of q or k, in fragments, becomes that of the raw rows it was normalised and rotated from (qkv.h):
//     d raw = rstd R^T(gain d - x (x . d) / (64 gain)),    d gain = sum of (x . d) / gain
// x: the tile itself, of whose rows the first `rows` are the sequence's; row 0 is row `first` of the batch. Keys are heads q_heads and on.
__device__ __forceinline__ void to_gradient_of_raw(float (&d)[32], const XsaRaw& raw, const uint8_t* x, int first, int rows, int head,
                                                   int q_heads, int normed_heads, int warp, int lane) {
    const int quad = lane % 4;
    const float gain = head < q_heads ? __ldg(raw.gain + head) : 1.0f, over_gain = gain != 0.0f ? 1.0f / gain : 0.0f;
    float dgain = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int at = 16 * warp + lane / 4 + 8 * r;
        const int row = first + min(at, rows - 1), table = row % raw.positions * (kQkvRotated / 2) + 2 * quad;
        const float rstd = __ldg(raw.rstd + int64_t(row) * normed_heads + head);
        const uint32_t cos = __ldg(reinterpret_cast<const unsigned*>(raw.cos + table));
        const uint32_t sin = __ldg(reinterpret_cast<const unsigned*>(raw.sin + table));
        uint32_t pairs[8];
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            pairs[j] = *reinterpret_cast<const uint32_t*>(x + swizzled(at, j) + 4 * quad);
            dot += d[4 * j + 2 * r] * low_bf16(pairs[j]) + d[4 * j + 2 * r + 1] * high_bf16(pairs[j]);
        }
        dot = quad_sum(dot) * over_gain;
        if (at < rows) dgain += dot;
        const float scale = rstd * gain, along = -rstd * dot * (1.0f / kXsaHeadDim);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            d[4 * j + 2 * r] = fmaf(scale, d[4 * j + 2 * r], along * low_bf16(pairs[j]));
            d[4 * j + 2 * r + 1] = fmaf(scale, d[4 * j + 2 * r + 1], along * high_bf16(pairs[j]));
        }
        // Dimensions i < 8 and i + 8 turn back together.
        const float a0 = d[2 * r], a1 = d[2 * r + 1], b0 = d[4 + 2 * r], b1 = d[5 + 2 * r];
        d[2 * r] = a0 * low_bf16(cos) - b0 * low_bf16(sin);
        d[2 * r + 1] = a1 * high_bf16(cos) - b1 * high_bf16(sin);
        d[4 + 2 * r] = b0 * low_bf16(cos) + a0 * low_bf16(sin);
        d[5 + 2 * r] = b1 * high_bf16(cos) + a1 * high_bf16(sin);
    }
    if (head >= q_heads) return;
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) dgain += __shfl_xor_sync(0xffffffffu, dgain, offset);
    if (lane == 0) atomicAdd(raw.dgain + head, dgain);
}

// ---- dk and dv: a block owns 192 keys of one key head and walks over the queries of its whole group ------------

constexpr int kKeyGroups = kXsaKeysPerBlock / kTile;  // warpgroups that multiply, one tile of keys each
constexpr int kKeyThreads = kKeyGroups * 128 + 128;
constexpr int kQueryStages = 8;  // query and dy tiles in flight
constexpr int kStatBytes = kTile * 8;
// dp - delta as one product: sixteen columns more of the contracted dimension, delta in three bf16, exact to 24 bits, on dy's side, and
// -1 three times on v's. A step of the product takes the place of a subtraction per element. (In dq, where there is less to take away
// for the same step, it is 1 to 3 % slower.)
constexpr int kDeltaBytes = kTile * 32;  // of a tile
constexpr int kMinusBytes = 256;         // eight rows, which stand for all
constexpr int kMinusRoom = kDeltaBytes;  // memcheck takes a product to read 64 rows of them

__device__ __forceinline__ uint2 in_three_bf16(float x) {
    const float high = __bfloat162float(__float2bfloat16_rn(x)), middle = __bfloat162float(__float2bfloat16_rn(x - high));
    return make_uint2(ptx::pack_bf16(high, middle), ptx::pack_bf16(x - high - middle, 0.0f));
}
// Where a row's columns of delta lie in its tile.
__device__ __forceinline__ uint32_t delta_place(int row) { return row / 8 * 256 + row % 8 * 16; }
// By 16 threads.
__device__ __forceinline__ void fill_minus(uint8_t* minus, int thread) {
    constexpr uint32_t kMinusOne = 0xbf80;
    const uint32_t one = thread < 8 ? kMinusOne : 0;  // in the rows' first chunks
    reinterpret_cast<uint4*>(minus)[thread] = make_uint4(one << 16 | one, one, 0, 0);
}

constexpr int kKeyShared =
    1024 + (2 * kKeyGroups + 2 * kQueryStages) * kTileBytes + kQueryStages * (kStatBytes + kDeltaBytes) + kMinusRoom;

__global__ __launch_bounds__(kKeyThreads, 1) void xsa_attention_dkdv_kernel(const __grid_constant__ CUtensorMap map_q,
                                                                            const __grid_constant__ CUtensorMap map_dy,
                                                                            const __grid_constant__ CUtensorMap map_k,
                                                                            const __grid_constant__ CUtensorMap map_v,
                                                                            const __grid_constant__ CUtensorMap map_stats,
                                                                            const __grid_constant__ XsaAttentionBwdParams p) {
    extern __shared__ uint8_t dynamic_shared[];
    __shared__ uint64_t s_full[kQueryStages], s_deltas_full[kQueryStages], s_empty[kQueryStages], s_keys_full;
    uint8_t* s_keys = align_tiles(dynamic_shared);                         // [kKeyGroups] tiles of k, then of v
    uint8_t* s_queries = s_keys + 2 * kKeyGroups * kTileBytes;             // [kQueryStages] of a q and a dy tile
    uint8_t* s_stats = s_queries + 2 * kQueryStages * kTileBytes;          // [kQueryStages] of 64 shifts, 64 delta
    uint8_t* s_deltas = s_stats + kQueryStages * kStatBytes;               // [kQueryStages]
    uint8_t* s_minus = s_deltas + kQueryStages * kDeltaBytes;

    const XsaAttentionParams& f = p.fwd;
    ptx::grid_dependency_launch();  // the dq kernel reads nothing of this one
    const Sequence seq = find_sequence(p.keys, f.tokens, f.batch, false);
    if (seq.length == 0) return;
    const int kv_head = find_head(p.keys), group = f.q_heads / f.kv_heads, first = kKeyGroups * seq.block, tiles = seq.tiles();
    const int steps = group * (tiles - first);  // step i: query tile first + i % (tiles - first) of head i / (tiles - first)

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&s_keys_full, 1);
        for (int i = 0; i < kQueryStages; ++i) {
            ptx::mbarrier_init(&s_full[i], 1);
            ptx::mbarrier_init(&s_deltas_full[i], kTile);
            ptx::mbarrier_init(&s_empty[i], kKeyGroups * 4);
        }
        ptx::fence_mbarrier_init();
    }
    for (int i = threadIdx.x; i < kQueryStages * kDeltaBytes / 16; i += kKeyThreads)
        reinterpret_cast<uint4*>(s_deltas)[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < kMinusBytes / 16) fill_minus(s_minus, threadIdx.x);
    ptx::fence_async_shared();
    __syncthreads();
    const int warpgroup = uniform(threadIdx.x / 128);

    if (warpgroup == kKeyGroups) {
        ptx::registers_decrease<32>();
        if (threadIdx.x % 128 == 0) {
            ptx::mbarrier_arrive_expect(&s_keys_full, 2 * kKeyGroups * kTileBytes);
            for (int w = 0; w < kKeyGroups; ++w) {
                const int token = seq.start + (first + w) * kTile;
                ptx::tma_load_4d(s_keys + w * kTileBytes, &map_k, &s_keys_full, 0, kv_head, token, seq.batch);
                ptx::tma_load_4d(s_keys + (kKeyGroups + w) * kTileBytes, &map_v, &s_keys_full, 0, kv_head, token, seq.batch);
            }
            for (int i = 0; i < steps; ++i) {
                const int stage = i % kQueryStages, head = kv_head * group + i / (tiles - first);
                const int token = seq.start + (first + i % (tiles - first)) * kTile;
                uint8_t* queries = s_queries + stage * 2 * kTileBytes;
                if (i >= kQueryStages) ptx::mbarrier_wait(&s_empty[stage], (i / kQueryStages - 1) & 1);
                ptx::mbarrier_arrive_expect(&s_full[stage], 2 * kTileBytes + kStatBytes);
                ptx::tma_load_4d(queries, &map_q, &s_full[stage], 0, head, token, seq.batch);
                ptx::tma_load_4d(queries + kTileBytes, &map_dy, &s_full[stage], 0, head, token, seq.batch);
                ptx::tma_load_2d(s_stats + stage * kStatBytes, &map_stats, &s_full[stage],
                                 stats_place(seq.start, seq.document) + token - seq.start, 2 * (seq.batch * f.q_heads + head));
            }
        } else if (threadIdx.x % 128 >= kTile) {  // two more warps of the loading warpgroup: delta's columns of a query each
            const int column = threadIdx.x % kTile;
            for (int i = 0; i < steps; ++i) {
                const int stage = i % kQueryStages;
                ptx::mbarrier_wait(&s_full[stage], i / kQueryStages & 1);
                const float delta = reinterpret_cast<const float*>(s_stats + stage * kStatBytes)[kTile + column];
                *reinterpret_cast<uint2*>(s_deltas + stage * kDeltaBytes + delta_place(column)) = in_three_bf16(delta);
                ptx::fence_async_shared();
                ptx::mbarrier_arrive(&s_deltas_full[stage]);
            }
        }
    } else {
        ptx::registers_increase<160>();
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = 16 * warp + lane / 4;
        const int mine = first + warpgroup;  // tile of keys
        const float scale_log2 = f.scale * kLog2e;
        float dk[32], dv[32];
#pragma unroll
        for (int i = 0; i < 32; ++i) dk[i] = dv[i] = 0.0f;
        const bool leads = lane == 0;
        uint8_t* own_k = s_keys + warpgroup * kTileBytes;
        uint8_t* own_v = s_keys + (kKeyGroups + warpgroup) * kTileBytes;
        const uint64_t keys = wgmma::kept(wgmma::descriptor(own_k)), values = wgmma::kept(wgmma::descriptor(own_v));
        const uint64_t queries = wgmma::kept(wgmma::descriptor(s_queries));
        const uint64_t queries_mn = wgmma::kept(wgmma::descriptor_mn_major(s_queries, 0));
        const uint64_t deltas = wgmma::kept(wgmma::descriptor_of_16(s_deltas, 256)), minus = wgmma::descriptor_of_16(s_minus, 0);

        ptx::mbarrier_wait(&s_keys_full, 0);
        const uint32_t full = ptx::kept(ptx::smem_u32(s_full)), empty = ptx::kept(ptx::smem_u32(s_empty));
        const uint32_t deltas_full = ptx::kept(ptx::smem_u32(s_deltas_full));
        unsigned stage = 0, parity = 0;
        int tile = first, before = -1;  // before: stage of the step whose last products may still be running
        for (int step = 0; step < steps; ++step, tile = tile + 1 < tiles ? tile + 1 : first) {
            const unsigned now = stage, now_parity = parity;
            ptx::mbarrier_wait(full + 8 * now, parity);
            stage = (stage + 1) % kQueryStages;
            parity ^= stage == 0;
            if (tile < mine) {  // queries that see none of this warpgroup's keys
                if (leads) ptx::mbarrier_arrive(empty + 8 * now);
                continue;
            }
            // Rows are keys, columns are queries.
            const uint64_t q = wgmma::advance(queries, now * 2 * kTileBytes), q_mn = wgmma::advance(queries_mn, now * 2 * kTileBytes);
            float s[32], dp[32];
            uint32_t operand[16];
            // Ahead of the products: a read takes 170 clocks while they run.
            const float2* stats = reinterpret_cast<const float2*>(s_stats + now * kStatBytes);
            const float2 shifts = stats[lane];
            wgmma::wait<0>();
            if (leads && before >= 0) ptx::mbarrier_arrive(empty + 8 * before);
            before = now;
            begin_products();
            product_abt(s, keys, q);
            wgmma::commit();
            ptx::mbarrier_wait(deltas_full + 8 * now, now_parity);
            begin_products();
            product_abt(dp, values, wgmma::advance(q, kTileBytes));
            wgmma::mma(dp, minus, wgmma::advance(deltas, now * kDeltaBytes), true);
            wgmma::commit();
            const bool is_shifted = __any_sync(0xffffffffu, shifts.x != 0.0f || shifts.y != 0.0f);
            wgmma::wait<1>();
            wgmma::pin(s);
            if (is_shifted) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float2 two = stats[lane % 4 + 4 * j];  // of two columns
                    s[4 * j] = fmaf(s[4 * j], scale_log2, -two.x);
                    s[4 * j + 1] = fmaf(s[4 * j + 1], scale_log2, -two.y);
                    s[4 * j + 2] = fmaf(s[4 * j + 2], scale_log2, -two.x);
                    s[4 * j + 3] = fmaf(s[4 * j + 3], scale_log2, -two.y);
                }
            } else if (scale_log2 != 1.0f) {
#pragma unroll
                for (int e = 0; e < 32; ++e) s[e] *= scale_log2;
            }
            if (tile == mine || tile == tiles - 1) {
                const int end = seq.length - tile * kTile, diagonal = tile == mine ? 0 : -kTile;
#pragma unroll
                for (int e = 0; e < 32; ++e) {
                    const int column = 8 * (e / 4) + 2 * (lane % 4) + e % 2;
                    if (column < row + 8 * (e / 2 % 2) + diagonal || column >= end) s[e] = -INFINITY;
                }
            }
#pragma unroll
            for (int e = 0; e < 32; ++e) s[e] = ptx::exp2_approx(s[e]);
            pack(operand, s);
            begin_products();
            product_ab(dv, operand, wgmma::advance(q_mn, kTileBytes), true);
            wgmma::commit();
            wgmma::wait<1>();
            wgmma::pin(dp);
#pragma unroll
            for (int e = 0; e < 32; ++e) s[e] *= dp[e];
            uint32_t ds[16];
            pack(ds, s);
            begin_products();
            product_ab(dk, ds, q_mn, true);
            wgmma::commit();
        }
        wgmma::wait<0>();
        wgmma::pin(dk);
        wgmma::pin(dv);

        uint4 direct[4];  // what prepare left in dv, in store_rows' order
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = mine * kTile + 16 * warp + 4 * i + lane / 8;
            if (token < seq.length) direct[i] = *row_chunk(p.dv, seq.batch, seq.start + token, kv_head, lane % 8);
        }
        // Through the tiles of k and v, which no product of this warpgroup reads any more.
        ptx::named_sync(1 + warpgroup, 128);
#pragma unroll
        for (int i = 0; i < 32; ++i) dk[i] *= f.scale;
        if (p.raw.rstd != nullptr)
            to_gradient_of_raw(dk, p.raw, own_k, seq.batch * f.tokens + seq.start + mine * kTile, seq.length - mine * kTile,
                               f.q_heads + kv_head, f.q_heads, f.q_heads + f.kv_heads, warp, lane);
        store_rows(own_k, dk, warp, lane, [&](int at, int chunk, uint4 value, int) {
            const int token = mine * kTile + at;
            if (token < seq.length) *row_chunk(p.dk, seq.batch, seq.start + token, kv_head, chunk) = value;
        });
        store_rows(own_v, dv, warp, lane, [&](int at, int chunk, uint4 value, int i) {
            const int token = mine * kTile + at;
            if (token >= seq.length) return;
            const Eight other(direct[i]), attention(value);
            float sum[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) sum[e] = other.x[e] + attention.x[e];
            *row_chunk(p.dv, seq.batch, seq.start + token, kv_head, chunk) = pack8(sum);
        });
    }
}

// ---- dq: the forward's walk over the keys -----------------------------------------------------------------

__global__ __launch_bounds__(kQueryThreads, 2) void xsa_attention_dq_kernel(const __grid_constant__ CUtensorMap map_q,
                                                                            const __grid_constant__ CUtensorMap map_dy,
                                                                            const __grid_constant__ CUtensorMap map_k,
                                                                            const __grid_constant__ CUtensorMap map_v,
                                                                            const __grid_constant__ XsaAttentionBwdParams p) {
    extern __shared__ uint8_t dynamic_shared[];
    __shared__ uint64_t s_bars[2 * kStages], s_rows_full;
    uint8_t* s_rows = align_tiles(dynamic_shared);             // [kConsumers] of a q and a dy tile
    uint8_t* s_keys = s_rows + 2 * kConsumers * kTileBytes;    // [kStages] of a k and a v tile

    const XsaAttentionParams& f = p.fwd;
    // Its blocks take the multiprocessors that the dk, dv kernel leaves; the last one sees to it that this kernel ends after that one.
    if (blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1 && blockIdx.z == gridDim.z - 1) ptx::grid_dependency_wait();
    const Sequence seq = find_sequence(f.queries, f.tokens, f.batch, true);
    if (seq.length == 0) return;
    const int key_tiles = min(find_query_tile(f, seq.block, kConsumers - 1).tile + 1, seq.tiles());
    const int warpgroup = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
    const QueryTile mine = find_query_tile(f, seq.block, warpgroup);
    const KeyStream stream{ptx::kept(ptx::smem_u32(s_bars)), ptx::smem_u32(s_keys), &map_k, &map_v, uniform(seq.batch),
                           uniform(mine.kv_head), uniform(seq.start), uniform(key_tiles)};
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&s_rows_full, 1);
        stream.init();
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&s_rows_full, 2 * kConsumers * kTileBytes);
        for (int w = 0; w < kConsumers; ++w) {
            const QueryTile q = find_query_tile(f, seq.block, w);
            uint8_t* rows = s_rows + 2 * w * kTileBytes;
            ptx::tma_load_4d(rows, &map_q, &s_rows_full, 0, q.head, seq.start + q.tile * kTile, seq.batch);
            ptx::tma_load_4d(rows + kTileBytes, &map_dy, &s_rows_full, 0, q.head, seq.start + q.tile * kTile, seq.batch);
        }
        stream.load_first();
    }

    const int warp = threadIdx.x / 32 % 4, row = 16 * warp + lane / 4;
    const bool leads = lane == 0, refills = uniform(threadIdx.x / 32) == 0;
    const float scale_log2 = f.scale * kLog2e;
    const unsigned last = uniform(min(mine.tile, key_tiles - 1));
    float shift[2] = {}, delta[2] = {};  // of this thread's rows; zeros for rows past the end, whose results go nowhere
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int token = mine.tile * kTile + row + 8 * r;
        const int64_t at = 2 * (int64_t(seq.batch) * f.q_heads + mine.head) * p.stats_width + stats_place(seq.start, seq.document) + token;
        if (token >= seq.length) continue;
        shift[r] = p.stats[at];
        delta[r] = p.stats[at + p.stats_width];
    }
    float dq[32];
    uint8_t* own_rows = s_rows + 2 * warpgroup * kTileBytes;
    const uint64_t q = wgmma::descriptor(own_rows), dy = wgmma::descriptor(own_rows + kTileBytes);
    const uint64_t keys = wgmma::descriptor(s_keys), keys_mn = wgmma::descriptor_mn_major(s_keys, 0);

    ptx::mbarrier_wait(&s_rows_full, 0);
    float s[32], dp[32];
    const bool is_scaled = scale_log2 != 1.0f || __any_sync(0xffffffffu, shift[0] != 0.0f || shift[1] != 0.0f);
    auto start_scores = [&](unsigned j) {
        stream.wait(j);
        begin_products();
        product_abt(s, q, wgmma::advance(keys, j % kStages * 2 * kTileBytes));
        wgmma::commit();
    };
    // Scores of tile j, already started, to its part of dq, which is left running.
    auto finish_tile = [&](unsigned j, bool is_first, bool diagonal) {
        const int offset = j % kStages * 2 * kTileBytes;
        wgmma::wait<1>();  // the last tile's part of dq
        if (leads && !is_first) stream.release(j - 1);
        begin_products();
        product_abt(dp, dy, wgmma::advance(keys, offset + kTileBytes));
        wgmma::commit();
        wgmma::wait<0>();
        wgmma::pin(s);
        wgmma::pin(dp);
        if (is_scaled) {
#pragma unroll
            for (int e = 0; e < 32; ++e) s[e] = fmaf(s[e], scale_log2, -shift[e / 2 % 2]);
        }
        if (diagonal) mask_diagonal(s, row, lane);
        // Half of the keys at a time: their differences fill the gaps between exponentials.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t ds[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int e = 16 * half + 2 * i;
                const float p0 = ptx::exp2_approx(s[e]), p1 = ptx::exp2_approx(s[e + 1]);
                ds[i] = ptx::pack_bf16(p0 * (dp[e] - delta[i % 2]), p1 * (dp[e + 1] - delta[i % 2]));
            }
            begin_products();
#pragma unroll
            for (int k = 0; k < 2; ++k)
                wgmma::mma<wgmma::kMajorMN>(dq, ds[4 * k], ds[4 * k + 1], ds[4 * k + 2], ds[4 * k + 3],
                                            wgmma::advance(keys_mn, offset + 2048 * (2 * half + k)), half + k > 0 || !is_first);
        }
        wgmma::commit();
    };
    start_scores(0);
    for (unsigned round = 0; kStages * round < last; ++round) {
#pragma unroll
        for (unsigned u = 0; u < kStages; ++u) {
            const unsigned j = kStages * round + u;
            if (refills && (u >= 2 || round > 0)) stream.refill(j);
            finish_tile(j, u == 0 && round == 0, false);
            start_scores(j + 1);
            if (j + 1 == last) break;
        }
    }
    finish_tile(last, last == 0, true);
    wgmma::wait<0>();
    wgmma::pin(dq);

    ptx::named_sync(1 + warpgroup, 128);
#pragma unroll
    for (int i = 0; i < 32; ++i) dq[i] *= f.scale;
    if (p.raw.rstd != nullptr)
        to_gradient_of_raw(dq, p.raw, own_rows, seq.batch * f.tokens + seq.start + mine.tile * kTile,
                           seq.length - mine.tile * kTile, mine.head, f.q_heads, f.q_heads + f.kv_heads, warp, lane);
    store_rows(own_rows, dq, warp, lane, [&](int at, int chunk, uint4 value, int) {
        const int token = mine.tile * kTile + at;
        if (token < seq.length) *row_chunk(p.dq, seq.batch, seq.start + token, mine.head, chunk) = value;
    });
}

// 64 tokens' shifts and delta of one head per box; coordinates (token, 2 (batch and head)).
static cudaError_t stats_map(CUtensorMap* map, const float* stats, int heads, uint64_t width) {
    TensorMapDims dims{2, {width, 2 * uint64_t(heads)}, {width * 4}, {kTile, 2}};
    return make_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, stats, dims, CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace xsa

cudaError_t xsa_attention_bwd(const XsaAttentionBwdParams& p, cudaStream_t stream) {
    using namespace xsa;
    const XsaAttentionParams& f = p.fwd;
    CUtensorMap map_q, map_dy, map_k, map_v, map_stats;
    cudaError_t status = tile_map(&map_q, f.q, f.q_heads, f.tokens, f.batch);
    if (status == cudaSuccess) status = tile_map(&map_dy, p.dy, f.q_heads, f.tokens, f.batch);
    if (status == cudaSuccess) status = tile_map(&map_k, f.k, f.kv_heads, f.tokens, f.batch);
    if (status == cudaSuccess) status = tile_map(&map_v, f.v, f.kv_heads, f.tokens, f.batch);
    if (status == cudaSuccess) status = stats_map(&map_stats, p.stats, f.batch * f.q_heads, p.stats_width);
    constexpr int kQueryShared = 1024 + (2 * kConsumers + 2 * kStages) * kTileBytes;
    if (status == cudaSuccess) status = allow_shared(reinterpret_cast<const void*>(xsa_attention_dkdv_kernel), kKeyShared);
    if (status == cudaSuccess) status = allow_shared(reinterpret_cast<const void*>(xsa_attention_dq_kernel), kQueryShared);
    if (status != cudaSuccess) return status;

    if (p.grad_out.data != nullptr) {
        status = clear_unused_stats(p.stats, f.batch * f.q_heads, p.stats_width, f.tokens, stream);
        if (status != cudaSuccess) return status;
        constexpr int kRows = kPrepareThreads / kRowLanes;
        xsa_attention_prepare_kernel<<<dim3((f.tokens + kRows - 1) / kRows, f.kv_heads, f.batch), kPrepareThreads, 0, stream>>>(p);
    }
    const dim3 key_grid = grid_of(p.keys, (f.tokens + kXsaKeysPerBlock - 1) / kXsaKeysPerBlock, f.kv_heads, f.batch);
    xsa_attention_dkdv_kernel<<<key_grid, kKeyThreads, kKeyShared, stream>>>(map_q, map_dy, map_k, map_v, map_stats, p);
    if (cudaError_t launched = cudaGetLastError(); launched != cudaSuccess) return launched;
    cudaLaunchAttribute overlap{cudaLaunchAttributeProgrammaticStreamSerialization};
    overlap.val.programmaticStreamSerializationAllowed = 1;
    const cudaLaunchConfig_t config{query_grid(f), kQueryThreads, kQueryShared, stream, &overlap, 1};
    return cudaLaunchKernelEx(&config, xsa_attention_dq_kernel, map_q, map_dy, map_k, map_v, p);
}

}  // namespace pgolf
