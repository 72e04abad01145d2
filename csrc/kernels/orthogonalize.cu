#include "kernels/orthogonalize.h"

#include <algorithm>
#include <vector>

#include "kernels/common/launch.h"
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
    int32_t count, num_counters;
    uint32_t* counters;    // to be zeroed on the way
    double* partial_sums;  // of the first block
};
static_assert(sizeof(NormLaunch) <= 4096);

// Eight elements as the bf16 that the published iteration sees.
template <typename T>
__device__ uint4 load_bf16x8(const T* p) {
    if constexpr (sizeof(T) == 2) {
        return __ldg(reinterpret_cast<const uint4*>(p));
    } else {
        const float4 a = __ldg(reinterpret_cast<const float4*>(p)), b = __ldg(reinterpret_cast<const float4*>(p) + 1);
        return {pack_bf16(a.x, a.y), pack_bf16(a.z, a.w), pack_bf16(b.x, b.y), pack_bf16(b.z, b.w)};
    }
}

// Two floats to one register of two fp16, `low` in the low half.
__device__ uint32_t pack_fp16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ float2 unpack_fp16(uint32_t pair) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }

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
        if (blockIdx.x == 0)
            for (int i = threadIdx.x; i < launch.num_counters; i += kNormThreads) launch.counters[i] = 0;
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
                *pair = pack_fp16(low_bf16(*pair) * coarse * fine, high_bf16(*pair) * coarse * fine);
            const int64_t at = begin + i * kNormThreads * 8;
            if (at < input.elements) *reinterpret_cast<uint4*>(input.x + at) = v[i];
        }
    }
}

// ---- the iteration ----------------------------------------------------------------------------------
//
// A task is two tiles of one product that share an operand, and each of two warpgroups multiplies one; or it is one tile, and
// each multiplies half of its rows. What limits a 128 x 128 tile is the L2's bandwidth, so two tiles that share are a quarter
// cheaper than two that do not. Few matrices leave multiprocessors idle: then every task is one tile.
//
//     product       tile           A                  B
//     gram          [own, shared]  X rows own         X rows shared      (tall: columns)
//     polynomial    [own, shared]  R rows own         R rows shared
//     square        [own, shared]  left rows own      right rows shared
//     update        [shared, own]  P rows shared      X columns own
//      (tall)       [own, shared]  X rows own         P rows shared
//
// The tile of R that is added to the polynomial is part of the own operand, at the k blocks of the shared tile's index: they are
// read first, and the accumulators start from them.

constexpr int kTile = 128;                   // edge of an output tile
constexpr int kBox = 64;                     // edge of what one TMA instruction moves
constexpr int kBoxBytes = kBox * kBox * 2;
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kSlotBytes = kTile * kBox * 2;  // one operand of one k block
constexpr int kSlots = 10;
constexpr int kInFlight = kSlots - 3;  // slots that may be on their way from memory; one more hangs, see load_tasks
constexpr int kTeams = 2;  // warpgroups that multiply
constexpr int kLoader = kTeams * 4, kScheduler = kLoader + 1, kStorer = kLoader + 2;  // warps; one storer per team
constexpr int kThreads = (kStorer + kTeams) * 32;
constexpr int kAhead = 2;  // tasks that the scheduler keeps ready for the loader

enum Kind : uint8_t { kGram, kPolynomial, kSquare, kUpdate, kNoMore };

// One product of a matrix's program. Squares are named by their place among the kOrthogonalizeSquares.
struct Product {
    uint8_t kind, step;
    uint8_t left, right, out;  // squares; of an update, `left` is P
    uint8_t squares_before, updates_before;  // products of either size that come earlier
    bool last;
};

// What happens to a matrix, in this order.
struct Program {
    static constexpr int kMaxLength = 7 * ((kOrthogonalizeMaxSteps + 1) / 2);
    Product products[kMaxLength];
    int32_t length;

    void add(Kind kind, int step, int left, int right, int out) {
        const Product* previous = length > 0 ? &products[length - 1] : nullptr;
        const bool after_update = previous && previous->kind == kUpdate;
        products[length++] = {kind, uint8_t(step), uint8_t(left), uint8_t(right), uint8_t(out),
                              uint8_t(previous ? previous->squares_before + !after_update : 0),
                              uint8_t(previous ? previous->updates_before + after_update : 0), false};
    }
};

