// The ops of inference as kernels of ExecuTorch: `mvkernels::patch_attention.out` and so on. An application that links to this library
// calls mvkernels_register_executorch() before it loads a method.
//
// The schemas are in mvkernels/export/operators.py: the arguments of each op in order, after each map the numbers that say where in
// its tensor it is.
#include <mutex>

#include "host.h"

// The ops, after their host.
#include "placed_ops.h"

namespace mvk {
namespace {

// The elements of an argument.
Tensor input(const PlacedOp& op, Kind kind, const et::etensor::Tensor& t) {
  if (t.scalar_type() != et::etensor::ScalarType::Float) refuse(op, "a tensor is not of type float32");
  if (t.dim() < 1 || t.dim() > Tensor::kMostAxes) refuse(op, "a tensor has a number of axes that none of the op has");
  const auto order = t.dim_order();
  // The layout of a map decides that of the result, which was planned for this order.
  if ((kind == Kind::map || kind == Kind::channels) && !et::is_contiguous_dim_order(order.data(), order.size()))
    refuse(op, "a map is not in the order of its axes");
  int64_t sizes[Tensor::kMostAxes], strides[Tensor::kMostAxes];
  std::copy(t.sizes().begin(), t.sizes().end(), sizes);
  std::copy(t.strides().begin(), t.strides().end(), strides);
  return Tensor(const_cast<void*>(t.const_data_ptr()), sizes, strides, t.dim(), float32());
}

double number(const et::EValue& value) { return value.isInt() ? double(value.toInt()) : value.toDouble(); }

// `given`: the arguments as the schema has them, the output, and once more what is returned.
void compute(const PlacedOp& op, et::KernelRuntimeContext& context, et::Span<et::EValue*> given) {
  size_t wanted = op.parameters.size() + 2;
  for (const Parameter& each : op.parameters) wanted += each.kind == Kind::map || each.kind == Kind::channels;
  if (given.size() != wanted) refuse(op, "another number of arguments than in the schema");
  Call here(context, given[wanted - 1]->toTensor());
  std::vector<Value> stack(op.parameters.size());
  std::vector<Place> places(op.parameters.size());
  std::vector<Tensor> tensors(op.parameters.size()), list;
  et::EValue** next = given.begin();
  for (size_t i = 0; i < op.parameters.size(); ++i) {
    const auto [name, kind] = op.parameters[i];
    const et::EValue& value = **next++;
    if (kind == Kind::whole) {
      stack[i].whole = value.isBool() ? value.toBool() : value.toInt();
    } else if (kind == Kind::number) {
      stack[i].number = number(value);
    } else if (kind == Kind::list) {
      for (const et::etensor::Tensor& each : value.toTensorList()) list.push_back(input(op, kind, each));
      stack[i].list = &list;
    } else if (kind != Kind::optional || !value.isNone()) {
      if (kind == Kind::map) {
        const auto numbers = (*next++)->toIntList();
        places[i] = place_of(op, name, numbers.data(), numbers.size());
      } else if (kind == Kind::channels) {
        places[i].channels_last = (*next++)->toInt();
      }
      tensors[i] = placed(op, kind, input(op, kind, value.toTensor()), places[i]);
      stack[i].tensor = &tensors[i];
    }
  }
  here.returned = op.returned(places.data(), stack.data());
  if (here.returned.size() != size_t(here.out.dim())) refuse(op, "the output has another number of axes");
  op.run(stack.data(), stack.size(), 1);
}

// Runs an op; an exception becomes a failure of the call, and its text a line of the log.
void guarded(const PlacedOp& op, et::KernelRuntimeContext& context, et::Span<et::EValue*> given) {
  try {
    compute(op, context, given);
  } catch (const std::bad_alloc&) {
    ET_LOG(Error, "mvkernels: %s: no memory", op.name);
    context.fail(et::Error::MemoryAllocationFailed);
  } catch (const std::exception& error) {
    ET_LOG(Error, "%s", error.what());
    context.fail(et::Error::InvalidArgument);
  }
}

// ExecuTorch calls functions without data, so each op needs one of its own.
template <size_t number>
void kernel(et::KernelRuntimeContext& context, et::Span<et::EValue*> given) {
  guarded(placed_ops()[number], context, given);
}

template <size_t... numbers>
void register_ops(std::index_sequence<numbers...>) {
  if (placed_ops().size() != sizeof...(numbers)) throw std::logic_error("mvkernels: another number of ops");
  static const std::string names[] = {std::string("mvkernels::") + placed_ops()[numbers].name + ".out" ...};
  static const et::Kernel kernels[] = {et::Kernel(names[numbers].c_str(), kernel<numbers>)...};
  (void)et::register_kernels({kernels, sizeof...(numbers)});  // it ends the process where it fails
}

constexpr size_t kOps = 6;

}  // namespace
}  // namespace mvk

// The version of ExecuTorch that this is built for: its C++ interface is not the same in others.
MVK_EXPORT const char* mvkernels_executorch_version() { return MVK_EXECUTORCH; }

// Registers the kernels, once however often it is called: ExecuTorch ends a process that registers an operator twice. Returns null, or
// why it did not.
MVK_EXPORT const char* mvkernels_register_executorch() {
  static std::mutex mutex;
  static bool done = false;
  const std::lock_guard lock(mutex);
  if (done) return nullptr;
  if (!mvk::take_wanted_set())
    return "mvkernels: the instruction set that MVKERNELS_CPU_ISA names, or any, is not built or not there";
  mvk::register_ops(std::make_index_sequence<mvk::kOps>());
  done = true;
  return nullptr;
}
