// C[M, N] = A B, bf16 operands, fp32 accumulation: the matrix engine behind the fused layers.
//
// Persistent clusters of two CTAs. A CTA computes 128 x kBlockN of C with two consumer warpgroups (64 rows
// each) and one producer warp; the two CTAs of a cluster hold the same columns of C, so each loads half of the B
// tile and multicasts it to both:
//
//              columns n0 .. n0 + kBlockN - 1
//     CTA 0    [ warpgroup 0: 64 rows ]     A: own 128 rows, 64 k per stage
//              [ warpgroup 1: 64 rows ]     B: kBlockN columns, half from each CTA
//     CTA 1    [ the next 128 rows    ]     staging for C (and the auxiliary tile)
//
// Four stages: the copy engine answers after about 1700 clocks, a stage is consumed in 768 (192 columns) or 1024 (256),
// and one stage is still being read when the next is. With three, half of the tensor cores' time is waiting.
// The staging area lets the store of one tile run under the products of the next, and brings the auxiliary tile in
// under the products of its own. 192 columns leave room for staging the whole tile; 256 are staged in two passes.
// Any M; K and N multiples of 8: the copy engine reads zeros outside and clips stores.
//
// What varies is the Op:
//     kBlockN                     192 or 256
//     kAMajor, kBMajor            kMajorK: A is [M, K], B is [N, K]; kMajorMN: A is [K, M], B is [K, N]
//     kTransformA, operand_a()    bf16 pairs of A on their way to the tensor cores (then A passes through registers)
//     kHasAux, result()           the accumulator and the auxiliary element at the same place to the stored value
//     kOutput                     kStoreBf16, or kAddFp32 / kAddFp32Transposed: C is float32 and is added to. The k of all
//                                 tiles is then cut into one equal share per cluster, so that a few tiles with a long K
//                                 (a weight gradient) keep every multiprocessor busy; the order of the additions varies.
#pragma once
#include "kernels/common/tensor_map.h"
#include "kernels/common/wgmma.cuh"

namespace pgolf::gemm {

constexpr int kBlockM = 128, kBlockK = 64;
constexpr int kCluster = 2;
constexpr int kStages = 4;
constexpr int kConsumers = 2;                       // warpgroups
constexpr int kThreads = 128 * (kConsumers + 1);    // the last warpgroup produces
constexpr int kColumnBlock = 64;                    // columns of one swizzled row of 128 bytes
constexpr int kStagingBlockBytes = 64 * 128;        // 64 rows of one column block

enum Output { kStoreBf16, kAddFp32, kAddFp32Transposed };

template <class Op>
struct Layout {
    static_assert(Op::kBlockN == 192 || Op::kBlockN == 256, "tile widths that fit");
    static_assert(!Op::kHasAux || Op::kBlockN == 192, "the auxiliary tile is staged whole");
    static constexpr int kColumnBlocks = Op::kBlockN / kColumnBlock;
    static constexpr int kStageABytes = kBlockM * kBlockK * 2;
    static constexpr int kStageBytes = kStageABytes + Op::kBlockN * kBlockK * 2;
    static constexpr bool kStaged = Op::kOutput == kStoreBf16;
    static constexpr int kPasses = Op::kBlockN == 256 ? 2 : 1;
    static constexpr int kPassBlocks = kStaged ? kColumnBlocks / kPasses : 0;  // column blocks staged at a time, per warpgroup
    static constexpr int kStagingBytes = kConsumers * kPassBlocks * kStagingBlockBytes;
    static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kStagingBytes + 256;
};

struct Maps {
    CUtensorMap a, b, c, aux;
    float* c_fp32;  // where the output is added to, contiguous rows
};

struct Shape {
    int m, n, k;
};

// A tile of the cluster pair, and the k blocks of it to sum.
struct Work {
    int m0, n0, k_begin, k_end;
};

// The works of one cluster, in order. Neighbours in n come first: they share their rows of A in the L2.
template <class Op>
struct Schedule {
    int tiles_n, k_blocks;
    int64_t position, end;

