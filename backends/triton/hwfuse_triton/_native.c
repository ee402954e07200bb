/* Replays: repeat what a recorded call allocated and launched (_record.py), without its Python.

   A recipe holds for calls whose arguments have the very types, dtypes, shapes, strides, low address
   bits and options of the recorded one.  The Python function is a function of these alone, so what
   it checked, allocated and launched then is what it would check, allocate and launch now.  All that
   can differ otherwise (device, context, stream, hooks, modes, null pointers) is looked at on every
   call; whatever is unusual goes to the Python function.

   No header of CUDA or torch is needed: the driver's few types stand below, and tensors are read
   through the table of functions that torch publishes as __dlpack_c_exchange_api__ (DLPack 1.x). */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MAX_ARGUMENTS 24 /* of a call */
#define MAX_DIMENSIONS 6
#define MAX_NEW 16   /* tensors that a call allocates */
#define MAX_VALUES 48 /* arguments of a kernel */
#define SETS 64
#define WAYS 4
#define SEEN 256
#define LOW_BITS 255 /* of an address: what a function may look at */

/* ---- DLPack 1.x ---- */
typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } Type;
typedef struct {
  void *data; Device device; int32_t ndim; Type type; int64_t *shape, *strides; uint64_t offset;
} View;
typedef struct {
  struct { uint32_t major, minor; } version;
  void *previous, *allocate, *export_managed, *import_managed;
  int (*view)(void *object, View *out);
  int (*stream)(int32_t device_type, int32_t device, void **out);
} Exchange;

/* ---- CUDA driver ---- */
typedef struct { int id; char pad[4]; union { int number[16]; char all[64]; } value; } Attribute;
typedef struct {
  unsigned grid[3], block[3], shared; void *stream; Attribute *attributes; unsigned count;
} Config;
#define CLUSTER_DIMENSION 4
#define PROGRAMMATIC_STREAM_SERIALIZATION 6
static int (*launch_kernel)(const Config *, void *function, void **values, void **extra);
static int (*current_context)(void **);
static int (*parameter_info)(void *function, size_t index, size_t *offset, size_t *size);
static int (*error_name)(int, const char **);

/* ---- set once by setup() ---- */
static const Exchange *exchange;
static PyObject *tensor_type, *parameter_type, *allocate, *mode_depth, *knobs, *enter, *leave;
static PyObject *name_enter, *name_leave, *name_calls;
static int device_type;

/* ---- keys ---- */
typedef struct {
  PyObject *constant; /* NULL: a tensor */
  Type type;
  int32_t ndim;
  uint32_t low;
  int64_t shape[MAX_DIMENSIONS], strides[MAX_DIMENSIONS];
} Argument;

/* One call: its tensors seen through DLPack, its other arguments as they are. */
typedef struct {
  int count, tensors;
  PyObject *const *values;
  View view[MAX_ARGUMENTS];
  int is_tensor[MAX_ARGUMENTS];
  uint64_t address[MAX_ARGUMENTS];
  uint64_t hash;
} Call;

static inline uint64_t mix(uint64_t hash, uint64_t value) {
#ifdef HWFUSE_ONE_HASH /* for tests: every call collides with every other */
  return 1;
#endif
  hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
  return hash ^ (hash >> 29);
}

