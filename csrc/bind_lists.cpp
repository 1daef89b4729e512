// Bindings of ListStepper, apart from the plan's.
#include "bind_lists.h"

#include "lists.h"

namespace warpstep {

void bind_lists(py::module_& m) {
  py::class_<ListStepper>(m, "ListStepper")
      .def(py::init<py::object, py::object, std::size_t>(), py::kw_only(), py::arg("upload"),
           py::arg("use"), py::arg("resident_bytes"))
      .def(
          "step",
          [](ListStepper& stepper, py::list params, py::list grads, py::list exp_avgs,
             py::list exp_avg_sqs, py::list max_exp_avg_sqs, py::list state_steps, py::object lr,
             double beta1, double beta2, double weight_decay, double eps, bool amsgrad,
             bool maximize, py::object grad_scale, py::object found_inf, bool coupled, bool cuda,
             bool advance_steps, bool unscale_grads, bool dispatched, bool always,
             bool count_writes, int threads) {
            ListOptions options{};
            options.hyper.beta1.value = beta1;
            options.hyper.beta2.value = beta2;
            options.hyper.weight_decay = weight_decay;
            options.hyper.eps = eps;
            options.hyper.maximize = maximize;
            options.hyper.decay = coupled ? Decay::coupled : Decay::decoupled;
            options.amsgrad = amsgrad;
            options.cuda = cuda;
            options.advance_steps = advance_steps;
            options.unscale_grads = unscale_grads;
            options.dispatched = dispatched;
            options.always = always;
            options.count_writes = count_writes;
            options.threads = threads;
            const TensorLists lists{params,      grads,           exp_avgs,
                                    exp_avg_sqs, max_exp_avg_sqs, state_steps};
            return stepper.step(lists, lr, grad_scale, found_inf, options);
          },
          py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
          py::arg("max_exp_avg_sqs"), py::arg("state_steps"), py::kw_only(), py::arg("lr"),
          py::arg("beta1"), py::arg("beta2"), py::arg("weight_decay"), py::arg("eps"),
          py::arg("amsgrad"), py::arg("maximize"), py::arg("grad_scale"), py::arg("found_inf"),
          py::arg("coupled"), py::arg("cuda"), py::arg("advance_steps"), py::arg("unscale_grads"),
          py::arg("dispatched"), py::arg("always"), py::arg("count_writes"), py::arg("threads"));
}

}  // namespace warpstep
