// One CTA owns 128 rows of x, 64 per warpgroup, in registers, and streams all of the weight past them:
//
//     producer thread     the rows of x, then the weight in tiles of kTile rows, through one ring of column blocks
//     2 warpgroups        in turn: while one multiplies a tile, the other makes its tile into exponentials, row sums and G.
//     3 scaling warps     scaled_x of the rows just summed, from memory to memory, under the products of the next
//
// x as a register operand leaves the bandwidth of shared memory to the weight, and its space to a ring that holds more than
// a tile, which is how far one warpgroup is behind the other. Clusters of two CTAs share the weight: each loads half of every
// block and multicasts it.
#include "kernels/linear_softcap_ce.h"

#include "kernels/common/launch.h"
#include "kernels/common/softcap.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/common/wgmma.cuh"
#include "kernels/softcap_ce.cuh"

namespace pgolf {
namespace {

constexpr int kCluster = 2;
constexpr int kTile = 128;       // rows of x per CTA, rows of weight per tile
constexpr int kBlockDepth = 64;  // one 128-byte swizzled row
constexpr int kBlocks = kLinearSoftcapCEDepth / kBlockDepth;
constexpr int kBlockBytes = kTile * kBlockDepth * 2;
constexpr int kBoxBytes = kBlockBytes / 2;  // 64 rows: one warpgroup's part of a block of x or of G
constexpr int kBoxes = kTile / kBlockDepth;  // of a warpgroup's part of a tile of G
constexpr int kConsumerWarps = 8, kScalingWarps = 3;
constexpr int kThreads = 128 + 32 * kConsumerWarps;
static_assert(144 * kConsumerWarps <= SoftcapCEWorkspace::kMaxCtas, "a loss of each consumer warp; sm_90 has up to 144 multiprocessors");

__host__ __device__ constexpr int num_stages(bool with_grad) { return with_grad ? 10 : 14; }
constexpr int shared_bytes(bool with_grad) { return 1024 + num_stages(with_grad) * kBlockBytes + (with_grad ? 4 * kBoxes * kBoxBytes : 0); }

// A row's element of G at its target.
struct TargetElement {
    int column;
    float value;
};

// Column `column` of a lane's row `half` of a tile, of which it holds columns 0, 1, 8, 9, 16 ...; by halving, for registers have no index.
template <int kFirst, int kColumns>
__device__ __forceinline__ float element_at(const float (&tile)[kTile / 2], int half, uint32_t column) {
    if constexpr (kColumns == 1) {
        return half == 0 ? tile[kFirst / 8 * 4 + kFirst % 2] : tile[kFirst / 8 * 4 + 2 + kFirst % 2];
    } else {
        constexpr int kHalf = kColumns == 8 ? 1 : kColumns / 2;
        const float low = element_at<kFirst, kHalf>(tile, half, column), high = element_at<kFirst + kHalf, kHalf>(tile, half, column);
        return column & kHalf ? high : low;
    }
}

// Position in the ring.
template <int kStages>
struct Ring {
    uint32_t stage = 0, parity;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

template <bool kWithGrad>
__global__ void __launch_bounds__(kThreads, 1)
    linear_softcap_ce_kernel(const LinearSoftcapCEParams p, const Softcap softcap, const __grid_constant__ CUtensorMap x_map,
                             const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap g_map) {
    constexpr int kStages = num_stages(kWithGrad);
    extern __shared__ unsigned char s_memory[];
    unsigned char* const s_ring = s_memory + (1024 - ptx::smem_u32(s_memory) % 1024) % 1024;  // [kStages] blocks
    unsigned char* const s_boxes = s_ring + kStages * kBlockBytes;  // [2 warpgroups][2 tiles in turn][kBoxes] of 64 x 64
    __shared__ uint64_t s_full[kStages], s_free[kStages], s_turn[2], s_summed, s_scaled;
    __shared__ TargetElement s_target_elements[kTile];
    __shared__ float s_scale[kTile];
    __shared__ bool s_last;

    const int rank = ptx::cluster_rank();
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int num_tiles = p.v / kTile;
    const uint32_t num_clusters = gridDim.x / kCluster, first_block = blockIdx.x / kCluster;
    const uint32_t num_row_blocks = (p.n + kCluster * kTile - 1) / (kCluster * kTile);
    const auto first_row = [&](uint32_t block) { return (block * kCluster + rank) * kTile; };

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(&s_full[stage], 1);
            ptx::mbarrier_init(&s_free[stage], kConsumerWarps * kCluster);
        }
        for (int group = 0; group < 2; ++group) ptx::mbarrier_init(&s_turn[group], kConsumerWarps / 2);
        // Who writes or reads s_scale arrives itself, not a leader for its warp: racecheck follows no __syncwarp to another lane's arrival.
        ptx::mbarrier_init(&s_summed, kConsumerWarps * 8);
        ptx::mbarrier_init(&s_scaled, kScalingWarps * 32);
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();

