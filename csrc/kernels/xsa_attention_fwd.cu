#include "kernels/xsa_attention.cuh"

namespace pgolf {
namespace xsa {

// The running maximum may lag by 2^kSlack before sums and output are rescaled: fp32 sums have the room, and most tiles skip the rescale.
constexpr float kSlack = 8.0f;

struct OnlineSoftmax {
    float maximum[2] = {-INFINITY, -INFINITY};  // of this thread's rows (lane / 4, + 8), in score units
    float sum[2] = {0.0f, 0.0f};                // this thread's columns only
};

// Scores of one tile to unnormalised probabilities as the A operand.
template <bool kDiagonal>
__device__ __forceinline__ void softmax_tile(uint32_t (&p)[16], float (&s)[32], float (&o)[32], OnlineSoftmax& state, float scale_log2,
                                             int row, int lane) {
    if (kDiagonal) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
            if (column > row + 8 * (i / 2 % 2)) s[i] = -INFINITY;
        }
    }
    // Eight short chains instead of two long ones: the latency of a maximum is what a warp would wait for.
    float partial[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) partial[i] = s[i];
#pragma unroll
    for (int i = 8; i < 32; ++i) partial[i % 8] = fmaxf(partial[i % 8], s[i]);
    const float top[2] = {quad_max(fmaxf(fmaxf(partial[0], partial[1]), fmaxf(partial[4], partial[5]))),
                          quad_max(fmaxf(fmaxf(partial[2], partial[3]), fmaxf(partial[6], partial[7])))};
    const bool outgrown = (top[0] - state.maximum[0]) * scale_log2 > kSlack || (top[1] - state.maximum[1]) * scale_log2 > kSlack;
    if (__any_sync(0xffffffffu, outgrown)) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float maximum = fmaxf(top[r], state.maximum[r]);
            const float factor = ptx::exp2_approx((state.maximum[r] - maximum) * scale_log2);
            state.maximum[r] = maximum;
            state.sum[r] *= factor;
#pragma unroll
            for (int i = 0; i < 16; ++i) o[4 * (i / 2) + 2 * r + i % 2] *= factor;
        }
    }
    const float shift[2] = {state.maximum[0] * scale_log2, state.maximum[1] * scale_log2};
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        s[i] = ptx::exp2_approx(fmaf(s[i], scale_log2, -shift[i / 2 % 2]));
        s[i + 1] = ptx::exp2_approx(fmaf(s[i + 1], scale_log2, -shift[i / 2 % 2]));
        state.sum[i / 2 % 2] += s[i] + s[i + 1];
    }
    pack(p, s);
}

__global__ __launch_bounds__(kQueryThreads, 2) void xsa_attention_fwd_kernel(const __grid_constant__ CUtensorMap map_q,
                                                                             const __grid_constant__ CUtensorMap map_k,
                                                                             const __grid_constant__ CUtensorMap map_v,
                                                                             const __grid_constant__ XsaAttentionParams p) {
    extern __shared__ uint8_t dynamic_shared[];
    __shared__ uint64_t s_full[kStages], s_empty[kStages], s_rows_full;
    uint8_t* s_q = align_tiles(dynamic_shared);             // [kConsumers] tiles
    uint8_t* s_keys = s_q + kConsumers * kTileBytes;        // [kStages] of a key and a value tile

    const Sequence seq = find_sequence(p.queries, p.tokens, true);
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
    // The later of the two warpgroups' tiles decides how many key tiles the block needs.
    const int key_tiles = min(find_query_tile(p.q_heads, p.kv_heads, seq.block, kConsumers - 1).tile + 1, seq.tiles());

    const QueryTile mine = find_query_tile(p.q_heads, p.kv_heads, seq.block, warpgroup);
    const KeyStream stream{s_full, s_empty, s_keys, &map_k, &map_v, seq.batch, mine.kv_head, seq.start, key_tiles};
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&s_rows_full, 1);
        stream.init();
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&s_rows_full, kConsumers * kTileBytes);
        for (int w = 0; w < kConsumers; ++w) {
            const QueryTile q = find_query_tile(p.q_heads, p.kv_heads, seq.block, w);
            ptx::tma_load_4d(s_q + w * kTileBytes, &map_q, &s_rows_full, 0, q.head, seq.start + q.tile * kTile, seq.batch);
        }
        stream.load_first();
    }

    const int warp = threadIdx.x / 32 % 4, row = 16 * warp + lane / 4;
    const float scale_log2 = p.scale * kLog2e;
    // NOTE: a tile wholly past the sequence's end runs along, so that every stage is released, and stores nothing.
    const int last = uniform(min(mine.tile, key_tiles - 1));

    uint32_t probabilities[16];
    float even[32], odd[32], o[32];  // scores of even and odd key tiles
    OnlineSoftmax state;
