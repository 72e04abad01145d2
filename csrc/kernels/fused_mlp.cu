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

// f act'(u); with kRelu2, u is not negative.
template <Activation kActivation>
__device__ __forceinline__ float slope(float f, float u) {
    return kActivation == Activation::kRelu2 ? 2.f * f * u : fmaf(0.75f * f, fabsf(u), 1.25f * f * u);
}

// C = A B, stored as it is.
struct Plain : gemm::PlainOp {
    static constexpr int kBlockN = 256, kAMajor = kMajorK, kBMajor = kMajorK;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
};

// The rows have factors scale * rstd[row]; null: scale alone.
struct RowScaled : Plain {
    struct Arguments {
        const float* rstd;
        float scale;
        float* row_sums;  // with kRowSums, or null
    };
    struct Fetched {
        float rstd[2];
        __device__ __forceinline__ float factor(const Arguments& p, int r) const { return p.scale * rstd[r]; }
    };
    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int row, int, int m) {
        if (p.rstd == nullptr) return {{1.f, 1.f}};
        return {{__ldg(p.rstd + min(row, m - 1)), __ldg(p.rstd + min(row + 8, m - 1))}};
    }
};

// u = factor (x Wup^T)
struct Up : RowScaled {
    static __device__ __forceinline__ uint32_t result(const Arguments& p, const Fetched& fetched, int r, float u0, float u1, uint32_t,
                                                      float&) {
        const float factor = fetched.factor(p, r);
        return ptx::pack_bf16(factor * u0, factor * u1);
    }
};

// y = act(u) Wdown^T
template <Activation kActivation>
struct Down : Plain {
    static constexpr bool kTransformA = true;
    static constexpr int kPassKBlocks = 4;  // 2 take 3 % more time: the warps have A to transform too
    static __device__ __forceinline__ uint32_t operand_a(uint32_t u) { return activated<kActivation>(u); }
};

// y = residual + act(u) Wdown^T
template <Activation kActivation>
struct DownResidual : Down<kActivation> {
    static constexpr bool kHasAux = true;
    template <class Arguments, class Fetched>
    static __device__ __forceinline__ uint32_t result(const Arguments&, const Fetched&, int, float y0, float y1, uint32_t residual,
                                                      float&) {
        return ptx::pack_bf16(y0 + ptx::low_bf16(residual), y1 + ptx::high_bf16(residual));
    }
};

// du = factor (dy Wdown) * act'(u), and the row sums of du * u
template <Activation kActivation>
struct DownBackward : RowScaled {
    static constexpr int kBMajor = kMajorMN;
    static constexpr bool kHasAux = true, kRowSums = true;
    static __device__ __forceinline__ uint32_t result(const Arguments& p, const Fetched& fetched, int r, float dact0, float dact1,
                                                      uint32_t u, float& row_sum) {
        if (kActivation == Activation::kRelu2) u = as_bits(__hmax2(as_pair(u), __float2bfloat162_rn(0.f)));
        const float factor = fetched.factor(p, r), u0 = ptx::low_bf16(u), u1 = ptx::high_bf16(u);
        const float du0 = dact0 * slope<kActivation>(factor, u0), du1 = dact1 * slope<kActivation>(factor, u1);
        row_sum = fmaf(du1, u1, fmaf(du0, u0, row_sum));
        return ptx::pack_bf16(du0, du1);
    }
};

// The sums of all column tiles of a row, times rstd times the factor, in place of the first.
__global__ void along_kernel(float* row_sums, const float* rstd, float factor, int tiles, int m) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= m) return;
    const float own_factor = factor * rstd[row];
    float sum = 0.f;
    constexpr int kAtOnce = 12;  // loads under way together, whatever the number of tiles
    for (int first = 0; first < tiles; first += kAtOnce) {
        float parts[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) parts[i] = first + i < tiles ? row_sums[int64_t(first + i) * m + row] : 0.f;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sum += parts[i];
    }
    row_sums[row] = own_factor * sum;
}

// dx = du Wup
struct UpBackward : Plain {
    static constexpr int kBMajor = kMajorMN;
};

