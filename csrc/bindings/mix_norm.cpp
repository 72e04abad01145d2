// Registers the residual mix with its norm: check, fill the params, launch.
#include "kernels/mix_norm.h"

#include <vector>

#include "bindings/checks.h"

namespace pgolf {
namespace {

__nv_bfloat16* matrix(const Tensor& t, const char* argument, int64_t m) { return bf16s(t, argument, {m, kMixNormWidth}); }
__nv_bfloat16* matrix(const optional<Tensor>& t, const char* argument, int64_t m) { return t ? matrix(*t, argument, m) : nullptr; }

float* floats(const optional<Tensor>& t, const char* argument, std::initializer_list<int64_t> shape) {
    return t ? pgolf::floats(*t, argument, shape) : nullptr;
}

// What both directions share.
template <typename Params>
Params mix_params(const std::vector<Tensor>& tensors, const optional<Tensor>& coefficients, const std::vector<int64_t>& rows, int64_t m,
                  double norm_scale) {
    Params p{};
    STD_TORCH_CHECK(m > 0, "tensors: expected at least one row");
    STD_TORCH_CHECK(tensors.size() <= size_t(kMixNormMaxTensors), "tensors: expected up to ", kMixNormMaxTensors, ", got ", tensors.size());
    STD_TORCH_CHECK(rows.size() >= tensors.size(), "rows: expected one per tensor, ", tensors.size(), ", got ", rows.size());
    p.m = uint32_t(int_size(m, "tensors"));
    p.num_tensors = int(tensors.size());
    p.num_rows = coefficients ? int(coefficients->size(0)) : 1;
    STD_TORCH_CHECK(p.num_rows >= 1 && p.num_rows <= kMixNormMaxTensors, "coefficients: expected 1 to ", kMixNormMaxTensors, " rows, got ",
                    p.num_rows);
    p.coefficients = floats(coefficients, "coefficients", {p.num_rows, kMixNormWidth});
    if (coefficients) check_aligned(*coefficients, "coefficients");
    p.norm_scale = float(norm_scale);
    for (size_t i = 0; i < tensors.size(); ++i) {
        p.tensors[i] = matrix(tensors[i], "tensors", m);
        STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < p.num_rows, "rows: expected 0 to ", p.num_rows - 1, ", got ", rows[i]);
        p.rows[i] = int(rows[i]);
    }
    return p;
}

void fwd(std::vector<Tensor> tensors, optional<Tensor> coefficients, std::vector<int64_t> rows, double norm_scale, optional<Tensor> mixed,
         optional<Tensor> normed, optional<Tensor> rstd) {
    STD_TORCH_CHECK(!tensors.empty(), "tensors: expected at least one");
    STD_TORCH_CHECK(rstd.has_value() || !normed.has_value(), "rstd: goes with normed");
    const int64_t m = tensors[0].size(0);
    auto p = mix_params<MixNormFwdParams>(tensors, coefficients, rows, m, norm_scale);
    p.mixed = matrix(mixed, "mixed", m);
    p.normed = matrix(normed, "normed", m);
    p.rstd = floats(rstd, "rstd", {m});
    const OnDeviceOf here(tensors[0]);
    check_launch(mix_norm_fwd(p, here.stream), "mix_norm_fwd");
}

void bwd(optional<Tensor> d_mixed, optional<Tensor> d_normed, optional<Tensor> mixed, optional<Tensor> rstd, std::vector<Tensor> tensors,
         optional<Tensor> coefficients, std::vector<int64_t> rows, double norm_scale, std::vector<Tensor> accumulate,
         std::vector<Tensor> gradients, optional<Tensor> partial_sums, optional<Tensor> d_coefficients) {
    STD_TORCH_CHECK(!gradients.empty(), "gradients: expected at least one");
    const int64_t m = gradients[0].size(0);
    auto p = mix_params<MixNormBwdParams>(tensors, coefficients, rows, m, norm_scale);
    p.d_mixed = matrix(d_mixed, "d_mixed", m);
    p.d_normed = matrix(d_normed, "d_normed", m);
    p.mixed = matrix(mixed, "mixed", m);
    p.rstd = floats(rstd, "rstd", {m});
    STD_TORCH_CHECK(!p.d_normed || (p.rstd && (p.mixed || p.num_tensors > 0)), "d_normed: needs rstd, and mixed or the tensors");
    const bool per_row = gradients.size() == size_t(p.num_rows) && accumulate.size() == size_t(p.num_rows);
    STD_TORCH_CHECK(per_row, "gradients, accumulate: expected one per row of coefficients");
    for (int r = 0; r < p.num_rows; ++r) {
        p.gradients[r] = matrix(gradients[r], "gradients", m);
        p.accumulate[r] = accumulate[r].numel() ? matrix(accumulate[r], "accumulate", m) : nullptr;
    }
    p.partial_sums = floats(partial_sums, "partial_sums", {kMixNormMaxCtas, p.num_tensors, kMixNormWidth});
    p.d_coefficients = floats(d_coefficients, "d_coefficients", {p.num_rows, kMixNormWidth});
    STD_TORCH_CHECK(p.num_tensors == 0 || (p.partial_sums && p.d_coefficients), "d_coefficients: needed with the tensors");
    const OnDeviceOf here(gradients[0]);
    check_launch(mix_norm_bwd(p, here.stream), "mix_norm_bwd");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def(
        "mix_norm_fwd(Tensor[] tensors, Tensor? coefficients, int[] rows, float norm_scale, Tensor(a!)? mixed, Tensor(b!)? normed, "
        "Tensor(c!)? rstd) -> ()");
    // An entry of `accumulate` without elements: nothing to add.
    m.def(
        "mix_norm_bwd(Tensor? d_mixed, Tensor? d_normed, Tensor? mixed, Tensor? rstd, Tensor[] tensors, Tensor? coefficients, int[] rows, "
        "float norm_scale, Tensor[] accumulate, Tensor(a!)[] gradients, Tensor(b!)? partial_sums, Tensor(c!)? d_coefficients) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("mix_norm_fwd", TORCH_BOX(&pgolf::fwd));
    m.impl("mix_norm_bwd", TORCH_BOX(&pgolf::bwd));
}
