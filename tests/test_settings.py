"""Settings: every layer, its precedence, and the message for every mistake."""

import pytest

from mlx_turboquant_plugin.rules import folder_and_size, one_of, share_of, size_of
from mlx_turboquant_plugin.settings import (
    PRESETS,
    ModelIdentity,
    Settings,
    SettingsError,
    load,
)

QWEN = ModelIdentity("qwen2", "/models/qwen2-zoo", None)
LLAMA = ModelIdentity("llama", None, "mlx-community/Llama-3-8B-4bit")


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "settings.toml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults():
    configuration = load({})
    assert not configuration.enabled
    assert configuration.general == Settings()
    assert configuration.general.source("key_bits") == "default"
    defaults = {name: getattr(Settings(), name) for name in PRESETS["default"]}
    assert defaults == PRESETS["default"]


@pytest.mark.parametrize("value, enabled", [("1", True), ("0", False), ("", False)])
def test_the_switch(value, enabled):
    assert load({"TURBOQUANT": value}).enabled is enabled


@pytest.mark.parametrize(
    "variable, text, name, value",
    [
        ("TURBOQUANT_PRESET", "small", "preset", "small"),
        ("TURBOQUANT_KEY_BITS", "2", "key_bits", 2),
        ("TURBOQUANT_VALUE_BITS", "4", "value_bits", 4),
        ("TURBOQUANT_KEY_CODEC", "affine", "key_codec", "affine"),
        ("TURBOQUANT_VALUE_CODEC", "affine", "value_codec", "affine"),
        ("TURBOQUANT_WINDOW", "4096", "window", 4096),
        ("TURBOQUANT_SINKS", "0", "sinks", 0),
        ("TURBOQUANT_BALANCE", "0", "balance", False),
        ("TURBOQUANT_INVARIANT", "1", "invariant", True),
        ("TURBOQUANT_KERNEL", "eager", "kernel", "eager"),
        ("TURBOQUANT_BYPASS", "bridge", "bypass", "bridge"),
        ("TURBOQUANT_BYPASS", "none", "bypass", None),
        ("TURBOQUANT_OPT_OUT", "qwen*, /models/x ,", "opt_out", ("qwen*", "/models/x")),
        ("TURBOQUANT_LOG", "debug", "log", "DEBUG"),
        ("TURBOQUANT_MEMORY_BUDGET", "6 gb", "memory_budget", "6 gb"),
        ("TURBOQUANT_MEMORY_BUDGET", "None", "memory_budget", None),
        ("TURBOQUANT_DISK_CACHE", "~/x:20GB", "disk_cache", "~/x:20GB"),
    ],
)
def test_every_variable(variable, text, name, value):
    settings = load({variable: text}).general
    assert getattr(settings, name) == value
    assert settings.source(name) == f"environment {variable}"


def test_an_empty_variable_counts_as_unset():
    assert load({"TURBOQUANT_KEY_BITS": "", "TURBOQUANT_CONFIG": ""}) == load({})