struct GroupMaps {
    CUtensorMap x[2], squares, out;
    int32_t count, rows, columns, first_matrix;
    int32_t square_tasks, update_tasks;  // of one product of one matrix
    bool paired;                         // which program

    __host__ __device__ bool tall() const { return rows > columns; }
    __host__ __device__ int wide() const { return tall() ? rows : columns; }
    __host__ __device__ int narrow_tiles() const { return ((tall() ? columns : rows) + kTile - 1) / kTile; }
    __host__ __device__ int wide_tiles() const { return (wide() + kTile - 1) / kTile; }
    __host__ __device__ int gram_blocks() const { return (wide() + kBox - 1) / kBox; }
    __host__ __device__ int square_blocks() const { return 2 * narrow_tiles(); }
    __host__ __device__ int square_tiles() const { return narrow_tiles() * (narrow_tiles() + 1) / 2; }
    __host__ __device__ int update_tiles() const { return narrow_tiles() * wide_tiles(); }
};

struct Iteration {
    GroupMaps groups[kOrthogonalizeMaxGroups];
    Program programs[2];  // a Gram matrix per step; a Gram matrix per two steps
    float coefficients[kOrthogonalizeMaxSteps][3];
    int32_t num_groups, num_rounds;
    int32_t width;  // tiles of a task
    uint32_t* next_task;
    uint32_t* done;  // per matrix: halves of tiles finished, over all products
};

struct Task {
    Product product;
    int group, matrix;
    int shared, own, num_tiles;  // tile indices; of the first tile, if there are two
    int num_k;                   // k blocks of 64
};

// A place in the ring of slots, and which phase of its barriers is meant.
struct Place {
    uint32_t slot, parity;

    __device__ explicit Place(uint32_t position) : slot(position % kSlots), parity(position / kSlots & 1) {}
    __device__ void advance(uint32_t by) {  // by less than kSlots
        slot += by;
        if (slot >= kSlots) slot -= kSlots, parity ^= 1;
    }
};

// A task as the teams see it. The operands of a k block lie one behind the other: shared, first own, second own.
struct TeamTask : Task {
    uint32_t position, stride;  // of the first k block in the ring of slots, and from one k block to the next
    bool same;                  // the first own operand is the shared one: on the diagonal
};

struct StoreTask {
    const CUtensorMap* map;
    uint32_t* done;  // counted up once stored
    int row, column, matrix, halves;  // row and column of an element
};

struct Shared {
    alignas(1024) uint8_t slots[kSlots][kSlotBytes];
    alignas(1024) uint8_t staging[kTeams][kTileBytes];
    Task ready[kAhead];
    TeamTask task;
    StoreTask store[kTeams];
    uint64_t ready_full[kAhead], ready_empty[kAhead];
    uint64_t full[kSlots], empty[kSlots], task_full, task_empty, store_full[kTeams], store_empty[kTeams];
};

__device__ uint32_t load_acquire(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ void add_release(uint32_t* p, uint32_t v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* bar, int times) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(bar)), "r"(times) : "memory");
}
// Between the copy engine's accesses to global memory and this thread's counter.
__device__ void fence_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The k block that is multiplied as the i-th: those of the shared tile's own index first, see above.
__device__ int k_block(const Task& task, int i) {
    if (task.product.kind == kGram || i / 2 > task.shared) return i;
    return i < 2 ? 2 * task.shared + i : i - 2;
}

// Where a multiprocessor is in the list of all tasks: by round (one product of each matrix), group, matrix, shared tile.
struct Cursor {
    int round = 0, group = 0;
    uint32_t begin = 0;  // first task of this round and group

    // The `index`-th task; never an earlier one than before.
    __device__ Task task(const Iteration& it, uint32_t index) {
        Task task;
        for (;;) {
            task.product.kind = kNoMore;
            if (round == it.num_rounds) return task;
            const GroupMaps& group_maps = it.groups[group];
            const Program& program = it.programs[group_maps.paired];
            if (round < program.length) {
                task.product = program.products[round];
                const uint32_t per_matrix = task.product.kind == kUpdate ? group_maps.update_tasks : group_maps.square_tasks;
                if (index - begin < group_maps.count * per_matrix) {
                    place(task, it, index - begin, per_matrix);
                    return task;
                }
                begin += group_maps.count * per_matrix;
            }
            if (++group == it.num_groups) group = 0, ++round;
        }
    }

