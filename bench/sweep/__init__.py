"""Speed against what was removed: sparsities x {uniform, ragged} x {MHA, GQA, MoE}, and the DDP paper's models.

    python -m bench.sweep                  # half a billion parameters, under an hour on two cores
    python -m bench.sweep --paper          # the paper's models, their layers cut until they fit into memory
    python -m bench.sweep --dry-run        # cells, sizes, ideal speedups and the time that all this takes

A cell is one pruned model against its dense original, in a JSON file of its own like those of bench/e2e_speedup.py.
Cells whose file is there are not measured again. shapes.py has the models, patterns.py what is removed of them,
cells.py puts both together, plan.py says which cells run side by side, run.py measures, summary.py makes sweep.json.
"""
