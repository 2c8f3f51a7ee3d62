"""What compilers are told: nothing that they do not know."""

from puna.models import hardware


def test_flags_that_jaxlib_does_not_know_are_left_out():
    known, other = "--xla_force_host_platform_device_count=2", "--xla_backend_optimization_level=0"
    assert hardware.known_xla_flags(known, other) == [known, other]
    given = ["--xla_no_such=1", known, "--xla_nor_this=true", other]
    assert hardware.known_xla_flags(*given) == [known, other]
    assert hardware.known_xla_flags("--xla_no_such=1") == []
