// The arithmetic of an optimizer step over a list of tensors, one launch a function:
//
//     gradient_norm    sqrt of the sum of all squares
//     muon_direction   Nesterov momentum, its rows brought to length 1 if asked for
//     muon_apply       decoupled weight decay, the orthogonal update, the running average
//     adam_apply       AdamW, the running average
//
// What changes from step to step is read from device memory, so a CUDA graph can replay them. Arithmetic is fp32; what is stored
// is rounded once. Every tensor is contiguous and 16-byte aligned.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pgolf {

constexpr int kOptimizerMaxTensors = 48;  // per launch: the table travels as a kernel argument
constexpr int kOptimizerChunk = 2048;     // elements of a CTA

// A tensor's step size: rates[element / elements_per_rate].
struct StepSize {
    const float* rates;
    int64_t elements_per_rate;  // 0: one rate for all
    float weight_decay;
};

struct GradientNormTensor {
    const void* grad;
    int64_t elements;
    bool is_bf16;
};

struct MuonDirectionTensor {
    const void* grad;  // [rows, columns], bf16 or float32
    void* momentum;    // [rows, columns], bf16 or float32
    void* direction;   // [rows, columns], bf16
    int64_t rows;
    int32_t columns;
    bool grad_is_bf16, momentum_is_bf16;
};

struct MuonApplyTensor {
    float* param;
    const void* update;  // bf16
    float* average;      // null: none
    int64_t elements;
    StepSize step_size;
    float shape_factor;
};

struct AdamTensor {
    void *param, *mean, *square;  // all bf16 or all float32
    const void* grad;             // likewise
    float* average;               // null: none
    int64_t elements;
    StepSize step_size;
    bool is_bf16;
};

template <class Entry>
struct TensorTable {
    Entry tensors[kOptimizerMaxTensors];
    int32_t first_block[kOptimizerMaxTensors + 1];  // of each tensor, then the number of blocks; filled by the launcher
    int32_t count;
};

// partials: float64, optimizer_chunks(elements) per tensor
int64_t optimizer_chunks(int64_t elements);
cudaError_t gradient_norm(TensorTable<GradientNormTensor>& table, double* partials, float* norm, cudaStream_t stream);

// With g = scale grad and m the momentum tensor:   m' = momentum m + g      direction = g + momentum m'
// g, momentum m and m' are each rounded to the dtype of m, the direction to bf16, as orthogonalize would read it anyway.
struct MuonDirectionScalars {
    const float *scale, *momentum;  // device
    float row_epsilon;              // least length that a row is divided by; 0: rows keep their length
};
cudaError_t muon_direction(TensorTable<MuonDirectionTensor>& table, const MuonDirectionScalars& scalars, cudaStream_t stream);

cudaError_t muon_apply(TensorTable<MuonApplyTensor>& table, const float* lr_factor, float average_decay, cudaStream_t stream);

struct AdamScalars {
    const float *scale, *lr_factor;  // device
    const double* step;              // device, counted from 1
    double beta1, beta2;
    float epsilon, average_decay;
};
cudaError_t adam_apply(TensorTable<AdamTensor>& table, const AdamScalars& scalars, cudaStream_t stream);

}  // namespace pgolf