    __device__ __forceinline__ explicit Schedule(const Shape& shape) {
        tiles_n = (shape.n + Op::kBlockN - 1) / Op::kBlockN;
        k_blocks = (shape.k + kBlockK - 1) / kBlockK;
        const int64_t pairs = int64_t((shape.m + kCluster * kBlockM - 1) / (kCluster * kBlockM)) * tiles_n;
        const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
        position = Layout<Op>::kStaged ? cluster : pairs * k_blocks * cluster / clusters;
        end = Layout<Op>::kStaged ? pairs : pairs * k_blocks * (cluster + 1) / clusters;
    }
    __device__ __forceinline__ bool next(Work& work) {
        if (position >= end) return false;
        int pair;
        if constexpr (Layout<Op>::kStaged) {
            pair = int(position), work.k_begin = 0, work.k_end = k_blocks;
            position += gridDim.x / kCluster;
        } else {
            pair = int(position / k_blocks), work.k_begin = int(position % k_blocks);
            work.k_end = int(min(int64_t(k_blocks), work.k_begin + end - position));
            position += work.k_end - work.k_begin;
        }
        work.m0 = (pair / tiles_n * kCluster + ptx::cluster_rank()) * kBlockM;
        work.n0 = pair % tiles_n * Op::kBlockN;
        return true;
    }
};

struct Barriers {
    uint64_t full[kStages], empty[kStages];
    uint64_t aux_full, aux_empty;
};

// Byte offset inside a swizzled region of 128-byte rows.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk16) { return row * 128 + ((chunk16 ^ (row & 7)) << 4); }

// Position in a ring of stages.
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

template <class Op>
__device__ __forceinline__ void produce(const Maps& maps, const Shape& shape, uint8_t* stages, uint8_t* staging, Barriers& bars) {
    using L = Layout<Op>;
    constexpr int kBlockN = Op::kBlockN;
    const uint32_t rank = ptx::cluster_rank();
    Schedule<Op> schedule(shape);
    Work work;
    Ring ring;
    uint32_t tile_parity = 0;
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
                    ptx::tma_load_2d(stage_a + block * kBlockK * 128, &maps.a, &bars.full[ring.stage], m0 + block * kColumnBlock, kb * kBlockK);
            }
            if constexpr (Op::kBMajor == wgmma::kMajorK) {
                const int half = kBlockN / kCluster;
                ptx::tma_load_2d_multicast(stage_b + rank * half * 128, &maps.b, &bars.full[ring.stage], kb * kBlockK, n0 + rank * half, 3);
            } else {
// Half of the k of every column block.
                const int half = kBlockK / kCluster;
#pragma unroll
                for (int block = 0; block < L::kColumnBlocks; ++block)
                    ptx::tma_load_2d_multicast(stage_b + (block * kBlockK + rank * half) * 128, &maps.b, &bars.full[ring.stage],
                                               n0 + block * kColumnBlock, kb * kBlockK + rank * half, 3);
            }
            // The auxiliary tile goes where the last tile's result was, once that has been stored: not before the ring is fed.
            if (Op::kHasAux && kb == min(kStages, work.k_end) - 1) {
                ptx::mbarrier_wait(&bars.aux_empty, tile_parity ^ 1);
                ptx::mbarrier_arrive_expect(&bars.aux_full, L::kStagingBytes);
#pragma unroll
                for (int i = 0; i < kConsumers * L::kColumnBlocks; ++i) {
                    const int rows = i / L::kColumnBlocks, block = i % L::kColumnBlocks;
                    ptx::tma_load_2d(staging + i * kStagingBlockBytes, &maps.aux, &bars.aux_full, n0 + block * kColumnBlock, m0 + rows * 64);
                }
                tile_parity ^= 1;
            }
        }
    }
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