@pytest.mark.parametrize(
    "environ, parts",
    [
        ({"TURBOQUANT": "true"}, ["TURBOQUANT is 'true'", "1 (on) or 0 (off)", "unset"]),
        ({"TURBOQUANT_KEY_BIT": "4"}, ["TURBOQUANT_KEY_BIT", "mean TURBOQUANT_KEY_BITS?"]),
        ({"TURBOQUANT_XYZZY": ""}, ["TURBOQUANT_XYZZY", "TURBOQUANT_WINDOW", "remove"]),
        (
            {"TURBOQUANT_KEY_BITS": "5"},
            ["_KEY_BITS is 5", "2, 3, 4 or 8 (8 with affine only)", "change"],
        ),
        ({"turboquant_window": "64"}, ["turboquant_window", "mean TURBOQUANT_WINDOW?"]),
        ({"Turboquant_Windwo": "64"}, ["Turboquant_Windwo", "mean TURBOQUANT_WINDOW?"]),
        ({"turboquant": "1"}, ["setting turboquant in", "mean TURBOQUANT?"]),
        ({"TURBOQUANT_VALUE_BITS": "four"}, ["_VALUE_BITS is 'four'", "2, 3, 4 or 8"]),
        ({"TURBOQUANT_WINDOW": "100"}, ["100", "multiple of 32 from 32 to 4096"]),
        ({"TURBOQUANT_WINDOW": "0"}, ["multiple of 32 from 32 to 4096"]),
        ({"TURBOQUANT_WINDOW": "4128"}, ["multiple of 32 from 32 to 4096"]),
        ({"TURBOQUANT_SINKS": "65"}, ["65", "whole number from 0 to 64"]),
        ({"TURBOQUANT_SINKS": "-1"}, ["-1", "whole number from 0 to 64"]),
        ({"TURBOQUANT_BALANCE": "yes"}, ["'yes'", "allowed is 1 or 0:"]),
        ({"TURBOQUANT_KERNEL": "opencl"}, ["auto, eager, compiled, metal or cuda"]),
        ({"TURBOQUANT_BYPASS": "off"}, ["'off'", "none, identity or bridge"]),
        ({"TURBOQUANT_LOG": "Loud"}, ["'Loud'", "DEBUG", "CRITICAL"]),
        ({"TURBOQUANT_MEMORY_BUDGET": "6 apples"}, ["'6 apples'", "size such as 6GB", "or none"]),
        ({"TURBOQUANT_MEMORY_BUDGET": "0"}, ["'0'", "share of the memory such as 40%"]),
        ({"TURBOQUANT_MEMORY_BUDGET": "140%"}, ["'140%'", "40%"]),
        ({"TURBOQUANT_DISK_CACHE": ":5GB"}, ["':5GB'", "a folder, followed by :SIZE"]),
        ({"TURBOQUANT_DISK_CACHE": "/x:5QB"}, ["'/x:5QB'", "another size than 10GB"]),
        ({"TURBOQUANT_PRESET": "tiny"}, ["'tiny'", "quality, default or small"]),
        ({"TURBOQUANT_KEY_CODEC": "qjl"}, ["'qjl'", "lloyd-max or affine"]),
        (
            {"TURBOQUANT_KEY_BITS": "8"},
            ["key_bits = 8 (environment TURBOQUANT_KEY_BITS)", "lloyd-max", "2, 3 or 4"],
        ),
        ({"TURBOQUANT_VALUE_BITS": "4,x"}, ["'4,x'", "for each layer, separated by commas"]),
        ({"TURBOQUANT_VALUE_BITS": "4,5"}, ["(4, 5)", "2, 3, 4 or 8"]),
        ({"TURBOQUANT_VALUE_BITS": "4,8"}, ["value_bits = (4, 8)", "2, 3 or 4"]),
        (
            {"TURBOQUANT_CONFIG": "/no/such.toml"},
            ["/no/such.toml can't be read (No such file or directory)", "unset TURBOQUANT_CONFIG"],
        ),
    ],
)
def test_a_mistake_in_the_environment(environ, parts):
    with pytest.raises(SettingsError) as error:
        load(environ)
    assert [part for part in parts if part not in str(error.value)] == []


def test_bits_by_layer(write):
    path = write("[turboquant]\nkey_bits = [4, 3, 2]\n")
    chosen = load({"TURBOQUANT_VALUE_BITS": "4, 3,2", "TURBOQUANT_CONFIG": path}).general
    assert chosen.key_bits == chosen.value_bits == (4, 3, 2)
    layers = chosen.for_layers(3)
    assert [(layer.key_bits, layer.value_bits) for layer in layers] == [(4, 4), (3, 3), (2, 2)]
    with pytest.raises(SettingsError, match=r"key_bits \(file .*\) has 3 numbers.* 4 layers"):
        chosen.for_layers(4)
    assert len(load({}).general.for_layers(5)) == 5


def test_allowed_values_in_words():
    assert [one_of(x) for x in ((4,), (2, 4), (None, 2, 4))] == ["4", "2 or 4", "none, 2 or 4"]


