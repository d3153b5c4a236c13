"""Which keys of config.json a piece of installed code reads: a walk over its syntax tree, nothing is run.

    reads(roots=[LlamaForCausalLM], packages=("transformers.models.llama",))
    {"hidden_size": {REQUIRED}, "head_dim": {"None", ...}, "rope_parameters.factor": {REQUIRED}, ...}

The values are the defaults, as they stand in the source; `REQUIRED` where a key must be there.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Iterable
from types import FunctionType, ModuleType

REQUIRED = "no default"

Reads = dict[str, set[str]]
Code = type | FunctionType

# What code calls the content of config.json, and its rotary part.
CONFIGS = {
    "config",
    "cfg",
    "hf_config",
    "hf_text_config",
    "text_config",
    "effective_config",
    "decoder_config",
    "layer_config",
}
ROPE = {"rope_parameters", "rope_parameters_dict", "rp", "rope_scaling"}


def reads(
    roots: Iterable[Code | ModuleType],
    packages: tuple[str, ...] = (),
    configs: set[str] = CONFIGS,
    follow_defaults: bool = False,
) -> Reads:
    """The keys that `roots` read, and whatever of `packages` they name, directly or not.

    Args:
        roots: classes, functions, or modules for all that they define.
        packages: names with which the module of a class or function has to begin to be followed.
        configs: what the code calls the content of config.json.
        follow_defaults: also what stands as the default of a parameter, e.g. `layer_type=LlamaDecoderLayer`.
    """
    found: Reads = {}
    waiting = [code for root in roots for code in (_defined_in(root) if isinstance(root, ModuleType) else [root])]
    seen: set[Code] = set()
    while waiting:
        code = waiting.pop()
        if code in seen:
            continue
        seen.add(code)
        named = list(code.__mro__[1:]) if isinstance(code, type) else []
        module = sys.modules[code.__module__]
        if code.__name__ in _syntax_trees(module):  # a class that type() made has none, but its bases have
            visitor = _Visitor(found, vars(module), configs, follow_defaults)
            visitor.visit(_syntax_trees(module)[code.__name__])
            named += visitor.named
        waiting += [other for other in named if other.__module__.startswith(packages)]
    return found


@functools.cache
def _syntax_trees(module: ModuleType) -> dict[str, ast.AST]:
    """The classes and functions of a module by name."""
    tree = ast.parse(inspect.getsource(module))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def _defined_in(module: ModuleType) -> list[Code]:
    members = vars(module).values()
    return [m for m in members if isinstance(m, type | FunctionType) and m.__module__ == module.__name__]


class _Visitor(ast.NodeVisitor):
    """Collects keys into `found`, and the classes and functions that the code names."""

    def __init__(self, found: Reads, names: dict, configs: set[str], follow_defaults: bool) -> None:
        self.named: list[Code] = []
        self._found, self._names, self._configs, self._follow_defaults = found, names, configs, follow_defaults
        self._strings: dict[str, list[str]] = {}  # variables that hold lists of strings

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for child in node.body:
            self.visit(child)
        if self._follow_defaults:
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                self.visit(default)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:  # the annotation reads nothing
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if (strings := _strings(node.value)) and isinstance(node.targets[0], ast.Name):
            self._strings[node.targets[0].id] = strings
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        named = self._names.get(node.id)
        if isinstance(named, type | FunctionType):
            self.named.append(inspect.unwrap(named))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and _name(node.value) in self._configs:
            self._add(node.attr)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Load) and _name(node.value) in ROPE:
            for key in _strings(node.slice):
                self._add(f"rope_parameters.{key}")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if isinstance(node.ops[0], ast.In | ast.NotIn) and _name(node.comparators[0]) in ROPE:
            for key in _strings(node.left):
                self._add(f"rope_parameters.{key}", "absent")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """`... for k, v in rope_parameters.items() if k in ("mscale", ...)` passes on what is there."""
        if isinstance(node.iter, ast.Call) and _name(getattr(node.iter.func, "value", node.iter)) in ROPE:
            for condition in node.ifs:
                for key in _strings(getattr(condition, "comparators", [condition])[0]):
                    self._add(f"rope_parameters.{key}", "absent")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name, arguments = _name(node.func), node.args
        if name == "isinstance":  # what is only looked for is not used
            self.visit(arguments[0])
            return
        if name in ("getattr", "hasattr", "getattr_iter") and _name(arguments[0]) in self._configs:
            default = ast.unparse(arguments[2]) if len(arguments) > 2 else "absent"
            for key in _strings(arguments[1]) or self._strings.get(_name(arguments[1]), []):
                self._add(key, default)
        elif isinstance(node.func, ast.Attribute) and name == "get" and _name(node.func.value) in ROPE:
            for key in _strings(arguments[0]):
                self._add(f"rope_parameters.{key}", ast.unparse(arguments[1]) if len(arguments) > 1 else "None")
        if isinstance(node.func, ast.Attribute) and _name(node.func.value) in self._configs:  # a method is no key
            for child in (*arguments, *node.keywords):
                self.visit(child)
        else:
            self.generic_visit(node)

    def _add(self, key: str, default: str = REQUIRED) -> None:
        if not key.startswith("_"):
            self._found.setdefault(key, set()).add(default)


def _name(node: ast.AST) -> str:
    """`config` of `config` and of `self.config`; "" for anything else."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _strings(node: ast.AST) -> list[str]:
    nodes = node.elts if isinstance(node, ast.List | ast.Tuple | ast.Set) else [node]
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
