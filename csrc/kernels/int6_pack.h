// Quantise and pack, unpack and dequantise, a list of matrices in one launch. The format is defined in int6_layout.h.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/int6_layout.h"

namespace pgolf {

enum class Int6Float { kBFloat16, kFloat16, kFloat32 };

// Any address and any row stride is served, rows below 2^31, columns below 2^31 - 2^16. The fast path reads rows that start at
// multiples of 16 bytes and hold a multiple of 8 columns, and writes packed rows of a multiple of 64 columns in
// 16-byte pieces. Rows beyond 8192 columns are read twice.
struct Int6PackMatrix {
    const void* weights;           // [rows, columns], rows `row_stride` elements apart
    const uint16_t* given_scales;  // fp16 [rows], or null: amax / 31
    uint8_t* packed;               // [rows, int6_row_bytes(columns)]
    uint16_t* scales;              // fp16 [rows]
    int64_t row_stride;
    int32_t rows, columns;
};

struct Int6UnpackMatrix {
    const uint8_t* packed;   // [rows, int6_row_bytes(columns)]
    const uint16_t* scales;  // fp16 [rows]
    void* weights;           // [rows, columns]
    int32_t rows, columns;
};

// All matrices of a list, of one float type: one launch per kInt6MatricesPerLaunch of them, and one more where some
// matrices fit the fast path and others do not.
constexpr int kInt6MatricesPerLaunch = 72;  // their descriptors travel as a kernel parameter of at most 4 KB
cudaError_t int6_pack(const Int6PackMatrix* matrices, int64_t count, Int6Float type, cudaStream_t stream);
cudaError_t int6_unpack(const Int6UnpackMatrix* matrices, int64_t count, Int6Float type, cudaStream_t stream);

}  // namespace pgolf