    // scaled_x of a block of rows whose scales are in s_scale, by one of `workers` warps. Two rows at once: four loads in flight.
    const auto scale_rows = [&](uint32_t block, int worker, int workers) {
        constexpr int kRowVectors = kLinearSoftcapCEDepth / 8;
        const int rows = min(int64_t(kTile), int64_t(p.n) - first_row(block));
        const uint4* const in = reinterpret_cast<const uint4*>(p.x) + int64_t(first_row(block)) * kRowVectors + lane;
        uint4* const out = reinterpret_cast<uint4*>(p.scaled_x) + int64_t(first_row(block)) * kRowVectors + lane;
        for (int row = 2 * worker; row < rows; row += 2 * workers) {
            const int next = min(row + 1, rows - 1);  // the last row twice, rather than a branch that a load would wait in
            const uint32_t first = row * kRowVectors, second = next * kRowVectors, at[4] = {first, first + 32, second, second + 32};
            uint4 vectors[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) vectors[k] = __ldg(in + at[k]);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float scale = s_scale[k < 2 ? row : next];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    uint32_t& pair = (&vectors[k].x)[j];
                    pair = ptx::pack_bf16(scale * ptx::low_bf16(pair), scale * ptx::high_bf16(pair));
                }
                out[at[k]] = vectors[k];
            }
        }
    };