#pragma unroll
    for (int i = 0; i < 32; ++i) o[i] = 0.0f;
    const uint64_t q = wgmma::descriptor(s_q + warpgroup * kTileBytes);
    const uint64_t keys = wgmma::descriptor(s_keys), values = wgmma::descriptor_mn_major(s_keys + kTileBytes, 0);

    ptx::mbarrier_wait(&s_rows_full, 0);
    stream.wait(0);
    begin_products();
    product_abt(even, q, keys);
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(even);
    // The scores of tile j + 1 are on the tensor cores while those of tile j become probabilities.
    auto step = [&](float (&now)[32], float (&next)[32], int j) {
        stream.refill(j);
        stream.wait(j + 1);
        begin_products();
        product_abt(next, q, wgmma::advance(keys, (j + 1) % kStages * 2 * kTileBytes));
        wgmma::commit();
        softmax_tile<false>(probabilities, now, o, state, scale_log2, row, lane);
        begin_products();
        product_ab(o, probabilities, wgmma::advance(values, j % kStages * 2 * kTileBytes), j > 0);
        wgmma::commit();
        wgmma::wait<0>();
        wgmma::pin(next);
        wgmma::pin(o);
        stream.release(j);
    };
    int j = 0;
    for (; j + 1 < last; j += 2) {
        step(even, odd, j);
        step(odd, even, j + 1);
    }
    if (j < last) {
        step(even, odd, j);
#pragma unroll
        for (int i = 0; i < 32; ++i) even[i] = odd[i];
    }
    softmax_tile<true>(probabilities, even, o, state, scale_log2, row, lane);
    begin_products();
    product_ab(o, probabilities, wgmma::advance(values, last % kStages * 2 * kTileBytes), last > 0);
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(o);

    // The last tile of keys is the diagonal one: its values are this tile's own.
    const uint8_t* own_values = s_keys + (last % kStages * 2 + 1) * kTileBytes;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(state.sum[r]), normalise = __fdividef(1.0f, sum);
        const int at = row + 8 * r, token = mine.tile * kTile + at;
        const bool inside = token < seq.length;
        float own = 0.0f, v[16] = {};  // v in the columns of o
        if (p.xsa) {
            float dot = 0.0f, square = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const uint32_t pair = *reinterpret_cast<const uint32_t*>(own_values + swizzled(at, j) + 4 * (lane % 4));
                v[2 * j] = __uint_as_float(pair << 16);
                v[2 * j + 1] = __uint_as_float(pair & 0xffff0000u);
                dot += o[4 * j + 2 * r] * v[2 * j] + o[4 * j + 2 * r + 1] * v[2 * j + 1];
                square += v[2 * j] * v[2 * j] + v[2 * j + 1] * v[2 * j + 1];
            }
            own = __fdividef(quad_sum(dot) * normalise, fmaxf(quad_sum(square), 1e-24f));
        }
        const float gate = p.gate.data != nullptr && inside ? load_gate(p.gate, seq.batch, seq.start + token, mine.head) : 1.0f;
        const float factor = gate * normalise, share = gate * own;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            o[4 * j + 2 * r] = o[4 * j + 2 * r] * factor - share * v[2 * j];
            o[4 * j + 2 * r + 1] = o[4 * j + 2 * r + 1] * factor - share * v[2 * j + 1];
        }
        if (inside && lane % 4 == 0) {
            const int64_t at_row = (int64_t(seq.batch) * p.q_heads + mine.head) * p.tokens + seq.start + token;
            p.lse[at_row] = state.maximum[r] * p.scale + __logf(sum);
            p.own[at_row] = own;
        }
    }
    // Through this warp's rows of the query tile, once no product reads it any more.
    ptx::named_sync(1 + warpgroup, 128);
    store_rows(s_q + warpgroup * kTileBytes, o, warp, lane, [&](int at, int chunk, uint4 value, int) {
        const int token = mine.tile * kTile + at;
        if (token < seq.length) *row_chunk(p.out, seq.batch, seq.start + token, mine.head, chunk) = value;
    });
}

}  // namespace xsa

cudaError_t xsa_attention_fwd(const XsaAttentionParams& p, cudaStream_t stream) {
    using namespace xsa;
    CUtensorMap map_q, map_k, map_v;
    cudaError_t status = tile_map(&map_q, p.q, p.q_heads, p.tokens, p.batch);
    if (status == cudaSuccess) status = tile_map(&map_k, p.k, p.kv_heads, p.tokens, p.batch);
    if (status == cudaSuccess) status = tile_map(&map_v, p.v, p.kv_heads, p.tokens, p.batch);
    if (status == cudaSuccess && p.cu_seqlens != nullptr) status = xsa_attention_plan(p.cu_seqlens, p.documents, p.queries, true, stream);
    constexpr int kShared = 1024 + (kConsumers + 2 * kStages) * kTileBytes;
    if (status == cudaSuccess) status = allow_shared(reinterpret_cast<const void*>(xsa_attention_fwd_kernel), kShared);
    if (status != cudaSuccess) return status;
    xsa_attention_fwd_kernel<<<query_grid(p), kQueryThreads, kShared, stream>>>(map_q, map_k, map_v, p);
    return cudaGetLastError();
}

}  // namespace pgolf
