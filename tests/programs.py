"""What traced programs do."""

import jax


def sums(program):
    """Dtypes of all sums in a jaxpr and in those inside it."""
    return [
        equation.outvars[0].aval.dtype
        for equation in equations(program)
        if equation.primitive.name in ("reduce_sum", "cumsum")
    ]


def equations(program):
    """Of a jaxpr and of all those inside it."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(inner)
