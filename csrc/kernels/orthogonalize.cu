#include "kernels/orthogonalize.h"

#include <algorithm>
#include <vector>

#include "kernels/common/ptx.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/common/wgmma.cuh"

namespace pgolf {
namespace {

using namespace ptx;

// ---- norm and X_0 -----------------------------------------------------------------------------------

constexpr int kNormThreads = 256;
constexpr int kNormElements = kNormThreads * 8 * 8;  // of one block
constexpr int kNormInputs = 64;                      // of one launch

struct NormLaunch {
    OrthogonalizeInput inputs[kNormInputs];
    int32_t end_block[kNormInputs];
    int32_t count;
    double* partial_sums;  // of the first block
};

// Eight elements as the bf16 that the iteration sees.
template <typename T>
__device__ uint4 load_bf16x8(const T* p) {
    if constexpr (sizeof(T) == 2) {
        return __ldg(reinterpret_cast<const uint4*>(p));
    } else {
        const float4 a = __ldg(reinterpret_cast<const float4*>(p)), b = __ldg(reinterpret_cast<const float4*>(p) + 1);
        return {pack_bf16(a.x, a.y), pack_bf16(a.z, a.w), pack_bf16(b.x, b.y), pack_bf16(b.z, b.w)};
    }
}
__device__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ double block_sum(double x) {
    __shared__ double s_sum[kNormThreads / 32];
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (threadIdx.x % 32 == 0) s_sum[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < kNormThreads / 32; ++i) x += s_sum[i];
    return x;
}

// kScale false: this block's part of the sum of squares. kScale true: this block's part of X_0.
template <typename T, bool kScale>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const __grid_constant__ NormLaunch launch) {
    int index = 0;
    while (int(blockIdx.x) >= launch.end_block[index]) ++index;
    const OrthogonalizeInput& input = launch.inputs[index];
    const int first_block = index ? launch.end_block[index - 1] : 0;
    const int64_t begin = int64_t(blockIdx.x - first_block) * kNormElements + threadIdx.x * 8;
    const T* matrix = static_cast<const T*>(input.matrix);
    if constexpr (!kScale) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i < kNormElements; i += kNormThreads * 8) {
            if (begin + i >= input.elements) break;
            const uint4 v = load_bf16x8(matrix + begin + i);
            for (uint32_t pair : {v.x, v.y, v.z, v.w}) {
                const double low = low_bf16(pair), high = high_bf16(pair);
                sum += low * low + high * high;
            }
        }
        sum = block_sum(sum);
        if (threadIdx.x == 0) launch.partial_sums[blockIdx.x] = sum;
    } else {
        double sum = 0;
        for (int b = first_block + threadIdx.x; b < launch.end_block[index]; b += kNormThreads) sum += launch.partial_sums[b];
        const double norm = sqrt(block_sum(sum));
        // NOTE: in two steps, because 1 / norm may lie beyond the range of a float.
        const double inverse = norm == 0 ? 1 : 1 / norm;
        const float coarse = float(ldexp(1.0, ilogb(inverse) / 2)), fine = float(inverse / coarse);
#pragma unroll
        for (int i = 0; i < kNormElements; i += kNormThreads * 8) {
            if (begin + i >= input.elements) break;
            const uint4 v = load_bf16x8(matrix + begin + i);
            const auto scaled = [&](uint32_t pair) { return pack_bf16(low_bf16(pair) * coarse * fine, high_bf16(pair) * coarse * fine); };
            *reinterpret_cast<uint4*>(input.x + begin + i) = {scaled(v.x), scaled(v.y), scaled(v.z), scaled(v.w)};
        }
    }
}

// ---- the iteration ----------------------------------------------------------------------------------

constexpr int kTile = 128;                   // edge of an output tile
constexpr int kBox = 64;                     // edge of what one TMA instruction moves
constexpr int kBoxBytes = kBox * kBox * 2;
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kOperandBytes = kTile * kBox * 2;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kStages = 4;
constexpr int kTeams = 2;  // warpgroups, each with a tile of its own: one multiplies while the other stores
constexpr int kThreads = kTeams * 128 + 32;

