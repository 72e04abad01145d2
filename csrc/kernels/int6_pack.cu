// Pack: a row belongs to one warp, or to a team of 2, 4 or 8 warps of a block, which holds it in registers between
// finding its largest magnitude and quantising, so weights are read once. A lane owns 8 neighbouring weights of each
// chunk, 6 bytes of code; a warp lays its bytes out in shared memory and stores them 16 at a time.
// Unpack mirrors it without the row: a warp takes the next few chunks, whichever rows they lie in.
#include "kernels/int6_pack.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <type_traits>

namespace pgolf {
namespace {

constexpr int kWarps = 8;                        // of a block
constexpr int kPerLane = 8;                      // weights: 16 bytes of bf16, 6 bytes of code
constexpr int kLaneBytes = 6;
constexpr int kChunk = 32 * kPerLane;            // weights of one warp-wide access
constexpr int kChunkBytes = 32 * kLaneBytes;
constexpr int kInFlight = 4;                     // chunks that a warp loads before it works on the first
template <typename T>
constexpr int kBlocksPerSM = sizeof(T) == 2 ? 5 : 4;  // pack: registers are held down to that

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

__host__ __device__ bool aligned_16(const void* base, int64_t row_bytes) {
    return (reinterpret_cast<uintptr_t>(base) | row_bytes) % 16 == 0;
}

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
        for (int i = 0; i < kWords; ++i) {
            if constexpr (sizeof(T) == 4) words[i] = element[i];
            else words[i] = element[2 * i] | element[2 * i + 1] << 16;
        }
    }

    __device__ float operator[](int i) const {
        const uint32_t word = words[i * kWords / kPerLane];
        if constexpr (sizeof(T) == 4) return __uint_as_float(word);
        else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
        else return __half2float(__ushort_as_half(uint16_t(i % 2 ? word >> 16 : word)));
    }

    // A 16-bit bound is within 1/16 of a code of the exact one, so it has the same code.
    __device__ void clamp(float lowest, float highest) {
        const T low = T(lowest), high = T(highest);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (sizeof(T) == 4) {
                words[i] = __float_as_uint(fminf(fmaxf(__uint_as_float(words[i]), low), high));
            } else {
                using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
                Pair& pair = reinterpret_cast<Pair&>(words[i]);
                pair = __hmin2(__hmax2(pair, Pair(low, low)), Pair(high, high));
            }
        }
    }

    // Magnitudes compare as the integers that their bits are, with inf and then nan above every number.
    // 16-bit types: two running maxima in one word.
    __device__ uint32_t max_magnitude(uint32_t so_far) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (sizeof(T) == 4) so_far = max(so_far, words[i] & 0x7fffffffu);
            else so_far = __vmaxu2(so_far, words[i] & 0x7fff7fffu);
        }
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

template <typename T>
struct Quantizer {
    float scale, inverse, lowest, highest;
    bool must_clamp;

    // `fitted`: the scale is the row's own largest magnitude over 31.
    __device__ Quantizer(float row_scale, bool fitted) {
        const bool usable = row_scale > 0 && row_scale < INFINITY;
        scale = usable ? row_scale : 1.0f;
        inverse = __frcp_rn(scale);
        lowest = usable ? -32 * scale : 0.0f;
        highest = usable ? 31 * scale : 0.0f;
        const bool normal = usable && row_scale >= 0x1p-14f;  // then fp16 rounded it by less than 2^-11
        must_clamp = !(fitted && normal);
    }

