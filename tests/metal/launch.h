// What is to be run, and how a launch ends early.
#pragma once
#include <csetjmp>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <dlfcn.h>

#include "interface.h"

typedef unsigned char byte;

// As in emulator.py.
struct Argument {
  const char* name;
  byte* data;  // copied in unless it is an output without initial value, copied out if it is one
  size_t bytes;
  uint element;  // bytes
  int output, initialized;
};
struct Launch {
  void (*kernel)(void** buffers, const emu_attributes*);
  const Argument* arguments;
  uint argument_count, grid[3], threadgroup[3], schedule, poison, checked;
  double seconds;
  char finding[1024];
  int line;            // of the finding in the kernel's text, or 0
  size_t instruction;  // that it was found at, as an offset in the kernel's library, or 0
};

namespace {

Launch* launch;  // that is running

sigjmp_buf end_of_launch;

[[noreturn]] void end_with(void* caller, int line, const char* format, va_list values) {
  vsnprintf(launch->finding, sizeof launch->finding, format, values);
  launch->line = line;
  Dl_info kernel, library;
  if (dladdr((void*)launch->kernel, &kernel) && dladdr(caller, &library) &&
      kernel.dli_fbase == library.dli_fbase)
    launch->instruction = (byte*)caller - (byte*)library.dli_fbase - 1;
  siglongjmp(end_of_launch, 1);
}
// `caller` is the address that the kernel would go on at.
[[noreturn]] void fail_at(void* caller, const char* format, ...) {
  va_list values;
  va_start(values, format);
  end_with(caller, 0, format, values);
}
[[noreturn]] void fail(int line, const char* format, ...) {
  va_list values;
  va_start(values, format);
  end_with(nullptr, line, format, values);
}

}  // namespace
