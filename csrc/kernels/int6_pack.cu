// Pack: a row belongs to one warp, or to a team of 2, 4 or 8 warps of a block, which holds it in registers between
// finding its largest magnitude and quantising, so weights are read once. A lane owns 8 neighbouring weights of each
// chunk, 6 bytes of code; a warp lays its bytes out in shared memory and stores them 16 at a time.
// Unpack mirrors it without the row: a warp takes the next few chunks, whichever rows they lie in.
#include "kernels/int6_pack.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

namespace pgolf {
namespace {

constexpr int kWarps = 8;                        // of a block
constexpr int kPerLane = 8;                      // weights: 16 bytes of bf16, 6 bytes of code
constexpr int kLaneBytes = 6;
constexpr int kChunk = 32 * kPerLane;            // weights of one warp-wide access
constexpr int kChunkBytes = 32 * kLaneBytes;
constexpr int kHeld = 2;                         // pack: chunks a warp holds in registers
constexpr int kSpan = kHeld * kChunk;            // weights, and
constexpr int kSpanBytes = kHeld * kChunkBytes;  // bytes of code, that a warp handles at a time
constexpr int kBlocksPerSM = 5;                  // pack: registers are held down to that
constexpr int kInFlight = 4;                     // unpack: chunks a warp loads before it decodes

// The kernel parameter: which blocks serve which matrix.
template <typename Matrix>
struct Launch {
    Matrix matrices[kInt6MatricesPerLaunch];
    int32_t end_block[kInt6MatricesPerLaunch];
    int32_t count;
};
static_assert(sizeof(Launch<Int6PackMatrix>) <= 4096 && sizeof(Launch<Int6UnpackMatrix>) <= 4096);

template <typename Matrix>
__device__ int matrix_of_block(const Launch<Matrix>& launch) {
    int low = 0, high = launch.count - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (int(blockIdx.x) < launch.end_block[middle]) high = middle;
        else low = middle + 1;
    }
    return low;
}

// log2 of the warps that share a row: enough to hold it, as far as a block goes. Longer rows are read twice.
__host__ __device__ int team_log2(int columns) {
    int log2 = 0;
    while (1 << log2 < kWarps && kSpan << log2 < columns) ++log2;
    return log2;
}

__host__ __device__ bool aligned_16(const void* base, int64_t row_bytes) { return (reinterpret_cast<uintptr_t>(base) | row_bytes) % 16 == 0; }

// ---- eight weights as they lie in memory ----------------------------------------------------------

template <typename T>
struct Eight {
    static constexpr int kWords = kPerLane * sizeof(T) / 4;
    uint32_t words[kWords];

    // Columns [column, column + 8) of a row, zero past its end.
    __device__ void load_vector(const T* row, int column, int columns) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            const uint4 v = column < columns ? __ldg(reinterpret_cast<const uint4*>(row + column) + i / 4) : uint4{};
            words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
        }
    }
    __device__ void load_single(const T* row, int column, int columns) {
        using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
        const Bits* bits = reinterpret_cast<const Bits*>(row);
        uint32_t element[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) element[i] = column + i < columns ? __ldg(bits + column + i) : 0;
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = sizeof(T) == 4 ? element[i] : element[2 * i % kPerLane] | element[(2 * i + 1) % kPerLane] << 16;
    }

    __device__ float operator[](int i) const {
        const uint32_t word = words[i * kWords / kPerLane];
        if constexpr (sizeof(T) == 4) return __uint_as_float(word);
        else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
        else return __half2float(__ushort_as_half(uint16_t(i % 2 ? word >> 16 : word)));
    }

    // Magnitudes compare as the integers that their bits are, with inf and then nan above every number.
    // 16-bit types: two running maxima in one word.
    __device__ uint32_t max_magnitude(uint32_t so_far) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) so_far = sizeof(T) == 4 ? max(so_far, words[i] & 0x7fffffffu) : __vmaxu2(so_far, words[i] & 0x7fff7fffu);
        return so_far;
    }
};

template <typename T>
__device__ uint32_t max_of_warp(uint32_t lane_maxima) {
    return __reduce_max_sync(0xffffffffu, sizeof(T) == 4 ? lane_maxima : max(lane_maxima & 0xffffu, lane_maxima >> 16));
}

template <typename T>
__device__ float magnitude_of_bits(uint32_t bits) {
    if constexpr (sizeof(T) == 4) return __uint_as_float(bits);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(bits << 16);
    else return __half2float(__ushort_as_half(uint16_t(bits)));
}

// ---- codes ------------------------------------------------------------------------------------------