    if (warpgroup == 0) {
        ptx::registers_decrease<40>();
        if (warp == 0 && lane == 0) {
            Ring<kStages> ring{0, 1};
            const auto take_stage = [&] {
                ptx::mbarrier_wait(&s_free[ring.stage], ring.parity);
                ptx::mbarrier_arrive_expect(&s_full[ring.stage], kBlockBytes);
                return s_ring + ring.stage * kBlockBytes;
            };
            for (uint32_t block = first_block; block < num_row_blocks; block += num_clusters) {
                for (int k = 0; k < kBlocks; ++k, ring.next()) {
                    unsigned char* const s_x = take_stage();
                    ptx::tma_load_2d(s_x, &x_map, &s_full[ring.stage], k * kBlockDepth, first_row(block));
                }
                for (int step = 0; step < num_tiles * kBlocks; ++step, ring.next()) {
                    // The next rows of x into the L2, one block a tile: not so early that G displaces them
                    const int next_k = step / kBlocks - (num_tiles - kBlocks - 1);
                    if (step % kBlocks == 0 && next_k >= 0 && next_k < kBlocks && block + num_clusters < num_row_blocks)
                        ptx::tma_prefetch_2d(&x_map, next_k * kBlockDepth, first_row(block + num_clusters));
                    unsigned char* const s_weight = take_stage() + rank * kBoxBytes;
                    ptx::tma_load_2d_multicast(s_weight, &weight_map, &s_full[ring.stage], step % kBlocks * kBlockDepth,
                                               step / kBlocks * kTile + rank * (kTile / kCluster), (1 << kCluster) - 1);
                }
            }
        } else if (kWithGrad && warp > 0) {
            uint32_t parity = 0;
            for (uint32_t block = first_block; block < num_row_blocks; block += num_clusters, parity ^= 1) {
                ptx::mbarrier_wait(&s_summed, parity);
                const bool last = block + num_clusters >= num_row_blocks;  // then the consumers help
                scale_rows(block, warp - 1, kScalingWarps + (last ? kConsumerWarps : 0));
                ptx::mbarrier_arrive(&s_scaled);
            }
        }
        __syncwarp();
    } else {
        ptx::registers_increase<232>();
        const int group = __shfl_sync(0xffffffffu, warpgroup, 0) - 1, quad = lane % 4;
        const bool leads = warp == 0 && lane == 0;
        const uint64_t ring_descriptor = wgmma::descriptor(s_ring);
        unsigned char* const s_group_boxes = s_boxes + group * 2 * kBoxes * kBoxBytes;
        // ldmatrix and stmatrix: this lane's row of the 16 x 16 patch, and which of its two 8-column halves
        const uint32_t patch_row = warp * 16 + lane / 8 % 2 * 8 + lane % 8, patch_half = lane / 16;
        const auto patch_address = [&](const unsigned char* box, uint32_t patch) {
            return ptx::smem_u32(box) + patch_row * 128 + (((2 * patch + patch_half) ^ (patch_row % 8)) << 4);
        };
        const auto row_of = [&](uint32_t row0, int half) { return row0 + warp * 16 + half * 8 + lane / 4; };  // of a lane's two rows
        const auto release = [&](uint32_t stage) {
            if (lane == 0)
                for (int r = 0; r < kCluster; ++r) ptx::mbarrier_arrive_cluster(&s_free[stage], r);
        };
        ptx::grid_dependency_wait();  // for the rows kept
        const float weight = mean_weight(p);
        double loss_sum = 0;
        Ring<kStages> ring{0, 0};
        uint32_t turn_parity = group ^ 1;  // warpgroup 0 begins

        // G's elements at the targets are known only at the end of their rows, and written once those rows of G are in memory.
        uint32_t finished_row0 = 0;
        const auto write_target_elements = [&] {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (quad > 0) continue;
                const TargetElement element = s_target_elements[row_of(group * 64, half)];
                if (element.column >= 0)
                    p.g[int64_t(row_of(finished_row0, half)) * p.v + element.column] = __float2bfloat16_rn(element.value);
            }
        };

