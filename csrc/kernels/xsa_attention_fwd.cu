#include "kernels/xsa_attention.cuh"

namespace pgolf {
namespace xsa {

// The sums of the output's product: 64 columns of values, then 8 of ones, whose sums are those of a row's probabilities as the product
// rounds them. Divided by these, a row's weights add up to 1, and a token that sees only itself gets exactly its value: there is no
// maximum whose probability would be a power of 2. The backward needs the sum of what was not rounded: no row's P may be off as a whole.
constexpr int kSums = 36, kRowSum = 32;  // registers; row sum of this thread's row r: kRowSum + 2 r
constexpr int kOnesBytes = 16 * 128;     // 16 rows as long as those of a tile
constexpr int kWalks = 3;                // over a block's keys, with barriers of their own; nearly always the first is the only one

// The values' descriptor, moved on by `bytes`, and with it the place of the ones, which stays where it is.
__device__ __forceinline__ uint64_t values_at(uint64_t values, uint32_t bytes) {
    const uint32_t low = uint32_t(values) + (bytes >> 4) - (bytes >> 4 << 16);
    return (values & 0xffffffff00000000) | low;
}

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

// Scores in powers of 2 to unnormalised probabilities, in place, and the sums of this thread's columns.
__device__ __forceinline__ void exponentials(float (&s)[32], float (&sum)[2]) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        s[i] = ptx::exp2_approx(s[i]);
        s[i + 1] = ptx::exp2_approx(s[i + 1]);
        sum[i / 2 % 2] += s[i] + s[i + 1];
    }
}

