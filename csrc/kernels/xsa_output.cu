#include "kernels/xsa_output.h"

#include "kernels/common/gemm.cuh"
#include "kernels/xsa_attention.cuh"

namespace pgolf {
namespace {

using ptx::high_bf16, ptx::low_bf16;

constexpr int kHead = kXsaHeadDim;
constexpr int kChunks = kHead / 16;  // of a head, 16 columns each

__device__ __forceinline__ float dot(float sum, float x0, float x1, uint32_t pair) {
    return fmaf(x1, high_bf16(pair), fmaf(x0, low_bf16(pair), sum));
}
__device__ __forceinline__ void quad_sum(float (&sums)[2][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] = xsa::quad_sum(sums[i / 2][i % 2]);
}

// A tile is the two query heads of a key head; out is its auxiliary tile and becomes dy, v its side block and becomes dv.
struct OutputBackward : gemm::PlainOp {
    static constexpr int kBlockN = kXsaOutputGroup * kHead, kAMajor = wgmma::kMajorK, kBMajor = wgmma::kMajorMN;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
    static constexpr bool kHasAux = true;
    static constexpr int kSideBlocks = 1;
    static constexpr bool kSideStored = true;
    static __device__ __forceinline__ int side_column(int n0, int) { return n0 / kXsaOutputGroup; }
    using Arguments = XsaOutputBwdParams;

