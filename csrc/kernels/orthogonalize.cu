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
constexpr int kNormVectors = 8;                      // of eight elements, that a thread has in flight
constexpr int kNormElements = kNormThreads * kNormVectors * 8;  // of one block
constexpr int kNormInputs = 120;                     // of one launch; a kernel parameter of at most 4 KB

struct NormLaunch {
    OrthogonalizeInput inputs[kNormInputs];
    int32_t end_block[kNormInputs];
    int32_t count;
    double* partial_sums;  // of the first block
};
static_assert(sizeof(NormLaunch) <= 4096);

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
    for (int high = launch.count - 1; index < high;) {
        const int middle = (index + high) / 2;
        if (int(blockIdx.x) < launch.end_block[middle]) high = middle;
        else index = middle + 1;
    }
    const OrthogonalizeInput& input = launch.inputs[index];
    const int first_block = index ? launch.end_block[index - 1] : 0;
    const int64_t begin = int64_t(blockIdx.x - first_block) * kNormElements + threadIdx.x * 8;
    const T* matrix = static_cast<const T*>(input.matrix);
    uint4 v[kNormVectors];
#pragma unroll
    for (int i = 0; i < kNormVectors; ++i) {
        const int64_t at = begin + i * kNormThreads * 8;
        v[i] = at < input.elements ? load_bf16x8(matrix + at) : uint4{};
    }
    if constexpr (!kScale) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i < kNormVectors; ++i)
            for (uint32_t pair : {v[i].x, v[i].y, v[i].z, v[i].w}) {
                const double low = low_bf16(pair), high = high_bf16(pair);
                sum += low * low + high * high;
            }
        sum = block_sum(sum);
        if (threadIdx.x == 0) launch.partial_sums[blockIdx.x] = sum;
    } else {
        double sum = 0;
        for (int b = first_block + threadIdx.x; b < launch.end_block[index]; b += kNormThreads) sum += launch.partial_sums[b];
        sum = block_sum(sum);
        __shared__ float s_coarse, s_fine;
        if (threadIdx.x == 0) {
            // NOTE: in two steps, because 1 / norm may lie beyond the range of a float.
            const double norm = sqrt(sum), inverse = norm == 0 ? 1 : 1 / norm;
            s_coarse = float(ldexp(1.0, ilogb(inverse) / 2));
            s_fine = float(inverse / s_coarse);
        }
        __syncthreads();
        const float coarse = s_coarse, fine = s_fine;
#pragma unroll
        for (int i = 0; i < kNormVectors; ++i) {
            for (uint32_t* pair : {&v[i].x, &v[i].y, &v[i].z, &v[i].w})
                *pair = pack_bf16(low_bf16(*pair) * coarse * fine, high_bf16(*pair) * coarse * fine);
            const int64_t at = begin + i * kNormThreads * 8;
            if (at < input.elements) *reinterpret_cast<uint4*>(input.x + at) = v[i];
        }
    }
}

// ---- the iteration ----------------------------------------------------------------------------------
//
// A task is one or two tiles of one product that share an operand; each is multiplied by a warpgroup of its own.
// What limits a 128 x 128 tile is the L2's bandwidth, so two tiles that share are half a third cheaper than two that do
// not. Few matrices leave multiprocessors idle: then every task is one tile, and the two warpgroups take turns.
//
//     product    tile          A                    B
//     gram       [own, shared] X rows own           X rows shared           (tall: columns)
//     poly       [own, shared] gram rows own        gram rows shared
//     update     [shared, own] poly rows shared     X columns own
//      (tall)    [own, shared] X rows own           poly rows shared
//
// The tile of gram or X that is added to the product is part of the own operand, at the k blocks of the shared tile's
// index: they are read first, and the accumulators start from them.

