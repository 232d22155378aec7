// The ops of inference as custom ops of ONNX Runtime, in the domain `mvkernels`: a library for register_custom_ops_library.
// docs/onnxruntime.md has the attributes of each op.
#include <memory>
#include <mutex>

#include "host.h"

// The ops, after their host.
#include "placed_ops.h"

// An op that keeps what it made of its weights.
#include "inverted_residual.h"

namespace mvk {
namespace {

bool is_input(Kind kind) { return kind < Kind::whole; }

struct Op : ort::CustomOp {
  const PlacedOp* placed;
  std::vector<size_t> inputs = {};  // the parameters that are inputs
};

struct Kernel {
  const Op* op;
  const ort::Api* api;
  std::vector<Place> places;    // of every parameter
  std::vector<Value> settings;  // of every parameter
};

std::vector<int64_t> integers(const Kernel& kernel, const ort::KernelInfo* info, const char* name) {
  size_t count = 0;
  const ort::Api& api = *kernel.api;
  if (ort::Status* status = api.KernelInfoGetAttributeArray_int64(info, name, nullptr, &count)) {
    api.ReleaseStatus(status);
    refuse(*kernel.op->placed, std::string("the attribute ") + name + " is missing");
  }
  std::vector<int64_t> out(count);
  check(&api, api.KernelInfoGetAttributeArray_int64(info, name, out.data(), &count));
  return out;
}

Kernel* create(const Op& op, const ort::Api* api, const ort::KernelInfo* info) {
  auto kernel = std::make_unique<Kernel>(Kernel{&op, api, {}, {}});
  const std::vector<Parameter>& parameters = op.placed->parameters;
  kernel->places.resize(parameters.size());
  kernel->settings.resize(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto [name, kind] = parameters[i];
    Place& place = kernel->places[i];
    Value& setting = kernel->settings[i];
    auto require_attribute = [&](ort::Status* status) {
      if (!status) return;
      api->ReleaseStatus(status);
      refuse(*op.placed, std::string("the attribute ") + name + " is missing or has another type");
    };
    if (kind == Kind::map) {
      const std::vector<int64_t> numbers = integers(*kernel, info, name);
      place = place_of(*op.placed, std::string("the attribute ") + name, numbers.data(), numbers.size());
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

// An input; nothing if it is left out.
Tensor input(const Kernel& kernel, size_t index) {
  const ort::Value* value = nullptr;
  check(kernel.api, kernel.api->KernelContext_GetInput(call->context, index, &value));
  return tensor_of(*kernel.api, value, kernel.op->placed->name);
}

// ---- what ONNX Runtime calls ----

const Op& op_of(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

void compute(const Kernel& kernel) {
  const PlacedOp& op = *kernel.op->placed;
  const std::vector<size_t>& inputs = kernel.op->inputs;
  std::vector<Value> stack = kernel.settings;
  std::vector<Tensor> tensors(op.parameters.size()), list;
  size_t count = 0;
  check(kernel.api, kernel.api->KernelContext_GetInputCount(call->context, &count));
  for (size_t number = 0; number < inputs.size(); ++number) {
    const size_t i = inputs[number];
    const Kind kind = op.parameters[i].kind;
    if (kind == Kind::list) {
      for (size_t next = number; next < count; ++next) list.push_back(input(kernel, next));
      stack[i].list = &list;
      break;
    }
    Tensor given = number < count ? input(kernel, number) : Tensor();
    if (!given && kind == Kind::optional) continue;
    if (!given) refuse(op, std::string(op.parameters[i].name) + " is missing");
    tensors[i] = placed(op, kind, std::move(given), kernel.places[i]);
    stack[i].tensor = &tensors[i];
  }
  call->returned = op.returned(kernel.places.data(), stack.data());
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

Op as_custom_op(const PlacedOp& placed) {
  Op out{cpu_op(), &placed};
  for (size_t i = 0; i < placed.parameters.size(); ++i)
    if (is_input(placed.parameters[i].kind)) out.inputs.push_back(i);
  using Self = const ort::CustomOp*;
  out.GetName = [](Self self) { return op_of(self).placed->name; };
  out.GetInputTypeCount = [](Self self) { return op_of(self).inputs.size(); };
  out.GetInputCharacteristic = [](Self self, size_t number) -> int {
    const Op& of = op_of(self);
    const Kind kind = of.placed->parameters[of.inputs[number]].kind;
    return kind == Kind::optional ? ort::kOptional : kind == Kind::list ? ort::kVariadic : ort::kRequired;
  };
  out.CreateKernelV2 = create_kernel;
  out.KernelComputeV2 = compute_kernel;
  out.KernelDestroy = [](void* data) { delete static_cast<Kernel*>(data); };
  return out;
}

const std::vector<Op>& ops() {
  static const std::vector<Op> all = [] {
    std::vector<Op> out;
    for (const PlacedOp& each : placed_ops()) out.push_back(as_custom_op(each));
    return out;
  }();
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
    if (ort::Status* status = api->CustomOpDomain_Add(made, &inverted_residual_op())) return status;
    domain = made;
  }
  return api->AddCustomOpDomain(options, domain);
}

}  // namespace
}  // namespace mvk

// What ONNX Runtime looks for in a library of custom ops.
MVK_EXPORT mvk::ort::Status* RegisterCustomOps(mvk::ort::SessionOptions* options, const mvk::ort::ApiBase* base) {
  const mvk::ort::Api* api = base->GetApi(mvk::ort::kVersion);
  if (!api)
    return base->GetApi(1)->CreateStatus(mvk::ort::kNotImplemented, "mvkernels: needs ONNX Runtime 1.17 or newer");
  if (!mvk::take_wanted_set())
    return api->CreateStatus(
        mvk::ort::kFail,
        "mvkernels: the instruction set that MVKERNELS_CPU_ISA names, or any, is not built or not there");
  return mvk::guarded(api, [&] { mvk::check(api, mvk::add_ops(options, api)); });
}
