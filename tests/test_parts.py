"""Parts chosen by name: how they are registered, found and set, and what each mistake is answered with."""

import math
import sys
from dataclasses import dataclass

import pytest

from s2ap_ext import parts
from s2ap_ext.methods import Method
from s2ap_ext.parts import Part, find, make, names, register, registered
from s2ap_ext.settings import Text, check, key, read, value_of


@pytest.fixture
def gadgets(monkeypatch):
    """A kind of parts of the test's own, forgotten afterwards."""
    monkeypatch.setattr(parts, "_registered", dict(parts._registered))
    monkeypatch.setitem(parts.PACKAGES, "gadget", "s2ap_ext")

    class Gadget(Part):
        kind = "gadget"

    @register("wheel")
    class Wheel(Gadget):
        @dataclass(frozen=True)
        class Settings:
            radius: float = key(1.0, "in metres", low=0)
            spokes: int = key(8, "how many", low=1, high=100)

    return Gadget, Wheel


@pytest.mark.parametrize("kind", list(parts.PACKAGES))
def test_every_part_of_the_package_is_found_by_its_name_and_has_defaults_that_fit(kind):
    assert registered(kind)
    for name, part in registered(kind).items():
        assert part.kind == kind
        assert part.name == name
        settings = part.Settings()
        assert check(settings, name) == settings
        assert part.__doc__ or sys.modules[part.__module__].__doc__, f"{kind} {name} does not say what it is"


def test_a_part_is_made_from_its_name_and_options(gadgets):
    assert find("gadget", "wheel") is gadgets[1]
    wheel = make("gadget", "wheel", radius="1/4")
    assert (wheel.name, wheel.settings.radius, wheel.settings.spokes) == ("wheel", 0.25, 8)
    assert gadgets[1](wheel.settings).settings == wheel.settings
    assert repr(wheel) == "Wheel(gadgets.<locals>.Wheel.Settings(radius=0.25, spokes=8))"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda: find("gadget", "weel"), r"gadget: expected one of wheel, got 'weel'; did you mean wheel\?"),
        (lambda: make("gadget", "wheel", radios=1), r"gadget wheel: unknown key radios; did you mean radius\?; it takes radius, spokes"),
        (lambda: make("gadget", "wheel", radius=-1), r"gadget wheel: radius: expected a number >= 0, got -1"),
        (lambda: make("gadget", "wheel", spokes=101), r"gadget wheel: spokes: expected an integer in \[1, 100\], got 101"),
        (lambda: make("gadget", "wheel", spokes=8.0), r"gadget wheel: spokes: expected an integer, got 8\.0"),
    ],
)
def test_a_mistake_is_answered_with_the_part_the_key_and_what_was_expected(gadgets, how, message):
    with pytest.raises(ValueError, match=message):
        how()


def test_settings_made_by_hand_are_checked_too(gadgets):
    with pytest.raises(ValueError, match=r"radius: expected a number >= 0, got -3"):
        gadgets[1](gadgets[1].Settings(radius=-3.0))


def test_a_name_belongs_to_one_class(gadgets):
    with pytest.raises(ValueError, match=r"gadget wheel: .*Other cannot take a name that .*Wheel has"):

        @register("wheel")
        class Other(gadgets[0]):
            pass

    assert find("gadget", "wheel") is gadgets[1]


def test_only_parts_of_a_kind_can_be_registered():
    with pytest.raises(TypeError, match=r"expected a class that derives from the base class of a kind"):

        @register("nothing")
        class Nothing(Part):
            pass


def test_a_family_shares_one_class(gadgets):
    @register("NUMBER-wheeler", pattern=r"\d+-wheeler")
    class Vehicle(gadgets[0]):
        def wheels(self):
            return int(self.name.partition("-")[0])

    assert make("gadget", "18-wheeler").wheels() == 18
    assert find("gadget", "3-wheeler") is find("gadget", "3-wheeler")
    assert names("gadget") == ["NUMBER-wheeler", "wheel"]
    with pytest.raises(ValueError, match="expected one of NUMBER-wheeler, wheel, got 'NUMBER-wheeler'"):
        find("gadget", "NUMBER-wheeler")


