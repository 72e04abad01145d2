#include "kernels/common/gemm.cuh"
#include "kernels/linear_softcap_ce.h"

namespace pgolf {
namespace {

struct ScaledRows : gemm::PlainOp {
    static constexpr int kBlockN = 256, kAMajor = wgmma::kMajorK, kBMajor = wgmma::kMajorMN;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
    using Arguments = LinearSoftcapCEDxParams;
    struct Fetched {
        float scale[2];
    };
    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int row, int, int m) {
        Fetched fetched;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t i = min(row + 8 * half, m - 1);
            fetched.scale[half] = __ldg(p.row_scale + i) * __ldg(p.grad_loss + i * p.grad_stride);
        }
        return fetched;
    }
    static __device__ __forceinline__ uint32_t result(const Arguments&, const Fetched& fetched, int r, float low, float high, uint32_t,
                                                      float&) {
        return ptx::pack_bf16(fetched.scale[r] * low, fetched.scale[r] * high);
    }
};

}  // namespace

cudaError_t linear_softcap_ce_dx(const LinearSoftcapCEDxParams& p, cudaStream_t stream) {
    return gemm::launch<ScaledRows>(p.g, p.weight, p.dx, nullptr, {p.n, kLinearSoftcapCEDepth, p.v}, stream, p);
}

}  // namespace pgolf
