// Eight bfloat16 in one 16-byte access.
#pragma once
#include "kernels/common/ptx.cuh"

namespace pgolf {

__device__ __forceinline__ void unpack8(float (&x)[8], const uint4& packed) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t pair = (&packed.x)[i];
        x[2 * i] = ptx::low_bf16(pair);
        x[2 * i + 1] = ptx::high_bf16(pair);
    }
}

__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
    return {ptx::pack_bf16(x[0], x[1]), ptx::pack_bf16(x[2], x[3]), ptx::pack_bf16(x[4], x[5]), ptx::pack_bf16(x[6], x[7])};
}

}  // namespace pgolf
