// C[M, N] = A B, bf16 operands, fp32 accumulation: the matrix engine behind the fused layers.
//
// Persistent clusters of two CTAs. A CTA computes 128 x kBlockN of C with two consumer warpgroups (64 rows
// each), a warp that loads and two that move results; the two CTAs of a cluster hold the same columns of C, so each
// loads half of the B tile and multicasts it to both:
//
//              columns n0 .. n0 + kBlockN - 1
//     CTA 0    [ warpgroup 0: 64 rows ]     A: own 128 rows, 64 k per stage
//              [ warpgroup 1: 64 rows ]     B: kBlockN columns, half from each CTA
//     CTA 1    [ the next 128 rows    ]     staging for C (and the auxiliary tile)
//
// Four stages, the most that fit: a stage is consumed in 512 clocks (128 columns) or 1024 (256), and one is still being read when the
// next is.
// The result of one tile is computed, staged and stored under the products of the next, in passes of 64 columns; the auxiliary columns of a
// pass come into the same staging area before. There are as many areas as fit, used in turn: while one is written, the other is on its way
// out and in. 256 columns, which read the least for a product, leave no registers for two accumulators: they are rounded between two
// tiles. A tile of 128 columns is one pass, for results that take long to compute, and has two accumulators.
// Any M; K and N multiples of 8: the copy engine reads zeros outside and clips stores. A K shorter than the k blocks under which a result
// is staged is as long as they are, with zeros: 512 for most Ops (kLeastKBlocks).
//
// What varies is the Op:
//     kBlockN                     128 or 256
//     kAMajor, kBMajor            kMajorK: A is [M, K], B is [N, K]; kMajorMN: A is [K, M], B is [K, N]
//     kTransformA, operand_a()    bf16 pairs of A on their way to the tensor cores (then A passes through registers)
//     kHasAux, result()           two rounded accumulators of a row and the auxiliary elements at the same place to the stored values
//     fetch(), finish()           what a thread reads for its two rows of a tile, under the products of that tile (loads only: what is
//                                 made of them there would wait for them), and what it then does with its rounded accumulators of
//                                 each 64 columns before they are staged
//     kPassKBlocks                k blocks of the next tile's products under which a pass is staged: all that its steps and copies take,
//                                 at least kStageSteps
//     kSideBlocks, side_column(), column blocks of a further matrix (Side) that come with each pass of a tile, and from where; kSideStored:
//     kSideStored, stage()        others go with the result. stage() turns all into what is stored, in kStageSteps steps, in place of
//                                 result(); with 128 columns of accumulators that have not been rounded
//     kRowSums                    result() adds to a sum per row and column tile, which is stored in Arguments::row_sums [column tiles, m]
//     kOutput                     kStoreBf16, or kAddFp32 / kAddFp32Transposed: C is float32 and is added to. The k of all
//                                 tiles is then cut into one equal share per cluster, so that a few tiles with a long K
//                                 (a weight gradient) keep every multiprocessor busy; the order of the additions varies.
#pragma once
#include <type_traits>

#include "kernels/common/launch.h"
#include "kernels/common/tensor_map.h"
#include "kernels/common/wgmma.cuh"