enum Product : int { kGram, kPoly, kUpdate, kNoMore };

struct GroupMaps {
    CUtensorMap x[2], gram, poly, out;
    int32_t count, rows, columns, first_matrix;

    __host__ __device__ bool tall() const { return rows > columns; }
    __host__ __device__ int tiles(int edge) const { return (edge + kTile - 1) / kTile; }
    __host__ __device__ int narrow() const { return tall() ? columns : rows; }
    __host__ __device__ int wide() const { return tall() ? rows : columns; }
    __host__ __device__ int symmetric_tiles() const { return tiles(narrow()) * (tiles(narrow()) + 1) / 2; }
    __host__ __device__ int update_tiles() const { return tiles(rows) * tiles(columns); }
    __host__ __device__ int tiles_of(int product) const { return product == kUpdate ? update_tiles() : symmetric_tiles(); }
};

struct Iteration {
    GroupMaps groups[kOrthogonalizeMaxGroups];
    float coefficients[kOrthogonalizeMaxSteps][3];
    int32_t num_groups, num_steps, tasks_per_step;
    uint32_t* next_task;
    uint32_t* done;  // per matrix: tiles finished, over all products and steps
};

struct Task {
    int product, step, group, matrix;
    int row, column;     // of the tile, in tiles
    int first_k, num_k;  // the k blocks of 64, in the order first_k, first_k + 1, ..., num_k - 1, 0, ...
    uint32_t position;   // in the ring of stages, of the task's first k block
};

struct Shared {
    alignas(1024) uint8_t stages[kStages][kStageBytes];
    alignas(1024) uint8_t staging[kTeams][kTileBytes];
    Task task[kTeams];
    uint64_t full[kStages], empty[kStages], task_full[kTeams], task_empty[kTeams];
};

__device__ uint32_t load_acquire(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ void add_release(uint32_t* p, uint32_t v) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
// Between the copy engine's accesses to global memory and this thread's counter.
__device__ void fence_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The `index`-th task: by step, product, group, matrix, tile.
__device__ Task decode(const Iteration& it, uint32_t index) {
    Task task;
    if (index >= uint32_t(it.num_steps) * it.tasks_per_step) {
        task.product = kNoMore;
        return task;
    }
    task.step = index / it.tasks_per_step;
    index %= it.tasks_per_step;
    int tiles;
    for (task.product = kGram, task.group = 0;;) {
        tiles = it.groups[task.group].tiles_of(task.product);
        const uint32_t tasks = uint32_t(tiles) * it.groups[task.group].count;
        if (index < tasks) break;
        index -= tasks;
        if (++task.group == it.num_groups) task.group = 0, ++task.product;
    }
    const GroupMaps& group = it.groups[task.group];
    task.matrix = index / tiles;
    int tile = index % tiles;
    if (task.product == kUpdate) {
        task.row = tile / group.tiles(group.columns), task.column = tile % group.tiles(group.columns);
    } else {
        const int edge = group.tiles(group.narrow());
        for (task.row = 0; tile >= edge - task.row; ++task.row) tile -= edge - task.row;
        task.column = task.row + tile;
    }
    // Where the tile of gram or X that is added to the product is read as an operand anyway, it is read first.
    if (task.product == kGram) task.first_k = 0, task.num_k = (group.wide() + kBox - 1) / kBox;
    else task.first_k = 2 * (task.product == kUpdate && !group.tall() ? task.row : task.column), task.num_k = 2 * group.tiles(group.narrow());
    return task;
}

// Tiles of the task's matrix that must be finished before it may start: all of its earlier products.
__device__ uint32_t prerequisite(const GroupMaps& group, const Task& task) {
    const uint32_t symmetric = group.symmetric_tiles();
    return task.step * (2 * symmetric + group.update_tiles()) + task.product * symmetric;
}

// An operand of 128 rows (k-major) or columns (mn-major) of one 64-wide k block.
__device__ void load_operand(uint8_t* dst, const CUtensorMap& map, uint64_t* bar, bool k_major, int block, int k, int matrix) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int across = block * kTile + half * kBox;
        tma_load_3d(dst + half * kBoxBytes, &map, bar, k_major ? k * kBox : across, k_major ? across : k * kBox, matrix);
    }
}

