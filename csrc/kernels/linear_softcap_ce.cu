// One CTA owns kTile rows of x, in shared memory for good, and streams all of the weight past them:
//
//     producer warps      x once per row tile; the weight in blocks of kTile rows x kBlockDepth, through a ring
//     2 warpgroups        64 rows of x each. While the tensor cores make the next tile's logits in one half of the
//                         accumulators, the other half becomes exponentials, row sums and G.
//
// Clusters of two CTAs share the weight: each loads half of every block and multicasts it.
#include "kernels/linear_softcap_ce.h"

#include "kernels/common/softcap.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/common/wgmma.cuh"
#include "kernels/softcap_ce.cuh"

namespace pgolf {
namespace {

constexpr int kCluster = 2;
constexpr int kTile = 128;       // rows of x per CTA, rows of weight per step
constexpr int kBlockDepth = 64;  // one 128-byte swizzled row
constexpr int kBlocks = kLinearSoftcapCEDepth / kBlockDepth;
constexpr int kBlockBytes = kTile * kBlockDepth * 2;
constexpr int kGroupBytes = kBlockBytes / 2;  // 64 rows: one warpgroup's part of a block of x; one box of G
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 128 + 32 * kConsumerWarps;

__host__ __device__ constexpr int num_stages(bool with_grad) { return with_grad ? 5 : 6; }
constexpr int shared_bytes(bool with_grad) {
    return 1024 + kBlocks * kBlockBytes + num_stages(with_grad) * kBlockBytes + (with_grad ? 2 * kGroupBytes : 0);
}

template <bool kWithGrad>
__global__ void __launch_bounds__(kThreads, 1)
    linear_softcap_ce_kernel(const LinearSoftcapCEParams p, const Softcap softcap, const __grid_constant__ CUtensorMap x_map,
                             const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap g_map) {
    constexpr int kStages = num_stages(kWithGrad);
    extern __shared__ unsigned char s_memory[];
    unsigned char* const s_x = s_memory + (1024 - ptx::smem_u32(s_memory) % 1024) % 1024;  // [kBlocks] blocks
    unsigned char* const s_ring = s_x + kBlocks * kBlockBytes;                            // [kStages] blocks
    unsigned char* const s_g = s_ring + kStages * kBlockBytes;                            // [2 warpgroups] boxes of 64 x 64
    __shared__ uint64_t s_x_full, s_x_free, s_full[kStages], s_free[kStages];
    __shared__ bool s_last;

    const int rank = ptx::cluster_rank();
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int num_tiles = p.v / kTile;
    const uint32_t num_clusters = gridDim.x / kCluster;
    const uint32_t num_row_blocks = (p.n + kCluster * kTile - 1) / (kCluster * kTile);

    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&s_x_full, 1);
        ptx::mbarrier_init(&s_x_free, kConsumerWarps);
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(&s_full[stage], 1);
            ptx::mbarrier_init(&s_free[stage], kConsumerWarps * kCluster);
        }
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();

