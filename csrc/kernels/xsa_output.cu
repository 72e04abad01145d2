#include "kernels/xsa_output.h"

#include "kernels/common/gemm.cuh"
#include "kernels/xsa_attention.cuh"

namespace pgolf {
namespace {

constexpr int kHead = kXsaHeadDim;
constexpr int kChunks = kHead / 16;  // of a head, 16 columns each

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float dot(float sum, uint32_t a, uint32_t b) { return fmaf(high(a), high(b), fmaf(low(a), low(b), sum)); }
__device__ __forceinline__ void quad_sum(float (&sums)[2][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] = xsa::quad_sum(sums[i / 2][i % 2]);
}

// Place of every token in a row of stats; negative after the last document.
__global__ void places_kernel(const XsaOutputBwdParams p) {
    const int token = blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= p.tokens) return;
    int place = -1;
    if (p.documents > 0 && token < p.cu_seqlens[p.documents]) {
        int document = 0;
        for (int end = p.documents; end - document > 1;) {
            const int middle = (document + end) / 2;
            (p.cu_seqlens[middle] <= token ? document : end) = middle;
        }
        const int start = p.cu_seqlens[document];
        place = xsa::stats_place(start, document) + token - start;
    }
    p.places[token] = place;
}

// A tile is the two query heads of a key head; out is its auxiliary tile and becomes dy, v its side block and becomes dv.
struct OutputBackward : gemm::PlainOp {
    static constexpr int kBlockN = kXsaOutputGroup * kHead, kAMajor = wgmma::kMajorK, kBMajor = wgmma::kMajorMN;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
    static constexpr bool kHasAux = true;
    static constexpr int kSideBlocks = 1;
    using Arguments = XsaOutputBwdParams;

