// The plain matrix products of a linear layer, and the sum with the residual stream.
//     y = x W^T (+ residual)      dx = dy W      dW += dy^T x
// A residual sum can come with the reciprocal root mean square of its rows, all that the norm after it needs.
//
// Products accumulate in fp32 and are rounded to bf16, as torch's are; with a residual, so is the sum. dW is a sum of float32 additions
// whose order varies from run to run.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace pgolf {

// C [m, n] of A and B; all with contiguous rows, 16-byte aligned; widths multiples of 8.
struct ProductParams {
    const __nv_bfloat16* a;
    const __nv_bfloat16* b;
    const __nv_bfloat16* residual;  // [m, n], or null
    void* c;                        // [m, n] bf16, or float32 that is added to
    float* rstd;                    // [m]: 1 / sqrt(mean of the row's squares + 2^-23), with residual, or null
    float* row_squares;             // workspace for it, [product_column_tiles(n), m]
    int m, n, k;
};

constexpr int kProductColumnTile = 256;  // columns in one sum of a row's squares
constexpr int product_column_tiles(int n) { return (n + kProductColumnTile - 1) / kProductColumnTile; }

cudaError_t product_forward(const ProductParams& p, cudaStream_t stream);   // A [m, k], B [n, k]
cudaError_t product_backward(const ProductParams& p, cudaStream_t stream);  // A [m, k], B [k, n]; no residual
cudaError_t product_weight(const ProductParams& p, cudaStream_t stream);    // A [k, m], B [k, n]; C float32

}  // namespace pgolf