    __device__ void place(Task& task, const Iteration& it, uint32_t index, uint32_t per_matrix) const {
        const GroupMaps& group_maps = it.groups[group];
        task.group = group;
        task.matrix = index / per_matrix;
        int left = index % per_matrix;
        const bool update = task.product.kind == kUpdate;
        for (task.shared = 0;; ++task.shared) {
            const int first = update ? 0 : task.shared;
            const int last = update ? group_maps.wide_tiles() : group_maps.narrow_tiles();
            const int here = (last - first + it.width - 1) / it.width;
            if (left < here) {
                task.own = first + left * it.width;
                task.num_tiles = min(it.width, last - task.own);
                break;
            }
            left -= here;
        }
        task.num_k = task.product.kind == kGram ? group_maps.gram_blocks() : group_maps.square_blocks();
    }
};

// Halves of tiles of the task's matrix that must be finished before it may start: all of its earlier products.
__device__ uint32_t prerequisite(const GroupMaps& group, const Product& product) {
    return 2 * (product.squares_before * group.square_tiles() + product.updates_before * group.update_tiles());
}

// Takes tasks from the queue and hands them on once they may start, while the loader still works on earlier ones.
__device__ void schedule(const Iteration& it, Shared& s) {
    Cursor cursor;
    uint32_t next = atomicAdd(it.next_task, 1);
    for (int n = 0;; ++n) {
        const Task task = cursor.task(it, next);
        if (task.product.kind != kNoMore) {
            next = atomicAdd(it.next_task, 1);
            const GroupMaps& group = it.groups[task.group];
            const uint32_t need = prerequisite(group, task.product);
            while (load_acquire(&it.done[group.first_matrix + task.matrix]) < need) __nanosleep(20);
        }
        const int place = n % kAhead;
        mbarrier_wait(&s.ready_empty[place], ((n / kAhead) & 1) ^ 1);
        s.ready[place] = task;
        mbarrier_arrive(&s.ready_full[place]);
        if (task.product.kind == kNoMore) return;
    }
}

// A lane moves one box of each k block, for up to three operands of two boxes: a single thread would need longer for the instructions of
// six boxes than the tensor cores need for their products.
__device__ void load_tasks(const Iteration& it, Shared& s) {
    const int lane = threadIdx.x % 32, operand = lane / 2, half = lane % 2;
    uint32_t position = 0;
    for (int n = 0;; ++n) {
        const int place = n % kAhead;
        mbarrier_wait(&s.ready_full[place], (n / kAhead) & 1);
        TeamTask task;
        static_cast<Task&>(task) = s.ready[place];
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.ready_empty[place]);
        fence_async_all();
        const int kind = task.product.kind;
        task.same = (kind == kGram || kind == kPolynomial) && task.own == task.shared;
        task.position = position;
        task.stride = 1 + task.num_tiles - task.same;
        mbarrier_wait(&s.task_empty, (n & 1) ^ 1);
        __syncwarp();  // NOTE: a lane that looks after the hand-over may find the place empty again, and would wait for a phase too many
        if (lane == 0) {
            s.task = task;
            mbarrier_arrive(&s.task_full);
        }
        if (kind == kNoMore) return;
        position += task.num_k * task.stride;
        if (operand >= task.stride) continue;

        const GroupMaps& group = it.groups[task.group];
        const bool is_shared = operand == 0, of_x = kind == kGram || (kind == kUpdate && !is_shared);
        const int tile = is_shared ? task.shared : task.own + operand - 1 + task.same;
        const int square = is_shared && kind != kUpdate ? task.product.right : task.product.left;
        const CUtensorMap* map = of_x ? &group.x[task.product.updates_before % 2] : &group.squares;
        const int matrix = of_x ? task.matrix : square * group.count + task.matrix, across = tile * kTile + half * kBox;
        const bool x_k_major = (kind == kGram) != group.tall();
        const uint32_t lanes = (1u << 2 * task.stride) - 1;
        Place at(task.position + operand), landed(task.position + operand + kSlots - kInFlight);
        for (int i = 0; i < task.num_k; ++i, at.advance(task.stride), landed.advance(task.stride)) {
            // NOTE: else a lane could be so far ahead that the phase another one waits for below is over and the next one too. Position
            // p - kInFlight shares its slot with p + 3, which no lane loads before all have begun the next k block.
            __syncwarp(lanes);
            // NOTE: a team does not look at the slots of the other team's operands, and a parity tells a phase from its neighbours only. A
            // team that waits for position p has seen the shared operand's, at p - 2 at least, and the loads up to p - 3 were issued before
            // that; so the load of p - kSlots must be complete by then, or the slot's phase before it would pass for the one waited for.
            if (task.position + operand + i * task.stride >= kInFlight) mbarrier_wait(&s.full[landed.slot], landed.parity ^ 1);
            mbarrier_wait(&s.empty[at.slot], at.parity ^ 1);
            if (half == 0) mbarrier_arrive_expect(&s.full[at.slot], kSlotBytes);
            // A square's tiles above the diagonal are read as mirror images of those below.
            const int k = k_block(task, i);
            const bool k_major = of_x ? x_k_major : k / 2 <= tile;
            const int column = k_major ? k * kBox : across, row = k_major ? across : k * kBox;
            tma_load_3d(s.slots[at.slot] + half * kBoxBytes, map, &s.full[at.slot], column, row, matrix);
        }
    }
}

