// Newton-Schulz orthogonalisation of many matrices. Per matrix, m = min(rows, columns):
//
//     X_0 = M / |M|_F
//     gram = X X^T  (tall: X^T X)             m x m, symmetric
//     poly = b gram + c gram gram             m x m, symmetric
//     X   <- a X + poly X  (tall: X poly)     and again, with the next (a, b, c)
//
// gram, poly and X are rounded to bf16, once each; everything between is fp32. The norm is summed in fp64, so that
// neither tiny nor huge entries leave its range; a zero matrix stays zero.
//
// The products of all matrices are the tasks of one persistent kernel: 128 x 128 tiles, in the order step, product,
// matrix. A task waits until its matrix's previous product is complete; other matrices' tiles fill the wait. Of the
// symmetric products only the tiles on and above the diagonal are computed, and stored twice. Tall matrices are never
// transposed: the tensor cores read either order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

// One matrix of the input: contiguous, 16-byte aligned.
struct OrthogonalizeInput {
    const void* matrix;
    __nv_bfloat16* x;  // where X_0 goes: its place in the group's x[0]
    int64_t elements;
};

// All matrices of one shape, one behind the other in each buffer.
struct OrthogonalizeGroup {
    __nv_bfloat16* x[2];  // [count, rows, columns], workspace; X of even and odd steps
    __nv_bfloat16* gram;  // [count, m, m], workspace
    __nv_bfloat16* poly;  // [count, m, m], workspace
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
    uint32_t* counters;  // workspace, kOrthogonalizeCounters + the number of matrices
    double* partial_sums;  // workspace, orthogonalize_partial_sums() of them
};

constexpr int kOrthogonalizeMaxSteps = 16;
constexpr int kOrthogonalizeMaxGroups = 16;  // per launch; more are served by more launches
constexpr int kOrthogonalizeCounters = 1;    // the queue's, before one per matrix

int64_t orthogonalize_partial_sums(int64_t elements);  // of one matrix
cudaError_t orthogonalize(const OrthogonalizeParams& p, cudaStream_t stream);

}  // namespace pgolf