constexpr float kTwo23 = 8388608.0f;             // from here to 2^24 a float's low mantissa bits are its integer
constexpr uint32_t kTwo23Bits = 0x4B000000u;

struct Quantizer {
    float scale, inverse, lowest, highest;

    __device__ explicit Quantizer(float row_scale) {
        const bool usable = row_scale > 0 && row_scale < INFINITY;
        scale = usable ? row_scale : 1.0f;
        inverse = __frcp_rn(scale);
        lowest = usable ? -32 * scale : 0.0f;
        highest = usable ? 31 * scale : 0.0f;
    }

    // rint(w / scale) without a division, to the bit.
    //   `quotient` is w / scale to within 2 ulp, `residual` = w - quotient * scale is exact (scale has 11 significant
    //   bits), so before it is rounded the corrected quotient is off by less than 2^-22 ulp.
    //   A tie, h = k + 1/2 times the scale, has at most 18 significant bits, so it is a float. If w is that float,
    //   the corrected quotient rounds to h and the sum to even. Any other w is at least one float away from it, and then
    //   w / scale is more than (1/2 + 2^-19) ulp away from h: the corrected quotient stays on its side.
    // The clamp comes first: it commutes with rounding because its bounds are whole codes.
    __device__ uint32_t code_bits(float w) const {
        w = fminf(fmaxf(w, lowest), highest);
        const float quotient = __fmul_rn(w, inverse);
        const float residual = __fmaf_rn(-quotient, scale, w);
        return __float_as_uint(__fadd_rn(__fmaf_rn(residual, inverse, quotient), kTwo23 + kInt6Bias));  // kTwo23Bits + u
    }

    // Four codes in the low 24 bits; what lies above is not zero.
    __device__ uint32_t group(float w0, float w1, float w2, float w3) const {
        return code_bits(w0) + (code_bits(w1) << 6) + (code_bits(w2) << 12) + (code_bits(w3) << 18);
    }
};

// The `i`-th code of a 24-bit group, times scale. Exact: a code has 6 bits and a scale 11.
__device__ __forceinline__ float dequantize(uint32_t group, int i, float scale) {
    const int at = i < 3 ? 6 * i : 12;  // the field stays below bit 23, the float's exponent
    const uint32_t field = (i < 3 ? group : group >> 6) & (63u << at);
    const float unit = float(1 << at);
    return (__uint_as_float(kTwo23Bits | field) - (kTwo23 + kInt6Bias * unit)) * (scale / unit);
}

// ---- pack -------------------------------------------------------------------------------------------

template <typename T, bool kVectors>
__device__ __forceinline__ void load_span(Eight<T> (&held)[kHeld], const T* row, int start, int columns) {
    const int column = start + threadIdx.x % 32 * kPerLane;
#pragma unroll
    for (int c = 0; c < kHeld; ++c) {
        if constexpr (kVectors) held[c].load_vector(row, column + c * kChunk, columns);
        else held[c].load_single(row, column + c * kChunk, columns);
    }
}