// dx = residual + du Wup + along x, with along = -rstd (sum of the row's du * u) / (scale D): backward through the norm. For u is
// scale rstd (x Wup^T), so that sum is scale rstd times that of (du Wup) * x.
struct NormUpBackward : UpBackward {
    static constexpr bool kHasAux = true;   // the residual
    static constexpr int kSideBlocks = 1;   // x
    static constexpr int kPassKBlocks = 6;  // the only staging area goes out and comes in under them too
    static __device__ __forceinline__ int side_column(int n0, int pass) { return n0 + pass * gemm::kColumnBlock; }
    struct Arguments {
        const float* along;  // [m]
    };
    struct Fetched {
        float along[2];
    };
    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int row, int, int m) {
        return {{__ldg(p.along + min(row, m - 1)), __ldg(p.along + min(row + 8, m - 1))}};
    }
    // 32 of a pass's 64 columns.
    template <class Address>
    static __device__ __forceinline__ void stage(const Arguments&, const Fetched& fetched, const uint32_t (&held)[64], int pass, int step,
                                                 int, int, int, Address&& address) {
#pragma unroll
        for (int chunk = 2 * step; chunk < 2 * step + 2; ++chunk) {
            uint32_t residual[4], x[4], out[4];
            ptx::ldmatrix_x4(address(0, chunk), residual[0], residual[1], residual[2], residual[3]);
            ptx::ldmatrix_x4(address(1, chunk), x[0], x[1], x[2], x[3]);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const uint32_t product = held[4 * (4 * pass + chunk) + r];
                const float along = fetched.along[r % 2];
                out[r] = ptx::pack_bf16(fmaf(along, ptx::low_bf16(x[r]), ptx::low_bf16(residual[r]) + ptx::low_bf16(product)),
                                        fmaf(along, ptx::high_bf16(x[r]), ptx::high_bf16(residual[r]) + ptx::high_bf16(product)));
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
    cudaError_t status = gemm::launch<Up>(p.x, p.w_up, p.u, nullptr, {p.m, p.h, p.d}, stream, {p.rstd, p.rstd ? p.scale : 1.f, nullptr});
    if (status != cudaSuccess) return status;
    const gemm::Shape shape{p.m, p.d_out, p.h};
    if (p.residual) return gemm::launch<DownResidual<kActivation>>(p.u, p.w_down, p.y, p.residual, shape, stream);
    return gemm::launch<Down<kActivation>>(p.u, p.w_down, p.y, nullptr, shape, stream);
}

template <Activation kActivation>
cudaError_t backward_input(const FusedMlpParams& p, cudaStream_t stream) {
    using ByU = DownBackward<kActivation>;
    static_assert(ByU::kBlockN == kFusedMlpRowTile);
    const typename ByU::Arguments factors{p.rstd, p.rstd ? p.scale : 1.f, p.row_sums};
    cudaError_t status = gemm::launch<ByU>(p.dy, p.w_down, p.du, p.u, {p.m, p.h, p.d_out}, stream, factors);
    const gemm::Shape shape{p.m, p.d, p.h};
    if (status != cudaSuccess) return status;
    if (p.rstd == nullptr) return gemm::launch<UpBackward>(p.du, p.w_up, p.dx, nullptr, shape, stream);
    if (p.m == 0) return cudaSuccess;
    along_kernel<<<(p.m + 255) / 256, 256, 0, stream>>>(p.row_sums, p.rstd, -1.f / (p.scale * float(p.d)), fused_mlp_row_tiles(p.h), p.m);
    return gemm::launch<NormUpBackward>(p.du, p.w_up, p.dx, p.dx_residual, shape, stream, {p.row_sums}, {p.x, nullptr, p.d, p.d, p.d});
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
    return p.activation == Activation::kRelu2 ? backward_input<Activation::kRelu2>(p, stream)
                                              : backward_input<Activation::kLeakyRelu2>(p, stream);
}

cudaError_t fused_mlp_bwd(const FusedMlpParams& p, cudaStream_t stream) {
    return p.activation == Activation::kRelu2 ? backward<Activation::kRelu2>(p, stream) : backward<Activation::kLeakyRelu2>(p, stream);
}

}  // namespace pgolf
