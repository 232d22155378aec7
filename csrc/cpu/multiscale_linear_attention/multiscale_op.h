// Multi-scale linear attention as boxed operators. Included by the files that register them alone.
#pragma once

#include "common/linear_attention_op.h"
#include "multiscale_linear_attention/multiscale.h"

namespace mvk {
namespace {

// A 4-D map (B, C, H, W) whose channels are heads of D.
Map heads_map(const Tensor& t, int64_t D) {
  const int64_t* s = t.strides();
  return {t.data(), s[0], s[1] * D, s[1], s[2], s[3]};
}

// As map_like, of a map of 4 axes: dense, channels last if `like`'s stride over channels is 1.
Shape channels_like(const Tensor& like, int64_t channels) {
  const int64_t* n = like.sizes();
  const std::vector<int64_t> sizes{n[0], channels, n[2], n[3]};
  if (like.strides()[1] != 1) return dense(sizes);
  const int64_t x = std::max<int64_t>(channels, 1), y = x * std::max<int64_t>(n[3], 1),
                b = y * std::max<int64_t>(n[2], 1);
  return {sizes, {b, 1, y, x}};
}

constexpr const char* kMultiscale = "multiscale_linear_attention";

void require_scale(bool fits, const char* what) { require(fits, kMultiscale, what); }

// `weights`: the depthwise weights of all scales, the pointwise ones, of four axes each; the biases of the first and of the second,
// which have no elements where there are none, or no biases at all.
struct MultiscaleCall {
  Multiscale a{};
  std::vector<Tensor> weights;
  std::vector<Scale> scales;

  MultiscaleCall(const Tensor& qkv, std::vector<Tensor> some, int64_t D, double eps) : weights(std::move(some)) {
    require_scale(qkv.dim() == 4, "qkv has 4 axes");
    const int64_t* n = qkv.sizes();
    require_scale(D >= 1 && n[1] > 0 && n[1] % (3 * D) == 0, "head_dim does not fit");
    require_sizes(kMultiscale, {n[2], n[3]}, {D});
    const auto matrices = std::count_if(weights.begin(), weights.end(), [](const Tensor& t) { return t.dim() == 4; });
    const bool biased = int64_t(weights.size()) == 2 * matrices;
    require_scale(
        matrices % 2 == 0 && (biased || int64_t(weights.size()) == matrices), "two or four tensors for each scale");
    a.dtype = dtype_of(qkv, kMultiscale);
    a.B = n[0], a.heads = n[1] / (3 * D), a.D = D, a.H = n[2], a.W = n[3], a.S = matrices / 2;
    a.eps = eps, a.qkv = heads_map(qkv, D), a.chunks = 1, a.poison = poison;
    for (int64_t i = 0; i < a.S; ++i) {
      const Tensor &wide = weights[i], &mixing = weights[a.S + i];
      require_scale(
          wide.dim() == 4 && wide.sizes()[0] == n[1] && wide.sizes()[1] == 1 && wide.sizes()[2] == wide.sizes()[3] &&
              wide.sizes()[2] % 2 == 1,
          "depthwise does not fit");
      require_scale(
          mixing.dim() == 4 && mixing.sizes()[0] == n[1] && mixing.sizes()[1] == D && mixing.sizes()[2] == 1 &&
              mixing.sizes()[3] == 1,
          "pointwise does not fit");
      Scale scale{};
      const int64_t *w = wide.strides(), *m = mixing.strides();
      scale.k = wide.sizes()[2];
      scale.depthwise = wide.data(), scale.pointwise = mixing.data();
      scale.depthwise_c = w[0], scale.depthwise_y = w[2], scale.depthwise_x = w[3];
      scale.pointwise_o = m[0], scale.pointwise_c = m[1];
      if (biased) {
        take_bias(weights[2 * a.S + i], n[1], scale.depthwise_bias, scale.depthwise_bias_c);
        take_bias(weights[3 * a.S + i], n[1], scale.pointwise_bias, scale.pointwise_bias_o);
      }
      scales.push_back(scale);
    }
    for (const Tensor& one : weights) require_scale(one.dtype() == qkv.dtype(), "mixed dtypes");
    a.scales = scales.data();
  }

  static void take_bias(const Tensor& t, int64_t channels, const void*& data, int64_t& step) {
    require_scale(t.dim() == 1 && (t.sizes()[0] == 0 || t.sizes()[0] == channels), "a bias does not fit");
    if (t.sizes()[0]) data = t.data(), step = t.strides()[0];
  }

