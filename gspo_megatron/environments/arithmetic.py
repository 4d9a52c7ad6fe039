"""Program that evaluates one expression: `python -I -S arithmetic.py`, expression on stdin, value on stdout.

It drops every privilege but its three pipes before it reads text from a model. Its grammar is arithmetic only:
numbers, + - * / // % ** and parentheses, without names, calls and attributes.
"""

import ast
import operator
import resource
import sys

PROCESSOR_SECONDS = 1
MEMORY_BYTES = 256 << 20
MAX_RESULT = 64
"""Most characters of a value. A longer one is an error."""
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
    """Set hard limits: no new descriptor (file, socket, pipe), 1 s of processor time, 256 MiB, no core dump.

    An ordinary user's process cannot raise hard limits again. Open descriptors, standard input and output, stay open.
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
    """Return the value of a syntax tree. Raises ValueError for anything but arithmetic."""
    if isinstance(node, ast.Expression):
        return evaluate(node.body)
    # In Python a bool is an int; here it is not a number.
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return BINARY[type(node.op)](evaluate(node.left), evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](evaluate(node.operand))
    raise ValueError("not arithmetic")


def write(value: int | float) -> str:
    """Format a whole number exactly, others with 12 digits. Raises ValueError if it is not a short real number."""
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
    # There is no value: the caller reads the exit code.
    except (ArithmeticError, ValueError, SyntaxError, MemoryError, RecursionError):
        sys.exit(1)