template <class Op>
__device__ __forceinline__ void consume(const Maps& maps, const Shape& shape, uint8_t* stages, uint8_t* staging, Barriers& bars) {
    using L = Layout<Op>;
    constexpr int kBlockN = Op::kBlockN;
    const uint32_t rank = ptx::cluster_rank();
    // Broadcast, so that the compiler keeps descriptors in uniform registers.
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    uint8_t* own_staging = staging + group * L::kPassBlocks * kStagingBlockBytes;
    // Row and 16-byte column chunk that this lane addresses in ldmatrix / stmatrix of a 16 x 16 block.
    const uint32_t lane_row = warp * 16 + (lane / 8 % 2) * 8 + lane % 8, lane_chunk = lane / 16;
    Ring ring;
    uint32_t tile_parity = 0;
    bool stored = false;

    auto release = [&](int stage) {
        if (lane == 0) {
            ptx::mbarrier_arrive(&bars.empty[stage]);
            ptx::mbarrier_arrive_cluster(&bars.empty[stage], rank ^ 1);
        }
    };

    Schedule<Op> schedule(shape);
    Work work;
    while (schedule.next(work)) {
        const int m0 = work.m0 + group * 64, n0 = work.n0;
        float acc[kBlockN / 2];
        uint32_t a_regs[2][4][4];
        int previous = -1;
#pragma unroll 2
        for (int i_kb = 0; i_kb < work.k_end - work.k_begin; ++i_kb, ring.next()) {
            ptx::mbarrier_wait(&bars.full[ring.stage], ring.phase);
            uint8_t* stage_a = stages + ring.stage * L::kStageBytes + group * 64 * 128;  // 64 rows of m, or 64 k of this group's 64 m
            uint8_t* stage_b = stages + ring.stage * L::kStageBytes + L::kStageABytes;
            const uint64_t b = Op::kBMajor == wgmma::kMajorK ? wgmma::descriptor(stage_b) : wgmma::descriptor_mn_major(stage_b, kBlockK * 128);
            constexpr uint32_t kAStep = Op::kAMajor == wgmma::kMajorK ? 32 : 16 * 128;
            constexpr uint32_t kBStep = Op::kBMajor == wgmma::kMajorK ? 32 : 16 * 128;
            if constexpr (Op::kTransformA) {
                auto& a = a_regs[i_kb % 2];
                const uint32_t base = ptx::smem_u32(stage_a);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if constexpr (Op::kAMajor == wgmma::kMajorK)
                        ptx::ldmatrix_x4(base + swizzled(lane_row, 2 * i + lane_chunk), a[i][0], a[i][1], a[i][2], a[i][3]);
                    else  // rows are k: 8 x 8 blocks in the order (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8)
                        ptx::ldmatrix_x4_transposed(base + swizzled(16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2), a[i][0], a[i][1],
                                                    a[i][2], a[i][3]);
#pragma unroll
                    for (int r = 0; r < 4; ++r) a[i][r] = Op::operand_a(a[i][r]);
                }
                wgmma::fence();
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    wgmma::mma<Op::kBMajor>(acc, a[i][0], a[i][1], a[i][2], a[i][3], wgmma::advance(b, i * kBStep), i_kb > 0 || i > 0);
            } else {
                const uint64_t a = Op::kAMajor == wgmma::kMajorK ? wgmma::descriptor(stage_a) : wgmma::descriptor_mn_major(stage_a, kBlockK * 128);
                wgmma::fence();
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    wgmma::mma<Op::kAMajor, Op::kBMajor>(acc, wgmma::advance(a, i * kAStep), wgmma::advance(b, i * kBStep), i_kb > 0 || i > 0);
            }
            wgmma::commit();
            wgmma::wait<1>();
            if (previous >= 0) release(previous);
            previous = ring.stage;
            // The last tile's store has long read its staging; the producer may bring the auxiliary tile into it.
            if (Op::kHasAux && i_kb == 0 && stored && threadIdx.x % 128 == 0) {
                ptx::bulk_wait_read<0>();
                ptx::mbarrier_arrive(&bars.aux_empty);
            }
        }
        wgmma::wait<0>();
        wgmma::pin(acc);
        release(previous);

        if constexpr (!L::kStaged) {
            add_fp32<Op>(acc, maps.c_fp32, m0 + warp * 16 + lane / 4, n0 + lane % 4 * 2, shape);
            continue;
        }
        const uint32_t own = ptx::smem_u32(own_staging);
#pragma unroll
        for (int pass = 0; pass < L::kPasses; ++pass) {
            if constexpr (Op::kHasAux) {
                ptx::mbarrier_wait(&bars.aux_full, tile_parity);
                tile_parity ^= 1;
            } else {
                if (threadIdx.x % 128 == 0) ptx::bulk_wait_read<0>();
                ptx::named_sync(1 + group, 128);
            }
#pragma unroll
            for (int i = 0; i < L::kPassBlocks * 4; ++i) {
                const int j = pass * L::kPassBlocks * 4 + i;  // 16 columns of the tile
                const uint32_t address = own + i / 4 * kStagingBlockBytes + swizzled(lane_row, i % 4 * 2 + lane_chunk);
                uint32_t aux[4] = {}, out[4];
                if constexpr (Op::kHasAux) ptx::ldmatrix_x4(address, aux[0], aux[1], aux[2], aux[3]);
#pragma unroll
                for (int r = 0; r < 4; ++r) out[r] = Op::result(acc[8 * j + 2 * r], acc[8 * j + 2 * r + 1], aux[r]);
                ptx::stmatrix_x4(address, out[0], out[1], out[2], out[3]);
            }
            ptx::fence_async_shared();
            ptx::named_sync(1 + group, 128);
            if (threadIdx.x % 128 == 0) {
#pragma unroll
                for (int block = 0; block < L::kPassBlocks; ++block)
                    ptx::tma_store_2d(&maps.c, own_staging + block * kStagingBlockBytes, n0 + (pass * L::kPassBlocks + block) * kColumnBlock, m0);
                ptx::bulk_commit();
            }
        }
        stored = true;
    }
    if (threadIdx.x % 128 == 0) ptx::bulk_wait<0>();
}

