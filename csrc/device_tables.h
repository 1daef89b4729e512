// A bucket's stable tables in a GPU's memory, which Python allocates: as bytes to be put there, and
// kept for lists of tensors that come again.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "buckets.h"

namespace warpstep {

namespace py = pybind11;

// What a launch reads there: rows, chunks, and a zero for each tensor.
struct HostTables {
  py::bytes rows, chunks, arrivals;
};
HostTables host_tables(const Bucket& bucket);
CudaTables tables_at(std::uintptr_t rows, std::uintptr_t chunks, std::uintptr_t arrivals);

template <class T>
py::bytes bytes_of_table(const std::vector<T>& table) {
  return py::bytes(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(T));
}

// NOTE [device tables of lists]
// The tables of lists that come again are kept on the device, up to so many bytes; whole tables are
// compared, so an address that is used anew for another tensor cannot be mistaken. Where parameters
// lie elsewhere at each step (gathered anew, say), uploading would cost more than the launch saves:
// after so many calls without one that came again, only lists that come twice are uploaded.
class ResidentTables {
 public:
  // Tables, and the rows that they were made from.
  struct Resident {
    dlpack::Device device;
    RecipeKey recipe;
    std::vector<TensorRow> rows;
    std::size_t bytes;
    py::object tables;
    CudaTables at;
    void* stream;
    bool captured;  // graphs read the tables: they stay for good
    std::uint64_t used;
  };

  // `upload(device, rows, chunks, arrivals)` puts bytes into a CUDA device's memory and returns
  // what keeps them alive and the three addresses; `use(tables)` is called when they are first
  // launched with on another stream. Tables of up to `most_bytes` are kept on the devices.
  ResidentTables(py::object upload, py::object use, std::size_t most_bytes)
      : upload_(std::move(upload)), use_(std::move(use)), most_bytes_(most_bytes) {}

  // A bucket's tables, for a launch on `stream`. Where they are not on the device they are put
  // there, as `upload` says: never, for lists that are worth it, always. Null if they were not.
  enum class Upload { never, worthwhile, always };
  std::shared_ptr<Resident> get(const Bucket& bucket, void* stream, Upload upload);
  // Keeps them until `stream` has done with them, or for good where it is being captured.
  void use(Resident& resident, void* stream, bool capturing);

 private:
  std::shared_ptr<Resident> find(const Bucket& bucket);
  std::shared_ptr<Resident> make(const Bucket& bucket);
  bool is_worthwhile(const Bucket& bucket);

  py::object upload_, use_;
  std::size_t most_bytes_;
  std::vector<std::shared_ptr<Resident>> residents_;
  std::uint64_t clock_ = 0;
  std::uint32_t misses_ = 0;  // since the last hit
  std::vector<TensorRow> missed_;
};

}  // namespace warpstep
