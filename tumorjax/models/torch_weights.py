"""Weights to and from PyTorch: the one place that knows how the two lay out their arrays.

A network's module says how its parameters are called in the reference implementation:

    torch_names(parameters)   our name -> key of the reference's state_dict
    torch_heads(parameters)   our names that depend on the number of classes; optional
    torch_renames(model)      keys that depend on settings rather than on the name; optional
    torch_aliases(keys)       further key -> key, where a state_dict repeats its weights; optional
    torch_buffers(model)      key -> array, what a state_dict holds besides weights; optional

Layouts: a convolution's `kernel` is [i, j, k, in, out] here and [out, in, i, j, k] there (of a
module with `transposed = True` [in, out, i, j, k]), a dense `kernel` is [in, out] here and
[out, in] there. All else is the same.
"""

import logging
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tumorjax.errors import UserError

# Where nnU-Net, MONAI, Lightning and others put the weights within a checkpoint.
WRAPPERS = ("network_weights", "state_dict", "model_state_dict", "model", "net", "network")
# What torch.nn.DataParallel and torch.compile put into every name.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")
# What a surrounding module puts in front of the names of the network inside.
_OUTER = ("backbone.", "model.", "net.", "network.")
_LISTED = 20


def read_checkpoint(path: str | os.PathLike) -> Any:
    """Reads what torch.save wrote, without running any code that the file may hold.

    Args:
        path: a file of tensors, numbers, text, lists and dictionaries of them.

    Returns:
        The contents; tensors are torch's, on the CPU.

    Raises:
        UserError: PyTorch or the file is missing, the file is no checkpoint, or reading it would
            run code.
    """
    torch = _torch()
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file. Expected a checkpoint written by PyTorch")
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            # Mapped, so that an optimizer's state beside the weights is never read.
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a checkpoint that PyTorch can read ({reason}). Expected a file written"
            " by torch.save; fetch it again if it was cut off on the way"
        ) from None


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a network's weights from a checkpoint of PyTorch.

    Args:
        path: nnU-Net's checkpoint_final.pth, MONAI's, or any other whose weights are its contents
            or are found under one of `WRAPPERS`.

    Returns:
        Name -> array as PyTorch lays it out. Names are without the prefixes of DataParallel and
        torch.compile; half-precision floats become float32.

    Raises:
        UserError: as `read_checkpoint`, and where the file holds no weights.
    """
    contents = read_checkpoint(path)
    found = _find_weights(contents)
    if found is None:
        kind = ", ".join(map(str, contents)) if isinstance(contents, Mapping) else type(contents)
        raise UserError(
            f"{os.fspath(path)} has no weights: it holds {kind}. Expected a state_dict, or one"
            f" under {', '.join(WRAPPERS)}"
        )
    # A state_dict that repeats its weights does so with the same memory.
    copies: dict[tuple, np.ndarray] = {}
    arrays = {}
    for name, value in found.items():
        memory = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if memory not in copies:
            copies[memory] = np.array(_to_numpy(value))
        arrays[_WRAPPED.sub("", str(name))] = copies[memory]
    return arrays


def write_checkpoint(path: str | os.PathLike, contents: Mapping[str, Any]) -> None:
    """Writes a checkpoint of PyTorch, whole or not at all.

    Args:
        path: the file.
        contents: dictionaries, lists and values; numpy and JAX arrays become tensors.
    """
    torch = _torch()
    tensors: dict[int, Any] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: convert(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(convert, value))
        if isinstance(value, np.ndarray | jnp.ndarray):
            # Repeated weights stay one tensor, as in PyTorch's own files.
            if id(value) not in tensors:
                tensors[id(value)] = torch.from_numpy(np.array(value))
            return tensors[id(value)]
        return value

    aside = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        torch.save(convert(contents), aside)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def import_state_dict(
    model: nnx.Module,
    state_dict: Mapping[str, Any],
    *,
    strict: bool = True,
    remake_heads: bool = True,
) -> nnx.Module:
    """Returns the network with the weights of its reference implementation.

    Args:
        model: a network from `tumorjax.models.create`; it stays as it is.
        state_dict: the reference's state_dict, torch tensors or arrays. Prefixes of DataParallel,
            torch.compile and a surrounding module are taken off.
        strict: refuse entries that are missing or that the network has no place for. Otherwise
            such parameters keep the model's values, and the log says which.
        remake_heads: let the classification heads keep the model's initial weights where only
            the number of classes differs, which the log says. Otherwise that is an error too.

    Raises:
        UserError: entries are missing, extra or of another shape (names and shapes are listed),
            or none fits: the weights are another network's. Raised before anything is loaded.
    """
    graph, state = nnx.split(model)
    flat = {
        ".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)
    }
    shapes = {name: tuple(variable.shape) for name, (_, variable) in flat.items()}
    keys = _keys(model, shapes)
    module = _module(model)
    transposed = _transposed(model)
    heads = module.torch_heads(shapes) if hasattr(module, "torch_heads") else set()
    repeated = _aliases(module, keys.values())
    known = {*keys.values(), *repeated, *_buffers(module, model)}
    found = _known_names(state_dict, known)

    fitting: set[str] = set()
    missing, misshapen, remade = [], [], []
    for name, key in keys.items():
        expected = _torch_shape(name, shapes[name], transposed)
        if key not in found:
            missing.append(f"{key} {list(expected)}")
            continue
        shape = tuple(found[key].shape)
        if shape == expected:
            fitting.add(name)
            continue
        if remake_heads and name in heads and _only_classes_differ(shape, expected):
            remade.append(f"{key} {list(expected)}, in the state_dict {list(shape)}")
            continue
        misshapen.append(f"{key} {list(shape)}, expected {list(expected)}")
    extra = [f"{key} {list(np.shape(found[key]))}" for key in found if key not in known]
    _refuse(model, missing if strict else [], extra if strict else [], misshapen)
    if not fitting:
        _refuse(model, missing, extra, [])
    if missing or extra:
        logging.warning(
            "%s keeps its initial weights where the state_dict has none: %s. Left out: %s",
            *(type(model).__name__, _listed(missing), _listed(extra)),
        )
    if remade:
        logging.warning(
            "%s has another number of classes than the state_dict: its heads are re-made, with"
            " initial weights: %s",
            *(type(model).__name__, _listed(remade)),
        )
    values = []
    for name, (path, variable) in flat.items():
        if name in fitting:
            value = _from_torch(name, _to_numpy(found[keys[name]]), transposed)
            variable = variable.replace(jnp.array(value, variable.dtype))
        values.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(values))


def export_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the weights as the reference implementation's state_dict, name for name.

    Returns:
        Key -> array as PyTorch lays it out. Keys that the reference repeats share their array.
    """
    values = {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.split(model)[1])
    }
    transposed = _transposed(model)
    keys = _keys(model, values)
    result = {}
    for name, variable in values.items():
        value = _to_torch(name, np.asarray(variable[...]), transposed)
        result[keys[name]] = np.ascontiguousarray(value)
    module = _module(model)
    for alias, key in _aliases(module, list(result)).items():
        result[alias] = result[key]
    return result | _buffers(module, model)


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError(
            "PyTorch is needed to read and write its checkpoints, and is not installed. Install"
            " tumorjax with its torch extra: pip install tumorjax[torch]"
        ) from None
    return torch