// What a warpgroup multiplies of a tile: [half of the rows][wgmma fragment of 64 x 128].
template <int kHalves>
using Tile = float[kHalves][64];

// tile = weight * T + diagonal * I, where T's box (half of rows, half of columns) lies at `box(half, column_half)`.
template <int kHalves, typename Box>
__device__ __forceinline__ void start_from(Tile<kHalves>& tile, int first_half, float weight, float diagonal, const Box& box) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int column_half = 0; column_half < 2; ++column_half) {
            const uint8_t* p = box(first_half + half, column_half);
            const bool on_diagonal = first_half + half == column_half;
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int eight = 0; eight < 2; ++eight) {
                    const int row = 16 * warp + 8 * eight + lane / 4, column = 8 * j + lane % 4 * 2;  // of the box
                    const float2 pair = unpack_fp16(*reinterpret_cast<const uint32_t*>(p + wgmma::swizzled(row, j) + lane % 4 * 4));
                    float* d = &tile[half][4 * (8 * column_half + j) + 2 * eight];
                    d[0] = weight * pair.x + (on_diagonal && row == column ? diagonal : 0);
                    d[1] = weight * pair.y + (on_diagonal && row == column + 1 ? diagonal : 0);
                }
        }
}

// Where a team reads a k block's operands.
struct Operands {
    Place shared, own;
    bool apart;  // else they are the same
    bool own_is_a;
    uint32_t stride;
    int own_releases;  // how often each of its warps releases an own slot, so that every slot hears from 8

    __device__ void wait(Shared& s) const {
        mbarrier_wait(&s.full[shared.slot], shared.parity);
        if (apart) mbarrier_wait(&s.full[own.slot], own.parity);
    }
    __device__ void release(Shared& s) const {
        if (threadIdx.x % 32 != 0) return;
        mbarrier_arrive(&s.empty[shared.slot]);
        if (apart) arrive(&s.empty[own.slot], own_releases);
    }
    __device__ void advance() {
        shared.advance(stride);
        own.advance(stride);
    }
};