/* Read a call and hash it; 0 if no recipe can hold for it.  Never leaves an exception. */
static int read_call(Call *call, PyObject *const *values, Py_ssize_t count, PyObject *names) {
  if (names) count += PyTuple_GET_SIZE(names);
  if (count > MAX_ARGUMENTS) return 0;
  call->count = (int)count;
  call->values = values;
  call->tensors = 0;
  uint64_t hash = (uint64_t)count;
  for (int i = 0; i < count; i++) {
    PyObject *value = values[i];
    PyTypeObject *type = Py_TYPE(value);
    call->is_tensor[i] = 0;
    if (type == (PyTypeObject *)tensor_type || type == (PyTypeObject *)parameter_type) {
      View *view = &call->view[i];
      if (exchange->view(value, view)) { PyErr_Clear(); return 0; }
      uint64_t address = (uint64_t)view->data + view->offset;
      if (!address || (address & 15) || view->device.type != device_type ||
          view->ndim > MAX_DIMENSIONS || (view->ndim && !view->strides))
        return 0;
      if (call->tensors && view->device.id != call->view[0].device.id) return 0;
      if (!call->tensors && i) call->view[0].device = view->device; /* [0] always has the device */
      for (int j = 0; j < i; j++) /* one object twice: which of the two a kernel got is unknown */
        if (values[j] == value) return 0;
      call->is_tensor[i] = 1;
      call->tensors++;
      call->address[i] = address;
      hash = mix(hash, ((uint64_t)view->type.code << 40) ^ ((uint64_t)view->type.bits << 32) ^
                           ((uint64_t)view->ndim << 16) ^ (address & LOW_BITS));
      for (int d = 0; d < view->ndim; d++)
        hash = mix(mix(hash, (uint64_t)view->shape[d]), (uint64_t)view->strides[d]);
    } else if (type == &PyLong_Type || type == &PyUnicode_Type || type == &PyFloat_Type) {
      Py_hash_t one = PyObject_Hash(value);
      hash = mix(hash, (uint64_t)one);
    } else {
      hash = mix(hash, (uint64_t)(uintptr_t)value);
    }
  }
  call->hash = hash;
  return call->tensors > 0;
}

static int same_constant(PyObject *a, PyObject *b) {
  if (a == b) return 1;
  if (Py_TYPE(a) != Py_TYPE(b)) return 0;
  if (PyFloat_CheckExact(a)) { /* -0.0 is not 0.0 */
    double x = PyFloat_AS_DOUBLE(a), y = PyFloat_AS_DOUBLE(b);
    return !memcmp(&x, &y, sizeof x);
  }
  if (!PyLong_CheckExact(a) && !PyUnicode_CheckExact(a)) return 0;
  int same = PyObject_RichCompareBool(a, b, Py_EQ);
  if (same < 0) PyErr_Clear();
  return same == 1;
}

static int same_names(PyObject *a, PyObject *b) {
  Py_ssize_t count = a ? PyTuple_GET_SIZE(a) : 0;
  if (a == b || (!count && !(b && PyTuple_GET_SIZE(b)))) return 1;
  if (!b || PyTuple_GET_SIZE(b) != count) return 0;
  for (Py_ssize_t i = 0; i < count; i++)
    if (PyTuple_GET_ITEM(a, i) != PyTuple_GET_ITEM(b, i) &&
        !same_constant(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i)))
      return 0;
  return 1;
}

/* ---- recipes ---- */
typedef struct { PyObject *arguments[3]; } Allocation; /* shape, strides, dtype */
typedef struct {
  void *function;
  unsigned grid[3], block, shared;
  int pdl, cluster, count;
  int8_t source[MAX_VALUES]; /* which tensor; -1: the value below */
  uint64_t value[MAX_VALUES];
} Kernel;

typedef struct {
  PyObject_HEAD
  uint64_t hash;
  Py_ssize_t positional;
  PyObject *names, *keep;
  int arguments, allocations, kernels, results; /* results: -1 None, -2 one tensor */
  int32_t device;
  void *context;
  Argument *argument;
  Allocation *allocation;
  Kernel *kernel;
  int8_t result[MAX_NEW];
} Recipe;

static void Recipe_dealloc(PyObject *object) {
  Recipe *self = (Recipe *)object;
  if (self->argument)
    for (int i = 0; i < self->arguments; i++) Py_XDECREF(self->argument[i].constant);
  if (self->allocation)
    for (int i = 0; i < self->allocations; i++)
      for (int j = 0; j < 3; j++) Py_XDECREF(self->allocation[i].arguments[j]);
  PyMem_Free(self->argument);
  PyMem_Free(self->allocation);
  PyMem_Free(self->kernel);
  Py_XDECREF(self->names);
  Py_XDECREF(self->keep);
  PyObject_Free(self);
}

static PyTypeObject RecipeType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "hwfuse_triton.Recipe",
    .tp_basicsize = sizeof(Recipe),
    .tp_dealloc = Recipe_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
};

