"""Results as Markdown. `common` writes numbers and tables; the other files render a suite each, but
for `workloads` and `growth`, more of the op suite, `summary`, README's rows, and `miniature`.

render(result, everything=False) -> str     one recorded result; `everything` adds what pages omit
"""