// tile += the products of the next `count` k blocks, at least one.
template <int kMajorA, int kMajorB, int kHalves>
__device__ __forceinline__ void multiply(Tile<kHalves>& tile, Shared& s, Operands& now, int first_half, int count) {
    constexpr int kStepA = kMajorA == wgmma::kMajorK ? 32 : 2048, kStepB = kMajorB == wgmma::kMajorK ? 32 : 2048;  // bytes of 16 k
    Operands before = now;
    int i = 0;
    do {
        now.wait(s);
        const uint8_t* a = s.slots[now.own_is_a ? now.own.slot : now.shared.slot] + first_half * kBoxBytes;
        const uint8_t* b = s.slots[now.own_is_a ? now.shared.slot : now.own.slot];
        const uint64_t b_descriptor = kMajorB == wgmma::kMajorK ? wgmma::descriptor(b) : wgmma::descriptor_mn_major(b, kBoxBytes);
        wgmma::fence();
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const uint8_t* box = a + half * kBoxBytes;
            const uint64_t a_descriptor = kMajorA == wgmma::kMajorK ? wgmma::descriptor(box) : wgmma::descriptor_mn_major(box, kBoxBytes);
#pragma unroll
            for (int k = 0; k < kBox / 16; ++k)
                wgmma::mma_fp16<kMajorA, kMajorB>(tile[half], wgmma::advance(a_descriptor, k * kStepA),
                                                  wgmma::advance(b_descriptor, k * kStepB), true);
        }
        wgmma::commit();
        wgmma::wait<1>();
        if (i > 0) before.release(s);
        before = now;
        now.advance();
    } while (++i < count);
    wgmma::wait<0>();
    before.release(s);
}

// The tile, times `factor`, in bf16 or fp16, as four swizzled boxes [half of rows][half of columns].
template <bool kBf16, int kHalves>
__device__ __forceinline__ void stage_tile(const Tile<kHalves>& tile, float factor, uint8_t* staging) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const auto pack = [&](float low, float high) {
        return kBf16 ? pack_bf16(factor * low, factor * high) : pack_fp16(factor * low, factor * high);
    };
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
            const float* d = &tile[half][4 * j];
            // Lane l gives the address of row l % 8 of the fragment's l / 8-th 8 x 8 block: two blocks down, then two to the right.
            const int row = 16 * warp + lane / 8 % 2 * 8 + lane % 8, column_group = j + lane / 16;
            const uint32_t address = smem_u32(staging) + (half * 2 + j / 8) * kBoxBytes + wgmma::swizzled(row, column_group % 8);
            stmatrix_x4(address, pack(d[0], d[1]), pack(d[2], d[3]), pack(d[4], d[5]), pack(d[6], d[7]));
        }
}

// The team's part of a task, up to where it is staged. kHalves is 2 for a tile, 1 for half of one.
template <int kHalves>
__device__ __forceinline__ void multiply_and_stage(const Iteration& it, Shared& s, const TeamTask& task, int team, int round) {
    const GroupMaps& group = it.groups[task.group];
    const int kind = task.product.kind, first_half = kHalves == 2 ? 0 : team;
    const int tile_of_team = kHalves == 2 ? team : 0, own_tile = task.own + tile_of_team, own_offset = 1 + tile_of_team - task.same;
    const bool wide_update = kind == kUpdate && !group.tall();
    Operands operands{Place(task.position), Place(task.position + own_offset), own_offset > 0, !wide_update, task.stride, kHalves};

    Tile<kHalves> tile;
    float factor = 1;
    if (kind == kPolynomial) {
        const float* abc = it.coefficients[task.product.step];
        factor = abc[2];
        Operands second = operands;
        second.advance();
        operands.wait(s);
        second.wait(s);
        start_from<kHalves>(tile, first_half, abc[1] / factor, own_tile == task.shared ? abc[0] / factor : 0,
                            [&](int half, int column_half) {
                                return s.slots[column_half == 0 ? operands.own.slot : second.own.slot] + half * kBoxBytes;
                            });
    } else {
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
            for (int i = 0; i < 64; ++i) tile[half][i] = 0;
    }
    // The order of k blocks is such that the operands change their majors at most twice.
    int until_k_k, until_k_mn;
    if (kind == kGram) until_k_k = until_k_mn = group.tall() ? 0 : task.num_k;
    else if (wide_update) until_k_k = 0, until_k_mn = 2 * (task.shared + 1);
    else until_k_k = 2 * (task.shared + 1), until_k_mn = kind == kUpdate ? task.num_k : 2 * (own_tile + 1);
    constexpr int kK = wgmma::kMajorK, kMN = wgmma::kMajorMN;
    if (0 < until_k_k) multiply<kK, kK, kHalves>(tile, s, operands, first_half, until_k_k);
    if (until_k_k < until_k_mn) multiply<kK, kMN, kHalves>(tile, s, operands, first_half, until_k_mn - until_k_k);
    if (until_k_mn < task.num_k) multiply<kMN, kMN, kHalves>(tile, s, operands, first_half, task.num_k - until_k_mn);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) wgmma::pin(tile[half]);

    mbarrier_wait(&s.store_empty[team], (round & 1) ^ 1);
    if (task.product.last) stage_tile<true, kHalves>(tile, factor, s.staging[team]);
    else stage_tile<false, kHalves>(tile, factor, s.staging[team]);
    fence_async_shared();
    if (threadIdx.x % 128 == 0) {
        const bool square = kind != kUpdate;
        const CUtensorMap* map = square              ? &group.squares
                                 : task.product.last ? &group.out
                                                     : &group.x[(task.product.updates_before + 1) % 2];
        const int row = wide_update ? task.shared : own_tile, column = wide_update ? own_tile : task.shared;
        s.store[team] = {map, &it.done[group.first_matrix + task.matrix], row * kTile + first_half * kBox, column * kTile,
                         square ? task.product.out * group.count + task.matrix : task.matrix, kHalves};
    }
    mbarrier_arrive(&s.store_full[team]);
}

