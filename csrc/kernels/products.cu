#include "kernels/products.h"

#include "kernels/common/gemm.cuh"

namespace pgolf {
namespace {

using wgmma::kMajorK;
using wgmma::kMajorMN;

// 192 columns: with the K of a layer's width, the result of a tile must be stored under the products of the next.
struct Forward {
    static constexpr int kBlockN = 192, kAMajor = kMajorK, kBMajor = kMajorK;
    static constexpr bool kTransformA = false, kHasAux = false;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
    static __device__ __forceinline__ uint32_t result(float low, float high, uint32_t) { return ptx::pack_bf16(low, high); }
};

struct ForwardResidual : Forward {
    static constexpr bool kHasAux = true;
    static __device__ __forceinline__ uint32_t result(float low, float high, uint32_t residual) {
        return ptx::pack_bf16(low + __uint_as_float(residual << 16), high + __uint_as_float(residual & 0xffff0000u));
    }
};

struct Backward : Forward {
    static constexpr int kBMajor = kMajorMN;
};

struct Weight : Forward {
    static constexpr int kBlockN = 256, kAMajor = kMajorMN, kBMajor = kMajorMN;
    static constexpr gemm::Output kOutput = gemm::kAddFp32;
};

template <class Op>
cudaError_t launch(const ProductParams& p, cudaStream_t stream) {
    return gemm::launch<Op>(p.a, p.b, p.c, p.residual, {p.m, p.n, p.k}, stream);
}

}  // namespace

cudaError_t product_forward(const ProductParams& p, cudaStream_t stream) {
    return p.residual != nullptr ? launch<ForwardResidual>(p, stream) : launch<Forward>(p, stream);
}
cudaError_t product_backward(const ProductParams& p, cudaStream_t stream) { return launch<Backward>(p, stream); }
cudaError_t product_weight(const ProductParams& p, cudaStream_t stream) { return launch<Weight>(p, stream); }

}  // namespace pgolf
