// Cutting a tensor table into chunks, and chunks into batches: what plans and lists share.
#pragma once

#include <cstdint>
#include <vector>

#include "tables.h"

namespace warpstep {

// Elements before the first 16-byte boundary that most of the row's addresses share; gradients,
// whose addresses change from step to step, have no vote.
std::uint32_t head_of(const TensorRow& row, const RecipeKey& recipe);

// Fills in each row's number of chunks, the chunks in row order, and the batches of them that the
// CPU's threads take (kernels/adamw_cpu.h). Returns the size of a chunk.
std::uint32_t cut_chunks(std::vector<TensorRow>& rows, bool for_cuda, std::vector<Chunk>& chunks,
                         std::vector<std::uint32_t>& batches);

}  // namespace warpstep
