#include "kernels/xsa_attention.cuh"

namespace pgolf {
namespace xsa {

// Base 2, of the unnormalised probabilities. The largest score of a row's first tile stands in for the row's maximum: its
// probability becomes 2^-kHeadroom, so no sum is too small, and later scores may exceed it by kHeadroom + kSumLimit.
constexpr float kHeadroom = 60.0f;
constexpr float kSumLimit = 0x1p80f;

struct Softmax {
    float shift[2] = {-INFINITY, -INFINITY};  // of this thread's rows (lane / 4, + 8): what scores lose, in powers of 2
    float sum[2] = {0.0f, 0.0f};              // this thread's columns only
};

// Largest score of each of this thread's rows.
__device__ __forceinline__ void row_maxima(float (&top)[2], const float (&s)[32]) {
    // Eight short chains instead of two long ones: the latency of a maximum is what a warp would wait for.
    float partial[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) partial[i] = s[i];
#pragma unroll
    for (int i = 8; i < 32; ++i) partial[i % 8] = fmaxf(partial[i % 8], s[i]);
    top[0] = quad_max(fmaxf(fmaxf(partial[0], partial[1]), fmaxf(partial[4], partial[5])));
    top[1] = quad_max(fmaxf(fmaxf(partial[2], partial[3]), fmaxf(partial[6], partial[7])));
}

// Scores to unnormalised probabilities, in place.
__device__ __forceinline__ void exponentials(float (&s)[32], Softmax& state, float scale_log2) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const int r = i / 2 % 2;
        s[i] = ptx::exp2_approx(fmaf(s[i], scale_log2, -state.shift[r]));
        s[i + 1] = ptx::exp2_approx(fmaf(s[i + 1], scale_log2, -state.shift[r]));
        state.sum[r] += s[i] + s[i + 1];
    }
}

// The shift grows to the maximum of what has been seen, and what was summed with a smaller one is scaled down.
__device__ __forceinline__ void raise_shift(Softmax& state, float (&o)[32], const float (&s)[32], float scale_log2) {
    float top[2];
    row_maxima(top, s);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float shift = fmaxf(top[r] * scale_log2, state.shift[r]), factor = ptx::exp2_approx(state.shift[r] - shift);
        state.shift[r] = shift;
        state.sum[r] *= factor;
#pragma unroll
        for (int i = 0; i < 16; ++i) o[4 * (i / 2) + 2 * r + i % 2] *= factor;
    }
}

