"""What one does with a model: change it by hooks, and measure what carries the hijack.

Probes that change a model, for any list of `probes=`:

    attention       knock_out, rescale, redirect, transplant: attention between spans
    values          replace, replace_circuit: zero, low rank, ... for W_V or OV circuits
    ablation        ablate: outputs of heads, attention layers or MLPs become zero or a mean
    activations     patch, patch_between: activations of one run put into another, by span
    specification   parse: a probe as text, such as `knock-out:source=last,target=hijack`

Measurements:

    logit_shift     trace, average: the exact account of the shift, token x layer x head
    account         the account of one run, on language models and on the one-layer model
    logit_lens      trace: the answer of each layer
    patching        sweep: activation patching over layers, spans and heads
    heads           search: the heads that carry the shift, tested on unseen facts
    geometry        fit: inner products by distance; spectrum; subspaces: principal angles
    memory_fit      fit: how far a W_V or OV circuit is a sum of outer products

The modules `activation_sites` and `named_models` serve several of these.
"""