    if (warpgroup == 0) {
        ptx::registers_decrease<24>();
        if (warp == 0 && lane == 0) {
            uint32_t fill = 0;
            for (uint32_t block = blockIdx.x / kCluster; block < num_row_blocks; block += num_clusters) {
                for (int step = 0; step < num_tiles * kBlocks; ++step, ++fill) {
                    const uint32_t stage = fill % kStages;
                    ptx::mbarrier_wait(&s_free[stage], (fill / kStages & 1) ^ 1);
                    ptx::mbarrier_arrive_expect(&s_full[stage], kBlockBytes);
                    ptx::tma_load_2d_multicast(s_ring + stage * kBlockBytes + rank * kGroupBytes, &weight_map, &s_full[stage],
                                               step % kBlocks * kBlockDepth, step / kBlocks * kTile + rank * (kTile / kCluster), (1 << kCluster) - 1);
                }
            }
        } else if (warp == 1 && lane == 0) {
            uint32_t fill = 0;
            for (uint32_t block = blockIdx.x / kCluster; block < num_row_blocks; block += num_clusters, ++fill) {
                ptx::mbarrier_wait(&s_x_free, (fill & 1) ^ 1);
                ptx::mbarrier_arrive_expect(&s_x_full, kBlocks * kBlockBytes);
                for (int k = 0; k < kBlocks; ++k)
                    ptx::tma_load_2d(s_x + k * kBlockBytes, &x_map, &s_x_full, k * kBlockDepth, (block * kCluster + rank) * kTile);
            }
        }
        __syncwarp();
    } else {
        ptx::registers_increase<240>();
        const int group = warpgroup - 1, quad = lane % 4;
        const uint64_t x_descriptor = wgmma::descriptor(s_x + group * kGroupBytes), ring_descriptor = wgmma::descriptor(s_ring);
        unsigned char* const s_box = s_g + group * kGroupBytes;
        // stmatrix: this lane's row of the 16 x 16 patch, and which of its two 8-column halves
        const int patch_row = warp * 16 + lane / 8 % 2 * 8 + lane % 8, patch_half = lane / 16;
        const float weight = mean_weight(p);
        double loss_sum = 0;
        uint32_t used = 0;   // ring steps consumed
        uint32_t round = 0;  // row blocks consumed

        const auto release = [&](uint32_t step) {
            if (lane == 0)
                for (int r = 0; r < kCluster; ++r) ptx::mbarrier_arrive_cluster(&s_free[step % kStages], r);
        };
        // One tile's logits into `acc`; `between(block)` runs while the tensor cores work.
        const auto multiply = [&](float (&acc)[64], auto&& between) {
#pragma unroll
            for (int block = 0; block < kBlocks; ++block, ++used) {
                const uint32_t stage = used % kStages;
                ptx::mbarrier_wait(&s_full[stage], used / kStages & 1);
                wgmma::fence();
#pragma unroll
                for (int k = 0; k < kBlockDepth / 16; ++k)
                    wgmma::mma(acc, wgmma::advance(x_descriptor, block * kBlockBytes + 32 * k),
                               wgmma::advance(ring_descriptor, stage * kBlockBytes + 32 * k), block + k > 0);
                wgmma::commit();
                between(block);
                if (block > 0) {
                    wgmma::wait<1>();
                    release(used - 1);
                }
            }
        };

        for (uint32_t block = blockIdx.x / kCluster; block < num_row_blocks; block += num_clusters, ++round) {
            const uint32_t row0 = (block * kCluster + rank) * kTile + group * 64;  // of this warpgroup
            float sum[2] = {0.f, 0.f};                                             // of rows warp * 16 + lane / 4 and that + 8
            ptx::mbarrier_wait(&s_x_full, round & 1);

            // Columns 16 part to 16 part + 15 of a finished tile.
            const auto epilogue = [&](float (&acc)[64], int tile, int part) {
                if constexpr (kWithGrad) {
                    if (part % 4 == 0) {  // what the box held before has left shared memory
                        if (warp == 0 && lane == 0) ptx::bulk_wait_read<0>();
                        ptx::named_sync(1 + group, 128);
                    }
                }
                float x[8], t[8], g[8];
                float largest = 0.f;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    x[i] = acc[8 * part + i];
                    largest = fmaxf(largest, fabsf(x[i]));
                }
                if (__all_sync(0xffffffffu, largest <= softcap.near)) {
                    softcap.tanh_near(t, x);
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) t[i] = softcap.tanh(x[i]);
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float e = softcap.exponential(t[i]);
                    sum[i / 2 % 2] += e;
                    g[i] = e * softcap_slope(t[i]);
                }
                if constexpr (kWithGrad) {
                    const uint32_t column = 2 * (part % 4) + patch_half;  // 16-byte column of the box
                    const uint32_t address = ptx::smem_u32(s_box) + patch_row * 128 + ((column ^ (patch_row % 8)) << 4);
                    ptx::stmatrix_x4(address, ptx::pack_bf16(g[0], g[1]), ptx::pack_bf16(g[2], g[3]), ptx::pack_bf16(g[4], g[5]),
                                     ptx::pack_bf16(g[6], g[7]));
                    if (part % 4 == 3) {
                        ptx::fence_async_shared();
                        ptx::named_sync(1 + group, 128);
                        if (warp == 0 && lane == 0) {
                            ptx::tma_store_2d(&g_map, s_box, tile * kTile + part / 4 * 64, row0);
                            ptx::bulk_commit();
                        }
                    }
                }
            };

