"""Results as Markdown: `common` writes numbers and tables, each other file renders one suite,
`summary` what README shows of them.

render(result, everything=False) -> str     one recorded result; `everything` adds what pages omit
"""