__device__ void produce(const Iteration& it, Shared& s) {
    uint32_t position = 0, next = atomicAdd(it.next_task, 1);
    for (int n = 0;; ++n) {
        Task task = decode(it, next);
        const int team = n % kTeams, round = n / kTeams;
        task.position = position;
        mbarrier_wait(&s.task_empty[team], (round & 1) ^ 1);
        s.task[team] = task;
        mbarrier_arrive(&s.task_full[team]);
        if (task.product == kNoMore) {
            // The other team hears it too.
            const int other = (n + 1) % kTeams, other_round = (n + 1) / kTeams;
            mbarrier_wait(&s.task_empty[other], (other_round & 1) ^ 1);
            s.task[other] = task;
            mbarrier_arrive(&s.task_full[other]);
            return;
        }
        next = atomicAdd(it.next_task, 1);
        const GroupMaps& group = it.groups[task.group];
        const uint32_t need = prerequisite(group, task);
        while (load_acquire(&it.done[group.first_matrix + task.matrix]) < need) __nanosleep(20);
        fence_async_all();

        const CUtensorMap& x = group.x[task.step % 2];
        const bool tall = group.tall();
        for (int i = 0; i < task.num_k; ++i, ++position) {
            const int stage = position % kStages;
            int k = task.first_k + i;
            if (k >= task.num_k) k -= task.num_k;
            mbarrier_wait(&s.empty[stage], ((position / kStages) & 1) ^ 1);
            mbarrier_arrive_expect(&s.full[stage], kStageBytes);
            uint8_t* a = s.stages[stage];
            uint8_t* b = a + kOperandBytes;
            uint64_t* bar = &s.full[stage];
            if (task.product == kGram) {
                load_operand(a, x, bar, !tall, task.row, k, task.matrix);
                load_operand(b, x, bar, !tall, task.column, k, task.matrix);
            } else if (task.product == kPoly) {
                load_operand(a, group.gram, bar, true, task.row, k, task.matrix);
                load_operand(b, group.gram, bar, true, task.column, k, task.matrix);
            } else if (!tall) {
                load_operand(a, group.poly, bar, true, task.row, k, task.matrix);
                load_operand(b, x, bar, false, task.column, k, task.matrix);
            } else {
                load_operand(a, x, bar, true, task.row, k, task.matrix);
                load_operand(b, group.poly, bar, true, task.column, k, task.matrix);
            }
        }
    }
}

// A warpgroup's tile: [half of the rows][wgmma fragment of 64 x 128].
using Tile = float[2][64];

// Byte of column group `group` (8 columns) of row `row` in a 128-byte swizzled box.
__device__ __forceinline__ uint32_t swizzled(int row, int group) { return row * 128 + ((group ^ (row & 7)) << 4); }

// tile = factor * T, where T's box (half of rows, half of columns) lies at `box(half, column_half)`.
template <typename Box>
__device__ __forceinline__ void start_from(Tile& tile, float factor, const Box& box) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int column_half = 0; column_half < 2; ++column_half) {
            const uint8_t* p = box(half, column_half);
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int eight = 0; eight < 2; ++eight) {
                    const uint32_t pair = *reinterpret_cast<const uint32_t*>(p + swizzled(16 * warp + 8 * eight + lane / 4, j) + lane % 4 * 4);
                    float* d = &tile[half][4 * (8 * column_half + j) + 2 * eight];
                    d[0] = factor * low_bf16(pair), d[1] = factor * high_bf16(pair);
                }
        }
}

