"""Lets neural-tangents 0.6.5 import and work on today's JAX and SciPy, without TensorFlow.

0.6.5 is the last release of neural-tangents, so nobody else will add what it lacks. Importing this
module imports neural_tangents and mends it:

- Names that neural_tangents only *imports* are put into JAX's modules during the import, and then
  removed.
- Names that it *uses when called* are replaced in the namespace of the one private neural_tangents
  module that uses them.

So JAX and SciPy look the same to everybody else. The mends also hold when neural_tangents was
imported first. They ask which names are missing, never for a version number. Those that ask nothing
replace private API of JAX, which changes, by public API that every JAX from 0.4.38 on has.
"""

from taylor_softmax._compat.importing import import_neural_tangents

import_neural_tangents()

# These have to come after: nothing of neural_tangents can be imported before.
from taylor_softmax._compat import empirical, predict  # noqa: E402

predict.mend()
empirical.mend()
