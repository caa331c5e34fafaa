"""The config: what is merged, what is refused and in which words, and every YAML of the repository."""

import dataclasses
from pathlib import Path

import pytest

from qformer.config import (
    ConfigError,
    Stage1Config,
    Stage2Config,
    from_values,
    load_config,
    named_stage,
    parse_arguments,
    read_config,
    to_yaml,
)
from qformer.config.help import EXAMPLES, describe_schema

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NEEDED = [
    "run.dir=runs/x", "data.train=[a.jsonl]", "encoder.loader=open_clip", "encoder.id=ViT-B-32",
    "train.max_steps=100", "train.global_batch_size=8", "train.micro_batch_size=4", "optim.warmup_steps=10",
]  # fmt: skip
ROOTS = {"stage1": (Stage1Config, NEEDED), "stage2": (Stage2Config, [*NEEDED, "llm.id=facebook/opt-125m"])}
each_root = pytest.mark.parametrize(("root", "needed"), ROOTS.values(), ids=ROOTS)


def refused(*arguments: str, root=Stage1Config, base=NEEDED) -> str:
    with pytest.raises(ConfigError) as found:
        load_config(root, [*base, *arguments])
    assert "\n" not in str(found.value)
    return str(found.value)


# ---- merging ----


def test_later_arguments_win_and_files_and_overrides_mix(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yml"
    first.write_text("optim: {lr: 1.0e-3, weight_decay: 0.1}\n")
    second.write_text("optim:\n  lr: 2.0e-3\n")
    config = load_config(Stage1Config, [*NEEDED, "optim.lr=5", str(first), str(second)])
    assert (config.optim.lr, config.optim.weight_decay) == (2e-3, 0.1)
    assert load_config(Stage1Config, [*NEEDED, str(first), "optim.lr=2e-4"]).optim.lr == 2e-4


def test_what_comes_out_is_plain(tmp_path):
    config = load_config(
        Stage1Config, [*NEEDED, "optim.betas=[0.8,0.9]", "train.resume=auto", "qformer.init_from=null"]
    )
    assert type(config) is Stage1Config
    assert type(config.optim.betas) is list
    assert (config.train.resume, config.qformer.init_from, config.train.max_steps) == ("auto", None, 100)
    assert config.data.train == ["a.jsonl"]


def test_two_configs_share_nothing():
    one, two = (load_config(Stage1Config, NEEDED) for _ in range(2))
    one.data.train.append("b")
    one.optim.betas[0] = 0.0
    assert two.data.train == ["a.jsonl"]
    assert Stage1Config().optim.betas == two.optim.betas == [0.9, 0.98]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("optim.learning_rate=1", "optim.lr|optim.warmup_lr|optim"),
        ("optim.wieght_decay=1", "optim.weight_decay"),
        ("train.micro_batchsize=4", "train.micro_batch_size"),
        ("opitm.clip_norm=1", "optim.clip_norm"),
        ("optim.lr.x=1", "optim.lr"),
    ],
)
def test_an_unknown_key_names_the_nearest(argument, nearest):
    message = refused(argument)
    key = argument.split("=")[0]
    assert message.startswith(f"unknown key {key} in {argument}; nearest is ")
    assert message.rpartition(" ")[2] in nearest.split("|") or "learning_rate" in key


def test_an_unknown_key_of_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("qformer: {widht: 64}\n")
    assert refused(str(path)) == f"unknown key qformer.widht in {path}; nearest is qformer.width"


def test_a_key_of_the_other_stage_is_unknown():
    assert refused("llm.id=x").startswith("unknown key llm.id in llm.id=x")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.max_steps=many", ["train.max_steps", "'many'", "is not int"]),
        ("train.max_steps=1e5", ["train.max_steps", "100000.0", "is not int"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "is not float"]),
        ("data.augment=perhaps", ["data.augment", "'perhaps'", "is not bool"]),
        ("encoder.width=wide", ["encoder.width", "'wide'", "is not int | None"]),
        ("data.weights=many", ["data.weights", "'many'", "is not list"]),
        ("train=3", ["train", "3", "is not a section"]),
        ("data=[5]", ["data", "[5]", "is not a section"]),
        ("train.max_steps=null", ["train.max_steps", "None", "is not int"]),
    ],
)
def test_a_wrong_type_names_key_value_and_type(argument, words):
    message = refused(argument)
    assert all(word in message for word in words), message