__global__ __launch_bounds__(kQueryThreads, 2) void xsa_attention_fwd_kernel(const __grid_constant__ CUtensorMap map_q,
                                                                             const __grid_constant__ CUtensorMap map_k,
                                                                             const __grid_constant__ CUtensorMap map_v,
                                                                             const __grid_constant__ XsaAttentionParams p) {
    extern __shared__ uint8_t dynamic_shared[];
    __shared__ uint64_t s_full[2 * kStages], s_empty[2 * kStages], s_rows_full;  // a second set for a second walk
    __shared__ Sequence s_seq;
    __shared__ KeyRange s_range;
    uint8_t* s_q = align_tiles(dynamic_shared);             // [kConsumers] tiles
    uint8_t* s_keys = s_q + kConsumers * kTileBytes;        // [kStages] of a key and a value tile

    const Sequence seq = find_sequence(p.queries, p.tokens, true, p.prefix);
    const int warpgroup = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
    if (seq.length == 0) {  // tokens after the last document
        const QueryTile mine = find_query_tile(p.q_heads, p.kv_heads, seq.block, warpgroup);
        for (int i = threadIdx.x % 128; i < kTile * 8; i += 128) {
            const int token = seq.start + mine.tile * kTile + i / 8;
            if (token >= p.tokens) break;
            *row_chunk(p.out, 0, token, mine.head, i % 8) = make_uint4(0, 0, 0, 0);
            if (i % 8 == 0) p.lse[int64_t(mine.head) * p.tokens + token] = p.own[int64_t(mine.head) * p.tokens + token] = 0.0f;
        }
        return;
    }
    // NOTE: what the loop does not need goes to shared memory: the loop takes every register.
    // The later of the two warpgroups' tiles decides how many key tiles the block needs.
    const int key_tiles = min(find_query_tile(p.q_heads, p.kv_heads, seq.block, kConsumers - 1).tile + 1, seq.tiles());

    const QueryTile tile = find_query_tile(p.q_heads, p.kv_heads, seq.block, warpgroup);
    KeyStream stream{s_full, s_empty, s_keys, &map_k, &map_v, &s_range};
    if (threadIdx.x == 0) {
        s_seq = seq;
        s_range = {seq.batch, tile.kv_head, seq.start, key_tiles};
        ptx::mbarrier_init(&s_rows_full, 1);
        stream.init();
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&s_rows_full, kConsumers * kTileBytes);
        for (int w = 0; w < kConsumers; ++w) {
            const QueryTile q = find_query_tile(p.q_heads, p.kv_heads, seq.block, w);
            // May begin before the first query: the copy engine fills what does not exist with zeros.
            ptx::tma_load_4d(s_q + w * kTileBytes, &map_q, &s_rows_full, 0, q.head, seq.start + q.tile * kTile - p.prefix, seq.batch);
        }
        stream.load_first();
    }

    const int warp = threadIdx.x / 32 % 4, row = 16 * warp + lane / 4;
    const float scale_log2 = p.scale * kLog2e;
    // NOTE: a tile wholly past the sequence's end runs along, so that every stage is released, and stores nothing.
    const int last = uniform(min(tile.tile, key_tiles - 1));

    float o[32];
    Softmax state;
    const uint64_t q = wgmma::descriptor(s_q + warpgroup * kTileBytes);
    const uint64_t keys = wgmma::descriptor(s_keys), values = wgmma::descriptor_mn_major(s_keys + kTileBytes, 0);
    auto start_scores = [&](float (&s)[32], int j) {
        stream.wait(j);
        begin_products();
        product_abt(s, q, wgmma::advance(keys, j % kStages * 2 * kTileBytes));
        wgmma::commit();
    };
    auto start_output = [&](const float (&p)[32], int j) {
        uint32_t probabilities[16];
        pack(probabilities, p);
        begin_products();
        product_ab(o, probabilities, wgmma::advance(values, j % kStages * 2 * kTileBytes), j > 0);
        wgmma::commit();
    };

    ptx::mbarrier_wait(&s_rows_full, 0);
    float s[32];
    start_scores(s, 0);
    wgmma::wait<0>();
    wgmma::pin(s);
    if (last == 0) mask_diagonal(s, row, lane);
    row_maxima(state.shift, s);