    // Of a thread's two rows, r, and the tile's two heads, h.
    struct Fetched {
        int place[2];    // negative: no token of a document, whose gate and own are 0
        int batch[2];
        uint32_t gates[2];  // of both heads
        float own[2][2], lse[2][2];  // [h][r]
        float gate[2][2];  // times the row's scale, as own is divided by it, from begin_rows on
        float share[2][2], out_dot[2][2], v_dot[2][2];  // g . v / |v|^2; dy . out and dy . v so far
        uint32_t v[kChunks][4];  // pairs, as ldmatrix leaves them: rows r % 2, columns + 8 (r / 2)
    };

    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int first_row, int n0, int m) {
        Fetched f;
        const int head = n0 / kHead;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = min(first_row + 8 * r, m - 1), batch = p.batch == 1 ? 0 : row / p.tokens, token = row - batch * p.tokens;
            f.place[r] = p.places != nullptr ? __ldg(&p.places[row].stats) : token;
            f.batch[r] = batch;
            const int stat = batch * p.q_heads + head;  // first head's row of own and lse
            f.gates[r] = load_gates(p, row, head);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                f.own[h][r] = __ldg(p.own + int64_t(stat + h) * p.tokens + token);
                f.lse[h][r] = __ldg(p.lse + int64_t(stat + h) * p.tokens + token);
            }
        }
        return f;
    }

    // `address(block, i)`: where a lane finds or leaves its part of columns 16 i .. of a staged block; 0 and 1 are the heads, 2 is v.
    template <class Address>
    static __device__ __forceinline__ void stage(const Arguments& p, Fetched& f, const float (&g)[64], int, int step, int row, int n0,
                                                 int m, Address&& address) {
        if (step == 0) products_with_v(p, f, g, address);
        if (step == 1) begin_rows(p, f, row, n0, m);
        if (step == 1 && p.gate != nullptr) gate_gradient(p, f, g, row, n0, m, address);
        if (step >= 2 && step < 6) gradients(f, g, step - 2, address);
        if (step == 6) finish_rows(p, f, row, n0, m);
    }

    template <class Address>
    static __device__ __forceinline__ void products_with_v(const Arguments& p, Fetched& f, const float (&g)[64], Address&& address) {
        float v_v[2] = {}, g_v[2][2] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            ptx::ldmatrix_x4(address(2, c), f.v[c][0], f.v[c][1], f.v[c][2], f.v[c][3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                v_v[i % 2] = dot(v_v[i % 2], low_bf16(f.v[c][i]), high_bf16(f.v[c][i]), f.v[c][i]);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float* pair = g + 32 * h + 8 * c + 2 * i;
                    g_v[h][i % 2] = dot(g_v[h][i % 2], pair[0], pair[1], f.v[c][i]);
                }
            }
        }
        quad_sum(g_v);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float inverse_square = p.xsa ? __fdividef(1.f, fmaxf(xsa::quad_sum(v_v[r]), 1e-24f)) : 0.f;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                f.share[h][r] = g_v[h][r] * inverse_square;
                f.out_dot[h][r] = f.v_dot[h][r] = 0.f;
            }
        }
    }

    static __device__ __forceinline__ float* stats_of(const Arguments& p, const Fetched& f, int head, int r) {
        return p.stats + 2 * int64_t(f.batch[r] * p.q_heads + head) * p.stats_width + f.place[r];
    }

    // Of both heads; ones where there is no gate.
    static __device__ __forceinline__ uint32_t load_gates(const Arguments& p, int row, int head) {
        return p.gate != nullptr ? __ldg(reinterpret_cast<const unsigned*>(p.gate + int64_t(row) * p.q_heads + head)) : 0x3f803f80u;
    }
    static __device__ __forceinline__ float gate_of(uint32_t gates, int h) { return h == 0 ? low_bf16(gates) : high_bf16(gates); }

    static __device__ __forceinline__ void begin_rows(const Arguments& p, Fetched& f, int row, int n0, int m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (row + 8 * r >= m) f.place[r] = -1;
            const bool live = f.place[r] >= 0;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                f.gate[h][r] = live ? gate_of(f.gates[r], h) : 0.f;
                if (!live) f.own[h][r] = f.share[h][r] = 0.f;
                // dy is stored times the factor, and own dy is not: the factor comes with the gate and leaves with own.
                const xsa::RowScale scale(f.lse[h][r]);
                f.gate[h][r] *= scale.factor;
                f.own[h][r] = __fdividef(f.own[h][r], scale.factor);
                if (live && threadIdx.x % 4 == h) *stats_of(p, f, n0 / kHead + h, r) = scale.shift;
            }
        }
    }

    template <class Address>
    static __device__ __forceinline__ void gate_gradient(const Arguments& p, Fetched& f, const float (&g)[64], int row, int n0, int m,
                                                         Address&& address) {
        float g_out[2][2] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                uint32_t out[4];
                ptx::ldmatrix_x4(address(h, c), out[0], out[1], out[2], out[3]);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* pair = g + 32 * h + 8 * c + 2 * i;
                    g_out[h][i % 2] = dot(g_out[h][i % 2], pair[0], pair[1], out[i]);
                }
            }
        quad_sum(g_out);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float dgate[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float gate = f.place[r] >= 0 ? gate_of(f.gates[r], h) : 0.f;
                dgate[h] = gate != 0.f ? __fdividef(g_out[h][r], gate) : 0.f;
            }
            if (threadIdx.x % 4 == 0 && row + 8 * r < m)
                *reinterpret_cast<uint32_t*>(p.dgate + int64_t(row + 8 * r) * p.q_heads + n0 / kHead) = ptx::pack_bf16(dgate[0], dgate[1]);
        }
    }

    // dy and dv of 16 columns. NOTE: delta is of dy as it is stored: what its rounding adds to dp along y cancels against delta, and the
    // gradient of a token that sees only itself is zero.
    template <class Address>
    static __device__ __forceinline__ void gradients(Fetched& f, const float (&g)[64], int c, Address&& address) {
        float dv[4][2] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t out[4], dy[4];
            ptx::ldmatrix_x4(address(h, c), out[0], out[1], out[2], out[3]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = i % 2, at = 32 * h + 8 * c + 2 * i;
                const float share = f.share[h][r], gate = f.gate[h][r], own = f.own[h][r], along = gate * share;
                const float dy0 = fmaf(gate, g[at], -along * low_bf16(f.v[c][i]));
                const float dy1 = fmaf(gate, g[at + 1], -along * high_bf16(f.v[c][i]));
                dv[i][0] = fmaf(-share, low_bf16(out[i]), fmaf(-own, dy0, dv[i][0]));
                dv[i][1] = fmaf(-share, high_bf16(out[i]), fmaf(-own, dy1, dv[i][1]));
                dy[i] = ptx::pack_bf16(dy0, dy1);
                f.out_dot[h][r] = dot(f.out_dot[h][r], low_bf16(dy[i]), high_bf16(dy[i]), out[i]);
                f.v_dot[h][r] = dot(f.v_dot[h][r], low_bf16(dy[i]), high_bf16(dy[i]), f.v[c][i]);
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
                const uint32_t gates = load_gates(p, row + 8 * r, n0 / kHead);  // once more, not kept: registers are short
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (quad != h) continue;
                    const float gate = gate_of(gates, h), dot_y = f.out_dot[h][r] + f.gate[h][r] * f.own[h][r] * f.v_dot[h][r];
                    stats_of(p, f, n0 / kHead + h, r)[p.stats_width] = gate != 0.f ? __fdividef(dot_y, gate) : 0.f;
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
    const cudaError_t status = xsa::clear_unused_stats(p.stats, p.batch * p.q_heads, p.stats_width, p.tokens, stream);
    if (status != cudaSuccess) return status;
    const gemm::Side side{p.v, p.dv, kv_columns, p.v_stride, p.gradient_stride};
    return gemm::launch<OutputBackward>(p.d_projected, p.weight, p.dy, p.out, {m, columns, p.width}, stream, p, side);
}

}  // namespace pgolf