        uint32_t x[kBlocks * 4][4];  // this warpgroup's rows, 16 columns a fragment
        const auto load_rows = [&] {
#pragma unroll
            for (int k = 0; k < kBlocks; ++k, ring.next()) {
                ptx::mbarrier_wait(&s_full[ring.stage], ring.parity);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    uint32_t(&a)[4] = x[4 * k + j];
                    ptx::ldmatrix_x4(patch_address(s_ring + ring.stage * kBlockBytes + group * kBoxBytes, j), a[0], a[1], a[2], a[3]);
                }
                release(ring.stage);
            }
        };
        int64_t next_target[2];
        const auto fetch_targets = [&](uint32_t block) {
#pragma unroll
            for (int half = 0; half < 2; ++half) next_target[half] = p.targets[min(row_of(first_row(block) + group * 64, half), p.n - 1)];
        };
        fetch_targets(first_block);
        load_rows();

        uint32_t scaled_parity = 1;
        for (uint32_t block = first_block; block < num_row_blocks; block += num_clusters) {
            const uint32_t row0 = first_row(block) + group * 64;  // of this warpgroup
            const bool last_block = block + num_clusters >= num_row_blocks;
            float sum[2] = {}, target_tanh[2] = {};
            int target[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) target[half] = row_of(row0, half) < p.n ? target_of(next_target[half], p) : kIgnored;
            if (!last_block) fetch_targets(block + num_clusters);

            for (int tile = 0; tile < num_tiles; ++tile) {
                float acc[64];
                ptx::mbarrier_wait(&s_turn[group], turn_parity);
                turn_parity ^= 1;
                uint32_t before = 0;
#pragma unroll
                for (int k = 0; k < kBlocks; ++k, ring.next()) {
                    ptx::mbarrier_wait(&s_full[ring.stage], ring.parity);
                    wgmma::fence();
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        uint32_t(&a)[4] = x[4 * k + j];
                        const uint64_t weight_block = wgmma::advance(ring_descriptor, ring.stage * kBlockBytes + 32 * j);
                        wgmma::mma(acc, a[0], a[1], a[2], a[3], weight_block, k + j > 0);
                    }
                    wgmma::commit();
                    if (k > 0) {
                        wgmma::wait<1>();
                        release(before);
                    }
                    before = ring.stage;
                }
                if (lane == 0) ptx::mbarrier_arrive(&s_turn[group ^ 1]);
                wgmma::wait<0>();
                release(before);
                wgmma::pin(acc);

                // The next rows: the second warpgroup's at once, for which the ring waits; the first has time for its exponentials.
                const bool load_next = tile == num_tiles - 1 && !last_block;
                if (load_next && group == 1) load_rows();

                float(&t)[kTile / 2] = acc;  // tanh(logit / cap), all of them first: the special-function unit then waits for nothing
#pragma unroll
                for (int i = 0; i < kTile / 2; ++i) t[i] = softcap.tanh_approx(acc[i]);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t column = target[half] - tile * kTile - 2 * quad;  // from this lane's first on; huge before it
                    if (column < kTile && column % 8 < 2) target_tanh[half] = element_at<0, kTile>(t, half, column);
                }
                unsigned char* const s_box = s_group_boxes + tile % 2 * kBoxes * kBoxBytes;
#pragma unroll
                for (int part = 0; part < kTile / 16; ++part) {  // 16 columns
                    float g[8];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const float e = softcap.exponential(t[8 * part + i]);
                        sum[i / 2 % 2] += e;
                        g[i] = e * softcap_slope(t[8 * part + i]);
                    }
                    if constexpr (kWithGrad)
                        ptx::stmatrix_x4(patch_address(s_box + part / 4 * kBoxBytes, part % 4), ptx::pack_bf16(g[0], g[1]),
                                         ptx::pack_bf16(g[2], g[3]), ptx::pack_bf16(g[4], g[5]), ptx::pack_bf16(g[6], g[7]));
                }

                if constexpr (kWithGrad) {
                    ptx::fence_async_shared();
                    const bool after_rows = tile == 1 && block != first_block;
                    if (leads) {  // the tile before has left its boxes, the next one's; after other rows, those are in memory
                        if (after_rows) ptx::bulk_wait<0>();
                        else ptx::bulk_wait_read<0>();
                    }
                    ptx::named_sync(1 + group, 128);
                    if (leads) {
                        for (int box = 0; box < kBoxes; ++box)
                            ptx::tma_store_2d(&g_map, s_box + box * kBoxBytes, tile * kTile + box * kBlockDepth, row0);
                        ptx::bulk_commit();
                    }
                    if (after_rows) write_target_elements();
                }
                if (load_next && group == 0) load_rows();
            }

            // Rows are complete. The four lanes of a quad hold the same two rows; one of them has met the target.
            if constexpr (kWithGrad) {
                ptx::mbarrier_wait(&s_scaled, scaled_parity);
                scaled_parity ^= 1;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total = sum[half], t = target_tanh[half];
#pragma unroll
                for (int offset = 1; offset < 4; offset *= 2) {
                    t += __shfl_xor_sync(0xffffffffu, t, offset);
                    total += __shfl_xor_sync(0xffffffffu, total, offset);
                }
                if (quad > 0) continue;
                const float scale = target[half] == kIgnored ? 0.f : or_nan(weight / total, target[half]);
                s_target_elements[row_of(group * 64, half)] = {target[half], (softcap.exponential(t) - total) * softcap_slope(t)};
                s_scale[row_of(group * 64, half)] = scale;
                const uint32_t row = row_of(row0, half);
                if (row < p.n) {
                    const float loss = target[half] == kIgnored ? 0.f : or_nan(logf(total) - p.cap * t, target[half]);
                    if (p.reduction == SoftcapCEReduction::kNone) p.loss[row] = loss;
                    loss_sum += loss;
                    if constexpr (kWithGrad) p.row_scale[row] = scale;
                }
            }
            finished_row0 = row0;
            if constexpr (kWithGrad) {
                if (quad == 0) ptx::mbarrier_arrive(&s_summed);
            }
            if (kWithGrad && last_block) {
                ptx::mbarrier_wait(&s_summed, scaled_parity);
                scale_rows(block, kScalingWarps + group * 4 + warp, kScalingWarps + kConsumerWarps);
            }
        }
        if constexpr (kWithGrad) {
            if (leads) ptx::bulk_wait<0>();
            ptx::named_sync(1 + group, 128);
            write_target_elements();
        }

        if (p.reduction != SoftcapCEReduction::kNone) {
            SoftcapCEWorkspace& workspace = *p.workspace;
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) loss_sum += __shfl_xor_sync(0xffffffffu, loss_sum, offset);
            if (lane == 0) {
                workspace.loss[blockIdx.x * kConsumerWarps + group * 4 + warp] = loss_sum;
                __threadfence();
            }
            ptx::named_sync(3, 32 * kConsumerWarps);
            if (group == 0 && warp == 0) {
                if (lane == 0) s_last = atomicAdd(&workspace.arrived, 1u) == gridDim.x - 1;
                __syncwarp();
                if (s_last) {
                    __threadfence();
                    loss_sum = 0;
                    for (unsigned i = lane; i < gridDim.x * kConsumerWarps; i += 32) loss_sum += __ldcg(&workspace.loss[i]);
#pragma unroll
                    for (int offset = 16; offset > 0; offset /= 2) loss_sum += __shfl_xor_sync(0xffffffffu, loss_sum, offset);
                    const int64_t kept = rows_kept(workspace);
                    if (lane == 0) *p.loss = float(p.reduction == SoftcapCEReduction::kMean ? loss_sum / double(kept) : loss_sum);
                }
            }
        }
    }
    ptx::cluster_sync();  // NOTE: a CTA must not leave while its peer multicasts into it or arrives on its barriers
}

}  // namespace

