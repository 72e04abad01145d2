// torch.ops.pgolf_fast_sm90.{gradient_norm, muon_direction, muon_apply, adam_apply}: lists of tensors, in place.
#include "kernels/optimizer_step.h"

#include <vector>

#include "bindings/checks.h"

namespace pgolf {
namespace {

using Tensors = std::vector<Tensor>;

bool is_bf16(const Tensor& t, const char* argument) {
    const ScalarType dtype = t.scalar_type();
    const bool fits = dtype == ScalarType::BFloat16 || dtype == ScalarType::Float;
    STD_TORCH_CHECK(fits, argument, ": expected bfloat16 or float32, got ", name_of(dtype));
    return dtype == ScalarType::BFloat16;
}

// The data of a tensor that must lie like `model` and, unless `any_dtype`, hold the same dtype.
void* like(const Tensor& t, const Tensor& model, const char* argument, bool any_dtype = false) {
    const bool same_device = t.is_cuda() && t.get_device_index() == model.get_device_index();
    STD_TORCH_CHECK(same_device, argument, ": expected on the device of the first list");
    STD_TORCH_CHECK(t.numel() == model.numel(), argument, ": expected ", model.numel(), " elements, got ", t.numel());
    STD_TORCH_CHECK(any_dtype || t.scalar_type() == model.scalar_type(), argument, ": expected ", name_of(model.scalar_type()), ", got ",
                    name_of(t.scalar_type()));
    check_contiguous(t, argument);
    check_aligned(t, argument);
    return t.data_ptr();
}

const float* scalar(const Tensor& t, const char* argument) {
    check(t, argument, ScalarType::Float, {});
    return static_cast<const float*>(t.data_ptr());
}

void check_lists(size_t count, std::initializer_list<size_t> others) {
    STD_TORCH_CHECK(count <= kOptimizerMaxTensors, "the kernel takes at most ", kOptimizerMaxTensors, " tensors, got ", count);
    for (size_t other : others) STD_TORCH_CHECK(other == count, "lists of different lengths: ", count, " and ", other);
}

StepSize step_size(const Tensor& rates, double weight_decay, const Tensor& param) {
    check(rates, "rates", ScalarType::Float, {-1});
    check_contiguous(rates, "rates");
    const int64_t count = rates.size(0), elements = param.numel();
    STD_TORCH_CHECK(count > 0 && elements % count == 0, "rates: ", count, " do not share out ", elements, " elements");
    return {static_cast<const float*>(rates.data_ptr()), count == 1 ? 0 : elements / count, float(weight_decay)};
}

// The running average of tensor i; an empty list: there is none.
float* average(const Tensors& averages, size_t i, const Tensor& param) {
    if (averages.empty()) return nullptr;
    STD_TORCH_CHECK(averages[i].scalar_type() == ScalarType::Float, "averages: expected float32");
    return static_cast<float*>(like(averages[i], param, "averages", true));
}

int64_t chunks_op(int64_t elements) { return optimizer_chunks(elements); }

void gradient_norm_op(Tensors grads, Tensor partials, Tensor norm) {
    check_lists(grads.size(), {});
    TensorTable<GradientNormTensor> table{};
    int64_t chunks = 0;
    for (const Tensor& grad : grads) {
        table.tensors[table.count++] = {like(grad, grad, "grads"), grad.numel(), is_bf16(grad, "grads")};
        chunks += optimizer_chunks(grad.numel());
    }
    check(partials, "partials", ScalarType::Double, {chunks});
    check_contiguous(partials, "partials");
    OnDeviceOf on(norm);
    check_launch(gradient_norm(table, static_cast<double*>(partials.data_ptr()), floats(norm, "norm", {}), on.stream), "gradient_norm");
}

void muon_direction_op(Tensors grads, Tensors momenta, Tensors directions, Tensor scale, Tensor momentum, double row_epsilon) {
    check_lists(grads.size(), {momenta.size(), directions.size()});
    TensorTable<MuonDirectionTensor> table{};
    for (size_t i = 0; i < grads.size(); ++i) {
        const Tensor &grad = grads[i], &state = momenta[i];
        const int64_t columns = grad.size(-1);
        STD_TORCH_CHECK(columns > 0 && columns % 4 == 0 && columns <= INT32_MAX, "grads: expected rows of a multiple of 4, got ", columns);
        STD_TORCH_CHECK(is_bf16(directions[i], "directions"), "directions: expected bfloat16");
        table.tensors[table.count++] = {like(grad, grad, "grads"),
                                        like(state, grad, "momenta", true),
                                        like(directions[i], grad, "directions", true),
                                        grad.numel() / columns,
                                        int32_t(columns),
                                        is_bf16(grad, "grads"),
                                        is_bf16(state, "momenta")};
    }
    OnDeviceOf on(scale);
    const MuonDirectionScalars scalars{scalar(scale, "scale"), scalar(momentum, "momentum"), float(row_epsilon)};
    check_launch(muon_direction(table, scalars, on.stream), "muon_direction");
}

void muon_apply_op(Tensors params, Tensors updates, Tensors averages, Tensors rates, std::vector<double> weight_decays,
                   std::vector<double> shape_factors, Tensor lr_factor, double average_decay) {
    check_lists(params.size(), {updates.size(), rates.size(), weight_decays.size(), shape_factors.size(),
                                averages.empty() ? params.size() : averages.size()});
    TensorTable<MuonApplyTensor> table{};
    for (size_t i = 0; i < params.size(); ++i) {
        const Tensor& param = params[i];
        STD_TORCH_CHECK(!is_bf16(param, "params"), "params: expected float32");
        STD_TORCH_CHECK(is_bf16(updates[i], "updates"), "updates: expected bfloat16");
        table.tensors[table.count++] = {static_cast<float*>(like(param, param, "params")), like(updates[i], param, "updates", true),
                                        average(averages, i, param), param.numel(), step_size(rates[i], weight_decays[i], param),
                                        float(shape_factors[i])};
    }
    OnDeviceOf on(lr_factor);
    check_launch(muon_apply(table, scalar(lr_factor, "lr_factor"), float(average_decay), on.stream), "muon_apply");
}

void adam_apply_op(Tensors params, Tensors grads, Tensors means, Tensors squares, Tensors averages, Tensors rates,
                   std::vector<double> weight_decays, Tensor scale, Tensor lr_factor, Tensor step, double beta1, double beta2,
                   double epsilon, double average_decay) {
    check_lists(params.size(), {grads.size(), means.size(), squares.size(), rates.size(), weight_decays.size(),
                                averages.empty() ? params.size() : averages.size()});
    TensorTable<AdamTensor> table{};
    for (size_t i = 0; i < params.size(); ++i) {
        const Tensor& param = params[i];
        table.tensors[table.count++] = {like(param, param, "params"), like(means[i], param, "means"), like(squares[i], param, "squares"),
                                        like(grads[i], param, "grads"), average(averages, i, param), param.numel(),
                                        step_size(rates[i], weight_decays[i], param), is_bf16(param, "params")};
    }
    check(step, "step", ScalarType::Double, {});
    OnDeviceOf on(step);
    const AdamScalars scalars{scalar(scale, "scale"),
                              scalar(lr_factor, "lr_factor"),
                              static_cast<const double*>(step.data_ptr()),
                              beta1,
                              beta2,
                              float(epsilon),
                              float(average_decay)};
    check_launch(adam_apply(table, scalars, on.stream), "adam_apply");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def("optimizer_chunks(int elements) -> int");
    m.def("gradient_norm(Tensor[] grads, Tensor(a!) partials, Tensor(b!) norm) -> ()");
    m.def(
        "muon_direction(Tensor[] grads, Tensor(a!)[] momenta, Tensor(b!)[] directions, Tensor scale, Tensor momentum, float row_epsilon)"
        " -> ()");
    m.def(
        "muon_apply(Tensor(a!)[] params, Tensor[] updates, Tensor(b!)[] averages, Tensor[] rates, float[] weight_decays,"
        " float[] shape_factors, Tensor lr_factor, float average_decay) -> ()");
    m.def(
        "adam_apply(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor(d!)[] averages, Tensor[] rates,"
        " float[] weight_decays, Tensor scale, Tensor lr_factor, Tensor step, float beta1, float beta2, float epsilon, float average_decay)"
        " -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CompositeExplicitAutograd, m) { m.impl("optimizer_chunks", TORCH_BOX(&pgolf::chunks_op)); }
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("gradient_norm", TORCH_BOX(&pgolf::gradient_norm_op));
    m.impl("muon_direction", TORCH_BOX(&pgolf::muon_direction_op));
    m.impl("muon_apply", TORCH_BOX(&pgolf::muon_apply_op));
    m.impl("adam_apply", TORCH_BOX(&pgolf::adam_apply_op));
}
