// Sum over a warp in a fixed order: the same bits on every run.
#pragma once

namespace pgolf {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

}  // namespace pgolf
