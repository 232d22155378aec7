// A libcuda that does nothing, of the functions that Triton calls: kernels load and launch without a GPU, and what is
// left is what a launch costs on the host. It answers as one GPU of compute capability 9.0 would.
#include <stdint.h>

static int context;
static uintptr_t functions;

int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int error, const char** text) {
  *text = "fake";
  return 0;
}
int cuGetErrorName(int error, const char** name) { return cuGetErrorString(error, name); }
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 8:  // shared memory of a block
      *value = 49152;
      break;
    case 10:  // threads of a warp
      *value = 32;
      break;
    case 12:  // registers of a block
      *value = 65536;
      break;
    case 16:  // multiprocessors
      *value = 132;
      break;
    case 75:  // compute capability
      *value = 9;
      break;
    case 76:
      *value = 0;
      break;
    case 97:  // shared memory of a block that asks for more
      *value = 232448;
      break;
    default:
      *value = 1024;
  }
  return 0;
}
int cuCtxGetCurrent(void** current) {
  *current = &context;
  return 0;
}
int cuCtxSetCurrent(void* wanted) { return 0; }
int cuDevicePrimaryCtxRetain(void** retained, int device) { return cuCtxGetCurrent(retained); }
int cuCtxGetLimit(uint64_t* value, int limit) {
  *value = 0;
  return 0;
}
int cuCtxSetLimit(int limit, uint64_t value) { return 0; }
int cuModuleLoadData(void** module, const void* image) { return cuCtxGetCurrent(module); }
int cuModuleUnload(void* module) { return 0; }
// Each kernel has its own address.
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)(16 * ++functions);
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : 64;  // threads of a block
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, void* config) {
  *count = 1;
  return 0;
}
int cuTensorMapEncodeTiled(void) { return 0; }
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  *(uint64_t*)data = pointer;
  return 0;
}
int cuLaunchKernelEx(void* config, void* function, void** parameters, void** extra) { return 0; }
int cuLaunchKernel(void) { return 0; }