constexpr int kTile = 128;                   // edge of an output tile
constexpr int kBox = 64;                     // edge of what one TMA instruction moves
constexpr int kBoxBytes = kBox * kBox * 2;
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kSlotBytes = kTile * kBox * 2;  // one operand of one k block
constexpr int kSlots = 10;
constexpr int kInFlight = kSlots - 3;  // slots that may be on their way from memory; see load_operand
constexpr int kTeams = 2;  // warpgroups that multiply
constexpr int kLoader = kTeams * 4, kScheduler = kLoader + 1, kStorer = kLoader + 2;  // warps; one storer per team
constexpr int kThreads = (kStorer + kTeams) * 32;
constexpr int kAhead = 2;  // tasks that the scheduler keeps ready for the loader

enum Product : int { kGram, kPoly, kUpdate, kNoMore };

struct GroupMaps {
    CUtensorMap x[2], gram, poly, out;
    int32_t count, rows, columns, first_matrix;

    __host__ __device__ bool tall() const { return rows > columns; }
    __host__ __device__ int narrow_tiles() const { return ((tall() ? columns : rows) + kTile - 1) / kTile; }
    __host__ __device__ int wide_tiles() const { return ((tall() ? rows : columns) + kTile - 1) / kTile; }
    __host__ __device__ int symmetric_tiles() const { return narrow_tiles() * (narrow_tiles() + 1) / 2; }
    __host__ __device__ int update_tiles() const { return narrow_tiles() * wide_tiles(); }
    // Tasks of one matrix, of at most `width` tiles each.
    __host__ __device__ int tasks(int product, int width) const {
        if (product == kUpdate) return narrow_tiles() * ((wide_tiles() + width - 1) / width);
        int sum = 0;
        for (int left = narrow_tiles(); left > 0; --left) sum += (left + width - 1) / width;
        return sum;
    }
};

// The tasks of one product on one group; a step is a list of these.
struct Segment {
    uint32_t end;  // of its tasks, counted from the step's first
    int32_t product, group, tasks_per_matrix;
};

struct Iteration {
    GroupMaps groups[kOrthogonalizeMaxGroups];
    Segment segments[3 * kOrthogonalizeMaxGroups];
    float coefficients[kOrthogonalizeMaxSteps][3];
    int32_t num_groups, num_steps, width;
    uint32_t tasks_per_step;
    uint32_t* next_task;
    uint32_t* done;  // per matrix: tiles finished, over all products and steps
};

struct Task {
    int product, step, group, matrix;
    int shared, own, num_tiles;  // tile indices; of the first tile, if there are two
    int num_k;                   // k blocks of 64; poly and update begin at block 2 shared
};

// A task as a team sees it.
struct TeamTask : Task {
    uint32_t position, stride;  // of the shared operand's first k block in the ring of slots, and from one k block to the next
    int own_offset;             // from the shared operand's slot to the own operand's; 0 where they are the same
};

struct StoreTask {
    const CUtensorMap* map;
    uint32_t* done;  // counted up once stored, or null
    int row, column, matrix;
};

struct Shared {
    alignas(1024) uint8_t slots[kSlots][kSlotBytes];
    alignas(1024) uint8_t staging[kTeams][kTileBytes];
    Task ready[kAhead];
    TeamTask task[kTeams];
    StoreTask store[kTeams];
    uint64_t ready_full[kAhead], ready_empty[kAhead];
    uint64_t full[kSlots], empty[kSlots], task_full[kTeams], task_empty[kTeams], store_full[kTeams], store_empty[kTeams];
};

