// Device code of both cross-entropies, on logits and fused with the head: what a target is, and the rows kept.
#pragma once
#include "kernels/softcap_ce.h"

namespace pgolf {

// A row's target in 32 bits: its column, or one of these.
enum : int { kIgnored = -1, kOutOfRange = -2 };

template <typename Params>
__device__ __forceinline__ int target_of(int64_t target, const Params& p) {
    return target == p.ignore_index ? kIgnored : target >= 0 && target < p.v ? int(target) : kOutOfRange;
}

__device__ __forceinline__ float or_nan(float x, int target) { return target == kOutOfRange ? __int_as_float(0x7fffffff) : x; }

// Every warp for itself.
__device__ __forceinline__ int64_t rows_kept(const SoftcapCEWorkspace& workspace) {
    int64_t kept = 0;
    for (int cta = threadIdx.x % 32; cta < SoftcapCEWorkspace::kCountCtas; cta += 32) kept += workspace.kept[cta];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) kept += __shfl_xor_sync(0xffffffffu, kept, offset);
    return kept;
}

template <typename Params>
__device__ __forceinline__ float mean_weight(const Params& p) {
    return p.reduction == SoftcapCEReduction::kMean ? 1.f / float(rows_kept(*p.workspace)) : 1.f;
}

}  // namespace pgolf