    // Of a thread's two rows, r, and the tile's two heads, h.
    struct Fetched {
        int place[2];            // negative: no token of a document
        int64_t stat[2];         // first head's row of stats
        float own[2][2], lse[2][2], gate[2][2];  // [h][r]
        float share[2][2], out_dot[2][2], v_dot[2][2];
        uint32_t v[kChunks][4];  // pairs, as ldmatrix leaves them: rows r % 2, columns + 8 (r / 2)
    };

    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int first_row, int n0, int m) {
        Fetched f;
        const int head = n0 / kHead;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = min(first_row + 8 * r, m - 1), batch = row / p.tokens, token = row - batch * p.tokens;
            f.place[r] = p.places != nullptr ? __ldg(p.places + row) : token;
            if (first_row + 8 * r >= m) f.place[r] = -1;
            f.stat[r] = int64_t(batch) * p.q_heads + head;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                f.own[h][r] = __ldg(p.own + (f.stat[r] + h) * p.tokens + token);
                f.lse[h][r] = __ldg(p.lse + (f.stat[r] + h) * p.tokens + token);
            }
            const uint32_t gates = p.gate != nullptr ? __ldg(reinterpret_cast<const unsigned*>(p.gate + int64_t(row) * p.q_heads + head)) : 0;
            f.gate[0][r] = p.gate != nullptr ? low(gates) : 1.f;
            f.gate[1][r] = p.gate != nullptr ? high(gates) : 1.f;
        }
        return f;
    }

    // `address(block, i)`: where a lane finds or leaves its part of columns 16 i .. of a staged block; 0 and 1 are the heads, 2 is v.
    template <class Address>
    static __device__ __forceinline__ void stage(const Arguments& p, Fetched& f, const float (&g)[64], int step, int row, int n0, int m,
                                                 Address&& address) {
        if (step == 0) shares(p, f, g, row, n0, m, address);
        if (step == 1 || step == 2) gradients(p, f, g, 2 * (step - 1), address), gradients(p, f, g, 2 * (step - 1) + 1, address);
        if (step == 3) finish_rows(p, f, row, n0, m);
    }

    // The row sums of g, and dgate.
    template <class Address>
    static __device__ __forceinline__ void shares(const Arguments& p, Fetched& f, const float (&g)[64], int row, int n0, int m, Address&& address) {
        float g_v[2][2] = {}, g_out[2][2] = {}, v_v[2] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            ptx::ldmatrix_x4(address(2, c), f.v[c][0], f.v[c][1], f.v[c][2], f.v[c][3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) v_v[i % 2] = dot(v_v[i % 2], f.v[c][i], f.v[c][i]);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float* at = g + 32 * h + 8 * c;
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    g_v[h][i % 2] = fmaf(at[2 * i + 1], high(f.v[c][i]), fmaf(at[2 * i], low(f.v[c][i]), g_v[h][i % 2]));
                if (p.gate == nullptr) continue;
                uint32_t out[4];
                ptx::ldmatrix_x4(address(h, c), out[0], out[1], out[2], out[3]);
#pragma unroll
                for (int i = 0; i < 4; ++i) g_out[h][i % 2] = fmaf(at[2 * i + 1], high(out[i]), fmaf(at[2 * i], low(out[i]), g_out[h][i % 2]));
            }
        }
        quad_sum(g_v);
        float inverse_square[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) inverse_square[r] = p.xsa ? 1.f / fmaxf(xsa::quad_sum(v_v[r]), 1e-24f) : 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int h = i / 2, r = i % 2;
            f.share[h][r] = g_v[h][r] * inverse_square[r];
            f.out_dot[h][r] = f.v_dot[h][r] = 0.f;
        }
        if (p.gate == nullptr) return;
        quad_sum(g_out);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float dgate[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) dgate[h] = f.place[r] >= 0 && f.gate[h][r] != 0.f ? g_out[h][r] / f.gate[h][r] : 0.f;
            if (threadIdx.x % 4 == 0 && row + 8 * r < m)
                *reinterpret_cast<uint32_t*>(p.dgate + int64_t(row + 8 * r) * p.q_heads + n0 / kHead) = ptx::pack_bf16(dgate[0], dgate[1]);
        }
    }

    // dy and dv of 16 columns. NOTE: delta is of dy as it is stored: what its rounding adds to dp along y cancels against delta, and the
    // gradient of a token that sees only itself is zero.
    template <class Address>
    static __device__ __forceinline__ void gradients(const Arguments&, Fetched& f, const float (&g)[64], int c, Address&& address) {
        float dv[4][2] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t out[4], dy[4];
            ptx::ldmatrix_x4(address(h, c), out[0], out[1], out[2], out[3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = i % 2, at = 32 * h + 8 * c + 2 * i;
                const bool live = f.place[r] >= 0;
                const float share = f.share[h][r], gate = f.gate[h][r], own = f.own[h][r];
                const float dy0 = live ? gate * (g[at] - share * low(f.v[c][i])) : 0.f;
                const float dy1 = live ? gate * (g[at + 1] - share * high(f.v[c][i])) : 0.f;
                dv[i][0] -= live ? share * low(out[i]) + own * dy0 : 0.f;
                dv[i][1] -= live ? share * high(out[i]) + own * dy1 : 0.f;
                dy[i] = ptx::pack_bf16(dy0, dy1);
                f.out_dot[h][r] = dot(f.out_dot[h][r], dy[i], out[i]);
                f.v_dot[h][r] = dot(f.v_dot[h][r], dy[i], f.v[c][i]);
            }
            ptx::stmatrix_x4(address(h, c), dy[0], dy[1], dy[2], dy[3]);
        }
        ptx::stmatrix_x4(address(2, c), ptx::pack_bf16(dv[0][0], dv[0][1]), ptx::pack_bf16(dv[1][0], dv[1][1]),
                         ptx::pack_bf16(dv[2][0], dv[2][1]), ptx::pack_bf16(dv[3][0], dv[3][1]));
    }

    static __device__ __forceinline__ void finish_rows(const Arguments& p, Fetched& f, int row, int n0, int m) {
        quad_sum(f.out_dot);
        quad_sum(f.v_dot);
        const int quad = threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (f.place[r] >= 0) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (quad != h) continue;
                    const float over_gate = f.gate[h][r] != 0.f ? 1.f / f.gate[h][r] : 0.f;
                    float* stats = p.stats + 2 * (f.stat[r] + h) * p.stats_width + f.place[r];
                    stats[0] = f.lse[h][r] * xsa::kLog2e;
                    stats[p.stats_width] = f.out_dot[h][r] * over_gate + f.own[h][r] * f.v_dot[h][r];
                }
            } else if (row + 8 * r < m) {
                const int64_t at = int64_t(row + 8 * r) * p.gradient_stride;
                for (int i = quad; i < 2 * kHead / 8; i += 4) reinterpret_cast<uint4*>(p.dq + at + n0)[i] = make_uint4(0, 0, 0, 0);
                for (int i = quad; i < kHead / 8; i += 4) reinterpret_cast<uint4*>(p.dk + at + n0 / 2)[i] = make_uint4(0, 0, 0, 0);
            }
        }
    }
};

}  // namespace

cudaError_t xsa_output_bwd(const XsaOutputBwdParams& p, cudaStream_t stream) {
    const int m = p.batch * p.tokens, columns = p.q_heads * kHead, kv_columns = columns / kXsaOutputGroup;
    if (m == 0) return cudaSuccess;
    // The attention's tiles reach past a document's end into places that no token has: they must hold numbers.
    cudaError_t status = cudaMemsetAsync(p.stats, 0, sizeof(float) * p.batch * p.q_heads * 2 * p.stats_width, stream);
    if (status != cudaSuccess) return status;
    if (p.cu_seqlens != nullptr) places_kernel<<<(p.tokens + 255) / 256, 256, 0, stream>>>(p);
    XsaOutputBwdParams arguments = p;
    if (p.cu_seqlens == nullptr) arguments.places = nullptr;
    const gemm::Side side{p.v, p.dv, kv_columns, p.v_stride, p.gradient_stride};
    return gemm::launch<OutputBackward>(p.d_projected, p.weight, p.dy, p.out, {m, columns, p.width}, stream, arguments, side);
}

}  // namespace pgolf
