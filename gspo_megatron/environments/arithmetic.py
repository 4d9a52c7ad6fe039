"""The program that evaluates one expression: `python -I -S arithmetic.py`, expression in, value out.

It gives up everything but its three pipes before it reads a byte of what a model wrote, and it knows arithmetic only:
numbers, + - * / // % ** and parentheses. No name, no call, no attribute can be written.
"""

import ast
import operator
import resource
import sys

PROCESSOR_SECONDS = 1
MEMORY_BYTES = 256 << 20
MAX_RESULT = 64
"""Characters of a value; a longer one is no result."""
BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def confine() -> None:
    """From here on: no new descriptor, so neither file nor socket nor pipe; a second, 256 MiB, no core dump.

    The limits are hard ones: an ordinary user's process cannot raise them again. What is open already, standard
    input and output, stays.
    """
    for limit, most in (
        (resource.RLIMIT_CPU, PROCESSOR_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (most, most))


def evaluate(node: ast.AST) -> int | float:
    """The value of a syntax tree of arithmetic. Raises ValueError for anything else in it."""
    if isinstance(node, ast.Expression):
        return evaluate(node.body)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return BINARY[type(node.op)](evaluate(node.left), evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](evaluate(node.operand))
    raise ValueError("not arithmetic")


def write(value: int | float) -> str:
    """A whole number as it is, others with 12 digits. Raises ValueError for what is not a short real number."""
    if isinstance(value, complex) or value != value or abs(value) == float("inf"):
        raise ValueError("not a number")
    text = str(value) if isinstance(value, int) else f"{value:.12g}"
    if len(text) > MAX_RESULT:
        raise ValueError("too long")
    return text


if __name__ == "__main__":
    confine()
    try:
        print(write(evaluate(ast.parse(sys.stdin.read(), mode="eval"))))
    # Whatever it is, it is no value: the caller reads the exit code.
    except (ArithmeticError, ValueError, SyntaxError, MemoryError, RecursionError):
        sys.exit(1)
