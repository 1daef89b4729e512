// Bindings of ListStepper, apart from the plan's.
#include "bind_lists.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "lists.h"
#include "names.h"

namespace warpstep {

namespace {

// The fields of warpstep.lists.Options, in their order there.
constexpr std::array kFields{"lr",         "numbers",   "maximize",      "coupled",
                             "grad_scale", "found_inf", "advance_steps", "unscale_grads",
                             "rounding",   "seed",      "param_indices", "first_elements"};

class Fields {
 public:
  explicit Fields(const py::tuple& fields) : fields_(fields) {
    if (fields.size() != kFields.size()) throw py::type_error("not warpstep.lists.Options");
  }
  py::handle next() { return PyTuple_GET_ITEM(fields_.ptr(), at_++); }
  template <class T>
  std::vector<T> numbers() {  // None: by default
    const py::handle given = next();
    return given.is_none() ? std::vector<T>() : given.cast<std::vector<T>>();
  }
  double number() { return next().cast<double>(); }
  bool flag() { return next().cast<bool>(); }

 private:
  const py::tuple& fields_;
  Py_ssize_t at_ = 0;
};

// A list, or None, for each moment's scales, the residuals and the copies.
void add_low_precision(const py::tuple& given, std::size_t moments, TensorLists& lists) {
  if (given.size() != moments + 2) throw py::value_error("scales, residuals, copies are needed");
  for (std::size_t i = 0; i < given.size(); ++i) {
    const py::handle list = PyTuple_GET_ITEM(given.ptr(), i);
    if (list.is_none()) continue;
    if (!PyList_Check(list.ptr())) throw py::type_error("not a list");
    const std::size_t after_scales = i == moments ? std::size_t{kResidual} : std::size_t{kCopy};
    lists.of[i < moments ? kScale + i : after_scales] = list.ptr();
  }
}

}  // namespace

void bind_lists(py::module_& m) {
  m.attr("list_options") = py::tuple(py::cast(kFields));
  py::class_<ListStepper>(m, "ListStepper")
      .def(py::init<py::object, py::object, std::size_t>(), py::kw_only(), py::arg("upload"),
           py::arg("use"), py::arg("resident_bytes"))
      .def("step",
           [](ListStepper& stepper, const std::string& rule, const std::vector<py::list>& lists,
              const py::tuple& given, const std::tuple<bool, bool, bool>& caller, bool cuda,
              int threads, const py::object& low_precision) {
             Fields fields(given);
             ListOptions options{};
             options.rule = rule_named(rule);
             const py::handle lr = fields.next();
             const py::tuple numbers = py::reinterpret_borrow<py::tuple>(fields.next());
             for (std::size_t i = 0; i < numbers.size() && kLr + 1 + i < kNumbers; ++i) {
               options.hyper.numbers[kLr + 1 + i].value = numbers[i].cast<double>();
             }
             options.hyper.maximize = fields.flag();
             options.hyper.decay = fields.flag() ? Decay::coupled : Decay::decoupled;
             const py::handle grad_scale = fields.next(), found_inf = fields.next();
             options.advance_steps = fields.flag();
             options.unscale_grads = fields.flag();
             const py::handle rounding = fields.next();
             if (!rounding.is_none()) {
               const auto word = rounding.cast<std::string>();
               options.stochastic_params = word == "stochastic";
               options.stochastic_squares = word == "stochastic" || word == "stochastic_exp_avg_sq";
             }
             options.seed = fields.next().cast<std::uint64_t>();
             options.param_indices = fields.numbers<std::uint32_t>();
             options.first_elements = fields.numbers<std::int64_t>();
             // The fields of warpstep.lists.Caller.
             std::tie(options.dispatched, options.always, options.count_writes) = caller;
             options.cuda = cuda;
             options.threads = threads;
             if (lists.size() < 3 || lists.size() > 3 + kMomentEnd - kMoment) {
               throw py::value_error("params, grads, moments and steps are needed");
             }
             TensorLists given_lists;
             const std::size_t moments = lists.size() - 3;
             given_lists.of[kParam] = lists[0].ptr();
             given_lists.of[kGrad] = lists[1].ptr();
             for (std::size_t i = 0; i < moments; ++i) {
               given_lists.of[kMoment + i] = lists[2 + i].ptr();
             }
             given_lists.state_steps = lists.back().ptr();
             if (!low_precision.is_none()) add_low_precision(low_precision, moments, given_lists);
             return stepper.step(given_lists, lr, grad_scale, found_inf, options);
           });  // by position: see NOTE [arguments by position] in bindings.cpp
}

}  // namespace warpstep
