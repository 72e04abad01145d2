#include "kernels/fused_mlp.h"

#include "bindings/checks.h"

namespace pgolf {
namespace {

FusedMlpParams shapes(const Tensor& first, const Tensor& w_up, const Tensor& w_down, int64_t activation) {
    FusedMlpParams p{};
    const int64_t m = first.size(0), d = w_up.size(1), h = w_up.size(0), d_out = w_down.size(0);
    const bool widths_fit = d > 0 && h > 0 && d_out > 0 && d % 8 == 0 && h % 8 == 0 && d_out % 8 == 0;
    STD_TORCH_CHECK(widths_fit, "w_up, w_down: the kernel takes widths that are multiples of 8, got ", d, ", ", h, ", ", d_out);
    STD_TORCH_CHECK(activation == 0 || activation == 1, "activation: expected 0 or 1, got ", activation);
    p.m = int_size(m, "x"), p.d = int_size(d, "w_up"), p.h = int_size(h, "w_up"), p.d_out = int_size(d_out, "w_down");
    p.w_up = bf16s(w_up, "w_up", {h, d});
    p.w_down = bf16s(w_down, "w_down", {d_out, h});
    p.activation = Activation(activation);
    return p;
}

void row_factors(FusedMlpParams& p, const optional<Tensor>& rstd, double scale) {
    p.rstd = rstd ? floats(*rstd, "rstd", {p.m}) : nullptr;
    p.scale = float(scale);
}

void fwd(Tensor x, optional<Tensor> rstd, double scale, optional<Tensor> residual, Tensor w_up, Tensor w_down, int64_t activation, Tensor u,
         Tensor y) {
    FusedMlpParams p = shapes(x, w_up, w_down, activation);
    row_factors(p, rstd, scale);
    p.x = bf16s(x, "x", {p.m, p.d});
    p.residual = residual ? bf16s(*residual, "residual", {p.m, p.d_out}) : nullptr;
    p.u = bf16s(u, "u", {p.m, p.h});
    p.y = bf16s(y, "y", {p.m, p.d_out});
    OnDeviceOf here(x);
    check_launch(fused_mlp_fwd(p, here.stream), "fused_mlp_fwd");
}

void bwd_input(Tensor dy, Tensor u, Tensor w_up, Tensor w_down, int64_t activation, Tensor du, Tensor dx) {
    FusedMlpParams p = shapes(dy, w_up, w_down, activation);
    row_factors(p, std::nullopt, 1.0);
    p.dy = bf16s(dy, "dy", {p.m, p.d_out});
    p.u = bf16s(u, "u", {p.m, p.h});
    p.du = bf16s(du, "du", {p.m, p.h});
    p.dx = bf16s(dx, "dx", {p.m, p.d});
    OnDeviceOf here(dy);
    check_launch(fused_mlp_bwd_input(p, here.stream), "fused_mlp_bwd_input");
}

void bwd(Tensor dy, Tensor x, optional<Tensor> dx_residual, optional<Tensor> rstd, double scale, Tensor u, Tensor w_up, Tensor w_down,
         int64_t activation, Tensor du, Tensor dx, Tensor dw_up, Tensor dw_down, optional<Tensor> row_sums) {
    FusedMlpParams p = shapes(dy, w_up, w_down, activation);
    row_factors(p, rstd, scale);
    if (rstd) {
        const bool complete = dx_residual.has_value() && row_sums.has_value() && scale > 0;
        STD_TORCH_CHECK(complete, "rstd: goes with dx_residual, row_sums and a scale > 0");
        p.dx_residual = bf16s(*dx_residual, "dx_residual", {p.m, p.d});
        p.row_sums = floats(*row_sums, "row_sums", {fused_mlp_row_tiles(p.h), p.m});
    }
    p.dy = bf16s(dy, "dy", {p.m, p.d_out});
    p.x = bf16s(x, "x", {p.m, p.d});
    p.u = bf16s(u, "u", {p.m, p.h});
    p.dw_up = floats(dw_up, "dw_up", {p.h, p.d});
    p.dw_down = floats(dw_down, "dw_down", {p.d_out, p.h});
    check_aligned(dw_up, "dw_up");  // two floats are added at a time
    p.du = bf16s(du, "du", {p.m, p.h});
    p.dx = bf16s(dx, "dx", {p.m, p.d});
    OnDeviceOf here(dy);
    check_launch(fused_mlp_bwd(p, here.stream), "fused_mlp_bwd");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def(
        "fused_mlp_fwd(Tensor x, Tensor? rstd, float scale, Tensor? residual, Tensor w_up, Tensor w_down, int activation, Tensor(a!) u,"
        " Tensor(b!) y) -> ()");
    m.def(
        "fused_mlp_bwd(Tensor dy, Tensor x, Tensor? dx_residual, Tensor? rstd, float scale, Tensor u, Tensor w_up, Tensor w_down,"
        " int activation, Tensor(a!) du, Tensor(b!) dx, Tensor(c!) dw_up, Tensor(d!) dw_down, Tensor(e!)? row_sums) -> ()");
    m.def("fused_mlp_bwd_input(Tensor dy, Tensor u, Tensor w_up, Tensor w_down, int activation, Tensor(a!) du, Tensor(b!) dx) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("fused_mlp_fwd", TORCH_BOX(&pgolf::fwd));
    m.impl("fused_mlp_bwd", TORCH_BOX(&pgolf::bwd));
    m.impl("fused_mlp_bwd_input", TORCH_BOX(&pgolf::bwd_input));
}
