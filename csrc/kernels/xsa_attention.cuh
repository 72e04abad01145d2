// What the attention kernels share: 64 x 64 tiles in shared memory, products of tiles, and which tile a thread block works on.
#pragma once
#include "kernels/common/ptx.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/common/wgmma.cuh"
#include "kernels/xsa_attention.h"

namespace pgolf::xsa {

constexpr int kTile = kXsaTile;                          // rows and columns
constexpr int kTileBytes = kTile * kXsaHeadDim * 2;      // bf16, 128-byte rows, 128-byte swizzle
constexpr float kLog2e = 1.4426950408889634f;
// Powers of 2 up to which a row's log-sum-exp lets its exponentials and their sums be taken as they are: no maximum, no shift.
constexpr float kUnshifted = 80.0f, kUnshiftedSum = 0x1p80f;
constexpr float kLn2 = 0.6931471805599453f;

// ---- host ------------------------------------------------------------------------------------------

// One tile of 64 tokens of one head per box; coordinates (0, head, token, batch).
inline cudaError_t tile_map(CUtensorMap* map, const HeadRows& x, int heads, int tokens, int batch) {
    TensorMapDims dims{4,
                       {uint64_t(kXsaHeadDim), uint64_t(heads), uint64_t(tokens), uint64_t(batch)},
                       {uint64_t(x.head_stride) * 2, uint64_t(x.token_stride) * 2, uint64_t(x.batch_stride) * 2},
                       {kXsaHeadDim, 1, kTile, 1}};
    return make_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, x.data, dims);
}

inline cudaError_t allow_shared(const void* kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Tiles reach past a document's end into places that no token has: they must hold numbers. `rows` of two times `width` each.
inline cudaError_t clear_unused_stats(float* stats, int rows, int64_t width, int tokens, cudaStream_t stream) {
    if (width == tokens) return cudaSuccess;  // a dense batch that leaves no gap
    return cudaMemsetAsync(stats, 0, sizeof(float) * rows * 2 * width, stream);
}

// ---- which tokens ----------------------------------------------------------------------------------

// The same value in every lane of a warp, told to the compiler, which then keeps it and addresses made of it in uniform registers.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

struct Sequence {
    int batch, start, length;
    int block;     // index of this block's tokens in the sequence
    int document;  // 0 in a dense batch
    __device__ int tiles() const { return (length + kTile - 1) / kTile; }
};

// Rows of a dense batch whose blocks take turns, the longest of all of them first: the grid ends with short ones then, and the rows' keys
// still fit the L2 together. (A plan has long documents first.)
constexpr int kRowsTogether = 4;

// A dense batch's blocks of `blocks` for each head of each row, or a plan's entries for each head; find_sequence and find_head undo it.
inline dim3 grid_of(const XsaPlan& plan, int blocks, int heads, int batch) {
    if (plan.entries != nullptr) return dim3(plan.capacity - 1, heads, 1);
    return dim3(kRowsTogether * heads, blocks, (batch + kRowsTogether - 1) / kRowsTogether);
}
__device__ inline int find_head(const XsaPlan& plan) { return plan.entries != nullptr ? blockIdx.y : blockIdx.x / kRowsTogether; }

// Either grid is larger than what there is to do. A block without an entry gets length 0 and the index of a block of tokens after the
// last document, counted from `start`; one without a row gets length 0 and no token.
__device__ inline Sequence find_sequence(const XsaPlan& plan, int tokens, int batch, bool last_first, int prefix = 0) {
    if (plan.entries == nullptr) {
        const int row = blockIdx.z * kRowsTogether + blockIdx.x % kRowsTogether;
        if (row >= batch) return {0, tokens, 0, 0, 0};
        const int block = last_first ? gridDim.y - 1 - blockIdx.y : blockIdx.y;
        return {row, 0, tokens, prefix / plan.tokens_per_block + block, 0};
    }
    const int4 header = plan.entries[0];
    if (int(blockIdx.x) >= header.x) return {0, header.y, 0, int(blockIdx.x) - header.x, 0};
    const int4 entry = plan.entries[1 + blockIdx.x];
    return {0, entry.x, entry.y, entry.z, entry.w};
}

// Place of a sequence's first token in a row of stats. NOTE: a multiple of 4 whatever the start: the copy engine takes boxes whose
// first element is 16-byte aligned in memory and calls any other an illegal instruction.
__device__ inline int stats_place(int start, int document) { return start / 4 * 4 + 4 * document; }

// Head, tile and key head of one of the two warpgroups of a query block.
struct QueryTile {
    int head, kv_head, tile;
};
__device__ inline QueryTile find_query_tile(const XsaAttentionParams& p, int block, int warpgroup) {
    const int group = p.q_heads / p.kv_heads, head = find_head(p.queries);
    if (group % 2 == 0) return {2 * head + warpgroup, 2 * head / group, block};
    return {head, head / group, 2 * block + warpgroup};
}

__device__ inline float load_gate(const GateRows& gate, int batch, int token, int head) {
    const int64_t at = batch * gate.batch_stride + token * gate.token_stride + head * gate.head_stride;
    return gate.is_bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(gate.data)[at]) : static_cast<const float*>(gate.data)[at];
}

