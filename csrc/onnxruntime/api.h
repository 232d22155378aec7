// The part of ONNX Runtime's C interface that a library of custom ops needs.
//
// The interface is a table of functions. Its entries keep their places for ever and new ones are added at the end, so the places
// are part of the ABI, and a library needs no header of ONNX Runtime to be built. The names are those of its documentation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mvk::ort {

constexpr uint32_t kVersion = 17;  // ONNX Runtime 1.17: the first with KernelContext_ParallelFor

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct ShapeContext;
struct MemoryInfo;
struct Allocator;

enum ErrorCode { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum ElementType { kFloat = 1 };
enum AllocatorKind { kArena = 1 };
enum MemoryKind { kDefaultMemory = 0 };
enum Presence { kRequired = 0, kOptional = 1, kVariadic = 2 };

struct Api {
  void (*functions[275])();

  template <class Function>
  Function* at(size_t place) const {
    return reinterpret_cast<Function*>(functions[place]);
  }
  Status* CreateStatus(ErrorCode code, const char* message) const {
    return at<Status*(ErrorCode, const char*)>(0)(code, message);
  }
  const char* GetErrorMessage(const Status* status) const { return at<const char*(const Status*)>(2)(status); }
  Status* CreateCustomOpDomain(const char* name, CustomOpDomain** out) const {
    return at<Status*(const char*, CustomOpDomain**)>(26)(name, out);
  }
  Status* CustomOpDomain_Add(CustomOpDomain* domain, const struct CustomOp* op) const {
    return at<Status*(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
  }
  Status* AddCustomOpDomain(SessionOptions* options, CustomOpDomain* domain) const {
    return at<Status*(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }
  Status* GetTensorMutableData(const Value* value, void** out) const {
    return at<Status*(const Value*, void**)>(51)(value, out);
  }
  Status* GetTensorElementType(const TensorInfo* info, int* out) const {
    return at<Status*(const TensorInfo*, int*)>(60)(info, out);
  }
  Status* GetDimensionsCount(const TensorInfo* info, size_t* out) const {
    return at<Status*(const TensorInfo*, size_t*)>(61)(info, out);
  }
  Status* GetDimensions(const TensorInfo* info, int64_t* sizes, size_t count) const {
    return at<Status*(const TensorInfo*, int64_t*, size_t)>(62)(info, sizes, count);
  }
  Status* GetTensorTypeAndShape(const Value* value, TensorInfo** out) const {
    return at<Status*(const Value*, TensorInfo**)>(65)(value, out);
  }
  Status* CreateCpuMemoryInfo(int allocator, int memory, MemoryInfo** out) const {
    return at<Status*(int, int, MemoryInfo**)>(69)(allocator, memory, out);
  }
  Status* AllocatorAlloc(Allocator* allocator, size_t bytes, void** out) const {
    return at<Status*(Allocator*, size_t, void**)>(75)(allocator, bytes, out);
  }
  Status* AllocatorFree(Allocator* allocator, void* memory) const {
    return at<Status*(Allocator*, void*)>(76)(allocator, memory);
  }
  Status* KernelInfoGetAttribute_float(const KernelInfo* info, const char* name, float* out) const {
    return at<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* KernelInfoGetAttribute_int64(const KernelInfo* info, const char* name, int64_t* out) const {
    return at<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* KernelContext_GetInputCount(const KernelContext* context, size_t* out) const {
    return at<Status*(const KernelContext*, size_t*)>(88)(context, out);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index, const Value** out) const {
    return at<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* KernelContext_GetOutput(
      KernelContext* context, size_t index, const int64_t* sizes, size_t count, Value** out) const {
    return at<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, sizes, count, out);
  }
  void ReleaseStatus(Status* status) const { at<void(Status*)>(93)(status); }
  void ReleaseMemoryInfo(MemoryInfo* info) const { at<void(MemoryInfo*)>(94)(info); }
  void ReleaseTensorTypeAndShapeInfo(TensorInfo* info) const { at<void(TensorInfo*)>(99)(info); }
  void ReleaseAllocator(Allocator* allocator) const { at<void(Allocator*)>(132)(allocator); }
  // The values, and how many there are; with `out` null only the latter.
  Status* KernelInfoGetAttributeArray_int64(
      const KernelInfo* info, const char* name, int64_t* out, size_t* count) const {
    return at<Status*(const KernelInfo*, const char*, int64_t*, size_t*)>(163)(info, name, out, count);
  }
  // `constant` is 0 if the input is left out, or no initializer.
  Status* KernelInfoGetConstantInput_tensor(
      const KernelInfo* info, size_t index, int* constant, const Value** out) const {
    return at<Status*(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, constant, out);
  }
  Status* KernelContext_GetAllocator(const KernelContext* context, const MemoryInfo* info, Allocator** out) const {
    return at<Status*(const KernelContext*, const MemoryInfo*, Allocator**)>(253)(context, info, out);
  }
  Status* KernelContext_ParallelFor(
      const KernelContext* context, void (*body)(void*, size_t), size_t count, size_t batches, void* data) const {
    return at<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, body, count, batches, data);
  }
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);  // null if the runtime is older
  const char* (*GetVersionString)();
};

// What the runtime asks of an op. It reads as many of the members as `version` has.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

}  // namespace mvk::ort
