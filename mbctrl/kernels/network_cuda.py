"""CUDA C for calls of networks: a thread's activations in its local memory, every thread reading the same weights."""

from __future__ import annotations

from collections.abc import Sequence

from mbctrl.kernels.network import Network, offsets

_FORMS = {
    # (1 - e) / (1 + e) does not overflow; as the processor's kernel.
    "tanh": "const real e = EXP(-2 * ABS(x)), size = (1 - e) / (1 + e);\n  return x < 0 ? -size : size;",
    "silu": "return x / (1 + EXP(-x));",
    "relu": "return 0 > x ? 0 : x;",  # x where it is not a number
}

_LAYER = """
/* W x + b: W (rows, columns) row by row, then b. Four sums side by side share each load of an activation. */
INLINE void layer(const real* RESTRICT weights, int columns, int rows, const real* RESTRICT x, real* RESTRICT y) {
  const real* RESTRICT bias = weights + rows * columns;
  int row = 0;
  for (; row + 4 <= rows; row += 4) {
    const real* RESTRICT w = weights + row * columns;
    real a = bias[row], b = bias[row + 1], c = bias[row + 2], d = bias[row + 3];
    for (int k = 0; k < columns; ++k) {
      a = FMA(w[k], x[k], a);
      b = FMA(w[k + columns], x[k], b);
      c = FMA(w[k + 2 * columns], x[k], c);
      d = FMA(w[k + 3 * columns], x[k], d);
    }
    y[row] = a;
    y[row + 1] = b;
    y[row + 2] = c;
    y[row + 3] = d;
  }
  for (; row < rows; ++row) {
    real sum = bias[row];
    for (int k = 0; k < columns; ++k) sum = FMA(weights[row * columns + k], x[k], sum);
    y[row] = sum;
  }
}
"""


def functions(networks: Sequence[Network]) -> str:
    """Return the functions that calls of ``networks`` need; nothing where there are none."""
    if not networks:
        return ""
    names = sorted({network.activation for network in networks})
    return _LAYER + "".join(f"\nINLINE real active_{name}(real x) {{\n  {_FORMS[name]}\n}}\n" for name in names)


def call(name: str, networks: Sequence[Network], k: int, gate: str, inputs: Sequence[str]) -> list[str]:
    """Return the lines that leave the outputs of network ``k`` in an array ``name`` of the caller's; see ``network``.

    A group of threads that run together goes past the layers where none of their gates is above 0.
    """
    network, start = networks[k], offsets(networks)[k]
    width, last = max(network.sizes), len(network.layers) - 1
    source, target = "here", "there"
    lines = [f"real {name}[{network.outputs}];", f"for (int i = 0; i < {network.outputs}; ++i) {name}[i] = 0;"]
    lines += [f"if (!({gate} <= 0)) {{", f"  real here[{width}], there[{width}];"]
    lines += [f"  here[{i}] = {value};" for i, value in enumerate(inputs)]
    for i, (columns, rows) in enumerate(network.layers):
        lines.append(f"  layer(weights + {start}, {columns}, {rows}, {source}, {target});")
        if i < last:
            lines.append(f"  for (int i = 0; i < {rows}; ++i) {target}[i] = active_{network.activation}({target}[i]);")
        start += (columns + 1) * rows
        source, target = target, source
    lines.append(f"  for (int i = 0; i < {network.outputs}; ++i) {name}[i] = {gate} * {source}[i];")
    return [*lines, "}"]
