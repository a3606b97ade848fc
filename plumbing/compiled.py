"""--compile: torch.compile for the decoder layers of a policy.

Layers are compiled, not the model: they are all alike, so that one compilation serves them all,
and what is around them (positions, pictures, checkpointing, FSDP2's gathering of weights) stays
plain Python.
"""

from types import MethodType

from plumbing.common import fail

# How often the code of a layer may be compiled: with and without a gradient, one row and several,
# with adapters on and off, and some to spare. Beyond it torch goes on without compiling.
VARIANTS = 32


def check_compiler():
    """End with a sentence where torch.compile finds no C++ compiler, without which it makes no code
    for a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        fail(
            "--compile needs a C++ compiler, and there is neither g++ nor one that the environment "
            "variable CXX names; install one, or leave the flag out"
        )


def compile_layers(policy):
    """Let every decoder layer of a policy score with compiled code. Parameters keep their names and
    values; results differ by rounding.

    Rows have many lengths, so their number and length are variables of the compiled code. Two
    things run as they are: a layer that fills a sampler's cache, which grows with every token, and
    the attention of flat rows, which is compiled by itself, once for each length.
    """
    import torch._dynamo
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    if policy.flat:
        apart = torch.compiler.disable(ALL_ATTENTION_FUNCTIONS["packed_flex"])
        ALL_ATTENTION_FUNCTIONS.register("packed_flex", apart)
    layers = policy.vlm.model.language_model.layers
    plain = type(layers[0]).forward
    fast = torch.compile(plain, dynamic=True)

    def forward(layer, *inputs, past_key_values=None, **settings):
        chosen = fast if past_key_values is None else plain
        return chosen(layer, *inputs, past_key_values=past_key_values, **settings)

    for layer in layers:
        layer.forward = MethodType(forward, layer)