__global__ __launch_bounds__(kQueryThreads, 2) void xsa_attention_fwd_kernel(const __grid_constant__ CUtensorMap map_q,
                                                                             const __grid_constant__ CUtensorMap map_k,
                                                                             const __grid_constant__ CUtensorMap map_v,
                                                                             const __grid_constant__ XsaAttentionParams p) {
    extern __shared__ uint8_t dynamic_shared[];
    __shared__ uint64_t s_bars[kWalks][2 * kStages], s_rows_full;
    __shared__ Sequence s_seq;
    uint8_t* s_q = align_tiles(dynamic_shared);             // [kConsumers] tiles
    uint8_t* s_keys = s_q + kConsumers * kTileBytes;        // [kStages] of a key and a value tile
    uint8_t* s_ones = s_keys + 2 * kStages * kTileBytes;

    const Sequence seq = find_sequence(p.queries, p.tokens, p.batch, true, p.prefix);
    const int warpgroup = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
    if (seq.length == 0) {  // tokens after the last document
        const QueryTile mine = find_query_tile(p, seq.block, warpgroup);
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
    const int key_tiles = min(find_query_tile(p, seq.block, kConsumers - 1).tile + 1, seq.tiles());

    const QueryTile tile = find_query_tile(p, seq.block, warpgroup);
    KeyStream stream{ptx::kept(ptx::smem_u32(s_bars)), ptx::smem_u32(s_keys), &map_k, &map_v, uniform(seq.batch), uniform(tile.kv_head),
                     uniform(seq.start), uniform(key_tiles)};
    if (threadIdx.x == 0) {
        s_seq = seq;
        ptx::mbarrier_init(&s_rows_full, 1);
        stream.init();
        ptx::fence_mbarrier_init();
    }
    constexpr uint32_t kTwoOnes = 0x3f803f80;
    if (threadIdx.x < kOnesBytes / 16) reinterpret_cast<uint4*>(s_ones)[threadIdx.x] = make_uint4(kTwoOnes, kTwoOnes, kTwoOnes, kTwoOnes);
    ptx::fence_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&s_rows_full, kConsumers * kTileBytes);
        for (int w = 0; w < kConsumers; ++w) {
            const QueryTile q = find_query_tile(p, seq.block, w);
            // May begin before the first query: the copy engine fills what does not exist with zeros.
            ptx::tma_load_4d(s_q + w * kTileBytes, &map_q, &s_rows_full, 0, q.head, seq.start + q.tile * kTile - p.prefix, seq.batch);
        }
        stream.load_first();
    }

    const int warp = threadIdx.x / 32 % 4, row = 16 * warp + lane / 4;
    const bool leads = lane == 0, refills = uniform(threadIdx.x / 32) == 0;
    const float scale_log2 = p.scale * kLog2e;
    // NOTE: a tile wholly past the sequence's end runs along, so that every stage is released, and stores nothing.
    const unsigned last = uniform(min(tile.tile, key_tiles - 1));

    float o[kSums], s[32], sum[2] = {};
    float shift[2] = {};  // what scores lose, in powers of 2, of this thread's rows (lane / 4, + 8)
    const uint64_t q = wgmma::descriptor(s_q + warpgroup * kTileBytes), keys = wgmma::descriptor(s_keys);
    const uint64_t values = wgmma::descriptor_mn_major(s_keys + kTileBytes, s_ones - s_keys - kTileBytes);
    ptx::mbarrier_wait(&s_rows_full, 0);
    auto start_scores = [&](unsigned j) {
        stream.wait(j);
        begin_products();
        product_abt(s, q, wgmma::advance(keys, j % kStages * 2 * kTileBytes));
        wgmma::commit();
    };
    auto start_output = [&](const uint32_t (&probabilities)[16], unsigned j, bool accumulate) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            wgmma::mma<wgmma::kMajorMN>(o, probabilities[4 * k], probabilities[4 * k + 1], probabilities[4 * k + 2],
                                        probabilities[4 * k + 3], values_at(values, j % kStages * 2 * kTileBytes + 2048 * k),
                                        k > 0 || accumulate);
        wgmma::commit();
    };
    bool is_shifted = false;
    // Scores to powers of 2. A scale of ln 2 leaves nothing to do, and the step's scores have it (fused_blocks.py).
    auto to_powers = [&] {
        if (!is_shifted && scale_log2 == 1.0f) return;
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i] = fmaf(s[i], scale_log2, -shift[i / 2 % 2]);
    };

    auto begin_another_walk = [&] {
        stream.bars += KeyStream::kBarBytes;
        if (threadIdx.x == 0) {
            stream.init();
            ptx::fence_mbarrier_init();
        }
        __syncthreads();
        if (threadIdx.x == 0) stream.load_first();
        __syncwarp();
    };

    while (true) {
        start_scores(0);
        wgmma::wait<0>();
        wgmma::pin(s);
        for (unsigned round = 0; kStages * round < last; ++round) {
#pragma unroll
            for (unsigned u = 0; u < kStages; ++u) {
                const unsigned j = kStages * round + u;
                const bool is_first = u == 0 && round == 0;
                if (refills && (u >= 2 || round > 0)) stream.refill(j);
                to_powers();
                exponentials(s, sum);
                uint32_t probabilities[16];
                wgmma::wait<0>();
                wgmma::pin(o);
                if (leads && !is_first) stream.release(j - 1);
                pack(probabilities, s);
                start_scores(j + 1);
                start_output(probabilities, j, !is_first);
                wgmma::wait<1>();
                wgmma::pin(s);
                if (j + 1 == last) break;
            }
        }
        mask_diagonal(s, row, lane);
        to_powers();
        exponentials(s, sum);
        uint32_t probabilities[16];
        wgmma::wait<0>();
        wgmma::pin(o);
        pack(probabilities, s);
        begin_products();
        start_output(probabilities, last, last > 0);
        wgmma::wait<0>();
        wgmma::pin(o);
        sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
        auto is_in_range = [](float x) { return x > 1.0f / kUnshiftedSum && x < kUnshiftedSum; };
        if (is_shifted || !__syncthreads_or(!(is_in_range(sum[0]) && is_in_range(sum[1])))) break;
        // Sums that are too large or too small: a walk for the rows' maxima, and one more with these for shifts.
        is_shifted = true;
        shift[0] = shift[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
        begin_another_walk();
#pragma unroll 1
        for (unsigned j = 0; j <= last; ++j) {
            if (refills && j >= 2) stream.refill(j);
            start_scores(j);
            wgmma::wait<0>();
            wgmma::pin(s);
            if (j == last) mask_diagonal(s, row, lane);
            float top[2];
            row_maxima(top, s);
#pragma unroll
            for (int r = 0; r < 2; ++r) shift[r] = fmaxf(shift[r], top[r] * scale_log2);
            if (leads) stream.release(j);
        }
        begin_another_walk();
    }

    const QueryTile mine = find_query_tile(p, s_seq.block, warpgroup);
    // The last tile of keys is the diagonal one: its values are this tile's own.
    const uint8_t* own_values = s_keys + (last % kStages * 2 + 1) * kTileBytes;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float normalise = __fdividef(1.0f, o[kRowSum + 2 * r]);
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
            own = __fdividef(quad_sum(dot) * normalise, fmaxf(quad_sum(square), kXsaLeastSquare));
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
            p.lse[at_row] = shift[r] * kLn2 + __logf(sum[r]);
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
    constexpr int kShared = 1024 + (kConsumers + 2 * kStages) * kTileBytes + kOnesBytes;
    if (status == cudaSuccess) status = allow_shared(reinterpret_cast<const void*>(xsa_attention_fwd_kernel), kShared);
    if (status != cudaSuccess) return status;
    xsa_attention_fwd_kernel<<<query_grid(p), kQueryThreads, kShared, stream>>>(map_q, map_k, map_v, p);
    return cudaGetLastError();
}

}  // namespace pgolf