def test_all_missing_values_are_named_at_once():
    message = refused(base=["train.max_steps=5"])
    assert message.startswith("missing values: data.train (record files")
    for key in ("run.dir", "encoder.loader", "train.global_batch_size", "train.micro_batch_size"):
        assert f"{key} (" in message
    assert message.endswith("Set in a YAML file or as key=value")
    assert "llm.id (hub id or folder" in refused(base=[], root=Stage2Config)
    assert refused(base=[a for a in NEEDED if "run.dir" not in a]).startswith("missing value: run.dir (folder of this")


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "eva_g.yaml").write_text("")
    assert refused(str(tmp_path / "eva-g.yaml")) == (
        f"no config file {tmp_path / 'eva-g.yaml'}; nearest is {tmp_path / 'eva_g.yaml'}"
    )
    assert refused("nowhere/at_all.yaml") == "no config file nowhere/at_all.yaml"


def test_a_misspelt_folder_names_the_file_beside_it(tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/eva_g.yaml").write_text("")
    assert refused(str(tmp_path / "enocder/eva_g.yaml")).endswith(f"nearest is {tmp_path / 'encoder/eva_g.yaml'}")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("data.train=[a", "data.train=[a: the value is not valid YAML; a list is written [a, b]"),
        ("run.dir=${nope}", "run.dir: Interpolation key 'nope' not found"),
        ("optim.clip_norm=-1", "optim.clip_norm: -1.0 must be above 0"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(argument, said):
    assert refused(argument) == said


def test_a_missing_record_file_is_told_before_anything_loads(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("")
    arguments = [*NEEDED, f"data.train=[{tmp_path}/train.jsonl:small, {tmp_path}/trian.jsonl]"]
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Stage1Config, "", arguments)
    assert stopped.value.code == 2
    said = f"data.train: there is no record file {tmp_path}/trian.jsonl; nearest is {tmp_path}/train.jsonl\n"
    assert capsys.readouterr().err == f"config error: {said}"


def test_a_file_that_is_no_yaml_or_no_mapping(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1\nb: }\n")
    assert f"{path} is not valid YAML" in refused(str(path))
    path.write_text("- a\n- b\n")
    assert refused(str(path)) == f"{path} must hold keys and values at its top"


@pytest.mark.parametrize("argument", ["train.cpu", "stage1", "x"])
def test_a_bare_argument_is_refused(argument):  # OmegaConf alone would take `a.b` for `a.b=null`
    assert refused(argument) == f"{argument!r} is neither a .yaml file nor key=value"


def test_an_option_is_refused():
    assert refused("--max-steps=5") == "unknown option --max-steps=5; options are --help and --print-config"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("encoder.loader=openclip", "encoder.loader: 'openclip' is not one of open_clip, timm, transformers, features"),
        ("train.mixed_precision=fp8", "train.mixed_precision: 'fp8' is not one of no, bf16, fp16"),
        ("encoder.dtype=float64", "encoder.dtype: 'float64' is not one of float32, bfloat16, float16"),
        ("train.global_batch_size=9", "train.global_batch_size: 9 must be a multiple of train.micro_batch_size (4)"),
        ("train.micro_batch_size=0", "train.micro_batch_size: 0 must be at least 1"),
        ("train.max_steps=0", "train.max_steps: 0 must be at least 1"),
        ("optim.warmup_steps=101", "optim.warmup_steps: 101 is outside 0 to train.max_steps (100)"),
        ("qformer.heads=5", "qformer.width: 768 must be a multiple of qformer.heads (5)"),
        ("optim.betas=[0.9]", "optim.betas: [0.9] must hold two numbers"),
        ("encoder.loader=features", "encoder.width: missing; encoder.loader=features needs the width"),
        ("encoder.id=''", "encoder.id: missing; it names the frozen encoder"),
    ],
)
def test_a_value_out_of_range(argument, words):
    assert words in refused(argument)


def test_all_values_out_of_range_are_named_at_once():
    message = refused("train.global_batch_size=9", "qformer.heads=5")
    assert "train.global_batch_size" in message
    assert "qformer.width" in message


def test_no_is_a_choice_and_not_false(tmp_path):  # YAML reads a bare `no` as false
    (tmp_path / "a.yaml").write_text("train: {mixed_precision: no}")
    for argument in ("train.mixed_precision=no", "train.mixed_precision=off", str(tmp_path / "a.yaml")):
        assert load_config(Stage1Config, [*NEEDED, argument]).train.mixed_precision == "no"


# ---- the command line ----