def test_sizes_and_shares():
    sizes = ["1000", "500MB", "1.5 GB", " 2tb", "8GiB", "1.5 kib"]
    decimal, binary = [1000, 500 * 10**6, 15 * 10**8, 2 * 10**12], [2**33, 1536]
    assert list(map(size_of, sizes)) == decimal + binary
    for text in ("1Gi", "5 iB", "16 bananas", "-1GB", "", "6\u212aB"):
        with pytest.raises(ValueError, match="is not a size"):
            size_of(text)
    # A forgotten unit.
    with pytest.raises(ValueError, match="at least 1000 bytes"):
        folder_and_size("/a:20", 7)
    assert [share_of(text) for text in ("40%", "100 %")] == [0.4, 1]
    assert [share_of(text) for text in ("0%", "101%", "40")] == [None] * 3
    assert folder_and_size("a:b", 7) == ("a:b", 7)
    assert folder_and_size("/a:5KB", 7) == ("/a", 5000)


def test_eight_bits_are_affine_only():
    environ = {"TURBOQUANT_VALUE_BITS": "8", "TURBOQUANT_VALUE_CODEC": "affine"}
    assert load(environ).general.value_bits == 8


@pytest.mark.parametrize("header", ["turboquant", "tool.turboquant"])
def test_file(write, header):
    path = write(
        f'[{header}]\nkey_bits = 3\nbalance = false\nopt_out = ["mistral*"]\n'
        f'[{header}.models."qwen*"]\nkey_bits = 2\n'
    )
    configuration = load({"TURBOQUANT_CONFIG": path})
    general, qwen = configuration.for_model(LLAMA), configuration.for_model(QWEN)
    assert configuration.config == path
    assert (general.key_bits, qwen.key_bits) == (3, 2)
    assert (general.balance, qwen.balance) == (False, False)
    assert qwen.opt_out == ("mistral*",)
    assert general.source("key_bits") == f"file {path} [{header}]"
    assert qwen.source("key_bits") == f'file {path} [{header}.models."qwen*"]'
    assert configuration.all_settings() == [general, qwen]


def test_the_first_table_that_matches_decides(write):
    path = write('[turboquant.models."qwen2*"]\nsinks = 1\n[turboquant.models."*"]\nsinks = 2\n')
    configuration = load({"TURBOQUANT_CONFIG": path})
    assert [configuration.for_model(m).sinks for m in (QWEN, LLAMA)] == [1, 2]


def test_a_stronger_layer_wins(write):
    path = write('[turboquant]\nsinks = 1\n[turboquant.models."llama"]\nsinks = 2\n')
    environ = {"TURBOQUANT_CONFIG": path}

    def sinks(environ, **overrides):
        configuration = load(environ, overrides)
        return [configuration.for_model(m).sinks for m in (QWEN, LLAMA)]

    assert sinks({}) == [4, 4]
    assert sinks(environ) == [1, 2]
    assert sinks({**environ, "TURBOQUANT_SINKS": "3"}) == [3, 3]
    assert sinks({**environ, "TURBOQUANT_SINKS": "3"}, sinks=5) == [5, 5]
    assert sinks({}, config=path) == [1, 2]


def test_a_preset_is_expanded_in_the_layer_that_names_it(write):
    path = write("[turboquant]\nkey_bits = 2\n")
    stronger = load({"TURBOQUANT_CONFIG": path, "TURBOQUANT_PRESET": "default"}).general
    assert stronger.key_bits == PRESETS["default"]["key_bits"]
    assert stronger.source("key_bits") == "preset default"
    path = write('[turboquant]\npreset = "small"\n')
    weaker = load({"TURBOQUANT_CONFIG": path, "TURBOQUANT_KEY_BITS": "4"}).general
    assert (weaker.key_bits, weaker.value_bits) == (4, PRESETS["small"]["value_bits"])
    path = write('[turboquant]\nkey_bits = 2\npreset = "quality"\n')
    same = load({"TURBOQUANT_CONFIG": path}).general
    assert (same.key_bits, same.value_bits) == (2, PRESETS["quality"]["value_bits"])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_the_same_keys(preset):
    assert PRESETS[preset].keys() == PRESETS["default"].keys()
    assert load({"TURBOQUANT_PRESET": preset}).general.preset == preset