__device__ void consume(const Iteration& it, Shared& s, int team) {
    for (int round = 0;; ++round) {
        mbarrier_wait(&s.task_full, round & 1);
        const TeamTask task = s.task;
        mbarrier_arrive(&s.task_empty);
        if (task.product.kind == kNoMore) {
            mbarrier_wait(&s.store_empty[team], (round & 1) ^ 1);
            if (threadIdx.x % 128 == 0) s.store[team].map = nullptr;
            mbarrier_arrive(&s.store_full[team]);
            return;
        }
        if (task.num_tiles == 2) multiply_and_stage<2>(it, s, task, team, round);
        else multiply_and_stage<1>(it, s, task, team, round);
    }
}

// Stores what a team has staged, and reports it as done once it is in memory.
__device__ void store_tiles(Shared& s, int team) {
    for (int round = 0;; ++round) {
        mbarrier_wait(&s.store_full[team], round & 1);
        const StoreTask task = s.store[team];
        if (task.map == nullptr) return;
        for (int box = 0; box < 2 * task.halves; ++box)
            tma_store_3d(task.map, s.staging[team] + box * kBoxBytes, task.column + box % 2 * kBox, task.row + box / 2 * kBox, task.matrix);
        bulk_commit();
        bulk_wait_read<0>();
        mbarrier_arrive(&s.store_empty[team]);
        bulk_wait<0>();
        fence_async_all();
        add_release(task.done, task.halves);
    }
}

__global__ void __launch_bounds__(kThreads, 1) orthogonalize_kernel(const __grid_constant__ Iteration it) {
    extern __shared__ uint8_t dynamic[];
    Shared& s = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) / 1024 * 1024);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSlots; ++i) mbarrier_init(&s.full[i], 1), mbarrier_init(&s.empty[i], 8);
        for (int i = 0; i < kAhead; ++i) mbarrier_init(&s.ready_full[i], 1), mbarrier_init(&s.ready_empty[i], 1);
        mbarrier_init(&s.task_full, 1), mbarrier_init(&s.task_empty, kTeams * 128);
        for (int i = 0; i < kTeams; ++i) mbarrier_init(&s.store_full[i], 128), mbarrier_init(&s.store_empty[i], 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp < kTeams * 4) consume(it, s, warp / 4);
    else if (warp == kLoader) load_tasks(it, s);
    else if (threadIdx.x % 32 != 0) return;
    else if (warp == kScheduler) schedule(it, s);
    else store_tiles(s, warp - kStorer);
}

// ---- launch -----------------------------------------------------------------------------------------

int64_t norm_blocks(int64_t elements) { return (elements + kNormElements - 1) / kNormElements; }

// The iteration's, of all its launches.
int64_t num_counters(const OrthogonalizeParams& p) {
    const int64_t launches = (p.num_groups + kOrthogonalizeMaxGroups - 1) / kOrthogonalizeMaxGroups;
    return launches * kOrthogonalizeCounters + p.num_inputs;
}

