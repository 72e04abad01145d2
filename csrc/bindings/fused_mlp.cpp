#include "kernels/fused_mlp.h"

#include "bindings/checks.h"

namespace pgolf {
namespace {

const __nv_bfloat16* input(const Tensor& t, const char* argument, int64_t rows, int64_t columns) {
    check(t, argument, ScalarType::BFloat16, {rows, columns});
    check_contiguous(t, argument);
    check_aligned(t, argument);
    return static_cast<const __nv_bfloat16*>(t.data_ptr());
}
__nv_bfloat16* output(const Tensor& t, const char* argument, int64_t rows, int64_t columns) {
    return const_cast<__nv_bfloat16*>(input(t, argument, rows, columns));
}

FusedMlpParams shapes(const Tensor& first, const Tensor& w_up, const Tensor& w_down, int64_t activation) {
    FusedMlpParams p{};
    const int64_t m = first.size(0), d = w_up.size(1), h = w_up.size(0), d_out = w_down.size(0);
    STD_TORCH_CHECK(m <= INT32_MAX, "x: more than 2^31 rows");
    STD_TORCH_CHECK(d % 8 == 0 && h % 8 == 0 && d_out % 8 == 0, "w_up, w_down: the kernel takes widths that are multiples of 8, got ", d, ", ", h, ", ", d_out);
    p.m = int(m), p.d = int(d), p.h = int(h), p.d_out = int(d_out);
    p.w_up = input(w_up, "w_up", h, d);
    p.w_down = input(w_down, "w_down", d_out, h);
    p.activation = Activation(activation);
    return p;
}

void fwd(Tensor x, Tensor w_up, Tensor w_down, int64_t activation, Tensor u, Tensor y) {
    FusedMlpParams p = shapes(x, w_up, w_down, activation);
    p.x = input(x, "x", p.m, p.d);
    p.u = output(u, "u", p.m, p.h);
    p.y = output(y, "y", p.m, p.d_out);
    OnDeviceOf here(x);
    check_launch(fused_mlp_fwd(p, here.stream), "fused_mlp_fwd");
}

float* sum(const Tensor& t, const char* argument, int64_t rows, int64_t columns) {
    check(t, argument, ScalarType::Float, {rows, columns});
    check_contiguous(t, argument);
    return static_cast<float*>(t.data_ptr());
}

FusedMlpParams input_gradient(const Tensor& dy, const Tensor& u, const Tensor& w_up, const Tensor& w_down, int64_t activation, const Tensor& du,
                              const Tensor& dx) {
    FusedMlpParams p = shapes(dy, w_up, w_down, activation);
    p.dy = input(dy, "dy", p.m, p.d_out);
    p.u = output(u, "u", p.m, p.h);
    p.du = output(du, "du", p.m, p.h);
    p.dx = output(dx, "dx", p.m, p.d);
    return p;
}

void bwd_input(Tensor dy, Tensor u, Tensor w_up, Tensor w_down, int64_t activation, Tensor du, Tensor dx) {
    OnDeviceOf here(dy);
    check_launch(fused_mlp_bwd_input(input_gradient(dy, u, w_up, w_down, activation, du, dx), here.stream), "fused_mlp_bwd_input");
}

void bwd(Tensor dy, Tensor x, Tensor u, Tensor w_up, Tensor w_down, int64_t activation, Tensor du, Tensor dx, Tensor dw_up, Tensor dw_down) {
    FusedMlpParams p = input_gradient(dy, u, w_up, w_down, activation, du, dx);
    p.x = input(x, "x", p.m, p.d);
    p.dw_up = sum(dw_up, "dw_up", p.h, p.d);
    p.dw_down = sum(dw_down, "dw_down", p.d_out, p.h);
    OnDeviceOf here(dy);
    check_launch(fused_mlp_bwd(p, here.stream), "fused_mlp_bwd");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def("fused_mlp_fwd(Tensor x, Tensor w_up, Tensor w_down, int activation, Tensor(a!) u, Tensor(b!) y) -> ()");
    m.def(
        "fused_mlp_bwd(Tensor dy, Tensor x, Tensor u, Tensor w_up, Tensor w_down, int activation, Tensor(a!) du, Tensor(b!) dx,"
        " Tensor(c!) dw_up, Tensor(d!) dw_down) -> ()");
    m.def("fused_mlp_bwd_input(Tensor dy, Tensor u, Tensor w_up, Tensor w_down, int activation, Tensor(a!) du, Tensor(b!) dx) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("fused_mlp_fwd", TORCH_BOX(&pgolf::fwd));
    m.impl("fused_mlp_bwd", TORCH_BOX(&pgolf::bwd));
    m.impl("fused_mlp_bwd_input", TORCH_BOX(&pgolf::bwd_input));
}
