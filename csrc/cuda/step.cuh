// The arithmetic of an S2AP step, element by element, shared by perturb, update and update_select: the gradient of a score, where the
// perturbation takes a score, and SGD. Every function rounds exactly where the reference does.
#pragma once

#include "number.cuh"

namespace s2ap::cuda {

// The straight-through gradient of a score that stands `at`, from that of the masked weight: grad * weight rounded, times the sign.
// NaN has sign 0. A factor of 0 is multiplied as well: 0 * infinity is NaN.
template <class T>
S2AP_HD T score_grad(T grad, T weight, T at) {
  Compute<T> where = widen(at), sign = static_cast<Compute<T>>((where > 0) - (where < 0));
  return Number<T>::round(multiply(widen(Number<T>::round(multiply(widen(grad), widen(weight)))), sign));
}

// s + z with z = scale * g: the product rounded, then the sum, then the result to the dtype.
template <class T>
S2AP_HD T perturbed(T score, T grad, Compute<T> scale) {
  return Number<T>::round(add(widen(score), multiply(widen(grad), scale)));
}

template <class T>
S2AP_HD T multiply_add_rounded(Compute<T> a, T b, T c) {
  return Number<T>::round(multiply_add(a, widen(b), widen(c)));
}

// Operation for operation what torch.optim.SGD does on CUDA by default: there `a + alpha * b` is one fused multiply-add, and every
// result is rounded to the dtype before it is used again. So the scores get the same bits as from torch's own optimizer. (On the CPU
// torch rounds differently in places, and so does the CPU kernel: a step matches torch on the same device.)
template <class T>
struct Sgd {
  Compute<T> minus_lr, momentum, one_minus_dampening, weight_decay;
  bool nesterov;

  // Rounded as torch rounds its scalars.
  static Sgd of(double lr, double momentum, double dampening, double weight_decay, bool nesterov) {
    using C = Compute<T>;
    return {static_cast<C>(-lr), static_cast<C>(momentum), static_cast<C>(1 - dampening), static_cast<C>(weight_decay), nesterov};
  }

  // The new score; changes `buffer`, the element's momentum, where there is one.
  S2AP_DEVICE T step(T score, T grad, bool has_momentum, T& buffer) const {
    T d = grad;
    if (weight_decay != 0) d = multiply_add_rounded(weight_decay, score, d);
    if (has_momentum) {
      T decayed = Number<T>::round(multiply(momentum, widen(buffer)));
      buffer = multiply_add_rounded(one_minus_dampening, d, decayed);
      d = nesterov ? multiply_add_rounded(momentum, buffer, d) : buffer;
    }
    return multiply_add_rounded(minus_lr, d, score);
  }
};

}  // namespace s2ap::cuda