namespace pgolf::gemm {

constexpr int kBlockM = 128, kBlockK = 64;
constexpr int kCluster = 2;
constexpr int kConsumers = 2;                       // warpgroups
constexpr int kThreads = 128 * (kConsumers + 1);    // the last warpgroup produces
constexpr int kStages = 4;
constexpr int kColumnBlock = 64;                    // columns of one swizzled row of 128 bytes
constexpr int kStagingBlockBytes = 64 * 128;        // 64 rows of one column block
constexpr int kMaxStagingAreas = 2;
constexpr int kEndKBlocks = 8;                      // as many as take the time in which a tile's sums are added to memory

struct Barriers {
    uint64_t full[kStages], empty[kStages];
    // Of each staging area of each warpgroup: it may be written to; it may be stored.
    uint64_t ready[kConsumers][kMaxStagingAreas], staged[kConsumers][kMaxStagingAreas];
};
constexpr int kBarrierBytes = 256;
static_assert(sizeof(Barriers) <= kBarrierBytes);

enum Output { kStoreBf16, kAddFp32, kAddFp32Transposed };

template <class Op>
struct Layout {
    static_assert(Op::kBlockN == 128 || Op::kBlockN == 256, "tile widths that fit");
    static constexpr int kColumnBlocks = Op::kBlockN / kColumnBlock;
    static constexpr int kStageABytes = kBlockM * kBlockK * 2;
    static constexpr int kStageBytes = kStageABytes + Op::kBlockN * kBlockK * 2;
    static constexpr bool kStaged = Op::kOutput == kStoreBf16;
    static constexpr bool kHeldRounded = Op::kBlockN == 256;
    static_assert(!kStaged || kHeldRounded || !Op::kTransformA, "no registers left for it");
    static_assert(!kStaged || kHeldRounded || Op::kSideBlocks > 0, "result() and finish() take rounded accumulators");
    static_assert(kStaged || !(Op::kHasAux || Op::kRowSums || Op::kSideBlocks > 0), "only what is staged goes through result() or stage()");
    static constexpr bool kAuxStaged = kStaged && Op::kHasAux;
    static_assert(Op::kSideBlocks == 0 || (kAuxStaged && !Op::kRowSums), "side blocks come with the auxiliary tile, and without row sums");
    static_assert(!Op::kSideStored || Op::kSideBlocks > 0);
    static constexpr int kPassBlocks = !kStaged ? 0 : Op::kBlockN == 128 ? 2 : 1;  // column blocks staged at a time, per warpgroup
    static constexpr int kPasses = kStaged ? kColumnBlocks / kPassBlocks : 0;
    // Under the last of a pass's k blocks, a part of the result each.
    static constexpr int kStageSteps = Op::kBlockN == 128 ? 7 : 2;
    static_assert(!kStaged || Op::kPassKBlocks >= kStageSteps, "consumers would wait for k blocks that nobody loads");
    // A shorter K is padded with the copy engine's zeros.
    static constexpr int kLeastKBlocks = kStaged ? kPasses * Op::kPassKBlocks : 1;
    static constexpr int kStagedBlocks = kPassBlocks + Op::kSideBlocks;
    static constexpr int kStoredBlocks = kPassBlocks + (Op::kSideStored ? Op::kSideBlocks : 0);
    static constexpr int kStagingAreas = Op::kBlockN == 128 || Op::kSideBlocks == 0 ? kMaxStagingAreas : 1;
    static constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
    static_assert(kConsumers * kConsumerRegisters + kProducerRegisters == (kConsumers + 1) * 168, "what the threads start with");
    static constexpr int kGroupStagingBytes = kStagedBlocks * kStagingBlockBytes;  // of a warpgroup's area
    static constexpr int kStagingBytes = kStagingAreas * kConsumers * kGroupStagingBytes;
    static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kStagingBytes + kBarrierBytes;  // 1024: to align the stages
    static_assert(kSharedBytes <= 227 * 1024, "the most that a CTA can have");
};

struct Maps {
    CUtensorMap a, b, c, aux, side_in, side_out;
    float* c_fp32;  // where the output is added to, contiguous rows
};

struct Shape {
    int m, n, k;
};

// What an Op inherits and replaces where it does more.
struct PlainOp {
    static constexpr bool kTransformA = false, kHasAux = false, kRowSums = false;
    static constexpr int kPassKBlocks = 2, kSideBlocks = 0;
    static constexpr bool kSideStored = false;
    static __device__ __forceinline__ int side_column(int, int) { return 0; }
    struct Arguments {};
    struct Fetched {};
    template <class Arguments>
    static __device__ __forceinline__ Fetched fetch(const Arguments&, int, int, int) {
        return {};
    }
    // `column`: the first of the 64. pairs[2 j + r]: row `row + 8 r`, columns `column + 8 j + 2 (lane % 4)` and the next.
    template <class Arguments, class Fetched>
    static __device__ __forceinline__ void finish(const Arguments&, const Fetched&, uint32_t (&)[16], int row, int column, int m) {}
    // `r`: which of the thread's rows.
    template <class Arguments, class Fetched>
    static __device__ __forceinline__ uint32_t result(const Arguments&, const Fetched&, int r, float low, float high, uint32_t aux,
                                                      float& row_sum) {
        return ptx::pack_bf16(low, high);
    }
};

// A tile of the cluster pair, and the k blocks of it to sum.
struct Work {
    int m0, n0, k_begin, k_end;
};

// The works of one cluster, in order.
//
// Stored outputs: whole tiles in turn; neighbours in n come first, they share their rows of A in the L2.
// Added outputs: clusters / tiles clusters take an equal range of k each on every tile, all tiles at once, so that the L2
// serves what several tiles read of the same k. The k left over at the end is shared out among the clusters left over, less of it
// than an equal share: they end several tiles each, where the others end one.
// (Cut evenly in one line, tiles x k would put different tiles at different k, and everything would be read from memory.)
template <class Op>
struct Schedule {
    int tiles_n, k_blocks, pairs;
    int k_first;            // where this cluster's k of each tile begins
    int64_t position, end;  // whole tiles, or k blocks counted through the tiles from k_first on

