"""The exported planner under ONNX Runtime: the same receding horizon, each iteration one run of a graph."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime

from mbctrl.base.errors import BundleError, SpecError
from mbctrl.planning.knots import Knots
from mbctrl.planning.planner import Parameters, Planner, PlannerState, Result
from mbctrl.planning.rules.base import Distribution, Figures, Rule
from mbctrl.planning.white import normals
from mbctrl.runtime.bundle import POLICY, Bundle

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class Session:
    """One graph, its inputs and outputs bound to memory that stays where it is.

    Args:
        name, data: the file, for errors, and its content.
        provider: one of PROVIDERS.
        threads: inside operators, on the processor.

    Errors:
        SpecError: where the provider is not there: onnxruntime would fall back to the processor without a word.
    """

    def __init__(self, name: str, data: bytes, provider: str = "cpu", threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        settings: dict[str, Any] = {}
        if provider == "cuda":  # TF32 changes which candidates are elite
            settings = {"use_tf32": "0", "enable_cuda_graph": "1"}
        wanted = PROVIDERS[provider]
        try:
            with _quiet():
                made = onnxruntime.InferenceSession(data, options, providers=[(wanted, settings)])
        except Exception as error:  # noqa: BLE001 -- its errors have no common type
            raise BundleError(f"does not load: {str(error).splitlines()[0]}", file=name) from None
        if made.get_providers()[0] != wanted:
            raise SpecError(
                f"{wanted} is not usable here; usable: {', '.join(usable())}", file="command line", key=f"--provider {provider}"
            )
        made.disable_fallback()  # else an accelerator that fails in the middle of a run is replaced by the processor
        self.session, device = made, "cpu" if provider == "cpu" else "cuda"
        self._binding = made.io_binding()
        self.shapes = {value.name: tuple(value.shape) for value in made.get_inputs()}
        self._values = {}
        for key, shape in self.shapes.items():
            self._values[key] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), device, 0)
            self._binding.bind_ortvalue_input(key, self._values[key])
        self._outputs = [value.name for value in made.get_outputs()]
        for value in made.get_outputs():
            held = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(tuple(value.shape), np.float32), device, 0)
            self._values[value.name] = held
            self._binding.bind_ortvalue_output(value.name, held)

    def __call__(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name; they are overwritten by the next run."""
        for key, value in given.items():
            self._values[key].update_inplace(np.ascontiguousarray(value, np.float32))
        self.session.run_with_iobinding(self._binding)
        return {key: self._values[key].numpy() for key in self._outputs}


class OnnxPlanner(Planner):
    """A planner whose iterations are runs of the bundle's graph.

    Args:
        bundle: where the graph is.
        rule, knots, sigma: as ``Planner``.
        provider, threads: of the session.
    """

    def __init__(self, bundle: Bundle, rule: Rule, knots: Knots, sigma: np.ndarray, provider: str, threads: int) -> None:
        spec = bundle.config.planner
        super().__init__(None, rule, knots, samples=spec.samples, sigma=sigma, iterations=spec.iterations, growth=spec.growth)
        # A CUDA graph and TensorRT take no loops; a processor is quicker with one.
        name = "iter.onnx" if provider == "cpu" else "iter_unrolled.onnx"
        self._session = Session(name, bundle.files[name], provider, threads)
        self._factors = np.asarray(bundle.manifest["factors"], np.float32)
        self._kept = self._session.shapes.get("kept", (0, 0, 0))[2]
        self.costs = np.zeros(0, np.float32)

    def initial(self, command: np.ndarray, t: float = 0.0, seed: int = 0) -> PlannerState:
        """Return the state before the first plan."""
        state = super().initial(command, t, seed)
        b = state.belief
        return PlannerState(Distribution(b.mean, b.spread, b.best, np.repeat(b.mean[..., None], self._kept, 2)), t, seed, 0)

    def iterate(self, state: PlannerState, x: np.ndarray, parameters: Parameters) -> tuple[PlannerState, Result]:
        """Run the graph once."""
        belief, size = state.belief, (self.knots.count, len(parameters.u_before), self.samples)
        given = {"x": x, "mean": belief.mean, "spread": belief.spread, "weights": self._factors, "u_before": parameters.u_before}
        given["noise"] = normals(state.seed, state.draws, size[0] * size[1], size[2]).reshape(size)
        given |= task_inputs(self._session.shapes, parameters)
        if self._kept:
            given["kept"] = belief.kept
        given["proposal"] = belief.mean[..., None] if parameters.proposal is None else parameters.proposal
        out = self._session({key: value for key, value in given.items() if key in self._session.shapes})
        best, mean, ess, share = (float(value) for value in out["figures"])
        finite = round(share * self.samples)
        figures = Figures(best, mean, ess, self.samples - finite) if finite else Figures(np.inf, np.inf, 0.0, self.samples)
        kept = out["next_kept"].copy() if self._kept else belief.kept
        new = Distribution(out["next_mean"].copy(), out["next_spread"].copy(), out["best"].copy(), kept)
        self.costs = out["costs"]
        state = PlannerState(new, state.start, state.seed, state.draws + 1)
        follow = getattr(new, self.rule.executes)
        return state, Result(follow, figures, None, out["share"].copy(), out["states"].copy(), out["path"].copy())