// Whether rows start at multiples of 16 bytes and hold whole vectors of 8 weights.
template <typename T>
bool fits_in_vectors(const Int6PackMatrix& m) {
    return m.columns % kPerLane == 0 && aligned_16(m.weights, m.row_stride * sizeof(T));
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSM) int6_pack_kernel(const __grid_constant__ Launch<Int6PackMatrix> launch) {
    __shared__ alignas(16) uint8_t s_bytes[kWarps][kSpanBytes];
    __shared__ uint32_t s_maximum[kWarps];
    const int index = matrix_of_block(launch);
    const Int6PackMatrix& matrix = launch.matrices[index];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int log2 = team_log2(matrix.columns), team = 1 << log2, part = warp & (team - 1);
    const int64_t row = int64_t(blockIdx.x - (index ? launch.end_block[index - 1] : 0)) * (kWarps >> log2) + (warp >> log2);
    const int columns = row < matrix.rows ? matrix.columns : 0;

    const T* weights = static_cast<const T*>(matrix.weights) + row * matrix.row_stride;
    const bool reread = columns > team * kSpan;
    Eight<T> held[kHeld];
    uint32_t lane_maxima = 0;
    for (int start = part * kSpan; start < columns; start += team * kSpan) {
        load_span<T, kVectors>(held, weights, start, columns);
#pragma unroll
        for (int c = 0; c < kHeld; ++c) lane_maxima = held[c].max_magnitude(lane_maxima);
    }
    uint32_t maximum = max_of_warp<T>(lane_maxima);
    if (team > 1) {
        if (lane == 0) s_maximum[warp] = maximum;
        __syncthreads();
        for (int i = 0; i < team; ++i) maximum = max(maximum, s_maximum[warp - part + i]);
    }
    if (row >= matrix.rows) return;

    const float magnitude = magnitude_of_bits<T>(maximum);
    __half scale = __float2half_rn(__fdiv_rn(magnitude, 31.0f));
    if (matrix.given_scales != nullptr) scale = __ushort_as_half(matrix.given_scales[row]);
    if (!(magnitude < INFINITY)) scale = __ushort_as_half(0x7c00);
    if (lane == 0 && part == 0) matrix.scales[row] = __half_as_ushort(scale);
    const Quantizer quantizer(__half2float(scale));

    const int64_t row_bytes = int6_row_bytes(columns);
    uint8_t* const packed = matrix.packed + row * row_bytes;
    const bool aligned_out = aligned_16(matrix.packed, row_bytes);
    for (int start = part * kSpan; start < columns; start += team * kSpan) {
        if (reread) load_span<T, kVectors>(held, weights, start, columns);
#pragma unroll
        for (int c = 0; c < kHeld; ++c) {
            const int column = start + c * kChunk + lane * kPerLane;
            if (start + c * kChunk >= columns) break;
            const Eight<T>& w = held[c];
            uint32_t low = quantizer.group(w[0], w[1], w[2], w[3]), high = quantizer.group(w[4], w[5], w[6], w[7]);
            if (columns - column < kPerLane) {  // codes past the end are not stored as zero weights but as zero bits
                const int bits = 6 * max(columns - column, 0);
                const uint64_t kept = (uint64_t(high & 0xffffffu) << 24 | (low & 0xffffffu)) & ((uint64_t(1) << bits) - 1);
                low = uint32_t(kept) & 0xffffffu, high = uint32_t(kept >> 24);
            }
            uint16_t* bytes = reinterpret_cast<uint16_t*>(&s_bytes[warp][c * kChunkBytes + lane * kLaneBytes]);
            bytes[0] = uint16_t(low);
            bytes[1] = uint16_t(__byte_perm(low, high, 0x0042));
            bytes[2] = uint16_t(high >> 8);
        }
        __syncwarp();
        const int64_t offset = int64_t(start) / 4 * 3;
        const int bytes = int(min(int64_t(kSpanBytes), row_bytes - offset));
        if (aligned_out) {
#pragma unroll 1
            for (int i = lane * 16; i < bytes; i += 32 * 16) *reinterpret_cast<uint4*>(packed + offset + i) = *reinterpret_cast<const uint4*>(&s_bytes[warp][i]);
        } else {
#pragma unroll 1
            for (int i = lane; i < bytes; i += 32) packed[offset + i] = s_bytes[warp][i];
        }
        __syncwarp();
    }
}

int64_t blocks_for(const Int6PackMatrix& m) {
    const int rows_per_block = kWarps >> team_log2(m.columns);
    return (int64_t(m.rows) + rows_per_block - 1) / rows_per_block;
}

// ---- unpack -----------------------------------------------------------------------------------------

int64_t chunks_per_row(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

// Whether a lane's eight weights are all inside the row, its 6 bytes are even and its stores aligned.
bool fits_in_vectors(const Int6UnpackMatrix& m) {
    return m.columns % kPerLane == 0 && reinterpret_cast<uintptr_t>(m.packed) % 2 == 0 && aligned_16(m.weights, 0);
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kWarps * 32) int6_unpack_kernel(const __grid_constant__ Launch<Int6UnpackMatrix> launch) {
    const int index = matrix_of_block(launch);
    const Int6UnpackMatrix& matrix = launch.matrices[index];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int columns = matrix.columns;
    const int64_t row_bytes = int6_row_bytes(columns);

    const uint32_t chunks = (columns + kChunk - 1) / kChunk;
    const uint32_t first = ((blockIdx.x - (index ? launch.end_block[index - 1] : 0)) * kWarps + warp) * kInFlight;
    uint32_t row = first / chunks, chunk = first % chunks;
    int64_t rows[kInFlight];
    int lane_columns[kInFlight];
    uint32_t parts[kInFlight][3];  // 16 bits each
    uint16_t scales[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
        rows[u] = row;
        lane_columns[u] = chunk * kChunk + lane * kPerLane;
        const bool inside = row < uint32_t(matrix.rows) && lane_columns[u] < columns;
        if (!inside) lane_columns[u] = columns;
        const int64_t offset = lane_columns[u] / 4 * 3;
        const uint8_t* bytes = matrix.packed + row * row_bytes + offset;
        scales[u] = inside ? __ldg(matrix.scales + row) : 0;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            if constexpr (kVectors) {
                parts[u][i] = inside ? __ldg(reinterpret_cast<const uint16_t*>(bytes) + i) : 0;
            } else {
                parts[u][i] = inside && offset + 2 * i < row_bytes ? __ldg(bytes + 2 * i) : 0;
                parts[u][i] |= inside && offset + 2 * i + 1 < row_bytes ? __ldg(bytes + 2 * i + 1) << 8 : 0;
            }
        }
        if (++chunk == chunks) chunk = 0, ++row;
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
        const float scale = __half2float(__ushort_as_half(scales[u]));
        const uint32_t low = parts[u][0] | parts[u][1] << 16, high = parts[u][1] >> 8 | parts[u][2] << 8;  // 24 bits each, then rubbish
        alignas(16) T weights[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) weights[i] = T(dequantize(i < 4 ? low : high, i % 4, scale));
        T* out = static_cast<T*>(matrix.weights) + rows[u] * columns + lane_columns[u];
        if constexpr (kVectors) {
            if (lane_columns[u] < columns) {
#pragma unroll
                for (int i = 0; i < int(sizeof(weights) / 16); ++i) reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(weights)[i];
            }
        } else {
#pragma unroll
            for (int i = 0; i < kPerLane; ++i)
                if (lane_columns[u] + i < columns) out[i] = weights[i];
        }
    }
}