    // rint(w / scale) without a division, to the bit, for |w| <= 32 scale; in the low bits of a float: kTwo23Bits + u.
    __device__ uint32_t code_bits(float w) const {
        if constexpr (sizeof(T) == 2) {
            // w * inverse is w / scale to within 2^-19. Ties lie on multiples of 1/2; a w of at most 11 significant bits that
            // is no tie lies at least 2^-12 from one. So first round to a multiple of 2^-12, which puts ties where they belong
            // and the others no nearer; and that to a whole number, half to even.
            constexpr float kThree10 = 3072.0f;  // between 2^11 and 2^12, where floats are multiples of 2^-12
            return __float_as_uint(__fadd_rn(__fmaf_rn(w, inverse, kThree10), kTwo23 + kInt6Bias - kThree10));
        } else {
            // `quotient` is w / scale to within 2 ulp, `residual` = w - quotient * scale is exact (scale has 11 significant
            // bits), so before it is rounded the corrected quotient is off by less than 2^-22 ulp.
            // A tie, h = k + 1/2 times the scale, has at most 18 significant bits, so it is a float. If w is that float,
            // the corrected quotient rounds to h and the sum to even. Any other w is at least one float away from it, and
            // then w / scale is more than (1/2 + 2^-19) ulp away from h: the corrected quotient stays on its side.
            const float quotient = __fmul_rn(w, inverse);
            const float residual = __fmaf_rn(-quotient, scale, w);
            return __float_as_uint(__fadd_rn(__fmaf_rn(residual, inverse, quotient), kTwo23 + kInt6Bias));
        }
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

// How a block's warps share the rows of a matrix.
struct Shares {
    int rows;  // that a warp has in flight
    int span;  // weights of a row that a warp holds: rows * span = kInFlight * kChunk
    int team;  // log2 of the warps that share a row: enough to hold it, as far as a block goes; longer rows are read twice

    __host__ __device__ explicit Shares(int columns) {
        rows = columns <= kInFlight / 2 * kChunk ? 2 : 1;
        span = kInFlight / rows * kChunk;
        team = 0;
        while (1 << team < kWarps && span << team < columns) ++team;
    }
    __host__ __device__ int rows_per_block() const { return (kWarps >> team) * rows; }
};

template <typename T, bool kVectors, int kChunks>
__device__ __forceinline__ void load(Eight<T> (&held)[kChunks], const Int6PackMatrix& matrix, int64_t row, int start) {
    const T* weights = static_cast<const T*>(matrix.weights) + row * matrix.row_stride;
    const int column = start + threadIdx.x % 32 * kPerLane, columns = row < matrix.rows ? matrix.columns : 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        if constexpr (kVectors) held[c].load_vector(weights, column + c * kChunk, columns);
        else held[c].load_single(weights, column + c * kChunk, columns);
    }
}

template <typename T, int kChunks>
__device__ __forceinline__ uint32_t max_magnitude(const Eight<T> (&held)[kChunks], uint32_t so_far) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) so_far = held[c].max_magnitude(so_far);
    return so_far;
}

// Quantises what a warp holds of a row, from column `start` on, and stores its bytes.
template <typename T, int kChunks>
__device__ __forceinline__ void store(Eight<T> (&held)[kChunks], const Quantizer<T>& quantizer, uint8_t* packed_row, bool aligned,
                                      int start, int columns, uint8_t* s_bytes) {
    const int lane = threadIdx.x % 32;
    if (quantizer.must_clamp) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) held[c].clamp(quantizer.lowest, quantizer.highest);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        if (start + c * kChunk >= columns) break;
        const Eight<T>& w = held[c];
        uint32_t low = quantizer.group(w[0], w[1], w[2], w[3]), high = quantizer.group(w[4], w[5], w[6], w[7]);
        const int count = columns - (start + c * kChunk + lane * kPerLane);
        if (count < kPerLane) {  // past the end of the row lie no codes of zero weights but zero bits
            const uint64_t kept = (uint64_t(1) << 6 * max(count, 0)) - 1;
            low &= uint32_t(kept & 0xffffffu), high &= uint32_t(kept >> 24);
        }
        uint16_t* bytes = reinterpret_cast<uint16_t*>(s_bytes + c * kChunkBytes + lane * kLaneBytes);
        bytes[0] = uint16_t(low);
        bytes[1] = uint16_t(__byte_perm(low, high, 0x0042));
        bytes[2] = uint16_t(high >> 8);
    }
    __syncwarp();
    const int64_t offset = int64_t(start) / 4 * 3;
    const int bytes = int(min(int64_t(kChunks * kChunkBytes), int6_row_bytes(columns) - offset));
    uint8_t* packed = packed_row + offset;
    if (aligned) {
#pragma unroll
        for (int first = 0; first < kChunks * kChunkBytes; first += 32 * 16) {
            const int i = first + lane * 16;
            if (i < bytes) *reinterpret_cast<uint4*>(packed + i) = *reinterpret_cast<const uint4*>(s_bytes + i);
        }
    } else {
#pragma unroll 1
        for (int i = lane; i < bytes; i += 32) packed[i] = s_bytes[i];
    }
    __syncwarp();
}

