"""Memory of compiled programs, in bytes per device."""

import jax


def peak_bytes(program: jax.stages.Compiled) -> int:
    """Returns the peak that the compiler reports; on CPUs it leaves some buffers out.

    It counts buffers in the host's memory (``model.remat=offload``) as the device's, hence the second bound.
    """
    memory = program.memory_analysis()
    assert memory is not None  # CPUs, GPUs and TPUs report it
    return min(memory.peak_memory_in_bytes, compiled_bytes(program))


def host_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes that a program keeps in the host's memory for a device (``model.remat=offload``)."""
    memory = program.memory_analysis()
    assert memory is not None
    return memory.host_temp_size_in_bytes


def compiled_bytes(program: jax.stages.Compiled) -> int:
    """Returns the bytes of a program's arguments, results and temporaries."""
    memory = program.memory_analysis()
    assert memory is not None
    planned = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return planned - memory.alias_size_in_bytes