static int holds(const Recipe *recipe, const Call *call, Py_ssize_t positional, PyObject *names) {
  if (recipe->hash != call->hash || recipe->arguments != call->count ||
      recipe->positional != positional || recipe->device != call->view[0].device.id ||
      !same_names(recipe->names, names))
    return 0;
  for (int i = 0; i < call->count; i++) {
    const Argument *wanted = &recipe->argument[i];
    if (!call->is_tensor[i]) {
      if (!wanted->constant || !same_constant(wanted->constant, call->values[i])) return 0;
      continue;
    }
    const View *view = &call->view[i];
    size_t bytes = (size_t)view->ndim * sizeof(int64_t);
    if (wanted->constant || memcmp(&view->type, &wanted->type, sizeof(Type)) ||
        view->ndim != wanted->ndim || (call->address[i] & LOW_BITS) != wanted->low ||
        memcmp(view->shape, wanted->shape, bytes) || memcmp(view->strides, wanted->strides, bytes))
      return 0;
  }
  return 1;
}

/* 1: both of Triton's chains of launch hooks are the original ones and empty. */
static int chain_is_empty(PyObject *name, PyObject *original) {
  PyObject *chain = PyObject_GetAttr(knobs, name);
  int empty = 0;
  if (chain == original) {
    PyObject *calls = PyObject_GetAttr(chain, name_calls);
    empty = calls && PyList_CheckExact(calls) && !PyList_GET_SIZE(calls);
    Py_XDECREF(calls);
  }
  Py_XDECREF(chain);
  PyErr_Clear();
  return empty;
}

static int no_modes(void) {
  PyObject *depth = PyObject_CallNoArgs(mode_depth);
  int none = depth && PyLong_CheckExact(depth) && !PyObject_IsTrue(depth);
  Py_XDECREF(depth);
  PyErr_Clear();
  return none;
}

static PyObject *driver_error(const char *what, int status) {
  const char *name = NULL;
  if (error_name) error_name(status, &name);
  return PyErr_Format(PyExc_RuntimeError, "%s failed with %s (%d)", what,
                      name ? name : "an unknown error", status);
}

static int launch(const Kernel *kernel, const uint64_t *address, void *stream) {
  uint64_t value[MAX_VALUES];
  void *pointer[MAX_VALUES];
  Attribute attribute[2];
  Config config = {{kernel->grid[0], kernel->grid[1], kernel->grid[2]}, {kernel->block, 1, 1},
                   kernel->shared, stream, attribute, 0};
  for (int i = 0; i < kernel->count; i++) {
    value[i] = kernel->source[i] < 0 ? kernel->value[i] : address[kernel->source[i]];
    pointer[i] = &value[i];
  }
  if (kernel->pdl) {
    Attribute *one = &attribute[config.count++];
    memset(one, 0, sizeof *one);
    one->id = PROGRAMMATIC_STREAM_SERIALIZATION;
    one->value.number[0] = 1;
  }
  if (kernel->cluster > 1) {
    Attribute *one = &attribute[config.count++];
    memset(one, 0, sizeof *one);
    one->id = CLUSTER_DIMENSION;
    one->value.number[0] = kernel->cluster;
    one->value.number[1] = one->value.number[2] = 1;
  }
  int status;
  Py_BEGIN_ALLOW_THREADS /* a full queue blocks here */
  status = launch_kernel(&config, kernel->function, pointer, NULL);
  Py_END_ALLOW_THREADS
  return status;
}

static PyObject *results(const Recipe *recipe, PyObject *const *tensors) {
  if (recipe->results == -1) Py_RETURN_NONE;
  if (recipe->results == -2) return Py_NewRef(tensors[recipe->result[0]]);
  PyObject *tuple = PyTuple_New(recipe->results);
  for (int i = 0; tuple && i < recipe->results; i++)
    PyTuple_SET_ITEM(tuple, i, Py_NewRef(tensors[recipe->result[i]]));
  return tuple;
}

