// A CUDA driver that does nothing but write down what it was asked for, one line a call, to the file $FAKE_DRIVER_LOG.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;

static void say(const char* text) {
  FILE* file = fopen(getenv("FAKE_DRIVER_LOG"), "a");
  fprintf(file, "%s\n", text);
  fclose(file);
}

// Returned by the function that $FAKE_DRIVER_FAILS names: CUDA_ERROR_INVALID_VALUE.
static Result result(const char* name) {
  const char* fails = getenv("FAKE_DRIVER_FAILS");
  return fails && strcmp(fails, name) == 0;
}

// How cuda.bindings finds the others.
Result cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) {
    Dl_info here;
    dladdr((void*)say, &here);
    *function = dlsym(dlopen(here.dli_fname, RTLD_NOW), name);
  }
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
Result cuGetErrorString(Result code, const char** text) {
  *text = "invalid argument";
  return 0;
}
Result cuCtxGetCurrent(void** context) {
  *context = 0;
  return result("cuCtxGetCurrent");
}
Result cuDevicePrimaryCtxRetain(void** context, int device) {
  char line[64];
  snprintf(line, sizeof line, "retain %d", device);
  say(line);
  *context = (void*)(intptr_t)(0x100 + device);
  return result("cuDevicePrimaryCtxRetain");
}
Result cuCtxSetCurrent(void* context) {
  char line[64];
  snprintf(line, sizeof line, "current %#lx", (long)(intptr_t)context);
  say(line);
  return 0;
}
Result cuThreadExchangeStreamCaptureMode(int* mode) {
  static int now = 0;
  int before = now;
  char line[64];
  snprintf(line, sizeof line, "capture %d", *mode);
  say(line);
  now = *mode, *mode = before;
  return 0;
}
Result cuModuleLoadData(void** module, const void* image) {
  char line[128];
  snprintf(line, sizeof line, "load %.64s", (const char*)image);
  say(line);
  *module = (void*)0x200;
  return result("cuModuleLoadData");
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  char line[128];
  snprintf(line, sizeof line, "function %#lx %s", (long)(intptr_t)module, name);
  say(line);
  *function = (void*)0x300;
  return result("cuModuleGetFunction");
}
Result cuFuncSetAttribute(void* function, int attribute, int value) {
  char line[64];
  snprintf(line, sizeof line, "attribute %#lx %d %d", (long)(intptr_t)function, attribute, value);
  say(line);
  return 0;
}
Result cuLaunchKernel(
    void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    void* stream, void** parameters, void** extra) {
  char line[512];
  int at = snprintf(
      line, sizeof line, "launch %#lx grid %u %u %u block %u %u %u shared %u stream %#lx", (long)(intptr_t)function, gx,
      gy, gz, bx, by, bz, shared, (long)(intptr_t)stream);
  if (parameters || extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] != 0) {
    say("launch: arguments are not in a buffer");
    return 1;
  }
  const unsigned char* bytes = extra[1];
  at += snprintf(line + at, sizeof line - at, " arguments ");
  for (size_t i = 0; i < *(size_t*)extra[3]; ++i) at += snprintf(line + at, sizeof line - at, "%02x", bytes[i]);
  say(line);
  return result("cuLaunchKernel");
}