    __device__ __forceinline__ explicit Schedule(const Shape& shape) {
        tiles_n = (shape.n + Op::kBlockN - 1) / Op::kBlockN;
        k_blocks = max((shape.k + kBlockK - 1) / kBlockK, Layout<Op>::kLeastKBlocks);
        pairs = (shape.m + kCluster * kBlockM - 1) / (kCluster * kBlockM) * tiles_n;
        k_first = 0;
        const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
        if constexpr (Layout<Op>::kStaged) {
            position = cluster, end = pairs;
        } else {
            const int ranges = clusters / pairs, mine = cluster / pairs, left = clusters - ranges * pairs;
            const int more_ends = left > 0 ? pairs - left : 0;
            const int share = int((int64_t(pairs) * k_blocks + more_ends * kEndKBlocks + clusters - 1) / clusters);
            k_first = min(k_blocks, min(mine, ranges) * share);
            if (mine < ranges) {  // one range of one tile
                const int k_stop = left == 0 && mine == ranges - 1 ? k_blocks : min(k_blocks, k_first + share);
                position = int64_t(cluster % pairs) * (k_blocks - k_first);
                end = position + k_stop - k_first;
            } else {
                const int64_t total = int64_t(pairs) * (k_blocks - k_first);
                const int index = cluster - ranges * pairs;
                position = total * index / left, end = total * (index + 1) / left;
            }
        }
    }
    __device__ __forceinline__ bool next(Work& work) {
        if (position >= end) return false;
        int pair;
        if constexpr (Layout<Op>::kStaged) {
            pair = int(position), work.k_begin = 0, work.k_end = k_blocks;
            position += gridDim.x / kCluster;
        } else {
            const int span = k_blocks - k_first;
            pair = int(position / span), work.k_begin = k_first + int(position % span);
            work.k_end = int(min(int64_t(k_blocks), work.k_begin + end - position));
            position += work.k_end - work.k_begin;
        }
        work.m0 = (pair / tiles_n * kCluster + ptx::cluster_rank()) * kBlockM;
        work.n0 = pair % tiles_n * Op::kBlockN;
        return true;
    }
};

// Position in a ring of stages.
template <int kLength>
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == kLength) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// First column of a staged block of a tile's pass: of the tile itself, or of the side blocks after it.
template <class Op>
__device__ __forceinline__ int staged_column(const Work& tile, int pass, int block) {
    constexpr int kOwn = Layout<Op>::kPassBlocks;
    return block < kOwn ? tile.n0 + (pass * kOwn + block) * kColumnBlock : Op::side_column(tile.n0, pass) + (block - kOwn) * kColumnBlock;
}

