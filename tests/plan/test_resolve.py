"""From facts to a plan: cuts that lose nothing, and refusals that name the module, the values and the way out."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ds_seqpar
from ds_seqpar.errors import PlanError
from ds_seqpar.families import Family, family
from ds_seqpar.plan.cuts import Cut
from ds_seqpar.plan.facts import ModelFacts, ModuleFacts
from ds_seqpar.plan.model_plan import ModelPlan
from ds_seqpar.plan.resolve import resolve
from ds_seqpar.plan.styles import BlockKind, Style

PLAN = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


def _linear(out_features: int, in_features: int, *, bias: bool = False) -> ModuleFacts:
    shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
    return ModuleFacts("linear", "Linear", {**shapes, "bias": (out_features,)} if bias else shapes)


def _norm(width: int) -> ModuleFacts:
    return ModuleFacts("other", "RMSNorm", {"weight": (width,)})


def facts(
    *, n: int = 6, kv: int = 3, d: int = 8, h: int = 48, inner: int = 50, vocab: int = 101, **changes: Any
) -> ModelFacts:
    """A llama of two layers, with a bias on every attention projection."""
    modules = {"model.embed_tokens": ModuleFacts("embedding", "Embedding", {"weight": (vocab, h)})}
    for i in range(2):
        layer = f"model.layers.{i}"
        modules |= {
            f"{layer}.self_attn.q_proj": _linear(n * d, h, bias=True),
            f"{layer}.self_attn.k_proj": _linear(kv * d, h, bias=True),
            f"{layer}.self_attn.v_proj": _linear(kv * d, h, bias=True),
            f"{layer}.self_attn.o_proj": _linear(h, n * d, bias=True),
            f"{layer}.mlp.gate_proj": _linear(inner, h),
            f"{layer}.mlp.up_proj": _linear(inner, h),
            f"{layer}.mlp.down_proj": _linear(h, inner),
            f"{layer}.input_layernorm": _norm(h),
        }
    modules |= {"model.norm": _norm(h), "lm_head": _linear(vocab, h)}
    given = dict(
        model_type="by_hand", text_type="by_hand", data_file="by_hand", base="model", tp_plan=PLAN, modules=modules,
        embedding="model.embed_tokens", head="lm_head", num_heads=n, num_kv_heads=kv, head_dim=d, hidden_size=h,
    )  # fmt: skip
    return ModelFacts(**{**given, **changes})


def _with(base: ModelFacts, modules: dict[str, ModuleFacts | None]) -> ModelFacts:
    changed = {**base.modules, **modules}
    return replace(base, modules={name: module for name, module in changed.items() if module is not None})


def _indices(cut: Cut, rank: int) -> list[int]:
    return [i for start, stop in cut.ranges[rank] for i in range(start, stop)]


def _check_cut(cut: Cut, t: int, name: str) -> None:
    """Every index once; or, where ranks hold copies, every distinct part once."""
    assert len(cut.ranges) == t
    parts = [_indices(cut, rank) for rank in range(t)]
    assert all(part for part in parts), f"{name}: a rank holds nothing"
    distinct = {tuple(part) for part in parts}
    assert sorted(i for part in distinct for i in part) == list(range(cut.size)), name
    assert cut.copied == (len(distinct) < t)
    assert [cut.local_size(rank) for rank in range(t)] == [len(part) for part in parts]
    assert sum(cut.is_first_holder(rank) for rank in range(t)) == len(distinct), f"{name}: a part counts once in a norm"
    slots = [cut.slot(rank) for rank in range(t)]
    assert {count for _, count in slots} == {len(distinct)}
    assert len(set(slots)) == len(distinct)
    assert all((slots[a] == slots[b]) == (parts[a] == parts[b]) for a in range(t) for b in range(t))


def _check_plan(plan: ModelPlan, model: ModelFacts, t: int) -> None:
    for module in plan.modules.values():
        for parameter, cut in module.cuts.items():
            shape = model.modules[module.name].shapes[parameter]
            assert cut.size == shape[cut.dim], module.name
            _check_cut(cut, t, f"{module.name}.{parameter}")
            if not module.name.endswith(("k_proj", "v_proj")):
                assert not cut.copied, f"{module.name}: only kv heads are copied"
    placed = [*plan.modules, *plan.tokenwise, *plan.between, *plan.outside]
    assert sorted(placed) == sorted(model.modules), "every module that owns parameters has exactly one place"


@pytest.mark.parametrize("t", [1, 2, 3, 4, 6])
def test_cuts_cover_every_index_once(t: int) -> None:
    model = facts()
    plan = resolve(model, Family(), t)
    _check_plan(plan, model, t)
    assert plan.layers == ["model.layers.0", "model.layers.1"]
    attention, mlp = plan.blocks["model.layers.0.self_attn"], plan.blocks["model.layers.0.mlp"]
    assert [name.rpartition(".")[2] for name in attention.columns] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ] and attention.has_heads
    assert [name.rpartition(".")[2] for name in mlp.columns] == ["gate_proj", "up_proj"] and not mlp.has_heads
    assert mlp.rows == ["model.layers.0.mlp.down_proj"]
    assert plan.tokenwise == ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"]
    assert plan.between == ["model.norm"]


def test_projections_of_one_head_lie_on_one_rank_and_bias_follows_weight() -> None:
    for t in (2, 3, 4):
        plan = resolve(facts(), Family(), t)
        block = "model.layers.1.self_attn"
        q, k, v, o = (plan.modules[f"{block}.{name}_proj"] for name in "qkvo")
        assert q.cuts["weight"] == q.cuts["bias"] and k.cuts["weight"] == v.cuts["weight"] == k.cuts["bias"]
        assert q.cuts["weight"].ranges == o.cuts["weight"].ranges and (q.cuts["weight"].dim, o.cuts["weight"].dim) == (
            0,
            1,
        )
        assert set(o.cuts) == {"weight"}, "a row-parallel bias is added whole, once"
        heads = plan.blocks[block].heads
        assert heads is not None
        for rank in range(t):
            assert [i // 8 for i in _indices(q.cuts["weight"], rank)][::8] == list(range(*heads.queries[rank]))
            assert [i // 8 for i in _indices(k.cuts["weight"], rank)][::8] == list(range(*heads.kvs[rank]))
        gate, up, down = (plan.modules[f"model.layers.1.mlp.{name}_proj"] for name in ("gate", "up", "down"))
        assert gate.cuts["weight"].ranges == up.cuts["weight"].ranges == down.cuts["weight"].ranges


def test_kv_heads_are_copied_where_there_are_fewer_than_ranks() -> None:
    plan = resolve(facts(n=4, kv=1, d=12), Family(), 4)
    k, q = (
        plan.modules["model.layers.0.self_attn.k_proj"].cuts["weight"],
        plan.modules["model.layers.0.self_attn.q_proj"],
    )
    assert k.copied and k.ranges == (((0, 12),),) * 4 and not q.cuts["weight"].copied
    assert [k.is_first_holder(rank) for rank in range(4)] == [True, False, False, False]


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(1, 70), st.integers(1, 130), st.integers(1, 40)
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_sizes_give_a_whole_plan_or_a_plan_error(
    group: int, kv: int, d: int, inner: int, vocab: int, t: int
) -> None:
    n = group * kv
    model = facts(n=n, kv=kv, d=d, inner=inner, vocab=vocab)
    if t > min(n, inner, vocab):
        with pytest.raises(PlanError, match=f"tp_size={t}; use at most"):
            resolve(model, Family(), t)
        return
    _check_plan(resolve(model, Family(), t), model, t)


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_sizes_that_contradict_the_head_counts_are_never_cut(data: st.DataObject) -> None:
    name, shape = data.draw(
        st.sampled_from([("q_proj", (48, 48)), ("k_proj", (24, 48)), ("v_proj", (24, 48)), ("o_proj", (48, 48))])
    )
    size = data.draw(st.integers(1, 200))
    out, inner = (shape[0], size) if name == "o_proj" else (size, shape[1])
    model = _with(facts(), {f"model.layers.1.self_attn.{name}": _linear(out, inner)})
    heads = 3 if name in ("k_proj", "v_proj") else 6  # of any width: latent attention's differ in it
    if size % heads == 0:
        resolve(model, Family(), 2)
    else:
        with pytest.raises(PlanError, match=rf"layers\.1\.self_attn\.{name}: dimension . of size {size} .*head_dim=8"):
            resolve(model, Family(), 2)


def test_packed_weights_are_cut_section_by_section() -> None:
    """Phi-3's data file: q, k, v in one weight, gate and up in another."""
    modules = {
        "self_attn.qkv_proj": _linear(48 + 24 + 24, 48),
        "self_attn.o_proj": _linear(48, 48),
        "mlp.gate_up_proj": _linear(100, 48),
        "mlp.down_proj": _linear(48, 50),
    }
    base = facts(tp_plan={"model.layers.*.self_attn.o_proj": "rowwise", "model.layers.*.mlp.down_proj": "rowwise"})
    kept = {name: module for name, module in base.modules.items() if "layers" not in name}
    model = replace(base, modules=kept | {f"model.layers.0.{name}": module for name, module in modules.items()})
    for t in (1, 2, 3):
        _check_plan_packed(resolve(model, family("phi3"), t), t)
    with pytest.raises(PlanError, match=r"qkv_proj: 3 kv heads over tp_size=4 would be copied .*use tp_size <= 3"):
        resolve(model, family("phi3"), 4)
    assert resolve(model, family("phi3"), 2).modules["model.layers.0.self_attn.qkv_proj"].cuts["weight"].ranges == (
        ((0, 32), (48, 64), (72, 88)),
        ((32, 48), (64, 72), (88, 96)),
    )