template <class Op>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ Maps maps, const Shape shape) {
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
        ptx::mbarrier_init(&bars.aux_full, 1);
        ptx::mbarrier_init(&bars.aux_empty, kConsumers);
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();
    if (threadIdx.x >= kConsumers * 128) {
        ptx::registers_decrease<40>();
        if (threadIdx.x / 32 == kConsumers * 4 && ptx::elect_one()) produce<Op>(maps, shape, stages, staging, bars);
    } else {
        ptx::registers_increase<232>();
        consume<Op>(maps, shape, stages, staging, bars);
    }
    // A CTA stays while its neighbour may still write into it or signal it.
    ptx::cluster_sync();
}

inline cudaError_t map_2d(CUtensorMap* map, const void* base, int64_t rows, int64_t columns, int64_t row_stride, uint32_t box_rows) {
    TensorMapDims dims{2, {uint64_t(columns), uint64_t(rows)}, {uint64_t(row_stride) * 2}, {kColumnBlock, box_rows}};
    return make_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, dims);
}

// A, B as their majors say; C [m, n] bf16, or float32 [m, n] or [n, m] that is added to; aux [m, n]; all with contiguous rows.
template <class Op>
cudaError_t launch(const void* a, const void* b, void* c, const void* aux, const Shape& shape, cudaStream_t stream) {
    if (shape.m == 0 || shape.k == 0) return cudaSuccess;
    constexpr int kSharedBytes = Layout<Op>::kSharedBytes;
    Maps maps{};
    maps.c_fp32 = static_cast<float*>(c);
    cudaError_t status = Op::kAMajor == wgmma::kMajorK ? map_2d(&maps.a, a, shape.m, shape.k, shape.k, kBlockM)
                                                       : map_2d(&maps.a, a, shape.k, shape.m, shape.m, kBlockK);
    if (status == cudaSuccess)
        status = Op::kBMajor == wgmma::kMajorK ? map_2d(&maps.b, b, shape.n, shape.k, shape.k, Op::kBlockN / kCluster)
                                               : map_2d(&maps.b, b, shape.k, shape.n, shape.n, kBlockK / kCluster);
    if (status == cudaSuccess && Layout<Op>::kStaged) status = map_2d(&maps.c, c, shape.m, shape.n, shape.n, 64);
    if (status == cudaSuccess && Op::kHasAux) status = map_2d(&maps.aux, aux, shape.m, shape.n, shape.n, 64);
    int device = 0, sms = 0;
    if (status == cudaSuccess) status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess) status = cudaFuncSetAttribute(gemm_kernel<Op>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    int clusters = sms / kCluster;
    if (Layout<Op>::kStaged) {
        const int64_t pairs = int64_t((shape.m + kCluster * kBlockM - 1) / (kCluster * kBlockM)) * ((shape.n + Op::kBlockN - 1) / Op::kBlockN);
        clusters = int(pairs < clusters ? pairs : clusters);
    }
    gemm_kernel<Op><<<kCluster * clusters, kThreads, kSharedBytes, stream>>>(maps, shape);
    return cudaGetLastError();
}

}  // namespace pgolf::gemm
