"""Every key is read outside of configs/, by its full name: `train.steps`, not any `steps`.

Annotations of parameters, fields and returned values say what an expression is; from there it is
followed through attributes, assignments, constructors and calls. A read that cannot be followed
does not count: the test then asks for an annotation.
"""

import ast
import collections
import dataclasses
from pathlib import Path

import pytest

import puna
from puna.configs import schema
from puna.models.parallel import sharding

ROOT = Path(puna.__file__).resolve().parent
OUTSIDE = ("models", "train", "eval")


def sections(cls=schema.Config, prefix=""):
    """Yield (class, prefix of its keys) for every section of the schema."""
    yield cls, prefix
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default_factory):
            yield from sections(field.default_factory, f"{prefix}{field.name}.")


def keys_read(sources: dict[str, str]) -> set[str]:
    """The full names of the keys that some modules read, by their texts."""
    followed = Follow()
    trees = {name: ast.parse(text) for name, text in sources.items()}
    before = -1
    while before != followed.facts():
        before = followed.facts()
        for name, tree in trees.items():
            followed.module = name
            followed.visit(tree)
    prefixes = {cls.__name__: prefix for cls, prefix in sections()}
    names = {prefixes[cls] + name for cls, name in followed.reads if cls in prefixes}
    return names & {key for key, *_ in schema.keys()}


class Follow(ast.NodeVisitor):
    """Walks modules and notes (class, attribute) for each attribute read of what is known.

    Types are sets of class names. What one walk learns of fields and parameters, the next uses.
    """

    def __init__(self):
        self.module, self.owner = "", ""
        self.scope = collections.ChainMap()
        self.reads = set()
        self.fields = collections.defaultdict(set)  # (class, attribute)
        self.returns = collections.defaultdict(set)  # function
        self.given = collections.defaultdict(set)  # (module, function, parameter), from its calls
        self.parameters = {}  # (module, function)
        self.bases = collections.defaultdict(set)
        for cls, _ in sections():
            self.bases[cls.__name__] = set()
            for field in dataclasses.fields(cls):
                if dataclasses.is_dataclass(field.default_factory):
                    self.fields[cls.__name__, field.name] = {field.default_factory.__name__}

    def facts(self) -> int:
        known = (self.fields, self.returns, self.given, self.bases)
        return len(self.reads) + sum(len(v) for table in known for v in table.values())

    def annotated(self, node) -> set[str]:
        """The classes that an annotation names: `C`, `module.C`, `"C"`, `C | D`."""
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return {name}
            case ast.Constant(value=str(text)):
                return self.annotated(ast.parse(text, mode="eval").body)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.annotated(left) | self.annotated(right)
        return set()

    def type(self, node) -> set[str]:
        """The classes that the value of an expression may have, as far as is known."""
        match node:
            case ast.Name(id=name):
                return self.scope.get(name, set())
            case ast.Attribute(value=value, attr=name):
                owners = self.type(value)
                for owner in list(owners):
                    owners = owners | self.bases[owner]
                self.reads |= {(owner, name) for owner in owners}
                return set().union(*(self.fields[owner, name] for owner in owners))
            case ast.IfExp(body=a, orelse=b):
                return self.type(a) | self.type(b)
            case ast.BoolOp(values=values):
                return set().union(*map(self.type, values))
            case ast.NamedExpr(value=value):
                return self.type(value)
            case ast.Call():
                return self.returned(node)
        return set()

    def returned(self, call) -> set[str]:
        [name] = self.annotated(call.func) or [""]
        if name in ("from_dict", "build"):
            return {"Config"} if len(call.args) == 1 else self.annotated(call.args[1])
        if name == "replace" and call.args:
            return self.type(call.args[0])
        return {name} if name in self.bases else self.returns[name]

    def bind(self, target, types):
        match target:
            case ast.Name(id=name):
                self.scope[name] = types
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                self.fields[self.owner, name] |= types

    def visit_ClassDef(self, node):
        self.bases[node.name] |= set().union(*map(self.annotated, node.bases))
        outer, self.owner = self.owner, node.name
        for line in node.body:
            if isinstance(line, ast.AnnAssign):
                self.fields[self.owner, line.target.id] |= self.annotated(line.annotation)
        self.generic_visit(node)
        self.owner = outer

    def visit_FunctionDef(self, node):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.parameters[self.module, node.name] = [a.arg for a in arguments]
        returns = self.annotated(node.returns)
        self.returns[node.name] |= returns
        if any("property" in ast.unparse(d) for d in node.decorator_list):
            self.fields[self.owner, node.name] |= returns
        self.scope = self.scope.new_child()
        for a in arguments:
            types = self.annotated(a.annotation) or self.given[self.module, node.name, a.arg]
            self.scope[a.arg] = {self.owner} if a.arg == "self" else types
        self.generic_visit(node)
        self.scope = self.scope.parents

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=False)
            for name, value in list(pairs):
                self.bind(name, self.type(value))

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        self.bind(node.target, self.annotated(node.annotation))

    def visit_NamedExpr(self, node):
        self.generic_visit(node)
        self.bind(node.target, self.type(node.value))

    def visit_For(self, node):
        if isinstance(node.iter, ast.Tuple):
            self.bind(node.target, set().union(*map(self.type, node.iter.elts)))
        self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name):
            name = node.func.id
            parameters = self.parameters.get((self.module, name), [])
            for parameter, value in [
                *zip(parameters, node.args, strict=False),
                *((k.arg, k.value) for k in node.keywords),
            ]:
                self.given[self.module, name, parameter] |= self.type(value)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load):
            self.type(node)
        self.generic_visit(node)