  // FLOPs of a unit, each product and convolution so many times.
  double flops(double times) const {
    double of_a_pixel = 4.0 * double((1 + a.S) * a.D * a.D);
    for (const Scale& scale : scales) of_a_pixel += 6.0 * double(a.D * (scale.k * scale.k + a.D));
    return times * of_a_pixel * double(a.pixels());
  }
  template <class F>
  void run(Stage stage, int64_t least, const F& kernel) {
    a.stage = stage;
    parallel(a.units(), least, [&](int64_t i, int64_t j) { kernel(a, i, j); });
  }
};

// With `kept`, also what the backward needs of it.
template <bool kept>
void multiscale_linear_attention_forward(Value* stack, uint64_t, uint64_t) {
  Tensor qkv = take(stack[0]);
  MultiscaleCall call(qkv, take_list(stack[1]), to<int64_t>(stack[2]), to<double>(stack[3]));
  Multiscale& a = call.a;
  Tensor out = result(channels_like(qkv, a.groups() * a.D), qkv.dtype()), partial, kv, keys;
  a.out = heads_map(out, a.D);
  if constexpr (kept) {
    kv = empty({a.B, a.groups(), a.D, a.D}, sums_dtype(a.dtype));
    keys = empty({a.B, a.groups(), a.D}, sums_dtype(a.dtype));
    a.kv = kv.data(), a.keys = keys.data();
  }
  if (a.B) {
    const double flops = call.flops(1);
    a.chunks = chunks(a.B * a.heads, flops, a.H / 4);
    const int64_t least = grain(flops / double(a.chunks));
    const auto kernel = current->multiscale->forward;
    if (a.chunks == 1) {
      call.run(Stage::all, least, kernel);
    } else {
      partial = empty({a.units(), 1 + a.S, a.sums_size()}, sums_dtype(a.dtype));
      a.partial = partial.data();
      call.run(Stage::sums, 1, kernel);
      call.run(Stage::rest, 1, kernel);
    }
  }
  give(stack, out);
  if constexpr (kept) {
    give(stack + 1, kv);
    give(stack + 2, keys);
  }
}

void multiscale_linear_attention_backward(Value* stack, uint64_t, uint64_t) {
  Tensor grad = take(stack[0]), qkv = take(stack[1]);
  MultiscaleCall call(qkv, take_list(stack[2]), to<int64_t>(stack[5]), to<double>(stack[6]));
  Tensor kv = take(stack[3]), keys = take(stack[4]), partial, planes, sums;
  Multiscale& a = call.a;
  const int64_t* n = grad.sizes();
  require_scale(
      grad.dim() == 4 && n[0] == a.B && n[1] == a.groups() * a.D && n[2] == a.H && n[3] == a.W &&
          grad.dtype() == qkv.dtype(),
      "grad does not fit");
  require_sums(kMultiscale, kv, {a.B, a.groups(), a.D, a.D}, a.dtype);
  require_sums(kMultiscale, keys, {a.B, a.groups(), a.D}, a.dtype);
  Tensor dqkv = empty(channels_like(qkv, 3 * a.heads * a.D), qkv.dtype());
  a.grad = heads_map(grad, a.D), a.dqkv = heads_map(dqkv, a.D), a.kv = kv.data(), a.keys = keys.data();
  std::vector<Tensor> dweights;
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const Tensor& w = call.weights[i];
    dweights.push_back(empty(std::vector<int64_t>(w.sizes(), w.sizes() + w.dim()), qkv.dtype()));
    Scale& scale = call.scales[i % size_t(a.S)];
    void** to[] = {&scale.ddepthwise, &scale.dpointwise, &scale.ddepthwise_bias, &scale.dpointwise_bias};
    if (w.sizes()[0]) *to[i / size_t(a.S)] = dweights.back().data();
  }
  const double flops = call.flops(2.5);
  a.chunks = a.B ? chunks(a.B * a.heads, flops, a.H / 4) : 1;
  if (a.S) {
    sums = empty({a.units(), a.weights_size()}, sums_dtype(a.dtype));
    a.weights = sums.data();
  }
  const MultiscaleBackwardKernels& kernels = *current->multiscale_backward;
  if (a.B && a.chunks == 1) {
    call.run(Stage::all, grain(flops), kernels.backward);
  } else if (a.B) {
    partial = empty({a.units(), 1 + a.S, a.sums_size()}, sums_dtype(a.dtype));
    planes = empty({a.B * a.heads, a.planes_size()}, sums_dtype(a.dtype));
    a.partial = partial.data(), a.planes = planes.data();
    for (Stage stage : {Stage::sums, Stage::rest, Stage::planes}) call.run(stage, 1, kernels.backward);
  }
  if (a.S) parallel(a.heads, 1, [&](int64_t i, int64_t j) { kernels.sum_weights(a, i, j); });
  give(stack, dqkv);
  give_list(stack + 1, dweights);
}

}  // namespace
}  // namespace mvk
