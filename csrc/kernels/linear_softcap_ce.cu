// One CTA owns 128 rows of x, 64 per warpgroup, in registers, and streams all of the weight past them:
//
//     producer thread     the rows of x, then the weight in tiles of kTile rows, through one ring of column blocks
//     2 warpgroups        in turn: while one multiplies a tile, the other makes its tile into exponentials, row sums and G
//
// x as a register operand leaves the bandwidth of shared memory to the weight, and its space to a ring that holds more than
// a tile, which is how far one warpgroup is behind the other. Clusters of two CTAs share the weight: each loads half of every
// block and multicasts it.
#include "kernels/linear_softcap_ce.h"

#include <type_traits>

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
constexpr int kBoxBytes = kBlockBytes / 2;  // 64 rows: one warpgroup's part of a block of x, of G or of scaled_x
constexpr int kBoxes = kTile / kBlockDepth;  // of a warpgroup's part of a tile of G
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 128 + 32 * kConsumerWarps;

__host__ __device__ constexpr int num_stages(bool with_grad) { return with_grad ? 12 : 14; }
constexpr int shared_bytes(bool with_grad) { return 1024 + num_stages(with_grad) * kBlockBytes + (with_grad ? 2 * kBoxes * kBoxBytes : 0); }

// A row's element of G at its target.
struct TargetElement {
    int column;
    float value;
};

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
                             const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap g_map,
                             const __grid_constant__ CUtensorMap scaled_x_map) {
    constexpr int kStages = num_stages(kWithGrad);
    extern __shared__ unsigned char s_memory[];
    unsigned char* const s_ring = s_memory + (1024 - ptx::smem_u32(s_memory) % 1024) % 1024;  // [kStages] blocks
    unsigned char* const s_boxes = s_ring + kStages * kBlockBytes;                           // [2 warpgroups][kBoxes] of 64 x 64
    __shared__ uint64_t s_full[kStages], s_free[kStages], s_turn[2];
    __shared__ TargetElement s_target_elements[kTile];
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
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();

    if (warpgroup == 0) {
        ptx::registers_decrease<24>();
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
                if (block + num_clusters < num_row_blocks)
                    for (int k = 0; k < kBlocks; ++k) ptx::tma_prefetch_2d(&x_map, k * kBlockDepth, first_row(block + num_clusters));
                for (int step = 0; step < num_tiles * kBlocks; ++step, ring.next()) {
                    unsigned char* const s_weight = take_stage() + rank * kBoxBytes;
                    ptx::tma_load_2d_multicast(s_weight, &weight_map, &s_full[ring.stage], step % kBlocks * kBlockDepth,
                                               step / kBlocks * kTile + rank * (kTile / kCluster), (1 << kCluster) - 1);
                }
            }
        }
        __syncwarp();
    } else {
        ptx::registers_increase<240>();
        const int group = __shfl_sync(0xffffffffu, warpgroup, 0) - 1, quad = lane % 4;
        const bool leads = warp == 0 && lane == 0;
        const uint64_t ring_descriptor = wgmma::descriptor(s_ring);
        unsigned char* const s_box = s_boxes + group * kBoxes * kBoxBytes;
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

        for (uint32_t block = first_block; block < num_row_blocks; block += num_clusters) {
            const uint32_t row0 = first_row(block) + group * 64;  // of this warpgroup
            uint32_t x[kBlocks * 4][4];                           // its rows, 16 columns a fragment
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
            float sum[2] = {}, target_logit[2] = {};
            int target[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t row = row_of(row0, half);
                target[half] = row < p.n ? target_of(p.targets[row], p) : kIgnored;
            }

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

                float largest[4] = {};
#pragma unroll
                for (int i = 0; i < 64; ++i) largest[i % 4] = fmaxf(largest[i % 4], fabsf(acc[i]));
                largest[0] = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
                const bool near = __all_sync(0xffffffffu, largest[0] <= softcap.cap);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t column = target[half] - tile * kTile - 2 * quad;  // from this lane's first on; huge before it
                    if (column < kTile && column % 8 < 2) {
#pragma unroll
                        for (int i = 0; i < 32; ++i)
                            if (column == 8 * (i / 2) + i % 2) target_logit[half] = acc[4 * (i / 2) + 2 * half + i % 2];
                        // The sum takes the target's exact exponential: what is approximate in the loss is the other columns.
                        const float exact = softcap.tanh(target_logit[half]);
                        const float summed = near ? softcap.tanh_approx(target_logit[half]) : exact;
                        sum[half] += softcap.exponential(exact) - softcap.exponential(summed);
                    }
                }
                if constexpr (kWithGrad) {
                    const bool after_rows = tile == 1 && block != first_block;
                    if (leads) {  // the tile before has left its boxes; after other rows, those are in memory
                        if (after_rows) ptx::bulk_wait<0>();
                        else ptx::bulk_wait_read<0>();
                    }
                    ptx::named_sync(1 + group, 128);
                    if (after_rows) write_target_elements();
                }

                const auto exponentials = [&](auto approximate) {
#pragma unroll
                    for (int part = 0; part < kTile / 16; ++part) {  // 16 columns
                        float g[8];
#pragma unroll
                        for (int i = 0; i < 8; ++i) {
                            const float logit = acc[8 * part + i];
                            const float t = decltype(approximate)::value ? softcap.tanh_approx(logit) : softcap.tanh(logit);
                            const float e = softcap.exponential(t);
                            sum[i / 2 % 2] += e;
                            g[i] = e * softcap_slope(t);
                        }
                        if constexpr (kWithGrad)
                            ptx::stmatrix_x4(patch_address(s_box + part / 4 * kBoxBytes, part % 4), ptx::pack_bf16(g[0], g[1]),
                                             ptx::pack_bf16(g[2], g[3]), ptx::pack_bf16(g[4], g[5]), ptx::pack_bf16(g[6], g[7]));
                    }
                };
                if (near)
                    exponentials(std::true_type{});
                else
                    exponentials(std::false_type{});

                if constexpr (kWithGrad) {
                    ptx::fence_async_shared();
                    ptx::named_sync(1 + group, 128);
                    if (leads) {
                        for (int box = 0; box < kBoxes; ++box)
                            ptx::tma_store_2d(&g_map, s_box + box * kBoxBytes, tile * kTile + box * kBlockDepth, row0);
                        ptx::bulk_commit();
                    }
                }
            }

            // Rows are complete. The four lanes of a quad hold the same two rows; one of them has met the target.
            float scale[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total = sum[half], logit = target_logit[half];
#pragma unroll
                for (int offset = 1; offset < 4; offset *= 2) {
                    logit += __shfl_xor_sync(0xffffffffu, logit, offset);
                    total += __shfl_xor_sync(0xffffffffu, total, offset);
                }
                const float t = softcap.tanh(logit);
                scale[half] = target[half] == kIgnored ? 0.f : or_nan(weight / total, target[half]);
                if (quad == 0)
                    s_target_elements[row_of(group * 64, half)] = {target[half], (softcap.exponential(t) - total) * softcap_slope(t)};
                const uint32_t row = row_of(row0, half);
                if (quad == 0 && row < p.n) {
                    const float loss = target[half] == kIgnored ? 0.f : or_nan(logf(total) - p.cap * t, target[half]);
                    if (p.reduction == SoftcapCEReduction::kNone) p.loss[row] = loss;
                    loss_sum += loss;
                    if constexpr (kWithGrad) p.row_scale[row] = scale[half];
                }
            }
            finished_row0 = row0;
            if constexpr (kWithGrad) {
#pragma unroll
                for (int k = 0; k < kBlocks; ++k) {  // scaled_x, through the boxes in turn
                    unsigned char* const box = s_box + k % kBoxes * kBoxBytes;
                    if (leads) {
                        if (k == 0) ptx::bulk_wait_read<0>();
                        else ptx::bulk_wait_read<1>();
                    }
                    ptx::named_sync(1 + group, 128);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        uint32_t scaled[4];
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            scaled[i] = ptx::pack_bf16(scale[i % 2] * low_bf16(x[4 * k + j][i]), scale[i % 2] * high_bf16(x[4 * k + j][i]));
                        ptx::stmatrix_x4(patch_address(box, j), scaled[0], scaled[1], scaled[2], scaled[3]);
                    }
                    ptx::fence_async_shared();
                    ptx::named_sync(1 + group, 128);
                    if (leads) {
                        ptx::tma_store_2d(&scaled_x_map, box, k * kBlockDepth, row0);
                        ptx::bulk_commit();
                    }
                }
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