// What the backward does with a row's log-sum-exp. Its probabilities are 2^score times `factor`, which dy and delta take instead, so
// that no exponent needs a subtraction; a row out of that range has a factor of 1, and its exponents lose `shift`.
struct RowScale {
    float shift, factor;
    __device__ explicit RowScale(float lse) {
        const float powers = lse * kLog2e;
        const bool is_unshifted = fabsf(powers) <= kUnshifted;
        shift = is_unshifted ? 0.0f : powers;
        factor = is_unshifted ? ptx::exp2_approx(-powers) : 1.0f;
    }
};

// ---- products of tiles -----------------------------------------------------------------------------

using wgmma::swizzled;

// Before a product that reads registers which ordinary instructions wrote. NOTE: lanes that left a divergent branch or a
// barrier's wait at different times must be together again, or the product is an illegal instruction.
__device__ inline void begin_products() {
    __syncwarp();
    wgmma::fence();
}

// d = A B^T, both tiles [64 rows, 64] as they lie in memory.
// NOTE: into fresh registers. The old contents of d, though overwritten, would otherwise count as an input that ordinary
// instructions wrote while earlier products were in flight, and ptxas would run all products one at a time (warning C7515).
__device__ inline void product_abt(float (&d)[32], uint64_t a, uint64_t b) {
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma::mma(d, wgmma::advance(a, 32 * k), wgmma::advance(b, 32 * k), k > 0);
}
// d = A B, or d += A B, A in registers, the rows of B being the contracted dimension.
// NOTE: a first product that overwrites d, not one that adds to zeros: ptxas moves zeroing into the flight of earlier products
// and then runs all products of the kernel one at a time (warning C7515).
__device__ inline void product_ab(float (&d)[32], const uint32_t (&a)[16], uint64_t b, bool accumulate) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
        wgmma::mma<wgmma::kMajorMN>(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], wgmma::advance(b, 2048 * k),
                                    k > 0 || accumulate);
}

// Accumulator's first 64 columns to bf16 operand: neighbouring column groups pair up (wgmma.cuh).
template <int kCount>
__device__ __forceinline__ void pack(uint32_t (&a)[16], const float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) a[i] = ptx::pack_bf16(d[2 * i], d[2 * i + 1]);
}

// Scores of the tile on the diagonal: row `row` (of this thread's first; the other is 8 below) sees columns up to its own.
__device__ __forceinline__ void mask_diagonal(float (&s)[32], int row, int lane) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        if (column > row + 8 * (i / 2 % 2)) s[i] = -INFINITY;
    }
}