template <int kMajorA, int kMajorB>
__device__ __forceinline__ void multiply(Tile& tile, Shared& s, uint32_t position, int num_k) {
    constexpr int kStepA = kMajorA == wgmma::kMajorK ? 32 : 2048, kStepB = kMajorB == wgmma::kMajorK ? 32 : 2048;  // bytes of 16 k
    const auto release = [&](uint32_t p) {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(&s.empty[p % kStages]);
    };
    for (int i = 0; i < num_k; ++i, ++position) {
        const int stage = position % kStages;
        mbarrier_wait(&s.full[stage], (position / kStages) & 1);
        const uint8_t* a = s.stages[stage];
        const uint8_t* b = a + kOperandBytes;
        const uint64_t b_descriptor = kMajorB == wgmma::kMajorK ? wgmma::descriptor(b) : wgmma::descriptor_mn_major(b, kBoxBytes);
        wgmma::fence();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint8_t* box = a + half * kBoxBytes;
            const uint64_t a_descriptor = kMajorA == wgmma::kMajorK ? wgmma::descriptor(box) : wgmma::descriptor_mn_major(box, kBoxBytes);
#pragma unroll
            for (int k = 0; k < kBox / 16; ++k)
                wgmma::mma<kMajorA, kMajorB>(tile[half], wgmma::advance(a_descriptor, k * kStepA), wgmma::advance(b_descriptor, k * kStepB), true);
        }
        wgmma::commit();
        wgmma::wait<1>();
        if (i > 0) release(position - 1);
    }
    wgmma::wait<0>();
    wgmma::pin(tile[0]);
    wgmma::pin(tile[1]);
    release(position - 1);
}

// The tile in bf16, times `factor`, as four swizzled boxes [half of rows][half of columns]; or its transpose.
template <bool kTransposed>
__device__ __forceinline__ void stage_tile(const Tile& tile, float factor, uint8_t* staging) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const uint32_t base = smem_u32(staging);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
            const float* d = &tile[half][4 * j];
            const uint32_t r0 = pack_bf16(factor * d[0], factor * d[1]), r1 = pack_bf16(factor * d[2], factor * d[3]);
            const uint32_t r2 = pack_bf16(factor * d[4], factor * d[5]), r3 = pack_bf16(factor * d[6], factor * d[7]);
            // Lane l gives the address of row l % 8 of the fragment's l / 8-th 8 x 8 block: two blocks down, then two to the right.
            const int down = lane / 8 % 2, column_group = j + lane / 16;
            if constexpr (!kTransposed) {
                const int box = half * 2 + j / 8;
                stmatrix_x4(base + box * kBoxBytes + swizzled(16 * warp + 8 * down + lane % 8, column_group % 8), r0, r1, r2, r3);
            } else {
                const int box = j / 8 * 2 + half;
                stmatrix_x4_transposed(base + box * kBoxBytes + swizzled(column_group % 8 * 8 + lane % 8, 2 * warp + down), r0, r1, r2, r3);
            }
        }
}

__device__ __forceinline__ void store_staging(const CUtensorMap& map, const uint8_t* staging, int row, int column, int matrix) {
#pragma unroll
    for (int box = 0; box < 4; ++box)
        tma_store_3d(&map, staging + box * kBoxBytes, column * kTile + box % 2 * kBox, row * kTile + box / 2 * kBox, matrix);
    bulk_commit();
}