def _check_plan_packed(plan: ModelPlan, t: int) -> None:
    qkv = plan.modules["model.layers.0.self_attn.qkv_proj"].cuts["weight"]
    assert {i for rank in range(t) for i in _indices(qkv, rank)} == set(range(96))
    gate_up = plan.modules["model.layers.0.mlp.gate_up_proj"].cuts["weight"]
    _check_cut(gate_up, t, "gate_up_proj")
    for rank in range(t):
        held = _indices(gate_up, rank)
        assert [i + 50 for i in held[: len(held) // 2]] == held[len(held) // 2 :], "up's rows are gate's rows"


def test_interleaved_qkv_is_cut_between_heads() -> None:
    """GPT-NeoX's data file: q, k, v of one head lie together."""
    base = facts(n=6, kv=6)
    kept = {name: module for name, module in base.modules.items() if "layers" not in name}
    block = {
        "attention.query_key_value": _linear(3 * 48, 48, bias=True),
        "attention.dense": _linear(48, 48),
        "mlp.gate_proj": _linear(50, 48),
        "mlp.down_proj": _linear(48, 50),
    }
    plan_words = {
        "attention.query_key_value": "colwise",
        "attention.dense": "rowwise",
        "mlp.gate_proj": "colwise",
        "mlp.down_proj": "rowwise",
    }
    model = replace(
        base,
        modules=kept | {f"model.layers.0.{name}": module for name, module in block.items()},
        tp_plan={f"model.layers.*.{name}": word for name, word in plan_words.items()},
    )
    plan = resolve(model, family("gpt_neox"), 4)
    cut = plan.modules["model.layers.0.attention.query_key_value"].cuts["weight"]
    assert cut.ranges == (((0, 48),), ((48, 96),), ((96, 120),), ((120, 144),))
    assert plan.modules["model.layers.0.attention.dense"].cuts["weight"].ranges == (
        ((0, 16),), ((16, 32),), ((32, 40),), ((40, 48),),
    )  # fmt: skip


def test_a_norm_over_all_heads_is_cut_with_them() -> None:
    norms = {f"model.layers.{i}.self_attn.{n}_norm": _norm(w) for i in range(2) for n, w in (("q", 48), ("k", 24))}
    plan = resolve(_with(facts(), norms), family("olmo2"), 2)
    assert plan.modules["model.layers.0.self_attn.q_norm"].style is Style.CUT_NORM
    assert plan.modules["model.layers.0.self_attn.q_norm"].cuts["weight"].ranges == (((0, 32),), ((32, 48),))
    assert plan.modules["model.layers.0.self_attn.k_norm"].cuts["weight"].ranges == (((0, 16),), ((16, 24),))


def test_a_tied_or_missing_head_and_modules_outside_the_base() -> None:
    plan = resolve(_with(facts(head=None), {"lm_head": None, "score": _linear(2, 48)}), Family(), 2)
    assert plan.outside == ["score"] and "lm_head" not in plan.modules
    assert plan.modules["model.embed_tokens"].cuts["weight"].ranges == (((0, 51),), ((51, 101),))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (facts(tp_plan={}), r"'by_hand' has no tp_plan"),
        (facts(tp_plan={**PLAN, "model.*.0.self_attn.q_proj": "colwise"}), r"layers\.0\.self_attn\.q_proj is matched by two"),
        (facts(tp_plan={**PLAN, "model.layers.*.mlp.up_proj": "sideways"}), r"mlp\.up_proj: style 'sideways' .*known styles: \['colwise'"),
        (facts(tp_plan={"model.decoder.*.q": "colwise"}), r"no pattern of the plan matches a module of this by_hand model"),
        (facts(tp_plan={**PLAN, "model.norm": "colwise"}), r"model\.norm: a planned module must stand in a block"),
        (facts(tp_plan={**PLAN, "model.layers.*.mlp.up_proj": "embedding_rowwise"}), r"up_proj: style 'embedding_rowwise' is known for"),
        (_with(facts(), {"model.layers.0.mlp.gate_proj": _norm(48)}), r"gate_proj: style 'colwise' needs an nn\.Linear, not RMSNorm"),
        (_with(facts(), {"model.layers.1": _norm(1)}), r"layer model\.layers\.1 itself owns parameters \['weight'\]"),
        (_with(facts(), {"lm_head": _norm(101)}), r"lm_head: the vocabulary can be cut in .*it is RMSNorm"),
        (_with(facts(), {"model.embed_tokens": _linear(101, 48)}), r"model\.embed_tokens: the vocabulary .*it is Linear"),
        (_with(facts(), {"lm_head": _linear(1, 48)}), r"lm_head: 1 features cannot be cut over tp_size=2; use at most 1"),
        (facts(n=3, kv=2), r"num_attention_heads=3 is not a multiple of num_key_value_heads=2"),
    ],
)  # fmt: skip
def test_refusals_name_the_module_and_the_values(model: ModelFacts, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve(model, Family(), 2)


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (
            {"gate_proj": "colwise", "down_proj": "rowwise"},
            r"layers\.0\.mlp\.up_proj \(Linear\) stands in the planned block model\.layers\.0\.mlp, but the plan does not say what becomes "
            r"of it; add it, or plan 'model\.layers\.\*\.mlp' as \"whole\"",
        ),
        (
            {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "colwise"},
            r"layers\.0\.mlp: a block needs column-parallel and row-parallel linears, the plan names \[.*down_proj'\] and \[\]",
        ),
    ],
)
def test_a_users_plan_that_forgets_a_linear_of_a_block_is_refused(users: dict[str, str], message: str) -> None:
    plan = {f"model.layers.*.mlp.{name}": style for name, style in users.items()}
    with pytest.raises(PlanError, match=message):
        resolve(facts(tp_plan={}), Family(), 2, plan)


