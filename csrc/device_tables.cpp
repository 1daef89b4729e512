// Tables for GPUs, and which of them are kept there: see device_tables.h.
#include "device_tables.h"

#include <cstring>
#include <string>

namespace warpstep {
namespace {

// Calls in a row whose lists are all new: NOTE [device tables of lists]. More than the lists that
// most steps have (one for each group, dtype and device): at the first step all are new.
constexpr std::uint32_t kPatience = 64;

bool same_rows(const std::vector<TensorRow>& a, const std::vector<TensorRow>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(TensorRow)) == 0;
}

}  // namespace

HostTables host_tables(const Bucket& bucket) {
  return {bytes_of_table(bucket.rows), bytes_of_table(bucket.chunks),
          py::bytes(std::string(bucket.rows.size() * sizeof(std::uint32_t), '\0'))};
}

CudaTables tables_at(std::uintptr_t rows, std::uintptr_t chunks, std::uintptr_t arrivals) {
  return {reinterpret_cast<const void*>(rows), reinterpret_cast<const void*>(chunks),
          reinterpret_cast<void*>(arrivals)};
}

std::shared_ptr<ResidentTables::Resident> ResidentTables::get(const Bucket& bucket, void* stream,
                                                              Upload upload) {
  std::shared_ptr<Resident> resident = find(bucket);
  if (resident != nullptr) {
    misses_ = 0;
    return resident;
  }
  if (upload == Upload::never) return nullptr;
  if (upload == Upload::worthwhile && !is_worthwhile(bucket)) return nullptr;
  resident = make(bucket);
  resident->stream = stream;
  return resident;
}

void ResidentTables::use(Resident& resident, void* stream, bool capturing) {
  resident.captured |= capturing;
  if (resident.stream != stream && !resident.captured) {
    use_(resident.tables);
    resident.stream = stream;
  }
}

std::shared_ptr<ResidentTables::Resident> ResidentTables::find(const Bucket& bucket) {
  for (const std::shared_ptr<Resident>& resident : residents_) {
    if (resident->device == bucket.device && resident->recipe == bucket.recipe &&
        same_rows(resident->rows, bucket.rows)) {
      resident->used = ++clock_;
      return resident;
    }
  }
  return nullptr;
}

bool ResidentTables::is_worthwhile(const Bucket& bucket) {
  if (misses_ < kPatience) {
    ++misses_;
    return true;
  }
  const bool again = same_rows(missed_, bucket.rows);
  missed_ = bucket.rows;
  return again;
}

std::shared_ptr<ResidentTables::Resident> ResidentTables::make(const Bucket& bucket) {
  const HostTables host = host_tables(bucket);
  const py::tuple uploaded = upload_(bucket.device.index, host.rows, host.chunks, host.arrivals);
  auto resident = std::make_shared<Resident>();
  resident->device = bucket.device;
  resident->recipe = bucket.recipe;
  resident->rows = bucket.rows;
  resident->bytes = py::len(host.rows) + py::len(host.chunks) + py::len(host.arrivals);
  resident->tables = uploaded[0];
  resident->at = tables_at(uploaded[1].cast<std::uintptr_t>(), uploaded[2].cast<std::uintptr_t>(),
                           uploaded[3].cast<std::uintptr_t>());
  resident->used = ++clock_;
  residents_.push_back(resident);

  const auto freeable = [](const std::shared_ptr<Resident>& r) { return !r->captured; };
  for (;;) {
    std::size_t bytes = 0;
    auto oldest = residents_.end();
    for (auto it = residents_.begin(); it != residents_.end(); ++it) {
      if (!freeable(*it)) continue;
      bytes += (*it)->bytes;
      if (oldest == residents_.end() || (*it)->used < (*oldest)->used) oldest = it;
    }
    if (bytes <= most_bytes_ || *oldest == resident) return resident;
    const std::shared_ptr<Resident> evicted = *oldest;  // freed after the list has been changed
    residents_.erase(oldest);
  }
}

}  // namespace warpstep
