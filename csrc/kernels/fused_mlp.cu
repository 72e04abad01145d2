#include "kernels/fused_mlp.h"

#include "kernels/common/gemm.cuh"

namespace pgolf {
namespace {

using wgmma::kMajorK;
using wgmma::kMajorMN;

__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t bits) { return *reinterpret_cast<__nv_bfloat162*>(&bits); }
__device__ __forceinline__ uint32_t as_bits(__nv_bfloat162 pair) { return *reinterpret_cast<uint32_t*>(&pair); }

template <Activation kActivation>
__device__ __forceinline__ uint32_t activated(uint32_t bits) {
    const __nv_bfloat162 u = as_pair(bits);
    const __nv_bfloat162 floor = kActivation == Activation::kRelu2 ? __float2bfloat162_rn(0.f) : __hmul2(u, __float2bfloat162_rn(0.5f));
    const __nv_bfloat162 t = __hmax2(u, floor);
    return as_bits(__hmul2(t, t));
}

// Doubling and halving are exact in bf16.
template <Activation kActivation>
__device__ __forceinline__ uint32_t slope(uint32_t bits) {
    const __nv_bfloat162 twice = __hadd2(as_pair(bits), as_pair(bits));
    const __nv_bfloat162 floor =
        kActivation == Activation::kRelu2 ? __float2bfloat162_rn(0.f) : __hmul2(as_pair(bits), __float2bfloat162_rn(0.5f));
    return as_bits(__hmax2(twice, floor));
}

// C = A B, stored as it is.
struct Plain : gemm::PlainOp {
    static constexpr int kBlockN = 256, kAMajor = kMajorK, kBMajor = kMajorK;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
};

// The accumulators of a row times scale * rstd[row]; null: nothing.
struct RowScaled : Plain {
    static constexpr int kBlockN = 192;
    struct Arguments {
        const float* rstd;
        float scale;
    };
    struct Fetched {
        float rstd[2];
    };
    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int row, int, int m) {
        if (p.rstd == nullptr) return {};
        return {{__ldg(p.rstd + min(row, m - 1)), __ldg(p.rstd + min(row + 8, m - 1))}};
    }
    template <int kCount>
    static __device__ __forceinline__ void finish(const Arguments& p, const Fetched& fetched, float (&acc)[kCount], int, int, int) {
        if (p.rstd == nullptr) return;
        const float factor[2] = {p.scale * fetched.rstd[0], p.scale * fetched.rstd[1]};
#pragma unroll
        for (int i = 0; i < kCount; ++i) acc[i] *= factor[i / 2 % 2];
    }
};

// u = x Wup^T
struct Up : RowScaled {};

// y = act(u) Wdown^T
template <Activation kActivation>
struct Down : Plain {
    static constexpr bool kTransformA = true;
    static __device__ __forceinline__ uint32_t operand_a(uint32_t u) { return activated<kActivation>(u); }
};

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// y = residual + act(u) Wdown^T
template <Activation kActivation>
struct DownResidual : Down<kActivation> {
    static constexpr bool kHasAux = true;
    static __device__ __forceinline__ uint32_t result(float y0, float y1, uint32_t residual) {
        return ptx::pack_bf16(y0 + low(residual), y1 + high(residual));
    }
};

// du = (dy Wdown) * act'(u)
template <Activation kActivation>
struct DownBackward : RowScaled {
    static constexpr int kBMajor = kMajorMN;
    static constexpr bool kHasAux = true;
    static __device__ __forceinline__ uint32_t result(float dact0, float dact1, uint32_t u) {
        const uint32_t s = slope<kActivation>(u);
        return ptx::pack_bf16(dact0 * low(s), dact1 * high(s));
    }
};

// dx = du Wup
struct UpBackward : Plain {
    static constexpr int kBMajor = kMajorMN;
};

// dWup += du^T x
struct UpWeight : Plain {
    static constexpr int kAMajor = kMajorMN, kBMajor = kMajorMN;
    static constexpr gemm::Output kOutput = gemm::kAddFp32;
};

// dWdown^T += act(u)^T dy
template <Activation kActivation>
struct DownWeight : Down<kActivation> {
    static constexpr int kAMajor = kMajorMN, kBMajor = kMajorMN;
    static constexpr gemm::Output kOutput = gemm::kAddFp32Transposed;
};

template <Activation kActivation>
cudaError_t forward(const FusedMlpParams& p, cudaStream_t stream) {
    cudaError_t status = gemm::launch<Up>(p.x, p.w_up, p.u, nullptr, {p.m, p.h, p.d}, stream, {p.rstd, p.scale});
    if (status != cudaSuccess) return status;
    const gemm::Shape shape{p.m, p.d_out, p.h};
    if (p.residual) return gemm::launch<DownResidual<kActivation>>(p.u, p.w_down, p.y, p.residual, shape, stream);
    return gemm::launch<Down<kActivation>>(p.u, p.w_down, p.y, nullptr, shape, stream);
}

template <Activation kActivation>
cudaError_t backward_input(const FusedMlpParams& p, cudaStream_t stream) {
    cudaError_t status = gemm::launch<DownBackward<kActivation>>(p.dy, p.w_down, p.du, p.u, {p.m, p.h, p.d_out}, stream, {p.rstd, p.scale});
    if (status == cudaSuccess) status = gemm::launch<UpBackward>(p.du, p.w_up, p.dx, nullptr, {p.m, p.d, p.h}, stream);
    return status;
}

template <Activation kActivation>
cudaError_t backward(const FusedMlpParams& p, cudaStream_t stream) {
    cudaError_t status = backward_input<kActivation>(p, stream);
    if (status == cudaSuccess) status = gemm::launch<UpWeight>(p.du, p.x, p.dw_up, nullptr, {p.h, p.d, p.m}, stream);
    if (status == cudaSuccess) status = gemm::launch<DownWeight<kActivation>>(p.u, p.dy, p.dw_down, nullptr, {p.h, p.d_out, p.m}, stream);
    return status;
}

}  // namespace

cudaError_t fused_mlp_fwd(const FusedMlpParams& p, cudaStream_t stream) {
    return p.activation == Activation::kRelu2 ? forward<Activation::kRelu2>(p, stream) : forward<Activation::kLeakyRelu2>(p, stream);
}

cudaError_t fused_mlp_bwd_input(const FusedMlpParams& p, cudaStream_t stream) {
    return p.activation == Activation::kRelu2 ? backward_input<Activation::kRelu2>(p, stream) : backward_input<Activation::kLeakyRelu2>(p, stream);
}

cudaError_t fused_mlp_bwd(const FusedMlpParams& p, cudaStream_t stream) {
    return p.activation == Activation::kRelu2 ? backward<Activation::kRelu2>(p, stream) : backward<Activation::kLeakyRelu2>(p, stream);
}

}  // namespace pgolf