/* Do what the recipe says.  *refused: nothing was launched, the Python function has to. */
static PyObject *replay(const Recipe *recipe, const Call *call, int *refused) {
  void *context = NULL, *stream = NULL;
  *refused = 1;
  if (current_context(&context) || context != recipe->context || !no_modes() ||
      !chain_is_empty(name_enter, enter) || !chain_is_empty(name_leave, leave))
    return NULL;
  if (exchange->stream(device_type, recipe->device, &stream)) { PyErr_Clear(); return NULL; }
  uint64_t address[MAX_ARGUMENTS + MAX_NEW];
  PyObject *tensors[MAX_ARGUMENTS + MAX_NEW], *result = NULL;
  memcpy(address, call->address, sizeof call->address[0] * (size_t)call->count);
  memcpy(tensors, call->values, sizeof(PyObject *) * (size_t)call->count);
  int filled = call->count, status = 0;
  for (int i = 0; i < recipe->allocations; i++) {
    PyObject *made = PyObject_Vectorcall(allocate, recipe->allocation[i].arguments, 3, NULL);
    if (!made) { *refused = 0; goto done; } /* out of memory is the caller's to see */
    tensors[filled++] = made;
    View view;
    if (exchange->view(made, &view)) { PyErr_Clear(); goto done; }
    address[filled - 1] = (uint64_t)view.data + view.offset;
    if (!address[filled - 1] || (address[filled - 1] & 15) || view.device.type != device_type ||
        view.device.id != recipe->device)
      goto done;
  }
  *refused = 0;
  for (int i = 0; i < recipe->kernels && !status; i++)
    status = launch(&recipe->kernel[i], address, stream);
  result = status ? driver_error("cuLaunchKernelEx", status) : results(recipe, tensors);
done:
  for (int i = call->count; i < filled; i++) Py_DECREF(tensors[i]);
  return result;
}

/* ---- Replays: a function with its recipes ---- */
typedef struct {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject *missed, *dictionary;
  unsigned long long hits;
  unsigned turn;
  uint64_t seen[SEEN], never[SEEN];
  Recipe *table[SETS][WAYS];
} Replays;

static Recipe *find(Replays *self, const Call *call, Py_ssize_t positional, PyObject *names) {
  Recipe **set = self->table[call->hash % SETS];
  for (int way = 0; way < WAYS; way++)
    if (set[way] && holds(set[way], call, positional, names)) return set[way];
  return NULL;
}

static PyObject *Replays_call(PyObject *object, PyObject *const *values, size_t flags,
                              PyObject *names) {
  Replays *self = (Replays *)object;
  Py_ssize_t positional = PyVectorcall_NARGS(flags);
  Call call;
  Recipe *recipe;
  if (read_call(&call, values, positional, names) &&
      (recipe = find(self, &call, positional, names))) {
    int refused;
    Py_INCREF(recipe); /* another thread may replace it meanwhile */
    PyObject *result = replay(recipe, &call, &refused);
    Py_DECREF(recipe);
    if (!refused) {
      self->hits++;
      return result;
    }
  }
  return PyObject_Vectorcall(self->missed, values, flags, names);
}

/* seen(*args, **kwargs): whether such a call could have a recipe and was asked for before. */
static PyObject *Replays_seen(PyObject *object, PyObject *const *values, Py_ssize_t count,
                              PyObject *names) {
  Replays *self = (Replays *)object;
  Call call;
  if (!read_call(&call, values, count, names)) Py_RETURN_FALSE;
  uint64_t *place = &self->seen[(call.hash >> 8) % SEEN];
  if (self->never[(call.hash >> 8) % SEEN] == call.hash) Py_RETURN_FALSE;
  if (*place == call.hash && !find(self, &call, count, names)) Py_RETURN_TRUE;
  *place = call.hash;
  Py_RETURN_FALSE;
}

/* refuse(*args, **kwargs): such a call cannot be recorded. */
static PyObject *Replays_refuse(PyObject *object, PyObject *const *values, Py_ssize_t count,
                                PyObject *names) {
  Call call;
  if (read_call(&call, values, count, names))
    ((Replays *)object)->never[(call.hash >> 8) % SEEN] = call.hash;
  Py_RETURN_NONE;
}