def test_an_installed_package_brings_parts_by_an_entry_point(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "_registered", dict(parts._registered))
    (tmp_path / "foreign_parts.py").write_text(
        "from s2ap_ext.methods import Method\n"
        "from s2ap_ext.parts import register\n"
        "@register('foreign')\n"
        "class Foreign(Method):\n"
        "    def parameters(self, model, *, perturbed):\n"
        "        return []\n"
    )
    about = tmp_path / "foreign_parts-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-parts\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[s2ap_ext.parts]\nmine = foreign_parts\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    parts._load_entry_points.cache_clear()
    parts._load.cache_clear()
    try:
        assert issubclass(find("method", "foreign"), Method)
        (about / "entry_points.txt").write_text("[s2ap_ext.parts]\nmine = no_such_module\n")
        parts._load_entry_points.cache_clear()
        parts._load.cache_clear()
        with pytest.raises(ImportError, match=r"s2ap_ext\.parts: mine = no_such_module cannot be loaded"):
            find("method", "foreign")
    finally:
        parts._load_entry_points.cache_clear()
        parts._load.cache_clear()


def finding(text):
    if text != "find":
        raise ValueError(f"expected a number or find, got {text!r}")


@dataclass(frozen=True)
class Everything:
    flag: bool = key(False, "yes or no")
    count: int = key(1, "how many", low=0)
    size: float = key(1.0, "how large", low=0, high=10)
    word: str = key("a", "which", choices=("a", "b"))
    names: tuple[str, ...] = key((), "whom")
    either: float | str = key(0.5, "a size, or how to find one", low=0, high=1, parse=finding)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("flag", True, True),
        ("flag", Text("TRUE", "--set flag"), True),
        ("count", 3, 3),
        ("count", Text("3", "--set count"), 3),
        ("size", 3, 3.0),
        ("size", "8/255", 8 / 255),
        ("size", Text("1e-3", "--set size"), 1e-3),
        ("word", "b", "b"),
        ("names", ["x", "y"], ("x", "y")),
        ("names", "x, y,", ("x", "y")),
        ("names", Text("", "--set names"), ()),
        ("either", 1, 1.0),
        ("either", Text("1/4", "--set either"), 0.25),
        ("either", "find", "find"),
        ("either", Text("find", "--set either"), "find"),
    ],
)
def test_values_are_read_as_the_type_of_their_key(name, given, value):
    found = getattr(read(Everything, {name: given}, "here"), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("flag", 1, r"here: flag: expected true or false, got 1"),
        ("flag", Text("yes", "--set flag"), r"--set flag: expected true or false, got 'yes'"),
        ("count", True, r"here: count: expected an integer, got True"),
        ("count", Text("1" * 5000, "--set count"), r"--set count: expected an integer, got '1+\.\.\."),
        ("size", math.nan, r"here: size: expected a number, got nan"),
        ("size", 10**400, r"here: size: expected a number, got 1"),
        ("size", "1/0", r"here: size: expected a number, got '1/0'"),
        ("size", 11, r"here: size: expected a number in \[0, 10\], got 11"),
        ("word", "aa", r"here: word: expected one of a, b, got 'aa'; did you mean a"),
        ("names", [1], r"here: names: expected a list of texts, got \[1\]"),
        ("names", 1, r"here: names: expected a list of texts, got 1"),
        ("either", Text("fin", "--set either"), r"--set either: expected a number or find, got 'fin'"),
        ("either", 2, r"here: either: expected a number in \[0, 1\], got 2"),
        ("either", True, r"here: either: expected a number, got True"),
        ("either", [], r"here: either: expected a number, got \[\]"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name, given, message):
    with pytest.raises(ValueError, match=message):
        value_of(Everything, name, given, f"here: {name}")
