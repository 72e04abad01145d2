// int6: signed 6-bit codes q in [-32, 31] with one fp16 scale per row; a weight is q * scale.
//
// Bit layout, the only drawing of it. A code is stored as u = q + 32 in 6 bits, rows apart, four codes to
// three bytes, little-endian: code c of a group starts at bit 6 c of the group's 24 bits.
//
//     byte 0            byte 1            byte 2
//     7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
//     u1|-----u0-----   ---u2--|---u1--   -----u3-----|u2
//
// Tail: a row of n codes takes ceil(6 n / 8) bytes; the last group keeps only the bytes that hold code
// bits (1, 2 or 3 codes: 1, 2 or 3 bytes) and its unused high bits are 0. Rows follow each other without padding.
//
// Quantisation: scale = fp16(amax / 31), or the fp16 scale that is given; q = clamp(rint(w / scale), -32, 31)
// in fp32 with round-half-even and IEEE division, 0 where the scale is not positive and finite. A row that
// holds an inf or nan gets the scale inf, also where one is given, so that it unpacks to nan and cannot pass unseen.
//
// Every implementation (the reference in Python, the kernels here, the Triton composite) gives the same bytes.
#pragma once
#include <cstdint>

namespace pgolf {

constexpr int kInt6Bias = 32;

#ifdef __CUDACC__
__host__ __device__
#endif
constexpr int64_t int6_row_bytes(int64_t columns) { return (6 * columns + 7) / 8; }

}  // namespace pgolf