cudaError_t matrix_map(CUtensorMap* map, const void* base, uint64_t rows, uint64_t columns, uint32_t box_rows) {
    TensorMapDims dims{};
    dims.rank = 2;
    dims.size[0] = columns;
    dims.size[1] = rows;
    dims.stride_bytes[0] = 2 * columns;
    dims.box[0] = kBlockDepth;
    dims.box[1] = box_rows;
    return make_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, dims);
}

}  // namespace

cudaError_t linear_softcap_ce_fwd(const LinearSoftcapCEParams& p, cudaStream_t stream) {
    const bool with_grad = p.g != nullptr;
    CUtensorMap x_map{}, weight_map{}, g_map{}, scaled_x_map{};
    cudaError_t status = matrix_map(&x_map, p.x, p.n, kLinearSoftcapCEDepth, kTile);
    if (status == cudaSuccess) status = matrix_map(&weight_map, p.weight, p.v, kLinearSoftcapCEDepth, kTile / kCluster);
    if (status == cudaSuccess && with_grad) status = matrix_map(&g_map, p.g, p.n, p.v, 64);
    if (status == cudaSuccess && with_grad) status = matrix_map(&scaled_x_map, p.scaled_x, p.n, kLinearSoftcapCEDepth, 64);
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

    int device = 0, num_sms = 0;
    status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
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
    return cudaLaunchKernelEx(&config, kernel, p, Softcap(p.cap), x_map, weight_map, g_map, scaled_x_map);
}

}  // namespace pgolf
