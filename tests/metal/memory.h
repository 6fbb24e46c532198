// Buffers and threadgroup variables, and what is known of each of their bytes.
#pragma once
#include <cstdlib>
#include <sys/mman.h>

#include "threads.h"

namespace {

constexpr uint THREADGROUP_BYTES = 32768;
// Buffers stand this far apart, so that an index gone wrong by 32 bits hits no other buffer.
constexpr size_t DISTANCE = size_t(1) << 36;
constexpr uint HOST = ~0u;  // wrote the initial values

// The last accesses to a few bytes; threads are numbered from 1 through the whole grid.
struct Cell {
  uint writer, write_time, readers[2], read_times[2];
};
struct Buffer {
  const char* name;
  byte *base, *pages;
  size_t bytes, page_bytes;
  uint element, granule;  // bytes; a cell stands for `granule` of them
  bool read_only, shared;
  uint threadgroup;  // that a shared variable was last poisoned for
  Cell* cells;
};

byte* arena;
Buffer buffers[MAX_BUFFERS];
uint buffer_count, argument_count;

size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

void poison(byte* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) memory[i] = byte(launch->poison >> 8 * (i % 4));
}

Buffer& add_buffer(uint number, const char* name, size_t bytes, uint element) {
  if (number >= MAX_BUFFERS) fail(0, "limit: more than %u buffers", MAX_BUFFERS);
  if (buffer_count <= number) buffer_count = number + 1;
  Buffer& buffer = buffers[number];
  buffer.name = name;
  buffer.bytes = bytes;
  buffer.element = element;
  buffer.granule = element < 4 ? element : 4;
  buffer.page_bytes = rounded_up(bytes + !bytes, PAGE);
  buffer.pages = arena + DISTANCE * number + DISTANCE / 2;
  if (mprotect(buffer.pages, buffer.page_bytes, PROT_READ | PROT_WRITE))
    fail(0, "no memory for %zu bytes of %s", bytes, name);
  // Without checks, the page behind the end is what notices a step too far.
  size_t slack = launch->checked ? 0 : buffer.page_bytes - rounded_up(bytes, 16);
  buffer.base = buffer.pages + slack;
  return buffer;
}
void give_cells(Buffer& buffer, uint writer) {
  if (!launch->checked) return;
  size_t count = buffer.bytes / buffer.granule;
  buffer.cells = (Cell*)calloc(count + 1, sizeof(Cell));
  if (writer) for (size_t i = 0; i < count; i++) buffer.cells[i].writer = writer;
}
void refine(Buffer& buffer, uint granule) {
  Cell* coarse = buffer.cells;
  uint parts = buffer.granule / granule;
  buffer.granule = granule;
  give_cells(buffer, 0);
  for (size_t i = 0; i < buffer.bytes / granule; i++) buffer.cells[i] = coarse[i / parts];
  free(coarse);
}

// "name[index]", of an address in or near a buffer.
const char* place(const byte* address) {
  static char text[160];
  size_t number = size_t(address - arena) / DISTANCE;
  if (number >= buffer_count || !buffers[number].pages)
    snprintf(text, sizeof text, "%p", (const void*)address);
  else {
    const Buffer& buffer = buffers[number];
    long bytes = address - buffer.base, element = buffer.element;
    long index = bytes >= 0 ? bytes / element : -((element - 1 - bytes) / element);
    snprintf(text, sizeof text, "%s[%ld] (of %zu elements)", buffer.name, index,
             buffer.bytes / buffer.element);
  }
  return text;
}

bool ordered(uint thread, uint time, bool shared) {
  uint me = threadgroup * MAX_THREADS + current->index + 1;
  if (thread == 0 || thread == me || thread == HOST) return true;
  if ((thread - 1) / MAX_THREADS != threadgroup) return false;
  if (time < fences[shared]) return true;
  uint index = (thread - 1) % MAX_THREADS;
  return index / SIMD == current->index / SIMD &&
         time < simdgroups[index / SIMD].fences[shared];
}
[[noreturn]] void race(const char* what, uint other, const byte* address, void* caller) {
  uint index = (other - 1) % MAX_THREADS, group = (other - 1) / MAX_THREADS;
  fail_at(caller, "race: %s %s by thread %u of threadgroup %u and thread %u of threadgroup %u "
          "without a barrier between", what, place(address), index, group, current->index,
          threadgroup);
}
void check_cell(Buffer& buffer, Cell& cell, byte* address, bool write, void* caller) {
  uint me = threadgroup * MAX_THREADS + current->index + 1;
  // What an earlier threadgroup left in its memory is gone.
  if (buffer.shared && cell.writer && (cell.writer - 1) / MAX_THREADS != threadgroup)
    cell = Cell();
  if (!write && !cell.writer)
    fail_at(caller, "uninitialized: thread %u of threadgroup %u reads %s", current->index,
            threadgroup, place(address));
  if (!ordered(cell.writer, cell.write_time, buffer.shared))
    race(write ? "two writes to" : "a write and then a read of", cell.writer, address, caller);
  if (!write) {
    if (cell.readers[0] != me) {
      cell.readers[1] = cell.readers[0];
      cell.read_times[1] = cell.read_times[0];
    }
    cell.readers[0] = me;
    cell.read_times[0] = now;
    return;
  }
  for (int i = 0; i < 2; i++)
    if (!ordered(cell.readers[i], cell.read_times[i], buffer.shared))
      race("a read and then a write of", cell.readers[i], address, caller);
  cell = Cell();
  cell.writer = me;
  cell.write_time = now;
}
void check(void* at, size_t bytes, bool write, uint alignment, void* caller) {
  byte* address = (byte*)at;
  if (size_t(address - stacks) < MAX_THREADS * STACK) return;
  size_t number = size_t(address - arena) / DISTANCE;
  const char* access = write ? "writes" : "reads";
  if (number >= buffer_count) {
    Dl_info library;
    if (!write && dladdr(at, &library)) return;  // a table of the kernel's own
    fail_at(caller, "out of bounds: thread %u of threadgroup %u %s %s", current->index,
            threadgroup, access, place(address));
  }
  Buffer& buffer = buffers[number];
  size_t offset = address - buffer.base;
  if (offset + bytes > buffer.bytes || offset > buffer.bytes || (write && buffer.read_only))
    fail_at(caller, "out of bounds: thread %u of threadgroup %u %s %zu bytes at %s",
            current->index, threadgroup, access, bytes, place(address));
  if (size_t(address) % alignment)
    fail_at(caller, "misaligned: thread %u of threadgroup %u %s %zu bytes at %s",
            current->index, threadgroup, access, bytes, place(address));
  if (!buffer.cells) return;
  while ((offset | bytes) % buffer.granule) refine(buffer, buffer.granule / 2);
  for (size_t done = 0; done < bytes; done += buffer.granule)
    check_cell(buffer, buffer.cells[(offset + done) / buffer.granule], address + done, write,
               caller);
}

}  // namespace
