"""Which form of a program is run, by the memory that is left; the limits are arguments, the programs are real ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import task_keys
from mllm4d_jax.models.layers import REMAT
from mllm4d_jax.run.fitting import AUTO, Fitted, extra_bytes, free_bytes, remat_forms


def wide(x):
    return (x @ x.T) @ x  # with an [n, n] between


def narrow(x):
    return x @ (x.T @ x)


FUNCTIONS = {"wide": wide, "narrow": narrow}


def fitted(room, made=None) -> Fitted:
    def make(name):
        def traced(x):
            if made is not None:
                made.append((name, x.shape[0]))
            return FUNCTIONS[name](x)

        return jax.jit(traced)

    return Fitted(make, tuple(FUNCTIONS), lambda: room)


def array(n):
    return np.arange(4 * n, dtype=np.float32).reshape(n, 4) / n


def test_bytes_of_a_program_besides_its_arguments():
    x = jax.ShapeDtypeStruct((256, 4), jnp.float32)
    wanted = [extra_bytes(jax.jit(f).lower(x).compile()) for f in (wide, narrow)]
    assert 4 * 256 * 256 + 16 * 256 <= wanted[0] < 1.2 * 4 * 256 * 256  # the product between, and the result
    assert 16 * 256 <= wanted[1] < 2 * 16 * 256


def test_the_first_form_that_fits_is_run_and_each_shape_is_looked_at_once():
    made, room = [], 4 * 300 * 300
    program = fitted(room, made)
    for n in (256, 256, 400, 400, 256):
        np.testing.assert_allclose(program(array(n)), wide(array(n)), rtol=1e-4)
    assert made == [("wide", 256), ("wide", 400), ("narrow", 400)]
    assert program.dropped == 1 and program.choose(array(400)).name == "narrow"
    assert program.choose(array(400)).fits and program.choose(array(400)).room == room


def test_where_nothing_fits_the_last_form_is_given_and_said_not_to_fit(capsys):
    program = fitted(10)
    choice = program.choose(array(64))
    assert (choice.name, choice.fits, program.dropped) == ("narrow", False, 1) and choice.wanted > 10
    assert not capsys.readouterr().out


def test_what_was_chosen_is_said_once(capsys):
    program = fitted(1 << 30)
    for _ in range(2):
        program(array(64))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "model.remat=auto takes 'wide': 0.0 of 1.0 GiB" in out


def test_memory_that_is_not_known_is_taken_to_be_small():
    made = []
    assert fitted(None, made).choose(array(64)).name == "narrow" and made == [("narrow", 64)]


def test_a_single_form_is_run_without_looking():
    def room():
        raise AssertionError

    program = Fitted(lambda name: jax.jit(FUNCTIONS[name]), ("wide",), room)
    np.testing.assert_allclose(program(array(64)), wide(array(64)), rtol=1e-4)
    assert program.choose(array(64)).fits


class Refused:
    """A form that the compiler refuses, as it does for TPUs."""

    def __init__(self, message):
        self.message = message

    def lower(self, *args):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.", "INTERNAL: a bug"])
def test_a_form_that_the_compiler_refuses_for_memory_is_passed_over(message):
    forms = {"big": Refused(message), "narrow": jax.jit(narrow)}
    program = Fitted(forms.__getitem__, tuple(forms), lambda: 1 << 30)
    if "INTERNAL" in message:
        with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
            program.choose(array(64))
    else:
        assert program.choose(array(64)).name == "narrow" and program.dropped == 1


def test_policies_of_auto():
    assert remat_forms("auto", "cpu") == ("none",)  # there is no other memory to fit into
    for platform in ("gpu", "tpu"):
        assert remat_forms("auto", platform) == REMAT[1:] and remat_forms("auto", platform)[-1] == "full"
    assert remat_forms("full", "gpu") == remat_forms("full", "cpu") == ("full",)
    assert free_bytes() is None  # CPUs do not say


@pytest.mark.parametrize("task", ["sft", "grpo"])
def test_the_key_has_every_policy(task):
    (key,) = (key for key in task_keys(task) if key.name == "model.remat")
    assert key.choices == (AUTO, *REMAT) and key.default == AUTO and key.free
