// What every binding needs besides tensors: the kernels in use, threads to run them, errors.
#pragma once

#include "cpu/kernels.h"
#include "cpu/team.h"
#include "tensor_view.h"

namespace {

using aserve::Status;

inline aserve::Threads threads() {
  uint32_t count = 1;
  if (torch_get_num_threads(&count) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("aserve: torch_get_num_threads failed");
  return {static_cast<int>(count), aserve::team_workers};
}

inline const aserve::Kernels& table(const char* op) {
  const aserve::Kernels* kernels = aserve::kernels();
  if (kernels == nullptr) refuse(op, "this CPU has neither AVX-512 nor AVX2");
  return *kernels;
}

inline void check(const char* op, Status status) {
  switch (status) {
    case Status::ok:
      return;
    case Status::bad_block:
      refuse(op, "a block id is outside the cache");
    case Status::bad_slot:
      refuse(op, "a slot is outside the cache");
    case Status::bad_position:
      refuse(op, "a position is outside cos_sin");
    case Status::bad_row:
      refuse(op, "an id is outside the table");
    case Status::no_memory:
      refuse(op, "out of memory");
  }
}

}  // namespace
