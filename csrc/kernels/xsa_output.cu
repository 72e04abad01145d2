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
// Four lanes share two rows, r, of a tile's two heads, h. What is one number for a row and head is the business of one of them.
__device__ __forceinline__ int own_h() { return threadIdx.x / 2 % 2; }
__device__ __forceinline__ int own_r() { return threadIdx.x % 2; }

// One of two sums over this lane and the one `apart` away, which keeps the other.
__device__ __forceinline__ float kept_sum(int keeps, const float (&x)[2], int apart) {
    return (keeps == 0 ? x[0] : x[1]) + __shfl_xor_sync(0xffffffffu, keeps == 0 ? x[1] : x[0], apart);
}
// Sums over the four lanes, each lane's its own.
__device__ __forceinline__ float own_sum(const float (&x)[2]) {
    const float sum = kept_sum(own_r(), x, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}
__device__ __forceinline__ float own_sum(const float (&x)[2][2]) {
    return kept_sum(own_r(), {kept_sum(own_h(), {x[0][0], x[1][0]}, 2), kept_sum(own_h(), {x[0][1], x[1][1]}, 2)}, 1);
}
// Every lane's own to all four.
__device__ __forceinline__ void share_own(float (&all)[2][2], float own) {
#pragma unroll
    for (int i = 0; i < 4; ++i) all[i / 2][i % 2] = __shfl_sync(0xffffffffu, own, i, 4);
}

// A tile is the two query heads of a key head; out is its auxiliary tile and becomes dy, v its side block and becomes dv.
struct OutputBackward : gemm::PlainOp {
    static constexpr int kBlockN = kXsaOutputGroup * kHead, kAMajor = wgmma::kMajorK, kBMajor = wgmma::kMajorMN;
    static constexpr gemm::Output kOutput = gemm::kStoreBf16;
    static constexpr bool kHasAux = true;
    static constexpr int kSideBlocks = 1, kPassKBlocks = 8;
    static constexpr bool kSideStored = true;
    static __device__ __forceinline__ int side_column(int n0, int) { return n0 / kXsaOutputGroup; }
    using Arguments = XsaOutputBwdParams;

    struct Fetched {
        // Of the lane's own row and head.
        int place;  // negative: no token of a document, whose gate and own are 0
        int line;   // of own, lse and stats
        uint32_t gate_bits;
        float own_y, lse;
        // Of all rows and heads, [h][r].
        float gate[2][2], own[2][2];  // the gate times the row's scale, as own is divided by it
        float share[2][2];            // g . v / |v|^2
        float out_dot[2][2], v_dot[2][2];  // dy . out and dy . v so far
        uint32_t v[kChunks][4];  // pairs, as ldmatrix leaves them: rows r % 2, columns + 8 (r / 2)
    };

    static __device__ __forceinline__ Fetched fetch(const Arguments& p, int first_row, int n0, int m) {
        Fetched f;
        const int row = min(first_row + 8 * own_r(), m - 1), head = n0 / kHead + own_h();
        const int batch = p.batch == 1 ? 0 : row / p.tokens, token = row - batch * p.tokens;
        f.place = p.places != nullptr ? __ldg(&p.places[row].stats) : token;
        f.line = batch * p.q_heads + head;
        const int64_t at = int64_t(f.line) * p.tokens + token;
        f.own_y = __ldg(p.own + at);
        f.lse = __ldg(p.lse + at);
        constexpr uint32_t kOne = 0x3f80;
        f.gate_bits = p.gate != nullptr ? __ldg(reinterpret_cast<const unsigned short*>(p.gate) + int64_t(row) * p.q_heads + head) : kOne;
        return f;
    }

    // `address(block, i)`: where a lane finds or leaves its part of columns 16 i .. of a staged block; 0 and 1 are the heads, 2 is v.
    template <class Address>
    static __device__ __forceinline__ void stage(const Arguments& p, Fetched& f, const float (&g)[64], int, int step, int row, int n0,
                                                 int m, Address&& address) {
        if (step == 0) products_with_v(p, f, g, address);
        if (step == 1) begin_rows(p, f, row, m);
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
        const float inverse_square = p.xsa ? __fdividef(1.f, fmaxf(own_sum(v_v), kXsaLeastSquare)) : 0.f;
        f.share[0][0] = own_sum(g_v) * inverse_square;  // the lane's own, until begin_rows
    }

    static __device__ __forceinline__ float* stats_of(const Arguments& p, const Fetched& f) {
        return p.stats + 2 * int64_t(f.line) * p.stats_width + f.place;
    }

    static __device__ __forceinline__ void begin_rows(const Arguments& p, Fetched& f, int row, int m) {
        if (row + 8 * own_r() >= m) f.place = -1;
        if (f.place < 0) f.gate_bits = 0;
        const bool live = f.place >= 0;
        // dy is stored times the factor, and own dy is not: the factor comes with the gate and leaves with own.
        const xsa::RowScale scale(f.lse);
        if (live) *stats_of(p, f) = scale.shift;
        share_own(f.gate, low_bf16(f.gate_bits) * scale.factor);
        share_own(f.own, live ? __fdividef(f.own_y, scale.factor) : 0.f);
        share_own(f.share, live ? f.share[0][0] : 0.f);
#pragma unroll
        for (int i = 0; i < 4; ++i) f.out_dot[i / 2][i % 2] = f.v_dot[i / 2][i % 2] = 0.f;
    }

    // x / gate of the lane's own, and 0 where the gate is 0.
    static __device__ __forceinline__ float over_gate(const Fetched& f, float x) {
        const float gate = low_bf16(f.gate_bits);
        return gate != 0.f ? __fdividef(x, gate) : 0.f;
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
        const float dgate = over_gate(f, own_sum(g_out));
        if (row + 8 * own_r() < m)
            p.dgate[int64_t(row + 8 * own_r()) * p.q_heads + n0 / kHead + own_h()] = __float2bfloat16_rn(dgate);
    }

    // dy and dv of 16 columns. NOTE: delta is of dy as it is stored: what its rounding adds to dp along y cancels against delta, and the
    // gradient of a token that sees only itself is zero.
    template <class Address>
    static __device__ __forceinline__ void gradients(Fetched& f, const float (&g)[64], int c, Address&& address) {
        uint32_t outs[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) ptx::ldmatrix_x4(address(h, c), outs[h][0], outs[h][1], outs[h][2], outs[h][3]);
        float dv[4][2] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t(&out)[4] = outs[h];
            uint32_t dy[4];
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
        float dot_y[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int r = 0; r < 2; ++r) dot_y[h][r] = fmaf(f.gate[h][r] * f.own[h][r], f.v_dot[h][r], f.out_dot[h][r]);
        const float delta = over_gate(f, own_sum(dot_y));
        if (f.place >= 0) {
            stats_of(p, f)[p.stats_width] = delta;
        } else if (row + 8 * own_r() < m) {
            const int64_t at = (row + 8 * own_r()) * p.gradient_stride;
            uint4* const dq = reinterpret_cast<uint4*>(p.dq + at + n0 + own_h() * kHead);
            uint4* const dk = reinterpret_cast<uint4*>(p.dk + at + n0 / 2 + own_h() * (kHead / 2));
            for (int i = 0; i < kHead / 8; ++i) dq[i] = make_uint4(0, 0, 0, 0);
            for (int i = 0; i < kHead / 16; ++i) dk[i] = make_uint4(0, 0, 0, 0);
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
