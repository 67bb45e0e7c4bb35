"""Every analytic kernel of the library against Monte Carlo: `python -m benchmarks.accuracy`."""

# Makes neural_tangents importable for the modules here, which import it in alphabetical order.
import taylor_softmax  # noqa: F401
