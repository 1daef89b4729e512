"""What launches read, as kernels/layout.h lays it out: where each thing is, in words of 8 bytes."""

import triton.language as tl

# Operands, in the order of everything that has one each. All but the gradient have an address in a
# row of the tensor table.
PARAM, MOMENT, SCALE = (tl.constexpr(operand) for operand in (0, 1, 4))
RESIDUAL, EMA, COPY = (tl.constexpr(operand) for operand in (7, 8, 9))
MOMENTS = 3  # at most
STABLE = 10

# TensorRow: the operands' addresses, then these.
STEP, NUMEL, FIRST, GROUP_AND_CHUNKS, HEAD_AND_NUMBER = (
    tl.constexpr(word) for word in (10, 11, 12, 13, 14)
)
ROW_WORDS = tl.constexpr(15)
UPPER = tl.constexpr(32)  # bits: chunks and number are the upper halves of their words

BLOCK = tl.constexpr(64)  # kBlock: numbers of 8 bits that share a scale

# Chunk: two uint32.
CHUNK_TENSOR, CHUNK_INDEX = (tl.constexpr(half) for half in (0, 1))
CHUNK_HALVES = tl.constexpr(2)

# Hyper: its numbers, of which those from OF_RULE on are what the rule says, then these.
LR, WEIGHT_DECAY, OF_RULE = (tl.constexpr(number) for number in (0, 1, 2))
NUMBERS = tl.constexpr(5)
EMA_DECAY, FLAGS = (tl.constexpr(word) for word in (5, 6))
HYPER_WORDS = tl.constexpr(7)
# FLAGS are bytes: a kind for each number, then these.
DECAY, MAXIMIZE = (tl.constexpr(byte) for byte in (5, 6))

# Scalar::Kind: how a number is given.
FLOAT32_ADDRESS, FLOAT64_ADDRESS = (tl.constexpr(kind) for kind in (1, 2))
# Decay: the forms that a rule asks after.
COUPLED, L1, CAUTIOUS, L1L2, MIN = (tl.constexpr(form) for form in (0, 3, 4, 5, 6))

STATISTICS = tl.constexpr(4)  # kStatistics: sums of a chunk