template <class Op>
__device__ __forceinline__ void produce(const Maps& maps, const Shape& shape, uint8_t* stages, Barriers& bars) {
    using L = Layout<Op>;
    constexpr int kBlockN = Op::kBlockN;
    const uint32_t rank = ptx::cluster_rank();
    Schedule<Op> schedule(shape);
    Work work;
    Ring<kStages> ring;

    while (schedule.next(work)) {
        const int m0 = work.m0, n0 = work.n0;
        for (int kb = work.k_begin; kb < work.k_end; ++kb, ring.next()) {
            ptx::mbarrier_wait(&bars.empty[ring.stage], ring.phase ^ 1);
            ptx::mbarrier_arrive_expect(&bars.full[ring.stage], L::kStageBytes);
            uint8_t* stage_a = stages + ring.stage * L::kStageBytes;
            uint8_t* stage_b = stage_a + L::kStageABytes;
            if constexpr (Op::kAMajor == wgmma::kMajorK) {
                ptx::tma_load_2d(stage_a, &maps.a, &bars.full[ring.stage], kb * kBlockK, m0);
            } else {
#pragma unroll
                for (int block = 0; block < kConsumers; ++block)
                    ptx::tma_load_2d(stage_a + block * kBlockK * 128, &maps.a, &bars.full[ring.stage], m0 + block * kColumnBlock,
                                     kb * kBlockK);
            }
            if constexpr (Op::kBMajor == wgmma::kMajorK) {
                const int half = kBlockN / kCluster;
                ptx::tma_load_2d_multicast(stage_b + rank * half * 128, &maps.b, &bars.full[ring.stage], kb * kBlockK, n0 + rank * half, 3);
            } else {
                const int half = kBlockK / kCluster;  // of the k of every column block
#pragma unroll
                for (int block = 0; block < L::kColumnBlocks; ++block)
                    ptx::tma_load_2d_multicast(stage_b + (block * kBlockK + rank * half) * 128, &maps.b, &bars.full[ring.stage],
                                               n0 + block * kColumnBlock, kb * kBlockK + rank * half, 3);
            }
        }
    }
}

// The passes of one cluster's tiles, in order.
template <class Op>
struct Passes {
    Schedule<Op> schedule;
    Work work;
    int pass = Layout<Op>::kPasses - 1;
    __device__ __forceinline__ bool next() {
        if (++pass < Layout<Op>::kPasses) return true;
        pass = 0;
        return schedule.next(work);
    }
};

// Staging areas of one warpgroup: auxiliary blocks in, results out. One thread, so that nobody else waits for the copies.
template <class Op>
__device__ __forceinline__ void move_results(const Maps& maps, const Shape& shape, uint8_t* staging, Barriers& bars, int group) {
    using L = Layout<Op>;
    staging += group * L::kStagingAreas * L::kGroupStagingBytes;
    Passes<Op> coming{Schedule<Op>(shape)}, going{Schedule<Op>(shape)};
    auto make_ready = [&](int area) {
        if (!coming.next()) return;
        uint64_t* ready = &bars.ready[group][area];
        if constexpr (L::kAuxStaged) {
            ptx::mbarrier_arrive_expect(ready, L::kGroupStagingBytes);
#pragma unroll
            for (int block = 0; block < L::kStagedBlocks; ++block)
                ptx::tma_load_2d(staging + area * L::kGroupStagingBytes + block * kStagingBlockBytes,
                                 block < L::kPassBlocks ? &maps.aux : &maps.side_in, ready,
                                 staged_column<Op>(coming.work, coming.pass, block), coming.work.m0 + group * 64);
        } else {
            ptx::mbarrier_arrive(ready);
        }
    };
    Ring<L::kStagingAreas> areas;
    for (int area = 0; area < L::kStagingAreas; ++area) make_ready(area);
    for (; going.next(); areas.next()) {
        ptx::mbarrier_wait(&bars.staged[group][areas.stage], areas.phase);
#pragma unroll
        for (int block = 0; block < L::kStoredBlocks; ++block)
            ptx::tma_store_2d(block < L::kPassBlocks ? &maps.c : &maps.side_out,
                              staging + areas.stage * L::kGroupStagingBytes + block * kStagingBlockBytes,
                              staged_column<Op>(going.work, going.pass, block), going.work.m0 + group * 64);
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
        make_ready(areas.stage);
    }
    ptx::bulk_wait<0>();
}

// Adds a warpgroup's accumulators to float32 C. `row`, `column`: of this thread's first element.
template <class Op, int kCount>
__device__ __forceinline__ void add_fp32(const float (&acc)[kCount], float* c, int row, int column, const Shape& shape) {
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) {
        const int m = row + j % 2 * 8, n = column + j / 2 * 8;
        if (m >= shape.m || n >= shape.n) continue;  // n is even and so is shape.n
        if constexpr (Op::kOutput == kAddFp32) {
            ptx::global_add(c + int64_t(m) * shape.n + n, acc[2 * j], acc[2 * j + 1]);
        } else {
            atomicAdd(c + int64_t(n) * shape.m + m, acc[2 * j]);
            atomicAdd(c + int64_t(n + 1) * shape.m + m, acc[2 * j + 1]);
        }
    }
}