def _harmless_globals() -> list:
    """What nnU-Net's checkpoints need beyond tensors: numpy's numbers, in its logs of losses."""
    kinds = (np.bool_, *(np.dtype(code).type for code in "bhilqBHILQefdg"))
    # Not numpy's objects and records: only they can hold what is no number.
    dtypes = {type(np.dtype(kind)) for kind in kinds}
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    rebuild = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    return [
        *(np.dtype, np.ndarray, *kinds, *dtypes, bytes, slice, range, frozenset),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    ]


def _refusal(path: str, message: str) -> str:
    for pattern in (r"GLOBAL (\S+) was not an allowed", r"GLOBAL (\S+) whose module"):
        if match := re.search(pattern, message):
            return (
                f"{path} is refused: reading it would call {match[1]}, and a file of weights calls"
                " nothing. If you trust where it is from, load it with PyTorch and save its"
                " state_dict alone"
            )
    # PyTorch's advice and its addresses are about switching the check off.
    told = re.search(r"WeightsUnpickler error:\s*(.+)", message)
    reason = told[1] if told else message.split(". ")[0]
    return (
        f"{path} is refused: it is not only weights ({reason}). Expected tensors, numbers and text"
        " as torch.save writes them"
    )


def _find_weights(contents: Any) -> Mapping[str, Any] | None:
    if not isinstance(contents, Mapping) or not contents:
        return None
    if all(hasattr(value, "data_ptr") for value in contents.values()):
        return contents
    inner = (_find_weights(contents[key]) for key in WRAPPERS if key in contents)
    return next((weights for weights in inner if weights is not None), None)


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # numpy has no bfloat16.
        value = (value.float() if value.is_floating_point() else value).numpy()
    value = np.asarray(value)
    return value.astype(np.float32) if value.dtype.kind in "fV" else value


