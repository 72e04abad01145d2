#include "kernels/products.h"

#include "kernels/common/gemm.cuh"
#include "kernels/common/norm.h"

namespace pgolf {
namespace {

using wgmma::kMajorK;
using wgmma::kMajorMN;

struct Forward : gemm::PlainOp {
    static constexpr int kBlockN = 256, kAMajor = kMajorK, kBMajor = kMajorK;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
};

struct ForwardResidual : Forward {
    static constexpr bool kHasAux = true;
    template <class Arguments>
    static __device__ __forceinline__ uint32_t result(const Arguments&, const Fetched&, int, float y0, float y1, uint32_t residual,
                                                      float&) {
        return ptx::pack_bf16(y0 + ptx::low_bf16(residual), y1 + ptx::high_bf16(residual));
    }
};

struct ForwardResidualSquares : ForwardResidual {
    static constexpr bool kRowSums = true;
    struct Arguments {
        float* row_sums;
    };
    static __device__ __forceinline__ uint32_t result(const Arguments& p, const Fetched& f, int r, float y0, float y1, uint32_t residual,
                                                      float& row_sum) {
        const uint32_t y = ForwardResidual::result(p, f, r, y0, y1, residual, row_sum);
        row_sum = fmaf(ptx::high_bf16(y), ptx::high_bf16(y), fmaf(ptx::low_bf16(y), ptx::low_bf16(y), row_sum));
        return y;
    }
};

__global__ void row_rstd_kernel(const ProductParams p, int tiles) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= p.m) return;
    float sum = 0.f;
    for (int tile = 0; tile < tiles; ++tile) sum += p.row_squares[int64_t(tile) * p.m + row];
    p.rstd[row] = rsqrtf(sum / float(p.n) + kRmsEpsilon);
}

struct Backward : Forward {
    static constexpr int kBMajor = kMajorMN;
};

struct Weight : Forward {
    static constexpr int kAMajor = kMajorMN, kBMajor = kMajorMN;
    static constexpr gemm::Output kOutput = gemm::kAddFp32;
};

template <class Op>
cudaError_t launch(const ProductParams& p, cudaStream_t stream) {
    return gemm::launch<Op>(p.a, p.b, p.c, p.residual, {p.m, p.n, p.k}, stream);
}

}  // namespace

cudaError_t product_forward(const ProductParams& p, cudaStream_t stream) {
    if (p.rstd == nullptr) return p.residual != nullptr ? launch<ForwardResidual>(p, stream) : launch<Forward>(p, stream);
    using Op = ForwardResidualSquares;
    static_assert(Op::kBlockN == kProductColumnTile);
    if (p.m == 0) return cudaSuccess;
    const cudaError_t status = gemm::launch<Op>(p.a, p.b, p.c, p.residual, {p.m, p.n, p.k}, stream, {p.row_squares});
    if (status != cudaSuccess) return status;
    row_rstd_kernel<<<(p.m + 255) / 256, 256, 0, stream>>>(p, product_column_tiles(p.n));
    return cudaGetLastError();
}
cudaError_t product_backward(const ProductParams& p, cudaStream_t stream) { return launch<Backward>(p, stream); }
cudaError_t product_weight(const ProductParams& p, cudaStream_t stream) { return launch<Weight>(p, stream); }

}  // namespace pgolf
