"""What each method is good for, and where it is described: the words of launch/show_methods.py.

Whatever can be counted or tried stands there as a figure. A method that is not listed here works all the same.
"""

from typing import NamedTuple


class MethodDescription(NamedTuple):
    """What a method is good for, and its paper: a number on arXiv, or where it appeared."""

    good_for: str
    paper: str


NOT_DESCRIBED = MethodDescription("not described here", "")
METHOD_DESCRIPTIONS = {
    name: MethodDescription(good_for, paper)
    for name, good_for, paper in (
        # weights of the model itself
        ("full", "much data, new knowledge", ""),
        ("freeze", "a part of the weights, as they are", ""),
        ("bitfit", "few examples; needs biases", "2106.10199"),
        # a sum of low rank beside each weight
        ("lora", "almost everything; start here", "2106.09685"),
        ("qlora", "little GPU memory", "2305.14314"),
        ("adalora", "ranks where they help most", "2303.10512"),
        ("delora", "long training, a bounded change", "2503.18225"),
        ("glora", "LoRA for weights, inputs and biases", "2306.07967"),
        ("gralora", "high ranks without overfitting", "2505.20355"),
        ("miss", "fast steps, one matrix a layer", "2409.15371"),
        ("peanut", "changes that are not linear", "2410.01870"),
        # a sum of high rank from few numbers
        ("loha", "small files of high rank", "2108.06098"),
        ("lokr", "very small files of high rank", "2309.14859"),
        ("hira", "high rank at LoRA's size", "ICLR 2025"),
        ("c3a", "high rank, few numbers", "2407.19342"),
        ("randlora", "full rank from random bases", "2502.00987"),
        ("frod", "full rank, few numbers", "AAAI 2026"),
        ("fourierft", "many tiny adapters", "2405.03003"),
        ("waveft", "exactly as many numbers as wanted", "2505.12532"),
        ("vera", "many tiny adapters", "2310.11454"),
        ("pvera", "how sure an answer is", "2512.07703"),
        ("vblora", "many tiny adapters", "2405.15179"),
        ("unilora", "many tiny adapters", "2506.00799"),
        ("tinylora", "reinforcement learning", "2602.04118"),
        # some of the weight's own numbers
        ("shira", "switching adapters fast", "2406.13175"),
        ("supertuning", "the largest weights alone", "2607.09287"),
        ("adamss", "fewer numbers while it trains", "NeurIPS 2025"),
        ("deft", "new content in place of old", "NeurIPS 2025"),
        ("osf", "one task after another", "2504.07097"),
        # rotations of the weight
        ("oft", "keeping what the model knows", "2306.07280"),
        ("boft", "as oft, with fewer numbers", "2311.06243"),
        ("hra", "as oft, at LoRA's cost", "2405.17484"),
        ("psoft", "as oft, with very few numbers", "2505.11235"),
        ("road", "many adapters in one batch", "2409.00119"),
        # scales and biases
        ("ia3", "few examples", "2205.05638"),
        ("beft", "few examples", "2509.15974"),
        ("ln_tuning", "very few numbers, no new layers", "2312.11420"),
        ("trainable_tokens", "new words alone", ""),
        # virtual tokens
        ("prompt", "large models, one task each", "2104.08691"),
        ("p_tuning", "questions about facts", "2103.10385"),
        ("prefix", "generation, one task each", "2101.00190"),
        ("p_tuning_v2", "as prefix, for hard tasks", "2110.07602"),
    )
}