static int add_kernel(Kernel *kernel, PyObject *description, int tensors) {
  unsigned long long function;
  PyObject *values;
  const char *kinds;
  int scratch;
  if (!PyArg_ParseTuple(description, "K(III)IIpisiO!", &function, &kernel->grid[0],
                        &kernel->grid[1], &kernel->grid[2], &kernel->block, &kernel->shared,
                        &kernel->pdl, &kernel->cluster, &kinds, &scratch, &PyTuple_Type, &values))
    return -1;
  kernel->function = (void *)(uintptr_t)function;
  int given = (int)PyTuple_GET_SIZE(values);
  kernel->count = given + scratch;
  if ((int)strlen(kinds) != given || scratch < 0 || kernel->count > MAX_VALUES) {
    PyErr_SetString(PyExc_ValueError, "too many arguments, or not one kind for each");
    return -1;
  }
  for (int i = 0; i < kernel->count; i++) {
    kernel->source[i] = -1;
    kernel->value[i] = 0; /* scratch memory that is not used */
    if (i >= given) continue;
    PyObject *value = PyTuple_GET_ITEM(values, i);
    if (kinds[i] == 'P') {
      long index = PyLong_AsLong(value);
      if (index < 0 || index >= tensors) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "no such tensor");
        return -1;
      }
      kernel->source[i] = (int8_t)index;
    } else if (kinds[i] == 'f') {
      float number = (float)PyFloat_AsDouble(value);
      memcpy(&kernel->value[i], &number, sizeof number);
    } else if (strchr("iIq", kinds[i])) {
      long long number = PyLong_AsLongLong(value);
      if ((kinds[i] == 'i' && number != (int32_t)number) ||
          (kinds[i] == 'I' && number != (uint32_t)number)) {
        PyErr_SetString(PyExc_OverflowError, "a 32-bit argument does not fit");
        return -1;
      }
      kernel->value[i] = (uint64_t)number;
    } else {
      PyErr_Format(PyExc_ValueError, "unknown kind %c", kinds[i]);
      return -1;
    }
    if (PyErr_Occurred()) return -1;
  }
  /* The binary itself says what it takes: number and size of each parameter. */
  size_t offset, size;
  for (int i = 0; i <= kernel->count; i++) {
    size_t wanted = i < given && strchr("iIf", kinds[i]) ? 4 : 8;
    int status = parameter_info(kernel->function, (size_t)i, &offset, &size);
    if ((i < kernel->count) != !status || (!status && size != wanted)) {
      PyErr_Format(PyExc_ValueError, "the binary's parameter %d is not the plan's", i);
      return -1;
    }
  }
  return 0;
}

static int add_arguments(Recipe *recipe, const Call *call) {
  recipe->argument = PyMem_Calloc((size_t)call->count, sizeof(Argument));
  if (!recipe->argument) { PyErr_NoMemory(); return -1; }
  recipe->arguments = call->count;
  for (int i = 0; i < call->count; i++) {
    Argument *argument = &recipe->argument[i];
    if (!call->is_tensor[i]) {
      argument->constant = Py_NewRef(call->values[i]);
      continue;
    }
    const View *view = &call->view[i];
    size_t bytes = (size_t)view->ndim * sizeof(int64_t);
    argument->type = view->type;
    argument->ndim = view->ndim;
    argument->low = (uint32_t)(call->address[i] & LOW_BITS);
    memcpy(argument->shape, view->shape, bytes);
    memcpy(argument->strides, view->strides, bytes);
  }
  return 0;
}

static int add_results(Recipe *recipe, PyObject *result, int tensors) {
  recipe->results = -1;
  if (result == Py_None) return 0;
  int one = PyLong_Check(result);
  Py_ssize_t count = one ? 1 : PyTuple_Check(result) ? PyTuple_GET_SIZE(result) : MAX_NEW + 1;
  if (count > MAX_NEW) { PyErr_SetString(PyExc_ValueError, "too many results"); return -1; }
  recipe->results = one ? -2 : (int)count;
  for (Py_ssize_t i = 0; i < count; i++) {
    long index = PyLong_AsLong(one ? result : PyTuple_GET_ITEM(result, i));
    if (index < 0 || index >= tensors) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "no such tensor");
      return -1;
    }
    recipe->result[i] = (int8_t)index;
  }
  return 0;
}