@pytest.mark.parametrize(
    "text, parts",
    [
        ("[turboquant\n", ["is not TOML in UTF-8", "line 1"]),
        ("[other]\nx = 1\n", ["has 0 of the tables", "[tool.turboquant]"]),
        ("tool = 1\n", ["has 0 of the tables"]),
        ("[turboquant]\n[tool.turboquant]\n", ["has 2 of the tables"]),
        ("[turboquant]\nkeybits = 4\n", ["keybits", "[turboquant]", "mean key_bits?"]),
        ("[turboquant]\nkey_bits = '4'\n", ["key_bits in file", "'4'", "2, 3, 4 or 8"]),
        ("[turboquant]\nkey_bits = []\n", ["key_bits in file", "()", "one for each layer"]),
        ("[turboquant]\nkey_bits = 4.0\n", ["key_bits in file", "4.0"]),
        ("[turboquant]\nsinks = true\n", ["sinks in file", "True", "0 to 64"]),
        ("[turboquant]\nbalance = 1\n", ["balance in file", "allowed is true or false:"]),
        ("[turboquant]\nopt_out = 'x'\n", ["opt_out in file", "list of glob patterns"]),
        ("[turboquant]\nmodels = 3\n", ["models in file", '[turboquant.models."PATTERN"]']),
        ("[turboquant.models]\nqwen2 = 3\n", ['models."qwen2"', "table of settings"]),
        ("[turboquant.models.qwen2]\nlog = 'INFO'\n", ["log", 'models."qwen2"', "known are"]),
        ("[turboquant.models.qwen2]\ndisk_cache = '/x'\n", ["disk_cache", 'models."qwen2"']),
        ("[turboquant]\nmemory_budget = 6\n", ["memory_budget in file", "6; allowed is a size"]),
        ("[turboquant.models.qwen2]\nkey_bits = 8\n", ['models."qwen2"', "lloyd-max"]),
    ],
)
def test_a_mistake_in_the_file(write, text, parts):
    path = write(text)
    with pytest.raises(SettingsError) as error:
        load({"TURBOQUANT_CONFIG": path})
    assert [part for part in [path, *parts] if part not in str(error.value)] == []


def test_a_hidden_mistake_is_still_an_error(write):
    path = write("[turboquant]\nkey_bits = 9\n")
    with pytest.raises(SettingsError, match="key_bits in file"):
        load({"TURBOQUANT_CONFIG": path, "TURBOQUANT_KEY_BITS": "4"})


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"bits": 4}, r"unknown setting bits in enable\(\)"),
        ({"window": 33}, r"window in enable\(\) is 33"),
    ],
)
def test_a_mistake_in_an_override(overrides, message):
    with pytest.raises(SettingsError, match=message):
        load({}, overrides)


def test_settings_made_by_hand_are_checked():
    with pytest.raises(SettingsError, match=r"window .default. is 33"):
        Settings(window=33)
    assert hash(Settings(sources={"sinks": "here"})) == hash(Settings())


@pytest.mark.parametrize(
    "pattern, identity, expected",
    [
        ("qwen2", QWEN, True),
        ("qwen", QWEN, False),
        ("/models/*", QWEN, True),
        ("qwen2-z??", QWEN, True),
        ("models", QWEN, False),
        ("mlx-community/*", LLAMA, True),
        ("*4bit", LLAMA, True),
        ("LLAMA", LLAMA, False),
    ],
)
def test_patterns(pattern, identity, expected):
    assert identity.matches(pattern) is expected
    opted_out = load({"TURBOQUANT_OPT_OUT": f"none-such,{pattern}"}).general.opted_out(identity)
    assert opted_out == (pattern if expected else None)


def test_paths_are_matched_however_they_are_spelled(tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "link").symlink_to("zoo")
    monkeypatch.chdir(tmp_path)
    for path in ("zoo", "zoo/", "./zoo", "link", f"{tmp_path}/zoo"):
        identity = ModelIdentity("llama", path)
        assert identity.matches("zoo") and identity.matches(f"{tmp_path.resolve()}/zoo")