int64_t blocks_for(const Int6UnpackMatrix& m) {
    constexpr int kChunksPerBlock = kWarps * kInFlight;
    return (m.rows * chunks_per_row(m.columns) + kChunksPerBlock - 1) / kChunksPerBlock;
}

// ---- launch -----------------------------------------------------------------------------------------

// The matrices for which `fits` says `wanted`; the others are left to the other kernel.
template <typename Matrix>
cudaError_t launch_list(void (*kernel)(Launch<Matrix>), bool (*fits)(const Matrix&), bool wanted, const Matrix* matrices, int64_t count,
                        cudaStream_t stream) {
    for (int64_t done = 0; done < count;) {
        Launch<Matrix> launch;
        launch.count = 0;
        int64_t blocks = 0;
        for (; done < count && launch.count < kInt6MatricesPerLaunch; ++done) {
            const int64_t more = blocks_for(matrices[done]);
            if (more == 0 || fits(matrices[done]) != wanted) continue;
            if (more > INT_MAX / (kWarps * kInFlight)) return cudaErrorInvalidValue;  // chunks and blocks are counted in 32 bits
            if (blocks + more > INT_MAX) break;
            blocks += more;
            launch.matrices[launch.count] = matrices[done];
            launch.end_block[launch.count++] = int32_t(blocks);
        }
        if (launch.count == 0) continue;
        kernel<<<uint32_t(blocks), kWarps * 32, 0, stream>>>(launch);
        const cudaError_t status = cudaGetLastError();
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

template <typename T>
cudaError_t pack(const Int6PackMatrix* matrices, int64_t count, cudaStream_t stream) {
    const cudaError_t status = launch_list(int6_pack_kernel<T, true>, fits_in_vectors<T>, true, matrices, count, stream);
    return status != cudaSuccess ? status : launch_list(int6_pack_kernel<T, false>, fits_in_vectors<T>, false, matrices, count, stream);
}

template <typename T>
cudaError_t unpack(const Int6UnpackMatrix* matrices, int64_t count, cudaStream_t stream) {
    const cudaError_t status = launch_list(int6_unpack_kernel<T, true>, fits_in_vectors, true, matrices, count, stream);
    return status != cudaSuccess ? status : launch_list(int6_unpack_kernel<T, false>, fits_in_vectors, false, matrices, count, stream);
}

}  // namespace

cudaError_t int6_pack(const Int6PackMatrix* matrices, int64_t count, Int6Float type, cudaStream_t stream) {
    switch (type) {
        case Int6Float::kBFloat16: return pack<__nv_bfloat16>(matrices, count, stream);
        case Int6Float::kFloat16: return pack<__half>(matrices, count, stream);
        case Int6Float::kFloat32: return pack<float>(matrices, count, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t int6_unpack(const Int6UnpackMatrix* matrices, int64_t count, Int6Float type, cudaStream_t stream) {
    switch (type) {
        case Int6Float::kBFloat16: return unpack<__nv_bfloat16>(matrices, count, stream);
        case Int6Float::kFloat16: return unpack<__half>(matrices, count, stream);
        case Int6Float::kFloat32: return unpack<float>(matrices, count, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace pgolf
