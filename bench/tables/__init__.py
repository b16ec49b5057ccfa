"""Results as Markdown: `common` writes numbers and tables, each other file renders one suite.

render(result, everything=False) -> str     one recorded result; `everything` adds what README omits
"""