def _module(model: nnx.Module) -> ModuleType:
    module = sys.modules[type(model).__module__]
    if not hasattr(module, "torch_names"):
        raise UserError(f"{type(model).__name__} has no counterpart in PyTorch")
    return module


def _keys(model: nnx.Module, parameters: Mapping[str, Any]) -> dict[str, str]:
    module = _module(model)
    keys = dict(module.torch_names(parameters))
    if hasattr(module, "torch_renames"):
        keys |= module.torch_renames(model)
    return keys


def _aliases(module: ModuleType, keys: Iterable[str]) -> dict[str, str]:
    return module.torch_aliases(keys) if hasattr(module, "torch_aliases") else {}


def _buffers(module: ModuleType, model: nnx.Module) -> dict[str, np.ndarray]:
    return module.torch_buffers(model) if hasattr(module, "torch_buffers") else {}


def _transposed(model: nnx.Module) -> set[str]:
    """Returns the names of the kernels of transposed convolutions."""
    return {
        ".".join(map(str, (*path, "kernel")))
        for path, node in nnx.iter_graph(model)
        if getattr(node, "transposed", False) is True
    }


def _order(name: str, rank: int, transposed: set[str]) -> tuple[int, ...]:
    """Returns the axes of PyTorch's array in the order of ours."""
    if name.rsplit(".", 1)[-1] == "kernel" and rank == 5:
        return (2, 3, 4, 0, 1) if name in transposed else (2, 3, 4, 1, 0)
    if name.rsplit(".", 1)[-1] == "kernel" and rank == 2:
        return (1, 0)
    return tuple(range(rank))


def _from_torch(name: str, value: np.ndarray, transposed: set[str]) -> np.ndarray:
    return value.transpose(_order(name, value.ndim, transposed))


def _to_torch(name: str, value: np.ndarray, transposed: set[str]) -> np.ndarray:
    return value.transpose(np.argsort(_order(name, value.ndim, transposed)))


def _torch_shape(name: str, shape: tuple[int, ...], transposed: set[str]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in np.argsort(_order(name, len(shape), transposed)))


def _only_classes_differ(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    # In PyTorch's layout the classes of a head come first, whatever kind of weight it is.
    return len(shape) == len(expected) and shape[1:] == expected[1:]


def _known_names(state_dict: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Returns the entries under the network's own names, as far as prefixes hide them."""
    found = {}
    for key, value in state_dict.items():
        name = str(key)
        for candidate in _candidates(name):
            if candidate in known and (candidate == name or candidate not in state_dict):
                name = candidate
                break
        found[name] = value
    return found


def _candidates(name: str) -> Iterable[str]:
    yield name
    name = _WRAPPED.sub("", name)
    yield name
    while prefix := next((p for p in _OUTER if name.startswith(p)), None):
        name = name.removeprefix(prefix)
        yield name


def _refuse(model: nnx.Module, missing: list[str], extra: list[str], misshapen: list[str]) -> None:
    parts = [
        f"{kind}: {_listed(entries)}"
        for kind, entries in (
            ("missing", missing),
            ("of another shape", misshapen),
            ("extra", extra),
        )
        if entries
    ]
    if parts:
        raise UserError(
            f"the state_dict does not fit {type(model).__name__}; {'; '.join(parts)}. Choose the"
            " network and settings that the weights were trained with"
        )


def _listed(entries: list[str]) -> str:
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return ", ".join(entries[:_LISTED]) + more