__device__ uint32_t load_acquire(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ void add_release(uint32_t* p, uint32_t v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Between the copy engine's accesses to global memory and this thread's counter.
__device__ void fence_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The `index`-th task: by step, product, group, matrix, shared tile.
__device__ Task decode(const Iteration& it, uint32_t index) {
    Task task;
    task.product = kNoMore;
    if (index >= it.num_steps * it.tasks_per_step) return task;
    task.step = index / it.tasks_per_step;
    index %= it.tasks_per_step;
    int segment = 0;
    while (index >= it.segments[segment].end) ++segment;
    if (segment > 0) index -= it.segments[segment - 1].end;
    task.product = it.segments[segment].product;
    task.group = it.segments[segment].group;
    const GroupMaps& group = it.groups[task.group];
    task.matrix = index / it.segments[segment].tasks_per_matrix;
    int left = index % it.segments[segment].tasks_per_matrix;
    for (task.shared = 0;; ++task.shared) {
        const int first = task.product == kUpdate ? 0 : task.shared;
        const int last = task.product == kUpdate ? group.wide_tiles() : group.narrow_tiles();
        const int here = (last - first + it.width - 1) / it.width;
        if (left < here) {
            task.own = first + left * it.width;
            task.num_tiles = min(it.width, last - task.own);
            break;
        }
        left -= here;
    }
    const int wide = group.tall() ? group.rows : group.columns;
    task.num_k = task.product == kGram ? (wide + kBox - 1) / kBox : 2 * group.narrow_tiles();
    return task;
}

// Tiles of the task's matrix that must be finished before it may start: all of its earlier products.
__device__ uint32_t prerequisite(const GroupMaps& group, const Task& task) {
    const uint32_t symmetric = group.symmetric_tiles();
    return task.step * (2 * symmetric + group.update_tiles()) + task.product * symmetric;
}

// 128 rows (k-major) or columns (mn-major) of one k block, into the next slot.
//
// NOTE: a team does not look at the slots of the other team's operands, and a parity tells a phase from its neighbours only. A team
// that waits for position p has seen p - 3 at least, or has its task from after the loads up to p - 3 were issued; so the load of
// p - kSlots must be complete by then, or the slot's phase before it would pass for the one waited for.
__device__ void load_operand(Shared& s, uint32_t& position, const CUtensorMap& map, bool k_major, int tile, int k, int matrix) {
    const uint32_t slot = position % kSlots;
    if (position >= kInFlight) mbarrier_wait(&s.full[(position - kInFlight) % kSlots], (position - kInFlight) / kSlots & 1);
    mbarrier_wait(&s.empty[slot], ((position / kSlots) & 1) ^ 1);
    mbarrier_arrive_expect(&s.full[slot], kSlotBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int across = tile * kTile + half * kBox;
        const int column = k_major ? k * kBox : across, row = k_major ? across : k * kBox;
        tma_load_3d(s.slots[slot] + half * kBoxBytes, &map, &s.full[slot], column, row, matrix);
    }
    ++position;
}

// Takes tasks from the queue and hands them on once they may start, while the loader still works on earlier ones.
__device__ void schedule(const Iteration& it, Shared& s) {
    uint32_t next = atomicAdd(it.next_task, 1);
    for (int n = 0;; ++n) {
        const Task task = decode(it, next);
        if (task.product != kNoMore) {
            next = atomicAdd(it.next_task, 1);
            const GroupMaps& group = it.groups[task.group];
            const uint32_t need = prerequisite(group, task);
            while (load_acquire(&it.done[group.first_matrix + task.matrix]) < need) __nanosleep(20);
        }
        const int place = n % kAhead;
        mbarrier_wait(&s.ready_empty[place], ((n / kAhead) & 1) ^ 1);
        s.ready[place] = task;
        mbarrier_arrive(&s.ready_full[place]);
        if (task.product == kNoMore) return;
    }
}

__device__ void load_tasks(const Iteration& it, Shared& s) {
    uint32_t position = 0, rounds[kTeams] = {};
    const auto hand_over = [&](int team, const TeamTask& task) {
        mbarrier_wait(&s.task_empty[team], (rounds[team]++ & 1) ^ 1);
        s.task[team] = task;
        mbarrier_arrive(&s.task_full[team]);
    };
    for (int n = 0;; ++n) {
        const int place = n % kAhead;
        mbarrier_wait(&s.ready_full[place], (n / kAhead) & 1);
        TeamTask task;
        static_cast<Task&>(task) = s.ready[place];
        mbarrier_arrive(&s.ready_empty[place]);
        fence_async_all();
        if (task.product == kNoMore) {
            for (int team = 0; team < kTeams; ++team) hand_over(team, task);
            return;
        }
        const bool same = task.product != kUpdate && task.own == task.shared;  // on the diagonal, of the first tile
        task.position = position;
        task.stride = 1 + task.num_tiles - same;
        for (int i = 0; i < task.num_tiles; ++i) {
            TeamTask mine = task;
            mine.own += i;
            mine.own_offset = 1 + i - same;
            hand_over(task.num_tiles == 2 ? i : n % kTeams, mine);
        }

        const GroupMaps& group = it.groups[task.group];
        const CUtensorMap& x = group.x[task.step % 2];
        const CUtensorMap& shared = task.product == kGram ? x : task.product == kPoly ? group.gram : group.poly;
        const CUtensorMap& own = task.product == kPoly ? group.gram : x;
        const bool shared_k_major = task.product != kGram || !group.tall();
        const bool own_k_major = task.product == kPoly || (task.product == kGram) != group.tall();
        int k = task.product == kGram ? 0 : 2 * task.shared;
        for (int i = 0; i < task.num_k; ++i) {
            load_operand(s, position, shared, shared_k_major, task.shared, k, task.matrix);
            for (int tile = same; tile < task.num_tiles; ++tile)
                load_operand(s, position, own, own_k_major, task.own + tile, k, task.matrix);
            if (++k == task.num_k) k = 0;
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
                    const uint32_t byte = swizzled(16 * warp + 8 * eight + lane / 4, j) + lane % 4 * 4;
                    const uint32_t pair = *reinterpret_cast<const uint32_t*>(p + byte);
                    float* d = &tile[half][4 * (8 * column_half + j) + 2 * eight];
                    d[0] = factor * low_bf16(pair), d[1] = factor * high_bf16(pair);
                }
        }
}

__device__ __forceinline__ uint8_t* wait_for_slot(Shared& s, uint32_t position) {
    mbarrier_wait(&s.full[position % kSlots], (position / kSlots) & 1);
    return s.slots[position % kSlots];
}

// Every slot hears from 8 warps: once from each of two teams that share it, twice from each warp of a team alone.
__device__ __forceinline__ void release_slot(Shared& s, uint32_t position, int times) {
    if (threadIdx.x % 32 == 0)
        for (int i = 0; i < times; ++i) mbarrier_arrive(&s.empty[position % kSlots]);
}

template <int kMajorA, int kMajorB>
__device__ __forceinline__ void multiply(Tile& tile, Shared& s, const TeamTask& task, bool own_is_a) {
    constexpr int kStepA = kMajorA == wgmma::kMajorK ? 32 : 2048, kStepB = kMajorB == wgmma::kMajorK ? 32 : 2048;  // bytes of 16 k
    const auto release = [&](uint32_t position) {
        release_slot(s, position, 3 - task.num_tiles);
        if (task.own_offset > 0) release_slot(s, position + task.own_offset, 2);
    };
    uint32_t position = task.position;
    for (int i = 0; i < task.num_k; ++i, position += task.stride) {
        const uint8_t* shared = wait_for_slot(s, position);
        const uint8_t* own = task.own_offset > 0 ? wait_for_slot(s, position + task.own_offset) : shared;
        const uint8_t* a = own_is_a ? own : shared;
        const uint8_t* b = own_is_a ? shared : own;
        const uint64_t b_descriptor = kMajorB == wgmma::kMajorK ? wgmma::descriptor(b) : wgmma::descriptor_mn_major(b, kBoxBytes);
        wgmma::fence();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint8_t* box = a + half * kBoxBytes;
            const uint64_t a_descriptor = kMajorA == wgmma::kMajorK ? wgmma::descriptor(box) : wgmma::descriptor_mn_major(box, kBoxBytes);
#pragma unroll
            for (int k = 0; k < kBox / 16; ++k)
                wgmma::mma<kMajorA, kMajorB>(tile[half], wgmma::advance(a_descriptor, k * kStepA), wgmma::advance(b_descriptor, k * kStepB),
                                             true);
        }
        wgmma::commit();
        wgmma::wait<1>();
        if (i > 0) release(position - task.stride);
    }
    wgmma::wait<0>();
    wgmma::pin(tile[0]);
    wgmma::pin(tile[1]);
    release(position - task.stride);
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

__device__ void consume(const Iteration& it, Shared& s, int team) {
    uint32_t stores = 0;
    const auto store = [&](const CUtensorMap* map, uint32_t* done, int row, int column, int matrix, const auto& stage) {
        mbarrier_wait(&s.store_empty[team], (stores++ & 1) ^ 1);
        stage(s.staging[team]);
        fence_async_shared();
        if (threadIdx.x % 128 == 0) s.store[team] = {map, done, row, column, matrix};
        mbarrier_arrive(&s.store_full[team]);
    };
    for (int round = 0;; ++round) {
        mbarrier_wait(&s.task_full[team], round & 1);
        const TeamTask task = s.task[team];
        mbarrier_arrive(&s.task_empty[team]);
        if (task.product == kNoMore) {
            store(nullptr, nullptr, 0, 0, 0, [](uint8_t*) {});
            return;
        }
        const GroupMaps& group = it.groups[task.group];
        const bool tall = group.tall(), wide_update = task.product == kUpdate && !tall;
        const float a = it.coefficients[task.step][0], b = it.coefficients[task.step][1], c = it.coefficients[task.step][2];

        Tile tile;
        float factor = 1;
        if (task.product == kGram) {
#pragma unroll
            for (int i = 0; i < 64; ++i) tile[0][i] = tile[1][i] = 0;
            if (tall) multiply<wgmma::kMajorMN, wgmma::kMajorMN>(tile, s, task, true);
            else multiply<wgmma::kMajorK, wgmma::kMajorK>(tile, s, task, true);
        } else {
            const uint8_t* block[2];
            for (int i = 0; i < 2; ++i) block[i] = wait_for_slot(s, task.position + i * task.stride + task.own_offset);
            if (wide_update) {  // a k block is a half of the tile's rows
                start_from(tile, a, [&](int half, int column_half) { return block[half] + column_half * kBoxBytes; });
                multiply<wgmma::kMajorK, wgmma::kMajorMN>(tile, s, task, false);
            } else {  // a k block is a half of the tile's columns
                factor = task.product == kPoly ? c : 1;
                const float weight = task.product == kPoly ? b / c : a;
                start_from(tile, weight, [&](int half, int column_half) { return block[column_half] + half * kBoxBytes; });
                multiply<wgmma::kMajorK, wgmma::kMajorK>(tile, s, task, true);
            }
        }

        const CUtensorMap* out = task.product == kGram         ? &group.gram
                                 : task.product == kPoly       ? &group.poly
                                 : task.step + 1 < it.num_steps ? &group.x[(task.step + 1) % 2]
                                                                : &group.out;
        uint32_t* done = &it.done[group.first_matrix + task.matrix];
        const int row = wide_update ? task.shared : task.own, column = wide_update ? task.own : task.shared;
        const bool mirror = task.product != kUpdate && row != column;
        store(out, mirror ? nullptr : done, row, column, task.matrix, [&](uint8_t* staging) { stage_tile<false>(tile, factor, staging); });
        if (mirror) store(out, done, column, row, task.matrix, [&](uint8_t* staging) { stage_tile<true>(tile, factor, staging); });
    }
}

// Stores what a team has staged, and reports a tile as done once it and its mirror image are in memory.
__device__ void store_tiles(Shared& s, int team) {
    for (int round = 0;; ++round) {
        mbarrier_wait(&s.store_full[team], round & 1);
        const StoreTask task = s.store[team];
        if (task.map == nullptr) return;
#pragma unroll
        for (int box = 0; box < 4; ++box) {
            const int column = task.column * kTile + box % 2 * kBox, row = task.row * kTile + box / 2 * kBox;
            tma_store_3d(task.map, s.staging[team] + box * kBoxBytes, column, row, task.matrix);
        }
        bulk_commit();
        bulk_wait_read<0>();
        mbarrier_arrive(&s.store_empty[team]);
        if (task.done != nullptr) {
            bulk_wait<0>();
            fence_async_all();
            add_release(task.done, 1);
        }
    }
}

__global__ void __launch_bounds__(kThreads, 1) orthogonalize_kernel(const __grid_constant__ Iteration it) {
    extern __shared__ uint8_t dynamic[];
    Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) / 1024 * 1024);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSlots; ++i) mbarrier_init(&s.full[i], 1), mbarrier_init(&s.empty[i], 8);
        for (int i = 0; i < kAhead; ++i) mbarrier_init(&s.ready_full[i], 1), mbarrier_init(&s.ready_empty[i], 1);
        for (int i = 0; i < kTeams; ++i) {
            mbarrier_init(&s.task_full[i], 1), mbarrier_init(&s.task_empty[i], 128);
            mbarrier_init(&s.store_full[i], 128), mbarrier_init(&s.store_empty[i], 1);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp < kTeams * 4) consume(it, s, warp / 4);
    else if (threadIdx.x % 32 != 0) return;
    else if (warp == kLoader) load_tasks(it, s);
    else if (warp == kScheduler) schedule(it, s);
    else store_tiles(s, warp - kStorer);
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
    const auto size = [](const OrthogonalizeGroup& g) { return int64_t(g.rows) * g.columns; };
    std::sort(groups.begin(), groups.end(), [&](const auto& x, const auto& y) { return size(x) > size(y); });
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
        int64_t tiles_per_product = 0;
        for (int g = 0; g < it.num_groups && status == cudaSuccess; ++g) {
            const OrthogonalizeGroup& from = groups[first + g];
            GroupMaps& to = it.groups[g];
            to.count = from.count, to.rows = from.rows, to.columns = from.columns, to.first_matrix = matrices;
            matrices += from.count;
            tiles_per_product += from.count * to.symmetric_tiles();
            const int m = std::min(from.rows, from.columns);
            for (int i = 0; i < 2 && status == cudaSuccess; ++i) status = map_of(&to.x[i], from.x[i], from.rows, from.columns, from.count);
            if (status == cudaSuccess) status = map_of(&to.gram, from.gram, m, m, from.count);
            if (status == cudaSuccess) status = map_of(&to.poly, from.poly, m, m, from.count);
            if (status == cudaSuccess) status = map_of(&to.out, from.out, from.rows, from.columns, from.count);
        }
        if (status != cudaSuccess) return status;
        it.width = tiles_per_product >= 2 * num_multiprocessors() ? 2 : 1;
        for (int product : {kGram, kPoly, kUpdate})
            for (int g = 0; g < it.num_groups; ++g) {
                const int tasks = it.groups[g].tasks(product, it.width);
                it.tasks_per_step += it.groups[g].count * tasks;
                it.segments[product * it.num_groups + g] = {it.tasks_per_step, product, g, tasks};
            }
        status = cudaMemsetAsync(counters, 0, sizeof(uint32_t) * (kOrthogonalizeCounters + matrices), stream);
        if (status != cudaSuccess) return status;
        orthogonalize_kernel<<<num_multiprocessors(), kThreads, kSharedBytes, stream>>>(it);
        status = cudaGetLastError();
        counters += kOrthogonalizeCounters + matrices;
    }
    return status;
}

}  // namespace pgolf