template <typename T>
cudaError_t launch_norms(const OrthogonalizeParams& p, cudaStream_t stream) {
    double* partial_sums = p.partial_sums;
    for (int64_t first = 0; first < p.num_inputs; first += kNormInputs) {
        NormLaunch launch;
        launch.count = int32_t(std::min<int64_t>(kNormInputs, p.num_inputs - first));
        launch.partial_sums = partial_sums;
        launch.counters = p.counters;
        launch.num_counters = first == 0 ? int32_t(num_counters(p)) : 0;
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

cudaError_t map_of(CUtensorMap* map, CUtensorMapDataType type, const void* base, int rows, int columns, int count) {
    TensorMapDims dims{};
    dims.rank = 3;
    dims.size[0] = columns, dims.size[1] = rows, dims.size[2] = count;
    dims.stride_bytes[0] = uint64_t(columns) * 2, dims.stride_bytes[1] = uint64_t(columns) * rows * 2;
    dims.box[0] = kBox, dims.box[1] = kBox, dims.box[2] = 1;
    return make_tensor_map(map, type, base, dims);
}

Program program_of(int num_steps, bool paired) {
    Program program{};
    int step = 0;
    while (step < num_steps) {
        const bool pair = paired && (num_steps - step) % 2 == 0;
        program.add(kGram, step, 0, 0, 0);
        program.add(kPolynomial, step, 0, 0, 1);
        if (pair) {
            program.add(kSquare, step, 0, 1, 2);
            program.add(kSquare, step, 1, 2, 0);
            program.add(kPolynomial, step + 1, 0, 0, 3);
            program.add(kSquare, step + 1, 3, 1, 2);
        }
        program.add(kUpdate, step, pair ? 2 : 1, 0, 0);
        step += 1 + pair;
    }
    program.products[program.length - 1].last = true;
    return program;
}

// Tasks of one product of one matrix, of at most `width` tiles each.
int square_tasks(const GroupMaps& group, int width) {
    int sum = 0;
    for (int left = group.narrow_tiles(); left > 0; --left) sum += (left + width - 1) / width;
    return sum;
}
int update_tasks(const GroupMaps& group, int width) { return group.narrow_tiles() * ((group.wide_tiles() + width - 1) / width); }

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
    int num_sms = 0;
    if (status == cudaSuccess) status = multiprocessors(num_sms);
    uint32_t* counters = p.counters;
    for (size_t first = 0; first < groups.size() && status == cudaSuccess; first += kOrthogonalizeMaxGroups) {
        Iteration it{};
        it.num_groups = int32_t(std::min<size_t>(kOrthogonalizeMaxGroups, groups.size() - first));
        for (bool paired : {false, true}) it.programs[paired] = program_of(int(p.num_steps), paired);
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
            tiles_per_product += from.count * to.square_tiles();
            // A pair of steps has one Gram matrix and one update less, and three more products of squares.
            const int gram = to.square_tiles() * to.gram_blocks(), update = to.update_tiles() * to.square_blocks();
            to.paired = gram + update > 3 * to.square_tiles() * to.square_blocks();
            it.num_rounds = std::max(it.num_rounds, it.programs[to.paired].length);
            const int m = std::min(from.rows, from.columns);
            constexpr auto kFp16 = CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
            for (int i = 0; i < 2 && status == cudaSuccess; ++i)
                status = map_of(&to.x[i], kFp16, from.x[i], from.rows, from.columns, from.count);
            if (status == cudaSuccess) status = map_of(&to.squares, kFp16, from.squares, m, m, kOrthogonalizeSquares * from.count);
            if (status == cudaSuccess) status = map_of(&to.out, kBf16, from.out, from.rows, from.columns, from.count);
        }
        if (status != cudaSuccess) return status;
        it.width = tiles_per_product >= 2 * num_sms ? 2 : 1;
        for (int g = 0; g < it.num_groups; ++g) {
            it.groups[g].square_tasks = square_tasks(it.groups[g], it.width);
            it.groups[g].update_tasks = update_tasks(it.groups[g], it.width);
        }
        orthogonalize_kernel<<<num_sms, kThreads, kSharedBytes, stream>>>(it);
        status = cudaGetLastError();
        counters += kOrthogonalizeCounters + matrices;
    }
    return status;
}

}  // namespace pgolf
