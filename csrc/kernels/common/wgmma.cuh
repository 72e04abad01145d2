// wgmma: D[64, N] (+)= A[64, 16] * B[16, N] for one warpgroup, bf16 operands, fp32 accumulators.
//
// Fragment of D (and of a register A of 16 columns): thread t of the warpgroup, warp w = t / 32, lane l = t % 32,
//   d[4 j + 0], d[4 j + 1]   row 16 w + l / 4,      columns 8 j + 2 (l % 4), + 1
//   d[4 j + 2], d[4 j + 3]   row 16 w + l / 4 + 8,  the same columns
//   A in registers: a0, a1, a2, a3 = (row, cols 0-7), (row + 8, cols 0-7), (row, cols 8-15), (row + 8, cols 8-15), two bf16 each,
//   so that two neighbouring 8-column groups of a D fragment, packed to bf16, are the A of the next product.
//
// Operands in shared memory lie as TMA writes them with the 128-byte swizzle: rows of 64 bf16, in groups of
// 8 rows (1024 bytes), tile base aligned to 1024 bytes. K-major: a row is one m (or n), its 64 columns are k.
// MN-major ("transposed"): a row is one k, its 64 columns are m (or n).
#pragma once
#include <cstdint>

#include "kernels/common/ptx.cuh"

namespace pgolf::wgmma {

// Byte of 16-byte chunk `chunk` of row `row` in such a tile.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// K-major, 128-byte swizzle. Advance along k inside the 64-column row by adding 32 bytes (16 bf16) to the
// address; rows are 1024 bytes apart per group of 8.
__device__ __forceinline__ uint64_t descriptor(const void* tile) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    constexpr uint64_t kGroupStride = uint64_t(1024 >> 4) << 32;
    constexpr uint64_t kUnused = uint64_t(1) << 16;
    return kSwizzle128 | kGroupStride | kUnused | ((ptx::smem_u32(tile) & 0x3FFFF) >> 4);
}

// MN-major, 128-byte swizzle: 64 columns of m (or n) per row, `column_block_bytes` between neighbouring
// 64-column blocks (used when N > 64 or M > 64), 1024 bytes per group of 8 k. Advance along k by 16 rows = 2048 bytes.
__device__ __forceinline__ uint64_t descriptor_mn_major(const void* tile, uint32_t column_block_bytes) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    constexpr uint64_t kGroupStride = uint64_t(1024 >> 4) << 32;
    return kSwizzle128 | kGroupStride | (uint64_t(column_block_bytes >> 4) << 16) | ((ptx::smem_u32(tile) & 0x3FFFF) >> 4);
}

// K-major, 16 columns (one step of k), no swizzle: groups of 8 rows `group_bytes` apart, each 128 bytes of the rows' first 16-byte
// chunks, then 128 of their second. With 0 bytes every group is the first.
__device__ __forceinline__ uint64_t descriptor_of_16(const void* tile, uint32_t group_bytes) {
    return (uint64_t(group_bytes >> 4) << 32) | (uint64_t(128 >> 4) << 16) | ((ptx::smem_u32(tile) & 0x3FFFF) >> 4);
}

// Adds `bytes` to a descriptor's address. The address never carries out of the low word, so the high one stays a constant.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) {
    return (descriptor & 0xffffffff00000000) | (uint32_t(descriptor) + (bytes >> 4));
}

// A descriptor that the compiler shall keep in registers instead of making it anew at each use.
__device__ __forceinline__ uint64_t kept(uint64_t descriptor) {
    return (descriptor & 0xffffffff00000000) | ptx::kept(uint32_t(descriptor));
}

// Before the first wgmma that reads registers written by ordinary instructions.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most kPending committed groups still running.
template <int kPending>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accumulator reads above a wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

constexpr int kMajorK = 0, kMajorMN = 1;

// An instruction's text and its operands. Macros, because asm takes neither arrays nor packs: it names each register of the accumulator,
// and numbers what follows them.
#define PGOLF_FLOATS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PGOLF_FLOATS_8(d, i) PGOLF_FLOATS_4(d, i), PGOLF_FLOATS_4(d, i + 4)
#define PGOLF_FLOATS_32(d, i) PGOLF_FLOATS_8(d, i), PGOLF_FLOATS_8(d, i + 8), PGOLF_FLOATS_8(d, i + 16), PGOLF_FLOATS_8(d, i + 24)

#define PGOLF_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
    "%26, %27, %28, %29, %30, %31"

#define PGOLF_NAMES_36 PGOLF_NAMES_32 ", %32, %33, %34, %35"

#define PGOLF_NAMES_64 PGOLF_NAMES_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
    "%55, %56, %57, %58, %59, %60, %61, %62, %63"

