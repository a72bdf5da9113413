"""What is pointed at a model: hook-based probes that take any hooked model.

The doors; what else a package holds stands behind its door.

    values        replace W_V or OV circuits: zero, identity, low rank, random, equation 5.1, ...
    attention     knock out, rescale or patch attention between spans
    ablation      replace the outputs of heads, attention layers or MLPs by zero or a mean
    activations   patch activations between runs of different length, by span
    patching      sweeps of that over layers, spans and heads
    logit_shift   the exact account of the shift: token x layer x head
    account       the account of one run, on language models and on the one-layer model
    logit_lens    what each layer would answer
    heads         find the heads that carry the shift, and test them on unseen facts
    geometry      inner products by distance, spectra (`geometry.subspaces`: principal angles)
    memory_fit    how far a W_V or OV circuit is a sum of outer products of associated tokens
    specification probes as texts, such as `knock-out:from=last,to=hijack`

Below them: `sites` (layers and heads by number), `sources` (what geometry can be asked about) and
`inputs` (prompts in batches and pairs, and which of their tokens correspond).
"""