def test_a_users_plan_of_a_whole_block_leaves_the_others_to_the_tp_plan() -> None:
    plan = resolve(facts(), Family(), 2, {"model.layers.*.mlp": "whole"})
    assert plan.blocks["model.layers.1.mlp"].kind is BlockKind.WHOLE
    assert plan.modules["model.layers.1.self_attn.q_proj"].style is Style.COLUMN


def test_a_data_file_overrules_the_tp_plan_and_is_held_to_the_same_rules() -> None:
    plan = resolve(facts(), Family(styles={"layers.*.mlp.up_proj": "packed_colwise"}), 2)
    up = plan.modules["model.layers.0.mlp.up_proj"]
    assert up.style is Style.PACKED_COLUMN and up.why == "data file of by_hand"
    with pytest.raises(PlanError, match=r"'model\.layers\.\*\.renamed' \(data file of by_hand\) matches no module"):
        resolve(facts(), Family(styles={"layers.*.renamed": "colwise"}), 2)


def test_families_and_plans_import_no_torch() -> None:
    root = Path(ds_seqpar.__file__).parent
    files = [*(root / "families").glob("*.py"), *(root / "plan").glob("*.py")]
    assert len(files) > 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            heavy = {"torch", "deepspeed", "transformers"} & {name.partition(".")[0] for name in names}
            assert not heavy, f"{file}: imports {heavy}"


