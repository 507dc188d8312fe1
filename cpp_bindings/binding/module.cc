#include "binding.h"

NB_MODULE(_native, m) {
  m.doc() = "The native core; owl2.runtime.backends.native is its only user.";
  owl2::bind_machine(m);
  owl2::bind_weights(m);
  owl2::bind_decoder(m);
}
