// The Python module warpstep._native. Nothing but bindings.
//
// NOTE [arguments by position]
// What each step or clipping calls has its arguments by position only. To find an argument by its
// name, pybind11 3 makes a str of each name that it knows, at each call. That takes time; and where
// there is no memory for it, the process dies in place of a MemoryError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <signal.h>

#include <array>
#include <vector>

#include "bind_lists.h"
#include "cpu/launch.h"
#include "cuda/launch.h"
#include "current_device.h"
#include "names.h"
#include "plan.h"
#include "walkable.h"

namespace {

using namespace warpstep;

Backend backend_named(const std::string& name) {
  if (name == "cpu") return Backend::cpu;
  if (name == "cuda") return Backend::cuda;
  if (name == "external") return Backend::external;
  throw py::value_error("no such backend: " + name);
}

float* float_array(py::handle tensor, std::int64_t count) {
  TensorView view;
  if (!tensor_reader().read(tensor.ptr(), view) || !view.known_format ||
      view.format != Format::float32 || view.device.type != dlpack::cpu || view.numel() != count ||
      view.data == nullptr) {
    throw py::type_error("four float32 CPU tensors of one size are needed");
  }
  return static_cast<float*>(view.data);
}

// Null for an object that is still being made.
Plan* plan_of(PyObject* object) {
  const auto holder = reinterpret_cast<py::detail::instance*>(object)->get_value_and_holder();
  return holder.holder_constructed() ? holder.value_ptr<Plan>() : nullptr;
}

// A plan refers to its optimizer's objects, and they may refer back to it: Python's garbage
// collector has to see through it.
void let_collector_see_plans(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(self));
    const Plan* const plan = plan_of(self);
    return plan != nullptr ? plan->traverse(visit, arg) : 0;
  };
  type.tp_clear = [](PyObject* self) -> int {
    if (Plan* const plan = plan_of(self)) plan->clear();
    return 0;
  };
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "warpstep's C++ and CUDA kernels.";
  m.attr("cuda_architectures") = cuda_architectures();
  m.attr("cuda_device_type") = cuda_device_type();
  m.attr("why_no_cuda") = why_no_cuda();
  m.def("cuda_device_count", cuda_device_count);
  m.def("cuda_device_reason", [](int device) {
    const OnDevice on(device);
    return cuda_device_reason(device);
  });
  m.def("cpu_instruction_set", cpu_instruction_set);
  m.def("restarts_calls", [](int signal) {  // whether system calls go on after a signal
    struct sigaction action{};
    return sigaction(signal, nullptr, &action) == 0 && (action.sa_flags & SA_RESTART) != 0;
  });
  m.def("has_recipe", [](const std::string& rule, const py::tuple& formats) {
    return has_cpu_recipe(recipe_named(rule, formats));
  });
  m.def("survey", survey);
  m.def(
      "connect_to_torch",
      [](py::object capsule, bool torch_abi) {
        set_tensor_reader(
            TensorReader(capsule.ptr(), torch_abi ? TorchHandles::make() : std::nullopt));
        use_parallel_for(torch_abi ? find_parallel_for() : nullptr);
      },
      py::arg("capsule"), py::kw_only(), py::arg("torch_abi"));
  m.def("uses_handles", [] { return tensor_reader().uses_handles(); });
  m.def("uses_torchs_threads", uses_parallel_for);
  m.def("launch_counts", [] {
    py::dict counts;
    counts["cpu"] = launch_counts().cpu.load();
    counts["cuda"] = launch_counts().cuda.load();
    return counts;
  });
  m.def("touch_streams", [](const std::vector<std::array<py::object, 4>>& tensors, int threads) {
    std::vector<TouchedArrays> arrays;
    for (const auto& [a, read_only, b, c] : tensors) {
      TensorView view{};
      const std::int64_t count = tensor_reader().read(a.ptr(), view) ? view.numel() : -1;
      arrays.push_back({float_array(a, count), float_array(read_only, count), float_array(b, count),
                        float_array(c, count), count});
    }
    py::gil_scoped_release release;
    touch_cpu(arrays, threads);
  });

  py::class_<BucketSpec>(m, "BucketSpec")
      .def(
          py::init([](const std::string& backend, const std::string& rule, const py::tuple& formats,
                      const std::vector<py::object>& keys, py::object counter) {
            return BucketSpec{backend_named(backend), recipe_named(rule, formats), keys,
                              std::move(counter)};
          }),
          py::kw_only(), py::arg("backend"), py::arg("rule"), py::arg("formats"), py::arg("keys"),
          py::arg("counter"));
  py::class_<GroupKeys>(m, "GroupKeys")
      .def(py::init([](std::vector<std::pair<py::str, int>> numbers, std::vector<py::str> switches,
                       std::vector<py::str> flags, py::object decoupled) {
             return GroupKeys{std::move(numbers), std::move(switches), std::move(flags),
                              std::move(decoupled)};
           }),
           py::kw_only(), py::arg("numbers"), py::arg("switches"), py::arg("flags"),
           py::arg("decoupled"));

  py::class_<PlanOptions>(m, "PlanOptions")
      .def(py::init([](std::uint64_t seed, py::dict firsts, py::dict copies, py::dict counters,
                       py::object grad_name, bool watches_masters, bool as_fused) {
             return PlanOptions{seed,
                                std::move(firsts),
                                std::move(copies),
                                std::move(counters),
                                std::move(grad_name),
                                watches_masters,
                                as_fused};
           }),
           py::kw_only(), py::arg("seed"), py::arg("firsts"), py::arg("copies"),
           py::arg("counters"), py::arg("grad_name"), py::arg("watches_masters"),
           py::arg("as_fused"));

  py::class_<Plan>(m, "Plan", py::custom_type_setup(let_collector_see_plans))
      .def(py::init<py::dict, py::list, GroupKeys, const std::vector<int>&,
                    const std::vector<BucketSpec>&, py::object, const PlanOptions&>(),
           py::kw_only(), py::arg("state"), py::arg("param_groups"), py::arg("keys"),
           py::arg("assignments"), py::arg("buckets"), py::arg("match_layout"), py::arg("options"))
      .def("written_params", &Plan::written_params)
      .def("note_versions", &Plan::note_versions)
      .def("step",
           [](Plan& plan, py::handle state, py::handle param_groups, int threads,
              py::object tensors, bool zero_grads, std::ptrdiff_t expected_grads) {
             return plan.step(state, param_groups, threads, std::move(tensors),
                              {zero_grads, false, expected_grads});
           })
      .def("check", &Plan::check)
      .def("keep_alive", &Plan::keep_alive)
      .def("let_go", &Plan::let_go)
      .def("launch",
           [](Plan& plan, int threads, py::object tensors, bool zero_grads, bool unscale_grads) {
             plan.launch(threads, std::move(tensors), {zero_grads, unscale_grads});
           })
      .def("grad_norm",
           [](Plan& plan, std::size_t bucket, bool largest, int threads, py::object out) {
             plan.grad_norm(bucket, largest ? Norm::inf : Norm::l2, threads, out);
           })
      .def("chunk_counts", &Plan::chunk_counts)
      .def("chunk_count", &Plan::chunk_count)
      .def("gather_grads", &Plan::gather_grads)
      .def("remember_grads", &Plan::remember_grads)
      .def("count_grads", &Plan::count_grads)
      .def("has_shared_grads", &Plan::has_shared_grads)
      .def("copied_grads", &Plan::copied_grads)
      .def("forget_grads", &Plan::forget_grads)
      .def("compare_grads",
           [](const Plan& plan) {
             const Plan::Unchanged found = plan.compare_grads();
             return py::make_tuple(found.kept, found.unwritten);
           })
      .def("host_tables", &Plan::host_tables)
      .def(
          "set_device_tables",
          [](Plan& plan, std::size_t bucket, std::uintptr_t rows, std::uintptr_t chunks,
             std::uintptr_t arrivals) {
            plan.set_device_tables(bucket, tables_at(rows, chunks, arrivals));
          },
          py::arg("bucket"), py::kw_only(), py::arg("rows"), py::arg("chunks"), py::arg("arrivals"))
      .def("set_least", &Plan::set_least, py::arg("bucket"), py::kw_only(), py::arg("least"),
           py::arg("shared"))
      .def("find_least", &Plan::find_least)
      .def("grad_table", &Plan::grad_table)
      .def("hyper_table", &Plan::hyper_table);

  bind_lists(m);
}