// One consumer warpgroup: 64 rows of the CTA's tile.
template <class Op>
struct Consumer {
    using L = Layout<Op>;
    static constexpr int kAccumulators = Op::kBlockN / 2;
    static constexpr int kChunks = L::kPassBlocks * 4;  // 16 columns each, of one pass

    const Maps& maps;
    const Shape& shape;
    const typename Op::Arguments& arguments;
    uint8_t* stages;
    uint8_t* staging;  // this warpgroup's areas
    Barriers& bars;
    const int group, warp, lane;
    const uint32_t lane_row, lane_chunk;  // row and 16-byte column chunk that this lane addresses in a 16 x 16 block
    Ring<kStages> ring;
    int unreleased = -1;  // the stage that the newest product but one reads
    float row_sums[2] = {};
    Ring<L::kStagingAreas> areas;

    // `group` is broadcast, so that the compiler keeps descriptors in uniform registers.
    __device__ __forceinline__ Consumer(const Maps& maps, const Shape& shape, const typename Op::Arguments& arguments, uint8_t* stages,
                                        uint8_t* staging, Barriers& bars)
        : maps(maps), shape(shape), arguments(arguments), stages(stages), bars(bars), group(__shfl_sync(0xffffffffu, threadIdx.x / 128, 0)),
          warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32), lane_row(warp * 16 + (lane / 8 % 2) * 8 + lane % 8), lane_chunk(lane / 16) {
        this->staging = staging + group * L::kStagingAreas * L::kGroupStagingBytes;
    }

    // Gives a stage whose products are done back to both producers.
    __device__ __forceinline__ void release() {
        if (unreleased >= 0 && lane == 0) {
            ptx::mbarrier_arrive(&bars.empty[unreleased]);
            ptx::mbarrier_arrive_cluster(&bars.empty[unreleased], ptx::cluster_rank() ^ 1);
        }
    }

    // Issues the products of the next stage. `a` is where A passes through registers: half of a stage, while products read the other.
    using OperandA = uint32_t[2][2][4];
    __device__ __forceinline__ void multiply(float (&acc)[kAccumulators], OperandA& a, bool accumulate) {
        ptx::mbarrier_wait(&bars.full[ring.stage], ring.phase);
        uint8_t* stage_a = stages + ring.stage * L::kStageBytes + group * 64 * 128;  // 64 rows of m, or 64 k of this group's 64 m
        uint8_t* stage_b = stages + ring.stage * L::kStageBytes + L::kStageABytes;
        const uint64_t b = Op::kBMajor == wgmma::kMajorK ? wgmma::descriptor(stage_b) : wgmma::descriptor_mn_major(stage_b, kBlockK * 128);
        constexpr uint32_t kAStep = Op::kAMajor == wgmma::kMajorK ? 32 : 16 * 128;
        constexpr uint32_t kBStep = Op::kBMajor == wgmma::kMajorK ? 32 : 16 * 128;
        if constexpr (Op::kTransformA) {
            const uint32_t base = ptx::smem_u32(stage_a);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    const int i = 2 * half + step;
                    uint32_t(&to)[4] = a[half][step];
                    if constexpr (Op::kAMajor == wgmma::kMajorK)
                        ptx::ldmatrix_x4(base + wgmma::swizzled(lane_row, 2 * i + lane_chunk), to[0], to[1], to[2], to[3]);
                    else  // rows are k: 8 x 8 blocks in the order (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8)
                        ptx::ldmatrix_x4_transposed(base + wgmma::swizzled(16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2),
                                                    to[0], to[1], to[2], to[3]);
#pragma unroll
                    for (int r = 0; r < 4; ++r) to[r] = Op::operand_a(to[r]);
                }
                wgmma::fence();
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    const int i = 2 * half + step;
                    const uint32_t(&from)[4] = a[half][step];
                    wgmma::mma<Op::kBMajor>(acc, from[0], from[1], from[2], from[3], wgmma::advance(b, i * kBStep), accumulate || i > 0);
                }
                wgmma::commit();
                wgmma::wait<1>();
                if (half == 0) release();
            }
        } else {
            constexpr bool kIsKMajor = Op::kAMajor == wgmma::kMajorK;
            const uint64_t a = kIsKMajor ? wgmma::descriptor(stage_a) : wgmma::descriptor_mn_major(stage_a, kBlockK * 128);
            wgmma::fence();
#pragma unroll
            for (int i = 0; i < 4; ++i)
                wgmma::mma<Op::kAMajor, Op::kBMajor>(acc, wgmma::advance(a, i * kAStep), wgmma::advance(b, i * kBStep),
                                                     accumulate || i > 0);
            wgmma::commit();
            wgmma::wait<1>();
            release();
        }
        unreleased = ring.stage;
        ring.next();
    }

    // The staging area is free, or holds the auxiliary blocks.
    __device__ __forceinline__ void await_staging() {
        ptx::mbarrier_wait(&bars.ready[group][areas.stage], areas.phase);
    }
    __device__ __forceinline__ int row_of(const Work& work) const { return work.m0 + group * 64 + warp * 16 + lane / 4; }
    __device__ __forceinline__ typename Op::Fetched fetch(const Work& work) const {
        return Op::fetch(arguments, row_of(work), work.n0, shape.m);
    }
    // What is left of a finished tile under the products of the next: the accumulators, or pairs of them rounded.
    using Held = std::conditional_t<L::kHeldRounded, uint32_t[kAccumulators / 2], float[kAccumulators]>;

    __device__ __forceinline__ void finish_pass(Held& held, int pass, const Work& work, const typename Op::Fetched& fetched) const {
        if constexpr (L::kHeldRounded)
            Op::finish(arguments, fetched, reinterpret_cast<uint32_t(&)[16]>(held[16 * pass]), row_of(work),
                       work.n0 + pass * kColumnBlock, shape.m);
    }

    // Result of a pass, into the staging area: step `step` of kStageSteps.
    __device__ __forceinline__ void stage_step(const Held& held, int pass, int step, const Work& work, typename Op::Fetched& fetched) {
        if constexpr (Op::kSideBlocks > 0) {
            const auto address = [&](int block, int i) { return chunk_address(4 * block + i); };
            Op::stage(arguments, fetched, held, pass, step, row_of(work), work.n0, shape.m, address);
        } else {
#pragma unroll
            for (int c = step * kChunks / L::kStageSteps; c < (step + 1) * kChunks / L::kStageSteps; ++c)
                stage_chunk(held, pass, c, fetched);
        }
    }
    __device__ __forceinline__ uint32_t chunk_address(int i) const {
        return ptx::smem_u32(staging) + areas.stage * L::kGroupStagingBytes + i / 4 * kStagingBlockBytes +
               wgmma::swizzled(lane_row, i % 4 * 2 + lane_chunk);
    }
    // Result of 16 columns.
    __device__ __forceinline__ void stage_chunk(const Held& held, int pass, int i, const typename Op::Fetched& fetched) {
        uint32_t aux[4] = {}, out[4];
        if constexpr (L::kAuxStaged) ptx::ldmatrix_x4(chunk_address(i), aux[0], aux[1], aux[2], aux[3]);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const uint32_t pair = held[4 * (pass * kChunks + i) + r];
            out[r] = Op::result(arguments, fetched, r % 2, ptx::low_bf16(pair), ptx::high_bf16(pair), aux[r], row_sums[r % 2]);
        }
        ptx::stmatrix_x4(chunk_address(i), out[0], out[1], out[2], out[3]);
    }
    __device__ __forceinline__ void store_row_sums(const Work& work) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = row_sums[r];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const int row = row_of(work) + 8 * r;
            if (lane % 4 == 0 && row < shape.m) arguments.row_sums[int64_t(work.n0 / Op::kBlockN) * shape.m + row] = sum;
            row_sums[r] = 0.f;
        }
    }
    // All of this pass is staged.
    __device__ __forceinline__ void give_staging(int pass, const Work& work) {
        if constexpr (Op::kRowSums)
            if (pass + 1 == L::kPasses && arguments.row_sums != nullptr) store_row_sums(work);
        ptx::fence_async_shared();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&bars.staged[group][areas.stage]);
        areas.next();
    }

    // All products of a tile, added to C.
    __device__ __forceinline__ void run_in_turn() {
        Schedule<Op> schedule(shape);
        Work work;
        while (schedule.next(work)) {
            float acc[kAccumulators];
            products(acc, work);
            drain(acc);
            add_fp32<Op>(acc, maps.c_fp32, work.m0 + group * 64 + warp * 16 + lane / 4, work.n0 + lane % 4 * 2, shape);
        }
    }

    __device__ __forceinline__ void products(float (&acc)[kAccumulators], const Work& work) {
        OperandA a;
        for (int i = work.k_begin; i < work.k_end; ++i) multiply(acc, a, i > work.k_begin);
    }
    __device__ __forceinline__ void drain(float (&acc)[kAccumulators]) {
        wgmma::wait<0>();
        wgmma::pin(acc);
        release();
        unreleased = -1;
    }
    // Products of `work` into `acc`; under them the result of the tile `before`, of which `held` is left. `fetched`: before's, then work's.
    __device__ __forceinline__ void overlapped_tile(float (&acc)[kAccumulators], const Work& work, Held& held, const Work& before,
                                                    typename Op::Fetched& fetched) {
        OperandA a;
        typename Op::Fetched coming;
        int done = 0;  // k blocks
        const auto next_products = [&] {
            multiply(acc, a, done > 0);
            if constexpr (!L::kHeldRounded)
                if (done == 0) wgmma::pin(held);  // its last product is done: the wait was for all but the newest
            ++done;
        };
#pragma unroll
        for (int pass = 0; pass < L::kPasses; ++pass) {
#pragma unroll
            for (int i = 0; i < Op::kPassKBlocks - L::kStageSteps; ++i) next_products();
#pragma unroll
            for (int step = 0; step < L::kStageSteps; ++step) {
                next_products();
                if (step == 0) {
                    await_staging();
                    finish_pass(held, pass, before, fetched);
                }
                stage_step(held, pass, step, before, fetched);
            }
            give_staging(pass, before);
            if (pass == (L::kPasses > 1 ? L::kPasses - 2 : 0)) coming = fetch(work);  // some k blocks before they are used
        }
        fetched = coming;
        for (; done < work.k_end; ++done) multiply(acc, a, true);
    }
    __device__ __forceinline__ void last_result(Held& held, const Work& work, typename Op::Fetched& fetched) {
        if constexpr (!L::kHeldRounded) drain(held);
#pragma unroll
        for (int pass = 0; pass < L::kPasses; ++pass) {
            finish_pass(held, pass, work, fetched);
            await_staging();
#pragma unroll
            for (int step = 0; step < L::kStageSteps; ++step) stage_step(held, pass, step, work, fetched);
            give_staging(pass, work);
        }
    }
    // Two accumulators in turn.
    __device__ __forceinline__ void run_alternating() {
        Schedule<Op> schedule(shape);
        float even[kAccumulators], odd[kAccumulators];
        Work work, before;
        if (!schedule.next(work)) return;
        typename Op::Fetched fetched = fetch(work);
        products(even, work);
        while (true) {
            before = work;
            if (!schedule.next(work)) return last_result(even, before, fetched);
            overlapped_tile(odd, work, even, before, fetched);
            before = work;
            if (!schedule.next(work)) return last_result(odd, before, fetched);
            overlapped_tile(even, work, odd, before, fetched);
        }
    }
    // One accumulator, rounded between two tiles.
    __device__ __forceinline__ void run_rounding() {
        Schedule<Op> schedule(shape);
        float acc[kAccumulators];
        uint32_t held[kAccumulators / 2];
        Work work, before;
        if (!schedule.next(work)) return;
        typename Op::Fetched fetched = fetch(work);
        products(acc, work);
        while (true) {
            drain(acc);
#pragma unroll
            for (int i = 0; i < kAccumulators / 2; ++i) held[i] = ptx::pack_bf16(acc[2 * i], acc[2 * i + 1]);
            before = work;
            if (!schedule.next(work)) return last_result(held, before, fetched);
            overlapped_tile(acc, work, held, before, fetched);
        }
    }

    __device__ __forceinline__ void run() {
        if constexpr (!L::kStaged)
            run_in_turn();
        else if constexpr (L::kHeldRounded)
            run_rounding();
        else
            run_alternating();
    }
};