static int fill(Recipe *recipe, const Call *call, PyObject *allocations, PyObject *kernels,
                PyObject *result) {
  Py_ssize_t made = PyTuple_GET_SIZE(allocations), launches = PyTuple_GET_SIZE(kernels);
  int tensors = call->count + (int)made;
  if (made > MAX_NEW || launches < 1) {
    PyErr_SetString(PyExc_ValueError, "too many allocations, or no launch");
    return -1;
  }
  if (current_context(&recipe->context) || !recipe->context) {
    PyErr_SetString(PyExc_ValueError, "no current context");
    return -1;
  }
  if (add_arguments(recipe, call) || add_results(recipe, result, tensors)) return -1;
  recipe->allocation = PyMem_Calloc((size_t)made + 1, sizeof(Allocation));
  recipe->kernel = PyMem_Calloc((size_t)launches, sizeof(Kernel));
  if (!recipe->allocation || !recipe->kernel) { PyErr_NoMemory(); return -1; }
  recipe->allocations = (int)made;
  for (int i = 0; i < made; i++) {
    PyObject **slots = recipe->allocation[i].arguments;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(allocations, i), "OOO", &slots[0], &slots[1],
                          &slots[2])) {
      memset(slots, 0, sizeof recipe->allocation[i]);
      return -1;
    }
    for (int j = 0; j < 3; j++) Py_INCREF(slots[j]);
  }
  for (int i = 0; i < launches; i++)
    if (add_kernel(&recipe->kernel[i], PyTuple_GET_ITEM(kernels, i), tensors)) return -1;
  recipe->kernels = (int)launches;
  return 0;
}

/* add(args, kwargs, allocations, kernels, result, keep): remember a recipe for calls like this. */
static PyObject *Replays_add(PyObject *object, PyObject *const *given, Py_ssize_t count) {
  Replays *self = (Replays *)object;
  if (count != 6 || !PyTuple_Check(given[0]) || !PyDict_Check(given[1]) ||
      !PyTuple_Check(given[2]) || !PyTuple_Check(given[3]))
    return PyErr_Format(PyExc_TypeError, "add(args, kwargs, allocations, kernels, result, keep)");
  Py_ssize_t positional = PyTuple_GET_SIZE(given[0]), position = 0, filled = positional;
  PyObject *values[MAX_ARGUMENTS], *key, *value;
  if (positional + PyDict_GET_SIZE(given[1]) > MAX_ARGUMENTS)
    return PyErr_Format(PyExc_ValueError, "too many arguments");
  PyObject *names = PyTuple_New(PyDict_GET_SIZE(given[1]));
  if (!names) return NULL;
  for (Py_ssize_t i = 0; i < positional; i++) values[i] = PyTuple_GET_ITEM(given[0], i);
  while (PyDict_Next(given[1], &position, &key, &value)) {
    PyTuple_SET_ITEM(names, filled - positional, Py_NewRef(key));
    values[filled++] = value;
  }
  Call call;
  Recipe *recipe = PyObject_New(Recipe, &RecipeType);
  if (!recipe) { Py_DECREF(names); return NULL; }
  memset((char *)recipe + sizeof(PyObject), 0, sizeof(Recipe) - sizeof(PyObject));
  recipe->names = names;
  recipe->keep = Py_NewRef(given[5]);
  recipe->positional = positional;
  if (!read_call(&call, values, positional, names)) {
    PyErr_SetString(PyExc_ValueError, "not a call that can be replayed");
    Py_DECREF(recipe);
    return NULL;
  }
  recipe->hash = call.hash;
  recipe->device = call.view[0].device.id;
  if (fill(recipe, &call, given[2], given[3], given[4])) { Py_DECREF(recipe); return NULL; }
  Recipe **set = self->table[call.hash % SETS];
  int way = 0;
  while (way < WAYS - 1 && set[way]) way++;
  if (set[way]) way = (int)(self->turn++ % WAYS); /* full: replace them in turn */
  Recipe *old = set[way];
  set[way] = recipe;
  Py_XDECREF(old);
  Py_RETURN_NONE;
}

static PyObject *Replays_forget(PyObject *object, PyObject *unused) {
  (void)unused;
  Replays *self = (Replays *)object;
  memset(self->seen, 0, sizeof self->seen);
  memset(self->never, 0, sizeof self->never);
  for (int set = 0; set < SETS; set++)
    for (int way = 0; way < WAYS; way++) Py_CLEAR(self->table[set][way]);
  Py_RETURN_NONE;
}

