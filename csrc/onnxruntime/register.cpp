// The ops of inference as custom ops of ONNX Runtime, in the domain `mvkernels`: a library for register_custom_ops_library.
//
// A tensor of ONNX has no strides. So a map is a tensor of four axes, (B, C, H, W) or (B, H, W, C), and a list of integers says which
// of its channels the op reads: several maps can lie in one tensor, as queries, keys and values do after a product. The kernels read
// them there. docs/onnxruntime.md has the attributes of each op.
#include <memory>
#include <mutex>

#include "host.h"

// The ops, after their host.
#include "common/linear_attention_op.h"
#include "common/mobile_former_op.h"
#include "multiscale_linear_attention/multiscale_op.h"
#include "patch_attention/patch_attention_op.h"
#include "window_attention/window_attention_op.h"

namespace mvk {
namespace {

enum class Kind {
  map,       // a tensor of four axes, and where in it a map (B, heads, dim, H, W) is
  channels,  // a tensor of four axes that is read whole, (B, C, H, W)
  tensor,    // any tensor
  optional,  // the last input, which may be left out
  list,      // the inputs from here on
  whole,
  number,
};

struct Parameter {
  const char* name;
  Kind kind;
};
bool is_input(Kind kind) { return kind < Kind::whole; }

struct Kernel;

struct Op : ort::CustomOp {
  const char* name;
  void (*run)(Value*, uint64_t, uint64_t);
  std::vector<Parameter> parameters;                              // as `run` takes them
  std::vector<int64_t> (*returned)(const Kernel&, const Value*);  // sizes of the result
  std::vector<size_t> inputs = {};                                // the parameters that are inputs
};

// Where a map is in a tensor.
struct Place {
  int64_t channels_last, heads, dim, first, next_head, next;
};

constexpr int64_t kTooMany = int64_t(1) << 31;  // sums of products of two could overflow

struct Kernel {
  const Op* op;
  const ort::Api* api;
  std::vector<Place> places;    // of every parameter
  std::vector<Value> settings;  // of every parameter
};

[[noreturn]] void refuse(const Op& op, const std::string& what) {
  throw std::invalid_argument(std::string("mvkernels: ") + op.name + ": " + what);
}

std::vector<int64_t> integers(const Kernel& kernel, const ort::KernelInfo* info, const char* name) {
  size_t count = 0;
  const ort::Api& api = *kernel.api;
  if (ort::Status* status = api.KernelInfoGetAttributeArray_int64(info, name, nullptr, &count)) {
    api.ReleaseStatus(status);
    refuse(*kernel.op, std::string("the attribute ") + name + " is missing");
  }
  std::vector<int64_t> out(count);
  check(&api, api.KernelInfoGetAttributeArray_int64(info, name, out.data(), &count));
  return out;
}

Kernel* create(const Op& op, const ort::Api* api, const ort::KernelInfo* info) {
  auto kernel = std::make_unique<Kernel>(Kernel{&op, api, {}, {}});
  kernel->places.resize(op.parameters.size());
  kernel->settings.resize(op.parameters.size());
  for (size_t i = 0; i < op.parameters.size(); ++i) {
    const auto [name, kind] = op.parameters[i];
    Place& place = kernel->places[i];
    Value& setting = kernel->settings[i];
    auto require_attribute = [&](ort::Status* status) {
      if (!status) return;
      api->ReleaseStatus(status);
      refuse(op, std::string("the attribute ") + name + " is missing or has another type");
    };
    if (kind == Kind::map) {
      const std::vector<int64_t> numbers = integers(*kernel, info, name);
      if (numbers.size() != 6) refuse(op, std::string("the attribute ") + name + " has not six integers");
      place = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
      const bool fits = std::all_of(numbers.begin(), numbers.end(), [](int64_t n) { return n >= 0 && n < kTooMany; });
      if (!fits || !place.heads || !place.dim) refuse(op, std::string("a number of ") + name + " is out of range");
    } else if (kind == Kind::channels) {
      require_attribute(api->KernelInfoGetAttribute_int64(info, name, &place.channels_last));
    } else if (kind == Kind::whole) {
      require_attribute(api->KernelInfoGetAttribute_int64(info, name, &setting.whole));
    } else if (kind == Kind::number) {
      float number;
      require_attribute(api->KernelInfoGetAttribute_float(info, name, &number));
      setting.number = number;
    }
  }
  return kernel.release();
}

// The elements of an input, contiguous as ONNX Runtime has them; nothing if it is left out.
Tensor input(const Kernel& kernel, size_t index) {
  const ort::Value* value = nullptr;
  const ort::Api& api = *kernel.api;
  check(&api, api.KernelContext_GetInput(call->context, index, &value));
  if (!value) return Tensor();
  ort::TensorInfo* info;
  check(&api, api.GetTensorTypeAndShape(value, &info));
  size_t dim = 0;
  int dtype = 0;
  int64_t sizes[Tensor::kMostAxes], strides[Tensor::kMostAxes];
  bool known = !api.GetDimensionsCount(info, &dim) && !api.GetTensorElementType(info, &dtype) && dim >= 1 &&
               dim <= size_t(Tensor::kMostAxes);
  known = known && !api.GetDimensions(info, sizes, dim);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (!known) refuse(*kernel.op, "an input has a number of axes that no input of the op has");
  int64_t step = 1;
  for (size_t i = dim; i--;) strides[i] = step, step *= std::max<int64_t>(sizes[i], 1);
  void* data;
  check(&api, api.GetTensorMutableData(value, &data));
  return Tensor(data, sizes, strides, int64_t(dim), dtype);
}

// Sizes and strides of a tensor of four axes as (B, C, H, W).
struct Channels {
  int64_t sizes[4], strides[4];
};
Channels channels(const Op& op, const Tensor& t, bool last) {
  if (t.dim() != 4) refuse(op, "a map is not a tensor of four axes");
  const int64_t *n = t.sizes(), *s = t.strides();
  if (last) return {{n[0], n[3], n[1], n[2]}, {s[0], s[3], s[1], s[2]}};
  return {{n[0], n[1], n[2], n[3]}, {s[0], s[1], s[2], s[3]}};
}

Tensor map_in(const Op& op, const Tensor& t, const Place& place) {
  const Channels c = channels(op, t, place.channels_last);
  const int64_t last = place.first + (place.heads - 1) * place.next_head + (place.dim - 1) * place.next;
  if (last >= c.sizes[1]) refuse(op, "a map has channels that its tensor has not");
  const int64_t sizes[] = {c.sizes[0], place.heads, place.dim, c.sizes[2], c.sizes[3]};
  const int64_t strides[] = {
      c.strides[0], place.next_head * c.strides[1], place.next * c.strides[1], c.strides[2], c.strides[3]};
  return Tensor(static_cast<float*>(t.data()) + place.first * c.strides[1], sizes, strides, 5, t.dtype());
}

Tensor channels_in(const Op& op, const Tensor& t, const Place& place) {
  const Channels c = channels(op, t, place.channels_last);
  return Tensor(t.data(), c.sizes, c.strides, 4, t.dtype());
}

// ---- sizes of results ----

// A map of `dim` wide heads, laid out as the map that is parameter `like`: channels last if its dims are side by side.
std::vector<int64_t> as_map(const Kernel& kernel, const Value* stack, size_t like, int64_t dim) {
  const int64_t* n = stack[like].tensor->sizes();
  const Place& place = kernel.places[like];
  if (place.channels_last && place.next == 1) return {n[0], n[3], n[4], n[1] * dim};
  return {n[0], n[1] * dim, n[3], n[4]};
}
std::vector<int64_t> as_query(const Kernel& kernel, const Value* stack) {
  return as_map(kernel, stack, 0, stack[2].tensor->sizes()[2]);
}
std::vector<int64_t> as_first_map(const Kernel& kernel, const Value* stack) {
  return as_map(kernel, stack, 0, stack[0].tensor->sizes()[2]);
}
std::vector<int64_t> as_tokens(const Kernel&, const Value* stack) {
  const int64_t* n = stack[0].tensor->sizes();
  return {n[0], n[1], n[2], n[3]};
}
// Of each scale a third of the channels.
std::vector<int64_t> as_scales(const Kernel& kernel, const Value* stack) {
  const int64_t* n = stack[0].tensor->sizes();
  const auto scales =
      std::count_if(stack[1].list->begin(), stack[1].list->end(), [](const Tensor& t) { return t.dim() == 4; });
  const int64_t channels = n[1] / 3 * (1 + scales / 2);
  if (kernel.places[0].channels_last) return {n[0], n[2], n[3], channels};
  return {n[0], channels, n[2], n[3]};
}

// ---- what ONNX Runtime calls ----

const Op& op_of(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

// Runs `body`; an exception becomes a status.
template <class Body>
ort::Status* guarded(const ort::Api* api, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return api->CreateStatus(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return api->CreateStatus(ort::kFail, error.what());
  }
}

void compute(const Kernel& kernel) {
  const Op& op = *kernel.op;
  std::vector<Value> stack = kernel.settings;
  std::vector<Tensor> tensors(op.parameters.size()), list;
  size_t count = 0;
  check(kernel.api, kernel.api->KernelContext_GetInputCount(call->context, &count));
  for (size_t number = 0; number < op.inputs.size(); ++number) {
    const size_t i = op.inputs[number];
    const Kind kind = op.parameters[i].kind;
    if (kind == Kind::list) {
      for (size_t next = number; next < count; ++next) list.push_back(input(kernel, next));
      stack[i].list = &list;
      break;
    }
    Tensor given = number < count ? input(kernel, number) : Tensor();
    if (!given && kind == Kind::optional) continue;
    if (!given) refuse(op, std::string(op.parameters[i].name) + " is missing");
    if (kind == Kind::map) given = map_in(op, given, kernel.places[i]);
    if (kind == Kind::channels) given = channels_in(op, given, kernel.places[i]);
    tensors[i] = std::move(given);
    stack[i].tensor = &tensors[i];
  }
  call->returned = op.returned(kernel, stack.data());
  op.run(stack.data(), stack.size(), 1);
}

ort::Status* create_kernel(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info, void** out) {
  return guarded(api, [&] { *out = create(op_of(op), api, info); });
}

ort::Status* compute_kernel(void* data, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(data);
  return guarded(kernel.api, [&] {
    Call here(kernel.api, context);
    compute(kernel);
  });
}

Op op(
    const char* name, void (*run)(Value*, uint64_t, uint64_t),
    std::vector<int64_t> (*returned)(const Kernel&, const Value*), std::vector<Parameter> parameters) {
  Op out{{}, name, run, std::move(parameters), returned};
  for (size_t i = 0; i < out.parameters.size(); ++i)
    if (is_input(out.parameters[i].kind)) out.inputs.push_back(i);
  using Self = const ort::CustomOp*;
  out.version = ort::kVersion;
  out.GetName = [](Self self) { return op_of(self).name; };
  out.GetExecutionProviderType = [](Self) -> const char* { return "CPUExecutionProvider"; };
  out.GetInputTypeCount = [](Self self) { return op_of(self).inputs.size(); };
  out.GetInputType = [](Self, size_t) -> int { return ort::kFloat; };
  out.GetInputCharacteristic = [](Self self, size_t number) -> int {
    const Op& of = op_of(self);
    const Kind kind = of.parameters[of.inputs[number]].kind;
    return kind == Kind::optional ? ort::kOptional : kind == Kind::list ? ort::kVariadic : ort::kRequired;
  };
  out.GetInputMemoryType = [](Self, size_t) { return 0; };
  out.GetVariadicInputMinArity = [](Self) { return 0; };
  out.GetVariadicInputHomogeneity = [](Self) { return 1; };
  out.GetOutputTypeCount = [](Self) -> size_t { return 1; };
  out.GetOutputType = [](Self, size_t) -> int { return ort::kFloat; };
  out.GetOutputCharacteristic = [](Self, size_t) -> int { return ort::kRequired; };
  out.GetVariadicOutputMinArity = [](Self) { return 1; };
  out.GetVariadicOutputHomogeneity = [](Self) { return 1; };
  out.CreateKernelV2 = create_kernel;
  out.KernelComputeV2 = compute_kernel;
  out.KernelDestroy = [](void* data) { delete static_cast<Kernel*>(data); };
  out.GetStartVersion = [](Self) { return 1; };
  out.GetEndVersion = [](Self) { return INT32_MAX; };
  return out;
}

const std::vector<Op>& ops() {
  using enum Kind;
  static const std::vector<Op> all = {
      op("patch_attention", patch_attention_forward, as_query,
         {{"query", map},
          {"key", map},
          {"value", map},
          {"patch_height", whole},
          {"patch_width", whole},
          {"bias", optional},
          {"scale", number}}),
      op("window_attention", window_attention_forward, as_query,
         {{"query", map},
          {"key", map},
          {"value", map},
          {"window_height", whole},
          {"window_width", whole},
          {"shift_y", whole},
          {"shift_x", whole},
          {"bias", optional},
          {"scale", number}}),
      op("relu_linear_attention", relu_linear_attention_forward<false>, as_query,
         {{"query", map}, {"key", map}, {"value", map}, {"eps", number}}),
      op("multiscale_linear_attention", multiscale_linear_attention_forward<false>, as_scales,
         {{"qkv", channels}, {"weights", list}, {"head_dim", whole}, {"eps", number}}),
      op("mobile_to_former", mobile_to_former_forward, as_tokens, {{"query", tensor}, {"x", map}, {"scale", number}}),
      op("former_to_mobile", former_to_mobile_forward, as_first_map,
         {{"x", map}, {"key", tensor}, {"value", tensor}, {"scale", number}, {"residual", whole}}),
  };
  return all;
}

// The ops for a session. The domain has to live as long as the session, and serves all that there will be.
ort::Status* add_ops(ort::SessionOptions* options, const ort::Api* api) {
  static ort::CustomOpDomain* domain = nullptr;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (!domain) {
    ort::CustomOpDomain* made;
    if (ort::Status* status = api->CreateCustomOpDomain("mvkernels", &made)) return status;
    for (const Op& each : ops())
      if (ort::Status* status = api->CustomOpDomain_Add(made, &each)) return status;
    domain = made;
  }
  return api->AddCustomOpDomain(options, domain);
}

}  // namespace
}  // namespace mvk

#define MVK_EXPORT extern "C" __attribute__((visibility("default")))

// For tests: take another instruction set, 0 if it is not there; fill fresh buffers with NaN.
MVK_EXPORT int mvkernels_set_instruction_set(const char* name) {
  const mvk::InstructionSet* set = mvk::find(name);
  if (set) mvk::current = set;
  return set != nullptr;
}
MVK_EXPORT void mvkernels_set_poison(int on) { mvk::poison = on; }

// What ONNX Runtime looks for in a library of custom ops.
MVK_EXPORT mvk::ort::Status* RegisterCustomOps(mvk::ort::SessionOptions* options, const mvk::ort::ApiBase* base) {
  const mvk::ort::Api* api = base->GetApi(mvk::ort::kVersion);
  if (!api)
    return base->GetApi(1)->CreateStatus(mvk::ort::kNotImplemented, "mvkernels: needs ONNX Runtime 1.17 or newer");
  if (!mvk::take_wanted_set())
    return api->CreateStatus(
        mvk::ort::kFail,
        "mvkernels: the instruction set that MVKERNELS_CPU_ISA names, or any, is not built or not there");
  return mvk::guarded(api, [&] {
    if (mvk::ort::Status* status = mvk::add_ops(options, api)) {
      api->ReleaseStatus(status);
      throw std::runtime_error("mvkernels: ONNX Runtime refused the ops");
    }
  });
}
