/* A driver whose device is the CPU: a kernel is a C function behind a list of parameter sizes. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { int id; char pad[4]; int value[16]; } Attribute;
typedef struct {
  unsigned grid[3], block[3], shared; void *stream; Attribute *attributes; unsigned count;
} Config;
typedef struct { int count; size_t sizes[16]; void (*run)(const Config *, void **); } Kernel;

int context = 1, status = 0, launches = 0, attributes[2];
unsigned last_grid[3], last_block, last_shared;

int cuCtxGetCurrent(void **out) { *out = (void *)(intptr_t)context; return 0; }

int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
  Kernel *kernel = function;
  if (index >= (size_t)kernel->count) return 1;
  *offset = 0;
  *size = kernel->sizes[index];
  return 0;
}

int cuGetErrorName(int code, const char **out) { (void)code; *out = "CUDA_ERROR_FAKE"; return 0; }

int cuLaunchKernelEx(const Config *config, void *function, void **values, void **extra) {
  (void)extra;
  launches++;
  memcpy(last_grid, config->grid, sizeof last_grid);
  last_block = config->block[0];
  last_shared = config->shared;
  attributes[0] = attributes[1] = 0;
  for (unsigned i = 0; i < config->count; i++) attributes[i] = config->attributes[i].id;
  if (!status) ((Kernel *)function)->run(config, values);
  return status;
}

/* y[i] = x[i] * factor + offset for the first n elements of each of grid[0] blocks. */
static void scale(const Config *config, void **values) {
  const float *x = *(float **)values[0];
  float *y = *(float **)values[1];
  int n = *(int *)values[2];
  float factor = *(float *)values[3];
  long long offset = *(long long *)values[4];
  for (unsigned i = 0; i < config->grid[0] * (unsigned)n; i++) y[i] = x[i] * factor + (float)offset;
}

Kernel scale_kernel = {5, {8, 8, 4, 4, 8}, scale};
Kernel scale_with_scratch = {7, {8, 8, 4, 4, 8, 8, 8}, scale};
