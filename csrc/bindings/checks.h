// What every binding needs: argument checks whose message names the argument, the device guard, and
// torch's current stream. Bindings allocate nothing: the Python op owns every output and workspace.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

// NOTE: lives in libtorch_cuda only. Weak, so that the library also loads under a CPU build of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace pgolf {

using std::optional;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Half: return "float16";
        case ScalarType::Float: return "float32";
        case ScalarType::Double: return "float64";
        case ScalarType::Long: return "int64";
        case ScalarType::Int: return "int32";
        case ScalarType::Byte: return "uint8";
        default: return "another dtype";
    }
}

// `shape` entries of -1 match any size.
inline void check(const Tensor& t, const char* argument, ScalarType dtype, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(t.is_cuda(), argument, ": expected a CUDA tensor");
    STD_TORCH_CHECK(t.scalar_type() == dtype, argument, ": the kernel takes ", name_of(dtype), ", got ", name_of(t.scalar_type()));
    STD_TORCH_CHECK(t.dim() == int64_t(shape.size()), argument, ": expected ", shape.size(), " dimensions, got ", t.dim());
    int64_t d = 0;
    for (int64_t size : shape) {
        STD_TORCH_CHECK(size == -1 || t.size(d) == size, argument, ": expected size ", size, " in dimension ", d, ", got ", t.size(d));
        ++d;
    }
}

inline void check_contiguous(const Tensor& t, const char* argument) {
    STD_TORCH_CHECK(t.is_contiguous(), argument, ": expected a contiguous tensor");
}

// 16-byte vector accesses and TMA need it.
inline void check_aligned(const Tensor& t, const char* argument) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, argument, ": expected 16-byte aligned data; clone() gives it");
}

// The data of a contiguous bfloat16 tensor that is read 16 bytes at a time.
inline __nv_bfloat16* bf16s(const Tensor& t, const char* argument, std::initializer_list<int64_t> shape) {
    check(t, argument, ScalarType::BFloat16, shape);
    check_contiguous(t, argument);
    check_aligned(t, argument);
    return static_cast<__nv_bfloat16*>(t.data_ptr());
}

// The data of a contiguous float32 tensor.
inline float* floats(const Tensor& t, const char* argument, std::initializer_list<int64_t> shape) {
    check(t, argument, ScalarType::Float, shape);
    check_contiguous(t, argument);
    return static_cast<float*>(t.data_ptr());
}

// Rows or columns of a matrix as an int, to which kernels still add a tile or a grid's stride.
inline int int_size(int64_t size, const char* argument) {
    STD_TORCH_CHECK(size < (int64_t(1) << 31) - 65536, argument, ": expected fewer than 2^31 - 2^16 rows or columns, got ", size);
    return int(size);
}

// Host memory where a kernel reports an index out of range.
inline int64_t* host_report(const Tensor& t) {
    const bool fits = !t.is_cuda() && t.scalar_type() == ScalarType::Long && t.numel() == 3;
    STD_TORCH_CHECK(fits, "report: expected int64 [3] in pinned host memory");
    return static_cast<int64_t*>(t.data_ptr());
}

// Device of `t` made current for the guard's life, and that device's current torch stream.
struct OnDeviceOf {
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream;

    explicit OnDeviceOf(const Tensor& t) : guard(t.get_device_index()) {
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA; install a CUDA build of torch");
        void* s = nullptr;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &s) == 0, "no current CUDA stream");
        stream = static_cast<cudaStream_t>(s);
    }
};

inline void check_launch(cudaError_t status, const char* kernel) {
    if (status != cudaSuccess) cudaGetLastError();  // NOTE: forgets it; the next launch of anybody would report it once more
    STD_TORCH_CHECK(status == cudaSuccess, kernel, ": ", cudaGetErrorString(status));
}

}  // namespace pgolf
