// The stream's first value: token row, addend (the projected bigrams), a share of the previous token (smear), RMSNorm.
//
//     e_t = table[token_t] + addend_t                            norm(x) = x / sqrt(mean(x^2) + 2^-23)
//     smear none      y_t = norm(e_t)
//     smear token     y_t = norm(e_t + m_t g_t e_{t-1}),         g_t = lambda sigmoid(gate . e_t[:window])
//     smear channel   y_t = (1 - s) n_t + m_t s n_{t-1},         n = norm(e), s = sigmoid(gate) per channel
//
// with m_t 0 where a sequence begins (t a multiple of `sequence`) and, with mask_bos, where token_t is `bos`; else 1. In float32,
// rounded once. A warp walks over kEmbedNormRows neighbouring rows and carries the neighbour's part in registers; the backward
// walks downwards, because row t needs what row t + 1 returns. It makes everything again from tokens, table and addend.
//
// SPILLS embed_norm_bwd_kernel 32: the instance of a float32 table and a gate a token, once a run of rows
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

enum class Smear { kNone, kToken, kChannel };

constexpr int kEmbedNormWidth = 512;
constexpr int kEmbedNormRows = 16;
constexpr int kEmbedNormMaxCtas = 528;  // of the backward, each with one row of partial sums

struct EmbedNormParams {
    const int64_t* tokens;        // [m]
    const void* table;            // [num_rows, kEmbedNormWidth], float32 or bfloat16
    const __nv_bfloat16* addend;  // [m, kEmbedNormWidth]; null: none
    const float* gate;            // kToken: [window]; kChannel: [kEmbedNormWidth]
    const float* lambda;          // kToken: [1]
    __nv_bfloat16* y;             // forward: result; backward: its gradient. [m, kEmbedNormWidth]
    __nv_bfloat16* d_e;           // backward: [m, kEmbedNormWidth]
    float* d_gate;                // backward, not kNone: the shape of gate
    float* d_lambda;              // backward, kToken: [1]
    float* partial_sums;          // backward, not kNone: [kEmbedNormMaxCtas, kEmbedNormWidth + 4], written and read within the call
    int64_t* report;              // forward, host-mapped: a token out of range leaves (row + 1, token, num_rows) here, and nan in its row
    uint32_t m, sequence;         // > 0
    int64_t bos;
    int num_rows, window;         // window: 1 to kEmbedNormWidth
    Smear smear;
    bool is_float, mask_bos;      // float: the table
};

cudaError_t embed_norm_fwd(const EmbedNormParams& p, cudaStream_t stream);
cudaError_t embed_norm_bwd(const EmbedNormParams& p, cudaStream_t stream);

}  // namespace pgolf