            float even[64], odd[64];
            multiply(even, [](int) {});
            for (int tile = 1;; tile += 2) {
                wgmma::wait<0>();
                release(used - 1);
                wgmma::pin(even);
                multiply(odd, [&](int part) { epilogue(even, tile - 1, part); });
                if (tile + 1 == num_tiles) break;
                wgmma::wait<0>();
                release(used - 1);
                wgmma::pin(odd);
                multiply(even, [&](int part) { epilogue(odd, tile, part); });
            }
            wgmma::wait<0>();
            release(used - 1);
            wgmma::pin(odd);
#pragma unroll
            for (int part = 0; part < kBlocks; ++part) epilogue(odd, num_tiles - 1, part);

            // Rows are complete. The four lanes of a quad hold the same two rows.
            if constexpr (kWithGrad) {
                if (warp == 0 && lane == 0) ptx::bulk_wait<0>();  // NOTE: before G's target elements are overwritten below
                ptx::named_sync(1 + group, 128);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int local = warp * 16 + half * 8 + lane / 4;
                const uint32_t row = row0 + local;
                const int target = row < p.n ? target_of(p.targets[row], p) : kIgnored;
                float logit = 0.f;
                const uint4* w = reinterpret_cast<const uint4*>(p.weight + int64_t(max(target, 0)) * kLinearSoftcapCEDepth);
#pragma unroll 4
                for (int c = quad; c < kLinearSoftcapCEDepth / 8; c += 4) {
                    const uint4 b = __ldg(w + c);
                    const uint4 a = *reinterpret_cast<const uint4*>(s_x + c / 8 * kBlockBytes + group * kGroupBytes + local * 128 + ((c % 8 ^ local % 8) << 4));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        logit = fmaf(low_bf16((&a.x)[i]), low_bf16((&b.x)[i]), logit);
                        logit = fmaf(high_bf16((&a.x)[i]), high_bf16((&b.x)[i]), logit);
                    }
                }
                float total = sum[half];
#pragma unroll
                for (int offset = 1; offset < 4; offset *= 2) {
                    logit += __shfl_xor_sync(0xffffffffu, logit, offset);
                    total += __shfl_xor_sync(0xffffffffu, total, offset);
                }
                if (quad == 0 && row < p.n) {
                    const float t = softcap.tanh(logit);
                    const float loss = target == kIgnored ? 0.f : or_nan(logf(total) - p.cap * t, target);
                    if (p.reduction == SoftcapCEReduction::kNone) p.loss[row] = loss;
                    loss_sum += loss;
                    if constexpr (kWithGrad) {
                        p.row_scale[row] = target == kIgnored ? 0.f : or_nan(weight / total, target);
                        if (target >= 0)
                            p.g[int64_t(row) * p.v + target] = __float2bfloat16_rn((softcap.exponential(t) - total) * softcap_slope(t));
                    }
                }
            }
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(&s_x_free);
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

__global__ void __launch_bounds__(256) scale_rows_kernel(uint4* out, const uint4* x, const float* scale, int64_t n) {
    constexpr int kRowVectors = kLinearSoftcapCEDepth / 8;
    const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i >= n * kRowVectors) return;
    const float s = scale[i / kRowVectors];
    uint4 v = x[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) (&v.x)[j] = ptx::pack_bf16(s * low_bf16((&v.x)[j]), s * high_bf16((&v.x)[j]));
    out[i] = v;
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
    CUtensorMap x_map{}, weight_map{}, g_map{};
    cudaError_t status = matrix_map(&x_map, p.x, p.n, kLinearSoftcapCEDepth, kTile);
    if (status == cudaSuccess) status = matrix_map(&weight_map, p.weight, p.v, kLinearSoftcapCEDepth, kTile / kCluster);
    if (status == cudaSuccess && with_grad) status = matrix_map(&g_map, p.g, p.n, p.v, 64);
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
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kCluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kCluster * min(wanted, uint32_t(num_sms / kCluster)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes(with_grad);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, p, Softcap(p.cap), x_map, weight_map, g_map);
}

cudaError_t linear_softcap_ce_scale_rows(__nv_bfloat16* out, const __nv_bfloat16* x, const float* scale, int64_t n, cudaStream_t stream) {
    const int64_t ctas = (n * kLinearSoftcapCEDepth / 8 + 255) / 256;
    if (ctas == 0) return cudaSuccess;
    scale_rows_kernel<<<unsigned(ctas), 256, 0, stream>>>(reinterpret_cast<uint4*>(out), reinterpret_cast<const uint4*>(x), scale, n);
    return cudaGetLastError();
}

}  // namespace pgolf