template <class Op>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ Maps maps, const Shape shape, const __grid_constant__ typename Op::Arguments arguments) {
    extern __shared__ uint8_t raw[];
    // NOTE: 1024-aligned in the shared window, which is the same in both CTAs of the cluster.
    uint8_t* stages = raw + (1024 - ptx::smem_u32(raw) % 1024) % 1024;
    uint8_t* staging = stages + kStages * Layout<Op>::kStageBytes;
    Barriers& bars = *reinterpret_cast<Barriers*>(staging + Layout<Op>::kStagingBytes);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(&bars.full[s], 1);
            ptx::mbarrier_init(&bars.empty[s], kCluster * kConsumers * 4);  // every consumer warp of both CTAs
        }
        for (int i = 0; i < kConsumers * kMaxStagingAreas; ++i) {
            ptx::mbarrier_init(&bars.ready[0][i], 1);
            ptx::mbarrier_init(&bars.staged[0][i], 4);  // the warps of the group
        }
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();
    if (threadIdx.x >= kConsumers * 128) {
        ptx::registers_decrease<Layout<Op>::kProducerRegisters>();
        const int warp = threadIdx.x / 32 - kConsumers * 4;  // the first feeds the stages, the next ones move results
        if (warp <= kConsumers && ptx::elect_one()) {
            if (warp == 0)
                produce<Op>(maps, shape, stages, bars);
            else if constexpr (Layout<Op>::kStaged)
                move_results<Op>(maps, shape, staging, bars, warp - 1);
        }
    } else {
        ptx::registers_increase<Layout<Op>::kConsumerRegisters>();
        Consumer<Op>(maps, shape, arguments, stages, staging, bars).run();
    }
    // A CTA stays while its neighbour may still write into it or signal it.
    ptx::cluster_sync();
}