// Writes this warp's 16 rows of a fragment as bf16 into its rows of a tile, then hands each lane whole 16-byte chunks:
// store(row, chunk, value, i) with row = 16 warp + 4 i + lane / 8, chunk = lane % 8.
template <int kCount, class Store>
__device__ inline void store_rows(uint8_t* tile, const float (&d)[kCount], int warp, int lane, Store&& store) {
    uint32_t packed[16];
    pack(packed, d);
    const uint32_t base = ptx::smem_u32(tile);
#pragma unroll
    for (int k = 0; k < 4; ++k)
        ptx::stmatrix_x4(base + swizzled(16 * warp + lane % 16, 2 * k + lane / 16), packed[4 * k], packed[4 * k + 1], packed[4 * k + 2],
                         packed[4 * k + 3]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + 4 * i + lane / 8, chunk = lane % 8;
        store(row, chunk, *reinterpret_cast<const uint4*>(tile + swizzled(row, chunk)), i);
    }
}

__device__ inline uint4* row_chunk(const HeadRows& x, int batch, int token, int head, int chunk) {
    return reinterpret_cast<uint4*>(x.data + batch * x.batch_stride + int64_t(token) * x.token_stride + head * x.head_stride) + chunk;
}

// Sum over the four lanes that share a fragment row.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Two warpgroups; two such blocks fit a multiprocessor, and their four warpgroups take turns at the tensor cores and the
// exponential unit. NOTE: a warp of its own for the loads would be the fifth on one scheduler and cut every thread to 96 registers.
constexpr int kConsumers = 2;
constexpr int kQueryThreads = kConsumers * 128;
constexpr int kStages = 4;  // key and value tiles in flight

inline dim3 query_grid(const XsaAttentionParams& p) {
    const int per_block = p.queries.tokens_per_block, heads_per_block = per_block == kTile ? 2 : 1;
    return grid_of(p.queries, (p.tokens + per_block - 1) / per_block - p.prefix / per_block, p.q_heads / heads_per_block, p.batch);
}

// Key and value tiles of a query block, in order, through kStages stages. NOTE: without a warp of its own for the loads, warp 0
// refills a stage at the start of tile j; the stage is that of tile j - 2, which both warpgroups should have left by then.
// Walk over tiles as kStages * round + u, u unrolled: then stages are constants, and their addresses cost no instructions. A warp
// issues one in 3 to 4 clocks here, so each instruction of the loop is 0.6 us of a forward of 98,304 tokens.
struct KeyStream {
    uint32_t bars;   // shared addresses: kStages barriers of full stages, kStages of empty ones,
    uint32_t tiles;  // and the stages, each a key and a value tile
    const CUtensorMap *map_k, *map_v;
    int batch, kv_head, start, count;

    static constexpr uint32_t kBarBytes = 2 * kStages * sizeof(uint64_t);

    __device__ uint32_t full(unsigned j) const { return bars + 8 * (j % kStages); }
    __device__ uint32_t empty(unsigned j) const { return bars + 8 * (kStages + j % kStages); }
    // One thread.
    __device__ void init() const {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(full(i), 1);
            ptx::mbarrier_init(empty(i), kConsumers * 4);
        }
    }
    __device__ void load(unsigned j) const {
        const uint32_t keys = tiles + j % kStages * 2 * kTileBytes;
        ptx::mbarrier_arrive_expect(full(j), 2 * kTileBytes);
        ptx::tma_load_4d(keys, map_k, full(j), 0, kv_head, start + int(j) * kTile, batch);
        ptx::tma_load_4d(keys + kTileBytes, map_v, full(j), 0, kv_head, start + int(j) * kTile, batch);
    }
    __device__ void load_first() const {
        for (int j = 0; j < min(kStages, count); ++j) load(j);
    }
    // Warp 0, for j >= 2.
    __device__ void refill(unsigned j) const {
        if (int(j) - 2 + kStages >= count) return;
        ptx::mbarrier_wait(empty(j - 2), (j - 2) / kStages & 1);
        if (ptx::elect_one()) load(j - 2 + kStages);
    }
    // Every thread.
    __device__ void wait(unsigned j) const { ptx::mbarrier_wait(full(j), j / kStages & 1); }
    // One lane of each warp.
    __device__ void release(unsigned j) const { ptx::mbarrier_arrive(empty(j)); }
};

// Dynamic shared memory starts at 16 bytes; tiles need 1024.
__device__ inline uint8_t* align_tiles(uint8_t* shared) { return shared + (1024 - ptx::smem_u32(shared) % 1024) % 1024; }

}  // namespace pgolf::xsa
