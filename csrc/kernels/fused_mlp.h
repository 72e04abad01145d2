// MLP of the recipes.   u = x Wup^T,   y = act(u) Wdown^T
//     relu2:        act(u) = max(u, 0)^2          act'(u) = 2 max(u, 0)
//     leaky_relu2:  act(u) = max(u, u / 2)^2      act'(u) = 2 u for u > 0, u / 2 otherwise
// Of a normalised input, y = residual + MLP(f x) with f = scale / root mean square of the row: f is a factor of the rows of u and of du,
// so the norm needs no tensor. dx is then that of x, through the norm, added to the gradient that x has already (dx_residual).
//
// Only u is kept for the backward: act is applied where its operand is loaded, act' where the gradient is stored.
// Products accumulate in fp32 and are rounded to bf16, as torch's are. Factors, act', residual and norm are applied to that in fp32, and
// the result is rounded again; act(u) is rounded once to bf16. The weight gradients are sums of float32 additions whose order varies from
// run to run.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

enum class Activation { kRelu2 = 0, kLeakyRelu2 = 1 };

// All matrices with contiguous rows, 16-byte aligned; D and H multiples of 8.
struct FusedMlpParams {
    const __nv_bfloat16* x;       // [M, D]
    const __nv_bfloat16* w_up;    // [H, D]
    const __nv_bfloat16* w_down;  // [D_out, H]
    const float* rstd;            // [M], or null: the factors f of the rows are scale * rstd
    float scale;                  // > 0
    const __nv_bfloat16* residual;  // [M, D_out], or null: added to y
    const __nv_bfloat16* dy;      // [M, D_out]       backward only
    __nv_bfloat16* u;             // [M, H]           out of the forward, into the backward
    __nv_bfloat16* y;             // [M, D_out]       out of the forward
    __nv_bfloat16* du;            // [M, H]           out of the backward: f (dy Wdown) * act'(u)
    __nv_bfloat16* dx;            // [M, D]           out of the backward: du Wup, or what the norm makes of it
    const __nv_bfloat16* dx_residual;  // [M, D]      with rstd: added to dx
    float* row_sums;              // [fused_mlp_row_tiles(H), M], with rstd: scratch of the backward
    float* dw_up;                 // [H, D]           the backward adds du^T x
    float* dw_down;               // [D_out, H]       the backward adds dy^T act(u)
    int m, d, h, d_out;
    Activation activation;
};

constexpr int kFusedMlpRowTile = 256;  // columns of u in one row sum
constexpr int fused_mlp_row_tiles(int h) { return (h + kFusedMlpRowTile - 1) / kFusedMlpRowTile; }

cudaError_t fused_mlp_fwd(const FusedMlpParams& p, cudaStream_t stream);
cudaError_t fused_mlp_bwd(const FusedMlpParams& p, cudaStream_t stream);
cudaError_t fused_mlp_bwd_input(const FusedMlpParams& p, cudaStream_t stream);  // du and dx only, for weights that do not learn

}  // namespace pgolf