// A further matrix whose blocks come with the tiles, and one whose blocks go with them.
struct Side {
    const void* in;
    void* out;
    int columns;
    int64_t in_stride, out_stride;  // elements from row to row
};

// A, B as their majors say; C [m, n] bf16, or float32 [m, n] or [n, m] that is added to; aux [m, n]; all with contiguous rows. n > 0, and
// k > 0 where C is stored.
template <class Op>
cudaError_t launch(const void* a, const void* b, void* c, const void* aux, const Shape& shape, cudaStream_t stream,
                   const typename Op::Arguments& arguments = {}, const Side& side = {}) {
    if (shape.m == 0 || shape.k == 0) return cudaSuccess;
    constexpr int kSharedBytes = Layout<Op>::kSharedBytes;
    Maps maps{};
    maps.c_fp32 = static_cast<float*>(c);
    cudaError_t status = Op::kAMajor == wgmma::kMajorK ? bf16_matrix_map(&maps.a, a, shape.m, shape.k, shape.k, kBlockM)
                                                       : bf16_matrix_map(&maps.a, a, shape.k, shape.m, shape.m, kBlockK);
    if (status == cudaSuccess)
        status = Op::kBMajor == wgmma::kMajorK ? bf16_matrix_map(&maps.b, b, shape.n, shape.k, shape.k, Op::kBlockN / kCluster)
                                               : bf16_matrix_map(&maps.b, b, shape.k, shape.n, shape.n, kBlockK / kCluster);
    if (status == cudaSuccess && Layout<Op>::kStaged) status = bf16_matrix_map(&maps.c, c, shape.m, shape.n, shape.n, 64);
    if (status == cudaSuccess && Layout<Op>::kAuxStaged) status = bf16_matrix_map(&maps.aux, aux, shape.m, shape.n, shape.n, 64);
    if (Op::kSideBlocks > 0) {
        if (status == cudaSuccess) status = bf16_matrix_map(&maps.side_in, side.in, shape.m, side.columns, side.in_stride, 64);
        if (status == cudaSuccess && Op::kSideStored)
            status = bf16_matrix_map(&maps.side_out, side.out, shape.m, side.columns, side.out_stride, 64);
    }
    int sms = 0;
    if (status == cudaSuccess) status = multiprocessors(sms);
    if (status == cudaSuccess) status = cudaFuncSetAttribute(gemm_kernel<Op>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    int clusters = sms / kCluster;
    if (Layout<Op>::kStaged) {
        const int tiles_n = (shape.n + Op::kBlockN - 1) / Op::kBlockN;
        const int64_t pairs = int64_t((shape.m + kCluster * kBlockM - 1) / (kCluster * kBlockM)) * tiles_n;
        clusters = int(pairs < clusters ? pairs : clusters);
    }
    gemm_kernel<Op><<<kCluster * clusters, kThreads, kSharedBytes, stream>>>(maps, shape, arguments);
    return cudaGetLastError();
}

}  // namespace pgolf::gemm