#define PGOLF_NAMES_96 PGOLF_NAMES_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
    "%87, %88, %89, %90, %91, %92, %93, %94, %95"

#define PGOLF_NAMES_128 PGOLF_NAMES_96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, " \
    "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define PGOLF_WGMMA(shape, types, names, operands, accumulate, majors) \
    "{ .reg .pred p; setp.ne.b32 p, " accumulate ", 0; wgmma.mma_async.sync.aligned." shape "k16.f32." types " {" names "}, " operands \
    ", p, 1, 1, " majors "; }"

// d (+)= A * B; with `accumulate` false d is overwritten.

template <int kMajorA = kMajorK, int kMajorB = kMajorK>
__device__ __forceinline__ void mma(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(PGOLF_WGMMA("m64n64", "bf16.bf16", PGOLF_NAMES_32, "%32, %33", "%34", "%35, %36")
                 : PGOLF_FLOATS_32(d, 0)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kMajorA), "n"(kMajorB));
}

template <int kMajorB = kMajorK>
__device__ __forceinline__ void mma(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool accumulate) {
    asm volatile(PGOLF_WGMMA("m64n64", "bf16.bf16", PGOLF_NAMES_32, "{%32, %33, %34, %35}, %36", "%37", "%38")
                 : PGOLF_FLOATS_32(d, 0)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int(accumulate)), "n"(kMajorB));
}

template <int kMajorB = kMajorK>
__device__ __forceinline__ void mma(float (&d)[36], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool accumulate) {
    asm volatile(PGOLF_WGMMA("m64n72", "bf16.bf16", PGOLF_NAMES_36, "{%36, %37, %38, %39}, %40", "%41", "%42")
                 : PGOLF_FLOATS_32(d, 0), PGOLF_FLOATS_4(d, 32)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int(accumulate)), "n"(kMajorB));
}

template <int kMajorA = kMajorK, int kMajorB = kMajorK>
__device__ __forceinline__ void mma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(PGOLF_WGMMA("m64n128", "bf16.bf16", PGOLF_NAMES_64, "%64, %65", "%66", "%67, %68")
                 : PGOLF_FLOATS_32(d, 0), PGOLF_FLOATS_32(d, 32)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kMajorA), "n"(kMajorB));
}

template <int kMajorB = kMajorK>
__device__ __forceinline__ void mma(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool accumulate) {
    asm volatile(PGOLF_WGMMA("m64n128", "bf16.bf16", PGOLF_NAMES_64, "{%64, %65, %66, %67}, %68", "%69", "%70")
                 : PGOLF_FLOATS_32(d, 0), PGOLF_FLOATS_32(d, 32)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int(accumulate)), "n"(kMajorB));
}

// The same of fp16 operands.
template <int kMajorA = kMajorK, int kMajorB = kMajorK>
__device__ __forceinline__ void mma_fp16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(PGOLF_WGMMA("m64n128", "f16.f16", PGOLF_NAMES_64, "%64, %65", "%66", "%67, %68")
                 : PGOLF_FLOATS_32(d, 0), PGOLF_FLOATS_32(d, 32)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kMajorA), "n"(kMajorB));
}

template <int kMajorA = kMajorK, int kMajorB = kMajorK>
__device__ __forceinline__ void mma(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(PGOLF_WGMMA("m64n256", "bf16.bf16", PGOLF_NAMES_128, "%128, %129", "%130", "%131, %132")
                 : PGOLF_FLOATS_32(d, 0), PGOLF_FLOATS_32(d, 32), PGOLF_FLOATS_32(d, 64), PGOLF_FLOATS_32(d, 96)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kMajorA), "n"(kMajorB));
}

template <int kMajorB = kMajorK>
__device__ __forceinline__ void mma(float (&d)[128], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool accumulate) {
    asm volatile(PGOLF_WGMMA("m64n256", "bf16.bf16", PGOLF_NAMES_128, "{%128, %129, %130, %131}, %132", "%133", "%134")
                 : PGOLF_FLOATS_32(d, 0), PGOLF_FLOATS_32(d, 32), PGOLF_FLOATS_32(d, 64), PGOLF_FLOATS_32(d, 96)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int(accumulate)), "n"(kMajorB));
}

#undef PGOLF_WGMMA
#undef PGOLF_NAMES_32
#undef PGOLF_NAMES_36
#undef PGOLF_NAMES_64
#undef PGOLF_NAMES_96
#undef PGOLF_NAMES_128
#undef PGOLF_FLOATS_32
#undef PGOLF_FLOATS_8
#undef PGOLF_FLOATS_4

}  // namespace pgolf::wgmma
