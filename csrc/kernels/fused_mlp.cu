#include "kernels/fused_mlp.h"

#include "kernels/common/gemm.cuh"

namespace pgolf {
namespace {

using wgmma::kMajorK;
using wgmma::kMajorMN;

__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t bits) { return *reinterpret_cast<__nv_bfloat162*>(&bits); }
__device__ __forceinline__ uint32_t as_bits(__nv_bfloat162 pair) { return *reinterpret_cast<uint32_t*>(&pair); }

// Result is the accumulator itself.
struct Plain {
    static constexpr bool kTransformA = false, kHasAux = false;
    static __device__ __forceinline__ uint32_t operand_a(uint32_t pair) { return pair; }
    static __device__ __forceinline__ uint32_t result(float low, float high, uint32_t) { return ptx::pack_bf16(low, high); }
};

struct Up : Plain {
    static constexpr int kBlockN = 192, kBMajor = kMajorK;
};

template <Activation kActivation>
struct Down : Plain {
    static constexpr int kBlockN = 256, kBMajor = kMajorK;
    static constexpr bool kTransformA = true;
    static __device__ __forceinline__ uint32_t operand_a(uint32_t bits) {
        const __nv_bfloat162 u = as_pair(bits);
        const __nv_bfloat162 floor = kActivation == Activation::kRelu2 ? __float2bfloat162_rn(0.f) : __hmul2(u, __float2bfloat162_rn(0.5f));
        const __nv_bfloat162 t = __hmax2(u, floor);
        return as_bits(__hmul2(t, t));
    }
};

template <Activation kActivation>
struct DownBackward : Plain {
    static constexpr int kBlockN = 192, kBMajor = kMajorMN;
    static constexpr bool kHasAux = true;
    static __device__ __forceinline__ float slope(float u) {
        return kActivation == Activation::kRelu2 ? 2.f * fmaxf(u, 0.f) : (u > 0.f ? 2.f * u : 0.5f * u);
    }
    static __device__ __forceinline__ uint32_t result(float low, float high, uint32_t u) {
        return ptx::pack_bf16(low * slope(__uint_as_float(u << 16)), high * slope(__uint_as_float(u & 0xffff0000u)));
    }
};

struct UpBackward : Plain {
    static constexpr int kBlockN = 256, kBMajor = kMajorMN;
};

}  // namespace

cudaError_t fused_mlp_fwd(const FusedMlpParams& p, cudaStream_t stream) {
    cudaError_t status = gemm::launch<Up>(p.x, p.w_up, p.u, nullptr, {p.m, p.h, p.d}, stream);
    if (status != cudaSuccess) return status;
    const gemm::Shape down{p.m, p.d_out, p.h};
    return p.activation == Activation::kRelu2 ? gemm::launch<Down<Activation::kRelu2>>(p.u, p.w_down, p.y, nullptr, down, stream)
                                              : gemm::launch<Down<Activation::kLeakyRelu2>>(p.u, p.w_down, p.y, nullptr, down, stream);
}

cudaError_t fused_mlp_bwd(const FusedMlpParams& p, cudaStream_t stream) {
    const gemm::Shape down{p.m, p.h, p.d_out};
    cudaError_t status = p.activation == Activation::kRelu2
                             ? gemm::launch<DownBackward<Activation::kRelu2>>(p.dy, p.w_down, p.du, p.u, down, stream)
                             : gemm::launch<DownBackward<Activation::kLeakyRelu2>>(p.dy, p.w_down, p.du, p.u, down, stream);
    if (status != cudaSuccess) return status;
    return gemm::launch<UpBackward>(p.du, p.w_up, p.dx, nullptr, {p.m, p.d, p.h}, stream);
}

}  // namespace pgolf
