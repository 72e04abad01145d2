#include "kernels/products.h"

#include "bindings/checks.h"

namespace pgolf {
namespace {

ProductParams sizes(int64_t m, int64_t n, int64_t k) {
    return {.m = int_size(m, "x"), .n = int_size(n, "weight"), .k = int_size(k, "x")};
}

const __nv_bfloat16* bf16(const Tensor& t, const char* argument, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(columns > 0 && columns % 8 == 0, argument, ": the kernel takes widths that are multiples of 8, got ", columns);
    return bf16s(t, argument, {rows, columns});
}

void forward(Tensor x, Tensor weight, optional<Tensor> residual, Tensor y, optional<Tensor> rstd, optional<Tensor> row_squares) {
    ProductParams p = sizes(x.size(0), weight.size(0), weight.size(1));
    p.a = bf16(x, "x", p.m, p.k);
    p.b = bf16(weight, "weight", p.n, p.k);
    p.residual = residual ? bf16(*residual, "residual", p.m, p.n) : nullptr;
    p.c = const_cast<__nv_bfloat16*>(bf16(y, "y", p.m, p.n));
    if (rstd) {
        STD_TORCH_CHECK(residual.has_value() && row_squares.has_value(), "rstd: goes with residual and row_squares");
        p.rstd = floats(*rstd, "rstd", {p.m});
        p.row_squares = floats(*row_squares, "row_squares", {product_column_tiles(p.n), p.m});
    }
    OnDeviceOf here(x);
    check_launch(product_forward(p, here.stream), "product_forward");
}

void backward(Tensor dy, Tensor weight, Tensor dx) {
    ProductParams p = sizes(dy.size(0), weight.size(1), weight.size(0));
    p.a = bf16(dy, "dy", p.m, p.k);
    p.b = bf16(weight, "weight", p.k, p.n);
    p.c = const_cast<__nv_bfloat16*>(bf16(dx, "dx", p.m, p.n));
    OnDeviceOf here(dy);
    check_launch(product_backward(p, here.stream), "product_backward");
}

void weight(Tensor dy, Tensor x, Tensor dweight) {
    ProductParams p = sizes(dy.size(1), x.size(1), dy.size(0));
    p.a = bf16(dy, "dy", p.k, p.m);
    p.b = bf16(x, "x", p.k, p.n);
    p.c = floats(dweight, "dweight", {p.m, p.n});
    check_aligned(dweight, "dweight");
    OnDeviceOf here(x);
    check_launch(product_weight(p, here.stream), "product_weight");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def("product_forward(Tensor x, Tensor weight, Tensor? residual, Tensor(a!) y, Tensor(b!)? rstd, Tensor(c!)? row_squares) -> ()");
    m.def("product_backward(Tensor dy, Tensor weight, Tensor(a!) dx) -> ()");
    m.def("product_weight(Tensor dy, Tensor x, Tensor(a!) dweight) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("product_forward", TORCH_BOX(&pgolf::forward));
    m.impl("product_backward", TORCH_BOX(&pgolf::backward));
    m.impl("product_weight", TORCH_BOX(&pgolf::weight));
}