def test_every_schema_field_is_read_outside_configs():
    paths = [ROOT / "__main__.py", *(p for f in OUTSIDE for p in (ROOT / f).rglob("*.py"))]
    read = keys_read({str(path): path.read_text(encoding="utf-8") for path in paths})
    # The mesh section is read as a whole, field by field: a field there is an axis.
    axes = {f"mesh.{axis}" for axis in sharding.AXES}
    unread = [key for key, *_ in schema.keys() if key not in axes | read]
    assert not unread, f"no module reads these keys, or the reader lacks an annotation: {unread}"


HEAD = (
    "from puna.configs.schema import Config\n"
    "from puna.configs.architecture import ModelConfig, AudioConfig, VisionConfig\n"
)


@pytest.mark.parametrize(
    ("code", "keys"),
    [
        ("def f(c: schema.Config): return c.train.steps", {"train.steps"}),
        ("def f(c: 'Config | None'): return c.model.vision.mlp_dim", {"model.vision.mlp_dim"}),
        ("def f(m: ModelConfig): return m.vision.mlp_dim", {"model.vision.mlp_dim"}),
        ("def f(c: Config):\n  o, n = c.optimizer, c.train.steps\n  return o.b1",
         {"optimizer.b1", "train.steps"}),
        ("def f(c: Config):\n  o = c.optimizer\n  def g(): return o.b2\n  return g",
         {"optimizer.b2"}),
        ("class A:\n  c: Config\n  def f(self): return self.c.eval.max_rows", {"eval.max_rows"}),
        ("class A:\n  def __init__(self, c: Config): self._e = c.eval\n"
         "  @property\n  def f(self): return self._e.max_rows", {"eval.max_rows"}),
        ("class A:\n  c: Config\nclass B(A): ...\ndef f(b: B): return b.c.train.keep",
         {"train.keep"}),
        ("def f(c: Config): return _g(1, c.train)\ndef _g(x, t): return t.keep", {"train.keep"}),
        ("def f(c: Config): return _g(t=c.train)\ndef _g(x=1, t=None): return t.keep",
         {"train.keep"}),
        ("def g() -> ModelConfig: ...\ndef f(): return g().mlp_dim", {"model.mlp_dim"}),
        ("def f(x): return schema.from_dict(x).train.keep", {"train.keep"}),
        ("def f(x): return from_dict(x, schema.MeshConfig, '').fsdp", {"mesh.fsdp"}),
        ("def f(c: Config): return dataclasses.replace(c, a=1).train.keep", {"train.keep"}),
        ("def f(e: VisionConfig | AudioConfig): return e.mlp_dim",
         {"model.vision.mlp_dim", "model.audio.mlp_dim"}),
        ("def f(m: ModelConfig):\n  for e in (m.vision, m.audio):\n    e.mlp_dim",
         {"model.vision.mlp_dim", "model.audio.mlp_dim"}),
        ("def f(a: VisionConfig, b: ModelConfig): return (a if b.qk_norm else b).mlp_dim",
         {"model.vision.mlp_dim", "model.mlp_dim", "model.qk_norm"}),
        # Another thing of the same name, or of another section, vouches for nothing.
        ("def f(path, c: Config): return path.name, path.steps, c.optimizer.b1",
         {"optimizer.b1"}),
        ("def f(c: Config): return c.eval.batch_size", {"eval.batch_size"}),
        ("def f(c): return c.train.steps", set()),
        ("def f(c: Config): c.train.steps = 1", set()),
        ("def f(c: Config): return replace(c, steps=1)", set()),
        ("def f(c: Config):\n  c = open(c)\n  return c.train.steps", set()),
    ],
)  # fmt: skip
def test_what_counts_as_a_read(code, keys):
    assert keys_read({"module": HEAD + code}) == keys


def test_a_read_across_modules():
    sources = {
        "a": HEAD + "def f(loop: Loop): return loop.config.train.keep",
        "b": HEAD + "class Loop:\n  def __init__(self, c: Config): self.config = c",
    }
    assert keys_read(sources) == {"train.keep"}