def task_inputs(shapes: dict[str, tuple[int, ...]], parameters: Parameters) -> dict[str, np.ndarray]:
    """Return what a graph with inputs of ``shapes`` is told of the task.

    Errors:
        BundleError: for another goal than it was exported for.
    """
    p, r = parameters.p_target, parameters.r_target
    given: dict[str, np.ndarray] = {}
    if "p_target" in shapes:
        if p is None:
            raise BundleError("the planner was exported for a goal with a tool target", key="goal")
        given["p_target"] = p[:, :, 0]
        given["r_target"] = np.zeros((3, 3, p.shape[1]), np.float32) if r is None else r[..., 0]
        given["rotation"] = np.array([r is not None], np.float32)
    if "q_target" in shapes:
        if parameters.q_target is None:
            raise BundleError("the planner was exported for a joint goal", key="goal")
        given["q_target"] = parameters.q_target
    if parameters.obstacles:
        given["obstacles"] = np.stack([at[:, :, 0] for at in parameters.obstacles])
    return {key: value for key, value in given.items() if key in shapes}


class OnnxPolicy:
    """A bundle's policy: proposes plans and stands in for the planner; runs on the processor wherever that one does."""

    def __init__(self, bundle: Bundle) -> None:
        self._session = Session(POLICY, bundle.files[POLICY])

    def __call__(self, x: np.ndarray, parameters: Parameters) -> np.ndarray:
        """Return knots (K, nu) for state ``x`` (nx,)."""
        return self._session({"x": x, **task_inputs(self._session.shapes, parameters)})["knots"].copy()


class OnnxRollout:
    """The arm alone, one trajectory: predicts the state a plan will start from."""

    def __init__(self, bundle: Bundle) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(bundle.files["rollout.onnx"], options, providers=["CPUExecutionProvider"])

    def __call__(self, x: np.ndarray, commands: np.ndarray, dt: float) -> np.ndarray:
        """Return states (H+1, nx, 1) from ``x`` (nx,) under commands (H, nu, 1), ``dt`` seconds apart."""
        given = {"x": x, "commands": commands[:, :, 0], "dt": np.array([dt])}
        return self._session.run(None, {key: np.asarray(value, np.float32) for key, value in given.items()})[0][:, :, None]


def usable() -> list[str]:
    """Return the providers of this build that load a graph here, as PROVIDERS names them.

    ``get_available_providers`` names what the build has, whether or not the machine has it.
    """
    have = set(onnxruntime.get_available_providers())
    found = [name for name, provider in PROVIDERS.items() if provider in have]
    return [name for name in found if name == "cpu" or _loads(PROVIDERS[name])]


def _loads(provider: str) -> bool:
    # One Identity of one float, as bytes: onnx itself is not needed on a robot's computer.
    data = bytes.fromhex(_IDENTITY)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        with _quiet():
            return onnxruntime.InferenceSession(data, options, providers=[provider]).get_providers()[0] == provider
    except Exception:  # noqa: BLE001 -- its errors have no common type
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what onnxruntime prints of a provider that is not there: that is said in one line, or not at all."""
    onnxruntime.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # what it is by default


_IDENTITY = (
    "080a3a370a100a016112016222084964656e746974791201675a0f0a0161120a0a"
    "08080112040a020801620f0a0162120a0a08080112040a02080142040a001012"
)