// The rows of one block, `kRows` of them per team of warps.
template <typename T, bool kVectors, int kRows>
__device__ __forceinline__ void pack_rows(const Int6PackMatrix& matrix, uint32_t block, const Shares& shares) {
    constexpr int kChunks = kInFlight / kRows;  // of a row that a warp holds
    __shared__ alignas(16) uint8_t s_bytes[kWarps][kChunks * kChunkBytes];
    __shared__ uint32_t s_maximum[kRows][kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int team = 1 << shares.team, part = warp & (team - 1);
    const uint32_t first_row = block * shares.rows_per_block() + (warp >> shares.team) * kRows;
    const int columns = matrix.columns, first = part * shares.span, step = team * shares.span;

    Eight<T> held[kRows][kChunks];
#pragma unroll
    for (int r = 0; r < kRows; ++r) load<T, kVectors>(held[r], matrix, first_row + r, first);
    uint32_t maximum[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        maximum[r] = max_magnitude(held[r], 0);
        for (int start = first + step; start < columns; start += step) {
            load<T, kVectors>(held[r], matrix, first_row + r, start);
            maximum[r] = max_magnitude(held[r], maximum[r]);
        }
        maximum[r] = max_of_warp<T>(maximum[r]);
    }
    if (team > 1) {
        if (lane == 0) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) s_maximum[r][warp] = maximum[r];
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kRows; ++r) maximum[r] = __reduce_max_sync(0xffffffffu, s_maximum[r][warp - part + lane % team]);
    }

    const bool aligned = aligned_16(matrix.packed, int6_row_bytes(columns));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t row = first_row + r;
        if (row >= matrix.rows) break;
        const float magnitude = magnitude_of_bits<T>(maximum[r]);
        __half scale = __float2half_rn(__fdiv_rn(magnitude, 31.0f));
        if (matrix.given_scales != nullptr) scale = __ushort_as_half(matrix.given_scales[row]);
        if (!(magnitude < INFINITY)) scale = __ushort_as_half(0x7c00);
        if (lane == 0 && part == 0) matrix.scales[row] = __half_as_ushort(scale);
        const Quantizer<T> quantizer(__half2float(scale), matrix.given_scales == nullptr);
        for (int start = first; start < columns; start += step) {
            if (columns > step) load<T, kVectors>(held[r], matrix, row, start);
            store(held[r], quantizer, matrix.packed + row * int6_row_bytes(columns), aligned, start, columns, s_bytes[warp]);
        }
    }
}

// Whether rows start at multiples of 16 bytes and hold whole vectors of 8 weights.
template <typename T>
bool fits_in_vectors(const Int6PackMatrix& m) {
    return m.columns % kPerLane == 0 && aligned_16(m.weights, m.row_stride * sizeof(T));
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSM<T>) int6_pack_kernel(const __grid_constant__ Launch<Int6PackMatrix> launch) {
    const int index = matrix_of_block(launch);
    const Int6PackMatrix& matrix = launch.matrices[index];
    const uint32_t block = blockIdx.x - (index ? launch.end_block[index - 1] : 0);
    const Shares shares(matrix.columns);
    if (shares.rows == 2) pack_rows<T, kVectors, 2>(matrix, block, shares);
    else pack_rows<T, kVectors, 1>(matrix, block, shares);
}

int64_t blocks_for(const Int6PackMatrix& m) {
    const int rows = Shares(m.columns).rows_per_block();
    return (int64_t(m.rows) + rows - 1) / rows;
}

// ---- unpack -----------------------------------------------------------------------------------------

int64_t chunks_per_row(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

// Whether a lane's eight weights are all inside the row, its 6 bytes are even and its stores aligned.
template <typename T>
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
                for (int i = 0; i < int(sizeof(weights) / 16); ++i)
                    reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(weights)[i];
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

// The matrices that the kernel serves; the others are left to the other kernel.
template <typename T, bool kVectors, typename Matrix>
cudaError_t launch_those(void (*kernel)(Launch<Matrix>), const Matrix* matrices, int64_t count, cudaStream_t stream) {
    for (int64_t done = 0; done < count;) {
        Launch<Matrix> launch;
        launch.count = 0;
        int64_t blocks = 0;
        for (; done < count && launch.count < kInt6MatricesPerLaunch; ++done) {
            const int64_t more = blocks_for(matrices[done]);
            if (more == 0 || fits_in_vectors<T>(matrices[done]) != kVectors) continue;
            if (more > INT_MAX / (kWarps * kInFlight)) return cudaErrorInvalidValue;  // rows and chunks are counted in 32 bits
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
    const cudaError_t status = launch_those<T, true>(int6_pack_kernel<T, true>, matrices, count, stream);
    return status != cudaSuccess ? status : launch_those<T, false>(int6_pack_kernel<T, false>, matrices, count, stream);
}

template <typename T>
cudaError_t unpack(const Int6UnpackMatrix* matrices, int64_t count, cudaStream_t stream) {
    const cudaError_t status = launch_those<T, true>(int6_unpack_kernel<T, true>, matrices, count, stream);
    return status != cudaSuccess ? status : launch_those<T, false>(int6_unpack_kernel<T, false>, matrices, count, stream);
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
