// Host side of the bulk tensor copy engine: tensor maps of tensors in global memory.
// The encoder comes from the driver through the runtime, so nothing links libcuda.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

struct TensorMapDims {
    int rank;                 // 2..5
    uint64_t size[5];         // elements, innermost first
    uint64_t stride_bytes[4]; // of dimensions 1.. ; multiples of 16
    uint32_t box[5];          // tile, elements, innermost first; each <= 256
};

// `kind`: CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _FLOAT32, ...; base 16-byte aligned. Out-of-range reads give zero.
inline cudaError_t make_tensor_map(CUtensorMap* map, CUtensorMapDataType kind, const void* base, const TensorMapDims& dims,
                                   CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill);
    static Encode encode = [] {
        void* f = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) != cudaSuccess) f = nullptr;
        return reinterpret_cast<Encode>(f);
    }();
    if (encode == nullptr) return cudaErrorNotSupported;
    // NOTE: the encoder needs a current context, and a thread that has made no runtime call yet, such as autograd's, has none.
    int device = 0;
    cudaError_t context = cudaGetDevice(&device);
    if (context == cudaSuccess) context = cudaSetDevice(device);
    if (context != cudaSuccess) return context;
    const uint32_t unit[5] = {1, 1, 1, 1, 1};
    CUresult status = encode(map, kind, dims.rank, const_cast<void*>(base), reinterpret_cast<const cuuint64_t*>(dims.size),
                             reinterpret_cast<const cuuint64_t*>(dims.stride_bytes), dims.box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A bf16 matrix whose rows are contiguous and `row_stride` elements apart; boxes of 64 columns, one swizzled row.
inline cudaError_t bf16_matrix_map(CUtensorMap* map, const void* base, int64_t rows, int64_t columns, int64_t row_stride,
                                   uint32_t box_rows) {
    const TensorMapDims dims{2, {uint64_t(columns), uint64_t(rows)}, {uint64_t(row_stride) * 2}, {64, box_rows}};
    return make_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, dims);
}

}  // namespace pgolf