cudaError_t linear_softcap_ce_fwd(const LinearSoftcapCEParams& p, cudaStream_t stream) {
    const bool with_grad = p.g != nullptr;
    CUtensorMap x_map{}, weight_map{}, g_map{};
    constexpr int kDepth = kLinearSoftcapCEDepth;
    cudaError_t status = bf16_matrix_map(&x_map, p.x, p.n, kDepth, kDepth, kTile);
    if (status == cudaSuccess) status = bf16_matrix_map(&weight_map, p.weight, p.v, kDepth, kDepth, kTile / kCluster);
    if (status == cudaSuccess && with_grad) status = bf16_matrix_map(&g_map, p.g, p.n, p.v, p.v, 64);
    if (status != cudaSuccess) return status;

    SoftcapCEParams counted{};
    counted.targets = p.targets;
    counted.workspace = p.workspace;
    counted.report = p.report;
    counted.n = p.n;
    counted.v = p.v;
    counted.ignore_index = p.ignore_index;
    status = softcap_ce_count_targets(counted, stream);
    if (status != cudaSuccess) return status;

    int num_sms = 0;
    status = multiprocessors(num_sms);
    const auto kernel = with_grad ? linear_softcap_ce_kernel<true> : linear_softcap_ce_kernel<false>;
    if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(with_grad));
    if (status != cudaSuccess) return status;
    const uint32_t wanted = (p.n + kCluster * kTile - 1) / (kCluster * kTile);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = kCluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // starts while the targets are counted
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kCluster * min(wanted, uint32_t(num_sms / kCluster)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes(with_grad);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, kernel, p, Softcap(p.cap), x_map, weight_map, g_map);
}

}  // namespace pgolf