__device__ void consume(const Iteration& it, Shared& s, int team) {
    const bool leader = threadIdx.x % 128 == 0;
    const auto sync = [&] { named_sync(1 + team, 128); };
    uint8_t* staging = s.staging[team];
    for (int round = 0;; ++round) {
        mbarrier_wait(&s.task_full[team], round & 1);
        const Task task = s.task[team];
        mbarrier_arrive(&s.task_empty[team]);
        if (task.product == kNoMore) return;
        const GroupMaps& group = it.groups[task.group];
        const bool tall = group.tall();
        const float a = it.coefficients[task.step][0], b = it.coefficients[task.step][1], c = it.coefficients[task.step][2];

        Tile tile;
        float factor = 1;
        if (task.product == kGram) {
#pragma unroll
            for (int i = 0; i < 64; ++i) tile[0][i] = tile[1][i] = 0;
            if (tall) multiply<wgmma::kMajorMN, wgmma::kMajorMN>(tile, s, task.position, task.num_k);
            else multiply<wgmma::kMajorK, wgmma::kMajorK>(tile, s, task.position, task.num_k);
        } else {
            // The first two k blocks hold the tile of gram or X that is added.
            uint8_t* blocks[2];
            for (int i = 0; i < 2; ++i) {
                const uint32_t position = task.position + i;
                mbarrier_wait(&s.full[position % kStages], (position / kStages) & 1);
                blocks[i] = s.stages[position % kStages];
            }
            if (task.product == kUpdate && !tall) {  // a block is a half of rows, of operand B
                start_from(tile, a, [&](int half, int column_half) { return blocks[half] + kOperandBytes + column_half * kBoxBytes; });
                multiply<wgmma::kMajorK, wgmma::kMajorMN>(tile, s, task.position, task.num_k);
            } else {  // a block is a half of columns, of operand A
                factor = task.product == kPoly ? c : 1;
                start_from(tile, task.product == kPoly ? b / c : a, [&](int half, int column_half) { return blocks[column_half] + half * kBoxBytes; });
                multiply<wgmma::kMajorK, wgmma::kMajorK>(tile, s, task.position, task.num_k);
            }
        }

        const CUtensorMap& out = task.product == kGram        ? group.gram
                                 : task.product == kPoly      ? group.poly
                                 : task.step + 1 < it.num_steps ? group.x[(task.step + 1) % 2]
                                                                : group.out;
        stage_tile<false>(tile, factor, staging);
        fence_async_shared();
        sync();
        if (leader) store_staging(out, staging, task.row, task.column, task.matrix);
        if (task.product != kUpdate && task.row != task.column) {
            if (leader) bulk_wait_read<0>();
            sync();
            stage_tile<true>(tile, factor, staging);
            fence_async_shared();
            sync();
            if (leader) store_staging(out, staging, task.column, task.row, task.matrix);
        }
        if (leader) {
            bulk_wait<0>();
            fence_async_all();
            add_release(&it.done[group.first_matrix + task.matrix], 1);
        }
        sync();  // the staging is free
    }
}

__global__ void __launch_bounds__(kThreads, 1) orthogonalize_kernel(const __grid_constant__ Iteration it) {
    extern __shared__ uint8_t dynamic[];
    Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) / 1024 * 1024);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) mbarrier_init(&s.full[i], 1), mbarrier_init(&s.empty[i], 4);
        for (int i = 0; i < kTeams; ++i) mbarrier_init(&s.task_full[i], 1), mbarrier_init(&s.task_empty[i], 128);
        fence_mbarrier_init();
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp < kTeams * 4) consume(it, s, warp / 4);
    else if (threadIdx.x % 32 == 0) produce(it, s);
}

// ---- launch -----------------------------------------------------------------------------------------

int64_t norm_blocks(int64_t elements) { return (elements + kNormElements - 1) / kNormElements; }

