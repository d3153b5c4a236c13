"""Reports of measured speed: report.md and a report.html that needs nothing but a browser.

    python -m bench.report results/e2e_speedup.json results/online_speedup.json --output-dir results
    python -m bench.report --compare before/e2e_speedup.json after/e2e_speedup.json --output-dir results

A result is read (results.py), becomes blocks of text, tables and figures (offline.py, online.py, sweep.py,
comparison.py, all made of content.py), and these are written as Markdown and as HTML (write.py).
"""
