"""The layout that Triton's kernels read is the C++ structs', field by field."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")
from warpstep.kernels.triton import adamw, layout, sgd, tail

KERNELS = Path(__file__).parents[1] / "kernels"
# Each line prints a name of the Python side, and what it has to be.
PROGRAM = r"""
#include <cstddef>
#include <cstdio>

#include "layout.h"
#include "rules/adamw.h"
#include "rules/sgd.h"
#include "tail.h"

using namespace warpstep;

static void print(const char* name, std::size_t value) { std::printf("%s %zu\n", name, value); }
static std::size_t words(std::size_t bytes) { return bytes % 8 == 0 ? bytes / 8 : ~bytes; }

int main() {
  print("PARAM", kParam);
  print("MOMENT", kMoment);
  print("SCALE", kScale);
  print("RESIDUAL", kResidual);
  print("EMA", kEma);
  print("COPY", kCopy);
  print("MOMENTS", kMomentEnd - kMoment);
  print("STABLE", kStable);
  print("(the operands' word)", words(offsetof(TensorRow, operands)));
  print("STEP", words(offsetof(TensorRow, step)));
  print("NUMEL", words(offsetof(TensorRow, numel)));
  print("FIRST", words(offsetof(TensorRow, first)));
  print("GROUP_AND_CHUNKS", words(offsetof(TensorRow, group)));
  print("UPPER", 8 * (offsetof(TensorRow, chunks) - offsetof(TensorRow, group)));
  print("HEAD_AND_NUMBER", words(offsetof(TensorRow, head)));
  print("(the number's bits)", 8 * (offsetof(TensorRow, number) - offsetof(TensorRow, head)));
  print("ROW_WORDS", words(sizeof(TensorRow)));
  print("BLOCK", kBlock);
  print("CHUNK_TENSOR", offsetof(Chunk, tensor) / 4);
  print("CHUNK_INDEX", offsetof(Chunk, index) / 4);
  print("CHUNK_HALVES", sizeof(Chunk) / 4);
  print("(the numbers' word)", words(offsetof(Hyper, numbers)));
  print("(words of a number)", words(sizeof(Scalar)));
  print("LR", kLr);
  print("WEIGHT_DECAY", kWeightDecay);
  print("OF_RULE", kOfRule);
  print("NUMBERS", kNumbers);
  print("EMA_DECAY", words(offsetof(Hyper, ema_decay)));
  print("FLAGS", words(offsetof(Hyper, kinds)));
  print("DECAY", offsetof(Hyper, decay) - offsetof(Hyper, kinds));
  print("MAXIMIZE", offsetof(Hyper, maximize) - offsetof(Hyper, kinds));
  print("HYPER_WORDS", words(sizeof(Hyper)));
  print("FLOAT32_ADDRESS", Scalar::float32_address);
  print("FLOAT64_ADDRESS", Scalar::float64_address);
  print("COUPLED", static_cast<std::size_t>(Decay::coupled));
  print("L1", static_cast<std::size_t>(Decay::l1));
  print("CAUTIOUS", static_cast<std::size_t>(Decay::cautious));
  print("L1L2", static_cast<std::size_t>(Decay::l1l2));
  print("MIN", static_cast<std::size_t>(Decay::min));
  print("STATISTICS", kStatistics);
  print("adamw.BETA1", AdamW<true>::kBeta1);
  print("adamw.BETA2", AdamW<true>::kBeta2);
  print("adamw.EPS", AdamW<true>::kEps);
  print("sgd.MOMENTUM", Sgd<true>::kMomentumOf);
  print("sgd.DAMPENING", Sgd<true>::kDampening);
  print("sgd.NESTEROV", Sgd<true>::kNesterov);
  print("tail.UNCOUNTED", static_cast<std::size_t>(kUncounted));
}
"""
# What kernels/triton takes for granted.
GRANTED = {
    "(the number's bits)": 32,
    "(the operands' word)": 0,
    "(the numbers' word)": 0,
    "(words of a number)": 1,
}


def test_offsets_are_those_of_the_structs(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("needs a C++ compiler")
    program = str(tmp_path / "offsets")
    command = [compiler, "-std=c++17", f"-I{KERNELS}", "-xc++", "-", "-o", program]
    subprocess.run(command, input=PROGRAM.encode(), check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    expected = {
        name: int(value) for name, _, value in (x.rpartition(" ") for x in lines.split("\n")[:-1])
    }

    found = dict(GRANTED)
    for prefix, module in {"": layout, "adamw.": adamw, "sgd.": sgd, "tail.": tail}.items():
        for name, value in vars(module).items():
            number = getattr(value, "value", value)
            defined_here = module is layout or not hasattr(layout, name)
            if name.isupper() and defined_here and isinstance(number, (int, float)):
                found[prefix + name] = number
    assert found == expected