@each_root
def test_help_shows_every_key_with_its_meaning(root, needed, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(root, "Stage.\n\naccelerate launch it", ["--help"])
    shown = capsys.readouterr()
    assert stopped.value.code == 0
    assert shown.err == ""
    assert shown.out.startswith("Stage.\n\naccelerate launch it\n\nusage: ")
    for unit in ("side in pixels", "optimizer updates", "records per step", "tokens of a caption"):
        assert unit in shown.out
    assert "train.mixed_precision                no " in shown.out
    assert "run.dir                              required" in shown.out
    assert "[no, bf16, fp16]" in shown.out


@each_root
def test_every_key_has_a_meaning(root, needed):
    lines = describe_schema(root).splitlines()
    for section in (f for f in dataclasses.fields(root) if f.name != "stage"):
        for key in dataclasses.fields(section.type):
            assert len(key.metadata["help"]) > 5, key.name
            assert sum(line.split()[:1] == [f"{section.name}.{key.name}"] for line in lines) == 1


@each_root
def test_help_stands_by_section_in_lines_of_100_columns_with_examples_that_load(root, needed):
    sections = describe_schema(root).split("\n\n")
    assert [text.partition(":")[0] for text in sections] == [
        f.name for f in dataclasses.fields(root) if dataclasses.is_dataclass(f.type)
    ]
    assert max(len(line) for text in sections for line in text.splitlines()) <= 100
    examples = {k: v for k, v in EXAMPLES.items() if f"  {k} " in describe_schema(root)}
    assert len(examples) > 20
    load_config(root, [*needed, "data.train=[a,b]", *(f"{k}={v}" for k, v in examples.items() if k != "data.train")])


def test_no_argument_is_a_mistake_that_shows_the_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Stage1Config, "Stage 1.", [])
    assert stopped.value.code == 2
    assert "optim.lr" in capsys.readouterr().out


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Stage1Config, "Stage 1.", [*NEEDED, "optim.lrr=1"])
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out) == (2, "")
    assert shown.err == "config error: unknown key optim.lrr in optim.lrr=1; nearest is optim.lr\n"


@each_root
def test_print_config_round_trips(root, needed, capsys, tmp_path):
    arguments = [*needed, "optim.lr=3e-4", "train.resume=auto"]
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(root, "Stage.", [*arguments, "--print-config"])
    assert stopped.value.code == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(root, [str(path)]) == load_config(root, arguments) == read_config(tmp_path, root)


# ---- kept configs ----


@each_root
def test_a_kept_config_is_read_as_its_own_root(root, needed, tmp_path):
    config = load_config(root, needed)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path, root) == config
    assert from_values(root, dataclasses.asdict(config), "config.yaml") == config
    assert type(from_values(root, dataclasses.asdict(config), "config.yaml")) is root


def test_a_kept_config_of_a_newer_version_names_the_key(tmp_path):
    values = dataclasses.asdict(load_config(Stage1Config, NEEDED))
    values["qformer"]["rotary"] = True
    with pytest.raises(ConfigError, match=r"unknown key qformer\.rotary in config\.yaml"):
        from_values(Stage1Config, values, "config.yaml")


# ---- the repository's own ----


FRAGMENTS = sorted(  # accelerate/ is for `accelerate launch`, tasks/ for evaluate.py (tests/test_protocols.py)
    name
    for p in CONFIGS.rglob("*.yaml")
    if not (name := p.relative_to(CONFIGS).as_posix()).startswith(("accelerate/", "tasks/"))
)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_every_yaml_loads_with_its_root(name):
    values = [a for a in NEEDED if a.split(".")[0] in ("run", "data", "encoder")] + ["encoder.width=8"]
    path = str(CONFIGS / name)
    stages = {"stage1": [1], "stage2": [2], None: [2] if name.startswith("llm/") else [1, 2]}
    roots = stages[named_stage([path])]
    for stage in roots:
        root = Stage1Config if stage == 1 else Stage2Config
        arguments = ["run.dir=runs/x", path]
        if not name.startswith("shapes/"):
            arguments = [*values, *(["llm.id=x"] if stage == 2 else []), str(CONFIGS / f"stage{stage}.yaml"), path]
        config = load_config(root, arguments)
        assert config.train.max_steps > 1
    assert (CONFIGS / name).read_text().startswith("# "), "a YAML begins with what it is"


def test_there_is_a_yaml_of_each_kind():
    kinds = {name.split("/")[0] for name in FRAGMENTS}
    assert kinds >= {"encoder", "llm", "qformer", "data", "shapes", "stage1.yaml", "stage2.yaml"}
