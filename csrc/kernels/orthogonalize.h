// Newton-Schulz orthogonalisation of many matrices. Per matrix, m = min(rows, columns):
//
//     X_0 = M / |M|_F
//     R = X X^T  (tall: X^T X)                m x m, symmetric
//     P = a I + b R + c R R                   m x m, symmetric
//     X <- P X  (tall: X P)                   and again, with the next (a, b, c)
//
// Where X is so much longer than wide that products of m x m matrices are cheap, two steps share one Gram matrix:
//
//     R, P as above;  U = R P,  R' = P U;  P' = a' I + b' R' + c' R' R';  Q = P' P,  X <- Q X
//
// Every one of these is a polynomial of R, so all are symmetric and commute. An odd number of steps begins with a single one.
// Everything is rounded to fp16 once, and the result to bf16; sums are fp32. With fp16 both forms are closer to the exact iteration
// than either is in bf16. A third step on the same Gram matrix would not be: where R is nearly singular, its rounding grows by a^2 per
// step. The norm is summed in fp64, so that neither tiny nor huge entries leave its range; a zero matrix stays zero.
//
// The products of all matrices are the tasks of one persistent kernel: 128 x 128 tiles, in the order product, matrix. A task waits
// until its matrix's previous product is complete; other matrices' tiles fill the wait. Of a symmetric product only the tiles on and
// below the diagonal are computed and stored: whoever needs one above it reads the mirror image, in the tensor cores' other order.
// For the same reason tall matrices are never transposed.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

// One matrix of the input: contiguous, 16-byte aligned.
struct OrthogonalizeInput {
    const void* matrix;
    __half* x;  // where X_0 goes: its place in the group's x[0]
    int64_t elements;
};

// All matrices of one shape, one behind the other in each buffer.
struct OrthogonalizeGroup {
    __half* x[2];         // [count, rows, columns], workspace; X after an even and an odd number of updates
    __half* squares;      // [kOrthogonalizeSquares, count, m, m], workspace
    __nv_bfloat16* out;   // [count, rows, columns]
    int32_t count, rows, columns;  // rows and columns are multiples of 8
};

struct OrthogonalizeParams {
    const OrthogonalizeInput* inputs;
    int64_t num_inputs;
    bool inputs_are_float32;  // else bfloat16
    const OrthogonalizeGroup* groups;
    int64_t num_groups;
    const double* coefficients;  // a, b, c of each step
    int64_t num_steps;           // at most kOrthogonalizeMaxSteps
    uint32_t* counters;          // workspace, kOrthogonalizeCounters per launch or more, and one per matrix
    double* partial_sums;        // workspace, orthogonalize_partial_sums() of each matrix
};

constexpr int kOrthogonalizeMaxSteps = 16;
constexpr int kOrthogonalizeSquares = 4;     // m x m matrices in use at a time
constexpr int kOrthogonalizeMaxGroups = 16;  // per launch; more are served by more launches
constexpr int kOrthogonalizeCounters = 1;    // the queue's, before those of a launch's matrices

int64_t orthogonalize_partial_sums(int64_t elements);  // of one matrix
cudaError_t orthogonalize(const OrthogonalizeParams& p, cudaStream_t stream);

}  // namespace pgolf