static PyObject *Replays_size(PyObject *object, void *unused) {
  (void)unused;
  long size = 0;
  for (int set = 0; set < SETS; set++)
    for (int way = 0; way < WAYS; way++) size += ((Replays *)object)->table[set][way] != NULL;
  return PyLong_FromLong(size);
}

static PyObject *Replays_hits(PyObject *object, void *unused) {
  (void)unused;
  return PyLong_FromUnsignedLongLong(((Replays *)object)->hits);
}

static PyObject *Replays_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"missed", NULL};
  PyObject *missed;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &missed)) return NULL;
  if (!exchange || !launch_kernel)
    return PyErr_Format(PyExc_RuntimeError, "setup() has not been called");
  Replays *self = (Replays *)type->tp_alloc(type, 0); /* zeroed */
  if (!self) return NULL;
  self->vectorcall = Replays_call;
  self->missed = Py_NewRef(missed);
  return (PyObject *)self;
}

static void Replays_dealloc(PyObject *object) {
  Replays *self = (Replays *)object;
  Py_XDECREF(Replays_forget(object, NULL));
  Py_XDECREF(self->missed);
  Py_XDECREF(self->dictionary);
  Py_TYPE(object)->tp_free(object);
}

static PyMethodDef replays_methods[] = {
    {"seen", (PyCFunction)(void (*)(void))Replays_seen, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"refuse", (PyCFunction)(void (*)(void))Replays_refuse, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"add", (PyCFunction)(void (*)(void))Replays_add, METH_FASTCALL, NULL},
    {"forget", Replays_forget, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef replays_properties[] = {
    {"size", Replays_size, NULL, "Recipes that are kept.", NULL},
    {"hits", Replays_hits, NULL, "Calls that were replayed.", NULL},
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyTypeObject ReplaysType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "hwfuse_triton.Replays",
    .tp_basicsize = sizeof(Replays),
    .tp_dictoffset = offsetof(Replays, dictionary),
    .tp_vectorcall_offset = offsetof(Replays, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_new = Replays_new,
    .tp_dealloc = Replays_dealloc,
    .tp_methods = replays_methods,
    .tp_getset = replays_properties,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
};

/* setup(driver, device_type, capsule, Tensor, Parameter, allocate, mode_depth, knobs, enter, leave) */
static PyObject *setup(PyObject *module, PyObject *args) {
  (void)module;
  const char *driver;
  PyObject *capsule;
  if (!PyArg_ParseTuple(args, "siOOOOOOOO", &driver, &device_type, &capsule, &tensor_type,
                        &parameter_type, &allocate, &mode_depth, &knobs, &enter, &leave))
    return NULL;
  for (Py_ssize_t i = 2; i < 10; i++) Py_INCREF(PyTuple_GET_ITEM(args, i)); /* for good */
  const Exchange *table = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!table) return NULL;
  if (table->version.major != 1 || !table->view || !table->stream)
    return PyErr_Format(PyExc_RuntimeError, "DLPack %u is not known", table->version.major);
  void *library = dlopen(driver, RTLD_LAZY);
  if (!library) return PyErr_Format(PyExc_OSError, "%s: %s", driver, dlerror());
  *(void **)&launch_kernel = dlsym(library, "cuLaunchKernelEx");
  *(void **)&current_context = dlsym(library, "cuCtxGetCurrent");
  *(void **)&parameter_info = dlsym(library, "cuFuncGetParamInfo");
  *(void **)&error_name = dlsym(library, "cuGetErrorName");
  if (!launch_kernel || !current_context || !parameter_info) {
    launch_kernel = NULL;
    return PyErr_Format(PyExc_OSError, "%s is older than CUDA 12.4", driver);
  }
  exchange = table;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"setup", setup, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) {
  name_enter = PyUnicode_InternFromString("launch_enter_hook");
  name_leave = PyUnicode_InternFromString("launch_exit_hook");
  name_calls = PyUnicode_InternFromString("calls");
  if (PyType_Ready(&RecipeType) < 0 || PyType_Ready(&ReplaysType) < 0) return NULL;
  PyObject *module = PyModule_Create(&definition);
  if (!module) return NULL;
  if (PyModule_AddObjectRef(module, "Replays", (PyObject *)&ReplaysType) < 0) return NULL;
  return module;
}