template <typename T>
cudaError_t launch_norms(const OrthogonalizeParams& p, cudaStream_t stream) {
    double* partial_sums = p.partial_sums;
    for (int64_t first = 0; first < p.num_inputs; first += kNormInputs) {
        NormLaunch launch;
        launch.count = int32_t(std::min<int64_t>(kNormInputs, p.num_inputs - first));
        launch.partial_sums = partial_sums;
        int64_t blocks = 0;
        for (int i = 0; i < launch.count; ++i) {
            launch.inputs[i] = p.inputs[first + i];
            launch.end_block[i] = int32_t(blocks += norm_blocks(launch.inputs[i].elements));
        }
        partial_sums += blocks;
        norm_kernel<T, false><<<uint32_t(blocks), kNormThreads, 0, stream>>>(launch);
        norm_kernel<T, true><<<uint32_t(blocks), kNormThreads, 0, stream>>>(launch);
        const cudaError_t status = cudaGetLastError();
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

cudaError_t map_of(CUtensorMap* map, const __nv_bfloat16* base, int rows, int columns, int count) {
    TensorMapDims dims{};
    dims.rank = 3;
    dims.size[0] = columns, dims.size[1] = rows, dims.size[2] = count;
    dims.stride_bytes[0] = uint64_t(columns) * 2, dims.stride_bytes[1] = uint64_t(columns) * rows * 2;
    dims.box[0] = kBox, dims.box[1] = kBox, dims.box[2] = 1;
    return make_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, dims);
}

int num_multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

}  // namespace

int64_t orthogonalize_partial_sums(int64_t elements) { return norm_blocks(elements); }

cudaError_t orthogonalize(const OrthogonalizeParams& p, cudaStream_t stream) {
    cudaError_t status = p.inputs_are_float32 ? launch_norms<float>(p, stream) : launch_norms<__nv_bfloat16>(p, stream);
    if (status != cudaSuccess) return status;
    // Long chains first: their last products decide when all is done.
    std::vector<OrthogonalizeGroup> groups(p.groups, p.groups + p.num_groups);
    std::sort(groups.begin(), groups.end(), [](const auto& x, const auto& y) { return int64_t(x.rows) * x.columns > int64_t(y.rows) * y.columns; });
    constexpr int kSharedBytes = sizeof(Shared) + 1024;  // room to align
    status = cudaFuncSetAttribute(orthogonalize_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    uint32_t* counters = p.counters;
    for (size_t first = 0; first < groups.size() && status == cudaSuccess; first += kOrthogonalizeMaxGroups) {
        Iteration it{};
        it.num_groups = int32_t(std::min<size_t>(kOrthogonalizeMaxGroups, groups.size() - first));
        it.num_steps = int32_t(p.num_steps);
        for (int64_t i = 0; i < 3 * p.num_steps; ++i) it.coefficients[i / 3][i % 3] = float(p.coefficients[i]);
        it.next_task = counters;
        it.done = counters + kOrthogonalizeCounters;
        int32_t matrices = 0;
        for (int g = 0; g < it.num_groups && status == cudaSuccess; ++g) {
            const OrthogonalizeGroup& from = groups[first + g];
            GroupMaps& to = it.groups[g];
            to.count = from.count, to.rows = from.rows, to.columns = from.columns, to.first_matrix = matrices;
            matrices += from.count;
            it.tasks_per_step += from.count * (2 * to.symmetric_tiles() + to.update_tiles());
            const int m = to.narrow();
            for (int i = 0; i < 2 && status == cudaSuccess; ++i) status = map_of(&to.x[i], from.x[i], from.rows, from.columns, from.count);
            if (status == cudaSuccess) status = map_of(&to.gram, from.gram, m, m, from.count);
            if (status == cudaSuccess) status = map_of(&to.poly, from.poly, m, m, from.count);
            if (status == cudaSuccess) status = map_of(&to.out, from.out, from.rows, from.columns, from.count);
        }
        if (status != cudaSuccess) return status;
        status = cudaMemsetAsync(counters, 0, sizeof(uint32_t) * (kOrthogonalizeCounters + matrices), stream);
        if (status != cudaSuccess) return status;
        orthogonalize_kernel<<<num_multiprocessors(), kThreads, kSharedBytes, stream>>>(it);
        status = cudaGetLastError();
        counters += kOrthogonalizeCounters + matrices;
    }
    return status;
}

}  // namespace pgolf
