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
        float* row_sums;  // with kRowSums, or null
    };
    struct Fetched {
        float rstd[2];
    };
    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int row, int, int m) {
        if (p.rstd == nullptr) return {};
        return {{__ldg(p.rstd + min(row, m - 1)), __ldg(p.rstd + min(row + 8, m - 1))}};
    }
    static __device__ __forceinline__ void finish(const Arguments& p, const Fetched& fetched, float (&acc)[32], int, int, int) {
        if (p.rstd == nullptr) return;
        const float factor[2] = {p.scale * fetched.rstd[0], p.scale * fetched.rstd[1]};
#pragma unroll
        for (int i = 0; i < 32; ++i) acc[i] *= factor[i / 2 % 2];
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

// du = (dy Wdown) * act'(u), and the row sums of du * u
template <Activation kActivation>
struct DownBackward : RowScaled {
    static constexpr int kBMajor = kMajorMN;
    static constexpr bool kHasAux = true, kRowSums = true;
    static __device__ __forceinline__ uint32_t result(float dact0, float dact1, uint32_t u) {
        const uint32_t s = slope<kActivation>(u);
        return ptx::pack_bf16(dact0 * low(s), dact1 * high(s));
    }
    static __device__ __forceinline__ float row_term(uint32_t du, uint32_t u) { return fmaf(low(du), low(u), high(du) * high(u)); }
};

// dx = du Wup
struct UpBackward : Plain {
    static constexpr int kBMajor = kMajorMN;
};

// dx = residual + du Wup + along x, with along = -rstd (sum of the row's du * u) / (scale D): backward through the norm. For u is
// scale rstd (x Wup^T), so that sum is scale rstd times that of (du Wup) * x.
struct NormUpBackward : UpBackward {
    static constexpr bool kHasAux = true;   // the residual
    static constexpr int kSideBlocks = 1;   // x
    static __device__ __forceinline__ int side_column(int n0, int pass) { return n0 + pass * gemm::kColumnBlock; }
    struct Arguments {
        const float *rstd, *row_sums;
        int tiles;     // of row_sums
        float factor;  // -1 / (scale D)
    };
    struct Fetched {
        float along[2];
    };
    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int row, int, int m) {
        Fetched fetched;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = min(row + 8 * r, m - 1);
            float sum = 0.f;  // the four lanes of a row share its tiles
            for (int tile = threadIdx.x % 4; tile < p.tiles; tile += 4) sum += __ldg(p.row_sums + int64_t(tile) * m + at);
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            fetched.along[r] = p.factor * __ldg(p.rstd + at) * sum;
        }
        return fetched;
    }
    // 32 of a pass's 64 columns.
    template <class Address>
    static __device__ __forceinline__ void stage(const Arguments&, const Fetched& fetched, const uint32_t (&held)[64], int pass, int step, int, int,
                                                 int, Address&& address) {
#pragma unroll
        for (int chunk = 2 * step; chunk < 2 * step + 2; ++chunk) {
            uint32_t residual[4], x[4], out[4];
            ptx::ldmatrix_x4(address(0, chunk), residual[0], residual[1], residual[2], residual[3]);
            ptx::ldmatrix_x4(address(1, chunk), x[0], x[1], x[2], x[3]);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const uint32_t product = held[4 * (4 * pass + chunk) + r];
                const float along = fetched.along[r % 2];
                out[r] = ptx::pack_bf16(fmaf(along, low(x[r]), low(residual[r]) + low(product)),
                                        fmaf(along, high(x[r]), high(residual[r]) + high(product)));
            }
            ptx::stmatrix_x4(address(0, chunk), out[0], out[1], out[2], out[3]);
        }
    }
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
    cudaError_t status = gemm::launch<Up>(p.x, p.w_up, p.u, nullptr, {p.m, p.h, p.d}, stream, {p.rstd, p.scale, nullptr});
    if (status != cudaSuccess) return status;
    const gemm::Shape shape{p.m, p.d_out, p.h};
    if (p.residual) return gemm::launch<DownResidual<kActivation>>(p.u, p.w_down, p.y, p.residual, shape, stream);
    return gemm::launch<Down<kActivation>>(p.u, p.w_down, p.y, nullptr, shape, stream);
}

template <Activation kActivation>
cudaError_t backward_input(const FusedMlpParams& p, cudaStream_t stream) {
    using ByU = DownBackward<kActivation>;
    static_assert(fused_mlp_row_tiles(ByU::kBlockN) == 1 && fused_mlp_row_tiles(ByU::kBlockN + 1) == 2);
    cudaError_t status = gemm::launch<ByU>(p.dy, p.w_down, p.du, p.u, {p.m, p.h, p.d_out}, stream, {p.rstd, p.scale, p.row_sums});
    const gemm::Shape shape{p.m, p.d, p.h};
    if (status != cudaSuccess) return status;
    if (p.rstd == nullptr) return gemm::launch<UpBackward>(p.du, p.w_up, p.dx, nullptr, shape, stream);
    const NormUpBackward::Arguments arguments{p.rstd, p.row_sums, fused_mlp_row_tiles(p.h), -1.f / (p.scale * float(p.d))};
    return gemm::launch<NormUpBackward>(p.du, p.w_up, p.dx, p.dx_residual, shape, stream, arguments, {p.x, nullptr, p.d, p.d, p.d});
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
