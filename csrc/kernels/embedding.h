// Rows of a table by index, and the gradient of the table: every row of the gradient is a sum over the places its index stands.
//
// The backward walks over the places in the order of their index (a stable sort, made once per batch). A group of threads owns
// kEmbeddingRange neighbouring places, whatever their indices, so that a hot row is shared by many groups. Sums of rows that lie
// within a range are added to the gradient at once; those that cross a border are left in `partial_sums`, and a second kernel adds
// them up in order. No atomics: the same bits on every run.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

constexpr int kEmbeddingRange = 64;

struct EmbeddingFwdParams {
    const int64_t* indices;  // [m]
    const void* table;       // [num_rows, width], float32 or bfloat16, contiguous, 16-byte aligned
    __nv_bfloat16* out;      // [m, width], contiguous, 16-byte aligned
    int64_t* report;         // host-mapped: an index out of range leaves (place + 1, index, num_rows) here, and nan in its row
    uint32_t m;              // > 0
    int num_rows, width;     // width: a multiple of 8, at most 4096
    bool is_float;           // the table
};

struct EmbeddingBwdParams {
    const __nv_bfloat16* d_out;  // [m, width], contiguous, 16-byte aligned
    const int32_t* sorted;       // [m] indices in ascending order; those out of range are passed over
    const int64_t* order;        // [m] place of each
    void* gradient;              // [num_rows, width], float32 or bfloat16, added to
    float* partial_sums;         // [2, ceil(m / kEmbeddingRange), width], written and read within the call
    uint32_t m;
    int num_rows, width;
    bool is_float;               // the gradient
};

cudaError_t embedding_fwd(const EmbeddingFwdParams& p, cudaStream_t stream);
cudaError_t embedding_bwd(const EmbeddingBwdParams& p, cudaStream_t stream);

}  // namespace pgolf
