// Bindings of ListStepper, apart from the plan's.
#include "bind_lists.h"

#include <pybind11/stl.h>

#include <array>

#include "lists.h"
#include "names.h"

namespace warpstep {

namespace {

// The fields of warpstep.lists.Options, in their order there.
constexpr std::array kFields{"lr",         "numbers",   "maximize",      "coupled",
                             "grad_scale", "found_inf", "advance_steps", "unscale_grads"};

class Fields {
 public:
  explicit Fields(const py::tuple& fields) : fields_(fields) {
    if (fields.size() != kFields.size()) throw py::type_error("not warpstep.lists.Options");
  }
  py::handle next() { return PyTuple_GET_ITEM(fields_.ptr(), at_++); }
  double number() { return next().cast<double>(); }
  bool flag() { return next().cast<bool>(); }

 private:
  const py::tuple& fields_;
  Py_ssize_t at_ = 0;
};

}  // namespace

void bind_lists(py::module_& m) {
  m.attr("list_options") = py::tuple(py::cast(kFields));
  py::class_<ListStepper>(m, "ListStepper")
      .def(py::init<py::object, py::object, std::size_t>(), py::kw_only(), py::arg("upload"),
           py::arg("use"), py::arg("resident_bytes"))
      .def(
          "step",
          [](ListStepper& stepper, const std::string& rule, const std::vector<py::list>& lists,
             const py::tuple& given, bool cuda, bool dispatched, bool always, bool count_writes,
             int threads) {
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
            options.cuda = cuda;
            options.dispatched = dispatched;
            options.always = always;
            options.count_writes = count_writes;
            options.threads = threads;
            if (lists.size() < 3 || lists.size() > 3 + kMomentEnd - kMoment) {
              throw py::value_error("params, grads, moments and steps are needed");
            }
            const TensorLists given_lists{
                lists.front(), lists[1], {lists.begin() + 2, lists.end() - 1}, lists.back()};
            return stepper.step(given_lists, lr, grad_scale, found_inf, options);
          },
          py::arg("rule"), py::arg("lists"), py::arg("options"), py::kw_only(), py::arg("cuda"),
          py::arg("dispatched"), py::arg("always"), py::arg("count_writes"), py::arg("threads"));
}

}  // namespace warpstep
