// The softcap z = cap tanh(x / cap) and its exponential, with one special-function operation per element.
#pragma once
#include "kernels/common/ptx.cuh"

namespace pgolf {

constexpr int kTanhTerms = 7;

// tanh(u) on |u| <= 1 is u P(u^2), minimax in relative error: 5.0e-8, with fp32 rounding 1.6e-7 over all floats of the
// range. Terms fitted with the Remez exchange, P's constant first.
__host__ __device__ constexpr float tanh_term(int k) {
    const float terms[kTanhTerms] = {9.999999404e-01f, -3.333283961e-01f, 1.332520396e-01f, -5.345702916e-02f,
                                     2.028997988e-02f, -6.203379016e-03f, 1.041022595e-03f};
    return terms[k];
}
constexpr float kLog2E = 1.4426950408889634f;

// A kernel parameter: the terms come from constant memory, already scaled so that they take x instead of u.
struct Softcap {
    float cap, inv_cap, cap_log2e;
    float near;  // largest |x| that tanh_near serves; -1 where cap is so small that the scaled terms overflow
    float term[kTanhTerms];

    explicit Softcap(float cap) : cap(cap), inv_cap(1 / cap), cap_log2e(cap * kLog2E), near(cap >= 0.01f && cap <= 1e3f ? cap : -1.f) {
        double scale = 1 / double(cap);
        for (int k = 0; k < kTanhTerms; ++k, scale /= double(cap) * cap) term[k] = float(tanh_term(k) * scale);
    }

    // tanh(x / cap) for |x| <= near, of kCount numbers in step: one chain of multiply-adds alone waits for itself.
    template <int kCount>
    __device__ __forceinline__ void tanh_near(float (&t)[kCount], const float (&x)[kCount]) const {
        float s[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) s[i] = x[i] * x[i];
#pragma unroll
        for (int i = 0; i < kCount; ++i) t[i] = fmaf(term[kTanhTerms - 1], s[i], term[kTanhTerms - 2]);
#pragma unroll
        for (int k = kTanhTerms - 3; k >= 0; --k)
#pragma unroll
            for (int i = 0; i < kCount; ++i) t[i] = fmaf(t[i], s[i], term[k]);
#pragma unroll
        for (int i = 0; i < kCount; ++i) t[i] *= x[i];
    }

    // tanh(x / cap) for every x: 1 - 2 / (1 + e^(2|u|)) where the polynomial ends.
    __device__ __forceinline__ float tanh(float x) const {
        const float u = x * inv_cap, s = u * u;
        const float far = 1.f - __fdividef(2.f, 1.f + ptx::exp2_approx(2.f * kLog2E * fabsf(u)));
        float p = tanh_term(kTanhTerms - 1);
#pragma unroll
        for (int k = kTanhTerms - 2; k >= 0; --k) p = fmaf(p, s, tanh_term(k));
        return fabsf(u) <= 1.f ? u * p : copysignf(far, u);
    }

    // tanh(x / cap) for every x. Measured: within 8e-6, and 1 - tanh^2 within 1.2e-4 of itself up to |x| = 3.6 cap, 4.2e-3 at 4.6 cap.
    __device__ __forceinline__ float tanh_approx(float x) const { return ptx::tanh_approx(x * inv_cap); }

    // e^z
    __device__ __forceinline__ float exponential(float t) const { return ptx::exp2_approx(t * cap_log2e); }
};

// dz/dx
__device__ __forceinline__ float softcap_slope(float t) { return fmaf(-t, t, 1.f); }

}  // namespace pgolf