#pragma unroll
    for (int r = 0; r < 2; ++r) state.shift[r] = fmaf(state.shift[r], scale_log2, kHeadroom);
    for (int j = 0; j < last; ++j) {
        stream.refill(j);
        exponentials(s, state, scale_log2);
        uint32_t probabilities[16];
        wgmma::wait<0>();
        wgmma::pin(o);
        if (j > 0) stream.release(j - 1);
        pack(probabilities, s);
        stream.wait(j + 1);
        begin_products();
        product_abt(s, q, wgmma::advance(keys, (j + 1) % kStages * 2 * kTileBytes));
        wgmma::commit();
        product_ab(o, probabilities, wgmma::advance(values, j % kStages * 2 * kTileBytes), j > 0);
        wgmma::commit();
        wgmma::wait<1>();
        wgmma::pin(s);
    }
    mask_diagonal(s, row, lane);
    exponentials(s, state, scale_log2);
    wgmma::wait<0>();
    wgmma::pin(o);
    start_output(s, last);
    wgmma::wait<0>();
    wgmma::pin(o);
    // Scores that outgrew the first tile's: once more from the start, with a running maximum.
    if (__syncthreads_or(!(fmaxf(state.sum[0], state.sum[1]) < kSumLimit))) {
        stream.full += kStages;
        stream.empty += kStages;
        if (threadIdx.x == 0) {
            stream.init();
            ptx::fence_mbarrier_init();
        }
        __syncthreads();
        if (threadIdx.x == 0) stream.load_first();
        state = Softmax{};
#pragma unroll
        for (int i = 0; i < 32; ++i) o[i] = 0.0f;
#pragma unroll 1
        for (int j = 0; j <= last; ++j) {
            float s[32];
            stream.refill(j);
            start_scores(s, j);
            wgmma::wait<0>();
            wgmma::pin(s);
            if (j == last) mask_diagonal(s, row, lane);
            raise_shift(state, o, s, scale_log2);
            exponentials(s, state, scale_log2);
            start_output(s, j);
            wgmma::wait<0>();
            wgmma::pin(o);
            stream.release(j);
        }
    }

    const QueryTile mine = find_query_tile(p.q_heads, p.kv_heads, s_seq.block, warpgroup);
    // The last tile of keys is the diagonal one: its values are this tile's own.
    const uint8_t* own_values = s_keys + (last % kStages * 2 + 1) * kTileBytes;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(state.sum[r]), normalise = __fdividef(1.0f, sum);
        const int at = row + 8 * r, token = mine.tile * kTile + at;
        const bool inside = token >= p.prefix && token < s_seq.length;
        float own = 0.0f, v[16] = {};  // v in the columns of o
        if (p.xsa) {
            float dot = 0.0f, square = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const uint32_t pair = *reinterpret_cast<const uint32_t*>(own_values + swizzled(at, j) + 4 * (lane % 4));
                v[2 * j] = ptx::low_bf16(pair);
                v[2 * j + 1] = ptx::high_bf16(pair);
                dot += o[4 * j + 2 * r] * v[2 * j] + o[4 * j + 2 * r + 1] * v[2 * j + 1];
                square += v[2 * j] * v[2 * j] + v[2 * j + 1] * v[2 * j + 1];
            }
            own = __fdividef(quad_sum(dot) * normalise, fmaxf(quad_sum(square), 1e-24f));
        }
        const bool is_gated = p.gate.data != nullptr && inside;
        const float gate = is_gated ? load_gate(p.gate, s_seq.batch, s_seq.start + token - p.prefix, mine.head) : 1.0f;
        const float factor = gate * normalise, share = gate * own;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            o[4 * j + 2 * r] = o[4 * j + 2 * r] * factor - share * v[2 * j];
            o[4 * j + 2 * r + 1] = o[4 * j + 2 * r + 1] * factor - share * v[2 * j + 1];
        }
        if (inside && lane % 4 == 0) {
            const int64_t head_row = int64_t(s_seq.batch) * p.q_heads + mine.head;
            const int64_t at_row = head_row * (p.tokens - p.prefix) + s_seq.start + token - p.prefix;
            p.lse[at_row] = state.shift[r] * kLn2 + __logf(sum);
            p.own[at_row] = own;
        }
    }
    // Through this warp's rows of the query tile, once no product reads it any more.
    ptx::named_sync(1 + warpgroup, 128);
    store_rows(s_q + warpgroup * kTileBytes, o, warp, lane, [&](int at, int chunk, uint4 value, int) {
        const int token = mine.tile * kTile + at;
        if (token < p.prefix || token >= s_seq.length) return;
        *row_chunk(p.out, s_seq.batch, s_seq.start + token - p.prefix, mine.head, chunk) = value;
    });
}

}  // namespace xsa

cudaError_t xsa_attention_fwd(const XsaAttentionParams& p, cudaStream_t stream) {
    using namespace xsa;
    CUtensorMap map_q, map_k, map_v;
    cudaError_t status = tile_map(&map_q, p.q, p.q_heads, p.tokens - p.prefix, p.batch);
    if (status == cudaSuccess) status = tile_map(&map_k, p.k, p.kv_heads, p.tokens, p.batch);
    if (status == cudaSuccess) status = tile_map(&map_v, p.v, p.kv_heads, p.tokens, p.batch);
    constexpr int kShared = 1024 + (kConsumers + 2 * kStages) * kTileBytes;
    if (status == cudaSuccess) status = allow_shared(reinterpret_cast<const void*>(xsa_attention_fwd_kernel), kShared);
    if (status != cudaSuccess) return status;
    xsa_attention_fwd_kernel<<<query_grid(p), kQueryThreads, kShared, stream>>>(map_q, map_k, map_v, p);
    return cudaGetLastError();
}

}  // namespace pgolf
