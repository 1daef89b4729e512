// Launches the CUDA kernels for the thread sanitizer (tests/test_races.py), and checks what blocks
// count: step counters, arrivals, the norm's shares.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/launch.h"

namespace warpstep {
namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}
#define EXPECT(...) expect((__VA_ARGS__), #__VA_ARGS__)

constexpr std::uint32_t kChunk = kCudaChunkLeast;

struct Tensor {
  explicit Tensor(std::int64_t numel, std::uint32_t offset = 0)
      : param(offset + numel, 1),
        grad(param),
        exp_avg(param),
        exp_avg_sq(param),
        ema(param),
        scales(2, std::vector<std::uint8_t>(numel / kBlock + 1, 100)) {
    row.operands[kParam] = param.data() + offset;
    row.operands[kMoment] = exp_avg.data() + offset;
    row.operands[kMoment + 1] = exp_avg_sq.data() + offset;
    row.operands[kEma] = ema.data() + offset;
    for (std::uint32_t i = 0; i < 2; ++i) row.operands[kScale + i] = scales[i].data();
    row.numel = numel;
    row.chunks = count_chunks(numel, 0, kChunk);
    grad_address = grad.data() + offset;
  }
  std::vector<float> param, grad, exp_avg, exp_avg_sq, ema;
  std::vector<std::vector<std::uint8_t>> scales;
  TensorRow row{};
  void* grad_address;
};

int run() {
  // Of one chunk, of several, off the vectors' boundaries; the last has no gradient.
  Tensor tensors[] = {Tensor(5), Tensor(2 * kChunk + 77), Tensor(1000, 1), Tensor(7)};
  constexpr std::uint32_t kTensors = 4;
  constexpr double kElements = 5 + 2 * kChunk + 77 + 1000;
  std::vector<float> steps(kTensors, 0);
  std::vector<TensorRow> rows;
  std::vector<Chunk> chunks;
  std::vector<void*> grads;
  for (std::uint32_t i = 0; i < kTensors; ++i) {
    tensors[i].row.step = &steps[i];
    rows.push_back(tensors[i].row);
    grads.push_back(i + 1 < kTensors ? tensors[i].grad_address : nullptr);
    for (std::uint32_t chunk = 0; chunk < rows[i].chunks; ++chunk) chunks.push_back({i, chunk});
  }
  EXPECT(rows[0].chunks == 1 && rows[1].chunks == 3);
  Hyper hyper{};
  const double numbers[kNumbers] = {1e-3, 0, 0.9, 0.999, 1e-8};
  for (std::uint32_t i = 0; i < kNumbers; ++i) hyper.numbers[i].value = numbers[i];
  hyper.ema_decay = 0.9;
  hyper.decay = Decay::decoupled;

  const auto count = static_cast<std::uint32_t>(chunks.size());
  std::vector<std::uint32_t> arrivals(kTensors, 0);
  const CudaTables tables{rows.data(), chunks.data(), arrivals.data()};
  RecipeKey recipe{RuleId::adamw, {}};
  for (Operand operand : {kParam, kMoment, kGrad}) recipe.formats[operand] = Format::float32;
  recipe.formats[kMoment + 1] = Format::float32;
  Launch launch{recipe, {},     rows.data(), grads.data(), kTensors, &hyper, 1, chunks.data(),
                count,  kChunk, 0,           nullptr};

  for (int step = 0; step < 2; ++step) EXPECT(step_cuda(launch, tables, nullptr).error == 0);
  std::vector<double> statistics(kStatistics * count, 0);
  launch.tail.statistics = statistics.data();
  launch.recipe.formats[kEma] = Format::float32;
  EXPECT(step_cuda(launch, tables, nullptr).error == 0);
  EXPECT(steps == std::vector<float>{3, 3, 3, 0});
  EXPECT(arrivals == std::vector<std::uint32_t>(kTensors, 0));
  double squares = 0;
  for (std::uint32_t chunk = 0; chunk < count; ++chunk) squares += statistics[4 * chunk];
  EXPECT(squares == kElements);

  // The same through tiles. Of the moments' memory, 8-bit codes take a quarter.
  launch.recipe.formats[kMoment] = Format::e4m3;
  launch.recipe.formats[kMoment + 1] = Format::ue5m3;
  for (std::uint32_t i = 0; i < 2; ++i) launch.recipe.formats[kScale + i] = Format::uint8;
  EXPECT(step_cuda(launch, tables, nullptr).error == 0);
  launch.tail.statistics = nullptr;
  launch.recipe.formats[kEma] = Format::none;
  EXPECT(step_cuda(launch, tables, nullptr).error == 0);
  EXPECT(steps == std::vector<float>{5, 5, 5, 0});
  EXPECT(arrivals == std::vector<std::uint32_t>(kTensors, 0));

  std::vector<double> norm(2 + count, 0);
  EXPECT(grad_norm_cuda(Norm::l2, launch, tables, norm.data(), nullptr).error == 0);
  EXPECT(norm[0] == kElements);
  norm.assign(norm.size(), 0);
  EXPECT(grad_norm_cuda(Norm::inf, launch, tables, norm.data(), nullptr).error == 0);
  EXPECT(norm[0] == 1);

  tensors[1].param[kChunk] = 0.5;
  hyper.decay = Decay::min;
  hyper.numbers[kWeightDecay].value = 1;
  std::vector<double> least(kTensors + count, -1);
  launch.least = least.data();
  for (int step = 0; step < 2; ++step) {
    EXPECT(least_magnitudes_cuda(launch, tables, nullptr).error == 0);
    EXPECT(least[1] < least[0] && least[3] == -1);
    EXPECT(step == 1 || least[1] == 0.5);
    EXPECT(step_cuda(launch, tables, nullptr).error == 0);
  }
  EXPECT(arrivals == std::vector<std::uint32_t>(kTensors, 0));
  return 0;
}

}  // namespace
}  // namespace warpstep

int main() { return warpstep::run(); }
