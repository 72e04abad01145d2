// Exclusive self-attention, causal, grouped-query, head width 64, bf16 with fp32 softmax and sums.
//
//   S = scale q k^T, causal, within a document      P = softmax(S)      y = P v
//   own = (y . v) / max(|v|, 1e-12)^2               z = y - own v       out = gate z
//
// A sequence is one row of the batch, or, with cu_seqlens, one packed document of the only row. All work is cut into
// 64 x 64 tiles counted from the sequence's first token, so the causal diagonal is always one whole tile.
//
// Nothing is reduced across thread blocks: the backward recomputes the scores once for dk and dv (a block owns keys) and
// once for dq (a block owns queries). Seven products instead of five buy gradients that need no fp32 accumulator in
// memory, no atomics and no conversion pass, and that are the same bits on every run.
//
// Exponentials are taken of the scores as they are, without a maximum: where a row's log-sum-exp is within 2^-80 .. 2^80 nothing can
// overflow, and the backward multiplies dy and delta by the row's 2^-lse, so that its probabilities need no subtraction either.
// Other rows cost the forward two more walks over their keys, for the maxima and with them, and the backward a subtraction a score.
// Scores whose scale is ln 2 are powers of 2 already; any other scale costs a multiplication a score.
//
// NOTE: every element of q, k, v and dout must be finite, also in tokens after the last document: a tile reaches past its
// document's end, and what it meets there is multiplied by 0.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

constexpr int kXsaHeadDim = 64;
constexpr int kXsaTile = 64;           // tokens
constexpr int kXsaKeysPerBlock = 192;  // of the dk, dv kernel: one tile for each of its warpgroups
constexpr float kXsaLeastSquare = 1e-24f;  // of |v|, instead of a smaller one

// [B, T, H, 64], the last dimension contiguous; strides in elements, multiples of 8; 16-byte aligned.
struct HeadRows {
    __nv_bfloat16* data;
    int64_t batch_stride, token_stride, head_stride;
};

// [B, T, Hq] in bf16 or fp32; data is null where there is no gate.
struct GateRows {
    void* data;
    bool is_bf16;
    int64_t batch_stride, token_stride, head_stride;
};

// Work list of packed documents: entries[0] = {entries, end of the last document, -, -}, then {start, length, index, document} of
// every block of `tokens_per_block` tokens, all blocks of one document together, longest document first.
struct XsaPlan {
    int4* entries;  // null for a dense batch
    int capacity;   // at least xsa_plan_capacity
    int tokens_per_block;
};
inline int64_t xsa_plan_capacity(int64_t tokens, int64_t documents, int tokens_per_block) {
    return tokens / tokens_per_block + documents + 2;
}

// Where a token's document starts and where its stats lie (stats_place); both negative for a token after the last document.
struct XsaPlace {
    int start, stats;
};

// Queries of one block of the forward and of the dq kernel: one tile of two heads, or two tiles of one head where a group's
// number of heads is odd.
inline int xsa_queries_per_block(int q_heads, int kv_heads) { return (q_heads / kv_heads) % 2 == 0 ? kXsaTile : 2 * kXsaTile; }

struct XsaAttentionParams {
    int batch, tokens, q_heads, kv_heads;
    int prefix;                // tokens without a query: q, gate, out, lse and own begin after them. Forward of a dense batch only
    float scale;               // > 0
    bool xsa;
    XsaPlan queries;           // without entries every row of the batch is one sequence
    HeadRows q, k, v;
    GateRows gate;
    HeadRows out;
    float* lse;                // [B, Hq, T], natural logarithm
    float* own;                // [B, Hq, T]
};
cudaError_t xsa_attention_fwd(const XsaAttentionParams& p, cudaStream_t stream);

// What q and k were made from by qkv_forward (qkv.h). Where rstd is null, dq and dk are the gradients of q and k themselves; else
// they are those of the raw product.
struct XsaRaw {
    const float* rstd;               // [B T, Hq + Hk]
    const float* gain;               // [Hq]
    const __nv_bfloat16 *cos, *sin;  // [positions, 8]
    float* dgain;                    // [Hq], added to, in no fixed order
    int positions;                   // row r of B T is at position r % positions
};

// With dz = gate dout and e = (dz . v) / |v|^2, besides what passes through the probabilities:
//   dy = dz - e v,   dv += -(e z + own dy),   delta = rowsum(dy y),   dgate = rowsum(dout out) / gate
struct XsaAttentionBwdParams {
    XsaAttentionParams fwd;    // as given to the forward; out, lse and own are inputs now
    XsaPlan keys;
    const XsaPlace* places;    // [tokens], or null for a dense batch
    HeadRows grad_out;         // data null: dy, stats, dgate and dv's direct part have been written (xsa_output.h)
    HeadRows dq, dk, dv;
    XsaRaw raw;
    GateRows dgate;
    HeadRows dy;               // scratch, [B, T, Hq, 64]: times the row's factor
    float* stats;              // scratch, [B Hq, 2, stats_width]: what the row's exponents lose, mostly 0, and delta times its factor
                               // (RowScale); a token's place: stats_place
    int64_t stats_width;       // multiple of 4, at least T + 4 documents
};
cudaError_t xsa_attention_bwd(const XsaAttentionBwdParams& p, cudaStream_t stream);

// What the kernels above need to know of packed documents, made on the device: no host ever reads cu_seqlens. Any list is harmless:
// it counts as starting at 0, entries beyond `tokens` as `tokens`, and those below an earlier one as that one.
struct XsaPlanParams {
    const int32_t* cu_seqlens;  // [documents + 1]
    int documents, tokens;
    XsaPlan queries;            // entries are written: the blocks of a document last first
    XsaPlan keys;               // the same, first first
    XsaPlace* places;           // [tokens], written
};
cudaError_t xsa_attention_plan(const XsaPlanParams& p, cudaStream_t stream);

}  // namespace pgolf