def test_no_code_asks_for_a_model_type() -> None:
    """What is particular about a type is data, in families/."""
    root = Path(ds_seqpar.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            names = {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
            texts = [
                c for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant) and isinstance(c.value, str)
            ]
            assert not ("model_type" in names and texts), f"{file}, line {node.lineno}: asks for a model type"


def test_a_family_file_is_data() -> None:
    """No functions, classes or branches: assignments of literals."""
    root = Path(ds_seqpar.__file__).parent / "families"
    for file in root.glob("*.py"):
        if file.name in ("__init__.py", "relatives.py"):  # what reads them, and who shares one
            continue
        assert len(file.read_text().splitlines()) <= 60, f"{file.name} is long for a data file"
        _, *body = ast.parse(file.read_text()).body
        for node in body:
            assert isinstance(node, ast.Assign), f"{file.name}, line {node.lineno}: not an assignment"
            ast.literal_eval(node.value)
            assert next(t.id for t in node.targets if isinstance(t, ast.Name)) in (
                "STYLES",
                "ROLES",
                "ATTRIBUTES",
                "LAYER_PARAMETERS",
                "TOKEN_INPUTS",
                "SETTINGS",
                "PADS",
                "REPEATS_STATES",
                "LIKE",
                "HEAD_INPUTS",
                "BLOCKS",
                "OPTIONAL",
                "STACKS",
                "STATES",
                "BASE",
                "REFUSED",
            )


def test_a_model_type_that_is_no_module_name_has_no_data_file() -> None:
    for name in ("llama", "no-such", "../config", "", "os.path", "styles"):
        assert family(name) == Family()


@pytest.mark.parametrize(
    ("name", "style", "message"),
    [
        ("self_attn.k_proj", "rowwise", r"k_proj reads the block's whole input: 'colwise'"),
        ("self_attn.v_proj", "mla_kv_a_proj", r"v_proj reads the block's whole input"),
        ("mlp.down_proj", "mla_kv_a_proj", r"a block needs column-parallel and row-parallel linears"),
        ("mlp.up_proj", "packed_colwise:even,even", r"up_proj and .*gate_proj must be cut in the same places"),
        ("self_attn.v_proj", "packed_colwise:kv,kv", r"v_proj"),
    ],
)
def test_a_users_style_that_would_tear_a_block_is_refused(name: str, style: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve(facts(kv=4, n=8, h=64, inner=52), Family(), 2, {f"model.layers.*.{name}": style})


def test_a_plan_that_divides_nothing_in_the_layers_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'by_hand': its plan, model\.embed_tokens, names no module of a layer of"):
        resolve(facts(tp_plan={"model.embed_tokens": "embedding_rowwise"}), Family(), 2)
    users = {
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    assert resolve(facts(tp_plan={}), Family(), 2, users).layers
